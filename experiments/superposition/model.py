"""Train toy models of superposition: n features pass through m < n dimensions and a ReLU.

    x' = ReLU(W^T W x + b)          loss = sum over i of  I_i (x_i - x'_i)^2

A feature is present with probability `density`. If present, it is uniform on [0, 1]; if not, it is
0. I_i is its importance. Column W_i of W is the direction to which feature i is written and from
which it is read. "Toys" are many such models that are trained together on the same random numbers;
all shapes begin with [toy, ...].

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: optim.py
Next: experiments/superposition/measure.py
Source: Elhage et al. 2022, Toy models of superposition
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch

from experiments.common import Trainings, load_or_make
from optim import AdamW, schedule
from utils import seeded_generator

PLATEAU = (2.5, 3.6)  # the range of 1 / density in which the plateau at 1/2 is expected

# What the toys see


def independent_features(density, n_features):
    """A function draw(batch, generator) -> x, [toy, batch, feature], with independent features.

    density: [toy], above 0 and at most 1. One uniform number u per feature decides whether it is
    present (u < density) and how large it then is (u / density). All toys share these numbers, so
    they differ by their density alone.
    """
    density = density[:, None, None]

    def draw(batch, generator):
        u = torch.rand(batch, n_features, generator=generator)
        return torch.where(u < density, u / density, 0.0)

    return draw


def features_in_patterns(chances, n_features):
    """A function draw(batch, generator) -> x, [1, batch, feature], where each set of present
    features has its own chance.

    chances: [pattern], in the order of `presence_patterns`.
    """
    patterns = presence_patterns(n_features)

    def draw(batch, generator):
        chosen = torch.multinomial(chances, batch, replacement=True, generator=generator)
        values = torch.rand(batch, n_features, generator=generator)
        return (patterns[chosen] * values)[None]

    return draw


def presence_patterns(n_features):
    """All sets of features that can be present, [pattern, feature]: 0 or 1, in binary order."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * n_features).view(-1, n_features)


def independent_chances(density, n_features):
    """The chance of each pattern if features are independent: density [toy] -> [toy, pattern]."""
    density = density[:, None, None]
    return torch.where(presence_patterns(n_features) > 0, density, 1 - density).prod(-1)


def pair_chances(density, meeting):
    """The chance of each pattern of four features that form two pairs, [pattern].

    density: of each feature. meeting: those of a pair meet "always", "never" or "by chance".
    """
    p = density
    pair = {
        "always": (1 - p, 0.0, 0.0, p),
        "never": (1 - 2 * p, p, p, 0.0),
        "by chance": ((1 - p) ** 2, p * (1 - p), p * (1 - p), p**2),
    }[meeting]
    return torch.outer(torch.tensor(pair), torch.tensor(pair)).flatten()


# The models and their training


@dataclass
class Toys:
    """Toy models that are trained together.

    W: [toy, hidden, feature]; b: [toy, 1, feature]. linear: without the ReLU, for a control.
    """

    W: torch.Tensor
    b: torch.Tensor
    linear: bool = False

    @classmethod
    def fresh(cls, n_toys, n_features, n_hidden, generator, *, linear=False):
        """Untrained toys; each has weights with the variance of Glorot and Bengio."""
        scale = math.sqrt(2 / (n_features + n_hidden))
        W = scale * torch.randn(n_toys, n_hidden, n_features, generator=generator)
        b = torch.zeros(n_toys, 1, n_features)
        return cls(W.requires_grad_(), b.requires_grad_(), linear)

    def __call__(self, x):
        """x: [toy or 1, batch, feature] -> x', [toy, batch, feature]."""
        out = x @ self.W.mT @ self.W + self.b
        return out if self.linear else out.relu()

    def loss(self, x, importance):
        """The mean loss over the batch, [toy]. importance: [toy or 1, 1, feature]."""
        return (importance * (self(x) - x) ** 2).sum(-1).mean(-1)

    @torch.no_grad()
    def backward_(self, x, importance):
        """Store the loss's gradient in `.grad` of W and b. It is computed by hand, which takes half
        of autograd's time. W is used twice, on the way in and on the way out."""
        x = x.expand(len(self.W), -1, -1)

        # forward
        hidden = x @ self.W.mT                                      # [toy, batch, hidden]
        out = torch.baddbmm(self.b, hidden, self.W)                 # [toy, batch, feature]
        if not self.linear:
            out.relu_()

        # backward
        d_out = (out - x).mul_(importance * (2 / x.shape[1]))
        if not self.linear:
            d_out.mul_(out > 0)
        d_hidden = d_out @ self.W.mT
        self.W.grad = torch.baddbmm(hidden.mT @ d_out, d_hidden.mT, x)
        self.b.grad = d_out.sum(1, keepdim=True)


def fit_toys(toys, draw, importance, *, steps, batch, generator, progress=None):
    """Train toys in place with AdamW; the learning rate falls from 0.01 to 0 by half a cosine.

    progress: called with the number of steps that are done.
    """
    optimizer = AdamW([toys.W, toys.b], lr=0.01, weight_decay=0.0)
    for step in range(steps):
        toys.backward_(draw(batch, generator), importance)
        optimizer.step(schedule(step, steps, shape="cosine"))
        if progress:
            progress(step + 1)
    return toys


@torch.no_grad()
def expected_loss(toys, chances, importance, *, n_values=2000, seed=0):
    """The expected loss of the toys, [toy], in which each pattern counts by its chance.

    The sum over patterns is exact; the sizes of features are averaged over n_values draws. chances:
    [toy or 1, pattern].
    """
    n_features = toys.W.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n_values, n_features, generator=generator)
    return sum(chance * toys.loss((pattern * values)[None], importance)
               for pattern, chance in zip(presence_patterns(n_features), chances.mT, strict=True))


# The models of a seed


@dataclass(frozen=True)
class ToyJob:
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
        n_toys = self.starts * len(self.density)
        return Toys.fresh(n_toys, self.n_features, self.n_hidden, generator, linear=self.linear)

    def train(self, seed, trainings=None):
        """Train the toys of a seed. trainings: the Trainings that this one belongs to.

        Returns {"W": [start, cell, hidden, feature], "b": [start, cell, feature], "loss": [start,
        cell]}; with one start there is no loss, because there is nothing to choose.
        """
        generator = seeded_generator(seed)
        n_cells = len(self.density)
        density = torch.tensor(self.density).repeat(self.starts)
        importance = torch.tensor(self.importance).expand(n_cells, -1)
        importance = importance.repeat(self.starts, 1)[:, None]  # [toy, 1, feature]
        if self.meeting:
            chances = pair_chances(self.density[0], self.meeting)
            draw = features_in_patterns(chances, self.n_features)
        else:
            draw = independent_features(density, self.n_features)

        trainings = trainings or Trainings([self.steps])
        trainings.begin(f"{self.name}, seed {seed}")
        toys = fit_toys(self.fresh(generator), draw, importance, steps=self.steps,
                        batch=self.batch, generator=generator,
                        progress=trainings.show)
        trainings.close()

        state = {"W": toys.W.detach().view(self.starts, n_cells, self.n_hidden, -1),
                 "b": toys.b.detach().view(self.starts, n_cells, -1)}
        if self.starts > 1:
            if self.meeting:
                chances = chances[None]
            else:
                chances = independent_chances(density, self.n_features)
            loss = expected_loss(toys, chances, importance)
            state["loss"] = loss.view(self.starts, n_cells)
        return state


def best_start(state, within=0.0):
    """W of the start with the lowest expected loss, for each cell: [cell, hidden, feature].

    within: accept the first start whose loss is at most this share above the lowest. If several
    arrangements are equally good, the noise of the data would always choose the same one.
    """
    if "loss" not in state:
        return state["W"][0]
    loss = state["loss"]
    good = loss <= (1 + within) * loss.min(0).values
    first_good = good.int().argmax(0)
    return state["W"][first_good, torch.arange(len(first_good))]


def geometric_series(first, last, n):
    """n numbers from first to last in a geometric series."""
    return tuple(first * (last / first) ** (i / (n - 1)) for i in range(n))


def toy_jobs(cells=14, quick=False):
    """{name: ToyJob} of all models of a seed.

    cells: the number of densities, and of importances, in a phase diagram. quick: few steps and
    starts.
    """
    # five features of falling importance in the plane
    falling = (tuple(0.9**i for i in range(5)),)
    polytopes = ToyJob("polytopes", 5, 2, geometric_series(1.0, 0.05, 10), falling,
                       steps=3000, batch=512, starts=4)

    # 200 features of equal importance in 20 dimensions
    densities = tuple(1 / rarity for rarity in geometric_series(1.0, 20.0, 20))
    geometry = ToyJob("geometry", 200, 20, densities, ((1.0,) * 200,),
                      steps=2000, batch=128, starts=1)

    # without the ReLU
    on_plateau = tuple(p for p in densities if PLATEAU[0] <= 1 / p <= PLATEAU[1])
    controls = [replace(polytopes, name="polytopes linear", linear=True),
                replace(geometry, name="geometry linear", linear=True, density=on_plateau)]

    # one feature too many, whose importance varies
    grid = [(p, r) for p in geometric_series(0.1, 1.0, cells)
            for r in geometric_series(0.1, 10.0, cells)]
    phases = [ToyJob(f"phases {n},{n - 1}", n, n - 1, tuple(p for p, _ in grid),
                     tuple((1.0,) * (n - 1) + (r,) for _, r in grid),
                     steps=1000, batch=256, starts=8)
              for n in (2, 3)]

    # four features that come in pairs
    pairs = [ToyJob(f"pairs {meeting}", 4, 2, (0.1,) * 16, ((1.0,) * 4,),
                    steps=1500, batch=256, starts=16, meeting=meeting)
             for meeting in ("never", "always", "by chance")]

    if quick:
        phases = [replace(job, starts=2) for job in phases]
        pairs = [replace(job, starts=2) for job in pairs]
    jobs = [polytopes, geometry, *controls, *phases, *pairs]
    if quick:
        jobs = [replace(job, steps=job.steps // 20) for job in jobs]
    return {job.name: job for job in jobs}


def trained_toys(jobs, seed, folder, *, retrain=False, trainings=None):
    """{name: what ToyJob.train returns} for all jobs, trained, or read if they were kept.

    folder: the seed's own, with a file for each job. trainings: the Trainings that these are among.
    """
    trainings = trainings or Trainings([job.steps for job in jobs.values()])
    states = {}
    for name, job in jobs.items():
        path = folder / f"{name.replace(' ', '_')}.pt"
        states[name] = load_or_make(path, asdict(job) | {"seed": seed},
                                    partial(job.train, seed, trainings), retrain)
        trainings.count()
    return states
