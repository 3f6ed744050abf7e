"""What the server tells about itself under ``/openapi.json``, beside what FastAPI finds out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from .generation_fields import CHOICES_MARK, LENGTH_MARK, TEXT_MARK, TOKEN_MARK

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
OBJECT = {"type": "object"}
REFERENCES = "#/components/schemas/{model}"


def described(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return a response's entry in the OpenAPI page."""
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def error_entries(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the entries of errors in the OpenAPI page."""
    return {status: described("An error, in OpenAI's shape.", ERROR_SCHEMA) for status in statuses}


def request_entry(kind: type[BaseModel]) -> dict[str, Any]:
    """Return an operation's request body for the OpenAPI page; the server reads the body by itself."""
    schema = kind.model_json_schema(ref_template=REFERENCES)
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def read_responses(text: str) -> dict[int | str, dict[str, Any]]:
    """Return the responses of an operation that reads a body and answers at once."""
    return {200: described(text, OBJECT), **error_entries(400, 401, 403, 404, 408, 413, 415, 429, 503)}


def generation_responses(text: str) -> dict[int | str, dict[str, Any]]:
    """Return the responses of an operation that generates."""
    return {
        200: {
            "description": f"{text}: one object, or with stream a series of server-sent events.",
            "content": {"application/json": {"schema": OBJECT}, "text/event-stream": {}},
        },
        **error_entries(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504),
    }


@dataclass(frozen=True)
class PageLimits:
    """What the page says of the model that is served.

    Attributes:
        vocabulary: the number of its tokens.
        image_token_id: the token that no text has.
        max_length: tokens of a prompt and its answer.
        max_choices: answers to a request.
    """

    vocabulary: int
    image_token_id: int
    max_length: int
    max_choices: int

    def applied(self, schema: Any) -> Any:
        """Return a schema with these limits in place of their marks."""
        if isinstance(schema, list):
            return [self.applied(value) for value in schema]
        if not isinstance(schema, dict):
            return schema
        found = {name: self.applied(value) for name, value in schema.items()}
        token, of_text = found.pop(TOKEN_MARK, False), found.pop(TEXT_MARK, False)
        length, choices = found.pop(LENGTH_MARK, None), found.pop(CHOICES_MARK, False)
        if token and found.get("type") == "integer":
            del found["exclusiveMaximum"]
            found["maximum"] = self.vocabulary - 1
        elif token:
            found["pattern"] = numbers_up_to(self.vocabulary - 1)
        if of_text:
            found["not"] = {"const": self.image_token_id}
        if length is not None:
            found["maxItems"] = self.max_length + length
        if choices:
            found["maximum"] = self.max_choices
        return found


def numbers_up_to(most: int) -> str:
    """Return a regular expression of the whole numbers from 0 to one of them."""
    digits = str(most)
    found = ["0", *(f"[1-9][0-9]{{{rest}}}" for rest in range(len(digits) - 1)), digits]
    for place, digit in enumerate(map(int, digits)):
        least = 0 if place else 1
        if digit > least:
            found.append(f"{digits[:place]}[{least}-{digit - 1}][0-9]{{{len(digits) - 1 - place}}}")
    return f"^({'|'.join(found)})$"


def complete_page(app: FastAPI, kinds: list[type[BaseModel]], limits: PageLimits) -> None:
    """Complete an application's OpenAPI page by the schemas of the requests that the server reads by itself."""
    page = app.openapi()
    schemas = page.setdefault("components", {}).setdefault("schemas", {})
    for kind in kinds:
        schemas.update(kind.model_json_schema(ref_template=REFERENCES).get("$defs", {}))
    for path in page["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own validation error, which is never sent
    app.openapi_schema = limits.applied(page)
