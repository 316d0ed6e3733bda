"""Runs on disk: folders, checkpoints, metrics, and loading a model from them.

    outputs/mine/  config.json  checkpoint.pt  best.pt  metrics.jsonl  loss.png  sample.txt

    model, tokenizer = load_model("mine")

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Prerequisites: data.py, model.py, formats.py
Next: generate.py
Source: PyTorch's notes on serialisation (weights_only: a checkpoint holds data, never code)
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import platform
import re
import shlex
import sys
import typing
from pathlib import Path

import torch

from config import Config, DataConfig, LoggingConfig, config_from_dict, field_types
from data import SHAKESPEARE_SHA256, load_dataset
from formats import (
    HUGGING_FACE,
    TOY_MODELS,
    WEIGHT_ENDINGS,
    check_told,
    find_format,
    is_foreign,
    read_foreign,
    toy_folder,
    toy_repository,
)
from model import GPT
from pretrained import (
    PRETRAINED_NAMES,
    check_sizes,
    check_weights_fit,
    is_hub_id,
    pretrained_folder,
)
from tokenizer import load_tokenizer, read_tokenizer
from utils import (
    UserError,
    atomic_write,
    list_names,
    locked,
    looking_at,
    n_ranks,
    open_regular,
    printable,
    rank,
    read_json,
    read_torch_file,
    suggest_closest,
    write_json,
)

GPT2_BPE = Path("data/gpt2_bpe")  # a folder with the two files of GPT-2's tokenizer
GPT2_TOKENS = 50257
GPT2_TOKENS_PADDED = 50304  # to a multiple of 64, as nanoGPT does
VERSION_LINE = "#version: 0.2"  # the first line of a file of merges
# Settings that may change when a run is resumed; max_steps changes the schedule from there on
FREE_TO_CHANGE = {"device", "threads", "folder", "path", "compile", "accumulate", "max_steps"}
LOCK_FILE = ".lock"
RUN_FILES = ("config.json", "checkpoint.pt", "best.pt", "metrics.jsonl", "loss.png", "sample.txt")


# Checkpoints


def save_checkpoint(path, state):
    """Writes a dict of tensors and plain values; the old file stays until the new one is complete.

    With several ranks, which all have the same state, only rank 0 writes.
    """
    if rank():
        return

    content = io.BytesIO()  # torch's own writer reports a full disk as a bug in its file format
    torch.save(state, content)
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def load_checkpoint(path):
    """The dict in a checkpoint, on the CPU. Raises UserError if the file is not a checkpoint.

    Only tensors and plain values are read: a file that asks to run code is refused.
    """
    state = read_torch_file(path, "a checkpoint", "train again, or use another file")
    values = state if isinstance(state, dict) else {}
    check_fields(values, path, needed=NEEDED_BY_MODEL)
    return state


# The format of a checkpoint: a test for each field. Other fields are allowed


def is_whole(value):
    """Whether a value is a whole number, 0 or more, that fits into torch's int64."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value):
    """Whether a value is a number; True and False do not count."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def is_weights(value):
    """Whether a value is a dict of floating-point tensors."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(weight, torch.Tensor) and weight.is_floating_point()
        for name, weight in value.items())


def is_generator_state(value):
    """Whether a value is a valid state of a torch.Generator."""
    if not isinstance(value, torch.Tensor):
        return False
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        return False
    return True


def is_list_of_steps(value):
    """Whether a value is a list of train.py's Steps: a number and four measurements each."""
    return isinstance(value, list) and all(
        isinstance(step, (list, tuple)) and len(step) == 5 and is_whole(step[0])
        and all(map(is_number, step)) for step in value)


def is_list_of_pairs(value):
    """Whether a value is a list of pairs of whole numbers."""
    return isinstance(value, list) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(is_whole, pair))
        for pair in value)


def is_tokenizer_state(value):
    """Whether a value is a dict of strings, and of lists of strings or of pairs of strings."""
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        return False
    lists = [field for field in value.values() if not isinstance(field, str)]
    if not all(isinstance(field, (list, tuple)) for field in lists):
        return False
    for part in itertools.chain.from_iterable(lists):
        pair = part if isinstance(part, (list, tuple)) and len(part) == 2 else (part,)
        if not all(isinstance(text, str) for text in pair):
            return False
    return True


NEEDED_BY_MODEL = {
    "config": lambda value: isinstance(value, dict),
    "model": is_weights,
    "optimizer": lambda value: isinstance(value, list),
    "step": is_whole,
    "tokenizer": is_tokenizer_state,
}
NEEDED_TO_RESUME = {
    "seconds": is_number,
    "best_loss": is_number,
    "recent": is_list_of_steps,
    "sampler": is_generator_state,
    "rng": is_generator_state,
    "data_sha256": lambda value: isinstance(value, str),
}
MAY_BE_THERE = {  # fields that older checkpoints lack
    "earlier_max_steps": is_list_of_pairs,
    "lost": is_whole,
    "untrained": is_number,
    "threads": lambda value: is_whole(value) and value > 0,
}


def check_fields(state, path, needed):
    """Raises UserError naming the fields of a checkpoint that are missing or of the wrong type.
    needed: {name: test} of the fields that must be there."""
    tests = NEEDED_BY_MODEL | NEEDED_TO_RESUME | MAY_BE_THERE
    wrong = [name for name, holds in tests.items()
             if (name in state or name in needed) and not (name in state and holds(state[name]))]
    if wrong:
        raise UserError(f"{path} is not one of this project's checkpoints: it lacks "
                        f"{', '.join(wrong)}")


def check_same_structure(found, wanted, where):
    """Raises UserError unless two nested values have the same names, lengths, and tensors of the
    same shapes and types. where: what they are, for the message."""
    if isinstance(wanted, dict):
        fits = isinstance(found, dict) and found.keys() == wanted.keys()
        pairs = [(found[name], wanted[name]) for name in wanted] if fits else []
    elif isinstance(wanted, (list, tuple)):
        fits = isinstance(found, (list, tuple)) and len(found) == len(wanted)
        pairs = list(zip(found, wanted, strict=True)) if fits else []
    elif isinstance(wanted, torch.Tensor):
        fits = (isinstance(found, torch.Tensor) and found.shape == wanted.shape
                and found.dtype == wanted.dtype)
        pairs = []
    else:
        fits = type(found) is type(wanted)
        pairs = []

    if not fits:
        raise UserError(f"{where} is of another model than its config says; start another run")
    for pair in pairs:
        check_same_structure(*pair, where)


def config_of(state, path):
    """The Config in a checkpoint's state. Raises UserError, naming `path`, if there is none."""
    try:
        check_field_types(Config, state["config"])
        check_sizes(state["config"].get("model", {}), path)
        return config_from_dict(Config, state["config"])
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no usable config ({error}); train again") from None


def check_field_types(kind, values):
    """Raises UserError if nested dicts hold a value of another type than the dataclass `kind` says.
    Fields that it does not have are ignored; which word a choice holds is not checked."""
    if not isinstance(values, dict):
        raise UserError(f"{kind.__name__} is not a dict")
    hints = field_types(kind)
    for name, value in values.items():
        hint = hints.get(name, object)
        if dataclasses.is_dataclass(hint):
            check_field_types(hint, value)
            continue

        if typing.get_origin(hint) is typing.Literal:
            hint = str
        elif typing.get_origin(hint) is tuple:
            hint = tuple | list  # JSON has lists only
        allowed = typing.get_args(hint) or (hint,)
        if float in allowed:
            allowed += (int,)
        is_wrong_bool = isinstance(value, bool) and not {bool, object} & set(allowed)
        if is_wrong_bool or not isinstance(value, allowed):
            raise UserError(f"{printable(name)} is {printable(repr(value))}")


# Loading a model


def load_model(run=None, out_dir="outputs", device="cpu", *, file="checkpoint.pt", cache_dir=None,
               **told):
    """Loads (model, tokenizer) from a run, a published model or another project's files, the model
    in evaluation mode. The tokenizer is None if none comes with another project's model.

    run: which model, one of
        None                        the newest run in out_dir
        "mine"                      a run, by its name in out_dir or by its folder
        "gpt2", "owner/name"        a published GPT-2, downloaded once; see `GPT.from_pretrained`
        a folder or a file          of another project; a line on stderr names the format that was
                                    found (formats.py lists them)
        "attn-only-2l"              a toy model of TransformerLens, downloaded once
    file: "checkpoint.pt", the last state of a run, or "best.pt", the state with its lowest
    validation loss. cache_dir: where downloads are kept. told: what another project's file does not
    say: activation, norm ("layernorm", "none") or n_heads.
    Raises UserError for a run that does not exist, for weights that do not fit their config, and
    for a model of another kind.
    """
    unknown = set(told) - {"activation", "norm", "n_heads"}
    if unknown:
        raise TypeError(f"load_model() got unexpected arguments {sorted(unknown)}")
    if run is not None and not isinstance(run, str | os.PathLike):
        raise UserError(f"the model is given as {run!r}; give a run's name, a published model's "
                        "name or a path")
    if run is not None and existing_run_folder(run, out_dir) is None and is_pretrained(run):
        return load_from_elsewhere(run, device, cache_dir, told)

    path = find_run(run, out_dir) / file
    state = load_checkpoint(path)
    cfg = config_of(state, path).model
    check_told(told, cfg, path)
    check_weights_fit(cfg, state["model"], path)
    model = GPT(cfg, seed=None)
    model.load_weights_(state["model"], path)
    return model.to(device).eval(), load_tokenizer(state["tokenizer"])


def load_from_elsewhere(name_or_path, device="cpu", cache_dir=None, told=None):
    """Loads (model, tokenizer or None) of a published model or of another project's files, the
    model in evaluation mode.

    name_or_path, cache_dir: as in `load_model`. told: a dict of what the files do not say.
    """
    found = find_other_format(name_or_path, cache_dir)
    if found is not None:
        return load_foreign(found, device, told or {})
    model, tokenizer = load_hugging_face(name_or_path, device, cache_dir)
    check_told(told or {}, model.cfg, name_or_path)
    return model, tokenizer


def load_pretrained(name_or_folder, device="cpu", *, cache_dir=None):
    """As `load_from_elsewhere`, for programs that need texts: (model, tokenizer).

    Raises UserError if there is no tokenizer, or if it has more tokens than the model.
    """
    model, tokenizer = load_from_elsewhere(name_or_folder, device, cache_dir)
    if tokenizer is None:
        raise UserError(f"{name_or_folder} brings no tokenizer (vocab.json and merges.txt, or "
                        "tokenizer.json, or meta.pkl), which this needs; put it there, or load the "
                        "model alone with checkpoint.load_model, and give it tokens")
    return model, tokenizer


def find_other_format(name_or_path, cache_dir=None):
    """The `formats.Found` of a path or of a toy model, which is downloaded once; None for Hugging
    Face's format and its names. Raises UserError for the folder of a run."""
    path = name_or_path
    if not is_foreign(path):
        repository = toy_repository(name_or_path)
        if repository is None:
            return None
        path = toy_folder(repository, cache_dir)
    found = find_format(path)
    if found.format != HUGGING_FACE:
        return found
    if any((found.path / name).exists() for name in ("checkpoint.pt", "metrics.jsonl")):
        raise UserError(f"{found.path} is a run, whose config.json is of another kind; load it as "
                        "one, with load_model, or with --run_name in a program")
    return None


def load_foreign(found, device, told):
    """Builds (model, tokenizer or None) from a `formats.Found`; a line on stderr names the format.

    told: a dict of what the file does not say; see `formats.read_foreign`.
    """
    foreign = read_foreign(found, **told)
    assumed = f" ({foreign.assumed})" if foreign.assumed else ""
    print(f"{found.path}: read as {foreign.format}{assumed}", file=sys.stderr)

    model = GPT(foreign.cfg, seed=None)
    model.load_weights_(foreign.tensors, found.path)
    if foreign.tokenizer is None:
        tokenizer = tokenizer_beside(found.path.parent, foreign.cfg.d_vocab, found.path)
    else:
        tokenizer = load_tokenizer(foreign.tokenizer)
    return model.to(device).eval(), tokenizer


def load_hugging_face(name_or_folder, device="cpu", cache_dir=None):
    """Loads (model, tokenizer or None) of a GPT-2 in Hugging Face's format.

    The tokenizer's files are read from the same folder as the weights. Raises UserError if they
    hold more tokens than the model.
    """
    folder = pretrained_folder(name_or_folder, cache_dir)
    model = GPT.from_pretrained(folder)
    return model.to(device), tokenizer_beside(folder, model.cfg.d_vocab, folder)


def tokenizer_beside(folder, d_vocab, origin):
    """The tokenizer whose files lie in a model's folder, or GPT-2's if it fits, or None.

    d_vocab: the model's. origin: where the model comes from, for a line on stderr. Raises UserError
    for files that cannot be used, and if they hold more tokens than the model.
    """
    try:
        tokenizer = read_tokenizer(folder)
    except UserError as error:
        raise UserError(f"{error}; to load the model alone, move the tokenizer's files away"
                        ) from None
    if tokenizer is None:
        return gpt2_tokenizer(d_vocab, origin)
    if tokenizer.d_vocab > d_vocab:
        raise UserError(f"the tokenizer in {folder} has {tokenizer.d_vocab:,} tokens and the model "
                        f"{d_vocab:,}; put the model's own there")
    return tokenizer


def gpt2_tokenizer(d_vocab, origin):
    """GPT-2's tokenizer from data/gpt2_bpe, for a model with its number of tokens that brings none;
    a line on stderr says so. None for another number of tokens, or without these files.

    origin: where the model comes from, for that line.
    """
    if d_vocab not in (GPT2_TOKENS, GPT2_TOKENS_PADDED):
        return None
    tokenizer = read_tokenizer(GPT2_BPE)
    if tokenizer is not None:
        print(f"{origin} has no tokenizer; using GPT-2's from {GPT2_BPE}", file=sys.stderr)
    return tokenizer


def export_pretrained(folder, model, tokenizer):
    """Writes a model and its BPE tokenizer in the format that Hugging Face and `load_model` read.

    Raises UserError for another kind of tokenizer, for a folder with another tokenizer's settings,
    and as `GPT.save_pretrained`.
    """
    if tokenizer.kind != "bpe":
        raise UserError(f"GPT-2's format cannot hold a {tokenizer.kind!r} tokenizer; write the "
                        "model alone with model.save_pretrained")
    folder = Path(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            raise UserError(f"{folder} has a {name}, which would be read with the new tokenizer or "
                            "instead of it; choose another folder")
    model.save_pretrained(folder)

    state = tokenizer.state_dict()
    added = {text: tokenizer.ids[text.encode()] for text in tokenizer.added}
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(state["tokens"])
                                       if i not in added.values()})
    if added or (folder / "added_tokens.json").exists():
        write_json(folder / "added_tokens.json", added)
    with atomic_write(folder / "merges.txt", "w") as file:
        file.write(f"{VERSION_LINE}\n")
        for left, right in state["merges"]:
            file.write(f"{left} {right}\n")


def is_pretrained(name_or_folder):
    """Whether it is a model from elsewhere: a known name, what reads as a name on the hub, or a
    folder or file of a model. Raises UserError for a published model of another kind."""
    return (name_or_folder in PRETRAINED_NAMES or is_foreign(name_or_folder)
            or toy_repository(name_or_folder) is not None or is_hub_id(name_or_folder))


# A run's folder


def write_run_config(folder, cfg, dataset, model):
    """Writes a run's config.json, on rank 0: its settings, and what else affects the numbers."""
    if rank():
        return
    circumstances = {
        "text": {"name": dataset.name, "sha256": dataset.sha256},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "device": str(model.W_E.device),
        "ranks": n_ranks(),
    }
    write_json(folder / "config.json", dataclasses.asdict(cfg) | circumstances)


def record_max_steps(folder, max_steps, earlier):
    """Sets max_steps in a run's config.json, on rank 0, unless that number is there already.

    earlier: [(step, max_steps), …], the numbers that held until those steps; they are recorded,
    too, because they decided the learning rates. All else stays as it was when the run began.
    """
    path = folder / "config.json"
    if rank() or not is_run_config(path):
        return
    values = read_json(path)
    if values["train"]["max_steps"] != max_steps:
        values["train"]["max_steps"] = max_steps
        values["earlier_max_steps"] = [
            {"until_step": step, "max_steps": before} for step, before in earlier]
        write_json(path, values)


def list_runs(out_dir):
    """The folders in out_dir that hold a checkpoint, the newest last."""
    checkpoints = [path for path in Path(out_dir).glob("*/checkpoint.pt") if path.exists()]
    return [path.parent for path in sorted(checkpoints, key=lambda path: path.stat().st_mtime_ns)]


def existing_run_folder(run, out_dir):
    """The folder of a run, given its name in out_dir or its path; None if there is none."""
    for folder in (Path(out_dir) / run, Path(run)):
        with looking_at(folder):
            if (folder / "checkpoint.pt").exists():
                return folder
    return None


def find_run(run, out_dir):
    """The folder of a run, given its name or path, or (None) of the newest run in out_dir.

    Raises UserError listing the runs that exist.
    """
    runs = list_runs(out_dir)
    if run is None:
        if not runs:
            raise UserError(f"no run in {out_dir} yet; make one with: python train.py")
        return runs[-1]

    folder = existing_run_folder(run, out_dir)
    if folder is None:
        name = str(run)
        if name and Path(name).exists():
            raise UserError(f"{printable(name)} has neither a run's checkpoint.pt, nor a "
                            "config.json or a file of weights; give what has")
        names = [folder.name for folder in runs]
        there = ", ".join(names[-8:]) or "none"
        closest = suggest_closest(name, [*names, *PRETRAINED_NAMES, *TOY_MODELS])
        is_path = len(Path(name).parts) > 1 or Path(name).suffix in WEIGHT_ENDINGS
        nor_path = ", nor a file or folder of that name" if is_path else ""
        raise UserError(f"no run {name!r} in {out_dir}{nor_path}; there: {there}{closest}")
    return folder


def run_flags(folder, prefix="--"):
    """The flags by which a program finds a run: its name, and out_dir if it is not the default."""
    flags = f"{prefix}run_name {shlex.quote(folder.name)}"
    if folder.parent != Path(LoggingConfig().out_dir):
        flags += f" {prefix}out_dir {shlex.quote(str(folder.parent))}"
    return flags


# Resuming a run


def load_run_to_resume(given, lock=None):
    """(folder, state, Config) of the run that `--resume` asks for.

    given: the flags, nested; a setting that is not given keeps its value from the run. lock: a
    RunLock, which is taken on the folder before its checkpoint is read.
    Returns None if there is no checkpoint; `new_run_folder` then checks what else is there.
    Raises UserError naming every flag that contradicts the run.
    """
    # Which run, if there is one
    logging = config_from_dict(LoggingConfig, given.get("logging", {}))
    names = [folder.name for folder in list_runs(logging.out_dir)]
    if not names or logging.run_name not in (None, *names):
        closest = suggest_closest(logging.run_name or "", names)
        if closest and not (Path(logging.out_dir) / logging.run_name).is_dir():
            raise UserError(f"no run {logging.run_name!r} to resume{closest}")
        return None
    folder = find_run(logging.run_name, logging.out_dir)
    if lock is not None:
        lock.take(folder)
    path = folder / "checkpoint.pt"
    state = load_checkpoint(path)
    check_fields(state, path, needed=NEEDED_TO_RESUME)

    # The run's settings, and those given now
    saved = dataclasses.asdict(config_of(state, path))
    decisive = {section: saved[section] for section in ("data", "model", "train")}
    different = contradictions(given, decisive, FREE_TO_CHANGE, "was")
    if different:
        raise UserError(f"{folder} was made with other settings: {different}; leave "
                        "these flags out, or start another run")
    merged = {section: saved[section] | given.get(section, {}) for section in saved}
    cfg = config_from_dict(Config, merged)
    if state["step"] > cfg.train.max_steps:
        raise UserError(f"{path} is of step {state['step']:,}, beyond max_steps="
                        f"{cfg.train.max_steps:,}; give more steps, or start another run")

    threads_now = cfg.train.threads or torch.get_num_threads()
    threads_before = state.get("threads", threads_now)
    if threads_now != threads_before:
        print(f"{threads_now} threads now, {threads_before} before: the last bits of the result "
              "may differ")
    return folder, state, cfg


def reload_dataset(folder, state, cfg):
    """The Dataset that a run was trained on, wherever its text is now.

    folder: the run's. state: its checkpoint. cfg: a Config; the dataset "auto" means the text that
    was chosen when the run began, whatever is available now. Raises UserError if the text is
    missing or has changed.
    """
    which = cfg.data.dataset
    if which == "auto":
        shakespeare = state["data_sha256"] == SHAKESPEARE_SHA256
        which = "tiny_shakespeare" if shakespeare else "builtin"

    data_cfg = dataclasses.replace(cfg.data, dataset=which)
    dataset = load_dataset(data_cfg, cfg.model.n_ctx, load_tokenizer(state["tokenizer"]))
    if dataset.sha256 != state["data_sha256"]:
        raise UserError(f"the text is not the one that {folder} was trained on; put that one back, "
                        "name it with --data.path, or start another run")
    return dataset


# Beginning with a model that exists


def load_model_to_tune(given):
    """(Config, weights, tokenizer) of a new run that begins with an existing model.

    given: the flags, nested; given["train"]["init_from"] is the model, as `load_model` takes it.
    The shape of the model and the kind of its tokenizer replace the defaults of the Config.
    dropout may be given. So may a smaller n_ctx: the embeddings of the first positions are kept.
    A larger one is possible where positions are not learned. weights: {name: tensor}.
    Raises UserError for a model without a tokenizer, for one whose logits are not those of its
    tokens, and for flags that contradict it, naming all of them.
    """
    origin = given["train"]["init_from"]
    logging = config_from_dict(LoggingConfig, given.get("logging", {}))
    check_not_replaced(origin, logging)
    model, tokenizer = load_model(origin, logging.out_dir)
    check_tunable(model, tokenizer, origin)

    # The settings that the model has, and those given now
    n_ctx = given.get("model", {}).get("n_ctx", model.cfg.n_ctx)
    may_differ = {"dropout"}
    if n_ctx <= model.cfg.n_ctx or model.cfg.positions != "learned":
        may_differ.add("n_ctx")
    fixed = settings_of_model(model, tokenizer)
    different = contradictions(given, fixed, may_differ, "is")
    if different:
        raise UserError(f"{origin} is another model: {different}; leave these flags out")
    merged = {section: fixed[section] | given.get(section, {}) for section in fixed}
    cfg = config_from_dict(Config, given | merged)

    weights = model.state_dict()
    if model.cfg.positions == "learned":
        weights["position_embedding.W_pos"] = model.W_pos[:n_ctx].detach()
    return cfg, weights, tokenizer


def check_not_replaced(origin, logging):
    """Raises UserError if a new run would replace the run that it begins with.

    origin: the model to begin with. logging: the new run's LoggingConfig.
    """
    if logging.run_name is None:
        return
    folder = Path(logging.out_dir) / logging.run_name
    source = existing_run_folder(origin, logging.out_dir)
    if source is not None and source.resolve() == folder.resolve():
        raise UserError(f"init_from={origin} is the run that would be replaced; choose another "
                        "--logging.run_name")


def check_tunable(model, tokenizer, origin):
    """Raises UserError for a model that can't be trained on a text; origin: its name or path."""
    cfg = model.cfg
    if tokenizer is None:
        raise UserError(f"{origin} has no tokenizer, so no text can be turned into its ids; put "
                        "the files of its tokenizer beside it")
    if cfg.d_vocab_out != cfg.d_vocab:
        raise UserError(f"{origin} has {cfg.d_vocab_out} logits for {cfg.d_vocab} tokens, and "
                        "training predicts tokens; begin with a model that does, too")


def settings_of_model(model, tokenizer):
    """{section of a Config: {field: value}} of what a model and its tokenizer decide."""
    kind = tokenizer.kind
    vocab_size = tokenizer.d_vocab if kind == "bpe" else DataConfig().vocab_size
    return {"data": {"tokenizer": kind, "vocab_size": vocab_size},
            "model": dataclasses.asdict(model.cfg)}


def contradictions(given, fixed, may_differ, verb):
    """Says which flags contradict settings, such as "model.n_layers is 3, not 2"; "" if none does.

    given, fixed: {section: {name: value}}, the flags and the settings; a name that `fixed` lacks
    contradicts nothing. may_differ: names to ignore. verb: "is", or "was" for an earlier run.
    """
    return "; ".join(
        f"{section}.{name} {verb} {fixed[section][name]}, not {value}"
        for section in fixed
        for name, value in given.get(section, {}).items()
        if name in fixed[section] and name not in may_differ and value != fixed[section][name])


# Starting a run, and its metrics


def on_first_rank(function):
    """Decorator: only rank 0 calls the function; every rank gets its result, or its UserError."""

    @functools.wraps(function)
    def shared(*args, **named):
        # In a list, whose contents `broadcast_object_list` replaces on the other ranks
        result = [None]
        if rank() == 0:
            try:
                result = [function(*args, **named)]
            except UserError as error:
                result = [error]
        if n_ranks() > 1:
            torch.distributed.broadcast_object_list(result)
        if isinstance(result[0], UserError):
            raise result[0]
        return result[0]

    return shared


class RunLock:
    """An exclusive lock on one run's folder, from `take` until the `with` block ends.

    The system releases it when the process ends, for whatever reason; the empty file that stays
    behind locks nothing. With several ranks, only rank 0 takes it. If Python has no fcntl (on
    Windows), it locks nothing.
    """

    def __init__(self):
        self.path = None
        self.stack = contextlib.ExitStack()

    def take(self, folder):
        """Takes the lock; taking it twice is fine. Raises UserError if another process has it."""
        path = Path(folder) / LOCK_FILE
        if rank() or self.path == path:
            return
        self.release()
        try:
            self.stack.enter_context(locked(
                path, f"another process is writing to the run in {folder}; wait until it ends, or "
                "choose another --logging.run_name"))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another "
                            "--logging.out_dir") from None
        self.path = path

    def release(self):
        """Releases the lock, if it was taken."""
        self.stack.close()
        self.path = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


@on_first_rank
def new_run_folder(out_dir, run_name=None, overwrite=False, *, unless_used=False, lock=None):
    """Creates a new run's folder: out_dir/run_name, or out_dir/run-001 and so on without a name.

    overwrite: delete the run's files in an existing folder. unless_used: use an existing folder in
    which no run has taken a step. lock: a RunLock, which is taken on the folder. Returns the
    folder. Raises UserError if the name is taken, by a run or by something else, and if the folder
    cannot be written.
    """
    if lock is None:
        with RunLock() as lock:  # held while the folder is created
            return prepare_run_folder(Path(out_dir), run_name, overwrite, unless_used, lock)
    return prepare_run_folder(Path(out_dir), run_name, overwrite, unless_used, lock)


def prepare_run_folder(out_dir, run_name, overwrite, unless_used, lock):
    """Creates the folder; see `new_run_folder`."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if run_name is None:
            folder = make_numbered_folder(out_dir)
        else:
            folder = out_dir / run_name
            try:
                folder.mkdir()
            except FileExistsError:
                check_replaceable(folder, lock, overwrite, unless_used)
        lock.take(folder)

        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
        remove_temporary(folder)
    except OSError as error:
        raise UserError(f"cannot write to {out_dir}: {error.strerror}; choose another "
                        "--logging.out_dir") from error
    return folder


@on_first_rank
def check_run_name(out_dir, run_name, overwrite=False, *, unless_used=False, lock=None):
    """Raises UserError if `new_run_folder` would refuse the name; arguments as there. It creates
    nothing, so a program can call it before it loads its data."""
    folder = None if run_name is None else Path(out_dir) / run_name
    if folder is not None and folder.exists():
        with contextlib.nullcontext(lock) if lock else RunLock() as lock:
            check_replaceable(folder, lock, overwrite, unless_used)


def make_numbered_folder(out_dir):
    """Creates the folder run-001, or the one after the highest number that exists."""
    names = [re.fullmatch("run-([0-9]{1,9})", path.name) for path in out_dir.glob("run-*")]
    number = max((int(name[1]) for name in names if name), default=0)
    while True:
        number += 1
        folder = out_dir / f"run-{number:03d}"
        with contextlib.suppress(FileExistsError):  # another process has just created it
            folder.mkdir()
            return folder


def check_replaceable(folder, lock, overwrite, unless_used):
    """Raises UserError, saying what is there, if a new run may not replace an existing folder.

    Arguments as in `new_run_folder`. The lock is taken on the folder if it was ever locked.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --logging.run_name")
    if (folder / LOCK_FILE).exists():
        lock.take(folder)  # raises if a process is writing there now

    name = f"run {folder.name!r} is in {folder.parent}"
    remains = list_remains(folder)
    is_a_run = not remains or is_run_config(folder / "config.json") or any(
        (folder / file).is_file() for file in ("checkpoint.pt", "best.pt", "metrics.jsonl"))
    there = list_names(remains, 8)
    if not is_a_run and (overwrite or unless_used):
        raise UserError(f"{folder} is not a run of this project; it has {there}; choose another "
                        "--logging.run_name")
    if unless_used and remains:
        raise UserError(f"{name} without a checkpoint to resume from; it has {there}; put its "
                        "checkpoint.pt back, or replace all of it with --overwrite")
    if not (overwrite or unless_used):
        found = "without a checkpoint;"
        if is_finished_run(folder):
            found = "already, and finished; train it longer with --resume --train.max_steps N,"
        elif (folder / "checkpoint.pt").exists():
            found = "already; continue it with --resume,"
        raise UserError(f"{name} {found} replace it with --overwrite, or choose another "
                        "--logging.run_name")


def list_remains(folder):
    """The names of the files in a folder, except those from before a run's first checkpoint.

    A process that was killed that early leaves the run's settings, the untrained model as its best
    one, the row of its loss, and the file that it was writing.
    """
    unfinished = "|".join(map(re.escape, RUN_FILES))
    no_loss = re.compile(rf"\.({unfinished})\.[0-9]+|{re.escape(LOCK_FILE)}")
    before_learning = {"config.json": is_run_config, "best.pt": is_untrained,
                       "metrics.jsonl": has_no_steps}
    remains = []
    for path in sorted(folder.iterdir()):
        holds = before_learning.get(path.name)
        if not (no_loss.fullmatch(path.name) or (holds and path.is_file() and holds(path))):
            remains.append(path.name)
    return remains


def is_run_config(path):
    """Whether a file was written by `write_run_config`."""
    try:
        values = read_json(path)
        sections = [field.name for field in dataclasses.fields(Config)]
        config_of({"config": {section: values[section] for section in sections}}, path)
    except (UserError, KeyError):
        return False
    return True


def is_finished_run(folder):
    """Whether the checkpoint in a folder is of its run's last step."""
    path = folder / "checkpoint.pt"
    try:
        state = load_checkpoint(path)
        return state["step"] == config_of(state, path).train.max_steps
    except UserError:
        return False


def is_untrained(path):
    """Whether a file is a checkpoint from before the first step."""
    try:
        return load_checkpoint(path)["step"] == 0
    except UserError:
        return False


def has_no_steps(path):
    """Whether a run's metrics have no complete row after the one from before the first step."""
    with open_regular(path) as file:
        content = file.read(1 << 16)
    rows = read_metrics(path.parent)
    return content.count(b"\n") == len(rows) and all(row["step"] == 0 for row in rows)


def remove_temporary(folder):
    """Removes the unfinished files that a killed `atomic_write` left in a run's folder."""
    for name in RUN_FILES:
        for path in folder.glob(f".{name}.[0-9]*"):
            path.unlink(missing_ok=True)


def add_rows(folder, rows, afresh=False):
    """Adds dicts to a run's metrics.jsonl, one per line; with several ranks, only rank 0 writes.

    afresh: write a new file with only these rows. Raises UserError on a full disk.
    """
    if rank():
        return

    path = folder / "metrics.jsonl"
    lines = [json.dumps(row) + "\n" for row in rows]
    try:
        if afresh:
            remove_temporary(folder)
            with atomic_write(path, "w") as file:
                file.writelines(lines)
        else:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(lines)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room, then continue with "
                        "--resume") from None


def read_metrics(folder):
    """The rows of a run's metrics.jsonl, a list of dicts; an empty list without the file.

    A line that was cut off, by a kill or a full disk, or is damaged in another way, is skipped.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []

    with open_regular(path) as file:
        lines = file.read().split(b"\n")
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line.decode("utf-8"))
            if is_metrics_row(row):
                rows.append(row)
    return rows


def is_metrics_row(row):
    """Whether a value is a valid row of metrics.jsonl: a step, and numbers by name.

    `above_floor` is a dict of such numbers.
    """
    if not isinstance(row, dict) or not is_whole(row.get("step")):
        return False
    floor = row.get("above_floor", {})
    if not isinstance(floor, dict):
        return False
    numbers = [value for name, value in row.items() if name != "above_floor"]
    return all(map(is_number, [*numbers, *floor.values()]))
