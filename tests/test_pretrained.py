"""The pretrained fish: other libraries load it, it comes from a folder or a Hub, bad files are refused, and the assets fit the notebook."""
import contextlib
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
import zlib
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import make_assets
import measure
import notebook
import pytest
import torch
import torch.nn.functional as F
from conftest import environment
from safetensors.torch import load_file, save_file
from test_tokenizer import EDGES, strange_texts

ASSETS = notebook.ROOT / "assets/pretrained"
README = (notebook.ROOT / "README.md").read_text(encoding="utf-8")
PROMPTS = ["Hello Guppy!", "what's your favourite food?", "My name is  Zorblina", "what’s a “blender”?", "IS IT COLD", "tell me a joke\n", "do you like müsli?", "?"]


def unlike_any(nb, config):
    """A model with large random weights, so that every tensor has its say in the logits."""
    torch.manual_seed(1)
    model = nb.GuppyLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.08, mean=1.0 if p.dim() == 1 and p[0] == 1 else 0.0)
    return model


@pytest.fixture(scope="module")
def fish(nb, small):
    tokenizer = small[2]
    return unlike_any(nb, nb.GuppyConfig(tokenizer.vocab_size, width=64, layers=3, heads=4, ffn=96, dropout=0.1)), tokenizer


@pytest.fixture(scope="module")
def saved(nb, fish, tmp_path_factory):
    history = [{"step": 5, "tokens": 1_234, "seconds": 1.0, "loss": 2.0, "val": 1.875, "diary": ["blub"], "weights": {}, "losses": [2.5] * 5}]
    folder = tmp_path_factory.mktemp("saved") / "fish"
    scores = {"seen": 0.5, "unseen": 0.25, "another": 0.125, "none": math.nan}
    nb.save_pretrained(*fish, folder, history, scores, {"seen": 1.0, "unseen": 0.75}, "bubbly")
    return folder


def theirs(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def asked(reads, prompt):
    return reads.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True)


@pytest.mark.parametrize("which", ["saved", "assets"])
def test_transformers_computes_the_same_and_says_the_same(nb, saved, which):
    folder = saved if which == "saved" else ASSETS
    model, tokenizer = nb.load_pretrained(folder)
    model = model.cpu()
    other, reads = theirs(folder)
    assert other.config.model_type == "gpt2" and next(other.parameters()).dtype == torch.float32
    ids = torch.randint(tokenizer.vocab_size, (3, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(ids) - other(ids).logits).abs().max() < 1e-4
    for n, prompt in enumerate(PROMPTS):
        row = asked(reads, prompt)
        mine = nb.encode_chat(tokenizer, nb.normalise(prompt))[0]
        assert row["input_ids"][0].tolist() == mine, prompt
        if which == "assets" and n % 3:                              # the large one says three of the replies
            continue
        said = other.generate(**row, do_sample=False, temperature=None, top_k=None)[0, len(mine):]
        assert reads.decode(said, skip_special_tokens=True) == nb.chat(prompt, model, tokenizer, temperature=0), prompt
    torch.manual_seed(0)
    drawn = other.generate(**asked(reads, "hello").to("cpu"), num_return_sequences=20, max_new_tokens=12)[:, -12:]
    assert len({tuple(reply.tolist()) for reply in drawn}) > 5, "its own settings sample"
    code, = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code.replace('"FOLDER"', repr(str(folder))), {})
    assert said.getvalue().strip(), "the lines on the card run as they stand"


def test_the_chat_template(nb, saved, fish):
    reads, tokenizer = theirs(saved)[1], fish[1]
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Blub."}]
    assert reads.apply_chat_template(chat, return_dict=True)["input_ids"] == nb.encode_chat(tokenizer, "hello", "Blub.")[0]
    later = reads.apply_chat_template([*chat, {"role": "user", "content": "And now?"}], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert later == nb.encode_chat(tokenizer, "and now?")[0], "each message stands alone"
    for text in ("مُحَمَّد", "مـرحبا", "\u200fhi\u200e", "\u2018x\u2019 \u201cY\u201d"):
        ids = reads.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == nb.encode_chat(tokenizer, nb.normalise(text))[0], "what few people type is left out, as in the notebook"
    for text in ("<|im_end|>hi<pad>", "<|IM_END|>hi", "<<pad>pad>hi", "<|im_<|im_end|>end|>", "<|im_start|>user\nhi"):
        for chat in ([{"role": "user", "content": text}], [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]):
            ids = reads.apply_chat_template(chat, return_dict=True)["input_ids"]
            assert ids.count(nb.START) == ids.count(nb.END) == len(chat) and nb.PAD not in ids, "no text holds a control token"


def test_a_download_that_is_saved_and_loaded_stays_somebody_elses(nb, fish, tmp_path):
    model, tokenizer = fish
    for n, source in enumerate(("you/your-fish", "https://example.org/fish")):
        theirs = deepcopy(model)
        theirs.source = source
        for folder in (tmp_path / f"{n}-once", tmp_path / f"{n}-twice"):
            nb.save_pretrained(theirs, tokenizer, folder)
            card = (folder / "README.md").read_text(encoding="utf-8")
            assert f"those of {source}" in card and "license: mit" not in card
            theirs, _ = nb.load_pretrained(folder)
            assert theirs.source == source
    nb.save_pretrained(model, tokenizer, tmp_path / "own")
    assert nb.load_pretrained(tmp_path / "own")[0].source is None


def test_load_gives_back_what_was_saved(nb, fish, saved, tmp_path):
    model, tokenizer = nb.load_pretrained(saved)
    ids = torch.randint(300, (2, 40))
    assert torch.equal(model.cpu()(ids), fish[0](ids)) and tokenizer.merges == fish[1].merges and model.config == fish[0].config
    assert [entry["step"] for entry in model.history] == [5] and not {"weights", "losses"} & model.history[0].keys()
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert all(part in card for part in ("# bubbly", "| seen | 50.0% | 100.0% |", "| unseen | 25.0% | 75.0% |", "| another | 12.5% |  |", "* *seen*: ", "5 steps, 1,234 tokens, validation loss 1.875"))
    assert "none" not in card.split("|") and "nan" not in card, "what was not asked has no row"
    assert not list(saved.glob(".*")), "no half-written file stays"
    model.source = "me/other"
    nb.save_pretrained(model, tokenizer, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "those of me/other" in card and "license" not in card, "what was not trained here is not given away as ours"
    nb.save_pretrained(*fish, tmp_path, dtype=torch.float16)
    half = nb.load_pretrained(tmp_path)[0].cpu()
    assert all(torch.equal(p, q.half().float()) for p, q in zip(half.state_dict().values(), fish[0].state_dict().values())) and half.history == []
    assert "It has sat no exam." in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_tokenizer_that_is_changed_or_strange_is_refused(nb, saved, tmp_path):
    data = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    for change in (lambda d: d["model"]["merges"].reverse(), lambda d: d["pre_tokenizer"].update(type="Whitespace"), lambda d: d.pop("model"),
                   lambda d: d.update(pre_tokenizer=None), lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x")):
        other = json.loads(json.dumps(data))
        change(other)
        (tmp_path / "tokenizer.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match="no tokenizer.json of this notebook"):
            nb.BPETokenizer.load(tmp_path / "tokenizer.json")


def spoil(folder, file, change):
    path = folder / file
    if file == "model.safetensors":
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
    else:
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))


WRONG = {
    "a name too many": ("model.safetensors", lambda w: w.update(extra=torch.zeros(2)), "extra"),
    "a name too few": ("model.safetensors", lambda w: w.pop("transformer.wpe.weight"), "pos_emb.weight missing"),
    "another shape": ("model.safetensors", lambda w: w.update({"transformer.h.1.mlp.c_fc.weight": torch.zeros(64, 95)}), "another shape"),
    "another width": ("config.json", lambda c: c.update(n_embd=72), "another shape"),
    "heads that do not fit": ("config.json", lambda c: c.update(n_head=5), "5 heads in a width of 64"),
    "another activation": ("config.json", lambda c: c.update(activation_function="gelu_new"), "gelu_new"),
    "other control tokens": ("config.json", lambda c: c.update(eos_token_id=50256), "control tokens"),
    "a history of something else": ("history.json", lambda h: h.append({"epoch": 1}), "history.json"),
    "a key too few": ("config.json", lambda c: c.pop("n_inner"), "n_inner"),
    "words for numbers": ("config.json", lambda c: c.update(n_positions="many"), "whole fish"),
    "a vocabulary too small": ("config.json", lambda c: c.update(vocab_size=300), "another shape"),
    "more layers than there are weights": ("config.json", lambda c: c.update(n_layer=200), "cannot hold them"),
    "a context without end": ("config.json", lambda c: c.update(n_positions=10**9), "no model of this notebook"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named(nb, saved, tmp_path, case):
    file, change, says = WRONG[case]
    folder = shutil.copytree(saved, tmp_path / "fish")
    spoil(folder, file, change)
    with pytest.raises(ValueError, match="does not hold a whole fish") as caught:
        nb.load_pretrained(folder)
    assert says in str(caught.value) and "again" in str(caught.value) and "\n" not in str(caught.value)


def test_every_file_of_a_fish_may_be_read_by_the_same_people(saved):
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1


def test_weights_that_are_no_numbers_are_refused(nb, fish, tmp_path):
    for wrong in (math.nan, math.inf):
        model = deepcopy(fish[0])
        with torch.no_grad():
            model.blocks[0].ffn.up.weight[0, 0] = wrong
        nb.save_pretrained(model, fish[1], tmp_path)
        with pytest.raises(ValueError, match="does not hold a whole fish .*blocks.0.ffn.up.weight holds numbers that are none"):
            nb.load_pretrained(tmp_path)


def test_missing_and_truncated_files_are_named(nb, saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        nb.load_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        nb.load_pretrained("not a name of anything")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        nb.load_pretrained(str(saved / "config.json"))
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = shutil.copytree(saved, tmp_path / file)
        whole = (folder / file).read_bytes()
        for content in (whole[:len(whole) // 2], b"", b"<html>404</html>"):
            (folder / file).write_bytes(content)
            with pytest.raises(ValueError, match="does not hold a whole fish"):
                nb.load_pretrained(folder)
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"lacks {file}"):
            nb.load_pretrained(folder)


# ---- the layout of the existing guppylm, made here from its description, with the tokenizers library and a forward pass of its own ----

def published(folder, texts, C=48, L=2, H=3, ffn=80, V=600, context=128):
    """A checkpoint as github.com/arman-bd/guppylm publishes them. Returns its state dict and its tokenizer (of the tokenizers library)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=450, special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"], show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(shape, generator=rng) * 0.15
    state = {"tok_emb.weight": draw(V, C), "pos_emb.weight": draw(context, C), "norm.weight": 1 + draw(C), "norm.bias": draw(C)}
    for i in range(L):
        for name, rows, columns in (("attn.qkv", 3 * C, C), ("attn.out", C, C), ("ffn.up", ffn, C), ("ffn.down", C, ffn)):
            state |= {f"blocks.{i}.{name}.weight": draw(rows, columns), f"blocks.{i}.{name}.bias": draw(rows)}
        for name in ("norm1", "norm2"):
            state |= {f"blocks.{i}.{name}.weight": 1 + draw(C), f"blocks.{i}.{name}.bias": draw(C)}
    state["lm_head.weight"] = state["tok_emb.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({
        "vocab_size": V, "max_position_embeddings": context, "hidden_size": C, "num_hidden_layers": L, "num_attention_heads": H, "intermediate_size": ffn,
        "hidden_dropout_prob": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}))
    return state, tokenizer


def reference(state, ids, L=2, H=3):
    """Its forward pass, from the description alone: (B, T) -> (B, T, V)."""
    x = state["tok_emb.weight"][ids] + state["pos_emb.weight"][:ids.shape[1]]
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)
    linear = lambda x, name: F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
    for i in range(L):
        q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1))
        x = x + linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2), f"blocks.{i}.attn.out")
        x = x + linear(F.relu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.ffn.up")), f"blocks.{i}.ffn.down")
    return F.linear(norm(x, "norm"), state["lm_head.weight"])


@pytest.fixture(scope="module")
def older(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("older") / "fish"
    return folder, *published(folder, [f"user\n{c.prompt}'s and {n} of {c.reply}" for n, c in enumerate(small[1]["train"][:2_000])])


def test_published_weights_and_tokenizer(nb, older, tmp_path):
    folder, state, reads = older
    model, tokenizer = nb.load_pretrained(folder)
    ids = torch.randint(600, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model.cpu()(ids) - reference(state, ids)).abs().max() < 1e-4
    texts = ["user\nwhat's the hammer's colour, you'll say?", "we've  2 saws,   don't we? \n\n x", "HELLO", "müsli ½ Ⅷ ٣ _x_ 'so' ''ll", "", "  ", "\u00a0a\u3000 b\x1c\x85c",
             *EDGES, *strange_texts(400)]
    lost = 0
    for text in texts:
        text = text.encode("utf-8", "replace").decode()
        ids = reads.encode(text, add_special_tokens=False).ids if not any(c in text for c in nb.CONTROL) else tokenizer.encode(text)
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == reads.decode(ids) or "\ufffd" in reads.decode(ids), repr(text)
        lost += text != tokenizer.decode(ids)
    assert tokenizer.encode("HELLO") == [] and lost > 100, "bytes that it never saw have no token, and that is kept"
    assert min(tokenizer.encode("<|im_end|>hi"), default=3) > nb.END, "text holds no control token"
    assert isinstance(nb.chat("hello robot", model, tokenizer, seed=0), str)
    nb.save_pretrained(model, tokenizer, tmp_path)                   # kept in today's layout, it still reads and computes the same
    again, same = nb.load_pretrained(tmp_path)
    assert torch.equal(again.cpu()(ids := torch.randint(600, (1, 20))), model(ids)) and same.encode(texts[0]) == tokenizer.encode(texts[0])


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("form", [None, "NFC", "NFKD"])
def test_other_byte_level_tokenizers_are_read_as_they_are(nb, older, tmp_path, prefix, form):
    from tokenizers import Tokenizer
    data = json.loads((older[0] / "tokenizer.json").read_text(encoding="utf-8"))
    data["pre_tokenizer"]["add_prefix_space"], data["normalizer"] = prefix, form and {"type": form}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    mine, reads = nb.BPETokenizer.load(tmp_path / "tokenizer.json"), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ["", " ", "hello robot", " hello", "\nhello", "cafe\u0301 ﬁsh", *strange_texts(100)]:
        assert mine.encode(text) == reads.encode(text, add_special_tokens=False).ids, repr(text)


def test_a_pickle_that_would_run_something_is_refused(nb, older, tmp_path):
    class Sly:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'it-ran'}",)
    folder = shutil.copytree(older[0], tmp_path / "fish")
    for write in (lambda path: torch.save({"tok_emb.weight": Sly()}, path), lambda path: path.write_bytes(pickle.dumps({"tok_emb.weight": Sly()}, protocol=2))):
        write(folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="does not hold a whole fish"):
            nb.load_pretrained(folder)
    torch.save(older[1] | {"lm_head.weight": torch.zeros(600, 48)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="one matrix for both"):
        nb.load_pretrained(folder)
    assert not (tmp_path / "it-ran").exists()


# ---- the Hub: a server on this machine that speaks its protocol ----

class Hub(http.server.BaseHTTPRequestHandler):
    """HEAD and GET of /{repo}/resolve/{revision}/{file} for the folders in `repos`; what `faults` names goes wrong."""
    protocol_version, repos, faults, seen, commit = "HTTP/1.1", {}, {}, [], "c0ffee" + "0" * 34

    def log_message(self, *args):
        pass

    def say(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body) if length is None else length, **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            self.send_header(name, str(value))
        self.send_header("Connection", "close")                      # when the server is gone, no open connection is left
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        self.seen.append((self.command, self.path, self.headers.get("Authorization")))
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/([\w.-]+)", self.path)
        folder = found and self.repos.get(found[1])
        if not folder:
            return self.say(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if found[2] not in ("main", self.commit):
            return self.say(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        if not (folder / found[3]).is_file():
            return self.say(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=self.commit)
        body, fault = (folder / found[3]).read_bytes(), self.faults.get((found[1], found[3]))
        headers = {"ETag": f'"{hashlib.sha256(body + str(fault).encode()).hexdigest()}"', "X_Repo_Commit": self.commit, "Accept_Ranges": "none"}
        if fault == "another content":
            body = b"<html>this is no model</html>"
        if fault == "busy":
            return self.say(503)
        return self.say(200, body[:len(body) // 2] if fault == "truncated" else body, len(body), **headers)

    do_HEAD = do_GET


CLIENT = """
import json, sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.05))               # huggingface_hub tries again and again, and waits long between
sys.path.insert(0, sys.argv[1])
import notebook, torch
guppy = notebook.load()
for line in map(str.strip, sys.stdin):
    repo, _, revision = line.partition("@")
    try:
        model, tokenizer = guppy.load_pretrained(repo, **({"revision": revision} if revision else {}))
        print(json.dumps(["ok", model(torch.arange(20)[None])[0, -1, :5].tolist(), tokenizer.encode("hello robot")]), flush=True)
    except Exception as fault:
        print(json.dumps([type(fault).__name__, str(fault)]), flush=True)
"""


class Client:
    """Loads from the Hub in a process of its own, for its address is read when huggingface_hub is imported."""

    def __init__(self, home, port):
        where = environment(HF_ENDPOINT=f"http://127.0.0.1:{port}", HF_HUB_DISABLE_XET="1", HF_HOME=str(home), NO_PROXY="127.0.0.1",
                            HF_TOKEN="hf_secret", CUDA_VISIBLE_DEVICES="", MPLBACKEND="Agg", OMP_NUM_THREADS="1")
        self.process = subprocess.Popen([sys.executable, "-c", CLIENT, str(notebook.ROOT / "tests")], env=where, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def load(self, *repos):
        """{repo: what came of it}, for names such as user/name or user/name@revision."""
        answers = {}
        for repo in repos:
            self.process.stdin.write(f"{repo}\n")
            self.process.stdin.flush()
            line = next((line for line in self.process.stdout if line.startswith("[")), None)
            assert line, self.process.stderr.read()[-2_000:]
            answers[repo] = json.loads(line)
        return answers

    def close(self):
        """Ends the process and returns what it wrote to stderr."""
        return self.process.communicate(timeout=60)[1]


def test_from_a_hub_and_from_its_cache(nb, saved, older, tmp_path):
    lacking = shutil.copytree(saved, tmp_path / "lacking")
    (lacking / "tokenizer.json").unlink()
    Hub.repos = {"me/fish": saved, "old/guppylm-9M": older[0], "me/lacking": lacking, "me/cut": saved, "me/html": saved, "me/busy": saved}
    Hub.faults = {("me/cut", "model.safetensors"): "truncated", ("me/html", "model.safetensors"): "another content", ("me/busy", "config.json"): "busy"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port, home = server.server_address[1], tmp_path / "home"
    good = ["me/fish", "old/guppylm-9M", f"me/fish@{Hub.commit}"]
    client = Client(home, port)
    first = client.load(*good, "me/nobody", "me/lacking", "me/html", "me/fish@v9", "me/cut", "me/busy")
    asked = list(Hub.seen)
    for name, folder in zip(good, (saved, older[0], saved)):
        model, tokenizer = nb.load_pretrained(folder)
        status, logits, ids = first[name]
        assert status == "ok" and ids == tokenizer.encode("hello robot")
        assert torch.allclose(torch.tensor(logits), model.cpu()(torch.arange(20)[None])[0, -1, :5], atol=1e-5)
    assert not any(token for _, _, token in asked), "anonymous, even where a token lies about"
    assert all(Hub.commit in path for method, path, _ in asked if "me/fish/" in path and "config.json" not in path), "all files of one commit"
    assert first["me/nobody"][0] == "FileNotFoundError" and "nor a public me/nobody" in first["me/nobody"][1]
    assert first["me/lacking"][0] == "FileNotFoundError" and "tokenizer.json" in first["me/lacking"][1]
    assert first["me/fish@v9"][0] == "FileNotFoundError" and "revision v9" in first["me/fish@v9"][1]
    assert first["me/html"][0] == "ValueError" and "does not hold a whole fish" in first["me/html"][1] and "models--me--html and download" in first["me/html"][1]
    for name in ("me/cut", "me/busy"):
        assert f"there is no folder {name} here" in first[name][1]
        assert first[name][0] == "ConnectionError" and "try again" in first[name][1] and "\n" not in first[name][1]
    Hub.faults = {}
    mended = client.load("me/cut")
    assert mended["me/cut"][0] == "ok", "what was cut short is fetched again"
    server.shutdown()
    server.server_close()
    offline = client.load(*good, "me/other")
    assert [offline[name] for name in good] == [first[name] for name in good], "without a network, from the cache"
    assert offline["me/other"][0] == "ConnectionError" and "check the network" in offline["me/other"][1]
    written = client.close()
    assert "it/s" not in written and "B/s" not in written, "no progress bars"


# ---- an address: a web server on this machine ----

class Site(http.server.BaseHTTPRequestHandler):
    """GET of /{name}/{file} for the folder `fish`; the name says what goes wrong, in the weights if nowhere else."""
    fish, port, asked = None, 0, []

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.asked.append(self.path)
        fault, file = re.fullmatch(r"/([\w-]+)/([\w.]+)", self.path).groups()
        weights, kind, status = file == "model.safetensors", "application/octet-stream", 200
        path = self.fish / file
        body = path.read_bytes() if path.is_file() else b"not here"
        if not path.is_file() or fault == "nothing" or (fault == "no-history" and file == "history.json"):
            status = 404
        if fault in ("there", "elsewhere"):                          # to another folder of this server, or to another server
            where = f"http://127.0.0.1:{self.port}" if fault == "there" else f"http://localhost:{self.port}"
            self.send_response(302)
            self.send_header("Location", f"{where}/whole/{file}")
            return self.end_headers()
        if fault == "busy":
            status = 503
        if fault == "page":
            body, kind = b"<!doctype html><title>Sign in</title>", "text/html; charset=utf-8"
        if fault == "page-in-disguise":
            body = b"<!doctype html><title>Sign in</title>"
        if fault == "other-weights" and weights:
            body = body[:-4]                                         # the header of the file asks for more
        if fault == "giant" and file == "config.json":
            body = body.replace(b'"n_embd": 64', b'"n_embd": 640000')
        declared = {"declares-too-much": 65_000_000, "cut": len(body)}.get(fault if weights else "", len(body))
        if fault == "cut" and weights:
            body = body[:len(body) // 2]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if not (fault == "endless" and weights):
            self.send_header("Content-Length", str(declared))
        self.end_headers()
        with contextlib.suppress(OSError):                           # whoever asked has heard enough
            self.wfile.write(body)
            for _ in range(1_100 if fault == "endless" and weights else 0):
                self.wfile.write(bytes(65_536))


@pytest.fixture(scope="module")
def site(saved):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    Site.fish, Site.port = saved, server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{Site.port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def out(nb, tmp_path, monkeypatch):
    """Where downloads go in this test; no proxy stands between."""
    monkeypatch.setattr(nb, "OUT", tmp_path / "out")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["whole", "whole/", "there", "no-history"])
def test_a_fish_from_an_address(nb, fish, site, out, name, capsys):
    model, tokenizer = nb.load_pretrained(f"{site}/{name}")
    ids = torch.randint(300, (1, 20))
    assert torch.equal(model.cpu()(ids), fish[0](ids)) and tokenizer.merges == fish[1].merges and model.source == f"{site}/{name}"
    assert [entry["step"] for entry in model.history] == ([] if name == "no-history" else [5])
    assert "downloading the fish at" in (said := capsys.readouterr().out) and "model.safetensors: " in said
    left = [path for path in out.rglob("*") if path.is_file()]
    assert {path.name for path in left} <= nb.FISH_FILES.keys() and len({path.parent for path in left}) == 1, "nothing else stays"
    assert not any("bin" in path for path in Site.asked), "a pickle is not even asked for"
    Site.asked.clear()
    again = nb.load_pretrained(f"{site}/{name}")[0]
    assert torch.equal(again.cpu()(ids), model(ids)) and Site.asked == [] and "was downloaded before" in capsys.readouterr().out
    nb.save_pretrained(model, tokenizer, out / "copy")
    assert f"those of {site}/{name}, under" in (out / "copy/README.md").read_text(encoding="utf-8")


REFUSED = {
    "nothing": (FileNotFoundError, "there is no http"), "busy": (ConnectionError, "says 503"), "cut": (ConnectionError, "cut short after"),
    "declares-too-much": (ValueError, "65,000,000 bytes; at most 64,000,000"), "endless": (ValueError, "more than 64,000,000 bytes"),
    "elsewhere": (ValueError, "leads elsewhere, to http://localhost"), "page": (ValueError, "is a web page"),
    "page-in-disguise": (ValueError, "whole fish"), "other-weights": (ValueError, "whole fish"), "giant": (ValueError, "cannot hold them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_address_that_gives_no_whole_fish(nb, site, out, name):
    kind, says = REFUSED[name]
    with pytest.raises(kind, match=says) as caught:
        nb.load_pretrained(f"{site}/{name}")
    assert "127.0.0.1" in str(caught.value) and "\n" not in str(caught.value)
    assert not [path for path in out.rglob("*") if path.is_file() or path.name == "fish"], "no half download stays"


def test_a_download_that_another_process_has_finished(nb, site, out, monkeypatch):
    """Two runs ask for the same fish at once: the slower one finds the folder there, and takes it."""
    def quicker(folder, read=nb.read_fish):
        monkeypatch.setattr(nb, "read_fish", read)
        nb.fetch_folder(f"{site}/whole")
        return read(folder)

    monkeypatch.setattr(nb, "read_fish", quicker)
    folder = nb.fetch_folder(f"{site}/whole")
    assert {path.name for path in folder.iterdir()} == nb.FISH_FILES.keys()
    assert [path for path in out.rglob("*") if path.is_file() and path.parent != folder] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_not_called_a_fault_of_the_network(nb, site, out):
    with pytest.raises(OSError, match="disk is full: make room") as caught:
        nb.download(f"{site}/whole/config.json", Path("/dev/full"), 1_000_000)
    assert not isinstance(caught.value, ConnectionError) and caught.value.filename == "/dev/full"


def test_addresses_that_are_not_asked(nb, out):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    with pytest.raises(ConnectionError, match="check the network"):
        nb.load_pretrained(f"http://127.0.0.1:{closed}/fish")
    for address in ("http://example.org/fish", "ftp://example.org/fish", "file:///etc", "https://example.org/fish?token=1", "https:///fish", "://"):
        with pytest.raises(ValueError, match="beginning with https"):
            nb.load_pretrained(address)
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_which_fish_when_none_is_named(nb, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(notebook.ROOT)
    assert nb.default_fish() == nb.ASSETS and capsys.readouterr().out == ""
    monkeypatch.chdir(tmp_path)
    assert nb.default_fish() == nb.HUB_REPO and "the fish of another project" in capsys.readouterr().out
    assert "load_pretrained(FISH or default_fish())" in cell_with("default_fish())")


def test_the_size_of_a_model_is_known_before_it_is_built(nb):
    for config in (nb.GuppyConfig(), nb.GuppyConfig(300, 40, 48, 3, 4, 100)):
        assert nb.parameters_of(config) == sum(p.numel() for p in nb.GuppyLM(config).parameters())


# ---- what people do with it ----

def test_the_five_lines_of_the_readme():
    code, = re.findall(r"```python\n(from transformers.*?)```", README, re.S)
    assert len(code.strip().splitlines()) == 5
    run = subprocess.run([sys.executable, "-c", code], cwd=notebook.ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and re.search(r"[a-z]{2,} [a-z]", run.stdout), run.stderr[-1_000:]


def test_chat_in_the_terminal_within_a_minute(monkeypatch):
    command, = re.findall(r"^python (tests/notebook\.py)$", README, re.M)
    started = time.time()
    run = subprocess.run([sys.executable, command], cwd=notebook.ROOT, input="Hello Guppy!\nare you hungry?\n\nnot this\n", capture_output=True, text=True)
    assert run.returncode == 0 and len(re.findall(r"guppy> [a-z]", run.stdout)) == 2 and time.time() - started < 60, run.stderr[-1_000:]
    for words in (["assets/pretrained", "--trian"], ["--train"], ["my.txt", "--trian"]):
        monkeypatch.setattr(sys, "argv", ["notebook.py", *words])
        with pytest.raises(SystemExit, match="python tests/notebook.py my.txt --train"):
            notebook.main()
    monkeypatch.setattr(sys, "argv", ["notebook.py", "no such fish"])
    with pytest.raises(SystemExit, match="no such fish is no folder"):
        notebook.main()


def test_the_command_that_opens_the_page(tmp_path):
    """The README's command hands the address of the page to a browser; here a script in its place writes down what it gets."""
    command, = re.findall(r"^(python3 -c .*webbrowser.*)$", README, re.M)
    browser = tmp_path / "browser"
    browser.write_text(f"#!/bin/sh\nprintf %s \"$1\" > {tmp_path}/asked\n")
    browser.chmod(0o755)
    subprocess.run(command, shell=True, check=True, cwd=notebook.ROOT, env=os.environ | {"BROWSER": f"{browser} %s"}, timeout=60)
    assert (tmp_path / "asked").read_text() == (notebook.ROOT / "assets/guppy.html").resolve().as_uri()


def test_chat_loop_never_hangs(nb, fish, capsys):
    def nobody(prompt):
        raise NotImplementedError("raw_input was called, but this frontend does not support input requests.")

    def gone(prompt):
        raise EOFError
    lines = iter(["hello", " ", "never asked"])
    nb.chat_loop(*fish, "bubbly", lambda prompt: next(lines))
    printed = capsys.readouterr().out
    assert printed.startswith("an empty line ends the chat") and printed.count("bubbly> ") == 1 and next(lines) == "never asked"
    nb.chat_loop(*fish, ask=gone)
    nb.chat_loop(*fish, ask=nobody)
    assert "nobody can type here" in capsys.readouterr().out


def cell_with(text):
    cell, = [cell["text"] for cell in notebook.cells() if cell["cell_type"] == "code" and text in cell["text"]]
    return cell


def test_chat_and_push_are_off_and_push_goes_to_the_readers_own_repo(monkeypatch, tmp_path):
    assert cell_with('CHAT = False  #@param {type:"boolean"}') and cell_with('TRAIN = os.environ.get("GUPPY_TRAIN", "1") == "1"')
    calls, cell = [], cell_with("PUSH_TO = ")

    class Api:
        create_repo = staticmethod(lambda *args, **named: calls.append(("create", args, named)) or types.SimpleNamespace(repo_id="me/fish"))
        upload_folder = staticmethod(lambda **named: calls.append(("upload", named)))
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    (tmp_path / "README.md").write_text('folder = "FOLDER"\nmodel = from_pretrained(folder)')
    exec(cell, {"folder": tmp_path, "re": re})
    assert calls == []
    exec(cell.replace('PUSH_TO = ""', 'PUSH_TO = "fish"'), {"folder": tmp_path, "re": re})
    assert calls == [("create", ("fish",), {"exist_ok": True}), ("upload", {"repo_id": "me/fish", "folder_path": tmp_path, "ignore_patterns": [".*"]})]
    Api.create_repo = staticmethod(lambda *args, **named: types.SimpleNamespace(repo_id="me/other"))
    card = (tmp_path / "README.md").read_text()
    exec(cell.replace('PUSH_TO = ""', 'PUSH_TO = "other"'), {"folder": tmp_path, "re": re})
    assert [card, (tmp_path / "README.md").read_text()] == [f'folder = "{place}"\nmodel = from_pretrained(folder)' for place in ("me/fish", "me/other")], "the card says where it lies"


def test_only_guppy_was_trained_before(monkeypatch):
    cell = cell_with("PERSONA is {PERSONA!r}")
    advice = cell[cell.index("if PRESET not in"):]
    advice = advice[:advice.index("print(f")]
    settings = {"os": os, "PRESET": "auto", "PERSONA": "rollo", "TRAIN": False}
    with pytest.raises(ValueError, match="set TRAIN = True to train rollo"):
        exec(advice, settings | {"FISH": ""})
    exec(advice, settings | {"FISH": "out/rollo"})
    monkeypatch.setenv("GUPPY_TRAIN", "true")
    with pytest.raises(ValueError, match="GUPPY_TRAIN is 'true'; it can be 1, to train, or 0"):
        exec(advice, settings | {"FISH": "out/rollo"})


def test_settings_that_would_lose_something(nb, monkeypatch, tmp_path, capsys):
    """Before anything is trained: where it could not be saved, whose script would be overwritten, and what is not used."""
    cell = cell_with("PERSONA is {PERSONA!r}")
    checks = cell[cell.index("if str(OUT).startswith"):cell.index("plt.rcParams")]
    monkeypatch.delenv("GUPPY_OUT", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"os": os, "Path": Path, "PERSONA": "guppy", "TRAIN": True, "FISH": "", "OUT": tmp_path / "fish"}
    exec(checks, settings)
    assert settings["OUT"].is_dir() and capsys.readouterr().out == ""
    exec(checks, settings | {"FISH": "out/guppy"})
    assert "FISH is 'out/guppy', and is not used" in capsys.readouterr().out
    (tmp_path / "fish/guppy").write_text("a file")
    (tmp_path / "fish/tilly.txt").write_text("my own words")
    for change, says in (({}, "guppy is a file"), ({"PERSONA": str(tmp_path / "fish/tilly.txt")}, "copy it to a name of your own"),
                         ({"OUT": Path("~/fish")}, f"OUT is '~/fish'; write the folder out, as '{tmp_path}/fish'"),
                         ({"TRAIN": "0"}, "TRAIN is '0'; it can be True or False"), ({"OUT": tmp_path / "fish/guppy"}, "must be a folder")):
        with pytest.raises(ValueError, match=says):
            exec(checks, settings | change)
    monkeypatch.setenv("GUPPY_OUT", "")
    with pytest.raises(ValueError, match="must be a folder"):
        exec(checks, settings)


# ---- the assets ----

@pytest.fixture(scope="module")
def given(nb):
    model, tokenizer = nb.load_pretrained(ASSETS)
    return model, tokenizer, json.loads((ASSETS / "fingerprint.json").read_text())


def test_the_assets_fit_the_notebook(nb, given):
    """The script is that of today. The tokenizer is the fish's own: it may have learned with an older one."""
    model, reads, stored = given
    now = make_assets.fingerprint(nb, model, reads)
    assert {key: now[key] for key in ("script", "tokenizer", "config", "prompt", "ids")} == {key: stored[key] for key in ("script", "tokenizer", "config", "prompt", "ids")}
    assert torch.allclose(torch.tensor(now["logits"]), torch.tensor(stored["logits"]), atol=2e-3)
    assert nb.GuppyConfig(reads.vocab_size) == model.config
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 20_000_000


def test_the_mean_of_several_fish(given, nb):
    fish, thrice = deepcopy(given[0]), deepcopy(given[0])
    thrice.load_state_dict({name: 3 * weight for name, weight in fish.state_dict().items()})
    mean = make_assets.mean_of(deepcopy(fish), [(thrice, given[1])], given[1])
    assert all(torch.allclose(mean.state_dict()[name], 2 * weight) for name, weight in fish.state_dict().items())
    with pytest.raises(ValueError, match="the same tokenizer"):
        make_assets.mean_of(fish, [(thrice, nb.BPETokenizer(list(given[1].merges)[:10]))], given[1])


@pytest.mark.parametrize("options,fault", [
    ("--more 1500", "go with --fish"), ("--average old", "go with --fish"), ("--wordings 0.5", "go with --fish"),
    ("--fish old --rows 100000", "go with --more"), ("--fish old --lost 0.3", "go with --more"),
    ("--fish old --joined 0.5", "go with --more"), ("--fish old --copying 2", "go with --more"), ("--fish old --more 10 --copying 0.5", "1 or more"),
    ("--fish old --more 10 --wordings 50", "from 0 to 1"), ("--fish old --more 10 --rows 7000 --skip 2000", "next to nothing")])
def test_options_that_say_nothing(options, fault, monkeypatch, capsys):
    """Without a word they would train for an hour, and write over the fish of the repository."""
    monkeypatch.setattr(sys, "argv", ["make_assets.py", *options.split()])
    monkeypatch.setattr(notebook, "load", lambda: pytest.fail("it goes on"))
    with pytest.raises(SystemExit):
        make_assets.main()
    assert fault in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(notebook.ROOT.glob("assets/wordings*.tsv")), ids=lambda path: path.stem)
def test_wordings_are_none_of_an_exam(nb, persona, path):
    """No wording says what is asked in an exam."""
    _, wordings = make_assets.read_wordings(nb, persona, path)
    free = [line.split("\t")[1] for which in ("blind", "fresh")
            for line in zlib.decompress((notebook.ROOT / f"tests/free_wordings_{which}.zlib").read_bytes()).decode().splitlines()]
    asked = {nb.bare(persona, nb.normalise(prompt)) for prompt in [*free, *(line.split("\t")[1] for line in nb.FREE.splitlines())]}
    assert sum(map(len, wordings.values())) >= 10_000 and min(map(len, wordings.values())) >= 30
    held_out = {word for words in persona.held_out_words.values() for word in words}
    for name, texts in wordings.items():
        assert not held_out & {word for text in texts for word in nb.WORD.findall(text)}, "words that the exam asks to copy"
        forms = {re.sub("ǁ.*?ǁ", "·", nb.bare_template(persona, nb.spell_out(nb.parse_template(text))[0])) for text in texts}
        in_exams = len(forms & asked), len(forms & nb.held_forms(persona, name))
        assert in_exams == (0, 0)                                    # numbers alone: nobody reads what is asked
        assert all(nb.normalise(text) == text for text in texts)


def test_wordings_of_a_file(nb, persona, tmp_path):
    """A file that does not fit is refused; val and unseen stay as they are."""
    wider, _ = make_assets.read_wordings(nb, persona)
    for line in ("no_topic\thello", "food\ti like @name", "food"):
        (tmp_path / "some.tsv").write_text(f"food\tyum yum\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="some.tsv, line 2"):
            make_assets.read_wordings(nb, persona, tmp_path / "some.tsv")
    before = nb.make_dataset(persona, 4_000)
    frobel = {name: {"frobel wiggle": next(iter(topic.own.values()))} for name, topic in wider.topics.items()}
    wider.topics |= {name: replace(topic, own=topic.own | frobel[name]) for name, topic in wider.topics.items()}
    with make_assets.mixed_in(nb, wider, {name: ["frobel wiggle"] for name in frobel}, 0.5):
        after = nb.make_dataset(persona, 4_000)
    assert nb.make_dataset(persona, 4_000) == before, "what is asked in an exam is asked as it was"
    assert after["val"] == before["val"] and after["unseen"] == before["unseen"]
    assert 0.3 < sum("frobel" in c.prompt for c in after["train"]) / 1_000 < 0.6


def test_first_sentences_alone(nb, given, persona):
    """--short and --lost: what stays of a reply is its beginning, learned without an end; what it repeats stays in the prompt."""
    tokenizer = given[1]
    with make_assets.mixed_in(nb, *make_assets.read_wordings(nb, persona), 0.5, 1.0, True):
        drawn = nb.make_dataset(persona, 5_000)["train"]
    short = [c for c in drawn if c.reply.endswith(make_assets.STOPPED)]
    assert 0.4 < len(short) / len(drawn) < 0.6
    for c in short[:300]:
        beginning = c.reply.removesuffix(make_assets.STOPPED)
        whole, counted = nb.encode_chat(tokenizer, nb.normalise(c.prompt), beginning)
        with make_assets.replaced(nb, "encode_chat", make_assets.stopped):
            ids, loss_mask = nb.encode_chat(tokenizer, nb.normalise(c.prompt), c.reply)
            assert nb.encode_chat(tokenizer, nb.normalise(c.prompt), beginning) == (whole, counted), "a whole reply is learned to its end"
            assert nb.encode_chat(tokenizer, "hi")[0][-1] != nb.END
        assert ids == whole[:-1] and loss_mask == counted[:-1] and whole[-1] == nb.END != ids[-1]
    assert nb.encode_chat(tokenizer, "hi", beginning)[0][-1] == nb.END, "outside, nothing has changed"
    names = [c for c in short if c.topic == "name" and re.search(r"\bhello (\w+)[,!]", c.reply)]
    assert len(names) > 5 and all(re.search(r"\bhello (\w+)[,!]", c.reply)[1] in c.prompt for c in names)


def test_unknown_things_come_back_whole(nb, given):
    """Real words that the script lacks, in frames as people type them: 57 of 60 when the fish was published. Here half of
    them are asked, to save time; seven in ten must come back."""
    things = measure.unknown_things()[:30]
    replies = measure.say(nb, given[0], given[1], [prompt for prompt, _ in things])
    whole = sum(word in nb.WORD.findall(reply) for (_, word), reply in zip(things, replies))
    assert len(things) == 30 and whole >= 21


def test_strange_letters(nb, persona):
    """Of the prompts to train on all hold signs from outside the alphabet, and in some topics some hold nothing else; nothing is drawn of what
    measure.py asks. The exam's prompts and all replies stay as they are."""
    plain = nb.make_dataset(persona, 4_000, 0)
    with make_assets.strange_letters(nb, 1.0):
        strange = nb.make_dataset(persona, 4_000, 0)
    letters = set(persona.head["alphabet"]) | {" "}
    assert strange["val"] == plain["val"] and strange["unseen"] == plain["unseen"]
    for c in strange["train"]:
        outside = set(c.prompt) - letters
        assert outside and c.prompt == nb.normalise(c.prompt) and set(c.reply) <= letters | set(c.prompt)
    assert not {sign for c in strange["train"] for sign in c.prompt if ord(sign) > 0x250} & set("".join(measure.ODD)), "made-up words are Latin"
    alone = {c.topic for c in strange["train"] if not set(c.prompt) & set("aeiou")}
    assert alone and not any("@" in wording for name in alone for wording in persona.topics[name].own)
    with make_assets.strange_letters(nb, 0.0):
        assert nb.make_dataset(persona, 4_000, 0) == plain


def test_joined_words_and_more_copying(nb, persona):
    """--joined and --copying: half of the made-up words are two halves of known ones; what repeats a word comes more often."""
    before = nb.make_dataset(persona, 5_000)
    wider, wordings = make_assets.read_wordings(nb, persona)
    known = {word for texts in wordings.values() for text in texts for word in nb.plain(text).split()}
    with make_assets.joined_words(nb, persona, wordings, 1.0):
        words = [nb.make_up(["blender"], random.Random(seed)) for seed in range(400)]
        after = nb.make_dataset(persona, 5_000)
    assert after["val"] == before["val"] and after["unseen"] == before["unseen"] and after["train"] != before["train"]
    joined = [word for word in words if any(word[:i] == known_word[:i] for known_word in known for i in range(2, len(word)))]
    assert len(joined) > 360 and max(map(len, words)) <= 14
    held_out = {word for words in persona.held_out_words.values() for word in words}
    assert not set(words) & (held_out | set(measure.WORDS))
    with make_assets.joined_words(nb, persona, wordings, 0.0):
        assert nb.make_dataset(persona, 5_000) != after
    rows = nb.make_dataset(persona, 13_000)["train"]
    kept = make_assets.more_copying(nb, rows, 2, random.Random(0))
    copying = [c for c in rows if c.topic == "human_things"]
    assert 0.5 < len(kept) / len(rows) < 0.75
    assert sum(c.topic == "human_things" for c in kept) > 0.95 * len(copying), "nothing that repeats is left out"
    assert 0.4 < sum(c.topic == "bubbles" for c in kept) / sum(c.topic == "bubbles" for c in rows) < 0.6


def test_the_page_holds_the_same_fish(nb, given, persona, tmp_path):
    page = nb.write_page(given[0], given[1], tmp_path / "guppy.html", persona.name, persona.demo)
    assert page.read_text(encoding="utf-8") == (notebook.ROOT / "assets/guppy.html").read_text(encoding="utf-8")


def test_odd_letters_leave_no_broken_bytes(nb, given):
    """Emoji, signs and other alphabets, each asked four times: every reply is made of whole letters."""
    model, tokenizer, _ = given
    prompts = measure.ODD * 4
    broken = [(prompt, reply) for prompt, reply in zip(prompts, measure.say(nb, model, tokenizer, prompts)) if "\ufffd" in reply or not reply]
    assert not broken


def test_the_exam_of_the_assets(nb, given, persona, dataset):
    """The card has the scores of 500 questions of each kind, as tests/tools/make_assets.py computed them. Of these the first 30 are asked
    again: the shares must be those of the card, but for the chance that lies in 30 answers (three standard errors, and a point)."""
    model, tokenizer, stored = given
    card = (ASSETS / "README.md").read_text(encoding="utf-8")
    for name, share in stored["scores"].items():
        assert f"| {name} | {share:.1%} | {stored['ceiling'][name]:.1%} |" in card
    assert stored["unread"]["free, fresh"] >= 0.77
    assert all(f"| {name} | {share:.1%} | 100.0% |" in card for name, share in stored["unread"].items())
    questions = nb.exam_questions(persona, dataset, 30, nb.SEED)
    scores, _ = nb.grade(persona, dataset, questions, nb.answers(model, tokenizer, questions, nb.SEED))
    for name, share in stored["scores"].items():
        assert math.isclose(scores[name], share, abs_tol=0.01 + 3 * math.sqrt(share * (1 - share) / 30)), (name, scores[name], share)
    best = stored["scores"]
    assert best["seen"] >= 0.98 and best["unseen"] >= 0.92 and best["free"] >= 0.84 and best["copy"] >= 0.94 and best["new"] >= 0.9 * stored["ceiling"]["new"]
    last = model.history[-1]
    assert f"{last['step']:,} steps, {last['tokens']:,} tokens, validation loss {last['val']:.3f}" in card
    assert math.isclose(nb.evaluate(model, tokenizer, dataset["val"][:500]), last["val"], abs_tol=0.005)
