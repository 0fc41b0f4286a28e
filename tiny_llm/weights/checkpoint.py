"""From a checkpoint folder to exactly the named arrays that a model expects.

Owns the strict comparison of what is stored with what is wanted, and the loading, a tensor at
a time so that the source of one is gone before the next is read. Refuses to know models: the
caller says which names and shapes it wants. Never unpickles, never runs a checkpoint's code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import mlx.core as mx

from tiny_llm.config import Quantization
from tiny_llm.data import Matrix, QuantizedTensor
from tiny_llm.errors import WeightError, did_you_mean
from tiny_llm.weights.header import TensorInfo
from tiny_llm.weights.quantize import (
    fit_group,
    format_of,
    is_explicit,
    joined,
    part_names,
    part_shapes,
    quantize_matrix,
)
from tiny_llm.weights.reader import read_tensor
from tiny_llm.weights.shards import StoredTensor, stored_tensors

FLOATS = ("F32", "BF16", "F16")
PACKED = ("U32",)
SHOWN_PROBLEMS = 8
BLOCK_BYTES = 2**24
"""As much of a float matrix is read at a time where it is to be quantized."""

Progress = Callable[[int, int], None]
Finish = Callable[[Matrix], Matrix]


@dataclass(frozen=True, slots=True)
class _Want:
    """A tensor that must be on disk."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Job:
    """One entry of the result: the tensors that it is made of, and how."""

    name: str
    parts: dict[str, _Want]
    stored_as: Quantization | None
    quantize: Quantization | None


def load_weights(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    *,
    dtype: mx.Dtype | None,
    quantization: Quantization | None,
    quantize: Quantization | None,
    quantizable: Collection[str],
    finish: Finish = lambda weight: weight,
    progress: Progress | None = None,
) -> dict[str, Matrix]:
    """Return the tensors named in ``expected`` (name -> unquantized shape), in its order.

    ``dtype``: what floats become (None: as stored). ``quantization``: how the checkpoint is
    quantized already; ``quantize``: how to quantize what is float on disk; either concerns only
    the names in ``quantizable``, and such a matrix comes back as one QuantizedTensor.
    ``finish`` is called with each entry when it is read, and its result takes the entry's place.
    ``progress`` is called with (bytes read, bytes to read) after each tensor.

    Peak memory is the result plus one source tensor (a block of its rows, if that is to be quantized);
    the largest are read first.
    Raises WeightError that lists every tensor missing, left over, of wrong shape or dtype, and
    for a checkpoint that is quantized already when ``quantize`` is given.
    """
    if quantization is not None and quantize is not None:
        raise WeightError(
            f"{folder} is quantized already, to {quantization.bits} bits: it cannot be quantized again. "
            "Leave that option out, or give the unquantized model."
        )
    stored = stored_tensors(folder)
    jobs = [
        _job(name, shape, stored, quantization, quantize, quantizable) for name, shape in expected.items()
    ]
    problems = list(_problems(jobs, stored, expected))
    if problems:
        raise WeightError(_report(folder, problems))
    weights = dict(_load(jobs, stored, dtype, finish, progress))
    return {name: weights[name] for name in expected}


def _job(
    name: str,
    shape: tuple[int, ...],
    stored: Mapping[str, StoredTensor],
    quantization: Quantization | None,
    quantize: Quantization | None,
    quantizable: Collection[str],
) -> _Job:
    """A matrix counts as quantized on disk if its scales are there, as MLX's own tools decide it."""
    names = part_names(name)
    stored_as = format_of(name, quantization) if name in quantizable else None
    is_packed = name in stored and stored[name].info.dtype in PACKED
    if stored_as is not None and (is_packed or names[1] in stored or is_explicit(name, quantization)):
        shapes = part_shapes(shape, stored_as)
        wants = [_Want(shapes[0], PACKED), _Want(shapes[1], FLOATS), _Want(shapes[2], FLOATS)]
        return _Job(name, dict(zip(names, wants, strict=True)), stored_as, None)
    target = format_of(name, quantize) if name in quantizable else None
    return _Job(name, {name: _Want(shape, FLOATS)}, None, target and fit_group(shape[-1], target))


def _problems(
    jobs: list[_Job], stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    wanted = {name: want for job in jobs for name, want in job.parts.items()}
    missing = [name for name in wanted if name not in stored]
    extra = [name for name in stored if name not in wanted and not _harmless(name, stored, expected)]
    if len(missing) == len(wanted):
        some = f", but for example {extra[0]}" if extra else ""
        yield f"it has none of the {len(wanted)} tensors that model_type needs{some}"
        return
    for number, name in enumerate(missing):  # a hint compares with every extra name, so only where shown
        hint = did_you_mean(name, extra) if number < SHOWN_PROBLEMS else ""
        yield f"missing: {name} {list(wanted[name].shape)}.{hint}"
    for name, want in wanted.items():
        if name in stored:
            yield from _misfit(name, want, stored[name])
    for name in extra:
        info = stored[name].info
        yield f"not expected: {name} {info.dtype} {list(info.shape)} in {stored[name].path.name}"


def _misfit(name: str, want: _Want, found: StoredTensor) -> Iterator[str]:
    info = found.info
    if info.dtype not in want.dtypes:
        packed = info.dtype in PACKED
        hint = " (packed integers, but its config says nothing of a quantization)" if packed else ""
        yield f"wrong dtype: {name} is {info.dtype}{hint}, expected {' or '.join(want.dtypes)}"
    elif info.shape != want.shape:
        hint = " (it fits if transposed)" if info.shape == want.shape[::-1] else ""
        yield f"wrong shape: {name} is {list(info.shape)}, expected {list(want.shape)}{hint}"


def _harmless(name: str, stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Two left-overs that old exporters write and that change nothing.

    The inverse frequencies of RoPE, which follow from the config, and a copy of the embedding
    saved as the head of a model whose config ties them.
    """
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    embedding = expected.get("model.embed_tokens.weight")
    return name == "lm_head.weight" and stored[name].info.shape == embedding


def _report(folder: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"The weights in {folder} do not fit its config.json: {problems[0]}"
    shown = problems[:SHOWN_PROBLEMS]
    more = len(problems) - len(shown)
    lines = [f"The weights in {folder} do not fit its config.json, {len(problems)} problems:", *shown]
    return "\n  ".join(lines + ([f"and {more} more"] if more else []))


def _load(
    jobs: list[_Job],
    stored: Mapping[str, StoredTensor],
    dtype: mx.Dtype | None,
    finish: Finish,
    progress: Progress | None,
) -> Iterator[tuple[str, Matrix]]:
    """Largest first: its source is then in memory while little else is."""

    def size(job: _Job) -> int:
        return sum(stored[name].info.nbytes for name in job.parts)

    done, total = 0, sum(map(size, jobs))
    with ExitStack() as files:
        opened = {
            path: files.enter_context(path.open("rb", buffering=0))
            for path in {stored[name].path for job in jobs for name in job.parts}
        }
        for job in sorted(jobs, key=size, reverse=True):
            sources = [_Source(opened[stored[name].path], stored[name].info, dtype) for name in job.parts]
            yield job.name, finish(_made(job, sources))
            done += size(job)
            if progress is not None:
                progress(done, total)


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor in an open file, and the dtype that its floats become."""

    file: FileIO
    info: TensorInfo
    dtype: mx.Dtype | None

    def read(self, rows: range | None = None) -> mx.array:
        array = read_tensor(self.file, self.info, rows)
        is_float = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(self.dtype) if self.dtype is not None and is_float else array


def _made(job: _Job, sources: list[_Source]) -> Matrix:
    """Read, cast and quantize one entry now, so that its source can go."""
    if job.quantize is not None:
        return _quantized(sources[0], job.quantize)
    parts = [source.read() for source in sources]
    mx.eval(parts)
    if job.stored_as is None:
        return parts[0]
    return QuantizedTensor(parts[0], parts[1], parts[2], job.stored_as.group_size, job.stored_as.bits)


def _quantized(source: _Source, quantization: Quantization) -> QuantizedTensor:
    """A block of rows at a time, so that no more of a float matrix is in memory than that."""
    rows = source.info.shape[0]
    block = max(1, rows * BLOCK_BYTES // max(source.info.nbytes, 1))
    parts = []
    for start in range(0, rows, block):
        parts.append(quantize_matrix(source.read(range(start, min(start + block, rows))), quantization))
        mx.eval(parts[-1].packed, parts[-1].scales, parts[-1].biases)
    return joined(parts)
