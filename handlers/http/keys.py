"""The end-to-end key directory: publish, read, claim."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from handlers.context import Context
from handlers.http.route import Caller, Route, answer, parsed
from handlers.http.schemas.keys import (
    ClaimAnswer,
    ClaimedKeys,
    ClaimKeys,
    DeviceKeysAnswer,
    DirectoryAnswer,
    PreKey,
    PublicPreKey,
    PublicSignedKey,
    PublishKeys,
    SignedPreKey,
    StockAnswer,
)
from relay.store.keys import Claim, Entry, KeyPair, Stock, Upload
from relay.wire import replies
from relay.wire.errors import RelayError
from relay.wire.ids import USER_ID, device_key

_CHECKS_AT_ONCE: Final = 16


async def publish(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Publishes this device's public keys. Repeating an upload changes nothing. Another signed prekey takes the place of
    the one before; one-time and KEM prekeys are added to those that wait, up to 1,000 of each kind (a request takes 200 of
    each, and is bounded as a whole by the size of a frame). A key id that was uploaded before keeps its first key.

    Another identity key or registration id says that the app was installed anew under this device id: prekeys start anew,
    what waited for the former installation is released, and this one is shown a `gap`."""
    upload = _upload(await parsed(request, PublishKeys))
    key = device_key(caller.user, caller.device)
    news = await ctx.keys.news(key, upload)
    if news != "nothing":
        await ctx.rates.check("key_change", key)
    if news == "installation":
        return answer(_shown(await _replace(ctx, caller, key, upload)))
    if news != "nothing":
        await _record(ctx, caller, "keys.publish" if news == "first" else "keys.change")
    if not await ctx.keys.register(key, upload.registration):
        raise _gone()
    stock = await ctx.keys.store(key, upload)
    if news == "first":
        await ctx.invalidation.tell(users=[caller.user])
    return answer(_shown(stock))


async def _replace(ctx: Context, caller: Caller, key: str, upload: Upload) -> Stock:
    """Another installation has taken the device's place. The keys are written last: until then a repetition is seen as a
    replacement again and finishes what a crash left."""
    release = await ctx.releases.plan(key)
    await _record(ctx, caller, "keys.replace")
    if not await ctx.keys.relink(key, upload.registration):
        raise _gone()
    try:
        stock = await ctx.keys.store(key, upload)
        await ctx.keys.relinked(key)
    finally:
        # The former installation is none any more, whether or not the keys of this one could be stored.
        await ctx.invalidation.tell(users=[caller.user])
        await ctx.releases.run(release)
    return stock


async def directory(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """The keys of a person's devices that no reading uses up: identity key, registration id and signed prekey. Devices that
    have published none, or get no messages any more, are left out."""
    user: str = request.match_info["id"]
    # Whom their profile does not show, this shows only to those who must seal messages for them: a suspended person stays
    # a member, and gets what was sent meanwhile when they are back.
    if not USER_ID.fullmatch(user) or (
        await ctx.people.profile(user) is None and not await ctx.people.share_conversation(caller.user, user)
    ):
        raise RelayError("not_found", "no such user")
    devices = (await ctx.accounts.active_devices([user])).get(user, [])
    return answer(DirectoryAnswer(devices=[_listed(entry) for entry in await ctx.keys.directory(devices)]))


async def claim(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Hands out one one-time prekey and one KEM prekey of each device, to nobody else ever again. When the KEM prekeys have
    run out the last-resort key comes instead. When claims of one of the devices come too often, nothing is handed out and
    the error's `details.devices` names those to leave out; without it, the caller has claimed keys of too many devices."""
    wanted = await parsed(request, ClaimKeys)
    await _check_rates(ctx, caller.user, wanted.devices)
    claims = await ctx.keys.claim(wanted.devices)
    for found in claims:
        if found.low is not None:
            _tell_low(ctx, found.device, replies.keys(found.low))
    return answer(ClaimAnswer(devices=[_claimed(found) for found in claims]))


async def count(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """How many prekeys of this device are left to be claimed."""
    return answer(_shown(await ctx.keys.stock(device_key(caller.user, caller.device))))


def _tell_low(ctx: Context, key: str, frame: str) -> None:
    target = ctx.hub.get(key)
    if target is None:
        ctx.bus.tell_device(key, frame)
    else:
        target.outbox.put(frame)


async def _record(ctx: Context, caller: Caller, act: str) -> None:
    await ctx.audit.record(
        act,
        actor=caller.user,
        target=caller.user,
        address=caller.address,
        agent=caller.agent,
        device=caller.device,
    )


async def _check_rates(ctx: Context, user: str, wanted: list[str]) -> None:
    """Counts a claim of each device that has keys; names that somebody made up are not worth a counter. Raises RelayError
    ``rate_limited`` that names those over their limit."""
    devices = await ctx.keys.claimable(wanted)
    if not devices:
        return
    await ctx.rates.check("key_claim_caller", user, len(devices))
    turn = asyncio.Semaphore(_CHECKS_AT_ONCE)

    async def check(device: str) -> RelayError | None:
        async with turn:
            try:
                # First what is this caller's own: who asks too often uses up nothing of what is left to others.
                await ctx.rates.check("key_claim_pair", f"{user} {device}")
                await ctx.rates.check("key_claim", device)
            except RelayError as error:
                return error
            return None

    outcomes = await asyncio.gather(*(check(device) for device in devices))
    over = {device: error for device, error in zip(devices, outcomes, strict=True) if error is not None}
    for error in over.values():
        raise RelayError(
            error.code,
            error.message,
            retry_after=max((one.retry_after or 0 for one in over.values()), default=0) or None,
            details={**error.details, "devices": list(over)},
        )


def _gone() -> RelayError:
    return RelayError("unauthorized", "this device is signed out")


def _pair(key: PreKey | SignedPreKey) -> KeyPair:
    return KeyPair(key.id, key.key, key.signature if isinstance(key, SignedPreKey) else None)


def _upload(wanted: PublishKeys) -> Upload:
    return Upload(
        identity=wanted.identity_key,
        registration=wanted.registration_id,
        signed=_pair(wanted.signed_pre_key),
        one_time=[_pair(key) for key in wanted.one_time_pre_keys],
        kem=[_pair(key) for key in wanted.kem_pre_keys],
        last_resort=None if wanted.last_resort is None else _pair(wanted.last_resort),
    )


def _shown(stock: Stock) -> StockAnswer:
    return StockAnswer(one_time=stock.one_time, kem=stock.kem)


def _signed(key: KeyPair) -> PublicSignedKey:
    return PublicSignedKey(id=key.id, key=key.key, signature=key.signature or "")


def _listed(entry: Entry) -> DeviceKeysAnswer:
    return DeviceKeysAnswer(
        device=entry.device,
        identity_key=entry.identity,
        registration_id=entry.registration,
        signed_pre_key=_signed(entry.signed),
    )


def _claimed(found: Claim) -> ClaimedKeys:
    one_time = found.one_time
    return ClaimedKeys(
        device=found.device,
        one_time_pre_key=None if one_time is None else PublicPreKey(id=one_time.id, key=one_time.key),
        kem_pre_key=None if found.kem is None else _signed(found.kem),
    )


ROUTES: Final = (
    Route(
        "PUT",
        "/v1/keys",
        publish,
        "Publish this device's public keys",
        "keys",
        {200: StockAnswer},
        request=PublishKeys,
        errors=("bad_request", "conflict", "too_large", "rate_limited"),
    ),
    Route(
        "GET",
        "/v1/keys/count",
        count,
        "How many prekeys of this device are left",
        "keys",
        {200: StockAnswer},
        errors=("bad_request",),
    ),
    Route(
        "GET",
        "/v1/users/{id}/keys",
        directory,
        "The public keys of a person's devices; uses nothing up",
        "keys",
        {200: DirectoryAnswer},
        errors=("bad_request", "not_found"),
    ),
    Route(
        "POST",
        "/v1/keys/claim",
        claim,
        "Claim one-time prekeys",
        "keys",
        {200: ClaimAnswer},
        request=ClaimKeys,
        errors=("bad_request", "too_large", "rate_limited"),
    ),
)
