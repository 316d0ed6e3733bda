"""The race: every contestant takes all its steps, in turns, and is judged by its own thresholds."""

import dataclasses
import types

import pytest
import torch
from helpers import quick_run

from config import ModelConfig, TrainConfig
from experiments.speed import contestants
from experiments.speed.contestants import (
    N_EVALUATIONS,
    NANOGPT,
    OUR_DEFAULT,
    race_contestants,
    run_race,
)
from experiments.speed.report import race_claims, race_figure, summarize_race
from model import GPT


def curves(nano, mine):
    """The result of a `run_race` in which each contestant ends at (seconds, loss)."""
    return {NANOGPT: [(1.0, 3.0), nano]} | {
        name: [(0.5, 3.0), mine] for name in list(race_contestants(65, 0))[1:]}


def test_a_contestant_is_compared_with_its_own_time_and_loss():
    field = race_contestants(65, 0)
    verdicts = {}
    for loss in (1.6, 1.5, 1.4):
        races = [curves((100.0, 1.9), (seconds, loss)) for seconds in (90.0, 110.0)]
        verdicts[loss] = {claim.claim.split(" (")[0] + claim.claim.split("): ")[1][:4]: claim.holds
                          for claim in race_claims(field, races)}
    assert [verdicts[loss]["python train.pyvali"] for loss in (1.6, 1.5, 1.4)] == [
        False, True, True]
    assert [verdicts[loss]["five timesvali"] for loss in (1.6, 1.5, 1.4)] == [False, False, True]
    assert verdicts[1.6]["a third of itvali"] and not verdicts[1.6]["a third of ittime"]
    assert verdicts[1.6]["python train.pytime"] and verdicts[1.6]["nanoGPT's recipetime"] is None


def test_times_and_losses_are_means_over_seeds():
    races = [curves((100.0, 1.9), (90.0, 1.5)), curves((100.0, 1.7), (120.0, 1.7))]
    claims = {claim.claim.split(" (")[0] + claim.claim.split("): ")[1][:4]: claim
              for claim in race_claims(race_contestants(65, 0), races)}
    assert claims["python train.pytime"].measured == pytest.approx(1.05)
    assert claims["python train.pyvali"].measured == pytest.approx(1.6)
    assert (claims["python train.pyvali"].low, claims["python train.pyvali"].high) == (1.5, 1.7)
    assert claims["a third of itvali"].mark == pytest.approx(1.8)  # nanoGPT's own mean


def test_the_summary_reports_mean_times_and_losses():
    races = [curves((100.0, 1.9), (90.0, 1.5)), curves((100.0, 1.7), (110.0, 1.7))]
    told = summarize_race(race_claims(race_contestants(65, 0), races), races)
    assert all(words in told for words in ("In 1.00 of the time", "reaches 1.600", "at 1.800",
                                           "means of 2 seeds", " of 8 thresholds"))


def test_the_figure_has_a_threshold_for_each_contestant_but_nanogpt_s_in_its_colour():
    field = race_contestants(65, 0)
    races = [curves((100.0, 1.9), (90.0, 1.5)), curves((100.0, 1.7), (110.0, 1.7))]
    axes, = race_figure({name: dataclasses.asdict(each) for name, each in field.items()},
                        races).axes
    lines = {line.get_label(): line for line in axes.lines if line.get_marker() == "o"}
    crosses = {line.get_color(): (*line.get_xdata(), *line.get_ydata()) for line in axes.lines
               if line.get_marker() == "x" and len(line.get_xdata())}

    # a third of nanoGPT's time has no loss of its own: it is held against nanoGPT's, 1.8
    wanted = {"a third of nanoGPT's time": (0.35, 1.8), OUR_DEFAULT: (1.0, 1.58),
              "twice nanoGPT's time": (2.0, 1.53), "five times nanoGPT's time": (5.0, 1.47)}
    assert lines.keys() == {NANOGPT, *wanted}
    assert crosses == {lines[name].get_color(): pytest.approx(at) for name, at in wanted.items()}
    assert "threshold" in axes.get_legend().get_texts()[-1].get_text()


def test_every_seed_has_weights_and_batches_of_its_own_and_nanogpt_its_exact_gelu():
    for name in race_contestants(65, 0):
        one, other = (race_contestants(65, seed)[name] for seed in (0, 1))
        assert not torch.equal(GPT(one.model, one.train.seed).W_E,
                               GPT(other.model, other.train.seed).W_E)
        assert one.model.activation == ("gelu_exact" if name == NANOGPT else "gelu")


def test_the_batches_are_drawn_by_the_contestant_s_seed(monkeypatch):
    drawn = []

    def draw_one_batch(model, next_batch, cfg):
        drawn.append(next_batch()[0])

    monkeypatch.setattr(contestants, "fit", draw_one_batch)
    monkeypatch.setattr(contestants, "N_TURNS", 0)
    dataset = types.SimpleNamespace(train=torch.arange(60).repeat(20), val=None)
    for seed in (0, 1):
        run_race(dataset, {OUR_DEFAULT: race_contestants(65, seed)[OUR_DEFAULT]}, None)
    assert not torch.equal(*drawn)


def test_the_default_run_is_in_the_race_unchanged():
    mine = race_contestants(65, 0)[OUR_DEFAULT]
    assert mine.model == ModelConfig(d_vocab=65) and mine.train == TrainConfig()


@pytest.mark.slow
def test_a_quick_race_writes_what_it_measured(tmp_path):
    _, result = quick_run("race", tmp_path)
    for name, points in result["races"][0].items():
        seconds, losses = zip(*points, strict=True)
        assert len(points) == N_EVALUATIONS and list(seconds) == sorted(seconds), name
        assert losses[-1] < losses[0] < 3.7, name
    assert (tmp_path / "race_quick" / "race.png").stat().st_size > 10_000
