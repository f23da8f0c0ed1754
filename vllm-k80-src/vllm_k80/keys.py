"""A second API key, so that a key can be changed while requests come."""

import os
from collections.abc import Awaitable, Callable
from typing import Any

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class SecondKeyMiddleware:
    """ASGI middleware that takes ``VLLM_K80_SECOND_API_KEY`` for ``VLLM_API_KEY``.

    vLLM takes several keys on its command line only, where every user of the host reads them, and
    writes them to its log.
    """

    def __init__(self, app: Callable[[dict[str, Any], Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        key, second = (
            os.environ.get(name, "") for name in ("VLLM_API_KEY", "VLLM_K80_SECOND_API_KEY")
        )
        self.first = (b"authorization", f"Bearer {key}".encode())
        self.second = (b"authorization", f"Bearer {second}".encode()) if second else None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if self.second in scope.get("headers", ()):
            headers = [self.first if each == self.second else each for each in scope["headers"]]
            scope = scope | {"headers": headers}
        await self.app(scope, receive, send)
