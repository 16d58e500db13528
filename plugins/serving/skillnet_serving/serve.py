"""``skillnet serve``: a trained model over HTTP.

    POST /v1/predict   {"rows": [{"text": …} or {"file": base64, "name": "heart.png"}], "top": 5}
    POST /v1/search    {"query": "红色的心", "task": "text_to_image", "top": 12}, or "file", "name"
    GET  /search       the same as a page with an input box and a file input
    POST /search       its form with a file
    GET  /v1/tasks     the tasks of the model
    GET  /health       without a token
    GET  /metrics      for Prometheus

The process of the command answers HTTP (:mod:`.server.http_server`). It also holds the model
(:mod:`.server.model_replica`), or sends requests to several replicas of Ray Serve.
"""

import contextlib
import logging
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pipelines.training.config.resources import request_model
from skillnet_platform import console, signals
from skillnet_platform.cli import command
from skillnet_platform.cluster import loopback
from skillnet_platform.config.bounds import (
    PortNumber,
    PositiveAmount,
    PositiveCount,
    require_bounds,
)
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root
from skillnet_platform.storage.location import parse_location
from skillnet_serving.server.access_token import read_token

if TYPE_CHECKING:
    from skillnet_serving.server.connection_guard import ServerLimits
    from skillnet_serving.server.http_server import ModelHandle
    from skillnet_serving.server.served_model import ServedModelConfig

DEPLOYMENT = "skillnet"
#: Ray Serve would report every start and every request.
LOGGING = {"log_level": "WARNING", "enable_access_log": False}
#: Seconds between health checks of a replica; a dead one is replaced after it.
HEALTH_CHECK_S = 2.0
#: Files that the command has open beside its connections.
OTHER_FILES = 256


@dataclass
class ServeConfig:
    """Serve a trained model over HTTP.

    Args:
        model: registry address, name, id or folder of a run, checkpoint, or saved model.
        data: prepared corpora, for searches; by default those of the model's run, else corpora
            below the run root.
        host: interface to listen on; any but loopback needs a token.
        port: port to listen on; 0 takes a free port.
        token_file: file with the bearer token, which only its owner may read; without it the
            environment variable SKILLNET_SERVE_TOKEN counts.
        search: whether corpora can be searched; false needs no corpora.
        replicas: copies of the model. One runs in the process of the command; more, or one on the
            cluster of RAY_ADDRESS, have a process of Ray Serve each.
        cpus: CPUs of a replica.
        max_batch_size: requests that a replica answers together.
        max_requests: requests that are in progress at the same time; the server answers 503 beyond.
            One client has half of them at most, and so of memory, decoders and the model's turns.
        max_bytes: bytes of a request; files travel as base64, which adds a third.
        max_rows: rows of a request.
        timeout_s: seconds until a request without an answer gets 503, and its work stops.
        precision: auto, bf16, fp32 or fp64.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    model: str = "models:/skillnet@champion"
    data: str | None = None
    host: str = "127.0.0.1"
    port: PortNumber = 8080
    token_file: str | None = None
    search: bool = True
    replicas: PositiveCount = 1
    cpus: PositiveAmount = 1.0
    max_batch_size: PositiveCount = 16
    max_requests: PositiveCount = 256
    max_bytes: PositiveCount = 32 * 2**20
    max_rows: PositiveCount = 64
    timeout_s: PositiveAmount = 60.0
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        require_bounds(self)


def pin_version(model: str, tracking_uri: str | None) -> str:
    """Return the address of a model with its version: an alias may move while a server runs.

    Args:
        model: address of the model.
        tracking_uri: address of the tracker.

    Raises:
        UserError: there is no such model.
    """
    from pipelines.training.runs.model_source import resolve_model

    source = resolve_model(model, tracking_uri)
    if "@" not in model or not model.startswith("models:/"):
        return model
    return f"{model.rpartition('@')[0]}/{source.version}"


@contextlib.contextmanager
def open_model(
    config: ServeConfig, served: "ServedModelConfig"
) -> "Iterator[tuple[ModelHandle, dict[str, Any]]]":
    """Load a model during a block, and return its handle and description.

    Args:
        config: settings of the server.
        served: the model.

    Raises:
        UserError: the model or a corpus is missing or damaged.
    """
    if config.replicas > 1 or os.environ.get("RAY_ADDRESS"):
        from skillnet_serving.server.served_model import ServedModel

        # A wrong model fails before Ray starts.
        about = ServedModel(served).describe()
        with run_replicas(config, served) as handle:
            yield handle, about
        return
    import torch

    from skillnet_serving.server.model_replica import LocalHandle, ModelReplica

    torch.set_num_threads(max(int(config.cpus), 1))
    replica = ModelReplica(served)
    try:
        with signals.terminate_as_interrupt():
            yield LocalHandle(replica), replica.describe()
    finally:
        replica.close()


@contextlib.contextmanager
def run_replicas(config: ServeConfig, served: "ServedModelConfig") -> Iterator[Any]:
    """Run replicas of Ray Serve during a block, and return their handle.

    Args:
        config: settings of the server.
        served: the model.
    """
    from skillnet_platform.cluster import connect

    connect.prepare_ray_environment()
    import ray

    is_shared = ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))
    slots = max(len(os.sched_getaffinity(0)), -int(-config.replicas * config.cpus // 1))
    with connect.ray_session(slots), signals.terminate_as_interrupt():
        from ray import serve

        from skillnet_serving.server.model_replica import ModelReplica

        # Without Ray Serve's own HTTP server, which reads bodies of any size.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config=LOGGING)
        deployment: Any = serve.deployment(
            ModelReplica,
            name=DEPLOYMENT,
            num_replicas=config.replicas,
            max_ongoing_requests=_requests_of_replica(config),
            max_queued_requests=config.max_requests,
            health_check_period_s=HEALTH_CHECK_S,
            logging_config=LOGGING,
            ray_actor_options={"num_cpus": config.cpus},
        )
        try:
            yield serve.run(deployment.bind(served), name=DEPLOYMENT, route_prefix=None)
        finally:
            # An embedded Ray ends with this block, without the half minute that this may take.
            if is_shared:
                serve.shutdown()


def limits_of(config: ServeConfig) -> "ServerLimits":
    """Return the limits of a server, and let this process open a file for each connection.

    Args:
        config: settings of the server.

    Raises:
        UserError: the machine allows fewer files.
    """
    from skillnet_serving.server.connection_guard import ServerLimits

    limits = ServerLimits(
        config.max_bytes,
        config.max_rows,
        config.max_requests,
        config.timeout_s,
        max_running=config.replicas * _requests_of_replica(config),
    )
    needed = limits.max_connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed > hard != resource.RLIM_INFINITY:
        raise UserError(
            f"--max_requests {config.max_requests}: the server needs {needed} open files, the "
            f"limit is {hard}. Give fewer, or run: ulimit -n {needed}"
        )
    if needed > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return limits


def build_server(config: ServeConfig, handle: Any, about: dict[str, Any], token: str | None) -> Any:
    """Return the HTTP server of uvicorn for replicas.

    Args:
        config: settings of the server.
        handle: that calls the replicas.
        about: description of the model.
        token: that requests must have, or None.
    """
    from skillnet_serving.server.connection_guard import configure_server
    from skillnet_serving.server.http_server import ModelGateway, build_application
    from skillnet_serving.server.model_replica import LocalHandle

    limits = limits_of(config)
    lost: tuple[type[Exception], ...] = ()
    full: tuple[type[Exception], ...] = ()
    if not isinstance(handle, LocalHandle):
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        lost, full = (RayActorError, DeploymentUnavailableError), (BackPressureError,)
    gateway = ModelGateway(handle, about, limits, lost, full)
    application = build_application(gateway, token, limits)
    return configure_server(application, config.host, config.port, limits)


def _requests_of_replica(config: ServeConfig) -> int:
    # One batch runs, others are read meanwhile. One client has half of them at most.
    return max(4 * config.max_batch_size, 8)


@command(
    ServeConfig,
    description="Answer predictions and searches of a trained model over HTTP, in batches. Several "
    "replicas run on Ray Serve. Listens on loopback; other interfaces need a token.",
    example="skillnet serve --model my-run\n"
    "curl -s -H 'Content-Type: application/json' -d "
    '\'{"rows": [{"text": "宋代陶瓷工艺史"}]}\' http://127.0.0.1:8080/v1/predict\n'
    "skillnet serve --host 0.0.0.0 --token_file token.txt --replicas 4",
    resources=lambda config: request_model(config.model, config.data),
    essential=("model", "data", "host", "port", "token_file", "replicas", "max_requests"),
)
def main(config: ServeConfig) -> int:
    """Serve until interrupted."""
    token = read_token(config.token_file, config.host)
    limits_of(config)
    port = loopback.choose_port(config.host, config.port)
    model = pin_version(config.model, config.tracking_uri)
    # torch loads here: --help and wrong names do not need it.
    from skillnet_serving.server.served_model import ServedModelConfig

    served = ServedModelConfig(
        model,
        str(parse_location(config.data, data_root())) if config.data else None,
        config.precision,
        config.tracking_uri,
        config.search,
        config.max_batch_size,
    )
    address = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}"
    try:
        with open_model(config, served) as (handle, about):
            server = build_server(replace(config, port=port), handle, about, token)
            console.print_note(f"{about['model']}: {', '.join(about['tasks'])}; Ctrl-C stops")
            if about["search"]:
                console.print_note(
                    f"predictions are answered now, searches when their corpora are embedded; "
                    f"{address}/health has the progress"
                )
            console.print_output(address)
            server.run()
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
