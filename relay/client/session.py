"""A device that is logged in at a relay with accounts of its own: access tokens, made from a refresh token in a file."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiohttp import ClientSession, ClientTimeout

from relay.client.errors import RequestFailed, SessionEnded, StorageError
from relay.client.http import accepted, exchange

_SECONDS: Final = 20.0
_GOOD_FOR: Final = 60.0
_FIELDS: Final = ("url", "user", "device")


@dataclass(frozen=True, slots=True)
class _Answer:
    access: str
    refresh: str
    seconds: float


class Session:
    """The session of one device, and the ``token`` of its ``Device``: ``Device(session.url, database, session)``.

    ``path`` holds ``url``, ``user``, ``device`` and the newest refresh token, for its owner alone. A new refresh token is on
    disk before the access token that came with it is used: a process that dies in between asks again with the former one and
    is given the same. Neither password nor access token is ever written.
    """

    def __init__(self, path: Path, url: str, user: str, device: str) -> None:
        self.path = path
        self.url = url
        self.user = user
        self.device = device
        self._access: str | None = None
        self._good_until = 0.0
        self._one_at_a_time = asyncio.Lock()

    @classmethod
    async def sign_in(
        cls,
        url: str,
        path: Path,
        username: str,
        password: str,
        *,
        device: str | None = None,
        device_name: str = "terminal",
        platform: str = "python",
        reset: bool = False,
        register: bool = False,
        name: str | None = None,
    ) -> Session:
        """Logs this device in, or makes the account first when ``register``; a session that it had ends.

        ``device`` is the id that it had before or that it chooses; without one the relay gives one. ``reset``: its database
        is empty. ``name`` is a new account's display name. Raises RequestFailed, and StorageError when the file cannot be
        written.
        """
        url = url.rstrip("/")
        described: dict[str, object] = {"name": device_name, "platform": platform}
        if device is not None:
            described["id"] = device
        if reset:
            described["reset"] = True
        wanted: dict[str, object] = {"username": username, "password": password, "device": described}
        if register and name is not None:
            wanted["name"] = name
        body = await _post(url, "/v1/auth/register" if register else "/v1/auth/login", wanted)
        answer = _answer(body)
        try:
            user, given = str(body["user"]["id"]), str(body["device"]["id"])
        except (KeyError, TypeError):
            raise _unexpected() from None
        session = cls(path, url, user, given)
        await session._accept(answer)
        return session

    @classmethod
    def load(cls, path: Path) -> Session | None:
        """The session that a file keeps; None when there is none. It may have ended: see ``ended``. Raises StorageError."""
        kept = _read(path)
        return None if kept is None else cls(path, kept["url"], kept["user"], kept["device"])

    @property
    def ended(self) -> bool:
        """Whether the relay said that this session has ended; only ``sign_in`` begins another."""
        kept = _read(self.path)
        return kept is None or kept.get("refreshToken") is None

    async def __call__(self) -> str:
        """An access token that is good for another minute, or half of its life if that is less.

        Raises SessionEnded, RequestFailed when the relay cannot be asked now, StorageError.
        """
        async with self._one_at_a_time:
            if self._access is None or time.monotonic() >= self._good_until:
                await self._refresh()
            assert self._access is not None
            return self._access

    def refused(self, token: str) -> None:
        """The relay refused this access token before its time; the next call gets another."""
        if token == self._access:
            self._access = None

    async def _refresh(self) -> None:
        self._access = None
        # The file, not memory: another process may have gone on with this session.
        kept = await asyncio.to_thread(_read, self.path)
        token = None if kept is None else kept.get("refreshToken")
        if token is None:
            raise _gone()
        try:
            body = await self._exchange(token)
        except RequestFailed as error:
            if error.status != 401:
                raise
            await self._keep(None)
            raise _gone() from None
        await self._accept(_answer(body))

    async def _exchange(self, token: str) -> Any:
        wanted = {"refreshToken": token}
        try:
            return await _post(self.url, "/v1/auth/refresh", wanted)
        except RequestFailed as error:
            if error.status:
                raise
        # Perhaps only the answer got lost: the same token is given the same successor.
        return await _post(self.url, "/v1/auth/refresh", wanted)

    async def _accept(self, answer: _Answer) -> None:
        began = time.monotonic()
        await self._keep(answer.refresh)
        self._access = answer.access
        self._good_until = began + answer.seconds - min(_GOOD_FOR, answer.seconds / 2)

    async def _keep(self, token: str | None) -> None:
        kept = {"url": self.url, "user": self.user, "device": self.device, "refreshToken": token}
        await asyncio.to_thread(_write, self.path, json.dumps(kept, indent=1) + "\n")


async def _post(url: str, path: str, body: object) -> Any:
    async with ClientSession(timeout=ClientTimeout(total=_SECONDS)) as http:
        return accepted(await exchange(http, "POST", url, path, body), f"POST {path}")


def _answer(body: Any) -> _Answer:
    found = body if isinstance(body, dict) else {}
    access, refresh, seconds = found.get("accessToken"), found.get("refreshToken"), found.get("expiresIn")
    if not isinstance(access, str) or not isinstance(refresh, str) or not isinstance(seconds, int | float):
        raise _unexpected()
    return _Answer(access, refresh, float(seconds))


def _unexpected() -> RequestFailed:
    return RequestFailed(200, "unexpected", "what answered is no relay with accounts of its own")


def _gone() -> SessionEnded:
    return SessionEnded(
        "this device is logged out: its session was ended, or not used for too long; log in again"
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read the session file {path}: {error}") from error
    if not isinstance(kept, dict) or not all(isinstance(kept.get(name), str) for name in _FIELDS):
        raise StorageError(f"{path} is no session file; remove it and log in again")
    return kept


def _write(path: Path, text: str) -> None:
    """Replaces the file at once and durably; only its owner may read it."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write the session file {path}: {error}") from error


def _sync_directory(path: Path) -> None:
    if os.name != "posix":
        return
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
