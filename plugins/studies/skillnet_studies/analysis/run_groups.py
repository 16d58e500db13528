"""Group finished runs by their configuration.

:func:`label_runs` gives runs of one configuration one label, and :func:`find_differing_settings`
lists in what the systems differ. Called by ``skillnet compare``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_studies.analysis.finished_runs import FinishedRun

#: Keys of a run's configuration that do not describe the training: names, paths and the seed.
UNCOMPARED_KEYS = ("name", "run_dir", "data", "tracking", "evaluate", "seed", "init_from")


def label_runs(runs: Sequence[FinishedRun], names: Sequence[str] = ()) -> list[FinishedRun]:
    """Give runs of one configuration one label, and different configurations different labels.

    Args:
        runs: finished runs.
        names: labels of the configurations, in the order of their first run; empty keeps the
            labels of the runs and numbers duplicates.

    Raises:
        UserError: the number of names differs from the number of configurations, or two runs of
            one configuration have the same seed.
    """
    groups = _group_by_configuration(runs)
    if names and len(names) != len(groups):
        counts = ", ".join(f"{group[0].label} ({len(group)} runs)" for group in groups.values())
        raise UserError(
            f"{len(names)} names for {len(groups)} configurations: {counts}; give one name for each"
        )
    # Equal labels would merge two configurations into one system of the report.
    if len(set(names)) < len(names):
        raise UserError(f"names must differ, got {', '.join(names)}")
    labels: list[str] = []
    named: list[FinishedRun] = []
    for index, members in enumerate(groups.values()):
        label = names[index] if names else _make_unique(members[0].label, labels)
        labels.append(label)
        replicates = [run.replicate for run in members]
        for run in members:
            # A run that counts twice would make the seeds look more alike than they are.
            if replicates.count(run.replicate) > 1:
                equal = [str(each.folder) for each in members if each.replicate == run.replicate]
                fold = f" of fold {run.fold.number}" if run.fold.count else ""
                raise UserError(
                    f"{label}: seed {run.seed}{fold} occurs twice ({' and '.join(equal[:2])}); "
                    "leave one run out"
                )
        named += [replace(run, label=label) for run in sorted(members, key=lambda r: r.replicate)]
        if not names and label != members[0].label:
            console.print_note(
                f"{label}: {members[0].label} with other settings; set another name with --names"
            )
    return named


def find_differing_settings(runs: Sequence[FinishedRun]) -> dict[str, dict[str, str]]:
    """Return flat key -> label -> value for the settings in which the systems differ.

    Settings of pretrainings are compared among pretrained systems, as ``pretraining.KEY``.
    """
    own = _flat_differences({run.label: run.settings for run in runs})
    before = _flat_differences({run.label: run.pretraining for run in runs if run.pretraining})
    labels = [run.label for run in runs]
    # A pretraining has the system and sizes of its run, which the run's own rows show already.
    added = {
        f"pretraining.{key}": {label: values.get(label, "–") for label in labels}
        for key, values in before.items()
        if any(own.get(key, {}).get(label) != value for label, value in values.items())
    }
    return own | added


def _flat_differences(trees: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    flat: dict[str, dict[str, str]] = {}
    for label, settings in trees.items():
        tree = {key: value for key, value in settings.items() if key not in UNCOMPARED_KEYS}
        tree = _without_fold_number(tree)
        flat[label] = {
            key: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
            for key, value in configuration.flatten_tree(tree).items()
        }
    # dict.fromkeys keeps the order of the configuration, which a set would lose.
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    return {
        key: {label: values.get(key, "–") for label, values in flat.items()}
        for key in keys
        if len({values.get(key, "–") for values in flat.values()}) > 1
    }


def _group_by_configuration(
    runs: Sequence[FinishedRun],
) -> dict[tuple[str, str], list[FinishedRun]]:
    """Group runs that differ only in the seed; pretrained runs also by their pretraining.

    A run with an unknown pretraining joins the only known one of its configuration, if any.
    """
    own = [
        _configuration_digest(
            run.settings, label=run.label, pretrained=bool(run.settings.get("init_from"))
        )
        for run in runs
    ]
    before = [_configuration_digest(run.pretraining) if run.pretraining else "" for run in runs]
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run, key, start in zip(runs, own, before, strict=True):
        # Known pretrainings of runs with the same settings.
        known = {b for k, b in zip(own, before, strict=True) if k == key and b}
        groups.setdefault((key, start or (known.pop() if len(known) == 1 else "")), []).append(run)
    return groups


def _configuration_digest(settings: Mapping[str, Any], **more: Any) -> str:
    """Return a digest that is equal for configurations that train the same model."""
    from pipelines.training.runs.identity import NON_IDENTITY_KEYS

    tree = {key: value for key, value in settings.items() if key not in UNCOMPARED_KEYS}
    tree = _without_fold_number(tree)
    training = {k: v for k, v in (tree.get("training") or {}).items() if k not in NON_IDENTITY_KEYS}
    return configuration.digest_config({"settings": tree | {"training": training}, **more})


def _without_fold_number(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which replicates of one study do not differ."""
    fold = {k: v for k, v in (tree.get("fold") or {}).items() if k != "number"}
    return {**tree, "fold": fold} if fold else dict(tree)


def _make_unique(label: str, taken: Sequence[str]) -> str:
    if label not in taken:
        return label
    return next(f"{label}-{n}" for n in range(2, len(taken) + 3) if f"{label}-{n}" not in taken)
