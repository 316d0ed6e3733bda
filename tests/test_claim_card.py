"""Claim cards: one that could not be wrong is refused, and the verdict is what the numbers say."""

import math

import pytest

from experiments import claim_card
from experiments.cards.measure import checked_number, perform_study
from experiments.cards.model import PARTS, RESULT, read_card, template
from experiments.cards.report import describe_study, fill_in, study_claims, verdict_of
from experiments.common import ROOT
from utils import UserError

FILLED = {
    "Question": "Is one more than nothing?",
    "Hypothesis": "One is more than nothing.",
    "Intervention": "None: the number is read.",
    "Number": "share of one",
    "Possible values": "0 to 1",
    "Holds if": "above 0.5, for every seed",
    "Threshold from": "seeds 0 1 2",
    "Predicted": "0.8",
    "Null": "nothing, since nothing is less",
    "Refuted by": "A share of 0.5 or less.",
    "Judged on seeds": "10 11 12",
}
STUDY = '''"""A study of a test.

    python research/one/study.py
"""
import sys
sys.path.insert(0, {root!r})
from experiments.cards.measure import perform_study
from utils import run_program

run_program(lambda: perform_study(__file__, __doc__, lambda seed: {measure},
                                  lambda seed: {null}))
'''


def write_card(folder, **changes):
    """Write a filled card with some parts changed (None: left out), and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = FILLED | {name.replace("_", " "): text for name, text in changes.items()}
    lines = ["# one", ""]
    lines += [f"**{part}.** {text}\n" for part, text in parts.items() if text is not None]
    lines += [RESULT, "", "Nothing was measured yet.", ""]
    (folder / "card.md").write_text("\n".join(lines))
    return folder


def write_study(folder, measure="0.9", null="0.1 + 0 * seed"):
    code = STUDY.format(root=str(ROOT), measure=measure, null=null)
    (folder / "study.py").write_text(code)


def refusal(call):
    with pytest.raises(UserError) as found:
        call()
    return str(found.value)


def test_a_filled_card_is_read_as_it_was_written(tmp_path):
    card = read_card(write_card(tmp_path / "one"))
    assert (card.name, card.threshold, card.possible) == ("one", {"above": 0.5}, (0, 1))
    assert (card.predicted, card.seeds) == (0.8, (10, 11, 12)) and card.texts == FILLED
    for words, threshold in (("below -0.25", {"below": -0.25}), ("0.2 to 1e-1", None),
                             ("0.1 to 0.4", {"between": (0.1, 0.4)})):
        if threshold:
            card = read_card(write_card(tmp_path / "one", Holds_if=words,
                                        Possible_values="-1 to 1"))
            assert card.threshold == threshold
    assert read_card(write_card(tmp_path / "one", Possible_values="-inf to inf")).possible == (
        -math.inf, math.inf)


def test_a_new_card_is_refused_until_every_part_is_filled_in(tmp_path):
    claim_card.new("one", tmp_path)
    assert "**Question.** is empty" in refusal(lambda: read_card(tmp_path / "one"))
    for part in PARTS:
        key = part.replace(" ", "_")
        for text, told in (("", "is empty"), ("… later", "is empty"), (None, "has no part")):
            folder = write_card(tmp_path / "two", **{key: text})
            message = refusal(lambda folder=folder: read_card(folder))
            assert part in message and told in message, (part, message)
    assert "# two" in template("two")


def test_a_claim_that_nothing_could_refute_or_fulfil_is_refused(tmp_path):
    def told(holds_if, possible="0 to 1", **more):
        folder = write_card(tmp_path / "one", Holds_if=holds_if, Possible_values=possible, **more)
        return refusal(lambda: read_card(folder))

    for holds_if in ("above -0.1", "below 1.5", "0 to 1", "-1 to 2"):
        assert "nothing could refute it" in told(holds_if), holds_if
    for holds_if in ("above 1", "below 0", "2 to 3"):
        assert "no value" in told(holds_if), holds_if
    for holds_if in ("above 0", "below 1", "0.2 to 0.3", "1 to 1"):  # each can be wrong, and right
        read_card(write_card(tmp_path / "one", Holds_if=holds_if))
    assert "is no range" in told("above 0.5", "1 to 0")
    assert "has 1 numbers" in told("between 0.3 and more")
    assert "0 numbers" in told("above all")
    assert "not among the possible" in told("above 0.5", Predicted="1.5")


def test_seeds_on_which_the_threshold_was_chosen_are_not_judged(tmp_path):
    folder = write_card(tmp_path / "one", Judged_on_seeds="2 3 4")
    assert "seeds 2 are judged" in refusal(lambda: read_card(folder))
    for seeds in ("none", "3 3"):
        folder = write_card(tmp_path / "one", Judged_on_seeds=seeds)
        assert "Judged on seeds" in refusal(lambda folder=folder: read_card(folder))
    on_paper = {"Judged_on_seeds": "2 3", "Threshold_from": "on paper, 2 days before"}
    read_card(write_card(tmp_path / "one", **on_paper))


def test_seeds_are_read_as_people_write_them(tmp_path):
    for words, seeds in (("10 to 12", (10, 11, 12)), ("10-12, 14", (10, 11, 12, 14)),
                         ("10, 11 and 13", (10, 11, 13))):
        assert read_card(write_card(tmp_path / "one", Judged_on_seeds=words)).seeds == seeds, words
    for words in ("Seeds 0 to 11", "seeds 9–10", "the smallest of 0.5 and what seed 10 gave"):
        folder = write_card(tmp_path / "one", Threshold_from=words)
        assert "seeds 10" in refusal(lambda folder=folder: read_card(folder)), words
    read_card(write_card(tmp_path / "one", Threshold_from="half of 0.10, on seeds 0 to 2"))


def test_a_study_that_is_run_by_itself_judges_no_seed_that_the_threshold_was_chosen_on(tmp_path):
    folder = write_card(tmp_path / "one")
    told = refusal(lambda: perform_study(folder / "study.py", "", float, float,
                                         argv=["--seeds", "1", "20", "--out_dir", str(tmp_path)]))
    assert "seeds 1 are judged" in told


def test_a_number_that_could_be_read_in_two_ways_is_refused(tmp_path):
    for holds_if in ("above 0,5", "above 50 %", "0.2-0.4", "0.2–0.4", "above 0.3 and below 0.8",
                     "above 0.5 in 2 of 3 seeds", "above half"):
        folder = write_card(tmp_path / "one", Holds_if=holds_if)
        assert "Holds if" in refusal(lambda folder=folder: read_card(folder)), holds_if
    for words in ("0.8 (0.7 to 0.9)", "1,000", "much information"):
        folder = write_card(tmp_path / "one", Predicted=words)
        assert "Predicted" in refusal(lambda folder=folder: read_card(folder)), words

    def threshold(text):
        return read_card(write_card(tmp_path / "one", Holds_if=text, Possible_values="-1 to 1",
                                    Predicted="0.8 nats in L0H1")).threshold

    assert threshold("below −0.25") == {"below": -0.25}
    assert threshold("above 1E-3, in nats, for every seed") == {"above": 1e-3}
    assert threshold("-.5 to -2e-1 of L1H0") == {"between": (-0.5, -0.2)}


def test_bold_words_and_the_heading_of_the_result_inside_a_part_belong_to_it(tmp_path, capsys):
    said = "One is more, unlike **Null.** says;\n**Important.** see the ## Result below"
    folder = write_card(tmp_path / "one", Hypothesis=said, Refuted_by="x\n### Results\nless")
    texts = read_card(folder).texts
    assert texts["Hypothesis"] == " ".join(said.split()) and texts["Null"] == FILLED["Null"]

    text = (folder / "card.md").read_text()
    result = {"measured": [0.9], "null": [0.1], "more": [], "settings": {"seeds": [10]},
              "torch": "2"}
    filled = fill_in(text, read_card(folder), result, "the command")
    assert filled.startswith(text[:text.index("\n## Result")]) and filled.count("\n## Result") == 1
    assert fill_in(filled, read_card(folder), result, "the command") == filled


def test_a_measurement_that_is_no_number_is_refused(tmp_path):
    card = read_card(write_card(tmp_path / "one", Possible_values="0 to inf"))
    assert checked_number(2, "measured", 1, card) == 2.0
    for value in (math.inf, math.nan, -1.0):
        assert "seed 1" in refusal(lambda value=value: checked_number(value, "null", 1, card))


def test_the_verdict_is_what_the_numbers_say(tmp_path):
    card = read_card(write_card(tmp_path / "one"))
    for measured, null, verdict, holds in (
            ([0.9, 0.8], [0.1, 0.2], "HOLDS", [True, True]),
            ([0.9, 0.4], [0.1, 0.2], "REFUTED", [False, True]),
            ([0.9, 0.8], [0.6, 0.7], "UNDECIDED", [True, False]),
            ([0.9, 0.4], [0.6, 0.7], "REFUTED", [False, False]),
            ([0.9, 0.8], [0.6, 0.2], "HOLDS", [True, True]),
            ([math.nan, 0.8], [0.1, 0.2], "REFUTED", [False, True])):
        found = {"measured": measured, "null": null, "more": []}
        assert verdict_of(card, found) == verdict, found
        assert [line.holds for line in study_claims(card, found)] == holds, found
    assert "Predicted 0.8, measured 0.85 (0.8 to 0.9), null 0.15." in describe_study(
        card, {"measured": [0.9, 0.8], "null": [0.1, 0.2], "more": []})


def test_a_card_is_made_run_and_filled_in(tmp_path, capsys):
    folder = write_card(tmp_path / "one")
    for measure, verdict in (("0.9", "HOLDS"), ("0.5", "REFUTED")):
        write_study(folder, measure)
        claim_card.main(["--research", str(tmp_path), "check", "one"])
        text = (folder / "card.md").read_text()
        assert f"**{verdict}.**" in text and text.count(RESULT) == 1
        assert f"| 11 | {measure} | 0.1 |" in text
        assert read_card(folder).texts == FILLED  # the claim is as it was
    claim_card.main(["--research", str(tmp_path), "list"])
    assert "one: **REFUTED.** Predicted 0.8" in capsys.readouterr().out

    write_study(folder, measure="1 / 0")
    message = refusal(lambda: claim_card.main(["--research", str(tmp_path), "check", "one"]))
    assert "broke off" in message and "REFUTED" in (folder / "card.md").read_text()
    write_study(folder, measure="7.0")
    assert "broke off" in refusal(lambda: claim_card.check("one", tmp_path))  # 7 is not possible


def test_names_that_are_taken_or_lead_elsewhere_are_refused(tmp_path):
    claim_card.new("one", tmp_path)
    assert "is there already" in refusal(lambda: claim_card.new("one", tmp_path))
    for name in ("../one", "", "One", "a b", "1a"):
        assert "not possible" in refusal(lambda name=name: claim_card.new(name, tmp_path)), name
    assert "has no card.md" in refusal(lambda: claim_card.check("two", tmp_path))
