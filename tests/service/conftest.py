"""Fixtures that the tests of the service share."""

import pytest

from tests.service.running import loaded_for_tests


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return loaded_for_tests(tiny_checkpoint, batch_size=4)
