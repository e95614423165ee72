"""For operators and clients that look before they connect: info, health, metrics."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from handlers.context import Context
from handlers.http.route import Caller, Route, answer
from handlers.http.schemas.operations import HealthAnswer, InfoAnswer, LimitsAnswer, QuotasAnswer
from relay import __version__
from relay.wire.frames import FEATURES
from relay.wire.replies import PROTOCOL_VERSION


async def info(ctx: Context, _: Caller, __: web.Request) -> web.Response:
    """Versions, features and limits."""
    limits = ctx.limits
    return answer(
        InfoAnswer(
            name="relay",
            version=__version__,
            protocol=PROTOCOL_VERSION,
            features=list(FEATURES),
            limits=LimitsAnswer(frame=limits.frame, body=limits.body, ops=limits.operations),
            quotas=QuotasAnswer(
                mailbox=limits.mailbox,
                recipients=limits.recipients,
                members=limits.members,
                conversations=limits.conversations,
                large_group=limits.large_group,
                large_group_body=limits.large_group_body,
            ),
            window=limits.window,
            window_bytes=limits.window_bytes,
            heartbeat=limits.heartbeat_ms,
            ttl=ctx.messages.ttl_ms // 1000,
        )
    )


async def livez(_: Context, __: Caller, ___: web.Request) -> web.Response:
    """200 as long as the process answers."""
    return answer(HealthAnswer(status="ok", problems={}))


async def readyz(ctx: Context, _: Caller, __: web.Request) -> web.Response:
    """200 when devices may be sent here, 503 while the node drains or its store does not answer."""
    problems = dict(ctx.health.problems)
    if ctx.health.draining:
        return answer(HealthAnswer(status="draining", problems=problems), 503)
    if "mongodb" in problems:
        return answer(HealthAnswer(status="unavailable", problems=problems), 503)
    return answer(HealthAnswer(status="ready", problems=problems))


async def metrics(ctx: Context, _: Caller, __: web.Request) -> web.Response:
    """Prometheus' text format."""
    return web.Response(
        body=ctx.metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    )


ROUTES: Final = (
    Route(
        "GET", "/v1/info", info, "Versions, features and limits", "operations", {200: InfoAnswer}, open=True
    ),
    Route("GET", "/livez", livez, "Is the process alive", "operations", {200: HealthAnswer}, open=True),
    Route(
        "GET",
        "/readyz",
        readyz,
        "May devices be sent here",
        "operations",
        {200: HealthAnswer, 503: HealthAnswer},
        open=True,
    ),
    Route(
        "GET", "/metrics", metrics, "Metrics", "operations", {200: None}, open=True, media_type="text/plain"
    ),
)
