"""Answers in JSON: what comes out fits the schema, from a model of random bytes too."""

from __future__ import annotations

import json
import sys
from typing import Any

import jsonschema_rs
import pytest
from byte_models import byte_tokenizer
from servers import NAME, Served

from sq_cpu.errors import SqCpuError
from sq_cpu.serving.grammar import Grammar, Grammars
from sq_cpu.serving.protocol import JsonFormat, SchemaFormat

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,5}$"},
        "kind": {"enum": ["a", "b"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind", "flags"],
    "additionalProperties": False,
}


def test_a_schema(server: Served) -> None:
    pytest.importorskip("xgrammar")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    body: dict[str, Any] = {"model": NAME, "prompt": "a", "max_tokens": 900, "n": 4, "seed": 5}
    body |= {"response_format": form, "logit_bias": {"13": -100, "12": -100, "16": -100}}
    choices = server.post("/v1/completions", body).json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    for choice in choices:
        jsonschema_rs.validate(SCHEMA, json.loads(choice["text"]))
    assert len({choice["text"] for choice in choices}) > 1


def test_any_json(server: Served) -> None:
    pytest.importorskip("xgrammar")
    chat = {"model": NAME, "messages": [{"role": "user", "content": "a"}], "seed": 1}
    chat |= {"response_format": {"type": "json_object"}}
    choice = server.post("/v1/chat/completions", chat).json()["choices"][0]
    if choice["finish_reason"] == "stop":
        json.loads(choice["message"]["content"])
    assert choice["message"]["content"].lstrip()[:1] in '{["-0123456789tfn'


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "string", "maxLength": 5}, "maxLength"),
        ({"type": "object", "properties": {"a": {"not": {"const": 1}}}}, "not"),
        ({"$defs": {"a": {"type": "array", "uniqueItems": True}}, "$ref": "#/$defs/a"}, "unique"),
        ({"anyOf": [{"allOf": [{"type": "integer"}, {"minimum": 4}]}]}, "allOf"),
    ],
)
def test_what_xgrammar_would_drop(schema: dict[str, Any], keyword: str) -> None:
    pytest.importorskip("xgrammar")
    with pytest.raises(SqCpuError, match=f"{keyword}.* is not supported"):
        grammar_of(schema)


def test_what_only_has_such_a_name() -> None:
    pytest.importorskip("xgrammar")
    names = {"type": "object", "properties": {"not": {"const": {"if": 1}}, "contains": True}}
    grammar_of(names | {"allOf": [{"required": ["not"]}], "uniqueItems": False})


def grammar_of(schema: dict[str, Any]) -> Grammar:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return Grammars(byte_tokenizer(), 259, [2]).of(SchemaFormat.model_validate(form))()


def test_without_xgrammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    grammars = Grammars(byte_tokenizer(), 259, [2])
    with pytest.raises(SqCpuError, match=r"pip install 'sq_cpu\[grammar\]'"):
        grammars.of(JsonFormat(type="json_object"))


def test_without_a_stop_token() -> None:
    pytest.importorskip("xgrammar")
    with pytest.raises(SqCpuError, match="no stop token"):
        Grammars(byte_tokenizer(), 259, []).of(JsonFormat(type="json_object"))
