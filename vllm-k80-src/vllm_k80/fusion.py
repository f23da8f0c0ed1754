"""What a loaded model's modules can leave out: launches that two share, and calls in between.

vLLM's models call their modules one after the other, and each of ours launches a kernel. Two pairs
of a decoder layer need only one for both:

- ``act_fn`` after ``gate_up_proj``: the product has gate and factor in registers, and applies the
  activation before it stores (``gated`` of the operators `linear`, `linear_w4` and `linear_w8`).
- ``attn`` after ``rotary_emb``: the key is rotated on its way into the cache (the operator
  `rotary_and_cache`).

What a module does with the results is Python that nobody promises to keep. So a pair is joined only
if the source of the module's ``forward`` hands the results of the one to the other and to nothing
else; any other module stays as it is.

Between a module of vLLM's and its launch are calls that decide, in every step anew, what was
settled when the model was loaded. A CUDA graph has none of it, but eager execution waits for them.
So they are decided once, where nothing but a product is left.
"""

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.attention.layer import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from vllm_k80.attention import K80AttentionImpl, Rotation
from vllm_k80.layers import K80RMSNorm, K80SiluAndMul, Rotary, normalized


def fuse(model: torch.nn.Module) -> None:
    """Join the pairs of ``model``, whose weights are loaded."""
    for module in list(model.modules()):
        children = dict(module.named_children())
        if _is_gated(module, children.get("gate_up_proj"), children.get("act_fn")):
            children["gate_up_proj"].gated = True
            _replace(module, "act_fn", _same)
        if _is_rotated(module, children.get("rotary_emb"), children.get("attn")):
            rotation = Rotation(children["rotary_emb"])
            children["attn"].impl.rotation = rotation
            _replace(module, "rotary_emb", rotation.remember)
    for module in model.modules():
        if type(module) is K80RMSNorm and module.is_plain:
            module.forward = functools.partial(normalized, module.weight, module.variance_epsilon)
        if _is_plain(module):
            product = module.packed_weights[0].product(module.bias, getattr(module, "gated", False))
            module.forward = _forward(product)
        # torch keeps children apart, and looks there last. Python finds them here at once.
        module.__dict__ = dict(module.named_children()) | module.__dict__


def _is_plain(layer: torch.nn.Module) -> bool:
    """Whether a linear layer's forward is one product of ours, and nothing before or after it."""
    if type(layer).forward not in (ColumnParallelLinear.forward, RowParallelLinear.forward):
        return False
    packed = getattr(layer, "packed_weights", ())
    # With several dies, columns may be gathered, and rows are added up.
    alone = layer.tp_size == 1 or (
        isinstance(layer, ColumnParallelLinear) and not layer.gather_output
    )
    return len(packed) == 1 and alone and layer.return_bias and not layer.skip_bias_add


def _forward(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, None]]:
    """A linear layer's forward: the result, and no bias that is left to be added."""
    return lambda x: (product(x), None)


def _replace(module: torch.nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Let ``module`` call a function where it has a child, which stays among its children."""
    module.__dict__[name] = function


def _same(x: Tensor) -> Tensor:
    """The activation of what is activated already."""
    return x


def _is_gated(module: torch.nn.Module, product: Any, activation: Any) -> bool:
    return (
        isinstance(product, MergedColumnParallelLinear)
        and isinstance(activation, K80SiluAndMul)
        # Its method is one of ours, or asks us for the product.
        and (hasattr(product, "packed_weights") or _is_unquantized(product))
        and len(product.output_sizes) == 2
        and product.output_sizes[0] == product.output_sizes[1]
        and not product.gather_output
        and not product.skip_bias_add
        and hands_over(type(module).forward, "gate_up_proj", "act_fn", 1, 1)
    )


def _is_unquantized(product: Any) -> bool:
    return isinstance(product.quant_method, UnquantizedLinearMethod)


def _is_rotated(module: torch.nn.Module, rotary: Any, attention: Any) -> bool:
    return (
        isinstance(rotary, Rotary)
        and isinstance(attention, Attention)
        and isinstance(attention.impl, K80AttentionImpl)
        and not attention.impl.shares_cache
        and rotary.head_size == attention.head_size
        and hands_over(type(module).forward, "rotary_emb", "attn", 2, 3)
    )


@functools.cache
def hands_over(
    forward: Callable[..., Any], first: str, second: str, results: int, arguments: int
) -> bool:
    """Whether a method hands the results of ``self.first`` to ``self.second`` and to nothing else.

    That is: two neighbouring statements of it, outside of any condition and loop, are
    ``a, ... = self.first(...)`` and ``b = self.second(a, ...)``, it has no other ``self.first`` and
    ``self.second``, and what the first assigned is not read after the second.

    Args:
        results: how many of the values that the first assigns are meant; the second gets them as
            its first arguments. arguments: how many the second takes in all.
    """
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError):  # it has no source, or none that stands alone
        return False
    if not isinstance(function, ast.FunctionDef):
        return False
    uses = [node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    if uses.count(first) != 1 or uses.count(second) != 1:
        return False
    body = function.body
    for index, (one, other) in enumerate(itertools.pairwise(body)):
        made, taken = _call(one, first), _call(other, second)
        if made is None or taken is None:
            continue
        handed = made[0][:results]
        if taken[1][:results] != handed or len(taken[1]) != arguments:
            return False
        read = {
            node.id
            for statement in body[index + 2 :]
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        return not (set(handed) - set(taken[0])) & read
    return False


def _call(statement: ast.stmt, attribute: str) -> tuple[list[str], list[str]] | None:
    """The names a statement assigns and passes, if it is ``a, ... = self.attribute(b, ...)``."""
    match statement:
        case ast.Assign(
            targets=[target],
            value=ast.Call(
                func=ast.Attribute(value=ast.Name(id="self"), attr=attr), args=passed, keywords=[]
            ),
        ) if attr == attribute:
            made = target.elts if isinstance(target, ast.Tuple) else [target]
            names = [node.id for node in (*made, *passed) if isinstance(node, ast.Name)]
            if len(names) == len(made) + len(passed):
                return names[: len(made)], names[len(made) :]
    return None
