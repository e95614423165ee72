"""Who is becoming a member of something right now, so that people who are asked for at once stay within their limit.

Memberships are counted before one is written, and much can be written in between. So a node knows what it is about to write:
who would come too close to the limit by that waits until it is written, and is counted then. Nobody waits otherwise. Other nodes
know nothing of it: what they write at the same moment may take somebody over the limit by so much.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

Count = Callable[[Sequence[str], int], Awaitable[list[str]]]


class Join:
    """One request that makes these users members of something. ``ahead`` are the earlier ones, by user, that were still under way
    when it came."""

    def __init__(self, users: Iterable[str], ahead: dict[str, list[Join]]) -> None:
        self.users = tuple(dict.fromkeys(users))
        self.ahead = ahead
        self.over = asyncio.Event()

    async def crowded(self, count: Count, most: int) -> list[str]:
        """Those of its users who would be in more than ``most`` conversations by it. ``count`` says which of some users are in
        so many, or more. Raises what that raises."""
        found = await count(self.users, most)
        if found or not self.ahead:
            return found
        near: list[str] = []
        by_number: dict[int, list[str]] = {}
        for user, earlier in self.ahead.items():
            by_number.setdefault(len(earlier), []).append(user)
        for number, some in by_number.items():
            near += await count(some, most - number) if number < most else some
        if not near:
            return []
        # Each waits for earlier ones only, so nobody waits for ever.
        for join in {join for user in near for join in self.ahead[user]}:
            await join.over.wait()
        return await count(near, most)


class Joins:
    """The requests that are under way at this node."""

    def __init__(self) -> None:
        self._under_way: dict[str, list[Join]] = {}

    @contextmanager
    def begin(self, users: Iterable[str]) -> Iterator[Join]:
        """From before the count until the memberships are written, or are not."""
        join = Join(users, {})
        for user in join.users:
            earlier = self._under_way.setdefault(user, [])
            if earlier:
                join.ahead[user] = list(earlier)
            earlier.append(join)
        try:
            yield join
        finally:
            join.over.set()
            for user in join.users:
                self._under_way[user].remove(join)
                if not self._under_way[user]:
                    del self._under_way[user]
