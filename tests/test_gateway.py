"""The gateway's own configuration in a real HAProxy on loopback, before small stand-in instances.

The role's templates are rendered by Ansible as the role renders them; only paths and ports are
the test's.
"""

from __future__ import annotations

import csv
import datetime
import http.client
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

pytestmark = pytest.mark.slow

ROLE = Path(__file__).parents[1] / "roles" / "gateway"
KEY = "sk-anna-0123456789abcdef"
BENS_KEY = "sk-ben-0123456789abcdef"
INSTANCE_KEY = "instance-0123456789abcdef"
BODY_LIMIT = 262144
DOWN, UP, STOPPING = "0", "2", "3"  # srv_op_state in HAProxy's management guide
ANSIBLE_PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until(condition: Any, what: str, seconds: float = 60.0) -> None:
    """Long enough for a machine that has much else to do: what these tests ask for is an order of
    events, never a duration."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not hold within {seconds} s"
        time.sleep(0.05)


@dataclass
class Instance:
    """A stand-in for a vLLM server: says what it got, and misbehaves when told to."""

    port: int = field(default_factory=free_port)
    served_model: str = "m"
    ready: int = 200  # what GET /ready answers; 404 to a question about another model
    # answer, drop (close before the first byte), http500, http401, held (until `released`, or the
    # client leaves), sse (of 1.6 s), turns (sse whose next event waits for a `turn`), cut (sse that
    # ends after its first event)
    mode: str = "answer"
    metrics: str = ""  # what GET /metrics answers
    seen: list[dict[str, Any]] = field(default_factory=list)
    client_left: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        instance = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Quiet."""

            def reply(self, status: int, body: dict[str, Any] | str) -> None:
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                if self.path.startswith("/ready"):
                    (asked,) = parse_qs(self.path.partition("?")[2])["model"]
                    self.reply(instance.ready if asked == instance.served_model else 404, {})
                elif self.path == "/metrics":
                    self.reply(200, instance.metrics)
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
                mode = instance.mode  # what comes later is for later requests
                match mode:
                    case "drop":
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                    case "http500":
                        self.reply(500, {"error": {"message": "engine dead"}})
                    case "http401":
                        self.reply(401, {"error": "Unauthorized"})
                    case "held":
                        self.connection.settimeout(0.1)
                        while not instance.released.is_set():
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
                        self.connection.settimeout(None)
                        self.reply(200, answer)
                    case "sse" | "turns" | "cut":
                        self.send_response(200)
                        self.send_header("Content-Type", "text/event-stream")
                        self.send_header("Transfer-Encoding", "chunked")
                        self.end_headers()
                        for n in range(4):
                            event = f"data: {n}\n\n".encode()
                            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                            self.wfile.flush()
                            if mode == "cut":
                                self.close_connection = True
                                return
                            if mode == "sse":
                                time.sleep(0.4)
                            elif not instance.turn.acquire(timeout=60):
                                raise TimeoutError("nobody gave a turn")
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
    instances: tuple[Instance, ...]

    def request(
        self,
        method: str = "POST",
        path: str = "/v1/chat/completions",
        body: bytes | Iterator[bytes] | None = b"{}",
        key: str | None = KEY,
        timeout: float = 60,
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

    def stream(self, body: bytes = b"{}") -> http.client.HTTPResponse:
        """An answer that has begun."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {KEY}"})
        return connection.getresponse()

    def ready_instances(self) -> int:
        status, _, body = self.request("GET", "/health", None, None)
        return int(body["ready_instances"]) if status == 200 else 0

    def command(self, line: str) -> str:
        """What HAProxy's runtime socket answers."""
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(self.config.with_name("admin.sock")))
            s.sendall(f"{line}\n".encode())
            return b"".join(iter(lambda: s.recv(65536), b"")).decode()

    def states(self) -> dict[str, str]:
        """Instances by name: UP, DOWN or STOPPING."""
        lines = [line.split() for line in self.command("show servers state").splitlines()[2:]]
        return {line[3].partition(":")[2]: line[5] for line in lines if line and ":" in line[3]}

    def used(self, of: str, figure: str = "scur") -> int:
        """A current figure of a server (die0), of all servers (BACKEND) or of the clients' side
        (FRONTEND): requests or connections (scur), or requests that wait (qcur)."""
        rows = csv.DictReader(self.command("show stat")[2:].splitlines())
        (row,) = (
            row
            for row in rows
            if row["pxname"] in ("openai", "model:m") and row["svname"] in (of, f"server1:{of}")
            if (row["pxname"] == "openai") == (of == "FRONTEND")
        )
        return int(row[figure])

    def logged(self, answer: http.client.HTTPMessage) -> str:
        """The log's line of an answered request. HAProxy writes it when the client has it all."""
        found: list[str] = []

        def written() -> bool:
            lines = self.log.read_text().splitlines()
            found[:] = [line for line in lines if answer["X-Request-Id"] in line]
            return bool(found)

        wait_until(written, "the log's line")
        (line,) = found
        return line

    def workers(self) -> int:
        """How many HAProxy has started."""
        return self.log.read_text().count("New worker")

    def reload(self) -> None:
        """As the unit does it: see templates/unit.conf.j2."""
        before = self.workers()
        subprocess.run([self.config.with_name("states")], check=True)
        self.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: self.workers() > before, "the new process")
        subprocess.run([self.config.with_name("states"), "reloaded"], check=True)


def haproxy() -> str:
    found = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if not found:
        pytest.fail("There is no HAProxy to test with: apt-get install haproxy", pytrace=False)
    return found


TEMPLATES = {  # as roles/gateway/tasks/main.yml names them on a gateway
    "keys.map.j2": "vllm-k80-keys.map",
    "haproxy.cfg.j2": "haproxy.cfg",
    "servers.state.j2": "vllm-k80-servers.state",
    "states.sh.j2": "states",
    "unit.conf.j2": "unit.conf",
    "status.json.j2": "vllm-k80-status.json",
}


def play(
    folder: Path, tasks: list[dict[str, Any]], instances: list[Instance], **overrides: Any
) -> subprocess.CompletedProcess[str]:
    """Run tasks with what the role has: its variables, its filters, and instances."""
    variables = {
        "gateway_api_keys": [
            {"name": "anna", "key": KEY},
            {"name": "ben", "key": BENS_KEY, "requests_per_minute": 3, "concurrent_requests": 5},
        ],
        "vllm_instance_api_key": INSTANCE_KEY,
        "gateway_bind_address": "127.0.0.1",
        "gateway_check_interval": "200ms",
        "gateway_check_fast_interval": "100ms",
        "gateway_check_timeout": "30s",  # a machine with much else to do is no fault here
        "__gateway_config_dir": str(folder),
        "__gateway_runtime_socket": str(folder / "admin.sock"),
        "__gateway_states_file": str(folder / "run/servers.state"),
    } | overrides
    resolved = [
        {
            "name": f"die{i}",
            "address": "127.0.0.1",
            "port": instance.port,
            "model": "m",
            "served_model": instance.served_model,
            "dies": [f"0000:{i + 5:02x}:00.0"],
        }
        for i, instance in enumerate(instances)
    ]
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    inventory = {
        "k80_servers": {"hosts": {"server1": {"vllm_instance_resolved": resolved}}},
        "k80_gateways": {"hosts": {"gateway1": local}},
    }
    whole = {
        "hosts": "k80_gateways",
        "gather_facts": False,
        "vars_files": [str(ROLE / "defaults/main.yml"), str(ROLE / "vars/main.yml")],
        "tasks": tasks,
    }
    (folder / "inventory.json").write_text(json.dumps(inventory))
    (folder / "play.yml").write_text(json.dumps([whole]))
    (folder / "variables.json").write_text(json.dumps(variables))
    arguments = ["-i", "inventory.json", "-e", "@variables.json", "play.yml"]
    return subprocess.run(
        [str(ANSIBLE_PLAYBOOK), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "ANSIBLE_CONFIG"}
        | {"ANSIBLE_FILTER_PLUGINS": str(ROLE / "filter_plugins")},
    )


def render(
    folder: Path, instances: list[Instance], **overrides: Any
) -> subprocess.CompletedProcess[str]:
    """Render the templates into the folder, after the role's checks, with its defaults."""
    templates = [{"src": src, "dest": dest} for src, dest in TEMPLATES.items()]
    template = {
        "src": f"{ROLE}/templates/{{{{ item.src }}}}",
        "dest": f"{folder}/{{{{ item.dest }}}}",
        "mode": "0700",
    }
    tasks = [
        {"ansible.builtin.import_tasks": str(ROLE / "tasks/validate.yml")},
        {"ansible.builtin.template": template, "loop": templates},
    ]
    result = play(folder, tasks, instances, **overrides)
    config = folder / "haproxy.cfg"
    if config.exists() and os.geteuid() != 0:  # only root may change user and root directory
        config.write_text(re.sub(r"(?m)^    (chroot|user|group) .*\n", "", config.read_text()))
    return result


@contextmanager
def running(folder: Path, *instances: Instance, **overrides: Any) -> Iterator[Gateway]:
    """A gateway before these instances."""
    program = haproxy()
    port, stats_port = free_port(), free_port()
    ports = {"gateway_port": port, "gateway_stats_port": stats_port}
    result = render(folder, list(instances), **ports, **overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    config, log = folder / "haproxy.cfg", folder / "log"
    subprocess.run([folder / "states"], check=True)
    checked = subprocess.run(
        [program, "-c", "-f", str(config)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    # That servers are down at first is what the file of states is for.
    warnings = [line for line in checked.stderr.splitlines() if "WARNING" in line]
    assert not [line for line in warnings if "changed from server-state" not in line], warnings
    for instance in instances:
        instance.start()
    with log.open("wb") as output:
        process = subprocess.Popen([program, "-W", "-f", str(config)], stdout=output, stderr=output)
    started = Gateway(port, stats_port, config, log, process, instances)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers, "the gateway's port")
        yield started
    finally:
        for instance in instances:
            instance.released.set()
        process.terminate()
        process.wait(60)
        for instance in instances:
            instance.stop()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with running(folder, Instance(), Instance(), gateway_retry_after_seconds=7) as started:
        yield started


@pytest.fixture
def both(gateway: Gateway) -> Iterator[Gateway]:
    """The gateway with two well-behaved, ready instances."""
    for instance in gateway.instances:
        if instance.server is None:
            instance.start()
        instance.ready, instance.mode = 200, "answer"
        instance.seen.clear()
        instance.client_left.clear()
        instance.released.clear()
    wait_until(lambda: gateway.ready_instances() == 2, "two ready instances")
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
    for instance in both.instances:
        instance.mode = "held"
    seen = [instance.seen for instance in both.instances]
    with ThreadPoolExecutor(8) as pool:
        requests = []
        for n in range(8):
            requests.append(pool.submit(both.request))
            wait_until(lambda n=n: sum(map(len, seen)) > n, "the request's arrival")
        assert [len(one) for one in seen] == [4, 4]
        for instance in both.instances:
            instance.released.set()
        assert [request.result()[0] for request in requests] == [200] * 8


def test_busy_instance_gets_less(both: Gateway) -> None:
    for instance in both.instances:
        instance.mode = "held"
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(both.request)
        wait_until(lambda: any(i.seen for i in both.instances), "the request's arrival")
        (busy,) = (i for i in both.instances if i.seen)
        (idle,) = (i for i in both.instances if not i.seen)
        idle.mode = "answer"
        for _ in range(6):
            # A client has its answer a moment before HAProxy counts the request as ended.
            wait_until(lambda: not both.used(f"die{both.instances.index(idle)}"), "its end")
            assert both.request()[2]["port"] == idle.port
        busy.released.set()
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


def test_request_is_not_sent_again_after_the_first_byte(both: Gateway) -> None:
    """What has come was generated by an instance: the answer of another would be a second one."""
    for instance in both.instances:
        instance.mode = "cut"
    answer = both.stream()
    assert answer.readline() == b"data: 0\n"
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    assert sum(len(instance.seen) for instance in both.instances) == 1


def test_instance_killed_between_checks(both: Gateway) -> None:
    dead, alive = both.instances
    dead.stop()
    for _ in range(6):
        status, _, answer = both.request()
        assert (status, answer["port"]) == (200, alive.port)


def test_the_dead_are_not_preferred_for_having_nothing_to_do(tmp_path: Path) -> None:
    """A host went off with more instances than a request has tries; the other has much to do."""
    instances = [Instance() for _ in range(6)]
    *dead, alive = instances
    with running(tmp_path, *instances, gateway_check_interval="20s") as gateway:
        wait_until(lambda: gateway.ready_instances() == 6, "six ready instances")
        for instance in instances:
            instance.mode = "held"
        with ThreadPoolExecutor(6) as pool:
            held = [pool.submit(gateway.request) for _ in instances]
            wait_until(lambda: all(each.seen for each in instances), "a request at each")
            for instance in dead:
                instance.released.set()
                instance.stop()
            wait_until(lambda: gateway.used("BACKEND") == 1, "the end of the others")
            alive.mode = "answer"
            for _ in range(6):
                status, _, answer = gateway.request()
                assert (status, answer["port"]) == (200, alive.port)
            alive.released.set()
            assert [request.result()[0] for request in held] == [200] * 6


def test_stream_is_not_buffered(both: Gateway) -> None:
    turn = threading.Semaphore(0)
    for instance in both.instances:
        instance.mode, instance.turn = "turns", turn
    connection = http.client.HTTPConnection("127.0.0.1", both.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", b"{}", {"Authorization": f"Bearer {KEY}"})
    response = connection.getresponse()
    arrived = []
    while line := response.readline():
        if line.startswith(b"data:"):
            arrived.append(line)
            turn.release()  # the next event leaves after this one has come
    connection.close()
    assert arrived == [b"data: %d\n" % n for n in range(4)]


def test_client_that_leaves_ends_the_generation(both: Gateway) -> None:
    for instance in both.instances:
        instance.mode = "held"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection(("127.0.0.1", both.port)) as client:
        client.sendall(f"{head}Content-Length: 2\r\n\r\n{{}}".encode())
        wait_until(lambda: any(i.seen for i in both.instances), "the request's arrival")
    wait_until(lambda: any(i.client_left.is_set() for i in both.instances), "the end")


def test_instance_that_is_not_ready_gets_nothing(both: Gateway) -> None:
    unready, ready = both.instances
    unready.ready = 503
    wait_until(lambda: both.ready_instances() == 1, "the check's failure")
    with ThreadPoolExecutor(4) as pool:
        assert {r[2]["port"] for r in pool.map(lambda _: both.request(), range(12))} == {ready.port}
    assert not unready.seen
    unready.ready = 200
    wait_until(lambda: both.ready_instances() == 2, "the instance's return")


def assert_nobody_is_ready(gateway: Gateway) -> None:
    for path, method in (("/v1/chat/completions", "POST"), ("/health", "GET")):
        status, answer, body = gateway.request(method, path)
        assert (status, answer["Retry-After"], body["error"]["code"]) == (
            503,
            "7",
            "no_instance_ready",
        ), path
        assert answer["X-Request-Id"]


def test_all_down_is_503_with_retry_after(both: Gateway) -> None:
    both.instances[0].stop()
    both.instances[1].ready = 503
    wait_until(lambda: both.ready_instances() == 0, "the end of both")
    assert_nobody_is_ready(both)
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
    line = both.logged(answer)
    assert re.search(
        r"user=anna .* path=/v1/completions model=m status=200 instance=server1:die[01] ", line
    )
    text = both.log.read_text()
    for secret in (KEY, INSTANCE_KEY, "secret prompt", "hidden"):
        assert secret not in text
    both.logged(both.request(key="wrong-but-typed-by-someone")[1])
    assert "wrong-but" not in both.log.read_text()


def test_statistics_on_loopback(both: Gateway) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", both.stats_port, timeout=60)
    connection.request("GET", "/metrics")
    metric = b'haproxy_server_status{proxy="model:m",server="server1:die0",state="UP"} 1'
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
        streams = pool.map(lambda _: both.stream().read(), range(12))
        for _ in range(3):
            time.sleep(0.7)
            both.reload()
        assert [s.count(b"data:") for s in streams] == [4] * 12


def test_a_request_that_arrives_over_a_reload_is_served(both: Gateway) -> None:
    """It is the old process's, in which HAProxy counts no server any more."""
    heads = [
        b"GET /health HTTP/1.1\r\nHost: gateway\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: gateway\r\nContent-Length: 2\r\n",
    ]
    rest = f"Authorization: Bearer {KEY}\r\n\r\n".encode()
    wait_until(lambda: not both.used("FRONTEND"), "the end of what was before")
    connections = [socket.create_connection(("127.0.0.1", both.port), timeout=60) for _ in heads]
    for connection, head in zip(connections, heads, strict=True):
        connection.sendall(head)
    wait_until(lambda: both.used("FRONTEND") == 2, "both connections")
    stopped = both.log.read_text().count("Proxy openai stopped")
    both.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: both.log.read_text().count("Proxy openai stopped") > stopped, "the reload")
    for connection, body in zip(connections, (b"", b"{}"), strict=True):
        connection.sendall(rest + body)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        connection.close()


def test_drained_instance_finishes_what_it_has(both: Gateway) -> None:
    drained, other = both.instances
    for instance in both.instances:
        instance.mode = "turns"
    streams = [both.stream() for _ in range(2)]
    assert [len(instance.seen) for instance in both.instances] == [1, 1]
    drained.ready = 404
    wait_until(lambda: both.ready_instances() == 1, "the drain")
    other.mode = "answer"
    for _ in range(6):
        assert both.request()[2]["port"] == other.port
    both.reload()
    for _ in range(6):
        assert both.request()[2]["port"] == other.port
    for instance in both.instances:
        instance.turn.release(4)
    assert [stream.read().count(b"data:") for stream in streams] == [4, 4]
    drained.mode, drained.ready = "answer", 200
    wait_until(lambda: both.ready_instances() == 2, "the return")
    drained.seen.clear()
    wait_until(lambda: both.request()[0] == 200 and drained.seen, "a request")


def test_drained_instances_alone_get_nothing(both: Gateway) -> None:
    for instance in both.instances:
        instance.ready = 404
    wait_until(lambda: both.ready_instances() == 0, "the drain")
    assert_nobody_is_ready(both)
    assert not both.instances[0].seen + both.instances[1].seen


def test_request_in_the_moment_of_a_drain_goes_to_another(both: Gateway) -> None:
    """A drained instance is stopped next, and whoever comes too late is sent on."""
    drained, other = both.instances
    drained.ready, drained.mode = 404, "drop"
    for _ in range(6):
        assert both.request()[2]["port"] == other.port


def test_reload_forgets_nothing(tmp_path: Path) -> None:
    """What each server is, is known in a new process before it has asked."""
    ready, drained, unready, added = (Instance() for _ in range(4))
    drained.ready, unready.ready = 404, 503
    with running(tmp_path, ready, drained, unready, gateway_check_interval="1h") as gateway:
        # A new process asks all its servers in the course of the first interval, this one at once.
        wait_until(lambda: gateway.ready_instances() == 1, "the first check")
        for name, state in (("die1", "stopping"), ("die2", "down")):
            gateway.command(f"set server model:m/server1:{name} health {state}")
        assert gateway.states() == {"die0": UP, "die1": STOPPING, "die2": DOWN}
        gateway.reload()
        assert gateway.states() == {"die0": UP, "die1": STOPPING, "die2": DOWN}
        assert {gateway.request()[2]["port"] for _ in range(6)} == {ready.port}

        # One more server, and one that has moved to another port.
        old_port, drained.port = drained.port, free_port()
        assert old_port != drained.port
        ports = {"gateway_port": gateway.port, "gateway_stats_port": gateway.stats_port}
        instances = [ready, drained, unready, added]
        render(tmp_path, instances, gateway_check_interval="1h", **ports)
        gateway.reload()
        assert gateway.states() == {"die0": UP, "die1": DOWN, "die2": DOWN, "die3": DOWN}
        assert str(drained.port) in gateway.command("show servers state")
        assert {gateway.request()[2]["port"] for _ in range(6)} == {ready.port}


def test_a_reload_that_fails_is_no_success(tmp_path: Path) -> None:
    """The configuration is right, and the port is somebody else's."""
    instance = Instance()
    with (
        running(tmp_path, instance) as gateway,
        socket.create_server(("127.0.0.1", 0)) as somebody,
    ):
        wait_until(lambda: gateway.ready_instances() == 1, "the first check")
        ports = {
            "gateway_port": somebody.getsockname()[1],
            "gateway_stats_port": gateway.stats_port,
        }
        render(tmp_path, [instance], **ports)
        subprocess.run([tmp_path / "states"], check=True)
        gateway.process.send_signal(signal.SIGUSR2)
        done = subprocess.run([tmp_path / "states", "reloaded"], capture_output=True, text=True)
        assert done.returncode == 1
        assert "goes on with what it had read" in done.stderr
        assert gateway.request()[0] == 200


def test_an_instance_out_of_reach_is_told(tmp_path: Path) -> None:
    tasks = [{"ansible.builtin.include_tasks": str(ROLE / "tasks/reached.yml")}]
    instances = [Instance(), Instance()]
    with (
        running(tmp_path, *instances, gateway_check_timeout="1s") as gateway,
        socket.socket() as full,
        ExitStack() as waiting,
    ):
        wait_until(lambda: gateway.ready_instances() == 2, "two ready instances")
        instances[0].ready = 503  # it answers
        instances[1].stop()  # its server does
        wait_until(lambda: gateway.ready_instances() == 0, "what has changed")
        result = play(tmp_path, tasks, instances)
        assert result.returncode == 0, result.stdout

        # Whoever asks here gets no answer: so many wait that no more are let in.
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind(("127.0.0.1", instances[1].port))
        full.listen(0)
        for _ in range(4):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", instances[1].port))
        wait_until(lambda: "L4TOUT" in gateway.command("show stat"), "a check that timed out")
        result = play(tmp_path, tasks, instances)
        assert result.returncode != 0
        assert "gateway1 does not reach server1:die1, which listen" in result.stdout


# --- Limits and the queue ----------------------------------------------------


def test_requests_beyond_a_keys_rate_are_429(both: Gateway) -> None:
    """Ben has three a minute; what is refused to him counts for nothing."""
    answers = [both.request(key=BENS_KEY) for _ in range(5)]
    assert [status for status, _, _ in answers] == [200, 200, 200, 429, 429]
    _, headers, body = answers[-1]
    assert headers["Retry-After"] == "7"
    assert (body["error"]["code"], body["error"]["type"]) == ("rate_limit_exceeded", "requests")
    assert both.request()[0] == 200, "anna has no limit"
    assert '"anna 0 0"' not in both.log.read_text()
    table = both.command("show table openai")
    assert re.search(r"key=ben use=0 .*gpc0=3 ", table), table


def test_requests_beyond_a_keys_places_are_429(tmp_path: Path) -> None:
    instance = Instance(mode="turns")
    with running(tmp_path, instance, gateway_concurrent_requests=2) as gateway:
        wait_until(lambda: gateway.ready_instances() == 1, "a ready instance")
        streams = [gateway.stream() for _ in range(2)]
        status, headers, body = gateway.request()
        assert (status, headers["Retry-After"]) == (429, "10")
        assert body["error"]["code"] == "concurrency_limit_exceeded"
        instance.turn.release(8)
        assert [stream.read().count(b"data:") for stream in streams] == [4, 4]
        wait_until(lambda: not gateway.used("BACKEND"), "their end")
        instance.mode = "answer"
        assert gateway.request()[0] == 200, "a place is free again"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that gives its one instance one request at a time, and lets two wait for 10 s."""
    folder = tmp_path_factory.mktemp("narrow")
    limits = {
        "gateway_instance_max_requests": 1,
        "gateway_queue_timeout": "10s",
        "gateway_queue_length": 2,
    }
    with running(folder, Instance(), **limits) as gateway:
        yield gateway


def test_requests_wait_for_a_place(narrow: Gateway) -> None:
    wait_until(lambda: narrow.ready_instances() == 1, "a ready instance")
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: narrow.request(), range(3)))
    assert [status for status, _, _ in results] == [200] * 3


def test_waiting_ends_with_503_and_health_does_not_wait(narrow: Gateway) -> None:
    wait_until(lambda: narrow.ready_instances() == 1, "a ready instance")
    (instance,) = narrow.instances
    wait_until(lambda: not narrow.used("BACKEND"), "the end of what was before")
    instance.seen.clear()
    instance.mode = "held"
    with ThreadPoolExecutor(3) as pool:
        held = pool.submit(narrow.request)
        try:
            wait_until(lambda: instance.seen, "arrival")
            waiting = [pool.submit(narrow.request) for _ in range(2)]
            wait_until(lambda: narrow.used("BACKEND", "qcur") == 2, "two that wait")
            status, full, body = narrow.request()
            assert (status, full["Retry-After"]) == (503, "10")
            assert body["error"]["code"] == "queue_full"
            assert narrow.ready_instances() == 1
            assert " queue_ms=-1 " in narrow.logged(full), "a full queue does not wait for its end"
            for request in waiting:
                status, late, body = request.result()
                assert (status, late["Retry-After"]) == (503, "10")
                assert body["error"]["code"] == "no_instance_free"
                (waited,) = re.findall(r" queue_ms=(\d+) ", narrow.logged(late))
                assert int(waited) >= 10_000
            assert not held.done()
        finally:
            instance.released.set()
        assert held.result()[0] == 200
    assert len(instance.seen) == 1, "whoever waited in vain reached no instance"


# --- Several models ----------------------------------------------------------

LARGE, SMALL = "org/large~1", "small"


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with one instance of a large model and two of a small one."""
    folder = tmp_path_factory.mktemp("routed")
    instances = [Instance(served_model=model) for model in (LARGE, SMALL, SMALL)]
    with running(folder, *instances) as gateway:
        yield gateway


@pytest.fixture
def all_three(routed: Gateway) -> Gateway:
    for instance in routed.instances:
        instance.ready = 200
        instance.seen.clear()
    wait_until(lambda: routed.ready_instances() == 3, "three ready instances")
    return routed


def asking(model: str, **more: Any) -> bytes:
    return (
        json.dumps({"messages": [{"role": "user", "content": 'say "model": é'}]} | more).encode()[
            :-1
        ]
        + f', "model": {model}}}'.encode()
    )


@pytest.mark.parametrize(
    ("written", "model"),
    [
        (f'"{LARGE}"', LARGE),
        (r'"org\/large~1"', LARGE),
        (r'"sm\u0061ll"', SMALL),
        (f'"{SMALL}"', SMALL),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_requests_reach_their_model(
    all_three: Gateway, written: str, model: str, chunked: bool
) -> None:
    body = asking(written, metadata={"model": "other", "a": {"b": ["model"]}}, user="x" * 200_000)
    for _ in range(4):
        status, headers, answer = all_three.request(body=iter([body]) if chunked else body)
        assert status == 200
        assert answer["bytes"] == len(body)
    reached = {instance.served_model for instance in all_three.instances if instance.seen}
    assert reached == {model}
    assert f" model={model} status=200 " in all_three.logged(headers)


@pytest.mark.parametrize(
    "body",
    [
        *(asking(model) for model in ('"other"', '"sma"', '"small small"', '"SMALL"', "null", "5")),
        *(b"", b"{}", b"no JSON", b'["small"]', b'{"x": {"model": "small"}}'),
    ],
)
def test_unknown_models_are_404_with_the_known_ones(all_three: Gateway, body: bytes) -> None:
    status, _, answer = all_three.request(body=body)
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == "model"
    assert answer["error"]["message"].endswith(f"which are: {LARGE}, {SMALL}.")
    assert not [instance for instance in all_three.instances if instance.seen]


def test_models_are_those_with_a_ready_instance(all_three: Gateway) -> None:
    def models() -> list[str]:
        status, headers, body = all_three.request("GET", "/v1/models", None)
        assert (status, headers["Content-Type"], body["object"]) == (
            200,
            "application/json",
            "list",
        )
        for entry in body["data"]:
            assert (entry["object"], entry["owned_by"]) == ("model", "vllm")
            assert abs(entry["created"] - time.time()) < 60
        return [entry["id"] for entry in body["data"]]

    assert models() == [LARGE, SMALL]
    all_three.instances[0].ready = 404
    wait_until(lambda: all_three.ready_instances() == 2, "the drain")
    assert models() == [SMALL]
    status, _, body = all_three.request(body=asking(f'"{LARGE}"'))
    assert (status, body["error"]["code"]) == (503, "no_instance_ready")
    for instance in all_three.instances:
        instance.ready = 503
    wait_until(lambda: all_three.ready_instances() == 0, "the end of all")
    assert all_three.request("GET", "/v1/models", None)[0] == 503
    assert all_three.request("GET", "/v1/models", None, key=None)[0] == 401


def test_instance_of_another_model_leaves_its_old_one(all_three: Gateway) -> None:
    """An update gave it another model, and the gateway has not been told."""
    changed, _, other = all_three.instances[1], *all_three.instances[1:]
    changed.served_model = "new"
    try:
        wait_until(lambda: all_three.ready_instances() == 2, "its leave")
        for _ in range(4):
            assert all_three.request(body=asking(f'"{SMALL}"'))[2]["port"] == other.port
    finally:
        changed.served_model = SMALL


def test_one_model_is_left_to_vllm(both: Gateway) -> None:
    for body in (b"{}", asking('"other"'), b"no JSON"):
        assert both.request(body=body)[0] == 200
    assert both.request("GET", "/v1/models", None)[2]["path"] == "/v1/models"


# --- TLS ---------------------------------------------------------------------


def certificate(
    folder: Path, name: str, days: tuple[int, int] = (-1, 1), passphrase: bytes | None = None
) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days[0]))
        .not_valid_after(now + datetime.timedelta(days[1]))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    lock = (
        serialization.BestAvailableEncryption(passphrase)
        if passphrase
        else serialization.NoEncryption()
    )
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    )
    return paths


@pytest.fixture(scope="module")
def https(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Path, int]]:
    """A gateway with TLS, the certificate to trust, and the port that leads to it."""
    folder = tmp_path_factory.mktemp("https")
    pem, key = certificate(folder, "vllm-k80-tls")
    key.rename(folder / "vllm-k80-tls.pem.key")
    plain = free_port()
    settings = {
        "gateway_tls_source": "controller",
        "gateway_tls_certificate": str(pem),
        "gateway_tls_key": str(key),
        "gateway_tls_redirect_port": plain,
    }
    with running(folder, Instance(mode="turns"), **settings) as gateway:
        yield gateway, pem, plain


@pytest.mark.parametrize("version", ["1.1", "2"])
def test_tls_streams(https: tuple[Gateway, Path, int], version: str) -> None:
    gateway, pem, _ = https
    url = f"https://127.0.0.1:{gateway.port}"
    curl = ["curl", "--silent", "--no-buffer", f"--http{version}", "--cacert", str(pem)]

    def ready() -> bool:
        done = subprocess.run([*curl, f"{url}/health"], capture_output=True, check=False)
        return b'"ready_instances":1' in done.stdout

    wait_until(ready, "a ready instance")
    headers = ["--header", f"Authorization: Bearer {KEY}", "--write-out", "%{http_version}"]
    lines = []
    with subprocess.Popen(
        [*curl, *headers, "--data", "{}", f"{url}/v1/completions"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if line.startswith(b"data:"):
                gateway.instances[0].turn.release()  # the next event leaves after this one has come
    assert lines[-1] == version.encode()
    assert [line for line in lines if line.startswith(b"data:")] == [
        b"data: %d\n" % n for n in range(4)
    ]


@pytest.mark.parametrize(
    ("version", "accepted"),
    [("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)],
)
def test_tls_versions(https: tuple[Gateway, Path, int], version: str, accepted: bool) -> None:
    gateway, pem, _ = https
    context = ssl.create_default_context(cafile=str(pem))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    context.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", gateway.port), 60) as s:
        if accepted:
            with context.wrap_socket(s, server_hostname="127.0.0.1") as wrapped:
                cipher = wrapped.cipher()
                assert cipher
                assert "GCM" in cipher[0] or "CHACHA20" in cipher[0]
        else:
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(s, server_hostname="127.0.0.1")


def test_plain_http_is_sent_on_to_https(https: tuple[Gateway, Path, int]) -> None:
    gateway, _, plain = https
    connection = http.client.HTTPConnection("127.0.0.1", plain, timeout=60)
    connection.request("POST", "/v1/completions?a=b", b"{}")
    response = connection.getresponse()
    assert response.status == 308
    assert response.headers["Location"] == f"https://127.0.0.1:{gateway.port}/v1/completions?a=b"
    connection.close()


def test_lab_ca(tmp_path: Path) -> None:
    """A CA, and for the gateway a certificate, made once and renewed before it ends."""
    ca = tmp_path / "ca"
    settings = {
        "gateway_tls_source": "ca",
        "gateway_tls_ca_dir": str(ca),
        "gateway_tls_names": ["gw.example.org", "192.0.2.7", "2001:db8::7"],
    }
    tasks = [{"ansible.builtin.include_tasks": str(ROLE / "tasks/tls.yml")}]

    def changes(**more: Any) -> int:
        result = play(tmp_path, tasks, [Instance()], **settings, **more)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "BEGIN" not in result.stdout
        (count,) = re.findall(r"gateway1 .* changed=(\d+)", result.stdout)
        return int(count)

    def made() -> x509.Certificate:
        return x509.load_pem_x509_certificate((ca / "gateway1.pem").read_bytes())

    assert changes() > 0
    first, authority = made(), x509.load_pem_x509_certificate((ca / "ca.pem").read_bytes())
    first.verify_directly_issued_by(authority)
    names = first.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == settings["gateway_tls_names"]
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert {path.name: path.stat().st_mode & 0o777 for path in ca.iterdir()} == {
        "ca.key": 0o600,
        "ca.pem": 0o644,
        "gateway1.key": 0o600,
        "gateway1.pem": 0o644,
    }
    assert changes() == 0
    # With fewer days left than that it is renewed, by the same CA and with the same key.
    assert changes(__gateway_renewal_days=398) == 1
    renewed = made()
    assert renewed.serial_number != first.serial_number
    assert renewed.public_key() == first.public_key()
    renewed.verify_directly_issued_by(authority)


def test_bad_certificates_are_refused_in_words(
    tmp_path: Path, load_module: Callable[[str], ModuleType]
) -> None:
    pem, key = certificate(tmp_path, "good")
    _, others = certificate(tmp_path, "other")
    old, old_key = certificate(tmp_path, "old", days=(-9, -1))
    early, early_key = certificate(tmp_path, "early", days=(1, 9))
    _, locked = certificate(tmp_path, "locked", passphrase=b"secret")
    fault = load_module("roles/gateway/filter_plugins/gateway.py").tls_fault
    assert fault(pem.read_text(), key.read_text()) == ""
    assert "another key" in fault(pem.read_text(), others.read_text())
    assert re.search(r"CN=old expired on \d{4}-", fault(old.read_text(), old_key.read_text()))
    assert "CN=early is valid from" in fault(early.read_text(), early_key.read_text())
    chain = pem.read_text() + old.read_text()
    assert "CN=old expired" in fault(chain, key.read_text())
    assert "encrypted" in fault(pem.read_text(), locked.read_text())
    assert "certificate is not one in PEM" in fault("\udcff", key.read_text())
    assert "key is not one in PEM" in fault(pem.read_text(), pem.read_text())
    result = play(
        tmp_path,
        [{"ansible.builtin.include_tasks": str(ROLE / "tasks/tls.yml")}],
        [Instance()],
        gateway_tls_source="gateway",
        gateway_tls_certificate=str(old),
        gateway_tls_key=str(old_key),
    )
    assert result.returncode != 0
    assert f"{old}: the certificate CN=old expired on" in " ".join(result.stdout.split())
    assert "BEGIN" not in result.stdout


# --- What is refused ---------------------------------------------------------


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
        ({"gateway_concurrent_requests": -1}, "0 for any number of requests"),
        (
            {"gateway_api_keys": [{"name": "anna", "key": KEY, "requests_per_minute": "many"}]},
            "0 for any number of requests",
        ),
        ({"gateway_status_users": ["carl"]}, "carl has no entry in gateway_api_keys"),
        ({"gateway_tls_source": "gateway"}, "must be the paths of PEM files there"),
        ({"gateway_tls_source": "ca", "gateway_tls_names": []}, "gateway_tls_names is empty"),
    ],
)
def test_bad_settings_are_refused_in_words(
    tmp_path: Path, overrides: dict[str, Any], words: str
) -> None:
    result = render(tmp_path, [Instance()], **overrides)
    assert result.returncode != 0
    assert words in " ".join(result.stdout.split())
    assert KEY not in result.stdout
