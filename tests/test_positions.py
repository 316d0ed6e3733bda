"""The forms of `pos`; and prompts of unequal length give in a batch what each gives alone."""

import numpy as np
import pytest
import torch
from helpers import WIDE, refusal, tiny_model
from torch.testing import assert_close

import circuits
from attribution import (
    attribution_patching,
    direct_logit_attribution,
    integrated_gradients,
)
from head_ablation import ablate_heads, head_importance, head_slopes, self_repair
from logit_lens import logit_lens
from losses import kl_divergence, next_token_loss
from metrics import (
    Metric,
    attention_entropy,
    duplicate_token_score,
    induction_score,
    logit_diff,
    prev_token_score,
    sink_score,
    target_rank,
)
from patching import (
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_resid_pre,
    path_patch,
    path_patch_matrix,
)
from positions import choose_positions, pad_left, positions_in_prompt
from probing import layer_sweep
from utils import as_index, seeded_generator

# Clean and corrupted prompts of three lengths, padded alike
CLEAN_PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
CORRUPTED_PROMPTS = [[3, 2, 4], [1, 5, 0, 2, 6], [5, 3, 1, 8, 9, 2, 9]]
CLEAN, KEY_MASK = pad_left(CLEAN_PROMPTS)
CORRUPTED, _ = pad_left(CORRUPTED_PROMPTS)
N_PADDED = [4, 2, 0]
CORRECT, WRONG = torch.tensor([1, 4, 0]), torch.tensor([2, 2, 5])
SHAPES = [{}, {"attn_only": True}, {"norm": "none"}, {"positions": "sinusoidal"},
          {"n_layers": 1, "n_heads": 1, "positions": "none"}, WIDE]


def difference(row=None):
    """The logit difference at the end, of all prompts or of one."""
    rows = slice(None) if row is None else slice(row, row + 1)
    return Metric.logit_diff(CORRECT[rows], WRONG[rows])


def each_alone():
    """(row, how many columns of padding it has, its clean and its corrupted prompt by itself)."""
    for row, n_padded in enumerate(N_PADDED):
        yield (row, n_padded, torch.tensor([CLEAN_PROMPTS[row]]),
               torch.tensor([CORRUPTED_PROMPTS[row]]))


# What a position may be


def test_an_int_of_any_kind_is_an_int():
    for one in (3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)):
        assert choose_positions(one, 5, 2).tolist() == [3], type(one)
    for other in (True, np.bool_(True), torch.tensor(True), 3.0, "3", torch.tensor([3]), [3]):
        assert as_index(other) is None, other


def test_a_list_or_a_slice_is_the_same_for_all_and_a_tensor_is_each_prompt_s_own():
    for pos, chosen in ((None, [0, 1, 2, 3, 4]), (-1, [4]), ([0, -2], [0, 3]), (4, [4]),
                        (slice(-2, None), [3, 4]), (range(2), [0, 1]),
                        (torch.tensor([1, -1]), [[1], [4]])):
        assert choose_positions(pos, 5, 2).tolist() == chosen, f"pos={pos}"


def test_missing_or_ambiguous_positions_are_refused_with_their_value():
    for pos in (5, -6, [0, 5], slice(7, None), [], torch.tensor([0, 5])):
        assert f"pos={pos}" in refusal(lambda pos=pos: choose_positions(pos, 5, 2)), pos
    for pos in (1.5, "two", np.array([0, 1]), {0: 1}):
        told = refusal(lambda pos=pos: choose_positions(pos, 5, 2))
        assert type(pos).__name__ in told and "list" in told and "[batch]" in told, pos
    told = refusal(lambda: choose_positions(torch.tensor([0, 1, 2]), 5, 2))
    assert "[3] for 2 prompts" in told and "list" in told
    assert "[2, 1]" in refusal(lambda: choose_positions([[1], [2]], 5, 2))
    for pos in (slice("a"), slice(0.5, 2), slice(None, None, -1)):
        assert str(pos) in refusal(lambda pos=pos: choose_positions(pos, 5, 2))


def test_each_prompt_s_own_position_is_read_by_every_metric():
    logits = torch.randn(2, 3, 6, 7, generator=seeded_generator(0))  # [cell, batch, pos, d_vocab]
    pos = torch.tensor([5, 2, -2])
    rows, at = torch.arange(3), torch.tensor([5, 2, 4])
    wanted = logits[:, rows, at, CORRECT] - logits[:, rows, at, WRONG]
    assert_close(logit_diff(logits, CORRECT, WRONG, pos=pos), wanted)
    assert_close(Metric.logit_diff(CORRECT, WRONG, pos=pos)(logits), wanted)
    own = logits[:, rows, at]
    rank = (own > own.gather(-1, CORRECT[:, None].expand(2, 3, 1))).sum(-1)
    assert torch.equal(target_rank(logits, CORRECT, pos=pos), rank)
    other = torch.randn(3, 6, 7, generator=seeded_generator(1))
    assert_close(kl_divergence(other, logits, pos=pos), kl_divergence(other, logits)[:, rows, at])


def test_a_metric_that_reads_one_position_is_not_given_two():
    logits = torch.randn(3, 6, 7, generator=seeded_generator(0))
    for pos in ([4, 5], None, slice(0, 2)):
        for read in (lambda pos=pos: Metric.logit_diff(3, 1, pos=pos)(logits),
                     lambda pos=pos: logit_diff(logits, 3, 1, pos=pos),
                     lambda pos=pos: target_rank(logits, 3, pos=pos)):
            assert f"pos={pos}" in refusal(read), pos


def test_caches_lenses_ablations_and_attributions_read_each_prompt_s_own_position():
    model = tiny_model(dtype=torch.float64)
    tokens = torch.randint(11, (3, 6), generator=seeded_generator(0))
    pos = torch.tensor([5, 2, 4])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        kept = model.run_with_cache(tokens, pos_slice=pos)[1]
    part = cache.slice(pos=pos)
    attr, _ = direct_logit_attribution(model, cache, CORRECT, WRONG, pos=pos)
    lens = logit_lens(model, cache, pos=pos, targets=tokens)
    with torch.no_grad(), ablate_heads(model, [(0, 1)], pos=pos):
        ablated = model(tokens)

    for row, at in enumerate(pos.tolist()):
        for name in ("resid_post", "z", "pattern"):
            own = cache[name, 1][row : row + 1]
            own = own[:, :, at : at + 1] if name == "pattern" else own[:, at : at + 1]
            assert torch.equal(part[name, 1][row : row + 1], own), name
            assert torch.equal(kept[name, 1][row : row + 1], own), name
        alone, _ = direct_logit_attribution(model, cache, CORRECT[row], WRONG[row], pos=at)
        assert_close(attr[:, row], alone[:, row])
        assert_close(lens.logits[:, row, 0], logit_lens(model, cache, pos=at).logits[:, row, 0])
        with torch.no_grad(), ablate_heads(model, [(0, 1)], pos=at):
            assert_close(ablated[row], model(tokens)[row])


def test_a_sweep_s_metric_reads_each_prompt_s_own_position():
    model = tiny_model(dtype=torch.float64)
    tokens = torch.randint(11, (2, 3, 6), generator=seeded_generator(0))
    cache = model.run_with_cache(tokens[0])[1]
    pos = torch.tensor([5, 2, 4])
    together = get_act_patch_resid_pre(model, tokens[1], cache,
                                       Metric.logit_diff(CORRECT, WRONG, pos=pos))
    for row, at in enumerate(pos.tolist()):
        alone = get_act_patch_resid_pre(model, tokens[1], cache,
                                        Metric.logit_diff(CORRECT, WRONG, pos=at))
        assert_close(together.values[..., row], alone.values[..., row])
        assert (together.values[:, at + 1 :, row] == 0).all()  # nobody reads later positions


# Prompts of unequal length


def test_prompts_are_padded_on_the_left_and_their_positions_count_from_the_first_real_token():
    tokens, key_mask = pad_left([[5, 2, 8], [6]])
    assert tokens.tolist() == [[5, 2, 8], [0, 0, 6]]
    assert key_mask.tolist() == [[True] * 3, [False, False, True]]
    assert positions_in_prompt(key_mask).tolist() == [[0, 1, 2], [0, 0, 0]]
    for prompts, told in (([], "empty"), ([[1], []], "empty"), ([1, 2], "rows of ids"),
                          (torch.tensor([1, 2]), "rows of ids"), ([[1.9]], "whole number"),
                          ([[True]], "whole number")):
        assert told in refusal(lambda prompts=prompts: pad_left(prompts)), prompts


def test_a_key_mask_that_does_not_fit_is_refused():
    model = tiny_model()
    for key_mask, told in ((KEY_MASK[:2], "[2, 7]"), (KEY_MASK.long(), "int64"),
                           (KEY_MASK.flip(1), "left"), ([True] * 7, "list"),
                           (torch.zeros_like(KEY_MASK), "left")):
        assert told in refusal(lambda mask=key_mask: model(CLEAN, key_mask=mask)), told


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_logits_caches_and_gradients_of_a_row_are_those_that_it_has_alone(changes):
    model = tiny_model(dtype=torch.float64, **changes)
    logits, cache = model.run_with_cache(CLEAN, key_mask=KEY_MASK)
    _, _, grads = model.gradient_cache(CLEAN, difference(), key_mask=KEY_MASK)
    assert_close(model(CLEAN, KEY_MASK), logits)  # the fused kernel
    losses = next_token_loss(logits, CLEAN, key_mask=KEY_MASK, reduction="none")

    for row, n_padded, clean, _ in each_alone():
        own_logits, own_cache = model.run_with_cache(clean)
        assert_close(logits[row, n_padded:], own_logits[0])
        assert_close(losses[row], next_token_loss(own_logits, clean))
        own_grads = model.gradient_cache(clean, difference(row))[2]
        for own, together in ((own_cache, cache), (own_grads, grads)):
            for name, tensor in own.items():
                found = together[name][row]
                if "query_pos" in own.axes[name]:
                    found = found[:, n_padded:, n_padded:]
                else:
                    found = found[n_padded:]
                assert_close(found, tensor[0], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_every_analysis_gives_a_row_what_it_gives_alone(changes):
    model = tiny_model(dtype=torch.float64, **changes)
    together = analyse(model, CLEAN, CORRUPTED, difference(), key_mask=KEY_MASK)
    for row, n_padded, clean, corrupted in each_alone():
        alone = analyse(model, clean, corrupted, difference(row))
        for name, own in alone.items():
            found = together[name].select(together[name].ndim - 1, row)
            if "by position" in name:
                assert (found[:, :n_padded] == 0).all(), f"{name}: padding has an effect"
                found = found[:, n_padded:]
            assert_close(found, own[..., 0], msg=lambda text, name=name: f"{name}: {text}")


def analyse(model, clean, corrupted, metric, key_mask=None):
    """{analysis: its values, [..., batch]} of many analyses on two sets of prompts."""
    mask = {"key_mask": key_mask}
    with torch.no_grad():
        clean_cache = model.run_with_cache(clean, **mask)[1]
        corrupted_cache = model.run_with_cache(corrupted, **mask)[1]
    head = (0, model.cfg.n_heads - 1)
    found = {
        "sweep by position": get_act_patch_resid_pre(
            model, corrupted, clean_cache, metric, **mask).values,
        "sweep of heads by position": get_act_patch_attn_head_out_by_pos(
            model, corrupted, clean_cache, metric, **mask).values,
        "sweep of queries": get_act_patch_attn_head_q_all_pos(
            model, corrupted, clean_cache, metric, **mask).values,
        "path": path_patch(model, clean, corrupted, [("blocks.0.attn.hook_z", head[1])],
                           ["logits"], metric, **mask).values,
        "path matrix": path_patch_matrix(model, clean, corrupted, metric, **mask).values,
        "slopes": attribution_patching(model, clean, corrupted_cache, metric, names="q",
                                       fixes=("qk",), **mask)["q"].values,
        "importance": head_importance(model, clean, metric, **mask).values,
        "resampled": head_importance(model, clean, metric, mode="resample", **mask,
                                     reference=corrupted_cache,
                                     source=range(len(clean))).values,
        "loss": head_importance(model, clean, **mask).values,
        "slope of heads": head_slopes(model, clean, metric, **mask).values,
        "repair": torch.stack(list(vars(self_repair(model, clean, head, metric, **mask)).values())),
        "direct": direct_logit_attribution(model, clean_cache, metric.tokens[:, 0],
                                           metric.tokens[:, 1])[0],
        "lens": logit_lens(model, clean_cache, pos=-1).kl.movedim(1, -1),
        "edges": circuits.eap(model, clean, corrupted, metric, ig_steps=2, **mask).values,
    }
    parts, gap = integrated_gradients(model, clean, corrupted_cache, metric, steps=4, **mask)
    found["integrated"] = torch.stack([parts.flatten(1).sum(1), gap])
    run = circuits.CircuitRun(model, clean, corrupted, metric, **mask)
    found["circuit"] = run.value(run.full.without(["embed"]))[None]
    found["edges by Gauss"] = circuits.eap(model, clean, corrupted, metric, ig_steps=2,
                                           rule="gauss", **mask).values
    some = [run.full.without([edge]) for edge in run.full.edges()[::3]]
    found["faithfulness"] = circuits.faithfulness_of_each(run, some).values
    return found


def test_means_leave_padding_out():
    model = tiny_model(dtype=torch.float64)
    cache = model.run_with_cache(CLEAN, key_mask=KEY_MASK)[1]
    z = cache["z", 0]
    real = torch.cat([z[row, n_padded:] for row, n_padded in enumerate(N_PADDED)])
    seen = []
    for mode, wanted in (("mean", real.mean(0).expand(7, -1, -1)), ("mean_pos", None)):
        with torch.no_grad(), ablate_heads(model, [(0, 0), (0, 1), (0, 2)], mode, reference=cache):
            replaced = model.run_with_cache(CLEAN, "blocks.0.attn.hook_z", key_mask=KEY_MASK)[1]
        seen.append(replaced["z", 0][0])
        if wanted is not None:
            assert_close(seen[-1], wanted)
    assert_close(seen[1][3], z[1:, 3].mean(0))  # the first prompt is padding there


@torch.no_grad()
def test_a_cache_keeps_the_mask_of_its_run_however_it_was_made():
    model = tiny_model()
    with model.caching() as cache:
        model(CLEAN, KEY_MASK)
    _, last = model.run_with_cache(CLEAN, pos_slice=[-1, -2], key_mask=KEY_MASK)
    _, acts, grads = model.gradient_cache(CLEAN, difference(), key_mask=KEY_MASK)
    for kept in (cache, acts, grads):
        assert kept.key_mask.equal(KEY_MASK)
    assert last.key_mask.equal(KEY_MASK[:, [-1, -2]])

    with model.caching() as cache:
        model(CLEAN, key_mask=KEY_MASK)
        model(CLEAN)  # the last one counts
    assert cache.key_mask is None


def test_a_source_with_padding_at_other_places_is_refused():
    model = tiny_model()
    for of_run, of_source in ((KEY_MASK, None), (None, KEY_MASK), (KEY_MASK, KEY_MASK.flip(0))):
        _, source = model.run_with_cache(CORRUPTED, key_mask=of_source)
        for analyse in (get_act_patch_resid_pre, attribution_patching):
            told = refusal(lambda analyse=analyse, source=source, mask=of_run:
                           analyse(model, CLEAN, source, difference(), key_mask=mask))
            assert "padded" in told, analyse
    _, source = model.run_with_cache(CORRUPTED)
    everything_is_real = torch.ones_like(KEY_MASK)
    get_act_patch_resid_pre(model, CLEAN, source, difference(), key_mask=everything_is_real)


@torch.no_grad()
def test_scores_of_patterns_leave_padding_out():
    model = tiny_model()
    prompts = [[0, 4], [0, 5, 0, 2, 5], [5, 0, 5, 8, 9, 5, 0]]  # the padding's token 0 among them
    tokens, key_mask = pad_left(prompts)
    _, cache = model.run_with_cache(tokens, "blocks.1.attn.hook_pattern", key_mask=key_mask)
    of_tokens = (induction_score, duplicate_token_score)
    for score in (prev_token_score, sink_score, attention_entropy, *of_tokens):
        inputs = [tokens] if score in of_tokens else []
        scores = score(cache["pattern", 1], *inputs, key_mask=key_mask)  # [batch, head]
        for row, prompt in enumerate(prompts):
            alone = torch.tensor([prompt])
            _, own = model.run_with_cache(alone, "blocks.1.attn.hook_pattern")
            inputs = [alone] if score in of_tokens else []
            assert_close(scores[row], score(own["pattern", 1], *inputs)[0], equal_nan=True,
                         msg=lambda told, score=score, row=row: f"{score.__name__} {row}: {told}")


def test_a_plain_dict_is_refused_as_a_cache():
    model = tiny_model()
    _, cache = model.run_with_cache(CLEAN)
    labels = torch.zeros_like(CLEAN)
    for analyse in (lambda c: integrated_gradients(model, CLEAN, c, difference()),
                    lambda c: attribution_patching(model, CLEAN, c, difference()),
                    lambda c: get_act_patch_resid_pre(model, CLEAN, c, difference()),
                    lambda c: direct_logit_attribution(model, c, CORRECT, WRONG),
                    lambda c: layer_sweep(c, labels)):
        assert "the cache is a dict" in refusal(lambda analyse=analyse: analyse(dict(cache)))


# Padding where a real token is meant


def test_a_metric_or_an_attribution_that_would_read_padding_is_refused():
    model = tiny_model()
    _, clean_cache = model.run_with_cache(CLEAN, key_mask=KEY_MASK)
    at_padding = Metric.logit_diff(1, 2, pos=0)
    told = refusal(lambda: get_act_patch_resid_pre(model, CORRUPTED, clean_cache, at_padding,
                                                   key_mask=KEY_MASK))
    assert "pos=0" in told and "padding" in told
    told = refusal(lambda: direct_logit_attribution(model, clean_cache, 1, pos=0))
    assert "pos=0" in told and "padding" in told


def test_a_row_can_take_only_from_one_of_its_own_length():
    model = tiny_model()
    _, cache = model.run_with_cache(CORRUPTED, key_mask=KEY_MASK)
    how = {"mode": "resample", "reference": cache, "key_mask": KEY_MASK}
    head_importance(model, CLEAN, source=[0, 1, 2], **how)
    for wrong in ({"source": [1, 0, 2]}, {"source": [0, 1, 2], "key_mask": None}):
        told = refusal(lambda wrong=wrong: head_importance(model, CLEAN, **how | wrong))
        assert "padded at different positions" in told


def test_a_prompt_of_one_token_has_no_loss_in_a_batch_either():
    model = tiny_model()
    tokens, key_mask = pad_left([[1, 2, 3], [4]])
    for measure in (head_importance, head_slopes):
        told = refusal(lambda measure=measure: measure(model, tokens, key_mask=key_mask))
        assert "one token" in told
    logits = model(tokens, key_mask=key_mask)
    told = refusal(lambda: next_token_loss(logits, tokens, key_mask=key_mask, reduction="none"))
    assert "one real token" in told
    alone = next_token_loss(model(tokens[:1]), tokens[:1])
    assert_close(next_token_loss(logits, tokens, key_mask=key_mask), alone)
