"""The roadmap: its blocks print the results on the page, and its terms link to the glossary."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from course.engine import milestones
from course.engine import page as roadmap
from course.engine.catalogue import chapter_numbers, load_chapter

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "COURSE_ROADMAP.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", PAGE, flags=re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
ENTRY = re.compile(r'^<a id="([\w-]+)"></a>\*\*([^*]+)\*\* \((\d+)\): (.+)', flags=re.MULTILINE)


def agrees(printed, claimed):
    """Equal words, numbers within 5 % (after `about`, 40 %, for what a short training gave; after
    `in this run`, a factor 3, for what it gave by chance); rounding errors, printed as 3e-08,
    within a factor 30."""
    if NUMBER.sub("#", printed) != NUMBER.sub("#", claimed):
        return False
    share, least = (0.4, 0.03) if "about" in claimed else (0.05, 2e-3)
    for one, other in zip(NUMBER.findall(printed), NUMBER.findall(claimed), strict=True):
        if "in this run" in claimed and 1 / 3 <= float(one) / (float(other) or math.nan) <= 3:
            continue
        difference = abs(float(one) - float(other))
        rounding_error = "e-" in other
        allowed = 30 * float(other) if rounding_error else share * abs(float(other)) + least
        if difference > allowed:
            return False
    return True


def test_the_comparison_itself_can_fail():
    assert agrees("loss 1.234, error 2e-08", "loss 1.230, error 3e-08")
    assert not agrees("loss 1.434, error 2e-08", "loss 1.230, error 3e-08")
    assert not agrees("loss 1.230, error 2e-06", "loss 1.230, error 3e-08")
    assert not agrees("gain 1.230", "loss 1.230")
    assert agrees("about 0.30", "about 0.23") and not agrees("about 0.14", "about 0.35")
    assert agrees("in this run 3: True", "in this run 8: True")
    assert not agrees("in this run 3: True", "in this run 3: False")
    assert not agrees("in this run 2", "in this run 8")
    assert not agrees("in this run -3", "in this run 3")
    assert agrees("in this run 0", "in this run 0") and not agrees("in this run 1", "in this run 0")


def test_every_chapter_has_a_block_to_run():
    chapters = re.split(r"^## \d+ · ", PAGE, flags=re.MULTILINE)[1:]
    assert all("```python" in chapter and "```text" in chapter for chapter in chapters)


def prose_of_chapters(page):
    """[(number, text)]: the chapters without code, formulas, headings, pictures and papers."""
    course = page.partition("\n## Glossary\n")[0]
    course = re.sub(r"^```.*?^```$", "", course, flags=re.MULTILINE | re.DOTALL)
    course = re.sub(r"\$\$.*?\$\$", "", course, flags=re.DOTALL)
    course = re.sub(r"`[^`\n]+`|\$[^$]+\$|^!\[.*$|^###+ .*$", "", course, flags=re.MULTILINE)
    course = re.sub(r"^\*\*Paper\.\*\*.*?\n\n", "", course, flags=re.MULTILINE | re.DOTALL)
    pieces = re.split(r"^## (\d+) · .*$", course, flags=re.MULTILINE)[1:]
    return [(int(number), re.sub(r"\s+", " ", text))
            for number, text in zip(pieces[::2], pieces[1::2], strict=True)]


def glossary_faults(page):
    """The faults of a page's glossary and of the links to it: a list of sentences."""
    entries = ENTRY.findall(page.partition("\n## Glossary\n")[2])
    names = [name for _, name, _, _ in entries]
    faults = [] if names == sorted(names, key=str.lower) else ["the entries are not in order"]

    known = {anchor for anchor, *_ in entries} | {"glossary"}
    lost = set(re.findall(r"\]\(#([^)]+)\)", page)) - known
    faults += [f"a link leads to #{anchor}, which is nowhere" for anchor in sorted(lost)]

    chapters = prose_of_chapters(page)

    # A term is linked where the course first uses it, at the latest in the chapter of its entry.
    for anchor, name, explained, _ in entries:
        word = rf"(?<![\w-]){re.escape(name)}(?:s|es)?\b"
        use = re.compile(rf"(\[)?{word}(?(1)\]\(#{anchor}\)|)", re.IGNORECASE)
        for number, text in chapters:
            first = use.search(text)
            if first:
                if not first[1]:
                    where = text[max(0, first.start() - 40) : first.end() + 20]
                    faults.append(f"{name}: chapter {number} uses it without a link: …{where}…")
                elif number > int(explained):
                    faults.append(f"{name}: chapter {explained} does not use it, {number} does")
                break
        else:
            faults.append(f"{name}: no chapter uses it")
    return faults


def test_a_term_is_linked_to_the_glossary_where_it_is_first_used():
    assert not glossary_faults(PAGE)
    assert len(ENTRY.findall(PAGE)) == PAGE.count('<a id="') >= 40


def test_faults_of_the_glossary_are_found():
    good = """
## 0 · One
A [nat](#nat) is a unit; a nat is small.
## 1 · Two
The [seed](#seed) again.

## Glossary

<a id="nat"></a>**nat** (0): a unit.
<a id="seed"></a>**seed** (1): a number.
"""
    assert not glossary_faults(good)
    for before, after, fault in (
            ("A [nat](#nat) is", "A nat is", "nat: chapter 0 uses it without a link"),
            ("The [seed](#seed)", "The [nat](#seeds)", "a link leads to #seeds"),
            ("**seed** (1)", "**seed** (0)", "seed: chapter 0 does not use it, 1 does"),
            ("The [seed](#seed) again", "Nothing", "seed: no chapter uses it"),
            ("**nat** (0)", "**zero** (0)", "the entries are not in order")):
        faults = glossary_faults(good.replace(before, after))
        assert any(fault in each for each in faults), f"{after}: {faults}"


def test_each_chapter_lists_its_exercises_with_their_minutes():
    for number in chapter_numbers():
        exercises = load_chapter(number).EXERCISES
        chapter = PAGE.split(f"\n## {number} · ")[1].split("\n## ")[0]
        build = " ".join(re.search(r"\*\*Build\*\* \(.*?\n\n", chapter, re.DOTALL)[0].split())
        listed = ", ".join(f"`{each.name}` ({each.minutes})" for each in exercises)
        assert listed in build, f"chapter {number} lists other exercises than course/ has"
        minutes = sum(each.minutes for each in exercises)
        assert f"**Build** ({minutes} minutes)" in build and f"CHAPTER={number}`" in build


# Predict first


def test_the_command_asks_what_the_page_asks_in_its_words():
    for number in chapter_numbers():
        asked = [roadmap.plain_text(each.question) for each in load_chapter(number).PREDICTIONS]
        assert asked == roadmap.questions(number), f"chapter {number} asks for something else"
        assert len(asked) >= 1 and all(each.endswith("?") for each in asked), f"chapter {number}"


def test_nothing_is_asked_beside_the_list_that_the_command_asks():
    for asked in re.findall(r"^\*\*Predict first.*?(?=^1\. |\n\n)", PAGE, re.DOTALL | re.MULTILINE):
        assert "?" not in asked, f"no command asks: {asked}"


def test_a_prediction_s_truth_is_what_the_page_says(monkeypatch):
    computed = []
    for number in chapter_numbers():
        for each in load_chapter(number).PREDICTIONS:
            truth = each.truth()  # raises where the page no longer states it
            if each.printed:
                stated = roadmap.find_number(number, each.printed)
                computed.append(each)
                assert truth == pytest.approx(stated, rel=0.03), f"{each.question}: {stated}"

    # The others read the page, and nothing else: without it they know nothing.
    def page_is_lost(number, words):
        raise LookupError

    monkeypatch.setattr(roadmap, "find_numbers", page_is_lost)
    for number in chapter_numbers():
        for each in load_chapter(number).PREDICTIONS:
            if each not in computed:
                with pytest.raises(LookupError):
                    each.truth()


def test_a_number_is_found_by_the_words_around_it_and_never_guessed(monkeypatch):
    text = ("x\n## 0 · One\nIt fell from 3.5 to 1,234 nats,\nand ended at -2e-05. "
            "It fell to 7 nats.\n")
    monkeypatch.setattr(roadmap, "read_page", lambda: text)
    assert roadmap.find_number(0, "fell from … to {} nats") == 1234
    assert roadmap.find_numbers(0, "from {} to {} nats, and ended at {}.") == [3.5, 1234, -2e-5]
    for words in ("to {} nats", "rose to {} nats"):  # two numbers, none
        with pytest.raises(ValueError, match="chapter 0 states"):
            roadmap.find_number(0, words)


# Milestones and misconceptions


def test_each_milestone_stands_in_the_table_and_in_its_chapter():
    for letter in milestones.LETTERS:
        found = milestones.load_milestone(letter)
        assert f"| **{letter}** · {found.title}" in PAGE, letter
        row = PAGE.split(f"| **{letter}** · ")[1].split("\n")[0]
        assert f"| {found.chapter} |" in row, row
        chapter = roadmap.chapter_text(found.chapter)
        assert f"**Milestone {letter}.**" in chapter and f"NAME={letter}`" in chapter, letter


def misconception_faults(table):
    """What is wrong with the table of misconceptions: a list of sentences."""
    faults = []
    rows = re.findall(r"^\| \*(.+?)\* \(([\d, ]+)\) \| (.+?) \| (.+?) \| (.+?) \|$", table,
                      re.MULTILINE)
    if len(rows) != table.count("\n| *"):
        faults.append("a row has another form than the others")
    for belief, chapters, _, command, prints in rows:
        found = re.fullmatch(r"`make block CHAPTER=(\d+) NUMBER=(\d+)`", command)
        if not found:
            faults.append(f"{belief}: {command} is no command")
            continue
        number, place = map(int, found.groups())
        if str(number) not in re.findall(r"\d+", chapters):
            faults.append(f"{belief}: chapter {number} is not named")
        _, output = roadmap.find_block(number, place)
        printed = {abs(float(each)) for each in NUMBER.findall(output)}
        faults += [f"{belief}: {each} is not printed" for each in NUMBER.findall(prints)
                   if "." in each and abs(float(each)) not in printed]
    return faults


def test_each_misconception_is_refuted_by_a_number_that_a_block_prints():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "course/exercise.py block $(CHAPTER) $(NUMBER)" in makefile
    table = PAGE.split("\n## Misconceptions\n")[1].split("\n## ")[0]
    assert table.count("\n| *") >= 10
    assert misconception_faults(table) == []
    for old, new, said in (("15.99", "16.99", "16.99 is not printed"),
                           ("CHAPTER=13 NUMBER=1` |", "CHAPTER=12 NUMBER=1` |", "is not named"),
                           ("`make block CHAPTER=8 NUMBER=1`", "see above", "is no command")):
        assert table.count(old) == 1, old
        assert any(said in fault for fault in misconception_faults(table.replace(old, new))), said


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the model that three chapters train is kept, once one of them has trained it."""
    return tmp_path_factory.mktemp("kept") / "gifts"


@pytest.mark.slow
@pytest.mark.parametrize("code, claimed", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_prints_what_the_page_says(code, claimed, kept, tmp_path):
    gifts = tmp_path / "outputs" / "gifts"
    if kept.exists() and "outputs/gifts" in code:
        shutil.copytree(kept, gifts)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=400,
    )
    assert run.returncode == 0, run.stderr
    printed = run.stdout.splitlines()
    assert len(printed) == len(claimed.splitlines()), run.stdout
    for line, expected in zip(printed, claimed.splitlines(), strict=True):
        assert agrees(line, expected), f"printed: {line}\nclaimed: {expected}"
    if gifts.exists() and not kept.exists():
        shutil.copytree(gifts, kept)
