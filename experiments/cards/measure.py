"""Run a study: measure what its card claims, and the null, with every seed.

A study is a program `research/NAME/study.py`. It has two functions of a seed that return the card's
number: `measure`, and `null`, where the hypothesis predicts nothing.

Chapter: COURSE_ROADMAP.md, 16 (independent research)
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
from experiments.cards.model import PILOT, check_seeds_are_new, piloted_seeds, read_card
from experiments.cards.report import describe_study, study_claims, study_figure
from experiments.common import ROOT, check_seeds, conclude, experiment_folder, torch_threads
from utils import Progress, UserError, atomic_write

PILOT_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class StudyConfig:
    """Settings of every study."""

    seeds: tuple[int, ...] = option((), "seeds to judge, instead of those on the card")
    pilot: bool = option(False, "print the numbers of some seeds (0 1 2, or --seeds) and judge "
                                "nothing; the card need not be finished")
    threads: int = option(1, "CPU threads")
    out_dir: str = option("outputs", "the folder that the study's folder is written to")

    def __post_init__(self):
        if self.seeds:
            check_seeds(self)
        check_field(self, "threads", lambda n: n >= 1, "1 or more")


def perform_study(file, about, measure, null, *, ways=None, more=None, argv=None):
    """The program of a study: measure, print the table, write the results, and exit, with 1 if the
    claim does not hold or the null passes too.

    file: the study's own `__file__`, beside its card. about: its docstring. measure, null:
    functions of a seed that return the card's number. ways: {name: function of a seed}, the same
    number measured in other ways, each judged by the same threshold. more(seed) -> {words: a
    number}: further numbers, for information.
    """
    began = time.monotonic()
    title = about.split("\n")[0]
    flags = flag_parser(StudyConfig, title).parse_args(argv)
    cfg = config_from_dict(StudyConfig, vars(flags))
    functions = {"measured": measure, **(ways or {}), "null": null}
    home = Path(file).resolve().parent  # of the study and its card
    if cfg.pilot:
        print_pilot(home, cfg, functions, more)
        return

    card = read_card(home)
    seeds = cfg.seeds or card.seeds
    check_seeds_are_new(card, home, seeds)
    folder = experiment_folder(f"research_{card.name}", cfg.out_dir)
    with torch_threads(cfg.threads):
        numbers, further = measure_all(seeds, functions, more)
    for name, values in numbers.items():
        for seed, value in zip(seeds, values, strict=True):
            check_possible(value, name, seed, card)
    found = {"measured": numbers.pop("measured"), "null": numbers.pop("null"), "ways": numbers,
             "more": further}

    result = {"about": title, "settings": asdict(cfg) | {"seeds": seeds},
              "torch": torch.__version__, "thresholds": card.texts["Threshold from"],
              "found": describe_study(card, found), "claims": study_claims(card, found), **found}
    conclude(result, folder, {"study": study_figure(card, found)},
             seconds=time.monotonic() - began)


def measure_all(seeds, functions, more=None):
    """({name: [seed]}, [what `more` returns]): every function of every seed, with its progress."""
    numbers = {name: [] for name in functions}
    further = []
    progress = Progress(len(functions) * len(seeds), " measurements")
    for seed in seeds:
        for name, function in functions.items():
            numbers[name].append(float(function(seed)))
            progress.show(sum(map(len, numbers.values())), f"{name}, seed {seed}")
        if more is not None:
            further.append(more(seed))
    progress.close()
    return numbers, further


def print_pilot(folder, cfg, functions, more):
    """Print the numbers of some seeds, from which a threshold may be chosen, and note these seeds
    in PILOT. Raises UserError for seeds that a finished card judges."""
    seeds = cfg.seeds or PILOT_SEEDS
    try:
        judged = set(read_card(folder).seeds) & set(seeds)
    except UserError:
        judged = ()  # the card is not finished, which is what a pilot is for
    if judged:
        raise UserError(f"seeds {', '.join(map(str, sorted(judged)))} are judged by this "
                        "card, so nothing may be chosen on them; take others")
    with torch_threads(cfg.threads):
        numbers, further = measure_all(seeds, functions, more)
    seen = sorted({*piloted_seeds(folder), *seeds})
    with atomic_write(folder / PILOT, "w") as file:
        file.write(f"pilots looked at seeds {' '.join(map(str, seen))}\n")
    print("seed", *seeds)
    for name, values in numbers.items():
        print(name, *(f"{value:.4g}" for value in values))
    for words in further[0] if further else ():
        print(words, *(f"{each[words]:.4g}" for each in further))


def check_possible(number, name, seed, card):
    """Raises UserError if a number is not finite, or not possible by the card."""
    low, high = card.possible
    if not (math.isfinite(number) and low <= number <= high):
        raise UserError(f"{name}, seed {seed}: {number:g} is not among the card's possible values, "
                        f"numbers from {low:g} to {high:g}; correct the card or the study")


def kept_models(experiment):
    """The folder in which an experiment keeps its trained models, so that a study reads them
    instead of training them again. experiment: such as "induction_head_detection"."""
    return ROOT / "outputs" / experiment
