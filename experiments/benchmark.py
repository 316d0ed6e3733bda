"""Benchmark the library against what the machine can do, and against other libraries.

    python experiments/benchmark.py             # ten minutes, one thread
    python experiments/benchmark.py --quick     # seconds: that it runs, not how fast

Claim: hook points cost nothing while they are not used, and little while they are; a run takes as
long as its matrix products.
Expected: every threshold is met and the exit code is 0; a missed one exits with 1.

All contestants of a group take turns in one process, round after round, so that a drift of the
machine's speed affects them equally. A ratio is taken within each round; the table shows its median
over the rounds, with the lowest and the highest. Seconds mean little on a shared machine.

Chapter: COURSE_ROADMAP.md, 7 (instrument); what is timed of patching: chapter 9
Prerequisites: model.py, train.py, hooks.py
Next: experiments/speed/model.py
Source: compared with Hugging Face's transformers and TransformerLens if they are installed
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
    """Settings of the benchmark."""

    threads: int = option(1, "CPU threads")
    rounds: int = option(9, "rounds of each group, 5 or more for a result")
    quick: bool = option(False, "tiny shapes, one round, no verdicts")
    out_dir: str = option("outputs", "the folder that benchmark/ is written to")

    def __post_init__(self):
        for name in ("threads", "rounds"):
            check_field(self, name, lambda n: n >= 1, "1 or more")


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim]}. cfg: a BenchmarkConfig."""
    if cfg.quick:
        cfg = dataclasses.replace(cfg, rounds=1)
    groups = (training_claims, dictionary_claims, forward_claims, decoding_claims, reading_claims,
              patching_claims, start_claims, experiment_claims)
    claims = [line for group in groups for line in group(cfg)]
    return {"found": summarize_benchmark(claims), "claims": claims}


def figures(result):
    """{name: Figure} from what `run` returns; empty if no claim was judged."""
    figure = benchmark_figure(result["claims"])
    return {} if figure is None else {"benchmark": figure}


def main(argv=None):
    """Run the program: measure, print the table, write outputs/benchmark; a failed claim exits
    with 1."""
    perform(BenchmarkConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
