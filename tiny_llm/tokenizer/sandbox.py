"""jinja2's immutable sandbox with a meter: a template cannot run or grow without end.

The sandbox keeps a template away from Python; it does not keep it from looping
over range(10**5) three deep or from making a string of 10 GB. So the syntax tree is
changed before it is compiled, and everything that repeats or makes something passes
the meter: loops, calls, filters, operators, literals, slices and output.

Owns that environment, which otherwise equals the one transformers renders with.
Refuses to know what a conversation is.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Iterator
from types import BuiltinMethodType, CodeType, MethodType
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from tiny_llm.tokenizer.meter import Meter

# Made for web pages; their cost is quadratic or large, and hidden inside one call.
_LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# Methods that make large things out of small ones, or take long, and that no chat needs.
_UNSAFE_METHODS = frozenset(
    {"encode", "expandtabs", "from_bytes", "maketrans", "striptags", "to_bytes", "translate", "unescape"}
)
_LONGEST_DATE_FORMAT = 1_000
# jinja passes these beside a call's own arguments.
_SCOPES = frozenset({"_block_vars", "_loop_vars"})
_CONTEXTS = (Context, nodes.EvalContext, jinja2.Environment)
# Names that no template can write, for filters that only the changed tree calls.
_EACH, _JOIN, _MADE = "for each", "join ~", "made"


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one render: the meter is its own."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, meter: Meter) -> None:
        """Charge all that the template does to ``meter``."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=self._output,
            optimized=False,  # nothing of the template runs while it is compiled
        )
        self._meter = meter
        self.filters["tojson"] = self._tojson
        for name in _LEFT_OUT:
            del self.filters[name]
        self.filters = {name: self._metered(name, function) for name, function in self.filters.items()}
        self.tests = {name: self._ticking(function) for name, function in self.tests.items()}
        self.filters |= {_EACH: meter.each, _JOIN: self._join, _MADE: meter.made}
        del self.globals["lipsum"]
        self.globals |= {
            "dict": _Dict(),
            "namespace": _namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def compile_metered(self, source: str) -> CodeType:
        """Return the code of a template for ``Template.from_code``. Raises what jinja raises."""
        tree = _Metering().visit(self.parse(source))
        tree.set_environment(self)
        return self.compile(tree)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic, with its result foreseen and charged."""
        self._meter.before_operator(operator, left, right)
        return self._meter.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls of methods, macros, globals and of a recursive ``loop``."""
        self._meter.tick()
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        if isinstance(method, (MethodType, BuiltinMethodType)):
            subject = method.__self__
            if isinstance(subject, (str, bytes, int)):
                named = [value for name, value in kwargs.items() if name not in _SCOPES]
                self._meter.before_call(method.__name__, subject, [*args, *named])
        elif isinstance(obj, LoopContext) and args:
            args = (self._meter.each(args[0]), *args[1:])
        return self._made(super().call(context, obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """The sandbox's rule, and no methods whose size cannot be foreseen."""
        if attr in _UNSAFE_METHODS and isinstance(obj, (str, bytes, int)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        operation = "%" if name == "format" else name  # the filter formats as % does

        @functools.wraps(function)  # keeps jinja's mark of who wants the context
        def run(*args: Any, **kwargs: Any) -> Any:
            values = args[1:] if isinstance(args[0], _CONTEXTS) else args
            self._meter.before_call(operation, values[0], [*values[1:], *kwargs.values()])
            return self._made(function(*args, **kwargs))

        return run

    def _ticking(self, function: Any) -> Callable[..., Any]:
        @functools.wraps(function)  # a filter like ``select`` may run one often and let nothing through
        def run(*args: Any, **kwargs: Any) -> Any:
            self._meter.tick()
            return function(*args, **kwargs)

        return run

    def _made(self, value: Any) -> Any:
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self._meter.once(value)
        return self._meter.made(value)

    @pass_context  # and so jinja never runs it while compiling
    def _output(self, context: Context, value: object) -> str:
        return self._meter.made(str(value))

    def _join(self, values: list[object]) -> str:
        return self._meter.gather(str(value) for value in values)

    def _tojson(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers' templates expect it: no HTML escapes, no \\u escapes."""
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        if indent is None and separators is None:
            return encoder.encode(value)
        return self._meter.gather(encoder.iterencode(value))


class _Metering(NodeTransformer):
    """Put the meter's filters around what makes or repeats."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(_EACH, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(_JOIN, nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(_MADE, node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(_MADE, node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(_MADE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # a constant passes ``_output``


def _filtered(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the answer for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """``dict`` without the type: through it a template could call ``dict.update`` on anything."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: object = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """``namespace`` whose names cannot play Python's own, and whose text is short."""

    def __setitem__(self, name: str, value: object) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    attributes = dict(*args, **kwargs)
    for name in attributes:
        _refuse_private(name)
    return _Namespace(attributes)


def _refuse_private(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > _LONGEST_DATE_FORMAT:
        raise jinja2.TemplateError(f"strftime_now: a format of {len(format):,} characters")
    return datetime.datetime.now().strftime(format)
