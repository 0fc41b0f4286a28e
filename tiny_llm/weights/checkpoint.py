"""From a checkpoint folder to exactly the named arrays that a model expects.

Owns the strict comparison of what is stored with what is wanted. Refuses to know models: the
caller says which names and shapes it wants. Never unpickles, never runs a checkpoint's code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import mlx.core as mx

from tiny_llm.config import Quantization
from tiny_llm.data import Matrix
from tiny_llm.errors import WeightError, did_you_mean
from tiny_llm.families.family import Places, Stored, part_of, place_of
from tiny_llm.weights.assemble import Entry, Finish, Progress, assemble
from tiny_llm.weights.gguf.blocks import BITS
from tiny_llm.weights.header import StoredTensor
from tiny_llm.weights.quantize import FLOATS, Part, fit_group, format_of, part_names, parts_of
from tiny_llm.weights.shards import stored_tensors

PACKED = ("U32",)
SHOWN_PROBLEMS = 8
_BODY = "model."


Parts = list[dict[str, Part]]
"""Of an entry: each is what is wanted of one stored tensor, or of several to be stacked, by name."""


def load_weights(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    *,
    dtype: mx.Dtype | None,
    quantization: Quantization | None,
    quantize: Quantization | None,
    quantizable: Collection[str],
    unread: Collection[str] = (),
    places: Callable[[Collection[str]], Places] = lambda names: {},
    stored: Mapping[str, StoredTensor] | None = None,
    finish: Finish = lambda weight: weight,
    progress: Progress | None = None,
    parts: Mapping[str, range] = MappingProxyType({}),
) -> dict[str, Matrix]:
    """Return the tensors named in ``expected`` (name -> unquantized shape), in its order.

    ``dtype``: what floats become (None: as stored). ``quantization``: how the checkpoint is
    quantized already; ``quantize``: how to quantize what is float on disk; either concerns only
    the names in ``quantizable``, and such a matrix comes back as one QuantizedTensor.
    ``unread``: ends or beginnings of names that are not wanted. ``places``: where modules lie that do
    not lie as they are wanted, given all stored names. ``stored`` None: the tensors of the folder.
    ``finish`` is called with each entry when it is read, and its result takes the entry's place.
    ``progress`` is called with (bytes read, bytes to read) after each tensor. ``parts``: the rows to take of
    tensors of which not all are wanted, as they are in ``expected``; a tensor of none is left out.

    Peak memory is the result plus one source tensor (a block of its rows, if that is to be quantized);
    large ones are read first.
    Raises WeightError that lists every tensor missing, left over, of wrong shape or dtype, and
    for a checkpoint that is quantized already when ``quantize`` is given.
    """
    if quantization is not None and quantize is not None:
        raise WeightError(
            f"{folder} is quantized already, to {quantization.bits} bits: it cannot be quantized again. "
            "Leave that option out, or give the unquantized model."
        )
    stored = stored_tensors(folder) if stored is None else stored
    if "embed_tokens.weight" in stored:  # no head (class Qwen3Model): as models that embed are saved
        stored = {f"{_BODY}{name}": tensor for name, tensor in stored.items()}
        expected = {name: shape for name, shape in expected.items() if name.startswith(_BODY)}
    where = places(stored)
    jobs = [
        _job(name, shape, where, stored, quantization, quantize, quantizable, parts.get(name))
        for name, shape in expected.items()
    ]
    problems = list(_problems(jobs, stored, expected, tuple(unread)))
    if problems:
        raise WeightError(_report(folder, problems))
    wanted = [(entry, made) for entry, made in jobs if parts.get(entry.name) != range(0)]
    entries = [replace(entry, parts=[[stored[n] for n in part] for part in made]) for entry, made in wanted]
    weights = dict(assemble(entries, dtype, finish, progress))
    return {name: weights[name] for name in expected if name in weights}


def _job(
    name: str,
    shape: tuple[int, ...],
    places: Places,
    stored: Mapping[str, StoredTensor],
    quantization: Quantization | None,
    quantize: Quantization | None,
    quantizable: Collection[str],
    rows: range | None,
) -> tuple[Entry, Parts]:
    """An entry of the result, but for its tensors, and what is wanted of these.

    A matrix counts as quantized on disk if its scales are there, as MLX's own tools decide it.
    """
    module, dot, kind = name.rpartition(".")
    place = place_of(module, places)
    if rows is not None:
        place = part_of(place, rows, shape[max(len(shape) - 2, 0)])
    names = [module if place.bare else f"{module}{dot}{kind}" for module in place.modules]
    first = names[0]
    shape = _stored_shape(shape, place)
    stored_as = format_of(first, quantization) if name in quantizable else None
    if stored_as is not None and quantization is not None:
        lie = [parts_of(one, shape, stored_as) for one in names]
        is_packed = first in stored and stored[first].dtype in PACKED
        has_others = any(part.name in stored for part in lie[0] if part.name != first)
        if is_packed or has_others or first.removesuffix(".weight") in quantization.overrides:
            parts = [{part.name: part for part in same} for same in zip(*lie, strict=True)]
            return Entry(name, (), stored_as, None, place), parts
    target = format_of(name, quantize) if name in quantizable else None
    target = fit_group(name, shape[-1], target)
    if place.transposed and len(shape) == 2:
        shape = shape[::-1]
    kind = stored[first].dtype if first in stored and name in quantizable else ""
    dtypes = (*FLOATS, kind) if kind in BITS else FLOATS
    return Entry(name, (), None, target, place), [{one: Part(one, shape, dtypes) for one in names}]


def _stored_shape(shape: tuple[int, ...], place: Stored) -> tuple[int, ...]:
    """The shape of what a tensor is taken of: of one of those that are stacked, and of all its rows."""
    shape = shape[1:] if len(place.modules) > 1 else shape
    shape = (1, *shape) if place.flat else shape
    axis = max(len(shape) - 2, 0)
    return (*shape[:axis], place.of, *shape[axis + 1 :]) if place.rows else shape


def _problems(
    jobs: list[tuple[Entry, Parts]],
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    unread: tuple[str, ...],
) -> Iterator[str]:
    wanted = {name: want for _, parts in jobs for part in parts for name, want in part.items()}
    missing = [name for name in wanted if name not in stored]
    left_over = [name for name in stored if name not in wanted and not name.endswith(unread)]
    left_over = [name for name in left_over if not name.startswith(unread)]
    extra = [name for name in left_over if not _is_tied_head(name, stored, expected)]
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
        tensor = stored[name]
        yield f"not expected: {name} {tensor.dtype} {list(tensor.shape)} in {tensor.path.name}"


def _misfit(name: str, want: Part, found: StoredTensor) -> Iterator[str]:
    if found.dtype not in want.dtypes:
        packed = found.dtype in PACKED
        hint = " (packed integers, but its config says nothing of a quantization)" if packed else ""
        yield f"wrong dtype: {name} is {found.dtype}{hint}, expected {' or '.join(want.dtypes)}"
    elif found.shape != want.shape:
        hint = " (it fits if transposed)" if found.shape == want.shape[::-1] else ""
        yield f"wrong shape: {name} is {list(found.shape)}, expected {list(want.shape)}{hint}"


def _is_tied_head(
    name: str, stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether it is of a copy of the embedding, saved as the head of a model whose config ties them.

    The copy may be quantized, in whatever format: a matrix of as many rows, in three parts.
    """
    embedding, parts = expected.get("model.embed_tokens.weight"), part_names("lm_head.weight")
    if embedding is None or parts[0] in expected or name not in parts or parts[0] not in stored:
        return False
    head = stored[parts[0]]
    if head.dtype not in PACKED:
        return name == parts[0] and head.shape == embedding
    shapes = [stored[part].shape for part in parts if part in stored]
    return len(shapes) == len(parts) and all(shape[:1] == embedding[:1] for shape in shapes)


def _report(folder: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"The weights in {folder} do not fit its config: {problems[0]}"
    shown = problems[:SHOWN_PROBLEMS]
    more = len(problems) - len(shown)
    lines = [f"The weights in {folder} do not fit its config, {len(problems)} problems:", *shown]
    return "\n  ".join(lines + ([f"and {more} more"] if more else []))
