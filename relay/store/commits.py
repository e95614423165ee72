"""Group commit of messages, and the four outcomes of an insert.

- **ok**: durable. The sender hears ``stored``, the router delivers.
- **duplicate** (11000): the id is taken. The stored message decides: same user and device, and it is a resend, answered
  with the first ``seq``; else ``id_conflict``.
- **failed**: MongoDB refused the document itself, definitely. Its sender hears so; nobody else notices.
- **unknown**: anything else (no answer, a failover, a majority time-out). Tried again until it is known or the deadline is
  over (``unavailable``, which may be retried). Never ``stored`` and never "failed" on a guess.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from time import monotonic
from typing import Any, Final

import structlog

from relay.metrics import Metrics
from relay.store.audience import Audiences
from relay.store.breaker import Breaker
from relay.store.documents import owner
from relay.store.fates import Fates
from relay.store.ledger import Ledger
from relay.store.messages import Messages
from relay.store.mongo import BulkWriteError, Mongo, PyMongoError, brief, time_limit
from relay.store.recipients import renew, take_strayed
from relay.store.submissions import GivenUp, Stored, Submission, conflict, stranger, unreachable
from relay.wire.envelope import Envelope
from relay.wire.errors import RelayError
from relay.wire.ids import RELAY_USER

DUPLICATE: Final = 11000
# What MongoDB says of a document that it will never take: bad value, failed to parse, type mismatch, invalid BSON,
# dollar-prefixed field, validation failure, too large, key too large.
DEFINITE: Final = frozenset({2, 9, 14, 22, 52, 121, 10334, 17280})
_FIRST_DELAY: Final = 0.05
_LAST_DELAY: Final = 1.0
_MAX_GIVEN_UP: Final = 100_000
_GIVEN_UP_PAGE: Final = 500

log = structlog.get_logger(__name__)


class Commits:
    """Commits groups of submissions. ``expected`` gets the messages of a group that is about to be written; ``accepted`` the fresh
    ones of a group that was, each once and with all its recipients; ``committed`` the pieces in which they are stored, ready to
    deliver; ``found`` the device keys for whom something turned up in the store that was not delivered so; ``strayed`` a message
    that was committed while these of its recipients were being removed."""

    def __init__(
        self,
        mongo: Mongo,
        messages: Messages,
        fates: Fates,
        audiences: Audiences,
        ledger: Ledger,
        metrics: Metrics,
        *,
        timeout: float,
        breaker: Breaker,
        expected: Callable[[Iterable[Envelope]], None],
        accepted: Callable[[Sequence[Envelope]], None],
        committed: Callable[[Sequence[Envelope]], None],
        found: Callable[[Iterable[str]], None],
        strayed: Callable[[str, list[str]], None],
    ) -> None:
        self._collection = mongo.messages
        self._messages = messages
        self._fates = fates
        self._audiences = audiences
        self._ledger = ledger
        self._retries = metrics.retries.labels("send")
        self._timeout = timeout
        self._breaker = breaker
        self._expected = expected
        self._accepted = accepted
        self._committed = committed
        self._found = found
        self._strayed = strayed
        self._tasks: set[asyncio.Task[None]] = set()
        self._attempts: dict[asyncio.Future[None], list[Submission]] = {}
        # By document id: what its sender was told `unavailable` of, though it may have been stored.
        self._given_up: dict[str, GivenUp] = {}

    async def commit(self, batch: list[Submission]) -> None:
        """Brings every submission of the group to its outcome. Never raises for what MongoDB does."""
        await self._until_known(batch, attempt=0)

    def abandon(self, batch: list[Submission]) -> None:
        """Tells the senders of messages that this node will not commit."""
        for submission in batch:
            submission.settle(
                RelayError("unavailable", "the relay is stopping; send again", retry_after=1000)
            )

    def refuse(self, batch: list[Submission]) -> None:
        """Tells the senders of messages that were not tried, because the store does not answer."""
        for submission in batch:
            submission.settle(unreachable())

    @property
    def under_way(self) -> list[asyncio.Future[None]]:
        """The attempts under way; each is done when it is over. The next one of a retry resolves what has changed since."""
        return list(self._attempts)

    def concerned(
        self, conversations: Collection[str], users: AbstractSet[str]
    ) -> list[asyncio.Future[None]]:
        """Those of them that may still commit something to recipients resolved before a change of these conversations, or of these
        users. Call when this node believes no more what was resolved of them. Reads every message under way."""
        return [
            over
            for over, batch in self._attempts.items()
            if any(submission.concerns(conversations, users) for submission in batch)
        ]

    @property
    def doubtful(self) -> bool:
        """Whether of something nobody knows yet whether it was stored."""
        return bool(self._given_up)

    async def settle_given_up(self) -> None:
        """Books and delivers what was stored after all, though its sender was told `unavailable`. Call now and then; one
        page each time."""
        ripe = monotonic() - self._timeout
        wanted = [doc_id for doc_id, one in self._given_up.items() if one.since <= ripe][:_GIVEN_UP_PAGE]
        if not wanted:
            return
        documents = await self._messages.read(wanted, committed=True)
        gone, untold = await self._fates.find_some([doc_id for doc_id in wanted if doc_id not in documents])
        for doc_id in wanted:
            if doc_id in untold:
                continue
            document, fate = documents.get(doc_id), gone.get(doc_id)
            given_up = self._given_up.get(doc_id)
            if document is not None:
                self._settle_given_up(doc_id, document)
            elif fate is not None and given_up is not None and fate.seq == given_up.seq:
                self._book(len(given_up.awaiting), given_up.trimmed)
            self._given_up.pop(doc_id, None)

    def _settle_given_up(self, doc_id: str, document: Mapping[str, Any]) -> None:
        given_up = self._given_up.get(doc_id)
        if given_up is None or document.get("seq") != given_up.seq:
            return
        del self._given_up[doc_id]
        trimmed = document.get("trimmed", 0)
        if "parts" in document:
            self._book(len(given_up.awaiting), trimmed)
            self._found(given_up.awaiting)
            return
        self._book(len(document["awaiting"]) + len(document.get("deliveredTo", ())), trimmed)
        self._found(document["awaiting"])

    async def close(self) -> None:
        """Ends the retries that are under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_known(self, batch: list[Submission], attempt: int) -> None:
        delay = _FIRST_DELAY
        pending = batch
        try:
            while pending:
                over = asyncio.get_running_loop().create_future()
                self._attempts[over] = pending
                try:
                    await self._attempt(pending, attempt)
                except PyMongoError as error:
                    log.warning(
                        "outcome of a commit is unknown",
                        messages=len(pending),
                        attempt=attempt,
                        error=brief(error),
                    )
                finally:
                    del self._attempts[over]
                    over.set_result(None)
                unknown = [submission for submission in pending if not submission.settled]
                held = sum(submission.held for submission in unknown)
                if len(unknown) < len(pending):
                    self._breaker.succeeded()
                elif held < len(pending):
                    self._breaker.failed()
                if unknown:
                    self._retries.inc()
                    unknown = self._drop_late(unknown)
                if unknown and attempt == 0 and (held or len(unknown) < len(batch)):
                    # Most of the group is known, or waits for another shard: it must not hold up the groups behind it.
                    task = asyncio.create_task(self._until_known(unknown, 1), name="commit-send-retry")
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                    return
                pending = unknown
                attempt += 1
                if pending:
                    await asyncio.sleep(delay * random.uniform(0.5, 1))
                    delay = min(delay * 2, _LAST_DELAY)
        except asyncio.CancelledError:
            self.abandon(pending)
            raise

    def _drop_late(self, pending: list[Submission]) -> list[Submission]:
        now = monotonic()
        late = [submission for submission in pending if now >= submission.deadline]
        for submission in late:
            envelope = submission.envelope
            if len(self._given_up) < _MAX_GIVEN_UP:
                self._given_up[envelope.doc_id] = GivenUp(
                    envelope.seq, envelope.awaiting, len(envelope.trimmed), now
                )
            submission.settle(
                RelayError(
                    "unavailable", "the message could not be stored in time; send it again", retry_after=1000
                )
            )
        return [submission for submission in pending if now < submission.deadline] if late else pending

    async def _attempt(self, batch: list[Submission], attempt: int) -> None:
        for submission in batch:
            submission.held = False
        await self._audiences.hold()
        await self._refresh(batch, attempt)
        asked_again = [s for s in batch if not s.settled and not s.held and (s.again or attempt)]
        if asked_again:
            await self._answer_from_fates(asked_again, inserted=bool(attempt), tried=bool(attempt))
        batch = [submission for submission in batch if not submission.settled and not submission.held]
        if batch:
            self._expected(submission.envelope for submission in batch)
            await self._insert(batch, attempt)

    async def _insert(self, batch: list[Submission], attempt: int) -> None:
        """Writes these, and brings those of known outcome to it."""
        duplicates: list[Submission] = []
        unknown: set[int] = set()
        try:
            with time_limit(self._timeout):
                await self._collection.insert_many([s.raws[0] for s in batch], ordered=False)
        except BulkWriteError as error:
            duplicates, unknown = self._sort_out(batch, error.details)
        doubtful = {id(s) for s in duplicates}
        inserted = [
            s for n, s in enumerate(batch) if n not in unknown and id(s) not in doubtful and not s.settled
        ]
        resent = [s for s in inserted if s.again or attempt]
        if resent:
            # The first incarnation may have been acknowledged and deleted between the question above and the insert.
            await self._answer_from_fates(resent, inserted=True)
        await self._succeed([s for s in inserted if not s.settled and not s.held])
        if duplicates:
            await self._answer_duplicates(duplicates, attempt)

    def _sort_out(self, batch: list[Submission], details: Any) -> tuple[list[Submission], set[int]]:
        """Splits a group by outcome; returns the duplicates and the places of the unknown ones."""
        # A majority time-out comes with *empty* writeErrors and one write-concern error for all.
        unknown = set(range(len(batch))) if details.get("writeConcernErrors") else set()
        duplicates: list[Submission] = []
        for problem in details.get("writeErrors", ()):
            place = problem["index"]
            code = problem.get("code")
            if code == DUPLICATE:
                duplicates.append(batch[place])
            elif code in DEFINITE:
                batch[place].settle(RelayError("bad_request", "this message cannot be stored"))
                log.warning("a document was refused", code=code)
            else:
                unknown.add(place)
                continue
            unknown.discard(place)
        return duplicates, unknown

    async def _succeed(self, inserted: list[Submission]) -> None:
        if not inserted:
            return
        for submission in inserted:
            envelope = submission.envelope
            submission.settle(Stored(envelope.seq, envelope.at, fresh=True))
        self._accept([s.envelope for s in inserted])
        outdated = [s for s in inserted if not s.audience.fresh]
        kept_back = await self._check_again(outdated) if outdated else set()
        self._committed([piece for s in inserted for piece in s.pieces if piece not in kept_back])

    def _accept(self, envelopes: Sequence[Envelope]) -> None:
        self._book(sum(len(e.awaiting) for e in envelopes), sum(len(e.trimmed) for e in envelopes))
        self._accepted(envelopes)

    def _book(self, waiting: int, trimmed: int) -> None:
        """Deliveries: those that wait, and those that full mailboxes were left out of."""
        self._ledger.add("accepted", waiting + trimmed)
        self._ledger.add("trimmed", trimmed)

    async def _check_again(self, outdated: list[Submission]) -> set[Envelope]:
        """Members or devices may have changed while these were being written: nothing is pushed to who is no member any
        more, and it does not wait for them. Returns what is not to be pushed now."""
        try:
            audiences = await self._audiences.resolve_all(s.envelope.conversation for s in outdated)
        except PyMongoError as error:
            log.warning("recipients of fresh messages are not known; drains deliver", error=brief(error))
            for submission in outdated:
                self._found(submission.envelope.awaiting)
            return {piece for submission in outdated for piece in submission.pieces}
        kept_back = set()
        for submission in outdated:
            audience = audiences[submission.envelope.conversation]
            for piece, strayed in take_strayed(submission, audience):
                self._strayed(piece.stored_id, strayed)
                if not piece.awaiting:
                    kept_back.add(piece)
        return kept_back

    async def _answer_from_fates(
        self, batch: list[Submission], *, inserted: bool, tried: bool = True
    ) -> None:
        """Answers what is on record as gone; holds those of which it cannot be told. ``inserted``: this submission may have put a
        second incarnation into the store, which is taken back. ``tried``: it may have been stored; senders can choose the
        ``seq`` of another."""
        gone, untold = await self._fates.find_some([s.envelope.doc_id for s in batch])
        for submission in batch:
            envelope = submission.envelope
            submission.held = envelope.doc_id in untold
            known = gone.get(envelope.doc_id)
            if known is None:
                continue
            if inserted and known.seq != envelope.seq:
                await self._take_back(submission)
            if (known.user, known.device) != (envelope.user, envelope.device):
                submission.settle(conflict())
                continue
            own = tried and known.seq == envelope.seq
            if own:
                # An attempt of this very submission was stored, delivered and deleted before its answer arrived.
                recipients = submission.writings.get(known.writing)
                if recipients is not None:
                    envelope.awaiting, envelope.trimmed = recipients
                self._accept([envelope])
            submission.settle(Stored(known.seq, known.at, fresh=own))

    async def _take_back(self, submission: Submission) -> None:
        envelope = submission.envelope
        with time_limit(self._timeout):
            await self._collection.delete_one(
                {"_id": envelope.doc_id, "conversationId": envelope.conversation, "seq": envelope.seq}
            )

    async def _answer_duplicates(self, batch: list[Submission], attempt: int) -> None:
        """Only a majority-committed copy may be answered with ``stored``; anything else stays unknown. What is there at the
        first attempt is another submission's, whatever its ``seq``: senders can choose it."""
        found = await self._messages.read([s.envelope.doc_id for s in batch], committed=True)
        fresh: list[Submission] = []
        missing: list[Submission] = []
        for submission in batch:
            envelope = submission.envelope
            document = found.get(envelope.doc_id)
            if document is None:
                missing.append(submission)
            elif owner(document) != (envelope.user, envelope.device):
                submission.settle(conflict())
            elif attempt and document["seq"] == envelope.seq:
                # Whoever found it in the store before this answer may have acknowledged it already, or a device have gone.
                ended = max(
                    len(envelope.awaiting) - len(document["awaiting"]), len(document.get("deliveredTo", ()))
                )
                # Which recipients the attempt had that came through, nobody can tell.
                self._ledger.mistrusted |= submission.renewed
                envelope.awaiting = list(document["awaiting"])
                envelope.shared = (
                    len(envelope.awaiting) > 1 or "deliveredTo" in document or "trimmed" in document
                )
                self._ledger.add("accepted", ended)
                fresh.append(submission)
            else:
                self._settle_given_up(envelope.doc_id, document)
                submission.settle(Stored(document["seq"], int(document["createdAt"]), fresh=False))
        await self._succeed(fresh)
        if missing:
            await self._answer_from_fates(missing, inserted=False, tried=bool(attempt))
            # The id may be held by what a large group's message left when its writer died: the next attempt finds it free.
            claims = await self._messages.read_all([s.envelope.doc_id for s in missing if not s.settled])
            for claim in claims.values():
                if "claimedAt" in claim:
                    await self._messages.heads.clear(claim)

    async def _refresh(self, batch: list[Submission], attempt: int) -> None:
        """Resolves recipients again where they changed since, or were resolved longer ago than the lease: a node that was
        stopped, or whose queue was long, may not have heard of a removal."""
        old = [s for s in batch if not s.audience.fresh]
        if not old:
            return
        audiences = await self._audiences.resolve_all(s.envelope.conversation for s in old)
        strangers: list[Submission] = []
        refused: list[tuple[Submission, RelayError]] = []
        for submission in old:
            audience = submission.audience = audiences[submission.envelope.conversation]
            user = submission.envelope.user
            if (
                not attempt
                and user != RELAY_USER
                and (user not in audience.members or user in audience.refusals)
            ):
                strangers.append(submission)
                continue
            if not attempt and submission.check is not None:
                try:
                    submission.check(audience)
                except RelayError as refusal:
                    refused.append((submission, refusal))
                    continue
            renew(submission, tried=bool(attempt))
        refused += [(submission, stranger(submission)) for submission in strangers]
        if refused:
            await self._refuse(refused)

    async def _refuse(self, refused: list[tuple[Submission, RelayError]]) -> None:
        """Members, permissions or devices have changed since these were sent; a resend of what was stored before is
        answered all the same."""
        batch = [submission for submission, _ in refused]
        found = await self._messages.read([s.envelope.doc_id for s in batch], committed=True)
        for submission in batch:
            document = found.get(submission.envelope.doc_id)
            own = (submission.envelope.user, submission.envelope.device)
            if document is not None and owner(document) == own:
                submission.settle(Stored(document["seq"], int(document["createdAt"]), fresh=False))
        resent = [s for s in batch if not s.settled and s.again]
        await self._answer_from_fates(resent, inserted=False, tried=False)
        for submission, refusal in refused:
            if not submission.held:
                submission.settle(refusal)
