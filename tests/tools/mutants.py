"""Break the notebook on purpose, in one small place at a time, and see that the fast part of the tests notices.

python tests/tools/mutants.py            all of them (some ten minutes on two cores)
python tests/tools/mutants.py 3 7        these two

Works on a copy of the repository in a temporary folder. Prints for each mutant the test that caught it, or SURVIVED. The exit status
is 1 when one survived, or when its text does not stand exactly once in the code cells any more: then adapt the table.
"""
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

MUTANTS = [                                                          # what it breaks, the text of today, the broken text
    ("model: scores divided by D, not by its root", "/ math.sqrt(q.shape[-1]) # (B, H, T, T)", "/ q.shape[-1]"),
    ("model: each token sees the next one", "config.context).tril().bool()", "config.context).tril(1).bool()"),
    ("loop: the loss counts the prompt's last token, not the end", "loss_mask[:, 1:].flatten()", "loss_mask[:, :-1].flatten()"),
    ("loop: gradients pile up", "run.optimizer.zero_grad()", "run.optimizer.param_groups"),
    ("loop: norms and biases decay too", '"weight_decay": 0.0}', '"weight_decay": recipe.weight_decay}'),
    ("loop: a resumed run throws other dice", "torch.set_rng_state(state", "str(state"),
    ("sampler: temperature off by 5%", "F.softmax(logits / temperature, dim=-1)", "F.softmax(logits / temperature / 1.05, dim=-1)"),
    ("sampler: one token too many in the game", "min(top_k, logits.shape[-1])", "min(top_k + 1, logits.shape[-1])"),
    ("tokenizer: the last merge first", "min(pairs, key=self.rank.get)", "max(pairs, key=self.rank.get)"),
    ("grammar: one derivation of several counts", "after[state] += p / len(part)", "after[state] = p / len(part)"),
    ("grammar: unseen wordings are seen ones", 'draw("unseen", i % 2) for', 'draw("train", i % 2) for'),
    ("exam: a part of the user's word is enough", "return check in persona.words_in(normalise(reply))", "return check in reply"),
]

FAST = ["test_tokenizer.py", "test_grammar.py", "test_model.py", "test_exam.py", "test_training.py", "test_boxes.py"]
SLOW = "two_processes or killed or damaged or starts_anew or same_in_every_process or is_quick"       # left out, by their names: slow, or timed


def tests(folder, limit=3000):
    """Run the fast tests of a copy: (what failed first, or "" when all passed; the last lines of the output)."""
    files = [f"tests/{name}" for name in FAST if (folder / "tests" / name).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", "-k", f"not ({SLOW})", *files]
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"no end after {limit} s", ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.M)
    return ("" if run.returncode == 0 else failed[1] if failed else "pytest itself"), run.stdout[-1_500:]


def broken(document, old, new):
    """The notebook with `old` replaced in its code cells, as text; None when it does not stand there exactly once. Where a
    space stands in `old`, any number of them may stand in the notebook."""
    pattern = re.compile(r"\s+".join(map(re.escape, old.split(" "))))
    sources = ["".join(cell["source"]) for cell in document["cells"]]
    code = [n for n, cell in enumerate(document["cells"]) if cell["cell_type"] == "code"]
    if sum(len(pattern.findall(sources[n])) for n in code) != 1:
        return None
    cells = [cell | {"source": pattern.sub(lambda _: new, sources[n])} if n in code else cell for n, cell in enumerate(document["cells"])]
    return json.dumps(document | {"cells": cells})


def main():
    chosen = [int(number) for number in sys.argv[1:]] or range(1, len(MUTANTS) + 1)
    document = json.loads((ROOT / "guppylm.ipynb").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "out", "__pycache__", ".pytest_cache"))
        failed, output = tests(folder)
        if failed:
            sys.exit(f"{output}\n\nwithout any mutant {failed} fails: mend that first")
        escaped = 0
        for number in chosen:
            what, old, new = MUTANTS[number - 1]
            text, started = broken(document, old, new), time.time()
            if text:
                (folder / "guppylm.ipynb").write_text(text, encoding="utf-8")
                failed = tests(folder)[0]
                verdict = f"caught by {failed}" if failed else "SURVIVED"
            else:
                verdict = f"DOES NOT FIT: {old!r} must stand once in the code cells"
            escaped += not verdict.startswith("caught")
            print(f"{number:2}  {what}: {verdict} ({time.time() - started:.0f} s)", flush=True)
    print(f"{len(chosen) - escaped} of {len(chosen)} caught")
    sys.exit(bool(escaped))


if __name__ == "__main__":
    main()
