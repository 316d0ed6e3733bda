"""Shared by all experiments: claims and their table, kept models, and the program around them.

An experiment is a `run(cfg, folder)` that measures, and a list of claims about what it measured.
Everything else is the same for all experiments and is here: the flags, the folder, the progress of
trainings, the trained models that a second run reads, the printed table, results.json and the page
of all experiments. The labs in course/labs/ use it in the same way.

Chapter: COURSE_ROADMAP.md, 6 (learn and sample); the form of a claim: chapter 0
Prerequisites: config.py, checkpoint.py, train.py
Next: activation_cache.py
Source: the form of a claim is that of chapter 0
"""

import contextlib
import hashlib
import html
import itertools
import json
import math
import os
import re
import statistics
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote as quote_address

import torch

import corpus
import plotting
from checkpoint import (
    config_of,
    find_run,
    is_pretrained,
    load_checkpoint,
    reload_dataset,
    save_checkpoint,
)
from config import SEEDS, Config, ModelConfig, check_field, config_from_dict, flag_parser, option
from data import last_token_boundary, random_batch
from losses import cross_entropy
from metrics import holm
from model import GPT
from train import fit
from utils import (
    Progress,
    UserError,
    atomic_write,
    printable,
    read_json,
    read_text,
    read_torch_file,
    seeded_generator,
    write_json,
)

HEADINGS = ("claim", "published", "measured", "range or 95 % CI", "compared with", "")
WRAPPED = ("claim", "published", "compared with")  # the columns of text, not of numbers
ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100  # characters a line of what is printed
LEVEL = 0.05  # a p-value counts as small below it

# Claims


@dataclass(frozen=True)
class Claim:
    """One line of an experiment's table.

    measured: the number; low and high: its range or interval. holds: whether the claim holds; None
    if the line is only for information. reported: a published number, and by whom.
    control: the threshold, or what the same measurement gives without the effect; mark: the
    threshold as a number, if there is one. A number is None if it was not finite in results.json.
    p: the p-value, if the verdict comes from one. source: where the threshold comes from, if not
    from where the experiment's header says.
    """

    claim: str
    measured: float | None
    low: float | None
    high: float | None
    holds: bool | None = None
    reported: str = ""
    control: str = ""
    mark: float | None = None
    p: float | None = None
    source: str = ""

    @property
    def verdict(self):
        """PASS, FAIL, or an empty text if the claim was not judged."""
        return {True: "PASS", False: "FAIL", None: ""}[self.holds]

    def cells(self):
        """The line as texts, in the order of HEADINGS."""
        measured, low, high = ("—" if number is None else f"{number:.3g}"
                               for number in (self.measured, self.low, self.high))
        range_text = "" if self.is_one_value else f"{low} to {high}"
        return (self.claim, self.reported, measured, range_text, self.control, self.verdict)

    @property
    def is_one_value(self):
        """Whether the range holds nothing but the measured number, and so is no range."""
        measured, low, high = (None if number is None or math.isnan(number) else number
                               for number in (self.measured, self.low, self.high))
        return low == measured == high


def claim(text, values, *, above=None, below=None, between=None, holds=None, judged=True,
          interval=None, median=False, reported="", control=None, mark=None, p=None, source=""):
    """One line of the table: a Claim about a number, or about one number per seed (model, round).

    values: a number, or a list or tensor of numbers. The line shows their mean (or median) and
    their range, or instead of the range the given interval (low, high).
    above, below: every value must be strictly above, or below, this number; between: (low, high),
    both included. A threshold is written here and nowhere else; it becomes the line's mark and, if
    no control is given, its control. median: judge the median alone, not every value.
    holds: the verdict of a test that is not a threshold on the values (such as another model's
    value); p: a p-value, which must be below LEVEL. If several tests are given, all must hold.
    With a NaN among the values no threshold is passed. judged: False leaves the line open (a quick
    run, a user's own model). reported, control, mark, source: as in a Claim.
    """
    values = torch.as_tensor(values, dtype=torch.float64).reshape(-1).tolist()
    centre = statistics.median(values) if median else statistics.fmean(values)
    low, high = (min(values), max(values)) if interval is None else interval

    # The verdict: every test must hold.
    compared = [centre] if median else values
    tests = [] if holds is None else [holds]
    if not (above is None and below is None and between is None):
        tests.append(not any(map(math.isnan, values)))  # a median may not show it
    if above is not None:
        tests += [value > above for value in compared]
    if below is not None:
        tests += [value < below for value in compared]
    if between is not None:
        tests += [between[0] <= value <= between[1] for value in compared]
    if p is not None:
        tests.append(p < LEVEL)
    verdict = all(tests) if tests and judged else None

    # The thresholds again, for the reader (words) and for readers of results.json (marks).
    words = []
    marks = []
    if above is not None:
        words.append(f"above {above:g}")
        marks.append(above)
    if below is not None:
        words.append(f"below {below:g}")
        marks.append(below)
    if between is not None:
        is_one_number = between[0] == between[1]
        words.append(f"{between[0]:g}" if is_one_number else f"{between[0]:g} to {between[1]:g}")
        marks.append(between[1])
    if median and words:
        words[-1] += " (median)"
    if control is None:
        control = " and ".join(words)
    if mark is None and marks:
        mark = marks[0]
    if not source and between is not None and between[0] == between[1]:
        source = "exact"
    elif not source and p is not None and not marks:
        source = f"p below {LEVEL:g}"
    return Claim(text, centre, low, high, verdict, reported, control, mark, p, source)


def seed_claim(text, seeds, value, *, beside=None, **how):
    """A `claim` about value(result) of every seed. beside: a control for `add_control`; how: as in
    `claim`."""
    line = claim(text, [value(result) for result in seeds], **how)
    return line if beside is None else add_control(line, beside)


def add_control(line, control):
    """The Claim with a control after its threshold, such as the same number before training."""
    return replace(line, control=f"{line.control}; {control}" if line.control else control)


def mean_text(seeds, value):
    """The mean of value(result) over the seeds, as a text with two digits."""
    return f"{statistics.fmean(map(value, seeds)):.2g}"


def claims_table(claims):
    """The claims as a text table, at most WIDTH characters wide.

    A long cell continues in the lines below, within its column. Empty columns are left out.
    """
    columns = filled_columns(claims)
    widths = column_widths(columns)

    headings, *rows = zip(*columns, strict=True)
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    lines = [*row_lines(headings, widths), rule]
    for row in rows:
        lines += row_lines(row, widths)
    return "\n".join(lines)


def filled_columns(claims):
    """The columns of the claims' table that are not empty, each a tuple with its heading first."""
    columns = zip(HEADINGS, *(each.cells() for each in claims), strict=True)
    return [column for column in columns if any(column[1:])]


def column_widths(columns):
    """The width of each column: that of its longest cell, except that columns of text are narrowed
    until the table fits, with as few lines as possible. columns: tuples of texts, heading first.
    """
    widths = [max(map(len, column)) for column in columns]
    of_text = [index for index, column in enumerate(columns) if column[0] in WRAPPED]
    rules = 3 * len(columns) + 1  # the characters of "| ", of " | " between, and of " |"

    def lines_if_narrower(index):
        """(lines of the table with one column a character narrower, less its width)."""
        narrower = list(widths)
        narrower[index] -= 1
        lines = sum(len(row_lines(row, narrower)) for row in zip(*columns, strict=True))
        return lines, -widths[index]

    while sum(widths) + rules > WIDTH:
        wide = [index for index in of_text if widths[index] > 12]
        if not wide:
            break
        widths[min(wide, key=lines_if_narrower)] -= 1
    return widths


def row_lines(cells, widths):
    """The lines of one row of the table; all except the first are indented, to show where a row
    begins."""
    wrapped = [textwrap.wrap(cell, width, subsequent_indent="  ", break_on_hyphens=False)
               for cell, width in zip(cells, widths, strict=True)]
    lines = itertools.zip_longest(*wrapped, fillvalue="")
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            + " |" for line in lines]


def as_dicts(claims):
    """The claims as plain values, for results.json."""
    return [asdict(each) | {"verdict": each.verdict} for each in claims]


def replace_nonfinite(values):
    """The same plain values (dicts, lists and tuples among them) with None for NaN and infinity,
    which JSON can't hold."""
    if isinstance(values, dict):
        return {name: replace_nonfinite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [replace_nonfinite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def correct_for_many(claims):
    """The claims of a table, with the p-values of those that are judged corrected for their number
    (Holm's method). A claim whose corrected p-value is not below LEVEL fails."""
    tested = [each for each in claims if each.p is not None and each.holds is not None]
    if len(tested) < 2:
        return list(claims)
    corrected = dict(zip(map(id, tested), holm([each.p for each in tested]).tolist(), strict=True))

    def correct(line):
        if id(line) not in corrected:
            return line
        p = corrected[id(line)]
        words = f"corrected for {len(tested)} tests: p = {p:.2g}"
        return add_control(replace(line, p=p, holds=line.holds and p < LEVEL), words)

    return list(map(correct, claims))


def exit_code(claims):
    """0 if no claim fails, 1 if one does."""
    return int(any(each.holds is False for each in claims))


# Settings


@dataclass(frozen=True)
class LabConfig:
    """The settings of every lab, which keeps no models; each adds its own."""

    seeds: tuple[int, ...] = option(
        (0, 1, 2), "such as 0 1 or 0,1; a model is trained with each")
    threads: int = option(1, "CPU threads")
    quick: bool = option(False, "a small run, to check that the program works")
    out_dir: str = option("outputs", "the folder for all experiments' folders")

    def __post_init__(self):
        check_seeds(self)
        check_field(self, "threads", lambda n: n >= 1, "1 or more")


@dataclass(frozen=True)
class ExperimentConfig(LabConfig):
    """The settings of every experiment that trains; each adds its own."""

    retrain: bool = option(False, "train again, even if trained models are kept")

    def __post_init__(self):
        super().__post_init__()
        run_name, model = self.other_model
        if run_name is not None and model is not None:
            raise UserError(f"run_name={run_name!r} and model={model!r} are both given; choose one")
        if run_name is not None:
            find_run(run_name, self.out_dir)  # raises before a folder for results is made

    @property
    def other_model(self):
        """(run_name, model) of experiments that can analyse a model that they did not train."""
        return getattr(self, "run_name", None), getattr(self, "model", None)

    @property
    def folder_suffix(self):
        """The suffix of the folder's name for the results of such a model."""
        parts = []
        for name in filter(None, self.other_model):
            parts += [part for part in Path(name).parts[-2:] if part not in ("/", ".", "..")]
        return "".join(f"_{part}" for part in parts)


def check_pretrained(name):
    """Raise UserError, which lists the published models, if `name` is neither one of them nor a
    folder of one. None is fine."""
    if name is not None and not is_pretrained(name):
        GPT.from_pretrained(name)


def check_seeds(cfg):
    """Raise UserError unless a config has seeds, each of them once: a repeated seed would count as
    two independent models."""
    in_range, wanted = SEEDS

    def differ_and_fit(seeds):
        return len(seeds) == len(set(seeds)) > 0 and all(map(in_range, seeds))

    check_field(cfg, "seeds", differ_and_fit, f"one or more, each once and {wanted}")


def experiment_folder(name, out_dir):
    """Make out_dir/name before anything is computed. Raises UserError if it can't be written to."""
    folder = Path(out_dir) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; choose another "
                        "--out_dir") from None
    if not writable:
        raise UserError(f"cannot write to {folder}; choose another --out_dir")
    return folder


# Trained models that are kept


def load_or_make(path, settings, make, retrain=False):
    """A dict of tensors and plain values, read from `path` or made by `make()` and written there.

    It is read only if it was made with the same settings. retrain: make it in any case. settings: a
    dict of everything that it depends on; torch's version and the number of threads are added. A
    change of the code is noticed only if `code_digest` is among the settings; if not, pass
    `retrain`.
    """
    added = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    settings = json.loads(json.dumps(settings | added))

    if not retrain and path.exists():
        with contextlib.suppress(Exception):  # a file that can't be read is made again
            state = read_torch_file(path, "a kept model", "train it again with --retrain")
            if state["settings"] == settings:
                return state

    state = make() | {"settings": settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, state)
    return state


def code_digest(root=ROOT):
    """A checksum of all modules in `root` and in its experiments/, as a text: a kept result depends
    on them too."""
    digest = hashlib.sha256()
    for file in sorted([*root.glob("*.py"), *root.glob("experiments/**/*.py")]):
        code = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(code)}\n".encode() + code)
    return digest.hexdigest()


def as_run(model, tokenizer, **more):
    """A model as the dict of a checkpoint.pt, which `load_model` reads, together with `more`."""
    return {"model": model.state_dict(), "optimizer": [], "step": 0,
            "config": asdict(Config(model=model.cfg)), "tokenizer": tokenizer.state_dict()} | more


class Trainings:
    """The progress of all trainings of an experiment: which one runs, and the time left over all.

    steps: the number of steps of each training, in the order in which the models are made. A model
    that is read from an earlier run counts as one of them and takes no time.
    """

    def __init__(self, steps):
        self.steps = list(steps)
        self.n_ready = 0  # models that were trained or read until now
        self.steps_trained = 0
        self.seconds = 0.0  # the time of these steps

    def begin(self, label):
        """Start the progress line of the next training: `training 2 of 9: {label}`."""
        n_trainings = len(self.steps)
        self.step = 0
        self.label = label
        if n_trainings > 1:
            self.label = f"training {self.n_ready + 1} of {n_trainings}: {label}"

        # The pace is that of all steps trained until now, so that the time left covers all.
        self.steps_before = sum(self.steps[: self.n_ready])
        start = self.steps_before - self.steps_trained
        self.progress = Progress(sum(self.steps), " steps", done=start)
        self.began = self.progress.start
        self.progress.start -= self.seconds

    def show(self, step, text=""):
        """Show the training's number, label and step, `text`, and the time left over all."""
        self.step = step
        line = f"{self.label}: {text}" if text else self.label
        self.progress.show(self.steps_before + step, line)

    def close(self):
        """End the line of a training, and add its steps and its time to those of all."""
        self.progress.close()
        self.steps_trained += self.step
        self.seconds += time.monotonic() - self.began

    def count(self):
        """Count one more model as ready, whether it was trained or read."""
        self.n_ready += 1


def trained_gpt(path, cfg, seed, train, *, tokenizer, settings, retrain=False, trainings=None):
    """(model, state): the GPT of a ModelConfig and a seed, trained, or read if it was kept.

    path: of its checkpoint.pt, which `load_model` reads; the model comes in evaluation mode.
    train(model): trains it in place; a dict that it returns is kept with the run and comes back in
    `state`. settings: all that the training depends on, except cfg and seed, as in `load_or_make`.
    trainings: the Trainings that this model is counted in.
    """
    def make():
        model = GPT(cfg, seed)
        more = train(model) or {}  # it may return nothing
        return as_run(model, tokenizer, **more)

    settings = settings | {"shape": shape_settings(cfg), "seed": seed}
    state = load_or_make(path, settings, make, retrain)
    if trainings is not None:
        trainings.count()
    model = GPT(cfg, seed=None)
    model.load_weights_(state["model"], path)
    return model.eval(), state


def shape_settings(cfg):
    """A ModelConfig as a dict, for the settings of a kept model. The fields that it has had from
    the beginning are always there, the later ones only where they are not at their defaults: models
    that were kept before these fields came stay valid."""
    later = {"d_head": cfg.d_model // cfg.n_heads, "d_vocab_out": cfg.d_vocab,
             "norm_epsilon": ModelConfig.norm_epsilon}
    return {name: value for name, value in asdict(cfg).items()
            if name not in later or value != later[name]}


def fit_with_progress(model, next_batch, how, label, *, loss_fn=cross_entropy, trainings=None):
    """Train the model in place, with a progress line that names the training by `label`.

    next_batch() -> (inputs, targets). how: a TrainConfig. loss_fn: as in `fit`. trainings: the
    Trainings that this one belongs to; None shows it alone.
    """
    trainings = trainings or Trainings([how.max_steps])
    trainings.begin(label)
    for step in fit(model, next_batch, how, loss_fn=loss_fn):
        trainings.show(step.number, f"loss {step.loss:.2f}")
    trainings.close()


def train_on_text_(model, tokens, how, seed, label, *, trainings=None):
    """Train the model in place on windows from anywhere in a text, tokens [n], with the batches of
    a seed. how, label, trainings: as in `fit_with_progress`."""
    generator = seeded_generator(seed)
    fit_with_progress(
        model, lambda: random_batch(tokens, how.batch_size, model.cfg.n_ctx, generator), how, label,
        trainings=trainings)


def encode_start(path, tokenizer, n_tokens, unseen_seed):
    """The ids of the beginning of a file, at least n_tokens of them if there are as many; where
    path is None, of stories of the built-in corpus.

    unseen_seed: of these stories, another one than that of the text that was trained on.
    """
    n_characters = 16 * n_tokens  # a token of the corpus has 4 characters, others have fewer
    if path is None:
        return tokenizer.encode(corpus.text(n_characters, unseen_seed))
    text = read_text(Path(path))
    end = last_token_boundary(text, n_characters, tokenizer.kind)
    return tokenizer.encode_document(text[:end])


def validation_tokens(run):
    """The ids [n] of the validation text of a run of train.py.

    run: its folder. Raises UserError if the run does not say which text it was trained on, or if
    that text is no longer available.
    """
    path = Path(run) / "checkpoint.pt"
    state = load_checkpoint(path)
    if "data_sha256" not in state:
        raise UserError(f"{run} does not say what text it was trained on; name a run of train.py")
    return reload_dataset(Path(run), state, config_of(state, path)).val


# Timing


def take_turns(contestants, rounds, *, clock=time.perf_counter, most_seconds=math.inf):
    """Time functions in turn, round after round: {name: seconds of each round}.

    All run once before, without being timed. contestants: {name: function without arguments}.
    clock: a function that returns seconds. most_seconds: after this time no further round begins,
    except the first three.
    """
    began = time.monotonic()
    seconds = {name: [] for name in contestants}
    progress = Progress(rounds, " rounds")
    for number in range(rounds + 1):
        if number > 3 and time.monotonic() - began > most_seconds:
            break
        for name, run in contestants.items():
            before = clock()
            run()
            if number > 0:
                seconds[name].append(clock() - before)
        progress.show(number, " against ".join(map(str, contestants)))
    return {name: torch.tensor(each) for name, each in seconds.items()}


# The program around an experiment


@contextlib.contextmanager
def torch_threads(n):
    """A context in which torch computes with n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def perform(config_class, run, figures, about, *, argv=None):
    """The program of an experiment or a lab: read the flags, run, write the results, and exit.

    config_class: the settings, a dataclass with threads and out_dir. run(cfg, folder) -> {"found":
    two or three plain sentences that say what was found, "claims": list of Claim, plain values}.
    figures(result) -> {name: Figure}. about: the program's docstring, whose first line says what it
    shows. The config's `folder_suffix`, if it has one, is added to the folder's name, and "_quick"
    for a quick run, so that these do not overwrite the experiment's own results.
    """
    began = time.monotonic()
    title = about.split("\n")[0]
    flags = flag_parser(config_class, title).parse_args(argv)
    cfg = config_from_dict(config_class, vars(flags))

    name = program_name(about) + getattr(cfg, "folder_suffix", "")
    if getattr(cfg, "quick", False):
        name += "_quick"
    folder = experiment_folder(name, cfg.out_dir)

    try:
        with torch_threads(cfg.threads):
            result = run(cfg, folder)
    except UserError:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty
        raise

    result |= {"about": title, "settings": asdict(cfg), "torch": torch.__version__,
               "thresholds": thresholds_of(about), "claims": correct_for_many(result["claims"])}
    conclude(result, folder, figures(result), seconds=time.monotonic() - began)


def thresholds_of(about):
    """Where an experiment's thresholds come from: the paragraph of its docstring that begins with
    "Thresholds:", without that word. Empty if there is none."""
    paragraphs = [" ".join(part.split()) for part in about.split("\n\n")]
    said = [part for part in paragraphs if part.startswith("Thresholds: ")]
    return said[0].removeprefix("Thresholds: ").removesuffix(".") if said else ""


def threshold_source(line, thresholds):
    """Where the threshold of a Claim comes from. thresholds: what `thresholds_of` returns."""
    return line.source or thresholds


def program_name(about):
    """The name of a program, taken from the command in its docstring."""
    return re.search(r"python (?:experiments|course/labs)/(\w+)\.py", about)[1]


def conclude(result, folder, figures=None, seconds=None):
    """Write results.json, the figures as {name}.png and the page of all experiments; print the
    verdict, the table and the page to open; and exit, with 1 if a claim fails.

    result: {"claims": list of Claim, plain values}. It may also have "found": a summary, printed
    before the table, "board": lines that are printed before the summary, and "headlines": those of
    the claims that are printed, if not all are.
    figures: {name: Figure}. seconds: how long the run took.
    """
    figures = figures or {}
    headlines = result.get("headlines", result["claims"])
    titles = {name: figure_title(figure) for name, figure in figures.items()}
    values = result | {"claims": as_dicts(result["claims"]), "figure_titles": titles}
    values.pop("headlines", None)
    write_json(folder / "results.json", replace_nonfinite(values))
    for name, figure in figures.items():
        plotting.save(figure, folder / f"{name}.png")

    if "board" in result:
        print("\n".join(result["board"]), end="\n\n")
    if is_too_short(result, result["claims"]):
        print(textwrap.fill(QUICK_NOTE, WIDTH), end="\n\n")
    if "found" in result:
        print(textwrap.fill(result["found"], WIDTH), end="\n\n")
    print(claims_table(headlines))

    write_index(folder.parent)
    took = "" if seconds is None else f" in {seconds:.0f} s"
    print(f"\nwritten to {folder}{took}")
    print(f"open {page_to_open(folder)}")
    raise SystemExit(exit_code(result["claims"]))


def figure_title(figure):
    """A figure's title in one line; without one, the titles of its panels."""
    titles = [figure.get_suptitle()]
    if not titles[0]:
        titles = [axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")]
    return "; ".join(" ".join(title.split()) for title in titles if title)


def page_to_open(folder):
    """The HTML page of an experiment's folder or, if it has none, the page of all experiments."""
    pages = sorted(folder.glob("*.html"))
    return pages[0] if pages else folder.parent / "index.html"


# What the experiments' own pages begin with; a template adds its title, its own style and the rest.
# Nothing is loaded from elsewhere.
PAGE_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark;
  --page: light-dark(#f6f7f9, #14171c); --card: light-dark(#fff, #1d2129);
  --ink: light-dark(#1c2126, #e6e9ee); --faint: light-dark(#5a646e, #a3adb9);
  --line: light-dark(#d9dee4, #363d48); --look: light-dark(#0b4f85, #7cc7f5);
  --mark: light-dark(#b3470a, #ffb454); --on: light-dark(#fff, #10141a) }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 96rem; padding: 1.2rem; background: var(--page);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.35rem; margin: 0 0 .2rem } h2 { font-size: 1.05rem; margin: 0 0 .3rem }
h3 { font-size: .9rem; margin: .8rem 0 .2rem }
p { margin: .2rem 0; max-width: 62rem } .faint { color: var(--faint); font-size: 13px }
:focus-visible { outline: 3px solid var(--mark); outline-offset: 1px }
button, select, input { font: inherit; font-size: 13px; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; padding: .2rem .55rem; max-width: 100% }
button, select { cursor: pointer }
button[aria-pressed=true] { background: var(--look); border-color: var(--look); color: var(--on) }
.controls { display: flex; flex-wrap: wrap; gap: .35rem 1.4rem; margin: .7rem 0 }
.controls > div { display: flex; flex-wrap: wrap; gap: .25rem .4rem; align-items: center }
.panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .9rem; min-width: 0 }
table { border-collapse: collapse; width: 100%; font-size: 13px }
th, td { font-weight: 400; text-align: left; vertical-align: top; padding: .12rem .5rem .12rem 0;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }
/* a legend: a bar of colours (or a bar as below), its values under it, and what they are */
.legend { margin: .4rem 0; max-width: 30rem; font-size: 12px; line-height: 1.35 }
.ramp { display: block; height: 12px; border: 1px solid var(--line); border-radius: 3px;
  color: var(--look); background: linear-gradient(90deg, var(--card), var(--look)) }
.ends { display: flex; justify-content: space-between; font-size: 12px; color: var(--faint) }
/* an effect as a bar from 0, its interval as a line, and 0 */
.effect { position: relative; display: block; height: 10px; margin: .2rem 0 }
.effect var { position: absolute; top: -1px; bottom: -1px; border-left: 1px solid var(--faint) }
.effect s { position: absolute; height: 6px; top: 2px; background: var(--mark); border-radius: 1px }
.effect em { position: absolute; top: 4.3px; border-top: 1.5px solid var(--ink) }
@media (max-width: 720px) { body { padding: .8rem } }
</style>
"""


# What the pages' scripts have in common.
PAGE_SCRIPT = r"""<script>
"use strict";
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const make = (tag, into, more) =>
  into.appendChild(Object.assign(document.createElement(tag), more));
const minus = text => text.replace("-", "−");

// A token as it can be seen: what would be invisible, or end a line, has a sign.
const signs = { "\n": "↵", "\r": "␍", "\t": "⇥", " ": "·" };
const seen = token => token.replace(/[\n\r\t ]/g, c => signs[c]) || "∅";

// Colours: [red, green, blue] of a style's colour, and a share of the way from one to another
const rgb = text => text.match(/[\d.]+/g).slice(0, 3).map(Number);
const mix = (from, to, share) =>
  from.map((low, part) => Math.round(low + (to[part] - low) * share));
function ink(colour) {  // black or white, whichever stands out more (WCAG's relative luminance)
  const [r, g, b] = colour.map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}
</script>
"""


def rounded(values):
    """Plain values, also in nested lists and dicts, with floats rounded to four digits."""
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    if not isinstance(values, float):
        return values
    return float(f"{values:.4g}") or 0


def write_page(path, template, values):
    """Write an experiment's own page: PAGE_HEAD and the template, with `values`, plain values, in
    the script that the template leaves as {}, and PAGE_SCRIPT after it."""
    # No text in the values may end the script or begin a tag.
    data = json.dumps(values, allow_nan=False).replace("<", "\\u003c")
    before, after = template.read_text(encoding="utf-8").split("{}</script>\n")
    with atomic_write(path, "w") as file:
        file.write(f"{PAGE_HEAD}{before}{data}</script>\n{PAGE_SCRIPT}{after}")


# The page of all experiments

# A table that is wider than the window scrolls in its own box, and its columns stay readable.
STYLE = """body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
font: 15px/1.5 sans-serif }
table { border-collapse: collapse; display: block; overflow-x: auto } td { min-width: 5rem }
td:first-child { min-width: 14rem } td, th { padding: .2rem .7rem; text-align: left;
border-bottom: 1px solid #ddd; font-size: 13px } img { max-width: 100% }
.PASS { color: #00714f } .FAIL { color: #b34700; font-weight: bold }"""


# The page runs no script and loads nothing from elsewhere, whatever a name or a claim contains.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file: data:"
VERDICTS = ("PASS", "FAIL")  # the allowed classes of a cell
VERDICT_NOTE = "A row that ends in PASS or FAIL has a threshold. All other rows are only numbers."
QUICK_NOTE = ("A run with --quick shows that the program works; its numbers come from too little "
              "training to mean anything.")


def escape_text(text):
    """A text as HTML, safe in an attribute's quotes too. Raises TypeError for any other value."""
    if not isinstance(text, str):
        raise TypeError(f"{type(text).__name__} is not a text")
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))  # halves of a surrogate


def relative_address(path):
    """The address of a file, relative to the page in the folder above it."""
    return "/".join(quote_address(os.fsencode(part), safe="") for part in path.parts[-2:])


def index_section(file):
    """The page's section about one experiment, as lines of HTML. file: its results.json.

    Raises UserError, or whatever an unexpected value raises, if the file is not an experiment's.
    """
    result = read_json(file)
    folder = file.parent
    name = escape_text(folder.name)
    is_quick = result.get("settings", {}).get("quick") is True
    claims = [Claim(**{key: value for key, value in line.items() if key != "verdict"})
              for line in result.get("claims", ())]

    lines = [f"<h2>{name}{' (quick run)' if is_quick else ''}</h2>"
             f"<p>{escape_text(result.get('about', ''))}"]
    if is_too_short(result, claims):
        lines.append(f"<p>{QUICK_NOTE}")
    lines.append(f"<p>{escape_text(result.get('found', ''))} {count_verdicts(claims)}")
    if claims:
        lines += table_as_html(claims)

    for page in sorted(folder.glob("*.html")):
        lines.append(f'<p><a href="{relative_address(page)}">{escape_text(page.name)}</a>')
    titles = result.get("figure_titles", {})
    for png in sorted(folder.glob("*.png")):
        seen = titles.get(png.stem) or f"{folder.name}: {png.stem}"
        lines.append(f'<p><img src="{relative_address(png)}" alt="{escape_text(seen)}">')
    return lines


def is_too_short(result, claims):
    """Whether the numbers of a run mean nothing: one with --quick that leaves claims unjudged."""
    is_quick = result.get("settings", {}).get("quick") is True
    return is_quick and not all(claim.verdict for claim in claims)


def count_verdicts(claims):
    """A sentence that says how many of the claims hold, of those that were judged."""
    judged = [each.holds for each in claims if each.verdict]
    if not judged:
        return "No claim was judged."
    if all(judged):
        return f"All {len(judged)} claims hold." if len(judged) > 1 else "The one claim holds."
    return f"{sum(judged)} of {len(judged)} claims hold."


def table_as_html(claims):
    """The claims' table as lines of HTML, without its empty columns."""
    columns = filled_columns(claims)
    kinds = [claim.verdict for claim in claims]
    lines = ["<table>"]
    for number, row in enumerate(zip(*columns, strict=True)):
        cells = [f"<td>{escape_text(text)}</td>" for text in row]
        verdict = kinds[number - 1] if number > 0 else ""
        if verdict in VERDICTS:  # then its column is the last
            cells[-1] = f'<td class="{verdict}">{verdict}</td>'
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return [*lines, "</table>"]


def write_index(out_dir):
    """Write out_dir/index.html: the summaries, tables and figures of all experiments in out_dir, on
    one page that needs no network. Prints to stderr which results can't be read."""
    parts = []
    for file in sorted(Path(out_dir).glob("*/results.json")):
        try:
            parts += index_section(file)
        except (UserError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError,
                OSError):
            print(f"{printable(file)} is not an experiment's results: not in index.html",
                  file=sys.stderr)
    with atomic_write(Path(out_dir) / "index.html", "w") as file:
        file.write("<!doctype html><html lang=en><meta charset=utf-8>"
                   '<meta name="viewport" content="width=device-width, initial-scale=1">'
                   f'<meta http-equiv="Content-Security-Policy" content="{PAGE_POLICY}">'
                   f"<title>experiments</title><style>{STYLE}</style>\n<h1>Experiments</h1>\n"
                   f"<p>{VERDICT_NOTE}\n"
                   + "\n".join(parts) + "\n")
