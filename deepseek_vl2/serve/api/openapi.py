"""What the server tells about itself under ``/openapi.json``, beside what FastAPI finds out."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

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


def complete_page(app: FastAPI, kinds: list[type[BaseModel]]) -> None:
    """Complete an application's OpenAPI page by the schemas of the requests that the server reads by itself."""
    page = app.openapi()
    schemas = page.setdefault("components", {}).setdefault("schemas", {})
    for kind in kinds:
        schemas.update(kind.model_json_schema(ref_template=REFERENCES).get("$defs", {}))
    for path in page["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own validation error, which is never sent
    app.openapi_schema = page
