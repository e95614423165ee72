"""How scripts/chat finds people by name, and what it calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from relay.client import RequestFailed
from scripts.tools.names import Names, Unknown, find_user

HEX = "0123456789abcdef0123456789abcdef"


class Relay:
    """Answers from a table of paths; what is not in it is absent."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def __call__(self, method: str, path: str) -> Any:
        assert method == "GET"
        self.asked.append(path)
        found = self.answers.get(path)
        if isinstance(found, Exception):
            raise found
        if found is None:
            raise RequestFailed(404, "not_found", "no such user")
        return found


def person(user: str, username: str | None, name: str | None = None) -> dict[str, Any]:
    return {"id": user, "username": username, "name": name}


def page(*items: dict[str, Any], following: str | None = None) -> dict[str, Any]:
    return {"items": list(items), "next": following}


async def test_a_user_name_is_found_exactly_among_those_that_begin_so_on_any_page() -> None:
    relay = Relay(
        {
            "/v1/users?q=bob": page(person("u1", "bobby"), person("u2", None, "bob"), following="x/y"),
            "/v1/users?q=bob&cursor=x%2Fy": page(person("u3", "bob", "Somebody")),
        }
    )
    assert await find_user(relay, "Bob") == "u3"


async def test_who_is_not_found_by_name_is_looked_for_by_id() -> None:
    relay = Relay({"/v1/users?q=bob": page(person("u1", "bobby")), "/v1/users/bob": person("bob", None)})
    assert await find_user(relay, "bob") == "bob"
    assert await find_user(Relay({"/v1/users/bob%40x": person("bob@x", None)}), "bob@x") == "bob@x"


async def test_a_user_name_is_preferred_to_an_id_that_reads_the_same() -> None:
    relay = Relay({"/v1/users?q=bob": page(person("u1", "bob")), "/v1/users/bob": person("bob", None)})
    assert await find_user(relay, "bob") == "u1"


async def test_nobody_catches_messages_by_taking_the_id_of_another_as_user_name() -> None:
    relay = Relay({f"/v1/users?q={HEX}": page(person("u1", HEX)), f"/v1/users/{HEX}": person(HEX, "bob")})
    assert await find_user(relay, HEX) == HEX


@pytest.mark.parametrize("who", ["nobody", "x", "a/b", "../me", "nobody?q=bob", HEX])
async def test_nobody_is_told_in_one_line(who: str) -> None:
    relay = Relay({f"/v1/users?q={who}": page()})
    with pytest.raises(Unknown, match=r"^nobody is called") as caught:
        await find_user(relay, who)
    assert "\n" not in str(caught.value)


async def test_a_relay_that_does_not_answer_is_no_answer() -> None:
    relay = Relay({"/v1/users?q=bob": RequestFailed(503, "unavailable", "later")})
    with pytest.raises(RequestFailed):
        await find_user(relay, "bob")


async def test_members_are_called_by_their_names_with_one_question_and_others_by_their_profiles() -> None:
    members = [{"user": "u1", "name": "Ann"}, {"user": "u2", "name": None}]
    relay = Relay({"/v1/conversations/c1": {"members": members}, "/v1/users/u3": person("u3", "cleo")})
    names = Names(relay)
    assert await names.of("c1", ["u1"]) == {"u1": "Ann"}
    assert relay.asked == ["/v1/conversations/c1"]
    assert await names.of("c1", ["u1", "u2", "u3", "$relay"]) == {
        "u1": "Ann",
        "u2": "u2",
        "u3": "cleo",
        "$relay": "$relay",
    }
    asked = len(relay.asked)
    await names.of("c1", ["u1", "u2", "u3"])
    assert len(relay.asked) == asked


async def test_two_people_of_one_name_are_told_apart() -> None:
    members = [{"user": "11111111aa", "name": "Ann"}, {"user": "22222222bb", "name": "Ann"}]
    names = Names(Relay({"/v1/conversations/c1": {"members": members}}))
    assert await names.of("c1", ["11111111aa", "22222222bb"]) == {
        "11111111aa": "Ann",
        "22222222bb": "Ann (22222222)",
    }


@pytest.mark.parametrize(
    "error",
    [lambda: RequestFailed(0, "unreachable", "gone"), lambda: TimeoutError(), lambda: OSError("no token")],
)
async def test_without_an_answer_people_are_their_ids(error: Callable[[], Exception]) -> None:
    names = Names(Relay({"/v1/conversations/c1": error()}))
    assert await names.of("c1", ["u1"]) == {"u1": "u1"}
