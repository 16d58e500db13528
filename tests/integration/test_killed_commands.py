"""Commands are killed at a few of their file-system events; ``make chaos`` kills at all of them.

What a killed command leaves is complete, and the same command again leaves what an undisturbed one
leaves: see :mod:`tests.chaos.crash_scenarios`.
"""

from collections.abc import Iterator

import pytest

from tests.chaos.crash_lane import enumerate_kills
from tests.chaos.crash_points import CrashLab, crash_lab, missing_compiler
from tests.chaos.crash_scenarios import SCENARIOS, CrashScenario

pytestmark = [pytest.mark.integration, pytest.mark.long]
#: Kills of each command. A kill of ``prepare`` takes a second; the others train a model.
KILLS = {"prepare": 6, "finetune": 1, "register": 1, "sweep": 1}
SEED = 0
#: Kills of the other commands have cheaper tests.
LANES = {
    "prepare": (),
    "finetune": pytest.mark.slow("test_faults.py::test_a_worker_and_then_the_driver_killed"),
    "register": pytest.mark.slow(
        "test_registration.py::test_a_registration_killed_after_any_write_is_completed_once"
    ),
    "sweep": pytest.mark.slow("test_sweeps.py::test_asha_a_failure_and_a_resumed_sweep"),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashLab]:
    if reason := missing_compiler():
        pytest.skip(reason)
    with crash_lab(tmp_path_factory.mktemp("lab")) as made:
        yield made


@pytest.mark.parametrize(
    "scenario", [pytest.param(each, marks=LANES[each.name], id=each.name) for each in SCENARIOS]
)
def test_a_command_killed_at_a_file_event_leaves_complete_files_and_resumes(
    lab: CrashLab, scenario: type[CrashScenario]
) -> None:
    rows = list(enumerate_kills(lab, scenario(), SEED, KILLS[scenario.name]))
    assert len(rows) == KILLS[scenario.name]
    assert [row.event for row in rows if not row.exits.startswith("-9")] == [], "nothing was killed"
    damaged = {f"{row.event} {row.kind} {row.path}": row.violations for row in rows}
    assert {event: found for event, found in damaged.items() if found} == {}
