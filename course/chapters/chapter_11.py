"""Chapter 11, induction: which token followed which, and the two heads that find it."""

import torch

from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import Wrong, expect, expect_close, expect_equal, random
from course.engine.page import stated
from metrics import induction_score

IMPORTS = ["import torch"]
TOKENS = torch.tensor([[5, 2, 7, 5, 2, 7], [1, 1, 3, 4, 3, 1]])


def pair_of(result):
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong("two things should be returned, as in `return inputs, targets`")
    return result


# repeated_batch


def draw(repeated_batch, seed=0, rows=40, n_ctx=16):
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = pair_of(repeated_batch(50, rows, n_ctx, generator))
    for name, tokens in (("inputs", inputs), ("targets", targets)):
        expect(tokens.shape == (rows, n_ctx), f"{name} are {list(tokens.shape)}, and should be "
               f"[batch {rows}, pos {n_ctx}]")
        expect(not tokens.is_floating_point(), f"{name} are {tokens.dtype}, and should be whole "
               "numbers: ids")
    return inputs, targets


def period_of(row):
    """The smallest period from 1 on with which a row repeats; its length for none."""
    return next((p for p in range(1, len(row)) if torch.equal(row[p:], row[:-p])), len(row))


def each_row_repeats(repeated_batch):
    """each row repeats with a period from 4 to 8, targets included"""
    inputs, targets = draw(repeated_batch)
    expect(torch.equal(inputs[:, 1:], targets[:, :-1]), "targets are not the inputs, a token later")
    for row in torch.cat([inputs, targets[:, -1:]], 1):
        period = period_of(row)
        expect(4 <= period <= 8, f"a row of 17 tokens has the period {period}: {row.tolist()}; it "
               "should be from 4 to 8")


def rows_have_periods_of_their_own(repeated_batch):
    """all periods from 4 to 8 come up in one batch"""
    inputs, _ = draw(repeated_batch, rows=100)
    found = sorted({period_of(row) for row in inputs})
    expect(found == [4, 5, 6, 7, 8], f"the periods of 100 rows are {found}; if all rows had the "
                                     "same, looking that far back would be enough")
    inputs, _ = draw(repeated_batch, rows=100, n_ctx=15)
    longest = max(period_of(row) for row in inputs)
    expect(longest == 8, f"in 100 rows of n_ctx 15 the longest period is {longest}, and should be "
           "8, (n_ctx + 1) // 2: inputs and targets together have n_ctx + 1 tokens")


def any_token_may_come(repeated_batch):
    """each id from 0 to d_vocab - 1 comes up, and within a period one may come twice"""
    inputs, _ = draw(repeated_batch, rows=400)
    expect(inputs.unique().tolist() == list(range(50)), f"the ids of 400 rows run from "
           f"{inputs.min()} to {inputs.max()}, {len(inputs.unique())} of 50 ids")
    twice = sum(len(row[:4].unique()) < 4 for row in inputs)
    expect(twice > 0, "no token comes twice within a period: each should be drawn independently")


def the_generator_decides(repeated_batch):
    """the same generator gives the same batch, another one gives another"""
    first, again, other = (draw(repeated_batch, seed)[0] for seed in (1, 1, 2))
    expect(torch.equal(first, again), "the same generator gave two different batches")
    expect(not torch.equal(first, other), "two generators gave the same batch")


# earlier_occurrences


def where_it_stood_before(earlier_occurrences):
    """in 5 2 7 5 2 7 the second 5 (position 3) stood at position 0"""
    found = earlier_occurrences(TOKENS)
    expect(getattr(found, "shape", None) == (2, 6, 6), "it should be [batch 2, query_pos 6, "
           "key_pos 6]")
    expect(bool(found[0, 3, 0]), "query 3 (a 5) should find the 5 at key 0")
    expect(not found[0, 3, 3], "query 3 finds itself, which is not earlier")
    expect(not found[0, 0, 3], "query 0 finds key 3, which comes later")


def all_of_them_count(earlier_occurrences):
    """it equals a comparison of all pairs, one by one"""
    want = torch.zeros(2, 6, 6)
    for row in range(2):
        for query in range(6):
            for key in range(query):
                want[row, query, key] = float(TOKENS[row, key] == TOKENS[row, query])
    found = earlier_occurrences(TOKENS)
    expect(found.dtype == torch.bool, f"it is {found.dtype}, and should be of booleans")
    expect_close(found.float(), want, "the table", "batch query_pos key_pos")


# duplicate_token_score, induction_score


def looking(*keys):
    """A pattern [1, 1, query_pos, key_pos] whose queries look at these keys."""
    return torch.eye(len(keys))[list(keys)][None, None]


REPEAT = torch.tensor([[5, 2, 7, 5, 2, 7]])
UNEVEN = torch.tensor([[5, 2, 7, 3, 2, 7], [1, 1, 3, 4, 3, 1]])  # two queries repeat, and three
PATTERN = random(2, 3, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9).softmax(-1)


def who_looks_at_the_same_token_scores_one(duplicate_token_score):
    """in 5 2 7 5 2 7, queries 3, 4 and 5 that look at 0, 1 and 2 score 1"""
    expect_close(duplicate_token_score(looking(0, 0, 0, 0, 1, 2), REPEAT), torch.ones(1, 1),
                 "the score", "batch head", ask="queries 0, 1 and 2 have no earlier occurrence, "
                 "and are not counted")


def itself_does_not_count(duplicate_token_score):
    """a head that looks at itself scores 0"""
    expect_close(duplicate_token_score(looking(0, 1, 2, 3, 4, 5), REPEAT), torch.zeros(1, 1),
                 "the score", "batch head")


def several_occurrences_are_summed(duplicate_token_score):
    """if a token occurred twice before, both count"""
    even = torch.ones(3, 3).tril() / torch.arange(1.0, 4)[:, None]
    got = duplicate_token_score(even[None, None], torch.tensor([[4, 4, 4]]))
    expect_close(got, torch.tensor([[(1 / 2 + 2 / 3) / 2]]), "the score of even attention",
                 "batch head", ask="sum over keys, then average over the queries that have any")


def who_looks_at_what_followed_scores_one(induction_score):
    """in 5 2 7 5 2 7, queries 3, 4 and 5 that look at 1, 2 and 3 score 1"""
    expect_close(induction_score(looking(0, 0, 0, 1, 2, 3), REPEAT), torch.ones(1, 1), "the score",
                 "batch head", ask="the key after the earlier occurrence; queries without one are "
                 "not counted")


def one_too_early_scores_nothing(induction_score):
    """a head that looks at the earlier occurrence itself scores 0"""
    expect_close(induction_score(looking(0, 0, 0, 0, 1, 2), REPEAT), torch.zeros(1, 1),
                 "the score of a head that is one place too early", "batch head")


def induction_equals_a_loop(induction_score):
    """it equals a loop over rows, heads and queries"""
    want = torch.zeros(2, 3)
    for row in range(2):
        ids = TOKENS[row].tolist()
        keys = {query: [key + 1 for key in range(query) if ids[key] == ids[query]]
                for query in range(6)}
        for head in range(3):
            paid = [sum(PATTERN[row, head, query, key].item() for key in found)
                    for query, found in keys.items() if found]
            want[row, head] = sum(paid) / len(paid)
    expect_close(induction_score(PATTERN, TOKENS), want, "the score", "batch head",
                 ask="every key after an earlier occurrence counts, be it the query itself; then "
                     "the mean over the queries that have any")


def duplicates_equal_a_loop(duplicate_token_score):
    """each text and each head has its own"""
    want = torch.zeros(2, 3)
    for row in range(2):
        ids = UNEVEN[row].tolist()
        for head in range(3):
            paid = [sum(PATTERN[row, head, query, key].item() for key in range(query)
                        if ids[key] == ids[query])
                    for query in range(6) if ids[query] in ids[:query]]
            want[row, head] = sum(paid) / len(paid)
    expect_close(duplicate_token_score(PATTERN, UNEVEN), want, "the score", "batch head",
                 ask="the mean is over this text's queries that have an earlier occurrence")


# wire_induction


def each_query_looks_at_one_key(wire_induction):
    """rows sum to 1, and no query looks ahead"""
    pattern = wire_induction(TOKENS)
    expect_close(pattern.sum(-1), torch.ones(2, 6), "the sum of a row", "batch query_pos",
                 ask="each query looks at one key, a new token's at position 0")
    for row, query, key in pattern.triu(1).nonzero()[:1].tolist():
        raise Wrong(f"in text {row}, query {query} looks at key {key}, which comes later")


def its_induction_score_is_one(wire_induction):
    """its induction score is 1"""
    score = induction_score(wire_induction(TOKENS)[:, None], TOKENS)
    expect_close(score, torch.ones(2, 1), "the induction score", "batch head",
                 ask="the key after the earlier occurrence")


def the_latest_occurrence_counts(wire_induction):
    """in 1 2 1 3 1 the last 1 looks at the 3; a new token at position 0"""
    pattern = wire_induction(torch.tensor([[1, 2, 1, 3, 1]]))
    expect_equal(pattern[0].argmax(-1).tolist(), [0, 0, 1, 0, 3], "where the queries look",
                 ask="of several earlier occurrences, the latest")


# copy_prediction


def it_predicts_what_it_looks_at(copy_prediction):
    """all attention on a 7 predicts a 7"""
    chances = copy_prediction(looking(0, 1, 2)[0], torch.tensor([[5, 2, 7]]), 9)
    expect_close(chances, torch.eye(9)[[5, 2, 7]][None], "the chances", "batch query_pos token")


def keys_with_one_token_add_up(copy_prediction):
    """attention to two keys that hold one token adds up; rows sum to 1"""
    pattern = torch.tensor([[1, 0, 0, 0], [0.4, 0.6, 0, 0], [0.3, 0.2, 0.5, 0], [0.5, 0.2, 0.3, 0]])
    want = torch.zeros(1, 4, 6)
    want[0, :, 4] = torch.tensor([1, 0.4, 0.8, 0.8])
    want[0, :, 1] = torch.tensor([0, 0.6, 0.2, 0.2])
    expect_close(copy_prediction(pattern[None], torch.tensor([[4, 1, 4, 2]]), 6), want,
                 "the chances", "batch query_pos token", ask="keys 0 and 2 both hold a 4")


# loss_by_repeat


def the_first_time_and_the_repeat(loss_by_repeat):
    """with period 3, losses 0 and 1 are of the first time, 2, 3, … of the repeat"""
    losses = torch.tensor([[4.0, 4, 1, 1, 1]])
    first, repeated = pair_of(loss_by_repeat(losses, 3))
    expect_close(first, 4.0, "the mean loss of the first time", ask="loss i is about token i + 1")
    expect_close(repeated, 1.0, "the mean loss of the repeat", ask="token 3 is the first that was "
                 "there before, and loss 2 is about it")


def all_rows_count(loss_by_repeat):
    """means are over rows too"""
    losses = random(3, 9).abs()
    first, repeated = pair_of(loss_by_repeat(losses, 4))
    expect_close(first, losses[:, :3].mean(), "the mean loss of the first time")
    expect_close(repeated, losses[:, 3:].mean(), "the mean loss of the repeat",
                 ask="all repetitions count, to the end of the text")


# k_composition


def keys_read_what_was_written(k_composition):
    """if dimension 1 is written, keys that read it give 1, and queries that read it give 0"""
    W_OV, W_QK = torch.zeros(3, 3), torch.zeros(3, 3)
    W_OV[0, 1] = 1  # reads dimension 0, writes dimension 1
    W_QK[2, 1] = 1  # the query in dimension 2 matches the key in dimension 1
    expect_close(k_composition(W_OV, W_QK), 1.0, "the score", ask="the key stands on the right of "
                 "W_QK, and what is written comes out on the right of W_OV")
    expect_close(k_composition(W_OV, W_QK.T), 0.0, "the score where the query reads dimension 1",
                 ask="that would be Q-composition")


def sizes_do_not_matter(k_composition):
    """weights ten times as large have the same score"""
    W_OV, W_QK = random(4, 4), random(4, 4, seed=1)
    want = torch.einsum("qk,rk->qr", W_QK, W_OV).norm() / W_QK.norm() / W_OV.norm()
    expect_close(k_composition(10 * W_OV, W_QK), want, "the score", ask="Frobenius norms, of the "
                 "product and of both")


# first_crossing


def the_first_step_above(first_crossing):
    """a rising curve crosses at its first step above the level"""
    expect_equal(first_crossing([0, 10, 20, 30], [0.1, 0.4, 0.6, 0.9], 0.5), 20, "the crossing")
    expect_equal(first_crossing([0, 10], [0.7, 0.6], 0.5), 0, "the crossing of a curve that is "
                 "above from the start", ask="step 0 is a step")
    expect_equal(first_crossing([0, 10, 20], [0.1, 0.5, 0.6], 0.5), 10, "the crossing of a curve "
                 "that is at the level at step 10", ask="at the level is not below it")


def for_good(first_crossing):
    """a peak that falls below the level again does not count"""
    got = first_crossing([0, 10, 20, 30], [0.1, 0.8, 0.2, 0.9], 0.5)
    expect_equal(got, 30, "the crossing of a curve that falls back at step 20")


def never_is_none(first_crossing):
    """a curve that ends below the level has no crossing"""
    got = first_crossing([0, 10, 20], [0.1, 0.8, 0.2], 0.5)
    expect(got is None, f"a curve that ends below the level has crossed at {got}; it should be "
                         "None")


EXERCISES = [
    Exercise(
        name="repeated_batch", source="data.repeated_batch", minutes=15, difficulty=2,
        needed_for="training a model that has induction to learn",
        task="The only thing to predict is what followed before.",
        checks=(each_row_repeats, rows_have_periods_of_their_own, any_token_may_come,
                the_generator_decides),
        hints=("One row at a time is fine: a period, a piece, repeated and cut off.",
               "torch.randint(4, longest + 1, …): its upper end is left out.",
               "n_ctx + 1 tokens hold inputs and targets: [:, :-1] and [:, 1:]."),
        mistakes=(
            Mistake("when all rows have one period",
                    "        period = int(torch.randint(4, longest + 1, (1,), "
                    "generator=generator))\n",
                    "        period = longest\n"),
            Mistake("when the longest period never comes up", "longest + 1, (1,)", "longest, (1,)"),
            Mistake("when nothing repeats", "piece.repeat(times)[: n_ctx + 1]",
                    "torch.randint(d_vocab, (n_ctx + 1,), generator=generator)"),
            Mistake("when targets are the inputs", "windows[:, 1:]", "windows[:, :-1]"),
            Mistake("when inputs and targets are exchanged", "windows[:, :-1], windows[:, 1:]",
                    "windows[:, 1:], windows[:, :-1]"),
            Mistake("when the last target is the first token: roll goes round",
                    "windows[:, 1:]", "windows[:, :-1].roll(-1, 1)"),
            Mistake("when the id 0 never comes", "torch.randint(d_vocab, (period,)",
                    "torch.randint(1, d_vocab, (period,)"),
        )),
    Exercise(
        name="earlier_occurrences", source="metrics.earlier_occurrences", minutes=10, difficulty=1,
        needed_for="both scores", task="Compare all pairs of tokens.",
        checks=(where_it_stood_before, all_of_them_count),
        hints=("Compare a column of tokens with a row of the same.",
               "tokens[:, :, None] == tokens[:, None, :].",
               "Earlier means below the diagonal: tril(-1)."),
        mistakes=(
            Mistake("when a token finds itself", ".tril(-1)", ".tril()"),
            Mistake("when it looks into the future", ".tril(-1)", ".triu(1)"),
            Mistake("without an order: earlier and later", ".tril(-1)", ""),
        )),
    Exercise(
        name="duplicate_token_score", source="metrics.duplicate_token_score", minutes=10,
        difficulty=1, needed_for="telling induction from its neighbours",
        task="Sum over keys, mean over queries.",
        checks=(who_looks_at_the_same_token_scores_one, itself_does_not_count,
                several_occurrences_are_summed, duplicates_equal_a_loop),
        hints=("Multiply the pattern by the table of earlier occurrences.",
               "How many queries have any? earlier.any(-1).sum(-1).",
               "(pattern * earlier[:, None]).sum((-2, -1)) / n_queries[:, None]."),
        mistakes=(
            Mistake("when queries without an earlier occurrence count too",
                    "earlier.any(-1).sum(-1)", "torch.full((len(tokens),), tokens.shape[1])"),
            Mistake("with the mean over keys instead of their sum", "earlier.any(-1).sum(-1)",
                    "earlier.sum((-2, -1))"),
            Mistake("divided by the queries of all texts together", "earlier.any(-1).sum(-1)",
                    "earlier.any(-1).sum().expand(len(tokens))"),
            Mistake("with the pattern's queries and keys exchanged", "(pattern * earlier",
                    "(pattern.mT * earlier"),
            Mistake("without the mean over queries", " / n_queries[:, None]", ""),
        )),
    Exercise(
        name="induction_score", source="metrics.induction_score", minutes=15, difficulty=2,
        needed_for="finding induction heads", task="One to the right of the earlier occurrence.",
        checks=(who_looks_at_what_followed_scores_one, one_too_early_scores_nothing,
                induction_equals_a_loop),
        hints=("The key that counts is the one after the earlier occurrence.",
               "Shift the table of earlier occurrences by one along the keys.",
               "after[:, :, 1:] = earlier[:, :, :-1], and then as in duplicate_token_score."),
        mistakes=(
            Mistake("one place too early: at the earlier occurrence itself",
                    "after[:, :, 1:] = earlier[:, :, :-1]", "after = earlier"),
            Mistake("one place before the earlier occurrence",
                    "after[:, :, 1:] = earlier[:, :, :-1]", "after[:, :, :-1] = earlier[:, :, 1:]"),
            Mistake("when the queries are shifted instead of the keys",
                    "after[:, :, 1:] = earlier[:, :, :-1]", "after[:, 1:] = earlier[:, :-1]"),
            Mistake("when queries without an earlier occurrence count too",
                    "after.any(-1).sum(-1)", "torch.full((len(tokens),), tokens.shape[1])"),
            Mistake("with the pattern's queries and keys exchanged", "(pattern * after",
                    "(pattern.mT * after"),
            Mistake("for the latest earlier occurrence alone",
                    "    after = torch.zeros_like(earlier)\n",
                    "    earlier = earlier & (earlier.flip(-1).cumsum(-1).flip(-1) == 1)\n"
                    "    after = torch.zeros_like(earlier)\n"),
            Mistake("with the mean over keys instead of their sum", "after.any(-1).sum(-1)",
                    "after.sum((-2, -1))"),
        )),
    Exercise(
        name="wire_induction", source=None, minutes=15, difficulty=2,
        needed_for="the ideal that a trained head is compared with", task="By hand, in loops.",
        checks=(each_query_looks_at_one_key, its_induction_score_is_one,
                the_latest_occurrence_counts),
        hints=("For each query, look for its token among the earlier positions.",
               "The last one found is the latest.", "Attention 1 goes to the position after it."),
        mistakes=(
            Mistake("at the earlier occurrence itself: a duplicate-token head",
                    "key = earlier + 1", "key = earlier"),
            Mistake("at what followed the first occurrence, not the latest",
                    "                    key = earlier + 1  # a later one takes its place\n",
                    "                    key = earlier + 1\n                    break\n"),
            Mistake("when a new token looks at itself", "            key = 0\n",
                    "            key = query\n"),
        )),
    Exercise(
        name="copy_prediction", source=None, minutes=10, difficulty=1,
        needed_for="what the OV circuit does", task="Turn the pattern into a prediction.",
        checks=(it_predicts_what_it_looks_at, keys_with_one_token_add_up),
        hints=("Each key holds a token: a one-hot vector.", "The pattern weighs these vectors.",
               "pattern @ one_hot(tokens, d_vocab).float()."),
        mistakes=(
            Mistake("of the tokens that follow the keys", "one_hot(tokens, d_vocab)",
                    "one_hot(tokens.roll(-1, 1), d_vocab)"),
            Mistake("with the pattern transposed", "pattern @ hot", "pattern.mT @ hot"),
            Mistake("of the query's own token", "pattern @ hot",
                    "torch.eye(pattern.shape[-1])[-pattern.shape[1]:] @ hot"),
            Mistake("of the one key with most attention", "pattern @ hot",
                    "torch.eye(pattern.shape[-1])[pattern.argmax(-1)] @ hot"),
            Mistake("when of several keys with one token only the last counts",
                    "return pattern @ hot",
                    "return torch.zeros(*pattern.shape[:2], d_vocab).scatter("
                    "2, tokens[:, None].expand_as(pattern), pattern)"),
            Mistake("after a softmax, which the pattern has had already", "pattern @ hot",
                    "(pattern @ hot).softmax(-1)"),
        )),
    Exercise(
        name="loss_by_repeat", source=None, minutes=10, difficulty=1,
        needed_for="seeing that induction helps", task="Mind the shift by one.",
        checks=(the_first_time_and_the_repeat, all_rows_count),
        hints=("Loss i is about token i + 1.", "Token `period` is the first that was there before: "
               "loss period - 1.", "losses[:, : period - 1].mean(), losses[:, period - 1 "
                                   ":].mean()."),
        mistakes=(
            Mistake("off by one: as if loss i were about token i", "losses[:, : period - 1]",
                    "losses[:, :period]",
                    also=(("losses[:, period - 1 :]", "losses[:, period:]"),)),
            Mistake("when first and repeated are exchanged", "return first, repeated",
                    "return repeated, first"),
            Mistake("with one loss too many in the first part: off by one the other way",
                    "losses[:, : period - 1]", "losses[:, : period + 1]",
                    also=(("losses[:, period - 1 :]", "losses[:, period + 1 :]"),)),
            Mistake("when axis 0, the batch, is cut instead of the positions",
                    "losses[:, : period - 1]", "losses[: period - 1]",
                    also=(("losses[:, period - 1 :]", "losses[period - 1 :]"),)),
            Mistake("of the first repetition alone", "losses[:, period - 1 :]",
                    "losses[:, period - 1 : 2 * period - 1]"),
            Mistake("without loss period - 1, which is about the first repeated token",
                    "losses[:, period - 1 :]", "losses[:, period:]"),
            Mistake("with sums instead of means", "losses[:, : period - 1].mean()",
                    "losses[:, : period - 1].sum()",
                    also=(("losses[:, period - 1 :].mean()", "losses[:, period - 1 :].sum()"),)),
        )),
    Exercise(
        name="k_composition", source=None, minutes=15, difficulty=3,
        needed_for="why it takes two layers", task="Which side of W_QK is the key's?",
        checks=(keys_read_what_was_written, sizes_do_not_matter),
        hints=("At the key stands resid @ W_OV, a row vector; W_QK wants the key on its right.",
               "score = query @ W_QK @ (resid @ W_OV)^T.",
               "W_QK @ W_OV.T; its norm over both norms."),
        mistakes=(
            Mistake("of the queries: Q-composition", "W_QK @ W_OV.T", "W_OV @ W_QK"),
            Mistake("without the transposition", "W_QK @ W_OV.T", "W_QK @ W_OV"),
            Mistake("without the division by the norms", " / (W_QK.norm() * W_OV.norm())", ""),
            Mistake("when one norm divides and the other multiplies: a / b * c is (a / b) * c",
                    " / (W_QK.norm() * W_OV.norm())", " / W_QK.norm() * W_OV.norm()"),
            Mistake("of what the earlier head reads, instead of what it writes", "W_QK @ W_OV.T",
                    "W_OV.T @ W_QK"),
        )),
    Exercise(
        name="first_crossing", source=None, minutes=10, difficulty=1,
        needed_for="when a head is there (chapters 11 and 15)", task="For good.",
        checks=(the_first_step_above, for_good, never_is_none),
        hints=("Remember the step at which it rose to the level.",
               "Forget it if the curve falls below.", "Ask `is None`: step 0 is a step."),
        mistakes=(
            Mistake("when a peak that falls below again counts",
                    "        if value < level:\n            crossing = None\n        elif",
                    "        if value >= level and"),
            Mistake("when step 0 counts as no step", "elif crossing is None:",
                    "elif not crossing:"),
            Mistake("with the last step instead of the first", "elif crossing is None:", "else:"),
            Mistake("when a value at the level counts as below", "value < level",
                    "value <= level"),
            Mistake("with the place in the list instead of the step",
                    "zip(steps, values, strict=True)", "enumerate(values)"),
        )),
]

PREDICTIONS = [
    Prediction("Before training, what is the loss on a repeated token out of 100, in nats?",
               stated(11, "step 0: loss on repeats about {}, one back"), "the chapter's block"),
    Prediction("A head looks one place too early, at the earlier occurrence itself. How high is "
               "its induction score?",
               stated(11, "a head that looks at the token itself: {}"), "the chapter's block"),
    Prediction("Take the previous-token head away. What is the loss on repeats then, which was "
               "0.03 nats?",
               stated(11, "removed: previous-token head; loss on repeats about {}, induction"),
               "the chapter's block"),
    Prediction("And how high is the induction head's score then, which was 0.97?",
               stated(11, "removed: previous-token head; loss on repeats about …, induction about "
                          "{}"),
               "the chapter's block"),
]
