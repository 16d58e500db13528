"""Lines of JSON files that every reader can decode."""

import json
from typing import Any


def format_json_line(line: dict[str, Any]) -> str:
    """Return an object as one line. Characters that UTF-8 cannot encode are escaped."""
    text = json.dumps(line, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"
