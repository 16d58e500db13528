"""``skillnet finetune``: train the tasks jointly, from a checked configuration to a model on disk.

<run root>/<name>/
  config.yaml      the resolved configuration
  run.json         the MLflow run
  checkpoints/     the newest ones; a run that stopped goes on from there
  progress.jsonl   every logged metric
  model/           the final model
  trained.json     steps, time, throughput
  evaluation.csv   figures on the test sets, and outcomes.parquet, what became of each test row
  result.json      what the command gives; written last
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.progress import PROGRESS, followed
from pipelines.training.settings import FinetuneConfig
from skillnet_platform import config as configuration
from skillnet_platform import console, tracking
from skillnet_platform.cli import command
from skillnet_platform.errors import Terminated, UserError
from skillnet_platform.storage import (
    atomic_write,
    data_root,
    read_json,
    read_record,
    run_root,
    write_json,
)
from skillnet_platform.storage.location import place

if TYPE_CHECKING:
    from pipelines.training.start import Start
    from pipelines.training.worker import Nested, OnEvaluation
    from skillnet_platform.tracking import Tracker

CONFIG = "config.yaml"
RUN = "run.json"
RESULT = "result.json"


@dataclass(frozen=True)
class Checked:
    """What :func:`check` found out about a run before its start.

    Args:
        manifests: of its corpora.
        start: what it takes over from the model that it starts from; none without one.
    """

    manifests: Mapping[str, Mapping[str, Any]]
    start: "Start | None"


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train the tasks of a configuration jointly, evaluate and record the model.

    The name of an unfinished run goes on with it; that of a finished one gives its result.

    Returns:
        Name, folder, steps, seconds, throughput, model and checkpoint paths, MLflow run id, and
        ``evaluation``: tidy rows.

    Raises:
        UserError: a name that another run has, corpora that are missing or do not fit, …
    """
    return carry_out(config, "finetune")


def carry_out(
    config: FinetuneConfig, stage: str, splits: Sequence[str] | None = None
) -> dict[str, Any]:
    """A run from its folder to its registration; see :func:`finetune`.

    Args:
        config: of the run.
        stage: what it is, for its tags and for a fresh name.
        splits: on which the final model is evaluated; none takes the test splits. Without
            ``config.evaluate`` there is no evaluation.
    """
    from pipelines.conclusion import check_splits, register
    from pipelines.mirror import mirror_of
    from pipelines.uploads import deliver

    config = resolved(config, stage)
    assert config.name is not None
    run = Path(str(config.run_dir)) / config.name
    mirror = mirror_of(config, run)
    if mirror is not None:
        mirror.take_up(config)
    known = (run / CONFIG).is_file()
    finished = finished_run(config, run)
    if finished is not None:
        if mirror is not None and not mirror.is_finished():
            deliver(mirror, config.training.keep, config.storage.patience)
        console.note(f"{config.name} is finished ({finished['step']} steps); give another name")
        return finished
    checked = check(config)
    if config.evaluate:
        check_splits(config, checked.manifests, splits)
    make_folder(config, run)
    if mirror is not None:
        mirror.begin(known)
    before = tracking.recorded(run / RUN)
    with tracking.start(
        config.name,
        config,
        config.tracking,
        tags={"run_dir": str(run), "stage": stage},
        run_id=before,
    ) as tracker:
        write_json(run / RUN, {"run_id": tracker.run_id, "uri": tracker.uri})
        with followed(run / PROGRESS, config.training.steps):
            chosen = splits if config.evaluate else None
            result = execute(config, run, tracker, checked, splits=chosen)
    result["registered"] = register(config, run, result["evaluation"])
    result["mirror"] = mirror.uri if mirror is not None else None
    write_json(run / RESULT, result)
    if mirror is not None:
        deliver(mirror, config.training.keep, config.storage.patience)
    return result


def execute(
    config: FinetuneConfig,
    run: Path,
    tracker: "Tracker",
    checked: Checked,
    *,
    splits: Sequence[str] | None = None,
    on_evaluation: "OnEvaluation | None" = None,
    nested: "Nested | None" = None,
    brief: bool = False,
) -> dict[str, Any]:
    """Train and evaluate in a run that is open: on disk, and in MLflow, whose end is not ours.

    Args:
        config: with a name and absolute paths (:func:`resolved`), checked (:func:`check`).
        run: its folder (:func:`open_run`).
        tracker: of its MLflow run.
        checked: its corpora and what it starts from, from :func:`check`.
        splits: on which the final model is evaluated; none takes the test splits if
            ``config.evaluate`` is set.
        on_evaluation: called with the rows of each evaluation during training, and the step; of
            several workers all call it, and those but the first with no rows.
        nested: how several workers run inside a trial of Ray Tune.
        brief: no pictures and no intervals: for a run that is only ranked among others.

    Returns:
        The result of :func:`finetune` before registration; the caller writes it to the run.
    """
    from pipelines.conclusion import conclude

    tracker.inputs(checked.manifests)
    begin = time.monotonic()
    started = checked.start
    if started is not None:
        console.note(started.words())
        tracker.tags({"init_from": started.source, "init_from_digest": started.digest})
    _train(config, run, tracker, on_evaluation, nested)
    result = {
        "name": config.name,
        "run": str(run),
        "run_id": tracker.run_id,
        "model": str(run / "model"),
        "init_from": started.plain() if started else None,
        "corpora": {name: manifest["digest"] for name, manifest in checked.manifests.items()},
        **read_json(run / "trained.json"),
        "wall_seconds": time.monotonic() - begin,
    }
    result["evaluation"] = conclude(config, run, tracker, result, splits, brief)
    return result


def resolved(config: FinetuneConfig, stage: str = "finetune") -> FinetuneConfig:
    """With a name, the outputs that its corpora ask for, and absolute paths: workers have working
    directories of their own."""
    from pipelines.head_sizes import with_outputs

    folder, kept = place(config.run_dir, run_root()), config.storage
    if isinstance(folder, str):
        if kept.mirror not in (None, folder):
            raise UserError(f"run_dir {folder} and storage.mirror {kept.mirror}: give one of them")
        kept = replace(kept, mirror=folder)
        folder = run_root()
    data = place(config.data, data_root())
    config = with_outputs(config, data)
    name = config.name or time.strftime(f"{stage}-%Y%m%d-%H%M%S")
    if "/" in name or name in ("", ".", ".."):
        raise UserError(f"name {name!r} cannot be a folder's name; use letters, digits, - and _")
    start = None
    if config.init_from:
        from pipelines.training.start import locate

        start = locate(config.init_from, config.tracking.uri, str(folder))
    return replace(
        config, name=name, run_dir=str(folder), data=str(data), init_from=start, storage=kept
    )


def open_run(config: FinetuneConfig, run: Path) -> dict[str, Any] | None:
    """Make the run's folder, or take up an unfinished run; the result of a finished one."""
    finished = finished_run(config, run)
    make_folder(config, run)
    return finished


def make_folder(config: FinetuneConfig, run: Path) -> None:
    """Make the folder of a new run, which takes the name: only when nothing may be refused."""
    stored = run / CONFIG
    if not stored.is_file():
        with atomic_write(stored, "w") as stream:
            stream.write(configuration.to_yaml(config))


def finished_run(config: FinetuneConfig, run: Path) -> dict[str, Any] | None:
    """The result of a run that is finished; nothing is written.

    Raises:
        UserError: the folder is no run, one of another configuration, or damaged.
    """
    from pipelines.training.setup import identity_of

    stored = run / CONFIG
    if not stored.is_file():
        if run.exists() and any(run.iterdir()):
            raise UserError(f"{run} exists and is no run; give another --name")
        return None
    told = configuration.load_yaml(stored)
    try:
        before = configuration.build(FinetuneConfig, told)
    except UserError as problem:
        raise UserError(f"{stored} is damaged: {problem}") from None
    old = configuration.flatten(identity_of(before))
    new = configuration.flatten(identity_of(config))
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if differing:
        key = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"the run {config.name} has {key} {old.get(key)}, not {new.get(key)}{more}; give "
            f"another --name, or --config {stored} to go on with it"
        )
    if (run / RESULT).is_file():
        result = read_result(run / RESULT)
        if result["step"] >= config.training.steps:
            return result
    return None


def read_result(path: Path) -> dict[str, Any]:
    """The result of a run, with all that its commands show.

    Raises:
        UserError: the file is damaged.
    """
    shown: dict[str, type | tuple[type, ...]] = {
        "step": int,
        "seconds": (int, float),
        "model": str,
        "name": str,
        "evaluation": list,
    }
    remedy = "remove it, and the same command goes on from the newest checkpoint"
    return read_record(path, shown, remedy)


def check(config: FinetuneConfig) -> Checked:
    """Find what does not fit before anything starts.

    Raises:
        UserError: a corpus, a system, a device or a start that does not fit.
    """
    from pipelines.evaluation import check_outputs
    from pipelines.training.setup import open_corpora, open_stream, pick_device
    from pipelines.training.start import preview
    from skillnet.skills import find_task
    from skillnet.systems import find_system

    system = find_system(config.system)
    system.configure(config.model, system.read_options(config.options))
    corpora = open_corpora(config)
    open_stream(config)
    for name, settings in config.tasks.items():
        check_outputs(corpora[settings.corpus], name, find_task(name, config.model.tasks))
    pick_device(config.training.use_gpu)
    start = preview(config)
    words = {
        name: corpus.manifest["tokenizer"]["sha256"]
        for name, corpus in corpora.items()
        if corpus.manifest.get("tokenizer")
    }
    if len(set(words.values())) > 1:
        raise UserError(
            f"the corpora {', '.join(words)} were prepared with different tokenizers; prepare "
            "them together: skillnet prepare"
        )
    return Checked({name: corpus.manifest for name, corpus in corpora.items()}, start)


def _train(
    config: FinetuneConfig,
    run: Path,
    tracker: "Tracker",
    on_evaluation: "OnEvaluation | None",
    nested: "Nested | None",
) -> None:
    from pipelines.mirror import mirror_of
    from pipelines.training import notice
    from pipelines.training.worker import fit_on_ray, work
    from skillnet.malloc import keep_freed_memory

    tracked = (tracker.run_id, tracker.uri)
    if config.training.workers == 0:
        keep_freed_memory()
        with notice.listening():
            work(config, run, tracked=tracked, on_evaluation=on_evaluation)
    else:
        fit_on_ray(config, run, tracked, on_evaluation, nested)
    mirror = mirror_of(config, run)
    if mirror is not None:
        mirror.take_trained()
        if config.training.workers:
            mirror.clear("ray")
    # What Ray keeps of a fit is of no use after it: checkpoints and logs are ours.
    shutil.rmtree(run / "ray", ignore_errors=True)
    trained = read_json(run / "trained.json")
    if trained["stopped_early"]:
        console.warn(trained["stopped_early"])
        tracker.tags({"stopped_early": trained["stopped_early"]})
    if trained["left"]:
        raise Terminated(
            f"ended by SIGTERM after step {trained['step']} of {config.training.steps}, with the "
            f"checkpoint {trained['checkpoint']}; the same command, with --name {config.name}, "
            "goes on"
        )


def tell(result: dict[str, Any], words: str) -> None:
    """Print the result of a run: its figures, and a line that ends in ``words``; or as JSON."""
    if console.json_wanted():
        console.emit_json(result)
        return
    if result["evaluation"]:
        from pipelines.reporting import result_cells

        console.table(result["name"], *result_cells(result["evaluation"]))
    console.note(f"{result['step']} steps in {result['seconds'] / 60:.1f} min; {words}")


@command
def main(argv: list[str] | None = None) -> int:
    """Entry point of ``skillnet finetune``."""
    config = configuration.parse(
        FinetuneConfig,
        argv or [],
        "skillnet finetune",
        description="Train all tasks jointly: one sparse model, one task a step, only the "
        "skills of that task computed, updated and exchanged.",
        example="skillnet finetune --name first --training.steps 2000\n"
        "skillnet finetune --config tiny --training.workers 2 --json",
    )
    result = finetune(config)
    tell(result, f"the model is in {result['model']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
