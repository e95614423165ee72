"""What people type to be read by others: names and longer texts."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import AfterValidator, Field

from handlers.http.wording import form

# No control characters, no line or paragraph separators, no signs that turn the direction of what follows around.
SIGNS: Final = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
"""What nobody may put before others' eyes, as a part of a pattern's character class."""
LINE: Final = form(rf"^[^{SIGNS}]*[^{SIGNS}\s][^{SIGNS}]*$", "one line of text that is not blank")
"""One line that is not blank, as a pattern."""
LINES: Final = form(rf"^(?:[^{SIGNS}]|\n)*$", "text without control characters")
"""Any number of lines, as a pattern."""

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=LINE), AfterValidator(str.strip)]
"""A name of a person or a device: one line, not blank."""
GroupName = Annotated[str, Field(min_length=1, max_length=128, pattern=LINE), AfterValidator(str.strip)]
"""A name of a conversation: one line, not blank."""
