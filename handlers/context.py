"""The ports that handlers see. They never reach past it to a database or a socket."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from handlers.joining import Joins
from relay.metrics import Metrics
from relay.routing.bus import Bus
from relay.routing.hub import Connected, Hub
from relay.routing.invalidation import Invalidation
from relay.routing.live import Live
from relay.routing.quotas import Quotas
from relay.security.issuer import Issuer
from relay.security.passwords import Passwords
from relay.security.pseudonyms import Pseudonyms
from relay.security.rates import MessageRates, Rates
from relay.store.accounts import Accounts
from relay.store.audience import Audiences
from relay.store.audit import Audit
from relay.store.changes import Changes
from relay.store.contacts import Contacts
from relay.store.conversations import Conversations
from relay.store.fates import Fates
from relay.store.keys import Keys
from relay.store.lanes import EndingLanes, SendLanes
from relay.store.ledger import Ledger
from relay.store.messages import Messages
from relay.store.people import People
from relay.store.releases import Releases
from relay.store.revisions import Revisions
from relay.store.rosters import Rosters
from relay.store.sessions import Sessions
from relay.wire.clock import Clock


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that handlers enforce and that ``welcome`` and ``/v1/info`` tell. Sizes in bytes."""

    frame: int
    body: int
    operations: int
    inline: int
    """Recipient devices up to which a message is stored in one piece."""
    recipients: int
    """Most recipient devices of one message."""
    window: int
    window_bytes: int
    heartbeat_ms: int
    ttl_seconds: int
    send_deadline: float
    """Seconds after which a message or acknowledgement that could not be committed is given up."""
    members: int
    """Most members of a group."""
    watches: int
    """Most people watched by one connection."""
    large_group: int
    """More recipient devices than this make a large group."""
    large_group_body: int
    """Largest body of a message to a large group."""
    mailbox: int
    """Most messages that wait for one device."""
    conversations: int
    """Most conversations of one user."""


@dataclass(slots=True)
class Health:
    """What ``/readyz`` tells. ``draining``: the node is stopping."""

    draining: bool = False
    problems: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Context:
    """Everything a handler may use."""

    clock: Clock
    limits: Limits
    hub: Hub
    bus: Bus
    audiences: Audiences
    accounts: Accounts
    conversations: Conversations
    messages: Messages
    fates: Fates
    sends: SendLanes
    endings: EndingLanes
    ledger: Ledger
    metrics: Metrics
    health: Health
    rosters: Rosters
    revisions: Revisions
    changes: Changes
    sessions: Sessions
    people: People
    contacts: Contacts
    keys: Keys
    audit: Audit
    releases: Releases
    invalidation: Invalidation
    quotas: Quotas
    passwords: Passwords
    pseudonyms: Pseudonyms
    rates: Rates
    message_rates: MessageRates
    typing_rates: MessageRates
    live: Live
    issuer: Issuer | None
    """Signs access tokens; None when the relay has no secret of its own: then accounts live elsewhere."""
    registration: bool
    """Whether anybody may register."""
    provision: bool
    """Whether unknown users named as members are created."""
    joins: Joins = field(default_factory=Joins)


class Peer(Connected, Protocol):
    """The connection an operation came from."""

    last_seq: int
    """The highest ``seq`` given to a message of this connection."""
    crowded: bool
    """Whether it has sent to many devices since it was last held back for that."""

    async def renew(self, token: str) -> int | None:
        """Takes a new token of the same user and device; returns its expiry (s). None when that device may not be here any
        more: then the connection is being closed. Raises RelayError, and what the store raises."""
