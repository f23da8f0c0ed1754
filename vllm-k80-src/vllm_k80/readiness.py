"""``GET /ready``: whether this server has generated tokens lately.

vLLM's ``/health`` only says that the server's process runs; it stays 200 when the engine hangs.
``vllm-k80 probe`` generates tokens over HTTP and leaves a proof; a gateway asks ``/ready``,
which is 200 as long as there is a fresh one.
"""

import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

PROOF = Path(os.environ.get("VLLM_K80_PROOF", "/tmp/vllm-k80/proof.json"))

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def write_proof(kind: str, seconds: float) -> None:
    """Record that tokens were generated: ``golden`` or ``liveness``, and how long it took."""
    PROOF.parent.mkdir(parents=True, exist_ok=True)
    partial = PROOF.with_suffix(".partial")
    partial.write_text(json.dumps({"kind": kind, "seconds": round(seconds, 3)}))
    partial.replace(PROOF)


def remove_proof() -> None:
    """The last attempt to generate failed."""
    PROOF.unlink(missing_ok=True)


def status(now: float | None = None) -> tuple[bool, dict[str, Any]]:
    """Whether the server is ready, and why (not), for a JSON answer.

    Args:
        now: seconds since the epoch; the current time if None. The age of a proof is that of
            its file.
    """
    limit = float(os.environ.get("VLLM_K80_PROOF_MAX_AGE", "180"))
    try:
        age = (time.time() if now is None else now) - PROOF.stat().st_mtime
        proof = json.loads(PROOF.read_text())
    except FileNotFoundError:
        return False, {"ready": False, "reason": "no tokens have been generated yet"}
    proof["age"] = round(age, 1)
    if age > limit:
        reason = f"the last proof is {age:.0f} s old, the limit is {limit:.0f} s"
        return False, {"ready": False, "reason": reason, "proof": proof}
    return True, {"ready": True, "proof": proof}


class ReadinessMiddleware:
    """ASGI middleware that answers ``/ready`` and passes everything else on."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/ready":
            await self.app(scope, receive, send)
            return
        ready, content = status()
        body = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send(
            {
                "type": "http.response.start",
                "status": 200 if ready else 503,
                "headers": headers,
            }
        )
        await send({"type": "http.response.body", "body": body})
