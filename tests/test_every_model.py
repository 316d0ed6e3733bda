"""Every public analysis on every kind of model: half precision, no layers, one head, one prompt."""

import copy
import threading
from functools import partial

import pytest
import torch
from helpers import WIDE, refusal, tiny_model
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import circuit_evaluation as evaluation
import circuits
from activation_cache import ActivationCache
from attribution import attribution_patching, direct_logit_attribution, integrated_gradients
from checkpoint import save_checkpoint
from config import SamplingConfig
from experiments.attention_page.model import choose_subjects
from experiments.attention_visualization import AttentionConfig
from experiments.common import as_run
from experiments.dictionaries.trained.model import run_subjects
from experiments.dynamics.compare import load_compared
from experiments.head_importance import ImportanceConfig
from experiments.importance.model import subject_of_run
from experiments.induction.scan import report_scan
from generate import generate
from head_ablation import (
    ablate_heads,
    head_importance,
    head_importance_gradient,
    pairwise_interaction,
    self_repair,
)
from logit_lens import fit_tuned_lens, logit_lens
from losses import IGNORED, cross_entropy, kl_divergence, next_token_loss, per_token_loss
from metrics import Metric, logit_diff
from patching import get_act_patch_mlp_out, get_act_patch_resid_pre, path_patch, path_patch_matrix
from probing import fit_probe, mdl_online
from residual_stream_analysis import (
    cosine_by_layer,
    decompose_resid,
    effective_rank,
    full_decomposition,
    norm_budget,
    participation_ratio,
    resid_norms,
    stack_neuron_results,
)
from tokenizer import CharTokenizer
from utils import UserError, seeded_generator
from weight_circuits import (
    centre_unembed,
    centre_writing_weights,
    composition_scores,
    fold_layer_norm,
    fold_value_biases,
    ov_circuit,
    ov_eigenvalue_score,
    qk_circuit,
    svd_vocab,
)

DIFFERENCE = Metric.logit_diff(1, 2)
MODELS = {
    "float64": ({}, torch.float64, (2, 6)), "float32": ({}, torch.float32, (2, 6)),
    "bfloat16": ({}, torch.bfloat16, (2, 6)), "float16": ({}, torch.float16, (2, 6)),
    "no layers": ({"n_layers": 0}, torch.float32, (2, 6)),
    "one head": ({"n_heads": 1}, torch.float32, (2, 6)),
    "one prompt": ({}, torch.float32, (1, 6)), "one token": ({}, torch.float32, (2, 1)),
    "no MLP": ({"attn_only": True}, torch.float32, (2, 6)),
    "no LayerNorm": ({"norm": "none"}, torch.float32, (2, 6)),
    "wide heads": (WIDE, torch.float32, (2, 6)),
    "wide heads, half": (WIDE, torch.bfloat16, (2, 6)),
    "classifier": ({"d_vocab_out": 4}, torch.float32, (2, 6)),
    "more logits than tokens": ({"d_vocab_out": 13}, torch.float32, (2, 6)),
}


def prompts(shape):
    """Clean and corrupted tokens of a shape, which differ everywhere."""
    clean = torch.randint(11, shape, generator=seeded_generator(3))
    return clean, (clean + 1) % 11


def analyses(model, shallow, clean, corrupted):
    """{name: a call of every public analysis}, each giving tensors or what holds them.

    shallow: a model of the same kind with one layer at most, whose circuits are judged: it has a
    fourth of the edges, each of which costs a run.
    """
    clean_cache = model.run_with_cache(clean)[1]
    corrupted_cache = model.run_with_cache(corrupted)[1]
    both = model, clean, corrupted
    return {
        "loss": lambda: next_token_loss(model(clean), clean),
        "KL": lambda: kl_divergence(model(clean), model(corrupted), pos=-1),
        "logit difference": lambda: logit_diff(model(clean), 1, 2),
        "gradients": lambda: model.gradient_cache(clean, DIFFERENCE)[0],
        "sweep": lambda: get_act_patch_resid_pre(model, corrupted, clean_cache, DIFFERENCE).values,
        "MLP sweep": lambda: get_act_patch_mlp_out(
            model, corrupted, clean_cache, DIFFERENCE).values,
        "path": lambda: path_patch(*both, ["hook_embed"], ["logits"], DIFFERENCE).values,
        "path matrix": lambda: path_patch_matrix(*both, DIFFERENCE).values,
        "direct": lambda: direct_logit_attribution(model, clean_cache, 1, 2)[0],
        "slopes": lambda: attribution_patching(model, clean, corrupted_cache, DIFFERENCE,
                                               names="z")["z"].values,
        "integrated": lambda: integrated_gradients(model, clean, corrupted_cache, DIFFERENCE,
                                                   steps=2)[0],
        "importance": lambda: head_importance(model, clean, DIFFERENCE).values,
        "gradient importance": lambda: head_importance_gradient(model, clean, DIFFERENCE),
        "pairs": lambda: pairwise_interaction(model, clean, [(0, 0), (1, 0)], DIFFERENCE).values,
        "repair": lambda: self_repair(model, clean, (0, 0), DIFFERENCE).total,
        "mean ablation": lambda: head_importance(model, clean, DIFFERENCE, mode="mean",
                                                 reference=corrupted_cache).values,
        "lens": lambda: logit_lens(model, clean_cache).kl,
        "tuned lens": lambda: fit_tuned_lens(model, corrupted, steps=2).A,
        "decomposition": lambda: decompose_resid(model, clean_cache)[0],
        "full decomposition": lambda: full_decomposition(model, clean_cache)[0],
        "neurons": lambda: stack_neuron_results(model, clean_cache)[0],
        "budget": lambda: norm_budget(model, clean_cache)[0],
        "norms": lambda: resid_norms(model, clean_cache)[0],
        "cosines": lambda: cosine_by_layer(model, clean_cache)[0],
        "effective rank": lambda: effective_rank(model.W_E),
        "participation": lambda: participation_ratio(model.W_U),
        "edges": lambda: circuits.eap(*both, DIFFERENCE).values,
        "ACDC": lambda: circuits.acdc(*both, DIFFERENCE, threshold=1e9).mask.float(),
        "faithfulness": lambda: circuits.faithfulness(
            circuits.Circuit.of(model), *both, metric=DIFFERENCE).mean,
        "edges by Gauss": lambda: circuits.eap(*both, DIFFERENCE, ig_steps=2,
                                               rule="gauss").values,
        **judgements(shallow, clean, corrupted),
        "copying": lambda: ov_eigenvalue_score(model),
        "composition": lambda: composition_scores(model, "K", n_draws=4).z,
        "QK": lambda: qk_circuit(model, 0, 0).svd()[1],
        "OV": lambda: ov_circuit(model, 0, 0).norm(),
        "folding": lambda: torch.tensor(fold_layer_norm(model)[1].log_probs),
        "centring": lambda: torch.tensor(centre_writing_weights(model)[1].log_probs),
        "centring W_U": lambda: torch.tensor(centre_unembed(model)[1].log_probs),
        "value biases": lambda: torch.tensor(fold_value_biases(model)[1].log_probs),
    }


def judgements(model, clean, corrupted):
    """{name: a call of every function that judges circuits}, of some edges of a model."""
    if len(clean) > 1:  # as many as a test of independence needs
        clean, corrupted = torch.cat([clean, corrupted]), torch.cat([corrupted, (clean + 2) % 11])
    run = circuits.CircuitRun(model, clean, corrupted, DIFFERENCE)
    scores = circuits.eap(model, clean, corrupted, DIFFERENCE)
    half = scores.circuit(max(1, len(run.full) // 2))
    few = {"alpha": 0.2, "n_draws": 5}  # the fewest draws that give a p-value below 0.2
    others = evaluation.random_circuits(half, 5)
    return {
        "curve": lambda: evaluation.faithfulness_curve(run, evaluation.ranked_edges(scores)).mean,
        "ACDC's ranking": lambda: evaluation.faithfulness_curve(
            run, evaluation.acdc_ranking(run, [0.1])).mean,
        "equivalence": lambda: torch.tensor(evaluation.equivalence_test(run, half).p_value),
        "independence": lambda: torch.tensor(evaluation.independence_test(run, half).p_value),
        "minimality": lambda: evaluation.minimality_test(run, half, **few).p_values,
        "sufficiency": lambda: torch.tensor(
            evaluation.sufficiency_test(run, half, others=others, alpha=0.2).p_value),
        "necessity": lambda: torch.tensor(
            evaluation.necessity_test(run, half, others=others, alpha=0.2).p_value),
        "ACDC's orders": lambda: evaluation.circuit_stability(
            evaluation.acdc_over_orders(run, 0.1, n_orders=2)).pairwise,
        "stability": lambda: evaluation.bootstrap_stability(scores, len(half), n_draws=5).pairwise,
        "subsets": lambda: evaluation.all_subsets(run, half.edges()[:2]).mean,
        "report": lambda: torch.tensor(
            [test.p_value for test in evaluation.evaluate_circuit(
                run, half, n_random=5, **few).tests.values()]),
    }


@pytest.mark.parametrize("kind", MODELS)
def test_every_analysis_works_on_every_kind_of_model_or_says_in_one_line_why_not(kind):
    changes, dtype, shape = MODELS[kind]
    model = tiny_model(dtype=dtype, **changes)
    shallow = tiny_model(dtype=dtype, **{"n_layers": 1} | changes)
    clean, corrupted = prompts(shape)
    refused = set()
    for name, call in analyses(model, shallow, clean, corrupted).items():
        try:
            found = call()
        except UserError as problem:
            refused.add(name)
            assert "\n" not in str(problem), name
            continue
        if not (kind == "one token" and name == "copying"):
            assert found.isfinite().all(), f"{name} is not finite"
    most = {"no layers": 24, "no MLP": 2, "no LayerNorm": 2, "one token": 1, "one prompt": 3,
            "classifier": 2, "more logits than tokens": 1}
    assert len(refused) <= most.get(kind, 0), refused


def test_ids_of_outputs_are_counted_in_d_vocab_out():
    clean, corrupted = prompts((2, 6))
    for d_vocab_out in (4, 13):  # fewer and more than the 11 tokens
        model = tiny_model(d_vocab_out=d_vocab_out)
        cache = model.run_with_cache(clean)[1]
        takers = {
            "sweep": lambda id, model=model, cache=cache: get_act_patch_resid_pre(
                model, corrupted, cache, Metric.logit_diff(id, 0)).values,
            "importance": lambda id, model=model: head_importance(
                model, clean, Metric.logit_diff(id, 0)).values,
            "direct": lambda id, model=model, cache=cache: direct_logit_attribution(
                model, cache, id, 0)[0],
            "lens": lambda id, model=model, cache=cache: logit_lens(model, cache, targets=id).kl,
            "chosen logits": lambda id, model=model, cache=cache: model.unembed(
                cache["resid_post", -1], [id]),
        }
        for name, take in takers.items():
            assert take(d_vocab_out - 1).isfinite().all(), name
            assert str(d_vocab_out) in refusal(partial(take, d_vocab_out), name), name
        lens = logit_lens(model, cache, top_k=d_vocab_out)
        assert torch.equal(lens.top_tokens.sort().values[0, 0, 0], torch.arange(d_vocab_out))


@pytest.mark.parametrize("d_vocab_out", [4, 13])
def test_what_needs_the_logits_of_tokens_refuses_other_logits_and_says_why(tmp_path, d_vocab_out):
    model, tokenizer = tiny_model(d_vocab_out=d_vocab_out), CharTokenizer().fit("abcdefghijk")
    tokens = prompts((2, 6))[0]
    cache = model.run_with_cache(tokens)[1]
    save_checkpoint(tmp_path / "mine" / "checkpoint.pt", as_run(model, tokenizer))
    run = {"run_name": "mine", "out_dir": str(tmp_path)}
    for name, call in {
        "generation": lambda: list(generate(model, tokens, SamplingConfig())),
        "the loss of a text": lambda: head_importance(model, tokens),
        "copying": lambda: ov_eigenvalue_score(model),
        "words of directions": lambda: svd_vocab(model, 0, 0, tokenizer),
        "a word's logit": lambda: direct_logit_attribution(model, cache, "a", tokenizer=tokenizer),
        "a word as target": lambda: logit_lens(model, cache, targets="a", tokenizer=tokenizer),
        "likely words": lambda: logit_lens(model, cache).likeliest_words(tokenizer),
        "a scan": lambda: report_scan(model),
        "a page": lambda: choose_subjects(AttentionConfig(**run), tmp_path),
        "a comparison": lambda: load_compared("mine", str(tmp_path)),
        "dictionaries": lambda: run_subjects("mine", None, str(tmp_path)),
        "rankings": lambda: subject_of_run(ImportanceConfig(**run)),
    }.items():
        assert "d_vocab_out" in refusal(call, name), name


def test_in_half_precision_every_number_is_near_that_of_float32():
    clean, corrupted = prompts((2, 6))
    exact = tiny_model()
    for dtype, within in ((torch.float16, 0.02), (torch.bfloat16, 0.12)):
        half = copy.deepcopy(exact).to(dtype)
        found, wanted = (analyses(model, model, clean, corrupted) for model in (half, exact))
        for name in ("loss", "KL", "sweep", "direct", "importance", "lens", "copying", "budget"):
            a, b = found[name]().double(), wanted[name]().double()
            assert (a - b).abs().max() <= within * b.abs().max(), f"{name} in {dtype}"


def test_statistics_that_overflow_float16_are_taken_in_float32():
    model = tiny_model(dtype=torch.float16)
    with torch.no_grad():
        model.W_pos[0, 5] = 600.0  # its square is beyond 65,504
        tokens = prompts((2, 6))[0]
        plain = model(tokens)
        cached, cache = model.run_with_cache(tokens)
    assert cache["scale", 0, "ln1"].isfinite().all()
    assert (plain - cached).abs().max() < 0.02 * plain.abs().max()


# Losses


def test_ignored_targets_do_not_count():
    logits = torch.randn(4, 8, 10, generator=seeded_generator(0), requires_grad=True)
    targets = torch.randint(10, (4, 8), generator=seeded_generator(1))
    targets[:2, :7] = IGNORED
    counts = targets != IGNORED
    each = per_token_loss(logits, targets)
    assert (each[~counts] == 0).all()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_close(cross_entropy(logits, targets), expected)
    assert_close(cross_entropy(logits[counts], targets[counts]), expected)
    slope = torch.autograd.grad(cross_entropy(logits, targets), logits)[0]
    assert (slope[~counts] == 0).all()
    assert cross_entropy(logits, torch.full_like(targets, IGNORED)) == 0


def test_losses_of_half_precision_are_taken_in_float32():
    logits = torch.randn(8, 16, 500, generator=seeded_generator(0)).bfloat16()
    other = (logits + 0.05 * torch.randn(8, 16, 500, generator=seeded_generator(1))).bfloat16()
    tokens = torch.randint(500, (8, 16), generator=seeded_generator(2))
    assert_close(next_token_loss(logits, tokens), next_token_loss(logits.float(), tokens))
    assert kl_divergence(logits, other).min() >= 0


def test_logits_of_other_texts_are_refused():
    logits = torch.zeros(4, 8, 10)
    for tokens in (torch.zeros(1, 8), torch.zeros(4, 7), torch.zeros(8)):
        told = refusal(lambda tokens=tokens: next_token_loss(logits, tokens.long()))
        assert str(list(tokens.shape)) in told
    assert "[4, 7]" in refusal(lambda: per_token_loss(logits, torch.zeros(4, 7).long()))


# What does not belong together


def test_a_cache_of_another_model_is_refused_wherever_one_is_taken():
    model, other = tiny_model(), tiny_model(n_layers=3)
    clean, corrupted = prompts((2, 6))
    foreign = other.run_with_cache(clean)[1]
    takers = {
        "sweep": lambda cache: get_act_patch_resid_pre(model, corrupted, cache, DIFFERENCE),
        "slopes": lambda cache: attribution_patching(model, corrupted, cache, DIFFERENCE),
        "lens": lambda cache: logit_lens(model, cache),
        "decomposition": lambda cache: decompose_resid(model, cache),
        "ablation": lambda cache: ablate_heads(model, [(0, 0)], "mean", reference=cache),
    }
    for cache in (foreign, dict(foreign)):
        for name, take in takers.items():
            assert "cache" in refusal(partial(take, cache), name), name


def test_a_metric_that_is_not_a_number_decides_nothing():
    model = tiny_model()
    both = prompts((2, 6))
    nan = Metric(lambda logits: logits[..., -1, 0] * float("nan"))
    assert "nan" in refusal(lambda: circuits.acdc(model, *both, nan, threshold=0.1))
    assert "finite" in refusal(lambda: circuits.eap(model, *both, nan).circuit(3))


def test_weights_that_are_not_finite_never_reach_lapack():
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].attn.W_V[0, 0, 0] = float("nan")
    for call in (lambda: ov_eigenvalue_score(model), lambda: composition_scores(model, "V"),
                 lambda: ov_circuit(model, 1, 0).svd(),
                 lambda: effective_rank(model.blocks[1].attn.W_V)):
        assert "finite" in refusal(call) or "NaN" in refusal(call)


def test_impossible_settings_are_refused():
    model = tiny_model()
    for lr in (-0.1, 0.0, float("nan"), float("inf")):
        told = refusal(lambda lr=lr: fit_tuned_lens(model, prompts((2, 6))[0], lr=lr))
        assert f"lr={lr}" in told
    assert "n_draws=1" in refusal(lambda: composition_scores(model, "K", n_draws=1))
    X, y = torch.randn(20, 3, generator=seeded_generator(0)), [0, 1] * 10
    for l2 in (-1.0, float("nan"), float("inf")):
        for fit in (fit_probe, mdl_online):
            assert f"l2={l2}" in refusal(lambda fit=fit, l2=l2: fit(X, y, l2=l2))


def test_labels_of_a_probe_may_be_texts():
    X, y = torch.randn(20, 3, generator=seeded_generator(0)), [0, 1] * 10
    named = fit_probe(X, ["cat" if label == 0 else "dog" for label in y])
    plain = fit_probe(X, y)
    assert torch.equal(named.W, plain.W) and torch.equal(named.predict(X), plain.predict(X))


# What people type who know TransformerLens


def test_the_message_on_a_name_of_transformer_lens_has_ours():
    model = tiny_model()
    tokens = prompts((2, 6))[0]
    cache = model.run_with_cache(tokens)[1]
    for owner, name, instead in (
        (model.embed, "W_E", "model.W_E"), (model.unembed, "W_U", "model.W_U"),
        (model, "add_hook", "model.hooks"), (model, "reset_hooks", "with"),
        (model, "hook_dict", "hook_points"), (model, "to_tokens", "tokenizer.encode"),
        (cache, "decompose_resid", "residual_stream_analysis.decompose_resid"),
        (cache, "accumulated_resid", "accumulated_resid(model, cache)"),
        (cache, "stack_head_results", "stack_head_results(model, cache)"),
        (cache, "logit_attrs", "direct_logit_attribution"),
    ):
        assert instead in refusal(lambda owner=owner, name=name: getattr(owner, name)), name
        assert not hasattr(owner, name), name
    for argument, instead in (("return_type", "losses"), ("stop_at_layer", "run_blocks"),
                              ("bwd_hooks", "gradient_cache"), ("nonsense", "key_mask")):
        how = {argument: None}
        assert instead in refusal(lambda how=how: model.run_with_cache(tokens, **how)), argument
    assert isinstance(copy.copy(cache), ActivationCache)


def test_a_second_thread_is_refused_while_hooks_are_open():
    model = tiny_model()
    tokens = prompts((2, 6))[0]
    told = []

    def listen():
        told.append(refusal(lambda: model.run_with_cache(tokens)))

    with model.hooks([("hook_embed", lambda resid, hook: None)]):
        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
        model.run_with_cache(tokens)  # the first one may go on
    assert "hook_embed" in told[0] and "thread" in told[0]
    thread = threading.Thread(target=model.run_with_cache, args=(tokens,))
    thread.start()
    thread.join()


# torch.func


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_jacobians_gradients_for_each_prompt_and_hessians_work():
    model = tiny_model(dtype=torch.float64)
    tokens = prompts((3, 6))[0]
    weights = dict(model.named_parameters())

    def loss(weights, row):
        logits = functional_call(model, weights, (row[None],))
        return cross_entropy(logits[:, :-1], row[None, 1:])

    each = vmap(grad(loss), (None, 0))(weights, tokens)
    for row in range(3):
        own = torch.autograd.grad(loss(weights, tokens[row]), list(weights.values()))
        for name, expected in zip(weights, own, strict=True):
            assert_close(each[name][row], expected, msg=lambda text, name=name: f"{name}: {text}")

    resid = model.embed(tokens[:1]).detach()
    block = model.blocks[0]
    slope = jacrev(lambda resid: block(resid).sum((0, 1)))(resid)  # [d_model, 1, pos, d_model]
    own = torch.autograd.functional.jacobian(lambda resid: block(resid).sum((0, 1)), resid)
    assert_close(slope, own)

    direction = torch.randn(resid.shape, generator=seeded_generator(0)).double()

    def energy(resid):
        return block(resid).pow(2).sum()

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        product = jvp(grad(energy), (resid,), (direction,))[1]
        step = 1e-5 * direction
        expected = (grad(energy)(resid + step) - grad(energy)(resid - step)) / 2e-5
    assert_close(product, expected, atol=1e-6, rtol=1e-6)
