"""Read a claim card, and refuse one that could not be wrong.

A card is a page, `research/NAME/card.md`, with the parts of PARTS. It is written before anything is
measured. Beside it, `study.py` measures. Sections of its own, headed "## ", may stand before and
after the result, for what a paper says and for what the result means.

Chapter: COURSE_ROADMAP.md, 16 (independent research)
Prerequisites: utils.py
Next: experiments/cards/measure.py
Source: none
"""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

from utils import UserError, count_of, printable, read_text

PARTS = {  # each part of a card, and what it asks for
    "Question": "What do you want to know, in one sentence?",
    "Hypothesis": "A sentence that could be wrong.",
    "Intervention": "What is changed in the model, and where; or what is only read.",
    "Number": "What is measured, with its unit.",
    "Possible values": "From the smallest to the largest, such as: 0 to 1",
    "Holds if": "above X, or below X, or X to Y; for every seed.",
    "Threshold from": "On paper, a paper, or seeds that are not judged.",
    "Predicted": "The number that you expect, written down before you measure.",
    "Null": "The same number where the hypothesis predicts nothing, and why it does.",
    "Refuted by": "What would make you give up the hypothesis, in words.",
    "Judged on seeds": "Three seeds or more on which nothing was chosen, such as: 10 11 12",
}
RESULT = "## Result"
PILOT = "pilot.txt"  # beside the card: seeds that a pilot has looked at
REPLICATIONS = ("fragile_toys", "virtual_heads", "needed_heads", "dead_heads")  # the course's cards
EXAMPLE = "# An example that runs: the highest previous-token score. Put your own in its place."
HINT = "…"  # how a part begins that nobody has filled in
NO_ANSWERS = ("", "none", "no", "nothing", "n/a", "-", "?", "todo", "tbd")  # as good as empty
# A number by itself: not a part of a name such as L0H1. A - before it is its sign, unless it stands
# between two numbers.
NUMBER = (r"(?<![\w.])(?:(?<!\d)[-+])?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\binf)(?!\w)")
MISREAD = r"\d,\d|%|\d[-–]\.?\d"  # can be read in two ways: 0,5 or 1,000; 50 %; 0.2-0.4


@dataclass(frozen=True)
class Card:
    """A claim, before it is measured.

    name: of its folder. texts: {part: what was written}. threshold: the arguments of
    `common.claim`, such as {"above": 0.5}. possible: (smallest, largest) value of the number.
    predicted: the number that was expected. seeds: those that are judged.
    """

    name: str
    texts: dict
    threshold: dict
    possible: tuple
    predicted: float
    seeds: tuple


def template(name):
    """The text of a new card."""
    lines = [f"# {name}", ""]
    for part, asks in PARTS.items():
        lines += [f"**{part}.** {HINT} {asks}", ""]
    lines += [RESULT, "", "Nothing was measured yet.", ""]
    return "\n".join(lines)


def read_card(folder):
    """The Card in a folder. Raises UserError for a part that is missing or empty, for a number
    that can't be read, and for a claim that could not be refuted, or could not hold."""
    path = Path(folder) / "card.md"
    before, _ = split_result(read_text(path))
    texts = {part: find_part(before, part, path) for part in PARTS}

    possible = numbers_in(texts["Possible values"], 2, "Possible values", path)
    threshold = read_threshold(texts["Holds if"], path)
    check_can_be_wrong(threshold, possible, path)
    (predicted,) = numbers_in(texts["Predicted"], 1, "Predicted", path)
    if not possible[0] <= predicted <= possible[1]:
        raise UserError(f"{path}: Predicted {predicted:g} is not among the possible values, "
                        f"{possible[0]:g} to {possible[1]:g}; correct one of them")
    seeds = seeds_in(texts["Judged on seeds"])
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"{path}: Judged on seeds {texts['Judged on seeds']!r} has no seeds, or "
                        "one twice; write some, such as 10 11 12")
    card = Card(Path(folder).name, texts, threshold, possible, predicted, seeds)
    check_seeds_are_new(card, folder, seeds)
    return card


def split_result(text):
    """(the card before its heading RESULT, what stands below it). Only a whole line is the heading.
    """
    before, *after = re.split(rf"^{RESULT}[ \t]*$", text, maxsplit=1, flags=re.MULTILINE)
    return before, "".join(after)


def seeds_in(text):
    """The seeds that a text names, a tuple, such as "10 11 12" or "10 to 12"."""
    seeds = []
    for first, last in re.findall(r"(?<![\w.])(\d+)(?:\s*(?:to|-|–)\s*(\d+))?(?![\w.]*\d)", text):
        seeds += range(int(first), int(last or first) + 1)
    return tuple(seeds)


def piloted_seeds(folder):
    """The seeds that pilots of a study have looked at, a tuple. folder: of card and study."""
    path = Path(folder) / PILOT
    return seeds_in(read_text(path)) if path.exists() else ()


def check_seeds_are_new(card, folder, seeds):
    """Raise UserError if the card's threshold was chosen on some of these seeds, or if a pilot has
    looked at some. folder: of card and study."""
    said = card.texts["Threshold from"]
    chosen_on = seeds_in(said) if "seed" in said.lower() else ()
    for looked_at, why in ((chosen_on, f"{card.name}: the threshold was chosen on"),
                           (piloted_seeds(folder), f"{Path(folder) / PILOT}: a pilot looked at")):
        both = sorted(set(looked_at) & set(seeds))
        if both:
            raise UserError(f"{why} seeds {', '.join(map(str, both))}; judge others")


def find_part(text, part, path):
    """What was written for a part, up to the next part or section; other bold words belong to it.
    Raises UserError if that is nothing."""
    end = rf"^\*\*(?:{'|'.join(PARTS)})\.\*\*|^## |\Z"
    found = re.search(rf"^\*\*{part}\.\*\*(.*?)(?={end})", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise UserError(f"{path} has no part **{part}.**; add it: {PARTS[part]}")
    written = " ".join(found[1].split())
    if written.strip(" .").lower() in NO_ANSWERS or written.startswith(HINT):
        raise UserError(f"{path}: **{part}.** is empty; fill it in: {PARTS[part]}")
    return written


def claim_digest(folder):
    """A checksum of a card's claim and of its study, as a short text: a result belongs to both."""
    texts = read_card(folder).texts
    claim = "\n".join(f"{part}: {text}" for part, text in texts.items())
    study = read_text(Path(folder) / "study.py")
    return hashlib.sha256(f"{claim}\n{study}".encode()).hexdigest()[:12]


def results_path(folder):
    """Where the numbers that a study measured for its card are kept. folder: of card and study."""
    return Path(folder) / "outputs" / f"research_{Path(folder).name}" / "results.json"


def result_in(text):
    """What a card's text says under "## Result", up to the next section, without spaces around."""
    return section_in(text, RESULT.removeprefix("## "))


def section_in(text, heading):
    """What a card's text says in a section, without spaces around; nothing if it has no such one.
    """
    found = re.search(rf"^## {heading}[ \t]*$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def numbers_in(text, n, part, path):
    """The n numbers in a text's first sentence, a tuple. Raises UserError if there are more or
    fewer, or if one could be read in two ways."""
    text = re.split(r"\.\s", text.replace("−", "-"))[0]
    unclear = re.search(MISREAD, text)
    if unclear:
        raise UserError(f"{path}: **{part}.** {printable(text)!r} has {unclear[0]!r}, which can be "
                        "read in two ways; write 0.5, 1000, 0.2 to 0.4")
    numbers = tuple(map(float, re.findall(NUMBER, text)))
    if len(numbers) != n:
        raise UserError(f"{path}: **{part}.** {printable(text)!r} has "
                        f"{count_of(len(numbers), 'number')}; write {n}")
    return numbers


def read_threshold(text, path):
    """The arguments of `common.claim` for a text such as "above 0.5", a dict; "0.2 to 0.4" becomes
    {"between": (0.2, 0.4)}. Raises UserError for other words, or other numbers than it needs."""
    for word in ("above", "below"):
        if text.lower().startswith(word):
            return {word: numbers_in(text, 1, "Holds if", path)[0]}
    if not re.match(rf"(between\s+)?({NUMBER})", text.replace("−", "-"), re.IGNORECASE):
        raise UserError(f"{path}: **Holds if.** {printable(text)!r} begins with neither above nor "
                        "below; write above 0.5, below 0.5, or 0.2 to 0.4")
    return {"between": numbers_in(text, 2, "Holds if", path)}


def holds(threshold, value):
    """Whether a value is as a threshold says; NaN never is."""
    if "above" in threshold:
        return value > threshold["above"]
    if "below" in threshold:
        return value < threshold["below"]
    low, high = threshold["between"]
    return low <= value <= high


def limits_of(threshold):
    """The one or two numbers of a threshold, a list."""
    (given,) = threshold.values()
    return list(given) if isinstance(given, tuple) else [given]


def check_can_be_wrong(threshold, possible, path):
    """Raise UserError if every possible value would hold, or none."""
    low, high = possible
    if not low < high:
        raise UserError(f"{path}: Possible values {low:g} to {high:g} is no range; write the "
                        "smaller number first")

    # the verdict can only change at a limit, or just beside one
    limits = limits_of(threshold)
    beside = [math.nextafter(limit, end) for limit in limits for end in (-math.inf, math.inf)]
    tried = [value for value in [*possible, *limits, *beside] if low <= value <= high]
    verdicts = {holds(threshold, value) for value in tried}
    if verdicts == {True}:
        raise UserError(f"{path}: every value from {low:g} to {high:g} would hold, so nothing "
                        "could refute it; choose another threshold")
    if verdicts == {False}:
        raise UserError(f"{path}: no value from {low:g} to {high:g} would hold; choose another "
                        "threshold")
