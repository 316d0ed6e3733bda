"""Copy suppression: a head takes back what is predicted where it has been said already.

    python experiments/copy_suppression.py                 # trains, some minutes, 1 thread
    python experiments/copy_suppression.py --model gpt2    # a published model's head

Claim: texts walk through a table of successors and never go back, so a successor that was seen is
impossible, while other tokens do come back. Which successors are meant hangs on the token before
the last one. A model of two attention layers gets a head that fetches that token, and a head in the
second layer that looks for what is predicted now, wherever in the text it is, and suppresses it.
Expected: see the table; the claims that fail are printed as such.

Chapter: COURSE_ROADMAP.md, 12 (copying and suppression)
Prerequisites: experiments/suppression/model.py, experiments/suppression/measure.py
Next: experiments/suppression/report.py
Source: McDougall et al. 2023, *Copy suppression: comprehensively understanding an attention head*
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import is_pretrained, load_pretrained
from config import check_field, option
from experiments.common import ExperimentConfig, perform
from experiments.suppression.measure import measure_suppressor, null_losses
from experiments.suppression.model import SuppressionRecipe, trained_suppressor
from experiments.suppression.published import published_figures, report_published
from experiments.suppression.report import (
    describe_findings,
    suppression_claims,
    suppression_figures,
)
from model import GPT
from utils import run_program

QUICK_STEPS = 30


@dataclass(frozen=True)
class SuppressionConfig(ExperimentConfig):
    """Settings of the experiment."""

    model: str | None = option(None, "gpt2, gpt2-medium, …, or a folder in its layout, instead")
    cache_dir: str | None = option(None, "where downloads are kept (none: below ~/.cache)")
    steps: int = option(SuppressionRecipe.steps, "of each training")

    def __post_init__(self):
        super().__post_init__()
        check_field(self, "steps", lambda n: n >= 1, "1 or more")
        if self.model is not None and not is_pretrained(self.model):
            GPT.from_pretrained(self.model)  # raises a UserError that lists the names there are

    @property
    def n_steps(self):
        """Of each training."""
        return min(self.steps, QUICK_STEPS) if self.quick else self.steps


def run(cfg, folder):
    """{"found": text, "claims": [Claim], "seeds": what was measured of each, "nulls"}.

    cfg: a SuppressionConfig. Where it names another model, the result is that of
    `report_published`.
    """
    if cfg.model is not None:
        return report_published(*load_pretrained(cfg.model, cache_dir=cfg.cache_dir))

    seeds = []
    for seed in cfg.seeds:
        result = {}
        for name, lag in (("computed", 2), ("current", 1)):
            recipe = SuppressionRecipe(seed=seed, lag=lag, steps=cfg.n_steps)
            model = trained_suppressor(folder / f"{name}_seed_{seed}", recipe, retrain=cfg.retrain)
            result[name] = measure_suppressor(model, recipe)
            untrained = GPT(recipe.model_config(), seed).eval()
            result[f"{name} untrained"] = measure_suppressor(untrained, recipe)
            result[f"{name} nulls"] = null_losses(recipe.walks)
        seeds.append(result)
    return {"found": describe_findings(seeds),
            "claims": suppression_claims(seeds, judged=not cfg.quick), "seeds": seeds}


def figures(result):
    """{name: Figure} of what `run` returned."""
    if "published" in result:
        return published_figures(result["published"])
    return suppression_figures(result["seeds"])


def main(argv=None):
    """The program; see above."""
    perform(SuppressionConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
