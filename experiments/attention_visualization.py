"""Show each head's attention pattern beside its effect: a sharp pattern is not importance.

    python experiments/attention_visualization.py                     # trains three models first
    python experiments/attention_visualization.py --run_name mine     # a run of train.py
    python experiments/attention_visualization.py --model gpt2 --text "Two people, and one of them"

Writes outputs/attention_visualization/attention.html, a page that needs no network: choose a token
and see where each head looks and, beside the pattern, how much the loss rises without the head.
Training takes 20 s of CPU for each of three models, on one thread, and the models are kept;
everything else takes 6 s. A model of GPT-2 small's shape takes 3 minutes of CPU with --windows 8.

Claim: previous-token heads form. Over all heads, those that look more at the token before have a
larger effect when they are removed. But the sharpness of a pattern is a poor guide to importance;
ablation on other texts is a good one. In models wired by hand the truth is known: the needed head
has the least sharp pattern of four that look alike. The amount that a head writes exposes a head
that writes nothing, but not heads whose output nobody reads. Ablation exposes them all.
Expected: every line with a verdict passes. One line is not judged: in seeds 0 to 2, what is written
ranked the heads better than sharpness by 0.18 (-0.27 to 0.60).

Thresholds: chosen on seeds 0 to 2.

Chapter: COURSE_ROADMAP.md, 4 (QK and OV); what ablation is: chapter 9
Prerequisites: attention.py, experiments/attention_page/measure.py
Next: mlp.py
Source: Elhage et al. 2021 (QK and OV); Jain & Wallace 2019 (attention is not explanation);
Kobayashi et al. 2020 (the norm of what is written); Xiao et al. 2024 (attention sinks)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools
from dataclasses import dataclass
from typing import Literal

from config import check_choices, check_field, option
from experiments.attention_page.measure import describe_heads, rank_heads, view_subject
from experiments.attention_page.model import choose_subjects
from experiments.attention_page.page import make_page, write_page
from experiments.attention_page.report import (
    all_claims,
    importance_figure,
    pattern_figure,
    summarise,
)
from experiments.common import ExperimentConfig, perform
from utils import Progress, UserError, run_program


@dataclass(frozen=True)
class AttentionConfig(ExperimentConfig):
    """Which model to show, and on which texts; by default a model is trained for each seed."""

    run_name: str | None = option(None, "a run of train.py to look at, in out_dir")
    model: str | None = option(None, "a pretrained model to look at: gpt2, …, or its folder")
    text: str | None = option(None, "the text to show (none: a story, or the start of the run's "
                              "validation text)")
    held_out: str | None = option(None, "a file of text to ablate on (none: the run's validation "
                                  "text, or unseen text of the built-in corpus)")
    windows: int = option(64, "pieces of that text")
    length: int = option(40, "tokens in a piece, at most n_ctx")
    ablation: Literal["mean", "zero"] = option("mean", "what replaces a head: its mean, or zero")
    steps: int = option(1600, "steps of training, if models are trained here")

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        for name in ("windows", "length"):
            check_field(self, name, lambda n: n >= 2, "2 or more")
        check_field(self, "steps", lambda n: n >= 1, "1 or more")
        if self.text is not None and not self.text.strip():
            raise UserError(f"text={self.text!r} is empty; give two tokens or more")


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "models": the heads of each, "page": the page of the
    first}; also writes the page.

    cfg: an AttentionConfig. folder: for the page, and for models that are trained here.
    """
    subjects = choose_subjects(cfg, folder)

    n_heads = sum(each.model.cfg.n_layers * each.model.cfg.n_heads for each in subjects)
    progress = Progress(2 * n_heads, " heads ablated")
    done = itertools.count(1)
    views = [view_subject(each, cfg.ablation, lambda: progress.show(next(done)))
             for each in subjects]

    page = make_page(views[0], cfg)
    write_page(folder / "attention.html", page)

    # Claims about training are judged only for models that were fully trained here.
    is_own = cfg.run_name is None and cfg.model is None
    ranking = rank_heads(views)
    claims = all_claims(views, ranking, judged=is_own and not cfg.quick)
    return {"found": summarise(views, ranking, claims), "claims": claims,
            "models": {each.subject.name: describe_heads(each) for each in views}, "page": page}


def figures(result):
    """{name: Figure}: every pattern with its effect, the same weighed by what is written, and the
    effects of all heads over two scores."""
    return {"attention": pattern_figure(result["page"]),
            "written": pattern_figure(result["page"], weighed=True),
            "importance": importance_figure(result["models"])}


def main(argv=None):
    """Run the program: record and ablate heads, print the table, write the page and the figures."""
    perform(AttentionConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
