"""What all experiments share: claims and their table, kept models, and the program around them.

An experiment is a `run(cfg, folder)` that measures and a list of claims on what it measured. All
else is the same for each of them and stands here: the flags, the folder, the trained models that
are read again on a second run, the printed table, results.json and the page of all experiments.

Chapter: COURSE_ROADMAP.md, 6 (learn and sample); the form of a claim: chapter 0
Prerequisites: config.py, checkpoint.py, train.py
Next: experiments/benchmark.py
Source: the form of a claim is that of chapter 0
"""

import contextlib
import hashlib
import html
import itertools
import json
import math
import os
import statistics
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote as quote_address

import torch

import plotting
from checkpoint import (
    config_of,
    find_run,
    is_pretrained,
    load_checkpoint,
    reload_dataset,
    save_checkpoint,
)
from config import SEEDS, Config, check_field, config_from_dict, flag_parser, option
from losses import cross_entropy
from model import GPT
from train import fit
from utils import (
    Progress,
    UserError,
    atomic_write,
    printable,
    read_json,
    read_torch_file,
    write_json,
)

HEADINGS = ("claim", "published", "measured", "range or 95 % CI", "compared with", "")
WRAPPED = ("claim", "published", "compared with")  # the columns of text, not of numbers
ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100  # characters a line of what is printed

# Claims


@dataclass(frozen=True)
class Claim:
    """One line of an experiment's table.

    measured: the number, which `low` and `high` enclose. holds: whether it is what was claimed;
    None where it is only for information. reported: by whom and how much, elsewhere.
    control: what the same measurement gives where the claim says nothing, or the mark that it is
    held against; mark: that number, where there is one. A number is None where results.json held
    one that is not finite.
    """

    claim: str
    measured: float | None
    low: float | None
    high: float | None
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
          interval=None, median=False, reported="", control=None, mark=None):
    """One line of the table: a Claim on a number, or on one number a seed (model, round).

    values: a number, or a list or tensor of them; the line shows their mean (or median) and their
    range, or the interval (low, high) that is given in the range's place.
    above, below: every value must lie strictly above, or below, this number; between: (low, high),
    both included; they are written here and nowhere else, and become the line's mark and, where no
    control is given, its control. median: compare the median alone, as timings are judged.
    holds: the verdict of a test that is not a threshold on the values (a p-value, another model);
    with a threshold, both must hold. judged: False leaves the line open (a quick run, a model that
    somebody brought). reported, control, mark: as in a Claim.
    """
    values = torch.as_tensor(values, dtype=torch.float64).reshape(-1).tolist()
    centre = statistics.median(values) if median else statistics.fmean(values)
    low, high = (min(values), max(values)) if interval is None else interval

    # The verdict: every test must hold.
    compared = [centre] if median else values
    tests = [] if holds is None else [holds]
    if above is not None:
        tests += [value > above for value in compared]
    if below is not None:
        tests += [value < below for value in compared]
    if between is not None:
        tests += [between[0] <= value <= between[1] for value in compared]
    verdict = all(tests) if tests and judged else None

    # The thresholds again, for the reader (words) and for what reads results.json (marks).
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
    if control is None:
        control = " and ".join(words)
    if mark is None and marks:
        mark = marks[0]
    return Claim(text, centre, low, high, verdict, reported, control, mark)


def seed_claim(text, seeds, value, *, beside=None, **how):
    """A `claim` on value(result) of every seed. beside: as in `add_control`; how: as in `claim`."""
    line = claim(text, [value(result) for result in seeds], **how)
    return line if beside is None else add_control(line, beside)


def add_control(line, control):
    """A Claim that names, behind its threshold, what else the same measurement gives."""
    return replace(line, control=f"{line.control}; {control}" if line.control else control)


def mean_text(seeds, value):
    """The mean of value(result) over the seeds, as a text of two digits."""
    return f"{statistics.fmean(map(value, seeds)):.2g}"


def claims_table(claims):
    """The claims as a table between `|`, at most WIDTH wide, to be read as it is.

    A long cell goes on in the lines below, within its column. An empty column is left out.
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
    """The width of each column: that of its longest cell, but columns of text are made narrower
    until the table fits, such that it gets few lines. columns: tuples of texts, the heading first.
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
    """The lines of one row of the table; all but the first are indented, so that one sees where a
    row begins."""
    wrapped = [textwrap.wrap(cell, width, subsequent_indent="  ", break_on_hyphens=False)
               for cell, width in zip(cells, widths, strict=True)]
    lines = itertools.zip_longest(*wrapped, fillvalue="")
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            + " |" for line in lines]


def as_dicts(claims):
    """The claims as plain values, for results.json."""
    return [asdict(each) | {"verdict": each.verdict} for each in claims]


def replace_nonfinite(values):
    """Plain values, dicts, lists and tuples among them, with None for what JSON has no number for:
    NaN and infinity."""
    if isinstance(values, dict):
        return {name: replace_nonfinite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [replace_nonfinite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def exit_code(claims):
    """0 where no claim fails, else 1."""
    return int(any(each.holds is False for each in claims))


# What an experiment is told


@dataclass(frozen=True)
class ExperimentConfig:
    """What each experiment that trains can be told; its own settings are added below these."""

    seeds: tuple[int, ...] = option((0, 1, 2), "a training with each")
    retrain: bool = option(False, "train anew, though the trained models are there")
    threads: int = option(1, "CPU threads")
    quick: bool = option(False, "a small one, to see that it runs")
    out_dir: str = option("outputs", "the folder that the experiment's own is made in")

    def __post_init__(self):
        check_seeds(self)
        check_field(self, "threads", lambda n: n >= 1, "1 or more")
        run_name, model = self.other_model
        if run_name is not None and model is not None:
            raise UserError(f"run_name={run_name!r} and model={model!r} are both given; choose one")
        if run_name is not None:
            find_run(run_name, self.out_dir)  # before a folder is made for what it gives

    @property
    def other_model(self):
        """(run_name, model): where an experiment can look at another model than its own."""
        return getattr(self, "run_name", None), getattr(self, "model", None)

    @property
    def folder_suffix(self):
        """What is added to the folder's name for another model's results."""
        parts = []
        for name in filter(None, self.other_model):
            parts += [part for part in Path(name).parts[-2:] if part not in ("/", ".", "..")]
        return "".join(f"_{part}" for part in parts)


def check_pretrained(name):
    """Raises UserError, which lists those that there are, for what is no published model and no
    folder of one. None is none."""
    if name is not None and not is_pretrained(name):
        GPT.from_pretrained(name)


def check_seeds(cfg):
    """Raises UserError unless a config has seeds, each of them once: one that comes twice would
    count as two independent trainings."""
    in_range, wanted = SEEDS

    def differ_and_fit(seeds):
        return len(seeds) == len(set(seeds)) > 0 and all(map(in_range, seeds))

    check_field(cfg, "seeds", differ_and_fit, f"one or more, each once and {wanted}")


def experiment_folder(name, out_dir):
    """out_dir/name, made before anything is computed. UserError where it can't be written to."""
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
    """A dict of tensors and plain values: read from `path` where it was made with the same
    settings, else made by `make()` and written there. retrain: make it in any case.

    settings: a dict of all that it depends on, but for torch's version and the number of threads,
    which are added. An edit of the code is noticed only where `code_digest` is among them: pass
    `retrain` then.
    """
    added = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    settings = json.loads(json.dumps(settings | added))

    if not retrain and path.exists():
        with contextlib.suppress(Exception):  # what can't be read is made anew
            state = read_torch_file(path, "a kept model", "train it anew with --retrain")
            if state["settings"] == settings:
                return state

    state = make() | {"settings": settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, state)
    return state


def code_digest(root=ROOT):
    """A checksum of the modules in `root` and of all in its experiments/, as a text: what a kept
    result depends on beside its settings."""
    digest = hashlib.sha256()
    for file in sorted([*root.glob("*.py"), *root.glob("experiments/**/*.py")]):
        code = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(code)}\n".encode() + code)
    return digest.hexdigest()


def as_run(model, tokenizer, **more):
    """A model as the dict of a checkpoint.pt, which `load_model` reads; and `more`."""
    return {"model": model.state_dict(), "optimizer": [], "step": 0,
            "config": asdict(Config(model=model.cfg)), "tokenizer": tokenizer.state_dict()} | more


class Trainings:
    """The progress of all trainings of an experiment: which one runs, and the time left over all.

    steps: a list of the steps of each training, in the order in which the models are made. A model
    that is kept from an earlier run counts as one of them, but not as time.
    """

    def __init__(self, steps):
        self.steps = list(steps)
        self.n_ready = 0  # models that are there: trained, or read
        self.steps_trained = 0
        self.seconds = 0.0  # that these steps took

    def begin(self, label):
        """Starts the progress line of the next training: `training 2 of 9: {label}`."""
        n_trainings = len(self.steps)
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
        """Shows the training's number, label and step, `text`, and the time left over all."""
        self.step = step
        line = f"{self.label}: {text}" if text else self.label
        self.progress.show(self.steps_before + step, line)

    def close(self):
        """Ends the line of a training, and remembers how long it took."""
        self.progress.close()
        self.steps_trained += self.step
        self.seconds += time.monotonic() - self.began

    def count(self):
        """Counts one more model that is there, whether it was trained or read."""
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

    state = load_or_make(path, settings | {"shape": asdict(cfg), "seed": seed}, make, retrain)
    if trainings is not None:
        trainings.count()
    model = GPT(cfg, seed=None)
    model.load_weights_(state["model"], path)
    return model.eval(), state


def fit_with_progress(model, next_batch, how, label, *, loss_fn=cross_entropy, trainings=None):
    """Trains the model in place and shows a progress line that names the training by `label`.

    next_batch() -> (inputs, targets). how: a TrainConfig. loss_fn: as in `fit`. trainings: the
    Trainings that this is one of; without them it is shown alone.
    """
    trainings = trainings or Trainings([how.max_steps])
    trainings.begin(label)
    for step in fit(model, next_batch, how, loss_fn=loss_fn):
        trainings.show(step.number, f"loss {step.loss:.2f}")
    trainings.close()


def validation_tokens(run):
    """The ids [n] that a run of train.py was validated on.

    run: its folder. Raises UserError where the run does not say what text it was trained on, and
    where that text can't be had any more.
    """
    path = Path(run) / "checkpoint.pt"
    state = load_checkpoint(path)
    if "data_sha256" not in state:
        raise UserError(f"{run} does not say what text it was trained on; name a run of train.py")
    return reload_dataset(Path(run), state, config_of(state, path)).val


# Timing


def take_turns(contestants, rounds):
    """{name: seconds of each round}: all run once unmeasured, then in turn, round after round.

    contestants: {name: function without arguments}.
    """
    seconds = {name: [] for name in contestants}
    progress = Progress(rounds, " rounds")
    for number in range(rounds + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if number > 0:
                seconds[name].append(time.perf_counter() - began)
        progress.show(number, " against ".join(contestants))
    return {name: torch.tensor(each) for name, each in seconds.items()}


# The program around an experiment


@contextlib.contextmanager
def torch_threads(n):
    """While open, torch computes with n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def perform(config_class, run, figures, about, *, argv=None):
    """The program of an experiment: reads the flags, runs, writes what came out, and ends.

    config_class: its settings, a dataclass with threads and out_dir. run(cfg, folder) -> {"found":
    two or three sentences that say in plain words what came out, "claims": list of Claim, plain
    values}.
    figures(result) -> {name: Figure}. about: its docstring; its first line says what it shows. The
    config's `folder_suffix`, where it has one, is added to the folder's name, and "_quick" for a
    quick one, so that these lie beside the experiment's own results.
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
            folder.rmdir()  # where nothing came of it
        raise

    result |= {"about": title, "settings": asdict(cfg), "torch": torch.__version__}
    conclude(result, folder, figures(result), seconds=time.monotonic() - began)


def program_name(about):
    """The name of a program, from the command in its docstring."""
    commands = [line for line in about.split("\n") if "python experiments/" in line]
    return commands[0].split("/")[-1].split(".py")[0]


def conclude(result, folder, figures=None, seconds=None):
    """Writes results.json, the figures as {name}.png and the page of all experiments, prints what
    was found and the table, and ends the program: a failed claim exits with 1.

    result: {"claims": list of Claim, plain values, "found": what was found, if it is said,
    "board": lines to print before it, if there are any}.
    figures: {name: Figure}. seconds: it took.
    """
    figures = figures or {}
    titles = {name: figure_title(figure) for name, figure in figures.items()}
    values = result | {"claims": as_dicts(result["claims"]), "figure_titles": titles}
    write_json(folder / "results.json", replace_nonfinite(values))
    for name, figure in figures.items():
        plotting.save(figure, folder / f"{name}.png")

    if "board" in result:
        print("\n".join(result["board"]), end="\n\n")
    if "found" in result:
        print(textwrap.fill(result["found"], WIDTH), end="\n\n")
    print(claims_table(result["claims"]))

    write_index(folder.parent)
    took = "" if seconds is None else f" in {seconds:.0f} s"
    print(f"\nwritten to {folder}{took}")
    print(f"open {page_to_open(folder)}")
    raise SystemExit(exit_code(result["claims"]))


def figure_title(figure):
    """What a figure says of itself, in one line: its title, or else those of its panels."""
    titles = [figure.get_suptitle()]
    if not titles[0]:
        titles = [axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")]
    return "; ".join(" ".join(title.split()) for title in titles if title)


def page_to_open(folder):
    """The HTML page of an experiment's folder or, where it has none, the page of them all."""
    pages = sorted(folder.glob("*.html"))
    return pages[0] if pages else folder.parent / "index.html"


def write_page(path, template, values):
    """Writes an experiment's own page: its template, with what it draws, plain values, in the
    script that the template leaves as {}."""
    # Nothing that a text holds may end the script or begin a tag.
    data = json.dumps(values, allow_nan=False).replace("<", "\\u003c")
    before, after = template.read_text(encoding="utf-8").split("{}</script>")
    with atomic_write(path, "w") as file:
        file.write(f"{before}{data}</script>{after}")


# The page of all experiments

STYLE = """body { max-width: 60rem; margin: 2rem auto; font: 15px/1.5 sans-serif; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem .7rem; text-align: left;
border-bottom: 1px solid #ddd; font-size: 13px } img { max-width: 100% }
.PASS { color: #00714f } .FAIL { color: #b34700; font-weight: bold }"""


# Nothing is run or loaded from elsewhere, whatever a name or a claim says.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file: data:"
VERDICTS = ("PASS", "FAIL")  # what may be the class of a cell
QUICK_NOTE = ("A run with --quick shows that the program works; its numbers come from too little "
              "training to mean anything.")


def escape_text(text):
    """A text as HTML, in an attribute's quotes too. Raises TypeError for another kind of value."""
    if not isinstance(text, str):
        raise TypeError(f"{type(text).__name__} is no text")
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))  # halves of a surrogate


def relative_address(path):
    """The address of a file, from the page in the folder above its own."""
    return "/".join(quote_address(os.fsencode(part), safe="") for part in path.parts[-2:])


def index_section(file):
    """What the page says of one experiment, lines of HTML. file: its results.json.

    Raises UserError, or what a value of an unexpected kind raises, for results of another make.
    """
    result = read_json(file)
    folder = file.parent
    name = escape_text(folder.name)
    is_quick = result.get("settings", {}).get("quick") is True
    claims = [Claim(**{key: value for key, value in line.items() if key != "verdict"})
              for line in result.get("claims", ())]

    lines = [f"<h2>{name}{' (quick run)' if is_quick else ''}</h2>"
             f"<p>{escape_text(result.get('about', ''))}"]
    if is_quick:
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
    """Writes out_dir/index.html: every figure and table of the experiments whose results lie in
    out_dir, in one page that needs no network. Says on stderr whose can't be read."""
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
                   f'<meta http-equiv="Content-Security-Policy" content="{PAGE_POLICY}">'
                   f"<title>experiments</title><style>{STYLE}</style>\n<h1>Experiments</h1>\n"
                   + "\n".join(parts) + "\n")
