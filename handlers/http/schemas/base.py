"""What all requests and answers of the HTTP side have in common. ``/openapi.json`` is made from these models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from handlers.http.wording import form
from relay.wire.ids import CONVERSATION_PATTERN, DEVICE_PATTERN, MEDIA_PATTERN, USER_PATTERN, UUID_PATTERN

UserId = Annotated[
    str, Field(pattern=form(f"^{USER_PATTERN}$", "a user id: 1 to 128 of A-Z a-z 0-9 _ . @ : + -"))
]
DeviceId = Annotated[str, Field(pattern=form(f"^{DEVICE_PATTERN}$", "an id: 1 to 64 of A-Z a-z 0-9 _ . : -"))]
ConversationId = Annotated[
    str, Field(pattern=form(f"^{CONVERSATION_PATTERN}$", "an id: 1 to 64 of A-Z a-z 0-9 _ . : -"))
]
MessageId = Annotated[str, Field(pattern=form(f"^{UUID_PATTERN}$", "a UUID in lower case"))]
MediaId = Annotated[str, Field(pattern=form(f"^{MEDIA_PATTERN}$", "the id of an attachment"))]
Milliseconds = Annotated[int, Field(ge=0, le=253_402_300_799_999)]


class Request(BaseModel):
    """A request: unknown fields are refused, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Answer(BaseModel):
    """An answer; it may grow fields."""

    model_config = ConfigDict(populate_by_name=True)


class DoneAnswer(Answer):
    """The request is durable."""

    done: Literal[True] = True


class ErrorBody(Answer):
    """What went wrong: ``message`` is for people, ``code`` for programs."""

    code: str
    message: str
    details: dict[str, Any] | None = None


class ErrorAnswer(Answer):
    """Every error looks like this."""

    error: ErrorBody
