"""`vllm-k80 probe` and ``GET /ready`` against a small HTTP server that speaks vLLM's API."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vllm_k80 import cli, keys, readiness, serve
from vllm_k80 import probe as module


class Engine:
    """What the server generates, and how it fails."""

    tokens: tuple[int, ...] = tuple(range(16))
    status = 200
    delay = 0.0
    slow_once = 0.0
    silent_once = 0.0  # about what it serves
    flip = False
    key: str | None = None
    generated: tuple[int, ...] = ()  # for others, as /metrics says each time; the last from then on


@pytest.fixture
def engine() -> Iterator[Engine]:
    state = Engine()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            time.sleep(state.silent_once)
            state.silent_once = 0.0
            if state.key and self.headers["Authorization"] != f"Bearer {state.key}":
                self.answer(401, {"error": "Unauthorized"})
            elif self.path == "/metrics" and state.generated:
                number, *later = state.generated
                state.generated = tuple(later) or (number,)
                labels = '{engine="0",model_name="m"}'
                body = f"# TYPE x counter\nvllm:generation_tokens_total{labels} {number}.0\n"
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body.encode())
            else:
                self.answer(200, {"data": [{"id": "m"}]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(state.delay + state.slow_once)
            state.slow_once = 0.0
            if state.status != 200:
                self.answer(state.status, {"error": "engine is dead"})
                return
            tokens = state.tokens[: request["max_tokens"]]
            if state.flip:
                state.tokens = tuple(token + 1 for token in state.tokens)
            names = [f"token_id:{token}" for token in tokens]
            self.answer(200, {"choices": [{"logprobs": {"tokens": names}}]})

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield state
    server.shutdown()


@pytest.fixture(autouse=True)
def proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run" / "proof.json"
    monkeypatch.setattr(readiness, "PROOF", path)
    monkeypatch.setattr(readiness, "STEP", path.with_name("step"))
    monkeypatch.setattr(readiness, "DRAINED", tmp_path / "drained")
    monkeypatch.setattr(readiness, "DOCTORED", tmp_path / "drained-by-doctor")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return path


def probe(engine: Engine, *arguments: str) -> int:
    """By an engine that is not slow on purpose, though the machine may be."""
    seconds = "1" if engine.delay > 1 else "30"
    return cli.main(["probe", "--url", engine.url, "--timeout", seconds, *arguments])  # type: ignore[attr-defined]


def test_golden_tokens_are_recorded_then_reproduced(engine, tmp_path, capsys) -> None:
    golden = tmp_path / "state" / "golden.json"
    assert probe(engine, "--golden", str(golden)) == 0
    assert json.loads(golden.read_text())["tokens"] == list(range(16))
    assert "Recorded 16" in capsys.readouterr().out
    written = golden.read_text()
    assert probe(engine, "--golden", str(golden)) == 0
    assert "Reproduced 16" in capsys.readouterr().out
    assert golden.read_text() == written
    assert readiness.status()[0]


def test_other_tokens_fail_and_withdraw_the_proof(engine, tmp_path, capsys, proof) -> None:
    golden = tmp_path / "golden.json"
    probe(engine, "--golden", str(golden))
    assert proof.exists()
    engine.tokens = (*range(5), 77, *range(6, 16))
    assert probe(engine, "--golden", str(golden)) == 1
    assert "position 5" in capsys.readouterr().err
    assert not proof.exists()
    assert json.loads(golden.read_text())["tokens"] == list(range(16))  # kept as evidence


def test_a_server_that_has_become_slow_fails(engine, tmp_path, capsys) -> None:
    golden = tmp_path / "golden.json"
    engine.delay = 0.05
    assert probe(engine, "--golden", str(golden), "--max-slowdown", "3") == 0
    engine.delay = 0.5
    assert probe(engine, "--golden", str(golden), "--max-slowdown", "3") == 1
    assert "times as long as when they were recorded; 3 times is the limit" in (
        capsys.readouterr().err
    )
    assert probe(engine, "--golden", str(golden)) == 0


def test_one_slow_answer_is_not_slowness(engine, tmp_path) -> None:
    golden = tmp_path / "golden.json"
    engine.delay = 0.05
    assert probe(engine, "--golden", str(golden)) == 0
    engine.slow_once = 0.7
    assert probe(engine, "--golden", str(golden), "--max-slowdown", "3") == 0


def test_nothing_is_recorded_when_two_generations_differ(engine, tmp_path, capsys) -> None:
    engine.flip = True
    golden = tmp_path / "golden.json"
    assert probe(engine, "--golden", str(golden)) == 1
    assert "does not compute reliably" in capsys.readouterr().err
    assert not golden.exists()


def test_a_damaged_golden_file_is_named(engine, tmp_path, capsys) -> None:
    golden = tmp_path / "golden.json"
    golden.write_text("{")
    assert probe(engine, "--golden", str(golden)) == 1
    assert f"{golden} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"delay": 3.0}, "did not answer within 1 s"),
        ({"status": 500}, "answered 500"),
        ({"tokens": ()}, "generated 0 tokens instead of 1"),
        ({"tokens": ("none",)}, "answered without tokens"),
        ({"key": "secret"}, "Set VLLM_API_KEY"),
    ],
)
def test_liveness_fails_in_words(engine, capsys, proof, fault, message) -> None:
    assert probe(engine) == 0
    assert proof.exists()
    vars(engine).update(fault)
    capsys.readouterr()
    assert probe(engine) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not proof.exists()


def test_a_full_server_lives_though_the_probe_has_no_turn(engine, capsys, proof) -> None:
    engine.delay, engine.generated = 2, (100, 107)
    assert probe(engine) == 0
    assert "no turn within 1 s, but others got 7 tokens" in capsys.readouterr().out
    assert proof.exists()


def test_an_engine_that_works_on_a_long_prompt_lives(engine, capsys, proof) -> None:
    engine.delay, engine.generated = 2, (100, 100)
    readiness.note_step()
    before = readiness.last_step()
    step = threading.Timer(0.5, readiness.note_step)
    step.start()
    assert probe(engine) == 0
    step.join()
    assert readiness.last_step() > before > 0
    assert "no turn within 1 s, but the engine works" in capsys.readouterr().out
    assert proof.exists()


@pytest.mark.parametrize("generated", [(100, 100), ()])
def test_one_that_generates_for_nobody_does_not(engine, capsys, proof, generated) -> None:
    engine.delay, engine.generated = 2, generated
    assert probe(engine) == 1
    assert "did not answer within 1 s" in capsys.readouterr().err
    assert not proof.exists()


def test_the_key_is_sent(engine, monkeypatch) -> None:
    engine.key = "secret"
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert probe(engine) == 0


def test_a_proxy_of_the_environment_is_for_elsewhere(engine, monkeypatch) -> None:
    engine.generated = (100,)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.delenv("no_proxy", raising=False)
    assert probe(engine) == 0
    assert module.tokens_so_far(engine.url) == 100


def test_a_server_that_is_silent_once_is_waited_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one on a busy host that loads its model: it is not up yet, and not broken."""
    monkeypatch.setattr(module, "_QUICK", 0.2)
    engine.silent_once = 0.5
    assert probe(engine, "--wait", "10") == 0


def test_wait_ends_with_a_sentence(capsys) -> None:
    started = time.monotonic()
    assert cli.main(["probe", "--url", "http://127.0.0.1:9", "--wait", "2"]) == 1
    assert 2 <= time.monotonic() - started < 30
    assert "No server after 2 s" in capsys.readouterr().err


def ask_ready(query: bytes = b"") -> tuple[int, dict[str, Any]]:
    """``GET /ready`` through the middleware."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("/ready reached the server behind the middleware")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/ready", "query_string": query}
    asyncio.run(readiness.ReadinessMiddleware(app)(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_ready_follows_the_proof(proof, monkeypatch) -> None:
    assert ask_ready() == (503, {"ready": False, "reason": "no tokens have been generated yet"})
    readiness.write_proof("golden", 1.0)
    status, content = ask_ready()
    assert (status, content["ready"], content["proof"]["kind"]) == (200, True, "golden")
    monkeypatch.setenv("VLLM_K80_PROOF_MAX_AGE", "30")
    old = time.time() - 31
    os.utime(proof, (old, old))
    status, content = ask_ready()
    assert status == 503
    assert "limit is 30 s" in content["reason"]


def test_a_drained_server_is_ready_for_nothing_new(proof, monkeypatch) -> None:
    readiness.DRAINED.write_text("operator\n")
    assert ask_ready()[0] == 503  # not proven comes first: nothing may bring it back by a 404
    readiness.write_proof("golden", 1.0)
    assert ask_ready()[0] == 404
    assert ask_ready()[1]["reason"] == "drained by operator"
    readiness.DRAINED.unlink()
    assert ask_ready()[0] == 200


def test_a_server_on_a_die_that_the_doctor_distrusts_is_ready_for_nothing_new(proof) -> None:
    readiness.write_proof("golden", 1.0)
    readiness.DOCTORED.write_text("ecc-errors: die 0000:05:00.0 has had 2\n")
    status, content = ask_ready()
    assert (status, content["proof"]["kind"]) == (404, "golden")
    assert content["reason"] == "drained by k80-doctor: ecc-errors: die 0000:05:00.0 has had 2"
    readiness.DRAINED.write_text("operator\n")
    assert ask_ready()[1]["reason"] == "drained by operator"
    readiness.DRAINED.unlink()
    readiness.DOCTORED.unlink()
    assert ask_ready()[0] == 200


def test_an_update_that_a_reboot_ended_drains_nothing(proof) -> None:
    readiness.write_proof("golden", 1.0)
    readiness.DRAINED.write_text(f"update {readiness.BOOT_ID.read_text()}")
    assert ask_ready()[1]["reason"] == "drained by update"
    readiness.DRAINED.write_text("update 00000000-0000-0000-0000-000000000000\n")
    assert ask_ready()[0] == 200


def test_ready_for_a_model_that_is_served(proof, monkeypatch) -> None:
    readiness.write_proof("golden", 1.0)
    names = serve.served_names(["serve", "/m", "--served-model-name", "a b", "c", "--port", "1"])
    monkeypatch.setenv(readiness.SERVED_NAMES, json.dumps(names))
    assert [ask_ready(query)[0] for query in (b"", b"model=a%20b", b"model=c", b"model=d")] == [
        200,
        200,
        200,
        404,
    ]
    assert ask_ready(b"model=d")[1]["reason"] == "this server serves a b, c"


@pytest.mark.parametrize(
    ("sent", "received"), [("first", "first"), ("second", "first"), ("third", "third")]
)
def test_a_second_key_is_as_good_as_the_first(monkeypatch, sent, received) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "first")
    monkeypatch.setenv("VLLM_K80_SECOND_API_KEY", "second")
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    scope = {"type": "http", "headers": [(b"authorization", f"Bearer {sent}".encode())]}
    asyncio.run(keys.SecondKeyMiddleware(app)(scope, None, None))  # type: ignore[arg-type]
    assert seen == [(b"authorization", f"Bearer {received}".encode())]


def test_without_a_second_key_none_opens(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "first")
    monkeypatch.setenv("VLLM_K80_SECOND_API_KEY", "")
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    scope = {"type": "http", "headers": [(b"authorization", b"Bearer ")]}
    asyncio.run(keys.SecondKeyMiddleware(app)(scope, None, None))  # type: ignore[arg-type]
    assert seen == [(b"authorization", b"Bearer ")]


@pytest.mark.parametrize(
    ("method", "key", "status"),
    [
        ("POST", "first", 200),
        ("POST", "other", 401),
        ("POST", None, 401),
        ("DELETE", None, 401),
        ("GET", None, 200),
        ("OPTIONS", None, 200),
    ],
)
def test_what_is_asked_for_needs_the_key_on_every_path(monkeypatch, method, key, status) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "first")
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {"type": "http", "method": method, "path": "/invocations", "headers": headers}
    asyncio.run(keys.NoWayAroundMiddleware(app)(scope, None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == status


def test_other_paths_pass_through() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])

    middleware = readiness.ReadinessMiddleware(app)
    asyncio.run(middleware({"type": "http", "path": "/v1/models"}, None, None))  # type: ignore[arg-type]
    assert seen == ["/v1/models"]
