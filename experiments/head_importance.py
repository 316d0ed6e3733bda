"""How much does a head matter? Four measures, a model whose circuit is known, and one of a text.

    python experiments/head_importance.py                    # 2 minutes, one thread
    python experiments/head_importance.py --run_name mine    # a run of train.py in outputs/
    python experiments/head_importance.py --quick            # seconds: one seed, few steps

The measures are zero, mean and resample ablation, and the gradient importance of Michel et al.

Claim, of a model of text: the four rank the heads much alike, and pruning by any of the three
ablations costs less than pruning in a random order. Pruning by the gradient does too for
Shakespeare, but not for the built-in corpus, so that is reported and not claimed.
Claim, where the circuit is known (two layers, an induction circuit): all ablations put its heads on
top, and all four measures give a dead head exactly 0. The gradient is flat at a loss near 0, and
finds the circuit only by luck; its mean along the way to z = 0 finds it.
Claim, of heads that work together: a number for each head hides it. The previous-token head and an
induction head are in series, so that removing both costs no more than one. Two induction heads are
in parallel, so that both cost more than the two numbers add up to.
Expected: every line with a verdict passes, on Tiny Shakespeare and on the built-in corpus (without
a network). The induction models are those of experiments/induction_head_detection.py, made here (a
minute more) where they are not there yet.

Heads are ranked on some texts, and pruned on others. A pruned head writes its mean, which could be
a bias. Intervals are over texts, those of a claim over seeds.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: experiments/importance/measure.py, experiments/importance/report.py
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
    """What is measured, and on how much."""

    run_name: str | None = option(None, "a run of train.py, in place of models made here")
    dataset: Literal["auto", "tiny_shakespeare", "builtin"] = option(
        "auto", "the text of the models made here, as for train.py")
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
    """{"found": what came out, in words, "claims": [Claim], "models": what was measured of each}.

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
    """{name: Figure} of what `run` returned: of the first model of text, and the first circuit."""
    texts, known = split_by_truth(result["models"])
    return {"importance": importance_figure(texts[0], known[0]),
            "pruning": pruning_figure(texts[0], known[0])}


def main(argv=None):
    """The program: measures, prints the table, writes outputs/head_importance."""
    perform(ImportanceConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
