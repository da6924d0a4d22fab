"""The grammar against itself: exact probabilities against samples, the split, the linter."""
import hashlib
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter

import notebook
import pytest

HEAD = "! alphabet abcdefghijklmnopqrstuvwxyz ?.,\n"
SCRIPTS = {
    "one text, many derivations": HEAD + """@x = a | aa | aaa
# t: say @x@y:x? | b @x | @x( a)( aa)
< @x(a)[a|aa] | [a|aa]@x + @y:x | b |
< [a|aa] + (a)(aa)(b) + a |
""",
    "decoration, slips and slots that read a prompt in several ways": HEAD + """~ (a )((a ))*( c)(( c))
~ you = u | aa = a
@w = b | b b | b b b
@v* = cat | dog | emu | owl | yak | bee
# t: you @w @z:w | aa b you | do you @w( b)
< @w @z:w | @z:w(b) + u[a|b|(a)b]
# s: i have a @v | my @v @w | look, @v
< @v | @v, @v + @w |
""",
    "ways to ask that topics share, beside wordings that say the same": HEAD + """~ (a )*( c)
~ you = u
@w = b | b b
@v* = cat | dog | emu | owl | yak | bee
@on = do you * | * | look * or
# t: do you @w | @on [b|b b|you]( c) | b c d | some c
< @w:w | b
< you [a|b] |
# s: @on my @v | my @v @v:v | look, @v | look at @v
< @v | @v, @v + @w |
""",
    "parts of a topic with replies of their own": HEAD + """@n* = ann | bob | cat | dan | eve | fay
@m = ann | an
# t: i am @n | call me @n
< hi @n | @n + @m | @m@m
# t: who am i | who is ann | who is @m@k:m
< you are @m | you are @n |
< an(n)(ann)
""",
    "slips of single letters, and a capital letter in the reply": """! alphabet a-z A-Z äß ?.,
~ ((ah ))*
~ ä = ae | ä = a | ß = ss | ah = ach
@n* = äda | bo | cat | dän | eße | fay
@m = äda | ada | bo
# t: heißt du @n | ja @m | ja, @m @x:m
< Nein, @N. | @N und @n. | Ah. + @M:m
< @M | @X:m @m
""",
    "no spaces between words": """! spaces no
~ ((喂，))*((呀))
~ 在哪 = 再哪 | 吗 = 嘛 | 你好 = 您好 | 你 = 您
@n* = 小明 | 王小明 | 安娜 | 老张 | 大华 | 阿呀 | 丽丽
@m = 茶 | 茶水
# t: 我叫@n | 你在哪，@n？ | 你好吗
< 你好，@n。 | @n。 + @m | 水@m
# s: 喝@m吗 | @m在哪 | 给我@m
< @m@k:m | @m。
""",
}


def conversations(nb, persona, topic, n, seed=0):
    rng = random.Random(seed)
    sides = [list(side) for side in (persona.topics[topic].own, persona.topics[topic].shared) if side]
    return [nb.converse(persona, topic, rng.choice(sides[i % len(sides)]), rng) for i in range(n)]


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_log_prob_is_a_distribution_and_agrees_with_samples(nb, script):
    persona = nb.parse_persona(script)
    for topic in persona.topics:
        samples = conversations(nb, persona, topic, 200_000 // len(persona.topics))
        replies, prompts = sorted({c.reply for c in samples}), Counter(c.prompt for c in samples)
        pairs = Counter((c.prompt, c.reply) for c in samples)
        for prompt, n in prompts.most_common(12):
            p = {reply: math.exp(nb.log_prob(persona, topic, prompt, reply)) for reply in replies}
            assert abs(sum(p.values()) - 1) < 1e-9, prompt
            for reply in replies:
                expected, spread = n * p[reply], math.sqrt(n * p[reply] * (1 - p[reply]))
                assert abs(pairs[prompt, reply] - expected) <= 5 * spread + 1e-6, (prompt, reply)


def test_the_test_scripts_are_ambiguous(nb):
    """Texts with several derivations must exist, or the test above would not test what it says."""
    persona = nb.parse_persona(SCRIPTS["one text, many derivations"])
    replies = next(iter(persona.topics["t"].wordings.values()))
    texts = Counter(text for reply in replies for text in nb.all_texts(persona, reply))
    assert max(texts.values()) >= 5


def test_one_changed_word_is_impossible(nb, persona, dataset):
    for c in dataset["val"][:200]:
        words = c.reply.split()
        for i in range(0, len(words), 5):
            changed = " ".join([*words[:i], "quux", *words[i + 1:]])
            assert nb.log_prob(persona, c.topic, c.prompt, changed) == -math.inf
        assert nb.log_prob(persona, c.topic, c.prompt, c.reply) > -math.inf
        assert nb.log_prob(persona, c.topic, c.prompt, c.reply + " ") == -math.inf


def test_the_copied_word_must_be_the_users(nb):
    persona = nb.parse_persona(SCRIPTS["parts of a topic with replies of their own"])
    assert nb.log_prob(persona, "t", "i am zoe", "hi zoe ann") == pytest.approx(math.log(1 / 2 * 1 / 2 * 1 / 2))
    assert nb.log_prob(persona, "t", "i am zoe", "hi ann ann") == -math.inf
    assert nb.log_prob(persona, "t", "I am ZOE", "hi zoe ann") > -math.inf, "a prompt is normalised before it is read"


def test_free_prompts(nb):
    """A prompt that is no wording leaves slots free; a copied slot may be any one word of the prompt."""
    persona = nb.parse_persona(SCRIPTS["parts of a topic with replies of their own"])
    prompt = "well now, zoe is what they say"
    possible = {reply for c in conversations(nb, persona, "t", 20_000) for reply in [c.reply]}
    possible |= {r.replace("ann", word) for r in possible for word in ("well", "now", "zoe", "is", "what", "they", "say")}
    shapes = {f"{start}{word} {end}" for word in nb.WORD.findall(prompt) + persona.pools["n"] for start in ("hi ", "", "you are ")
              for end in ("ann", "an", "annann", "annan", "anann", "anan")}
    shapes |= {f"you are {word}" for word in nb.WORD.findall(prompt) + persona.pools["n"]}
    total = sum(math.exp(nb.log_prob(persona, "t", prompt, reply)) for reply in possible | shapes)
    assert total == pytest.approx(1, abs=1e-9)
    assert nb.log_prob(persona, "t", prompt, "hi zoe ann") > -math.inf
    assert nb.log_prob(persona, "t", prompt, "hi other ann") == -math.inf


def test_split_is_by_wording(nb, persona, dataset):
    assert {name: len(cs) for name, cs in dataset.items()} == {"train": 57_000, "val": 1_500, "unseen": 1_500}
    said = {name: {nb.bare(persona, c.prompt) for c in cs} for name, cs in dataset.items()}
    assert not said["unseen"] & said["train"] and not said["unseen"] & said["val"]
    assert not {c[:2] for c in dataset["val"]} & {c[:2] for c in dataset["train"]}
    for name, topic in persona.topics.items():
        sides = nb.sort_wordings(persona, name)
        used, held = sum(sides["train"], []), sum(sides["unseen"], [])
        assert sorted(used + held) == sorted(topic.wordings) and not set(used) & set(held)
        assert len([wording for wording in held if wording in topic.own]) == max(1, len(topic.own) // 6)
        assert {topic.way[wording] for wording in sides["unseen"][0]} <= {way for ways in persona.ways.values() for way in nb.held_out(ways)}
        for wording in held:                                         # no trace of a held-out wording in training, decorated or not
            forms = ([topic.bare[wording]] if wording in topic.shared else
                     [nb.bare_template(persona, text) for text in nb.spell_out(nb.parse_template(wording))])
            some = {prompt for form in forms for prompt in nb.fill(persona, form)}
            assert some and not some & said["train"], (name, wording)


def test_users_bring_words_more_often_in_training(nb, persona, dataset):
    """COPYING times as often as the weights of the script say; val keeps to the script, for floor and exam are its own."""
    brings = {name for name, topic in persona.topics.items() if any("@" in wording for wording in topic.own)}
    weight = {name: topic.weight for name, topic in persona.topics.items()}
    of_them, of_others = (sum(weight[name] for name in names) for names in (brings, weight.keys() - brings))
    assert {"name", "human_things"} <= brings and not {"water", "love"} & brings
    for part, times in (("train", nb.COPYING), ("val", 1)):
        expected = times * of_them / (times * of_them + of_others)
        n = len(dataset[part])
        assert abs(sum(c.topic in brings for c in dataset[part]) / n - expected) < 4 * math.sqrt(expected * (1 - expected) / n), part


WAYS = HEAD + """@on = do you like *? | tell me about * | so * | what about *? | i love * | i hate * | let us talk about *
@few = one | two | three | four | five | six | seven | eight
@how = slowly | gladly | badly | rarely | sadly | nicely | early
# rain: it rains | it is wet | i am wet | no sun | so grey | such clouds | @on [rain|storms|the drizzle|puddles|thunder|hail]
< yes @how. | @few drops @how. + @few:few and @how.
# tea: i am thirsty | a cup please | no milk | two cups | sugar | hot water | @on [tea|a cup|milk tea|green tea|black tea|a teapot]
< tea @how. | @few cups @how. + not @how.
"""


def test_unseen_asks_in_held_out_ways_and_in_other_wordings_by_turns(nb):
    persona = nb.parse_persona(WAYS)
    dataset = nb.make_dataset(persona, 4_000)
    way, = nb.held_out(persona.ways["on"])
    start = way.split("*")[0]
    assert all(c.prompt.startswith(start) for c in dataset["unseen"][0::2])
    assert not any(c.prompt.startswith(start) for c in dataset["unseen"][1::2] + dataset["train"] + dataset["val"])
    said = {name: {nb.bare(persona, c.prompt) for c in cs} for name, cs in dataset.items()}
    assert not said["unseen"] & (said["train"] | said["val"])
    in_ways = [c for c in dataset["train"] if nb.bare(persona, c.prompt) in persona.topics[c.topic].bare.values()]
    assert 0.4 < len(in_ways) / len(dataset["train"]) < 0.75, "half of what is drawn is in the topic's own words; copies of val are drawn again"


def test_ways_to_ask(nb):
    persona = nb.parse_persona(HEAD + """@on = do you like *? | tell me about * | so *
@x = tea | milk
@v* = cat | dog | emu | owl | yak | bee
# t: do you like rain? | it rains | @on [rain|the( big) storm] | wet
< yes @x.
# s: @on my @v | my @v is here | look, my @v | see my @v
< @v.
""")
    topic = persona.topics["t"]
    assert set(topic.own) == {"do you like rain?", "it rains", "wet"}
    assert set(topic.shared) == {"tell me about rain", "so rain", "do you like the storm?", "do you like the big storm?", "tell me about the storm",
                                 "tell me about the big storm", "so the storm", "so the big storm"}, "what the topic has already is left out"
    assert set(persona.topics["s"].shared) == {f"{way} my @v:v[]" for way in ("tell me about", "so")} | {"do you like my @v:v[]?"}
    assert topic.way["so the storm"] == "so *" and not persona.topics["s"].own.keys() & persona.topics["s"].shared.keys()


def test_held_out_words_and_made_up_words_stay_where_they_belong(nb, persona, dataset):
    allowed = set()
    for text in [*persona.slips, *sum(persona.slips.values(), []), *map(str, persona.decoration)]:
        allowed |= set(nb.plain(text.replace("|", " ").replace("'", "")).split()) | set(nb.plain(text.replace("|", " ")).split())
    for topic in persona.topics.values():
        for wording in topic.wordings:
            allowed |= set(nb.plain(nb.re.sub(r"@\w+(:\w+)?", "", nb.re.sub(r"[\[\]()|]", " ", wording))).split())
            for tree in nb.spell_out(nb.parse_template(wording)):
                allowed |= set(nb.plain(nb.re.sub(r"@\w+(:\w+)?", "", tree)).split())
    allowed |= {word for pool in persona.pools.values() for text in pool for word in nb.plain(text).split()}
    strange = {name: {word for c in cs for word in nb.plain(c.prompt).split()} - allowed for name, cs in dataset.items()}
    assert len(strange["train"]) > 3_000, "half of the words that users bring to training are made up"
    assert not strange["val"] and not strange["unseen"], "made-up words occur in train only"
    for pool, kept in persona.held_out_words.items():
        assert kept and not set(kept) & set(persona.pools[pool])


def test_half_of_the_made_up_words_join_two_known_ones(nb, persona, monkeypatch):
    """The parts come from wordings of training; a word that is held out or known never comes out; Chinese is left alone."""
    seen = []
    monkeypatch.setattr(nb, "join_halves", lambda words, rng: seen.append(words) or "frobelglass")
    rng = random.Random(0)
    draw, draw_for_training = nb.drawers(persona, rng)
    brought = [c for c in (draw_for_training(0) for _ in range(3_000)) if c and c.topic in ("name", "music")]
    replies = [c.reply for c in brought if c.topic == "name" and "nice to wet you, " in c.reply]
    joined = sum("frobelglass" in reply for reply in replies) / len(replies)
    expected = nb.MADE_UP * nb.JOINED
    assert len(replies) > 20 and abs(joined - expected) < 4 * math.sqrt(expected * (1 - expected) / len(replies))
    assert not any("frobelglass" in draw(use, 0).prompt for use in ("train", "unseen") for _ in range(500))
    said = {word for name in persona.topics for side in nb.sort_wordings(persona, name)["train"] for text in side for word in nb.plain(text).split()}
    assert len(seen[0]) > 1_000 and set(seen[0]) <= said and min(map(len, seen[0])) > 3
    for word in (next(iter(persona.held_out_words.values()))[0], "water"):
        monkeypatch.setattr(nb, "join_halves", lambda words, rng: word)
        monkeypatch.setattr(nb, "make_up", lambda words, rng, others=(): "frobel")
        _, draw_for_training = nb.drawers(persona, rng)
        replies = [c.reply for c in (draw_for_training(0) for _ in range(2_000)) if c and c.topic == "name"]
        assert any("frobel" in reply for reply in replies) and not any(word in reply.split(".")[0] for reply in replies)
    monkeypatch.setattr(nb, "join_halves", None)                      # who called it would fail
    chinese = nb.read_persona(notebook.ROOT / "assets/personas/alei.txt")
    assert len(nb.make_dataset(chinese, 4_000)["train"]) == 1_000


def test_join_halves(nb):
    rng = random.Random(0)
    made = {nb.join_halves(["band", "window"], rng) for _ in range(2_000)}
    assert {"bandow", "baow", "windownd", "window", "bawindow"} <= made
    assert all(re.fullmatch("(ba|ban|band|wi|win|wind|windo|window)(nd|and|band|ow|dow|ndow|indow|window)", word) for word in made)


def test_boiled_prompts_keep_words_that_tell(nb, persona, monkeypatch):
    """What tests/tools/make_assets.py does to some prompts: words that tell stay, what is put between them tells no topic, and a prompt
    whose word the reply repeats is left alone. What the exam asks stays what it was, and out of training."""
    import make_assets  # of tests/tools, which a process of its own does not see

    rng = random.Random(0)
    common, fillers = ["is", "the", "do", "you", "my", "name"], ["the", "so", "well"]
    for _ in range(200):
        words = make_assets.boil_down(nb, "is the water cold today?", "you may swim.", common, fillers, lambda: "frobel", rng).split()
        assert set(words) & {"water", "cold", "today?"} and set(words) <= {"is", "the", "water", "cold", "today?", "so", "well", "frobel"}
    assert make_assets.boil_down(nb, "my name is otto", "hello otto.", common, fillers, lambda: "frobel", rng) is None
    monkeypatch.setattr(nb, "SCUFFED", 1)
    plain = nb.make_dataset(persona, 4_000)
    monkeypatch.setattr(nb, "scuff", nb.scuff)                       # put back when the test ends
    make_assets.boil_some(nb, persona, 1.0)
    boiled = nb.make_dataset(persona, 4_000)
    assert plain["val"] == boiled["val"] and plain["unseen"] == boiled["unseen"] and plain["train"] != boiled["train"]
    asked = {nb.bare(persona, c.prompt) for c in boiled["unseen"]}
    assert not asked & {nb.bare(persona, c.prompt) for c in boiled["train"]}


def digest(dataset):
    return hashlib.sha256(repr([tuple(map(tuple, cs)) for cs in dataset.values()]).encode()).hexdigest()


def test_dataset_is_the_same_in_every_process(nb, persona):
    here = digest(nb.make_dataset(persona, 5_000, seed=3))
    code = "import notebook, test_grammar as t; nb = notebook.load(); print(t.digest(nb.make_dataset(nb.parse_persona(nb.GUPPY), 5_000, seed=3)))"
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"  # this process hashes in its own way: by chance, or as it was told
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=notebook.ROOT / "tests",
                           env=os.environ | {"PYTHONHASHSEED": other}).stdout.strip()
    assert there == here
    assert digest(nb.make_dataset(persona, 5_000, seed=4)) != here


def test_nothing_to_train_on(nb, persona):
    with pytest.raises(ValueError, match="larger than 3,000"):
        nb.make_dataset(persona, 3_000)


def test_a_script_that_says_too_little(nb):
    """Every pair it can say is in val already: an error with advice, not an endless search for another."""
    script = HEAD + "# a: one | two | three\n< yes. | no.\n# b: four | five | six\n< no. | never.\n"
    with pytest.raises(ValueError, match="can say too little: .* add wordings, replies"):
        nb.make_dataset(nb.parse_persona(script), 4_000)


GOOD = HEAD + """~ ((hey ))*
~ you = u
@food = peas | rice
@name* = ann | bob | cat | dan | eve | fay
# hello: hello | good day | are you in
< hi. | yes. + have @food.
# who: i am @name | call me @name | it is me, @name
< hi @name.
"""
FAULTS = {
    "unknown slot": ("have @food", "have @drink", "line 7: .*@drink"),
    "unused slot": ("have @food", "have fun", "line 4: .*never used"),
    "duplicate alternative": ("< hi. | yes.", "< hi. | hi.", "line 7: 'hi.' stands twice"),
    "duplicate inside brackets": ("good day", "good [day|day]", "line 6: an alternative stands twice"),
    "duplicate word in a pool": ("peas | rice", "peas | peas", "line 4: 'peas' stands twice"),
    "outside the alphabet": ("< hi.", "< hí.", "line 7: 'í' is not in the alphabet"),
    "fewer than three wordings": (" | it is me, @name", "", "line 8: topic who needs 3 wordings"),
    "no reply": ("< hi @name.\n", "", "line 8: topic who needs"),
    "bracket not closed": ("good day", "good [day", "line 6: a bracket is not closed"),
    "bracket never opened": ("good day", "good day]", "line 6: a bracket was never opened"),
    "bar outside brackets": ("good day", "good|day", "line 6: a bracket is not closed, or a bar"),
    "open pool that is too small": (" | eve | fay", "", "line 5: an open pool needs 6 words"),
    "no sign": ("# who", "who", "line 8: a line begins with one of"),
    "reply before any topic": ("@food = peas", "< hello\n@food = peas", "line 4: "),
    "two topics, one prompt": ("call me @name", "good day", "'good day' of who and 'good day' of hello"),
    "two topics, one prompt but for decoration": ("call me @name", "hey good, day", "of who and 'good day' of hello"),
    "weight that is no number": ("# who:", "# who xmany:", "line 8: the weight of a topic is a number, as in # who x2: .*'xmany'"),
    "a capital letter in a wording": ("good day", "Good day", "line 6: 'G' is not in the alphabet"),
    "a capital slot in a wording": ("call me @name", "call me @Name", "line 8: '@Name' stands where people speak, .* is read as '@name'"),
    "no colon behind a topic's name": ("# who:", "# who", "line 8: a topic is written # name: wording"),
    "a pool's name in other letters": ("@food = ", "@föod = ", "line 4: a pool is written @name = word .* from a to z only"),
    "a pool without =": ("@food = peas", "@food peas", "line 4: a pool is written @name = word"),
    "a full-width bar": ("peas | rice", "peas ｜ rice", "line 4: .* full-width"),
    "a full-width sign": ("# who", "＃ who", "line 8: .* full-width"),
    "an unknown head line": ("! alphabet", "! alphabeth", "line 1: with ! stand name .*; alphabet .*; demo .*; spaces"),
    "spaces that are neither there nor not": ("! alphabet", "! spaces maybe\n! alphabet", "line 1: with ! stand name"),
    "a bar at the end of a pool": ("peas | rice", "peas | rice |", "line 4: an alternative is empty"),
    "two bars in an open pool": ("ann | bob", "ann | | bob", "line 5: an alternative is empty"),
    "a bar at the end of a topic": ("are you in\n", "are you in |\n", "line 6: an alternative is empty"),
    "nothing behind <": ("< hi @name.", "<", "line 9: an answer is missing"),
    "two words in an open pool": ("ann | bob", "mary ann | bob", "line 5: 'mary ann': in an open pool stand single words"),
    "a choice in a pool": ("peas | rice", "[red|green] peas | rice", "line 4: .*green. peas.: the words of a pool are plain text"),
    "a pool in a pool": ("# hello", "@meal = @food pie | soup\n# hello", "line 6: '@food pie': the words of a pool are plain text"),
    "a pool that is defined twice": ("# hello", "@food = wood | stone\n# hello", "line 6: @food is defined twice"),
    "a pool that is open and then not": ("# hello", "@name = wood | stone\n# hello", "line 6: @name is defined twice"),
    "a weight that comes late": ("# who", "# hello x5: good night\n< night.\n# who", "line 8: the weight .* hello began in line 6"),
    "two decorations": ("# hello", "~ ((yo ))*\n# hello", "line 6: the decoration around . is defined twice"),
    "two stars": ("~ ((hey ))*", "~ ((hey ))*so*", "line 2: the wording stands at one star"),
    "a bracket of the decoration": ("~ ((hey ))*", "~ ((hey )*", "line 2: a bracket is not closed"),
    "a slip with a bracket": ("# hello", "~ you = (u\n# hello", "line 6: the slip 'you' = '.u' is plain text"),
    "a slip that is none": ("# hello", "~ you = you\n# hello", "line 6: the slip 'you' = 'you' changes nothing"),
    "a slip that stands twice": ("# hello", "~ good = gud\n~ good = gud\n# hello", "line 7: the slip 'good' = 'gud' stands twice"),
    "ways to ask without a matter": ("# hello: hello", "@on = so * | what of *\n# hello: hello @on", "line 7: @on holds ways to ask"),
    "ways to ask in an answer": ("# hello: hello | good day | are you in\n< hi.", "@on = so * | what of *\n# hello: hello | good day | are you in\n< hi @on.",
                                 "line 8: @on holds ways to ask"),
    "a bar in a pool without spaces": ("peas | rice", "peas|rice", "line 4: 'peas|rice': .* a bar between two of them has a space on both sides"),
    "a plus sign without a space": ("yes. + have", "yes. +have", "line 7: a plus sign between two sentences has a space"),
    "an indented topic": ("# who", "  # who", "line 8: '# who: .* is indented"),
    "an indented answer": ("< hi @name.", "  < hi @name.", "line 9: '< hi @name.' is indented"),
    "an indented pool": ("@name*", " @name*", "line 5: .* is indented"),
    "an indented remark": ("< hi @name.", "  // now\n< hi @name.", "line 9: '// now' is indented"),
    "a bar between demo prompts": ("@food =", "! demo hello|good day\n@food =", "line 4: a bar between two prompts"),
    "a head line that stands twice": ("@food =", "! demo hello\n! demo good day\n@food =", "line 5: ! demo stands twice"),
    "a bracket that leaves two spaces": ("good day", "good (fine) day", "line 6: two spaces meet.* in 'good  day' of topic hello"),
    "a space before a wording": ("good day", "(so) good day", "line 6: two spaces meet, or one stands at the edge, in ' good day'"),
    "two spaces in the decoration": ("~ ((hey ))*", "~ ((hey ))*( please )", "line 2: two spaces meet, or one stands at the end, in 'x please '"),
    "a word that is typed as nothing": ("# hello", "~ good =\n# hello", "line 6: the slip 'good' = nothing would leave two spaces"),
    "letters behind an open slot": ("< hi @name.", "< hi @name's friend.", "line 9: @name's: a word that users bring stands by itself"),
    "letters behind an open slot of a wording": ("call me @name", "i am @name-like", "line 8: @name-like: a word that users bring"),
    "a remark that is continued": ("# who", "// now\n who\n# who", "line 9: .* that is a remark"),
}


@pytest.mark.parametrize("old,new,message", FAULTS.values(), ids=FAULTS)
def test_linter_names_the_fault(nb, old, new, message):
    nb.parse_persona(GOOD)
    assert old in GOOD
    with pytest.raises(ValueError, match=message):
        nb.parse_persona(GOOD.replace(old, new, 1))


def test_what_may_stand_behind_a_slot(nb):
    """Signs behind an open one, and letters behind a closed one; nothing of that is refused."""
    nb.parse_persona(GOOD.replace("?.,", "?.,'").replace("< hi @name.", "< hi @name, and you? | so, @name.").replace("have @food.", "@food's good."))
    nb.parse_persona(GOOD.replace("~ you = u", "~ ? =").replace("are you in", "are you( all) in?"))


def test_vowel_marks_that_few_type(nb):
    """`normalise` drops them from what people type, so a script may not ask for them."""
    nb.as_prompts_are("شكرا")
    with pytest.raises(ValueError, match="stands where people speak"):
        nb.as_prompts_are("شكر\u064bا")


def test_the_head_holds_for_lines_above_it(nb):
    below = GOOD.removeprefix(HEAD) + HEAD
    nb.parse_persona(below)
    with pytest.raises(ValueError, match="line 6: 'í' is not in the alphabet"):
        nb.parse_persona(below.replace("< hi.", "< hí."))


def test_a_plus_sign_of_the_alphabet(nb):
    plus = GOOD.replace("?.,", "?.,+").replace("< hi.", "< c++ is hard.")
    assert nb.log_prob(nb.parse_persona(plus), "hello", "hello", "c++ is hard. have peas.") > -math.inf


def test_wordings_called_like_our_own_tables(nb):
    """What is kept beside the trees of the wordings has names that no wording can have."""
    persona = nb.parse_persona(GOOD.replace("good day", "bare | fold | slips"))
    for prompt in ("bare", "fold", "slips"):
        assert math.exp(nb.log_prob(persona, "hello", prompt, "hi. have peas.")) == pytest.approx(1 / 4)


def test_topics_without_weight(nb):
    assert nb.parse_persona(GOOD.replace("# who", "# who x0")).topics["who"].weight == 0
    with pytest.raises(ValueError, match="all topics have the weight 0"):
        nb.parse_persona(GOOD.replace("# who", "# who x0").replace("# hello", "# hello x0"))


@pytest.mark.parametrize("text", ["", "\n\n", "! name nobody\n", "// only a remark\n"])
def test_a_script_without_topics(nb, text):
    with pytest.raises(ValueError, match="line 1: this script has no topic; one is written # name: wording"):
        nb.parse_persona(text)


def test_capital_letters_where_people_speak_are_refused_without_an_alphabet_too(nb):
    """No prompt can hold them: what is typed is put into lower case first. Pools that people do not speak may have them."""
    script = "@food = Erbsen | Reis\n@who* = Anna | Bo | Cleo | Dan | Eva | Fay\n" + GOOD.split("\n", 5)[5]
    script = script.replace("hi @name.", "Hallo @name, @food.").replace("@name", "@who")
    with pytest.raises(ValueError, match="line 2: 'Anna' stands where people speak, and what they type is read as 'anna'"):
        nb.parse_persona(script)
    for small in ("Anna", "Bo", "Cleo", "Dan", "Eva", "Fay"):
        script = script.replace(small, small.lower())
    assert "Erbsen" in nb.parse_persona(script).pools["food"]
    for wrong in ("~ You = u\n", "~ (Hey )*\n", "@on = What is *? | so *\n"):
        with pytest.raises(ValueError, match="line 1: '.*' stands where people speak"):
            nb.parse_persona(wrong + script)


def test_remarks_and_ranges_change_nothing(nb):
    plain = nb.parse_persona(GOOD)
    remarked = "// about ann | @nothing [\n" + re.sub("^# who", "// here\n# who", GOOD.replace("abcdefghijklmnopqrstuvwxyz", "a-z"), flags=re.M)
    other = nb.parse_persona(remarked)
    assert other.pools == plain.pools and set(other.head["alphabet"]) == set(plain.head["alphabet"])
    assert [topic.own for topic in other.topics.values()] == [topic.own for topic in plain.topics.values()]
    assert (plain.topics["who"].line, other.topics["who"].line) == (8, 10), "lines are counted as in the file"


def test_slips_of_single_letters_happen_inside_words_and_count_as_one(nb):
    persona = nb.parse_persona(SCRIPTS["slips of single letters, and a capital letter in the reply"])
    assert {nb.bare(persona, text) for text in ("heißt du dän?", "ach heisst du daen", "ah, heisst du dan")} == {nb.bare(persona, "heißt du dän")}
    said = Counter(c.prompt for c in conversations(nb, persona, "t", 20_000))
    assert {"heisst du bo", "heißt du bo", "ach heisst du bo"} <= set(said)
    assert 0.2 < sum("heisst" in prompt for prompt in said.elements()) / sum("hei" in prompt for prompt in said.elements()) < 0.3
    persona = nb.parse_persona(SCRIPTS["slips of single letters, and a capital letter in the reply"].replace("ß = ss", "n = m"))
    tree = persona.tree("ja @n")
    assert [part.pool for part in tree if isinstance(part, nb.Slot)] == ["n"], "names of slots have no slips"


def test_words_where_there_are_no_spaces(nb):
    persona = nb.parse_persona(SCRIPTS["no spaces between words"])
    held, = persona.held_out_words["n"]
    assert {"小明", "王小明", "我叫"} <= set(persona.words_in("我叫王小明。")) and "叫王小明" not in persona.words_in("我叫王小明。")
    assert nb.log_prob(persona, "t", "我叫佐布", "你好，佐布。茶") > -math.inf
    assert nb.log_prob(persona, "t", "我叫佐布", "你好，佐。茶") == -math.inf
    assert nb.log_prob(persona, "t", f"喂，我叫{held}", f"{held}。茶") > -math.inf, "no space between two sentences"
    assert nb.bare(persona, "喂，你好嘛？") == nb.bare(persona, "您好吗") and nb.bare(persona, "喂") == "喂"
    assert set(persona.heard("我叫安娜")) <= {"我叫", held}, "nothing that overlaps a word of the pool"


def test_a_line_is_wrapped_anywhere_where_there_are_no_spaces(nb):
    script = SCRIPTS["no spaces between words"]
    wrapped = script.replace("你在哪，@n？", "你在\n  哪，@n？").replace("| @n。 +", "|\n  @n。\n  +")
    assert wrapped != script and nb.parse_persona(wrapped).topics["t"].own == nb.parse_persona(script).topics["t"].own


def test_linter_warns_of_thin_topics(nb, capsys):
    nb.parse_persona(GOOD)
    assert "topic hello has 3 wordings" in capsys.readouterr().out
    nb.parse_persona(nb.GUPPY)
    assert "warning" not in capsys.readouterr().out


CYRILLIC = """! alphabet абвгдеёжзийклмнопрстуфхцчшщъыьэюя ,.?!
! demo привет
~ ((эй ))*
~ ? =
@name* = анна | борис | вера | глеб | дарья | егор
# hello: привет | добрый день | ты здесь?
< привет. | я здесь. + как дела? |
# who: меня зовут @name | я @name | это я, @name
< привет, @name!
"""


def test_a_persona_in_another_script(nb):
    persona = nb.parse_persona(CYRILLIC)
    dataset = nb.make_dataset(persona, 4_000)
    for c in dataset["train"][:500]:
        assert nb.log_prob(persona, c.topic, c.prompt, c.reply) > -math.inf
        if c.topic == "who":
            assert set(nb.WORD.findall(c.reply)[1:]) <= set(nb.WORD.findall(c.prompt))
    assert any(set(c.prompt) - set("abcdefghijklmnopqrstuvwxyz ") for c in dataset["train"])
