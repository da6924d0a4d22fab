"""The exam: what is asked, how it is graded, and that no topic's replies pass for another's."""
import math
import random
import zlib
from collections import Counter

import notebook
import pytest
import torch


@pytest.fixture(scope="module")
def tiny(nb, small):
    torch.manual_seed(0)
    return nb.GuppyLM(nb.GuppyConfig(vocab_size=small[2].vocab_size, width=64, layers=2, heads=2, ffn=128))


def test_exam_of_the_grammar_and_of_noise(nb, small, tiny):
    persona, dataset, tokenizer = small
    questions = nb.exam_questions(persona, dataset, 60)
    assert [sum(p[0] == name for p in questions) for name in ("seen", "unseen", "copy", "free")] == [60, 60, 60, 0]
    scores, passed = nb.grade(persona, dataset, questions, [c.reply for _, _, c in questions])
    assert scores["seen"] == scores["unseen"] == scores["copy"] == 1 and all(passed)
    scores, passed = nb.grade(persona, dataset, questions, ["blub"] * len(questions))
    assert scores["seen"] == scores["unseen"] == scores["copy"] == 0 and math.isnan(scores["new"])
    for spoil in (lambda word: word[:-1] + "zz", lambda word: word + "zz", lambda word: "zz" + word):
        spoiled = [c.reply + "s" if word is None else c.reply.replace(word, spoil(word)) for _, word, c in questions]
        scores, _ = nb.grade(persona, dataset, questions, spoiled)
        assert scores["copy"] == 0 == scores["seen"], "a word that is not whole, or part of a longer one, does not count"
    known = {word for c in dataset["train"] for text in c[:2] for word in nb.WORD.findall(text)}
    words = [word for score, word, _ in questions if score == "copy"]
    assert not set(words) & known and 20 <= sum(word in persona.held_out_words["tool"] for word in words) <= 40
    assert nb.exam(tiny, tokenizer, persona, dataset, n=20).keys() == {"seen", "unseen", "copy", "new"}


def test_exam_of_a_persona_without_words_to_copy(nb):
    persona = nb.parse_persona("""! alphabet abcdefghijklmnopqrstuvwxyz .,?
@x = tea | milk | soup | rice | bread | beans | salt | honey
# a: what is there? | any news? | so what? | who has it? | more | less
< there is @x and @y:x. | @x. + no @z:x, no @x. | take @v:x. |
# b: hello | good day | nice hat | well met | there you are | morning
< @x for you. + and @y:x for @z:x. | eat @w:x. |
""")
    dataset = nb.make_dataset(persona, 3_500)
    questions = nb.exam_questions(persona, dataset, 30)
    scores, passed = nb.grade(persona, dataset, questions, [c.reply for _, _, c in questions])
    assert scores["seen"] == scores["unseen"] == 1 and math.isnan(scores["copy"]) and all(passed)


def test_kinds_of_failure(nb, persona, dataset):
    """Another topic's reply, a word that comes back as others, a sentence that nobody says: each is called by its name."""
    def kinds(asked):
        return Counter(nb.kind_of_failure(persona, question, reply) for question, reply in asked)

    questions = nb.exam_questions(persona, dataset, 40)
    copying = [question for question in questions if question[0] == "copy"]
    one = [(question, question[2].reply.replace(question[1], "zorblit")) for question in copying]
    two = [(question, question[2].reply.replace(question[1], "zorblit", 1).replace(question[1], "borz")) for question in copying]
    assert kinds(one) == kinds(two) == {"another word": 40}
    plain = [question for question in questions if question[0] == "seen" and question[2].topic not in {q[2].topic for q in copying}]
    swapped = [(a, b[2].reply) for a, b in zip(plain, plain[1:]) if a[2].topic != b[2].topic]
    assert len(swapped) > 15 and kinds(swapped) == {"another topic": len(swapped)}
    assert kinds((question, question[2].reply + " blub.") for question in plain) == {"said by none": len(plain)}


def test_the_copy_exam_of_guppy(nb, persona, dataset):
    questions = [paper for paper in nb.exam_questions(persona, dataset, 300) if paper[0] == "copy"]
    assert len(questions) == 300 and len({c.topic for _, _, c in questions}) >= 6
    asked = {(c.topic, nb.bare(persona, c.prompt.replace(word, "zzz"))) for _, word, c in questions}
    held = {(name, nb.bare(persona, nb.re.sub(r"@\w+:\w+\[\]", "zzz", text))) for name in persona.topics
            for wording in sum(nb.sort_wordings(persona, name)["unseen"], []) if "@" in wording
            for text in nb.spell_out(nb.parse_template(wording))}
    assert any("zzz" in text for _, text in held) and all("zzz" in text for _, text in asked)
    assert not asked & held, "no wording of the copy exam is held out: it tests copying alone"
    assert all(word in nb.WORD.findall(c.prompt) and word in nb.WORD.findall(c.reply) for _, word, c in questions)


def test_free_questions(nb, persona, small):
    """The look half is what the file of the tests holds; its prompts are no wordings of the script; replies decide by topic."""
    text = (notebook.ROOT / "tests/free_wordings.tsv").read_text(encoding="utf-8")
    assert nb.FREE.strip() == text.strip() and len(text.splitlines()) >= 200
    questions = nb.free_questions(persona, random.Random(0))
    assert len(questions) == len(text.splitlines()) and {topic for topics, _ in questions for topic in topics} == set(persona.topics)
    assert sum(len(c.prompt.split()) > 8 for _, c in questions) >= 0.3 * len(questions)
    assert all(1 <= len(topics) <= 2 for topics, _ in questions)
    asked = [("free", topics, c) for topics, c in questions]
    scores, passed = nb.grade(persona, {"train": [], "val": []}, asked, [c.reply for _, _, c in asked])
    assert all(passed) and scores["free"] == 1
    others = [questions[(i + 7) % len(questions)][1].reply for i in range(len(questions))]
    fits = [set(topics) & set(questions[(i + 7) % len(questions)][0]) for i, (topics, _) in enumerate(questions)]
    scores, passed = nb.grade(persona, {"train": [], "val": []}, asked, others)
    assert scores["free"] < 0.02 + sum(map(bool, fits)) / len(fits)
    assert not nb.free_questions(small[0], random.Random(0)), "a persona without these topics is not asked"


def test_a_reply_tells_its_topic(nb, persona, dataset):
    """Of 200 replies at most 2% can be said by another topic's grammar: to be in grammar means to be on topic."""
    rng = random.Random(1)
    shared = 0
    for c in rng.sample(dataset["val"], 200):
        others = [name for name in persona.topics if name != c.topic]
        shared += any(nb.log_prob(persona, name, "qq", c.reply) > -math.inf for name in others)
    assert shared <= 4


def test_the_prompts_that_nobody_reads_are_there_and_none_of_them_is_in_the_look_half(nb, persona):
    blind, fresh = (zlib.decompress((notebook.ROOT / f"tests/free_wordings_{which}.zlib").read_bytes()).decode().splitlines()
                    for which in ("blind", "fresh"))
    look = (notebook.ROOT / "tests/free_wordings.tsv").read_text(encoding="utf-8").splitlines()
    prompts = [[line.split("\t")[1] for line in part] for part in (look, blind, fresh)]
    sizes, first_two, all_three = [len(part) for part in prompts], len({*prompts[0], *prompts[1]}), len({*prompts[0], *prompts[1], *prompts[2]})
    assert sizes[1] >= 200 and sizes[2] >= 600                       # numbers alone: a test that fails must not print what nobody reads
    assert first_two == sizes[0] + sizes[1]
    assert all_three >= sum(sizes) - 0.01 * sizes[2], "several people type hi"
    topics = {topic for line in fresh for topic in line.split("\t")[0].split(",")}
    assert topics == set(persona.topics)
