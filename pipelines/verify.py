"""``skillnet verify``: hash all files of a model again, from the weights back to the downloads.

    registry version ─ tag ─> manifest.json ─> weights, tokenizer, captions
                                    │
                                    ├─> corpora (manifest digest) ─> shards ─> archives
                                    │      └─> corpus of the rows, if a rule labelled them
                                    └─> MLflow run (digests of its dataset inputs)

Each arrow is a recorded hash that is compared with the hash of the present bytes.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.data.config.corpus_options import rewrite_corpus_options
from pipelines.training.config.resources import request_model
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import flatten_tree, positional_field
from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.storage import archive_root, read_json, sha256_file
from skillnet_platform.storage.location import (
    Location,
    join_location,
    read_if_exists,
    require_local_folder,
)

if TYPE_CHECKING:
    from pipelines.data.corpora import ExternalCorpus
    from pipelines.training.runs.model_source import ModelSource

State = Literal["ok", "altered", "absent"]


@dataclass
class VerifyConfig:
    """Options of ``skillnet verify``.

    Args:
        model: registry address, name, id or directory of a run, checkpoint, or saved model.
        data: directory or URI of prepared corpora; by default those of the model's run, else
            corpora below the run root.
        archives: directory of the downloads; by default ``archives`` under the run root.
        corpus: NAME=PATH of the data that an external corpus was prepared from, as given to
            ``skillnet prepare``; repeatable. Without it these files are not compared.
        options: name of an external corpus -> options of its format, as given to
            ``skillnet prepare``.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    model: str = positional_field("models:/skillnet@champion")
    data: str | None = None
    archives: str | None = None
    corpus: dict[str, str] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    tracking_uri: str | None = None


@dataclass(frozen=True)
class HashCheck:
    """Result of one comparison of hashes.

    Args:
        subject: what was hashed, for example "weights".
        state: "absent" if this machine does not have the files.
        detail: hash, counts, or the difference.
    """

    subject: str
    state: State
    detail: str


def verify(config: VerifyConfig) -> list[HashCheck]:
    """Compare every hash that is recorded for a model with the hash of the present bytes.

    Raises:
        UserError: there is no such model.
    """
    from pipelines.training.runs import model_source

    try:
        # The checks below name the altered file, which a check of all files at once cannot.
        source = model_source.resolve_model(config.model, config.tracking_uri, check_digest=False)
    except UserError as error:
        # Resolving a model checks hashes too; such a finding is a result of this command.
        if "altered" not in str(error):
            raise
        return [HashCheck("model", "altered", str(error))]
    data = source.find_corpora(config.data)
    archives = require_local_folder(config.archives, archive_root(), "archives")
    checks = [_make_check("weights", lambda: _check_weights(source))]
    recorded: dict[str, str] = {}
    if source.bundle is not None:
        checks += _check_bundle(source, config.tracking_uri)
        from pipelines.training.runs.bundle_manifest import read_bundle_manifest

        tasks = read_bundle_manifest(source.bundle)["tasks"].values()
        recorded = {entry["corpus"]: entry["corpus_digest"] for entry in tasks}
    names = list(recorded) or sorted(set(source.corpora.values()))
    if source.run_id is not None:
        checks += _check_run(source, recorded, config.tracking_uri)
    if source.bundle is not None:
        checks.append(_check_tokenizer(source.bundle, data))
    given = _open_given_corpora(config, names)
    downloads: dict[tuple[str, str], dict[str, str]] = {}
    user_checks: list[HashCheck] = []
    pending = [(name, recorded.get(name)) for name in names]
    for name, digest in pending:
        check, manifest = _check_corpus(join_location(data, name), digest)
        checks.append(check)
        sources = manifest.get("sources", [])
        if labelled := manifest.get("labelled"):
            # Its rows are those of another corpus, which leads to the downloads.
            origins = labelled["corpora"].items()
            pending += [each for each in origins if each not in pending]
        elif "reader" in manifest.get("preprocessing", {}):
            user_checks += _check_user_files(name, manifest, given.get(name))
        else:
            # Corpora share downloads: each is hashed once.
            downloads |= {(entry["file"], entry["sha256"]): entry for entry in sources}
    extra = _find_extra_sources([name for name, _ in pending]) if downloads else {}
    checks += [_check_source(entry, archives, extra) for entry in downloads.values()]
    return checks + user_checks


def _open_given_corpora(config: VerifyConfig, names: list[str]) -> "dict[str, ExternalCorpus]":
    """Open the data of the user that the command names."""
    from pipelines.data.corpora import open_external_corpus

    for key, given in (("corpus", config.corpus), ("options", config.options)):
        known = names if key == "corpus" else config.corpus
        if unknown := sorted(set(given) - set(known)):
            raise UserError(f"{key}.{unknown[0]}: no such corpus{suggest_name(unknown[0], known)}")
    return {
        name: open_external_corpus(name, place, config.options.get(name))
        for name, place in config.corpus.items()
    }


def _check_weights(source: "ModelSource") -> str:
    from skillnet.serialization import check_file, read_manifest

    manifest = read_manifest(source.weights)
    total = 0
    for name, entry in manifest["files"].items():
        check_file(source.weights, name, manifest)
        total += entry["bytes"]
    return f"{len(manifest['files'])} files, {total / 2**20:.1f} MiB in {source.weights}"


def _check_bundle(source: "ModelSource", uri: str | None) -> Iterator[HashCheck]:
    from pipelines.serving import bundle

    assert source.bundle is not None
    folder = source.bundle

    def files() -> str:
        about = bundle.read_bundle_manifest(folder)
        # The files of the weights have a check of their own.
        bundle.check_files(folder, about, about["files"])
        return f"{len(about['files'])} files, written by skillnet-platform {about['package']}"

    yield _make_check("bundle", files)
    # Only the registry has tags to compare; a folder has none.
    if source.version is None:
        return
    from skillnet_platform.tracking import backend, champion, registry

    def tag() -> str:
        client = backend.create_client(backend.resolve_uri(uri))
        name = source.name.removeprefix("models:/").split("@")[0].split("/")[0]
        tags = client.get_model_version(name or champion.MODEL_NAME, str(source.version)).tags
        _require_equal(
            "manifest.json", sha256_file(folder / bundle.MANIFEST), tags.get("manifest_sha256")
        )
        _require_equal("weights", source.digest, tags.get("weights_digest"))
        found = registry.digest_files(folder.parents[1])
        _require_equal("a file of the version", found, tags.get(registry.DIGEST_TAG))
        return f"version {source.version} names these files"

    yield _make_check("registry", tag)


def _check_run(
    source: "ModelSource", recorded: dict[str, str], uri: str | None
) -> Iterator[HashCheck]:
    from mlflow.exceptions import MlflowException

    from skillnet_platform.tracking import backend

    try:
        run = backend.create_client(backend.resolve_uri(uri)).get_run(str(source.run_id))
    except MlflowException:
        yield HashCheck("run", "absent", f"no run {source.run_id} in this tracker")
        return
    tags = run.data.tags

    def corpora() -> str:
        for name, digest in recorded.items():
            if f"corpus.{name}" in tags:
                _require_equal(f"corpus {name} of the run", tags[f"corpus.{name}"], digest)
        return f"{run.info.run_name}: trained on the corpora that the model names"

    yield _make_check("run", corpora)
    model = Path(tags.get("run_dir", "")) / "model"
    # Without the last condition, a run's model would be compared with itself.
    if "run_dir" in tags and (model / "manifest.json").is_file() and model != source.weights:
        yield _make_check("run's model", lambda: compare_with_run(source.weights, model))


def compare_with_run(weights: Path, model: Path) -> str:
    """Compare a registered model with the model of its run; return the observation.

    A registered model may have fewer tasks than its run: untrained tasks and auxiliary ones have no
    head in it. The rest must be equal.

    Args:
        weights: folder of the registered model.
        model: folder of the run's model.

    Raises:
        UserError: they differ; names the file or key.
    """
    from skillnet.serialization import read_manifest

    files = read_manifest(model)["files"]
    for name, entry in read_manifest(weights)["files"].items():
        if name != "config.json":
            _require_equal(f"{name} of the run", files.get(name, {}).get("sha256"), entry["sha256"])
    run_values = flatten_tree(read_json(model / "config.json"))
    for key, value in flatten_tree(read_json(weights / "config.json")).items():
        if run_values.get(key) != value:
            raise UserError(
                f"{key} of the run was altered: {run_values.get(key)}, registered is {value}"
            )
    return f"the weights equal those in {model}"


def _check_corpus(location: Location, digest: str | None) -> tuple[HashCheck, dict[str, Any]]:
    """Check a corpus; return the result and its manifest, which is empty if it is not valid."""
    from pipelines.data.shards.dataset import verify_corpus
    from pipelines.data.shards.files import open_shard_store

    subject = f"corpus {Path(location).name}"
    if not open_shard_store(location).exists():
        return HashCheck(subject, "absent", f"{location} does not exist"), {}
    manifest: dict[str, Any] = {}

    def shards() -> str:
        # verify_corpus ignores the records of earlier checks (decision 19), so it finds damage
        # after the first read.
        manifest.update(verify_corpus(location))
        # A manifest that agrees with its shards may still be of a later preparation.
        if digest is not None:
            _require_equal(f"{location}, the digest of its manifest", manifest["digest"], digest)
        splits = manifest["splits"].values()
        size = sum(split["bytes"] for split in splits) / 2**20
        shards = sum(split["shards"] for split in splits)
        return f"{shards} shards, {manifest['rows_out']} rows, {size:.1f} MiB"

    return _make_check(subject, shards), manifest


def _check_user_files(
    name: str, manifest: dict[str, Any], corpus: "ExternalCorpus | None"
) -> Iterator[HashCheck]:
    """Check the files of the user that a corpus was prepared from.

    Their place is no part of a manifest, because a manifest travels with its corpus.
    """
    recorded = manifest["preprocessing"]
    if paired := manifest.get("paired"):
        detail = f"it was joined from {' and '.join(paired['corpora'])}; verify a run on each"
        yield HashCheck(f"files of {name}", "absent", detail)
        return
    if corpus is None:
        count = len(manifest["sources"])
        place = f"{name}={recorded['reader']}:PATH"
        detail = f"{count} recorded hashes; give --corpus {place} to compare them"
        yield HashCheck(f"files of {name}", "absent", detail)
        return
    for key, value in corpus.preprocessing().items():
        if recorded.get(key) != value:
            raise UserError(
                f"corpus.{name}: {key} is {value}, and was {recorded.get(key)} when the corpus was "
                "prepared. Give the format and the options of skillnet prepare"
            )
    present = {entry["file"]: entry["sha256"] for entry in corpus.extra_sources()}
    for entry in manifest["sources"]:
        file, expected = entry["file"], entry["sha256"]
        found = present.pop(file, None)
        compare = partial(_require_equal, f"{corpus.source.uri}, {file}", found, expected)
        yield _make_check(f"{name}: {file}", compare)
    for file in present:
        yield HashCheck(f"{name}: {file}", "altered", f"{corpus.source.uri}, {file} is new")


def _check_source(entry: dict[str, str], archives: Path, extra: dict[str, str]) -> HashCheck:
    """Check one download of a corpus, or another source on this machine."""
    name = entry["file"]
    path = archives / name
    if path.is_file():
        return _make_check(
            name, lambda: _require_equal(str(path), sha256_file(path), entry["sha256"])
        )
    if name in extra:
        return _make_check(name, lambda: _require_equal(name, extra[name], entry["sha256"]))
    return HashCheck(name, "absent", f"not in {archives}")


def _find_extra_sources(names: list[str]) -> dict[str, str]:
    """Return name -> hash of sources that are not downloads, such as the standard library."""
    from pipelines.data.corpora import find_corpus, is_built_in

    listed = [find_corpus(name).extra_sources() for name in names if is_built_in(name)]
    return {entry["file"]: entry["sha256"] for entries in listed for entry in entries}


def _check_tokenizer(bundle: Path, data: Location) -> HashCheck:
    location = join_location(data, "tokenizer.json")
    data_bytes = read_if_exists(location)
    if data_bytes is None:
        return HashCheck("tokenizer", "absent", f"{location} does not exist")
    expected = sha256_file(bundle / "tokenizer.json")
    return _make_check(
        "tokenizer",
        lambda: _require_equal(str(location), hashlib.sha256(data_bytes).hexdigest(), expected),
    )


def _require_equal(subject: str, actual: str | None, expected: str | None) -> str:
    """Return the hash if both are equal; raise UserError with the subject otherwise."""
    # Two absent hashes are equal, but nothing was compared.
    if actual != expected or actual is None:
        raise UserError(f"{subject} was altered: sha256 {actual}, recorded is {expected}")
    return f"sha256 {actual[:16]}…"


def _make_check(subject: str, compare: Callable[[], str]) -> HashCheck:
    try:
        return HashCheck(subject, "ok", compare())
    except ValueError as error:
        # One altered file must not hide the state of the others.
        return HashCheck(subject, "altered", str(error))


def show_verification(checks: list[HashCheck], model: str) -> None:
    """Print the checks as a table.

    Args:
        checks: results of :func:`verify`.
        model: address of the model.
    """
    rows = [[check.subject, check.state, check.detail] for check in checks]
    console.print_table(f"verify {model}", ["subject", "state", ""], rows)


def _altered(checks: list[HashCheck]) -> list[HashCheck]:
    return [check for check in checks if check.state == "altered"]


@command(
    VerifyConfig,
    description="Hash all files of a model again, from the weights back to the downloads, and "
    "compare them with the recorded hashes. Exits with 1 if a file was altered.",
    example="skillnet verify models:/skillnet@champion\n"
    "skillnet verify first-run --corpus mine=folder:/data/mine",
    rewrite_arguments=rewrite_corpus_options,
    show=lambda result: show_verification(*result),
    to_json=lambda result: {"verified": not _altered(result[0]), "checks": result[0]},
    exit_code=lambda result: int(bool(_altered(result[0]))),
    resources=lambda config: request_model(config.model, config.data),
)
def main(config: VerifyConfig) -> tuple[list[HashCheck], str]:
    """Run ``skillnet verify``."""
    checks = verify(config)
    for check in _altered(checks):
        console.print_error(f"{check.subject}: {check.detail}")
    absent = sum(check.state == "absent" for check in checks)
    if absent:
        console.print_note(
            f"{absent} of {len(checks)} are not on this machine and were not compared"
        )
    return checks, config.model


if __name__ == "__main__":
    raise SystemExit(main())
