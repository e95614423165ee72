"""Access tokens that the relay issues itself."""

from __future__ import annotations

from relay.security.tokens import mint


class Issuer:
    """Signs access tokens of ``lifetime`` seconds with one HS256 secret. Without I/O."""

    def __init__(self, secret: str, *, audience: str, lifetime: int) -> None:
        self._secret = secret
        self._audience = audience
        self.lifetime = lifetime

    def issue(self, user: str, device: str, session: str) -> str:
        """An access token of a device that is good as long as ``session`` is that device's, at most ``lifetime`` seconds."""
        return mint(
            self._secret, user, device, audience=self._audience, lifetime=self.lifetime, session=session
        )
