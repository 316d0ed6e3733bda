"""The README and docs/: the blocks run in order, and links and pictures exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import corpus
import train
from config import ModelConfig
from model import GPT
from tokenizer import BPETokenizer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


# Length, links, names


def test_the_readme_stays_short():
    n_lines = len(README.splitlines())
    assert n_lines <= 190, f"the README has {n_lines} lines; move something to docs/"


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_and_every_picture_leads_somewhere():
    n_checked = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
        for link in links:
            if link.startswith("http"):
                continue
            n_checked += 1
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name} links to {link}, which is not there"
            if anchor:
                assert anchor in anchors(target), f"{page.name}: {target.name} has no #{anchor}"
    assert n_checked > 30, f"{n_checked} links and pictures: they are no longer found"


def test_every_picture_says_what_it_shows():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        without = re.findall(r"!\[\]\([^)]*\)", text)
        without += [tag for tag in re.findall(r"<img [^>]*>", text) if 'alt="' not in tag]
        assert not without, f"{page.name} has pictures without a description: {without}"


def test_the_pages_of_docs_name_only_files_that_exist():
    for page in PAGES[1:]:
        spans = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        named = {name for span in spans for name in re.findall(r"[\w/]+\.py\b", span)}
        lost = [name for name in sorted(named) if not (ROOT / name).exists()]
        assert not lost, f"{page.name} names {lost}"


def test_the_readme_says_how_many_claims_hold_as_the_page_of_all_claims_does():
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    counted = re.search(r"\*\*(\d+ claims hold, .* skipped)\*\*", page)[1]
    assert counted in README


def test_the_readme_links_each_page_of_docs_one_time():
    for page in PAGES[1:]:
        times = README.count(f"(docs/{page.name})")
        assert times == 1, f"the README links docs/{page.name} {times} times"


def test_the_maps_name_every_module():
    modules = {path.name for path in ROOT.glob("*.py")}
    house = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    for title, text in (("README.md", README), ("docs/house.md", house)):
        [fence] = re.findall(r"map of the house.*?```\n(.*?)```", text, flags=re.DOTALL)
        named = set(re.findall(r"\b\w+\.py\b", fence))
        assert named == modules, f"the map in {title} differs in {named ^ modules}"


def test_every_experiment_of_make_is_a_row_of_the_table_and_a_part_of_docs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    names = re.search(r"^EXPERIMENTS = (.+)$", makefile, flags=re.MULTILINE)[1].split()
    rows = re.findall(r'^\| <img src="figures/\w+\.png".* \| \*\*`(\w+)`\*\*', README, re.MULTILINE)
    assert rows == names, "the table of the README is not the list of the Makefile"
    findings = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    missing = [name for name in names if f"`python experiments/{name}.py`" not in findings]
    assert not missing, f"docs/experiments.md leaves out {missing}"


# Blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny run, the text that it was trained on, and a model of GPT-2's form."""
    folder = tmp_path_factory.mktemp("readme")
    text = folder / "data" / "tiny_shakespeare.txt"
    text.parent.mkdir()
    text.write_text("".join(map(chr, range(32, 127))) + corpus.text(25_000), encoding="utf-8")
    train.main(["--data.path", str(text), "--logging.out_dir", str(folder / "outputs"),
                "--train.max_steps", "2", "--train.batch_size", "2", "--train.device", "cpu",
                "--model.d_model", "24"])

    gpt2 = folder / "gpt2_like"
    cfg = ModelConfig(n_layers=7, n_heads=1, d_model=8, n_ctx=64, d_vocab=256, tie_embeddings=True)
    GPT(cfg).save_pretrained(gpt2)
    tokens = BPETokenizer().state_dict()["tokens"]
    (gpt2 / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (gpt2 / "merges.txt").write_text("#version: 0.2\n")
    return folder


def pasted(code, folder):
    """(what is printed, what goes to stderr) when code is pasted into one interactive Python."""
    ran = subprocess.run([sys.executable, "-i", "-q"], input=code, cwd=folder, text=True,
                         capture_output=True, timeout=200,
                         env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return ran.stdout, ran.stderr


@pytest.mark.slow
def test_the_blocks_run_one_after_another_when_pasted_into_one_python(folder):
    blocks = BLOCK.findall(README)
    docs = [block for page in PAGES[1:] for block in BLOCK.findall(page.read_text("utf-8"))]
    assert len(blocks) == 3 and len(docs) == 1

    # docs' block goes on from the README's first; GPT-2 itself is not at hand, but its format is
    code = "\n".join([blocks[0], docs[0], *blocks[1:]])
    assert code.count('load_model("gpt2")') == 1
    before = set(folder.iterdir())
    printed, errors = pasted(code.replace('"gpt2"', repr(str(folder / "gpt2_like"))), folder)
    assert "Error" not in errors, errors

    # each line that is printed is one that the page shows, but for its numbers
    shown = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("# ")]
    pattern = re.compile(r"-?\d+(\.\d+)?")
    lines = printed.splitlines()[:len(shown)]
    assert [pattern.sub("#", line) for line in lines] == [pattern.sub("#", line) for line in shown]

    assert set(folder.iterdir()) == before, "a block writes outside of outputs/"
    for name in ("heads.png", "attribution.png", "lens.png"):
        assert (folder / "outputs" / name).stat().st_size > 10_000, f"{name} was not drawn"
