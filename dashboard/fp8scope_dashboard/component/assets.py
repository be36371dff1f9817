"""The files that the browser fetches once: our component, its style, and the plotly.js of the installed plotly.

Streamlit would send a component's code along with every message that changes it, so it gets only `LOADER`, a line that
imports the code from our own route (see asgi.py). A file's address has its content's hash, so browsers may keep it.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import json
from pathlib import Path

from fp8scope_dashboard.theme import PALETTES

FOLDER = "fp8scope"
_HERE = Path(__file__).parent


def _plotly_js() -> Path:
    """Inside the installed plotly, which takes a while to import for a path."""
    found = importlib.util.find_spec("plotly")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "package_data" / "plotly.min.js"


_FILES = {
    "panel.js": (_HERE / "panel.js", "text/javascript"),
    "panel.css": (_HERE / "panel.css", "text/css"),
    "plotly.js": (_plotly_js(), "text/javascript"),
}


@functools.cache
def addresses() -> dict[str, str]:
    """Each file's address, relative to the page."""
    return {name: f"{FOLDER}/{hashlib.sha256(_bytes(name)).hexdigest()[:12]}/{name}" for name in _FILES}


def _bytes(name: str) -> bytes:
    """The file; our code has the palettes of theme.py at its start."""
    head = f"const PALETTES = {json.dumps(PALETTES)};\n".encode() if name == "panel.js" else b""
    return head + _FILES[name][0].read_bytes()


@functools.cache
def content(name: str) -> tuple[bytes, str] | None:
    """A file, compressed, and its media type; None if there is none of that name."""
    if name not in _FILES:
        return None
    return gzip.compress(_bytes(name), 5), _FILES[name][1]


def source(name: str) -> str:
    """A file as text, for a page that has it inside."""
    return _bytes(name).decode()


def prepare() -> None:
    """Reads and compresses the files now, not when the first browser waits for them."""
    for name in _FILES:
        content(name)
    addresses()


def preload() -> str:
    """The value of a Link header that has browsers fetch the files before any code asks for them."""
    kinds = {"panel.js": "modulepreload", "panel.css": "preload; as=style", "plotly.js": "preload; as=script"}
    return ", ".join(f"<{address}>; rel={kinds[name]}" for name, address in addresses().items())


def loader() -> str:
    """What Streamlit sends as the component: it imports the code once and hands each call on."""
    return (
        f"const assets = {json.dumps(addresses())};\n"
        "const load = () => import(new URL(assets['panel.js'], document.baseURI).href);\n"
        "export default function (component) {\n"
        "  const mounted = load().then((panel) => panel.mount(component, assets));\n"
        "  return () => mounted.then((unmount) => unmount());\n"
        "}\n"
    )
