"""API keys: a second one, by which a key is changed while requests come; no way around them."""

import os

from vllm_k80.asgi import App, Receive, Scope, Send


class SecondKeyMiddleware:
    """ASGI middleware that takes ``VLLM_K80_SECOND_API_KEY`` for ``VLLM_API_KEY``.

    vLLM takes several keys on its command line only, where every user of the host reads them, and
    writes them to its log.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        key, second = (
            os.environ.get(name, "") for name in ("VLLM_API_KEY", "VLLM_K80_SECOND_API_KEY")
        )
        self.first = (b"authorization", f"Bearer {key}".encode())
        self.second = (b"authorization", f"Bearer {second}".encode()) if second else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.second in scope.get("headers", ()):
            headers = [self.first if each == self.second else each for each in scope["headers"]]
            scope = scope | {"headers": headers}
        await self.app(scope, receive, send)


class NoWayAroundMiddleware:
    """ASGI middleware that wants ``VLLM_API_KEY`` wherever something can be asked for.

    vLLM's own check looks at paths below ``/v1`` only, and ``/invocations`` generates as well.
    What can only be read (``/metrics``, ``/ready``) needs no key.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        key = os.environ.get("VLLM_API_KEY")
        self.header = (b"authorization", f"Bearer {key}".encode()) if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if self.header is None or not asks or self.header in scope["headers"]:
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error":"Unauthorized"}'})
