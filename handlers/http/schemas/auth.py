"""Registration, log-in, sessions and devices."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import AfterValidator, Field

from handlers.http.schemas.base import Answer, DeviceId, Milliseconds, Request, UserId
from handlers.http.schemas.names import Name
from handlers.http.wording import form
from relay.security.passwords import MAX_PASSWORD, MIN_PASSWORD

_TYPED: Final = form(r"^[^\x00-\x1f\x7f]+$", "text without control characters")
_BLANKS: Final = str.maketrans("", "", " -()")
_MIN_DIGITS: Final = 7
_MAX_DIGITS: Final = 15


def _e164(value: str) -> str:
    number = value.translate(_BLANKS)
    if not _MIN_DIGITS <= len(number) - 1 <= _MAX_DIGITS:
        raise ValueError(f"must have {_MIN_DIGITS} to {_MAX_DIGITS} digits after the +")
    return number


Username = Annotated[
    str,
    Field(
        pattern=form(
            r"^[A-Za-z0-9][A-Za-z0-9._-]{2,31}$",
            "3 to 32 of A-Z a-z 0-9 . _ -, and begin with a letter or digit",
        )
    ),
    AfterValidator(str.lower),
]
Password = Annotated[str, Field(min_length=MIN_PASSWORD, max_length=MAX_PASSWORD, pattern=_TYPED)]
Phone = Annotated[
    str,
    Field(
        max_length=32,
        pattern=form(r"^\+[ ()-]*[1-9][0-9 ()-]{5,30}$", "an international number, like +49 30 5550100"),
    ),
    AfterValidator(_e164),
]


class DeviceRequest(Request):
    """The installation that logs in. ``id``: the one it was given when it logged in before, or one of its own choice; absent:
    it is given one. ``reset``: its database is empty, so what waited for its former self is released."""

    id: DeviceId | None = None
    name: Name = Field(examples=["Ann's phone"])
    platform: str = Field(
        min_length=1,
        max_length=32,
        pattern=form(r"^[A-Za-z0-9._ -]+$", "a word like ios, android or web"),
        examples=["ios"],
    )
    reset: bool = False


class RegisterRequest(Request):
    """``username`` is folded to lower case; ``phone`` is an international number, blanks, dashes and parentheses are left
    out."""

    username: Username = Field(examples=["ann"])
    password: Password = Field(examples=["correct horse battery"])
    name: Name | None = Field(default=None, examples=["Ann"])
    phone: Phone | None = Field(default=None, examples=["+49 30 5550100"])
    device: DeviceRequest


class LoginRequest(Request):
    """``name`` and ``phone`` are taken at registration only; here they are ignored."""

    username: str = Field(min_length=1, max_length=64, pattern=_TYPED, examples=["ann"])
    password: str = Field(
        min_length=1, max_length=MAX_PASSWORD, pattern=_TYPED, examples=["correct horse battery"]
    )
    name: str | None = Field(default=None, max_length=64)
    phone: str | None = Field(default=None, max_length=32)
    device: DeviceRequest


class RefreshRequest(Request):
    """The newest refresh token that this device has."""

    refresh_token: str = Field(alias="refreshToken", min_length=1, max_length=256)


class AccountAnswer(Answer):
    """The account that is logged in."""

    id: UserId
    username: str
    name: str | None


class OwnDeviceAnswer(Answer):
    """The device that is logged in."""

    id: DeviceId
    name: str = Field(examples=["Ann's phone"])
    platform: str = Field(examples=["ios"])


class TokensAnswer(Answer):
    """``accessToken`` is good for ``expiresIn`` seconds; ``refreshToken`` is exchanged for the next pair, and must be stored
    before it is used."""

    access_token: str = Field(alias="accessToken")
    refresh_token: str = Field(alias="refreshToken")
    expires_in: int = Field(alias="expiresIn")


class SessionAnswer(TokensAnswer):
    """A new session of a device."""

    user: AccountAnswer
    device: OwnDeviceAnswer


class DeviceAnswer(Answer):
    """One of one's own devices. ``current``: the one that asks; ``online``: heard from by this node within
    the heartbeat and 5 s."""

    id: DeviceId
    name: str | None = Field(examples=["Ann's phone"])
    platform: str | None = Field(examples=["ios"])
    created_at: Milliseconds = Field(alias="createdAt")
    last_seen: Milliseconds | None = Field(alias="lastSeen")
    current: bool = Field(examples=[True])
    online: bool


class DeviceList(Answer):
    """One's own devices, in the order they came; always complete, so ``next`` is null."""

    items: list[DeviceAnswer]
    next: None = None
