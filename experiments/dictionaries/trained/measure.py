"""Measure dictionaries of a trained model's activations: what they preserve, predict and steer.

Four questions, each with what the answer is compared with:
- Is the loss kept if the reconstruction replaces the activation? Compared with replacing it by its
  mean, or by 0.
- Does a latent predict when a variable of the text holds? Compared with the best neuron, the best
  of as many random directions, and a linear probe.
- How many variables does one latent carry? Compared with one neuron.
- Does adding a latent's direction bring the word that its variable names? Compared with random
  directions of the same length.
A dictionary of shuffled activations and one of an untrained model answer the same questions.

Many latents only show which word is at their position. So a variable is scored *among equal words*:
a place where it holds is compared with a place of the same word where it doesn't.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/dictionaries/measure.py, experiments/dictionaries/trained/model.py
Next: experiments/dictionaries/transcoders/model.py
Source: Bricken et al. 2023; Gao et al. 2024 (loss recovered, probes); Templeton et al. 2024
(steering)
"""

import itertools
import re
from dataclasses import dataclass, replace

import torch

from experiments.dictionaries.measure import describe_fit
from experiments.dictionaries.model import (
    DictionaryRecipe,
    fit_dictionary,
    seed_for,
    unit_rows,
)
from experiments.dictionaries.trained.variables import is_next, siblings
from losses import log_probabilities, next_token_loss
from metrics import mean_ranks
from model import GPT
from utils import seeded_generator

DEAD_AFTER = 50  # steps; a feature of a text may be rare, and its latent silent for long
# TopK is the fastest. The choice hardly matters: on seed 0 of the word model, all five kinds, k of
# 4 to 32, and four times as many latents recover 0.997 or more of the loss. The best latents have a
# mean AUROC of 0.77 to 0.82, the best neurons 0.84.
WORD_DICTIONARY = DictionaryRecipe("TopK", 8, 256, steps=500, dead_after=DEAD_AFTER)
TEXT_DICTIONARY = DictionaryRecipe("TopK", 16, 512, steps=500, dead_after=DEAD_AFTER)
ROWS_AT_ONCE = 64  # texts
PREDICTED = 0.9  # a score with an AUROC above this predicts the variable
CARRIED = 0.8  # a score with an AUROC above this, or below 0.2, carries the variable
FEWEST_PAIRS = 500  # pairs of equal words, one with the variable, needed in each half of the texts
RIDGE = 1e-3  # of a probe, in units of the mean variance of its inputs
N_RANDOM = 20  # random directions that a steered one is compared with
N_STEERED = 12  # latents that `steer_by_effect` steers along
N_TEXTS = 16  # that are steered at once
FEWEST_ACTIVE = 20  # positions at which a latent must be active to be steered along


# Activations


@torch.no_grad()
def collect(model, tokens, at):
    """The activations at a hook point, [batch * pos, d], text after text. tokens: [batch, pos]."""
    parts = [model.run_with_cache(rows, at)[1][at].flatten(0, 1)
             for rows in tokens.split(ROWS_AT_ONCE)]
    return torch.cat(parts)


@torch.no_grad()
def spliced_loss(subject, splice=None):
    """The mean loss on the held-out texts, in nats a token, if splice(activation) replaces it.

    splice: None leaves the activation as it is.
    """
    hooks = [] if splice is None else [(subject.at, lambda activation, hook: splice(activation))]
    losses = []
    for tokens in subject.held_out.split(ROWS_AT_ONCE):
        with subject.model.hooks(hooks):
            losses.append(next_token_loss(subject.model(tokens), tokens, reduction="none"))
    return torch.cat(losses).mean().item()


def reference_losses(subject, mean):
    """The losses to compare a dictionary's with: {"clean", "mean", "zero"}, in nats a token.

    clean: with the activation as it is; mean, zero: with it replaced by its mean on other texts,
    `mean` [d], or by 0.
    """
    return {"clean": spliced_loss(subject), "mean": spliced_loss(subject, mean.expand_as),
            "zero": spliced_loss(subject, torch.zeros_like)}


def loss_recovered(subject, dictionary, reference):
    """How much of the loss a dictionary recovers: the reference losses, and three more numbers.

    reference: of `reference_losses`. Returns a dict. spliced: the loss if the reconstruction
    replaces the activation. against_mean, against_zero: (ablated - spliced) / (ablated - clean): 1
    if nothing is lost, 0 if as much is lost as by the ablation.
    """
    spliced = spliced_loss(subject, lambda x: dictionary.decode(dictionary.encode(x)))
    clean = reference["clean"]
    return reference | {"spliced": spliced} | {
        f"against_{way}": (reference[way] - spliced) / (reference[way] - clean)
        for way in ("mean", "zero")}


# What a latent predicts


@dataclass(frozen=True)
class Places:
    """Positions of texts, with their activations, words and variables.

    x: [n, d]; words: [n], ids below n_words; truth: [n, variable], bool.
    """

    x: torch.Tensor
    words: torch.Tensor
    truth: torch.Tensor
    n_words: int


@dataclass(frozen=True)
class Comparisons:
    """Comparisons of places where a variable holds with places of the same word where it doesn't.

    pairs: [word, variable], the number of pairs. above: [word, score, variable], the number of
    pairs with the higher score where the variable holds; ties count half.
    """

    above: torch.Tensor
    pairs: torch.Tensor

    @classmethod
    def of(cls, scores, places):
        """The Comparisons of scores [n, score] at n Places."""
        shape = (scores.shape[1], places.truth.shape[1])
        above = torch.zeros(places.n_words, *shape, dtype=torch.float64)
        pairs = torch.zeros(places.n_words, shape[1], dtype=torch.float64)
        for word in places.words.unique():
            here = places.words == word
            holds = places.truth[here].double()  # [place, variable]
            n_true = holds.sum(0)
            pairs[word] = n_true * (len(holds) - n_true)
            if pairs[word].any():
                ranks = mean_ranks(scores[here].T).double()  # [score, place], from 0
                above[word] = ranks @ holds - n_true * (n_true - 1) / 2
        return cls(above, pairs)

    @property
    def auroc(self):
        """AUROC among equal words, [score, variable]. NaN where there is no pair.

        It is the chance that a place where the variable holds has a higher score than a place of
        the same word where it doesn't.
        """
        return self.above.sum(0) / self.pairs.sum(0)

    @property
    def auroc_of_words(self):
        """The AUROC of each word by itself, [word, score, variable]."""
        return self.above / self.pairs[:, None]


@dataclass(frozen=True)
class Halves:
    """The held-out texts in two halves: on one the best score is chosen, on the other measured.

    names: the variables with at least FEWEST_PAIRS pairs of equal words in both halves.
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
                                 truth[first::2].flatten(0, 1), subject.model.cfg.d_vocab))

        pairs = [Comparisons.of(half.x[:, :0], half).pairs.sum(0) for half in halves]
        kept = torch.minimum(*pairs) >= FEWEST_PAIRS
        names = [name for name, keep in zip(subject.variables, kept, strict=True) if keep]
        return cls(names, *(replace(half, truth=half.truth[:, kept]) for half in halves))


@dataclass(frozen=True)
class Prediction:
    """How well the best of some scores predicts each variable, on the second half of the texts.

    one: [variable], the AUROC of the score that predicts it best in the first half; which:
    [variable], that score's number. each_word: [variable], the AUROC if each word has a score of
    its own, chosen in the same way. compared: the Comparisons of all scores in the second half.
    """

    one: torch.Tensor
    which: torch.Tensor
    each_word: torch.Tensor
    compared: Comparisons

    @classmethod
    def of(cls, read, halves):
        """The Prediction by the scores that read(x [n, d]) returns, [n, score].

        A score may predict a variable by being low; the first half decides that, too.
        """
        first = Comparisons.of(read(halves.choose.x), halves.choose)
        second = Comparisons.of(read(halves.measure.x), halves.measure)

        lead = first.auroc - 0.5  # [score, variable]
        which = lead.abs().argmax(0, keepdim=True)
        one = 0.5 + lead.gather(0, which).sign() * (second.auroc.gather(0, which) - 0.5)

        lead = (first.auroc_of_words - 0.5).nan_to_num()  # [word, score, variable]
        which_each = lead.abs().argmax(1, keepdim=True)
        sign = lead.gather(1, which_each).sign()[:, 0]  # [word, variable]
        above = second.above.gather(1, which_each)[:, 0]
        ahead = sign * (above - second.pairs / 2)  # pairs won, beyond half of them
        each_word = 0.5 + ahead.sum(0) / second.pairs.sum(0)
        return cls(one[0], which[0], each_word, second)

    @property
    def carries(self):
        """[score, variable], bool: which variables each score carries."""
        return (self.compared.auroc - 0.5).abs() > CARRIED - 0.5

    @property
    def carried(self):
        """How many variables scores carry: {"mean", "share"}.

        share: the share of scores that carry any variable. mean: how many these carry; 0 if there
        are none, 1 if each carries only one.
        """
        n_carried = self.carries.sum(1)  # [score]
        carries_any = n_carried > 0
        mean = n_carried[carries_any].double().mean().item() if carries_any.any() else 0.0
        return {"mean": mean, "share": carries_any.double().mean().item()}


def probe_auroc(halves):
    """The AUROC among equal words of a linear probe for each variable, [variable].

    The probe is fitted to the first half by least squares. Each word's mean is subtracted from both
    x and truth before, so the probe spends nothing on the word itself. On seed 0, logistic probes
    (probing.py) reach up to 0.06 more, and take a hundred times as long.
    """
    x = less_word_means(halves.choose.x, halves.choose.words)
    wanted = less_word_means(halves.choose.truth, halves.choose.words)
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    W = torch.linalg.solve(gram, x.T @ wanted)  # [d, variable]
    return Comparisons.of(halves.measure.x.double() @ W, halves.measure).auroc.diagonal()


def less_word_means(values, words):
    """values [n, k] less the mean over all places with the same word, float64. words: [n]."""
    values = values.double()
    n_words = int(words.max()) + 1
    sums = torch.zeros(n_words, values.shape[1], dtype=torch.float64).index_add_(0, words, values)
    means = sums / words.bincount().clamp(min=1)[:, None]
    return values - means[words]


def random_reader(d, n_directions, seed):
    """A function x [n, d] -> [n, n_directions], the dot products of x with random directions."""
    generator = seeded_generator(seed_for("reading at random", seed))
    drawn = torch.randn(n_directions, d, generator=generator)
    directions = unit_rows(drawn).T
    return lambda x: x @ directions


def dictionary_reading(dictionary):
    """A function x [n, d] -> [n, latent], the latents' inputs, before most are set to 0."""
    return lambda x: dictionary.pre(x).detach()


def variable_scores(halves, readers):
    """How well scores of several kinds predict the variables, as plain values.

    readers: {kind: function x [n, d] -> [n, score]}. Returns {kind: {"one", "each_word", "which",
    "carried": as in `Prediction`, "busiest": the names of the variables of the score that carries
    the most}}.
    """
    found = {}
    for kind, read in readers.items():
        best = Prediction.of(read, halves)
        busiest = best.carries[best.carries.sum(1).argmax()].tolist()
        found[kind] = {"one": best.one.tolist(), "each_word": best.each_word.tolist(),
                       "which": best.which.tolist(), "carried": best.carried,
                       "busiest": list(itertools.compress(halves.names, busiest))}
    return found


# Steering


@torch.no_grad()
def log_prob_changes(subject, tokens, places, vectors):
    """How log-probabilities change if a vector is added to the activation, mean over texts.

    tokens: [batch, pos]; places: [batch], the position of each text at which the vector is added
    and the change is read; vectors: [vector, d]. Returns [vector, d_vocab], in nats.
    """
    model = subject.model
    rows = torch.arange(len(tokens))
    tokens = tokens[:, : int(places.max()) + 1]  # later positions change nothing
    in_block = re.match(r"blocks\.(\d+)", subject.at)
    start = int(in_block[1]) if in_block else 0
    resid = model.run_blocks(model.embed(tokens), stop=start)

    def log_probs(vector):
        def add(activation, hook):
            steered = activation.clone()
            steered[rows, places] += vector
            return steered

        with model.hooks([(subject.at, add)]):
            if in_block:
                last = model.run_blocks(resid, start)
                logits = model.unembed(last, None, places[:, None])[:, 0]
            else:
                logits = model(tokens)[rows, places]
        return log_probabilities(logits)

    baseline = log_probs(torch.zeros_like(vectors[0]))
    return torch.stack([(log_probs(vector) - baseline).mean(0) for vector in vectors])


def random_vectors(n, like, generator):
    """n vectors in random directions, as long as `like` [d]; [n, d]."""
    return unit_rows(torch.randn(n, len(like), generator=generator)) * like.norm()


def steer_by_variables(subject, halves, dictionary, seed):
    """Measure whether the latent that predicts a variable brings the word that the variable names.

    1. For each variable that names a word, take the latent that predicts it best in the first half
       of the texts. Its direction gets the length that the latent has, on average, where the
       variable holds.
    2. In the second half, add this vector where another word of the same kind comes next.
    3. Measure how much the variable's word gains over the others of its kind, in nats.
    Two kinds of vectors of the same length are compared with it: N_RANDOM random directions, and
    what the labels alone give without a dictionary, the difference between the mean activation
    where the variable holds and where it does not.

    Returns {variable: {"feature": nats, "means": nats, "random": [nats of each]}}.
    """
    generator = seeded_generator(seed_for("steering at random", seed))
    tokens = subject.held_out[1::2]
    known = {name: holds[1::2] for name, holds in subject.variables.items()}
    z = dictionary.encode(halves.choose.x)
    first = Comparisons.of(z, halves.choose).auroc

    found = {}
    for name in filter(subject.to_come.get, halves.names):
        # the latent of the variable
        number = halves.names.index(name)
        latent = first[:, number].argmax()
        where = halves.choose.truth[:, number] & (z[:, latent] > 0)

        # the places where another word of its kind is next: the first such place of a text, in the
        # texts in which it comes soonest (texts without one are sorted to the end)
        others = [other for other in siblings(name) if other != name]
        elsewhere = torch.stack([known[other] for other in others]).any(0) & is_next(known, name)
        n_texts = min(N_TEXTS, int(elsewhere.any(1).sum()))
        if not where.any() or not n_texts:
            continue
        places = elsewhere.float().argmax(1).masked_fill(~elsewhere.any(1), elsewhere.shape[1])
        texts = places.argsort()[:n_texts]

        # the vectors to add
        vector = z[where, latent].mean() * dictionary.W_dec[latent].detach()
        holds = halves.choose.truth[:, number]
        of_means = halves.choose.x[holds].mean(0) - halves.choose.x[~holds].mean(0)
        of_means = of_means / of_means.norm() * vector.norm()
        vectors = torch.stack([vector, of_means])
        vectors = torch.cat([vectors, random_vectors(N_RANDOM, vector, generator)])

        # the gain of the word over the others of its kind
        changes = log_prob_changes(subject, tokens[texts], places[texts], vectors)
        rivals = changes[:, [subject.to_come[other] for other in others]].mean(1)
        feature, means, *random = (changes[:, subject.to_come[name]] - rivals).tolist()
        found[name] = {"feature": feature, "means": means, "random": random}
    return found


def steer_by_effect(subject, x, dictionary, seed):
    """Measure whether latents raise a token of their own more than random directions do.

    The directions of N_STEERED latents, as long as the latent is on average where it is active, are
    added in the middle of texts. A latent's own token is the one that gains most in the first half
    of the texts; its gain is measured in the second half, in nats. Random directions get their own
    tokens in the same way.

    x: [n, d], activations. Returns [{"latent": number, "token": text, "feature": nats, "random":
    [nats of each]}].
    """
    generator = seeded_generator(seed_for("steering at random", seed))
    z = dictionary.encode(x)
    alive = ((z > 0).sum(0) >= FEWEST_ACTIVE).nonzero().flatten()
    drawn = alive[torch.randperm(len(alive), generator=generator)[:N_STEERED]]
    halves = [subject.held_out[first::2][:N_TEXTS] for first in (0, 1)]
    middle = torch.full((len(halves[0]),), subject.held_out.shape[1] // 2)

    found = []
    for latent in drawn.tolist():
        size = z[:, latent][z[:, latent] > 0].mean()
        vector = size * dictionary.W_dec[latent].detach()
        vectors = torch.cat([vector[None], random_vectors(N_RANDOM, vector, generator)])
        chosen, measured = (log_prob_changes(subject, half, middle[: len(half)], vectors)
                            for half in halves)
        own = chosen.argmax(1, keepdim=True)  # [vector, 1]
        feature, *random = measured.gather(1, own)[:, 0].tolist()
        found.append({"latent": latent, "token": subject.tokenizer.decode([own[0].item()]),
                      "feature": feature, "random": random})
    return found


# All of it


def recipe_for(subject):
    """The usual DictionaryRecipe for a Subject: larger for natural text than for stories."""
    return WORD_DICTIONARY if subject.variables else TEXT_DICTIONARY


def shuffle_columns(x, seed):
    """x [n, d] with each column shuffled by itself: the same numbers, no longer correlated."""
    generator = seeded_generator(seed_for("shuffled activations", seed))
    orders = [torch.randperm(len(x), generator=generator) for _ in range(x.shape[1])]
    return x.gather(0, torch.stack(orders, 1))


def untrained_twin(subject, seed):
    """The Subject with an untrained model of the same shape."""
    return replace(subject, model=GPT(subject.model.cfg, seed_for("untrained model", seed)).eval())


def measure_subject(subject, recipe, seed):
    """Train a dictionary for a Subject and measure it: (a dict of plain values, the Dictionary).

    In the dict: "name", "at", "d", "kind", "sparsity", "n_latents"; "fit": as `describe_fit`;
    "loss": as `loss_recovered`; "shuffled" and "untrained": {"fit", "loss"} of a dictionary of
    shuffled activations, and of one before training; "effects": as `steer_by_effect`. For known
    variables also what `measure_variables` returns.
    """
    x = collect(subject.model, subject.tokens, subject.at)
    held_out = collect(subject.model, subject.held_out, subject.at)
    dictionary = fit_dictionary(recipe, x, seed)
    of_shuffled = fit_dictionary(recipe, shuffle_columns(x, seed), seed)
    untrained = fit_dictionary(replace(recipe, steps=0), x, seed)

    found = {"name": subject.name, "at": subject.at, "d": x.shape[1], "kind": recipe.kind,
             "sparsity": recipe.sparsity, "n_latents": recipe.n_latents}
    reference = reference_losses(subject, x.mean(0))
    for name, one in (("", dictionary), ("shuffled", of_shuffled), ("untrained", untrained)):
        part = found.setdefault(name, {}) if name else found
        part["fit"] = describe_fit(one, held_out)
        part["loss"] = loss_recovered(subject, one, reference)
    found["effects"] = steer_by_effect(subject, held_out, dictionary, seed)
    if subject.variables:
        found |= measure_variables(subject, recipe, dictionary, of_shuffled, seed)
    return found, dictionary


def measure_variables(subject, recipe, dictionary, of_shuffled, seed):
    """The part of `measure_subject` that needs known variables: a dict of plain values.

    "variables": their names; "predicted": as `variable_scores`, with these kinds of scores:
      latent, and before: the latents' inputs, before most are set to 0;
      neuron: the activation's own numbers; random: as many random directions as latents;
      shuffled, untrained: latents of shuffled activations, and of an untrained model;
    "probe", "probe_untrained": [AUROC of each variable]; "steered", "steered_shuffled",
    "steered_untrained": as `steer_by_variables`.
    """
    halves = Halves.of(subject)
    read_random = random_reader(len(dictionary.W_enc), recipe.n_latents, seed)
    predicted = variable_scores(halves, {
        "latent": dictionary.encode, "before": dictionary_reading(dictionary),
        "neuron": lambda x: x, "random": read_random, "shuffled": of_shuffled.encode})

    untrained = untrained_twin(subject, seed)
    of_untrained = fit_dictionary(
        recipe, collect(untrained.model, untrained.tokens, untrained.at), seed)
    halves_untrained = Halves.of(untrained)
    predicted |= variable_scores(halves_untrained, {"untrained": of_untrained.encode})

    steer = steer_by_variables
    return {"variables": halves.names, "predicted": predicted,
            "probe": probe_auroc(halves).tolist(),
            "probe_untrained": probe_auroc(halves_untrained).tolist(),
            "steered": steer(subject, halves, dictionary, seed),
            "steered_shuffled": steer(subject, halves, of_shuffled, seed),
            "steered_untrained": steer(untrained, halves_untrained, of_untrained, seed)}
