"""The OpenAPI document is true: Schemathesis makes requests of it, right and wrong, and checks answers."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.serve.running import serving

few = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]


@pytest.fixture(scope="module")
def spare(model, tmp_path_factory):
    """A server of its own: what is made up here is written into its journal."""
    with serving(model, tmp_path_factory.mktemp("spare"), "--log", "text") as running:
        yield running


def test_every_answer_is_as_documented(spare):
    document = schemathesis.openapi.from_url(f"{spare.url}/openapi.json")
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) == 14
    for operation in operations:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @few
            def checked(case):
                case.call_and_validate(checks=CHECKS, timeout=30)

            try:
                checked()
            except Unsatisfiable:  # nothing can be wrong with a request without parameters
                assert mode is schemathesis.GenerationMode.NEGATIVE


def test_limits_examples_and_failures_are_documented(server):
    document = httpx.get(f"{server.url}/openapi.json").json()
    asked = document["components"]["schemas"]["RetrieveAsked"]
    assert asked["properties"]["k"]["maximum"] == 2_000
    assert len(asked["examples"]) >= 2
    for example in asked["examples"]:
        assert server.post("/v1/retrieve", example).status_code == 200
    responses = document["paths"]["/v1/retrieve"]["post"]["responses"]
    assert {"200", "401", "422", "503", "504"} <= responses.keys()
    assert document["paths"]["/v1/retrieve"]["post"]["security"]
