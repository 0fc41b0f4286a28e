"""Owns what the answers of a chat may be: calls of which functions, a form, and how they are read.

The library and the server ask here alike. Knows no HTTP; what is wrong is a RequestError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from tiny_llm.decoding.grammar import THINK, THOUGHT, Grammar, lark_grammar, require_schema
from tiny_llm.errors import RequestError
from tiny_llm.messages.message import MessageParser, closes_thinking, opens_thinking
from tiny_llm.messages.tool_grammar import calls_grammar, parameters_of, strict_grammar
from tiny_llm.messages.tool_parser import ARGS, CALLS, CLOSE, OPEN, ToolFormat, ToolParser, tool_format_of
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.tokenizer.tokenizer import Tokenizer

ToolSpec: TypeAlias = Mapping[str, Any]
"""{"type": "function", "function": {"name": ..., "description": ..., "parameters": a JSON schema}}."""
ToolChoice: TypeAlias = Literal["none", "auto", "required"] | Mapping[str, Any]
"""Whether to call; {"type": "function", "function": {"name": ...}} demands a call of that one."""

_LONGEST_OPENING = 16  # tokens: a tag in pieces of a character, and the newlines after it


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a chat's answers are held and read.

    ``tools`` are those that the template shows, None where no call may be made; ``tool_format`` is how this
    model writes a call. ``grammar`` is what the answer must match. ``thinking``: answers begin with a thought
    that the prompt has opened. ``is_strict``: the grammar is of calls alone, and waits for one.
    """

    tools: Sequence[ToolSpec] | None
    tool_format: ToolFormat
    parallel_tool_calls: bool = True
    grammar: Grammar | None = None
    thinking: bool = False
    is_strict: bool = False

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        *,
        tools: Sequence[ToolSpec] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        grammar: Grammar | None = None,
    ) -> ChatFormat:
        """The format of a request in OpenAI's words; ``grammar`` is of its ``response_format``.

        Raises RequestError for tools that are none, and for a call that is demanded and cannot be made.
        """
        functions = [_function(tool, number) for number, tool in enumerate(tools or ())]
        tool_format = tool_format_of(tokenizer.chat_template)
        offered = tools if functions and tool_choice != "none" else None
        form = cls(offered, tool_format, parallel_tool_calls, grammar)
        demanded = _demanded(functions, tool_choice)
        if demanded:
            _require_no_text(grammar)
            several = parallel_tool_calls and tool_choice == "required"
            text = calls_grammar(demanded, tool_format, several=several, tags=_tag_tokens(tokenizer))
            return replace(form, grammar=lark_grammar(text, "tools"))
        if offered and grammar is None and any(function.get("strict") for function in functions):
            return replace(form, grammar=_strict(functions, form, tokenizer), is_strict=True)
        return form

    def after(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> ChatFormat:
        """The format of answers to that prompt: a grammar waits for the end of what is thought first."""
        end = tokenizer.decode(prompt[-_LONGEST_OPENING:], skip_special_tokens=False)
        thinking, grammar = opens_thinking(end), self.grammar
        if grammar is not None and thinking:
            grammar = replace(grammar, thought="opened")
        elif grammar is not None:
            thinks = any(tag in tokenizer.chat_template for tag in (THINK, THOUGHT))
            may = self.is_strict or (thinks and not closes_thinking(end))
            grammar = replace(grammar, thought="may" if may else None)
        return replace(self, thinking=thinking, grammar=grammar)

    def params(self, params: SamplingParams) -> SamplingParams:
        """``params`` for such answers: where one call is wanted, its end is the answer's."""
        if not self.tools or self.parallel_tool_calls:
            return params
        return replace(params, stopping=lambda: _FirstCall(self.parser()))

    def parser(self) -> MessageParser:
        """What reads one answer."""
        if not self.tools:
            return MessageParser(thinking=self.thinking)
        names = [tool["function"]["name"] for tool in self.tools]
        tools = ToolParser(self.tool_format, names, parallel=self.parallel_tool_calls)
        return MessageParser(tools, thinking=self.thinking)


class _FirstCall:
    """Told an answer's text, says where its first call has ended."""

    def __init__(self, parser: MessageParser) -> None:
        self._parser = parser

    def __call__(self, text: str) -> bool:
        self._parser.push(text)
        return self._parser.is_over


def _require_no_text(grammar: Grammar | None) -> None:
    """Raise RequestError if all of an answer is held to a form, where it is to be a call.

    A ``response_format`` is of messages, and a call is none.
    """
    if grammar is not None and grammar.param != "response_format":
        what = f"tool_choice demands a call, which {grammar.param} forbids."
        raise RequestError(what, param="tool_choice", code="invalid_value")


def _strict(functions: Sequence[Mapping[str, Any]], form: ChatFormat, tokenizer: Tokenizer) -> Grammar:
    """What holds the calls of strict functions as soon as they begin."""
    tags = _tag_tokens(tokenizer)
    text = strict_grammar(functions, form.tool_format, several=form.parallel_tool_calls, tags=tags)
    if text is not None:
        return lark_grammar(text, "tools")
    number = next(number for number, function in enumerate(functions) if function.get("strict"))
    what = (
        f"tools[{number}].function.strict cannot be kept while tool_choice is auto: this model's tokens do "
        "not tell where a call begins. Leave it out, or demand the call by tool_choice."
    )
    raise RequestError(what, param=f"tools[{number}].function.strict", code="unsupported_value")


def _tag_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The tags of calls that are one token of this model's, and its id."""
    encoded = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in (OPEN, CLOSE, CALLS, ARGS)}
    return {tag: ids[0] for tag, ids in encoded.items() if len(ids) == 1}


def _function(tool: object, number: int) -> Mapping[str, Any]:
    """The function that a tool is."""
    match tool:
        case {"type": "function", "function": {"name": str()} as function}:
            assert isinstance(function, Mapping)
            param = f"tools[{number}].function.parameters"
            if not isinstance(function.get("parameters", {}), Mapping | None):
                what = (
                    f"{param} is {function['parameters']!r}, but must be a JSON schema, which is an object."
                )
                raise RequestError(what, param=param, code="invalid_value")
            require_schema(parameters_of(function), param)
            return function
        case _:
            expected = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            what = f"tools[{number}] is {tool!r}, but must be like {expected}."
            raise RequestError(what, param="tools", code="invalid_value")


def _demanded(
    functions: Sequence[Mapping[str, Any]], choice: ToolChoice | None
) -> Sequence[Mapping[str, Any]]:
    """The functions of which one must be called, none where that is left to the model."""
    match choice:
        case None | "none" | "auto":
            return ()
        case "required":
            if functions:
                return functions
            what = "tool_choice demands a call, which needs tools."
        case {"type": "function", "function": {"name": name}}:
            named = [function for function in functions if function["name"] == name]
            if named:
                return named
            what = f"tool_choice names {name!r}, which is not among the tools."
        case _:
            expected = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
            what = f"tool_choice is {choice!r}, but must be {expected}."
    raise RequestError(what, param="tool_choice", code="invalid_value")
