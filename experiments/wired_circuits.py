"""Test every tool of the library on transformers wired by hand, whose circuits are known.

    python experiments/wired_circuits.py             # half a minute, one thread
    python experiments/wired_circuits.py --quick     # seconds: one wiring, few texts

Claim: on ten circuits that are known by construction, each tool ranks the heads (or edges) that
matter above all others (AUROC 1), with the signs and sizes that follow from the wiring. Each tool
also fails where it must, and by as much as it must: in an OR, in an AND, behind a saturated
softmax, on a bit that is not used, and for a dead head with a sharp pattern.
Expected: every line passes and the exit code is 0, for all wirings, in two bases of the stream.

Every model is a GPT of the library. Its LayerNorms, MLPs and biases hold random values wherever the
circuit does not need them. It runs in float64, so that numbers that must be 0 can be seen to be 0.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: patching.py, head_ablation.py, experiments/wired/model.py
Next: experiments/head_importance.py
Source: Elhage et al. 2021; Olsson et al. 2022 (induction); McDougall et al. 2023 (copy suppression)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
from dataclasses import dataclass

from config import check_field, option
from experiments.common import check_seeds, perform
from experiments.wired.measure import TOOLS, Case, Row, judge_tool, measure_facts
from experiments.wired.model import all_circuits
from experiments.wired.report import all_claims, summarise, verdict_figure
from utils import Progress, run_program, seeded_generator


@dataclass(frozen=True)
class WiredConfig:
    """Settings of the experiment."""

    seeds: tuple[int, ...] = option((0, 1, 2), "one wiring of each circuit for each seed")
    prompts: int = option(8, "pairs of a clean and a corrupted text for each wiring")
    threads: int = option(1, "CPU threads")
    quick: bool = option(False, "a small run: one wiring, in one basis, two pairs")
    out_dir: str = option("outputs", "the folder that wired_circuits/ is written to")

    def __post_init__(self):
        check_seeds(self)
        for name in ("prompts", "threads"):
            check_field(self, name, lambda n: n >= 1, "1 or more")


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "rows": a dict for each tool on each wiring}.

    cfg: a WiredConfig. Only the results are written to the folder.
    """
    n_prompts = 2 if cfg.quick else cfg.prompts
    wirings = list_wirings(cfg)
    progress = Progress(len(wirings), " wirings")

    rows = []
    facts = []
    for done, (seed, wired) in enumerate(wirings, 1):
        case = Case.run(wired, wired.draw_pairs(n_prompts, seeded_generator(seed)))
        judged = [judge_tool(tool, case) for tool in TOOLS]
        rows += [row for row in judged if row is not None]
        facts.append(measure_facts(case))
        progress.show(done, wired.name)

    claims = all_claims(rows, facts)
    return {"found": summarise(rows, claims), "claims": claims,
            "rows": [dataclasses.asdict(row) for row in rows]}


def list_wirings(cfg):
    """[(seed, WiredCircuit)] for all seeds, each circuit as wired and in another basis; with quick,
    only the first seed, as wired."""
    wirings = []
    for seed in cfg.seeds[:1] if cfg.quick else cfg.seeds:
        for wired in all_circuits(seed):
            wirings.append((seed, wired))
            if not cfg.quick:
                wirings.append((seed, wired.rotated(seed)))
    return wirings


def figures(result):
    """{name: Figure} from what `run` returned."""
    return {"wired_circuits": verdict_figure([Row(**row) for row in result["rows"]])}


def main(argv=None):
    """Run the program: judge the tools, print the table, write outputs/wired_circuits; a failed
    claim exits with 1."""
    perform(WiredConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
