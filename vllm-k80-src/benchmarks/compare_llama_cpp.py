"""Our engine against llama.cpp: the same GGUF file, the same text, every position teacher-forced.

    python benchmarks/compare_llama_cpp.py MODEL.gguf --llama-python ~/llama/bin/python

llama-cpp-python compiles for a quarter of an hour and needs a numpy of its own, so it lives in an
environment of its own: `python3 -m venv ~/llama && ~/llama/bin/pip install llama-cpp-python`.

llama.cpp is an independent implementation with other arithmetic (on CPUs it rounds activations to
8 bits), so the two do not agree to the last digit; where both are right they take the same token
nearly always. Exit status 1: they agree less than the limits below.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIN_SAME_TOP1 = 0.95
MAX_PERPLEXITY_DIFFERENCE = 0.01

# What a side reports: the token at each place, the most probable one there, and the logarithm of
# the probability of the one that is there.
Side = dict[str, Any]


def ours(gguf: Path, text: str, positions: int) -> Side:
    """Score the text with vLLM and vllm_k80."""
    from vllm import LLM, SamplingParams

    from vllm_k80.quantization.gguf_file import extract_metadata
    from vllm_k80.serve import metadata_cache

    metadata = str(extract_metadata(gguf, metadata_cache()))
    length = positions + 1
    llm = LLM(
        model=str(gguf),
        tokenizer=metadata,
        hf_config_path=metadata,
        max_model_len=length + 1,
        max_num_seqs=1,
    )
    tokens = llm.get_tokenizer().encode(text)[:length]
    started = time.monotonic()
    (output,) = llm.generate(
        {"prompt_token_ids": tokens},
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1),
        use_tqdm=False,
    )
    seconds = time.monotonic() - started
    places = output.prompt_logprobs[1:]
    return {
        "tokens": tokens,
        "top1": [next(t for t, entry in place.items() if entry.rank == 1) for place in places],
        "logprob": [place[t].logprob for t, place in zip(tokens[1:], places, strict=True)],
        "seconds": seconds,
        "versions": {
            name: importlib.metadata.version(name) for name in ("vllm-k80", "vllm", "torch")
        },
    }


def llama_cpp(gguf: Path, text: str, positions: int) -> Side:
    """Score the text with llama.cpp."""
    import numpy as np
    from llama_cpp import Llama

    length = positions + 1
    model = Llama(str(gguf), n_ctx=length + 1, logits_all=True, verbose=False)
    tokens = model.tokenize(text.encode(), special=True)[:length]
    started = time.monotonic()
    model.eval(tokens)
    seconds = time.monotonic() - started
    logits = np.asarray(model.scores[:positions], dtype=np.float64)
    peak = logits.max(axis=1, keepdims=True)
    logprobs = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    return {
        "tokens": tokens,
        "top1": logits.argmax(axis=1).tolist(),
        "logprob": [float(logprobs[i, token]) for i, token in enumerate(tokens[1:])],
        "seconds": seconds,
        "versions": {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")},
    }


def run_side(name: str, python: str, arguments: argparse.Namespace) -> Side:
    command = [python, __file__, str(arguments.gguf), "--side", name]
    command += ["--text", str(arguments.text), "--positions", str(arguments.positions)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"The side {name} failed:\n{done.stderr}")
    side: Side = json.loads(done.stdout.splitlines()[-1])
    if len(side["top1"]) != arguments.positions:
        sys.exit(f"{arguments.text} has {len(side['top1'])} positions only; give a longer --text.")
    return side


def perplexity(side: Side) -> float:
    return math.exp(-sum(side["logprob"]) / len(side["logprob"]))


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(": ", 1)[1]
    return platform.machine()


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides' figures, and how far they agree."""
    our, their = (
        run_side("ours", sys.executable, arguments),
        run_side("llama_cpp", arguments.llama_python, arguments),
    )
    if our["tokens"] != their["tokens"]:
        pairs = enumerate(zip(our["tokens"], their["tokens"], strict=False))
        place = next(index for index, (mine, other) in pairs if mine != other)
        sys.exit(f"The tokenizers differ at token {place}: nothing else can be compared.")
    same = sum(a == b for a, b in zip(our["top1"], their["top1"], strict=True))
    ratio = perplexity(our) / perplexity(their)
    differences = [abs(a - b) for a, b in zip(our["logprob"], their["logprob"], strict=True)]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, no GPU",
        "versions": our["versions"] | their["versions"],
        "model": arguments.gguf.name,
        "text": arguments.text.name,
        "positions": arguments.positions,
        "same_top1": same / arguments.positions,
        "perplexity": {"vllm_k80": perplexity(our), "llama_cpp": perplexity(their)},
        "perplexity_difference": ratio - 1,
        "logprob_difference": {
            "mean": sum(differences) / len(differences),
            "max": max(differences),
        },
        "seconds": {"vllm_k80": our["seconds"], "llama_cpp": their["seconds"]},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python")
    parser.add_argument("--text", type=Path, default=Path("/usr/share/common-licenses/Apache-2.0"))
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="write the figures there, too")
    parser.add_argument("--side", choices=("ours", "llama_cpp"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = {"ours": ours, "llama_cpp": llama_cpp}[arguments.side]
        text = arguments.text.read_text()
        print(json.dumps(side(arguments.gguf, text, arguments.positions)))
        return 0
    if not arguments.llama_python:
        parser.error("--llama-python: name the interpreter that has llama-cpp-python")
    result = compare(arguments)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    agree = (
        result["same_top1"] >= MIN_SAME_TOP1
        and abs(result["perplexity_difference"]) <= MAX_PERPLEXITY_DIFFERENCE
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
