"""Makes packed_by_libraries.safetensors: what AutoGPTQ and AutoAWQ have packed, and unpacked.

    pip download --no-deps auto-gptq==0.7.1 autoawq==0.2.9
    mkdir lib && unzip auto_gptq-*.whl -d lib && tar xf autoawq-0.2.9.tar.gz -C lib
    build/py311/bin/python vllm-k80-src/tests/data/make_packed_by_libraries.py lib

The libraries' own modules pack random weights, and dequantize what they have packed: NAME.weight
[K, KEPT], FP32, of the first rows. They are loaded file by file, for as packages they want a GPU
and old versions of others. Weights lie on their grid, so packing loses nothing.
"""

import importlib.util
import sys
import types
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor

K, N = 256, 32  # the least rows of which AutoGPTQ unpacks zero points
KEPT = 8  # of the rows of what they unpack, which takes most of the room
OUTPUT = Path(__file__).parent / "packed_by_libraries.safetensors"


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def grid(bits: int, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight [K, N], scale [groups, N], zero point [groups, N]), all FP32; scales fit FP16."""
    count, most = int(groups.max()) + 1, 2**bits - 1
    scale = (torch.rand(count, N) * 0.02 + 0.01).half().float()
    zero = torch.randint(1, most + 1, (count, N)).float()
    q = torch.randint(0, most + 1, (K, N)).float()
    return (q - zero[groups]) * scale[groups], scale, zero


def linear(weight: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(K, N, bias=False)
    layer.weight.data = weight.t().contiguous()
    return layer


def of_autogptq(library: Path) -> dict[str, Tensor]:
    layers = module(library / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    found = {}
    for bits in (4, 8):
        for group in (32, 128, -1):
            for act_order in (False, True):
                g_idx = torch.arange(K) // (K if group == -1 else group)
                if act_order:
                    g_idx = g_idx[torch.randperm(K)]
                weight, scale, zero = grid(bits, g_idx)
                layer = layers.QuantLinear(bits, group, K, N, False, weight_dtype=torch.float32)
                layer.pack(
                    linear(weight), scale.t().contiguous(), zero.t().contiguous(), g_idx.int()
                )
                parts = {
                    part: getattr(layer, part) for part in ("qweight", "qzeros", "scales", "g_idx")
                }
                with torch.no_grad():
                    parts["weight"] = layer(torch.eye(K))[:, :KEPT]
                name = f"gptq-{bits}-{group}{'-act_order' if act_order else ''}"
                found |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return found


def of_autoawq(library: Path) -> dict[str, Tensor]:
    root = library / "autoawq-0.2.9"
    for name in ("awq", "awq.utils", "awq.modules"):
        package = types.ModuleType(name)
        package.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules[name] = package
    # What these want is of GPUs.
    for name, attribute, value in (
        ("awq.utils.module", "try_import", lambda _: (None, "")),
        ("awq.utils.utils", "get_best_device", lambda: "cpu"),
    ):
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], attribute, value)
    layers = module(root / "awq/modules/linear/gemm.py")
    utilities = module(root / "awq/utils/packing_utils.py")
    found = {}
    for group in (32, 64, 128):
        weight, scale, zero = grid(4, torch.arange(K) // group)
        layer = layers.WQLinear_GEMM.from_linear(
            linear(weight), 4, group, scales=scale, zeros=zero.int()
        )
        parts = {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales")}
        parts["weight"] = utilities.dequantize_gemm(
            layer.qweight, layer.qzeros, layer.scales.float(), 4, group
        )[:, :KEPT]
        found |= {f"awq-4-{group}.{part}": tensor for part, tensor in parts.items()}
    return found


if __name__ == "__main__":
    torch.manual_seed(37)
    tensors = of_autogptq(Path(sys.argv[1])) | of_autoawq(Path(sys.argv[1]))
    versions = {"auto-gptq": "0.7.1", "autoawq": "0.2.9"}
    save_file({k: t.contiguous() for k, t in tensors.items()}, OUTPUT, metadata=versions)
