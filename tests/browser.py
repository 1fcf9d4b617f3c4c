"""Pages as a real browser draws them, with the network blocked."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def opened(page: Path, folder: Path, *, then: str = "") -> str:
    """The page's DOM after its scripts (and those of `then`) ran. Fails where the console shows an error."""
    if then:
        text = page.read_text()
        page = folder / f"then_{page.name}"
        page.write_text(text.replace("</body>", f"<script>{then}</script></body>"))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
        "--v=0", "--virtual-time-budget=8000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    faults = [line for line in done.stderr.splitlines() if "CONSOLE" in line and ("rror" in line or "ailed" in line)]
    assert not faults, faults
    return done.stdout
