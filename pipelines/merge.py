"""``skillnet merge``: join models that grew from one base, with equal outputs of every task.

<run root>/<name>/          a run with the files that other commands read, and
  merge.yaml                configuration of the merge
  merge.json, merge.md      report: origin of each file, outputs of each task before and after
  evaluation.csv, outcomes.parquet   metrics of all tasks, and the outcome of every test row
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.growth.growths import create_derived_run, finish_result
from pipelines.training.config.growth import MergeConfig
from pipelines.training.config.resources import request_model
from pipelines.training.growth.report import MergeReport
from pipelines.training.runs import layout
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.signals import terminate_as_interrupt
from skillnet_platform.storage import data_root, run_root
from skillnet_platform.storage.location import parse_location, require_local_folder

if TYPE_CHECKING:
    from pipelines.training.config.run import FinetuneConfig
    from pipelines.training.growth.verification import MergeSource
    from skillnet.model_merging import MergePlan


def merge_trained_models(config: MergeConfig, *, are_growths: bool = False) -> dict[str, Any]:
    """Merge models, and compare the outputs of every task on every test row.

    Args:
        config: settings of the merge.
        are_growths: the models are growths of one command, which registers their union alone.

    Returns:
        ``name``, ``run``, ``model``, ``evaluation``, ``seconds``, ``step``, ``registered`` and
        ``merge``: the report.

    Raises:
        UserError: a model or corpus is missing, the models have no common base, or the name is in
            use by another run or by a merge of other models, options or corpora.
        RuntimeError: an exact merge changed an output; the report names the task.
    """
    from pipelines.training.runs import model_source

    config = replace(
        config,
        run_dir=str(require_local_folder(config.run_dir, run_root(), "run_dir of merge")),
        data=str(parse_location(config.data, data_root())),
    )
    starts = Path(str(config.run_dir)) / ".starts"
    resolved = [model_source.resolve_model(name, config.tracking.uri) for name in config.models]
    # torch loads here: --help and wrong names do not need it.
    from pipelines.training.growth.verification import build_merged_config, open_merge_sources
    from skillnet.model_merging import plan_merge

    opened = open_merge_sources(config, resolved, starts / "merging")
    with terminate_as_interrupt(), opened as sources:
        plan = plan_merge(
            [source.parent for source in sources],
            config.without,
            average_shared=config.average_shared,
        )
        settings = build_merged_config(config, sources, plan)
        folder = Path(str(config.run_dir)) / str(settings.name)
        with layout.lock_run_folder(folder):
            return _merge_in_folder(config, sources, plan, settings, folder, are_growths)


def _merge_in_folder(
    config: MergeConfig,
    sources: "list[MergeSource]",
    plan: "MergePlan",
    settings: "FinetuneConfig",
    folder: Path,
    are_growths: bool,
) -> dict[str, Any]:
    from pipelines.serving.registration import (
        check_given_name,
        check_trained_tasks,
        find_unregistered,
    )
    from pipelines.training.evaluation.outcomes import OUTCOMES_FILE, OutcomeTable, write_outcomes
    from pipelines.training.evaluation.tables import (
        compute_overall_score,
        flat_metrics,
        write_evaluation_csv,
    )
    from pipelines.training.growth.verification import (
        MERGE_FILE,
        build_merge_report,
        check_same_merge,
    )
    from pipelines.training.loop.run_evaluation import EVALUATION_CSV
    from skillnet.model_merging import merge_models
    from skillnet_platform.tracking.backend import SCORE_METRIC

    began = time.monotonic()
    parents = [{"name": source.source.name, "digest": source.source.digest} for source in sources]
    if not layout.is_unused(folder):
        check_same_merge(config, settings, folder, [str(each["digest"]) for each in parents])
        if (folder / layout.RESULT).is_file():
            console.print_note(f"{settings.name} is finished; give another --name for a new merge")
            finished: dict[str, Any] = layout.read_result(folder / layout.RESULT)
            return finished
    for source in sources:
        check_trained_tasks(source.source)
    check_given_name(config.tracking, settings.system)
    create_derived_run(config, settings, folder, MERGE_FILE)
    merge_models(plan, folder / "model", parents=parents)
    tags = {f"merged_from.{index}": each["digest"] for index, each in enumerate(parents, 1)}
    with (
        layout.track_run(settings, folder, "merge", tags) as tracker,
        console.show_progress("comparing outputs", None, "rows") as bar,
    ):
        outcomes = OutcomeTable()
        report, rows = build_merge_report(
            sources,
            plan,
            settings,
            folder / "model",
            lambda task, split, rows, left: bar.begin_part(f"{task} {split}", rows, left),
            outcomes,
        )
        write_evaluation_csv(rows, folder / EVALUATION_CSV)
        write_outcomes(outcomes, folder / OUTCOMES_FILE)
        score, _ = compute_overall_score(rows, "test")
        tracker.metrics(
            flat_metrics(rows) | ({} if score is None else {SCORE_METRIC: score}),
            max(source.source.steps or 0 for source in sources),
        )
        for file in (EVALUATION_CSV, OUTCOMES_FILE):
            tracker.artifact(folder / file, "evaluation")
        report.record(folder, tracker)
    # The report is written first, so that it shows the difference.
    changed = [task for task in report.tasks if not task.is_identical]
    if plan.is_exact and changed:
        raise RuntimeError(
            f"the outputs of {changed[0].task} on {changed[0].split} differ from those of "
            f"{changed[0].model}, although all files are copies"
        )
    # Nobody decided that an unregistered model may serve, so neither may a merge with it.
    left_out = None
    if config.tracking.register and not config.tracking.registered_model and not are_growths:
        left_out = find_unregistered([each.source for each in sources], config.tracking.uri)
    if left_out is not None:
        console.print_note(
            f"{settings.name} is not registered, because {left_out.name} is not. Register it: "
            f"skillnet register {settings.name}"
        )
    result = {
        "name": settings.name,
        "run": str(folder),
        "model": str(folder / "model"),
        "parents": parents,
        "evaluation": rows,
        "step": max(source.source.steps or 0 for source in sources),
        "seconds": time.monotonic() - began,
    }
    tracking = replace(config.tracking, register=config.tracking.register and not left_out)
    return finish_result(result, report, [each.source for each in sources], settings, tracking)


def request_merge(config: MergeConfig) -> ResourceRequest:
    """Return the request of ``skillnet merge``: one CPU, the models and the corpora."""
    requests = [request_model(model, config.data) for model in config.models]
    models = tuple(dict.fromkeys(path for each in requests for path in each.models))
    return replace(requests[0], models=models)


@command(
    MergeConfig,
    description="Join models that grew from one base. Files in common must be equal; the files of "
    "all skills, stems and heads are copied. Every task of every model is evaluated before and "
    "after, and the outputs must be identical to the bit.",
    example="skillnet merge counting radicals --name both\n"
    "skillnet merge counting other --rename counting=counting_too",
    show=MergeReport.show,
    resources=request_merge,
)
def main(config: MergeConfig) -> dict[str, Any]:
    """Run ``skillnet merge``."""
    return merge_trained_models(config)


if __name__ == "__main__":
    raise SystemExit(main())
