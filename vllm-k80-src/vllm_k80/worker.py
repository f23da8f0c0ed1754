"""Upstream's worker and model runner, on a die and on a host without a GPU.

On a GPU a probe comes first, and upstream's own classes run unchanged. Without one only what asks
for a CUDA device is replaced; scheduling, batching, sampling and the model are the same code.
"""

import os

import torch
from vllm.logger import init_logger
from vllm.model_executor.utils import set_random_seed
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment

from vllm_k80 import device, fusion, graphs
from vllm_k80.platform import K80Platform, cpu_kv_cache_limit

logger = init_logger("vllm.k80.worker")

_SMX_OF_A_DIE = 13  # GK210 as it is on a K80


class K80Worker(Worker):
    """`Worker`, with CUDA graphs only on a die that replays them rightly."""

    def init_device(self) -> None:
        super().init_device()
        if self.model_config.enforce_eager:
            return
        if reason := graphs.probe(self.device):
            graphs.turn_off(self.vllm_config, reason)

    def load_model(self) -> None:
        super().load_model()
        fusion.fuse(self.model_runner.get_model())


class ReferenceModelRunner(GPUModelRunner):
    """`GPUModelRunner` with the CPU as its device."""

    def _init_device_properties(self) -> None:
        self.num_sms = _SMX_OF_A_DIE

    def _sync_device(self) -> None:
        """Nothing runs asynchronously."""


class ReferenceWorker(Worker):
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
        model = self.model_runner.get_model()
        tensors = {
            tensor.data_ptr(): tensor.numel() * tensor.element_size()
            for group in (model.parameters(), model.buffers())
            for tensor in group
        }
        # The largest activation by far is the output of the language model head, in FP32.
        rows = min(self.scheduler_config.max_num_seqs, self.scheduler_config.max_num_batched_tokens)
        activations = 4 * rows * self.model_config.get_vocab_size()
        budget = device.kv_cache_bytes(
            K80Platform.get_device_total_memory(),
            self.cache_config.gpu_memory_utilization,
            sum(tensors.values()),
            activations,
        )
        return min(budget, cpu_kv_cache_limit())

    def compile_or_warm_up_model(self) -> None:
        set_random_seed(self.model_config.seed)
