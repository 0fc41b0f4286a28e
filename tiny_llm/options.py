"""Owns the options that commands share, each declared once: its name, type and help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A short name (see `models`), a hub id, or a folder.", rich_help_panel="Model"
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="What to keep weights in; the default suits the device.", rich_help_panel="Model"),
]
QuantizeOption = Annotated[
    int | None,
    typer.Option(help="Pack the weights into 4 or 8 bits while loading.", rich_help_panel="Model"),
]
KvDtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "int8"],
    typer.Option(
        help="What keys and values are kept in; int8 holds nearly twice as many tokens as 16 bits, a little "
        "off. auto suits the weights.",
        rich_help_panel="Limits",
    ),
]
BackendOption = Annotated[
    Literal["cpu", "cuda", "metal", "metalsim", "mlx", "ref"] | None,
    typer.Option(
        help="cpu: our kernels; mlx: MLX's own fast operations; ref: readable ones; "
        "metal: our kernels on Apple's GPUs; metalsim: those, simulated; cuda: those, on NVIDIA's. "
        "The default is the best there is.",
        rich_help_panel="Speed",
    ),
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one line of JSON.", rich_help_panel="Output")]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which model, and how it is loaded and run: the options of every command that makes an engine."""

    model: ModelOption = "demo"
    dtype: DtypeOption = None
    quantize: QuantizeOption = None
    offline: Annotated[
        bool,
        typer.Option(
            "--offline", help="Use what is on disk; never ask the network.", rich_help_panel="Model"
        ),
    ] = False
    backend: BackendOption = None
    kernels: Annotated[
        Literal["auto", "ours", "mlx"] | None,
        typer.Option(
            help="On a GPU. auto, the default: our kernels where they prove right and fast on this machine; "
            "ours: where they prove right; mlx: none.",
            rich_help_panel="Speed",
        ),
    ] = None
    same_tokens: Annotated[
        bool,
        typer.Option(
            "--same-tokens",
            help="Insist that an answer's tokens do not depend on what else is running.",
            rich_help_panel="Speed",
        ),
    ] = False
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads of the CPU kernels; by default one a physical core.", rich_help_panel="Speed"
        ),
    ] = None
    activations: Annotated[
        Literal["int8", "exact"],
        typer.Option(
            help="What meets quantized weights; int8 is faster, a little off.", rich_help_panel="Speed"
        ),
    ] = "int8"
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer together.", rich_help_panel="Limits")
    ] = None
    kv_dtype: KvDtypeOption = "auto"
    kv_memory: Annotated[
        str | None,
        typer.Option(
            help="What keys and values may take, such as 4GB or 512MB; by default half of what is free.",
            rich_help_panel="Limits",
        ),
    ] = None
    swap_memory: Annotated[
        str | None,
        typer.Option(
            help="What sequences may take beside that, such as 2GB, while others need their place; "
            "without it they are computed again.",
            rich_help_panel="Limits",
        ),
    ] = None
    kv_disk: Annotated[
        str | None,
        typer.Option(
            help="A folder for what the prefix cache cannot hold: it is found again after a restart.",
            rich_help_panel="Limits",
        ),
    ] = None
    kv_disk_size: Annotated[
        str, typer.Option(help="What that folder may take.", rich_help_panel="Limits")
    ] = "20GB"
    speculate: Annotated[
        Literal["off", "ngram", "draft"] | None,
        typer.Option(
            help="Guess tokens and check several in a step; the answer is the same. ngram: text that repeats "
            "goes on as before, the default but where it might change answers; draft: by a draft model.",
            rich_help_panel="Speed",
        ),
    ] = None
    draft: Annotated[
        str | None,
        typer.Option(help="A small model of the same tokenizer, to guess tokens.", rich_help_panel="Speed"),
    ] = None
    max_step_ms: Annotated[
        float,
        typer.Option(
            help="Milliseconds that answers under way may wait for each token while prompts are read.",
            rich_help_panel="Limits",
        ),
    ] = 100.0


ENGINE = EngineOptions()


def command_app() -> typer.Typer:
    """A typer app for one command, with the help that all of them have."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["--help", "-h"]},
    )
