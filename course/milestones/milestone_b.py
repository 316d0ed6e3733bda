"""Milestone B: a run of the learner's that has learned its text about as well as it should.

The model is read from the run and its validation loss measured again, on the text that the run was
trained on. Where the floor of that text is known, what counts is the gap to it.
"""

from dataclasses import dataclass
from statistics import fmean

import torch

from checkpoint import (
    config_of,
    find_run,
    list_runs,
    load_checkpoint,
    load_model,
    read_metrics,
    reload_dataset,
)
from config import Config
from course.engine.expect import expect
from course.engine.milestones import Milestone, NotYet
from data import SHAKESPEARE_SHA256, Dataset
from model import GPT
from train import token_losses
from utils import UserError

OUT_DIR = "outputs"
MOST_ABOVE_FLOOR = 0.1  # nats a character: 600 steps of the default model end 0.08 above it
MOST_ON_SHAKESPEARE = 1.65  # nats a character: the default run ends at about 1.57
BELOW_FLOOR = 0.01  # nats a character by which luck may pass the floor of a finite text


@dataclass
class Work:
    """A run. rows: of its metrics. loss: of its checkpoint on the whole validation part, in nats a
    token, measured now; per_token: characters a token."""

    name: str
    cfg: Config
    model: GPT
    dataset: Dataset
    step: int
    rows: list
    loss: float
    per_token: float

    @property
    def by_character(self):
        """The loss in nats a character."""
        return self.loss / self.per_token


def gather(folder, given):
    """The Work of a run: its name in outputs/ or its folder; None takes the newest of train.py."""
    if given is None:
        runs = [run for run in list_runs(OUT_DIR) if (run / "metrics.jsonl").exists()]
        if not runs:
            raise NotYet(f"there is no run of train.py in {OUT_DIR}; make one: python train.py")
        given = runs[-1]
    try:
        run = find_run(given, OUT_DIR)
    except UserError as problem:
        raise NotYet(str(problem)) from None

    path = run / "checkpoint.pt"
    state = load_checkpoint(path)
    if "data_sha256" not in state:
        raise NotYet(f"{run} is no run of train.py, but an experiment's model; name one of yours")
    cfg = config_of(state, path)
    dataset = reload_dataset(run, state, cfg)
    model, _ = load_model(run)

    # As in training: if the text is made of stories, windows begin where stories begin
    starts = None if dataset.floor is None else dataset.floor.starts
    losses = token_losses(model, dataset.val, starts=starts)
    return Work(name=run.name, cfg=cfg, model=model, dataset=dataset, step=state["step"],
                rows=read_metrics(run), loss=fmean(losses),
                per_token=dataset.val_characters / (len(dataset.val) - 1))


# Checks


def its_text_is_one_that_is_known(work):
    """it was trained on Tiny Shakespeare or on the built-in corpus"""
    # Words leave the spaces out: how frequent each one is gives 1.69 nats a character already
    is_shakespeare = (work.dataset.sha256 == SHAKESPEARE_SHA256
                      and work.cfg.data.tokenizer != "word")
    known = work.dataset.floor is not None or is_shakespeare
    expect(known, f"{work.name} was trained on {work.dataset.name} with {work.cfg.data.tokenizer} "
           "tokens, and nobody knows which loss would be good there: train on the characters of "
           "Tiny Shakespeare, or with --data.dataset builtin on characters or words")
    share = work.cfg.data.val_fraction
    expect(share == 0.1, f"{work.name} was trained with --data.val_fraction {share:g}: leave it at "
           "0.1, since another part of the text is easier or harder")


def it_was_trained_to_its_end(work):
    """all of its steps were taken"""
    wanted = work.cfg.train.max_steps
    expect(work.step == wanted, f"it stopped after {work.step:,} of {wanted:,} steps, where its "
           f"learning rate is still high; go on: python train.py --logging.run_name {work.name} "
           "--resume")


def the_future_is_hidden(work):
    """a token that comes later changes nothing that it says before"""
    length = min(work.model.cfg.n_ctx, len(work.dataset.val))
    tokens = work.dataset.val[:length][None].clone()
    with torch.no_grad():
        before = work.model(tokens)
        tokens[0, -1] = (tokens[0, -1] + 1) % work.model.cfg.d_vocab
        after = work.model(tokens)
    change = (after - before)[0, :-1].abs().amax(-1)  # [pos]
    expect(change.max() < 1e-3, f"another last token changes what it says at position "
           f"{change.argmax().item()}: the model sees the answer (is a causal mask missing?)")


def its_loss_is_the_one_that_it_reports(work):
    """the loss of its checkpoint is the one in its metrics.jsonl"""
    reported = [row["val_loss"] for row in work.rows if "val_loss" in row]
    expect(reported, f"{work.name} has no validation loss in its metrics.jsonl: train it again")
    expect(abs(reported[-1] - work.loss) < 0.01, f"metrics.jsonl ends at {reported[-1]:.4f} nats a "
           f"token, and the checkpoint has {work.loss:.4f}: are they of two runs?")


def it_does_not_pass_the_floor(work):
    """it is not below the floor, which nothing can pass that does not see the answer"""
    floor = floor_of(work)
    if floor is not None:
        expect(work.by_character > floor - BELOW_FLOOR, f"{work.by_character:.4f} nats a character "
               f"are below the floor of {floor:.4f}: the model sees the answer")


def it_has_learned_its_text(work):
    """it is near enough: 0.1 nats a character above the floor, or 1.65 on Tiny Shakespeare"""
    floor = floor_of(work)
    if floor is not None:
        gap = work.by_character - floor
        expect(gap < MOST_ABOVE_FLOOR, f"it is {gap:.3f} nats a character above the floor of "
               f"{floor:.4f}, and should be less than {MOST_ABOVE_FLOOR} above it: train longer, "
               "or with the default recipe")
    else:
        expect(work.by_character < MOST_ON_SHAKESPEARE, f"its validation loss is "
               f"{work.by_character:.4f} nats a character, and should be below "
               f"{MOST_ON_SHAKESPEARE}: train longer, or with the default recipe")


def floor_of(work):
    """The lowest possible loss in nats a character, or None where nobody knows it."""
    if work.dataset.floor is None:
        return None
    return work.dataset.floor.log_probs[1:].mean().neg().item() / work.per_token


MILESTONE = Milestone(
    letter="B", title="a trained GPT", chapter=6,
    hand_in="a run of train.py in outputs/, the newest or WITH=its_name",
    gather=gather,
    checks=(its_text_is_one_that_is_known, it_was_trained_to_its_end, the_future_is_hidden,
            its_loss_is_the_one_that_it_reports, it_does_not_pass_the_floor,
            it_has_learned_its_text))
