"""CUDA graphs for decode: for which batches, when, and the probe that allows them.

A decode step is hundreds of launches, and an old Xeon takes longer to launch them from Python than
a die takes to run them. Captured once for each batch size, they are a single one.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.logger import init_logger

from vllm_k80.ops import driver, k80

logger = init_logger("vllm.k80.graphs")


def sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: powers of two, and the largest batch; others are padded to these."""
    return sorted({1 << i for i in range(max_num_seqs.bit_length())} | {max_num_seqs})


def configure(vllm_config: Any, has_gpu: bool) -> None:
    """Ask for graphs of decode batches, or for eager execution where there can be none.

    Without a GPU or with ``--enforce-eager`` nothing is said; any other reason is logged.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if not has_gpu or model is None or model.enforce_eager:
        turn_off(vllm_config)
        return
    if parallel.pipeline_parallel_size > 1:
        turn_off(vllm_config, "they are not used where dies have other layers each (pipeline)")
        return
    compilation = vllm_config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    # What a first run sets up (kernels looked up, modules loaded) must not be captured.
    compilation.cudagraph_num_of_warmups = 1
    compilation.init_with_cudagraph_sizes(sizes(vllm_config.scheduler_config.max_num_seqs))


def turn_off(vllm_config: Any, reason: str | None = None) -> None:
    """Eager execution; the reason, if there is one, is logged."""
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    # Upstream sets the sizes for its own platforms only; the worker reads them always.
    vllm_config.compilation_config.init_with_cudagraph_sizes([])
    if vllm_config.model_config is not None:
        vllm_config.model_config.enforce_eager = True
    if reason is not None:
        logger.warning("Decode runs without CUDA graphs: %s.", reason)


def probe(device: torch.device) -> str | None:
    """Why this device must not use graphs, or None.

    A small decode step is captured, replayed on other data, and compared to the last bit. The dies
    that share a model all call it, and all get an answer if one must not.
    """
    reason = _all(_probe_step(device))
    if reason is None and get_tp_group().world_size > 1:
        reason = _all(_probe_sum(device))
    return reason


def _all(reason: str | None) -> str | None:
    """The first of all dies' reasons. One that went on alone would wait for the others for ever."""
    group = get_tp_group()
    if group.world_size == 1:
        return reason
    reasons: list[str | None] = [None] * group.world_size
    torch.distributed.all_gather_object(reasons, reason, group=group.cpu_group)
    return next(filter(None, reasons), None)


def _probe_step(device: torch.device) -> str | None:
    if not driver.available():
        return "this installation has no compiled kernels"
    try:
        step = _Step(device)
        step.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = step.run()
        step.change()
        expected = step.run()
        graph.replay()
        if not torch.equal(replayed, expected):
            return "a replayed graph did not compute what its operators do"
    except Exception as error:  # whatever this driver answers
        return f"the probe failed ({error})"
    return None


def _probe_sum(device: torch.device) -> str | None:
    """The same of the sum over the dies, which ends attention and feed-forward layer."""
    try:
        x = torch.arange(256, device=device, dtype=torch.float32) + get_tp_group().rank_in_group
        tensor_model_parallel_all_reduce(x)  # connects, which must not be captured
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = tensor_model_parallel_all_reduce(x)
        x.mul_(3)
        expected = tensor_model_parallel_all_reduce(x)
        graph.replay()
        if not torch.equal(replayed, expected):
            return "a replayed sum over the dies was not that of their numbers"
    except Exception as error:
        return f"the probe of a sum over the dies failed ({error})"
    return None


class _Step:
    """A layer's decode step of two sequences, by our operators, on data that can change."""

    _SIZE, _BLOCK, _TABLE = 64, 16, 4

    def __init__(self, device: torch.device) -> None:
        self._random = torch.Generator().manual_seed(37)
        self._device = device
        size, blocks = self._SIZE, 2 * self._TABLE
        self.x, self.norm = self._draw(2, size), self._draw(size)
        qweight = torch.randint(256, (size, size // 2), generator=self._random, dtype=torch.uint8)
        self.weight = (qweight.to(device), self._draw(size, 2), self._draw(size, 2))
        self.cos_sin_cache = self._draw(self._TABLE * self._BLOCK, size)
        self.kv_cache = self._draw(2, blocks, self._BLOCK, 1, size)
        self.block_table = torch.arange(blocks, device=device, dtype=torch.int32).view(2, -1)
        self.seq_lens = torch.ones(2, device=device, dtype=torch.int32)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random).to(self._device)

    def change(self) -> None:
        """Other activations and longer sequences, in the same tensors."""
        self.x.copy_(self._draw(*self.x.shape))
        self.seq_lens.copy_(torch.tensor([40, 57]))

    def run(self) -> Tensor:
        """[2, _SIZE / 2] FP32."""
        size, longest = self._SIZE, self._TABLE * self._BLOCK
        query = k80.linear_w4(k80.rms_norm(self.x, self.norm, 1e-5), *self.weight)
        positions = self.seq_lens.long() - 1
        query = query.view(2, 1, size)
        slots = self.block_table[:, 0] * self._BLOCK + positions
        key, value = self.x.view(query.shape).clone(), query.clone()
        cache = self.cos_sin_cache, True, self.kv_cache, slots
        k80.rotary_and_cache(positions, query, key, value, *cache)
        out = torch.empty_like(query)
        lengths = (self.seq_lens, self.block_table, longest)
        k80.paged_attention(query, self.kv_cache, out, *lengths, size**-0.5)
        y, _ = k80.fused_add_rms_norm(out.view(2, size), self.x, self.norm, 1e-5)
        return k80.linear_w4(y, *self.weight, None, None, True)
