"""One model for the tests of serving, and a package of skills for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.served_place import ServedPlace, pack_shapes, served_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPlace]:
    yield from served_place(tmp_path_factory)


@pytest.fixture(scope="module")
def shelf(place: ServedPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package ``shapes``, and with the model ``grown`` that it was made from."""
    return pack_shapes(place, tmp_path_factory.mktemp("shelf")).parent
