"""The part of a cloud machine's metadata service that says when the machine is taken away.

python -m tests.chaos.spot_metadata PORT      # one on which that is decided already
"""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a token of this session"  # noqa: S105 - of a server that is played
NOTICE = '{"action": "terminate", "time": "2026-11-25T12:00:00Z"}'


class Metadata(ThreadingHTTPServer):
    """The second version of the service, which answers only to those who fetched a token.

    Args:
        port: on loopback; 0 takes a free one.
        decided: whether the machine is to go.
    """

    def __init__(self, port: int = 0, decided: bool = False) -> None:
        super().__init__(("127.0.0.1", port), _Answers)
        self.decided = decided
        #: Questions that were answered so far.
        self.asked = 0

    @property
    def address(self) -> str:
        """For ``SKILLNET_METADATA``."""
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        known = self.path == "/latest/api/token"
        lasts = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        self._say(*((200, TOKEN) if known and lasts.isdigit() else (400, "")))

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
            self._say(401, "")
        elif self.path == "/latest/meta-data/spot/instance-action" and self.server.decided:
            self._say(200, NOTICE)
        else:
            self._say(404, "")
        self.server.asked += 1

    def _say(self, code: int, words: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(words.encode())

    def log_message(self, *words: object) -> None:
        """Nothing: the log is the caller's."""


if __name__ == "__main__":
    Metadata(int(sys.argv[1]), decided=True).serve_forever()
