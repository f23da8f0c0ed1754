"""``vllm-k80 serve`` of the stand-in image: an OpenAI API before an engine with known tokens.

It takes the place of ``vllm_k80/serve.py``; command, probe, readiness and keys are the package's.

What can be wrong with an image is baked into it (``STAND_IN_FAULT``):

- ``no-start``: the server ends before it serves
- ``wrong-tokens``: it generates others than it should, always the same
- ``slow``: it takes eight times as long for each
- ``dies``: a minute after its start it ends
- ``selftest``: ``vllm-k80 selftest`` fails

The file ``hang`` in the state directory makes the engine generate nothing while ``/health`` says
200. A restarted engine works again, as engines do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from vllm_k80 import answers, keys, readiness, streams
from vllm_k80.asgi import Receive, Scope, Send
from vllm_k80.errors import UserError

FAULT = os.environ.get("STAND_IN_FAULT", "none")
HANG = Path("/var/lib/vllm-k80/hang")
SECONDS_PER_TOKEN = 0.02 * (8 if FAULT == "slow" else 1)
LIFE = 60.0


class Engine:
    """Generates for a few sequences at once; the others wait."""

    def __init__(self, sequences: int) -> None:
        self.places = asyncio.Semaphore(sequences)
        self.waiting = self.running = self.finished = 0

    async def generate(self, prompt: str, count: int) -> AsyncIterator[int]:
        self.waiting += 1
        try:
            await self.places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            for token in answers.tokens(prompt, count):
                await asyncio.sleep(SECONDS_PER_TOKEN)
                while HANG.exists():
                    await asyncio.sleep(1)
                yield token ^ 1 if FAULT == "wrong-tokens" else token
            self.finished += 1
        finally:
            self.running -= 1
            self.places.release()


class Server:
    """The ASGI application."""

    def __init__(self, names: list[str], sequences: int) -> None:
        self.names = names
        self.engine = Engine(sequences)
        self.key = os.environ.get("VLLM_API_KEY", "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/health":
            await reply(send, 200, {})
        elif path == "/metrics":
            await reply_text(send, 200, "text/plain", self.metrics())
        elif self.key and (b"authorization", f"Bearer {self.key}".encode()) not in scope["headers"]:
            await reply(send, 401, {"error": "Unauthorized"})
        elif path == "/v1/models":
            models = [{"id": name, "object": "model", "owned_by": "vllm"} for name in self.names]
            await reply(send, 200, {"object": "list", "data": models})
        elif path in ("/v1/completions", "/v1/chat/completions"):
            await self.until_the_client_leaves(scope, receive, send)
        else:
            await reply(send, 404, {"error": {"message": "Not Found", "code": 404}})

    def metrics(self) -> str:
        labels = f'{{engine="0",model_name="{self.names[0]}"}}'
        values = {
            "num_requests_running": self.engine.running,
            "num_requests_waiting": self.engine.waiting,
            "request_success_total": self.engine.finished,
        }
        return "".join(f"vllm:{name}{labels} {value}.0\n" for name, value in values.items())

    async def until_the_client_leaves(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        answering = asyncio.create_task(self.answer(scope["path"], json.loads(body), send))
        leaving = asyncio.create_task(receive())
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not answering.done():
            answering.cancel()
        elif error := answering.exception():
            raise error

    async def answer(self, path: str, request: dict[str, Any], send: Send) -> None:
        if request["model"] not in self.names:
            message = f"The model `{request['model']}` does not exist."
            error = {"message": message, "type": "NotFoundError", "param": None, "code": 404}
            await reply(send, 404, {"error": error})
            return
        chat = path == "/v1/chat/completions"
        prompt = answers.chat_prompt(request["messages"]) if chat else request["prompt"]
        count = request.get("max_completion_tokens") or request.get("max_tokens") or 16
        answer = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": request["model"],
        }
        tokens = self.engine.generate(prompt, count)
        if request.get("stream"):
            if chat:
                answer["object"] += ".chunk"
            await stream(send, answer, chat, count, tokens)
            return
        generated = [token async for token in tokens]
        text = "".join(map(answers.text, generated))
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": None}
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
            if request.get("return_tokens_as_token_ids") and request.get("logprobs") is not None:
                choice["logprobs"] = {"tokens": [f"token_id:{token}" for token in generated]}
        used = len(prompt.split())
        usage = {"prompt_tokens": used, "completion_tokens": count, "total_tokens": used + count}
        await reply(send, 200, answer | {"choices": [choice], "usage": usage})


async def stream(
    send: Send, answer: dict[str, Any], chat: bool, count: int, tokens: AsyncIterator[int]
) -> None:
    """Server-sent events, one for each token."""

    async def event(data: str) -> None:
        body = f"data: {data}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})

    # As vLLM does: the answer begins before the engine does.
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    position = 0
    async for token in tokens:
        position += 1
        end = "length" if position == count else None
        text = answers.text(token)
        choice = {"delta": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices = [choice | {"index": 0, "finish_reason": end}]
        await event(json.dumps(answer | {"choices": choices}))
    await event("[DONE]")
    await send({"type": "http.response.body", "body": b""})


async def reply(send: Send, status: int, content: dict[str, Any]) -> None:
    await reply_text(send, status, "application/json", json.dumps(content))


async def reply_text(send: Send, status: int, kind: str, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def run(model: str, rest: list[str]) -> None:
    """Serve until told to stop; requests under way are finished first."""
    import uvicorn

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", nargs="+", default=[model])
    parser.add_argument("--max-num-seqs", type=int, default=8)
    given, _ = parser.parse_known_args(rest)
    if FAULT == "no-start":
        raise UserError("the engine core did not start: out of memory.")
    if FAULT == "dies":
        threading.Timer(LIFE, lambda: os._exit(1)).start()
    HANG.unlink(missing_ok=True)
    os.environ[readiness.SERVED_NAMES] = json.dumps(given.served_model_name)
    server = Server(given.served_model_name, given.max_num_seqs)
    app = keys.SecondKeyMiddleware(
        streams.FirstTokenMiddleware(readiness.ReadinessMiddleware(server))
    )
    print(f"Serving {model} as {', '.join(given.served_model_name)}.", file=sys.stderr)
    uvicorn.run(app, host=given.host, port=given.port, lifespan="off", log_level="warning")
