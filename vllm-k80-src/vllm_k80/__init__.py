"""vLLM on NVIDIA Tesla K80: an out-of-tree platform plugin for unmodified vLLM.

Importing this package costs nothing: it imports neither torch nor vLLM, so that
`vllm-k80 plan`-like commands run anywhere. The two functions below are the entry
points that vLLM calls.
"""

__version__ = "0.1.0"


def platform_plugin() -> str:
    """Entry point of group ``vllm.platform_plugins``: the platform class to use."""
    return "vllm_k80.platform.K80Platform"


def register() -> None:
    """Entry point of group ``vllm.general_plugins``: runs once in every vLLM process."""
    from vllm_k80 import integration

    integration.install()
