"""The end-to-end key directory: what others need to seal messages for a device. Private keys never come here.

One-time prekeys are handed out at most once: a claim takes the key out of its document and leaves a mark, so an answer that
is lost wastes a key and no repeated upload brings it back.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pymongo import ReturnDocument, UpdateOne

from models.accounts import Device, User
from models.keys import PreKey, PublicKeys
from relay.store.mongo import BulkWriteError, DuplicateKeyError
from relay.wire.clock import utc_now
from relay.wire.errors import RelayError
from relay.wire.ids import user_of
from relay.wire.limits import Limit
from relay.wire.stamps import stamp_now

MAX_STOCK: Final = 1000
LOW_STOCK: Final = 20
_HISTORY: Final = 10
_ATTEMPTS: Final = 8
_AT_ONCE: Final = 16
_DUPLICATE: Final = 11000
_UNCLAIMED: Final[dict[str, None]] = {"claimedAt": None}

Kind = Literal["one", "kem"]
News = Literal["first", "installation", "keys", "nothing"]
"""What an upload brings: the first keys of a device, those of another installation, other ones than before (prekeys that are
handed out once do not count), or none."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One public key; one-time prekeys have no signature."""

    id: int
    key: str
    signature: str | None = None

    def document(self) -> dict[str, Any]:
        """As it is stored."""
        found: dict[str, Any] = {"id": self.id, "key": self.key}
        if self.signature is not None:
            found["signature"] = self.signature
        return found


@dataclass(frozen=True, slots=True)
class Upload:
    """What a device publishes. Without a ``registration`` the one that is stored stays, and so does the ``last_resort``
    key, as long as the identity key is the same."""

    identity: str
    registration: int | None
    signed: KeyPair
    one_time: Sequence[KeyPair] = ()
    kem: Sequence[KeyPair] = ()
    last_resort: KeyPair | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """What the directory tells of one device."""

    device: str
    identity: str
    registration: int | None
    signed: KeyPair


@dataclass(frozen=True, slots=True)
class Stock:
    """How many prekeys of a device are left to be claimed."""

    one_time: int
    kem: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What was handed out for one device. ``low`` tells how many one-time keys are left when these are few."""

    device: str
    one_time: KeyPair | None = None
    kem: KeyPair | None = None
    low: int | None = None


class Keys:
    """The ``public_keys`` and ``prekeys`` collections, and the fields of ``devices`` that tell one installation from the
    next."""

    async def forget(self, device: str) -> None:
        """Drops the keys of a device (a device key): it is revoked, reset or erased. Safe to repeat. The marks of what was
        handed out stay as long as the device is remembered: should the same installation log in again and publish its keys
        once more, none is given twice. Of a person who is being erased, or is, nothing stays."""
        await PublicKeys.get_motor_collection().delete_one({"_id": device})
        query: dict[str, Any] = {"device": device}
        stays = await User.get_motor_collection().find_one(
            {"_id": user_of(device), "erasingAt": None}, {"_id": 1}
        )
        prekeys = PreKey.get_motor_collection()
        await prekeys.delete_many(query if stays is None else query | _UNCLAIMED)
        if stays is not None:
            await prekeys.update_many(query, {"$set": {"forgottenAt": utc_now()}})

    async def news(self, device: str, upload: Upload) -> News:
        """What this upload would change of the stored keys."""
        stored = await PublicKeys.get_motor_collection().find_one({"_id": device})
        if stored is None:
            return "first"
        if not _same_installation(stored, upload):
            return "installation"
        return "nothing" if not _replacement(stored, upload)[1] else "keys"

    async def relink(self, device: str, registration: int | None) -> bool:
        """Notes that another installation has taken the device's place from now on: it gets a gap, and senders who know
        the former one are told. Call before ``store``: a crash in between is repeated with the upload. False when the
        device is none any more."""
        now = utc_now()
        gap = {"since": now, "why": "reset"}
        change: dict[str, Any] = {
            "$set": {"relinkedAt": now, "since": now, "gap": gap, "updatedAt": stamp_now()}
        }
        if registration is None:
            change["$unset"] = {"registrationId": ""}
        else:
            change["$set"]["registrationId"] = registration
        return await _change_device(device, change)

    async def relinked(self, device: str) -> None:
        """Notes that the keys of another installation are published. Who learned the set of devices after ``relink`` and
        read the directory before ``store`` holds the former keys: they are stale, too."""
        await _change_device(device, {"$set": {"relinkedAt": utc_now()}})

    async def register(self, device: str, registration: int | None) -> bool:
        """Notes the registration id of a device whose installation is the one that is stored, or the first. False when the
        device is none any more."""
        found = await Device.get_motor_collection().find_one(
            {"_id": device, "removedAt": None}, {"registrationId": 1}
        )
        if found is None or registration is None or found.get("registrationId") == registration:
            return found is not None
        change = {"$set": {"registrationId": registration, "updatedAt": stamp_now()}}
        return await _change_device(device, change)

    async def store(self, device: str, upload: Upload) -> Stock:
        """Publishes keys; safe to repeat and to race. A signed prekey that another takes the place of goes into the
        history; one-time keys of a former installation are dropped; a key id that was uploaded before, claimed or not, is
        left as it is. Raises RelayError ``too_large`` when more than ``MAX_STOCK`` of a kind would be waiting."""
        generation = await self._publish(device, upload)
        await PreKey.get_motor_collection().delete_many(
            {"device": device, "generation": {"$ne": generation}, **_UNCLAIMED}
        )
        for kind, keys in _kinds(upload):
            await _add(device, generation, kind, keys)
        return await _stock(device, generation)

    async def stock(self, device: str) -> Stock:
        """What is left of a device's prekeys."""
        stored = await PublicKeys.get_motor_collection().find_one({"_id": device}, {"generation": 1})
        return Stock(0, 0) if stored is None else await _stock(device, stored["generation"])

    async def directory(self, devices: Iterable[str]) -> list[Entry]:
        """The public keys of these devices, by device key; those without any are left out. Consumes nothing."""
        cursor = PublicKeys.get_motor_collection().find({"_id": {"$in": list(devices)}}, {"history": 0})
        return sorted([_entry(document) async for document in cursor], key=lambda entry: entry.device)

    async def claimable(self, devices: Sequence[str]) -> list[str]:
        """Those of these device keys, in their order, that a claim may get something of: they are devices, and have
        published keys."""
        found = await _published(devices)
        return [device for device in devices if device in found]

    async def claim(self, devices: Sequence[str]) -> list[Claim]:
        """Hands out one one-time and one KEM prekey for each of these device keys, in their order; nothing for a device
        that is unknown or removed. No key is handed out twice, whoever asks at the same time. When the KEM keys have run
        out the last-resort key stands in."""
        published = await _published(devices)
        turn = asyncio.Semaphore(_AT_ONCE)

        async def one(device: str) -> Claim:
            keys = published.get(device)
            if keys is None:
                return Claim(device)
            async with turn:
                return await _claim(device, keys)

        tasks = [asyncio.create_task(one(device), name="claim keys") for device in devices]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _publish(self, device: str, upload: Upload) -> str:
        """Writes the keys that are not handed out; returns the generation of the installation."""
        collection = PublicKeys.get_motor_collection()
        for _ in range(_ATTEMPTS):
            stored = await collection.find_one({"_id": device})
            if stored is None:
                document = _fresh(device, upload)
                await _check_room(device, document["generation"], upload)
                # It may have come back: before its keys are there, what it gave away once is remembered for good again.
                await PreKey.get_motor_collection().update_many(
                    {"device": device}, {"$unset": {"forgottenAt": ""}}
                )
                try:
                    await collection.insert_one(document)
                except DuplicateKeyError:
                    continue
                return str(document["generation"])
            query, change, generation = _replacement(stored, upload)
            await _check_room(device, generation, upload)
            if not change or (await collection.update_one(query, change)).matched_count:
                return generation
        raise RelayError("conflict", "the keys of this device are being changed by another request")


def _generation(identity: str, registration: int | None) -> str:
    return hashlib.sha256(f"{identity}\n{registration}".encode()).hexdigest()[:16]


def _same_installation(stored: Mapping[str, Any], upload: Upload) -> bool:
    if stored["identityKey"] != upload.identity:
        return False
    before = stored.get("registrationId")
    return before is None or upload.registration is None or before == upload.registration


def _fresh(device: str, upload: Upload) -> dict[str, Any]:
    document: dict[str, Any] = {
        "_id": device,
        "user": user_of(device),
        "generation": _generation(upload.identity, upload.registration),
        "identityKey": upload.identity,
        "signedPreKey": upload.signed.document(),
        "history": [],
        "updatedAt": utc_now(),
    }
    if upload.registration is not None:
        document["registrationId"] = upload.registration
    if upload.last_resort is not None:
        document["lastResort"] = upload.last_resort.document()
    return document


def _replacement(stored: Mapping[str, Any], upload: Upload) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The query for what was read, the change (empty when everything is as uploaded), and the generation after it."""
    now = utc_now()
    same = _same_installation(stored, upload)
    # The name of an installation stays when it tells its registration id later.
    generation = stored["generation"] if same else _generation(upload.identity, upload.registration)
    wanted: dict[str, Any] = {
        "generation": generation,
        "identityKey": upload.identity,
        "signedPreKey": upload.signed.document(),
    }
    dropped: dict[str, str] = {}
    optional: dict[str, Any] = {
        "registrationId": upload.registration,
        "lastResort": None if upload.last_resort is None else upload.last_resort.document(),
    }
    for name, value in optional.items():
        if value is not None:
            wanted[name] = value
        elif not same and name in stored:
            dropped[name] = ""
    changed = {name: value for name, value in wanted.items() if stored.get(name) != value}
    if not changed and not dropped:
        return {}, {}, generation
    before = stored["signedPreKey"]
    query = {
        "_id": stored["_id"],
        "generation": stored["generation"],
        "identityKey": stored["identityKey"],
        "registrationId": stored.get("registrationId"),
        **{f"signedPreKey.{name}": value for name, value in before.items()},
    }
    change: dict[str, Any] = {"$set": {**changed, "updatedAt": now}}
    if dropped:
        change["$unset"] = dropped
    if "signedPreKey" in changed:
        change["$push"] = {"history": {"$each": [{**before, "retiredAt": now}], "$slice": -_HISTORY}}
    return query, change, generation


async def _change_device(device: str, change: Mapping[str, Any]) -> bool:
    found = await Device.get_motor_collection().update_one({"_id": device, "removedAt": None}, change)
    return bool(found.matched_count)


def _prekey_id(device: str, kind: Kind, key: KeyPair) -> str:
    """The same for the same key, whichever installation it is said to be of: a mark holds for every upload of it."""
    return f"{device} {kind} {key.id} {hashlib.sha256(key.key.encode()).hexdigest()}"


async def _published(devices: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """What claims need of the published keys of those of these device keys that are devices."""
    known = Device.get_motor_collection().find({"_id": {"$in": list(devices)}, "removedAt": None}, {"_id": 1})
    present = [row["_id"] async for row in known]
    cursor = PublicKeys.get_motor_collection().find(
        {"_id": {"$in": present}}, {"generation": 1, "lastResort": 1}
    )
    return {row["_id"]: row async for row in cursor}


def _kinds(upload: Upload) -> tuple[tuple[Kind, Sequence[KeyPair]], ...]:
    return ("one", upload.one_time), ("kem", upload.kem)


async def _check_room(device: str, generation: str, upload: Upload) -> None:
    collection = PreKey.get_motor_collection()
    for kind, keys in _kinds(upload):
        if not keys:
            continue
        names = [_prekey_id(device, kind, key) for key in keys]
        known = [row["_id"] async for row in collection.find({"_id": {"$in": names}}, {"_id": 1})]
        waiting = await collection.count_documents(_waiting(device, generation, kind), limit=MAX_STOCK + 1)
        if len(known) < len(names) and waiting + len(names) - len(known) > MAX_STOCK:
            raise RelayError(
                "too_large",
                f"at most {MAX_STOCK} prekeys of a kind may wait to be claimed",
                limit=Limit.PREKEYS,
            )


async def _add(device: str, generation: str, kind: Kind, keys: Sequence[KeyPair]) -> None:
    wanted = []
    for key in keys:
        fields: dict[str, Any] = {
            "device": device,
            "generation": generation,
            "kind": kind,
            "keyId": key.id,
            "key": key.key,
        }
        if key.signature is not None:
            fields["signature"] = key.signature
        name = _prekey_id(device, kind, key)
        wanted.append(UpdateOne({"_id": name}, {"$setOnInsert": fields}, upsert=True))
    if not wanted:
        return
    try:
        await PreKey.get_motor_collection().bulk_write(wanted, ordered=False)
    except BulkWriteError as error:
        # The same upload at the same moment inserted them, or the key id has its key already.
        failures = error.details.get("writeErrors", ())
        if error.details.get("writeConcernErrors") or any(row.get("code") != _DUPLICATE for row in failures):
            raise


def _waiting(device: str, generation: str, kind: Kind) -> dict[str, Any]:
    return {"device": device, "generation": generation, "kind": kind, **_UNCLAIMED}


async def _stock(device: str, generation: str) -> Stock:
    collection = PreKey.get_motor_collection()
    return Stock(
        await collection.count_documents(_waiting(device, generation, "one")),
        await collection.count_documents(_waiting(device, generation, "kem")),
    )


async def _claim(device: str, published: Mapping[str, Any]) -> Claim:
    generation = published["generation"]
    one_time = await _take(device, generation, "one")
    kem = await _take(device, generation, "kem")
    if kem is None and (last := published.get("lastResort")) is not None:
        kem = KeyPair(last["id"], last["key"], last["signature"])
    left = await PreKey.get_motor_collection().count_documents(
        _waiting(device, generation, "one"), limit=LOW_STOCK
    )
    return Claim(device, one_time, kem, left if left < LOW_STOCK else None)


async def _take(device: str, generation: str, kind: Kind) -> KeyPair | None:
    found = await PreKey.get_motor_collection().find_one_and_update(
        _waiting(device, generation, kind),
        {"$set": {"claimedAt": utc_now()}, "$unset": {"key": "", "signature": ""}},
        sort=[("keyId", 1)],
        return_document=ReturnDocument.BEFORE,
    )
    return None if found is None else KeyPair(found["keyId"], found["key"], found.get("signature"))


def _entry(document: Mapping[str, Any]) -> Entry:
    signed = document["signedPreKey"]
    return Entry(
        document["_id"],
        document["identityKey"],
        document.get("registrationId"),
        KeyPair(signed["id"], signed["key"], signed["signature"]),
    )
