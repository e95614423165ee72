"""The device SDK: durable history and outbox in SQLite over the relay's WebSocket. See docs/client.md."""

from relay.client.connection import Tuning
from relay.client.device import Device
from relay.client.errors import (
    ClientTooOld,
    DeviceError,
    InvalidMessage,
    OutboxFull,
    Replaced,
    RequestFailed,
    SessionEnded,
    StorageError,
    TokenRefused,
    WrongDatabase,
)
from relay.client.session import Session
from relay.client.storage import Storage
from relay.client.tokens import Token
from relay.client.values import (
    Connected,
    Disconnected,
    Draft,
    Drained,
    Event,
    Failed,
    Gap,
    Live,
    Message,
    NewConversation,
    Presence,
    ReadCursor,
    Receipt,
    Stopped,
    Stored,
    Typing,
)

__all__ = [
    "ClientTooOld",
    "Connected",
    "Device",
    "DeviceError",
    "Disconnected",
    "Draft",
    "Drained",
    "Event",
    "Failed",
    "Gap",
    "InvalidMessage",
    "Live",
    "Message",
    "NewConversation",
    "OutboxFull",
    "Presence",
    "ReadCursor",
    "Receipt",
    "Replaced",
    "RequestFailed",
    "Session",
    "SessionEnded",
    "Stopped",
    "Storage",
    "StorageError",
    "Stored",
    "Token",
    "TokenRefused",
    "Tuning",
    "Typing",
    "WrongDatabase",
]
