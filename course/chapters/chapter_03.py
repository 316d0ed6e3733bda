"""Chapter 3, the stream as a sum: lookups, the direct path, and positions that rotate."""

import math

import torch

from config import ModelConfig
from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import expect, expect_close, expect_shape, random, random_ids
from course.engine.page import stated
from embeddings import TokenEmbedding, sinusoidal_positions

IMPORTS = ["import math", "import torch", "import torch.nn.functional as F"]


# one_hot


def one_at_the_id(one_hot):
    """token 2 of 4 is (0, 0, 1, 0)"""
    expect_close(one_hot(torch.tensor([2]), 4), torch.tensor([[0.0, 0, 1, 0]]), "the vector",
                 "token id")


def of_any_shape(one_hot):
    """tokens [batch, pos] give [batch, pos, d_vocab], in floats"""
    tokens = random_ids(5, 2, 3)
    vectors = one_hot(tokens, 5)
    expect_close(vectors, torch.eye(5)[tokens], "the vectors", "batch pos id")
    expect(vectors.is_floating_point(), f"the vectors are {vectors.dtype}: only floats can be "
           "multiplied with W_E")


# embed_tokens


def table():
    """A TokenEmbedding with random weights."""
    embedding = TokenEmbedding(ModelConfig(d_vocab=7, d_model=4, n_heads=1))
    with torch.no_grad():
        embedding.W_E.copy_(random(7, 4))
    return embedding


def a_lookup_is_a_product(embed_tokens):
    """it equals one_hot(tokens) @ W_E"""
    tokens = random_ids(7, 2, 3)
    want = torch.eye(7)[tokens] @ table().W_E
    expect_close(embed_tokens(table(), tokens), want, "the embedding", "batch pos d_model")


def the_table_learns_from_what_was_looked_up(embed_tokens):
    """each row's gradient counts how often it was looked up"""
    embedding = table()
    resid = embed_tokens(embedding, torch.tensor([[3, 3, 5]]))
    expect(resid.requires_grad, "no gradient reaches W_E: is it a copy?")
    resid.sum().backward()
    times = embedding.W_E.grad[:, 0]
    expect_close(times, torch.tensor([0.0, 0, 0, 2, 0, 1, 0]), "the gradient of W_E", "row")


# embed_text


def it_is_a_sum(embed_text):
    """each position is its token's row plus its position's row"""
    W_E, W_pos, tokens = random(7, 4), random(6, 4, seed=1), random_ids(7, 2, 6)
    resid = embed_text(tokens, W_E, W_pos)
    expect_close(resid, W_E[tokens] + W_pos, "the stream", "batch pos d_model")


def a_short_text_uses_the_first_rows(embed_text):
    """a text of 3 positions uses W_pos[0], W_pos[1] and W_pos[2]"""
    resid = embed_text(torch.tensor([[2, 0, 1]]), torch.zeros(7, 4), random(6, 4, seed=1))
    expect_close(resid[0], random(6, 4, seed=1)[:3], "the stream of a text of 3 positions",
                 "pos d_model")


# unembed_stream


def a_logit_is_a_dot_product(unembed_stream):
    """the logit of token 2 is the stream times column 2 of W_U, plus b_U[2]"""
    resid, W_U, b_U = random(2, 3, 4), random(4, 7, seed=1), random(7, seed=2)
    logits = unembed_stream(resid, W_U, b_U)
    expect_shape(logits, (2, 3, 7), "the result")
    expect_close(logits[..., 2], (resid * W_U[:, 2]).sum(-1) + b_U[2], "the logit of token 2",
                 "batch pos")


def parts_of_the_stream_add_up(unembed_stream):
    """unembedding is linear: two parts of the stream give two parts of the logits"""
    one, other, W_U = random(1, 2, 4), random(1, 2, 4, seed=1), random(4, 7, seed=2)
    none = torch.zeros(7)
    together = unembed_stream(one + other, W_U, none)
    expect_close(unembed_stream(one, W_U, none) + unembed_stream(other, W_U, none), together,
                 "the sum of the parts' logits", "batch pos token")


# direct_path


def each_row_is_a_distribution(direct_path):
    """the exp of each row sums to 1"""
    total = direct_path(random(5, 3), random(3, 5, seed=1)).exp().sum(-1)
    expect_close(total, torch.ones(5), "the sum of the chances", "token", ask="the rows are the "
                                                                              "present tokens, "
                                                                              "the columns the "
                                                                              "next ones")


def it_is_what_the_model_says(direct_path):
    """row t is log softmax of W_E[t] @ W_U"""
    W_E, W_U = random(5, 3), random(3, 5, seed=1)
    want = torch.stack([(W_E[token] @ W_U).log_softmax(-1) for token in range(5)])
    expect_close(direct_path(W_E, W_U), want, "the table", "token next_token")


# bigram_table


def pairs_are_counted_in_order(bigram_table):
    """in 0 1 1 the pairs are 0 1 and 1 1"""
    chances = bigram_table(torch.tensor([0, 1, 1]), 2, alpha=1e-6)
    expect_close(chances, torch.tensor([[0.0, 1], [0, 1]]), "the chances", "token next_token",
                 tolerance=1e-3, ask="the row is the earlier token, and alpha is 1e-6 here")


def alpha_is_added_to_every_count(bigram_table):
    """with alpha 1, 0 0 0 1 gives row 0 chances of 3/5 and 2/5, and an unseen row even ones"""
    chances = bigram_table(torch.tensor([0, 0, 0, 1]), 2)
    expect_close(chances, torch.tensor([[3 / 5, 2 / 5], [1 / 2, 1 / 2]]), "the chances",
                 "token next_token")


def the_chances_of_a_row_sum_to_one(bigram_table):
    """each row sums to 1"""
    chances = bigram_table(random_ids(6, 200), 6)
    expect_close(chances.sum(1), torch.ones(6), "the sum of a row", "token")


# sinusoidal_positions


def position_zero_is_zeros_and_ones(sinusoidal_positions):
    """at position 0 sines are 0 and cosines 1, one after another"""
    expect_close(sinusoidal_positions(5, 4)[0], torch.tensor([0.0, 1, 0, 1]), "position 0",
                 "d_model", ask="the angle is 0 there; sin and cos take turns")


def the_first_pair_turns_once_in_two_pi(sinusoidal_positions):
    """dimensions 0 and 1 of position 1 are sin 1 and cos 1"""
    expect_close(sinusoidal_positions(5, 4)[1, :2], torch.tensor([math.sin(1), math.cos(1)]),
                 "position 1", "d_model", ask="the angle of the first pair is the position itself, "
                                              "in radians, for sin and cos")


def later_pairs_turn_more_slowly(sinusoidal_positions):
    """of 4 dimensions the second pair turns 100 times more slowly"""
    expect_close(sinusoidal_positions(5, 4)[4, 2:], torch.tensor([math.sin(0.04), math.cos(0.04)]),
                 "position 4, the second pair,", "entry",
                 ask="the angle is pos / 10,000^(2i / d_model), with 2i / d_model = 2/4")


def every_position_has_one_length(sinusoidal_positions):
    """sin² + cos² = 1 in each pair"""
    waves = sinusoidal_positions(50, 8)
    expect_close(waves.pow(2).sum(1), torch.full((50,), 4.0), "the squared length", "pos")


# shift_rotation


def no_shift_is_the_identity(shift_rotation):
    """a shift of 0 changes nothing"""
    expect_close(shift_rotation(6, 0), torch.eye(6), "R", "from to")


def it_moves_every_position(shift_rotation):
    """waves[pos] @ R is waves[pos + 3], everywhere"""
    waves = sinusoidal_positions(40, 6)
    expect_close(waves[:-3] @ shift_rotation(6, 3), waves[3:], "waves @ R", "pos d_model",
                 tolerance=1e-3, ask="sin(a + s) = sin a cos s + cos a sin s")


def back_again_is_its_transpose(shift_rotation):
    """it is a rotation: R @ R.T is the identity, and R.T shifts back"""
    R = shift_rotation(6, 3)
    expect_close(R @ R.T, torch.eye(6), "R @ R.T", "from to")
    expect_close(R.T, shift_rotation(6, -3), "R.T", "from to", ask="it should be the shift by -3")


EXERCISES = [
    Exercise(
        name="one_hot", source=None, minutes=5, difficulty=1,
        needed_for="seeing that every step is linear",
        task="Write a token as a vector.", checks=(one_at_the_id, of_any_shape),
        hints=("Compare the token with 0, 1, …, d_vocab - 1.",
               "tokens.unsqueeze(-1) == torch.arange(d_vocab) is a table of booleans.",
               ".float() turns them into numbers."),
        mistakes=(
            Mistake("when the ids are counted from 1", "torch.arange(d_vocab)",
                    "torch.arange(1, d_vocab + 1)"),
            Mistake("with integers instead of floats", ".float()", ".long()"),
        )),
    Exercise(
        name="embed_tokens", source="embeddings.TokenEmbedding.forward", minutes=5, difficulty=1,
        needed_for="the model (chapter 5)", task="Look up rows of W_E. You need not check the ids.",
        checks=(a_lookup_is_a_product, the_table_learns_from_what_was_looked_up),
        hints=("A product with a one-hot vector picks a row.",
               "A tensor can be indexed by a tensor of ids.", "self.W_E[tokens]."),
        mistakes=(
            Mistake("when W_E is detached: it can't learn", "self.W_E[tokens]",
                    "self.W_E.detach()[tokens]"),
            Mistake("when the ids are counted from 1", "self.W_E[tokens]", "self.W_E[tokens - 1]"),
            Mistake("with the factor sqrt(d_model)", "self.W_E[tokens]",
                    "self.W_E[tokens] * self.W_E.shape[1] ** 0.5"),
        )),
    Exercise(
        name="embed_text", source=None, minutes=5, difficulty=1, needed_for="the model (chapter 5)",
        task="Add token and position.",
        checks=(a_short_text_uses_the_first_rows, it_is_a_sum),
        hints=("Tokens look up W_E, positions W_pos.", "Position p uses row p, in every text.",
               "W_E[tokens] + W_pos[: tokens.shape[1]] broadcasts over the batch."),
        mistakes=(
            Mistake("without positions", " + W_pos[:n_pos]", ""),
            Mistake("when positions are looked up by token", "W_pos[:n_pos]",
                    "W_pos[tokens % len(W_pos)]"),
            Mistake("when positions are counted from 1", "W_pos[:n_pos]", "W_pos[1 : n_pos + 1]"),
            Mistake("when the row of the batch is taken for the position", "W_pos[:n_pos]",
                    "W_pos[: len(tokens)].unsqueeze(1)"),
            Mistake("when all positions get row 0", "W_pos[:n_pos]", "W_pos[0]"),
            Mistake("with the last rows of W_pos for a short text", "W_pos[:n_pos]",
                    "W_pos[-n_pos:]"),
            Mistake("with the product of both instead of the sum", "W_E[tokens] + W_pos",
                    "W_E[tokens] * W_pos"),
        )),
    Exercise(
        name="unembed_stream", source=None, minutes=5, difficulty=1,
        needed_for="the lens (chapter 8)", task="Turn the stream into logits.",
        checks=(a_logit_is_a_dot_product, parts_of_the_stream_add_up),
        hints=("Each token has a column of W_U.", "One matrix product gives all logits.",
               "resid @ W_U + b_U."),
        mistakes=(
            Mistake("without b_U", " + b_U", ""),
            Mistake("when b_U is subtracted", " + b_U", " - b_U"),
            Mistake("with probabilities instead of logits", "resid @ W_U + b_U",
                    "(resid @ W_U + b_U).softmax(-1)"),
            Mistake("with log probabilities instead of logits", "resid @ W_U + b_U",
                    "(resid @ W_U + b_U).log_softmax(-1)"),
        )),
    Exercise(
        name="direct_path", source=None, minutes=10, difficulty=1,
        needed_for="the zero-layer model; the direct path of every model",
        task="Write the whole model as one table.",
        checks=(each_row_is_a_distribution, it_is_what_the_model_says),
        hints=("A token's row of W_E goes straight into W_U.",
               "W_E @ W_U has a row for each token, a column for each that may follow.",
               "(W_E @ W_U).log_softmax(-1)."),
        mistakes=(
            Mistake("with softmax down the columns: over the earlier token", "log_softmax(-1)",
                    "log_softmax(0)"),
            Mistake("with the table transposed", "return logits.log_softmax(-1)",
                    "return logits.log_softmax(-1).T"),
            Mistake("with logits instead of log probabilities", "return logits.log_softmax(-1)",
                    "return logits"),
            Mistake("with probabilities instead of log probabilities", "log_softmax(-1)",
                    "softmax(-1)"),
            Mistake("with one softmax over the whole table", "return logits.log_softmax(-1)",
                    "return logits - logits.exp().sum().log()"),
            Mistake("with the product transposed", "W_E @ W_U", "(W_E @ W_U).T"),
        )),
    Exercise(
        name="bigram_table", source=None, minutes=15, difficulty=1,
        needed_for="comparing a model with counts (chapters 3 and 15)",
        task="Count pairs, then divide.",
        checks=(pairs_are_counted_in_order, alpha_is_added_to_every_count,
                the_chances_of_a_row_sum_to_one),
        hints=("tokens[:-1] are the earlier ones, tokens[1:] those that follow.",
               "A loop over both adds 1 to counts[token, following]; begin with alpha everywhere.",
               "counts / counts.sum(1, keepdim=True)."),
        mistakes=(
            Mistake("with the pairs the wrong way round: the token before, not after",
                    "counts[token, following]", "counts[following, token]"),
            Mistake("when columns sum to 1 instead of rows", "counts.sum(1, keepdim=True)",
                    "counts.sum(0, keepdim=True)"),
            Mistake("when the whole table sums to 1", "counts.sum(1, keepdim=True)",
                    "counts.sum()"),
            Mistake("without alpha", "torch.full((d_vocab, d_vocab), alpha)",
                    "torch.zeros(d_vocab, d_vocab)"),
            Mistake("when 1 is added, whatever alpha is", "torch.full((d_vocab, d_vocab), alpha)",
                    "torch.ones(d_vocab, d_vocab)"),
            Mistake("when alpha is added to the counts only, not to what they are divided by",
                    "counts.sum(1, keepdim=True)",
                    "(counts.sum(1, keepdim=True) - alpha * d_vocab)"),
            Mistake("when alpha is added to the divisor only once",
                    "counts.sum(1, keepdim=True)",
                    "(counts.sum(1, keepdim=True) - alpha * (d_vocab - 1))"),
            Mistake("without keepdim: each column is divided by the sum of a row",
                    "counts.sum(1, keepdim=True)", "counts.sum(1)"),
            Mistake("with counts that are not divided", " / counts.sum(1, keepdim=True)", ""),
            Mistake("without the last pair", "zip(tokens[:-1].tolist(), tokens[1:].tolist(),",
                    "zip(tokens[:-2].tolist(), tokens[1:-1].tolist(),"),
            Mistake("when a pair that comes again is not counted again", "+= 1", "= alpha + 1"),
        )),
    Exercise(
        name="sinusoidal_positions", source="embeddings.sinusoidal_positions", minutes=20,
        difficulty=2, needed_for="shift_rotation", task="Each pair of dimensions is a clock hand "
                                                        "with a speed of its own.",
        checks=(position_zero_is_zeros_and_ones, the_first_pair_turns_once_in_two_pi,
                later_pairs_turn_more_slowly, every_position_has_one_length),
        hints=("Each pair of dimensions is one hand: sin and cos of its angle.",
               "The hand of dimensions i and i + 1 (i even) turns by 10,000^(-i / d_model) a "
               "position.",
               "waves[:, i] = (pos / 10_000 ** (i / d_model)).sin(), and cos beside it."),
        mistakes=(
            Mistake("with all sines first and all cosines after them", "waves[:, i] =",
                    "waves[:, i // 2] =",
                    also=(("waves[:, i + 1] =", "waves[:, d_model // 2 + i // 2] ="),)),
            Mistake("when the number of the pair is used as the dimension: the hands slow down "
                    "too little",
                    "10_000 ** (i / d_model)", "10_000 ** (i / 2 / d_model)"),
            Mistake("when later hands turn faster", "pos / 10_000", "pos * 10_000"),
            Mistake("when positions are counted from 1", "torch.arange(n_ctx)",
                    "torch.arange(1, n_ctx + 1)"),
            Mistake("when the dimension is doubled, though it is twice the pair's number already",
                    "(i / d_model)", "(2 * i / d_model)"),
            Mistake("when the exponent ends at 1: the division is by d_model - 2",
                    "(i / d_model)", "(i / (d_model - 2))"),
            Mistake("when sin and cos of a pair have different angles",
                    "waves[:, i + 1] = angle.cos()",
                    "waves[:, i + 1] = (pos / 10_000 ** ((i + 1) / d_model)).cos()"),
            Mistake("when all hands turn equally fast", "pos / 10_000 ** (i / d_model)",
                    "pos * 1.0"),
            Mistake("with sin and cos exchanged", "angle.sin()",
                    "angle.cos()", also=(("waves[:, i + 1] = angle.cos()",
                                          "waves[:, i + 1] = angle.sin()"),)),
        )),
    Exercise(
        name="shift_rotation", source=None, minutes=25, difficulty=3,
        needed_for="seeing why a head can look k back everywhere (chapters 4 and 11)",
        task="Write the addition theorem as a matrix. Why does it not depend on the position?",
        checks=(no_shift_is_the_identity, it_moves_every_position, back_again_is_its_transpose),
        hints=("Each pair of dimensions turns by itself: R is made of 2 x 2 blocks.",
               "sin(a + s) = sin a cos s + cos a sin s; cos(a + s) = cos a cos s - sin a sin s.",
               "A row vector is multiplied from the left: R[i, i] and R[i + 1, i] make the new "
               "sin."),
        mistakes=(
            Mistake("when it shifts the wrong way: R is transposed", "R[i + 1, i] = sin",
                    "R[i + 1, i] = -sin", also=(("R[i, i + 1] = -sin", "R[i, i + 1] = sin"),)),
            Mistake("when all hands turn equally fast", "shift / 10_000 ** (i / d_model)", "shift"),
            Mistake("when the dimension is doubled, though it is twice the pair's number already",
                    "(i / d_model)", "(2 * i / d_model)"),
            Mistake("when the number of the pair is used as the dimension", "(i / d_model)",
                    "(i / 2 / d_model)"),
            Mistake("with both sines negative", "R[i + 1, i] = sin", "R[i + 1, i] = -sin"),
            Mistake("without the minus of cos(a + s)", "R[i, i + 1] = -sin", "R[i, i + 1] = sin"),
        )),
]

PREDICTIONS = [
    Prediction("Train a zero-layer model to the end. How far is it from the table of bigram "
               "counts, in nats of KL?",
               stated(3, "KL(bigram table, model), trained: {} nats"), "the chapter's block"),
    Prediction("And how far if its stream has 3 dimensions only?",
               stated(3, "rank three can't equal the bigrams', and {} nats remain"),
               "Negative control"),
]
