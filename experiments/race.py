"""How low a loss, how soon: `train.py` against nanoGPT's recipe for a CPU, on the same cores.

    python experiments/race.py             # an hour, one thread
    python experiments/race.py --quick     # seconds: that it runs, not who wins

Claim: in the time that nanoGPT's recipe takes (1x), and in .35, 2 and 5 times as long, the recipe
of `train.py` reaches a lower loss on Tiny Shakespeare's whole validation split.
Expected: the table in README.md, where a mark that is missed says FAIL; the exit code is then 1.

Each contestant is a model of its own size and a number of steps that was chosen on the last tenth
of the training split; nothing was chosen on the validation split. All take turns, a hundredth of
their steps at a time, so a drift of the machine hits them alike; only the steps are timed. The
recipe is nanoGPT's, the code is ours: biases of MLPs and LayerNorms, which it leaves out, stay.

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Read before: train.py, experiments/benchmark.py; after: nothing
Source: Karpathy's nanoGPT (its README's recipe for a CPU)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import plotting
from config import (
    DataConfig,
    ModelConfig,
    TrainConfig,
    check_field,
    option,
)
from data import load_dataset, random_batch
from experiments.common import check_seeds, over_seeds, perform
from model import GPT
from train import evaluate, fit
from utils import Progress, run_program, seeded_generator

TURNS = 100
LOOKS = 10  # evaluations of each contestant


@dataclass(frozen=True)
class RaceConfig:
    """Which data, how often, with what patience."""

    seeds: tuple[int, ...] = option((0, 1, 2), "a race with each")
    threads: int = option(1, "CPU threads")
    quick: bool = option(False, "tiny shapes on the built-in corpus, no marks")
    folder: str = option("data", "where Tiny Shakespeare is kept")
    out_dir: str = option("outputs", "the folder that race/ is written to")

    def __post_init__(self):
        check_seeds(self)
        check_field(self, "threads", lambda n: n >= 1, "1 or more")


@dataclass(frozen=True)
class Contestant:
    """A model's shape, how it is trained, and its marks: the loss that it must reach (None:
    nanoGPT's own), and the time that it may take, in nanoGPT's."""

    model: ModelConfig
    train: TrainConfig
    time: float = 1.0
    loss: float | None = None


NANO = "nanoGPT's recipe"


def contestants(d_vocab, seed):
    """{name: Contestant}. The first is the recipe for a CPU in nanoGPT's README."""
    nano = Contestant(
        ModelConfig(n_layers=4, n_heads=4, d_model=128, n_ctx=64, d_vocab=d_vocab,
                    tie_embeddings=True, attn_bias=False),
        TrainConfig(max_steps=2000, batch_size=12, optimizer="adamw", lr=1e-3, beta2=0.99,
                    weight_decay=0.1, warmup_steps=100, schedule="cosine", final_lr_fraction=0.1,
                    seed=seed),
    )
    shape, how = ModelConfig(d_vocab=d_vocab), TrainConfig(seed=seed)
    larger = dataclasses.replace(shape, d_model=96, d_mlp=None, n_heads=3, n_ctx=128)
    largest = dataclasses.replace(shape, n_layers=4, d_model=96, d_mlp=None, n_ctx=192)
    return {
        NANO: nano,
        "a third of it": Contestant(shape, dataclasses.replace(how, max_steps=880), 0.35),
        "python train.py": Contestant(shape, how, 1.0, 1.58),
        "twice": Contestant(larger, dataclasses.replace(how, max_steps=3800, batch_size=10,
                                                        muon_lr=0.012), 2.0, 1.53),
        "five times": Contestant(largest, dataclasses.replace(how, max_steps=5700, batch_size=8,
                                                              muon_lr=0.012), 5.0, 1.47),
    }


def starting_model(contestant, name):
    """A fresh GPT; nanoGPT's has torch's own GELU, the exact one, as there."""
    model = GPT(contestant.model, contestant.train.seed)
    if name == NANO:
        for block in model.blocks:
            block.mlp.activation = F.gelu
    return model


def race(dataset, field, progress):
    """{name: list of (seconds, validation loss)}, the last one at the end of its training.

    dataset: a Dataset. field: {name: Contestant}. progress: a Progress over the turns.
    """
    models, runs = {}, {}
    for name, each in field.items():
        models[name] = starting_model(each, name)
        batch = partial(random_batch, dataset.train, each.train.batch_size, each.model.n_ctx,
                        seeded_generator(each.train.seed))
        runs[name] = fit(models[name], batch, each.train)
    seconds, curves = dict.fromkeys(field, 0.0), {name: [] for name in field}
    for turn in range(1, TURNS + 1):
        for name, each in field.items():
            until = turn * each.train.max_steps // TURNS
            before = (turn - 1) * each.train.max_steps // TURNS
            for _ in range(until - before):
                seconds[name] += next(runs[name]).seconds
            if turn % (TURNS // LOOKS) == 0:
                curves[name].append((seconds[name], evaluate(models[name], dataset.val)))
        progress.show(turn, f"nanoGPT {seconds[NANO]:.0f} s")
    return curves


def claims_of(field, races, marked=True):
    """The claims of all contestants but nanoGPT's. races: what `race` returned for each seed."""
    claims = []
    for name, each in field.items():
        ends = [curves[name][-1] for curves in races]
        others = [curves[NANO][-1] for curves in races]
        times = [mine[0] / nano[0] for mine, nano in zip(ends, others, strict=True)]
        losses, theirs = [loss for _, loss in ends], statistics.mean(loss for _, loss in others)
        cfg, mark = each.model, theirs if each.loss is None else each.loss
        text = (f"{name} ({cfg.n_layers} layers of {cfg.d_model}, context {cfg.n_ctx}, "
                f"{each.train.max_steps:,} steps)")
        for what, values, most in (("time, in nanoGPT's", times, each.time),
                                   ("validation loss", losses, mark)):
            verdict = {} if name == NANO or not marked else {
                "holds": statistics.mean(values) <= most, "control": f"at most {most:.4g}",
                "mark": most}
            claims.append(over_seeds(f"{text}: {what}", values, **verdict))
    return claims


def figures(result):
    """The Figure of the mean loss of each contestant over its time, in nanoGPT's."""
    lines, races = {}, result["races"]
    for name in races[0]:
        points = torch.tensor([[(seconds / curves[NANO][-1][0], loss)
                                for seconds, loss in curves[name]] for curves in races]).mean(0)
        lines[name] = points.T.tolist()
    took, ours = (column[-1] for column in lines["python train.py"])
    theirs = lines[NANO][1][-1]
    figure = plotting.curve(
        lines, xlabel="time (in that of nanoGPT's recipe, same core); crosses: marks",
        ylabel="loss on the whole validation split (nats/character)",
        title=(f"In {took:.2f} of the time of nanoGPT's recipe: {ours:.2f} nats/character, "
               f"not {theirs:.2f}"),
    )
    for each in result["field"].values():
        if each["loss"] is not None:
            figure.axes[0].plot(each["time"], each["loss"], "x", color="0.2")
    return {"race": figure}


def quick(each):
    """The same contestant, tiny."""
    shape = dataclasses.replace(each.model, n_layers=1, n_heads=2, d_model=8, d_mlp=None, n_ctx=16)
    return dataclasses.replace(
        each, model=shape, train=dataclasses.replace(each.train, max_steps=TURNS))


def run(cfg, folder):
    """{"claims": list of Claim, "races": the curves of each seed}. cfg: a RaceConfig."""
    data = DataConfig(folder=cfg.folder, dataset="builtin" if cfg.quick else "tiny_shakespeare")
    dataset, races = load_dataset(data, n_ctx=512), []
    if cfg.quick:
        dataset = dataclasses.replace(dataset, val=dataset.val[:2000])
    for seed in cfg.seeds[:1] if cfg.quick else cfg.seeds:
        field = contestants(dataset.tokenizer.d_vocab, seed)
        if cfg.quick:
            field = {name: quick(each) for name, each in field.items()}
        races.append(race(dataset, field, Progress(TURNS, f" turns of seed {seed}")))
    return {"claims": claims_of(field, races, marked=not cfg.quick), "races": races,
            "field": {name: dataclasses.asdict(each) for name, each in field.items()}}


def main(argv=None):
    """The program: races, prints the table, writes outputs/race; a missed mark exits 1."""
    perform(RaceConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
