"""What do running answers feel of prompts that come meanwhile: computed beside them, or by another process?

A model of random weights in the shape of --shape, 4 bits. Some streams run all the time; beside them come
long prompts, one after the other, and short chats. The sides, in turns: "known", the same traffic of prompts
that the prefix cache has, so that none is computed; "one", a process of both cores that does it all; "apart",
one thread that answers and another process of one thread that computes prompts. Gaps are those of a stream,
by the clock, and by the processor time of the process that answers, which a busy machine does not stretch.
Then how fast the wire alone is. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import mlx.core as mx
from measure.machine import foreign_share_now, warning
from measure.serving import quantile

from tiny_llm import SamplingParams
from tiny_llm.distributed.wire import Frame, Wire
from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.models.checkpoint import DummyCheckpoint
from tiny_llm.ops.backend import set_threads
from tiny_llm.scheduler.settings import SchedulerSettings
from tiny_llm.server.decode_side import DecodeSide
from tiny_llm.server.peer import Peer
from tiny_llm.server.prefill_side import PrefillSide

SECRET, STREAMS, CHAT, ANSWER = "benchmark", 4, 48, 8
SIDES = ("known", "one", "apart")
FRAME_BYTES, FRAMES = 2**22, 100


@dataclass
class Felt:
    """Seconds: gaps of the streams by both clocks, and the first tokens of the others."""

    gaps: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    long: list[float] = field(default_factory=list)
    chat: list[float] = field(default_factory=list)


def made(shape: str, **more: object) -> AsyncLLM:
    """The model on one thread."""
    options = {"quantize": 4, "kv_memory": 2**30, "speculate": "off", "threads": 1, **more}
    return AsyncLLM("demo" if shape == "demo" else DummyCheckpoint(shape), **options)


def prefill(shape: str) -> None:
    """The other process."""
    llm = made(shape, scheduler=SchedulerSettings(max_num_batched_tokens=512))
    print(PrefillSide(llm, Peer("127.0.0.1:0", SECRET)).port, flush=True)
    sys.stdin.read()


async def stream(llm: AsyncLLM, next_prompt: Callable[[], list[int]], felt: Felt) -> None:
    """Answer until it is cancelled; note when each token came."""
    while True:
        last = None
        async for _ in llm.stream(next_prompt(), SamplingParams(max_tokens=10**4, ignore_eos=True)):
            now = time.perf_counter(), time.process_time()
            if last is not None:
                felt.gaps.append(now[0] - last[0])
                felt.busy.append(now[1] - last[1])
            last = now


async def ask(
    llm: AsyncLLM, next_prompt: Callable[[], list[int]], pause_s: float, first: list[float]
) -> None:
    """One prompt after the other."""
    while True:
        began, seen = time.perf_counter(), False
        async for _ in llm.stream(next_prompt(), SamplingParams(max_tokens=ANSWER, ignore_eos=True)):
            if not seen:
                first.append(time.perf_counter() - began)
                seen = True
        await asyncio.sleep(pause_s)


async def one_round(
    llm: AsyncLLM, side: str, decode: DecodeSide, given: argparse.Namespace, felt: Felt
) -> None:
    """Some seconds of one side."""
    chance, vocab = random.Random(), min(5000, llm.llm.config.vocab_size)

    def prompts(length: int, known: bool) -> Iterator[list[int]]:
        fixed = [[chance.randrange(vocab) for _ in range(length)] for _ in range(2)]
        while True:
            yield from fixed if known else [[chance.randrange(vocab) for _ in range(length)]]

    llm.supply = decode.supply if side == "apart" else None
    set_threads(2 if side == "one" else 1)
    kinds = [(given.prompt, 0.5, felt.long), (CHAT, 0.3, felt.chat)]
    asked = [(prompts(length, side == "known"), pause, first) for length, pause, first in kinds]
    if side == "known":
        for own, _, _ in asked * 2:
            await llm.generate(next(own), SamplingParams(max_tokens=1, ignore_eos=True))
    starts, unseen = prompts(64, False), Felt()
    tasks = [
        asyncio.ensure_future(stream(llm, partial(next, starts), unseen if number else felt))
        for number in range(STREAMS)
    ]
    before = len(felt.gaps)
    await asyncio.sleep(given.seconds / 4)
    del felt.gaps[before:], felt.busy[before:]  # while they began
    tasks += [asyncio.ensure_future(ask(llm, partial(next, own), *more)) for own, *more in asked]
    await asyncio.sleep(given.seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def send_frames(port: int) -> None:
    """The wire's other end: arrays of MLX, as a pool's would be."""
    wire = Wire(socket.create_connection(("127.0.0.1", port)), 30.0)
    parts = [memoryview(mx.array(bytearray(FRAME_BYTES // 64))) for _ in range(64)]  # type: ignore[arg-type]
    for number in range(FRAMES):
        while wire.waiting > 2:
            time.sleep(0.0001)
        wire.put(Frame(1, number), parts)
    sys.stdin.read()


def wire_rate() -> tuple[float, float]:
    """GB/s of the wire alone, the fastest frame and the median one."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = [sys.executable, __file__, "--send", str(listening.getsockname()[1])]
        child = subprocess.Popen(command, stdin=subprocess.PIPE)
        wire = Wire(listening.accept()[0], 30.0)
        place = memoryview(mx.array(bytearray(FRAME_BYTES)))  # type: ignore[arg-type]
        taken = []
        while len(taken) < FRAMES:
            began = time.perf_counter()
            if wire.receive(lambda frame: place).size:
                taken.append(time.perf_counter() - began)
        wire.close()
        child.kill()
        child.wait()
    return FRAME_BYTES / min(taken[1:]) / 1e9, FRAME_BYTES / median(taken) / 1e9


async def measure(given: argparse.Namespace, port: int) -> tuple[dict[str, Felt], dict[str, int]]:
    """All rounds."""
    felt = {side: Felt() for side in SIDES}
    async with made(given.shape) as llm:
        decode = DecodeSide(llm, Peer(f"127.0.0.1:{port}", SECRET, 60, least_tokens=16))
        while not decode.is_connected:
            await asyncio.sleep(0.05)
        for number in range(given.rounds):
            for side in SIDES if number % 2 else reversed(SIDES):
                await one_round(llm, side, decode, given, felt[side])
        decode.close()
        return felt, decode.counts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2-0.5b")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=15.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prefill", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--send", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.prefill or given.send:
        return prefill(given.shape) if given.prefill else send_frames(given.send)
    if said := warning(foreign_share_now(), "before the start"):
        print(said)
    command = [sys.executable, __file__, "--prefill", "--shape", given.shape]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        felt, counts = asyncio.run(measure(given, int(child.stdout.readline())))
    finally:
        child.kill()
        child.wait()
    rows = {}
    print(
        f"{'side':>6} {'gap p50':>9} {'p99':>8} {'CPU p50':>9} {'p99':>8} {'TTFT long':>10} {'chat':>8}  (ms)"
    )
    for side, own in felt.items():
        figures = [quantile(of, share) for of in (own.gaps, own.busy) for share in (0.5, 0.99)]
        figures += [quantile(of, 0.5) for of in (own.long, own.chat)]
        rows[side] = [round(1e3 * figure, 1) for figure in figures]
        print(
            f"{side:>6} {rows[side][0]:>9} {rows[side][1]:>8} {rows[side][2]:>9} {rows[side][3]:>8} "
            f"{rows[side][4]:>10} {rows[side][5]:>8}"
        )
    ratios = {side: [round(rows[side][i] / rows["known"][i], 2) for i in (1, 3)] for side in SIDES[1:]}
    print(f"p99 over that of no prefill, by the clock and by processor time: {ratios}; {counts}")
    best, usual = wire_rate()
    print(f"the wire: {best:.2f} GB/s, the median frame {usual:.2f}")
    told = {"benchmark": "disaggregate", "shape": given.shape, "prompt": given.prompt, "ms": rows}
    print(json.dumps({**told, "p99_over_known": ratios, "wire_gb_s": [best, usual], **counts}))


if __name__ == "__main__":
    main()
