"""What nodes of different ages understand of each other."""

from __future__ import annotations

import msgspec
import pytest

from relay.routing import hints
from relay.routing.hints import Back, Beat, Ended, Parcel, Recheck


class Newer(msgspec.Struct, array_like=True, tag="newer"):
    """A hint of which this node has never heard."""

    words: list[str]


def test_an_unknown_hint_costs_none_of_those_beside_it() -> None:
    data = msgspec.msgpack.encode(["n1", 7, [Recheck(["ann"]), Newer(["what", "ever"]), Ended("bob/phone")]])
    assert hints.decode(data) == Parcel("n1", 7, [Recheck(["ann"]), Ended("bob/phone")])


def test_a_hint_with_a_field_more_is_read() -> None:
    data = msgspec.msgpack.encode(["n1", 7, [["b", "more"], ["k", ["ann"], 5]]])
    assert hints.decode(data) == Parcel("n1", 7, [Beat(), Recheck(["ann"])])


@pytest.mark.parametrize("data", [b"", b"\xc1", msgspec.msgpack.encode(["n1"]), msgspec.msgpack.encode("n1")])
def test_what_is_no_parcel_is_unreadable(data: bytes) -> None:
    with pytest.raises(hints.Unreadable):
        hints.decode(data)


def test_every_hint_is_read_as_it_was_written() -> None:
    parcel = Parcel("n1", 0, [Beat(), Back(), Recheck(["ann"])])
    assert hints.decode(hints.encode(parcel)) == parcel
