"""Streams whose first token fails to come can still be sent elsewhere.

vLLM sends the head of a streamed answer before its engine has done anything, and the news of an
engine that died under it as an event of a successful answer. A gateway takes the head for the
beginning of the answer, after which it cannot ask another instance.
"""

from typing import Any

from vllm_k80.asgi import App, Receive, Scope, Send

# How vLLM's EngineDeadError begins, and with it the event that streams end with.
ENGINE_DIED = b'data: {"error": {"message": "EngineCore encountered an issue.'


class FirstTokenMiddleware:
    """ASGI middleware: no head of an answer before its first content, and 500 for a dead engine."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        head: dict[str, Any] | None = None

        async def held(message: dict[str, Any]) -> None:
            nonlocal head
            if message["type"] == "http.response.start":
                head = message
                return
            if head is not None:
                if message.get("more_body") and not message.get("body"):
                    return
                if message.get("body", b"").startswith(ENGINE_DIED):
                    head = head | {"status": 500}
                await send(head)
                head = None
            await send(message)

        await self.app(scope, receive, held)
