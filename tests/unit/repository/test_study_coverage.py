"""The simulation of studies: its test sets are those of the corpora, and units matter."""

import numpy as np

from benchmarks.study_coverage import StudyDesign, format_markdown, measure_design, read_tasks


def test_the_test_sets_have_the_units_of_the_built_in_corpora() -> None:
    tasks = read_tasks()
    sizes = {name: (len(task.unit_N), int(task.unit_N.max()) + 1) for name, task in tasks.items()}
    assert sizes == {
        "text_classification": (2569, 278),
        "speech_recognition": (401, 401),
        "text_to_image": (380, 346),
        "text_to_video": (1000, 983),
        "text_to_code": (532, 126),
    }


def test_effects_have_the_standard_errors_of_the_study() -> None:
    task = read_tasks()["text_classification"]
    random = np.random.default_rng(0)
    means = task.draw_rows(random, task.components.common, 400).mean(1)
    assert 100 * means.std() == np.clip(100 * means.std(), 2.4, 3.0)


def test_intervals_by_unit_cover_and_those_of_independent_rows_do_not() -> None:
    tasks = {"text_classification": read_tasks()["text_classification"]}
    found = {
        has_units: measure_design(tasks, StudyDesign((5,) * 9, has_units), 40)
        for has_units in (True, False)
    }
    assert found[True][0]["coverage"] > 85
    assert found[False][0]["coverage"] < 70
    assert found[False][0]["false_alarms"] > 2 * found[True][0]["false_alarms"]
    table = format_markdown([*found[True], *found[False]])
    assert table.count("\n") == 7
    assert "rows as independent" in table
