"""Grokking: a transformer first memorises addition mod p, and learns the rule long afterwards.

    python experiments/grokking_experiment.py              # 3 seeds, 2 controls: 3 to 5 minutes
    python experiments/grokking_experiment.py --canonical  # Nanda et al.'s p = 113: 2 minutes

Claim: the model is right on test pairs only long after it is right on all training pairs. Its
logits are then a sum of cos w_k(a + b - c) at few frequencies k. Without these waves it fails even
on the training pairs. And the waves grow long before the test loss shows it.
Expected: every line passes and the exit code is 0. Two lines are about the median seed: how much
later the test pairs are known than the training pairs, and how much earlier the waves' loss falls
than averaging explains. Two controls never generalise to test pairs: one is trained without weight
decay, the other on random answers.

The model is a GPT of one layer with ReLU and without LayerNorm. It is trained on all training pairs
in each step, with weight decay 1. By default p = 59, and (a, b) and (b, a) are in the same split,
so that a + b = b + a does not help. With --canonical, p = 113, d_model is 128 and three tenths of
all pairs are trained on, as in the paper, at seven times its learning rate; one seed, no controls.
A model that has learned to add is trained for as many steps again, so that what it learned by heart
can go away; one that never does stops at step 5,000. One thread; 12 to 60 s of CPU time for each
model, and 15 MB (p = 113: 60 MB) on disk.

Thresholds: chosen on seeds 0 to 2 and 10 to 14.

Chapter: COURSE_ROADMAP.md, 15 (grokking and training dynamics)
Prerequisites: experiments/grokking/model.py, experiments/grokking/fourier.py
Next: experiments/dynamics/tables.py
Source: Power et al. 2022; Nanda et al. 2023, *Progress measures for grokking*
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
from dataclasses import dataclass

from config import check_field, option
from experiments.common import ExperimentConfig, Trainings, perform
from experiments.grokking.measure import measure_training
from experiments.grokking.model import (
    CANONICAL_ADDITION,
    QUICK_ADDITION,
    GrokkingRecipe,
    trained_adder,
)
from experiments.grokking.report import (
    claims_of_grokking,
    figures_of_grokking,
    summarize_grokking,
)
from utils import run_program


@dataclass(frozen=True)
class GrokkingConfig(ExperimentConfig):
    """The task, the model and its training."""

    canonical: bool = option(False, "Nanda et al.'s p, width and split; only the first seed")
    p: int | None = option(None, "the modulus, an odd number (none: 59; canonical: 113)")
    fraction: float | None = option(None, "share of pairs to train on (none: 0.6; canonical: 0.3)")
    d_model: int | None = option(None, "width of the stream (none: 64; canonical: 128)")
    max_steps: int | None = option(None, "the most steps of training (none: 5,000)")
    weight_decay: float = option(1.0, "decoupled weight decay, on matrices")
    lr: float = option(7e-3, "AdamW's learning rate, constant")

    def __post_init__(self):
        super().__post_init__()
        for name, holds, wanted in (
            ("p", lambda p: 5 <= p <= 199 and p % 2, "odd, from 5 to 199"),
            ("fraction", lambda share: 0.05 <= share <= 0.95, "from 0.05 to 0.95"),
            ("d_model", lambda d: d >= 4 and d % 4 == 0, "a multiple of 4, for 4 heads"),
            ("max_steps", lambda n: n >= 20, "20 or more"),
            ("weight_decay", lambda decay: 0 <= decay < 10, "at least 0 and less than 10"),
            ("lr", lambda lr: 0 < lr < 1, "more than 0 and less than 1"),
        ):
            check_field(self, name, lambda value, holds=holds: value is None or holds(value),
                        wanted)

    @property
    def folder_suffix(self):
        """The folder's suffix for results of Nanda et al.'s setting."""
        return "_canonical" if self.canonical else ""

    def recipes(self):
        """{name: GrokkingRecipe} of all models: one for each seed, and two controls with the first
        seed."""
        shape = {}
        if self.canonical:
            shape = CANONICAL_ADDITION
        if self.quick:
            shape = QUICK_ADDITION
        given = {name: getattr(self, name) for name in ("p", "fraction", "d_model", "max_steps")
                 if getattr(self, name) is not None}
        first = GrokkingRecipe(**shape | given, weight_decay=self.weight_decay, lr=self.lr,
                               threads=self.threads, seed=self.seeds[0],
                               symmetric=not self.canonical)
        if self.canonical:
            return {f"canonical_seed_{first.seed}": first}

        seeds = self.seeds[:1] if self.quick else self.seeds
        trainings = {f"seed_{seed}": dataclasses.replace(first, seed=seed) for seed in seeds}
        controls = {"no_decay": dataclasses.replace(first, weight_decay=0.0),
                    "random_answers": dataclasses.replace(first, random_answers=True)}
        return trainings | controls


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "runs": {name: `measure_training`'s result}, "p"}."""
    runs = {}
    recipes = cfg.recipes()
    trainings = Trainings([recipe.max_steps for recipe in recipes.values()])
    for name, recipe in recipes.items():
        _, history = trained_adder(folder / name / "checkpoint.pt", recipe, name.replace("_", " "),
                                   retrain=cfg.retrain, trainings=trainings)
        runs[name] = measure_training(recipe, history, name)

    claims = claims_of_grokking(runs, recipe.p, recipe.symmetric, judged=not cfg.quick)
    return {"found": summarize_grokking(runs, recipe.p), "claims": claims, "runs": runs,
            "p": recipe.p}


def figures(result):
    """{name: Figure} from what `run` returns."""
    return figures_of_grokking(result["runs"], result["p"])


def main(argv=None):
    """Run the program: train, measure, print the table; a failed claim exits with 1."""
    perform(GrokkingConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
