"""Claim cards: one that could not be wrong is refused, and the verdict is what the numbers say."""

import importlib.util
import math
import re

import pytest
import torch
from helpers import refusal, run_here, tiny_model, tiny_tokens

from experiments import claim_card
from experiments.cards.measure import check_possible, measure_all, perform_study
from experiments.cards.model import (
    PARTS,
    REPLICATIONS,
    RESULT,
    claim_digest,
    read_card,
    result_in,
    template,
)
from experiments.cards.report import (
    describe_card,
    describe_study,
    fill_in,
    study_claims,
    verdict_of,
)
from experiments.common import ROOT
from experiments.wired.model import previous_token
from losses import next_token_loss
from metrics import prev_token_score
from model import GPT
from utils import seeded_generator

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


def write_result(folder):
    """Fill in a result, as `check` does, without running the study."""
    result = {"measured": [0.9] * 3, "null": [0.1] * 3, "ways": {}, "more": [], "torch": "2",
              "settings": {"seeds": [10, 11, 12]}}
    path = folder / "card.md"
    path.write_text(fill_in(path.read_text(), read_card(folder), result, command="check one",
                            digest=claim_digest(folder)))


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
        for text, told in (("", "is empty"), ("… later", "is empty"), ("None.", "is empty"),
                           (None, "has no part")):
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
    assert "has 1 number;" in told("between 0.3 and more")
    for holds_if in ("greater than 0.5", "at least 0.5", "more"):
        assert "neither above nor below" in told(holds_if), holds_if
    assert "0 numbers" in told("above all")
    assert "not among the possible" in told("above 0.5", Predicted="1.5")


def test_seeds_on_which_the_threshold_was_chosen_are_not_judged(tmp_path):
    folder = write_card(tmp_path / "one", Judged_on_seeds="2 3 4")
    assert "chosen on seeds 2; judge others" in refusal(lambda: read_card(folder))
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
    assert "chosen on seeds 1; judge others" in told


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
    result = {"measured": [0.9], "null": [0.1], "ways": {}, "more": [], "settings": {"seeds": [10]},
              "torch": "2"}
    how = {"command": "the command", "digest": "0"}
    filled = fill_in(text, read_card(folder), result, **how)
    assert filled.startswith(text[:text.index("\n## Result")]) and filled.count("\n## Result") == 1
    assert fill_in(filled, read_card(folder), result, **how) == filled


def test_a_measurement_that_is_no_number_is_refused(tmp_path):
    card = read_card(write_card(tmp_path / "one", Possible_values="0 to inf"))
    check_possible(2.0, "measured", 1, card)
    for value in (math.inf, math.nan, -1.0):
        assert "seed 1" in refusal(lambda value=value: check_possible(value, "null", 1, card))


def test_the_verdict_is_what_the_numbers_say(tmp_path):
    card = read_card(write_card(tmp_path / "one"))
    for measured, other, null, verdict, holds in (
            ([0.9, 0.8], [0.7, 0.7], [0.1, 0.2], "HOLDS", [True, True, True]),
            ([0.9, 0.4], [0.7, 0.4], [0.1, 0.2], "REFUTED", [False, False, True]),
            ([0.9, 0.8], [0.7, 0.7], [0.6, 0.7], "UNDECIDED", [True, True, False]),
            ([0.9, 0.8], [0.7, 0.7], [0.6, 0.2], "HOLDS", [True, True, True]),
            ([0.9, 0.8], [0.7, 0.4], [0.1, 0.2], "DEPENDS", [True, False, True]),
            ([0.9, 0.4], [0.7, 0.7], [0.1, 0.2], "DEPENDS", [False, True, True]),
            ([0.9, 0.4], [0.7, 0.7], [0.6, 0.7], "UNDECIDED", [False, True, False]),
            ([0.9, 0.4], [0.7, 0.4], [0.6, 0.7], "REFUTED", [False, False, False]),
            ([math.nan, 0.8], [0.2, 0.2], [0.1, 0.2], "REFUTED", [False, False, True])):
        found = {"measured": measured, "null": null, "ways": {"by zero": other}, "more": []}
        assert verdict_of(card, found) == verdict, found
        assert [line.holds for line in study_claims(card, found)] == holds, found
    said = describe_study(card, {"measured": [0.9, 0.8], "null": [0.1, 0.2], "more": [],
                                 "ways": {"by zero": [0.7, 0.7]}})
    assert "Predicted 0.8, measured 0.85 (0.8 to 0.9), by zero 0.7, null 0.15." in said
    assert "holds for 2 of 2 seeds, the null for 0 of 2" in said
    half = {"measured": [0.9, 0.8], "null": [0.6, 0.2], "more": [], "ways": {}}
    assert "the null for 1 of 2" in describe_study(card, half)


def test_a_claim_about_wired_heads_is_refuted_by_untrained_ones_and_undecided_without_a_null(
        tmp_path):
    def score(model, seed):
        shape = (4, model.cfg.n_ctx)
        tokens = torch.randint(model.cfg.d_vocab, shape, generator=seeded_generator(seed))
        pattern = model.run_with_cache(tokens)[1].stack("pattern")
        return prev_token_score(pattern).mean(1).max()

    def wired(seed):
        return score(previous_token(seed).model, seed)

    def untrained(seed):
        return score(GPT(previous_token(seed).model.cfg, seed), seed)

    card = read_card(write_card(tmp_path / "one"))
    for measured, null, verdict, holds in (
            (wired, untrained, "HOLDS", [True, True]),
            (untrained, untrained, "REFUTED", [False, True]),
            (wired, wired, "UNDECIDED", [True, False])):
        numbers, _ = measure_all(card.seeds, {"measured": measured, "null": null})
        found = numbers | {"ways": {}, "more": []}
        assert verdict_of(card, found) == verdict
        assert [line.holds for line in study_claims(card, found)] == holds, verdict


def test_a_card_is_made_run_and_filled_in(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(claim_card.subprocess, "run", run_here)
    folder = write_card(tmp_path / "one")
    write_study(folder, measure="0.5")
    claim_card.main(["--research", str(tmp_path), "check", "one"])
    text = (folder / "card.md").read_text()
    assert "**REFUTED.**" in text and text.count(RESULT) == 1 and "| 11 | 0.5 | 0.1 |" in text
    assert "\nREFUTED: the result is in" in capsys.readouterr().out
    assert read_card(folder).texts == FILLED  # the claim is as it was
    claim_card.main(["--research", str(tmp_path), "list"])
    assert "one: **REFUTED.** Predicted 0.8" in capsys.readouterr().out

    (folder / "study.py").write_text("1 / 0\n")
    message = refusal(lambda: claim_card.main(["--research", str(tmp_path), "check", "one"]))
    assert "broke off" in message and "REFUTED" in (folder / "card.md").read_text()


def test_a_number_that_the_card_calls_impossible_is_refused(tmp_path):
    folder = write_card(tmp_path / "one")
    for number in (7.0, math.nan):
        message = refusal(lambda number=number: perform_study(
            folder / "study.py", "A study.", lambda seed: number, lambda seed: 0.1,
            argv=["--out_dir", str(tmp_path)]))
        assert "measured, seed 10" in message and "0 to 1" in message


def test_sections_around_the_result_are_kept_and_are_no_part_of_the_claim(tmp_path):
    folder = write_card(tmp_path / "one")
    write_study(folder)
    path = folder / "card.md"
    before = "## What the paper says\n\nIn 2019, with 48 heads.\n\n"
    after = "## What it means\n\nMuch.\n\n## What remains\n\nMore."
    path.write_text(path.read_text().replace(RESULT, before + RESULT) + "\n" + after + "\n")
    assert read_card(folder).texts == FILLED and read_card(folder).seeds == (10, 11, 12)

    for _ in range(2):  # the second result replaces the first one
        write_result(folder)
        text = path.read_text()
        assert text.count(before) == text.count(after) == text.count("**HOLDS.**") == 1
        assert text.index(before) < text.index("**HOLDS.**") < text.index(after)
        assert text.endswith("More.\n") and "Much" not in result_in(text)
    assert read_card(folder).texts == FILLED


def test_the_list_says_which_result_is_older_than_its_claim(tmp_path, capsys):
    folder = write_card(tmp_path / "one")
    write_study(folder)
    write_card(tmp_path / "two", Null="")
    write_study(tmp_path / "two")
    write_result(folder)

    def listed():
        capsys.readouterr()
        claim_card.show_list(tmp_path)
        return capsys.readouterr().out

    assert "one: **HOLDS.**" in listed() and "changed since" not in listed()
    assert "two: not finished" in listed() and "**Null.** is empty" in listed()
    path = folder / "card.md"
    measured = path.read_text()
    path.write_text(measured.replace("above 0.5", "above 0.4"))
    assert "changed since" in listed()
    path.write_text(measured + "\n## What it means\n\nMuch.\n")
    assert "changed since" not in listed()
    write_study(folder, measure="0.8")
    assert "changed since" in listed()


def test_a_pilot_needs_no_card_and_never_looks_at_judged_seeds(tmp_path, capsys):
    def pilot(folder, *seeds):
        perform_study(folder / "study.py", "A study.", lambda seed: seed / 10, lambda seed: 0.1,
                      argv=["--pilot", "--seeds", *seeds])

    claim_card.new("one", tmp_path)
    compile((tmp_path / "one" / "study.py").read_text(), "study.py", "exec")
    pilot(tmp_path / "one", "0", "2")
    assert "measured 0 0.2\nnull 0.1 0.1\n" in capsys.readouterr().out
    folder = write_card(tmp_path / "two")
    pilot(folder, "0", "2")
    assert "seeds 11 are judged" in refusal(lambda: pilot(folder, "0", "11"))
    assert not (tmp_path / "outputs").exists() and not (folder / "outputs").exists()
    perform_study(folder / "study.py", "A study.", float, float, argv=["--pilot"])
    assert "seed 0 1 2\nmeasured 0 1 2\n" in capsys.readouterr().out


def test_seeds_at_which_a_pilot_looked_are_not_judged_though_the_card_was_not_finished(tmp_path):
    claim_card.new("one", tmp_path)
    folder = tmp_path / "one"
    for seeds in (("11",), ("30",)):
        perform_study(folder / "study.py", "A study.", float, float,
                      argv=["--pilot", "--seeds", *seeds])
    write_card(folder)
    assert "looked at seeds 11; judge others" in refusal(lambda: read_card(folder))
    write_card(folder, Judged_on_seeds="12 13 14")
    assert read_card(folder).seeds == (12, 13, 14)
    told = refusal(lambda: perform_study(folder / "study.py", "", float, float,
                                         argv=["--seeds", "30", "--out_dir", str(tmp_path)]))
    assert "looked at seeds 30" in told


def test_a_new_result_says_what_the_verdicts_of_earlier_cards_were(tmp_path):
    folder = write_card(tmp_path / "one")
    write_study(folder)
    write_result(folder)
    path = folder / "card.md"
    for threshold in ("0.4", "0.3"):
        path.write_text(re.sub("above 0.[0-9]", f"above {threshold}", path.read_text()))
        for _ in range(2):  # the same card again adds nothing
            write_result(folder)
    earlier = re.findall(r"^Before, card and study (\w+) gave HOLDS with seeds 10 11 12\.$",
                         path.read_text(), re.MULTILINE)
    assert len(set(earlier)) == len(earlier) == 2


def test_names_that_are_taken_or_lead_elsewhere_are_refused(tmp_path):
    claim_card.new("one", tmp_path)
    assert "is there already" in refusal(lambda: claim_card.new("one", tmp_path))
    for name in ("../one", "", "One", "a b", "1a"):
        assert "not possible" in refusal(lambda name=name: claim_card.new(name, tmp_path)), name
    assert "has no card.md" in refusal(lambda: claim_card.check("two", tmp_path))


# The cards of this project

CARDS = [ROOT / "research" / name / "card.md" for name in REPLICATIONS]


def test_the_four_cards_are_finished_and_their_results_are_those_of_their_text():
    for path in CARDS:
        card = read_card(path.parent)  # refuses nothing
        text = path.read_text(encoding="utf-8")
        result = result_in(text)
        line = describe_card(text, claim_digest(path.parent))
        assert "changed since" not in line, f"{card.name}: {line}"

        # the result speaks of the claim that stands above it
        assert re.match(r"\*\*(HOLDS|REFUTED|DEPENDS|UNDECIDED)\.\*\*", result), card.name
        assert f"Predicted {card.predicted:g}," in result, card.name
        rows = re.findall(r"^\| (\d+) \|", result, re.MULTILINE)
        assert tuple(map(int, rows)) == card.seeds, card.name
        assert f"check {card.name}`" in result, card.name
        for heading in ("What the paper says", "What was done", "What it means", "What remains"):
            assert text.count(f"## {heading}\n") == 1, f"{card.name} has no {heading}"


@pytest.mark.slow
def test_the_scan_of_untrained_heads_comes_out_as_its_card_says(tmp_path):
    study = load_study("dead_heads")
    with pytest.raises(SystemExit) as ended:
        study.main(["--out_dir", str(tmp_path)])
    assert ended.value.code == 0  # the claim holds, and the null does not


def test_the_verdicts_in_the_roadmap_are_those_on_the_cards():
    page = (ROOT / "COURSE_ROADMAP.md").read_text(encoding="utf-8")
    for path in CARDS:
        verdict = result_in(path.read_text(encoding="utf-8")).split(".")[0].strip("*")
        said = re.search(rf"^\| `{path.parent.name}` \|.*", page, re.MULTILINE)
        assert said and f"| {verdict} |" in said[0], f"{path.parent.name}: {verdict}"


def load_study(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "research" / name / "study.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    return study


def test_paths_through_all_heads_are_the_whole_model_and_through_none_the_embedding():
    model = tiny_model(n_layers=3, attn_only=True)
    tokens = tiny_tokens()
    losses = load_study("virtual_heads").losses_by_order(
        model, tokens, lambda logits: next_token_loss(logits, tokens))
    assert losses[-1] == pytest.approx(next_token_loss(model(tokens), tokens).item(), abs=1e-5)
    assert len(losses) == 4 and len({round(loss, 3) for loss in losses}) == 4

    # without heads only the embedding is left, at the whole model's last scale
    scale = model.run_with_cache(tokens)[1]["ln_final.hook_scale"]
    with model.hooks([("ln_final.hook_scale", lambda value, hook: scale)]):
        logits = model.unembed(model.embed(tokens))
    assert losses[0] == pytest.approx(next_token_loss(logits, tokens).item(), abs=1e-5)


def test_a_push_harms_a_toy_as_much_as_the_best_of_many_random_pushes_does_at_most():
    study = load_study("fragile_toys")
    generator = seeded_generator(0)
    W = torch.randn(3, 2, 5, generator=generator)
    toys = study.Toys(W, torch.zeros(3, 1, 5))
    x = torch.rand(1, 4, 5, generator=generator)
    pushes = torch.nn.functional.normalize(torch.randn(2000, 5, generator=generator), dim=-1)
    before = ((toys(x) - x) ** 2).sum(-1)
    rises = torch.stack([((toys(x + study.LENGTH * push) - x) ** 2).sum(-1) - before
                         for push in pushes])  # [push, toy, batch]
    best = rises.max(0).values.mean(-1)
    found = study.harm(toys, x)
    assert (found >= best - 1e-4).all() and (found < 1.3 * best).all()


def test_the_p_value_of_a_head_that_looks_one_back_is_the_smallest_and_of_even_heads_is_not():
    study = load_study("dead_heads")
    back = torch.eye(16).roll(-1, 1)  # query i looks at key i - 1
    even = torch.ones(16, 16).tril()
    even = even / even.sum(-1, keepdim=True)
    pattern = torch.stack([back, even])[:, None].expand(2, 3, 16, 16)
    own, paid = study.p_values(pattern, seeded_generator(0))
    assert own[0] == paid[0] == 1 / (1 + study.DRAWS) and own[1] == paid[1] == 1

    # a drawn key is any of those that a query sees, each as often
    first, last = torch.zeros(16, 16), torch.eye(16)
    first[:, 0] = 1
    null = study.scores_of_drawn_keys(torch.stack([first, last])[:, None], seeded_generator(0))
    expected = (1 / torch.arange(2, 17)).mean().item()
    assert null.mean(0).tolist() == pytest.approx([expected, expected], abs=0.01)
