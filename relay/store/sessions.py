"""Accounts with passwords, and the sessions of their devices.

A session is a family of refresh tokens: the current one, and the one before it for as long as the current one was not used.
Every change is one conditional write, so whatever is repeated or raced finds either the state before or the one after.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from models.accounts import Device, User
from relay.security.refresh import RefreshToken, begin, parse, seal, successor_of, unseal
from relay.store.accounts import gap_of_return, is_new, milliseconds
from relay.store.mongo import DuplicateKeyError
from relay.store.people import search_keys
from relay.wire.clock import utc_now
from relay.wire.errors import RelayError
from relay.wire.ids import device_key
from relay.wire.limits import Limit
from relay.wire.stamps import stamp_now

MOST_LISTED: Final = 1000
"""A user has at most so many devices in a list: tokens of another issuer can bring any number of them."""
_DEVICE_BYTES: Final = 8
# A repetition is either a lost answer or a thief; once an hour is enough to notice the one who keeps repeating.
_NOTED_FOR: Final = timedelta(hours=1)
_ATTEMPTS: Final = 10


@dataclass(frozen=True, slots=True)
class Account:
    """Somebody who logs in with a password. ``password`` is its hash; ``erasing``: the account is on its way out."""

    user: str
    username: str
    name: str | None
    password: str | None
    suspended: bool
    erasing: bool


@dataclass(frozen=True, slots=True)
class Installation:
    """What a device says of itself when it logs in. ``device`` is its id, or one from ``new_device``; ``reset``: its database
    is empty."""

    device: str
    name: str
    platform: str
    reset: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """A new session. ``changed``: recipients must be resolved again; ``fresh``: the device's keys are those of a former self;
    ``ended``: what was good for this device before is not any more; ``too_many``: it must be taken back, as others logged in
    at the same moment."""

    device: str
    token: RefreshToken
    changed: bool
    fresh: bool
    ended: bool
    too_many: bool = False


@dataclass(frozen=True, slots=True)
class Renewed:
    """A refresh token was exchanged, or its exchange is repeated: ``token`` is its successor. ``suspicious``: it is repeated,
    and no repetition in this session was noted (``note_repeat``) for an hour."""

    user: str
    device: str
    token: RefreshToken
    suspicious: bool = False


@dataclass(frozen=True, slots=True)
class Reused:
    """A refresh token came that was exchanged long ago: it is in two hands, so its session has ended."""

    user: str
    device: str


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device as its user sees it. Times in milliseconds."""

    id: str
    name: str | None
    platform: str | None
    created_at: int
    last_seen: int | None


class Sessions:
    """Registration, log-in, renewal with rotation, revocation.

    ``refresh_days``: a session that is not renewed for so long has ended; ``repeat_hours``: for so long an exchanged token
    gives its unused successor again; ``max_devices``: most devices of one user with a session.
    """

    def __init__(self, *, refresh_days: float, repeat_hours: float, max_devices: int) -> None:
        self._lasts = timedelta(days=refresh_days)
        self._repeats = timedelta(hours=repeat_hours)
        self._most = max_devices

    async def register(
        self,
        username: str,
        password: str,
        *,
        user: str | None = None,
        name: str | None = None,
        phone: str | None = None,
    ) -> Account:
        """Makes an account; ``username`` is folded, ``password`` a hash, ``user`` its id from ``new_user``. Raises RelayError
        ``conflict`` when the name is taken."""
        now = utc_now()
        document: dict[str, Any] = {
            "_id": user or new_user(),
            "createdAt": now,
            "updatedAt": stamp_now(),
            "username": username,
            "password": password,
        }
        if name is not None:
            document["name"] = name
        if phone is not None:
            document["phone"] = phone
        found, _ = search_keys(document)
        try:
            await User.get_motor_collection().insert_one({**document, **found})
        except DuplicateKeyError:
            raise name_taken() from None
        return _account(document)

    async def account(self, username: str) -> Account | None:
        """The account of a folded user name."""
        document = await User.get_motor_collection().find_one({"username": _text(username)}, _ACCOUNT)
        return None if document is None else _account(document)

    async def rehash(self, user: str, old: str, new: str) -> None:
        """Stores the same password under today's parameters, unless it was changed meanwhile."""
        await User.get_motor_collection().update_one(
            {"_id": user, "password": old}, {"$set": {"password": new}}
        )

    async def open(self, user: str, installation: Installation) -> Opened:
        """Begins a session of a device, which is created when it is new; another session of it ends.

        A device that was removed comes back as a new one. Raises RelayError ``conflict`` when the user has too many devices.
        """
        device = installation.device
        key = device_key(user, device)
        for _ in range(_ATTEMPTS):
            before = await _devices().find_one({"_id": key})
            await self.check_room(user, device)
            token = begin()
            opened = await self._begin(user, device, installation, before, token)
            if opened is None:
                continue
            # Log-ins at once all found room: those that see too many now give way.
            # A device that was there before stays, whoever came beside it.
            came = before is None or before.get("removedAt") is not None
            return replace(opened, too_many=came and await self._others(user, key) >= self._most)
        raise RelayError("unavailable", "this device is logging in elsewhere; try again", retry_after=1000)

    async def check_room(self, user: str, device: str) -> None:
        """Raises RelayError ``conflict`` when the user has no place for a session of this device."""
        if await self._others(user, device_key(user, device)) >= self._most:
            raise too_many_devices()

    async def _begin(
        self,
        user: str,
        device: str,
        installation: Installation,
        before: Mapping[str, Any] | None,
        token: RefreshToken,
    ) -> Opened | None:
        """None: the device is not as it was any more."""
        now = utc_now()
        key = device_key(user, device)
        session = {"id": token.session, "current": token.digest, "createdAt": now, "rotatedAt": now}
        fields: dict[str, Any] = {
            "name": installation.name,
            "platform": installation.platform,
            "updatedAt": stamp_now(),
            "session": session,
        }
        if installation.reset:
            fields["since"] = now
        if before is None:
            try:
                await _devices().insert_one(
                    {"_id": key, "user": user, "createdAt": now, "lastSeen": now, **fields}
                )
            except DuplicateKeyError:
                return None
            return Opened(device, token, changed=True, fresh=False, ended=False)
        removed, former = before.get("removedAt"), before.get("session")
        change: dict[str, Any] = {"$set": fields}
        if removed is not None:
            fields.update(since=now, lastSeen=now, gap=gap_of_return(before))
            change["$unset"] = {"removedAt": "", "fullSince": ""}
        if installation.reset:
            fields.update(relinkedAt=now, gap={"since": now, "why": "reset"})
        fresh = installation.reset or removed is not None
        ended = installation.reset or former is not None
        if ended:
            fields["endedAt"] = now
        same = {"removedAt": removed, "session.id": None if former is None else former["id"]}
        result = await _devices().update_one({"_id": key, **same}, change)
        if not result.matched_count:
            return None
        # A log-in that was repeated finishes what the first one may not have told.
        return Opened(device, token, changed=fresh or is_new(before, now), fresh=fresh, ended=ended)

    async def _others(self, user: str, key: str) -> int:
        """How many other devices of this user have a session."""
        alive = utc_now() - self._lasts
        query = {"user": user, "removedAt": None, "session.rotatedAt": {"$gte": alive}}
        cursor = _devices().find(query, {"_id": 1}).limit(self._most + 1)
        return len([row["_id"] async for row in cursor if row["_id"] != key])

    async def renew(self, text: str) -> Renewed | Reused | None:
        """Exchanges a refresh token for its successor. The same token gives the same successor again until that was used
        itself; an older one ends the session. None when it belongs to no session, or to one that was idle for too long."""
        token = parse(text)
        if token is None:
            return None
        for _ in range(_ATTEMPTS):
            row = await _devices().find_one({"session.id": _text(token.session)}, {"user": 1, "session": 1})
            if row is None:
                return None
            user, device = row["user"], row["_id"].partition("/")[2]
            session = row["session"]
            now = utc_now()
            if now - session["rotatedAt"] > self._lasts:
                return None
            if session["current"] == token.digest:
                successor = successor_of(token)
                if await self._rotate(row["_id"], token, successor, now):
                    return Renewed(user, device, successor)
                continue
            if session.get("previous") == token.digest and now - session["rotatedAt"] <= self._repeats:
                repeated = unseal(session["successor"], token)
                if repeated is not None:
                    noted = session.get("repeatedAt")
                    return Renewed(user, device, repeated, noted is None or now - noted > _NOTED_FOR)
            if await self._end(row["_id"], token.session):
                return Reused(user, device)
        raise RelayError(
            "unavailable", "this session is being renewed elsewhere; try again", retry_after=1000
        )

    async def note_repeat(self, user: str, device: str, session: str) -> None:
        """A repetition in this session was noted in the audit trail."""
        await _devices().update_one(
            {"_id": device_key(user, device), "session.id": session},
            {"$set": {"session.repeatedAt": utc_now()}},
        )

    async def _rotate(self, key: str, token: RefreshToken, successor: RefreshToken, now: datetime) -> bool:
        result = await _devices().update_one(
            {"_id": key, "session.id": token.session, "session.current": token.digest},
            {
                "$set": {
                    "session.current": successor.digest,
                    "session.previous": token.digest,
                    "session.successor": seal(successor, token),
                    "session.rotatedAt": now,
                }
            },
        )
        return bool(result.matched_count)

    async def _end(self, key: str, session: str) -> bool:
        """Ends a session; whether it was still there."""
        now = utc_now()
        result = await _devices().update_one(
            {"_id": key, "session.id": session},
            {"$set": {"endedAt": now, "updatedAt": stamp_now()}, "$unset": {"session": ""}},
        )
        return bool(result.matched_count)

    async def account_of(self, user: str) -> Account | None:
        """The account of a user id."""
        document = await User.get_motor_collection().find_one({"_id": user}, _ACCOUNT)
        return None if document is None else _account(document)

    async def devices(self, user: str) -> list[DeviceView]:
        """This user's devices, in the order they came; at most ``MOST_LISTED``."""
        cursor = _devices().find({"user": user, "removedAt": None}, _LISTED).limit(MOST_LISTED)
        views = [_view(row) async for row in cursor]
        return sorted(views, key=lambda view: (view.created_at, view.id))

    async def is_active(self, user: str, device: str) -> bool | None:
        """Whether a device is a recipient; False once it was removed, None when this user never had it."""
        row = await _devices().find_one({"_id": device_key(user, device)}, {"removedAt": 1})
        return None if row is None else row.get("removedAt") is None

    async def remove(self, user: str, device: str) -> bool:
        """Makes a device no recipient and all its tokens bad; whether it was one until now. Safe to repeat."""
        now = utc_now()
        result = await _devices().update_one(
            {"_id": device_key(user, device), "removedAt": None},
            {
                "$set": {"removedAt": now, "endedAt": now, "updatedAt": stamp_now()},
                "$unset": {"session": "", "push": ""},
            },
        )
        return bool(result.matched_count)


_ACCOUNT: Final = {"username": 1, "name": 1, "password": 1, "suspendedAt": 1, "erasingAt": 1}
_LISTED: Final = {"name": 1, "platform": 1, "createdAt": 1, "lastSeen": 1}


def _account(document: Mapping[str, Any]) -> Account:
    return Account(
        user=document["_id"],
        username=document.get("username", ""),
        name=document.get("name"),
        password=document.get("password"),
        suspended=document.get("suspendedAt") is not None,
        erasing=document.get("erasingAt") is not None,
    )


def _view(row: Mapping[str, Any]) -> DeviceView:
    seen = row.get("lastSeen")
    return DeviceView(
        id=row["_id"].partition("/")[2],
        name=row.get("name"),
        platform=row.get("platform"),
        created_at=milliseconds(row["createdAt"]),
        last_seen=None if seen is None else milliseconds(seen),
    )


def new_user() -> str:
    """An id for an account: a random UUID in hex."""
    return uuid.uuid4().hex


def name_taken() -> RelayError:
    """What somebody is told who registers under a user name that another account has."""
    return RelayError("conflict", "this user name is taken")


def new_device() -> str:
    """An id for a device that has none: 64 random bits in hex."""
    return secrets.token_hex(_DEVICE_BYTES)


def too_many_devices() -> RelayError:
    """What somebody is told who logs in on one device more than allowed."""
    return RelayError(
        "conflict", "you are logged in on too many devices; log out on one of them", limit=Limit.DEVICES
    )


def _text(value: str) -> dict[str, str]:
    # MongoDB uses an index that holds strings only when the question says that it is about one.
    return {"$eq": value, "$type": "string"}


def _devices() -> Any:
    return Device.get_motor_collection()
