"""A message on its way: the value that the send handler makes, the store keeps and the router hands out."""

from __future__ import annotations

from copy import copy
from typing import Final

from relay.wire import ids
from relay.wire.codec import dumps

WITHDRAWN: Final = "withdrawn"
"""The kind of a message that takes back the one that it replies to."""
_NOBODY: Final[list[str]] = []


class Envelope:
    """One message of one conversation with the devices that await it.

    ``at`` is the wall clock in milliseconds, ``expires`` likewise or None for the full time to live. ``body`` is text;
    with ``structured`` it is the JSON text of an object. ``sealed`` maps device keys to ciphertexts. ``size`` is the bytes it takes in the store, set when it is encoded for it or
    read from it; windows and queues count it. ``shared``: somebody else awaits it too, or
    has it already. ``resent``: its sender did not know whether it was taken before. ``trimmed`` are mailboxes that it is left out of, because they are full. Never changed once
    submitted, except that ``awaiting`` and ``trimmed`` may be replaced before it is committed.

    ``doc_id`` names the message. ``stored_id`` is the ``_id`` of the document in which these recipients await it: another one
    where the message is stored in ``parts`` documents, written under the name ``writing``. Of these only the head has
    ``trimmed``.
    """

    __slots__ = (
        "_frame",
        "at",
        "awaiting",
        "body",
        "conversation",
        "device",
        "doc_id",
        "expires",
        "id",
        "kind",
        "media",
        "number",
        "parts",
        "reply_to",
        "resent",
        "sealed",
        "seq",
        "shared",
        "size",
        "stored_id",
        "structured",
        "trimmed",
        "user",
        "writing",
    )

    def __init__(
        self,
        conversation: str,
        message: str,
        *,
        user: str,
        device: str,
        seq: int,
        at: int,
        kind: str,
        body: str | None,
        awaiting: list[str],
        structured: bool = False,
        reply_to: str | None = None,
        media: list[str] | None = None,
        sealed: dict[str, str] | None = None,
        expires: int | None = None,
        trimmed: list[str] | None = None,
    ) -> None:
        self.doc_id = self.stored_id = ids.document_id(conversation, message)
        self.parts = 1
        self.number = 0
        self.writing: str | None = None
        self.conversation = conversation
        self.id = message
        self.user = user
        self.device = device
        self.seq = seq
        self.at = at
        self.kind = kind
        self.body = body
        self.structured = structured
        self.awaiting = awaiting
        self.reply_to = reply_to
        self.media = media
        self.sealed = sealed
        self.expires = expires
        self.size = 0
        self.resent = False
        self.trimmed = trimmed or _NOBODY
        # What was left out of a mailbox ends by what its document says, not by what a connection knows.
        self.shared = len(awaiting) > 1 or bool(trimmed)
        self._frame: str | None = None

    @classmethod
    def of_frame(
        cls,
        conversation: str,
        message: str,
        *,
        user: str,
        device: str,
        seq: int,
        at: int,
        kind: str,
        frame: str,
    ) -> Envelope:
        """A message of several devices whose encoded frame is known; it is delivered, and not stored again."""
        found = cls(
            conversation,
            message,
            user=user,
            device=device,
            seq=seq,
            at=at,
            kind=kind,
            body=None,
            awaiting=[],
        )
        found.shared = True
        found._frame = frame
        return found

    def frame_for(self, key: str) -> str:
        """The ``msg`` frame for one device, encoded once and shared by all, but for its own sealed entry."""
        frame = self._frame
        if frame is None:
            frame = self._frame = self._encode()
        if self.sealed is None:
            return frame
        own = self.sealed.get(key)
        return frame if own is None else f'{frame[:-1]},"sealed":"{own}"}}'

    def split(self, most: int, writing: str) -> list[Envelope]:
        """The parts in which it is stored, the head first, each with at most ``most`` recipients. They share one encoded
        frame; what it was left out of is the head's."""
        if self._frame is None:
            self._frame = self._encode()
        awaiting = self.awaiting
        count = max(1, -(-len(awaiting) // most))
        parts = []
        for number in range(count):
            part = copy(self)
            part.awaiting = awaiting[number * most : (number + 1) * most]
            if number:
                part.trimmed = _NOBODY
            part.stored_id = ids.part_id(self.doc_id, writing, number)
            part.writing, part.number, part.parts = writing, number, count
            part.shared = self.shared
            parts.append(part)
        return parts

    def _encode(self) -> str:
        if self.body is None:
            body = "null"
        else:
            body = self.body if self.structured else dumps(self.body)
        # Everything but the body comes from alphabets that need no escaping (relay.wire.ids).
        frame = (
            f'{{"t":"msg","id":"{self.id}","conv":"{self.conversation}","seq":{self.seq},"at":{self.at},'
            f'"from":{{"user":"{self.user}","device":"{self.device}"}},"kind":"{self.kind}","body":{body}'
        )
        if self.reply_to is not None:
            frame += f',"replyTo":"{self.reply_to}"'
        if self.media:
            frame += f',"media":{dumps(self.media)}'
        return frame + "}"
