"""Runs on disk: their folders, their checkpoints, and the way back to a model and its tokenizer.

    outputs/mine/  config.json  checkpoint.pt  best.pt  metrics.jsonl  loss.png  sample.txt

    model, tokenizer = load_model("mine")

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Read before: model.py; after: generate.py, train.py
Source: PyTorch's notes on serialisation (weights_only: a checkpoint holds data, never code)
"""

import contextlib
import dataclasses
import io
import json
import platform
from pathlib import Path

import torch

from config import Config, config_from_dict
from model import GPT
from tokenizer import CharTokenizer
from utils import UserError, atomic_write

CONTENTS = {"config": dict, "model": dict, "optimizer": list, "step": int, "tokenizer": dict}
FILES = ("config.json", "checkpoint.pt", "best.pt", "metrics.jsonl", "loss.png", "sample.txt")


def save_checkpoint(path, state):
    """Writes a dict of tensors and plain values; the old file stays until the new one is whole."""
    content = io.BytesIO()  # torch's own writer reports a full disk as a bug of its file format
    torch.save(state, content)
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def load_checkpoint(path):
    """The dict of a checkpoint, on the CPU. Raises UserError where the file is not one.

    Only tensors and plain values are read: a file that asks to run code is refused.
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    with file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a foreign file can fail anywhere inside the unpickler
            raise UserError(f"{path} is truncated or not a checkpoint ({type(error).__name__}); "
                            "train again, or use another file") from None
    values = state if isinstance(state, dict) else {}
    wrong = [name for name, kind in CONTENTS.items() if not isinstance(values.get(name), kind)]
    if wrong:
        raise UserError(f"{path} is not one of this project's checkpoints: it lacks "
                        f"{', '.join(wrong)}")
    return state


def load_model(run=None, out_dir="outputs", device="cpu", file="checkpoint.pt"):
    """(model, tokenizer) of a run, the model in evaluation mode.

    run: its name in out_dir, its folder, or None for the newest run in out_dir. file:
    "checkpoint.pt", the last state, or "best.pt", the one of the lowest validation loss.
    Raises UserError for a run that is not there and weights that do not fit its config.
    """
    path = find_run(run, out_dir) / file
    state = load_checkpoint(path)
    model = GPT(config_of(state, path).model)
    load_weights_(model, state["model"], path)
    return model.to(device).eval(), CharTokenizer().load_state_dict(state["tokenizer"])


def config_of(state, path):
    """The Config in a checkpoint; `path` is for the error that is raised where it has none."""
    try:
        return config_from_dict(Config, state["config"])
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no usable config ({error}); train again") from None


def load_weights_(model, weights, path):
    """Copies weights into the model. Raises UserError naming what is missing, unknown, or of
    another shape; then nothing has been copied."""
    own = model.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in own]
    wrong += [f"{name} is {list(weights[name].shape)} in place of {list(own[name].shape)}"
              for name in own if name in weights and weights[name].shape != own[name].shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path} is from another architecture: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(weights)


def describe(cfg, dataset):
    """What config.json holds: the settings, and what else the numbers depend on."""
    return dataclasses.asdict(cfg) | {
        "text": {"name": dataset.name, "sha256": dataset.sha256},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
    }


def list_runs(out_dir):
    """The folders in out_dir that hold a checkpoint, the newest last."""
    checkpoints = Path(out_dir).glob("*/checkpoint.pt")
    return [path.parent for path in sorted(checkpoints, key=lambda path: path.stat().st_mtime_ns)]


def find_run(run, out_dir):
    """The folder of a run by name, by path, or (None) the newest. Raises UserError listing those
    that are there."""
    runs = list_runs(out_dir)
    if run is None:
        if not runs:
            raise UserError(f"no run in {out_dir} yet; make one with: python train.py")
        return runs[-1]
    for folder in (Path(out_dir) / run, Path(run)):
        if (folder / "checkpoint.pt").exists():
            return folder
    there = ", ".join(folder.name for folder in runs[-8:]) or "none"
    raise UserError(f"no run {run!r} in {out_dir}; there: {there}")


def new_run_folder(out_dir, run_name=None, overwrite=False):
    """A new run's folder: out_dir/run_name, or out_dir/run-001 and so on where no name is given.

    overwrite: empty an existing one of its run's files. Raises UserError where the name is taken,
    or the place cannot be written.
    """
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if run_name is None:
            taken = [int(p.name[4:]) for p in out_dir.glob("run-*") if p.name[4:].isdigit()]
            run_name = f"run-{max(taken, default=0) + 1:03d}"
        folder = out_dir / run_name
        if folder.exists() and not overwrite:
            raise UserError(f"run {run_name!r} is in {out_dir} already; go on with --resume, "
                            "replace it with --overwrite, or choose another --logging.run_name")
        folder.mkdir(exist_ok=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out_dir}: {error.strerror}; choose another "
                        "--logging.out_dir") from error
    return folder


def read_metrics(folder):
    """The lines of a run's metrics.jsonl, a list of dict; one that was cut off is passed over."""
    rows = []
    for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
