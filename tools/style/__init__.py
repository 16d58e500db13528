"""Checks of language and names, run by ``make check`` and by the tests."""
