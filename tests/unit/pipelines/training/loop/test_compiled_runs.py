"""A run compiles its layers before its first step, and no batch or validation needs more."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from pipelines.training.loop import loop
from pipelines.training.loop.compilation import compile_layers
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.worker import FinalEvaluation, run_worker
from pipelines.training.runs.layout import TRAINED
from skillnet.baselines.moe import MoE, MoEOptions
from skillnet.precision import ComputePrecision
from skillnet_platform.storage import read_json
from tests.helpers import small_models
from tests.helpers.small_corpora import small_config, write_corpora

SLOW = pytest.mark.slow("test_compiled_runs.py::test_no_step_and_no_validation_compiles")


class GraphCounter:
    """Callback that notes the number of graphs before the first step."""

    first: int

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        pass

    def on_step_start(self, step: int) -> None:
        from torch._dynamo.utils import counters

        if not step:
            self.first = counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="whole"),
        pytest.param({"micro_batch_size": 3, "kept_tokens": 20}, id="in parts", marks=SLOW),
        pytest.param(
            {"trainable": ["skill-general", "skill-alignment", "head-text_classification"]},
            id="frozen stems",
            marks=SLOW,
        ),
    ],
)
def test_no_step_and_no_validation_compiles(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The processes of other tests start seconds earlier without the compiler.
    from torch._dynamo.utils import counters

    data = write_corpora(tmp_path / "data", rows=30, test_rows=6)
    run = small_config(data, steps=8, evaluate_every=4, **options)
    tasks = ("text_classification", "text_to_image")
    run.tasks = {task: replace(run.tasks[task], batch_size=9) for task in tasks}
    own = {task: run.model.tasks[task] for task in tasks}
    run.model = replace(run.model, tasks=own, drop_path=0.3)
    expected = loop.train_model(ResolvedRun(run))
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(loop, "compile_layers", partial(compile_layers, backend="eager"))
    run.training.compile = True
    counter, folder = GraphCounter(), tmp_path / "run"
    folder.mkdir()
    with torch._dynamo.config.patch(error_on_recompile=True):
        run_worker(
            ResolvedRun(run, folder),
            final=FinalEvaluation(splits=("validation",), brief=True),
            callbacks=[counter],
        )
    assert counters["stats"]["unique_graphs"] == counter.first > 0
    assert not counters["graph_break"]
    losses = read_json(folder / TRAINED)["losses"]
    assert losses == pytest.approx(expected.losses, rel=1e-9)


def test_experts_run_without_compilation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MoE(small_models.small_config(num_layers=1), MoEOptions(experts=3))
    config = small_config(tmp_path)
    compile_layers(config, model, model, ComputePrecision("fp64", torch.device("cpu")))
    assert model.encoder.compiler is None
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "training.compile: the system moe runs without compilation" in line
