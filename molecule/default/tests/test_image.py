"""A build of the image that does not end."""

from __future__ import annotations

import shutil
from pathlib import Path

from conftest import Server
from scenario import ROOT, play, playbook_of

IMAGES = "docker image ls --no-trunc --format '{{.Repository}}:{{.Tag}} {{.ID}}' vllm-k80"
RECORD = "cat /var/lib/vllm-k80/image/image.json"
BUILDS = "systemctl list-units --no-legend --state=active,activating 'vllm-k80-image-*'"


def test_a_build_that_takes_too_long_is_ended_and_nothing_changes(
    server: Server, tmp_path: Path
) -> None:
    source = tmp_path / "vllm-k80-src"
    unneeded = shutil.ignore_patterns("tests", "benchmarks", "tools", "__pycache__", "*.fatbin")
    shutil.copytree(ROOT / "vllm-k80-src", source, ignore=unneeded)
    waits = "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nRUN echo '== Waiting' && sleep 300\n"
    (source / "docker/Dockerfile").write_text(waits)
    before = server.run(IMAGES), server.run(RECORD)
    playbook = playbook_of("vllm_image", tmp_path)
    rc, said = play(playbook, vllm_image_source=str(source), vllm_image_build_timeout=8)
    server.run("systemctl reset-failed 'vllm-k80-image-*'")
    assert rc != 0
    assert "took longer than vllm_image_build_timeout (8 s)" in said
    assert "k80-molecule: Waiting" in said, "how far it was"
    assert server.run(BUILDS) == ""
    assert (server.run(IMAGES), server.run(RECORD)) == before
    assert server.diagnosis() == {}
