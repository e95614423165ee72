"""Whether an answer of the HTTP side is one that ``/openapi.json`` tells of."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from handlers.http.openapi import document
from handlers.http.routes import ROUTES

_PATHS: Final[dict[str, Any]] = document(ROUTES)["paths"]


def undescribed(method: str, path: str, status: int, text: str) -> str | None:
    """What the description does not know of this answer: its status, or its error's code. None when it knows both, or when
    no endpoint was asked."""
    # What is literal goes first: /v1/contacts/online is no contact.
    for known in sorted(_PATHS, key=lambda one: one.count("{")):
        if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(known)), path.partition("?")[0]):
            operation = _PATHS[known].get(method.lower())
            if operation is not None:
                return _missing(operation["responses"].get(str(status)), status, text)
    return None


def _missing(answer: Any, status: int, text: str) -> str | None:
    if answer is None:
        return f"status {status}"
    code = json.loads(text)["error"]["code"] if status >= 400 else None
    if code is not None and code not in answer["content"]["application/json"]["examples"]:
        return f"code {code} of status {status}"
    return None
