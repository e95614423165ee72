"""Reads the whole audit trail, and says whether it is what was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pymongo.read_concern import ReadConcern

from models.audit import AuditEntry, AuditHead
from models.housekeeping import Setting
from relay.security.pseudonyms import Pseudonyms
from relay.store.audit_chain import HEAD, NOTHING, End, Reading, Verdict, end_of, missing

KEY_SETTING: Final = "pseudonym-key"
_PAGE: Final = 500
_WRONG_KEY: Final = "this is not the key that the trail was written with: see RELAY_PSEUDONYM_KEY"


def committed() -> Any:
    """The entries that no failover can take back: only on those may another be chained."""
    collection = AuditEntry.get_motor_collection()
    return collection.database.get_collection(collection.name, read_concern=ReadConcern("majority"))


def heads() -> Any:
    """Where the head is."""
    return AuditHead.get_motor_collection()


async def check(pseudonyms: Pseudonyms, progress: Callable[[int, int], None], expect: End | None) -> Verdict:
    """``Audit.verify``."""
    head = await heads().find_one({"_id": HEAD})
    noted = None if head is None else end_of(pseudonyms, head)
    setting = await Setting.get_motor_collection().find_one({"_id": KEY_SETTING})
    if setting is not None and setting.get("value") != pseudonyms.fingerprint:
        return Verdict(0, 0, NOTHING, _WRONG_KEY)
    pins: dict[int, list[tuple[str, str]]] = {}
    for pin, whose in ((noted, "the head names"), (expect, "was noted down")):
        if pin is not None:
            pins.setdefault(pin.entry, []).append((pin.hash, whose))
    reading = Reading(pseudonyms, pins)
    total = await AuditEntry.get_motor_collection().estimated_document_count()
    stray = await committed().find_one({"_id": {"$not": {"$gt": 0}}}, {"_id": 1})
    if stray is not None:
        return _verdict(reading, f"entry {stray['_id']!r} is none of the relay's: somebody inserted it")
    while page := await _page_after(reading.end.entry):
        for entry in page:
            problem = reading.take(entry)
            if problem is not None:
                if reading.end == NOTHING and noted is None and entry.get("_id") == 1:
                    problem = _WRONG_KEY
                return _verdict(reading, problem, reading.end.entry + (reading.end.entry != entry["_id"]))
        progress(reading.end.entry, max(total, reading.end.entry))
    for number in sorted(pins):
        if number > reading.end.entry:
            return _verdict(reading, missing(reading.end.entry + 1, number), reading.end.entry + 1)
    if noted is None and (head is not None or reading.end != NOTHING):
        return _verdict(
            reading, f"the head was {'deleted' if head is None else 'edited'}: entries may be missing"
        )
    dropped = reading.dropped()
    if dropped is not None:
        number, problem = dropped
        return Verdict(number - 1, reading.erased, reading.end, problem, number)
    return _verdict(reading, None)


async def _page_after(number: int) -> list[dict[str, Any]]:
    cursor = committed().find({"_id": {"$gt": number}}).sort([("_id", 1)]).limit(_PAGE)
    found: list[dict[str, Any]] = await cursor.to_list(_PAGE)
    return found


def _verdict(reading: Reading, problem: str | None, bad: int | None = None) -> Verdict:
    return Verdict(reading.end.entry, reading.erased, reading.end, problem, bad)
