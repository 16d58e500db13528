"""Elastic runs: valid settings, and the effect of stop requests to workers and driver."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.loop import preemption, worker
from pipelines.training.runs.identity import compute_identity
from skillnet_platform.ray_internals.errors import WorkerGroupResize
from tests.helpers.stop_files import FILE, FileStopSignal


def test_resumed_run_may_become_elastic() -> None:
    config = FinetuneConfig(training=TrainingConfig(workers=4))
    elastic = replace(
        config, training=replace(config.training, min_workers=1, resize_interval_s=5.0)
    )
    assert compute_identity(elastic) == compute_identity(config)


def test_signal_to_a_worker_resizes_and_stop_of_the_driver_ends(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        preemption.listen_in_worker()
        with pytest.raises(WorkerGroupResize) as reported:
            worker._end_for_resize(1, "host")
        assert reported.value.leaving == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.stop_requested()
        with pytest.raises(WorkerGroupResize) as reported:
            worker._end_for_resize(1, "host")
        assert reported.value.leaving == ["host"]
        (tmp_path / FILE).touch()
        with preemption.watch_stop_signal(FileStopSignal(tmp_path / FILE)):
            while not preemption.stop_requested_by_driver():
                pass
        worker._end_for_resize(1, "host")
    finally:
        preemption.listen_in_worker()
        signal.signal(signal.SIGTERM, before)
    assert not preemption.stop_requested()


def test_resize_request_needs_no_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        preemption.listen_in_worker()
        preemption.request_stop()
        assert preemption.stop_requested()
        assert not preemption.stop_requested_by_signal()
        assert not preemption.stop_requested_by_driver()
    finally:
        preemption.listen_in_worker()
        signal.signal(signal.SIGTERM, before)
