"""Take pictures of the report of a run, light and dark, with a system's Chromium.

    python scripts/screenshot_report.py runs/quickstart

Writes assets/report_light.png (tables and chart) and assets/report_dark.png (a question that a method lost, with the
tokens that two methods kept), and prints their sizes, those of the report and how long it takes to load. It needs
playwright.
"""

import argparse
import io
import json
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
VIEW = {"width": 1200, "height": 1400}


def save(page: Page, name: str) -> None:
    """Save what the page shows, with few colours, because a picture in a repository should be small."""
    file = ROOT / "assets" / f"{name}.png"
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256).save(file, optimize=True)
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")


def lost_question(page: Page) -> None:
    """Open the first question with recorded tokens that a method lost against another."""
    row, against = ("fastv", "divprune")
    labels = page.locator("#row option").all_inner_texts()
    chosen = [next(label for label in labels if label.startswith(name)) for name in (row, against)]
    for task in page.locator("#task option").all_inner_texts():
        page.get_by_role("combobox", name="Task").select_option(task)
        page.get_by_role("combobox", name="Method").select_option(chosen[0])
        page.get_by_role("combobox", name="against").select_option(chosen[1])
        page.locator("[data-outcome=lost]").click()
        pictured = page.locator("#list tbody tr:has(td:last-child:text-is('yes')) button")
        if pictured.count():
            pictured.first.click()
            page.wait_for_selector("#question[open] svg")
            return
    raise SystemExit(f"no question that {chosen[0]} lost against {chosen[1]} has recorded tokens; vlmslim report DIR")


def main(directory: Path) -> None:
    report = directory / "report"
    sizes = {path: path.stat().st_size for path in report.rglob("*") if path.is_file()}
    tokens = sum(size for path, size in sizes.items() if path.name.startswith("tokens-"))
    library = sizes[report / "data/plotly.js"]
    rest = sum(sizes.values()) - tokens - library
    print(f"report: {rest / 1e3:.0f} kB, tokens {tokens / 1e3:.0f} kB, Plotly {library / 1e6:.1f} MB")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport=VIEW, color_scheme=scheme)
            page.goto((report / "index.html").resolve().as_uri())
            page.wait_for_selector("#plot .point")
            timing = json.loads(page.evaluate("JSON.stringify(performance.getEntriesByType('navigation')[0])"))
            print(f"loaded in {timing['loadEventEnd']:.0f} ms")
            if scheme == "dark":
                lost_question(page)
            save(page, f"report_{scheme}")
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="output directory of vlmslim run")
    main(parser.parse_args().directory)
