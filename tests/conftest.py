"""What several test files share: the notebook's definitions, data, small models, and the two runs of the whole notebook."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.append(str(Path(__file__).resolve().parent / "tools"))      # benchmark, make_assets and refresh are tested too

import nbformat
import notebook
import pytest
import torch
from nbclient import NotebookClient

signal.signal(signal.SIGINT, signal.default_int_handler)             # a shell that puts the tests into the background has it ignored


@pytest.fixture(scope="session")
def nb():
    """The notebook's definitions."""
    return notebook.load()


@pytest.fixture(scope="session")
def persona(nb):
    """The fish."""
    return nb.parse_persona(nb.GUPPY)


@pytest.fixture(scope="session")
def dataset(nb, persona):
    """60,000 conversations with the fish."""
    return nb.make_dataset(persona)


@pytest.fixture(scope="session")
def tokenizer(nb, dataset):
    """The tokenizer of the lesson. Its `seconds` are those of its training."""
    started = time.time()
    tokenizer = nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), nb.VOCABULARY)
    tokenizer.seconds = time.time() - started
    return tokenizer


SMALL = """! alphabet abcdefghijklmnopqrstuvwxyz .,?!'
! demo hello
~ ((hey ))*(( robot))
~ you = u | ? =
@tool* = hammer | saw | drill | wrench | file | plane | chisel | pliers | lathe | torch | clamp | square | level
@colour = red | green | blue
# hello: hello | good morning | nice to see you | are you there?
< hello. | i am on. + my lamp is @colour.
# tools: i need a @tool | where is my @tool? | do you like the @tool? | the @tool is broken | give me the @tool | use the @tool
< the @tool is @colour. | i love that @tool. + @tool, @tool, @tool. |
"""


@pytest.fixture(scope="session")
def small(nb):
    """(persona, dataset, tokenizer) of a small character, for tests that train."""
    persona = nb.parse_persona(SMALL)
    dataset = nb.make_dataset(persona, 5_000)
    return persona, dataset, nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), 350)


# ---- models ----

def fresh(nb, small, **kind):
    """An untrained model for the small character, always with the same weights; `kind` changes its configuration."""
    torch.manual_seed(0)
    sizes = {"vocab_size": small[2].vocab_size, "width": 64, "layers": 2, "heads": 2, "ffn": 128}
    return nb.GuppyLM(nb.GuppyConfig(**sizes | kind))


@pytest.fixture(scope="session")
def tiny(nb, small):
    """One such model, for tests that only look at it."""
    return fresh(nb, small).eval()


def fresh_model(nb, seed, std=0.15, **kind):
    """A small model whose random weights are large enough that every tensor has its say in the logits; those of LayerNorm
    stay near 1."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 300, "context": 48, "width": 48, "layers": 3, "heads": 4, "ffn": 80}
    model = nb.GuppyLM(nb.GuppyConfig(**sizes | kind)).eval()
    for name, p in model.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(p, mean=1.0 if norm else 0.0, std=std)
    return model


# ---- runs of the whole notebook, with nothing beside it, as Colab has it ----

def environment(**more):
    """The environment of a run: ours, without what is meant for the notebook or its plots, and with what is said here."""
    return {name: value for name, value in os.environ.items() if name != "MPLBACKEND" and not name.startswith("GUPPY_")} | more


def as_script(folder):
    """Write guppylm.py into the folder, as `jupyter nbconvert --to script guppylm.ipynb` does, and return its path."""
    command = [sys.executable, "-m", "nbconvert", "--to", "script", str(notebook.PATH), "--output-dir", str(folder), "--log-level=ERROR"]
    subprocess.run(command, check=True)
    return folder / "guppylm.py"


SHOWN = """
import json, runpy
import matplotlib.pyplot as plt
from matplotlib.text import Text
seen = []

def show(*_, **__):
    seen.extend(text for n in plt.get_fignums() for t in plt.figure(n).findobj(Text) if (text := t.get_text().strip()))
    plt.close("all")

plt.show = show
runpy.run_path("guppylm.py", run_name="__main__")
json.dump(seen, open("plots.json", "w"))
"""


def start_as_script(folder, persona, **more):
    """Start the notebook as a script with a character of assets/personas, in smoke mode and with another OUT: (process, a function that
    waits for its end and returns what it printed and all texts in its plots)."""
    (folder / "program").mkdir()
    script = as_script(folder / "program")
    with open(folder / "printed", "w") as printed, open(folder / "faults", "w") as faults:
        run = subprocess.Popen([sys.executable, "-c", SHOWN], cwd=script.parent, stdout=printed, stderr=faults,
                               env=environment(**more, GUPPY_PRESET="smoke", GUPPY_OUT="../out", MPLBACKEND="Agg",
                                               GUPPY_PERSONA=str(notebook.ROOT / f"assets/personas/{persona}.txt")))

    def ended():
        assert run.wait(timeout=600) == 0, (folder / "faults").read_text(encoding="utf-8")[-2_000:]
        text = re.sub(r"\x1b\[[0-9;]*m", "", (folder / "printed").read_text(encoding="utf-8"))
        return text, json.loads((script.parent / "plots.json").read_text())

    return run, ended


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Two runs in smoke mode: (folder, the document with its outputs) of the notebook as it stands, through nbclient; and
    (folder that holds out/, what it printed, all texts in its plots) of a script with the other character and another OUT.

    They run beside each other, each on a core of its own: that is faster than one after the other on two."""
    folder = tmp_path_factory.mktemp("rollo")
    run, ended = start_as_script(folder, "rollo", OMP_NUM_THREADS="1")
    try:
        document = nbformat.read(notebook.PATH, as_version=4)
        in_jupyter = tmp_path_factory.mktemp("guppy")
        client = NotebookClient(document, timeout=600, resources={"metadata": {"path": str(in_jupyter)}})
        client.execute(env=environment(GUPPY_PRESET="smoke", OMP_NUM_THREADS="1"))
        printed, plots = ended()
    finally:
        run.kill()                                                   # does nothing to one that has ended
    return (in_jupyter, document), (folder, printed, plots)


@pytest.fixture(scope="session")
def run_of_guppy(runs):
    return runs[0]


@pytest.fixture(scope="session")
def run_of_rollo(runs):
    return runs[1]
