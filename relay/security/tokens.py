"""Access tokens: who a device is, as its JWT says (PROTOCOL section 1).

A ``Verifier`` turns a token into an ``Identity`` with the keys that ``load_keys`` read from the settings;
``mint`` makes a token, ``generate_secret`` the secret of a relay that was given none.

What is refused follows RFC 8725 (best practices for JWT): every key has exactly one algorithm, fixed when it
is loaded, and a token that names another is never tried against it. So ``none`` is unknown, and a public key
cannot serve as an HMAC secret. Keys that a header brings (``jku``, ``jwk``, ``x5u``, ``x5c``) are not read.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm

from relay.wire.clock import wall_seconds
from relay.wire.ids import DEVICE_ID, USER_ID

MAX_TOKEN: Final = 8192
"""The longest token that is looked at, in characters."""
MIN_SECRET: Final = 32
"""The shortest HS256 secret, in bytes (RFC 7518 3.2: as long as the hash)."""
MIN_RSA_BITS: Final = 2048
MAX_KEYS: Final = 64
"""A token without ``kid`` is tried against every key of its algorithm: this bounds the work it causes."""

_MAX_FILE: Final = 1 << 20
_LAST_SECOND: Final = 253_402_300_799  # the end of the year 9999: what date libraries can still hold
_SESSION_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHAPE: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_JWS: Final = jwt.PyJWS(algorithms=["HS256", "RS256", "ES256", "EdDSA"])
_FROM_JWK: Final = {"RSA": RSAAlgorithm.from_jwk, "EC": ECAlgorithm.from_jwk, "OKP": OKPAlgorithm.from_jwk}

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey


class TokenError(Exception):
    """A token that is not accepted. The message is one line, shows no value of it, may go to the client."""


class KeyConfigurationError(ValueError):
    """Keys that cannot be used. The message is one line: the setting, what is wrong, what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom an accepted token speaks for. ``issued`` and ``expires`` are in seconds since the epoch, ``expires`` in the
    future. ``session`` (claim ``sid`` of tokens signed with a secret) is set when the relay issued the token: it is good
    only for that session."""

    user: str
    device: str
    expires: int
    issued: int
    session: str | None = None


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A key and the one algorithm it verifies: ``HS256`` (bytes), ``RS256``, ``ES256`` or ``EdDSA``."""

    key: bytes | PublicKey = field(repr=False)
    algorithm: str
    kid: str | None


class Verifier:
    """Decides whether a token is accepted. Immutable, without I/O.

    ``leeway`` (seconds) forgives an issuer whose clock is ahead (``iat``, ``nbf``); expired is expired.

    Raises KeyConfigurationError for no key or more than ``MAX_KEYS``, an empty audience, two keys with one
    ``kid``, and a key that does not fit its algorithm.
    """

    def __init__(self, keys: Sequence[VerificationKey], *, audience: str, leeway: int = 5) -> None:
        if not keys:
            raise KeyConfigurationError(
                "RELAY_JWT_SECRET: no key is configured; set it, or RELAY_JWT_SECRET_FILE, "
                "RELAY_JWT_PUBLIC_KEY_FILE or RELAY_JWT_JWKS_FILE"
            )
        if len(keys) > MAX_KEYS:
            raise KeyConfigurationError(
                f"RELAY_JWT_*: {len(keys)} keys are active, at most {MAX_KEYS} may be; remove retired ones"
            )
        if not audience:
            raise KeyConfigurationError(
                "RELAY_JWT_AUDIENCE is empty; name the `aud` that tokens for this relay carry"
            )
        self._audience = audience
        self._leeway = leeway
        self._named: dict[str, VerificationKey] = {}
        self._by_algorithm: dict[str, list[VerificationKey]] = {}
        for key in keys:
            if _usable(key.key, "RELAY_JWT_*").algorithm != key.algorithm:
                raise KeyConfigurationError(f"RELAY_JWT_*: a key cannot be used with {key.algorithm!r}")
            if key.kid is not None and self._named.setdefault(key.kid, key) is not key:
                raise KeyConfigurationError(f"RELAY_JWT_*: two keys have the kid {key.kid!r}")
            self._by_algorithm.setdefault(key.algorithm, []).append(key)

    def verify(self, token: str, now: float | None = None) -> Identity:
        """The identity in ``token`` at ``now`` (seconds since the epoch; when None the relay's clock).

        Raises TokenError, and nothing else, whatever the token is.
        """
        if len(token) > MAX_TOKEN:
            raise TokenError(f"the token is longer than {MAX_TOKEN} characters")
        if not _SHAPE.fullmatch(token):
            raise TokenError("the token is not a JWT")
        try:
            header = _JWS.get_unverified_header(token)
        except jwt.PyJWTError:
            raise TokenError("the token is malformed") from None
        for key in self._candidates(header):
            try:
                payload = _JWS.decode_complete(token, key.key, algorithms=[key.algorithm])["payload"]
            except jwt.InvalidSignatureError:
                continue
            except jwt.PyJWTError:
                raise TokenError("the token is malformed") from None
            ours = key.algorithm == "HS256"
            return self._identity(_json_object(payload), wall_seconds() if now is None else now, ours=ours)
        raise TokenError("the token's signature does not match any key of this relay")

    def _candidates(self, header: Mapping[str, Any]) -> Sequence[VerificationKey]:
        # RFC 7515 4.1.11: unknown extensions must not be ignored, and we know none (b64 is one of them).
        if "crit" in header or "b64" in header:
            raise TokenError("the token's header demands extensions that the relay does not support")
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in self._by_algorithm:
            raise TokenError("the token is signed with an algorithm that this relay does not accept")
        keys = self._by_algorithm[algorithm]
        kid = header.get("kid")
        if kid is None:
            return keys
        named = self._named.get(kid)
        if named is not None and named.algorithm == algorithm:
            return (named,)
        # Keys without names (secrets, a PEM file) serve issuers that write a kid all the same.
        if named is not None or any(key.kid is not None for key in keys):
            raise TokenError("the token is signed with a key that this relay does not know")
        return keys

    def _identity(self, claims: Mapping[str, Any], now: float, *, ours: bool) -> Identity:
        user, device, audience = claims.get("sub"), claims.get("dev"), claims.get("aud")
        if not isinstance(user, str) or not USER_ID.fullmatch(user):
            raise TokenError("the token's `sub` claim is missing or not a user id")
        if not isinstance(device, str) or not DEVICE_ID.fullmatch(device):
            raise TokenError("the token's `dev` claim is missing or not a device id")
        meant_for = audience if isinstance(audience, list) else [audience]
        if not all(isinstance(name, str) for name in meant_for) or self._audience not in meant_for:
            raise TokenError("the token's `aud` claim is missing or names another audience")
        issued, expires = _seconds(claims, "iat"), _seconds(claims, "exp")
        if issued > now + self._leeway:
            raise TokenError("the token was issued in the future; check the issuer's clock")
        if "nbf" in claims and _seconds(claims, "nbf") > now + self._leeway:
            raise TokenError("the token is not valid yet")
        if expires <= now:
            raise TokenError("the token has expired; renew it and reconnect")
        # Other issuers' `sid` (OpenID Connect has one) names sessions that the relay knows nothing of.
        session = claims.get("sid") if ours else None
        if ours and "sid" in claims and not (isinstance(session, str) and _SESSION_ID.fullmatch(session)):
            raise TokenError("the token's `sid` claim is not a session id")
        return Identity(user, device, expires, issued, session)


def load_keys(
    *,
    secret: str | None,
    secret_file: Path | None,
    public_key_file: Path | None,
    jwks_file: Path | None,
) -> list[VerificationKey]:
    """Every key of the settings ``RELAY_JWT_SECRET``, ``…_SECRET_FILE``, ``…_PUBLIC_KEY_FILE``,
    ``…_JWKS_FILE``.

    All of them are active at once; an empty list when nothing is set. Files of at most 1 MiB. White space
    around a secret does not belong to it. Keys of a JWKS that are marked for encryption are left out.

    Raises KeyConfigurationError for what cannot be read or is too weak, and for public keys other than RSA
    (2048 bits or more), EC P-256 and Ed25519.
    """
    keys: list[VerificationKey] = []
    if secret is not None:
        if "\n" in secret.strip():
            raise KeyConfigurationError(
                "RELAY_JWT_SECRET has several lines; use RELAY_JWT_SECRET_FILE, one secret a line"
            )
        keys.append(_usable(_secret(secret, "RELAY_JWT_SECRET"), "RELAY_JWT_SECRET"))
    if secret_file is not None:
        setting = "RELAY_JWT_SECRET_FILE"
        keys.extend(_usable(value, setting) for value in _secrets(_read(secret_file, setting), setting))
    if public_key_file is not None:
        setting = "RELAY_JWT_PUBLIC_KEY_FILE"
        keys.append(_from_pem(_read(public_key_file, setting), setting))
    if jwks_file is not None:
        keys.extend(_from_jwks(_read(jwks_file, "RELAY_JWT_JWKS_FILE"), "RELAY_JWT_JWKS_FILE"))
    return keys


def first_secret(keys: Sequence[VerificationKey]) -> str | None:
    """The secret that the relay signs its own tokens with: the first HS256 key, None when there is none."""
    for key in keys:
        if isinstance(key.key, bytes):
            return key.key.decode()
    return None


def mint(
    secret: str,
    user: str,
    device: str,
    *,
    audience: str,
    lifetime: int,
    now: float | None = None,
    session: str | None = None,
) -> str:
    """An HS256 access token of one device, valid from ``now`` for ``lifetime`` seconds, and with ``session`` only as long
    as the device has that session.

    Raises ValueError for ids outside the protocol's alphabet, KeyConfigurationError for a weak secret.
    """
    if not USER_ID.fullmatch(user):
        raise ValueError("a user id has 1 to 128 characters of A-Z a-z 0-9 _ . @ : + -")
    if not DEVICE_ID.fullmatch(device):
        raise ValueError("a device id has 1 to 64 characters of A-Z a-z 0-9 _ . : -")
    if session is not None and not _SESSION_ID.fullmatch(session):
        raise ValueError("a session id has 1 to 64 characters of A-Z a-z 0-9 _ -")
    issued = int(wall_seconds() if now is None else now)
    claims: dict[str, str | int] = {
        "sub": user,
        "dev": device,
        "aud": audience,
        "iat": issued,
        "exp": issued + lifetime,
    }
    if session is not None:
        claims["sid"] = session
    return jwt.encode(claims, _secret(secret, "RELAY_JWT_SECRET"), algorithm="HS256")


def generate_secret(path: Path) -> str:
    """The first secret in the file ``path``, which is created when absent: 256 random bits in hex, mode 0600.

    The file appears complete or not at all, and all who start at once get the same secret.

    Raises KeyConfigurationError when it cannot be read or made, holds no good secret, or is open to others.
    """
    try:
        try:
            return _private_secret(path)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            _create(path, secrets.token_hex(32) + "\n")
            return _private_secret(path)
    except OSError as error:
        raise KeyConfigurationError(f"JWT secret file {path}: {error.strerror or 'unusable'}") from error


def _private_secret(path: Path) -> str:
    # O_NONBLOCK: opening a named pipe would wait for a writer.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise KeyConfigurationError(f"JWT secret file {path} is not a regular file")
        if mode & 0o077:
            raise KeyConfigurationError(
                f"JWT secret file {path} is open to other users (mode {stat.S_IMODE(mode):04o}); "
                "delete it for a new secret, or chmod 600 it if nobody can have read it"
            )
        return _secrets(file.read(_MAX_FILE), f"JWT secret file {path}")[0].decode()


def _create(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, never replaces the secret that another process has just put there.
        os.link(name, path)
    except FileExistsError:
        return
    finally:
        os.unlink(name)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read(path: Path, setting: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise KeyConfigurationError(f"{setting}: {path} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_FILE:
        raise KeyConfigurationError(f"{setting}: {path} is larger than 1 MiB; is it the right file?")
    return data


def _secrets(data: bytes, setting: str) -> list[bytes]:
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError:
        raise KeyConfigurationError(f"{setting} is not UTF-8 text; write it in hex or base64") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip().startswith("#"):  # a comment taken for a secret could be guessed
            raise KeyConfigurationError(f"{setting}, line {number}: comments are not allowed; remove it")
        if line.strip():
            found.append(_secret(line, f"{setting}, line {number}"))
    if not found:
        raise KeyConfigurationError(f"{setting} holds no secret; write one of {MIN_SECRET} bytes or more")
    return found


def _secret(text: str, setting: str) -> bytes:
    try:
        value = text.strip().encode()
    except UnicodeEncodeError:
        raise KeyConfigurationError(f"{setting} is not UTF-8 text; write it in hex or base64") from None
    return _strong(value, setting)


def _usable(key: object, setting: str, kid: str | None = None) -> VerificationKey:
    """The key with the one algorithm that it verifies; refuses keys that are weak or of another kind."""
    if isinstance(key, bytes):
        return VerificationKey(_strong(key, setting), "HS256", kid)
    if isinstance(key, RSAPublicKey):
        if key.key_size < MIN_RSA_BITS:
            raise KeyConfigurationError(
                f"{setting}: the RSA key has {key.key_size} bits, at least {MIN_RSA_BITS} are needed"
            )
        return VerificationKey(key, "RS256", kid)
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return VerificationKey(key, "ES256", kid)
    if isinstance(key, Ed25519PublicKey):
        return VerificationKey(key, "EdDSA", kid)
    kind = key.curve.name if isinstance(key, EllipticCurvePublicKey) else type(key).__name__.lstrip("_")
    raise KeyConfigurationError(
        f"{setting}: a key of kind {kind} cannot be used; RSA, EC P-256 or Ed25519 public keys can"
    )


def _strong(secret: bytes, setting: str) -> bytes:
    if len(secret) < MIN_SECRET:
        raise KeyConfigurationError(
            f"{setting}: the secret has {len(secret)} bytes, at least {MIN_SECRET} are needed; "
            "`openssl rand -hex 32` makes one"
        )
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
        is_key = secret.startswith(b"-----BEGIN")
    except jwt.InvalidKeyError:
        is_key = True
    if is_key:
        raise KeyConfigurationError(
            f"{setting} is a PEM, SSH or JSON Web Key, and a secret must be a random string; "
            "public keys belong in RELAY_JWT_PUBLIC_KEY_FILE"
        )
    return secret


def _from_pem(data: bytes, setting: str) -> VerificationKey:
    if data.count(b"-----BEGIN ") > 1:
        raise KeyConfigurationError(f"{setting} holds several PEM blocks; use RELAY_JWT_JWKS_FILE for them")
    if b"PRIVATE KEY-----" in data:
        raise KeyConfigurationError(
            f"{setting} holds a private key; the relay must have the public one (`openssl pkey -pubout`)"
        )
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise KeyConfigurationError(
            f"{setting} holds no PEM public key that can be read (`-----BEGIN PUBLIC KEY-----`)"
        ) from None
    return _usable(key, setting)


def _from_jwks(data: bytes, setting: str) -> Iterator[VerificationKey]:
    try:
        entries = json.loads(data)["keys"]
    except (ValueError, RecursionError, TypeError, KeyError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise KeyConfigurationError(f'{setting} is not a JWKS, a JSON object {{"keys": [...]}}')
    kids: set[str] = set()
    for number, entry in enumerate(entries, 1):
        where = f"{setting}, key {number}"
        kid, kind = entry.get("kid"), entry.get("kty")
        if kind == "oct":
            raise KeyConfigurationError(f"{where} is a symmetric key; put secrets into RELAY_JWT_SECRET_FILE")
        if entry.get("use") == "enc":
            continue
        if "d" in entry:
            raise KeyConfigurationError(f"{where} is a private key; the relay must have only the public part")
        if not isinstance(kid, str) or not kid:
            raise KeyConfigurationError(f"{where} has no kid; name it as the issuer's tokens do")
        if kid in kids:
            raise KeyConfigurationError(f"{where} has the kid of an earlier one, {kid!r}; name them apart")
        kids.add(kid)
        yield _from_jwk(entry, kid, where)
    if not kids:
        raise KeyConfigurationError(f"{setting} holds no key to verify signatures with")


def _from_jwk(entry: dict[str, Any], kid: str, where: str) -> VerificationKey:
    kind = entry.get("kty")
    read = _FROM_JWK.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise KeyConfigurationError(f"{where} has the unknown kty {kind!r}; known are RSA, EC and OKP")
    try:
        material = read(entry)
    except (jwt.PyJWTError, UnsupportedAlgorithm, ValueError, TypeError, KeyError):
        raise KeyConfigurationError(f"{where} is not a sound {kind} public key") from None
    key = _usable(material, where, kid)
    if entry.get("alg", key.algorithm) != key.algorithm:
        raise KeyConfigurationError(
            f"{where} is meant for {entry['alg']!r}; only {key.algorithm} can be used"
        )
    return key


def _json_object(payload: bytes) -> dict[str, Any]:
    try:
        claims = json.loads(payload)
    except (ValueError, RecursionError):
        claims = None
    if not isinstance(claims, dict):
        raise TokenError("the token's claims are not a JSON object")
    return claims


def _seconds(claims: Mapping[str, Any], name: str) -> int:
    value = claims.get(name)
    # A bool is an int to isinstance, and 1e400 or NaN are floats to json.
    if type(value) is not int or not 0 <= value <= _LAST_SECOND:
        raise TokenError(f"the token's `{name}` claim is missing or not a whole number of seconds")
    return value
