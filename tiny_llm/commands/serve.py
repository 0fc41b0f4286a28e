"""Owns ``python main.py serve``: its options, and the server's settings that they become.

A server may be one of two: one computes prompts, the other makes the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from tiny_llm.commands.grouped import grouped
from tiny_llm.commands.loading import arguments, load_async
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.engine.budget import MemoryBudget
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ConfigError, TinyLLMError, did_you_mean
from tiny_llm.limits import MOST, check_number
from tiny_llm.memory import available_memory_bytes
from tiny_llm.options import ENGINE, DebugOption, EngineOptions, command_app, option
from tiny_llm.planning.memory import plan_memory
from tiny_llm.scheduler.settings import MAX_NUM_BATCHED_TOKENS
from tiny_llm.server.decode_side import DecodeSide
from tiny_llm.server.peer import Peer
from tiny_llm.server.prefill_side import PrefillSide
from tiny_llm.server.run import serve as run
from tiny_llm.server.service import Service
from tiny_llm.server.settings import ServerSettings

PROMPT_TOKENS = 1024  # of a step, at least, for prompts
_PREFILL_TOKENS = 256
_PANEL = "Two processes"


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """Which part a server has, and where it finds the other."""

    role: Annotated[
        Literal["prefill", "decode"] | None,
        option(
            _PANEL, "prefill: also compute prompts for another server; decode: have long ones computed there."
        ),
    ] = None
    peer: Annotated[
        str | None, option(_PANEL, "HOST:PORT where role prefill listens, and decode finds it.")
    ] = None
    peer_secret: Annotated[str, option(_PANEL, "What both must know.", envvar="TINY_LLM_PEER_SECRET")] = ""
    peer_timeout: Annotated[
        int, option(_PANEL, "Seconds without news after which a prompt is computed at home.")
    ] = 10

    def step_tokens(self, sequences: int) -> int:
        """Tokens of a step: one for each of the sequences, the rest for prompts.

        Few where those are all there is: a short prompt waits for the step of a long one.
        """
        if self.role == "prefill":
            return sequences + _PREFILL_TOKENS
        return max(MAX_NUM_BATCHED_TOKENS, sequences + PROMPT_TOKENS)

    def joined(self, load: Callable[[], AsyncLLM]) -> Callable[[], AsyncLLM]:
        """``load``, and its part is taken. Raises ConfigError, now or when it is called."""
        if (self.role is None) != (self.peer is None):
            raise ConfigError(
                "--role and --peer go together: which part this server has, and where the two meet."
            )
        if self.peer is None:
            return load
        peer, side = Peer(self.peer, self.peer_secret, self.peer_timeout), self.role

        def both() -> AsyncLLM:
            llm = load()
            (PrefillSide if side == "prefill" else DecodeSide)(llm, peer)
            return llm

        return both


ALONE = PeerOptions()


app = command_app()


ModelsOption = Annotated[
    list[str],
    option(
        "Model",
        "A short name (see `models`), a hub id (:Q4_K_M: a GGUF file of it), a folder or file. Given again: "
        "another one, loaded when it is asked for; --kv-memory is for all of them.",
        "--model",
        "-m",
    ),
]
NameOption = Annotated[
    str | None, option("Server", "What clients call the model, if not as --model.", "--name")
]
AliasOption = Annotated[
    list[str] | None,
    option(
        "Server",
        'Another name for the model; "claude-*" is any that begins so. NAME=MODEL: for that of several. '
        "May be given several times.",
    ),
]
UnloadOption = Annotated[
    float | None, option("Server", "Seconds after which an unused model is unloaded, until it is asked for.")
]
KeyOption = Annotated[
    list[str] | None,
    option("Server", "A key that clients must send; may be given several times.", envvar="TINY_LLM_API_KEY"),
]


@app.command()
@grouped("model")
def serve(
    model: ModelsOption = ("demo",),  # type: ignore[assignment]
    host: Annotated[str, option("Server", "Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, option("Server", "Port; 0 takes a free one.")] = 8000,
    name: NameOption = None,
    alias: AliasOption = None,
    unload_after: UnloadOption = None,
    api_key: KeyOption = None,
    cors_origin: Annotated[
        list[str] | None, option("Server", "A site whose pages may call the server.")
    ] = None,
    drain_seconds: Annotated[float, option("Server", "What running requests get after SIGTERM.")] = 30.0,
    max_concurrent: Annotated[int, option("Limits", "Sequences that run at a time.")] = 256,
    max_queue: Annotated[
        int, option("Limits", "Answers that may wait beyond those that could run at once; more get a 429.")
    ] = 256,
    max_wait: Annotated[float, option("Limits", "Seconds that a request may wait before a 503.")] = 300.0,
    two: PeerOptions = ALONE,
    options: EngineOptions = ENGINE,
    debug: DebugOption = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients expect it."""
    if unload_after is not None:
        check_number("unload_after (--unload-after)", unload_after, zero=True)
        if two != ALONE:
            raise ConfigError("--unload-after and --role do not go together: the other server counts on it.")
    limits = {
        "max_num_seqs": max_concurrent,
        "max_num_batched_tokens": two.step_tokens(max_concurrent),
        "max_queued_requests": max_queue,
        "max_wait_s": max_wait,
    }
    given = arguments(options, **limits)
    settings = ServerSettings(
        api_keys=tuple(api_key or ()),
        max_in_flight=min(max_concurrent + max_queue, MOST),
        drain_s=drain_seconds,
        cors_origins=tuple(cors_origin or ()),
    )
    aliases = _aliases(alias or (), _names(model, name, options, two))
    budget, served = _several(model, given) if len(model) > 1 else (None, [given | {"model": model[0]}])
    if served[0]["ranks"].leader is not None:  # under mlx.launch: only rank 0 has clients
        LLM(**served[0])
    needs = [_weight_bytes(one) if len(model) > 1 or unload_after is not None else 0 for one in served]
    services = [
        Service(replace(settings, name=own, aliases=of_it), two.joined(partial(load_async, one)), need)
        for (own, of_it), one, need in zip(aliases.items(), served, needs, strict=True)
    ]
    run(services, host, port, unload_after, budget)


def _several(models: Sequence[str], given: Mapping[str, Any]) -> tuple[MemoryBudget, list[dict[str, Any]]]:
    """One memory, and what each model is loaded with: a share of that, its own folder on disk."""
    budget = MemoryBudget(given["kv_memory"] or available_memory_bytes() // 2, len(models))
    disk = given["kv_disk"]
    own = [{"model": one, "kv_disk": disk and str(Path(disk, Path(one).name))} for one in models]
    return budget, [{**given, "kv_memory": budget.share(), **one} for one in own]


def _names(models: Sequence[str], name: str | None, options: EngineOptions, two: PeerOptions) -> list[str]:
    """What clients call each of the models. Raises ConfigError where they cannot be told apart."""
    names = [name] if name and len(models) == 1 else [Path(model).name for model in models]
    if name and len(models) > 1:
        raise ConfigError("--name is of one model, but there are several; give each an --alias NAME=MODEL.")
    if len(set(names)) < len(names):
        raise ConfigError(f"--model was given as {', '.join(models)}: two of them have one name.")
    if len(models) > 1 and (options.ranks or two != ALONE):
        what = "--ranks and --role are for one model, but there are several; start a server for each."
        raise ConfigError(what)
    return names


def _aliases(given: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The aliases of each model. Raises ConfigError for that of one that there is not."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(names, ())
    for one in given:
        alias, _, model = one.partition("=")
        model = model or names[0]
        if model not in found:
            what = f"--alias {one} is of {model!r}, but {', '.join(names)} are served."
            raise ConfigError(what + did_you_mean(model, names))
        found[model] += (alias,)
    return found


def _weight_bytes(given: Mapping[str, Any]) -> int:
    """What the weights will take; 0 for what is not on disk yet and is no short name."""
    try:
        how = {name: given[name] for name in ("dtype", "quantize")}
        plan = plan_memory(given["model"], available=available_memory_bytes(), **how)
    except TinyLLMError:  # loading says what is wrong
        return 0
    return plan.need.weights
