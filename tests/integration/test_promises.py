"""The eight promises, kept whatever happens: made-up lives of people, devices, nodes and groups against a model of them.

Two nodes work on one database and cannot tell each other anything, as when Redis is away. A failure prints its steps, and a
line ``@reproduce_failure(...)`` to put over the test that failed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
import structlog
import uvloop
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from relay.jobs.expiry import Expiry
from relay.jobs.parts import Parts
from relay.store.embedded import EmbeddedMongo
from relay.store.ledger import OUTCOMES
from relay.wire.ids import PARTS_KEY, new_id
from tests.support.databases import Databases
from tests.support.lives import LEASE, Life, begin, mortal, task_factory
from tests.support.node import NodeFactory
from tests.support.phone import LOST, Phone
from tests.support.promises import Broken, Message, Model, waiting_in

PEOPLE: Final = ("ann", "bob", "cleo", "dan")
INLINE: Final = 2
WINDOW: Final = 4
TTL: Final = 3600
QUOTA: Final = 6
"""Messages that wait for one device."""
OLD: Final = 40 * 24 * 3600 * 1000
"""Longer than any message waits (ms)."""
TOO_LARGE: Final = "x" * 70_000
JOBS: Final = ("sweep", "parts", "doubts", "releases", "repair", "revocations")
NODES: Final = ("east", "west")
EAST: Final = 0
WEST: Final = 1
CRASH_EVERY: Final = 5
"""A node dies in at most one of so many steps: it takes longer than everything else."""

Result = TypeVar("Result")
Number = st.integers(0, 7)
Node = st.integers(0, 1)
Early = st.sampled_from((0, 0, 1, 2))
Doer = Callable[[], Awaitable[Any]]
Step = Callable[..., None]


def crashing(**choices: Any) -> Callable[[Step], Step]:
    """A rule by which a node dies; after so many it is none any more. What depends on time must not decide on that, or what
    failed could not be played again."""

    def made(step: Step) -> Step:
        @wraps(step)
        def counted(machine: Promises, **chosen: Any) -> None:
            machine.crashes += 1
            step(machine, **chosen)

        made_rule: Any = rule(**choices)
        may_crash: Any = precondition(lambda machine: machine.crashes < machine.world.crashes)
        found: Step = may_crash(made_rule(counted))
        return found

    return made


class World:
    """One event loop and one database for all examples; two fresh nodes for each."""

    def __init__(self, runner: asyncio.Runner, uri: str, directory: Path) -> None:
        self.runner = runner
        self.crashes = 0
        self.checks = 0
        self.recounts = 0
        self.examples = itertools.count(1)
        runner.get_loop().set_task_factory(task_factory)  # type: ignore[arg-type]  # typeshed wants a protocol
        self.factory: NodeFactory = self.run(self._made(uri, directory))
        self.db: Any = None
        self.failure: BaseException | None = None

    async def _made(self, uri: str, directory: Path) -> NodeFactory:
        return NodeFactory(uri, directory, Databases())

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Does it to the end."""
        try:
            return self.runner.run(work)
        except Exception as failure:
            self.failure = self.failure or failure
            raise

    async def begin(self, name: str) -> Life:
        """Starts a node."""
        life = await begin(
            self.factory,
            name,
            inline_recipients=INLINE,
            window=WINDOW,
            mailbox_messages=QUOTA,
            heartbeat_seconds=600,
        )
        life.node.relay.context.quotas.lease = 0
        self.db = life.node.db
        return life


class Promises(RuleBasedStateMachine):
    """Numbers in rules choose among what there is, so that every sequence of steps means something."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.run = world.run
        self.lives: list[Life] = []
        self.past: list[Life] = []
        self.phones: list[Phone] = []
        self.model = Model([])
        self.begun = False
        self.crashes = 0
        self.leftovers: set[str] = set()
        self.poison: set[str] = set()
        self.latched: set[str] = set()
        self.overfilled = False

    @initialize(connected=st.lists(st.integers(0, 3), min_size=4, max_size=4))
    def start(self, connected: list[int]) -> None:
        """Two nodes, four people, a group of all, two of them in pairs; most are there."""
        self.run(self._start(connected))

    async def _start(self, connected: list[int]) -> None:
        number = next(self.world.examples)
        self.lives = [await self.world.begin(name) for name in NODES]
        await self.world.db.messages.delete_many({})
        self.phones = [Phone(f"{user}{number}", name) for user in PEOPLE for name in ("phone", "tablet")]
        self.model = Model(self.phones)
        await self._form_group([0, 1, 2, 3], EAST)
        for other in (2, 4):
            await self._meet(self.phones[0], self.phones[other], WEST)
        await asyncio.gather(
            *(
                self.phones[2 * place].connect(self.lives[place % 2])
                for place, is_there in enumerate(connected)
                if is_there
            )
        )
        self.begun = True

    # -- devices ---------------------------------------------------------------------------------------------------------

    @rule(phone=Number, node=Node)
    def connect(self, phone: int, node: int) -> None:
        """A device connects; a second connection takes the first one's place."""
        self.run(self._phone(phone).connect(self.lives[node]))

    @rule(phone=Number)
    def disconnect(self, phone: int) -> None:
        """A device goes."""
        self.run(self._phone(phone).disconnect())

    @rule(phone=Number, node=Node)
    def fetch(self, phone: int, node: int) -> None:
        """A device reads what waits over HTTP, and does not acknowledge it."""
        self.run(self._phone(phone).fetch(self.lives[node]))

    # -- messages --------------------------------------------------------------------------------------------------------

    @rule(
        phone=Number, conv=Number, node=Node, after=st.booleans(), ttl=st.integers(0, 4), twice=st.booleans()
    )
    def send(self, phone: int, conv: int, node: int, after: bool, ttl: int, twice: bool) -> None:
        """A message, over the connection or, without one, over HTTP; perhaps again at once, while it waits."""
        message = self._new(phone, conv, after=after, ttl=TTL if ttl == 4 else None)
        self.run(self._send(message, self.lives[node]))
        if twice and message.refused is None:
            self.run(self._send(message, self.lives[1 - node], again=True))

    @rule(phone=Number, other=Number, conv=Number)
    def converse(self, phone: int, other: int, conv: int) -> None:
        """A device gets a message that the fast node has numbered, replies to it through the slow one, and adds something
        that is no reply."""
        if phone != other:
            self.run(self._converse(self._new(phone, conv), self._phone(other)))

    async def _converse(self, first: Message, replier: Phone) -> None:
        await self._send_through(first, EAST)
        west = self.lives[WEST]
        if not replier.connected or replier.life is not west:
            await replier.connect(west)
        await replier.fetch(west)
        if replier.user not in self.model.ever[first.conv]:
            return
        for after in (True, False):
            await self._send(self._message(replier, first.conv, after=after), west)

    @rule(phone=Number, conv=Number, count=st.integers(2, 7))
    def burst(self, phone: int, conv: int, count: int) -> None:
        """Several messages in one frame, some as replies."""
        sender = self._phone(phone)
        messages = [self._new(phone, conv, after=number % 3 == 0) for number in range(count)]
        if sender.connected:
            self.run(self._burst(sender, messages))

    async def _burst(self, sender: Phone, messages: Sequence[Message]) -> None:
        for message in messages:
            self.model.attempt(message)
        turns = [sender.take_turn() for _ in messages]
        found = await sender.send_several(messages[0].conv, [message.operation() for message in messages])
        for message, turn, one in zip(messages, turns, found, strict=True):
            self.model.outcome(message, one)
            self._check_sent(message, turn, one)

    @rule(which=st.integers(0, 30), node=Node)
    def resend(self, which: int, node: int) -> None:
        """A message again, through whatever node the sender has at hand."""
        message = self._sent(which)
        if message is not None:
            self.run(self._send(message, self.lives[node], again=True))

    @rule(which=st.integers(0, 30), node=Node)
    def withdraw(self, which: int, node: int) -> None:
        """The sender takes a message back."""
        message = self._sent(which)
        if message is not None and self._may_be_withdrawn(message):
            self.run(self._send(self._withdrawal(message), self.lives[node]))

    @rule(which=st.integers(0, 30))
    def ask_status(self, which: int) -> None:
        """The sender asks what became of a message."""
        message = self._sent(which)
        if message is not None and message.phone.connected:
            self.run(self._ask_status(message))

    async def _ask_status(self, message: Message) -> None:
        found = await message.phone.status(message.conv, message.id)
        if found is not None:
            self.model.check_status(message, found)

    # -- acknowledgements ------------------------------------------------------------------------------------------------

    @rule(phone=Number, part=st.integers(1, 3), twice=st.booleans())
    def acknowledge(self, phone: int, part: int, twice: bool) -> None:
        """A device acknowledges all, half or a third of what it has, once or twice."""
        self.run(self._acknowledge(self._phone(phone), part, 2 if twice else 1))

    @rule(phone=Number, part=st.integers(1, 3), node=Node)
    def acknowledge_over_http(self, phone: int, part: int, node: int) -> None:
        """The same over HTTP, through any node."""
        self.run(self._acknowledge(self._phone(phone), part, 1, self.lives[node]))

    @rule(doors=st.lists(st.integers(0, 2), min_size=8, max_size=8))
    def acknowledge_together(self, doors: list[int]) -> None:
        """Everybody acknowledges at the same moment, over the connection, over HTTP through the other node, or both."""
        self.run(self._together(doors))

    async def _together(self, doors: Sequence[int] = (0,) * 8) -> None:
        await asyncio.gather(
            *(
                self._acknowledge_by(phone, doors[place])
                for place, phone in enumerate(self.phones)
                if not phone.is_removed
            )
        )
        await self._idle()
        await self._check_emptied()

    async def _acknowledge_by(self, phone: Phone, door: int) -> None:
        over = self.lives[0] if phone.life is self.lives[1] else self.lives[1]
        await asyncio.gather(
            *(self._acknowledge(phone, 1, 1, life) for life in ((None,), (over,), (None, over))[door])
        )

    async def _acknowledge(self, phone: Phone, part: int, times: int, over: Life | None = None) -> None:
        if over is None and not phone.connected:
            return
        if phone.connected:
            await phone.caught_up()
        # As they came: ids are made at random, and what failed is to be played again.
        wanted = list(phone.unacknowledged)[::part]
        if wanted:
            await asyncio.gather(*(phone.acknowledge(wanted, over=over) for _ in range(times)))

    @rule(phone=Number, conv=Number)
    def read(self, phone: int, conv: int) -> None:
        """A person has read all that one of their devices has of a conversation."""
        reader, name = self._phone(phone), self._own(phone, conv)
        held = reader.held(name)
        if reader.connected and held is not None:
            self.run(self._read(reader, name, held))

    async def _read(self, reader: Phone, conv: str, up_to: int) -> None:
        self.model.read(conv, reader.user, up_to, await reader.read(conv, up_to))
        await self._check_read()

    async def _check_read(self) -> None:
        rows = self.world.db.memberships.find({"conversationId": {"$in": list(self.model.members)}})
        self.model.check_read([row async for row in rows])

    # -- harm and neglect ------------------------------------------------------------------------------------------------

    @rule(phone=Number, conv=Number, node=Node, more=st.integers(1, 4))
    def overfill(self, phone: int, conv: int, node: int, more: int) -> None:
        """As many messages as wait for a device at most, and then some more."""
        # Who is full misses most of what the other rules send.
        if self.overfilled:
            return
        self.overfilled = True
        sender, name = self._phone(phone), self._own(phone, conv)
        self.run(self._overfill(sender, name, self.lives[node], more))

    async def _overfill(self, sender: Phone, conv: str, life: Life, more: int) -> None:
        for _ in range(QUOTA):
            await self._send(self._message(sender, conv), life)
        await self._count_mailboxes()
        await self._look_who_is_full()
        for _ in range(more):
            await self._send(self._message(sender, conv), life)

    async def _count_mailboxes(self) -> None:
        """Both nodes count what waits; who has too much is full then."""
        # The second time what the other one has told.
        for life in (*self.lives, *self.lives):
            await life.job("quotas")
        if not self.crashes:
            waiting = Counter(key for one in await self._documents() for key in one["awaiting"])
            self.model.check_bounded(waiting, await self._full(), 2 * QUOTA)

    @rule(phone=Number)
    def take_nothing(self, phone: int) -> None:
        """A device takes nothing any more, for as long as it has nothing to say."""
        self._phone(phone).slow_down()

    @rule(phone=Number, conv=Number, kind=st.integers(0, 2))
    def poison_store(self, phone: int, conv: int, kind: int) -> None:
        """Something that is no message lies first in a mailbox."""
        if len(self.poison) < 2:
            self.run(self._poison_store(self._phone(phone), self._own(phone, conv), kind))

    async def _poison_store(self, phone: Phone, conv: str, kind: int) -> None:
        harm: dict[str, Any] = ({}, {"sender": "nobody"}, {"sender": {"user": "x"}, "deliveredTo": 7})[kind]
        found = {
            "_id": f"{conv} {new_id()}",
            "conversationId": conv,
            "seq": 1,
            "awaiting": [phone.key],
            "createdAt": datetime.now(UTC),
            **harm,
        }
        self.poison.add(found["_id"])
        await self.world.db.messages.insert_one(found)

    @rule(one=st.integers(0, 3), other=st.integers(0, 3), blocks=st.booleans(), node=Node, conv=Number)
    def block(self, one: int, other: int, blocks: bool, node: int, conv: int) -> None:
        """Somebody blocks somebody, or does so no longer, and both write where both are."""
        if one == other:
            return
        pair = [self.phones[2 * one], self.phones[2 * other]]
        self.run(self._block(pair[0], pair[1].user, blocks, self.lives[node]))
        shared = [
            name for name, users in self.model.members.items() if {phone.user for phone in pair} <= users
        ]
        for phone in pair if shared else ():
            message = self._message(phone, shared[conv % len(shared)])
            self.run(self._send(message, self.lives[1 - node]))

    async def _block(self, blocker: Phone, user: str, blocks: bool, life: Life) -> None:
        answered = await blocker.request(life, "PATCH", f"/v1/contacts/{user}", {"blocked": blocks})
        if answered is None or answered[0] not in ((200,) if blocks else (200, 404)):
            raise Broken(6, f"{blocker.user} could not block {user}: {answered}")
        (self.model.blocks.add if blocks else self.model.blocks.discard)((blocker.user, user))

    @rule(person=st.integers(0, 3), node=Node)
    def remove_tablet(self, person: int, node: int) -> None:
        """Somebody's second device is lost, and removed."""
        tablet = self.phones[2 * person + 1]
        if tablet.known:
            self.run(self._remove_tablet(self.phones[2 * person], tablet, self.lives[node]))

    async def _remove_tablet(self, owner: Phone, tablet: Phone, life: Life) -> None:
        token = life.node.token(tablet.user, tablet.device)
        tablet.is_removed = True
        answered = await owner.request(life, "DELETE", f"/v1/auth/devices/{tablet.device}")
        if answered is None or answered[0] != 200:
            raise Broken(6, f"{tablet.key} could not be removed: {answered}")
        self.model.removed(tablet)
        for one in self.lives:
            await one.job("revocations")
            if not await tablet.is_shut_out(one, token):
                raise Broken(4, f"{tablet.key} was removed, and is still let in")
        if not await tablet.cut_loose():
            raise Broken(4, f"{tablet.key} was removed, and keeps its connection")

    @rule(phone=Number, conv=Number, node=Node)
    def send_too_much(self, phone: int, conv: int, node: int) -> None:
        """A message that is larger than any may be is refused, and nothing else is."""
        message = self._new(phone, conv)
        message.body = TOO_LARGE
        self.run(self._send(message, self.lives[node], allowed=("too_large",)))
        if message.refused is None:
            raise Broken(7, f"a body of {len(TOO_LARGE)} bytes was not refused")

    # -- members ---------------------------------------------------------------------------------------------------------

    @rule(people=st.lists(st.integers(0, 3), min_size=2, max_size=4, unique=True), node=Node)
    def form_group(self, people: list[int], node: int) -> None:
        """The first of these makes a group of them."""
        if len(self.model.groups) < 3:
            self.run(self._form_group(people, node))

    async def _form_group(self, people: Sequence[int], node: int) -> None:
        creator, *others = [self.phones[2 * person] for person in people]
        body = {"type": "group", "members": [other.user for other in others], "name": "group"}
        answered = await creator.request(self.lives[node], "POST", "/v1/conversations", body)
        if answered is None:
            return
        if answered[0] == 403 and any(self.model.are_apart(creator.user, other.user) for other in others):
            return
        if answered[0] != 201:
            raise Broken(6, f"a group was refused: {answered}")
        conv = answered[1]["id"]
        self.model.groups.append(conv)
        self.model.admins[conv] = creator.user
        self.model.joined(conv, [creator.user, *(other.user for other in others)])
        self.model.tell(conv, "created")

    @rule(one=st.integers(0, 3), other=st.integers(0, 3), node=Node)
    def meet(self, one: int, other: int, node: int) -> None:
        """Two people write to each other from now on."""
        if one != other:
            self.run(self._meet(self.phones[2 * one], self.phones[2 * other], node))

    async def _meet(self, one: Phone, other: Phone, node: int) -> None:
        body = {"type": "direct", "members": [other.user]}
        answered = await one.request(self.lives[node], "POST", "/v1/conversations", body)
        if answered is not None and answered[0] == 403 and self.model.are_apart(one.user, other.user):
            return
        if answered is None or answered[0] not in (200, 201):
            raise Broken(6, f"a direct conversation was refused: {answered}")
        conv = answered[1]["id"]
        if conv not in self.model.directs:
            self.model.directs.append(conv)
            self.model.joined(conv, [one.user, other.user])

    @rule(conv=Number, person=st.integers(0, 3), node=Node)
    def add(self, conv: int, person: int, node: int) -> None:
        """The admin adds somebody."""
        group, admin = self._group(conv)
        self.run(self._add(group, admin, self.phones[2 * person].user, self.lives[node]))

    async def _add(self, group: str, admin: Phone, user: str, life: Life) -> None:
        is_new = user not in self.model.members[group]
        answered = await admin.request(life, "POST", f"/v1/conversations/{group}/members", {"users": [user]})
        if answered is None:
            return
        if answered[0] == 403 and self.model.are_apart(admin.user, user):
            return
        if answered[0] != 200:
            raise Broken(6, f"adding was refused: {answered}")
        self.model.joined(group, [user])
        if is_new:
            self.model.tell(group, "added", user)

    @rule(conv=Number, person=st.integers(0, 3), leaves=st.booleans(), node=Node)
    def remove(self, conv: int, person: int, leaves: bool, node: int) -> None:
        """The admin removes somebody, or they leave."""
        group, admin = self._group(conv)
        leaver = self.phones[2 * person]
        if leaver.user != admin.user and leaver.user in self.model.members[group]:
            self.run(self._remove(group, leaver if leaves else admin, leaver.user, self.lives[node]))

    async def _remove(self, group: str, actor: Phone, user: str, life: Life) -> None:
        stored = self.model.going(group, user)
        answered = await actor.request(life, "DELETE", f"/v1/conversations/{group}/members/{user}")
        if answered is None:
            return
        if answered[0] != 200:
            raise Broken(6, f"removing was refused: {answered}")
        self.model.gone(group, user, stored)
        self.model.tell(group, "left" if actor.user == user else "removed", user)

    @rule(conv=Number, person=st.integers(0, 3), phone=Number, node=Node)
    def remove_while_sending(self, conv: int, person: int, phone: int, node: int) -> None:
        """Somebody is removed through one node while another member sends through the other."""
        group, admin = self._group(conv)
        user, sender = self.phones[2 * person].user, self._phone(phone)
        if user in (admin.user, sender.user) or user not in self.model.members[group]:
            return
        if sender.user in self.model.members[group]:
            self.run(self._remove_while_sending(group, admin, user, sender, node))

    async def _remove_while_sending(
        self, group: str, admin: Phone, user: str, sender: Phone, node: int
    ) -> None:
        messages = [Message(group, new_id(), sender, "text", f"beside {n}") for n in range(3)]
        await asyncio.gather(
            self._remove(group, admin, user, self.lives[node]),
            *(self._send(message, self.lives[1 - node], perhaps=[user]) for message in messages),
        )
        self.model.going(group, user)

    # -- time and death --------------------------------------------------------------------------------------------------

    @rule(phones=st.lists(Number, max_size=2))
    def time_passes(self, phones: list[int]) -> None:
        """More time than any message with a time to live has; both nodes find that, while somebody acknowledges."""
        for message in self.model.messages.values():
            message.expired = message.expired or message.ttl is not None
        self.run(self._expire([self._phone(phone) for phone in phones]))

    async def _expire(self, phones: Sequence[Phone], passed: int = 2 * TTL * 1000) -> None:
        contexts = [life.node.relay.context for life in self.lives]
        later = contexts[0].clock.now() + passed
        await asyncio.gather(
            *(Expiry(context.messages, context.endings, lambda: later).run() for context in contexts),
            *(self._acknowledge(phone, 1, 1) for phone in phones),
        )

    @rule(node=Node, job=st.sampled_from(JOBS))
    def job(self, node: int, job: str) -> None:
        """One round of a job."""
        self.run(self.lives[node].job(job))

    @crashing(node=Node)
    def crash(self, node: int) -> None:
        """A node dies while it has nothing to do, and starts anew."""
        self.run(self._crash(node, None))

    @crashing(node=Node, at=Early, after=st.booleans(), phone=Number, conv=Number, reader=Number)
    def crash_while_sending(
        self, node: int, at: int, after: bool, phone: int, conv: int, reader: int
    ) -> None:
        """A node dies at one of the writes that a message takes, and somebody looks what is there."""
        message = self._new(phone, conv)
        self.lives[node].dies(at, after=after)
        self.run(self._crash(node, lambda: self._send_through(message, node)))
        self.run(self._phone(reader).fetch(self.lives[node]))

    @crashing(node=Node, at=st.integers(0, 3), after=st.booleans(), which=st.integers(0, 30))
    def crash_while_sending_again(self, node: int, at: int, after: bool, which: int) -> None:
        """A node dies at one of the writes that a resend takes."""
        message = self._sent(which)
        if message is not None:
            self.lives[node].dies(at, after=after)
            self.run(self._crash(node, lambda: self._send_through(message, node, again=True)))

    @crashing(node=Node, at=st.integers(0, 3), after=st.booleans(), which=st.integers(0, 30))
    def crash_while_withdrawing(self, node: int, at: int, after: bool, which: int) -> None:
        """A node dies at one of the writes that a withdrawal takes."""
        message = self._sent(which)
        if message is not None and self._may_be_withdrawn(message):
            withdrawal = self._withdrawal(message)
            self.lives[node].dies(at, after=after)
            self.run(self._crash(node, lambda: self._send_through(withdrawal, node)))

    @crashing(node=Node, at=st.integers(0, 4), after=st.booleans(), phone=Number)
    def crash_while_acknowledging(self, node: int, at: int, after: bool, phone: int) -> None:
        """A node dies at one of the writes that acknowledgements take."""
        life = self.lives[node]
        life.dies(at, after=after)
        self.run(self._crash(node, lambda: self._acknowledge(self._phone(phone), 1, 1, life)))

    @crashing(node=Node, at=st.integers(0, 9), after=st.booleans(), conv=Number, person=st.integers(0, 3))
    def crash_while_changing(self, node: int, at: int, after: bool, conv: int, person: int) -> None:
        """A node dies at one of the writes that adding or removing a member takes."""
        group, admin = self._group(conv)
        user, life = self.phones[2 * person].user, self.lives[node]
        if user == admin.user:
            return
        life.dies(at, after=after)
        if user in self.model.members[group]:
            self.run(self._crash(node, lambda: self._remove(group, admin, user, life)))
        else:
            self.model.ever[group].add(user)
            self.run(self._crash(node, lambda: self._add(group, admin, user, life)))
        self.run(self._learn_members(group))

    @crashing(node=Node, at=st.integers(0, 3), after=st.booleans(), phone=Number)
    def crash_while_connecting(self, node: int, at: int, after: bool, phone: int) -> None:
        """A node dies at one of the writes that an arrival takes."""
        life = self.lives[node]
        life.dies(at, after=after)
        self.run(self._crash(node, lambda: self._phone(phone).connect(life)))

    async def _crash(self, node: int, doing: Doer | None) -> None:
        life = self.lives[node]
        if doing is not None:
            task = asyncio.ensure_future(doing())
            death = asyncio.create_task(life.dead.wait())
            await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED, timeout=10)
            death.cancel()
        await life.kill()
        for phone in self.phones:
            if phone.life is life:
                await phone.cut_off()
        if doing is not None:
            async with asyncio.timeout(10):
                await task
        self.past.append(life)
        # As if ten seconds had passed: nobody takes it for alive.
        await self.world.db.nodes.delete_many({"_id": life.node.relay.context.revisions._node})
        await self.lives[1 - node].idle()
        # What its acknowledgements have emptied, and it could not delete any more, is left to the sweep.
        self.leftovers.update(await self._emptied())
        self.lives[node] = await self.world.begin(life.name)
        await self._balance()

    async def _learn_members(self, group: str) -> None:
        """Whoever comes next finishes what was under way; then it is known who is a member."""
        await self.lives[0].job("repair")
        rows = self.world.db.memberships.find({"conversationId": group, "removedAt": None})
        self.model.are_members(group, {row["user"] async for row in rows})
        for user in {phone.user for phone in self.phones} - self.model.members[group]:
            if user in self.model.ever[group]:
                self.model.going(group, user)
        await self.lives[0].idle()
        await self._balance()

    async def _balance(self) -> None:
        """A node that starts counts what waits as its own, though it may be in the other's books."""
        waiting = waiting_in(await self._documents())
        self.model.lost = self._booked() - waiting

    # -- what must hold --------------------------------------------------------------------------------------------------

    @invariant()
    def keeps(self) -> None:
        """What can be seen at every moment."""
        if self.begun:
            self.run(self._check())

    async def _check(self) -> None:
        self.world.checks += 1
        for life in self.lives:
            if life.node.relay.fault is not None:
                raise Broken(6, f"{life.name} failed: {life.node.relay.fault!r}")
        await self._idle()
        await self._look_who_is_full()
        documents = await self._documents()
        awake = [phone for phone in self.phones if phone.connected and not phone.is_slow]
        await asyncio.gather(*(phone.caught_up() for phone in awake))
        self.model.check_phones()
        await self._check_emptied()
        doubtful = self.model.doubtful(documents)
        self.model.check_doubtful(doubtful, await self._fates(doubtful))
        self.model.check_window(WINDOW)
        self.model.check_waiting(documents)
        trimmed = (life.node.relay.context.ledger.count("trimmed") for life in (*self.past, *self.lives))
        self.model.check_trimmed(sum(trimmed), crashed=bool(self.crashes))
        wrong = self._booked() - self.model.lost - waiting_in(documents)
        if sum(life.doubts_its_books() for life in self.lives):
            # Both have ended the same messages, and know it: a recount would find this.
            self.world.recounts += 1
            self.model.lost += wrong
        elif wrong:
            books = [
                {name: life.node.relay.context.ledger.count(name) for name in OUTCOMES} for life in self.lives
            ]
            raise Broken(8, f"{wrong} deliveries are accounted for wrongly: {books}")

    async def _look_who_is_full(self) -> None:
        """Mailboxes become full when they are counted; from one look to the next they only cease to be."""
        before, self.latched = self.latched, await self._full()
        if before - self.latched:
            # A node leaves them out for as long as it believes what it has read.
            await asyncio.sleep(3 * LEASE)
        self.model.are_full(self.latched, set())

    async def _full(self) -> set[str]:
        devices = self.world.db.devices.find({"fullSince": {"$exists": True}}, {"_id": 1})
        found = {row["_id"] async for row in devices}
        async for row in self.world.db.users.find({"full": {"$exists": True}}, {"full": 1}):
            found |= {f"{row['_id']}/{'*' if part == 'any' else '!'}" for part in row["full"]}
        return found

    async def _idle(self) -> None:
        for life in self.lives:
            await life.idle()

    def _booked(self) -> int:
        """What waits, as the nodes' books say."""
        return sum(life.node.relay.context.ledger.waiting for life in self.lives)

    def teardown(self) -> None:
        """Everybody comes, gets everything and acknowledges it; then every account is settled."""
        try:
            if self.begun:
                self.run(self._end())
        finally:
            self.run(self._clear())

    async def _end(self) -> None:
        for life in self.lives:
            await life.job("repair")
        await self._count_mailboxes()
        await self._look_who_is_full()
        pending = [
            one
            for one in self.model.messages.values()
            if one.seq is None and one.refused is None and not one.phone.is_removed
        ]
        for message in pending:
            await self._send(message, self.lives[0], again=True)
        await self._count_mailboxes()
        for place, phone in enumerate(self.phones):
            # Who never had a device has one now.
            if (phone.known is not False or phone.device == "phone") and not phone.is_removed:
                await phone.connect(self.lives[place % 2])
        async with asyncio.timeout(20):
            while not await self._is_drained():
                await asyncio.sleep(0.01)
        await self._count_mailboxes()
        if full := {phone.key for phone in self.phones if phone.connected} & await self._full():
            raise Broken(3, f"{full} have drained, and are still full")
        for message in self.model.messages.values():
            if message.seq is not None and not message.phone.is_removed:
                await self._send(message, self.lives[1], again=True)
        await self._check()
        await self._check_read()
        self.model.check_gaps(crashed=bool(self.crashes))
        self.model.check_end(await self._fates({one.doc_id for one in self.model.messages.values()}))

    async def _fates(self, doc_ids: set[str]) -> dict[str, tuple[str, int]]:
        found: dict[str, tuple[str, int]] = {}
        if doc_ids:
            rows = self.world.db.fates.find({"entries.id": {"$in": list(doc_ids)}}).sort("at", 1)
            async for group in rows:
                for entry in group["entries"]:
                    found.setdefault(entry["id"], (entry["fate"], entry["seq"]))
        return {doc_id: found[doc_id] for doc_id in doc_ids & found.keys()}

    async def _is_drained(self) -> bool:
        await self._together()
        # As if the time of every claim and release had come.
        now = datetime.now(UTC)
        await self.world.db.releases.update_many({"dueAt": {"$gt": now}}, {"$set": {"dueAt": now}})
        for life in self.lives:
            await life.job("releases")
        context = self.lives[0].node.relay.context
        await Parts(context.messages, context.endings, context.clock.now, claim_seconds=-1).run()
        await self.lives[1].job("sweep")
        await self._idle()
        left = await self.world.db.releases.count_documents({})
        documents = await self._documents()
        awaited = {key for one in documents for key in one["awaiting"]}
        if documents and all(key.endswith("/!") or key == PARTS_KEY for key in awaited):
            # Nobody drains what waits for who has blocked its sender: it takes its time.
            await self._expire([], OLD)
            documents = await self._documents()
        return not left and not documents

    async def _clear(self) -> None:
        for phone in self.phones:
            await phone.disconnect()
        for life in self.lives:
            await life.kill()
        for life in (*self.past, *self.lives):
            await asyncio.to_thread(life.node.relay.context.messages._collection.database.client.close)
        if self.world.db is not None:
            await self.world.db.nodes.delete_many({})
            await self.world.db.releases.delete_many({})
            await self.world.db.conversations.delete_many({"pending": {"$ne": None}})

    async def _check_emptied(self) -> None:
        emptied = await self._emptied() - self.leftovers
        if emptied:
            raise Broken(3, f"nobody awaits {emptied} any more, and they are still there")

    async def _emptied(self) -> set[str]:
        return {one["_id"] for one in await self._documents() if one.get("awaiting") == []}

    async def _documents(self) -> list[dict[str, Any]]:
        """Every message and part that is stored."""
        rows = self.world.db.messages.find({"_id": {"$nin": list(self.poison)}})
        found: list[dict[str, Any]] = await rows.to_list(None)
        return found

    # -- choosing and sending --------------------------------------------------------------------------------------------

    def _group(self, number: int) -> tuple[str, Phone]:
        """A group and its admin's phone."""
        group = self.model.groups[number % len(self.model.groups)]
        creator = next(phone for phone in self.phones if phone.user == self.model.admins[group])
        return group, creator

    def _phone(self, number: int) -> Phone:
        """A device, or, when it was removed, the other one of its owner."""
        found = self.phones[number]
        return self.phones[number - 1] if found.is_removed else found

    def _new(self, phone: int, conv: int, *, after: bool = False, ttl: int | None = None) -> Message:
        return self._message(self._phone(phone), self._own(phone, conv), after=after, ttl=ttl)

    def _own(self, phone: int, conv: int) -> str:
        """A conversation that they are in, or were."""
        user = self.phones[phone].user
        own = [name for name in (*self.model.groups, *self.model.directs) if user in self.model.ever[name]]
        return own[conv % len(own)]

    def _message(self, sender: Phone, name: str, *, after: bool = False, ttl: int | None = None) -> Message:
        return Message(
            name,
            new_id(),
            sender,
            "text",
            f"number {len(self.model.messages)}",
            after=sender.held(name) if after else None,
            ttl=ttl,
        )

    def _may_be_withdrawn(self, message: Message) -> bool:
        return message.kind == "text" and message.seq is not None and message.withdrawal is None

    def _withdrawal(self, message: Message) -> Message:
        return Message(message.conv, new_id(), message.phone, "withdrawn", None, reply_to=message.id)

    def _sent(self, which: int) -> Message | None:
        sent = [
            one for one in self.model.messages.values() if one.refused is None and not one.phone.is_removed
        ]
        return sent[which % len(sent)] if sent else None

    async def _send(
        self,
        message: Message,
        life: Life,
        *,
        again: bool = False,
        perhaps: Sequence[str] = (),
        allowed: Sequence[str] = (),
    ) -> None:
        phone = message.phone
        self.model.attempt(message, perhaps=perhaps)
        found: Any
        if phone.connected:
            turn = phone.take_turn()
            found = await phone.send(message.conv, message.operation(again=again))
            if not again:
                self._check_sent(message, turn, found)
        else:
            answered = await phone.request(
                life, "POST", "/v1/messages", {"conv": message.conv, **message.operation(again=again)}
            )
            if answered is None:
                found = LOST
            else:
                found = answered[1] if answered[0] == 201 else answered[1]["error"]["code"]
        self.model.outcome(message, found, allowed=allowed)

    def _check_sent(self, message: Message, turn: int, found: dict[str, Any] | str) -> None:
        """What is sent for the first time over a connection comes after all that was sent there before, whichever is answered
        first."""
        if isinstance(found, str):
            return
        seq, sent = int(found["seq"]), message.phone.sent
        for other, known in sent:
            if (turn > other) != (seq > known):
                raise Broken(
                    5, f"{message.id}, {seq}, does not sort as its connection sent it: {sent}, {turn}"
                )
        sent.append((turn, seq))

    async def _send_through(self, message: Message, node: int, *, again: bool = False) -> None:
        """Sends through this very node."""
        phone = message.phone
        if phone.connected and phone.life is not self.lives[node]:
            await phone.disconnect()
        await self._send(message, self.lives[node], again=again)


def play(world: World, *, examples: int, steps: int, same: bool) -> None:
    """Plays so many made-up lives of so many steps; with ``same``, the same ones in every run."""
    world.crashes = steps // CRASH_EVERY
    try:
        run_state_machine_as_test(
            lambda: Promises(world),  # type: ignore[arg-type]  # a factory will do, its docstring says
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                derandomize=same,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate, Phase.shrink],
            ),
        )
    except Flaky as flaky:
        # It failed, and not again: what it was that failed says more.
        raise world.failure or flaky from flaky
    # Else the books were never looked at.
    assert world.recounts <= world.checks // 20, (
        f"{world.recounts} of {world.checks} checks found books in doubt"
    )


@pytest.fixture
def world(mongod: EmbeddedMongo, tmp_path: Path) -> Iterator[World]:
    """Where examples are played."""
    silent = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    with mortal(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        world = World(runner, mongod.uri, tmp_path)
        yield world
        world.run(world.factory.close())
    structlog.configure(**silent)


@pytest.mark.timeout(120)
def test_every_promise_is_kept_by_those_who_are_harmed_and_to_those_beside_them(world: World) -> None:
    """Every kind of harm once, in an order in which each meets what it may spoil."""
    steps: list[Callable[[Promises], None]] = [
        lambda lives: lives.connect(phone=3, node=0),
        lambda lives: lives.connect(phone=5, node=1),
        lambda lives: lives.disconnect(phone=3),
        lambda lives: lives.poison_store(phone=2, conv=0, kind=0),
        lambda lives: lives.poison_store(phone=6, conv=0, kind=2),
        # What waits behind it comes when they are back.
        lambda lives: lives.disconnect(phone=2),
        lambda lives: lives.send(phone=0, conv=0, node=0, after=False, ttl=0, twice=True),
        lambda lives: lives.connect(phone=2, node=1),
        lambda lives: lives.take_nothing(phone=4),
        lambda lives: lives.burst(phone=0, conv=0, count=7),
        lambda lives: lives.send(phone=2, conv=0, node=1, after=True, ttl=0, twice=False),
        lambda lives: lives.acknowledge_together(doors=[2] * 8),
        lambda lives: lives.block(one=1, other=0, blocks=True, node=1, conv=0),
        lambda lives: lives.block(one=2, other=0, blocks=True, node=0, conv=2),
        lambda lives: lives.acknowledge_together(doors=[1] * 8),
        lambda lives: lives.disconnect(phone=6),
        lambda lives: lives.overfill(phone=0, conv=0, node=0, more=3),
        lambda lives: lives.send_too_much(phone=0, conv=0, node=0),
        lambda lives: lives.remove_tablet(person=1, node=0),
        lambda lives: lives.remove_tablet(person=2, node=0),
        lambda lives: lives.acknowledge_together(doors=[0] * 8),
        lambda lives: lives.send(phone=4, conv=0, node=1, after=False, ttl=4, twice=False),
        lambda lives: lives.time_passes(phones=[2, 4]),
        lambda lives: lives.block(one=1, other=0, blocks=False, node=0, conv=1),
        lambda lives: lives.send(phone=7, conv=0, node=1, after=False, ttl=0, twice=True),
    ]
    lives = lived(world, [1, 1, 1, 1], steps)
    trimmed = sum(life.node.relay.context.ledger.count("trimmed") for life in lives.lives)
    assert trimmed and lives.phones[6].gaps == 0
    lives.teardown()
    assert lives.phones[6].gaps


@pytest.mark.timeout(60)
def test_who_is_full_was_there_though_the_node_died_that_should_have_said_so(world: World) -> None:
    world.crashes = 1
    lives = lived(
        world,
        [0, 0, 0, 0],
        [
            lambda lives: lives.crash_while_sending(phone=4, conv=0, node=0, at=0, after=False, reader=0),
            lambda lives: lives.poison_store(phone=0, conv=0, kind=0),
            lambda lives: lives.overfill(phone=0, conv=0, node=0, more=1),
        ],
    )
    lives.teardown()


def lived(world: World, connected: list[int], steps: Sequence[Callable[[Promises], None]]) -> Promises:
    """A life of these steps, all promises kept after each; to be torn down."""
    lives = Promises(world)
    try:
        lives.start(connected=connected)
        lives.keeps()
        for step in steps:
            step(lives)
            lives.keeps()
    except BaseException:
        lives.run(lives._clear())
        raise
    return lives


# Under a minute; when it fails, up to five more for the shortest way there.
@pytest.mark.timeout(480)
def test_every_promise_is_kept_whatever_happens(world: World) -> None:
    play(world, examples=20, steps=25, same=True)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_every_promise_is_kept_for_long(world: World) -> None:
    # Ten minutes; when it fails, up to five more.
    play(world, examples=120, steps=50, same=False)
