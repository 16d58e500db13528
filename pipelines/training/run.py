"""TODO: pipelines.training.run."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.run import FinetuneConfig
from pipelines.runs.layout import CONFIG, RESULT, make_folder, read_result
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.errors import Terminated, UserError
from skillnet_platform.storage import (
    data_root,
    read_json,
    run_root,
)
from skillnet_platform.storage.location import place

if TYPE_CHECKING:
    from pipelines.training.init_from import Start
    from pipelines.training.ray_train.fit import Nested
    from pipelines.training.reporter import OnEvaluation
    from skillnet_platform.tracking import Tracker


@dataclass(frozen=True)
class Checked:
    """What :func:`check` found out about a run before its start.

    Args:
        manifests: of its corpora.
        start: what it takes over from the model that it starts from; none without one.
    """

    manifests: Mapping[str, Mapping[str, Any]]
    start: "Start | None"


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
    from pipelines.training.final_evaluation import conclude

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
    from pipelines.runs.head_sizes import with_outputs

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
        from pipelines.training.init_from import locate

        start = locate(config.init_from, config.tracking.uri, str(folder))
    return replace(
        config, name=name, run_dir=str(folder), data=str(data), init_from=start, storage=kept
    )


def open_run(config: FinetuneConfig, run: Path) -> dict[str, Any] | None:
    """Make the run's folder, or take up an unfinished run; the result of a finished one."""
    finished = finished_run(config, run)
    make_folder(config, run)
    return finished


def finished_run(config: FinetuneConfig, run: Path) -> dict[str, Any] | None:
    """The result of a run that is finished; nothing is written.

    Raises:
        UserError: the folder is no run, one of another configuration, or damaged.
    """
    from pipelines.runs.identity import identity_of

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


def check(config: FinetuneConfig) -> Checked:
    """Find what does not fit before anything starts.

    Raises:
        UserError: a corpus, a system, a device or a start that does not fit.
    """
    from pipelines.evaluation.evaluator import check_outputs
    from pipelines.training.init_from import preview
    from pipelines.training.setup import open_corpora, open_stream, pick_device
    from skillnet.skills import find_task
    from skillnet.systems import find_system

    system = find_system(config.system)
    system.configure(config.model, system.model.parse_options(config.options))
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
    from pipelines.runs.mirror import mirror_of
    from pipelines.training import preemption
    from pipelines.training.ray_train.fit import fit_on_ray
    from pipelines.training.worker import work
    from skillnet.malloc import keep_freed_memory

    tracked = (tracker.run_id, tracker.uri)
    if config.training.workers == 0:
        keep_freed_memory()
        with preemption.listening():
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
