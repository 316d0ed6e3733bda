"""Time the benchmark's rows against their floors, and find how time and memory grow.

What belongs to a row takes turns, round after round: the row itself, what runs beside it, and the
machine's own limits, a large matrix product and the reading of a large tensor. A ratio is taken
within each round, so a slow moment of the machine slows both of its times. Its median is judged.

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Prerequisites: patching.py, circuits.py, experiments/speed/model.py, experiments/speed/rows.py
Next: experiments/speed/report.py
Source: none
"""

import functools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

import patching
from circuits import Circuit, eap
from experiments.common import add_control, claim, take_turns
from experiments.speed.floors import Work
from experiments.speed.model import SCALING_SHAPE
from experiments.speed.peers import Peers
from experiments.speed.rows import BEYOND, CPU_GROUPS, GROUPS, PEAK, TIME, two_prompts
from utils import seeded_generator

PRODUCT = "a large product"
READING = "reading a large tensor"
NO_COUNT = "the same without our part"  # a floor that is timed, not counted
SECONDS_A_ROW = 25  # no new round begins after this time, once three are done
REPEATS = 10  # of the product and the reading: a disturbance decides the time of a single one
median_claim = functools.partial(claim, median=True)


# The clock and the machine's limits


def clock_of(setting):
    """A function that returns the time in seconds.

    On one CPU thread it is the processor time of this process and of those that it started, which
    does not count what else the machine does. Otherwise it is the time on the wall.
    """
    def processor_time():
        started = os.times()
        return time.process_time() + started.children_user + started.children_system

    def time_on_gpu():
        torch.accelerator.synchronize()  # the GPU may still be computing
        return time.perf_counter()

    if setting.on_gpu:
        return time_on_gpu
    return processor_time if setting.threads == 1 else time.perf_counter


def machine_limits(setting):
    """({name: function}, the products of the first, the numbers read by the second).

    A product of two square matrices is the fastest arithmetic that this machine does; a sum is the
    fastest way to read. Each is repeated REPEATS times. On a GPU both are larger, because a small
    one does not fill it.
    """
    side = 128 if setting.quick else 1024
    n_numbers = 1 << 20 if setting.quick else 1 << 26
    if setting.on_gpu:
        side = 8192
        n_numbers = 1 << 28

    generator = seeded_generator(0)
    left, right = torch.randn(2, side, side, generator=generator).to(setting.device, setting.dtype)
    large = torch.ones(n_numbers, dtype=setting.dtype, device=setting.device)

    def repeated(run):
        def runs():
            for _ in range(REPEATS):
                run()
        return runs

    return ({PRODUCT: repeated(lambda: left @ right), READING: repeated(large.sum)},
            REPEATS * side**3, REPEATS * n_numbers)


def peak_bytes(run, device):
    """The most bytes of tensors that a function holds at once, beyond those that exist before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would print that it runs
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]

    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events
                     if event.get("name") == "[memory]")
    held = 0
    most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


# Rows


def measure_rows(setting, rounds, groups=()):
    """Times all rows, or those of some groups: a list of what `measure_row` returns."""
    peers = Peers(setting)
    limits = machine_limits(setting)
    clock = clock_of(setting)
    found = []
    for group, rows in GROUPS.items():
        if (groups and group not in groups) or (setting.on_gpu and group in CPU_GROUPS):
            continue
        for row in rows(setting, peers):
            found.append(measure_row(setting, row, limits, clock=clock, rounds=rounds))
    return found


def measure_row(setting, row, limits, *, clock, rounds):
    """Times one Row: {"name", "is_short", "targets", "floor": the floor in words, "values":
    {quantity: [round]}}."""
    machine, n_products, n_read = limits
    floors = {}
    if isinstance(row.floor, Work):
        floors = machine
    elif row.floor is not None:
        floors = {"floor": row.floor}
    contestants = {row.name: row.run, **floors, **row.over, **row.peers}

    with torch.set_grad_enabled(row.of_gradients):
        seconds = take_turns(contestants, rounds, clock=clock, most_seconds=SECONDS_A_ROW)
        n_bytes = peak_bytes(row.run, setting.device) if PEAK in row.targets else None

    own = seconds[row.name]
    values = {"seconds": own}
    floor = seconds.get("floor")
    if isinstance(row.floor, Work):
        floor = torch.tensor([
            row.floor.seconds(n_products / product, n_read / reading) for product, reading
            in zip(seconds[PRODUCT].tolist(), seconds[READING].tolist(), strict=True)])
    if floor is not None:
        values |= {"seconds of the floor": floor, TIME: own / floor, BEYOND: own - floor}
    for name in row.over:
        values[f"time over {name}"] = own / seconds[name]
    for name in row.peers:
        values[f"times as fast as {name}"] = seconds[name] / row.peer_share / own
    if row.amount is not None:
        number, unit = row.amount
        values[f"{unit} a second"] = number / own
    if n_bytes is not None:
        values[PEAK] = torch.tensor([n_bytes / 1e9])
    return {"name": row.name, "is_short": row.is_short, "targets": row.targets,
            "floor": describe_floor(row.floor, setting.dtype.itemsize),
            "values": {quantity: value.tolist() for quantity, value in values.items()}}


def describe_floor(floor, n_bytes):
    """A floor in words, with its billions of operations; a number to read has n_bytes."""
    if floor is None:
        return ""
    if not isinstance(floor, Work):
        return NO_COUNT
    words = f"{2e-9 * floor.n_products:.3g} GFLOP"
    return f"{words}, {1e-9 * n_bytes * floor.n_read:.2g} GB" if floor.n_read else words


def row_claims(row, *, judged):
    """[Claim] about one measured row, as `measure_row` returns it: one for each target, the first
    with the row's other ratios beside its threshold; without targets, the time over the floor."""
    values = row["values"]
    targets = row["targets"] or {TIME: {}}
    claims = [median_claim(f"{row['name']}: {quantity}", values[quantity], judged=judged,
                           **threshold) for quantity, threshold in targets.items()]

    others = {TIME: "{:.3g} x its floor"} if TIME in values else {}
    for quantity in values:
        for words in ("time over ", "times as fast as "):
            if quantity.startswith(words) and quantity != TIME:
                kind = "the time of" if words == "time over " else "as fast as"
                others[quantity] = f"{{:.3g}} x {kind} {quantity.removeprefix(words)}"
    notes = [words.format(statistics.median(values[quantity]))
             for quantity, words in others.items() if quantity not in targets]
    if notes:
        claims[0] = add_control(claims[0], "; ".join(notes))
    return claims


# How time and memory grow


def scaling_axes(setting):
    """Yields (name, {size: a function}, whether it needs autograd) of what is made larger."""
    shape = SCALING_SHAPE
    model = setting.model(shape)
    cfg = model.cfg
    pos = 16 if setting.quick else 64

    contexts = (16, 32, 64) if setting.quick else (64, 128, 256, 512, 1024)
    batches = {n: setting.tokens(cfg, 1, n) for n in contexts}
    yield "context", {n: lambda t=t: model(t) for n, t in batches.items()}, False

    depths = (1, 2) if setting.quick else (2, 4, 8, 16)
    models = {n: setting.model(shape | {"n_layers": n}) for n in depths}
    tokens = setting.tokens(cfg, 1, pos)
    yield "depth", {n: lambda m=m: m(tokens) for n, m in models.items()}, False

    batches = {n: setting.tokens(cfg, n, pos) for n in (1, 2, 4, 8, 16)}
    yield "batch", {n: lambda t=t: model(t) for n, t in batches.items()}, False

    sweeps = {}
    for n_prompts in (1, 2, 4, 8):
        clean_tokens, corrupted_tokens, metric = two_prompts(setting, cfg, batch=n_prompts)
        _, cache = model.run_with_cache(clean_tokens)
        sweeps[n_prompts * cfg.n_layers * cfg.n_heads] = functools.partial(
            patching.get_act_patch_attn_head_out_all_pos, model, corrupted_tokens, cache, metric)
    yield "prompts x cells", sweeps, False

    edges = {}
    for each in models.values():
        edges[len(Circuit.of(each))] = functools.partial(eap, each, *two_prompts(setting, cfg))
    yield "edges of a circuit", edges, True


def measure_scaling(setting, rounds):
    """{axis: {"sizes", "seconds": [round][size], "bytes": [size]}}."""
    found = {}
    for name, runs, of_gradients in scaling_axes(setting):
        with torch.set_grad_enabled(of_gradients):
            seconds = take_turns(runs, rounds, clock=clock_of(setting),
                                 most_seconds=SECONDS_A_ROW)
            found[name] = {"sizes": list(runs),
                           "seconds": torch.stack(list(seconds.values()), 1).tolist(),
                           "bytes": [peak_bytes(run, setting.device) for run in runs.values()]}
    return found


def exponent(sizes, values):
    """The slope of log(value) over log(size), by least squares: 1 for twice as much at twice the
    size, 2 for four times as much."""
    x = torch.tensor(sizes).double().log()
    y = torch.tensor(values).double().log()
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def exponents(grown):
    """{"time": one exponent for each round, "memory": [its one exponent]} of what `measure_scaling`
    found for one axis."""
    return {"time": [exponent(grown["sizes"], seconds) for seconds in grown["seconds"]],
            "memory": [exponent(grown["sizes"], grown["bytes"])]}


def scaling_claims(scaling):
    """[Claim], not judged: the exponents of time (one for each round) and of memory."""
    return [median_claim(f"{name}: exponent of {what}", slopes)
            for name, grown in scaling.items()
            for what, slopes in exponents(grown).items()]
