"""Revocation of a device: its tokens are refused, its sockets close, and nobody's message waits for it."""

from __future__ import annotations

from handlers.context import Context
from relay.wire import errors
from relay.wire.ids import device_key


async def revoke(
    ctx: Context, user: str, device: str, *, actor: str | None = None, address: str = "", agent: str = ""
) -> bool:
    """Revokes a device of this user; False when they never had it. ``actor`` (the user, unless named) acts from ``address``.

    When this returns, messages committed from now on do not await the device. Safe to repeat: what died half-way is
    finished, by a repetition or by the releases' job; the trail may hold one entry too many, never one too few. Raises
    RelayError ``unavailable`` and what the store raises.
    """
    active = await ctx.sessions.is_active(user, device)
    if active is None:
        return False
    key = device_key(user, device)
    release = None
    # One that was removed before is in the trail, and has its release planned.
    if active:
        release = await ctx.releases.plan(key)
        await ctx.audit.record(
            "device.revoke",
            actor=actor or user,
            target=user,
            address=address,
            agent=agent,
            device=device,
        )
        # A device that logs out cannot ask again: its token is refused from the removal on.
        await ctx.keys.forget(key)
        await ctx.sessions.remove(user, device)
    cut_off(ctx, key)
    await ctx.invalidation.tell(users=[user])
    # What it may have published while it was removed; not what it publishes when it has logged in again already.
    if await ctx.sessions.is_active(user, device) is False:
        await ctx.keys.forget(key)
    if release is not None:
        await ctx.releases.run(release)
    return True


def cut_off(ctx: Context, key: str) -> None:
    """Closes a device's connection, and has its next request looked at afresh: its tokens are not good any more. Other nodes
    are told, and find it within seconds when that is lost."""
    ctx.bus.ended(key)
    ctx.accounts.forget(key)
    connection = ctx.hub.get(key)
    if connection is not None:
        connection.shut(errors.UNAUTHORIZED)
