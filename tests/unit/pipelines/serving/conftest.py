"""One model for the tests of serving."""

from collections.abc import Iterator

import pytest

from tests.helpers.served_place import ServedPlace, served_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPlace]:
    yield from served_place(tmp_path_factory)
