"""What can go wrong on a device, as one tree.

DeviceError
├── Stopped by the relay, never retried by the device itself
│   ├── Replaced         another connection of the same device took over (close code 4409)
│   ├── TokenRefused     the relay refused a fresh token too (4401)
│   ├── SessionEnded     this device is logged out: revoked, or its session was idle for too long
│   └── ClientTooOld     (4426)
├── WrongDatabase        the database belongs to another device or a newer version, or another process has it open
├── StorageError         the disk refused; nothing was acknowledged or promised
├── OutboxFull           too many messages wait to be sent
├── InvalidMessage       this message can never be sent
└── RequestFailed        an HTTP request was refused, or could not be made
"""

from __future__ import annotations


class DeviceError(Exception):
    """Base of all errors of the device; ``str()`` is one line for people."""


class Replaced(DeviceError):
    """Another connection of the same device took over; two processes would evict each other for ever."""


class TokenRefused(DeviceError):
    """The relay refused the token, and the one fetched after that too."""


class SessionEnded(DeviceError):
    """The relay does not renew this session any more; only logging in again helps."""


class ClientTooOld(DeviceError):
    """The relay no longer speaks this version of the protocol."""


class WrongDatabase(DeviceError):
    """The database cannot be used by this device now."""


class StorageError(DeviceError):
    """A transaction failed as a whole; nothing of it was kept."""


class OutboxFull(DeviceError):
    """The limit of messages waiting to be sent is reached; wait with ``Device.room``."""


class InvalidMessage(DeviceError, ValueError):
    """The relay would refuse this message whenever it came."""


class RequestFailed(DeviceError):
    """An HTTP request did not succeed.

    ``status`` is the HTTP status, 0 when no answer came; ``code`` is the relay's, ``unreachable`` when no answer came;
    ``retry`` says whether the same request can succeed later, ``retry_after`` is in milliseconds.
    """

    def __init__(self, status: int, code: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after

    @property
    def retry(self) -> bool:
        """Whether the same request can succeed later."""
        return self.status in (0, 429) or self.status >= 500
