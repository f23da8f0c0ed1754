"""``vllm-k80 bench`` against a real server that streams as vLLM does, with known delays."""

import asyncio
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from vllm_k80 import bench_compare, bench_report, cli

KEY = "a-key-of-these-tests"
SHORT = (
    *("--requests", "4", "--concurrency", "1,4", "--prompt-lengths", "8,64"),
    *("--prompt-tokens", "16", "--output-tokens", "8", "--timeout", "5"),
)


class Engine:
    """How the server behaves, and what it was asked."""

    def __init__(self) -> None:
        self.first = 0.1
        self.further = 0.02
        self.fail_after: int | None = None  # requests
        self.cut_at: int | None = None  # tokens
        self.names = ["m"]
        self.longest: int | None = 4096
        self.asked: list[dict[str, Any]] = []
        self.now = self.most = 0
        self.url = ""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the program sets of its own process is no other test's."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("OPENAI_API_KEY", "")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    state, app = Engine(), FastAPI()
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    @app.middleware("http")
    async def check_key(request: Request, call_next: Any) -> Any:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return await call_next(request)

    @app.get("/v1/models")
    def models() -> Any:
        return {"data": [{"id": name, "max_model_len": state.longest} for name in state.names]}

    @app.post("/v1/completions")
    async def complete(request: Request) -> Any:
        body = await request.json()
        state.asked.append(body)
        tokens = body["max_tokens"]
        if not all(0 <= token < 32000 for token in body["prompt"]):
            return JSONResponse({"error": "a token is out of vocabulary"}, 400)
        if state.fail_after is not None and len(state.asked) > state.fail_after:
            return JSONResponse({"error": "engine is dead"}, 503)
        if not body.get("stream"):
            await asyncio.sleep(state.first)
            return {"choices": [{"text": "x" * tokens}], "usage": {"completion_tokens": tokens}}

        async def stream() -> Any:
            state.now += 1
            state.most = max(state.most, state.now)
            await asyncio.sleep(state.first)
            for token in range(tokens):
                if token == state.cut_at:
                    yield 'data: {"error": "engine is dead"}\n\ndata: [DONE]\n\n'
                    return
                if token:
                    await asyncio.sleep(state.further)
                yield f"data: {json.dumps({'choices': [{'text': 'x'}]})}\n\n"
            usage = {"choices": [], "usage": {"completion_tokens": tokens}}
            yield f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n"
            state.now -= 1

        return StreamingResponse(stream(), media_type="text/event-stream")

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    state.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    yield state
    server.should_exit = True
    thread.join()


def bench(engine: Engine, output: Path, *more: str) -> int:
    return cli.main(["bench", "--url", engine.url, "--output", str(output), *SHORT, *more])


def result(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "result.json").read_text())
    return found


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """What a user is told: one line, of this program."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("vllm-k80: ")
    return lines[0]


# ---- what is measured


def test_what_is_measured_is_what_the_server_does(engine: Engine, tmp_path: Path) -> None:
    assert bench(engine, tmp_path) == 0
    found = result(tmp_path)
    one, four, *lengths = found["steps"]
    # This machine may have much else to do, which makes some requests slower, but never faster.
    for step in (one, four):
        firsts = [each["ttft_ms"] for each in step["each"]]
        further = [(each["latency_ms"] - each["ttft_ms"]) / 7 for each in step["each"]]
        assert min(firsts) == pytest.approx(100, abs=40)
        assert min(further) == pytest.approx(20, abs=8)
        assert min(firsts) <= step["ttft_ms"]["p50"] <= step["ttft_ms"]["p99"] <= max(firsts) + 0.01
        assert step["tpot_ms"]["mean"] == pytest.approx(sum(further) / len(further), rel=0.01)
        assert step["failed"] == 0
        tokens = 8 * step["requests"]
        assert step["tokens_per_second"] == pytest.approx(tokens / step["seconds"], rel=0.01)
    assert (one["requests"], four["requests"]) == (4, 4)
    assert one["seconds"] >= 4 * 0.23  # four times 100 + 7 * 20 ms; at once it takes that once
    assert four["seconds"] < one["seconds"]
    assert engine.most == 4
    assert [(step["prompt_tokens"], step["tpot_ms"]) for step in lengths] == [(8, None), (64, None)]
    assert found["versions"]["vllm"].startswith("0.10.1.1")
    # Nothing is claimed of what nobody told it.
    assert found["about"] == {"server": "", "card": ""}
    assert "none" in found["predicted"]


def test_prompts_are_exact_fixed_by_the_seed_and_found_in_no_cache(
    engine: Engine, tmp_path: Path
) -> None:
    engine.first = engine.further = 0.001

    def prompts(*more: str) -> tuple[list[Any], set[str]]:
        engine.asked.clear()
        assert bench(engine, tmp_path, *more) == 0
        streamed = [body for body in engine.asked if body.get("stream")]
        assert all(body["ignore_eos"] for body in streamed)
        asked = sorted((body["prompt"], body["max_tokens"]) for body in streamed)
        return asked, {body["cache_salt"] for body in streamed}

    first, salt = prompts()
    assert {(len(prompt), tokens) for prompt, tokens in first} == {(16, 8), (8, 1), (64, 1)}
    assert len({tuple(prompt) for prompt, _ in first}) == len(first)  # none twice
    again, other_salt = prompts()
    assert again == first
    assert len(salt) == len(other_salt) == 1
    assert salt != other_salt
    assert prompts("--seed", "100")[0] != first


def test_a_soak_goes_on_for_its_time_with_prompts_of_its_own(
    engine: Engine, tmp_path: Path
) -> None:
    engine.first = engine.further = 0.01
    assert bench(engine, tmp_path, "--soak", "1") == 0
    *others, soak = result(tmp_path)["steps"]
    assert "soak" not in {step["sweep"] for step in others}
    assert (soak["sweep"], soak["concurrency"]) == ("soak", 4)
    assert soak["seconds"] >= 1
    assert soak["requests"] == len(soak["each"]) > 4
    prompts = [tuple(body["prompt"]) for body in engine.asked if body.get("stream")]
    assert len(set(prompts)) == len(prompts)


def test_a_step_of_which_nothing_succeeds_is_one_sentence(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.first = engine.further = 0.001
    engine.fail_after = 1 + 1 + 4  # the first of all, a warm-up, and those of the first step
    assert bench(engine, tmp_path, "--concurrency", "1") == 1
    assert "prompt of 8: every request failed: Service Unavailable" in refusal(capsys)


def test_a_stream_that_ends_early_has_failed(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.first = engine.further = 0.001
    engine.cut_at = 5
    assert bench(engine, tmp_path) == 1
    assert "1 at once: every request failed: no tokens instead of 8" in refusal(capsys)


def test_some_failures_are_in_every_report(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.first = engine.further = 0.001
    engine.fail_after = 1 + (1 + 8) + (1 + 1)  # one request of the last step
    assert (
        bench(engine, tmp_path, *("--concurrency", "1", "--prompt-lengths", "8", "--requests", "8"))
        == 0
    )
    said = "prompt of 8: 1 failed: Service Unavailable"
    assert result(tmp_path)["steps"][1]["failed"] == 1
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "report.html").read_text()
    assert (tmp_path / "result.csv").read_text().splitlines()[2].split(",")[:6] == [
        *("prompt_length", "1", "8", "1", "2", "1")
    ]


# ---- what cannot be measured


def test_a_refused_key_is_one_sentence(
    engine: Engine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "another")
    assert bench(engine, tmp_path) == 1
    said = refusal(capsys)
    assert "401" in said
    assert "VLLM_API_KEY" in said
    assert "another" not in said


def test_a_server_that_is_too_slow_is_one_sentence(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.further = 10
    assert bench(engine, tmp_path, "--timeout", "0.5") == 1
    assert "1 at once: every request failed: no end within 0.5 s" in refusal(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--url", "http://127.0.0.1:9"), "Connection refused"),
        (("--url", "127.0.0.1:8000"), "must begin with http"),
        (("--model", "other"), "serves m: name one of them"),
        (("--prompt-lengths", "8,5000"), "4096 tokens at most, 5001 would be needed"),
        (("--vocabulary", "40000"), "out of vocabulary"),
        (("--requests", "0"), "--requests: it must be at least 1"),
        (("--output", "/proc/nowhere"), "--output /proc/nowhere: "),
        (("--samples", "/nowhere.csv"), "--samples /nowhere.csv: No such file"),
    ],
)
def test_mistakes_are_one_sentence(
    engine: Engine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    assert bench(engine, tmp_path, *arguments) == 1
    assert words in refusal(capsys)


def test_several_models_want_a_name(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.names, engine.first, engine.further = ["m", "n"], 0.001, 0.001
    assert bench(engine, tmp_path) == 1
    assert "serves m, n: name one of them with --model" in refusal(capsys)
    assert bench(engine, tmp_path, "--model", "n") == 0
    assert {body["model"] for body in engine.asked} == {"n"}


# ---- the report


@pytest.fixture
def made_up() -> dict[str, Any]:
    """A result with everything in it."""
    times = {"mean": 100.0, "p50": 100.0, "p90": 120.0, "p99": 130.0}

    def step(sweep: str, concurrency: int, prompt: int, output: int) -> dict[str, Any]:
        return {
            "sweep": sweep,
            "concurrency": concurrency,
            "prompt_tokens": prompt,
            "output_tokens": output,
            "requests": 4,
            "failed": 0,
            "failures": {},
            "seconds": 1.0,
            "tokens_per_second": 10.0 * concurrency,
            "requests_per_second": 1.0,
            "ttft_ms": times,
            "tpot_ms": times if output > 1 else None,
            "latency_ms": times,
            "each": [{"ttft_ms": 100.0 + i, "latency_ms": 200.0 + i} for i in range(4)],
        }

    return {
        "versions": {"vllm-k80": "0.1.0", "vllm": "0.10.1.1"},
        "began": "2026-11-26T10:00:00+00:00",
        "epoch": [1000.0, 1100.0],
        "url": "http://server1:8001",
        "model": "<b>m</b>",
        "about": {"server": "server1 die0", "card": ""},
        "client": "c",
        "settings": {"prompt_tokens": 16, "output_tokens": 8, "seed": 0},
        "steps": [
            step("concurrency", 1, 16, 8),
            step("concurrency", 2, 16, 8),
            step("prompt_length", 1, 64, 1),
        ],
        "predicted": {"none": "no model was named."},
        "samples": {},
    }


LINE = "{}, GPU-1, Tesla K80, {}, {}, {}, 100.1, 97\n"


def test_samples_of_the_run_are_shown_and_others_are_not(
    made_up: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "samples.csv"
    file.write_text(
        "Unable to determine the device handle for GPU 0000:06:00.0: GPU is lost.\n"
        + LINE.format(990, 30, 324, "0x1")  # before it began
        + LINE.format(1010, 60, 875, "0x0000000000000000")
        + LINE.format(1020, 81, "[N/A]", "0x0000000000000040")
        + "1030, GPU-1, Tes"  # being written
    )
    sampled = bench_report.samples([file], 1000, 1100)
    die = sampled["GPU-1"]
    assert [(row["s"], row["celsius"], row["sm_mhz"]) for row in die["rows"]] == [
        (10.0, 60.0, 875.0),
        (20.0, 81.0, None),
    ]
    page = bench_report.page(made_up | {"samples": sampled})
    assert "GPU-1, Tesla K80: slowed down by hardware thermal" in page
    assert "not sampled" not in page
    assert "not sampled" in bench_report.page(made_up)


def test_what_is_predicted_is_said_to_be_so_and_nothing_else_is(made_up: dict[str, Any]) -> None:
    plain = bench_report.page(made_up)
    assert "Nothing was predicted: no model was named." in plain
    assert "predicted for one K80 die" not in plain
    made_up["predicted"] = {
        "context": 24,
        "decode": [{"batch": 1, "tokens_per_second": 29.2, "if_as_optimistic_as_known": 20.7}],
        "first_token_s": [[64, 0.5]],
    }
    page = bench_report.page(made_up)
    assert "predicted for one K80 die: 1, 29.2" in page  # a dot in the plot of tokens a second
    assert "predicted for one K80 die: 64, 500" in page
    assert "measured: 2, 20" in page
    assert "measured nowhere" in page
    assert "29.2" not in page.split("<svg")[0]  # the table holds what was measured


def test_a_page_says_what_was_measured_and_needs_nothing_else(made_up: dict[str, Any]) -> None:
    page = bench_report.page(made_up)
    assert "<b>m" not in page
    assert "&lt;b&gt;m&lt;/b&gt;" in page
    for words in ("server1 die0", "vllm 0.10.1.1", "2026-11-26T10:00", "not said"):
        assert words in page
    assert "<script" not in page
    assert "src=" not in page
    assert "url(" not in page


# ---- what changed


@pytest.mark.parametrize(
    ("probability", "freedom", "t"),
    # Tables of Student's t.
    [
        (0.975, 1, 12.706),
        (0.975, 4, 2.776),
        (0.975, 30, 2.042),
        (0.995, 10, 3.169),
        (0.95, 7, 1.895),
    ],
)
def test_quantiles_are_those_of_the_tables(probability: float, freedom: float, t: float) -> None:
    assert bench_compare.t_quantile(probability, freedom) == pytest.approx(t, abs=6e-4)


def test_an_interval_is_welchs() -> None:
    """Worked out by hand: logarithms 0, 1, 2 and 3, 5 have variances 1 and 2, so an error of
    sqrt(1/3 + 1), and (1/3 + 1)^2 / ((1/3)^2 / 2 + 1^2 / 1) = 1.684 degrees of freedom."""
    a, b = [math.exp(x) for x in (0, 1, 2)], [math.exp(x) for x in (3, 5)]
    found = bench_compare.ratio(a, b, 0.95)
    assert found is not None
    middle, low, high = (math.log(value) for value in found)
    assert middle == pytest.approx(3)
    half = bench_compare.t_quantile(0.975, 1.6842105) * math.sqrt(4 / 3)
    assert (low, high) == pytest.approx((3 - half, 3 + half))


@pytest.mark.parametrize("one", [[1.0], [2.0, 2.0]])
def test_without_scatter_nothing_is_said(one: list[float]) -> None:
    assert bench_compare.ratio(one, [2.0, 2.0], 0.95) is None


def test_an_interval_covers_as_often_as_it_says() -> None:
    import random

    draw = random.Random(7)
    hits = 0
    for _ in range(200):
        a = [math.exp(draw.gauss(0, 0.1)) for _ in range(5)]
        b = [math.exp(draw.gauss(0.2, 0.3)) for _ in range(9)]
        found = bench_compare.ratio(a, b, 0.9)
        assert found is not None
        hits += found[1] <= math.exp(0.2) <= found[2]
    assert hits / 200 == pytest.approx(0.9, abs=0.05)


def test_requests_that_ran_together_count_once(made_up: dict[str, Any]) -> None:
    one, two, _ = made_up["steps"]
    assert bench_compare.together(one, "ttft_ms") == [100, 101, 102, 103]
    assert bench_compare.together(two, "ttft_ms") == [100.5, 102.5]
    assert bench_compare.together(one, "tpot_ms") == pytest.approx([100 / 7] * 4)
    two["each"][1] = None  # it failed
    assert bench_compare.together(two, "ttft_ms") == [100, 102.5]


def scaled(made_up: dict[str, Any], path: Path, factor: float) -> Path:
    other = json.loads(json.dumps(made_up))
    for step in other["steps"]:
        for i, each in enumerate(step["each"]):
            for key in each:
                each[key] *= factor * (1 + 0.001 * i * (factor != 1))
    path.mkdir()
    (path / "result.json").write_text(json.dumps(other))
    return path


@pytest.mark.parametrize(
    ("factor", "word"), [(1.0, "no difference shown"), (2.0, "slower"), (0.5, "faster")]
)
def test_a_comparison_says_it_in_words(
    made_up: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    word: str,
) -> None:
    a, b = scaled(made_up, tmp_path / "a", 1), scaled(made_up, tmp_path / "b", factor)
    assert cli.main(["bench", "--compare", str(a), str(b / "result.json")]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "first token" in line)
    assert word in line
    if factor == 2:
        assert "time +100" in line
    assert "Welch" in said
    assert "95 %" in said


def test_a_comparison_says_what_is_not_the_same(
    made_up: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = scaled(made_up, tmp_path / "a", 1)
    made_up |= {"model": "n", "about": {"server": "server2", "card": ""}}
    made_up["steps"] = made_up["steps"][1:]
    b = scaled(made_up, tmp_path / "b", 1)
    assert cli.main(["bench", "--compare", str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert "not the same: model: <b>m</b>; n" in said
    assert "not the same: server: server1 die0; server2" in said
    assert "not the same: card" not in said
    assert "steps that only one of them has, not compared: 1" in said


def test_what_cannot_be_compared_is_one_sentence(
    made_up: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = scaled(made_up, tmp_path / "a", 1)
    for step in made_up["steps"]:
        step["output_tokens"] += 1
    b = scaled(made_up, tmp_path / "b", 1)
    assert cli.main(["bench", "--compare", str(a), str(b)]) == 1
    assert "have no step in common" in refusal(capsys)
    (tmp_path / "c.json").write_text("{}")
    assert cli.main(["bench", "--compare", str(a), str(tmp_path / "c.json")]) == 1
    assert "is not a result of `vllm-k80 bench`" in refusal(capsys)
    assert cli.main(["bench", "--compare", str(a), str(tmp_path / "none.json")]) == 1
    assert "No such file" in refusal(capsys)
