"""Report the benchmark and the race: summaries, tables and figures, and the claims of the race.

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Prerequisites: plotting.py, circuits.py, experiments/speed/measure.py
Next: circuit_evaluation.py
Source: none
"""

import statistics

import torch

import plotting
from experiments.common import claim
from experiments.speed.contestants import NANOGPT, OUR_DEFAULT
from experiments.speed.measure import NO_COUNT, exponents
from experiments.speed.peers import HUGGING_FACE, TRANSFORMER_LENS
from experiments.speed.rows import TIME
from utils import UserError

AS_FAST = "times as fast as "
LIBRARIES = (HUGGING_FACE, TRANSFORMER_LENS)
NEAR = 1.25  # times the floor: the targets of the sweeps
BEGIN = "<!-- written by experiments/benchmark.py --write_page -->"
END = "<!-- until here -->"
COLUMNS = ("what", "time", "floor", "time over floor (range)", "beside it", "target", "")
LABELS = {  # of contestants whose names alone do not say in whose time
    "a third of it": "a third of nanoGPT's time",
    "twice": "twice nanoGPT's time",
    "five times": "five times nanoGPT's time",
}


# The benchmark


def headlines(rows, claims):
    """The claims that the program prints: the first of each short row. claims: {row's name: its
    claims}."""
    return [claims[row["name"]][0] for row in rows if row["is_short"]]


def summarize_benchmark(rows, claims):
    """Two sentences that say what was found, from the measured rows and all their claims."""
    judged = [line for line in claims if line.holds is not None]
    verdicts = "These shapes are tiny: they show that the benchmark runs, not how fast"
    if judged:
        n_met = sum(line.holds for line in judged)
        verdicts = f"{n_met} of {len(judged)} targets are met (benchmark.png)"

    times = {row["name"]: statistics.median(row["values"][TIME])
             for row in with_counted_floor(rows)}
    if not times:
        return f"{verdicts}."
    nearest = min(times, key=times.get)
    farthest = max(times, key=times.get)
    return (f"A floor is what no program can avoid: the multiplications at the rate of a large "
            "matrix product, or the weights at the rate at which memory is read. Nearest to its "
            f"floor is \"{nearest}\", at {times[nearest]:.2f} times it; farthest is "
            f"\"{farthest}\", at {times[farthest]:.2f}. {verdicts}.")


def with_counted_floor(rows):
    """The rows whose floor is counted, not timed."""
    return [row for row in rows if TIME in row["values"] and row["floor"] != NO_COUNT]


def benchmark_figure(rows):
    """The Figure of each row's time over its floor, beside that of the peers; None without rows
    that have a floor."""
    shown = {}
    for row in with_counted_floor(rows):
        ours = torch.tensor(row["values"][TIME])
        contestants = {"this project": ours}
        for quantity, ratios in row["values"].items():
            if quantity.startswith(AS_FAST):
                peer = quantity.removeprefix(AS_FAST)
                peer = peer if peer in LIBRARIES else "a plain loop"
                contestants[peer] = ours * torch.tensor(ratios)

        shown[row["name"]] = {
            name: (ratio.quantile(0.5).item(), ratio.min().item(), ratio.max().item())
            for name, ratio in contestants.items()}
    if not shown:
        return None

    near = sum(row["this project"][0] <= NEAR for row in shown.values())
    return plotting.dot_rows(
        shown,
        title=f"{near} of {len(shown)} computations take at most {NEAR:g} times the least possible",
        xlabel="time over the floor (1: as fast as possible; dot: median; bar: all rounds)")


def scaling_figure(scaling):
    """The Figure of time and memory against size, each relative to the smallest size."""
    figure = plotting.PlainFigure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for axes, what in zip(panels, ("time", "memory"), strict=True):
        lines = {}
        slopes = []
        for name, grown in scaling.items():
            values = grown["bytes"]
            if what == "time":
                values = torch.tensor(grown["seconds"]).quantile(0.5, 0).tolist()
            slope = statistics.median(exponents(grown)[what])
            slopes.append(slope)
            lines[f"{name}: {slope:.2f}"] = ([size / grown["sizes"][0] for size in grown["sizes"]],
                                             [value / values[0] for value in values])

        plotting.bare_axes(axes, f"{what} grows with exponents up to {max(slopes):.2f}",
                           "size (1: the smallest)", "relative to the smallest")
        plotting.draw_lines(axes, lines, {})
        axes.legend(frameon=False, fontsize=7, loc="upper left", title="what grows: exponent",
                    title_fontsize=7, alignment="left")

        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
    return figure


# The page


def benchmark_tables(rows, claims, scaling, ran_on):
    """The tables of docs/speed.md as lines of Markdown.

    claims: {row's name: its claims}. ran_on: {word: text}.
    """
    judged = [line for lines in claims.values() for line in lines if line.holds is not None]
    lines = [f"**{sum(line.holds for line in judged)} of {len(judged)} targets are met.** "
             + "; ".join(f"{word}: {text}" for word, text in ran_on.items()) + ".", "",
             *markdown_row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    for row in rows:
        lines += [line for each in row_cells(row, claims[row["name"]])
                  for line in markdown_row(each)]

    lines += ["", *markdown_row(("what grows", "sizes", "exponent of time (range)",
                                 "exponent of memory", "time at the largest", "memory there")),
              "|" + "---|" * 6]
    for name, grown in scaling.items():
        found = exponents(grown)
        sizes = ", ".join(f"{size:,}" for size in grown["sizes"])
        largest = statistics.median(seconds[-1] for seconds in grown["seconds"])
        lines += markdown_row((
            name, sizes, spread_text(found["time"]), f"{found['memory'][0]:.2f}",
            time_text(largest), f"{grown['bytes'][-1] / 1e6:.3g} MB"))
    return lines


def row_cells(row, claims):
    """The cells of a measured row: one tuple for each of its claims."""
    values = row["values"]
    seconds = statistics.median(values["seconds"])
    floor = values.get("seconds of the floor")
    over = [f"{statistics.median(ratios):.3g} x {quantity.removeprefix('time over ')}"
            for quantity, ratios in values.items() if quantity.startswith("time over ")
            and quantity != TIME]
    peers = [f"{statistics.median(ratios):.3g} x as fast as {quantity.removeprefix(AS_FAST)}"
             for quantity, ratios in values.items() if quantity.startswith(AS_FAST)]
    floor_text = ""
    if floor:
        floor_text = f"{time_text(statistics.median(floor))}: {row['floor']}"

    first, *rest = claims
    cells = [(row["name"], time_text(seconds), floor_text, spread_text(values.get(TIME, [])),
              "; ".join(over + peers), target_text(first, row), first.verdict)]
    return cells + [("", "", "", "", "", target_text(line, row), line.verdict) for line in rest]


def target_text(line, row):
    """What a claim's threshold is about, and what was measured: "time over floor below 1.05"."""
    if line.mark is None:
        return ""
    quantity = line.claim.removeprefix(f"{row['name']}: ")
    threshold = line.control.split(" (median)")[0]
    measured = "" if quantity == TIME else f": {line.measured:.3g}"
    return f"{quantity} {threshold}{measured}"


def time_text(seconds):
    """A time in s, ms or µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def spread_text(values):
    """The median and the range: "1.12 (1.10 to 1.20)"; empty for no values."""
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def markdown_row(cells):
    """Cells as one line of a Markdown table, in a list."""
    return ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"]


def replace_between_marks(page, lines):
    """The page with other lines between its two marks. Raises UserError if it lacks them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"the page has no {BEGIN} and {END}; put them where the tables go")
    return "\n".join([before + begin, "", *lines, "", end + after])


# The race


def race_claims(contestants, races, *, judged=True):
    """[Claim]: each contestant's time and loss. Means over seeds are judged, except nanoGPT's own.

    contestants: {name: Contestant}. races: what `run_race` returned for each seed.
    """
    nanogpt_ends = [curves[NANOGPT][-1] for curves in races]
    nanogpt_loss = statistics.mean(loss for _, loss in nanogpt_ends)
    claims = []
    for name, each in contestants.items():
        ends = [curves[name][-1] for curves in races]
        times = [seconds / nanogpt_seconds for (seconds, _), (nanogpt_seconds, _)
                 in zip(ends, nanogpt_ends, strict=True)]
        losses = [loss for _, loss in ends]
        text = (f"{name} ({each.model.n_layers} layers of {each.model.d_model}, context "
                f"{each.model.n_ctx}, {each.train.max_steps:,} steps)")
        most_loss = nanogpt_loss if each.loss is None else each.loss
        for what, values, most in (("time, in nanoGPT's", times, each.time),
                                   ("validation loss", losses, most_loss)):
            verdict = {}
            if name != NANOGPT:
                verdict = {"between": (0.0, most), "control": f"at most {most:.4g}"}
            claims.append(claim(f"{text}: {what}", statistics.fmean(values), judged=judged,
                                interval=(min(values), max(values)), **verdict))
    return claims


def mean_curves(races):
    """{name: (times as multiples of nanoGPT's, losses)} of each contestant, means over the seeds.
    """
    lines = {}
    for name in races[0]:
        points = torch.tensor([[(seconds / curves[NANOGPT][-1][0], loss)
                                for seconds, loss in curves[name]] for curves in races]).mean(0)
        lines[name] = points.T.tolist()  # [2, evaluation]
    return lines


def summarize_race(claims, races, *, quick=False):
    """Three sentences that say what was found, from the claims and the curves of each seed."""
    lines = mean_curves(races)
    times, losses = lines[OUR_DEFAULT]
    judged = [line for line in claims if line.holds is not None]
    if quick:
        verdicts = "These shapes are tiny: they show that the race runs, not who wins"
    else:
        verdicts = f"{sum(line.holds for line in judged)} of {len(judged)} thresholds are met"
    seeds = "one seed" if len(races) == 1 else f"means of {len(races)} seeds"
    return (
        f"In {times[-1]:.2f} of the time of nanoGPT's recipe, the recipe of train.py reaches "
        f"{losses[-1]:.3f} nats per character on unseen text; nanoGPT's recipe ends at "
        f"{lines[NANOGPT][1][-1]:.3f} ({seeds}). "
        f"In {lines['five times'][0][-1]:.2f} times the time of nanoGPT's recipe, a larger model "
        f"reaches {lines['five times'][1][-1]:.3f}. "
        f"{verdicts} (race.png)."
    )


def race_figure(contestants, races):
    """The Figure of each contestant's mean loss over its time, as a multiple of nanoGPT's, and of
    the threshold that its last point must meet.

    contestants: {name: Contestant as a dict}. races: as `race_claims` takes them.
    """
    lines = mean_curves(races)
    times, losses = lines[OUR_DEFAULT]
    nanogpt_loss = lines[NANOGPT][1][-1]
    figure = plotting.curve(
        {LABELS.get(name, name): line for name, line in lines.items()},
        xlabel="time on the same core (1: that of nanoGPT's recipe)",
        ylabel="loss on the validation split (nats/character)",
        title=(f"train.py reaches {losses[-1]:.2f} nats/character in {times[-1]:.2f} of the time\n"
               f"in which nanoGPT's recipe reaches {nanogpt_loss:.2f}"),
    )

    # the thresholds, each in its contestant's colour; nanoGPT's recipe has none
    axes = figure.axes[0]
    for line, (name, each) in zip(list(axes.lines), contestants.items(), strict=True):
        if name != NANOGPT:
            most_loss = nanogpt_loss if each["loss"] is None else each["loss"]
            axes.plot(each["time"], most_loss, "x", markersize=8, color=line.get_color())
    axes.plot([], [], "x", markersize=8, color="0.35",
              label="threshold: the last dot may lie neither right of it nor above")
    axes.legend(frameon=False, fontsize=9)
    return figure
