"""How long loading weights takes without the cache, at the first start with it, and at the second.

    python benchmarks/cached_start.py FOLDER [FORMAT…]

Makes random checkpoints in FOLDER, one after the other (up to 3 GB, removed afterwards), and prints
a line of JSON for each: seconds of the clock and of the processor that vLLM's loader takes, imports
aside, by how much the process grew meanwhile at most, pages of mapped files aside, and how much of
that is the model. The first start digests the checkpoint and writes the cache. All files are in the
page cache.
"""

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 16, 32, 4, 32000
GROUP = 128
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
}
KV = HIDDEN // HEADS * KV_HEADS
# Rows and columns of a layer's weights, by Hugging Face's name and by GGUF's.
LINEAR = {
    ("self_attn.q_proj", "attn_q"): (HIDDEN, HIDDEN),
    ("self_attn.k_proj", "attn_k"): (KV, HIDDEN),
    ("self_attn.v_proj", "attn_v"): (KV, HIDDEN),
    ("self_attn.o_proj", "attn_output"): (HIDDEN, HIDDEN),
    ("mlp.gate_proj", "ffn_gate"): (INTERMEDIATE, HIDDEN),
    ("mlp.up_proj", "ffn_up"): (INTERMEDIATE, HIDDEN),
    ("mlp.down_proj", "ffn_down"): (HIDDEN, INTERMEDIATE),
}
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True},
    "w4a16": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "type": "int",
                    "num_bits": 4,
                    "strategy": "group",
                    "group_size": GROUP,
                    "symmetric": True,
                },
            }
        },
    },
}
QUANTIZATIONS["gptq"]["desc_act"] = False
QUANTIZATIONS["awq"]["version"] = "gemm"
FORMATS = [*QUANTIZATIONS, "Q4_0", "Q8_0", "k80-w4", "k80-w8", "k80-f16"]


def _linear(kind: str, rows: int, columns: int) -> dict[str, Any]:
    """Random tensors that stand for a weight [rows, columns] in a checkpoint."""
    import torch

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)

    groups = columns // GROUP
    scale = torch.rand(groups, rows).half() / 100
    if kind == "gptq":
        return {
            "qweight": words(columns // 8, rows),
            "qzeros": words(groups, rows // 8),
            "scales": scale,
            "g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
        }
    if kind == "awq":
        zeros = words(groups, rows // 8)
        return {"qweight": words(columns, rows // 8), "qzeros": zeros, "scales": scale}
    if kind == "w4a16":
        return {
            "weight_packed": words(rows, columns // 8),
            "weight_scale": scale.t().contiguous(),
            "weight_shape": torch.tensor([rows, columns]),
        }
    return {"weight": torch.randn(rows, columns).half()}


def _write_safetensors(folder: Path, kind: str) -> None:
    import torch
    from safetensors.torch import save_file

    config = CONFIG | {"tie_word_embeddings": False}
    if kind in QUANTIZATIONS:
        config["quantization_config"] = QUANTIZATIONS[kind]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name: torch.randn(VOCABULARY, HIDDEN).half()
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    ones = torch.ones(HIDDEN).half()
    tensors["model.norm.weight"] = ones
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = ones.clone()
        for (name, _), (rows, columns) in LINEAR.items():
            for part, tensor in _linear(kind, rows, columns).items():
                tensors[f"{prefix}{name}.{part}"] = tensor
    save_file(tensors, folder / "model.safetensors")


def _write_gguf(folder: Path, kind: str) -> None:
    import gguf
    import numpy as np

    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": False}))
    quantized = gguf.GGMLQuantizationType[kind]
    some = {
        columns: gguf.quantize(np.random.randn(64, columns).astype(np.float32), quantized)
        for columns in (HIDDEN, INTERMEDIATE)
    }
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    # As many words as a vocabulary of this size has.
    writer.add_array("tokenizer.ggml.tokens", [f"token{n}" for n in range(VOCABULARY)])

    def add(name: str, rows: int, columns: int) -> None:
        raw = np.tile(some[columns], (rows // 64, 1))
        writer.add_tensor(f"{name}.weight", raw, raw_shape=raw.shape, raw_dtype=quantized)

    ones = np.ones(HIDDEN, np.float32)
    for name in ("token_embd", "output"):
        add(name, VOCABULARY, HIDDEN)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", ones)
        for (_, name), (rows, columns) in LINEAR.items():
            add(f"blk.{layer}.{name}", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _anonymous() -> float:
    """MB of this process that are not pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


@contextlib.contextmanager
def _watched() -> Iterator[list[float]]:
    """Keeps in its one element the most that `_anonymous` was meanwhile."""
    most, ended = [_anonymous()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            most[0] = max(most[0], _anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    yield most
    ended.set()
    thread.join()


def load(kind: str, folder: Path) -> dict[str, dict[str, float]]:
    """The three starts of a checkpoint."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    options: dict[str, Any] = {"model": str(folder), "dtype": "half"}
    if (folder / "model.gguf").exists():
        options |= {"model": str(folder / "model.gguf"), "hf_config_path": str(folder)}
    if kind.startswith("k80-"):
        options["quantization"] = kind
    init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
    ensure_model_parallel_initialized(1, 1)
    os.environ["VLLM_K80_CACHE"] = str(folder / "cache")
    found: dict[str, dict[str, float]] = {}
    for start, gb in (("without", "0"), ("first", "20"), ("second", "20")):
        os.environ["VLLM_K80_CACHE_GB"] = gb
        config = EngineArgs(skip_tokenizer_init=True, **options).create_engine_config()
        gc.collect()
        before, wall, processor = _anonymous(), time.perf_counter(), time.process_time()
        with _watched() as most, set_current_vllm_config(config):
            model = get_model(vllm_config=config)
            seconds = time.perf_counter() - wall, time.process_time() - processor
        tensors = [*model.parameters(), *model.buffers()]
        size = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
        found[start] = {
            "s": round(seconds[0], 2),
            "cpu_s": round(seconds[1], 2),
            "peak_mb": round(most[0] - before),
            "model_mb": round(size / 2**20),
        }
        del model, config, tensors
    return found


def measure(kind: str, root: Path) -> dict[str, Any]:
    """The same of a checkpoint made for it, in a process of its own; and GB of what is cached."""
    folder = Path(tempfile.mkdtemp(dir=root))
    try:
        (_write_gguf if kind.startswith("Q") else _write_safetensors)(folder, kind)
        time.sleep(4)  # the digest of a younger file is not remembered
        done = subprocess.run(
            [sys.executable, __file__, "--load", kind, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
        [entry] = (folder / "cache" / "weights").glob("*.safetensors")
        size = {"format": kind, "gb": round(entry.stat().st_size / 1e9, 2)}
        return size | json.loads(line.removeprefix("RESULT "))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1] == "--load":
        print("RESULT " + json.dumps(load(sys.argv[2], Path(sys.argv[3]))))
    else:
        for kind in sys.argv[2:] or FORMATS:
            print(json.dumps(measure(kind, Path(sys.argv[1]))), flush=True)
