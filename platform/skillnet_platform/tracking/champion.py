"""Champion of a registered model: the decision about a version, and its alias.

The alias ``champion`` marks the best version, ``challenger`` the latest version that was not
promoted. MLflow has no conditional write: the order of the decisions and a comparison before and
after each write keep two processes from promoting a version against an outdated champion.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from skillnet_platform.errors import UserError
from skillnet_platform.tracking import backend, promotion, registration_order

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
    missing = sorted(_unpack(current).keys() - set(tasks)) if current is not None else []
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
) -> promotion.PromotionDecision:
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
    with registration_order.registration_turn(chosen, name):
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


def promote_in_turn(
    client: Any, name: str, number: int, force: bool = False
) -> promotion.PromotionDecision:
    """Decide and set the alias of a version; the caller has the turn on this machine.

    Args:
        client: ``MlflowClient``.
        name: registered model, as MLflow lists it.
        number: the version.
        force: see :func:`promote_version`.

    Raises:
        UserError: see :func:`promote_version`.
    """
    registration_order.wait_for_earlier_versions(client, name, number)
    version = client.get_model_version(name, str(number))
    for _ in range(DECISION_ATTEMPTS):
        current = champion_of(client, name)
        if force and current is not None:
            _refuse_other_system(name, version.tags.get(SYSTEM_TAG), current)
        verdict = _decide(version, current)
        if force and not verdict.passed:
            verdict = promotion.PromotionDecision(True, (*verdict.reasons, "promoted by hand"))
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
            _drop_alias(client, name, CHALLENGER, number)
        state = registration_order.STATE_TAG
        client.set_model_version_tag(name, str(number), state, registration_order.DONE)
        return verdict
    raise UserError(
        f"models:/{name}/{number}: other machines changed the champion {DECISION_ATTEMPTS} times "
        "during the decision. Run the same command again"
    )


def _decide(version: Any, current: Any) -> promotion.PromotionDecision:
    if current is None:
        return promotion.PromotionDecision(True, ("the first version",))
    if _number_of(current) == _number_of(version):
        # A kill after the alias was set left the reasons of that decision.
        reasons = () if registration_order.is_done(version) else recorded_reasons(version)
        return promotion.PromotionDecision(True, reasons or ("already the champion",))
    own, other = (each.tags.get(SYSTEM_TAG) for each in (version, current))
    # Another machine can register a first version of another system at the same time.
    if own and other and own != other:
        reason = f"system: {own} is not compared with the champion, a {other} model"
        return promotion.PromotionDecision(False, (reason,))
    return promotion.decide_promotion(_unpack(version), _unpack(current))


def recorded_reasons(version: Any) -> tuple[str, ...]:
    """Return the reasons of an earlier decision about a version; () without one."""
    gate = version.tags.get(GATE_TAG, "")
    return tuple(gate.split("; ")) if gate else ()


def _number_of(version: Any) -> int | None:
    return int(version.version) if version is not None else None


def _drop_alias(client: Any, name: str, alias: str, number: int) -> None:
    aliases = client.get_registered_model(name).aliases
    if str(aliases.get(alias, "")) == str(number):
        client.delete_registered_model_alias(name, alias)


def pack_estimates(figures: Mapping[str, promotion.MetricEstimate]) -> str:
    """Return estimates as the text of a tag."""
    return json.dumps(promotion.estimates_to_json(figures), separators=(",", ":"))


def _unpack(found: Any) -> dict[str, promotion.MetricEstimate]:
    return promotion.estimates_from_json(json.loads(found.tags.get(FIGURES_TAG, "{}")))
