"""Checkpoint formats in our layout, against the packing code of vLLM and compressed-tensors."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.quantized_compressors.pack_quantized import (
    PackedQuantizationCompressor,
)
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from vllm.config import LoadConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    awq_pack,
    gptq_pack,
    pack_cols,
    quantize_weights,
)
from vllm.model_executor.model_loader import get_model_loader
from vllm.scalar_type import scalar_types

from vllm_k80 import integration
from vllm_k80.quantization import awq, compressed, gptq, k80
from vllm_k80.quantization.gguf import K80GGUFModelLoader
from vllm_k80.quantization.linear import group_index, parts_of
from vllm_k80.quantization.loader import K80ModelLoader, check_range
from vllm_k80.quantization.packed import PackedWeight

K, N = 256, 48
UNSIGNED = {4: scalar_types.uint4, 8: scalar_types.uint8}
BIASED = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}


def weight_of(packed: PackedWeight) -> Tensor:
    """Every element alone: the layer's product with the identity, [N, K]."""
    columns = packed.qweight.shape[1] * (2 if packed.qweight.dtype == torch.uint8 else 1)
    return packed.linear(torch.eye(columns)).t()


def integers(
    bits: int, group: int, symmetric: bool, columns: int = K, rows: int = N
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight [K, N] FP32, q [K, N], zero [groups, N], FP16 scale [groups, N]), by vLLM's code."""
    torch.manual_seed(bits + group)
    # Off centre, so that zero points differ from the middle.
    values = torch.randn(columns, rows) + (0 if symmetric else 0.7 * torch.randn(rows))
    kind = BIASED[bits] if symmetric else UNSIGNED[bits]
    _, q, scale, zero = quantize_weights(values, kind, group, zero_points=not symmetric)
    if zero is None:
        zero = torch.full_like(scale, 1 << (bits - 1), dtype=torch.int32)
    scale = scale.half()
    size = columns if group == -1 else group
    wide_scale, wide_zero = (part.repeat_interleave(size, 0) for part in (scale.float(), zero))
    return (q - wide_zero) * wide_scale, q, zero, scale


def gptq_parts(bits: int, q: Tensor, zero: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """``qweight``, ``qzeros`` (version 1: less one, modulo) and ``scales`` of a GPTQ checkpoint."""
    stored = (zero - 1) % (1 << bits)
    return gptq_pack(q, bits, *q.shape), pack_cols(stored, bits, *zero.shape), scale


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq(bits: int, group: int, symmetric: bool, act_order: bool) -> None:
    weight, q, zero, scale = integers(bits, group, symmetric)
    g_idx = torch.arange(K, dtype=torch.int32) // (K if group == -1 else group)
    if act_order:
        order = torch.randperm(K)
        weight, q, g_idx = weight[order], q[order], g_idx[order]
    packed = gptq.pack("layer", bits, *gptq_parts(bits, q, zero, scale), g_idx)
    assert (packed.order is not None) == (act_order and group != -1)
    assert packed.scale.dtype == torch.float16
    torch.testing.assert_close(weight_of(packed), weight.t(), atol=0, rtol=0)


with safe_open(Path(__file__).parent / "data/packed_by_libraries.safetensors", "pt") as file:
    PACKED = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize("name", sorted({key.partition(".")[0] for key in PACKED}))
def test_what_autogptq_and_autoawq_have_packed_is_what_they_unpack(name: str) -> None:
    """To the last bit; data/make_packed_by_libraries.py has called their code."""
    parts = [PACKED[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
    method, bits, *_ = name.split("-")
    if method == "gptq":
        packed = gptq.pack("layer", int(bits), *parts, PACKED[f"{name}.g_idx"])
    else:
        packed = awq.pack("layer", *parts)
    theirs = PACKED[f"{name}.weight"]
    torch.testing.assert_close(weight_of(packed)[: theirs.shape[1]], theirs.t(), atol=0, rtol=0)
    assert len(theirs.unique()) > 100


def test_a_zero_point_of_zero_is_stored_as_the_largest() -> None:
    """AutoGPTQ subtracts one modulo 16, so that 15 stands for 0 and not for 16."""
    q = torch.arange(16).repeat(8).unsqueeze(1).repeat(1, 8)
    parts = gptq_parts(4, q, torch.zeros(4, 8, dtype=torch.int32), torch.ones(4, 8).half())
    assert torch.equal(parts[1], torch.full((4, 1), -1, dtype=torch.int32))
    packed = gptq.pack("layer", 4, *parts, torch.arange(128) // 32)
    torch.testing.assert_close(weight_of(packed), q.t().float(), atol=0, rtol=0)


def test_version_2_of_gptq_stores_zero_points_as_they_are() -> None:
    weight, q, zero, scale = integers(4, 128, symmetric=False)
    parts = gptq_pack(q, 4, K, N), pack_cols(zero, 4, len(zero), N), scale
    packed = gptq.pack("layer", 4, *parts, torch.arange(K) // 128, stored_less=0)
    torch.testing.assert_close(weight_of(packed), weight.t(), atol=0, rtol=0)
    config = {"bits": 4, "group_size": 128, "desc_act": False}
    assert gptq.K80GPTQConfig.from_config(config).stored_less == 1
    config["checkpoint_format"] = "gptq_v2"
    assert gptq.K80GPTQConfig.from_config(config).stored_less == 0


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_awq(group: int) -> None:
    weight, q, zero, scale = integers(4, group, symmetric=False)
    parts = awq_pack(q, 4, K, N), awq_pack(zero, 4, len(zero), N), scale
    packed = awq.pack("layer", *parts)
    torch.testing.assert_close(weight_of(packed), weight.t(), atol=0, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group", "act_order"), [(32, False), (128, False), (None, False), (32, True), (128, True)]
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compressed_tensors(
    bits: int, group: int | None, symmetric: bool, dtype: torch.dtype, act_order: bool
) -> None:
    torch.manual_seed(bits)
    values = torch.randn(N, K) + 0.7 * torch.randn(N, 1)
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        group_size=group,
        strategy="channel" if group is None else "group",
        actorder="group" if act_order else None,
    )
    g_idx = torch.arange(K, dtype=torch.int32) // (group or K)
    if act_order:
        g_idx = g_idx[torch.randperm(K)]
    grouped = values[:, g_idx.argsort(stable=True)].unflatten(1, (-1, group or K))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    scale = scale.to(dtype)
    given = g_idx if act_order else None
    options = {"scale": scale.float(), "zero_point": zero, "g_idx": given}
    made = PackedQuantizationCompressor().compress_weight(values, quantization_args=args, **options)
    q = ct_quantize(x=values, args=args, dtype=torch.int8, **options)
    weight = dequantize(x_q=q, args=args, dtype=torch.float32, **options)
    packed = compressed.pack(
        "layer", bits, made["weight_packed"], scale, made.get("weight_zero_point"), given
    )
    assert (packed.order is not None) == act_order
    torch.testing.assert_close(weight_of(packed), weight.float(), atol=0, rtol=0)


def test_a_scale_that_fp16_cannot_hold_stays_exact() -> None:
    _, q, zero, _ = integers(4, 64, symmetric=True)
    scale = torch.full((K // 64, N), 2.0**-30, dtype=torch.bfloat16)
    packed = gptq.pack("layer", 4, *gptq_parts(4, q, zero, scale), torch.arange(K) // 64)
    assert packed.scale.dtype == torch.float32
    assert torch.equal(weight_of(packed), (q - 8).t() * 2.0**-30)


def test_parts_of_a_fused_layer_may_order_their_columns_differently() -> None:
    """q and k share an order and are joined, v has another."""
    orders = [torch.randperm(K)] * 2 + [torch.randperm(K)]
    group = 64
    index = group_index(K, K, group, shards=3)
    assert torch.equal(index[1], torch.arange(K, dtype=torch.int32) // group)  # none was loaded
    weights, stored = [], []
    for shard, order in zip("qkv", orders, strict=True):
        weight, q, zero, scale = integers(4, group, symmetric=False, rows=16)
        index.weight_loader(index, (torch.arange(K) // group)[order].int(), shard)
        weights.append(weight[order].t())
        stored.append(gptq_parts(4, q[order], zero, scale))
    layer = SimpleNamespace(
        **{
            name: SimpleNamespace(data=torch.cat(parts, dim=1))
            for name, parts in zip(
                ("qweight", "qzeros", "scales"), zip(*stored, strict=True), strict=True
            )
        },
        g_idx=index,
    )
    config = gptq.K80GPTQConfig(4, group, True, False, {})
    method = gptq.K80GPTQLinearMethod(config, "qkv_proj")
    method.sizes = [16, 16, 16]
    packed = method.pack(layer)
    assert [weight.qweight.shape[0] for weight in packed] == [32, 16]
    result = torch.cat([weight.linear(torch.eye(K)) for weight in packed], dim=-1).t()
    torch.testing.assert_close(result, torch.cat(weights), atol=0, rtol=0)


def test_a_part_of_a_row_begins_with_a_later_group() -> None:
    g_idx = (torch.arange(K, 2 * K) // 64).repeat(2, 1)
    [(rows, index)] = parts_of([8, 8], g_idx)
    assert rows == slice(0, 16)
    assert torch.equal(index, torch.arange(K) // 64)


def test_int8_with_a_minimum_is_rounded_once() -> None:
    _, q, zero, scale = integers(8, 64, symmetric=False)
    packed = gptq.pack("layer", 8, *gptq_parts(8, q, zero, scale), torch.arange(K) // 64)
    assert packed.minimum is not None
    x, bias = torch.randn(2, 3, K), torch.randn(N)
    expected = x.half().float() @ weight_of(packed).t() + bias
    half = packed.linear(x.half(), bias)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, atol=1e-5, rtol=2.0**-11)
    ids = torch.tensor([[1], [N - 1]])
    assert torch.equal(packed.embedding(ids, torch.float16), weight_of(packed)[ids].half())


def empty_gptq(bits: int, columns: int, groups: int) -> tuple[Tensor, ...]:
    q, zero = torch.zeros(columns, 8), torch.zeros(groups, 8)
    index = torch.arange(columns) // (columns // groups)
    return *gptq_parts(bits, q.int(), zero.int(), torch.ones(groups, 8)), index


@pytest.mark.parametrize(
    ("columns", "groups", "group"), [(96, 1, 32), (192, 1, 64), (512, 1, 128), (512, 2, 128)]
)
def test_a_larger_group_is_several_of_the_kernels(columns: int, groups: int, group: int) -> None:
    scale = gptq.pack("layer", 4, *empty_gptq(4, columns, groups)).scale
    assert scale.shape == (8, columns // group)


@pytest.mark.parametrize(("bits", "columns", "groups"), [(4, 80, 5), (4, 40, 1), (8, 40, 1)])
def test_groups_that_the_kernels_lack_are_refused(bits: int, columns: int, groups: int) -> None:
    message = rf"^model\.mlp: its {columns} columns in {groups} groups cannot be served"
    with pytest.raises(ValueError, match=message):
        gptq.pack("model.mlp", bits, *empty_gptq(bits, columns, groups))


def test_groups_of_different_sizes_are_refused() -> None:
    q, zero = torch.zeros(8, 8, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"model\.mlp: its g_idx .* desc_act false"):
        gptq.pack("model.mlp", 4, q, zero, torch.ones(2, 8), (torch.arange(64) > 20).int())


LAYER = {"output_size": 64, "params_dtype": torch.float32, "weight_loader": None}


@pytest.mark.parametrize(
    ("desc_act", "columns", "message"),
    [
        (True, 128, r"down_proj: a checkpoint with reordered columns .* several dies"),
        (False, 96, r"down_proj: 64 x 96 on each die does not divide into groups of 64 columns"),
    ],
)
def test_what_cannot_be_split_over_dies_is_refused(
    desc_act: bool, columns: int, message: str
) -> None:
    layer = torch.nn.Module()
    config = {"bits": 4, "group_size": 64, "desc_act": desc_act, "zero_point": True}
    method = gptq.K80GPTQLinearMethod(gptq.K80GPTQConfig.from_config(config), "down_proj")
    with pytest.raises(ValueError, match=message):
        method.create_weights(layer, columns, [64], 2 * columns, **LAYER)
    layer.prefix = "down_proj"
    args = {"group_size": 64, "strategy": "group", "actorder": "group" if desc_act else None}
    scheme = compressed.K80WNA16(QuantizationArgs(num_bits=4, symmetric=True, **args))
    with pytest.raises(ValueError, match=message):
        scheme.create_weights(layer, 2 * columns, [64], columns, **LAYER)
    if not desc_act:
        method = awq.K80AWQLinearMethod(awq.K80AWQConfig.from_config(config), "down_proj")
        with pytest.raises(ValueError, match=message):
            method.create_weights(layer, columns, [64], 2 * columns, **LAYER)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("quantize", "steps"), [(k80.quantize_w4, 15), (k80.quantize_w8, 254)])
def test_rounding_to_nearest(
    quantize: Callable[[Tensor, int], PackedWeight], steps: int, group: int
) -> None:
    torch.manual_seed(group)
    values = torch.randn(N, K) + torch.randn(N, 1)
    values[0], values[1], values[2] = 0, 3.5, 1e-9  # groups of equal values, and too small ones
    packed = quantize(values, group)
    grouped = values.unflatten(1, (-1, group))
    width = grouped.amax(-1) - grouped.amin(-1) if steps == 15 else 2 * grouped.abs().amax(-1)
    # Half a step, and what rounding scale and minimum to FP16 adds at the end of the range.
    bound = width / steps / 2 + 2.0**-10 * grouped.abs().amax(-1) + 2.0**-24
    off = (weight_of(packed) - values).unflatten(1, (-1, group)).abs()
    assert (off <= bound.unsqueeze(-1)).all()
    assert (off.amax(-1) > 0.6 * width / steps / 2)[3:].all()  # and it is really that coarse
    assert torch.equal(weight_of(packed)[0], values[0])


@pytest.mark.parametrize(
    ("narrow", "columns", "parts"),
    [
        (k80.quantize_w4, 576, {"qweight": 288, "scale": 9, "minimum": 9}),
        (k80.quantize_w8, 576, {"qweight": 576, "scale": 9}),
        (k80.quantize_w8, 48, {"qweight": 48, "scale": 1}),
        (k80._to_f16, 50, {"qweight": 50}),
    ],
)
def test_a_weight_is_narrowed_part_by_part(
    narrow: Callable[[Tensor, int], PackedWeight],
    columns: int,
    parts: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What vLLM's loaders do: q, then k, each in pieces that no piece's rows divide."""
    monkeypatch.setattr(k80, "_ELEMENTS_AT_ONCE", 3 * columns)
    parameter = k80.NarrowedParameter(24, columns, "layer", narrow, loader=lambda: None)
    assert parameter.device.type == "cpu"
    assert "weight" not in vars(parameter)  # which has no memory until it is loaded
    named = parameter.weight.named_parts()
    assert {name: part.shape for name, part in named.items()} == {
        name: (24, count) for name, count in parts.items()
    }
    values = torch.randn(24, columns).bfloat16()
    parameter.data.narrow(0, 16, 8).copy_(values[16:])
    parameter[:16].data.copy_(values[:16])
    whole = narrow(values.float(), parameter.group)
    assert all(torch.equal(part, getattr(whole, name)) for name, part in named.items())


def test_columns_that_no_group_divides_are_refused_by_layer() -> None:
    message = r"^lm_head: its 50 columns are no multiple of 32.*--quantization k80-f16"
    for narrow in (k80.quantize_w4, k80.quantize_w8):
        with pytest.raises(ValueError, match=message):
            k80.NarrowedParameter(8, 50, "lm_head", narrow, loader=lambda: None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [70000.0, -70000.0, float("inf"), float("nan")])
def test_values_beyond_fp16_are_refused_by_name(dtype: torch.dtype, value: float) -> None:
    tensor = torch.zeros(4, 4, dtype=dtype)
    check_range("model.norm.weight", tensor)
    tensor[2, 3] = 65280.0  # the largest BF16 that FP16 holds
    check_range("model.norm.weight", tensor)
    tensor[1, 1] = value
    with pytest.raises(ValueError, match=r"^model\.norm\.weight has values .* --dtype float32"):
        check_range("model.norm.weight", tensor)


@pytest.mark.parametrize(
    ("dtype", "quantization", "refused"),
    [
        (torch.float32, None, False),
        (torch.float16, None, True),
        (torch.float32, "k80-w4", True),
        (torch.float32, "gptq", False),
    ],
)
def test_every_tensor_that_becomes_fp16_is_checked_when_it_is_read(
    dtype: torch.dtype, quantization: str | None, refused: bool, tmp_path: Path
) -> None:
    save_file({"small": torch.ones(2), "big": torch.full((2,), 7e4)}, tmp_path / "m.safetensors")
    model = SimpleNamespace(
        model=str(tmp_path), revision=None, dtype=dtype, quantization=quantization
    )
    weights = K80ModelLoader(LoadConfig()).get_all_weights(model, torch.nn.Module())
    if refused:
        with pytest.raises(ValueError, match=r"^big has values"):
            list(weights)
    else:
        assert {name for name, _ in weights} == {"small", "big"}


def test_so_is_every_tensor_of_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_norm.weight", np.full((4,), 7e4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loader, names = K80GGUFModelLoader(LoadConfig(load_format="gguf")), {}
    names["blk.0.attn_norm.weight"] = "model.layers.0.input_layernorm.weight"
    assert [name for name, _ in loader._get_weights_iterator(str(path), names)] == [*names.values()]
    loader._narrow = True
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.input_layernorm\.weight has values"):
        list(loader._get_weights_iterator(str(path), names))


def test_vllm_takes_our_loader_for_safetensors() -> None:
    integration.install()
    for load_format in ("auto", "safetensors"):
        assert type(get_model_loader(LoadConfig(load_format=load_format))) is K80ModelLoader
