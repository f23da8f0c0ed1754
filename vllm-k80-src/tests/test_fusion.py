"""Which of a module's calls are joined, by what its forward does with their results."""

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)

from vllm_k80 import ops
from vllm_k80.fusion import fuse, hands_over
from vllm_k80.layers import K80SiluAndMul
from vllm_k80.quantization.packed import PackedWeight


class FeedForward:
    """Forwards that hand over gate_up_proj's result to act_fn alone, and some that do not."""

    def same_name(self, x: Any) -> Any:
        x, _ = self.gate_up_proj(x)
        x = self.act_fn(x)
        x, _ = self.down_proj(x)
        return x

    def other_names(self, hidden: Any) -> Any:
        gate_up, _ = self.gate_up_proj(hidden)
        y = self.act_fn(gate_up)
        return self.down_proj(y)

    def read_later(self, x: Any) -> Any:
        gate_up, _ = self.gate_up_proj(x)
        y = self.act_fn(gate_up)
        return self.down_proj(y) + gate_up

    def something_between(self, x: Any) -> Any:
        x, _ = self.gate_up_proj(x)
        x = x * self.multiplier
        x = self.act_fn(x)
        return self.down_proj(x)

    def in_place(self, x: Any) -> Any:
        x, _ = self.gate_up_proj(x)
        x[:, :8] *= self.multiplier
        x = self.act_fn(x)
        return self.down_proj(x)

    def of_something_else(self, x: Any) -> Any:
        gate_up, _ = self.gate_up_proj(x)
        y = self.act_fn(x)
        return y * gate_up

    def twice(self, x: Any) -> Any:
        x, _ = self.gate_up_proj(x)
        x = self.act_fn(x)
        return self.act_fn(x)

    def sometimes(self, x: Any) -> Any:
        if self.gated:
            x, _ = self.gate_up_proj(x)
            x = self.act_fn(x)
        return x


@pytest.mark.parametrize("name", [name for name in vars(FeedForward) if name[0] != "_"])
def test_a_product_is_gated_if_only_the_activation_reads_it(name: str) -> None:
    forward = getattr(FeedForward, name)
    joined = hands_over(forward, "gate_up_proj", "act_fn", 1, 1)
    assert joined == (name in ("same_name", "other_names"))


class Attend:
    """The same of rotary_emb and attn."""

    def llama(self, positions: Any, hidden: Any) -> Any:
        qkv, _ = self.qkv_proj(hidden)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        attn_output = self.attn(q, k, v)
        return self.o_proj(attn_output)

    def scaled(self, positions: Any, q: Any, k: Any, v: Any) -> Any:
        q, k = self.rotary_emb(positions, q, k)
        q = q * self.scale
        return self.attn(q, k, v)

    def swapped(self, positions: Any, q: Any, k: Any, v: Any) -> Any:
        k, q = self.rotary_emb(positions, q, k)
        out = self.attn(q, k, v)
        return self.o_proj(out)

    def key_read_later(self, positions: Any, q: Any, k: Any, v: Any) -> Any:
        q, k = self.rotary_emb(positions, q, k)
        out = self.attn(q, k, v)
        return out, k

    def with_a_shape(self, positions: Any, q: Any, k: Any, v: Any) -> Any:
        q, k = self.rotary_emb(positions, q, k)
        out = self.attn(q, k, v, self.shape)
        return self.o_proj(out)


@pytest.mark.parametrize("name", [name for name in vars(Attend) if name[0] != "_"])
def test_keys_are_rotated_late_if_only_attention_reads_them(name: str) -> None:
    joined = hands_over(getattr(Attend, name), "rotary_emb", "attn", 2, 3)
    assert joined == (name == "llama")


def test_what_has_no_source_is_not_joined() -> None:
    assert not hands_over(len, "gate_up_proj", "act_fn", 1, 1)
    assert not hands_over(lambda self: self.act_fn(self.gate_up_proj()), "a", "b", 1, 1)


def layer(kind: type, rows: int, columns: int, **attributes: Any) -> Any:
    """A linear layer of vLLM's with a weight of ours; making one asks for process groups."""
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    weight, bias = draw(rows, columns), draw(rows, seed=1)
    made.packed_weights, made.bias = [PackedWeight(weight.half())], torch.nn.Parameter(bias)
    usual = {"tp_size": 1, "return_bias": True, "skip_bias_add": False, "gather_output": False}
    vars(made).update(usual | attributes)
    return made


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(torch.nn.Module):
    """A feed-forward block as vLLM has them."""

    def __init__(self, **of_gate_and_up: Any) -> None:
        super().__init__()
        sizes = {"output_sizes": [16, 16]} | of_gate_and_up
        self.gate_up_proj = layer(MergedColumnParallelLinear, 32, 8, **sizes)
        self.act_fn = K80SiluAndMul.__new__(K80SiluAndMul)
        torch.nn.Module.__init__(self.act_fn)
        self.down_proj = layer(RowParallelLinear, 8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        x = self.act_fn(gate_up)
        x, _ = self.down_proj(x)
        return x


def test_a_joined_block_computes_what_its_parts_do() -> None:
    block, x = Block(), draw(3, 8, seed=2)
    gate_up, down = block.gate_up_proj, block.down_proj
    y = gate_up.packed_weights[0].linear(x, gate_up.bias)
    expected = down.packed_weights[0].linear(torch.ops.vllm_k80.silu_and_mul(y), down.bias)
    fuse(torch.nn.Sequential(block))
    before = ops.CALLS.copy()
    assert torch.equal(block(x), expected)
    assert ops.CALLS - before == {"linear": 2}
    assert gate_up(x)[1] is down(x.repeat(1, 2))[1] is None


@pytest.mark.parametrize(
    "different",
    [
        {"output_sizes": [8, 24]},
        {"output_sizes": [16, 8, 8]},
        {"gather_output": True},
        {"skip_bias_add": True},
    ],
)
def test_what_is_no_gate_and_factor_is_not_joined(different: dict[str, Any]) -> None:
    block = Block(**different)
    activation = block.act_fn
    fuse(torch.nn.Sequential(block))
    assert block.act_fn is activation
    assert not hasattr(block.gate_up_proj, "gated")


@pytest.mark.parametrize(
    ("kind", "different"),
    [
        (ColumnParallelLinear, {"gather_output": True, "tp_size": 2}),
        (ColumnParallelLinear, {"skip_bias_add": True}),
        (ColumnParallelLinear, {"return_bias": False}),
        (RowParallelLinear, {"tp_size": 2}),
    ],
)
def test_what_a_layer_does_beside_its_product_stays(kind: type, different: dict[str, Any]) -> None:
    linear = layer(kind, 8, 8, **different)
    fuse(torch.nn.Sequential(linear))
    assert "forward" not in vars(linear)


def test_modules_of_other_kinds_stay_as_they_are() -> None:
    model = torch.nn.Module()
    model.gate_up_proj, model.act_fn = torch.nn.Linear(4, 8), torch.nn.SiLU()
    children = dict(model.named_children())
    fuse(model)
    assert dict(model.named_children()) == children
