"""Info and health."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from handlers.http.schemas.base import Answer


class LimitsAnswer(Answer):
    """Limits, in bytes and operations, as ``welcome`` tells them."""

    frame: int
    body: int
    ops: int


class QuotasAnswer(Answer):
    """Messages that wait for one device, recipient devices of a message, members of a group, conversations of a person.
    With more recipient devices than ``largeGroup`` a body has at most ``largeGroupBody`` bytes."""

    mailbox: int
    recipients: int
    members: int
    conversations: int
    large_group: int = Field(alias="largeGroup")
    large_group_body: int = Field(alias="largeGroupBody")


class InfoAnswer(Answer):
    """Versions, features and limits."""

    name: Literal["relay"]
    version: str
    protocol: int
    features: list[str]
    limits: LimitsAnswer
    quotas: QuotasAnswer
    window: int
    window_bytes: int = Field(alias="windowBytes")
    heartbeat: int
    ttl: int


class HealthAnswer(Answer):
    """``problems`` names what is wrong, by part."""

    status: Literal["ok", "ready", "draining", "unavailable"]
    problems: dict[str, str]
