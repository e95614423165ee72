"""Every endpoint against made-up requests, right and wrong, as ``/openapi.json`` describes them: no 5xx, and every answer is as
described. The same requests in every run."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi import checks

from handlers.http.openapi import document
from handlers.http.routes import ROUTES
from tests.support.node import Node, NodeFactory

EXAMPLES: Final = 5
DOCUMENT: Final = document(ROUTES)
CHECKS: Final = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


async def known(node: Node, user: str, path: str) -> dict[str, str]:
    """Parameters of this path that name something of this user's."""
    if "{" not in path:
        return {}
    if path.startswith("/v1/conversations/"):
        found = {"id": await node.group(user, ["bob"])}
        return found | ({"user": "bob"} if "{user}" in path else {})
    if path.startswith("/v1/contacts/"):
        await node.request("POST", "/v1/contacts", user, "phone", {"user": "bob"})
        return {"user": "bob"}
    return {"device": "phone"} if "{device}" in path else {"id": "bob"}


def fuzz(operation: Any, base: str, headers: dict[str, str], fixed: dict[str, str]) -> list[str]:
    """Asks for one operation, rightly and wrongly; what was not answered as described."""
    found = ask(
        operation, base, headers, GenerationMode.POSITIVE, {"path_parameters": fixed} if fixed else {}
    )
    if takes_anything(operation):
        found += ask(operation, base, headers, GenerationMode.NEGATIVE, {})
    return found


def ask(
    operation: Any, base: str, headers: dict[str, str], mode: GenerationMode, fixed: dict[str, Any]
) -> list[str]:
    found: list[str] = []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode, **fixed))
    def one(case: Any) -> None:
        answer = case.call(base_url=base, headers=headers, timeout=10)
        try:
            case.validate_response(answer, checks=CHECKS, headers=headers)
        except FailureGroup as failures:
            what = "; ".join(f"{failure.title}: {failure.message}" for failure in failures.exceptions)
            found.append(
                f"{operation.label} {mode.value} {answer.status_code} {case.body!r:.200}: {what[:400]}"
            )

    one()
    return found


def takes_anything(operation: Any) -> bool:
    described = DOCUMENT["paths"][operation.path][operation.method.lower()]
    return "parameters" in described or "requestBody" in described


# The relay runs beside, and may use ``random``.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@pytest.mark.timeout(180)
async def test_made_up_requests_never_fail_the_relay_and_are_answered_as_described(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start()
    await node.request("GET", "/v1/sync", "bob", "phone")
    config = SchemathesisConfig()
    schema = schemathesis.openapi.from_dict(DOCUMENT, config=config)
    problems: list[str] = []
    asked = 0
    for number, result in enumerate(schema.get_all_operations()):
        assert isinstance(result, Ok)
        operation = result.ok()
        user = f"fuzz{number}"
        await node.request("GET", "/v1/sync", user, "phone")
        fixed = await known(node, user, operation.path)
        problems += await asyncio.to_thread(fuzz, operation, node.url, node.headers(user, "phone"), fixed)
        asked += 1
    assert "\n".join(problems) == ""
    assert asked == sum(not route.hidden for route in ROUTES)
    async with node.http.get(node.url + "/readyz") as answer:
        assert answer.status == 200
