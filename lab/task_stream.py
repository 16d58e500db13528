"""The study of a stream of tasks: one base gets further tasks one after the other, by many arms.

    skillnet prepare --config prepare/stream
    python -m lab.task_stream --config studies/stream --keep lab/results
    skillnet compare lab/results/stream

:mod:`lab.stream_arms` describes the arms. A cell is a fold, an arm and a label fraction; it is one
run of the system ``ARM-PERCENT`` of a study, such as ``grow-100``. The last folds are pilots: the
learning rate of each system is chosen on their validation rows, and they have no cell. After each
cell the study's two kept files have its sums, and this command continues from them on another
machine. Their entry ``stream`` has the costs of each cell, the scores of its tasks when they were
learned, and the digests of their outputs.

<run root>/<name>/
  bases/   bases of each fold, ordinary runs
  runs/    a folder per cell, without models
  .cells/  models of the cells that are being trained
"""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from pipelines.data.config.folds import draw_unit
from pipelines.data.shards.dataset import open_corpus
from pipelines.finetune import run_end_to_end
from pipelines.training.config.run import FinetuneConfig, TaskTraining
from pipelines.training.loading.samplers import BLOCK
from pipelines.training.runs.layout import CONFIG, RESULT, TRAINED
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.cli import run_command
from skillnet_platform.config.bounds import PartialFraction, PositiveCount, require_bounds
from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.storage import data_root, read_json, write_json
from skillnet_platform.storage.location import join_location, parse_location
from skillnet_platform.storage.locks import LockHeldError, hold_lock
from skillnet_platform.tracking import TrackingConfig
from skillnet_platform.tracking.source_commit import find_source_commit
from skillnet_studies.config.study import STUDY_FILE, StudyConfig, SystemConfig, shift_seed
from sweeps.trials.trial import Trial, TrialOutcome

if TYPE_CHECKING:
    from lab.stream_arms import ArmModels, ArmTraining, StreamCell
    from skillnet_studies.analysis.finished_runs import FinishedRun
    from skillnet_studies.study.tuning import TuningResult

#: Entry of the kept file, and file of a cell: its costs and observations.
RECORD, RECORD_FILE = "stream", "stream.json"
#: Arms whose growths, one by one, are those of another arm.
SAME_TUNING = {"merge": "grow"}
#: Arms that continue from the dense base, and those that have its settings.
DENSE_BASED = ("sequential", "replay")
DENSE_ARMS = (*DENSE_BASED, "plain")
#: Of added tasks, as in ``configs/grow``.
LABEL_SMOOTHING = 0.1


def name_system(arm: str, share: float) -> str:
    """Return the label of an arm with a label fraction, such as ``grow-10``."""
    return f"{arm}-{100 * share:g}"


@dataclass
class StreamPlan:
    """The stream and its arms.

    Args:
        tasks: corpora of classes; each is an added task of the same name.
        steps: optimizer steps of each added task.
        batch_size: rows of a batch of an added task.
        memory: fraction of the rows of old tasks that ``replay`` keeps.
        arms: name of an arm, see :mod:`lab.stream_arms` -> its fractions of the labelled rows of
            added tasks.
        dense: options and settings of the dense base, and of dense models per task.
        only_folds: folds that this call runs, to divide a study among machines; empty runs all.
    """

    tasks: list[str] = field(default_factory=list)
    steps: PositiveCount = 160
    batch_size: PositiveCount = 64
    memory: PartialFraction = 0.1
    arms: dict[str, list[Annotated[float, Interval(gt=0, le=1)]]] = field(default_factory=dict)
    dense: SystemConfig = field(default_factory=lambda: SystemConfig("dense"))
    only_folds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_bounds(self, "stream.")
        if self.steps % BLOCK:
            raise UserError(
                f"stream.steps: {self.steps} is no multiple of {BLOCK}, so joint and replay would "
                f"give some tasks more steps than others. Give {BLOCK * (self.steps // BLOCK + 1)}"
            )

    def list_fractions(self) -> dict[float, list[str]]:
        """Return label fraction -> its arms."""
        shares = dict.fromkeys(share for own in self.arms.values() for share in own)
        return {share: [arm for arm, own in self.arms.items() if share in own] for share in shares}

    def order_tasks(self, fold: int) -> list[str]:
        """Return the added tasks in the order of a fold, which its number alone decides."""
        return sorted(self.tasks, key=lambda task: draw_unit(f"order of fold {fold}", "", task))


@dataclass
class StreamConfig(StudyConfig):
    """The study of a stream of tasks. Its systems follow from ``stream``.

    ``run`` trains the base. Every system tries ``tuning.rates`` on as many pilot folds as
    ``tuning.seeds`` has seeds: those of ``run.fold`` after the first ``folds``.
    """

    stream: StreamPlan = field(default_factory=StreamPlan)

    def __post_init__(self) -> None:
        self.systems = {
            name_system(arm, share): SystemConfig(
                "dense" if arm in DENSE_ARMS else "skillnet",
                reuse_tuning_of=name_system(SAME_TUNING[arm], share)
                if arm in SAME_TUNING
                else None,
            )
            for share, arms in self.stream.list_fractions().items()
            for arm in arms
        }
        super().__post_init__()
        pilots = self.run.fold.count - self.folds
        if self.tuning.rates and pilots != len(self.tuning.seeds):
            raise UserError(
                f"tuning.seeds: {len(self.tuning.seeds)} seeds for {pilots} pilot folds, those of "
                f"run.fold.count ({self.run.fold.count}) after the first {self.folds}. Give a seed "
                "for each"
            )
        if unknown := sorted(set(self.stream.only_folds) - set(self.fold_numbers)):
            raise UserError(
                f"stream.only_folds: {unknown[0]} is no fold of the study, which has "
                f"{self.folds}, from 0; the others are pilots. Name some of them"
            )


@dataclass(frozen=True)
class CellPlace:
    """Which rows, weights and rate a training of an arm has.

    Args:
        fold: number of the fold.
        seed: start of the random numbers.
        share: fraction of the labelled rows of added tasks.
        rate: learning rate.
        split: that is measured.
    """

    fold: int
    seed: int
    share: float
    rate: float
    split: str


class StreamStudy:
    """The cells of a study, and where their results are.

    Args:
        config: with ``keep``.

    Raises:
        UserError: the configuration lacks a part, or differs from that of the kept results.
    """

    def __init__(self, config: StreamConfig) -> None:
        from lab.stream_arms import list_arms
        from skillnet_studies.study.kept_results import KeptStudy, find_kept_path, restore_results

        if not config.keep:
            raise UserError("keep: the study needs a directory for its results: --keep lab/results")
        if not (config.name and config.stream.tasks and config.folds and len(config.seeds) == 1):
            raise UserError(
                "name, folds, stream.tasks and one of seeds: give --config studies/stream"
            )
        known = [arm for group in list_arms() for arm in group]
        for arm in config.stream.arms:
            if arm not in known:
                raise UserError(f"stream.arms: no arm is named {arm!r}{suggest_name(arm, known)}")
        data = parse_location(config.run.data, data_root())
        config = replace(config, run=replace(config.run, data=str(data)))
        self.config, self.plan, self.folder = config, config.stream, config.folder
        self.path = find_kept_path(config)
        self.corpora = {task: open_corpus(join_location(data, task)) for task in self.plan.tasks}
        restore_results(config)
        kept = KeptStudy(self.path).content.get(STUDY_FILE, {}).get(RECORD, {})
        now = configuration.to_dict(config.stream)
        for key in now.keys() & kept.keys() - {"only_folds"}:
            if kept[key] != now[key]:
                raise UserError(
                    f"keep: {self.path}.yaml has the results of a study with stream.{key} "
                    f"{kept[key]}, not {now[key]}. Give another --name, or another directory"
                )

    def build_base(self, system: str, fold: int, seed: int) -> FinetuneConfig:
        """Return the run of a base, ``skillnet`` or ``dense``."""
        from skillnet_studies.study.system_runs import apply_settings

        entry = self.plan.dense if system == "dense" else SystemConfig(system)
        run = apply_settings(self.config.run, entry.set, "stream.dense.set")
        return replace(
            run,
            name=f"{system}-fold{fold}-seed{seed}",
            run_dir=str(self.folder / "bases"),
            seed=seed,
            system=system,
            options=dict(entry.options),
            fold=replace(run.fold, number=fold),
            evaluate=False,
            tracking=TrackingConfig(register=False, system_metrics=False),
        )

    @contextlib.contextmanager
    def open_cell(self, arms: Sequence[str], place: CellPlace) -> Iterator["StreamCell"]:
        """Provide a cell with its trained base, and a folder for its models.

        Args:
            arms: arms that are trained together.
            place: rows, weights and rate.
        """
        from lab.stream_arms import AddedTask, StreamCell
        from skillnet.objectives.base import find_objective

        runs = {
            system: self.build_base(system, place.fold, place.seed)
            for system in ("skillnet", "dense")
        }
        added = {}
        for task in self.plan.order_tasks(place.fold):
            corpus = self.corpora[task]
            outputs = find_objective("classification").count_names(corpus.manifest)
            if not outputs:
                raise UserError(
                    f"stream.tasks: the corpus {task} lists no classes. Name a corpus that was "
                    "prepared for classification"
                )
            training = TaskTraining(
                task,
                batch_size=self.plan.batch_size,
                label_smoothing=LABEL_SMOOTHING,
                label_fraction=place.share,
            )
            added[task] = AddedTask(corpus.modality, outputs, training)
        base = runs["dense" if arms[0] in DENSE_BASED else "skillnet"]
        model = self.folder / "bases" / str(base.name) / "model"
        if not (model.parent / RESULT).is_file():
            run_end_to_end(base, "finetune")
        scratch = self.folder / ".cells" / f"{name_system(arms[0], place.share)}-{base.name}"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            yield StreamCell(
                runs["skillnet"],
                runs["dense"],
                {base.system: model},
                added,
                self.plan.steps,
                place.rate,
                self.plan.memory,
                scratch,
                place.split,
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def train_missing(
        self, places: Mapping[str, CellPlace], is_missing: Callable[[str], bool]
    ) -> Iterator[tuple[str, "StreamCell", "ArmModels"]]:
        """Train arms, one after the other; yield the models of each while they exist.

        Arms that share a training train once, if their places are equal.

        Args:
            places: arm -> its rows, weights and rate.
            is_missing: whether an arm has no result.
        """
        from lab.stream_arms import list_arms

        for group, train in list_arms().items():
            own = [arm for arm in group if arm in places]
            for place in dict.fromkeys(places[arm] for arm in own):
                arms = [arm for arm in own if places[arm] == place]
                yield from self._train_group(arms, train, place, is_missing)

    def _train_group(
        self,
        arms: Sequence[str],
        train: "ArmTraining",
        place: CellPlace,
        is_missing: Callable[[str], bool],
    ) -> Iterator[tuple[str, "StreamCell", "ArmModels"]]:
        name = name_system(arms[0], place.share)
        lock = self.folder / ".cells" / f"{name}-fold{place.fold}.lock"
        try:
            with hold_lock(lock, lambda holder: holder):
                # Asked with the lock: another process may have trained them in the meantime.
                missing = [arm for arm in arms if is_missing(arm)]
                if not missing:
                    return
                with self.open_cell(missing, place) as cell:
                    self._check_bases(cell)
                    for arm, models in train(cell).items():
                        if arm in missing:
                            yield arm, cell, models
        except LockHeldError as error:
            console.print_note(f"{name}, fold {place.fold}: left to {error}")

    def _check_bases(self, cell: "StreamCell") -> None:
        """Raise UserError if cells of the fold have another base: their differences are paired."""
        from skillnet_studies.study.kept_results import KeptStudy

        end, now = f"-fold{cell.run.fold.number}-seed{cell.run.seed}", cell.digest_bases()
        for name, record in KeptStudy(self.path).content.get(RECORD, {}).items():
            before = record["bases"]
            if name.endswith(end) and any(
                before.get(n, digest) != digest for n, digest in now.items()
            ):
                raise UserError(
                    f"{self.path}.yaml: fold {cell.run.fold.number} was begun on another base, and "
                    "processors round differently. Finish it on that machine, or give other "
                    "folds here: stream.only_folds"
                )

    # -- tuning ----------------------------------------------------------------------------

    def tune_rates(self) -> "dict[str, TuningResult]":
        """Return the rate of each system, after the trials on pilot folds that are missing.

        Without ``tuning.rates`` every system has the rate of ``run``.

        Raises:
            UserError: another process runs a part of the trials.
        """
        from skillnet_studies.study.tuning import choose_settings, start_tuning

        trials: dict[str, Trial] = {}
        outcomes: list[TrialOutcome] = []
        for number, seed in enumerate(self.config.tuning.seeds):
            for index, rate in enumerate(self.config.tuning.rates):
                for share, arms in self.plan.list_fractions().items():
                    fold = self.config.folds + number
                    place = CellPlace(fold, seed, share, rate, "validation")
                    own = {
                        arm: self._build_trial(name_system(arm, share), index, place)
                        for arm in arms
                        if arm not in SAME_TUNING
                    }
                    trials |= {trial.name: trial for trial in own.values()}
                    outcomes += self._run_trials(own, place)
        tuning = start_tuning(self.config)
        if not trials:
            return tuning
        # Rates from a part of the trials would differ between processes.
        if left := len(trials) - len(outcomes):
            raise UserError(
                f"{self.folder}: another process runs {left} of {len(trials)} tuning trials. Run "
                "the command again when it has ended"
            )
        return choose_settings(self.config, "rates", tuning, list(trials.values()), outcomes)

    def _build_trial(self, label: str, index: int, place: CellPlace) -> Trial:
        from skillnet_studies.study.tuning import RATE

        run = self.build_base("skillnet", place.fold, place.seed)
        run = replace(run, training=replace(run.training, steps=self.plan.steps))
        settings = {"system": label, RATE: place.rate}
        group = f"{label}-r{index}"
        return Trial(f"{group}-seed{place.seed}", run, group=group, settings=settings)

    def _run_trials(self, trials: Mapping[str, Trial], place: CellPlace) -> list[TrialOutcome]:
        """Return the outcomes of the trials of all arms at one place."""
        from skillnet_studies.study.kept_results import KeptTuning
        from sweeps.config.trials import ScoreConfig

        def is_missing(arm: str) -> bool:
            return KeptTuning(self.config).find_outcome(trials[arm]) is None

        for arm, cell, models in self.train_missing(dict.fromkeys(trials, place), is_missing):
            score, scores = ScoreConfig().compute_score(models.measure(cell))
            seconds = sum(models.seconds.values())
            trial = trials[arm]
            outcome = TrialOutcome(
                trial.name,
                str(trial.group),
                self.folder / "tuning" / trial.name,
                "finished",
                {"step": models.steps, "seconds": seconds, "commit": find_source_commit()},
                [{"step": models.steps, "score": score, "scores": scores}],
                settings=dict(trial.settings),
                seed=place.seed,
            )
            with self._lock_results():
                KeptTuning(self.config).keep_outcome(outcome)
        kept = KeptTuning(self.config)
        found = [kept.find_outcome(trial) for trial in trials.values()]
        return [outcome for outcome in found if outcome is not None]

    def _lock_results(self) -> contextlib.AbstractContextManager[None]:
        """Wait until no other process of this machine writes the kept files."""
        return hold_lock(self.folder / ".results.lock", lambda holder: holder, wait=True)

    # -- cells -----------------------------------------------------------------------------

    def run_cells(self, tuning: "Mapping[str, TuningResult]") -> None:
        """Train and measure the cells that are missing, fold after fold.

        Args:
            tuning: label of a system -> its rate.
        """
        from skillnet_studies.study.tuning import RATE

        for fold in self.plan.only_folds or self.config.fold_numbers:
            seed = shift_seed(self.config.seeds[0], fold)
            for share, arms in self.plan.list_fractions().items():
                labels = {arm: name_system(arm, share) for arm in arms}
                usual = self.config.run.training.lr
                places = {
                    arm: CellPlace(
                        fold, seed, share, tuning[label].settings.get(RATE, usual), "test"
                    )
                    for arm, label in labels.items()
                }
                runs = {arm: self.find_cell(label, fold) for arm, label in labels.items()}

                def is_missing(arm: str, runs: Mapping[str, Path] = runs) -> bool:
                    return not (runs[arm] / RESULT).is_file()

                for arm, cell, models in self.train_missing(places, is_missing):
                    write_cell(runs[arm], arm, cell, models)
                    with self._lock_results():
                        self._keep_cells(tuning)
                    spent = console.format_minutes(sum(models.seconds.values()))
                    console.print_note(f"{labels[arm]}, fold {fold}: {models.steps} steps, {spent}")

    def find_cell(self, label: str, fold: int) -> Path:
        """Return the folder of a cell."""
        seed = shift_seed(self.config.seeds[0], fold)
        return self.folder / "runs" / f"{label}-fold{fold}-seed{seed}"

    def list_cells(self) -> dict[tuple[str, int], Path]:
        """Return (label, fold) -> folder of each finished cell, also of other machines."""
        cells = {
            (label, fold): self.find_cell(label, fold)
            for fold in self.config.fold_numbers
            for label in self.config.systems
        }
        return {key: cell for key, cell in cells.items() if (cell / RESULT).is_file()}

    def _keep_cells(self, tuning: "Mapping[str, TuningResult]") -> None:
        """Write the ledger of the study and its two kept files."""
        from skillnet_studies.study.kept_results import change_kept, keep_results
        from skillnet_studies.study.study import write_study_ledger

        cells = self.list_cells()
        outcomes = [
            TrialOutcome(
                cell.name,
                label,
                cell,
                "finished",
                read_json(cell / RESULT),
                seed=shift_seed(self.config.seeds[0], fold),
            )
            for (label, fold), cell in cells.items()
        ]
        write_study_ledger(self.config, tuning, outcomes)
        with change_kept(self.path) as kept:
            # The record of a cell of another machine is in the kept file alone.
            kept.content.setdefault(RECORD, {}).update(
                {
                    cell.name: read_json(cell / RECORD_FILE)
                    for cell in cells.values()
                    if (cell / RECORD_FILE).is_file()
                }
            )
        keep_results(self.config, outcomes)


def write_cell(run: Path, arm: str, cell: "StreamCell", models: "ArmModels") -> None:
    """Measure an arm on the test rows, and write the files of a finished run.

    Args:
        run: folder of the cell.
        arm: name of the arm.
        cell: rows, weights and rate.
        models: what the arm left behind.
    """
    from pipelines.training.evaluation.outcomes import OUTCOMES_FILE, OutcomeTable, write_outcomes
    from pipelines.training.evaluation.tables import write_evaluation_csv

    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    outcomes = OutcomeTable()
    rows = models.measure(cell, outcomes)
    record = {
        "order": list(cell.added),
        "trained": models.trained,
        "seconds": {task: round(each, 2) for task, each in models.seconds.items()},
        "before": models.before,
        "after": models.observe(cell),
        "bases": cell.digest_bases(),
    }
    write_json(run / RECORD_FILE, record)
    base = cell.dense if arm in DENSE_ARMS else cell.run
    tasks = sorted({task for task, _ in outcomes})
    config = replace(
        base,
        name=run.name,
        run_dir=str(run.parent),
        tasks={task: cell.tasks[task] for task in tasks},
        model=replace(base.model, tasks=cell.plan_tasks(tasks)),
        training=replace(base.training, steps=cell.steps, lr=cell.rate),
        evaluate=True,
    )
    (run / CONFIG).write_text(configuration.to_yaml(config), encoding="utf-8")
    write_evaluation_csv(rows, run / "evaluation.csv")
    write_outcomes(outcomes, run / OUTCOMES_FILE)
    seconds = sum(models.seconds.values())
    trained: dict[str, Any] = {"step": models.steps, "resumed": 0, "seconds": seconds}
    trained["commit"] = find_source_commit()
    write_json(run / TRAINED, trained)
    digests = {name: corpus.digest for name, corpus in cell.corpora.items()}
    result: dict[str, Any] = {"name": run.name, "run": str(run), "corpora": digests}
    result["evaluation"] = rows
    result |= {"model": "not kept", "total_params": models.count_weights()}
    # Written last: it makes the cell complete.
    write_json(run / RESULT, result | trained)


COST_COLUMNS = (
    "system",
    "outputs that changed",
    "MB of all tasks",
    "MB read per task",
    "MFLOP per example",
    "trained weights per task",
    "s per task",
)


def count_changed(records: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return how many outputs changed after their task was learned, and of how many.

    Args:
        records: those of the cells of a system.
    """
    pairs = [
        (before["outputs"], each["after"][task]["outputs"])
        for each in records
        for task, before in each["before"].items()
    ]
    return sum(before != after for before, after in pairs), len(pairs)


def tabulate_costs(
    runs: "Sequence[FinishedRun]", records: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return a row per system: outputs that changed after they were learned, and mean costs.

    Args:
        runs: finished cells.
        records: name of a cell -> its costs and observations.
        tasks: added tasks, over which costs are averaged.
    """
    rows: list[tuple[str, ...]] = []
    for label in dict.fromkeys(run.label for run in runs):
        own = [run for run in runs if run.label == label]
        costs = [each[task] for each in (run.to_scores().costs for run in own) for task in tasks]
        found = [records[run.folder.name] for run in own]
        changed, count = count_changed(found)
        weights = [fmean(each["trained"].values()) for each in found]
        # A joint training adds a task by training all of them again.
        seconds = [fmean(each["seconds"].values()) for each in found]
        rows.append(
            (
                label,
                f"{changed} of {count}" if count else "–",
                f"{4e-6 * fmean(run.total_params for run in own):.1f}",
                f"{4e-6 * fmean(cost.activated for cost in costs):.1f}",
                f"{1e-6 * fmean(cost.flops for cost in costs):.1f}",
                f"{fmean(weights):,.0f}",
                f"{fmean(seconds):.1f}",
            )
        )
    return rows


def run_stream(argv: list[str] | None = None) -> None:
    """Choose the rates, run all cells that are missing, and print the costs.

    Args:
        argv: arguments of the command.
    """
    config = configuration.parse_config(
        StreamConfig,
        sys.argv[1:] if argv is None else argv,
        "python -m lab.task_stream",
        "Run the study of a stream of tasks, or the rest of it.",
        "python -m lab.task_stream --config studies/stream --keep lab/results",
        ("name", "folds", "keep", "run.data", "stream.steps", "stream.only_folds"),
    )
    from skillnet_studies.study.kept_results import KeptStudy
    from skillnet_studies.study.study import read_study_runs

    study = StreamStudy(config)
    study.run_cells(study.tune_rates())
    records = KeptStudy(study.path).content.get(RECORD, {})
    costs = tabulate_costs(read_study_runs(study.path), records, study.plan.tasks)
    console.print_table("costs", COST_COLUMNS, costs)


def main(argv: list[str] | None = None) -> int:
    """Run ``python -m lab.task_stream``."""
    return run_command(run_stream, argv)


if __name__ == "__main__":
    raise SystemExit(main())
