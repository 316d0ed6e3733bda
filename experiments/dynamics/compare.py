"""Compare two trained models on one text: which tokens got better or worse, which heads changed.

The two are runs of train.py, two checkpoints of one run, or two states that training_dynamics.py
kept. Both read the same tokens, so that losses can be compared token by token. Intervals are over
windows of text: where one excludes 0, the change is more than the choice of the text explains.

Chapter: COURSE_ROADMAP.md, 15 (grokking and training dynamics)
Prerequisites: checkpoint.py, head_ablation.py, experiments/dynamics/measure.py
Next: experiments/training_dynamics.py
Source: Olsson et al. 2022 (losses of single tokens before and after a phase change)
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from activation_cache import head_label
from checkpoint import find_run, load_checkpoint, load_model
from experiments.common import validation_tokens
from experiments.dynamics.measure import ABLATED, effects_of_heads, score_heads
from losses import per_token_loss
from metrics import Effects, bootstrap_draws
from model import GPT
from utils import UserError, check_count

MOST_WINDOWS = 128  # of the text that both read
LEAST = 20  # occurrences of a token that is compared


@dataclass(frozen=True)
class Compared:
    """One of the two models: its name, the model, its tokenizer and the folder of its run."""

    name: str
    model: GPT
    tokenizer: object
    folder: Path


def load_compared(text, out_dir):
    """The Compared of RUN, RUN/best.pt or RUN@STEP. RUN: a run's name in out_dir, or its folder.

    STEP: a step that training_dynamics.py kept. Raises UserError for anything else.
    """
    run, _, step = text.partition("@")
    file = "checkpoint.pt"
    if run.endswith(".pt"):
        file = Path(run).name
        run = str(Path(run).parent)
    folder = find_run(run, out_dir)
    model, tokenizer = load_model(folder, file=file)
    model.check_predicts_tokens("compare models of text")
    if step:
        model.load_weights_(kept_weights(folder, step), folder)
    return Compared(text, model, tokenizer, folder)


def kept_weights(folder, step):
    """The weights {name: tensor} that a run kept at a step, given as a text.

    Raises UserError for a run that keeps none, and for a step that it did not keep.
    """
    history = load_checkpoint(folder / "checkpoint.pt").get("history")
    if history is None:
        raise UserError(f"{folder.name} keeps its last state only, not that of step {step}; name a "
                        "run of training_dynamics.py")
    known = [str(each) for each in history["steps"]]
    if step not in known:
        raise UserError(f"{folder.name} has no state of step {step}; it has {', '.join(known)}")
    number = known.index(step)
    return {name: each[number] for name, each in history["weights"].items()}


def compare(one, other):
    """What changes from one Compared to the other, on the text that the first was validated on.

    Returns {"names", "losses" of both, "share_better", "share_worse": of all tokens, by a nat or
    more, "tokens": [the changes of each frequent token], "heads": [those of each head]}. Raises
    UserError if the two read different tokens, or if their text is not available.
    """
    if one.tokenizer.state_dict() != other.tokenizer.state_dict():
        raise UserError(f"{one.name} and {other.name} read different tokens; compare two models of "
                        "one text and one tokenizer")
    n_ctx = min(one.model.cfg.n_ctx, other.model.cfg.n_ctx)
    text = validation_tokens(one.folder)
    n_windows = min(MOST_WINDOWS, len(text) // n_ctx)
    check_count("windows of validation text", n_windows, least=2)
    windows = text[: n_windows * n_ctx].view(-1, n_ctx)

    before, after = (losses_of(each.model, windows) for each in (one, other))
    change = after - before  # [batch, pos - 1]
    return {"names": [one.name, other.name],
            "losses": [before.mean().item(), after.mean().item()],
            "share_better": (change <= -1).double().mean().item(),
            "share_worse": (change >= 1).double().mean().item(),
            "tokens": compare_tokens(change, windows[:, 1:], one.tokenizer),
            "heads": compare_heads(one.model, other.model, windows)}


@torch.no_grad()
def losses_of(model, windows):
    """The loss of each token of windows [batch, pos] except the first: [batch, pos - 1]."""
    return per_token_loss(model(windows)[:, :-1], windows[:, 1:])


def compare_tokens(change, targets, tokenizer):
    """The mean change of the loss of each token that occurs often, a list of dicts.

    change, targets: [batch, pos]: by how much each loss changes, and of which token it is. Each
    dict has the token's text, n (how often it occurs), change, low and high (nats per occurrence,
    with an interval over windows), and of_all (its share in the change of the mean loss).
    """
    d_vocab = tokenizer.d_vocab
    is_token = torch.nn.functional.one_hot(targets, d_vocab).double()  # [batch, pos, d_vocab]
    counts = is_token.sum(1)  # [batch, d_vocab]
    sums = torch.einsum("bp,bpv->bv", change.double(), is_token)

    # the same for windows drawn with repetition: how often each is drawn is its weight
    draws = bootstrap_draws(len(targets))
    weights = torch.nn.functional.one_hot(draws, len(targets)).sum(1).double()  # [draw, batch]
    means = (weights @ sums) / (weights @ counts).clamp(min=1)  # [draw, d_vocab]
    low, high = means.quantile(torch.tensor([0.025, 0.975]).double(), dim=0)

    n = counts.sum(0)
    found = []
    for token in (n >= LEAST).nonzero().flatten().tolist():
        found.append({"token": tokenizer.decode([token]), "n": int(n[token]),
                      "change": (sums[:, token].sum() / n[token]).item(),
                      "low": low[token].item(), "high": high[token].item(),
                      "of_all": (sums[:, token].sum() / n.sum()).item()})
    return sorted(found, key=lambda each: each["of_all"])


@torch.no_grad()
def compare_heads(one, other, windows):
    """The change of each head's effect and scores, a list of dicts; empty if the models have other
    numbers of layers or heads.

    Each dict has name, effects (of both, in nats per token), change, low and high (of the effect,
    with an interval over windows), and the scores of `score_heads`, a pair each.
    """
    shape = one.cfg.n_layers, one.cfg.n_heads
    if shape != (other.cfg.n_layers, other.cfg.n_heads) or not one.cfg.n_layers:
        return []

    # what each head looks at, and what its removal costs, in both models
    scores = []
    for model in (one, other):
        _, cache = model.run_with_cache(windows, lambda name: name.endswith("hook_pattern"))
        scores.append(score_heads(windows, cache))
    before, after = (effects_of_heads(model, windows[:ABLATED]) for model in (one, other))

    change = Effects(after.values - before.values, before.axes)
    low, high = (end.flatten().tolist() for end in change.ci())
    found = []
    for number, mean in enumerate(change.mean.flatten().tolist()):
        found.append({
            "name": head_label(*divmod(number, shape[1])),
            "effects": [each.mean.flatten()[number].item() for each in (before, after)],
            "change": mean, "low": low[number], "high": high[number],
            "scores": {kind: [each[kind][number] for each in scores] for kind in scores[0]}})
    return sorted(found, key=lambda each: -abs(each["change"]))
