"""Every setting of the relay, in one place. Read from the environment only (``RELAY_`` + the field's name in capitals).

``docs/settings.md`` is made from this module (``scripts/settings-doc``); a test fails when the two differ.
"""

from __future__ import annotations

import os
import re
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_CLIENT_VARIABLES = frozenset({"RELAY_URL", "RELAY_TOKEN", "RELAY_PASSWORD"})
# A worker's readiness is told to its supervisor through this file descriptor.
READY_VARIABLE = "RELAY_WORKER_READY"

_RATE = re.compile(r"[1-9][0-9]{0,6}/([1-9][0-9]{0,3} )?(second|minute|hour|day)s?")
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


def _is_rate(value: str) -> str:
    if value != "off" and not _RATE.fullmatch(value):
        raise ValueError("must be like 20/minute or 1000/10 seconds, or off")
    return value


Rate = Annotated[str, AfterValidator(_is_rate)]


def _are_networks(value: str) -> str:
    for part in filter(None, map(str.strip, value.split(","))):
        try:
            ip_network(part, strict=False)
        except ValueError:
            raise ValueError("must be addresses or networks like 10.0.0.0/8, between commas") from None
    return value


Networks = Annotated[str, AfterValidator(_are_networks)]


class SettingsError(Exception):
    """One line that names the wrong setting."""


class Settings(BaseSettings):
    """The typed settings. Times are in the unit of the name, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix="RELAY_", frozen=True, extra="ignore")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="Processes that serve the port together. Several need Redis: without `RELAY_REDIS_URL` the relay runs "
        "its own Valkey.",
    )
    worker_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Loopback port on which the first worker can be asked alone, for its `/metrics`; the second has the "
        "next, and so on. 0: none.",
    )
    worker: int = Field(
        0, ge=0, le=256, description="Which of several workers a process is; their supervisor sets it."
    )
    data_dir: Path = Field(
        Path("var"), description="Where the embedded MongoDB and the generated secret live."
    )
    log_format: Literal["auto", "text", "json"] = Field(
        "auto",
        description="Log lines for people (`text`) or machines (`json`); `auto` asks whether stderr is a terminal.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least severe line logged."
    )

    mongo_uri: SecretStr | None = Field(
        None, description="A MongoDB replica set or sharded cluster. Unset: the relay runs its own `mongod`."
    )
    mongo_database: str = Field(
        "relay", pattern=r"^[A-Za-z0-9_-]{1,38}$", description="Name of the database."
    )
    embedded_cache_gb: float = Field(
        1.0, ge=0.25, le=1024, description="Cache of the embedded `mongod`, in GB."
    )
    redis_url: SecretStr | None = Field(
        None,
        description="Redis or Valkey, by which nodes tell each other what is new and share their rate limits; "
        "`redis+cluster://` for a cluster, by any of its servers. A single node needs none.",
    )

    jwt_secret: SecretStr | None = Field(
        None,
        description="HS256 secret of access tokens, 32 bytes or more. Unset: one is generated in the data directory.",
    )
    jwt_secret_file: Path | None = Field(
        None, description="Several HS256 secrets, one a line, all valid (rotation)."
    )
    jwt_public_key_file: Path | None = Field(
        None,
        description="PEM public key of an issuer of your own (RSA: RS256, P-256: ES256, Ed25519: EdDSA).",
    )
    jwt_jwks_file: Path | None = Field(
        None, description="JWKS file with the public keys of an issuer of your own."
    )
    jwt_audience: str = Field("relay", min_length=1, description="The `aud` a token must have.")
    auto_provision: bool = Field(
        True,
        description="A valid token's unknown user and device are created on first use; so are unknown members.",
    )

    registration: bool = Field(
        True, description="Whether `POST /v1/auth/register` makes accounts. Needs an HS256 secret."
    )
    access_token_seconds: int = Field(
        900, ge=10, le=86_400, description="How long an access token that the relay issues is good for."
    )
    refresh_token_days: float = Field(
        90, gt=0, le=3650, description="A session that is not renewed for so long has ended."
    )
    refresh_repeat_hours: float = Field(
        24,
        gt=0,
        le=24,
        description="How long a refresh token gives its unused successor again, for an answer that got lost.",
    )
    pseudonym_key: SecretStr | None = Field(
        None,
        description="Keys the pseudonyms in audit and tombstones, 32 bytes or more; the same on all nodes, for ever. "
        "Unset: one is generated in the data directory.",
    )
    password_processes: int = Field(
        1, ge=1, le=64, description="Passwords hashed at once, each in a process of low priority with 19 MiB."
    )
    password_queue: Positive = Field(
        200, description="Passwords waiting to be hashed before log-ins are told to come back."
    )

    trusted_proxies: Networks = Field(
        "",
        description="Addresses or networks (comma-separated) of the proxies in front, whose `X-Forwarded-For` is believed.",
    )
    rate_login_address: Rate = Field("20/minute", description="Log-ins from one address.")
    rate_login_account: Rate = Field("10/minute", description="Log-ins to one account.")
    rate_register: Rate = Field("20/minute", description="Registrations from one address.")
    # Nobody guesses 256 random bits, and the phones of a whole network may have one address.
    rate_refresh: Rate = Field("1000/minute", description="Renewals of sessions from one address.")
    rate_connect: Rate = Field("1000/10 seconds", description="New WebSockets from one address.")
    rate_search: Rate = Field("60/minute", description="Searches for people by one user.")
    rate_search_phone: Rate = Field("30/hour", description="Searches by phone number by one user.")
    rate_search_phone_address: Rate = Field(
        "60/hour", description="Searches by phone number from one address."
    )
    rate_key_claim: Rate = Field("300/minute", description="One-time prekeys claimed of one device.")
    rate_key_claim_pair: Rate = Field(
        "120/minute", description="One-time prekeys claimed of one device by one user."
    )
    rate_key_claim_caller: Rate = Field(
        "1000/minute", description="Devices that one user claims keys of; 256 at once must fit."
    )
    rate_key_change: Rate = Field("30/minute", description="Changes of one device's published keys.")
    rate_contact_change: Rate = Field("120/minute", description="Blocks and unblocks by one user.")
    rate_profile_change: Rate = Field(
        "120/minute", description="Changes of profile and push address by one user."
    )
    rate_conversation: Rate = Field(
        "60/minute", description="Conversations made, and additions to groups, by one user."
    )
    rate_conversation_change: Rate = Field(
        "300/minute",
        description="Changes of groups, of roles and removals by one user; each is told to all members.",
    )
    rate_presence: Rate = Field("60/minute", description="Watch lists for presence by one user.")
    rate_report: Rate = Field("20/hour", description="Reports by one user.")
    rate_export: Rate = Field("10/hour", description="Exports of a person's data by one user.")
    message_rate: float = Field(
        500,
        ge=0,
        le=1_000_000,
        description="Messages a second of one device; who posts at several nodes with one Redis has a fifth more altogether. "
        "0: no limit.",
    )
    message_burst: int = Field(2000, ge=1, le=10_000_000, description="Messages of one device at once.")

    typing_rate: float = Field(
        5, ge=0, le=1_000_000, description="`typing` operations a second of one device; 0: no limit."
    )
    typing_burst: int = Field(
        20, ge=1, le=10_000_000, description="`typing` operations of one device at once."
    )

    mailbox_messages: int = Field(
        20_000,
        ge=1,
        le=10_000_000,
        description="Messages that wait for one device before it is left out of more, until half of them are fetched.",
    )
    max_conversations: int = Field(
        5000,
        ge=1,
        le=1_000_000,
        description="Most conversations of one user. What several nodes add at the same moment may go beyond it.",
    )
    max_members: int = Field(10_000, ge=2, le=100_000, description="Most members of a group.")
    large_group: int = Field(
        1000, ge=1, description="A group of more recipient devices takes small bodies only."
    )
    large_group_body_bytes: int = Field(
        8192, ge=1, le=1_048_576, description="Largest message body in such a large group."
    )
    max_contacts: int = Field(10_000, ge=1, le=1_000_000, description="Most contacts of one user.")
    max_watches: int = Field(
        256, ge=1, le=10_000, description="Most people whose presence one connection watches."
    )
    max_devices: int = Field(
        16, ge=1, le=1000, description="Most devices of one user that the relay issued a session for."
    )

    message_ttl_days: float = Field(30, gt=0, le=365, description="How long an unfetched message is kept.")
    fate_hours: float = Field(
        72, gt=0, le=24 * 365, description="How long the fate of a gone message is kept."
    )
    device_inactive_days: float = Field(
        30,
        gt=0,
        le=3650,
        description="A device absent for longer gets no new messages until it connects again.",
    )

    max_frame_bytes: int = Field(
        262_144, ge=1024, le=16_777_216, description="Largest WebSocket frame, either way."
    )
    max_body_bytes: int = Field(65_536, ge=1, le=1_048_576, description="Largest message body.")
    inline_recipients: int = Field(
        64,
        ge=1,
        le=1024,
        description="Recipient devices up to which a message is stored in one piece; for more, in parts of so many.",
    )
    max_recipients: int = Field(
        10_000, ge=1, le=100_000, description="Most recipient devices of one message."
    )
    hot_bytes: int = Field(
        33_554_432,
        ge=0,
        le=1 << 40,
        description="Memory for messages that many devices drain, encoded once for all of them; 0: none are kept.",
    )
    hot_redis_bytes: int = Field(
        33_554_432,
        ge=0,
        le=1 << 40,
        description="Memory of Redis for this node's copies of messages to large groups, which spare other nodes reading them; "
        "0: none are kept there. Workers that share the relay's own Valkey have 64 MiB together, at most.",
    )
    window: int = Field(256, ge=1, le=10_000, description="Unacknowledged messages on one connection.")
    window_bytes: int = Field(1_048_576, ge=1024, description="Unacknowledged bytes on one connection.")
    outbox_bytes: int = Field(
        2_097_152, ge=65_536, description="Bytes queued for one slow socket before it falls behind."
    )
    max_connections: Positive = Field(100_000, description="Open WebSockets on this node.")
    heartbeat_seconds: Seconds = Field(
        25, description="A silent connection is pinged after this, closed after twice this."
    )
    auth_seconds: Seconds = Field(5, description="Time for the first frame to authenticate a connection.")

    commit_messages: int = Field(500, ge=1, le=10_000, description="Most messages of one group commit.")
    commit_bytes: int = Field(
        4_194_304, ge=65_536, le=8_388_608, description="Most bytes of one group commit."
    )
    commits_in_flight: int = Field(2, ge=1, le=16, description="Group commits under way at once.")
    queue_messages: Positive = Field(
        20_000, description="Messages waiting to be committed before sockets are not read."
    )
    queue_bytes: Positive = Field(
        67_108_864, description="Bytes waiting to be committed before sockets are not read."
    )
    commit_timeout_seconds: Seconds = Field(
        2, description="Time limit of one database call of the message path."
    )
    send_deadline_seconds: Seconds = Field(
        10, description="After this a message that could not be committed is refused."
    )

    sweep_seconds: Seconds = Field(
        30, description="Interval of the sweep that heals leftovers and missed deliveries."
    )
    expiry_seconds: Seconds = Field(1, description="Interval of the job that expires due messages.")
    drain_seconds: float = Field(
        5, ge=0, le=60, description="Time for connections to leave when the node stops."
    )

    @field_validator("jwt_secret", "pseudonym_key")
    @classmethod
    def _long_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value().encode()) < 32:
            raise ValueError("must have at least 32 bytes")
        return value

    @field_validator("redis_url", "mongo_uri")
    @classmethod
    def _known_scheme(cls, value: SecretStr | None, info: object) -> SecretStr | None:
        if value is None:
            return None
        name = getattr(info, "field_name", "")
        schemes = (
            ("mongodb://", "mongodb+srv://")
            if name == "mongo_uri"
            else ("redis://", "rediss://", "redis+cluster://", "rediss+cluster://", "unix://")
        )
        if not value.get_secret_value().startswith(schemes):
            raise ValueError("must start with " + " or ".join(schemes))
        return value

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.max_body_bytes * 2 > self.max_frame_bytes:
            raise ValueError("RELAY_MAX_BODY_BYTES must be at most half of RELAY_MAX_FRAME_BYTES")
        own = range(self.worker_port, self.worker_port + self.workers) if self.worker_port else range(0)
        if self.port in own or (own and own[-1] > 65535):
            raise ValueError(
                f"RELAY_WORKER_PORT: workers would listen on {own[0]} to {own[-1]}; "
                "these must be below 65536 and leave out RELAY_PORT"
            )
        return self


def load() -> Settings:
    """The settings of this process. Raises SettingsError with one line naming the first wrong one."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        text = str(first["msg"]).removeprefix("Value error, ")
        if not first["loc"]:
            raise SettingsError(text) from None
        name = f"RELAY_{first['loc'][0]}".upper()
        secret = name in {"RELAY_JWT_SECRET", "RELAY_MONGO_URI", "RELAY_REDIS_URL", "RELAY_PSEUDONYM_KEY"}
        shown = "" if secret else f" (it is {os.environ.get(name, '')!r})"
        raise SettingsError(f"{name}: {text[:1].lower()}{text[1:]}{shown}") from None


def unknown_variables() -> list[str]:
    """Names in the environment that look like settings and are none: usually a typing mistake."""
    known = {f"RELAY_{name}".upper() for name in Settings.model_fields} | _CLIENT_VARIABLES
    known |= {READY_VARIABLE}
    return sorted(name for name in os.environ if name.startswith("RELAY_") and name not in known)
