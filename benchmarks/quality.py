"""What do bfloat16, 8- and 4-bit weights and rounded activations cost in quality, against float32 on ``ref``?

Two models: the bundled one, on the right answers to held-out prompts of its seven skills; and the 260K
LLaMA on 40 tales, each cut to its context (in $TINY_LLM_DATA, ../shared/data by default; left out without).
Each predicted token counts once. NLL is its mean negative log-probability in nats; KL is
sum p (log p - log q) over the vocabulary, p being float32's, mean and 99th percentile; top-1 is how often
both like the same token best. Keys and values are kept as LLM keeps them. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))  # the held-out prompts are made where the training text is

from demo_corpus import SKILLS  # noqa: E402
from demo_score import held_out_examples  # noqa: E402

from tiny_llm.data import Batch  # noqa: E402
from tiny_llm.kv.dense import DenseCache  # noqa: E402
from tiny_llm.models.loading import kv_dtype, load_model  # noqa: E402
from tiny_llm.models.registry import Model  # noqa: E402
from tiny_llm.ops import backend  # noqa: E402
from tiny_llm.sampling.logprobs import log_probabilities  # noqa: E402
from tiny_llm.tokenizer.tokenizer import Tokenizer  # noqa: E402
from tiny_llm.weights.hub import resolve  # noqa: E402


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, of which those from ``first`` on are predicted."""

    tokens: Sequence[int]
    first: int


@dataclass(frozen=True, slots=True)
class Setting:
    """How a model is loaded."""

    name: str
    backend: str
    dtype: str | None = None
    quantize: int | None = None
    activations: str = "exact"
    kept: str = "auto"


FLOAT32 = Setting("float32 (ref)", "ref", "float32")
SETTINGS = (
    FLOAT32,
    Setting("float32", "cpu", "float32"),
    Setting("as stored", "cpu"),
    Setting("bfloat16, exact", "cpu", "bfloat16"),
    Setting("bfloat16", "cpu", "bfloat16", activations="int8"),
    Setting("int8 keys and values", "cpu", "float32", kept="int8"),
    Setting("8 bits, exact", "cpu", quantize=8),
    Setting("8 bits, int8", "cpu", quantize=8, activations="int8"),
    Setting("4 bits, exact", "cpu", quantize=4),
    Setting("4 bits, int8", "cpu", quantize=4, activations="int8"),
)


@dataclass(frozen=True, slots=True)
class Quality:
    """Of all predicted tokens; all but NLL against float32."""

    nll: float
    kl_mean: float
    kl_p99: float
    top1: float


def tales(folder: Path, file: Path, context: int) -> list[Text]:
    """The "text" of each line of a JSON-lines file, from its second token on, cut to the context."""
    tokenizer = Tokenizer.from_folder(folder)
    lines = filter(None, file.read_text(encoding="utf-8").split("\n"))
    return [Text(tokenizer.encode(json.loads(line)["text"])[:context], 1) for line in lines]


def answers(folder: Path, count: int) -> list[Text]:
    """``count`` held-out conversations of each of the bundled model's skills: the last, right answer."""
    tokenizer = Tokenizer.from_folder(folder)

    def ids(messages: Sequence[dict[str, object]], **options: object) -> list[int]:
        return tokenizer.encode(tokenizer.render_chat(messages, **options), add_special_tokens=False)

    texts = []
    for example in (e for skill in SKILLS for e in held_out_examples(skill, count)):
        asked = ids(example.messages[:-1], tools=example.tools)
        whole = ids(example.messages, tools=example.tools, add_generation_prompt=False)
        assert whole[: len(asked)] == asked, "the answer must follow what the model is asked with"
        texts.append(Text(whole, len(asked)))
    return texts


def predictions(folder: Path, setting: Setting, texts: Iterable[Text]) -> Iterator[mx.array]:
    """Log-probabilities [tokens, V] of what comes at each predicted place of each text."""
    with backend.use(setting.backend):
        options = {"dtype": setting.dtype, "quantize": setting.quantize}
        model = load_model(folder, activations=setting.activations, **options)
        kept = kv_dtype(model.config, **options, kept=setting.kept)
        for text in texts:
            yield _predict(model, DenseCache(model.config.num_layers, kept), text)


def _predict(model: Model, kv: DenseCache, text: Text) -> mx.array:
    length = len(text.tokens)
    tokens, rows = mx.array(text.tokens, mx.int32), mx.arange(length, dtype=mx.int32)
    logp = log_probabilities(model(Batch(tokens, rows, (0, length), rows[text.first - 1 : -1]), kv))
    mx.eval(logp)
    return logp


def compare(texts: Sequence[Text], truth: Sequence[mx.array], found: Iterable[mx.array]) -> Quality:
    """One setting's predictions against float32's."""
    nll, divergence, same = [], [], []
    for text, p, q in zip(texts, truth, found, strict=True):
        right = mx.array(text.tokens[text.first :])[:, None]
        nll.append(-mx.take_along_axis(q, right, axis=-1)[:, 0])
        divergence.append(mx.sum(mx.where(p > -mx.inf, mx.exp(p) * (p - q), 0), axis=-1))
        same.append(mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1))
    kl = mx.sort(mx.concatenate(divergence))
    return Quality(
        nll=mx.mean(mx.concatenate(nll)).item(),
        kl_mean=mx.mean(kl).item(),
        kl_p99=kl[int(0.99 * (kl.size - 1))].item(),
        top1=mx.mean(mx.concatenate(same)).item(),
    )


def table(name: str, folder: Path, texts: Sequence[Text]) -> dict[str, object]:
    """Print one model's table and return its figures."""
    tokens = sum(len(text.tokens) - text.first for text in texts)
    print(f"\n{f'{name}, {tokens:,} tokens':<28}{'NLL':>9}{'mean KL':>11}{'p99 KL':>11}{'top-1':>9}")
    truth = list(predictions(folder, FLOAT32, texts))
    rows: dict[str, object] = {}
    for setting in SETTINGS:
        if setting.backend == "cpu" and not backend.works():
            continue
        found = truth if setting is FLOAT32 else predictions(folder, setting, texts)
        q = compare(texts, truth, found)
        where = setting.name if setting is FLOAT32 else f"{setting.name} (cpu)"
        print(f"{where:<28}{q.nll:>9.4f}{q.kl_mean:>11.2e}{q.kl_p99:>11.2e}{q.top1:>9.2%}", flush=True)
        rows[where] = asdict(q)
    return {"tokens": tokens, "rows": rows}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12, help="held-out prompts of each skill")
    options = parser.parse_args()
    if not backend.works():
        print("The CPU kernels are not built: only ref is measured.")
    demo = resolve("demo")
    found: dict[str, object] = {
        "benchmark": "quality",
        "demo": table("demo", demo, answers(demo, options.count)),
    }
    data = Path(os.environ.get("TINY_LLM_DATA") or ROOT.parent / "shared" / "data")
    folder, file = data / "models" / "stories260K", data / "text" / "tinystories_first40.jsonl"
    if file.is_file():
        found["stories260K"] = table("stories260K", folder, tales(folder, file, context=512))
    else:
        print(f"No {file}: without the 260K LLaMA.")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
