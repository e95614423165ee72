"""Every HTTP endpoint of the relay."""

from __future__ import annotations

from typing import Final

from handlers.http import conversations, messages, operations
from handlers.http.openapi import route_of
from handlers.http.route import Route

_DESCRIBED: Final = (*conversations.ROUTES, *messages.ROUTES, *operations.ROUTES)

ROUTES: Final[tuple[Route, ...]] = (*_DESCRIBED, route_of(_DESCRIBED))
