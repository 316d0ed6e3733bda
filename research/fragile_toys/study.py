"""Compare toys with and without superposition: how much a small push at the input can harm them.

    python experiments/claim_card.py check fragile_toys

The claim, its null and its threshold are on the card: card.md in this folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import functools
import math
from dataclasses import replace

import torch

from experiments.cards.measure import kept_models, perform_study
from experiments.superposition.model import Toys, toy_jobs, trained_toys
from utils import run_program

DENSITIES = (1.0, 0.25, 0.05)  # two features are kept, then four, then five
LENGTH = 0.1  # of a push; a feature that is present has a value of at most 1
ANGLES = 360  # directions that are tried, which is all of them, a degree apart
JOB = replace(toy_jobs()["polytopes"], name="fragile", density=DENSITIES)
LINEAR = replace(JOB, name="fragile linear", linear=True)


@functools.cache
def toys_of_seed(seed, job):
    """The best of the four toys of each density, as Toys: W [density, 2, feature]."""
    state = trained_toys({job.name: job}, seed, kept_models("research") / f"toys_{seed}")[job.name]
    best = state["loss"].argmin(0)  # [density]
    of_each = torch.arange(len(DENSITIES))
    W, b = state["W"][best, of_each], state["b"][best, of_each]
    return Toys(W, b.unsqueeze(1), job.linear)


def harm(toys, x):
    """The largest rise of the squared error that a push of length LENGTH causes, the mean over
    inputs: [density]. x: [1, batch, feature].

    A toy sees only two directions of its input, those of the rows of W. A push along any other
    direction is wasted, so the worst push lies in that plane, and all its angles are tried.
    """
    angle = torch.arange(ANGLES) * (2 * math.pi / ANGLES)
    circle = torch.stack([angle.cos(), angle.sin()], -1)  # [angle, 2]
    plane = torch.linalg.svd(toys.W, full_matrices=False).Vh  # [density, 2, feature]
    pushes = LENGTH * circle @ plane  # [density, angle, feature]

    intact = ((toys(x) - x) ** 2).sum(-1)  # [density, batch]
    worst = torch.full_like(intact, -math.inf)
    for push in pushes.unbind(1):
        pushed = ((toys(x + push[:, None]) - x) ** 2).sum(-1)
        worst = worst.maximum(pushed)
    return (worst - intact).mean(-1)


def single_features():
    """Inputs [1, batch, feature] in which one of the five features is present, of values 0 to 1."""
    values = torch.linspace(0.05, 1, 20)
    return (values[:, None, None] * torch.eye(5)).reshape(1, -1, 5)


def ratio(harms):
    """The harm to the sparsest toy, as a multiple of that to the densest."""
    return harms[-1] / harms[0]


def measure(seed):
    """The ratio of the toys."""
    return ratio(harm(toys_of_seed(seed, JOB), single_features()))


def null(seed):
    """The ratio of toys without a ReLU, which have no superposition at any density."""
    return ratio(harm(toys_of_seed(seed, LINEAR), single_features()))


def more(seed):
    """Features per dimension, and the ratio halfway, and where no feature is present."""
    toys = toys_of_seed(seed, JOB)
    per_dimension = (toys.W**2).sum((1, 2)) / 2
    found = {f"features per dimension at density {density:g}": number.item()
             for density, number in zip(DENSITIES, per_dimension, strict=True)}
    harms = harm(toys, single_features())
    found["ratio at density 0.25"] = (harms[1] / harms[0]).item()
    found["ratio where no feature is present"] = ratio(harm(toys, torch.zeros(1, 1, 5))).item()
    return found


def main(argv=None):
    """Run the program: measure every seed, print the table, write the results."""
    perform_study(__file__, __doc__, measure, null, more=more, argv=argv)


if __name__ == "__main__":
    run_program(main)
