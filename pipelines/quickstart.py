"""``skillnet quickstart``: all stages once, from downloads to a registered model and a table."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pipelines.training.config.resources import request_training
from pipelines.training.config.run import ESSENTIAL_TRAINING_OPTIONS, FinetuneConfig
from skillnet_files.entry_points import find_entries
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.storage import archive_root, data_root
from skillnet_platform.storage.location import require_local_folder

PRESET = "quickstart"


@dataclass
class QuickstartConfig(FinetuneConfig):
    """Configuration of the quickstart: all keys of ``skillnet finetune``, and three more.

    Args:
        name: name of the run; null takes quickstart and the time.
        run_dir: directory of runs; null takes the run root.
        seed: seed of weights, order, augmentation and dropout.
        data: directory of prepared corpora; null takes ``corpora`` in the run root.
        init_from: checkpoint or saved model to start from; null starts from random weights.
        system: system to train: skillnet, a baseline, or a third party's system.
        options: options of that system.
        model: shape of the model.
        tasks: task name -> its corpus, weight and batch size.
        training: optimizer, workers and intervals.
        tracking: MLflow server and experiment.
        evaluate: evaluate the final model on the test splits; needed for the table.
        archives: directory of the downloads; null takes ``archives`` in the run root.
        skip: stages to skip, because they were done before.
    """

    archives: str | None = None
    skip: list[Literal["fetch", "prepare", "simple_baselines"]] = field(default_factory=list)


@dataclass
class StageTimer:
    """Counter and timer of the stages, which prints a line before and after each.

    Args:
        total: number of stages.
        seconds: stage -> duration.
        begin: start of the first stage, on the monotonic clock.
    """

    total: int
    seconds: dict[str, float] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def stage(self, name: str, description: str) -> Iterator[None]:
        """Time one stage, and print a line before and after it."""
        number = len(self.seconds) + 1
        console.print_note(f"[{number}/{self.total}] {description}")
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        total = time.monotonic() - self.begin
        console.print_note(
            f"[{number}/{self.total}] {name}: {console.format_minutes(self.seconds[name])}, "
            f"{console.format_minutes(total)} since the start"
        )


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Fetch, prepare, train, evaluate and register; return one document about all stages.

    Args:
        config: settings of the training run and the stages.

    Raises:
        UserError: a stage failed. Finished stages are reused by the next call.
    """
    from pipelines.training.loop.setup import require_devices

    # Before the downloads, which take minutes.
    require_devices(config.training)
    _warn_without_bf16(config)
    data = require_local_folder(config.data, data_root(), "data of quickstart")
    archives = require_local_folder(config.archives, archive_root(), "archives")
    names = sorted({task.corpus for task in config.tasks.values()})
    stages = StageTimer(5 - len(set(config.skip)))
    # Each stage is imported when it starts, so that the first line appears at once.
    if "fetch" not in config.skip:
        with stages.stage("fetch", f"fetching {', '.join(names)}"):
            for entry in find_entries("skillnet.fetchers").values():
                entry.load()(names, archives)
    if "prepare" not in config.skip:
        with stages.stage("prepare", "preparing Arrow shards with Ray Data"):
            from pipelines.data.preprocessing.prepare import prepare

            prepare(names, data, archives)
    baselines: list[dict[str, Any]] = []
    if "simple_baselines" not in config.skip:
        with stages.stage(
            "simple_baselines", "chance and simple baselines (TF-IDF, nearest neighbour)"
        ):
            baselines = _evaluate_baselines(config, data)
    training = _build_training_config(config, data)
    tasks = ", ".join(config.tasks)
    with stages.stage("train", f"training one model on {tasks}, then evaluating every test row"):
        from pipelines.finetune import finetune

        result = finetune(training)
    rows = result["evaluation"]
    with stages.stage("register", "registering the model"):
        from pipelines.serving.registration import register_model
        from pipelines.training.runs import model_source

        uri = config.tracking.uri
        source = model_source.resolve_model(result["run"], uri)
        registered = register_model(source, data, rows=rows, baseline_rows=baselines, uri=uri)
        if baselines:
            _record_baselines(config, result, baselines)
    return {
        "name": result["name"],
        "run": result["run"],
        "run_id": result["run_id"],
        "model": registered.uri,
        "alias": registered.alias,
        "promotion_reasons": list(registered.verdict.reasons),
        "steps": result["step"],
        "total_params": result["total_params"],
        "stages": {name: round(seconds, 1) for name, seconds in stages.seconds.items()},
        "seconds": round(time.monotonic() - stages.begin, 1),
        "evaluation": rows,
        "simple_baselines": baselines,
    }


def _build_training_config(config: QuickstartConfig, data: Path) -> FinetuneConfig:
    """The part of the configuration for training, which then registers no model itself."""
    values = {f.name: getattr(config, f.name) for f in fields(FinetuneConfig)}
    values["name"] = config.name or time.strftime("quickstart-%Y%m%d-%H%M%S")
    values["data"] = str(data)
    values["evaluate"] = True
    values["tracking"] = replace(config.tracking, register=False)
    return FinetuneConfig(**values)


def _evaluate_baselines(config: QuickstartConfig, data: Path) -> list[dict[str, Any]]:
    from pipelines.training.evaluation.simple_baselines import evaluate_simple_baselines
    from skillnet.skills import find_task

    tasks = {name: find_task(name, config.model.tasks) for name in config.measured}
    corpora = {name: task.corpus for name, task in config.measured.items()}
    with console.show_progress("simple baselines", len(tasks), "tasks") as bar:
        return evaluate_simple_baselines(
            data, tasks, corpora=corpora, on_task=lambda name: bar.advance(1, name)
        )


def _record_baselines(
    config: QuickstartConfig, result: dict[str, Any], baselines: list[dict[str, Any]]
) -> None:
    """Log the simple baselines to the run."""
    from pipelines.training.evaluation.tables import (
        run_description,
        run_facts,
        write_evaluation_csv,
    )
    from skillnet import systems
    from skillnet_platform.tracking import Tracker, backend

    shape, total = systems.load_model(result["model"]).config, result["total_params"]
    tracker = Tracker(result["run_id"], backend.resolve_uri(config.tracking.uri))
    facts = run_facts(result)
    tracker.note(run_description(result["evaluation"], baselines, shape, total, facts))
    path = Path(result["run"]) / "simple_baselines.csv"
    write_evaluation_csv(baselines, path)
    tracker.artifact(path, "evaluation")
    tracker.flush()


def _warn_without_bf16(config: QuickstartConfig) -> None:
    import torch

    from skillnet.precision import native_bf16

    # Each GPU worker chooses its precision itself: the driver may have no GPU.
    on_cpu = not config.training.use_gpu and config.training.precision == "auto"
    if on_cpu and not native_bf16(torch.device("cpu")):
        console.print_warning(
            "this machine does not multiply bf16 natively; it computes in fp32, which takes about "
            "twice as long"
        )


def show_quickstart(done: dict[str, Any], config: QuickstartConfig) -> None:
    """Print the final table and the next commands."""
    from pipelines.training.evaluation.tables import summary_cells

    columns, cells = summary_cells(
        done["evaluation"],
        done["simple_baselines"],
        config.model.tasks,
        done["total_params"],
    )
    millions = done["total_params"] / 1e6
    console.print_table(
        f"One model of {millions:.1f} M parameters, {done['steps']} steps, on held-out data",
        columns,
        cells,
        caption="active: fraction of the parameters that the task uses",
    )
    name = f"{done['model'].rpartition('/')[0]}@{done['alias']}"
    console.print_note(
        f"The model is {name} ({done['model']}); all stages took "
        f"{console.format_minutes(done['seconds'])}. Next commands:\n"
        f'  skillnet search "红色的心" --model {name} --open\n'
        f'  skillnet search "横、竖、撇、捺" --task text_to_video --model {name}\n'
        f'  skillnet predict --text "宋代陶瓷工艺史" --model {name}\n'
        f"  skillnet evaluate --model {name}\n"
        f"  skillnet verify {name}\n"
        "  skillnet tracker"
    )


@command(
    QuickstartConfig,
    description="Fetch and prepare five corpora, train one sparse model on all of them, "
    "evaluate it on held-out data, register it, and compare it with chance and simple baselines. "
    f"Takes 9 to 16 minutes on two cores with bf16. Options change the preset '{PRESET}'.",
    example="skillnet quickstart\nskillnet quickstart --training.steps 20 --json",
    show=lambda result: show_quickstart(*result),
    to_json=lambda result: result[0],
    rewrite_arguments=lambda argv: ["--config", PRESET, *argv],
    resources=request_training,
    essential=(
        "name",
        "run_dir",
        "data",
        "archives",
        "skip",
        "tracking.registered_model",
        "seed",
        "model.dim",
        "model.num_layers",
        *ESSENTIAL_TRAINING_OPTIONS,
    ),
)
def main(config: QuickstartConfig) -> tuple[dict[str, Any], QuickstartConfig]:
    """Run ``skillnet quickstart``."""
    return quickstart(config), config


if __name__ == "__main__":
    raise SystemExit(main())
