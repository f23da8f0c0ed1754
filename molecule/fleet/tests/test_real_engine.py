"""A server of the fleet has the real engine, and by it another model than the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import openai
import pytest
import yaml
from conftest import INVENTORY, INVENTORY_FILE, KEY, SERVERS, URLS, Fault, on
from scenario import ROOT, play, playbook_of
from test_faults import fewer
from test_operations import good

UnderLoad = Callable[..., Fault]
pytestmark = pytest.mark.full
ITS_SERVER = SERVERS[-1]
MODEL = "smollm2-135m-instruct"
# What the fleet's stand-in has otherwise.
VARIABLES_OF_IT = {
    "vllm_image_archive": "",
    "vllm_image_builder": ITS_SERVER,
    "vllm_model_catalogue": yaml.safe_load((ROOT / "group_vars/all/models.yml").read_text())[
        "vllm_model_catalogue"
    ],
    "vllm_instance_model": MODEL,
    "vllm_instance_extra_args": [],
    "vllm_instance_memory_mb": 3072,
    "vllm_instance_start_timeout": 900,
    "vllm_instance_liveness_interval": 30,
    "vllm_instance_liveness_timeout": 40,
    "vllm_instance_max_slowdown": 10,
    "preflight_disk_free_gb": {"/var/lib/docker": 20, "/var/lib/vllm-k80": 1},
}


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Path]:
    """An inventory in which a server has it, and its image there. After it all are as before."""
    inventory = INVENTORY_FILE.with_name("real.yml")
    hosts = INVENTORY["k80_servers"]["hosts"]
    with_it = {"hosts": hosts | {ITS_SERVER: (hosts[ITS_SERVER] or {}) | VARIABLES_OF_IT}}
    inventory.write_text(yaml.safe_dump(INVENTORY | {"k80_servers": with_it}))
    try:
        # Not under load: it would take the processors of the engines, which share this machine.
        code, said = play(
            playbook_of("vllm_image", tmp_path),
            inventory=inventory,
            vllm_image_base_image="vllm-k80-base:debian12",  # as of the inventory
        )
        assert code == 0, said
        yield inventory
    finally:
        inventory.unlink()
        good("update.yml", site_soak=0)


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=120, max_retries=0)


def answer(of: openai.OpenAI) -> str:
    asked = of.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=16,
    )
    return asked.choices[0].message.content or ""


@contextmanager
def asked_all_the_time(url: str) -> Iterator[list[str]]:
    """Its answers, one after the other, or why there was none."""
    answers: list[str] = []
    over = threading.Event()

    def ask() -> None:
        with client(url) as of:
            while not over.is_set():
                try:
                    answers.append(answer(of))
                except openai.OpenAIError as error:
                    answers.append(repr(error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()


def test_a_server_gets_the_real_engine(under_load: UnderLoad, real: Path) -> None:
    """Nobody is sent to it who asks for the model that it had."""
    bring = partial(good, "update.yml", inventory=real, site_soak=0)
    assert under_load(bring, within=120).cut == 0
    for url in URLS:
        with client(url) as of:
            assert {model.id for model in of.models.list()} == {"known", MODEL}
            assert "Paris" in answer(of)


def test_the_real_engine_is_killed(under_load: UnderLoad, real: Path) -> None:
    good("update.yml", inventory=real, site_soak=0)
    kill = partial(on, ITS_SERVER, "docker kill vllm-k80-die0")
    with asked_all_the_time(URLS[0]) as answers:
        assert under_load(kill, detected=fewer(1), within=300).cut == 0
    assert len(answers) > 2
    assert not [said for said in answers if "Paris" not in said]
