"""The rules that the notebook's code keeps so that it can be read: width, one statement a line, no tricks, each name once.

Open cells are those that the reader sees; folded ones have a title that says what they hold and how long they are.
"""
import ast
import builtins
import re
import statistics
import subprocess
import symtable
import sys

import notebook
import pytest

WIDTH, FOLDED_WIDTH, LINES, MEAN_WIDTH = 100, 120, 45, 50
TITLE = re.compile(r"#@title (.+) \(folded, (\d+) lines?\)(: .+)? \{ display-mode: \"form\" \}")
SHOWS = re.compile(r"#@title (Plot|Table|Picture|Chart|Examples|Show)\b")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
AGAIN = {"model", "tokenizer", "dataset", "config", "ledger", "history", "example_ids", "example_mask"}      # section 9 may load a fish in place of training one


def code_cells():
    """The notebook's code cells, each with its number among them, from 1, as the execution counts say."""
    cells = [cell for cell in notebook.cells() if cell["cell_type"] == "code" and cell["text"].strip()]
    return list(enumerate(cells, 1))


def is_folded(cell):
    return cell["metadata"].get("cellView") == "form"


def open_texts():
    return {number: cell["text"] for number, cell in code_cells() if not is_folded(cell)}


def none_of(faults):
    """Fails with the whole list of what was found, a line each."""
    assert not faults, "\n" + "\n".join(map(str, faults))


# ---- what ruff finds ----

def ruff(texts, *options):
    """What ruff says of these texts, {number: text}: a list of (number, rule)."""
    found = []
    for number, text in texts.items():
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--ignore-noqa", "--output-format=concise", *options, "-"]
        run = subprocess.run(command, input=text, capture_output=True, text=True)
        assert run.returncode in (0, 1), run.stderr
        found += [(number, rule) for rule in re.findall(r"^\S+:\d+:\d+: ([A-Z]+\d+)", run.stdout, re.M)]
    return found


STYLE = f"--line-length={WIDTH}", "--select=E501,E701,E702,E703,E731"


def test_open_cells_are_narrow_and_plain():
    none_of(ruff(open_texts(), *STYLE))


@pytest.mark.parametrize("rule, text", [("E501", "x = 1" + "  " * 40 + "# this comment is over there"), ("E702", "x = 1; y = 2"), ("E703", "x = 1;"),
                                        ("E701", "if x: y = 2"), ("E731", "size = lambda x: x"), (None, "x = [1, 2]  # fine" + " " * 82)])
def test_planted_faults_of_style_are_found(rule, text):
    assert ruff({7: f"{text}\n"}, *STYLE) == ([(7, rule)] if rule else [])


def test_no_unused_or_unknown_names_and_tests_are_in_order():
    script = "\n\n\n".join(cell["text"] for _, cell in code_cells())
    assert ruff({0: script}, "--select=F,E9", "--ignore=F402") == []
    assert ruff({0: "import os\nprint(unknown)"}, "--select=F,E9") == [(0, "F401"), (0, "F821")]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F,E9,I", "--line-length=160", "--target-version=py311",
               str(notebook.ROOT / "tests")]
    subprocess.run(command, check=True)


# ---- what the syntax tree tells ----

def is_plain(test):
    """May this condition hold a walrus? Alone, negated, or compared, it may."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return is_plain(test.operand)
    if isinstance(test, ast.Compare):
        return all(isinstance(part, ast.NamedExpr) or not walruses(part) for part in [test.left, *test.comparators])
    return isinstance(test, ast.NamedExpr)


def walruses(node):
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)]


def depth(node):
    """How many comprehensions stand within one another here, each counted with all of its `for`."""
    within = max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
    return within + (len(node.generators) if isinstance(node, COMPREHENSIONS) else 0)


def faults_of(text):
    """What breaks the rules in the text of an open cell: a list of (line, what)."""
    tree, faults = ast.parse(text), []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.BoolOp):
            faults.append((line, "`x and f()` as a statement: write an if"))
        if isinstance(node, ast.Subscript) and walruses(node):
            faults.append((line, "a walrus in a subscript"))
        for test in [node.test] if isinstance(node, (ast.If, ast.While, ast.IfExp)) else getattr(node, "ifs", []):
            if walruses(test) and not is_plain(test):
                faults.append((test.lineno, "a walrus in a condition that does something else too"))
        if isinstance(node, COMPREHENSIONS) and depth(node) > 2:
            faults.append((line, "more than two levels of comprehension"))
    if (lines := sum(bool(line.strip()) for line in text.splitlines())) > LINES:
        faults.append((lines, f"more than {LINES} lines"))
    return faults


def test_open_cells_hold_no_tricks():
    none_of([(number, *fault) for number, text in open_texts().items() for fault in faults_of(text)])


TRICKS = {
    "if x:\n    f()": None,
    "x and f()": "`x and f()`",
    "def g(x):\n    x or f()": "`x and f()`",
    "y = x and f()": None,
    "y = parts[(n := len(parts)) - 1]": "a walrus in a subscript",
    "y = (n := draw())[:2]": "a walrus in a subscript",
    "y = parts[n]": None,
    "if n := len(parts):\n    f(n)": None,
    "if not (n := len(parts)):\n    f(n)": None,
    "while (n := f()) > 3:\n    g(n)": None,
    "if (n := len(parts)) and g(n):\n    f(n)": "a walrus in a condition",
    "while g(n := f()):\n    pass": "a walrus in a condition",
    "y = 1 if h and (n := f()) > 3 else 2": "a walrus in a condition",
    "y = [n for x in parts if (n := f(x))]": None,
    "y = [n for x in parts if x and (n := f(x))]": "a walrus in a condition",
    "y = [[f(a) for a in b] for b in c]": None,
    "y = [f(a) for b in c for a in b]": None,
    "y = [[[f(a) for a in b] for b in c] for c in d]": "more than two levels",
    "y = {sum(f(a) for a in b) for c in d for b in c}": "more than two levels",
    "y = [f(a) for a in (g(b) for b in [h(c) for c in d])]": "more than two levels",
    "f(x)\n\n" * 45: None,
    "f(x)\n" * 46: "more than 45 lines",
}


@pytest.mark.parametrize("text", TRICKS, ids=range(len(TRICKS)))
def test_planted_tricks_are_found(text):
    found = {what for _, what in faults_of(text)}
    assert not found if TRICKS[text] is None else len(found) == 1 and TRICKS[text] in found.pop()


def test_mean_width_of_open_lines():
    lines = [line.rstrip() for text in open_texts().values() for line in text.splitlines() if line.strip()]
    assert statistics.mean(map(len, lines)) < MEAN_WIDTH


def test_folded_cells_say_what_they_hold_and_how_long_it_is():
    wrong = []
    for number, cell in code_cells():
        lines = [line for line in cell["text"].splitlines() if line.strip()]
        assert is_folded(cell) == bool(cell["metadata"].get("jupyter", {}).get("source_hidden")) == lines[0].startswith("#@title"), number
        if is_folded(cell):
            title = TITLE.fullmatch(lines[0])
            if not title or int(title[2]) != len(lines) - 1:
                wrong.append((number, f"has {len(lines) - 1} lines", lines[0]))
    none_of(wrong)


def test_folded_lines_are_not_too_wide():
    wide = [(number, len(line), line[:60]) for number, cell in code_cells() if is_folded(cell)
            for line in cell["text"].splitlines() if len(line) > FOLDED_WIDTH and not line.startswith("#@title")]
    none_of(wide)


# ---- names ----

def names_of(text):
    """(names that a cell binds at its top level, names that it takes from elsewhere)"""
    def tables(table):
        yield table
        for child in table.get_children():
            yield from tables(child)
    top = symtable.symtable(text, "cell", "exec")
    binds = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()}
    takes = {symbol.get_name() for table in tables(top) for symbol in table.get_symbols()
             if symbol.is_referenced() and (table is top or symbol.is_global())}
    return binds, takes - binds


def defined_twice(texts):
    """Functions, classes and constants that the cells define more than once."""
    seen = [name for text in texts for node in ast.parse(text).body if notebook.is_definition(node)
            for name in ([node.name] if hasattr(node, "name") else [target.id for target in getattr(node, "targets", [])])]
    return sorted({name for name in seen if seen.count(name) > 1})


def read_from_cells_that_show(texts):
    """(name, cell) for every name that a cell reads from an earlier one whose title says that it only shows something."""
    shown, faults = {}, []
    for number, text in enumerate(texts, 1):
        binds, takes = names_of(text)
        faults += [(name, number) for name in sorted(takes & shown.keys())]
        for name in binds:
            shown.pop(name, None)
        if SHOWS.match(text):
            shown |= dict.fromkeys(binds, number)
    return faults


def with_two_meanings(texts):
    """Names that a cell reads from elsewhere although more than one cell before it binds them. Those of `AGAIN` may be."""
    bound, faults = {}, set()
    for number, text in enumerate(texts, 1):
        binds, takes = names_of(text)
        faults |= {name for name in takes - AGAIN if len(bound.get(name, ())) > 1}
        if not SHOWS.match(text):
            for name in binds:
                bound.setdefault(name, set()).add(number)
    return sorted(faults)


def test_every_name_is_defined_once_and_has_one_meaning():
    texts = [cell["text"] for _, cell in code_cells()]
    none_of(defined_twice(texts) + read_from_cells_that_show(texts) + with_two_meanings(texts))


def test_planted_faults_of_names_are_found():
    assert defined_twice(["def f(): pass", "x = 1\nABC = 2\nclass G: pass", "x = 2\nABC = 3", "def f(): return 1"]) == ["ABC", "f"]
    plot = "#@title Plot (folded, 2 lines)\nxs = f()\nplot(xs)"
    assert read_from_cells_that_show([plot, "print(xs)"]) == [("xs", 2)]
    assert read_from_cells_that_show([plot, "def g():\n    return xs"]) == [("xs", 2)]
    assert read_from_cells_that_show([plot, "xs = 3", "print(xs)"]) == [] == read_from_cells_that_show([plot, "print([xs for xs in y])"])
    assert with_two_meanings(["ids = f()", "ids = g()", "print(ids)"]) == ["ids"]
    assert with_two_meanings(["ids = f()\nprint(ids)", "ids = g()\nprint(ids)", "print([ids for ids in y])"]) == []
    assert with_two_meanings(["model = f()", "model = g()", "print(model)", f"{plot}\nids = 1", "ids = 2", "print(ids)"]) == []


def test_the_agreed_names_are_there(nb):
    for name in """GUPPY ROLLO DEVICE parse_persona make_dataset Conversation log_prob normalise CharTokenizer BPETokenizer encode_chat GuppyConfig GuppyLM
                   Recipe train evaluate generate chat exam attention_of heads_off generate_cached dequantised save_pretrained load_pretrained""".split():
        assert hasattr(nb, name), name


def leaning(texts):
    """(definition, name) for every function or class that takes a name which no definition gives, but some cell leaves behind."""
    statements = [node for text in texts for node in ast.parse(text).body]
    given, left = set(vars(builtins)), set()
    for node in statements:
        (given if notebook.is_definition(node) else left).update(names_of(ast.unparse(node))[0])
    return sorted({(node.name, name) for node in statements if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                   for name in names_of(ast.unparse(node))[1] & left - given})


def test_definitions_do_not_lean_on_what_some_cell_left_behind():
    """A function may use what the notebook defines, not a variable of the lesson."""
    assert leaning(["x = 3\ny = 4", "def f(y):\n    return y + x", "def g():\n    x = 1\n    return [x for x in range(x)]"]) == [("f", "x")]
    assert leaning(["ABC = 3\nimport re", "def f(a=ABC):\n    return re, len(a)"]) == []
    none_of(leaning([cell["text"] for _, cell in code_cells()]))
