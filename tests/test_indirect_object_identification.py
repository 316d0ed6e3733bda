"""Indirect objects: prompts by the corpus's rules, roles by hand, claims that can fail."""

import copy

import pytest
import torch
from helpers import quick_run, refusal
from torch.testing import assert_close

import corpus
from activation_cache import head_label
from checkpoint import export_pretrained
from config import ModelConfig
from experiments import indirect_object_identification as program
from experiments.indirect_object import measure
from experiments.indirect_object.measure import (
    all_heads,
    changed_inputs,
    copying_shares,
    find_roles,
    lost_without,
    lowered_most,
    measure_gifts,
    measure_strongest,
    raised_giver,
    raised_tokens,
    written_logits,
)
from experiments.indirect_object.model import GiftRecipe, draw_gifts, draw_songs, gift_shape
from experiments.indirect_object.published import (
    NAMES,
    PLACES,
    TEMPLATES,
    THINGS,
    measure_published,
    published_gifts,
)
from experiments.indirect_object.report import (
    chance_of_sets,
    direct_share,
    gift_claims,
    heads_figure,
    shares_of_sets,
    without_strongest,
)
from metrics import logit_diff
from model import GPT
from tokenizer import BPETokenizer, WordTokenizer
from utils import seeded_generator

TOKENIZER = WordTokenizer().fit(corpus.text(20_000))
SHAPE = gift_shape(GiftRecipe(n_layers=2, n_heads=3, d_model=24), TOKENIZER)
GIFTS = draw_gifts(TOKENIZER, 16, 3)
SONGS = draw_songs(TOKENIZER, 16, 3)
N_VERDICTS = 13  # lines that are judged


def shuffled_model(seed=1):
    """A model whose weights, of the size of trained ones, say nothing."""
    model = GPT(SHAPE, seed).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=seeded_generator(seed)))
    return model


@pytest.fixture(scope="module")
def measured():
    """The measures of an untrained model, and of one with shuffled weights."""
    return [measure_gifts(GPT(SHAPE, 0).eval(), GIFTS, SONGS, n_random=20),
            measure_gifts(shuffled_model(), GIFTS, SONGS, n_random=20)]


# Prompts


def test_the_answer_to_a_gift_is_the_one_of_two_who_does_not_give():
    for row, receiver in zip(GIFTS.clean_tokens, GIFTS.receiver, strict=True):
        words = [TOKENIZER.decode([i]) for i in row.tolist()]
        one, two, giver = words[2], words[4], words[10]
        assert giver in (one, two) and len({one, two}) == 2
        assert TOKENIZER.decode([receiver.item()]) == (two if giver == one else one)
    assert (GIFTS.at["IO"] == 2).any() and (GIFTS.at["IO"] == 4).any()  # ABBA and BABA


def test_places_are_where_the_names_stand():
    rows = torch.arange(16)
    for place, ids in (("IO", GIFTS.receiver), ("S1", GIFTS.giver), ("S2", GIFTS.giver)):
        assert_close(GIFTS.clean_tokens[rows, GIFTS.at[place]], ids)
    assert (GIFTS.at["S1"] < GIFTS.at["S2"]).all()
    assert (GIFTS.at["END"] == GIFTS.clean_tokens.shape[1] - 1).all()


def test_a_corrupted_gift_has_three_other_names_and_nothing_else_is_changed():
    differs = GIFTS.clean_tokens != GIFTS.corrupted_tokens
    assert (differs.sum(1) == 3).all()
    for clean, corrupted in zip(GIFTS.clean_tokens, GIFTS.corrupted_tokens, strict=True):
        strangers = corrupted[clean != corrupted].tolist()
        assert len(set(strangers)) == 3 and not set(strangers) & set(clean.tolist())
    once = GIFTS.clean_tokens != GIFTS.tokens_without
    assert_close(once.float().argmax(1), GIFTS.at["S2"])
    assert (once.sum(1) == 1).all()


def test_swapped_names_are_those_of_the_same_two_with_the_other_one_giving():
    rows = torch.arange(16)
    swapped = GIFTS.tokens_swapped
    assert_close(swapped[rows, GIFTS.at["S2"]], GIFTS.receiver)
    assert ((swapped != GIFTS.clean_tokens).sum(1) == 1).all()


def test_a_song_continues_with_the_syllable_that_followed_in_its_first_singing():
    for row, target, source in zip(SONGS.tokens, SONGS.target, SONGS.source, strict=True):
        assert row[source] == target and row[source - 1] == row[-1]


def test_the_log_odds_of_the_two_named_are_counted_by_hand():
    logits = torch.zeros(16, 3, TOKENIZER.d_vocab)
    assert_close(GIFTS.named_metric(logits), torch.full((16,), 2 / 6).log())
    logits[torch.arange(16), -1, GIFTS.giver] = 5.0
    expected = (torch.tensor(5.0).exp() + 1).log() - torch.tensor(6.0).log()
    assert_close(GIFTS.named_metric(logits), expected.expand(16))


# Heads


def test_a_head_wired_to_copy_copies_all_tokens_and_its_negative_suppresses_all():
    model = GPT(ModelConfig(n_layers=1, n_heads=2, d_model=16, d_vocab=8, n_ctx=4, attn_only=True,
                            norm="none"), seed=0).eval()
    attention = model.blocks[0].attn
    with torch.no_grad():
        attention.W_V[:] = torch.linalg.pinv(model.W_E) @ torch.eye(8)  # reads which token it is
        attention.W_O[0] = torch.linalg.pinv(model.W_U)  # says so
        attention.W_O[1] = -attention.W_O[0]
    shares = copying_shares(model, torch.arange(8))
    assert shares["most"].tolist() == [[1, 0]] and shares["least"].tolist() == [[0, 1]]


def test_the_raise_by_a_head_is_the_loss_of_logits_without_its_output_weights():
    model = shuffled_model()
    is_one = torch.zeros(16, 8)
    is_one[:, 0] = 1
    _, cache = model.run_with_cache(GIFTS.clean_tokens)
    ablated = shuffled_model()
    with torch.no_grad():
        ablated.blocks[1].attn.W_O[2] = 0
        scale = {}
        hook = ("ln_final.hook_scale", lambda s, hook: scale.setdefault("own", s.clone()))
        whole = model.run_with_hooks(GIFTS.clean_tokens, [hook])[:, -1, GIFTS.names]
        less = ablated.run_with_hooks(
            GIFTS.clean_tokens,
            [("ln_final.hook_scale", lambda s, hook: scale["own"])])[:, -1, GIFTS.names]
        found = raised_tokens(model, cache, GIFTS.names, is_one)[1, 2]
    words = whole - less
    assert_close(found, (words[:, 0] - words[:, 1:].mean(1)).mean(), rtol=1e-4, atol=1e-5)


def test_roles_are_given_by_what_a_head_does_wherever_it_looks():
    blank = {"direct": 0.0, "raises": 0.0, "lowers": 0.0, "once": -1.0}
    heads = [blank | {"head": (0, 0), "direct": -3.0}, blank | {"head": (0, 1), "lowers": 0.6},
             blank | {"head": (0, 2), "lowers": 0.9, "once": -0.05},
             blank | {"head": (1, 0), "raises": 2.0}, blank | {"head": (1, 1), "raises": 0.9}]
    assert find_roles(heads) == {"answer": [(0, 0)], "suppressors": [(0, 1)],
                                 "raisers": [(1, 0)]}


def test_the_token_that_a_head_lowers_most_is_found_prompt_by_prompt():
    model = shuffled_model()
    _, cache = model.run_with_cache(GIFTS.tokens_without)
    found = lowered_most(model, cache, GIFTS.names, GIFTS.third)
    for layer, head in all_heads(model):
        said = torch.stack([  # [batch, name]: the logits of what the head writes at the end
            model.ln_final.w * (wrote - wrote.mean()) / scale @ model.W_U[:, GIFTS.names]
            for wrote, scale in zip(cache["z", layer][:, -1, head] @ model.W_O[layer, head],
                                    cache["scale", None][:, -1], strict=True)])
        said -= said.mean(0)
        right = [GIFTS.names[row.argmin()] == name
                 for row, name in zip(said, GIFTS.third, strict=True)]
        assert found[layer, head] == pytest.approx(sum(right) / 16)


def test_a_giver_is_raised_above_those_beside_it_or_those_who_are_absent_whichever_is_more():
    model = shuffled_model()
    _, cache = model.run_with_cache(GIFTS.tokens_without)
    found = raised_giver(model, cache, GIFTS, GIFTS.third).detach()
    written = written_logits(model, cache, GIFTS.names).detach()
    for layer, head in all_heads(model):
        above = {"beside": 0.0, "absent": 0.0}
        for row in range(16):
            said = dict(zip(GIFTS.names.tolist(), written[layer, row, head].tolist(), strict=True))
            own = said.pop(GIFTS.third[row].item())
            beside = [said.pop(who[row].item()) for who in (GIFTS.receiver, GIFTS.giver)]
            above["beside"] += (own - sum(beside) / 2) / 16
            above["absent"] += (own - sum(said.values()) / 5) / 16
        assert found[layer, head] == pytest.approx(max(above.values()), abs=1e-5)


def test_a_head_that_lowers_all_who_are_named_or_raises_the_others_lowers_no_giver(monkeypatch):
    is_third = (GIFTS.names == GIFTS.third[:, None]).float()
    is_other = sum((GIFTS.names == who[:, None]).float() for who in (GIFTS.receiver, GIFTS.giver))
    writes = {"lowers all who are named": (-is_third - is_other, 0.0),
              "raises the two others": (is_other, 0.0), "lowers the giver": (-is_third, -1.0)}
    for case, (written, expected) in writes.items():
        monkeypatch.setattr(measure, "written_logits", lambda *_, to=written: to[None, :, None])
        found = raised_giver(None, None, GIFTS, GIFTS.third)
        assert found.item() == pytest.approx(expected, abs=1e-6), case


def test_heads_that_raise_are_compared_even_if_nearly_all_do():
    model = shuffled_model()
    _, reference = model.run_with_cache(GIFTS.corrupted_tokens)
    lost = lost_without(model, GIFTS.clean_tokens, GIFTS.named_metric, all_heads(model)[:5],
                        keep=[], reference=reference)
    assert len(lost["others"]) == 6


def test_a_head_that_reads_a_moved_name_lowers_it_whatever_its_own_circuit_says():
    model = mover_and_reader()
    _, cache = model.run_with_cache(GIFTS.tokens_without)
    found = lowered_most(model, cache, GIFTS.names, GIFTS.third)
    assert found[1, 0] == 1 and copying_shares(model, GIFTS.names)["least"][1, 0] <= 1 / 8
    assert found[0, 0] < 0.5  # the mover writes the name where no logit reads it


def mover_and_reader():
    """Two layers of one head. At S2, L0H0 writes the giver's name as another vector; L1H0 reads
    this vector there and lowers the name's logit."""
    n_names = len(GIFTS.names)
    d_vocab = TOKENIZER.d_vocab
    moved = slice(d_vocab, d_vocab + n_names)
    cfg = ModelConfig(n_layers=2, n_heads=1, d_model=d_vocab + n_names + 1, d_vocab=d_vocab,
                      n_ctx=GIFTS.clean_tokens.shape[1], attn_only=True)
    model = GPT(cfg, seed=0).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if name.endswith(".w") else 0.0)  # LayerNorm only normalises
        model.W_E[:, :d_vocab] = torch.eye(d_vocab)
        model.W_U[:d_vocab] = torch.eye(d_vocab)
        mover, reader = (block.attn for block in model.blocks)
        is_name = torch.zeros(d_vocab, n_names)
        is_name[GIFTS.names, torch.arange(n_names)] = 1

        # Both look at S2, whose position all prompts share
        model.W_pos[GIFTS.at["S2"], -1] = 1
        for head in (mover, reader):
            head.W_K[0][-1, 0] = 100
            head.b_Q[0, 0] = 100

        mover.W_V[0][:d_vocab, :n_names] = is_name
        mover.W_O[0][:n_names, moved] = torch.eye(n_names)
        reader.W_V[0][moved, :n_names] = torch.eye(n_names)
        reader.W_O[0][:n_names, :d_vocab] = -is_name.T
    return model


def test_with_uniform_attention_the_effect_of_names_comes_from_the_values():
    model = GPT(gift_shape(GiftRecipe(n_layers=1, n_heads=3, d_model=24), TOKENIZER), 2).eval()
    with torch.no_grad():
        model.blocks[0].attn.W_V.mul_(30)  # so that it says something
        model.blocks[0].attn.W_K.zero_()
        clean, corrupted = (gifts_diff(model, tokens).mean().item()
                            for tokens in (GIFTS.clean_tokens, GIFTS.corrupted_tokens))
        assert abs(corrupted - clean) > 1e-3
        changed = {letters: changed_inputs(model, GIFTS, all_heads(model), letters,
                                           GIFTS.corrupted_tokens) for letters in ("v", "qk")}
    assert changed["v"] == pytest.approx(corrupted - clean, abs=1e-5)
    assert changed["qk"] == pytest.approx(0, abs=1e-6)


def gifts_diff(model, tokens):
    return logit_diff(model(tokens), GIFTS.receiver, GIFTS.giver, reduction="none")


def test_all_queries_and_keys_of_another_run_give_its_patterns():
    model = shuffled_model()
    with torch.no_grad():
        _, other = model.run_with_cache(GIFTS.tokens_swapped)
        hooks = [(f"blocks.{layer}.attn.hook_pattern",
                  lambda pattern, hook: other[hook.name].clone()) for layer in range(2)]
        by_hand = GIFTS.metric(model.run_with_hooks(GIFTS.clean_tokens, hooks))
        expected = (by_hand - GIFTS.metric(model(GIFTS.clean_tokens))).mean().item()
        found = changed_inputs(model, GIFTS, all_heads(model), "qk", GIFTS.tokens_swapped)
    assert abs(expected) > 1e-3 and found == pytest.approx(expected, abs=1e-4)


def test_uniform_attention_reads_the_giver_and_later_words_by_their_number():
    model = shuffled_model()
    with torch.no_grad():
        model.blocks[1].attn.W_K.zero_()
        model.blocks[1].attn.b_K.zero_()
        _, cache = model.run_with_cache(GIFTS.clean_tokens)
        _, once = model.run_with_cache(GIFTS.tokens_without)
        found = measure_strongest(model, GIFTS, (1, 0), cache, once)
    n_words = GIFTS.clean_tokens.shape[1]
    n_after = n_words - GIFTS.at["S2"].float().mean().item()
    assert found["giver"] == pytest.approx(1 / n_words, abs=1e-5)
    assert found["after"] == pytest.approx(n_after / n_words, abs=1e-5)
    looks = {}
    for layer, head in set(all_heads(model)) - {(1, 0)}:
        pattern = cache["pattern", layer]
        looks[layer, head] = sum(
            pattern[row, head, -1, GIFTS.at["S2"][row]:].sum().item() for row in range(16)) / 16
    assert found["others"]["after"] == pytest.approx(sum(looks.values()) / 5, abs=1e-5)
    assert abs(found["others"]["after"] - found["after"]) > 1e-3
    assert found["inputs"]["v"] != 0 and set(found["senders"]) == {"L0H0", "L0H1", "L0H2"}


# Claims


def passing(one):
    """The measures of a model, changed so that every claim holds."""
    good = copy.deepcopy(one)
    good["heads"][0] |= {"direct": -4.0, "lowers": 1.0}
    good["strongest"] |= {"after": 0.9, "words": {"twice": -4.0, "once": -3.0},
                          "inputs": {"q": -0.1, "k": 0.0, "v": -4.0}}
    good |= {"loss": 0.01, "right": 1.0, "diff": 4.0,
             "patterns": {"unrelated": -1.0, "other giver": -2.0},
             "roles": {"answer": [(0, 0)], "suppressors": [(0, 0)], "raisers": []},
             "named": {"raisers": 5.0, "others": [1.0, 6.0, 1.0]},
             "repair": {"answer": {mode: {"total": -4.0, "direct": -4.0}
                                   for mode in ("zero", "mean", "resample")}}}
    good["songs"]["lost"] = {"raisers": 2.0, "others": [0.1]}
    good["edges"] |= {"rho": 0.8, "p": 0.01, "cpr": 0.9, "random_cpr": [0.1, 0.5]}
    return good


def judged(*models):
    claims = gift_claims(models, models)
    return [claim.holds for claim in claims if claim.holds is not None]


def verdicts(one):
    return judged(one, one, one)


def test_claims_hold_where_they_should_and_each_can_fail(measured):
    good = passing(measured[0])
    assert verdicts(good) == [True] * N_VERDICTS
    repaired = {mode: {"total": -4.0, "direct": -4.0} for mode in ("zero", "resample")}
    changes = [(("right",), 0.9), (("heads", 0, "lowers"), 0.5),
               (("strongest", "words", "once"), 0.0), (("strongest", "after"), 0.3),
               (("strongest", "inputs", "q"), -3.0), (("strongest", "inputs", "k"), -3.0),
               (("patterns", "unrelated"), -3.0), (("named", "others"), [6.0]),
               (("named", "raisers"), 1.4), (("songs", "lost", "others"), [3.0]),
               (("songs", "lost"), {"raisers": 0.05, "others": [0.0]}),
               (("edges", "p"), 0.2), (("edges", "rho"), 0.1), (("edges", "cpr"), 0.6),
               (("edges", "random_cpr"), [0.1, 0.95]),
               (("repair", "answer"), repaired | {"mean": {"total": -1.0, "direct": -4.0}})]
    for path, value in changes:
        bad = copy.deepcopy(good)
        place = bad
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert verdicts(bad).count(False) == 1, (path, value)


def test_without_suppressing_heads_the_claims_on_them_fail(measured):
    good = passing(measured[0])
    good["roles"]["suppressors"] = []
    assert verdicts(good).count(False) == 1


def test_a_set_of_heads_is_compared_with_all_sets_of_its_size():
    heads = [{"head": (0, i), "direct": -worth} for i, worth in enumerate((3.0, 1.0, 0.0, -2.0))]
    one = {"heads": heads, "diff": 4.0,
           "roles": {"answer": [(0, 0)], "suppressors": [(0, 0), (0, 1)]}}
    assert sorted(shares_of_sets(one, "suppressors")) == [-0.5, -0.25, 0.25, 0.25, 0.75, 1]
    assert chance_of_sets(one, "suppressors", direct_share(one, "suppressors")) == 1 / 6
    assert chance_of_sets(one, "suppressors", 0.75) == 2 / 6
    own, chance = without_strongest(one)
    assert own == 0.25 and chance == pytest.approx((1 + 0 - 2) / 3 / 4)


def test_one_model_in_three_may_solve_the_task_otherwise_but_not_two(measured):
    good = passing(measured[0])
    other = copy.deepcopy(good)
    other["patterns"]["unrelated"] = -3.0
    assert all(judged(good, other, good))
    assert judged(other, good, other).count(False) == 1

    other["right"] = 0.9  # whether a model solves it at all is asked of each
    assert judged(good, other, good).count(False) == 1


def test_a_loss_that_other_heads_share_is_not_backup(measured):
    good = passing(measured[0])
    for part in good["repair"]["answer"].values():
        part["total"] = -8.0
    assert verdicts(good) == [True] * N_VERDICTS


def test_every_claim_fails_on_untrained_and_on_shuffled_models(measured):
    for one in measured:
        assert verdicts(one) == [False] * N_VERDICTS


def test_the_share_of_a_role_is_the_part_of_the_difference_by_its_heads(measured):
    assert direct_share(passing(measured[0]), "suppressors") == 1
    assert direct_share(passing(measured[0]), "raisers") == 0


# The figure


def test_the_bars_are_direct_effects_and_heads_that_suppress_names_have_their_own_colour():
    columns = dict.fromkeys(("END to IO", "END to S1", "END to S2", "S2 to S1", "lowers",
                             "suppresses"), 0.5)
    heads = [columns | {"head": [0, head], "label": f"L0H{head}", "direct": -1.0 - head}
             for head in range(3)]
    roles = {"answer": [[0, 2]], "raisers": [], "suppressors": [[0, 0], [0, 2]]}
    axes = heads_figure({"heads": heads, "roles": roles, "diff": 8.0}).axes[1]
    bars = [(bar.get_width(), bar.get_facecolor()) for bar in axes.patches[:3]]
    assert [width for width, _ in bars] == [1.0, 2.0, 3.0]
    assert bars[0][1] == bars[2][1] != bars[1][1]
    assert "50 % of the receiver's lead of 8.0 nats" in axes.get_title("left")


# Published prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model in Hugging Face's layout whose tokenizer has the names as single tokens."""
    text = "".join(NAMES) * 30 + "".join(PLACES) * 30 + "".join(THINGS) * 30
    text += " ".join(template * 3 for template in TEMPLATES)
    tokenizer = BPETokenizer()
    tokenizer.train(text, 700)
    shape = ModelConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=64, d_vocab=tokenizer.d_vocab,
                        tie_embeddings=True)
    path = tmp_path_factory.mktemp("random") / "gpt2"
    export_pretrained(path, GPT(shape, seed=0), tokenizer)
    return path, tokenizer


def test_published_prompts_have_both_orders_and_one_token_a_name(folder):
    gifts = published_gifts(folder[1], TEMPLATES[0], 8)
    rows = torch.arange(8)
    assert_close(gifts.clean_tokens[rows, gifts.at["IO"]], gifts.receiver)
    assert_close(gifts.clean_tokens[rows, gifts.at["S2"]], gifts.giver)
    assert (gifts.at["S1"] < gifts.at["IO"]).tolist() == [False, True] * 4
    assert ((gifts.clean_tokens != gifts.corrupted_tokens).sum(1) == 3).all()


def test_a_random_folder_is_measured_without_verdicts(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--model", str(folder[0]), "--prompts", "16", "--out_dir", str(tmp_path)])
    assert end.value.code == 0
    assert "3.56 (Wang et al.)" in capsys.readouterr().out


def test_the_direct_effect_at_the_logits_is_exact_in_the_last_layer(folder):
    model, tokenizer = GPT.from_pretrained(folder[0]).eval(), folder[1]
    found = measure_published(model, tokenizer, 4)
    assert set(found["direct"]) == {"L0H0", "L0H1", "L1H0", "L1H1"}
    assert len(found["diff"]) == 4 * len(TEMPLATES)


def test_impossible_arguments_are_refused(tmp_path):
    assert "steps=0" in refusal(lambda: program.IndirectObjectConfig(steps=0))
    assert "prompts=7" in refusal(lambda: program.IndirectObjectConfig(prompts=7))
    tokenizer = BPETokenizer()
    tokenizer.train("no names at all", 260)
    assert "one token" in refusal(lambda: published_gifts(tokenizer, TEMPLATES[0], 4))


@pytest.mark.slow
def test_the_quick_program_writes_everything(tmp_path):
    _, results = quick_run("indirect_object_identification", tmp_path)
    one, = results["models"]
    strongest, = one["roles"]["answer"]
    assert f"the strongest head is {head_label(*strongest)} (seed 0)." in results["found"]
    assert len(results["models"]) == 1 and results["models"][0]["edges"]["n_edges"] == 193
    assert (tmp_path / "indirect_object_identification_quick" / "heads.png").exists()
