"""How fast is a server? Load for any that speaks OpenAI's API; ours, its engine alone, and peers' servers.

    python benchmarks/serve.py                                random weights, against llama-server
    python benchmarks/serve.py --bundled                      the bundled model, against mlx_lm.server
    python benchmarks/serve.py --url http://host:8000 --model name [--key KEY] [--chat]

Each of ``--streams`` clients asks again as soon as it is answered (a closed loop); then requests come at
random (Poisson), at ``--load`` of what the engine alone could serve, or at ``--rate`` a second. Lengths are
mixed, or with ``--trace`` those of the Azure 2023 conversations. Sides take turns, and medians of the rounds
count. Goodput is how many requests a second had their first token within ``--ttft`` seconds and 95 % of the
others within ``--itl`` ms. What this client itself takes of the machine is told too. Prints tables and one
JSON line; ``--svg`` draws them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from measure.dummy_folder import dummy_folder
from measure.engine import data_folder
from measure.environments import PeerMissing, default_folder
from measure.gguf_file import gguf_file
from measure.http_load import PATHS, Target, run
from measure.machine import Watch, foreign_share_now, warning
from measure.serve_plot import draw
from measure.servers import BUNDLED, EngineAlone, Server, ServerError, llama_server, mlx_lm_server, ours
from measure.serving import Asked, figures, mixed_lengths, poisson, trace_lengths
from measure.sides import numbers

WORDS = (
    "the",
    "a",
    "of",
    "to",
    "and",
    "in",
    "is",
    "it",
    "you",
    "that",
    "he",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
)
SHOWN = ("tok_s", "ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "itl_p95_ms", "e2e_p50_ms", "goodput_s")
HEADS = ("tok/s", "ttft p50", "p95 ms", "itl p50", "p95 ms", "e2e ms", "goodput/s")
Row = dict[str, float]


@dataclass(frozen=True, slots=True)
class Work:
    """One run's requests: their lengths, when they are due, and by how many clients they are sent.

    ``streams`` None: each when it is due. ``seed`` makes the prompts, which are the same for every side.
    """

    lengths: Sequence[tuple[int, int]]
    due: Sequence[float]
    streams: int | None
    seed: str

    def prompts(self) -> list[str]:
        """Texts of about so many tokens, of words that are a token each in most vocabularies."""
        chance = random.Random(self.seed)
        return [" ".join(chance.choices(WORDS, k=length)) for length, _ in self.lengths]

    def asked(self) -> list[Asked]:
        """The requests as figures know them."""
        return [Asked(p, a, at) for (p, a), at in zip(self.lengths, self.due, strict=True)]


def over_http(target: Target, work: Work) -> tuple[list[Asked], float, float]:
    """The requests served, the seconds, and this client's part of a core."""
    asked = work.asked()
    requests = [
        (one, target.request(prompt, one.answer, {}))
        for one, prompt in zip(asked, work.prompts(), strict=True)
    ]
    load = run(target, requests, work.streams)
    return asked, load.seconds, load.client_share


def engine_alone(engine: EngineAlone, work: Work) -> tuple[list[Asked], float, float]:
    """The same without HTTP."""
    asked = work.asked()
    answers = [one.answer for one in asked]
    plan = {"prompts": work.prompts(), "answers": answers, "due": work.due, "streams": work.streams}
    told = engine.run(plan)
    for one, began, came, ended in zip(asked, told["began"], told["came"], told["ended"], strict=True):
        one.began, one.came, one.ended, one.tokens = began, came, ended, one.answer
    return asked, told["seconds"], 0.0


Side = tuple[str, Callable[[Work], tuple[list[Asked], float, float]]]


@contextmanager
def sides_of(options: argparse.Namespace, slots: int) -> Iterator[tuple[list[Side], list[int]]]:
    """All that is compared, started, and the processes; what cannot start is left out, with the reason."""
    makers = {"engine": engine_maker, "ours": our_maker, "llama-server": llama_maker, "mlx_lm": mlx_lm_maker}
    with ExitStack() as stack:
        sides, pids = [], []
        for name in options.sides:
            try:
                one = stack.enter_context(closing(makers[name](options, slots)))
            except (PeerMissing, ServerError) as error:
                print(f"{name} is missing: {error}", file=sys.stderr)
                continue
            pids.append(one.pid)
            sides.append((one.name, side_of(one)))
        yield sides, pids


def side_of(one: Server | EngineAlone) -> Callable[[Work], tuple[list[Asked], float, float]]:
    """How a side is asked."""
    if isinstance(one, EngineAlone):
        return lambda work: engine_alone(one, work)
    return lambda work: over_http(one.target, work)


def model_of(options: argparse.Namespace) -> Path:
    """The checkpoint that ours and mlx-lm serve."""
    if options.bundled:
        return BUNDLED
    return dummy_folder(options.shape, options.tokenizer, options.folder / "models")


def engine_maker(options: argparse.Namespace, slots: int) -> EngineAlone:
    """The engine without HTTP."""
    return EngineAlone(model_of(options), options.threads)


def our_maker(options: argparse.Namespace, slots: int) -> Server:
    """Ours."""
    return ours(model_of(options), options.threads)


def llama_maker(options: argparse.Namespace, slots: int) -> Server:
    """llama-server with a slot for each stream. Raises PeerMissing."""
    if options.bundled:
        raise PeerMissing("the bundled model is not made into its format")
    model = gguf_file(options.shape, options.tokenizer, options.folder)
    room = max(map(sum, lengths_of(options, 64))) * 2 + 64
    return llama_server(model, slots, room, options.threads, options.folder)


def mlx_lm_maker(options: argparse.Namespace, slots: int) -> Server:
    """mlx_lm.server. Raises PeerMissing."""
    return mlx_lm_server(model_of(options), options.threads, options.folder)


def lengths_of(options: argparse.Namespace, count: int) -> list[tuple[int, int]]:
    """Prompt and answer lengths."""
    if options.trace:
        longest = options.prompt + options.answer
        return trace_lengths(data_folder() / "traces" / "azure_2023_conv.csv", count, longest * 2)
    return mixed_lengths(count, options.prompt, options.answer)


def measure(
    sides: Sequence[Side], work: Callable[[int], Work], options: argparse.Namespace
) -> dict[str, Row]:
    """Every side in turn, round after round; the median of each figure, by side."""
    rows: dict[str, list[Row]] = {name: [] for name, _ in sides}
    for number in range(options.rounds):
        turn = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name, serve in turn:
            asked, seconds, client = serve(work(number))
            for failed in [one for one in asked if one.error][:1]:
                print(f"{name}: a request failed: {failed.error}", file=sys.stderr)
            row = figures(asked, seconds, options.ttft, options.itl / 1e3)
            rows[name].append({**row, "client_share": client})
            time.sleep(0.2)
    return {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]}
        for name, found in rows.items()
    }


def closed(options: argparse.Namespace, streams: int) -> Callable[[int], Work]:
    """A closed loop of ``streams`` clients."""
    lengths = lengths_of(options, max(2, options.requests * streams))
    return lambda number: Work(lengths, [0.0] * len(lengths), streams, f"{streams} {number}")


def at_random(options: argparse.Namespace, rate: float) -> Callable[[int], Work]:
    """Requests at random, ``rate`` a second."""
    lengths = lengths_of(options, options.requests * max(options.streams))
    return lambda number: Work(lengths, poisson(len(lengths), rate, number), None, f"poisson {number}")


def show(title: str, rows: dict[str, Row]) -> None:
    """Print a case's table."""
    print(f"\n{title:<26}" + "".join(f"{head:>11}" for head in HEADS) + f"{'client':>9}")
    for name, row in rows.items():
        told = "".join(f"{row[key]:>11.2f}" for key in SHOWN)
        failed = f"  {row['failed']:.0f} failed" if row["failed"] else ""
        print(f"{name:<26}{told}{row['client_share']:>9.0%}{failed}", flush=True)


def compare(options: argparse.Namespace) -> dict[str, dict[str, Row]]:
    """All cases against all sides."""
    found: dict[str, dict[str, Row]] = {}
    for streams in options.streams:
        with sides_of(options, streams) as (sides, pids):
            watch = Watch(pids)
            for _, serve in sides:  # the first requests are never the fastest
                serve(Work([(16, 8)] * streams, [0.0] * streams, streams, "warm"))
            title = f"{streams} stream{'s' if streams > 1 else ''}"
            found[title] = measure(sides, closed(options, streams), options)
            show(title, found[title])
            if streams == max(options.streams):
                found |= poisson_case(sides, found[title], options)
            if said := warning(watch.foreign_share(), "meanwhile"):
                print(said)
    return found


def poisson_case(
    sides: Sequence[Side], rows: dict[str, Row], options: argparse.Namespace
) -> dict[str, dict[str, Row]]:
    """Requests as they come; nothing if neither a rate nor our own capacity is known."""
    base = rows.get("engine alone") or next(iter(rows.values()), None)
    lengths = lengths_of(options, 64)
    capacity = base["tok_s"] / statistics.mean(answer for _, answer in lengths) if base else 0.0
    rate = options.rate or options.load * capacity
    if not rate:
        return {}
    chosen = [(name, serve) for name, serve in sides if name != "llama-server" or options.all_poisson]
    title = f"at random, {rate:.2f} a second"
    found = {title: measure(chosen, at_random(options, rate), options)}
    show(title, found[title])
    return found


def added_ttft(options: argparse.Namespace, streams: int) -> float | None:
    """The median of what HTTP adds to each request's first token: the client's time less the engine's own, in
    ms, while so many clients ask. None if ours does not start."""
    try:
        with closing(ours(model_of(options), options.threads)) as server:
            target = Target(server.target.url, server.target.model, path=PATHS[-1])
            over_http(target, Work([(16, 8)] * streams, [0.0] * streams, streams, "warm"))
            lengths = mixed_lengths(max(24, 4 * streams), 32, 24)
            asked, _, _ = over_http(target, Work(lengths, [0.0] * len(lengths), streams, "ttft"))
    except ServerError as error:
        print(f"ours is missing: {error}", file=sys.stderr)
        return None
    return statistics.median(1e3 * (one.ttft - one.engine_ttft_s) for one in asked if not one.error)


def gates(found: dict[str, dict[str, Row]]) -> dict[str, float]:
    """What HTTP costs beside the engine alone, and ours over each peer, by case."""
    told: dict[str, float] = {}
    for case, rows in found.items():
        mine, alone = rows.get("tiny_llm"), rows.get("engine alone")
        if mine is None:
            continue
        if alone is not None:
            told[f"{case}: throughput lost to HTTP"] = round(1 - mine["tok_s"] / alone["tok_s"], 4)
        for name, row in rows.items():
            if name not in ("tiny_llm", "engine alone") and row["tok_s"]:
                told[f"{case}: tokens over {name}"] = round(mine["tok_s"] / row["tok_s"], 3)
    return told


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already; then nothing else is started")
    parser.add_argument("--model", default="model", help="its model's name")
    parser.add_argument("--key", default="")
    parser.add_argument("--chat", action="store_true", help="ask /v1/chat/completions")
    parser.add_argument("--bundled", action="store_true", help="serve the bundled model")
    parser.add_argument("--shape", default="qwen2-0.5b", help="else random weights in this shape")
    parser.add_argument("--sides", type=lambda text: text.split(","), help="engine,ours,llama-server,mlx_lm")
    parser.add_argument("--streams", type=numbers, default=(1, 8, 16))
    parser.add_argument("--requests", type=int, default=2, help="of each stream in a round")
    parser.add_argument("--prompt", type=int, default=96, help="tokens, about; from half to one and a half")
    parser.add_argument("--answer", type=int, default=64, help="likewise")
    parser.add_argument("--trace", action="store_true", help="lengths of the Azure trace, scaled to both")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second of the random arrivals")
    parser.add_argument("--load", type=float, default=0.7, help="or this part of the capacity; 0: none")
    parser.add_argument("--all-poisson", action="store_true", help="llama-server meets them too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ttft", type=float, default=2.0, help="seconds")
    parser.add_argument("--itl", type=float, default=200.0, help="milliseconds")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where peers.py put the peers")
    parser.add_argument("--tokenizer", type=Path, default=data_folder() / "tokenizers" / "qwen2")
    parser.add_argument("--svg", type=Path, help="draw the figures here")
    options = parser.parse_args()
    options.sides = options.sides or ["engine", "ours", "mlx_lm" if options.bundled else "llama-server"]
    if not (options.url or options.bundled or (options.tokenizer / "tokenizer.json").exists()):
        parser.error(f"there is no tokenizer in {options.tokenizer}; give --tokenizer, or take --bundled")
    return options


def main() -> None:
    """Measure and print."""
    options = arguments()
    if said := warning(foreign_share_now(), "before the start"):
        print(said)
    if options.url:
        found: dict[str, dict[str, Row]] = {}
        target = Target(options.url, options.model, options.key, PATHS[options.chat])
        sides: list[Side] = [(options.model, lambda work: over_http(target, work))]
        for streams in options.streams:
            found[f"{streams} streams"] = measure(sides, closed(options, streams), options)
            show(f"{streams} streams", found[f"{streams} streams"])
        if options.rate:
            found |= poisson_case(sides, found[f"{options.streams[-1]} streams"], options)
    else:
        found = compare(options)
    told = gates(found)
    for streams in () if options.url or "ours" not in options.sides else (1, max(options.streams)):
        added = added_ttft(options, streams)
        if added is not None:
            told[f"TTFT added by HTTP at {streams}, ms"] = round(added, 2)
    for name, value in told.items():
        print(f"{name:<60}{value:>10}")
    if options.svg:
        options.svg.write_text(draw(found), encoding="utf-8")
    model = options.model if options.url else "bundled" if options.bundled else options.shape
    facts = {"benchmark": "serve", "model": model, "threads": options.threads, "rounds": options.rounds}
    print(json.dumps({**facts, "gates": told, "cases": found}))


if __name__ == "__main__":
    main()
