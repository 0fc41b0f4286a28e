"""Chapter 2.3: what 4 bits cost, and how fast a kernel reads them. Prints two tables; --svg draws.

python book/experiments/quantized_matmul.py [--svg book/docs/img/quantized_matmul.svg]
python book/experiments/quantized_matmul.py --speed [--mine my_llm]
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlx.core as mx
from command_line import parser_of

from book.course.native import CPU, build, compiler
from book.course.sections import whole
from tiny_llm.data import QuantizedTensor
from tiny_llm.ops.backend import set_threads, use, works
from tiny_llm.ops.linear import linear, pack
from tiny_llm.planning.rounds import Trial, interleave, seconds_of

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "quantized_rows"
OUTPUTS, INPUTS, GROUP = 151_936, 896, 64  # the output head of Qwen2-0.5B: 68 MB of 4-bit weights
ROUNDS = 7
SCALAR = "    return dot_scalar(row, x, sums);\n"


def matrices() -> list[mx.array]:
    """The bundled model's matrices, in float32."""
    found = mx.load(str(ROOT / "tiny_llm" / "demo" / "model.safetensors"))
    assert isinstance(found, dict)
    return [a.astype(mx.float32) for _, a in sorted(found.items()) if a.ndim == 2]


def levels(weight: mx.array, bits: int, group: int) -> tuple[mx.array, mx.array]:
    """What ``weight`` [O, I] becomes, and the size of one step of each group."""
    packed, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
    return mx.dequantize(packed, scales, biases, group_size=group, bits=bits), scales


def error_table(weights: Sequence[mx.array]) -> str:
    """Bits a weight with its share of scale and bias, and how far the weights move."""
    lines = ["bits  group  bits a weight   error of the weights"]
    size = sum(mx.sum(w * w).item() for w in weights)
    for bits, group in ((8, 64), (4, 32), (4, 64), (4, 128), (2, 32)):
        moved = sum(mx.sum((levels(w, bits, group)[0] - w) ** 2).item() for w in weights)
        lines.append(f"{bits:>4} {group:>6} {bits + 32 / group:>14.2f} {(moved / size) ** 0.5:>21.1%}")
    return "\n".join(lines)


def picture(weight: mx.array) -> str:
    """One group of real weights above the 16 levels that they go to, and its first word, as an SVG."""
    row = weight[:1, :GROUP]
    moved, scales = levels(row, 4, GROUP)
    packed, _, biases = mx.quantize(row, group_size=GROUP, bits=4)
    scale, bias = scales.item(), biases.item()
    low, high = sorted((bias, bias + 15 * scale))

    def across(value: float) -> float:
        return 40 + 680 * (value - low) / (high - low)

    lines = []
    for q in range(16):
        x = across(bias + q * scale)
        lines.append(f'<path class="level" d="M{x:.1f} 100V122"/><text x="{x:.1f}" y="136">{q}</text>')
    for value, level in zip(row[0].tolist(), moved[0].tolist(), strict=True):
        x, to = across(value), across(level)
        lines.append(f'<path d="M{x:.1f} 46L{to:.1f} 100"/><circle cx="{x:.1f}" cy="46" r="3"/>')
    word = packed[0, 0].item()
    for place in range(8):
        x = 40 + 85 * (7 - place)
        q = word >> (4 * place) & 15
        label = f'<tspan x="{x + 42}" dy="-6">{q:04b}</tspan><tspan x="{x + 42}" dy="17">q = {q}</tspan>'
        lines.append(
            f'<rect x="{x}" y="184" width="85" height="38"/><text x="{x + 42}" y="206">{label}</text>'
        )
        lines.append(f'<text x="{x + 42}" y="238">weight {place}</text>')
    style = (
        "svg{background:#fff}path{stroke:#e6862b;stroke-opacity:.6}.level{stroke:#333;stroke-opacity:1}"
        "circle{fill:#e6862b}"
        "rect{fill:#fdf3e7;stroke:#333}text{font:11px monospace;fill:#333;text-anchor:middle}"
        ".left{text-anchor:start}"
    )
    texts = [
        f'<text class="left" x="40" y="16">{GROUP} weights of one group, {low:.3f} to {high:.3f}</text>',
        f'<text class="left" x="40" y="154">q: 16 levels, {abs(scale):.4f} apart</text>',
        f'<text class="left" x="40" y="176">its first word, 0x{word:08X}: highest bits on the left</text>',
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 252"><style>{style}</style>'
    return "\n".join([head, *texts, *lines, "</svg>\n"])


def kernels(mine: Path | None, folder: Path) -> Mapping[str, Path]:
    """A library whose 4-bit product is dot_scalar's, the reference, and the learner's."""
    part = whole((CPU / f"{KERNEL}.cpp").read_text(encoding="utf-8"), "dot_vector")
    own = folder / "kernels" / "cpu" / f"{KERNEL}.cpp"
    own.parent.mkdir(parents=True)
    own.write_text(
        part[: part.index("{\n") + 2] + SCALAR + part[part.rindex("}\n// end") :], encoding="utf-8"
    )
    made = {"dot_scalar": build(KERNEL, folder), "dot_vector": build(KERNEL, None)}
    return {**made, "yours": build(KERNEL, mine)} if mine else made


def call_of(library: Path, arrays: Sequence[mx.array]) -> Callable[[], object]:
    """A call of the library's kernel."""
    kernel = ctypes.CDLL(str(library)).quantized_rows
    pointers = [ctypes.byref(ctypes.c_char.from_buffer(memoryview(a))) for a in arrays]
    sizes = [ctypes.c_int64(n) for n in (1, INPUTS, OUTPUTS)]
    return lambda: kernel(*pointers, *sizes, GROUP, 4)


def packed_call(x: mx.array, weight: QuantizedTensor, exact: bool) -> Callable[[], object]:
    """A call of the kernel that models run on: its matrix is packed."""
    with use("cpu"):
        packed = pack(weight, exact=exact)
    return lambda: linear(x, packed)


@contextmanager
def reader(folder: Path) -> Iterator[Callable[[], float]]:
    """A call that measures how many bytes a second one thread can read."""
    source, program = ROOT / "benchmarks" / "measure" / "ceilings.cpp", folder / "ceilings"
    flags = ["-O3", "-march=native", "-ffast-math", "-std=c++17", "-pthread"]
    subprocess.run([compiler(), *flags, str(source), "-o", str(program)], check=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([str(program)], text=True, bufsize=1, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        asked, told = process.stdin, process.stdout
        yield lambda: asked.write("read 1\n") and float(told.readline())
        asked.close()


def speed_table(mine: Path | None) -> str:
    """Each kernel in turn, round after round; medians."""
    groups = (OUTPUTS, INPUTS // GROUP)
    x, out = mx.random.normal((1, INPUTS)), mx.zeros((1, OUTPUTS))
    words = mx.random.randint(0, 2**31 - 1, (OUTPUTS, INPUTS // 8)).astype(mx.uint32)
    parts = [words, mx.random.normal(groups), mx.random.normal(groups)]
    mx.eval(x, out, parts)
    set_threads(1)
    read = sum(part.nbytes for part in parts)
    with tempfile.TemporaryDirectory() as folder, reader(Path(folder)) as read_rate:
        calls = {n: call_of(lib, [x, *parts, out]) for n, lib in kernels(mine, Path(folder)).items()}
        if works():
            for name, exact in (("packed, float32 x", True), ("packed, int8 x", False)):
                calls[name] = packed_call(x, QuantizedTensor(*parts, GROUP, 4), exact)
        trials = [Trial((name,), read, partial(seconds_of, call)) for name, call in calls.items()]
        trials.append(Trial(("only reading",), read, lambda: read / read_rate()))
        rates = interleave(trials, ROUNDS, warm_up=1)
    ceiling = rates["only reading",].median
    lines = ["one thread, one row      ms   GB/s   of the ceiling"]
    for (name,), rate in rates.items():
        share = rate.median / ceiling
        lines.append(f"{name:<20} {1e3 * read / rate.median:>6.1f} {rate.median / 1e9:>6.1f} {share:>16.0%}")
    return "\n".join(lines)


def main() -> None:
    """Print the tables, and draw."""
    parser = parser_of(__doc__)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--mine", type=Path)
    arguments = parser.parse_args()
    if arguments.speed or arguments.mine:
        print(speed_table(arguments.mine))
        return
    weights = matrices()
    print(error_table(weights))
    if arguments.svg:
        arguments.svg.write_text(picture(weights[1]), encoding="utf-8")


if __name__ == "__main__":
    main()
