"""The script of the fish: what it must hold, and whether its English holds in every composition."""
import random
import re
import time

import notebook

TOPICS = """greetings, feelings, temperature, food, light, water, tank, noise, night, loneliness, bubbles, glass, reflection, breathing,
swimming, colors, taste, plants, filter, algae, snails, scared, excited, bored, curious, happy, tired, outside, cats, rain, seasons, music,
visitors, children, meaning_of_life, time, memory, dreams, size, future, past, name, weather, sleep, friends, jokes, fear, love, age,
intelligence, health, singing, tv, about, human_things, goodbye, thanks, glass_tapping, poop, small_talk""".replace("\n", " ").split(", ")


def test_size_of_the_script(nb, persona):
    lines = nb.GUPPY.strip().splitlines()
    assert len(lines) <= 1_700 and max(map(len, lines)) <= 120
    assert sorted(persona.topics) == sorted(TOPICS)
    assert min(len(topic.wordings) for topic in persona.topics.values()) >= 16
    size = {pool: len(words) + len(persona.held_out_words.get(pool, ())) for pool, words in persona.pools.items()}
    assert size["object"] >= 30 and size["snack"] >= 17 and size["thing"] + size["stuff"] >= 150
    things = set(persona.pools["thing"] + persona.held_out_words["thing"]) | set(persona.pools["stuff"] + persona.held_out_words["stuff"])
    assert len(things) == size["thing"] + size["stuff"]


def test_activities(persona):
    assert len(persona.pools["doing"]) >= 25


def test_replies_repeat_the_users_word_in_six_topics(nb, persona):
    copying = {name for name, topic in persona.topics.items() for wording, replies in topic.wordings.items()
               for slot, pool in re.findall(r"@([a-z_]+):?([a-z_]+)?", wording)
               if (pool or slot) in persona.held_out_words and nb.always_holds([replies], slot)}
    assert len(copying) >= 6 and "human_things" in copying


def test_figures_of_the_data(nb, persona):
    started = time.process_time()                                    # of this process alone: the machine may be busy
    train = nb.make_dataset(persona)["train"]
    assert time.process_time() - started < 30
    assert len({c[:2] for c in train}) >= 0.97 * len(train)
    assert len({c.prompt for c in train}) >= 20_000 and len({c.reply for c in train}) >= 50_000


# a word that looks wrong and is not
FINE = r"blub blub|knock knock|tap tap|bye bye|no no"
PLURAL = r"flakes|pellets|peas|bloodworms|wafers|worms|larvae|bubbles|pebbles|plants|fins|gills|laps|children|cats|names|feelings|colours"
SLIPS = {
    "a before a vowel": r"\ba (?!one\b|uni|use)[aeiou]\w*",
    "an before a consonant": r"\ban (?![aeiou]|hour|honest)\w+",
    "a word twice": rf"\b(?!{FINE})(\w+) \1\b",
    "no space after a mark": r"[a-z][.,?!][a-z]",
    "space before a mark": r" [.,?!]",
    "two spaces, or one at an end": r"  |^ | $",
    "plural with a singular verb": rf"(?<!ing )(?<!ing my )\b({PLURAL}) (is|was|has|does|makes|tastes|would likes)\b",
    "singular with a plural verb": r"\b(he|she|it|the \w+|this \w+) (are|have|am|do)\b(?! not need)",
    "i with another's verb": r"(^|[.?!,] |\band )i (is|are|has|does|likes|wants|were)\b",
    "a number with a singular": r"\b(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|forty) (?!fish\b|big\b|small\b|more\b|"
                                r"of\b|o'clock\b|or\b|is\b|plus\b|proud\b|out\b|live\b|nose prints\b)[a-z]*[^s\W](?=[ .,?!]|$)",
    "no mark at the end": r"[a-z]$",
    "a capital, or a sign of the notation": r"[A-Z@\[\]()|<>+*]",
}


def slips_in(replies):
    """(what, reply) for every pattern that a reply matches."""
    return [(what, reply) for reply in replies for what, pattern in SLIPS.items() if re.search(pattern, reply)]


def test_no_slips_in_20_000_replies(nb, persona):
    rng = random.Random(5)
    names = list(persona.topics)
    replies = {nb.converse(persona, name, rng.choice(list(persona.topics[name].own)), rng).reply
               for name in names for _ in range(20_000 // len(names) + 1)}
    assert not slips_in(replies), slips_in(replies)[:10]


def test_planted_slips_are_found(dataset):
    """Ten slips, each put into a reply that had none."""
    planted = {"a apple fell on me.": 0, "i saw an pebble.": 1, "the the snail is late.": 2, "i like it.now go.": 3, "wait , please.": 4,
               "so  wet in here.": 5, "the flakes is late.": 6, "the snail have a house.": 7, "today i are hungry. and i is small.": 8,
               "i met seven pebble.": 9}
    clean = [c.reply for c in dataset["val"] if not slips_in([c.reply])][:len(planted)]
    assert len(clean) == len(planted)
    for reply, slip, what in zip(clean, planted, list(SLIPS)):
        assert what in {found for found, _ in slips_in([f"{reply} {slip}"])}, (what, slip)


def test_no_reply_puts_an_article_before_a_copied_word(nb, persona):
    replies = "\n".join(line for line in re.sub(r"\n\s+", " ", nb.GUPPY).splitlines() if line[:1] == "<")
    for pool in persona.held_out_words:
        assert not re.search(rf"\ban? @{pool}\b", replies), pool


def test_what_the_text_shows_of_two_topics_stands_in_the_script(nb):
    shown = next(c["text"] for c in notebook.cells() if c["cell_type"] == "markdown" and "```\n# " in c["text"])
    block = re.sub(r"\n +", " ", shown.split("```")[1].strip())        # continued lines in one
    script = re.sub(r"\n +", " ", nb.GUPPY)
    heads = re.findall(r"^# \w+(?: x\d)?:", block, re.M)
    assert len(heads) == 2
    for part in re.split(r"(?m)^(?=# )", block)[1:]:
        wordings, reply = part.strip().splitlines()
        theirs = next(topic for topic in re.split(r"(?m)^(?=# )", script) if topic.startswith(wordings[:wordings.index(":") + 1]))
        assert reply in theirs
        for wording in re.split(r" ?\| ?|\[|\]|: ", wordings):
            assert wording == "..." or wording in theirs, wording


def test_the_script_in_the_gallery_is_that_of_the_notebook(nb):
    assert (notebook.ROOT / "assets/personas/guppy.txt").read_text(encoding="utf-8") == nb.GUPPY


def test_shared_ways_to_ask(persona):
    assert sum(len(topic.own) for topic in persona.topics.values()) > 3_000
    assert min(len(topic.shared) for topic in persona.topics.values()) > 500
    assert len(persona.ways) == 3 and all(len(ways) >= 20 for ways in persona.ways.values())
