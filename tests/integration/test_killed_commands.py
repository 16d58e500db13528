"""``prepare`` is killed at a few of its file-system events; ``make chaos`` kills at all of them.

What a killed command leaves is complete, and the same command again leaves what an undisturbed one
leaves: see :mod:`tests.chaos.crash_scenarios`. ``make chaos`` kills the other commands too.
"""

from collections.abc import Iterator

import pytest

from tests.chaos.crash_lane import enumerate_kills
from tests.chaos.crash_points import CrashLab, crash_lab, missing_compiler
from tests.chaos.crash_scenarios import PrepareScenario

pytestmark = pytest.mark.integration
KILLS = 6
SEED = 0


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashLab]:
    if reason := missing_compiler():
        pytest.skip(reason)
    with crash_lab(tmp_path_factory.mktemp("lab")) as made:
        yield made


def test_a_prepare_killed_at_a_file_event_leaves_complete_corpora_and_resumes(
    lab: CrashLab,
) -> None:
    rows = list(enumerate_kills(lab, PrepareScenario(), SEED, KILLS))
    assert len(rows) == KILLS
    assert [row.event for row in rows if not row.exits.startswith("-9")] == [], "nothing was killed"
    damaged = {f"{row.event} {row.kind} {row.path}": row.violations for row in rows}
    assert {event: found for event, found in damaged.items() if found} == {}
