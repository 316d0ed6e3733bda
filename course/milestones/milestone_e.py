"""Milestone E: a claim of the learner's own, written down so that somebody else can refute it.

The page exercises/claim.md has five parts. Nothing here runs the experiment: the checks read the
page as a strict reader would, and ask for what is missing.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from course.engine.catalogue import ROOT
from course.engine.expect import expect
from course.engine.milestones import Milestone, NotYet
from utils import UserError, atomic_write, read_text

FILE = "claim.md"
PARTS = {
    "Hypothesis": "Which part of which model does what? One sentence that could be false.",
    "Intervention": "What do you change, and the command that does it: `python …`.",
    "Null": "The same intervention where the hypothesis predicts nothing.",
    "Number": "measured: … ± … over … seeds\nnull: … ± … over … seeds",
    "What would refute it": "measured above … (or below …), written down before you looked.",
}
FEWEST_WORDS = 6
LEAST_REPEATS = 3
NUMBER = r"[-−]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE]-?\d+)?"
DECIMAL_COMMA = r"\b(?:0,\d+|\d+,(?:\d{1,2}|\d{4,}))(?![\d,])"  # 0,92; but 1,000 is a thousand


@dataclass
class Work:
    """The page. parts: {heading: text}."""

    shown: str
    parts: dict


def gather(folder, given):
    """The Work of the learner's page, or of the file `given`. Without one, writes an empty page."""
    path = Path(given or folder / FILE)
    shown = f"{path.parent.name}/{path.name}"
    if not path.exists():
        if given is not None:
            raise UserError(f"{shown} is not there")
        folder.mkdir(exist_ok=True)
        with atomic_write(path, "w") as file:
            file.write("# A claim\n\n" + "\n".join(
                f"## {heading}\n\n{asked}\n" for heading, asked in PARTS.items()))
        raise NotYet(f"{shown} was not there and has the headings now; write under each of them")
    pieces = re.split(r"^## +(.+?) *$", read_text(path), flags=re.MULTILINE)[1:]
    return Work(shown, {heading: text.strip() for heading, text in
                        zip(pieces[::2], pieces[1::2], strict=True)})


def figures(text):
    """The numbers of a text, floats."""
    return [float(each.replace(",", "").replace("−", "-")) for each in re.findall(NUMBER, text)]


def result(work, label):
    """(value, low, high, n) of a line such as "null: 0.1 ± 0.02 over 5 seeds" or
    "null: 0.1 (0.05 to 0.2) over 5 seeds". Raises Wrong where there is none."""
    line = re.search(rf"^\W*{label}:(.*)$", work.parts["Number"], re.MULTILINE | re.IGNORECASE)
    expect(line, f"Number has no line that begins with `{label}:`")
    comma = re.search(DECIMAL_COMMA, line[1])
    expect(not comma, f"`{label}:{line[1]}`: write {comma[0].replace(',', '.') if comma else ''} "
           "with a decimal point")
    spread = re.search(rf"({NUMBER})\s*(?:(?:±|\+-|\+/-)\s*({NUMBER})|\(({NUMBER}) to ({NUMBER})\))"
                       rf".*?\bover ({NUMBER})", line[1])
    expect(spread, f"`{label}:{line[1]}` has no spread: write 0.92 ± 0.03 over 5 seeds, or 0.92 "
           "(0.88 to 0.95) over 12 prompts")
    value, error, low, high, n = (figures(each)[0] if each else None for each in spread.groups())
    if error is not None:
        low, high = value - error, value + error
    expect(low <= value <= high, f"`{label}:{line[1]}`: {value:g} is not within {low:g} to "
           f"{high:g}")
    return value, low, high, n


# Checks


def no_part_is_empty(work):
    """each of the five parts is there, in words of your own"""
    for heading, asked in PARTS.items():
        text = work.parts.get(heading, "")
        own = re.sub(r"\s+", " ", text.replace(asked, ""))
        expect(text, f"{heading} is empty or not there: {asked.splitlines()[0]}")
        expect(own.strip() and "…" not in own, f"{heading} still says what the empty page said")
        if heading not in ("Number", "What would refute it"):
            n_words = len(own.split())
            expect(n_words >= FEWEST_WORDS, f"{heading} is {n_words} words, {text!r}: nobody could "
                   "repeat it from that")


def the_null_is_another_run(work):
    """the null is not the intervention again"""
    null, done = (re.sub(r"\W+", " ", work.parts[name]).lower().strip()
                  for name in ("Null", "Intervention"))
    expect(null != done, "Null repeats Intervention word for word: where does the hypothesis "
           "predict nothing?")


def somebody_else_can_run_it(work):
    """a command in Intervention names a program that is there"""
    commands = re.findall(r"`((?:python|make|pytest)[^`]*)`", work.parts["Intervention"])
    expect(commands, "Intervention has no command in backquotes, such as `python my_claim.py`: how "
           "would a reader repeat it?")
    for command in commands:
        for word in command.split():
            if word.endswith(".py"):
                expect((ROOT / word).exists(), f"`{command}`: there is no {word} in this folder")


def both_numbers_have_a_spread(work):
    """the measured number and the null's have a spread, over three or more seeds, prompts or
    models"""
    for label in ("measured", "null"):
        *_, n = result(work, label)
        expect(n >= LEAST_REPEATS, f"{label} is over {n:g}: with fewer than {LEAST_REPEATS} it may "
               "be luck")


def the_null_does_not_do_it_too(work):
    """the spreads of the two numbers do not overlap"""
    _, low, high, _ = result(work, "measured")
    _, null_low, null_high, _ = result(work, "null")
    expect(null_high < low or high < null_low, f"measured is {low:g} to {high:g} and the null "
           f"{null_low:g} to {null_high:g}: they overlap, so what was found is no more than the "
           "null gives (report that: a refuted claim is a result, but not this one)")


def it_could_have_failed(work):
    """what would refute it is a number that separates the two"""
    limits = figures(work.parts["What would refute it"])
    expect(limits, "What would refute it names no number: which result would have made you give it "
           "up?")
    measured = result(work, "measured")[0]
    null = result(work, "null")[0]
    least, most = sorted((measured, null))
    expect(any(least < limit < most for limit in limits), f"What would refute it says "
           f"{', '.join(f'{limit:g}' for limit in limits)}, and no number there lies between the "
           f"null's {null:g} and the measured {measured:g}: the null would have passed, or your "
           "own result would not")


MILESTONE = Milestone(
    letter="E", title="a claim of your own", chapter=16,
    hand_in=f"exercises/{FILE}: hypothesis, intervention, null, number, what would refute it",
    gather=gather,
    checks=(no_part_is_empty, the_null_is_another_run, somebody_else_can_run_it,
            both_numbers_have_a_spread, the_null_does_not_do_it_too, it_could_have_failed))
