"""The OpenAPI document: a fuzz of all routes against it."""

import pytest

from tests.service.running import call, loaded_for_tests, running

pytest.importorskip("fastapi", exc_type=ImportError)
schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def port(tiny_checkpoint):
    flags = ("--max-images", 2, "--queue-size", 4)
    with running(loaded_for_tests(tiny_checkpoint, batch_size=4), *flags) as port:
        yield port


def test_every_route_is_documented(port):
    assert set(call(port, "GET", "/openapi.json")[1]["paths"]) == {
        *("/health", "/api/model", "/api/generate", "/api/jobs", "/api/jobs/{id}", "/api/jobs/{id}/events")
    }


def fuzz(port, examples):
    """Call every operation with made-up values; raise what does not fit the document."""
    import hypothesis
    from schemathesis import checks

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    wanted = (
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    )
    calls, options = 0, hypothesis.settings(suppress_health_check=list(hypothesis.HealthCheck))
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(options, max_examples=examples, derandomize=True, database=None, deadline=None)
        @hypothesis.given(case=operation.as_strategy())
        def once(case):
            nonlocal calls
            calls += 1
            case.call_and_validate(checks=wanted, timeout=30)

        once()
    return calls


def test_made_up_requests_are_answered_as_documented(port):
    assert fuzz(port, 10) > 20
    assert call(port)[0] == 200
