"""k80-instance, on a made-up server: its programs are played, its files and changes are real."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest

BOOT = "00000000-0000-0000-0000-000000000001"


class KilledError(BaseException):
    """The program is killed at this point, as by SIGKILL: nothing of it runs any more."""


class Server:
    """systemd, Docker and the instance `die0`, as far as k80-instance meets them."""

    def __init__(self, program: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("UNITS", "CONFIG", "STATE", "RUN", "LOCKS"):
            place = root / name.lower()
            place.mkdir()
            monkeypatch.setattr(program, name, str(place))
        boot = root / "boot_id"
        boot.write_text(BOOT + "\n")
        monkeypatch.setattr(program, "BOOT_ID", str(boot))
        monkeypatch.setattr(program, "run", self.run)
        monkeypatch.setattr(program.time, "sleep", self.sleep)
        monkeypatch.setattr(program.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(program.Instance, "requests", lambda *_: self.requests_now())
        self.program = program
        self.instance = program.Instance("die0")
        Path(self.instance.state).mkdir()
        self.active = self.enabled = self.timer = False
        self.runs = 0
        self.started_with: Any = None
        self.clock = 0.0
        self.requests: list[float | None] = []
        self.images = {"good:1", "good:2"}
        self.log: list[str] = []
        self.calls, self.kill_at = 0, -1
        self.others: dict[str, bool] = {}  # other instances' units, and whether they run
        self.ends_after: float | None = None

    def files(self, image: str, key: str = "a", former: str = "") -> Any:
        unit = (
            f"[Service]\nExecStart=docker run {image}\n\n[X-K80]\nAddress=127.0.0.1\nPort=8001\n"
            f"Dies=GPU-a GPU-b\nImage={image}\nModel=m\nGolden=/var/lib/vllm-k80/golden-x.json\n"
            "User=1:1\nStartTimeout=10\nProbeTimeout=5\n"
        )
        keys = f"VLLM_API_KEY={key}\n" + (f"VLLM_K80_SECOND_API_KEY={former}\n" if former else "")
        return self.program.Files(unit, f"# of die0\n{keys}OTHER=1\n")

    def stage(self, image: str, key: str = "a") -> Any:
        files = self.files(image, key)
        self.instance.put("staged", files)
        return files

    def requests_now(self) -> float | None:
        return self.requests.pop(0) if self.requests else 0

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
        if self.ends_after is not None and self.clock >= self.ends_after:
            self.active, self.ends_after = False, None

    def image(self) -> str:
        """What the live unit names."""
        return str(self.program.settings_of(self.instance.files("live"))("Image"))

    def run(self, *command: str, seconds: float | None = None) -> Any:
        self.calls += 1
        if self.calls == self.kill_at:
            raise KilledError
        returncode, output = self.answer(command)
        return subprocess.CompletedProcess(command, returncode, output, "")

    def answer(self, command: tuple[str, ...]) -> tuple[int, str]:
        match command:
            case ("systemctl", "show", _, unit) if unit in self.others:
                return 0, f"ActiveState={'active' if self.others[unit] else 'inactive'}\n"
            case ("systemctl", "start" | "stop" as verb, unit) if unit in self.others:
                self.log.append(f"{verb} {unit}")
                self.others[unit] = verb == "start"
            case ("systemctl", "show", _, unit):
                active = self.timer if unit.endswith(".timer") else self.active
                state = "enabled" if self.enabled else "disabled"
                return 0, (
                    f"ActiveState={'active' if active else 'inactive'}\nUnitFileState={state}\n"
                    f"InvocationID={self.runs}\n"
                )
            case ("systemctl", "enable", "--quiet", unit, _):
                self.enabled |= unit == self.instance.unit
            case ("systemctl", "start", unit) if unit.endswith(".timer"):
                self.timer |= unit == self.instance.timer
            case ("systemctl", "start", _):
                return self.start(), ""
            case ("systemctl", "disable", _, "--now", *_):
                self.active = self.enabled = self.timer = False
            case ("systemctl", "stop", _):
                self.log.append("stop")
                self.active = False
            case ("sha256sum", *_):
                return int(self.started_with != self.instance.files("live")), ""
            case ("docker", "run", *_, image, "selftest"):
                self.log.append(f"selftest {image}")
                return int("sick" in image), "wrong tokens"
            case ("docker", "exec", *_, "--timeout", seconds, "--golden", _, "--max-slowdown", _):
                assert seconds == "10", "as long as a start; ProbeTimeout is for one token"
                return int("slow" in self.image()), "too slow"
            case ("docker", "image", "inspect", image):
                return int(image not in self.images), ""
            case ("journalctl", *_):
                return 0, "Traceback of the engine"
        return 0, ""

    def start(self) -> int:
        if self.active:
            return 0
        image = self.image()
        self.log.append(f"start {image}")
        golden = Path(self.instance.state, "golden-x.json")
        if "broken" in image or (
            golden.exists() and ("other" in golden.read_text()) != ("other" in image)
        ):
            return 1
        self.active, self.started_with = True, self.instance.files("live")
        self.runs += 1
        if not golden.exists():
            golden.write_text(f"recorded by {image}")
        if "mortal" in image:
            self.ends_after = self.clock + 30
        return 0

    def apply(self, **options: Any) -> str:
        given = {
            "settle": 6,
            "drain_limit": 60,
            "soak": 0,
            "max_slowdown": 3,
            "accept_tokens": False,
        }
        more = {key: options.pop(key, False) for key in ("if_stopped", "check")}
        wanted = self.program.Options(**given | options)
        return str(self.program.apply(self.instance, wanted, **more))

    def serves(self, files: Any) -> bool:
        """Whether it runs with these files and takes requests."""
        return (
            self.active
            and self.started_with == files == self.instance.files("live")
            and not self.instance.drained_by()
        )


@pytest.fixture(scope="module")
def program(load_module: Callable[[str], ModuleType]) -> ModuleType:
    return load_module("roles/vllm_instance/files/k80-instance")


@pytest.fixture
def server(program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(program, tmp_path, monkeypatch)


@pytest.fixture
def served(server: Server) -> Any:
    """The instance serves good:1."""
    files = server.stage("good:1")
    server.apply()
    server.log.clear()
    return files


def test_a_new_instance_is_tested_started_and_kept(server: Server) -> None:
    files = server.stage("good:1")
    assert server.apply(check=True) == "changed"
    assert server.instance.files("live") is None
    assert server.apply(if_stopped=True) == "changed"
    assert server.serves(files)
    assert server.log == ["selftest good:1", "selftest good:1", "start good:1"]  # one for each die
    assert (server.enabled, server.timer) == (True, True)
    assert server.instance.files("previous") is None
    assert server.apply() == "unchanged"


def test_one_that_serves_waits_and_then_changes(server: Server, served: Any) -> None:
    new = server.stage("good:2")
    assert server.apply(if_stopped=True) == "waiting"
    assert server.serves(served)
    assert server.apply() == "changed"
    assert server.serves(new)
    assert server.log == ["stop", "selftest good:2", "selftest good:2", "start good:2"]
    assert server.instance.files("previous") == served
    assert server.instance.files("before") is None


def test_a_key_is_changed_in_two_steps(server: Server, served: Any) -> None:
    """In between gateways may send either."""
    server.stage("good:2")
    server.apply()
    server.log.clear()
    options = server.program.Options(6, 60, 0, 3, False)
    assert server.program.forget_key(server.instance, options) == "unchanged"

    server.stage("good:2", key="b")
    assert server.apply() == "changed"
    assert server.serves(server.files("good:2", "b", former="a"))
    assert server.apply() == "unchanged"
    assert server.program.listing(server.instance)["staged"] is True
    assert server.program.listing(server.instance)["two_keys"] is True

    assert server.program.forget_key(server.instance, options) == "changed"
    assert server.serves(server.files("good:2", "b"))
    assert server.apply() == "unchanged"
    assert server.program.listing(server.instance)["two_keys"] is False
    assert server.log == ["stop", "start good:2"] * 2  # the same image needs no self-test

    # The way back leads to the other image, with the key of today.
    assert server.instance.files("previous") == served
    environment = Path(server.instance.paths("previous")[1])
    assert environment.stat().st_mode & 0o777 == 0o600
    server.program.rollback(server.instance, options)
    assert server.serves(server.files("good:1", "b"))


def test_a_change_of_keys_goes_on_with_other_changes_and_back(server: Server, served: Any) -> None:
    server.stage("good:1", key="b")
    server.apply()
    server.stage("good:2", key="b")
    server.apply()
    assert server.serves(server.files("good:2", "b", former="a"))
    server.stage("good:2", key="a")
    server.apply()
    assert server.serves(server.files("good:2", "a", former="b"))


def test_a_third_key_has_to_wait(server: Server, served: Any) -> None:
    server.stage("good:1", key="b")
    server.apply()
    server.stage("good:1", key="c")
    with pytest.raises(server.program.ChangeError, match="it takes two keys already"):
        server.apply()
    assert server.serves(server.files("good:1", "b", former="a"))


def test_requests_finish_before_it_stops(server: Server, served: Any) -> None:
    server.stage("good:2")
    server.requests = [2, 1, 1, 0, 1, 0]
    begun = server.clock
    server.apply()
    # Idle since the sixth answer, half a second apart, and then for 6 s.
    assert server.clock - begun == pytest.approx(2.5 + 6, abs=0.6)


def test_requests_that_take_too_long_are_cut_off(server: Server, served: Any) -> None:
    new = server.stage("good:2")
    server.requests = [1] * 1000
    server.apply(drain_limit=20)
    assert server.clock == pytest.approx(20, abs=0.6)
    assert server.serves(new)


def test_one_that_does_not_tell_its_requests_is_not_waited_for_longer(
    server: Server, served: Any
) -> None:
    server.stage("good:2")
    server.requests = [None] * 1000
    server.apply()
    assert server.clock == pytest.approx(6, abs=0.6)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (
            "broken:2",
            "it did not start. Its last words (`journalctl -u vllm-k80-die0`):\nTraceback",
        ),
        ("sick:2", "the self-test of sick:2 failed on GPU-a:\nwrong tokens"),
        ("slow:2", "too slow"),
        ("mortal:2", "it started, and then ended. Its last words"),
    ],
)
def test_what_fails_goes_back(server: Server, served: Any, image: str, reason: str) -> None:
    staged = server.stage("good:2")
    server.apply()
    older = served
    served = staged
    server.stage(image)
    with pytest.raises(server.program.ChangeError) as failure:
        server.apply(soak=60)
    assert str(failure.value).startswith(reason)
    assert "serves again" in str(failure.value)
    assert server.serves(served)
    assert server.instance.files("previous") == older  # a rollback goes where it went before
    assert server.instance.files("before") is None


def test_where_there_is_nothing_to_go_back_to_it_says_only_why(server: Server) -> None:
    server.stage("broken:1")
    with pytest.raises(server.program.ChangeError) as failure:
        server.apply()
    assert "serves again" not in str(failure.value)
    # The next run, with a better image, needs no way back.
    good = server.stage("good:1")
    assert server.apply(if_stopped=True) == "changed"
    assert server.serves(good)


def test_what_was_there_before_and_fails_now_is_named(server: Server, served: Any) -> None:
    server.stage("broken:2")
    real = server.start

    def nothing_starts() -> int:
        real()
        server.active = False
        return 1

    server.start = nothing_starts  # type: ignore[method-assign]
    with pytest.raises(server.program.ChangeError, match="which has been put back, does not start"):
        server.apply()
    server.start = real  # type: ignore[method-assign]
    good = server.stage("good:2")
    server.apply()
    assert server.serves(good)


def test_accepted_tokens_are_recorded_anew_and_kept_if_it_fails(
    server: Server, served: Any
) -> None:
    golden = Path(server.instance.state, "golden-x.json")
    assert golden.read_text() == "recorded by good:1"
    server.stage("slow:2")
    with pytest.raises(server.program.ChangeError):
        server.apply(accept_tokens=True)
    assert golden.read_text() == "recorded by good:1"
    server.stage("good:2")
    server.apply(accept_tokens=True)
    assert golden.read_text() == "recorded by good:2"
    left = sorted(path.name for path in golden.parent.iterdir())
    assert left == [golden.name, f"{golden.name}.previous"]


def test_rollback_brings_back_the_tokens_of_its_time(server: Server, served: Any) -> None:
    server.images.add("other:2")
    other = server.stage("other:2")
    with pytest.raises(server.program.ChangeError, match="did not start"):
        server.apply()
    assert server.serves(served)
    server.apply(accept_tokens=True)
    options = server.program.Options(6, 60, 0, 3, False)
    for files in (served, other, served):
        server.program.rollback(server.instance, options)
        assert server.serves(files)
    # What is changed with the tokens that it had is not given others back.
    server.stage("good:2")
    server.apply()
    server.program.rollback(server.instance, options)
    assert server.serves(served)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("Port=8001", "Port=8002"), "its port was 8001 and is 8002, which is what gateways"),
        (("Model=m\n", "Model=n\n"), "its model's name was m and is n"),
    ],
)
def test_rollback_refuses_what_gateways_do_not_know(
    server: Server, served: Any, change: tuple[str, str], reason: str
) -> None:
    new = server.program.Files(served.unit.replace(*change), served.environment)
    server.instance.put("staged", new)
    server.apply()
    with pytest.raises(server.program.ChangeError, match=reason):
        server.program.rollback(server.instance, server.program.Options(6, 60, 0, 3, False))
    assert server.serves(new)


def test_one_that_is_stopped_keeps_its_way_back(server: Server, served: Any) -> None:
    """By its operator, or it is about to start again, after a reboot say."""
    server.active = False
    server.stage("broken:2")
    with pytest.raises(server.program.ChangeError, match="serves again"):
        server.apply(if_stopped=True)
    assert server.serves(served)
    server.active = False
    server.stage("good:2")
    server.apply(if_stopped=True)
    assert server.instance.files("previous") == served


@pytest.fixture
def neighbour(server: Server, served: Any) -> Any:
    """die1, which serves on GPU-b and port 8002."""
    other = server.program.Instance("die1")
    Path(other.state).mkdir()
    unit = served.unit.replace("Dies=GPU-a GPU-b", "Dies=GPU-c").replace("8001", "8002")
    other.put("live", server.program.Files(unit, served.environment))
    Path(server.program.UNITS, other.timer).touch()
    server.others[other.unit] = True
    return other


@pytest.mark.parametrize(
    "change", [("Dies=GPU-a GPU-b", "Dies=GPU-a GPU-c"), ("Port=8001", "Port=8002")]
)
@pytest.mark.parametrize("image", ["good:1", "broken:2"])
def test_who_has_its_die_or_port_makes_room(
    server: Server, served: Any, neighbour: Any, change: tuple[str, str], image: str
) -> None:
    """As when a board was taken out, and each instance gets the dies of the next."""
    unit = served.unit.replace(*change).replace("good:1", image)
    new = server.program.Files(unit, served.environment)
    server.instance.put("staged", new)
    server.active = False  # even so, it waits: another would be drained for it
    assert server.apply(if_stopped=True) == "waiting"
    assert server.others[neighbour.unit] is True
    if image == "good:1":
        assert server.apply() == "changed"
        assert server.serves(new)
        # Its own change starts it elsewhere.
        assert server.others[neighbour.unit] is False
        assert neighbour.drained_by() == "update"
        return
    with pytest.raises(server.program.ChangeError, match="serves again"):
        server.apply()
    assert server.serves(served)
    assert server.others[neighbour.unit] is True
    assert neighbour.drained_by() == ""


def test_a_new_one_that_fails_gives_back_what_it_took(
    server: Server, served: Any, neighbour: Any
) -> None:
    """As an instance that gets a new name: whom it replaces serves again, alone."""
    server.active = server.enabled = False
    server.instance.forget("live")
    Path(server.program.CONFIG, "proven/die0").unlink()
    unit = served.unit.replace("GPU-b", "GPU-c").replace("good:1", "slow:2")
    server.instance.put("staged", server.program.Files(unit, served.environment))
    with pytest.raises(server.program.ChangeError, match="too slow"):
        server.apply()
    assert (server.active, server.enabled, server.timer) == (False, False, False)
    assert server.others[neighbour.unit] is True
    assert neighbour.drained_by() == ""


def test_there_is_no_way_back_to_what_another_has_by_now(
    server: Server, served: Any, neighbour: Any
) -> None:
    """die1 has die0's former die; now die0 fails on its new one."""
    live = neighbour.files("live")
    taken = server.program.Files(live.unit.replace("GPU-c", "GPU-b"), live.environment)
    neighbour.put("live", taken)
    server.active = False  # it was moved out of the way
    unit = served.unit.replace("GPU-a GPU-b", "GPU-d").replace("good:1", "broken:2")
    server.instance.put("staged", server.program.Files(unit, served.environment))
    with pytest.raises(server.program.ChangeError, match="is die1's now, so it stays stopped"):
        server.apply()
    assert server.others[neighbour.unit] is True
    assert server.enabled is False
    # Nor by a rollback.
    server.instance.put("previous", served)
    with pytest.raises(server.program.ChangeError, match="is die1's now: change the inventory"):
        server.program.rollback(server.instance, server.program.Options(6, 60, 0, 3, False))


def test_a_move_that_was_cut_off_goes_on(server: Server, served: Any, neighbour: Any) -> None:
    """A boot has started both, on one die."""
    live = neighbour.files("live")
    unit = live.unit.replace("GPU-c", "GPU-b")
    neighbour.put("live", server.program.Files(unit, live.environment))
    server.active = False  # ended by the other
    assert server.apply(if_stopped=True) == "waiting"
    server.apply()
    assert server.serves(served)
    assert server.others[neighbour.unit] is False


def test_tokens_of_another_time_are_not_given_back(server: Server, served: Any) -> None:
    options = server.program.Options(6, 60, 0, 3, False)
    server.images.add("other:2")
    other = server.stage("other:2")
    server.apply(accept_tokens=True)
    # With other arguments the tokens have another file.
    unit = other.unit.replace("golden-x", "golden-y")
    server.instance.put("staged", server.program.Files(unit, other.environment))
    server.apply()
    server.program.rollback(server.instance, options)
    assert server.serves(other)


def test_one_that_is_stopped_has_no_requests_to_wait_for(server: Server, served: Any) -> None:
    server.active = False
    server.requests = [5] * 1000  # of whoever has its port by now
    assert server.instance.wait_until_idle(server.program.Options(6, 60, 0, 3, False)) is True
    assert server.clock == 0


def test_those_that_are_in_nobodys_way_stay(server: Server, served: Any, neighbour: Any) -> None:
    server.stage("good:2")
    server.apply()
    assert server.others[neighbour.unit] is True
    assert not any(neighbour.unit in line for line in server.log)


def test_a_proxy_of_the_environment_is_for_elsewhere(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'vllm:num_requests_running{engine="0"} 3.0\n')

    with HTTPServer(("127.0.0.1", 0), Metrics) as metrics:
        Thread(target=metrics.handle_request, daemon=True).start()
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nothing listens
        setting = {"Address": "127.0.0.1", "Port": str(metrics.server_port)}
        assert program.Instance("die0").requests(setting.__getitem__) == 3


def test_who_refuses_to_say_is_told_from_who_is_slow(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "METRICS_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        setting = {"Address": "127.0.0.1", "Port": str(silent.getsockname()[1])}
        with pytest.raises(TimeoutError):
            program.Instance("die0").requests(setting.__getitem__)
    assert program.Instance("die0").requests(setting.__getitem__) is None


def test_an_instance_that_is_slow_to_say_may_be_busy(
    server: Server, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(server.program.Instance, "requests", slow)
    options, begun = server.program.Options(6, 60, 0, 3, False), server.clock
    assert server.instance.wait_until_idle(options) is False
    assert server.clock - begun >= options.drain_limit


def test_what_the_operator_drained_stays_drained(server: Server, served: Any) -> None:
    server.instance.drain("operator")
    new = server.stage("good:2")
    server.apply()
    assert server.started_with == new
    assert server.instance.drained_by() == "operator"


def test_each_lifts_its_own_drain_and_the_operator_all(server: Server, served: Any) -> None:
    instance = server.instance
    assert instance.drain("update") is True
    assert instance.drain("maintenance") is True
    assert instance.drain("update") is False
    assert instance.lift("update") is False
    server.stage("good:2")
    server.apply()
    assert instance.drained_by() == "maintenance"
    assert instance.drain("operator") is True
    assert instance.drain("maintenance") is False
    assert instance.lift("maintenance") is False
    assert instance.drained_by() == "operator"


def test_a_drain_of_an_update_ends_with_the_boot(server: Server, served: Any) -> None:
    server.instance.drain("update")
    assert server.instance.drained_by() == "update"
    Path(server.program.BOOT_ID).write_text("another\n")
    assert server.instance.drained_by() == ""


def test_a_container_cannot_lead_writes_and_reads_elsewhere(
    server: Server, served: Any, tmp_path: Path
) -> None:
    """The state directory is the container's own."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("drained", "drained.new"):
        Path(server.instance.state, name).symlink_to(victim)
    os.mkfifo(Path(server.instance.state, "drained-by-doctor"))
    assert server.program.listing(server.instance)["drained_by"] == ""  # and does not wait for one
    assert server.instance.drained_by() == ""
    server.instance.drain("operator")
    assert victim.read_text() == "precious"
    assert server.instance.drained_by() == "operator"


def test_rollback_goes_there_and_back_again(server: Server, served: Any) -> None:
    with pytest.raises(server.program.ChangeError, match="nothing was changed yet"):
        server.program.rollback(server.instance, None)
    new = server.stage("good:2")
    server.apply()
    options = server.program.Options(6, 60, 0, 3, False)
    server.program.rollback(server.instance, options)
    assert server.serves(served)
    server.program.rollback(server.instance, options)
    assert server.serves(new)
    server.images.remove("good:1")
    with pytest.raises(server.program.ChangeError, match="its former image, good:1, is not on"):
        server.program.rollback(server.instance, options)


def test_start_waits_for_what_is_about_to_start(server: Server, served: Any) -> None:
    assert server.program.start(server.instance) == "unchanged"
    server.active = False
    assert server.program.start(server.instance) == "changed"
    assert server.log == ["start good:1"]
    server.active = False
    server.instance.put("live", server.files("broken:1"))
    with pytest.raises(server.program.ChangeError, match="it did not start"):
        server.program.start(server.instance)


def test_the_command_drains_and_undrains(
    server: Server, served: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(server.program.signal, "signal", lambda *_: None)
    Path(server.program.UNITS, "vllm-k80-die0-liveness.timer").touch()

    def said(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["k80-instance", *words])
        status = server.program.main()
        captured = capsys.readouterr()
        return f"{status} {captured.out}{captured.err}"

    assert said("drain", "--by", "maintenance") == "0 die0: changed\n"
    assert said("drain", "die0") == "0 die0: changed\n"
    assert said("drain", "die0") == "0 die0: unchanged\n"
    assert said("undrain", "--by", "maintenance") == "0 die0: unchanged\n"
    assert server.instance.drained_by() == "operator"
    assert said("undrain") == "0 die0: changed\n"
    assert said("undrain") == "0 die0: unchanged\n"
    server.requests = [1] * 1000
    assert said("drain", "--drain-limit", "20") == (
        "1 k80-instance: die0: it still has requests after 20 s; it gets no new ones.\n"
    )
    assert said("drain", "die7").startswith("1 k80-instance: die7: there is no such instance;")


def test_a_failed_change_says_whether_the_instance_serves(
    server: Server, served: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(server.program.signal, "signal", lambda *_: None)
    monkeypatch.setattr(
        "sys.argv", ["k80-instance", "apply", "die0", "--json", "--if-stopped", "--settle", "6"]
    )
    Path(server.program.UNITS, "vllm-k80-die0-liveness.timer").touch()

    def row() -> tuple[str, bool]:
        assert server.program.main() == 1
        [row] = json.loads(capsys.readouterr().out)
        return row["state"], row["serves"]

    server.active = False
    server.stage("broken:2")
    assert row() == ("failed", True), "it went back"
    server.active = False
    server.instance.put("live", server.files("broken:1"))
    assert row() == ("failed", False)


def test_restart(server: Server, served: Any) -> None:
    options = server.program.Options(6, 60, 0, 3, False)
    server.program.restart(server.instance, options)
    assert server.log == ["stop", "start good:1"]
    assert server.serves(served)


@pytest.mark.parametrize("image", ["good:2", "broken:2", "mortal:2"])
def test_killed_anywhere_and_run_again_it_goes_on(
    program: ModuleType, tmp_path: Path, image: str
) -> None:
    """Killed before each of the programs that it calls; the next run ends as the first would."""
    for kill_at in range(1, 200):
        with pytest.MonkeyPatch.context() as monkeypatch:
            root = tmp_path / str(kill_at)
            root.mkdir()
            server = Server(program, root, monkeypatch)
            old = server.stage("good:1")
            server.apply()
            new = server.stage(image)
            server.kill_at = server.calls + kill_at
            killed = False
            try:
                server.apply(soak=40)
            except KilledError:
                killed = True
            except program.ChangeError:
                pass
            if killed:
                try:
                    server.apply(soak=40)
                except program.ChangeError:
                    assert image != "good:2"
            wanted = new if image == "good:2" else old
            # Killed while it soaked, it runs with what is staged; that it ends later is seen later.
            late = killed and image == "mortal:2" and server.started_with == new
            assert server.serves(wanted) or late, (kill_at, server.log)
            assert server.instance.files("before") is None or late
            if not killed:
                assert kill_at > 10
                return
    pytest.fail("the change came to no end")


def test_the_names_come_from_the_units(server: Server) -> None:
    units = Path(server.program.UNITS)
    for name in ("vllm-k80-die1-liveness.timer", "vllm-k80-a-b-liveness.timer", "ssh.service"):
        (units / name).touch()
    assert server.program.all_names() == ["a-b", "die1"]


def test_it_needs_root(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["k80-instance", "restart"])
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert program.main() == 1
    assert capsys.readouterr().err == "k80-instance: this needs root.\n"


# ---- dies that the doctor does not trust


def test_a_die_that_the_doctor_distrusts_gets_no_requests_until_it_does(
    server: Server, served: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    instance, says = server.instance, [0, ""]
    asked: list[tuple[str, ...]] = []

    def doctor(*command: str, **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, says[0], says[1], "")

    monkeypatch.setattr(server.program, "run", doctor)
    monkeypatch.setattr(server.program.shutil, "which", lambda name: f"/sbin/{name}")
    file = Path(instance.state, "drained-by-doctor")
    assert instance.examine() is False
    assert asked == [("/sbin/k80-doctor", "--timeout", "20", "--dies", "GPU-a", "GPU-b")]
    assert not file.exists()

    says[:] = [2, "ecc-errors: 2 of them\n"]
    assert [instance.examine(), instance.examine()] == [True, False]
    assert file.read_text() == "ecc-errors: 2 of them\n"
    says[:] = [2, "ecc-errors: 3 of them\n"]
    instance.examine()
    says[:] = [1, "the driver hangs\n"]  # nothing new of the die
    assert instance.examine() is False
    assert file.read_text() == "ecc-errors: 3 of them\n"
    says[:] = [0, ""]
    assert [instance.examine(), instance.examine()] == [True, False]
    assert not file.exists()
    assert capsys.readouterr().err.splitlines() == [
        "die0: gets no new requests. k80-doctor says ecc-errors: 2 of them",
        "die0: gets no new requests. k80-doctor says ecc-errors: 3 of them",
        "die0: k80-doctor trusts its dies again.",
    ]


def test_without_a_doctor_nothing_is_judged(server: Server, served: Any) -> None:
    assert server.instance.examine() is False  # the role installs it after the instances
