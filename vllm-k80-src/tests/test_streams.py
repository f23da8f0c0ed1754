"""The head of a stream waits for its first token."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from vllm_k80.streams import ENGINE_DIED, FirstTokenMiddleware

HEAD = {"type": "http.response.start", "status": 200, "headers": []}


def body(content: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


def passed(*messages: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """What has left the server after each of these messages."""
    sent: list[dict[str, Any]] = []
    states: list[list[dict[str, Any]]] = []

    async def app(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        for message in messages:
            await send(message)
            states.append(list(sent))

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(FirstTokenMiddleware(app)({"type": "http"}, None, send))  # type: ignore[arg-type]
    return states


def test_a_head_waits_for_the_first_content() -> None:
    first, last = body(b"data: 1\n\n"), body(b"", more=False)
    assert passed(HEAD, body(b""), first, last) == [
        [],
        [],
        [HEAD, first],
        [HEAD, first, last],
    ]


def test_an_answer_without_content_is_passed() -> None:
    last = body(b"", more=False)
    assert passed(HEAD, last)[-1] == [HEAD, last]


def test_an_engine_that_died_before_the_first_token_is_500() -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    error = {"message": str(EngineDeadError()), "type": "BadRequestError", "code": 400}
    event = body(f"data: {json.dumps({'error': error})}\n\n".encode())
    assert event["body"].startswith(ENGINE_DIED)
    assert passed(HEAD, event)[-1] == [HEAD | {"status": 500}, event]
    # Later it can only be told.
    token = body(b"data: 1\n\n")
    assert passed(HEAD, token, event)[-1] == [HEAD, token, event]
