"""Proves over HTTP that a server generates: its golden tokens, or one token.

Standard library only: it starts in a moment, so that it can run every few seconds.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_k80 import readiness
from vllm_k80.errors import UserError

GOLDEN_PROMPT = "The capital of France is"
GOLDEN_TOKENS = 16
# Seconds that a server may take to say what it serves, which needs no model.
_QUICK = 5.0
_COUNTER = "vllm:generation_tokens_total"
# A proxy of the environment, which Docker may hand to every container, is for elsewhere.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ProbeError(UserError):
    """Why a server is not proven; the text is for the user."""


class NotUpError(ProbeError):
    """The server does not answer, or not in time: it may do so later."""


def _key() -> dict[str, str]:
    """The header that carries the server's key, if there is one."""
    key = os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def ask(url: str, payload: dict[str, Any] | None, timeout: float) -> Any:
    """What the server answers to a GET, or to a POST if there is a payload; with VLLM_API_KEY.

    Raises:
        ProbeError: no answer, or an error.
    """
    headers = {"Content-Type": "application/json"} | _key()
    data = None if payload is None else json.dumps(payload).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with _direct.open(request, timeout=timeout) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        detail = error.read().decode(errors="replace")[:300]
        hint = " Set VLLM_API_KEY to the server's key." if error.code == 401 else ""
        raise ProbeError(f"{url} answered {error.code}: {detail}{hint}") from None
    except (
        TimeoutError,
        urllib.error.URLError,
        ConnectionError,
        http.client.HTTPException,
    ) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise NotUpError(f"{url} did not answer within {timeout:g} s.") from None
        raise NotUpError(f"{url}: {reason}.") from None
    except json.JSONDecodeError:
        raise ProbeError(f"{url} did not answer in JSON. Is it a vLLM server?") from None


def generate(url: str, tokens: int, timeout: float) -> list[int]:
    """Greedy continuation of the golden prompt by the served model, as token ids.

    Args:
        url: base address of the server, without ``/v1``.
        tokens: how many to generate; the end of the text does not stop it.
        timeout: seconds for each request.

    Raises:
        ProbeError: no answer, an error, or fewer tokens than asked for.
    """
    model = ask(f"{url}/v1/models", None, timeout)["data"][0]["id"]
    answer = ask(
        f"{url}/v1/completions",
        {
            "model": model,
            "prompt": GOLDEN_PROMPT,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
        },
        timeout,
    )
    try:
        names = answer["choices"][0]["logprobs"]["tokens"]
        generated = [int(name.removeprefix("token_id:")) for name in names]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ProbeError(f"{model} answered without tokens: {str(answer)[:300]}") from None
    if len(generated) != tokens:
        raise ProbeError(f"{model} generated {len(generated)} tokens instead of {tokens}.")
    return generated


def tokens_so_far(url: str) -> float | None:
    """Tokens that the server has generated for anybody, as its metrics say; None if they do not."""
    request = urllib.request.Request(f"{url}/metrics", headers=_key())
    try:
        with _direct.open(request, timeout=_QUICK) as response:
            lines = response.read().decode().splitlines()
        counts = [float(line.split()[-1]) for line in lines if line.startswith(_COUNTER)]
    except (OSError, http.client.HTTPException, ValueError):
        return None
    return sum(counts) if counts else None


def prove_life(url: str, timeout: float) -> str:
    """See that the server generates: a token for us, or, where that has to wait, for others.

    A full server is not a hung one: behind some hundred sequences, without a free page of KV cache,
    or behind a prompt that takes all of every step for minutes, a request waits longer than any
    time-out.

    Returns:
        What was seen, as one sentence.

    Raises:
        ProbeError: neither.
    """
    before, step = tokens_so_far(url), readiness.last_step()
    try:
        generate(url, 1, timeout)
    except NotUpError:
        if readiness.last_step() > step:
            return f"Had no turn within {timeout:g} s, but the engine works."
        after = tokens_so_far(url)
        if before is None or after is None or after <= before:
            raise
        return f"Had no turn within {timeout:g} s, but others got {after - before:.0f} tokens."
    return "Generated one token."


def wait_until_up(url: str, seconds: float) -> None:
    """Return once the server answers; it does not while it loads its model.

    Raises:
        ProbeError: it still does not after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            ask(f"{url}/v1/models", None, _QUICK)
            return
        except NotUpError as error:
            if time.monotonic() > deadline:
                raise ProbeError(f"No server after {seconds:g} s: {error}") from None
            time.sleep(1)


def timed_golden(url: str, timeout: float) -> tuple[list[int], float]:
    """The golden tokens, and the seconds that they took."""
    started = time.monotonic()
    tokens = generate(url, GOLDEN_TOKENS, timeout)
    return tokens, time.monotonic() - started


def record_golden(url: str, golden: Path, tokens: list[int], timeout: float) -> str:
    """Record the golden tokens, if a second generation makes them too.

    That second time, when everything is warm, is recorded with them. The file is written whole or
    not at all.
    """
    again, seconds = timed_golden(url, timeout)
    if again != tokens:
        raise ProbeError(
            f"Two greedy generations differ: {tokens} and {again}. The die does not compute "
            f"reliably; run `vllm-k80 selftest` on it."
        )
    record = {
        "prompt": GOLDEN_PROMPT,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    golden.parent.mkdir(parents=True, exist_ok=True)
    partial = golden.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n")
    partial.replace(golden)
    return f"Recorded {len(tokens)} golden tokens in {golden}."


def prove_golden(url: str, golden: Path, timeout: float, max_slowdown: float = 0) -> str:
    """Compare with the tokens recorded in ``golden``, or record them.

    Args:
        url: base address of the server, without ``/v1``.
        golden: the file.
        timeout: seconds for each request.
        max_slowdown: how many times as long as when they were recorded the tokens may take; the
            best of three attempts counts. 0 for as long as they like.

    Returns:
        What was done, as one sentence.

    Raises:
        ProbeError: they differ, or take too long.
    """
    tokens, seconds = timed_golden(url, timeout)
    if not golden.exists():
        return record_golden(url, golden, tokens, timeout)
    try:
        record = json.loads(golden.read_text())
        recorded, limit = record["tokens"], max_slowdown * record.get("seconds", 0)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ProbeError(
            f"{golden} is damaged. Remove it: the next start records the golden tokens anew."
        ) from None
    if tokens != recorded:
        pairs = enumerate(zip(tokens, recorded, strict=False))
        place = next((i for i, (new, old) in pairs if new != old), min(len(tokens), len(recorded)))
        raise ProbeError(
            f"The golden tokens in {golden} are not reproduced: position {place} of {recorded} "
            f"became {tokens}. Run `vllm-k80 selftest` on this die; if it passes, remove the file "
            f"to record anew."
        )
    for _ in range(2):
        if limit and seconds > limit:
            seconds = min(seconds, timed_golden(url, timeout)[1])
    if limit and seconds > limit:
        raise ProbeError(
            f"The golden tokens took {seconds:.1f} s, {seconds / limit * max_slowdown:.1f} times "
            f"as long as when they were recorded; {max_slowdown:g} times is the limit."
        )
    return f"Reproduced {len(tokens)} golden tokens."


def run(url: str, wait: float, timeout: float, golden: Path | None, max_slowdown: float = 0) -> str:
    """Probe, and leave or remove the proof that `readiness` reads.

    Raises:
        ProbeError: the server is not proven.
    """
    try:
        if wait:
            wait_until_up(url, wait)
        started = time.monotonic()
        if golden is not None:
            message = prove_golden(url, golden, timeout, max_slowdown)
        else:
            message = prove_life(url, timeout)
        seconds = time.monotonic() - started
    except ProbeError:
        readiness.remove_proof()
        raise
    readiness.write_proof("golden" if golden is not None else "liveness", seconds)
    return f"{message} ({seconds:.1f} s)"
