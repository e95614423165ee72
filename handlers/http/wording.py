"""What is wrong with a request, in words for people."""

from __future__ import annotations

from typing import Final

from pydantic_core import ErrorDetails

_FORMS: Final[dict[str, str]] = {}
_BY_TYPE: Final = {
    "missing": "is missing",
    "extra_forbidden": "is not a field of this request",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "list_type": "must be a list",
    "model_type": "must be a JSON object",
}
_OPENINGS: Final = {
    "Input should be": "must be",
    "String should": "must",
    "List should": "must",
    "Value error,": "",
}


def form(pattern: str, words: str) -> str:
    """The pattern, for a field; who breaks it is told that the value must be ``words``. One pattern has the same words
    everywhere: a refusal knows the pattern only."""
    if _FORMS.setdefault(pattern, words) != words:
        raise ValueError(f"{pattern} has other words already: {_FORMS[pattern]}")
    return pattern


def said(error: ErrorDetails) -> str:
    """What a value must be, or be like, to go on after its name."""
    kind = error["type"]
    if kind == "string_pattern_mismatch":
        return f"must be {_FORMS.get(error['ctx']['pattern'], 'of another form')}"
    if kind in _BY_TYPE:
        return _BY_TYPE[kind]
    text = error["msg"].removesuffix(".")
    for opening, words in _OPENINGS.items():
        if text.startswith(opening):
            text = words + text.removeprefix(opening)
    return text.partition(" after validation")[0].strip()
