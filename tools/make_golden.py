"""Make tests/golden/: tiny random models as transformers saves them, with what transformers computes.

Needs the ``tools`` extra (torch, transformers 5); tests need neither. Run it again, after adding a
case, from the repository's root:

    python tools/make_golden.py --only NEW_CASE    # all of them without --only; --out other/folder

Weights are rounded to the dtype that they are saved in, then everything is computed in float32, on
fixed seeds. Each folder has the checkpoint and activations.safetensors:

    tokens, positions [T]        the input; every token attends to those before it, in its layer's window
    hidden.0 .. hidden.L [T, E]  what the first layer takes, then each layer's output (before the last norm)
    logits [T, V]
    greedy [12]                  the likeliest tokens after the first 4, one after the other
    layer0.attention [T, E]      what the first layer's attention adds: after o_proj, its norm and its scale
    layer0.*                     in detailed cases also norm, q, k, v [T, heads, D] (projected, normed if
                                 the model does so, not rotated), q_rotated, k_rotated, attended (before
                                 o_proj), mlp_in, mlp
    gap.positions, gap.logits    the same tokens at positions with an offset and a gap

and those of SEARCHED also beams.json: beam searches, with what ``generate(num_beams=...)`` finds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StoppingCriteria
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

LENGTH = 7
PROMPT, ANSWER = 4, 12
GAP_POSITIONS = (5, 6, 7, 40, 41, 97, 98)


@dataclass(frozen=True)
class Case:
    """A model to make: its config's fields, and how it is saved."""

    name: str
    model_type: str
    config: dict[str, object]
    dtype: torch.dtype = torch.bfloat16
    max_shard_size: str = "1GB"
    as_transformers_4: bool = False
    detailed: bool = False
    norm_after: bool = False
    rope: dict[str, object] | None = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0}
    )


def sizes(
    vocab: int, hidden: int, inner: int, heads: int, kv_heads: int, layers: int = 2
) -> dict[str, object]:
    """The sizes of a config by their Hugging Face names."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": 256,
    }


TIED: dict[str, object] = {"tie_word_embeddings": True}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # small, so that all three of its ranges occur
}
CASES = (
    Case("qwen2_tied", "qwen2", sizes(96, 64, 64, 4, 1, layers=1) | TIED, detailed=True),
    Case(
        "qwen2_untied_sharded",
        "qwen2",
        sizes(100, 32, 64, 4, 2),
        max_shard_size="20KB",
        rope={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
    Case("qwen2_14_heads", "qwen2", sizes(67, 56, 20, 14, 2) | TIED),
    Case("qwen3", "qwen3", sizes(120, 32, 32, 4, 2) | {"head_dim": 16} | TIED, detailed=True),
    Case("llama", "llama", sizes(70, 32, 32, 4, 4), dtype=torch.float16, as_transformers_4=True),
    Case(
        "llama_linear",
        "llama",
        sizes(96, 32, 32, 4, 2, layers=1) | TIED,
        rope={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    ),
    Case(
        "llama_llama3",
        "llama",
        sizes(96, 32, 32, 2, 1, layers=1) | TIED,
        as_transformers_4=True,
        detailed=True,
        rope=LLAMA3_ROPE,
    ),
    Case("llama_bias", "llama", sizes(96, 32, 32, 4, 2) | {"attention_bias": True, "mlp_bias": True} | TIED),
    Case("llama_odd", "llama", sizes(61, 25, 19, 5, 1) | {"head_dim": 6}, dtype=torch.float32),
    Case("mistral", "mistral", sizes(64, 32, 32, 4, 2) | {"sliding_window": None}),
    Case("mistral_window", "mistral", sizes(60, 36, 20, 6, 2) | {"sliding_window": 3, "head_dim": 10}),
    Case(
        "qwen2_window",
        "qwen2",
        sizes(60, 24, 20, 3, 1, layers=3)
        | {"sliding_window": 2, "use_sliding_window": True, "max_window_layers": 1}
        | TIED,
    ),
    Case(
        "qwen2_moe",
        "qwen2_moe",
        sizes(83, 32, 44, 4, 2)
        | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        | {"shared_expert_intermediate_size": 24},
    ),
    Case(
        "qwen3_moe",
        "qwen3_moe",
        sizes(66, 64, 36, 2, 1)
        | {"head_dim": 16, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
        | {"norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    Case("olmoe", "olmoe", sizes(71, 32, 24, 4, 2) | {"num_experts": 6, "num_experts_per_tok": 2}),
    Case(
        "ernie4_5_moe",
        "ernie4_5_moe",
        sizes(75, 32, 40, 4, 2, layers=3)
        | {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 20, "moe_num_shared_experts": 2},
        rope={"rope_type": "default", "rope_theta": 500_000.0},
    ),
    Case(
        "gpt2",
        "gpt2",
        {"vocab_size": 71, "n_embd": 40, "n_layer": 2, "n_head": 5, "n_positions": 128, "n_inner": 72},
        rope=None,
    ),
    Case(
        "ernie4_5",
        "ernie4_5",
        sizes(79, 36, 28, 6, 2) | {"head_dim": 10, "use_bias": True} | TIED,
        rope={"rope_type": "default", "rope_theta": 500_000.0},
    ),
    Case(
        "phi3",
        "phi3",
        sizes(68, 48, 36, 3, 1) | {"sliding_window": 4, "pad_token_id": 0},
        rope={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75},
    ),
    Case(
        "phi3_long",
        "phi3",
        sizes(68, 64, 36, 4, 2)
        | {"original_max_position_embeddings": 3, "pad_token_id": 0}  # small: so its long factors are in use
        | TIED,
        rope={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 1.3, 2.2, 4.5, 9.0, 30.0],
        },
    ),
    Case(
        "smollm3",
        "smollm3",
        sizes(90, 36, 44, 6, 3, layers=3) | {"no_rope_layers": [1, 0, 1], "pad_token_id": 0} | TIED,
        rope={"rope_type": "default", "rope_theta": 2_000_000.0},
    ),
    Case("olmo2", "olmo2", sizes(77, 40, 36, 5, 5), norm_after=True),
    Case(
        "granite",
        "granite",
        sizes(82, 40, 28, 4, 2)
        | {"embedding_multiplier": 7.0, "attention_multiplier": 0.2}
        | {"residual_multiplier": 0.3, "logits_scaling": 2.5, "attention_bias": True}
        | TIED,
    ),
    Case(
        "gemma3",
        "gemma3_text",
        sizes(85, 36, 44, 3, 1, layers=3)
        | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 3}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
        | TIED,
        norm_after=True,
        rope={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
        },
    ),
    Case(
        "qwen2_yarn",
        "qwen2",
        sizes(74, 64, 40, 4, 2) | TIED,
        rope={
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    Case(  # no family of ours: that of the appendix's plug-in
        "starcoder2",
        "starcoder2",
        sizes(73, 40, 52, 5, 1) | {"sliding_window": 4, "hidden_act": "gelu_pytorch_tanh"},
    ),
)


SEARCHED = ("qwen2_tied", "qwen3", "llama")


def make_model(case: Case, seed: int) -> PreTrainedModel:
    """Return the case's model, float32, with weights large enough that every part shows in the logits."""
    rope = {} if case.rope is None else {"rope_parameters": copy.deepcopy(case.rope)}
    config = AutoConfig.for_model(case.model_type, **case.config, **rope, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if weight.ndim == 1:
                is_norm = "norm" in name or (".ln_" in name and name.endswith("weight"))
                value = 1 + 0.2 * noise if is_norm else 0.3 * noise
            else:
                turned = weight.ndim == 2 and ".c_" in name  # GPT-2's Conv1D is [in, out]
                inputs = weight.shape[0 if turned else -1]
                is_table = any(part in name for part in ("embed", "wte", "wpe"))
                small = 0.5 if is_table else 0.1 if "correction" in name else None
                value = noise * (small or 1.5 / math.sqrt(inputs))
            weight.copy_(value.to(case.dtype))
    return model


def save_model(model: PreTrainedModel, case: Case, folder: Path) -> None:
    """Save as transformers does, in the case's dtype; then perhaps respell the config as version 4 did.

    Ends the model's use: the change of dtype rounds RoPE's frequencies too.
    """
    for old in folder.glob("*"):
        old.unlink()
    model.to(case.dtype).save_pretrained(folder, max_shard_size=case.max_shard_size)
    if case.as_transformers_4:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        config["torch_dtype"] = config.pop("dtype")
        config["transformers_version"] = "4.57.1"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def activations(model: PreTrainedModel, case: Case, seed: int) -> dict[str, torch.Tensor]:
    """Run the model over random tokens and return what the module's docstring lists."""
    random = torch.Generator().manual_seed(1000 + seed)
    tokens = torch.randint(0, int(str(case.config["vocab_size"])), (1, LENGTH), generator=random)
    positions = torch.arange(LENGTH)
    seen: dict[str, torch.Tensor] = {}
    hooks = _watch_first_layer(model, case, seen)
    outs = _forward(model, tokens, positions)
    for hook in hooks:
        hook.remove()
    gap = torch.tensor(GAP_POSITIONS)
    return {
        "tokens": tokens[0].int(),
        "positions": positions.int(),
        **outs,
        **_first_layer(model, case, seen, positions),
        "gap.positions": gap.int(),
        "gap.logits": _forward(model, tokens, gap)["logits"],
        "greedy": _greedy(model, tokens[:, :PROMPT]),
    }


def _greedy(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    """By whole forward passes: ``generate`` would stop at end tokens."""
    tokens = prompt
    with torch.no_grad():
        for _ in range(ANSWER):
            following = model(tokens, use_cache=False).logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, following], dim=1)
    return tokens[0, PROMPT:].int()


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.transformer.h if model.config.model_type == "gpt2" else model.model.layers


def _forward(
    model: PreTrainedModel, tokens: torch.Tensor, positions: torch.Tensor
) -> dict[str, torch.Tensor]:
    mask = _masks(model, tokens)
    hidden: list[torch.Tensor] = []
    layers = _layers(model)
    hooks = [layers[0].register_forward_pre_hook(lambda _module, inputs: hidden.append(inputs[0][0]))]
    for layer in layers:
        hooks.append(layer.register_forward_hook(lambda *a: hidden.append(_first(a[-1])[0])))
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, position_ids=positions[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return {**{f"hidden.{i}": h for i, h in enumerate(hidden)}, "logits": logits}


def _masks(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
    """Made without the positions, since transformers reads a jump in these as a new sequence."""
    size = tokens.shape[1]
    full = torch.full((size, size), -torch.inf).triu(1)[None, None]
    if getattr(model.config, "sliding_window", None) is None:
        return full
    slides = create_sliding_window_causal_mask(
        model.config,
        inputs_embeds=model.model.embed_tokens(tokens),
        attention_mask=None,
        past_key_values=None,
    )
    by_kind = {"full_attention": full, "sliding_attention": slides}
    return by_kind if getattr(model.config, "layer_types", None) else slides


def _first(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def _watch_first_layer(
    model: PreTrainedModel, case: Case, seen: dict[str, torch.Tensor]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Record outputs of the first layer's modules; a norm of q or k replaces the projection it follows."""
    layer = _layers(model)[0]
    attention = layer.attn if model.config.model_type == "gpt2" else layer.self_attn
    head_dim = attention.head_dim

    def keep(name: str, heads: bool = False):  # type: ignore[no-untyped-def]
        def hook(_module: object, _inputs: object, out: object) -> None:
            value = _first(out)[0]  # type: ignore[arg-type]
            seen[name] = value.reshape(LENGTH, -1, head_dim).clone() if heads else value.clone()

        return hook

    if not case.detailed:
        last = layer.post_attention_layernorm if case.norm_after else attention
        return [last.register_forward_hook(keep("attention"))]
    watched = [
        layer.input_layernorm.register_forward_hook(keep("norm")),
        attention.q_proj.register_forward_hook(keep("q", heads=True)),
        attention.k_proj.register_forward_hook(keep("k", heads=True)),
        attention.v_proj.register_forward_hook(keep("v", heads=True)),
        attention.register_forward_hook(keep("attention")),
        layer.post_attention_layernorm.register_forward_hook(keep("mlp_in")),
        layer.mlp.register_forward_hook(keep("mlp")),
        attention.o_proj.register_forward_pre_hook(
            lambda _m, inputs: seen.update(attended=inputs[0][0].reshape(LENGTH, -1, head_dim).clone())
        ),
    ]
    for name in ("q", "k"):
        if (norm := getattr(attention, f"{name}_norm", None)) is not None:
            watched.append(norm.register_forward_hook(keep(name, heads=True)))
    return watched


def _first_layer(
    model: PreTrainedModel, case: Case, seen: dict[str, torch.Tensor], positions: torch.Tensor
) -> dict[str, torch.Tensor]:
    if not case.detailed:
        scale = getattr(model.config, "residual_multiplier", 1.0)
        return {"layer0.attention": scale * seen["attention"]}
    q, k = (seen[name].transpose(0, 1)[None] for name in ("q", "k"))
    q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(q, positions[None]))
    seen = seen | {"q_rotated": q[0].transpose(0, 1), "k_rotated": k[0].transpose(0, 1)}
    return {f"layer0.{name}": value for name, value in seen.items()}


class EndsWith(StoppingCriteria):
    """A sequence ends with these tokens, as with a stop string."""

    def __init__(self, tokens: list[int], prompt_len: int) -> None:
        self.tokens = torch.tensor(tokens)
        self.prompt_len = prompt_len

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        """Whether each row [B, T] does."""
        count = len(self.tokens)
        too_short = input_ids.shape[1] - self.prompt_len < count
        return (input_ids[:, -count:] == self.tokens).all(dim=1) & (not too_short)


def searches(model: PreTrainedModel, case: Case, seed: int) -> list[dict[str, object]]:
    """Beam searches by every rule, with one end token or two, and with tokens that together end an answer."""
    random = torch.Generator().manual_seed(2000 + seed)
    vocab = int(str(case.config["vocab_size"]))
    found: list[dict[str, object]] = []
    rules = itertools.product((True, False, "never"), (0.6, 1.0, 1.4), (1, 2), (False, True))
    for number, (early, penalty, end_ids, with_stop) in enumerate(rules):
        drawn = torch.randint(3, vocab, (5 + end_ids,), generator=random).tolist()
        asked: dict[str, object] = {
            "prompt": drawn[:5],
            "end_ids": drawn[5:],
            "width": 2 + number % 3,
            "n": 1 + number % 2,
            "max_tokens": 6 + 3 * (number % 5),
            "length_penalty": penalty,
            "early_stopping": early,
            "stop": None,
        }
        best, _ = search(model, asked)[0]
        middle = len(best) // 2
        asked["end_ids"] = [best[min(middle + 1, len(best) - 1)], *drawn[6:]]  # an end inside, for some beams
        if with_stop:
            asked["stop"] = best[middle:][:2]
        answers = search(model, asked)
        found.append(
            asked | {"answers": [tokens for tokens, _ in answers], "scores": [s for _, s in answers]}
        )
    return found


def search(model: PreTrainedModel, asked: dict[str, object]) -> list[tuple[list[int], float]]:
    """The answers that transformers finds, each with its score, best first."""
    prompt, stop, ends = asked["prompt"], asked["stop"], asked["end_ids"]
    out = model.generate(
        torch.tensor([prompt]),
        num_beams=asked["width"],
        num_return_sequences=asked["n"],
        max_new_tokens=asked["max_tokens"],
        length_penalty=asked["length_penalty"],
        early_stopping=asked["early_stopping"],
        eos_token_id=ends,
        pad_token_id=0,
        do_sample=False,
        stopping_criteria=[EndsWith(stop, len(prompt))] if stop else None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    answers = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        tokens: list[int] = []
        for token in row[len(prompt) :]:
            tokens.append(token)
            if token in ends or (stop and tokens[-len(stop) :] == stop):
                break
        answers.append((tokens, round(score, 5)))
    return answers


def main() -> None:
    """Make every case below --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/golden"))
    parser.add_argument("--only", nargs="*", default=[case.name for case in CASES], metavar="CASE")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # several would only wait for each other
    for seed, case in enumerate(CASES):
        if case.name not in asked.only:
            continue
        folder = asked.out / case.name
        folder.mkdir(parents=True, exist_ok=True)
        model = make_model(case, seed)
        tensors = {name: value.contiguous().clone() for name, value in activations(model, case, seed).items()}
        found = searches(model, case, seed) if case.name in SEARCHED else []
        save_model(model, case, folder)
        if found:
            lines = ",\n".join(json.dumps(one) for one in found)
            (folder / "beams.json").write_text(f"[\n{lines}\n]\n")
        save_file(tensors, folder / "activations.safetensors")
        size = sum(path.stat().st_size for path in folder.iterdir())
        spread = tensors["logits"].std().item()
        print(f"{case.name:22} {size / 1e3:6.0f} kB  logits have a standard deviation of {spread:.2f}")


if __name__ == "__main__":
    main()
