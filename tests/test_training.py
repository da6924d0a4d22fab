"""A run that is cut short, damaged, pushed too far, or shared among processes."""
import json
import os
import signal
import subprocess
import sys

import notebook
import pytest
import torch

RECIPE = {"steps": 60, "every": 20, "lr": 3e-3, "warmup": 5, "precision": "float32"}


def fresh(nb, small, **kind):
    torch.manual_seed(0)
    return nb.GuppyLM(nb.GuppyConfig(vocab_size=small[2].vocab_size, width=64, layers=2, heads=2, ffn=128, **kind))


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def timeless(history):
    return [{k: v for k, v in look.items() if k not in ("seconds", "weights")} for look in history]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def stop_at(nb, monkeypatch, step):
    """Ctrl-C at the beginning of a step."""
    true_rate = nb.learning_rate

    def rate(recipe, at):
        if at == step:
            raise KeyboardInterrupt
        return true_rate(recipe, at)
    monkeypatch.setattr(nb, "learning_rate", rate)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import conftest, notebook, torch
nb = notebook.load()
persona = nb.parse_persona(conftest.SMALL)
dataset = nb.make_dataset(persona, 5_000)
tokenizer = nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), 350)
torch.manual_seed(0)
model = nb.GuppyLM(nb.GuppyConfig(vocab_size=tokenizer.vocab_size, width=64, layers=2, heads=2, ffn=128))
true_rate = nb.learning_rate
def rate(recipe, step):
    if step == 47:
        os.kill(os.getpid(), signal.SIGKILL)
    return true_rate(recipe, step)
nb.learning_rate = rate
nb.train(model, tokenizer, dataset, nb.Recipe(**eval(sys.argv[2])), ["hello"], sys.argv[3])
"""


def test_killed_and_resumed_is_bit_identical(nb, small, tmp_path, capsys):
    persona, dataset, tokenizer = small
    whole = fresh(nb, small)
    history = nb.train(whole, tokenizer, dataset, nb.Recipe(**RECIPE), ["hello"])
    run = subprocess.run([sys.executable, "-c", KILLED, str(notebook.ROOT / "tests"), repr(RECIPE), str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr[-2_000:]
    assert len(files(tmp_path)) == 1 and files(tmp_path)[0].startswith("training-")
    torch.manual_seed(99)
    model = nb.GuppyLM(fresh(nb, small).config)
    assert not same_weights(model, whole)
    again = nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), ["hello"], tmp_path)
    assert "going on after step 40" in capsys.readouterr().out
    assert same_weights(model, whole) and timeless(again) == timeless(history)
    assert files(tmp_path) == [], "a finished run leaves no file"


@pytest.mark.parametrize("precision, dropout", [("float32", 0.1), ("float16", 0.0), ("bfloat16", 0.0)])
def test_stopped_and_resumed_is_bit_identical(nb, small, tmp_path, monkeypatch, precision, dropout):
    persona, dataset, tokenizer = small
    recipe = nb.Recipe(**RECIPE | {"precision": precision})
    whole, model = fresh(nb, small, dropout=dropout), fresh(nb, small, dropout=dropout)
    history = nb.train(whole, tokenizer, dataset, recipe)
    with monkeypatch.context() as patch:
        stop_at(nb, patch, 33)
        assert [look["step"] for look in nb.train(model, tokenizer, dataset, recipe, (), tmp_path)] == [20]
    again = nb.train(fresh(nb, small, dropout=dropout), tokenizer, dataset, recipe, (), None)
    assert timeless(again) == timeless(history), "without a folder nothing is kept"
    again = nb.train(model, tokenizer, dataset, recipe, (), tmp_path)
    assert same_weights(model, whole) and timeless(again) == timeless(history)


def test_damaged_checkpoint_is_named_and_set_aside(nb, small, tmp_path, monkeypatch, capsys):
    persona, dataset, tokenizer = small
    whole, model = fresh(nb, small), fresh(nb, small)
    nb.train(whole, tokenizer, dataset, nb.Recipe(**RECIPE))
    with monkeypatch.context() as patch:
        stop_at(nb, patch, 25)
        nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), (), tmp_path)
    name, = files(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:5_000])
    model = fresh(nb, small)
    nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), (), tmp_path)
    assert f"{name} is damaged" in capsys.readouterr().out and files(tmp_path) == [name.replace(".pt", ".damaged")]
    assert same_weights(model, whole)


def test_another_recipe_data_or_tokenizer_starts_anew(nb, small, tmp_path, monkeypatch, capsys):
    persona, dataset, tokenizer = small
    with monkeypatch.context() as patch:
        stop_at(nb, patch, 25)
        nb.train(fresh(nb, small), tokenizer, dataset, nb.Recipe(**RECIPE), (), tmp_path)
    stopped, = files(tmp_path)
    other = nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), 330)
    for data, reader, recipe in ((dataset, tokenizer, RECIPE | {"lr": 2e-3}), (dataset | {"train": dataset["train"][:-1]}, tokenizer, RECIPE),
                                 (dataset, other, RECIPE)):
        nb.train(fresh(nb, small), reader, data, nb.Recipe(**recipe), (), tmp_path)
        out = capsys.readouterr().out
        assert f"{stopped} is of another recipe, data or tokenizer" in out and "going on" not in out and files(tmp_path) == [stopped]


def test_a_loss_that_is_no_number_ends_the_run_with_the_last_good_weights(nb, small, tmp_path, monkeypatch, capsys):
    persona, dataset, tokenizer = small
    good, model, true_loss, calls = fresh(nb, small), fresh(nb, small), nb.reply_loss, []
    with monkeypatch.context() as patch:
        stop_at(nb, patch, 20)
        nb.train(good, tokenizer, dataset, nb.Recipe(**RECIPE))

    def loss(*arguments, **options):
        calls.append(torch.is_grad_enabled())
        return true_loss(*arguments, **options) * (float("nan") if sum(calls) == 30 else 1.0)
    monkeypatch.setattr(nb, "reply_loss", loss)
    history = nb.train(model, tokenizer, dataset, nb.Recipe(**RECIPE), (), tmp_path)
    assert [look["step"] for look in history] == [20] and same_weights(model, good) and not model.training
    assert "the loss is nan in step 40" in (out := capsys.readouterr().out) and "lower Recipe.lr" in out


def test_a_full_disk_does_not_stop_training(nb, small, tmp_path, monkeypatch, capsys):
    def full(state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", full)
    history = nb.train(fresh(nb, small), small[2], small[1], nb.Recipe(**RECIPE), (), tmp_path)
    assert history[-1]["step"] == 60 and files(tmp_path) == []
    assert capsys.readouterr().out.count("No space left on device; training goes on") == 2


def test_the_time_is_told_after_20_steps(nb, small, capsys):
    nb.train(fresh(nb, small), small[2], small[1], nb.Recipe(**RECIPE))
    assert capsys.readouterr().out.count("s a step: about ") == 1


def test_two_processes_train_as_one(tmp_path):
    """The notebook as a script, up to the end of training, under torchrun with two gloo processes and alone."""
    code = [cell["text"] for cell in notebook.cells() if cell["cell_type"] == "code"]
    last = next(i for i, text in enumerate(code) if "history = train(" in text)
    script = "\n\n".join(code[:last + 1])
    for old, new in (("PRECISION = pick_precision(DEVICE)", 'PRECISION = "float32"'), ("STEPS = 60 if SMOKE", "STEPS = 9 if SMOKE"),
                     ("every=max(20, STEPS // 12)", "every=3"), ("\nRANK and sys.exit()", '\njson.dump([h | {"weights": 0} for h in history], open(f"history-{WORLD}-{RANK}.json", "w"))\nRANK and sys.exit()')):
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    (tmp_path / "guppylm.py").write_text(script, encoding="utf-8")
    environment = os.environ | {"GUPPY_PRESET": "smoke", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    for command in ([sys.executable, "guppylm.py"], [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "guppylm.py"]):
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3_000:]
    assert run.stdout.count("preset smoke") == 1, "rank 0 alone speaks"
    alone, first, second = (json.loads((tmp_path / f"history-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert [look["step"] for look in alone] == [3, 6, 9] == [look["step"] for look in first]
    for a, b, c in zip(alone, first, second):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4) and b["val"] == pytest.approx(a["val"], abs=1e-4)
        assert c["loss"] == b["loss"] and c["val"] == b["val"], "all ranks hold the same weights"
    assert alone[0]["loss"] > alone[-1]["loss"] + 0.1


