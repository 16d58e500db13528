"""URIs that may hold a secret: shown without it everywhere, complete only on request.

A tracker, a database or an object store can be named by a URI with a password or a token. Such a
URI would reach configuration files, MLflow's parameters, bundles and logs. :class:`SecretUri` is
text without the secret, so every ordinary use of it is safe.
"""

import re
from typing import Any
from urllib.parse import quote

#: Stands for a removed secret.
REDACTED = "***"

#: Names of query parameters that hold a secret, such as ``X-Amz-Signature`` or ``sig``.
_PARAMETERS = (
    r"(?:[\w.%-]*[-_.])?(?:password|sslpassword|passwd|pwd|passphrase|secret|token|sig|signature|"
    r"credentials?|key|apikey|accountkey|sharedkey|(?:aws)?accesskey(?:id)?|secretkey|"
    r"sessiontoken)(?:[-_]id)?"
)
_SECRETS = re.compile(
    # SQLAlchemy allows a slash in a password. For HTTP a slash ends the host.
    r"(?P<http>https?://[^:/@\s]*:)[^/\s]*(?=@)"
    r"|(?P<other>\b(?!https?:)[a-z][a-z0-9+.-]{0,30}://[^:/@\s]*:)[^@\s]*(?:@[^/@\s?]*)*(?=@)"
    rf"|(?P<parameter>[?&;#]{_PARAMETERS}=)[^&;#\s'\"]+",
    re.IGNORECASE,
)


def redact_secrets(text: str) -> str:
    """Return a text with ``***`` in place of the passwords and tokens of URIs in it."""
    if "://" not in text:
        return text
    return _SECRETS.sub(lambda found: f"{found[found.lastgroup or 0]}{REDACTED}", text)


class SecretUri(str):
    """URI whose text has ``***`` in place of its password and secret query parameters.

    ``str``, ``repr``, JSON, YAML and comparisons see only that text. :meth:`reveal` returns the
    complete URI. Pickle keeps it, because a driver sends it to its workers.

    Args:
        uri: complete URI, or one that was written without its secret.
    """

    __slots__ = ("_complete",)
    _complete: str

    def __new__(cls, uri: str) -> "SecretUri":
        """Return ``uri`` itself if it is one already, which keeps its secret."""
        if isinstance(uri, cls):
            return uri
        made = super().__new__(cls, redact_secrets(uri))
        made._complete = uri
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return SecretUri, (self._complete,)

    def reveal(self) -> str:
        """Return the complete URI, for the client that connects."""
        return self._complete

    @property
    def has_secret(self) -> bool:
        """Return whether the complete URI holds a secret that the text does not show."""
        return self._complete != str(self)

    @property
    def is_redacted(self) -> bool:
        """Return whether the secret is lost: the URI was read from where it is not kept."""
        marks = (found[0].endswith(REDACTED) for found in _SECRETS.finditer(self._complete))
        return not self.has_secret and any(marks)

    @property
    def address(self) -> str:
        """Return the URI without user and password, for a link."""
        return re.sub(r"(?<=://)[^/]*@", "", str(self), count=1)

    def with_secret(self, secret: str) -> "SecretUri":
        """Return the URI with ``secret`` in place of each removed secret."""
        return SecretUri(self._complete.replace(REDACTED, quote(secret, safe="")))
