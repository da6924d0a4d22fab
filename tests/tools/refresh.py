"""Run the notebook from top to bottom, keep its outputs, and copy what it printed into section 0 and the README.

python tests/tools/refresh.py           runs it (about an hour with GUPPY_PRESET=full on two cores) and then copies
python tests/tools/refresh.py --copy    only copies from the outputs that are stored

It prints a line for every section that is done. Pictures are stored with 64 colours.
"""
import argparse
import base64
import io
import json
import re
import sys
import textwrap
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nbformat
import notebook
import numpy as np
from nbclient import NotebookClient
from PIL import Image

ROADS = {                                                            # section of the clock -> what goes in, what comes out
    "2 data": ("a script of {lines} lines", "{conversations} conversations"),
    "3-4 tokens": ("their text", "a vocabulary of {vocabulary} tokens"),
    "5 batches": ("tokens", "rows of one length, marks for what counts"),
    "6 yardsticks": ("tokens", "losses to compare with"),
    "7-8 model": ("nothing but random numbers", "a transformer, tested but not yet trained"),
    "9 training": ("model and batches", "a model that speaks"),
    "10 sampling": ("a number for every token", "words"),
    "11 talk": ("your words", "its words"),
    "12 exam": ("conversations it never saw", "how often it is right"),
    "13 inside": ("a word of the user's", "where the fish looks while it repeats it"),
    "14 save": ("weights", "files that other programs read"),
}
ASKED = {                                                            # score -> what the README says of it
    "seen": "in wordings that training may use",
    "unseen": "in wordings kept out of training",
    "free": "by writers who had not seen the script",
    "free, fresh": "by other writers; nobody reads these",
    "copy": "repeats a word that no training text holds",
    "new": "of the right replies to *seen*: no copy of a training reply",
}
LOSSES = ("uniform: every token alike", "bigram: after the one before", "our model, validation", "floor: the grammar itself")


# ---- the run ----

def run():
    before = notebook.PATH.read_bytes()
    document = nbformat.read(notebook.PATH, as_version=4)
    client = NotebookClient(document, timeout=None, resources={"metadata": {"path": str(notebook.ROOT)}})
    client.on_cell_start = tell = Progress()
    client.execute()
    tell.end()
    for cell in document.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = clean(cell.outputs)
    document.metadata.pop("widgets", None)
    if notebook.PATH.read_bytes() != before:
        aside = notebook.PATH.with_suffix(".run.ipynb")
        write(document, aside)
        raise SystemExit(f"{notebook.PATH.name} was edited during the run and stays as it is; the run is in {aside.name}")
    write(document)
    print(f"{notebook.PATH.name} has {notebook.PATH.stat().st_size:,} bytes")


class Progress:
    """Called before every cell: prints a line when the cells of a section are done."""

    def __init__(self):
        self.section, self.started = None, time.time()

    def __call__(self, cell, **_):
        heading = cell.cell_type == "markdown" and re.search(r"^## (.+)$", cell.source, re.M)
        if heading:
            self.end()
            self.section = heading[1].strip()

    def end(self):
        if self.section:
            print(f"{self.section}: {time.time() - self.started:.1f} s", flush=True)
        self.started = time.time()


def clean(outputs):
    """Streams in one piece, and of a progress bar its last state; without what the kernel says of itself on a busy machine;
    pictures with few colours."""
    kept = []
    for output in outputs:
        if output.get("name") == "stderr" and output.text.strip() == "IOStream.flush timed out":
            continue
        if kept and output.output_type == kept[-1].output_type == "stream" and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = "\n".join(line.rstrip("\r").split("\r")[-1] for line in output.text.split("\n"))
        elif "image/png" in output.get("data", {}):
            output.data["image/png"] = base64.b64encode(few_colours(base64.b64decode(output.data["image/png"]))).decode()
    return kept


def few_colours(png, colours=64):
    """The bytes of a PNG with at most so many colours, on white; the picture as it is when that is no larger. The palette
    begins with the commonest colours and grows by the one that it misses most, so that areas keep their colour and a thin
    blue line stays blue (Pillow's own ways lose either)."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    pixels = np.asarray(picture).reshape(-1, 3).astype(int)
    codes, which, counts = np.unique(pixels @ [65_536, 256, 1], return_inverse=True, return_counts=True)
    shades = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)       # (N, 3)
    palette = np.argsort(-counts, kind="stable")[:min(8, colours)].tolist()
    missed = np.abs(shades[:, None] - shades[palette]).sum(-1).min(1)              # (N,): how far from the nearest
    while len(palette) < colours and missed.any():
        palette.append(int((missed * counts ** 0.25).argmax()))
        missed = np.minimum(missed, np.abs(shades - shades[palette[-1]]).sum(-1))
    nearest = np.abs(shades[:, None] - shades[palette]).sum(-1).argmin(1)          # (N,)
    reduced = Image.fromarray(nearest[which].reshape(picture.height, picture.width).astype(np.uint8), "P")
    reduced.putpalette(shades[palette].ravel().tolist())
    small = io.BytesIO()
    reduced.save(small, "PNG", optimize=True)
    return min(small.getvalue(), png, key=len)


def write(document, path=None):
    text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    (path or notebook.PATH).write_text(text, encoding="utf-8")


# ---- what it printed ----

def found(pattern, printed, what):
    """All matches, of which there must be one."""
    matches = re.findall(pattern, printed, re.M)
    if not matches:
        raise SystemExit(f"the stored run did not print {what}")
    return matches


def columns(line):
    """The columns of a printed table row: two spaces or more part them."""
    return re.split(r" {2,}", line.strip())


def last_row(printed, name):
    """The columns behind the name in the last printed table row that begins with it."""
    return columns(found(rf"^{re.escape(name)} {{2,}}(.*)$", printed, f"a row {name!r}")[-1])


def exam_rows(printed):
    """The rows of the exam's table: (score, the model's share, the grammar's, which may be lacking)."""
    table = found(r"^score +model +grammar\n((?:\S.*\n)+)", printed, "the table of the exam")[0]
    return [tuple((columns(line) + [""])[:3]) for line in table.splitlines()]


def transcript(printed, count):
    """The first messages after the training, with their replies; what was wrapped stays so. (Before it, section 2 prints a
    conversation of the grammar in the same form.)"""
    line = r".*(?:\n +\S.*)*"
    said_by_the_fish = printed.split("tokens a second")[-1]
    return found(rf"^you> {line}\nguppy> {line}$", said_by_the_fish, "a talk with guppy")[:count]


def narrow(said):
    """A message and its reply in lines of 84 columns, which is what a text cell has room for."""
    turns = re.split(r"\n(?=guppy> )", said)
    return "\n".join(textwrap.fill(turn[:7] + " ".join(turn[7:].split()), 84, subsequent_indent=" " * 7) for turn in turns)


def device_of(printed):
    return found(r"^(?:cuda|mps|cpu), .*", printed, "its device")[0].split(", seed")[0]


def figures(printed):
    """What the road map says of the data, from the run and from the definitions."""
    nb = notebook.load()
    return {"lines": len(nb.GUPPY.strip().splitlines()), "vocabulary": f"{nb.VOCABULARY:,}",
            "conversations": found(r"^([\d,]+) conversations in ", printed, "how many conversations it drew")[0]}


# ---- where it goes ----

def road_map(printed):
    """The first five answers, and the table of section 0."""
    say = figures(printed)
    rows = [f"| {name} | {before.format(**say)} | {after.format(**say)} | {last_row(printed, name)[-1]} |" for name, (before, after) in ROADS.items()]
    talk = [narrow(said) for said in transcript(printed, 5)]
    return "\n".join(["```", "\n\n".join(talk), "```", "",
                      "| section | goes in | comes out | seconds |", "|---|---|---|---|", *rows, "",
                      f"Seconds are those of the run stored here (`{device_of(printed)}`)."])


def given_fish():
    """{score or training: what the README says of it} for the fish of assets/pretrained, from its own files."""
    folder = notebook.ROOT / "assets/pretrained"
    stored, last = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("fingerprint.json", "history.json"))
    shares = stored["scores"] | stored["unread"]
    return {name: f"{share:.1%}" for name, share in shares.items()} | {"steps": f"{last[-1]['step']:,}", "minutes": f"{last[-1]['seconds'] / 60:.0f}"}


def given_talk(count=5):
    """The first messages of section 11 and what the fish of assets/pretrained answers, with the seeds of that section."""
    nb = notebook.load()
    model, tokenizer = nb.load_pretrained(notebook.ASSETS)
    talk = []
    for seed, message in enumerate(nb.TALK[:count]):
        reply = textwrap.fill(f"guppy> {nb.chat(message, model, tokenizer, seed=seed)}", 96, subsequent_indent=" " * 7)
        talk.append(f"you>   {message}\n{reply}")
    return "\n".join(["```", "\n\n".join(talk), "```"])


def results(printed, given):
    """The talk and the tables of the README; `given` is what given_fish returns."""
    steps, = found(r"\((\d+) training steps\)", printed, "its steps")[:1]
    minutes = float(found(r"tokens in ([\d.]+) min of training", printed, "its minutes of training")[0])
    rows = [(name, ours, given.get(name, ""), grammar) for name, ours, grammar in exam_rows(printed)]
    rows.insert(1 + [name for name, *_ in rows].index("free"), ("free, fresh", "", given.get("free, fresh", ""), ""))
    rows = [(f"*{name}*: {ASKED.get(name, '')}", *shares) for name, *shares in rows]
    rows += [("training steps", f"{int(steps):,}", given.get("steps", ""), ""), ("minutes of training, on a CPU", f"{minutes:.0f}", given.get("minutes", ""), "")]
    scores = ["| right replies to questions | the stored run | the given fish | the grammar itself |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    losses = ["| surprise at the right next token, in nats; less is better | |", "|---|---|", *(f"| {name} | {last_row(printed, name)[0]} |" for name in LOSSES)]
    times = [f"| seconds of the stored run: {device_of(printed)} | |", "|---|---|",
             *(f"| {name} | {last_row(printed, name)[-1]} |" for name in ("9 training", "whole notebook"))]
    return "\n".join(["```", "\n\n".join(transcript(printed, 7)), "```", "", *scores, "", *losses, "", *times])


def replace(text, new, begin="<!-- stored-run", end="<!-- end -->"):
    """The text with what stands between the two marks replaced."""
    start, end = text.index(begin), text.index(end)
    return text[:text.index("-->", start) + 3] + "\n" + new + "\n" + text[end:]


def copy():
    printed = notebook.printed()
    document = nbformat.read(notebook.PATH, as_version=4)
    for cell in document.cells:
        if "<!-- stored-run" in cell.source and cell.cell_type == "markdown":
            cell.source = replace(cell.source, road_map(printed))
    write(document)
    readme = notebook.ROOT / "README.md"
    text = replace(readme.read_text(encoding="utf-8"), results(printed, given_fish()))
    readme.write_text(replace(text, given_talk(), "<!-- given-fish:", "<!-- given-fish end -->"), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copy", action="store_true", help="run nothing")
    if not parser.parse_args().copy:
        run()
    copy()
