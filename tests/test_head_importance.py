"""Four measures of a head: against naive loops, by hand, and verdicts that can fail."""

import copy
import itertools
import math

import pytest
import torch
from helpers import quick_run, tiny_model, tiny_tokens
from torch.testing import assert_close

from checkpoint import save_checkpoint
from experiments import head_importance as program
from experiments.common import as_run
from experiments.importance.measure import (
    DRAWS,
    METHODS,
    bootstrap_weights,
    cache_z,
    circuit_lead,
    equal_weights,
    gradient_along_path,
    head_effects,
    importance_scores,
    measure_pruning,
    measure_subject,
    pruning_curves,
    rank_agreement,
)
from experiments.importance.model import (
    ImportanceSubject,
    load_subjects,
    repeats_and_metric,
    subject_of_circuit,
    subject_of_text,
)
from experiments.importance.report import (
    compare_with_chance,
    describe_findings,
    importance_claims,
    pair_claims,
    pair_costs_by_layer,
    series_share,
)
from experiments.induction.model import InductionCircuit, InductionRecipe, Repeats
from head_ablation import ablate_heads, head_importance, head_importance_gradient
from losses import next_token_loss, per_token_loss
from tokenizer import CharTokenizer
from utils import UserError, seeded_generator

N_CTX = InductionRecipe().n_ctx


def subject(**changes):
    """A Subject of a scrambled model of 2 layers with 3 heads."""
    return ImportanceSubject("tiny", tiny_model(**changes), tiny_tokens(8), tiny_tokens(5, seed=3))


def mean_ablation(one):
    return {"mode": "mean", "reference": cache_z(one.model, one.tokens)}


def declared_circuit():
    """A Subject of a scrambled model, some of whose heads are declared to be a circuit."""
    model = tiny_model(n_ctx=N_CTX, d_vocab=100)
    found = InductionCircuit((0, 0), (1, 1), ((1, 1), (1, 2)), ((0, 1), (0, 2)))
    return subject_of_circuit("known", model, found, program.ImportanceConfig(windows=8, orders=20))


@pytest.fixture(scope="module")
def measured():
    """The facts of a small model of text, and of one with a circuit that is declared."""
    return [measure_subject(one, 20) for one in (subject(), declared_circuit())]


# What is measured


def test_importance_is_that_of_the_library_if_all_texts_have_equal_weights():
    one = subject()
    found = head_effects(one)
    point = importance_scores(found, equal_weights(found), 2)
    zero = head_importance(one.model, one.tokens).mean
    gradient = head_importance_gradient(one.model, one.tokens, normalised=True)
    assert_close(point[0], zero.flatten())
    assert_close(point[3], gradient.flatten())


def test_a_redrawn_text_counts_a_whole_number_of_times():
    weights = bootstrap_weights(6)
    assert_close(weights.sum(1), torch.ones(DRAWS).double())
    assert_close(weights * 6, (weights * 6).round())
    assert_close(weights.mean(0), torch.full((6,), 1 / 6).double(), rtol=0, atol=0.02)


def test_weights_on_one_text_give_that_text():
    found = torch.arange(48.0).view(4, 6, 2)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    scores = importance_scores(found, weights, 2)
    assert_close(scores[:, :3], found[:3].permute(2, 0, 1))
    assert_close(scores[:, 3].unflatten(-1, (2, 3)).norm(dim=-1), torch.ones(2, 2))


def test_the_pruning_curve_is_the_loop_over_hooks():
    one = subject()
    order = [4, 0, 5, 2, 1, 3]
    how = mean_ablation(one)
    curve, again = pruning_curves(one, [order, order[::-1]], how)
    with torch.no_grad():
        for n in range(7):
            heads = [one.heads[head] for head in order[:n]]
            with ablate_heads(one.model, heads, **how):
                loss = next_token_loss(one.model(one.held), one.held)
            assert curve[n] == pytest.approx((loss - next_token_loss(one.model(one.held), one.held))
                                             .item(), abs=1e-5)
    assert curve[0] == 0 and curve[6] == again[6]


def test_the_area_is_the_mean_rise_up_to_half_of_the_heads():
    one = subject()
    point = torch.arange(24.0).view(4, 6)
    found = measure_pruning(one, point, 20, mean_ablation(one))
    for method in METHODS:
        assert found["areas"][method] == pytest.approx(sum(found["curves"][method][1:4]) / 3)
    assert found["curves"]["zero"] == pruning_curves(one, [list(range(6))], mean_ablation(one))[0]
    beaten = sum(area <= found["areas"]["zero"] for area in found["random_areas"])
    assert found["p"]["zero"] == pytest.approx((1 + beaten) / 21)


def test_equal_rankings_agree_and_shuffled_ones_do_not():
    same = torch.arange(12.0).expand(4, -1)
    found = rank_agreement(same, same.expand(9, -1, -1))
    assert found["mean"] == pytest.approx(1) and found["p"] < 0.01
    assert found["pairs"]["zero, gradient"] == pytest.approx([1, 1, 1])
    order = torch.rand(4, 12, generator=seeded_generator(5)).argsort(-1)
    shuffled = same.gather(1, order)
    assert rank_agreement(shuffled, shuffled.expand(9, -1, -1))["p"] > 0.05


def test_the_spearman_of_reversed_rankings_is_minus_one():
    up = torch.arange(6.0)
    found = rank_agreement(torch.stack([up, -up, up, up]), up.expand(3, 4, -1))
    assert found["pairs"]["zero, mean"][0] == pytest.approx(-1)
    assert found["mean"] == pytest.approx(0)  # three pairs at 1, three at -1


@pytest.mark.parametrize("head", list(itertools.product(range(2), range(3))))
def test_a_dead_head_has_importance_zero_by_every_method(head):
    one = subject()
    with torch.no_grad():
        one.model.blocks[head[0]].attn.W_O[head[1]] = 0
    found = head_effects(one)
    index = one.heads.index(head)
    assert found[:, index].abs().max() == 0
    assert (found.abs().amax((0, 2)) > 0).sum() == 5


def test_the_gradient_along_the_path_sums_to_the_zero_ablation():
    one = ImportanceSubject("one text", tiny_model(), tiny_tokens(1), tiny_tokens(1))
    expected = head_importance(one.model, one.tokens).values.abs().mean(-1).flatten()
    assert_close(gradient_along_path(one), expected, rtol=0.02, atol=1e-3)
    at_its_z = head_importance_gradient(one.model, one.tokens).flatten()
    assert not torch.allclose(at_its_z, expected, rtol=0.1, atol=1e-3)


def test_the_metric_is_the_loss_on_known_tokens_only():
    tokens, metric = repeats_and_metric(N_CTX, 4, seeded_generator(0))
    logits = torch.randn(4, N_CTX, 100, generator=seeded_generator(1))
    texts, known = Repeats(N_CTX + 1).draw(4, seeded_generator(0))
    for row in range(4):
        told = known[row, 1:]
        each = per_token_loss(logits[row], texts[row, 1:])[told]
        assert_close(metric(logits)[row], each.mean())
    assert_close(metric(torch.stack([logits, logits]))[1], metric(logits))
    assert_close(tokens, texts[:, :-1])


def test_the_facts_of_a_circuit_name_its_heads_and_leave_the_spare_out(measured):
    known = measured[1]
    assert [head for head, true in zip(known["heads"], known["truth"], strict=True) if true] == [
        (0, 0), (1, 1)]
    assert known["outside"] == [(0, 1), (0, 2), (1, 0)]
    assert (known["previous"], known["induction"], known["spare"]) == (0, 4, 5)
    assert known["dead"] == 0 and len(known["other_costs"]) == 19


def test_the_lead_of_a_circuit_is_that_of_its_cheaper_part_with_its_spares(measured):
    one = declared_circuit()
    previous, induction = one.truth
    for number, mode in enumerate(("zero", "mean")):
        reference = one.model.run_with_cache(one.tokens)[1]

        def cost(heads, mode=mode, reference=reference):
            def without(tokens):
                with ablate_heads(one.model, heads, mode, reference=reference):
                    return one.metrics[0](one.model(tokens))
            return (without(one.tokens) - one.metrics[0](one.model(one.tokens))).mean().item()

        outside = [(0, 1), (0, 2), (1, 0)]
        least = min(cost([previous]), cost([induction, *one.spares]))
        expected = least - max(cost([head]) for head in outside)
        found = circuit_lead(one, one.model, outside)[number]
        assert found == pytest.approx(expected, abs=1e-5)
    assert measured[1]["lead"] == pytest.approx(circuit_lead(one, one.model, outside))


# What is claimed


def test_removing_two_heads_in_series_saves_the_smaller_cost():
    one = {"previous": 0, "induction": 1, "alone": [4.0, 3.0], "pairs": [[0, -3.0], [-3.0, 0]]}
    assert series_share(one) == 1


def test_pairs_in_one_layer_and_across_layers_are_separate():
    pairs = torch.full((4, 4), 0.5)
    pairs[:2, :2] = pairs[2:, 2:] = 2.0
    one = {"heads": list(itertools.product(range(2), range(2))), "alone": [1.0, 1.0, 1.0, 1.0],
           "pairs": pairs.tolist()}
    assert pair_costs_by_layer(one) == (2.0, 0.5)
    one["heads"] = [(0, head) for head in range(4)]  # of one layer, none in two
    assert pair_costs_by_layer(one)[1] is None and len(pair_claims([one])) == 1


def passing(models):
    """The facts of models, changed into those in which every claim holds."""
    text, known = copy.deepcopy(models)
    text["agreement"]["p"] = 0.001
    text["pruning"] |= {"areas": dict.fromkeys(METHODS, 0.1), "random_areas": [1.0] * 20}
    known |= {"auroc": [1.0] * 4, "auroc_planted": [1.0] * 4, "auroc_along": 1.0,
              "lead": [3.0] * 3,
              "outside_cost": 0.01, "other_costs": [1.0, 2.0], "alone": [3.0] * 6}
    known["pruning"]["curves"]["mean"][-1] = 4.0
    known["slope"] = [0.0] * 6
    known["pairs"] = [[0.5] * 6 for _ in range(6)]
    known["pairs"][0][4] = known["pairs"][4][0] = -3.0
    known["repair"]["direct"], known["repair"]["total"] = [0.0] * 6, [1.0] * 6
    return [text, known]


def failed(models):
    return [claim.claim for claim in importance_claims(models) if claim.holds is False]


def test_claims_hold_where_they_should_and_each_can_fail(measured):
    good = passing(measured)
    assert not failed(good)
    assert sum(claim.holds is True for claim in importance_claims(good)) == 9
    changes = [
        (0, "agreement", "p", 0.06),
        *((0, "pruning", "areas", dict.fromkeys(METHODS, 0.1) | {ablation: 1.0})
          for ablation in METHODS[:3]),
        (1, None, "lead", [3.0, 3.0, 0.9]),
        (1, None, "slope", good[1]["importance"][0]),
        (1, None, "dead", 1e-9), (1, None, "outside_cost", 0.5), (1, None, "other_costs", [0.001]),
        (1, None, "pairs", [[0.5] * 6] * 6), (1, None, "pairs", [[-3.0] * 6] * 6),
        (1, "repair", "direct", [0.2] * 6)]  # one for each way to fail
    for which, part, key, value in changes:
        bad = copy.deepcopy(good)
        (bad[which][part] if part else bad[which])[key] = value
        assert len(failed(bad)) == 1, key


def test_models_not_trained_here_get_no_verdict(measured):
    claims = importance_claims(measured, own=False)
    assert all(claim.holds is None for claim in claims[:8])
    assert all(claim.holds is None or claim.control == "exactly 0"
               for claim in importance_claims(measured, judged=False))


def test_the_worst_ranking_is_compared_with_random_orders_of_all_models():
    one = {"random_areas": [1.0, 3.0], "p": {"zero": 0.01, "mean": 0.2, "gradient": 0.01}}
    areas = {"zero": 0.5, "mean": 0.5, "gradient": 9.0}
    models = [{"pruning": one | {"areas": areas | {"mean": 1.5}}},
              {"pruning": one | {"areas": areas, "random_areas": [3.0, 1.0]}}]
    found = compare_with_chance(models, ("zero", "mean"))
    assert found["worst"] == [0.75, 0.25] and found["single"] == "2 of 4"
    assert found["p"] == pytest.approx(1 / 3)  # each order's mean over the models is 1
    assert found["chance"] == pytest.approx(1)


def test_a_ranking_worse_than_every_random_order_does_not_pass_where_pruning_lowers_the_loss():
    orders = [-0.1 - 0.001 * i for i in range(120)]  # in this model, pruning lowers the loss
    pruning = {"areas": {"zero": 0.5}, "random_areas": orders, "p": {"zero": 1.0}}
    found = compare_with_chance([{"pruning": pruning}], ("zero",))
    assert found["p"] == 1
    assert math.isnan(found["worst"][0]) and math.isnan(found["chance"])  # no multiple of a gain
    pruning["areas"]["zero"] = -0.5
    found = compare_with_chance([{"pruning": pruning}], ("zero",))
    assert found["p"] == pytest.approx(1 / 121)


def test_the_gradients_pruning_is_reported_and_not_claimed(measured):
    good = passing(measured)
    good[0]["pruning"]["areas"]["gradient"] = 2.0
    assert not failed(good)
    row = next(claim for claim in importance_claims(good)
               if "pruned up to half by the gradient" in claim.claim)
    assert row.holds is None and row.measured > 1 and "(p = 1;" in row.control


def test_the_titles_state_the_findings(measured):
    measured[1]["auroc"] = [1.0, 1.0, 0.5, 1.0]
    drawn = program.figures({"models": measured})
    titles = [axes.get_title(loc="left") for axes in drawn["importance"].axes]
    assert f"{measured[0]['agreement']['mean']:.2f}" in titles[0]
    assert "3 of 4 measures put the circuit (L0H0 and L1H1) above" in titles[1]
    below = drawn["pruning"].subfigs[1]
    assert f"by {measured[1]['outside_cost']:.2f} nats" in below.get_suptitle()


def test_each_ranking_has_a_panel_of_its_own_with_its_curve_and_the_random_orders(measured):
    drawn = program.figures({"models": measured})["pruning"]
    for part, one in zip(drawn.subfigs, measured, strict=True):
        for axes, method in zip(part.axes, METHODS, strict=True):
            assert method in axes.get_title("left")
            curves = [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "o"]
            assert curves == [one["pruning"]["curves"][method]]
            assert len(axes.collections) == 1, "the band of random orders"


def test_the_summary_counts_the_models_in_which_the_circuit_is_on_top(measured):
    good = passing(measured)
    worse = copy.deepcopy(good[1]) | {"auroc": [1.0, 0.75, 1.0, 0.5]}
    text = describe_findings([*good, worse])
    assert ("highest in 1 of 2 models (L0H0 and L1H1, L0H0 and L1H1), and the gradient in 1"
            in text)
    assert f"correlation of {good[0]['agreement']['mean']:.2f} on average" in text
    assert "costs 0.10 times as much as in a random order" in text


def test_the_summary_names_the_head_that_matters_most(measured):
    changed = copy.deepcopy(measured)
    by_mean = changed[0]["importance"][METHODS.index("mean")]
    for number, (layer, head) in enumerate(changed[0]["heads"]):
        by_mean[number] = 1.0 + max(by_mean)
        assert f"by mean ablation, is L{layer}H{head} (" in describe_findings(changed)


# What cannot be


def test_bad_settings_and_texts_that_are_too_short_are_refused():
    for bad in ({"orders": 19}, {"windows": 7}, {"steps": 0}, {"seeds": ()}):
        with pytest.raises(UserError):
            program.ImportanceConfig(**bad)
    with pytest.raises(UserError, match="smaller --windows"):
        subject_of_text("short", tiny_model(), torch.zeros(40, dtype=torch.long),
                program.ImportanceConfig())


def test_missing_and_unusable_runs_are_refused(tmp_path):
    tokenizer = CharTokenizer().fit("abcdefghijk")
    models = {"flat": tiny_model(n_layers=0), "alone": tiny_model(n_layers=3, n_heads=1),
              "fine": tiny_model()}
    for name, model in models.items():
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name / "checkpoint.pt", as_run(model, tokenizer))
    for name, message in (("gone", "there: "), ("flat", "need 3 heads"),
                          ("alone", "2 of them in a layer"), ("fine", "train.py")):
        with pytest.raises(UserError, match=message):
            cfg = program.ImportanceConfig(run_name=name, out_dir=str(tmp_path))
            next(load_subjects(cfg, tmp_path))


@pytest.mark.slow
def test_the_quick_program_writes_everything(tmp_path):
    _, results = quick_run("head_importance", tmp_path, n_trainings=2)
    assert any("Spearman of two methods" in claim["claim"] for claim in results["claims"])
    assert [len(one["heads"]) for one in results["models"]] == [12, 4]
    for name in ("importance", "pruning"):
        assert (tmp_path / "head_importance_quick" / f"{name}.png").exists()
