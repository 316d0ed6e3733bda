"""Write the HTML page on which a slider runs over a training.

Chapter: COURSE_ROADMAP.md, 15 (grokking and training dynamics)
Prerequisites: experiments/dynamics/measure.py, experiments/dynamics/report.py
Next: experiments/dynamics/compare.py
Source: Olsson et al. 2022 (heads and losses over training)
"""

import math
from pathlib import Path

from experiments import common
from experiments.dynamics.measure import BINS, SHOWN, histogram_end
from experiments.dynamics.report import LOOKING_BACK, dip
from experiments.dynamics.tables import TABLES

TEMPLATE = Path(__file__).with_name("page.html")


def make_page(subjects):
    """The plain values that the page draws. subjects: [what `describe_subject` returns]."""
    return {
        "title": "What a model learns first",
        "about": "Move the slider through a training. Early on the model predicts as a table of "
                 "single tokens would, then as one of pairs; then it leaves all tables and uses "
                 "what lies further back.",
        "reading": "All numbers are of text that was held out from training. KL is what the model "
                   "would lose, in nats a token, on a text drawn from the table. A head is removed "
                   "by writing its mean; its score is the attention that it pays. Curves end at "
                   "the upper edge where they would leave the picture.",
        "subjects": subjects,
    }


def describe_subject(name, run, held, tokenizer):
    """The plain values of one training, with numbers of four digits.

    run: what `measure_training` returned, with what is shown. held: the HeldOut.
    """
    states = [common.rounded(state | shown)
              for state, shown in zip(run["states"], run["shown"], strict=True)]
    tokens = held.windows[:SHOWN].tolist()
    return {
        "name": name, "unit": tokenizer.unit, "steps": run["steps"], "states": states,
        "start": run["steps"].index(dip(run, "bigrams")["step"]), "heads": run["heads"],
        "tables": list(TABLES), "kinds": list(LOOKING_BACK),
        "tokens": [[tokenizer.decode([token]) for token in window] for window in tokens],
        "vocabulary": [tokenizer.decode([token]) for token in range(tokenizer.d_vocab)],
        "uniform": math.log(tokenizer.d_vocab), "bin": histogram_end(tokenizer.d_vocab) / BINS,
    }


def write_page(path, page):
    """Write the page: the template beside this file, with the values of `make_page` in it."""
    common.write_page(path, TEMPLATE, page)
