"""Reading the roadmap: a chapter's text, its blocks, its questions, and a number that it states.

A number of a training is written once, on the page; what compares with it reads it from there.
"""

import re

from course.engine.catalogue import ROOT
from utils import UserError

BLOCK = re.compile(r"```python\n(.*?)```\n+```text\n(.*?)```", re.DOTALL)
NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"


def read_page():
    """The text of the roadmap."""
    return (ROOT / "COURSE_ROADMAP.md").read_text(encoding="utf-8")


def chapter_text(number):
    """A chapter's text, from its heading on. Raises UserError where there is no such chapter."""
    on_page = [int(found) for found in re.findall(r"^## (\d+) · ", read_page(), re.MULTILINE)]
    if number not in on_page:
        there = ", ".join(map(str, on_page))
        raise UserError(f"the roadmap has no chapter {number}; choose from {there}")
    return read_page().split(f"\n## {number} · ")[1].split("\n## ")[0]


def find_block(number, place):
    """(code, printed): a chapter's block, counted from 1, and what the page says that it prints."""
    blocks = BLOCK.findall(chapter_text(number))
    if not 1 <= place <= len(blocks):
        raise UserError(f"chapter {number} has {len(blocks)} blocks; choose one of them, from 1")
    return blocks[place - 1]


def find_numbers(number, words):
    """The numbers that a chapter's page states, a list, from the words around them.

    words: "of {} edges {} are needed", with {} for each number and … for others that may stand
    there. Raises ValueError where the page does not have these words, or has them with two sets of
    numbers.
    """
    pattern = re.escape(" ".join(words.split())).replace(r"\ ", r"\s+")
    pattern = pattern.replace("…", NUMBER).replace(r"\{\}", f"({NUMBER})")
    found = {match.groups() for match in re.finditer(pattern, chapter_text(number))}
    if len(found) != 1:
        raise ValueError(f"chapter {number} states {len(found)} numbers as {words!r}: "
                         f"{sorted(found)}")
    return [float(each.replace(",", "")) for each in found.pop()]


def find_number(number, words):
    """The one number that a chapter's page states in these words; as `find_numbers`."""
    return find_numbers(number, words)[0]


def stated(number, words):
    """A function that finds this number, for a Prediction."""
    return lambda: find_number(number, words)


def questions(number):
    """What a chapter asks to predict first: the points of its lists under *Predict first*, in
    order, without marks of emphasis and of formulas."""
    found = []
    for asked in re.findall(r"^\*\*Predict first\*\*.*?\n\n", chapter_text(number),
                            re.DOTALL | re.MULTILINE):
        points = re.split(r"^\d+\. ", asked, flags=re.MULTILINE)[1:]
        found += [plain_text(point) for point in points]
    return found


def plain_text(text):
    """A text in one line, without marks of emphasis, code and formulas."""
    for mark, plain in ((r"\mathrm", ""), (r"\|", "||")):
        text = text.replace(mark, plain)
    return " ".join(re.sub(r"[*`${}]", "", text).split())
