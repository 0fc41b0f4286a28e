"""What makes a family of decoders: its config.json in our facts, and where its tensors lie.

Owns how a family says it. Refuses to know any family, and how a tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from tiny_llm.config_fields import Fields

_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """What shapes layers of experts; sizes count elements.

    ``layers`` says which have experts; the others have one MLP, ``dense_width`` wide.
    """

    count: int  # experts of a layer, N
    per_token: int  # that a token is sent to, k
    width: int  # of one expert, F
    layers: frozenset[int]
    dense_width: int
    normalised: bool = False  # the weights of a token's experts add up to 1
    corrected: bool = False  # a bias takes part in choosing, not in weighing
    shared_width: int = 0  # of an MLP that all tokens go through; 0: there is none
    shared_gated: bool = False  # and which each token weighs by a sigmoid

    @property
    def active_width(self) -> int:
        """How wide the MLPs are together that a token goes through."""
        return self.per_token * self.width + self.shared_width


@dataclass(frozen=True, slots=True)
class DecoderSizes:
    """The facts of a config by which tensors are cut. Sizes count elements."""

    hidden_size: int  # width of a token's vector between layers, E
    intermediate_size: int  # width of the MLP that a token goes through: of all experts that it is sent to
    num_heads: int  # of queries, H
    num_kv_heads: int  # of keys and values, K
    head_dim: int  # D
    experts: ExpertFacts | None = field(default=None, kw_only=True)  # of layers that have some


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the tensors of one module lie in a checkpoint, if not as they are wanted.

    ``modules`` are the names there; a first ``{}`` in them stands for the layer. Several are stacked along a
    new first axis; none is the module's own name. ``bare``: the weight is called as the module is, without
    ".weight". It may be ``transposed``, [in, out]. Then ``rows`` from one to before another are taken of the
    ``of`` that lie there. Last, of each ``len(order)`` rows number ``i`` is what lies at ``order[i]``, and
    ``plus`` is added in float32, which the result then is. A vector may lie ``flat``, as a matrix of one row.
    """

    modules: tuple[str, ...] = ()
    transposed: bool = False
    rows: tuple[int, int] | None = None
    of: int = 0
    order: tuple[int, ...] = ()
    plus: float = 0.0
    bare: bool = False
    flat: bool = False


AS_WANTED = Stored()
Places = Mapping[str, Stored]
"""From a module's name, with ``{}`` for the layer, to where it lies; what is left out lies as wanted."""


def nothing(fields: Fields) -> Mapping[str, object]:
    """Facts of a family that needs no more than fixed ones."""
    return {}


def as_wanted(sizes: object, names: Collection[str]) -> Places:
    """Places of a family whose tensors lie as they are wanted."""
    return {}


@dataclass(frozen=True, slots=True)
class Family:
    """What a ``model_type`` means by itself.

    ``defaults`` are the fields of a config.json that does not mention them, as transformers' class for
    the family has them: what a checkpoint leaves out is what its author's tool would fill in. All but
    ``eos_token_id``: other files name it too, and theirs for LLaMA, 2, is "#" in the vocabulary of LLaMA 3.
    ``names`` are what it calls a field that LLaMA has too. ``facts`` of a ``ModelConfig`` are what it fixes,
    and ``read`` takes more from config.json; of fields that would be refused it reads those in ``reads``.
    ``stored`` says where tensors lie, given the config's sizes and all names in the checkpoint. ``unread``
    are ends or beginnings of names of tensors that follow from the config, or that we have no use for.
    ``window_needs_switch``: a window counts only with use_sliding_window.
    """

    defaults: Mapping[str, object] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    read: Callable[[Fields], Mapping[str, object]] = nothing
    reads: Collection[str] = ()
    stored: Callable[[DecoderSizes, Collection[str]], Places] = as_wanted
    unread: Collection[str] = ()
    window_needs_switch: bool = False


def defaults(vocab: int, intermediate: int, positions: int, **more: object) -> Mapping[str, object]:
    """The defaults in which families differ, and what most have in common."""
    common = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    sizes = {"vocab_size": vocab, "intermediate_size": intermediate, "max_position_embeddings": positions}
    return {**common, **sizes, **more}


def fused(module: str, parts: Sequence[tuple[str, int]], *, transposed: bool = False) -> Places:
    """Places of ``parts``, each a module's name and its rows, under each other in one ``module``."""
    ends = list(accumulate(rows for _, rows in parts))
    return {
        name: Stored((module,), transposed, (end - rows, end), ends[-1])
        for (name, rows), end in zip(parts, ends, strict=True)
    }


def place_of(module: str, places: Places) -> Stored:
    """Where a module lies, with its layer's number filled in."""
    layer = _LAYER.search(module)
    number = layer.group() if layer else ""
    place = places.get(_LAYER.sub("{}", module, count=1), AS_WANTED)
    names = tuple(name.replace("{}", number, 1) for name in place.modules)
    return replace(place, modules=names or (module,))


def part_of(place: Stored, rows: range, of: int) -> Stored:
    """Where only ``rows`` lie of what has ``of`` of them."""
    first = place.rows[0] if place.rows else 0
    return replace(place, rows=(first + rows.start, first + rows.stop), of=place.of or of)


def in_order(places: Places, order: tuple[int, ...]) -> Places:
    """The same with ``order`` within each head of what makes queries and keys."""
    names = [f"model.layers.{{}}.self_attn.{part}" for part in ("q_proj", "k_proj", "q_norm", "k_norm")]
    return {**places, **{name: replace(places.get(name, AS_WANTED), order=order) for name in names if order}}
