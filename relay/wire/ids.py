"""Names of things: what they look like and how they are joined.

A *device key* is ``user/device``; it names one mailbox. Two placeholders share its form: ``user/*`` stands for a member
without any active device, ``user/!`` for one who has blocked the sender. A *document id* is ``"<conversation> <message id>"``: unique over all shards, because ``_id``
alone is unique on its own shard only. A message of a large group is stored in several documents: its *head* has the document
id, its *parts* have ``"<document id> <writing>.<number>"``, where the writing names one attempt to store it.
"""

from __future__ import annotations

import re
import secrets
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

PARTS_KEY: Final = f"{RELAY_USER}/parts"
"""What the head of a message in parts awaits besides its recipients: the end of the last part."""


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
    """The conversation and message id of a document id, or of a part's."""
    conversation, message, *_ = doc_id.split(" ", 2)
    return conversation, message


def conversation_of(stored_id: str) -> str:
    """The conversation of a document, by its ``_id``: a message's, or one of its parts'."""
    return stored_id.partition(" ")[0]


def part_id(doc_id: str, writing: str, number: int) -> str:
    """The ``_id`` of one part of a message; the head is number 0 and has the document id itself."""
    return f"{doc_id} {writing}.{number}" if number else doc_id


def part_ids(doc_id: str, writing: str, parts: int) -> list[str]:
    """The ``_id`` of every part but the head of a message stored in so many documents."""
    return [f"{doc_id} {writing}.{number}" for number in range(1, parts)]


def is_part(stored_id: str) -> bool:
    """Whether a stored document is a part of a message, and not its head."""
    return stored_id.count(" ") > 1


def head_id(stored_id: str) -> str:
    """The document id of the message that a stored document is, or is a part of."""
    return stored_id[: stored_id.rindex(" ")] if is_part(stored_id) else stored_id


def new_writing() -> str:
    """A name for one attempt to store a message in parts."""
    return secrets.token_hex(6)


def new_id() -> str:
    """A fresh random id for a conversation or a message."""
    return str(uuid.uuid4())
