"""``docs/settings.md``, made from ``config.settings.Settings``: one row for each variable."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from config.settings import Settings

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
_HEAD: Final = """\
# Settings

The relay reads its settings from the environment, once, when it starts. Nothing has to be set: without any it listens on
loopback with a MongoDB of its own. A value that cannot be used ends the start with one line that names its variable; a
variable that begins with `RELAY_` and is not in this table is reported, for it is probably a typing mistake.

Sizes are in bytes, times in the unit of the name. This page is made from `config/settings.py` by `scripts/settings-doc`;
do not edit it.

| variable | default | meaning |
|---|---|---|
"""


def render() -> str:
    """The page's text."""
    prefix = Settings.model_config["env_prefix"]
    rows = [
        f"| `{(prefix + name).upper()}` | {_default(field.default)} | {_cell(field.description or '')} |"
        for name, field in Settings.model_fields.items()
    ]
    return _HEAD + "\n".join(rows) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Writes the page, or compares it. 0 when the page agrees with the settings afterwards."""
    parser = argparse.ArgumentParser(prog="scripts/settings-doc", description="Writes docs/settings.md.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when the page is out of date"
    )
    text = render()
    if not parser.parse_args(arguments).check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/settings.md is out of date: run scripts/settings-doc", file=sys.stderr)
    return 1


def _default(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
