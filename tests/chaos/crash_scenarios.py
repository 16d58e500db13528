"""Commands that crash tests kill, with the checks of what they leave.

After a kill, everything that has its final name is complete: the old content or the new content.
After the same command again, the run root equals that of an undisturbed command: files, weights,
runs and versions.
"""

import contextlib
import csv
import hashlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipelines.data.shards.dataset import verify_corpus
from pipelines.data.shards.files import VERIFIED_NOTES
from pipelines.serving.bundle import MANIFEST, check_bundle
from pipelines.training.runs.checkpoints import list_checkpoint_folders, verify_checkpoint
from skillnet.serialization import check_file, read_manifest
from tests.chaos.crash_points import CrashLab, FileEvent
from tests.helpers import readable_corpora, user_corpora
from tests.helpers.small_run import SIZES
from tests.helpers.synthetic_corpora import put_archive

TASKS = {"text_classification": {"batch_size": 4}, "text_to_image": {"batch_size": 3}}
ABSENT_TASKS = ("speech_recognition", "text_to_video", "text_to_code")
#: A model of some ten thousand weights, trained for a second in float64.
RUN: dict[str, Any] = {
    "model": {**SIZES, "tubelet": [4, 16, 16], "max_tokens": 48, "max_frames": 40},
    "training": {"steps": 4, "log_every": 1, "checkpoint_every": 2, "precision": "fp64"},
    "tracking": {"system_metrics": False},
    "tasks": {**TASKS, **dict.fromkeys(ABSENT_TASKS)},
}
#: Identifiers that differ from run to run, in the names of files.
VARYING = re.compile(r"[0-9a-f]{32}|(?<=sn-)[0-9a-f]{16}")
#: Files that exist for a reason beside the command, or record who read a corpus.
IGNORED_FILES = (VERIFIED_NOTES, "mlflow.lock")
LOGGED_MODEL_READY = 2


class CrashScenario(Protocol):
    """A command, the run root before it, and the checks after it."""

    name: str

    def setup(self, lab: CrashLab) -> None:
        """Fill an empty run root with what the command needs."""
        ...

    def words(self, root: Path) -> list[str]:
        """Return the command; see :meth:`CrashLab.run`."""
        ...

    def violations(self, root: Path) -> list[str]:
        """Return what is damaged in a run root after a kill."""
        ...

    def repeated(self, first: Sequence[FileEvent], second: Sequence[FileEvent]) -> list[str]:
        """Return the work of the killed command that the second command did again."""
        ...

    def fingerprint(self, root: Path) -> dict[str, Any]:
        """Return what must be equal after an undisturbed and after a resumed command."""
        ...


class PrepareScenario:
    """``skillnet prepare`` of a corpus that replaces an older one, and of a new corpus with text.

    The tasks run in the driver: see :mod:`tests.chaos.prepare_without_ray`.
    """

    name = "prepare"

    def __init__(self) -> None:
        self._old = ""

    def setup(self, lab: CrashLab) -> None:
        """Prepare the older corpus, and write the sources of the new one."""
        put_archive(lab.root / "archives")
        user_corpora.tnews(lab.root / "tnews", train=15, other=5)
        command = ["tests.chaos.prepare_without_ray", "made_settings"]
        end = lab.run(command)
        assert end.code == 0, end.output
        self._old = _digest_of(lab.root / "corpora" / "made")

    def words(self, root: Path) -> list[str]:
        """Return the command."""
        return [
            "tests.chaos.prepare_without_ray",
            "made_few",
            "--corpus",
            f"tnews={root / 'tnews'}",
        ]

    def violations(self, root: Path) -> list[str]:
        """Check that each corpus is complete, and that the older one or its successor exists."""
        found = []
        data = root / "corpora"
        for name in ("made", "tnews"):
            if not (data / name).exists():
                found += [f"{name}: no corpus is left"] if name == "made" else []
                continue
            found += _errors_of(verify_corpus, data / name)
        found += unreadable_json([data / "tokenizer.json", data / "tokenizer.manifest.json"])
        return found

    def repeated(self, first: Sequence[FileEvent], second: Sequence[FileEvent]) -> list[str]:
        """Compare the shards whose entry was complete with those that were written again."""

        def finished(events: Sequence[FileEvent]) -> set[str]:
            # The last event of a killed command did not happen.
            names = {event.path for event in events if event.kind == "rename"}
            entries = {path for path in names if re.search(r"-\d{5}\.json$", path)}
            return {path.removesuffix(".json") for path in entries}

        again = finished(first[:-1]) & finished(second)
        return [f"shard {Path(path).name} was written again" for path in sorted(again)]

    def fingerprint(self, root: Path) -> dict[str, Any]:
        """Return the content of all files below the run root."""
        return {"files": file_names(root), "corpora": digests(root / "corpora", "*")}


class FinetuneScenario:
    """``skillnet finetune`` with registration, in a run root that has a champion already."""

    name = "finetune"

    def setup(self, lab: CrashLab) -> None:
        """Write corpora, and register the model of another run."""
        write_inputs(lab.root)
        end = lab.run(_finetune(lab.root, "first"))
        assert end.code == 0, end.output

    def words(self, root: Path) -> list[str]:
        """Return the command."""
        return _finetune(root, "second")

    def violations(self, root: Path) -> list[str]:
        """Check run folder, tracker and registry."""
        return run_violations(root, root / "second") + registry_violations(root)

    def repeated(self, first: Sequence[FileEvent], second: Sequence[FileEvent]) -> list[str]:
        """Steps since the last checkpoint are repeated by design."""
        return []

    def fingerprint(self, root: Path) -> dict[str, Any]:
        """Return files, weights, results and records."""
        return {
            "files": file_names(root),
            "weights": digests(root / "second", "model/*.safetensors"),
            "checkpoints": digests(root / "second", "checkpoints/*/*.safetensors"),
            "result": _result_of(root / "second" / "result.json"),
            **records(root),
        }


class RegisterScenario:
    """``skillnet register`` of a run that is not registered."""

    name = "register"

    def setup(self, lab: CrashLab) -> None:
        """Register the model of another run, and train the one to register."""
        FinetuneScenario().setup(lab)
        end = lab.run([*_finetune(lab.root, "second"), "--tracking.register", "false"])
        assert end.code == 0, end.output

    def words(self, root: Path) -> list[str]:
        """Return the command."""
        return ["pipelines.register", "second", "--bootstrap_samples", "20"]

    def violations(self, root: Path) -> list[str]:
        """Check the registry."""
        return registry_violations(root)

    def repeated(self, first: Sequence[FileEvent], second: Sequence[FileEvent]) -> list[str]:
        """Nothing must be kept."""
        return []

    def fingerprint(self, root: Path) -> dict[str, Any]:
        """Return files and records."""
        return {"files": file_names(root), **records(root)}


class SweepScenario:
    """``skillnet sweep`` of two trials, one after the other, on Ray Tune."""

    name = "sweep"

    def setup(self, lab: CrashLab) -> None:
        """Write corpora, and create the tracker's database by another run."""
        write_inputs(lab.root)
        rest = ["--tracking.register", "false", "--evaluate", "false"]
        end = lab.run([*_finetune(lab.root, "first"), *rest])
        assert end.code == 0, end.output
        run = {**RUN, "evaluate": False, "tracking": {"system_metrics": False, "register": False}}
        body = {
            "name": "swept",
            "run": {**run, "data": str(lab.root / "corpora")},
            "space": {"training.lr": {"choice": [1e-3, 2e-3]}},
            "resources": {"max_concurrent_trials": 1},
            "tracking": {"system_metrics": False},
        }
        (lab.root / "sweep.yaml").write_text(json.dumps(body), encoding="utf-8")

    def words(self, root: Path) -> list[str]:
        """Return the command."""
        return ["sweeps.sweep", "--config", str(root / "sweep.yaml")]

    def violations(self, root: Path) -> list[str]:
        """Check the ledger, the folder of each trial, and the tracker."""
        found = unreadable_json((root / "swept").glob("*.json"))
        for trial in sorted((root / "swept" / "trials").glob("[!.]*")):
            # A sweep removes the models of trials that ended, except of the best.
            found += run_violations(root, trial, not (trial / "outcome.json").is_file())
        return found

    def repeated(self, first: Sequence[FileEvent], second: Sequence[FileEvent]) -> list[str]:
        """Compare the trials that had an outcome with those that trained again."""

        def ended(events: Sequence[FileEvent], kind: str, name: str) -> set[str]:
            paths = (Path(event.path) for event in events if event.kind == kind)
            return {path.parts[2] for path in paths if path.name == name and len(path.parts) == 4}

        again = ended(first[:-1], "rename", "outcome.json") & ended(
            second, "rename", "trained.json"
        )
        return [f"trial {name} was trained again" for name in sorted(again)]

    def fingerprint(self, root: Path) -> dict[str, Any]:
        """Return scores, statuses, and records."""
        with (root / "swept" / "trials.csv").open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        kept = ("trial", "status", "score", "step", "training.lr")
        return {
            "trials": [{key: row.get(key) for key in kept} for row in rows],
            "files": file_names(root),
            **records(root),
        }


SCENARIOS: tuple[type[CrashScenario], ...] = (
    PrepareScenario,
    FinetuneScenario,
    RegisterScenario,
    SweepScenario,
)


def write_inputs(root: Path) -> None:
    """Write corpora and the configuration of a run into an empty run root."""
    readable_corpora.write_corpora(root / "corpora")
    (root / "run.yaml").write_text(json.dumps(RUN), encoding="utf-8")


def run_violations(root: Path, run: Path, keeps_model: bool = True) -> list[str]:
    """Return what is damaged in a run's folder, and whether a run counts as finished too early.

    Args:
        root: run root.
        run: the run's folder.
        keeps_model: whether a run with a result must have a model.
    """
    found = unreadable_json(path for path in run.glob("*.json") if not path.name.startswith("."))
    for folder in list_checkpoint_folders(run / "checkpoints"):
        found += _errors_of(verify_checkpoint, folder)
    has_model = (run / "model").exists()
    if has_model:
        found += _errors_of(verify_model, run / "model")
    status = run_status(root, run)
    is_trained = (has_model or not keeps_model) and (run / "trained.json").is_file()
    if (run / "result.json").is_file() and not is_trained:
        found.append(f"{run.name}: a result without a model")
    if status == "FINISHED" and not (run / "trained.json").is_file():
        found.append(f"{run.name}: finished in the tracker, and not trained")
    return found


def registry_violations(root: Path) -> list[str]:
    """Return versions and aliases that a reader of the registry cannot use."""
    found = []
    versions = query(root, "select version, status, storage_location from model_versions")
    for version, status, location in versions:
        folder = root / str(location).removeprefix("database-folder:/")
        if status != "READY":
            found.append(f"version {version} is {status}")
            continue
        bundles = [path.parent for path in folder.rglob(MANIFEST)]
        if len(bundles) != 1:
            found.append(f"version {version} has {len(bundles)} bundles")
        for bundle in bundles:
            found += _errors_of(check_bundle, bundle)
    known = {str(version) for version, _, _ in versions}
    aliases = query(root, "select alias, version from registered_model_aliases")
    found += [f"@{a} is version {v}, which is missing" for a, v in aliases if str(v) not in known]
    if versions and "champion" not in {alias for alias, _ in aliases}:
        found.append("no version is the champion")
    return found


def verify_model(folder: Path) -> None:
    """Compare every file of a saved model with its manifest."""
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        check_file(folder, name, manifest)


def unreadable_json(paths: Iterable[Path]) -> list[str]:
    """Return the existing files that are not JSON."""
    found = []
    for path in paths:
        if path.is_file():
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                found.append(f"{path.name}: not JSON ({error})")
    return found


def run_status(root: Path, run: Path) -> str | None:
    """Return the status of a run in the tracker; None before it has an id."""
    if not (run / "run.json").is_file():
        return None
    with contextlib.suppress(ValueError, KeyError):
        run_id = json.loads((run / "run.json").read_text(encoding="utf-8"))["run_id"]
        for (status,) in query(root, "select status from runs where run_uuid = ?", run_id):
            return str(status)
    return None


TAGS = """select version, key, value from model_version_tags
where key in ('gate', 'skillnet.state')"""
DOUBLED = """select key, count(*) from metrics where key like '%/test_%' or key = 'score'
group by run_uuid, key having count(*) > 1"""


def records(root: Path) -> dict[str, Any]:
    """Return what tracker and registry hold, without ids and times."""
    names = dict(query(root, "select run_uuid, name from runs"))
    metrics: dict[str, dict[str, list[int]]] = {}
    for run, key, step in query(root, "select distinct run_uuid, key, step from metrics"):
        metrics.setdefault(str(names[run]), {}).setdefault(str(key), []).append(int(step))
    return {
        "runs": sorted(query(root, "select name, status from runs")),
        "versions": sorted(query(root, "select version, status from model_versions")),
        "aliases": sorted(query(root, "select alias, version from registered_model_aliases")),
        "logged models": sorted(
            (str(names.get(run)), status == LOGGED_MODEL_READY)
            for run, status in query(
                root,
                # MLflow keeps the rows of deleted models.
                "select source_run_id, status from logged_models where lifecycle_stage = 'active'",
            )
        ),
        "tags of versions": sorted(query(root, TAGS)),
        # Losses of steps that were done again are logged again; figures of an evaluation are not.
        "doubled figures": query(root, DOUBLED),
        "metrics": {
            run: {key: sorted(steps) for key, steps in sorted(keys.items())}
            for run, keys in sorted(metrics.items())
        },
    }


def query(root: Path, sql: str, *values: str) -> list[tuple[Any, ...]]:
    """Return rows of the tracker's database, which may not exist yet."""
    if not (root / "mlflow.db").is_file():
        return []
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as connection:
        return connection.execute(sql, values).fetchall()


def file_names(root: Path) -> Counter[str]:
    """Return how often each file name occurs, with a placeholder for ids and process ids."""
    return Counter(
        VARYING.sub("ID", str(path.relative_to(root)))
        for path in root.rglob("*")
        if path.is_file()
        and not path.name.startswith("mlflow.db-")
        and path.name not in IGNORED_FILES
    )


def digests(folder: Path, pattern: str) -> dict[str, str]:
    """Return the SHA-256 of files below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file() and path.name not in IGNORED_FILES
    }


def _finetune(root: Path, name: str) -> list[str]:
    return ["pipelines.finetune", "--name", name, "--config", str(root / "run.yaml")]


def _result_of(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text(encoding="utf-8"))
    for row in result["evaluation"]:
        # The kill may be on the other side of midnight.
        row.pop("date", None)
    # Running losses are those of the process, as its throughput is: a resumed one starts again.
    kept = ("name", "step", "corpora", "evaluation", "registered")
    return {key: result.get(key) for key in kept}


def _digest_of(corpus: Path) -> str:
    return str(json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))["digest"])


def _errors_of(check: Any, path: Path) -> list[str]:
    try:
        check(path)
    except (ValueError, OSError) as error:
        return [f"{path.name}: {error}"]
    return []
