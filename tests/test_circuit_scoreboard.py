"""The scoreboard's closed form, its predictions on wired circuits, and verdicts that can fail."""

import copy
import dataclasses
import itertools

import pytest
import torch
from helpers import quick_run

from circuit_evaluation import curve_sizes
from circuits import CircuitRun, EdgeScores
from config import ModelConfig
from experiments import circuit_scoreboard as program
from experiments.induction.model import WORDS, InductionRecipe
from experiments.scoreboard.measure import METHODS, RunOnce, score_model, series_cmd
from experiments.scoreboard.model import ScoredModel, as_pairs, induction_pair
from experiments.scoreboard.report import (
    BEATS_CHANCE,
    STABLE,
    scoreboard_claims,
    scoreboard_figure,
    wired_claims,
)
from experiments.wired.model import all_circuits
from model import GPT
from utils import UserError, seeded_generator


def score_wired(wired, truth=None):
    """The rows of a wired circuit, by another truth than its own where one is given."""
    pairs = wired.draw_pairs(4, seeded_generator(0))
    return score_model(ScoredModel(wired.name, wired.model, pairs, truth or wired.truth), 0, 20)


@pytest.fixture(scope="module")
def wired_rows():
    """The rows of a series, and of an OR, in which most methods miss a part."""
    wired = {each.name: each for each in all_circuits(0)}
    return {name: score_wired(wired[name]) for name in ("previous token", "OR")}


@pytest.fixture(scope="module")
def untrained_rows():
    recipe = InductionRecipe()
    model = GPT(ModelConfig(2, 2, 64, n_ctx=recipe.n_ctx, d_vocab=len(WORDS), attn_only=True), 0)
    generator = seeded_generator(0)
    pairs = as_pairs([induction_pair(generator) for _ in range(8)])
    rows = score_model(ScoredModel("untrained", model.eval(), pairs), 0, 20)
    return [row | {"took": 1.0} for row in rows]


def as_trained(rows):
    """Rows like those of a trained model for which all claims hold."""
    rows = copy.deepcopy(rows)
    for row in rows:
        row |= {"model": "trained", "auroc": None, "wired": None, "expected": None, "took": 1.0}
        if row["method"] == "random":
            row |= {"cmd": 0.7, "cmds": [0.6 + 0.01 * k for k in range(20)]}
        else:
            row |= {"cmd": 0.1, "stability": 0.9}
    return rows


def failed(rows):
    return [claim.claim for claim in scoreboard_claims(rows) if claim.holds is False]


def test_the_closed_form_of_a_series_is_the_mean_over_all_places_of_its_edges():
    n_edges, n_true = 9, 3
    sizes = curve_sizes(n_edges)
    shares = torch.tensor(sizes).double() / n_edges
    areas = []
    for places in itertools.combinations(range(n_edges), n_true):
        far = torch.tensor([float(max(places) >= n) for n in sizes]).double()
        areas.append(torch.trapezoid(far, shares))
    areas = torch.stack(areas)
    mean, spread = series_cmd(n_edges, n_true)
    assert mean == pytest.approx(areas.mean().item())
    assert spread == pytest.approx(areas.std(correction=0).item())


def test_each_method_has_the_auroc_that_was_wired_and_misses_what_it_must(wired_rows):
    for rows in wired_rows.values():
        for row in rows[:-1]:
            assert row["auroc"] == pytest.approx(row["wired"]), row["method"]
    wired = {row["method"]: row["wired"] for row in wired_rows["OR"]}
    assert wired["exact"] == wired["EAP"] == pytest.approx(0.6)
    assert wired["ACDC"] == pytest.approx(0.8) and wired["EAP-IG left"] == 1


def test_on_a_series_the_best_two_edges_are_all_that_is_needed(wired_rows):
    # 23 edges; sizes 0, 1, 2, ...: faithfulness 0, 0, 1, so 1.5 edges' worth is missing
    for row in wired_rows["previous token"][:-1]:
        assert row["cmd"] == pytest.approx(1.5 / 23, abs=1e-3), row["method"]
        assert row["stability"] == 1


def test_wired_claims_fail_with_a_wrong_truth(wired_rows):
    wired = all_circuits(0)[0]
    edges = {("embed", "L0.mlp"): None, ("L0.mlp", "logits"): None}
    rows = score_wired(wired, dataclasses.replace(wired.truth, edges=edges))
    verdicts = {claim.claim.split(":")[0]: claim.holds for claim in wired_claims(rows)}
    assert verdicts == dict.fromkeys(METHODS, False) | {"random": True}
    assert all(claim.holds for claim in wired_claims(wired_rows["previous token"]))


def test_one_wrong_ranking_among_right_ones_fails_its_claim(wired_rows):
    right = wired_rows["previous token"]
    wrong = [row | {"auroc": row["auroc"] - 0.1} for row in right if row["method"] == "exact"]
    verdicts = {claim.claim.split(":")[0]: claim.holds for claim in wired_claims([*right, *wrong])}
    assert verdicts == dict.fromkeys(METHODS, True) | {"exact": False, "random": True}


def test_random_rankings_that_are_not_random_fail_the_closed_form(wired_rows):
    rows = copy.deepcopy(wired_rows["previous token"])
    rows[-1]["cmd"] = rows[0]["cmd"]
    assert [claim.holds for claim in wired_claims(rows)][-1] is False


def test_each_trained_claim_fails_where_it_is_false(wired_rows):
    wired = [row | {"took": 1.0} for row in wired_rows["previous token"]]
    trained = as_trained(wired)
    assert not failed(wired + trained)
    for name in ("exact", "EAP-IG gauss", "ACDC"):
        bad = copy.deepcopy(trained)
        next(row for row in bad if row["method"] == name)["cmd"] = 0.7  # as a shuffled ranking
        wanted = f"{name}: p of its CMD among random rankings, median of trained models"
        assert failed(wired + bad) == [wanted]
    for name in ("exact", "EAP-IG gauss"):
        bad = copy.deepcopy(trained)
        next(row for row in bad if row["method"] == name)["stability"] = 0.1
        wanted = f"{name}: Jaccard over draws of prompts, median of trained models"
        assert failed(wired + bad) == [wanted]
    trained[-1]["took"] = 121
    assert len(failed(wired + trained)) == 1


def test_an_untrained_model_fails(wired_rows, untrained_rows):
    wired = [row | {"took": 1.0} for row in wired_rows["previous token"]]
    names = failed(wired + untrained_rows)
    assert "exact: Jaccard over draws of prompts, median of trained models" in names


def test_random_scores_in_place_of_a_methods_fail_its_claims(wired_rows, monkeypatch):
    generator = seeded_generator(0)

    def draw(scored, run):
        return EdgeScores(torch.rand(len(run.full), 4, generator=generator), ("edge",), run.full)

    for name in BEATS_CHANCE:
        monkeypatch.setitem(METHODS, name, dataclasses.replace(METHODS[name], score=draw))
    wired = all_circuits(0)[0]
    pairs = wired.draw_pairs(4, seeded_generator(0))
    rows = [row | {"took": 1.0} for row in wired_rows["previous token"]]
    drawn = [row | {"took": 1.0} for row in
             score_model(ScoredModel("drawn", wired.model, pairs), 0, 20)]
    wanted = [f"{name}: p of its CMD among random rankings, median of trained models"
              for name in BEATS_CHANCE]
    wanted += [f"{name}: Jaccard over draws of prompts, median of trained models"
               for name in STABLE]
    assert failed(rows + drawn) == wanted


def test_the_figure_shows_every_method(wired_rows):
    rows = wired_rows["previous token"] + as_trained(wired_rows["previous token"])
    upper = scoreboard_figure(rows).axes[0]
    assert {line.get_label() for line in upper.lines} == set(METHODS)
    assert "0.10 from the model" in upper.get_title("left")


def test_the_legend_of_the_figure_explains_what_is_grey_in_both_panels(wired_rows):
    rows = wired_rows["previous token"] + as_trained(wired_rows["previous token"])
    legend, = scoreboard_figure(rows).legends
    told = [text.get_text() for text in legend.get_texts()]
    assert set(told) == {*METHODS, "random rankings, 5 to 95 %", "random sets of edges"}


def test_bad_settings_are_refused():
    for bad in ({"prompts": 1}, {"prompts": 21}, {"rankings": 19}, {"seeds": ()}):
        with pytest.raises(UserError):
            program.ScoreboardConfig(**bad)


def test_kept_scores_are_read_only_by_the_same_code(tmp_path, monkeypatch):
    wired = all_circuits(0)[0]
    loads = []

    def load_one(cfg, folder, seed, trainings):
        loads.append(seed)
        yield ScoredModel(wired.name, wired.model, wired.draw_pairs(4, seeded_generator(seed)),
                          wired.truth)

    monkeypatch.setattr(program, "load_models", load_one)
    monkeypatch.setattr(program, "score_model", lambda scored, seed, rankings: [{"seed": seed}])
    monkeypatch.setattr(program, "describe_findings", lambda rows: "")
    monkeypatch.setattr(program, "board_lines", lambda rows: [])
    monkeypatch.setattr(program, "scoreboard_claims", lambda rows, judged: [])
    cfg = program.ScoreboardConfig(seeds=(0, 1), rankings=20, quick=False)
    first = program.run(cfg, tmp_path)["rows"]
    assert program.run(cfg, tmp_path)["rows"] == first and loads == [0, 1]

    program.run(dataclasses.replace(cfg, prompts=4), tmp_path)
    assert loads == [0, 1] * 2
    monkeypatch.setattr(program, "code_digest", lambda: "other code")
    program.run(dataclasses.replace(cfg, prompts=4), tmp_path)
    assert loads == [0, 1] * 3


def test_no_circuit_is_run_twice_and_its_value_is_that_of_a_run(monkeypatch):
    wired = all_circuits(0)[0]
    scored = ScoredModel(wired.name, wired.model, wired.draw_pairs(4, seeded_generator(0)))
    plain, once = CircuitRun(*scored.both), RunOnce(*scored.both)
    circuits = [once.full, once.full.only([]), *(once.full.only([e]) for e in once.full.edges())]
    runs = []
    stream = CircuitRun.stream
    monkeypatch.setattr(CircuitRun, "stream", lambda run, circuit: [
        runs.append(circuit), stream(run, circuit)][1])
    values = [once.value(circuit) for circuit in circuits + circuits]
    assert len(runs) == len(circuits)
    for circuit, value in zip(circuits + circuits, values, strict=True):
        assert torch.equal(value, plain.value(circuit))


@pytest.mark.slow
def test_the_quick_program_scores_every_model(tmp_path):
    printed, result = quick_run("circuit_scoreboard", tmp_path, n_trainings=3)
    assert len({row["model"] for row in result["rows"]}) == 13 and "FAIL" not in printed
    assert (tmp_path / "circuit_scoreboard_quick" / "circuit_scoreboard.png").exists()
