"""``skillnet quickstart``: everything once, from downloads to a registered model and a table."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pipelines.config.resources import request_training
from pipelines.config.run import FinetuneConfig
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.storage import archive_root, data_root
from skillnet_platform.storage.location import local_folder

PRESET = "quickstart"


@dataclass
class QuickstartConfig(FinetuneConfig):
    """Everything once. Takes all keys of ``skillnet finetune``, and:

    Args:
        name: name of the run; by default quickstart and the time.
        run_dir: directory of runs; by default the run root.
        seed: of weights, order, augmentation and dropout.
        data: directory of prepared corpora; by default corpora below the run root.
        init_from: checkpoint or saved model to start from; none starts at random.
        system: what to train: skillnet, a baseline, or a third party's system.
        options: options of that system.
        model: shape of the model.
        tasks: task name -> how it takes part.
        training: optimisation, parallelism, rhythm.
        tracking: where it is recorded.
        evaluate: evaluate the final model on the test splits; needed for the table.
        archives: directory of the downloads; by default archives below the run root.
        skip: stages to leave out, if they were done before.
        registered: name of the registered model.
    """

    archives: str | None = None
    skip: list[Literal["fetch", "prepare", "evaluate_simple_baselines"]] = field(
        default_factory=list
    )
    registered: str = "skillnet"


@dataclass
class Stages:
    """Counts and times the stages, and says where it is.

    Args:
        total: number of stages.
        seconds: stage -> what it took.
    """

    total: int
    seconds: dict[str, float] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def stage(self, name: str, words: str) -> Iterator[None]:
        """One stage: a line before it and one after."""
        number = len(self.seconds) + 1
        console.note(f"[{number}/{self.total}] {words}")
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        so_far = time.monotonic() - self.begin
        console.note(
            f"[{number}/{self.total}] {name}: {clock(self.seconds[name])}, "
            f"{clock(so_far)} since the start"
        )


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Fetch, prepare, train, evaluate, register; one document that tells how it went.

    Raises:
        UserError: whatever the stages raise; what was done before stays and is taken up again.
    """
    _warn_of_slow_arithmetic(config)
    data = local_folder(config.data, data_root(), "data of quickstart")
    archives = local_folder(config.archives, archive_root(), "archives")
    names = sorted({task.corpus for task in config.tasks.values()})
    stages = Stages(5 - len(set(config.skip)))
    # Each stage is imported when it starts: the first line appears at once.
    if "fetch" not in config.skip:
        with stages.stage("fetch", f"fetching {', '.join(names)} (about 100 MB the first time)"):
            from pipelines.fetch import fetch

            fetch(names, archives)
    if "prepare" not in config.skip:
        with stages.stage("prepare", "preparing Arrow shards with Ray Data"):
            from pipelines.preprocessing.prepare import prepare

            prepare(names, data, archives)
    others: list[dict[str, Any]] = []
    if "references" not in config.skip:
        with stages.stage("references", "chance and simple references (TF-IDF, nearest neighbour)"):
            others = _references(config, data)
    training = _training(config, data)
    tasks = ", ".join(config.tasks)
    with stages.stage("train", f"training one model on {tasks}, then every test row once"):
        from pipelines.finetune import finetune

        result = finetune(training)
    rows = result["evaluation"]
    with stages.stage("register", f"registering the model as {config.registered}"):
        made = _register(config, data, result, rows, others)
        total = _tell(config, result, rows, others)
    return {
        "name": result["name"],
        "run": result["run"],
        "run_id": result["run_id"],
        "model": made.uri,
        "alias": made.alias,
        "gate": list(made.verdict.reasons),
        "steps": result["step"],
        "total_params": total,
        "stages": {name: round(seconds, 1) for name, seconds in stages.seconds.items()},
        "seconds": round(time.monotonic() - stages.begin, 1),
        "evaluation": rows,
        "references": others,
    }


def clock(seconds: float) -> str:
    """``75 -> "1 min 15 s"``."""
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{seconds:.1f} s"


def _training(config: QuickstartConfig, data: Path) -> FinetuneConfig:
    """The part of the configuration that training reads; it registers nothing by itself."""
    own = {f.name: getattr(config, f.name) for f in fields(FinetuneConfig)}
    own["name"] = config.name or time.strftime("quickstart-%Y%m%d-%H%M%S")
    own["data"] = str(data)
    own["evaluate"] = True
    own["tracking"] = replace(config.tracking, register=False)
    return FinetuneConfig(**own)


def _references(config: QuickstartConfig, data: Path) -> list[dict[str, Any]]:
    from pipelines.evaluation.simple_baselines import evaluate_simple_baselines
    from skillnet.skills import find_task

    tasks = {name: find_task(name, config.model.tasks) for name in config.measured}
    corpora = {name: task.corpus for name, task in config.measured.items()}
    with console.progress("simple references", len(tasks), "tasks") as bar:
        return evaluate_simple_baselines(
            data, tasks, corpora=corpora, on_task=lambda name: bar.advance(1, name)
        )


def _register(
    config: QuickstartConfig,
    data: Path,
    result: dict[str, Any],
    rows: list[dict[str, Any]],
    others: list[dict[str, Any]],
) -> Any:
    from pipelines.runs import model_source
    from pipelines.serving.registration import register_model

    uri = config.tracking.uri
    source = model_source.resolve_model(result["run"], uri)
    return register_model(source, data, rows=rows, others=others, name=config.registered, uri=uri)


def _tell(
    config: QuickstartConfig,
    result: dict[str, Any],
    rows: list[dict[str, Any]],
    others: list[dict[str, Any]],
) -> int:
    """Put the references into the run's record; the number of parameters of the model."""
    from pipelines.evaluation.tables import run_description, run_facts, write_evaluation_csv
    from skillnet import systems
    from skillnet_platform.tracking import Tracker, backend

    model = systems.load_model(result["model"])
    total = sum(p.numel() for p in model.parameters())
    if others:
        tracker = Tracker.by_id(result["run_id"], backend.resolve_uri(config.tracking.uri))
        tracker.note(run_description(rows, others, model.config, total, run_facts(result)))
        path = Path(result["run"]) / "evaluate_simple_baselines.csv"
        write_evaluation_csv(others, path)
        tracker.artifact(path, "evaluation")
        tracker.flush()
    return total


def _warn_of_slow_arithmetic(config: QuickstartConfig) -> None:
    import torch

    from skillnet.precision import native_bf16

    device = torch.device("cuda" if config.training.use_gpu else "cpu")
    if config.training.precision == "auto" and not native_bf16(device):
        console.warn(
            "this machine does not multiply bf16 natively: it computes in fp32, which takes about "
            "twice as long for the same steps"
        )


def show_quickstart(done: dict[str, Any], config: QuickstartConfig) -> None:
    """The table at the end, and what to type next."""
    from pipelines.evaluation.tables import summary_cells

    columns, cells = summary_cells(
        done["evaluation"],
        done["evaluate_simple_baselines"],
        config.model.tasks,
        done["total_params"],
    )
    millions = done["total_params"] / 1e6
    console.table(
        f"One model of {millions:.1f} M parameters, {done['steps']} steps, on held-out data",
        columns,
        cells,
        caption="active: share of the parameters that the task reads",
    )
    name = f"models:/{config.registered}@{done['alias']}"
    console.note(
        f"It is {name} ({done['model']}); all of it took {clock(done['seconds'])}. Now try:\n"
        f'  skillnet search "红色的心" --model {name} --open\n'
        f'  skillnet search "横、竖、撇、捺" --task text_to_video --model {name}\n'
        f'  skillnet predict --text "宋代陶瓷工艺史" --model {name}\n'
        f"  skillnet evaluate --model {name}\n"
        f"  skillnet verify {name}\n"
        "  skillnet ui"
    )


@command(
    QuickstartConfig,
    description="Fetch and prepare five corpora, train one sparse model on all of them, "
    "evaluate it on held-out data, register it, and show what it reached beside chance and "
    "simple references. Takes about 12 minutes on two cores; starts from the preset "
    f"'{PRESET}'.",
    example="skillnet quickstart\nskillnet quickstart --training.steps 20 --json",
    show=lambda result: show_quickstart(*result),
    to_json=lambda result: result[0],
    rewrite_arguments=lambda argv: ["--config", PRESET, *argv],
    resources=request_training,
)
def main(config: QuickstartConfig) -> tuple[dict[str, Any], QuickstartConfig]:
    """Run ``skillnet quickstart``."""
    return quickstart(config), config


if __name__ == "__main__":
    raise SystemExit(main())
