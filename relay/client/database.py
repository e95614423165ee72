"""The device's SQLite file: history, outbox, receipts. Synchronous; one thread owns it (relay.client.storage).

Every public method is one transaction: it happens as a whole or raises StorageError and leaves no trace.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final, TypeVar, cast

from relay.client.errors import OutboxFull, StorageError, WrongDatabase
from relay.client.values import WITHDRAWN, Draft, Failed, Message, Receipt, State, Stored

if sys.platform != "win32":
    import fcntl

VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE messages (
    conv TEXT NOT NULL, id TEXT NOT NULL,
    seq INTEGER, at INTEGER NOT NULL,
    sender_user TEXT NOT NULL, sender_device TEXT NOT NULL,
    kind TEXT NOT NULL, body TEXT NOT NULL, reply_to TEXT,
    state TEXT NOT NULL, error TEXT, extra TEXT,
    PRIMARY KEY (conv, id)
) WITHOUT ROWID;
CREATE INDEX messages_order ON messages (conv, seq, id);
CREATE INDEX messages_withdrawn ON messages (conv, reply_to, sender_user) WHERE kind = 'withdrawn' AND seq IS NOT NULL;
CREATE TABLE outbox (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    conv TEXT NOT NULL, id TEXT NOT NULL, operation TEXT NOT NULL,
    UNIQUE (conv, id)
);
CREATE TABLE receipts (
    conv TEXT NOT NULL, id TEXT NOT NULL, user TEXT NOT NULL, device TEXT NOT NULL, at INTEGER NOT NULL,
    PRIMARY KEY (conv, id, user, device)
) WITHOUT ROWID;
CREATE TABLE cursors (conv TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE info (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
_COLUMNS: Final = "conv, id, seq, at, sender_user, sender_device, kind, body, reply_to, state, extra, error"
_INSERT: Final = f"INSERT INTO messages ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
# Named, because without statistics SQLite would rather read the whole conversation by its primary key.
_IS_WITHDRAWN: Final = (
    "SELECT 1 FROM messages INDEXED BY messages_withdrawn"
    " WHERE kind = 'withdrawn' AND seq IS NOT NULL AND conv = ? AND reply_to = ? AND sender_user = ?"
)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Waiting:
    """A row of the outbox: ``operation`` is the JSON text of its ``send``, ``after`` the highest ``seq`` held."""

    position: int
    conv: str
    id: str
    operation: str
    after: int


@dataclass(slots=True)
class Incoming:
    """What received frames bring to disk, together."""

    messages: list[Message] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Committed:
    """What was new: messages not held before, conversations never seen, own messages that left the outbox."""

    messages: list[Message]
    conversations: list[str]
    stored: list[Stored]
    failed: list[Failed]


class Database:
    """One device's file. Raises WrongDatabase when it is another program's, newer, or open elsewhere."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
            self._sql = sqlite3.connect(path, isolation_level=None, timeout=10)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"cannot open the database {path}: {error}") from error
        try:
            self._prepare(path)
        except sqlite3.Error as error:
            self.close()
            raise StorageError(f"cannot read the database {path}: {error}") from error
        except WrongDatabase:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file and lets others open it."""
        self._sql.close()
        if self._lock is not None:
            self._lock.close()

    def _prepare(self, path: Path) -> None:
        found = int(self._sql.execute("PRAGMA user_version").fetchone()[0])
        if found > VERSION:
            raise WrongDatabase(
                f"{path} was written by a newer version (schema {found}, known {VERSION}); update this program"
            )
        self._sql.execute("PRAGMA journal_mode = WAL")
        self._sql.execute("PRAGMA synchronous = FULL")
        self._sql.execute("PRAGMA foreign_keys = OFF")
        if found == 0:
            if self._sql.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise WrongDatabase(f"{path} is the database of another program; name another file")
            self._sql.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version = {VERSION};COMMIT;")

    def _transaction(self, work: Callable[[], _Result]) -> _Result:
        try:
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                result = work()
                self._sql.execute("COMMIT")
            finally:
                if self._sql.in_transaction:
                    self._sql.execute("ROLLBACK")
        except (sqlite3.Error, UnicodeEncodeError, OverflowError) as error:
            raise StorageError(f"the database refused a transaction: {error}") from error
        return result

    # -- sending

    def outbox_state(self) -> tuple[int, int]:
        """How many messages wait to be sent, and the highest position ever given."""
        count = self._sql.execute("SELECT count(*) FROM outbox").fetchone()[0]
        highest = self._sql.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'").fetchone()
        return int(count), int(highest[0]) if highest else 0

    def enqueue(self, drafts: Sequence[tuple[Draft, str]], at: int, limit: int) -> int:
        """Puts drafts with their encoded operations into history and outbox; how many were new.

        A draft that is queued, stored or withdrawn already is left alone; one that failed is queued again. Raises OutboxFull
        when more than ``limit`` would wait; then none is kept.
        """

        def work() -> int:
            waiting = int(self._sql.execute("SELECT count(*) FROM outbox").fetchone()[0])
            user, device = self._owner()
            added = sum(self._enqueue(draft, operation, at, user, device) for draft, operation in drafts)
            if waiting + added > limit:
                raise OutboxFull(f"{waiting} messages wait to be sent already; the limit is {limit}")
            self._touch({draft.conv: 0 for draft, _ in drafts})
            return added

        return self._transaction(work)

    def _enqueue(self, draft: Draft, operation: str, at: int, user: str, device: str) -> int:
        key = (draft.conv, draft.id)
        held = self._sql.execute("SELECT state FROM messages WHERE conv = ? AND id = ?", key).fetchone()
        if held is not None and held[0] != "failed":
            return 0
        if held is not None:
            self._sql.execute("DELETE FROM messages WHERE conv = ? AND id = ?", key)
        if draft.kind != WITHDRAWN and self._sql.execute(_IS_WITHDRAWN, (*key, user)).fetchone():
            return 0
        queued = Message(
            draft.conv, draft.id, None, at, user, device, draft.kind, draft.body, draft.reply_to, "queued"
        )
        self._sql.execute(_INSERT, _row(queued))
        done = self._sql.execute(
            "INSERT OR IGNORE INTO outbox (conv, id, operation) VALUES (?, ?, ?)", (*key, operation)
        )
        return done.rowcount

    def waiting(self, after: int, limit: int, limit_bytes: int, without: Sequence[str]) -> list[Waiting]:
        """The next rows of the outbox behind position ``after``, in order, leaving out conversations ``without``.

        At most ``limit`` rows and, unless it is a single one, ``limit_bytes`` of operations.
        """
        found: list[Waiting] = []
        total = 0
        rows = self._sql.execute(
            "SELECT o.position, o.conv, o.id, o.operation, ifnull(c.seq, 0) FROM outbox o LEFT JOIN cursors c ON c.conv = o.conv"
            " WHERE o.position > ? AND o.conv NOT IN (SELECT value FROM json_each(?)) ORDER BY o.position LIMIT ?",
            (after, json.dumps(list(without)), limit),
        )
        for row in rows:
            total += len(row[3])
            if found and total > limit_bytes:
                break
            found.append(Waiting(*row))
        rows.close()
        return found

    # -- receiving

    def commit(self, incoming: Incoming) -> Committed:
        """Everything of the received frames at once; only then may they be acknowledged."""

        def work() -> Committed:
            known: set[str] = set()
            result = Committed([], [], [], [])
            highest: dict[str, int] = {}
            for message in incoming.messages:
                conv = message.conv
                if conv not in known:
                    known.add(conv)
                    if not self._sql.execute("SELECT 1 FROM cursors WHERE conv = ?", (conv,)).fetchone():
                        result.conversations.append(conv)
                highest[conv] = max(highest.get(conv, 0), message.seq or 0)
                if self._receive(message):
                    result.messages.append(message)
            for reply in incoming.stored:
                if self._settle(reply):
                    result.stored.append(reply)
                    highest[reply.conv] = max(highest.get(reply.conv, 0), reply.seq)
            for failure in incoming.failed:
                if self._fail(failure):
                    result.failed.append(failure)
            for receipt in incoming.receipts:
                self._sql.executemany(
                    "INSERT OR IGNORE INTO receipts VALUES (?, ?, ?, ?, ?)",
                    [
                        (receipt.conv, message, receipt.user, receipt.device, receipt.at)
                        for message in receipt.ids
                    ],
                )
            self._touch(highest)
            return result

        return self._transaction(work)

    def _receive(self, message: Message) -> bool:
        key = (message.conv, message.id)
        if message.kind != WITHDRAWN and self._sql.execute(_IS_WITHDRAWN, (*key, message.user)).fetchone():
            return False
        held = self._sql.execute(
            "SELECT seq, sender_user, sender_device, state FROM messages WHERE conv = ? AND id = ?", key
        ).fetchone()
        if held is None:
            self._sql.execute(_INSERT, _row(message))
        # An id belongs to whoever used it first; a later sender of the same id must not replace what is held.
        elif (held[1], held[2]) == (message.user, message.device) and (
            held[0] is None or held[0] < (message.seq or 0)
        ):
            state: State = "received" if held[3] == "received" else "stored"
            self._sql.execute("DELETE FROM messages WHERE conv = ? AND id = ?", key)
            self._sql.execute(_INSERT, _row(replace(message, state=state)))
        if message.kind == WITHDRAWN and message.reply_to is not None:
            self._withdraw(message.conv, message.reply_to, message.user)
        return held is None

    def _settle(self, reply: Stored) -> bool:
        key = (reply.conv, reply.id)
        gone = self._sql.execute("DELETE FROM outbox WHERE conv = ? AND id = ?", key).rowcount
        self._sql.execute(
            "UPDATE messages SET seq = ?, at = ?, state = 'stored', error = NULL"
            " WHERE conv = ? AND id = ? AND state <> 'received' AND (seq IS NULL OR seq <= ?)",
            (reply.seq, reply.at, *key, reply.seq),
        )
        row = self._sql.execute(
            "SELECT reply_to, sender_user FROM messages WHERE conv = ? AND id = ? AND kind = 'withdrawn'", key
        ).fetchone()
        if row is not None and row[0] is not None:
            self._withdraw(reply.conv, row[0], row[1])
        return gone > 0

    def _fail(self, failure: Failed) -> bool:
        key = (failure.conv, failure.id)
        gone = self._sql.execute("DELETE FROM outbox WHERE conv = ? AND id = ?", key).rowcount
        if gone:
            self._sql.execute(
                "UPDATE messages SET state = 'failed', error = ? WHERE conv = ? AND id = ? AND state = 'queued'",
                (failure.code, *key),
            )
        return gone > 0

    def _withdraw(self, conv: str, message: str, user: str) -> None:
        self._sql.execute(
            "DELETE FROM messages WHERE conv = ? AND id = ? AND sender_user = ? AND kind <> 'withdrawn'",
            (conv, message, user),
        )

    def _touch(self, highest: dict[str, int]) -> None:
        self._sql.executemany(
            "INSERT INTO cursors (conv, seq) VALUES (?, ?) ON CONFLICT (conv) DO UPDATE SET seq = max(seq, excluded.seq)",
            highest.items(),
        )

    # -- who this is

    def own(self, user: str, device: str) -> None:
        """Binds the file to the device that the relay welcomed. Raises WrongDatabase when it is another's."""

        def work() -> None:
            owner = f"{user}/{device}"
            held = self.read_info("owner")
            if held is not None and held != owner:
                raise WrongDatabase(
                    f"the database belongs to {held}, the token to {owner}; name another file"
                )
            if held is None:
                self._sql.execute("INSERT INTO info VALUES ('owner', ?)", (owner,))
                self._sql.execute(
                    "UPDATE messages SET sender_user = ?, sender_device = ? WHERE sender_user = '' AND state = 'queued'",
                    (user, device),
                )

        self._transaction(work)

    def _owner(self) -> tuple[str, str]:
        user, _, device = (self.read_info("owner") or "").partition("/")
        return user, device

    def read_info(self, name: str) -> str | None:
        """A value of the application's own, or None."""
        row = self._sql.execute("SELECT value FROM info WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def write_info(self, name: str, value: str) -> None:
        """Keeps a value of the application's own."""
        self._transaction(
            lambda: self._sql.execute("INSERT OR REPLACE INTO info VALUES (?, ?)", (name, value))
        )

    # -- reading

    def history(self, conv: str, after: tuple[int, str], limit: int) -> list[Message]:
        """Messages of a conversation behind (seq, id) ``after``, in order; own ones once the relay stored them."""
        return self._messages(
            "WHERE conv = ? AND seq IS NOT NULL AND (seq, id) > (?, ?) ORDER BY seq, id LIMIT ?",
            (conv, *after, limit),
        )

    def unsent(self, conv: str) -> list[Message]:
        """Own messages of a conversation that the relay has not stored: queued in order of sending, then failed."""
        return self._messages(
            "LEFT JOIN (SELECT conv AS c, id AS i, position FROM outbox) ON c = conv AND i = id"
            " WHERE conv = ? AND seq IS NULL ORDER BY position IS NULL, position, id",
            (conv,),
        )

    def conversations(self) -> list[tuple[str, int]]:
        """Every conversation seen with the highest ``seq`` held in it."""
        return [
            (str(conv), int(seq))
            for conv, seq in self._sql.execute("SELECT conv, seq FROM cursors ORDER BY conv")
        ]

    def receipts(self, conv: str, message: str) -> list[tuple[str, str, int]]:
        """(user, device, at) of every device known to hold an own message."""
        found = self._sql.execute(
            "SELECT user, device, at FROM receipts WHERE conv = ? AND id = ? ORDER BY at, user, device",
            (conv, message),
        )
        return [(str(user), str(device), int(at)) for user, device, at in found]

    def _messages(self, where: str, values: Iterable[object]) -> list[Message]:
        return [
            _message(row)
            for row in self._sql.execute(f"SELECT {_COLUMNS} FROM messages {where}", tuple(values))
        ]


def _lock(path: Path) -> IO[bytes] | None:
    if sys.platform == "win32":
        return None
    held = open(path.with_name(path.name + ".lock"), "ab")  # noqa: SIM115 - held as long as the database is open
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held.close()
        raise WrongDatabase(f"another process has {path} open; end it first") from None
    return held


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: SQLite cannot hold it, its escape it can
        text = json.dumps(value, separators=(",", ":"))
    return text


def _row(message: Message) -> tuple[object, ...]:
    return (
        message.conv,
        message.id,
        message.seq,
        message.at,
        message.user,
        message.device,
        message.kind,
        _json(message.body),
        message.reply_to,
        message.state,
        None if message.extra is None else _json(message.extra),
        message.error,
    )


def _message(row: tuple[Any, ...]) -> Message:
    return Message(
        conv=row[0],
        id=row[1],
        seq=row[2],
        at=row[3],
        user=row[4],
        device=row[5],
        kind=row[6],
        body=json.loads(row[7]),
        reply_to=row[8],
        state=cast(State, row[9]),
        extra=None if row[10] is None else json.loads(row[10]),
        error=row[11],
    )
