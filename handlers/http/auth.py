"""Accounts with passwords: registration, log-in, renewal, and the devices that are logged in."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from handlers.context import Context
from handlers.http.route import Caller, Route, answer, parsed
from handlers.http.schemas.auth import (
    AccountAnswer,
    DeviceAnswer,
    DeviceList,
    DeviceRequest,
    LoginRequest,
    OwnDeviceAnswer,
    RefreshRequest,
    RegisterRequest,
    SessionAnswer,
    TokensAnswer,
)
from handlers.http.schemas.base import DoneAnswer
from handlers.revoking import cut_off, revoke
from relay.security.issuer import Issuer
from relay.store.audit_chain import NOBODY
from relay.store.sessions import (
    Account,
    Installation,
    Reused,
    name_taken,
    new_device,
    new_user,
    too_many_devices,
)
from relay.wire.errors import RelayError
from relay.wire.ids import DEVICE_ID, device_key

_WRONG: Final = "wrong user name or password"
_ENDED: Final = "this refresh token is not good any more; log in again"


async def register(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Makes an account and logs its first device in."""
    issuer = _issuer(ctx)
    if not ctx.registration:
        raise RelayError("forbidden", "nobody can register at this relay; its operator makes the accounts")
    await ctx.rates.check("register", caller.address)
    wanted = await parsed(request, RegisterRequest)
    if await ctx.sessions.account(wanted.username) is not None:
        raise name_taken()
    hashed = await ctx.passwords.hash(wanted.password)
    user = new_user()
    # Before the account: rather one entry too many than none.
    await ctx.audit.record(
        "account.register", actor=user, target=user, address=caller.address, agent=caller.agent
    )
    account = await ctx.sessions.register(
        wanted.username, hashed, user=user, name=wanted.name, phone=wanted.phone
    )
    return await _open(ctx, issuer, caller, account, wanted.device, 201)


async def login(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Logs a device in. An unknown user and a wrong password cost the same work and get the same answer."""
    issuer = _issuer(ctx)
    await ctx.rates.check("login_address", caller.address)
    wanted = await parsed(request, LoginRequest)
    username = wanted.username.lower()
    await ctx.rates.check("login_account", username)
    account = await ctx.sessions.account(username)
    hashed = None if account is None else account.password
    right = await ctx.passwords.verify(hashed, wanted.password)
    if not right or account is None or hashed is None or account.erasing:
        # Noted for unknown names, too: the time it takes must not tell which exist.
        await _refused(ctx, caller, NOBODY, None if account is None else account.user)
        raise RelayError("unauthorized", _WRONG)
    if account.suspended:
        await _refused(ctx, caller, account.user, account.user)
        raise _suspended()
    if ctx.passwords.needs_rehash(hashed):
        await ctx.sessions.rehash(account.user, hashed, await ctx.passwords.hash(wanted.password))
    return await _open(ctx, issuer, caller, account, wanted.device, 200)


async def refresh(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Exchanges a refresh token for the next pair of tokens."""
    issuer = _issuer(ctx)
    await ctx.rates.check("refresh", caller.address)
    wanted = await parsed(request, RefreshRequest)
    found = await ctx.sessions.renew(wanted.refresh_token)
    if found is None:
        raise RelayError("unauthorized", _ENDED)
    if isinstance(found, Reused):
        cut_off(ctx, device_key(found.user, found.device))
        await ctx.audit.record(
            "session.reuse",
            actor=found.user,
            target=found.user,
            address=caller.address,
            agent=caller.agent,
            device=found.device,
        )
        raise RelayError("unauthorized", _ENDED)
    if found.suspicious:
        await ctx.audit.record(
            "session.repeat",
            actor=found.user,
            target=found.user,
            address=caller.address,
            agent=caller.agent,
            device=found.device,
        )
        await ctx.sessions.note_repeat(found.user, found.device, found.token.session)
    account = await ctx.sessions.account_of(found.user)
    if account is None or account.erasing:
        raise RelayError("unauthorized", _ENDED)
    if account.suspended:
        raise _suspended()
    return answer(
        TokensAnswer(
            access_token=issuer.issue(found.user, found.device, found.token.session),
            refresh_token=str(found.token),
            expires_in=issuer.lifetime,
        )
    )


async def logout(ctx: Context, caller: Caller, _: web.Request) -> web.Response:
    """Revokes the device that asks."""
    await revoke(ctx, caller.user, caller.device, address=caller.address, agent=caller.agent)
    return answer(DoneAnswer())


async def devices(ctx: Context, caller: Caller, _: web.Request) -> web.Response:
    """The caller's devices."""
    online = await ctx.live.presence.devices_online(caller.user)
    return answer(
        DeviceList(
            items=[
                DeviceAnswer(
                    id=view.id,
                    name=view.name,
                    platform=view.platform,
                    created_at=view.created_at,
                    last_seen=view.last_seen,
                    current=view.id == caller.device,
                    online=view.id in online,
                )
                for view in await ctx.sessions.devices(caller.user)
            ]
        )
    )


async def remove(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Revokes one of the caller's devices."""
    device = request.match_info["device"]
    if not DEVICE_ID.fullmatch(device) or not await revoke(
        ctx, caller.user, device, address=caller.address, agent=caller.agent
    ):
        raise RelayError("not_found", "no such device")
    return answer(DoneAnswer())


async def _open(
    ctx: Context, issuer: Issuer, caller: Caller, account: Account, device: DeviceRequest, status: int
) -> web.Response:
    user = account.user
    name = device.id or new_device()
    key = device_key(user, name)
    await ctx.sessions.check_room(user, name)
    release = None
    if device.reset and device.id is not None:
        release = await ctx.releases.plan(key)
    # Before the session: rather one entry too many than none.
    await ctx.audit.record(
        "session.open",
        actor=user,
        target=user,
        address=caller.address,
        agent=caller.agent,
        device=name,
        details={"reset": device.reset},
    )
    if device.id is not None and (device.reset or await ctx.sessions.is_active(user, name) is False):
        # Whoever logs in again after a failure is not a new installation any more: its keys must be gone by then.
        await ctx.keys.forget(key)
    opened = await ctx.sessions.open(user, Installation(name, device.name, device.platform, device.reset))
    if opened.ended:
        cut_off(ctx, key)
    if opened.too_many:
        await revoke(ctx, user, opened.device, address=caller.address, agent=caller.agent)
        raise too_many_devices()
    if opened.fresh:
        await ctx.keys.forget(key)
    if opened.changed:
        await ctx.invalidation.tell(users=[user])
    if release is not None:
        await ctx.releases.run(release)
    return answer(
        SessionAnswer(
            user=AccountAnswer(id=user, username=account.username, name=account.name),
            device=OwnDeviceAnswer(id=opened.device, name=device.name, platform=device.platform),
            access_token=issuer.issue(user, opened.device, opened.token.session),
            refresh_token=str(opened.token),
            expires_in=issuer.lifetime,
        ),
        status,
    )


def _issuer(ctx: Context) -> Issuer:
    if ctx.issuer is None:
        raise RelayError("forbidden", "this relay has no accounts of its own; tokens come from elsewhere")
    return ctx.issuer


async def _refused(ctx: Context, caller: Caller, actor: str, target: str | None) -> None:
    await ctx.audit.record(
        "session.refuse", actor=actor, target=target, address=caller.address, agent=caller.agent
    )


def _suspended() -> RelayError:
    return RelayError("forbidden", "this account is suspended")


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "POST",
        "/v1/auth/register",
        register,
        "Make an account and log its first device in",
        "accounts",
        {201: SessionAnswer},
        request=RegisterRequest,
        errors=("bad_request", "forbidden", "conflict", "too_large", "rate_limited", "unavailable"),
        open=True,
    ),
    Route(
        "POST",
        "/v1/auth/login",
        login,
        "Log a device in; a session that it had ends",
        "accounts",
        {200: SessionAnswer},
        request=LoginRequest,
        errors=(
            "bad_request",
            "unauthorized",
            "forbidden",
            "conflict",
            "too_large",
            "rate_limited",
            "unavailable",
        ),
        open=True,
    ),
    Route(
        "POST",
        "/v1/auth/refresh",
        refresh,
        "Exchange a refresh token for the next tokens; repeat it when the answer got lost",
        "accounts",
        {200: TokensAnswer},
        request=RefreshRequest,
        errors=("bad_request", "unauthorized", "forbidden", "too_large", "rate_limited", "unavailable"),
        open=True,
    ),
    Route("POST", "/v1/auth/logout", logout, "Revoke the device that asks", "accounts", {200: DoneAnswer}),
    Route(
        "GET",
        "/v1/auth/devices",
        devices,
        "One's own devices",
        "accounts",
        {200: DeviceList},
    ),
    Route(
        "DELETE",
        "/v1/auth/devices/{device}",
        remove,
        "Revoke a device: its tokens are refused, its sockets close, what waits for it is released",
        "accounts",
        {200: DoneAnswer},
        errors=("not_found",),
    ),
)
