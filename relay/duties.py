"""What a node does of its own accord, and how often."""

from __future__ import annotations

from typing import Final

from config.settings import Settings
from handlers.context import Context
from relay.jobs.books import BookKeeper
from relay.jobs.doubts import Doubts
from relay.jobs.expiry import Expiry
from relay.jobs.health import HealthCheck
from relay.jobs.heartbeat import Heartbeat
from relay.jobs.housekeeping import InterruptedErasures
from relay.jobs.parts import Parts
from relay.jobs.preferences import Preferences
from relay.jobs.recount import Recount
from relay.jobs.repair import Released, Repair
from relay.jobs.revocations import Revocations
from relay.jobs.supervisor import Job
from relay.jobs.sweep import LastSeen, Sweep, TimeToLive
from relay.routing.neighbours import Neighbours
from relay.store.balances import Balances, Pace
from relay.store.mongo import Mongo
from relay.store.peers import BEAT_SECONDS, Peers
from relay.store.shards import CHECK_SECONDS, Shards
from relay.store.timekeeping import Timekeeper

_HEALTH_SECONDS: Final = 2.0
_DOUBTS_SECONDS: Final = 1.0
_REVOCATIONS_SECONDS: Final = 2.0
# With a query well within what a change waits for a node that does not confirm it.
_PREFERENCES_SECONDS: Final = 2.0
_ERASURES_SECONDS: Final = 5.0
_REPAIR_SECONDS: Final = 2.0
_PRESENCE_SECONDS: Final = 1.0
_QUOTA_SECONDS: Final = 1.0
_LAST_SEEN_SECONDS: Final = 10.0
_HOT_SECONDS: Final = 10.0
_TTL_SECONDS: Final = 60.0
_AUDIT_HEAD_SECONDS: Final = 3600.0


def duties(
    settings: Settings,
    ctx: Context,
    *,
    mongo: Mongo,
    shards: Shards,
    peers: Peers,
    neighbours: Neighbours,
    sweep: Sweep,
    books: BookKeeper,
    balances: Balances,
    pace: Pace,
    timekeeper: Timekeeper,
) -> list[Job]:
    """The jobs of a node, for its supervisor. ``pace`` is how often books are kept."""
    active_seconds = settings.device_inactive_days * 86_400
    heartbeat = Heartbeat(ctx.hub, settings.heartbeat_seconds, ctx.live.presence.faded)
    last_seen = LastSeen(ctx.hub, ctx.accounts, seconds=min(3600, active_seconds / 4))
    recount = Recount(ctx.ledger, ctx.messages, shards, balances, own=lambda: books.id)
    health = HealthCheck(mongo, shards, ctx.rates, ctx.bus, timekeeper, ctx.health, ctx.metrics)
    return [
        Job("heartbeat", heartbeat.run, min(1.0, settings.heartbeat_seconds / 4)),
        Job("presence", ctx.live.presence.tick, _PRESENCE_SECONDS),
        Job("second looks", ctx.live.looks.run, _PRESENCE_SECONDS),
        Job("expiry", Expiry(ctx.messages, ctx.endings, ctx.clock.now).run, settings.expiry_seconds, 0.1),
        Job("sweep", sweep.run, settings.sweep_seconds, 0.2, prompt=True),
        Job("last seen", last_seen.run, _LAST_SEEN_SECONDS, 0.2),
        Job("quotas", ctx.quotas.run, _QUOTA_SECONDS, 0.2),
        Job("hot messages", ctx.messages.hot.tidy, _HOT_SECONDS, 0.1),
        Job("time to live", TimeToLive(mongo, ctx.messages).run, _TTL_SECONDS, 0.1),
        Job("revocations", Revocations(ctx.hub, ctx.accounts).run, _REVOCATIONS_SECONDS, 0.1),
        Job("preferences", Preferences(ctx.hub, ctx.people).run, _PREFERENCES_SECONDS, 0.1),
        Job("doubts", Doubts(ctx.sends, ctx.endings).run, _DOUBTS_SECONDS, 0.1),
        Job("parts", Parts(ctx.messages, ctx.endings, ctx.clock.now).run, settings.sweep_seconds, 0.2),
        Job("erasures", InterruptedErasures(ctx).run, _ERASURES_SECONDS, 0.2),
        Job("peers", peers.beat, BEAT_SECONDS),
        Job("neighbours", neighbours.run, BEAT_SECONDS),
        Job("books", books.run, pace.beat),
        Job("recount", recount.run, pace.beat, 0.2),
        Job("releases", Released(ctx).run, _REPAIR_SECONDS, 0.2),
        Job("repair", Repair(ctx).run, _REPAIR_SECONDS, 0.2),
        Job("audit head", ctx.audit.tell_end, _AUDIT_HEAD_SECONDS, 0.1),
        Job("shards", shards.run, CHECK_SECONDS, 0.2),
        Job("health", health.run, _HEALTH_SECONDS),
    ]
