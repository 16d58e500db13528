"""TODO: skillnet_platform.tracking.system_metrics."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping


@contextlib.contextmanager
def system_metrics(
    run_id: str,
    uri: str,
    publish: Callable[[Mapping[str, float], int], None],
    every_s: float = 10.0,
) -> Iterator[None]:
    """Publish CPU, memory, disk, network and GPU figures, named ``system/…``, during the block.

    MLflow's monitors, our sending: its own thread stops for good at the first lost request.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)
    stop = threading.Event()

    def watch() -> None:
        step, ended = 0, False
        while not ended:
            monitor.collect_metrics()
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
        thread.join(timeout=every_s)
