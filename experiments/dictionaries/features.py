"""Sparse features whose directions are known, pressed into fewer dimensions.

    x = values @ directions          values [batch, feature], mostly 0; x [batch, d_in]

There are more features than dimensions, so directions overlap; few are there at once, so that one
can still tell which. A dictionary sees x alone and has to find the directions.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/superposition/measure.py
Next: experiments/dictionaries/model.py
Source: Elhage et al. 2022 (superposition); Chanin et al. 2024 (a hierarchy of features)
"""

from dataclasses import dataclass

import torch

from utils import check_choice, seeded_generator

WORLDS = ("uniform", "zipf", "pairs", "hierarchy")
PAIRED = 0.8  # the chance that the second feature of a pair is there when the first one is
# What is drawn from one seed. Numbers drawn alike would be the same numbers: a dictionary would
# begin with the true features, or with the weights that the model began with.
PURPOSES = ("true directions", "texts", "held-out texts", "dictionary", "features that stay",
            "noise", "shuffled activations", "untrained model", "reading at random",
            "steering at random", "random partners")
N_CHILDREN = 3  # of a parent, in a hierarchy: at most one of them is there at a time
LEAST_VALUE = 0.5  # of a feature that is there; the largest is 1 more


@dataclass(frozen=True)
class SparseFeatures:
    """Features with known directions, and how they come together.

    world: "uniform": each feature is there with chance `density`, whatever the others do.
    "zipf": the chance of the i-th is proportional to 1 / i, with the same mean.
    "pairs": where the first of two neighbours is there, the second is too with chance PAIRED; each
    is as frequent as in "uniform".
    "hierarchy": families of a parent and N_CHILDREN children. A child is there only where its
    parent is, and one of them at a time; a parent is alone as often as with any one child.

    directions: [feature, d_in], of length 1. chances: [feature], that each is there.
    """

    world: str
    directions: torch.Tensor
    chances: torch.Tensor

    @classmethod
    def draw_directions(cls, world, n_features, d_in, density, seed):
        """Features in random directions. density: the mean chance that a feature is there."""
        check_choice("world", world, WORLDS)
        drawn = torch.randn(n_features, d_in, generator=seeded_generator(seed))
        return cls(world, unit_rows(drawn), feature_chances(world, n_features, density))

    @property
    def families(self):
        """[family, 1 + N_CHILDREN]: the features of each family of a hierarchy, parents first."""
        return torch.arange(len(self.chances)).view(-1, 1 + N_CHILDREN)

    def draw(self, batch, generator):
        """(x [batch, d_in], values [batch, feature]): a value is 0 where the feature is absent, and
        uniform from LEAST_VALUE to LEAST_VALUE + 1 where it is there."""
        is_there = self.draw_presence(batch, generator)
        sizes = LEAST_VALUE + torch.rand(is_there.shape, generator=generator)
        values = sizes * is_there
        return values @ self.directions, values

    def draw_presence(self, batch, generator):
        """Which features are there, [batch, feature], bool."""
        if self.world == "pairs":
            return self.draw_pairs(batch, generator)
        if self.world == "hierarchy":
            return self.draw_families(batch, generator)
        return torch.rand(batch, len(self.chances), generator=generator) < self.chances

    def draw_pairs(self, batch, generator):
        """As `draw_presence`: neighbours that often come together."""
        p = self.chances[::2]
        first = torch.rand(batch, len(p), generator=generator) < p
        # as likely without the first one as keeps the second one's own chance at p
        p_second = torch.where(first, PAIRED, p * (1 - PAIRED) / (1 - p))
        second = torch.rand(batch, len(p), generator=generator) < p_second
        return torch.stack([first, second], -1).flatten(1)

    def draw_families(self, batch, generator):
        """As `draw_presence`: a parent, alone or with one of its children."""
        p_parent = self.chances[self.families[:, 0]]
        parent = torch.rand(batch, len(p_parent), generator=generator) < p_parent
        child = torch.randint(1 + N_CHILDREN, parent.shape, generator=generator)  # 0: none
        children = parent[..., None] & (child[..., None] == torch.arange(1, 1 + N_CHILDREN))
        return torch.cat([parent[..., None], children], -1).flatten(1)


def feature_chances(world, n_features, density):
    """The chance that each feature of a world is there, [feature]; their mean is `density`."""
    if world == "zipf":
        weights = 1 / torch.arange(1, n_features + 1)
        return density * n_features * weights / weights.sum()
    if world == "hierarchy":
        family = torch.tensor([1.0] + [1 / (1 + N_CHILDREN)] * N_CHILDREN)
        return (density * family / family.mean()).repeat(n_features // len(family))
    return torch.full((n_features,), density)


def seed_for(purpose, seed):
    """The seed of one of PURPOSES, so that no two of them, nor a model's weights, are drawn alike.

    Seeds of a million and more apart would meet; an experiment's are small.
    """
    check_choice("purpose", purpose, PURPOSES)
    return seed + 1_000_003 * (1 + PURPOSES.index(purpose))


def unit_rows(matrix):
    """The rows of a matrix at length 1, [..., row, column]."""
    return matrix / matrix.norm(dim=-1, keepdim=True)
