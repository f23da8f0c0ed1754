"""GGUF tensors in our layout, against the gguf library's own dequantization."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from vllm_k80.errors import UserError
from vllm_k80.quantization.gguf import pack
from vllm_k80.quantization.gguf_file import extract_metadata
from vllm_k80.quantization.packed import concatenate


def quantized(kind: Kind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    values = np.random.RandomState(seed).standard_normal((rows, columns)).astype(np.float32)
    return gguf.quantize(values, kind)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.F32])
def test_packed_weights_equal_gguf_dequantization(kind: Kind) -> None:
    raw = quantized(kind, 24, 96)
    weight = torch.from_numpy(gguf.dequantize(raw, kind))
    packed = pack(torch.from_numpy(raw), kind)
    # Every element alone: multiply by the identity, and look the rows up.
    torch.testing.assert_close(packed.linear(torch.eye(96)).t(), weight, atol=0, rtol=0)
    torch.testing.assert_close(
        packed.embedding(torch.arange(24), torch.float32), weight, atol=0, rtol=0
    )


def test_int4_stays_int4_in_memory() -> None:
    raw = quantized(Kind.Q4_1, 64, 1024)
    packed = pack(torch.from_numpy(raw), Kind.Q4_1)
    assert sum(part.numel() * part.element_size() for part in packed.parts()) == raw.nbytes


def test_neighbours_of_one_type_are_joined_and_others_are_not() -> None:
    kinds = [Kind.Q4_1, Kind.Q4_1, Kind.Q8_0]
    raws = [
        quantized(kind, rows, 64, seed)
        for seed, (kind, rows) in enumerate(zip(kinds, (8, 4, 4), strict=True))
    ]
    joined = concatenate([pack(torch.from_numpy(r), k) for r, k in zip(raws, kinds, strict=True)])
    assert [weight.qweight.shape[0] for weight in joined] == [12, 4]
    whole = np.concatenate([gguf.dequantize(r, k) for r, k in zip(raws, kinds, strict=True)])
    result = torch.cat([weight.linear(torch.eye(64)) for weight in joined], dim=-1)
    torch.testing.assert_close(result.t(), torch.from_numpy(whole), atol=0, rtol=0)


def test_other_types_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"type Q6_K are not supported; Q4_0, Q4_1, Q8_0"):
        pack(torch.zeros(1, 210, dtype=torch.uint8), Kind.Q6_K)


def write_gguf(path: Path, kind: Kind) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    raw = quantized(kind, 4, 64)
    writer.add_tensor("token_embd.weight", raw, raw_shape=raw.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_with_types_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, Kind.Q5_0)
    with pytest.raises(UserError, match=r"model\.gguf: tensors of type Q5_0 cannot be served"):
        extract_metadata(path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half done is left


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


def test_metadata_is_extracted_once_and_completely(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    directory = extract_metadata(smollm2, tmp_path)
    assert extract_metadata(smollm2, tmp_path) == directory
    assert [entry.name for entry in tmp_path.iterdir()] == [directory.name]
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
