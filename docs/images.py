"""Take the image of the front page from the report of a CapFilt run.

    python docs/images.py REPORT.html IMAGE.png

It shows the first examples, drawn by hash, of web texts that were dropped and captions that were kept. What the image
shows is in the file, too, under "shown": a list of image ids and captions, which a test compares with the scenes.
"""

import json
import shutil
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

WIDTH, CARDS = 1180, 8
GROUP = "The web text was wrong"
ONLY = """([heading, count]) => {
    const group = [...document.querySelectorAll("h3")].find(one => one.textContent == heading);
    const cards = [];
    for (let next = group.nextElementSibling; next && next.tagName != "H3"; next = next.nextElementSibling)
        cards.push(...next.querySelectorAll("article"));
    const grid = document.createElement("div");
    grid.className = "grid four";
    grid.append(...cards.slice(0, count));
    document.querySelector("main").replaceChildren(grid);
    return [...grid.children].map(card => {
        card.querySelector(".toggle").remove();
        const origin = card.querySelector("p.dim");
        origin.remove();
        const captions = [...card.querySelectorAll(".text.kept q")].map(text => text.textContent);
        return {image_id: origin.textContent.trim().split(" ").at(-1), captions};
    });
}"""


def take(report: Path, out: Path) -> None:
    """Write an image of the first examples in a group of a report."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto(report.resolve().as_uri())
        shown = page.evaluate(ONLY, [GROUP, CARDS])
        pixels = page.locator("main > .grid").screenshot()
        browser.close()
    text = PngInfo()
    text.add_text("shown", json.dumps(shown))
    Image.open(BytesIO(pixels)).convert("RGB").save(out, optimize=True, pnginfo=text)


if __name__ == "__main__":
    take(*map(Path, sys.argv[1:3]))
