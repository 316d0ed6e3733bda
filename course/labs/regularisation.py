"""Regularisation and early stopping: what each buys when a model memorises its training text.

    python course/labs/regularisation.py             # 2 minutes, one thread
    python course/labs/regularisation.py --quick     # seconds: that it runs, not what comes out

A model is trained on 40 stories of the built-in corpus, again and again, until it knows them by
heart. Three remedies are compared on new stories: strong weight decay, dropout, and early stopping,
which keeps the state with the lowest loss on a third set of stories. The entropy of the corpus is
known, so every loss is given as its gap to the best possible one (nats per word).

Claim: without a remedy, the model's loss on its own text falls below the entropy: it knows by heart
what nobody can predict. On new stories it pays for this, and each remedy saves half a nat or more.
Control: 6,000 stories. The model reads about half of them, once, and stays above their entropy.
Early stopping saves nothing there, and weight decay and dropout have a cost.
Expected: every line with a verdict passes. A seed takes 30 s (CPU, one core).

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Prerequisites: corpus.py, optim.py, train.py
Next: activation_cache.py
Source: Srivastava et al. 2014 (dropout); Loshchilov & Hutter 2019 (decoupled weight decay);
Prechelt 1998 (early stopping)
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

import corpus
from config import ModelConfig, TrainConfig, check_field, option
from data import random_batch
from experiments.common import LabConfig, Trainings, mean_text, perform, seed_claim
from model import GPT
from plotting import PlainFigure, bare_axes, draw_lines
from tokenizer import WordTokenizer
from train import fit, token_losses
from utils import run_program, seeded_generator

SHAPE = ModelConfig(n_layers=2, n_heads=4, d_model=48, n_ctx=32)
AMOUNTS = ("few", "many")  # stories to train on
N_NEW = 150  # stories to judge on; 60 others to choose when to stop
N_STOP = 60
LOOKS = 10  # evenly spaced, at which early stopping may stop


@dataclass(frozen=True)
class RegularisationConfig(LabConfig):
    """Settings of the lab."""

    stories: int = option(40, "stories to train on, where they are few")
    many_stories: int = option(6000, "stories to train on in the control, where they are plenty")
    steps: int = option(300, "steps of each training")
    weight_decay: float = option(3.0, "the decay of the remedy; the library's default is 0.1")
    dropout: float = option(0.4, "share of activations zeroed in training, of the remedy")

    def __post_init__(self):
        super().__post_init__()
        check_field(self, "stories", lambda n: n >= 10, "10 or more")
        check_field(self, "many_stories", lambda n: n >= self.stories, "as many as the few or more")
        check_field(self, "steps", lambda n: n >= LOOKS, f"{LOOKS} or more")

    @property
    def remedies(self):
        """{name: (weight decay, dropout)} of the models to train."""
        return {"nothing": (0.0, 0.0), "weight decay": (self.weight_decay, 0.0),
                "dropout": (0.0, self.dropout)}


# What is measured


@dataclass(frozen=True)
class Stories:
    """Stories of the built-in corpus: their ids, tokens [n], and the best possible prediction."""

    tokens: torch.Tensor
    floor: corpus.Floor

    def gap(self, model):
        """The mean loss of a model above the entropy, in nats per word; negative on a text that it
        has learned by heart."""
        losses = token_losses(model, self.tokens, 64, self.floor.starts)
        return self.floor.above(torch.tensor(list(losses)))["all"]


def draw_stories(n_stories, seed, tokenizer):
    """Stories of a seed; for the same seed, fewer are the beginning of more."""
    sample = corpus.sample(n_stories, seed)
    tokens = torch.tensor(tokenizer.encode(corpus.spell(sample.words)))
    return Stories(tokens, corpus.floor_of(sample, tokenizer, tokens))


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "seeds": [{amount: {remedy: measures}}]}.

    cfg: a RegularisationConfig. measures: what `measure_training` returns.
    """
    if cfg.quick:
        cfg = replace(cfg, steps=10, many_stories=200, seeds=cfg.seeds[:1])

    # The tokenizer needs every word of the corpus, and a few stories may lack some
    tokenizer = WordTokenizer().fit(corpus.text(200_000))
    shape = replace(SHAPE, d_vocab=tokenizer.d_vocab)
    trainings = Trainings([cfg.steps] * len(cfg.seeds) * len(AMOUNTS) * len(cfg.remedies))

    seeds = []
    for seed in cfg.seeds:
        texts = draw_texts(cfg, seed, tokenizer)
        measures = {amount: {} for amount in AMOUNTS}
        for amount in AMOUNTS:
            for name, (weight_decay, dropout) in cfg.remedies.items():
                model = GPT(replace(shape, dropout=dropout), seed)
                how = TrainConfig(max_steps=cfg.steps, weight_decay=weight_decay, seed=seed)
                trainings.begin(f"seed {seed}, {amount} stories, {name}")
                measures[amount][name] = measure_training(model, how, texts, amount, trainings)
                trainings.close()
                trainings.count()
        seeds.append(measures)
    return {"found": describe(seeds), "claims": claims_of(seeds, judged=not cfg.quick),
            "seeds": seeds}


def draw_texts(cfg, seed, tokenizer):
    """{"few", "many": to train on, the few are the first of the many; "stop": to stop by; "new": to
    judge on}, each Stories."""
    return {"few": draw_stories(cfg.stories, 3 * seed, tokenizer),
            "many": draw_stories(cfg.many_stories, 3 * seed, tokenizer),
            "stop": draw_stories(N_STOP, 3 * seed + 1, tokenizer),
            "new": draw_stories(N_NEW, 3 * seed + 2, tokenizer)}


def measure_training(model, how, texts, amount, trainings):
    """Train a model in place on texts[amount], and measure its gaps, in nats per word: a dict.

    how: a TrainConfig. "steps", "stop" and "new": lists with an item for each look, the gaps on the
    texts of these names. "last": the gap on new stories of the last state; "stopped": of the state
    with the lowest gap on "stop". "own": the last state's gap on the few stories of the training.
    """
    tokens = texts[amount].tokens
    generator = seeded_generator(how.seed)
    torch.manual_seed(how.seed)  # for dropout, which cannot take a generator

    def next_batch():
        return random_batch(tokens, how.batch_size, model.cfg.n_ctx, generator)

    looks = {"steps": [], "stop": [], "new": []}
    for step in fit(model, next_batch, how):
        trainings.show(step.number, f"loss {step.loss:.2f}")
        if step.number % (how.max_steps // LOOKS) == 0:
            looks["steps"].append(step.number)
            for name in ("stop", "new"):
                looks[name].append(texts[name].gap(model))

    best = looks["stop"].index(min(looks["stop"]))
    return looks | {"last": looks["new"][-1], "stopped": looks["new"][best],
                    "own": texts["few"].gap(model)}


# What it shows


def claims_of(seeds, judged=True):
    """[Claim] about the measures of each seed. The thresholds were chosen on seeds 0 and 1
    and judged on seeds 10 to 12."""

    def saved(name, amount="few"):
        """What a remedy saves: the last state's gap without it, minus that with it."""
        return lambda seed: seed[amount]["nothing"]["last"] - seed[amount][name]["last"]

    def saved_by_stopping(amount="few"):
        return lambda seed: seed[amount]["nothing"]["last"] - seed[amount]["nothing"]["stopped"]

    def beside(value):
        return f"many stories: {mean_text(seeds, value)}"

    return [
        seed_claim("few stories, no remedy: loss on them minus entropy (nats per word)", seeds,
                   lambda seed: seed["few"]["nothing"]["own"], below=-0.2, judged=judged,
                   beside=beside(lambda seed: seed["many"]["nothing"]["own"])),
        seed_claim("… gap on new stories", seeds, lambda seed: seed["few"]["nothing"]["last"],
                   control=beside(lambda seed: seed["many"]["nothing"]["last"])),
        seed_claim("… saved by early stopping", seeds, saved_by_stopping(), above=0.5,
                   judged=judged),
        seed_claim("… saved by weight decay", seeds, saved("weight decay"), above=0.5,
                   judged=judged),
        seed_claim("… saved by dropout", seeds, saved("dropout"), above=0.5, judged=judged),
        seed_claim("… saved by dropout, more than by early stopping", seeds,
                   lambda seed: saved("dropout")(seed) - saved_by_stopping()(seed)),
        seed_claim("many stories: saved by early stopping", seeds, saved_by_stopping("many"),
                   between=(-0.01, 0.01), judged=judged),
        seed_claim("… cost of weight decay", seeds,
                   lambda seed: -saved("weight decay", "many")(seed), above=0, judged=judged),
        seed_claim("… cost of dropout", seeds,
                   lambda seed: -saved("dropout", "many")(seed), above=0, judged=judged),
    ]


def describe(seeds):
    """The summary of all seeds' measures."""
    gaps = {amount: {name: mean_text(seeds, lambda seed, amount=amount, name=name:
                                     seed[amount][name]["last"])
                     for name in seeds[0][amount]} for amount in AMOUNTS}
    stopped = mean_text(seeds, lambda seed: seed["few"]["nothing"]["stopped"])
    few, many = (", ".join(f"{name} {gap}" for name, gap in gaps[amount].items())
                 for amount in AMOUNTS)
    return (f"Gap to the entropy on new stories, in nats per word, after training on few: {few}; "
            f"stopped early {stopped}. On many: {many} (regularisation.png).")


def figures(result):
    """{name: Figure}: the gap on new stories over the first seed's trainings."""
    figure = PlainFigure(figsize=(10, 4.2), layout="constrained")
    for axes, amount in zip(figure.subplots(1, 2, sharey=True), AMOUNTS, strict=True):
        measures = result["seeds"][0][amount]
        lines = {name: (one["steps"], one["new"]) for name, one in measures.items()}
        own = measures["nothing"]["own"]
        title = f"{amount} stories; without a remedy, a gap of {own:+.2f} on them"
        draw_lines(bare_axes(axes, title, "step", "gap on new stories (nats/word)"), lines,
                   {"the entropy": 0.0})
    return {"regularisation": figure}


def main(argv=None):
    """Run the program: train, measure, print the table, write the figure."""
    perform(RegularisationConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)

# Extend it:
# - Stop by ending: train for the steps after which "nothing" was best, with --steps. The learning
#   rate then falls to 0 there. Does that beat the state that early stopping keeps?
# - Use both: a remedy with decay and dropout together, in `remedies`. Do their savings add up?
# - A smaller model is a remedy as well. Set d_model in SHAPE to 16: is the gap on new stories
#   smaller, and what does the model lose on many stories?
