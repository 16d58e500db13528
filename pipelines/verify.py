"""``skillnet verify``: hash everything again, from the weights back to the downloads.

    registry version ─ tag ─> serving.json ─> weights, tokenizer, captions
                                    │
                                    ├─> corpora (manifest digest) ─> shards ─> archives
                                    └─> MLflow run (digests of its dataset inputs)

Each arrow is a recorded hash that is compared with the bytes it stands for.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.config.resources import request_model
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional
from skillnet_platform.errors import UserError
from skillnet_platform.storage import archive_root, data_root, sha256_file
from skillnet_platform.storage.location import Place, below, content, local_folder, place

if TYPE_CHECKING:
    from pipelines.runs.model_source import ModelSource

State = Literal["ok", "altered", "absent"]


@dataclass
class VerifyConfig:
    """Verify a model and what it was made from.

    Args:
        model: a registry address, a run's name, id or folder, a checkpoint, or a saved model.
        data: directory or URI of prepared corpora; by default corpora below the run root.
        archives: directory of the downloads; by default archives below the run root.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    model: str = positional("models:/skillnet@champion")
    data: str | None = None
    archives: str | None = None
    tracking_uri: str | None = None


@dataclass(frozen=True)
class HashCheck:
    """One thing that was compared. ``absent``: it is not on this machine, nothing to compare."""

    what: str
    state: State
    detail: str


def verify(config: VerifyConfig) -> list[HashCheck]:
    """Compare every hash that is recorded for a model with the bytes it stands for.

    Raises:
        UserError: there is no such model.
    """
    from pipelines.runs import model_source

    try:
        source = model_source.resolve_model(config.model, config.tracking_uri)
    except UserError as problem:
        if "altered" not in str(problem):
            raise
        return [HashCheck("model", "altered", str(problem))]
    data = place(config.data, data_root())
    archives = local_folder(config.archives, archive_root(), "archives")
    checks = [_guarded("weights", lambda: _weights(source))]
    recorded: dict[str, str] = {}
    if source.bundle is not None:
        checks += _bundle(source, config.tracking_uri)
        from pipelines.serving.bundle import BUNDLE_MANIFEST
        from skillnet_platform.storage import read_json

        about = read_json(source.bundle / BUNDLE_MANIFEST)
        recorded = {e["corpus"]: e["corpus_digest"] for e in about["tasks"].values()}
    names = list(recorded) or sorted(set(source.corpora.values()))
    if source.run_id is not None:
        checks += _run(source, recorded, config.tracking_uri)
    if source.bundle is not None:
        checks.append(_tokenizer(source.bundle, data))
    made_from: dict[tuple[str, str], dict[str, str]] = {}
    for name in names:
        check, entries = _corpus(below(data, name), recorded.get(name))
        checks.append(check)
        # Corpora share downloads: each is hashed once.
        made_from |= {(entry["file"], entry["sha256"]): entry for entry in entries}
    others = _other_sources(names) if made_from else {}
    checks += [_source(entry, archives, others) for entry in made_from.values()]
    return checks


def _weights(source: "ModelSource") -> str:
    from skillnet.serialization import check_file, read_manifest

    manifest = read_manifest(source.weights)
    total = 0
    for name, entry in manifest["files"].items():
        check_file(source.weights, name, manifest)
        total += entry["bytes"]
    return f"{len(manifest['files'])} files, {total / 2**20:.1f} MiB in {source.weights}"


def _bundle(source: "ModelSource", uri: str | None) -> Iterator[HashCheck]:
    from pipelines.serving import bundle

    assert source.bundle is not None
    folder = source.bundle

    def files() -> str:
        about = bundle.check_bundle(folder)
        return f"{len(about['files'])} files, written by skillnet-platform {about['package']}"

    yield _guarded("bundle", files)
    if source.version is None:
        return
    from skillnet_platform.tracking import backend, registry

    def tag() -> str:
        client = backend.client(backend.resolve_uri(uri))
        name = source.name.removeprefix("models:/").split("@")[0].split("/")[0]
        tags = client.get_model_version(name or registry.MODEL_NAME, str(source.version)).tags
        _equal(
            "serving.json", sha256_file(folder / bundle.BUNDLE_MANIFEST), tags.get("serving_sha256")
        )
        _equal("weights", source.digest, tags.get("weights_digest"))
        return f"version {source.version} names these files"

    yield _guarded("registry", tag)


def _run(source: "ModelSource", recorded: dict[str, str], uri: str | None) -> Iterator[HashCheck]:
    from mlflow.exceptions import MlflowException

    from skillnet.serialization import read_manifest
    from skillnet_platform.tracking import backend

    try:
        run = backend.client(backend.resolve_uri(uri)).get_run(str(source.run_id))
    except MlflowException:
        yield HashCheck("run", "absent", f"no run {source.run_id} in this tracker")
        return
    tags = run.data.tags

    def corpora() -> str:
        for name, digest in recorded.items():
            if f"corpus.{name}" in tags:
                _equal(f"corpus {name} of the run", tags[f"corpus.{name}"], digest)
        return f"{run.info.run_name}: trained on the corpora that the model names"

    yield _guarded("run", corpora)
    model = Path(tags.get("run_dir", "")) / "model"
    if "run_dir" in tags and (model / "manifest.json").is_file() and model != source.weights:

        def same() -> str:
            theirs, ours = read_manifest(model)["files"], read_manifest(source.weights)["files"]
            for name, entry in ours.items():
                _equal(f"{name} of the run", theirs.get(name, {}).get("sha256"), entry["sha256"])
            return f"the weights are those of {model}"

        yield _guarded("run's model", same)


def _corpus(where: Place, digest: str | None) -> tuple[HashCheck, list[dict[str, str]]]:
    """The check of a corpus, and the sources that its manifest names."""
    from pipelines.shards.dataset import verify_corpus
    from pipelines.shards.files import open_shard_store

    what = f"corpus {Path(where).name}"
    if not open_shard_store(where).exists():
        return HashCheck(what, "absent", f"{where} does not exist"), []
    manifest: dict[str, Any] = {}

    def shards() -> str:
        manifest.update(verify_corpus(where))
        if digest is not None:
            _equal(f"{where}, the digest of its manifest", manifest["digest"], digest)
        listed = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        size = sum(shard["bytes"] for shard in listed) / 2**20
        return f"{len(listed)} shards, {manifest['rows_out']} rows, {size:.1f} MiB"

    return _guarded(what, shards), manifest.get("sources", [])


def _source(entry: dict[str, str], archives: Path, others: dict[str, str]) -> HashCheck:
    """One download of a corpus, or another source that this machine has at hand."""
    name = entry["file"]
    path = archives / name
    if path.is_file():
        return _guarded(name, lambda: _equal(str(path), sha256_file(path), entry["sha256"]))
    if name in others:
        return _guarded(name, lambda: _equal(name, others[name], entry["sha256"]))
    return HashCheck(name, "absent", f"not in {archives}")


def _other_sources(names: list[str]) -> dict[str, str]:
    """Sources of built-in corpora that are not downloads (the standard library): name -> hash."""
    from pipelines.corpora import BUILT_IN, find_corpus

    listed = [find_corpus(name).extra_sources() for name in names if name in BUILT_IN]
    return {entry["file"]: entry["sha256"] for entries in listed for entry in entries}


def _tokenizer(bundle: Path, data: Place) -> HashCheck:
    there = below(data, "tokenizer.json")
    found = content(there)
    if found is None:
        return HashCheck("tokenizer", "absent", f"{there} does not exist")
    mine = sha256_file(bundle / "tokenizer.json")
    return _guarded(
        "tokenizer", lambda: _equal(str(there), hashlib.sha256(found).hexdigest(), mine)
    )


def _equal(what: str, found: str | None, expected: str | None) -> str:
    """The hash, if both are the same; ValueError naming ``what`` otherwise."""
    if found != expected or found is None:
        raise UserError(f"{what} was altered: sha256 {found}, recorded is {expected}")
    return f"sha256 {found[:16]}…"


def _guarded(what: str, compare: Callable[[], str]) -> HashCheck:
    try:
        return HashCheck(what, "ok", compare())
    except ValueError as problem:
        return HashCheck(what, "altered", str(problem))


def show_verification(checks: list[HashCheck], model: str) -> None:
    """Print the checks as a table."""
    rows = [[check.what, check.state, check.detail] for check in checks]
    console.table(f"verify {model}", ["what", "state", ""], rows)


def _altered(checks: list[HashCheck]) -> list[HashCheck]:
    return [check for check in checks if check.state == "altered"]


@command(
    VerifyConfig,
    description="Hash everything again, from the weights back to the downloads, and compare "
    "with what was recorded. Exits with 1 if anything was altered.",
    example="skillnet verify models:/skillnet@champion",
    show=lambda result: show_verification(*result),
    to_json=lambda result: {"whole": not _altered(result[0]), "checks": result[0]},
    exit_code=lambda result: int(bool(_altered(result[0]))),
    resources=lambda config: request_model(config.model, config.data),
)
def main(config: VerifyConfig) -> tuple[list[HashCheck], str]:
    """Run ``skillnet verify``."""
    checks = verify(config)
    for check in _altered(checks):
        console.error(f"{check.what}: {check.detail}")
    absent = sum(check.state == "absent" for check in checks)
    if absent:
        console.note(f"{absent} of {len(checks)} are not on this machine and were not compared")
    return checks, config.model


if __name__ == "__main__":
    raise SystemExit(main())
