"""Induction heads form in one short phase, need two layers, and are connected by a single path.

    python experiments/induction_head_detection.py                   # trains, 3 minutes, 1 thread
    python experiments/induction_head_detection.py --run_name NAME   # the heads of a run, seconds
    python experiments/induction_head_detection.py --model gpt2      # the heads of GPT-2

Setup: a model of two attention layers is trained on texts of random tokens. Three texts in four
hold a segment twice; in the fourth each token has one fixed follower (a map).
Claim: the model gets a previous-token head, which looks one token back, and an induction head. The
induction head uses what the first head wrote to find the token that followed the last occurrence of
the current one. The loss falls and both heads form in one short phase. The keys of the second head
read what the first one writes (K-composition), and this path alone carries the answer. A single
layer can't do it. And a low loss is no proof: where everything recurs at one fixed distance
(circles), a model predicts the text with neither head.
Expected: every seed reaches an induction score above 0.9, a previous-token score above 0.85 and a
loss on repeats below 0.1 nats, also on lengths, gaps and orders that it was not trained on. What
the previous-token head alone is worth is claimed of the median seed. With seed 330 the layer's
other head pays 0.40 of its attention to the token before as well, and half of the answer is left
without the first (the loss rises by 2.3 nats instead of 4.5).

Thresholds: chosen on seeds 0 to 2.

Chapter: COURSE_ROADMAP.md, 11 (induction)
Prerequisites: experiments/induction/model.py, experiments/induction/measure.py
Next: experiments/induction/scan.py
Source: Elhage et al. 2021; Olsson et al. 2022
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import find_run, load_from_elsewhere, load_model
from config import check_field, option
from experiments.common import ExperimentConfig, Trainings, check_pretrained, perform
from experiments.induction.measure import measure_seed
from experiments.induction.model import InductionRecipe
from experiments.induction.report import describe_findings, induction_claims, induction_figure
from experiments.induction.scan import report_scan, scan_figures
from utils import run_program

QUICK_STEPS = 30


@dataclass(frozen=True)
class InductionConfig(ExperimentConfig):
    """Settings of the experiment."""

    run_name: str | None = option(None, "find the heads of this run in out_dir; trains nothing")
    model: str | None = option(None, "find the heads of gpt2, gpt2-medium, … or of a folder in "
                               "their layout")
    cache_dir: str | None = option(None, "where downloads are kept (none: below ~/.cache)")
    steps: int = option(InductionRecipe.steps, "steps of each training")

    def __post_init__(self):
        super().__post_init__()
        check_field(self, "steps", lambda n: n >= 1, "1 or more")
        check_pretrained(self.model)

    @property
    def recipe(self):
        """The InductionRecipe of the models that are trained."""
        return InductionRecipe(steps=min(self.steps, QUICK_STEPS) if self.quick else self.steps)


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "seeds": the measurements of each seed}.

    cfg: an InductionConfig. If it names a run or a model, the result is that of `report_scan`.
    """
    if cfg.run_name is not None:
        model, _ = load_model(find_run(cfg.run_name, cfg.out_dir))
        return report_scan(model)
    if cfg.model is not None:
        model, _ = load_from_elsewhere(cfg.model, cache_dir=cfg.cache_dir)
        return report_scan(model)

    trainings = Trainings([cfg.recipe.steps] * 3 * len(cfg.seeds))  # three models a seed
    seeds = [measure_seed(folder, seed, cfg.recipe, retrain=cfg.retrain, trainings=trainings)
             for seed in cfg.seeds]
    return {"found": describe_findings(seeds),
            "claims": induction_claims(seeds, judged=not cfg.quick), "seeds": seeds}


def figures(result):
    """{name: Figure} from what `run` returned."""
    if "scan" in result:
        return scan_figures(result["scan"])
    return {"induction": induction_figure(result["seeds"])}


def main(argv=None):
    """Run the program: train or read the models, print the table, write the figures."""
    perform(InductionConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
