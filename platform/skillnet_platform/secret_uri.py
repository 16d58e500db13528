"""URIs that may hold a secret: shown without it everywhere, complete only on request.

A tracker, a database or an object store can be named by a URI with a password or a token. Such a
URI would reach configuration files, MLflow's parameters, bundles and logs. :class:`SecretUri` is
text without the secret, so every ordinary use of it is safe.

Only parts that are known to be harmless are shown: scheme, host, port, path, the user of a database
or a file server, and the parameters of :data:`HARMLESS_PARAMETERS`. Services invent new names for
secrets, so a list of these names would always be incomplete.
"""

import re
from typing import Any
from urllib.parse import quote, unquote

#: Stands for a removed secret.
REDACTED = "***"

#: Parameters of a query whose values are shown.
HARMLESS_PARAMETERS = frozenset(
    (
        # MLflow's pages, and places of downloads.
        *("workflowtype", "viewstatesharekey", "download", "revision", "version", "versionid"),
        # Databases.
        *("host", "port", "user", "dbname", "database", "driver", "charset", "sslmode"),
        *("sslrootcert", "connect_timeout", "application_name", "target_session_attrs"),
        # What a signed address of a store permits, beside the signature.
        *("se", "sp", "spr", "sr", "ss", "srt", "st", "sv"),
        *("x-amz-algorithm", "x-amz-date", "x-amz-expires", "x-amz-signedheaders"),
    )
)
#: Schemes whose user is a name, or a container of a store. Elsewhere it may be a token.
_USER_SCHEMES = frozenset(
    (
        *("abfs", "abfss", "wasb", "wasbs"),
        *("ftp", "ftps", "hdfs", "smb", "ssh", "sftp", "webhdfs"),
        *("cockroachdb", "mariadb", "mssql", "mysql", "oracle", "postgres", "postgresql"),
    )
)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
#: Database files: a ``#`` belongs to the path.
_FILE_SCHEMES = frozenset({"sqlite", "file", "local"})
#: Hosts with ports, a bucket, or an address of IPv6.
_HOSTS = re.compile(r"(?:\[[\w:.%]*\]|[\w.~%*$+-]|,)*(?::(?:\d*|[A-Z]+)(?:,[\w.-]+(?::\d*)?)*)?")
_PARAMETER_NAME = re.compile(r"[a-z][a-z_.-]{0,23}", re.IGNORECASE)
_PLAIN_VALUE = re.compile(r"[\w.,:/+-]*")
_PLAIN_PAGE = re.compile(r"/[\w./-]*")
#: A URI in a text, or a parameter of an address without its host, as in errors of HTTP clients.
_IN_TEXT = re.compile(
    # A password may hold quotes.
    r"\b[a-z][a-z0-9+.-]{0,30}://(?:[^\s@]*@)*[^\s'\"<>`|…]*"
    r"|(?<=[?&])[\w.%-]+=[^\s&#'\"<>`|)]+",
    re.IGNORECASE,
)
#: After a URI it belongs to the sentence.
_PUNCTUATION = "])}.,:;!?"


def redact_secrets(text: str) -> str:
    """Return a text with ``***`` in place of parts of URIs in it that may be secrets."""
    if "://" not in text and "=" not in text:
        return text
    return _IN_TEXT.sub(_hide_match, text)


def _hide_match(found: re.Match[str]) -> str:
    uri = found[0].rstrip(_PUNCTUATION)
    return _hide_secrets(uri) + found[0][len(uri) :]


def _hide_secrets(uri: str) -> str:
    """Return a URI, or a parameter of one, with ``***`` in place of what may be a secret."""
    start = _SCHEME.match(uri)
    if start is None:
        return _hide_values(uri)
    scheme = start[0].partition("://")[0].lower().partition("+")[0]
    user, rest = _split_user(uri[start.end() :], scheme)
    place, mark, fragment = rest, "", ""
    if scheme not in _FILE_SCHEMES:
        place, mark, fragment = rest.partition("#")
    place, question, query = place.partition("?")
    if not _HOSTS.fullmatch(place.partition("/")[0]):
        # It is no host, so it is part of a password with characters that end a host.
        return f"{start[0]}{user}{REDACTED}"
    path, semicolon, settings = place.partition(";")
    shown = f"{start[0]}{user}{path}{semicolon}{_hide_values(settings)}"
    return f"{shown}{question}{_hide_values(query)}{mark}{_hide_fragment(fragment)}"


def _split_user(rest: str, scheme: str) -> tuple[str, str]:
    """Return user and password of a URI, with ``***`` and the ``@``, and the rest."""
    if scheme in ("http", "https"):
        # A token can hold any character. An @ after a slash is a name, such as a scope of npm.
        found = re.match(r"(?:.*[^/])?@", rest, re.DOTALL)
    else:
        # SQLAlchemy allows a slash in a password.
        found = re.match(r"([^:/@]*):[^@]*(?:@[^/@?]*)*@", rest) or re.match(r"[^/@?#]*@", rest)
    if found is None:
        return "", rest
    hidden = f"{REDACTED}@"
    if scheme in _USER_SCHEMES:
        hidden = f"{found[1]}:{REDACTED}@" if found.lastindex else found[0]
    return hidden, rest[found.end() :]


def _hide_values(parameters: str) -> str:
    """Return ``a=b&c=d`` with the values of harmless parameters only."""
    parts = re.split(r"([&;])", parameters)
    for number in range(0, len(parts), 2):
        name, equals, value = parts[number].partition("=")
        harmless = unquote(name).lower() in HARMLESS_PARAMETERS and _PLAIN_VALUE.fullmatch(value)
        if parts[number] and not (equals and harmless):
            # A token can stand in the place of a name, too.
            known = value and _PARAMETER_NAME.fullmatch(name)
            parts[number] = f"{name}={REDACTED}" if known else REDACTED
    return "".join(parts)


def _hide_fragment(fragment: str) -> str:
    """Return a fragment that names a page, such as ``/experiments/1``; of others nothing."""
    page, question, query = fragment.partition("?")
    shown = page if _PLAIN_PAGE.fullmatch(page) else REDACTED if page else ""
    return f"{shown}{question}{_hide_values(query)}"


class SecretUri(str):
    """URI whose text has ``***`` in place of every part that may be a secret.

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
        made = super().__new__(
            cls, _hide_secrets(uri) if _SCHEME.match(uri) else redact_secrets(uri)
        )
        made._complete = uri
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return SecretUri, (self._complete,)

    def reveal(self) -> str:
        """Return the complete URI, for the client that connects."""
        return self._complete

    @property
    def has_secret(self) -> bool:
        """Return whether the complete URI has parts that the text does not show."""
        return self._complete != str(self)

    @property
    def is_redacted(self) -> bool:
        """Return whether a secret is lost: the URI was read from where it is not kept."""
        return not self.has_secret and REDACTED in self._complete

    @property
    def lacks_user(self) -> bool:
        """Return whether the removed part holds the user too."""
        return f"://{REDACTED}@" in self

    @property
    def address(self) -> str:
        """Return the URI without user and password, for a link."""
        return re.sub(r"(?<=://)[^/]*@", "", str(self), count=1)

    def with_secret(self, secret: str, user: str = "") -> "SecretUri":
        """Return the URI with ``secret`` in place of each removed secret.

        Args:
            secret: password or token.
            user: login of the password, if it was removed too.
        """
        word = quote(secret, safe="")
        found = self._complete
        if user:
            found = found.replace(f"://{REDACTED}@", f"://{quote(user, safe='')}:{word}@")
        return SecretUri(found.replace(REDACTED, word))
