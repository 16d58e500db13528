"""Champion of a registered model: the decision about a version, and its alias.

The alias ``champion`` marks the best version, ``challenger`` the latest version that was not
promoted. MLflow has no conditional write: the order of the decisions and a comparison before and
after each write keep two processes from promoting a version against an outdated champion.

A challenger becomes champion if it is worse on no task and better on one.

Both are decided by the confidence interval of the difference. The two systems are measured
separately, each with a 95 % interval. The interval of the difference has the half-width
sqrt(a² + b²) of the two half-widths: the normal approximation for independent estimates. On shared
test rows it is wider than a paired interval, so it errs towards "no difference". Worse means that
the interval lies below zero, better that it lies above zero.

Registrations of one model take turns.

On one machine a kernel lock admits one process. Across machines the tracker gives each version the
next number, so the number is a ticket: a version's promotion is decided after those of all earlier
versions. A version is ``pending`` from its creation until its alias is set.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from skillnet_platform import console, storage
from skillnet_platform.errors import UserError
from skillnet_platform.storage.locks import has_ended, hold_lock
from skillnet_platform.tracking import backend
from skillnet_platform.tracking.backend import is_sqlite, sqlite_path

#: Tag of a version: where its registration stands.
STATE_TAG = "skillnet.state"
PENDING, DONE, ABANDONED = "pending", "done", "abandoned"
#: Seconds that a registration waits for an earlier one on another machine, which may be dead.
EARLIER_PATIENCE_S = 60.0
_PAUSE_S = 0.5


def registration_turn(uri: str, name: str) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a registered model on this machine while the block runs.

    Processes that share a sqlite database share the lock, also on a shared disk.

    Args:
        uri: address of the tracker, such as ``http://host:5000``.
        name: registered model, as MLflow lists it.
    """
    # The name may contain any character.
    file = f"registry-{hashlib.sha256(f'{uri} {name}'.encode()).hexdigest()[:16]}.lock"
    folder = sqlite_path(uri).parent if is_sqlite(uri) else storage.run_root() / "cache"
    folder.mkdir(parents=True, exist_ok=True)

    def describe(holder: str) -> str:
        return f"{name}: waiting for {holder}, which registers a version of this model"

    return hold_lock(folder / f".{file}", describe, wait=True)


def is_done(version: Any) -> bool:
    """Return whether the registration of a version is complete: its alias was set."""
    return bool(version.tags.get(STATE_TAG) == DONE)


def wait_for_earlier_versions(client: Any, name: str, number: int) -> None:
    """Wait until the promotion of every earlier version is decided, or its process is dead.

    Args:
        client: ``MlflowClient``.
        name: registered model, as MLflow lists it.
        number: version that waits.
    """
    end: float | None = None
    while True:
        pending = [
            version
            for version in client.search_model_versions(f"name = '{name}'")
            if int(version.version) < number
            and version.tags.get(STATE_TAG) == PENDING
            and not has_ended(version.tags.get(backend.PROCESS_TAG, ""))
        ]
        if not pending:
            return
        # MLflow returns numbers or texts, depending on the tracker.
        waited_for = sorted(int(version.version) for version in pending)
        numbers = ", ".join(map(str, waited_for))
        if end is None:
            console.print_note(f"{name}: waiting for the registration of version {numbers}")
            end = time.monotonic() + EARLIER_PATIENCE_S
        if time.monotonic() >= end:
            console.print_warning(
                f"{name}: the registration of version {numbers} did not end in "
                f"{EARLIER_PATIENCE_S:.0f} s. Register that model again"
            )
            # Marked, so that later registrations do not wait for it again.
            for earlier in waited_for:
                client.set_model_version_tag(name, str(earlier), STATE_TAG, ABANDONED)
            return
        time.sleep(_PAUSE_S)


#: End of the reason of a task that was not compared. A tag of the version keeps the reasons.
THAN_THE_CHAMPION = "than the champion, so not compared"


@dataclass(frozen=True)
class MetricEstimate:
    """Estimate of one metric of one system on one task.

    Args:
        metric: name. Estimates of different metrics are not compared.
        value: the estimate.
        low: lower end of its 95 % interval.
        high: upper end of its 95 % interval.
        higher_is_better: False for error rates.
        data: digest of the corpus. Estimates on different corpora are not compared.
    """

    metric: str
    value: float
    low: float
    high: float
    higher_is_better: bool = True
    data: str = ""


@dataclass(frozen=True)
class PromotionDecision:
    """Decision about a challenger, with one reason per task.

    Args:
        passed: whether the challenger becomes the champion.
        reasons: one line per task.
    """

    passed: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.reasons)

    @property
    def is_incomparable(self) -> bool:
        """Whether a task stops the promotion because the two were measured differently."""
        return any(THAN_THE_CHAMPION in reason for reason in self.reasons)


def decide_promotion(
    challenger: Mapping[str, MetricEstimate], champion: Mapping[str, MetricEstimate]
) -> PromotionDecision:
    """Compare the estimates of a challenger with those of the champion, task by task.

    A task that only the champion has counts as worse. A task that only the challenger has counts
    as better.

    Args:
        challenger: task -> estimate.
        champion: task -> estimate.
    """
    reasons: list[str] = []
    worse = better = False
    for task in sorted({*challenger, *champion}):
        new, old = challenger.get(task), champion.get(task)
        if old is None:
            better = True
            reasons.append(f"{task}: new")
        elif new is None:
            # A model that lost a task must not replace one that has it.
            worse = True
            reasons.append(f"{task}: missing in the challenger")
        elif (new.metric, new.data) != (old.metric, old.data):
            # Other metrics or data allow no comparison, so the champion stays.
            worse = True
            how = "by another metric" if new.metric != old.metric else "on other data"
            reasons.append(f"{task}: measured {how} {THAN_THE_CHAMPION}")
        else:
            low, high = _difference(new, old)
            worse |= high < 0
            better |= low > 0
            word = "worse" if high < 0 else "better" if low > 0 else "no difference"
            gain = f"gain {low:+.4g} to {high:+.4g}"
            # A test of one held-out unit has no interval, so it shows nothing.
            if math.isnan(low):
                gain = "no interval"
            reasons.append(
                f"{task}: {word} ({new.metric} {new.value:.4g} against {old.value:.4g}, {gain})"
            )
    if not worse and not better:
        reasons.append("better on no task")
    return PromotionDecision(better and not worse, tuple(reasons))


def _difference(new: MetricEstimate, old: MetricEstimate) -> tuple[float, float]:
    """Return the interval of the gain; a positive gain is an improvement for every metric."""
    sign = 1.0 if new.higher_is_better else -1.0
    gain = sign * (new.value - old.value)
    below_new, above_new = _spread(new)
    below_old, above_old = _spread(old)
    # The gain is smallest with the new value at its worst and the old one at its best.
    return gain - math.hypot(below_new, above_old), gain + math.hypot(above_new, below_old)


def _spread(figure: MetricEstimate) -> tuple[float, float]:
    """Return the lengths of the interval towards worse and towards better."""
    down, up = figure.value - figure.low, figure.high - figure.value
    return (down, up) if figure.higher_is_better else (up, down)


MODEL_NAME = "skillnet"
CHAMPION = "champion"
CHALLENGER = "challenger"
FIGURES_TAG = "figures"
#: Tag of a version: the system of its model. All versions of a registered model have one system.
SYSTEM_TAG = backend.SYSTEM_TAG
GATE_TAG = "gate"
#: Decisions of one promotion, if another machine changes the champion each time.
DECISION_ATTEMPTS = 10


class OtherModelError(UserError):
    """A model does not belong to the versions of a registered model."""


class OtherSystemError(OtherModelError):
    """A registered model has versions of another system, with which nothing is compared."""


class OtherTasksError(OtherModelError):
    """The champion has tasks that a model lacks, so the model could never replace it."""


def choose_model_name(system: str, experiment: str | None = None) -> str:
    """Return the default name of a registered model: ``skillnet``, ``skillnet-dense``.

    Args:
        system: registered kind of the model.
        experiment: MLflow experiment of its run; None takes ``skillnet``.
    """
    # MLflow reserves both characters for addresses of versions.
    group = (experiment or MODEL_NAME).replace("/", "-").replace(":", "-")
    return group if system == MODEL_NAME else f"{group}-{system}"


def check_system(client: Any, name: str, system: str | None) -> None:
    """Raise OtherSystemError if a registered model has a version of another system.

    Args:
        client: ``MlflowClient``.
        name: registered model, as MLflow lists it.
        system: registered kind of the model that becomes a version; None if unknown.
    """
    for version in client.search_model_versions(f"name = '{name}'"):
        _refuse_other_system(name, system, version)


def check_version_tasks(client: Any, name: str, tasks: Sequence[str]) -> None:
    """Raise OtherTasksError if the champion was measured on tasks that a model lacks.

    A user who gives the name wants such a version. A default name would join unrelated models.

    Args:
        client: ``MlflowClient``.
        name: registered model, as MLflow lists it.
        tasks: names of the tasks of the model that becomes a version.
    """
    current = champion_of(client, name)
    missing = sorted(unpack_estimates(current).keys() - set(tasks)) if current is not None else []
    if missing:
        raise OtherTasksError(
            f"models:/{name}: the champion also has {', '.join(missing)}, and this model lacks "
            f"them. Register it under a name of its own: skillnet register RUN --name "
            f"{name}-{tasks[0]}"
        )


def _refuse_other_system(name: str, system: str | None, version: Any) -> None:
    other = version.tags.get(SYSTEM_TAG)
    if system and other and system != other:
        raise OtherSystemError(
            f"models:/{name}: version {version.version} is a {other} model, and this model is a "
            f"{system} model. Promotion compares models of one system only: register it under "
            f"another name, such as {choose_model_name(system)}"
        )


def promote_version(
    number: int, *, name: str = MODEL_NAME, uri: str | None = None, force: bool = False
) -> PromotionDecision:
    """Compare a version with the champion and set its alias.

    Args:
        number: the version.
        name: registered model, as MLflow lists it.
        uri: the tracker.
        force: make it champion regardless of the estimates; the decision records this.

    Raises:
        OtherSystemError: ``force``, and the champion is a model of another system.
        UserError: other machines changed the champion during every attempt.
    """
    chosen = backend.resolve_uri(uri)
    with registration_turn(chosen, name):
        return promote_in_turn(backend.create_client(chosen), name, number, force)


def champion_of(client: Any, name: str) -> Any:
    """Return the champion as an MLflow ModelVersion, or ``None``.

    Args:
        client: ``MlflowClient``.
        name: registered model, as MLflow lists it.
    """
    from mlflow.exceptions import MlflowException

    try:
        # A search for versions returns no aliases.
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        # MLflow reports a missing alias of an existing model by the second code.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def promote_in_turn(client: Any, name: str, number: int, force: bool = False) -> PromotionDecision:
    """Decide and set the alias of a version; the caller has the turn on this machine.

    Args:
        client: ``MlflowClient``.
        name: registered model, as MLflow lists it.
        number: the version.
        force: see :func:`promote_version`.

    Raises:
        UserError: see :func:`promote_version`.
    """
    wait_for_earlier_versions(client, name, number)
    version = client.get_model_version(name, str(number))
    for _ in range(DECISION_ATTEMPTS):
        current = champion_of(client, name)
        if force and current is not None:
            _refuse_other_system(name, version.tags.get(SYSTEM_TAG), current)
        verdict = _decide(version, current)
        if force and not verdict.passed:
            verdict = PromotionDecision(True, (*verdict.reasons, "promoted by hand"))
        client.set_model_version_tag(name, str(number), GATE_TAG, str(verdict)[:5000])
        # The tracker has no conditional write, so the champion is compared before and after it.
        if _number_of(champion_of(client, name)) != _number_of(current):
            continue
        alias = CHAMPION if verdict.passed else CHALLENGER
        client.set_registered_model_alias(name, alias, str(number))
        if verdict.passed and _number_of(champion_of(client, name)) != number:
            continue
        if verdict.passed:
            # One version must not carry both aliases.
            aliases = client.get_registered_model(name).aliases
            if str(aliases.get(CHALLENGER, "")) == str(number):
                client.delete_registered_model_alias(name, CHALLENGER)
        client.set_model_version_tag(name, str(number), STATE_TAG, DONE)
        return verdict
    raise UserError(
        f"models:/{name}/{number}: other machines changed the champion {DECISION_ATTEMPTS} times "
        "during the decision. Run the same command again"
    )


def _decide(version: Any, current: Any) -> PromotionDecision:
    if current is None:
        return PromotionDecision(True, ("the first version",))
    if _number_of(current) == _number_of(version):
        # A kill after the alias was set left the reasons of that decision.
        reasons = () if is_done(version) else recorded_reasons(version)
        return PromotionDecision(True, reasons or ("already the champion",))
    own, other = (each.tags.get(SYSTEM_TAG) for each in (version, current))
    # Another machine can register a first version of another system at the same time.
    if own and other and own != other:
        reason = f"system: {own} is not compared with the champion, a {other} model"
        return PromotionDecision(False, (reason,))
    return decide_promotion(unpack_estimates(version), unpack_estimates(current))


def recorded_reasons(version: Any) -> tuple[str, ...]:
    """Return the reasons of an earlier decision about a version; () without one."""
    gate = version.tags.get(GATE_TAG, "")
    return tuple(gate.split("; ")) if gate else ()


def _number_of(version: Any) -> int | None:
    return int(version.version) if version is not None else None


def pack_estimates(figures: Mapping[str, MetricEstimate]) -> str:
    """Return estimates as the text of a tag."""
    plain = {task: asdict(estimate) for task, estimate in figures.items()}
    return json.dumps(plain, separators=(",", ":"))


def unpack_estimates(version: Any) -> dict[str, MetricEstimate]:
    """Return task -> estimate of a version: the inverse of :func:`pack_estimates`."""
    tag = json.loads(version.tags.get(FIGURES_TAG, "{}"))
    return {task: MetricEstimate(**fields) for task, fields in tag.items()}
