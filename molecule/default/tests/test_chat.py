"""What a user gets through the gateway."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from conftest import Server


def test_chat_answers_in_sensible_english(ask: Callable[..., str]) -> None:
    assert "Paris" in ask("What is the capital of France?")


def test_streaming_brings_the_same_answer_piece_by_piece(
    client: openai.OpenAI, ask: Callable[..., str]
) -> None:
    question, arrived, pieces = "Name the capital of France.", [], []
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        max_tokens=24,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
            arrived.append(time.monotonic())
    assert len(pieces) > 3
    # Nothing on the way holds the pieces back until the end.
    assert arrived[-1] - arrived[0] > 0.05
    assert "".join(pieces) == ask(question)


def test_concurrent_requests_are_spread_over_both_dies(
    server: Server, ask: Callable[..., str]
) -> None:
    def generated() -> list[float]:
        script = (
            "import urllib.request; "
            "print(urllib.request.urlopen('http://127.0.0.1:8000/metrics').read().decode())"
        )
        counts = []
        for instance in server.instances:
            lines = server.in_container(instance, script).splitlines()
            counter = [line for line in lines if line.startswith("vllm:request_success_total{")]
            counts.append(sum(float(line.rsplit(" ", 1)[1]) for line in counter))
        return counts

    before = generated()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, ["What is the capital of France?"] * 8))
    assert all("Paris" in answer for answer in answers)
    served = [after - earlier for earlier, after in zip(before, generated(), strict=True)]
    assert min(served) >= 2, served


@pytest.mark.parametrize(
    "key", ["not-the-key-of-this-gateway-000", "", "molecule-only-instance-key-0001"]
)
def test_a_wrong_key_is_refused(gateway_url: str, key: str) -> None:
    """The instances' own key is as wrong as any: it opens nothing from outside."""
    wrong = openai.OpenAI(base_url=f"{gateway_url}/v1", api_key=key or "x", max_retries=0)
    if not key:
        wrong = wrong.with_options(default_headers={"Authorization": ""})
    with pytest.raises(openai.AuthenticationError) as refusal:
        wrong.models.list()
    assert refusal.value.status_code == 401


def test_an_instance_is_not_reachable_from_outside(server: Server, gateway_url: str) -> None:
    for instance in server.instances:
        url = gateway_url.rsplit(":", 1)[0] + f":{instance.port}/v1"
        direct = openai.OpenAI(
            base_url=url, api_key="molecule-only-instance-key-0001", timeout=5, max_retries=0
        )
        with pytest.raises(openai.APIConnectionError):
            direct.models.list()
