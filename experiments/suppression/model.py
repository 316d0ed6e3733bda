"""The task in which a prediction must be taken back where it came true already, and its training.

A text walks through tables of successors, and never goes back to a token that it has seen: the
successors that were seen are impossible. Some are successors of the last token, by one table, and
some of the token before it, by another one, which a model must fetch first: what is predicted has
to be computed, in the stream of one position. In three places of ten the walk *jumps* instead, to
any token that is no successor, seen or not. So a token that was seen is impossible if it is
predicted and possible if it is not: suppressing all that was seen is wrong, and so is suppressing
all that is predicted.

    p(next) = (1 - jumps) * (odds of the successors not seen yet, normalised)
            + jumps * (uniform over all tokens that are no successors)

Each probability depends on the visible text alone, and so is the best possible prediction: the mean
of -log p is the floor of the loss, as in corpus.py.

    texts = Walks(seed=0)
    tokens, chances = texts.draw(64, generator)   # chances: [batch, pos, d_vocab], the exact ones
    model = trained_suppressor(Path("outputs/copy_suppression/seed_0"), SuppressionRecipe(seed=0))

Two layers without MLPs, two heads a layer and tied embeddings, as GPT-2 has them. With seed 0 alone
these were tried too. Untied, the second layer looks at the key *after* the predicted token (2.4 to
4.7 even shares), where a previous-token head has written it. With four heads of 16 dimensions, each
suppresses a third of the tokens. With one head a layer no such head forms (0.36 nats above the
floor). Where only tokens that were seen come back, in place of jumps to any, seen tokens are first
raised, and after 3,000 steps seven trials without MLPs lie 0.25 to 0.55 nats above the floor.

Chapter: COURSE_ROADMAP.md, 12 (copying and suppression)
Prerequisites: experiments/wired/model.py, train.py, corpus.py
Next: experiments/suppression/cspa.py
Source: McDougall et al. 2023 (copy suppression); Crutchfield & Young 1989 (unifilar sources)
"""

import string
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from config import ModelConfig, TrainConfig
from experiments.common import fit_with_progress, trained_gpt
from experiments.wired.model import Pairs
from losses import IGNORED
from tokenizer import CharTokenizer
from utils import UserError, seeded_generator

NAMES = string.printable  # characters that name the tokens, so that a run can be read
DRAWN_AT_ONCE = 64  # batches of texts: one by one, the drawing would cost a sixth of the time


# The texts


@dataclass(frozen=True)
class Walks:
    """Texts that walk through tables of successors, and what is random in them.

    seed: of the tables. n_pos: tokens a text. odds: of a token's successors in each table. lags:
    whose successors can come next, those of the last token (1), of the one before it (2), or of
    both, each by a table of its own. jumps: the share of steps that go to any token but a
    successor. goes_back: the control, in which a successor can come though it was seen.
    """

    seed: int = 0
    n_pos: int = 25
    d_vocab: int = 32
    odds: tuple = (2, 1)
    lags: tuple = (1, 2)
    jumps: float = 0.3
    goes_back: bool = False

    @cached_property
    def tables(self):
        """[lag, d_vocab, d_vocab] in float64: the odds of each token (column) after each source
        (row), 0 for what is no successor. Each token is a successor as often as it has successors,
        and never its own."""
        generator = seeded_generator(self.seed)
        every = torch.arange(self.d_vocab)
        tables = torch.zeros(len(self.lags), self.d_vocab, self.d_vocab, dtype=torch.float64)
        for table in tables:
            for odds in self.odds:
                follower = every
                while (follower == every).any() or table[every, follower].any():
                    follower = torch.randperm(self.d_vocab, generator=generator)
                table[every, follower] = float(odds)
        return tables

    def predicted_odds(self, tokens):
        """[batch, pos, d_vocab] in float64: the odds of what is predicted at each position, with
        each of the tokens as the last one. tokens: [batch, pos]; a source that lies before the text
        predicts nothing."""
        odds = torch.zeros(*tokens.shape, self.d_vocab, dtype=torch.float64)
        n_pos = tokens.shape[1]
        for lag, table in zip(self.lags, self.tables, strict=True):
            odds[:, lag - 1:] += table[tokens[:, :n_pos - lag + 1]]
        return odds

    def next_chances(self, odds, seen):
        """The exact chances of the next token, [..., d_vocab] in float64.

        odds: [..., d_vocab], of what is predicted. seen: [..., d_vocab], bool.
        """
        onward = odds if self.goes_back else odds * ~seen
        jump = (odds == 0).double()
        jump = jump / jump.sum(-1, keepdim=True)

        total = onward.sum(-1, keepdim=True)
        walk = (1 - self.jumps) * onward / total + self.jumps * jump
        return torch.where(total > 0, walk, jump)  # all successors were seen: only a jump is left

    def draw(self, n_rows, generator):
        """(tokens [batch, pos], chances [batch, pos, d_vocab], the exact ones of each token before
        it is seen). The first tokens, up to the largest lag, are uniform."""
        rows = torch.arange(n_rows)
        first = max(self.lags)
        tokens = torch.zeros(n_rows, self.n_pos, dtype=torch.long)
        chances = torch.full((n_rows, self.n_pos, self.d_vocab), 1 / self.d_vocab).double()
        seen = torch.zeros(n_rows, self.d_vocab, dtype=torch.bool)
        for pos in range(self.n_pos):
            if pos >= first:
                odds = self.predicted_odds(tokens[:, pos - first:pos])[:, -1]
                chances[:, pos] = self.next_chances(odds, seen)
            tokens[:, pos] = torch.multinomial(chances[:, pos], 1, generator=generator)[:, 0]
            seen[rows, tokens[:, pos]] = True
        return tokens, chances

    def chances_after(self, tokens):
        """[batch, pos, d_vocab] in float64: the exact chances of what follows each of the tokens,
        [batch, pos], from the first position on that has all of its sources."""
        seen, _ = self.states(tokens)
        return self.next_chances(self.predicted_odds(tokens), seen)

    def are_possible(self, tokens):
        """[batch], bool: which texts, [batch, pos], can be drawn at all."""
        first = max(self.lags)
        chances = self.chances_after(tokens)[:, first - 1:-1]
        return (chances.gather(2, tokens[:, first:, None]) > 0).all(1)[:, 0]

    def states(self, tokens):
        """(seen, predicted), bool [batch, pos, d_vocab], with each of the tokens as the last one.

        seen: which tokens are in the text so far. predicted: which are successors of a source.
        """
        one_hot = torch.nn.functional.one_hot(tokens, self.d_vocab).bool()
        return one_hot.cummax(1).values, self.predicted_odds(tokens) > 0


# Texts in pairs


def suppression_pairs(walks, n_pairs, generator):
    """n Pairs of texts in which a predicted token was seen (clean) or not (corrupted).

    walks: Walks. At the end of both texts two tokens are predicted with the same odds: `right` was
    not seen, and `wrong` was seen in the clean text alone. In the corrupted one another token
    stands in its place, which is not predicted at the end. Both texts can be drawn from the walks.
    So the logit of right less that of wrong is what is taken off because of what was seen.
    Raises UserError for walks in which no two successors are equally likely.
    """
    odds = walks.odds * len(walks.lags)
    if len(set(odds)) == len(odds):
        raise UserError(f"odds={walks.odds} with lags={walks.lags} make no two successors equally "
                        "likely; give two tokens the same odds")
    pairs = []
    while len(pairs) < n_pairs:
        tokens, _ = walks.draw(n_pairs, generator)
        found = [pair_of_text(walks, text, generator) for text in tokens[:, :-1]]
        pairs += [pair for pair in found if pair is not None]
    clean, corrupted, right, wrong = zip(*pairs[:n_pairs], strict=True)
    return Pairs(torch.stack(clean), torch.stack(corrupted), torch.stack(right),
                 torch.stack(wrong))


def pair_of_text(walks, text, generator):
    """(clean, corrupted [pos], right, wrong []) of one text [pos], as in `suppression_pairs`; None
    where it has no such pair."""
    odds = walks.predicted_odds(text[None])[0, -1]  # [d_vocab]
    count = torch.bincount(text, minlength=walks.d_vocab)
    n_fixed = max(walks.lags)  # the sources of the last prediction stay
    count_early = torch.bincount(text[:-n_fixed], minlength=walks.d_vocab)

    # a seen and an unseen token, predicted with the same odds
    was_seen_once = (odds > 0) & (count == 1) & (count_early == 1)
    is_unseen = (odds > 0) & (count == 0)
    fits = was_seen_once[:, None] & is_unseen & (odds[:, None] == odds)  # [wrong, right]
    if not fits.any():
        return None
    wrong, right = draw_row(fits.nonzero(), generator)

    # any token in the place of the seen one that leaves the text possible
    every = torch.arange(walks.d_vocab)
    others = torch.where(text == wrong, every[:, None], text)  # [replacement, pos]
    leaves_possible = walks.are_possible(others) & (odds == 0)
    if not leaves_possible.any():
        return None
    return text, draw_row(others[leaves_possible], generator), right, wrong


def draw_row(rows, generator):
    """One row of a tensor, each as likely."""
    return rows[torch.randint(len(rows), (), generator=generator)]


# The training


@dataclass(frozen=True)
class SuppressionRecipe(Walks):
    """All that one trained model depends on: the walks that it is trained on, whose seed is its own
    too, its shape, and its training."""

    n_layers: int = 2
    n_heads: int = 2
    d_model: int = 64
    attn_only: bool = True
    tie_embeddings: bool = True
    steps: int = 3000
    batch_size: int = 32
    lr: float = 5e-3
    muon_lr: float = 0.02

    @property
    def n_ctx(self):
        """The context: all of a text but its last token."""
        return self.n_pos - 1

    def model_config(self):
        """The ModelConfig of its shape."""
        return ModelConfig(
            n_layers=self.n_layers, n_heads=self.n_heads, d_model=self.d_model, n_ctx=self.n_ctx,
            d_vocab=self.d_vocab, attn_only=self.attn_only,
            tie_embeddings=self.tie_embeddings)


def batches(recipe):
    """Yields (inputs, targets), each [batch, pos], without end; the uniform tokens at a text's
    beginning are no targets."""
    generator = seeded_generator(recipe.seed)
    while True:
        tokens, _ = recipe.draw(DRAWN_AT_ONCE * recipe.batch_size, generator)
        targets = tokens.clone()
        targets[:, :max(recipe.lags)] = IGNORED
        for batch, wanted in zip(tokens.split(recipe.batch_size), targets.split(recipe.batch_size),
                                 strict=True):
            yield batch[:, :-1], wanted[:, 1:]


def trained_suppressor(folder, recipe, *, retrain=False, trainings=None):
    """The model of a SuppressionRecipe, trained, or read from the checkpoint.pt in `folder`.

    retrain: train it even if it is there. trainings: the Trainings that this model is one of.
    """
    how = TrainConfig(max_steps=recipe.steps, batch_size=recipe.batch_size, lr=recipe.lr,
                      muon_lr=recipe.muon_lr, warmup_steps=40, weight_decay=0.0)
    supply = batches(recipe)

    def train(model):
        fit_with_progress(model, supply.__next__, how, folder.name.replace("_", " "),
                          trainings=trainings)

    model, _ = trained_gpt(folder / "checkpoint.pt", recipe.model_config(), recipe.seed, train,
                           tokenizer=CharTokenizer().fit(NAMES[:recipe.d_vocab]),
                           settings=asdict(recipe), retrain=retrain, trainings=trainings)
    return model
