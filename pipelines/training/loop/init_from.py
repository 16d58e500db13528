"""Initial weights of a run: random ones, or those of a trained model.

A trained model of the same system provides the weights that both models have by name: stems,
shared weights, skills and heads of tasks that both know. The rest stays random and is reported. A
head whose classes or symbols are not those of the corpus starts from random weights. Weights of
another system or format are read by packages that register a :class:`WeightReader`.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from pipelines.data.shards.dataset import PreparedCorpus
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs.layout import SETTINGS, TRAINED
from pipelines.training.runs.model_source import (
    ModelSource,
    load_source_model,
    read_training_settings,
    resolve_model,
)
from pipelines.training.runs.vocabulary_match import (
    align_outputs,
    describe_other_tokenizer,
    list_names,
    read_corpus_names,
    reads_tokens,
)
from skillnet.config import INITIAL_SETTINGS, NAME_SETTINGS, SkillNetConfig
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.serialization import read_about, read_config, read_manifest, read_vocabulary
from skillnet.skill_copies import is_unset_weight, resize_positions
from skillnet.skills import Task, find_task
from skillnet.vocabulary import ModelVocabulary, find_order
from skillnet_files.entry_points import find_entries
from skillnet_platform import config as configuration
from skillnet_platform import storage
from skillnet_platform.errors import UserError
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.storage.directories import is_uri
from skillnet_platform.terminal_text import format_plural

if TYPE_CHECKING:
    from pipelines.data.preprocessing.task_template import TaskTemplate

#: Entry points of readers of initial weights in other formats, and of other systems.
WEIGHTS = "skillnet.weights"
#: Beside a copy of initial weights: the address that it was made from.
ORIGIN = "origin.json"
#: Keys that change the model's computation although all tensors may fit.
_MUST_EQUAL = (
    "num_layers",
    "num_heads",
    "skill_modules",
    "skill_every",
    "skill_rank",
    "bias",
    "norm_position",
    "norm_eps",
    "stem_norm",
    "class_token",
)
_NOT_SHAPE = (*NAME_SETTINGS, "drop_path", *INITIAL_SETTINGS)


class WeightReader(Protocol):
    """Reader of initial weights that a run cannot take over as they are."""

    def import_weights(self, address: str, run_dir: str) -> tuple[Path, Path] | None:
        """Convert the weights of ``--from``; None if they have another format.

        Args:
            address: as the user gave it.
            run_dir: directory of runs.

        Returns:
            Folder of the saved model, and folder of its source.
        """

    def reads_system(self, system: str, config: FinetuneConfig) -> bool:
        """Return whether this reader starts a run from models of a system."""

    def describe_settings(
        self, config: FinetuneConfig, source: SkillNetConfig, location: str
    ) -> str:
        """Return how a run must differ to start from a model, with the options; "" if it fits."""

    def describe_sizes(
        self, config: FinetuneConfig, source: SkillNetConfig, corpora: Iterable[tuple[str, str]]
    ) -> str:
        """Return the options that prepare corpora, (name, modality), for a model."""

    def load_copies(
        self, config: FinetuneConfig, model: TaskModel, weights: Mapping[str, Tensor]
    ) -> tuple[set[str], list[str]]:
        """Load weights of the other system.

        Args:
            config: settings of the run.
            model: receives the weights.
            weights: parameter name of the other system -> value.

        Returns:
            Names of parameters that stay random, and lines for the console.
        """

    def complete_template(self, template: "TaskTemplate", address: str) -> "TaskTemplate":
        """Return the file of ``skillnet init-task --from`` with the settings of the weights."""


def list_weight_readers() -> list[WeightReader]:
    """Return the readers of all installed packages."""
    return [entry.load() for entry in find_entries(WEIGHTS).values()]


def find_weight_reader(system: str, config: FinetuneConfig) -> WeightReader | None:
    """Return the reader that starts a run from models of a system; None if none does.

    Args:
        system: registered kind of the initial weights.
        config: settings of the run.
    """
    return next((each for each in list_weight_readers() if each.reads_system(system, config)), None)


def format_options(settings: Mapping[str, Any]) -> str:
    """Return settings as words of a command line.

    Args:
        settings: dotted key -> value.
    """
    return " ".join(f"--{key} {format_option_value(value)}" for key, value in settings.items())


def format_option_value(value: Any) -> str:
    """Return a value as a word of a command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class InitReport:
    """Origin of a run's initial weights.

    Args:
        source: folder of the weights.
        digest: SHA-256 of the weights.
        taken: files all of whose weights came from the source.
        fresh: files that a task activates with a weight that stayed random.
        corpora: corpus -> digest of the corpora that the source was trained on, as far as known.
        new_heads: task -> why its head starts from random weights although the source has one.
        trained_tasks: tasks all of whose weights came from a source that is trained for them.
        resized: position weight -> change of its grid, for inputs of another size.
        noise: a line for each skill that was copied with noise.
    """

    source: str
    digest: str
    taken: list[str]
    fresh: list[str]
    corpora: dict[str, str | None]
    new_heads: dict[str, str] = field(default_factory=dict)
    trained_tasks: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    noise: list[str] = field(default_factory=list)

    def describe(self) -> list[str]:
        """Return lines for the console: the origin, new heads, and positions of other sizes."""
        fresh = f"; random: {', '.join(self.fresh)}" if self.fresh else ""
        # A model of many skills has hundreds of files; result.json names those that were taken.
        taken = format_plural(len(self.taken), "file")
        origin = f"started from {find_origin(self.source)} with {taken}{fresh}"
        return [
            origin,
            *(f"{task}: {reason}" for task, reason in self.new_heads.items()),
            *(f"{name}: interpolated from {change}" for name, change in self.resized.items()),
            *self.noise,
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for the run's result."""
        return dataclasses.asdict(self)


def resolve_init_weights(address: str, uri: str | None, run_dir: str) -> str:
    """Return the folder of the weights that ``--from`` names.

    A registered version and a model in an object store are copied below ``run_dir``: a download
    may be gone when the run resumes. A checkpoint of a library is converted to a model there.

    Args:
        address: a path, a run, a registered version, or a checkpoint of transformers or timm.
        uri: address of the tracking server.
        run_dir: directory of runs.

    Raises:
        UserError: there is no such model.
    """
    # This is the only place that contacts the registry, a store or the hub for initial weights.
    for reader in list_weight_readers():
        imported = reader.import_weights(address, run_dir)
        if imported is not None:
            copy, checkpoint = imported
            return record_origin(copy, address, checkpoint)
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
    return record_origin(copy, address)


def record_origin(copy: Path, address: str, checkpoint: Path | None = None) -> str:
    """Write what a copy of initial weights was made from beside it; return the copy's folder.

    Args:
        copy: folder of the weights, whose name means nothing to the user.
        address: as the user gave it.
        checkpoint: folder of a library's checkpoint.
    """
    record = {"address": str(SecretUri(address))}
    if checkpoint is not None:
        record["checkpoint"] = str(checkpoint.absolute())
    storage.write_json(copy / ORIGIN, record)
    return str(copy)


def find_origin(weights: str) -> str:
    """Return the address that a copy of initial weights was made from; other folders unchanged.

    Args:
        weights: folder of the weights.
    """
    return _read_origin(weights).get("address", weights)


def _read_origin(weights: str) -> dict[str, str]:
    # A damaged record must not hide the message that names the weights.
    with contextlib.suppress(ValueError, OSError):
        found = storage.read_json(Path(weights) / ORIGIN)
        if isinstance(found, dict):
            return {key: value for key, value in found.items() if isinstance(value, str)}
    return {}


def inherit_reference_tasks(config: FinetuneConfig, weights: str) -> FinetuneConfig:
    """Return the run with the reference tasks of the model that it starts from.

    A baseline that trains fewer tasks than its pretraining was made for keeps the size of the
    weights. Tasks that the configuration gives stay.

    Args:
        config: settings of the run.
        weights: folder of the initial weights.
    """
    if config.system == "skillnet" or config.model.reference_tasks:
        return config
    # A damaged folder is reported when its weights are read.
    with contextlib.suppress(ValueError, OSError):
        start, _, _ = read_config(Path(weights), read_manifest(Path(weights)))
        model = dataclasses.replace(config.model, reference_tasks=start.reference_tasks)
        return dataclasses.replace(config, model=model)
    return config


def find_untouched_files(config: FinetuneConfig, unused: Collection[str]) -> list[str]:
    """Return the files of initial weights that a run takes over as they are, without reading them.

    Args:
        config: settings of the run.
        unused: files, without suffix, that no task of the run uses.

    Raises:
        UserError: there is no such model.
    """
    if not config.init_from:
        return []
    source = resolve_model(config.init_from)
    manifest = read_manifest(source.weights)
    if find_weight_reader(read_about(source.weights, manifest).get("system", "skillnet"), config):
        return []
    # Averages of a checkpoint replace its weights, and both are read for it.
    listed = manifest["files"].keys()
    return [
        file
        for file in sorted(unused)
        if f"{file}.safetensors" in listed and f"average-{file}.safetensors" not in listed
    ]


def load_init_weights(
    config: FinetuneConfig,
    model: TaskModel,
    corpora: Mapping[str, PreparedCorpus],
    untouched: Collection[str] = (),
) -> InitReport | None:
    """Load the weights of ``init_from`` into a fresh model; averaged ones if its run kept them.

    Args:
        config: settings of the run.
        model: with random weights, and the vocabulary of its corpora; it inherits the vocabulary
            of weights that the corpora do not concern.
        corpora: task -> its corpus.
        untouched: files that are mapped, see :func:`find_untouched_files`.

    Returns:
        A report, or None without ``init_from``.

    Raises:
        UserError: a model of another system or tokenizer, or weights that do not fit; names the
            tensor and the keys of the configuration that differ.
    """
    if not config.init_from:
        return None
    source, location = resolve_model(config.init_from), f"--from {find_origin(config.init_from)}"
    # Differences are collected first, to explain a tensor that does not fit.
    differing, reader = _find_differences(config, source, location, corpora)
    start = load_source_model(source, untouched)
    new_heads = _match_heads(config, start, corpora)
    try:
        found = {
            name: parameter
            for name, parameter in start.named_parameters()
            if not any(name.startswith(f"heads.{task}.") for task in new_heads)
            and not is_unset_weight(name, start.config)
        }
        model.share_files(start)
        weights, resized = resize_positions(found, start.config, model.config)
        noise: list[str] = []
        # Names of parameters that the source does not provide.
        if reader is None:
            fresh = set(model.load_partial(weights))
        else:
            fresh, noise = reader.load_copies(config, model, weights)
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
    inherited = start.vocabulary.restrict_to(model.config.tasks)
    model.vocabulary = ModelVocabulary(
        model.vocabulary.tokenizer or inherited.tokenizer,
        {**inherited.outputs, **model.vocabulary.outputs},
        {**inherited.scales, **model.vocabulary.scales},
    )
    active = {
        task: {name for name, _ in model.active_parameters(task)} for task in model.config.tasks
    }
    trained_tasks = [
        task
        for task, names in active.items()
        if task not in source.untrained and fresh.isdisjoint(names)
    ]
    # Skills and stems that no task activates are left out of the final model.
    used = set[str]().union(*active.values())
    return InitReport(
        source=str(source.weights),
        digest=source.digest,
        taken=taken,
        fresh=[file for file in partial if not used.isdisjoint(files[file])],
        corpora=read_training_corpora(source),
        new_heads=new_heads,
        trained_tasks=trained_tasks,
        resized=resized,
        noise=noise,
    )


def _match_heads(
    config: FinetuneConfig, start: TaskModel, corpora: Mapping[str, PreparedCorpus]
) -> dict[str, str]:
    """Give the heads of a trained model the order of the corpora; find those that do not fit.

    Returns:
        Task -> why the head of the trained model does not fit the corpus.

    Raises:
        UserError: the head of such a task is not trained, or a frozen head would be reordered.
    """
    new_heads = {}
    trainable = config.training.trainable
    for task, corpus in corpora.items():
        if task not in start.config.tasks:
            continue
        reason = _describe_other_outputs(start, task, config.model.tasks[task], corpus)
        is_frozen = bool(trainable) and f"head-{task}" not in trainable
        if reason is None:
            known = start.vocabulary.outputs.get(task)
            align_outputs(start, task, corpus)
            # A frozen file keeps its bytes, which growth proves after the training.
            if is_frozen and known != start.vocabulary.outputs.get(task):
                raise UserError(
                    f"tasks.{task}: the corpus {corpus.name} lists the names of "
                    f"the trained model in another order, and head-{task} is frozen. Give the task "
                    f"a corpus that lists them as {list_names(known or ())}"
                )
        elif is_frozen or config.tasks[task].eval_only:
            state = "its head is frozen" if is_frozen else "the task is only evaluated"
            raise UserError(
                f"tasks.{task}: {reason}, and {state}. Give it a corpus with the names of the "
                "trained model, or train it"
            )
        else:
            new_heads[task] = f"{reason}; its head starts from random weights"
    return new_heads


def _describe_other_outputs(
    start: TaskModel, task: str, spec: Task, corpus: PreparedCorpus
) -> str | None:
    """Return how the outputs of a trained head differ from those of a corpus; None if they fit."""
    old, objective = start.config.tasks[task], find_objective(spec.objective)
    listed = objective.listed
    if old.objective != spec.objective:
        return f"the model was trained for {old.objective}, this run trains {spec.objective}"
    if objective.read_scale(corpus.manifest) != start.vocabulary.scales.get(task):
        return f"the model was trained for values of another scale than those of {corpus.name}"
    if listed is None:
        return None
    known, names = start.vocabulary.outputs.get(task), read_corpus_names(corpus, spec)
    if known and names:
        if find_order(names, known) is not None:
            return None
        return (
            f"the model was trained for the {listed} {list_names(known)}; the corpus "
            f"{corpus.name} has {list_names(names)}"
        )
    if old.outputs != spec.outputs:
        return f"the model was trained for {old.outputs} {listed}, this run has {spec.outputs}"
    return None


def read_training_corpora(source: ModelSource) -> dict[str, str | None]:
    """Return corpus -> digest of the corpora that a model was trained on; {} if unknown.

    Args:
        source: a run, a bundle, or a copy of weights with the settings of their training.
    """
    corpora = read_training_settings(source).get("corpora")
    return dict(corpora) if isinstance(corpora, dict) else {}


def check_init_settings(config: FinetuneConfig, opened: Mapping[str, PreparedCorpus]) -> None:
    """Check that the sizes and the tokenizer of a run are those of its initial weights.

    Corpora that could not be opened are not compared: a missing one is reported later.

    Args:
        config: settings of the run; without ``init_from`` nothing is checked.
        opened: corpus name -> corpus, as far as they are open.

    Raises:
        UserError: they differ; one message names every setting to give and the corpora to prepare.
    """
    if config.init_from:
        location = f"--from {find_origin(config.init_from)}"
        tasks = config.tasks.items()
        corpora = {name: opened[task.corpus] for name, task in tasks if task.corpus in opened}
        _find_differences(config, resolve_model(config.init_from), location, corpora)


def _find_differences(
    config: FinetuneConfig,
    source: ModelSource,
    location: str,
    corpora: Mapping[str, PreparedCorpus],
) -> tuple[list[tuple[str, Any, Any]], WeightReader | None]:
    """Return differences that may not fit, and the reader of weights of another system.

    A difference is (key of the model section, value there, value here).

    Raises:
        UserError: another system or tokenizer, or differences after which weights fit but mean
            another thing; names all of them.
    """
    weights = source.weights
    about = read_about(weights, read_manifest(weights))
    system = about.get("system", "skillnet")
    reader = find_weight_reader(system, config)
    start, _, _ = read_config(weights, read_manifest(weights))
    if reader is None and system != config.system:
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
    if reader is None:
        settings = _describe_unequal(differing, start, location)
    else:
        settings = reader.describe_settings(config, start, location)
    prepared = _describe_corpora(config, source, start, location, corpora, reader)
    if settings and prepared:
        raise UserError(f"{settings} after a new preparation. {prepared}")
    if settings or prepared:
        raise UserError(settings or prepared)
    return differing, reader


def _describe_unequal(
    differing: list[tuple[str, Any, Any]], start: SkillNetConfig, location: str
) -> str:
    """Return the settings that must be those of a model of the same system; "" if they are."""
    reads_ids = any("token" in task.stems for task in start.tasks.values())
    keys = {*_MUST_EQUAL, *(("vocab_size",) if reads_ids else ())}
    unequal = {key: (theirs, ours) for key, theirs, ours in differing if key in keys}
    if not unequal:
        return ""
    found = ", ".join(
        f"model.{key} {theirs}, this run {ours}" for key, (theirs, ours) in unequal.items()
    )
    options = format_options({f"model.{key}": theirs for key, (theirs, _) in unequal.items()})
    more = ", so token ids would not mean the same" if "vocab_size" in unequal else ""
    return f"{location} has {found}{more}; give {options}"


def _describe_corpora(
    config: FinetuneConfig,
    source: ModelSource,
    start: SkillNetConfig,
    location: str,
    corpora: Mapping[str, PreparedCorpus],
    reader: WeightReader | None,
) -> str:
    """Return which corpora to prepare again for initial weights; "" if they fit.

    Raises:
        UserError: the weights have fewer tokens than a corpus, and no known tokenizer.
    """
    vocabulary = read_vocabulary(source.weights, read_manifest(source.weights))
    tasks = config.model.tasks
    readers = [each for task, each in corpora.items() if reads_tokens(find_task(task, tasks))]
    address = str(config.init_from)
    origin, checkpoint = find_origin(address), _read_origin(address).get("checkpoint")
    found = describe_other_tokenizer(
        vocabulary, readers, source.weights, origin, list(corpora.values()), checkpoint
    )
    has_tokens = any("token" in task.stems for task in start.tasks.values())
    for corpus in readers if has_tokens and not found else ():
        count = (corpus.manifest.get("tokenizer") or {}).get("vocab_size", 0)
        if count > start.vocab_size:
            remedy = "Give weights of the tokenizer of the corpus"
            if checkpoint is not None:
                remedy = f"Put the tokenizer.json of the checkpoint into {checkpoint}"
            raise UserError(
                f"{location} has {start.vocab_size} tokens, and {corpus.path} was prepared with "
                f"{count}. {remedy}, and run the command again"
            )
    named = dict.fromkeys((corpus.name, corpus.modality) for corpus in corpora.values())
    sizes = "" if reader is None else reader.describe_sizes(config, start, named)
    return f"{found or (sizes and 'Prepare them with')} {sizes}".strip()
