"""Random trees as configurations: no process starts, no number is absurd, every error has a name.

A short lane by default; ``make fuzz`` is the long one.
"""

import math
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.training.config.growth import GrowConfig
from pipelines.training.config.run import FinetuneConfig, PretrainConfig
from skillnet_platform import config
from skillnet_platform.config.schema import INSTANTIATION_KEYS
from skillnet_studies.config.study import StudyConfig
from sweeps.config.sweep import SweepConfig
from tests.helpers.limited_child import run_limited
from tests.helpers.random_damage import PLACES, VALUES, budget, named, replaced

pytestmark = pytest.mark.fuzz

TREES = {cls: config.default_values(cls) for cls in (FinetuneConfig, PretrainConfig, SweepConfig)}
TREES |= {cls: config.default_values(cls) for cls in (StudyConfig, GrowConfig)}
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen")
PAYLOAD = {"class_path": "subprocess.Popen", "init_args": {"args": "id", "shell": True}}

TARGETS = st.sampled_from(["os.system", "subprocess.Popen", "builtins.eval", "pathlib.Path"])
OBJECTS = st.builds(
    lambda names, target, arguments: dict.fromkeys(names, arguments) | {names[0]: target},
    st.lists(st.sampled_from(sorted(INSTANTIATION_KEYS)), min_size=1, unique=True),
    TARGETS,
    VALUES,
)
FREE_KEYS = {
    FinetuneConfig: ["options.x"],
    PretrainConfig: ["options.x", "options.x.y"],
    SweepConfig: ["run.options.x", "space.x.options.a.b", "space.x.grid"],
    StudyConfig: ["systems.x.options.y", "systems.x.set.y", "tuning.points"],
    GrowConfig: ["skill", "task"],
}


class ProcessStartError(BaseException):
    """A configuration started a process; no handler of ordinary exceptions catches this."""


def _forbid_processes(event: str, arguments: Any) -> None:
    if event in STARTS:
        raise ProcessStartError(f"{event} {arguments}")


def _build(cls: type, tree: dict[str, Any]) -> None:
    # The hook cannot be removed, so this function runs in a child only.
    sys.addaudithook(_forbid_processes)
    named(lambda: _require_plain(config.to_dict(config.build_config(cls, tree))))


def _require_plain(value: Any) -> None:
    """Assert that a value has JSON's types only, and only finite numbers."""
    if isinstance(value, dict):
        for below in value.values():
            _require_plain(below)
    elif isinstance(value, list):
        for each in value:
            _require_plain(each)
    else:
        assert value is None or isinstance(value, (str, bool, int, float)), type(value)
        assert not isinstance(value, float) or math.isfinite(value)


@given(st.sampled_from(list(TREES)), st.one_of(VALUES, OBJECTS), PLACES)
@example(FinetuneConfig, float("nan"), [9, 2])
@example(FinetuneConfig, PAYLOAD, [6])
@budget(12)
def test_any_value_anywhere_builds_plain_values(cls: type, value: Any, place: list[int]) -> None:
    tree = replaced(TREES[cls], place, value)
    if isinstance(tree, dict):
        run_limited(lambda: _build(cls, tree))


@given(st.sampled_from(list(FREE_KEYS)), st.integers(0, 2), st.one_of(VALUES, OBJECTS))
@example(FinetuneConfig, 0, PAYLOAD)
@example(SweepConfig, 2, [[PAYLOAD]])
@budget(12)
def test_any_value_below_a_free_key_starts_nothing(cls: type, at: int, value: Any) -> None:
    key = FREE_KEYS[cls][at % len(FREE_KEYS[cls])]
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    complete = config.merge_trees(config.default_values(cls), tree)
    run_limited(lambda: _build(cls, complete))
