"""The gateway's own configuration in a real HAProxy on loopback, before small stand-in instances.

The role's templates are rendered by Ansible as the role renders them; only paths and ports are
the test's.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROLE = Path(__file__).parents[1] / "roles" / "gateway"
KEY = "sk-anna-0123456789abcdef"
BENS_KEY = "sk-ben-0123456789abcdef"
INSTANCE_KEY = "instance-0123456789abcdef"
BODY_LIMIT = 262144
ANSIBLE_PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until(condition: Any, seconds: float = 10.0, what: str = "the condition") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not hold within {seconds} s"
        time.sleep(0.05)


@dataclass
class Instance:
    """A stand-in for a vLLM server: says what it got, and misbehaves when told to."""

    port: int = field(default_factory=free_port)
    ready: bool = True
    mode: str = "answer"  # answer, drop (close before the first byte), http500, http401, slow, sse
    seen: list[dict[str, Any]] = field(default_factory=list)
    client_left: threading.Event = field(default_factory=threading.Event)
    server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        instance = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Quiet."""

            def reply(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                if self.path == "/ready":
                    self.reply(200 if instance.ready else 503, {})
                else:
                    self.reply(200, {"path": self.path, "port": instance.port})

            def read_chunked(self) -> bytes:
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def do_POST(self) -> None:
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    body = self.read_chunked()
                else:
                    body = self.rfile.read(int(self.headers["Content-Length"]))
                instance.seen.append({"headers": dict(self.headers), "body": body})
                answer = {"port": instance.port, "bytes": len(body)}
                match instance.mode:
                    case "drop":
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                    case "http500":
                        self.reply(500, {"error": {"message": "engine dead"}})
                    case "http401":
                        self.reply(401, {"error": "Unauthorized"})
                    case "slow":
                        self.connection.settimeout(0.1)
                        for _ in range(30):
                            try:
                                gone = self.connection.recv(1) == b""
                            except TimeoutError:
                                continue
                            except ConnectionResetError:
                                gone = True
                            if gone:
                                instance.client_left.set()
                                self.close_connection = True
                                return
                        self.reply(200, answer)
                    case "sse":
                        self.send_response(200)
                        self.send_header("Content-Type", "text/event-stream")
                        self.send_header("Transfer-Encoding", "chunked")
                        self.end_headers()
                        for n in range(4):
                            event = f"data: {n}\n\n".encode()
                            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                            self.wfile.flush()
                            time.sleep(0.4)
                        self.wfile.write(b"0\r\n\r\n")
                    case _:
                        time.sleep(0.05)
                        self.reply(200, answer)

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """HAProxy resets the connections of its checks; that is no news."""

        self.server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None


@dataclass
class Gateway:
    port: int
    stats_port: int
    config: Path
    log: Path
    process: subprocess.Popen[bytes]
    instances: tuple[Instance, Instance]

    def request(
        self,
        method: str = "POST",
        path: str = "/v1/chat/completions",
        body: bytes | Iterator[bytes] | None = b"{}",
        key: str | None = KEY,
        timeout: float = 20,
        **headers: str,
    ) -> tuple[int, http.client.HTTPMessage, dict[str, Any]]:
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(
                method, path, body, {k.replace("_", "-"): v for k, v in headers.items()}
            )
            response = connection.getresponse()
            return response.status, response.headers, json.loads(response.read())
        finally:
            connection.close()

    def ready_instances(self) -> int:
        status, _, body = self.request("GET", "/health", None, None)
        return int(body["ready_instances"]) if status == 200 else 0


def haproxy() -> str:
    found = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if not found:
        pytest.fail("There is no HAProxy to test with: apt-get install haproxy", pytrace=False)
    return found


def render(
    folder: Path, instances: list[Instance], **overrides: Any
) -> subprocess.CompletedProcess[str]:
    """Render both templates into the folder, after the role's checks, with its defaults."""
    variables = {
        "gateway_api_keys": [{"name": "anna", "key": KEY}, {"name": "ben", "key": BENS_KEY}],
        "vllm_instance_api_key": INSTANCE_KEY,
        "gateway_bind_address": "127.0.0.1",
        "gateway_check_interval": "200ms",
        "gateway_check_fast_interval": "100ms",
        "__gateway_config_dir": str(folder),
        "__gateway_runtime_socket": str(folder / "admin.sock"),
    } | overrides
    resolved = [
        {
            "name": f"die{i}",
            "address": "127.0.0.1",
            "port": instance.port,
            "model": "m",
            "served_model": "m",
        }
        for i, instance in enumerate(instances)
    ]
    inventory = {
        "k80_servers": {"hosts": {"server1": {"vllm_instance_resolved": resolved}}},
        "k80_gateways": {
            "hosts": {
                "gateway1": {
                    "ansible_connection": "local",
                    "ansible_python_interpreter": sys.executable,
                }
            }
        },
    }
    template = {
        "src": str(ROLE / "templates/{{ item }}.j2"),
        "dest": str(folder / "{{ item }}"),
        "mode": "0600",
    }
    play = [
        {
            "hosts": "k80_gateways",
            "gather_facts": False,
            "vars_files": [str(ROLE / "defaults/main.yml"), str(ROLE / "vars/main.yml")],
            "tasks": [
                {"ansible.builtin.import_tasks": str(ROLE / "tasks/validate.yml")},
                {"ansible.builtin.template": template, "loop": ["keys.map", "haproxy.cfg"]},
            ],
        }
    ]
    (folder / "inventory.json").write_text(json.dumps(inventory))
    (folder / "play.yml").write_text(json.dumps(play))
    result = subprocess.run(
        [
            str(ANSIBLE_PLAYBOOK),
            "-i",
            str(folder / "inventory.json"),
            "-e",
            json.dumps(variables),
            str(folder / "play.yml"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "ANSIBLE_CONFIG"},
    )
    if result.returncode == 0:
        (folder / "keys.map").rename(folder / "vllm-k80-keys.map")
    return result


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    program = haproxy()
    folder = tmp_path_factory.mktemp("gateway")
    instances = (Instance(), Instance())
    port, stats_port = free_port(), free_port()
    result = render(
        folder,
        list(instances),
        gateway_port=port,
        gateway_stats_port=stats_port,
        gateway_retry_after_seconds=7,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    config = folder / "haproxy.cfg"
    if os.geteuid() != 0:  # only root may change user and root directory
        config.write_text(re.sub(r"(?m)^    (chroot|user|group) .*\n", "", config.read_text()))
    checked = subprocess.run(
        [program, "-c", "-f", str(config)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stdout + checked.stderr, checked.stderr
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([program, "-W", "-f", str(config)], stdout=output, stderr=output)
    started = Gateway(port, stats_port, config, log, process, instances)
    for instance in instances:
        instance.start()

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    wait_until(answers, what="the gateway's port")
    yield started
    process.terminate()
    process.wait(10)
    for instance in instances:
        instance.stop()


@pytest.fixture
def both(gateway: Gateway) -> Iterator[Gateway]:
    """The gateway with two well-behaved, ready instances."""
    for instance in gateway.instances:
        if instance.server is None:
            instance.start()
        instance.ready, instance.mode = True, "answer"
        instance.seen.clear()
        instance.client_left.clear()
    wait_until(lambda: gateway.ready_instances() == 2, what="two ready instances")
    return gateway


def test_wrong_or_missing_key_is_401(both: Gateway) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {INSTANCE_KEY}"},
    ):
        status, answer, body = both.request(key=None, **headers)
        assert (status, answer["Content-Type"], answer["WWW-Authenticate"]) == (
            401,
            "application/json",
            "Bearer",
        )
        assert body["error"]["code"] == "invalid_api_key"
        assert "Authorization: Bearer KEY" in body["error"]["message"]
    assert not both.instances[0].seen + both.instances[1].seen


def test_right_key_reaches_an_instance_with_its_key(both: Gateway) -> None:
    status, answer, _ = both.request(X_Request_Id="chosen-by-the-client")
    assert status == 200
    (got,) = both.instances[0].seen + both.instances[1].seen
    assert got["headers"]["authorization"] == f"Bearer {INSTANCE_KEY}"
    assert KEY not in str(got)
    assert re.fullmatch(r"[0-9a-f-]{36}", answer["X-Request-Id"])
    assert got["headers"]["x-request-id"] == answer["X-Request-Id"]


def test_leastconn_spreads(both: Gateway) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: both.request(), range(40)))
    assert [status for status, _, _ in results] == [200] * 40
    counts = [len(instance.seen) for instance in both.instances]
    assert min(counts) >= 14, counts


def test_busy_instance_gets_less(both: Gateway) -> None:
    busy, idle = both.instances
    busy.mode = "slow"  # 3 s each
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(both.request)
        wait_until(lambda: busy.seen or idle.seen, what="the request's arrival")
        if not busy.seen:
            held.result()
            held = pool.submit(both.request)
            wait_until(lambda: busy.seen, what="the next request's arrival at the other")
        for _ in range(6):
            assert both.request()[2]["port"] == idle.port
        assert held.result()[0] == 200


@pytest.mark.parametrize("failure", ["drop", "http500"])
def test_request_is_sent_again_before_the_first_byte(both: Gateway, failure: str) -> None:
    bad, good = both.instances
    bad.mode = failure
    body = json.dumps({"messages": "x" * (BODY_LIMIT - 100)}).encode()  # the largest kind, too
    for _ in range(6):
        status, _, answer = both.request(body=body)
        assert (status, answer["port"], answer["bytes"]) == (200, good.port, len(body))
    assert bad.seen, "the test did not reach the bad instance"


def test_instance_killed_between_checks(both: Gateway) -> None:
    dead, alive = both.instances
    dead.stop()
    for _ in range(6):
        status, _, answer = both.request()
        assert (status, answer["port"]) == (200, alive.port)


def test_stream_is_not_buffered(both: Gateway) -> None:
    for instance in both.instances:
        instance.mode = "sse"
    connection = http.client.HTTPConnection("127.0.0.1", both.port, timeout=20)
    started = time.monotonic()
    connection.request("POST", "/v1/chat/completions", b"{}", {"Authorization": f"Bearer {KEY}"})
    response = connection.getresponse()
    arrivals = []
    while line := response.readline():
        if line.startswith(b"data:"):
            arrivals.append((line, time.monotonic() - started))
    connection.close()
    assert [line for line, _ in arrivals] == [b"data: %d\n" % n for n in range(4)]
    for n, (_, seconds) in enumerate(arrivals):
        assert 0.4 * n - 0.05 < seconds < 0.4 * n + 0.35, arrivals


def test_client_that_leaves_ends_the_generation(both: Gateway) -> None:
    for instance in both.instances:
        instance.mode = "slow"
    with pytest.raises(TimeoutError):
        both.request(timeout=0.5)
    wait_until(lambda: any(i.client_left.is_set() for i in both.instances), 2, "the end")


def test_instance_that_is_not_ready_gets_nothing(both: Gateway) -> None:
    unready, ready = both.instances
    unready.ready = False
    wait_until(lambda: both.ready_instances() == 1, what="the check's failure")
    with ThreadPoolExecutor(4) as pool:
        assert {r[2]["port"] for r in pool.map(lambda _: both.request(), range(12))} == {ready.port}
    assert not unready.seen
    unready.ready = True
    wait_until(lambda: both.ready_instances() == 2, what="the instance's return")


def test_all_down_is_503_with_retry_after(both: Gateway) -> None:
    both.instances[0].stop()
    both.instances[1].ready = False
    wait_until(lambda: both.ready_instances() == 0, what="the end of both")
    for path, method in (("/v1/chat/completions", "POST"), ("/health", "GET")):
        status, answer, body = both.request(method, path)
        assert (status, answer["Retry-After"], body["error"]["code"]) == (
            503,
            "7",
            "no_instance_ready",
        ), path
        assert answer["X-Request-Id"]
    assert both.request(key="wrong")[0] == 401, "only who has a key learns it in /v1"


def test_health_needs_no_key(both: Gateway) -> None:
    assert both.request("GET", "/health", None, None)[2] == {"status": "ok", "ready_instances": 2}


@pytest.mark.parametrize(
    "path", ["/metrics", "/ready", "/docs", "/tokenize", "/", "/v1", "//v1/models", "/health/x"]
)
def test_only_the_api_is_reachable(both: Gateway, path: str) -> None:
    status, _, body = both.request("GET", path, None)
    assert (status, body["error"]["code"]) == (404, "not_found")


def chunks(size: int) -> Iterator[bytes]:
    for start in range(0, size, 4096):
        yield b"x" * min(4096, size - start)


@pytest.mark.parametrize("chunked", [False, True])
def test_body_limit(both: Gateway, chunked: bool) -> None:
    """All that is accepted can be sent again; what cannot is refused."""

    def body(size: int) -> bytes | Iterator[bytes]:
        return chunks(size) if chunked else b"x" * size

    both.instances[0].mode = "drop"
    for _ in range(3):
        status, _, answer = both.request(body=body(BODY_LIMIT))
        assert (status, answer.get("bytes")) == (200, BODY_LIMIT), answer
    status, _, answer = both.request(body=body(BODY_LIMIT + 1))
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    assert str(BODY_LIMIT) in answer["error"]["message"]


def test_refused_instance_key_is_not_blamed_on_the_user(both: Gateway) -> None:
    for instance in both.instances:
        instance.mode = "http401"
    status, _, body = both.request()
    assert (status, body["error"]["code"]) == (502, "bad_gateway")


def test_log_names_owner_and_instance_but_no_secret(both: Gateway) -> None:
    status, answer, _ = both.request(
        path="/v1/completions?q=hidden", body=b'{"prompt": "a secret prompt"}'
    )
    assert status == 200
    wait_until(lambda: answer["X-Request-Id"] in both.log.read_text(), what="the log line")
    text = both.log.read_text()
    (line,) = [x for x in text.splitlines() if answer["X-Request-Id"] in x]
    assert re.search(
        r"user=anna .* path=/v1/completions status=200 instance=server1:die[01] ", line
    )
    for secret in (KEY, INSTANCE_KEY, "secret prompt", "hidden"):
        assert secret not in text
    both.request(key="wrong-but-typed-by-someone")
    assert "wrong-but" not in both.log.read_text()


def test_statistics_on_loopback(both: Gateway) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", both.stats_port, timeout=5)
    connection.request("GET", "/metrics")
    metric = b'haproxy_server_status{proxy="instances",server="server1:die0",state="UP"} 1'
    assert metric in connection.getresponse().read()
    connection.close()
    assert f"bind 127.0.0.1:{both.stats_port}" in both.config.read_text()


def test_keys_file_holds_hashes(both: Gateway) -> None:
    text = both.config.with_name("vllm-k80-keys.map").read_text()
    assert "anna" in text
    assert KEY not in text


def test_reload_loses_nothing(both: Gateway) -> None:
    for instance in both.instances:
        instance.mode = "sse"
    with ThreadPoolExecutor(4) as pool:

        def stream(_: int) -> bytes:
            connection = http.client.HTTPConnection("127.0.0.1", both.port, timeout=20)
            connection.request("POST", "/v1/completions", b"{}", {"Authorization": f"Bearer {KEY}"})
            data = connection.getresponse().read()
            connection.close()
            return data

        streams = pool.map(stream, range(12))
        for _ in range(3):
            time.sleep(0.7)
            both.process.send_signal(signal.SIGUSR2)
        assert [s.count(b"data:") for s in streams] == [4] * 12


def test_a_request_that_arrives_over_a_reload_is_served(both: Gateway) -> None:
    """It is the old process's, in which HAProxy counts no server any more."""
    heads = [
        b"GET /health HTTP/1.1\r\nHost: gateway\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: gateway\r\nContent-Length: 2\r\n",
    ]
    rest = f"Authorization: Bearer {KEY}\r\n\r\n".encode()
    connections = [socket.create_connection(("127.0.0.1", both.port), timeout=20) for _ in heads]
    for connection, head in zip(connections, heads, strict=True):
        connection.sendall(head)
    time.sleep(0.3)
    both.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: b"Proxy instances stopped" in both.log.read_bytes(), what="the reload")
    for connection, body in zip(connections, (b"", b"{}"), strict=True):
        connection.sendall(rest + body)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        connection.close()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"gateway_api_keys": []}, "gateway_api_keys is empty"),
        ({"gateway_api_keys": [{"name": "anna", "key": "short"}]}, "not so the key of anna"),
        ({"gateway_api_keys": [{"name": "an na", "key": KEY}]}, "not so an na"),
        (
            {"gateway_api_keys": [{"name": "anna", "key": KEY}, {"name": "ben", "key": KEY}]},
            "a key of its own",
        ),
        ({"vllm_instance_api_key": 'quote"quote"quote'}, "vllm_instance_api_key"),
    ],
)
def test_bad_keys_are_refused_in_words(
    tmp_path: Path, overrides: dict[str, Any], words: str
) -> None:
    result = render(tmp_path, [Instance()], **overrides)
    assert result.returncode != 0
    assert words in " ".join(result.stdout.split())
    assert KEY not in result.stdout
