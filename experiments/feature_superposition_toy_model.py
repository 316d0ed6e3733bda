"""How features that are rarely there share dimensions: polytopes, plateaus and phases.

    python experiments/feature_superposition_toy_model.py           # 3 minutes, one thread
    python experiments/feature_superposition_toy_model.py --quick   # seconds: one seed, tiny

Claim: dense features get a dimension each, the most important ones, and the others none; the rarer
they are, the more share: two antipodal pairs, then a pentagon in the plane; many features in 20
dimensions halve them first. For one feature too many, a closed form says when it is left out, gets
a dimension or shares one. Features that never meet share a line, those that always meet do not.
Without the ReLU nothing is ever shared.
Expected: every line passes, for all seeds. A seed takes 5 s for the polytopes, 11 for the plateaus,
32 for the phases, 17 for the pairs and 7 for the linear controls (CPU, on a shared laptop core).

Chapter: COURSE_ROADMAP.md, 14 (superposition)
Read before: experiments/superposition_model.py; after: experiments/superposition_report.py
Source: Elhage et al. 2022, Toy models of superposition
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
import math
import statistics
from dataclasses import dataclass, replace
from typing import Literal

import torch

from config import check_field, option
from experiments.common import ExperimentConfig, load_or_make, perform
from experiments.superposition_model import (
    Toys,
    arrangement_of,
    chances_of,
    closed_form,
    dimensionality,
    dimensions_per_feature,
    directions,
    expected_loss,
    fit_toys,
    gaps,
    in_patterns,
    independent,
    lowest_cosine,
    pair_chances,
)
from experiments.superposition_report import claims_of, figures
from utils import Progress, run_program, seeded_generator

PLATEAU = (2.5, 3.6)  # where the plateau at 1/2 is looked for: 1 / density
NEAR = 0.03           # how far from 1/2 or 2/5 still is 1/2 or 2/5
OPPOSITE = -0.9       # the cosine below which two features are antipodal: D of 1/2 is no proof
CLEAR = 1.1           # a cell is away from the boundary where the second best costs this much more
SHUFFLES = 200        # of a phase diagram's rows or columns, for the null


@dataclass(frozen=True)
class SuperpositionConfig(ExperimentConfig):
    """What the experiment can be told beside what all can."""

    cells: int = option(14, "densities, and importances, of a phase diagram; an even number")

    def __post_init__(self):
        super().__post_init__()
        check_field(self, "cells", lambda n: n >= 4 and n % 2 == 0, "4 or more, and even")


@dataclass(frozen=True)
class Job:
    """Toys to train together: `starts` of each cell, a density with its importances.

    density: [cell]; importance: [cell or 1][feature]; meeting: of the pairs of four features.
    """

    name: str
    n_features: int
    n_hidden: int
    density: tuple[float, ...]
    importance: tuple[tuple[float, ...], ...]
    steps: int
    batch: int
    starts: int
    linear: bool = False
    meeting: Literal["", "always", "never", "by chance"] = ""

    def fresh(self, generator):
        """The toys before training."""
        return Toys.fresh(self.starts * len(self.density), self.n_features, self.n_hidden,
                          generator, linear=self.linear)

    def train(self, seed):
        """{"W": [start, cell, hidden, feature], "b": [start, cell, feature], "loss": [start,
        cell]}; no loss where there is one start: nothing is to be chosen."""
        n_cells, generator = len(self.density), seeded_generator(seed)
        density = torch.tensor(self.density).repeat(self.starts)
        weight = torch.tensor(self.importance).expand(n_cells, -1).repeat(self.starts, 1)[:, None]
        if self.meeting:
            chances = pair_chances(self.density[0], self.meeting)
            draw, chances = in_patterns(chances, self.n_features), chances[None]
        else:
            draw = independent(density, self.n_features)
        progress = Progress(self.steps, " steps")
        toys = fit_toys(self.fresh(generator), draw, weight, steps=self.steps, batch=self.batch,
                        generator=generator,
                        progress=lambda done: progress.show(done, f"{self.name}, seed {seed}"))
        progress.close()
        state = {"W": toys.W.detach().view(self.starts, n_cells, self.n_hidden, -1),
                 "b": toys.b.detach().view(self.starts, n_cells, -1)}
        if self.starts > 1:
            chances = chances if self.meeting else chances_of(density, self.n_features)
            loss = expected_loss(toys, chances, weight)
            state["loss"] = loss.view(self.starts, n_cells)
        return state


def best(state, within=0.0):
    """W of the start with the lowest expected loss, for each cell: [cell, hidden, feature].

    within: the first start whose loss is at most that share above the lowest counts instead: where
    several arrangements are equally good, the noise of the data would always choose the same one.
    """
    if "loss" not in state:
        return state["W"][0]
    loss = state["loss"]
    first = (loss <= (1 + within) * loss.min(0).values).int().argmax(0)
    return state["W"][first, torch.arange(len(first))]


def geometric(first, last, n):
    """n numbers from first to last, each the same multiple of the one before."""
    return tuple(first * (last / first) ** (i / (n - 1)) for i in range(n))


def jobs(cfg):
    """{name: Job} of all that is trained for a seed."""
    densities = geometric(1.0, 0.05, 10)
    decaying = (tuple(0.9**i for i in range(5)),)
    plane = Job("polytopes", 5, 2, densities, decaying, 3000, 512, 4)
    many = tuple(1 / each for each in geometric(1.0, 20.0, 20))
    plateau = tuple(p for p in many if PLATEAU[0] <= 1 / p <= PLATEAU[1])
    wide = Job("geometry", 200, 20, many, ((1.0,) * 200,), 2000, 128, 1)
    grid = [(p, r) for p in geometric(0.1, 1.0, cfg.cells)
            for r in geometric(0.1, 10.0, cfg.cells)]
    phases = [Job(f"phases {n},{n - 1}", n, n - 1, tuple(p for p, _ in grid),
                  tuple((1.0,) * (n - 1) + (r,) for _, r in grid), 1000, 256, 8) for n in (2, 3)]
    pairs = [Job(f"pairs {meeting}", 4, 2, (0.1,) * 16, ((1.0,) * 4,), 1500, 256, 16,
                 meeting=meeting) for meeting in ("never", "always", "by chance")]
    controls = [replace(plane, name="polytopes linear", linear=True),
                replace(wide, name="geometry linear", linear=True, density=plateau)]
    if cfg.quick:
        phases, pairs = ([replace(job, starts=2) for job in some] for some in (phases, pairs))
    every = [plane, wide, *controls, *phases, *pairs]
    return {job.name: replace(job, steps=job.steps // 20) if cfg.quick else job for job in every}


# What is measured for a seed


def polytopes(job, states, seed):
    """Five features of falling importance in the plane, at each density."""
    W, linear = best(states["polytopes"]), best(states["polytopes linear"])
    D = dimensionality(W)
    untrained = dimensionality(job.fresh(seeded_generator(seed)).W.detach())
    pair = min(range(len(job.density)), key=lambda cell: abs(job.density[cell] - 0.26))
    four = D[pair][W[pair].norm(dim=0) > 0.5]
    every_start = (dimensionality(states["polytopes"]["W"][:, -1]) - 0.4).abs().amax(-1) <= NEAR
    return {
        "W": W.tolist(), "D": D.tolist(), "density": job.density,
        "dense": D[0, :2].min().item(), "dense_others": D[0, 2:].max().item(),
        "pairs": (four - 0.5).abs().max().item() if len(four) == 4 else 0.5,
        "antipodes": lowest_cosine(W[pair]).sort().values[3].item(),
        "pentagon": (D[-1] - 0.4).abs().max().item(),
        "gaps": (gaps(W[-1]) - 72).abs().max().item(),
        "untrained_dense": untrained.sort(-1).values[:, -2].mean().item(),
        "untrained_pairs": (untrained - 0.5).abs().amax(-1).mean().item(),
        "untrained_pentagon": (untrained - 0.4).abs().amax(-1).mean().item(),
        "linear_pentagon": (dimensionality(linear[-1]) - 0.4).abs().max().item(),
        "untrained_gaps": (gaps(job.fresh(seeded_generator(seed)).W.detach()) - 72)
        .abs().amax(-1).mean().item(),
        "kept": (W[-1] ** 2).sum().item(), "linear_kept": (linear**2).sum((-2, -1)).max().item(),
        "starts": every_start.float().mean().item(),
    }


def geometry(job, states, seed):
    """200 features of equal importance in 20 dimensions, at each density."""
    W, linear = best(states["geometry"]), best(states["geometry linear"])
    star, D, rarity = dimensions_per_feature(W), dimensionality(W), 1 / torch.tensor(job.density)
    on = (rarity >= PLATEAU[0]) & (rarity <= PLATEAU[1])
    fresh = job.fresh(seeded_generator(seed)).W.detach()

    def halves(W):
        half = ((dimensionality(W) - 0.5).abs() <= NEAR) & (lowest_cosine(W) < OPPOSITE)
        return half[W.norm(dim=-2) > 0.5].float().mean().item()

    def slope(where):
        ends = [torch.log(values[where]) for values in (rarity, star)]
        return ((ends[1][-1] - ends[1][0]) / (ends[0][-1] - ends[0][0])).item()

    return {
        "rarity": rarity.tolist(), "star": star.tolist(), "D": D.tolist(),
        "length": W.norm(dim=-2).tolist(), "on": on.tolist(),
        "dense": abs(star[0].item() - 1), "plateau": (star[on] - 0.5).abs().max().item(),
        "linear": (dimensions_per_feature(linear) - 0.5).abs().max().item(),
        "halves": halves(W[on]), "untrained_halves": halves(fresh),
        "untrained_dense": (dimensions_per_feature(fresh) - 1).abs().mean().item(),
        "slope": abs(slope(on)), "slope_after": abs(slope(rarity > PLATEAU[1])),
    }


def phases(job, state, seed):
    """The last of n features in n - 1 dimensions, over densities and importances."""
    density, relative = torch.tensor(job.density), torch.tensor(job.importance)[:, -1]
    losses = closed_form(density, relative, job.n_features)
    side = math.isqrt(len(density))
    expected, order = losses.argmin(-1).view(side, side), losses.sort(-1).values
    away = (order[:, 1] >= CLEAR * order[:, 0]).view(side, side)
    found = arrangement_of(best(state)).view(side, side)
    single = arrangement_of(state["W"].flatten(0, 1)).view(-1, side, side)
    generator = seeded_generator(seed)
    orders = [torch.randperm(side, generator=generator) for _ in range(SHUFFLES)]

    def share(found, expected):
        return (found == expected)[..., away].float().mean().item()

    rows = [share(found, expected[order]) for order in orders]
    columns = [share(found, expected[:, order]) for order in orders]
    return {
        "density": sorted(set(job.density)), "importance": sorted(set(relative.tolist())),
        "expected": expected.tolist(), "found": found.tolist(), "away": away.float().mean().item(),
        "agree": share(found, expected), "agree_all": (found == expected).float().mean().item(),
        "single": share(single, expected),
        "density_shuffled": statistics.mean(rows), "importance_shuffled": statistics.mean(columns),
        "as_good": sum(share(found, expected) <= each for each in rows + columns),
        "loss": (state["loss"].min(0).values / order[:, 0]).median().item(),
    }


def pairs(states):
    """The cosine between the two of a pair, by how they meet: shares of pairs."""
    shares = {}
    for meeting in ("never", "always", "by chance"):
        unit = directions(best(states[f"pairs {meeting}"], within=0.1))
        first, second = unit[..., 0::2], unit[..., 1::2]
        cosine = (first * second).sum(-2)                         # [cell, pair]
        both = first.any(-2) & second.any(-2)                     # are there
        shares[meeting] = {"antipodal": (cosine < OPPOSITE).float().mean().item(),
                           "orthogonal": (both & (cosine.abs() < 0.1)).float().mean().item()}
    return shares


# The program


def run(cfg, folder):
    """{"claims": [Claim], "seeds": for each the measures of its studies}."""
    todo, found = jobs(cfg), []
    for seed in cfg.seeds[:1] if cfg.quick else cfg.seeds:
        states = {name: load_or_make(folder / f"seed_{seed}" / f"{name.replace(' ', '_')}.pt",
                             dataclasses.asdict(job) | {"seed": seed},
                             lambda job=job, seed=seed: job.train(seed), cfg.retrain)
                  for name, job in todo.items()}
        found.append({
            "seed": seed, "polytopes": polytopes(todo["polytopes"], states, seed),
            "geometry": geometry(todo["geometry"], states, seed), "pairs": pairs(states),
            "phases": {name[7:]: phases(job, states[name], seed)
                       for name, job in todo.items() if name.startswith("phases")}})
    return {"claims": claims_of(found, judged=not cfg.quick), "seeds": found}


def main(argv=None):
    """The program: trains, measures, prints the table, writes the figures."""
    perform(SuperpositionConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
