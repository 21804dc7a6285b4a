"""A schedule against values reckoned by hand."""

import pytest

from utils.optimization import cosine


def test_cosine_begins_and_ends_where_it_should():
    assert [cosine(step, 100, 4) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert cosine(52, 100, 4) == pytest.approx(0.5)
    assert cosine(28, 100, 4) == pytest.approx(0.8535534)
    assert 0 < cosine(99, 100, 4) < 3e-4 and cosine(100, 100, 4) == pytest.approx(0, abs=1e-15)
    assert cosine(0, 100, 0) == 1
    assert [cosine(step, 3, 5) for step in range(3)] == pytest.approx([1 / 6, 2 / 6, 3 / 6])  # all warm-up
    factors = [cosine(step, 100, 4) for step in range(4, 100)]
    assert factors == sorted(factors, reverse=True)
