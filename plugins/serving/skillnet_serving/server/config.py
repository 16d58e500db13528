"""Settings of ``skillnet serve``, and the limits that follow from them."""

from dataclasses import dataclass
from typing import Literal

from skillnet_platform.config.bounds import (
    PortNumber,
    PositiveAmount,
    PositiveCount,
    require_bounds,
)


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
        vectors: numbers of the indexes: float32, int8 or binary, as in ``skillnet search``.
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
    vectors: Literal["float32", "int8", "binary"] = "float32"
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

    @property
    def requests_of_replica(self) -> int:
        """Requests that a replica has at the same time; one client has half of them at most."""
        # One batch runs, others are read meanwhile.
        return max(4 * self.max_batch_size, 8)

    @property
    def limits(self) -> "ServerLimits":
        """Limits of the server in front of the replicas."""
        return ServerLimits(
            self.max_bytes,
            self.max_rows,
            self.max_requests,
            self.timeout_s,
            max_running=self.replicas * self.requests_of_replica,
        )


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a server's requests and connections.

    Args:
        max_bytes: largest size of the body of a request.
        max_rows: largest length of a prediction request.
        max_requests: that are in progress at the same time.
        timeout_s: seconds for the answer of a request.
        max_running: requests that the replicas have at the same time; others wait.
        head_s: seconds until a connection has sent its request line and headers.
        body_s: seconds until a request has its body.
        taking_s: seconds that a client may take to receive its answer.
    """

    max_bytes: int
    max_rows: int
    max_requests: int
    timeout_s: float
    max_running: int = 64
    head_s: float = 10.0
    body_s: float = 60.0
    taking_s: float = 60.0

    @property
    def max_connections(self) -> int:
        """Connections at the same time; one address has half of them at most."""
        return 2 * self.max_requests + 256
