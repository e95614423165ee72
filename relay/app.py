"""The composition root: makes every part, in order, and takes them down in the opposite one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, get_args

import structlog
from aiohttp import web

from config.settings import Settings
from handlers.context import Context, Health
from handlers.http.routes import ROUTES
from relay.between import join
from relay.configured import (
    LOOPBACK,
    StartError,
    cannot_listen,
    keys_of,
    limits_of,
    live_of,
    make_data_dir,
    pseudonyms_of,
    rate_rules,
    url_of,
)
from relay.duties import duties
from relay.jobs.books import BookKeeper
from relay.jobs.supervisor import Supervisor
from relay.jobs.sweep import Sweep
from relay.metrics import Metrics
from relay.pipeline import message_path
from relay.routing.bus import Alone, Bus
from relay.routing.hub import Hub, moments_of
from relay.routing.invalidation import Invalidation
from relay.routing.neighbours import Neighbours
from relay.routing.quotas import Quotas
from relay.routing.redis_bus import RedisBus
from relay.routing.router import Router
from relay.security.passwords import Passwords
from relay.security.rates import MessageRates, Rates
from relay.session.addresses import Addresses
from relay.session.admission import Admission
from relay.session.gateway import Gateway, GatewaySettings
from relay.session.web import Runner, application
from relay.store.accounts import Accounts
from relay.store.attempts import Attempts
from relay.store.audience import Audiences
from relay.store.audit import Audit, check_key
from relay.store.backlogs import Backlogs
from relay.store.balances import Balances, Pace
from relay.store.changes import Changes
from relay.store.contacts import Contacts
from relay.store.conversations import Conversations
from relay.store.embedded import EmbeddedError, EmbeddedMongo
from relay.store.fates import Fates
from relay.store.hot import HotMessages
from relay.store.hot_redis import HotRedis
from relay.store.keys import Keys
from relay.store.ledger import Ledger
from relay.store.mailboxes import Mailboxes
from relay.store.messages import Messages
from relay.store.mongo import Mongo, MongoUnavailable
from relay.store.peers import Peers
from relay.store.people import People
from relay.store.releases import Releases
from relay.store.revisions import Revisions
from relay.store.rosters import Rosters
from relay.store.sessions import Sessions
from relay.store.shards import Shards
from relay.store.timekeeping import READINGS, Timekeeper
from relay.wire import errors, replies
from relay.wire.clock import Clock
from relay.wire.frames import AnyOperation

# Messages are freed by reference counts; the collector only looks for cycles, and need not look 20 times a millisecond.
_GC: Final = (50_000, 20, 50)
_BYE_SPREAD_MS: Final = (500, 5000)
# Lease of resolved recipients, deadline of a send and one database call, with room to spare: after this nothing that was
# resolved before a change can still be committed.
_SETTLE_SECONDS: Final = 20.0
_CLOSE_SECONDS: Final = 1.0
_PACE: Final = Pace()

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Relay:
    """One running node. Made by ``start``; ``stopping`` is set when it must end, with ``fault`` when it failed."""

    settings: Settings
    context: Context
    url: str
    embedded: EmbeddedMongo | None
    stopping: asyncio.Event
    fault: BaseException | None = None
    _exit: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    def fail(self, error: BaseException) -> None:
        """A part that the node cannot do without has died: stop, so that a supervisor starts a fresh one."""
        log.critical("a committer died; the node stops", error=type(error).__name__)
        self.fault = self.fault or error
        self.stopping.set()

    async def stop(self) -> None:
        """Drains: no new connections, ``bye``, what is queued is committed, close 1012, parts down in order."""
        self.context.health.draining = True
        low, high = _BYE_SPREAD_MS
        for connection in self.context.hub:
            connection.outbox.put(replies.bye(random.randint(low, high)))
        await self._exit.aclose()


async def start(settings: Settings) -> Relay:
    """Starts a node; it listens when this returns. Raises StartError."""
    async with contextlib.AsyncExitStack() as stack:
        relay = await _start(settings, stack)
        relay._exit = stack.pop_all()
        return relay
    raise AssertionError  # the stack swallows nothing


async def _start(settings: Settings, stack: contextlib.AsyncExitStack) -> Relay:
    verifier, issuer = keys_of(settings)
    pseudonyms = pseudonyms_of(settings)
    embedded, uri = await database(settings, stack)
    ttl_seconds = max(1, round(settings.message_ttl_days * 86_400))
    fate_seconds = max(1, round(settings.fate_hours * 3600))
    try:
        mongo = Mongo(uri, settings.mongo_database)
        stack.push_async_callback(_close_quickly, mongo)
        await mongo.prepare(ttl_seconds, fate_seconds)
        timekeeper = Timekeeper()
        timekeeper.take(*await mongo.readings(READINGS))
    except MongoUnavailable as error:
        raise StartError(str(error)) from None

    try:
        await check_key(pseudonyms)
    except ValueError as error:
        raise StartError(str(error)) from None
    metrics = Metrics({kind: str(kind.__struct_config__.tag) for kind in get_args(AnyOperation)})
    ledger = Ledger(metrics.registry)
    clock = Clock()
    hub = Hub()
    timeout = settings.commit_timeout_seconds
    shards = Shards(mongo, fate_seconds=fate_seconds)
    try:
        await shards.load()
    except MongoUnavailable as error:
        raise StartError(str(error)) from None
    fates = Fates(mongo, shards, timeout=timeout)
    messages = Messages(
        mongo, shards, fates, metrics, ttl_seconds=ttl_seconds, timeout=timeout, hot=_hot(settings, stack)
    )
    accounts = Accounts(inactive=timedelta(days=settings.device_inactive_days), pseudonyms=pseudonyms)
    conversations = Conversations()
    rosters = Rosters(inactive=timedelta(days=settings.device_inactive_days), timeout=timeout)
    people = People()
    peers = Peers(commit_seconds=timeout, lapsed=lambda: audiences.forget())
    audiences = Audiences(rosters.load, hold=peers.hold)
    neighbours = Neighbours(peers.others)
    bus = _bus(settings, hub, metrics, peers.id, neighbours)
    mailboxes = Mailboxes(mongo, shards, timeout=timeout)
    quotas = Quotas(hub, bus, mailboxes, audiences, metrics, quota=settings.mailbox_messages)
    live = live_of(settings, hub, metrics, audiences, people, clock, bus)
    router = Router(hub, metrics, live.receipts, bus)

    health = Health()
    stopping = asyncio.Event()
    faults: list[Relay] = []

    def dead(error: BaseException) -> None:
        for node in faults:
            node.fail(error)

    path = message_path(
        settings,
        mongo,
        shards,
        messages,
        fates,
        audiences,
        ledger,
        metrics,
        router,
        quotas,
        now=clock.now,
        dead=dead,
    )
    sends, endings = path.sends, path.endings
    router.fanout.start()
    stack.push_async_callback(router.fanout.close)
    balances = Balances(_PACE)
    books = BookKeeper(ledger, messages, shards, balances, settled=lambda: sends.settled and endings.settled)
    await books.open()
    stack.push_async_callback(_leave, books)
    await peers.beat()
    stack.push_async_callback(_leave, peers)
    audit = Audit(pseudonyms)
    stack.push_async_callback(audit.close)
    await audit.tell_end()
    passwords = Passwords(
        processes=settings.password_processes,
        queue=settings.password_queue,
        busy=lambda: router.busy() or router.fanout.waiting > 0,
    )
    stack.callback(passwords.close)
    rates = Rates(
        rate_rules(settings),
        redis_url=None if settings.redis_url is None else settings.redis_url.get_secret_value(),
    )
    stack.push_async_callback(rates.close)
    invalidation = Invalidation(audiences, sends, peers, bus, metrics, commit_seconds=timeout)
    stack.push_async_callback(invalidation.close)
    context = Context(
        clock=clock,
        limits=limits_of(settings, ttl_seconds),
        hub=hub,
        bus=bus,
        audiences=audiences,
        accounts=accounts,
        conversations=conversations,
        messages=messages,
        fates=fates,
        sends=sends,
        endings=endings,
        ledger=ledger,
        metrics=metrics,
        health=health,
        rosters=rosters,
        revisions=Revisions(peers.id, peers.lives, Attempts(lambda: shards.reachable)),
        changes=Changes(conversations),
        sessions=Sessions(
            refresh_days=settings.refresh_token_days,
            repeat_hours=settings.refresh_repeat_hours,
            max_devices=settings.max_devices,
        ),
        people=people,
        contacts=Contacts(most=settings.max_contacts),
        keys=Keys(),
        audit=audit,
        releases=Releases(messages, endings, settle_seconds=_SETTLE_SECONDS),
        invalidation=invalidation,
        quotas=quotas,
        passwords=passwords,
        pseudonyms=pseudonyms,
        rates=rates,
        message_rates=MessageRates(settings.message_rate, settings.message_burst),
        typing_rates=MessageRates(settings.typing_rate, settings.typing_burst),
        live=live,
        issuer=issuer,
        registration=settings.registration,
        provision=settings.auto_provision,
    )

    def returned() -> None:
        hub.complete()
        sends.retry()

    shards.returned = returned
    sweep = Sweep(hub, messages, endings, metrics, clock.now)
    stack.push_async_callback(sweep.close)
    if isinstance(bus, RedisBus):
        await join(bus, context, router, sweep, neighbours, own=peers.id, stack=stack)
    jobs = Supervisor(
        duties(
            settings,
            context,
            mongo=mongo,
            shards=shards,
            peers=peers,
            neighbours=neighbours,
            sweep=sweep,
            books=books,
            balances=balances,
            pace=_PACE,
            timekeeper=timekeeper,
        )
    )
    admission = Admission(context, verifier)
    addresses = Addresses(settings.trusted_proxies)
    gateway = Gateway(
        context,
        admission,
        GatewaySettings(settings.max_connections, settings.auth_seconds, settings.outbox_bytes),
        addresses,
        Backlogs(mongo, shards, messages, timeout=timeout).pages,
        router.busy,
    )
    app = application(
        context, admission, gateway, ROUTES, max_body=settings.max_frame_bytes, addresses=addresses
    )
    runner = Runner(app, others=router.busy, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    stack.push_async_callback(admission.close)
    stack.push_async_callback(_drain, context, gateway, jobs, runner, settings.drain_seconds, accounts)
    jobs.start()
    url = await _listen(runner, settings, stack)
    # What is alive now stays: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC)
    relay = Relay(settings, context, url, embedded, stopping)
    faults.append(relay)
    return relay


async def _drain(
    context: Context,
    gateway: Gateway,
    jobs: Supervisor,
    runner: web.AppRunner,
    seconds: float,
    accounts: Accounts,
) -> None:
    """Commits what is queued, tells its senders, closes every connection; within about ``seconds``."""
    context.health.draining = True
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    await context.sends.close(seconds / 2)
    await context.endings.close(max(0.1, (deadline - loop.time()) / 2))
    await context.live.close(max(0.1, (deadline - loop.time()) / 2))
    for connection in context.hub:
        connection.shut(errors.RESTARTING)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(context.hub.empty(), max(0.1, deadline - loop.time()))
    await jobs.stop()
    await gateway.close(1)
    await runner.cleanup()
    left, context.hub.left = context.hub.left, {}
    with contextlib.suppress(Exception):
        await asyncio.wait_for(accounts.seen(moments_of(left)), 1)


def _bus(settings: Settings, hub: Hub, metrics: Metrics, node: str, neighbours: Neighbours) -> Bus:
    if settings.redis_url is None:
        return Alone()
    return RedisBus(
        settings.redis_url.get_secret_value(),
        hub,
        metrics,
        node=node,
        prefix=f"relay:{settings.mongo_database}",
        is_dead=neighbours.is_dead,
    )


def _hot(settings: Settings, stack: contextlib.AsyncExitStack) -> HotMessages:
    if settings.redis_url is None or not (settings.hot_bytes and settings.hot_redis_bytes):
        return HotMessages(settings.hot_bytes)
    elsewhere = HotRedis(settings.redis_url.get_secret_value(), settings.hot_redis_bytes)
    elsewhere.start()
    stack.push_async_callback(elsewhere.close)
    return HotMessages(settings.hot_bytes, elsewhere)


async def _leave(those: Peers | BookKeeper) -> None:
    with contextlib.suppress(Exception):
        await asyncio.wait_for(those.leave(), 1)


async def _close_quickly(mongo: Mongo) -> None:
    """The driver says goodbye to its server, and would wait for one that does not answer."""
    closing = threading.Thread(target=mongo.close, name="close MongoDB", daemon=True)
    closing.start()
    await asyncio.to_thread(closing.join, _CLOSE_SECONDS)


async def _listen(runner: web.AppRunner, settings: Settings, stack: contextlib.AsyncExitStack) -> str:
    shared = settings.worker > 0
    site = web.TCPSite(runner, settings.host, settings.port, backlog=4096, reuse_port=shared)
    try:
        await site.start()
    except OSError as error:
        raise StartError(cannot_listen(settings.host, settings.port, error)) from None
    if shared:
        # First of all when it stops: the kernel gives new connections to the other workers. A node of its own goes on
        # listening while it drains, for a load balancer to hear it from /readyz.
        stack.push_async_callback(site.stop)
    port = runner.addresses[0][1]
    if settings.worker_port:
        own = settings.worker_port + max(0, settings.worker - 1)
        try:
            await web.TCPSite(runner, LOOPBACK, own, reuse_port=shared).start()
        except OSError as error:
            raise StartError(cannot_listen(LOOPBACK, own, error, "RELAY_WORKER_PORT")) from None
    return url_of(settings.host, port)


async def database(settings: Settings, stack: contextlib.AsyncExitStack) -> tuple[EmbeddedMongo | None, str]:
    """The MongoDB there is, and where: the relay's own (stopped with the stack) when none is configured. Raises StartError."""
    if settings.mongo_uri is not None:
        return None, settings.mongo_uri.get_secret_value()
    make_data_dir(settings.data_dir)
    embedded = EmbeddedMongo(settings.data_dir / "mongo", cache_gb=settings.embedded_cache_gb)
    try:
        uri = await embedded.start()
    except EmbeddedError as error:
        raise StartError(str(error)) from None
    stack.push_async_callback(embedded.stop)
    return embedded, uri
