"""Info and health."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from handlers.http.schemas.base import Answer


class LimitsAnswer(Answer):
    """Limits, in bytes and operations."""

    frame: int
    body: int
    ops: int


class InfoAnswer(Answer):
    """Versions, features and limits."""

    name: Literal["relay"]
    version: str
    protocol: int
    features: list[str]
    limits: LimitsAnswer
    window: int
    window_bytes: int = Field(alias="windowBytes")
    heartbeat: int
    ttl: int


class HealthAnswer(Answer):
    """``problems`` names what is wrong, by part."""

    status: Literal["ok", "ready", "draining", "unavailable"]
    problems: dict[str, str]
