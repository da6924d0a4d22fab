"""Train two recipes side by side: that of the existing guppylm, and the notebook's own, from the same start on the same data.

python tests/tools/benchmark.py --device cpu --steps 1500 --out out/benchmark

Both train the notebook's model with the notebook's tokenizer on the same conversations, one after the other on the same machine in the
same precision, and are measured on the same 500 validation conversations in nats per reply token; the time for that is not counted.

The reference (github.com/arman-bd/guppylm, commit a30df30): batches of 32 padded to their longest, loss on all tokens, AdamW (0.9, 0.95)
with decay 0.1 on everything, learning rate 3e-4 with a warm-up and a cosine down to 3e-5, dropout 0.1, clipping at 1.0, weights that
start at 0.02. Its schedule, 200 + 9,800 steps, is stretched over --steps. Ours is Recipe() as it stands, over --ours-steps.
--data takes conversations of your own: a line of JSON each, with prompt, reply and perhaps topic.
"""
import argparse
import contextlib
import csv
import json
import math
import random
import re
import shutil
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))           # for notebook.py

import notebook
import numpy as np
import torch
import torch.nn.functional as F


def read(nb, path):
    """Conversations of a file, split by pair: at most 1,500 (or a tenth) are held out, and their copies leave training."""
    conversations = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            conversations.append(nb.Conversation(str(row["prompt"]), str(row["reply"]), str(row.get("topic", ""))))
        except (ValueError, KeyError, TypeError) as fault:
            raise SystemExit(f"{path}, line {number}: every line must be an object with prompt and reply ({fault!r})")
    random.Random(0).shuffle(conversations)
    held = min(1_500, len(conversations) // 10)
    val = conversations[:held]
    pairs = {c[:2] for c in val}
    return {"train": [c for c in conversations[held:] if c[:2] not in pairs], "val": val}


class Clock:
    """The validation loss along the seconds of training; the time that a validation takes is left out."""

    def __init__(self, nb, tokenizer, dataset, minutes):
        self.nb, self.tokenizer, self.val = nb, tokenizer, dataset["val"][:500]
        self.minutes, self.spent, self.since, self.curve = minutes, 0.0, None, []

    def start(self):
        self.since = time.perf_counter()

    def validate(self, model, step, tokens):
        """For a loop of our own: stops the time, measures, goes on."""
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()
        self.spent += time.perf_counter() - self.since
        self.note({"seconds": self.spent, "step": step, "tokens": tokens, "val": self.nb.evaluate(model, self.tokenizer, self.val)})
        self.start()

    def note(self, entry):
        """An entry of a history, such as `train` hands to `on_log`; its seconds are those of training alone. Raises Enough."""
        self.curve.append({"seconds": entry["seconds"], "step": entry["step"], "tokens": entry["tokens"], "loss": entry["val"]})
        print(f"  step {entry['step']:6} {entry['tokens']:10,} tokens {entry['seconds']:8.1f} s  loss {entry['val']:.3f}", flush=True)
        if self.minutes and entry["seconds"] > 60 * self.minutes:
            raise Enough


class Enough(Exception):
    """The time that was given is over."""


def train_reference(nb, model, tokenizer, dataset, recipe, every, clock):
    """The reference's loop; recipe gives steps, precision and seed."""
    def rate(step):
        warmup = max(1, round(0.02 * recipe.steps))
        along = (step - warmup) / max(1, recipe.steps - warmup)
        return 3e-4 * (step + 1) / warmup if step < warmup else 3e-5 + 0.5 * (3e-4 - 3e-5) * (1 + math.cos(math.pi * along))

    device = model.device.type
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    rows = [torch.tensor(nb.encode_chat(tokenizer, nb.normalise(c.prompt), c.reply)[0]) for c in dataset["train"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    scaler = torch.amp.GradScaler(device, enabled=recipe.precision == "float16")
    order, tokens = torch.Generator().manual_seed(recipe.seed), 0
    plan = iter(())
    clock.start()
    for step in range(recipe.steps):
        if (part := next(plan, None)) is None:
            plan = iter(torch.randperm(len(rows), generator=order).split(32))
            part = next(plan)
        batch = [rows[i] for i in part.tolist()]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=nb.PAD).to(device)
        tokens += sum(map(len, batch))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        model.train()
        with torch.autocast(device, dtype=getattr(torch, recipe.precision), enabled=recipe.precision != "float32"):
            logits = model(ids[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=nb.PAD)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            clock.validate(model, step + 1, tokens)


def reach(curve, loss):
    """(seconds, tokens) at which a curve first comes down to a loss, along a line between two validations; None if it never does."""
    for before, after in zip([curve[0], *curve], curve):
        if after["loss"] <= loss:
            share = 1.0 if before is after else (before["loss"] - loss) / max(before["loss"] - after["loss"], 1e-9)
            return tuple(before[k] + max(share, 0.0) * (after[k] - before[k]) for k in ("seconds", "tokens"))
    return None


def to_readme(folder):
    """Copy benchmark.csv and benchmark.png to assets/, and their table into the README."""
    for name in ("benchmark.csv", "benchmark.png"):
        shutil.copy(folder / name, notebook.ROOT / "assets")
    path = notebook.ROOT / "README.md"
    table = markdown(read_curves(folder / "benchmark.csv"))
    text, changed = re.subn(r"(<!-- benchmark: [^>]*-->\n).*?(\n<!-- benchmark end -->)", lambda m: m[1] + table + m[2],
                            path.read_text(encoding="utf-8"), flags=re.S)
    assert changed == 1, "README.md lacks the two comments between which the table stands"
    path.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=1_500, help="steps of the reference (its own run has 10,000)")
    parser.add_argument("--ours-steps", type=int, help="steps of ours; three tenths of --steps if not given")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"), help="for both; what the device does fastest if not given")
    parser.add_argument("--minutes", type=float, default=0, help="stop each run after so many minutes of training")
    parser.add_argument("--data", help="a file of conversations, instead of the notebook's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readme", action="store_true", help="copy the table and the plot into the README and assets/")
    parser.add_argument("--out", default="out/benchmark", help="folder for benchmark.csv and benchmark.png")
    options = parser.parse_args()
    if options.steps < 20:
        parser.error(f"--steps is {options.steps}; the reference needs 20 or more")
    nb = notebook.load()
    precision = options.precision or nb.pick_precision(options.device)
    persona = None if options.data else nb.parse_persona(nb.GUPPY)
    dataset = read(nb, options.data) if options.data else nb.make_dataset(persona, seed=options.seed)
    tokenizer = nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), nb.VOCABULARY)
    context = nb.GuppyConfig().context
    fits = lambda c: len(nb.encode_chat(tokenizer, nb.normalise(c.prompt), c.reply)[0]) <= context
    dataset = {name: [c for c in dataset[name] if fits(c)] for name in ("train", "val")}
    floor = math.nan
    if persona:
        val = dataset["val"][:500]
        floor = -sum(nb.log_prob(persona, *(c.topic, c.prompt, c.reply)) for c in val) / sum(
            sum(nb.encode_chat(tokenizer, c.prompt, c.reply)[1]) for c in val)
    ours_steps = options.ours_steps or max(20, 3 * options.steps // 10)
    print(f"{options.device}, {precision}, {torch.get_num_threads()} threads, torch {torch.__version__}, seed {options.seed}; "
          f"{len(dataset['train']):,} conversations to train on, floor {floor:.3f}")
    curves = {}
    for name, steps in (("reference", options.steps), ("ours", ours_steps)):
        torch.manual_seed(options.seed)
        model = nb.GuppyLM(nb.GuppyConfig(vocab_size=tokenizer.vocab_size)).to(options.device)
        every = max(5, steps // 30)
        recipe = nb.Recipe(steps=steps, every=every, precision=precision, seed=options.seed)
        clock = Clock(nb, tokenizer, dataset, options.minutes)
        print(f"\n{name}: {steps} steps")
        with contextlib.suppress(Enough):
            if name == "reference":
                train_reference(nb, model, tokenizer, dataset, recipe, every, clock)
            else:
                nb.train(model, tokenizer, dataset, recipe, on_log=clock.note)
        curves[name] = clock.curve
    report(curves, floor, Path(options.out))
    if options.readme:
        to_readme(Path(options.out))


def targets(curves):
    """The losses to be reached: {name: loss}."""
    theirs = curves["reference"]
    at = lambda share: theirs[min(len(theirs), max(1, round(share * len(theirs)))) - 1]["loss"]
    return {"3": 3.0, "2": 2.0, "1": 1.0, "that of the reference after 20% of its steps": at(0.2), "after 50%": at(0.5), "after all": at(1.0)}


def markdown(curves):
    """The table of the README: seconds of training until a loss is reached, and their ratio."""
    rows = ["| validation loss | nats | reference, s | ours, s | ratio |", "|---|---|---|---|---|"]
    for name, loss in targets(curves).items():
        a, b = reach(curves["reference"], loss), reach(curves["ours"], loss)
        cell = lambda point: f"{point[0]:.0f}" if point else "never"
        rows.append(f"| {name} | {loss:.2f} | {cell(a)} | {cell(b)} | {f'{a[0] / b[0]:.1f}' if a and b else ''} |")
    return "\n".join(rows)


def read_curves(path):
    """The curves of a benchmark.csv: {recipe: [{seconds, step, tokens, loss}]}."""
    curves = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            curves.setdefault(row.pop("recipe"), []).append({name: float(value) for name, value in row.items()})
    return curves


def report(curves, floor, folder):
    """Tables, CSV, plot, and the ratio as the last line."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "benchmark.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("recipe", "seconds", "step", "tokens", "loss"))
        writer.writerows((name, f"{p['seconds']:.1f}", p["step"], p["tokens"], f"{p['loss']:.4f}") for name, curve in curves.items() for p in curve)
    curves = read_curves(folder / "benchmark.csv")
    print(f"\n{'recipe':12}{'steps':>8}{'seconds':>10}{'tokens':>12}{'tokens/s':>10}{'final loss':>12}{'excess':>9}")
    for name, curve in curves.items():
        end = curve[-1]
        print(f"{name:12}{end['step']:8,.0f}{end['seconds']:10.1f}{end['tokens']:12,.0f}{end['tokens'] / end['seconds']:10,.0f}"
              f"{end['loss']:12.3f}{end['loss'] - floor:9.3f}")
    print(f"\n{'until a validation loss of':46}{'nats':>8}{'reference s':>13}{'tokens':>12}{'ours s':>10}{'tokens':>12}{'ratio':>8}")
    ratio = math.nan
    for name, loss in targets(curves).items():
        a, b = reach(curves["reference"], loss), reach(curves["ours"], loss)
        ratio = a[0] / b[0] if a and b else math.nan
        show = lambda point: f"{point[0]:.1f}" if point else "never"
        print(f"{name:46}{loss:8.3f}{show(a):>13}{a[1] if a else math.nan:12,.0f}{show(b):>10}{b[1] if b else math.nan:12,.0f}{ratio:8.2f}")
    import matplotlib.pyplot as plt
    plt.figure(figsize=(7, 3.6))
    for name, curve in curves.items():
        plt.plot([p["seconds"] for p in curve], [p["loss"] for p in curve], "o-", ms=3, label=name, color={"ours": "tab:orange"}.get(name, "tab:gray"))
    if np.isfinite(floor):
        plt.axhline(floor, ls=":", color="gray", label="floor")
    plt.yscale("log")
    plt.yticks(ticks := [0.3, 0.5, 1, 2, 4, 7], ticks)
    plt.minorticks_off()
    plt.xlabel("seconds of training")
    plt.ylabel("nats per reply token")
    plt.legend()
    plt.tight_layout()
    plt.savefig(folder / "benchmark.png", dpi=80)
    print(f"\n{folder / 'benchmark.csv'} and {folder / 'benchmark.png'} written\nratio {ratio:.2f}")


if __name__ == "__main__":
    main()
