"""Conversations and their members."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from handlers.http.examples import AT, CONVERSATION
from handlers.http.schemas.base import Answer, MediaId, MessageId, Milliseconds, Request, UserId
from handlers.http.schemas.names import SIGNS, GroupName
from handlers.http.wording import form

MAX_NAMED: int = 1000
Description = Annotated[
    str, Field(max_length=1024, pattern=form(rf"^(?:[^{SIGNS}]|[\t\n])*$", "text without control characters"))
]
Role = Literal["admin", "moderator", "member"]
_MEMBERS: Final = [
    {"user": user, "role": role, "name": user.title(), "joinedAt": AT}
    for user, role in (("ann", "admin"), ("bob", "moderator"), ("cleo", "member"))
]


class CreateConversation(Request):
    """``members`` are the others; the creator is added. A repeated ``ref`` finds the first creation."""

    type: Literal["direct", "group"]
    members: list[UserId] = Field(max_length=MAX_NAMED, examples=[["bob"]])
    name: GroupName | None = None
    ref: MessageId | None = None


class SettingsChange(Request):
    """``whoMayPost``: all members, or only admins and moderators."""

    who_may_post: Literal["members", "moderators"] | None = Field(default=None, alias="whoMayPost")


class ChangeConversation(Request):
    """What is named is changed; null clears ``picture`` and ``description``."""

    name: GroupName | None = Field(default=None, examples=["Allotment"])
    picture: MediaId | None = None
    description: Description | None = None
    settings: SettingsChange | None = None


class ChangeOwn(Request):
    """What a conversation is to this member alone; null unsets."""

    muted_until: Milliseconds | None = Field(default=None, alias="mutedUntil")
    pinned: bool | None = Field(default=None, examples=[True])
    archived: bool | None = None


class AddMembers(Request):
    """People to add; who is a member already stays as they are."""

    users: list[UserId] = Field(min_length=1, max_length=MAX_NAMED, examples=[["cleo"]])


class ChangeMember(Request):
    """A member's new role."""

    role: Role = Field(examples=["moderator"])


class MemberAnswer(Answer):
    """One person in a conversation; ``name`` is their name or user name, when they have one."""

    user: str
    role: Role = Field(examples=["moderator"])
    name: str | None = Field(examples=["Bob"])
    joined_at: int = Field(alias="joinedAt")


class OwnAnswer(Answer):
    """What the conversation is to the caller."""

    role: Role
    muted_until: int | None = Field(alias="mutedUntil", examples=[None])
    pinned: bool
    archived: bool
    read_up_to: int | None = Field(alias="readUpTo")
    joined_at: int = Field(alias="joinedAt")


class SettingsAnswer(Answer):
    """A group's settings."""

    who_may_post: Literal["members", "moderators"] = Field(alias="whoMayPost")


class ConversationAnswer(Answer):
    """A conversation as its members see it; times in milliseconds. ``members`` holds the first 100; in lists, everybody of
    conversations up to 16 and the caller alone of larger ones. ``memberCount`` counts all."""

    id: str = Field(examples=[CONVERSATION])
    type: Literal["direct", "group"] = Field(examples=["group"])
    name: str | None = Field(examples=["Allotment"])
    picture: str | None
    description: str | None
    settings: SettingsAnswer
    members: list[MemberAnswer] = Field(examples=[_MEMBERS])
    member_count: int = Field(alias="memberCount", examples=[len(_MEMBERS)])
    created_at: int = Field(alias="createdAt")
    updated_at: int = Field(alias="updatedAt")
    me: OwnAnswer


class ConversationPage(Answer):
    """A page of conversations, last changed first."""

    items: list[ConversationAnswer]
    next: str | None


class MemberPage(Answer):
    """A page of members, by user id."""

    items: list[MemberAnswer]
    next: str | None


class DevicesAnswer(Answer):
    """The devices a message of this conversation goes to; ``devicesRev`` names this very set."""

    devices_rev: str = Field(alias="devicesRev")
    devices: list[str]
