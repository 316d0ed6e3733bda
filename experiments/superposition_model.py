"""Toy models of superposition: n features pass through m < n dimensions, and a ReLU reads them out.

    x' = ReLU(W^T W x + b)          loss = sum over i of  I_i (x_i - x'_i)^2

A feature is present with probability `density`, and then uniform on [0, 1]; else it is 0. I_i is
its importance. Column W_i of W is the direction that feature i is written to and read from. "Toys"
are many such models, which are trained at once on the same random numbers: [toy, ...] everywhere.

Chapter: COURSE_ROADMAP.md, 14 (superposition)
Read before: optim.py; after: experiments/feature_superposition_toy_model.py
Source: Elhage et al. 2022, Toy models of superposition
"""

import math
from dataclasses import dataclass

import torch

from optim import AdamW, schedule

# What the toys see


def independent(density, n_features):
    """A function draw(batch, generator) -> x, [toy, batch, feature], for densities [toy] from above
    0 to 1: each feature is there or not whatever the others do.

    One uniform number u a feature says both whether it is there, u < density, and how large it is
    then, u / density; all toys share it, so that they differ by their density alone.
    """
    density = density[:, None, None]

    def draw(batch, generator):
        u = torch.rand(batch, n_features, generator=generator)
        return torch.where(u < density, u / density, 0.0)

    return draw


def in_patterns(chances, n_features):
    """As `independent`, [1, batch, feature], where each set of features has a chance of its own:
    chances [pattern], in the order of `patterns`."""
    def draw(batch, generator):
        chosen = torch.multinomial(chances, batch, replacement=True, generator=generator)
        values = torch.rand(batch, n_features, generator=generator)
        return (patterns(n_features)[chosen] * values)[None]

    return draw


def patterns(n_features):
    """All sets of features that can be there, [pattern, feature]: 0 or 1, counted upwards."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * n_features).view(-1, n_features)


def chances_of(density, n_features):
    """How likely each pattern is where features are independent: [toy] -> [toy, pattern]."""
    density = density[:, None, None]
    return torch.where(patterns(n_features) > 0, density, 1 - density).prod(-1)


def pair_chances(density, meeting):
    """How likely each pattern of four features is that make two pairs, each feature of one density:
    [pattern]. Those of a pair meet "always", "never" or "by chance"."""
    p = density
    pair = {"always": (1 - p, 0.0, 0.0, p), "never": (1 - 2 * p, p, p, 0.0),
            "by chance": ((1 - p) ** 2, p * (1 - p), p * (1 - p), p**2)}[meeting]
    return torch.outer(torch.tensor(pair), torch.tensor(pair)).flatten()


# The models


@dataclass
class Toys:
    """W: [toy, hidden, feature]; b: [toy, 1, feature]. linear: without the ReLU, for a control."""

    W: torch.Tensor
    b: torch.Tensor
    linear: bool = False

    @classmethod
    def fresh(cls, n_toys, n_features, n_hidden, generator, *, linear=False):
        """Untrained: the variance of a weight is that of Glorot and Bengio, for each toy alone."""
        scale = math.sqrt(2 / (n_features + n_hidden))
        W = scale * torch.randn(n_toys, n_hidden, n_features, generator=generator)
        return cls(W.requires_grad_(), torch.zeros(n_toys, 1, n_features).requires_grad_(), linear)

    def __call__(self, x):
        """x: [toy or 1, batch, feature] -> x', [toy, batch, feature]."""
        resid = x @ self.W.mT @ self.W + self.b
        return resid if self.linear else resid.relu()

    def loss(self, x, importance):
        """The mean over the batch, [toy]. importance: [toy or 1, 1, feature]."""
        return (importance * (self(x) - x) ** 2).sum(-1).mean(-1)

    @torch.no_grad()
    def backward_(self, x, importance):
        """Leaves the loss's gradient in `.grad` of W and b, worked out by hand: half of autograd's
        time. W is used twice, on the way in and on the way out."""
        x = x.expand(len(self.W), -1, -1)
        hidden = x @ self.W.mT                                      # [toy, batch, hidden]
        out = torch.baddbmm(self.b, hidden, self.W)                 # [toy, batch, feature]
        if not self.linear:
            out.relu_()
        d_out = (out - x).mul_(importance * (2 / x.shape[1]))
        if not self.linear:
            d_out.mul_(out > 0)
        d_hidden = d_out @ self.W.mT
        self.W.grad = torch.baddbmm(hidden.mT @ d_out, d_hidden.mT, x)
        self.b.grad = d_out.sum(1, keepdim=True)


def fit_toys(toys, draw, importance, *, steps, batch, generator, progress=None):
    """Trains toys in place with AdamW, at a rate of .01 that falls to 0 by half a cosine.

    progress: a function that is told how many steps are done.
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
    """The loss, [toy], exact in which features are there, an average over n_values draws in how
    large they are: rare meetings count by their chance. chances: [toy or 1, pattern]."""
    n_features = toys.W.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n_values, n_features, generator=generator)
    return sum(chance * toys.loss((pattern * values)[None], importance)
               for pattern, chance in zip(patterns(n_features), chances.mT, strict=True))


# What is measured on them


def dimensionality(W):
    """D_i = |W_i|^2 / sum over j of (W_i . W_j / |W_i|)^2: the share of a dimension that feature i
    has to itself; 0 where W_i is 0. [..., hidden, feature] -> [..., feature].

    The sum of D is at most m, and m where the W_i are a tight frame of R^m: then each has m/n.
    """
    length = W.norm(dim=-2)
    unit = W / torch.where(length > 0, length, 1.0)[..., None, :]
    shared = ((unit.mT @ W) ** 2).sum(-1)
    return torch.where(length > 0, length**2 / torch.where(shared > 0, shared, 1.0), 0.0)


def dimensions_per_feature(W):
    """D* = m / |W|_F^2, [..., hidden, feature] -> [...]: the dimensions for each feature that is
    kept, if those that are have length 1."""
    return W.shape[-2] / (W**2).sum((-2, -1))


def directions(W):
    """W's columns at length 1, [..., hidden, feature]; 0 for a feature that is not there, being
    shorter than 1/2."""
    length = W.norm(dim=-2, keepdim=True)
    return torch.where(length > 0.5, W / length.clamp(min=0.5), 0.0)


def lowest_cosine(W):
    """Of each feature's direction with any other's, [..., hidden, feature] -> [..., feature]: -1
    where it has an antipode, 0 for one that is not there."""
    unit = directions(W)
    return (unit.mT @ unit).amin(-1)


def gaps(W):
    """The angles between neighbours among directions in the plane, [..., 2, feature] -> [...,
    feature], in degrees: 72 five times for a pentagon."""
    angles = torch.atan2(W[..., 1, :], W[..., 0, :]).sort(-1).values
    return torch.rad2deg(torch.diff(angles, append=angles[..., :1] + 2 * math.pi))


# What can be said beforehand

ARRANGEMENTS = ("absent", "dedicated", "antipodal")


def closed_form(density, importance, n_features):
    """The losses of the ways to treat the last of n features in n - 1 dimensions, [...,
    arrangement] in the order of ARRANGEMENTS. The others have importance 1, the last `importance`;
    density and importance: [...]. n_features: 2 or 3.

    Directions have length 1, so a feature with a dimension of its own costs nothing. One that is
    absent is read out as its mean, and costs its variance V = p/3 - p^2/4. Of an antipodal pair,
    the larger one is read out less the smaller one, which is read out as 0: that costs
    I_1 min(x_1, x_2)^2 or I_2 min(x_1, x_2)^2, and E min(x_1, x_2)^2 = p^2/6. If the last has a
    dimension of its own, another is absent or, where there are two others, these are antipodal.
    """
    p = density
    variance, meeting = p / 3 - p**2 / 4, p**2 / 6
    others = variance if n_features == 2 else torch.minimum(variance, 2 * meeting)
    return torch.stack([importance * variance, others, (1 + importance) * meeting], -1)


def arrangement_of(W):
    """How each toy treats its last feature, [toy], by number in ARRANGEMENTS: absent where W_i is
    shorter than 1/2, else dedicated where D is 3/4 or more (an antipodal one has about 1/2)."""
    alone = torch.where(dimensionality(W)[..., -1] >= 0.75, 1, 2)
    return torch.where(W[..., -1].norm(dim=-1) < 0.5, 0, alone)
