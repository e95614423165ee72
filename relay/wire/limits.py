"""The names of the limits whose being reached is counted (``relay_limits_reached_total``): a closed set."""

from __future__ import annotations

from enum import StrEnum


class Limit(StrEnum):
    """What there can be too much of. A ``RelayError`` names the limit that it tells of."""

    MESSAGE_RATE = "message_rate"
    REQUEST_RATE = "request_rate"
    TYPING_RATE = "typing_rate"
    READ_RATE = "read_rate"
    CONNECTIONS = "connections"
    WINDOW = "window"
    MAILBOX = "mailbox"
    RECIPIENTS = "recipients"
    BODY = "body"
    GROUP_BODY = "group_body"
    FRAME = "frame"
    OPERATIONS = "operations"
    IDS = "ids"
    LIST = "list"
    REQUEST = "request"
    CONVERSATIONS = "conversations"
    MEMBERS = "members"
    CONTACTS = "contacts"
    WATCHES = "watches"
    DEVICES = "devices"
    PREKEYS = "prekeys"
