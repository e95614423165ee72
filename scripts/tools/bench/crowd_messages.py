"""What the bench asks of a crowd, and what that answers: one JSON object a line, each request answered once."""

from __future__ import annotations

import msgspec

from scripts.tools.bench.messages import Percentiles


class Group(msgspec.Struct, frozen=True):
    """A conversation of ``count`` people with one device each: numbers ``first`` and on."""

    conversation: str
    first: int
    count: int


class Request(msgspec.Struct, tag_field="do", frozen=True, kw_only=True):
    """Something a crowd is asked to do."""


class Gather(Request, tag="gather", frozen=True):
    """The first request: where the relay is, and who there is. Answered by Done."""

    host: str
    port: int
    secret: str
    audience: str
    groups: list[Group]
    size: int


class Enter(Request, tag="enter", frozen=True):
    """Connects these devices. Answered by Entered when each has drained and acknowledged all that waited."""

    first: int
    count: int


class Say(Request, tag="say", frozen=True):
    """So many messages into the first group, each when everybody who is connected has the one before. Answered by Said."""

    messages: int
    pause: float


class Talk(Request, tag="talk", frozen=True):
    """In every group so many devices keep ``window`` messages each under way, until Stop. Answered by Done."""

    senders: int
    window: int


class Stop(Request, tag="stop", frozen=True):
    """Nothing more is sent. Answered by Settled when nothing is under way any more, or when it gives up on that."""


AnyRequest = Gather | Enter | Say | Talk | Stop


class Answer(msgspec.Struct, tag_field="answer", frozen=True, kw_only=True):
    """What came of a request."""


class Done(Answer, tag="done", frozen=True):
    """It is."""


class Entered(Answer, tag="entered", frozen=True):
    """All of them are connected, and ``messages`` deliveries were drained; ``seconds`` since the request."""

    connections: int
    messages: int
    seconds: float


class Said(Answer, tag="said", frozen=True):
    """Times from sending, one for each message: until it was stored, until the first and until the last device had it."""

    stored_ms: Percentiles
    first_ms: Percentiles
    last_ms: Percentiles


class Settled(Answer, tag="settled", frozen=True):
    """Everything since Gather. ``sent`` and ``stored`` count messages, ``delivered`` deliveries, ``missing`` members who
    have not seen a message of their group; ``repeated`` came again, ``unknown`` was never sent. ``reached_ms``: from
    sending to the last connected device, of the messages of Talk. ``errors`` are the first few, as people read them."""

    sent: int
    stored: int
    delivered: int
    missing: int
    repeated: int
    unknown: int
    failed: int
    closed: int
    per_frame: float
    reached_ms: Percentiles
    errors: list[str]


class Unable(Answer, tag="unable", frozen=True):
    """The request could not be carried out, and the crowd is gone; one line."""

    reason: str


AnyAnswer = Done | Entered | Said | Settled | Unable
