"""Ask a trained fish what its exam does not: unknown things in free frames, the free prompts that nobody looks at, odd letters.

python tests/tools/measure.py                   the fish of assets/pretrained
python tests/tools/measure.py out/guppy         another one
python tests/tools/measure.py --blind           also the blind half of the free prompts: its score, and nothing else of it

The blind half (tests/free_wordings_blind.zlib) and the fresh prompts (tests/free_wordings_fresh.zlib) are there to be counted: who studies
them turns them into a look half. The fresh ones came later, when much of the script had been written with the look half in mind.
"""
import argparse
import random
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import notebook

# sixty real words that the script lacks, each in a frame as somebody might type it
UNKNOWN = """what is a turnip? | my name is Bartholomew | do you know what a trombone is? | i bought a lawnmower yesterday | have you ever seen a windmill?
what does a carburetor do? | meet my friend Ingrid | i had falafel for lunch | would you like some pierogi? | can you hear the bluegrass?
my cat Chairman is here | what is photosynthesis? | i need a screwdriver | tell me about volcanoes | do you own a tuxedo? | i lost my stapler
call me Wolfgang | this is my sister Delphine | do you like sauerkraut? | i am eating a burrito | explain bureaucracy to me | what is a helicopter?
where is my calculator? | i broke my ukulele | what do you think of flamenco? | hello, it's Dimitri | my cat is called Pumpernickel | do fish eat marzipan?
do you want some gnocchi? | i listen to ragtime | what is a stethoscope? | do you know about taxes? | i have a skateboard | how does a zipper work?
say hello to Guadalupe | people call me Fitz | have you heard of astrology? | what is a lighthouse for? | my hairdryer is broken | do you need a wheelbarrow?
i am called Thaddeus | can i give you a pretzel? | do you like dubstep? | what's a crocodile? | do you have a mortgage? | what is an hourglass?
this is Bronwyn | i want to know what a xylophone is | do you use a thermos? | i cooked risotto with saffron | my friend Octavia is visiting
do you know what plumbing is? | why do humans need elevators? | what is jujitsu? | have you tried wasabi? | my kitten Waffles wants to see you
i bought a new trampoline | what are binoculars? | do you play lacrosse? | i study archaeology"""
WORDS = """turnip bartholomew trombone lawnmower windmill carburetor ingrid falafel pierogi bluegrass chairman photosynthesis screwdriver volcanoes tuxedo
stapler wolfgang delphine sauerkraut burrito bureaucracy helicopter calculator ukulele flamenco dimitri pumpernickel marzipan gnocchi ragtime stethoscope taxes
skateboard zipper guadalupe fitz astrology lighthouse hairdryer wheelbarrow thaddeus pretzel dubstep crocodile mortgage hourglass bronwyn xylophone thermos saffron
octavia plumbing elevators jujitsu wasabi waffles trampoline binoculars lacrosse archaeology""".split()
ODD = ["🐟", "🐟🐟🐟 hi", "你好", "привет, рыбка", "¿qué tal?", "日本語", "مرحبا", "café?", "ﬀ", "e\u0301", "\u200b", "½ ² №", "😀 are you hungry? 😀"]


def unknown_things():
    """[(prompt, the word that a reply should repeat)]"""
    prompts = [prompt.strip() for line in UNKNOWN.splitlines() for prompt in line.split(" | ")]
    assert len(prompts) == len(WORDS) and all(word in prompt.lower() for prompt, word in zip(prompts, WORDS))
    return list(zip(prompts, WORDS))


def say(nb, model, tokenizer, prompts, seed=0):
    conversations = [("asked", None, nb.Conversation(prompt, "", "")) for prompt in prompts]
    return nb.answers(model, tokenizer, conversations, seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fish", nargs="?", default=notebook.ROOT / "assets/pretrained")
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--show", action="store_true", help="print the replies to unknown things")
    options = parser.parse_args()
    nb = notebook.load()
    persona = nb.parse_persona(nb.GUPPY)
    model, tokenizer = nb.load_pretrained(options.fish)
    texts = {"free, look half": nb.FREE}
    for which in ("fresh", "blind") if options.blind else ("fresh",):
        texts[f"free, {which}"] = zlib.decompress((notebook.ROOT / f"tests/free_wordings_{which}.zlib").read_bytes()).decode()
    rows = []
    for name, text in texts.items():
        asked = [("free", *question) for question in nb.free_questions(persona, random.Random(0), text)]
        replies = nb.answers(model, tokenizer, asked)
        rows.append((name, len(asked), f"{nb.share([nb.is_right(persona, q, reply) for q, reply in zip(asked, replies)]):.1%}"))
    things = unknown_things()
    replies = say(nb, model, tokenizer, [prompt for prompt, _ in things])
    whole = [word in nb.WORD.findall(reply) for (_, word), reply in zip(things, replies)]
    rows.append(("unknown things repeated whole", len(things), f"{nb.share(whole):.1%}"))
    if options.show:
        for (prompt, word), reply, ok in zip(things, replies, whole):
            print("     " if ok else "WRONG", prompt, "->", reply)
    odd = say(nb, model, tokenizer, ODD * 4)
    whole = nb.share(["\ufffd" not in reply for reply in odd])
    rows.append(("replies to odd letters without broken bytes", len(odd), f"{whole:.1%}"))
    nb.show_table(("asked", "prompts", "share"), *rows)


if __name__ == "__main__":
    main()
