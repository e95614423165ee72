"""From settings to parts: keys, limits, rules."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Final

from config.settings import Settings
from handlers.context import Limits
from relay.metrics import Metrics
from relay.routing.bus import Bus
from relay.routing.hub import Hub
from relay.routing.live import Live
from relay.security.issuer import Issuer
from relay.security.pseudonyms import Pseudonyms
from relay.security.rates import OFF
from relay.security.tokens import KeyConfigurationError, Verifier, first_secret, generate_secret, load_keys
from relay.store.audience import Audiences
from relay.store.people import People
from relay.wire.clock import Clock
from relay.wire.frames import MAX_OPERATIONS

SECRET_FILE: Final = "jwt-secret"
PSEUDONYM_FILE: Final = "pseudonym-key"
LOOPBACK: Final = "127.0.0.1"
_RATE: Final = "rate_"
_MESSAGE_WINDOW: Final = 20
_DAY: Final = 86_400


class StartError(Exception):
    """The relay cannot start; one line that says why and what to do."""


def make_data_dir(path: Path) -> None:
    """Makes the data directory. Raises StartError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"RELAY_DATA_DIR: {path} cannot be made: {error.strerror}") from None


def url_of(host: str, port: int) -> str:
    """Where a relay that listens there is reached."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def cannot_listen(host: str, port: int, error: OSError, setting: str = "RELAY_PORT") -> str:
    """Why the relay cannot listen there, in one line; ``setting`` is the one that says where."""
    return (
        f"cannot listen on {host}:{port}: {error.strerror or error}; "
        f"is another relay running? {setting} chooses another port"
    )


def rate_rules(settings: Settings) -> dict[str, str]:
    """The rate limits by name: each setting ``rate_…`` is one, and ``message`` what one device may send over HTTP."""
    names = [name for name in Settings.model_fields if name.startswith(_RATE)]
    rules = {name.removeprefix(_RATE): getattr(settings, name) for name in names}
    return {**rules, "message": _message_rule(settings.message_rate, settings.message_burst)}


def _message_rule(rate: float, burst: int) -> str:
    """As a window over all nodes, so long that it comes near to the rate, and that never refuses what one node's bucket allows:
    in no window more than the burst and what the rate brings meanwhile."""
    if not rate:
        return OFF
    seconds = min(max(_MESSAGE_WINDOW, ceil(burst / rate)), _DAY)
    return f"{burst + ceil(rate * seconds)}/{seconds} seconds"


def pseudonyms_of(settings: Settings) -> Pseudonyms:
    """What people are called in what outlives their accounts. Raises StartError."""
    if settings.pseudonym_key is not None:
        return Pseudonyms(settings.pseudonym_key.get_secret_value().encode())
    make_data_dir(settings.data_dir)
    try:
        return Pseudonyms(generate_secret(settings.data_dir / PSEUDONYM_FILE).encode())
    except KeyConfigurationError as error:
        raise StartError(str(error)) from None


def keys_of(settings: Settings) -> tuple[Verifier, Issuer | None]:
    """What verifies access tokens, and what signs them when the relay has a secret. Raises StartError."""
    secret = settings.jwt_secret.get_secret_value() if settings.jwt_secret is not None else None
    try:
        keys = load_keys(
            secret=secret,
            secret_file=settings.jwt_secret_file,
            public_key_file=settings.jwt_public_key_file,
            jwks_file=settings.jwt_jwks_file,
        )
        if not keys:
            make_data_dir(settings.data_dir)
            made = generate_secret(settings.data_dir / SECRET_FILE)
            keys = load_keys(secret=made, secret_file=None, public_key_file=None, jwks_file=None)
        signing = first_secret(keys)
        issuer = None
        if signing is not None:
            issuer = Issuer(signing, audience=settings.jwt_audience, lifetime=settings.access_token_seconds)
        return Verifier(keys, audience=settings.jwt_audience), issuer
    except KeyConfigurationError as error:
        raise StartError(str(error)) from None


def limits_of(settings: Settings, ttl_seconds: int) -> Limits:
    """The limits that handlers enforce."""
    return Limits(
        frame=settings.max_frame_bytes,
        body=settings.max_body_bytes,
        operations=MAX_OPERATIONS,
        inline=settings.inline_recipients,
        recipients=settings.max_recipients,
        window=settings.window,
        window_bytes=settings.window_bytes,
        heartbeat_ms=int(settings.heartbeat_seconds * 1000),
        ttl_seconds=ttl_seconds,
        send_deadline=settings.send_deadline_seconds,
        members=settings.max_members,
        watches=settings.max_watches,
        large_group=settings.large_group,
        large_group_body=settings.large_group_body_bytes,
        mailbox=settings.mailbox_messages,
        conversations=settings.max_conversations,
    )


def live_of(
    settings: Settings,
    hub: Hub,
    metrics: Metrics,
    audiences: Audiences,
    people: People,
    clock: Clock,
    bus: Bus,
) -> Live:
    """What is told live."""
    return Live.of(
        hub,
        metrics,
        audiences,
        people.last_seen,
        clock.now,
        bus,
        max_frame=settings.max_frame_bytes,
        heartbeat=settings.heartbeat_seconds,
        timeout=settings.commit_timeout_seconds,
    )
