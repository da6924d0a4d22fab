"""The site: built from what is stored, opened from the disk in a real Chromium, with the network cut off."""
import base64
import functools
import http.server
import io
import json
import os
import re
import shutil
import struct
import threading

import make_site
import nbformat
import notebook
import numpy as np
import pytest
import screenshot
from PIL import Image
from playwright.sync_api import sync_playwright

COLAB, HUB = "https://colab.research.google.com/github/ann/pond/blob/main/guppylm.ipynb", "https://github.com/ann/pond"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    make_site.main([str(folder), "--repository", "ann/pond", "--address", "https://ann.example/pond/"])
    return folder


@pytest.fixture(scope="module")
def browser():
    """Chromium. CI must have it; elsewhere its absence is a skip."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        (pytest.fail if "CI" in os.environ else pytest.skip)("no Chromium here: the site is not tested (apt-get install chromium)")
    with sync_playwright() as playwright:
        driver = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield driver
        driver.close()


@pytest.fixture(scope="module")
def tab(browser):
    """A tab without a network. Nothing may be said in its console, nothing asked for but files of the site."""
    said, asked = [], []
    context = browser.new_context(offline=True)
    tab = context.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    yield tab
    context.close()
    assert not said and asked and all(re.match(r"data:image/|data:,|file:///[^?]*\.html", url) for url in asked), (said, asked)


@pytest.fixture
def lesson(tab, site):
    """The lesson, as if it had just been opened."""
    address = (site / "lesson.html").as_uri()
    if tab.url.split("#")[0] != address:
        tab.goto(address)
    tab.set_viewport_size({"width": 1100, "height": 800})
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = false); scrollTo(0, 0)")
    return tab


@pytest.fixture(scope="module")
def cells():
    return notebook.cells()


def is_folded(cell):
    return cell["cell_type"] == "code" and cell["metadata"].get("cellView") == "form"


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


# ---- the files ----

def test_files(site):
    names = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert names == {"index.html", "lesson.html", "pretrained/index.html", *(f"pretrained/{name}" for name in make_site.PRETRAINED)}
    for name in make_site.PRETRAINED:
        assert (site / "pretrained" / name).read_bytes() == (notebook.ROOT / "assets/pretrained" / name).read_bytes()
        if name.endswith(".json"):
            json.loads((site / "pretrained" / name).read_text(encoding="utf-8"))
    weights = (site / "pretrained/model.safetensors").read_bytes()
    header, = struct.unpack("<Q", weights[:8])
    tensors = json.loads(weights[8:8 + header])
    assert len(weights) == 8 + header + max(t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__")


def test_the_notebook_loads_the_fish_from_the_site(site, nb, tmp_path, monkeypatch):
    """FISH = the address of pretrained/, from a server here."""
    class Server(http.server.SimpleHTTPRequestHandler):
        log_message = lambda *given: None

    monkeypatch.setattr(nb, "OUT", tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        model, tokenizer = nb.load_pretrained(f"http://127.0.0.1:{server.server_port}/pretrained")
        server.shutdown()
    ours, own = nb.load_pretrained(notebook.ROOT / "assets/pretrained")
    assert all((a == b).all() for a, b in zip(model.cpu().parameters(), ours.cpu().parameters())) and tokenizer.encode("hello") == own.encode("hello")


def test_the_page_is_the_page_and_a_row_of_links(site):
    ours, theirs = ((folder / name).read_text(encoding="utf-8") for folder, name in ((site, "index.html"), (notebook.ROOT / "assets", "guppy.html")))
    row = re.search(r'<nav id="site".*?</nav>', ours, re.S)
    assert ours.replace(row[0], "<!-- links -->" if "<!-- links -->" in theirs else "", 1) == theirs
    assert re.findall(r'href="([^"]*)"', row[0]) == ["lesson.html", COLAB, "pretrained/index.html", HUB]
    assert "<script" not in row[0] and not re.search(r"\son\w+=|url\(|@import", row[0])


def test_where_the_links_go():
    head = "<html><head></head>\n"
    assert make_site.with_links(head + "<body class='x'><p>", "L").startswith(head + "<body class='x'><nav ")
    marked = make_site.with_links(head + "<body><p>a</p><!-- links --><p>b</p>", "L")
    assert marked.startswith(head + "<body><p>a</p><nav ") and marked.endswith("</nav><p>b</p>") and "<!-- links -->" not in marked
    with pytest.raises(SystemExit, match="neither"):
        make_site.with_links("a page cut short", "L")


def test_without_a_repository_no_link_to_one():
    for here in ("index.html", "lesson.html", "pretrained/index.html"):
        links = make_site.site_links(here, "")
        assert "http" not in links and "http" in make_site.site_links(here, "ann/pond")
    assert '"https://.../pretrained"' in make_site.weights_page(notebook.ROOT / "assets/pretrained", "", "")


def test_bad_calls(site, tmp_path, monkeypatch):
    monkeypatch.setattr(make_site, "lesson_page", lambda *given: "lesson")
    for arguments, says in ((["--repository", "pond"], "OWNER/REPO"), (["--repository", 'a/b" onclick="x'], "OWNER/REPO"),
                            (["--repository", "", "--address", "pond.example"], "https://")):
        with pytest.raises(SystemExit, match=says):
            make_site.main([str(tmp_path / "new"), *arguments])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("keep me")
    with pytest.raises(SystemExit, match="letter.txt, which is no part of the site"):
        make_site.main([str(tmp_path / "full")])
    with pytest.raises(SystemExit, match="is a file"):
        make_site.main([str(tmp_path / "full/letter.txt")])
    assert not (tmp_path / "new").exists() and [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]
    with pytest.raises(SystemExit, match="guppylm.ipynb is not there"):
        make_site.site(tmp_path, "", "")
    files = {path.relative_to(site).as_posix(): b"newer" for path in site.rglob("*") if path.is_file()}
    shutil.copytree(site, tmp_path / "older")
    make_site.write(files, tmp_path / "older")                       # an older site is written over
    assert (tmp_path / "older/lesson.html").read_bytes() == b"newer"


# ---- the lesson ----

@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lesson_fits_and_shows_all_pictures(lesson, cells, width, scheme):
    page = lesson
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert fits(page)
    pictures = page.evaluate("Array.from(document.images, i => [i.complete, i.naturalWidth, i.width, i.naturalHeight, i.height, i.alt])")
    stored = sum("image/png" in output.get("data", {}) for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"])
    assert len(pictures) == stored + sum(len(cell.get("attachments", {})) for cell in cells) > 10
    for complete, natural, shown, natural_height, height, alt in pictures:
        assert complete and natural > 0 and shown > 0 and alt and "No description" not in alt
        assert abs(height / shown - natural_height / natural) < 0.02
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert fits(page)
    assert page.locator("script, iframe, object, embed, form, link:not([rel=icon])").count() == 0


def test_folded_cells_are_closed_and_open_on_a_click(lesson, cells):
    page = lesson
    folded = [cell["text"] for cell in cells if is_folded(cell)]
    shown = page.evaluate("""Array.from(document.querySelectorAll("details.folded"), d => [d.open, d.firstChild.textContent, d.querySelector("pre").textContent])""")
    assert len(shown) == len(folded) > 50
    for text, (is_open, title, code) in zip(folded, shown):
        first, rest = text.split("\n", 1)
        name, length, what = re.fullmatch(r"#@title (.*) \(folded, (\d+ lines?)\)(.*?) \{.*", first).groups()
        assert not is_open and title == f"{name}{what} {length}" and code.strip("\n") == rest.strip("\n").rstrip()
    fold = page.locator("details.folded").nth(3)
    assert not fold.locator("pre").is_visible()
    fold.locator("summary").click()
    assert fold.locator("pre").is_visible()
    fold.locator("summary").press("Enter")
    assert not fold.locator("pre").is_visible()
    stands_open = [cell["text"] for cell in cells if cell["cell_type"] == "code" and not is_folded(cell) and cell["text"].strip()]
    codes = page.evaluate("Array.from(document.querySelectorAll('.code_cell > .highlight pre'), p => p.textContent)")
    assert [code.strip() for code in codes] == [text.strip() for text in stands_open]


def test_what_was_printed_is_there(lesson, cells):
    page = lesson
    words = page.evaluate("Array.from(document.querySelectorAll('.output_stream pre'), p => p.textContent)")
    printed = [re.sub(r"\x1b\[[0-9;]*m", "", "".join(output["text"])) for cell in cells if cell["cell_type"] == "code"
               for output in cell["outputs"] if output["output_type"] == "stream"]
    assert [text.strip() for text in words] == [text.strip() for text in printed] and printed
    table_code = page.evaluate("Array.from(document.querySelectorAll('td code'), code => code.textContent)")
    assert "<code>[a&#124;b]</code>" in "".join(cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"]) for cell in cells)
    assert "[a|b]" in table_code and not [text for text in table_code if "\\" in text], "a bar in a table stands without its backslash"


@pytest.mark.parametrize("width", [360, 1100])
def test_every_jump_lands(lesson, cells, width):
    page = lesson
    page.set_viewport_size({"width": width, "height": 800})
    headings = [line.lstrip("# ") for cell in cells if cell["cell_type"] == "markdown"
                for line in re.sub(r"```.*?```", "", cell["text"], flags=re.S).splitlines() if re.match("###? ", line)]
    entries = page.locator("#contents a")
    assert [text.replace("`", "") for text in entries.all_text_contents()] == [text.replace("`", "") for text in headings] and len(headings) > 25
    assert page.locator("#contents .sub").first.is_visible() == (width > 1000)
    for target, name in {"#section-7": "7 · ", "#part-3": "Part III", "#contents": "Contents"}.items():
        page.goto(page.url.split("#")[0] + target)
        assert page.evaluate("id => document.getElementById(id).textContent", target[1:]).startswith(name)
    lands = """targets => targets.map((target) => {
        const e = document.getElementById(target) || document.getElementsByName(target)[0];
        if (!e) return "nothing is named " + target;
        location.hash = target;
        const top = e.getBoundingClientRect().top, bar = document.querySelector(".bar").getBoundingClientRect().bottom;
        const atEnd = innerHeight + scrollY > document.documentElement.scrollHeight - 2;
        return atEnd || top >= bar - 1 && top < bar + 60 ? "" : target + " lands at " + top;
    }).filter(Boolean)"""
    targets = page.evaluate("""Array.from(document.querySelectorAll('a[href^="#"]'), a => a.getAttribute("href").slice(1))""")
    assert {"section-2", "section-25", "part-2"} <= set(targets)
    chosen = [target for target in dict.fromkeys(targets) if width < 1000 or target.startswith("section")]
    assert page.evaluate(lands, chosen) == [] and page.evaluate(lands, ["nowhere"])                    # Chromium allows 200 jumps in ten seconds
    if width > 1000:
        entries.get_by_text("13 · ").click()
        assert page.url.endswith("#section-13") and page.locator("#section-13").is_visible()
        assert -1 < page.evaluate("document.getElementById('section-13').getBoundingClientRect().top") < 120


def test_links_resolve(lesson, site):
    for name in ("index.html", "lesson.html", "pretrained/index.html"):
        text = (site / name).read_text(encoding="utf-8").split("<script", 1)[0]
        links = re.findall(r'<a\b[^>]*?\shref="([^"]*)"', text)
        assert COLAB in links and HUB in links
        for link in links:
            if not re.match("https?://|#", link):
                assert ((site / name).parent / link).resolve().is_file(), (name, link)
    page = lesson
    page.set_viewport_size({"width": 360, "height": 800})
    for link, title in (("Weights", "the weights"), ("The lesson", "the lesson")):
        page.locator("nav").get_by_role("link", name=link).click()
        assert page.title().endswith(title) and fits(page)
    assert 'FISH = "https://ann.example/pond/pretrained"' in (site / "pretrained/index.html").read_text(encoding="utf-8")


def test_the_page_of_the_site_talks(tab, site):
    page = tab
    page.goto((site / "index.html").as_uri())
    page.wait_for_selector("html[data-ready]")
    for width in (1100, 360):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.locator("#site a").first.is_visible() and fits(page)
    assert screenshot.answered(page, "hello") in page.locator("body").inner_text()
    page.get_by_role("link", name="The lesson").click()
    assert page.title() == "GuppyLM: the lesson"


# ---- what somebody might write into a notebook ----

RUN = "window.ran = 1"
HOSTILE = [
    f'<script>{RUN}</script><img src=x onerror="{RUN}">', f'<svg onload="{RUN}"><script>{RUN}</script></svg>', f"[a](javascript:{RUN})",
    f'<a href="data:text/html,<script>{RUN}</script>">b</a>', f'<a href="JaVaScRiPt:{RUN}">c</a>', f'<iframe srcdoc="<script>parent.{RUN}</script>"></iframe>',
    f'<details open ontoggle="{RUN}"><summary>d</summary></details>', '<meta http-equiv="refresh" content="0;url=https://example.org/">',
    '<style>body { display: none }</style>', f'<form action="https://example.org/"><input autofocus onfocus="{RUN}"></form>',
    '![remote](https://example.org/x.png)', '<base href="https://example.org/">', '# A heading <img src=x onerror="window.ran = 1"> & "more"',
]


def hostile(path):
    """A notebook that holds all of it: in its text, its folded titles, its code and its outputs."""
    outputs = [nbformat.v4.new_output("display_data", {"text/html": text}) for text in HOSTILE]
    outputs += [nbformat.v4.new_output("display_data", {"application/javascript": RUN}), nbformat.v4.new_output("stream", text=HOSTILE[0]),
                nbformat.v4.new_output("display_data", {"image/svg+xml": f'<svg xmlns="http://www.w3.org/2000/svg"><script>{RUN}</script></svg>'}),
                nbformat.v4.new_output("display_data", {"text/markdown": HOSTILE[0]}),
                nbformat.v4.new_output("display_data", {"image/png": f'x" onerror="{RUN}'})]
    cells = [nbformat.v4.new_markdown_cell(text) for text in HOSTILE]
    cells += [nbformat.v4.new_code_cell(f"#@title </summary>{HOSTILE[0]} (folded, 1 line): x {{ display-mode: \"form\" }}\n1",
                                        metadata={"cellView": "form", "jupyter": {"source_hidden": True}}),
              nbformat.v4.new_code_cell(f"</pre>{HOSTILE[0]}", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def ran(browser, page, path):
    """What `window.ran` is after this page was opened and everything in it opened and clicked."""
    path.write_text(page, encoding="utf-8")
    with browser.new_context(offline=True) as context:
        tab = context.new_page()
        tab.goto(path.as_uri())
        tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = !d.open); document.querySelectorAll('main a[href]').forEach(a => a.click())")
        tab.wait_for_timeout(200)
        assert tab.url.split("#")[0] == path.as_uri() and tab.locator("main").is_visible()
        return tab.evaluate("window.ran")


def without_policy(page):
    assert make_site.POLICY in page
    return page.replace(make_site.POLICY, "")


def test_nothing_in_a_notebook_runs(browser, tmp_path):
    """Two walls, each tried alone: what the notebook says is sanitised, and the policy stops what would be left."""
    page = make_site.lesson_page(hostile(tmp_path / "hostile.ipynb"), "")
    text = page.split('<main id="text">')[1]
    assert not re.search(r"<(script|iframe|svg|form|meta|base|style|object)\b", text) and "A heading" in text
    assert ran(browser, without_policy(page), tmp_path / "bare.html") is None
    planted = page.replace("</main>", f"<script>{RUN}</script><img src=x onerror='{RUN}'></main>")
    assert ran(browser, planted, tmp_path / "planted.html") is None
    assert ran(browser, without_policy(planted), tmp_path / "both.html") == 1                          # the check itself can fail


def test_a_formula_is_refused(tmp_path):
    for text, refused in (("it costs $x^2$ here", True), (r"\begin{align} x", True), (r"so \\(x\\)", True), ("`$x$` and\n```\n$y$\n```\n5$", False)):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), tmp_path / "x.ipynb")
        if refused:
            with pytest.raises(SystemExit, match="cell 0 of x.ipynb holds a formula"):
                make_site.prepared(tmp_path / "x.ipynb")
        else:
            make_site.prepared(tmp_path / "x.ipynb")


def test_titles_and_names():
    def title(source, **metadata):
        return make_site.folded_title(nbformat.v4.new_code_cell(source, metadata=metadata))
    assert title("#@title Plot (folded, 3 lines): a, b { display-mode: \"form\" }\nx") == {"title": "Plot: a, b", "length": "3 lines"}
    assert title("#@title Just a name { display-mode: \"form\" }\nx") == {"title": "Just a name", "length": ""}
    assert title("x", cellView="form") == {"title": "folded", "length": ""} == title("x", jupyter={"source_hidden": True})
    assert title("x # not #@title") is None
    taken = set()
    names = [make_site.anchor(text, taken) for text in ("7 · The model", "Part II · Open", "Your turn", "Your turn", "?")]
    assert names == ["section-7", "part-2", "your-turn", "your-turn-again", "heading"]


# ---- the picture of the README ----

def test_the_picture_is_light_and_shown():
    path = notebook.ROOT / "assets/page.png"
    assert path.stat().st_size <= screenshot.LIMIT and min(Image.open(path).size) >= 600
    assert "](assets/page.png)" in (notebook.ROOT / "README.md").read_text(encoding="utf-8")
    attached = [cell["attachments"]["page.png"]["image/png"] for cell in notebook.cells() if "page.png" in cell.get("attachments", {})]
    assert [base64.b64decode(text) for text in attached] == [path.read_bytes()], "the notebook shows another one: screenshot.py writes both"


def test_a_picture_is_made_small_or_refused(tmp_path):
    def png(pixels):
        packed = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(packed, "PNG")
        return packed.getvalue()
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3))
    made = screenshot.small(png(noise), 12_000)
    assert len(made) <= 12_000 < len(png(noise)) and Image.open(io.BytesIO(made)).size == (100, 100)
    with pytest.raises(SystemExit, match="larger than 1,000 bytes"):
        screenshot.small(png(noise), 1_000)
    for arguments, says in ((["--page", str(tmp_path / "none.html")], "none.html is not there"), (["--page", str(tmp_path), "--size", "big"], "is not there"),
                            (["--size", "big"], "write it as 1100x780")):
        with pytest.raises(SystemExit, match=says):
            screenshot.main([*arguments, "--out", str(tmp_path / "x.png")])
    assert not (tmp_path / "x.png").exists()


# ---- the workflow ----

def test_the_workflow_builds_with_this_tool_and_publishes():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((notebook.ROOT / ".github/workflows/site.yml").read_text(encoding="utf-8"))
    assert workflow[True] == {"push": {"branches": ["main"]}, "workflow_dispatch": None}               # YAML reads `on` as true
    assert workflow["permissions"] == {"contents": "read", "pages": "write", "id-token": "write"}
    job, = workflow["jobs"].values()
    uses = [step["uses"].split("@")[0].removeprefix("actions/") for step in job["steps"] if "uses" in step]
    assert uses == ["checkout", "setup-python", "configure-pages", "upload-pages-artifact", "deploy-pages"]
    built = next(step["run"] for step in job["steps"] if "make_site.py" in step.get("run", ""))
    assert built.startswith("python tests/tools/make_site.py site ") and job["environment"]["name"] == "github-pages"
    assert next(step["with"]["path"] for step in job["steps"] if "upload" in step.get("uses", "")) == "site"
    assert re.search(r"^nbconvert==[\d.]+$", (notebook.ROOT / "tests/requirements.txt").read_text(), re.M)
