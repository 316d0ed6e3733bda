"""How long the trainings of the experiments take: one of each, on as many threads as the benchmark.

Chapter: COURSE_ROADMAP.md, 0 (what counts as evidence)
Read before: experiments/benchmark.py; after: the experiments
Source: none; the marks are this project's own
"""

import tempfile
import time
from pathlib import Path

import torch

from experiments import grokking_training, induction_model
from experiments.common import claim_of
from experiments.feature_superposition_toy_model import SuperpositionConfig, jobs


def trainings(quick):
    """{what is trained: (a function that trains it, the most seconds that it may take)}."""
    toys = jobs(SuperpositionConfig(quick=quick))
    recipe = induction_model.Recipe(steps=10) if quick else induction_model.Recipe()

    def toy(*names):
        return lambda: [toys[name].train(0) for name in names]

    def induction():
        with tempfile.TemporaryDirectory() as folder:
            induction_model.trained(Path(folder), 0, recipe)

    def addition(canonical):
        cfg = grokking_training.GrokkingConfig(canonical=canonical and not quick, quick=quick)
        name, first = next(iter(cfg.recipes().items()))
        return lambda: grokking_training.trained(first, name)

    return {"induction heads from nothing": (induction, 60), "five features in a plane":
            (toy("polytopes"), 6), "200 features in 20 dimensions": (toy("geometry"), 40),
            "both phase diagrams": (toy("phases 2,1", "phases 3,2"), 60),
            "grokking, p = 59": (addition(False), 30), "grokking, p = 113": (addition(True), 180)}


def experiment_claims(cfg):
    """A claim on the seconds of each training. cfg: a BenchmarkConfig."""
    claims = []
    for name, (train, most) in trainings(cfg.quick).items():
        began = time.perf_counter()
        train()
        seconds = torch.tensor([time.perf_counter() - began])
        claims.append(claim_of(f"training {name}: seconds", seconds,
                               at_most=None if cfg.quick else most))
    return claims
