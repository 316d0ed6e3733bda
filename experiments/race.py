"""Race `train.py` against nanoGPT's CPU recipe: which loss in which time, on the same cores?

    python experiments/race.py             # one or two hours, one thread
    python experiments/race.py --quick     # seconds: that it runs, not who wins

Claim: the recipe of `train.py` reaches a lower loss on Tiny Shakespeare's whole validation split
than nanoGPT's recipe, in the same time (1x) and in 0.35, 2 and 5 times as long.
Expected: the runs of 0.35 and 2 times the time meet their thresholds. The default ends so close to
its own (1.58, and nanoGPT's time) that the CPU decides whether it meets them. The run of 5 times
the time misses 1.47 (docs/speed.md). A missed threshold says FAIL, and the exit code is then 1.

Each contestant is a model with its own size and number of steps, which were chosen on the last
tenth of the training split, except for the steps of the default (experiments/speed/contestants.py).
All contestants take turns, a hundredth of their steps at a time, so that a drift of the machine's
speed affects them equally. Only the steps are timed. The recipe is nanoGPT's, but the code is ours:
it keeps the biases of MLPs and LayerNorms, which nanoGPT leaves out.

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Prerequisites: train.py
Next: experiments/speed/contestants.py
Source: Karpathy's nanoGPT (its README's recipe for a CPU)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
from dataclasses import dataclass

from config import DataConfig, check_field, option
from data import load_dataset
from experiments.common import check_seeds, perform
from experiments.speed.contestants import N_TURNS, race_contestants, run_race, shrink
from experiments.speed.report import race_claims, race_figure, summarize_race
from utils import Progress, run_program


@dataclass(frozen=True)
class RaceConfig:
    """Settings of the race."""

    seeds: tuple[int, ...] = option((0, 1, 2), "one race for each seed")
    threads: int = option(1, "CPU threads")
    quick: bool = option(False, "tiny shapes on the built-in corpus, no verdicts")
    folder: str = option("data", "where Tiny Shakespeare is kept")
    out_dir: str = option("outputs", "the folder that race/ is written to")

    def __post_init__(self):
        check_seeds(self)
        check_field(self, "threads", lambda n: n >= 1, "1 or more")


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "races": the curves of each seed, "field": {name:
    Contestant as a dict}}. cfg: a RaceConfig."""
    data = DataConfig(folder=cfg.folder, dataset="builtin" if cfg.quick else "tiny_shakespeare")
    dataset = load_dataset(data, n_ctx=512)
    seeds = cfg.seeds
    if cfg.quick:
        dataset = dataclasses.replace(dataset, val=dataset.val[:2000])
        seeds = cfg.seeds[:1]

    races = []
    for seed in seeds:
        contestants = race_contestants(dataset.tokenizer.d_vocab, seed)
        if cfg.quick:
            contestants = {name: shrink(each) for name, each in contestants.items()}
        progress = Progress(N_TURNS, f" turns of seed {seed}")
        races.append(run_race(dataset, contestants, progress))

    claims = race_claims(contestants, races, judged=not cfg.quick)
    return {"found": summarize_race(claims, races, quick=cfg.quick), "claims": claims,
            "races": races,
            "field": {name: dataclasses.asdict(each) for name, each in contestants.items()}}


def figures(result):
    """{name: Figure} from what `run` returns."""
    return {"race": race_figure(result["field"], result["races"])}


def main(argv=None):
    """Run the program: race, print the table, write outputs/race; a failed claim exits with 1."""
    perform(RaceConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
