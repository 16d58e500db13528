"""What a run starts from: fresh weights, or those of a trained model of the same system.

A trained model gives what this one has by name: stems, shared weights, skills, and heads of tasks
that both know. The rest stays fresh, and is named.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config.run import FinetuneConfig
from pipelines.runs import model_source
from pipelines.runs.mirror import TRAINED
from skillnet.config import SkillNetConfig
from skillnet.multitask_model import TaskModel
from skillnet.serialization import read_about, read_manifest
from skillnet.systems import build_system
from skillnet_platform import config as configuration
from skillnet_platform import storage
from skillnet_platform.errors import UserError
from skillnet_platform.storage.objects import is_uri

#: Beside a copy of weights: the configuration that they were trained with.
SETTINGS = "settings.json"

#: Keys that change what a model computes though every tensor that both have may fit.
_SAME = ("num_layers", "num_heads", "skill_modules", "skill_every")
_NOT_SHAPE = ("tasks", "skills", "drop_path", "dropout")


@dataclass(frozen=True)
class Start:
    """What a run took over.

    Args:
        source: the folder of weights.
        digest: of them.
        taken: files all of whose weights came from there.
        fresh: files with a weight that stayed fresh.
    """

    source: str
    digest: str
    taken: list[str]
    fresh: list[str]

    def words(self) -> str:
        """One line for people."""
        fresh = f"; fresh: {', '.join(self.fresh)}" if self.fresh else ""
        return f"started from {self.source} with {', '.join(self.taken)}{fresh}"

    def plain(self) -> dict[str, Any]:
        """For the record."""
        return dataclasses.asdict(self)


def locate(given: str, uri: str | None, run_dir: str) -> str:
    """Folder of the weights that ``--from`` names: a path, a run or a registered version.

    A registered version, or one in a store, is copied below ``run_dir``: what was downloaded may be
    gone when the run goes on.

    Raises:
        UserError: there is no such model.
    """
    source = model_source.find(given, uri)
    if (
        source.version is None
        and not given.startswith(("models:/", "runs:/"))
        and not is_uri(given)
    ):
        return str(source.weights.absolute())
    kept = Path(run_dir) / ".starts" / source.digest[:16]
    if not (kept / "manifest.json").is_file():
        with storage.staging(kept) as aside:
            shutil.copytree(source.weights, aside, dirs_exist_ok=True)
            # What it took to train them: a comparison tells it.
            if source.run is not None and (source.run / TRAINED).is_file():
                shutil.copy(source.run / TRAINED, aside / TRAINED)
            if source.settings:
                storage.write_json(aside / SETTINGS, source.settings)
    return str(kept)


def start_model(config: FinetuneConfig, model: TaskModel) -> Start | None:
    """Give a fresh model the weights of ``init_from``, averaged ones if that run kept an average.

    Raises:
        UserError: a model of another system, or weights that do not fit; names the tensor and
            the keys of the configuration that differ.
    """
    if not config.init_from:
        return None
    source, where = model_source.find(config.init_from), f"--from {config.init_from}"
    differing = _differences(config, source.weights, where)
    try:
        given = dict(model_source.load(source).named_parameters())
        fresh = set(model.load_partial(given))
    except ValueError as problem:
        keys = ", ".join(
            f"model.{key} {there} there and {mine} here" for key, there, mine in differing
        )
        raise UserError(f"{where}: {problem}" + (f" ({keys})" if keys else "")) from None
    files = model.files_of()
    touched = sorted(file for file, names in files.items() if fresh & set(names))
    taken = sorted(set(files) - set(touched))
    if not taken:
        raise UserError(
            f"{where} has no weight that this model could start from; it holds "
            f"{', '.join(sorted(given)[:3])}, …"
        )
    return Start(str(source.weights), source.digest, taken, touched)


def preview(config: FinetuneConfig) -> Start | None:
    """What a run of this configuration takes over, found out on a model that is thrown away."""
    if not config.init_from:
        return None
    return start_model(config, build_system(config.system, config.model, config.options))


def _differences(config: FinetuneConfig, weights: Path, where: str) -> list[tuple[str, Any, Any]]:
    """(key of the model section, value there, value here) of what may keep weights from fitting.

    Raises:
        UserError: another system, or a difference after which weights fit and mean another thing.
    """
    told = read_about(weights, read_manifest(weights))
    system = told.get("system", "skillnet")
    if system != config.system:
        raise UserError(
            f"{where} holds a model of the system {system!r}, this run trains {config.system!r}; "
            f"give --system {system}, or start from a model of the same system"
        )
    here = configuration.to_dict(config.model)
    found = [
        (f.name, told[f.name], here[f.name])
        for f in dataclasses.fields(SkillNetConfig)
        if f.name in told and f.name not in _NOT_SHAPE and told[f.name] != here[f.name]
    ]
    for key, there, mine in found:
        if key in _SAME:
            raise UserError(f"{where} has model.{key} {there}, this run {mine}; give both the same")
        if key == "vocab_size":
            raise UserError(
                f"{where} has model.vocab_size {there}, this run {mine}, so tokens would not mean "
                "the same; prepare all corpora with one tokenizer and give both its size"
            )
    return found
