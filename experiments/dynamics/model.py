"""Train models on texts, and keep their weights along the way.

Three models are trained for each seed: one on characters; one on the words of the built-in corpus,
where the floor of each kind of word is known; and, as a control, one on characters without a layer,
which can learn no more than bigrams. Weights are kept at steps that are spaced by a constant
factor, since most changes come early.

Chapter: COURSE_ROADMAP.md, 15 (grokking and training dynamics)
Prerequisites: train.py, experiments/grokking/model.py
Next: experiments/dynamics/measure.py
Source: the word-level recipe is that of chapter 2
"""

from dataclasses import asdict, dataclass, replace

import torch

from config import Config, DataConfig, ModelConfig, TrainConfig
from data import random_batch
from experiments.common import Trainings, trained_gpt
from experiments.grokking.model import copy_weights
from model import GPT
from train import fit
from utils import seeded_generator

STATES_PER_DOUBLING = 3  # of the number of steps
SHAPE = ModelConfig(n_layers=2, d_model=64, n_ctx=64)
TRAINING = TrainConfig(muon_lr=0.014, lr=0.008, weight_decay=0.05)
CHARACTER_STEPS = 1000
WORD_STEPS = 2500


@dataclass(frozen=True)
class DynamicsRecipe:
    """What is trained on what: a model's shape, its text, and its training."""

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig


def make_recipes(dataset="auto", quick=False):
    """[DynamicsRecipe] of the models that are trained with each seed.

    dataset: the text of the model of characters, as in a DataConfig.
    """
    characters = DynamicsRecipe("characters", SHAPE, DataConfig(dataset=dataset),
                                replace(TRAINING, max_steps=CHARACTER_STEPS))
    no_layers = replace(characters, name="no layers", model=replace(SHAPE, n_layers=0))
    words = DynamicsRecipe("words", SHAPE, DataConfig(dataset="builtin", tokenizer="word"),
                           replace(TRAINING, max_steps=WORD_STEPS))
    recipes = [characters, no_layers, words]
    if quick:
        recipes = [replace(each, train=replace(each.train, max_steps=20)) for each in recipes]
    return recipes


def kept_steps(max_steps):
    """The steps whose weights are kept: 0, and from 1 to the last one spaced by a constant factor.
    """
    steps = {0, max_steps}
    number = 0
    while (step := round(2 ** (number / STATES_PER_DOUBLING))) < max_steps:
        steps.add(step)
        number += 1
    return sorted(steps)


def train_and_keep(model, tokens, how, seed, label, trainings):
    """Train the model in place on windows from anywhere in a text, with the batches of a seed, and
    keep its weights along the way.

    tokens: [n]. how: a TrainConfig. label, trainings: as in `common.fit_with_progress`.
    Returns the history: {"steps": `kept_steps`, "weights": {name: [step, ...]}}.
    """
    generator = seeded_generator(seed)
    steps = kept_steps(how.max_steps)
    states = [copy_weights(model)]

    def next_batch():
        return random_batch(tokens, how.batch_size, model.cfg.n_ctx, generator)

    trainings = trainings or Trainings([how.max_steps])
    trainings.begin(label)
    for step in fit(model, next_batch, how):
        if step.number in steps:
            states.append(copy_weights(model))
        trainings.show(step.number, f"loss {step.loss:.2f}")
    trainings.close()

    weights = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    return {"steps": steps, "weights": weights}


def trained_states(folder, recipe, dataset, seed, *, retrain=False, trainings=None):
    """The history of a DynamicsRecipe and a seed, as `train_and_keep` returns it: trained, or read
    from the run in `folder` if it was kept.

    The run holds the last state, for `load_model`, and says which text it was trained on.
    """
    shape = replace(recipe.model, d_vocab=dataset.tokenizer.d_vocab)
    cfg = Config(data=recipe.data, model=shape, train=replace(recipe.train, seed=seed))

    def train(model):
        label = f"{recipe.name}, seed {seed}"
        history = train_and_keep(model, dataset.train, cfg.train, seed, label, trainings)
        return {"history": history, "step": cfg.train.max_steps, "config": asdict(cfg),
                "data_sha256": dataset.sha256}

    _, state = trained_gpt(folder / "checkpoint.pt", shape, seed, train,
                           tokenizer=dataset.tokenizer, retrain=retrain, trainings=trainings,
                           settings={"train": asdict(recipe.train), "data": dataset.sha256})
    return state["history"]


def states_of(cfg, history):
    """Yield (step, model) of each kept state. cfg: the ModelConfig. The model is always the same
    object, in evaluation mode, with the weights of one state after another."""
    model = GPT(cfg, seed=None).eval()
    for number, step in enumerate(history["steps"]):
        weights = {name: each[number] for name, each in history["weights"].items()}
        model.load_weights_(weights, "history")
        yield step, model

