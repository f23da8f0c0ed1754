"""Every quantization method: whether it is served here, how, or why not and what to use instead.

The one place for both. It needs neither torch nor vLLM, so that the command line answers at once.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One method, under vLLM's name for it.

    ``instead`` is empty for a method that is served, and says what to use for one that is not.
    """

    what: str
    instead: str = ""

    @property
    def served(self) -> bool:
        return not self.instead


_4_BITS = "a GPTQ or AWQ checkpoint, a GGUF file (Q4_K_M, Q4_1), or --quantization k80-w4"
_8_BITS = "a GPTQ checkpoint of 8 bits, a GGUF file (Q8_0), or --quantization k80-w8"
_ORIGINAL = "the unquantized checkpoint with --quantization k80-w8 or k80-w4"
_DETECTED = "the same checkpoint without --quantization: it is detected"
_NO_FP8 = "8-bit floats: the card has neither their arithmetic nor a conversion"

METHODS: dict[str, Method] = {
    "gguf": Method(
        "GGUF files with tensors of Q4_0, Q4_1, Q4_K in 4 bits, of Q5_0, Q5_1, Q5_K, Q6_K, Q8_0 in "
        "8 bits, of F16, F32"
    ),
    "gptq": Method("GPTQ of 4 and 8 bits, symmetric or not, desc_act true or false"),
    "awq": Method("AWQ of 4 bits, GEMM packing, with zero points"),
    "compressed-tensors": Method("W4A16 and W8A16, format pack-quantized"),
    "k80-w4": Method(
        "FP32, FP16 and BF16 checkpoints, quantized to 4 bits as they are loaded: "
        "minimum and maximum of 128 columns; embeddings and head to 8 bits"
    ),
    "k80-w8": Method("the same to 8 bits, symmetric, for 128 columns"),
    "k80-f16": Method("the same to FP16, computed in FP32"),
    "awq_marlin": Method("AWQ for tensor cores", _DETECTED),
    "gptq_marlin": Method("GPTQ for tensor cores", _DETECTED),
    "gptq_bitblas": Method("GPTQ for BitBLAS, which compiles for newer cards only", _DETECTED),
    "marlin": Method("weights shuffled for tensor cores, which the card lacks", _4_BITS),
    "gptq_marlin_24": Method("2:4 sparse weights for tensor cores, which the card lacks", _4_BITS),
    "hqq": Method("its only operator here is Marlin's, for tensor cores", _4_BITS),
    "qqq": Method("8-bit activations for tensor cores, which the card lacks", _4_BITS),
    "bitblas": Method("BitBLAS compiles for newer cards only", _4_BITS),
    "fp8": Method(_NO_FP8, _8_BITS),
    "fbgemm_fp8": Method(_NO_FP8, _8_BITS),
    "ptpc_fp8": Method(_NO_FP8, _8_BITS),
    "modelopt": Method(_NO_FP8, _8_BITS),
    "deepspeedfp": Method("6- and 8-bit floats by DeepSpeed's operators, built for sm_80", _8_BITS),
    "modelopt_fp4": Method("NVFP4, 4-bit floats: there is no operator for them", _4_BITS),
    "mxfp4": Method("MXFP4, 4-bit floats, in mixtures of experts, which need Triton", _4_BITS),
    "quark": Method("FP8, INT8 activations or MXFP4, none of which the card computes", _8_BITS),
    "bitsandbytes": Method("its operators are built for sm_50 and newer", _ORIGINAL),
    "torchao": Method("needs a newer torch than the card's last, 2.0.1", _ORIGINAL),
    "auto-round": Method("its operators here are Marlin's and Triton's", _4_BITS),
    "inc": Method("Intel's quantization, for Gaudi", _8_BITS),
    "ipex": Method("Intel's operators, for CPU and XPU", _4_BITS),
    "rtn": Method("its operators dequantize into FP16 arithmetic", _ORIGINAL),
    "experts_int8": Method("mixtures of experts, which need Triton: no target for the card", "a "
                           "dense model"),
    "moe_wna16": Method("mixtures of experts, which need Triton: no target for the card", "a "
                        "dense model"),
    "tpu_int8": Method("for Google's TPUs", _ORIGINAL),
    "neuron_quant": Method("for AWS's Neuron", _ORIGINAL),
}  # fmt: skip


def refusal(method: str) -> str | None:
    """Why a method, by vLLM's name, is not served and what to use instead; None if it is."""
    known = METHODS.get(method)
    if known is None:
        return (
            f"Quantization {method or '(unnamed)'} is unknown here. Use {_4_BITS}; `vllm-k80 "
            f"support` lists what is served."
        )
    if known.served:
        return None
    return f"Quantization {method} is not served on a K80 ({known.what}). Use {known.instead}."


def _gptq_refusal(config: Mapping[str, Any]) -> str | None:
    if config.get("bits") not in (4, 8):
        return f"GPTQ of {config.get('bits')} bits is not served, 4 and 8 are. Use {_4_BITS}."
    packing = config.get("checkpoint_format") or "gptq"
    if config.get("is_marlin_format") or packing not in ("gptq", "gptq_v2"):
        return f"GPTQ checkpoints packed for {packing} are not served. Use {_4_BITS}."
    return None


def _awq_refusal(config: Mapping[str, Any]) -> str | None:
    bits = config.get("w_bit", config.get("bits"))
    if bits != 4:
        return f"AWQ of {bits} bits is not served, 4 are. Use {_8_BITS}."
    if not config.get("zero_point"):
        return f"AWQ without zero points is not served. Use {_4_BITS}."
    version = str(config.get("version") or "gemm").lower()
    if version != "gemm":
        return f"AWQ packed for {version} is not served, gemm is. Use {_4_BITS}."
    return None


def _compressed_refusal(config: Mapping[str, Any]) -> str | None:
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        return f"compressed-tensors with sparse weights is not served. Use {_4_BITS}."
    for group in (config.get("config_groups") or {}).values():
        weights, packing = group.get("weights") or {}, group.get("format") or config.get("format")
        kind, bits = weights.get("type", "int"), weights.get("num_bits")
        strategy = weights.get("strategy")
        if group.get("input_activations"):
            return (
                f"compressed-tensors with quantized activations ({kind}, {packing}) is not served: "
                f"the card computes in FP32 only. Use a W4A16 or W8A16 checkpoint, or {_ORIGINAL}."
            )
        if (
            packing != "pack-quantized"
            or kind != "int"
            or bits not in (4, 8)
            or strategy not in ("group", "channel")
        ):
            return (
                f"compressed-tensors with weights of {bits} bits ({kind}, {strategy}, {packing}) "
                f"is not served; W4A16 and W8A16 of format pack-quantized, a group or a channel "
                f"a scale, are. Use one of these, or {_ORIGINAL}."
            )
    return None


# Where quantizers wrote what config.json lacks: AutoGPTQ, AutoAWQ, NVIDIA's ModelOpt.
SIDECARS = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of a checkpoint's quantization, empty if nothing."""
    told = config.get("quantization_config") or config.get("compression_config") or {}
    return dict(told) if isinstance(told, Mapping) else {"quant_method": str(told)}


def sidecar(config: Mapping[str, Any], files: Collection[str]) -> str:
    """Which of a checkpoint's files tells of a quantization that config.json lacks, "" if none."""
    return "" if quantization_of(config) else next((name for name in SIDECARS if name in files), "")


def of_sidecar(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A file of `SIDECARS` as config.json would have it."""
    own = content.get("quantization")  # ModelOpt's
    found = dict(own if isinstance(own, Mapping) else content)
    return {"quantization_config": {"quant_method": SIDECARS[name]} | found}


_DETAILS = {
    "gptq": _gptq_refusal,
    "awq": _awq_refusal,
    "compressed-tensors": _compressed_refusal,
}


def checkpoint_refusal(config: Mapping[str, Any]) -> str | None:
    """Why a checkpoint cannot be served and what to use instead; None if its format can be.

    Args:
        config: ``quantization_config`` of its config.json.
    """
    method = str(config.get("quant_method") or "").lower().replace("_tensors", "-tensors")
    if config.get("is_marlin_format"):
        method = "marlin"
    # Its older releases wrote no name.
    if not method and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    # One name for both; which it is, vLLM sees by this too.
    if method == "modelopt" and "FP4" in str(config.get("quant_algo")).upper():
        method = "modelopt_fp4"
    details = _DETAILS.get(method)
    return refusal(method) or (details(config) if details else None)


def table() -> str:
    """`METHODS` for a person to read."""
    lines = []
    for served, title in ((True, "Quantizations served:"), (False, "Quantizations refused:")):
        lines.append(title)
        for name, method in METHODS.items():
            if method.served is served:
                use = f". Use {method.instead}" if method.instead else ""
                lines.append(f"  {name:20}{method.what}{use}.")
    return "\n".join(lines)
