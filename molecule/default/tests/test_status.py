"""What each die serves, in the fleet's table and on the gateway's page."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from conftest import SERVER, Server
from scenario import play


def test_the_table_names_both_dies_and_changes_nothing(server: Server, tmp_path: Path) -> None:
    server.wait_until_serving(600)
    file = tmp_path / "status.json"
    code, output = play("playbooks/status.yml", "--check", status_json=str(file))
    assert code == 0, output
    assert "changed=0" in output
    rows = json.loads(file.read_text())
    assert [(row["host"], row["die"], row["instance"], row["uuid"]) for row in rows] == [
        (SERVER, die, instance.name, instance.uuid)
        for die, instance in zip(("0000:05:00.0", "0000:06:00.0"), server.instances, strict=True)
    ]
    image = server.run(f"docker inspect --format {{{{.Config.Image}}}} {server.instances[0].unit}")
    for row in rows:
        assert (row["state"], row["why"], row["image"]) == ("ready", "", image)
        assert row["model"] == "smollm2-135m-instruct"
        assert row["tokens_per_second"] >= 0
        assert 0 <= row["kv_cache"] <= 1
        assert 20 < row["temperature"] < 80
        assert 0 < time.time() - row["since"] < 24 * 3600
    line = f"{SERVER} 0000:05:00.0 {rows[0]['uuid'][:12]} die0 smollm2-135m-instruct {image} ready"
    assert line in output


def test_the_page_shows_both_dies_and_what_they_do(
    server: Server, ask: Callable[..., str], status_page: Callable[[], str]
) -> None:
    server.wait_until_serving(600)
    assert "Paris" in ask()
    asked = time.monotonic()
    # Requests, errors, sent again: of a whole hour, in which other tests ask as well.
    requests = r"<td>2 of 2</td>(?:<td>[^<]*</td>){4}<td>([\d,]+)</td>"
    # One answer that comes late, to the page or to a check, is another page's.
    while (
        not (found := re.search(requests, page := status_page()))
        or found[1] == "0"
        or page.count('<p class="state">ready</p>') != 2
        or len(re.findall(r"<dd>\d+ running, \d+ waiting</dd>", page)) != 2
    ):
        assert time.monotonic() - asked < 180, page
        time.sleep(1)
    assert "2 of 2 instances are ready</h1>" in page
    assert {"0000:05:00.0", "0000:06:00.0"} <= {*re.findall(r"<dd>([^<]*)</dd>", page)}
    assert page.count("<svg") == 4


def test_its_service_may_do_nothing_else(server: Server) -> None:
    unit = "vllm-k80-gateway-status"
    pid = server.run(f"systemctl show --property=MainPID --value {unit}")
    status = dict(
        line.split(":\t", 1) for line in server.run(f"cat /proc/{pid}/status").splitlines()
    )
    assert "0" not in status["Uid"].split()
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
