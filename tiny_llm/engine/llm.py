"""Owns the library's front door: a model and its tokenizer, and requests answered one by one.

Checks a request before anything runs, and measures it. Refuses to know terminals,
HTTP, and where a checkpoint comes from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Self, Unpack

from tiny_llm.config_embedding import EmbedOptions, TextEmbedding
from tiny_llm.data import Chunk, Completion
from tiny_llm.decoding.grammar import response_grammar
from tiny_llm.decoding.structured_output import GrammarCompiler
from tiny_llm.distributed.meeting import Ranks
from tiny_llm.engine.budget import Share
from tiny_llm.engine.contexts import Joined, Joining, NamedContexts
from tiny_llm.engine.draft import draft_bits, draft_shapes, open_draft, which_draft
from tiny_llm.engine.engine import Engine
from tiny_llm.engine.follower import join_in
from tiny_llm.engine.prompts import ChatOptions, Prompt, as_list, for_each, read_prompt, require_short
from tiny_llm.engine.ranks import Lead, gather, held
from tiny_llm.engine.settings import EngineSettings, Speculation, context_limit, open_store, usual_block_size
from tiny_llm.engine.turn import Turn, require_unforked
from tiny_llm.errors import RequestError, UsageError
from tiny_llm.memory import give_back_memory
from tiny_llm.messages.chat_format import ChatFormat, ToolChoice, ToolSpec
from tiny_llm.messages.chat_prompt import PLACE, ChatPrompts, with_place
from tiny_llm.messages.message import with_messages
from tiny_llm.models.checkpoint import Checkpoint, open_checkpoint
from tiny_llm.models.loading import check_options, load_model, weight_bytes
from tiny_llm.models.loading import kv_dtype as dtype_of_kv
from tiny_llm.models.registry import Model, require_able
from tiny_llm.ops.backend import active, choose, set_threads, use
from tiny_llm.proving.record import Shapes
from tiny_llm.proving.trial import Progress as Trying
from tiny_llm.proving.trial import kernels_for
from tiny_llm.sampling_params import BeamParams, PoolingParams, SamplingParams, require_known
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.weights.assemble import Progress
from tiny_llm.weights.hub import resolve

_AHEAD = 64  # requests that wait in the engine; the others wait here, and cost no memory there
Message = Mapping[str, object]


class LLM:
    """A model that answers: ``LLM("qwen2-0.5b").generate(["..."])``.

    ``model`` is a short name, a repository id, a folder, "demo", the bundled model, or a Checkpoint.
    ``dtype`` is "float32", "bfloat16" or "float16"; None takes what suits the device.
    ``quantize`` 4 or 8 packs the matrices on loading. ``offline`` never asks the network.
    ``backend`` is "cpu" (our kernels), "ref" (plain MLX), "mlx" (its fast operations, with which tokens
    may depend on what else is running) or, on such a GPU, "metal" or "cuda"; None takes the best there is.
    ``kernels`` says which ops run on our GPU kernels, where the backend has some: "auto", those that prove
    right and fast on this machine, tried now if they were not; "ours", all that prove right; "mlx", none.
    ``same_tokens`` insists that an answer's tokens do not depend on what else is running.
    ``threads`` is how many the CPU kernels use, in the whole process; None leaves it as it is.
    ``activations`` "exact" keeps backend "cpu" from rounding what meets quantized or bfloat16 matrices.
    ``max_context`` lowers the number of tokens that prompt and answer may have together.
    Keys and values are kept as ``kv_dtype`` says, "float32", "bfloat16", "float16" or "int8"; "auto" suits
    the weights.
    ``kv_memory`` is how many bytes keys and values may take, or a share of what several models may;
    ``swap_memory`` how many more those of sequences that had to make room may take until they go on: without
    it they are computed again, which "preemption" in ``scheduler`` weighs. What leaves the prefix cache goes
    to the folder ``kv_disk``, in up to ``kv_disk_size`` bytes, and is found again after a restart.
    ``speculate`` "off" checks no guesses of coming tokens, "ngram" those that a text which repeats itself
    suggests, the default where that changes no token, "draft" those of the model ``draft``.
    ``scheduler`` says who gets how much of a step. ``engine`` sets all four and more, and then none counts.
    ``ranks`` processes run the model together, started on this machine unless ``Ranks`` says otherwise; None:
    as ``mlx.launch`` says, or one. In all but the first, this does its part of the work and then ends the
    process.
    ``progress`` is called with (bytes read, bytes to read) while the weights load, ``trying`` with (part of
    1 that is done, what is done now) while kernels are tried.

    Close it, or use it in a ``with``, to give its memory back. One thread at a time can use it; AsyncLLM
    serves several at once.

    Raises ConfigError or WeightError with what is wrong with the model or an option, UsageError in a process
    that was forked from one that has made an LLM.
    """

    end_ids: frozenset[int]  # that end an answer; one beyond the vocabulary cannot be drawn, and is left out
    _model: Model | None  # None, like the turn: closed
    _turn: Turn | None

    def __init__(
        self,
        model: str | Path | Checkpoint = "demo",
        *,
        dtype: str | None = None,
        quantize: int | None = None,
        offline: bool = False,
        max_context: int | None = None,
        backend: str | None = None,
        kernels: str | None = None,
        same_tokens: bool = False,
        threads: int | None = None,
        activations: str = "int8",
        kv_dtype: str = "auto",
        kv_memory: int | Share | None = None,
        swap_memory: int = 0,
        kv_disk: str | Path | None = None,
        kv_disk_size: int = 20 * 10**9,
        speculate: Speculation | None = None,
        draft: str | Path | Checkpoint | None = None,
        scheduler: SchedulerSettings | None = None,
        engine: EngineSettings | None = None,
        ranks: int | Ranks | None = None,
        progress: Progress | None = None,
        trying: Trying | None = None,
    ) -> None:
        require_unforked()
        set_threads(threads)
        speculate, draft = which_draft(model, speculate, draft)
        self.backend = choose(backend) if backend else active()
        self.name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        if isinstance(model, (str, Path)):
            model = open_checkpoint(resolve(str(model), offline=offline))
        self.tokenizer, self._chat_prompts = model.tokenizer, ChatPrompts(model.tokenizer)
        check_options(dtype, quantize, activations, kv_dtype)
        block_size = engine.block_size if engine else usual_block_size(self.backend)
        drafting = None if draft is None else open_draft(draft, model, offline=offline)
        with use(self.backend):
            computed = dtype_of_kv(model.config, dtype=dtype, quantize=quantize)
            self._kept = kept = dtype_of_kv(model.config, dtype=dtype, quantize=quantize, kept=kv_dtype)
            of_draft = None if drafting is None else draft_shapes(drafting, block_size).keeping(kept)
        shapes = Shapes.of(model.config, quantize, computed, block_size).keeping(kept)
        self.kernels = kernels_for(
            self.backend, shapes, kernels, draft=of_draft, same_tokens=same_tokens, progress=trying
        )
        self._team = gather(self.name, locals() | {"backend": self.backend})
        with use(self.backend, self.kernels.ours), held(self._team) as group:
            own = partial(load_model, model, dtype=dtype, quantize=quantize, progress=progress)
            shares = None if self._team is None else self._team.shares
            self._model = loaded = own(activations=activations, group=group, shares=shares)
            self._draft = None if drafting is None else load_model(drafting, quantize=draft_bits(drafting))
        self._weight_bytes = sum(weight_bytes(one) for one in (loaded, self._draft) if one is not None)
        self.config, self.embedding = loaded.config, model.embedding
        self.max_context = context_limit(max_context, self.config.max_position_embeddings)
        self.end_ids = frozenset(i for i in model.end_ids if i < self.config.vocab_size)
        self.grammars = GrammarCompiler(self.tokenizer, self.config.vocab_size, self.end_ids)
        engine = engine or self._fitting(kv_memory, swap_memory, speculate, scheduler)
        how = (self.backend, self.kernels.on_ours, dtype, quantize, activations, kept, engine.block_size)
        self.fingerprint, self._store = open_store(kv_disk, kv_disk_size, model, how)
        self._use_engine(join_in(self._team, model, loaded, self.kernels, engine))

    @property
    def contexts(self) -> NamedContexts:
        """Texts that are computed once, and stand before prompts by name."""
        return NamedContexts(self.engine.contexts, self.stream)

    @property
    def engine(self) -> Engine:
        """What runs the requests. Raises UsageError if this LLM is closed."""
        return self._open_turn().engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LLM {self.description}>"

    @property
    def description(self) -> str:
        """Which model this is, on which backend, and its memory."""
        if self._turn is None:
            return f"{self.name}, closed"
        return f"{self.name} on {self.backend}: {self.memory}"

    def when_broken(self, call: Callable[[str], None]) -> None:
        """``call`` with the reason if other ranks of this model are lost, on the thread that hears of it."""
        if self._team is not None:
            self._team.when_broken(call)

    def close(self) -> None:
        """Give back the memory of weights, keys and values; what is under way ends. May be repeated.

        Raises UsageError if another thread's requests are under way.
        """
        if self._turn is not None:
            with self._turn.taken():
                if self._store is not None:
                    self._turn.engine.keep_cached()
                    self._store.close()
                if self._team is not None:
                    self._team.close()
                self._turn.engine.close()
                self._turn = self._model = self._draft = None
            give_back_memory()

    @property
    def memory(self) -> str:
        """What the weights take, what keys and values may, what is not guessed: for a line at the start."""
        settings, block_bytes = self.engine.settings, self.engine.block_bytes
        most = settings.share.budget.total // block_bytes if settings.share else settings.kv_blocks
        told = (
            f"weights {self._weight_bytes / 1e9:.2f} GB · keys and values up to "
            f"{most * block_bytes / 1e9:.2f} GB, {most * settings.block_size:,} tokens"
        )
        if swap := settings.host_blocks * block_bytes:
            told += f" · {swap / 1e9:.2f} GB to swap to"
        if settings.speculate == "off" and not self.kernels.same_tokens:
            told += " · no guesses, with which tokens might be others here (--speculate ngram)"
        return told

    def _fitting(
        self,
        kv_memory: int | Share | None,
        swap: int,
        speculate: Speculation | None,
        scheduler: SchedulerSettings | None,
    ) -> EngineSettings:
        draft = None if self._draft is None else self._draft.config
        with use(self.backend, self.kernels.ours):
            return EngineSettings.fitting(
                self.config,
                self._kept,
                kv_memory,
                scheduler,
                swap_memory=swap,
                speculate=speculate,
                draft=draft,
                max_context=self.max_context,
            )

    def _use_engine(self, settings: EngineSettings) -> None:
        assert self._model is not None, "it is not closed"
        engine = Engine(
            self._model,
            self.tokenizer,
            settings,
            kernels=self.kernels,
            kv_dtype=self._kept,
            end_ids=self.end_ids,
            max_context=self.max_context,
            draft=self._draft,
            store=self._store,
            lead=None if self._team is None else Lead(self._team),
        )
        self._turn = Turn(engine)
        self._chunks: dict[int, deque[Chunk]] = {}

    def _open_turn(self) -> Turn:
        if self._turn is None:
            raise UsageError(f"This LLM ({self.name}) is closed; make another one.")
        return self._turn

    def with_engine(self, settings: EngineSettings) -> LLM:
        """The same model behind an engine of its own, with other settings; the weights are shared."""
        self._open_turn()
        other = copy(self)
        other._use_engine(settings)
        return other

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        contexts: Sequence[str] = (),
        join: Joined = "exact",
        recompute: int = 0,
    ) -> list[Completion]:
        """Answer each prompt (a string, or a list of token ids), all at once; one prompt may stand alone.

        ``contexts`` are names of ``LLM.contexts`` that stand before each prompt, in their order: ``join`` and
        ``recompute`` are those of ``Joining``.

        ``params`` are for all of them, or a list with one for each. The completions come in the order of the
        prompts, ``params.n`` for each.

        Raises RequestError before anything runs if any of them is invalid.
        """
        asked = as_list(prompts)
        requests = [self.check(*one) for one in zip(asked, for_each(params, len(asked)), strict=True)]
        joining = Joining(contexts, join, recompute)
        ended = sorted(self.answers(requests, joining=joining), key=lambda one: (one[0], one[1].index))
        return [completion for _, completion in ended]

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamParams | Sequence[BeamParams] | None = None
    ) -> list[list[Completion]]:
        """Search for each prompt's likeliest answers: ``params.n``, best first, each with its ``score``.

        There are fewer where no more can be made, as a form allows no others.

        Raises RequestError as ``generate`` does.
        """
        asked = as_list(prompts)
        each = [one or BeamParams() for one in for_each(params, len(asked))]
        if not all(isinstance(one, BeamParams) for one in each):
            raise RequestError("params must be BeamParams, which say how wide the search is.")
        found: list[list[Completion]] = [[] for _ in asked]
        for index, completion in self.answers([self.check(*one) for one in zip(asked, each, strict=True)]):
            if completion.score != -inf or completion.error is not None:
                found[index].append(completion)
        return [sorted(own, key=lambda completion: completion.index) for own in found]

    def embed(self, texts: Prompt | Sequence[Prompt], **how: Unpack[EmbedOptions]) -> list[TextEmbedding]:
        """A vector for each text (a string, or a list of token ids), all at once; one text may stand alone.

        Pooled as the model's folder says, else the last token's hidden state, at length 1. Before each string
        stands the ``prompt`` of that name in the folder, or an ``instruction`` as it is. The first
        ``dimensions`` stay. Raises RequestError before anything runs if any of it is invalid.
        """
        asked = self.embedding.asked(as_list(texts), self.config.hidden_size, **how)
        ended = sorted(self.answers([self.check(*one) for one in asked]), key=lambda one: one[0])
        return [TextEmbedding.of(completion) for _, completion in ended]

    def answers(
        self, requests: Iterable[tuple[list[int], SamplingParams]], **options: Any
    ) -> Iterator[tuple[int, Completion]]:
        """Answer checked requests, as many at a time as fit; yield each as it ends, with its number.

        ``options`` are those of ``Engine.add``.

        A request that fails on the way has its reason in ``Completion.error``. Raises CapacityError for
        one that can never fit, and ends the others.
        """
        for index, chunk in self._chunks_of(requests, options):
            if chunk.completion is not None:
                yield index, chunk.completion

    def _chunks_of(
        self, requests: Iterable[tuple[list[int], SamplingParams]], options: dict[str, Any]
    ) -> Iterator[tuple[int, Chunk]]:
        """What comes of requests, with their numbers; what others get meanwhile is kept for them."""
        waiting = enumerate(requests)
        following = next(waiting, None)
        begun: dict[int, int] = {}  # engine's number: ours
        left: dict[int, int] = {}  # answers still to come
        try:
            while begun or following:
                while following and self.engine.scheduler.num_waiting < _AHEAD:
                    index, (ids, params) = following
                    number = self._begin(ids, params, options)
                    begun[number], left[number] = index, params.n
                    following = next(waiting, None)
                if not any(self._chunks[number] for number in begun):
                    self._step()
                for number in list(begun):
                    while number in begun and (chunks := self._chunks[number]):
                        index, chunk = begun[number], chunks.popleft()
                        left[number] -= chunk.completion is not None
                        if not left[number]:
                            del begun[number]
                            self._drop(number)
                        yield index, chunk
        finally:
            for number in begun:
                self._drop(number)

    def _begin(self, ids: list[int], params: SamplingParams, options: dict[str, Any]) -> int:
        with self._open_turn().taken() as engine:  # which a generator would hold, however long it sleeps
            number = engine.add(ids, params, **options)
        self._chunks[number] = deque()
        return number

    def _drop(self, number: int) -> None:
        """Nobody reads on: end the request, if it has not ended."""
        del self._chunks[number]
        if self._turn is not None:  # else all of it was closed
            self._turn.leave(number)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Generator[Chunk]:
        """Answer one prompt, a chunk a token; the last chunk carries the Completion.

        ``options`` are those of ``Engine.add``.

        The request begins when the first chunk is asked for. Raises RequestError at once, not then, if it is
        invalid.
        """
        ids, checked = self.check(prompt, params)
        self._open_turn()
        return self._answer(ids, checked, options)

    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion:
        """Answer a conversation: messages like {"role": "user", "content": "..."}, or a text of the user's.

        The completion's ``message`` has what was said, what was thought before, and the calls of ``tools``.
        ``contexts`` stand first in the system message; other options are OpenAI's. Raises RequestError.
        """
        chunks = self.stream_chat(messages, params, **options)
        ended = [chunk.completion for chunk in chunks if chunk.completion is not None]
        return min(ended, key=lambda completion: completion.index)

    def stream_chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[ToolSpec] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, object] | None = None,
        contexts: Sequence[str] = (),
        join: Joined = "exact",
        recompute: int = 0,
    ) -> Generator[Chunk]:
        """``chat`` as ``stream``: a chunk a token, whose ``deltas`` are what the message gets of it."""
        form = ChatFormat.of(
            self.tokenizer,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            grammar=response_grammar(response_format),
        )
        prompt, at = self.chat_place(messages, tools=form.tools, contexts=bool(contexts))
        form = form.after(self.tokenizer, prompt)
        held = form.params(SamplingParams() if params is None else params)
        if form.grammar is not None:
            held = self.grammars.constrain(held, form.grammar)
        chunks = self.stream(prompt, held, joining=Joining(contexts, join, recompute, at))
        return with_messages(chunks, form.parser)

    def chat_prompt(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        **variables: object,
    ) -> list[int]:
        """The token ids that a conversation becomes under the model's chat template.

        ``variables`` are the template's own (``enable_thinking`` ...). Raises ConfigError if the model has no
        template, RequestError if it refuses the messages or leaves a part of them out.
        """
        return self.chat_place(messages, tools=tools, contexts=False, **variables)[0]

    def chat_place(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        contexts: bool,
        **variables: object,
    ) -> tuple[list[int], int]:
        """``chat_prompt``, and before which of its tokens ``contexts`` are to stand."""
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        asked = with_place(asked) if contexts else asked
        before, mark, after = self._chat_prompts.text(asked, tools=tools, **variables).partition(PLACE)
        ids, rest = (self.tokenizer.encode(text, add_special_tokens=False) for text in (before, after))
        return ids + rest, len(ids) if mark else 0

    def check(self, prompt: Prompt, params: SamplingParams | None = None) -> tuple[list[int], SamplingParams]:
        """A prompt as ids, and its params; RequestError for what cannot be answered."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params is a {type(params).__name__}, but must be a SamplingParams.")
        require_known(params, self.config.vocab_size)
        if self._model is not None:  # else it is closed, as is said later
            require_able(self._model, params)
        most = self.max_context - (not isinstance(params, PoolingParams))  # a token at least is the answer's
        return read_prompt(prompt, self.tokenizer, self.config.vocab_size, most, self.max_context), params

    def require_short(self, characters: int) -> None:
        """Raises ContextError for a text that cannot fit, before the work of reading it."""
        require_short(characters, self.tokenizer, self.max_context)

    def _answer(self, ids: list[int], params: SamplingParams, options: dict[str, Any]) -> Generator[Chunk]:
        for _, chunk in self._chunks_of([(ids, params)], options):
            if chunk.completion is not None and chunk.completion.error is not None:
                raise RequestError(chunk.completion.error)
            yield chunk

    def _step(self) -> None:
        with self._open_turn().taken() as engine:
            events = engine.step()
        for number, chunk in events:
            if number in self._chunks:
                self._chunks[number].append(chunk)
