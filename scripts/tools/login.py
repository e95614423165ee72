"""How scripts/chat logs in: a password once, the session file next to the database from then on."""

from __future__ import annotations

import asyncio
import getpass
import os
import platform
import re
from pathlib import Path
from typing import Final

from relay.client import DeviceError, Session

PASSWORD: Final = "RELAY_PASSWORD"
USERNAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,31}")
"""What a user name looks like; capitals mean the same as small letters."""


class NoLogin(Exception):
    """It cannot log in; ``str()`` is the line for people."""


def session_file(database: Path) -> Path:
    """Where the session of the device with this database is kept."""
    return database.with_name(database.name.removesuffix(".sqlite") + ".session")


def log_in(url: str, username: str, device: str, database: Path) -> Session:
    """The session that the file keeps, else a new one made with the password. It blocks, and runs an event loop of its own:
    Ctrl-C must end the question for a password. Raises NoLogin and DeviceError."""
    path = session_file(database)
    session = Session.load(path)
    if session is not None and session.url != url:
        raise NoLogin(
            f"{path} is a session at the relay {session.url}; give --url {session.url}, or another --database"
        )
    if session is not None and not session.ended:
        return session
    signing_in = Session.sign_in(
        url,
        path,
        username,
        _password(username),
        device=device if session is None else session.device,
        device_name=f"chat on {platform.node()}"[:64],
        platform=platform.system().lower() or "unknown",
    )
    try:
        return asyncio.run(signing_in)
    except DeviceError as error:
        raise NoLogin(f"cannot log in as {username}: {error}") from None


def _password(username: str) -> str:
    given = os.environ.get(PASSWORD)
    if given:
        return given
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        raise NoLogin(f"no password for {username}: set {PASSWORD}, or log in once in a terminal") from None
    try:
        return getpass.getpass(f"password of {username}: ")
    except EOFError:
        raise NoLogin(f"no password for {username}") from None
