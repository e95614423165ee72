"""The control plane's stores on either backend, and revisions carried out as the handlers do it, without messages."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from beanie import init_beanie

from models.contacts import Contact
from models.conversations import Conversation, Membership
from relay.store.conversations import Conversations, ConversationView
from relay.store.mongo import CONTROL, Mongo
from relay.store.reading import ReadCursors
from relay.store.revisions import ConversationType, Proposal, Revision, Revisions, Situation
from relay.wire.errors import RelayError
from tests.support.memory import start_in_memory

BACKENDS = ["memory", "mongod"]
Decide = Callable[[Situation], Proposal | None]


@asynccontextmanager
async def open_control(backend: str, uri: str) -> AsyncIterator[str]:
    """Points the documents at an empty database of this kind, with its indexes."""
    name = f"c{uuid.uuid4().hex[:20]}"
    if backend == "memory":
        await start_in_memory(name)
        yield backend
        return
    mongo = Mongo(uri, name)
    await init_beanie(database=mongo.database, document_models=list(CONTROL))
    try:
        yield backend
    finally:
        await mongo.client.drop_database(name)
        mongo.close()


async def clear() -> None:
    """Empties every collection."""
    for document in CONTROL:
        await document.get_motor_collection().delete_many({})


async def create(
    revisions: Revisions,
    creator: str,
    others: Sequence[str],
    kind: ConversationType = "group",
    *,
    name: str | None = None,
    ref: str | None = None,
) -> tuple[str, bool]:
    """Makes a conversation, or finds it; its id, and whether it is new."""
    conversation, revision, new = await revisions.create(creator, kind, others, name=name, ref=ref)
    if revision is not None:
        await carry_out(revisions, revision)
    return conversation, new


async def carry_out(revisions: Revisions, revision: Revision) -> None:
    """Does the steps of a revision in the database."""
    await revisions.apply(revision)
    await revisions.finish(revision)


async def change(
    revisions: Revisions,
    conversation: str,
    actor: str | None,
    decide: Decide,
    concerned: Sequence[str] = (),
    *,
    everybody: bool = False,
) -> Revision | None:
    """Brings a proposal about, in its turn."""
    async with revisions.turn(conversation):
        while True:
            revision, own = await revisions.begin(conversation, actor, concerned, decide, everybody=everybody)
            if revision is None:
                return None
            await carry_out(revisions, revision)
            if own:
                return revision


def always(proposal: Proposal) -> Decide:
    """Decides for this proposal whatever the situation."""
    return lambda _: proposal


async def view_of(conversation: str, user: str) -> ConversationView:
    """A conversation as one member sees it."""
    return await Conversations().get(conversation, user)


async def read(conversation: str, user: str, up_to: int) -> bool:
    """A member reads a conversation up to here. Whether they are one."""
    found = await ReadCursors(timeout=5).move({(conversation, user): up_to})
    return (conversation, user) in found.members


async def document(conversation: str) -> dict[str, Any]:
    """A conversation as it is stored."""
    found = await Conversation.get_motor_collection().find_one({"_id": conversation})
    assert found is not None
    return dict(found)


async def row(conversation: str, user: str) -> dict[str, Any]:
    """A membership as it is stored."""
    found = await Membership.get_motor_collection().find_one({"_id": f"{conversation} {user}"})
    assert found is not None
    return dict(found)


async def roles(conversation: str) -> dict[str, str]:
    """The members and their roles."""
    cursor = Membership.get_motor_collection().find({"conversationId": conversation, "removedAt": None})
    return {one["user"]: one["role"] async for one in cursor}


async def contact(owner: str, user: str, **fields: Any) -> None:
    """Writes what one person keeps of another."""
    await Contact.get_motor_collection().update_one(
        {"_id": f"{owner} {user}"},
        {
            "$set": {
                "owner": owner,
                "user": user,
                "sortKey": user,
                "listed": False,
                "blocked": False,
                **fields,
            }
        },
        upsert=True,
    )


async def refused(call: Awaitable[object]) -> str:
    """The code with which a call is refused."""
    with pytest.raises(RelayError) as caught:
        await call
    return caught.value.code
