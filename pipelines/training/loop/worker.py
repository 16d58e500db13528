"""Work of one worker of a run, with and without Ray.

Rank 0 logs metrics to MLflow by run id and appends them to ``progress.jsonl`` in the run's folder.
The driver follows that file, so its output is the same for any number of workers.
"""

import contextlib
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.evaluation.inference import EvaluationRanks
from pipelines.training.evaluation.outcomes import OUTCOMES_FILE, OutcomeTable, write_outcomes
from pipelines.training.evaluation.tables import write_evaluation_csv
from pipelines.training.loop import preemption
from pipelines.training.loop.loop import TrainResult, train_model
from pipelines.training.loop.reporter import (
    CALLBACKS,
    LoopCallback,
    LoopReporter,
    OnEvaluation,
    RunReporter,
    SilentReporter,
    find_observers,
)
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.run_evaluation import EVALUATION_CSV, evaluate_run
from pipelines.training.loop.setup import pick_device
from pipelines.training.runs import layout
from pipelines.training.runs.checkpoints import step_of
from pipelines.training.runs.mirror import (
    CheckpointUploads,
    mirror_of,
    restore_latest,
    upload_trained,
)
from pipelines.training.runs.model_source import ModelSource, load_source_model
from skillnet.model import SkillNet
from skillnet.model_merging import remove_skill, remove_task
from skillnet.multitask_model import TaskModel
from skillnet.serialization import save_model
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.ray_internals.errors import WorkerGroupResize
from skillnet_platform.storage import write_json
from skillnet_platform.tracking import Tracker
from skillnet_platform.tracking.source_commit import find_source_commit

#: Texts of CUDA and its libraries in exceptions without a class of their own.
_DEVICE_TEXTS = re.compile(r"CUDA error|CUDA driver error|CUBLAS_STATUS|CUDNN_STATUS|ECC error")


class DeviceLostError(RuntimeError):
    """Loss of a device during training. The message states what was saved and what to do."""


class DeviceWatch:
    """Callback of the training loop that knows the step, for messages about the device.

    Args:
        config: settings of the run.
        folder: directory of the run.
    """

    def __init__(self, config: FinetuneConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._step: int | None = None

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        """Do nothing: the folder is known."""

    def on_step_start(self, step: int) -> None:
        """Keep the number of the step."""
        self._step = step

    @contextlib.contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Explain errors of the device inside the block.

        Raises:
            UserError: the memory of the device is too small; a restart would not help.
            DeviceLostError: the device failed; Ray restarts the workers.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(f"{self._place()}: out of memory. {self._memory_remedy()}") from error
        except RuntimeError as error:
            is_known = isinstance(error, torch.AcceleratorError)
            if not is_known and not _DEVICE_TEXTS.search(str(error)):
                raise
            raise DeviceLostError(
                f"{self._place()}: the device failed ({first_line(error)}). {self._saved()}. Check "
                "the card with `nvidia-smi` and `dmesg`, and run the same command with --name "
                f"{self._config.name} to resume"
            ) from error

    def _place(self) -> str:
        when = "before the first step" if self._step is None else f"in step {self._step + 1}"
        return f"{platform.node()}, {_describe_device()}, {when}"

    def _memory_remedy(self) -> str:
        training = self._config.training
        largest = max(task.batch_size for task in self._config.tasks.values())
        rows = min(-(-largest // training.workers), training.micro_batch_size or largest)
        # Options that a resumed run may change: none of them belongs to its identity.
        remedies = [f"--training.micro_batch_size {rows // 2}"] if rows > 1 else []
        if training.kept_tokens != 0:
            remedies.append("--training.kept_tokens 0")
        if not remedies:
            return f"{self._saved()}. It needs a larger GPU, or more of them; see `skillnet plan`"
        return (
            f"{self._saved()}. Use {' or '.join(remedies)} with --name {self._config.name}; see "
            "`skillnet plan`"
        )

    def _saved(self) -> str:
        steps = [step_of(path.name) for path in (self._folder / "checkpoints").glob("step-*")]
        if not steps:
            return "No checkpoint exists yet, so the run starts again"
        return f"The checkpoint of step {max(steps)} is kept"


def _describe_device() -> str:
    # A lost device may not answer, but its number is known without it.
    with contextlib.suppress(Exception):
        if torch.cuda.is_available():
            return f"GPU {torch.cuda.current_device()}"
    return "its device"


MODEL = "model"

#: Seconds that a worker without the driver's disk waits for the tracker at its end.
TRACKER_PATIENCE_S = 60.0


#: Bootstrap samples of a confidence interval.
BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class FinalEvaluation:
    """Request to evaluate the final model of a run. Its values are plain, for Ray.

    Args:
        splits: to evaluate on; None takes the test splits if ``config.evaluate`` is set.
        brief: write no intervals, for a run that is only ranked among others.
        source: folder of a model that is evaluated too, on the tasks that take no steps; the run
            grew from it.
    """

    splits: tuple[str, ...] | None = None
    brief: bool = False
    source: str | None = None


class EvaluationStoppedError(Exception):
    """The final evaluation was asked to stop; the same command repeats it."""


def evaluate_final(
    run: ResolvedRun,
    result: TrainResult,
    request: FinalEvaluation,
    ranks: EvaluationRanks,
    reporter: LoopReporter,
) -> list[dict[str, Any]]:
    """Evaluate the final model; the first rank writes tables and outcomes to the run.

    Args:
        run: settings with their corpora, tasks and sizes resolved.
        result: end of the training; it counts as preempted if the evaluation is asked to stop.
        request: splits and extent.
        ranks: that share the rows; all call this.
        reporter: receiver of progress of this rank; shows progress.

    Returns:
        Tidy rows; none without an evaluation, or on ranks other than the first.
    """
    config, folder = run.config, run.folder
    if result.preempted or not (config.evaluate or request.splits is not None):
        return []

    def measure(
        model: TaskModel,
        outcomes_file: str,
        splits: Sequence[str] | None,
        whose: str = "",
        **options: Any,
    ) -> list[dict[str, Any]]:
        def begin_split(task: str, split: str, rows: int, left: int) -> None:
            # All ranks stop before the same split.
            if ranks.is_any(preemption.stop_requested()):
                raise EvaluationStoppedError
            reporter.begin_split(f"{task} {split}{whose}", rows, left, result.step)

        outcomes = OutcomeTable()
        rows = evaluate_run(
            config,
            model,
            splits,
            outcomes=outcomes,
            on_split=begin_split,
            ranks=ranks,
            **options,
        )
        if ranks.is_first:
            write_outcomes(outcomes, folder / outcomes_file)
        return rows

    samples = 0 if request.brief else BOOTSTRAP_SAMPLES
    kept = [name for name, task in config.measured.items() if task.eval_only]
    try:
        rows = measure(
            result.model,
            OUTCOMES_FILE,
            request.splits,
            step=result.step,
            bootstrap_samples=samples,
        )
        if ranks.is_first:
            write_evaluation_csv(rows, folder / EVALUATION_CSV)
        if request.source is not None and kept:
            # As the grown model was evaluated, because both must be equal.
            source = load_source_model(ModelSource(request.source, Path(request.source)))
            old = measure(
                source.to(pick_device(config.training.use_gpu)),
                f"{layout.SOURCE}-{OUTCOMES_FILE}",
                None,
                " of the source",
                tasks=kept,
                bootstrap_samples=BOOTSTRAP_SAMPLES,
            )
            if ranks.is_first:
                write_json(folder / layout.SOURCE_ROWS, old)
    except EvaluationStoppedError:
        # As a preempted training: the last checkpoint exists, and the same command resumes.
        result.preempted = True
        return []
    return rows


def run_worker(
    run: ResolvedRun,
    rank: int = 0,
    world: int = 1,
    tracked: tuple[str, str] | None = None,
    on_evaluation: OnEvaluation | None = None,
    is_remote: bool = False,
    node_id: str | None = None,
    callbacks: Sequence[LoopCallback] = (),
    final: FinalEvaluation | None = None,
) -> None:
    """Train and evaluate as one of ``world`` workers; rank 0 writes the results to the run.

    Args:
        run: configuration with absolute paths, and the run's folder.
        rank: index of this worker, from 0.
        world: number of workers.
        tracked: MLflow run id and URI.
        on_evaluation: called after each evaluation: with its rows on rank 0, with none elsewhere.
        is_remote: the driver does not see this worker's disk, so rank 0 sends it the final model
            through the run's mirror.
        node_id: id of this worker's node in an elastic run; None in other runs.
        callbacks: called by the training loop.
        final: how all workers evaluate the final model; None leaves that out.

    Raises:
        WorkerGroupResize: the workers of an elastic run wrote a checkpoint and must restart.
    """
    config, folder = run.config, run.folder
    # Every node restores from the mirror, because a checkpoint may be on another node's disk.
    mirror = mirror_of(config, folder)
    if mirror is not None:
        restore_latest(mirror)
    named = find_observers(CALLBACKS, config.training.callbacks, "training.callbacks")
    callbacks = [*callbacks, *(kind() for kind in named)]
    ranks = EvaluationRanks(rank, world, pick_device(config.training.use_gpu))
    tracker = Tracker(*tracked) if tracked and not rank else None
    uploads = None
    if mirror is not None and not rank:
        uploads = CheckpointUploads(mirror, config.training.keep_checkpoints)
    is_remote = is_remote and mirror is not None
    reporter: LoopReporter = SilentReporter(config, on_evaluation, ranks)
    if not rank:
        reporter = RunReporter(
            config,
            folder,
            tracker,
            on_evaluation,
            uploads,
            world,
            is_remote,
            ranks,
            run.parts.loggers,
        )
    try:
        result = train_model(run, rank=rank, world=world, reporter=reporter, callbacks=callbacks)
        # A preempted run has no final model; it resumes from its checkpoint.
        if not result.preempted and (not rank or result.shards is not None):
            remove_untrained_parts(run, result.model)
            if result.shards is not None and rank:
                result.shards.gather_files(result.model)
            else:
                read = None if result.shards is None else result.shards.gather_weight
                save_model(result.model, folder / MODEL, read)
        rows = evaluate_final(run, result, final, ranks, reporter) if final is not None else []
        reporter.log_final(rows, result.step)
        if result.preempted and node_id is not None:
            if uploads is not None:
                uploads.close()
            _end_for_resize(world, node_id)
        if not rank:
            summary = {"world": world, "seed": config.seed, "evaluation": rows}
            # A report states it, also where the tracker of the run is gone.
            summary["commit"] = find_source_commit()
            write_json(folder / layout.TRAINED, result.to_dict() | summary)
    finally:
        reporter.close()
    if is_remote and tracker is not None:
        tracker.settle(TRACKER_PATIENCE_S)
    if mirror is not None and uploads is not None:
        upload_trained(mirror, uploads, is_remote)


def remove_untrained_parts(run: ResolvedRun, model: TaskModel) -> None:
    """Remove, in place, heads of auxiliary tasks, and skills that have random weights.

    A skill is random if no task of the run activates it and no start model has it: a run on one
    own corpus uses two of the seven default skills.

    Args:
        run: settings with their corpora, tasks and sizes resolved.
        model: at its end.
    """
    if isinstance(model, SkillNet):
        used = {skill for task in model.config.tasks.values() for skill in task.skills}
        used = set(model.config.find_sources(used))
        unused = [skill for skill in model.config.skills if skill not in used]
        # The report loads the initial weights once more, so it is made only if it matters.
        taken = run.init_report.taken if unused and run.init_report is not None else []
        for skill in unused:
            if f"skill-{skill}" not in taken:
                remove_skill(model, skill)
    for name in run.config.tasks.keys() - run.config.measured.keys():
        remove_task(model, name)


def _end_for_resize(world: int, node_id: str) -> None:
    """End this worker together with the others, unless the driver asked the run to stop.

    Raises:
        WorkerGroupResize: with the same nodes on all ranks.
    """
    own = (
        preemption.stop_requested_by_driver(),
        node_id if preemption.stop_requested_by_signal() else None,
    )
    ranks: list[Any] = [own] * world
    if world > 1:
        dist.all_gather_object(ranks, own)
    # A stop of the driver ends the run; only a stop of workers restarts the group.
    if not any(by_driver for by_driver, _ in ranks):
        leaving = sorted({node for _, node in ranks if node is not None})
        raise WorkerGroupResize(leaving)
