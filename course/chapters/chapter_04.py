"""Chapter 4, QK and OV: from the mask to a head that is wired by hand."""

import math

import torch

from attention import Attention
from config import ModelConfig
from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import Wrong, describe, expect, expect_close, random
from course.engine.page import stated
from metrics import prev_token_score

IMPORTS = ["import math", "import torch", "import torch.nn.functional as F"]


def tiny_attention(n_heads=2, d_model=6):
    """An Attention with random weights and biases."""
    attn = Attention(ModelConfig(n_heads=n_heads, d_model=d_model, n_ctx=8))
    with torch.no_grad():
        for seed, weight in enumerate(attn.parameters()):
            weight.copy_(random(*weight.shape, seed=seed))
    return attn


def heads(seed, n_pos=5):
    """Queries, keys or values, [batch, pos, head, d_head]."""
    return random(2, n_pos, 2, 3, seed=seed)


# causal_mask


def each_sees_itself_and_the_past(causal_mask):
    """position i may look at 0, 1, …, i"""
    mask = causal_mask(4, 4)
    expect(isinstance(mask, torch.Tensor) and mask.shape == (4, 4), "causal_mask(4, 4) should be a "
           f"tensor [query_pos 4, key_pos 4], and is {describe(mask)}")
    expect(mask.dtype == torch.bool, f"the mask is of {mask.dtype}, and should be of booleans, "
                                     "which ~mask and masked_fill need")
    for query in range(4):
        for key in range(4):
            if key > query:
                expect(not mask[query, key], f"position {query} may look at position {key}, which "
                       "comes later: is the mask the right way round?")
            else:
                expect(mask[query, key], f"position {query} may not look at position {key}, which "
                       f"is {'itself' if key == query else 'earlier'}")


def fewer_queries_are_the_last(causal_mask):
    """with 5 keys, 2 queries are at positions 3 and 4: they see 4 and 5 keys"""
    mask = causal_mask(2, 5)
    expect(mask.shape == (2, 5), f"causal_mask(2, 5) is {list(mask.shape)}, and should be [2, 5]")
    seen = mask.sum(-1).tolist()
    expect(seen == [4, 5], f"with 5 keys the two queries see {seen[0]} and {seen[1]}, and "
           "should see 4 and 5: the queries are the last positions")


def padding_is_hidden_but_from_itself(causal_mask):
    """a key that key_mask hides is seen only by itself"""
    key_mask = torch.tensor([[False, True, True], [True, True, True]])
    mask = causal_mask(3, 3, key_mask)
    expect(mask.shape == (2, 1, 3, 3), f"with a key_mask the mask is {list(mask.shape)}, and "
           "should be [batch 2, 1, query_pos 3, key_pos 3]")
    expect(not mask[0, 0, 1:, 0].any(), "row 0, whose position 0 is padding: a later position "
           "looks at it")
    expect(mask[0, 0, 0, 0], "position 0 of row 0 sees nothing at all, not even itself: its "
           "softmax would be NaN")
    expect(mask[1, 0, 2].all(), "row 1 has no padding, and its position 2 should see all 3 keys")


# attention_pattern


def rows_share_one(attention_pattern):
    """each query's attention sums to 1"""
    pattern = attention_pattern(random(4, 3), random(4, 3, seed=1))
    expect_close(pattern.sum(-1), torch.ones(4), "the sum of a row of the pattern", "query_pos",
                 ask="does the softmax go over the keys, the last axis, and come after the mask?")


def nothing_goes_to_the_future(attention_pattern):
    """no query looks at a key that comes later"""
    pattern = attention_pattern(random(4, 3), random(4, 3, seed=1))
    for query in range(4):
        for key in range(query + 1, 4):
            expect(pattern[query, key] == 0, f"position {query} pays {pattern[query, key]:.3f} to "
                   f"position {key}, which comes later: is the mask the right way round, and "
                   "applied before the softmax?")


def a_pattern_by_hand(attention_pattern):
    """q . k = 2 ln 3 with d_head 4 is a score of ln 3, and gives attention of 1/4 and 3/4"""
    q = torch.tensor([[0.0, 0, 0, 0], [2 * math.log(3), 0, 0, 0]])
    k = torch.tensor([[0.0, 0, 0, 0], [1.0, 0, 0, 0]])
    expect_close(attention_pattern(q, k), torch.tensor([[1.0, 0], [0.25, 0.75]]), "the attention",
                 "query key")


def queries_and_keys_are_not_exchanged(attention_pattern):
    """the query's row says where the query looks"""
    q, k = 2 * random(5, 3), 2 * random(5, 3, seed=1)
    last = (k @ q[4] / math.sqrt(3)).softmax(0)
    expect_close(attention_pattern(q, k)[4], last, "the attention of position 4", "key",
                 ask="are queries and keys exchanged?")


# attend


def alone_it_reads_itself(attend):
    """position 0 sees only itself: its z is its own value"""
    v = heads(2)
    z = attend(tiny_attention(), heads(0), heads(1), v)
    if not isinstance(z, torch.Tensor) or z.shape != v.shape:
        expect_close(z, v, "z", "batch pos head d_head")
    expect_close(z[:, 0], v[:, 0], "z of position 0", "batch head d_head")


def equal_scores_are_a_mean(attend):
    """if all keys match equally, z is the mean of the values up to here"""
    v = heads(2)
    z = attend(tiny_attention(), torch.zeros_like(v), heads(1), v)
    expect_close(z[:, 2], v[:, :3].mean(1), "z of position 2", "batch head d_head",
                 ask="it should be the mean of the values of positions 0, 1 and 2")


def the_future_is_not_seen(attend):
    """a change of position 4 does not change positions 0 to 3"""
    q, k, v = heads(0), heads(1), heads(2)
    before = attend(tiny_attention(), q, k, v)
    k[:, 4] += 1
    v[:, 4] += 1
    moved = (attend(tiny_attention(), q, k, v) - before).abs().amax((0, 2, 3))  # [pos]
    for pos in range(4):
        expect(moved[pos] < 1e-6, f"z of position {pos} moves by {moved[pos]:.3f} when position 4, "
               "which comes later, changes: is the mask the right way round?")


def heads_do_not_mix(attend):
    """a change of head 1's values does not change head 0"""
    q, k, v = heads(0), heads(1), heads(2)
    before = attend(tiny_attention(), q, k, v)
    v[:, :, 1] += 1
    moved = (attend(tiny_attention(), q, k, v) - before)[:, :, 0].abs().max()
    expect(moved < 1e-6, f"head 0 moves by {moved:.3f} when head 1's values change: are heads and "
           "positions exchanged?")


def attend_equals_a_loop(attend):
    """it equals softmax(q . k / sqrt(d_head)) of each query alone"""
    q, k, v = heads(0), heads(1), heads(2)
    want = torch.zeros_like(v)
    for i in range(5):
        for head in range(2):
            scores = (k[:, : i + 1, head] * q[:, i : i + 1, head]).sum(-1) / math.sqrt(3)
            want[:, i, head] = (scores.softmax(-1)[..., None] * v[:, : i + 1, head]).sum(1)
    expect_close(attend(tiny_attention(), q, k, v), want, "z", "batch pos head d_head")


def padding_carries_nothing(attend):
    """a hidden key's value reaches no other position"""
    q, k, v = heads(0), heads(1), heads(2)
    key_mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    before = attend(tiny_attention(), q, k, v, key_mask)
    v[0, :2] += 1
    moved = (attend(tiny_attention(), q, k, v, key_mask) - before)[0, 2:].abs().max()
    expect(moved < 1e-6, f"z of real positions moves by {moved:.3f} when a hidden position's value "
           "changes: is key_mask used?")


# project


def readings(project, *inputs):
    """q, k and v; raises Wrong where there are not three."""
    result = project(tiny_attention(), *inputs)
    if not isinstance(result, (list, tuple)) or len(result) != 3:
        raise Wrong("project should return three tensors, (q, k, v)")
    return result


def each_head_reads_with_its_own_matrix(project):
    """each head's q, k and v are resid @ W + b, with its own W and b"""
    attn = tiny_attention()
    resid = random(2, 5, 6, seed=9)
    results = readings(project, resid, resid, resid)
    for name, got, W, b in zip("qkv", results, (attn.W_Q, attn.W_K, attn.W_V),
                               (attn.b_Q, attn.b_K, attn.b_V), strict=True):
        want = torch.stack([resid @ W[head] + b[head] for head in range(2)], 2)
        expect_close(got, want, name, "batch pos head d_head")


def three_streams_are_read_apart(project):
    """q reads q_input, k reads k_input, v reads v_input"""
    streams = [random(2, 5, 6, seed=seed) for seed in (7, 8, 9)]
    for i, name in enumerate("qkv"):
        alone = [streams[i]] * 3
        expect_close(readings(project, *streams)[i], readings(project, *alone)[i],
                     f"{name}, where the three inputs differ,", "batch pos head d_head",
                     ask=f"{name} reads {name}_input alone")


# write


def one_head_writes_with_its_own_matrix(write):
    """if only head 1 has a z, the output is z @ W_O[1] + b_O"""
    attn = tiny_attention()
    z = heads(3)
    z[:, :, 0] = 0
    expect_close(write(attn, z), z[:, :, 1] @ attn.W_O[1] + attn.b_O, "the output",
                 "batch pos d_model")


def the_output_is_a_sum_over_heads(write):
    """the output is the sum of the heads' writes, plus b_O once"""
    attn = tiny_attention()
    z = heads(3)
    want = z[:, :, 0] @ attn.W_O[0] + z[:, :, 1] @ attn.W_O[1] + attn.b_O
    expect_close(write(attn, z), want, "the output", "batch pos d_model")


# qk_matrix, ov_matrix


def expect_one_matrix_a_head(M):
    """Raises Wrong unless M is [head 2, d_model 6, d_model 6]."""
    ask = "one matrix for each head"
    if getattr(M, "shape", None) == (2, 3, 3):
        ask = "which of the two products goes through d_head?"
    expect(getattr(M, "shape", None) == (2, 6, 6), f"M is {describe(M)}, and should be [head 2, "
           f"d_model 6, d_model 6]: {ask}")


def the_matrix_gives_the_scores(qk_matrix):
    """query_resid @ M @ key_resid is q . k, for each head"""
    W_Q, W_K = random(2, 6, 3), random(2, 6, 3, seed=1)
    M = qk_matrix(W_Q, W_K)
    expect_one_matrix_a_head(M)
    query, key = random(6, seed=2), random(6, seed=3)
    for head in range(2):
        expect_close(query @ M[head] @ key, (query @ W_Q[head]) @ (key @ W_K[head]),
                     f"query_resid @ M @ key_resid of head {head}",
                     ask="which side of M is the query's?")


def it_has_the_rank_of_one_head(qk_matrix):
    """M has d_model x d_model numbers, but rank d_head"""
    ranks = torch.linalg.matrix_rank(qk_matrix(random(2, 6, 3), random(2, 6, 3, seed=1))).tolist()
    expect(ranks == [3, 3], f"the ranks of M are {ranks}, and should be [3, 3], d_head")


def the_matrix_moves_a_vector(ov_matrix):
    """resid @ M is (resid @ W_V) @ W_O, for each head"""
    W_V, W_O = random(2, 6, 3), random(2, 3, 6, seed=1)
    M = ov_matrix(W_V, W_O)
    expect_one_matrix_a_head(M)
    resid = random(6, seed=2)
    for head in range(2):
        expect_close(resid @ M[head], resid @ W_V[head] @ W_O[head], f"resid @ M of head {head}",
                     "d_model", ask="the stream is read on the left side of M")


def it_has_the_rank_of_a_head(ov_matrix):
    """M has d_model x d_model numbers, but rank d_head"""
    M = ov_matrix(random(2, 6, 3), random(2, 3, 6, seed=1))
    ranks = torch.linalg.matrix_rank(M).tolist()
    expect(ranks == [3, 3], f"the ranks of M are {ranks}, and should be [3, 3], d_head")


# previous_token_weights


def wired_scores(previous_token_weights, n_ctx):
    W_Q, W_K = previous_token_weights(n_ctx, sharpness=30.0)
    return W_Q @ W_K.T  # the stream at position i is the i-th unit vector


def the_previous_position_matches(previous_token_weights):
    """q_i . k_j is the sharpness for j = i - 1"""
    scores = wired_scores(previous_token_weights, 6)
    expect(scores.shape == (6, 6), f"q @ k.T is {list(scores.shape)}, and should be [6, 6]")
    for i in range(1, 6):
        expect(abs(scores[i, i - 1] - 30) < 0.01, "with sharpness=30, position "
               f"{i} gives position {i - 1} a score of "
               f"{scores[i, i - 1]:.3g}, and should give 30; it gives its highest, "
               f"{scores[i].max():.3g}, to position {int(scores[i].argmax())}")


def no_other_position_matches(previous_token_weights):
    """q_i . k_j is 0 for any other j"""
    scores = wired_scores(previous_token_weights, 6)
    for i in range(6):
        for j in range(6):
            expect(j == i - 1 or abs(scores[i, j]) < 0.01, f"position {i} gives position {j} a "
                   f"score of {scores[i, j]:.3g}, and should give 0"
                   + (": does the last position wrap round to the first?" if (i, j) == (0, 5)
                      else ""))


def the_head_scores_one(previous_token_weights):
    """after mask and softmax its previous-token score is above 0.99"""
    scores = wired_scores(previous_token_weights, 12)
    later = torch.ones(12, 12).triu(1).bool()
    score = prev_token_score(scores.masked_fill(later, -math.inf).softmax(-1)).item()
    expect(score > 0.99, f"its previous-token score is {score:.3f}, and should be above 0.99")


# prev_token_score, attention_entropy


def uniform_pattern(n_pos):
    """Attention that is spread evenly over all visible keys."""
    visible = torch.ones(n_pos, n_pos).tril()
    return visible / visible.sum(-1, keepdim=True)


def a_perfect_head_scores_one(prev_token_score):
    """a head that always looks one back scores 1, though its first position looks at itself"""
    pattern = torch.eye(6).roll(-1, dims=1)
    pattern[0] = torch.eye(6)[0]
    expect_close(prev_token_score(pattern), 1.0, "the score of a perfect head", ask="the first "
                                                                                    "position has "
                                                                                    "none before "
                                                                                    "it, and is "
                                                                                    "not counted")


def looking_at_oneself_scores_nothing(prev_token_score):
    """a head that looks at itself scores 0"""
    expect_close(prev_token_score(torch.eye(6)), 0.0, "the score of a head that looks at itself")


def even_attention_scores_its_mean(prev_token_score):
    """uniform attention over 4 positions scores the mean of 1/2, 1/3 and 1/4"""
    expect_close(prev_token_score(uniform_pattern(4)), (1 / 2 + 1 / 3 + 1 / 4) / 3,
                 "the score of uniform attention")


def each_head_has_its_own_score(prev_token_score):
    """of [batch, head, query_pos, key_pos] it gives [batch, head]"""
    pattern = random(2, 3, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf).softmax(-1)
    want = (pattern[..., 1, 0] + pattern[..., 2, 1] + pattern[..., 3, 2]) / 3
    expect_close(prev_token_score(pattern), want, "the score", "batch head")


def one_key_alone_has_none(attention_entropy):
    """a head that looks at one key alone has entropy 0"""
    expect_close(attention_entropy(torch.eye(5)), 0.0, "the entropy of a head that looks at itself",
                 ask="0 log 0 is 0, and not NaN")


def even_attention_has_the_most(attention_entropy):
    """uniform attention over 3 positions has the mean of ln 1, ln 2 and ln 3"""
    expect_close(attention_entropy(uniform_pattern(3)), (math.log(2) + math.log(3)) / 3,
                 "the entropy of uniform attention", ask="the natural logarithm, and the mean over "
                 "the queries")


def each_head_has_its_own_entropy(attention_entropy):
    """of [batch, head, query_pos, key_pos] it gives [batch, head]"""
    pattern = random(2, 3, 4, 4).softmax(-1)
    want = -(pattern * pattern.log()).sum((-1, -2)) / 4
    expect_close(attention_entropy(pattern), want, "the entropy", "batch head")


EXERCISES = [
    Exercise(
        name="causal_mask", source="attention.causal_mask", minutes=10, difficulty=1,
        needed_for="attend",
        task="Compare two rows of numbers: the positions of the queries and those of the keys. "
             "Then let a key_mask hide keys.",
        checks=(each_sees_itself_and_the_past, fewer_queries_are_the_last,
                padding_is_hidden_but_from_itself),
        hints=("Number the keys 0, 1, …: a query at position i sees every key that is at most i.",
               "The first query is at position n_keys - n_queries. A column of queries "
               "compared with a row of keys is a table.",
               "`key <= query`, with query = torch.arange(n_keys - n_queries, n_keys)[:, None] and "
               "key = torch.arange(n_keys). A key_mask is [batch, key_pos]: give it two axes of "
               "length 1, and always allow `key == query`."),
        mistakes=(
            Mistake("with the mask the wrong way round", "        return key <= query\n",
                    "        return key >= query\n"),
            Mistake("when a position may not see itself", "        return key <= query\n",
                    "        return key < query\n"),
            Mistake("when the queries count as the first positions",
                    "torch.arange(n_keys - n_queries, n_keys, device=device)",
                    "torch.arange(n_queries, device=device)"),
            Mistake("when True means hidden: it should mean that the query may look",
                    "        return key <= query\n", "        return key > query\n"),
            Mistake("when key_mask is not used",
                    "    return (key <= query) & (key_mask[:, None, None, :] | (key == query))\n",
                    "    return key <= query\n"),
            Mistake("when padding can't see itself either",
                    "(key_mask[:, None, None, :] | (key == query))", "key_mask[:, None, None, :]"),
        )),
    Exercise(
        name="attention_pattern", source=None, minutes=10, difficulty=1, needed_for="attend",
        task="One head, without batch: scores, mask, softmax.",
        checks=(rows_share_one, nothing_goes_to_the_future, a_pattern_by_hand,
                queries_and_keys_are_not_exchanged),
        hints=("scores[i, j] is the dot product of q[i] and k[j]: one matrix product gives all.",
               "A position that must get no attention gets a score of -inf before the softmax, "
               "since exp(-inf) is 0.",
               "q @ k.T / math.sqrt(d_head), masked_fill with a boolean triu(1), softmax(-1)."),
        mistakes=(
            Mistake("without the division by sqrt(d_head)", " / math.sqrt(d_head)", ""),
            Mistake("when the scores are divided by d_head instead of its square root",
                    "math.sqrt(d_head)", "d_head"),
            Mistake("with the mask the wrong way round", ".triu(1)", ".tril(-1)"),
            Mistake("without a mask", "    scores = scores.masked_fill(later, -math.inf)\n", ""),
            Mistake("when a position may not see itself: the first one then sees nothing",
                    ".triu(1)", ".triu(0)"),
            Mistake("with the softmax over the queries", ".softmax(-1)", ".softmax(0)"),
            Mistake("when the mask comes after the softmax",
                    "    scores = scores.masked_fill(later, -math.inf)\n"
                    "    return scores.softmax(-1)\n",
                    "    return scores.softmax(-1).masked_fill(later, 0.0)\n"),
            Mistake("when queries and keys are exchanged", "q @ k.T", "k @ q.T"),
            Mistake("when hidden scores are 0 instead of -inf", "-math.inf", "0.0"),
        )),
    Exercise(
        name="attend", source="attention.Attention.attend", minutes=20, difficulty=2,
        needed_for="the block (chapter 5), induction (chapter 11)",
        task="The same for all heads of a batch, and then the mean of the values. Call "
             "causal_mask; the check uses the library's. No dropout.",
        checks=(alone_it_reads_itself, equal_scores_are_a_mean, the_future_is_not_seen,
                heads_do_not_mix, attend_equals_a_loop, padding_carries_nothing),
        hints=("Matrix products use the last two axes: move pos and d_head there first.",
               "q.transpose(1, 2) is [batch, head, pos, d_head]; then q @ k.transpose(-1, -2) is "
               "[batch, head, query_pos, key_pos].",
               "scores.masked_fill(~causal_mask(n, n, key_mask), -math.inf).softmax(-1) @ v, and "
               "the axes back: .transpose(1, 2)."),
        mistakes=(
            Mistake("without the division by sqrt(d_head)", " / math.sqrt(self.d_head)", ""),
            Mistake("with the mask the wrong way round", "masked_fill(~visible",
                    "masked_fill(~visible.mT"),
            Mistake("when the `~` is missing: what a query may see is hidden",
                    "masked_fill(~visible", "masked_fill(visible"),
            Mistake("without a mask", "    scores = scores.masked_fill(~visible, -math.inf)\n", ""),
            Mistake("when `reshape` brings the axes back: it mixes heads and positions",
                    "return z.transpose(1, 2)", "return z.reshape(z.transpose(1, 2).shape)"),
            Mistake("with the softmax over the queries", ".softmax(-1)", ".softmax(-2)"),
            Mistake("when the pattern is transposed before it multiplies the values", "pattern @ v",
                    "pattern.mT @ v"),
            Mistake("when heads and positions keep their places: each position attends among its "
                    "own heads", "    q = q.transpose(1, 2)  # [batch, head, query_pos, d_head]\n",
                    "", also=(
                        ("    k = k.transpose(1, 2)  # [batch, head, key_pos, d_head]\n", ""),
                        ("    v = v.transpose(1, 2)  # [batch, head, key_pos, d_head]\n", ""),
                        ("    return z.transpose(1, 2)\n", "    return z\n"))),
            Mistake("when key_mask is not used", "k.shape[2], key_mask)", "k.shape[2])"),
        )),
    Exercise(
        name="project", source="attention.Attention.project", minutes=15, difficulty=2,
        needed_for="attend",
        task="Each head reads the stream through its own three matrices.",
        checks=(each_head_reads_with_its_own_matrix, three_streams_are_read_apart),
        hints=("One head, one reading: resid @ W_Q[head] + b_Q[head], [batch, pos, d_head].",
               "All heads at once: an einsum over d_model that keeps batch, pos, head and d_head.",
               'torch.einsum("bpm,hmd->bphd", q_input, self.W_Q) + self.b_Q, and so on.'),
        mistakes=(
            Mistake("without the biases", " + self.b_Q", "",
                    also=((" + self.b_K", ""), (" + self.b_V", ""))),
            Mistake("without the queries' bias", " + self.b_Q", ""),
            Mistake("when `reshape` joins the heads' matrices: W_Q is [head, d_model, d_head], and "
                    "the heads' axis must move to the last two first",
                    'torch.einsum("bpm,hmd->bphd", q_input, self.W_Q)',
                    '(q_input @ self.W_Q.reshape(q_input.shape[-1], -1)).unflatten('
                    '-1, self.b_Q.shape)',
                    also=(('torch.einsum("bpm,hmd->bphd", k_input, self.W_K)',
                           '(k_input @ self.W_K.reshape(k_input.shape[-1], -1)).unflatten('
                           '-1, self.b_K.shape)'),
                          ('torch.einsum("bpm,hmd->bphd", v_input, self.W_V)',
                           '(v_input @ self.W_V.reshape(v_input.shape[-1], -1)).unflatten('
                           '-1, self.b_V.shape)'))),
            Mistake("when keys and values are exchanged", "return q, k, v", "return q, v, k"),
            Mistake("when all three read q_input", "k_input, self.W_K", "q_input, self.W_K",
                    also=(("v_input, self.W_V", "q_input, self.W_V"),)),
            Mistake("when heads stand before positions", '"bpm,hmd->bphd", q_input',
                    '"bpm,hmd->bhpd", q_input', also=((" + self.b_Q", " + self.b_Q[:, None]"),)),
        )),
    Exercise(
        name="write", source="attention.Attention.write", minutes=10, difficulty=1,
        needed_for="attributing an answer to heads (chapter 8)",
        task="Add up what the heads write.",
        checks=(one_head_writes_with_its_own_matrix, the_output_is_a_sum_over_heads),
        hints=("One head writes z[:, :, head] @ W_O[head], [batch, pos, d_model].",
               "Sum over the heads, then add b_O once.",
               'torch.einsum("bphd,hdm->bpm", z, self.W_O) + self.b_O.'),
        mistakes=(
            Mistake("without b_O", " + self.b_O", ""),
            Mistake("with the mean over heads instead of the sum", "result.sum(2)",
                    "result.mean(2)"),
            Mistake("when heads and positions are exchanged before the heads are concatenated",
                    'result = torch.einsum("bphd,hdm->bphm", z, self.W_O)',
                    "z = z.transpose(1, 2).reshape(z.shape)\n"
                    '    result = torch.einsum("bphd,hdm->bphm", z, self.W_O)'),
            Mistake("when each head adds b_O", "result.sum(2) + self.b_O",
                    "(result + self.b_O).sum(2)"),
        )),
    Exercise(
        name="qk_matrix", source=None, minutes=10, difficulty=1,
        needed_for="composition (chapter 8)",
        task="Multiply two thin matrices into a square one.",
        checks=(the_matrix_gives_the_scores, it_has_the_rank_of_one_head),
        hints=("q = query_resid @ W_Q and k = key_resid @ W_K: write q . k out.",
               "(query @ W_Q) @ (key @ W_K)^T = query @ (W_Q W_K^T) @ key^T.",
               "W_Q @ W_K.transpose(-1, -2)."),
        mistakes=(
            Mistake("when it is the key's matrix that stands first",
                    "W_Q @ W_K.transpose(-1, -2)", "W_K @ W_Q.transpose(-1, -2)"),
            Mistake("when the product is d_head by d_head, not d_model by d_model",
                    "W_Q @ W_K.transpose(-1, -2)", "W_Q.transpose(-1, -2) @ W_K"),
            Mistake("when M is divided by sqrt(d_head), which comes later",
                    "W_Q @ W_K.transpose(-1, -2)",
                    "W_Q @ W_K.transpose(-1, -2) / W_Q.shape[-1]**0.5"),
        )),
    Exercise(
        name="ov_matrix", source=None, minutes=5, difficulty=1,
        needed_for="copying (chapter 11), suppression (chapter 12)",
        task="Map what is read at the key to what is written at the query.",
        checks=(the_matrix_moves_a_vector, it_has_the_rank_of_a_head),
        hints=("A row vector is multiplied by W_V first, then by W_O.", "W_V @ W_O, for each head.",
               "@ uses the last two axes, so heads stay separate."),
        mistakes=(
            Mistake("when the matrix is transposed", "return W_V @ W_O",
                    "return (W_V @ W_O).transpose(-1, -2)"),
            Mistake("when the product is d_head by d_head, not d_model by d_model", "return W_V @ "
                                                                                    "W_O",
                    "return W_O @ W_V"),
        )),
    Exercise(
        name="previous_token_weights", source=None, minutes=20, difficulty=2,
        needed_for="wiring an induction head (chapter 11)",
        task="Wire a head by hand: the query at i must match the key at i - 1, and no other.",
        checks=(the_previous_position_matches, no_other_position_matches, the_head_scores_one),
        hints=("Row i of W_Q is the query of position i, row j of W_K the key of position j.",
               "Let the query of i be the i-th unit vector. Which unit vector must the key of "
               "position i - 1 be?",
               "The key of j is unit vector j + 1, times the sharpness; the last position has no "
               "successor, so its key is zero."),
        mistakes=(
            Mistake("when the key of j matches the query of j - 1: the head looks one ahead",
                    ".roll(1, dims=1)", ".roll(-1, dims=1)",
                    also=(("W_K[-1] = 0.0", "W_K[0] = 0.0"),)),
            Mistake("when the last position wraps round to the first", "    W_K[-1] = 0.0\n", ""),
            Mistake("when the head looks one ahead, and the first position wraps round",
                    ".roll(1, dims=1)", ".roll(-1, dims=1)", also=(("    W_K[-1] = 0.0\n", ""),)),
            Mistake("when each position looks at itself", ".roll(1, dims=1)", "",
                    also=(("    W_K[-1] = 0.0\n", ""),)),
            Mistake("when both weights are multiplied by the sharpness", "W_Q = torch.eye(n_ctx)",
                    "W_Q = sharpness * torch.eye(n_ctx)"),
        )),
    Exercise(
        name="prev_token_score", source="metrics.prev_token_score", minutes=10, difficulty=1,
        needed_for="finding heads (chapters 8 and 11)",
        task="Average the entries just below the diagonal.",
        checks=(a_perfect_head_scores_one, looking_at_oneself_scores_nothing,
                even_attention_scores_its_mean, each_head_has_its_own_score),
        hints=("Query i looks one back at key i - 1.",
               "These entries form a diagonal: torch.diagonal has an offset.",
               "pattern.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)."),
        mistakes=(
            Mistake("on the diagonal itself: attention to oneself", "offset=-1", "offset=0"),
            Mistake("above the diagonal: attention to the next position", "offset=-1", "offset=1"),
            Mistake("when the first position is counted too, with 0",
                    "to_previous.mean(-1)", "to_previous.sum(-1) / pattern.shape[-1]"),
            Mistake("without the mean: the sum over queries", "to_previous.mean(-1)",
                    "to_previous.sum(-1)"),
        )),
    Exercise(
        name="attention_entropy", source="metrics.attention_entropy", minutes=10, difficulty=1,
        needed_for="telling sharp heads from spread ones (chapter 8)",
        task="Entropy of each row, then the mean over rows.",
        checks=(one_key_alone_has_none, even_attention_has_the_most,
                each_head_has_its_own_entropy),
        hints=("The entropy of a row p is -sum p log p.",
               "log 0 is -inf, and 0 times -inf is NaN: keep zeros away from the logarithm.",
               "-(pattern * pattern.clamp(min=1e-30).log()).sum(-1).mean(-1)."),
        mistakes=(
            Mistake("when 0 log 0 becomes NaN", ".clamp(min=1e-30)", ""),
            Mistake("in bits instead of nats", ".log()", ".log2()"),
            Mistake("without the minus", "-(pattern * logs)", "(pattern * logs)"),
            Mistake("with the sum over queries instead of the mean", "entropies.mean(-1)",
                    "entropies.sum(-1)"),
            Mistake("with the mean over keys instead of the sum", "(pattern * logs).sum(-1)",
                    "(pattern * logs).mean(-1)"),
        )),
]


PREDICTIONS = [
    Prediction("In a text of 16 positions, a head spreads its attention evenly over everything "
               "that it may see. What is its previous-token score?",
               lambda: prev_token_score(uniform_pattern(16)).item(), "the mean of 1/2, …, 1/16",
               printed="attending to all alike: {}"),
    Prediction("Four heads all look one position back. By how many nats does the loss rise "
               "without L0H0, one of the three sharpest?",
               stated(4, "writes 0.000 of the stream, loss without it +{} L0H1"),
               "the second block"),
    Prediction("And without L0H3, which looks a little less sharply than the others?",
               stated(4, "writes 0.019 of the stream, loss without it +{}"), "the second block"),
]
