"""The benchmark measures what it says: whose turn it is, which operations count, what passes."""

import pytest
import torch
from helpers import TINY, quick_run, tiny_model, tiny_tokens
from torch.utils.flop_counter import FlopCounterMode

from config import ModelConfig
from experiments import benchmark
from experiments.common import Claim, as_dicts, claims_table, exit_code
from model import GPT


def test_contestants_take_turns_and_the_first_round_is_not_measured():
    order = []
    contestants = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = benchmark.take_turns(contestants, 3)
    assert order == list("ab") * 4
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_a_claim_holds_up_to_its_mark_and_not_beyond():
    values = torch.tensor([3.0, 1.0, 2.0])
    claim = benchmark.claim_of("time", values, at_most=2.0)
    assert (claim.measured, claim.low, claim.high, claim.holds) == (2.0, 1.0, 3.0, True)
    assert benchmark.claim_of("time", values, at_most=1.9).holds is False
    assert benchmark.claim_of("share", values, at_least=2.0).holds is True
    assert benchmark.claim_of("share", values, at_least=2.1).holds is False
    assert benchmark.claim_of("share", values).holds is None


def test_the_operations_of_a_forward_are_those_that_torch_counts():
    cfg = ModelConfig(**TINY)
    model, tokens = GPT(cfg), tiny_tokens(batch=3, pos=cfg.n_ctx)
    watch = [("blocks.0.attn.hook_pattern", lambda pattern, hook: None),
             ("blocks.1.attn.hook_pattern", lambda pattern, hook: None)]
    with FlopCounterMode(display=False) as counter:  # it knows products, not the fused kernel
        model.run_with_hooks(tokens, watch)
    assert counter.get_total_flops() == benchmark.matmul_flops(cfg, 3)


def test_the_model_without_hook_points_is_the_same_model():
    model, tokens = tiny_model(), tiny_tokens()
    torch.testing.assert_close(benchmark.without_hook_points(model, tokens), model(tokens))


def test_the_weight_products_are_those_of_the_model():
    cfg = ModelConfig(**TINY)
    model, tokens = GPT(cfg), tiny_tokens(batch=3, pos=cfg.n_ctx)
    with FlopCounterMode(display=False) as counter:
        benchmark.weight_products(model, tokens)()
    attention = 2 * 3 * cfg.n_ctx * cfg.n_layers * 2 * cfg.n_ctx * cfg.d_model
    assert counter.get_total_flops() == benchmark.matmul_flops(cfg, 3) - attention


def test_a_failed_claim_is_seen_in_the_table_and_in_the_exit_code():
    good = Claim("one", 1.0, 0.9, 1.1, holds=True)
    bad = Claim("other", 2.0, 1.9, 2.1, holds=False, reported="1.0 (A 2020)", control="0.1")
    told = Claim("third", 3.0, 3.0, 3.0)
    assert [exit_code(claims) for claims in ([good, told], [good, bad])] == [0, 1]
    lines = claims_table([good, bad, told]).splitlines()
    assert len(set(map(len, lines))) == 1  # aligned
    assert "PASS" in lines[2] and "FAIL" in lines[3] and "1.0 (A 2020)" in lines[3]
    assert [row["verdict"] for row in as_dicts([good, bad, told])] == ["PASS", "FAIL", ""]


@pytest.mark.slow
def test_a_quick_run_writes_what_it_measured(tmp_path):
    printed, result = quick_run("benchmark", tmp_path)
    assert result["settings"]["threads"] == 1
    assert all(0 < claim["low"] <= claim["measured"] <= claim["high"] for claim in result["claims"]
               if claim["claim"].startswith(("training", "1 x 64", "8 x 64")))
    assert all(claim["claim"] in printed for claim in result["claims"])
