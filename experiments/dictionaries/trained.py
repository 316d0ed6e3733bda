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

import itertools
import re
from dataclasses import dataclass, replace

import torch

from experiments.dictionaries.features import seed_for, unit_rows
from experiments.dictionaries.measure import describe_fit
from experiments.dictionaries.model import DictionaryRecipe, fit_dictionary
from experiments.dictionaries.subjects import Subject as Subject  # what is measured here
from experiments.dictionaries.variables import is_next, siblings
from losses import log_probabilities, next_token_loss
from metrics import mean_ranks
from model import GPT
from utils import seeded_generator

RARE = 50  # steps: a feature of a text may be rare, and its latent silent for long
# TopK is the quickest. On seed 0 of the word model all five kinds, k of 4 to 32, and four times as
# many latents keep 0.997 or more of the loss, and the best latents have a mean AUROC of 0.77 to
# 0.82, the best neurons of 0.84.
WORD_DICTIONARY = DictionaryRecipe("TopK", 8, 256, steps=500, dead_after=RARE)
TEXT_DICTIONARY = DictionaryRecipe("TopK", 16, 512, steps=500, dead_after=RARE)
ROWS_AT_ONCE = 64  # texts
SAID = 0.9  # an AUROC above which a variable is said
CARRIED = 0.8  # an AUROC above which, or below 1 less it, a neuron or latent carries a variable
FEWEST_PAIRS = 500  # of equal words with and without a variable, in each half of the texts
RIDGE = 1e-3  # of a probe, in units of the features' mean variance
N_RANDOM = 20  # directions that steering is held against
N_STEERED = 12  # latents that are steered by their own effect
N_TEXTS = 16  # that are steered at once
FEWEST_ACTIVE = 20  # positions at which a latent that is steered is active


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


def reference_losses(subject, mean):
    """{"clean", "mean", "zero"}: the losses that any dictionary is compared with, in nats a token:
    with the activation as it is, its mean on other texts, [d], or 0."""
    return {"clean": spliced_loss(subject), "mean": spliced_loss(subject, mean.expand_as),
            "zero": spliced_loss(subject, torch.zeros_like)}


def loss_recovered(subject, dictionary, reference):
    """What a dictionary keeps of what the model needs at subject.at: a dict.

    reference: of `reference_losses`; they are in the result too. spliced: the loss with the
    reconstruction in place. against_mean, against_zero: (ablated - spliced) / (ablated - clean): 1
    where nothing is lost, 0 where all is.
    """
    spliced = spliced_loss(subject, lambda x: dictionary.decode(dictionary.encode(x)))
    clean = reference["clean"]
    return reference | {"spliced": spliced} | {
        f"against_{way}": (reference[way] - spliced) / (reference[way] - clean)
        for way in ("mean", "zero")}


# What a latent says


@dataclass(frozen=True)
class Places:
    """Positions of texts, one after another: x [n, d], words [n] (ids below n_words), truth [n,
    variable]."""

    x: torch.Tensor
    words: torch.Tensor
    truth: torch.Tensor
    n_words: int


@dataclass(frozen=True)
class Comparisons:
    """Places where a variable holds, compared with places of the same word where it doesn't.

    above: [word, score, variable], how many pairs have the higher score where the variable holds
    (ties count half); pairs: [word, variable], how many there are.
    """

    above: torch.Tensor
    pairs: torch.Tensor

    @classmethod
    def of(cls, scores, places):
        """scores: [n, score]; places: n Places."""
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
        """AUROC among equal words, [score, variable]: the chance that a place where the variable
        holds scores above one with the same word where it doesn't. NaN where there is no pair."""
        return self.above.sum(0) / self.pairs.sum(0)

    @property
    def auroc_of_words(self):
        """The same of each word by itself, [word, score, variable]."""
        return self.above / self.pairs[:, None]


@dataclass(frozen=True)
class Halves:
    """The held-out texts in two halves: on one a latent is chosen, on the other it is measured.

    names: of the variables of which both halves have FEWEST_PAIRS pairs of equal words.
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
class Said:
    """How well some scores say each variable, on the second half of the texts, [variable].

    one: the AUROC of the score that says it best in the first half; which: its number. each_word:
    the AUROC where each word has a score of its own, chosen in the same way. compared: all scores'
    Comparisons in the second half.
    """

    one: torch.Tensor
    which: torch.Tensor
    each_word: torch.Tensor
    compared: Comparisons

    @classmethod
    def of(cls, read, halves):
        """read: x [n, d] -> scores [n, score].

        A score may say a variable by being low; that too is chosen in the first half.
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
        """{"mean": how many variables a score carries that carries any, "share": how many scores
        do}; the mean is 0 where none does. One that says one thing has a mean of 1."""
        n_carried = self.carries.sum(1)  # [score]
        carries_any = n_carried > 0
        mean = n_carried[carries_any].double().mean().item() if carries_any.any() else 0.0
        return {"mean": mean, "share": carries_any.double().mean().item()}


def probe_auroc(halves):
    """The AUROC among equal words of a linear probe for each variable, [variable].

    The probe is the least-squares one: fitted on the first half with each word's mean taken from
    both x and truth, so that it spends nothing on the word itself. A logistic one for each
    (probing.py) says up to 0.06 more on seed 0, and takes a hundred times as long.
    """
    x = less_word_means(halves.choose.x, halves.choose.words)
    wanted = less_word_means(halves.choose.truth, halves.choose.words)
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    W = torch.linalg.solve(gram, x.T @ wanted)  # [d, variable]
    return Comparisons.of(halves.measure.x.double() @ W, halves.measure).auroc.diagonal()


def less_word_means(values, words):
    """values [n, k] less the mean of all places with the same word, float64. words: [n]."""
    values = values.double()
    n_words = int(words.max()) + 1
    sums = torch.zeros(n_words, values.shape[1], dtype=torch.float64).index_add_(0, words, values)
    means = sums / words.bincount().clamp(min=1)[:, None]
    return values - means[words]


def random_reader(d, n_directions, seed):
    """A function x [n, d] -> [n, n_directions]: x along random directions."""
    generator = seeded_generator(seed_for("reading at random", seed))
    drawn = torch.randn(n_directions, d, generator=generator)
    directions = unit_rows(drawn).T
    return lambda x: x @ directions


def dictionary_reading(dictionary):
    """A function x [n, d] -> [n, latent]: what latents see, before most of them are silenced."""
    return lambda x: dictionary.pre(x).detach()


def variable_scores(halves, readers):
    """What some scores say of the variables. readers: {kind: function x [n, d] -> [n, score]}.

    Returns {kind: {"one": [AUROC of each variable], "each_word": the same where each word has a
    score of its own, "which": the numbers of the first, "carried": as Said.carried, "busiest":
    names of the variables of the score that carries the most}}.
    """
    found = {}
    for kind, read in readers.items():
        said = Said.of(read, halves)
        busiest = said.carries[said.carries.sum(1).argmax()].tolist()
        found[kind] = {"one": said.one.tolist(), "each_word": said.each_word.tolist(),
                       "which": said.which.tolist(), "carried": said.carried,
                       "busiest": list(itertools.compress(halves.names, busiest))}
    return found


# Steering


@torch.no_grad()
def log_prob_changes(subject, tokens, places, vectors):
    """How much log-probabilities change, on average over texts, where a vector is added to the
    activation.

    tokens: [batch, pos]; places: [batch], the position of each text at which it is added and the
    change is read; vectors: [vector, d]. Returns [vector, d_vocab], in nats.
    """
    model = subject.model
    rows = torch.arange(len(tokens))
    tokens = tokens[:, : int(places.max()) + 1]  # what comes later changes nothing
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
    """n vectors in random directions, of the length of `like` [d]."""
    return unit_rows(torch.randn(n, len(like), generator=generator)) * like.norm()


def steer_by_variables(subject, halves, dictionary, seed):
    """Whether the latent that says a variable brings the word that the variable says will come.

    Of each variable that names one, the latent that is highest where it holds, in the first half of
    the texts. In the second half its direction, as long as the latent is where the variable holds,
    is added where the same kind of word comes next, but another one of them. Measured is how much
    the word gains on the others of its kind, in nats. Beside it stand N_RANDOM random directions,
    and what the labels alone give, without a dictionary: the difference of the activations' means
    where the variable holds and where it does not. All are of the same length.
    Returns {variable: {"feature": nats, "means": nats, "random": [nats of each]}}.
    """
    generator = seeded_generator(seed_for("steering at random", seed))
    tokens = subject.held_out[1::2]
    known = {name: holds[1::2] for name, holds in subject.variables.items()}
    z = dictionary.encode(halves.choose.x)
    first = Comparisons.of(z, halves.choose).auroc

    found = {}
    for name in filter(subject.to_come.get, halves.names):
        # the direction, and how far
        number = halves.names.index(name)
        latent = first[:, number].argmax()
        where = halves.choose.truth[:, number] & (z[:, latent] > 0)

        # where another word of its kind is next: the first such place of a text, and of the texts
        # those in which it comes soonest (texts without one are sorted behind them all)
        others = [other for other in siblings(name) if other != name]
        elsewhere = torch.stack([known[other] for other in others]).any(0) & is_next(known, name)
        n_texts = min(N_TEXTS, int(elsewhere.any(1).sum()))
        if not where.any() or not n_texts:
            continue
        vector = z[where, latent].mean() * dictionary.W_dec[latent].detach()
        places = elsewhere.float().argmax(1).masked_fill(~elsewhere.any(1), elsewhere.shape[1])
        texts = places.argsort()[:n_texts]

        holds = halves.choose.truth[:, number]
        of_means = halves.choose.x[holds].mean(0) - halves.choose.x[~holds].mean(0)
        of_means = of_means / of_means.norm() * vector.norm()
        vectors = torch.stack([vector, of_means])
        vectors = torch.cat([vectors, random_vectors(N_RANDOM, vector, generator)])
        changes = log_prob_changes(subject, tokens[texts], places[texts], vectors)
        rivals = changes[:, [subject.to_come[other] for other in others]].mean(1)
        feature, means, *random = (changes[:, subject.to_come[name]] - rivals).tolist()
        found[name] = {"feature": feature, "means": means, "random": random}
    return found


def steer_by_effect(subject, x, dictionary, seed):
    """Whether latents move the prediction more, and to one token, than random directions do.

    Of N_STEERED latents the direction, as long as they are where they are active, is added in the
    middle of texts. The token that gains most in the first half of the texts is the latent's own;
    measured is what it gains in the second half, in nats. Random directions are given theirs in the
    same way. x: [n, d], activations. Returns [{"latent": number, "token": text, "feature": nats,
    "random": [nats of each]}].
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
    """The DictionaryRecipe of a Subject: text has more to say than the stories of known words."""
    return WORD_DICTIONARY if subject.variables else TEXT_DICTIONARY


def shuffle_columns(x, seed):
    """x [n, d], with each of the d numbers taken from a row of its own: each is distributed as
    before, and no two have to do with each other."""
    generator = seeded_generator(seed_for("shuffled activations", seed))
    orders = [torch.randperm(len(x), generator=generator) for _ in range(x.shape[1])]
    return x.gather(0, torch.stack(orders, 1))


def untrained_twin(subject, seed):
    """The Subject with a model of the same shape that has learned nothing."""
    return replace(subject, model=GPT(subject.model.cfg, seed_for("untrained model", seed)).eval())


def measure_subject(subject, recipe, seed):
    """(all that is measured of a Subject and the dictionary of a DictionaryRecipe, as plain values,
    and that Dictionary).

    {"name", "at", "d", "kind", "sparsity", "n_latents", "fit": as `describe_fit`, "loss": as
    `loss_recovered`, "shuffled" and "untrained": {"fit", "loss"} of the dictionary of shuffled
    activations, and of one before training, "effects": as `steer_by_effect`}. Where variables are
    known also {"variables": names, "said": as `variable_scores`, of the kinds latent, before (what
    latents see before most are silenced), neuron, random (as many directions as latents), shuffled
    and untrained (latents of shuffled activations, and of an untrained model), "probe" and
    "probe_untrained": [AUROC of each variable], "steered": as `steer_by_variables`,
    "steered_shuffled", "steered_untrained"}.
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
    """The part of `measure_subject` that needs to know what there is to find."""
    halves = Halves.of(subject)
    read_random = random_reader(len(dictionary.W_enc), recipe.n_latents, seed)
    said = variable_scores(halves, {
        "latent": dictionary.encode, "before": dictionary_reading(dictionary),
        "neuron": lambda x: x, "random": read_random, "shuffled": of_shuffled.encode})

    untrained = untrained_twin(subject, seed)
    of_untrained = fit_dictionary(
        recipe, collect(untrained.model, untrained.tokens, untrained.at), seed)
    halves_untrained = Halves.of(untrained)
    said |= variable_scores(halves_untrained, {"untrained": of_untrained.encode})

    steer = steer_by_variables
    return {"variables": halves.names, "said": said, "probe": probe_auroc(halves).tolist(),
            "probe_untrained": probe_auroc(halves_untrained).tolist(),
            "steered": steer(subject, halves, dictionary, seed),
            "steered_shuffled": steer(subject, halves, of_shuffled, seed),
            "steered_untrained": steer(untrained, halves_untrained, of_untrained, seed)}
