"""Make tests/golden_embeddings/: tiny random models that embed texts, and what sentence-transformers gives.

Needs the ``tools`` extra; tests do not. Run it again, after adding a case, from the repository's root:

    python tools/make_golden_embeddings.py            # --out for another folder

Weights are rounded to bfloat16, then everything is computed in float32, on fixed seeds, a text at a time.
Each folder is one that ``SentenceTransformer.save`` wrote, with vectors.json: what was asked, the tokens,
the vector.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
TEXTS = (
    "a",
    "What is a KV cache?",
    "The cache keeps keys and values, so that no token is computed twice.",
    "Der Bär geht durch den Wald. " * 8,
)
PROMPTS = {"query": "Instruct: Given a question, find what answers it\nQuery:", "document": ""}
VOCAB, WIDTH = 290, 40


@dataclass(frozen=True)
class Case:
    """A model to make. ``headless``: its tensors are saved as those of a class without a head are."""

    name: str
    model_type: str
    pooling: str
    normalizes: bool
    headless: bool
    appends_end: bool
    config: dict[str, object]


CASES = (
    Case("qwen3_last", "qwen3", "lasttoken", True, True, True, {"head_dim": 12}),
    Case("llama_mean", "llama", "mean", False, False, False, {}),
)


def make_tokenizer(case: Case, folder: Path) -> None:
    """Byte-level BPE of a few hundred tokens; Qwen3-Embedding's puts an end behind each text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    if case.appends_end:
        backend.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=END, eos_token=END).save_pretrained(folder)


def make_model(case: Case, seed: int, folder: Path) -> None:
    """A model whose every part shows in its output, saved with a head or without."""
    config = AutoConfig.for_model(
        case.model_type,
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=56,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=0,
        **case.config,
    )
    kind = AutoModel if case.headless else AutoModelForCausalLM
    model = kind.from_config(config).float().eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            scale = 0.5 if "embed" in name else 1.5 / math.sqrt(weight.shape[-1])
            weight.copy_((1 + 0.2 * noise if weight.ndim == 1 else noise * scale).bfloat16())
    model.bfloat16().save_pretrained(folder)


def vectors(model: SentenceTransformer) -> list[dict[str, object]]:
    """What was asked of ``model``, and what it gave: each text alone, as it is and behind prompts."""
    asked: list[dict[str, object]] = [{"text": text} for text in TEXTS]
    asked += [{"text": TEXTS[1], "prompt": name} for name in PROMPTS]
    asked.append({"text": TEXTS[1], "instruction": "Find code. "})
    asked.append({"text": TEXTS[2], "dimensions": 8})
    found = []
    for one in asked:
        vector = model.encode(
            one["text"],
            prompt_name=one.get("prompt"),
            prompt=one.get("instruction"),
            truncate_dim=one.get("dimensions"),
        )
        before = PROMPTS.get(str(one.get("prompt")), str(one.get("instruction", "")))
        ids = model.tokenizer(before + str(one["text"]))["input_ids"]
        found.append(one | {"ids": ids, "vector": [float(f"{value:.9g}") for value in vector.tolist()]})
    return found


def main() -> None:
    """Make every case below --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/golden_embeddings"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    for seed, case in enumerate(CASES):
        folder = out / case.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make_tokenizer(case, folder)
        make_model(case, seed, folder)
        stored = (folder / "model.safetensors").read_bytes()
        transformer = Transformer(str(folder), model_kwargs={"dtype": torch.float32})
        modules = [transformer, Pooling(WIDTH, pooling_mode=case.pooling)]
        modules += [Normalize()] if case.normalizes else []
        model = SentenceTransformer(modules=modules, prompts=PROMPTS, device="cpu")
        lines = ",\n".join(json.dumps(one) for one in vectors(model))
        model.save(str(folder), create_model_card=False)
        (folder / "model.safetensors").write_bytes(stored)  # in bfloat16, with the names that it had
        (folder / "vectors.json").write_text(f"[\n{lines}\n]\n")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{case.name:12} {size / 1e3:6.0f} kB")


if __name__ == "__main__":
    main()
