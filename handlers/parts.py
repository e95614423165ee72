"""Messages of large groups as one: what their parts say, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from handlers.context import Context
from relay.store.fates import Gone, whole_of
from relay.store.ledger import Fate
from relay.wire.ids import part_ids

# So many messages' parts are in memory at once.
_AT_ONCE: Final = 4
# What is told of a message whose parts ended differently: the first that any of them says.
_ORDER: Final[tuple[Fate, ...]] = ("withdrawn", "expired", "delivered", "trimmed", "released")


async def add_parts(ctx: Context, waiting: dict[str, Mapping[str, Any]], gone: dict[str, Gone]) -> None:
    """Adds to messages, by document id, what their parts say of who awaits them and who has them. Raises what the store
    raises."""
    heads = [doc_id for doc_id, head in waiting.items() if "parts" in head]
    for start in range(0, len(heads), _AT_ONCE):
        await _add_waiting(ctx, waiting, heads[start : start + _AT_ONCE])
    ended = [doc_id for doc_id, fate in gone.items() if fate.parts > 1]
    for start in range(0, len(ended), _AT_ONCE):
        await _add_gone(ctx, gone, ended[start : start + _AT_ONCE])


async def _add_waiting(ctx: Context, waiting: dict[str, Mapping[str, Any]], doc_ids: list[str]) -> None:
    names = {
        doc_id: part_ids(doc_id, str(waiting[doc_id]["writing"]), int(waiting[doc_id]["parts"]))
        for doc_id in doc_ids
    }
    wanted = [name for parts in names.values() for name in parts]
    parts = await ctx.messages.read(wanted)
    fates = await ctx.fates.find([name for name in wanted if name not in parts])
    for doc_id, own in names.items():
        waiting[doc_id] = whole_of(
            waiting[doc_id],
            [parts[name] for name in own if name in parts],
            [fates[name] for name in own if name in fates],
        )


async def _add_gone(ctx: Context, gone: dict[str, Gone], doc_ids: list[str]) -> None:
    names = {doc_id: part_ids(doc_id, gone[doc_id].writing, gone[doc_id].parts) for doc_id in doc_ids}
    fates = await ctx.fates.find([name for parts in names.values() for name in parts])
    for doc_id, own in names.items():
        all_of_it = [gone[doc_id], *(fates[name] for name in own if name in fates)]
        said = {one.fate for one in all_of_it}
        delivered = {user for one in all_of_it for user in one.delivered}
        fate = next((fate for fate in _ORDER if fate in said), gone[doc_id].fate)
        silent = {user for one in all_of_it for user in one.silent} if gone[doc_id].silent else set()
        gone[doc_id] = replace(
            gone[doc_id], fate=fate, delivered=sorted(delivered), silent=sorted(silent - delivered)
        )
