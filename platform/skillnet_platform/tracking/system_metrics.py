"""CPU, memory, disk, network and GPU metrics of a run."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

from skillnet_platform.secret_uri import SecretUri


@contextlib.contextmanager
def system_metrics(
    run_id: str,
    uri: SecretUri,
    publish: Callable[[Mapping[str, float], int], None],
    every_s: float = 10.0,
) -> Iterator[None]:
    """Publish system metrics named ``system/…`` during a block.

    MLflow's monitors collect them. MLflow's own thread would stop at the first lost request.

    Args:
        run_id: MLflow run.
        uri: tracker of the run.
        publish: sends metrics and their step.
        every_s: seconds between two measurements.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, tracking_uri=uri.reveal())
    stop = threading.Event()

    def watch() -> None:
        step, ended = 0, False
        while not ended:
            monitor.collect_metrics()
            # The last, shorter interval is published too.
            ended = stop.wait(every_s)
            values = monitor.aggregate_metrics()
            publish({f"system/{name}": value for name, value in values.items()}, step)
            for each in monitor.monitors:
                each.clear_metrics()
            step += 1

    thread = threading.Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        # With a limit: a stuck measurement must not delay the end of the run.
        thread.join(timeout=every_s)
