"""The server against its own description, by schemathesis: bounded."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from servers import Served

ACCEPTED = checks.positive_data_acceptance
ROUTES = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/models", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/metrics", "GET"),
]


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [(*route, GenerationMode.POSITIVE) for route in ROUTES]
    + [(*route, GenerationMode.NEGATIVE) for route in ROUTES if route[1] == "POST"],
)
def test_it_does_what_it_says(server: Served, path: str, method: str, mode: Any) -> None:
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operation = schema[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        # A schema cannot say what fits the context, or is a schema itself.
        case.call_and_validate(excluded_checks=[ACCEPTED])

    check()


def test_the_description_has_all_routes(server: Served) -> None:
    described = server.get("/openapi.json").json()["paths"]
    assert {(path, method.upper()) for path in described for method in described[path]} == {*ROUTES}
