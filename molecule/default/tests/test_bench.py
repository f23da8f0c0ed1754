"""benchmark.yml and acceptance.yml on a server without a card, with the real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SERVER, Server
from scenario import play

pytestmark = pytest.mark.operations

# As little as there can be: how fast a CPU is, is not what is tested. The dies are sampled every
# two seconds, so that it must take more than these.
FLAGS = "--concurrency 1 --requests 1 --prompt-tokens 8 --output-tokens 40 --prompt-lengths 8"


def test_instances_and_the_gateway_are_measured(server: Server, tmp_path: Path) -> None:
    server.wait_until_serving(600)
    code, output = play(
        "playbooks/benchmark.yml", benchmark_flags=FLAGS, benchmark_directory=str(tmp_path)
    )
    assert code == 0, output
    assert output.count("1 at once") == 3
    brought = {path.name: path for path in (tmp_path / SERVER).iterdir()}
    assert sorted(brought) == ["die0", "die1", "gateway"]
    uuids = [instance.uuid for instance in server.instances]
    # Sampled of the die that an instance has, and of no other.
    for name, sampled in {"die0": uuids[:1], "die1": uuids[1:], "gateway": uuids}.items():
        files = {path.name for path in brought[name].iterdir()}
        assert files == {"result.json", "result.csv", "report.html", "samples.csv"}
        result = json.loads((brought[name] / "result.json").read_text())
        assert [step["failed"] for step in result["steps"]] == [0, 0]
        assert result["steps"][0]["tokens_per_second"] > 0
        assert sorted(result["samples"]) == sorted(sampled)
        # nvidia-smi lists a Tesla K80; what was measured is a CPU.
        assert "none: CUDA finds no device" in result["about"]["card"]
    assert server.run("ls /var/tmp | grep -c k80-bench || true") == "0"


def test_acceptance_says_what_was_not_run(server: Server, tmp_path: Path) -> None:
    code, output = play(
        "playbooks/acceptance.yml",
        instance="die0",
        acceptance_soak=3,
        acceptance_flags=FLAGS,
        acceptance_directory=str(tmp_path),
    )
    assert code == 0, output
    checks = json.loads((tmp_path / SERVER / "checks.json").read_text())
    assert {check["check"]: check["result"] for check in checks} == {
        "CUDA opens the die": "not run",
        "self-test": "not run",
        "operators against references": "not run",
        "systemctl daemon-reload while it serves": "pass",
        "soak of 3 s under load": "not run",
    }
    assert "CUDA finds no device" in checks[0]["said"]
    page = (tmp_path / "index.html").read_text()
    assert "1 pass, 0 fail, 4 not run" in page
