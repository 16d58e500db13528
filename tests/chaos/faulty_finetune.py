"""``skillnet finetune`` with the faults of ``SKILLNET_FAULTS``, for tests that need a process.

python -m tests.chaos.faulty_finetune --config run.yaml
"""

from typing import Any

from pipelines.finetune import run_end_to_end
from pipelines.training.config.run import FinetuneConfig
from skillnet_platform.cli import command
from tests.chaos.fault_injection import faults_of_environment


@command(FinetuneConfig, description="Run skillnet finetune with injected faults.", name="finetune")
def main(config: FinetuneConfig) -> dict[str, Any]:
    """Run ``skillnet finetune`` with injected faults."""
    return run_end_to_end(config, "finetune", callbacks=faults_of_environment())


if __name__ == "__main__":
    raise SystemExit(main())
