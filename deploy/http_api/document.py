"""Request bodies in the OpenAPI document, for endpoints that parse their bodies themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REFERENCE = "#/components/schemas/{model}"


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """An operation's `requestBody`, for `openapi_extra`."""
    schema = {"$ref": REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def add_schemas(api: FastAPI, *models: type[BaseModel]) -> None:
    """Add the schemas of `models` and of everything in them to the document of `api`."""
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REFERENCE)
    plain = api.openapi

    def document() -> dict[str, Any]:
        schema = plain()
        schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        return schema

    api.openapi = document  # type: ignore[method-assign]
