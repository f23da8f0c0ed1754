"""Which of a module's calls are joined, by what its forward does with their results."""

from typing import Any

import pytest
import torch

from vllm_k80.fusion import fuse, hands_over


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
        return x

    def in_place(self, x: Any) -> Any:
        x, _ = self.gate_up_proj(x)
        x[:, :8] *= self.multiplier
        x = self.act_fn(x)
        return x

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
        return out

    def key_read_later(self, positions: Any, q: Any, k: Any, v: Any) -> Any:
        q, k = self.rotary_emb(positions, q, k)
        out = self.attn(q, k, v)
        return out, k

    def with_a_shape(self, positions: Any, q: Any, k: Any, v: Any) -> Any:
        q, k = self.rotary_emb(positions, q, k)
        out = self.attn(q, k, v, self.shape)
        return out


@pytest.mark.parametrize("name", [name for name in vars(Attend) if name[0] != "_"])
def test_keys_are_rotated_late_if_only_attention_reads_them(name: str) -> None:
    joined = hands_over(getattr(Attend, name), "rotary_emb", "attn", 2, 3)
    assert joined == (name == "llama")


def test_what_has_no_source_is_not_joined() -> None:
    assert not hands_over(len, "gate_up_proj", "act_fn", 1, 1)
    assert not hands_over(lambda self: self.act_fn(self.gate_up_proj()), "a", "b", 1, 1)


def test_modules_of_other_kinds_stay_as_they_are() -> None:
    model = torch.nn.Module()
    model.gate_up_proj, model.act_fn = torch.nn.Linear(4, 8), torch.nn.SiLU()
    children = dict(model.named_children())
    fuse(model)
    assert dict(model.named_children()) == children
