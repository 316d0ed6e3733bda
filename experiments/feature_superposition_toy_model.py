"""Superposition: rare features share dimensions, in polytopes, plateaus and phases.

    python experiments/feature_superposition_toy_model.py           # 3 minutes, one thread
    python experiments/feature_superposition_toy_model.py --quick   # seconds: one seed, tiny

Claim: if features are dense, the most important ones get a dimension each and the others none. As
features become rarer, more of them share: in the plane first two antipodal pairs, then a pentagon;
many features in 20 dimensions first share by two. For one feature too many, a closed form predicts
when it is left out, gets a dimension, or shares one. Features that never meet share a line, those
that always meet do not. Without the ReLU no feature ever shares.
Expected: every line passes, for all seeds. A seed takes 5 s for the polytopes, 11 for the plateaus,
32 for the phases, 17 for the pairs and 7 for the linear controls (CPU, on a shared laptop core).

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/superposition/model.py, experiments/superposition/measure.py
Next: experiments/dictionaries/model.py
Source: Elhage et al. 2022, Toy models of superposition
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

from config import check_field, option
from experiments.common import ExperimentConfig, Trainings, perform
from experiments.superposition.measure import measure_toys
from experiments.superposition.model import toy_jobs, trained_toys
from experiments.superposition.report import claims_of_toys, figures_of_toys, summarize_toys
from utils import run_program


@dataclass(frozen=True)
class SuperpositionConfig(ExperimentConfig):
    """Settings of the experiment."""

    cells: int = option(14, "densities, and importances, of a phase diagram; an even number")

    def __post_init__(self):
        super().__post_init__()
        check_field(self, "cells", lambda n: n >= 4 and n % 2 == 0, "4 or more, and even")


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "seeds": the measures of each seed's studies}."""
    jobs = toy_jobs(cfg.cells, cfg.quick)
    seeds = cfg.seeds[:1] if cfg.quick else cfg.seeds

    found = []
    trainings = Trainings([job.steps for job in jobs.values()] * len(seeds))
    for seed in seeds:
        states = trained_toys(jobs, seed, folder / f"seed_{seed}", retrain=cfg.retrain,
                              trainings=trainings)
        found.append(measure_toys(jobs, states, seed))

    claims = claims_of_toys(found, judged=not cfg.quick)
    return {"found": summarize_toys(found), "claims": claims, "seeds": found}


def figures(result):
    """{name: Figure} of a run's result."""
    return figures_of_toys(result["seeds"])


def main(argv=None):
    """Run the program: train, measure, print the table, write the figures."""
    perform(SuperpositionConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
