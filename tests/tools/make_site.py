"""Build the site: the page, the lesson and the weights, as files that need no server and no network.

python tests/tools/make_site.py out/site                              builds it; open out/site/index.html
python tests/tools/make_site.py out/site --repository OWNER/REPO      the same, with links to the repository and to Colab

    index.html      assets/guppy.html with one row of links put in; nothing else in it changes, its content policy neither
    lesson.html     the notebook with its stored outputs: folded cells folded, a table of contents, pictures inside the file
    pretrained/     the files that FISH = "https://..." reads, and an index.html that lists them

The lesson holds no script. Markup in the notebook's text and outputs is sanitised, and a content policy forbids the rest. The workflow
in .github/workflows/site.yml runs this after every push to main; there, GITHUB_REPOSITORY names the repository.
"""
import argparse
import base64
import os
import re
import struct
import sys
from html import escape
from pathlib import Path

import bleach
import nbformat
from bs4 import BeautifulSoup
from jinja2 import DictLoader
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html_mistune

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import notebook

PRETRAINED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "history.json", "README.md")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
TITLE = re.compile(r"#@title (.+?) \(folded, (\d+ lines?)\)(.*?) *(?:\{.*\})? *")
FORMULA = re.compile(r"(?<!\\)\$[^$\n]+\$|\\\\?[(\[]|\\begin\{")
TAGS = """a b blockquote br code dd del details div dl dt em h1 h2 h3 h4 h5 h6 hr i img input kbd li ol p pre s small span strong sub summary sup
          table tbody td th thead tr u ul""".split()

TEMPLATE = """
{%- extends "basic/index.html.j2" -%}
{% block input_group %}
{%- if cell.metadata.folded is defined %}
<details class="folded"><summary>{{ cell.metadata.folded.title | escape_html }} <small>{{ cell.metadata.folded.length }}</small></summary>
{{ cell.source | highlight_code(metadata=cell.metadata) }}
</details>
{%- elif cell.source.strip() %}
{{ cell.source | highlight_code(metadata=cell.metadata) }}
{%- endif %}
{% endblock input_group %}
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: light-dark(#fbfeff, #07242f);
  --bar: light-dark(#e4f3f6, #0b2e3b);
  --code: light-dark(#f0f8fa, #0b2e3b);
  --line: light-dark(#c4dfe6, #1b4a5a);
  --ink: light-dark(#12343f, #dbeef3);
  --soft: light-dark(#47697a, #9cc0cb);
  --accent: light-dark(#0b6b80, #6fd0e3);
  --word: light-dark(#9a3d00, #f7b277);
  --text: light-dark(#1e6b3c, #8fd3a5);
  --number: light-dark(#6b3fa0, #cdb4f0);
}
* { box-sizing: border-box; }
html { scroll-padding-top: 3rem; text-size-adjust: 100%; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1.02rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
a { color: var(--accent); }
.bar {
  position: sticky; top: 0; z-index: 1; display: flex; gap: .9rem; padding: .55rem 1rem;
  white-space: nowrap; overflow-x: auto; scrollbar-width: none;
  background: var(--bar); border-bottom: 1px solid var(--line); font-size: .86rem;
}
.bar a { text-decoration: none; padding: .15rem 0; }
.bar .skip { position: absolute; left: -99rem; }
.bar .skip:focus { position: static; }
.bar a:hover { text-decoration: underline; }
.all { display: flex; flex-direction: column; max-width: 72rem; margin: 0 auto; padding: 0 1rem 4rem; }
main { order: 1; min-width: 0; }
#contents { order: 2; border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1rem; }
#contents h2 { margin: 0 0 .5rem; padding: 0; border: 0; font-size: 1.1rem; }
#contents ul { list-style: none; margin: 0; padding: 0; }
#contents a { display: block; padding: .4rem 0; line-height: 1.35; text-decoration: none; }
#contents a:hover { text-decoration: underline; }
#contents .part { margin-top: .9rem; font-weight: 600; }
#contents .sub { display: none; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; }
h2 { margin-top: 3.2rem; padding-top: .8rem; border-top: 1px solid var(--line); font-size: 1.45rem; }
h3 { margin-top: 2rem; font-size: 1.15rem; }
main p, main li, main dd { max-width: 44rem; overflow-wrap: break-word; }
pre, code, kbd { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .88em; overflow-wrap: anywhere; }
pre { margin: 0; font-size: .78rem; line-height: 1.5; tab-size: 4; }
pre code { font-size: inherit; overflow-wrap: normal; }
.highlight, .rendered_html > pre, main > pre {
  margin: .8rem 0; padding: .7rem .9rem; overflow-x: auto; background: var(--code); border: 1px solid var(--line);
  border-radius: .6rem;
}
.output_text { margin: .6rem 0; padding: .1rem .9rem; overflow-x: auto; border-left: 3px solid var(--line); }
.output_png, .picture { display: block; margin: 1rem 0; overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
details { margin: .8rem 0; }
summary { cursor: pointer; }
.folded { border: 1px solid var(--line); border-radius: .6rem; }
.folded > summary { padding: .5rem .9rem; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.folded > summary:hover { color: var(--accent); }
.folded > summary small { white-space: nowrap; opacity: .85; }
.folded > .highlight { margin: 0; border: 0; border-top: 1px solid var(--line); border-radius: 0 0 .6rem .6rem; }
.about { padding: .6rem .9rem; background: var(--code); border-radius: .6rem; font-size: .95rem; }
.ansi-bold { font-weight: 700; }
.k, .kn, .kc, .kd, .ow, .o .w { color: var(--accent); }
.c, .c1, .ch, .cm, .cs { color: var(--soft); font-style: italic; }
.s, .s1, .s2, .sa, .sb, .sc, .sd, .se, .sh, .si, .sr, .sx, .ss { color: var(--text); }
.m, .mi, .mf, .mh, .mb, .mo { color: var(--number); }
.nf, .nc, .fm, .nd { color: var(--word); }
@media (max-width: 40rem) {
  .bar { gap: .65rem; font-size: .82rem; }
  .output_text pre { font-size: .68rem; }
  h1 { font-size: 1.5rem; }
  .output_png img, .picture img { width: 38rem; max-width: none; }
}
@media (min-width: 60rem) {
  .all { display: grid; grid-template-columns: 15rem minmax(0, 1fr); gap: 2.2rem; }
  .all.plain { display: block; max-width: 52rem; }
  #contents {
    order: 0; position: sticky; top: 2.8rem; align-self: start; max-height: calc(100vh - 2.8rem); overflow-y: auto;
    margin: 0; padding: 1rem .6rem 1rem 0; border: 0; font-size: .88rem;
  }
  #contents a { padding: .18rem 0; }
  #contents .sub { display: block; padding-left: .9rem; font-size: .94em; }
  .bar .up { display: none; }
}
@media print { .bar, #contents { display: none; } }
"""

ROW = """<nav id="site" aria-label="Site">
<style>
#site { flex: none; display: flex; flex-wrap: wrap; gap: 0 1rem; width: 100%; max-width: 68rem; padding: 0 .2rem; font-size: .88rem; }
#site a { color: inherit; text-decoration: none; }
#site a:hover { text-decoration: underline; }
</style>
LINKS
</nav>"""

SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<!-- No script, nothing loaded: everything that this page shows is in it. -->
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<nav class="bar" aria-label="Site"><a class="skip" href="#text">To the text</a> {links}</nav>
<div class="all{kind}">
{contents}<main id="text">
{body}
</main>
</div>
</body>
</html>
"""


# ---- the links between the pages ----

def site_links(here, repository):
    """The links of the page `here`, as markup. Those to the repository and to Colab are there if the repository is known."""
    up = "../" if "/" in here else ""
    pages = [("index.html", "The fish"), ("lesson.html", "The lesson"), ("pretrained/index.html", "Weights")]
    links = [(up + path, text) for path, text in pages if path != here]
    if repository:
        links[1:1] = [(f"https://colab.research.google.com/github/{repository}/blob/main/guppylm.ipynb", "Run in Colab")]
        links += [(f"https://github.com/{repository}", "Code")]
    return " ".join(f'<a href="{escape(href)}">{text}</a>' for href, text in links)


def with_links(page, links):
    """The page of the fish with a row of links: where it says `<!-- links -->`, else first in its body."""
    place = "<!-- links -->"
    if place not in page:
        body = re.search(r"</head>\s*<body\b[^>]*>", page)
        if not body:
            raise SystemExit("assets/guppy.html has neither <!-- links --> nor a <body>: python tests/tools/make_assets.py writes it anew")
        return page[:body.end()] + ROW.replace("LINKS", links) + page[body.end():]
    return page.replace(place, ROW.replace("LINKS", links), 1)


# ---- the lesson ----

def sanitised(markup):
    """This markup without anything that could run, load or submit. What is not allowed is shown as text."""
    def allowed(tag, name, value):
        if name == "href":
            return tag == "a" and re.match(r"(https?:|#)", value, re.I)
        if name == "src":
            return tag == "img" and re.match(r"data:image/(png|jpeg|svg\+xml);base64,", value)
        if tag == "input":
            return name in ("type", "disabled", "checked") and (name != "type" or value == "checkbox")
        return name in {"a": ("name", "title"), "img": ("alt", "title"), "details": ("open",)}.get(tag, ()) or name in ("class", "id", "align", "start")
    return bleach.clean(str(markup), tags=TAGS, attributes=allowed, protocols=["http", "https", "data"])


def folded_title(cell):
    """The title and length of a folded cell, {"title", "length"}, or None where the code stands open."""
    first = cell.source.split("\n", 1)[0]
    hidden = cell.metadata.get("jupyter", {}).get("source_hidden") or cell.metadata.get("cellView") == "form"
    if not (hidden or first.startswith("#@title")):
        return None
    if titled := TITLE.fullmatch(first):
        return {"title": titled[1] + titled[3], "length": titled[2]}
    return {"title": re.sub(r"^#@title\s*|\s*\{.*\}\s*$", "", first) if first.startswith("#@title") else "folded", "length": ""}


def prepared(path):
    """The notebook, its folded cells marked and without their title lines, its pictures described by those titles."""
    lesson = nbformat.read(path, as_version=4)
    for number, cell in enumerate(lesson.cells):
        if cell.cell_type == "markdown":
            prose = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S)
            if found := FORMULA.search(prose):
                raise SystemExit(f"cell {number} of {path.name} holds a formula, {found[0]!r}, and the lesson loads nothing that could draw one: "
                                 "write it as code or in words")
        elif cell.cell_type == "code":
            folded = folded_title(cell)
            if folded:
                cell.metadata["folded"] = folded
                if cell.source.startswith("#@title"):
                    cell.source = cell.source.partition("\n")[2].lstrip("\n")
            kind, _, what = (folded or {"title": ""})["title"].partition(": ")
            cell.metadata["alt"] = what or kind or "what the cell above has drawn"
    return lesson


def anchor(text, taken):
    """An id for this heading: section-7, part-2, or its words. `taken` holds those given before and gains this one."""
    parts = {"I": 1, "II": 2, "III": 3, "IV": 4}
    if numbered := re.match(r"(\d+) ·", text):
        name = f"section-{numbered[1]}"
    elif (part := re.match(r"Part (\w+) ·", text)) and part[1] in parts:
        name = f"part-{parts[part[1]]}"
    else:
        name = re.sub(r"\W+", "-", text.lower()).strip("-") or "heading"
    while name in taken:
        name += "-again"
    taken.add(name)
    return name


def lesson_page(path, repository):
    """The notebook as one page of HTML."""
    exporter = HTMLExporter(template_file="lesson.j2", extra_loaders=[DictLoader({"lesson.j2": TEMPLATE})], sanitize_html=True,
                            filters={"clean_html": sanitised}, exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True)
    exporter.display_data_priority = ["image/png", "image/jpeg", "image/svg+xml", "text/html", "text/markdown", "text/plain"]
    lesson = prepared(path)
    soup = BeautifulSoup(exporter.from_notebook_node(lesson)[0], "html.parser")
    entries, taken = [], set()
    for heading in soup.find_all(["h1", "h2", "h3"]):
        text = heading.get_text()
        heading["id"] = anchor(text, taken)
        if heading.name != "h1":
            kind = "sub" if heading.name == "h3" else "part" if text.startswith("Part ") else "section"
            entries.append(f'<li class="{kind}"><a href="#{escape(heading["id"])}">{escape(text)}</a></li>')
    for image in soup.find_all("img"):
        address = image.get("src", "")
        if not address:                                              # a picture from elsewhere: its address was taken out above
            image.decompose()
            continue
        if address.startswith("data:image/png;base64,iVBORw0KGgo"):  # room is kept for it, so that a jump lands where it should
            image["width"], image["height"] = struct.unpack(">II", base64.b64decode(address[22:86])[16:24])
        if image.parent.name == "p":
            image.wrap(soup.new_tag("span", attrs={"class": "picture"}))
    for table in soup.find_all("table"):
        for code in table.find_all("code"):                          # a bar in a table is written \|, and mistune leaves it so in code
            code.string = code.get_text().replace("\\|", "|")
        table.wrap(soup.new_tag("div", attrs={"class": "table"}))
    about = ('<p class="about">This is the notebook as it was run last, with what it printed and drew. '
             "Cells that hold data, draw or do the plumbing are folded: click a title to open one. "
             "Here it can be read; to run it, open it in Colab or on your own machine.</p>")
    contents = f'<nav id="contents" aria-label="Contents"><h2>Contents</h2><ul>{"".join(entries)}</ul></nav>\n'
    links = '<a class="up" href="#contents">Contents</a> ' + site_links("lesson.html", repository)
    return SHELL.format(policy=POLICY, title="GuppyLM: the lesson", style=STYLE, links=links, kind="", contents=contents, body=about + str(soup))


# ---- the weights ----

def weights_page(folder, repository, address):
    """A page that says what the files of this folder are for, lists them, and shows the model's card."""
    place = re.sub("^http:", "https:", address.rstrip("/")) + "/pretrained" if address else "https://.../pretrained"
    whose = "" if address else "<p>The dots stand for the place where this site is published.</p>"
    rows = "".join(f'<tr><td><a href="{name}">{name}</a></td><td>{(folder / name).stat().st_size:,} bytes</td></tr>' for name in PRETRAINED)
    card = re.sub(r"\A---\n.*?\n---\n", "", (folder / "README.md").read_text(encoding="utf-8"), flags=re.S)
    card = re.sub(r"^# ", "### ", card.lstrip())                          # the page has a first heading of its own
    card = sanitised(re.sub(r'<a class="anchor-link".*?</a>', "", markdown2html_mistune(card)))
    body = f"""<h1>The weights</h1>
<p>The notebook can load this fish in place of training one, in Colab too. In section 1 write these two lines, and run all:</p>
<pre style="white-space: pre-wrap">TRAIN = False
FISH = "{escape(place)}"</pre>{whose}
<table><thead><tr><th>file</th><th>size</th></tr></thead><tbody>{rows}</tbody></table>
<h2>Its card</h2>
<div class="rendered_html">{card}</div>"""
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    return SHELL.format(policy=POLICY, title="GuppyLM: the weights", style=STYLE, kind=" plain", contents="", body=body,
                        links=site_links("pretrained/index.html", repository))


# ---- all of it ----

def site(root, repository, address):
    """{path: bytes} of the whole site, made from the notebook and the assets under `root`."""
    folder = root / "assets/pretrained"
    for path in [root / "guppylm.ipynb", root / "assets/guppy.html", *(folder / name for name in PRETRAINED)]:
        if not path.is_file():
            raise SystemExit(f"{path.relative_to(root)} is not there: python tests/tools/make_assets.py writes the assets")
    page = (root / "assets/guppy.html").read_text(encoding="utf-8")
    texts = {"index.html": with_links(page, site_links("index.html", repository)),
             "lesson.html": lesson_page(root / "guppylm.ipynb", repository),
             "pretrained/index.html": weights_page(folder, repository, address)}
    return {name: text.encode() for name, text in texts.items()} | {f"pretrained/{name}": (folder / name).read_bytes() for name in PRETRAINED}


def write(files, folder):
    """Write {path: bytes} into `folder`, which may hold an older site and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"{folder} is a file: name a folder")
    others = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) if folder.exists() else []
    if others := [name for name in others if name not in files]:
        raise SystemExit(f"{folder} holds {others[0]}, which is no part of the site: name a new folder")
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repository", default=os.environ.get("GITHUB_REPOSITORY", ""), metavar="OWNER/REPO")
    parser.add_argument("--address", default="", metavar="URL", help="where the site will stand; the page of the weights then says it")
    options = parser.parse_args(arguments)
    if options.repository and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repository):
        raise SystemExit(f"--repository {options.repository}: write it as OWNER/REPO")
    if options.address and not re.fullmatch(r"https?://[^\s\"'<>]+", options.address):
        raise SystemExit(f"--address {options.address}: write it as https://...")
    files = site(notebook.ROOT, options.repository, options.address)
    write(files, options.folder)
    for name, content in files.items():
        print(f"{len(content):>12,}  {options.folder / name}")


if __name__ == "__main__":
    main()
