"""The loop: what it computes, that it learns, and a run that is cut short, damaged, pushed too far, or shared among processes."""
import copy
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import notebook
import pytest
import torch
import torch.nn.functional as F

RECIPE = {"steps": 30, "every": 10, "lr": 3e-3, "warmup": 5, "precision": "float32"}


@pytest.fixture(scope="module")
def few(nb, small):
    """The small persona with little data: what is cut, resumed and compared need not learn."""
    persona, dataset, tokenizer = small
    return {"train": dataset["train"][:400], "val": dataset["val"][:60]}, tokenizer


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fresh(nb, tokenizer, width=32, **kind):
    torch.manual_seed(0)
    return nb.GuppyLM(nb.GuppyConfig(vocab_size=tokenizer.vocab_size, width=width, layers=2, heads=2, ffn=2 * width, **kind))


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def same_history(a, b):
    """Equal but for the seconds, the weights of every validation included."""
    for one, two in zip(a, b, strict=True):
        rest = [{k: v for k, v in entry.items() if k not in ("seconds", "weights")} for entry in (one, two)]
        if rest[0] != rest[1] or not all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"]):
            return False
    return True


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def interrupt(times=1):
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


def stop_at(nb, monkeypatch, step, times=1):
    """Ctrl-C at the beginning of a step."""
    true_rate = nb.learning_rate

    def rate(recipe, at):
        if at == step:
            interrupt(times)
        return true_rate(recipe, at)
    monkeypatch.setattr(nb, "learning_rate", rate)


# ---- what the loop computes ----

def test_learning_rate(nb):
    recipe = nb.Recipe(steps=1_000, warmup=100, lr=2.0)
    rates = [nb.learning_rate(recipe, step) for step in range(1_000)]
    assert rates[0] == pytest.approx(0.02) and max(rates) == rates[99] == 2.0
    assert rates[-1] == pytest.approx(2.0 / 900), "the line ends at 0 one step after the last"
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert min(nb.learning_rate(nb.Recipe(steps=20), step) for step in range(20)) >= 0, "fewer steps than the warm-up"
    assert nb.learning_rate(nb.Recipe(steps=1), 0) > 0


def test_the_optimizer_pulls_at_matrices_alone(nb, small):
    model, recipe = fresh(nb, small[2]), nb.Recipe()
    groups = nb.make_optimizer(model, recipe).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.1 if name.endswith("weight") and "norm" not in name else 0.0), name
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in groups)


def by_hand(nb, model, tokenizer, dataset, recipe):
    """The loop again, in the plainest form: float32, one process, AdamW, clipping and learning rate in formulas of the tests' own."""
    rows = nb.rows_by_length(tokenizer, dataset["train"], "cpu")
    feed = nb.batches(rows, recipe.batch, torch.Generator().manual_seed(recipe.seed))
    moments, losses = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}, []
    model.train()
    for step in range(recipe.steps):
        ids, loss_mask = next(feed)
        logp = F.log_softmax(model(ids)[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]                 # (B, T - 1)
        loss = -logp[loss_mask[:, 1:]].mean()
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        rate = recipe.lr * min((step + 1) / recipe.warmup, (recipe.steps - step) / (recipe.steps - recipe.warmup))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads):
                g, (m, v) = g * min(1.0, recipe.clip / norm), moments[p]
                m.mul_(recipe.betas[0]).add_(g, alpha=1 - recipe.betas[0])
                v.mul_(recipe.betas[1]).add_(g * g, alpha=1 - recipe.betas[1])
                p.mul_(1 - rate * recipe.weight_decay * (p.dim() == 2))
                t = step + 1
                p -= rate * (m / (1 - recipe.betas[0] ** t)) / ((v / (1 - recipe.betas[1] ** t)).sqrt() + 1e-8)
    return losses


@pytest.mark.parametrize("precision, near", [("float32", 2e-5), ("float16", 2e-2)])
def test_the_loop_is_the_plain_one(nb, few, precision, near):
    """Weights and losses after 12 steps, against the loop by hand; the clip is one that bites in every step."""
    dataset, tokenizer = few
    recipe = nb.Recipe(steps=12, every=6, lr=3e-3, warmup=3, clip=0.05, weight_decay=3.0, precision=precision)
    model, twin = fresh(nb, tokenizer), fresh(nb, tokenizer)
    for p, q in zip(model.parameters(), twin.parameters()):
        if p.dim() == 1:                                             # biases and scales on which a decay would be seen
            p.data += 1.0
            q.data += 1.0
    start = copy.deepcopy(model.state_dict())
    history = nb.train(model, tokenizer, dataset, recipe)
    losses = by_hand(nb, twin, tokenizer, dataset, recipe)
    assert [loss for entry in history for loss in entry["losses"]] == pytest.approx(losses, abs=max(2e-4, near))
    assert [entry["loss"] for entry in history] == pytest.approx([sum(losses[:6]) / 6, sum(losses[6:]) / 6], abs=max(1e-4, near))
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        moved = (q - start[name]).norm()
        assert (p - q).norm() <= (1e-3 if precision == "float32" else 0.1) * moved, (name, (p - q).norm() / moved)


def test_one_step_moves_each_parameter_by_the_clipped_gradient(nb, few):
    """With betas of 0 and an epsilon that dwarfs the gradient, a step of AdamW is plain descent along the clipped gradient."""
    dataset, tokenizer = few
    steps = []
    for clip in (0.01, 0.02):
        model = fresh(nb, tokenizer)
        start, make = copy.deepcopy(model.state_dict()), nb.make_optimizer

        def plain(model, recipe):
            optimizer = make(model, recipe)
            for group in optimizer.param_groups:
                group["eps"] = 1e3
            return optimizer
        nb.make_optimizer = plain
        try:
            nb.train(model, tokenizer, dataset, nb.Recipe(steps=1, every=1, warmup=1, lr=1e3, weight_decay=0.0, clip=clip, precision="float32"))
        finally:
            nb.make_optimizer = make
        steps.append(math.sqrt(sum((p - start[name]).double().square().sum().item() for name, p in model.state_dict().items())))
    assert steps == pytest.approx([0.01, 0.02], rel=1e-3), "the norm of the gradient after clipping"


def test_evaluate_is_the_sum_over_conversations_by_the_sum_of_tokens(nb, small):
    persona, dataset, tokenizer = small
    model = fresh(nb, tokenizer, dropout=0.5).train()
    total = count = 0
    quiet = copy.deepcopy(model).eval()
    for c in dataset["val"][:40]:
        ids, loss_mask = nb.encode_chat(tokenizer, c.prompt, c.reply)
        logp = F.log_softmax(quiet(torch.tensor([ids]))[0].double(), -1)
        total -= sum(logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if loss_mask[t])
        count += sum(loss_mask)
    assert nb.evaluate(model, tokenizer, dataset["val"][:40]) == pytest.approx(total / count, abs=1e-5), "without dropout"
    assert model.training and all(p.grad is None for p in model.parameters())


def test_training_learns_and_is_repeatable(nb, small):
    """Below the bigram of its own data, which no model reaches that sees one token back; and the same weights twice."""
    persona, dataset, tokenizer = small
    bar = next(loss for name, loss in nb.yardsticks(tokenizer, persona, dataset).items() if name.startswith("bigram"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        models = [fresh(nb, tokenizer, 64), fresh(nb, tokenizer, 64)]
        recipe = {"every": 150, "lr": 5e-3, "warmup": 20, "precision": "float32"}
        history = nb.train(models[0], tokenizer, dataset, nb.Recipe(steps=300, **recipe), ["hello"])
        assert [entry["step"] for entry in history] == [150, 300] and [len(entry["diary"]) for entry in history] == [1, 1]
        assert history[-1]["val"] < bar - 0.1, (history[-1]["val"], bar)
        assert history[-1]["val"] == pytest.approx(nb.evaluate(models[0], tokenizer, dataset["val"][:500]))
        again = [fresh(nb, tokenizer, 64), fresh(nb, tokenizer, 64)]
        histories = [nb.train(model, tokenizer, dataset, nb.Recipe(steps=40, **recipe)) for model in again]
        assert same_weights(*again) and same_history(*histories), "two threads, one process"
    finally:
        torch.set_num_threads(threads)


def test_history_and_callback(nb, few, capsys):
    dataset, tokenizer = few
    seen = []
    recipe = nb.Recipe(**RECIPE | {"steps": 25})
    history = nb.train(fresh(nb, tokenizer), tokenizer, dataset, recipe, ["hello", "is the saw red?"], None, seen.append)
    assert seen == history and [entry["step"] for entry in history] == [10, 20, 25]
    for entry, steps in zip(history, (10, 10, 5)):
        assert entry.keys() == {"step", "tokens", "seconds", "loss", "val", "losses", "diary", "weights"}
        assert len(entry["losses"]) == steps and sum(entry["losses"]) / steps == pytest.approx(entry["loss"], abs=1e-4)
        json.dumps({k: v for k, v in entry.items() if k != "weights"})
    assert history[0]["losses"][0] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.3), "from the first step on"
    out = capsys.readouterr().out
    titles = [line for line in out.replace("\r", "\n").splitlines() if line.startswith("step ")]
    assert titles == ["step 0", *(f"step {entry['step']}, validation loss {entry['val']:.3f}" for entry in history)]
    assert all(len(line) <= 100 for line in out.replace("\r", "\n").splitlines())
    for entry in history:
        assert all(reply.replace("\n", "⏎")[:20].strip() in out for reply in entry["diary"])


def test_the_diary_begins_before_the_first_step_and_is_dense_at_first(nb, few, capsys):
    dataset, tokenizer = few
    recipe = nb.Recipe(steps=170, every=60, batch=2, precision="float32")
    nb.train(fresh(nb, tokenizer, 16), tokenizer, dataset, recipe, ["hello"])
    out = capsys.readouterr().out.replace("\r", "\n")
    titles = [int(line.split()[1].strip(",")) for line in out.splitlines() if line.startswith("step ")]
    assert titles == [0, 20, 60, 120, 150, 170]
    assert out.rstrip().splitlines()[-1].startswith("100%") and "170/170 steps, loss " in out and " left" in out


def test_float16_with_the_scaler_survives_an_overflow(nb, few, monkeypatch):
    dataset, tokenizer = few
    model, calls, true_loss = fresh(nb, tokenizer), [], nb.reply_loss

    def loss_that_overflows_once(*arguments, **options):
        calls.append(1)
        return true_loss(*arguments, **options) * (1e30 if len(calls) == 10 else 1.0)
    monkeypatch.setattr(nb, "reply_loss", loss_that_overflows_once)
    scales, update = [], torch.amp.GradScaler.update
    monkeypatch.setattr(torch.amp.GradScaler, "update", lambda self, *a: (update(self, *a), scales.append(self.get_scale()))[0])
    history = nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE | {"precision": "float16", "every": 30}))
    assert len(scales) == 30 and scales[9] < scales[8], "the step that overflowed halves the scale"
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    assert history[-1]["val"] < math.log(tokenizer.vocab_size)


def test_the_scale_is_kept_with_the_run(nb, few, tmp_path, monkeypatch):
    dataset, tokenizer = few
    model, recipe, scales = fresh(nb, tokenizer), nb.Recipe(**RECIPE | {"precision": "float16"}), []
    true_loss, update = nb.reply_loss, torch.amp.GradScaler.update
    monkeypatch.setattr(torch.amp.GradScaler, "update", lambda self, *a: (update(self, *a), scales.append(self.get_scale()))[0])
    with monkeypatch.context() as patch:
        patch.setattr(nb, "reply_loss", lambda *a, **k: true_loss(*a, **k) * (1e30 if len(scales) == 5 and torch.is_grad_enabled() else 1.0))
        stop_at(nb, patch, 12)
        nb.train(model, tokenizer, dataset, recipe, (), tmp_path)
    assert scales[-1] == scales[0] / 2
    scales.clear()
    nb.train(fresh(nb, tokenizer), tokenizer, dataset, recipe, (), tmp_path)
    assert set(scales) == {2.0 ** 15} and len(scales) == 17


def test_dropout_is_on_in_every_step_and_off_in_every_validation(nb, few, monkeypatch):
    dataset, tokenizer = few
    model, true_loss, modes = fresh(nb, tokenizer), nb.reply_loss, set()
    monkeypatch.setattr(nb, "reply_loss", lambda m, *a, **k: (modes.add((torch.is_grad_enabled(), m.training)), true_loss(m, *a, **k))[1])
    nb.train(model.eval(), tokenizer, dataset, nb.Recipe(**RECIPE), ["hello"])
    assert modes == {(True, True), (False, False)} and not model.training


def test_unknown_precision(nb, few):
    with pytest.raises(ValueError, match="Recipe.precision is 'int4'"):
        nb.train(fresh(nb, few[1]), few[1], few[0], nb.Recipe(precision="int4"))


# ---- interrupts ----

MOMENTS = ["between update and count", "during the last validation", "during a validation in the middle", "during the diary",
           "while the checkpoint is written", "in the first step"]


def arm(nb, monkeypatch, moment, times):
    """Ctrl-C, once or twice in a row, at a bad moment."""
    calls = []

    def at(owner, name, number, before=True):
        true = getattr(owner, name)

        def wrapped(*arguments, **options):
            calls.append(name)
            here = calls.count(name) == number
            if here and before:
                interrupt(times)
            result = true(*arguments, **options)
            if here and not before:
                interrupt(times)
            return result
        monkeypatch.setattr(owner, name, wrapped)

    if moment == "between update and count":
        at(torch.amp.GradScaler, "update", 14)
    elif moment == "during the last validation":
        at(nb, "rows_by_length", 4, before=False)                    # the first is that of training
    elif moment == "during a validation in the middle":
        at(nb, "rows_by_length", 3, before=False)
    elif moment == "during the diary":
        at(nb, "speak", 2, before=False)                             # the first is before step 0
    elif moment == "while the checkpoint is written":
        def half(state, path, true=torch.save):
            calls.append("save")
            if calls.count("save") == 4:                                  # the third is that of the weights at step 10
                path.write_bytes(b"half of a file")
                interrupt(times)
            true(state, path)
        monkeypatch.setattr(torch, "save", half)
    else:
        at(nb, "reply_loss", 1)
    return calls


@pytest.fixture(scope="module")
def undisturbed(nb, few):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = fresh(nb, few[1], dropout=0.1)
    history = nb.train(model, few[1], few[0], nb.Recipe(**RECIPE), ["hello"])
    torch.set_num_threads(threads)
    return model, history, torch.get_rng_state()


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_and_run_again(nb, few, undisturbed, one_thread, tmp_path, monkeypatch, capsys, moment, times):
    """Once: the step or the validation ends first. Twice: KeyboardInterrupt at once. The same call then ends as if nothing had been."""
    dataset, tokenizer = few
    whole, history, dice = undisturbed
    model, before = fresh(nb, tokenizer, dropout=0.1), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        calls = arm(nb, patch, moment, times)
        if times == 2:
            with pytest.raises(KeyboardInterrupt):
                nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), ["hello"], tmp_path)
        else:
            cut = nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), ["hello"], tmp_path)
            assert same_history(cut, history[:len(cut)]) and not model.training
            if moment == "during the last validation":
                assert len(cut) == 3 and files(tmp_path) == [], "that run is finished"
            else:
                assert "stopped by hand after step " in capsys.readouterr().out and len(cut) < 3
                assert len(cut) == {MOMENTS[2]: 2, MOMENTS[4]: 2, "in the first step": 0}.get(moment, 1)
    assert calls and signal.getsignal(signal.SIGINT) == before, "the old handler is back"
    if times == 2 or moment != "during the last validation":
        assert any(name.endswith(".pt") for name in files(tmp_path))
        torch.manual_seed(5)                                         # the model in memory goes on, whatever state it is in
        again = nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), ["hello"], tmp_path)
        assert "going on after step" in capsys.readouterr().out
        assert same_history(again, history)
    assert same_weights(model, whole) and torch.equal(torch.get_rng_state(), dice)
    assert files(tmp_path) == [], "a finished run leaves no file"


def test_a_checkpoint_that_cannot_be_cleared_away_costs_nothing(nb, few, tmp_path, monkeypatch):
    """The folder became read-only on the way: the trained model and its history come back all the same."""
    dataset, tokenizer = few

    def refuse(path, missing_ok=False):
        raise OSError(30, "Read-only file system", str(path))

    history = nb.train(fresh(nb, tokenizer), tokenizer, dataset, nb.Recipe(**RECIPE), ["hello"], tmp_path,
                       lambda entry: monkeypatch.setattr(Path, "unlink", refuse) if entry["step"] == RECIPE["steps"] else None)
    assert history[-1]["step"] == RECIPE["steps"]


def test_a_validation_that_was_cut_is_made_up_first(nb, few, undisturbed, one_thread, tmp_path, monkeypatch, capsys):
    dataset, tokenizer = few
    model = fresh(nb, tokenizer, dropout=0.1)
    with monkeypatch.context() as patch:
        arm(nb, patch, "during the last validation", 2)
        with pytest.raises(KeyboardInterrupt):
            nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), ["hello"], tmp_path)
    monkeypatch.setattr(nb, "learning_rate", None)                   # no step is left to be taken
    history = nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), ["hello"], tmp_path)
    assert "going on after step 30" in capsys.readouterr().out and same_history(history, undisturbed[1])
    assert same_weights(model, undisturbed[0]) and not model.training


def test_without_a_folder_nothing_is_kept(nb, few, monkeypatch):
    dataset, tokenizer = few
    with monkeypatch.context() as patch:
        stop_at(nb, patch, 15)
        assert [entry["step"] for entry in nb.train(fresh(nb, tokenizer), tokenizer, dataset, nb.Recipe(**RECIPE))] == [10]
    assert len(nb.train(fresh(nb, tokenizer), tokenizer, dataset, nb.Recipe(**RECIPE))) == 3


def test_an_ignored_interrupt_stays_ignored_and_other_threads_can_train(nb, few):
    import threading
    dataset, tokenizer = few
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with nb.TrainingRun(fresh(nb, tokenizer), tokenizer, dataset, nb.Recipe(**RECIPE)):
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)
    lengths = []
    thread = threading.Thread(target=lambda: lengths.append(len(nb.train(fresh(nb, tokenizer), tokenizer, dataset, nb.Recipe(**RECIPE)))))
    thread.start()
    thread.join()
    assert lengths == [3]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_stopped_and_resumed_is_bit_identical_in_16_bits(nb, few, one_thread, tmp_path, monkeypatch, precision):
    dataset, tokenizer = few
    recipe = nb.Recipe(**RECIPE | {"precision": precision})
    whole, model = fresh(nb, tokenizer), fresh(nb, tokenizer)
    history = nb.train(whole, tokenizer, dataset, recipe)
    with monkeypatch.context() as patch:
        stop_at(nb, patch, 16)
        nb.train(model, tokenizer, dataset, recipe, (), tmp_path)
    again = nb.train(model, tokenizer, dataset, recipe, (), tmp_path)
    assert same_weights(model, whole) and same_history(again, history)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import conftest, notebook, torch
torch.set_num_threads(1)
nb = notebook.load()
dataset, tokenizer = torch.load(sys.argv[4], weights_only=False)
dataset = {name: [nb.Conversation(*c) for c in part] for name, part in dataset.items()}
tokenizer = nb.BPETokenizer.load(tokenizer)
torch.manual_seed(0)
model = nb.GuppyLM(nb.GuppyConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, ffn=64))
true_rate = nb.learning_rate
def rate(recipe, step):
    if step == 27:
        os.kill(os.getpid(), signal.SIGKILL)
    return true_rate(recipe, step)
if len(sys.argv) == 5:
    nb.learning_rate = rate
nb.train(model, tokenizer, dataset, nb.Recipe(**eval(sys.argv[2])), ["hello"], sys.argv[3])
torch.save(model.state_dict(), sys.argv[5])
"""


def packed(few, folder):
    """Data and tokenizer in files for another process, so that it need not make them."""
    dataset, tokenizer = few
    tokenizer.save(folder / "tokenizer.json")
    torch.save(({name: [tuple(c) for c in part] for name, part in dataset.items()}, str(folder / "tokenizer.json")), folder / "data.pt")
    return str(folder / "data.pt")


def test_killed_and_resumed_is_bit_identical(nb, few, tmp_path, one_thread, capsys):
    """Across processes, on one thread: killed in one, resumed in this one."""
    dataset, tokenizer = few
    whole = fresh(nb, tokenizer)
    history = nb.train(whole, tokenizer, dataset, nb.Recipe(**RECIPE), ["hello"])
    data, out = packed(few, tmp_path), tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", KILLED, str(notebook.ROOT / "tests"), repr(RECIPE), str(out), data], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr[-2_000:]
    assert [name.split(".")[1] for name in files(out)] == ["pt", "step10"]
    torch.manual_seed(99)
    model = nb.GuppyLM(whole.config)
    assert not same_weights(model, whole)
    again = nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), ["hello"], out)
    assert "going on after step 20" in capsys.readouterr().out
    assert same_weights(model, whole) and same_history(again, history) and files(out) == []


# ---- the file ----

def test_the_file_is_written_by_the_clock(nb, few, tmp_path, monkeypatch):
    """Without a validation for long, the file is still as old as `save_every` at most."""
    dataset, tokenizer = few
    steps, save = [], nb.TrainingRun.save
    monkeypatch.setattr(nb.TrainingRun, "save", lambda run: (steps.append(run.step), save(run)))
    monkeypatch.setattr(nb.TrainingRun, "save_every", 0)
    nb.train(fresh(nb, tokenizer), tokenizer, dataset, nb.Recipe(**RECIPE | {"steps": 6, "every": 100}), (), tmp_path)
    assert steps == [0, 0, 1, 2, 3, 4, 5, 6]
    steps.clear()
    monkeypatch.setattr(nb.TrainingRun, "save_every", 60)
    nb.train(fresh(nb, tokenizer), tokenizer, dataset, nb.Recipe(**RECIPE), (), tmp_path)
    assert steps == [0, 10, 20, 30] and nb.TrainingRun.save_every == 60


def test_damaged_checkpoint_is_named_and_set_aside(nb, few, tmp_path, monkeypatch, capsys):
    dataset, tokenizer = few
    whole, model = fresh(nb, tokenizer), fresh(nb, tokenizer)
    nb.train(whole, tokenizer, dataset, nb.Recipe(**RECIPE))
    with monkeypatch.context() as patch:
        stop_at(nb, patch, 15)
        nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), (), tmp_path)
    name, = (name for name in files(tmp_path) if name.endswith(".pt"))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:5_000])
    model = fresh(nb, tokenizer)
    nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), (), tmp_path)
    assert f"{name} is damaged" in capsys.readouterr().out and files(tmp_path) == [name.replace(".pt", ".damaged")]
    assert same_weights(model, whole)


def test_another_recipe_data_or_tokenizer_starts_anew(nb, few, tmp_path, monkeypatch, capsys):
    dataset, tokenizer = few
    with monkeypatch.context() as patch:
        stop_at(nb, patch, 5)
        nb.train(fresh(nb, tokenizer), tokenizer, dataset, nb.Recipe(**RECIPE), (), tmp_path)
    stopped, = files(tmp_path)
    other = nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), 330)
    for data, reader, recipe in ((dataset, tokenizer, RECIPE | {"lr": 2e-3}), (dataset | {"train": dataset["train"][:-1]}, tokenizer, RECIPE),
                                 (dataset, other, RECIPE), (dataset, tokenizer, RECIPE | {"steps": 20})):
        nb.train(fresh(nb, reader), reader, data, nb.Recipe(**recipe), (), tmp_path)
        out = capsys.readouterr().out
        assert f"{stopped} is of another recipe, data or tokenizer" in out and "going on" not in out and files(tmp_path) == [stopped]


@pytest.mark.parametrize("first,later", [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_a_run_goes_on_in_the_precision_that_it_was_started_with(nb, few, tmp_path, monkeypatch, capsys, one_thread, first, later):
    """A busy machine may choose another precision at the next start, and with it another number of steps: the run is not lost."""
    dataset, tokenizer = few
    whole, model, started = fresh(nb, tokenizer), fresh(nb, tokenizer), RECIPE | {"precision": first}
    history = nb.train(whole, tokenizer, dataset, nb.Recipe(**started))
    with monkeypatch.context() as patch:
        stop_at(nb, patch, 15)
        nb.train(model, tokenizer, dataset, nb.Recipe(**started), (), tmp_path)
    recipe = nb.Recipe(**RECIPE | {"precision": later, "steps": 66, "every": 22})
    again = nb.train(model, tokenizer, dataset, recipe, (), tmp_path)
    assert f"was started in {first} with 30 steps: it goes on like that" in capsys.readouterr().out
    assert same_weights(model, whole) and same_history(again, history) and files(tmp_path) == []
    assert recipe == nb.Recipe(**started), "later cells read the recipe that was used"


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(nb, few, tmp_path, monkeypatch):
    dataset, tokenizer = few
    with monkeypatch.context() as patch:
        stop_at(nb, patch, 15)
        nb.train(fresh(nb, tokenizer), tokenizer, dataset, nb.Recipe(**RECIPE), (), tmp_path)
    before = files(tmp_path)

    def away(*arguments, **options):
        raise TimeoutError("the drive does not answer")
    with monkeypatch.context() as patch:
        patch.setattr(nb.Path, "read_bytes", away)
        with pytest.raises(RuntimeError, match="could not be read .*drive does not answer.* stays as it is: try again"):
            nb.train(fresh(nb, tokenizer), tokenizer, dataset, nb.Recipe(**RECIPE), (), tmp_path)
    assert files(tmp_path) == before != []


def test_a_conversation_that_does_not_fit_is_named_before_the_first_step(nb, few):
    dataset, tokenizer = few
    long = nb.Conversation("hello", "hello. " * 100, "hello")
    with pytest.raises(ValueError, match=r"a conversation has \d{3} tokens, and the context is 128: 'hello' -> .*shorten the replies"):
        nb.train(fresh(nb, tokenizer), tokenizer, dataset | {"train": [*dataset["train"], long]}, nb.Recipe(**RECIPE))
    limit = len(nb.encode_chat(tokenizer, "hello", "hello. " * 100)[0]) - 1
    nb.train(nb.GuppyLM(nb.GuppyConfig(tokenizer.vocab_size, width=16, layers=1, heads=1, ffn=16, context=limit)), tokenizer,
             dataset | {"train": [long] * 8}, nb.Recipe(steps=1, batch=8, precision="float32"))


def test_a_better_fish_is_kept(nb, few, tmp_path, monkeypatch, capsys):
    """A folder that holds a fish of more steps is moved aside; one of as many steps or fewer is overwritten."""
    tokenizer, model, folder = few[1], fresh(nb, few[1]), tmp_path / "guppy"

    def entries(steps):
        return [{"step": steps, "tokens": 1, "seconds": 1.0, "loss": 1.0, "val": 1.0, "diary": []}]
    for steps, history, kept in ((300, entries(30), "guppy-kept"), (40, [], "guppy-kept1"), (30, entries(30), None), (20, entries(30), None)):
        nb.save_pretrained(model, tokenizer, folder, entries(steps))
        nb.keep_better(folder, history)
        assert folder.exists() == (kept is None) and (kept is None or nb.load_pretrained(tmp_path / kept)[0].history[-1]["step"] == steps)
    nb.save_pretrained(model, tokenizer, folder, entries(50))

    def refused(*names):
        raise PermissionError("in use")
    with monkeypatch.context() as patch:
        patch.setattr(nb.Path, "rename", refused)
        with pytest.raises(PermissionError):                         # and so it is not written over
            nb.keep_better(folder, [])
    nb.keep_better(tmp_path / "nothing", [])
    (folder / "history.json").write_text("{")
    nb.keep_better(folder, [])
    assert folder.exists() and capsys.readouterr().out.count("it is kept as") == 2
    nb.save_pretrained(model, tokenizer, folder, entries(20))
    nb.keep_better(folder, entries(20), tokenizer)
    assert folder.exists() and not capsys.readouterr().out, "the same character with as many steps"
    nb.keep_better(folder, entries(20), nb.BPETokenizer.train(["other words, other words"], 262))
    assert not folder.exists() and "another fish of 20 steps: it is kept as" in capsys.readouterr().out


def test_a_loss_that_is_nan_ends_the_run_with_the_last_good_weights(nb, few, tmp_path, monkeypatch, capsys):
    dataset, tokenizer = few
    good, model, true_loss, calls = fresh(nb, tokenizer), fresh(nb, tokenizer), nb.reply_loss, []
    with monkeypatch.context() as patch:
        stop_at(nb, patch, 9)                                        # that step is finished
        nb.train(good, tokenizer, dataset, nb.Recipe(**RECIPE))

    def loss(*arguments, **options):
        calls.append(torch.is_grad_enabled())
        return true_loss(*arguments, **options) * (float("nan") if sum(calls) == 15 else 1.0)
    monkeypatch.setattr(nb, "reply_loss", loss)
    monkeypatch.setattr(nb.TrainingRun, "save_every", 0)             # a file in every step: none may hold NaN
    history = nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), (), tmp_path)
    assert [entry["step"] for entry in history] == [10] and same_weights(model, good) and not model.training
    assert "the loss is nan in step 20" in (out := capsys.readouterr().out) and "lower Recipe.lr" in out
    state = torch.load(next(tmp_path.glob("*.pt")), weights_only=True)
    assert all(p.isfinite().all() for p in state["model"].values()) and 10 <= state["step"] <= 14


def test_a_full_disk_does_not_stop_training(nb, few, tmp_path, monkeypatch, capsys):
    def full(state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", full)
    history = nb.train(fresh(nb, few[1]), few[1], few[0], nb.Recipe(**RECIPE), (), tmp_path)
    assert history[-1]["step"] == 30 and files(tmp_path) == []
    assert capsys.readouterr().out.count("No space left on device; training goes on") == 4


def test_a_gpu_is_not_asked_for_the_loss_in_every_step(nb, few, monkeypatch):
    """To read a number, a GPU must finish: at most once a second, and at a validation."""
    reads, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: (reads.append(tensor.requires_grad), item(tensor))[1])
    nb.train(fresh(nb, few[1]), few[1], few[0], nb.Recipe(**RECIPE | {"steps": 60, "every": 60}))
    assert sum(reads) <= 10, "losses with a gradient that were read in 60 steps"


# ---- two processes ----

SHARED = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import conftest, notebook, torch
torch.set_num_threads(1)
nb = notebook.load()
if nb.WORLD > 1:
    nb.join_ranks()
dataset, tokenizer = torch.load(sys.argv[2], weights_only=False)
dataset = {name: [nb.Conversation(*c) for c in part] for name, part in dataset.items()}
tokenizer = nb.BPETokenizer.load(tokenizer)
torch.manual_seed(0)
model = nb.GuppyLM(nb.GuppyConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, ffn=64))
losses, update = [], nb.TrainingRun.update
nb.TrainingRun.update = lambda run, loss: (losses.append(loss.item()), update(run, loss))[1]
recipe = {"lr": 3e-3, "warmup": 5, "precision": "float32"}
history = nb.train(model, tokenizer, dataset, nb.Recipe(steps=20, every=10, **recipe), ["hello"], sys.argv[3])
weights = sum(p.double().sum().item() for p in model.parameters())
with open(f"{sys.argv[3]}-{nb.WORLD}-{nb.RANK}.json", "w") as file:
    json.dump([weights, losses, [entry["val"] for entry in history], [entry["losses"] for entry in history], os.listdir(sys.argv[3])], file)
nb.leave_ranks()
nb.train(model, tokenizer, dataset, nb.Recipe(steps=1, **recipe))    # as in section 24, where rank 0 is alone
print("rank 0 went on")
"""


def test_two_processes_train_as_one(few, tmp_path):
    data = packed(few, tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    running = []
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen([sys.executable, "-c", SHARED, str(notebook.ROOT / "tests"), data, str(tmp_path / f"out{world}")],
                                        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    printed, errors = zip(*(process.communicate(timeout=120) for process in running))
    assert [process.returncode for process in running] == [0, 0, 0], "\n".join(error[-1_500:] for error in errors)
    alone, first, second = (json.loads((tmp_path / f"out{name}.json").read_text()) for name in ("1-1-0", "2-2-0", "2-2-1"))
    assert len(alone[1]) == 20 and first[1] == pytest.approx(alone[1], abs=1e-5), "the loss of every step is that of one process"
    assert first[2] == pytest.approx(alone[2], abs=1e-5) and [len(losses) for losses in first[3]] == [10, 10]
    assert second[:4] == first[:4], "all ranks hold the same weights, and see the same losses"
    assert alone[4] == first[4] == [] and "step 20, validation loss" in printed[1] and "rank 0 went on" in printed[1]
    assert printed[2] == "", "only rank 0 speaks"
    assert alone[1][0] > alone[1][-1] + 0.1
