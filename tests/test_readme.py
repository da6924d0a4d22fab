"""What README and section 0 say of a run is what the stored run printed."""
import re

import benchmark
import notebook

README = (notebook.ROOT / "README.md").read_text(encoding="utf-8")


def squeezed(text):
    return re.sub(r"[ \t]+", " ", text)


def test_two_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    assert [len(block.strip().splitlines()) for block in blocks[:2]] == [1, 1]


def stored_parts():
    section = next(c["text"] for c in notebook.cells() if "<!-- stored-run" in c["text"])
    for text in (README, section):
        yield text[text.index("<!-- stored-run"):text.index("<!-- end -->")]


def test_transcripts_are_those_of_the_stored_run():
    printed = squeezed(notebook.printed())
    for part in stored_parts():
        lines = [squeezed(line) for line in part.splitlines() if re.match(r"(you|guppy)> ", line)]
        assert len(lines) >= 6
        for line in lines:
            assert line in printed.splitlines(), line


def test_numbers_are_those_of_the_stored_run():
    """In the tables between the marks, all numbers of a row stand in one line of output that begins with the row's name; those of
    the exam in the table of model and grammar."""
    printed = squeezed(notebook.printed())
    exam = re.search(r"^score model grammar\n(?:.+\n)+", printed, re.M)[0].splitlines()
    for part in stored_parts():
        checked = 0
        for row in re.findall(r"^\|(.*)\|$", part, re.M)[2:]:
            name, *values = [value.strip() for value in row.split("|")]
            ours = [value for value in values if re.fullmatch(r"[\d.,]+%?", value)]
            lines = exam if name in ("seen", "unseen", "copy", "new") else printed.splitlines()
            if ours:
                assert any(line.startswith(name) and set(ours) <= set(line.split()) for line in lines), (name, ours)
                checked += 1
        assert checked >= 8


def test_every_link_to_a_file_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)|src=\"(?!https?:)([^\"]+)\"", README):
        assert (notebook.ROOT / "".join(target)).exists(), target


def test_the_benchmark_table_is_that_of_the_stored_curves():
    curves = benchmark.read_curves(notebook.ROOT / "assets/benchmark.csv")
    assert benchmark.markdown(curves) in README
    assert curves["reference"][-1]["step"] == 1_500 and len(curves["ours"]) >= 20
