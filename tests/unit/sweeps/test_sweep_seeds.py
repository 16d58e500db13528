"""Seeds can be added to a sweep with independent trials only."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from sweeps.config.space import SearchDimension
from sweeps.config.sweep import SweepConfig
from sweeps.sweep import CONFIG, _build_source, _store_config
from tests.helpers.small_corpora import small_config


def sweep_of(root: Path, **settings: Any) -> SweepConfig:
    return SweepConfig(
        name="sweep",
        run_dir=str(root),
        run=small_config(root / "data"),
        space={"training.lr": SearchDimension(choice=[0.001, 0.003])},
        seeds=[0, 1],
        **settings,
    )


def kept(folder: Path) -> SweepConfig:
    return configuration.build_config(SweepConfig, configuration.load_yaml(folder / CONFIG))


@pytest.mark.parametrize("search", ["grid", "random"])
def test_added_seeds_keep_the_names_of_earlier_trials(tmp_path: Path, search: Any) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    config = sweep_of(tmp_path, search=search, samples=2)
    _store_config(config, folder)
    more = replace(config, seeds=[0, 1, 2])
    _store_config(more, folder)
    assert kept(folder).seeds == [0, 1, 2]
    before, after = (
        [trial.name for trial in _build_source(each, folder)[0]] for each in (config, more)
    )
    assert [name for name in after if name in before] == before
    assert len(after) == 6
    with pytest.raises(UserError, match=r"has seeds \[0, 1, 2\], not \[0, 1\]"):
        _store_config(config, folder)
    assert kept(folder).seeds == [0, 1, 2]


@pytest.mark.parametrize("settings", [{"search": "optuna"}, {"scheduler": "asha"}])
def test_sweeps_with_dependent_trials_keep_their_seeds(tmp_path, settings):
    folder = tmp_path / "sweep"
    folder.mkdir()
    config = sweep_of(tmp_path, **settings)
    _store_config(config, folder)
    with pytest.raises(UserError, match="has seeds"):
        _store_config(replace(config, seeds=[0, 1, 2]), folder)
