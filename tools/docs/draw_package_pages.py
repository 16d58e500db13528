"""``python -m tools.docs.draw_package_pages``: screenshots of the page of a server that runs.

Run it after ``make skills``. It serves the demo's model, sends ``examples/forest.mp4`` to the task
``radical``, adds the package, and sends the file again. Needs chromium.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image
from urllib3.filepost import encode_multipart_formdata

from skillnet_platform.cluster.loopback import choose_port
from skillnet_platform.storage import run_root

ASSETS = Path("docs/assets")
VIDEO, TASK = Path("examples/forest.mp4"), "radical"
#: Width and height of a screenshot in pixels.
SIZE = (760, 570)
PAUSE_S, PATIENCE_S = 0.5, 300.0


def read(url: str, body: bytes | None = None, kind: str = "") -> str:
    """Return the text of an answer, of a refusal too."""
    headers = {"Content-Type": kind} if kind else {}
    request = urllib.request.Request(url, body, headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return error.read().decode()


def wait_for_packages(url: str, expected: list[str]) -> None:
    """Wait until the server has these packages."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            about = json.loads(read(f"{url}/health"))
        except OSError:
            about = {}
        if about.get("packages") == expected:
            return
        time.sleep(PAUSE_S)
    raise SystemExit(f"{url}: no answer with the packages {expected}")


def take_last_frame(found: re.Match[str]) -> str:
    """Return the last frame of an animation in base64: a screenshot shows the first one."""
    target = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(found[0]))) as picture:
        picture.seek(getattr(picture, "n_frames", 1) - 1)
        picture.convert("RGB").save(target, "PNG")
    return base64.b64encode(target.getvalue()).decode()


def draw(page: str, target: Path, folder: Path) -> None:
    """Write a screenshot of a page."""
    path = folder / "page.html"
    path.write_text(
        re.sub(r"(?<=image/png;base64,)[^\"]+", take_last_frame, page), encoding="utf-8"
    )
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += [f"--window-size={SIZE[0]},{SIZE[1]}", f"--user-data-dir={folder / 'profile'}"]
    browser = shutil.which("chromium") or "chromium-browser"
    words += [f"--screenshot={target.absolute()}", path.as_uri()]
    subprocess.run([browser, *words], check=True, capture_output=True)


def main() -> int:
    """Write ``packages-before.png`` and ``packages-after.png``."""
    skills, port = run_root().absolute() / "skills", choose_port("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port}"
    body, kind = encode_multipart_formdata({"task": TASK, "file": (VIDEO.name, VIDEO.read_bytes())})
    skillnet = str(Path(sys.executable).with_name("skillnet"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The page shows the name as it is given.
        model = shutil.copytree(skills / "model", folder / "my-model")
        words = ["serve", "--model", model.name, "--port", str(port)]
        environment = {**os.environ, "SKILLNET_HOME": str(run_root().absolute())}
        server = subprocess.Popen(
            [skillnet, *words], stdout=subprocess.DEVNULL, cwd=folder, env=environment
        )
        try:
            wait_for_packages(url, [])
            page = read(f"{url}/search", body, kind)
            draw(page, ASSETS / "packages-before.png", folder)
            package = str(skills / f"{TASK}.skill")
            subprocess.run([skillnet, "add", package, "--to", str(model)], check=True)
            wait_for_packages(url, [TASK])
            page = read(f"{url}/search", body, kind)
            draw(page, ASSETS / "packages-after.png", folder)
        finally:
            server.terminate()
            server.wait(timeout=60)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
