"""Draw the picture at the top of the notebook, from the fish of assets/pretrained, and attach it to the first cell.

python tests/tools/pipeline.py            writes it into guppylm.ipynb (Colab has no file beside the notebook)
python tests/tools/pipeline.py X.png      writes it to a file instead
"""
import base64
import io
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import notebook

PROMPT = "do you like rain?"
BLUE, ORANGE, GRAY = "tab:blue", "tab:orange", "gray"


def draw(nb, model, tokenizer):
    """The picture as the bytes of a PNG: a sentence, its tokens, ids, vectors, the reply so far, and the
    probabilities of the next token."""
    import matplotlib.pyplot as plt
    import torch
    from PIL import Image
    ids = nb.encode_chat(tokenizer, PROMPT)[0]
    said = tokenizer.encode("rain is")
    with torch.no_grad():
        logits = model(torch.tensor([ids + said]))[:, -1]
    p = nb.next_probabilities(logits, 1.0, 50)[0]
    best = p.topk(5)
    tokens = [(token, BLUE) for token in tokenizer.encode(PROMPT)] + [(token, ORANGE) for token in said]
    figure, axis = plt.subplots(figsize=(9, 3.3), dpi=100)
    axis.set(xlim=(0, 18), ylim=(0, 6.6))
    axis.axis("off")
    label = {"ha": "center", "va": "center", "fontsize": 9}

    def title(x, text):
        axis.text(x, 6.2, text, color=GRAY, **label)

    def arrow(x):
        axis.annotate("", (x + 0.45, 3.1), (x, 3.1), arrowprops={"arrowstyle": "->", "color": GRAY})

    title(1.6, "text")
    rows = [5.3 - 4.6 * n / max(1, len(tokens) - 1) for n in range(len(tokens))]
    axis.text(1.6, 3.9, PROMPT.replace(" like", "\nlike"), color=BLUE, **label | {"fontsize": 12})
    axis.text(1.6, 1.0, "the reply so far:\nrain is", color=ORANGE, **label | {"fontsize": 12})
    arrow(3.1)
    title(4.6, "tokens")
    title(6.6, "ids")
    title(8.7, "vectors")
    for y, (token, colour) in zip(rows, tokens):
        axis.text(4.6, y, nb.token_text(tokenizer, token), color="white", bbox={"boxstyle": "round", "facecolor": colour, "edgecolor": "none"}, **label)
        axis.text(6.6, y, token, **label)
        vector = model.tok_emb.weight[token, :12].detach()[None]
        axis.imshow(vector, cmap="coolwarm", extent=(7.6, 9.8, y - 0.22, y + 0.22), aspect="auto", vmin=-0.15, vmax=0.15)
    arrow(5.55)
    arrow(7.1)
    arrow(10.0)
    title(11.7, "six blocks")
    axis.text(11.7, 3.1, "transformer\n\nattention\nlooks back\n\nfeed-forward\nthinks", bbox={"boxstyle": "round,pad=.6", "facecolor": "#fff3e6", "edgecolor": ORANGE}, **label)
    arrow(13.1)
    title(16.3, "chances of the next token")
    for n, (chance, token) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
        y = 4.8 - 0.85 * n
        axis.barh(y, 2.2 * chance / best.values[0].item(), 0.5, left=15.9, color=ORANGE)
        axis.text(15.7, y, nb.token_text(tokenizer, token), ha="right", va="center", fontsize=9)
        axis.text(16.0 + 2.2 * chance / best.values[0].item(), y, f"{chance:.0%}", va="center", fontsize=8)
    axis.set(xlim=(0, 19), ylim=(0, 6.6))
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    plt.close(figure)
    small = io.BytesIO()
    Image.open(file).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return small.getvalue()


def main():
    nb = notebook.load()
    picture = draw(nb, *nb.load_pretrained(notebook.ROOT / "assets/pretrained"))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_bytes(picture)
        return
    document = json.loads(notebook.PATH.read_text(encoding="utf-8"))
    document["cells"][0]["attachments"] = {"pipeline.png": {"image/png": base64.b64encode(picture).decode()}}
    notebook.PATH.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
