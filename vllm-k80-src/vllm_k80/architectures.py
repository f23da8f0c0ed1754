"""Every model architecture: proven here, not proven, or why it is refused and what to use instead.

The one place for all three. It needs neither torch nor vLLM, so that the command line answers at
once, and a controller without either can refuse a model before it is downloaded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

# Of ops/attention_reference.py, which imports torch: multiples of 8 up to this.
MAX_HEAD_SIZE = 256


class State(Enum):
    """What is known of an architecture."""

    PROVEN = "a test here compares its tokens with Hugging Face's"
    UNPROVEN = "decoders made of what the proven ones are made of; no test here runs them"
    REFUSED = "not served"


@dataclass(frozen=True)
class Architecture:
    """One architecture, under the name that ``architectures`` in a config.json has for it.

    ``what`` says which models it is of, or why it is refused; ``instead`` what to use then.
    """

    state: State
    what: str = ""
    instead: str = ""


_DENSE = "a dense decoder, such as a Llama, Qwen3 or Gemma 3 of text"
_TEXT_ONLY = "a model of text alone; many of these have such a sibling"

# Why, what instead, and of whom. vLLM 0.10.1.1 registers all of these but those of the last entry.
_REFUSED: tuple[tuple[str, str, str], ...] = (
    (
        "a mixture of experts: vLLM's operators for it are written in Triton, which has no target "
        "for the card",
        _DENSE,
        "ArcticForCausalLM BailingMoeForCausalLM DbrxForCausalLM DeepseekForCausalLM "
        "Dots1ForCausalLM Ernie4_5_MoeForCausalLM Glm4MoeForCausalLM GraniteMoeForCausalLM "
        "GraniteMoeSharedForCausalLM Grok1ModelForCausalLM HunYuanMoEV1ForCausalLM "
        "Llama4ForCausalLM MixtralForCausalLM OlmoeForCausalLM PhiMoEForCausalLM "
        "QuantMixtralForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM Step3TextForCausalLM",
    ),
    (
        "multi-head latent attention and a mixture of experts: there is no operator for either",
        "a dense decoder; a DeepSeek-R1-Distill is a Llama or Qwen2",
        "DeepseekV2ForCausalLM DeepseekV3ForCausalLM",
    ),
    (
        "attention sinks and a mixture of experts: there is no operator for either",
        _DENSE,
        "GptOssForCausalLM",
    ),
    (
        "state space layers (Mamba): vLLM's operators for them are written in Triton, which has no "
        "target for the card",
        _DENSE,
        "BambaForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM GraniteMoeHybridForCausalLM "
        "JambaForCausalLM JambaForSequenceClassification Mamba2ForCausalLM MambaForCausalLM "
        "NemotronHForCausalLM Phi4FlashForCausalLM Plamo2ForCausalLM Zamba2ForCausalLM",
    ),
    (
        "lightning attention, which is linear: vLLM's operators for it are written in Triton, "
        "which has no target for the card",
        _DENSE,
        "MiniMaxForCausalLM MiniMaxM1ForCausalLM MiniMaxText01ForCausalLM",
    ),
    (
        "a tower for images, sound or video: what prepares these is not installed, and in the 11 "
        "GiB of a die a tower would take the place of the cache",
        _TEXT_ONLY,
        "AriaForConditionalGeneration AyaVisionForConditionalGeneration "
        "Blip2ForConditionalGeneration ChameleonForConditionalGeneration "
        "Cohere2VisionForConditionalGeneration DeepseekVLV2ForCausalLM "
        "Emu3ForConditionalGeneration FuyuForCausalLM GLM4VForCausalLM "
        "Gemma3nForConditionalGeneration Glm4vForConditionalGeneration "
        "Glm4vMoeForConditionalGeneration GraniteSpeechForConditionalGeneration H2OVLChatModel "
        "HCXVisionForCausalLM Idefics3ForConditionalGeneration InternLM2VEForCausalLM "
        "InternS1ForConditionalGeneration InternVLChatModel JinaVLForRanking "
        "KeyeForConditionalGeneration KimiVLForConditionalGeneration "
        "Llama4ForConditionalGeneration Llama_Nemotron_Nano_VL LlavaForConditionalGeneration "
        "LlavaNextForConditionalGeneration LlavaNextVideoForConditionalGeneration "
        "LlavaOnevisionForConditionalGeneration MantisForConditionalGeneration MiniCPMO MiniCPMV "
        "MiniMaxVL01ForConditionalGeneration Mistral3ForConditionalGeneration MolmoForCausalLM "
        "NVLM_D Ovis PaliGemmaForConditionalGeneration Phi3VForCausalLM Phi4MMForCausalLM "
        "Phi4MultimodalForCausalLM PixtralForConditionalGeneration PrithviGeoSpatialMAE "
        "Qwen2AudioForConditionalGeneration Qwen2VLForConditionalGeneration "
        "Qwen2_5OmniForConditionalGeneration Qwen2_5OmniModel Qwen2_5_VLForConditionalGeneration "
        "QwenVLForConditionalGeneration SkyworkR1VChatModel SmolVLMForConditionalGeneration "
        "Step3VLForConditionalGeneration Tarsier2ForConditionalGeneration "
        "TarsierForConditionalGeneration TransformersForMultimodalLM UltravoxModel "
        "VoxtralForConditionalGeneration",
    ),
    (
        "a tower for images: what prepares these is not installed, and in the 11 GiB of a die a "
        "tower would take the place of the cache",
        "a Gemma3ForCausalLM, which has none",
        "Gemma3ForConditionalGeneration",
    ),
    (
        "cross attention from a decoder to an encoder: there is no operator for it",
        "a model with a decoder only",
        "BartForConditionalGeneration BartModel Florence2ForConditionalGeneration "
        "MBartForConditionalGeneration MllamaForConditionalGeneration "
        "WhisperForConditionalGeneration",
    ),
    (
        "an encoder, which generates nothing: there is no operator for attention to later tokens",
        "a model with a decoder",
        "BertForSequenceClassification BertModel GteModel GteNewModel "
        "ModernBertForSequenceClassification ModernBertModel NomicBertModel "
        "RobertaForMaskedLM RobertaForSequenceClassification RobertaModel "
        "XLMRobertaForSequenceClassification XLMRobertaModel",
    ),
    (
        "embeddings, scores or rewards: an instance proves that it is ready by generating, which "
        "these do not",
        "a model that generates, its architecture ends in ForCausalLM",
        "GPT2ForSequenceClassification Gemma2Model InternLM2ForRewardModel LlamaModel "
        "MistralModel Qwen2ForProcessRewardModel Qwen2ForRewardModel Qwen2Model TransformersModel",
    ),
    (
        "a draft for speculative decoding, whose sampler is written in Triton, which has no target "
        "for the card",
        "the model that it drafts for, without it",
        "DeepSeekMTPModel Eagle3LlamaForCausalLM EagleLlama4ForCausalLM EagleLlamaForCausalLM "
        "EagleMiniCPMForCausalLM Glm4MoeMTPModel MedusaModel MiMoMTPModel",
    ),
    (
        "vLLM 0.10.1.1 has it for its V0 engine only, which is not served",
        _DENSE,
        "BloomForCausalLM GritLM",
    ),
    (
        "Gated DeltaNet, which is linear attention written in Triton: there is no target for the "
        "card, and vLLM 0.10.1.1 does not know it",
        _DENSE,
        "Qwen3NextForCausalLM KimiLinearForCausalLM",
    ),
)

# What a test here compares with Hugging Face: architecture, and models of it.
_PROVEN = {
    "FalconForCausalLM": "Falcon 7B and 40B (rotary), Falcon RW (ALiBi)",
    "GPT2LMHeadModel": "GPT-2, DialoGPT",
    "GPTJForCausalLM": "GPT-J",
    "GPTNeoXForCausalLM": "Pythia, GPT-NeoX",
    "Gemma2ForCausalLM": "Gemma 2 (not with --dtype half: its values are too large for FP16)",
    "Gemma3ForCausalLM": "Gemma 3 of text",
    "GemmaForCausalLM": "Gemma",
    "GraniteForCausalLM": "Granite 3",
    "LlamaForCausalLM": "Llama 2, 3, 3.1 and 3.2, TinyLlama, SmolLM2",
    "MistralForCausalLM": "Mistral 7B, Mistral Nemo",
    "OPTForCausalLM": "OPT",
    "Phi3ForCausalLM": "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini, with their long contexts",
    "PhiForCausalLM": "Phi-1.5, Phi-2",
    "Qwen2ForCausalLM": "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
    "Qwen3ForCausalLM": "Qwen3",
    "SmolLM3ForCausalLM": "SmolLM3",
    "StableLmForCausalLM": "StableLM 3B, StableLM 2 1.6B",
}

_UNPROVEN = (
    "AquilaForCausalLM AquilaModel ArceeForCausalLM BaiChuanForCausalLM BaichuanForCausalLM "
    "ChatGLMForConditionalGeneration ChatGLMModel Cohere2ForCausalLM CohereForCausalLM "
    "DeciLMForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM ExaoneForCausalLM "
    "Fairseq2LlamaForCausalLM GPTBigCodeForCausalLM Gemma3nForCausalLM Glm4ForCausalLM "
    "GlmForCausalLM HunYuanDenseV1ForCausalLM InternLM2ForCausalLM InternLM3ForCausalLM "
    "InternLMForCausalLM JAISLMHeadModel LLaMAForCausalLM MPTForCausalLM MiMoForCausalLM "
    "MiniCPM3ForCausalLM MiniCPMForCausalLM MptForCausalLM NemotronForCausalLM "
    "Olmo2ForCausalLM OlmoForCausalLM OrionForCausalLM PersimmonForCausalLM QWenLMHeadModel "
    "RWForCausalLM SolarForCausalLM StableLMEpochForCausalLM Starcoder2ForCausalLM "
    "TeleChat2ForCausalLM TeleFLMForCausalLM TransformersForCausalLM XverseForCausalLM"
)


def _entries() -> Iterator[tuple[str, Architecture]]:
    for name, models in _PROVEN.items():
        yield name, Architecture(State.PROVEN, models)
    for name in _UNPROVEN.split():
        yield name, Architecture(State.UNPROVEN)
    for why, instead, names in _REFUSED:
        for name in names.split():
            yield name, Architecture(State.REFUSED, why, instead)


ARCHITECTURES: dict[str, Architecture] = dict(_entries())

# GGUF's name of an architecture, and Hugging Face's.
_GGUF_PROVEN = {
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
# llama.cpp's converter (convert_hf_to_gguf.py) changes their tensors: 1 is added to the weights of
# norms, query, key and value are put into another order, or matrices are transposed. vLLM 0.10.1.1
# takes the tensors for Hugging Face's, and would serve nonsense.
_GGUF_CHANGED = ("bloom", "falcon", "gemma2", "gemma3", "gpt2", "nemotron")

# Kinds of rope scaling that vLLM's decoders have a layer for; "su" is longrope's former name.
_ROPE_KINDS = ("default", "linear", "dynamic", "ntk", "yarn", "llama3", "longrope", "su")
_LAYER_KINDS = ("full_attention", "sliding_attention")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOWERS = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower")


def _name(config: Mapping[str, Any]) -> str | None:
    """The architecture that vLLM takes: the first that it knows."""
    names = [str(name) for name in config.get("architectures") or []]
    return next((name for name in names if name in ARCHITECTURES), names[0] if names else None)


def state(config: Mapping[str, Any]) -> State:
    """What is known of a model; config: its config.json."""
    if refusal(config):
        return State.REFUSED
    return ARCHITECTURES[str(_name(config))].state


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why a model is not served and what to use instead, in one sentence or two; None if it is.

    Its quantization is not judged here, `quantization.methods.checkpoint_refusal` does that.

    Args:
        config: the config.json of a Hugging Face checkpoint.
    """
    name = _name(config)
    if name is None:
        return (
            "config.json names no architecture. Add what the model's page says, for example "
            '"architectures": ["LlamaForCausalLM"].'
        )
    known = ARCHITECTURES.get(name)
    if known is None:
        return (
            f"Architecture {name} is unknown to vLLM 0.10.1.1, or generates nothing. "
            f"`vllm-k80 support` lists what is served."
        )
    if known.state is State.REFUSED:
        return f"Architecture {name} is not served on a K80 ({known.what}). Use {known.instead}."
    for check in (_tower, _experts, _attention, _head_size, _rope, _unread):
        if found := check(config):
            what, instead = found
            return f"{name} with {what} is not served on a K80. {instead}"
    return None


# Each returns what of a model is not served, and what to do instead; None if it finds nothing.
_Found = tuple[str, str] | None


def _tower(config: Mapping[str, Any]) -> _Found:
    for key in _TOWERS:
        if config.get(key):
            return f"a tower for images or sound ({key})", f"Use {_TEXT_ONLY}."
    return None


def _experts(config: Mapping[str, Any]) -> _Found:
    for key in _EXPERTS:
        value = config.get(key)
        if isinstance(value, list):  # a layer each
            value = max(value, default=0)
        if isinstance(value, int) and value > 1:
            return f"{value} experts ({key}), which need Triton,", f"Use {_DENSE}."
    return None


def _attention(config: Mapping[str, Any]) -> _Found:
    if config.get("is_causal") is False:
        return (
            "attention to later tokens (is_causal is false)",
            "Use a model that generates; this one makes embeddings.",
        )
    if config.get("dual_chunk_attention_config"):
        return (
            "dual chunk attention",
            "Take dual_chunk_attention_config out of its config.json: up to 262144 tokens, more "
            "than a die holds, the model is the same.",
        )
    others = sorted({str(kind) for kind in config.get("layer_types") or []} - {*_LAYER_KINDS})
    if others:
        return f"layers of {', '.join(others)} (layer_types)", f"Use {_DENSE}."
    return None


def _head_size(config: Mapping[str, Any]) -> _Found:
    def first(*keys: str) -> Any:
        return next((config[key] for key in keys if config.get(key) is not None), None)

    size = first("head_dim", "kv_channels")
    if size is None:
        hidden = first("hidden_size", "n_embd", "d_model")
        heads = first("num_attention_heads", "n_head", "n_heads")
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads <= 0:
            return None  # the model's own class says what is missing
        size = hidden // heads
    if not isinstance(size, int) or size % 8 or not 0 < size <= MAX_HEAD_SIZE:
        return (
            f"attention heads of size {size}",
            f"The operators take multiples of 8 up to {MAX_HEAD_SIZE}: use another size of the "
            f"model, or another model.",
        )
    return None


def _rope(config: Mapping[str, Any]) -> _Found:
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping):
        # Not of a decoder's: "mrope" places images, "deepseek_yarn" is for latent attention.
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind not in _ROPE_KINDS:
            return (
                f"rope scaling of kind {kind}",
                f"Use a model with another: {', '.join(_ROPE_KINDS[:-1])}.",
            )
    moved = config.get("rope_parameters")
    if isinstance(moved, Mapping):
        scaled = moved.get("rope_type", "default") != "default"
        if moved.get("rope_theta") != config.get("rope_theta") or (scaled and not scaling):
            # The installed transformers would take its default in their place, unsaid.
            return (
                "rope_parameters, in which transformers 5 has what was rope_theta and "
                "rope_scaling,",
                "Write these two into its config.json as before (theta, and the rest without it).",
            )
    return None


def _unread(config: Mapping[str, Any]) -> _Found:
    if str(_name(config)).startswith("StableL"):
        for key in ("qk_layernorm", "use_parallel_residual"):
            if config.get(key):
                # StableLM 2 12B. The answers would be nonsense.
                return f"{key}, which vLLM 0.10.1.1 does not read,", "Use StableLM 2 1.6B."
    return None


def gguf_refusal(fields: Mapping[str, Any]) -> str | None:
    """Why a GGUF file is not served and what to use instead; None if it is.

    Args:
        fields: the file's metadata.
    """
    architecture = str(fields.get("general.architecture"))
    if experts := fields.get(f"{architecture}.expert_count"):
        return (
            f"A mixture of {experts} experts, which need Triton, is not served on a K80. Use "
            f"{_DENSE}."
        )
    if architecture in _GGUF_PROVEN:
        return None
    why = "vLLM 0.10.1.1 or its transformers has no reader for it, or no operator runs it here"
    if architecture in _GGUF_CHANGED:
        why = "llama.cpp changes its tensors and vLLM 0.10.1.1 does not change them back"
    served = ", ".join(_GGUF_PROVEN)
    return (
        f"GGUF files of architecture {architecture} are not served ({why}). Use a file of one of "
        f"{served}, or a checkpoint in safetensors with --quantization k80-w4."
    )


def _block(names: Iterator[str] | list[str], width: int = 100) -> Iterator[str]:
    """Names, comma separated, in indented lines."""
    line = "  "
    for name in names:
        if len(line) + len(name) + 2 > width:
            yield line.rstrip()
            line = "  "
        line += f"{name}, "
    yield line.rstrip(", ")


def table() -> str:
    """`ARCHITECTURES` for a person to read."""
    lines = [f"Architectures proven ({State.PROVEN.value}):"]
    lines += [f"  {name:22} {models}" for name, models in _PROVEN.items()]
    lines += ["", f"Architectures not proven, served with a warning ({State.UNPROVEN.value}):"]
    lines += _block(_UNPROVEN.split())
    lines += ["", "Architectures refused:"]
    for why, instead, names in _REFUSED:
        lines += [f"  {why}. Use {instead}:", *(f"  {line}" for line in _block(names.split()))]
    lines += ["", "Architectures of GGUF files: " + ", ".join(_GGUF_PROVEN)]
    lines += ["  others are refused"]
    return "\n".join(lines)
