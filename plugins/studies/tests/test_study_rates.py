"""The table of learning rates that the present rule chooses from kept tuning trials."""

from pathlib import Path

import pytest

from skillnet_studies.study.study import read_study_ledger
from tools.docs.study_rates import build_rates_table, choose_rates_again, main

FINAL = Path(__file__).parents[3] / "lab/results/final"


def test_rates_lie_beside_the_best_trials_of_the_final_study() -> None:
    table = build_rates_table(FINAL)
    tried = [float(column) for column in table.columns[4:]]
    assert tried == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    lines = {(row[0].text, row[1].text): [cell.text for cell in row[2:]] for row in table.rows}
    assert len(lines) == 23
    # The study's rate of this task was half of the best one.
    before, again, *scores = lines["skillnet-alone", "speech recognition"]
    assert (float(before), float(again)) == (1.07e-3, 1.72e-3)
    assert scores == ["33.2", "42.7", "51.6", "67.7", "27.2"]
    for _, again, *scores in lines.values():
        means = {rate: float(score) for rate, score in zip(tried, scores, strict=True) if score}
        best = max(means, key=lambda rate: means[rate])
        # The top of a parabola lies within its three rates.
        assert best / 2 <= float(again) <= best * 2


def test_settings_of_the_space_stay_those_of_the_study() -> None:
    before, _ = read_study_ledger(FINAL)
    for label, own in choose_rates_again(FINAL).items():
        assert own.settings.keys() == before[label].settings.keys()
        kept = {key for key in own.settings if not key.endswith(".lr")}
        assert {key: own.settings[key] for key in kept} == {
            key: before[label].settings[key] for key in kept
        }


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(FINAL)]) == 0
    assert "moe-pretrained" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere")])
    assert "nowhere" in capsys.readouterr().err
