"""A device that connects: what is known of it before the store is asked, and what the audit trail must say before it is made."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from relay.wire.ids import device_key

PROVISION: Final = "device.provision"
"""The act of a device that a token of another issuer makes or brings back."""


@dataclass(frozen=True, slots=True)
class Provision:
    """A device is to be made, or, when it has ``returned`` from its removal, to be brought back; ``account``: its user is to be
    made, too. The trail has this first: rather one entry too many than none."""

    returned: bool
    account: bool

    @property
    def details(self) -> dict[str, bool]:
        """What the entry says of it."""
        return {"returned": self.returned, **({"account": True} if self.account else {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arriving:
    """A device of ``user`` is here now, with a token issued at ``issued`` (s; None: this moment) for ``session`` or, without
    one, by another issuer; ``live``: by a WebSocket; from ``address`` with ``agent``.

    ``provision``: who is unknown may be created. ``noted``: what the trail says of this arrival already."""

    user: str
    device: str
    provision: bool
    issued: int | None = None
    session: str | None = None
    live: bool = False
    address: str = ""
    agent: str = ""
    noted: Provision | None = None

    @property
    def key(self) -> str:
        """The device's key."""
        return device_key(self.user, self.device)

    @property
    def may_create(self) -> bool:
        """Whether it may be made, and its user. Tokens of the relay's own sessions make nobody."""
        return self.provision and self.session is None

    def is_noted(self, *, returned: bool) -> bool:
        """Whether the trail says that it is made, or brought back."""
        return self.noted is not None and self.noted.returned == returned

    def moment(self, now: datetime) -> datetime:
        """When its token was issued."""
        return now if self.issued is None else datetime.fromtimestamp(self.issued, UTC)
