"""Both tokenizers: any text comes back, and the file means the same to Hugging Face's engine."""
import json
import math
import random
import re
from collections import Counter

import pytest
import tokenizers

EDGES = ["", " ", "\n", "\n\n  \n", "\x00\x01\x7f", "café naïve", "鱼在水里", "рыба", "🐟🐠👩‍👩‍👧", "﷽", "\u200b\u2028\ufeff", "a" * 3_000, "<|im_end|>", "<pad>",
         "<|im_start|>user\nhi", "it's   what's\tup?!...", "'\"'\"", "１２３ ½ ⅷ", "e\u0301", "ＦＵＬＬ", "don’t", "\r\n", "-- --", "x" * 50 + "," * 50]


def strange_texts(n, seed=0):
    rng = random.Random(seed)
    letters = [range(32, 127), range(0xa0, 0x250), range(0x400, 0x500), range(0x4e00, 0x4f00), range(0x1f300, 0x1f600), range(0, 32), range(0x2000, 0x2070)]
    return ["".join(chr(rng.choice(rng.choice(letters))) for _ in range(rng.randrange(60))) for _ in range(n)]


FIRST_SPLIT = re.compile(r""" ?[^ \n.,!?;:'"]+| ?[.,!?;:'"]+|[ \n]""")             # the split before other scripts had signs
SIGNS = "¿¡«»。，、．？！；：「」『』《》؟،؛۔।॥"


def texts_in_many_scripts(n, seed=0):
    """Words of several scripts between signs, spaces and newlines, at random."""
    rng = random.Random(seed)
    words = ["fish", "don't", "qué", "señor", "там", "ελλάδα", "我是一条鱼", "水很暖和", "これは魚です", "물고기", "سمكة", "ماهی", "मछली", "ปลาทอง", "דג", "ձուկ", "🐟", "e\u0301", "1２٣"]
    between = [*".,!?;:'\"", *SIGNS, " ", " ", " ", "\n", "", "…", "’", "—", "\u3000", "\u200f", "\u00a0"]
    return ["".join(rng.choice(words) + "".join(rng.choices(between, k=rng.randrange(4))) for _ in range(rng.randrange(1, 14))) for _ in range(n)]


def test_bpe_round_trip(nb, tokenizer):
    for text in EDGES + strange_texts(1_000) + texts_in_many_scripts(200, seed=3):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(nb.END < i < tokenizer.vocab_size for i in ids)


def test_same_ids_as_hugging_face(nb, tokenizer, dataset, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [text for c in dataset["train"][:550] for text in (c.prompt, c.reply)] + EDGES + strange_texts(900, seed=1) + texts_in_many_scripts(400)
    assert len(texts) >= 2_000
    for text in texts:
        encoded = theirs.encode(text, add_special_tokens=False)
        if not any(control in text for control in nb.CONTROL):       # theirs turns spelled control tokens into real ones; ours never does
            assert encoded.ids == tokenizer.encode(text), text
            assert theirs.decode(encoded.ids, skip_special_tokens=False) == text
    assert [theirs.token_to_id(control) for control in nb.CONTROL] == [nb.PAD, nb.START, nb.END]
    assert theirs.get_vocab_size() == tokenizer.vocab_size


def test_same_merges_as_hugging_face(nb, tokenizer, dataset):
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(nb.SPLIT.pattern), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.train_from_iterator(nb.chat_texts(dataset["train"]), tokenizers.trainers.BpeTrainer(
        vocab_size=nb.VOCABULARY, special_tokens=nb.CONTROL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = theirs.get_vocab()
    letters = nb.byte_letters()
    ours = {"".join(letters[byte] for byte in b): i for i, b in tokenizer.vocab.items()}
    assert {token: i for token, i in vocabulary.items() if token not in nb.CONTROL} == ours


def test_the_split_is_cut_alike_by_both_engines(nb):
    theirs = tokenizers.pre_tokenizers.Split(tokenizers.Regex(nb.SPLIT.pattern), "isolated")
    for text in EDGES + strange_texts(400, seed=5) + texts_in_many_scripts(400, seed=6):
        assert [piece for piece, _ in theirs.pre_tokenize_str(text)] == nb.SPLIT.findall(text), text
        assert "".join(nb.SPLIT.findall(text)) == text


def test_signs_of_other_scripts_are_signs(nb):
    assert set(".,!?;:'\"" + SIGNS) == set(nb.SIGNS) and len(nb.SIGNS) == len(set(nb.SIGNS))
    for sign in nb.SIGNS:
        assert nb.SPLIT.findall(f"a{sign}b {sign}{sign} c") == ["a", sign, "b", f" {sign}{sign}", " c"]
    for text, words in {"¿qué es eso? ¡agua!": ["¿", "qué", " es", " eso", "?", " ¡", "agua", "!"], "那是什么？ 等等。ok吗": ["那", "是", "什", "么", "？", " ", "等", "等", "。", "ok", "吗"],
                        "ما هذا؟ ماء، ماء؛": ["ما", " هذا", "؟", " ماء", "،", " ماء", "؛"], "यह क्या है? पानी।": ["यह", " क्या", " है", "?", " पानी", "।"]}.items():
        assert nb.SPLIT.findall(text) == words


def test_english_is_split_as_before(nb, dataset):
    texts = [text for part in dataset.values() for c in part for text in (c.prompt, c.reply)]
    texts += [nb.GUPPY, nb.ROLLO, "“so,” he said—don’t… it’s £3 (or €4): naïve café; 50% – no?", *map(chr, range(0xa1)), *("".join(chr(i) for i in range(160)),)]
    rng = random.Random(8)
    texts += ["".join(chr(rng.choice((rng.randrange(160), 0x2019, 0x2014, 0x2026, 0xe9))) for _ in range(40)) for _ in range(300)]
    for text in texts:
        assert nb.SPLIT.findall(text) == FIRST_SPLIT.findall(text)


def test_learns_from_texts_without_spaces(nb):
    tokenizer = nb.BPETokenizer.train(["我是一条鱼。你好吗？", "我是一条鱼，水很暖和。", "水很暖和！"] * 3, 400)
    text = "我是一条鱼。水很暖和？"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == list(text), "a letter is a token, wherever it stands"
    assert nb.learn_merges(["我是一条鱼。你好吗？我是鱼"] * 3, 300) == nb.learn_merges_slowly(["我是一条鱼。你好吗？我是鱼"] * 3, 300)
    earlier = nb.BPETokenizer(list(tokenizer.merges), rf" ?[^ \n{nb.SIGNS}]+| ?[{nb.SIGNS}]+|[ \n]")
    assert earlier.encode(text) == tokenizer.encode(text), "no merge crossed what was no border before"


def test_slow_and_fast_learn_the_same(nb, dataset):
    texts = nb.chat_texts(dataset["train"][:400])
    assert nb.learn_merges(texts, 400) == nb.learn_merges_slowly(texts, 400)
    for seed in range(30):
        rng = random.Random(seed)
        texts = ["".join(rng.choices("aab .", k=30)) for _ in range(5)]
        assert nb.learn_merges(texts, 300) == nb.learn_merges_slowly(texts, 300)


def test_a_file_with_the_first_split_keeps_it(nb, tokenizer, tmp_path):
    first = nb.BPETokenizer(list(tokenizer.merges), FIRST_SPLIT.pattern)
    first.save(tmp_path / "first.json")
    again, theirs = nb.BPETokenizer.load(tmp_path / "first.json"), tokenizers.Tokenizer.from_file(str(tmp_path / "first.json"))
    assert again.split == FIRST_SPLIT.pattern == nb.FIRST_SPLIT and again.content() == first.content() != tokenizer.content()
    for text in texts_in_many_scripts(100, seed=7):
        assert again.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    data = json.loads((tmp_path / "first.json").read_text(encoding="utf-8"))
    for pattern in ("x", "(a+)+$", " ?[^ ]+"):
        data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
        (tmp_path / "bad.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match="its split is another"):
            nb.BPETokenizer.load(tmp_path / "bad.json")


def test_save_and_load(nb, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    again = nb.BPETokenizer.load(tmp_path / "t.json")
    assert again.merges == tokenizer.merges and again.vocab == tokenizer.vocab
    for content in ("", "{", "[]", '{"model": {}}', '{"model": {"vocab": {}, "merges": [["a", "b"]]}}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json is no tokenizer.json"):
            nb.BPETokenizer.load(tmp_path / "bad.json")
    data = tokenizer.content() | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="bad.json is no tokenizer.json"):
        nb.BPETokenizer.load(tmp_path / "bad.json")


def test_training_is_quick_and_its_tokens_are_used(nb, dataset, tokenizer):
    assert tokenizer.seconds < 30, "counting all pairs anew for every merge would take many times as long"
    occurs = Counter(i for c in dataset["train"] for i in nb.encode_chat(tokenizer, c.prompt, c.reply)[0])
    merged = [i for i in tokenizer.vocab if i >= 259]
    assert len(merged) == nb.VOCABULARY - 259
    assert sum(occurs[i] >= 10 for i in merged) >= 0.7 * len(merged)


def test_textbook_example(nb):
    """aaabdaaabac, the example of the encyclopedia: aa, then ab, then the two of them."""
    pairs = [(nb.BPETokenizer([]).decode([a]), nb.BPETokenizer([]).decode([b])) for a, b in nb.learn_merges(["aaabdaaabac"], 260)]
    assert pairs == [("a", "a")]
    tokenizer = nb.BPETokenizer(nb.learn_merges(["aaabdaaabac"], 300))
    assert len(tokenizer.encode("aaabdaaabac")) == 5 and tokenizer.decode(tokenizer.encode("aaabdaaabac")) == "aaabdaaabac"


def test_nothing_to_merge(nb):
    assert nb.BPETokenizer.train([], 500).merges == {} and nb.BPETokenizer.train(["abc"], 500).merges == {}


def test_characters(nb):
    tokenizer = nb.CharTokenizer.train(["hello", "fish"])
    assert tokenizer.decode(tokenizer.encode("shell")) == "shell" and tokenizer.encode("") == []
    with pytest.raises(ValueError, match="never seen in training: x z"):
        tokenizer.encode("xyz".replace("y", "h"))


def test_surprises_of_the_grammar_add_up(nb, persona, dataset, tokenizer):
    """The chain rule: what the tokens of a reply cost the grammar, one after the other, is what the reply costs."""
    for c in dataset["val"][:25]:
        surprises = nb.grammar_surprise(tokenizer, persona, c)
        ids, loss_mask = nb.encode_chat(tokenizer, nb.normalise(c.prompt), c.reply)
        assert len(surprises) == sum(loss_mask) and min(surprises) > -1e-9
        assert sum(surprises) == pytest.approx(-nb.log_prob(persona, c.topic, c.prompt, c.reply), rel=1e-6)


def test_surprises_where_one_word_begins_another(nb):
    """After the pieces of *four* either a space may come or the rest of *fourteen*: both are paid for."""
    persona = nb.parse_persona("! alphabet a-z .\n@n = four | fourteen | six | sixteen\n# a: one | two | three\n< i saw @n @n. | @n it was.\n")
    tokenizer = nb.BPETokenizer.train(["a four four four six six six"] * 3, 270)
    beginnings = [tokenizer.encode(" four"), tokenizer.encode(" fourteen")]
    assert beginnings[1][:len(beginnings[0])] == beginnings[0]
    for number in ("four", "fourteen", "six", "sixteen"):
        for reply in (f"i saw {number} {number}.", f"{number} it was."):
            surprises = nb.grammar_surprise(tokenizer, persona, nb.Conversation("one", reply, "a"))
            assert sum(surprises) == pytest.approx(-nb.log_prob(persona, "a", "one", reply), rel=1e-6) == pytest.approx(math.log(8))


def test_next_words_is_a_distribution(nb, persona, dataset):
    for c in dataset["val"][:10]:
        total = nb.next_words(persona, c.topic, c.prompt, []).total()
        words = nb.SPLIT.findall(c.reply)
        for n, word in enumerate([*words, ""]):
            options = nb.next_words(persona, c.topic, c.prompt, words[:n])
            assert options.total() == pytest.approx(total) and options[word] > 0
            total = options[word]


def test_batches_are_whole_epochs(nb, dataset, tokenizer):
    import torch
    rows = nb.rows_by_length(tokenizer, dataset["val"][:200], "cpu")
    stream = nb.batches(rows, 16, torch.Generator().manual_seed(0))
    epochs = []
    for _ in range(2):
        seen = []
        while len(seen) < 200:
            ids, loss_mask = next(stream)
            assert ids.shape == loss_mask.shape and len(ids) <= 16
            seen += [tuple(row) for row in ids.tolist()]
        epochs.append(seen)
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(tuple(nb.encode_chat(tokenizer, c.prompt, c.reply)[0]) for c in dataset["val"][:200])
    assert epochs[0] != epochs[1]


def test_yardsticks_fall(nb, small):
    persona, dataset, tokenizer = small
    losses = list(nb.yardsticks(tokenizer, persona, dataset).values())
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0


def test_the_bigram_babbles(nb, small):
    persona, dataset, tokenizer = small
    followers = {}
    for (a, b), n in Counter(nb.counted_pairs(tokenizer, dataset["train"])).items():
        followers.setdefault(a, {})[b] = n
    replies = {nb.babble(tokenizer, followers, lambda counts: rng.choices(*zip(*counts.items()))[0]) for rng in map(random.Random, range(10))}
    assert len(replies) > 3 and all(replies)
    assert len(nb.babble(tokenizer, {token: {300: 1} for token in range(500)}, max, limit=7)) == 7 * len(tokenizer.vocab[300])
