"""Induction heads: they form at once, two layers are needed, and one path carries all of it.

    python experiments/induction_head_detection.py                   # trains, 3 minutes, 1 thread
    python experiments/induction_head_detection.py --run_name NAME   # any run's heads, seconds
    python experiments/induction_head_detection.py --model gpt2      # a pretrained model's

Claim: a model of two attention layers that is trained on segments of random tokens which come
twice gets a head that looks one token back and a head that finds, by what that one wrote, the token
after the last occurrence of its own; both, and the fall of the loss, come in one short phase. What
the first head writes is read in the keys of the second (K-composition): this path alone carries the
answer. One layer can't do it; and a low loss is no proof, since texts with a fixed distance in them
are told without either head.
Expected: with every seed an induction score above .9, a previous-token score above .85 and a loss
on repeats below .1 nats, also on lengths, gaps and orders that it was not trained on.

Chapter: COURSE_ROADMAP.md, 11 (induction)
Read before: experiments/induction_model.py, induction_proof.py, induction_scan.py
Source: Elhage et al. 2021; Olsson et al. 2022
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass

from checkpoint import find_run, is_pretrained, load_model
from config import check_field, option
from experiments.common import ExperimentConfig, perform
from experiments.induction_model import Recipe, circuit, trained
from experiments.induction_proof import proof, transfer
from experiments.induction_report import claims_of, figure_of
from experiments.induction_scan import (
    best_heads,
    scan,
    scan_ablation,
    scan_claims,
    scan_figures,
)
from model import GPT
from utils import run_program


@dataclass(frozen=True)
class InductionConfig(ExperimentConfig):
    """Settings of the experiment."""

    run_name: str | None = option(None, "look for the heads in this run of out_dir instead")
    model: str | None = option(None, "or in gpt2, gpt2-medium, …, or a folder in its layout")
    cache_dir: str | None = option(None, "where downloads are kept (none: below ~/.cache)")
    steps: int = option(Recipe.steps, "of each training")

    def __post_init__(self):
        super().__post_init__()
        check_field(self, "steps", lambda n: n >= 1, "1 or more")
        if self.model is not None and not is_pretrained(self.model):
            GPT.from_pretrained(self.model)  # says which there are

    def recipe(self, **changes):
        """The Recipe of a training."""
        return Recipe(steps=min(self.steps, 30) if self.quick else self.steps, **changes)


def run(cfg, folder):
    """{"claims": [Claim], and of each seed what was measured}; cfg: an InductionConfig."""
    if cfg.run_name is not None or cfg.model is not None:
        return run_scan(cfg)
    seeds = [of_seed(cfg, folder, seed) for seed in cfg.seeds]
    return {"claims": claims_of(seeds, tested=not cfg.quick), "seeds": seeds}


def of_seed(cfg, folder, seed):
    """What one seed gave: the `proof` of its model, and what the two that lack the heads do."""
    found = proof(*trained(folder, seed, cfg.recipe(), retrain=cfg.retrain))
    _, one_layer = trained(folder, seed, cfg.recipe(n_layers=1, every=50), retrain=cfg.retrain)
    model, circles = trained(folder, seed, cfg.recipe(circles=True, every=50), retrain=cfg.retrain)
    return found | {"seed": seed, "one_layer": one_layer, "circles": circles,
                    "circles_transfer": transfer(model, circuit(model))}


def run_scan(cfg):
    """The same of one other model: its heads' scores."""
    if cfg.run_name is not None:
        model, _ = load_model(find_run(cfg.run_name, cfg.out_dir))
    else:
        model = GPT.from_pretrained(cfg.model, cfg.cache_dir)
    found = scan(model)
    removed = scan_ablation(model, best_heads(found, "induction")[0])
    return {"claims": scan_claims(model.cfg, found, removed), "scan": found, "removed": removed}


def figures(result):
    """{name: Figure}."""
    if "scan" in result:
        return scan_figures(result["scan"])
    return {"induction": figure_of(result["seeds"])}


def main(argv=None):
    """The program; see above."""
    perform(InductionConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
