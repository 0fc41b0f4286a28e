"""Owns the deadline for compiling what an answer must match: in threads of its own, beside the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from tiny_llm.decoding.grammar import Grammar
from tiny_llm.decoding.structured_output import GrammarCompiler
from tiny_llm.sampling_params import SamplingParams
from tiny_llm.server.problems import Problem

_THREADS = 2


class GrammarThreads:
    """Where grammars are compiled."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")

    async def constrain(
        self, compiler: GrammarCompiler, params: SamplingParams, grammar: Grammar
    ) -> SamplingParams:
        """As ``compiler.constrain``. Raises Problem where that takes too long, RequestError as it does."""
        if compiler.is_kept(grammar):
            return compiler.constrain(params, grammar)
        loop = asyncio.get_running_loop()
        compiling = loop.run_in_executor(self._threads, compiler.constrain, params, grammar)
        try:
            return await asyncio.wait_for(compiling, self._timeout_s)
        except TimeoutError:
            what = f"{grammar.param} took more than {self._timeout_s:g} s to compile; make it simpler."
            raise Problem(400, what, code="too_complex", param=grammar.param) from None
