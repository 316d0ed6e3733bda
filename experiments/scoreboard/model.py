"""Load the models on which circuit methods are scored, with their prompts and the known truth.

Ten models are wired by hand, so their edges are known. The others are trained; chapter 11 explains
how induction is learned, and chapter 12 how suppression is. To add a model, write a function (cfg,
folder, seed, trainings) -> ScoredModel and a line in TRAINED and in `training_steps`.

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Prerequisites: experiments/wired/model.py, circuit_evaluation.py
Next: experiments/scoreboard/measure.py
Source: Mueller et al. 2025 (several methods on several models, on one board)
"""

import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import corpus
from config import ModelConfig, TrainConfig
from experiments.common import train_on_text_, trained_gpt
from experiments.induction.model import WORDS, InductionRecipe, trained_induction_model
from experiments.suppression.model import (
    SuppressionRecipe,
    suppression_pairs,
    trained_suppressor,
)
from experiments.wired.model import Pairs, Truth, all_circuits, draw_one, shuffled
from model import GPT
from tokenizer import WordTokenizer
from utils import seeded_generator

GIFT_CHARACTERS = 400_000  # of the corpus, to train on
N_TEXT = 20  # distinct tokens of an induction prompt, before one of them is repeated


@dataclass(frozen=True)
class ScoredModel:
    """A model, the pairs of prompts on which its circuit is searched, and the truth (or None)."""

    name: str
    model: GPT
    pairs: Pairs
    truth: Truth | None = None

    @property
    def both(self):
        """The arguments of methods: model, clean tokens, corrupted tokens, metric."""
        return (self.model, self.pairs.clean_tokens, self.pairs.corrupted_tokens,
                self.pairs.metric)


def load_models(cfg, folder, seed, trainings=None):
    """Yield the ScoredModel of each circuit wired with a seed, then of each model trained with it.

    cfg: a ScoreboardConfig; folder: the experiment's folder, where trained models are kept;
    trainings: the Trainings that the trained models are among.
    """
    for wired in all_circuits(seed):
        pairs = wired.draw_pairs(cfg.prompts, seeded_generator(seed))
        yield ScoredModel(wired.name, wired.model, pairs, wired.truth)
    for load in TRAINED.values():
        yield load(cfg, folder, seed, trainings)


def training_steps(cfg):
    """The steps of each training of a seed, in the order of TRAINED. cfg: a ScoreboardConfig."""
    return [induction_recipe(cfg).steps, suppression_recipe(cfg, seed=0).steps,
            gift_training(cfg).max_steps]


def as_pairs(drawn):
    """The Pairs of a list of (clean, corrupted, right, wrong)."""
    return Pairs(*(torch.tensor(part) for part in zip(*drawn, strict=True)))


# Induction


def induction_recipe(cfg):
    """The InductionRecipe of a ScoreboardConfig."""
    return InductionRecipe(steps=30) if cfg.quick else InductionRecipe()


def load_induction(cfg, folder, seed, trainings=None):
    """The ScoredModel of an induction model of chapter 11."""
    home = folder / "quick" if cfg.quick else Path(cfg.out_dir) / "induction_head_detection"
    model, _ = trained_induction_model(home, seed, induction_recipe(cfg), retrain=cfg.retrain,
                                       trainings=trainings)
    generator = seeded_generator(seed)
    pairs = as_pairs([induction_pair(generator) for _ in range(cfg.prompts)])
    return ScoredModel("trained induction", model, pairs)


def induction_pair(generator):
    """(clean, corrupted, right, wrong): distinct tokens, then one of them again. In the corrupted
    prompt it first occurred at another place, so that another token followed it."""
    text = shuffled(range(len(WORDS)), generator)[:N_TEXT]
    i = draw_one(range(1, N_TEXT - 1), generator)
    j = draw_one([k for k in range(1, N_TEXT - 1) if abs(k - i) > 1], generator)
    swapped = list(text)
    swapped[i], swapped[j] = text[j], text[i]
    return [*text, text[i]], [*swapped, text[i]], text[i + 1], text[j + 1]


# Suppression


def suppression_recipe(cfg, seed):
    """The SuppressionRecipe of a ScoreboardConfig and a seed."""
    return SuppressionRecipe(seed, steps=30) if cfg.quick else SuppressionRecipe(seed)


def load_suppression(cfg, folder, seed, trainings=None):
    """The ScoredModel of a suppression model of chapter 12; in the clean texts, a token that is
    predicted at the end was seen."""
    home = folder / "quick_suppression" if cfg.quick else Path(cfg.out_dir) / "copy_suppression"
    recipe = suppression_recipe(cfg, seed)
    model = trained_suppressor(home / f"seed_{seed}", recipe, retrain=cfg.retrain,
                               trainings=trainings)
    pairs = suppression_pairs(recipe, cfg.prompts, seeded_generator(seed))
    return ScoredModel("trained suppression", model, pairs)


# Gifts


def gift_training(cfg):
    """The TrainConfig of the models of gifts. cfg: a ScoreboardConfig."""
    return TrainConfig(max_steps=20 if cfg.quick else 2000, lr=8e-3, muon_lr=0.02)


def load_gifts(cfg, folder, seed, trainings=None):
    """The ScoredModel of a model of the built-in corpus, on prompts about who is given a thing."""
    text = corpus.text(GIFT_CHARACTERS)
    tokenizer = WordTokenizer().fit(text)
    shape = ModelConfig(n_layers=2, n_heads=4, d_model=64, n_ctx=32, d_vocab=tokenizer.d_vocab)
    how = gift_training(cfg)

    def train(model):
        train_on_text_(model, torch.tensor(tokenizer.encode(text)), replace(how, batch_size=24),
                       seed, f"gifts, seed {seed}", trainings=trainings)

    model, _ = trained_gpt(folder / f"gifts_seed_{seed}" / "checkpoint.pt", shape, seed, train,
                           tokenizer=tokenizer,
                           settings={"train": asdict(how), "text": GIFT_CHARACTERS},
                           retrain=cfg.retrain, trainings=trainings)
    names = shuffled(itertools.permutations(corpus.NAMES, 2), seeded_generator(seed))
    pairs = as_pairs([gift_pair(tokenizer, *pair) for pair in names[:cfg.prompts]])
    return ScoredModel("trained gifts", model, pairs)


def gift_pair(tokenizer, one, two):
    """(clean, corrupted, right, wrong): `one` gives to `two`; in the corrupted prompt, `two` gives
    to `one`."""
    texts = [f"\nWhen {one} and {two} went to the park, {giver} gave a kite to"
             for giver in (one, two)]
    clean, corrupted = map(tokenizer.encode, texts)
    return clean, corrupted, tokenizer.ids[two], tokenizer.ids[one]


TRAINED = {
    "trained induction": load_induction,
    "trained suppression": load_suppression,
    "trained gifts": load_gifts,
}
