"""What of a request is refused before it reaches an engine: what would end one, or hold it up.

vLLM 0.10.1.1 checks much, and takes the rest: its engines and its event loop have been ended by
empty grammars, by token ids that a model does not have, by patterns that are expanded before they
are looked at. Whoever has a key can send these, and a gateway sends what got no answer to the next
instance. All that is refused here is answered 400, with the reason.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

# Sequences of a request: its prompts, times n. vLLM makes all of them before the first answers.
MOST_SEQUENCES = 1024
# Of a pattern or a schema: how deep it is nested, to which xgrammar recurses (3,000 work); what one
# bound may be, and by how much all together expand it. Its work grows with the square: 1,000 take
# 0.15 s of the server's event loop, 2,000 0.6 s (2026-11-27, x86 server core).
MOST_NESTED, MOST_REPEATED, MOST_EXPANDED = 100, 1000, 4000

_BOUNDS = ("minLength", "maxLength", "minItems", "maxItems")
_REPEAT = re.compile(r"\{(\d+)(?:,(\d*))?\}")
# Of a grammar: comments, Lark's regular expressions, classes of characters, and literals.
_TOKENS = re.compile(
    r"""//[^\n]*|\#[^\n]*|/(?:\\.|[^/\\\n])+/|\[(?:\\.|[^\]\\])*\]
    |"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""",
    re.VERBOSE | re.DOTALL,
)
# What transformers' `apply_chat_template` takes that is not the template's own.
_NOT_THE_TEMPLATES = {
    *("chat_template", "conversation", "tokenize", "tokenizer_kwargs"),
    *("padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_tokens(name: str, tokens: Iterable[int], vocabulary: int) -> None:
    """See that a model has these tokens.

    Raises:
        ValueError: one is outside ``[0, vocabulary)``.
    """
    for token in tokens:
        _require(
            0 <= token < vocabulary,
            f"{name}: the model has no token {token}; it has 0 to {vocabulary - 1}.",
        )


def _pattern_of(grammar: str) -> str:
    """A grammar with a character for each literal and class, whose braces repeat nothing."""

    def shortened(token: re.Match[str]) -> str:
        text = token[0]
        if text.startswith(("//", "#")):
            return " "
        return text if text.startswith("/") else "x"

    return _TOKENS.sub(shortened, grammar)


def expansion(name: str, pattern: str) -> int:
    """How much longer a pattern is when what it repeats is written out, at most.

    Args:
        name: of the field. pattern: a regular expression, or the pattern of a grammar, whose
            groups and ``{m,n}`` are the same.

    Raises:
        ValueError: it repeats too often, or is nested too deep.
    """
    sizes, last, more, at = [0], 0, 0, 0
    while at < len(pattern):
        character = pattern[at]
        at += 1
        if character == "(":
            sizes.append(0)
            _require(
                len(sizes) <= MOST_NESTED + 1,
                f"{name} is nested more than {MOST_NESTED} deep.",
            )
            continue
        if character == "{" and (found := _REPEAT.match(pattern, at - 1)):
            times = max(int(number) for number in found.groups() if number)
            _require(
                times <= MOST_REPEATED,
                f"{name} repeats something {times} times; at most {MOST_REPEATED} are served.",
            )
            at, more = found.end(), more + last * max(times - 1, 0)
            sizes[-1] += last * max(times - 1, 0)
            last *= max(times, 1)
            _require_expansion(name, more)
            continue
        if character == ")" and len(sizes) > 1:
            last = sizes.pop()
        else:
            if character == "\\":
                at += 1
            elif character == "[" and (end := pattern.find("]", at + 1)) > 0:
                at = end + 1
            last = 1
        sizes[-1] += last
    return more


def _require_expansion(name: str, more: int) -> None:
    _require(
        more <= MOST_EXPANDED,
        f"the bounds of {name} together make it more than {MOST_EXPANDED} longer.",
    )


def check_schema(name: str, schema: Any) -> None:
    """See that a JSON schema can be made a grammar in little time.

    Args:
        name: of the field. schema: as JSON, or parsed.

    Raises:
        ValueError: it is empty, no JSON, nested too deep, or has an empty pattern or bounds that
            are too large.
    """
    if isinstance(schema, str):
        _require(bool(schema.strip()), f"{name} is empty.")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is no JSON: {error}.") from None
    # A string, as of a schema that was written as JSON twice, passes upstream and ends the engine.
    _require(isinstance(schema, (Mapping, bool)), f"{name} is no JSON object.")
    more = 0
    for key, value in _members(name, schema):
        if key == "pattern" and isinstance(value, str):
            _require(bool(value), f"{name} has an empty pattern.")
            more += expansion(f"a pattern of {name}", value)
        elif key in _BOUNDS and isinstance(value, int):
            _require(
                value <= MOST_REPEATED,
                f"{name} has the {key} {value}; at most {MOST_REPEATED} are served.",
            )
            more += value
    _require_expansion(name, more)


def _members(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """All keys of nested objects, with their values."""
    open_ = [(value, 0)]
    while open_:
        value, depth = open_.pop()
        _require(depth <= MOST_NESTED, f"{name} is nested more than {MOST_NESTED} deep.")
        if isinstance(value, Mapping):
            yield from value.items()
            open_ += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list):
            open_ += [(each, depth + 1) for each in value]


def check_guided(guided: Any) -> None:
    """See that what an answer is to be like can be made a grammar in little time.

    Args:
        guided: vLLM's ``GuidedDecodingParams``, or None.

    Raises:
        ValueError: the field's name, and what is wrong with it.
    """
    if guided is None:
        return
    for name in ("json", "structural_tag"):
        if (value := getattr(guided, name)) is not None:
            check_schema({"json": "the JSON schema"}.get(name, name), value)
    for name in ("regex", "grammar"):
        if (value := getattr(guided, name)) is not None:
            _require(bool(value.strip()), f"guided_{name} is empty.")
            expansion(f"guided_{name}", _pattern_of(value) if name == "grammar" else value)
    if isinstance(guided.choice, list):
        _require(all(guided.choice), "guided_choice has an empty choice.")


def check_sequences(prompts: int, n: int | None) -> None:
    """See that a request does not ask for too many answers.

    Raises:
        ValueError: it does.
    """
    asked = prompts * (n or 1)
    _require(
        asked <= MOST_SEQUENCES,
        f"n and the number of prompts ask for {asked} answers; a request may have "
        f"{MOST_SEQUENCES}.",
    )


def check_template(template: str | None, arguments: Mapping[str, Any] | None) -> None:
    """See that a chat is written by the server's own template.

    A template is a program, and runs where the server accepts requests.

    Raises:
        ValueError: it brings its own, or arguments that are not for a template.
    """
    _require(
        not template, "chat_template: a request cannot bring its own; the server has the model's."
    )
    others = sorted(_NOT_THE_TEMPLATES & set(arguments or ()))
    _require(not others, f"chat_template_kwargs has {', '.join(others)}, which no template takes.")


def _prompts(prompt: Any) -> int:
    """How many there are in the field of a completion: texts, lists of tokens, or one of these."""
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if several else 1


def _before(owner: Any, name: str, check: Callable[..., None]) -> None:
    """Call ``check`` with the arguments of a method before it."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def checked(*args: Any, **options: Any) -> Any:
        check(*args, **options)
        return method(*args, **options)

    setattr(owner, name, checked)


def install() -> None:
    """Put the checks before vLLM's own. Once, in the process that answers HTTP."""
    from vllm.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
    from vllm.entrypoints.openai.serving_engine import OpenAIServing
    from vllm.multimodal.image import ImageEmbeddingMediaIO
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.processor import Processor

    def params(processor: Any, params: Any, *_: Any, **__: Any) -> None:
        if not isinstance(params, SamplingParams):
            return
        check_guided(params.guided_decoding)
        _require(
            all(word.strip() for word in params.bad_words or ()), "bad_words has an empty word."
        )
        vocabulary = processor.model_config.get_vocab_size()
        for name in ("stop_token_ids", "allowed_token_ids"):
            check_tokens(name, getattr(params, name) or (), vocabulary)

    def prompt(processor: Any, inputs: Any, *_: Any, **__: Any) -> None:
        vocabulary = processor.model_config.get_vocab_size()
        check_tokens("prompt", inputs["prompt_token_ids"], vocabulary)

    def chat(_: Any, request: Any, *__: Any, **___: Any) -> None:
        check_template(
            getattr(request, "chat_template", None),
            getattr(request, "chat_template_kwargs", None),
        )

    def tensor(*_: Any, **__: Any) -> None:
        # torch 2.0.1 runs what some of its files hold, `weights_only` or not (CVE-2025-32434).
        raise ValueError("A prompt is text or tokens here; embeddings are not taken.")

    _before(Processor, "_validate_params", params)
    _before(Processor, "_validate_model_input", prompt)
    _before(OpenAIServing, "_preprocess_chat", chat)
    OpenAIServing._load_prompt_embeds = staticmethod(tensor)
    for name in ("load_bytes", "load_base64", "load_file"):
        setattr(ImageEmbeddingMediaIO, name, tensor)
    _before(
        CompletionRequest,
        "to_sampling_params",
        lambda request, *_, **__: check_sequences(_prompts(request.prompt), request.n),
    )
    _before(
        ChatCompletionRequest,
        "to_sampling_params",
        lambda request, *_, **__: check_sequences(1, request.n),
    )
