"""The database and the key that a relay with these settings uses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from beanie import init_beanie

from config.settings import Settings, load
from relay import logs
from relay.security.pseudonyms import Pseudonyms
from relay.security.tokens import generate_secret
from relay.store.audit import Audit, check_key
from relay.store.embedded_files import REPLICA_SET, Layout, read_state
from relay.store.export import Exports
from relay.store.mongo import CONTROL, Mongo
from relay.store.people import People
from relay.store.reports import Reports
from relay.store.sessions import Sessions
from relay.store.timekeeping import READINGS, Timekeeper
from relay.wire.ids import USER_ID

ADMIN: Final = "$admin"
"""Who acts, in the audit trail. No user can be called so."""
_KEY_FILE: Final = "pseudonym-key"
_SECONDS: Final = 5


class Give(Exception):
    """What ends the program with exit code 1; ``str()`` is the line for people."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What an operator's command works with."""

    audit: Audit
    people: People
    reports: Reports
    exports: Exports
    sessions: Sessions

    async def user(self, named: str) -> str:
        """The id of who is called so, by user id or by user name. Raises Give."""
        kind, _, name = named.partition("=") if "=" in named else ("", "", named)
        by_id = kind in ("", "id") and await self.exports.profile(name) is not None
        account = None
        if kind in ("", "username") and USER_ID.fullmatch(name):
            account = await self.sessions.account(name.lower())
        if by_id and account is not None and account.user != name:
            raise Give(
                f"{name!r} is the id of one person and the user name of another ({account.user}); "
                f"write id={name} or username={name}"
            )
        if by_id:
            return name
        if account is not None:
            return account.user
        raise Give(f"nobody has the id or the user name {name!r}")


@asynccontextmanager
async def desk(*, verifying: bool = False) -> AsyncIterator[Desk]:
    """Opens the database of RELAY_MONGO_URI, or the one that a running relay keeps in RELAY_DATA_DIR. Unless ``verifying``,
    a key that is not the database's is refused. Raises Give, SettingsError and what the store raises."""
    settings = load()
    logs.configure("text", "warning")
    pseudonyms = _pseudonyms(settings)
    mongo = Mongo(_uri(settings), settings.mongo_database, select_seconds=_SECONDS)
    audit = Audit(pseudonyms)
    try:
        if not await mongo.ping(_SECONDS):
            raise Give(_unreachable(settings))
        # What is revoked here is compared with what the nodes issue, and they go by MongoDB's clock.
        Timekeeper().take(*await mongo.readings(READINGS))
        # The relay makes the indexes.
        await init_beanie(database=mongo.database, document_models=list(CONTROL), skip_indexes=True)
        if not verifying:
            try:
                await check_key(pseudonyms, adopt=False)
            except ValueError as error:
                raise Give(str(error)) from None
        yield Desk(
            audit, People(), Reports(), Exports(), Sessions(refresh_days=1, repeat_hours=1, max_devices=1)
        )
    finally:
        await audit.close()
        mongo.close()


def _uri(settings: Settings) -> str:
    if settings.mongo_uri is not None:
        return settings.mongo_uri.get_secret_value()
    state = read_state(Layout(settings.data_dir / "mongo"))
    if state is None:
        raise Give(
            f"no relay has kept a database in {settings.data_dir} (RELAY_DATA_DIR); "
            "name that of your relay in RELAY_MONGO_URI or RELAY_DATA_DIR"
        )
    return f"mongodb://127.0.0.1:{state.port}/?replicaSet={REPLICA_SET}"


def _unreachable(settings: Settings) -> str:
    if settings.mongo_uri is not None:
        return "the MongoDB of RELAY_MONGO_URI does not answer, or has no primary"
    return (
        f"the relay's own MongoDB in {settings.data_dir} (RELAY_DATA_DIR) does not answer; "
        "it runs as long as the relay does: start it with make run"
    )


def _pseudonyms(settings: Settings) -> Pseudonyms:
    if settings.pseudonym_key is not None:
        return Pseudonyms(settings.pseudonym_key.get_secret_value().encode())
    path = settings.data_dir / _KEY_FILE
    if not path.exists():
        raise Give(
            f"there is no key in {path}; name the relay's in RELAY_PSEUDONYM_KEY, or its data directory in RELAY_DATA_DIR"
        )
    return Pseudonyms(generate_secret(path).encode())
