"""Upstream's worker and model runner, on a die and on a host without a GPU.

On a GPU a probe comes first, and prompts are scored in parts. Without one only what asks for a CUDA
device is replaced as well; scheduling, batching, sampling and the model are upstream's code.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.utils import set_random_seed
from vllm.v1.core.kv_cache_utils import max_memory_usage_bytes
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment

from vllm_k80 import device, fusion, graphs, plan, readiness
from vllm_k80.errors import UserError
from vllm_k80.memory import Limits
from vllm_k80.platform import K80Platform, cpu_kv_cache_limit

logger = init_logger("vllm.k80.worker")

_SMX_OF_A_DIE = 13  # GK210 as it is on a K80
# Of a prompt that is scored, bytes a logit: the product and its copy, their logarithms in FP32, and
# what ranks them. And the fewest tokens at a time, which read the head's weights once.
_SCORE, _FEWEST_SCORED = 16, 32


def kv_cache_bytes(worker: Worker, profiled: int | None = None) -> int:
    """Bytes for the KV cache, by the account of `vllm-k80 plan` and the weights that are loaded.

    Args:
        worker: with its model loaded. profiled: what upstream's run on the die has found left.

    Raises:
        ValueError: no sequence of the longest context fits; it names the nearest choice that does.
    """
    model, parallel, cache = worker.model_config, worker.parallel_config, worker.cache_config
    scheduler, text = worker.scheduler_config, worker.model_config.hf_text_config
    loaded = worker.model_runner.get_model()
    tensors = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for tensor in (*loaded.parameters(), *loaded.buffers())
    }
    hidden = model.get_hidden_size()
    names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    inner = next((size for name in names if (size := getattr(text, name, None))), 4 * hidden)
    if not isinstance(inner, int):  # a number for each layer
        inner = max(inner)
    width = model.get_num_attention_heads(parallel) * model.get_head_size()
    limits = Limits(
        K80Platform.get_device_total_memory(),
        cache.gpu_memory_utilization,
        scheduler.max_num_batched_tokens,
        scheduler.max_num_seqs,
    )
    work = device.work_bytes(
        tokens=limits.tokens,
        sequences=limits.sequences,
        vocabulary=model.get_vocab_size(),
        hidden=hidden,
        widest=max(inner // parallel.tensor_parallel_size, width),
    )
    # When prompts are scored, the buffers of a step's layers and of its choice are free.
    free = work["activations"] + work["sampling"]
    worker.model_runner.scored = max(_FEWEST_SCORED, free // (_SCORE * model.get_vocab_size()))
    left = device.bytes_left(
        limits.total, limits.utilization, sum(tensors.values()), sum(work.values())
    )
    left = left if profiled is None else min(left, profiled)
    specs = worker.get_kv_cache_spec().values()
    needed = max_memory_usage_bytes(worker.vllm_config, specs)
    needed += sum(spec.page_size_bytes for spec in specs)  # the block that vLLM keeps empty
    if left < needed:
        raise ValueError(_refusal(worker, limits, left, needed))
    return left


def _refusal(worker: Worker, limits: Limits, left: int, needed: int) -> str:
    model = worker.model_config
    path, quantization = Path(model.model), model.quantization
    settings = plan.Settings(
        context=model.max_model_len,
        dtype="half" if model.dtype == torch.float16 else "float",
        weights={name: bits for bits, name in plan.WEIGHTS.items()}.get(quantization),
        dies=worker.parallel_config.tensor_parallel_size,
        limits=limits,
    )
    try:
        if path.suffix == ".gguf":
            source = plan.source(str(path))
        else:
            source = plan.Source(path.name, model.model, model.hf_config.to_dict())
        if said := plan.refusal(source, settings, left):
            return said
    except (UserError, TypeError, ValueError, LookupError):  # a build that the plan does not know
        pass
    return (
        f"{path.name} does not fit: a sequence of {model.max_model_len:,} tokens needs "
        f"{needed / 1e9:.2f} GB of KV cache, and {max(left, 0) / 1e9:.2f} GB are left. Lower "
        f"--max-model-len or --max-num-seqs, or use a quantized checkpoint."
    )


class K80ModelRunner(GPUModelRunner):
    """`GPUModelRunner` that notes each step, and scores a prompt in parts.

    Upstream makes the logits of all of a step's tokens at once for ``prompt_logprobs``: of 2,048
    tokens and a vocabulary of 128,256 they and their copies take 3 GB, which no die has left.
    """

    scored = _FEWEST_SCORED  # tokens at a time (`kv_cache_bytes`)

    def execute_model(self, *args: Any, **options: Any) -> Any:
        output = super().execute_model(*args, **options)
        readiness.note_step()
        return output

    def _get_prompt_logprobs_dict(
        self, hidden_states: torch.Tensor, scheduler_output: SchedulerOutput
    ) -> dict[str, LogprobsTensors | None]:
        asked, scheduled = (
            self.input_batch.num_prompt_logprobs,
            scheduler_output.num_scheduled_tokens,
        )
        scored: dict[str, LogprobsTensors | None] = {}
        for name in [*asked]:
            request, tokens = self.requests[name], scheduled[name]
            if request.output_token_ids:  # begun anew, after its prompt's scores were sent
                del asked[name]
                continue
            computed = request.num_computed_tokens
            alone = {name: asked[name]}
            self.input_batch.num_prompt_logprobs = alone
            for start in range(0, tokens, self.scored):
                request.num_computed_tokens = computed + start
                scheduled[name] = min(self.scored, tokens - start)
                scored |= super()._get_prompt_logprobs_dict(hidden_states[start:], scheduler_output)
            request.num_computed_tokens, scheduled[name] = computed, tokens
            if not alone:  # upstream takes out what is done
                del asked[name]
        self.input_batch.num_prompt_logprobs = asked
        return scored


class _Worker(Worker):
    """`Worker` that, of several dies, ends its process when it fails.

    The others wait for it in a sum that never comes, and of errors upstream hears the first die's
    alone.
    """

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        with self.ending():
            return super().execute_model(scheduler_output)

    def compile_or_warm_up_model(self) -> None:
        with self.ending():
            super().compile_or_warm_up_model()

    @contextmanager
    def ending(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            if self.parallel_config.world_size == 1:
                raise
            logger.exception("Die %d has failed, and ends the engine.", self.rank)
            os._exit(1)


class K80Worker(_Worker):
    """`Worker`, with CUDA graphs only on a die that replays them rightly.

    Of memory it takes what was planned, or less where upstream's profiling run finds less.
    """

    def determine_available_memory(self) -> int:
        with self.ending():
            return kv_cache_bytes(self, super().determine_available_memory())

    def init_device(self) -> None:
        super().init_device()
        if self.model_config.enforce_eager:
            return
        if reason := graphs.probe(self.device):
            graphs.turn_off(self.vllm_config, reason)

    def load_model(self) -> None:
        # Upstream names the class of its runner in `init_device`.
        self.model_runner.__class__ = K80ModelRunner
        super().load_model()
        fusion.fuse(self.model_runner.get_model())


class ReferenceModelRunner(K80ModelRunner):
    """`K80ModelRunner` with the CPU as its device."""

    def _init_device_properties(self) -> None:
        self.num_sms = _SMX_OF_A_DIE

    def _sync_device(self) -> None:
        """Nothing runs asynchronously."""


class ReferenceWorker(_Worker):
    """`Worker` whose die is a CPU; memory is budgeted as on a die."""

    def init_device(self) -> None:
        if "OMP_NUM_THREADS" not in os.environ:
            # Several instances share a host; spinning threads of one would starve the others.
            torch.set_num_threads(1)
        self.device = torch.device("cpu")
        init_worker_distributed_environment(
            self.vllm_config,
            self.rank,
            self.distributed_init_method,
            self.local_rank,
            K80Platform.dist_backend,
        )
        set_random_seed(self.model_config.seed)
        self.model_runner = ReferenceModelRunner(self.vllm_config, self.device)
        if self.rank == 0:
            logger.warning(
                "No CUDA device: the reference operators run on the CPU. Results are those of a "
                "K80 die, speed is not."
            )

    def load_model(self) -> None:
        self.model_runner.load_model()
        fusion.fuse(self.model_runner.get_model())

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache: what a die would have, within what the host may spend."""
        with self.ending():
            return min(kv_cache_bytes(self), cpu_kv_cache_limit())

    def compile_or_warm_up_model(self) -> None:
        set_random_seed(self.model_config.seed)
