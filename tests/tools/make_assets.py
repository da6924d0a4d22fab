"""Train the fish that the repository gives away, examine it, and write it where others find it.

python tests/tools/make_assets.py                          trains `full` (4,000 steps), rounds to float16, examines, and writes
                                                           assets/pretrained/ and assets/guppy.html
python tests/tools/make_assets.py --fish out/guppy         the same with the fish that a run of the notebook has saved
python tests/tools/make_assets.py --fish out/guppy --more 1500   the same after so many more steps, from half the rate down to 0
    ... --more 4000 --rows 240000                          these steps on more conversations: the notebook's 60,000, and others
    ... --more 7000 --rows 690000 --skip 237000            the same without the first 237,000 to train on, which it has met
    ... --more 5500 --rows 355000 --scuffed 0.6            the same with six in ten prompts typed in a hurry; these are other ones
    ... --more 3500 --rows 228000 --scuffed 0.7 --boiled 0.5   the same; of half of those only the telling words stay (boil_down)
    ... --more 4000 --rows 260000 --wordings 0.5   the same; half of the prompts to train on come from assets/wordings.tsv
    ... --more 9500 --rows 400000 --wordings 0.7 --lost 0.3 --short --rate 0.001   the same; see `mixed_in`
    ... --more 4600 --rows 560000 --joined 0.5 --copying 2   the same; see `joined_words`, `more_copying`
    ... --more 4500 --rows 385000 --strange 0.03   the same; see `strange_letters`
    ... --average old/a old/b                              with --fish: the mean of its weights and those of other fish on its way
    ... --blind                                            the card also gives the blind half of the free prompts
python tests/tools/make_assets.py --steps 60 --out out/x   the same, quickly and elsewhere, to see that it works

A run that is cut short goes on from its checkpoint in out/. The trained fish stays in out/full, and is used again while script, recipe
and model are the same; --again trains anew. fingerprint.json says what the assets were made of: tests/test_pretrained.py
recomputes it, so that assets that no longer fit the notebook show.
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import json
import math
import random
import re
import sys
import unicodedata
import zlib
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
import notebook
import torch

STOPPED = " ..."                                                     # ends a reply of which only the beginning is learned
WORDINGS = notebook.ROOT / "assets/wordings.tsv"
PROMPT = "hello guppy, what do you eat?"
UNREAD = {"blind": "free, blind half", "fresh": "free, fresh"}       # free prompts that nobody reads: their files, their rows on the card


def fingerprint(nb, model, tokenizer):
    """What a fish is made of: the script, the tokenizer and the configuration, and the logits after one fixed prompt."""
    ids = nb.encode_chat(tokenizer, nb.normalise(PROMPT))[0]
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=model.device))[0, -1].cpu()
    return {"script": digest(nb.GUPPY), "tokenizer": digest(json.dumps(tokenizer.content(), sort_keys=True)), "config": asdict(model.config),
            "prompt": PROMPT, "ids": ids, "logits": [round(x, 4) for x in logits.tolist()]}


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_weights(model):
    return hashlib.sha256(b"".join(p.cpu().numpy().tobytes() for p in model.state_dict().values())).hexdigest()[:12]


def boil_down(nb, prompt, reply, common, fillers, made_up, rng):
    """The words of a prompt that tell its topic, or some of them, in any order, between words that tell none.

    None where the reply repeats one of them: a name means nothing without "my name is". made_up() gives an unknown word."""
    telling = [word for word in prompt.split() if nb.plain(word) not in common or rng.random() < 0.2]
    if not telling or {nb.plain(word) for word in telling} & set(nb.WORD.findall(reply)) - set(common):
        return None
    telling = rng.sample(telling, rng.randint(len(telling) * 2 // 3 or 1, len(telling)))
    words = telling + [rng.choice(fillers) if rng.random() < 0.85 else made_up() for _ in range(rng.randint(0, 8))]
    return nb.normalise(" ".join(rng.sample(words, len(words))))


def boil_some(nb, persona, boiled):
    """From now on `scuff` boils down this share of the prompts that it gets."""
    fillers = nb.common_words([nb.sort_wordings(persona, name)["train"] for name in persona.topics], 1 / 10)
    scuff = nb.scuff

    def scuff_or_boil(prompt, spared, common, made_up, rng):
        text = boil_down(nb, prompt, spared, common, fillers, made_up, rng) if rng.random() < boiled else None
        return text or scuff(prompt, spared, common, made_up, rng)

    nb.scuff = scuff_or_boil


def read_wordings(nb, persona, *paths):
    """(persona that also knows the wordings of these files, {topic: its wordings}). Each line is a topic, a tab and a wording in the
    notation of the script. It has the replies of the topic's first wording with the same slots. Raises ValueError where there is none."""
    wider, wordings = copy.copy(persona), {name: [] for name in persona.topics}
    wider.topics = {name: replace(topic, own=dict(topic.own), index={}) for name, topic in persona.topics.items()}
    for path in paths or (WORDINGS,):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            name, _, wording = line.partition("\t")
            own = persona.topics[name].own if wording and name in wordings else {}
            like = next((text for text in own if re.findall(nb.SLOT, text) == re.findall(nb.SLOT, wording)), None)
            if like is None:
                raise ValueError(f"{path.name}, line {number}: {name!r} has no wording with the slots of {wording!r}")
            wider.topics[name].own[wording] = own[like]
            wordings[name].append(wording)
    return wider, wordings


@contextlib.contextmanager
def replaced(nb, name, function):
    """While it is open, the notebook calls function(what stands under this name, *arguments) in its place."""
    own = getattr(nb, name)
    setattr(nb, name, functools.partial(function, own))
    try:
        yield
    finally:
        setattr(nb, name, own)                                       # the exam asks with words of its own


def mixed_in(nb, wider, wordings, share, lost=0.0, short=False):
    """While it is open, this share of the prompts to train on is in one of these wordings; those of val and unseen are not.

    lost: the share of these prompts that are without some of their words (of each word one in four, but what the reply repeats stays).
    short: their replies stop after the first sentence (of 12 letters at least), where the topic shows (see `stopped`)."""
    def converse_wider(converse, persona, topic, wording, rng, draw_user_word=None):
        if not (share and draw_user_word and wordings[topic] and rng.random() < share):
            return converse(persona, topic, wording, rng, draw_user_word)
        c = converse(wider, topic, rng.choice(wordings[topic]), rng, draw_user_word)
        if lost and rng.random() < lost:
            said = set(nb.WORD.findall(c.reply))
            words = [word for word in c.prompt.split() if said & set(nb.WORD.findall(word)) or rng.random() < 0.75]
            c = c._replace(prompt=" ".join(words) or c.prompt)
        return c._replace(reply=re.match("(.{12,}?[.!?](?= )|.*)", c.reply)[0] + STOPPED) if short else c
    return replaced(nb, "converse", converse_wider)


def joined_words(nb, persona, wordings, share):
    """While it is open, this share of the made-up words is the beginning of one word and the end of another: "hourglass", not "gelso".

    Such words look like those of other topics, as real unknown words do. The words are those of all prompts to train on. Words that are held
    out for the exam, and the unknown things of measure.py, are never joined."""
    texts = [text for name in persona.topics for side in nb.sort_wordings(persona, name)["train"] for text in side]
    texts += [text for own in wordings.values() for text in own]
    words = sorted({word for text in texts for word in nb.plain(re.sub(r"@\w+(:\w+)?", "", text)).split() if len(word) > 3 and word.isalpha()})
    asked = {*measure.WORDS, *(word for pool in persona.held_out_words.values() for word in pool)}

    def make_up_or_join(make_up, known, rng, others=()):
        if rng.random() < share:
            first, last = rng.choice(words), rng.choice(words)
            word = first[:rng.randint(2, len(first))] + last[rng.randint(0, len(last) - 2):]
            if len(word) <= 14 and word not in asked:
                return word
        return make_up(known, rng, others)
    return replaced(nb, "make_up", make_up_or_join)


def strange_letters(nb, share):
    """While it is open, this share of the prompts to train on holds letters, numbers or signs from anywhere in Unicode, between its words.

    One in four of them holds nothing else, if no reply of the topic repeats a word. The replies stay as they are: so the fish learns to say nothing of what it
    cannot read. The signs that measure.py asks with are never drawn."""
    signs = {}
    for sign in map(chr, range(0xa1, 0x1fb00)):
        if unicodedata.category(sign)[0] in "LNS" and nb.normalise(sign) == sign and sign not in "".join(measure.ODD):
            signs.setdefault(unicodedata.category(sign), []).append(sign)
    kinds = sorted(signs)

    def converse_strangely(converse, persona, topic, wording, rng, draw_user_word=None):
        c = converse(persona, topic, wording, rng, draw_user_word)
        if not (share and draw_user_word and rng.random() < share):
            return c
        some = [" " * rng.randint(0, 1) + rng.choice(signs[rng.choice(kinds)]) for _ in range(rng.randint(1, 3))]
        repeats = any("@" in own for own in persona.topics[topic].own)
        words = c.prompt.split() if repeats or rng.random() < 0.75 else []
        place = rng.randint(0, len(words))
        return c._replace(prompt=nb.normalise(" ".join([*words[:place], "".join(some).strip(), *words[place:]])))
    return replaced(nb, "converse", converse_strangely)


def more_copying(nb, rows, times, rng):
    """The conversations whose reply repeats a rare word of the prompt, and of the others one in `times`."""
    counted = Counter(word for c in rows for word in set(nb.WORD.findall(c.reply)))
    rare = {word for word, n in counted.items() if n < max(2, len(rows) / 1000)}
    return [c for c in rows if rare & set(nb.WORD.findall(c.prompt)) & set(nb.WORD.findall(c.reply)) or rng.random() < 1 / times]


def stopped(encode_chat, tokenizer, prompt, reply=None):
    """encode_chat; a reply that ends with STOPPED is a beginning: it has no end token, so nothing is learned of what comes after it."""
    ids, loss_mask = encode_chat(tokenizer, prompt, reply and reply.removesuffix(STOPPED))
    return (ids[:-1], loss_mask[:-1]) if reply and reply.endswith(STOPPED) else (ids, loss_mask)


def later(history, before):
    """The entries of a second training, counted on from the end of the first."""
    end = before[-1] if before else {"step": 0, "tokens": 0, "seconds": 0.0}
    return [entry | {key: entry[key] + end[key] for key in end if key in ("step", "tokens", "seconds")} for entry in history]


def mean_of(model, others, tokenizer):
    """The model, with the mean of its weights and those of `others`, [(model, tokenizer)]: fish that one training passed on its way
    understand more together (Izmailov et al. 2018, arXiv 1803.05407). Raises ValueError where a tokenizer is another."""
    if any(theirs.content() != tokenizer.content() for _, theirs in others):
        raise ValueError("only fish with the same tokenizer can be averaged")
    weights = [fish.state_dict() for fish in (model, *(fish for fish, _ in others))]
    model.load_state_dict({name: sum(each[name] for each in weights) / len(weights) for name in weights[0]})
    return model


def examine(nb, model, tokenizer, persona, dataset, n=500):
    """(scores, ceiling): the shares of the model, and those of the grammar with its own replies to the same questions."""
    questions = nb.exam_questions(persona, dataset, n, nb.SEED)
    replies = nb.answers(model, tokenizer, questions, nb.SEED)
    own = [conversation.reply for _, _, conversation in questions]
    return nb.grade(persona, dataset, questions, replies)[0], nb.grade(persona, dataset, questions, own)[0]


def examine_unread(nb, model, tokenizer, persona, which):
    """(share, ceiling) of free prompts that nobody looks at, "blind" or "fresh": the shares, and nothing else of them."""
    text = zlib.decompress((notebook.ROOT / f"tests/free_wordings_{which}.zlib").read_bytes()).decode()
    questions = [("free", *asked) for asked in nb.free_questions(persona, random.Random(nb.SEED), text)]
    replies = nb.answers(model, tokenizer, questions, nb.SEED)
    return [nb.share([nb.is_right(persona, question, reply) for question, reply in zip(questions, texts)])
            for texts in (replies, [conversation.reply for _, _, conversation in questions])]


def refuse(parser, options):
    """Options that would say nothing, or something else than they seem to."""
    if options.skip > options.rows - 6_000:
        parser.error(f"--skip {options.skip} leaves next to nothing of --rows {options.rows}")
    if (options.more or options.average or options.wordings) and not options.fish:
        parser.error("--more, --average and --wordings go with --fish")
    if not options.more and (options.rows != 60_000 or options.skip or options.scuffed is not None or options.boiled or options.lost or options.short
                             or options.joined or options.strange or options.copying != 1):
        parser.error("--rows, --skip, --scuffed, --boiled, --lost, --short, --joined, --strange and --copying go with --more")
    if not all(0 <= share <= 1 for share in (options.scuffed or 0, options.boiled, options.wordings, options.lost, options.joined, options.strange)):
        parser.error("a SHARE is a number from 0 to 1")
    if options.copying < 1:
        parser.error(f"--copying {options.copying}: give 1 or more")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--out", type=Path, default=notebook.ROOT / "assets")
    parser.add_argument("--fish", type=Path, help="a folder that a run of the notebook has saved: nothing is trained")
    parser.add_argument("--more", type=int, default=0, metavar="STEPS", help="with --fish: train it so much further")
    parser.add_argument("--rows", type=int, default=60_000, help="with --more: train on so many conversations; val and unseen stay")
    parser.add_argument("--skip", type=int, default=0, help="with --rows: leave out so many of those to train on, from the first")
    parser.add_argument("--scuffed", type=float, metavar="SHARE", help="with --more: the share of training prompts typed in a hurry")
    parser.add_argument("--boiled", type=float, default=0.0, metavar="SHARE", help="with --more: the share of those of which only telling words stay")
    parser.add_argument("--wordings", type=float, default=0.0, metavar="SHARE",
                        help="with --fish: the share of training prompts that come from assets/wordings.tsv; the card says so")
    parser.add_argument("--source", type=Path, nargs="+", default=[WORDINGS], metavar="FILE", help="with --wordings: their files")
    parser.add_argument("--lost", type=float, default=0.0, metavar="SHARE", help="with --wordings: the share of those without some words")
    parser.add_argument("--short", action="store_true", help="with --wordings: of their replies only the first sentence is learned")
    parser.add_argument("--joined", type=float, default=0.0, metavar="SHARE",
                        help="with --more: the share of made-up words that are two halves of known ones (see `joined_words`)")
    parser.add_argument("--strange", type=float, default=0.0, metavar="SHARE",
                        help="with --more: the share of training prompts with letters from anywhere in Unicode (see `strange_letters`)")
    parser.add_argument("--copying", type=float, default=1.0, metavar="TIMES",
                        help="with --more: of conversations that repeat no rare word, keep one in so many")
    parser.add_argument("--rate", type=float, default=7.5e-4, help="with --more: the largest learning rate")
    parser.add_argument("--average", type=Path, nargs="+", default=[], metavar="FOLDER", help="with --fish: the mean of its weights and these")
    parser.add_argument("--blind", action="store_true", help="count the blind half of the free prompts too; do it seldom")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    refuse(parser, options)
    nb = notebook.load()
    persona = nb.parse_persona(nb.GUPPY)
    dataset = nb.make_dataset(persona, 60_000, nb.SEED)
    tokenizer = nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), nb.VOCABULARY)
    recipe = nb.Recipe(steps=options.steps, every=max(20, options.steps // 12))
    made_of = json.dumps([digest(nb.GUPPY), asdict(recipe), asdict(nb.GuppyConfig(tokenizer.vocab_size))])
    raw = nb.OUT / ("full" if options.steps == 4_000 else f"full-{options.steps}")
    if options.fish:
        model, tokenizer = nb.load_pretrained(options.fish)          # a fish keeps the tokenizer that it learned with
        history = model.history
        if options.more:
            recipe = nb.Recipe(steps=options.more, every=max(20, options.more // 12), lr=options.rate)
            if options.scuffed is not None:
                nb.SCUFFED = options.scuffed                         # val and unseen are drawn first, and are never scuffed
            if options.boiled:
                boil_some(nb, persona, options.boiled)
            wider, wordings = read_wordings(nb, persona, *options.source)
            with (mixed_in(nb, wider, wordings, options.wordings, options.lost, options.short),
                  joined_words(nb, persona, wordings, options.joined), strange_letters(nb, options.strange)):
                rows = nb.make_dataset(persona, options.rows, nb.SEED)   # with the same share it begins with those of `dataset`
            assert rows["val"] == dataset["val"] and rows["unseen"] == dataset["unseen"]
            if options.copying > 1:
                rows["train"] = more_copying(nb, rows["train"], options.copying, random.Random(nb.SEED))
            rows["train"] = [c for c in rows["train"][options.skip:]  # a few long wordings, with an aside, do not fit
                             if len(nb.encode_chat(tokenizer, nb.normalise(c.prompt), c.reply)[0]) - 1 <= model.config.context]
            raw = nb.OUT / f"more-{digest_of_weights(model)}"        # another fish's checkpoint is none of ours
            with replaced(nb, "encode_chat", stopped):
                more = nb.train(model.to(nb.DEVICE), tokenizer, rows, recipe, persona.demo, raw)
            if not more or more[-1]["step"] < options.more:
                raise SystemExit("the training was cut short; run the same command again, it goes on from its checkpoint")
            history = history + later(more, history)
            nb.save_pretrained(model, tokenizer, raw, history)
            print(f"the trained fish is in {raw}; should its exam be cut short, go on with --fish {raw} without --more", flush=True)
    elif not options.again and (raw / "made_of.json").exists() and (raw / "made_of.json").read_text() == made_of:
        model, _ = nb.load_pretrained(raw)
        history = model.history
    else:
        torch.manual_seed(nb.SEED)
        model = nb.GuppyLM(nb.GuppyConfig(vocab_size=tokenizer.vocab_size)).to(nb.DEVICE)
        history = nb.train(model, tokenizer, dataset, recipe, persona.demo, nb.OUT)
        if not history or history[-1]["step"] < options.steps:
            raise SystemExit("the training was cut short; run the same command again, it goes on from its checkpoint")
        nb.save_pretrained(model, tokenizer, raw, history)
        (raw / "made_of.json").write_text(made_of)
    if options.average:
        model = mean_of(model, [nb.load_pretrained(folder) for folder in options.average], tokenizer)
        history = [*history[:-1], history[-1] | {"val": nb.evaluate(model, tokenizer, dataset["val"][:500])}]
    model = model.half().float()                                     # what is examined is what is written
    scores, ceiling = examine(nb, model, tokenizer, persona, dataset)
    on_card, best = dict(scores), dict(ceiling)
    for which, name in UNREAD.items():
        if which == "fresh" or options.blind:
            on_card[name], best[name] = examine_unread(nb, model, tokenizer, persona, which)
    folder = options.out / "pretrained"
    nb.save_pretrained(model, tokenizer, folder, history, on_card, best, persona.name, torch.float16)
    model, tokenizer = nb.load_pretrained(folder)
    (folder / "fingerprint.json").write_text(json.dumps(fingerprint(nb, model, tokenizer) | {"scores": scores, "ceiling": ceiling,
                                                      "unread": {name: on_card[name] for name in UNREAD.values() if name in on_card}}) + "\n")
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write("\n*free, fresh* are prompts by other writers, which nobody reads. Those of *free* were in view while the script was written, "
                   "so that score is too kind.\n")
        if history[-1]["step"] > options.steps:
            card.write("\nAfter the notebook's training, that of this fish went on; the README of the project lists every command. So it met "
                       "conversations that the notebook does not have, and *new* does not look into those. "
                       f"Its vocabulary has {tokenizer.vocab_size:,} tokens, and nats per token compare only with those of the same vocabulary.\n")
        if options.wordings:
            card.write(f"\nIn its last steps {options.wordings:.0%} of the prompts came from `assets/{'`, `assets/'.join(path.name for path in options.source)}`, not from the notebook's script.\n")
    page = nb.write_page(model, tokenizer, options.out / "guppy.html", persona.name, persona.demo)
    nb.show_table(("score", "model", "grammar"), *((name, f"{share:.1%}", f"{best.get(name, math.nan):.1%}") for name, share in on_card.items()))
    nb.show_table(("file", "bytes"), *((path.name, path.stat().st_size) for path in [*sorted(folder.glob("[!.]*")), page]))


if __name__ == "__main__":
    main()
