"""Chapter 1.5: what lies in the bundled model's file, and what each layer would say. --svg draws.

python book/experiments/model.py [--svg book/docs/img/model.svg]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
from command_line import parser_of
from mlp import hits, size, sums
from rope import DEMO, cases

from tiny_llm.decoding.generate import one_sequence
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.decoder import Decoder
from tiny_llm.models.loading import load_model
from tiny_llm.tokenizer.tokenizer import Tokenizer
from tiny_llm.weights.header import read_header

QUESTION, ANSWER = "What is 48 + 35?", "48 + 35 = 83"
LEFT, WIDE, TALL = 130, 74, 36


@dataclass(frozen=True)
class Said:
    """The token that a cut model would write, and how sure it is."""

    text: str
    chance: float


def stored() -> str:
    """The file's table of tensors, summed up."""
    path = DEMO / "model.safetensors"
    tensors = read_header(path)
    first = min(info.start for info in tensors.values())
    data = sum(info.nbytes for info in tensors.values())
    table = tensors["model.embed_tokens.weight"].nbytes
    layer = [name for name in tensors if name.startswith("model.layers.0.")]
    return (
        f"{path.stat().st_size:,} bytes: 8 of length, {first - 8:,} of table, {data:,} of data\n"
        f"{len(tensors)} tensors, {len(layer)} of them in layer 0; "
        f"the token table has {table / data:.0%} of the data"
    )


def cut(model: Decoder, layers: int) -> Decoder:
    """The model without the layers from ``layers`` on: its last norm and its head read what is there."""
    return Decoder(model.config, model.embed_tokens, model.layers[:layers], model.norm, model.lm_head)


def stream(model: Decoder, ids: Sequence[int]) -> mx.array:
    """What the residual stream [T, E] holds at the end of the model, for a prompt."""
    batch, cache = one_sequence(list(ids), start=0), NoCache()
    x, residual = model.embed_tokens(batch.tokens), None
    for layer in model.layers:
        x, residual = layer(x, residual, batch, cache)
    return x if residual is None else x + residual


def says(model: Decoder, tokenizer: Tokenizer, ids: Sequence[int], last: int) -> list[Said]:
    """What the model would write after each of the ``last`` tokens."""
    logits = model.lm_head(model.norm(stream(model, ids)[-last:]))
    chances = mx.softmax(logits, axis=-1, precise=True)
    best = mx.argmax(logits, axis=-1).tolist()
    return [
        Said(tokenizer.decode([token], skip_special_tokens=False), chances[row, token].item())
        for row, token in enumerate(best)
    ]


def lens(model: Decoder, tokenizer: Tokenizer) -> tuple[list[str], list[list[Said]]]:
    """The tokens of an answer, and a line for each number of layers: what follows each token."""
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.encode(tokenizer.render_chat(chat), add_special_tokens=False)
    answer = tokenizer.encode(ANSWER, add_special_tokens=False)
    ids = [*prompt, *answer]
    names = ["(prompt)", *(tokenizer.decode([token]) for token in answer)]
    counts = range(len(model.layers) + 1)
    return names, [says(cut(model, count), tokenizer, ids, len(names)) for count in counts]


def table(model: Decoder, tokenizer: Tokenizer, lines: Sequence[Sequence[Said]]) -> str:
    """A row for each number of layers."""
    recall, added = cases(tokenizer), sums(tokenizer)
    ids = [token for case in added for token in (*case.prompt, *case.answer)]
    rows = ["layers  size of x  passwords  sums  after '48 + 35 = '"]
    for count, line in enumerate(lines):
        less, said = cut(model, count), line[-3]
        right = hits(less, recall), hits(less, added)
        rows.append(
            f"{count:>6} {size(stream(less, ids)):>10.1f} {right[0]:>10} {right[1]:>5}"
            f"  {said.text!r:<10} {said.chance:>6.0%}"
        )
    return "\n".join(rows)


def picture(names: Sequence[str], lines: Sequence[Sequence[Said]]) -> str:
    """A column a token, a row a layer: what the model would write if it ended there."""

    def shown(text: str) -> str:
        return text.replace("\n", "\\n").replace(" ", "\u2423").replace("<", "&lt;").replace(">", "&gt;")

    bottom = 40 + TALL * len(lines)
    title = "what would be written next, if the model ended here; dark where it is sure"
    parts = [f'<text x="10" y="18">{title}</text>']
    for row, line in enumerate(lines):
        y = bottom - TALL * (row + 1)
        label = "token table" if row == 0 else f"after layer {row - 1}"
        parts.append(f'<text x="10" y="{y + 22}">{label}</text>')
        for column, said in enumerate(line):
            x = LEFT + WIDE * column
            parts.append(
                f'<rect x="{x}" y="{y}" width="{WIDE - 4}" height="{TALL - 4}"'
                f' fill-opacity="{0.9 * said.chance:.2f}"/>'
                f'<text class="middle" x="{x + WIDE // 2 - 2}" y="{y + 21}">{shown(said.text)}</text>'
            )
    for column, name in enumerate(names):
        x = LEFT + WIDE * column + WIDE // 2 - 2
        parts.append(f'<text class="middle bold" x="{x}" y="{bottom + 18}">{shown(name)}</text>')
    parts.append(f'<text x="10" y="{bottom + 18}">token read</text>')
    style = (
        "svg{background:#fff}rect{fill:#e6862b;stroke:#eee}text{font:12px monospace;fill:#222}"
        ".middle{text-anchor:middle;font-size:11px}.bold{font-weight:bold}"
    )
    width = LEFT + WIDE * len(names) + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 30}">'
    return "\n".join([f"{head}<style>{style}</style>", *parts, "</svg>\n"])


def main() -> None:
    """Print the tables, and draw."""
    arguments = parser_of(__doc__).parse_args()
    tokenizer, model = Tokenizer.from_folder(DEMO), load_model(DEMO, dtype="float32")
    assert isinstance(model, Decoder)
    names, lines = lens(model, tokenizer)
    print(f"{stored()}\n\n{table(model, tokenizer, lines)}")
    if arguments.svg:
        arguments.svg.write_text(picture(names, lines), encoding="utf-8")


if __name__ == "__main__":
    main()
