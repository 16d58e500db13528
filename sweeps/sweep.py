"""``skillnet sweep``: train many runs over a search space, ranked on the validation split.

<run root>/<name>/
  sweep.yaml       resolved configuration
  run.json         MLflow run, the parent of the trials' runs
  trials/<trial>/  run directory of each trial; see sweeps/trials/trial.py
  trials.csv       one row per trial
  best.yaml        best configuration: `skillnet finetune --config …/best.yaml`
  score.png        score against activated FLOPs and parameters, with the settings
  result.json      result of the command

The entry point is :func:`sweep`. With ``--run_dir s3://bucket/runs`` the object store holds the
same files: see sweeps/trials/remote_ledger.py. The test splits are never read: they are reserved
for the chosen configuration.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs.layout import describe_run, lock_run_folder
from pipelines.training.runs.mirror import RunMirror
from skillnet_evidence.cells import markdown_table
from skillnet_platform import config as configuration
from skillnet_platform import console, tracking
from skillnet_platform.cli import command
from skillnet_platform.errors import UserError
from skillnet_platform.signals import terminate_as_interrupt
from skillnet_platform.storage import atomic_write, run_root, write_json
from skillnet_platform.storage.directories import is_uri
from skillnet_platform.storage.location import parse_location
from skillnet_platform.tracking import Tracker
from sweeps.config.sweep import SweepConfig
from sweeps.config.trials import resolve_result_folder
from sweeps.search.space import request_sweep
from sweeps.trials import remote_ledger
from sweeps.trials.remote_ledger import RUN
from sweeps.trials.trial import TrialOutcome

CONFIG = "sweep.yaml"
RESULT = "result.json"
#: Files that exist from the start of a sweep.
START_FILES = (CONFIG, RUN)

#: Settings that may change when a sweep is resumed.
CHANGEABLE_KEYS = ("name", "run_dir", "resources", "keep", "max_failures", "tracking")


def sweep(config: SweepConfig) -> dict[str, Any]:
    """Run a sweep to its end and rank its configurations; an unfinished sweep is resumed.

    Returns:
        Name, folder, MLflow run id, ``best`` (name, score, settings, file), ``configurations``
        (best first), ``effects`` of settings, ``trials`` with their status, files, seconds.

    Raises:
        UserError: the space, a value or a corpus is invalid (nothing is started), or no trial has
            a score.
        StoreUnavailableError: the store does not respond. The same command resumes the sweep.
    """
    config, folder, mirror = _resolve_config(config)
    with terminate_as_interrupt(), lock_run_folder(folder, mirror.uri if mirror else None):
        return _sweep_in_folder(config, folder, mirror)


def _sweep_in_folder(config: SweepConfig, folder: Path, mirror: RunMirror | None) -> dict[str, Any]:
    from sweeps.trials.engine import check_trial, run_trials

    begin = time.monotonic()
    if mirror is not None:
        remote_ledger.restore_ledger(mirror, START_FILES, ("trials",))
    source, run = _build_source(config, folder)
    asha = config.asha if config.scheduler == "asha" else None
    # Errors of listed trials, and those that all sampled trials share, are found before anything is
    # written or recorded.
    for trial in source if isinstance(source, list) else [source.example]:
        check_trial(trial, None, config.score, asha, config.resources)
    _store_config(config, folder)
    with tracking.start_run(
        folder.name,
        config,
        config.tracking,
        tags=describe_run(run, folder, "sweep"),
        record=folder / RUN,
    ) as parent:
        if mirror is not None:
            mirror.upload(*START_FILES)
        outcomes = run_trials(
            source,
            folder=folder / "trials",
            parent=parent,
            score=config.score,
            resources=config.resources,
            asha=asha,
            keep=config.keep,
            max_failures=config.max_failures,
            label="sweep",
            store=mirror.uri_of("trials") if mirror is not None else None,
        )
        result = _rank_and_record(config, run, folder, parent, outcomes)
    result["seconds"] = time.monotonic() - begin
    result["mirror"] = mirror.uri if mirror is not None else None
    write_json(folder / RESULT, console.to_json_types(result))
    if mirror is not None:
        mirror.upload(*remote_ledger.RESULT_FILES)
    return result


def _resolve_config(config: SweepConfig) -> tuple[SweepConfig, Path, RunMirror | None]:
    """Return the sweep with a name and a run directory, its local directory and its mirror."""
    name = config.name or time.strftime("sweep-%Y%m%d-%H%M%S")
    if "/" in name or name in ("", ".", ".."):
        raise UserError(
            f"name {name!r} is not a valid directory name; use letters, digits, - and _"
        )
    if not config.space:
        raise UserError("the space is empty: give space at least one key; see docs/sweeps.md")
    if config.run.storage.mirror:
        raise UserError(
            "run.storage.mirror: trials are stored where their sweep is; give the sweep --run_dir "
            "s3://… instead"
        )
    root = parse_location(config.run_dir, run_root())
    folder, mirror = resolve_result_folder(root, name)
    return replace(config, name=name, run_dir=str(root)), folder, mirror


def _store_config(config: SweepConfig, folder: Path) -> None:
    """Store the configuration; raise UserError if it differs from that of a resumed sweep."""
    stored = folder / CONFIG
    if stored.is_file():
        old, new = (_sweep_identity(tree) for tree in (configuration.load_yaml(stored), config))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) == new.get(key) or (key == "seeds" and _only_adds_seeds(old, new)):
                continue
            raise UserError(
                f"the sweep {folder.name} has {key} {old.get(key)}, not {new.get(key)}; give "
                f"another --name, or resume the sweep with --config {stored}"
            )
        if old == new:
            return
    # A sweep and a run of the same name would mix their files.
    elif (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is a run, not a sweep; give another --name")
    with atomic_write(stored, "w") as stream:
        stream.write(configuration.to_yaml(config))


def _only_adds_seeds(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether only seeds were added, in a sweep with independent trials.

    With Optuna or ASHA the trials depend on the scores of all earlier seeds.
    """
    is_independent = old.get("search") != "optuna" and old.get("scheduler") == "none"
    before = old.get("seeds")
    return (
        is_independent and isinstance(before, list) and all(seed in new["seeds"] for seed in before)
    )


def _sweep_identity(config: SweepConfig | Mapping[str, Any]) -> dict[str, Any]:
    tree = dict(config) if isinstance(config, Mapping) else configuration.to_dict(config)
    return configuration.flatten_tree(
        {key: v for key, v in tree.items() if key not in CHANGEABLE_KEYS}
    )


def _build_source(config: SweepConfig, folder: Path) -> tuple[Any, FinetuneConfig]:
    """Return the list or source of the trials, and their base run."""
    from pipelines.training.loop.resolved_run import resolve_run
    from sweeps.search.space import list_points, prepare_search, warn_about_small_space
    from sweeps.search.strategies import OptunaSource, configurations_from_points

    # Trials are evaluated on the validation split only; best.yaml sets evaluate again.
    named = replace(config.run, name=folder.name, tracking=config.tracking, evaluate=False)
    run = resolve_run(replace(named, run_dir=str(folder.parent))).config
    space, finish = prepare_search(config, run)
    if config.search == "optuna":
        source = OptunaSource(
            space, config.samples, config.seeds, config.search_seed, finish, folder / "trials"
        )
        warn_about_small_space("space", source.num_configurations, config.samples)
        return source, run
    wanted = math.prod(
        len(each.values) for each in config.space.values() if each.grid or config.search == "grid"
    )
    if config.search == "random":
        wanted *= config.samples
    candidates = configurations_from_points(space, list_points(config, space), finish)
    warn_about_small_space("space", len(candidates), wanted)
    return [trial for each in candidates for trial in each.make_trials(config.seeds)], run


def _rank_and_record(
    config: SweepConfig,
    run: FinetuneConfig,
    folder: Path,
    parent: Tracker,
    outcomes: Sequence[TrialOutcome],
) -> dict[str, Any]:
    """Rank the configurations, write the files, and record them in the parent run."""
    from skillnet_evidence.effects import build_effects_table, estimate_effects
    from sweeps.search import ranking
    from sweeps.trials.ledger import outcome_to_dict

    configurations = ranking.rank_configurations(outcomes)
    ranking.write_trials_csv(outcomes, folder / "trials.csv")
    parent.artifact(folder / "trials.csv")
    figure = ranking.draw_ranking_figure(configurations)
    if figure is not None:
        figure.savefig(folder / "score.png", dpi=120)
        parent.artifact(folder / "score.png", "plots")
    counts = {status: sum(o.status == status for o in outcomes) for status in ranking.STATUSES}
    parent.metrics({f"trials/{status}": count for status, count in counts.items()})
    best = configurations[0]
    if best.score is None:
        # One error explains most failures; the log has the details.
        first = next(outcome for outcome in outcomes if outcome.error)
        raise UserError(
            f"none of the {len(outcomes)} trials has a score; {first.name}: {first.error} "
            f"(see {first.log or first.folder})"
        )
    path = _write_best(config, folder, best.trials[0])
    parent.artifact(path)
    parent.metrics({"score": best.score})
    parent.tags({"best": best.name})
    columns, cells = ranking.build_ranking_table(configurations)
    texts = [[_format_cell(value) for value in row] for row in cells]
    heading = f"Sweep **{folder.name}**, best first, on the validation split."
    effects = estimate_effects(ranking.list_scored_trials(outcomes), list(config.space))
    note = f"{heading}\n\n{markdown_table(columns, texts)}"
    if effects:
        effect_columns, effect_cells, caption = build_effects_table(effects)
        table = markdown_table(effect_columns, effect_cells)
        note += f"\n\n#### Effect of each setting\n\n{table}\n\n{caption}"
    parent.note(note)
    return {
        "name": folder.name,
        "folder": str(folder),
        "run_id": parent.run_id,
        "best": {
            "name": best.name,
            "score": best.score,
            "settings": best.settings,
            "config": str(path),
        },
        "counts": counts,
        "configurations": configurations,
        "effects": effects,
        "trials": [outcome_to_dict(outcome) for outcome in outcomes],
        "files": {"trials": str(folder / "trials.csv"), "best": str(path)},
    }


def _write_best(config: SweepConfig, folder: Path, trial: str) -> Path:
    """Write the best configuration as an independent run that evaluates on the test splits."""
    stored = configuration.load_yaml(folder / "trials" / trial / "config.yaml")
    run = configuration.build_config(FinetuneConfig, stored)
    run = replace(
        run,
        name=None,
        # Outside of the sweep's directory, but in the same object store.
        run_dir=config.run.run_dir or (config.run_dir if is_uri(config.run_dir) else None),
        seed=config.run.seed,
        data=config.run.data,
        storage=config.run.storage,
        evaluate=True,
        tracking=config.run.tracking,
    )
    path = folder / "best.yaml"
    with atomic_write(path, "w") as stream:
        stream.write(f"# The best configuration of the sweep {folder.name}, by validation score.\n")
        stream.write(configuration.to_yaml(run))
    return path


def _format_cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def show_sweep(result: dict[str, Any]) -> None:
    """Print the ranking, the effects and the command that trains the best configuration."""
    from skillnet_evidence.effects import build_effects_table
    from sweeps.search import ranking

    console.print_table(result["name"], *ranking.build_ranking_table(result["configurations"]))
    if result["effects"]:
        console.print_table("Effect of each setting", *build_effects_table(result["effects"]))
    best = result["best"]
    console.print_note(
        f"best: {best['name']} with {best['score']:.4f}; train it with\n"
        f"  skillnet finetune --config {best['config']}"
    )


@command(
    SweepConfig,
    description="Train many runs over a search space on Ray: all combinations, random draws or "
    "Optuna, with or without early stopping. Ranks them on the validation split; the test splits "
    "are never read.",
    example="skillnet sweep --config sweeps/plans\n"
    "skillnet sweep --config sweeps/placement --name first --run.training.steps 400 --json\n"
    "skillnet sweep --search random --space.training.lr.loguniform 3e-4,3e-3",
    show=show_sweep,
    resources=request_sweep,
    essential=(
        "name",
        "run_dir",
        "search",
        "samples",
        "seeds",
        "scheduler",
        "score.kind",
        "resources.cpus",
        "resources.gpus",
        "resources.max_concurrent_trials",
        "keep",
        "max_failures",
        "run.data",
        "run.training.steps",
        "run.training.lr",
        "run.training.workers",
        "run.training.use_gpu",
        "tracking.uri",
    ),
)
def main(config: SweepConfig) -> dict[str, Any]:
    """Run ``skillnet sweep``."""
    return sweep(config)


if __name__ == "__main__":
    raise SystemExit(main())
