"""Collectives of a tensor-parallel group on a host without a GPU."""

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase


class GlooCommunicator(DeviceCommunicatorBase):
    """gloo of torch 2.0.1 has no all-gather into one tensor; NCCL does."""

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        if self.world_size == 1:
            return input_
        parts = [torch.empty_like(input_) for _ in range(self.world_size)]
        dist.all_gather(parts, input_.contiguous(), group=self.device_group)
        return torch.cat(parts, dim)
