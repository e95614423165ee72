"""Who did it, when two nodes settle the same deliveries at the same moment: as pure code, from what is stored afterwards.

A write is done wholly or not at all, and its reply tells how many documents it changed, not which. What is still awaited was not
changed, and of whom another acknowledgement is noted, that one took off. Of the rest the number says how much was one's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bson.datetime_ms import DatetimeMS

from relay.store.ending_plan import EndingGroup, Expectation
from relay.store.ledger import Outcome
from relay.wire.ids import head_id


class Verdict(NamedTuple):
    """``left``: documents that still wait and have to be planned anew. Unless ``is_sure`` the counts may be wrong."""

    left: set[str]
    is_sure: bool


def settle_dispute(
    group: EndingGroup, documents: Mapping[str, Mapping[str, Any]], shrunk: int, ended: int
) -> Verdict:
    """Leaves in an exact group's expectations, counts and settlement what it did itself. ``documents`` are those of its updates and
    deletions that are still there, ``shrunk`` and ``ended`` how many documents were changed and deleted."""
    gone: list[str] = []
    changed: list[str] = []
    left: set[str] = set()
    lost: set[str] = set()
    for doc_id in group.final:
        document = documents.get(doc_id)
        if document is None:
            gone.append(doc_id)
        else:
            # What nobody has changed, and is there all the same, is no message that could be written.
            (left if len(document["awaiting"]) < group.awaited[doc_id] else lost).add(doc_id)
    for doc_id in group.shrunk:
        document = documents.get(doc_id)
        taken = set(group.taken[doc_id])
        if document is None:
            changed.append(doc_id)
        elif still := taken.intersection(document["awaiting"]):
            (left if still < taken else lost).add(doc_id)
        elif _is_noted(group.expected.get(doc_id, {}), document.get("deliveredTo", ())):
            changed.append(doc_id)
        else:
            lost.add(doc_id)
    for doc_id in left | lost:
        group.expected.pop(doc_id, None)
    counts: Counter[Outcome] = Counter()
    is_sure = True
    for candidates, own in ((changed, shrunk), (gone, ended)):
        weights = [_weight(group.expected.get(doc_id, {})) for doc_id in candidates]
        if own < len(weights):
            is_sure = is_sure and (not own or all(weight == weights[0] for weight in weights))
            # Any so many of them: which ones, nobody can tell.
            weights = weights[:own]
            if not own:
                for doc_id in candidates:
                    group.expected.pop(doc_id, None)
        for weight in weights:
            counts.update(weight)
    group.counts.update({outcome: counts[outcome] for outcome in group.counts})
    settlement, heads = group.settlement, {head_id(doc_id) for doc_id in left}
    settlement.acknowledged[:] = [one for one in settlement.acknowledged if one.doc_id not in left]
    settlement.released[:] = [one for one in settlement.released if head_id(one[0]) not in heads]
    return Verdict(left, is_sure)


def _weight(expected: Mapping[str, Expectation]) -> Counter[Outcome]:
    return Counter(expectation.outcome for expectation in expected.values())


def _is_noted(expected: Mapping[str, Expectation], delivered: Sequence[Any]) -> bool:
    """Whether every acknowledgement that is expected stands in a message's ``deliveredTo``."""
    noted = [
        (entry.get("user"), entry.get("device"), entry.get("at"))
        for entry in delivered
        if isinstance(entry, Mapping)
    ]
    told = (one.told for one in expected.values() if one.told is not None)
    return all((one.by_user, one.by_device, DatetimeMS(one.at)) in noted for one in told)
