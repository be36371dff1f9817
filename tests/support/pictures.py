"""The pictures of docs/images: every view of a running dashboard, in light and dark, 1400 pixels wide.

    python tests/support/pictures.py http://127.0.0.1:8501 RUN OTHER_RUN docs/images

RUN and OTHER_RUN are names of runs with rows; the tensor that is shown is the one in the middle of the run's model.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --no-first-run"
COLORS = 192  # of the palette that a picture is reduced to: it has few, and must not be large


def views(run: str, other: str, layer: str, role: str) -> dict[str, dict[str, str]]:
    """Each picture's name and the address that it shows."""
    return {
        "runs": {"runs": f"{run},{other}"},
        "run": {"run": run},
        "tensor": {"run": run, "layer": layer, "role": role},
        "scales": {"run": run, "view": "scales"},
        "compare": {"view": "compare", "runs": f"{run},{other}", "role": role},
        "findings": {"view": "findings", "show": "all"},
        "system": {"view": "system"},
        "settings": {"view": "settings"},
    }


def take(browser: Browser, address: str, run: str, other: str, layer: str, role: str, folder: Path) -> None:
    """Writes NAME.png and NAME-dark.png of each view; fails if a console shows an error."""
    for scheme, suffix in (("light", ""), ("dark", "-dark")):
        context = browser.new_context(
            viewport={"width": 1400, "height": 640}, color_scheme="dark" if scheme == "dark" else "light"
        )
        page = context.new_page()
        errors: list[str] = []
        page.on(
            "console", lambda message, errors=errors: errors.append(message.text) if message.type == "error" else None
        )
        for name, params in views(run, other, layer, role).items():
            page.goto(f"{address}/?{urlencode(params)}")
            save(page, folder / f"{name}{suffix}.png", unfold=name == "findings")
        context.close()
        assert errors == [], errors


def save(page: Page, path: Path, *, unfold: bool = False) -> None:
    """The whole page once it has settled, in few colours."""
    page.locator(".fs-header").first.wait_for(timeout=60_000)
    page.wait_for_timeout(4000)
    if unfold and page.locator("summary").count():
        page.locator("summary").first.click()
        page.wait_for_timeout(500)
    page.set_viewport_size({"width": 1400, "height": height(page)})
    page.wait_for_timeout(1200)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    page.set_viewport_size({"width": 1400, "height": 640})


def height(page: Page) -> int:
    """The height that shows everything, without the empty space below."""
    bottom = "Math.max(...[...document.querySelectorAll('.fs')].map((part) => part.getBoundingClientRect().bottom))"
    return min(2600, int(page.evaluate(f"document.querySelector('[data-testid=stMain]').scrollTop + {bottom}")) + 24)


def main() -> None:
    address, run, other, folder = sys.argv[1:5]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        take(browser, address, run, other, "blocks.2.attn.qkv", "grad_output", Path(folder))
        browser.close()


if __name__ == "__main__":
    main()
