"""The labs: what replaces the library's part, or measures it, is what its formula says; claims can
fail."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import TINY, quick_run, scramble_, tiny_model, tiny_tokens
from torch.testing import assert_close

import corpus
from attention import GrowingPast
from config import DataConfig, ModelConfig, TrainConfig
from course.labs import entropy, layernorm_order, regularisation
from course.labs import rotary_positions as positions
from data import load_dataset
from experiments.common import Trainings
from model import GPT
from positions import pad_left
from tokenizer import WordTokenizer
from utils import seeded_generator


def normal(*shape, seed=0):
    """A random tensor."""
    return torch.randn(*shape, generator=seeded_generator(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def dataset():
    """The text that the labs train on."""
    return load_dataset(DataConfig(dataset="builtin", tokenizer="word"), positions.READ)


# positions


def rotary_model(**changes):
    """A tiny scrambled model with rotary positions."""
    cfg = ModelConfig(**TINY | {"d_model": 12, "n_heads": 3} | changes)
    return scramble_(positions.build_model("rotary", cfg, seed=0)).eval()


def test_rotate_is_a_two_by_two_rotation_of_each_pair():
    vectors = normal(2, 5, 3, 6)
    turned = positions.rotate(vectors, torch.tensor([0, 1, 2, 7, 100]))
    for i, pos in enumerate((0, 1, 2, 7, 100)):
        for pair in range(3):
            angle = pos / 10_000 ** (2 * pair / 6)
            matrix = torch.tensor([[math.cos(angle), -math.sin(angle)],
                                   [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
            part = slice(2 * pair, 2 * pair + 2)
            expected = vectors[:, i, :, part] @ matrix.T
            assert_close(turned[:, i, :, part], expected, rtol=0, atol=1e-5)


def test_a_rotary_score_depends_on_the_distance_only():
    q, k = normal(1, 1, 2, 8), normal(1, 1, 2, 8, seed=1)

    def score(query_pos, key_pos):
        turned = [positions.rotate(each, torch.tensor([pos]))
                  for each, pos in ((q, query_pos), (k, key_pos))]
        return (turned[0] * turned[1]).sum(-1)

    assert_close(score(5, 2), score(105, 102), rtol=0, atol=1e-4)
    assert_close(score(7, 7), (q * k).sum(-1), rtol=0, atol=1e-6)  # distance 0: not turned
    assert (score(5, 2) - score(5, 3)).abs().max() > 0.01
    assert (score(5, 2) - score(2, 5)).abs().max() > 0.01


def test_rotary_scores_are_those_of_a_loop_and_the_fused_kernel_agrees():
    model = rotary_model(n_layers=1)
    tokens = tiny_tokens()
    logits = model(tokens)
    explicit, cache = model.run_with_cache(tokens)
    assert_close(explicit, logits, rtol=0, atol=1e-5)

    q, k = cache["q", 0], cache["k", 0]  # before they are turned
    for query in range(tokens.shape[1]):
        for key in range(query + 1):
            scores = 0
            for pair in range(2):
                x, y = q[:, query, :, 2 * pair], q[:, query, :, 2 * pair + 1]
                u, v = k[:, key, :, 2 * pair], k[:, key, :, 2 * pair + 1]
                angle = (query - key) / 10_000 ** (2 * pair / 4)
                scores = scores + (x * u + y * v) * math.cos(angle)
                scores = scores + (x * v - y * u) * math.sin(angle)
            found = cache["attn_scores", 0][:, :, query, key]
            assert_close(found, scores / 2, rtol=0, atol=1e-5)


def test_with_angles_of_zero_the_rotary_model_has_no_positions(monkeypatch):
    rotary = rotary_model()
    none = GPT(replace(rotary.cfg, positions="none"), seed=None)
    none.load_state_dict(rotary.state_dict())
    tokens = tiny_tokens()
    assert (rotary(tokens) - none(tokens)).abs().max() > 0.01
    monkeypatch.setattr(positions, "rotate", lambda vectors, pos: vectors)
    assert torch.equal(rotary(tokens), none(tokens))


def test_a_rotary_model_decodes_with_a_cache_and_reads_padded_prompts_as_alone():
    model = rotary_model()
    prompt = [1, 5, 2, 8]
    alone = model(torch.tensor([prompt]))[0]
    past = [GrowingPast(model.cfg.n_ctx) for _ in model.blocks]
    with torch.no_grad():
        for pos, token in enumerate(prompt):
            resid = model.run_blocks(model.embed(torch.tensor([[token]])), past=past)
            assert_close(model.unembed(resid)[0, 0], alone[pos], rtol=0, atol=1e-5)
    tokens, key_mask = pad_left([[3, 1, 4, 1, 5, 9], prompt])
    assert_close(model(tokens, key_mask)[1, -4:], alone, rtol=0, atol=1e-5)


def test_every_kind_of_positions_begins_with_the_same_weights_elsewhere():
    cfg = ModelConfig(**TINY)
    none = positions.build_model("none", cfg, 3)
    rotary = positions.build_model("rotary", cfg, 3)
    for name, weight in none.state_dict().items():
        assert torch.equal(weight, rotary.state_dict()[name]), name


def test_far_keys_are_hidden_and_near_ones_are_not(monkeypatch):
    monkeypatch.setattr(positions, "TRAINED", 3)
    model = tiny_model(n_layers=1)
    tokens = tiny_tokens()
    hooks = [("blocks.0.attn.hook_attn_scores", positions.hide_far_keys)]
    changed = tokens.clone()
    changed[:, 1] = (changed[:, 1] + 1) % TINY["d_vocab"]
    before, after = (model.run_with_hooks(each, hooks) for each in (tokens, changed))
    same = (before - after).abs().amax((0, 2)) < 1e-6
    assert same.tolist() == [True, False, False, False, True, True, True]
    assert_close(before[:, :3], model(tokens)[:, :3], rtol=0, atol=1e-5)


def test_the_best_possible_predictor_has_no_excess_loss(dataset):
    tokens, log_probs = positions.unseen_windows(dataset)
    assert len(tokens) > 100 and (tokens[:, 0] == dataset.tokenizer.ids["\n"]).all()

    class Best:
        """Gives each right token its true probability, and one other the rest."""

        def run_with_hooks(self, inputs, hooks):
            probs = torch.full((*inputs.shape, dataset.tokenizer.d_vocab), 1e-30)
            true = log_probs[:, 1:].exp()[..., None]
            other = (tokens[:, 1:, None] + 1) % dataset.tokenizer.d_vocab
            return probs.scatter(-1, other, 1 - true + 1e-30).scatter(
                -1, tokens[:, 1:, None], true).log()

    excess = positions.excess_by_position(Best(), tokens, log_probs)
    assert_close(excess, torch.zeros(positions.READ), rtol=0, atol=1e-5)


def steps_of(early, late):
    """Excess losses: one number within the trained length, another beyond it."""
    return [early] * positions.TRAINED + [late] * (positions.READ - positions.TRAINED)


def position_seeds(**late):
    """What a seed measures as the lab expects it, except for some numbers beyond the length."""
    numbers = {"learned": (1.5, 1.0), "sinusoidal": (1.2, 0.9), "rotary": (0.6, 0.3),
               "none": (0.6, 0.5), "long": (0.3, 0.3)} | late
    within = {"none": 0.4} | {name: 0.3 for name in numbers if name != "none"}
    names = {name: positions.LONG if name == "long" else name for name in numbers}
    return [{names[name]: {"all": steps_of(within[name], both[0]),
                           "near": steps_of(within[name], both[1])}
             for name, both in numbers.items()}]


def verdicts(claims):
    """The verdicts of the claims that are judged."""
    return [line.holds for line in claims if line.verdict]


def test_claims_on_positions_hold_where_they_should_and_fail_one_by_one():
    assert verdicts(positions.claims_of(position_seeds())) == [True] * 7
    as_rotary = position_seeds()[0]["rotary"]
    for place, seeds in enumerate((
            position_seeds(learned=(0.85, 1.0)), position_seeds(rotary=(0.35, 0.3)),
            position_seeds(rotary=(1.3, 0.3)), position_seeds(rotary=(0.6, 0.6)),
            position_seeds(learned=(1.5, 0.5)), position_seeds(long=(0.5, 0.3)),
            [position_seeds()[0] | {"none": as_rotary}])):
        found = verdicts(positions.claims_of(seeds))
        assert found == [i != place for i in range(7)], f"case {place}"
    assert not verdicts(positions.claims_of(position_seeds(), judged=False))


def test_claims_on_positions_fail_for_untrained_models(dataset):
    windows = positions.unseen_windows(dataset)
    cfg = ModelConfig(n_layers=1, d_model=12, n_ctx=positions.READ,
                      d_vocab=dataset.tokenizer.d_vocab)
    seed = {}
    for name in (*positions.KINDS, positions.LONG):
        kind = name if name in positions.KINDS else "learned"
        excess = positions.excess_by_position(positions.build_model(kind, cfg, 0), *windows)
        seed[name] = {"all": excess.tolist(), "near": excess.tolist()}
    found = verdicts(positions.claims_of([seed]))
    # learned fails, rotary / learned, learned with near words, and the cost of no positions
    assert [found[i] for i in (0, 2, 4, 6)] == [False] * 4


# layernorm_order


def layer_norm(x, norm):
    """LayerNorm, written out."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.w + norm.b


def post_model(writes="small", **changes):
    """A tiny scrambled post-LN model."""
    cfg = ModelConfig(**TINY | changes)
    return scramble_(layernorm_order.build_model("post", writes, cfg, seed=0)).eval()


def test_a_post_block_is_its_formula_written_out():
    model = post_model()
    tokens = tiny_tokens()
    resid = model.W_E[tokens] + model.W_pos[: tokens.shape[1]]
    for block in model.blocks:
        resid = layer_norm(resid + block.attn(resid, resid, resid), block.ln1)
        resid = layer_norm(resid + block.mlp(resid), block.ln2)
    assert_close(model(tokens), resid @ model.W_U, rtol=0, atol=1e-5)


def test_the_stream_of_a_fresh_post_model_has_mean_zero_and_size_one():
    model = layernorm_order.build_model("post", "plain", ModelConfig(**TINY), seed=0)
    _, cache = model.run_with_cache(tiny_tokens())
    for layer in range(model.cfg.n_layers):
        for name in ("resid_mid", "resid_post"):
            resid = cache[name, layer]
            assert resid.mean(-1).abs().max() < 1e-5, name
            assert_close(resid.std(-1, correction=0), torch.ones(2, 7), rtol=0, atol=0.05)


def test_the_pre_model_with_small_writes_is_the_library_s():
    cfg = ModelConfig(**TINY)
    own, library = layernorm_order.build_model("pre", "small", cfg, 4), GPT(cfg, 4)
    assert torch.equal(own(tiny_tokens()), library(tiny_tokens()))


def test_plain_writes_are_as_large_as_the_other_matrices_at_any_depth():
    for n_layers in (2, 8):
        cfg = ModelConfig(n_layers=n_layers, n_heads=4, d_model=64, d_vocab=11)
        for order in ("pre", "post"):
            block = layernorm_order.build_model(order, "plain", cfg, 0).blocks[-1]
            for write in (block.attn.W_heads_out, block.mlp.W_out):
                assert_close(write.std(), block.mlp.W_in.std(), rtol=0.05, atol=0)


def test_a_step_of_size_zero_has_no_effect_and_a_larger_one_has_more():
    cfg = ModelConfig(**TINY)
    batch = tiny_tokens(seed=5), tiny_tokens(seed=6)
    effects = [layernorm_order.effect_of_a_step_(
        layernorm_order.build_model("post", "plain", cfg, 0), batch,
        TrainConfig(optimizer="adamw", lr=lr)) for lr in (1e-12, 1e-4, 1e-3)]
    assert abs(effects[0]) < 1e-7 and 0 < 10 * effects[1] < effects[2]


def layernorm_seeds(excess=None, gradient=None, effect=None):
    """What a seed measures as the lab expects it, except for some numbers."""
    excess = {"pre": 0.7, "post": 2.8, "post, warm-up": 1.0, "post, small writes": 0.6,
              "pre, 2 layers": 0.7, "post, 2 layers": 0.6} | (excess or {})
    gradient = {"post": 2.3, "post, small writes": 2.4} | (gradient or {})
    effect = {"post": 6.0, "post, small writes": 0.6} | (effect or {})
    return [{name: {"excess": value, "gradients": [5.0, gradient.get(name, 1.0)],
                    "effect": effect.get(name, 1.0)} for name, value in excess.items()}]


def test_claims_on_layernorm_hold_where_they_should_and_fail_one_by_one():
    claims_of = layernorm_order.claims_of
    assert verdicts(claims_of(layernorm_seeds())) == [True] * 7
    for place, case in enumerate((
            {"excess": {"post": 1.6}}, {"excess": {"post, 2 layers": 2.8}},
            {"excess": {"post, small writes": 2.8}},
            {"gradient": {"post": 1.0}}, {"gradient": {"post, small writes": 1.0}},
            {"effect": {"post": 2.0}}, {"effect": {"post, small writes": 6.0}})):
        found = verdicts(claims_of(layernorm_seeds(**case)))
        assert found[place] is False and sum(found) >= 5, case
    assert not verdicts(claims_of(layernorm_seeds(), judged=False))


def test_claims_on_layernorm_fail_if_post_is_pre(dataset):
    """With the library's block in the place of both, nothing tells them apart."""
    cfg = layernorm_order.LayerNormConfig()
    dataset = replace(dataset, val=dataset.val[:600], floor=replace(
        dataset.floor, log_probs=dataset.floor.log_probs[:600],
        categories=dataset.floor.categories[:600]))
    how = TrainConfig(max_steps=2, batch_size=2, optimizer="adamw")
    seed = {}
    for name, (_, writes, _, warmup_steps) in layernorm_order.subjects_of(cfg).items():
        seed[name] = layernorm_order.measure_model(
            ("pre", writes, 2, warmup_steps), how, 0, dataset, Trainings([2] * 6), name)
    found = verdicts(layernorm_order.claims_of([seed]))
    assert [found[i] for i in (0, 3, 5)] == [False] * 3


# entropy


def test_the_sharpness_of_a_head_is_that_of_a_loop_over_its_queries():
    model, tokens = tiny_model(), tiny_tokens()
    _, cache = model.run_with_cache(tokens)
    expected = []
    for layer in range(2):
        for head in range(3):
            found, even = 0, 0
            for row in range(len(tokens)):
                for query in range(tokens.shape[1]):
                    for key in range(query + 1):
                        p = cache["pattern", layer][row, head, query, key].item()
                        found -= p * math.log(p)
                    even += math.log(query + 1)
            expected.append(1 - found / even)
    look = entropy.look_at_heads(model, tokens)
    assert look["sharpness"] == pytest.approx(expected, abs=1e-5)


def test_a_silenced_head_stays_as_sharp_and_an_even_one_has_sharpness_zero():
    model, tokens = tiny_model(), tiny_tokens()
    before = entropy.look_at_heads(model, tokens)
    with torch.no_grad():
        model.blocks[1].attn.W_O[2] = 0
        model.blocks[1].attn.W_Q[0] = 0
        model.blocks[1].attn.b_Q[0] = 0
    after = entropy.look_at_heads(model, tokens)
    assert after["effect"][5] == 0 and abs(before["effect"][5]) > 1e-3
    assert after["sharpness"][5] == pytest.approx(before["sharpness"][5])
    assert after["sharpness"][3] == pytest.approx(0, abs=1e-5) and before["sharpness"][3] > 0.01


def test_words_in_random_order_are_the_same_words():
    texts = entropy.make_texts(n_windows=4)
    (tokens, held, n_words), (shuffled, shuffled_held, _) = texts.values()
    for one, other in ((tokens, shuffled), (held.flatten(), shuffled_held.flatten())):
        assert torch.equal(one.bincount(minlength=n_words), other.bincount(minlength=n_words))

    def distinct_pairs(ids):
        return len((ids[:-1] * n_words + ids[1:]).unique())

    assert distinct_pairs(shuffled) > 3 * distinct_pairs(tokens)  # no grammar is left
    windows = tokens.unfold(0, held.shape[1], 1)
    assert not any((windows == row).all(1).any() for row in held)  # unseen in training


def looks_of(late=(), shuffled=(), early=()):
    """What the lab expects to see of one seed, {kind: [look]}, except for some numbers."""
    start = {"step": 0, "loss": 4.0, "sharpness": [0.0, 0.0], "effect": [0.0, 0.0]}
    middle = {"step": 50, "loss": 1.5, "sharpness": [0.01, 0.02], "effect": [0.08, 0.0]}
    end = {"step": 500, "loss": 1.0, "sharpness": [0.4, 0.3], "effect": [0.1, 0.3]}
    other = {"step": 500, "loss": 3.7, "sharpness": [0.25, 0.0], "effect": [0.001, 0.0]}
    return {"text": [start, middle | dict(early), end | dict(late)],
            "random order": [start, other | dict(shuffled)]}


def test_claims_on_entropy_hold_where_they_should_and_fail_one_by_one():
    assert verdicts(entropy.claims_of([looks_of()])) == [True] * 4
    for place, seed in enumerate((
            looks_of(early={"sharpness": [0.04, 0.04]}), looks_of(early={"effect": [0.02, 0.0]}),
            looks_of(shuffled={"sharpness": [0.05, 0.0]}),
            looks_of(shuffled={"effect": [-0.02, 0.0]}))):
        found = verdicts(entropy.claims_of([looks_of(), seed]))
        assert found == [i != place for i in range(4)], f"case {place}"
    assert not verdicts(entropy.claims_of([looks_of()], judged=False))


def test_claims_on_entropy_fail_for_untrained_models():
    looks = [entropy.look_at_heads(GPT(ModelConfig(**TINY), seed=0), tiny_tokens()) | {"step": step}
             for step in (0, 500)]
    found = verdicts(entropy.claims_of([{"text": looks, "random order": looks}]))
    assert found == [False, False, False, True]  # only "no effect on words in random order" holds


def test_what_is_read_off_the_looks_of_a_training():
    looks = looks_of()["text"]
    assert entropy.sharpening_done(looks, 0.8) == pytest.approx(0.03 / 0.7)
    assert entropy.sharpening_done(looks, 0.9) == pytest.approx(1)
    assert entropy.largest_effect(looks, 0.05) == 0.08 and entropy.largest_effect(looks) == 0.3
    assert entropy.largest_effect(looks[:0]) == 0
    assert entropy.first_sharp(looks)["step"] == 500
    assert entropy.rank_correlation(looks[-1]) == pytest.approx(-1)


# regularisation


def test_the_gap_of_a_uniform_guess_is_the_log_of_the_vocabulary_minus_the_entropy():
    stories = regularisation.draw_stories(5, 0, WordTokenizer().fit(corpus.text(100_000)))
    model = GPT(ModelConfig(**TINY | {"d_vocab": 60}), seed=0)
    with torch.no_grad():
        model.unembedding.W_U.zero_()
    entropy_of_text = -stories.floor.log_probs[1:].mean().item()
    assert stories.gap(model) == pytest.approx(math.log(60) - entropy_of_text, abs=1e-5)
    more = regularisation.draw_stories(8, 0, WordTokenizer().fit(corpus.text(100_000)))
    assert torch.equal(more.tokens[: len(stories.tokens)], stories.tokens)


class Scripted:
    """Stories whose gap was decided beforehand: one number a look."""

    def __init__(self, gaps):
        self.gaps = iter(gaps)
        self.tokens = tiny_tokens(1, 60)[0]

    def gap(self, model):
        return next(self.gaps)


def measure_scripted(stop, new, dropout=0.0):
    """The measures of a tiny training with these gaps."""
    texts = {"few": Scripted([-0.5]), "stop": Scripted(stop), "new": Scripted(new)}
    how = TrainConfig(max_steps=regularisation.LOOKS, batch_size=2)
    trainings = Trainings([how.max_steps])
    trainings.begin("tiny")
    model = GPT(ModelConfig(**TINY, dropout=dropout), seed=0)
    return regularisation.measure_training(model, how, texts, "few", trainings), model


def test_early_stopping_looks_at_its_own_stories_and_is_judged_on_others():
    stop = [3, 2, 1, 2, 3, 4, 5, 6, 7, 8]
    new = [9, 8, 7, 6, 5, 6, 7, 8, 9, 10]
    found, _ = measure_scripted(stop, new)
    assert found["stopped"] == 7  # not 5, the lowest on the new stories
    assert found["last"] == 10 and found["own"] == -0.5
    assert found["new"] == new and found["steps"] == list(range(1, 11))


def test_a_training_with_dropout_is_the_same_again():
    first, again = (measure_scripted([1] * 10, [1] * 10, dropout=0.5)[1] for _ in range(2))
    assert torch.equal(first.W_E, again.W_E)
    without = measure_scripted([1] * 10, [1] * 10)[1]
    assert (first.W_E - without.W_E).abs().max() > 1e-3


def regularisation_seed(few=None, many=None):
    """What a seed measures as the lab expects it, except for some numbers."""
    def measures(last, stopped, own, decay, dropout):
        other = {"stopped": 0.5, "own": 0.5}
        return {"nothing": {"last": last, "stopped": stopped, "own": own},
                "weight decay": {"last": decay} | other, "dropout": {"last": dropout} | other}

    return {"few": measures(**{"last": 1.5, "stopped": 0.7, "own": -0.4, "decay": 0.8,
                               "dropout": 0.6} | (few or {})),
            "many": measures(**{"last": 0.4, "stopped": 0.4, "own": 0.4, "decay": 0.5,
                                "dropout": 0.55} | (many or {}))}


def test_claims_on_regularisation_hold_where_they_should_and_fail_one_by_one():
    claims_of, seed = regularisation.claims_of, regularisation_seed
    assert verdicts(claims_of([seed()])) == [True] * 7
    for place, case in enumerate((
            {"few": {"own": -0.1}}, {"few": {"stopped": 1.1}}, {"few": {"decay": 1.1}},
            {"few": {"dropout": 1.1}}, {"many": {"stopped": 0.38}}, {"many": {"decay": 0.39}},
            {"many": {"dropout": 0.39}})):
        found = verdicts(claims_of([seed(), seed(**case)]))
        assert found == [i != place for i in range(7)], f"case {place}"
    assert not verdicts(claims_of([seed()], judged=False))


def test_claims_on_regularisation_fail_where_few_stories_are_as_good_as_many():
    many = regularisation_seed()["many"]
    found = verdicts(regularisation.claims_of([{"few": many, "many": many}]))
    assert True not in found[:4], found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_trainings"), [
    ("rotary_positions", 5), ("layernorm_order", 6), ("entropy", 2), ("regularisation", 6)])
def test_a_quick_run_of_a_lab_writes_everything_and_gives_the_same_again(
        tmp_path, name, n_trainings):
    printed, result = quick_run(name, tmp_path, n_trainings, at="course/labs")
    assert all(line["verdict"] == "" for line in result["claims"])
    assert (tmp_path / f"{name}_quick" / f"{name}.png").exists() and "nats" in printed
    assert quick_run(name, tmp_path, at="course/labs")[1] == result
