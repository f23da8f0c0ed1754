"""Cached weights are those that loading made, bit by bit; and a cache that fails costs no start.

Models are loaded by vLLM's loaders in this process, without an engine around them.
"""

import contextlib
import fcntl
import json
import logging
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from test_formats_engine import FORMATS, ON_THE_FLY, _quantized, _unquantized
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

from vllm_k80.quantization import cache, content
from vllm_k80.quantization.gguf import K80GGUFModelLoader
from vllm_k80.quantization.linear import attach
from vllm_k80.quantization.loader import K80ModelLoader
from vllm_k80.quantization.packed import PackedWeight

GGUF = "gguf"


def write_gguf(folder: Path) -> Path:
    """The tiny Llama as a GGUF file: Q4_1, Q8_0 and FP32 tensors, a head tied to the embeddings."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
    }
    config, tensors, _ = _unquantized("k80-w4")
    (folder / "config.json").write_text(json.dumps(config))
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bb", ""])
    writer.add_array("lengths", [1, 2, 3])
    writer.add_bool("flag", True)
    for key, tensor in tensors.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        kind = gguf.GGMLQuantizationType.Q4_1
        if tensor.dim() == 1:
            kind = gguf.GGMLQuantizationType.F32
        elif "attn_v" in key:  # so that q, k and v are not of one layout
            kind = gguf.GGMLQuantizationType.Q8_0
        raw = gguf.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(key, raw, raw_shape=raw.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def write(name: str, folder: Path) -> dict[str, Any]:
    """Make a checkpoint; returns what vLLM is told of it."""
    torch.manual_seed(37)
    folder.mkdir()
    if name == GGUF:
        return {"model": str(write_gguf(folder)), "hf_config_path": str(folder)}
    config, tensors, _ = (_quantized if name in FORMATS else _unquantized)(name)
    (folder / "config.json").write_text(json.dumps(config))
    whole = {key: part.contiguous() for key, part in tensors.items()}
    save_file(whole, folder / "model.safetensors")
    return {"model": str(folder)} | ({"quantization": name} if name in ON_THE_FLY else {})


def one_layer() -> torch.nn.Module:
    model = torch.nn.Module()
    model.layer = torch.nn.Module()
    attach(model.layer, [PackedWeight(torch.ones(100, 1000))])
    return model


def load(options: dict[str, Any]) -> torch.nn.Module:
    arguments = EngineArgs(max_model_len=64, skip_tokenizer_init=True, **options)
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def state(model: torch.nn.Module) -> dict[str, Any]:
    """Every tensor's layout and bytes, which share memory, and how weights consist of them."""
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    for group in (model.named_parameters, model.named_buffers):
        for name, tensor in group(remove_duplicate=False):
            raw = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
            same = first.setdefault(tensor.data_ptr(), name)
            found[name] = (tensor.dtype, tensor.shape, tensor.stride(), same, raw)
    for name, module in model.named_modules(remove_duplicate=False):
        for index, weight in enumerate(getattr(module, "packed_weights", [])):
            for part, tensor in weight.named_parts().items():
                buffer = module.get_buffer(f"{part}_{index}")
                assert buffer.data_ptr() == tensor.data_ptr()
                found[f"{name} {index} {part}"] = None
    return found


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    method = f"file://{tmp_path_factory.mktemp('rendezvous') / 'file'}"
    init_distributed_environment(1, 0, method, 0, "gloo")
    ensure_model_parallel_initialized(1, 1)
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where entries get; the test's files count as long unchanged."""
    monkeypatch.setenv("VLLM_K80_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "_SETTLED_S", -1.0)
    return tmp_path / "cache" / "weights"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the cache logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(cache.logger, "handlers", [handler])
    monkeypatch.setattr(cache.logger, "propagate", False)
    cache.logger.setLevel(logging.INFO)
    return lines


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Within, no checkpoint can be read."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the checkpoint was read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(K80ModelLoader, "get_all_weights", refuse)
        patch.setattr(K80GGUFModelLoader, "_get_weights_iterator", refuse)
        patch.setattr(gguf.GGUFReader, "__init__", refuse)
        yield


def entry(root: Path) -> Path:
    [path] = root.glob("*.safetensors")
    return path


@pytest.mark.parametrize("name", [*FORMATS, *ON_THE_FLY, GGUF])
def test_the_second_start_has_the_state_of_the_first(
    name: str, root: Path, tmp_path: Path, said: list[str]
) -> None:
    options = write(name, tmp_path / "model")
    first = load(options)
    with unread():
        second = load(options)
    assert state(second) == state(first)
    assert any("qweight_0" in key for key in state(first))
    cached, taken = said
    assert cached.startswith(f"Weights cached to {entry(root)} (")
    assert taken.startswith(f"Weights from the cache {entry(root)} (")
    assert not [*root.glob("*.part")]


def test_what_is_not_repacked_is_not_cached(root: Path, tmp_path: Path) -> None:
    options = write("k80-f16", tmp_path / "model")
    del options["quantization"]
    load(options)
    assert not [*root.glob("*.safetensors")]


@pytest.fixture
def cached(root: Path, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint with an entry: what vLLM is told of it, and the state that loading made."""
    options = write("awq", tmp_path / "model")
    return options, state(load(options))


def flip(path: Path, place: int) -> None:
    with path.open("rb+") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        (old,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old ^ 1]))


@pytest.mark.parametrize("damage", ["a bit", "its description", "its end", "all of it", "no text"])
def test_a_damaged_entry_is_replaced(damage: str, root: Path, cached: Any, said: list[str]) -> None:
    options, first = cached
    path = entry(root)
    if damage == "a bit":
        flip(path, -1000)
    elif damage == "its description":
        flip(path, path.read_bytes().index(b"model.layers.0"))
    elif damage == "no text":
        flip(path, 8)
    else:
        os.truncate(path, path.stat().st_size - 1 if damage == "its end" else 0)
    assert state(load(options)) == first
    assert said[0].startswith(f"{path} is damaged (")
    assert said[0].endswith("): the weights are read from the checkpoint.")
    assert said[1].startswith(f"Weights cached to {path}")
    with unread():
        assert state(load(options)) == first


@pytest.mark.parametrize("moment", ["within", "behind"])
def test_a_killed_writer_leaves_nothing_that_is_taken(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    options = write("awq", tmp_path / "model")
    child = os.fork()
    if child == 0:
        checksum, tensors = cache._checksum, iter(range(5))

        def killed(*of: Any) -> str:
            if next(tensors, None) is None:
                os._exit(9)
            return checksum(*of)

        if moment == "within":  # its tensors
            monkeypatch.setattr(cache, "_checksum", killed)
        else:
            monkeypatch.setattr(os, "rename", lambda *_: os._exit(9))
        load(options)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    [part] = root.glob("*.part")
    assert moment == "within" or part.stat().st_size > 0
    assert not [*root.glob("*.safetensors")]
    other = write("w4a16", tmp_path / "other")
    load(other)  # another model's start clears it away
    assert not part.exists()
    first = state(load(options))
    with unread():
        assert state(load(options)) == first


def test_two_instances_do_not_write_at_once(root: Path, cached: Any, said: list[str]) -> None:
    options, first = cached
    path = entry(root)
    path.unlink()
    part = path.with_suffix(".part")
    with part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert state(load(options)) == first
        assert said == [f"Another instance is writing {path}."]
        assert part.exists()
        assert not path.exists()


def test_changed_content_of_the_same_size_name_and_time_is_another_model(
    root: Path, tmp_path: Path, cached: Any
) -> None:
    options, first = cached
    checkpoint = tmp_path / "model" / "model.safetensors"
    before = checkpoint.stat()
    with checkpoint.open("rb") as file:
        head = int.from_bytes(file.read(8), "little")
        tensors = json.loads(file.read(head))
    start, _ = tensors["model.layers.1.mlp.down_proj.qweight"]["data_offsets"]
    flip(checkpoint, 8 + head + start)
    os.utime(checkpoint, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert checkpoint.stat().st_size == before.st_size
    changed = state(load(options))
    assert {name for name in first if first[name] != changed[name]} == {
        "model.layers.1.mlp.down_proj.qweight_0"
    }
    flip(checkpoint, 8 + head + start)
    with unread():  # the content counts, not the time
        assert state(load(options)) == first


def test_what_other_code_has_packed_is_not_taken(
    root: Path, cached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, first = cached
    monkeypatch.setattr(cache, "_code", lambda: "other")
    with pytest.raises(AssertionError, match="was read"), unread():
        load(options)
    assert state(load(options)) == first
    assert len([*root.glob("*.safetensors")]) == 2


def test_each_rank_has_its_own_entry(
    root: Path, cached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, _ = cached
    monkeypatch.setattr(cache, "get_tensor_model_parallel_rank", lambda: 1)
    load(options)
    assert len([*root.glob("*.safetensors")]) == 2


@pytest.mark.parametrize("trouble", ["no directory", "a full disk", "a write that fails", "0 GB"])
def test_a_cache_that_fails_costs_no_start(
    trouble: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    options = write("awq", tmp_path / "model")
    expected = f"The weights are not cached in {root}: "
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trouble == "no directory":
        (tmp_path / "cache").write_text("in the way")
        expected = f"{root}: Not a directory: weights are not cached."
    elif trouble == "a full disk":
        monkeypatch.setattr(cache, "_SPARE", 1 << 60)
        expected += "they take 0.0 GB, and of "
    elif trouble == "0 GB":
        monkeypatch.setenv("VLLM_K80_CACHE_GB", "0")
        expected = ""
    else:
        expected += "File too large."
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        model = load(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.delenv("VLLM_K80_CACHE")
    assert state(model) == state(load(options))
    assert [line.startswith(expected) for line in said] == [True] * bool(expected)
    assert not [path for path in root.glob("*") if path.name != "digests.json"]


def test_entries_that_are_longest_out_of_use_make_room(
    root: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    root.mkdir(parents=True)
    model = one_layer()
    saved = [cache.Entry(root / f"{n}.safetensors", torch.device("cpu"), {}) for n in range(4)]
    size = 0
    for age, one in zip((3, 9, 6), saved, strict=False):
        one.save(model)
        size = one.path.stat().st_size
        os.utime(one.path, (time.time() - age, time.time() - age))
    assert saved[1].restore(one_layer())  # used now
    monkeypatch.setenv("VLLM_K80_CACHE_GB", str(2.5 * size / 1e9))
    saved[3].save(model)
    assert {path.stem for path in root.glob("*")} == {"1", "3"}
    monkeypatch.setenv("VLLM_K80_CACHE_GB", str(0.5 * size / 1e9))
    saved[0].save(model)
    assert said[-1].endswith("they take 0.0 GB, and VLLM_K80_CACHE_GB is less.")
    assert {path.stem for path in root.glob("*")} == {"1", "3"}


def test_a_bound_that_is_no_number_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setenv("VLLM_K80_CACHE_GB", "much")
    assert cache.directory() is None
    assert said == ["VLLM_K80_CACHE_GB=much is no number: weights are not cached."]


def test_what_loading_makes_besides_packed_weights_is_not_lost() -> None:
    model = one_layer()
    model.register_buffer("late", torch.ones(1))
    with pytest.raises(cache._Unusable, match="loading has made late"):
        cache._State.of(model, {})
    assert cache._State.of(model, {"late": ["torch.float32", 1]}).tensors.keys() == {
        "layer.qweight_0",
        "late",
    }


def test_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, memory = tmp_path / "file", tmp_path / "memory.json"
    monkeypatch.setattr(content, "_PIECE", 10)
    file.write_bytes(bytes(25))
    young = content.digests([file], memory)
    assert not memory.exists()  # it may change again without a change of its times
    monkeypatch.setattr(content, "_SETTLED_S", -1.0)
    first = content.digests([file], memory)
    assert first == young
    with monkeypatch.context() as patch:
        patch.setattr(content, "_digest", None)
        assert content.digests([file], memory) == first
    seen = file.stat()
    time.sleep(0.02)  # a tick of the kernel's clock
    for place in (0, 12, 24):
        flip(file, place)
        os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
        assert content.digests([file], memory) != first
        flip(file, place)
    assert content.digests([file], memory) == first
    memory.write_text("[")
    assert content.digests([file], memory) == first
