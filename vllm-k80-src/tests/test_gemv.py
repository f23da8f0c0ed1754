"""The gemv and dequant operators' references, and what the fat binary carries."""

import re
import shutil
import subprocess
from typing import Any, NamedTuple

import pytest
import torch

from vllm_k80.ops import CALLS, bind, driver, kernels, reference
from vllm_k80.quantization.packed import PackedWeight, concatenate

vllm_k80 = torch.ops.vllm_k80


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def pack(q: torch.Tensor) -> torch.Tensor:
    """Integers 0 to 15 [N, K] in the INT4 layout, by its definition: one nibble at a time."""
    packed = torch.zeros(q.shape[0], q.shape[1] // 2, dtype=torch.uint8)
    for column in range(q.shape[1]):
        packed[:, column // 2] |= (q[:, column] << 4 * (column % 2)).to(torch.uint8)
    return packed


def w4(rows: int, columns: int, group: int, dtype: torch.dtype, zero: bool) -> Any:
    """(qweight, scale, minimum, zero) and the weight in FP64, by its definition."""
    q = integers(0, 16, rows, columns, seed=columns)
    scale = draw(rows, columns // group, seed=1).abs().to(dtype)
    if zero:
        offset = integers(0, 17, rows, columns // group, seed=2).to(dtype)
    else:
        offset = draw(rows, columns // group, seed=2).to(dtype)
    wide_scale, wide_offset = (
        part.double().repeat_interleave(group, dim=1) for part in (scale, offset)
    )
    weight = (q - wide_offset) * wide_scale if zero else q * wide_scale + wide_offset
    parts = (pack(q), scale, None, offset) if zero else (pack(q), scale, offset, None)
    return parts, weight


def close(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> None:
    exact = x.double() @ weight.t() + (0 if bias is None else bias.double())
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    limit = (1e-3 if x.dtype == torch.float16 else 2e-6) * float(exact.abs().max() + 1e-30)
    torch.testing.assert_close(y.double(), exact, atol=limit, rtol=0)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_w4_is_dequantize_and_multiply(group: int, dtype: torch.dtype, zero: bool) -> None:
    (qweight, scale, minimum, zeros), weight = w4(37, 256, group, dtype, zero)
    dense = vllm_k80.dequant_w4(qweight, scale, minimum, zeros)
    torch.testing.assert_close(dense.double(), weight, atol=1e-5, rtol=1e-6)
    for tokens, x_dtype in ((1, torch.float32), (8, torch.float16), (32, torch.float32)):
        x, bias = draw(tokens, 256, seed=tokens).to(x_dtype), draw(37, seed=5)
        close(vllm_k80.gemv_w4(x, qweight, scale, minimum, bias, zeros), x, weight, bias)
        close(vllm_k80.linear_w4(x, qweight, scale, minimum, None, zeros), x, weight)
    rows = vllm_k80.embedding_w4(
        torch.tensor([36, 0]), qweight, scale, minimum, torch.float32, zeros
    )
    torch.testing.assert_close(rows, dense[[36, 0]], atol=0, rtol=0)


@pytest.mark.parametrize("group", [16, 32, 64, 128, 384])
def test_w8_is_dequantize_and_multiply(group: int) -> None:
    q = integers(-128, 128, 21, 384).to(torch.int8)
    scale = draw(21, 384 // group).abs().half()
    weight = q.double() * scale.double().repeat_interleave(group, dim=1)
    torch.testing.assert_close(vllm_k80.dequant_w8(q, scale).double(), weight, atol=0, rtol=1e-6)
    x, bias = draw(2, 3, 384), draw(21).half()
    close(vllm_k80.gemv_w8(x, q, scale, bias), x, weight, bias)


def test_f16() -> None:
    weight, x = draw(19, 40).half(), draw(5, 40).half()
    close(vllm_k80.gemv_f16(x, weight), x, weight.double())
    assert vllm_k80.gemv_f16(x[:0], weight).shape == (0, 19)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 32, 40])
def test_a_gated_product_is_activated(tokens: int, dtype: torch.dtype) -> None:
    """The first half of the rows is the gate's, the bias goes in before, FP16 is rounded once."""
    x, bias = draw(tokens, 256).to(dtype), draw(12, seed=3)
    (qweight, scale, minimum, zero), weight4 = w4(12, 256, 64, torch.float16, True)
    q8, scale8 = integers(-128, 128, 12, 256).to(torch.int8), 0.01 * draw(12, 2).abs().half()
    half = 0.1 * draw(12, 256, seed=4).half()
    products = {
        "w4": (weight4, (qweight, 0.1 * scale, minimum, bias, zero)),
        "w8": (q8.double() * scale8.double().repeat_interleave(128, dim=1), (q8, scale8, bias)),
        "f16": (half.double(), (half, bias)),
    }
    for kind, (weight, arguments) in products.items():
        exact = x.double() @ (weight * (0.1 if kind == "w4" else 1)).t() + bias.double()
        gate, up = exact.chunk(2, dim=-1)
        expected = gate / (1 + torch.exp(-gate)) * up
        operators = ["linear" if kind == "f16" else f"linear_{kind}"]
        operators += [f"gemv_{kind}"] * (tokens <= 32)
        for name in operators:
            y = getattr(vllm_k80, name)(x, *arguments, gated=True)
            assert y.dtype == dtype
            limit = (1e-3 if kind == "w4" else 1e-5) if dtype == torch.float32 else 1e-3
            limit *= float(expected.abs().max())
            torch.testing.assert_close(y.double(), expected, atol=limit, rtol=0)


def test_a_gated_product_needs_as_many_rows_of_gate_and_factor() -> None:
    with pytest.raises(ValueError, match="gemv_f16: the weight has 3 rows; gated takes as many"):
        vllm_k80.gemv_f16(torch.ones(1, 8), torch.ones(3, 8).half(), None, True)


class Launch(NamedTuple):
    """What a kernel was launched with."""

    name: str
    grid: Any
    arguments: tuple[Any, ...]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Kernels as where there is a GPU, none of which runs."""
    launched: list[Launch] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def launch(self, grid: Any, block: int, *arguments: Any) -> None:
            launched.append(Launch(self.name, grid, arguments))

    monkeypatch.setattr(driver, "available", lambda: True)
    monkeypatch.setattr(driver, "kernel", lambda name, signature, device: Kernel(name))
    monkeypatch.setattr(kernels._Product, "_KNOWN", {})
    return launched


def test_gated_and_not_are_different_kernels_of_one_weight(launches: list[Launch]) -> None:
    weight = torch.zeros(96, 64, dtype=torch.uint8), torch.ones(96, 4), torch.ones(96, 4)
    for tokens, gated in ((1, False), (1, True), (1, False), (8, True), (5, False)):
        y = kernels.linear_w4(torch.ones(tokens, 128), *weight, gated=gated)
        assert y.shape == (tokens, 48 if gated else 96)
    assert [launch[:2] for launch in launches] == [
        ("gemv_w4_f32_m1", 3),
        ("gated_gemv_w4_f32_m1", 3),  # of 16 results and the 32 rows that they need
        ("gemv_w4_f32_m1", 3),
        ("gemv_w4_f32_m8", (1, 2)),  # which has no gated form
        ("silu_and_mul_f32", (8, 1)),
        ("gemv_w4_f32_m8", (1, 2)),
    ]


def test_half_precision_activations_of_eight_rows_are_rounded_once(launches: list[Launch]) -> None:
    """The product says by its flags that it is FP32; the activation's kernel takes it as that."""
    weight = torch.zeros(96, 128, dtype=torch.int8), torch.ones(96, 1)
    y = kernels.linear_w8(torch.ones(6, 128, dtype=torch.float16), *weight, gated=True)
    assert (y.shape, y.dtype) == ((6, 48), torch.float16)
    assert [(launch.name, launch.arguments[-1]) for launch in launches] == [
        ("gemv_w8_f32_m8", 1 | 4),
        ("silu_and_mul_f32_f16", 48),
    ]


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "blocks"),
    [
        (4096, 4096, 4, 64),  # 12 tiles left over: an SMX has one of them, in parts or not
        (11008, 4096, 4, 169 + 3 * 4),  # a step each
        (5120, 13824, 4, 78 + 2 * 5),
        (832, 4096, 4, 13),  # none left over
        (64, 128, 4, 1),  # one step, which cannot be split
        (64, 65536, 8, 13),  # no more parts than SMX take at once
    ],
)
def test_tiles_that_are_left_over_are_split(
    rows: int, columns: int, bits: int, blocks: int
) -> None:
    assert kernels.blocks_of_eight(rows, columns, bits) == blocks


def test_a_word_holds_eight_neighbours_in_order() -> None:
    """What the kernel relies on when it masks nibble i of a little-endian word."""
    q = integers(0, 16, 3, 64)
    words = pack(q).view(torch.int32).long() & 0xFFFFFFFF
    for i in range(8):
        assert torch.equal(words >> (4 * i) & 15, q[:, i::8])


def test_masked_bits_are_factors() -> None:
    """The kernel's arithmetic: nibble * 2^(p - 149) as a float times x * 2^(90 - p)."""
    x = 1.5
    for position in (0, 4, 8, 12, 16, 20):
        for nibble in range(16):
            bits = torch.tensor([nibble << position], dtype=torch.int32).view(torch.float32)
            product = bits.double() * (x * 2.0 ** (90 - position)) * 2.0**59
            assert product.item() == nibble * x


def test_zero_points_are_joined_like_minimums_and_not_with_them() -> None:
    with_zero, with_minimum = (
        PackedWeight(*w4(8, 64, 32, torch.float16, zero)[0]) for zero in (True, False)
    )
    joined = concatenate([with_zero, with_zero, with_minimum])
    assert [weight.qweight.shape[0] for weight in joined] == [16, 8]
    x = torch.eye(64)[:32]
    expected = torch.cat([w.linear(x) for w in (with_zero, with_zero, with_minimum)], dim=-1)
    torch.testing.assert_close(torch.cat([w.linear(x) for w in joined], dim=-1), expected)


W4 = {
    "x": torch.ones(1, 64),
    "qweight": torch.zeros(4, 32, dtype=torch.uint8),
    "scale": torch.ones(4, 2),
    "minimum": torch.ones(4, 2),
    "bias": None,
    "zero": None,
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(33, 64)}, r"x has 33 rows; up to 32 are supported"),
        ({"x": torch.ones(1, 96)}, r"x has 96 columns, the weight has 64"),
        ({"x": torch.ones(1, 64).double()}, r"x is torch.float64; torch.float32 and"),
        ({"qweight": torch.zeros(4, 32)}, r"qweight must be torch.uint8 .* is torch.float32"),
        ({"qweight": torch.zeros(32, 4, dtype=torch.uint8).t()}, r"contiguous; .* strides \(1, 4"),
        ({"scale": torch.ones(4, 4)}, r"minimum is \(4, 2\), scale is \(4, 4\)"),
        ({"scale": torch.ones(3, 2)}, r"scale has shape \(3, 2\), which does not divide"),
        (
            {"scale": torch.ones(4, 2).half()},
            r"scale is torch.float16, its companion torch.float32",
        ),
        (
            {"scale": torch.ones(4, 4), "minimum": torch.ones(4, 4)},
            r"group size is 16; 32, 64, 128 are supported",
        ),
        ({"bias": torch.ones(3)}, r"bias has shape \(3,\), the weight 4 rows"),
        ({"minimum": None}, r"either minimum or zero"),
        ({"zero": torch.ones(4, 2)}, r"either minimum or zero"),
    ],
)
def test_what_gemv_cannot_take_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"gemv_w4: .*{message}"):
        vllm_k80.gemv_w4(*{**W4, **changed}.values())


def test_columns_that_do_not_fill_128_bits_are_named() -> None:
    with pytest.raises(ValueError, match="gemv_f16: the weight has 12 columns, no multiple of 8"):
        vllm_k80.gemv_f16(torch.ones(1, 12), torch.ones(2, 12).half())
    q, scale = torch.ones(2, 24, dtype=torch.int8), torch.ones(2, 1)
    with pytest.raises(ValueError, match="gemv_w8: the weight has 24 columns, no multiple of 16"):
        vllm_k80.gemv_w8(torch.ones(1, 24), q, scale)
    q, scale = torch.ones(2, 32, dtype=torch.int8), torch.ones(2, 4)
    with pytest.raises(ValueError, match="group size is 8; 16, 32, 64, 128 are supported"):
        vllm_k80.gemv_w8(torch.ones(1, 32), q, scale)


def test_a_weight_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever objects stand for its tensors; another weight in the same memory is another."""
    checks, launches = [], []
    check = reference.check_gemv_w4

    class Kernel:
        def launch(self, *arguments: Any) -> None:
            launches.append(arguments)

    monkeypatch.setattr(driver, "available", lambda: True)
    monkeypatch.setattr(driver, "kernel", lambda name, signature, device: Kernel())
    monkeypatch.setattr(reference, "check_gemv_w4", lambda *a: checks.append(a) or check(*a))
    monkeypatch.setattr(kernels._Product, "_KNOWN", {})
    monkeypatch.setattr(kernels._Product, "_SEEN", {})
    weight = torch.zeros(64, 64, dtype=torch.uint8), torch.ones(64, 4), torch.ones(64, 4)
    for _ in range(3):
        y = kernels.linear_w4(torch.ones(1, 128), *[part.detach() for part in weight])
        assert y.shape == (1, 64)
    assert (len(checks), len(launches)) == (1, 3)
    y = kernels.linear_w4(torch.ones(1, 256), *[part.view(32, -1) for part in weight])
    assert y.shape == (1, 32)
    assert (len(checks), len(launches)) == (2, 4)


def test_objects_that_live_are_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are forgotten with their lives, so that no other object passes for them."""

    class Kernel:
        def launch(self, *arguments: Any) -> None:
            pass

    asked = []
    identify = kernels._Product._identify
    monkeypatch.setattr(driver, "available", lambda: True)
    monkeypatch.setattr(driver, "kernel", lambda name, signature, device: Kernel())
    monkeypatch.setattr(kernels._Product, "_KNOWN", {})
    monkeypatch.setattr(kernels._Product, "_SEEN", {})
    monkeypatch.setattr(
        kernels._Product,
        "_identify",
        staticmethod(lambda parts: asked.append(1) or identify(parts)),
    )
    weight = torch.zeros(4, 64).half()
    for _ in range(2):
        kernels.linear(torch.ones(1, 64), weight)
    before = len(asked)
    for _ in range(3):
        assert kernels.linear(torch.ones(1, 64), weight).shape == (1, 4)
    assert len(asked) == before
    assert len(kernels._Product._SEEN) == 1
    del weight
    assert not kernels._Product._SEEN


class OnGpu(torch.Tensor):
    """A tensor that passes for one on a GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def test_a_layer_looks_for_its_product_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its weight is elsewhere. Prefill, which is no product, goes its own way in between."""
    launches, looked = [], []

    class Kernel:
        def launch(self, grid: Any, block: int, *arguments: Any) -> None:
            launches.append(arguments[0])

    known = kernels._Product.known
    monkeypatch.setattr(driver, "available", lambda: True)
    monkeypatch.setattr(driver, "kernel", lambda name, signature, device: Kernel())
    monkeypatch.setattr(kernels._Product, "known", lambda *a: looked.append(1) or known(*a))
    qweight, scale, minimum = (
        torch.zeros(64, 64, dtype=torch.uint8),
        torch.ones(64, 4),
        torch.ones(64, 4),
    )
    calls = CALLS["linear_w4"]
    layer = bind("linear_w4", qweight, scale, minimum, None, None, False)
    row = torch.ones(1, 128).as_subclass(OnGpu)
    for _ in range(2):
        layer(row)
    before = len(looked)
    for _ in range(3):
        assert layer(row).shape == (1, 64)
    assert len(looked) == before
    assert layer(torch.ones(64, 128)).shape == (64, 64)  # prefill
    layer(row)
    assert CALLS["linear_w4"] == calls + 7
    assert launches == [qweight.data_ptr()] * 6
    layer(torch.ones(64, 128).as_subclass(OnGpu))  # prefill on the GPU
    before = len(looked)
    layer(row)
    assert len(looked) == before
    qweight.set_(torch.zeros(64, 64, dtype=torch.uint8))
    layer(row)
    assert len(looked) > before
    assert launches[-1] == qweight.data_ptr() != launches[0]


@pytest.fixture(scope="module")
def resources() -> dict[str, str]:
    """What cuobjdump says of each kernel in the fat binary."""
    if not driver.available() or shutil.which("cuobjdump") is None:
        pytest.skip("no fat binary or no cuobjdump here: csrc/build.sh vllm_k80/kernels")
    command = ["cuobjdump", "-res-usage", str(driver.FAT_BINARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(re.findall(r"Function (\w+):\s+(REG:.*)", done.stdout + done.stderr))


def test_the_fat_binary_holds_every_kernel_and_none_spills(resources: dict[str, str]) -> None:
    names = {
        f"{gated}gemv_{kind}_m{tokens}"
        for gated in ("", "gated_")
        for kind in ("w4_f16", "w4_f32", "w4_z16", "w4_z32", "w8_f16", "w8_f32", "f16")
        for tokens in (1, 2, 4, 8)
        if not (gated and tokens == 8 and kind != "f16")
    } | {f"dequant_{kind}" for kind in ("w4_f16", "w4_f32", "w4_z16", "w4_z32", "w8_f16", "w8_f32")}
    assert names <= resources.keys()
    assert {name: use for name, use in resources.items() if "STACK:0" not in use} == {}
    command = ["cuobjdump", "-lptx", "-lelf", str(driver.FAT_BINARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "sm_37.cubin" in listing
    assert "sm_37.ptx" in listing
