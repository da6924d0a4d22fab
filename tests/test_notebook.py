"""The notebook as a file and as a program: healthy, lint-free, and runs with nothing beside it."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import notebook
import pytest
from nbclient import NotebookClient

SCORES = ("seen", "unseen", "copy", "new")
FILES = ["README.md", "config.json", "generation_config.json", "history.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def code_cells():
    return [cell for cell in notebook.cells() if cell["cell_type"] == "code"]


def test_format_and_stored_outputs():
    document = nbformat.read(notebook.PATH, as_version=4)
    nbformat.validate(document)
    assert notebook.PATH.stat().st_size < 1_500_000 and "widgets" not in document.metadata
    assert document.metadata.accelerator == "GPU" and document.metadata.colab.gpuType == "T4" and document.metadata.colab.toc_visible
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", cell["text"][:60]
            text = "".join(output.get("text", [])) + json.dumps({k: v for k, v in output.get("data", {}).items() if "image" not in k})
            assert "widget" not in text and not re.search(r"(?<![\w.])/(root|home|work|tmp|Users|content)/\w", text)
            assert len(text) < 12_000 and "\r" not in text


def test_cells_are_small_and_open_unless_they_say_what_they_hide():
    for cell in code_cells():
        folded = cell["metadata"].get("cellView") == "form"
        assert folded == bool(cell["metadata"].get("jupyter", {}).get("source_hidden")) == cell["text"].startswith("#@title")
        lines = [line for line in cell["text"].splitlines() if line.strip()]
        assert folded or len(lines) <= 40
        ast.parse(cell["text"])                                      # no magics, no shell lines
        if folded and (claim := re.search(r"\(folded, (\d+) lines\)", lines[0])):
            assert abs(int(claim[1]) - (len(lines) - 1)) <= 3, (lines[0], len(lines) - 1)


def test_names_are_defined_once_and_the_agreed_ones_are_there(nb):
    names = [name for cell in code_cells() for node in ast.parse(cell["text"]).body if notebook.is_definition(node)
             for name in ([node.name] if hasattr(node, "name") else [t.id for t in getattr(node, "targets", [])])]
    assert len(names) == len(set(names)), [name for name in names if names.count(name) > 1]
    for name in """GUPPY parse_persona make_dataset Conversation log_prob normalise CharTokenizer BPETokenizer encode_chat GuppyConfig GuppyLM Recipe
                   train evaluate generate chat exam save_pretrained load_pretrained""".split():
        assert hasattr(nb, name), name


def test_definitions_do_not_lean_on_lower_case_globals(nb):
    """A function may use what the module defines, not what some cell happened to leave behind."""
    import builtins
    import types
    left = {node.id for cell in code_cells() for statement in ast.parse(cell["text"]).body if not notebook.is_definition(statement)
            for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}

    def used(code):
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from used(constant)
    for name, thing in vars(nb).items():
        if isinstance(thing, types.FunctionType) and thing.__module__ == nb.__name__:
            for symbol in set(used(thing.__code__)) & left:
                if not hasattr(builtins, symbol) and symbol not in vars(nb):
                    loads = [node for cell in code_cells() for top in ast.parse(cell["text"]).body if getattr(top, "name", "") == name
                             for node in ast.walk(top) if isinstance(node, ast.Name) and node.id == symbol and isinstance(node.ctx, ast.Load)]
                    stores = {getattr(node, "id", getattr(node, "arg", "")) for cell in code_cells() for top in ast.parse(cell["text"]).body
                              if getattr(top, "name", "") == name for node in ast.walk(top)
                              if isinstance(node, ast.arg) or isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
                    assert not loads or symbol in stores, f"{name} uses {symbol}"


def test_ruff():
    script = "\n\n\n".join(cell["text"] for cell in code_cells())
    subprocess.run([sys.executable, "-m", "ruff", "check", "--select=F,E9", "--ignore=F402", "-"], input=script, text=True, check=True)
    subprocess.run([sys.executable, "-m", "ruff", "check", "--select=F,E9,I", "--line-length=160", str(notebook.ROOT / "tests")], check=True)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder with the .ipynb alone, as Colab has it."""
    shutil.copy(notebook.PATH, tmp_path)
    monkeypatch.setenv("GUPPY_PRESET", "smoke")
    return tmp_path


def test_smoke_in_jupyter_with_the_notebook_alone(alone):
    document = nbformat.read(alone / "guppylm.ipynb", as_version=4)
    NotebookClient(document, timeout=900, resources={"metadata": {"path": str(alone)}}).execute()
    outputs = [output for cell in document.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"]
    printed = "".join(output.get("text", "") for output in outputs)
    assert all(re.search(rf"^{score} ", printed, re.M) for score in SCORES)
    rows = [json.loads(line) for line in open(alone / "out/conversations.jsonl", encoding="utf-8")]
    assert len(rows) == 3_000 and set(rows[0]) == {"prompt", "reply", "topic"}
    assert sorted(path.name for path in (alone / "out/guppy").iterdir()) == FILES


def test_smoke_as_a_script(alone):
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "script", "guppylm.ipynb", "--log-level=ERROR"], check=True, cwd=alone)
    run = subprocess.run([sys.executable, "guppylm.py"], cwd=alone, env=os.environ | {"MPLBACKEND": "Agg", "GUPPY_OUT": "elsewhere"},
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2_000:]
    assert (alone / "elsewhere/guppy/model.safetensors").exists() and not (alone / "out").exists()


def test_unknown_preset(alone, monkeypatch):
    monkeypatch.setenv("GUPPY_PRESET", "turbo")
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "script", "guppylm.ipynb", "--log-level=ERROR"], check=True, cwd=alone)
    run = subprocess.run([sys.executable, "guppylm.py"], cwd=alone, capture_output=True, text=True)
    assert run.returncode != 0 and "GUPPY_PRESET is 'turbo'; it can be auto, full or smoke" in run.stderr
