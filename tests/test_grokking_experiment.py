"""Grokking's measures against planted models with known waves, naive loops, and whole models."""

import dataclasses
import itertools
import math

import pytest
import torch
from helpers import quick_run
from torch.nn.functional import one_hot

import experiments.grokking.model as grokking_model
from checkpoint import load_model
from config import config_from_dict
from experiments.grokking.fourier import (
    answer_shares,
    centre_logits,
    excluded_logits,
    fourier_basis,
    key_frequencies,
    mean_by_sum,
    neuron_fits,
    pair_sums,
    restricted_logits,
    sum_shares,
    sum_waves,
    waves_of,
)
from experiments.grokking.measure import first_step, measure_losses
from experiments.grokking.model import (
    AtEquals,
    GrokkingRecipe,
    exact_loss,
    states_of,
    train_to_add,
    trained_adder,
)
from experiments.grokking.report import control_claims, summarize_grokking, timing_claims
from experiments.grokking_experiment import GrokkingConfig
from losses import cross_entropy
from model import GPT
from utils import UserError, seeded_generator

P = 13
KEYS = [2, 6]  # the last frequency of 13 is 6
RECIPE = GrokkingRecipe(p=P, d_model=8, lr=5e-3, max_steps=20)


def noise(*shape, seed=3):
    """Random values in float64."""
    return torch.randn(shape, generator=seeded_generator(seed), dtype=torch.float64)


def grid(p=P):
    """The numbers a, b and c, to broadcast to [a, b, c]."""
    numbers = torch.arange(p).double()
    return numbers[:, None, None], numbers[None, :, None], numbers[None, None, :]


def planted(keys=KEYS, weights=(5.0, 3.0), p=P):
    """Logits of a model that adds with these frequencies: sum of cos w_k(a + b - c), [a, b, c]."""
    a, b, c = grid(p)
    return sum(weight * torch.cos(2 * math.pi * k / p * (a + b - c))
               for k, weight in zip(keys, weights, strict=True))


# The waves


@pytest.mark.parametrize("p", [5, 13, 59, 113])
def test_the_waves_are_orthonormal_the_last_one_included(p):
    basis = fourier_basis(p)
    assert basis.shape == (p, p)
    torch.testing.assert_close(basis @ basis.T, torch.eye(p).double(), atol=1e-12, rtol=0)


def test_the_waves_of_a_frequency_turn_that_often():
    n = torch.arange(P).double()
    for k in range(1, P // 2 + 1):
        cos, sin = waves_of([k], P)
        angle = 2 * math.pi * k * n / P
        torch.testing.assert_close(cos, (2 / P) ** 0.5 * angle.cos())
        torch.testing.assert_close(sin, (2 / P) ** 0.5 * angle.sin())


def test_the_part_in_waves_of_the_sum_equals_projections_on_single_waves():
    values, found = noise(P, P, 4), torch.zeros(P, P, 4).double()
    for k in KEYS:  # as in the authors' code: outer products of waves of a and of b
        cos, sin = waves_of([k], P)
        for wave in (torch.outer(cos, cos) - torch.outer(sin, sin),
                     torch.outer(sin, cos) + torch.outer(cos, sin)):
            wave = wave / wave.norm()
            for c in range(4):
                found[:, :, c] += (wave * values[:, :, c]).sum() * wave
    torch.testing.assert_close(sum_waves(values, KEYS), found)


def test_the_mean_by_sum_is_that_of_a_loop():
    values = noise(P, P, 2)
    for s in range(P):
        of_sum = torch.stack([values[a, (s - a) % P] for a in range(P)])
        torch.testing.assert_close(mean_by_sum(values)[s], of_sum.mean(0))


def test_all_frequencies_together_are_the_mean_by_sum():
    values = noise(P, P, 3)
    whole = sum_waves(values, range(1, P // 2 + 1)) + values.mean((0, 1))
    of_sum = mean_by_sum(values)[(torch.arange(P)[:, None] + torch.arange(P)) % P]
    torch.testing.assert_close(whole, of_sum)


def test_the_restricted_and_the_excluded_part_sum_to_the_logits():
    logits = noise(P, P, P)
    together = restricted_logits(logits, KEYS) + excluded_logits(logits, KEYS) - logits.mean((0, 1))
    torch.testing.assert_close(together, logits)


def test_waves_of_different_frequencies_are_orthogonal():
    part = sum_waves(noise(P, P, P), [3])
    assert sum_waves(part, [1, 2, 4, 5, 6]).abs().max() < 1e-12
    torch.testing.assert_close(sum_waves(part, [3]), part)


# Planted models


def test_a_planted_model_is_all_in_its_frequencies():
    logits = planted()
    shares = sum_shares(logits)
    expected = torch.zeros(P // 2).double()
    expected[torch.tensor(KEYS) - 1] = torch.tensor([25.0, 9.0]).double() / 34
    torch.testing.assert_close(shares, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(answer_shares(logits), expected, atol=1e-12, rtol=0)
    assert key_frequencies(shares) == KEYS
    torch.testing.assert_close(restricted_logits(logits, KEYS), logits)
    assert excluded_logits(logits, KEYS).abs().max() < 1e-12


def test_a_planted_model_with_noise_answers_only_by_its_frequencies():
    logits = 4 * planted() + 6 * noise(P, P, P)
    found = measure_losses(logits, RECIPE, {"": KEYS, "_others": [1, 3]})
    assert key_frequencies(sum_shares(logits), least=0.05) == KEYS
    assert found["restricted"] < 0.05 < math.log(P) < found["excluded"]
    assert found["restricted_others"] > 1 and found["excluded_others"] < found["excluded"]
    assert found["test_loss"] > 10 * found["restricted"]


def test_a_wave_of_the_difference_is_no_wave_of_the_sum():
    a, b, c = grid()
    assert sum_shares(torch.cos(2 * math.pi * 2 / P * (a - b - c))).max() < 1e-12


def test_a_phase_is_in_the_sum_s_waves_and_not_in_the_answer_s():
    a, b, c = grid()
    angle = 2 * math.pi * 2 / P * (a + b - c)
    shifted = torch.cos(angle + math.pi / 3)
    assert sum_shares(shifted)[1].item() == pytest.approx(1)
    assert answer_shares(shifted)[1].item() == pytest.approx(0.25)  # cos(pi / 3) squared


def test_answer_shares_are_those_of_regressions():
    logits = planted() + noise(P, P, P)
    a, b, c = grid()
    flat = centre_logits(logits).flatten()
    for k, share in enumerate(answer_shares(logits), 1):
        wave = torch.cos(2 * math.pi * k / P * (a + b - c)).flatten()
        rest = flat - (flat @ wave) / (wave @ wave) * wave
        assert share.item() == pytest.approx(1 - (rest @ rest / (flat @ flat)).item())


def test_constants_of_answers_or_pairs_do_not_change_the_shares():
    logits = planted()
    shifted = logits + noise(P, P, 1) + noise(1, 1, P)
    torch.testing.assert_close(sum_shares(shifted), sum_shares(logits))


def test_the_key_frequencies_are_those_with_a_large_share_the_largest_first():
    shares = torch.tensor([0.1, 0.5, 0.02, 0.3])
    assert key_frequencies(shares, least=0.1) == [2, 4, 1]
    assert key_frequencies(shares, least=0.0) == [2, 4, 1, 3]
    assert key_frequencies(shares, least=0.6) == []
    assert restricted_logits(planted(), []).abs().max() < 1e-12  # no frequency: nothing is said


# Neurons


def test_a_neuron_of_one_frequency_is_explained_by_it_and_one_of_two_is_not():
    a, b, _ = (each.squeeze(-1) for each in grid())
    w = [2 * math.pi * k / P for k in range(P // 2 + 1)]
    one = 1 + torch.cos(w[2] * a) + 2 * torch.sin(w[2] * b) * torch.cos(w[2] * a)
    two = torch.cos(w[3] * a) * torch.ones_like(b) + 2 * torch.cos(w[5] * (a + b))
    mixed = torch.cos(w[3] * a) * torch.cos(w[5] * b)
    shares, which = neuron_fits(torch.stack([one, two, mixed, torch.ones(P, P).double()], -1))
    # cos a has p^2 / 2 of variance, 2 cos(a + b) four times as much: 4 / 5
    torch.testing.assert_close(shares, torch.tensor([1, 0.8, 0, 0], dtype=torch.float64),
                               atol=1e-9, rtol=0)
    assert which[:2].tolist() == [2, 5]


def test_neuron_fits_are_those_of_least_squares():
    post = noise(P, P, 3).relu()
    shares, which = neuron_fits(post)
    a, b = torch.cartesian_prod(torch.arange(P), torch.arange(P)).double().T
    for neuron in range(3):
        centred_post = (post[:, :, neuron] - post[:, :, neuron].mean()).flatten()
        explained = []
        for k in range(1, P // 2 + 1):
            of_a, of_b = ([torch.ones_like(n), (2 * math.pi * k / P * n).cos(),
                           (2 * math.pi * k / P * n).sin()] for n in (a, b))
            design = torch.stack([one * other for one in of_a for other in of_b], 1)
            fitted = design @ torch.linalg.lstsq(design, centred_post[:, None]).solution
            explained.append((fitted.square().sum() / centred_post.square().sum()).item())
        assert shares[neuron].item() == pytest.approx(max(explained))
        assert which[neuron] == 1 + explained.index(max(explained))


# The model and its training


def test_the_logits_at_the_equals_sign_are_those_of_the_whole_model():
    model = GPT(RECIPE.model_config(), seed=1).double()
    with torch.no_grad():
        for weight in model.parameters():  # biases too
            weight.copy_(noise(*weight.shape) / 2)
    pairs = RECIPE.pairs()
    tokens = torch.cat([pairs, torch.full((len(pairs), 1), P)], 1)
    answers = RECIPE.answers()

    def gradients_of(logits):
        model.zero_grad()
        cross_entropy(logits, answers).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    whole, alone = model(tokens)[:, -1, :P], AtEquals(model)(pairs)
    torch.testing.assert_close(alone, whole)
    torch.testing.assert_close(gradients_of(alone), gradients_of(whole))


def test_a_symmetric_split_leaves_a_pair_and_its_mirror_on_one_side():
    known = RECIPE.trained_on().view(P, P)
    assert torch.equal(known, known.T)
    assert known.double().mean().item() == pytest.approx(0.6, abs=0.06)
    other = dataclasses.replace(RECIPE, symmetric=False).trained_on().view(P, P)
    assert not torch.equal(other, other.T)
    assert other.double().mean().item() == pytest.approx(0.6, abs=0.01)


def test_answers_are_sums_or_drawn_only_once():
    for (a, b), answer in zip(RECIPE.pairs().tolist(), RECIPE.answers().tolist(), strict=True):
        assert answer == (a + b) % P
    drawn = dataclasses.replace(RECIPE, random_answers=True)
    assert torch.equal(drawn.answers(), drawn.answers())
    assert (drawn.answers() == RECIPE.answers()).double().mean() < 0.2


def test_a_loss_that_is_zero_in_float32_has_a_gradient():
    logits = torch.tensor([[0.0, 20.0]], requires_grad=True)
    exact_loss(logits, torch.tensor([1])).backward()
    expected = torch.tensor([[1.0, -1.0]]) * math.exp(-20)  # in float32 the second one is 0
    torch.testing.assert_close(logits.grad, expected, atol=0, rtol=1e-3)


def test_kept_steps_begin_with_none_end_with_the_last_and_stand_ever_further_apart():
    assert RECIPE.kept_steps()[:11] == list(range(11)) and RECIPE.kept_steps()[-1] == 20
    steps = dataclasses.replace(RECIPE, max_steps=1000).kept_steps()
    assert steps[0] == 0 and steps[-1] == 1000 and len(steps) < 82
    assert max(after / before for before, after in itertools.pairwise(steps[20:])) < 1.2


def test_a_run_keeps_its_history_and_learns_its_training_pairs(tmp_path):
    recipe = dataclasses.replace(RECIPE, max_steps=60, d_model=32)
    _, history = trained_adder(tmp_path / "checkpoint.pt", recipe, "seed_0")
    way = list(states_of(recipe, history))
    assert [step for step, _, _ in way] == recipe.kept_steps()
    start = AtEquals(GPT(recipe.model_config(), recipe.seed))(recipe.pairs()).detach()
    torch.testing.assert_close(way[0][2].flatten(0, 1), start.double())
    losses = [measure_losses(logits, recipe, {})["train_loss"]
              for _, _, logits in (way[0], way[-1])]
    assert losses[0] > 2 and losses[1] < 1
    model, tokenizer = load_model(tmp_path)
    tokens = torch.tensor([tokenizer.encode("3 12 =")])
    assert tokens.tolist() == [[3, 12, P]]
    torch.testing.assert_close(model(tokens)[0, -1, :P].double(), way[-1][2][3, 12], rtol=1e-4,
                               atol=1e-4)


def test_a_training_ends_at_twice_the_steps_that_it_took_to_learn_or_at_the_last(monkeypatch):
    def steps_of(learned):
        monkeypatch.setattr(grokking_model, "LEARNED", learned)
        model = GPT(RECIPE.model_config(), RECIPE.seed)
        return model, train_to_add(model, RECIPE, "alone")

    whole, history = steps_of(learned=0.0)
    assert history["steps"] == RECIPE.kept_steps()
    losses = [measure_losses(logits, RECIPE, {})["test_loss"]
              for _, _, logits in states_of(RECIPE, history)]
    assert losses[5] < min(losses[:5])  # at step 5 for the first time below what comes before
    model, shorter = steps_of(learned=losses[5] + 1e-9)
    assert shorter["steps"] == list(range(11))
    for name, weights in shorter["weights"].items():
        assert torch.equal(weights, history["weights"][name][:11])
        assert torch.equal(weights[-1], model.state_dict()[name])
    assert not torch.equal(whole.W_E, model.W_E)


def test_a_kept_training_is_the_one_that_would_be_made_anew(tmp_path):
    made, kept = (trained_adder(tmp_path / "checkpoint.pt", RECIPE, "seed_0") for _ in range(2))
    alone = train_to_add(GPT(RECIPE.model_config(), RECIPE.seed), RECIPE, "alone")
    for model, history in (made, kept):
        assert torch.equal(model.W_E, alone["weights"]["token_embedding.W_E"][-1])
        assert history["steps"] == alone["steps"]
        assert all(torch.equal(history["weights"][name], alone["weights"][name])
                   for name in alone["weights"])


# Claims and settings


def test_the_first_step_at_which_something_holds():
    assert first_step([0, 5, 9, 20], [0.1, 0.99, 0.5, 1.0], lambda share: share >= 0.99) == 5
    assert first_step([0, 5], [0.1, 0.2], lambda share: share >= 0.99) == math.inf


WHEN = {"train_known": 50, "test_known": 400, "unseen_falls": 100, "test_loss_falls": 300,
        "unseen_others_falls": math.inf, "unseen_all_falls": 150}


def run_reaching(test_accuracy=0.01, **when):
    """A run that reaches each level at the step in WHEN, or in `when` if it is given there."""
    return {"when": WHEN | when, "steps": [0, 50],
            "curves": {"test_accuracy": [0.0, test_accuracy], "excluded": [4.0, 7.5]},
            "final": {"share": 0.98, "keys": [2, 5], "shares": [0.0] * 29}}


def test_the_timing_claims_fail_if_a_level_is_never_reached():
    def verdicts(n_other, **when):
        seeds = [run_reaching(), run_reaching()] + [run_reaching(**when)] * n_other
        return [line.holds for line in timing_claims(seeds, 59, True, judged=True)]

    assert verdicts(0) == [None, True, True, None, True]

    # One seed is enough: the others must be wrong then, and every level must be reached
    assert verdicts(1, test_accuracy=0.06) == [None, False, True, None, True]
    assert verdicts(1, test_known=math.inf) == [None, True, False, None, True]
    assert verdicts(1, unseen_all_falls=math.inf) == [None, True, True, None, False]
    assert verdicts(1, test_known=math.inf, train_known=math.inf)[2] is False

    # How much later is a line about the median seed
    assert verdicts(1, test_known=140, unseen_all_falls=115) == [None, True, True, None, True]
    assert verdicts(3, test_known=140) == [None, True, False, None, True]
    assert verdicts(3, unseen_all_falls=115) == [None, True, True, None, False]


def test_a_line_has_no_verdict_in_a_quick_run_and_if_mirrored_pairs_help():
    def verdicts(symmetric, judged):
        return [line.holds for line in timing_claims([run_reaching()], 59, symmetric,
                                                     judged=judged)]

    assert verdicts(symmetric=False, judged=True) == [None, None, True, None, None]
    assert verdicts(symmetric=True, judged=False) == [None] * 5


def test_the_summary_names_the_step_or_says_that_there_is_none():
    found = summarize_grokking({"seed_0": run_reaching(test_known=1400)}, 59)
    assert "at step 50, and of the other pairs at step 1,400" in found
    assert "98% of the logits' variance" in found and "2 of 29 frequencies (k = " in found
    assert "the other pairs at no step" in summarize_grokking(
        {"seed_0": run_reaching(test_known=math.inf)}, 59)


def test_a_control_that_generalises_fails():
    curves = {"train_accuracy": [0.0, 1.0], "test_accuracy": [0.0, 0.9]}
    control = {"curves": curves, "final": {"share": 0.6}}
    lines = control_claims(dict.fromkeys(("no_decay", "random_answers"), control), judged=True)
    assert [line.holds for line in lines] == [False] * 4


def test_a_control_that_learned_nothing_is_none():
    for right, holds in ((0.017, False), (1.0, True)):
        control = {"curves": {"train_accuracy": [0.0, right], "test_accuracy": [0.017, 0.017]},
                   "final": {"share": 0.0}}
        lines = control_claims({"no_decay": control, "random_answers": control}, judged=True)
        assert [line.holds for line in lines] == [holds] * 4


def test_the_recipes_are_one_a_seed_and_two_controls_and_one_alone_for_the_canonical_one():
    recipes = GrokkingConfig(seeds=(4, 5)).recipes()
    assert list(recipes) == ["seed_4", "seed_5", "no_decay", "random_answers"]
    assert recipes["no_decay"] == dataclasses.replace(recipes["seed_4"], weight_decay=0.0)
    assert recipes["seed_4"] == GrokkingRecipe(seed=4)
    assert all(recipe.symmetric for recipe in recipes.values())
    canonical = GrokkingConfig(canonical=True).recipes()
    assert list(canonical) == ["canonical_seed_0"]
    recipe = canonical["canonical_seed_0"]
    assert (recipe.p, recipe.d_model, recipe.fraction) == (113, 128, 0.3)
    assert recipe.weight_decay == 1 and not recipe.symmetric
    assert GrokkingConfig(canonical=True, p=61).recipes()["canonical_seed_0"].p == 61


@pytest.mark.parametrize("wrong", [{"p": 12}, {"p": 3}, {"p": 1001}, {"fraction": 0.0},
                                   {"fraction": math.nan}, {"d_model": 30}, {"max_steps": 1},
                                   {"weight_decay": -1.0}, {"lr": 0.0}, {"seeds": ()}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        config_from_dict(GrokkingConfig, wrong)


@pytest.mark.slow
def test_a_small_run_of_the_program_writes_everything(tmp_path):
    printed, results = quick_run("grokking_experiment", tmp_path, n_trainings=3)
    assert any("key frequencies" in claim["claim"] for claim in results["claims"])
    assert len(results["claims"]) == 16
    folder = tmp_path / "grokking_experiment_quick"
    assert all((folder / f"{name}.png").stat().st_size > 10_000
               for name in ("grokking", "frequencies"))
    load_model(folder / "seed_0")
    again, same = quick_run("grokking_experiment", tmp_path)
    assert same == results and again.split("\nwritten")[0] == printed.split("\nwritten")[0]


def test_averaging_alone_makes_a_table_without_waves_better_but_not_its_key_waves_first():
    """Each right answer's logit plus noise: the mean over equal sums is better, and no few
    frequencies are better than that."""
    p = 29
    sums = pair_sums(p)
    logits = 4 * one_hot(sums, p).double() + 6 * noise(p, p, p, seed=0)
    unseen = torch.rand(p, p, generator=seeded_generator(1)) < 0.5

    def loss(frequencies):
        alone = restricted_logits(logits, frequencies, unseen)
        return cross_entropy(alone[unseen], sums[unseen]).item()

    keys = key_frequencies(sum_shares(logits), least=0)[:3]
    averaged = loss(list(range(1, (p + 1) // 2)))
    assert averaged < cross_entropy(logits[unseen], sums[unseen]).item() / 2
    assert loss(keys) > averaged
