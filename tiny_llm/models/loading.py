"""From a checkpoint to a model that runs: in which dtype, packed into how many bits, for which backend.

Owns what weights, and keys and values, are kept in. Refuses to know files and formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx

from tiny_llm.config import DTYPES, ModelFacts, Quantization
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.errors import ConfigError
from tiny_llm.models.checkpoint import MLX_DTYPES, Checkpoint, Reading, open_checkpoint
from tiny_llm.models.registry import Model, build, find, parts_of
from tiny_llm.ops.backend import active, keep_memory
from tiny_llm.ops.linear import pack
from tiny_llm.weights.assemble import Progress

QUANTIZE_BITS = (4, 8)
QUANTIZE_GROUP = 64
ACTIVATIONS = ("int8", "exact")
KV_DTYPES = ("auto", *DTYPES, "int8")


def load_model(
    source: Path | Checkpoint,
    *,
    dtype: str | None = None,
    quantize: int | None = None,
    activations: str = "int8",
    progress: Progress | None = None,
    group: Group = ALONE,
    shares: Sequence[float] | None = None,
) -> Model:
    """Load the model of a checkpoint, or of a folder or GGUF file that is one, for the backend in use.

    ``dtype`` "float32", "bfloat16" or "float16" is what to keep weights in. Backend "cpu" computes in
    float32 whatever they are; but what meets a matrix of bfloat16 is rounded to that where the processor is
    fast with it (AMD with AVX512-BF16), unless ``dtype`` is "float32". None is as the checkpoint stores them,
    but float32 for backend "ref" on a CPU, where MLX's 16-bit products are slow and coarse. ``quantize`` 4 or
    8 bits packs what is float on disk, in groups of 64, or of 32 where 64 does not divide. ``activations``
    "int8" rounds what meets a quantized matrix to 8 bits, where the backend is "cpu"; "exact" rounds nothing.
    ``progress`` is called with (bytes read, bytes to read) as the weights come. Of a ``group`` each rank
    loads its part, and the model of all together is as one alone: some outputs of all matrices, or with
    ``shares`` of the work, one a rank, some of the layers.

    Raises ConfigError for a config or an option that cannot be used, WeightError for
    tensors that do not fit the config.
    """
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    config = checkpoint.config
    check_options(dtype, quantize, activations)
    packed = find(config.model_type).packed
    finish = partial(pack, exact=activations == "exact", float32=dtype == "float32")
    reading: Reading = {
        "dtype": _stored_dtype(dtype, quantize, packed),
        "quantize": None if quantize is None else Quantization(quantize, QUANTIZE_GROUP),
        "finish": finish if packed else lambda weight: weight,
        "progress": progress,
    }
    if parts := parts_of(config, group, shares):  # a checkpoint of another's need not know them
        reading["parts"] = parts
    weights = checkpoint.tensors(**reading)
    keep_memory()
    return build(config, weights, group, shares)


def check_options(
    dtype: str | None, quantize: int | None, activations: str = "int8", kept: str = "auto"
) -> None:
    """Raise ConfigError for an option that ``load_model`` cannot use."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    if quantize is not None and (type(quantize) is not int or quantize not in QUANTIZE_BITS):
        raise ConfigError(f"quantize is {quantize!r}, expected 4 or 8 bits.")
    if activations not in ACTIVATIONS:
        raise ConfigError(f"activations is {activations!r}, expected one of {', '.join(ACTIVATIONS)}.")
    if kept not in KV_DTYPES:
        raise ConfigError(f"kv_dtype (--kv-dtype) is {kept!r}, expected one of {', '.join(KV_DTYPES)}.")


def weight_bytes(model: Model) -> int:
    """Bytes of a model's arrays and packed matrices, each counted once."""
    return _bytes_of(model, set())


def _bytes_of(part: object, seen: set[int]) -> int:
    if id(part) in seen:
        return 0
    seen.add(id(part))
    if is_dataclass(part):
        return sum(_bytes_of(getattr(part, field.name), seen) for field in fields(part))
    if isinstance(part, Mapping):
        part = tuple(part.values())
    if isinstance(part, (tuple, list)):
        return sum(_bytes_of(one, seen) for one in part)
    return int(getattr(part, "nbytes", 0))


def kv_dtype(config: ModelFacts, *, dtype: str | None, quantize: int | None, kept: str = "auto") -> mx.Dtype:
    """What the keys and values of a model that was loaded so are kept in, unless ``kept`` is another than
    "auto": what they are computed in.

    But backend "cpu" computes in float32, and keeps 16 bits of that where the weights have no more either.
    """
    if kept != "auto":
        return mx.int8 if kept == "int8" else MLX_DTYPES[kept]
    if active() != "cpu":
        return MLX_DTYPES[dtype or _computed_dtype() or config.dtype]
    packed = quantize is not None or config.quantization is not None
    return MLX_DTYPES[dtype or ("bfloat16" if packed else config.dtype)]


def weight_dtype(config: ModelFacts, *, dtype: str | None, quantize: int | None) -> mx.Dtype:
    """What the floats of a model's matrices are kept in when it is loaded so."""
    packed = find(config.model_type).packed
    return _stored_dtype(dtype, quantize, packed) or MLX_DTYPES[config.dtype]


def _computed_dtype() -> str | None:
    """What MLX computes in unless it is told; None: what the weights are stored in."""
    return "float32" if mx.default_device().type == mx.cpu else None


def _stored_dtype(dtype: str | None, quantize: int | None, packed: bool) -> mx.Dtype | None:
    """What floats become on loading; None: nothing else."""
    if packed and active() == "cpu":  # they widen as they read: wider in memory would be slower, not finer
        name = None if dtype == "float32" and quantize is None else dtype
    else:
        name = dtype or _computed_dtype()
    return None if name is None else MLX_DTYPES[name]
