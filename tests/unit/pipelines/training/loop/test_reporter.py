"""Steps after which a run is evaluated on its validation rows."""

from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.evaluation.inference import EvaluationRanks
from pipelines.training.loop.reporter import LoopReporter, SilentReporter


def test_the_last_step_is_evaluated_once() -> None:
    settings = TrainingConfig(steps=10, evaluate_every=4)

    def evaluated(reporter: LoopReporter, last: int = 10) -> list[int]:
        return [s for s in range(1, last + 1) if reporter.needs_evaluation(s, last, settings)]

    assert evaluated(LoopReporter()) == [4, 8, 10]
    trial = SilentReporter(FinetuneConfig(), lambda rows, step: None, EvaluationRanks(1, 2))
    assert evaluated(trial) == [4, 8], "a trial does it itself"
    assert evaluated(LoopReporter(), last=6) == [4]
    assert not LoopReporter().needs_evaluation(10, 10, TrainingConfig(steps=10))
