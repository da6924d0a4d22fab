"""Take the picture of the page that README and notebook show: a question, its reply, and what the page says about it.

python tests/tools/screenshot.py                         assets/page.png, from assets/guppy.html; it is attached to section 25, too
python tests/tools/screenshot.py --say "are you a shark?" --seed 3 --tab Chances --page out/guppy.html --out out/page.png

It drives a real Chromium, without a network. The dice of the page are seeded, so that the same page gives the same picture. If the reply
repeats the last word of the question, the second piece of that word is picked, for there one sees where the fish looks.
"""
import argparse
import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Error, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURE = ROOT / "assets/page.png"
LIMIT = 200_000
DICE = """(() => { let state = SEED; Math.random = () => { state = (Math.imul(state, 1664525) + 1013904223) >>> 0; return state / 2 ** 32; }; })();"""


def small(png, limit=LIMIT):
    """This picture as a PNG of at most `limit` bytes, with as many colours as fit."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (256, 128, 64, 32):
        packed = io.BytesIO()
        picture.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
        if packed.tell() <= limit:
            return packed.getvalue()
    raise SystemExit(f"the picture is larger than {limit:,} bytes even with 32 colours: make it smaller with --size")


def answered(page, text):
    """Type this text, send it, and wait for the whole reply; returns the reply."""
    before = page.locator(".them").count()
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")
    page.wait_for_function("before => document.querySelectorAll('.them').length > before", arg=before, timeout=30_000)
    page.wait_for_selector("body:not(.speaking)", timeout=60_000)
    last = ""
    for _ in range(100):                                             # whatever the page calls its states: until the text stays as it is
        reply = page.locator(".them .bubble").last.text_content().strip()
        if reply and reply == last:
            return re.sub(r"^\w+: ", "", reply)
        last = reply
        page.wait_for_timeout(300)
    raise SystemExit("the reply did not come to an end")


def look_inside(page, text, tab):
    """Pick a piece of the word that the reply repeats, and open that tab of the panel, where the page has them."""
    pieces = page.locator(".them .bubble").last.locator("i")
    word, texts = text.lower().rstrip("?!.").split()[-1], pieces.all_text_contents()
    at = "".join(texts).lower().find(word)
    if at >= 0:
        ends = [len("".join(texts[:n + 1])) for n in range(len(texts))]
        pieces.nth(next(n for n, end in enumerate(ends) if end > at) + (len(word) > 3)).click()
    if page.get_by_role("tab", name=tab).count():
        page.get_by_role("tab", name=tab).click()
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(1, 1)
    page.wait_for_timeout(500)


def picture(path, text, size, seed, tab):
    """(PNG, reply): the page at `path` after this message."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        raise SystemExit("no Chromium here: apt-get install chromium")
    faults = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport=dict(zip(("width", "height"), size)), device_scale_factor=1.5, color_scheme="light",
                                      reduced_motion="reduce", offline=True)
        context.add_init_script(DICE.replace("SEED", str(seed)))
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        try:
            page.goto(path.resolve().as_uri())
            page.wait_for_function("window.guppy", timeout=60_000)
            reply = answered(page, text)
            look_inside(page, text, tab)
            png = page.screenshot()
        except Error as fault:
            raise SystemExit(f"{path} did not answer: {faults or str(fault).splitlines()[0]}") from None
        finally:
            browser.close()
    if faults:
        raise SystemExit(f"{path} failed: {faults[0]}")
    return png, reply


def attach(png, path):
    """Put the picture into the notebook, where a cell shows it: Colab has no file beside the notebook."""
    document = json.loads(path.read_text(encoding="utf-8"))
    cell = next(cell for cell in document["cells"] if "(attachment:page.png)" in cell["source"])
    cell["attachments"] = {"page.png": {"image/png": base64.b64encode(png).decode()}}
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=ROOT / "assets/guppy.html")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--say", default="my name is Zorblina")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tab", default="Looked at", help="what the panel of the page shows")
    parser.add_argument("--size", default="1100x780", help="width x height of the window, in pixels")
    options = parser.parse_args(arguments)
    if not options.page.is_file():
        raise SystemExit(f"{options.page} is not there: python tests/tools/make_assets.py writes the page")
    if not re.fullmatch(r"\d{3,4}x\d{3,4}", options.size):
        raise SystemExit(f"--size {options.size}: write it as 1100x780")
    png, reply = picture(options.page, options.say, tuple(map(int, options.size.split("x"))), options.seed, options.tab)
    packed = small(png)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.out.with_name(f".{options.out.name}")
    unfinished.write_bytes(packed)
    os.replace(unfinished, options.out)
    if options.out == PICTURE:
        attach(packed, ROOT / "guppylm.ipynb")
    print(f"you>   {options.say}\nfish>  {reply}\n{len(packed):,} bytes  {options.out}")


if __name__ == "__main__":
    main()
