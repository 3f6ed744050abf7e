"""From the fields of a request to the grammar that its answer follows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark

from .generation_fields import GenerationFields, JsonObjectFormat, JsonSchemaFormat, StructuredOutputs, TextFormat
from .grammar_rules import Kind, check_length

# A line break and an indentation, but not blanks without end, which a model may fall into.
SPACED_JSON: dict[str, Any] = {"whitespace_flexible": True, "whitespace_pattern": r"\n?[ ]{0,40}"}
COMPACT_JSON: dict[str, Any] = {"whitespace_flexible": False}
# Where schemas stand in a schema: as values of a dict, alone, in a list.
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
SINGLE_SCHEMAS = ("items", "additionalProperties", "contains")
LISTED_SCHEMAS = ("prefixItems", "anyOf", "oneOf")


@dataclass(frozen=True)
class Grammar:
    """A grammar in one of the languages that can be compiled, and the field of the request that it came from."""

    kind: Kind
    text: str
    field: str


def json_rule(schema: Any, options: dict[str, Any], lenient: bool = False) -> str:
    """Return a JSON schema as a piece of a Lark grammar."""
    if schema is True:
        schema = {}
    if isinstance(schema, dict):  # the library's own options, which a request must not set
        schema = {**schema, "x-guidance": {**options, "lenient": lenient}}
    return f"%json {json.dumps(schema)}"


def json_grammar(schema: Any, field: str, options: dict[str, Any] | None = None) -> Grammar:
    """Return the grammar of JSON of a schema, without white space unless ``options`` allow it."""
    if options is None:
        return Grammar("json_schema", json.dumps(schema), field)
    return Grammar("lark", f"start: {json_rule(schema, options)}", field)


def closed(schema: Any) -> Any:
    """Return a schema whose objects have no properties but those that it names, where that can be said of it."""
    if '"allOf"' in json.dumps(schema):  # a part of it must leave room for what the other parts name
        return schema
    return _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    names = found.get("properties")
    mixed = isinstance(names, dict) and any(word in found for word in ("$ref", "anyOf", "oneOf", "if"))
    for word in NAMED_SCHEMAS:
        if isinstance(found.get(word), dict):
            found[word] = {name: _closed(value) for name, value in found[word].items()}
    for word in SINGLE_SCHEMAS:
        if word in found:
            found[word] = _closed(found[word])
    for word in LISTED_SCHEMAS:
        if isinstance(found.get(word), list) and not mixed:
            found[word] = [_closed(value) for value in found[word]]
    required = found.get("required", [])
    if isinstance(names, dict) and not mixed and isinstance(required, list) and set(map(str, required)) <= set(names):
        found.setdefault("additionalProperties", False)
    return found


def _schema_of(value: dict[str, Any] | str, field: str) -> Any:
    """Return a schema that may have come as text.

    Raises:
        ValueError: it is not JSON.
    """
    if not isinstance(value, str):
        return value
    check_length("json_schema", value)
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field} is not JSON: {error}") from error


def choice_grammar(choices: list[str], field: str) -> Grammar:
    """Return the grammar of an answer that is one of some texts."""
    return Grammar("lark", "start: " + " | ".join(json.dumps(text) for text in choices), field)


def context_free_grammar(text: str, field: str) -> Grammar:
    """Return the grammar of an answer that follows a grammar in Lark's or GBNF's notation.

    Raises:
        ValueError: it is neither.
    """
    check_length("lark", text)
    try:
        return Grammar("lark", any_to_lark(text), field)
    except (ValueError, RecursionError, IndexError, KeyError) as error:
        raise ValueError(f"{field} is neither a Lark nor a GBNF grammar: {error}") from error
    except Exception as error:  # the converter's own error derives from Exception alone
        raise ValueError(f"{field} is neither a Lark nor a GBNF grammar: {error}") from error


def json_options(request: GenerationFields, pattern: str | None = None, spaced: bool = False) -> dict[str, Any] | None:
    """Return the white space that JSON may have; ``None`` for none."""
    if pattern is not None:
        return {"whitespace_flexible": True, "whitespace_pattern": pattern}
    return SPACED_JSON if spaced or request.json_whitespace else None


def _structured(request: GenerationFields, asked: StructuredOutputs) -> Grammar:
    field = "structured_outputs"
    names = ("json_", "json_object", "regex", "choice", "grammar")
    given = [name for name in names if getattr(asked, name) not in (None, False)]
    if len(given) != 1:
        raise ValueError("structured_outputs needs exactly one of json, json_object, regex, choice and grammar")
    options = json_options(request, asked.whitespace_pattern, asked.disable_any_whitespace is False)
    if asked.json_ is not None:
        schema = _schema_of(asked.json_, f"{field}.json")
        return json_grammar(closed(schema) if asked.disable_additional_properties else schema, field, options)
    if asked.json_object:
        return json_grammar({"type": "object"}, field, options)
    if asked.regex is not None:
        return Grammar("regex", asked.regex, field)
    if asked.choice is not None:
        return choice_grammar(asked.choice, field)
    assert asked.grammar is not None
    return context_free_grammar(asked.grammar, field)


def format_schema(form: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Any:
    """Return the schema that a response format asks for; ``None`` for text."""
    if isinstance(form, JsonSchemaFormat):
        return form.json_schema.schema_
    return {"type": "object"} if isinstance(form, JsonObjectFormat) else None


def requested_grammar(request: GenerationFields) -> Grammar | None:
    """Return the grammar that a request's own fields ask for.

    Raises:
        ValueError: the field does not hold what its name says.
    """
    if request.structured_outputs is not None:
        return _structured(request, request.structured_outputs)
    if request.guided_json is not None:
        options = json_options(request, request.guided_whitespace_pattern)
        return json_grammar(_schema_of(request.guided_json, "guided_json"), "guided_json", options)
    for field in ("guided_regex", "regex"):
        if getattr(request, field) is not None:
            return Grammar("regex", getattr(request, field), field)
    if request.guided_choice is not None:
        return choice_grammar(request.guided_choice, "guided_choice")
    if request.guided_grammar is not None:
        return context_free_grammar(request.guided_grammar, "guided_grammar")
    return None
