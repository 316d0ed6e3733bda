"""Measure how important each head is in four ways, on models of text and on known circuits.

    python experiments/head_importance.py                    # 2 minutes, one thread
    python experiments/head_importance.py --run_name mine    # a run of train.py in outputs/
    python experiments/head_importance.py --quick            # seconds: one seed, few steps

The measures are zero, mean and resample ablation, and the gradient importance of Michel et al.

Claim, for models of text: the four measures rank the heads similarly, and pruning by any of the
three ablations costs less than pruning in a random order. Pruning by the gradient does so too on
Shakespeare, but not on the built-in corpus, so this is reported and not claimed.
Claim, for a known circuit (two layers, induction): every ablation ranks the circuit's heads
highest, and all four measures give a dead head exactly 0. The gradient is flat where the loss is
near 0, so it finds the circuit only by luck; its mean along the path to z = 0 finds it.
Claim, for heads that work together: one number per head hides how they do. The previous-token head
and an induction head are in series: removing both costs no more than removing one. Two induction
heads are in parallel: removing both costs more than the sum of the two numbers.
Expected: every line with a verdict passes, on Tiny Shakespeare and on the built-in corpus (without
a network). The induction models are those of experiments/induction_head_detection.py; if they are
missing, they are trained here, which takes a minute more.

Heads are ranked on some texts and pruned on others. A pruned head writes its mean, which could be
merged into a bias. Intervals of single models are over texts, ranges of claims over seeds.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: head_ablation.py, experiments/wired/model.py
Next: circuits.py
Source: Michel et al. 2019 (gradient importance, pruning curves); McDougall et al. 2023 (repair)
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from config import check_choices, check_field, option
from experiments.common import ExperimentConfig, perform
from experiments.importance.measure import measure_subject
from experiments.importance.model import load_subjects
from experiments.importance.report import (
    describe_findings,
    importance_claims,
    importance_figure,
    pruning_figure,
    split_by_truth,
)
from utils import Progress, run_program


@dataclass(frozen=True)
class ImportanceConfig(ExperimentConfig):
    """Settings of the experiment."""

    run_name: str | None = option(None, "a run of train.py, instead of models trained here")
    dataset: Literal["auto", "tiny_shakespeare", "builtin"] = option(
        "auto", "the text of the models trained here, as for train.py")
    steps: int = option(500, "steps of training for each model of text")
    windows: int = option(64, "texts to rank the heads on; a quarter as many to prune on")
    orders: int = option(40, "random orders of pruning")

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        check_field(self, "steps", lambda n: n >= 1, "1 or more")
        check_field(self, "windows", lambda n: n >= 8, "8 or more")
        check_field(self, "orders", lambda n: n >= 20, "20 or more")


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "models": the measurements of each}.

    cfg: an ImportanceConfig.
    """
    if cfg.quick:
        cfg = replace(cfg, steps=20, windows=8, orders=20, seeds=cfg.seeds[:1])

    n_texts = len(cfg.seeds) if cfg.run_name is None else 1
    progress = Progress(n_texts + len(cfg.seeds), " models")
    models = []
    for subject in load_subjects(cfg, folder):
        models.append(measure_subject(subject, cfg.orders))
        progress.show(len(models), f"{subject.name} measured")
    progress.close()

    claims = importance_claims(models, judged=not cfg.quick, own=cfg.run_name is None)
    return {"found": describe_findings(models), "claims": claims, "models": models}


def figures(result):
    """{name: Figure} from what `run` returned: of the first model of text and the first circuit."""
    texts, known = split_by_truth(result["models"])
    return {"importance": importance_figure(texts[0], known[0]),
            "pruning": pruning_figure(texts[0], known[0])}


def main(argv=None):
    """Run the program: measure, print the table, write outputs/head_importance."""
    perform(ImportanceConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
