"""Owns a conversation with a model: what was said, and that it keeps fitting the context.

Knows nothing of how it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path

from tiny_llm.data import Chunk
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import RequestError
from tiny_llm.sampling_params import SamplingParams


class Conversation:
    """Turns of user and assistant after an optional system message.

    ``messages`` is the whole, as chat templates take it. When the next answer would have
    no room, the oldest turns are dropped; ``forgotten`` counts the messages dropped so far.

    Raises ConfigError if the model has no chat template.
    """

    def __init__(self, llm: LLM, system: str | None = None) -> None:
        self.system = system
        self.forgotten = 0
        self._llm = llm
        self._turns: list[dict[str, str]] = []
        llm.chat_prompt([{"role": "user", "content": "?"}])  # now, and not after the first question

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system message, if any, and every turn that is still remembered."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self._turns]

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self._turns.clear()
        self.forgotten = 0

    def ask(self, text: str, params: SamplingParams) -> Generator[Chunk]:
        """Say ``text`` and stream the answer, which is remembered as far as it was streamed.

        An answer stopped before its first character is forgotten together with the question.
        Raises RequestError at once if ``text`` cannot be answered; nothing is then changed.
        """
        return self._ask(self._turns, text, params)

    def retry(self, params: SamplingParams) -> Generator[Chunk]:
        """Ask the last question again; its new answer takes the old one's place, once it has begun.

        Raises RequestError as ``ask`` does, and if nothing was asked yet.
        """
        if not self._turns:
            raise RequestError("Nothing was asked yet; there is no question to answer again.")
        return self._ask(self._turns[:-2], self._turns[-2]["content"], params)

    def _ask(self, earlier: list[dict[str, str]], text: str, params: SamplingParams) -> Generator[Chunk]:
        before, forgotten = self._turns, self.forgotten
        self._turns = [*earlier, {"role": "user", "content": text}]
        try:
            self._make_room(params)
            chunks = self._llm.stream_chat(self.messages, params)
        except BaseException:
            self._turns = before
            raise
        self.forgotten += len(earlier) + 1 - len(self._turns)
        answer = self._listen(chunks, before, forgotten)
        next(answer)  # so that also an answer closed before its first chunk is forgotten
        return answer

    def save(self, path: Path) -> None:
        """Write ``messages`` as JSON to a new file; raises OSError if that fails or it exists."""
        with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(self.messages, file, ensure_ascii=False, indent=2)
            file.write("\n")

    def load(self, path: Path) -> None:
        """Go on with the conversation that ``save`` wrote, its system message included.

        Raises OSError if the file cannot be read, RequestError if it holds no conversation.
        """
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, no UTF-8, or a number too long
            raise RequestError(f"{path} is not JSON as /save writes it: {error}") from error
        messages = _checked(path, given)
        self.system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
        self._turns, self.forgotten = messages, 0

    def _listen(
        self, chunks: Iterator[Chunk], before: list[dict[str, str]], forgotten: int
    ) -> Generator[Chunk]:
        """The answer; nothing said leaves the turns ``before`` it."""
        said = ""
        try:
            yield Chunk("")  # to ``ask``
            for chunk in chunks:
                said += chunk.text
                yield chunk
        finally:  # also when the reader stops early
            if said:
                self._turns.append({"role": "assistant", "content": said})
            else:
                self._turns, self.forgotten = before, forgotten

    def _make_room(self, params: SamplingParams) -> None:
        """Drop the oldest exchanges until the prompt leaves room for an answer.

        The room is a quarter of the context, or less if ``max_tokens`` is less.
        """
        most = self._llm.max_context - min(params.max_tokens, self._llm.max_context // 4)
        while len(self._turns) > 1 and len(self._llm.chat_prompt(self.messages)) > most:
            del self._turns[0]
            while self._turns[0]["role"] != "user":
                del self._turns[0]


def _checked(path: Path, given: object) -> list[dict[str, str]]:
    """``given`` as messages: a system message or none, then questions and answers in turns."""
    if not isinstance(given, list):
        raise RequestError(f"{path} holds no list of messages, which /save writes.")
    first = 1 if given and _is_from("system", given[0]) else 0
    for index, message in enumerate(given[first:]):
        role = ("user", "assistant")[index % 2]
        if not _is_from(role, message):
            expected = f'expected {{"role": "{role}", "content": "..."}}, as /save writes it'
            raise RequestError(f"{path}, message {first + index + 1}: {expected}.")
    if (len(given) - first) % 2:
        raise RequestError(f"{path} ends with a question; a saved conversation ends with an answer.")
    return [{"role": message["role"], "content": message["content"]} for message in given]


def _is_from(role: str, message: object) -> bool:
    return (
        isinstance(message, dict) and message.get("role") == role and isinstance(message.get("content"), str)
    )
