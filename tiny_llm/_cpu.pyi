"""Types of the extension module that kernels/cpu builds."""

import mlx.core as mx

def isa() -> str: ...
def best_isa() -> str: ...
def set_isa(name: str) -> None: ...
def all_float32(*arrays: mx.array) -> bool: ...
def keep_memory() -> None: ...
def kernel_seconds() -> float: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array: ...
def add_rms_norm(
    x: mx.array, residual: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]: ...
def argmax(x: mx.array) -> mx.array: ...
def logprobs(logits: mx.array, tokens: mx.array, count: int) -> tuple[mx.array, mx.array, mx.array]: ...
def sample(
    logits: mx.array,
    temperature: list[float],
    top_k: list[int],
    top_p: list[float],
    min_p: list[float],
    seeds: list[int],
    positions: list[int],
) -> mx.array: ...

class Chain:
    def __init__(self, inputs: list[mx.array], outputs: list[mx.array]) -> None: ...
    def __call__(self, inputs: list[mx.array]) -> list[mx.array]: ...

class Matrix:
    data: mx.array
    count: int
    rows: int
    columns: int
    shape: tuple[int, int]
    bits: int
    group_size: int
    exact: bool
    nbytes: int

def pack_quantized(
    packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int, exact: bool
) -> Matrix: ...
def pack_dense(weight: mx.array, exact: bool = True) -> Matrix: ...
def linear(
    x: mx.array, weights: list[Matrix], biases: list[mx.array | None], head_dim: int = 0
) -> list[mx.array]: ...
def gated(
    x: mx.array, gate: Matrix, up: Matrix, gate_bias: mx.array | None, up_bias: mx.array | None
) -> mx.array: ...
def quantized_rows(
    x: mx.array, words: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array: ...
def embedding(tokens: mx.array, weight: Matrix) -> mx.array: ...
def experts(
    x: mx.array,
    logits: mx.array,
    correction: mx.array | None,
    per_row: int,
    normalised: bool,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
) -> mx.array: ...
def experts_gated(
    x: mx.array,
    logits: mx.array,
    correction: mx.array | None,
    per_row: int,
    normalised: bool,
    gate: Matrix,
    up: Matrix,
) -> mx.array: ...
def experts_down(
    hidden: mx.array,
    logits: mx.array,
    correction: mx.array | None,
    per_row: int,
    normalised: bool,
    down: Matrix,
) -> mx.array: ...
def rope(x: mx.array, positions: mx.array, inv_freq: mx.array) -> mx.array: ...
def rope_qk(
    q: mx.array,
    k: mx.array,
    positions: mx.array,
    inv_freq: mx.array,
    q_norm: mx.array | None,
    k_norm: mx.array | None,
    eps: float,
) -> tuple[mx.array, mx.array]: ...
def softmax(x: mx.array) -> mx.array: ...
def swiglu(gate: mx.array, up: mx.array) -> mx.array: ...
def untouched_zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array: ...
def copy_blocks(source: mx.array, target: mx.array, pairs: mx.array) -> mx.array: ...
def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    pool: list[mx.array],
    slots: mx.array,
    block_tables: mx.array,
    starts: mx.array,
    context_lens: mx.array,
    scale: float,
    window: int = 0,
) -> tuple[mx.array, list[mx.array]]: ...
