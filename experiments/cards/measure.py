"""Run a study: measure what its card claims, and the null, with every seed.

A study is a program `research/NAME/study.py`. It has two functions of a seed that return the card's
number: `measure`, and `null`, where the hypothesis predicts nothing.

Chapter: COURSE_ROADMAP.md, 15 (grokking)
Prerequisites: experiments/cards/model.py
Next: experiments/cards/report.py
Source: none
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from config import check_field, config_from_dict, flag_parser, option
from experiments.cards.model import check_not_chosen_on, read_card
from experiments.cards.report import describe_study, study_claims, study_figure
from experiments.common import check_seeds, conclude, experiment_folder, torch_threads
from utils import Progress, UserError


@dataclass(frozen=True)
class StudyConfig:
    """Settings of every study."""

    seeds: tuple[int, ...] = option((), "seeds to judge, instead of those on the card")
    threads: int = option(1, "CPU threads")
    out_dir: str = option("outputs", "the folder that the study's folder is written to")

    def __post_init__(self):
        if self.seeds:
            check_seeds(self)
        check_field(self, "threads", lambda n: n >= 1, "1 or more")


def perform_study(file, about, measure, null, *, more=None, argv=None):
    """The program of a study: measure, print the table, write the results, and exit, with 1 if the
    claim does not hold or the null passes too.

    file: the study's own `__file__`, beside its card. about: its docstring. measure, null:
    functions of a seed that return the card's number. more(seed) -> {words: a number}: further
    numbers, for information.
    """
    began = time.monotonic()
    title = about.split("\n")[0]
    flags = flag_parser(StudyConfig, title).parse_args(argv)
    cfg = config_from_dict(StudyConfig, vars(flags))
    card = read_card(Path(file).resolve().parent)
    seeds = cfg.seeds or card.seeds
    check_not_chosen_on(card, seeds)
    folder = experiment_folder(f"research_{card.name}", cfg.out_dir)

    progress = Progress(2 * len(seeds), " measurements")
    found = {"measured": [], "null": [], "more": []}
    with torch_threads(cfg.threads):
        for seed in seeds:
            for name, function in (("measured", measure), ("null", null)):
                found[name].append(checked_number(function(seed), name, seed, card))
                progress.show(len(found["measured"]) + len(found["null"]), f"{name}, seed {seed}")
            if more is not None:
                found["more"].append(more(seed))
    progress.close()

    result = {"about": title, "settings": asdict(cfg) | {"seeds": seeds},
              "torch": torch.__version__, "thresholds": card.texts["Threshold from"],
              "found": describe_study(card, found), "claims": study_claims(card, found), **found}
    conclude(result, folder, {"study": study_figure(card, found)},
             seconds=time.monotonic() - began)


def checked_number(value, name, seed, card):
    """The value as a float. Raises UserError if it is not finite, or not possible by the card."""
    number = float(value)
    low, high = card.possible
    if not math.isfinite(number):
        raise UserError(f"{name}, seed {seed}: {number} is no number; correct the study")
    if not low <= number <= high:
        raise UserError(f"{name}, seed {seed}: {number:g} is not among the card's possible values, "
                        f"{low:g} to {high:g}; correct the card or the study")
    return number
