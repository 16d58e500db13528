"""``skillnet grow``: add a skill and a task to a trained model, and train only these.

With ``--tasks a.yaml b.yaml`` each file is a growth of its own. All train as independent jobs, and
their union becomes one model:

<run root>/<name>-<task>/   run of each growth (pipelines/growth/growths.py)
<run root>/<name>/          the union, a run of ``skillnet merge``
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.growth.growths import grow_model, plan_growths, train_growths
from pipelines.merge import merge_trained_models
from pipelines.training.config.growth import GrowConfig, MergeConfig
from pipelines.training.config.resources import PlannedRun, request_workers
from pipelines.training.growth.report import GrowthReport, MergeReport
from pipelines.training.runs.layout import lock_run_folder
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.cluster.resource_request import (
    ResourceRequest,
    collect_locations,
    local_run_dir,
    select_model_paths,
)
from skillnet_platform.signals import terminate_as_interrupt
from skillnet_platform.storage import run_root


def grow_apart(configs: Sequence[GrowConfig]) -> dict[str, Any]:
    """Train several growths of one base as independent jobs, then join them to one model.

    Each growth sees the base alone, so the union has the bytes of growths that are trained one
    after the other. A failed growth does not end the others, and then the union is left out.

    Args:
        configs: settings of each growth; base, places and tracker are equal.

    Returns:
        ``name``, ``growths`` (see :func:`pipelines.growth.growths.train_growths`) and ``union``,
        the result of :func:`pipelines.merge.merge_trained_models`, or None after a failure.

    Raises:
        UserError: the growths do not go together, the base is missing, or the name is in use.
    """
    name, growths = plan_growths(configs)
    folder = Path(str(growths[0].run_dir)) / name
    with terminate_as_interrupt(), lock_run_folder(folder):
        # A name that is in use is found before the training. torch loads here.
        from pipelines.training.growth.verification import require_merge_folder

        require_merge_folder(folder)
        trained = train_growths(growths)
        union = None
        if all(each["state"] == "done" for each in trained):
            first = growths[0]
            # Their names are shorter in the report, where they are enough.
            key = "name" if folder.parent == run_root() else "run"
            merge = MergeConfig(
                [each[key] for each in trained],
                name=name,
                run_dir=first.run_dir,
                data=first.data,
                corpora=first.corpora,
                tracking=replace(first.tracking, register=configs[0].tracking.register),
            )
            union = merge_trained_models(merge, are_growths=True)
    return {"name": name, "growths": trained, "union": union}


def show_grown(result: dict[str, Any]) -> None:
    """Print the report of a growth; of several the jobs, and the report of their union.

    Args:
        result: result of :func:`grow_model` or :func:`grow_apart`.
    """
    if "growths" not in result:
        GrowthReport.show(result)
        return
    growths = result["growths"]
    rows = [
        (
            each["task"],
            each["state"],
            each["steps"],
            console.format_minutes(each["seconds"]),
            each["restarts"],
            each["name"],
        )
        for each in growths
    ]
    columns = ("growth", "state", "steps", "time", "restarts", "run")
    console.print_table(f"Growths of {result['name']}", columns, rows)
    if result["union"] is not None:
        MergeReport.show(result["union"])
        run = growths[0]["name"]
        console.print_note(f"each growth can travel as a file: skillnet pack {run}")
        return
    failed = [each for each in growths if each["state"] == "failed"]
    for each in failed:
        console.print_error(f"{each['task']}: {each['error']}")
    console.print_note(
        f"{len(failed)} of {len(growths)} growths failed; the others are kept. Remove the reasons "
        f"and repeat the command with --name {result['name']}: it resumes, and joins all of them"
    )


def choose_exit_code(result: dict[str, Any]) -> int:
    """Return 0, or after a failed growth 2 if users can remove all reasons, else 1.

    Args:
        result: result of :func:`grow_model` or :func:`grow_apart`.
    """
    failed = [each for each in result.get("growths", []) if each["state"] == "failed"]
    if not failed:
        return 0
    return 2 if all(each["is_user_error"] for each in failed) else 1


def request_growth(config: GrowConfig | list[GrowConfig]) -> ResourceRequest:
    """Return the resources of a growth, or of one of several: the others may wait for it.

    Its runs follow from the model that grows.
    """
    configs = config if isinstance(config, list) else [config]

    def list_runs() -> list[PlannedRun]:
        from pipelines.training.growth.runs import list_growth_runs

        return [run for each in configs for run in list_growth_runs(each)]

    first = configs[0]
    is_apart = len(configs) > 1
    cpus = max(float(each.training.threads_per_worker or 1) for each in configs)
    return replace(
        # The other jobs wait for CPUs, so one job must fit.
        request_workers(first.training, cpus if is_apart else None),
        locations=collect_locations(first.data, first.run_dir),
        models=select_model_paths(first.source),
        run_dir=local_run_dir(first.run_dir),
        run_name=first.name or "",
        list_runs=list_runs,
    )


@command(
    GrowConfig,
    description="Add a skill and a task to a trained model, and train only these. The report "
    "compares every other file by hash, compares every metric of the old tasks, and measures the "
    "benefit of the new skill. With --tasks FILE FILE … each file is a growth of its own: all "
    "train as independent jobs, on the cluster of RAY_ADDRESS or on the cores of this machine, and "
    "their union becomes the model NAME. Other options hold for every growth.",
    example="skillnet prepare --config prepare/stroke-counts\n"
    "skillnet grow my-run --config grow/stroke-count --name counting\n"
    "skillnet grow my-run --tasks grow/stroke-count grow/radical --name both",
    show=show_grown,
    exit_code=choose_exit_code,
    resources=request_growth,
    each="tasks",
    essential=(
        "source",
        "name",
        "run_dir",
        "data",
        "seed",
        "corpora",
        "references",
        "skill.name",
        "skill.init_from",
        "skill.rank",
        "task.name",
        "training.steps",
        "training.lr",
        "training.use_gpu",
        "training.workers",
        "training.precision",
        "tracking.register",
        "tracking.uri",
    ),
)
def main(config: GrowConfig | list[GrowConfig]) -> dict[str, Any]:
    """Run ``skillnet grow``."""
    return grow_apart(config) if isinstance(config, list) else grow_model(config)


if __name__ == "__main__":
    raise SystemExit(main())
