"""The benchmark: turns, the operations counted, and verdicts."""

import pytest
import torch
from helpers import TINY, quick_run, tiny_model, tiny_tokens
from torch.utils.flop_counter import FlopCounterMode

from config import ModelConfig
from experiments.common import Claim, as_dicts, claims_table, exit_code, take_turns
from experiments.speed.measure import matmul_flops, median_claim
from experiments.speed.model import hook_point_work, passed_hook_points, weight_products
from experiments.speed.report import benchmark_figure, summarize_benchmark
from hooks import HookPoint
from model import GPT


def test_contestants_take_turns_and_the_first_round_is_not_measured():
    order = []
    contestants = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = take_turns(contestants, 3)
    assert order == list("ab") * 4
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_a_line_holds_where_its_median_is_beyond_its_threshold():
    values = torch.tensor([3.0, 1.0, 2.0])
    line = median_claim("time", values, below=2.1)
    assert (line.measured, line.low, line.high, line.holds) == (2.0, 1.0, 3.0, True)
    assert median_claim("time", values, below=1.9).holds is False
    assert median_claim("share", values, above=1.9).holds is True
    assert median_claim("share", values, above=2.1).holds is False
    assert median_claim("share", values).holds is None


def test_the_operations_of_a_forward_are_those_that_torch_counts():
    cfg = ModelConfig(**TINY)
    model, tokens = GPT(cfg), tiny_tokens(batch=3, pos=cfg.n_ctx)
    watch = [("blocks.0.attn.hook_pattern", lambda pattern, hook: None),
             ("blocks.1.attn.hook_pattern", lambda pattern, hook: None)]
    with FlopCounterMode(display=False) as counter:  # it knows products, not the fused kernel
        model.run_with_hooks(tokens, watch)
    assert counter.get_total_flops() == matmul_flops(cfg, 3)


def test_the_hook_points_that_are_timed_are_those_that_a_forward_passes():
    model, tokens = tiny_model(), tiny_tokens()
    logits = model(tokens)
    called, asked = passed_hook_points(model, tokens)
    block = ("hook_resid_pre attn.hook_q attn.hook_k attn.hook_v attn.hook_z hook_attn_out "
             "hook_resid_mid hook_mlp_in mlp.hook_pre mlp.hook_post hook_mlp_out hook_resid_post")
    expected = ["hook_embed", "hook_pos_embed"] + [
        f"blocks.{layer}.{name}" for layer in range(2) for name in block.split()]
    assert sorted(point.name for point in called) == sorted(expected)
    asked_names = {point.name for point in asked}
    assert {"ln_final.hook_scale", "blocks.0.attn.hook_pattern", "blocks.1.hook_q_input",
            "blocks.1.attn.hook_result"} <= asked_names

    # the model itself has kept its points
    assert all(type(point) is HookPoint for point in model.hook_points().values())
    assert torch.equal(model(tokens), logits)


def test_the_work_of_hook_points_is_to_call_each_once(monkeypatch):
    model, tokens = tiny_model(), tiny_tokens()
    work = hook_point_work(model, tokens)
    names = []
    monkeypatch.setattr(HookPoint, "__call__", lambda point, tensor: names.append(point.name))
    work()
    assert len(names) == len(set(names)) == 2 + 2 * 12


def test_the_weight_products_are_those_of_the_model():
    cfg = ModelConfig(**TINY)
    model, tokens = GPT(cfg), tiny_tokens(batch=3, pos=cfg.n_ctx)
    with FlopCounterMode(display=False) as counter:
        weight_products(model, tokens)()
    attention = 2 * 3 * cfg.n_ctx * cfg.n_layers * 2 * cfg.n_ctx * cfg.d_model
    assert counter.get_total_flops() == matmul_flops(cfg, 3) - attention


def test_a_failed_claim_is_seen_in_the_table_and_in_the_exit_code():
    good = Claim("one", 1.0, 0.9, 1.1, holds=True)
    bad = Claim("other", 2.0, 1.9, 2.1, holds=False, reported="1.0 (A 2020)", control="0.1")
    told = Claim("third", 3.0, 3.0, 3.0)
    assert [exit_code(claims) for claims in ([good, told], [good, bad])] == [0, 1]
    lines = claims_table([good, bad, told]).splitlines()
    assert len(set(map(len, lines))) == 1  # aligned
    assert "PASS" in lines[2] and "FAIL" in lines[3] and "1.0 (A 2020)" in lines[3]
    assert [row["verdict"] for row in as_dicts([good, bad, told])] == ["PASS", "FAIL", ""]


def some_lines(judged=True):
    """Lines of which the summary tells, of which one misses its threshold."""
    return [median_claim("training: share of the matmul rate", 0.7, above=0.66, judged=judged),
            median_claim("1 x 64: what hook points do, over forward", 0.0004, below=0.01,
                         judged=judged),
            median_claim("1 x 64: time of caching over forward", 1.1, below=1.05, judged=judged)]


def test_the_summary_tells_what_was_measured_and_how_many_thresholds_were_met():
    told = summarize_benchmark(some_lines())
    expected = ("0.70 of the rate", "0.04%", "1.10", "2 of 3 thresholds")
    assert all(words in told for words in expected)
    assert "not how fast" in summarize_benchmark(some_lines(judged=False))


def test_the_figure_shows_a_time_above_its_threshold_and_a_rate_below_it_as_bad():
    axes, = benchmark_figure(some_lines()).axes
    dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert dots == pytest.approx([0.7 / 0.66, 0.01 / 0.0004, 1.05 / 1.1])
    assert axes.get_title("left") == "2 of 3 thresholds are met (orange: missed)"
    assert benchmark_figure(some_lines(judged=False)) is None


@pytest.mark.slow
def test_a_quick_run_writes_what_it_measured(tmp_path):
    printed, result = quick_run("benchmark", tmp_path)
    assert result["settings"]["threads"] == 1
    assert all(0 < claim["low"] <= claim["measured"] <= claim["high"] for claim in result["claims"]
               if claim["claim"].startswith(("training", "1 x 64", "8 x 64")))
    assert printed.count(" 1 x 64") >= 3 and result["found"][:40] in printed
