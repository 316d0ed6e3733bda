"""Write a claim down before measuring it, check that it can be wrong, run it, and keep the result.

    python experiments/claim_card.py new sharp_heads     # writes research/sharp_heads/
    python experiments/claim_card.py check sharp_heads   # refuses, or runs and fills in the result
    python experiments/claim_card.py list                # all cards, and what came out

A card has a hypothesis, an intervention, a number, a null, a threshold and a prediction. Beside it
lies study.py, a program that measures. Before the threshold is written down, numbers of other seeds
may be looked at:

    python research/sharp_heads/study.py --pilot

`check` refuses a card with an empty part (such as the null) and a claim that every possible value
would fulfil. It judges only seeds on which the threshold was not chosen, and at which no pilot has
looked: a pilot notes its seeds beside the card. The verdict is HOLDS; REFUTED; DEPENDS, if the
number is measured in several ways that disagree; or UNDECIDED, if the null passes too. Each is a
result, and exits with 0; a refused card exits with 2. If a card or its study changes, the new
result says what the old verdict was.

Chapter: COURSE_ROADMAP.md, 16 (independent research)
Prerequisites: experiments/cards/model.py, experiments/cards/report.py
Next: experiments/verification/measure.py
Source: none
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import re
import subprocess

from experiments.cards.model import (
    EXAMPLE,
    claim_digest,
    read_card,
    result_in,
    results_path,
    template,
)
from experiments.cards.report import describe_card, filled_card, verdict_in
from experiments.common import ROOT
from utils import UserError, atomic_write, read_text, run_program

SKELETON = '''"""{name}: say in one line what is measured.

    python experiments/claim_card.py check {name}

The claim, its null and its threshold are on the card: card.md in this folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from experiments.cards.measure import kept_models, perform_study
from experiments.induction.model import MEASURED_ON, Repeats, head_scores, trained_induction_model
from model import GPT
from utils import run_program, seeded_generator

{example}


def number_of(model):
    """The card's number, of one model."""
    tokens, _ = Repeats(model.cfg.n_ctx).draw(64, seeded_generator(MEASURED_ON))
    with torch.no_grad():
        return head_scores(model, tokens)["previous-token"].mean(1).max()


def trained_model(seed):
    """The model of a seed: read if it was kept, trained if not."""
    model, _ = trained_induction_model(kept_models("induction_head_detection"), seed)
    return model


def measure(seed):
    """The card's number, of a trained model."""
    return number_of(trained_model(seed))


def null(seed):
    """The same number where the hypothesis predicts nothing: here, in an untrained model."""
    return number_of(GPT(trained_model(seed).cfg, seed))


def main(argv=None):
    """Run the program: measure every seed, print the table, write the results."""
    perform_study(__file__, __doc__, measure, null, argv=argv)


if __name__ == "__main__":
    run_program(main)
'''


def new(name, research):
    """Write a card and a skeleton of its study. Raises UserError for a name that is taken, or that
    is no name of a folder."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"name={name!r} is not possible; use small letters, digits and _, such as "
                        "sharp_heads")
    folder = research / name
    if folder.exists():
        raise UserError(f"{folder} is there already; choose another name")
    study = SKELETON.format(name=name, example=EXAMPLE)
    for file, text in (("card.md", template(name)), ("study.py", study)):
        with atomic_write(folder / file, "w") as opened:
            opened.write(text)
    print(f"fill in {folder / 'study.py'} and {folder / 'card.md'}, and then run\n"
          f"python experiments/claim_card.py check {name}")


def check(name, research):
    """Check a card, run its study, and fill in the result. Raises UserError for a card that is
    refused, and for a study that breaks off."""
    folder = research / name
    if not (folder / "card.md").exists():
        raise UserError(f"{folder} has no card.md; make one: "
                        f"python experiments/claim_card.py new {name}")
    read_card(folder)  # refuses it, if it must

    # An old result must not stand in for that of a study that breaks off.
    results = results_path(folder)
    results.unlink(missing_ok=True)
    study = folder / "study.py"
    ended = subprocess.run([sys.executable, str(study), "--out_dir", str(folder / "outputs")],
                           check=False)
    if not results.exists():
        raise UserError(f"{study} broke off with exit code {ended.returncode}; its last lines are "
                        "above")

    path = folder / "card.md"
    text = filled_card(folder)
    with atomic_write(path, "w") as opened:
        opened.write(text)
    print(f"\n{verdict_in(result_in(text))}: the result is in {path}")


def show_list(research):
    """Print each card's name and the first line of its result, or why the card is refused."""
    for path in sorted(research.glob("*/card.md")):
        try:
            line = describe_card(read_text(path), claim_digest(path.parent))
        except UserError as error:
            line = f"not finished: {error}"
        print(f"{path.parent.name}: {line}")


def main(argv=None):
    """Run the program: new, check or list."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--research", default=ROOT / "research", type=Path,
                        help="the folder of all cards (default: research)")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, what in (("new", "write a card and a skeleton"),
                          ("check", "check a card, run its study, fill in the result")):
        commands.add_parser(command, help=what).add_argument("name", help="such as sharp_heads")
    commands.add_parser("list", help="all cards, and what came out")

    args = parser.parse_args(argv)
    if args.command == "list":
        show_list(args.research)
    else:
        {"new": new, "check": check}[args.command](args.name, args.research)


if __name__ == "__main__":
    run_program(main)
