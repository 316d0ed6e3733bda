"""Dictionaries of features whose truth is known: what is trained for a seed, and how it did.

In each world all kinds are trained at one sparsity; in the world "uniform", too, at sparsities from
far too dense to far too sparse. The controls share all but one thing with a dictionary: it is not
trained, its features are kept as they were drawn, or it sees noise that has the same covariance.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/dictionaries/measure.py
Next: experiments/dictionaries/report.py
Source: Gao et al. 2024 (sweeps of sparsity); arXiv 2602.14111 (random dictionaries as controls)
"""

from dataclasses import asdict, dataclass
from typing import Literal

import torch

from experiments.common import load_or_make
from experiments.dictionaries.features import WORLDS, SparseFeatures, seed_for, unit_rows
from experiments.dictionaries.measure import (
    describe_absorption,
    describe_fit,
    describe_recovery,
    feature_cosines,
    mean_slope,
    recovered_by_frequency,
)
from experiments.dictionaries.model import KINDS, DictionaryRecipe, ReluL1, fit_dictionary
from utils import Progress, seeded_generator

N_FEATURES = 128
D_IN = 32
DENSITY = 0.02  # 2.6 features are there at a time
N_TEXTS = 131_072  # to train on
N_HELD_OUT = 16_384

# Sparsities, from dense to sparse: penalties, or how many latents are active
PENALTIES = (0.005, 0.05, 0.1, 0.2, 0.35, 0.7)
JUMP_PENALTIES = (0.0003, 0.002, 0.02, 0.06, 0.15, 0.4)
COUNTS = (20, 12, 5, 3, 2, 1)
SWEEPS = {"ReLU + L1": PENALTIES, "JumpReLU": JUMP_PENALTIES} | dict.fromkeys(
    ("TopK", "BatchTopK", "Matryoshka"), COUNTS)
CHOSEN = {kind: SWEEPS[kind][3] for kind in KINDS}  # the one for each world, chosen on seeds 0-2


@dataclass(frozen=True)
class DictionaryJob:
    """A dictionary to train on the features of a world.

    control: "" (none); "frozen": its features are random and stay; "true": they are the true ones
    and stay; "noise": it sees noise with the covariance of the features' texts.
    """

    world: str
    recipe: DictionaryRecipe
    control: Literal["", "frozen", "true", "noise"] = ""

    def train(self, features, x, seed, progress=None):
        """The Dictionary. features: SparseFeatures; x: [n, d_in], texts of them."""
        W_dec = None
        if self.control == "true":
            W_dec = features.directions
        elif self.control == "frozen":
            generator = seeded_generator(seed_for("features that stay", seed))
            W_dec = unit_rows(torch.randn(self.recipe.n_latents, x.shape[-1], generator=generator))
        elif self.control == "noise":
            x = noise_like(x, seeded_generator(seed_for("noise", seed)))
        return fit_dictionary(self.recipe, x, seed, W_dec=W_dec, progress=progress)


def noise_like(x, generator):
    """Gaussian noise with the mean and the covariance of x [n, d]: as many texts, no features."""
    root = torch.linalg.cholesky(x.T.cov())
    return x.mean(0) + torch.randn(x.shape, generator=generator) @ root.T


def dictionary_jobs(quick=False):
    """{name: DictionaryJob} of all that is trained for a seed. quick: few steps."""
    steps = 30 if quick else 2000

    def job(world, kind, sparsity, control="", steps=steps):
        recipe = DictionaryRecipe(kind, sparsity, N_FEATURES, steps)
        return DictionaryJob(world, recipe, control)

    jobs = {}
    for kind, sparsities in SWEEPS.items():
        for sparsity in sparsities:
            jobs[f"uniform, {kind}, {sparsity}"] = job("uniform", kind, sparsity)
    for world in WORLDS[1:]:
        for kind in KINDS:
            jobs[f"{world}, {kind}, {CHOSEN[kind]}"] = job(world, kind, CHOSEN[kind])

    count = CHOSEN["TopK"]
    for world in ("uniform", "hierarchy"):
        jobs[f"{world}, untrained"] = job(world, "TopK", count, steps=0)
    for control in ("frozen", "true", "noise"):
        jobs[control] = job("uniform", "TopK", count, control)
    return jobs


def known_features(world, seed):
    """The SparseFeatures of a world and a seed."""
    return SparseFeatures.draw_directions(world, N_FEATURES, D_IN, DENSITY,
                                          seed_for("true directions", seed))


def trained_dictionaries(jobs, seed, folder, *, n_texts=N_TEXTS, retrain=False):
    """{name: Dictionary} of all jobs, trained on n_texts, or read where they were kept.

    folder: of the seed, in which one file for each world lies.
    """
    progress = Progress(len(jobs), " dictionaries")
    done = 0
    found = {}
    for world in WORLDS:
        own = {name: job for name, job in jobs.items() if job.world == world}
        settings = {"seed": seed, "n_texts": n_texts,
                    "jobs": {name: asdict(job) for name, job in own.items()}}

        def make(world=world, own=own, done=done):
            features = known_features(world, seed)
            x, _ = features.draw(n_texts, seeded_generator(seed_for("texts", seed)))
            made = {}
            for number, (name, job) in enumerate(own.items(), done + 1):
                made[name] = job.train(features, x, seed).tensors()
                progress.show(number, f"seed {seed}: {name}")
            return {"dictionaries": made}

        state = load_or_make(folder / f"{world}.pt", settings, make, retrain)
        for name, job in own.items():
            found[name] = job.recipe.restore(state["dictionaries"][name])
        done += len(own)
    progress.close()
    return found


def principal_components(x):
    """A dictionary of the principal components of x [n, d], each in both directions: a complete
    basis, which writes everything exactly."""
    _, directions = torch.linalg.eigh(x.T.cov())
    both = torch.cat([directions.T, -directions.T])  # [2 d, d]
    dictionary = ReluL1(x.shape[1], x.shape[1], len(both), 0.0, seeded_generator(0), W_dec=both)
    with torch.no_grad():
        dictionary.b_dec.copy_(x.mean(0))
        dictionary.b_enc.copy_(-x.mean(0) @ both.T)
    return dictionary


@torch.no_grad()
def measure_known(jobs, dictionaries, seed):
    """{name of a job: what is measured of its dictionary} and that of the principal components, as
    plain values."""
    found = {}
    for world in WORLDS:
        features = known_features(world, seed)
        x, values = features.draw(N_HELD_OUT, seeded_generator(seed_for("held-out texts", seed)))
        own = {name: dictionaries[name] for name, job in jobs.items() if job.world == world}
        if world == "uniform":
            own["components"] = principal_components(x)
        for name, dictionary in own.items():
            z = dictionary.encode(x)
            cosines = feature_cosines(dictionary, z, features.directions)
            found[name] = describe_fit(dictionary, x) | describe_recovery(cosines)
            if world == "uniform":
                found[name]["slope"] = mean_slope(cosines, z, values)
            if world == "zipf":
                found[name]["by frequency"] = recovered_by_frequency(cosines, features.chances)
            if world == "hierarchy":
                found[name] |= describe_absorption(dictionary, features, cosines, z, values)
    return found
