"""Group commit of messages to many devices, which are stored in parts.

1. The head is *claimed*: its id is taken, with nothing to deliver yet. Whoever holds an older claim of the same id loses it.
2. The parts are written.
3. The claim becomes the head, if it is still this writing's: that makes the message ``stored``, and its parts visible.

A crash between the steps leaves a claim and invisible parts; the next resend takes the claim over, through any node, or a job
removes it (relay.store.heads). A writer that was overtaken while it was held up cannot make its message any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bson.datetime_ms import DatetimeMS
from pymongo import ReplaceOne

from relay.store.commits import DEFINITE, DUPLICATE, Commits
from relay.store.documents import owner
from relay.store.heads import abandoned, overtaken
from relay.store.mongo import BulkWriteError, time_limit
from relay.store.submissions import Stored, Submission, conflict
from relay.wire.errors import RelayError
from relay.wire.ids import part_ids


class LargeCommits(Commits):
    """Commits groups of large submissions."""

    async def _insert(self, batch: list[Submission], attempt: int) -> None:
        claimed = await self._claim(batch, attempt)
        asked_again = [s for s in claimed if s.again or attempt]
        if asked_again:
            # Nobody else can store it while the id is claimed, so what is not on record now has not been stored.
            await self._answer_from_fates(asked_again, inserted=False, tried=bool(attempt))
            for submission in asked_again:
                if submission.settled:
                    await self._messages.heads.clear(_claim(submission))
            claimed = [s for s in claimed if not s.settled and not s.held]
        written = await self._write_parts(claimed)
        if written:
            await self._make_heads(written)

    async def _claim(self, batch: list[Submission], attempt: int = 0) -> list[Submission]:
        """Takes the ids; returns the submissions that hold theirs now."""
        taken: list[Submission] = []
        if attempt:
            there = await self._messages.read_all([s.envelope.doc_id for s in batch])
            taken = [s for s in batch if s.envelope.doc_id in there]
            batch = [s for s in batch if s.envelope.doc_id not in there]
            for submission in batch:
                await self._begin_anew(submission)
        held: list[Submission] = []
        if batch:
            duplicates: list[Submission] = []
            unknown: set[int] = set()
            try:
                with time_limit(self._timeout):
                    await self._collection.insert_many([_claim(s) for s in batch], ordered=False)
            except BulkWriteError as error:
                duplicates, unknown = self._sort_out(batch, error.details)
            doubtful = {id(s) for s in duplicates}
            held = [
                s for n, s in enumerate(batch) if n not in unknown and id(s) not in doubtful and not s.settled
            ]
            taken += duplicates
        if taken:
            held += await self._claim_again(taken, attempt)
        return held

    async def _claim_again(self, batch: list[Submission], attempt: int) -> list[Submission]:
        """The ids are taken: by the very message, by an earlier attempt to store it, or by another's."""
        found = await self._messages.read_all([s.envelope.doc_id for s in batch], committed=True)
        held: list[Submission] = []
        for submission in batch:
            document = found.get(submission.envelope.doc_id)
            if document is None:
                continue
            if "claimedAt" not in document:
                await self._answer_from_head(submission, document)
            elif document["writing"] == submission.writing:
                # Taken over by an attempt before this, which may not have come to removing what there was.
                await self._messages.heads.remove_parts(overtaken(document))
                held.append(submission)
            else:
                if attempt:
                    await self._begin_anew(submission)
                fields = {name: value for name, value in _claim(submission).items() if name not in _FIXED}
                if await self._messages.heads.take_over(document, fields):
                    await self._messages.heads.remove_parts(abandoned(document))
                    held.append(submission)
        return held

    async def _begin_anew(self, submission: Submission) -> None:
        """Its claim was lost. Whoever took that may still be removing its parts, and may have looked for them before they were
        written: a writing that was lost is never used again, and leaves nothing."""
        await self._messages.heads.remove_parts(_parts(submission))
        submission.encode()

    async def _write_parts(self, batch: list[Submission]) -> list[Submission]:
        """Writes every piece but the head; returns the submissions all of whose pieces are there."""
        raws = [raw for submission in batch for raw in submission.raws[1:]]
        if not raws:
            return batch
        whose = [submission for submission in batch for _ in submission.raws[1:]]
        lacking: set[Submission] = set()
        try:
            with time_limit(self._timeout):
                await self._collection.insert_many(raws, ordered=False)
        except BulkWriteError as error:
            if error.details.get("writeConcernErrors"):
                raise
            for problem in error.details.get("writeErrors", ()):
                submission, code = whose[problem["index"]], problem.get("code")
                # Under this writing only an attempt of this very submission can have written it.
                if code != DUPLICATE:
                    lacking.add(submission)
                if code in DEFINITE:
                    submission.settle(RelayError("bad_request", "this message cannot be stored"))
                    await self._messages.heads.clear(_claim(submission))
        return [submission for submission in batch if submission not in lacking]

    async def _make_heads(self, batch: list[Submission]) -> None:
        replacements: list[ReplaceOne[Any]] = [
            ReplaceOne(
                {
                    "_id": s.envelope.doc_id,
                    "conversationId": s.envelope.conversation,
                    "writing": s.writing,
                    "claimedAt": {"$exists": True},
                },
                s.raws[0],
            )
            for s in batch
        ]
        with time_limit(self._timeout):
            result = await self._collection.bulk_write(replacements, ordered=False)
        if result.matched_count == len(batch):
            await self._succeed(batch)
            return
        # Some were overtaken; what is theirs now is asked, the others are tried again.
        found = await self._messages.read_all([s.envelope.doc_id for s in batch], committed=True)
        for submission in batch:
            document = found.get(submission.envelope.doc_id)
            if document is not None and "claimedAt" not in document:
                await self._answer_from_head(submission, document)
            elif document is None or document["writing"] != submission.writing:
                # Who overtook it may have looked for its parts before they were written.
                await self._messages.heads.remove_parts(_parts(submission))

    async def _answer_from_head(self, submission: Submission, document: Mapping[str, Any]) -> None:
        """A head is there. Settles the submission by it."""
        envelope = submission.envelope
        writing = document.get("writing", "")
        if owner(document) != (envelope.user, envelope.device):
            submission.settle(conflict())
        elif document["seq"] != envelope.seq:
            self._settle_given_up(envelope.doc_id, document)
            submission.settle(Stored(document["seq"], int(document["createdAt"]), fresh=False))
        elif writing == submission.writing:
            await self._succeed([submission])
        else:
            # An earlier attempt, to the recipients of that moment, had come through after all.
            envelope.awaiting, envelope.trimmed = submission.writings.get(writing, ([], []))
            if not writing:
                # They were so few that one piece was enough.
                envelope.awaiting = list(document["awaiting"])
                self._book(len(document.get("deliveredTo", ())), int(document.get("trimmed", 0)))
            submission.settle(Stored(envelope.seq, envelope.at, fresh=True))
            self._accept([envelope])
            self._found(envelope.awaiting)
        if writing != submission.writing:
            await self._messages.heads.remove_parts(_parts(submission))

    async def _take_back(self, submission: Submission) -> None:
        doc_id = submission.envelope.doc_id
        document = (await self._messages.read_all([doc_id])).get(doc_id)
        if document is None or document.get("writing", submission.writing) not in submission.writings:
            await self._messages.heads.remove_parts(_parts(submission))
            return
        if "claimedAt" in document:
            await self._messages.heads.clear(document)
            return
        if "parts" in document:
            names = part_ids(doc_id, document["writing"], document["parts"])
            await self._messages.heads.remove_parts(names)
        await super()._take_back(submission)

    async def _succeed(self, inserted: list[Submission]) -> None:
        for submission in inserted:
            self._messages.heads.committed(submission.envelope.doc_id, submission.writing)
        await super()._succeed(inserted)


_FIXED = ("_id", "conversationId")


def _parts(submission: Submission) -> list[str]:
    return part_ids(submission.envelope.doc_id, submission.writing, len(submission.pieces))


def _claim(submission: Submission) -> dict[str, Any]:
    envelope = submission.envelope
    return {
        "_id": envelope.doc_id,
        "conversationId": envelope.conversation,
        "id": envelope.id,
        "sender": {"user": envelope.user, "device": envelope.device},
        "seq": envelope.seq,
        "createdAt": DatetimeMS(envelope.at),
        "claimedAt": DatetimeMS(envelope.at),
        "writing": submission.writing,
        "parts": len(submission.pieces),
    }
