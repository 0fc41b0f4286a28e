"""Owns what was found out about our GPU kernels on this machine, in a file of the user's cache.

A file is about one machine, one MLX, one text of our kernels and one model's shapes, and has its name from
these. One that cannot be read, was edited into something else or is about others is as none. Runs no kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, cast

import mlx.core as mx
import msgspec

from tiny_llm.config import ModelConfig, ModelFacts
from tiny_llm.ops import backend
from tiny_llm.ops.metal import folder
from tiny_llm.user_cache import user_cache, writable

BITS = (4, 8)  # of quantized matrices that our kernels for GPUs multiply by
GROUP_SIZE = 64  # of what is quantized on loading, where it divides a row; else 32
SLOWEST = 0.9  # our kernel runs where it is at least so fast, as a share of MLX's speed


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that kernels are tried on. ``bits`` 0: its matrices are not for our kernels.

    Some of them may have a format of their own: ``more`` lists those that are ours, as "8/64 4/32", bits and
    group. ``dense``: some are MLX's to multiply by, as they are not quantized or have other bits.
    ``int8_pages``: keys and values are kept as int8, not in ``dtype``. ``experts``: of a layer, if any.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    bits: int
    group_size: int
    dtype: str
    block_size: int
    more: str = ""
    dense: bool = False
    int8_pages: bool = False
    experts: int = 0
    expert_width: int = 0
    experts_of_a_row: int = 0

    def keeping(self, dtype: mx.Dtype) -> Shapes:
        """These, of a model whose keys and values are kept in ``dtype``."""
        return replace(self, int8_pages=dtype == mx.int8)

    @property
    def kept(self) -> mx.Dtype:
        """What keys and values are kept in."""
        return mx.int8 if self.int8_pages else cast(mx.Dtype, getattr(mx, self.dtype))

    @property
    def formats(self) -> list[tuple[int, int]]:
        """Bits and group size of every kind of matrix that is for our kernels, the most common first."""
        more = [tuple(map(int, one.split("/"))) for one in self.more.split()]
        return [(self.bits, self.group_size), *((bits, group) for bits, group in more)]

    @classmethod
    def of(cls, config: ModelFacts, quantize: int | None, dtype: mx.Dtype, block_size: int) -> Shapes:
        """Those of a model loaded with ``quantize`` bits, or as it is stored; it computes in ``dtype``."""
        stored = config.quantization and config.quantization.kept
        bits = stored.bits if stored else quantize or 0
        others = list(stored.overrides.values()) if stored else []
        facts = config.experts if isinstance(config, ModelConfig) else None
        ours = {f"{one.bits}/{one.group_size}" for one in others if one is not None and one.bits in BITS}
        return cls(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
            config.vocab_size,
            bits if bits in BITS else 0,
            stored.group_size if stored else GROUP_SIZE,
            str(dtype).rpartition(".")[2],
            block_size,
            " ".join(sorted(ours)),
            bits not in BITS or any(one is None or one.bits not in BITS for one in others),
            experts=facts.count if facts else 0,
            expert_width=facts.width if facts else 0,
            experts_of_a_row=facts.per_token if facts else 0,
        )


class KernelTiming(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Microseconds of a call, ours and MLX's, on a ``shape`` in words."""

    shape: str
    ours_us: Annotated[float, msgspec.Meta(gt=0)]
    mlx_us: Annotated[float, msgspec.Meta(gt=0)]

    @property
    def ratio(self) -> float:
        """Our speed as a share of MLX's."""
        return self.mlx_us / self.ours_us


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What came of trying an op's kernels: ``wrong`` says what went wrong, and is empty if nothing did."""

    op: str
    wrong: str = ""
    timings: tuple[KernelTiming, ...] = ()

    @property
    def slowest(self) -> KernelTiming | None:
        """Where ours does worst; None if nothing was timed."""
        return min(self.timings, key=lambda timing: timing.ratio, default=None)

    def joined(self, other: Proof, whose: str) -> Proof:
        """Both, of an op that is to serve both; what ``other`` says is told as of ``whose`` shapes."""
        wrong = self.wrong or (other.wrong and other.wrong + whose)
        timings = (KernelTiming(one.shape + whose, one.ours_us, one.mlx_us) for one in other.timings)
        return Proof(self.op, wrong, (*self.timings, *timings))


class _Stored(msgspec.Struct, frozen=True):
    """What a file holds."""

    key: dict[str, Any]
    proofs: list[Proof]


class Record:
    """The proofs of one ``key``, in ``path``. Several processes may use it: each replaces the whole file."""

    def __init__(self, path: Path, key: Mapping[str, object]) -> None:
        self.path = path
        self.key = dict(key)

    @property
    def backend(self) -> str:
        """Whose kernels it is about."""
        return str(self.key["backend"])

    @property
    def shapes(self) -> Shapes:
        """The model's."""
        return msgspec.convert(self.key["shapes"], Shapes)

    @classmethod
    def of(cls, name: str, shapes: Shapes) -> Record:
        """That of backend ``name`` on this machine, for a model of these ``shapes``."""
        key = {**machine(name), "shapes": asdict(shapes)}
        hashed = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return cls(writable(_folder()) / f"{hashed}.json", key)

    def read(self) -> dict[str, Proof]:
        """Each op's proof, of those that were tried."""
        stored = _read(self.path)
        return {proof.op: proof for proof in stored.proofs} if stored and stored.key == self.key else {}

    def add(self, found: Iterable[Proof]) -> None:
        """Keep these too, beside what another process has found meanwhile."""
        proofs = self.read() | {proof.op: proof for proof in found}
        stored = _Stored(self.key, [proof for _, proof in sorted(proofs.items())])
        with suppress(OSError):  # what cannot be kept is tried again
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(stored), indent=1))
            os.replace(name, self.path)


def records() -> list[Record]:
    """All that are about this machine, this MLX and these kernels, each of a backend and a model's shapes."""
    kept = _folder()
    found = []
    for path in sorted(kept.glob("*.json")) if kept else ():
        if (stored := _read(path)) is None:
            continue
        record = Record(path, stored.key)
        with suppress(ValueError, KeyError):  # its key is none of ours
            name = record.backend
            if name in backend.GPU_KERNELS and Record.of(name, record.shapes).key == record.key:
                found.append(record)
    return found


def _read(path: Path) -> _Stored | None:
    """None for what is none, or cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Stored)
    except (OSError, ValueError):
        return None


def machine(name: str) -> dict[str, str]:
    """What a proof holds for: backend ``name``, the device, the system's build, MLX, the kernels' text."""
    return {
        "backend": name,
        "device": str(mx.device_info().get("device_name", "unknown")),
        "system": f"{platform.mac_ver()[0]} {platform.version()}".strip(),
        "mlx": version("mlx"),
        "kernels": _texts(),
    }


def _texts() -> str:
    """A hash of the kernels, of what launches them and of what tries them."""
    files = [*folder().glob("*.metal"), *folder("cuda").glob("*.cuh")]
    for module in (backend.__file__, __file__):
        files += Path(module).parent.glob("*.py")
    hashed = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        hashed.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return hashed.hexdigest()[:16]


def _folder() -> Path | None:
    kept = user_cache()
    return kept / "proofs" if kept else None
