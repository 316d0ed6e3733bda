"""Dictionaries of a trained model's activations: what they keep, what they say, what they steer.

Four questions, each with what it is held against:
- kept: the loss with the reconstruction in the activation's place, against its mean, and 0.
- said: does a latent tell when a variable of the text holds, against the best neuron, as many
  random directions, and a linear probe?
- mixed: how many variables does one neuron carry, and how many one latent?
- steered: does adding a latent's direction bring the word that its variable says, against random
  directions of the same length?
A dictionary of shuffled activations and one of an untrained model answer the same questions.

Much of what a latent says is only which word it stands at. So variables are scored *among equal
words*: a place where the variable holds against one where it doesn't, with the same word at both.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/dictionaries/model.py, experiments/dictionaries/subjects.py
Next: experiments/dictionaries/report_trained.py
Source: Bricken et al. 2023; Gao et al. 2024 (loss recovered, probes); Templeton et al. 2024
(steering)
"""

from dataclasses import dataclass, replace
from statistics import fmean

import torch

from experiments.dictionaries.features import unit_rows
from experiments.dictionaries.model import fit_dictionary
from experiments.dictionaries.subjects import Subject as Subject  # what is measured here
from losses import next_token_loss
from metrics import mean_ranks
from model import GPT
from utils import seeded_generator

ROWS_AT_ONCE = 64  # texts
SAID = 0.9  # an AUROC above which a variable is said
CARRIED = 0.8  # an AUROC above which, or below 1 less it, a neuron or latent carries a variable
FEWEST_PAIRS = 1000  # of equal words with and without a variable, in each half of the texts
RIDGE = 1e-3  # of a probe, in units of the features' mean variance
N_RANDOM = 20  # directions that steering is held against
N_STEERED = 12  # latents that are steered by their own effect
OTHER_SEED = 1_000_003  # is added for what must not be drawn as the rest


# Activations


@torch.no_grad()
def collect(model, tokens, at):
    """The activations of a hook point, [batch * pos, d]: position after position, text after text.
    """
    parts = [model.run_with_cache(rows, at)[1][at].flatten(0, 1)
             for rows in tokens.split(ROWS_AT_ONCE)]
    return torch.cat(parts)


@torch.no_grad()
def spliced_loss(subject, splice=None):
    """The mean loss on the held-out texts, in nats a token, with `splice(activation)` in place of
    the activation; None: as it is."""
    hooks = [] if splice is None else [(subject.at, lambda activation, hook: splice(activation))]
    losses = []
    for tokens in subject.held_out.split(ROWS_AT_ONCE):
        with subject.model.hooks(hooks):
            losses.append(next_token_loss(subject.model(tokens), tokens, reduction="none"))
    return torch.cat(losses).mean().item()


def loss_recovered(subject, dictionary, mean):
    """What a dictionary keeps of what the model needs at subject.at: a dict.

    mean: [d], the activations' mean on other texts. clean, spliced, mean, zero: losses in nats a
    token, as it is and with the reconstruction, the mean, or 0 there. against_mean, against_zero:
    (ablated - spliced) / (ablated - clean): 1 where nothing is lost, 0 where all is.
    """
    clean = spliced_loss(subject)
    spliced = spliced_loss(subject, lambda x: dictionary.decode(dictionary.encode(x)))
    of_mean = spliced_loss(subject, mean.expand_as)
    of_zero = spliced_loss(subject, torch.zeros_like)
    return {"clean": clean, "spliced": spliced, "mean": of_mean, "zero": of_zero,
            "against_mean": (of_mean - spliced) / (of_mean - clean),
            "against_zero": (of_zero - spliced) / (of_zero - clean)}


def describe_fit(dictionary, x, z):
    """{"l0": active latents a position, "dead": the share of latents that are never active,
    "explained": the share of x's variance that is written}. x: [n, d]; z: [n, latent]."""
    is_active = z > 0
    error = (dictionary.decode(z) - x).square().sum()
    return {"l0": is_active.sum(-1).float().mean().item(),
            "dead": (~is_active.any(0)).float().mean().item(),
            "explained": 1 - (error / (x - x.mean(0)).square().sum()).item()}


# What a latent says


def word_auroc(scores, truth, words):
    """AUROC among equal words, [score, variable]: the chance that a place where the variable holds
    scores above one with the same word where it doesn't, over all such pairs; ties count half.

    scores: [n, score]; truth: [n, variable], bool; words: [n], ids. NaN where there is no pair.
    """
    above = torch.zeros(scores.shape[1], truth.shape[1], dtype=torch.float64)
    pairs = torch.zeros(truth.shape[1], dtype=torch.float64)
    for word in words.unique():
        here = words == word
        holds = truth[here].double()  # [place, variable]
        n_true = holds.sum(0)
        n_false = len(holds) - n_true
        if (n_true * n_false).any():
            ranks = mean_ranks(scores[here].T.contiguous()).double()  # [score, place], from 0
            above += ranks @ holds - n_true * (n_true - 1) / 2
            pairs += n_true * n_false
    return above / pairs


def count_pairs(truth, words):
    """How many pairs of equal words there are, one with each variable and one without: [variable].
    """
    n_true = torch.zeros(int(words.max()) + 1, truth.shape[1], dtype=torch.float64)
    n_true.index_add_(0, words, truth.double())
    n_all = words.bincount(minlength=len(n_true))[:, None]
    return (n_true * (n_all - n_true)).sum(0)


@dataclass(frozen=True)
class Places:
    """Positions of texts, one after another: x [n, d], words [n] (ids), truth [n, variable]."""

    x: torch.Tensor
    words: torch.Tensor
    truth: torch.Tensor


@dataclass(frozen=True)
class Halves:
    """The held-out texts in two halves: on one a latent is chosen, on the other it is measured.

    names: of the variables that both have FEWEST_PAIRS pairs of.
    """

    names: list
    choose: Places
    measure: Places

    @classmethod
    def of(cls, subject):
        """The two halves of a Subject's held-out texts: every second text."""
        truth = torch.stack(list(subject.variables.values()), -1)  # [batch, pos, variable]
        halves = []
        for first in (0, 1):
            tokens = subject.held_out[first::2]
            halves.append(Places(collect(subject.model, tokens, subject.at), tokens.flatten(),
                                 truth[first::2].flatten(0, 1)))
        enough = torch.stack([count_pairs(half.truth, half.words) for half in halves]).min(0).values
        kept = enough >= FEWEST_PAIRS
        names = [name for name, keep in zip(subject.variables, kept, strict=True) if keep]
        return cls(names, *(replace(half, truth=half.truth[:, kept]) for half in halves))


@dataclass(frozen=True)
class Best:
    """For each variable the score that says it best: which [variable], its number; sign, whether a
    high or a low one says that it holds; auroc [variable], on the other half of the texts."""

    which: torch.Tensor
    sign: torch.Tensor
    auroc: torch.Tensor


def choose_best(halves, read):
    """The Best of some scores. read: x [n, d] -> scores [n, score].

    A score may say a variable by being low; that too is chosen on the first half alone.
    """
    chosen = word_auroc(read(halves.choose.x), halves.choose.truth, halves.choose.words) - 0.5
    which = chosen.abs().argmax(0)  # [variable]
    variables = torch.arange(len(which))
    sign = chosen[which, variables].sign()

    scores = read(halves.measure.x)[:, which]
    of_all = word_auroc(scores, halves.measure.truth, halves.measure.words)
    auroc = 0.5 + sign * (of_all[variables, variables] - 0.5)
    return Best(which, sign, auroc)


def probe_auroc(halves):
    """The AUROC among equal words of a linear probe for each variable, [variable].

    The probe is the least-squares one: fitted on the first half with each word's mean taken from
    both x and truth, so that it spends nothing on the word itself. A logistic one for each
    (probing.py) takes a hundred times as long.
    """
    x = less_word_means(halves.choose.x, halves.choose.words)
    wanted = less_word_means(halves.choose.truth.double(), halves.choose.words)
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    W = torch.linalg.solve(gram, x.T @ wanted)  # [d, variable]
    scores = halves.measure.x.double() @ W
    return word_auroc(scores, halves.measure.truth, halves.measure.words).diagonal()


def less_word_means(values, words):
    """values [n, k] less the mean of all places with the same word, float64. words: [n]."""
    n_words = int(words.max()) + 1
    sums = torch.zeros(n_words, values.shape[1], dtype=torch.float64)
    sums.index_add_(0, words, values.double())
    means = sums / words.bincount(minlength=n_words).clamp(min=1)[:, None]
    return values.double() - means[words]


def random_reader(d, n_directions, seed):
    """A function x [n, d] -> [n, n_directions]: x along random directions."""
    drawn = torch.randn(n_directions, d, generator=seeded_generator(seed + OTHER_SEED))
    directions = unit_rows(drawn).T
    return lambda x: x @ directions


def variable_scores(halves, dictionary, seed):
    """({name: {"latent": AUROC, "neuron", "random", "probe", and "which", the latent's number}},
    the latents' Best). "random" is the best of as many random directions as there are latents."""
    latents = choose_best(halves, dictionary.encode)
    neurons = choose_best(halves, lambda x: x)
    n_latents = len(dictionary.W_dec)
    random = choose_best(halves, random_reader(halves.choose.x.shape[-1], n_latents, seed))
    columns = {"latent": latents.auroc, "neuron": neurons.auroc, "random": random.auroc,
               "probe": probe_auroc(halves), "which": latents.which}
    columns = {kind: column.tolist() for kind, column in columns.items()}
    scores = {name: {kind: column[i] for kind, column in columns.items()}
              for i, name in enumerate(halves.names)}
    return scores, latents


def count_carried(scores, places):
    """How many variables a score carries, the mean over those that carry any; and their share.

    scores: [n, score]. {"mean": 1 where each says one thing, "share": of all scores}; the mean is 0
    where none carries any.
    """
    auroc = word_auroc(scores, places.truth, places.words)
    n_carried = ((auroc - 0.5).abs() > CARRIED - 0.5).sum(1)  # [score]
    carries = n_carried > 0
    mean = n_carried[carries].double().mean().item() if carries.any() else 0.0
    return {"mean": mean, "share": carries.double().mean().item()}
