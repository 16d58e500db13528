"""Metrics of MLflow's runs, from a database or a server, by MLflow's own client."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skillnet_evidence.errors import EvidenceError, require_known
from skillnet_evidence.readers.lines import (
    PeerLines,
    ReadOptions,
    ScoreLines,
    forbid_options,
    require_value,
)


def read_mlflow(sources: Sequence[str], options: ReadOptions) -> ScoreLines:
    """Return metrics of MLflow's runs; a metric has no rows, so seeds are all that varies."""
    forbid_options(options, "metrics of MLflow", metrics="are named by --tasks")
    forbid_options(options, "metrics of MLflow", unit="have no rows")
    found, names = PeerLines(), set()
    counts: dict[str, int] = {}
    skipped = 0
    key = options.system or "system"
    for source in sources:
        for experiment, run in _load_runs(source):
            data, place = run.data, f"{source}, run {run.info.run_name or run.info.run_id}"
            if not options.tasks:
                names |= set(data.metrics)
                continue
            if run.info.status != "FINISHED" or not set(options.tasks) <= set(data.metrics):
                skipped += 1
                continue
            names.add(experiment)
            label = require_value({**data.tags, **data.params}, key, place, "--system")
            seed = counts[label] = counts.get(label, -1) + 1
            for task in options.tasks:
                values = {"system": label, "seed": seed, "task": task, "metric": task}
                # Two equal rows: the variance over rows is 0, that over seeds remains.
                for row in ("one", "two"):
                    found.add(place, values | {"row": row, "score": data.metrics[task]})
    if not options.tasks:
        listed = ", ".join(sorted(names)) or "none"
        raise EvidenceError(f"{sources[0]}: name metrics by --tasks; the runs have: {listed}")
    if len(names) > 1:
        listed = ", ".join(sorted(names))
        raise EvidenceError(
            f"{sources[0]}: runs of several experiments ({listed}); add #NAME of one"
        )
    if not found.rows:
        raise EvidenceError(f"{sources[0]}: no finished run has {', '.join(options.tasks)}")
    notes = ["Metrics of MLflow have no rows: intervals are over runs (seeds) alone."]
    if skipped:
        notes.append(f"Left out: {skipped} runs that did not finish or lack a metric.")
    return found.finish(*notes)


def _load_runs(source: str) -> list[tuple[str, Any]]:
    """Return (experiment, run) of a store, oldest first."""
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ModuleNotFoundError:
        raise EvidenceError(
            f"{source}: MLflow's stores need its client; in a clone, "
            "pip install './plugins/evidence[mlflow]'"
        ) from None
    address, _, wanted = source.partition("#")
    local = Path(address.removeprefix("sqlite:///"))
    # The client would create a database that does not exist.
    if ("://" not in address or address.startswith("sqlite:///")) and not local.exists():
        raise EvidenceError(f"{address}: no such store")
    if local.is_file():
        address = f"sqlite:///{local}"
    try:
        client = MlflowClient(address)
        known = {each.experiment_id: each.name for each in client.search_experiments()}
        require_known([wanted] if wanted else [], known.values(), source, "experiment")
        chosen = [key for key, name in known.items() if name == (wanted or name)]
        runs, token = [], None
        while chosen:
            page = client.search_runs(chosen, order_by=["start_time ASC"], page_token=token)
            runs += [(known[run.info.experiment_id], run) for run in page]
            token = page.token
            if not token:
                break
    except MlflowException as error:
        raise EvidenceError(f"{source}: {str(error).partition('. ')[0]}") from None
    return runs
