"""What Ray Train does when workers fail: start them again, unless it was a user's mistake.

Imports Ray: only a fit on Ray imports this.
"""

from typing import Any

from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
    FailurePolicy,
)
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from skillnet_platform.errors import UserError


def is_mistake(error: TrainingFailedError) -> bool:
    """Whether a worker failed with a user's mistake."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    return any(isinstance(problem, UserError) for problem in failures.values())


class MistakesEnd(DefaultFailurePolicy):
    """Ray's own policy, but a full disk or an altered shard is told at once: it stays so."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Start again or give up."""
        if is_mistake(training_failed_error):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class Trainer(TorchTrainer):
    """A ``TorchTrainer`` with policies of ours."""

    def policies(self, failures: FailureConfig) -> dict[str, Any]:
        """What the controller is given in the place of Ray's."""
        policy: FailurePolicy = MistakesEnd(failures)
        return {"failure_policy": policy}

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        # Ray's type of it is that of its first version.
        failures: Any = self.run_config.failure_config or FailureConfig()
        return super()._initialize_and_run_controller(**(given | self.policies(failures)))
