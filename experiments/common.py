"""What all experiments share: claims that are tested, their table, and the exit code.

Chapter: COURSE_ROADMAP.md, 0 (what counts as evidence)
Read before: any experiment; after: experiments/benchmark.py
Source: the form of a claim is that of chapter 0
"""

import statistics
import time
from dataclasses import asdict, dataclass

import torch

import plotting
from utils import write_json

HEADINGS = ("claim", "reported", "measured", "interval", "null, control or mark", "")


@dataclass(frozen=True)
class Claim:
    """One line of an experiment's table.

    measured: the number, which `low` and `high` enclose. holds: whether it is what was claimed;
    None where it is only for information. reported: by whom and how much, elsewhere.
    control: what the same measurement gives where the claim says nothing, or the mark that it is
    held against; mark: that number, where there is one.
    """

    claim: str
    measured: float
    low: float
    high: float
    holds: bool | None = None
    reported: str = ""
    control: str = ""
    mark: float | None = None

    @property
    def verdict(self):
        """PASS, FAIL, or nothing where nothing was claimed."""
        return {True: "PASS", False: "FAIL", None: ""}[self.holds]

    def cells(self):
        """The line's texts, in the order of HEADINGS."""
        interval = f"{self.low:.3g} to {self.high:.3g}"
        return (self.claim, self.reported, f"{self.measured:.3g}", interval, self.control,
                self.verdict)


def claims_table(claims):
    """The claims as a Markdown table, aligned to be read as it is; a column that would be empty is
    left out."""
    columns = zip(HEADINGS, *(claim.cells() for claim in claims), strict=True)
    rows = list(zip(*(column for column in columns if any(column[1:])), strict=True))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
             + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def as_dicts(claims):
    """The claims as plain values, for results.json."""
    return [asdict(claim) | {"verdict": claim.verdict} for claim in claims]


def exit_code(claims):
    """0 where no claim fails, else 1."""
    return int(any(claim.holds is False for claim in claims))


def conclude(result, folder, figure=None):
    """Writes results.json, and the figure as a PNG of the folder's name, prints the table, and ends
    the program: a failed claim exits with 1. result: {"claims": list of Claim, plain values}."""
    write_json(folder / "results.json", result | {"claims": as_dicts(result["claims"])})
    if figure is not None:
        plotting.save(figure, folder / f"{folder.name}.png")
    print(claims_table(result["claims"]))
    print(f"\nwritten to {folder}")
    raise SystemExit(exit_code(result["claims"]))


def take_turns(contestants, rounds, progress):
    """{name: seconds of each round}: all run once unmeasured, then in turn, round after round.

    contestants: {name: function without arguments}.
    """
    seconds = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
        progress.show(number, " against ".join(contestants))
    return {name: torch.tensor(each) for name, each in seconds.items()}


def claim_of(text, values, at_most=None, at_least=None, **more):
    """A Claim on the median of `values`, one for each round, with a mark from above or below."""
    values = values.tolist()
    median = statistics.median(values)
    verdict = {}
    if at_most is not None:
        verdict = {"holds": median <= at_most, "control": f"at most {at_most:g}", "mark": at_most}
    if at_least is not None:
        verdict = {"holds": median >= at_least, "control": f"at least {at_least:g}",
                   "mark": at_least}
    return Claim(text, median, min(values), max(values), **verdict | more)
