"""Names and how they are joined and taken apart."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from relay.wire import ids

users = st.from_regex(re.compile(ids.USER_PATTERN), fullmatch=True)
devices = st.from_regex(re.compile(ids.DEVICE_PATTERN), fullmatch=True)
conversations = st.from_regex(re.compile(ids.CONVERSATION_PATTERN), fullmatch=True)
messages = st.uuids().map(str)


@given(user=users, device=devices)
def test_the_user_of_a_mailbox_is_found_again(user: str, device: str) -> None:
    assert ids.user_of(ids.device_key(user, device)) == user
    assert ids.user_of(ids.any_device_key(user)) == user


@given(first=st.tuples(users, devices), second=st.tuples(users, devices))
def test_two_devices_never_share_a_mailbox(first: tuple[str, str], second: tuple[str, str]) -> None:
    assert (ids.device_key(*first) == ids.device_key(*second)) == (first == second)


@given(user=users, other=users, device=devices)
def test_no_device_can_be_called_like_a_placeholder(user: str, other: str, device: str) -> None:
    assert ids.device_key(user, device) != ids.any_device_key(other)


@given(conversation=conversations, message=messages)
def test_a_document_id_is_taken_apart_as_it_was_joined(conversation: str, message: str) -> None:
    assert ids.split_document_id(ids.document_id(conversation, message)) == (conversation, message)


def test_nobody_can_be_called_like_the_relay() -> None:
    assert ids.USER_ID.fullmatch(ids.RELAY_USER) is None


def test_new_ids_are_message_ids_and_differ() -> None:
    made = {ids.new_id() for _ in range(1000)}
    assert len(made) == 1000
    for one in made:
        assert ids.MESSAGE_ID.fullmatch(one)
        assert ids.CONVERSATION_ID.fullmatch(one)
