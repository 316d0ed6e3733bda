"""Measure toy models: how much of a dimension each feature has, and what a closed form predicts.

The first part takes any W; the second part measures the trained toys of one seed, study by study.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/superposition/model.py
Next: experiments/feature_superposition_toy_model.py
Source: Elhage et al. 2022, Toy models of superposition
"""

import math
import statistics

import torch

from experiments.superposition.model import PLATEAU, best_start
from utils import seeded_generator

TOLERANCE = 0.03      # the distance at which a number still counts as 1/2 or 2/5
OPPOSITE = -0.9       # the cosine below which two features are antipodal; D = 1/2 is no proof
CLEAR_RATIO = 1.1     # a cell is away from boundaries if the second best loss is this times higher
N_SHUFFLES = 200      # of a phase diagram's rows or columns, as a control
PAIR_DENSITY = 0.26   # the density at which the plane should hold two antipodal pairs

ARRANGEMENTS = ("absent", "dedicated", "antipodal")


def dimensionality(W):
    """D_i = |W_i|^2 / sum over j of (W_i . W_j / |W_i|)^2: how much of a dimension feature i has.

    [..., hidden, feature] -> [..., feature]; 0 if W_i is 0. The sum of D is at most m. It is m if
    the W_i are a tight frame of R^m; then each D is m/n.
    """
    length = W.norm(dim=-2)
    unit = W / torch.where(length > 0, length, 1.0)[..., None, :]
    shared = ((unit.mT @ W) ** 2).sum(-1)
    return torch.where(length > 0, length**2 / torch.where(shared > 0, shared, 1.0), 0.0)


def dimensions_per_feature(W):
    """D* = m / |W|_F^2, [..., hidden, feature] -> [...]: the dimensions per kept feature, if kept
    features have length 1."""
    return W.shape[-2] / (W**2).sum((-2, -1))


def unit_directions(W):
    """W's columns scaled to length 1, [..., hidden, feature]; 0 for absent features, those shorter
    than 1/2."""
    length = W.norm(dim=-2, keepdim=True)
    return torch.where(length > 0.5, W / length.clamp(min=0.5), 0.0)


def lowest_cosine(W):
    """The lowest cosine of each feature's direction with another's, [..., hidden, feature] -> [...,
    feature]: -1 if it has an antipode, 0 if it is absent."""
    unit = unit_directions(W)
    return (unit.mT @ unit).amin(-1)


def neighbour_angles(W):
    """The angles between neighbouring directions in the plane, in degrees: five times 72 for a
    pentagon. [..., 2, feature] -> [..., feature]."""
    angles = torch.atan2(W[..., 1, :], W[..., 0, :]).sort(-1).values
    return torch.rad2deg(torch.diff(angles, append=angles[..., :1] + 2 * math.pi))


def closed_form(density, importance, n_features):
    """The losses of each way to store the last of n features in n - 1 dimensions.

    density and importance: [...]; returns [..., arrangement] in the order of ARRANGEMENTS. The last
    feature has the importance `importance`, the others 1. n_features: 2 or 3.

    Directions have length 1, so a feature with a dimension of its own costs nothing. An absent
    feature is read out as its mean and costs its variance V = p/3 - p^2/4. In an antipodal pair,
    the larger value is read out minus the smaller one, and the smaller one as 0. That costs
    I_1 min(x_1, x_2)^2 or I_2 min(x_1, x_2)^2, with E min(x_1, x_2)^2 = p^2/6. If the last feature
    has a dimension of its own, another one is absent or, with two others, these are antipodal.
    """
    p = density
    variance = p / 3 - p**2 / 4
    meeting = p**2 / 6
    others = variance if n_features == 2 else torch.minimum(variance, 2 * meeting)
    return torch.stack([importance * variance, others, (1 + importance) * meeting], -1)


def arrangement_of(W):
    """How each toy stores its last feature, [toy], as an index into ARRANGEMENTS.

    The feature is absent if W_i is shorter than 1/2, dedicated if D is 3/4 or more, and antipodal
    if not (D is then about 1/2).
    """
    alone = torch.where(dimensionality(W)[..., -1] >= 0.75, 1, 2)
    return torch.where(W[..., -1].norm(dim=-1) < 0.5, 0, alone)


# What is measured for a seed


def measure_toys(jobs, states, seed):
    """All measures of one seed, as plain values: {study: {measure: value}}.

    jobs: {name: ToyJob}. states: {name: what ToyJob.train returned}.
    """
    phase_jobs = {name.removeprefix("phases "): job for name, job in jobs.items()
                  if name.startswith("phases")}
    return {
        "seed": seed,
        "polytopes": measure_polytopes(jobs["polytopes"], states, seed),
        "geometry": measure_plateau(jobs["geometry"], states, seed),
        "pairs": measure_pairs(states),
        "phases": {name: measure_phases(job, states[job.name], seed)
                   for name, job in phase_jobs.items()},
    }


def measure_polytopes(job, states, seed):
    """Five features of falling importance in the plane, at each density."""
    W = best_start(states["polytopes"])            # [density, hidden, feature]
    W_linear = best_start(states["polytopes linear"])
    W_untrained = job.fresh(seeded_generator(seed)).W.detach()
    D = dimensionality(W)                          # [density, feature]
    D_untrained = dimensionality(W_untrained)      # [toy, feature]

    # two antipodal pairs among the four features that are kept at that density
    at_pairs = min(range(len(job.density)), key=lambda cell: abs(job.density[cell] - PAIR_DENSITY))
    D_kept = D[at_pairs][W[at_pairs].norm(dim=0) > 0.5]
    from_half = (D_kept - 0.5).abs().max().item() if len(D_kept) == 4 else 0.5
    antipodes = lowest_cosine(W[at_pairs]).sort().values[3].item()

    # the pentagon, at the last density, by each start
    D_starts = dimensionality(states["polytopes"]["W"][:, -1])
    is_pentagon = (D_starts - 0.4).abs().amax(-1) <= TOLERANCE

    return {
        "W": W.tolist(), "D": D.tolist(), "density": job.density,
        "dense": D[0, :2].min().item(), "dense_others": D[0, 2:].max().item(),
        "pairs": from_half,
        "antipodes": antipodes,
        "pentagon": (D[-1] - 0.4).abs().max().item(),
        "gaps": (neighbour_angles(W[-1]) - 72).abs().max().item(),
        "untrained_dense": D_untrained.sort(-1).values[:, -2].mean().item(),
        "untrained_pairs": (D_untrained - 0.5).abs().amax(-1).mean().item(),
        "untrained_pentagon": (D_untrained - 0.4).abs().amax(-1).mean().item(),
        "linear_pentagon": (dimensionality(W_linear[-1]) - 0.4).abs().max().item(),
        "untrained_gaps": (neighbour_angles(W_untrained) - 72).abs().amax(-1).mean().item(),
        "kept": (W[-1] ** 2).sum().item(),
        "linear_kept": (W_linear**2).sum((-2, -1)).max().item(),
        "starts": is_pentagon.float().mean().item(),
    }


def measure_plateau(job, states, seed):
    """200 features of equal importance in 20 dimensions, at each density."""
    W = best_start(states["geometry"])             # [density, hidden, feature]
    W_linear = best_start(states["geometry linear"])
    W_untrained = job.fresh(seeded_generator(seed)).W.detach()
    D_star = dimensions_per_feature(W)             # [density]
    rarity = 1 / torch.tensor(job.density)
    on_plateau = (rarity >= PLATEAU[0]) & (rarity <= PLATEAU[1])

    def share_in_pairs(W):
        is_half = (dimensionality(W) - 0.5).abs() <= TOLERANCE
        in_pair = is_half & (lowest_cosine(W) < OPPOSITE)
        return in_pair[W.norm(dim=-2) > 0.5].float().mean().item()

    def slope(where):
        log_rarity = torch.log(rarity[where])
        log_D_star = torch.log(D_star[where])
        return ((log_D_star[-1] - log_D_star[0]) / (log_rarity[-1] - log_rarity[0])).item()

    return {
        "rarity": rarity.tolist(), "star": D_star.tolist(), "D": dimensionality(W).tolist(),
        "length": W.norm(dim=-2).tolist(), "on": on_plateau.tolist(),
        "dense": abs(D_star[0].item() - 1),
        "plateau": (D_star[on_plateau] - 0.5).abs().max().item(),
        "linear": (dimensions_per_feature(W_linear) - 0.5).abs().max().item(),
        "halves": share_in_pairs(W[on_plateau]),
        "untrained_halves": share_in_pairs(W_untrained),
        "untrained_dense": (dimensions_per_feature(W_untrained) - 1).abs().mean().item(),
        "slope": abs(slope(on_plateau)),
        "slope_after": abs(slope(rarity > PLATEAU[1])),
    }


def measure_phases(job, state, seed):
    """The last of n features in n - 1 dimensions, over densities and importances."""
    density = torch.tensor(job.density)
    relative = torch.tensor(job.importance)[:, -1]
    side = math.isqrt(len(density))

    # what the closed form predicts, and where it is clear
    losses = closed_form(density, relative, job.n_features)  # [cell, arrangement]
    expected = losses.argmin(-1).view(side, side)
    ordered = losses.sort(-1).values
    away = (ordered[:, 1] >= CLEAR_RATIO * ordered[:, 0]).view(side, side)

    # what was trained: the best of all starts, and each start by itself
    found = arrangement_of(best_start(state)).view(side, side)
    found_by_start = arrangement_of(state["W"].flatten(0, 1)).view(-1, side, side)

    def share_equal(found, expected):
        return (found == expected)[..., away].float().mean().item()

    # the control: the closed form with its densities or importances shuffled
    generator = seeded_generator(seed)
    orders = [torch.randperm(side, generator=generator) for _ in range(N_SHUFFLES)]
    by_rows = [share_equal(found, expected[order]) for order in orders]
    by_columns = [share_equal(found, expected[:, order]) for order in orders]

    return {
        "density": sorted(set(job.density)), "importance": sorted(set(relative.tolist())),
        "expected": expected.tolist(), "found": found.tolist(),
        "away": away.float().mean().item(),
        "agree": share_equal(found, expected),
        "agree_all": (found == expected).float().mean().item(),
        "single": share_equal(found_by_start, expected),
        "density_shuffled": statistics.mean(by_rows),
        "importance_shuffled": statistics.mean(by_columns),
        "as_good": sum(share_equal(found, expected) <= each for each in by_rows + by_columns),
        "loss": (state["loss"].min(0).values / ordered[:, 0]).median().item(),
    }


def measure_pairs(states):
    """{how two features meet: the shares of pairs that are antipodal and orthogonal}."""
    shares = {}
    for meeting in ("never", "always", "by chance"):
        unit = unit_directions(best_start(states[f"pairs {meeting}"], within=0.1))
        one, other = unit[..., 0::2], unit[..., 1::2]             # [cell, hidden, pair]
        cosine = (one * other).sum(-2)                            # [cell, pair]
        both_there = one.any(-2) & other.any(-2)
        is_orthogonal = both_there & (cosine.abs() < 0.1)
        shares[meeting] = {"antipodal": (cosine < OPPOSITE).float().mean().item(),
                           "orthogonal": is_orthogonal.float().mean().item()}
    return shares
