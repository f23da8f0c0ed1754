"""The out-of-tree platform that vLLM asks what this hardware is and can do."""

import os
from typing import TYPE_CHECKING, Any

import psutil
import torch
from vllm.logger import init_logger
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

from vllm_k80 import architectures, device
from vllm_k80.errors import UserError
from vllm_k80.quantization import methods

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.k80.platform")

HAS_GPU = torch.cuda.is_available()
_DEVICE_TYPE = "cuda" if HAS_GPU else "cpu"

# The reference on a CPU must not grow to a die's 11 GB unasked.
_DEFAULT_CPU_KV_GIB = 1.0


def cpu_kv_cache_limit() -> int:
    """Bytes the KV cache may take where there is no GPU (``VLLM_CPU_KVCACHE_SPACE``, GiB)."""
    return int(float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", _DEFAULT_CPU_KV_GIB)) * 1024**3)


class K80Platform(Platform):
    """A K80 die, or, on a host without a GPU, a CPU that computes what a die would.

    Without a GPU it still reports capability 3.7, so that every decision that depends on the
    card is taken as on the card.
    """

    _enum = PlatformEnum.OOT
    device_name = _DEVICE_TYPE
    device_type = _DEVICE_TYPE
    dispatch_key = _DEVICE_TYPE.upper()
    ray_device_key = "GPU"
    device_control_env_var = "CUDA_VISIBLE_DEVICES"
    dist_backend = "nccl" if HAS_GPU else "gloo"
    simple_compile_backend = "eager"

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        if not HAS_GPU:
            return DeviceCapability(*device.K80)
        return DeviceCapability(*torch.cuda.get_device_capability(device_id))

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        names = device.dtype_names(device.Capability(*self.get_device_capability()))
        return [getattr(torch, name) for name in names]

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return torch.cuda.get_device_name(device_id) if HAS_GPU else f"{device.K80_NAME} (CPU)"

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:
        return os.environ.get("NVIDIA_VISIBLE_DEVICES", "")

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        if not HAS_GPU:
            return device.K80_MEMORY
        return int(torch.cuda.get_device_properties(device_id).total_memory)

    @classmethod
    def get_current_memory_usage(cls, device: Any = None) -> float:
        if not HAS_GPU:
            return float(psutil.Process().memory_info().rss)
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.max_memory_allocated(device))

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        if HAS_GPU:
            torch.cuda.set_device(device)

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return bool(HAS_GPU)

    @classmethod
    def is_async_output_supported(cls, enforce_eager: bool | None) -> bool:
        return False

    @classmethod
    def supports_v1(cls, model_config: "ModelConfig") -> bool:
        return True

    @classmethod
    def use_all_gather(cls) -> bool:
        return True

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        if HAS_GPU:
            # The only one whose sums CUDA graphs may contain.
            return "vllm.distributed.device_communicators.cuda_communicator.CudaCommunicator"
        return "vllm_k80.communicator.GlooCommunicator"

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: Any,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int,
        use_v1: bool,
        use_mla: bool,
        has_sink: bool = False,
    ) -> str:
        _refuse_backend(getattr(selected_backend, "name", None))
        if use_mla:
            raise ValueError(
                "Multi-head latent attention (DeepSeek V2 and V3) is not served on a K80: there is "
                "no operator for it. Choose a model with grouped-query attention."
            )
        if has_sink:
            raise ValueError(
                "Attention sinks (gpt-oss) are not served on a K80: there is no operator for them."
            )
        return "vllm_k80.attention.K80AttentionBackend"

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        """Refuse a quantization that is not served, with the reason and what to use instead."""
        if refusal := methods.refusal(quant):
            raise ValueError(refusal)

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        """Refuse, before anything is loaded, settings of the environment that cannot work."""
        if os.environ.get("VLLM_USE_V1") == "0":
            raise ValueError(
                "VLLM_USE_V1=0 asks for vLLM's V0 engine, which is not supported here. Unset it."
            )
        backend = os.environ.get("VLLM_ATTENTION_BACKEND")
        _refuse_backend(backend)
        if backend == "XFORMERS":
            # V1 knows the backend under this name only, and would fall back to V0.
            os.environ["VLLM_ATTENTION_BACKEND"] = "XFORMERS_VLLM_V1"

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Nothing compiled, our workers; called by vLLM once its configuration is complete."""
        from vllm.config import CompilationLevel

        from vllm_k80 import graphs

        cls.pre_register_and_update()
        compilation = vllm_config.compilation_config
        compilation.level = CompilationLevel.NO_COMPILATION
        compilation.use_cudagraph = False
        compilation.custom_ops = ["all"]
        graphs.configure(vllm_config, HAS_GPU)

        if vllm_config.model_config is not None:
            check_architecture(vllm_config.model_config.hf_config)
            vllm_config.model_config.disable_cascade_attn = True
            if vllm_config.model_config.dtype == torch.bfloat16:
                raise ValueError(
                    "--dtype bfloat16: a K80 has no BF16. Use --dtype auto, which converts a BF16 "
                    "checkpoint to FP32, or --dtype half."
                )
        if vllm_config.cache_config is not None and vllm_config.cache_config.block_size is None:
            vllm_config.cache_config.block_size = 16

        parallel = vllm_config.parallel_config
        parallel.disable_custom_all_reduce = True
        if parallel.worker_cls == "auto":
            parallel.worker_cls = f"vllm_k80.worker.{'K80Worker' if HAS_GPU else 'ReferenceWorker'}"
        if parallel.distributed_executor_backend == "mp":
            from vllm_k80.executor import K80Executor

            parallel.distributed_executor_backend = K80Executor
        if HAS_GPU:
            # To ask for a device, as above, initializes the driver, and a fork inherits it broken.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"


def check_gpu() -> None:
    """Refuse to compute on the CPU where a die is what was meant.

    Raises:
        UserError: ``VLLM_K80_REQUIRE_GPU`` is 1, and CUDA finds no device.
    """
    if os.environ.get("VLLM_K80_REQUIRE_GPU") == "1" and not HAS_GPU:
        raise UserError(
            "CUDA finds no device here, and VLLM_K80_REQUIRE_GPU=1 forbids to compute on the CPU "
            "instead. See that `nvidia-smi` lists the die and that /dev/nvidia-uvm is there "
            "(`nvidia-modprobe -u -c=0` makes it), then start again."
        )


def check_architecture(config: Any) -> None:
    """Refuse a model that is not served, and say of one that no test here runs that it is so.

    Args:
        config: transformers' configuration, with the user's overrides.
    """
    settings = config.to_dict()
    if refusal := architectures.refusal(settings):
        raise ValueError(refusal)
    if architectures.state(settings) is architectures.State.UNPROVEN:
        logger.warning_once(
            "Architecture %s should be served rightly, but no test has proven it on a K80's "
            "operators. Compare its answers with another engine's before you rely on them.",
            config.architectures[0],
        )


def _refuse_backend(name: str | None) -> None:
    capability = device.Capability(*K80Platform.get_device_capability())
    if refusal := device.backend_refusal(capability, name):
        raise ValueError(refusal)
