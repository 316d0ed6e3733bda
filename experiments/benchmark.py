"""How fast it is: against what the machine can do, and against other libraries.

    python experiments/benchmark.py             # ten minutes, one thread
    python experiments/benchmark.py --quick     # seconds: that it runs, not how fast

Claim: that every activation can be read and edited costs nothing while nobody does it, little while
somebody does, and a run takes the time of its products.
Expected: every mark is met and the exit code is 0; a missed mark exits with 1.

All contestants of a group take turns in one process, round after round, so a drift of the machine
hits them alike. A ratio is taken within each round; its median over the rounds is given with the
lowest and the highest. Seconds mean little on a shared machine.

Chapter: COURSE_ROADMAP.md, 7 (instrument); what is timed of patching: chapter 9
Prerequisites: model.py, train.py, hooks.py
Next: experiments/speed/model.py
Source: compared with Hugging Face's transformers and TransformerLens where they are installed
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
from dataclasses import dataclass

from config import check_field, option
from experiments.common import perform
from experiments.speed.measure import (
    decoding_claims,
    dictionary_claims,
    experiment_claims,
    forward_claims,
    patching_claims,
    reading_claims,
    start_claims,
    training_claims,
)
from experiments.speed.report import benchmark_figure, summarize_benchmark
from utils import run_program


@dataclass(frozen=True)
class BenchmarkConfig:
    """What the benchmark measures, and with what patience."""

    threads: int = option(1, "CPU threads")
    rounds: int = option(9, "rounds of each group, 5 or more for a result")
    quick: bool = option(False, "tiny shapes, one round, no marks")
    out_dir: str = option("outputs", "the folder that benchmark/ is written to")

    def __post_init__(self):
        for name in ("threads", "rounds"):
            check_field(self, name, lambda n: n >= 1, "1 or more")


def run(cfg, folder):
    """{"found": text, "claims": list of Claim}. cfg: a BenchmarkConfig."""
    if cfg.quick:
        cfg = dataclasses.replace(cfg, rounds=1)
    groups = (training_claims, dictionary_claims, forward_claims, decoding_claims, reading_claims,
              patching_claims, start_claims, experiment_claims)
    claims = [line for group in groups for line in group(cfg)]
    return {"found": summarize_benchmark(claims), "claims": claims}


def figures(result):
    """{name: Figure} of what `run` returns; none where no mark was judged."""
    figure = benchmark_figure(result["claims"])
    return {} if figure is None else {"benchmark": figure}


def main(argv=None):
    """The program: measures, prints the table, writes outputs/benchmark; a missed mark exits 1."""
    perform(BenchmarkConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
