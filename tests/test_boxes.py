"""Part II: what is built by hand equals the real thing, on fresh random inputs and models."""
import copy
import math
import random
import re
import time

import notebook
import numpy as np
import pytest
import torch
import torch.nn.functional as F


def fresh_model(nb, seed, std=0.15, **kind):
    """A small random fish whose weights are large enough to matter."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 300, "context": 48, "width": 48, "layers": 3, "heads": 4, "ffn": 80} | kind
    model = nb.GuppyLM(nb.GuppyConfig(**sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def to_values(nb, tensor):
    return [[nb.Value(x) for x in row] for row in tensor.tolist()]


def assert_gradients(values, tensor):
    assert np.allclose([[value.grad for value in row] for row in values], tensor.grad.numpy(), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("seed", range(8))
def test_value_on_random_expressions(nb, seed):
    """Thirty random operations on random numbers, each result open to be used again: values and gradients are torch's."""
    rng = random.Random(seed)
    tensors = [torch.tensor(rng.uniform(-2, 2), dtype=torch.double, requires_grad=True) for _ in range(5)]
    values = [nb.Value(t.item()) for t in tensors]
    leaves, pool = list(zip(values, tensors)), list(zip(values, tensors))
    operations = {"+": lambda x, y: x + y, "*": lambda x, y: x * y, "+ number": lambda x, y: 0.5 + x, "* number": lambda x, y: -1.5 * x,
                  "power": lambda x, y: x ** 3, "quotient": lambda x, y: (x * x + 1.0) ** -1 * y, "log": lambda x, y: (x * x + 0.5).log(),
                  "relu": lambda x, y: x.relu(), "exp": lambda x, y: ((x.relu() + 1.0) ** -1).exp()}
    while len(pool) < 35:
        (a, s), (b, t) = rng.choice(pool), rng.choice(pool)
        operation = operations[rng.choice(sorted(operations))]
        value, tensor = operation(a, b), operation(s, t)
        if abs(tensor.item()) < 50:
            assert value.data == pytest.approx(tensor.item(), rel=1e-9, abs=1e-12)
            pool.append((value, tensor))
    total, expected = sum((v for v, _ in pool[1:]), pool[0][0]), sum(t for _, t in pool)
    total.backward()
    expected.backward()
    for value, tensor in leaves:
        assert value.grad == pytest.approx(tensor.grad.item(), rel=1e-8, abs=1e-9)


def test_value_survives_a_long_chain_and_a_leaf_alone(nb):
    x = total = nb.Value(1.0)
    for _ in range(20_000):
        total = total + x
    total.backward()
    assert total.data == x.grad == 20_001
    x = nb.Value(3.0)
    x.backward()
    assert x.grad == 1
    y = nb.Value(2.0)
    (y * y).backward()
    assert y.grad == 4, "used twice in one product"


@pytest.mark.parametrize("T,C", [(1, 2), (5, 3), (4, 6)])
def test_a_layer_of_attention_and_relu_on_value(nb, T, C):
    torch.manual_seed(T)
    tensors = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in [(T, C)] + [(C, C)] * 5]
    lists = [to_values(nb, t) for t in tensors]
    result = nb.small_layer(*lists)
    x, q, k, v, up, down = tensors
    x = F.scaled_dot_product_attention((x @ q.T)[None], (x @ k.T)[None], (x @ v.T)[None], is_causal=True)[0]
    expected = F.relu(x @ up.T) @ down.T
    assert np.allclose([[value.data for value in row] for row in result], expected.detach().numpy())
    weights = torch.randn(T, C, dtype=torch.double)
    sum((value * w for row, ws in zip(result, weights.tolist()) for value, w in zip(row, ws)), nb.Value(0.0)).backward()
    (expected * weights).sum().backward()
    for values, tensor in zip(lists, tensors):
        assert_gradients(values, tensor)


def test_softmax_and_dot(nb):
    scores = [1e3, 1e3 - 2.0, -1e3]
    assert [p.data for p in nb.softmax([nb.Value(s) for s in scores])] == pytest.approx(torch.tensor(scores, dtype=torch.double).softmax(0).tolist())
    rng = random.Random(3)
    a, b = ([rng.gauss(0, 1) for _ in range(9)] for _ in "ab")
    short, long = ([nb.Value(x) for x in a + b] for _ in "ab")
    nb.dot(short[:9], short[9:]).backward()
    sum((x * y for x, y in zip(long[:9], long[9:])), nb.Value(0.0)).backward()
    assert [x.grad for x in short] == pytest.approx([x.grad for x in long])


def name_loss_in_torch(weights, ids, heads):
    """The GPT of section 16 once more, all positions at once, in torch."""
    def norm(x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5
    T = len(ids) - 1
    x = weights["token"][ids[:-1]] + weights["position"][:T]
    q, k, v = ((norm(x) @ weights[name].T).view(T, heads, -1).transpose(0, 1) for name in "qkv")
    x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(T, -1) @ weights["out"].T
    x = x + F.relu(norm(x) @ weights["up"].T) @ weights["down"].T
    return F.cross_entropy(norm(x) @ weights["token"].T, torch.tensor(ids[1:]), reduction="sum")


def test_the_gpt_on_value_against_torch(nb):
    torch.manual_seed(4)
    shapes = {"token": (7, 8), "position": (16, 8), "q": (8, 8), "k": (8, 8), "v": (8, 8), "out": (8, 8), "up": (32, 8), "down": (8, 32)}
    tensors = {name: (0.4 * torch.randn(shape, dtype=torch.double)).requires_grad_() for name, shape in shapes.items()}
    weights = {name: to_values(nb, t) for name, t in tensors.items()}
    ids = [0, 3, 6, 3, 1, 5, 0]
    ours, theirs = nb.name_loss(weights, ids), name_loss_in_torch(tensors, ids, 4)
    assert ours.data == pytest.approx(theirs.item())
    ours.backward()
    theirs.backward()
    for name, tensor in tensors.items():
        assert_gradients(weights[name], tensor)


def test_learning_names_lowers_the_loss(nb):
    rows = [nb.letters_of_names().encode(f".{name}.") for name in ("guppy", "gupra", "gupo")]
    weights, losses = nb.learn_names(rows, 26, 45, random.Random(0), C=8)
    assert len(losses) == 45 and np.mean(losses[-6:]) < 0.7 * losses[0]
    assert abs(losses[0] - math.log(26)) < 0.5, "at first every character is alike"


@pytest.mark.parametrize("seed", [0, 1, 77])
def test_names(nb, seed):
    names = nb.fish_names(1_000, random.Random(seed))
    assert len(set(names)) == 1_000 and names == nb.fish_names(1_000, random.Random(seed))
    letters = nb.letters_of_names()
    assert all(letters.decode(letters.encode(name)) == name and len(name) <= 15 for name in names)
    rng, V = random.Random(seed), len(letters.characters)
    weights, _ = nb.learn_names([letters.encode(f".{name}.") for name in names[100:]], V, 3, rng, C=4)
    taken = [nb.invent(weights, letters, random.Random(1)) for _ in range(3)] + names
    found, repeated = nb.new_names(5, weights, letters, taken, random.Random(1))
    assert len(set(found)) == 5 and not set(found) & set(taken) and "" not in found and repeated >= 1
    assert all(set(name) <= set(letters.characters) - {"."} for name in found)


@pytest.mark.parametrize("betas,decay", [((0.9, 0.95), 0.1), ((0.8, 0.999), 0.5), ((0.0, 0.0), 0.0)])
def test_adamw_by_hand(nb, betas, decay):
    recipe = nb.Recipe(steps=25, lr=3e-3, warmup=5, betas=betas, weight_decay=decay)
    ours = fresh_model(nb, 5)
    theirs = copy.deepcopy(ours)
    groups, library, moments = nb.make_optimizer(ours, recipe).param_groups, nb.make_optimizer(theirs, recipe), {}
    start = [p.detach().clone() for p in ours.parameters()]
    torch.manual_seed(6)
    for step in range(1, 26):
        for a, b in zip(ours.parameters(), theirs.parameters()):
            a.grad = torch.randn_like(a) * 10.0 ** torch.randint(-4, 3, (1,)).item()
            b.grad = a.grad.clone()
        for group in groups + library.param_groups:
            group["lr"] = nb.learning_rate(recipe, step - 1)
        nb.adamw_step(groups, moments, step, betas)
        library.step()
    for a, b, old in zip(ours.parameters(), theirs.parameters(), start):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(a, old, atol=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(moments[a][0], library.state[b]["exp_avg"])
        torch.testing.assert_close(moments[a][1], library.state[b]["exp_avg_sq"])


@pytest.mark.parametrize("seed,kind", [(7, {}), (8, {"layers": 1, "heads": 1}), (9, {"width": 60, "heads": 5, "layers": 4})])
def test_numpy_forward(nb, seed, kind):
    model = fresh_model(nb, seed, **kind)
    weights = {name: p.numpy() for name, p in model.state_dict().items()}
    for T in (1, 2, 31, 48):
        ids = torch.randint(300, (T,))
        with torch.no_grad():
            expected = model(ids[None])[0].numpy()
        assert np.allclose(nb.numpy_logits(weights, ids.tolist(), model.config.heads), expected, atol=2e-4, rtol=1e-4)


def test_numpy_forward_is_short(nb):
    text = next(c["text"] for c in notebook.cells() if "def numpy_logits" in c["text"])
    assert len([line for line in text.splitlines() if line.strip()]) <= 40


@pytest.mark.parametrize("seed", [10, 11, 12])
def test_the_cache_says_what_generate_says(nb, seed):
    model = fresh_model(nb, seed, std=0.08)
    rng = random.Random(seed)
    for temperature in (0, 0.7, 1.3):
        for length in (1, 2, 20, 46):
            ids = [rng.randrange(3, 300) for _ in range(length)]
            slow = nb.generate(model, [ids], temperature, 40, limit=40, seed=seed)[0]
            assert nb.generate_cached(model, ids, temperature, 40, limit=40, seed=seed) == slow
    assert nb.generate_cached(model, list(range(3, 51)), seed=0) == nb.generate(model, [list(range(3, 51))], seed=0)[0] == []
    assert len(nb.generate_cached(model, [5, 6], limit=3, seed=0)) <= 3


def test_the_cache_in_pieces_of_any_size(nb):
    model = fresh_model(nb, 13)
    ids, cache, at = torch.randint(3, 300, (40,)).tolist(), {}, 0
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    for n in (1, 7, 1, 20, 11):
        torch.testing.assert_close(nb.extend(model, ids[at:at + n], cache), expected[at + n - 1], atol=2e-4, rtol=1e-4)
        at += n
    assert all(x.shape == (4, 40, 12) for pair in cache.values() for x in pair) and len(cache) == 3


def test_copy_cases_and_their_scores(nb, small):
    persona, dataset, tokenizer = small
    questions = nb.exam_questions(persona, dataset, 60)
    cases = nb.copy_cases(tokenizer, questions)[:12]
    assert 0 < len(cases) <= 12
    for word, ids, n, source, target in cases:
        assert n > 1 and source + n <= target and ids[source:source + n] == ids[target:target + n]
        assert tokenizer.decode(ids[source:source + n]) == f" {word}"
    model = fresh_model(nb, 14, vocab_size=tokenizer.vocab_size, context=128)
    (layer, head), scores = nb.find_copying_head(model, cases)
    rows = [nb.attention_of(model, case.ids)[:, :, case.target + i - 1, case.source + i] for case in cases for i in range(case.pieces)]
    torch.testing.assert_close(scores, torch.stack(rows).mean(0))
    assert scores.shape == (3, 4) and scores[layer, head] == scores.max()
    right = []
    for case in cases:
        with torch.no_grad():
            likeliest = model(torch.tensor([case.ids]))[0].argmax(-1)
        right.append([int(likeliest[case.target + i - 1]) == case.ids[case.source + i] for i in range(case.pieces)])
    later = [hit for hits in right for hit in hits[1:]]
    assert nb.pieces_right(model, cases) == pytest.approx((sum(hits[0] for hits in right) / len(right), sum(later) / len(later)))
    assert nb.copy_cases(tokenizer, [question for question in questions if question[1] is None]) == []
    assert nb.copy_cases(tokenizer, questions, context=5) == [], "rows that do not fit are left out"
    right = []                                                       # the rest of the same replies: what the loss counts, without the word
    for case, (ids, counts) in ((case, nb.encode_chat(tokenizer, nb.normalise(c.prompt), c.reply)) for case in cases
                                for _, word, c in questions if word == case.word and nb.encode_chat(tokenizer, nb.normalise(c.prompt), c.reply)[0] == case.ids):
        with torch.no_grad():
            likeliest = model(torch.tensor([ids]))[0].argmax(-1)
        right += [int(likeliest[t - 1]) == ids[t] for t in range(len(ids)) if counts[t] and not 0 <= t - case.target < case.pieces]
    assert nb.others_right(model, tokenizer, cases) == pytest.approx(sum(right) / len(right)) and len(right) > 8 * len(cases)


def test_the_word_and_the_rest_of_its_reply_are_told_apart(nb, small):
    """Oracles that know the reply but for the word, the word alone, and all."""
    persona, dataset, tokenizer = small
    case = nb.copy_cases(tokenizer, nb.exam_questions(persona, dataset, 60))[0]
    word = range(case.target, case.target + case.pieces)

    def oracle(knows):
        def model(ids):
            return F.one_hot(torch.tensor([[ids[0, t + 1] if t + 1 < ids.shape[1] and knows(t + 1) else 0 for t in range(ids.shape[1])]]), 400).float()
        model.eval, model.device = lambda: model, "cpu"
        return model

    for knows, pieces, others in ((lambda t: t not in word, (0, 0), 1), (lambda t: t in word, (1, 1), 0), (lambda t: True, (1, 1), 1),
                                  (lambda t: t == word[0], (1, 0), 0), (lambda t: t in word[1:], (0, 1), 0)):
        assert nb.pieces_right(oracle(knows), [case]) == pieces and nb.others_right(oracle(knows), tokenizer, [case]) == others


def test_a_planted_copying_head_is_found(nb, small):
    """A head whose attention is replaced by perfect copying gets the score 1 and is the one that is found."""
    persona, dataset, tokenizer = small
    case = nb.copy_cases(tokenizer, nb.exam_questions(persona, dataset, 60))[0]
    model = fresh_model(nb, 17, std=0.02, vocab_size=tokenizer.vocab_size, context=128)

    def copies(module, inputs, attention):
        planted = attention.clone()
        for i in range(case.pieces):
            planted[:, 3, case.target + i - 1] = 0
            planted[:, 3, case.target + i - 1, case.source + i] = 1
        return planted

    hook = model.blocks[1].attn.dropout.register_forward_hook(copies)
    where, scores = nb.find_copying_head(model, [case])
    hook.remove()
    assert where == (1, 3) and scores[1, 3] == 1


def test_a_planted_head_that_looks_one_back_is_found(nb, small):
    persona, dataset, tokenizer = small
    cases = nb.copy_cases(tokenizer, nb.exam_questions(persona, dataset, 60))[:5]
    model = fresh_model(nb, 17, std=0.02, vocab_size=tokenizer.vocab_size, context=128)

    def one_back(module, inputs, attention):
        planted = attention.clone()
        planted[:, 2] = torch.eye(attention.shape[-1]).roll(-1, 1)   # row t looks at t - 1
        return planted

    hook = model.blocks[0].attn.dropout.register_forward_hook(one_back)
    back = nb.looks_one_back(model, cases)
    hook.remove()
    assert back.shape == (3, 4) and back[0, 2] == 1
    others = [back[layer, head] for layer in range(3) for head in range(4) if (layer, head) != (0, 2)]
    assert max(others) < 0.5


def test_heads_are_switched_off_beside_others_of_their_layer(nb, small):
    """The rows of the table with heads off: the pair that looks one back, and beside it a pair of the same layers; no pair in a model
    that has none."""
    persona, dataset, tokenizer = small
    questions = nb.exam_questions(persona, dataset, 60)
    cases = nb.copy_cases(tokenizer, questions)[:2]
    asked = [question for question in questions if question[0] == "copy"][:1]
    model = fresh_model(nb, 17, vocab_size=tokenizer.vocab_size, context=128)
    looks = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0], [0.6, 0.9, 0.7, 0.8]])
    back = torch.tensor([[0.9, 0.1, 0.8, 0.3], [0.0, 0.1, 0.2, 0.3], [1.0, 1.0, 1.0, 1.0]])
    rows = {name: heads for name, *_, heads in nb.heads_table(model, tokenizer, persona, cases, looks, back, asked)}
    assert rows["the best"] == "2.1" and rows["the best four"] == "2.1 2.3 2.2 2.0"
    assert rows["two that look one back"] == "0.0 0.2" and rows["two beside them"] == "0.1 0.3"
    off = {name: shares for name, *shares, _ in nb.heads_table(model, tokenizer, persona, cases, looks, back, asked)}
    assert len(off) == 7 and len(off["none"]) == 4
    narrow = fresh_model(nb, 17, vocab_size=tokenizer.vocab_size, context=128, layers=1)
    rows = [name for name, *_ in nb.heads_table(narrow, tokenizer, persona, cases, looks[:1], back[:1], asked)]
    assert "two that look one back" not in rows and "two beside them" not in rows


def test_on_a_plane(nb):
    """PCA of unit vectors: the two directions of largest variance, whatever the lengths and the signs."""
    torch.manual_seed(18)
    vectors = torch.randn(40, 6, dtype=torch.double) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.2, 0.1])
    places = nb.on_a_plane(vectors)
    units = F.normalize(vectors, dim=1)
    units = units - units.mean(0)
    values, directions = torch.linalg.eigh(units.T @ units)
    torch.testing.assert_close(places.abs(), (units @ directions[:, [-1, -2]]).abs())
    torch.testing.assert_close(nb.on_a_plane(vectors * torch.rand(40, 1).double().add(0.1)), places)
    torch.testing.assert_close(places.square().sum(0), values[[-1, -2]])


def test_kinds_of_words(nb, small, persona, dataset, tokenizer):
    kinds = nb.kinds_of_words(persona, dataset, tokenizer)
    assert {"object", "snack", "few"} <= kinds.keys() and len(kinds) <= 5
    assert not kinds.keys() & persona.held_out_words.keys()
    words = [word for group in kinds.values() for word in group]
    assert len(set(words)) == len(words) and all(len(tokenizer.encode(f" {word}")) == 1 for word in words)
    for script in (nb.ROLLO, None):
        character = nb.parse_persona(script) if script else small[0]
        data = nb.make_dataset(character, 5_000)
        reads = nb.BPETokenizer.train(nb.chat_texts(data["train"]), nb.VOCABULARY)
        groups = nb.kinds_of_words(character, data, reads)
        assert groups and all(len(group) >= 3 for group in groups.values())
        assert (len(groups) > 1) == bool(script), "a script without enough pools shows its common words"


def test_words_without_edges(nb):
    """Where no space stands before a word, its pieces are found without one; single letters are the common words."""
    persona = nb.read_persona(notebook.ROOT / "assets/personas/alei.txt")
    dataset = nb.make_dataset(persona, 5_000)
    tokenizer = nb.BPETokenizer.train(nb.chat_texts(dataset["train"]), nb.VOCABULARY)
    questions = nb.exam_questions(persona, dataset, 40)
    cases = nb.copy_cases(tokenizer, questions, gap=persona.gap)
    assert len(cases) > 20 and nb.copy_cases(tokenizer, questions) == []
    for case in cases:
        pieces = tokenizer.encode(case.word)
        assert case.ids[case.source:case.source + len(pieces)] == pieces == case.ids[case.target:case.target + len(pieces)]
    words, = nb.kinds_of_words(persona, dataset, tokenizer).values()
    assert len(words) > 20 and all(len(tokenizer.encode(word)) == 1 for word in words)
    question = next(q for q in questions if q[0] == "copy" and nb.is_right(persona, q, q[2].reply))
    wrong = next(text for text in ("云海", "木川", "石风") if text not in question[2].prompt)
    assert nb.kind_of_failure(persona, question, question[2].reply.replace(question[1], wrong)) == "another word"


def test_no_words_to_draw(nb, capsys):
    nb.plot_words(None, None, {"common words": []})
    assert "nothing to draw" in capsys.readouterr().out


def test_hooks_go_when_a_cell_is_stopped(nb):
    model = fresh_model(nb, 17)
    for look in (nb.attention_of, nb.lens):
        with pytest.raises(ValueError, match="do not fit"):
            look(model, [5] * 60)
    assert not any(block._forward_hooks or block._forward_pre_hooks or block.attn.dropout._forward_hooks for block in model.blocks)


def test_a_section_is_timed_once(nb, capsys):
    nb.note_seconds("99 test", started=[time.time() - 5])
    nb.note_seconds("99 test", started=[time.time() - 50])
    assert 4 < nb.CLOCK["99 test"] < 10
    nb.note_seconds("99 test", at_least=100)
    assert nb.CLOCK.pop("99 test") == 100


def test_in_order(nb):
    """Parents stand before what they made, each Value once, inputs left out."""
    rng = random.Random(19)
    values = [nb.Value(rng.random()) for _ in range(4)]
    for _ in range(60):
        values.append(rng.choice([lambda x, y: x + y, lambda x, y: x * y])(rng.choice(values), rng.choice(values)))
    order = nb.in_order(values[-1])
    assert len(set(order)) == len(order) and order[-1] is values[-1]
    places = {value: n for n, value in enumerate(order)}
    assert all(not parent.parents or places[parent] < places[value] for value in order for parent in value.parents)


def test_heads_off(nb):
    """A head that is off is a head whose columns of the output matrix are zero; afterwards all is as before."""
    model, ids = fresh_model(nb, 15), torch.randint(3, 300, (2, 20))
    cut = copy.deepcopy(model)
    with torch.no_grad():
        before = model(ids)
        for layer, head in ((0, 1), (0, 3), (2, 0)):
            cut.blocks[layer].attn.out.weight[:, head * 12:head * 12 + 12] = 0
        with nb.heads_off(model, [(0, 1), (0, 3), (2, 0)]):
            torch.testing.assert_close(model(ids), cut(ids))
        with pytest.raises(KeyError), nb.heads_off(model, [(1, 1)]):
            raise KeyError
        with nb.heads_off(model, []):
            assert torch.equal(model(ids), before)
        assert torch.equal(model(ids), before)


def test_lens(nb):
    model, ids = fresh_model(nb, 16), torch.randint(3, 300, (20,)).tolist()
    said = nb.lens(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(said[-1], F.softmax(model(torch.tensor([ids]))[0], -1), atol=1e-5, rtol=1e-4)
        x = model.tok_emb(torch.tensor(ids)) + model.pos_emb.weight[:20]
        torch.testing.assert_close(said[0], F.softmax(model.norm(x) @ model.tok_emb.weight.T, -1), atol=1e-5, rtol=1e-4)
        shorter = copy.deepcopy(model)
        shorter.blocks = shorter.blocks[:2]
        torch.testing.assert_close(said[2], F.softmax(shorter(torch.tensor([ids]))[0], -1), atol=1e-5, rtol=1e-4)
    assert said.shape == (4, 20, 300) and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_breaking(nb, small):
    persona, dataset, tokenizer = small
    rows = nb.rows_by_length(tokenizer, dataset["train"][:300])
    recipe = nb.Recipe(steps=12, lr=3e-3, batch=8)
    calm, heavy, loose = (nb.small_fish(tokenizer.vocab_size) for _ in range(3))
    losses = nb.short_run(calm, rows, recipe), nb.short_run(heavy, rows, recipe, heavy=6)
    assert len(losses[0]) == 12 and np.allclose(*losses, atol=1e-2), "clipped, a heavy batch pulls no harder than others"
    unclipped = nb.short_run(loose, rows, nb.Recipe(steps=12, lr=3e-3, batch=8, clip=math.inf), heavy=6)
    assert np.mean(unclipped[7:]) > np.mean(losses[0][7:]) + 0.05 and math.isfinite(unclipped[-1])
    ids = torch.randint(3, 300, (1, 20))
    changed = ids.clone()
    changed[:, -1] = 5 if ids[0, -1] != 5 else 6
    for causal in (True, False):
        fish = nb.small_fish(tokenizer.vocab_size, causal)
        with torch.no_grad():
            assert torch.allclose(fish(ids)[:, :-1], fish(changed)[:, :-1], atol=1e-7) == causal


def solutions():
    text = "\n".join(cell["text"] for cell in notebook.cells() if cell["cell_type"] == "markdown")
    return {re.search(r"def (\w+)", block)[1]: block for block in re.findall(r"<details>.*?```python\n(.*?)```", text, re.S)}


@pytest.mark.parametrize("name,wrong", [("tanh", lambda x: x), ("nucleus", lambda p, share: p), ("cache_bytes", lambda config, tokens: 8 * tokens)])
def test_exercises(nb, name, wrong):
    check = getattr(nb, f"check_{name}")
    assert check(getattr(nb, name)) == "not yet"
    scope = dict(vars(nb))
    exec(solutions()[name], scope)
    assert check(scope[name]) == "right"
    assert check(wrong) not in ("right", "not yet")
