"""Fixtures of the tests of serving."""

from tests.helpers.served_place import place, shelf  # noqa: F401
