"""Load what the notebook defines, without running it.

`load()` takes from all code cells the imports, functions, classes and constants (an assignment to one upper-case name of
three or more letters) and runs them, in order, in a fresh module. Tests, the benchmark and readers use the result like any module.

python tests/notebook.py            a chat with the fish of assets/pretrained, in the terminal; an empty line ends it
python tests/notebook.py FISH       the same with another: a folder such as out/guppy, a repository on the Hugging Face Hub, or the
                                    https address of a folder
python tests/notebook.py my.txt     reads the script of a character: a fault, or a conversation of each topic and a report on it
python tests/notebook.py my.txt --train     then trains a small model of it, saves it in out/my-small, and lets you chat
"""
import ast
import contextlib
import io
import json
import linecache
import random
import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "guppylm.ipynb"
ASSETS = ROOT / "assets/pretrained"


def cells(path=PATH):
    """The cells of the notebook, each a dict, with its source as one string under "text"."""
    return [cell | {"text": "".join(cell["source"])} for cell in json.loads(Path(path).read_text(encoding="utf-8"))["cells"]]


def printed(path=PATH):
    """All that the stored run printed, as one string, without the codes that colour it."""
    outputs = (output for cell in cells(path) if cell["cell_type"] == "code" for output in cell["outputs"])
    text = "\n".join("".join(output.get("text", []) or output.get("data", {}).get("text/plain", [])) for output in outputs)
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def is_definition(node):
    """Is this statement an import, a function, a class or a constant?"""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id.isupper() and len(node.targets[0].id) >= 3
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def load(path=PATH):
    """A module with the notebook's definitions."""
    module = types.ModuleType("guppylm")
    sys.modules["guppylm"] = module                                  # dataclasses look their module up there
    for number, cell in enumerate(cells(path)):
        if cell["cell_type"] == "code":
            name = f"{Path(path).name}, cell {number}"
            linecache.cache[name] = len(cell["text"]), None, cell["text"].splitlines(True), name      # for tracebacks
            tree = ast.parse(cell["text"])
            tree.body = [node for node in tree.body if is_definition(node)]
            exec(compile(tree, name, "exec"), module.__dict__)
    return module


def own_character(guppy, path, train):
    """Read the script of a character and report on it; with `train`, also train a small model, save it, and chat."""
    with contextlib.redirect_stdout(io.StringIO()):                  # try_script says the warnings, once is enough
        persona = guppy.read_persona(path)
        report = () if train else [*guppy.persona_report(path, 10_000, guppy.SEED)]
    guppy.try_script(str(path))
    if not train:
        print("\nothers, drawn anew each time:")
        for name, topic in persona.topics.items():
            drawn = guppy.converse(persona, name, random.choice(list(topic.wordings)), random.Random())
            guppy.print_wrapped(f"{drawn.prompt}  ->  {drawn.reply}", "    ")
        print()
        guppy.show_table(("before training", "number", "remark"), *report)
        warned = any(what.startswith("warning") for what, _, _ in report)
        print(f"\nNo fault, {'and the warnings are advice' if warned else 'no warning'}. Next: python tests/notebook.py {path} --train")
        return
    folder = guppy.OUT / f"{path.stem}-small"
    folder.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer, _ = guppy.voice(path, n=20_000)
    guppy.keep_better(folder, model.history, tokenizer)
    guppy.save_pretrained(model, tokenizer, folder, model.history, name=persona.name)
    print(f"\nsaved in {folder}; to chat again: python tests/notebook.py {folder}\n")
    guppy.chat_loop(model, tokenizer, persona.name)


def name_of(fish):
    """How a fish is called: as the heading of its card says, or else as its folder is called."""
    if "://" in str(fish):
        return "fish"
    card = Path(fish).expanduser() / "README.md"
    heading = re.search("^# (.+)$", card.read_text(encoding="utf-8"), re.M) if card.is_file() else None
    return heading[1] if heading else Path(fish).name


def main():
    words = [word for word in sys.argv[1:] if word != "--train"]
    fish = words[0] if words else ASSETS
    if len(words) > 1 or ("--train" in sys.argv and not str(fish).endswith(".txt")):
        sys.exit(__doc__.split("\n\n")[-1])
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")                      # a terminal may send half a letter
    guppy = load()
    try:
        if str(fish).endswith(".txt"):
            own_character(guppy, Path(fish), "--train" in sys.argv)
            return
        loaded = guppy.load_pretrained(fish)
        guppy.chat_loop(*loaded, name_of(fish))
    except (OSError, ValueError) as fault:
        sys.exit(f"{fault}")


if __name__ == "__main__":
    main()
