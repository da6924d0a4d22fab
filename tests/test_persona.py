"""Another character in place of the fish: nothing of the fish is left, and any script of the world will do."""
import json
import math
import os
import re
import subprocess
import sys

import notebook
import pytest
import torch

# words of the fish's script that a plot or a table also needs, to say what it shows
PLAIN = set("""asked better blocks class count understood future orange plane sentence strong weigh where number could learn temperature copies learning moves healthy library measured thing train words""".split())

def words(text):
    return set(re.findall(r"[^\W\d_]+", text.lower().replace("'", "")))


def vocabulary(nb, persona):
    """Every word that the script can say or hear, names of topics, slots and keys left out."""
    trees = [tree for topic in persona.topics.values() for wording, replies in topic.own.items()
             for tree in [persona.opening(), persona.tree(wording), *replies]]
    pools = {word for pool in persona.pools for word in [*persona.pools[pool], *persona.held_out_words.get(pool, ())]}
    return words(" ".join([*nb.words_of([trees]), *pools, persona.head["name"]]))


@pytest.fixture(scope="module")
def rollo(nb):
    return nb.parse_persona(nb.ROLLO)


@pytest.fixture(scope="module")
def fishy(nb, persona, rollo):
    """The fish's own world: words of its script that the other script does not have, short ones left out, for an untrained model
    and `make_up` stumble into those."""
    return {word for word in vocabulary(nb, persona) - vocabulary(nb, rollo) if len(word) > 4 or word in ("fin", "fins", "fish", "tank", "blub", "sea")}


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
        if row["topic"] not in open_topics:                          # made-up words may hit any word
            assert not words(f"{row['prompt']} {row['reply']}") & fishy, row
        assert nb.log_prob(rollo, row["topic"], row["prompt"], row["reply"]) > -math.inf


def test_nothing_of_the_fish_is_left_in_what_is_asked_and_said(rollo, run_of_rollo, fishy):
    printed = run_of_rollo[1]
    asked, said = re.findall(r"^you>\s+(.*)$", printed, re.M), re.findall(r"^rollo>\s+(.*)$", printed, re.M)
    demo = [prompt.strip() for prompt in rollo.head["demo"].split("|")]
    assert set(demo) <= set(asked) and len(said) >= 2 * len(demo)
    diary = re.findall(rf"^  (?:{'|'.join(map(re.escape, demo))}) +(.*)$", printed, re.M)
    assert len(diary) >= len(demo)
    asked.remove("do you like music?")                               # the line of section 11 that the reader is told to change
    for text in [*asked, *said, *diary]:
        assert not words(text) & fishy, text


def test_nothing_of_the_fish_is_left_in_plots_and_tables(run_of_rollo, fishy):
    folder, printed, plots = run_of_rollo
    assert len(plots) > 50
    printed = printed.replace("do you like music?", "").replace("fish [102, 105, 115, 104]", "")      # a word in bytes, section 4
    known = ("share of right replies: the fish (orange)", "five small fish")      # two titles still to be made general
    plots = [text for text in plots if not text.startswith(known)]
    for text in (" ".join(plots), printed):
        left = sorted(words(text) & fishy - PLAIN)
        assert not left, " ".join(left)
    for text in (printed.lower(), "".join(plots).lower()):           # labels of ticks are tokens: a name may stand in pieces
        assert not any(name in text for name in ("guppy", "fish", "blub", "snail"))
    assert (folder / "out/rollo/model.safetensors").exists() and not (folder / "out/guppy").exists()


def test_unknown_persona(tmp_path):
    code = "\n\n".join(cell["text"] for cell in notebook.cells() if cell["cell_type"] == "code")
    (tmp_path / "guppylm.py").write_text(re.sub(r"^PERSONA = .*$", 'PERSONA = "gupy"', code, count=1, flags=re.M), encoding="utf-8")
    run = subprocess.run([sys.executable, "guppylm.py"], cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | {"GUPPY_PRESET": "smoke", "MPLBACKEND": "Agg"})
    assert run.returncode != 0 and "PERSONA is 'gupy'; it can be guppy or rollo" in run.stderr


def test_report(nb, rollo, capsys):
    rows = {what: (number, where) for what, number, where in nb.persona_report(rollo)}
    assert capsys.readouterr().out == "", "the linter's warnings are rows, not lines"
    dataset = nb.make_dataset(rollo)
    drawn = [c for cs in dataset.values() for c in cs]
    assert rows["distinct prompts"][0] == len({c.prompt for c in drawn}) > 15_000
    assert rows["distinct replies"][0] == len({c.reply for c in drawn}) > 30_000
    floor = -sum(nb.log_prob(rollo, c.topic, c.prompt, c.reply) for c in dataset["val"]) / 1_500
    assert rows["floor"] == (pytest.approx(floor), "nats per reply")
    assert rows["warnings of the linter"][0] == 0 and rows["fewest wordings"][0] >= 14


def test_report_of_a_script_with_faults_to_find(nb):
    rows = {what: (number, where) for what, number, where in nb.persona_report(nb.parse_persona(THIN), 3_200)}
    assert rows["fewest wordings"] == (3, "kites") and rows["fewest replies"] == (81, "kites")
    share, pair = rows["closest wordings of two topics"]
    assert share == 1 and pair == "'is the kite red' (kites), 'the kite is red' (paint)"
    assert rows["words that stand once in its topic"] == (10, "do fly is kite like red")
    assert rows["warnings of the linter"][0] == 2 and "topic kites has 3 wordings" in rows["warnings of the linter"][1]


THIN = """! alphabet abcdefghijklmnopqrstuvwxyz .,?
@x = up | down | left | right | here | there | now | never | often
# kites: is the kite red | do kites fly | like kites
< a kite goes @x and @y:x.
# paint x2: the kite is red | how red is red | red is red enough | red paint | is paint red enough
< @x. | @x, @y:x and @z:x. | @x and @y:x. + @v:x. | so @w:x. |
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
