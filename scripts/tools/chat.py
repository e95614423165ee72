"""Chat from a shell: interactive in a terminal, a pipe otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from relay.client import (
    Device,
    DeviceError,
    Draft,
    Event,
    Message,
    ReadCursor,
    Receipt,
    RequestFailed,
    SessionEnded,
    Token,
    Typing,
)
from relay.security.tokens import KeyConfigurationError, generate_secret, mint
from relay.wire import ids
from scripts.tools import login, stdin
from scripts.tools.groups import Titles, meet
from scripts.tools.names import Names, Unknown, find_user
from scripts.tools.receipts import Receipts
from scripts.tools.screen import Screen, concerned, is_change
from scripts.tools.typing_line import Line, columns, keys

_NAMESPACE: Final = uuid.UUID("5b0a9d0e-4f59-4a3c-9c5e-9a51c2f1d7b4")
_QUEUED: Final = 4096
_AT_ONCE: Final = 512
_HELP: Final = """Chat through the relay from a shell.

With a terminal as standard input it is interactive: every line you enter is a message, Ctrl-D ends. With a file or a pipe
it sends every line, waits until the relay has stored them all, prints a summary to standard error and ends (or stays, with
--listen). Without --to and --conversation it only listens. What arrives goes to standard output: for people on a terminal,
otherwise `sender<TAB>text`, one line a message (line breaks within a message are shown as \\n), or JSON with --json.

A file can be sent again after a crash, a kill or a time-out: run the same command, and it continues exactly where it
stopped. Every line has an id made of user, device, conversation, batch and line number, and an id is sent once. The batch
is the SHA-256 of the file's content; to send the same file twice on purpose, or to go on with a file that has grown, name a
batch with --batch. A pipe (`… | scripts/chat`) has no content to look at beforehand: without --batch, each run is a new one.
The memory of what was sent is the --database.

There are two ways to say who you are. --login NAME is an account at the relay: the password is taken from RELAY_PASSWORD or
asked for, once; the session is then kept next to the database. --to takes user names then. --user ID is a user whose tokens come
from elsewhere: --token, or made here with the relay's secret.
"""


class Give(Exception):
    """What ends the program with exit code 1; ``str()`` is the line for people."""


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for on the command line, checked."""

    user: str
    device: str
    by_name: bool
    to: tuple[str, ...]
    conversation: str | None
    url: str
    token: Token
    database: Path
    listen: bool
    batch: str | None
    as_json: bool
    timeout: float


async def converse(options: Options) -> int:
    """Does what the options say; the exit code."""
    interactive = os.isatty(0) and bool(options.to or options.conversation)
    screen = Screen(options.url, as_json=options.as_json)
    options.database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def show(message: Message) -> None:
        # Ids of elsewhere say more than names that their owners may choose, and scripts rely on them.
        named = options.by_name and not options.as_json
        title = await titles.learn(message.conv) if is_change(message) and not options.as_json else None
        found = await names.of(message.conv, concerned(message)) if named else {}
        screen.on_message(message, found, title or (None, None))
        if interactive and message.conv == screen.conv and message.seq is not None:
            await device.read(message.conv, message.seq)

    async def name_of(conv: str, user: str) -> str:
        found = await names.of(conv, [user]) if options.by_name else {}
        return found.get(user, user)

    async def tell(event: Event) -> None:
        screen.on_event(event)
        if not isinstance(event, Receipt | Typing | ReadCursor) or event.user == options.user:
            return
        if isinstance(event, Receipt):
            if interactive:
                receipts.arrived(event.ids, await name_of(event.conv, event.user))
        elif screen.hints(event):
            screen.hint(event, await name_of(event.conv, event.user))

    device = Device(options.url, options.database, options.token, on_message=show, on_event=tell)
    names, titles, receipts = Names(device.request), Titles(device.request), Receipts(screen.delivered)
    async with device:
        typing = receipts if interactive else None
        work = asyncio.create_task(_work(device, screen, options, typing, titles), name="chat")
        ended = asyncio.create_task(device.stopped(), name="chat-device-ended")
        broken = asyncio.create_task(screen.broken.wait(), name="chat-output-broken")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, work.cancel)
        try:
            await asyncio.wait({work, ended, broken}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ended.result()
            return 0 if broken.done() else await work
        except asyncio.CancelledError:
            if device.queued:
                screen.say(f"{device.queued} messages still wait to be sent; the next start sends them")
            return 130 if device.queued else 0
        finally:
            receipts.close()
            for task in (work, ended, broken):
                task.cancel()
            await asyncio.gather(work, ended, broken, return_exceptions=True)


async def _work(
    device: Device, screen: Screen, options: Options, receipts: Receipts | None, titles: Titles
) -> int:
    """``receipts`` of what is typed, None without a terminal to type on."""
    if not options.to and options.conversation is None:
        await asyncio.Event().wait()
    patience = options.timeout if receipts is None else None
    conv = options.conversation or await _conversation(device, screen, options, patience)
    screen.conv = conv
    if receipts is not None:
        await titles.learn(conv)
        await _type(device, screen, conv, receipts)
        return 0
    code = await _pipe(device, screen, options, conv)
    if options.listen:
        await asyncio.Event().wait()
    return code


async def _conversation(device: Device, screen: Screen, options: Options, patience: float | None) -> str:
    people = sorted(set(options.to))
    name = "conversation with " + " ".join(people)
    known = await device.storage.read_info(name)
    if known is not None:
        return known
    began = time.monotonic()
    while True:
        try:
            conv = await _open(device, options, people)
            break
        except Unknown as error:
            raise Give(str(error)) from None
        except RequestFailed as error:
            if not error.retry:
                raise Give(f"cannot open the conversation with {', '.join(people)}: {error}") from None
            screen.unreachable(str(error))
            pause = (error.retry_after or 0) / 1000
        except OSError as error:
            screen.unreachable(f"no token: {error}")
            pause = 0.0
        if patience is not None and time.monotonic() - began > patience:
            raise Give(f"gave up after {patience:g} s without the relay; nothing was sent")
        await asyncio.sleep(max(0.5, pause))
    await device.storage.write_info(name, conv)
    return conv


async def _open(device: Device, options: Options, people: list[str]) -> str:
    members = people
    if options.by_name:
        members = sorted({await find_user(device.request, who) for who in people})
    body: dict[str, object] = {"type": "direct", "members": members}
    if len(members) > 1:
        reference = uuid.uuid5(_NAMESPACE, "\0".join([options.user, *members]))
        body = {"type": "group", "members": members, "name": ", ".join(people)[:100], "ref": str(reference)}
        return await meet(device.request, {options.user, *members}, body)
    return str((await device.request("POST", "/v1/conversations", body))["id"])


async def _type(device: Device, screen: Screen, conv: str, receipts: Receipts) -> None:
    lines = _typed(screen) if sys.stdout.isatty() and sys.stderr.isatty() else _entered()
    async with contextlib.aclosing(lines):
        async for text in lines:
            if text.strip():
                try:
                    receipts.typed(await device.send(conv, text), text)
                except DeviceError as error:
                    screen.say(str(error))
    await device.settled()


async def _entered() -> AsyncGenerator[str, None]:
    async for found in stdin.lines(0, _AT_ONCE):
        for line in found:
            yield line.decode(errors="replace")


async def _typed(screen: Screen) -> AsyncGenerator[str, None]:
    line = Line(sys.stderr, lambda: columns(2))
    with keys(0) as again:

        def goes_on() -> None:
            again()
            line.show()

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCONT, goes_on)
        screen.line = line
        line.show()
        try:
            while not line.ended and (data := await stdin.read(0)):
                for text in line.typed(data):
                    yield text
        finally:
            loop.remove_signal_handler(signal.SIGCONT)
            screen.line = None
            line.hide()


async def _pipe(device: Device, screen: Screen, options: Options, conv: str) -> int:
    batch = options.batch
    if batch is None:
        batch = await asyncio.to_thread(stdin.content_hash, 0) if stdin.is_regular(0) else str(uuid.uuid4())
    # One hash of everything that stays the same, then only the line number: this is done for every line.
    space = uuid.uuid5(_NAMESPACE, f"{options.user}\0{options.device}\0{conv}\0{batch}")
    began, number, new, bad = time.monotonic(), 0, 0, 0
    try:
        async for found in stdin.lines(0, _AT_ONCE):
            drafts = []
            for line in found:
                number += 1
                try:
                    drafts.append(Draft(conv, str(uuid.uuid5(space, str(number))), line.decode()))
                except UnicodeDecodeError:
                    bad += 1
                    screen.say(f"line {number} is not UTF-8; it is not sent")
            await _progress(screen, options.timeout, lambda: device.room(_QUEUED))
            new += await device.queue(drafts)
    except stdin.LineTooLong:
        bad += 1
        screen.say(
            f"line {number + 1} is longer than {stdin.MAX_LINE} bytes; it and what follows are not sent"
        )
    await _progress(screen, options.timeout, device.settled)
    took = time.monotonic() - began
    earlier = number - new - bad
    parts = [f"{screen.stored} stored in {took:.1f} s ({screen.stored / max(took, 0.001):,.0f}/s)"]
    if earlier > 0:
        parts.append(f"{earlier} queued or sent by an earlier run")
    if screen.failed or bad:
        parts.append(f"{screen.failed + bad} not sent")
    screen.say(f"{number} lines: " + ", ".join(parts))
    return 1 if screen.failed or bad else 0


async def _progress(screen: Screen, patience: float, wait: Callable[[], Awaitable[None]]) -> None:
    """Waits as long as there is progress at least every ``patience`` seconds."""
    while True:
        before = screen.progress
        try:
            async with asyncio.timeout(patience):
                return await wait()
        except TimeoutError:
            if screen.progress == before:
                raise Give(
                    f"gave up after {patience:g} s without progress; run the same command again to go on"
                ) from None


def _tokens(user: str, device: str, given: str | None, data: Path) -> Callable[[], str]:
    if given:
        return lambda: given
    secret = os.environ.get("RELAY_JWT_SECRET")

    def make() -> str:
        path = data / "jwt-secret"
        if secret is None and not path.exists():
            raise FileNotFoundError(
                f"there is no secret in {path} yet; start the relay (make run) or give --token"
            )
        return mint(secret or generate_secret(path), user, device, audience="relay", lifetime=3600)

    return make


def main(
    user: Annotated[str | None, typer.Option(help="Who you are, with a token from elsewhere.")] = None,
    account: Annotated[
        str | None,
        typer.Option(
            "--login",
            metavar="NAME",
            help="Who you are, with an account at the relay: your user name.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Which of your devices this is.")] = "terminal",
    to: Annotated[
        list[str] | None,
        typer.Option(
            help="Whom to write to, several times for a group: a user id, with --login also a user name."
        ),
    ] = None,
    conversation: Annotated[
        str | None, typer.Option(help="The id of a conversation, instead of --to.")
    ] = None,
    url: Annotated[str, typer.Option(envvar="RELAY_URL", help="The relay.")] = "http://127.0.0.1:8080",
    token: Annotated[
        str | None,
        typer.Option(
            envvar="RELAY_TOKEN",
            help="Access token of --user. Default: one is made with the relay's secret, from RELAY_JWT_SECRET or the file "
            "jwt-secret in RELAY_DATA_DIR (var/).",
        ),
    ] = None,
    database: Annotated[
        Path | None,
        typer.Option(
            help="SQLite file. Default: RELAY_DATA_DIR/chat/USER-DEVICE.sqlite, "
            "with --login RELAY_DATA_DIR/chat/accounts/NAME-DEVICE.sqlite."
        ),
    ] = None,
    listen: Annotated[
        bool,
        typer.Option(
            "--listen/--exit-when-done",
            "--follow",
            help="Stay after the last line and print what arrives, until Ctrl-C.",
        ),
    ] = False,
    batch: Annotated[str | None, typer.Option(help="Name of these lines; see above.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line for every message.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Piped: give up after so many seconds without progress.")
    ] = 60,
) -> None:
    """The command; its help is _HELP."""
    if (user is None) == (account is None):
        raise typer.BadParameter("say who you are with --login or --user", param_hint="--login / --user")
    if user is not None and not ids.USER_ID.fullmatch(user):
        raise typer.BadParameter("1 to 128 characters of A-Z a-z 0-9 _ . @ : + -", param_hint="--user")
    if account is not None and not login.USERNAME.fullmatch(account):
        raise typer.BadParameter("3 to 32 characters of A-Z a-z 0-9 . _ -", param_hint="--login")
    if not ids.DEVICE_ID.fullmatch(device):
        raise typer.BadParameter("1 to 64 characters of A-Z a-z 0-9 _ . : -", param_hint="--device")
    if to and conversation:
        raise typer.BadParameter("give --to or --conversation, not both", param_hint="--conversation")
    data = Path(os.environ.get("RELAY_DATA_DIR") or "var")
    # A user and an account of one name are two people.
    name = user if account is None else f"accounts/{account.lower()}"
    file = data / "chat" / f"{name}-{device}.sqlite"
    if database is not None:
        file = Path(os.environ.get("CHAT_CALLER_DIRECTORY") or ".") / database
    url = url.rstrip("/")
    wanted = partial(
        Options,
        by_name=account is not None,
        to=tuple(to or ()),
        conversation=conversation,
        url=url,
        database=file,
        listen=listen,
        batch=batch,
        as_json=as_json,
        timeout=timeout,
    )
    try:
        if account is not None:
            session = login.log_in(url, account, device, file)
            options = wanted(user=session.user, device=session.device, token=session)
        else:
            assert user is not None
            options = wanted(user=user, device=device, token=_tokens(user, device, token, data))
        code = asyncio.run(converse(options))
    except SessionEnded as error:
        print(f"chat: {error}: the same command asks for the password", file=sys.stderr)
        code = 1
    except (Give, login.NoLogin, DeviceError, KeyConfigurationError, OSError) as error:
        print(f"chat: {error}", file=sys.stderr)
        code = 1
    raise typer.Exit(code)


def run() -> None:
    """The program."""
    app = typer.Typer(add_completion=False)
    app.command(help="\n\n".join(part.replace("\n", " ") for part in _HELP.split("\n\n")))(main)
    app(prog_name="scripts/chat")


if __name__ == "__main__":
    run()
