"""A message as devices get it, already encoded: what nodes keep for each other and hand to each other."""

from __future__ import annotations

from typing import Self

import msgspec

from relay.wire.envelope import Envelope
from relay.wire.ids import split_document_id


class Framed(msgspec.Struct, array_like=True):
    """A committed message; ``frame`` is its ``msg`` frame without any ciphertext. The rest is as in ``Envelope``."""

    doc_id: str
    user: str
    device: str
    seq: int
    at: int
    kind: str
    size: int
    frame: str
    reply_to: str | None = None

    @classmethod
    def of(cls, envelope: Envelope) -> Self:
        """Of a message that is stored, or read from the store."""
        return cls(
            doc_id=envelope.doc_id,
            user=envelope.user,
            device=envelope.device,
            seq=envelope.seq,
            at=envelope.at,
            kind=envelope.kind,
            size=envelope.size,
            frame=envelope.frame_for(""),
            reply_to=envelope.reply_to,
        )

    def envelope(self) -> Envelope:
        """It again, for several devices, to be delivered and not stored again."""
        conversation, message = split_document_id(self.doc_id)
        found = Envelope.of_frame(
            conversation,
            message,
            user=self.user,
            device=self.device,
            seq=self.seq,
            at=self.at,
            kind=self.kind,
            frame=self.frame,
        )
        found.size = self.size
        found.reply_to = self.reply_to
        return found
