"""Take pictures of the demo, light and dark, with the system's Chromium.

    python scripts/screenshot_demo.py

Writes assets/demo_light.png (a question and its answers) and assets/demo_dark.png (the kept tokens), and prints their
sizes, and how long the page and the answers took. It needs playwright.
"""

import io
import shutil
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from vlmslim.demo.page import build, how
from vlmslim.loading import load

ROOT = Path(__file__).resolve().parent.parent
NAME = "bundled/tiny-llava"


def save(page: Page, name: str) -> None:
    """Save what the page shows, with few colours, because a picture in a repository should be small."""
    file = ROOT / "assets" / f"{name}.png"
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(128).save(file, optimize=True)
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")


def main() -> None:
    page_of_demo = build(*load(NAME, dtype="float32", device="cpu"), NAME)
    _, address, _ = page_of_demo.launch(**how(), prevent_thread_lock=True)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1200, "height": 1000}, color_scheme=scheme)
            page.set_default_timeout(180_000)
            start = time.perf_counter()
            page.goto(f"{address}?__theme={scheme}")
            ask = page.get_by_role("button", name="Ask")
            ask.wait_for()
            loaded = time.perf_counter()
            ask.click()
            page.get_by_text("fastv: 36 of 144 visual tokens").first.wait_for(timeout=120_000)
            answered = time.perf_counter()
            print(f"{scheme}: loaded in {loaded - start:.1f} s, answered in {answered - loaded:.1f} s")
            page.wait_for_timeout(1500)  # until the pictures are there
            if scheme == "dark":
                page.get_by_text("Decoder layer").first.scroll_into_view_if_needed()
                page.mouse.wheel(0, 700)
                page.wait_for_timeout(500)
            save(page, f"demo_{scheme}")
        browser.close()
    page_of_demo.close()


if __name__ == "__main__":
    main()
