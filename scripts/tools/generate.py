"""Fills a database for trials, with a progress bar."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer
from argon2 import PasswordHasher
from pymongo import MongoClient, WriteConcern
from pymongo.collection import Collection
from pymongo.errors import PyMongoError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from relay.security.tokens import KeyConfigurationError, generate_secret, mint
from relay.store.embedded_files import REPLICA_SET, Layout, read_state
from relay.store.mongo import Mongo, MongoUnavailable
from scripts.tools.population import DEVICE, Plan, Population, Row

_BATCH: Final = 2000
_TTL_SECONDS: Final = 30 * 86_400
_FATE_SECONDS: Final = 72 * 3600
_COLLECTIONS: Final = ("users", "devices", "contacts", "conversations", "memberships")
_SELECT_MS: Final = 5000
_TOKEN_SECONDS: Final = 86_400

Advance = Callable[[str, int], None]
Item = TypeVar("Item")


class Give(Exception):
    """Nothing was generated, or not all; one line for people."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What there is now: documents written by collection, and the first people, the heavy one at the head, as (user id,
    user name, name)."""

    counts: dict[str, int]
    examples: list[tuple[str, str, str]]


def fill(uri: str, database: str, plan: Plan, advance: Advance) -> Generated:
    """Writes a population; ``advance`` is told the part and how many more are done. The collections and their indexes must
    exist. Raises PyMongoError."""
    population = Population(plan)
    counts = dict.fromkeys(_COLLECTIONS, 0)
    with MongoClient[Row](uri, serverSelectionTimeoutMS=_SELECT_MS) as client:
        # Trial data need not survive a power cut in the middle.
        db = client.get_database(database, write_concern=WriteConcern(w=1))

        def write(name: str, rows: list[Row]) -> None:
            collection: Collection[Row] = db[name]
            for batch in _batches(rows):
                collection.insert_many(batch, ordered=False)
            counts[name] += len(rows)

        for people in _batches(population.people()):
            write("users", [user for user, _ in people])
            write("devices", [device for _, device in people])
            advance("people", len(people))
        for contacts in _batches(population.contacts()):
            write("contacts", contacts)
            advance("contacts", len(contacts))
        for conversations in _batches(population.conversations(), _BATCH // 4):
            members = [row for _, rows in conversations for row in rows]
            write("conversations", [conversation for conversation, _ in conversations])
            write("memberships", members)
            advance("memberships", len(members))
    examples = zip(population.ids, population.usernames, population.names, strict=True)
    return Generated(counts, list(islice(examples, 4)))


async def prepare(uri: str, database: str) -> int:
    """Makes collections and indexes as a relay does; how many users there are. Raises MongoUnavailable, PyMongoError."""
    mongo = Mongo(uri, database)
    try:
        await mongo.prepare(_TTL_SECONDS, _FATE_SECONDS)
        users = int(await mongo.database["users"].estimated_document_count())
        return users or int(await mongo.database["conversations"].estimated_document_count())
    finally:
        mongo.close()


def find_mongo() -> str:
    """``RELAY_MONGO_URI``, or the MongoDB of the relay that runs on this data directory. Raises Give."""
    uri = os.environ.get("RELAY_MONGO_URI")
    if uri:
        return uri
    data = Path(os.environ.get("RELAY_DATA_DIR") or "var")
    state = read_state(Layout(data / "mongo"))
    if state is None:
        raise Give(f"no relay has run on {data}: start one (make run), or set RELAY_MONGO_URI")
    return f"mongodb://127.0.0.1:{state.port}/?replicaSet={REPLICA_SET}"


def main(
    users: Annotated[int, typer.Option(min=2, max=10_000_000)] = 1000,
    memberships: Annotated[int, typer.Option(min=2, help="People in conversations, in all.")] = 10_000,
    contacts: Annotated[int, typer.Option(min=0, help="Entries in contact lists, in all.")] = 5000,
    heavy: Annotated[
        int, typer.Option(min=0, help="In so many conversations is one person, with as many contacts.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="The same seed makes the same people.")] = 1,
    password: Annotated[
        str | None, typer.Option(help="Everybody's password, to log in with; without, only tokens get in.")
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Also where there is data already.")] = False,
    token: Annotated[
        str | None,
        typer.Option(metavar="USER", help="Only print an access token of this person, for 24 hours."),
    ] = None,
) -> None:
    """Fills a database with made-up people, contacts and conversations, to RELAY_MONGO_URI and RELAY_MONGO_DATABASE or the
    embedded MongoDB of the relay that runs on RELAY_DATA_DIR."""
    screen = Console(stderr=True, highlight=False)
    database = os.environ.get("RELAY_MONGO_DATABASE") or "relay"
    try:
        if token is not None:
            print(_token(token))
            return
        uri = find_mongo()
        there = asyncio.run(prepare(uri, database))
        if there and not add:
            raise Give(f"the database {database} holds data already; --add adds to it")
        plan = Plan(
            users=users,
            memberships=memberships,
            contacts=contacts,
            heavy=heavy,
            seed=seed,
            now=datetime.now(UTC).replace(microsecond=0),
            first=there,
            password=None if password is None else PasswordHasher().hash(password),
        )
        problem = plan.problem()
        if problem is not None:
            raise Give(problem)
        began = time.monotonic()
        with _progress(screen, plan) as advance:
            found = fill(uri, database, plan, advance)
    except (Give, MongoUnavailable, KeyConfigurationError, PyMongoError) as error:
        print(f"generate: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        raise typer.Exit(1) from None
    _summary(found, time.monotonic() - began, password)


def _token(user: str) -> str:
    secret = os.environ.get("RELAY_JWT_SECRET")
    path = Path(os.environ.get("RELAY_DATA_DIR") or "var") / "jwt-secret"
    if secret is None and not path.exists():
        raise Give(f"there is no secret in {path} yet: start a relay (make run), or set RELAY_JWT_SECRET")
    audience = os.environ.get("RELAY_JWT_AUDIENCE") or "relay"
    return mint(secret or generate_secret(path), user, DEVICE, audience=audience, lifetime=_TOKEN_SECONDS)


@contextmanager
def _progress(screen: Console, plan: Plan) -> Iterator[Advance]:
    columns = [TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=screen) as progress:
        totals = {"people": plan.users, "contacts": plan.contacts, "memberships": plan.memberships}
        tasks = {name: progress.add_task(name, total=total) for name, total in totals.items()}
        yield lambda name, more: progress.advance(tasks[name], more)


def _batches(items: Iterable[Item], size: int = _BATCH) -> Iterator[list[Item]]:
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def _summary(found: Generated, seconds: float, password: str | None) -> None:
    screen = Console(highlight=False)
    table = Table(title=f"Generated in {seconds:.0f} s", title_justify="left", title_style="bold")
    table.add_column("collection")
    table.add_column("documents", justify="right")
    for name, count in found.counts.items():
        table.add_row(name, f"{count:,}")
    screen.print(table)
    people = Table(title="Some of them, the busiest first", title_justify="left", title_style="bold")
    for column in ("user id", "user name", "name"):
        people.add_column(column, no_wrap=True)
    for row in found.examples:
        people.add_row(*row)
    screen.print(people)
    user = found.examples[0][0]
    screen.print(f"token:  TOKEN=$(scripts/generate --token {user})", soft_wrap=True)
    screen.print(f"chat:   scripts/chat --user {user} --to {found.examples[1][0]}", soft_wrap=True)
    if password is not None:
        screen.print("log-in: each user name, with the password given", soft_wrap=True)


def run() -> None:
    """The program."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app(prog_name="scripts/generate")


if __name__ == "__main__":
    run()
