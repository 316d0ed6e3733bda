"""Draw sparse features with known directions, and train the dictionaries that should find them.

    x = values @ directions          values [batch, feature], mostly 0; x [batch, d_in]

There are more features than dimensions, so their directions overlap. Only a few features are
present at a time, so it is still possible to tell which. A dictionary sees x alone and has to find
the directions.

Features come in four worlds, and dictionaries of every kind are trained in each. In the world
"uniform" they are trained at six sparsities, from far too dense to far too sparse; elsewhere at
one. The controls change one thing each: the dictionary is not trained, its features stay as they
were drawn or are the true ones, or it sees noise that has the same covariance.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/superposition/measure.py, experiments/dictionaries/model.py
Next: experiments/dictionaries/measure.py
Source: Elhage et al. 2022 (superposition); Chanin et al. 2024 (a hierarchy of features); Gao et al.
2024 (sweeps of sparsity); arXiv 2602.14111 (random dictionaries as controls)
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch

from experiments.common import Trainings, load_or_make
from experiments.dictionaries.model import (
    KINDS,
    DictionaryRecipe,
    fit_dictionary,
    seed_for,
    unit_rows,
)
from utils import check_choice, seeded_generator

WORLDS = ("uniform", "zipf", "pairs", "hierarchy")
PAIRED = 0.8  # the chance that the second feature of a pair is present when the first one is
N_CHILDREN = 3  # of each parent in a hierarchy; at most one of them is present at a time
LEAST_VALUE = 0.5  # of a feature that is present; the largest value is 1 more

N_FEATURES = 128
D_IN = 32
DENSITY = 0.02  # 2.6 features are present at a time
N_TEXTS = 131_072  # to train on

# Sparsities, from dense to sparse: penalties, or how many latents are active
PENALTIES = (0.005, 0.05, 0.1, 0.2, 0.35, 0.7)
JUMP_PENALTIES = (0.0003, 0.002, 0.02, 0.06, 0.15, 0.4)
COUNTS = (20, 12, 5, 3, 2, 1)
SWEEPS = {"ReLU + L1": PENALTIES, "JumpReLU": JUMP_PENALTIES} | dict.fromkeys(
    ("TopK", "BatchTopK", "Matryoshka"), COUNTS)
CHOSEN = {kind: SWEEPS[kind][3] for kind in KINDS}  # used in every world, chosen on seeds 0-2


# The features


@dataclass(frozen=True)
class SparseFeatures:
    """Features with known directions, and how they occur together.

    world: "uniform": each feature is present with chance `density`, independently of the others.
    "zipf": the chance of the i-th feature is proportional to 1 / i, with the same mean.
    "pairs": where the first of two neighbours is present, the second is too with chance PAIRED;
    each is as frequent as in "uniform".
    "hierarchy": families of a parent and N_CHILDREN children. A child is present only where its
    parent is, and only one child at a time; a parent is alone as often as with any one child.

    directions: [feature, d_in], of length 1. chances: [feature], the chance that each is present.
    """

    world: str
    directions: torch.Tensor
    chances: torch.Tensor

    @classmethod
    def draw_directions(cls, world, n_features, d_in, density, seed):
        """Features in random directions. density: the mean chance that a feature is present."""
        check_choice("world", world, WORLDS)
        drawn = torch.randn(n_features, d_in, generator=seeded_generator(seed))
        return cls(world, unit_rows(drawn), feature_chances(world, n_features, density))

    @property
    def families(self):
        """[family, 1 + N_CHILDREN]: the features of each family of a hierarchy, parents first."""
        return torch.arange(len(self.chances)).view(-1, 1 + N_CHILDREN)

    def draw(self, batch, generator):
        """Draw texts: (x [batch, d_in], values [batch, feature]).

        A value is 0 where the feature is absent, and uniform from LEAST_VALUE to LEAST_VALUE + 1
        where it is present.
        """
        is_there = self.draw_presence(batch, generator)
        sizes = LEAST_VALUE + torch.rand(is_there.shape, generator=generator)
        values = sizes * is_there
        return values @ self.directions, values

    def draw_presence(self, batch, generator):
        """Draw which features are present, [batch, feature], bool."""
        if self.world == "pairs":
            return self.draw_pairs(batch, generator)
        if self.world == "hierarchy":
            return self.draw_families(batch, generator)
        return torch.rand(batch, len(self.chances), generator=generator) < self.chances

    def draw_pairs(self, batch, generator):
        """As `draw_presence`, for neighbours that often occur together."""
        p = self.chances[::2]
        first = torch.rand(batch, len(p), generator=generator) < p
        # Without the first, the second is as likely as keeps its own chance at p.
        p_second = torch.where(first, PAIRED, p * (1 - PAIRED) / (1 - p))
        second = torch.rand(batch, len(p), generator=generator) < p_second
        return torch.stack([first, second], -1).flatten(1)

    def draw_families(self, batch, generator):
        """As `draw_presence`, for parents, each alone or with one of its children."""
        p_parent = self.chances[self.families[:, 0]]
        parent = torch.rand(batch, len(p_parent), generator=generator) < p_parent
        child = torch.randint(1 + N_CHILDREN, parent.shape, generator=generator)  # 0: none
        children = parent[..., None] & (child[..., None] == torch.arange(1, 1 + N_CHILDREN))
        return torch.cat([parent[..., None], children], -1).flatten(1)


def feature_chances(world, n_features, density):
    """The chance that each feature of a world is present, [feature]; their mean is `density`."""
    if world == "zipf":
        weights = 1 / torch.arange(1, n_features + 1)
        return density * n_features * weights / weights.sum()
    if world == "hierarchy":
        family = torch.tensor([1.0] + [1 / (1 + N_CHILDREN)] * N_CHILDREN)
        return (density * family / family.mean()).repeat(n_features // len(family))
    return torch.full((n_features,), density)


def known_features(world, seed):
    """The SparseFeatures of a world and a seed, as many as the experiment has."""
    return SparseFeatures.draw_directions(world, N_FEATURES, D_IN, DENSITY,
                                          seed_for("true directions", seed))


def noise_like(x, generator):
    """Gaussian noise with the mean and the covariance of x [n, d]: as many texts, no features."""
    root = torch.linalg.cholesky(x.T.cov())
    return x.mean(0) + torch.randn(x.shape, generator=generator) @ root.T


# The dictionaries


@dataclass(frozen=True)
class DictionaryJob:
    """A dictionary to train on the features of a world.

    control: "" (none); "frozen": its features are random and are not trained; "true": they are the
    true ones and are not trained; "noise": it sees noise with the covariance of the texts.
    """

    world: str
    recipe: DictionaryRecipe
    control: Literal["", "frozen", "true", "noise"] = ""

    def train(self, features, x, seed, progress=None):
        """Train the Dictionary and return it.

        features: SparseFeatures; x: [n, d_in], texts of them; progress: as in `fit_dictionary`.
        """
        W_dec = None
        if self.control == "true":
            W_dec = features.directions
        elif self.control == "frozen":
            generator = seeded_generator(seed_for("features that stay", seed))
            W_dec = unit_rows(torch.randn(self.recipe.n_latents, x.shape[-1], generator=generator))
        elif self.control == "noise":
            x = noise_like(x, seeded_generator(seed_for("noise", seed)))
        return fit_dictionary(self.recipe, x, seed, W_dec=W_dec, progress=progress)


def dictionary_jobs(quick=False):
    """{name: DictionaryJob} of all that is trained for a seed, world after world. quick: few steps.
    """
    steps = 30 if quick else 2000

    def job(world, kind, sparsity, control="", steps=steps):
        recipe = DictionaryRecipe(kind, sparsity, N_FEATURES, steps)
        return DictionaryJob(world, recipe, control)

    # every kind, at all sparsities in one world and at one sparsity in the others
    jobs = {}
    for kind, sparsities in SWEEPS.items():
        for sparsity in sparsities:
            jobs[f"uniform, {kind}, {sparsity}"] = job("uniform", kind, sparsity)
    for world in WORLDS[1:]:
        for kind in KINDS:
            jobs[f"{world}, {kind}, {CHOSEN[kind]}"] = job(world, kind, CHOSEN[kind])

    # controls
    count = CHOSEN["TopK"]
    for world in ("uniform", "hierarchy"):
        jobs[f"{world}, untrained"] = job(world, "TopK", count, steps=0)
    for control in ("frozen", "true", "noise"):
        jobs[control] = job("uniform", "TopK", count, control)
    return dict(sorted(jobs.items(), key=lambda named: WORLDS.index(named[1].world)))


def trained_dictionaries(jobs, seed, folder, *, n_texts=N_TEXTS, retrain=False, trainings=None):
    """{name: Dictionary} of all jobs, trained on n_texts texts, or read if they were kept.

    jobs: of `dictionary_jobs`. folder: the seed's own, with a file for each world. trainings: the
    Trainings that these are among.
    """
    trainings = trainings or Trainings([job.recipe.steps for job in jobs.values()])
    found = {}
    for world in WORLDS:
        own = {name: job for name, job in jobs.items() if job.world == world}
        settings = {"seed": seed, "n_texts": n_texts,
                    "jobs": {name: asdict(job) for name, job in own.items()}}
        n_before = trainings.n_ready
        state = load_or_make(folder / f"{world}.pt", settings,
                             partial(train_world, world, own, seed, n_texts, trainings), retrain)
        trainings.n_ready = n_before + len(own)  # where they were kept, none was counted
        for name, job in own.items():
            found[name] = job.recipe.restore(state["dictionaries"][name])
    return found


def train_world(world, jobs, seed, n_texts, trainings):
    """{"dictionaries": {name: the tensors of a Dictionary}} of the jobs of one world, trained."""
    features = known_features(world, seed)
    x, _ = features.draw(n_texts, seeded_generator(seed_for("texts", seed)))
    made = {}
    for name, job in jobs.items():
        trainings.begin(f"{name}, seed {seed}")
        made[name] = job.train(features, x, seed, trainings.show).tensors()
        trainings.close()
        trainings.count()
    return {"dictionaries": made}
