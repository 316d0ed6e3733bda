"""Small models whose every weight matters, and a small text."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from config import ModelConfig
from model import GPT
from utils import UserError, seeded_generator

TINY = {"n_layers": 2, "n_heads": 3, "d_model": 12, "n_ctx": 9, "d_vocab": 11}


def scramble_(model, seed=1):
    """Gives LayerNorms, biases and all other weights values of ordinary size.

    Fresh LayerNorms and biases do nothing, and would hide the bugs that concern them.
    """
    generator = seeded_generator(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_gain = name.endswith(".w")
            weight.copy_(1 + 0.3 * noise if is_gain else 0.4 * noise)
    return model


def tiny_model(seed=1, dtype=torch.float32, **changes):
    """A scrambled GPT in evaluation mode: of shape TINY, unless `changes` say else."""
    return scramble_(GPT(ModelConfig(**TINY | changes)), seed).to(dtype).eval()


def tiny_tokens(batch=2, pos=7, seed=2, d_vocab=TINY["d_vocab"]):
    """Random token ids, [batch, pos]."""
    return torch.randint(d_vocab, (batch, pos), generator=seeded_generator(seed))


def quick_run(name, folder):
    """(what it printed, its results.json) of an experiment, run with --quick in a folder."""
    program = Path(__file__).resolve().parent.parent / "experiments" / f"{name}.py"
    run = subprocess.run([sys.executable, program, "--quick", "--out_dir", folder],
                         capture_output=True, text=True, cwd=folder, timeout=240)
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads((folder / f"{name}_quick" / "results.json").read_text())


def refusal(call, case=""):
    """What the UserError that a call raises says. Where it raises none, or something else, the
    test fails and names the case."""
    try:
        call()
    except UserError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{case}: {error!r} in place of a UserError") from error
    raise AssertionError(f"{case}: nothing is refused")
