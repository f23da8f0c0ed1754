"""What torch 2.0.1 lacks of the API that vLLM 0.10.1.1 and its dependencies name.

torch 2.0.1 is the last release whose PyPI wheel carries code for the K80. vLLM
0.10.1.1 was written against torch 2.7. The difference that matters for serving is
small, and every piece of it is one function in `torch20`, with the caller who needs it.
On torch 2.1 or newer `install` does nothing.
"""

from types import ModuleType


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def needs_completion(version: str) -> bool:
    """Whether the torch of this version string (``"2.0.1+cu117"``) lacks what vLLM names."""
    return _release(version) < (2, 1)


def install(torch: ModuleType) -> None:
    """Complete a just imported torch in place. Does nothing on torch >= 2.1."""
    if not needs_completion(torch.__version__):
        return
    from vllm_k80.compat import torch20

    for complete in torch20.PIECES:
        complete(torch)
