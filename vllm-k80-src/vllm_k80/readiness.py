"""``GET /ready``: whether this server has generated tokens lately and may be given more to do.

vLLM's ``/health`` only says that the server's process runs; it stays 200 when the engine hangs.
``vllm-k80 probe`` generates tokens over HTTP and leaves a proof; a gateway asks ``/ready``:

- 200 as long as there is a fresh proof,
- 503 without one,
- 404 if this server generates, but is to get no new requests: it is drained (the file ``DRAINED``
  or ``DOCTORED`` is there), or it does not serve the model that ``?model=`` names. HAProxy's
  ``disable-on-404`` lets such a server finish what it has.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from vllm_k80.asgi import App, Receive, Scope, Send

PROOF = Path(os.environ.get("VLLM_K80_PROOF", "/tmp/vllm-k80/proof.json"))
# Touched after each step of the engine, of which a long prompt takes many before any token.
STEP = PROOF.with_name("step")
# Made and removed by the server's `k80-instance`.
DRAINED = Path(os.environ.get("VLLM_K80_DRAINED", "/var/lib/vllm-k80/drained"))
# The same; it holds what `k80-doctor` has against the die.
DOCTORED = Path(os.environ.get("VLLM_K80_DOCTORED", "/var/lib/vllm-k80/drained-by-doctor"))
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# The names that the server serves, a JSON list; set by `vllm-k80 serve`.
SERVED_NAMES = "VLLM_K80_SERVED_NAMES"


def write_proof(kind: str, seconds: float) -> None:
    """Record that tokens were generated: ``golden`` or ``liveness``, and how long it took."""
    PROOF.parent.mkdir(parents=True, exist_ok=True)
    partial = PROOF.with_suffix(".partial")
    partial.write_text(json.dumps({"kind": kind, "seconds": round(seconds, 3)}))
    partial.replace(PROOF)


def remove_proof() -> None:
    """The last attempt to generate failed."""
    PROOF.unlink(missing_ok=True)


def note_step() -> None:
    """The engine has done a step. What cannot be noted holds nothing up."""
    with suppress(OSError):
        try:
            os.utime(STEP)
        except FileNotFoundError:
            STEP.parent.mkdir(parents=True, exist_ok=True)
            STEP.touch()


def last_step() -> float:
    """When the engine did its last step, in seconds since the epoch; 0 if it never did one."""
    try:
        return STEP.stat().st_mtime
    except OSError:
        return 0.0


def drained_by() -> str | None:
    """Who wants this server to get no new requests, or None if nobody does.

    Whoever drains writes a word: ``operator``, ``maintenance``, or ``update`` and the boot in which
    it was written, for an update that a reboot has ended lifts nothing any more. The doctor says
    why.
    """
    try:
        words = DRAINED.read_text().split()
        if words[:1] != ["update"] or words[1:] == [BOOT_ID.read_text().strip()]:
            return words[0] if words else "operator"
    except OSError:
        pass
    try:
        return f"k80-doctor: {DOCTORED.read_text().strip()}"
    except OSError:
        return None


def status(model: str | None = None, now: float | None = None) -> tuple[int, dict[str, Any]]:
    """The HTTP status of ``/ready``, and why, for a JSON answer.

    Args:
        model: the model that requests would be for; None for whatever is served.
        now: seconds since the epoch; the current time if None. The age of a proof is that of
            its file.
    """
    limit = float(os.environ.get("VLLM_K80_PROOF_MAX_AGE", "180"))
    try:
        age = (time.time() if now is None else now) - PROOF.stat().st_mtime
        proof = json.loads(PROOF.read_text())
    except FileNotFoundError:
        return 503, {"ready": False, "reason": "no tokens have been generated yet"}
    proof["age"] = round(age, 1)
    if age > limit:
        reason = f"the last proof is {age:.0f} s old, the limit is {limit:.0f} s"
        return 503, {"ready": False, "reason": reason, "proof": proof}
    served = json.loads(os.environ.get(SERVED_NAMES, "[]"))
    if model is not None and model not in served:
        reason = f"this server serves {', '.join(served)}"
        return 404, {"ready": False, "reason": reason, "proof": proof}
    if who := drained_by():
        return 404, {"ready": False, "reason": f"drained by {who}", "proof": proof}
    return 200, {"ready": True, "proof": proof}


class ReadinessMiddleware:
    """ASGI middleware that answers ``/ready`` and passes everything else on."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/ready":
            await self.app(scope, receive, send)
            return
        asked = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("model")
        code, content = status(asked[0] if asked else None)
        body = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": code, "headers": headers})
        await send({"type": "http.response.body", "body": body})
