"""``scripts/admin``: audit, suspend, unsuspend, reports, user."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Final, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from config.settings import SettingsError
from relay.security.tokens import KeyConfigurationError
from relay.store.audit_chain import End, Verdict
from relay.store.mongo import MongoUnavailable, PyMongoError, brief
from relay.wire.errors import RelayError
from scripts.tools.admin import show
from scripts.tools.admin.base import ADMIN, Desk, Give, desk

_INTERRUPTED: Final = 130
_EXPECT: Final = re.compile(r"([0-9]{1,15}):([0-9a-f]{64})")
_HELP: Final = """For operators: looks at the relay's database and changes it, beside running relays.

Settings are the relay's own: RELAY_MONGO_URI, or RELAY_DATA_DIR (var) while a relay with a MongoDB of its own runs there; the key
of the audit trail is RELAY_PSEUDONYM_KEY, or the file pseudonym-key in RELAY_DATA_DIR. USER is a user id or a user name.
Everything that changes something, or shows what there is about a person, stands in the audit trail, as done by $admin. Exit codes: 0 done, 1 not done or something is wrong, 2 wrong usage."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="\n\n".join(part.replace("\n", " ") for part in _HELP.split("\n\n")),
)
audit = typer.Typer(no_args_is_help=True, help="The audit trail.")
reports = typer.Typer(no_args_is_help=True, help="What people reported.")
user = typer.Typer(no_args_is_help=True, help="One person.")
app.add_typer(audit, name="audit")
app.add_typer(reports, name="reports")
app.add_typer(user, name="user")

Json = Annotated[bool, typer.Option("--json", help="For machines.")]
Who = Annotated[str, typer.Argument(metavar="USER", help="User id or user name.", show_default=False)]
Found = TypeVar("Found")


@audit.command()
def verify(
    expect: Annotated[
        str | None,
        typer.Option(metavar="N:HASH", help="A head that you noted down: the trail must still contain it."),
    ] = None,
    json: Json = False,
) -> None:
    """Reads the whole trail and says whether any entry was edited, removed, inserted or moved."""
    pin = None
    if expect is not None:
        matched = _EXPECT.fullmatch(expect)
        if matched is None:
            raise typer.BadParameter(
                "must look like 1234:<64 hexadecimal digits>, as verify prints it", param_hint="--expect"
            )
        pin = End(int(matched[1]), matched[2])

    async def work() -> Verdict:
        async with desk(verifying=True) as found:
            with Progress(
                TextColumn("reading the trail"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                disable=not sys.stderr.isatty(),
            ) as progress:
                task = progress.add_task("", total=None)
                return await found.audit.verify(
                    lambda done, total: progress.update(task, completed=done, total=total), expect=pin
                )

    verdict = _run(work())
    head = f"{verdict.end.entry}:{verdict.end.hash}"
    if json:
        show.as_json(
            {
                "holds": verdict.holds,
                "entries": verdict.entries,
                "erased": verdict.erased,
                "head": head,
                "problem": verdict.problem,
                "entry": verdict.bad,
            }
        )
    elif not verdict.holds:
        before = f"; entries 1 to {verdict.entries} hold" if verdict.entries else ""
        print(f"admin: the audit trail is broken: {verdict.problem}{before}", file=sys.stderr)
    elif not verdict.entries:
        show.line("the audit trail is empty")
    else:
        erased = f", {verdict.erased} of them without what was erased" if verdict.erased else ""
        show.line(f"the audit trail holds: {verdict.entries} entries{erased}")
        show.line(f"head  {head}")
        print(
            "Note the head down somewhere else. Only then can a whole trail that was replaced be told apart: "
            "audit verify --expect HEAD",
            file=sys.stderr,
        )
    raise typer.Exit(0 if verdict.holds else 1)


@audit.command("list")
def audit_list(
    who: Annotated[
        str | None, typer.Option("--user", help="What this person did or what was done to them.")
    ] = None,
    act: Annotated[str | None, typer.Option(help="Only this act, for example session.open.")] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=1000, help="So many entries, from the last one back.")
    ] = 50,
    json: Json = False,
) -> None:
    """The last entries, newest first. A person who was erased is found by the id they had."""

    async def work() -> list[dict[str, Any]]:
        async with desk() as found:
            wanted = who
            if who is not None:
                try:
                    wanted = await found.user(who)
                except Give:
                    # Erased, or $admin: the trail still knows them.
                    wanted = who.removeprefix("id=")
            return await found.audit.page(limit=limit, user=wanted, act=act)

    entries = _run(work())
    if json:
        show.as_json(entries)
        return
    names = ("entry", "at (UTC)", "act", "actor", "target", "device", "address", "agent", "details")
    rows = [
        [
            entry["entry"],
            show.moment(entry["at"]),
            entry["act"],
            *(entry.get(name) for name in ("actor", "target", "device", "address", "agent")),
            " ".join(f"{name}={_worded(value)}" for name, value in entry.get("details", {}).items()),
        ]
        for entry in entries
    ]
    show.table(names, rows, empty="no such entries; who was erased is found by the id they had")


@app.command()
def suspend(who: Who) -> None:
    """Locks a person out: no log-in, tokens refused, sockets closed within 5 s, found by nobody. Nothing is deleted."""

    async def work(found: Desk, name: str) -> None:
        await found.audit.record("user.suspend", actor=ADMIN, target=name)
        if not await found.people.suspend(name):
            raise Give(f"{name!r} has just been erased")

    name = _run(_changing(who, work))
    show.line(f"{name} is suspended; their connections close within 5 s")


@app.command()
def unsuspend(who: Who) -> None:
    """Lets a suspended person in again. They log in anew."""

    async def work(found: Desk, name: str) -> None:
        await found.audit.record("user.unsuspend", actor=ADMIN, target=name)
        if not await found.people.unsuspend(name):
            raise Give(f"{name!r} has just been erased")

    name = _run(_changing(who, work))
    show.line(f"{name} may log in again")


@reports.command("list")
def reports_list(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="So many, from the oldest open one.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    json: Json = False,
) -> None:
    """The open reports, oldest first."""

    async def work() -> tuple[list[dict[str, Any]], str | None]:
        async with desk() as found:
            page, following = await found.reports.open_page(limit, cursor)
            names = await found.people.names(
                {name for report in page for name in (report.user, report.reporter)}
            )
            return [
                {
                    "id": report.id,
                    "createdAt": report.created_at,
                    "reason": report.reason,
                    "user": report.user,
                    "userName": names.get(report.user),
                    "reporter": report.reporter,
                    "reporterName": names.get(report.reporter),
                    "text": report.text,
                    "conversation": report.conversation,
                    "messages": list(report.messages),
                }
                for report in page
            ], following

    found, following = _run(work())
    if json:
        show.as_json({"items": found, "next": following})
        return
    rows = [
        [
            report["id"],
            show.moment(report["createdAt"]),
            report["reason"],
            _called(report["user"], report["userName"]),
            _called(report["reporter"], report["reporterName"]),
            report["text"],
        ]
        for report in found
    ]
    show.table(
        ("report", "at (UTC)", "reason", "about", "by", "text"), rows, empty="there are no open reports"
    )
    if following is not None:
        print(f"there are more: reports list --cursor {following}", file=sys.stderr)


@reports.command("close")
def reports_close(report: Annotated[str, typer.Argument(help="Its id.", show_default=False)]) -> None:
    """Closes a report: it has been dealt with."""

    async def work() -> None:
        async with desk() as found:
            if not await found.reports.exists(report):
                raise Give(f"there is no report {report!r}")
            # First the record: what is not recorded is not done.
            await found.audit.record("report.close", actor=ADMIN, details={"report": report})
            await found.reports.close(report)

    _run(work())
    show.line(f"report {report} is closed")


@user.command("show")
def user_show(who: Who, json: Json = False) -> None:
    """What there is about one person: account, devices, how many contacts, conversations and reports."""

    async def work() -> dict[str, Any]:
        async with desk() as found:
            name = await found.user(who)
            await found.audit.record("user.show", actor=ADMIN, target=name)
            profile = await found.exports.profile(name) or {}
            devices = [device async for device in found.exports.devices(name)]
            return {"profile": profile, "devices": devices, "counts": await found.exports.counts(name)}

    found = _run(work())
    if json:
        show.as_json(found)
        return
    profile, counts = found["profile"], found["counts"]
    state = (
        "being erased" if "erasingAt" in profile else "suspended" if "suspendedAt" in profile else "active"
    )
    show.facts(
        {
            "id": profile.get("id"),
            "state": state,
            "user name": profile.get("username"),
            "name": profile.get("name"),
            "phone": profile.get("phone"),
            "since": show.moment(profile.get("createdAt")),
            "suspended": show.moment(profile.get("suspendedAt")),
            **{name: str(number) for name, number in counts.items()},
        }
    )
    print()
    rows = [
        [
            device["id"].partition("/")[2],
            device.get("name"),
            device.get("platform"),
            "removed" if "removedAt" in device else "active",
            show.moment(device.get("createdAt")),
            show.moment(device.get("lastSeen")),
        ]
        for device in found["devices"]
    ]
    show.table(
        ("device", "name", "platform", "state", "since (UTC)", "last seen (UTC)"), rows, empty="no devices"
    )


def _worded(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _called(name: str, shown: str | None) -> str:
    return name if shown is None or shown == name else f"{name} ({shown})"


async def _changing(who: str, work: Callable[[Desk, str], Coroutine[Any, Any, None]]) -> str:
    async with desk() as found:
        name = await found.user(who)
        await work(found, name)
        return name


def _run(work: Coroutine[Any, Any, Found]) -> Found:
    try:
        return asyncio.run(work)
    except (Give, SettingsError, KeyConfigurationError, MongoUnavailable, RelayError) as error:
        problem = str(error)
    except PyMongoError as error:
        problem = f"MongoDB refused or did not answer ({brief(error)}); try again"
    except OSError as error:
        problem = str(error)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    print(f"admin: {show.printable(problem)}", file=sys.stderr)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="scripts/admin")
