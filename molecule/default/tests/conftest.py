"""The emulated server after site.yml, seen as its users see it (the gateway) and from inside."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import openai
import pytest
import testinfra
import yaml
from browser import document
from scenario import ROOT, reporting
from testinfra.host import Host

SERVER = "k80-molecule"
HOST_VARS = ROOT / ".config" / "molecule" / "host_vars" / f"{SERVER}.yml"

pytest_runtest_makereport = reporting(
    SERVER,
    {
        "containers": "docker ps --all",
        "units": "systemctl list-units --all --no-pager 'vllm-k80-*' 'prometheus*' docker haproxy",
        # Without the lines that say nothing: checks that succeeded, and vLLM's list of routes.
        "journal": "journalctl --no-pager -u 'vllm-k80-*' -u docker -u haproxy --since -10min"
        " | grep -vE 'GET /ready|Route: |IPv6|ignoring event' | tail -n 100",
    },
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "operations: for scenario operations, not for default")


# Of each process that was given dies: its namespace of process ids, which is its container's, and
# their UUIDs.
OWNERS = """
import glob, os
for process in glob.glob("/proc/[0-9]*"):
    try:
        with open(f"{process}/environ", "rb") as file:
            entries = [entry.decode(errors="replace") for entry in file.read().split(b"\\0")]
        for entry in entries:
            if entry.startswith("NVIDIA_VISIBLE_DEVICES="):
                print(os.readlink(f"{process}/ns/pid"), entry.partition("=")[2])
    except OSError:
        pass
"""


@dataclass(frozen=True)
class Instance:
    """One vLLM server: its unit, its container and the die that it was given."""

    name: str
    port: int
    uuid: str

    @property
    def unit(self) -> str:
        return f"vllm-k80-{self.name}"


class Server:
    """The server's side: systemd, Docker, and what the instances say of themselves."""

    def __init__(self, host: Host) -> None:
        self.host = host
        uuids = self.run("nvidia-smi --query-gpu=uuid --format=csv,noheader").split()
        self.instances = [
            Instance(f"die{index}", 8001 + index, uuid) for index, uuid in enumerate(uuids)
        ]

    def run(self, command: str) -> str:
        result = self.host.run(command)
        assert result.rc == 0, f"{command}: exit {result.rc}: {result.stderr}{result.stdout}"
        return result.stdout.strip()

    def in_container(self, instance: Instance, script: str) -> str:
        """Runs Python as the instance's own user, under its own restrictions."""
        result = self.host.run("docker exec %s python3 -c %s", instance.unit, script)
        return (result.stdout + result.stderr).strip()

    def container_id(self, instance: Instance) -> str:
        return self.host.run("docker inspect --format {{.Id}} %s", instance.unit).stdout.strip()

    def container_pid(self, instance: Instance) -> int:
        return int(self.run(f"docker inspect --format {{{{.State.Pid}}}} {instance.unit}"))

    def engine(self, instance: Instance) -> int:
        """The process that computes: vLLM's web server, a child of docker-init, is its parent."""
        [pid] = self.run(f"docker top {instance.unit} -eo pid,comm | grep -w EngineCor").split()[:1]
        return int(pid)

    def diagnosis(self) -> dict[str, str]:
        """What the doctor finds: the checks that are not well."""
        report = json.loads(self.host.run("k80-doctor --json").stdout)
        rows = report["checks"]
        return {r["name"]: r["status"] for r in rows if r["status"] in ("warn", "fail")}

    def is_ready(self, instance: Instance) -> bool:
        script = (
            "import urllib.request; "
            f"urllib.request.urlopen('http://127.0.0.1:{instance.port}/ready', timeout=5)"
        )
        return bool(self.host.run("python3 -c %s", script).rc == 0)

    def is_active(self, instance: Instance) -> bool:
        return self.host.run("systemctl is-active %s", instance.unit).stdout.strip() == "active"

    def owners(self) -> dict[str, set[str]]:
        """The containers, by a namespace of theirs, that each die was given to, by UUID.

        Asked of the kernel: a daemon that was killed knows nothing of what it has left behind.
        """
        owners: dict[str, set[str]] = defaultdict(set)
        for line in self.host.run("python3 -c %s", OWNERS).stdout.splitlines():
            namespace, _, uuids = line.partition(" ")
            for uuid in uuids.split(","):
                owners[uuid].add(namespace)
        return owners

    def assert_one_container_per_die(self) -> None:
        """Whatever happens, no die is ever given to two containers that run."""
        owners = self.owners()
        assert not [uuid for uuid, them in owners.items() if len(them) > 1], owners

    def wait_until_serving(self, timeout: float) -> None:
        """Until every instance is up and proven, twice in a row."""
        deadline = time.monotonic() + timeout
        good = 0
        while good < 2:
            self.assert_one_container_per_die()
            serving = all(self.is_active(each) and self.is_ready(each) for each in self.instances)
            good = good + 1 if serving else 0
            if time.monotonic() > deadline:
                states = {each.unit: self.is_active(each) for each in self.instances}
                pytest.fail(f"not every instance serves after {timeout:.0f} s; active: {states}")
            time.sleep(1)


@pytest.fixture(scope="session")
def host() -> Host:
    return testinfra.get_host(f"docker://{SERVER}")


@pytest.fixture(scope="session")
def server(host: Host) -> Server:
    return Server(host)


@pytest.fixture(scope="session")
def gateway_url(host: Host) -> str:
    """The gateway as another machine reaches it: at the server's own address."""
    address = host.run("hostname --ip-address").stdout.split()[0]
    return f"http://{address}:8080"


@pytest.fixture(scope="session")
def gateway_key() -> str:
    key: str = yaml.safe_load(HOST_VARS.read_text())["gateway_api_keys"][0]["key"]
    return key


@pytest.fixture(scope="session")
def status_page(gateway_url: str, gateway_key: str) -> Callable[[], str]:
    """Looks at the gateway's status page with a browser."""
    return lambda: document(gateway_url.replace("://", f"://test:{gateway_key}@") + "/status")


@pytest.fixture(scope="session")
def client(gateway_url: str, gateway_key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{gateway_url}/v1", api_key=gateway_key, timeout=600, max_retries=0
    ) as client:
        yield client


@pytest.fixture(scope="session")
def ask(client: openai.OpenAI) -> Callable[..., str]:
    """Asks one question and returns the answer."""
    model = client.models.list().data[0].id

    def ask(
        question: str = "What is the capital of France?", max_tokens: int = 24, stream: bool = False
    ) -> str:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=max_tokens,
            temperature=0,
            stream=stream,
        )
        if not isinstance(answer, openai.Stream):
            return answer.choices[0].message.content or ""
        choices = [choice for event in answer for choice in event.choices]
        assert choices[-1].finish_reason, f"a stream was cut after {len(choices)} events"
        return "".join(choice.delta.content or "" for choice in choices)

    return ask


@contextmanager
def asked_all_the_time(
    ask: Callable[..., str], streams: Sequence[bool] = (False, True)
) -> Iterator[list[str]]:
    """Users who ask one question after the other, and read; every one of them is answered.

    Each of them has streams or not. What breaks an instance may cut those that it has.
    """
    answers: list[str] = []
    done = threading.Event()

    def user(stream: bool) -> None:
        while not done.is_set():
            answers.append(ask("Tell me a story about a river.", max_tokens=48, stream=stream))
            done.wait(2)

    with ThreadPoolExecutor(len(streams)) as pool:
        asking = [pool.submit(user, stream) for stream in streams]
        try:
            yield answers
        finally:
            done.set()
            for each in asking:
                each.result()  # the first request that failed
