"""``scripts/shard``: setup, status, presplit, move."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from config.settings import SettingsError, load
from models.messages import MESSAGES
from scripts.tools.admin.show import as_json, line, printable
from scripts.tools.shard import plan, show
from scripts.tools.shard.findings import findings
from scripts.tools.shard.layout import HIGHEST, LOWEST, Cluster, Found, Range, Shard, Span, alone, order
from scripts.tools.shard.router import Refused, Router, Say, opened

_INTERRUPTED: Final = 130
_ROUNDS: Final = 3
_WAIT: Final = 60.0
_SHOWN: Final = 20
_MOST_RANGES: Final = 1024
_COUNTED: Final = 100
_BOUND: Final = re.compile(r"[0-9a-f]{1,8}|[0-9a-f]{8}-[0-9a-f-]{0,27}")
_CONVERSATION: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_HELP: Final = """For operators: makes a sharded MongoDB ready for the relay, and says how it is.

Settings are the relay's own: RELAY_MONGO_URI names the cluster's routers (mongos, 6.0 or later), RELAY_MONGO_DATABASE the database.
The user of the URI needs the roles clusterManager and clusterMonitor on admin, and readWrite on the database. What changes something
only says what it would do, until it is told --apply. Relays may run meanwhile. Exit codes: 0 done or as it should be, 1 not done or something is wrong, 2 wrong usage."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="\n\n".join(part.replace("\n", " ") for part in _HELP.split("\n\n")),
)
Apply = Annotated[bool, typer.Option("--apply/--dry-run", help="Do it, or only say what would be done.")]
Wait = Annotated[
    float,
    typer.Option(
        "--wait", metavar="SECONDS", min=0, max=86_400, help="So long it waits while others move ranges."
    ),
]


@app.command()
def setup(
    leaving: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARD",
            help="It is to be removed: its lane is let go, without which MongoDB refuses removeShard.",
        ),
    ] = None,
    apply: Apply = False,
    wait: Wait = _WAIT,
) -> None:
    """Shards messages and fates, spreads empty messages over the shards, and gives each shard's fates a zone. Again after a shard was
    added, or when something came in between: it does what is left."""
    with _errors(), opened(load(), wait) as router:
        found = _leave(_readable(router), leaving or ())
        todo = plan.setup(found)
        if not todo.steps and not todo.problems:
            line(f"{found.database} is set up on {_shards(found)}: nothing to do")
            return
        if apply:
            count = _apply(router, todo.steps)
            for _ in range(_ROUNDS):
                todo = plan.setup(_leave(_readable(router), leaving or ()))
                if not todo.steps:
                    break
                # What was predicted otherwise than it came.
                count += _apply(router, todo.steps)
            done = f"{count} of {count + len(todo.steps)}" if todo.steps else _number(count, "step")
            line(f"{done} done: {found.database} on {_shards(found)}")
        else:
            _tell(todo.steps, "the same with --apply")
        _fail_on(todo.problems)
        if apply and todo.steps:
            raise Refused(
                "not all of it stays done; something else changes the cluster: see scripts/shard status"
            )


@app.command()
def status(
    ranges: Annotated[bool, typer.Option("--ranges", help="Every range, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Shards, what each holds, zones, the balancer, what is not as it should be and what to do about it."""
    with _errors(), opened(load()) as router:
        found = router.read()
        said = findings(found)
        if json:
            as_json(show.as_value(found, said))
        else:
            show.cluster(found, said, ranges=ranges)
        raise typer.Exit(1 if any(one.wrong for one in said) else 0)


@app.command()
def presplit(
    ranges: Annotated[int, typer.Option(min=1, max=256, help="So many ranges on each shard.")] = 1,
    apply: Apply = False,
    populated: Annotated[
        bool, typer.Option("--populated", help="Also when there are messages already, which then move.")
    ] = False,
    wait: Wait = _WAIT,
) -> None:
    """Splits messages evenly over all shards, in ranges of the same size. setup has done it with one range a shard while it was empty."""
    with _errors(), opened(load(), wait) as router:
        found = _readable(router)
        messages = _messages(found)
        if ranges * len(found.takers) > _MOST_RANGES:
            raise Refused(f"that makes more than {_MOST_RANGES} ranges; take fewer")
        todo = plan.presplit(found, ranges)
        if todo.steps and messages.documents and not populated:
            raise Refused(
                f"messages holds {_documents(messages.documents)}; this would move {_moving(router, messages, todo.steps)}, in "
                f"{_number(len(todo.steps), 'step')}. The balancer evens out what is uneven by size; --populated does it all the same"
            )
        if not todo.steps and not todo.problems:
            line(f"messages has {_number(ranges, 'even range')} on each of {_shards(found)}: nothing to do")
            return
        if apply:
            _fail_on(todo.problems)
            _apply(router, todo.steps)
            line(f"{_number(len(todo.steps), 'step')} done: messages is even over {_shards(found)}")
        else:
            _tell(todo.steps, "the same with --apply")
            _fail_on(todo.problems)


@app.command()
def move(
    shard: Annotated[str, typer.Argument(help="Where to.", show_default=False)],
    conversation: Annotated[
        str | None, typer.Option(metavar="ID", help="The range that this conversation lies in.")
    ] = None,
    only: Annotated[bool, typer.Option("--only", help="With --conversation: that one alone.")] = False,
    low: Annotated[
        str | None, typer.Option("--min", metavar="ID", help="From here, the beginning of an id will do.")
    ] = None,
    high: Annotated[
        str | None, typer.Option("--max", metavar="ID", help="Up to here, and without it.")
    ] = None,
    force_jumbo: Annotated[
        bool,
        typer.Option(
            "--force-jumbo",
            help="Also a conversation with more than MongoDB moves at once; no message is stored while it moves.",
        ),
    ] = False,
    apply: Apply = False,
    wait: Wait = _WAIT,
) -> None:
    """Moves one range of messages to a shard, and returns when it is there."""
    if (conversation is None) == (low is None and high is None):
        raise typer.BadParameter(
            "name a range: either --conversation, or --min, --max or both", param_hint="--conversation"
        )
    if only and conversation is None:
        raise typer.BadParameter("goes with --conversation", param_hint="--only")
    for name, value, form in (
        ("--conversation", conversation, _CONVERSATION),
        ("--min", low, _BOUND),
        ("--max", high, _BOUND),
    ):
        if value is not None and not form.fullmatch(value):
            what = (
                "the id of a conversation"
                if form is _CONVERSATION
                else "the beginning of a conversation's id"
            )
            raise typer.BadParameter(f"{value!r} is not {what}, a UUID in lower case", param_hint=name)
    span = Span(LOWEST if low is None else low, HIGHEST if high is None else high)
    if order(span.low) >= order(span.high):
        raise typer.BadParameter("lies above --max", param_hint="--min")
    with _errors(), opened(load(), wait) as router:
        found = _readable(router)
        messages = _messages(found)
        if conversation is not None:
            span = alone(conversation)
            if not only:
                span = next(one.span for one in messages.ranges if one.span.holds(conversation))
        _move(router, found, span, shard, force=force_jumbo, apply=apply)


def _move(router: Router, found: Cluster, span: Span, shard: str, *, force: bool, apply: bool) -> None:
    messages, target = found.collection(MESSAGES), _known(found, shard)
    before = messages.owners(span)
    away = [one for one in before if one.shard != shard]
    if not away:
        line(f"messages {span}: already on {shard}, nothing to do")
        return
    if target.draining:
        raise Refused(f"{shard} is being removed from the cluster; it takes nothing")
    against = plan.against_zone(found, messages, span, shard)
    if against is not None:
        raise Refused(against)
    counted = router.count(messages.wanted, span)
    line(
        f"messages {span}, {'more documents than can be counted' if counted is None else _documents(counted)}"
    )
    _pieces("before", before)
    if not apply:
        line(f"would move {_number(len(away), 'range')} to {shard}")
        line("nothing was changed: the same with --apply does it")
        return
    began = monotonic()
    with _progress(f"moving to {shard}", None) as (_, say):
        router.place(messages.wanted, span, shard, force=force, say=say)
    _pieces("after", router.ranges(messages.wanted, span))
    line(
        f"moved in {monotonic() - began:.1f} s; what has moved away is removed from {', '.join(_names(away))} within 15 minutes"
    )


def _pieces(when: str, pieces: Sequence[Range]) -> None:
    for piece in pieces[:_SHOWN]:
        line(f"  {when:<6}  {piece.span}: on {piece.shard}")
    if len(pieces) > _SHOWN:
        line(f"  {when:<6}  and {len(pieces) - _SHOWN} more, on {', '.join(_names(pieces[_SHOWN:]))}")


def _names(pieces: Sequence[Range]) -> list[str]:
    return sorted({piece.shard for piece in pieces})


def _readable(router: Router) -> Cluster:
    found = router.read()
    if not found.takers:
        raise Refused("the cluster has no shard that takes data; add one first (sh.addShard() in mongosh)")
    if found.problem is not None:
        raise Refused(f"{found.problem}; nothing is changed until all do")
    return found


def _leave(found: Cluster, leaving: Sequence[str]) -> Cluster:
    for name in leaving:
        _known(found, name)
    left = replace(found, leaving=frozenset(leaving))
    if not left.takers:
        raise Refused("no shard would be left that takes data")
    return left


def _known(found: Cluster, name: str) -> Shard:
    shard = found.shard(name)
    if shard is None:
        names = ", ".join(one.name for one in found.shards)
        raise Refused(f"there is no shard {name!r}; there are {names}")
    return shard


def _messages(found: Cluster) -> Found:
    messages = found.collection(MESSAGES)
    if not messages.is_right:
        raise Refused("messages is not sharded as the relay needs it: scripts/shard setup says what to do")
    return messages


def _moving(router: Router, messages: Found, steps: Sequence[plan.Step]) -> str:
    spans = [step.moves for step in steps if step.moves is not None]
    if not spans:
        return "nothing, and make ranges smaller"
    counts = [router.count(messages.wanted, span) for span in spans[:_COUNTED]]
    known = sum(count for count in counts if count is not None)
    exact = len(spans) <= _COUNTED and None not in counts
    return _documents(known) if exact else f"{known:,} documents or more"


def _tell(steps: Sequence[plan.Step], how: str) -> None:
    for number, step in enumerate(steps[:_SHOWN], 1):
        line(f"{number:>3}  {step.text}")
    if len(steps) > _SHOWN:
        line(f"     and {len(steps) - _SHOWN} more")
    if steps:
        line(f"nothing was changed: {how} does it")


def _apply(router: Router, steps: Sequence[plan.Step]) -> int:
    with _progress("changing the cluster", len(steps)) as (advance, say):
        for step in steps:
            step.do(router, say)
            advance(step.text)
    return len(steps)


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[tuple[Callable[[str], None], Say]]:
    """What tells that a step is done, and what is being waited for. A bar on terminals."""
    on_terminal = sys.stderr.isatty()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *([] if total is None else [MofNCompleteColumn()]),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not on_terminal,
        redirect_stdout=sys.stdout.isatty(),
    ) as progress:
        task = progress.add_task(what, total=total)

        def advance(text: str) -> None:
            progress.advance(task)
            line(f"done  {text}")

        def say(text: str) -> None:
            if on_terminal:
                progress.update(task, description=text)
            else:
                print(f"shard: {printable(text)}", file=sys.stderr)

        yield advance, say


def _fail_on(problems: Sequence[str]) -> None:
    if problems:
        raise Refused("\n".join(problems))


def _shards(found: Cluster) -> str:
    return _number(len(found.takers), "shard")


def _documents(count: int) -> str:
    return _number(count, "document")


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
        return
    except (Refused, SettingsError) as error:
        problem = str(error)
    except KeyboardInterrupt:
        print(
            "\nshard: interrupted; MongoDB finishes the step that was under way. The same again does the rest",
            file=sys.stderr,
        )
        raise typer.Exit(_INTERRUPTED) from None
    for text in problem.split("\n"):
        print(f"shard: {printable(text)}", file=sys.stderr)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="scripts/shard")
