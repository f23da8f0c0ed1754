"""``vllm-k80 selftest`` of the stand-in image."""

import os


def run() -> int:
    """Say whether the engine computes what it should; returns the exit status."""
    passed = os.environ.get("STAND_IN_FAULT") != "selftest"
    print(f"The tokens are {'as expected' if passed else 'not as expected'}.")
    return 0 if passed else 1
