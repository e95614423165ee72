"""``/openapi.json``, made from the routes and their models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec
from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from handlers.context import Context
from handlers.http.route import Caller, Route, json_text
from handlers.http.schemas import ErrorAnswer
from relay import __version__
from relay.wire import codec
from relay.wire.errors import CODES

_REFERENCE: Final = "#/components/schemas/{model}"


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 description of these routes."""
    schemas = _schemas(routes)
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Relay",
            "version": __version__,
            "description": "A store-and-forward chat relay. Messages travel over the WebSocket `/v1/ws`; "
            "this is the HTTP side.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
        "security": [{"token": []}],
    }


def route_of(routes: Sequence[Route]) -> Route:
    """The endpoint that serves the description of all the others and itself."""

    @lru_cache(maxsize=1)
    def text() -> str:
        return codec.dumps(document([*routes, own]))

    async def openapi(_: Context, __: Caller, ___: web.Request) -> web.Response:
        return json_text(text())

    own = Route("GET", "/openapi.json", openapi, "This description", "operations", {200: None}, open=True)
    return own


def _operation(route: Route) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method.lower()}{route.path.title()}".translate(_NO_SIGNS),
        "tags": [route.tag],
        "responses": {str(status): _response(route, model) for status, model in route.answers.items()},
    }
    if route.open:
        found["security"] = []
    parameters: list[dict[str, Any]] = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string"}}
        for part in route.path.split("/")
        if part.startswith("{")
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in route.query.items()]
    if parameters:
        found["parameters"] = parameters
    if route.request is not None:
        found["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _reference(route.request.__name__)}},
        }
    codes = (
        route.errors
        if route.open
        else dict.fromkeys(("unauthorized", *route.errors, "unavailable", "internal"))
    )
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(CODES[code].status, []).append(code)
    for status, names in by_status.items():
        found["responses"].setdefault(
            str(status),
            {
                "description": ", ".join(f"`{name}`" for name in names),
                "content": {"application/json": {"schema": _reference(ErrorAnswer.__name__)}},
            },
        )
    return found


def _response(route: Route, model: type[BaseModel] | None) -> dict[str, Any]:
    schema = {} if model is None else _reference(model.__name__)
    if model is None and route.media_type != "application/json":
        schema = {"type": "string"}
    description = (model.__doc__ or route.summary) if model is not None else route.summary
    return {"description": description.strip(), "content": {route.media_type: {"schema": schema}}}


def _schemas(routes: Sequence[Route]) -> dict[str, Any]:
    models: dict[type[BaseModel], JsonSchemaMode] = {ErrorAnswer: "serialization"}
    structs: list[type[msgspec.Struct]] = []
    for route in routes:
        if route.request is not None:
            if issubclass(route.request, msgspec.Struct):
                structs.append(route.request)
            else:
                models[route.request] = "validation"
        for model in route.answers.values():
            if model is not None:
                models[model] = "serialization"
    _, found = models_json_schema(
        list(models.items()),
        ref_template=_REFERENCE,
    )
    schemas: dict[str, Any] = found.get("$defs", {})
    _, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    for name, schema in components.items():
        # Over HTTP the operation has no tag; JSON Schema's patterns know no \\Z.
        schema.get("properties", {}).pop("t", None)
        if "t" in schema.get("required", ()):
            schema["required"].remove("t")
        schemas[name] = _plain_patterns(schema)
    return schemas


def _plain_patterns(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: item.replace(r"\Z", "$") if name == "pattern" else _plain_patterns(item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_plain_patterns(item) for item in value]
    return value


def _reference(name: str) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=name)}


_NO_SIGNS: Final = str.maketrans("", "", "/{}.-_")
