"""Which changes a message under way is concerned by."""

from __future__ import annotations

from time import monotonic

import pytest

from relay.store.audience import LEASE_SECONDS, Audience, Roster
from relay.store.submissions import Submission
from relay.wire.envelope import Envelope


@pytest.fixture
def message() -> Submission:
    """A message of the conversation ``talk``, of ann to bob, and to a device of eve, who was removed from it."""
    audience = Audience("talk", Roster({"ann": ["ann/phone"], "bob": []}))
    envelope = Envelope(
        "talk",
        "m1",
        user="ann",
        device="phone",
        seq=1,
        at=1,
        kind="text",
        body="hello",
        structured=False,
        awaiting=["bob/*", "eve/phone"],
    )
    return Submission(
        envelope,
        audience,
        "ann/phone",
        again=False,
        deadline=monotonic() + 10,
        done=lambda _: None,
        also=["eve/phone"],
    )


def test_a_change_of_its_conversation_concerns_a_message_and_of_others_does_not(message: Submission) -> None:
    assert message.concerns({"talk", "other"}, frozenset())
    assert not message.concerns({"other"}, frozenset())


@pytest.mark.parametrize(("user", "expected"), [("ann", True), ("bob", True), ("eve", True), ("zoe", False)])
def test_changes_of_those_it_may_go_to_concern_a_message(
    message: Submission, user: str, expected: bool
) -> None:
    assert message.concerns((), {user}) is expected
    assert message.concerns({"other"}, {user, "dan"}) is expected


@pytest.mark.parametrize("how", ["stale", "old"])
def test_what_may_just_be_getting_other_recipients_is_concerned_by_every_person(
    message: Submission, how: str
) -> None:
    if how == "stale":
        message.audience.stale = True
    else:
        message.audience.resolved -= LEASE_SECONDS
    assert message.concerns((), {"zoe"})
    assert not message.concerns({"other"}, frozenset())
