"""``python -m tools.docs.draw_package_pages``: screenshots of the page of a server that runs.

Run it after ``make skills``. It serves the demo's model, sends ``examples/forest.mp4`` to the task
``radical``, adds the package, and sends the file again. Needs chromium.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from urllib3.filepost import encode_multipart_formdata

from skillnet_platform.cluster.loopback import choose_port
from skillnet_platform.storage import run_root

ASSETS = Path("docs/assets")
VIDEO, TASK = Path("examples/forest.mp4"), "radical"
#: Width and height of a screenshot in pixels.
SIZE = (760, 470)
PAUSE_S, PATIENCE_S = 0.5, 300.0


def read(url: str, body: bytes | None = None, kind: str = "") -> str:
    """Return the text of an answer, of a refusal too."""
    request = urllib.request.Request(url, body, {"Content-Type": kind} if kind else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return error.read().decode()


def wait_for_packages(url: str, expected: list[str]) -> None:
    """Wait until the server has these packages and its indexes."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            about = json.loads(read(f"{url}/health"))
        except OSError:
            about = {}
        if about.get("packages") == expected and about["ready"]:
            return
        time.sleep(PAUSE_S)
    raise SystemExit(f"{url}: no answer with the packages {expected}")


def draw(page: str, target: Path, size: tuple[int, int], folder: Path, dark: bool = False) -> None:
    """Write a screenshot of a page."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += ["--blink-settings=preferredColorScheme=0"] if dark else []
    words += [f"--window-size={size[0]},{size[1]}", f"--user-data-dir={folder / 'profile'}"]
    subprocess.run(
        ["chromium", *words, f"--screenshot={target.absolute()}", path.as_uri()],
        check=True,
        capture_output=True,
    )


def main() -> int:
    """Write ``packages-before.png`` and ``packages-after.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=ASSETS, help="folder of the images")
    parser.add_argument("--width", type=int, default=SIZE[0])
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    skills, port = run_root() / "skills", choose_port("127.0.0.1", 0)
    url, size = f"http://127.0.0.1:{port}", (given.width, SIZE[1])
    body, kind = encode_multipart_formdata({"task": TASK, "file": (VIDEO.name, VIDEO.read_bytes())})
    skillnet = str(Path(sys.executable).with_name("skillnet"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = shutil.copytree(skills / "model", folder / "model")
        words = ["serve", "--model", str(model), "--port", str(port)]
        server = subprocess.Popen([skillnet, *words], stdout=subprocess.DEVNULL)
        try:
            wait_for_packages(url, [])
            page = read(f"{url}/search", body, kind)
            draw(page, given.target / "packages-before.png", size, folder, given.dark)
            package = str(skills / f"{TASK}.skill")
            subprocess.run([skillnet, "add", package, "--to", str(model)], check=True)
            wait_for_packages(url, [TASK])
            page = read(f"{url}/search", body, kind)
            draw(page, given.target / "packages-after.png", size, folder, given.dark)
        finally:
            server.terminate()
            server.wait(timeout=60)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
