"""The notebook as a file and as a program: its stored outputs are healthy, its links lead somewhere, and it runs with nothing beside it."""
import json
import re
import subprocess
import sys

import conftest
import nbformat
import notebook

FILES = ["README.md", "config.json", "generation_config.json", "history.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
PATHS = re.compile(r"(?<![\w.])/(root|home|work|tmp|Users|content)/\w")
PICTURES, BYTES = 20, 1_500_000                                      # at least, and less than


def faults_of(document):
    """What is wrong with the stored outputs of a notebook, as a list of sentences."""
    code = [cell for cell in document.cells if cell.cell_type == "code"]
    faults = ["widgets in the metadata: GitHub will not render it"] if "widgets" in document.metadata else []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        faults.append("execution counts do not run from 1 to n: it was not run once, from top to bottom")
    for n, output in ((n, output) for n, cell in enumerate(code, 1) for output in cell.outputs):
        data = output.get("data", {})
        text = "".join(output.get("text", "")) + json.dumps({kind: value for kind, value in data.items() if not kind.startswith("image/")})
        if output.output_type == "error":
            faults.append(f"code cell {n}: an error, {output.ename}")
        if output.get("name") == "stderr":
            faults.append(f"code cell {n}: text on stderr")
        if any("widget" in kind for kind in data):
            faults.append(f"code cell {n}: a widget")
        if PATHS.search(text):
            faults.append(f"code cell {n}: a path of the machine")
        if len(text) > 12_000:
            faults.append(f"code cell {n}: {len(text)} characters")
        if "\r" in "".join(output.get("text", "")):
            faults.append(f"code cell {n}: a carriage return")
    return faults


def pictures_in(document):
    return sum("image/png" in output.get("data", {}) for cell in document.cells if cell.cell_type == "code" for output in cell.outputs)


def test_stored_outputs():
    document = nbformat.read(notebook.PATH, as_version=4)
    nbformat.validate(document)
    assert faults_of(document) == []
    assert notebook.PATH.stat().st_size < BYTES and pictures_in(document) >= PICTURES
    assert document.metadata.accelerator == "GPU" and document.metadata.colab.gpuType == "T4" and document.metadata.colab.toc_visible


def stored(*outputs, count=1):
    cell = nbformat.v4.new_code_cell("pass", execution_count=count, outputs=[nbformat.from_dict(output) for output in outputs])
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("text"), cell])


def test_planted_faults_of_outputs_are_found():
    def stream(text, name="stdout"):
        return {"output_type": "stream", "name": name, "text": text}

    def shown(**data):
        return {"output_type": "display_data", "metadata": {}, "data": {kind.replace("__", "/"): value for kind, value in data.items()}}
    assert faults_of(stored(stream("fine, at 3/4 of out/guppy\n"), shown(image__png="/tmp/x"))) == []
    planted = {"text on stderr": stored(stream("ouch", "stderr")), "a path of the machine": stored(stream("saved in /tmp/x")),
               "execution counts": stored(count=2), "a carriage return": stored(stream("10%\r20%")), "13000 characters": stored(stream("x" * 12_998)),
               "an error, ValueError": stored({"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}),
               "a widget": stored({"output_type": "display_data", "metadata": {}, "data": {"application/vnd.jupyter.widget-view+json": {}}})}
    for what, document in planted.items():
        assert len(found := faults_of(document)) == 1 and what in found[0], (what, found)
    document = stored()
    document.metadata.widgets = {}
    assert "widgets" in faults_of(document)[0] and pictures_in(stored(shown(image__png="x"), stream("y"))) == 1


def broken_links(texts):
    """Links of the form (#place) in these texts of markdown cells that lead to no <a name="place"> and to no heading."""
    places = {place for text in texts for place in re.findall(r"<a (?:name|id)=[\"']([^\"']+)", text)}
    places |= {heading.strip().replace(" ", "-") for text in texts for heading in re.findall(r"^#+ (.*)$", text, re.M)}
    return [link for text in texts for link in re.findall(r"\]\(#([^)]+)\)|href=[\"']#([^\"']+)", text) if "".join(link) not in places]


def test_links_within_the_notebook_lead_somewhere():
    assert broken_links(["## 2 · The data\n<a name='x'></a>", "[a](#2-·-The-data) [b](#x)"]) == []
    assert len(broken_links(["## 2 · The data", "[a](#2-The-data)"])) == 1
    assert broken_links([cell["text"] for cell in notebook.cells() if cell["cell_type"] == "markdown"]) == []


def test_every_attached_picture_is_shown_and_there():
    for cell in notebook.cells():
        if cell["cell_type"] == "markdown":
            assert set(re.findall(r"attachment:([\w.-]+)", cell["text"])) == set(cell.get("attachments", {})), cell["text"][:60]


# ---- two runs: the fish through nbclient, the other character as a script ----

def test_smoke_in_jupyter_with_the_notebook_alone(run_of_guppy):
    folder, document = run_of_guppy
    outputs = [output for cell in document.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"]
    assert pictures_in(document) >= PICTURES
    printed = "".join(output.get("text", "") for output in outputs)
    table = re.search(r"^score +model +grammar\n((?:\S.*\n)+)", printed, re.M)[1]
    assert {"seen", "unseen", "copy", "new"} <= {line.split()[0] for line in table.splitlines()}
    assert len(re.findall(r"^you> .*\nguppy> ", re.sub(r"\n {2,}", " ", printed), re.M)) >= 6
    rows = [json.loads(line) for line in open(folder / "out/conversations.jsonl", encoding="utf-8")]
    assert len(rows) == 3_000 and set(rows[0]) == {"prompt", "reply", "topic"}
    assert sorted(path.name for path in (folder / "out/guppy").iterdir()) == FILES and (folder / "out/guppy.html").is_file()
    assert not list((folder / "out").glob("training-*")), "a finished run leaves no checkpoint"


def test_smoke_as_a_script_of_another_character_in_another_folder(run_of_rollo):
    folder, printed, plots = run_of_rollo
    assert sorted(path.name for path in (folder / "out/rollo").iterdir()) == FILES and (folder / "out/rollo.html").is_file()
    assert not (folder / "program/out").exists(), "GUPPY_OUT is where everything goes"
    assert len(plots) > 50 and re.search(r"^whole notebook +\d", printed, re.M)


def test_smoke_as_a_script_of_a_character_without_spaces(tmp_path):
    """In Chinese no word has edges: nothing is joined, every letter is a word to the tokenizer, and a word is found without a space."""
    run, ended = conftest.start_as_script(tmp_path, "alei")
    try:
        printed, plots = ended()
    finally:
        run.kill()
    assert (tmp_path / "out/alei.html").is_file() and re.search(r"^whole notebook +\d", printed, re.M)
    assert "joined  " not in printed and re.search(r"^layer \d, head \d looks back most", printed, re.M), "it repeats words of several pieces"
    assert any("common words" in text for text in plots), "section 13 draws its letters"


def test_unknown_preset(tmp_path):
    cells = [cell["text"] for cell in notebook.cells() if cell["cell_type"] == "code"]
    last = next(i for i, text in enumerate(cells) if "if PRESET not in" in text)
    (tmp_path / "first_cells.py").write_text("\n\n".join(cells[:last + 1]), encoding="utf-8")
    run = subprocess.run([sys.executable, "first_cells.py"], cwd=tmp_path, capture_output=True, text=True,
                         env=conftest.environment(GUPPY_PRESET="turbo", MPLBACKEND="Agg"))
    assert run.returncode != 0 and "GUPPY_PRESET is 'turbo'; it can be auto, full or smoke" in run.stderr


def test_waiting_threads_give_way():
    """libgomp reads the variable when torch loads it, so it must stand in the environment before; what a user has set stays."""
    cell = next(cell["text"] for cell in notebook.cells() if "import torch\n" in cell["text"])
    before, found, _ = cell.partition("import torch\n")
    assert found and "torch" not in [word for line in before.splitlines() if not line.startswith("#") for word in re.split(r"\W+", line)]
    say = "\nimport sys; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    for own, expected in ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"):
        settings = {name: value for name, value in conftest.environment().items() if name != "GOMP_SPINCOUNT"} | own
        run = subprocess.run([sys.executable, "-c", before + say], capture_output=True, text=True, check=True, env=settings | {"MPLBACKEND": "Agg"})
        assert run.stdout.split() == ["False", expected]
