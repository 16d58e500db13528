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
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines.training.config.resources import request_model
from skillnet_platform import console, signals
from skillnet_platform.cli import command
from skillnet_platform.cluster import loopback
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root
from skillnet_platform.storage.location import parse_location
from skillnet_serving.server.admission import read_token
from skillnet_serving.server.config import ServeConfig

if TYPE_CHECKING:
    from skillnet_serving.server.http_server import AskReplica

DEPLOYMENT = "skillnet"
#: Ray Serve would report every start and every request.
LOGGING = {"log_level": "WARNING", "enable_access_log": False}
#: Seconds between health checks of a replica; a dead one is replaced after it.
HEALTH_CHECK_S = 2.0
#: Files that the command has open beside its connections.
OTHER_FILES = 256


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


def _uses_ray(config: ServeConfig) -> bool:
    return config.replicas > 1 or bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def open_model(config: ServeConfig) -> "Iterator[tuple[AskReplica, dict[str, Any]]]":
    """Load a model during a block; return the function that asks it, and its description.

    Args:
        config: settings of the server.

    Raises:
        UserError: the model or a corpus is missing or damaged.
    """
    if _uses_ray(config):
        from skillnet_serving.server.served_model import ServedModel

        # A wrong model fails before Ray starts.
        about = ServedModel(config).describe()
        with _run_replicas(config) as handle:
            yield lambda method, request: getattr(handle, method).remote(request), about
        return
    import torch

    from skillnet_serving.server.model_replica import ModelReplica

    torch.set_num_threads(max(int(config.cpus), 1))
    replica = ModelReplica(config)
    try:
        with signals.terminate_as_interrupt():
            yield replica.ask, replica.describe()
    finally:
        replica.close()


@contextlib.contextmanager
def _run_replicas(config: ServeConfig) -> Iterator[Any]:
    """Run replicas of Ray Serve during a block, and return their handle."""
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
            max_ongoing_requests=config.requests_of_replica,
            max_queued_requests=config.max_requests,
            health_check_period_s=HEALTH_CHECK_S,
            logging_config=LOGGING,
            ray_actor_options={"num_cpus": config.cpus},
        )
        try:
            yield serve.run(deployment.bind(config), name=DEPLOYMENT, route_prefix=None)
        finally:
            # An embedded Ray ends with this block, without the half minute that this may take.
            if is_shared:
                serve.shutdown()


def require_open_files(config: ServeConfig) -> None:
    """Let this process open a file for each connection.

    Args:
        config: settings of the server.

    Raises:
        UserError: the machine allows fewer files.
    """
    needed = config.limits.max_connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed > hard != resource.RLIM_INFINITY:
        raise UserError(
            f"--max_requests {config.max_requests}: the server needs {needed} open files, the "
            f"limit is {hard}. Give fewer, or run: ulimit -n {needed}"
        )
    if needed > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def build_server(
    config: ServeConfig, ask: "AskReplica", about: dict[str, Any], token: str | None
) -> Any:
    """Return the HTTP server of uvicorn for replicas.

    Args:
        config: settings of the server.
        ask: calls the replicas.
        about: description of the model.
        token: that requests must have, or None.
    """
    from skillnet_serving.server.admission import configure_server
    from skillnet_serving.server.http_server import ModelGateway, build_application

    lost: tuple[type[Exception], ...] = ()
    full: tuple[type[Exception], ...] = ()
    if _uses_ray(config):
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        lost, full = (RayActorError, DeploymentUnavailableError), (BackPressureError,)
    gateway = ModelGateway(ask, about, config.limits, lost, full)
    application = build_application(gateway, token, config.limits)
    return configure_server(application, config.host, config.port, config.limits)


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
    require_open_files(config)
    port = loopback.choose_port(config.host, config.port)
    model = pin_version(config.model, config.tracking_uri)
    data = str(parse_location(config.data, data_root())) if config.data else None
    config = replace(config, port=port, model=model, data=data)
    address = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}"
    try:
        # torch loads here: --help and wrong names do not need it.
        with open_model(config) as (ask, about):
            server = build_server(config, ask, about, token)
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
