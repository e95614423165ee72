"""An object of which one method is a test's own."""

from __future__ import annotations

from typing import Any


class StandIn:
    """Everything is ``target``'s, but for the method ``name``."""

    def __init__(self, target: Any, name: str, method: Any) -> None:
        self._target = target
        self._name = name
        self._method = method

    def __getattr__(self, name: str) -> Any:
        return self._method if name == self._name else getattr(self._target, name)
