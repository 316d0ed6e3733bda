"""Training for grokking_experiment.py: addition mod p, by a GPT that is asked at "=" alone.

Every text is "a b =", its answer (a + b) mod p or, for a control, a number drawn once and for all.
What is kept of a training are the weights along the way, so that whatever is found in the last
state can be looked for in all the earlier ones.

Chapter: COURSE_ROADMAP.md, 15 (grokking)
Read before: train.py; after: experiments/grokking_fourier.py
Source: Power et al. 2022; Nanda et al. 2023, section 3 (the model and its training)
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn

from config import ModelConfig, TrainConfig, check_field, option
from experiments.common import ExperimentConfig, as_run
from experiments.grokking_fourier import sums
from losses import cross_entropy
from model import GPT
from optim import make_optimizers
from tokenizer import WordTokenizer
from train import fit
from utils import Progress, seeded_generator

SHAPE = {"p": 59, "fraction": 0.6, "d_model": 64, "max_steps": 2200}
CANONICAL = {"p": 113, "fraction": 0.3, "d_model": 128, "max_steps": 1300}
QUICK = {"p": 17, "fraction": 0.6, "d_model": 32, "max_steps": 120}


@dataclass(frozen=True)
class Recipe:
    """All that one training depends on."""

    p: int
    fraction: float
    d_model: int
    weight_decay: float
    lr: float
    max_steps: int
    threads: int
    seed: int
    symmetric: bool
    random_answers: bool = False

    def model_config(self):
        """The shape: Nanda et al.'s, of one layer, with weights that start at 1 / sqrt(d_model)."""
        return ModelConfig(
            n_layers=1, n_heads=4, d_model=self.d_model, n_ctx=3, d_vocab=self.p + 1, norm="none",
            activation="relu", attn_bias=False, init_scale=self.d_model**-0.5)

    def pairs(self):
        """All of them, [p * p, 2], in the order of a grid [a, b]."""
        numbers = torch.arange(self.p)
        return torch.cartesian_prod(numbers, numbers)

    def answers(self):
        """(a + b) mod p for each pair, or numbers drawn once and for all: [p * p]."""
        if not self.random_answers:
            return sums(self.p).flatten()
        return torch.randint(self.p, (self.p**2,), generator=seeded_generator(self.seed + 1))

    def trained_on(self):
        """Which pairs are trained on, [p * p], bool; symmetric: (a, b) goes with (b, a)."""
        drawn = torch.rand(self.p, self.p, generator=seeded_generator(self.seed))
        if self.symmetric:
            drawn = drawn.triu() + drawn.triu(1).T
        return (drawn < drawn.quantile(self.fraction)).flatten()

    def kept_steps(self, n=80):
        """About n steps, each by the same factor later than the one before: 0, 1, 2, …, the last
        one."""
        return sorted({0} | {round(self.max_steps ** (i / (n - 1))) for i in range(n)})


@dataclass(frozen=True)
class GrokkingConfig(ExperimentConfig):
    """What is added, and how it is learned."""

    canonical: bool = option(False, "Nanda et al.'s p, width and split; the first seed alone")
    p: int | None = option(None, "added modulo this odd number (none: 59; canonical: 113)")
    fraction: float | None = option(None, "of the pairs to train on (none: 0.6; canonical: 0.3)")
    d_model: int | None = option(None, "width of the stream (none: 64; canonical: 128)")
    max_steps: int | None = option(None, "of training (none: 2,200; canonical: 1,300)")
    weight_decay: float = option(1.0, "decoupled, on matrices")
    lr: float = option(7e-3, "AdamW's learning rate, constant")

    def __post_init__(self):
        super().__post_init__()
        for name, holds, wanted in (
            ("p", lambda p: 5 <= p <= 199 and p % 2, "odd, from 5 to 199"),
            ("fraction", lambda share: 0.05 <= share <= 0.95, "from 0.05 to 0.95"),
            ("d_model", lambda d: d >= 4 and d % 4 == 0, "a multiple of 4, for 4 heads"),
            ("max_steps", lambda n: n >= 20, "20 or more"),
            ("weight_decay", lambda decay: 0 <= decay < 10, "at least 0 and less than 10"),
            ("lr", lambda lr: 0 < lr < 1, "more than 0 and less than 1"),
        ):
            check_field(self, name, lambda value, holds=holds: value is None or holds(value),
                        wanted)

    @property
    def folder_suffix(self):
        """What the results of Nanda et al.'s setting are kept apart by."""
        return "_canonical" * self.canonical

    def recipes(self):
        """{name: Recipe} of all that is trained: each seed, and two controls with the first."""
        shape = QUICK if self.quick else CANONICAL if self.canonical else SHAPE
        given = {name: getattr(self, name) for name in shape if getattr(self, name) is not None}
        first = Recipe(**shape | given, weight_decay=self.weight_decay, lr=self.lr,
                       threads=self.threads, seed=self.seeds[0], symmetric=not self.canonical)
        if self.canonical:
            return {f"canonical_seed_{first.seed}": first}
        seeds = self.seeds[:1] if self.quick else self.seeds
        return {f"seed_{seed}": dataclasses.replace(first, seed=seed) for seed in seeds} | {
            "no_decay": dataclasses.replace(first, weight_decay=0.0),
            "random_answers": dataclasses.replace(first, random_answers=True)}


class AtEquals(nn.Module):
    """The logits of the p numbers after "a b =", and nothing else of what the model would say.

    In one layer without LayerNorm, what "=" reads of a number depends on that number and its place
    alone. So keys and values are made once for each number in each of two places, and only "=" goes
    on from there: exactly what the model says there, in a quarter of the time.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.p = model, model.cfg.d_vocab - 1

    def forward(self, pairs):
        """pairs [n, 2] -> logits [n, p]."""
        attn, mlp = self.model.blocks[0].attn, self.model.blocks[0].mlp
        places = torch.arange(2)[:, None].expand(2, self.p)
        numbers = self.model.embed(torch.arange(self.p).expand(2, self.p), places)
        equals = self.model.embed(torch.tensor([[self.p]]), torch.tensor([2]))  # [1, 1, d_model]
        q, own_k, own_v = attn.project(equals, equals, equals)  # [1, 1, head, d_head]
        _, k, v = attn.project(numbers, numbers, numbers)  # [place, p, head, d_head]
        scores = (k * q).sum(-1) / math.sqrt(attn.d_head)  # [place, p, head]
        own = (own_k * q).sum(-1)[0] / math.sqrt(attn.d_head)  # [1, head]
        a, b = pairs.unbind(1)
        scores = torch.stack([scores[0][a], scores[1][b], own.expand(len(pairs), -1)])
        pattern = scores.softmax(0).unsqueeze(-1)  # [key, n, head, 1]: rows of three are slow
        from_a, from_b, from_own = pattern
        z = from_a * v[0][a] + from_b * v[1][b] + from_own * own_v[0]  # [n, head, d_head]
        resid = equals + attn.write(z.unsqueeze(1))  # [n, 1, d_model]
        resid = resid + mlp(resid)
        return self.model.unembed(resid)[:, 0, :self.p]


def exact_loss(logits, answers):
    """Cross-entropy from float64 log-probabilities: in float32 a loss of 1e-7 is rounding, and its
    gradient throws the weights about."""
    return cross_entropy(logits.double(), answers)


def trained(recipe, name):
    """The model of a Recipe as a run's dict, with the weights of `kept_steps` as its history."""
    model = GPT(recipe.model_config(), recipe.seed)
    known = recipe.trained_on()
    batch = recipe.pairs()[known], recipe.answers()[known]
    how = TrainConfig(
        max_steps=recipe.max_steps, optimizer="adamw", lr=recipe.lr, beta2=0.98, warmup_steps=10,
        weight_decay=recipe.weight_decay, final_lr_fraction=1.0, grad_clip=0.0)
    steps, progress = recipe.kept_steps(), Progress(recipe.max_steps, " steps")
    history = [copied(model)]
    for step in fit(AtEquals(model), lambda: batch, how, loss_fn=exact_loss,
                    optimizers=make_optimizers(model, how)):
        if step.number in steps:
            history.append(copied(model))
        progress.show(step.number, f"{name}: loss {step.loss:.2g}")
    progress.close()
    weights = {key: torch.stack([each[key] for each in history]) for key in history[0]}
    return as_run(model, numbers_tokenizer(recipe.p), history={"steps": steps, "weights": weights})


def copied(model):
    """{name: weight}, detached from what training does next."""
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def numbers_tokenizer(p):
    """Reads "3 4 =": the id of a number is the number, that of "=" is p."""
    words = [*map(str, range(p)), "="]
    return WordTokenizer().load_state_dict({"kind": "word", "symbols": words})


@torch.no_grad()
def history_of(recipe, state):
    """Yields (step, model, logits [a, b, c] in float64) of each state that was kept."""
    model, p = GPT(recipe.model_config(), seed=None).eval(), recipe.p
    history, pairs = state["history"], recipe.pairs()
    for i, step in enumerate(history["steps"]):
        model.load_weights_({key: each[i] for key, each in history["weights"].items()}, "history")
        yield step, model, AtEquals(model)(pairs).double().view(p, p, p)
