import os

os.environ.setdefault("MPLBACKEND", "Agg")

import notebook
import pytest


@pytest.fixture(scope="session")
def nb():
    """The notebook's definitions."""
    return notebook.load()


@pytest.fixture(scope="session")
def persona(nb):
    return nb.parse_persona(nb.GUPPY)


@pytest.fixture(scope="session")
def dataset(nb, persona):
    return nb.make_dataset(persona)


@pytest.fixture(scope="session")
def tokenizer(nb, dataset):
    return nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), nb.VOCABULARY)


@pytest.fixture(scope="session")
def small(nb):
    """A small persona, its data and a tokenizer of its own, for tests that train."""
    persona = nb.parse_persona(SMALL)
    dataset = nb.make_dataset(persona, 5_000)
    return persona, dataset, nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), 350)


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
