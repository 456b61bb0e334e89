"""A real browser without a window: what a page comes to, what it asks the network for, what it complains about.

Chromium, where it is installed. No name resolves, so nothing reaches a network either way.
"""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files
    --enable-logging=stderr --dump-dom""".split()
NO_NAMES = "--host-resolver-rules=MAP * ~NOTFOUND"


@dataclass(frozen=True, slots=True)
class Loaded:
    """`document`: the HTML once loaded. `requests`: addresses that the page asked the network for."""

    document: str
    requests: set[str]
    console: list[str]


def load(page: Path, scratch: Path) -> Loaded:
    """Load a page; `scratch`, a directory, takes the browser's own files."""
    log = scratch / "net.json"
    command = [str(CHROMIUM), *FLAGS, NO_NAMES, f"--log-net-log={log}", f"--user-data-dir={scratch / 'profile'}"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=1200, check=True)
    events = [event.get("params", {}) for event in json.loads(log.read_text(encoding="utf-8"))["events"]]
    # What the browser wants for itself (updates, the time) has no origin.
    asked = {event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"}
    return Loaded(done.stdout, asked, re.findall(r"CONSOLE.*", done.stderr))
