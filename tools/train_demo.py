"""Train the bundled demo model and its draft, and write them as Hugging Face folders.

    pip install '.[tools]'
    python tools/train_demo.py main     # tiny_llm/demo/         (about two hours on 2 cores)
    python tools/train_demo.py draft    # tiny_llm/demo/draft/   (about ten minutes; same tokenizer)

Owns the tokenizer's training, the optimiser and the schedule; the text comes from
demo_corpus.py. Loss is taken on the assistant's tokens alone. A run that was
stopped goes on from its last checkpoint (``--work``). Settings, loss curve and
exact-match rates on held-out prompts are kept in tools/demo_data/.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from demo_corpus import MIXTURE, SKILLS, examples, render, windows
from demo_plot import loss_curve
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

DATA = Path(__file__).parent / "demo_data"
DEMO = Path(__file__).parent.parent / "tiny_llm" / "demo"
VOCAB = 2048
CONTEXT = 1024
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOL_MARKS = ("<tool_call>", "</tool_call>")
# Words, numbers digit by digit, punctuation and space, as the Qwen2 tokenizer splits them.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Settings:
    """One run's settings; lengths in tokens."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    steps: int
    batch_tokens: int = 6144
    processes: int = 2
    window: int = 512
    long_window: int = 1024
    long_from: float = 0.8
    lr: float = 3e-3
    warmup: int = 100
    decay_from: float = 0.55
    weight_decay: float = 0.1
    seed: int = 1


RUNS = {
    "main": Settings(hidden=256, layers=6, intermediate=768, heads=4, kv_heads=2, steps=3450),
    "draft": Settings(hidden=128, layers=2, intermediate=384, heads=2, kv_heads=1, steps=2400),
}


def train_tokenizer() -> Tokenizer:
    """Return a byte-level BPE of VOCAB entries trained on 6,000 conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL) - len(TOOL_MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stream = examples(seed=0)
    texts = []
    for _ in range(6000):
        example = next(stream)
        text = render(example.messages, example.tools)
        for mark in SPECIAL + TOOL_MARKS:
            text = text.replace(mark, "\n")
        texts.append(text)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TOOL_MARKS])
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


class Supervision:
    """Marks the tokens to learn: the assistant's, its end mark included."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.opening = tokenizer.encode("<|im_start|>assistant\n").ids
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.separator = tokenizer.token_to_id("<|endoftext|>")

    def marks(self, ids: list[int]) -> list[bool]:
        """Return for each token whether it is the assistant's own."""
        marks, inside, width = [False] * len(ids), False, len(self.opening)
        for i, token in enumerate(ids):
            if inside:
                marks[i] = True
                inside = token != self.end
            elif ids[max(0, i + 1 - width) : i + 1] == self.opening:
                inside = True
        return marks


Batch = tuple[torch.Tensor, torch.Tensor]


def batches(tokenizer: Tokenizer, length: int, count: int, reach: int, seed: int) -> Iterator[Batch]:
    """Yield (ids [count, length], learn [count, length]) of packed conversations."""
    supervision = Supervision(tokenizer)
    packed = windows(
        examples(seed, reach), lambda text: [*tokenizer.encode(text).ids, supervision.separator], length
    )
    while True:
        ids = torch.full((count, length), supervision.separator)
        learn = torch.zeros((count, length), dtype=torch.bool)
        for row in range(count):
            flat = [token for conversation in next(packed) for token in conversation]
            ids[row, : len(flat)] = torch.tensor(flat)
            learn[row, : len(flat)] = torch.tensor(supervision.marks(flat))
        yield ids, learn


def build(s: Settings) -> Qwen2ForCausalLM:
    """Return a fresh model of the run's shape."""
    torch.manual_seed(s.seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        intermediate_size=s.intermediate,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCAB - len(TOOL_MARKS) - 1,
        use_cache=False,
    )
    return Qwen2ForCausalLM(config)


def hits_and_loss(
    model: Qwen2ForCausalLM, ids: torch.Tensor, learn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (right [L] of the argmax, mean loss) over the L tokens to learn."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
        logits = model.lm_head(hidden[learn[:, 1:]])
    target = ids[:, 1:][learn[:, 1:]]
    return logits.argmax(-1) == target, cross_entropy(logits.float(), target)


def exact_rates(model: Qwen2ForCausalLM, tokenizer: Tokenizer, per_skill: int = 96) -> dict[str, float]:
    """Return each skill's share of held-out answers whose every token is the likeliest one.

    That is the share that greedy decoding gives word for word (stories have many right answers).
    """
    opening = tokenizer.encode("<|im_start|>assistant\n").ids
    rates = {}
    for name, skill in SKILLS.items():
        rng, right = random.Random(7), 0
        for _ in range(per_skill):
            example = skill.make(rng, True)
            ids = tokenizer.encode(render(example.messages, example.tools)).ids
            before = tokenizer.encode(render(example.messages[:-1], example.tools)).ids
            learn = torch.zeros((1, len(ids)), dtype=torch.bool)
            learn[0, len(before) + len(opening) : len(ids) - 1] = True
            with torch.no_grad():
                right += bool(hits_and_loss(model, torch.tensor([ids]), learn)[0].all())
        rates[name] = right / per_skill
    return rates


class Schedule:
    """Learning rate: warm-up, constant, then linear to zero."""

    def __init__(self, s: Settings) -> None:
        self.s = s

    def at(self, step: int) -> float:
        """Return the learning rate of a step."""
        s, left = self.s, 1 - step / self.s.steps
        return s.lr * min(1.0, (step + 1) / s.warmup, left / (1 - s.decay_from))


def optimizers(model: Qwen2ForCausalLM, s: Settings) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for embedding, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=s.lr, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=s.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(s: Settings, tokenizer: Tokenizer, work: Path, rank: int) -> None:
    """Train from the last checkpoint in ``work``, or from the start, to the last step."""
    model, opts, start, curve = restore(s, work)
    schedule, began, length = Schedule(s), time.time(), 0
    stream: Iterator[Batch] = iter(())
    for step in range(start, s.steps):
        wanted = s.long_window if step >= s.long_from * s.steps else s.window
        if wanted != length:
            length, reach = wanted, 230 if wanted == s.window else 450
            rows = s.batch_tokens // s.processes // length
            stream = batches(tokenizer, length, rows, reach, s.seed + 1000 * (step + 1) + rank)
        curve.append((step, update(model, opts, next(stream), schedule.at(step))))
        if rank:
            continue
        if step % 20 == 0:
            rate = s.batch_tokens * (step + 1 - start) / (time.time() - began)
            mean = sum(loss for _, loss in curve[-20:]) / len(curve[-20:])
            print(f"step {step}/{s.steps} loss {mean:.4f} tokens/s {rate:.0f}", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == s.steps:
            save(model, opts, step + 1, curve, work)
        if (step + 1) % 400 == 0:
            print(step + 1, exact_rates(model, tokenizer, 32), flush=True)


Restored = tuple[Qwen2ForCausalLM, list[torch.optim.Optimizer], int, list[tuple[int, float]]]


def restore(s: Settings, work: Path) -> Restored:
    """Return model, optimisers, next step and loss curve, from the checkpoint if there is one."""
    model = build(s)
    opts = optimizers(model, s)
    if not (work / "checkpoint.pt").exists():
        return model, opts, 0, []
    state = torch.load(work / "checkpoint.pt")
    model.load_state_dict(state["model"])
    for opt, kept in zip(opts, state["opts"], strict=True):
        opt.load_state_dict(kept)
    return model, opts, state["step"], state["curve"]


def save(
    model: Qwen2ForCausalLM, opts: list[torch.optim.Optimizer], step: int, curve: object, work: Path
) -> None:
    """Write the checkpoint, replacing the last one only when it is whole."""
    kept = [opt.state_dict() for opt in opts]
    torch.save(
        {"model": model.state_dict(), "opts": kept, "step": step, "curve": curve}, work / "checkpoint.tmp"
    )
    (work / "checkpoint.tmp").replace(work / "checkpoint.pt")


def update(model: Qwen2ForCausalLM, opts: list[torch.optim.Optimizer], batch: Batch, lr: float) -> float:
    """Take one step on all processes' batches together; return this process's loss."""
    _, loss = hits_and_loss(model, *batch)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    flat *= min(1.0, 1.0 / float(flat.norm()))
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
        opt.zero_grad()
    return float(loss.detach())


def worker(rank: int, run: str, work: Path) -> None:
    """Train as one of the run's processes: one thread each waits less than many threads in one."""
    torch.set_num_threads(1)
    s = RUNS[run]
    dist.init_process_group(
        "gloo", init_method=f"file://{work.absolute()}/meet", rank=rank, world_size=s.processes
    )
    train(s, Tokenizer.from_file(str(work.parent / "tokenizer.json")), work, rank)
    dist.destroy_process_group()


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json with the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    facts: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": CONTEXT,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": (DATA / "chat_template.jinja").read_text(),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")


def export(model: Qwen2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model in bfloat16 with its tokenizer, as any HF folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = model.generation_config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(tokenizer, folder)


def main() -> None:
    """Train, score, export, and keep settings, curve and rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", choices=sorted(RUNS))
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="where checkpoints are kept")
    parser.add_argument("--out", type=Path, help="where the model goes (default: into the package)")
    args = parser.parse_args()
    s, work = RUNS[args.run], args.work / args.run
    work.mkdir(parents=True, exist_ok=True)
    (work / "meet").unlink(missing_ok=True)
    if not (args.work / "tokenizer.json").exists():
        train_tokenizer().save(str(args.work / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    began = time.time()
    mp.spawn(worker, (args.run, work), nprocs=s.processes)
    model, _, _, curve = restore(s, work)
    rates = exact_rates(model, tokenizer, 256)
    parameters = sum(p.numel() for p in model.parameters())
    export(model, tokenizer, args.out or (DEMO if args.run == "main" else DEMO / "draft"))
    report = {
        "settings": asdict(s),
        "mixture": MIXTURE,
        "parameters": parameters,
        "exact_match": rates,
        "seconds": round(time.time() - began),
    }
    (DATA / f"{args.run}.json").write_text(json.dumps(report, indent=2) + "\n")
    (DATA / f"{args.run}_loss.svg").write_text(loss_curve(curve, f"demo {args.run}: training loss"))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
