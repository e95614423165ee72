"""The end-to-end key directory."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

from handlers.http.schemas.base import Answer, Request
from handlers.http.wording import form
from relay.wire.ids import DEVICE_PATTERN, USER_PATTERN

MAX_UPLOAD = 200
MAX_CLAIM = 256

Base64 = Annotated[
    str,
    Field(
        pattern=form(r"^[A-Za-z0-9+/_-]+={0,2}$", "Base64"),
        max_length=4096,
        description="Base64, with or without padding",
        examples=["BU6pMRmRvJ7P0bnEkEgcOBoqQNOj8C1rk9mrqGmnbJdb"],
    ),
]
KeyId = Annotated[int, Field(ge=0, lt=2**31, examples=[7])]
DeviceKey = Annotated[
    str,
    Field(
        pattern=form(f"^{USER_PATTERN}/{DEVICE_PATTERN}$", "a user id and a device id, user/device"),
        description="`user/device`",
        examples=["bob/phone"],
    ),
]


class PreKey(Request):
    """A one-time prekey."""

    id: KeyId
    key: Base64


class SignedPreKey(Request):
    """A prekey signed with the identity key."""

    id: KeyId
    key: Base64
    signature: Base64


def _distinct_keys(keys: list[PreKey]) -> list[PreKey]:
    if len({key.id for key in keys}) != len(keys):
        raise ValueError("a key id comes twice")
    return keys


def _distinct_signed(keys: list[SignedPreKey]) -> list[SignedPreKey]:
    if len({key.id for key in keys}) != len(keys):
        raise ValueError("a key id comes twice")
    return keys


def _distinct_devices(devices: list[str]) -> list[str]:
    if len(set(devices)) != len(devices):
        raise ValueError("a device comes twice")
    return devices


_KEY = "BU6pMRmRvJ7P0bnEkEgcOBoqQNOj8C1rk9mrqGmnbJdb"
_SIGNATURE = "c2lnbmVkIHdpdGggdGhlIGlkZW50aXR5IGtleSBvZiB0aGlzIGRldmljZQ=="


class PublishKeys(Request):
    """The public keys of this device. ``registrationId`` names the installation; without it the stored one stays. Key ids
    are unique for each kind and never used again by one installation."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "identityKey": _KEY,
                    "registrationId": 11845,
                    "signedPreKey": {"id": 3, "key": _KEY, "signature": _SIGNATURE},
                    "oneTimePreKeys": [{"id": 41, "key": _KEY}, {"id": 42, "key": _KEY}],
                    "kemPreKeys": [{"id": 7, "key": _KEY, "signature": _SIGNATURE}],
                    "lastResort": {"id": 1, "key": _KEY, "signature": _SIGNATURE},
                }
            ]
        }
    )

    identity_key: Base64 = Field(alias="identityKey")
    registration_id: KeyId | None = Field(default=None, alias="registrationId")
    signed_pre_key: SignedPreKey = Field(alias="signedPreKey")
    one_time_pre_keys: Annotated[
        list[PreKey], Field(max_length=MAX_UPLOAD), AfterValidator(_distinct_keys)
    ] = Field(alias="oneTimePreKeys")
    kem_pre_keys: Annotated[
        list[SignedPreKey], Field(max_length=MAX_UPLOAD), AfterValidator(_distinct_signed)
    ] = Field(default_factory=list, alias="kemPreKeys")
    last_resort: SignedPreKey | None = Field(default=None, alias="lastResort")


class StockAnswer(Answer):
    """How many prekeys of this device are left to be claimed."""

    one_time: int = Field(alias="oneTime", examples=[84])
    kem: int = Field(examples=[20])


class PublicPreKey(Answer):
    """A one-time prekey, handed out once."""

    id: int
    key: str


class PublicSignedKey(PublicPreKey):
    """A prekey with its signature."""

    signature: str


class DeviceKeysAnswer(Answer):
    """The keys of one device that reading does not use up; ``device`` is ``user/device``."""

    device: str = Field(examples=["bob/phone"])
    identity_key: str = Field(alias="identityKey")
    registration_id: int | None = Field(alias="registrationId")
    signed_pre_key: PublicSignedKey = Field(alias="signedPreKey")


class DirectoryAnswer(Answer):
    """The devices of a person that have published keys and receive messages."""

    devices: list[DeviceKeysAnswer]


class ClaimKeys(Request):
    """The devices to claim prekeys of."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"devices": ["bob/phone", "bob/tablet"]}]})

    devices: Annotated[
        list[DeviceKey],
        Field(max_length=MAX_CLAIM, json_schema_extra={"uniqueItems": True}),
        AfterValidator(_distinct_devices),
    ]


class ClaimedKeys(Answer):
    """What was handed out for one device: null where there is nothing left, and for an unknown device."""

    device: str = Field(examples=["bob/phone"])
    one_time_pre_key: PublicPreKey | None = Field(alias="oneTimePreKey")
    kem_pre_key: PublicSignedKey | None = Field(alias="kemPreKey")


class ClaimAnswer(Answer):
    """One entry for each device that was asked for, in that order."""

    devices: list[ClaimedKeys]
