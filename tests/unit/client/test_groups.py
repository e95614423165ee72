"""How scripts/chat finds the group that certain people have already, and learns what a group is called."""

from __future__ import annotations

from typing import Any

from relay.client import RequestFailed
from scripts.tools.groups import Titles, group_of


def conversation(name: str, members: str, made: int, kind: str = "group", **more: Any) -> dict[str, Any]:
    people = [{"user": user} for user in members.split()]
    return {
        "id": name,
        "type": kind,
        "members": people,
        "memberCount": len(people),
        "createdAt": made,
        **more,
    }


class Pages:
    """A relay with these pages of conversations."""

    def __init__(self, *pages: list[dict[str, Any]]) -> None:
        self.pages = pages
        self.asked: list[str] = []

    async def request(self, method: str, path: str) -> Any:
        self.asked.append(f"{method} {path}")
        number = int(path.partition("&cursor=")[2] or "0")
        more = number + 1 < len(self.pages)
        return {"items": self.pages[number], "next": str(number + 1) if more else None}


async def test_the_oldest_group_of_exactly_these_people_is_found_on_any_page() -> None:
    relay = Pages(
        [
            conversation("direct", "ann bob", 1, "direct"),
            conversation("more", "ann bob cleo dora", 2),
            conversation("younger", "cleo ann bob", 9),
        ],
        [conversation("older", "ann bob cleo", 5), conversation("cut", "ann bob cleo", 3, memberCount=200)],
    )
    assert await group_of(relay.request, {"ann", "bob", "cleo"}) == "older"
    assert relay.asked == ["GET /v1/conversations?limit=200", "GET /v1/conversations?limit=200&cursor=1"]
    assert await group_of(relay.request, {"ann", "bob", "dora"}) is None


async def test_a_title_comes_with_the_one_before_and_is_unknown_without_an_answer() -> None:
    names = ["Books", "Books", "Films"]

    async def request(_: str, path: str) -> Any:
        assert path == "/v1/conversations/c1"
        if not names:
            raise RequestFailed(0, "unreachable", "no relay")
        return {"name": names.pop(0)}

    titles = Titles(request)
    found = [await titles.learn("c1") for _ in range(4)]
    assert found == [("Books", None), ("Books", "Books"), ("Films", "Books"), (None, None)]
