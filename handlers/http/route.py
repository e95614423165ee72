"""What an HTTP endpoint is: its handler and everything its description needs, in one place."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web
from pydantic import BaseModel, ValidationError

from handlers.context import Context
from handlers.http.wording import said
from relay.wire import codec
from relay.wire.errors import Code, RelayError
from relay.wire.limits import Limit

Model = TypeVar("Model", bound=BaseModel)
BODY_SECONDS: Final = 30.0
"""How long a request body may be under way: who announces one and does not send it holds nothing for longer."""
UNCACHED: Final = {"Cache-Control": "no-store"}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, from where. ``user`` and ``device`` are empty on open routes, which need no token; ``session`` names the
    session when the relay itself issued the token."""

    user: str
    device: str
    session: str | None = None
    address: str = ""
    agent: str = ""


Handler = Callable[[Context, Caller, web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint. ``request`` and ``answers`` (by status) are pydantic models or msgspec structs; ``query`` names the
    query parameters with their JSON schemas. The handler's docstring is the long description, for clients to read. A
    ``hidden`` route is part of a page, not of the interface."""

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    answers: Mapping[int, type[BaseModel] | None]
    request: type[BaseModel] | type[msgspec.Struct] | None = None
    query: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    errors: tuple[Code, ...] = ()
    open: bool = False
    media_type: str = "application/json"
    hidden: bool = False


def json_text(text: str, status: int = 200) -> web.Response:
    """An answer that is encoded already. Tokens and what is personal stay in no cache on the way (RFC 6749, 5.1)."""
    return web.Response(text=text, status=status, content_type="application/json", headers=UNCACHED)


def answer(model: BaseModel, status: int = 200) -> web.Response:
    """An answer from its model, without absent fields."""
    return json_text(model.model_dump_json(by_alias=True), status)


async def body(request: web.Request) -> Any:
    """The parsed JSON body. Raises RelayError ``bad_request`` or ``too_large``."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            text = (await request.read()).decode()
    except TimeoutError:
        raise RelayError("bad_request", "the request body did not come in time") from None
    except UnicodeDecodeError:
        raise RelayError("bad_request", "the request body is not UTF-8") from None
    except web.HTTPRequestEntityTooLarge:
        raise RelayError("too_large", "the request body is too large", limit=Limit.REQUEST) from None
    except web.RequestPayloadError:
        raise RelayError("bad_request", "the request body is not encoded as its headers say") from None
    return codec.loads(text)


async def parsed(request: web.Request, model: type[Model]) -> Model:
    """The body as a model; unknown fields are refused. Raises RelayError."""
    value = await body(request)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        too_long = first["type"] == "too_long"
        place = ".".join(str(part) for part in first["loc"])[:80]
        # Names of unknown fields are as the client wrote them.
        place = "".join(sign if sign.isprintable() else "?" for sign in place)
        raise RelayError(
            "too_large" if too_long else "bad_request",
            f"{place}: {said(first)}" if place else f"the request body {said(first)}",
            limit=Limit.LIST if too_long else None,
        ) from None


def paging(most: int, default: int) -> dict[str, dict[str, Any]]:
    """The query parameters of a list, as they are described."""
    return {
        "cursor": {"type": "string", "description": "`next` of the page before"},
        "limit": {"type": "integer", "minimum": 1, "maximum": most, "default": default},
    }


def page_limit(request: web.Request, default: int, most: int) -> int:
    """The ``limit`` parameter. Raises RelayError."""
    text = request.query.get("limit")
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 6 or not 1 <= int(text) <= most:
        raise RelayError("bad_request", f"limit must be a number from 1 to {most}")
    return int(text)


def only(request: web.Request, *names: str) -> None:
    """Refuses query parameters that are unknown, or given twice. Raises RelayError."""
    given = set(request.query)
    unknown = sorted(given - set(names))
    if unknown:
        raise RelayError("bad_request", f"unknown parameter {unknown[0][:40]!r}")
    if len(request.query) > len(given):
        raise RelayError("bad_request", "a parameter is given twice")
