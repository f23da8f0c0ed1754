"""Which batches decode captures in CUDA graphs, and what keeps it from that."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from vllm.config import CompilationConfig, CUDAGraphMode, ParallelConfig
from vllm.v1.attention.backends.utils import AttentionCGSupport
from vllm.v1.worker.gpu_worker import Worker

from vllm_k80 import graphs, platform
from vllm_k80.attention import K80MetadataBuilder
from vllm_k80.ops import driver
from vllm_k80.worker import K80Worker


def config(
    enforce_eager: bool = False, dies: int = 1, stages: int = 1, max_num_seqs: int = 20
) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            enforce_eager=enforce_eager,
            dtype=torch.float32,
            disable_cascade_attn=False,
            hf_config=LlamaConfig(architectures=["LlamaForCausalLM"]),
        ),
        cache_config=SimpleNamespace(block_size=None),
        compilation_config=CompilationConfig(),
        parallel_config=ParallelConfig(tensor_parallel_size=dies, pipeline_parallel_size=stages),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
    )


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    """The texts logged so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name == graphs.logger.name]


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (16, [1, 2, 4, 8, 16]), (20, [1, 2, 4, 8, 16, 20])],
)
def test_sizes(largest: int, expected: list[int]) -> None:
    assert graphs.sizes(largest) == expected


@pytest.mark.parametrize("dies", [1, 2])
def test_a_gpu_captures_decode_batches(
    dies: int, monkeypatch: pytest.MonkeyPatch, warnings: Any
) -> None:
    monkeypatch.setattr(platform, "HAS_GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (3, 7))
    asked = config(dies=dies)
    platform.K80Platform.check_and_update_config(asked)
    compilation = asked.compilation_config
    assert compilation.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
    assert compilation.cudagraph_capture_sizes == [20, 16, 8, 4, 2, 1]
    assert compilation.bs_to_padded_graph_size[3:6] == [4, 4, 8]
    assert compilation.cudagraph_num_of_warmups == 1
    assert not asked.model_config.enforce_eager
    assert asked.parallel_config.worker_cls == "vllm_k80.worker.K80Worker"
    assert not warnings()
    support = K80MetadataBuilder.cudagraph_support
    assert support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


@pytest.mark.parametrize(
    ("has_gpu", "options", "said"),
    [
        (False, {}, None),
        (True, {"enforce_eager": True}, None),
        (
            True,
            {"stages": 2},
            "they are not used where dies have other layers each (pipeline)",
        ),
    ],
)
def test_eager(has_gpu: bool, options: Any, said: str | None, warnings: Any) -> None:
    asked = config(**options)
    graphs.configure(asked, has_gpu)
    assert asked.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    assert asked.compilation_config.cudagraph_capture_sizes == []
    assert asked.compilation_config.compile_sizes == []
    assert asked.model_config.enforce_eager
    assert warnings() == ([f"Decode runs without CUDA graphs: {said}."] if said else [])


@pytest.mark.parametrize("reason", [None, "a reason"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_worker_probes_its_die(
    reason: str | None, enforce_eager: bool, monkeypatch: pytest.MonkeyPatch, warnings: Any
) -> None:
    probed = []
    monkeypatch.setattr(graphs, "probe", lambda device: probed.append(device) or reason)
    monkeypatch.setattr(Worker, "init_device", lambda self: None)
    worker = object.__new__(K80Worker)
    worker.vllm_config, worker.device = config(enforce_eager), torch.device("cuda:0")
    worker.model_config = worker.vllm_config.model_config
    graphs.configure(worker.vllm_config, has_gpu=True)
    worker.init_device()
    assert probed == ([] if enforce_eager else [worker.device])
    assert worker.model_config.enforce_eager == (enforce_eager or reason is not None)
    used = worker.vllm_config.compilation_config.cudagraph_mode
    assert (used == CUDAGraphMode.NONE) == worker.model_config.enforce_eager
    said = ["Decode runs without CUDA graphs: a reason."]
    assert warnings() == (said if reason and not enforce_eager else [])


def test_the_probe_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    monkeypatch.setattr(driver, "available", lambda: False)
    assert graphs.probe(torch.device("cpu")) == "this installation has no compiled kernels"
    monkeypatch.setattr(driver, "available", lambda: True)
    assert str(graphs.probe(torch.device("cpu"))).startswith("the probe failed (")


@pytest.mark.parametrize(
    ("reasons", "said", "sums"),
    [
        ([None, None], None, 1),
        ([None, "a reason"], "a reason", 0),
        (["a reason"] * 2, "a reason", 0),
    ],
)
def test_dies_that_share_a_model_agree(
    reasons: list[str | None], said: str | None, sums: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that captured what another runs eagerly would wait for it for ever."""
    told, summed = [], []

    def gather(into: list[Any], mine: str | None, group: str) -> None:
        told.append((mine, group))
        into[:] = reasons

    group = SimpleNamespace(world_size=2, cpu_group="of the host")
    monkeypatch.setattr(graphs, "get_tp_group", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(graphs, "_probe_step", lambda device: reasons[0])
    monkeypatch.setattr(graphs, "_probe_sum", lambda device: summed.append(device))
    assert graphs.probe(torch.device("cpu")) == said
    assert len(summed) == sums
    assert told == [(reasons[0], "of the host")] + [(None, "of the host")] * sums


def test_the_step_of_the_probe_depends_on_what_changes() -> None:
    step = graphs._Step(torch.device("cpu"))
    first, again = step.run(), step.run()
    assert torch.equal(first, again)
    step.x.copy_(step._draw(*step.x.shape))
    second = step.run()
    step.seq_lens.fill_(40)
    third = step.run()
    assert third.isfinite().all()
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
