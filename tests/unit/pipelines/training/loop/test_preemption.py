"""Graceful preemption: signals, stop signals of a driver, and handlers after a fit."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.loop import preemption, worker
from pipelines.training.runs.identity import compute_identity
from skillnet_platform import signals
from skillnet_platform.ray_internals.errors import WorkerGroupResize
from tests.helpers.stop_files import FILE, FileStopSignal
from tests.helpers.waiting import wait_until


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_requests_a_stop_and_a_second_one_interrupts(number, tmp_path):
    file = tmp_path / FILE
    file.touch()  # left by an earlier run
    with preemption.listen_in_driver(FileStopSignal(file)):
        assert not preemption.stop_requested()
        assert not file.exists()
        os.kill(os.getpid(), number)
        assert preemption.stop_requested()
        wait_until(file.exists, 30)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert preemption.received_signal() is number
    assert not preemption.stop_requested()
    assert not file.exists()


def test_nohup_keeps_a_run_through_the_end_of_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemption.listen_in_driver(), signals.terminate_as_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not preemption.stop_requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_file_of_the_driver_requests_a_stop(tmp_path: Path) -> None:
    file = tmp_path / FILE
    with preemption.listen_in_driver(), preemption.watch_stop_signal(FileStopSignal(file)):
        assert not preemption.stop_requested()
        file.touch()
        wait_until(preemption.stop_requested, 30)


class Unreachable:
    """A stop signal in a store that does not answer."""

    def set(self) -> None:
        raise ConnectionError("the head does not answer")

    def clear(self) -> None:
        pass

    def is_set(self) -> bool:
        raise ConnectionError("the head does not answer")


def test_unreachable_stop_signal_causes_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with preemption.listen_in_driver(Unreachable()), preemption.watch_stop_signal(Unreachable()):
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.stop_requested()
    assert (
        "the stop request did not reach the workers (the head does not answer)"
        in capsys.readouterr().err
    )


def test_ctrl_c_handler_is_restored_after_a_fit() -> None:
    before = signal.getsignal(signal.SIGINT)
    with preemption.listen_in_driver():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before


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
