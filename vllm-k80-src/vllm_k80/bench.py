"""``vllm-k80 bench``: how fast a server answers, measured over HTTP.

vLLM's own serving benchmark, where it fits: its random data set, its request function and its
metrics. What is ours is the sweep around them. Prompts are token numbers, so no tokenizer is needed
and their lengths are exact; the server counts what it generates. A server that caches prefixes is
given a salt for each run, or a second run would find the first one's prompts computed.
"""

import asyncio
import errno
import json
import os
import platform
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_k80 import bench_report, info, predict, probe
from vllm_k80.errors import UserError

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Settings:
    """What is sent; `concurrency` and `prompt_lengths` are the two sweeps."""

    concurrency: tuple[int, ...] = (1, 2, 4, 8)
    prompt_lengths: tuple[int, ...] = (128, 512, 1024)
    prompt_tokens: int = 256
    output_tokens: int = 64
    requests: int = 32
    seed: int = 0
    vocabulary: int = 32000
    timeout: float = 600.0
    soak: float = 0.0  # seconds of the largest concurrency after all else


@dataclass(frozen=True)
class Step:
    """Requests of one shape, so many at once."""

    sweep: str  # concurrency, prompt_length or soak
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    requests: int
    at_least: float = 0.0  # seconds in which it goes on, with as many requests again and again

    @property
    def name(self) -> str:
        """For a person."""
        if self.sweep == "concurrency":
            return f"{self.concurrency} at once"
        if self.sweep == "soak":
            return f"soak, {self.concurrency} at once"
        return f"prompt of {self.prompt_tokens}"


class _NoTokenizer:
    """What vLLM's random data set asks of a tokenizer: with this one a prompt stays numbers."""

    def __init__(self, vocabulary: int) -> None:
        self.vocab_size = vocabulary

    def num_special_tokens_to_add(self) -> int:
        return 0

    def decode(self, tokens: list[int]) -> list[int]:
        return tokens

    def encode(self, tokens: list[int], add_special_tokens: bool) -> list[int]:
        return tokens


def steps(settings: Settings) -> list[Step]:
    """All of a run: the concurrencies, single prompts of each length, and the soak."""
    planned = [
        Step(
            "concurrency",
            concurrency,
            settings.prompt_tokens,
            settings.output_tokens,
            max(settings.requests, concurrency),
        )
        for concurrency in settings.concurrency
    ] + [
        Step("prompt_length", 1, length, 1, max(1, settings.requests // 4))
        for length in settings.prompt_lengths
    ]
    if settings.soak:
        most = max(settings.concurrency)
        shape = settings.prompt_tokens, settings.output_tokens, most
        planned.append(Step("soak", most, *shape, at_least=settings.soak))
    return planned


# ---- measuring


async def _measure(
    url: str, model: str, step: Step, settings: Settings, seed: int, salt: str
) -> tuple[Any, list[Any], float]:
    """vLLM's metrics, its outputs and the seconds of a step, after a warm-up.

    There are no metrics where every request failed; why is in the outputs.
    """
    import aiohttp
    from tqdm import tqdm
    from vllm.benchmarks.datasets import RandomDataset
    from vllm.benchmarks.lib.endpoint_request_func import (
        RequestFuncInput,
        async_request_openai_completions,
    )
    from vllm.benchmarks.serve import calculate_metrics

    def draw(number: int, count: int) -> list[Any]:
        # Each draw has a seed of its own: what is sent twice would be in the prefix cache.
        samples: list[Any] = RandomDataset(random_seed=(seed + number) % 2**32).sample(
            _NoTokenizer(settings.vocabulary),
            count,
            input_len=step.prompt_tokens,
            output_len=step.output_tokens,
        )
        return samples

    at_once = asyncio.Semaphore(step.concurrency)

    async def one(session: aiohttp.ClientSession, sample: Any, bar: Any) -> Any:
        async with at_once:
            output = await async_request_openai_completions(
                RequestFuncInput(
                    model=model,
                    prompt=sample.prompt,
                    api_url=f"{url}/v1/completions",
                    prompt_len=sample.prompt_len,
                    output_len=sample.expected_output_len,
                    ignore_eos=True,
                    extra_body={"cache_salt": salt},
                ),
                session=session,
                pbar=bar,
            )
        if output.success and output.output_tokens != step.output_tokens:
            # A stream that was cut, or that ended in an error; vLLM's function does not see that.
            output.success = False
            output.error = f"{output.output_tokens or 'no'} tokens instead of {step.output_tokens}"
        return output

    connector = aiohttp.TCPConnector(limit=step.concurrency)
    timeout = aiohttp.ClientTimeout(total=settings.timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(one(session, each, None) for each in draw(0, step.concurrency)))
        sent: list[Any] = []
        outputs: list[Any] = []
        with tqdm(total=step.requests, desc=step.name, unit="request", disable=None) as bar:
            began = time.perf_counter()
            seconds = 0.0
            while not outputs or seconds < step.at_least:
                batch = draw(len(sent) + 1, step.requests)
                outputs += await asyncio.gather(*(one(session, each, bar) for each in batch))
                sent += batch
                seconds = time.perf_counter() - began
    if not any(output.success for output in outputs):
        return None, outputs, seconds
    # Without a tokenizer, which it would ask only where the server has not counted.
    return calculate_metrics(sent, outputs, seconds, None, PERCENTILES, {})[0], outputs, seconds


def _reason(error: str, timeout: float) -> str:
    """In a line, what vLLM's function gives as a status' reason or a whole traceback."""
    last = (error.strip().splitlines() or ["no reason was given"])[-1]
    return f"no end within {timeout:g} s" if "TimeoutError" in last else last


def _times(metrics: Any, name: str) -> dict[str, float]:
    """Milliseconds, as vLLM computes them."""
    percentiles = {f"p{p}": ms for p, ms in getattr(metrics, f"percentiles_{name}_ms")}
    values = {"mean": getattr(metrics, f"mean_{name}_ms")} | percentiles
    return {key: round(float(ms), 2) for key, ms in values.items()}


def _result(step: Step, metrics: Any, outputs: list[Any], seconds: float, timeout: float) -> Any:
    """A step's result as plain data."""
    failures = Counter(_reason(o.error, timeout) for o in outputs if not o.success)
    return asdict(step) | {
        "requests": len(outputs),
        "failed": failures.total(),
        "failures": dict(failures),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(float(metrics.output_throughput), 3),
        "requests_per_second": round(float(metrics.request_throughput), 4),
        "ttft_ms": _times(metrics, "ttft"),
        # Of a single token there is no time to the next.
        "tpot_ms": _times(metrics, "tpot") if step.output_tokens > 1 else None,
        "latency_ms": _times(metrics, "e2el"),
        # In the order in which they were sent.
        "each": [
            {"ttft_ms": round(o.ttft * 1e3, 3), "latency_ms": round(o.latency * 1e3, 3)}
            if o.success
            else None
            for o in outputs
        ],
    }


# ---- what is asked before anything is measured


def _model(url: str, wanted: str | None, settings: Settings, planned: list[Step]) -> str:
    """The name of the model to ask for, once a request of the largest shape has succeeded."""
    try:
        served = {model["id"]: model for model in probe.ask(f"{url}/v1/models", None, 30)["data"]}
    except (KeyError, TypeError):
        raise UserError(f"{url}/v1/models lists no models. Is it a vLLM server?") from None
    name = wanted or next(iter(served), "")
    if name not in served or (wanted is None and len(served) > 1):
        raise UserError(
            f"{url} serves {', '.join(served) or 'no model'}: name one of them with --model."
        )
    longest = max(step.prompt_tokens + step.output_tokens for step in planned)
    limit = served[name].get("max_model_len")
    if limit is not None and longest > limit:
        raise UserError(
            f"{name} is served with {limit} tokens at most, {longest} would be needed: lower "
            f"--prompt-tokens, --output-tokens or --prompt-lengths."
        )
    # A whole request, for what else may be wrong is then said by the server, in its words.
    step = max(planned, key=lambda step: step.prompt_tokens + step.output_tokens)
    body = {"model": name, "prompt": [settings.vocabulary - 1] * step.prompt_tokens}
    body |= {"max_tokens": step.output_tokens, "ignore_eos": True}
    probe.ask(f"{url}/v1/completions", body, settings.timeout)
    return name


def _predicted(
    path: str | None, dtype: str, weights: str | None, settings: Settings
) -> dict[str, Any]:
    """What `vllm-k80 predict` says of these steps on one die; or why it says nothing."""
    if path is None:
        return {"none": "no model was named to predict (--predict)."}
    try:
        model = predict.known(path, dtype, weights)
        context = settings.prompt_tokens + settings.output_tokens
        answer = predict.judge(model, context, settings.concurrency)
    except UserError as error:
        return {"none": str(error)}
    return {
        "context": context,
        "decode": answer["decode"],
        "first_token_s": [
            [length, predict.first_token(model, length)] for length in settings.prompt_lengths
        ],
    }


def measure(
    url: str,
    model: str | None,
    settings: Settings,
    about: dict[str, str],
    prediction: dict[str, Any],
) -> dict[str, Any]:
    """Run all steps; the result as plain data.

    Args:
        url: base address of the server, without ``/v1``.
        model: as it is served; needed where several are.
        settings: what is sent.
        about: what the user says of server and card, which HTTP does not tell.
        prediction: from `_predicted`.

    Raises:
        UserError: the server refuses or does not answer, or every request of a step failed.
    """
    planned = steps(settings)
    # vLLM's function takes the key from OpenAI's variable.
    os.environ["OPENAI_API_KEY"] = os.environ.get("VLLM_API_KEY", "")
    name = _model(url, model, settings, planned)
    began, salt = time.time(), uuid.uuid4().hex
    results = []
    for number, step in enumerate(planned):
        measured = asyncio.run(
            _measure(url, name, step, settings, (settings.seed << 16) + (number << 8), salt)
        )
        metrics, outputs, seconds = measured
        if metrics is None:
            reason = _reason(outputs[0].error, settings.timeout)
            raise UserError(f"{url}, {step.name}: every request failed: {reason}.")
        results.append(_result(step, metrics, outputs, seconds, settings.timeout))
    return {
        "versions": {name: info.version_of(name) for name in ("vllm-k80", "vllm")},
        "began": datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
        "epoch": [round(began, 1), round(time.time(), 1)],
        "url": url,
        "model": name,
        "about": about,
        "client": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} processors",
        "settings": asdict(settings),
        "steps": results,
        "predicted": prediction,
        "samples": {},
    }


def run(
    url: str,
    model: str | None,
    settings: Settings,
    *,
    about: dict[str, str],
    predict_of: tuple[str | None, str, str | None],
    samples: Sequence[Path],
    output: Path,
) -> str:
    """Measure, write result.json, result.csv and report.html, and return them as a table.

    Raises:
        UserError: what cannot be measured or written, and why.
    """
    for name, values in asdict(settings).items():
        least = {"seed": 0, "soak": 0, "timeout": 0.001}.get(name, 1)
        if min(values if isinstance(values, tuple) else (values,)) < least:
            raise UserError(f"--{name.replace('_', '-')}: it must be at least {least}.")
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url {url}: it must begin with http:// or https://.")
    bench_report.samples(samples, 0, 0)  # what is wrong with them is said before it takes long
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}.") from None
    result = measure(url, model, settings, about, _predicted(*predict_of, settings))
    result["samples"] = bench_report.samples(samples, *result["epoch"])
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "result.csv").write_text(bench_report.table_csv(result))
    (output / "report.html").write_text(bench_report.page(result))
    return bench_report.text(result) + f"\n\nWritten: {output}/result.json, result.csv, report.html"
