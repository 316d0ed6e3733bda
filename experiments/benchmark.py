"""Benchmark the project against what the machine can't avoid, and against other libraries.

    python experiments/benchmark.py                       # ten minutes, one thread
    python experiments/benchmark.py --only sweeps paths   # these groups of rows
    python experiments/benchmark.py --write_page          # also the tables in docs/speed.md
    python experiments/benchmark.py --device cuda --precision bfloat16 --compile
    python experiments/benchmark.py --quick               # seconds: that it runs, not how fast

Claim: each computation takes little more time than its floor.
Expected: on a quiet machine two thirds of the targets are met, on a busy one half; docs/speed.md
explains those that are not. A missed one says FAIL, and the exit code is then 1.

A floor is the time that no program can avoid: the multiplications, counted by hand, at the rate of
one large matrix product (1,024 x 1,024 each), or the weights that must be read at the rate at which
a large tensor is summed, whichever takes longer. Small or narrow products do not reach that rate,
so not every floor can be reached. Both rates are measured in turn with the row, round after round.
A ratio is taken within each round, and its median is judged. On one thread, times are processor
times: they do not count the time in which another program has the core, but neighbours on other
cores still slow the memory. Hugging Face's transformers and TransformerLens are timed as well if
they are installed.

On a GPU the same rows run, without those that no GPU computes. Compiled are training and the
forward pass. Targets are for one thread of a CPU in float32 and are not judged elsewhere.

Chapter: COURSE_ROADMAP.md, 7 (instrument); what is timed of patching: chapter 9
Prerequisites: model.py, train.py, hooks.py
Next: experiments/speed/model.py
Source: compared with Hugging Face's transformers and TransformerLens if they are installed
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import contextlib
import datetime
from dataclasses import dataclass
from typing import Literal

import torch

import plotting
from config import check_choices, check_field, option
from experiments.common import ROOT, perform
from experiments.speed.measure import measure_rows, measure_scaling, row_claims, scaling_claims
from experiments.speed.model import Setting
from experiments.speed.report import (
    benchmark_figure,
    benchmark_tables,
    headlines,
    replace_between_marks,
    scaling_figure,
    summarize_benchmark,
)
from experiments.speed.rows import GROUPS
from experiments.verification.measure import cpu_name
from utils import atomic_write, check_choice, read_text, run_program

SCALING = "scaling"


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of the benchmark."""

    threads: int = option(1, "CPU threads")
    rounds: int = option(9, "the most rounds of each row; slow rows have fewer")
    only: tuple[str, ...] = option((), f"groups of rows: {', '.join([*GROUPS, SCALING])}")
    device: str = option("cpu", "auto, cpu, cuda or mps")
    precision: Literal["float32", "tf32", "bfloat16"] = option("float32", "of matrix products")
    compile: bool = option(False, "compile the model for training and the forward pass")
    write_page: bool = option(False, "write the tables into docs/speed.md, and its two figures")
    quick: bool = option(False, "tiny shapes, one round, no verdicts")
    out_dir: str = option("outputs", "the folder that benchmark/ is written to")

    def __post_init__(self):
        check_choices(self)
        for name in ("threads", "rounds"):
            check_field(self, name, lambda n: n >= 1, "1 or more")
        for name in self.only:
            check_choice("only", name, (*GROUPS, SCALING))
        check_field(self, "write_page", lambda write: not (write and self.folder_suffix),
                    "left out for a part of the rows, another device or precision")

    @property
    def folder_suffix(self):
        """The suffix of the folder's name for another setting than that of the targets."""
        parts = [self.device, self.precision, "compiled" if self.compile else "", *self.only]
        return "".join(f"_{part}" for part in parts if part not in ("cpu", "float32", ""))

    @property
    def is_judged(self):
        """Whether the targets apply."""
        return self.device == "cpu" and self.precision == "float32" and not self.compile \
            and self.threads == 1 and not self.quick


@contextlib.contextmanager
def product_precision(precision):
    """A context in which matrix products in float32 are exact, or take TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "headlines": the ten that are printed, "rows": what
    `measure_row` returned, "scaling": what `measure_scaling` returned, "ran_on": {word: text}}.
    cfg: a BenchmarkConfig."""
    setting = Setting(cfg)
    rounds = 1 if cfg.quick else cfg.rounds
    groups = [name for name in cfg.only if name != SCALING]
    rows = []
    scaling = {}
    with product_precision(cfg.precision):
        if groups or not cfg.only:
            rows = measure_rows(setting, rounds, groups)
        if SCALING in cfg.only or not cfg.only:
            scaling = measure_scaling(setting, min(rounds, 5))

    claims = {row["name"]: row_claims(row, judged=cfg.is_judged) for row in rows}
    all_claims = [line for lines in claims.values() for line in lines] + scaling_claims(scaling)
    ran_on = {"date": str(datetime.date.today()), "CPU": cpu_name(), "threads": str(cfg.threads),
              "torch": torch.__version__}
    if setting.device.type == "cuda":
        ran_on["GPU"] = torch.cuda.get_device_name(setting.device)
    result = {"found": summarize_benchmark(rows, all_claims), "claims": all_claims,
              "headlines": headlines(rows, claims) or all_claims, "rows": rows,
              "scaling": scaling, "ran_on": ran_on}
    if cfg.write_page:
        write_page(result, benchmark_tables(rows, claims, scaling, ran_on))
    return result


def write_page(result, lines):
    """Write the tables (lines) into docs/speed.md, and the figures that it shows."""
    path = ROOT / "docs" / "speed.md"
    page = replace_between_marks(read_text(path), lines)
    with atomic_write(path, "w") as file:
        file.write(page)
    for name, figure in figures(result).items():
        plotting.save(figure, ROOT / "figures" / f"{name}.png")


def figures(result):
    """{name: Figure} from what `run` returns; none of what was not measured."""
    drawn = {"benchmark": benchmark_figure(result["rows"])}
    if result["scaling"]:
        drawn["scaling"] = scaling_figure(result["scaling"])
    return {name: figure for name, figure in drawn.items() if figure is not None}


def main(argv=None):
    """Run the program: measure, print ten lines, write outputs/benchmark; a missed target exits
    with 1."""
    perform(BenchmarkConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
