"""A model's facts: what the house asks of any model's, and the decoder's own, read from config.json.

Both ways in which transformers 4 and 5 write them. A field that would change the result and that the decoder
does not have is refused; one that changes nothing is let through. Knows nothing of arrays, weights or text,
or how a fact is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tiny_llm.config_fields import Fields, read_file
from tiny_llm.config_rope import RopeScaling, read_rope
from tiny_llm.errors import ConfigError
from tiny_llm.families.built_in import built_in_family, refuse_unsupported
from tiny_llm.families.family import DecoderSizes, Family

QUANTIZED_BITS = (2, 3, 4, 5, 6, 8)
QUANTIZED_GROUPS = (32, 64, 128)
DTYPES = ("float32", "bfloat16", "float16")


_FORMATS: Mapping[str, tuple[Sequence[int], Sequence[int]]] = {
    "affine": (QUANTIZED_BITS, QUANTIZED_GROUPS),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
    "awq": ((4,), QUANTIZED_GROUPS),
    "gptq": ((4,), QUANTIZED_GROUPS),
}
"""The bits and groups of each way to quantize that can be read."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How matrices are packed: ``bits`` a weight, and what scales it once for each ``group_size`` of a row.

    ``method`` "affine" is MLX's own, with a scale and a bias; the others are only read, and become it or
    floats. ``overrides`` maps a module's name (``model.layers.0.mlp.up_proj``) to its own format, or to None
    where the module is not quantized.
    """

    bits: int
    group_size: int
    overrides: Mapping[str, Quantization | None] = field(default_factory=dict)
    method: str = "affine"

    def __post_init__(self) -> None:
        bits, groups = _FORMATS[self.method]
        if self.bits not in bits or self.group_size not in groups:
            raise ConfigError(
                f"quantization has {self.bits!r} bits in groups of {self.group_size!r}, "
                f"expected for {self.method!r} bits of {tuple(bits)} and a group of {tuple(groups)}."
            )

    @property
    def kept(self) -> Quantization | None:
        """What it becomes when it is read; None: floats of 16 bits."""
        if self.method in ("mxfp8", "nvfp4"):
            return None
        overrides = {name: own and own.kept for name, own in self.overrides.items()}
        return Quantization(5 if self.method == "mxfp4" else self.bits, self.group_size, overrides)


@dataclass(frozen=True, slots=True)
class ModelFacts(DecoderSizes):
    """What engine, cache and calculators ask of a model's config, whatever architecture it is of.

    A plug-in's config may be a class of its own: what has these names, and those of the sizes, will do. Sizes
    count elements; ids are token ids.
    """

    model_type: str  # which architecture it is of
    vocab_size: int  # tokens that the model knows, V
    num_layers: int  # that keep keys and values
    max_position_embeddings: int  # tokens that prompt and answer may have together
    tie_word_embeddings: bool  # whether the head is the embedding
    eos_token_ids: tuple[int, ...]  # tokens that end an answer
    quantization: Quantization | None  # how matrices are packed on disk
    dtype: str  # what floats are stored in: one of DTYPES
    # Of each layer, how many of the last tokens a token sees, itself included; 0: all. () where all see all.
    windows: tuple[int, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(ModelFacts):
    """The facts that shape a decoder. What is left out is as LLaMA has it."""

    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["", "head", "whole"] = ""  # of queries and keys: each head, or all as one vector
    norm: Literal["rms", "layer"] = "rms"
    norm_before: bool = True  # attention and the MLP take the normed input
    norm_after: bool = False  # what they add is normed
    wide_norm: bool = False  # a norm's weight, too, is multiplied in float32
    mlp: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    learned_positions: bool = False  # a table of them, and no RoPE
    rotary_dim: int = 0  # entries of a head that RoPE turns; 0: all
    rope_interleaved: bool = False  # RoPE turns neighbours, not halves
    no_rope_layers: tuple[int, ...] = ()
    local_layers: tuple[int, ...] = ()  # whose RoPE has ``local_theta`` and is not scaled
    local_theta: float = 10_000.0
    query_scale: float = 1.0  # on top of 1 / sqrt(head_dim)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and the MLP add
    logit_scale: float = 1.0

    @classmethod
    def from_hf(cls, raw: Mapping[str, object], family: Family | None = None) -> ModelConfig:
        """Read config.json's fields. ``family`` None: the built-in one of its ``model_type``.

        A field that is absent has its family's default; null is no default but what the field has for it.

        Raises ConfigError for a field that is missing, of the wrong type or out of
        range, and for an option that changes the result and is not supported.
        """
        model_type = Fields(raw).text("model_type")
        family = family or built_in_family(model_type)
        refuse_unsupported(raw, family.reads)
        given = {**family.defaults, **raw}
        facts = {**family.facts, **family.read(Fields(given))}
        fields = Fields({**given, **{ours: given.get(name) for ours, name in family.names.items()}, **facts})
        layers = fields.whole("num_hidden_layers", most=10_000)
        positions = fields.whole("max_position_embeddings")
        hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
        head_dim = _head_dim(fields, hidden, heads)
        partial = "partial_rotary_factor" in family.reads
        attention_bias = fields.flag("attention_bias", False)
        shared: dict[str, Any] = {
            "model_type": model_type,
            "vocab_size": fields.whole("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": fields.whole("intermediate_size"),
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": _num_kv_heads(fields, heads),
            "head_dim": head_dim,
            "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
            **read_rope(fields, head_dim, positions, partial=partial),
            "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
            "attention_bias": attention_bias,
            "output_bias": attention_bias,
            "mlp_bias": fields.flag("mlp_bias", False),
            "eos_token_ids": fields.token_ids("eos_token_id"),
            "quantization": read_quantization(fields),
            "dtype": read_dtype(fields),
            "windows": _windows(fields, family, layers, positions),
        }
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        return cls(**{**shared, **{name: fact for name, fact in facts.items() if name in known}})


def load_end_ids(folder: Path) -> tuple[int, ...]:
    """Read the end tokens of ``folder``/generation_config.json, which has some that config.json lacks.

    () where there is no such file. Raises ConfigError for one that is broken.
    """
    path = folder / "generation_config.json"
    return read_file(path, lambda raw: Fields(raw).token_ids("eos_token_id")) if path.is_file() else ()


def _windows(fields: Fields, family: Family, layers: int, positions: int) -> tuple[int, ...]:
    """Each layer's window: which have one, and whether any hides a key of a context of ``positions``."""
    window, first = 0, 0
    if family.window_needs_switch:
        first = fields.whole("max_window_layers", layers, least=0)
    is_on = not family.window_needs_switch or fields.flag("use_sliding_window", False)
    if is_on and fields.get("sliding_window") is not None:
        window = fields.whole("sliding_window")
    slides = [bool(window) and layer >= first for layer in range(layers)]
    if kinds := fields.get("layer_types"):
        names = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in names for kind in kinds):
            raise fields.wrong("layer_types", f"{layers} times 'full_attention' or 'sliding_attention'")
        slides = [kind == "sliding_attention" for kind in kinds]
        if any(slides) and not window:
            missing = ("sliding_window", "a window") if is_on else ("use_sliding_window", "true")
            raise fields.wrong(missing[0], f"{missing[1]}, since layer_types has 'sliding_attention'")
    if window >= positions or not any(slides):
        return ()
    return tuple(window if slides[layer] else 0 for layer in range(layers))


def _num_kv_heads(fields: Fields, heads: int) -> int:
    kv_heads = fields.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads, which is {heads}")
    return kv_heads


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.wrong("head_dim", f"a size, since {heads} heads do not divide hidden_size {hidden}")
    head_dim = fields.whole("head_dim", hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim is {head_dim}, expected an even size: RoPE rotates pairs.")
    return head_dim


def read_dtype(fields: Fields) -> str:
    """What the weights are stored in, by either name that transformers has had for it."""
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"  # transformers 5, transformers 4
    dtype = fields.text(name, "float32")
    if dtype not in DTYPES:
        raise fields.wrong(name, f"one of {', '.join(DTYPES)}")
    return dtype


def read_quantization(fields: Fields) -> Quantization | None:
    """Read MLX's ``quantization``, or ``quantization_config``: its copy, or AWQ's or GPTQ's."""
    foreign = fields.section("quantization_config")
    if foreign is not None and foreign.get("quant_method") is not None:
        return _awq_or_gptq(foreign)
    section = fields.section("quantization") or foreign
    if section is None:
        return None
    whole = _quantized_format(section)
    modules = section.names() - {"bits", "group_size", "mode"}
    overrides = {name: _override(section, name, whole) for name in modules if section.get(name) is not True}
    return replace(whole, overrides=overrides)


def _awq_or_gptq(section: Fields) -> Quantization:
    method = section.text("quant_method")
    if method == "awq":
        if section.text("version", "gemm").lower() != "gemm":
            raise section.wrong("version", "'gemm', the layout that AWQ checkpoints are shared in")
    elif method != "gptq":
        raise section.wrong("quant_method", "'awq' or 'gptq'. Use one of those, an MLX or a float checkpoint")
    elif section.flag("desc_act", False):
        raise section.wrong("desc_act", "false: inputs in another order (act-order) are not supported")
    elif section.text("checkpoint_format", "gptq") != "gptq":
        raise section.wrong("checkpoint_format", "'gptq', the layout that GPTQ checkpoints are shared in")
    return Quantization(section.whole("bits"), section.whole("group_size"), method=method)


def _override(section: Fields, name: str, whole: Quantization) -> Quantization | None:
    if section.get(name) is False:
        return None
    own = section.section(name)
    if own is None:
        raise section.wrong(name, "false, or an object with bits and group_size")
    return _quantized_format(own, whole)


def _quantized_format(section: Fields, default: Quantization | None = None) -> Quantization:
    mode = section.text("mode", "affine")
    if mode not in ("affine", "mxfp4", "mxfp8", "nvfp4"):
        raise section.wrong("mode", "'affine', 'mxfp4', 'mxfp8' or 'nvfp4'")
    bits = section.whole("bits", default.bits if default else None)
    group_size = section.whole("group_size", default.group_size if default else None)
    return Quantization(bits, group_size, method=mode)
