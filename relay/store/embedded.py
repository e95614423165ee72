"""The embedded MongoDB: a mongod of the relay's own, a replica set of one on loopback, started, supervised and stopped.

For trying out, for tests and for small single machines; production names a real cluster. There is no access control:
whoever may open sockets on this machine may read it.

Only the few administrative commands a start needs are sent here, by PyMongo's plain client in a thread.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from relay.store import embedded_files as files
from relay.store.embedded_files import EmbeddedError, Layout, Leftover, PortTakenError, State
from relay.store.restarting import Restarting

__all__ = ["EmbeddedError", "EmbeddedMongo"]

ADOPT_PATIENCE = 2.0
END_PATIENCE = 3.5
KILL_PATIENCE = 5.0
START_DEADLINE = 180.0
PORT_TRIES = 5
# How long a member may take to see by itself that its configuration names another address (see `_correct_member`).
SELF_CHECK_PATIENCE = 0.5

_NOT_YET_INITIALIZED = 94
_log: structlog.stdlib.BoundLogger = structlog.get_logger("relay.embedded")


class EmbeddedMongo:
    """One mongod with its files under `directory`, for one relay at a time.

    `server_parameters` become --setParameter; `cache_gb` is WiredTiger's cache in GiB (at least 0.25). What was
    acknowledged with `w: majority, j: true` survives every stop, kill and restart.
    """

    def __init__(
        self,
        directory: Path,
        *,
        server_parameters: Mapping[str, str] = {},
        cache_gb: float = 1.0,
    ) -> None:
        self._layout = Layout(directory.resolve())
        self._parameters = {"diagnosticDataCollectionEnabled": "false", **server_parameters}
        self._cache_gb = cache_gb
        self._binary = Path("mongod")
        self._turn = asyncio.Lock()
        self._owner: int | None = None
        self._node: _Node | None = None
        self._port: int | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.restarts = 0

    @property
    def uri(self) -> str:
        """Where to connect: a driver waits for the primary and retries writes. EmbeddedError before the first start."""
        return f"mongodb://127.0.0.1:{self.port}/?replicaSet={files.REPLICA_SET}"

    @property
    def port(self) -> int:
        """The loopback port, the same through every restart. EmbeddedError before the first start."""
        if self._port is None:
            raise EmbeddedError("the embedded MongoDB has not been started; call start() first")
        return self._port

    @property
    def pid(self) -> int | None:
        """The process id of mongod; None while it does not run."""
        return self._node.pid if self._node is not None and not self._node.gone.done() else None

    async def start(self) -> str:
        """Return the URI once the node is primary and writable; at once when it already runs.

        A mongod left by a killed relay is taken over, or ended and replaced when it does not answer. EmbeddedError
        when another relay owns the directory, when there is no usable mongod, or when mongod fails to start.
        """
        async with self._turn:
            if self._supervisor is None:
                await asyncio.to_thread(files.prepare, self._layout)
                self._owner = files.take_ownership(self._layout)
                try:
                    self._binary = await asyncio.to_thread(files.find_mongod, self._layout)
                    self._node = await self._adopt() or await self._begin()
                    self._port = self._node.port
                finally:
                    if self._node is None:
                        self._release()
                self._supervisor = asyncio.create_task(self._supervise(self._node), name="embedded-mongo")
            return self.uri

    async def stop(self) -> None:
        """Shut mongod down with a checkpoint; killed when that takes over 3.5 s (nothing acknowledged is lost). Idempotent."""
        async with self._turn:
            if self._supervisor is None:
                return
            supervisor, self._supervisor = self._supervisor, None
            supervisor.cancel()
            try:
                await asyncio.wait({supervisor})
                if self._node is not None:
                    await self._node.end()
                    files.write_state(self._layout, State(self.port))
            finally:
                self._node = None
                self._release()

    def _release(self) -> None:
        if self._owner is not None:
            os.close(self._owner)
            self._owner = None

    async def _adopt(self) -> "_Node | None":
        leftover = await asyncio.to_thread(files.find_leftover, self._layout)
        if leftover is None:
            return None
        node = _Node.adopted(leftover)
        usable = False
        try:
            if leftover.argv == tuple(self._argv(leftover.port)):
                usable = await asyncio.to_thread(_is_our_primary, leftover.port, self._layout)
            if usable:
                files.write_state(self._layout, State(node.port, node.pid, files.started_at(node.pid)))
                _log.info(
                    "took over the MongoDB that a killed relay had left running", pid=node.pid, port=node.port
                )
                return node
            _log.warning("a leftover MongoDB did not answer and was replaced", pid=node.pid)
            await node.end()
            return None
        finally:
            if not usable:
                node.forget()

    async def _begin(self) -> "_Node":
        state = files.read_state(self._layout)
        preferred = state.port if state is not None else None
        for _ in range(PORT_TRIES):
            port = files.choose_port(preferred)
            try:
                return await self._launch(port)
            except PortTakenError:
                preferred = None
        raise EmbeddedError(
            f"mongod found every port taken that it tried ({PORT_TRIES} of them); start again"
        )

    async def _supervise(self, node: "_Node") -> None:
        loop = asyncio.get_running_loop()
        restarting = Restarting("MongoDB")
        while True:
            since = loop.time()
            await asyncio.wait({node.gone})
            _log.error(
                "the embedded MongoDB died; it is started again", pid=node.pid, log=str(self._layout.log)
            )
            node = self._node = await restarting.again(
                lambda: self._launch(self.port), lived=loop.time() - since
            )
            self.restarts += 1
            _log.info("the embedded MongoDB runs again", pid=node.pid, port=node.port, restarts=self.restarts)

    async def _launch(self, port: int) -> "_Node":
        """Start mongod on our data and return it as primary; on any failure nothing of it remains running."""
        deadline = time.monotonic() + START_DEADLINE
        rewritten = False
        while True:
            if not files.port_is_free(port):
                raise PortTakenError(
                    f"port {port} of the embedded MongoDB is taken by another process; stop that one"
                )
            since = files.trim_log(self._layout)
            node = await _Node.started(self._argv(port), port, self._layout)
            primary = False
            try:
                files.write_state(self._layout, State(port, node.pid, files.started_at(node.pid)))
                await _until_listening(node, deadline)
                outcome = await asyncio.to_thread(_make_primary, node, self._layout, deadline)
                primary = outcome is True
                if primary:
                    return node
                if outcome is None or rewritten:
                    raise self._failure(node, since)
                rewritten = True
            finally:
                if not primary:
                    await node.end(0.0 if node.rewritten else END_PATIENCE)

    def _argv(self, port: int) -> list[str]:
        argv = [str(self._binary), "--dbpath", str(self._layout.data), "--replSet", files.REPLICA_SET]
        argv += ["--port", str(port), "--bind_ip", "127.0.0.1", "--nounixsocket"]
        argv += ["--networkMessageCompressors", "disabled", "--oplogSize", "1024"]
        argv += ["--wiredTigerCacheSizeGB", f"{self._cache_gb:g}"]
        argv += ["--logpath", str(self._layout.log), "--logappend", "--quiet"]
        # mongod writes the whole of a slow command into its log, with what people wrote or searched for.
        argv += ["--slowOpSampleRate", "0"]
        for name, value in self._parameters.items():
            argv += ["--setParameter", f"{name}={value}"]
        return argv

    def _failure(self, node: "_Node", since: int) -> EmbeddedError:
        library = files.missing_library(self._layout)
        if library is not None:
            return EmbeddedError(library)
        words = files.last_words(self._layout, since)
        if "already in use" in words:
            return PortTakenError(
                f"port {node.port} of the embedded MongoDB is taken by another process; stop that one"
            )
        if not node.gone.done():
            return EmbeddedError(
                f"mongod is not ready after {START_DEADLINE:.0f} s ({words or 'no error logged'}); see {self._layout.log}"
            )
        cause = words or "it ended without a word"
        if files.disk_is_full(self._layout):
            cause = f"the disk is full, make room there ({cause})"
        return EmbeddedError(f"mongod could not start: {cause} (log: {self._layout.log})")


class _Node:
    """One running mongod: a child of ours, or a leftover that its process descriptor watches. `gone` is done at its end."""

    def __init__(self, pid: int, port: int, gone: asyncio.Future[Any], pidfd: int | None) -> None:
        self.pid = pid
        self.port = port
        self.gone = gone
        self.rewritten = False
        self._pidfd = pidfd

    @classmethod
    async def started(cls, argv: list[str], port: int, layout: Layout) -> "_Node":
        """Start a mongod in a session of its own, so that Ctrl-C on the terminal ends the relay first."""
        # A wrong locale in the environment makes mongod abort before it can say so.
        environment = {**os.environ, "LC_ALL": "C"}
        try:
            # Printed into a file, not a pipe: it must survive us.
            with layout.output.open("wb") as output:
                process = await asyncio.create_subprocess_exec(
                    *argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise EmbeddedError(
                f"{argv[0]} cannot be run here: {error.strerror or error}; "
                "put a working mongod on PATH or name a cluster in RELAY_MONGO_URI"
            ) from error
        gone = asyncio.create_task(process.wait(), name="embedded-mongo-exit")
        node = cls(process.pid, port, gone, _pinned(process.pid))
        gone.add_done_callback(lambda _: node.forget())
        return node

    @classmethod
    def adopted(cls, leftover: Leftover) -> "_Node":
        """Watch and signal a process that is not our child; owns `leftover.pidfd` from now on."""
        loop = asyncio.get_running_loop()
        gone: asyncio.Future[None] = loop.create_future()
        node = cls(leftover.pid, leftover.port, gone, leftover.pidfd)

        def left() -> None:
            node.forget()
            gone.set_result(None)

        loop.add_reader(leftover.pidfd, left)
        return node

    def forget(self) -> None:
        """Stop watching and let go of the descriptor."""
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    async def end(self, patience: float = END_PATIENCE) -> None:
        """SIGTERM, `patience` seconds for the checkpoint, then SIGKILL. EmbeddedError when even that does not end it."""
        for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, KILL_PATIENCE)):
            if self.gone.done():
                return
            if seconds == 0.0:
                continue
            try:
                if self._pidfd is not None:
                    signal.pidfd_send_signal(self._pidfd, number)
                    signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
            except ProcessLookupError:
                pass  # it ended this moment; `gone` follows
            except PermissionError:
                raise EmbeddedError(
                    f"mongod (pid {self.pid}) on our data belongs to another user; stop it as that user"
                ) from None
            await asyncio.wait({self.gone}, timeout=seconds)
        if not self.gone.done():
            raise EmbeddedError(
                f"mongod (pid {self.pid}) does not end on SIGKILL; look at the disk beneath it"
            )


def _pinned(pid: int) -> int | None:
    # Through the descriptor, signals cannot race asyncio's own reaping of the child, nor reach a recycled pid.
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


async def _until_listening(node: _Node, deadline: float) -> None:
    while time.monotonic() < deadline:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", node.port)
        except OSError:
            # Nobody announces the listening socket; the wait is cut short when mongod ends.
            await asyncio.wait({node.gone}, timeout=0.02)
            if node.gone.done():
                return
            continue
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return


@contextmanager
def _admin(port: int, patience: float) -> "Iterator[MongoClient[dict[str, Any]]]":
    wait = int(patience * 1000)
    client: MongoClient[dict[str, Any]] = MongoClient(
        "127.0.0.1",
        port,
        directConnection=True,
        serverSelectionTimeoutMS=wait,
        connectTimeoutMS=wait,
        socketTimeoutMS=wait,
        retryReads=False,
        retryWrites=False,
    )
    try:
        yield client
    finally:
        client.close()


def _is_ours(client: MongoClient[dict[str, Any]], layout: Layout) -> bool:
    options = client.admin.command("getCmdLineOpts")
    return bool(options["parsed"].get("storage", {}).get("dbPath") == str(layout.data))


def _is_our_primary(port: int, layout: Layout) -> bool:
    """Whether a primary on our data answers there within about 2 s."""
    try:
        with _admin(port, ADOPT_PATIENCE) as client:
            return bool(client.admin.command("hello").get("isWritablePrimary")) and _is_ours(client, layout)
    except PyMongoError:
        return False


def _make_primary(node: _Node, layout: Layout, deadline: float) -> bool | None:
    """See the node become primary, as the only member, under its present port (runs in a thread).

    True: primary. False: its stored configuration was corrected, start it again. None: it ended or the deadline passed.
    """
    with _admin(node.port, 5.0) as client:
        reachable_since = time.monotonic()
        known = False
        while time.monotonic() < deadline and not node.gone.done():
            try:
                if not known and not _is_ours(client, layout):
                    raise PortTakenError(f"port {node.port} is answered by another mongod; stop that one")
                known = True
                hello = client.admin.command("hello")
                if hello.get("isWritablePrimary"):
                    return True
                if _correct_member(client, node.port, time.monotonic() - reachable_since):
                    node.rewritten = True
                    return False
                # The server answers as soon as its role changes.
                client.admin.command("hello", topologyVersion=hello["topologyVersion"], maxAwaitTimeMS=100)
            except PyMongoError:
                time.sleep(0.05)
    return None


def _correct_member(client: MongoClient[dict[str, Any]], port: int, waited: float) -> bool:
    """Initiate new data, or tell a member that moved to another port that it is itself.

    Usually a forced reconfiguration does it. But before a member accepts one it dials the address it had, and when
    something listens there and stays silent it waits 30 s for an answer. Then the address is corrected in the stored
    configuration and True asks for a kill and a new start, which takes a second. (A start without
    --replSet to edit it, as is usual for new host names, could skip the replay of the oplog after a crash.)
    """
    address = f"127.0.0.1:{port}"
    stored = client.local["system.replset"]
    config = stored.find_one({"_id": files.REPLICA_SET})
    if config is None:
        client.admin.command(
            "replSetInitiate", {"_id": files.REPLICA_SET, "members": [{"_id": 0, "host": address}]}
        )
        return False
    if config["members"][0]["host"] == address:
        return False
    try:
        current = client.admin.command("replSetGetConfig")["config"]
    except OperationFailure as error:
        if error.code != _NOT_YET_INITIALIZED or waited < SELF_CHECK_PATIENCE:
            return False
        result = stored.update_one({"_id": files.REPLICA_SET}, {"$set": {"members.0.host": address}})
        # In this state j: true returns before the journal is written (measured: lost on a kill); this does not.
        client.admin.command("fsync")
        return result.matched_count == 1
    current["members"][0]["host"] = address
    current["version"] += 1
    client.admin.command("replSetReconfig", current, force=True)
    return False
