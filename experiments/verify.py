"""Verify every claim: run all experiments with seeds that no threshold was chosen on.

    python experiments/verify.py                        # three seeds of the date: 40 minutes
    python experiments/verify.py --seeds 104 105 106    # these instead
    python experiments/verify.py --quick                # minutes: all run; exact claims judged

Claim: none of its own; every claim of every experiment is judged anew.
Expected: a page without a FAIL. A line that fails stays on the page, and the page begins with it.

Each experiment runs as a program of its own, in the order of the course. An interrupted run goes on
where it stopped: what was measured with the same seeds and the same code is not measured again. A
model that another code trained is never read. Thresholds were chosen on small seeds, so seeds below
100 are refused. The page is docs/verify.md; that of a quick run, or of fewer experiments, is in the
folder of results.
Claims about published models are judged only if their weights are there; they are skipped
otherwise, and a skipped line is not a passed one. The benchmark and the race are left out: their
numbers depend on the machine.

Chapter: COURSE_ROADMAP.md, 16 (independent research)
Prerequisites: experiments/verification/measure.py
Next: nothing
Source: none
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datetime
from dataclasses import dataclass

from config import check_field, config_from_dict, flag_parser, option
from experiments.common import ROOT, check_seeds, experiment_folder
from experiments.verification.measure import (
    EXPERIMENTS,
    FIRST_SEED,
    all_commands,
    name_of_text,
    run_command,
    seeds_of_date,
    what_it_ran_on,
)
from experiments.verification.report import count_outcomes, verification_page
from utils import Progress, UserError, atomic_write, locked, run_program


@dataclass(frozen=True)
class VerifyConfig:
    """What is verified, with which seeds, and where the page is written."""

    seeds: tuple[int, ...] = option((), "three or more, instead of seeds drawn from the date")
    date: str | None = option(None, "the date to draw the seeds from, as 2026-01-31 (none: today)")
    only: tuple[str, ...] = option((), "names of experiments, to verify only these")
    quick: bool = option(False, "quick runs: everything runs, and only exact claims are judged")
    threads: int = option(1, "CPU threads of each experiment")
    out_dir: str = option("outputs", "the folder that verify/ is written to")

    def __post_init__(self):
        check_field(self, "threads", lambda n: n >= 1, "1 or more")
        if self.seeds:
            check_seeds(self)
            check_field(self, "seeds", lambda seeds: self.quick or len(seeds) >= 3,
                        "three or more, since a claim is about all seeds")
            check_field(self, "seeds", lambda seeds: self.quick or min(seeds) >= FIRST_SEED,
                        f"{FIRST_SEED} or more each: thresholds were chosen on smaller ones")
        for name in self.only:
            if name not in EXPERIMENTS:
                raise UserError(f"only={name!r} is not an experiment; choose from: "
                                f"{', '.join(EXPERIMENTS)}")
        self.day()

    def day(self):
        """The date that the seeds are drawn from. Raises UserError if it is none."""
        if self.date is None:
            return datetime.date.today()
        try:
            return datetime.date.fromisoformat(self.date)
        except ValueError:
            raise UserError(f"date={self.date!r} is not a date; write it as 2026-01-31") from None

    def folder_name(self):
        """The name of the folder of results."""
        return "verify_quick" if self.quick else "verify"


def run_all(commands, folder, ran_on):
    """[Outcome] of all Commands, one after another, with a progress line."""
    progress = Progress(len(commands), " experiments")
    outcomes = []
    for command in commands:
        progress.show(len(outcomes), command.name)
        outcomes.append(run_command(command, folder, ran_on))
    progress.show(len(outcomes), "the page")
    progress.close()
    return outcomes


def main(argv=None):
    """Run the program: every experiment, then the page; a failed claim exits with 1."""
    title = __doc__.split("\n")[0]
    cfg = config_from_dict(VerifyConfig, vars(flag_parser(VerifyConfig, title).parse_args(argv)))
    folder = experiment_folder(cfg.folder_name(), cfg.out_dir)
    seeds = cfg.seeds or seeds_of_date(cfg.day())
    commands = all_commands(seeds, only=cfg.only, quick=cfg.quick, threads=cfg.threads)

    drawn = "given" if cfg.seeds else f"drawn from the date {cfg.day()}"
    with locked(folder / "lock", f"another run writes to {folder}; wait for it, or choose another "
                "--out_dir"):
        ran_on = what_it_ran_on()
        if not cfg.quick:
            ran_on["text"] = name_of_text()
        outcomes = run_all(commands, folder, ran_on)

    ran_on = {"seeds": f"{', '.join(map(str, seeds))} ({drawn})", "threads": str(cfg.threads),
              **ran_on, "code": ran_on["code"][:12]}
    is_whole = not (cfg.quick or cfg.only)
    path = ROOT / "docs" / "verify.md" if is_whole else folder / "verify.md"
    with atomic_write(path, "w") as file:
        file.write(verification_page(outcomes, ran_on))
    print(f"{count_outcomes(outcomes)}\nopen {path}")
    raise SystemExit(int(any(outcome.failed for outcome in outcomes)))


if __name__ == "__main__":
    run_program(main)
