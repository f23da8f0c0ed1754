"""vLLM with our plugin on whatever NVIDIA GPU is here: its tokens, its graphs, and its times.

Needs vLLM 0.10.1.1, torch with CUDA and `vllm_k80/kernels/vllm_k80.fatbin` (csrc/build.sh).

    python tests/test_smollm2.py GGUF > CPU.txt           # where there is no GPU
    python benchmarks/engine_on_gpu.py shape {7b,13b} [RESULT.json]
    python benchmarks/engine_on_gpu.py host {7b,13b} [RESULT.json]
    python benchmarks/engine_on_gpu.py smollm2 GGUF CPU.txt [RESULT.json]
    python benchmarks/engine_on_gpu.py memory MODEL {k80-w4,k80-w8,k80-f16} [RESULT.json]
    python benchmarks/engine_on_gpu.py bounded MODEL SECONDS [RESULT.json]
    python tests/test_formats_engine.py DIRECTORY         # where transformers can dequantize
    python benchmarks/engine_on_gpu.py formats DIRECTORY [RESULT.json]
    python benchmarks/engine_on_gpu.py families [RESULT.json]
    torchrun --nproc-per-node 2 benchmarks/engine_on_gpu.py {shape …,formats …}     # over two GPUs

`shape` runs a model of Llama 2's shape with random INT4 weights in our layout, made on the device:
there is no checkpoint, and its tokens mean nothing. `host` measures what a decode step of it takes
of the host's processor, beside a loop that is always the same. `smollm2` runs a real model, with
and without CUDA graphs, and compares its tokens with those of the CPU. `memory` compares what
torch's allocator has given out with what `vllm-k80 plan` says, of a model of that shape or one of
tools/models.json, with random weights. `bounded` gives an engine a die's memory and no more, and
for so long requests of every kind; a sequence may be as long as `vllm-k80 plan` says. `formats`
runs a tiny checkpoint of each format, the second time from the cache of weights, and compares its
tokens with those of its dequantized twin. `families` runs the tiny checkpoints of all proven
families (tests/test_models.py), in FP16 and in INT4, against Hugging Face's models in FP32 on the
CPU of the same host.
Results are added to RESULT.json. Exit status 1 if tokens or log-probabilities differ, memory by
more than 3 %, or a bounded engine was not put to it. Times are those of this GPU, not of
a K80.
"""

import ctypes
import gc
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

import models_table  # noqa: E402

# The engine in this very process, where its steps can be timed.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

SHAPES = {  # hidden size, feed-forward size, layers, heads
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}
# The models that `memory` takes, by name: of those shapes, and those of the table.
LISTED: dict[str, Any] = SHAPES | {each["name"]: each for each in models_table.MODELS}
CONTEXT, NEW_TOKENS, GROUP = 2048, 64, 128
VOCABULARY = 32000
BATCHES = (1, 8, 16)
PROFILED = 5  # steps
HOST_STEPS = 480
# By torchrun, each of which has an engine and drives its own GPU.
GPUS = int(os.environ.get("WORLD_SIZE", "1"))
TOGETHER = {
    "tensor_parallel_size": GPUS,
    "distributed_executor_backend": "external_launcher" if GPUS > 1 else None,
}
# Engines that follow each other in a process (`hold_memory`).
ONE_OF_MANY: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "gpu_memory_utilization": 0.2,
    "enforce_eager": True,  # torch 2.11 does not survive a second engine's graphs
    "seed": 0,
}


def wait_without_spinning() -> None:
    """Let the host sleep while it waits for the GPU, so that its CPU time is work alone."""
    driver, flag = ctypes.CDLL("libcuda.so.1"), 4  # CU_CTX_SCHED_BLOCKING_SYNC
    driver.cuInit(0)
    driver.cuDevicePrimaryCtxSetFlags_v2(0, flag)


def register_random_w4() -> None:
    """The quantization ``random_w4``: linear layers of random INT4 weights, made on the device."""
    import torch
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from vllm_k80.quantization import methods
    from vllm_k80.quantization.linear import PackedLinearMethod
    from vllm_k80.quantization.packed import PackedWeight

    methods.METHODS["random_w4"] = methods.Method("random weights of 4 bits")  # or it is refused

    class RandomLinear(PackedLinearMethod):
        def create_weights(
            self, layer, input_size_per_partition, output_partition_sizes, *_: Any, **__: Any
        ) -> None:
            rows, columns = sum(output_partition_sizes), input_size_per_partition
            qweight = torch.randint(256, (rows, columns // 2), dtype=torch.uint8)
            scale = torch.rand(rows, columns // GROUP, dtype=torch.float32).mul(0.01).half()
            self.weight = PackedWeight(qweight, scale, scale * -8)

        def pack(self, layer):
            return [self.weight]

    @register_quantization_config("random_w4")
    class RandomW4(QuantizationConfig):
        def get_name(self) -> str:
            return "random_w4"

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 37

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "RandomW4":
            return cls()

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            return RandomLinear() if isinstance(layer, LinearBase) else None


def model_runner(llm: Any) -> Any:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return worker.worker.model_runner


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def profile(step: Any, steps: int) -> dict[str, Any]:
    """Time on the GPU of a call of ``step``, and of its kernels: [launches, microseconds] each."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = [
        (event.key, event.count / steps, event.self_device_time_total / steps)
        for event in seen.key_averages()
        if event.self_device_time_total
    ]
    kernels.sort(key=lambda kernel: -kernel[2])
    return {
        "gpu_ms": round(sum(kernel[2] for kernel in kernels) / 1e3, 3),
        "operations": round(sum(kernel[1] for kernel in kernels), 1),
        "by_kernel_us": {name[:60]: [round(n, 1), round(us, 1)] for name, n, us in kernels[:14]},
    }


def serve(llm: Any, batch: int) -> tuple[dict[str, Any], list[list[int]]]:
    """Times of one batch through the engine, and the tokens."""
    from vllm import SamplingParams

    engine, runner = llm.llm_engine, model_runner(llm)
    launching: list[float] = []
    model = runner.model
    runner.model = _Timed(model, launching)
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
    )
    begun, first, tokens = time.perf_counter(), {}, {}
    for index in range(batch):
        prompt = [3 + (37 * index + 11 * i) % 31000 for i in range(CONTEXT - NEW_TOKENS)]
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)

    def step() -> None:
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - begun)
            tokens[output.request_id] = list(output.outputs[0].token_ids)

    while len(first) < batch:
        step()
    walls, cpus, calls = [], [], []
    for _ in range(30):
        launching.clear()
        wall, cpu = time.perf_counter(), time.thread_time()
        step()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.thread_time() - cpu)
        calls += launching
    decode = profile(step, PROFILED)
    while engine.has_unfinished_requests():
        step()
    runner.model = model
    times = {
        "batch": batch,
        "first_token_s": [round(min(first.values()), 3), round(max(first.values()), 3)],
        "step_ms": round(median(walls) * 1e3, 3),
        "tokens_per_second": round(batch / median(walls), 1),
        "cpu_ms_of_a_step": round(median(cpus) * 1e3, 3),
        "cpu_ms_of_the_model_call": round(median(calls) * 1e3, 3),
        "decode_step": decode,
    }
    return times, [tokens[str(index)] for index in range(batch)]


class _Timed:
    """A model whose calls are timed; all else is the model's."""

    def __init__(self, model: Any, times: list[float]) -> None:
        self._model, self._times = model, times

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = self._model(*args, **kwargs)
        self._times.append(time.perf_counter() - start)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def write_config(name: str, directory: Path) -> dict[str, Any]:
    """Write the config.json of a shape or of a model of the table; returns what is in it."""
    if name not in SHAPES:
        listed: dict[str, Any] = LISTED[name]["config"]
        kind = listed["architectures"][0].removesuffix("ForCausalLM").lower()
        config = {"model_type": {"gemma3": "gemma3_text"}.get(kind, kind)} | listed
        (directory / "config.json").write_text(json.dumps(config))
        return config
    hidden, feed_forward, layers, heads = SHAPES[name]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "torch_dtype": "float16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return config


def random_model(name: str) -> tuple[Any, dict[str, Any]]:
    """An engine with a model of this shape, warmed up, and the model's config.json."""
    wait_without_spinning()
    register_random_w4()
    from vllm import LLM

    with tempfile.TemporaryDirectory() as directory:
        config = write_config(name, Path(directory))
        llm = LLM(
            model=directory,
            skip_tokenizer_init=True,
            load_format="dummy",
            quantization="random_w4",
            dtype="float16",
            max_model_len=CONTEXT,
            max_num_seqs=max(BATCHES),
            max_num_batched_tokens=CONTEXT,
            gpu_memory_utilization=0.7,
            enable_prefix_caching=False,
            seed=0,
            **TOGETHER,
        )
    serve(llm, 1)
    return llm, config


def without_graphs(llm: Any) -> None:
    """Let an engine find none of its graphs."""
    from vllm.config import CUDAGraphMode

    runner = model_runner(llm)
    runner.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    runner.cudagraph_dispatcher.cudagraph_keys[CUDAGraphMode.FULL].clear()


def host(name: str) -> tuple[dict[str, Any], bool]:
    """Processor time of a decode step of one sequence; whether graphs give eager's tokens.

    Beside each step a loop is timed that is always the same. Where it takes longer than the
    fastest, others slow this processor down, by half and more on a host that is shared: steps
    between two loops that do not are told apart.
    """
    from vllm import SamplingParams

    llm, config = random_model(name)
    engine = llm.llm_engine
    result: dict[str, Any] = {"layers": config["num_hidden_layers"], "steps": HOST_STEPS}
    tokens = {}
    for mode in ("graphs", "eager"):
        if mode == "eager":
            without_graphs(llm)
        sampling = SamplingParams(
            temperature=0, max_tokens=HOST_STEPS + 8, ignore_eos=True, detokenize=False
        )
        engine.add_request("0", {"prompt_token_ids": [3 + i for i in range(1000)]}, sampling)
        for _ in range(4):
            engine.step()
        steps, loops = [], [fixed_loop()]
        for _ in range(HOST_STEPS):
            start = time.thread_time()
            engine.step()
            steps.append((time.thread_time() - start) * 1e3)
            loops.append(fixed_loop())
        while engine.has_unfinished_requests():
            [output] = engine.step()
        tokens[mode] = list(output.outputs[0].token_ids)
        undisturbed = [
            step
            for step, around in zip(steps, itertools.pairwise(loops), strict=True)
            if max(around) < 1.15 * min(loops)
        ]
        result[mode] = {
            "all_ms": spread(steps),
            "undisturbed": len(undisturbed),
            "undisturbed_ms": spread(undisturbed),
            "loop_ms": spread(loops),
        }
    result["same_tokens"] = tokens["graphs"] == tokens["eager"]
    return result, result["same_tokens"]


def fixed_loop() -> float:
    """Processor time, in milliseconds, of a loop that does nothing, so many times."""
    start = time.thread_time()
    for _ in range(20_000):
        pass
    return (time.thread_time() - start) * 1e3


def spread(values: list[float]) -> list[float]:
    """The least, the middle, nine tenths, the most."""
    ordered = sorted(values)
    places = (0, len(ordered) // 2, len(ordered) * 9 // 10, len(ordered) - 1)
    return [round(ordered[place], 3) for place in places] if ordered else []


def shape(name: str) -> tuple[dict[str, Any], bool]:
    """Times of a model of this shape, with graphs and without; whether the tokens are the same."""
    llm, config = random_model(name)
    runner = model_runner(llm)
    result: dict[str, Any] = {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "group": GROUP,
        "gpus": GPUS,
        "cudagraph_mode": str(runner.compilation_config.cudagraph_mode),
    }
    tokens = {}
    for mode in ("graphs", "eager"):
        if mode == "eager":
            without_graphs(llm)
        served = [serve(llm, batch) for batch in BATCHES]
        result[mode] = [times for times, _ in served]
        tokens[mode] = [generated for _, generated in served]
    result["same_tokens"] = tokens["graphs"] == tokens["eager"]
    return result, result["same_tokens"]


def hold_memory() -> None:
    """Lets engines follow each other in this process.

    vLLM takes an engine for which no memory had to be asked of the driver for one whose memory
    others have changed; torch keeps what the engine before had.
    """
    import torch

    from vllm_k80.worker import K80Worker

    load, held = K80Worker.load_model, []

    def load_and_hold(worker: Any) -> None:
        held.append(torch.empty(64 << 20, dtype=torch.uint8, device=worker.device))
        load(worker)

    K80Worker.load_model = load_and_hold


def formats(directory: Path) -> tuple[dict[str, Any], bool]:
    """Of each checkpoint whether its tokens are right, at the first start and from the cache."""
    import torch
    from vllm import LLM, SamplingParams

    hold_memory()
    jobs, expected, prompt = json.loads((directory / "jobs.json").read_text())
    if GPUS > 1:
        del jobs["gptq 4 bits"]  # whose columns are reordered
    result: dict[str, Any] = {"gpus": GPUS}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["VLLM_K80_CACHE"] = cache
        for name, options in jobs.items():
            options = {key: value.format(directory) for key, value in options.items()}
            right = []
            for _ in range(2):
                llm = LLM(
                    dtype="float32",  # as a K80 makes it of these; this card would take FP16
                    max_model_len=64,
                    max_num_seqs=2,
                    max_num_batched_tokens=2048,
                    **ONE_OF_MANY,
                    **options,
                    **TOGETHER,
                )
                sampling = SamplingParams(
                    temperature=0, max_tokens=len(expected[name]), ignore_eos=True
                )
                [output] = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
                right.append(list(output.outputs[0].token_ids) == expected[name])
                del llm
                gc.collect()
                torch.cuda.empty_cache()
            result[name] = right
        entries = len(list(Path(cache).glob("weights/*.safetensors")))
    result["cached"] = entries
    good = all(all(right) for right in result.values() if isinstance(right, list))
    return result, good and entries == len(jobs)


def families() -> tuple[dict[str, Any], bool]:
    """Of each family and storage: whether its tokens are right, and its worst log-probability's
    distance from the reference's."""
    import test_models as tiny
    import torch
    from vllm import LLM, SamplingParams

    hold_memory()
    sampling = SamplingParams(temperature=0, max_tokens=tiny.TOKENS, ignore_eos=True, logprobs=0)
    prompts = [{"prompt_token_ids": prompt} for prompt in tiny.PROMPTS]
    result: dict[str, Any] = {}
    good = True
    for name, storage in tiny.CASES:
        family, (_, tolerance) = tiny.FAMILIES[name], tiny.STORAGES[storage]
        with tempfile.TemporaryDirectory() as directory:
            model = tiny.saved(family, Path(directory))
            options = {"model": directory, "max_model_len": 128}
            llm = LLM(
                num_gpu_blocks_override=64,
                max_num_seqs=4,
                max_num_batched_tokens=16,
                **ONE_OF_MANY,
                **options | tiny.arguments_of(name, storage) | family.engine,
            )
        if storage == "W4":
            tiny.narrow(model)
        runs = [llm.generate(prompts, sampling, use_tqdm=False) for _ in range(2)]
        worst, behind = 0.0, 0.0
        for prompt, output in zip(tiny.PROMPTS, runs[0], strict=True):
            [best] = output.outputs
            tokens = list(best.token_ids)
            said = [at[token].logprob for token, at in zip(tokens, best.logprobs, strict=True)]
            expected, lacking = tiny.judge(family, model, prompt, tokens)
            worst = max(worst, *(abs(a - b) for a, b in zip(said, expected, strict=True)))
            behind = max(behind, *lacking)
        first, again = ([list(o.outputs[0].token_ids) for o in run] for run in runs)
        right = behind < 2 * tolerance and worst < tolerance and first == again
        cached = [output.num_cached_tokens for output in runs[1]] == tiny.CACHED_THEN
        good = good and right and cached
        result[f"{name}, {storage}"] = {
            "right": right,
            "from_prefix_cache": cached,
            "worst_logprob": round(worst, 5),
        }
        print(name, storage, result[f"{name}, {storage}"], flush=True)
        del llm
        gc.collect()
        torch.cuda.empty_cache()
    return result, good


def load_random_weights(directory: str) -> None:
    """Let the model of a config.json, which has no weights beside it, have random ones in FP16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from vllm_k80.quantization.loader import K80ModelLoader

    def weights(*_: Any) -> Iterator[tuple[str, Any]]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
        parts = dict(model.named_parameters())
        # One for all: billions of random numbers take minutes.
        numbers = torch.rand(max(part.numel() for part in parts.values()), dtype=torch.float16)
        for key, part in parts.items():
            yield key, numbers[: part.numel()].view(part.shape)

    K80ModelLoader.get_all_weights = weights


def memory(name: str, quantization: str) -> tuple[dict[str, Any], bool]:
    """Bytes of weights and of a token's KV cache, allocated and planned; whether they agree."""
    import torch
    from vllm import LLM

    from vllm_k80 import memory, plan
    from vllm_k80.worker import K80Worker

    load, determine = K80Worker.load_model, K80Worker.determine_available_memory
    result: dict[str, Any] = {}

    def load_and_look(worker: Any) -> None:
        before = torch.cuda.memory_allocated()
        load(worker)
        gc.collect()
        result["weights"] = [torch.cuda.memory_allocated() - before]

    def determine_and_look(worker: Any) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        size = determine(worker)
        result["work"] = [torch.cuda.max_memory_allocated() - before]
        specs = worker.get_kv_cache_spec().values()
        result["token"] = [sum(spec.page_size_bytes // spec.block_size for spec in specs)]
        return int(size)

    K80Worker.load_model, K80Worker.determine_available_memory = load_and_look, determine_and_look
    limits = memory.Limits(tokens=CONTEXT, sequences=max(BATCHES))
    dtype = "half" if name in SHAPES else models_table.dtype(LISTED[name])
    with tempfile.TemporaryDirectory() as directory:
        write_config(name, Path(directory))
        load_random_weights(directory)
        LLM(
            model=directory,
            skip_tokenizer_init=True,
            quantization=quantization,
            dtype=dtype,
            max_model_len=CONTEXT,
            max_num_seqs=limits.sequences,
            max_num_batched_tokens=limits.tokens,
            enforce_eager=True,
        )
        bits = {value: key for key, value in plan.WEIGHTS.items()}[quantization]
        settings = plan.Settings(dtype=dtype, weights=bits, context=CONTEXT, limits=limits)
        planned = plan.source(directory).model(settings)
    result["weights"].append(planned.loaded)
    # Without CUDA's context and libraries, which no allocator of torch's gives out.
    result["work"].append(memory.work(planned, limits))
    result["token"].append(planned.cache_of_a_token)
    allocated, expected = result["weights"]
    good = abs(allocated - expected) <= 0.03 * expected and len({*result["token"]}) == 1
    return {f"{what} allocated, planned": sizes for what, sizes in result.items()}, good


def give_a_dies_memory() -> int:
    """Let torch's allocator, and who asks the card, have no more; returns the allocator's bytes.

    The context is taken to be as large as it is planned. This card's own is larger.
    """
    import torch

    from vllm_k80 import device
    from vllm_k80.platform import K80Platform

    die, ask = device.K80_MEMORY, torch.cuda.mem_get_info
    context = device.work_bytes(tokens=0, sequences=0, vocabulary=0, hidden=0, widest=0)["context"]
    card = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((die - context) / card)

    def of_a_die(device: Any = None) -> tuple[int, int]:
        free, total = ask(device)
        return die - (total - free), die

    torch.cuda.mem_get_info = of_a_die
    K80Platform.get_device_total_memory = classmethod(lambda cls, device_id=0: die)
    return die - context


def bounded(name: str, seconds: int) -> tuple[dict[str, Any], bool]:
    """What an engine has done with a die's memory; whether it was enough."""
    import torch
    from vllm import LLM, SamplingParams

    from vllm_k80 import memory, plan

    allowed = give_a_dies_memory()
    with tempfile.TemporaryDirectory() as directory:
        config = write_config(name, Path(directory))
        for sequences in (memory.Limits().sequences, models_table.FEW):
            settings = plan.Settings(
                dtype="half", weights="int4", limits=memory.Limits(sequences=sequences)
            )
            planned = plan.judge(plan.source(directory), settings)
            if planned["largest_context"] >= min(CONTEXT, planned["context"]):
                break
        context = planned["largest_context"]
        load_random_weights(directory)
        llm = LLM(
            model=directory,
            skip_tokenizer_init=True,
            quantization="k80-w4",
            dtype="half",
            max_model_len=context,
            max_num_seqs=sequences,
            max_num_batched_tokens=memory.Limits().tokens,  # of a large card vLLM takes more
            seed=0,
        )
    engine, chance = llm.llm_engine, random.Random(0)
    scheduler = engine.engine_core.engine_core.scheduler
    preempted, again = [0], scheduler.waiting.prepend_request

    def counted(request: Any) -> None:
        preempted[0] += request.status.name == "PREEMPTED"
        again(request)

    scheduler.waiting.prepend_request = counted
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
        {"temperature": 0.7, "logprobs": 20, "seed": 1},
        {"temperature": 0, "prompt_logprobs": 20},
    ]
    sent, finished, fullest = 0, 0, 0.0
    begun, graphs = time.monotonic(), str(model_runner(llm).compilation_config.cudagraph_mode)
    while time.monotonic() - begun < seconds:
        while engine.get_num_unfinished_requests() < sequences + 8:
            # As many short as long ones, and each kind with the longest there can be.
            new = chance.randint(1, 128)
            length = min(round(context ** chance.uniform(0, 1.05)), context - new)
            prompt = [chance.randrange(3, config["vocab_size"]) for _ in range(max(1, length))]
            sampling = SamplingParams(
                max_tokens=new, ignore_eos=True, detokenize=False, **kinds[sent % len(kinds)]
            )
            engine.add_request(str(sent), {"prompt_token_ids": prompt}, sampling)
            sent += 1
        finished += sum(output.finished for output in engine.step())
        fullest = max(fullest, scheduler.kv_cache_manager.usage)
    stats = torch.cuda.memory_stats()
    result = {
        "context": context,
        "sequences": sequences,
        "graphs": graphs,
        "seconds": round(time.monotonic() - begun),
        "requests finished, under way at the end": [finished, sent - finished],
        "preempted": preempted[0],
        "fullest KV cache": round(fullest, 3),
        "KV cache tokens, planned": [
            llm.llm_engine.vllm_config.cache_config.num_gpu_blocks * memory.BLOCK,
            planned["kv_cache_tokens"],
        ],
        "allocator's bytes: most, allowed": [stats["reserved_bytes.all.peak"], allowed],
        "allocator had to give back and ask anew": stats["num_alloc_retries"],
    }
    return result, finished > 0 and fullest > 0.95


def smollm2_engine(gguf: Path, eager: bool) -> dict[str, Any]:
    """Tokens and log-probabilities of the test's prompts, in batches that shrink from 20 to 1."""
    from test_smollm2 import PROMPTS, TOKENS
    from vllm import LLM, SamplingParams

    from vllm_k80 import ops
    from vllm_k80.quantization.gguf_file import extract_metadata
    from vllm_k80.serve import metadata_cache

    metadata = str(extract_metadata(gguf, metadata_cache()))
    llm = LLM(
        model=str(gguf),
        tokenizer=metadata,
        hf_config_path=metadata,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=len(PROMPTS),
        enable_prefix_caching=False,
        enforce_eager=eager,
        gpu_memory_utilization=0.2,
    )
    options = {"temperature": 0, "ignore_eos": True, "logprobs": 5}
    ops.CALLS.clear()
    plain = llm.generate(PROMPTS, SamplingParams(max_tokens=TOKENS, **options), use_tqdm=False)
    calls = dict(ops.CALLS)
    shrinking = [SamplingParams(max_tokens=4 + 2 * i, **options) for i in range(len(PROMPTS))]
    shrunk = llm.generate(PROMPTS, shrinking, use_tqdm=False)
    return {
        "prompts": [list(output.prompt_token_ids) for output in plain],
        "tokens": [list(output.outputs[0].token_ids) for output in plain],
        "logprobs": [
            [sorted((token, p.logprob) for token, p in at.items()) for at in o.outputs[0].logprobs]
            for o in (*plain, *shrunk)
        ],
        "graphs": str(model_runner(llm).compilation_config.cudagraph_mode),
        "operator_calls": calls,
    }


def smollm2(gguf: str, cpu: str) -> tuple[dict[str, Any], bool]:
    """Whether tokens are those of the CPU, and graphs compute what eager execution does."""
    from engines import results_in

    [wanted] = results_in(Path(cpu).read_text())
    runs = {}
    for mode in ("eager", "graphs"):
        command = [sys.executable, __file__, "smollm2-engine", gguf, mode]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs[mode] = json.loads(done.stdout.splitlines()[-1])
    count = len(wanted["plain"])
    result = {
        "prompts": count,
        "tokens_of_each": len(wanted["plain"][0]),
        **{
            f"same_tokens_as_on_the_cpu_{mode}": sum(
                ours == theirs for ours, theirs in zip(run["tokens"], wanted["plain"], strict=True)
            )
            for mode, run in runs.items()
        },
        "logprobs_of_graphs_equal_to_the_last_bit": runs["graphs"]["logprobs"]
        == runs["eager"]["logprobs"],
        "logprobs_compared": sum(len(at) for run in runs["eager"]["logprobs"] for at in run),
        "mode": {mode: run["graphs"] for mode, run in runs.items()},
        "operator_calls": {mode: run["operator_calls"] for mode, run in runs.items()},
    }
    good = result["logprobs_of_graphs_equal_to_the_last_bit"] and all(
        run["tokens"] == wanted["plain"] for run in runs.values()
    )
    return result, good


def main() -> int:
    """Run one part, print its result and add it to the file."""
    apart = f"_{GPUS}_gpus" if GPUS > 1 else ""
    match sys.argv[1:]:
        case ["shape", ("7b" | "13b") as name, *file]:
            part, (result, good) = f"llama2_{name}_shape_random_int4{apart}", shape(name)
        case ["host", ("7b" | "13b") as name, *file]:
            part, (result, good) = f"llama2_{name}_shape_host", host(name)
        case ["formats", directory, *file]:
            part, (result, good) = f"formats{apart}", formats(Path(directory))
        case ["families", *file]:
            part, (result, good) = "families", families()
        case ["memory", name, ("k80-w4" | "k80-w8" | "k80-f16") as bits, *file] if name in LISTED:
            shown = f"llama2_{name}_shape" if name in SHAPES else name
            part, (result, good) = f"{shown}_{bits}_memory", memory(name, bits)
        case ["bounded", name, seconds, *file] if name in LISTED:
            shown = f"llama2_{name}_shape" if name in SHAPES else name
            part, (result, good) = f"{shown}_bounded", bounded(name, int(seconds))
        case ["smollm2", gguf, cpu, *file]:
            part, (result, good) = "smollm2", smollm2(gguf, cpu)
        case ["smollm2-engine", gguf, mode]:
            print(json.dumps(smollm2_engine(Path(gguf), mode == "eager")))
            return 0
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    import torch
    import vllm

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    path = Path(file[0]) if file else None
    results = json.loads(path.read_text()) if path and path.exists() else {}
    results |= {
        "date": datetime.now(UTC).date().isoformat(),
        "card": torch.cuda.get_device_name(0),
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[
            0
        ],
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "note": "compute_37 PTX, translated by this driver, on this host; not measured on a K80",
        part: result,
    }
    if os.environ.get("RANK", "0") != "0":
        return 0 if good else 1
    print(json.dumps({part: result}, indent=1))
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
