"""Owns the options of the command line: their names, types and help."""

from __future__ import annotations

from pathlib import Path
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
BackendOption = Annotated[
    Literal["cpu", "cuda", "metal", "metalsim", "ref"] | None,
    typer.Option(
        help="cpu: our kernels; ref: plain MLX, slow on a CPU; metal: our kernels on Apple's GPUs; "
        "metalsim: those, simulated; cuda: those, on NVIDIA's. The default is the best there is.",
        rich_help_panel="Speed",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="Threads of the CPU kernels; by default one a physical core.", rich_help_panel="Speed"),
]
ActivationsOption = Annotated[
    Literal["int8", "exact"],
    typer.Option(help="What meets quantized weights; int8 is faster, a little off.", rich_help_panel="Speed"),
]
OfflineOption = Annotated[
    bool,
    typer.Option("--offline", help="Use what is on disk; never ask the network.", rich_help_panel="Model"),
]
PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="The text; without it, what is piped in.", rich_help_panel="Prompt"),
]
FileOption = Annotated[
    Path | None,
    typer.Option(
        "--file",
        help='Many prompts: {"prompt": "..."} a line, and a line back.',
        rich_help_panel="Prompt",
    ),
]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        help="With --file: write a timeline that Perfetto (ui.perfetto.dev) opens.", rich_help_panel="Output"
    ),
]
RawOption = Annotated[
    bool,
    typer.Option("--raw", help="Go on with the text as it is: no chat template.", rich_help_panel="Prompt"),
]
SystemOption = Annotated[
    str | None, typer.Option(help="How the model is to behave.", rich_help_panel="Prompt")
]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", "-n", help="Longest answer, in tokens.", rich_help_panel="Answer")
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        "--temperature",
        "-t",
        help="0 always takes the likeliest token; 1 draws as the model thinks.",
        rich_help_panel="Answer",
    ),
]
TopKOption = Annotated[
    int, typer.Option(help="Draw from the K likeliest tokens only; 0 is off.", rich_help_panel="Answer")
]
TopPOption = Annotated[
    float,
    typer.Option(help="Draw from the fewest tokens that make up P of the mass.", rich_help_panel="Answer"),
]
MinPOption = Annotated[
    float,
    typer.Option(help="Drop tokens less likely than P times the likeliest.", rich_help_panel="Answer"),
]
SeedOption = Annotated[
    int | None, typer.Option(help="Makes a drawn answer repeat exactly.", rich_help_panel="Answer")
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(help="End before this text; may be given several times.", rich_help_panel="Answer"),
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one line of JSON.", rich_help_panel="Output")]
HostOption = Annotated[
    str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.", rich_help_panel="Server")
]
PortOption = Annotated[int, typer.Option(help="Port; 0 takes a free one.", rich_help_panel="Server")]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="What clients call the model, if not as --model.", rich_help_panel="Server"),
]
ApiKeyOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A key that clients must send; may be given several times.",
        envvar="TINY_LLM_API_KEY",
        rich_help_panel="Server",
    ),
]
CorsOption = Annotated[
    list[str] | None,
    typer.Option(help="A site whose pages may call the server.", rich_help_panel="Server"),
]
DrainOption = Annotated[
    float, typer.Option(help="What running requests get after SIGTERM.", rich_help_panel="Server")
]
ConcurrentOption = Annotated[
    int, typer.Option(help="Sequences that run at a time.", rich_help_panel="Limits")
]
QueueOption = Annotated[
    int, typer.Option(help="Requests that may wait; more get a 429.", rich_help_panel="Limits")
]
WaitOption = Annotated[
    float, typer.Option(help="Seconds that a request may wait before a 503.", rich_help_panel="Limits")
]
ContextOption = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer together.", rich_help_panel="Limits")
]
KvMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="What keys and values may take, such as 4GB or 512MB; by default half of what is free.",
        rich_help_panel="Speed",
    ),
]
MaxStepOption = Annotated[
    float,
    typer.Option(
        help="Milliseconds that answers under way may wait for each token while prompts are read.",
        rich_help_panel="Speed",
    ),
]

EXAMPLES = """
[b]python main.py[/b] · chat with the bundled model

[b]python main.py --model qwen2-1.5b --quantize 4[/b] · with a larger one

[b]python main.py generate --prompt "What is a KV cache?"[/b] · one answer

[b]python main.py generate --prompt "Hi" --json[/b] · answer and figures, on one line

[b]python main.py bench --model qwen2-0.5b --load-format dummy --quantize 4[/b] · how fast it would be here

[b]echo "12 + 30 = ?" | python main.py[/b] · the answer alone, for pipes
"""
