"""Pages as a real browser draws them, with the network blocked."""

import html
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def opened(page: Path, folder: Path, *, then: str = "", after: str = "") -> str:
    """The page's DOM after its scripts (and those of `then`) ran. Fails where the console shows an error.

    `after` is what the address holds behind the file's name.
    """
    if then:
        text = page.read_text()
        page = folder / f"then_{page.name}"
        page.write_text(text.replace("</body>", f"<script>{then}</script></body>"))
    return _dom(page.as_uri() + after, folder)


def asked(page: Path, folder: Path, script: str, *, width: int = 1280, dark: bool = False) -> object:
    """What a script gives (its `return`) on the page, in a frame of so many pixels: windows are never below 500."""
    answer = f"addEventListener('load', async () => parent.postMessage(await (async () => {{ {script} }})(), '*'))"
    inner = folder / f"asked_{page.name}"
    inner.write_text(page.read_text().replace("</body>", f"<script>{answer}</script></body>"))
    frame = folder / f"frame_{page.name}"
    frame.write_text(
        f"<!doctype html><iframe src='{inner.name}' style='width:{width}px;height:900px;border:0'></iframe>"
        "<pre id=said></pre>"
        "<script>addEventListener('message', event => said.textContent = JSON.stringify(event.data))</script>"
    )
    found = re.search(r'<pre id="said">(.*?)</pre>', _dom(frame.as_uri(), folder, dark=dark), re.DOTALL)
    assert found and found[1], "the page said nothing"
    return json.loads(html.unescape(found[1]))


def _dom(address: str, folder: Path, *, dark: bool = False) -> str:
    try:
        return _dumped(address, folder / "profile", dark=dark)
    except subprocess.TimeoutExpired:  # a browser that hangs leaves its profile locked
        return _dumped(address, folder / "second_profile", dark=dark)


def _dumped(address: str, profile: Path, *, dark: bool) -> str:
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--enable-logging=stderr",
        "--v=0", "--virtual-time-budget=8000", "--window-size=1600,1000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    faults = [line for line in done.stderr.splitlines() if "CONSOLE" in line and ("rror" in line or "ailed" in line)]
    assert not faults, faults
    return done.stdout


def axe() -> str:
    """The script of axe-core, which looks for what keeps people out of a page; its package needs not be imported."""
    package = importlib.util.find_spec("axe_playwright_python")
    if package is None:
        pytest.skip("axe-playwright-python is not installed")
    return (Path(package.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")
