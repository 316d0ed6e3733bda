"""Direct attribution: the rows sum to the model's own logits, unfolded."""

import pytest
import torch
from helpers import tiny_model, tiny_tokens
from torch.testing import assert_close

from attribution import direct_logit_attribution
from metrics import logit_diff
from tokenizer import CharTokenizer
from utils import UserError

SHAPES = [{}, {"tie_embeddings": True}, {"attn_only": True}, {"unembed_bias": True},
          {"norm": "none", "unembed_bias": True}, {"positions": "none"}, {"n_layers": 0}]
CORRECT, WRONG = torch.tensor([3, 4]), torch.tensor([5, 0])


def cached(**changes):
    model = tiny_model(dtype=torch.float64, **changes)
    with torch.no_grad():
        return model, *model.run_with_cache(tiny_tokens())


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("unit", ["component", "head", "neuron"])
@pytest.mark.parametrize("pos", [-1, 0, 3])
def test_the_rows_sum_to_the_logit_difference(changes, unit, pos):
    model, logits, cache = cached(**changes)
    attr, labels = direct_logit_attribution(model, cache, CORRECT, WRONG, unit=unit, pos=pos)
    assert_close(attr.sum(0), logit_diff(logits, CORRECT, WRONG, pos=pos, reduction="none"))
    assert labels[-2:] == ["ln_bias", "b_U"] and len(labels) == len(attr) == len(set(labels))


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_without_a_wrong_token_the_rows_sum_to_the_logit(changes):
    model, logits, cache = cached(**changes)
    attr, _ = direct_logit_attribution(model, cache, CORRECT)
    assert_close(attr.sum(0), logits[torch.arange(2), -1, CORRECT])


def test_a_row_is_what_the_logits_lose_without_the_write_at_a_frozen_scale():
    model, logits, cache = cached()
    attr, labels = direct_logit_attribution(model, cache, CORRECT, WRONG, unit="head")
    for layer in range(2):
        z = cache["z", layer]
        for head in range(3):
            write = z[:, -1, head] @ model.blocks[layer].attn.W_O[head].detach()
            less = cache["resid_post", 1][:, -1] - write
            centred = less - less.mean(-1, keepdim=True)
            normalised = centred / cache["scale", None][:, -1]
            read = normalised * model.ln_final.w.detach() + model.ln_final.b.detach()
            without = (read @ model.W_U.detach() + model.b_U.detach())[:, None]
            change = (logit_diff(logits, CORRECT, WRONG, reduction="none")
                      - logit_diff(without, CORRECT, WRONG, reduction="none"))
            assert_close(attr[labels.index(f"L{layer}H{head}")], change)


def test_finer_units_sum_to_coarser_ones():
    model, _, cache = cached()
    coarse, names = direct_logit_attribution(model, cache, 3, 5)
    fine, labels = direct_logit_attribution(model, cache, 3, 5, unit="neuron")
    d = model.W_U.detach()[:, 3] - model.W_U.detach()[:, 5]
    scale = cache["scale", None][:, -1]
    weighted = model.ln_final.w.detach() * d
    for layer in range(2):
        rows = [i for i, label in enumerate(labels) if label.startswith(f"L{layer}N")]
        bias = (model.blocks[layer].mlp.b_out.detach() @ (weighted - weighted.mean())) / scale
        assert_close(fine[rows].sum(0) + bias[:, 0], coarse[names.index(f"{layer}_mlp_out")])


def test_the_difference_is_antisymmetric():
    model, _, cache = cached()
    one, _ = direct_logit_attribution(model, cache, CORRECT, WRONG, unit="neuron")
    other, _ = direct_logit_attribution(model, cache, WRONG, CORRECT, unit="neuron")
    assert_close(one, -other)


def test_tokens_may_be_text_where_a_tokenizer_is_given():
    model, _, cache = cached()
    tokenizer = CharTokenizer().fit("abcdefghijk")
    by_text, _ = direct_logit_attribution(model, cache, "d", ["f", "a"], tokenizer=tokenizer)
    by_id, _ = direct_logit_attribution(model, cache, 3, WRONG)
    assert torch.equal(by_text, by_id)


@pytest.mark.parametrize("arguments, problem", [
    (("d",), "text where ids are needed"), ((11,), "token id 11 is outside of the vocabulary"),
    ((-1,), "token id -1"), (([1, 2, 3],), "one for each of the 2 rows"), ((1.5,), "token ids"),
])
def test_tokens_that_are_none_are_refused(arguments, problem):
    model, _, cache = cached()
    with pytest.raises(UserError, match=problem):
        direct_logit_attribution(model, cache, *arguments)


def test_a_position_that_is_not_there_is_refused():
    model, _, cache = cached()
    with pytest.raises(UserError, match="pos=7 is outside of the 7"):
        direct_logit_attribution(model, cache, 1, pos=7)
