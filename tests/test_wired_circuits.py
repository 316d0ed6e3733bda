"""Wired circuits: they work, by plain hooks, and the scores show it if one does not."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from helpers import quick_run

from experiments.wired.board import (
    BOS,
    CONTENT,
    GAIN,
    N_CTX,
    N_HEADS,
    NO,
    SOFT,
    YES,
    random_texts,
    zero_mean_basis,
)
from experiments.wired.measure import (
    TOOLS,
    Case,
    Fact,
    answer_accuracy,
    judge_tool,
    measure_facts,
)
from experiments.wired.model import all_circuits
from experiments.wired.report import all_claims, summarise, verdict_figure
from utils import seeded_generator

SEEDS = (0, 1, 2)
NAMES = ("previous token", "duplicate token", "induction", "copying", "copy suppression", "OR",
         "AND", "unused bit", "dead heads", "saturated softmax")
PAID = 1 / (1 + math.exp(-SOFT / 2) + 8 * math.exp(-SOFT))  # by an induction head to what it finds
METRICS = {"induction": (PAID, -PAID), "copying": (1.5, -1.5), "copy suppression": (0.5, 0.0)}
TEXTS = random_texts(100, seeded_generator(9))


@pytest.fixture(scope="module")
def wirings():
    """{(name, seed): Wired}."""
    return {(wired.name, seed): wired for seed in SEEDS for wired in all_circuits(seed)}


def pairs_of(wired, n=6):
    return wired.draw_pairs(n, seeded_generator(3))


def run(model, tokens, fwd_hooks=()):
    """Logits, without a gradient."""
    with torch.no_grad():
        return model.run_with_hooks(tokens, list(fwd_hooks))


def run_caching(model, tokens):
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


def replace_z(layer, head, value):
    """A hook that puts `value`, a z or a number, in place of one head's z."""
    def edit(z, hook):
        z = z.clone()
        z[:, :, head] = value if isinstance(value, float) else value[:, :, head]
        return z
    return f"blocks.{layer}.attn.hook_z", edit


def dead_heads_of(wired):
    every = itertools.product(range(wired.model.cfg.n_layers), range(N_HEADS))
    return [head for head in every if head not in wired.truth.heads]


# What they do


def test_the_model_predicts_the_answer_wherever_there_is_one(wirings):
    for (name, seed), wired in wirings.items():
        where = f"{name}, seed {seed}"
        logits = run(wired.model, TEXTS)
        n_answers = 0
        for text, rows in zip(TEXTS.tolist(), logits, strict=True):
            for end, row in enumerate(rows, 1):
                answer = wired.answer(text[:end])
                if answer is not None:
                    others = torch.cat([row[:answer], row[answer + 1:]])
                    assert row[answer] - others.max() > 0.45 * GAIN, where
                    n_answers += 1
        assert n_answers > 100 and answer_accuracy(wired, TEXTS) == 1.0, where


def test_the_answers_are_those_of_the_tasks(wirings):
    wired = {name: wirings[name, 0] for name in NAMES}
    assert wired["previous token"].answer([BOS, 4, 7, 2]) == 7
    assert wired["dead heads"].answer([BOS, 4]) is None
    assert wired["duplicate token"].answer([BOS, 4, 7, 4]) == YES
    assert wired["duplicate token"].answer([BOS, 4, 7, 2]) == NO
    assert wired["induction"].answer([BOS, 3, 5, 2, 3]) == 5
    assert wired["induction"].answer([BOS, 3, 5, 3, 2, 3]) is None  # two followers
    assert wired["induction"].answer([BOS, 3, 5, 2]) is None
    assert wired["induction"].answer([BOS, 6, 6]) == 6


def test_clean_and_corrupted_have_the_metrics_that_were_wired(wirings):
    for (name, seed), wired in wirings.items():
        where = f"{name}, seed {seed}"
        pairs = pairs_of(wired, 20)
        texts = (pairs.clean_tokens, pairs.corrupted_tokens)
        for tokens, units in zip(texts, METRICS.get(name, (1.0, -1.0)), strict=True):
            metric = pairs.metric(run(wired.model, tokens)) / GAIN
            assert (metric - units).abs().max() < 0.005, where
        for text, other, right in zip(pairs.clean_tokens.tolist(), pairs.corrupted_tokens.tolist(),
                                      pairs.right.tolist(), strict=True):
            assert wired.answer(text) == right != wired.answer(other), where
            assert len(text) == N_CTX and text[0] == BOS and set(text[1:]) <= set(CONTENT), where


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "expected"), [
    ("OR", {(0, 0): NO, (0, 1): YES, (1, 0): YES, (1, 1): YES}),
    ("AND", {(0, 0): NO, (0, 1): NO, (1, 0): NO, (1, 1): YES})])
def test_a_gate_has_its_truth_table(wirings, name, expected, seed):
    wired = wirings[name, seed]
    pairs = pairs_of(wired, 1)
    i, j = (pairs.clean_tokens != pairs.corrupted_tokens).nonzero()[:, 1].tolist()
    for bits, answer in expected.items():
        text = pairs.corrupted_tokens.clone()
        for position, bit in zip((i, j), bits, strict=True):
            text[0, position] = (pairs.clean_tokens if bit else pairs.corrupted_tokens)[0, position]
        assert run(wired.model, text)[0, -1].argmax() == answer


# How they do it


def test_the_heads_look_where_they_were_wired_to(wirings):
    for seed in SEEDS:
        tokens = random_texts(20, seeded_generator(4))

        def pattern(name, which=max, tokens=tokens, seed=seed):
            wired = wirings[name, seed]
            layer, head = which(wired.truth.heads)
            return run_caching(wired.model, tokens)["pattern", layer][:, head]

        for name, which in (("previous token", max), ("dead heads", max), ("induction", min)):
            assert pattern(name, which).diagonal(offset=-1, dim1=1, dim2=2).min() > 0.999, seed
        earlier = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
        paid = (pattern("duplicate token") * earlier).sum(-1)
        assert paid[earlier.any(-1)].min() > 0.999 and paid[~earlier.any(-1)].max() == 0, seed
        after = earlier.roll(1, dims=-1)
        looked = pattern("induction")
        paid, rests = looked[after & (after.sum(-1) == 1)[..., None]], looked[~after.any(-1)][:, 0]
        assert 0.992 < paid.min() and paid.max() < 0.994 and rests.min() > 0.9, seed  # it is soft


def test_copy_suppression_follows_the_prediction_and_nothing_else(wirings):
    for seed in SEEDS:
        wired = wirings["copy suppression", seed]
        pairs, (layer, head) = pairs_of(wired), max(wired.truth.heads)
        predicted = pairs.clean_tokens == pairs.wrong[:, None]  # [batch, key_pos]
        clean = run_caching(wired.model, pairs.clean_tokens)
        corrupted = run_caching(wired.model, pairs.corrupted_tokens)
        with wired.model.hooks([replace_z(*min(wired.truth.heads), clean["z", 0])]):
            moved = run_caching(wired.model, pairs.corrupted_tokens)
        there, gone, back = (cache["pattern", layer][:, head, -1]
                             for cache in (clean, corrupted, moved))
        assert (there * predicted).sum(-1).min() > 0.999 and gone[:, 0].min() > 0.999, seed
        assert (back * predicted).sum(-1).min() > 0.999, seed
        # What is predicted half as loudly is not looked at.
        other = pairs.clean_tokens.where(~predicted, pairs.right[:, None])
        assert run_caching(wired.model, other)["pattern", layer][:, head, -1, 0].min() > 0.999, seed
        assert (pairs.metric(run(wired.model, other)) / GAIN + 0.5).abs().max() < 0.005, seed


def test_each_head_restores_breaks_and_removes_its_wired_share(wirings):
    for (name, seed), wired in wirings.items():
        where = f"{name}, seed {seed}"
        pairs, truth = pairs_of(wired), wired.truth
        clean = run_caching(wired.model, pairs.clean_tokens)
        corrupted = run_caching(wired.model, pairs.corrupted_tokens)
        high = pairs.metric(run(wired.model, pairs.clean_tokens))
        low = pairs.metric(run(wired.model, pairs.corrupted_tokens))
        for layer, head in itertools.product(range(wired.model.cfg.n_layers), range(N_HEADS)):
            restored, broken, removed = (
                pairs.metric(run(wired.model, tokens, [replace_z(layer, head, value)]))
                for tokens, value in ((pairs.corrupted_tokens, clean["z", layer]),
                                      (pairs.clean_tokens, corrupted["z", layer]),
                                      (pairs.clean_tokens, 0.0)))
            for measured, wanted in (((restored - low) / (high - low), truth.restores),
                                     ((high - broken) / (high - low), truth.breaks),
                                     ((high - removed) / GAIN, truth.removed)):
                assert (measured - wanted.get((layer, head), 0.0)).abs().max() < 0.005, where


def test_dead_heads_are_sharp_and_do_next_to_nothing(wirings):
    for name in NAMES:
        wired, texts = wirings[name, 0], TEXTS[:20]
        logits, cache = run(wired.model, texts), run_caching(wired.model, texts)
        moved = {}
        for head in dead_heads_of(wired):
            without = run(wired.model, texts, [replace_z(*head, 0.0)])
            moved[head] = (without - logits).abs().max().item()
        assert max(moved.values()) < 0.001 * 4 * GAIN, name
        for layer, head in moved:
            assert cache["pattern", layer][:, head].amax(-1).min() > 0.999, name
            assert cache["z", layer][:, :, head].abs().amax() > 0.5, name  # it carries something
        exact = [head for head in moved if moved[head] < 1e-10]
        writes_the_mean = [head for head in exact if wired.model.W_O[head].norm() > 0]
        assert writes_the_mean and len(exact) < len(moved), name


def test_the_unused_bit_is_in_the_stream_and_changes_nothing(wirings):
    wired = wirings["unused bit", 1]
    pairs = pairs_of(wired, 40)

    def bits(name, texts):
        return torch.tensor([wired.bits[name](text) for text in texts.tolist()])

    assert 5 < (bits("used", pairs.clean_tokens) ^ bits("unused", pairs.clean_tokens)).sum() < 35
    for position in (pairs.clean_tokens != pairs.corrupted_tokens).any(0).nonzero()[:, 0].tolist():
        texts = pairs.clean_tokens.clone()
        texts[:, position] = pairs.corrupted_tokens[:, position]
        one, other = (run(wired.model, each)[:, -1] for each in (pairs.clean_tokens, texts))
        moved = (run_caching(wired.model, pairs.clean_tokens)["resid_post", 0][:, -1]
                 - run_caching(wired.model, texts)["resid_post", 0][:, -1])
        if (bits("unused", texts) != bits("unused", pairs.clean_tokens)).all():
            assert (one - other).abs().max() < 1e-9
            assert moved.norm(dim=-1).min() > 1.9  # from -1 to 1, or back
        else:
            assert (one - other).abs().amax(-1).min() > 0.9 * GAIN


def test_no_gradient_passes_the_saturated_softmax_though_all_of_the_effect_does(wirings):
    wired = wirings["saturated softmax", 0]
    pairs, (layer, head) = pairs_of(wired), max(wired.truth.heads)
    names = [f"blocks.{layer}.attn.hook_{part}" for part in ("q", "z")]
    _, _, grads = wired.model.gradient_cache(pairs.corrupted_tokens, pairs.metric, names)
    steepest = {part: grads[part, layer][:, :, head].abs().max() for part in "qz"}
    assert steepest["q"] < 1e-4 * steepest["z"]


# In what they stand


def test_a_rotation_of_the_stream_does_not_change_the_logits(wirings):
    for (name, seed), wired in wirings.items():
        where = f"{name}, seed {seed}"
        turned = wired.rotated(seed + 5)
        assert (run(turned.model, TEXTS) - run(wired.model, TEXTS)).abs().max() < 1e-10, where
        assert (turned.model.W_E - wired.model.W_E).abs().max() > 0.1, where
        assert torch.allclose(turned.model.W_E.mean(-1), wired.model.W_E.mean(-1)), where


def test_a_rotation_that_changes_the_mean_changes_the_logits(wirings, monkeypatch):
    wired = wirings["copying", 0]
    noise = torch.randn(104, 104, generator=seeded_generator(0)).double()
    tilted = torch.linalg.qr(noise)[0][1:]  # orthonormal, but not to the ones
    monkeypatch.setattr("experiments.wired.board.zero_mean_basis", lambda width: tilted)
    assert (run(wired.rotated(5).model, TEXTS) - run(wired.model, TEXTS)).abs().max() > 1e-3


def test_float32_is_enough(wirings):
    for name in NAMES:
        wired = wirings[name, 0]
        single = dataclasses.replace(wired, model=copy.deepcopy(wired.model).float())
        assert (run(single.model, TEXTS) - run(wired.model, TEXTS)).abs().max() < 1e-3, name
        assert answer_accuracy(single, TEXTS) == 1.0, name


def test_no_gain_is_1_and_no_bias_0(wirings):
    for name in NAMES:
        for path, weight in wirings[name, 0].model.named_parameters():
            leaf = path.rpartition(".")[2]
            if leaf == "w":
                assert weight.unique().numel() == 1 and (weight - 1).abs().max() > 1e-3, path
            elif leaf in ("b", "b_QKV", "b_heads_out", "b_in", "b_U"):
                assert weight.abs().max() > 0.01, path


def test_the_seed_moves_heads_tokens_and_directions(wirings):
    for name in NAMES:
        circuits = {frozenset(wirings[name, seed].truth.heads) for seed in SEEDS}
        codes = [wirings[name, seed].model.W_E for seed in SEEDS]
        assert not torch.allclose(codes[0], codes[1])
        assert len(circuits) > 1 or name in ("previous token", "duplicate token", "dead heads")
    again = {wired.name: wired for wired in all_circuits(1)}
    assert all(torch.equal(again[name].model.W_U, wirings[name, 1].model.W_U) for name in NAMES)


def test_the_waves_are_orthonormal_and_have_no_mean():
    waves = zero_mean_basis(7)
    assert torch.allclose(waves @ waves.T, torch.eye(6).double())
    assert waves.sum(-1).abs().max() < 1e-12


# The scoring


def case_of(wired):
    return Case.run(wired, wired.draw_pairs(2, seeded_generator(0)))


def tool(name):
    return next(tool for tool in TOOLS if tool.name == name)


@pytest.mark.parametrize("name", [tool.name for tool in TOOLS if "-IG" not in tool.name])
def test_every_tool_finds_what_was_wired(wirings, name):
    for circuit in ("duplicate token", "copy suppression", "OR", "AND", "dead heads"):
        row = judge_tool(tool(name), case_of(wirings[circuit, 2]))
        if row is not None:
            assert row.auroc == pytest.approx(row.wired) and row.error < 0.02, circuit


@pytest.mark.parametrize("name", ["activation patching, noising", "zero ablation",
                                  "attribution patching", "direct logit attribution"])
def test_a_missing_circuit_is_not_found(wirings, name):
    wired = wirings["copying", 0]
    other = dead_heads_of(wired)[0]
    shares = {other: 1.0}
    false = dataclasses.replace(wired.truth, restores=shares, breaks=shares, slope=shares,
                                removed=shares, direct=shares)
    row = judge_tool(tool(name), case_of(dataclasses.replace(wired, truth=false)))
    assert row.auroc < 0.5 and row.error > 0.3
    claims = all_claims([row], [{"a fact": Fact(0.5, 1.0, 0.1)}])
    assert [claim.holds for claim in claims] == [False, False, False]
    found = summarise([row], claims)
    assert "0 of the 1 answers" in found and "3 of 3 claims fail" in found


def test_a_head_that_lost_its_work_fails_the_claims(wirings):
    wired = wirings["induction", 0]
    model = copy.deepcopy(wired.model)
    layer, head = max(wired.truth.heads)
    with torch.no_grad():
        model.blocks[layer].attn.W_O[head] *= 0.5
    found = measure_facts(case_of(dataclasses.replace(wired, model=model)))
    assert found["faithfulness of the wired edges alone"].measured == pytest.approx(1.0, abs=0.01)
    row = judge_tool(tool("zero ablation"), case_of(dataclasses.replace(wired, model=model)))
    assert row.auroc == 1.0 and row.error > 0.4


def test_the_facts_are_as_wired(wirings):
    for name in NAMES:
        if name == "unused bit":
            continue  # its erasure is judged by the quick run
        for what, fact in measure_facts(case_of(wirings[name, 1])).items():
            assert abs(fact.measured - fact.wired) <= fact.within and fact.holds, what


def test_the_scores_of_failing_tools_are_predicted(wirings):
    truths = {name: wirings[name, 0].truth for name in NAMES}
    assert tool("activation patching, denoising").expected_auroc(truths["AND"]) == 0.5
    assert tool("activation patching, noising").expected_auroc(truths["OR"]) == 0.5
    assert tool("zero ablation").expected_auroc(truths["OR"]) == 0.5
    assert tool("attribution patching").expected_auroc(truths["saturated softmax"]) == 0.75
    assert tool("integrated gradients").expected_auroc(truths["OR"]) == 1.0
    assert tool("EAP (edges)").expected_auroc(truths["copy suppression"]) == 7 / 8
    assert tool("ACDC (edges)").expected_auroc(truths["OR"]) == 0.8
    assert tool("previous-token pattern").expected_auroc(truths["dead heads"]) == 0.0


def test_the_figure_frames_the_tools_that_must_fail(wirings):
    rows = [judge_tool(tool(name), case_of(wirings[circuit, 0])) for circuit in ("OR", "AND")
            for name in ("activation patching, denoising", "activation patching, noising")]
    axes = verdict_figure(rows).axes[0]
    assert axes.get_title(loc="left").startswith("4 of 4") and len(axes.lines) == 2
    assert [text.get_text() for text in axes.texts] == ["1", "0.5", "0.5", "1"]


@pytest.mark.slow
def test_a_quick_run_passes_every_claim(tmp_path):
    printed, result = quick_run("wired_circuits", tmp_path)
    assert printed.count("PASS") == len(result["claims"]) > 50 and "FAIL" not in printed
    assert {row["circuit"] for row in result["rows"]} == set(NAMES)
    assert "No claim fails" in result["found"] and printed.startswith("16 tools were asked")
    assert max(map(len, printed.split("written to")[0].splitlines())) <= 100
    assert (tmp_path / "wired_circuits_quick" / "wired_circuits.png").stat().st_size > 10_000
