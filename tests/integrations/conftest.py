"""Fixtures shared with the tests of weights."""

from weights.conftest import release  # noqa: F401
