"""What is refused of requests before an engine sees it; tests/test_api.py asks a server."""

import json
from typing import Any

import pytest

from vllm_k80 import guards


class Guided:
    """As much of vLLM's GuidedDecodingParams as is looked at."""

    def __init__(self, **given: Any) -> None:
        for name in ("json", "regex", "choice", "grammar", "structural_tag"):
            setattr(self, name, given.get(name))


@pytest.mark.parametrize(
    ("pattern", "more"),
    [
        ("", 0),
        (r"\d{4}-\d{2}-\d{2}", 3 + 1 + 1),
        (r"[a-z]{1,64}@[a-z.]{2,}", 63 + 1),
        (r"[]a{9}]{3}", 2),
        (r"(ab){3}", 4),
        (r"((ab){3}c){5}", 4 + 4 * 7),
        (r"a{0}b{,3}\{9\}{", 0),
        (r"a)){7}", 6),
        ('root ::= ("a" | "b"){10}', 9 * 9),
    ],
)
def test_what_a_pattern_repeats_is_counted_as_if_written_out(pattern: str, more: int) -> None:
    assert guards.expansion("it", pattern) == more


@pytest.mark.parametrize(
    ("guided", "words"),
    [
        ({"regex": ""}, "guided_regex is empty"),
        ({"grammar": " "}, "guided_grammar is empty"),
        ({"json": ""}, "the JSON schema is empty"),
        ({"json": "{"}, "no JSON"),
        ({"json": "[" * 100_000}, "no JSON"),
        ({"json": json.dumps(json.dumps({"type": "object"}))}, "no JSON object"),
        ({"structural_tag": ""}, "structural_tag is empty"),
        ({"choice": ["a", ""]}, "an empty choice"),
        ({"json": {"properties": {"a": {"type": "string", "pattern": ""}}}}, "an empty pattern"),
        ({"json": {"items": [{"pattern": "a{1,100000}"}]}}, "repeats something 100000 times"),
        ({"json": {"type": "string", "maxLength": 20_000}}, "has the maxLength 20000"),
        ({"json": '{"type": "string", "minLength": 2000000000}'}, "has the minLength"),
        ({"json": {"anyOf": [{"maxItems": 900}] * 5}}, "more than 4000 longer"),
        ({"structural_tag": '{"structures": [{"schema": {"maxLength": 5000}}]}'}, "5000"),
        ({"regex": "a{50000000}"}, "repeats something 50000000 times"),
        ({"regex": "((a{100}){100}){100}"}, "more than 4000 longer"),
        ({"regex": "(" * 100_000 + ")" * 100_000}, "guided_regex is nested more than 100 deep"),
        ({"grammar": "root ::= " + "(" * 200 + "a" + ")" * 200}, "guided_grammar is nested"),
        ({"grammar": 'root ::= "[" [0-9]{0,100000} "]"'}, "repeats something 100000 times"),
        ({"grammar": 'root ::= ( "a" ")" [b]{500} ){500}'}, "more than 4000 longer"),
        ({"grammar": "# it's\nroot ::= [\"'#] [0-9]{1,5000} \"'\""}, "something 5000 times"),
        ({"grammar": 'start: /["\\/]{5000}/ "a"'}, "something 5000 times"),
    ],
)
def test_what_would_end_or_stop_a_server_is_refused(guided: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        guards.check_guided(Guided(**guided))


def test_a_schema_that_is_nested_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(101):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        guards.check_guided(Guided(json=schema))


@pytest.mark.parametrize(
    "guided",
    [
        {},
        {"json": {"type": "object", "properties": {"maxLength": {"maxLength": 1000}}}},
        {"json": {"properties": {"pattern": {"type": "string", "pattern": "^[a-z]{2,30}$"}}}},
        {"regex": r"((25[0-5]|(2[0-4]|1\d|[1-9]|)\d)(\.(?!$)|$)){4}"},
        {"choice": ["yes", "no"]},
        {"grammar": 'root ::= "(" [0-9]{1,3} ")"'},
        {"grammar": 'root ::= "{5000}" "\\"((((" [{90000}] # {70000}'},
        {"json": "true"},
    ],
)
def test_what_people_send_is_not_refused(guided: dict[str, Any]) -> None:
    guards.check_guided(Guided(**guided) if guided else None)


@pytest.mark.parametrize("token", [-1, 100, 2**40])
def test_tokens_are_the_model_s(token: int) -> None:
    guards.check_tokens("stop_token_ids", [0, 99], 100)
    with pytest.raises(ValueError, match=f"stop_token_ids: the model has no token {token}"):
        guards.check_tokens("stop_token_ids", [0, token], 100)


def test_a_request_asks_for_so_many_answers() -> None:
    guards.check_sequences(1024, None)
    guards.check_sequences(2, 512)
    with pytest.raises(ValueError, match="ask for 1026 answers; a request may have 1024"):
        guards.check_sequences(2, 513)


def test_a_chat_is_written_by_the_model_s_own_template() -> None:
    guards.check_template(None, {"enable_thinking": False})
    with pytest.raises(ValueError, match="cannot bring its own"):
        guards.check_template("{{ 1 }}", None)
    with pytest.raises(ValueError, match="has max_length, padding, which no template takes"):
        guards.check_template(None, {"padding": "max_length", "max_length": 9, "x": 1})
