"""The control plane's stores in memory, and what mongomock needs to run them."""

from __future__ import annotations

from typing import Any

from beanie import init_beanie
from mongomock.collection import BulkOperationBuilder
from mongomock_motor import AsyncMongoMockClient

from relay.store.mongo import CONTROL


def _without_sort(method: Any) -> Any:
    """PyMongo hands every bulk update a ``sort`` that mongomock does not know; only an absent one can be left out."""

    def add(self: Any, *args: Any, sort: Any = None, **options: Any) -> Any:
        if sort:
            raise NotImplementedError("mongomock cannot sort in a bulk write")
        return method(self, *args, **options)

    add.knows_sort = True  # type: ignore[attr-defined]
    return add


async def start_in_memory(name: str) -> None:
    """Points the control plane's documents at a fresh database in memory."""
    for method in ("add_update", "add_replace"):
        found = getattr(BulkOperationBuilder, method)
        if not hasattr(found, "knows_sort"):
            setattr(BulkOperationBuilder, method, _without_sort(found))
    client: Any = AsyncMongoMockClient(tz_aware=True)
    await init_beanie(database=client.get_database(name), document_models=list(CONTROL))
    for document in CONTROL:
        collection = document.get_motor_collection()
        for index in getattr(document.Settings, "indexes", ()):
            if "partialFilterExpression" not in index.document:
                continue
            # mongomock's create_indexes forgets what makes an index partial; its create_index does not.
            await collection.drop_index(index.document["name"])
            await collection.create_index(
                list(index.document["key"].items()),
                name=index.document["name"],
                unique=index.document.get("unique", False),
                partialFilterExpression=index.document["partialFilterExpression"],
            )
