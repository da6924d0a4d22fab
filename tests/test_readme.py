"""What README and section 0 say of a run is what the stored run printed, and the tool that writes it there can be trusted."""
import base64
import io
import json
import math
import re

import benchmark
import nbformat
import notebook
import numpy as np
import pytest
import refresh
from PIL import Image

README = (notebook.ROOT / "README.md").read_text(encoding="utf-8")


def squeezed(text):
    return re.sub(r"[ \t]+", " ", text)


def test_two_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    assert [len(block.strip().splitlines()) for block in blocks] == [1, 1]


def test_every_file_that_is_named_is_there():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)|src=\"(?!https?:)([^\"]+)\"", README)
    commands = re.findall(r"\bpython3? ([\w/.]+\.py)\b", README)
    assert links and {"tests/notebook.py", "tests/tools/refresh.py", "tests/tools/make_assets.py", "tests/tools/benchmark.py"} <= set(commands)
    for target in ["".join(link) for link in links] + [name for name in commands if name != "guppylm.py"]:
        assert (notebook.ROOT / target).exists(), target


# ---- the stored run ----

def stored_parts():
    section = next(c["text"] for c in notebook.cells() if "<!-- stored-run" in c["text"])
    for text in (README, section):
        yield text[text.index("<!-- stored-run"):text.index("<!-- end -->")]


def test_section_0_and_the_readme_are_what_refresh_writes_from_the_stored_run():
    printed = notebook.printed()
    readme, section = (part[part.index("-->") + 3:].strip() for part in stored_parts())
    assert readme == refresh.results(printed, refresh.given_fish())
    assert section == refresh.road_map(printed)


def test_the_talk_of_the_given_fish_is_what_it_says():
    talk = README[README.index("<!-- given-fish:"):README.index("<!-- given-fish end -->")]
    talk = talk[talk.index("-->") + 3:].strip()
    assert talk == refresh.given_talk() and talk.count("\nyou> ") == talk.count("\nguppy> ") == 5


def test_transcripts_are_those_of_the_stored_run():
    """The same, not by way of refresh: every message and every reply between the fences was printed, wherever its lines break."""
    def unwrapped(text):
        return squeezed(re.sub(r"\n {2,}", " ", text)).splitlines()

    printed = unwrapped(notebook.printed())
    for part in stored_parts():
        lines = [line for block in re.findall(r"```\n(.*?)```", part, re.S) for line in unwrapped(block) if line.strip()]
        assert sum(line.startswith("you> ") for line in lines) >= 5 <= sum(line.startswith("guppy> ") for line in lines)
        assert not [line for line in lines if line not in printed]


def test_numbers_are_those_of_the_stored_run():
    """In the tables between the marks, all numbers of a row stand in one line of output that begins with the row's name; those of
    the exam in the table of model and grammar. The column of the given fish is that of its own files."""
    given = refresh.given_fish()
    printed = squeezed(notebook.printed())
    exam = re.search(r"^score model grammar\n(?:\S.*\n)+", printed, re.M)[0].splitlines()
    scores = {line.split()[0] for line in exam[1:]}
    assert {"seen", "unseen", "copy", "new"} <= scores
    for part in stored_parts():
        checked = set()
        for row in re.findall(r"^\|(.*)\|$", part, re.M)[2:]:
            name, *values = [value.strip() for value in row.split("|")]
            name = re.sub(r"^\*(.+?)\*: .+", r"\1", name)
            if len(values) == 3 and part in README:                  # the run, the given fish, the grammar
                key = {"training steps": "steps", "minutes of training, on a CPU": "minutes"}.get(name, name)
                assert values.pop(1) == given[key]
                if name not in scores:
                    continue
            ours = [value for value in values if re.fullmatch(r"[\d.,]+%?", value)]
            if ours:
                lines = exam if name in scores else printed.splitlines()
                assert any(line.startswith(f"{name} ") and set(ours) <= set(line.split()) for line in lines), (name, ours)
                checked.add(name)
        assert len(checked) >= 8 and (part not in README or scores <= checked)


def test_what_the_text_says_of_the_stored_run():
    """Some sentences name a result in words; a new run may prove them wrong."""
    text = "\n".join(cell["text"] for cell in notebook.cells())
    score = {name: float(share.rstrip("%")) for name, share, _ in refresh.exam_rows(notebook.printed())}
    assert "In the stored run *seen* and *unseen* lie closer than that" in text and abs(score["seen"] - score["unseen"]) < 5
    assert "*free* lies much\nlower" in text and score["free"] < min(score["seen"], score["unseen"]) - 10
    grammar = {name: float(share.rstrip("%")) for name, _, share in refresh.exam_rows(notebook.printed())}
    assert "*new* lies a little below the value of the grammar" in text and 0 < grammar["new"] - score["new"] < 10
    names = "none", "the best", "the best four", "four others", "two that look one back", "two beside them"
    off = {name: [float(share.rstrip("%")) for share in refresh.last_row(notebook.printed(), name)[:4]] for name in names}
    first, later, other, words = ({name: shares[i] for name, shares in off.items()} for i in range(4))
    assert "In the stored run both hold. The first pieces hardly suffer" in text
    assert later["four others"] - later["the best four"] > 5, "the later pieces suffer more from the loss of the best"
    assert later["four others"] - later["the best four"] > other["four others"] - other["the best four"], "and more than the other tokens do"
    assert first["none"] - first["the best four"] < 5 and words["the best four"] < words["four others"] - 5
    assert words["none"] - words["the best"] < words["none"] - words["the best four"], "one head alone is missed less"
    assert 3 < (later["none"] - later["the best four"]) / (later["none"] - later["the best"]) < 5, "about a quarter"
    pairs = [re.search(rf"^{name} .*% +(\d)\.\d (\d)\.\d$", notebook.printed(), re.M).groups() for name in names[-2:]]
    assert "In the stored run all four are in the first layer" in text and pairs == [("0", "0")] * 2
    assert "whole words suffer from either pair, and about equally" in text and "They suffer much more without the two that look one back" in text
    for part in (first, other, words):
        assert abs(part["two that look one back"] - part["two beside them"]) < 3 < part["none"] - part["two beside them"]
    assert later["two beside them"] - later["two that look one back"] > 10
    best_four = re.search(r"^the best four .*% +(\d\.\d \d\.\d \d\.\d \d\.\d)$", notebook.printed(), re.M)[1]
    assert f"off: {[[int(head[0]), int(head[2])] for head in best_four.split()]}" in text, "what section 25 switches off"
    settled = {name: int(number) for name, number in re.findall(r"^(the embedding|block \d) +(\d+)$", notebook.printed(), re.M)}
    assert "In the stored run more than half of them settle after the very first block" in text
    assert 0.5 < settled["block 0"] / sum(settled.values()) < 0.9
    assert "Four settle only after the last one" in text and re.search(r"^block 5 +4$", notebook.printed(), re.M)
    assert "*lucky shell*" in text and "lucky shell" in re.search(r"^you> +what is a telephone\?\nreply> .*\n.*", notebook.printed(), re.M)[0]
    trace = re.findall(r"^ *[\d,]+ +(0\.\d+) +0\.\d+ +(0\.\d+) +0\.\d+$", notebook.printed(), re.M)
    assert "The first pieces become right early, when the head named above hardly looks" in text
    assert next(float(looks) for looks, first in trace if float(first) > 0.7) < 0.1
    training, validation = map(float, re.search(r"^loss at the end: ([\d.]+) in training, ([\d.]+) in validation", notebook.printed(), re.M).groups())
    assert "In the stored run the two\nnumbers are nearly equal" in text and abs(training - validation) < 0.02
    failures = dict(re.findall(r"^(seen|unseen) +500 +(\d+) +\d+ +\d+$", notebook.printed(), re.M))
    assert "most wrong replies to *seen* and *unseen* belong to another topic" in text
    assert all(int(n) > 0.5 * 500 * (1 - score[name] / 100) for name, n in failures.items()) and len(failures) == 2
    rows = re.findall(r"^(\w+) +␣(\w+)[ \w]* +(\d+) +(\d+)$", notebook.printed(), re.M)
    assert "whose first piece is one letter or two" in text and all(len(first) <= 2 for _, first, _, _ in rows[:4]) and len(rows) == 12
    assert {row[:2] for row in rows[-2:]} == {("metal", "met"), ("bandit", "band")} and "words such as *metal* and *bandit*" in text
    assert all(int(came) > 0.7 * int(asked) for _, _, asked, came in rows[:4]) and all(int(came) < 0.2 * int(asked) for _, _, asked, came in rows[-2:])
    table = re.search(r"^score +32 bits  8 bits\n((?:\S.*%\n)+)", notebook.printed(), re.M)[1]
    rounded = [[float(share) for share in re.findall(r"([\d.]+)%", line)] for line in table.splitlines()]
    assert "Four scores rise and one falls, none by more than four points" in text
    assert len(rounded) == 5 and max(abs(a - b) for a, b in rounded) <= 4.05 and sum(b > a for a, b in rounded) == 4
    minutes = float(re.search(r" tokens in ([\d.]+) min of training", notebook.printed())[1])
    assert f"took {minutes:.0f} minutes on two cores" in README


def test_what_the_text_says_of_the_words_at_one_place(nb, persona):
    """Section 10 shows how a reply may begin, and says how many ways the script allows."""
    text = "\n".join(cell["text"] for cell in notebook.cells())
    prompt, reply = re.search(r"^you>   (.*)\nguppy> (i love chocolate.*)$", notebook.printed(), re.M).groups()
    topic = next(name for name in persona.topics if nb.log_prob(persona, name, prompt, reply) > -math.inf)
    assert "Three tokens have a mark" in text and len(nb.next_words(persona, topic, prompt, [])) == 3


def test_the_settings_of_the_readme_are_those_of_the_notebook():
    code = "\n".join(cell["text"] for cell in notebook.cells() if cell["cell_type"] == "code")
    assert 'STEPS = 20 if SMOKE else 4_000 if LONG else 1_800 if PRECISION == "bfloat16" else 900' in code and 'LONG = PRESET == "full" or DEVICE == "cuda"' in code
    assert "`auto`: 4,000 steps on an NVIDIA GPU, 1,800 on a CPU that multiplies `bfloat16` in hardware, else 900. `full`: 4,000 everywhere" in README
    assert set(re.findall(r"GUPPY_[A-Z]+", README)) == set(re.findall(r"GUPPY_[A-Z]+", code)), "each is explained, and there is no other"


def test_what_was_edited_during_the_run_stays(tmp_path, monkeypatch):
    """The run lasts an hour, and somebody may save the notebook in it."""
    path = tmp_path / "some.ipynb"
    path.write_text(json.dumps(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("before")])))
    monkeypatch.setattr(notebook, "PATH", path)
    monkeypatch.setattr(refresh.NotebookClient, "execute", lambda client: path.write_text(path.read_text().replace("before", "edited")))
    with pytest.raises(SystemExit, match="edited during the run .* the run is in some.run.ipynb"):
        refresh.run()
    assert "edited" in path.read_text() and "before" in (tmp_path / "some.run.ipynb").read_text()


def test_the_benchmark_table_is_that_of_the_stored_curves():
    curves = benchmark.read_curves(notebook.ROOT / "assets/benchmark.csv")
    assert benchmark.markdown(curves) in README
    assert curves["reference"][-1]["step"] == 1_500 and curves["ours"][-1]["step"] == 450 and len(curves["ours"]) >= 9
    ratios = [float(ratio) for ratio in re.findall(r"\| ([\d.]+) \|$", benchmark.markdown(curves), re.M)]
    assert "between a quarter and a half of its time" in README and len(ratios) == 6 and all(2 <= ratio <= 4 for ratio in ratios)


# ---- refresh ----

PRINTED = """cpu, bfloat16, preset auto (6600 training steps), seed 0, Python 3.11
9,600,123 tokens in 8.2 min of training
you>   hello
guppy> hello. that is a long one, which was
       wrapped here.

you>   bye
guppy> bye.

score   model   grammar
seen    99.0%   100.0%
unseen  87.4%   100.0%
free    61.5%
copy    nan%    100.0%
new     86.7%    89.0%

score   32 bits  8 bits
seen    98.0%    98.0%
uniform: every token alike     7.090  1,200.0
bigram: after the one before   2.346  10.4
our model, validation          0.4
floor: the grammar itself      0.352
our model, validation          0.360
9 training  1.5
9 training  576.1
whole notebook  975.1
"""


def test_refresh_copies_whatever_was_printed():
    assert refresh.exam_rows(PRINTED) == [("seen", "99.0%", "100.0%"), ("unseen", "87.4%", "100.0%"), ("free", "61.5%", ""),
                                          ("copy", "nan%", "100.0%"), ("new", "86.7%", "89.0%")]
    long = "you>   hello  there\nguppy> " + "hello " * 20 + "\n       wrapped here."
    assert refresh.narrow(long) == "you>   hello there\nguppy>" + " hello" * 13 + "\n       " + "hello " * 7 + "wrapped here."
    assert refresh.transcript(PRINTED, 6) == ["you>   hello\nguppy> hello. that is a long one, which was\n       wrapped here.", "you>   bye\nguppy> bye."]
    text = refresh.results(PRINTED, {"free": "76.1%", "steps": "29,500"})
    for row in ("| *free*: by writers who had not seen the script | 61.5% | 76.1% |  |", "| *seen*: in wordings that training may use | 99.0% |  | 100.0% |", "| training steps | 6,600 | 29,500 |  |", "| minutes of training, on a CPU | 8 |  |  |",
                "| our model, validation | 0.360 |", "| bigram: after the one before | 2.346 |", "| 9 training | 576.1 |",
                "| seconds of the stored run: cpu, bfloat16, preset auto (6600 training steps) | |", "| whole notebook | 975.1 |"):
        assert row in text.splitlines()
    for name, what in (("floor: the grammar", "a row 'floor: the grammar itself'"), ("score   model", "the table of the exam"), ("you>", "a talk")):
        with pytest.raises(SystemExit, match=f"did not print {what}"):
            refresh.results(PRINTED.replace(name, "x"), {})
    assert refresh.replace("a <!-- stored-run: x -->\nold\n<!-- end --> b", "new") == "a <!-- stored-run: x -->\nnew\n<!-- end --> b"


def output(kind, **fields):
    return nbformat.from_dict({"output_type": kind, **fields})


def test_refresh_cleans_outputs():
    streams = [output("stream", name="stdout", text=text) for text in ("one\n", "10%\r50%\r90%\r\n", "two")]
    streams.insert(1, output("stream", name="stderr", text="IOStream.flush timed out\n"))
    shown = output("display_data", metadata={}, data={"text/plain": "x"})
    assert [o.get("text") for o in refresh.clean([*streams, shown, output("stream", name="stderr", text="ouch")])] == ["one\n90%\ntwo", None, "ouch"]


def test_refresh_reduces_pictures_and_keeps_their_colours():
    """A page of gray noise with a wide orange area and a blue line of one pixel: both keep their colours, white stays white."""
    pixels = np.random.default_rng(0).integers(100, 200, (120, 300, 1)).repeat(3, axis=2).astype(np.uint8)
    pixels[:, :50], pixels[:, 50:120], pixels[60, :200] = 255, (255, 127, 14), (31, 119, 180)
    before = io.BytesIO()
    Image.fromarray(pixels).convert("RGBA").save(before, "PNG")
    data = base64.b64encode(before.getvalue()).decode()
    cleaned, = refresh.clean([output("display_data", metadata={}, data={"image/png": data, "text/plain": "<Figure>"})])
    assert len(cleaned.data["image/png"]) < 0.7 * len(data) and cleaned.data["text/plain"] == "<Figure>"
    after = np.asarray(Image.open(io.BytesIO(base64.b64decode(cleaned.data["image/png"]))).convert("RGB"))
    assert after.shape == pixels.shape and len(np.unique(after.reshape(-1, 3), axis=0)) == 64
    exact = np.s_[:, :120], np.s_[60, :200]
    assert all((after[part] == pixels[part]).all() for part in exact) and abs(after.astype(int) - pixels).max() <= 2
    few = io.BytesIO()
    Image.new("P", (20, 20)).save(few, "PNG", optimize=True)
    assert len(refresh.few_colours(few.getvalue())) <= len(few.getvalue())


def test_refresh_tells_how_far_it_is(capsys):
    tell = refresh.Progress()
    for cell in [nbformat.v4.new_markdown_cell("# Title\n## Part"), nbformat.v4.new_code_cell("## no heading"), nbformat.v4.new_markdown_cell("## 2 · Data\ntext"),
                 nbformat.v4.new_code_cell("1"), nbformat.v4.new_markdown_cell("### deeper")]:
        tell(cell=cell, cell_index=0)
    tell.end()
    assert re.fullmatch(r"Part: [\d.]+ s\n2 · Data: [\d.]+ s\n", capsys.readouterr().out)
