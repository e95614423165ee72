"""The HTTP application: routes, authentication, and errors as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Final, cast

import structlog
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from handlers.context import Context
from handlers.http.route import UNCACHED, Caller, Route, only
from relay.session.addresses import Addresses, agent_of
from relay.session.admission import Admission, bearer
from relay.session.gateway import Gateway
from relay.session.turns import Turns
from relay.store.batcher import BatcherClosed
from relay.store.mongo import PyMongoError, brief
from relay.wire import codec
from relay.wire.errors import CODES, Code, RelayError

log = structlog.get_logger(__name__)

FIRST_REQUEST_SECONDS: Final = 30.0
"""How long a connection may take until its first request is there, headers and all."""
# Bytes: who sends more than that at once has come for something else than to connect, and is read at once.
_MOST_HELD: Final = 65_536
_CODE_OF_STATUS: dict[int, Code] = {
    400: "bad_request",
    404: "not_found",
    405: "bad_request",
    413: "too_large",
    429: "rate_limited",
    503: "unavailable",
}


def application(
    ctx: Context,
    admission: Admission,
    gateway: Gateway,
    routes: Sequence[Route],
    *,
    max_body: int,
    addresses: Addresses,
) -> web.Application:
    """The aiohttp application of one node."""
    app = web.Application(middlewares=[_errors], client_max_size=max_body, handler_args={"access_log": None})
    app.router.add_get("/v1/ws", gateway.handle)
    for route in routes:
        app.router.add_route(route.method, route.path, _serve(ctx, admission, addresses, route))
    return app


def _serve(
    ctx: Context, admission: Admission, addresses: Addresses, route: Route
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def serve(request: web.Request) -> web.StreamResponse:
        caller = Caller("", "", address=addresses.of(request), agent=agent_of(request))
        if not route.open:
            token = bearer(request.headers.get("Authorization"))
            if token is None:
                raise RelayError("unauthorized", "this needs a token: Authorization: Bearer <token>")
            identity = await admission.admit(token, address=caller.address, agent=caller.agent)
            caller = replace(caller, user=identity.user, device=identity.device, session=identity.session)
        only(request, *route.query)
        try:
            return await route.handler(ctx, caller, request)
        except RelayError as error:
            ctx.metrics.reached(error.limit)
            raise

    return serve


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except RelayError as error:
        response = _failure(error)
        if request.content.exception() is not None:
            # What follows on this connection cannot be read.
            response.force_close()
        return response
    except BatcherClosed:
        return _failure(RelayError("unavailable", "the relay is stopping; try again", retry_after=1000))
    except PyMongoError as error:
        log.warning(
            "store did not answer",
            path=getattr(request.match_info.route.resource, "canonical", ""),
            error=brief(error),
        )
        return _failure(RelayError("unavailable", "the store did not answer; try again", retry_after=1000))
    except web.HTTPException as error:
        code = _CODE_OF_STATUS.get(error.status)
        if code is None:
            raise
        text = error.text or error.reason
        if error.status == 404:
            text = "there is nothing at this path; /docs lists what there is"
        elif isinstance(error, web.HTTPMethodNotAllowed):
            text = f"this path takes {', '.join(sorted(error.allowed_methods))} only"
        return _failure(RelayError(code, text), status=error.status, headers=error.headers)
    except ConnectionError:
        raise
    except Exception:
        log.exception("request failed", method=request.method)
        return _failure(RelayError("internal", "something went wrong in the relay"))


class Runner(web.AppRunner):
    """Runs the application. What cannot be read as HTTP is answered as an error like any other, and hung up on. ``others`` says
    whether anybody's messages are under way: they go before new connections."""

    def __init__(self, app: web.Application, *, others: Callable[[], bool], **options: Any) -> None:
        super().__init__(app, **options)
        self._others = others

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server
        # Made by aiohttp as one of its own.
        cast(_Server, server).turns = Turns(others=self._others)
        return server


class _Server(web.Server):
    turns: Turns

    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, self.turns, loop=self._loop, **self._kwargs)


class _Protocol(web.RequestHandler):
    """Reads its first request when it is its turn: thousands may come at the same moment."""

    __slots__ = ("_first", "_held", "_silence", "_turns")

    def __init__(self, server: web.Server, turns: Turns, **options: Any) -> None:
        super().__init__(server, **options)
        self._turns = turns
        self._first = True
        # What has come before its turn.
        self._held: list[bytes] | None = None

    def data_received(self, data: bytes) -> None:
        if self._first:
            self._first = False
            if not self._turns.free():
                self._held = []
                self._turns.later(self._begin)
        if self._held is None:
            super().data_received(data)
            return
        self._held.append(data)
        if sum(map(len, self._held)) > _MOST_HELD:
            self._begin()

    def _begin(self) -> bool:
        held, self._held = self._held, None
        if held is None or self.transport is None or self.transport.is_closing():
            return False
        super().data_received(b"".join(held))
        return True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._silence = asyncio.get_running_loop().call_later(FIRST_REQUEST_SECONDS, self._give_up)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._silence.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        # Between requests aiohttp's own limit holds.
        if self._request_count == 0:
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        # It may raise instead, and closes the connection.
        super().handle_error(request, status, exc, message)
        if status >= 500:
            error = RelayError("internal", "something went wrong in the relay")
        elif isinstance(exc, LineTooLong):
            error = RelayError("bad_request", "the address or a header of the request is too long")
        else:
            error = RelayError("bad_request", "this is not a request in HTTP that the relay can read")
        response = _failure(error, status=status)
        response.force_close()
        return response


def _failure(error: RelayError, *, status: int | None = None, headers: object = None) -> web.Response:
    body: dict[str, object] = {"code": error.code, "message": error.message}
    if error.details:
        body["details"] = dict(error.details)
    response = web.Response(
        text=codec.dumps({"error": body}),
        status=status or CODES[error.code].status,
        content_type="application/json",
        headers=UNCACHED,
    )
    allow = headers.get("Allow") if hasattr(headers, "get") else None
    if allow:
        response.headers["Allow"] = allow
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, -(-error.retry_after // 1000)))
    if response.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response
