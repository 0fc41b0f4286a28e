"""model_type -> architecture. Families share the decoder; installed plug-ins add others.

A plug-in is a Python distribution whose entry point in the group ``tiny_llm.models``
has a model_type as its name and as its value an ``Architecture``, or a ``Family`` of the
decoder; or a file that the user names, and that is named after its model_type. Nothing is
ever imported from a model's own folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import mlx.core as mx

from tiny_llm.config import ModelConfig, ModelFacts
from tiny_llm.config_fields import Fields, read_file
from tiny_llm.data import Batch, KVCache
from tiny_llm.distributed.group import ALONE, Group
from tiny_llm.errors import ConfigError, RequestError
from tiny_llm.families.built_in import FAMILIES, built_in_family
from tiny_llm.families.family import Family, Places, as_wanted, in_order
from tiny_llm.layers.attention import head_order
from tiny_llm.layers.named import Shapes, Weights
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.ranks import rank_parts
from tiny_llm.models.stages import stage_layers, stage_parts, take_stage
from tiny_llm.sampling_params import PoolingParams, SamplingParams
from tiny_llm.weights.gguf.facts import read_facts
from tiny_llm.weights.gguf.header import GGUF, read_gguf

PLUGIN_GROUP = "tiny_llm.models"
Config = TypeVar("Config", bound=ModelFacts)


class Model(Protocol):
    """What the engine needs of a model."""

    @property
    def config(self) -> ModelFacts:
        """The facts that it was built from."""

    def __call__(self, batch: Batch, kv: KVCache) -> mx.array:
        """Return logits [R, V] for the batch's ``logit_rows``, and let ``kv`` keep its keys and values."""


def require_able(model: Model, params: SamplingParams) -> None:
    """Raise RequestError for what a model cannot do."""
    is_decoder, is_pooled = isinstance(model, Decoder), isinstance(params, PoolingParams)
    if is_pooled and not is_decoder:
        raise RequestError("This model, a plug-in's, does not show the hidden states that embed a text.")
    if isinstance(model, Decoder) and not is_pooled and not model.has_head:
        raise RequestError(
            "This model was saved without its head, so it cannot answer; it embeds texts: LLM.embed, "
            "/v1/embeddings, main.py embed."
        )


@dataclass(frozen=True, slots=True)
class Architecture(Generic[Config]):
    """A kind of model: how its config reads, which tensors it has, and how it is built of them.

    ``read_config`` takes config.json's fields and raises ConfigError. ``shapes`` names every tensor of a
    checkpoint, in its unquantized shape. ``packed``: it gives its matrices to nothing but layers, so that
    they may come packed for the CPU kernels. ``unread`` are ends of names that some checkpoints have and
    that follow from the config: they are passed by. ``stored`` says where tensors lie in a checkpoint that
    has these names, if not as they are wanted. ``split`` builds a rank's part of the model from its part of
    the tensors; None: it cannot be split.
    """

    read_config: Callable[[Mapping[str, object]], Config]
    shapes: Callable[[Config], Shapes]
    build: Callable[[Config, Weights], Model]
    packed: bool = False
    unread: Collection[str] = ()
    stored: Callable[[Config, Collection[str]], Places] = as_wanted
    split: Callable[[Config, Weights, Group], Model] | None = None


def decoder_of(family: Family) -> Architecture[ModelConfig]:
    """The decoder, shaped by a family's config.json and with its tensors where the family says."""
    read = partial(ModelConfig.from_hf, family=family)
    unread = (".rotary_emb.inv_freq", *family.unread)

    def stored(config: ModelConfig, names: Collection[str]) -> Places:
        return in_order(family.stored(config, names), head_order(config))

    return Architecture(read, Decoder.shapes, Decoder.take, True, unread, stored, Decoder.take)


def find(model_type: str) -> Architecture[Any]:
    """Return the architecture that a named file, we or an installed plug-in have for it, in this order.

    Raises ConfigError, with near names, without one.
    """
    if model_type in _named():
        return _named()[model_type]
    if model_type in FAMILIES:
        return decoder_of(FAMILIES[model_type])
    for plugin in entry_points(group=PLUGIN_GROUP, name=model_type):
        found = plugin.load()
        if not isinstance(found, (Architecture, Family)):
            raise ConfigError(f"plug-in {plugin.value} is {found!r}, expected an Architecture or a Family.")
        return _architecture(found)
    return decoder_of(built_in_family(model_type))  # raises: it is neither


def add_plugin(path: Path) -> None:
    """Run a Python file, whose one ``Architecture`` or ``Family`` is then that of the model_type which the
    file is named after, in this process. Raises ConfigError for a file that cannot be used.
    """
    name = f"tiny_llm_plugin_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"plug-in {path} (--plugin) is no Python file.")
    module = sys.modules[name] = module_from_spec(spec)  # dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"plug-in {path} fails: {type(error).__name__}: {error}") from error
    ours = [id(family) for family in FAMILIES.values()]  # it may build on some
    held = {
        id(one): one
        for one in vars(module).values()
        if isinstance(one, (Architecture, Family)) and id(one) not in ours
    }
    if len(held) != 1:
        raise ConfigError(
            f"plug-in {path} holds {len(held)} objects of Architecture or Family, expected one."
        )
    _named()[path.stem] = _architecture(*held.values())


@cache
def _named() -> dict[str, Architecture[Any]]:
    """Those of files that were named in this process, by model_type."""
    return {}


def _architecture(given: Architecture[Any] | Family) -> Architecture[Any]:
    return decoder_of(given) if isinstance(given, Family) else given


def read_config(raw: Mapping[str, object]) -> ModelFacts:
    """Read config.json's fields as the architecture of its ``model_type`` does. Raises ConfigError."""
    config: ModelFacts = find(Fields(raw).text("model_type")).read_config(raw)
    return config


def load_config(path: Path) -> ModelFacts:
    """``read_config`` of a folder's config.json, of that file itself, or of a GGUF file; errors name it."""
    if path.suffix == GGUF:
        return read_facts(read_gguf(path), read_config)
    return read_file(path if path.is_file() else path / "config.json", read_config)


def expected_tensors(config: ModelFacts) -> Shapes:
    """Every tensor that a checkpoint of this config holds: Hugging Face name to unquantized shape."""
    return find(config.model_type).shapes(config)


def quantizable_tensors(config: ModelFacts) -> frozenset[str]:
    """Names of the matrices, which may be quantized: linear maps, stacks of them, and the embedding."""
    return frozenset(name for name, shape in expected_tensors(config).items() if len(shape) > 1)


def build(
    config: ModelFacts, weights: Weights, group: Group = ALONE, shares: Sequence[float] | None = None
) -> Model:
    """Build the model of ``config``, or a rank's part, from its named tensors; see ``parts_of``.

    Raises WeightError for one that is missing.
    """
    architecture = find(config.model_type)
    if group.size == 1:
        return architecture.build(config, weights)
    if shares is not None:
        assert isinstance(config, ModelConfig), "parts_of has refused others"
        return take_stage(config, weights, group, stage_layers(config, shares)[group.rank])
    assert architecture.split is not None, "parts_of has refused it"
    return architecture.split(config, weights, group)


def parts_of(config: ModelFacts, group: Group, shares: Sequence[float] | None = None) -> Mapping[str, range]:
    """Which rows of each tensor this rank of a group has; those that it has whole are left out.

    With ``shares`` of the work, one a rank, each has some layers; None: some outputs of all.
    Raises ConfigError for a model that so many cannot share.
    """
    if group.size == 1:
        return {}
    if not isinstance(config, ModelConfig) or find(config.model_type).split is None:
        raise ConfigError(
            f"{config.model_type} is a plug-in's own architecture: it cannot be split over ranks (--ranks)."
        )
    if shares is not None:
        layers = stage_layers(config, shares)
        return stage_parts(config, expected_tensors(config), group.rank, layers)
    return rank_parts(config, expected_tensors(config), group.rank, group.size)
