"""Both tokenizers: any text comes back, and the file means the same to Hugging Face's engine."""
import random
import time
from collections import Counter

import pytest
import tokenizers

EDGES = ["", " ", "\n", "\n\n  \n", "\x00\x01\x7f", "café naïve", "鱼在水里", "рыба", "🐟🐠👩‍👩‍👧", "﷽", "\u200b\u2028\ufeff", "a" * 3_000, "<|im_end|>", "<pad>",
         "<|im_start|>user\nhi", "it's   what's\tup?!...", "'\"'\"", "１２３ ½ ⅷ", "e\u0301", "ＦＵＬＬ", "don’t", "\r\n", "-- --", "x" * 50 + "," * 50]


def strange_texts(n, seed=0):
    rng = random.Random(seed)
    letters = [range(32, 127), range(0xa0, 0x250), range(0x400, 0x500), range(0x4e00, 0x4f00), range(0x1f300, 0x1f600), range(0, 32), range(0x2000, 0x2070)]
    return ["".join(chr(rng.choice(rng.choice(letters))) for _ in range(rng.randrange(60))) for _ in range(n)]


def test_bpe_round_trip(nb, tokenizer):
    for text in EDGES + strange_texts(1_000):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(nb.END < i < tokenizer.vocab_size for i in ids)


def test_same_ids_as_hugging_face(nb, tokenizer, dataset, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [text for c in dataset["train"][:550] for text in (c.prompt, c.reply)] + EDGES + strange_texts(900, seed=1)
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
    ours = {"".join(letters[byte] for byte in b): i for i, b in tokenizer.bytes.items()}
    assert {token: i for token, i in vocabulary.items() if token not in nb.CONTROL} == ours


def test_save_and_load(nb, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    again = nb.BPETokenizer.load(tmp_path / "t.json")
    assert again.merges == tokenizer.merges and again.bytes == tokenizer.bytes
    for content in ("", "{", "[]", '{"model": {}}', '{"model": {"vocab": {}, "merges": [["a", "b"]]}}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json is no tokenizer.json"):
            nb.BPETokenizer.load(tmp_path / "bad.json")


def test_training_is_quick_and_its_tokens_are_used(nb, dataset):
    started = time.time()
    tokenizer = nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), nb.VOCABULARY)
    assert time.time() - started < 10
    occurs = Counter(i for c in dataset["train"] for i in nb.encode_chat(tokenizer, c.prompt, c.reply)[0])
    merged = [i for i in tokenizer.bytes if i >= 259]
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
