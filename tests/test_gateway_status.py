"""The gateway's status page: behind a real HAProxy, in a real browser, and of what goes wrong."""

from __future__ import annotations

import base64
import html
import http.client
import json
import math
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from browser import document
from test_gateway import (
    BENS_KEY,
    INSTANCE_KEY,
    KEY,
    Gateway,
    Instance,
    free_port,
    running,
    wait_until,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
METRICS = """\
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0",model_name="m"}} {tokens}
vllm:num_requests_running{{engine="0",model_name="m"}} 3.0
vllm:num_requests_waiting{{engine="0",model_name="m"}} 1.0
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} 0.25
"""
HOSTILE = """</title><script src="http://evil.example/x.js">'"&<b onclick=x>"""


@pytest.fixture(scope="module")
def program(load_module: Callable[[str], ModuleType]) -> ModuleType:
    load_module("vllm-k80-src/vllm_k80/plot.py")  # which the role puts beside it
    return load_module("roles/gateway/files/vllm-k80-gateway-status")


class Page(HTMLParser):
    """A page's text, and what it consists of; that its elements are closed is asserted."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            kind = dict(attrs).get("class")
            self.open.append(f"{tag}.{kind}" if kind else tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().partition(".")[0] == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for its, text in self.texts if its == tag]

    def tiles(self) -> dict[str, str]:
        """State by the tile's name."""
        return dict(zip(self.of("h3"), self.of("p.state"), strict=True))


def config_of(
    *instances: dict[str, Any], statistics: str = "http://127.0.0.1:9/"
) -> dict[str, Any]:
    return {"gateway": "gateway1", "port": 0, "statistics": statistics, "instances": [*instances]}


def instance(name: str = "die0", **values: Any) -> dict[str, Any]:
    return {
        "host": "server1",
        "name": name,
        "model": "m",
        "dies": ["0000:05:00.0"],
        "backend": "model:m",
        "url": "http://127.0.0.1:9",
    } | values


# ---- what goes wrong


def test_where_nothing_answers_it_says_so(program: ModuleType, tmp_path: Path) -> None:
    watcher = program.Watcher(config_of(instance()), tmp_path / "history.json")
    watcher.look()
    watcher.look()
    page = Page(watcher.page.decode())
    assert page.of("h1") == ["gateway1: 0 of 1 instances are ready"]
    assert page.tiles()["server1: die0"] == "unknown: HAProxy does not tell of it"
    assert any("HAProxy does not tell its statistics: " in text for text in page.of("p.fault"))
    assert page.of("text").count("No data.") == 4


def test_a_gateway_without_instances(program: ModuleType, tmp_path: Path) -> None:
    watcher = program.Watcher(config_of(), tmp_path / "history.json")
    watcher.look()
    page = Page(watcher.page.decode())
    assert "No instance is behind this gateway." in page.of("p")


def test_names_are_text(program: ModuleType, tmp_path: Path) -> None:
    given = instance(HOSTILE, model=HOSTILE, host=HOSTILE, dies=[HOSTILE])
    watcher = program.Watcher(config_of(given) | {"gateway": HOSTILE}, tmp_path / "history.json")
    row = {"status": "DOWN", "check_status": "L7STS", "last_chk": HOSTILE, "lastchg": HOSTILE}
    program_rows = {("model:m", f"{HOSTILE}:{HOSTILE}"): row}
    seen = watcher.seen(given, program_rows, {})
    point = watcher.model(HOSTILE, "model:m", {}, [seen])
    text = program.page_of(HOSTILE, [seen], [{"at": 0, "models": {HOSTILE: point}}], HOSTILE)
    page = Page(text)
    assert f"{HOSTILE}: {HOSTILE}" in page.of("h3")
    assert HOSTILE in page.of("th")
    assert page.of("p.state") == [f"down: {HOSTILE}"]
    assert page.of("p.fault") == [HOSTILE]
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "b", "link", "img", "iframe"}
    # Nothing is fetched from anywhere.
    assert not [name for _, given in page.tags for name in given if name in ("src", "href")]
    assert "url(" not in text and "@import" not in text


@pytest.mark.parametrize(
    ("row", "condition"),
    [
        ({"status": "UP"}, ("ready", "")),
        ({"status": "UP 1/2"}, ("ready", "but its last check has failed")),
        ({"status": "NOLB"}, ("drained", "gets no new requests")),
        ({"status": "MAINT"}, ("drained", "by a command to HAProxy")),
        ({"status": "DOWN", "check_status": "INI"}, ("down", "not checked yet")),
        ({"status": "DOWN", "check_status": "* L4CON"}, ("down", "takes no connection")),
        (
            {"status": "DOWN", "check_status": "L7STS", "check_code": "503"},
            ("down", "has not generated a token lately"),
        ),
        (
            {"status": "DOWN", "check_status": "L7STS", "check_code": "500", "last_chk": "odd"},
            ("down", "odd"),
        ),
        ({"status": "no check"}, ("unknown", "no check")),
        ({"status": None}, ("unknown", "")),
        (None, ("unknown", "HAProxy does not tell of it")),
    ],
)
def test_each_state_has_words(
    program: ModuleType, row: dict[str, Any] | None, condition: tuple[str, str]
) -> None:
    assert program.condition_of(row) == condition


@pytest.mark.parametrize(
    ("metrics", "readings"),
    [
        ("", {}),
        ("<html>", {}),
        ("vllm:num_requests_running NaN\n", {}),
        ("vllm:num_requests_running 1.2.3\n", {}),
        ('vllm:num_requests_running{a="}"} 1e1\n', {"running": 10}),
        ("vllm:gpu_cache_usage_perc 0.5\n", {"cache": 0.5}),
        (
            'vllm:generation_tokens_total{a="0"} 5\nvllm:generation_tokens_total{a="1"} 7',
            {"tokens": 12},
        ),
    ],
)
def test_what_makes_no_sense_is_left_out(
    program: ModuleType, metrics: str, readings: dict[str, float]
) -> None:
    assert program.readings_of(metrics) == readings


def test_a_counter_that_begins_anew_loses_nothing(program: ModuleType, tmp_path: Path) -> None:
    watcher = program.Watcher(config_of(), tmp_path / "history.json")
    grown = [watcher.grown(("a", "b"), value) for value in (100, 130, 10, None, 50, 60)]
    assert [each and each[0] for each in grown] == [None, 30, 10, None, None, 10]


def test_the_hour_survives_a_restart(program: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "history.json"
    first = program.Watcher(config_of(instance()), file)
    for _ in range(program.POINTS + 5):
        first.points.append({"at": time.time(), "models": {}})
    first.look()
    assert len(first.points) == program.POINTS
    first.points[0] = {"at": time.time() - 4000, "models": {}}
    first.points[1] = {"at": time.time(), "models": {"m": {"of": "another version"}}}
    first.save()
    second = program.Watcher(config_of(instance()), file)
    # The oldest and that of another version are left out.
    assert len(second.points) == program.POINTS - 2
    second.look()
    assert second.points[-1]["models"]["m"].keys() == program.IN_A_POINT


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"at": "x", "models": {}}]', "[{}]"])
def test_a_spoilt_history_is_begun_anew(program: ModuleType, tmp_path: Path, content: str) -> None:
    file = tmp_path / "history.json"
    file.write_text(content)
    assert not program.Watcher(config_of(), file).points


def test_a_history_that_cannot_be_written_stops_nothing(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.Watcher(config_of(), tmp_path / "none" / "history.json").save()
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "-"), (0, "0 s"), (75, "1 min 15 s"), (3600, "1 h 0 min"), (200000, "2 d 7 h")],
)
def test_how_long(program: ModuleType, seconds: float | None, words: str) -> None:
    assert program.lasting(seconds) == words


# ---- behind HAProxy


@contextmanager
def served(program: ModuleType, watcher: Any, port: int) -> Iterator[None]:
    with program.Server(("127.0.0.1", port), program.handler_of(watcher)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield
        server.shutdown()


def get(
    gateway: Gateway, authorization: str | None, method: str = "GET", path: str = "/status"
) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)
    try:
        connection.request(
            method, path, headers={"Authorization": authorization} if authorization else {}
        )
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


def basic(key: str, name: str = "me") -> str:
    return "Basic " + base64.b64encode(f"{name}:{key}".encode()).decode()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, int]]:
    """With two instances; and the port of the page's service."""
    port = free_port()
    instances = [Instance(metrics=METRICS.format(tokens=100)) for _ in range(2)]
    folder = tmp_path_factory.mktemp("gateway")
    ports = {"gateway_status_port": port, "gateway_status_users": ["anna"]}
    with running(folder, *instances, **ports) as started:
        wait_until(lambda: started.ready_instances() == 2, what="two ready instances")
        yield started, port


@pytest.fixture
def watcher(program: ModuleType, gateway: tuple[Gateway, int], tmp_path: Path) -> Any:
    config = json.loads(gateway[0].config.with_name("vllm-k80-status.json").read_text())
    assert config["port"] == gateway[1]
    return program.Watcher(config, tmp_path / "history.json")


def test_it_shows_dies_models_and_errors(
    program: ModuleType, gateway: tuple[Gateway, int], watcher: Any
) -> None:
    proxy, port = gateway
    watcher.look()
    for each in proxy.instances:
        each.metrics = METRICS.format(tokens=160)
        each.mode = "http500"
    proxy.request()
    for each in proxy.instances:
        each.mode = "answer"
    proxy.request()
    watcher.look()
    with served(program, watcher, port):
        status, headers, text = get(proxy, basic(KEY))
        assert get(proxy, basic(KEY), "HEAD")[::2] == (200, "")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    page = Page(text)
    assert page.of("h1") == ["gateway1: 2 of 2 instances are ready"]
    assert page.tiles() == {"server1: die0": "ready", "server1: die1": "ready"}
    values = page.of("dd")
    assert {"0000:05:00.0", "0000:06:00.0", "3 running, 1 waiting", "25% in use"} <= {*values}
    row = page.of("td")
    assert row[:3] == ["2 of 2", "0", "0"]
    requests, errors, again = row[5:]
    assert (requests, errors) == ("2", "1")
    assert int(again) >= 1
    # 60 tokens of each since the last look, which was not at the same moment for all that is asked.
    now = watcher.points[-1]["models"]["m"]
    assert row[3] == program.amount(now["speed"], 1)
    assert now["speed"] * now["seconds"] == pytest.approx(120, rel=0.7)
    assert [tag for tag, _ in page.tags].count("svg") == 4
    assert all(given.get("role") == "img" for tag, given in page.tags if tag == "svg")
    # Nobody's secrets.
    assert KEY not in text
    assert INSTANCE_KEY not in text
    assert "anna" not in text


def test_one_that_goes_down_and_one_that_is_drained(
    program: ModuleType, gateway: tuple[Gateway, int], watcher: Any
) -> None:
    proxy, _ = gateway
    first, second = proxy.instances
    try:
        first.stop()
        second.ready = 404
        wait_until(lambda: proxy.ready_instances() == 0, what="no ready instance")
        watcher.look()
        page = Page(watcher.page.decode())
        assert page.of("h1") == ["gateway1: 0 of 2 instances are ready"]
        assert page.tiles() == {
            "server1: die0": "down: takes no connection",
            "server1: die1": "drained: gets no new requests",
        }
    finally:
        first.start()
        second.ready = 200
        wait_until(lambda: proxy.ready_instances() == 2, what="two ready instances")
    watcher.look()
    assert {*Page(watcher.page.decode()).tiles().values()} == {"ready"}


def test_it_is_shown_to_whom_it_is_to_be_and_opens_nothing_else(
    program: ModuleType, gateway: tuple[Gateway, int], watcher: Any
) -> None:
    proxy, port = gateway
    watcher.look()
    for each in proxy.instances:
        each.seen.clear()
    with served(program, watcher, port):
        for no in (None, basic("wrong"), basic(BENS_KEY), f"Bearer {KEY}", basic(INSTANCE_KEY)):
            status, headers, text = get(proxy, no)
            assert (status, headers["WWW-Authenticate"][:5]) == (401, "Basic"), no
            assert "server1" not in text
        # What a browser sends to the page, it sends to all of the gateway.
        for path in ("/v1/models", "/v1/status", "/status/", "/status/v1/models"):
            assert get(proxy, basic(KEY), path=path)[0] == (401 if "/v1" in path[:3] else 404)
        assert get(proxy, basic(KEY), "POST")[0] == 404
    assert not [got for each in proxy.instances for got in each.seen]
    assert KEY not in proxy.log.read_text()
    assert "user=anna" in proxy.log.read_text()


def test_without_its_service_it_says_so(gateway: tuple[Gateway, int]) -> None:
    status, _, text = get(gateway[0], basic(KEY))
    assert status == 503
    assert "systemctl status vllm-k80-gateway-status" in text


def test_an_old_page_is_not_shown(
    program: ModuleType, gateway: tuple[Gateway, int], watcher: Any
) -> None:
    watcher.look()
    watcher.made -= program.STALE + 1
    with served(program, watcher, gateway[1]):
        status, _, text = get(gateway[0], basic(KEY))
    assert status == 503
    assert "journalctl -u vllm-k80-gateway-status" in text


def test_for_nobody_there_is_none(tmp_path: Path) -> None:
    with running(tmp_path, Instance(), gateway_status_users=[]) as proxy:
        assert get(proxy, basic(KEY))[0] == 404


def test_the_program_ends_when_it_is_told(program: ModuleType, tmp_path: Path) -> None:
    """As systemd runs it, with both files in one directory."""
    for path in ("roles/gateway/files/vllm-k80-gateway-status", "vllm-k80-src/vllm_k80/plot.py"):
        shutil.copy(ROOT / path, tmp_path)
    port = free_port()
    (tmp_path / "config.json").write_text(json.dumps(config_of(instance()) | {"port": port}))
    process = subprocess.Popen(
        ["/usr/bin/python3", "-B", tmp_path / "vllm-k80-gateway-status", tmp_path / "config.json"],
        env={"STATE_DIRECTORY": str(tmp_path)},
    )
    try:

        def page() -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", "/status")
                return connection.getresponse().status
            except OSError:
                return 0

        wait_until(lambda: page() == 200, what="the page")
    finally:
        process.terminate()
    assert process.wait(10) == 0
    assert len(json.loads((tmp_path / "history.json").read_text())) == 1


# ---- in a browser


def made_up_page(program: ModuleType) -> str:
    """An hour of a small fleet, all of it made up; docs/status.png is a picture of it."""
    speeds = {"qwen2.5-7b-instruct": 14, "smollm2-1.7b-instruct": 38}
    wave = random.Random(7)  # noqa: S311 (it only shakes the lines)
    points = []
    for index in range(program.POINTS):
        models = {}
        for number, (name, speed) in enumerate(speeds.items()):
            load = 0.55 + 0.4 * math.sin(index / 34 + 2 * number)
            failed = float(index == 216 and number == 0)
            models[name] = {
                "speed": speed * (3 - number) * load * wave.uniform(0.9, 1.1),
                "under_way": float(round(18 * load * wave.uniform(0.85, 1.15))),
                "waiting": float(max(0, round(25 * load - 20 + wave.uniform(-1, 1)))),
                "first_byte": 1800.0 + 900 * number,
                "seconds": 15.0,
                "requests": float(wave.randint(1, 6)),
                "errors": failed,
                "again": 2 * failed,
            }
        points.append({"at": 1795738815 - 15 * (program.POINTS - 1 - index), "models": models})

    def die(host: str, bus: int, model: str, *state: Any) -> Any:
        condition, why, since, speed, running, cache = state
        said = {"running": running, "waiting": 0, "cache": cache} if speed else {}
        name, dies = f"die{bus - 5}", [f"0000:0{bus}:00.0"]
        return program.Instance(host, name, model, dies, condition, why, since, speed, said)

    large, small = speeds
    instances = [
        die("server1", 5, large, "ready", "", 187320, 14.1, 5, 0.62),
        die("server1", 6, large, "down", "takes no connection", 372, None, 0, 0),
        die("server2", 5, large, "ready", "", 90120, 13.6, 6, 0.91),
        die("server2", 6, small, "ready", "", 90121, 36.9, 4, 0.18),
        die("server3", 5, small, "drained", "gets no new requests", 41, 3.1, 1, 0.02),
    ]
    return str(program.page_of("gateway1", instances, points, ""))


@pytest.mark.parametrize(
    ("width", "scheme", "background"),
    [(360, 0, "rgb(18, 21, 26)"), (1280, 1, "rgb(246, 247, 249)")],
    ids=["phone, dark", "desktop, light"],
)
def test_it_fits_and_has_the_users_colours(
    program: ModuleType, width: int, scheme: int, background: str
) -> None:
    # A window cannot be as narrow as a phone; a frame can.
    script = (
        "const d = this.contentDocument, tops = [...d.querySelectorAll('.tiles li')].map("
        "tile => tile.getBoundingClientRect().top);"
        "document.body.dataset.found = JSON.stringify([d.documentElement.scrollWidth,"
        "this.contentWindow.getComputedStyle(d.body).backgroundColor, new Set(tops).size])"
    )
    frame = f'<iframe width="{width}" height="900" style="border: 0" src="/page" onload="{script}">'
    contents = {
        "/": f"<!doctype html><body>{frame}</iframe></body>",
        "/page": made_up_page(program),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(contents.get(self.path, "").encode())

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with program.Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        seen = document(url, f"--blink-settings=preferredColorScheme={scheme}")
        server.shutdown()
    found = re.search(r'data-found="([^"]*)"', seen)
    assert found, seen
    scrolled, colour, rows = json.loads(html.unescape(found[1]))
    assert scrolled <= width
    assert colour == background
    assert rows == (5 if width < 400 else 2)


def test_a_browser_is_let_in_by_the_key(
    program: ModuleType, gateway: tuple[Gateway, int], watcher: Any
) -> None:
    proxy, port = gateway
    watcher.look()
    with served(program, watcher, port):
        seen = document(f"http://me:{KEY}@127.0.0.1:{proxy.port}/status")
    assert "gateway1: 2 of 2 instances are ready</h1>" in seen
