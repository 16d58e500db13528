"""The memory of a growth follows from the configuration of the model that grows."""

from dataclasses import replace
from pathlib import Path

import torch

from pipelines.grow import request_growth
from pipelines.training.growth.runs import list_growth_runs
from skillnet.model import SkillNet
from skillnet_planning.memory_check import find_memory_problem
from skillnet_planning.memory_plan import RunPlanner
from skillnet_platform.cluster.gpu_types import GpuType
from tests.helpers.sixth_corpus import grow_config, write_labelled_clips
from tests.helpers.small_corpora import small_config, write_corpora

LARGE = GpuType("large", 1000, 1000, 100, 10)
#: 1.6 GB, of which 20 MB are usable.
SMALL = GpuType("small", 1.6, 1000, 100, 10)


def test_a_growth_and_its_references_are_planned_without_weights(tmp_path: Path) -> None:
    data = write_corpora(tmp_path / "data", rows=8, test_rows=4)
    write_labelled_clips(data)
    torch.manual_seed(0)
    SkillNet(small_config(data).model).save_pretrained(tmp_path / "model")
    config = grow_config(str(tmp_path / "model"), data)
    config = replace(config, references=["without_skill", "fresh", "everything"])
    config.training.use_gpu = True
    runs = list_growth_runs(config)
    assert [run.label for run in runs] == ["growth", "reference fresh", "reference everything"]
    adam = [RunPlanner(run.config, LARGE, 1).memory().optimizer for run in runs]
    # The growth trains the new files only.
    assert adam[0] < adam[1] <= adam[2]
    planned = request_growth(config).list_runs
    assert planned is not None
    assert find_memory_problem(planned(), LARGE) is None
    config.task.training.batch_size = 4096
    found = find_memory_problem(planned(), SMALL)
    assert found[0].startswith("growth: ")
    assert "--training.micro_batch_size" in found[1]
