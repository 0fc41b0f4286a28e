"""A model's facts, read from config.json as transformers 4 and 5 each write it, and its end tokens.

Owns which options are known. A field that would change the result and that this
package does not have is refused; one that changes nothing is let through. Knows
nothing of arrays, weights or text, or how a fact is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar

from tiny_llm.errors import ConfigError, did_you_mean

_T = TypeVar("_T")

QUANTIZED_BITS = (2, 3, 4, 6, 8)
QUANTIZED_GROUPS = (32, 64, 128)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Family:
    """What a ``model_type`` fixes by itself. None leaves the fact to config.json.

    ``defaults`` are the fields of a config.json that does not mention them, as transformers' class for
    the family has them: what a checkpoint leaves out is what its author's tool would fill in. All but
    ``eos_token_id``: other files name it too, and theirs for LLaMA, 2, is "#" in the vocabulary of LLaMA 3.
    """

    attention_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    window_needs_switch: bool = False  # a window counts only with use_sliding_window
    defaults: Mapping[str, object] = field(default_factory=dict)


def _defaults(vocab: int, intermediate: int, positions: int, **more: object) -> Mapping[str, object]:
    """The defaults in which families differ, and what they have in common."""
    common = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    sizes = {"vocab_size": vocab, "intermediate_size": intermediate, "max_position_embeddings": positions}
    return MappingProxyType({**common, **sizes, **more})


_LLAMA = _defaults(32_000, 11_008, 2_048)
_MISTRAL = _defaults(32_000, 14_336, 131_072, num_key_value_heads=8, sliding_window=4_096)
_QWEN2 = _defaults(
    151_936, 22_016, 32_768, num_key_value_heads=32, sliding_window=4_096, max_window_layers=28
)
_QWEN3 = MappingProxyType({**_QWEN2, "head_dim": 128})

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(defaults=_LLAMA),
        "mistral": Family(attention_bias=False, output_bias=False, mlp_bias=False, defaults=_MISTRAL),
        "qwen2": Family(
            attention_bias=True,
            output_bias=False,
            mlp_bias=False,
            window_needs_switch=True,
            defaults=_QWEN2,
        ),
        "qwen3": Family(mlp_bias=False, qk_norm=True, window_needs_switch=True, defaults=_QWEN3),
    }
)

# Fields of other architectures that change the result, with the values that switch
# each one off. Absent and null are always off.
_RESULT_CHANGING: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "add_cross_attention": (False,),
        "alibi": (False,),
        "attention_chunk_size": (),
        "attention_multiplier": (),
        "attn_logit_softcapping": (),
        "attn_temperature_tuning": (False, 0),
        "clip_qkv": (),
        "dual_chunk_attention_config": ({},),
        "embedding_multiplier": (1,),
        "final_logit_softcapping": (),
        "is_causal": (True,),
        "logit_scale": (1,),
        "logits_scaling": (1,),
        "n_routed_experts": (0,),
        "no_rope_layer_interval": (0,),
        "no_rope_layers": ([],),
        "num_experts": (0,),
        "num_local_experts": (0,),
        "parallel_attn": (False,),
        "partial_rotary_factor": (1,),
        "pruned_heads": ({}, []),
        "quantize_activations": (False,),
        "query_pre_attn_scalar": (),
        "residual_multiplier": (1,),
        "rope_interleaved": (False,),
        "rope_local_base_freq": (),
        "rope_traditional": (False,),
        "rotary_pct": (1,),
        "scale_depth": (),
        "scale_emb": (1,),
        "use_mrope": (False,),
        "use_parallel_residual": (False,),
        "use_qk_norm": (False,),
    }
)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How RoPE's frequencies are stretched for contexts beyond the trained one.

    "linear" divides every frequency by ``factor``. "llama3" divides only the slow
    ones, by the other three fields; they are 0 for "linear".
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class Quantization:
    """MLX's affine format: ``bits`` a weight, one scale and bias for each ``group_size`` of a row.

    ``overrides`` maps a module's name (``model.layers.0.mlp.up_proj``) to its own format, or to None where
    the module is not quantized.
    """

    bits: int
    group_size: int
    overrides: Mapping[str, Quantization | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bits not in QUANTIZED_BITS or self.group_size not in QUANTIZED_GROUPS:
            raise ConfigError(
                f"quantization has {self.bits!r} bits in groups of {self.group_size!r}, "
                f"expected bits of {QUANTIZED_BITS} and a group of {QUANTIZED_GROUPS}."
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The facts that shape a decoder. Sizes count elements; ids are token ids."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    quantization: Quantization | None
    dtype: str

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, object], family_of: Callable[[str], Family] | None = None
    ) -> ModelConfig:
        """Read config.json's fields; ``family_of`` looks up ``model_type``, by default among FAMILIES.

        A field that is absent has its family's default; null is no default but what the field has for it.

        Raises ConfigError for a field that is missing, of the wrong type or out of
        range, and for an option that changes the result and is not supported.
        """
        model_type = _Fields(raw).text("model_type")
        family = (family_of or built_in_family)(model_type)
        fields = _Fields({**family.defaults, **raw})
        layers = fields.whole("num_hidden_layers", most=10_000)
        positions = fields.whole("max_position_embeddings")
        _refuse_unsupported(raw)
        _refuse_sliding_window(fields, family, layers, positions)
        hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
        theta, scaling = _rope(fields)
        attention_bias = fields.flag("attention_bias", False)
        return cls(
            model_type=model_type,
            vocab_size=fields.whole("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.whole("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_num_kv_heads(fields, heads),
            head_dim=_head_dim(fields, hidden, heads),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=positions,
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            attention_bias=_fixed_or(family.attention_bias, attention_bias),
            output_bias=_fixed_or(family.output_bias, attention_bias),
            mlp_bias=_fixed_or(family.mlp_bias, fields.flag("mlp_bias", False)),
            qk_norm=family.qk_norm,
            eos_token_ids=_token_ids(fields, "eos_token_id"),
            bos_token_id=next(iter(_token_ids(fields, "bos_token_id")), None),
            quantization=_quantization(fields),
            dtype=_dtype(fields),
        )


def load_config(folder: Path, family_of: Callable[[str], Family] | None = None) -> ModelConfig:
    """Read ``folder``/config.json, or that file itself, as ``ModelConfig.from_hf`` does; errors name it."""
    path = folder if folder.is_file() else folder / "config.json"
    return _from_file(path, lambda raw: ModelConfig.from_hf(raw, family_of))


def load_end_ids(folder: Path) -> tuple[int, ...]:
    """Read the end tokens of ``folder``/generation_config.json, which has some that config.json lacks.

    () where there is no such file. Raises ConfigError for one that is broken.
    """
    path = folder / "generation_config.json"
    return _from_file(path, lambda raw: _token_ids(_Fields(raw), "eos_token_id")) if path.is_file() else ()


def built_in_family(model_type: str) -> Family:
    """Return the family of ``model_type``. Raises ConfigError, with near names, for one that is unknown."""
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type is {model_type!r}, expected one of {', '.join(FAMILIES)}, "
            f"or one that an installed plug-in adds.{did_you_mean(model_type, FAMILIES)}"
        )
    return FAMILIES[model_type]


def _from_file(path: Path, read: Callable[[Mapping[str, object]], _T]) -> _T:
    raw = _read_object(path)
    try:
        return read(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_object(path: Path) -> Mapping[str, object]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}). A model folder holds config.json, "
            "safetensors files and tokenizer.json."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}). Download or save it again.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__}, expected an object.")
    return raw


class _Fields:
    """A JSON object's fields with their types checked. Null counts as absent."""

    def __init__(self, raw: Mapping[str, object], inside: str = "") -> None:
        self._raw = raw
        self._inside = inside

    def get(self, name: str) -> object:
        return self._raw.get(name)

    def names(self) -> set[str]:
        return {name for name, value in self._raw.items() if value is not None}

    def wrong(self, name: str, expected: str) -> ConfigError:
        label = f"{self._inside}.{name}" if self._inside else name
        given = self.get(name)
        if given is None:
            return ConfigError(f"{label} is missing, expected {expected}.")
        return ConfigError(f"{label} is {given!r}, expected {expected}.")

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def whole(self, name: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least} to {most:,}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.wrong(name, "a positive number")
        return float(value)

    def section(self, name: str) -> _Fields | None:
        value = self.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return _Fields(value, name)

    def _value(self, name: str, default: object) -> object:
        value = self.get(name)
        return default if value is None else value


def _fixed_or(fixed: bool | None, declared: bool) -> bool:
    return declared if fixed is None else fixed


def _refuse_unsupported(raw: Mapping[str, object]) -> None:
    for name, off in _RESULT_CHANGING.items():
        value = raw.get(name)
        if value is not None and value not in off:
            raise ConfigError(
                f"{name} is {value!r}: it changes the model's result and is not supported. "
                "Use a checkpoint without it."
            )
    if raw.get("hidden_act", "silu") not in ("silu", "swish", None):
        raise ConfigError(f"hidden_act is {raw['hidden_act']!r}, expected 'silu'.")


def _refuse_sliding_window(fields: _Fields, family: Family, layers: int, positions: int) -> None:
    """Refuse a window that hides keys: shorter than the context, on a layer that uses it."""
    kinds = fields.get("layer_types") or ["full_attention"] * layers
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        raise fields.wrong("layer_types", f"{layers} times 'full_attention'")
    window = fields.get("sliding_window")
    slides = window is not None
    if family.window_needs_switch:
        full_layers = fields.whole("max_window_layers", layers, least=0)
        switched = fields.flag("use_sliding_window", False)
        slides = slides and switched and full_layers < layers and not fields.get("layer_types")
    slides = slides or "sliding_attention" in kinds
    if slides and not (isinstance(window, int) and window >= positions):
        raise ConfigError(
            f"sliding_window is {window!r} with a context of {positions}: attention within a window "
            "is not supported. Use a checkpoint whose layers attend to the whole context."
        )


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Return theta and scaling, from ``rope_theta`` + ``rope_scaling`` or from ``rope_parameters``."""
    sections = [s for s in map(fields.section, ("rope_scaling", "rope_parameters")) if s is not None]
    scalings = {_rope_scaling(section) for section in sections} or {None}
    named = [part for part in (fields, *sections) if part.get("rope_theta") is not None]
    thetas = {part.number("rope_theta") for part in named} or {10_000.0}
    if len(scalings) > 1 or len(thetas) > 1:
        raise ConfigError(
            "rope_theta, rope_scaling and rope_parameters contradict each other. Keep one spelling: "
            "rope_theta with rope_scaling, or rope_parameters alone."
        )
    return thetas.pop(), scalings.pop()


_ROPE_FIELDS = frozenset(
    {
        "type",
        "rope_type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    }
)


def _rope_scaling(section: _Fields) -> RopeScaling | None:
    unknown = sorted(section.names() - _ROPE_FIELDS)
    if unknown:
        raise section.wrong(unknown[0], "only fields of the rope types 'default', 'linear' and 'llama3'")
    if section.number("partial_rotary_factor", 1.0) != 1.0:
        raise section.wrong("partial_rotary_factor", "1, since all of a head is rotated")
    name = "rope_type" if section.get("rope_type") is not None else "type"
    kind = section.text(name, None if section.get("factor") is not None else "default")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", section.number("factor"))
    if kind != "llama3":
        raise section.wrong(name, "'default', 'linear' or 'llama3'")
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise section.wrong("high_freq_factor", f"a number above low_freq_factor, which is {low}")
    original = section.whole("original_max_position_embeddings")
    return RopeScaling("llama3", section.number("factor"), low, high, original)


def _num_kv_heads(fields: _Fields, heads: int) -> int:
    kv_heads = fields.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads, which is {heads}")
    return kv_heads


def _head_dim(fields: _Fields, hidden: int, heads: int) -> int:
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.wrong("head_dim", f"a size, since {heads} heads do not divide hidden_size {hidden}")
    head_dim = fields.whole("head_dim", hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim is {head_dim}, expected an even size: RoPE rotates pairs.")
    return head_dim


def _token_ids(fields: _Fields, name: str) -> tuple[int, ...]:
    value = fields.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise fields.wrong(name, "a token id, or a list of them")
    return tuple(ids)


def _dtype(fields: _Fields) -> str:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"  # transformers 5, transformers 4
    dtype = fields.text(name, "float32")
    if dtype not in DTYPES:
        raise fields.wrong(name, f"one of {', '.join(DTYPES)}")
    return dtype


def _quantization(fields: _Fields) -> Quantization | None:
    """Read MLX's ``quantization``; ``quantization_config`` may be its copy, but not another method's."""
    foreign = fields.section("quantization_config")
    if foreign is not None and foreign.get("quant_method") is not None:
        raise foreign.wrong("quant_method", "MLX's affine format. Use an MLX or an unquantized checkpoint")
    section = fields.section("quantization") or foreign
    if section is None:
        return None
    whole = _quantized_format(section)
    modules = section.names() - {"bits", "group_size", "mode"}
    overrides = {name: _override(section, name, whole) for name in modules if section.get(name) is not True}
    return Quantization(whole.bits, whole.group_size, overrides)


def _override(section: _Fields, name: str, whole: Quantization) -> Quantization | None:
    if section.get(name) is False:
        return None
    own = section.section(name)
    if own is None:
        raise section.wrong(name, "false, or an object with bits and group_size")
    return _quantized_format(own, whole)


def _quantized_format(section: _Fields, default: Quantization | None = None) -> Quantization:
    if section.text("mode", "affine") != "affine":
        raise section.wrong("mode", "'affine'")
    bits = section.whole("bits", default.bits if default else None)
    return Quantization(bits, section.whole("group_size", default.group_size if default else None))
