"""Steady load on the gateways, each answer compared with the tokens that are known."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import openai

sys.path.insert(0, str(Path(__file__).parents[1] / "stand-in"))
import answers

LONG = 300  # tokens, which take the stand-in six seconds
# A gateway that does not take the connection in this time is left for the other one.
TIMEOUT = httpx2.Timeout(120, connect=3)


@dataclass
class Answer:
    """What became of a request."""

    # finished, wrong, cut (in mid-stream), or failed (nothing of an answer had come)
    outcome: str
    seconds: float
    detail: str = ""
    other_gateway: bool = False


@dataclass
class Load:
    """Half of the requests are streams, half are not; the gateways take turns.

    A user of several gateways asks the next one when the first takes no connection or ends it
    without a byte; so does this.
    """

    gateways: list[str]
    key: str
    per_second: float = 6
    answers: list[Answer] = field(default_factory=list)
    # When, and how many instances each gateway had ready then; None if it did not answer.
    ready: list[tuple[float, list[int | None]]] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._end = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._failure:
            raise self._failure

    def count(self) -> Counter[str]:
        return Counter(answer.outcome for answer in self.answers)

    def open_streams(self, number: int) -> None:
        """More of the load: long streams, all of which have begun when this returns."""

        async def open_them() -> None:
            begun = [asyncio.Event() for _ in range(number)]
            # Numbers that no other request has, and of streams.
            for index, event in enumerate(begun):
                asking = self._ask(-2 * index - 2, self._clients, LONG, event)
                self._asking.append(asyncio.create_task(asking))
            async with asyncio.timeout(30):
                await asyncio.gather(*(event.wait() for event in begun))

        asyncio.run_coroutine_threadsafe(open_them(), self._loop).result()

    def _run(self) -> None:
        try:
            asyncio.run(self._all())
        except BaseException as error:
            self._failure = error

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch())
            self._clients = [
                openai.AsyncOpenAI(
                    base_url=f"{url}/v1", api_key=self.key, timeout=TIMEOUT, max_retries=0
                )
                for url in self.gateways
            ]
            self._asking: list[asyncio.Task[None]] = []
            self._loop = asyncio.get_running_loop()
            due = time.monotonic()
            for number in itertools.count():
                if self._end.is_set():
                    break
                count = 10 + number * 7 % 60
                asking = self._ask(number, self._clients, count, asyncio.Event())
                self._asking.append(tasks.create_task(asking))
                due += 1 / self.per_second
                await asyncio.sleep(due - time.monotonic())
            await asyncio.gather(*self._asking)
            watching.cancel()
        for client in self._clients:
            await client.close()

    async def _watch(self) -> None:
        """Asks the gateways how many instances they would give requests to."""
        async with httpx2.AsyncClient(timeout=1) as client:

            async def ready_at(url: str) -> int | None:
                try:
                    answer = await client.get(f"{url}/health")
                except httpx2.HTTPError:
                    return None
                # A process that a reload has replaced does not say.
                ready: int | None = answer.json().get("ready_instances")
                return ready if answer.status_code == 200 else 0

            while True:
                counts = await asyncio.gather(*map(ready_at, self.gateways))
                self.ready.append((time.monotonic(), list(counts)))
                await asyncio.sleep(0.25)

    async def _ask(
        self, number: int, clients: list[openai.AsyncOpenAI], count: int, begun: asyncio.Event
    ) -> None:
        asked = time.monotonic()
        turn = number // 2 % len(clients)
        own, *others = clients[turn:] + clients[:turn]
        outcome, detail = await self._ask_one(number, own, count, begun)
        other = outcome == "unanswered"
        while outcome == "unanswered" and others:
            outcome, detail = await self._ask_one(number, others.pop(0), count, begun)
        if outcome == "unanswered":
            outcome = "failed"
        self.answers.append(Answer(outcome, time.monotonic() - asked, detail, other))

    async def _ask_one(
        self, number: int, client: openai.AsyncOpenAI, count: int, begun: asyncio.Event
    ) -> tuple[str, str]:
        prompt = f"question {number}"
        messages = [{"role": "user", "content": prompt}]
        tokens = answers.tokens(answers.chat_prompt(messages), count)
        expected = "".join(map(answers.text, tokens))
        streamed = number % 2 == 0
        text, end = "", None
        try:
            answer = await client.chat.completions.create(
                model="known",
                messages=messages,  # type: ignore[arg-type]
                max_tokens=count,
                temperature=0,
                stream=streamed,
            )
            if isinstance(answer, openai.AsyncStream):
                async for event in answer:
                    text += event.choices[0].delta.content or ""
                    if text:
                        begun.set()
                    end = event.choices[0].finish_reason
            else:
                text, end = answer.choices[0].message.content or "", "length"
        except openai.APIStatusError as error:
            return "failed", f"{error.status_code}: {error}"
        except (openai.APIError, httpx2.HTTPError) as error:
            reason = f"{type(error).__name__}: {error.__cause__ or error}"
            return ("cut" if text else "unanswered"), reason
        if end is None:
            return ("cut" if text else "failed"), f"the stream ended after {text!r}"
        return ("finished" if text == expected else "wrong"), f"{text!r} is not {expected!r}"
