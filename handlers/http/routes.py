"""Every HTTP endpoint of the relay."""

from __future__ import annotations

from typing import Final

from handlers.http import (
    auth,
    changes,
    contacts,
    conversations,
    docs,
    keys,
    members,
    messages,
    operations,
    people,
    personal,
)
from handlers.http.openapi import route_of
from handlers.http.route import Route

_DESCRIBED: Final = (
    *auth.ROUTES,
    *people.ROUTES,
    *personal.ROUTES,
    *contacts.ROUTES,
    *conversations.ROUTES,
    *members.ROUTES,
    *changes.ROUTES,
    *messages.ROUTES,
    *keys.ROUTES,
    *operations.ROUTES,
    *docs.ROUTES,
)

ROUTES: Final[tuple[Route, ...]] = (*_DESCRIBED, route_of(_DESCRIBED))
