"""A second API key, so that a key can be changed while requests come."""

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
