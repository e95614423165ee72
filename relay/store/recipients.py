"""Who receives a message, when that has changed while it was on its way: as pure code, from a submission and what is so now."""

from __future__ import annotations

from collections.abc import Iterator

from relay.store.audience import Audience
from relay.store.submissions import Submission
from relay.wire.envelope import Envelope
from relay.wire.ids import is_placeholder, user_of


def renew(submission: Submission, *, tried: bool) -> None:
    """Makes the submission one for its audience. One that was ``tried`` may be stored by now: when it is sealed it has no
    ciphertext for who has come since."""
    audience, envelope = submission.audience, submission.envelope
    awaiting = [*audience.awaiting(submission.sender_key)]
    awaiting += [key for key in submission.also if key not in awaiting]
    if tried and submission.check is not None:
        awaiting = _left(envelope.awaiting, set(awaiting), audience)
    trimmed = [*audience.trimmed(submission.sender_key)]
    # A system message's for those who are no members any more were full when it was made.
    trimmed += [key for key in envelope.trimmed if user_of(key) not in audience.members]
    if (awaiting, trimmed) != (envelope.awaiting, envelope.trimmed):
        submission.renewed = submission.renewed or tried
        envelope.awaiting, envelope.trimmed = awaiting, trimmed
        envelope.shared = len(awaiting) > 1 or bool(trimmed)
        submission.encode()


def take_strayed(submission: Submission, audience: Audience) -> Iterator[tuple[Envelope, list[str]]]:
    """Takes the mailboxes of those who are no members any more off the pieces in which a submission was stored; yields each piece
    concerned, with them."""
    allowed = set(audience.awaiting(submission.sender_key)).union(submission.also)
    for piece in submission.pieces:
        strayed = {
            key for key in piece.awaiting if key not in allowed and user_of(key) not in audience.members
        }
        if strayed:
            piece.awaiting = [key for key in piece.awaiting if key not in strayed]
            yield piece, sorted(strayed)


def _left(before: list[str], now: set[str], audience: Audience) -> list[str]:
    """Those mailboxes of ``before`` that are awaited still; one for any device of a member is, whatever devices there are now."""
    return [key for key in before if key in now or (is_placeholder(key) and user_of(key) in audience.members)]
