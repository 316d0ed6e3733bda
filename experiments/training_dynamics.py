"""What a model learns first: tables of n-grams, then looking back, step by step of its training.

    python experiments/training_dynamics.py                     # 4 minutes, one thread; again: 1
    python experiments/training_dynamics.py --compare words repeats     # two runs of train.py
    python experiments/training_dynamics.py --compare words/best.pt words
    python experiments/training_dynamics.py --quick             # seconds: one seed, few steps

Writes outputs/training_dynamics/dynamics.html, a page with a slider over the training that needs no
network.

Claim: early in training a model predicts as a table of bigrams would. The distance of its
predictions to that table has a minimum within the training; before and after it, the model is far
away. It is nearest to unigrams earlier and to trigrams later. A model without layers, which can't
look back, comes to the bigrams too and stays. Heads that look at the token before form only after
this minimum. On a text whose floor is known, abilities that need more than three words come one
after another: copying before the indirect object. When recall comes is only reported.
Expected: every line with a verdict passes. Two of them are about the median seed: that trigrams
come after bigrams, and that heads look at the token before only then. Two lines are not judged:
whether a head's score rises before its effect. On characters it did, on words the effect came first
(seeds 10 to 12).

Each seed trains three models, of 1,000, 1,000 and 2,500 steps, and keeps 30 MB.

--compare takes two models and says which tokens got better or worse from the first to the second,
and which heads changed. Each is a run in outputs/, its folder, RUN/best.pt, or RUN@STEP for a step
that this program kept, such as outputs/training_dynamics/characters_10@128.

Thresholds: decided on paper, after one training of a larger model with seed 0.

Chapter: COURSE_ROADMAP.md, 15 (grokking and training dynamics)
Prerequisites: experiments/dynamics/measure.py
Next: experiments/cards/model.py
Source: Olsson et al. 2022 (heads and losses over training); Chang & Bergen 2022 (n-grams first)
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import check_choices, check_field, option
from data import load_dataset
from experiments.common import ExperimentConfig, Trainings, perform
from experiments.dynamics.compare import compare, load_compared
from experiments.dynamics.measure import hold_out, measure_training
from experiments.dynamics.model import make_recipes, trained_states
from experiments.dynamics.page import describe_subject, make_page, write_page
from experiments.dynamics.report import (
    claims_of_comparison,
    claims_of_dynamics,
    comparison_figure,
    describe_comparison,
    describe_findings,
    figures_of_dynamics,
)
from utils import run_program


@dataclass(frozen=True)
class DynamicsConfig(ExperimentConfig):
    """The seeds and the text of the models that are trained, or two models to compare."""

    seeds: tuple[int, ...] = option(
        (10, 11, 12), "such as 0 1 or 0,1; three models are trained with each")
    dataset: Literal["auto", "tiny_shakespeare", "builtin"] = option(
        "auto", "the text of the models of characters, as for train.py")
    compare: tuple[str, ...] = option(
        (), "two models to compare instead: RUN, RUN/best.pt or RUN@STEP")

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        check_field(self, "compare", lambda models: len(models) in (0, 2), "two models")

    @property
    def folder_suffix(self):
        """The folder's suffix for a comparison."""
        return "_compare" if self.compare else ""


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "runs": {recipe: [run of each seed]}}, and the page;
    or, with --compare, "comparison" in place of the runs.

    cfg: a DynamicsConfig; folder: where trained models are kept and the page is written.
    """
    if cfg.compare:
        comparison = compare(*(load_compared(text, cfg.out_dir) for text in cfg.compare))
        return {"found": describe_comparison(comparison), "comparison": comparison,
                "claims": claims_of_comparison(comparison)}

    recipes = make_recipes(cfg.dataset, cfg.quick)
    seeds = cfg.seeds[:1] if cfg.quick else cfg.seeds
    trainings = Trainings([each.train.max_steps for each in recipes for _ in seeds])
    runs = {}
    subjects = []
    load = functools.cache(load_dataset)  # two recipes share a text
    for recipe in recipes:
        dataset = load(recipe.data, recipe.model.n_ctx)
        held = hold_out(dataset, recipe.model.n_ctx)
        runs[recipe.name] = []
        for seed in seeds:
            home = folder / f"{recipe.name}_{seed}".replace(" ", "_")
            history = trained_states(home, recipe, dataset, seed, retrain=cfg.retrain,
                                     trainings=trainings)
            is_shown = seed == seeds[0] and recipe.model.n_layers > 0
            measured = measure_training(recipe, history, held, is_shown)
            if is_shown:
                subjects.append(describe_subject(
                    f"{recipe.name}: {dataset.name}", measured, held, dataset.tokenizer))
            del measured["shown"]  # it is in the page
            runs[recipe.name].append(measured)

    write_page(folder / "dynamics.html", make_page(subjects))
    return {"found": describe_findings(runs), "runs": runs,
            "claims": claims_of_dynamics(runs, judged=not cfg.quick)}


def figures(result):
    """{name: Figure} from what `run` returned."""
    if "comparison" in result:
        return {"comparison": comparison_figure(result["comparison"])}
    return figures_of_dynamics(result["runs"])


def main(argv=None):
    """Run the program: train and measure, or compare; print the table; write the page."""
    perform(DynamicsConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
