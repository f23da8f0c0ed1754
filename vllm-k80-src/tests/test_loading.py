"""What loading costs: memory of the host, and time at the second start."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import cached_start

pytestmark = pytest.mark.engine

KINDS = ("k80-w4", "k80-f16", "awq")
# Embeddings and head, of 32,000 rows in FP16.
LARGEST_MB = cached_start.VOCABULARY * cached_start.HIDDEN * 2 / 2**20


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Three starts of each kind, with 0.17 billion weights in the layers."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cached_start, "LAYERS", 4)
    patch.setitem(cached_start.CONFIG, "num_hidden_layers", 4)
    found = {kind: cached_start.measure(kind, tmp_path_factory.mktemp("start")) for kind in KINDS}
    patch.undo()
    return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("k80-")])
def test_memory_stays_at_the_model_and_a_tensor_and_a_half(
    kind: str, starts: dict[str, dict[str, Any]]
) -> None:
    start = starts[kind]["without"]
    # Modules, buffers and freed pieces that the allocator keeps are the rest.
    assert start["peak_mb"] < start["model_mb"] + 1.5 * LARGEST_MB, start


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_start_is_three_times_as_fast(
    kind: str, starts: dict[str, dict[str, Any]]
) -> None:
    """Of the processor's seconds: what else runs here counts in the clock's."""
    first, second = starts[kind]["first"], starts[kind]["second"]
    assert 3 * second["cpu_s"] < first["cpu_s"], starts[kind]
