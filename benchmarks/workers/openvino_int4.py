"""OpenVINO as a side of a benchmark: random int4 weights in groups of 64, laid out as NNCF stores them.

The graph is Qwen2's as optimum exports it: keys and values are its states, and attention is one operation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op import Constant
from protocol import Config, serve

GROUP = 64
INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
DEVIATION_OF_4_BITS = 4.6
Node = ov.Output | ov.Node


class Graph:
    """Qwen2 in a config's shapes: ids and positions [B, T], mask [B, L], rows [B] to logits [B, 1, V]."""

    def __init__(self, config: Config) -> None:
        number = {name: value for name, value in config.items() if isinstance(value, int | float)}
        self._hidden, self._heads = int(number["hidden_size"]), int(number["num_attention_heads"])
        self._kv_heads = int(number["num_key_value_heads"])
        self._dim = self._hidden // self._heads
        self._middle, self._vocab = int(number["intermediate_size"]), int(number["vocab_size"])
        self._eps, self._theta = float(number["rms_norm_eps"]), float(number["rope_theta"])
        self._layers, self._is_tied = int(number["num_hidden_layers"]), bool(number["tie_word_embeddings"])
        self._rng = np.random.default_rng(0)
        self._sinks: list[ov.Node] = []
        self._packed: list[np.ndarray] = []  # constants lie in these, and do not keep them
        self.weight_bytes = 0

    def model(self) -> ov.Model:
        """The whole graph."""
        ids, mask, positions = (op.parameter([-1, -1], np.int64) for _ in range(3))
        rows = op.parameter([-1], np.int32)
        for given, name in zip((ids, mask, positions, rows), INPUTS, strict=True):
            given.output(0).set_names({name})
        table = self._matrix(self._vocab, self._hidden)
        x = op.gather(table, ids, 0)
        rotation, seen = self._rotation(positions), self._seen(mask, positions)
        for layer in range(self._layers):
            x = op.add(x, self._attention(layer, self._norm(x), rotation, seen, rows, ids))
            x = op.add(x, self._mlp(self._norm(x)))
        last = op.gather(self._norm(x), op.constant([-1], np.int64), 1)
        head = table if self._is_tied else self._matrix(self._vocab, self._hidden)
        logits = op.result(op.matmul(last, head, False, True))
        return ov.Model([logits], self._sinks, [ids, mask, positions, rows], "qwen2")

    def _matrix(self, outputs: int, inputs: int) -> ov.Node:
        """Float32 [outputs, inputs] of signed integers of 4 bits and a float16 scale a group."""
        shape = [outputs, inputs // GROUP, GROUP]
        packed = self._rng.integers(0, 256, outputs * inputs // 2, np.uint8)
        scale = np.full([*shape[:2], 1], inputs**-0.5 / DEVIATION_OF_4_BITS, np.float16)
        self._packed.append(packed)
        self.weight_bytes += packed.nbytes + scale.nbytes
        integers = op.convert(Constant(ov.Tensor(packed, ov.Shape(shape), ov.Type.i4)), np.float16)
        whole = op.reshape(op.multiply(integers, op.constant(scale)), op.constant([outputs, inputs]), False)
        return op.convert(whole, np.float32)

    def _linear(self, x: Node, outputs: int, inputs: int, *, bias: bool = False) -> ov.Node:
        y = op.matmul(x, self._matrix(outputs, inputs), False, True)
        return op.add(y, op.constant(np.zeros([1, 1, outputs], np.float32))) if bias else y

    def _norm(self, x: Node) -> ov.Node:
        square = op.reduce_mean(op.power(x, op.constant(np.float32(2))), op.constant([-1]), True)
        root = op.sqrt(op.add(square, op.constant(np.float32(self._eps))))
        normed = op.multiply(x, op.divide(op.constant(np.float32(1)), root))
        return op.multiply(normed, op.constant(np.ones([1, 1, self._hidden], np.float32)))

    def _rotation(self, positions: Node) -> tuple[ov.Node, ov.Node]:
        """Cosines and sines [B, 1, T, D]."""
        inverse = self._theta ** (-np.arange(0, self._dim, 2, dtype=np.float32) / self._dim)
        angles = op.multiply(
            op.unsqueeze(op.convert(positions, np.float32), op.constant([1, 3])),
            op.constant(inverse.astype(np.float32).reshape(1, 1, 1, -1)),
        )
        both = op.concat([angles, angles], -1)
        return op.cos(both), op.sin(both)

    def _seen(self, mask: Node, positions: Node) -> ov.Node:
        """What is added to scores, [B, 1, T, L]: a row sees what stands up to its position."""
        length = op.gather(op.shape_of(mask), op.constant(1), op.constant(0))
        places = op.range(op.constant(np.int64(0)), length, op.constant(np.int64(1)), "i64")
        is_seen = op.less_equal(places, op.unsqueeze(positions, op.constant([1, 3])))
        return op.select(is_seen, op.constant(np.float32(0)), op.constant(np.float32(-1e9)))

    def _attention(
        self, layer: int, x: Node, rotation: tuple[Node, Node], seen: Node, rows: Node, ids: Node
    ) -> ov.Node:
        hidden, kv = self._hidden, self._kv_heads * self._dim
        q = _rotated(self._split(self._linear(x, hidden, hidden, bias=True), self._heads), rotation)
        k = _rotated(self._split(self._linear(x, kv, hidden, bias=True), self._kv_heads), rotation)
        v = self._split(self._linear(x, kv, hidden, bias=True), self._kv_heads)
        keys = self._repeated(self._kept(f"keys.{layer}", k, rows, ids))
        values = self._repeated(self._kept(f"values.{layer}", v, rows, ids))
        out = op.scaled_dot_product_attention(q, keys, values, seen)
        joined = op.reshape(op.transpose(out, op.constant([0, 2, 1, 3])), op.constant([0, 0, hidden]), True)
        return self._linear(joined, hidden, hidden)

    def _split(self, x: Node, heads: int) -> ov.Node:
        apart = op.reshape(x, op.constant([0, 0, heads, self._dim]), True)
        return op.transpose(apart, op.constant([0, 2, 1, 3]))

    def _kept(self, name: str, new: Node, rows: Node, ids: Node) -> ov.Node:
        """A state [B, K, L, D], its rows in the order of ``rows``, with what is new behind it."""
        size = op.gather(op.shape_of(ids), op.constant([0]), op.constant(0))
        shape = op.concat([size, *(op.constant([n]) for n in (self._kv_heads, 0, self._dim))], 0)
        empty = op.broadcast(op.constant(np.float32(0)), shape)
        of = ov.PartialShape([-1, self._kv_heads, -1, self._dim])
        past = op.read_value(empty, name, ov.Type.f32, of)
        grown = op.concat([op.gather(past, rows, op.constant(0)), new], 2)
        self._sinks.append(op.assign(grown, name))
        return grown

    def _repeated(self, x: Node) -> ov.Node:
        """[B, K, L, D] as [B, H, L, D]."""
        times = self._heads // self._kv_heads
        apart = op.unsqueeze(x, op.constant(2))
        whole = op.broadcast(apart, op.constant([1, 1, times, 1, 1]), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(whole, op.constant([0, self._heads, -1, self._dim]), True)

    def _mlp(self, x: Node) -> ov.Node:
        gate = op.swish(self._linear(x, self._middle, self._hidden))
        both = op.multiply(gate, self._linear(x, self._middle, self._hidden))
        return self._linear(both, self._hidden, self._middle)


def _rotated(x: Node, rotation: tuple[Node, Node]) -> ov.Node:
    first, second = op.split(x, op.constant(-1), 2).outputs()
    turned = op.concat([op.multiply(second, op.constant(np.float32(-1))), first], -1)
    return op.add(op.multiply(x, rotation[0]), op.multiply(turned, rotation[1]))


class OpenVino:
    """A compiled model and one request of its."""

    settings: Sequence[str] = ("int4",)

    def __init__(self, shape: str, config: Config, threads: int, folder: str) -> None:
        self._graph = Graph(config)
        hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._request = ov.Core().compile_model(self._graph.model(), "CPU", hints).create_infer_request()
        vocab = int(str(config["vocab_size"]))
        self._tokens = np.random.default_rng(1).integers(0, vocab, 1 << 17)
        self._rows, self._length = 1, 0
        self.about = {"version": f"openvino {ov.__version__}", "weight_bytes": self._graph.weight_bytes}

    def open(self, rows: int, room: int) -> None:
        """Remember how many sequences; the states grow by themselves."""
        self._rows = rows

    def prefill(self, setting: str, tokens: int) -> float:
        """The whole prompt at once."""
        self._empty()
        began = time.perf_counter()
        self._step(self._tokens[None, :tokens])
        return time.perf_counter() - began

    def decode(self, setting: str, context: int, steps: int) -> float:
        """Steps of one token a sequence."""
        self._empty()
        self._step(np.tile(self._tokens[:context], (self._rows, 1)))
        tokens = self._tokens[: self._rows, None]
        began = time.perf_counter()
        for _ in range(steps):
            tokens = self._step(tokens)
        return time.perf_counter() - began

    def _empty(self) -> None:
        self._request.reset_state()
        self._length = 0

    def _step(self, tokens: np.ndarray) -> np.ndarray:
        """Extend the states by tokens [B, T] and return the likeliest next ones [B, 1]."""
        rows, new = tokens.shape
        end = self._length + new
        self._request.infer(
            {
                "input_ids": tokens,
                "attention_mask": np.ones((rows, end), np.int64),
                "position_ids": np.tile(np.arange(self._length, end), (rows, 1)),
                "beam_idx": np.arange(rows, dtype=np.int32),
            }
        )
        self._length = end
        return self._request.get_output_tensor(0).data[:, -1].argmax(-1)[:, None]


if __name__ == "__main__":
    serve(OpenVino)
