"""How errors and times are measured on a GPU."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    if not exact.numel():
        return 0.0
    return ((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


def microseconds(function: Any) -> float:
    """Median time of a call on the GPU, over 20 batches of 50."""
    for _ in range(20):
        function()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(50):
            function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 50 * 1e3)
    return sorted(times)[len(times) // 2]


def graph_microseconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Median time of a call on the GPU when ``calls`` are replayed as one CUDA graph.

    No time of the host is in it. Give calls on different data, more than the L2 cache holds, to
    see the memory's speed.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls) * 1e3)
    return sorted(times)[len(times) // 2]


def host_microseconds(function: Any) -> float:
    """Median time that the host spends on a call, without waiting for the GPU."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            function()
        times.append((time.perf_counter() - start) / 20 * 1e6)
    return sorted(times)[len(times) // 2]
