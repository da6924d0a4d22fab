"""Another character in place of the fish: nothing of the fish is left, and any script of the world will do."""
import json
import math
import random
import re
import subprocess
import sys

import gallery
import matplotlib.pyplot as plt
import notebook
import pytest
import torch
from matplotlib import font_manager

PERSONAS = notebook.ROOT / "assets/personas"
GALLERY = sorted(path for path in PERSONAS.glob("*.txt") if path.stem not in ("blank", "guppy"))

# words of the fish's script that a plot or a table also needs, to say what it shows
PLAIN = set("""asked other better blocks class count understood future orange plane sentence strong weigh where number could learn temperature copies learning moves healthy library measured thing train words letters feelings needs water early""".split())

def words(text):
    return set(re.findall(r"[^\W\d_]+", text.lower().replace("'", "")))


def vocabulary(nb, persona):
    """Every word that the script can say or hear, names of topics, slots and keys left out."""
    trees = [tree for topic in persona.topics.values() for wording, replies in topic.own.items()
             for tree in [persona.opening(), persona.tree(wording), *replies]]
    pools = {word for pool in persona.pools for word in [*persona.pools[pool], *persona.held_out_words.get(pool, ())]}
    return words(" ".join([*said_by(nb, trees), *pools, persona.head["name"]]))


def said_by(nb, tree):
    """All that stands in a tree, slots left out."""
    for part in tree:
        if isinstance(part, str):
            yield part
        elif not isinstance(part, nb.Slot):
            yield from said_by(nb, part)


@pytest.fixture(scope="module")
def rollo(nb):
    return nb.parse_persona(nb.ROLLO)


@pytest.fixture(scope="module")
def fishy(nb, persona, rollo):
    """The fish's own world: words that it says and the other script does not have, short ones left out, for an untrained model
    and `make_up` stumble into those."""
    replies = [tree for topic in persona.topics.values() for trees in topic.own.values() for tree in trees]
    pools = {word for pool in persona.pools if pool not in persona.held_out_words for word in persona.pools[pool]}
    said = words(" ".join([*said_by(nb, replies), *pools, persona.head["name"]]))
    return {word for word in said - vocabulary(nb, rollo) if len(word) > 4 or word in ("fin", "fins", "fish", "tank", "blub", "sea")}


def test_the_two_scripts_share_no_sentence(nb, persona, rollo):
    def sentences(script):
        return {re.sub(r"\s+", " ", part).strip() for line in re.sub(r"\n\s+", " ", script).splitlines() if line[0] == "<"
                for part in re.split(r" [|+](?= |$)", line[1:])} - {""}
    assert len(sentences(nb.ROLLO)) > 150 and not sentences(nb.ROLLO) & sentences(nb.GUPPY)
    assert 12 <= len(rollo.topics) and all(len(topic.wordings) >= 14 for topic in rollo.topics.values())


def test_nothing_of_the_fish_is_left_in_the_data(nb, rollo, run_of_rollo, fishy):
    rows = [json.loads(line) for line in open(run_of_rollo[0] / "out/conversations.jsonl", encoding="utf-8")]
    assert {row["topic"] for row in rows} == set(rollo.topics)
    open_topics = {name for name, topic in rollo.topics.items() if any(f"@{pool}" in w for w in topic.wordings for pool in rollo.held_out_words)}
    for row in rows:
        assert "guppy" not in row["prompt"] and "fishy" not in row["prompt"], row
        if row["topic"] not in open_topics:                          # made-up words may hit any word, and so may slips in prompts
            assert not words(row["reply"]) & fishy, row
        assert nb.log_prob(rollo, row["topic"], row["prompt"], row["reply"]) > -math.inf


def test_nothing_of_the_fish_is_left_in_what_is_asked_and_said(rollo, run_of_rollo, fishy):
    printed = run_of_rollo[1]
    asked, said = re.findall(r"^you>\s+(.*)$", printed, re.M), re.findall(r"^rollo>\s+(.*)$", printed, re.M)
    demo = [prompt.strip() for prompt in rollo.head["demo"].split("|")]
    assert set(demo) <= set(asked) and len(said) > len(demo)
    diary = re.findall(rf"^  (?:{'|'.join(map(re.escape, demo))}) +(.*)$", printed, re.M)
    assert len(diary) >= len(demo)
    asked.remove("do you like music?")                               # the line of section 11 that the reader is told to change
    for text in [*asked, *said, *diary]:
        assert not words(text) & fishy, text


def test_nothing_of_the_fish_is_left_in_plots_and_tables(run_of_rollo, fishy):
    folder, printed, plots = run_of_rollo
    assert len(plots) > 50
    printed = printed.replace("do you like music?", "").replace("fish [102, 105, 115, 104]", "")      # a word in bytes, section 4
    printed = re.sub(r"(?s)\[23 exercises: done.*?\[24 character: done", "", printed)                # a third character, section 24
    printed = re.sub(r"(?m)^tilly>.*(?:\n {7}.*)*", "", printed)                                      # who is spoken with once more after it
    for text in (" ".join(plots), printed):
        left = sorted(words(text) & fishy - PLAIN)
        assert not left, " ".join(left)
    text = "".join(plots).lower()                                    # labels of ticks are tokens: a name may stand in pieces
    assert not any(name in text for name in ("guppy", "fish", "blub", "snail"))
    assert (folder / "out/rollo/model.safetensors").exists() and not (folder / "out/guppy").exists()


# ---- a character from a file ----

SCRIPT = """! name bell
! alphabet a-z .,?!
! demo hello
@when = at dawn | at noon | at night | on monday | on friday | today | last year | in may
@name* = anna | ben | carla | david | emma | felix | grace | hugo | ines | jack | kate | liam
# hello: hello | good morning | are you there?
< ding. | i rang @when. + i ring @when and @later:when. |
# names x2: i am @name | my name is @name | call me @name
< @name, ding. | ding, @name. + @when i ring for @name. |
"""


def cell_with(text):
    cell, = (cell["text"] for cell in notebook.cells() if cell["cell_type"] == "code" and text in cell["text"])
    return cell


def same(a, b):
    return (a.head, a.decoration, a.slips, a.pools, a.ways) == (b.head, b.decoration, b.slips, b.pools, b.ways) \
        and [topic.own for topic in a.topics.values()] == [topic.own for topic in b.topics.values()]


def test_a_character_has_a_name_a_path_or_a_text(nb, tmp_path):
    assert same(nb.read_persona("rollo"), nb.parse_persona(nb.ROLLO)) and nb.read_persona("guppy").name == "guppy"
    file = tmp_path / "bell.txt"
    file.write_text(SCRIPT, encoding="utf-8")
    for source in (SCRIPT, file, str(file)):
        assert same(nb.read_persona(source), nb.parse_persona(SCRIPT))
    file.write_text(SCRIPT.replace("! name bell\n", ""), encoding="utf-8")
    assert nb.read_persona(file).name == "bell", "without a line for the name, that of the file"


READ_RIGHT = {
    "a BOM": SCRIPT.encode("utf-8-sig"),
    "Windows line ends": SCRIPT.replace("\n", "\r\n").encode(),
    "line ends of an old Mac": SCRIPT.replace("\n", "\r").encode(),
    "tabs": SCRIPT.replace(" | carla", "\n\t|\tcarla").encode(),
    "spaces that do not break": SCRIPT.replace(" | ", "\u00a0| ").encode(),
    "marks of direction": SCRIPT.replace("ding", "\u200fding\u200e").encode(),
}


@pytest.mark.parametrize("data", READ_RIGHT.values(), ids=READ_RIGHT)
def test_files_that_are_read_right(nb, tmp_path, data):
    assert data != SCRIPT.encode()
    (tmp_path / "bell.txt").write_bytes(data)
    assert same(nb.read_persona(tmp_path / "bell.txt"), nb.parse_persona(SCRIPT))


def test_letters_of_two_parts_are_read_as_one(nb, tmp_path):
    """An editor may store é as e and an accent; what people type is put together (NFC)."""
    (tmp_path / "a.txt").write_text("# a: cafe\u0301 | caf\u00e9 noir | the\n< oui.\n", encoding="utf-8")
    assert "caf\u00e9" in nb.read_persona(tmp_path / "a.txt").topics["a"].own


REFUSED = {
    "UTF-16": (SCRIPT.encode("utf-16"), r"bell\.txt is written in UTF-16, .* save it as plain text in UTF-8"),
    "UTF-16 without a mark": (SCRIPT.encode("utf-16-le"), r"bell\.txt is written in UTF-16"),
    "Latin-1": (SCRIPT.replace("ben", "b\u00e9n").encode("latin-1"), r"bell\.txt, line 5: this is not UTF-8, but perhaps Latin-1 .*b\u00e9n.* save the file"),
    "a document": (b"PK\3\4" + SCRIPT.encode(), r"bell\.txt is a document of a word processor"),
    "rich text": (b"{\\rtf1" + SCRIPT.encode(), r"bell\.txt is a document of a word processor"),
    "nothing": (b"", r"bell\.txt, line 1: this script has no topic"),
    "a fault in a line": (SCRIPT.replace("i rang @when", "i rang @wen").encode(), r"bell\.txt, line 7: there is no pool @wen"),
    "a fault between lines": (SCRIPT.replace("call me @name", "hello").encode(), r"bell\.txt, line 8: 'hello' can be said by two wordings: 'hello' of names and 'hello' of hello "),
}


@pytest.mark.parametrize("data,message", REFUSED.values(), ids=REFUSED)
def test_files_that_are_refused(nb, tmp_path, data, message):
    (tmp_path / "bell.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        nb.read_persona(tmp_path / "bell.txt")


def test_there_is_no_such_file(nb, tmp_path):
    for place in ("gupy", tmp_path / "none.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no file '{re.escape(str(place))}': a character is guppy, rollo, or the path of a script .*upload"):
            nb.read_persona(place)


def test_section_1_refuses_an_unknown_character_at_once(tmp_path):
    cell = cell_with("PERSONA is {PERSONA!r}")
    advice = cell[cell.index("if PERSONA not in"):cell.index("if not TRAIN")]
    (tmp_path / "bell.txt").write_text(SCRIPT, encoding="utf-8")
    for known in ("guppy", "rollo", str(tmp_path / "bell.txt")):
        exec(advice, {"PERSONA": known, "Path": notebook.Path})
    with pytest.raises(FileNotFoundError, match="PERSONA is 'gupy'; it can be guppy or rollo, or the path of a script"):
        exec(advice, {"PERSONA": "gupy", "Path": notebook.Path})


# ---- the gallery ----

def test_the_two_files_of_the_notebook_are_its_two_scripts(nb):
    for name, script in (("guppy", nb.GUPPY), ("rollo", nb.ROLLO)):
        assert (PERSONAS / f"{name}.txt").read_text(encoding="utf-8") == script, f"assets/personas/{name}.txt and the notebook differ"


def test_the_blank_is_ready(nb, capsys):
    text = (PERSONAS / "blank.txt").read_text(encoding="utf-8")
    persona = nb.read_persona(PERSONAS / "blank.txt")
    assert capsys.readouterr().out == "", "no warning"
    assert len(persona.topics) == 3 and persona.held_out_words and sum(line.startswith("//") for line in text.splitlines()) > 15
    dataset = nb.make_dataset(persona, 10_000)
    assert sum(map(len, dataset.values())) == 10_000 and len({c.reply for c in dataset["train"]}) > 3_000
    lines = text[text.index("//@thing*"):text.index("//\n//    To copy better")]
    more = nb.parse_persona(text.replace(lines, lines.replace("//", "")))
    assert list(more.topics) == [*persona.topics, "things"] and capsys.readouterr().out == "", "without their slashes the last lines are a topic"
    assert nb.bare(persona, "hi") in {nb.bare(persona, way) for way in ("hey", "")} and "[hello|hi|hey]" in persona.topics["hello"].own
    assert all(sign in text for sign in ("\n! ", "\n~ ", "\n@", "* =", "\n# ", " x2:", "\n< ", " + ", " |\n", "[", "( "))


def test_a_script_is_read_in_the_terminal(tmp_path):
    """As README and blank.txt say: two conversations of each topic and the report, or the fault with file and line."""
    def started(path):
        return subprocess.Popen([sys.executable, str(notebook.ROOT / "tests/notebook.py"), str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    warned = tmp_path / "warned.txt"
    warned.write_text((PERSONAS / "blank.txt").read_text(encoding="utf-8").replace("| this is @name", "| this is a nice day"), encoding="utf-8")
    bad = tmp_path / "my.txt"
    bad.write_text((PERSONAS / "blank.txt").read_text(encoding="utf-8").replace("| good to be back", "| Good to be back"), encoding="utf-8")
    good, told, wrong = [started(path) for path in (PERSONAS / "blank.txt", warned, bad)]              # all at once
    (fine, _), (said, _), (_, fault) = good.communicate(), told.communicate(), wrong.communicate()
    assert good.returncode == 0 and fine.count("  ->  ") == 6 and "distinct prompts" in fine, "two of each topic"
    assert "No fault, no warning. Next: python tests/notebook.py" in fine and "the warnings are advice" in said
    assert told.returncode == 0 and said.count("'this is a nice day' brings no @name") == 1, "said once"
    assert wrong.returncode == 1 and re.search(r"my\.txt, line \d+: 'G' is not in the alphabet .* stands in 'Good'", fault), fault
    assert "Traceback" not in fault


def test_a_character_keeps_its_name_in_the_terminal(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# otto\n\nA character.\n# not this\n", encoding="utf-8")
    assert notebook.name_of(notebook.ASSETS) == "guppy" and notebook.name_of(tmp_path) == "otto"
    assert notebook.name_of("https://example.org/fish") == "fish" and notebook.name_of("out/my-small") == "my-small"


def test_an_answer_that_repeats_what_was_not_brought(nb, capsys):
    text = (PERSONAS / "blank.txt").read_text(encoding="utf-8")
    nb.parse_persona(text.replace("| this is @name", "| this is a nice day"))
    assert "'this is a nice day' brings no @name" in capsys.readouterr().out


def test_the_gallery_says_which_scores_are_below_what_we_ask_for():
    text = gallery.README.read_text(encoding="utf-8")
    assert gallery.with_rows(text, {}) == text
    row = "| `rollo.txt` | rollo | 15 | 228 | {} | {} | {} | 65.6% | 328 |"
    assert gallery.missed_by(row.format("95.0%", "75.0%", "60.0%")) == []
    assert gallery.missed_by(row.format("94.9%", "75.0%", "nan%")) == ["seen", "copy"]
    assert "`rollo.txt` in unseen" in gallery.with_rows(text, {"rollo.txt": row.format("99.0%", "74.9%", "60.0%")})


@pytest.mark.parametrize("path", GALLERY, ids=[path.stem for path in GALLERY])
def test_a_character_of_the_gallery(nb, path, capsys):
    persona = nb.read_persona(path)
    assert capsys.readouterr().out == "", "no warning"
    assert len(persona.topics) >= 15 and all(len(topic.wordings) >= 14 for topic in persona.topics.values())
    copied = [name for name, topic in persona.topics.items() if any(f"@{pool}" in wording for wording in topic.wordings for pool in persona.held_out_words)]
    assert len(copied) >= 3 and all(len(held) >= 2 for held in persona.held_out_words.values())
    dataset = nb.make_dataset(persona, 5_000)
    said = {use: {nb.bare(persona, c.prompt) for c in cs} for use, cs in dataset.items()}
    assert not said["unseen"] & (said["train"] | said["val"])
    questions = nb.exam_questions(persona, dataset, 60)
    scores, passed = nb.grade(persona, dataset, questions, [c.reply for _, _, c in questions])
    assert all(passed) and {"seen", "unseen", "copy"} <= {score for score, _, _ in questions}
    for _, word, c in questions:
        if word:
            assert nb.log_prob(persona, c.topic, c.prompt, c.reply) > -math.inf, c
            assert nb.log_prob(persona, c.topic, c.prompt, c.reply.replace(word, "").replace(word.capitalize(), "")) == -math.inf, c


# ---- what other scripts of the world need ----

def test_chinese_words_that_nobody_has_heard(nb):
    pool = ["小明", "王小明", "安娜", "老张", "大华", "丽丽", "周子涵", "李雷"]
    made = [nb.make_up(pool, random.Random(i), ("香蕉", "wifi", *pool)) for i in range(300)]
    assert {len(word) for word in made} == {2, 3} and not any(known in word for word in made for known in pool)
    letters, others = set("".join(pool)), set("香蕉")
    ways = [sum(set(word) <= letters for word in made), sum(bool(set(word) & others) for word in made),
            sum(not set(word) <= letters | others for word in made)]
    assert ways[0] > 180 and ways[1] > 15 and 10 < ways[2] < 60, "letters of the pool, of other pools, and one word in ten of any letters"
    assert all("\u4e00" <= letter <= "\u9fa5" for word in made for letter in word)


def test_right_to_left(nb, capsys):
    """Marks of isolation, from the first such letter to the last, with the sign that ends the sentence."""
    assert nb.isolated("you> مرحبا، يا علي! + more") == "you> \u2067مرحبا، يا علي!\u2069 + more"
    assert nb.isolated("12 fish. (شكرا)") == "12 fish. (\u2067شكرا)\u2069" and nb.isolated("no 鱼 here.") == "no 鱼 here."
    nb.show_table(("what", "n"), ("شكرا.", 1), ("thanks", 22))
    nb.print_wrapped("علي> أهلا.")
    printed = capsys.readouterr().out
    assert "\u2067شكرا.\u2069    1\n" in printed and printed.endswith("\u2067علي> أهلا.\u2069\n")


@pytest.fixture()
def fonts():
    """Puts fonts back as they were."""
    yield
    plt.rcdefaults()
    plt.Text.set_text = getattr(plt.Text.set_text, "without_dots", plt.Text.set_text)


def drawn(text, **looks):
    figure = plt.figure()
    shown = figure.text(0, 0, text, **looks)
    figure.canvas.draw()
    plt.close(figure)
    return shown.get_text()


@pytest.mark.filterwarnings("error:Glyph")
def test_letters_that_no_font_has_are_dots_and_not_boxes(nb, fonts, monkeypatch):
    chinese = nb.Persona(letters=set("鱼你 a"))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font for font in font_manager.fontManager.ttflist if font.name.startswith("DejaVu")])
    assert nb.fit_fonts(chinese) is None
    assert drawn("a 鱼 b") == "a · b"
    assert nb.fit_fonts(nb.Persona(letters=set("abc مرحبا éß жд"))) is None
    assert drawn("مرحبا жд") == "مرحبا жд"


@pytest.mark.filterwarnings("error:Glyph")
def test_a_font_that_has_the_letters_is_taken(nb, fonts):
    name = nb.fit_fonts(nb.Persona(letters=set("鱼你 a鿿")))
    assert name is None or "Last Resort" not in name
    if name is None:
        pytest.skip("no font with Chinese letters here: the test above is about that")
    assert drawn("a 鱼") == "a 鱼" and name in plt.rcParams["font.family"]
    assert drawn("user⏎ 鱼 �", family=nb.MONOSPACE) == "user⏎ 鱼 �", "signs of tokens beside Chinese letters"
    nb.fit_fonts(nb.Persona(letters=set("abc")))
    assert plt.rcParams["font.family"] == ["DejaVu Sans"] and nb.MONOSPACE == ["DejaVu Sans Mono"]


# ---- the report ----

def test_report(nb, rollo, capsys):
    rows = {what: (number, where) for what, number, where in nb.persona_report(rollo, 8_000)}
    assert capsys.readouterr().out == "", "warnings are rows, not lines"
    dataset = nb.make_dataset(rollo, 8_000)
    drawn = [c for cs in dataset.values() for c in cs]
    assert rows["distinct prompts"][0] == len({c.prompt for c in drawn}) > 4_000
    assert rows["distinct replies"][0] == len({c.reply for c in drawn}) > 6_000
    floor = -sum(nb.log_prob(rollo, c.topic, c.prompt, c.reply) for c in dataset["val"]) / 1_500
    assert rows["floor"] == (pytest.approx(floor), "nats per reply")
    assert rows["fewest wordings"][0] >= 14 and not any("12" in what for what in rows)


def test_report_of_a_script_with_faults_to_find(nb, tmp_path, capsys):
    (tmp_path / "thin.txt").write_text(THIN, encoding="utf-8")
    rows = nb.persona_report(tmp_path / "thin.txt", 3_200)
    assert rows == nb.persona_report(THIN, 3_200) == nb.persona_report(nb.parse_persona(THIN), 3_200)
    rows = {what: (number, where) for what, number, where in rows}
    assert rows["fewest wordings"] == (3, "kites") and rows["fewest replies"] == (81, "kites")
    assert rows["warning: wordings of two topics too close"] == (1, "'is the kite red' (kites), 'the kite is red' (paint)")
    assert rows["warning: topics under 12 wordings"] == (3, "kites, paint, who")
    assert rows["warning: open pools under 12 words"] == (1, "@who")
    assert rows["warning: misplaced by a word counter"][1].startswith("of 11;")


@pytest.mark.parametrize("replies,lacks", [
    ("@who @x. | @x, @who. + @x. |", False), ("@x. + @who @x.", False), ("@Who @x. | [so|well], @who.", False),
    ("@who @x. | @x.", True), ("@x. + @who @x. |", True), ("@x( @who). + @x.", True), ("@other:who @x.", True)])
def test_report_of_replies_that_lack_the_users_word(nb, replies, lacks):
    head, _ = THIN.split("# who:")
    script = f"{head}# who: i am @who | my name is @who | so i am @who\n< {replies}\n"
    rows = {what: (number, where) for what, number, where in nb.persona_report(script, 3_200)}
    assert rows.get("warning: replies that may lack the user's word") == ((1, "who") if lacks else None)


def test_wordings_that_will_be_understood_badly(nb):
    persona = nb.parse_persona(THIN)
    found = {wording: (topic, guess, word, once) for _, wording, topic, guess, word, once in nb.misleading_wordings(persona)}
    assert found["is the kite red"][:3] == ("kites", "paint", "red") and found["is the kite red"][3]
    assert "red paint" not in found and "i am @who" not in found
    assert [row[0] for row in nb.misleading_wordings(persona)] == sorted((row[0] for row in nb.misleading_wordings(persona)), reverse=True)


def test_the_word_counter_where_there_are_no_spaces(nb):
    script = "! spaces no\n# 雨: 下雨了 | 今天下雨吗 | 下雨好吗\n< 是。\n# 茶: 喝茶吗 | 我要喝茶 | 喝茶好吗\n< 好。\n"
    assert nb.misleading_wordings(nb.parse_persona(script)) == []
    wrong = nb.misleading_wordings(nb.parse_persona(script.replace("我要喝茶", "今天下雨好")))
    assert [(row[1], row[2], row[3]) for row in wrong][:1] == [("今天下雨好", "茶", "雨")]


THIN = """! alphabet abcdefghijklmnopqrstuvwxyz .,?
@x = up | down | left | right | here | there | now | never | often
@who* = ann | bob | cat | dan | eve | fay
# kites: is the kite red | do kites fly | like kites
< a kite goes @x and @y:x.
# paint x2: the kite is red | how red is red | red is red enough | red paint | is paint red enough
< @x. | @x, @y:x and @z:x. | @x and @y:x. + @v:x. | so @w:x. |
# who: i am @who | my name is @who | so i am @who
< @who @x. | @x, @who. | @who and @y:x. + @v:x. |
"""


def test_a_persona_in_greek_trains_chats_and_is_saved(nb, tmp_path, capsys):
    persona = nb.parse_persona(GREEK)
    assert "warning" not in capsys.readouterr().out
    dataset = nb.make_dataset(persona, 5_000)
    tokenizer = nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), 700)
    torch.manual_seed(0)
    model = nb.GuppyLM(nb.GuppyConfig(tokenizer.vocab_size, width=64, layers=2, heads=2, ffn=128))
    history = nb.train(model, tokenizer, dataset, nb.Recipe(steps=300, every=300, lr=4e-3, warmup=20), ["γεια σου"])
    assert history[-1]["val"] < 0.4 * math.log(tokenizer.vocab_size)
    replies = [nb.chat(prompt, model, tokenizer, seed=0) for prompt in ("ΓΕΙΆ ΣΟΥ", "τι ώρα είναι;", "με λένε Θάλεια")]
    letters = set(persona.head["alphabet"]) | {" "}
    assert all(reply and set(reply) <= letters for reply in replies), replies
    questions = nb.exam_questions(persona, dataset, 40)
    scores, passed = nb.grade(persona, dataset, questions, [c.reply for _, _, c in questions])
    assert all(passed) and {"seen", "unseen", "copy"} <= {score for score, _, _ in questions}
    assert nb.exam(model, tokenizer, persona, dataset, 60)["seen"] > 0.2
    nb.save_pretrained(model, tokenizer, tmp_path / "ρολόι")
    again, same = nb.load_pretrained(tmp_path / "ρολόι")
    assert [nb.chat("τι ώρα είναι;", m, t, temperature=0) for m, t in ((model, tokenizer), (again, same))] \
        == [nb.chat("τι ώρα είναι;", model, tokenizer, temperature=0)] * 2
    rows = nb.persona_report(persona, 5_000)
    assert rows and all(len(row) == 3 for row in rows)


GREEK = """! name ρολόι
! alphabet αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊΐ .,;
! demo γεια σου | τι ώρα είναι; | με λένε δανάη
~ ((ε ))*(( φίλε μου))
~ πώς = πως | είσαι = εισαι | ; =
@many = δύο | τρεις | τέσσερις | πέντε | έξι | επτά | οκτώ | εννέα | δέκα | έντεκα | δώδεκα
@day = τη δευτέρα | την τρίτη | την τετάρτη | την πέμπτη | την παρασκευή | το σάββατο | την κυριακή
@name* = άννα | μαρία | ελένη | σοφία | δανάη | κατερίνα | ειρήνη | ιωάννα | νίκη | λήδα | μυρτώ | ηρώ | αθηνά |
  φωτεινή | ισμήνη | νεφέλη | ραλλού | αγγελική
# χαιρετισμοί: γεια | γεια σου | γεια και χαρά | γεια και πάλι | σου λέω γεια | καλημέρα | καλημέρα σου | καλησπέρα |
  καλησπέρα σου | καλημέρα και καλησπέρα | καλώς σε βρήκα | σου λέω καλημέρα
< γεια σου, τικ τακ. | καλώς ήρθες. | σε περίμενα όλη τη νύχτα. | σε περίμενα από @day. + για σένα χτυπάω @many φορές.
  | έλα πιο κοντά. | τικ. | τακ. |
# ώρα: τι ώρα είναι; | ξέρεις τι ώρα είναι; | πες μου την ώρα | τι ώρα είναι τώρα; | θέλω την ώρα | τι ώρα έχεις; |
  μπορείς να μου πεις την ώρα; | τι ώρα δείχνεις τώρα; | είναι αργά; | είναι πολύ αργά; | είναι αργά τώρα; | άργησα
  πολύ;
< είναι @many και κάτι. | είναι @many, μάλλον. | δείχνω @many, αλλά κοιμόμουν. | η ώρα είναι @many. + ρώτα με πάλι
  @day. | τον χρόνο τον φυλάω εγώ. | μη βιάζεσαι. | το ίδιο έλεγα και @day. |
# όνομα: με λένε @name | είμαι η @name | εγώ είμαι η @name | το όνομά μου είναι @name | λέγομαι @name | να με λες
  @name | οι φίλοι με λένε @name | όλοι με λένε @name | με φωνάζουν @name | φώναζέ με @name | εδώ είναι η @name |
  μιλάει η @name
< χαίρω πολύ, @name. | καλώς ήρθες, @name. | γεια σου, @name, τικ τακ. | τι ωραίο όνομα, @name. + θα χτυπήσω @many
  φορές για σένα. | σε θυμάμαι από @day. | το είπα και στον τοίχο. |
# διάθεση: τι κάνεις; | τι κάνεις σήμερα; | πώς είσαι; | πώς είσαι σήμερα; | είσαι καλά; | είσαι καλά σήμερα; |
  νιώθεις καλά; | είσαι κουρασμένο; | νιώθεις κουρασμένο; | είσαι πάλι κουρασμένο; | τι κάνεις στον τοίχο; | είσαι
  καλά στον τοίχο;
< είμαι καλά, γυρίζω. | λίγο κουρασμένο, όπως πάντα. | ο τοίχος είναι ζεστός και φαρδύς. | από @day πάω λίγο πίσω. +
  κούρδισέ με @many φορές. | μέσα μου μένει ένας κούκος. | εσύ πώς είσαι; |
"""


def test_open_words_without_letters_and_few_of_them(nb, monkeypatch):
    """Words of digits alone can be made up; where no word is left that training has not seen, fewer are asked."""
    rng = random.Random(0)
    made = {nb.make_up(("1999", "2001", "1987"), rng) for _ in range(300)}
    assert len(made) > 30 and all(len(word) >= 2 for word in made)
    words = [a + b for a in "甲乙丙丁" for b in "子丑寅"]
    script = ("! spaces no\n! alphabet 一-鿿 。\n! demo 你好\n@name* = " + " | ".join(words) + "\n# who: 我叫@name | 叫我@name | 我是@name | 这是@name\n"
              "< @name。 | 你是@name。 | 见到@name。\n# hi: 你好 | 早上好 | 晚上好 | 好久不见\n< 好。 | 来了。 | 坐。\n")
    persona = nb.parse_persona(script)
    every = [a + b for a in "甲乙丙丁" for b in "子丑寅"]
    dataset = {"train": [nb.Conversation(f"我叫{word}", f"{word}。", "who") for word in every]}
    asked = nb.copy_questions(persona, dataset, 5, random.Random(0))
    assert len(asked) == 5 and not {word for word, _ in asked} & set(every), "letters of other words, or any at all"
    monkeypatch.setattr(nb, "make_up", lambda words, rng, others=(): words[0])
    assert nb.copy_questions(persona, dataset, 5, random.Random(0)) == []


@pytest.mark.parametrize("line,said", [("~ you u", "a slip is written ~ right = typed"), ("~ = u", "a slip is written ~ right = typed")])
def test_a_slip_that_is_none_is_explained(nb, line, said):
    with pytest.raises(ValueError, match=f"line 1: {said}"):
        nb.parse_persona(f"{line}\n# a: one | two | three\n< yes.\n")


def test_an_x_in_the_name_of_a_topic(nb):
    with pytest.raises(ValueError, match="line 1: the weight of a topic is a number, as in # my x2: .*'xylophone'"):
        nb.parse_persona("# my xylophone: one | two | three\n< yes.\n")
    assert nb.parse_persona("# box x3 : one | two | three\n< yes.\n").topics["box"].weight == 3


THAI = """! name ปลา
! spaces no
! demo ฉันชื่อมานี
@name* = สมชาย | สมหญิง | มานี | มานะ | วิชัย | สมศรี | ปิติ | ชูใจ | วีระ | สุดา | อนันต์ | กมล | ดวงใจ | พิมพ์
@food = ข้าว | ปลา | ผัก | ไข่ | น้ำ
# อาหาร: คุณกินอะไร | ชอบกินอะไร | หิวไหม | วันนี้กินอะไรดี
< ฉันกิน@food | ฉันชอบ@food
  + อร่อยมาก | ดีจัง |
# ชื่อ: ฉันชื่อ@name | เรียกฉันว่า@name | นี่คือเพื่อนฉัน@name | ผมคือ@name
< สวัสดี@name | @nameมาแล้ว
  + ยินดีที่รู้จัก |
"""


@pytest.mark.parametrize("script", [THAI, None], ids=["letters that are no syllables, without spaces", "a Latin name among Chinese ones"])
def test_the_grammar_passes_its_own_exam_without_spaces(nb, script):
    """Made-up words may be longer than any word of the pool: the exam still finds them in a reply."""
    if script is None:
        script = re.sub(r"@name\* = ", "@name* = tom | ", (notebook.ROOT / "assets/personas/alei.txt").read_text(encoding="utf-8"), count=1)
    persona = nb.parse_persona(script)
    dataset = nb.make_dataset(persona, 3_300)
    questions = nb.exam_questions(persona, dataset, 40, 0)
    scores, _ = nb.grade(persona, dataset, questions, [c.reply for _, _, c in questions])
    assert scores["seen"] == scores["unseen"] == scores["copy"] == 1
