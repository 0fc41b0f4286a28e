"""GGUF files that the gguf package wrote: the weights, logits and tokens of what they were made from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from tiny_llm.data import QuantizedTensor, SamplingParams
from tiny_llm.distributed.group import Alone
from tiny_llm.engine.llm import LLM
from tiny_llm.errors import ConfigError, WeightError
from tiny_llm.kv.no_cache import NoCache
from tiny_llm.models.checkpoint import FolderCheckpoint, GgufCheckpoint
from tiny_llm.models.loading import load_model
from tiny_llm.models.registry import load_config, parts_of
from tiny_llm.ops.backend import use
from tiny_llm.weights.checkpoint import load_weights
from tiny_llm.weights.gguf.header import read_gguf

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")
from write_gguf import ARCHITECTURES, write_gguf  # noqa: E402

from tests.models.conftest import CASES  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def written() -> list[str]:
    """The golden models of architectures that are written, but one whose window is not said."""
    files = {case: ROOT / "tests" / "golden" / case / "config.json" for case in CASES}
    kinds = {case: json.loads(file.read_text())["model_type"] for case, file in files.items()}
    return [case for case, kind in kinds.items() if kind in ARCHITECTURES and case != "qwen2_window"]


@pytest.fixture(scope="module", params=written())
def folder(golden: Path, request: pytest.FixtureRequest) -> Path:
    """Each of them in turn."""
    return golden / str(request.param)


@pytest.fixture(scope="module")
def path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each golden model as a file of float32."""
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / f"{folder.name}.gguf", "F32")


def plain(matrix: object) -> mx.array:
    return matrix if isinstance(matrix, mx.array) else wide(matrix)


def wide(matrix: QuantizedTensor) -> mx.array:
    scales, biases = matrix.scales.astype(mx.float32), matrix.biases.astype(mx.float32)
    return mx.dequantize(matrix.packed, scales, biases, group_size=matrix.group_size, bits=matrix.bits)


def test_a_golden_models_facts(folder: Path, path: Path) -> None:
    ours, theirs = load_config(path), load_config(folder)
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("vocab_size", "max_position_embeddings", "attention_bias", "mlp_bias", "qk_norm"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert (ours.dtype, ours.quantization) == ("float32", None)


def test_a_golden_models_weights_logits_and_tokens(
    folder: Path, path: Path, backend: str, make_batch, greedy, off
) -> None:
    if folder.name == "smollm3":
        pytest.skip("its layers without RoPE are not every fourth, which a file cannot say")
    seen = mx.load(str(folder / "activations.safetensors"))
    model, source = load_model(path, dtype="float32"), load_model(folder, dtype="float32")
    batch = make_batch(seen["tokens"].tolist())
    error = off(model(batch, NoCache()), seen["logits"])
    assert error < 1e-4, f"off by {error:.2g} of the largest logit"
    assert greedy(model, PROMPT, 16) == greedy(source, PROMPT, 16)


def test_a_golden_models_weights_are_its_own(folder: Path, path: Path, ref: None) -> None:
    how = {"dtype": mx.float32, "quantize": None, "finish": lambda weight: weight}
    ours, theirs = GgufCheckpoint(path).tensors(**how), FolderCheckpoint(folder).tensors(**how)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert mx.array_equal(ours[name], weight), f"{name} differs: rows in another order?"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A LLaMA with a matrix of each type, random, and the float32 weights that the gguf package reads."""
    path = tmp_path_factory.mktemp("packed") / "packed.gguf"
    draw = np.random.default_rng(1)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"token_embd": (48, 256), "output": (48, 256), "blk.0.attn_q": (256, 256)}
    shapes |= {"blk.0.attn_k": (128, 256), "blk.0.attn_v": (128, 256), "blk.0.attn_output": (256, 256)}
    shapes |= {"blk.0.ffn_gate": (512, 256), "blk.0.ffn_up": (512, 256), "blk.0.ffn_down": (256, 512)}
    weights = {}
    for (name, (rows, columns)), kind in zip(shapes.items(), ("Q6_K", "F16", *KINDS[:-1]), strict=True):
        number = gguf.GGMLQuantizationType[kind]
        values, nbytes = gguf.GGML_QUANT_SIZES[number]
        raw = draw.integers(0, 256, (rows * columns // values, nbytes), dtype=np.uint8)
        for at in {"Q6_K": (208,), "F16": (0,)}.get(kind, (0, 2) if kind[-1] in "1K" else (0,)):
            scales = (draw.standard_normal(len(raw)) * 0.003).astype(np.float16)
            raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
        raw = raw.reshape(rows, -1)
        weights[name] = gguf.quants.dequantize(raw, number)
        writer.add_tensor(f"{name}.weight", raw, raw_shape=raw.shape, raw_dtype=number)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


HOUSE = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
HOUSE |= {"attn_output": "self_attn.o_proj"}
HOUSE |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}


def test_a_file_of_all_types(packed: tuple[Path, dict[str, np.ndarray]], ref: None) -> None:
    path, weights = packed
    checkpoint = GgufCheckpoint(path)
    loaded = checkpoint.tensors(dtype=mx.float32, quantize=None, finish=lambda weight: weight)
    names = {"token_embd": "model.embed_tokens", "output": "lm_head"}
    for name, expected in weights.items():
        module = name.removeprefix("blk.0.")
        house = names.get(module) or f"model.layers.0.{HOUSE[module]}"
        if module in ("attn_q", "attn_k"):  # from neighbours to halves
            expected = expected.reshape(-1, 32, 2, 256).swapaxes(1, 2).reshape(-1, 256)
        off = float(mx.abs(plain(loaded[f"{house}.weight"]) - mx.array(expected)).max().item())
        assert off <= (np.abs(expected).max() / 100 if module == "token_embd" else 0), (
            f"{name} is off by {off}"
        )


def test_a_rank_reads_its_rows_of_a_file_of_all_types(
    packed: tuple[Path, dict[str, np.ndarray]], ref: None
) -> None:
    checkpoint = GgufCheckpoint(packed[0])
    how = {"dtype": mx.float32, "quantize": None, "finish": lambda weight: weight}
    whole = checkpoint.tensors(**how)
    for rank in range(2):
        parts = parts_of(checkpoint.config, Alone(rank, 2))
        own = checkpoint.tensors(**how, parts=parts)
        assert len(parts) == len(packed[1]), parts
        for name, rows in parts.items():
            want = plain(whole[name])[rows.start : rows.stop]
            assert mx.array_equal(plain(own[name]), want), f"{name} of rank {rank}"


def test_a_file_of_all_types_says_how_each_is_packed(packed: tuple[Path, dict[str, np.ndarray]]) -> None:
    config = load_config(packed[0])
    whole = config.quantization
    assert whole is not None and (whole.bits, whole.group_size, config.dtype) == (4, 32, "float16")
    bits = {name: other and other.bits for name, other in whole.overrides.items()}
    assert bits == {
        "model.embed_tokens": 8,
        "lm_head": None,
        "model.layers.0.self_attn.v_proj": 5,
        "model.layers.0.self_attn.o_proj": 5,
        "model.layers.0.mlp.gate_proj": 8,
        "model.layers.0.mlp.down_proj": 5,
    }


def test_a_model_of_all_types_computes_with_those_weights(
    packed: tuple[Path, dict[str, np.ndarray]], backend: str, make_batch, off
) -> None:
    """On each backend as on plain MLX with float32 weights; also as one dtype of 16 bits, as a GPU has it."""
    path, batch = packed[0], make_batch(PROMPT)
    with use("ref"):
        expected = load_model(path, dtype="float32")(batch, NoCache())
    assert off(load_model(path, activations="exact")(batch, NoCache()), expected) < 1e-5
    assert off(load_model(path, dtype="bfloat16", activations="exact")(batch, NoCache()), expected) < 0.05
    how = {"dtype": mx.bfloat16, "quantize": None, "finish": lambda weight: weight}
    weights = GgufCheckpoint(path).tensors(**how).values()
    assert {matrix.scales.dtype for matrix in weights if isinstance(matrix, QuantizedTensor)} == {mx.bfloat16}


def test_a_packed_file_cannot_be_packed_again(packed: tuple[Path, dict[str, np.ndarray]]) -> None:
    with pytest.raises(WeightError, match=r"packed\.gguf is quantized already, to 4 bits"):
        load_model(packed[0], quantize=4)


def test_floats_are_packed_as_a_folders_are(golden: Path, tmp_path: Path, ref: None, make_batch) -> None:
    folder = golden / "qwen2_tied"
    path = write_gguf(folder, tmp_path / "x.gguf", "F32")
    ours, theirs = (
        load_model(source, quantize=4)(make_batch(PROMPT), NoCache()) for source in (path, folder)
    )
    assert mx.array_equal(ours, theirs)


def changed(path: Path, *pairs: tuple[bytes, bytes]) -> Path:
    """A copy with texts of the header replaced by others as long."""
    data = path.read_bytes()
    for old, new in pairs:
        assert len(old) == len(new) and old in data
        data = data.replace(old, new)
    path = path.with_name("changed.gguf")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (b"qwen2", b"qwen9", "general.architecture is 'qwen9', expected one of "),
        (b"qwen2.block_count", b"qwen2.block_counX", "qwen2.block_count is missing"),
        (b"qwen2.rope.dimension_count", b"qwen2.rope.dimension_counX", ""),
        (
            b"blk.0.ffn_up.weight",
            b"blk.0.ffn_xp.weight",
            "missing: blk.0.ffn_up.weight [64, 64]. Did you mean",
        ),
    ],
)
def test_a_file_that_does_not_fit(golden: Path, tmp_path: Path, old: bytes, new: bytes, what: str) -> None:
    path = changed(write_gguf(golden / "qwen2_tied", tmp_path / "x.gguf"), (old, new))
    if not what:
        load_model(path)
        return
    with pytest.raises((ConfigError, WeightError)) as error:
        load_model(path)
    assert what in str(error.value) and "changed.gguf" in str(error.value)


def test_one_of_several_files_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"x\.gguf: The model is split over several files"):
        load_config(tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0"])
def test_the_bundled_model(demo: Path, tmp_path: Path, llm: LLM, kind: str) -> None:
    """Its text, tokens and end are in the file; as BF16, which it is stored in, the tokens are its own."""
    path = write_gguf(demo, tmp_path / "demo.gguf", kind)
    with LLM(path) as ours:
        assert ours.tokenizer.has_tokens_of(llm.tokenizer)
        assert ours.end_ids >= llm.end_ids and ours.config.eos_token_ids == llm.config.eos_token_ids
        params = SamplingParams(max_tokens=40)
        for question in ("What is a KV cache?", "What is 48 + 35?", "Tell me a story."):
            answer, expected = ours.chat(question, params), llm.chat(question, params)
            same = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(answer.token_ids, expected.token_ids, strict=False))
                    if a != b
                ),
                99,
            )
            assert same > (99 if kind == "BF16" else 5) - 1, (
                f"{question}: {answer.text!r}, not {expected.text!r}"
            )


def test_the_command_line_takes_a_file(demo: Path, tmp_path: Path) -> None:
    path = write_gguf(demo, tmp_path / "demo.gguf", "Q8_0")
    for command, said in (
        (["generate", "--prompt", "What is 48 + 35?"], "83"),
        (["memory"], "8 bits"),
        (["doctor"], "unusual   nothing"),
    ):
        done = subprocess.run(
            [sys.executable, "main.py", *command, "--model", str(path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


def test_a_large_matrix_is_unpacked_a_part_at_a_time(tmp_path: Path, ref: None) -> None:
    """16 MB of blocks, 18 MB as ours: what is made on the way, ten times as large, never is there at once."""
    columns, rows = 4096, 7168
    number = gguf.GGMLQuantizationType.Q4_0
    raw = np.zeros((rows, columns // 32 * 18), np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor("a.weight", raw, raw_shape=raw.shape, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = read_gguf(tmp_path / "x.gguf").tensors
    mx.reset_peak_memory()
    before, seen = mx.get_active_memory(), []
    how = {
        "dtype": None,
        "quantization": None,
        "quantize": None,
        "quantizable": ["a.weight"],
        "stored": stored,
    }
    loaded = load_weights(
        tmp_path, {"a.weight": (rows, columns)}, progress=lambda *at: seen.append(at), **how
    )
    matrix = loaded["a.weight"]
    assert isinstance(matrix, QuantizedTensor)
    result = matrix.packed.nbytes + matrix.scales.nbytes + matrix.biases.nbytes
    peak = mx.get_peak_memory() - before
    assert peak < 2.2 * result + 20e6, f"{peak / 1e6:.0f} MB for a result of {result / 1e6:.0f}"
    assert seen == [(raw.nbytes, raw.nbytes)]


def test_packed_experts_are_read_one_by_one(
    golden: Path, tmp_path: Path, backend: str, make_batch, off
) -> None:
    folder = golden / "qwen2_moe"
    path = write_gguf(folder, tmp_path / "x.gguf", "Q8_0")
    experts = GgufCheckpoint(path).tensors(dtype=None, quantize=None, finish=lambda weight: weight)
    packed = experts["model.layers.1.mlp.switch_mlp.up_proj.weight"]
    assert isinstance(packed, QuantizedTensor) and packed.packed.shape == (5, 20, 8)
    source = FolderCheckpoint(folder).tensors(dtype=mx.float32, quantize=None, finish=lambda weight: weight)
    assert off(wide(packed), source["model.layers.1.mlp.switch_mlp.up_proj.weight"]) < 0.005
    logits = [load_model(one, activations="exact")(make_batch(PROMPT), NoCache()) for one in (path, folder)]
    assert off(*logits) < 0.1
