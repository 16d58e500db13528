"""Initial weights of a run: random ones, or those of a trained model of the same system.

A trained model provides the weights that both models have by name: stems, shared weights, skills
and heads of tasks that both know. The rest stays random and is reported.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config.run import FinetuneConfig
from pipelines.runs.layout import SETTINGS
from pipelines.runs.mirror import TRAINED
from pipelines.runs.model_source import ModelSource, load_source_model, resolve_model
from skillnet.config import SkillNetConfig
from skillnet.multitask_model import TaskModel
from skillnet.serialization import read_about, read_manifest
from skillnet.systems import build_system
from skillnet_platform import config as configuration
from skillnet_platform import storage
from skillnet_platform.errors import UserError
from skillnet_platform.storage.objects import is_uri

#: Keys that change the model's computation although all tensors may fit.
_MUST_EQUAL = ("num_layers", "num_heads", "skill_modules", "skill_every")
_NOT_SHAPE = ("tasks", "skills", "drop_path", "dropout")


@dataclass(frozen=True)
class InitReport:
    """Origin of a run's initial weights.

    Args:
        source: folder of the weights.
        digest: of the weights.
        taken: files all of whose weights came from the source.
        fresh: files with a weight that stayed random.
        corpora: corpus -> digest of the corpora that the source was trained on, as far as known.
    """

    source: str
    digest: str
    taken: list[str]
    fresh: list[str]
    corpora: dict[str, str | None]

    def summary(self) -> str:
        """Return one line for the console."""
        fresh = f"; random: {', '.join(self.fresh)}" if self.fresh else ""
        return f"started from {self.source} with {', '.join(self.taken)}{fresh}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for the run's result."""
        return dataclasses.asdict(self)


def resolve_init_weights(address: str, uri: str | None, run_dir: str) -> str:
    """Return the folder of the weights that ``--from`` names.

    A registered version and a model in an object store are copied below ``run_dir``: a download
    may be gone when the run resumes.

    Args:
        address: a path, a run or a registered version.
        uri: of the tracking server.
        run_dir: directory of runs.

    Raises:
        UserError: there is no such model.
    """
    # This is the only place that contacts the registry or a store for initial weights.
    source = resolve_model(address, uri)
    is_registered = source.version is not None or address.startswith(("models:/", "runs:/"))
    if not is_registered and not is_uri(address):
        return str(source.weights.absolute())
    copy = Path(run_dir) / ".starts" / source.digest[:16]
    if not (copy / "manifest.json").is_file():
        with storage.staging_directory(copy) as staging:
            shutil.copytree(source.weights, staging, dirs_exist_ok=True)
            # A comparison of runs reports the cost of training these weights.
            if source.run is not None and (source.run / TRAINED).is_file():
                shutil.copy(source.run / TRAINED, staging / TRAINED)
            if source.settings:
                storage.write_json(staging / SETTINGS, source.settings)
    return str(copy)


def load_init_weights(config: FinetuneConfig, model: TaskModel) -> InitReport | None:
    """Load the weights of ``init_from`` into a fresh model; averaged ones if its run kept them.

    Args:
        config: of the run.
        model: with random weights.

    Returns:
        A report, or None without ``init_from``.

    Raises:
        UserError: a model of another system, or weights that do not fit; names the tensor and
            the keys of the configuration that differ.
    """
    if not config.init_from:
        return None
    source, location = resolve_model(config.init_from), f"--from {config.init_from}"
    # Differences are collected first, to explain a tensor that does not fit.
    differing = _find_differences(config, source.weights, location)
    try:
        weights = dict(load_source_model(source).named_parameters())
        # Names of parameters that the source does not provide.
        fresh = set(model.load_partial(weights))
    except ValueError as error:
        keys = ", ".join(
            f"model.{key} {theirs} there and {ours} here" for key, theirs, ours in differing
        )
        raise UserError(f"{location}: {error}" + (f" ({keys})" if keys else "")) from None
    files = model.files_of()
    partial = sorted(file for file, names in files.items() if fresh & set(names))
    taken = sorted(set(files) - set(partial))
    if not taken:
        raise UserError(
            f"{location} has no weight that this model could start from; it holds "
            f"{', '.join(sorted(weights)[:3])}, …"
        )
    corpora = read_training_corpora(source)
    return InitReport(str(source.weights), source.digest, taken, partial, corpora)


def read_training_corpora(source: ModelSource) -> dict[str, str | None]:
    """Return corpus -> digest of the corpora that a model was trained on; {} if unknown.

    Args:
        source: a run, a bundle, or a copy of weights with the settings of their training.
    """
    copied = source.weights / SETTINGS
    settings = source.settings or (storage.read_json(copied) if copied.is_file() else {})
    corpora = settings.get("corpora") if isinstance(settings, dict) else None
    return dict(corpora) if isinstance(corpora, dict) else {}


def dry_run_init(config: FinetuneConfig) -> InitReport | None:
    """Load the initial weights into a model that is discarded; return the report."""
    if not config.init_from:
        return None
    return load_init_weights(config, build_system(config.system, config.model, config.options))


def _find_differences(
    config: FinetuneConfig, weights: Path, location: str
) -> list[tuple[str, Any, Any]]:
    """(key of the model section, value there, value here) of differences that may not fit.

    Raises:
        UserError: another system, or a difference after which weights fit but mean another thing.
    """
    about = read_about(weights, read_manifest(weights))
    system = about.get("system", "skillnet")
    if system != config.system:
        raise UserError(
            f"{location} holds a model of the system {system!r}, this run trains "
            f"{config.system!r}; give --system {system}, or start from a model of the same system"
        )
    here = configuration.to_dict(config.model)
    differing = [
        (f.name, about[f.name], here[f.name])
        for f in dataclasses.fields(SkillNetConfig)
        if f.name in about and f.name not in _NOT_SHAPE and about[f.name] != here[f.name]
    ]
    for key, theirs, ours in differing:
        if key in _MUST_EQUAL:
            raise UserError(
                f"{location} has model.{key} {theirs}, this run {ours}; give both the same"
            )
        if key == "vocab_size":
            raise UserError(
                f"{location} has model.vocab_size {theirs}, this run {ours}, so token ids would "
                "not mean the same; prepare all corpora with one tokenizer and give both its size"
            )
    return differing
