"""`vllm-k80 serve` ends with its engine. That it ends after its requests, test_api says."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import servers

from vllm_k80 import selftest
from vllm_k80.quantization.gguf_file import extract_metadata
from vllm_k80.serve import metadata_cache

pytestmark = pytest.mark.engine


ENGINE = "Engine core proc EngineCore_0 died unexpectedly"
WORKER = "Worker proc VllmWorker-1 died unexpectedly"


@pytest.mark.parametrize(
    ("dies", "told", "said", "status"),
    [("1", False, ENGINE, 1), ("1", True, ENGINE, 0), ("2", False, WORKER, 1)],
    ids=["one die", "one die, while it finishes its requests", "two dies"],
)
def test_an_engine_that_is_killed_takes_its_server_along(
    smollm2: Path, tmp_path: Path, dies: str, told: bool, said: str, status: int
) -> None:
    selftest.write_model(tmp_path)
    tokenizer = str(extract_metadata(smollm2, metadata_cache()))
    flags = ("--tokenizer", tokenizer, "--tensor-parallel-size", dies, "--max-num-seqs", "4")
    with servers.serving(tmp_path, tmp_path, *flags) as server:
        answer = server.stream([1, 2, 3], 100)
        next(answer)
        if told:
            server.process.send_signal(signal.SIGTERM)
        # The engine, or the last of its workers.
        family = psutil.Process(server.process.pid).children(recursive=True)
        os.kill(max(process.pid for process in family), signal.SIGKILL)
        began = time.monotonic()
        *_, last, done = answer
        assert done == "[DONE]"
        assert "EngineCore" in json.loads(last)["error"]["message"]
        assert server.process.wait(30) == status, server.log.read_text()
        assert time.monotonic() - began < 20
        assert said in server.log.read_text()
