"""Load or train the models that attention_visualization.py shows, and choose their texts.

Chapter: COURSE_ROADMAP.md, 4 (QK and OV); how models are trained and kept: chapter 6
Prerequisites: corpus.py, attention.py
Next: experiments/attention_page/measure.py
Source: Elhage et al. 2021 (attention-only models); Olsson et al. 2022 (repeated random words)
"""

from dataclasses import dataclass

import torch

import corpus
from checkpoint import find_run, load_model, load_pretrained
from config import ModelConfig, TrainConfig
from data import random_batch, repeated_batch
from experiments.common import (
    Trainings,
    encode_start,
    fit_with_progress,
    trained_gpt,
    validation_tokens,
)
from model import GPT
from tokenizer import WordTokenizer
from utils import UserError, seeded_generator

STORY = ("\nWhen Ola and Leo went to the park, Leo gave a kite to Ola. Ivo sings ri sa do mu, "
         "again ri sa do mu. What has Ola? A kite.")
SHAPE = {"n_layers": 3, "n_heads": 4, "d_model": 64, "n_ctx": 40, "attn_only": True}
BATCH = 16
REPEATS = 0.5  # of the windows repeat random words, so that looking back pays
UNSEEN_SEED = 1  # of the corpus, for the texts that heads are ablated on
CHARACTERS = 400_000  # of the built-in corpus, to train on
SHOWN = 40  # tokens of the text that is shown, unless --text is given


@dataclass(frozen=True)
class AttentionSubject:
    """A model and its texts: tokens [1, pos], the text that is shown; held_out [batch, pos], the
    texts on which heads are ablated."""

    name: str
    model: GPT
    tokenizer: object
    tokens: torch.Tensor
    held_out: torch.Tensor


def choose_subjects(cfg, folder):
    """[AttentionSubject]: the run or pretrained model that cfg names, or a model trained here for
    each seed.

    cfg: an AttentionConfig. folder: where models trained here are kept. Raises UserError for wrong
    settings before any training starts.
    """
    if cfg.run_name is None and cfg.model is None:
        return train_subjects(cfg, folder)

    if cfg.model is not None:
        name = cfg.model
        model, tokenizer = load_pretrained(name)
        story = tokenizer.encode(STORY)
        unseen = None
    else:
        run = find_run(cfg.run_name, cfg.out_dir)
        name = run.name
        model, tokenizer = load_model(run)
        model.check_predicts_tokens("this page shows a model of text")
        needed = cfg.held_out is None or cfg.text is None
        story = unseen = validation_text(run) if needed else None
    tokens, held_out = choose_texts(cfg, name, model.cfg, tokenizer, story=story, unseen=unseen)
    return [AttentionSubject(name, model, tokenizer, tokens, held_out)]


def validation_text(run):
    """The ids [n] of a run's validation text. Raises UserError if it is not available."""
    try:
        return validation_tokens(run)
    except UserError as error:
        raise UserError(f"{error}; or give both --text and --held_out") from None


def choose_texts(cfg, name, model_cfg, tokenizer, *, story, unseen=None):
    """(tokens [1, pos], held_out [batch, pos]): the texts of --text and --held_out or, by default,
    the beginning of `story` and windows of `unseen` (both ids [n]; None: the built-in corpus)."""
    if not model_cfg.n_layers:
        raise UserError(f"{name} has n_layers=0, and so no heads to look at; choose another")
    n_ctx = model_cfg.n_ctx

    # The text that is shown
    tokens = tokenizer.encode_document(cfg.text) if cfg.text else story[: min(n_ctx, SHOWN)]
    if not 2 <= len(tokens) <= n_ctx:
        raise UserError(f"the text has {len(tokens)} tokens, but {name} reads 2 to n_ctx={n_ctx}; "
                        "change --text")

    # The texts that heads are ablated on
    length = min(cfg.length, n_ctx)
    if cfg.held_out is not None or unseen is None:
        unseen = encode_start(cfg.held_out, tokenizer, cfg.windows * length, UNSEEN_SEED)
    rows = min(cfg.windows, len(unseen) // length)
    if rows < 2:
        raise UserError(f"{len(unseen)} held-out tokens are too few for two windows of {length}; "
                        "give more with --held_out, or a smaller --length")
    held_out = torch.as_tensor(unseen[: rows * length]).view(rows, length)
    return torch.as_tensor(tokens)[None], held_out


def train_subjects(cfg, folder):
    """[AttentionSubject]: a model for each seed, trained on the built-in corpus, or read if it was
    kept."""
    text = corpus.text(CHARACTERS)
    tokenizer = WordTokenizer().fit(text)
    train_tokens = torch.tensor(tokenizer.encode(text))
    shape = ModelConfig(**SHAPE, d_vocab=tokenizer.d_vocab)
    steps = 40 if cfg.quick else cfg.steps
    settings = {"steps": steps, "batch": BATCH, "repeats": REPEATS, "characters": CHARACTERS}

    # Wrong settings raise here, before the first training.
    tokens, held_out = choose_texts(cfg, f"seed {cfg.seeds[0]}", shape, tokenizer,
                                    story=tokenizer.encode(STORY))

    subjects = []
    trainings = Trainings([steps] * len(cfg.seeds))
    for seed in cfg.seeds:
        def train_(model, seed=seed):
            train_on_repeats_(model, train_tokens, seed, steps, trainings)

        model, _ = trained_gpt(folder / f"seed_{seed}" / "checkpoint.pt", shape, seed, train_,
                               tokenizer=tokenizer, settings=settings, retrain=cfg.retrain,
                               trainings=trainings)
        subjects.append(AttentionSubject(f"seed {seed}", model, tokenizer, tokens, held_out))
    return subjects


def train_on_repeats_(model, tokens, seed, steps, trainings=None):
    """Train a model in place on windows of tokens [n] and on repeated random words.

    trainings: the Trainings that this one belongs to.
    """
    generator = seeded_generator(seed)
    n_repeats = round(REPEATS * BATCH)

    def next_batch():
        stories = random_batch(tokens, BATCH - n_repeats, model.cfg.n_ctx, generator)
        repeats = repeated_batch(model.cfg.d_vocab, n_repeats, model.cfg.n_ctx, generator)
        return [torch.cat(part) for part in zip(stories, repeats, strict=True)]

    how = TrainConfig(max_steps=steps, lr=8e-3, muon_lr=0.02)
    fit_with_progress(model, next_batch, how, f"seed {seed}", trainings=trainings)
