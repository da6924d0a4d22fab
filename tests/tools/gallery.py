"""Train every character of assets/personas with section 24's `voice`, and write what its exam says into the README there.

python tests/tools/gallery.py                          all but blank.txt and the fish, who has an exam of its own in the notebook
python tests/tools/gallery.py assets/personas/rollo.txt another.txt     only these
python tests/tools/gallery.py --steps 300              a short try: prints, and writes nothing
python tests/tools/gallery.py --pages out/gallery      also their pages, each asked its demo prompts in Chromium, and a picture of it

Ends with status 1 when a character understands or copies less than the gallery promises. Takes some four minutes a character
on two cores.
"""
import argparse
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import notebook

PERSONAS = notebook.ROOT / "assets/personas"
README = PERSONAS / "README.md"
NEEDED = {"seen": 0.95, "unseen": 0.75, "copy": 0.60}
STEPS = 4_600
BEGIN, END = "<!-- gallery: written by tests/tools/gallery.py -->", "<!-- gallery end -->"
HEAD = "| script | character | topics | wordings | seen | unseen | copy | new | seconds |\n|---|---|---|---|---|---|---|---|---|"


def gallery():
    """The scripts that are trained when none is named."""
    return sorted(path for path in PERSONAS.glob("*.txt") if path.stem not in ("blank", "guppy", "guppy-wide"))


def train_one(nb, path, steps, pages=None):
    """(row of the table, scores) of one character; with its page and a picture of it in the folder `pages`."""
    started = time.time()
    model, tokenizer, scores = nb.voice(path, steps)
    seconds = time.time() - started
    persona = nb.read_persona(path)
    if pages:
        pages.mkdir(parents=True, exist_ok=True)
        page = nb.write_page(model, tokenizer, pages / f"{path.stem}.html", persona.name, persona.demo)
        show_page(page, persona.demo)
    wordings = sum(len(topic.wordings) for topic in persona.topics.values())
    shares = " | ".join(f"{scores[name]:.1%}" for name in ("seen", "unseen", "copy", "new"))
    return f"| `{path.name}` | {persona.name} | {len(persona.topics)} | {wordings:,} | {shares} | {seconds:.0f} |", scores


def show_page(page, prompts):
    """Put the prompts to a page, print its replies, and take a picture of what it shows after each."""
    import screenshot
    for seed, prompt in enumerate(prompts):
        png, reply = screenshot.picture(page, prompt, (1100, 780), seed, "Looked at")
        print(f"page> {prompt}\n      {reply}", flush=True)
        page.with_name(f"{page.stem}-{seed}.png").write_bytes(screenshot.small(png, 400_000))


def rows_of(text):
    """The rows of a table, as {script: row}."""
    return {found[1]: found[0] for found in re.finditer(r"^\| `([^`]+)` \|.*$", text, re.M)}


def missed_by(row):
    """The scores of a table's row that are below what we ask for."""
    shares = dict(zip(("seen", "unseen", "copy"), re.findall(r"([\d.]+|nan)%", row)))
    return [name for name, share in NEEDED.items() if not float(shares[name]) >= 100 * share]


def with_rows(text, rows):
    """The README with these rows in its table; the rows of other scripts stay. Raises ValueError when it has no place for a table."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{README} has no lines {BEGIN} and {END}")
    before, table, after = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", text, maxsplit=2)
    known = rows_of(table) | rows
    body = "\n".join(known[name] for name in sorted(known) if (PERSONAS / name).exists() or name in rows)
    asked = ", ".join(f"{name} {share:.0%}" for name, share in NEEDED.items())
    below = "; ".join(f"`{name}` in {', '.join(missed_by(known[name]))}" for name in sorted(known) if missed_by(known[name]))
    verdict = f"We ask for {asked}. {f'Not there yet: {below}' if below else 'All reach it'}."
    return f"{before}{BEGIN}\n{HEAD}\n{body}\n\n{verdict}\n{END}{after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="*", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pages", type=Path, metavar="FOLDER")
    asked = parser.parse_args()
    with_rows(README.read_text(encoding="utf-8"), {})                # a fault here is better now than after an hour
    nb = notebook.load()
    rows, missed = {}, []
    for path in asked.scripts or gallery():
        print(f"\n==== {path.name}", flush=True)
        rows[path.name], scores = train_one(nb, path, asked.steps, asked.pages)
        missed += [f"{path.name}: {name} is {scores[name]:.1%}, and {share:.0%} is needed" for name, share in NEEDED.items() if not scores[name] >= share]
    print("", HEAD, *rows.values(), sep="\n")
    if asked.steps == STEPS:
        README.write_text(with_rows(README.read_text(encoding="utf-8"), rows), encoding="utf-8")     # it may have been edited since
        print(f"\nwritten into {README}")
    sys.exit("\n".join(missed) or None)


if __name__ == "__main__":
    main()
