"""Names of things: what they look like and how they are joined.

A *device key* is ``user/device``; it names one mailbox. Two placeholders share its form: ``user/*`` stands for a member
without any active device, ``user/!`` for one who has blocked the sender. A *document id* is ``"<conversation> <message id>"``: unique over all shards, because ``_id``
alone is unique on its own shard only.
"""

from __future__ import annotations

import re
import uuid
from typing import Final

UUID_PATTERN: Final = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
CONVERSATION_PATTERN: Final = r"[A-Za-z0-9_.:-]{1,64}"
USER_PATTERN: Final = r"[A-Za-z0-9_.@:+-]{1,128}"
DEVICE_PATTERN: Final = r"[A-Za-z0-9_.:-]{1,64}"
KIND_PATTERN: Final = r"[a-z][a-z0-9.-]{0,31}"
MEDIA_PATTERN: Final = r"[A-Za-z0-9_-]{1,64}"

MESSAGE_ID: Final = re.compile(UUID_PATTERN)
CONVERSATION_ID: Final = re.compile(CONVERSATION_PATTERN)
USER_ID: Final = re.compile(USER_PATTERN)
DEVICE_ID: Final = re.compile(DEVICE_PATTERN)

RELAY_USER: Final = "$relay"
"""The sender of system messages. No user can be called so: ``$`` is not in the alphabet of user ids."""


def device_key(user: str, device: str) -> str:
    """The mailbox of one device."""
    return f"{user}/{device}"


def any_device_key(user: str) -> str:
    """The mailbox of a member without any active device; whichever device of theirs comes next drains it."""
    return f"{user}/*"


def blocked_key(user: str) -> str:
    """Where the messages of people whom this member has blocked wait: nobody drains it, so they expire."""
    return f"{user}/!"


def is_placeholder(key: str) -> bool:
    """Whether a key stands for no device."""
    return key.endswith(("/*", "/!"))


def user_of(key: str) -> str:
    """The user of a device key or placeholder (neither part can hold a slash)."""
    return key[: key.index("/")]


def document_id(conversation: str, message: str) -> str:
    """The ``_id`` of a stored message. Neither part can hold a space."""
    return f"{conversation} {message}"


def split_document_id(doc_id: str) -> tuple[str, str]:
    """The conversation and message id of a document id."""
    conversation, _, message = doc_id.partition(" ")
    return conversation, message


def new_id() -> str:
    """A fresh random id for a conversation or a message."""
    return str(uuid.uuid4())
