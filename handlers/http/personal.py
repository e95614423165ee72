"""Endpoints: personal."""

from __future__ import annotations

from typing import Final

from handlers.http.route import Route

ROUTES: Final[tuple[Route, ...]] = ()
