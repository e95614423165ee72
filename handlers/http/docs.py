"""``/docs``: the description of the HTTP side in a browser, to read and to try. Swagger UI comes with the relay; nothing is
fetched from the internet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Final

from aiohttp import web

from handlers.context import Context
from handlers.http import asyncapi
from handlers.http.route import Caller, Route

_PACKAGE: Final = "swagger_ui"
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Relay: HTTP interface</title>
<link rel="icon" type="image/png" href="/docs/favicon.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="docs"></div>
<noscript>This page needs JavaScript. The description itself is at <a href="/openapi.json">/openapi.json</a>.</noscript>
<script src="/docs/swagger-ui.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START: Final = """"use strict";
SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#docs",
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  deepLinking: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  filter: true,
  persistAuthorization: false,
  tryItOutEnabled: true,
  validatorUrl: null,
});
"""
# Swagger UI draws its icons from data URLs; nothing else is allowed in, or out.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, slots=True)
class _File:
    """A part of the page, with the hash that names this version of it."""

    body: bytes
    media_type: str
    tag: str


@lru_cache(maxsize=8)
def _file(name: str) -> _File:
    text = {"page": _PAGE, "start.js": _START}.get(name)
    media_type = {"page": "text/html", "css": "text/css", "js": "text/javascript", "png": "image/png"}[
        name.rpartition(".")[2]
    ]
    if text is not None:
        body = text.encode()
    else:
        source = {
            "swagger-ui.js": "swagger-ui-bundle.js",
            "swagger-ui.css": "swagger-ui.css",
            "favicon.png": "favicon-32x32.png",
        }[name]
        body = resources.files(_PACKAGE).joinpath("static", source).read_bytes()
    return _File(body, media_type, hashlib.sha256(body).hexdigest()[:32])


def _answer(request: web.Request, name: str) -> web.Response:
    found = _file(name)
    headers = {**_HEADERS, "ETag": f'"{found.tag}"'}
    known = request.if_none_match or ()
    if any(tag.value in (found.tag, "*") for tag in known):
        return web.Response(status=304, headers=headers)
    charset = None if found.media_type == "image/png" else "utf-8"
    return web.Response(body=found.body, content_type=found.media_type, charset=charset, headers=headers)


async def page(_: Context, __: Caller, request: web.Request) -> web.Response:
    """This description in a browser, to read and to try: `Authorize` takes an access token. Works without the internet."""
    return _answer(request, "page")


def _part(name: str) -> Route:
    async def part(_: Context, __: Caller, request: web.Request) -> web.Response:
        return _answer(request, name)

    media_type = _file(name).media_type
    return Route(
        "GET",
        f"/docs/{name}",
        part,
        f"{name} of the page",
        "documentation",
        {200: None, 304: None},
        open=True,
        media_type=media_type,
        hidden=True,
    )


ROUTES: Final[tuple[Route, ...]] = (
    asyncapi.ROUTE,
    Route(
        "GET",
        "/docs",
        page,
        "This description, in a browser",
        "documentation",
        {200: None, 304: None},
        open=True,
        media_type="text/html",
    ),
    *(_part(name) for name in ("start.js", "swagger-ui.js", "swagger-ui.css", "favicon.png")),
)
