"""What the README tells a newcomer to paste."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import Node

README = Path(__file__).parents[2] / "README.md"
ADDRESS = "http://127.0.0.1:8080"


def pasted(heading: str) -> str:
    """The shell lines under a heading that ask the relay."""
    section = README.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return "".join(block for block in blocks if "curl" in block)


def answers(output: str) -> list[Any]:
    """The JSON texts that follow one another, with or without a line's end between them."""
    found, decoder = [], json.JSONDecoder()
    while output := output.strip():
        one, end = decoder.raw_decode(output)
        found.append(one)
        output = output[end:]
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_two_people_register_and_make_a_conversation_with_what_is_pasted(node: Node) -> None:
    lines = pasted("Accounts of its own")
    assert lines.count(ADDRESS) == 4
    shell = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", lines.replace(ADDRESS, node.url)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        output, complaints = await shell.communicate()
    assert (shell.returncode, complaints.decode()) == (0, "")
    ann, bob, found, conversation = answers(output.decode())
    assert (ann["user"]["username"], bob["user"]["username"]) == ("ann", "bob")
    assert [one["id"] for one in found["items"]] == [bob["user"]["id"]]
    assert conversation["type"] == "direct"
    # Members come in the order of their ids, which are random.
    assert {one["name"] for one in conversation["members"]} == {"Ann", "Bob"}
    # The form that is shown is the form that is answered.
    shown = README.read_text()
    for fields in (ann, found["items"][0], conversation):
        assert all(f'"{name}"' in shown for name in fields)
