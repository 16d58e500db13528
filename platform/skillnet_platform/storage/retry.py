"""What an object store's failure means: the user's mistake, or a store that is away for a while.

Clients raise their own errors; here they become a ``UserError`` (wrong credentials, missing
bucket), a ``FileNotFoundError`` (no such object), or, after patient tries, ``StoreUnavailableError``.
"""

import errno
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from skillnet_platform import console
from skillnet_platform.errors import UserError, suggest_name

Result = TypeVar("Result")

#: Seconds that an operation is tried again before it counts as failed.
PATIENCE_VARIABLE = "SKILLNET_STORE_PATIENCE"
DEFAULT_PATIENCE_S = 120.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0
#: People hear of a store that is away no more often than this.
QUIET_S = 30.0

#: What pip installs for a scheme whose client is missing.
CLIENTS = {
    "s3": "'skillnet-platform[s3]'",
    "gs": "'skillnet-platform[gs]'",
    "gcs": "'skillnet-platform[gs]'",
    "abfs": "'skillnet-platform[azure]'",
    "abfss": "'skillnet-platform[azure]'",
    "az": "'skillnet-platform[azure]'",
}
#: Schemes of Azure, where a bucket is called a container.
AZURE = ("abfs", "abfss", "az")

# Codes that clients give for requests that will never succeed as they are.
_REFUSED = {
    errno.EINVAL,
    errno.EPERM,
    errno.EACCES,
    errno.ENOSYS,
    errno.ENAMETOOLONG,
    errno.EREMCHG,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENOSPC,
    errno.EDQUOT,
}
# How clients say that a bucket is not there: not a path with that word in it.
_NO_BUCKET = re.compile(
    r"NoSuchBucket|ContainerNotFound"
    r"|(?<![\w/.-])bucket\b(?![/.-])[^/]{0,80}(does not exist|not found)",
    re.IGNORECASE,
)
_CLIENT_PACKAGES = (
    *("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec"),
    *("gcsfs", "google", "adlfs", "azure"),
)
# Clients' errors about credentials, by name: a client need not be there.
_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
    *("ProfileNotFound", "TokenRetrievalError"),
    *("DefaultCredentialsError", "RefreshError"),
    *("ClientAuthenticationError", "CredentialUnavailableError"),
}

_told: dict[str, float] = {}
_lock = threading.Lock()


#: What to do about a store that is away, at the end of its message.
ADVICE = ". Run the same command again when it does"


class StoreUnavailableError(RuntimeError):
    """The store did not answer for longer than we wait. Nothing local is lost by it."""

    @property
    def reason(self) -> str:
        """The message without what to do: for a longer one that says so itself."""
        return str(self).removesuffix(ADVICE)


def retry_patience() -> float:
    """Seconds for which an operation is tried again: ``$SKILLNET_STORE_PATIENCE``, else 120.

    Raises:
        UserError: the variable holds no number of seconds.
    """
    given = os.environ.get(PATIENCE_VARIABLE)
    if not given:
        return DEFAULT_PATIENCE_S
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UserError(f"{PATIENCE_VARIABLE} is {given!r}, expected seconds such as 120")
    return seconds


def retry_transient(uri: str, action: Callable[[], Result], seconds: float | None = None) -> Result:
    """Do something with a store; if it is away, try again with growing, random pauses.

    Args:
        uri: what it is about, for messages.
        action: must do no harm when done twice.
        seconds: how long to try; none for :func:`retry_patience`.

    Raises:
        UserError: the store refused: credentials, bucket, scheme.
        FileNotFoundError: there is no such object.
        StoreUnavailableError: it did not answer for so long.
    """
    import tenacity

    limit = retry_patience() if seconds is None else seconds
    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        # Full jitter: many workers that lost one store do not come back to it all at once.
        wait=tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        stop=tenacity.stop_after_delay(limit),
        before_sleep=lambda state: _tell(uri, state.outcome, limit),
        reraise=True,
    )
    try:
        return again(action)
    except Exception as problem:
        said = explain_refusal(uri, problem)
        if said is not None:
            raise UserError(said) from problem
        if _status(problem) == 404:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from problem
        if not is_transient(problem):
            raise
        raise StoreUnavailableError(
            f"{uri}: the store{_endpoint(uri)} did not answer for {limit:.0f} s "
            f"({_words(problem)}){ADVICE}"
        ) from problem


def is_transient(problem: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(problem, FileNotFoundError | PermissionError | FileExistsError | UserError):
        return False
    if _is_about_credentials(problem):
        return False
    if isinstance(problem, OSError):
        return problem.errno not in _REFUSED
    if isinstance(problem, ValueError):
        return False
    status = _status(problem)
    if status is not None:
        return status >= 500 or status in (408, 429)
    package = type(problem).__module__.partition(".")[0]
    return isinstance(problem, TimeoutError) or package in _CLIENT_PACKAGES


def explain_refusal(uri: str, problem: BaseException) -> str | None:
    """The message for people if the store, or the lack of a client, refuses for good."""
    scheme = urlsplit(uri).scheme
    if isinstance(problem, ImportError):
        package = CLIENTS.get(scheme)
        hint = f"pip install {package}" if package else str(problem)
        return f"{uri}: the client for {scheme}:// is not installed: {hint}"
    if isinstance(problem, ValueError) and "Protocol not known" in str(problem):
        return f"{uri}: {scheme}:// is no known kind of store{suggest_name(scheme, CLIENTS)}"
    if isinstance(problem, PermissionError) and scheme in ("file", "local"):
        return f"{uri}: no permission ({problem.strerror or problem})"
    if isinstance(problem, PermissionError) or _is_about_credentials(problem):
        return (
            f"{uri}: the store{_endpoint(uri)} refused the credentials ({_words(problem)}). "
            f"{_credentials_hint(scheme)}"
        )
    absent = isinstance(problem, FileNotFoundError) or _status(problem) == 404
    if absent and _NO_BUCKET.search(str(problem)):
        return missing_bucket(uri)
    invalid = isinstance(problem, OSError) and problem.errno == errno.EINVAL
    # What a client says of an address, a key or a request that cannot be right.
    invalid |= isinstance(problem, ValueError) and _raised_in(problem) in _CLIENT_PACKAGES
    if invalid or _status(problem) == 400:
        return f"{uri}: the store{_endpoint(uri)} refused the request ({_words(problem)})"
    return None


def missing_bucket(uri: str) -> str:
    """The message that the bucket of a URI is not there."""
    parts = urlsplit(uri)
    more = " or AWS_ENDPOINT_URL" if parts.scheme == "s3" else ""
    what, name = "bucket", parts.netloc
    if parts.scheme in AZURE:  # abfs://container@account.dfs.core.windows.net/…
        what, name = "container", parts.netloc.partition("@")[0]
    return f"{uri}: there is no {what} {name!r}{_endpoint(uri)}; create it, or mend its name{more}"


def _is_about_credentials(problem: BaseException) -> bool:
    if _status(problem) in (401, 403):
        return True
    # What gcsfs makes of a 403: an OSError without a number.
    if type(problem) is OSError and str(problem).startswith("Forbidden"):
        return True
    # What adlfs makes of credentials that are not there, or cannot be read.
    if type(problem) is ValueError and str(problem).startswith("unable to connect to account"):
        return True
    return not _CREDENTIALS.isdisjoint(kind.__name__ for kind in type(problem).__mro__)


def _credentials_hint(scheme: str) -> str:
    if scheme == "s3":
        return (
            "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, to ones that may "
            "read and write there"
        )
    if scheme in AZURE:
        return (
            "Set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and "
            "AZURE_STORAGE_ACCOUNT_KEY, to ones that may read and write there"
        )
    if scheme in ("gs", "gcs"):
        return (
            "Set GOOGLE_APPLICATION_CREDENTIALS to the key file of an account that may read and "
            "write there, or run: gcloud auth application-default login"
        )
    return "Give this machine credentials that may read and write there"


def _endpoint(uri: str) -> str:
    if urlsplit(uri).scheme != "s3":
        return ""
    found = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    # Only scheme and host: an address may carry a password.
    if not found:
        return ""
    parts = urlsplit(found)
    return f" at {parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _status(problem: BaseException) -> int | None:
    response: Any = getattr(problem, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    told = [getattr(problem, name, None) for name in ("status", "status_code", "code")]
    told += [response, getattr(response, "status_code", None)]
    return next((int(each) for each in told if isinstance(each, int)), None)


def _raised_in(problem: BaseException) -> str:
    """The top package of the frame that raised."""
    frame = problem.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    name = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return str(name).partition(".")[0]


def _words(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    short = text if len(text) <= 100 else text[:99] + "…"
    return f"{type(problem).__name__}: {short}" if text else type(problem).__name__


def _tell(uri: str, outcome: Any, limit: float) -> None:
    store = urlsplit(uri).netloc
    now = time.monotonic()
    with _lock:
        if now - _told.get(store, float("-inf")) < QUIET_S:
            return
        _told[store] = now
    console.warn(
        f"{uri}: the store{_endpoint(uri)} does not answer ({_words(outcome.exception())}); "
        f"trying again for up to {limit:.0f} s"
    )
