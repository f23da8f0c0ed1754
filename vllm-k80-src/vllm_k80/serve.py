"""``vllm-k80 serve``: vLLM's own server, told where things are and how ready it is."""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_k80 import architectures, guards, plan, readiness
from vllm_k80.errors import UserError
from vllm_k80.memory import Limits
from vllm_k80.model import read_config, read_json, told_beside
from vllm_k80.quantization import methods

# From the inside outwards.
MIDDLEWARE = (
    "vllm_k80.keys.NoWayAroundMiddleware",
    "vllm_k80.keys.SecondKeyMiddleware",
    "vllm_k80.readiness.ReadinessMiddleware",
    "vllm_k80.streams.FirstTokenMiddleware",
)


def metadata_cache() -> Path:
    """Where what GGUF files say is kept between starts.

    ``VLLM_K80_CACHE`` names it; without it, a directory of this user under the temporary one.
    """
    named = os.environ.get("VLLM_K80_CACHE")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"vllm-k80-{os.getuid()}"


def _check_model(model: str, flags: list[str]) -> None:
    """Refuse what the engine would refuse too, but later and among its own words.

    Args:
        model: directory of a checkpoint, or anything else, whose configuration is then unknown.
        flags: of ``vllm serve``.

    Raises:
        UserError: an architecture or a quantization that is not served, or one quantization on
            top of another.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--quantization", "-q")
    for flag in ("--hf-overrides", "--hf-config-path"):
        parser.add_argument(flag)
    given = parser.parse_known_args(flags)[0]
    asked = given.quantization
    if asked and (refusal := methods.refusal(asked.lower())):
        raise UserError(refusal)
    if not (Path(model) / "config.json").exists():
        return
    config = read_config(Path(model))
    # With these flags it is not this configuration that counts; the engine judges the one that is.
    if not (given.hf_overrides or given.hf_config_path) and (
        refusal := architectures.refusal(config)
    ):
        raise UserError(f"{model}: {refusal}")
    quantized = methods.quantization_of(config)
    if not quantized:
        return
    if refusal := methods.checkpoint_refusal(quantized):
        raise UserError(f"{model}: {refusal}")
    if asked and asked.startswith("k80-"):
        method = quantized.get("quant_method")
        raise UserError(f"{model} is quantized already, by {method}. Leave --quantization out.")


def _check_fit(model: str, flags: list[str]) -> None:
    """Refuse what a die has no room for in a sentence, before the engine's own words.

    What cannot be planned here is left to the engine, which takes its KV cache by the same account.

    Raises:
        UserError: it does not fit; with the nearest choice that does.
    """
    if not Path(model).exists():
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dtype", choices=("auto", "half", "float16", "float", "float32"))
    parser.add_argument("--quantization", "-q", choices=[*plan.WEIGHTS.values()])
    for flag in ("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float)
    # With these it is another account, or another model.
    others = ("--pipeline-parallel-size", "-pp", "--hf-overrides", "--hf-config-path", "--config")
    for flag in others:
        parser.add_argument(flag, dest="other")
    try:
        given = parser.parse_known_args(flags)[0]
    except argparse.ArgumentError:
        return
    if given.other is not None:
        return
    limits = Limits()
    settings = plan.Settings(
        context=given.max_model_len,
        dtype=given.dtype or "auto",
        weights={name: bits for bits, name in plan.WEIGHTS.items()}.get(given.quantization),
        dies=given.tensor_parallel_size,
        limits=Limits(
            utilization=given.gpu_memory_utilization or limits.utilization,
            tokens=given.max_num_batched_tokens or limits.tokens,
            sequences=given.max_num_seqs or limits.sequences,
        ),
    )
    try:
        source = plan.source(model)
        settings = plan.as_served(source, settings)
        reason = plan.lacking(source.model(settings), settings)
    except UserError:
        return
    if reason:
        advice = plan.advice(plan.nearest(source, settings))
        raise UserError(f"{model} does not fit: {reason}. {advice}")


def _hyphenated(flag: str) -> str:
    """A flag as it is documented: vLLM takes ``--max_model_len`` as well."""
    name = re.match(r"--[^=.]*", flag)
    return flag if name is None else name[0].replace("_", "-") + flag[name.end() :]


def server_arguments(model: str, rest: list[str]) -> list[str]:
    """Arguments of ``vllm serve`` for this model.

    Args:
        model: path of a GGUF file or checkpoint directory, or a name that vLLM resolves.
        rest: flags of ``vllm serve``; those given here win over what would be added.

    Raises:
        UserError: a path that does not exist, a checkpoint that cannot be served, or a key.
    """
    path = Path(model)
    rest = [_hyphenated(flag) for flag in rest]
    given = {flag.split("=")[0] for flag in rest}
    if "--api-key" in given:
        raise UserError(
            "--api-key: every user of this host could read it there, and not all paths would want "
            "it. Set VLLM_API_KEY instead."
        )
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--api-server-count", "-asc", default="1")
    if parser.parse_known_args(rest)[0].api_server_count != "1":
        raise UserError(
            "--api-server-count: one server is all that a die needs, and what guards its engine is "
            "in one only. Leave it out."
        )
    _check_model(model, rest)
    _check_fit(model, rest)
    arguments = ["serve", model, *rest]
    for middleware in MIDDLEWARE:
        arguments += ["--middleware", middleware]
    if "--guided-decoding-backend" not in given:
        # "auto" chooses by the first request of all, and checks later ones by another's rules.
        arguments += ["--guided-decoding-backend", "xgrammar"]
    if path.suffix == ".gguf":
        from vllm_k80.quantization.gguf_file import extract_metadata

        metadata = str(extract_metadata(path, metadata_cache()))
        for flag in ("--tokenizer", "--hf-config-path"):
            if flag not in given:
                arguments += [flag, metadata]
        if "--served-model-name" not in given:
            arguments += ["--served-model-name", path.stem]
    elif path.is_absolute() or model.startswith("."):
        if not path.is_dir():
            raise UserError(
                f"{model}: no such directory. Give a GGUF file or a checkpoint directory."
            )
        if not (path / "config.json").is_file():
            raise UserError(f"{model} has no config.json: it is not a Hugging Face checkpoint.")
    if (path / "config.json").is_file() and not given & {"--hf-overrides", "--hf-config-path"}:
        told = told_beside(path, read_json(path / "config.json"))
        # vLLM looks for such a file only when it is told the method.
        arguments += ["--hf-overrides", json.dumps(told)] if told else []
    return arguments


def served_names(arguments: list[str]) -> list[str]:
    """The names under which the server of these arguments serves its model.

    Args:
        arguments: of ``vllm``, from `server_arguments`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--served-model-name", nargs="+")
    return parser.parse_known_args(arguments)[0].served_model_name or [arguments[1]]


def _honour_bad_words() -> None:
    """Make /v1/completions take ``bad_words`` as /v1/chat/completions does.

    The engine knows them; upstream's completions ignore them in silence.
    """
    from vllm.entrypoints.openai.protocol import CompletionRequest

    upstream = CompletionRequest.to_sampling_params

    def to_sampling_params(self: Any, *args: Any, **options: Any) -> Any:
        params = upstream(self, *args, **options)
        words = (self.model_extra or {}).get("bad_words") or []
        if not isinstance(words, list) or not all(isinstance(w, str) and w for w in words):
            raise ValueError("bad_words is a list of strings, none of them empty.")
        params.bad_words = words
        return params

    CompletionRequest.to_sampling_params = to_sampling_params


def run(model: str, rest: list[str]) -> int:
    """Serve until told to stop.

    Returns:
        an exit status: 1 if the engine died.

    Raises:
        UserError: what cannot be served, or not here.
    """
    arguments = server_arguments(model, rest)
    # The platform refuses these too, but deep inside the engine.
    from vllm_k80.platform import HAS_GPU, K80Platform, check_gpu

    check_gpu()
    try:
        K80Platform.pre_register_and_update()
    except ValueError as error:
        raise UserError(str(error)) from None
    if not HAS_GPU:
        # Upstream's default is to import everything again for the engine, a third of a start.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    from vllm.entrypoints.cli.main import main as vllm

    from vllm_k80 import lifetime

    _honour_bad_words()
    guards.install()
    lifetime.install()
    os.environ[readiness.SERVED_NAMES] = json.dumps(served_names(arguments))
    sys.argv = ["vllm", *arguments]
    vllm()
    return int(lifetime.engine_died())
