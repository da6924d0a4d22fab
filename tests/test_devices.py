"""A GPU, pretended on the CPU: what the notebook defines runs on it, and what CUDA would refuse is noticed.

Compute capability 7.5 is a T4 (float16 with its scaler), 9.0 an H100 (bfloat16)."""
import ast
import itertools
import signal
import types

import notebook
import pytest
import torch
from conftest import fresh
from pretend_gpu import on_gpu, pretended_gpu

PRECISIONS = {(7, 5): "float16", (9, 0): "bfloat16"}


@pytest.fixture(scope="module", params=PRECISIONS, ids=PRECISIONS.values())
def gpu(request):
    """(the notebook's definitions as a machine with a GPU has them, the pretended GPU, the precision it should choose)"""
    with pretended_gpu(request.param) as there:
        yield notebook.load(), there, PRECISIONS[request.param]


@pytest.fixture(scope="module")
def little(small):
    """Persona, data and tokenizer of the small character, few of the data."""
    persona, dataset, tokenizer = small
    return persona, {"train": dataset["train"][:300], "val": dataset["val"][:40], "unseen": dataset["unseen"][:40]}, tokenizer


def model_on_gpu(nb, small):
    return fresh(nb, small, width=32).to(nb.DEVICE).eval()


def everything_is_on_the_gpu(model):
    return model.device == torch.device("cuda", 0) and all(on_gpu(p) for p in model.parameters())


def test_train_validate_stop_and_resume(gpu, little, tmp_path, monkeypatch, capsys):
    nb, there, precision = gpu
    persona, dataset, tokenizer = little
    assert (nb.DEVICE, nb.PRECISION, nb.Recipe().precision) == ("cuda", precision, precision)
    recipe = {"steps": 8, "every": 4, "batch": 8, "lr": 3e-3, "warmup": 2}
    whole, model = model_on_gpu(nb, little), model_on_gpu(nb, little)
    history = nb.train(whole, tokenizer, dataset, nb.Recipe(**recipe), ["hello"])
    true_rate = nb.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(nb, "learning_rate", lambda recipe, step: (signal.raise_signal(signal.SIGINT) if step == 5 else None, true_rate(recipe, step))[1])
        nb.train(model, tokenizer, dataset, nb.Recipe(**recipe), ["hello"], tmp_path)
    again = nb.train(model, tokenizer, dataset, nb.Recipe(**recipe), ["hello"], tmp_path)
    assert "going on after step 6" in capsys.readouterr().out
    assert [entry["step"] for entry in again] == [4, 8] and [entry["losses"] for entry in again] == [entry["losses"] for entry in history]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True)) and everything_is_on_the_gpu(model)
    assert not any(on_gpu(p) for entry in again for p in entry["weights"].values()), "the history does not fill the GPU"
    assert nb.evaluate(model, tokenizer, dataset["val"]) == pytest.approx(again[-1]["val"])


def test_talk_exam_files_and_the_rounded_model(gpu, little, tmp_path):
    nb, there, precision = gpu
    persona, dataset, tokenizer = little
    model = model_on_gpu(nb, little)
    moves = there.moves
    prompts = [nb.encode_chat(tokenizer, text)[0] for text in ("hello", "is the saw red?", "hello")]
    assert len(nb.generate(model, prompts, limit=6, seed=1)) == 3 and there.moves > moves, "it went to the GPU and back"
    assert isinstance(nb.chat("hello", model, tokenizer, seed=0), str)
    questions = nb.exam_questions(persona, dataset, 4, 0)
    scores, _ = nb.grade(persona, dataset, questions, nb.answers(model, tokenizer, questions, 0))
    assert scores.keys() == nb.exam(model, tokenizer, persona, dataset, n=4).keys()
    rounded = nb.dequantised(model)
    assert everything_is_on_the_gpu(rounded) and nb.exam(rounded, tokenizer, persona, dataset, n=4).keys() == scores.keys()
    nb.save_pretrained(model, tokenizer, tmp_path)
    again, same = nb.load_pretrained(tmp_path)
    assert everything_is_on_the_gpu(again) and all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    assert nb.quantise(model) and nb.write_page(again, same, tmp_path / "page.html", "robot", ["hello"]).is_file()


def test_the_boxes(gpu, little):
    nb, there, precision = gpu
    persona, dataset, tokenizer = little
    model = model_on_gpu(nb, little)
    prompt = nb.encode_chat(tokenizer, "is the saw red?")[0]
    assert nb.generate_cached(model, prompt, limit=6, seed=2) == nb.generate(model, [prompt], limit=6, seed=2)[0]
    cache = {}
    assert on_gpu(nb.extend(model, prompt, cache)) and all(on_gpu(part) for pair in cache.values() for part in pair)
    before = nb.attention_of(model, prompt)
    with nb.heads_off(model, [(0, 1)]):
        after = nb.attention_of(model, prompt)
    assert before[0, 1].any() and after[0, 0].any() and not on_gpu(before), "maps are read on the CPU"
    assert nb.lens(model, prompt).shape == (3, len(prompt), tokenizer.vocab_size)
    ids, counts = next(iter(nb.rows_by_length(tokenizer, dataset["val"]).values()))
    assert on_gpu(ids) and not on_gpu(counts) and on_gpu(nb.reply_loss(model, ids, counts))


def test_each_process_takes_its_own_gpu(gpu, monkeypatch):
    """What torchrun's processes do on a machine with GPUs; here there is one GPU, so a second process is told so."""
    nb, there, precision = gpu
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: calls.append(("gpu", number)))
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda address, timeout: iter([(torch.distributed.HashStore(), 0, 1)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout, **_: calls.append((backend, timeout.total_seconds() < 60)))
    nb.join_ranks()
    assert calls == [("gpu", 0), ("nccl", True)]
    monkeypatch.setattr(nb, "LOCAL_RANK", 1)
    with pytest.raises(ValueError, match="process 1 has no GPU, there are 1"):
        nb.join_ranks()
    assert len(calls) == 2


def test_a_gpu_without_code_in_this_torch(gpu, monkeypatch, capsys):
    """torch sees it, and the first computation fails: the CPU is used, and that is said."""
    nb, there, precision = gpu
    assert nb.pick_device() == "cuda" and not capsys.readouterr().out

    def fails(*size, **options):
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors ...")
    monkeypatch.setattr(torch, "ones", fails)
    assert nb.pick_device() == "cpu"
    said = capsys.readouterr().out
    assert "(CUDA error: no kernel image is available for execution on the device)." in said and "install a build of torch" in said
    monkeypatch.setattr(nb, "WORLD", 2)
    assert nb.pick_device() == "cuda", "of several processes, each tries its own GPU later"


# ---- a planted mistake of each kind ----

PLANTED = {  # what CUDA refuses: where it is planted, the line of today, the broken one, what is then called
    "two devices": ("generate", "], device=model.device)", "])", "same device", lambda nb, model, ids: nb.generate(model, [ids], limit=3)),
    "a CPU generator": ("generate", "temperature, top_k).cpu()", "temperature, top_k)", "generator",
                        lambda nb, model, ids: nb.generate(model, [ids], limit=3, seed=0)),
    "numpy of a GPU tensor": ("lens", "F.softmax(said, -1).cpu()", "F.softmax(said, -1).numpy()", "numpy", lambda nb, model, ids: nb.lens(model, ids)),
    "a GPU index": ("batches", "loss_mask[picked]", "loss_mask[picked.to(ids.device)]", "indices should be",
                    lambda nb, model, ids: next(nb.batches({2: (torch.zeros(4, 2, device="cuda"), torch.zeros(4, 2))}, 2, torch.Generator()))),
}


def with_mistake(nb, name, old, new):
    """The definitions with one of them changed."""
    texts = (cell["text"] for cell in notebook.cells() if cell["cell_type"] == "code")
    node, = (node for node in itertools.chain.from_iterable(ast.parse(text).body for text in texts) if getattr(node, "name", "") == name)
    text = ast.unparse(node)
    assert text.count(old) == 1, f"adapt the planted mistake to {name} of today"
    broken = types.ModuleType("broken")
    vars(broken).update(vars(nb))
    exec(text.replace(old, new), vars(broken))
    return broken


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_mistakes_are_caught(gpu, little, kind):
    nb, there, precision = gpu
    name, old, new, says, call = PLANTED[kind]
    model, ids = model_on_gpu(nb, little), nb.encode_chat(little[2], "hello")[0]
    call(nb, model, ids)
    with pytest.raises((RuntimeError, TypeError), match=says):
        call(with_mistake(nb, name, old, new), model, ids)


def test_without_the_pretence_there_is_none():
    """What the pretence changes it puts back."""
    before = torch.cuda.is_available, torch.autocast, torch.tensor, torch.nn.Parameter.__new__
    with pretended_gpu((7, 5)):
        assert torch.cuda.is_available() and torch.zeros(2, device="cuda").device.type == "cuda" and torch.zeros(2).device.type == "cpu"
    assert before == (torch.cuda.is_available, torch.autocast, torch.tensor, torch.nn.Parameter.__new__)
