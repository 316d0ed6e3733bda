"""Toy models of superposition: measures are exact on known geometries, the gradient equals
autograd's, and the closed form agrees with sampling."""

import math

import pytest
import torch
from helpers import quick_run

from config import config_from_dict
from experiments.feature_superposition_toy_model import SuperpositionConfig
from experiments.superposition.measure import (
    ARRANGEMENTS,
    arrangement_of,
    closed_form,
    dimensionality,
    dimensions_per_feature,
    lowest_cosine,
    measure_pairs,
    measure_phases,
    neighbour_angles,
)
from experiments.superposition.model import (
    ToyJob,
    Toys,
    best_start,
    expected_loss,
    features_in_patterns,
    fit_toys,
    independent_chances,
    independent_features,
    pair_chances,
    presence_patterns,
    toy_jobs,
)
from experiments.superposition.report import SeedMeasures, summarize_toys
from utils import UserError, seeded_generator


def ring(n, first=0.0):
    """n unit vectors at equal angles in the plane, as columns [2, n]."""
    angle = first + torch.arange(n) * (2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()])


def square_antiprism():
    """Two squares of unit vectors, turned by 45 degrees, so high that no axis is special."""
    height = 1 / math.sqrt(3)
    flat = math.sqrt(1 - height**2) * torch.cat([ring(4), ring(4, math.pi / 4)], 1)
    return torch.cat([flat, torch.tensor([[height] * 4 + [-height] * 4])])


def harmonic(n, m):
    """A tight frame: n columns of m/2 waves' cosines and sines."""
    return torch.cat([ring(n).pow(0) * torch.stack([
        (2 * math.pi * k * torch.arange(n) / n).cos(), (2 * math.pi * k * torch.arange(n) / n).sin()
    ]) for k in range(1, m // 2 + 1)])


TETRAHEDRON = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])


def scrambled(n_toys=3, n_features=5, n_hidden=2, linear=False, dtype=torch.float64):
    """Toys whose weights and biases are of ordinary size."""
    generator = seeded_generator(1)
    W = torch.randn(n_toys, n_hidden, n_features, generator=generator).to(dtype)
    b = 0.3 * torch.randn(n_toys, 1, n_features, generator=generator).to(dtype)
    return Toys(W.requires_grad_(), b.requires_grad_(), linear)


# Measures


@pytest.mark.parametrize("W, D", [
    (ring(2)[:1], 1 / 2), (ring(2), 1 / 2), (ring(3), 2 / 3), (ring(5), 2 / 5),
    (TETRAHEDRON, 3 / 4), (square_antiprism(), 3 / 8), (torch.eye(4), 1.0),
    (harmonic(9, 4), 4 / 9), (harmonic(200, 20), 1 / 10),
])
def test_dimensionality_is_exact_on_perfect_polytopes(W, D):
    assert torch.allclose(dimensionality(W.double()), torch.full(W.shape[1:], D).double())
    assert torch.allclose(dimensionality(7 * W.double()), torch.full(W.shape[1:], D).double())


def test_dimensionality_is_the_loop_over_its_definition():
    W = scrambled(1, 6, 3).W[0]
    for i in range(6):
        unit = W[:, i] / W[:, i].norm()
        shared = sum((unit @ W[:, j]) ** 2 for j in range(6))
        assert torch.isclose(dimensionality(W)[i], W[:, i].norm() ** 2 / shared)


def test_a_feature_that_is_not_written_has_dimensionality_0():
    W = torch.tensor([[1.0, 0, -1], [0, 0, 0]])
    assert dimensionality(W).tolist() == [0.5, 0.0, 0.5]
    assert dimensionality(torch.zeros(2, 3)).tolist() == [0.0] * 3


def test_half_a_dimension_each_does_not_prove_antipodal_pairs():
    turned = torch.cat([torch.eye(2), ring(8)[:, [1, 3]]], 1)  # a basis, and one 45 degrees off
    half = math.sqrt(0.5)
    for W, cosines in ((ring(4), [-1.0] * 4), (turned, [-half, 0, 0, -half]),
                       (ring(5), [math.cos(0.8 * math.pi)] * 5)):
        assert torch.allclose(lowest_cosine(3 * W), torch.tensor(cosines), atol=1e-6)
        assert torch.allclose(dimensionality(W), torch.tensor(2 / W.shape[1]))
    dropped = torch.cat([ring(4), 0.4 * ring(1)], 1)
    assert torch.allclose(lowest_cosine(dropped), torch.tensor([-1.0, -1, -1, -1, 0]), atol=1e-6)


def test_pairs_count_as_orthogonal_only_if_both_features_are_kept():
    two = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1]])        # both antipodal
    apart = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])        # one orthogonal, one half dropped
    nothing = torch.zeros(2, 4)
    for W, antipodal, orthogonal in ((two, 1, 0), (apart, 0, 0.5), (nothing, 0, 0)):
        states = {f"pairs {meeting}": {"W": W[None, None]}
                  for meeting in ("never", "always", "by chance")}
        assert measure_pairs(states)["always"] == {"antipodal": antipodal, "orthogonal": orthogonal}


def test_dimensionalities_add_up_to_at_most_the_dimensions_there_are():
    W = scrambled(50, 7, 3).W
    assert (dimensionality(W).sum(-1) <= 3 + 1e-9).all()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=seeded_generator(0))).Q.double()
    assert torch.allclose(dimensionality(turn @ W), dimensionality(W))


def test_dimensions_per_feature_of_unit_vectors_is_m_over_n():
    assert math.isclose(dimensions_per_feature(ring(5)).item(), 2 / 5, rel_tol=1e-6)


def test_two_fifths_five_times_need_not_be_a_pentagon():
    pentagon = ring(5, 0.3)
    other = torch.cat([torch.eye(2), ring(3)], 1)
    assert torch.allclose(dimensionality(other), dimensionality(pentagon))
    assert torch.allclose(neighbour_angles(pentagon), torch.full((5,), 72.0), atol=1e-4)
    assert (neighbour_angles(other) - 72).abs().max() > 40
    assert math.isclose(neighbour_angles(other).sum().item(), 360, rel_tol=1e-5)


# Data


def test_a_feature_is_there_with_its_density_and_then_uniform():
    density = torch.tensor([1.0, 0.3])
    x = independent_features(density, 2)(100_000, seeded_generator(0))
    assert x.shape == (2, 100_000, 2) and x.min() >= 0 and x.max() < 1
    for toy, share in zip(x, density, strict=True):
        there = toy[toy > 0]
        assert abs(len(there) / toy.numel() - share) < 0.005
        assert abs(there.mean() - 1 / 2) < 0.005 and abs(there.var() - 1 / 12) < 0.002
        both = (toy > 0).all(-1).float().mean()
        assert abs(both - share**2) < 0.005


def test_a_feature_present_in_a_sparser_toy_is_present_in_a_denser_one():
    x = independent_features(torch.tensor([0.6, 0.2]), 4)(1000, seeded_generator(0))
    assert ((x[0] > 0) | (x[1] == 0)).all()


@pytest.mark.parametrize("meeting", ["always", "never", "by chance"])
def test_pairs_meet_as_they_should_and_each_feature_has_its_density(meeting):
    chances = pair_chances(0.2, meeting)
    assert math.isclose(chances.sum().item(), 1, rel_tol=1e-6)
    assert torch.allclose(chances @ presence_patterns(4), torch.full((4,), 0.2))
    there = features_in_patterns(chances, 4)(50_000, seeded_generator(0))[0] > 0
    assert torch.allclose(there.float().mean(0), torch.full((4,), 0.2), atol=0.01)
    both = (there[:, 0] & there[:, 1]).float().mean().item()
    assert abs(both - {"always": 0.2, "never": 0.0, "by chance": 0.04}[meeting]) < 0.005
    assert abs((there[:, 0] & there[:, 2]).float().mean().item() - 0.04) < 0.005


def test_chances_are_those_of_independent_features():
    density = torch.tensor([0.3, 1.0])
    chances = independent_chances(density, 3)
    assert torch.allclose(chances.sum(-1), torch.ones(2)) and chances[1].tolist() == [0] * 7 + [1]
    for pattern, chance in zip(presence_patterns(3).tolist(), chances[0].tolist(), strict=True):
        assert math.isclose(chance, 0.3 ** sum(pattern) * 0.7 ** (3 - sum(pattern)), rel_tol=1e-5)


# Training


@pytest.mark.parametrize("linear", [False, True])
def test_the_gradient_by_hand_equals_autograds(linear):
    toys, importance = scrambled(linear=linear), torch.rand(3, 1, 5).double()
    x = torch.rand(1, 40, 5).double()
    expected = torch.autograd.grad(toys.loss(x, importance).sum(), [toys.W, toys.b])
    toys.backward_(x, importance)
    assert torch.allclose(toys.W.grad, expected[0]) and torch.allclose(toys.b.grad, expected[1])


def test_toys_do_not_affect_each_other():
    together, weight = scrambled(dtype=torch.float32), torch.ones(1, 1, 5)
    alone = Toys(together.W[1:2].detach().clone().requires_grad_(),
                 together.b[1:2].detach().clone().requires_grad_())
    density = torch.tensor([1.0, 0.5, 0.1])
    for toys, those in ((together, density), (alone, density[1:2])):
        fit_toys(toys, independent_features(those, 5), weight, steps=20, batch=16,
                 generator=seeded_generator(3))
    assert torch.allclose(together.W[1], alone.W[0], atol=1e-5)


def test_the_expected_loss_is_the_mean_over_samples():
    toys, weight = scrambled(2, 3, dtype=torch.float32), torch.tensor([[[1.0, 0.5, 2.0]]])
    density = torch.tensor([0.2, 0.7])
    x = independent_features(density, 3)(200_000, seeded_generator(0))
    expected = expected_loss(toys, independent_chances(density, 3), weight, n_values=20_000)
    assert torch.allclose(expected, toys.loss(x, weight).detach(), rtol=0.03)


def test_two_rare_features_share_a_line_and_without_the_relu_they_do_not():
    job = ToyJob("pair", 2, 1, (0.1,), ((1.0, 0.9),), 400, 64, 6)
    W = best_start(job.train(0))[0, 0]
    assert W[0] * W[1] < -0.9
    linear = ToyJob("pair", 2, 1, (0.1,), ((1.0, 0.5),), 400, 64, 6, linear=True)
    W = best_start(linear.train(0))[0, 0]
    assert torch.allclose(W.abs(), torch.tensor([1.0, 0.0]), atol=0.05)


def test_the_same_seed_trains_the_same_toys_and_another_does_not():
    job = ToyJob("pair", 2, 1, (0.5, 0.1), ((1.0, 1.0),), 30, 32, 2)
    one, same, other = job.train(0), job.train(0), job.train(1)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["W"], other["W"])


def test_of_several_starts_the_one_with_the_lowest_loss_counts():
    W = torch.arange(12.0).view(2, 3, 1, 2)
    state = {"W": W, "loss": torch.tensor([[1.0, 2, 3], [2, 1, 4]])}
    assert torch.equal(best_start(state), torch.stack([W[0, 0], W[1, 1], W[0, 2]]))
    assert torch.equal(best_start(state, within=1.0), W[0])
    assert torch.equal(best_start(state, within=0.5), best_start(state))


# The closed form


def arranged(density, n_features):
    """The arrangements as toys: the last feature absent, alone, or opposite to the first."""
    absent = torch.eye(n_features)[:-1]
    alone = absent.roll(1, -1)                       # the first is absent
    opposite = absent.clone()
    opposite[0, -1] = -1
    b = torch.zeros(3, 1, n_features)
    b[0, 0, -1] = b[1, 0, 0] = density / 2
    if n_features == 3 and density < 4 / 7:          # the first two share a line
        alone = torch.tensor([[1.0, -1, 0], [0, 0, 1]])
        b[1] = 0
    return Toys(torch.stack([absent, alone, opposite]), b)


@pytest.mark.parametrize("n_features", [2, 3])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("importance", [0.2, 3.0])
def test_the_closed_form_is_what_sampling_gives(n_features, density, importance):
    weight = torch.ones(1, 1, n_features)
    weight[..., -1] = importance
    x = independent_features(torch.full((3,), density), n_features)(400_000, seeded_generator(0))
    toys, expected = arranged(density, n_features), closed_form(
        torch.tensor(density), torch.tensor(importance), n_features)
    each = (weight * (toys(x) - x) ** 2).sum(-1)                # [arrangement, sample]
    error = each.std(-1) / math.sqrt(each.shape[1])
    assert ((each.mean(-1) - expected).abs() < 4 * error + 1e-6).all()
    chances = independent_chances(torch.tensor([density]), n_features)
    exact = expected_loss(toys, chances, weight, n_values=200_000)
    assert torch.allclose(exact, expected, rtol=0.02)


def test_the_boundary_between_absent_and_antipodal_is_where_the_algebra_puts_it():
    p = torch.tensor([0.1, 0.3, 0.5])
    losses = closed_form(p, 2 * p / (4 - 5 * p), 2)
    assert torch.allclose(losses[:, 0], losses[:, 2])
    corner = closed_form(torch.tensor(4 / 7), torch.tensor(1.0), 2)
    assert torch.allclose(corner, corner[0].expand(3))


def test_an_arrangement_is_recognised():
    found = arrangement_of(arranged(0.3, 3).W)
    assert [ARRANGEMENTS[i] for i in found] == ["absent", "dedicated", "antipodal"]


def planted(job):
    """A state in which each cell has the arrangement of the closed form."""
    density, importance = torch.tensor(job.density), torch.tensor(job.importance)[:, -1]
    kinds = closed_form(density, importance, job.n_features).argmin(-1)
    W = torch.stack([arranged(p, job.n_features).W[kind]
                     for p, kind in zip(job.density, kinds, strict=True)])
    return {"W": W[None].repeat(2, 1, 1, 1), "loss": torch.ones(2, len(kinds))}


@pytest.mark.parametrize("name", ["phases 2,1", "phases 3,2"])
def test_a_diagram_that_is_the_closed_form_s_agrees_fully_and_a_shuffled_one_does_not(name):
    job = toy_jobs(cells=10)[name]
    state = planted(job)
    found = measure_phases(job, state, seed=0)
    assert found["agree"] == found["agree_all"] == found["single"] == 1
    assert found["density_shuffled"] < 0.9 and found["importance_shuffled"] < 0.7
    assert found["as_good"] <= 5 and 0.6 < found["away"] < 1
    state["W"] = state["W"].view(2, 10, 10, job.n_hidden, -1).transpose(1, 2).flatten(1, 2)
    assert measure_phases(job, state, seed=0)["agree"] < 0.8


# The program


@pytest.mark.parametrize("flags", [{"cells": 7}, {"cells": 2}, {"seeds": ()}, {"seeds": (-1,)}])
def test_settings_out_of_range_are_refused(flags):
    with pytest.raises(UserError, match=next(iter(flags))):
        config_from_dict(SuperpositionConfig, flags)


def test_a_line_holds_only_if_it_holds_for_every_seed():
    found = [{"a": {"b": 0.01}}, {"a": {"b": 0.05}}]

    def line(judged=True, **threshold):
        return SeedMeasures(found, judged).claim("", ("a", "b"), "untrained 1", **threshold)

    low = line(below=0.06)
    assert low.holds and (low.low, low.high, low.mark) == (0.01, 0.05, 0.06)
    assert math.isclose(low.measured, 0.03) and low.control == "below 0.06; untrained 1"
    assert not line(below=0.04).holds
    assert not line(above=0.02).holds
    assert line(judged=False, below=0.04).holds is None


def test_the_summary_reports_the_measures_even_if_a_claim_fails():
    W = [[[1.0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], [[1.0, -1, 0, 0, 0], [0, 0, 1, -1, 0.4]]]
    seed = {"polytopes": {"W": W},
            "geometry": {"star": [1.0, 0.75, 0.1], "on": [False, True, False]},
            "phases": {"2,1": {"agree": 0.9}, "3,2": {"agree": 0.3}}}
    text = summarize_toys([seed])
    assert all(words in text for words in ("keeps 2 of 5", "and 4 if", "has 0.75", "30%"))


@pytest.mark.slow
def test_the_quick_run_writes_everything(tmp_path):
    printed, result = quick_run("feature_superposition_toy_model", tmp_path, n_trainings=9)
    assert len(result["claims"]) == 14 and printed.count("\n|") >= 15
    folder = tmp_path / "feature_superposition_toy_model_quick"
    for name in ("polytopes", "plateau", "phases"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    assert len(list((folder / "seed_0").glob("*.pt"))) == 9
