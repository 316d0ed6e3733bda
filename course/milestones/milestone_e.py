"""Milestone E: a claim of the learner's own, on a card that somebody else can judge.

The card lies in research/NAME/, as `experiments/claim_card.py` makes and checks it. Nothing is run
here: the checks read the card as that program does, and ask for more.
"""

from dataclasses import dataclass
from pathlib import Path

from course.engine.catalogue import ROOT
from course.engine.expect import expect
from course.engine.milestones import Milestone, NotYet
from experiments.cards.model import (
    EXAMPLE,
    REPLICATIONS,
    claim_digest,
    holds,
    read_card,
    result_in,
    results_path,
    section_in,
)
from experiments.cards.report import filled_card
from utils import read_json, read_text

RESEARCH = ROOT / "research"
FEWEST_WORDS = 6
LEAST_SEEDS = 3
SECTIONS = ("What it means", "What remains")  # below the result


@dataclass(frozen=True)
class Work:
    """What is handed in. folder: of the card and its study."""

    folder: Path

    @property
    def text(self):
        """The card's text."""
        return read_text(self.folder / "card.md")

    @property
    def measured(self):
        """What the study measured: {"measured", "null": [seed], …}."""
        return read_json(results_path(self.folder), self.again)

    @property
    def again(self):
        """What to do where the result is missing or old."""
        return f"run python experiments/claim_card.py check {self.folder.name}"


def gather(folder, given):
    """The Work of the card with a name, or in a folder; without one, of the only card that is not
    one of the course's."""
    if given is not None:
        found = [RESEARCH / given]  # a path elsewhere stays that path
    else:
        found = [path.parent for path in sorted(RESEARCH.glob("*/card.md"))
                 if path.parent.name not in REPLICATIONS]
    if not found:
        raise NotYet("there is no card of yours; make one: python experiments/claim_card.py new "
                     "my_card")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise NotYet(f"there are {len(found)} cards of yours, {names}; name one: make milestone "
                     f"NAME=E WITH={found[0].name}")
    if not (found[0] / "card.md").exists():
        raise NotYet(f"{found[0]} has no card.md; make one: python experiments/claim_card.py new "
                     f"{found[0].name}")
    return Work(found[0])


# Checks


def the_card_could_go_either_way(work):
    """the card has every part, and its claim could hold and could be refuted"""
    read_card(work.folder)  # raises UserError otherwise


def it_is_your_own(work):
    """the card is none of the course's, and the study measures a number of your own"""
    name = work.folder.name
    expect(name not in REPLICATIONS, f"{name} is a card of the course; make one of your own")
    study = read_text(work.folder / "study.py")
    expect(EXAMPLE not in study, f"study.py still says {EXAMPLE!r}: does it measure your number? "
           "Then take this line out")


def a_reader_could_repeat_it(work):
    """hypothesis and null are sentences, and the null is not the intervention again"""
    texts = read_card(work.folder).texts
    for part in ("Hypothesis", "Null"):
        n_words = len(texts[part].split())
        expect(n_words >= FEWEST_WORDS, f"{part} is {n_words} words, {texts[part]!r}: nobody could "
               "repeat it from that")
    expect(texts["Null"] != texts["Intervention"], "Null repeats Intervention word for word: where "
           "does the hypothesis predict nothing?")


def it_is_judged_on_several_seeds(work):
    """three seeds or more are judged"""
    seeds = read_card(work.folder).seeds
    expect(len(seeds) >= LEAST_SEEDS, f"judged on seeds {seeds}: with fewer than {LEAST_SEEDS} it "
           "may be luck")


def the_result_belongs_to_the_card(work):
    """the result on the card is what its study measured, and neither has changed since"""
    expect(results_path(work.folder).exists(), f"nothing was measured yet; {work.again}")
    said = result_in(work.text)
    expect(f"card and study {claim_digest(work.folder)}." in said, "the card or its study changed "
           f"since it was measured; {work.again}")
    expect(said == result_in(filled_card(work.folder)), "the result on the card is not what "
           f"{results_path(work.folder)} says; {work.again}")


def the_null_passes_for_no_seed(work):
    """the null is another measurement, and the claim holds for none of its seeds"""
    card, found = read_card(work.folder), work.measured
    expect(found["null"] != found["measured"], f"null and measure give the same numbers, "
           f"{found['null']}: do they differ in anything?")
    passing = [f"{value:.4g}" for value in found["null"] if holds(card.threshold, value)]
    expect(not passing, f"the null gives {', '.join(passing)}, which is "
           f"{card.texts['Holds if']!r}, too: the number does not show what you claim; sharpen it, "
           "or find where the hypothesis predicts nothing")


def it_says_what_it_means(work):
    """below the result stand what it means, and what remains"""
    for heading in SECTIONS:
        words = section_in(work.text, heading).split()
        expect(len(words) >= FEWEST_WORDS, f"## {heading} has {len(words)} words: what would you "
               "tell a reader?")


MILESTONE = Milestone(
    letter="E", title="a claim of your own", chapter=16,
    hand_in="a claim card of yours, research/NAME/, with its result",
    gather=gather,
    checks=(the_card_could_go_either_way, it_is_your_own, a_reader_could_repeat_it,
            it_is_judged_on_several_seeds, the_result_belongs_to_the_card,
            the_null_passes_for_no_seed, it_says_what_it_means))
