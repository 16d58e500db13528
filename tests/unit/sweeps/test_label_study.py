"""The preset of a study with few labels: systems differ in their labels and their pretraining."""

from skillnet_platform import config as configuration
from sweeps.config.study import StudyConfig
from sweeps.study.system_runs import build_base_run, build_pretraining


def test_each_system_has_its_label_fraction_and_pretraining_reads_all_rows() -> None:
    config = configuration.parse_config(
        StudyConfig, ["--config", "studies/labels"], "skillnet compare"
    )
    config.claims.check_names(config.systems, config.run.tasks)
    assert set(config.claims.stated) == {"tenth of the labels", "third of the labels"}
    found = {}
    for label in config.systems:
        run = build_base_run(config, label, 0)
        before = build_pretraining(config, label, run, {})
        assert before is None or {task.label_fraction for task in before.tasks.values()} == {1.0}
        fractions = {task.label_fraction for task in run.tasks.values()}
        found[label] = (*fractions, before is not None)
    assert found == {
        "skillnet": (1.0, False),
        "skillnet-pretrained": (1.0, True),
        "skillnet-30": (0.3, False),
        "skillnet-30-pretrained": (0.3, True),
        "skillnet-10": (0.1, False),
        "skillnet-10-pretrained": (0.1, True),
    }
