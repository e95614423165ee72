"""``/asyncapi.json``: the WebSocket, described from the types that the relay decodes and that its tests check."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any, Final, get_args

import msgspec
from aiohttp import web

from handlers.context import Context
from handlers.http.examples import FRAMES, OPERATIONS
from handlers.http.openapi import plain_schema
from handlers.http.route import Caller, Route, json_text
from relay import __version__
from relay.wire import codec, errors
from relay.wire.errors import CODES, Close
from relay.wire.frames import MAX_OPERATIONS, AnyOperation
from relay.wire.server_frames import ITEMS, AnyServerFrame, Gone, StatusReply, Waiting

_SCHEMA: Final = "#/components/schemas/{name}"
REPLIES: Final[dict[str, tuple[str, ...]]] = {
    "send": ("stored", "error"),
    "ack": ("acked", "error"),
    "status": ("status", "error"),
    "read": ("done", "error"),
    "typing": ("error",),
    "presence": ("presence", "done", "error"),
    "ping": ("pong", "error"),
    "auth": ("welcome", "authed", "error"),
}
"""What answers an operation: by its ``ref``, or by ``conv`` and ``id``."""


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """The AsyncAPI 3.0 description. The relay is the application: it receives operations and sends frames."""
    asked = {_tag(kind): kind for kind in get_args(AnyOperation)}
    told = {_tag(kind): kind for kind in get_args(AnyServerFrame)}
    messages = {f"ask.{tag}": _message(kind, OPERATIONS.get(tag, ())) for tag, kind in asked.items()}
    messages |= {f"tell.{tag}": _message(kind, FRAMES.get(tag, ())) for tag, kind in told.items()}
    operations: dict[str, Any] = {}
    for tag, kind in asked.items():
        replies = [reply for reply in REPLIES[tag] if reply in told]
        operations[f"ask.{tag}"] = {
            "action": "receive",
            "channel": _CHANNEL,
            "summary": _summary(kind),
            "messages": [_on_channel(f"ask.{tag}")],
            "reply": {"channel": _CHANNEL, "messages": [_on_channel(f"tell.{reply}") for reply in replies]},
        }
    for tag, kind in told.items():
        operations[f"tell.{tag}"] = {
            "action": "send",
            "channel": _CHANNEL,
            "summary": _summary(kind),
            "messages": [_on_channel(f"tell.{tag}")],
        }
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Relay", "version": __version__, "description": _description()},
        "defaultContentType": "application/json",
        "servers": {
            "relay": {
                "host": "{host}",
                "protocol": "wss",
                "description": "`ws` where the relay is reached without TLS.",
                "variables": {"host": {"default": "localhost:8080", "description": "Name and port"}},
                "security": [{"$ref": "#/components/securitySchemes/token"}],
            }
        },
        "channels": {
            "socket": {
                "address": "/v1/ws",
                "title": "The WebSocket",
                "description": "Subprotocol `relay.v1`, echoed when offered. One connection a device.",
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
                "bindings": {
                    "ws": {
                        "method": "GET",
                        "headers": {
                            "type": "object",
                            "properties": {
                                "Authorization": {"type": "string", "examples": ["Bearer <access token>"]},
                                "Sec-WebSocket-Protocol": {"type": "string", "const": "relay.v1"},
                            },
                        },
                    }
                },
            }
        },
        "operations": operations,
        "components": {
            "messages": messages,
            "schemas": _schemas(list(asked.values()), list(told.values())),
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "On the upgrade request; or in an `auth` frame, the first on the connection.",
                }
            },
        },
        "x-close-codes": {str(close.code): close.reason for close in closes()},
        "x-error-codes": {
            code: {"retry": row.retry, "httpStatus": row.status} for code, row in CODES.items()
        },
    }


def closes() -> list[Close]:
    """Every way in which the relay closes a connection, by code."""
    found = [value for value in vars(errors).values() if isinstance(value, Close)]
    return sorted(found, key=lambda close: close.code)


async def asyncapi(_: Context, __: Caller, request: web.Request) -> web.Response:
    """The WebSocket's operations, frames, close codes and error codes, as AsyncAPI 3.0."""
    return json_text(_text())


@lru_cache(maxsize=1)
def _text() -> str:
    return codec.dumps(document())


def _schemas(asked: list[type[msgspec.Struct]], told: list[type[msgspec.Struct]]) -> dict[str, Any]:
    _, operations = msgspec.json.schema_components(asked, ref_template=_SCHEMA)
    _, frames = msgspec.json.schema_components([*told, *ITEMS], ref_template=_SCHEMA)
    frames = {name: _growing(plain_schema(schema)) for name, schema in frames.items()}
    frames[StatusReply.__name__]["properties"]["items"]["items"] = {
        "oneOf": [{"$ref": _SCHEMA.format(name=kind.__name__)} for kind in (Waiting, Gone)]
    }
    return {name: plain_schema(schema) for name, schema in operations.items()} | frames


def _growing(schema: dict[str, Any]) -> dict[str, Any]:
    """The relay refuses fields it does not know; a client ignores them."""
    return {name: value for name, value in schema.items() if name != "additionalProperties"}


def _message(kind: type[msgspec.Struct], examples: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": _tag(kind),
        "title": kind.__name__,
        "summary": _summary(kind),
        "contentType": "application/json",
        "payload": {"$ref": _SCHEMA.format(name=kind.__name__)},
    }
    if examples:
        found["examples"] = [{"payload": example} for example in examples]
    return found


def _tag(kind: type[msgspec.Struct]) -> str:
    return str(kind.__struct_config__.tag)


def _summary(kind: type[msgspec.Struct]) -> str:
    return " ".join((inspect.getdoc(kind) or kind.__name__).replace("``", "`").split())


def _on_channel(name: str) -> dict[str, str]:
    return {"$ref": f"#/channels/socket/messages/{name}"}


_CHANNEL: Final = {"$ref": "#/channels/socket"}


def _description() -> str:
    rows = "\n".join(f"| {close.code} | {close.reason} |" for close in closes())
    codes = "\n".join(
        f"| `{code}` | {'later' if row.retry else 'no'} | {row.status} |" for code, row in CODES.items()
    )
    return (
        "A store-and-forward chat relay; `/openapi.json` describes its HTTP side.\n\n"
        f"A frame, either way, is one operation or an array of up to {MAX_OPERATIONS}, as UTF-8 text. Operations of an "
        "array succeed or fail alone. Any operation may carry `ref`, which comes back in its reply or error. Times are "
        "milliseconds, `exp` and `ttl` seconds. The relay refuses fields it does not know; a client ignores fields, "
        "frames and kinds it does not know.\n\n"
        f"Close codes:\n\n| code | |\n|---|---|\n{rows}\n\n"
        f"Error codes:\n\n| code | the same again | over HTTP |\n|---|---|---|\n{codes}"
    )


ROUTE: Final = Route(
    "GET",
    "/asyncapi.json",
    asyncapi,
    "The description of the WebSocket",
    "documentation",
    {200: None},
    errors=("bad_request",),
    open=True,
)
