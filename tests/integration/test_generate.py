"""Generated people and conversations: the relay takes them for its own."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from pymongo.errors import BulkWriteError

from models.accounts import Device, User
from models.contacts import Contact
from models.conversations import Conversation, Membership
from scripts.tools.generate import Generated, fill, prepare
from scripts.tools.population import Plan, Population
from tests.support.node import Node, NodeFactory

PLAN = Plan(
    users=300, memberships=3000, contacts=1000, heavy=60, seed=7, now=datetime(2026, 3, 1, 12, tzinfo=UTC)
)


async def generate(nodes: NodeFactory, plan: Plan = PLAN) -> Generated:
    """Fills the database of these nodes."""
    await prepare(nodes.uri, nodes.database)
    return await asyncio.to_thread(fill, nodes.uri, nodes.database, plan, lambda _part, _more: None)


async def walk(node: Node, path: str, user: str) -> list[dict[str, Any]]:
    """Every item of a list."""
    found: list[dict[str, Any]] = []
    following: str | None = ""
    while following is not None:
        status, page = await node.request(
            "GET", f"{path}&cursor={following}" if following else path, user, "phone"
        )
        assert status == 200, page
        found += page["items"]
        following = page["next"]
    return found


async def test_the_heavy_one_finds_all_conversations_and_contacts_and_others_by_search(
    nodes: NodeFactory,
) -> None:
    made = await generate(nodes)
    assert made.counts == {
        "users": 300,
        "devices": 300,
        "contacts": 1000,
        "conversations": made.counts["conversations"],
        "memberships": made.counts["memberships"],
    }
    assert 2999 <= made.counts["memberships"] <= 3000
    node = await nodes.start()
    heavy, username, name = made.examples[0]
    conversations = await walk(node, "/v1/conversations?limit=25", heavy)
    assert len({one["id"] for one in conversations}) == len(conversations) == 60
    assert all(heavy in {member["user"] for member in one["members"]} for one in conversations)
    assert len(await walk(node, "/v1/contacts?limit=25", heavy)) == 60
    for q in (username, name, username[:4]):
        people = await walk(node, f"/v1/users?q={q}&limit=20", made.examples[1][0])
        assert heavy in {person["id"] for person in people}


async def test_a_direct_conversation_that_was_generated_is_the_one_that_a_creation_finds(
    nodes: NodeFactory,
) -> None:
    made = await generate(nodes)
    node = await nodes.start()
    heavy = made.examples[0][0]
    direct = next(
        one for one in await walk(node, "/v1/conversations?limit=25", heavy) if one["type"] == "direct"
    )
    other = next(member["user"] for member in direct["members"] if member["user"] != heavy)
    assert await node.direct(heavy, other) == direct["id"]


def documents(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """A whole population."""
    population = Population(plan)
    people = list(population.people())
    contacts = list(population.contacts())
    conversations = list(population.conversations())
    return {
        "users": [user for user, _ in people],
        "devices": [device for _, device in people],
        "contacts": contacts,
        "conversations": [conversation for conversation, _ in conversations],
        "memberships": [row for _, rows in conversations for row in rows],
    }


def test_the_documents_have_the_fields_of_their_models_and_no_other() -> None:
    found = documents(PLAN)
    models = {"users": User, "devices": Device, "contacts": Contact, "conversations": Conversation}
    for name, model in {**models, "memberships": Membership}.items():
        fields = set(model.model_fields) - {"id"} | {"_id"}
        assert all(set(row) <= fields for row in found[name]), name
        assert len({row["_id"] for row in found[name]}) == len(found[name])


def test_the_same_seed_makes_the_same_population_and_another_another() -> None:
    assert documents(PLAN) == documents(PLAN)
    assert documents(PLAN)["users"] != documents(replace(PLAN, seed=8))["users"]


def test_a_fifth_of_the_people_have_most_of_the_places() -> None:
    places = Counter(row["user"] for row in documents(replace(PLAN, heavy=0, contacts=0))["memberships"])
    busy = sum(count for _, count in places.most_common(60))
    assert 0.55 < busy / places.total() < 0.85


@pytest.mark.parametrize(
    "wrong",
    [{"heavy": 300}, {"memberships": 119}, {"memberships": 10_000}, {"contacts": 59}, {"contacts": 7000}],
)
def test_a_plan_that_cannot_be_made_says_why(wrong: dict[str, int]) -> None:
    assert PLAN.problem() is None
    problem = replace(PLAN, **wrong).problem()  # type: ignore[arg-type]  # all of them are numbers
    assert problem is not None
    assert f"--{next(iter(wrong))}" in problem


async def test_more_can_be_added_and_the_same_again_cannot(nodes: NodeFactory) -> None:
    await generate(nodes)
    assert await prepare(nodes.uri, nodes.database) == 300
    await generate(nodes, replace(PLAN, first=300))
    assert await prepare(nodes.uri, nodes.database) == 600
    with pytest.raises(BulkWriteError):
        await generate(nodes)
