"""``/openapi.json``, made from the routes and their models."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import msgspec
from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from handlers.context import Context
from handlers.http.examples import CONVERSATION, OPERATIONS, REQUESTS, sample
from handlers.http.route import Caller, Route, json_text
from handlers.http.schemas.base import ErrorAnswer
from relay import __version__
from relay.wire import codec, ids
from relay.wire.errors import CODES, Code

_REFERENCE: Final = "#/components/schemas/{model}"

TAGS: Final[Mapping[str, str]] = {
    "accounts": "Register, log in, renew tokens; the devices of an account. For teams that have no accounts of their own.",
    "people": "One's own profile and preferences; finding others; push tokens.",
    "personal": "A person's data: export everything, erase everything.",
    "contacts": "People one knows, under names of one's own; blocking and reporting.",
    "conversations": "Direct conversations and groups, their members, and what each member keeps to themself.",
    "messages": "The WebSocket's duties over HTTP, for background tasks that get half a minute after a push.",
    "changes": "What changed while a device was away.",
    "keys": "The end-to-end key directory. The relay holds public keys only.",
    "operations": "For operators, and for clients that look before they connect.",
    "documentation": "These pages.",
}

_MESSAGES: Final[Mapping[Code, str]] = {
    "bad_request": "limit must be a number from 1 to 200",
    "unauthorized": "this needs a token: Authorization: Bearer <token>",
    "forbidden": "only admins and moderators can do this",
    "not_found": "no such conversation",
    "not_member": "no such conversation",
    "blocked": "you have blocked them",
    "id_conflict": "this id is another message's",
    "conflict": "this user name is taken",
    "resync": "this cursor is too old; fetch everything again",
    "too_large": "the request body is too large",
    "rate_limited": "too many requests; try again in 12 s",
    "mailbox_full": "the other side cannot take more now",
    "device_mismatch": "the recipient devices have changed; fetch them and seal again",
    "unavailable": "the store did not answer; try again",
    "internal": "something went wrong in the relay",
}
_RETRY_AFTER: Final = {
    "Retry-After": {
        "description": "Seconds to wait before the next attempt",
        "schema": {"type": "integer", "minimum": 1},
    }
}
_AUTHENTICATE: Final = {"WWW-Authenticate": {"schema": {"type": "string"}, "example": "Bearer"}}

# What stands before a parameter in the path says what it names.
_PLACES: Final[Mapping[str, tuple[str, str, str]]] = {
    "conversations": ("A conversation's id", ids.CONVERSATION_PATTERN, CONVERSATION),
    "users": ("A user id", ids.USER_PATTERN, "bob"),
    "members": ("The member's user id", ids.USER_PATTERN, "bob"),
    "contacts": ("The other's user id", ids.USER_PATTERN, "bob"),
    "devices": ("A device id of one's own", ids.DEVICE_PATTERN, "phone"),
    "media": ("An attachment's id", ids.MEDIA_PATTERN, "cGljdHVyZQ"),
}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 description of these routes."""
    shown = [route for route in routes if not route.hidden]
    schemas = _schemas(shown)
    paths: dict[str, Any] = {}
    for route in shown:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    used = {route.tag for route in shown}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Relay",
            "version": __version__,
            "description": "A store-and-forward chat relay. Messages travel over the WebSocket `/v1/ws`, which "
            "`/asyncapi.json` describes; this is the HTTP side.\n\nRequests with unknown fields are "
            "refused. Answers may grow: ignore fields you do not know. Times are integer milliseconds since the epoch. "
            "Absent and not yours look the same (404). Lists come in pages: pass `next` as `cursor` until it is null.\n\n"
            "To try it: register or log in below, copy the `accessToken` of the answer, press Authorize and paste it.",
        },
        "tags": [{"name": name, "description": text} for name, text in TAGS.items() if name in used],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "The `accessToken` of register or login, or a token of your own issuer.",
                }
            },
        },
        "security": [{"token": []}],
    }


def route_of(routes: Sequence[Route]) -> Route:
    """The endpoint that serves the description of all the others and itself."""

    @lru_cache(maxsize=1)
    def text() -> str:
        return codec.dumps(document([*routes, own]))

    async def openapi(_: Context, __: Caller, request: web.Request) -> web.Response:
        """The HTTP side, as OpenAPI 3.1. `/docs` shows it."""
        return json_text(text())

    own = Route(
        "GET",
        "/openapi.json",
        openapi,
        "This description",
        "documentation",
        {200: None},
        errors=("bad_request",),
        open=True,
    )
    return own


def plain_schema(value: Any) -> Any:
    """A schema of msgspec's in plain JSON Schema: its patterns know no ``\\Z``, and texts are Markdown."""
    if isinstance(value, dict):
        return {
            name: item.replace(r"\Z", "$")
            if name == "pattern"
            else _markdown(item)
            if name == "description" and isinstance(item, str)
            else plain_schema(item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [plain_schema(item) for item in value]
    return value


def codes_of(route: Route) -> list[Code]:
    """Every error code that the route may answer with."""
    found: dict[Code, None] = {}
    if not route.open:
        found["unauthorized"] = None
    if route.query:
        found["bad_request"] = None
    # Any route refuses query parameters that it does not know.
    found["bad_request"] = None
    if route.request is not None:
        found["too_large"] = None
    found |= dict.fromkeys(route.errors)
    if not route.open or route.request is not None:
        found |= {"unavailable": None, "internal": None}
    return list(found)


def _operation(route: Route, schemas: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": route.summary,
        "description": _text_of(route),
        "operationId": f"{route.method.lower()}{route.path.title()}".translate(_NO_SIGNS),
        "tags": [route.tag],
        "responses": {
            str(status): _response(route, status, model, schemas) for status, model in route.answers.items()
        },
    }
    if route.open:
        found["security"] = []
    parameters = [*_in_path(route.path), *(_in_query(name, schema) for name, schema in route.query.items())]
    if parameters:
        found["parameters"] = parameters
    if route.request is not None:
        name = route.request.__name__
        example = _example(route.request, schemas)
        found["requestBody"] = {
            "required": True,
            "description": "JSON, at most `limits.frame` bytes (see `/v1/info`).",
            "content": {"application/json": {"schema": _reference(name), "example": example}},
        }
    by_status: dict[int, list[Code]] = {}
    for code in codes_of(route):
        by_status.setdefault(CODES[code].status, []).append(code)
    for status, codes in sorted(by_status.items()):
        found["responses"].setdefault(str(status), _failure(status, codes))
    return found


def _example(request: type[BaseModel] | type[msgspec.Struct], schemas: Mapping[str, Any]) -> Any:
    if issubclass(request, msgspec.Struct):
        first = OPERATIONS[str(request.__struct_config__.tag)][0]
        return {name: value for name, value in first.items() if name not in ("t", "ref")}
    return REQUESTS.get(request.__name__) or sample(schemas[request.__name__], schemas)


def _text_of(route: Route) -> str:
    return _markdown(inspect.getdoc(route.handler) or route.summary)


def _markdown(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text.strip().replace("``", "`"))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _in_path(path: str) -> list[dict[str, Any]]:
    parts = path.split("/")
    found = []
    for before, part in pairwise(parts):
        if part.startswith("{"):
            text, pattern, example = _PLACES[before]
            found.append(
                {
                    "name": part[1:-1],
                    "in": "path",
                    "required": True,
                    "description": text,
                    "schema": {"type": "string", "pattern": f"^{pattern}$"},
                    "example": example,
                }
            )
    return found


def _in_query(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "in": "query"}
    own = dict(schema)
    if own.pop("required", False) is True:
        found["required"] = True
    description = own.pop("description", _PARAMETERS.get(name))
    if description:
        found["description"] = description
    return {**found, "schema": own}


def _failure(status: int, codes: Sequence[Code]) -> dict[str, Any]:
    named = {"properties": {"error": {"properties": {"code": {"enum": list(codes)}}}}}
    found: dict[str, Any] = {
        "description": ", ".join(f"`{code}`" for code in codes),
        "content": {
            "application/json": {
                "schema": {"allOf": [_reference(ErrorAnswer.__name__), named]},
                "examples": {
                    code: {"value": {"error": {"code": code, "message": _MESSAGES[code]}}} for code in codes
                },
            }
        },
    }
    if status in (429, 503):
        found["headers"] = _RETRY_AFTER
    if status == 401:
        found["headers"] = _AUTHENTICATE
    return found


def _response(
    route: Route, status: int, model: type[BaseModel] | None, schemas: Mapping[str, Any]
) -> dict[str, Any]:
    if status == 304:
        return {"description": "Nothing has changed since the `ETag` in `If-None-Match`."}
    if model is None:
        plain = route.media_type == "application/json"
        schema: dict[str, Any] = {"type": "object"} if plain else {"type": "string"}
        if not plain and not route.media_type.startswith("text/"):
            schema["format"] = "binary"
        return {"description": route.summary, "content": {route.media_type: {"schema": schema}}}
    return {
        "description": _markdown(model.__doc__ or route.summary),
        "content": {
            route.media_type: {
                "schema": _reference(model.__name__),
                "example": sample(schemas[model.__name__], schemas),
            }
        },
    }


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
    schemas: dict[str, Any] = plain_schema(found.get("$defs", {}))
    _, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    for name, schema in components.items():
        # Over HTTP the operation has no tag.
        schema.get("properties", {}).pop("t", None)
        if "t" in schema.get("required", ()):
            schema["required"].remove("t")
        schemas[name] = plain_schema(schema)
    return schemas


def _reference(name: str) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=name)}


_PARAMETERS: Final[Mapping[str, str]] = {
    "blocked": "`true`: those one has blocked, instead of one's contacts",
    "cursor": "`next` of the page before",
    "limit": "How many at most",
}
_NO_SIGNS: Final = str.maketrans("", "", "/{}.-_")
