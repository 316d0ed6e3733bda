"""Small models whose every weight matters, and a small text."""

import contextlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config import ModelConfig
from model import GPT
from utils import UserError, seeded_generator

TINY = {"n_layers": 2, "n_heads": 3, "d_model": 12, "n_ctx": 9, "d_vocab": 11}
# Sizes that differ from those that the rest implies, and an epsilon that no rounding hides
WIDE = {"d_head": 5, "norm_epsilon": 0.1, "activation": "gelu_exact"}

ROOT = Path(__file__).resolve().parent.parent


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


def one_number_model():
    """A model that is linear, with one number as its stream: the embedding of token t is t + 1, the
    one head doubles what it reads, the logit of token 0 is the stream. It reads one position."""
    model = GPT(ModelConfig(n_layers=1, n_heads=1, d_model=1, d_vocab=4, n_ctx=1, attn_only=True,
                            norm="none", positions="none", attn_bias=False)).double()
    with torch.no_grad():
        model.W_E.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
        model.blocks[0].attn.W_V.fill_(2.0)
        model.blocks[0].attn.W_O.fill_(1.0)
        model.unembedding.W_U.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    return model


def tiny_tokens(batch=2, pos=7, seed=2, d_vocab=TINY["d_vocab"]):
    """Random token ids, [batch, pos]."""
    return torch.randint(d_vocab, (batch, pos), generator=seeded_generator(seed))


def quick_run(name, folder, n_trainings=None, at="experiments"):
    """(what it printed, its results.json) of an experiment, run with --quick in a folder.

    n_trainings: how many models it must train, the last of them at the end of the planned steps.
    at: where the program lies, "course/labs" for a lab.
    """
    program = Path(__file__).resolve().parent.parent / at / f"{name}.py"
    run = subprocess.run([sys.executable, program, "--quick", "--out_dir", folder],
                         capture_output=True, text=True, cwd=folder, timeout=240)
    assert run.returncode == 0, run.stderr
    if n_trainings is not None:
        last = rf"^([\d,]+)/\1 steps  training {n_trainings} of {n_trainings}: "
        assert re.search(last, run.stderr, re.MULTILINE), run.stderr
    return run.stdout, json.loads((folder / f"{name}_quick" / "results.json").read_text())


def run_here(words, *, stdout=None, stderr=None, cwd=None, env=None, check=False):
    """Stands in for `subprocess.run` of a Python program, or of `-c` and its code: runs it in this
    process, which need not load torch again. Returns an object with its returncode.

    As in a process of its own, the project's modules are loaded anew, and only from where the
    program finds them. The folder, the environment, random numbers and torch's settings are as
    before when it ends.
    """
    python, program, *_ = words
    assert python == sys.executable and not check and stderr in (None, subprocess.STDOUT)
    code = 0
    with contextlib.ExitStack() as stack:
        patched = stack.enter_context(pytest.MonkeyPatch.context())
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(warnings.catch_warnings())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        patched.chdir(cwd or Path.cwd())
        patched.setattr(os, "environ", dict(os.environ if env is None else env))
        patched.setattr(sys, "argv", words[1:] if program != "-c" else ["-c", *words[3:]])
        patched.setattr(sys, "path", [path for path in sys.path if path and Path(path) != ROOT])
        for name, module in list(sys.modules.items()):
            folder = Path(getattr(module, "__file__", None) or "/").parent
            packages = ROOT / "experiments", ROOT / "course"
            # not all that is below ROOT: .venv may be there, and torch can't be loaded twice
            if folder == ROOT or any(each in (folder, *folder.parents) for each in packages):
                patched.delitem(sys.modules, name)
        if stdout is not None:
            stack.enter_context(contextlib.redirect_stdout(stdout))
            stack.enter_context(contextlib.redirect_stderr(stdout))
        if program == "-c":
            program = stack.enter_context(tempfile.TemporaryDirectory()) + "/code.py"
            Path(program).write_text(words[2])
            sys.path[:0] = [str(Path.cwd()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        else:
            sys.path.insert(0, str(Path(program).resolve().parent))
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        except Exception:
            traceback.print_exc()
            code = 1
    return SimpleNamespace(returncode=code)


def refusal(call, case=""):
    """The message of the UserError that a call raises.

    If it raises none, or another error, the test fails and names the case.
    """
    try:
        call()
    except UserError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{case}: {error!r} instead of a UserError") from error
    raise AssertionError(f"{case}: nothing is refused")
