"""The HTTP API of `vllm-k80 serve`, on a real model: what works upstream works here.

One server for all tests. Greedy answers of SmolLM2 are known, so what is asserted is content.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
import servers
from servers import KEY, MODEL

pytestmark = pytest.mark.engine

CONTEXT = 1024
PROMPT = "The capital of France is"
GREEDY = " Paris.\n\nThe answer is: 2"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


HELLO = [{"role": "user", "content": "Hello"}]
IMAGE = [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "AAAA"}]}]
PADDED = {"messages": HELLO, "chat_template_kwargs": {"padding": "max_length"}}


class Server(servers.Server):
    def complete(self, prompt: Any = PROMPT, **options: Any) -> dict[str, Any]:
        """One choice of a completion; greedy and 10 tokens unless told otherwise."""
        options = {"max_tokens": 10, "temperature": 0, **options}
        return self.post("/v1/completions", prompt=prompt, **options)["choices"][0]

    def chat(self, content: str, **options: Any) -> dict[str, Any]:
        options = {"max_tokens": 16, "temperature": 0, **options}
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", messages=messages, **options)["choices"][0]

    def tokenize(self, **what: Any) -> list[int]:
        return self.post("/tokenize", **what)["tokens"]

    def ready(self) -> tuple[int, dict[str, Any]]:
        response = self.call("/ready", key=None)
        return response.status_code, response.json()

    def probe(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vllm_k80.cli", "probe", "--url", self.url],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
        )


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    flags = ["--max-model-len", str(CONTEXT), "--max-num-seqs", "16"]
    # As on a die: an engine that has imported everything itself.
    method = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    with servers.serving(smollm2, folder, *flags, **method) as started:
        yield Server(**vars(started))


def test_ready_follows_the_proof(server: Server) -> None:
    """First in this file: nothing has been proven yet."""
    proof = Path(server.environment["VLLM_K80_PROOF"])
    assert server.call("/health").status_code == 200
    status, body = server.ready()
    assert (status, body["ready"]) == (503, False)

    done = server.probe()
    assert done.returncode == 0, done.stderr
    status, body = server.ready()
    assert (status, body["ready"]) == (200, True)

    stale = time.time() - 3600
    os.utime(proof, (stale, stale))
    status, body = server.ready()
    assert status == 503
    assert "3600 s old" in body["reason"]

    server.environment["VLLM_API_KEY"] = "wrong"
    done = server.probe()
    server.environment["VLLM_API_KEY"] = KEY
    assert done.returncode == 1
    assert "401" in done.stderr
    assert not proof.exists(), "a failed probe takes the proof away"


@pytest.mark.parametrize("key", [None, "wrong", KEY + "x"])
def test_wrong_key(server: Server, key: str | None) -> None:
    for path in ("/v1/models", "/v1/completions"):
        assert server.call(path, key=key).status_code == 401


@pytest.mark.parametrize("path", ["/invocations", "/tokenize"])
def test_nothing_is_computed_without_a_key(server: Server, path: str) -> None:
    """vLLM's own check looks at /v1 only."""
    payload = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1}
    assert server.call(path, payload, key=None).status_code == 401
    assert server.call(path, payload).status_code == 200


def test_models(server: Server) -> None:
    (model,) = server.call("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == (MODEL, CONTEXT)


def test_completion(server: Server) -> None:
    answer = server.post("/v1/completions", prompt=PROMPT, max_tokens=10, temperature=0)
    (choice,) = answer["choices"]
    assert choice["text"] == GREEDY
    assert choice["finish_reason"] == "length"
    prompt_tokens = len(server.tokenize(prompt=PROMPT))
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt_tokens, 10)
    assert usage["total_tokens"] == prompt_tokens + 10


def test_prompts_as_tokens_and_in_batches(server: Server) -> None:
    tokens = server.tokenize(prompt=PROMPT)
    assert server.complete(tokens)["text"] == GREEDY
    batch = server.post(
        "/v1/completions", prompt=[PROMPT, "One, two, three,"], max_tokens=10, temperature=0
    )["choices"]
    assert [choice["index"] for choice in batch] == [0, 1]
    assert batch[0]["text"] == GREEDY
    assert batch[1]["text"].startswith(" four, five")


def test_chat_is_the_models_template(server: Server) -> None:
    question = "What is the capital of France?"
    answer = server.chat(question)["message"]
    assert answer["role"] == "assistant"
    assert answer["content"] == "The capital of France is Paris."
    rendered = server.tokenize(messages=[{"role": "user", "content": question}])
    text = server.post("/detokenize", tokens=rendered)["prompt"]
    assert f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant" in text
    assert server.complete(rendered, max_tokens=16)["text"] == answer["content"]


def events(response: requests.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_streaming_is_the_same_in_pieces(server: Server) -> None:
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    request = {"model": MODEL, "max_tokens": 10, "temperature": 0, **stream}
    got = events(server.call("/v1/completions", {"prompt": PROMPT, **request}, stream=True))
    *pieces, last = got
    texts = [piece["choices"][0]["text"] for piece in pieces]
    assert "".join(texts) == GREEDY
    assert len(texts) == 10, "one event per token"
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == 10

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    got = events(
        server.call("/v1/chat/completions", {"messages": messages, **request}, stream=True)
    )
    content = "".join(e["choices"][0]["delta"].get("content") or "" for e in got if e["choices"])
    assert content == server.chat(messages[0]["content"], max_tokens=10)["message"]["content"]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_sampling_from_one_token_is_greedy(server: Server, narrow: dict[str, Any]) -> None:
    assert server.complete(temperature=1.5, seed=3, **narrow)["text"] == GREEDY


def test_top_k_keeps_to_the_best(server: Server) -> None:
    """Each token sampled with top_k=3 is one of the three most probable at its place."""
    got = server.complete("My favourite", temperature=2.0, top_k=3, seed=5, logprobs=3)["logprobs"]
    assert len(got["tokens"]) == 10
    for token, top in zip(got["tokens"], got["top_logprobs"], strict=True):
        assert token in sorted(top, key=top.__getitem__)[-3:]


def test_seeds(server: Server) -> None:
    texts = [server.complete(temperature=1.0, seed=seed)["text"] for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_n(server: Server) -> None:
    answer = server.post(
        "/v1/completions", prompt=PROMPT, n=3, max_tokens=8, temperature=1.0, seed=11
    )
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in answer["choices"]}) == 3
    assert answer["usage"]["completion_tokens"] == 24


def test_penalties(server: Server) -> None:
    """Each makes a text of repetitions repeat less."""
    prompt = "The cat sat. The cat sat. The cat sat. The cat sat. The cat"
    plain = server.complete(prompt)["text"]
    assert plain == " sat. The cat sat. The cat sat."
    for penalty in (
        {"repetition_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
    ):
        text = server.complete(prompt, **penalty)["text"]
        assert text != plain, penalty
        assert text.count("cat") < plain.count("cat"), penalty


def test_logit_bias_forces_a_token(server: Server) -> None:
    (token,) = server.tokenize(prompt=" cheese", add_special_tokens=False)
    assert server.complete(max_tokens=3, logit_bias={str(token): 100})["text"] == " cheese" * 3


def test_logprobs(server: Server) -> None:
    choice = server.complete(logprobs=5)
    got = choice["logprobs"]
    assert "".join(got["tokens"]) == choice["text"] == GREEDY
    for token, logprob, top in zip(
        got["tokens"], got["token_logprobs"], got["top_logprobs"], strict=True
    ):
        values = list(top.values())
        assert values == sorted(values, reverse=True)
        assert max(top, key=top.__getitem__) == token, "greedy takes the most probable"
        assert top[token] == logprob <= 0
        assert 0 < sum(math.exp(value) for value in values) <= 1 + 1e-4

    chat = server.chat("Say yes.", logprobs=True, top_logprobs=2, max_tokens=3)
    assert [e["token"] for e in chat["logprobs"]["content"]] == [
        e["top_logprobs"][0]["token"] for e in chat["logprobs"]["content"]
    ]


def test_prompt_logprobs(server: Server) -> None:
    """They travel as a tensor between processes: without Tensor.nbytes, which torch 2.0.1 lacks,
    the server would hang here, and for ever, with /health still 200."""
    tokens = server.tokenize(prompt=PROMPT)
    first, *rest = server.complete(prompt_logprobs=2, max_tokens=1)["prompt_logprobs"]
    assert first is None
    assert len(rest) == len(tokens) - 1
    for token, place in zip(tokens[1:], rest, strict=True):
        assert str(token) in place, "the prompt's own token is always there"
        best = min(place.values(), key=lambda entry: entry["rank"])
        assert best["rank"] == 1
        assert best["logprob"] == max(entry["logprob"] for entry in place.values())
    assert server.complete()["text"] == GREEDY, "and it goes on answering"


def test_echo_scores_as_it_generated(server: Server) -> None:
    """The same text scored at once (prefill) and generated token by token (decode)."""
    generated = server.complete(logprobs=0)["logprobs"]["token_logprobs"]
    echoed = server.complete(PROMPT + GREEDY, echo=True, logprobs=0, max_tokens=1)
    assert echoed["text"].startswith(PROMPT + GREEDY)
    scored = echoed["logprobs"]["token_logprobs"]
    assert scored[0] is None
    assert scored[-11:-1] == pytest.approx(generated, abs=1e-3)


def test_stop(server: Server) -> None:
    choice = server.complete(stop=["answer"])
    assert choice["text"] == GREEDY[: GREEDY.index("answer")]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "answer")
    choice = server.complete(stop=["answer"], include_stop_str_in_output=True)
    assert choice["text"] == GREEDY[: GREEDY.index("answer")] + "answer"
    (period,) = server.tokenize(prompt=".", add_special_tokens=False)
    choice = server.complete(stop_token_ids=[period])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", period)


def test_end_of_text_and_min_tokens(server: Server) -> None:
    end = server.tokenize(prompt="<|im_end|>", add_special_tokens=False)
    assert len(end) == 1
    forced = {"logit_bias": {str(end[0]): 100}, "logprobs": 0}
    choice = server.complete(**forced)
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    choice = server.complete(min_tokens=4, **forced)
    assert choice["finish_reason"] == "stop"
    assert GREEDY.startswith(choice["text"])
    assert len(choice["logprobs"]["tokens"]) == 5  # four, and the end
    choice = server.complete(ignore_eos=True, max_tokens=6, **forced)
    assert (len(choice["logprobs"]["tokens"]), choice["finish_reason"]) == (6, "length")


def test_bad_words(server: Server) -> None:
    """Upstream knows them in chats only, and ignores them in completions."""
    text = server.complete(bad_words=["Paris"])["text"]
    assert "Paris" not in text
    assert text.strip()
    content = server.chat("What is the capital of France?", bad_words=["Paris"])["message"][
        "content"
    ]
    assert "Paris" not in content
    assert content.strip()


@pytest.mark.parametrize("temperature", [0, 0.7])
class TestStructuredOutput:
    def test_choice(self, server: Server, temperature: float) -> None:
        text = server.complete(guided_choice=["Berlin", "Rome"], temperature=temperature)["text"]
        assert text in ("Berlin", "Rome")

    def test_regex(self, server: Server, temperature: float) -> None:
        pattern = "[0-9]{3}-[a-c]{2}"
        text = server.complete(guided_regex=pattern, temperature=temperature, max_tokens=20)["text"]
        assert re.fullmatch(pattern, text)

    def test_grammar(self, server: Server, temperature: float) -> None:
        grammar = 'root ::= "SELECT " column " FROM t"\ncolumn ::= "a" | "b"'
        text = server.complete(guided_grammar=grammar, temperature=temperature, max_tokens=20)
        assert text["text"] in ("SELECT a FROM t", "SELECT b FROM t")

    def test_json_schema(self, server: Server, temperature: float) -> None:
        schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        choice = server.chat(
            "Invent a person of 150 years. Answer in JSON.",
            response_format=schema,
            temperature=temperature,
            seed=1,
            max_tokens=60,
        )
        person = json.loads(choice["message"]["content"])
        jsonschema.validate(person, SCHEMA)

    def test_named_tool(self, server: Server, temperature: float) -> None:
        function = {"name": "add_person", "description": "Adds one.", "parameters": SCHEMA}
        choice = server.chat(
            "Add Anna, who is 12 years old.",
            tools=[{"type": "function", "function": function}],
            tool_choice={"type": "function", "function": {"name": "add_person"}},
            temperature=temperature,
            seed=2,
            max_tokens=60,
        )
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "add_person"
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)


def test_tokenize_round_trip(server: Server) -> None:
    """The tokens are those of llama.cpp: no beginning-of-text token, each digit alone."""
    text = "Grüße, 世界! 12 34\n"
    tokens = server.tokenize(prompt=text)
    words = [27302, 7170, 34878, 85, 28, 216, 7906, 240, 178, 239, 230, 17]
    assert tokens == [*words, 216, 33, 34, 216, 35, 36, 198]
    assert server.post("/detokenize", tokens=tokens)["prompt"] == text


def counters(server: Server) -> dict[str, float]:
    text = server.call("/metrics").text
    found = re.findall(r"^vllm:(prompt|generation)_tokens_total\{.*\} (\S+)$", text, re.M)
    return {name: float(value) for name, value in found}


def test_metrics_count_each_token(server: Server) -> None:
    before = counters(server)
    usage = server.post("/v1/completions", prompt=PROMPT, max_tokens=7, n=2, seed=1)["usage"]
    assert usage["completion_tokens"] == 14
    after = counters(server)
    assert after["generation"] - before["generation"] == 14
    # n = 2 are two sequences to the engine, each with the prompt.
    assert after["prompt"] - before["prompt"] == 2 * usage["prompt_tokens"]


def test_concurrent_requests_do_not_mix(server: Server) -> None:
    prompts = [
        *("Water boils at", "The sun rises in the", "Monday, Tuesday,", "def add(a, b):"),
        *("Dear Sir,", "Roses are red,", "Once upon a time", "The largest planet is"),
        *("To make bread you need", "HTTP stands for", "Two plus two is", "My name is"),
    ]

    def answer(prompt: str) -> str:
        return server.complete(prompt, max_tokens=4, ignore_eos=True)["text"]

    alone = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(answer, prompts))
    assert together == alone
    assert len(set(alone)) == 12, "answers that are alike would prove nothing"


@pytest.mark.parametrize(
    ("path", "change", "status", "words"),
    [
        ("completions", {"model": "nope"}, 404, "nope"),
        ("completions", {"temperature": -1}, 400, "temperature"),
        ("completions", {"top_p": 2}, 400, "top_p"),
        ("completions", {"top_k": -7}, 400, "top_k"),
        ("completions", {"min_p": 3}, 400, "min_p"),
        ("completions", {"n": 0}, 400, "n must be at least 1"),
        ("completions", {"max_tokens": -5}, 400, "max_tokens"),
        ("completions", {"max_tokens": "many"}, 400, "max_tokens"),
        ("completions", {"presence_penalty": 9}, 400, "presence_penalty"),
        ("completions", {"prompt": "x " * 2 * CONTEXT}, 400, f"{CONTEXT} tokens"),
        ("completions", {"logit_bias": {"999999999": 1}}, 400, "999999999"),
        ("completions", {"guided_regex": "("}, 400, "parenthesis is not closed"),
        ("completions", {"bad_words": "Paris"}, 400, "bad_words"),
        # What ended an engine, or held its server up (vllm_k80/guards.py).
        ("completions", {"guided_regex": ""}, 400, "guided_regex is empty"),
        ("completions", {"guided_json": {"type": "string", "pattern": ""}}, 400, "empty pattern"),
        ("completions", {"guided_regex": "(?i:abc)"}, 400, "regex"),
        ("completions", {"guided_json": {"type": "number", "multipleOf": 2}}, 400, "xgrammar"),
        ("completions", {"stop_token_ids": [99999999], "min_tokens": 1}, 400, "stop_token_ids"),
        ("completions", {"allowed_token_ids": [49152]}, 400, "49152"),
        ("completions", {"prompt": [49152]}, 400, "49152"),
        ("completions", {"prompt": [[1]] * 600, "n": 2, "temperature": 1}, 400, "1200 answers"),
        ("completions", {"prompt_embeds": "AAAA"}, 400, "embeddings are not taken"),
        ("chat/completions", {"messages": IMAGE}, 400, "embeddings are not taken"),
        ("chat/completions", {"messages": HELLO, "n": 5000}, 400, "5000 answers"),
        ("chat/completions", {"messages": HELLO, "chat_template": "x"}, 400, "chat_template"),
        ("chat/completions", PADDED, 400, "padding"),
        ("completions", {"logprobs": 500}, 400, "logprobs"),
        ("chat/completions", {}, 400, "messages"),
        ("chat/completions", {"messages": "hello"}, 400, "messages"),
    ],
)
def test_bad_requests_name_what_is_wrong(
    server: Server, path: str, change: dict[str, Any], status: int, words: str
) -> None:
    base = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4}
    response = server.call(f"/v1/{path}", base | change)
    assert response.status_code == status, response.text
    assert words in response.json()["error"]["message"]


def test_body_that_is_not_json(server: Server) -> None:
    response = requests.post(
        f"{server.url}/v1/completions",
        data="{oops",
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        timeout=60,
    )
    assert response.status_code == 400
    assert "JSON" in response.text


def test_bench_measures_it(server: Server, smollm2: Path, tmp_path: Path) -> None:
    flags = ["--concurrency", "2", "--requests", "2", "--prompt-lengths", "16"]
    flags += ["--prompt-tokens", "8", "--output-tokens", "4", "--predict", str(smollm2)]
    flags += ["--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_k80.cli", "bench", "--url", server.url, *flags],
        capture_output=True,
        text=True,
        check=False,
        env=server.environment,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    two, length = result["steps"]
    assert (two["failed"], length["failed"]) == (0, 0)
    assert two["tokens_per_second"] == pytest.approx(2 * 4 / two["seconds"], rel=0.01)
    # 135M parameters: what is predicted for a K80 is beside it, and apart from it.
    assert result["predicted"]["decode"][0]["tokens_per_second"] > 0
    assert "predicted for one K80 die" in (tmp_path / "report.html").read_text()


def test_still_ready_for_work(server: Server) -> None:
    """Last in this file: none of all that has hurt the engine."""
    assert server.probe().returncode == 0
    assert server.ready()[0] == 200


def test_what_it_has_taken_on_is_finished_before_it_stops(server: Server) -> None:
    """The last test: it ends the server."""
    answer = server.stream(PROMPT, 24)
    next(answer)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(requests.ConnectionError):
        server.call("/health")
    rest = list(answer)
    assert rest[-1] == "[DONE]", server.log.read_text()
    assert len(rest) == 24  # 23 tokens, and the end
    assert server.process.wait(20) == 0, server.log.read_text()
    ending = server.log.read_text().split("Shutting down")[1]
    assert "Traceback" not in ending, ending
