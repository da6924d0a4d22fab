"""Run the notebook from top to bottom, keep its outputs, and copy what it printed into section 0 and the README.

python tests/refresh.py           runs it (about a quarter of an hour on two cores) and then copies
python tests/refresh.py --copy    only copies from the outputs that are stored
"""
import json
import re
import sys

import nbformat
import notebook
from nbclient import NotebookClient

ROADS = {"2 data": ("a script of 480 lines", "60,000 conversations"), "3-4 tokens": ("their text", "a vocabulary of 1,200 tokens"),
         "5 batches": ("tokens", "rows of one length, marks for what counts"), "6 yardsticks": ("tokens", "losses that mean something"),
         "7-8 model": ("nothing but random numbers", "a transformer that is proved, not trained"), "9 training": ("model and batches", "a model that speaks"),
         "10 sampling": ("logits", "words"), "11 talk": ("your words", "its words"), "12 exam": ("conversations it never saw", "four scores"),
         "13 inside": ("a made-up word", "the head that copies it"), "14 save": ("weights", "files that other programs read")}


def run():
    document = nbformat.read(notebook.PATH, as_version=4)
    NotebookClient(document, timeout=None, resources={"metadata": {"path": str(notebook.ROOT)}}).execute()
    for cell in document.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = clean(cell.outputs)
    document.metadata.pop("widgets", None)
    write(document)


def clean(outputs):
    """Streams in one piece, and of a progress bar its last state; without what the kernel says of itself on a busy machine."""
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
    return kept


def write(document):
    text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    notebook.PATH.write_text(text, encoding="utf-8")


def numbers(printed, name, column=-1):
    """The value in the last printed table row that begins with `name`."""
    return re.findall(rf"^{re.escape(name)}\s{{2,}}(.*)$", printed, re.M)[-1].split("  ")[column].strip()


def transcript(printed, count):
    return re.findall(r"^you>.*\nguppy>.*$", printed, re.M)[:count]


def road_map(printed):
    rows = [f"| {name} | {before} | {after} | {numbers(printed, name)} |" for name, (before, after) in ROADS.items()]
    chat = "\n\n".join(transcript(printed, 5))
    device = re.search(r"^(cuda|mps|cpu), .*", printed, re.M)[0]
    return "\n".join(["| section | goes in | comes out | seconds |", "|---|---|---|---|", *rows, "",
                      f"Seconds are those of the run stored here (`{device.split(', seed')[0]}`). Its fish, at the end:", "", "```", chat, "```"])


def results(printed):
    exam = re.search(r"^score +model +grammar\n(?:.+\n)+", printed, re.M)[0]
    scores = ["| exam | our fish | the grammar itself |", "|---|---|---|",
              *(f"| {name} | {numbers(exam, name, 0)} | {numbers(exam, name)} |" for name in ("seen", "unseen", "copy", "new"))]
    losses = ["| nats per reply token | |", "|---|---|"]
    for name in ("uniform: every token alike", "bigram: after the one before", "our model, validation", "floor: the grammar itself"):
        losses.append(f"| {name} | {re.findall(rf'^{re.escape(name)} .*?([0-9.]+)', printed, re.M)[-1]} |")
    device = re.search(r"^(cuda|mps|cpu), .*", printed, re.M)[0].split(", seed")[0]
    times = [f"| seconds of the stored run: {device} | |", "|---|---|", *(f"| {name} | {numbers(printed, name)} |" for name in ("9 training", "whole notebook"))]
    return "\n".join(["```", "\n\n".join(transcript(printed, 6)), "```", "", *scores, "", *losses, "", *times])


def replace(text, new):
    start, end = text.index("<!-- stored-run"), text.index("<!-- end -->")
    return text[:text.index("-->", start) + 3] + "\n" + new + "\n" + text[end:]


def copy():
    printed = notebook.printed()
    document = nbformat.read(notebook.PATH, as_version=4)
    for cell in document.cells:
        if "<!-- stored-run" in cell.source and cell.cell_type == "markdown":
            cell.source = replace(cell.source, road_map(printed))
    write(document)
    readme = notebook.ROOT / "README.md"
    readme.write_text(replace(readme.read_text(encoding="utf-8"), results(printed)), encoding="utf-8")


if __name__ == "__main__":
    if "--copy" not in sys.argv:
        run()
    copy()
