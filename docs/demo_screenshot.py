"""Takes the picture of the demo page for the documentation, in headless Chromium.

    python docs/demo_screenshot.py runs/A runs/B

Needs the extras ``demo`` and ``browser``, and a Chromium of the system.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from composer_gpt2.demo.page import build_page, launch
from composer_gpt2.generation import TextGenerator
from composer_gpt2.trained_model import load_trained_model

OUT = Path(__file__).parent / "_static" / "demo.png"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs=2)
    parser.add_argument("--prompt", default="The function returns")
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    names = [Path(checkpoint).name for checkpoint in arguments.checkpoints]
    models = map(load_trained_model, arguments.checkpoints)
    page_of_models = build_page(dict(zip(names, map(TextGenerator, models), strict=True)))
    address = launch(page_of_models, block=False)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1100, "height": 790})
        page.goto(address)
        page.locator("#prompt textarea").fill(arguments.prompt)
        for control, value in {"top-p": 0.9, "new-tokens": 60, "seed": arguments.seed}.items():
            field = page.locator(f"#{control} input[type=number]")
            field.fill(str(value))
            field.press("Tab")
        page.locator("#write button, button#write").click()
        # Both have written, and nothing has changed for a second.
        page.wait_for_function(
            """() => {
                const lengths = [0, 1].map(
                    n => document.querySelectorAll(`#text-${n} .token`).length);
                const now = Date.now(), seen = JSON.stringify(lengths);
                if (seen !== window.seen) { window.seen = seen; window.since = now; }
                return Math.min(...lengths) > 0 && now - window.since > 1000;
            }"""
        )
        page.locator("#text-0 .token").nth(4).hover()
        page.screenshot(path=OUT)
        browser.close()
    page_of_models.close()
    print(f"{OUT}: {OUT.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
