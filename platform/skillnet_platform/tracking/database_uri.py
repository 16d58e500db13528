"""URIs of sqlite databases and the paths that they name.

SQLAlchemy decodes ``%41`` and takes all after ``?`` as options. A path in a URI is therefore
always encoded by :func:`sqlite_uri` and decoded by :func:`sqlite_path`.
"""

import re
from pathlib import Path

from skillnet_platform.errors import UserError

_PLAIN = "sqlite:///"
#: Names the driver. MLflow makes the folder of a ``sqlite:///`` database from the encoded path,
#: and would leave an empty folder with a wrong name.
_WITH_DRIVER = "sqlite+pysqlite:///"
#: URI of an absolute path that SQLAlchemy does not change. Its import is slow.
_UNCHANGED = re.compile(r"sqlite:///(?P<path>/[A-Za-z0-9_./-]+)")


def is_sqlite(uri: str) -> bool:
    """Return whether a URI names a sqlite database."""
    return uri.partition(":")[0].partition("+")[0] == "sqlite"


def sqlite_uri(path: Path) -> str:
    """Return the URI of a database file; characters that SQLAlchemy decodes are encoded."""
    complete = str(path.absolute())
    plain = f"{_PLAIN}{complete}"
    if _UNCHANGED.fullmatch(plain):
        return plain
    from sqlalchemy.engine import URL

    encoded = URL.create("sqlite", database=complete).render_as_string(hide_password=False)
    return plain if encoded == plain else encoded.replace(_PLAIN, _WITH_DRIVER, 1)


def sqlite_path(uri: str) -> Path:
    """Return the absolute path of the database file of a sqlite URI.

    Raises:
        UserError: the URI names no file, or has options.
    """
    if unchanged := _UNCHANGED.fullmatch(uri):
        return Path(unchanged["path"])
    from sqlalchemy.engine import make_url

    found = make_url(uri)
    if "?" in uri:
        raise UserError(
            f"{uri}: a ? starts options of the database, and none are supported. Write %3F for a ? "
            "in the path, and %25 for a %"
        )
    if not found.database or found.database == ":memory:" or found.host:
        raise UserError(f"{uri}: names no file. Write sqlite:///PATH/mlflow.db")
    return Path(found.database).absolute()
