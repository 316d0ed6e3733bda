"""Copy suppression: the chances of texts against brute force, and every measure on a head that is
wired to suppress predicted tokens, beside heads that do half of this."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from helpers import quick_run, refusal, scramble_, tiny_model
from torch.testing import assert_close

import experiments.copy_suppression as program
from checkpoint import export_pretrained
from circuits import CircuitRun, exact_edge_scores, faithfulness_of_each, minimality
from experiments.suppression import measure
from experiments.suppression.circuit import (
    judged_pairs,
    measure_circuit,
    smallest_circuit,
    taken_off,
)
from experiments.suppression.cspa import (
    cspa_score,
    extreme_tokens,
    kept_write,
    project_on_chosen,
    written_by_weights,
)
from experiments.suppression.measure import (
    WAYS,
    ablation_rises,
    attention_when_predicted,
    draw_measured_texts,
    find_suppressor,
    find_team,
    is_counted,
    key_states,
    keys_standing_for,
    loss_floor,
    measure_heads,
    measure_suppressor,
    moved_by_keys,
    nats_above_floor,
    null_losses,
    own_ranks,
    patch_direction,
    patch_prediction,
    share_lowest,
    tokens_of_keys,
    written_by_presence,
    written_by_source,
    written_when_predicted,
)
from experiments.suppression.model import SuppressionRecipe, Walks, batches, suppression_pairs
from experiments.suppression.report import (
    describe_findings,
    draw_overview,
    suppression_claims,
)
from losses import IGNORED
from model import GPT
from tokenizer import BPETokenizer
from utils import seeded_generator

WALKS = Walks(lags=(2,), odds=(4, 3, 2, 1))  # what the wired models are made for
V = WALKS.d_vocab
N_CTX = SuppressionRecipe().n_ctx
SHARP = 100.0


def wired(gate=True, sign=-1.0, follows="prediction"):
    """A model whose suppressor is known: head L0H0 fetches the token before, and writes what it
    predicts; head L1H0 looks for that in the text and takes it off. The other heads do nothing.

    gate: without it, L1H0 looks at all tokens alike. sign: +1 copies instead. follows: "token", to
    look for the successors of the token before itself, past what is predicted.
    """
    token, before, said = (slice(i * V, (i + 1) * V) for i in range(3))
    where = slice(3 * V, 3 * V + N_CTX)
    cfg = dataclasses.replace(SuppressionRecipe().model_config(), d_model=3 * V + N_CTX,
                              d_head=None, norm="none", tie_embeddings=False)
    model, one = GPT(cfg), torch.eye(V)
    predicts = (WALKS.tables[0] > 0).float()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.W_E[:, token] = 4 * one
        model.W_pos[:, where] = torch.eye(N_CTX)
        first, second = (block.attn for block in model.blocks)
        first.W_Q[0, where, :N_CTX] = SHARP * torch.eye(N_CTX).roll(-1, 1)  # names the one before
        first.W_K[0, where, :N_CTX] = SHARP * torch.eye(N_CTX)
        first.W_V[0, token, :V] = one / 4
        first.W_O[0, :V, said] = 2 * predicts
        first.W_O[0, :V, before] = one
        if gate:
            second.W_K[0, token, :V] = SHARP * one
            if follows == "prediction":
                second.W_Q[0, said, :V] = one
            else:
                second.W_Q[0, before, :V] = predicts
        second.W_V[0, token, :V] = one
        second.W_O[0, :V, said] = 3 * sign * one
        model.W_U[said] = 2 * one
    return model.eval()


@pytest.fixture(scope="module")
def texts():
    return draw_measured_texts(WALKS, n_rows=48)


@pytest.fixture(scope="module")
def wired_circuit():
    """The circuit that is found in the wired suppressor."""
    return measure_circuit(wired(), EVEN, n_pairs=8, n_random=25)


@pytest.fixture
def few_texts(monkeypatch):
    """All is measured on 64 texts instead of 256: what is wired shows in few."""
    monkeypatch.setattr(measure, "draw_measured_texts", partial(draw_measured_texts, n_rows=64))


# The texts


@pytest.mark.parametrize("lags", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("goes_back", [False, True])
def test_the_chances_are_those_of_the_rule_written_out(lags, goes_back):
    walks = Walks(lags=lags, goes_back=goes_back)
    tokens, chances = walks.draw(8, seeded_generator(3))
    for row, row_chances in zip(tokens.tolist(), chances, strict=True):
        for pos in range(max(lags), walks.n_pos):
            seen = set() if goes_back else set(row[:pos])
            odds = [sum(table[row[pos - lag]][token].item()
                        for lag, table in zip(lags, walks.tables, strict=True))
                    for token in range(V)]
            left = [each * (token not in seen) for token, each in enumerate(odds)]
            p_jump = walks.jumps if any(left) else 1.0
            wanted = [p_jump * (not odds[token]) / odds.count(0)
                      + (1 - p_jump) * left[token] / max(1, sum(left)) for token in range(V)]
            assert row_chances[pos].tolist() == pytest.approx(wanted)
            assert row_chances[pos, row[pos]] > 0


def test_tokens_are_drawn_as_often_as_their_chances_say():
    walks = Walks(n_pos=4)
    tokens, chances = walks.draw(20_000, seeded_generator(0))
    hit = torch.nn.functional.one_hot(tokens[:, 3], V).double()
    for rank in (-1, -2, -3):
        likely = chances[:, 3].argsort(-1)[:, rank, None]
        spread = math.sqrt(0.25 / len(tokens))
        assert hit.gather(1, likely).mean() == pytest.approx(
            chances[:, 3].gather(1, likely).mean().item(), abs=4 * spread)


def test_a_token_is_a_successor_as_often_as_it_has_some_and_never_its_own():
    for seed in range(20):
        for table in Walks(seed).tables:
            assert table.sum(0).tolist() == table.sum(1).tolist() == [3.0] * V
            assert table.diagonal().sum() == 0
    assert not torch.equal(Walks(0).tables, Walks(1).tables)


def test_a_predicted_token_that_was_seen_is_impossible_and_another_one_comes_back():
    walks = Walks()
    tokens, chances = draw_measured_texts(walks)
    seen, predicted = walks.states(tokens)
    known = is_counted(walks, tokens)[:, None]
    others_left = (predicted & ~seen).any(-1, keepdim=True)
    assert chances[seen & predicted].max() == 0
    assert chances[seen & ~predicted & known].min() > 0
    assert chances[~seen & predicted & others_left].min() > 0


def test_targets_are_the_next_tokens_except_uniform_ones():
    inputs, targets = next(batches(SuppressionRecipe(batch_size=4)))
    assert (targets[:, 0] == IGNORED).all() and (targets[:, 1:] != IGNORED).all()
    assert torch.equal(inputs[:, 2:], targets[:, 1:-1])


@pytest.mark.parametrize("lags", [(1,), (1, 2)])
def test_the_chances_of_a_given_text_are_those_that_it_was_drawn_with(lags):
    walks = Walks(lags=lags)
    tokens, chances = walks.draw(30, seeded_generator(1))
    first = max(lags)
    assert_close(walks.chances_after(tokens)[:, first - 1:-1], chances[:, first:])
    assert walks.are_possible(tokens).all()

    # what is predicted and was seen can not come
    seen, predicted = walks.states(tokens)
    impossible = (seen & predicted)[:, -2].nonzero()
    rows, token = impossible.T
    changed = tokens[rows]
    changed[:, -1] = token
    assert len(rows) and not walks.are_possible(changed).any()


def test_of_a_pair_of_texts_one_has_seen_a_predicted_token_and_both_are_possible():
    walks = Walks()
    pairs = suppression_pairs(walks, 100, seeded_generator(0))
    rows = torch.arange(100)
    odds = walks.predicted_odds(pairs.clean_tokens)[:, -1]
    assert torch.equal(odds, walks.predicted_odds(pairs.corrupted_tokens)[:, -1])
    assert (odds[rows, pairs.right] == odds[rows, pairs.wrong]).all()
    assert (odds[rows, pairs.right] > 0).all()

    for tokens, times in ((pairs.clean_tokens, 1), (pairs.corrupted_tokens, 0)):
        assert walks.are_possible(tokens).all()
        assert ((tokens == pairs.wrong[:, None]).sum(1) == times).all()
        assert not (tokens == pairs.right[:, None]).any()
    differs = pairs.clean_tokens != pairs.corrupted_tokens
    assert (differs.sum(1) == 1).all()
    assert (odds.gather(1, pairs.corrupted_tokens[differs][:, None]) == 0).all()

    assert "odds=(2, 1)" in refusal(
        lambda: suppression_pairs(Walks(lags=(1,)), 4, seeded_generator(0)))


# Losses


def test_the_exact_chances_cost_nothing_above_the_floor_and_the_floor_is_their_entropy(texts):
    _, chances = texts
    assert nats_above_floor(chances.log(), chances).abs().max() < 1e-12
    uniform = nats_above_floor(torch.zeros_like(chances), chances).mean().item()
    assert uniform == pytest.approx(math.log(V) - loss_floor(chances))


def test_only_gated_suppression_comes_near_the_floor():
    nulls = null_losses(Walks(), n_rows=48)
    ignores, ungated, gated = (nulls[way] for way in WAYS)
    assert gated < 0.05 < 0.1 < ungated < ignores


# The heads


def test_a_wired_suppressor_looks_at_what_is_predicted_and_lowers_it(texts):
    tokens, _ = texts
    heads = measure_heads(wired(), WALKS, tokens)
    assert find_suppressor(heads) == (1, 0)
    found = heads[1, 0]
    assert found["to predicted"] > 3 and found["to others"] < 1e-3
    assert found["gated"] < -3 and found["shift"] == 0
    assert heads[1, 1]["to predicted"] == pytest.approx(1)  # a dead head looks everywhere
    assert heads[1, 1]["gated"] == pytest.approx(0)


def test_a_head_that_lowers_all_that_was_seen_is_not_gated(texts):
    tokens, _ = texts
    found = measure_heads(wired(gate=False), WALKS, tokens)[1, 0]
    assert found["to predicted"] == pytest.approx(1, abs=0.1)
    assert abs(found["gated"]) < 0.3 and found["ungated"] < -1


def test_a_head_that_copies_has_the_opposite_sign(texts):
    tokens, _ = texts
    found = measure_heads(wired(sign=1.0), WALKS, tokens)[1, 0]
    assert found["gated"] > 3


def test_attention_follows_the_unembedding_only_where_the_query_reads_the_prediction(texts):
    tokens, _ = texts
    reads = patch_direction(wired(), WALKS, tokens, [(1, 0)])
    assert reads["before"] < 0.2 and reads["random"] < 0.5 and reads["after"] > 0.9
    past = patch_direction(wired(follows="token"), WALKS, tokens, [(1, 0)])
    assert past["after"] == pytest.approx(past["before"])


def test_attention_follows_a_swapped_prediction(texts):
    tokens, _ = texts
    found = patch_prediction(wired(), WALKS, tokens, [(1, 0)], shifts=(0,))
    assert found["new"]["after"] > 0.9 > 0.1 > found["new"]["before"]
    assert found["own"]["before"] > 0.9 > 0.1 > found["own"]["after"]
    flat = patch_prediction(wired(gate=False), WALKS, tokens, [(1, 0)])
    assert flat["new"]["after"] == pytest.approx(flat["new"]["before"])
    assert patch_prediction(wired(), WALKS, tokens, [(0, 0)]) is None


def test_keys_have_the_states_of_their_tokens_and_none_lies_ahead():
    tokens = torch.tensor([[3, 5, 3]])
    states = torch.zeros(1, 3, V, dtype=torch.bool)
    states[0, 1:, 3] = True
    keys = key_states(states, tokens)[0].tolist()
    assert keys == [[False] * 3, [True, False, False], [True, False, True]]


def test_without_the_wired_head_naive_copies_cost_more_nats(texts):
    tokens, chances = texts
    rises = ablation_rises(wired(), WALKS, tokens, chances, [(1, 0)])
    assert rises["naive copy"] > 0.3 > rises["free"]
    dead = ablation_rises(wired(), WALKS, tokens, chances, [(1, 1)])
    assert dead["naive copy"] == pytest.approx(0, abs=1e-6)


def test_the_write_about_a_token_is_found_for_its_own_key_and_for_the_next(texts):
    tokens, _ = texts
    written = written_by_source(wired(), tokens, (1, 0), shift=0)
    assert_close(written.diagonal(), torch.full((V,), -24 * (1 - 1 / V)), rtol=0, atol=1e-4)
    assert (own_ranks(written, torch.arange(V)) == 0).all()

    shifted = wired()
    with torch.no_grad():
        attn = shifted.blocks[1].attn
        attn.W_V[0, V:2 * V] = attn.W_V[0, :V]  # it reads the token before
        attn.W_V[0, :V] = 0
    for shift, is_own in ((0, False), (1, True)):
        written = written_by_source(shifted, tokens, (1, 0), shift)
        assert ((own_ranks(written, torch.arange(V)) == 0).double().mean() > 0.9) == is_own


def test_keys_stand_for_the_token_before_where_they_are_shifted():
    tokens = torch.tensor([[3, 5, 7]])
    assert tokens_of_keys(tokens, 0).tolist() == [[3, 5, 7]]
    assert tokens_of_keys(tokens, 1).tolist() == [[3, 3, 5]]
    states = torch.zeros(1, 3, V, dtype=torch.bool)
    states[..., 5] = True
    assert key_states(states, tokens, 1)[0].tolist() == [[False] * 3, [False] * 3,
                                                         [False, False, True]]


def test_a_tie_is_no_proof_that_a_token_is_the_lowest():
    written = torch.tensor([[-1.0, 0, 0], [0.0, 0, 0], [0.0, -1, -0.5]])
    assert own_ranks(written, torch.arange(3)).tolist() == [0, 1, 1]


def test_a_team_is_of_one_layer_and_half_as_strong_or_more():
    heads = {(layer, head): {"gated": gated} for layer, head, gated in (
        (0, 0, -2.0), (1, 0, -3.0), (1, 1, -1.6), (1, 2, -1.4))}
    assert find_team(heads) == [(1, 0), (1, 1)]


# Tokens found in two kinds of keys, by two heads


def split():
    """The wired suppressor's work, split: L1H0 finds even tokens in their own keys, and L1H1 odd
    ones in the keys after them, where L0H0 has written them."""
    token, before = (slice(i * V, (i + 1) * V) for i in range(2))
    model = wired()
    is_even = torch.eye(V) * (torch.arange(V) % 2 == 0)
    with torch.no_grad():
        attn = model.blocks[1].attn
        attn.W_K[0, token, :V] = SHARP * is_even
        attn.W_V[0, token, :V] = is_even
        attn.W_Q[1] = attn.W_Q[0]
        attn.W_K[1, before, :V] = 4 * SHARP * (torch.eye(V) - is_even)  # tokens stand there as 4
        attn.W_V[1, before, :V] = 4 * (torch.eye(V) - is_even)
        attn.W_O[1] = attn.W_O[0]
    return model


def test_the_write_of_a_token_is_separated_from_that_of_its_successors(texts):
    tokens, _ = texts
    whole = -24 * (torch.eye(V) - 1 / V)
    own, after = written_by_presence(wired(), tokens, (1, 0))
    assert_close(own, whole, rtol=0, atol=1e-3)
    assert_close(after, torch.zeros(V, V), rtol=0, atol=1e-3)
    assert written_by_source(wired(), tokens, (1, 0), 1).abs().max() > 2  # of the successors there

    # of the tokens that L1H1 reads, the first of a text stands in its own key too
    own, after = written_by_presence(split(), tokens, (1, 1))
    assert own.diagonal()[1::2].mean() > -2 and after.diagonal()[1::2].mean() < -22
    assert after.diagonal()[::2].mean() > -1


def test_the_writes_of_keys_are_fitted_by_least_squares():
    model = tiny_model(d_vocab=V)
    tokens = torch.randint(5, (3, 8), generator=seeded_generator(0))
    moved, scale = moved_by_keys(model, tokens, (1, 0))
    sums = torch.zeros(3, 8, 2 * V, dtype=torch.float64)
    for row in range(3):
        for pos in range(8):
            sums[row, pos, tokens[row, pos]] = 1
            if pos:
                sums[row, pos, V + tokens[row, pos - 1]] = 1
    fitted = torch.linalg.lstsq(sums.flatten(0, 1), moved.detach().flatten(0, 1).double(),
                                driver="gelsd").solution.float()
    W_U = model.ln_final.w[:, None] * model.W_U
    logits = fitted.view(2, V, -1) / scale @ (W_U - W_U.mean(0))
    logits = logits - logits.mean(2, keepdim=True)
    wanted = logits - logits.mean(1, keepdim=True)
    assert_close(written_by_presence(model, tokens, (1, 0)), wanted.detach(), rtol=0, atol=1e-4)


def test_attention_to_a_predicted_token_counts_each_key_once(texts):
    tokens = texts[0][:6].clone()
    tokens[:, 4] = tokens[:, 3]  # a token after itself: one key is both
    model = scramble_(untrained())
    _, cache = model.run_with_cache(tokens, "blocks.1.attn.hook_pattern")
    pattern = cache["pattern", 1][:, 1]
    seen, predicted = WALKS.states(tokens)
    found = attention_when_predicted(model, WALKS, tokens, (1, 1))
    for token in range(V):
        paid = []
        for row in range(6):
            for query in range(1, N_CTX):
                if not (seen & predicted)[row, query, token]:
                    continue
                own = [k for k in range(query + 1) if tokens[row, k] == token]
                after = [k + 1 for k in own if k + 1 <= query and k + 1 not in own]
                paid.append([pattern[row, query, keys].sum().item() for keys in (own, after)])
        wanted = torch.tensor(paid).mean(0) if paid else torch.zeros(2)
        assert_close(found[:, token], wanted)


def test_a_team_that_finds_tokens_in_two_kinds_of_keys_lowers_all_of_them(texts):
    tokens, _ = texts
    model = split()
    others = draw_measured_texts(WALKS, n_rows=48, seed=3)[0]

    def share(heads):
        return share_lowest(written_when_predicted(model, WALKS, tokens, others, heads))

    assert find_team(measure_heads(model, WALKS, tokens)) == [(1, 0), (1, 1)]
    assert share([(1, 0)]) == share([(1, 1)]) == 0.5
    assert share([(1, 0), (1, 1)]) == 1

    def rise(heads, **how):
        shares = patch_direction(model, WALKS, tokens, heads, **how)
        return shares["after"] - shares["before"]

    both = rise([(1, 0), (1, 1)])
    assert both > 0.7
    assert rise([(1, 0)]) + rise([(1, 1)]) == pytest.approx(both)
    assert rise([(1, 0), (1, 1)], shifts=(0,)) < 0.6 * both


def test_a_key_that_stands_for_a_token_in_two_ways_counts_once():
    tokens = torch.tensor([[3, 3, 5]])
    states = torch.zeros(1, 3, V, dtype=torch.bool)
    states[..., 3] = True
    keys = keys_standing_for(states, tokens)[0].tolist()
    assert keys == [[True, False, False], [True, True, False], [True, True, True]]


# The circuit

EVEN = dataclasses.replace(WALKS, odds=(1, 1, 1, 1))  # the same successors, equally likely


def test_the_circuit_of_the_wired_suppressor_is_its_keys_values_and_write(wired_circuit):
    found = wired_circuit
    assert sorted(found["edges"]) == [["L1H0", "logits"], ["embed", "L1H0.k"],
                                      ["embed", "L1H0.v"]]
    assert found["faithfulness"] == pytest.approx(1, abs=0.05)
    assert found["cpr"] > 0.85 > found["random cpr"]
    assert found["tests"]["minimality"]["holds"]
    assert "3 of 29 edges" in "\n".join(found["lines"])


def test_scores_by_cutting_are_the_effects_of_edges_and_the_best_that_keep_enough_are_taken():
    model = wired()
    pairs = suppression_pairs(EVEN, 8, seeded_generator(0))
    prompts = (pairs.clean_tokens, pairs.corrupted_tokens)
    run = CircuitRun(model, *prompts, pairs.metric)
    scores = exact_edge_scores(run)
    wanted = minimality(run.full, model, *prompts, metric=pairs.metric, parts=scores.edges())
    assert_close(scores.values, wanted.values)

    circuit = smallest_circuit(run, scores)
    smaller = scores.circuit(len(circuit) - 1)
    kept, less = faithfulness_of_each(run, [circuit, smaller]).mean.tolist()
    assert kept >= 0.9 > less


def test_the_amount_lowered_is_the_write_times_the_attention_to_predicted_tokens_in_the_text():
    pairs = judged_pairs(EVEN, 8)
    predicted = EVEN.states(pairs.clean_tokens)[1][:, -1]
    n_keys = predicted.gather(1, pairs.clean_tokens).sum(1)  # they share the attention
    assert_close(taken_off(wired(), pairs), 24 / n_keys)
    assert_close(taken_off(wired(sign=1.0), pairs), -24 / n_keys)

    model = scramble_(untrained())
    found = taken_off(model, pairs)
    for row, (right, wrong) in enumerate(zip(pairs.right, pairs.wrong, strict=True)):
        clean, corrupted = (model(tokens[row:row + 1])[0, -1]
                            for tokens in (pairs.clean_tokens, pairs.corrupted_tokens))
        wanted = (clean[right] - clean[wrong]) - (corrupted[right] - corrupted[wrong])
        assert_close(found[row], wanted.detach(), rtol=0, atol=1e-5)


def test_no_circuit_is_searched_if_nothing_is_lowered():
    for model in (untrained(), wired(sign=1.0)):
        assert measure_circuit(model, EVEN, n_pairs=8) is None


# CSPA


def test_cspa_keeps_the_effect_of_a_suppressor_and_little_of_another_write(texts):
    tokens = texts[0][:16]

    def score(model, which, n_pairs=4):
        written = written_by_weights(model, (1, 0), torch.arange(V))
        partners = extreme_tokens(written, 1, which)[tokens]
        return cspa_score(model, tokens, (1, 0), partners, n_pairs, slice(1, None))

    assert score(wired(), "lowest", n_pairs=N_CTX) > 0.9
    assert score(wired(), "lowest") > 0.5  # where nothing is predicted it rests on all tokens
    assert score(wired(), "random") < 0.2
    assert score(wired(sign=1.0), "lowest") < 0.2


def test_the_write_by_weights_is_the_dense_circuit_with_the_first_mlp():
    model = tiny_model()
    block, W_E = model.blocks[0], model.W_E
    W_E = W_E + block.mlp(block.ln2(W_E))
    W_U = model.ln_final.w[:, None] * model.W_U
    for head in range(3):
        W_V = model.blocks[1].ln1.w[:, None] * model.blocks[1].attn.W_V[head]
        dense = ((W_E - W_E.mean(-1, keepdim=True)) @ W_V @ model.blocks[1].attn.W_O[head]
                 @ (W_U - W_U.mean(0)))
        assert_close(written_by_weights(model, (1, head), torch.tensor([4, 2])), dense[[4, 2]])


def test_extreme_tokens_are_the_ends_of_each_row():
    written = torch.tensor([[3.0, -1, 2], [0.0, 5, 1]])
    assert extreme_tokens(written, 2).tolist() == [[1, 2], [0, 2]]
    assert extreme_tokens(written, 1, "highest").tolist() == [[0], [1]]


def test_projection_on_no_direction_is_nothing_and_on_two_is_that_of_least_squares():
    generator = seeded_generator(0)
    vectors = torch.randn(3, 7, generator=generator).double()
    directions = torch.randn(3, 2, 7, generator=generator).double()
    chosen = torch.tensor([[[0, 0], [1, 0], [1, 1]]]).bool()
    found = project_on_chosen(vectors, directions, chosen)[0]
    one, both = directions[1, 0], directions[2]
    assert found[0].abs().max() == 0
    assert_close(found[1], (vectors[1] @ one) / (one @ one) * one)
    assert_close(found[2], torch.linalg.lstsq(both.T, vectors[2]).solution @ both)


def test_only_pairs_with_the_highest_lens_are_kept():
    model = wired()
    tokens = torch.tensor([[3, 5, 7]])
    resid = torch.zeros(1, 3, model.cfg.d_model)
    said = slice(2 * V, 3 * V)
    resid[0, 2, said] = torch.nn.functional.one_hot(torch.tensor(5), V).float()
    moved = torch.zeros(1, 3, model.cfg.d_model)
    moved[0, :, said] = torch.eye(V)[tokens[0]]
    pattern = torch.ones(1, 3, 3).tril()
    kept = kept_write(model, resid, pattern, moved, tokens[..., None], n_pairs=1)[0, 2]
    # a third of each token is the average source's, which stays; 5 gets what is left of its own
    assert_close(kept[2 * V + torch.tensor([3, 5, 7])], torch.tensor([1 / 3, 1.0, 1 / 3]))


# Verdicts


def untrained(seed=0):
    return GPT(SuppressionRecipe().model_config(), seed).eval()


def at_random():
    """A model of random weights of the size of trained ones."""
    model = scramble_(untrained())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 0.3
    return model


def measured(model, circuit):
    """One seed's result in which all models are this one. circuit: what is found in it."""
    found = measure_suppressor(model, WALKS)
    nulls = dict(zip(WAYS, (0.7, 0.6, 0.02), strict=True))
    taken = taken_off(model, judged_pairs(EVEN, 8)).mean().item()
    return [{"trained": found, "untrained": found, "control": found, "nulls": nulls,
             "taken off": dict.fromkeys(("trained", "untrained", "control"), taken),
             "circuit": circuit}]


def verdicts(model):
    """{claim: verdict} of those that are judged, the control's apart."""
    circuit = measure_circuit(model, EVEN, n_pairs=8, n_random=25)
    claims = suppression_claims(measured(model, circuit))
    return {line.claim: line.holds for line in claims
            if line.holds is not None and "go back" not in line.claim}


@pytest.mark.parametrize("make", [
    untrained, at_random, lambda: wired(gate=False, sign=1.0)])
def test_every_claim_fails_on_models_without_a_suppressor(make, few_texts):
    judged = verdicts(make())
    assert len(judged) == 12
    assert not any(judged.values()), [text for text, holds in judged.items() if holds]


def test_every_claim_on_the_head_holds_on_the_wired_one_and_the_control_does_not(
        few_texts, wired_circuit):
    result = measured(wired(), wired_circuit)
    failed = [line.claim for line in suppression_claims(result) if line.holds is False]
    assert failed[0] == "the model above that floor (nats)"  # its odds are even
    assert ["go back" in text for text in failed[1:]] == [True]
    assert "L1H0" in describe_findings(result)

    # the figure has the attention before and after each patch at the row of its name
    patches = draw_overview(result).axes[2]
    dots = {label.get_text(): line.get_xdata()[0] for label, line
            in zip(patches.get_yticklabels(), patches.lines, strict=True)}
    team = result[0]["trained"]["direction"]["team"]
    assert dots["before adding"] == team["before"]
    assert dots["a random direction added"] == team["random"]
    assert dots["the token's unembedding added"] == team["after"]


# Published models


def save_gpt2(folder, **changes):
    """A folder in Hugging Face's layout with a random model and a tokenizer of bytes."""
    tokenizer = BPETokenizer().train("a park, a lake, a farm", 260)
    model = tiny_model(**{"d_vocab": tokenizer.d_vocab, "n_ctx": 16} | changes)
    export_pretrained(folder, model, tokenizer)


def test_a_folder_in_gpt2s_layout_is_measured_without_verdicts(tmp_path):
    save_gpt2(tmp_path / "other")
    cfg = program.SuppressionConfig(model=str(tmp_path / "other"))
    result = program.run(cfg, tmp_path)
    assert all(line.holds is None for line in result["claims"])
    diagonal = torch.tensor(result["published"]["diagonal"])
    layer, head = result["published"]["head"]
    assert diagonal[layer, head] == diagonal.min()  # GPT-2 small's head is not there
    assert not any("76.9" in line.reported for line in result["claims"])
    assert set(program.figures(result)) == {"diagonal"}


def test_a_model_without_heads_or_with_a_short_context_is_refused(tmp_path):
    for name, changes in (("flat", {"n_layers": 0}), ("short", {"n_ctx": 4})):
        save_gpt2(tmp_path / name, **changes)
        cfg = program.SuppressionConfig(model=str(tmp_path / name))
        message = refusal(lambda cfg=cfg: program.run(cfg, tmp_path), name)
        assert "choose a model" in message


def test_without_weights_one_line_says_how_to_get_them(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("unreachable")

    monkeypatch.setattr("socket.create_connection", no_network)
    cfg = program.SuppressionConfig(model="gpt2", cache_dir=str(tmp_path))
    message = refusal(lambda: program.run(cfg, tmp_path))
    assert "\n" not in message and "put the file at" in message


# The program


def test_bad_input_is_refused():
    for case in ({"steps": 0}, {"seeds": (1, 1)}, {"threads": 0}, {"model": "no such folder"}):
        assert refusal(lambda case=case: program.SuppressionConfig(**case), case)


@pytest.mark.slow
def test_the_quick_program_writes_everything(tmp_path):
    printed, results = quick_run("copy_suppression", tmp_path, n_trainings=6)
    assert "CSPA" in printed
    assert all(line["holds"] is None for line in results["claims"])
    for name in ("suppression", "written"):
        assert (tmp_path / "copy_suppression_quick" / f"{name}.png").exists()
