"""GGUF tensors in our layout, against the gguf library's own dequantization."""

import errno
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from ggml_blocks import quantized
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vllm_k80 import model
from vllm_k80.errors import UserError
from vllm_k80.quantization.gguf import pack
from vllm_k80.quantization.gguf_file import SUPPORTED_TYPES, extract_metadata, rope_scaling
from vllm_k80.quantization.packed import PackedWeight, concatenate

K_QUANTS = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
# Values of Student's t distribution (5 degrees of freedom, times 0.02), 4 rows of 512, by
# quantize_q4_K, quantize_q5_K and quantize_q6_K of llama.cpp (data/make_k_quants.py).
BY_GGML = Path(__file__).parent / "data" / "k_quants.gguf"


def packed(raw: np.ndarray, kind: Kind) -> PackedWeight:
    return pack("layer", torch.from_numpy(np.array(raw)), kind)


def weight_of(packed: PackedWeight, columns: int) -> torch.Tensor:
    """Every element alone: the product with the identity; looked up it is the same."""
    weight = packed.linear(torch.eye(columns)).t()
    rows = packed.embedding(torch.arange(len(weight)), torch.float32)
    torch.testing.assert_close(rows, weight, atol=0, rtol=0)
    return weight


@pytest.mark.parametrize(
    "kind",
    [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.F32],
)
def test_packed_weights_equal_gguf_dequantization(kind: Kind) -> None:
    raw = quantized(kind, 24, 96)
    expected = torch.from_numpy(gguf.dequantize(raw, kind))
    weight = weight_of(packed(raw, kind), 96)
    torch.testing.assert_close(weight, expected, atol=0, rtol=0)


def assert_equal_but_for_rounded_scales(ours: PackedWeight, expected: np.ndarray) -> None:
    """Each weight is off by what rounding its scale and its minimum to FP16 can do, at most."""
    weight = weight_of(ours, expected.shape[1])
    minimum = torch.zeros_like(ours.scale) if ours.minimum is None else ours.minimum
    group = expected.shape[1] // ours.scale.shape[1]
    minimum = minimum.float().repeat_interleave(group, 1)
    allowed = 2.0**-11 * ((weight - minimum).abs() + minimum.abs())
    assert ours.scale.dtype == torch.float16
    assert bool(((weight - torch.from_numpy(expected)).abs() <= allowed).all())


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_of_ggml_are_equal_but_for_rounded_scales(kind: Kind) -> None:
    [tensor] = [t for t in gguf.GGUFReader(BY_GGML).tensors if t.name == kind.name]
    expected = gguf.dequantize(tensor.data, kind)
    assert abs(expected.std() - 0.026) < 0.002  # it is the tensor that it should be
    ours = packed(tensor.data, kind)
    assert_equal_but_for_rounded_scales(ours, expected)
    # A hundredth of the distance from one value to the next, and that as the root mean square.
    step = ours.scale.float().square().mean().sqrt()
    error = weight_of(ours, 512) - torch.from_numpy(expected)
    assert error.square().mean().sqrt() < 0.01 * step


@pytest.mark.parametrize("spread", [1, 1e-3, 1e-5])  # the last: FP16's smallest numbers
@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_of_any_bits_are_equal_but_for_rounded_scales(kind: Kind, spread: float) -> None:
    raw = quantized(kind, 24, 768, spread=spread)
    assert_equal_but_for_rounded_scales(packed(raw, kind), gguf.dequantize(raw, kind))


@pytest.mark.parametrize(("kind", "spread"), [(Kind.Q4_K, 4e5), (Kind.Q5_K, 8e5), (Kind.Q6_K, 2e6)])
def test_scales_that_fp16_cannot_hold_stay_fp32(kind: Kind, spread: float) -> None:
    raw = quantized(kind, 24, 768, spread=spread)
    ours = packed(raw, kind)
    assert ours.scale.dtype == torch.float32
    expected = torch.from_numpy(gguf.dequantize(raw, kind))
    torch.testing.assert_close(weight_of(ours, 768), expected, atol=0, rtol=1e-6)


def test_a_tensor_is_repacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = quantized(Kind.Q5_K, 24, 768)
    whole = packed(raw, Kind.Q5_K)
    monkeypatch.setattr("vllm_k80.quantization.gguf._BYTES_AT_ONCE", 5 * raw.shape[1])
    parts = packed(raw, Kind.Q5_K)
    assert all(torch.equal(a, b) for a, b in zip(whole.parts(), parts.parts(), strict=True))


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (Kind.Q4_0, 5),
        (Kind.Q4_1, 5),
        (Kind.Q4_K, 5),
        (Kind.Q5_0, 8.5),
        (Kind.Q5_1, 9),
        (Kind.Q5_K, 9),
        (Kind.Q6_K, 9),
        (Kind.Q8_0, 8.5),
    ],
)
def test_bits_of_a_weight_in_memory(kind: Kind, bits: float) -> None:
    parts = packed(quantized(kind, 64, 1024), kind).parts()
    assert sum(part.numel() * part.element_size() for part in parts) == 64 * 1024 * bits / 8
    assert all(part.is_contiguous() for part in parts)


def test_types_are_predicted_as_what_they_are_packed_into() -> None:
    assert set(model._GGUF) == {*SUPPORTED_TYPES}
    for name, (kernel, group) in model._GGUF.items():
        ours = packed(quantized(Kind[name], 64, 1024), Kind[name])
        size = sum(part.numel() * part.element_size() for part in ours.parts())
        assert model.Weight(64, 1024, kernel, group).bytes == size
        assert group == (0 if ours.scale is None else 1024 // ours.scale.shape[1])
        second_product = ours.qweight.dtype == torch.int8 and ours.minimum is not None
        assert (kernel == "w8m_f16") == second_product


def test_neighbours_of_one_type_are_joined_and_others_are_not() -> None:
    kinds = [Kind.Q4_K, Kind.Q4_1, Kind.Q6_K, Kind.Q5_K, Kind.Q8_0]
    raws = [quantized(kind, 4 * (1 + seed), 512, seed) for seed, kind in enumerate(kinds)]
    weights = [packed(raw, kind) for raw, kind in zip(raws, kinds, strict=True)]
    joined = concatenate(weights)
    # The first two are the same layout; INT8 with a minimum, or with another group, is not.
    assert [weight.qweight.shape[0] for weight in joined] == [12, 12, 16, 20]
    x = torch.randn(3, 512)
    apart = torch.cat([weight.linear(x) for weight in weights], dim=-1)
    result = torch.cat([weight.linear(x) for weight in joined], dim=-1)
    torch.testing.assert_close(result, apart, atol=0, rtol=0)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.IQ4_XS, Kind.TQ1_0, Kind.MXFP4])
def test_other_types_are_refused_by_name(kind: Kind) -> None:
    message = rf"^blk\.0: .* type {kind.name} cannot be served; those of Q4_0, .*Use .*Q4_K_M, "
    with pytest.raises(ValueError, match=message):
        pack("blk.0", torch.zeros(1, 17, dtype=torch.uint8), kind)


def test_a_part_that_ends_within_a_block_is_refused() -> None:
    """Of 11008 columns, those of Llama's 7B, two dies get 21 1/2 blocks each."""
    raw = torch.zeros(1, 11008 // 256 * 144 // 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^down: rows of Q4_K are blocks of 256 .* fewer dies"):
        pack("down", raw, Kind.Q4_K)


def write_gguf(path: Path, kind: Kind) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    raw = np.zeros((4, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    writer.add_tensor("token_embd.weight", raw, raw_shape=raw.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_with_types_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, Kind.IQ2_XS)
    message = r"model\.gguf: tensors of type IQ2_XS cannot be served; those of Q4_0, .*Use .*Q4_K_M"
    with pytest.raises(UserError, match=message):
        extract_metadata(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()  # nothing half done is left


@pytest.mark.parametrize(("factor", "size"), [(8.0, 128), (32.0, 64)])
def test_the_rope_scaling_of_a_llama_3_1_is_found_again(factor: float, size: int) -> None:
    """From the divisors that transformers itself makes of it, as the file has them."""
    scaling = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 8192}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    shape = {"head_dim": size, "rope_theta": 500000.0, "max_position_embeddings": 131072}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**shape, rope_scaling=scaling), "cpu")
    plain, _ = ROPE_INIT_FUNCTIONS["default"](LlamaConfig(**shape), "cpu")
    divisors = (plain / scaled).numpy()

    def read(name: str, values: np.ndarray) -> Any:
        return rope_scaling(Path("model.gguf"), {name: values}, 500000.0, size)

    assert len({*divisors.tolist()}) > 3
    assert read("rope_freqs.weight", divisors) == scaling
    assert read("rope_freqs.weight", np.ones(size // 2, np.float32)) is None
    other = divisors.copy()
    other[size // 4] *= 1.1
    for name, values in (("rope_freqs.weight", other), ("rope_factors_long.weight", divisors)):
        with pytest.raises(UserError, match=r"^model\.gguf: its rotary embedding .* safetensors"):
            read(name, values)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"PK\x03\x04zip", "is not a GGUF file"), (b"GGUF\x63", "damaged")],
)
def test_wrong_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        extract_metadata(path, tmp_path / "cache")


@pytest.fixture(scope="module")
def metadata(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract_metadata(smollm2, tmp_path_factory.mktemp("metadata"))


def test_metadata_is_extracted_once_and_completely(smollm2: Path, metadata: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    directory = metadata
    assert extract_metadata(smollm2, directory.parent) == directory
    assert [entry.name for entry in directory.parent.iterdir()] == [directory.name]
    config = AutoConfig.from_pretrained(directory)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.torch_dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "Two lines,\n  12 numbers and what's more."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat
    # The weights are not copied along.
    assert sum(file.stat().st_size for file in directory.iterdir()) < 10_000_000


def test_metadata_that_a_crash_has_cut_off_is_extracted_again(
    smollm2: Path, metadata: Path, tmp_path: Path
) -> None:
    directory = tmp_path / metadata.name
    shutil.copytree(metadata, directory)
    whole = (directory / "tokenizer.json").read_bytes()
    (directory / "tokenizer.json").write_bytes(whole[:1000])
    assert extract_metadata(smollm2, tmp_path) == directory
    assert (directory / "tokenizer.json").read_bytes() == whole


def test_metadata_is_used_where_it_cannot_be_kept(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("vllm.k80.gguf"),
        "warning",
        lambda text, *values: said.append(text % values),
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = tmp_path / "cache"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        directory = extract_metadata(smollm2, cache)
    assert (directory / "config.json").is_file()
    assert directory.parent == tmp_path
    assert list(cache.iterdir()) == []
    assert said == [
        f"What {smollm2.name} says of its model cannot be kept in {cache}, and is extracted at "
        f"each start: No space left on device."
    ]
