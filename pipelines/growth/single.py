"""One growth: add a skill and a task to a trained model, and train only these.

<run root>/<name>/          a run with the files of ``skillnet finetune``, and
  grow.yaml                 resolved configuration of the growth
  references/               reference runs of the new task
  growth.json, growth.md    report: unchanged files and metrics, and the benefit of the new skill

A growth is a run of the ordinary training loop. It starts from the grown model (in ``.starts``
beside the runs), and its ``training.trainable`` lists the new files. It resumes like any run.
:func:`grow_model` is called by ``skillnet grow``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.config.growth import GrowConfig
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.signals import terminate_as_interrupt
from skillnet_platform.storage import atomic_write, run_root, write_json
from skillnet_platform.storage.location import require_local_folder
from skillnet_platform.tracking import TrackingConfig

#: Resolved configuration of a growth, in the folder of its run.
GROW_FILE = "grow.yaml"

if TYPE_CHECKING:
    from pipelines.training.config.growth import MergeConfig
    from pipelines.training.config.run import FinetuneConfig
    from pipelines.training.growth.report import ChangeReport
    from pipelines.training.loop.resolved_run import ResolvedRun
    from pipelines.training.runs.model_source import ModelSource
    from skillnet.model import SkillNet
    from skillnet_platform.tracking import Tracker


def grow_model(config: GrowConfig, *, is_worker: bool = False) -> dict[str, Any]:
    """Grow a model, train the new part, and check that the old parts are unchanged.

    Args:
        config: settings of the growth.
        is_worker: train in this process, such as that of a job. Otherwise
            :func:`pipelines.training.config.resources.trains_in_process` decides.

    Returns:
        The result of :func:`pipelines.finetune.finetune`, and ``growth``: the report.

    Raises:
        UserError: the model or a corpus is missing, a name is in use, or another run has the name.
        RuntimeError: an old part changed; the report names it.
    """
    from pipelines.training.loop.resolved_run import resolve_run
    from pipelines.training.runs import layout, model_source

    config = replace(
        config, run_dir=str(require_local_folder(config.run_dir, run_root(), "run_dir of grow"))
    )
    source = model_source.resolve_model(config.source, config.tracking.uri)
    # torch loads here: --help and wrong names do not need it.
    from pipelines.training.growth import runs

    before = runs.load_growable_model(source)
    resolved = resolve_run(runs.build_growth_config(config, source, before))
    with terminate_as_interrupt(), layout.lock_run_folder(resolved.folder):
        return _grow_in_folder(config, source, before, resolved, is_worker)


def _grow_in_folder(
    config: GrowConfig,
    source: "ModelSource",
    before: "SkillNet",
    resolved: "ResolvedRun",
    is_worker: bool,
) -> dict[str, Any]:
    from pipelines.serving.registration import check_given_name
    from pipelines.training.growth import runs, verification
    from pipelines.training.loop import run as training_run
    from pipelines.training.loop.init_from import read_training_corpora, record_origin
    from pipelines.training.loop.setup import require_devices
    from pipelines.training.runs import layout
    from pipelines.training.runs.progress_log import PROGRESS, follow_progress

    settings = resolved.config
    assert settings.name is not None
    run = Path(str(settings.run_dir)) / settings.name
    grown = runs.build_grown_model(config, before, settings.model.tasks[config.task.name])
    # Read from the model, because a new modality adds a stem to the new skill and head.
    settings.training.trainable = verification.added_files(before, grown)
    start = runs.save_start_model(grown, str(settings.run_dir))
    settings.init_from = record_origin(Path(start), source.name)
    # Checked before training: an old file that saving rewrites would waste the run.
    verification.assert_files_unchanged(
        verification.compare_files(source, before, Path(settings.init_from))
    )
    finished = training_run.find_finished_result(resolved)
    # A result without a report was interrupted after its training, and resumes below.
    if finished is not None and "growth" in finished:
        runs.check_same_references(config, run / GROW_FILE)
        console.print_note(
            f"{settings.name} is finished ({finished['step']} steps); give another --name for a "
            "new growth"
        )
        return finished
    require_devices(settings.training)
    training_run.validate_run(resolved)
    check_given_name(config.tracking, settings.system)
    references = _resolve_references(config, settings, source, run)
    create_derived_run(config, settings, run, GROW_FILE)
    with layout.track_run(settings, run, "grow", {"grown_from": source.digest}) as tracker:
        if finished is None:
            with follow_progress(run / PROGRESS, settings.training.steps):
                finished = training_run.train_and_evaluate(
                    resolved,
                    tracker,
                    is_worker=is_worker,
                    source=str(source.weights.absolute()),
                )
            finished["grown_from"] = {
                "digest": source.digest,
                "corpora": read_training_corpora(source),
            }
            # Written before the report, so that a growth that is killed now does not train again.
            write_json(run / layout.RESULT, finished | {"registered": None})
        result: dict[str, Any] = dict(finished)
        trained = _train_references(references, tracker, is_worker)
        added = (config.skill.name if config.skill is not None else "", config.task.name)
        report = verification.build_growth_report(
            source, before, settings, run, result, trained, added
        )
        report.record(run, tracker)
    # The report is written first, so that it shows what changed if the check fails.
    verification.assert_frozen_unchanged(report)
    return finish_result(result, report, [source], settings, config.tracking)


def _resolve_references(
    config: GrowConfig, settings: "FinetuneConfig", source: "ModelSource", run: Path
) -> "dict[str, ResolvedRun]":
    """Return name -> validated reference run, before the growth has a folder."""
    from pipelines.training.growth import runs
    from pipelines.training.loop.resolved_run import ResolvedRun
    from pipelines.training.loop.run import find_finished_result, validate_run

    resolved: dict[str, ResolvedRun] = {}
    for name in dict.fromkeys(config.references):
        other = runs.build_reference_config(name, config, settings, source, run)
        # Without another skill there is no frozen model to put the head on.
        if other is None:
            reason = "has no other skill" if config.skill is not None else "adds no skill"
            console.print_note(f"{name}: the task {reason}; this reference is skipped")
            continue
        assert other.name is not None
        resolved[name] = ResolvedRun(other, run / "references" / other.name)
        if find_finished_result(resolved[name]) is None:
            validate_run(resolved[name])
    return resolved


def _train_references(
    references: "Mapping[str, ResolvedRun]", tracker: "Tracker", is_worker: bool
) -> dict[str, dict[str, Any]]:
    """Train the reference runs; return name -> result. Each is a child run in MLflow."""
    from pipelines.training.loop import run as training_run
    from pipelines.training.runs import layout
    from pipelines.training.runs.progress_log import PROGRESS, follow_progress

    results: dict[str, dict[str, Any]] = {}
    for name, resolved in references.items():
        other, folder = resolved.config, resolved.folder
        finished = training_run.open_run_folder(resolved)
        if finished is None:
            console.print_note(f"training the reference {name}")
            with (
                layout.track_run(
                    other, folder, "grow", {"reference": name}, tracker.run_id
                ) as child,
                follow_progress(folder / PROGRESS, other.training.steps),
            ):
                finished = training_run.train_and_evaluate(resolved, child, is_worker=is_worker)
            write_json(folder / layout.RESULT, finished)
        results[name] = finished
    return results


def finish_result(
    result: dict[str, Any],
    report: "ChangeReport",
    sources: "Sequence[ModelSource]",
    settings: "FinetuneConfig",
    tracking: TrackingConfig,
) -> dict[str, Any]:
    """Register the model of a growth or merge, and write its result with the report.

    Args:
        result: result of the command so far, with ``run`` and ``evaluation``.
        report: comparison with the models that it was made from.
        sources: models that it was made from.
        settings: configuration of its run.
        tracking: MLflow settings of the command.
    """
    from pipelines.serving.registration import register_measured_run
    from pipelines.training.runs import layout

    folder, rows = Path(result["run"]), result["evaluation"]
    result["registered"] = register_measured_run(
        tracking, sources, folder, str(settings.data), rows, report.summarize()
    )
    result[report.kind] = report.to_dict()
    write_json(folder / layout.RESULT, result)
    return result


def create_derived_run(
    config: "GrowConfig | MergeConfig", settings: "FinetuneConfig", folder: Path, file: str
) -> None:
    """Create the folder of a run that a growth or merge makes.

    Args:
        config: configuration of the command.
        settings: configuration of the run.
        folder: location of the run.
        file: name of the file with ``config``.
    """
    from pipelines.training.runs import layout

    layout.create_run_folder(settings, folder)
    # Written after validation, so that a rejected config does not reserve the name.
    with atomic_write(folder / file, "w") as stream:
        stream.write(configuration.to_yaml(config))
