"""Run the experiments as programs of their own, and keep what each one claimed.

Chapter: COURSE_ROADMAP.md, 16 (independent research)
Prerequisites: pretrained.py
Next: experiments/verification/report.py
Source: none
"""

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import DataConfig
from data import load_text
from experiments.common import ROOT, Claim, code_digest, exit_code
from pretrained import CACHE
from utils import UserError, printable, read_json, seeded_generator, write_json

EXPERIMENTS = (  # in the order of the course; make experiments runs the same
    "wired_circuits", "circuit_scoreboard", "attention_visualization", "induction_head_detection",
    "head_importance", "copy_suppression", "indirect_object_identification",
    "feature_superposition_toy_model", "sparse_autoencoder", "grokking_experiment",
    "training_dynamics")
OF_PUBLISHED = ("induction_head_detection", "copy_suppression", "indirect_object_identification")
PUBLISHED = "gpt2"
PRETRAINED_FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")
N_SEEDS = 3
FIRST_SEED = 100  # thresholds were chosen on smaller ones


@dataclass(frozen=True)
class Command:
    """An experiment to run, with its flags. weights: the published model that it needs, if any."""

    name: str
    flags: tuple[str, ...]
    weights: str | None = None

    @property
    def text(self):
        """The command as one types it."""
        return " ".join(["python", f"experiments/{self.name}.py", *self.flags])

    @property
    def label(self):
        """The name of what is run, also of its files: `copy_suppression_gpt2` for GPT-2."""
        return self.name if self.weights is None else f"{self.name}_{self.weights}"


@dataclass(frozen=True)
class Outcome:
    """What a Command gave.

    claims: [Claim]. thresholds: where the experiment's thresholds come from. seconds: how long it
    took. skipped: why it was not run. error: the last line of a program that broke off.
    """

    command: Command
    claims: tuple[Claim, ...] = ()
    thresholds: str = ""
    seconds: float = 0.0
    skipped: str = ""
    error: str = ""

    @property
    def failed(self):
        """Whether a claim failed, or the program did."""
        return bool(self.error) or any(line.holds is False for line in self.claims)


def seeds_of_date(day, n=N_SEEDS):
    """n different seeds drawn from a date, so that nobody chose them: a tuple of ints, each at
    least FIRST_SEED."""
    generator = seeded_generator(day.toordinal())
    order = torch.randperm(900, generator=generator)[:n]
    return tuple(sorted((FIRST_SEED + order).tolist()))


def all_commands(seeds, *, only=(), quick=False, threads=1):
    """[Command] for all experiments, or for those named in `only`, and for the published model."""
    flags = ("--seeds", *map(str, seeds), "--threads", str(threads))
    if quick:
        flags += ("--quick",)
    chosen = [name for name in EXPERIMENTS if not only or name in only]
    commands = [Command(name, flags) for name in chosen]
    if not quick:
        commands += [Command(name, ("--model", PUBLISHED, "--threads", str(threads)), PUBLISHED)
                     for name in chosen if name in OF_PUBLISHED]
    return commands


def weights_are_there(name):
    """Whether a published model was downloaded before."""
    folder = Path(os.path.expanduser(CACHE)) / name
    return all((folder / file).exists() for file in PRETRAINED_FILES)


def run_command(command, folder, ran_on):
    """The Outcome of a Command: run now, or read if it ran before with the same flags, on the same
    machine and code.

    Its outcome is in `folder`, and what it printed is in a .log beside it. Its models and figures
    are in a folder there that is named by the code, so that no model of another code is read.
    ran_on: what `what_it_ran_on` returned before the first Command. Raises UserError if the code
    was changed since then.
    """
    if command.weights is not None and not weights_are_there(command.weights):
        return Outcome(command, skipped=f"the weights of {command.weights} are not here; "
                       f"{command.text} downloads them")

    path = folder / f"{command.label}.json"
    made_with = {"command": command.text} | ran_on
    kept = read_kept(path, made_with)
    if kept is None:
        kept = made_with | run_program_of(command, folder, ran_on["code"])
        if code_digest() != ran_on["code"]:
            raise UserError(f"the code was changed while {command.name} ran, so that nobody knows "
                            "what was verified; start again")
        write_json(path, kept)
    return Outcome(command, tuple(claims_in(kept)), kept["thresholds"], kept["seconds"],
                   error=kept["error"])


def claims_in(result):
    """The claims of plain values that `as_dicts` made, [Claim]."""
    return [Claim(**{key: value for key, value in line.items() if key != "verdict"})
            for line in result["claims"]]


def read_kept(path, made_with):
    """What an earlier run kept, if it was made with the same; None otherwise."""
    try:
        kept = read_json(path)
    except UserError:
        return None
    same = all(kept.get(name) == value for name, value in made_with.items())
    return kept if same and not kept["error"] else None


def run_program_of(command, folder, code):
    """Run the program of a Command: {"claims", "thresholds", "seconds", "error"}, plain values."""
    out_dir = folder.resolve() / code[:12]  # the program runs in the root, wherever we are
    log_path = folder / f"{command.label}.log"
    words = [sys.executable, str(ROOT / "experiments" / f"{command.name}.py"), *command.flags,
             "--out_dir", str(out_dir)]
    began = time.time()
    with open(log_path, "w") as log:
        ended = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, check=False)
    found = {"claims": [], "thresholds": "", "seconds": time.time() - began, "error": ""}

    # A program that judged its claims has just written its results, and ends with their exit code.
    results = sorted(out_dir.glob(f"{command.name}*/results.json"), key=lambda f: f.stat().st_mtime)
    if results and results[-1].stat().st_mtime >= began:
        result = read_json(results[-1])
        if ended.returncode == exit_code(claims_in(result)):
            return found | {"claims": result["claims"], "thresholds": result["thresholds"]}
    printed = log_path.read_text(encoding="utf-8", errors="replace").strip() or "it printed nothing"
    last = printable(printed.splitlines()[-1], length=200)
    return found | {"error": f"exit code {ended.returncode}: {last}"}


def what_it_ran_on():
    """{word: text} of everything besides its flags that a result depends on."""
    return {"Python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "CPU": cpu_name(), "code": code_digest()}


def name_of_text():
    """The text that the experiments will find: Tiny Shakespeare, downloaded now if it must be, or,
    without a network, the built-in corpus."""
    return load_text(DataConfig(folder=str(ROOT / "data")))[1]


def cpu_name():
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
