"""Client and URL of the job server in a cluster's dashboard."""

from typing import Any

from ray.job_submission import JobSubmissionClient

#: Seconds for the job server to answer one request. Ray's own client has no limit.
REQUEST_TIMEOUT_S = 120.0


class JobServerClient(JobSubmissionClient):
    """``JobSubmissionClient`` that waits at most :data:`REQUEST_TIMEOUT_S` for an answer."""

    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        return super()._do_request(*arguments, **{"timeout": REQUEST_TIMEOUT_S, **options})


def find_job_server_url(gcs_address: str) -> str:
    """Return the URL of the job server of the cluster whose GCS has this address."""
    from ray.dashboard.utils import ray_address_to_api_server_url

    return str(ray_address_to_api_server_url(gcs_address))
