"""Failures of object stores: user error, missing object, or temporary outage.

Each client raises its own errors. :func:`retry_transient` turns them into ``UserError`` (wrong
credentials, missing bucket), ``FileNotFoundError`` (missing object), or, after retries,
``StoreUnavailableError``.
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
from skillnet_platform.errors import UserError, find_raising_package, suggest_name
from skillnet_platform.package_version import extra_command
from skillnet_platform.terminal_text import shorten_text

Result = TypeVar("Result")

#: Seconds in which an operation is repeated before it fails.
PATIENCE_VARIABLE = "SKILLNET_STORE_PATIENCE"
DEFAULT_PATIENCE_S = 120.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0
#: Seconds between two warnings about one store.
QUIET_S = 30.0

#: Scheme -> extra with its client.
CLIENTS = {
    "s3": "s3",
    "gs": "gs",
    "gcs": "gs",
    "abfs": "azure",
    "abfss": "azure",
    "az": "azure",
}
#: Schemes of Azure, where a bucket is called a container.
AZURE = ("abfs", "abfss", "az")

# Error numbers of requests that no retry repairs.
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
# Texts of clients about a missing bucket. A path with that word must not match.
_NO_BUCKET = re.compile(
    r"NoSuchBucket|ContainerNotFound"
    r"|(?<![\w/.-])bucket\b(?![/.-])[^/]{0,80}(does not exist|not found)",
    re.IGNORECASE,
)
_CLIENT_PACKAGES = (
    *("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec"),
    *("gcsfs", "google", "adlfs", "azure"),
    # The client of the Hub has one of the two, which depends on its version.
    *("huggingface_hub", "httpx", "httpx2"),
)
# Names of credential errors: the client may not be installed.
_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
    *("ProfileNotFound", "TokenRetrievalError"),
    *("DefaultCredentialsError", "RefreshError"),
    *("ClientAuthenticationError", "CredentialUnavailableError"),
}

_last_warned: dict[str, float] = {}
_lock = threading.Lock()


#: Advice at the end of the message about an outage.
ADVICE = ". Run the same command again when it answers"


class StoreUnavailableError(RuntimeError):
    """Outage of an object store that lasted longer than the retries. No local data is lost."""

    @property
    def reason(self) -> str:
        """Return the message without the advice."""
        return str(self).removesuffix(ADVICE)


def retry_patience() -> float:
    """Return the seconds of retries: ``$SKILLNET_STORE_PATIENCE``, else 120.

    Raises:
        UserError: the variable is not a number of seconds.
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


def retry_transient(uri: str, action: Callable[[], Result]) -> Result:
    """Run an action on a store; repeat it after transient failures, with growing random pauses.

    Args:
        uri: address of the object, for messages.
        action: idempotent function.

    Raises:
        UserError: the store refused the credentials, the bucket or the scheme.
        FileNotFoundError: the object does not exist.
        StoreUnavailableError: the store did not answer within :func:`retry_patience`.
    """
    import tenacity

    limit = retry_patience()
    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        # Full jitter: many workers must not return to one store at the same time.
        wait=tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        stop=tenacity.stop_after_delay(limit),
        before_sleep=lambda state: _tell(uri, state.outcome, limit),
        reraise=True,
    )
    try:
        return again(action)
    except Exception as error:
        said = explain_refusal(uri, error)
        if said is not None:
            raise UserError(said) from error
        if _status(error) == 404:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
        if not is_transient(error):
            raise
        raise StoreUnavailableError(
            f"{uri}: the store{_endpoint(uri)} did not answer for {limit:.0f} s "
            f"({_words(error)}){ADVICE}"
        ) from error


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    # Tested before OSError, of which the first three are subclasses.
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError | UserError):
        return False
    # Some clients raise it as an OSError, which would count as transient below.
    if _is_about_credentials(error):
        return False
    status = _status(error)
    # The Hub's answers are OSErrors with a status.
    if isinstance(error, OSError) and status is None:
        return error.errno not in _REFUSED
    if isinstance(error, ValueError):
        return False
    if status is not None:
        # 408 and 429 mean timeout and too many requests: both pass without a change.
        return status >= 500 or status in (408, 429)
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, TimeoutError) or package in _CLIENT_PACKAGES


def explain_refusal(uri: str, error: BaseException) -> str | None:
    """Return the user's message for a permanent refusal or a missing client, else ``None``."""
    scheme = urlsplit(uri).scheme
    if isinstance(error, ImportError):
        extra = CLIENTS.get(scheme)
        hint = extra_command(extra) if extra else str(error)
        return f"{uri}: the client for {scheme}:// is not installed: {hint}"
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        return f"{uri}: {scheme}:// is not a known object store{suggest_name(scheme, CLIENTS)}"
    # A local path has no credentials, so advice about them would mislead.
    if isinstance(error, PermissionError) and scheme in ("file", "local"):
        return f"{uri}: no permission ({error.strerror or error})"
    if isinstance(error, PermissionError) or _is_about_credentials(error):
        return (
            f"{uri}: the store{_endpoint(uri)} refused the credentials ({_words(error)}). "
            f"{_credentials_hint(scheme)}"
        )
    absent = isinstance(error, FileNotFoundError) or _status(error) == 404
    if absent and _NO_BUCKET.search(str(error)):
        return missing_bucket(uri)
    invalid = isinstance(error, OSError) and error.errno == errno.EINVAL
    # Errors of clients about an invalid address, key or request.
    invalid |= isinstance(error, ValueError) and find_raising_package(error) in _CLIENT_PACKAGES
    if invalid or _status(error) == 400:
        return f"{uri}: the store{_endpoint(uri)} refused the request ({_words(error)})"
    return None


def missing_bucket(uri: str) -> str:
    """Return the message about the missing bucket of a URI."""
    parts = urlsplit(uri)
    more = " or AWS_ENDPOINT_URL" if parts.scheme == "s3" else ""
    what, name = "bucket", parts.netloc
    if parts.scheme in AZURE:  # abfs://container@account.dfs.core.windows.net/…
        what, name = "container", parts.netloc.partition("@")[0]
    return (
        f"{uri}: there is no {what} {name!r}{_endpoint(uri)}; create it, or correct its name{more}"
    )


def _is_about_credentials(error: BaseException) -> bool:
    if _status(error) in (401, 403):
        return True
    # gcsfs turns a 403 into an OSError without a number.
    if type(error) is OSError and str(error).startswith("Forbidden"):
        return True
    # adlfs turns missing or unreadable credentials into a ValueError.
    if type(error) is ValueError and str(error).startswith("unable to connect to account"):
        return True
    return not _CREDENTIALS.isdisjoint(kind.__name__ for kind in type(error).__mro__)


def _credentials_hint(scheme: str) -> str:
    if scheme == "s3":
        return (
            "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, to credentials with "
            "read and write access"
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
    if scheme == "hf":
        return "Set HF_TOKEN to a token that reads it"
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


def _status(error: BaseException) -> int | None:
    # Each client keeps the HTTP status in another place.
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    codes = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    codes += [response, getattr(response, "status_code", None)]
    return next((int(each) for each in codes if isinstance(each, int)), None)


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {shorten_text(text, 100)}" if text else type(error).__name__


def _tell(uri: str, outcome: Any, limit: float) -> None:
    store = urlsplit(uri).netloc
    now = time.monotonic()
    with _lock:
        # Many transfers retry at once; one line per outage is enough.
        if now - _last_warned.get(store, float("-inf")) < QUIET_S:
            return
        _last_warned[store] = now
    console.print_warning(
        f"{uri}: the store{_endpoint(uri)} does not answer ({_words(outcome.exception())}); "
        f"retrying for up to {limit:.0f} s"
    )
