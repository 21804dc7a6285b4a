"""The stand-in under its own name in its own tests."""

import pytest


@pytest.fixture
def poptorch(poptorch_standin):
    return poptorch_standin
