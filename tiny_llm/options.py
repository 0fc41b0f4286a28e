"""Owns the options that commands share, each declared once: its name, type and help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    """An option under ``panel`` of a command's help; ``names``, if it is not called as its parameter is."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


ModelOption = Annotated[
    str,
    option(
        "Model",
        "A short name (see `models`), a hub id (:Q4_K_M: a GGUF file of it), a folder or file.",
        "--model",
        "-m",
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    option("Model", "What to keep weights in; the default suits the device."),
]
QuantizeOption = Annotated[int | None, option("Model", "Pack the weights into 4 or 8 bits while loading.")]
OfflineOption = Annotated[bool, option("Model", "Use what is on disk; never ask the network.", "--offline")]
DraftOption = Annotated[str | None, option("Speed", "A small model of the same tokenizer, to guess tokens.")]
KvDtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "int8"],
    option(
        "Limits",
        "What keys and values are kept in; int8 holds nearly twice as many tokens as 16 bits, a little "
        "off. auto suits the weights.",
    ),
]
BackendOption = Annotated[
    Literal["cpu", "cuda", "metal", "metalsim", "mlx", "ref"] | None,
    option(
        "Speed",
        "cpu: our kernels; mlx: MLX's own fast operations; ref: readable ones; "
        "metal: our kernels on Apple's GPUs; metalsim: those, simulated; cuda: those, on NVIDIA's. "
        "The default is the best there is.",
    ),
]
DebugOption = Annotated[bool, option("Output", "Show the traceback of an error.", "--debug")]
JsonOption = Annotated[bool, option("Output", "Print one line of JSON.", "--json")]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which model, and how it is loaded and run: the options of every command that makes an engine."""

    model: ModelOption = "demo"
    dtype: DtypeOption = None
    quantize: QuantizeOption = None
    offline: OfflineOption = False
    plugin: Annotated[
        str | None,
        option("Model", "A Python file of yours that adds a family of models; it is named after model_type."),
    ] = None
    backend: BackendOption = None
    kernels: Annotated[
        Literal["auto", "ours", "mlx"] | None,
        option(
            "Speed",
            "On a GPU. auto, the default: our kernels where they prove right and fast on this machine; "
            "ours: where they prove right; mlx: none.",
        ),
    ] = None
    same_tokens: Annotated[
        bool,
        option(
            "Speed", "Insist that an answer's tokens do not depend on what else is running.", "--same-tokens"
        ),
    ] = False
    threads: Annotated[
        int | None, option("Speed", "Threads of the CPU kernels; by default one a physical core.")
    ] = None
    activations: Annotated[
        Literal["int8", "exact"],
        option("Speed", "What meets quantized and bfloat16 weights; int8 rounds it: faster, a little off."),
    ] = "int8"
    max_model_len: Annotated[int | None, option("Limits", "Tokens of prompt and answer together.")] = None
    kv_dtype: KvDtypeOption = "auto"
    kv_memory: Annotated[
        str | None,
        option(
            "Limits", "What keys and values may take, such as 4GB or 512MB; by default half of what is free."
        ),
    ] = None
    swap_memory: Annotated[
        str | None,
        option(
            "Limits",
            "What sequences may take beside that, such as 2GB, while others need their place; "
            "without it they are computed again.",
        ),
    ] = None
    kv_disk: Annotated[
        str | None,
        option(
            "Limits", "A folder for what the prefix cache cannot hold: it is found again after a restart."
        ),
    ] = None
    kv_disk_size: Annotated[str, option("Limits", "What that folder may take.")] = "20GB"
    speculate: Annotated[
        Literal["off", "ngram", "draft"] | None,
        option(
            "Speed",
            "Guess tokens and check several in a step; the answer is the same. ngram: text that repeats "
            "goes on as before, the default but where it might change answers; draft: by a draft model.",
        ),
    ] = None
    draft: DraftOption = None
    ranks: Annotated[
        int | None,
        option(
            "Machines",
            "Processes that share the model, each with a part of it; started here, unless --rank-address is "
            "given. Under mlx.launch it says how many.",
        ),
    ] = None
    parallel: Annotated[
        Literal["tensor", "pipeline"],
        option(
            "Machines",
            "What each rank has: a part of every matrix, or some of the layers, which is less to send and "
            "faster with many answers at once.",
        ),
    ] = "tensor"
    shares: Annotated[
        str | None,
        option("Machines", "How the work of a pipeline is cut, one number a rank, rank 0 first: 2,1."),
    ] = None
    rank_address: Annotated[
        str | None,
        option("Machines", "HOST:PORT where the other ranks come to, by `follow` on their machines."),
    ] = None
    rank_timeout: Annotated[
        float, option("Machines", "Seconds after which a rank that is silent ends the group.")
    ] = 30.0
    max_step_ms: Annotated[
        float,
        option(
            "Limits", "Milliseconds that answers under way may wait for each token while prompts are read."
        ),
    ] = 100.0


ENGINE = EngineOptions()


def command_app(**more: Any) -> typer.Typer:
    """A typer app, with the help that all commands have; ``more`` is typer's own."""
    names = {"help_option_names": ["--help", "-h"]}
    return typer.Typer(add_completion=False, rich_markup_mode="rich", context_settings=names, **more)
