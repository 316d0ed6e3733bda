"""The measures, claims and refusals of attention_visualization.py; the page itself is tested in
test_attention_page.py."""

import json
import math
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import quick_run, tiny_model, tiny_tokens
from test_bad_input import complaint

from activation_cache import head_label
from checkpoint import export_pretrained, load_model
from config import ModelConfig, config_from_dict, flag_parser
from experiments.attention_page.measure import (
    correlate_looking_back,
    describe_heads,
    measure_effects,
    measure_silenced_head,
    measure_wired_decoys,
    rank_correlation,
    rank_heads,
    record_attention,
    score_heads,
    sharper_head_share,
    uniform_pattern,
    view_subject,
)
from experiments.attention_page.model import STORY, AttentionSubject
from experiments.attention_page.page import (
    first_heads,
    make_page,
    own_text_command,
    pack_patterns,
    readable_texts,
    unpack_patterns,
    write_page,
    written_scale,
    written_shares,
)
from experiments.attention_page.report import (
    all_claims,
    compare_first_heads,
    looking_back_claim,
    pattern_figure,
    summarise,
    wired_claims,
)
from experiments.attention_visualization import AttentionConfig, figures, main
from losses import next_token_loss
from metrics import Effects
from model import GPT
from tokenizer import BPETokenizer, CharTokenizer


@pytest.fixture(scope="module")
def seen():
    """A SubjectView of a scrambled tiny model."""
    subject = AttentionSubject("tiny", tiny_model(), CharTokenizer().fit("abcdefghijk"),
                      tiny_tokens(1, 6, seed=5), tiny_tokens(8, 7))
    return view_subject(subject)


# What is measured


def test_the_written_share_is_the_norm_of_what_a_head_adds(seen):
    model, tokens = tiny_model(), tiny_tokens()
    record = record_attention(model, tokens)
    _, cache = model.run_with_cache(tokens, ["blocks.1.attn.hook_v", "blocks.1.hook_resid_pre"])
    for batch, head, query, key in [(0, 2, 5, 3), (1, 0, 6, 6), (1, 1, 4, 0)]:
        value = cache["v", 1][batch, key, head] @ model.blocks[1].attn.W_O[head]
        share = value.norm() / cache["resid_pre", 1][batch, query].norm()
        assert record.written_norm[1, batch, head, key].item() == pytest.approx(value.norm().item())
        assert record.written_share[1, batch, head, query, key].item() == pytest.approx(
            (record.pattern[1, batch, head, query, key] * share).item(), rel=1e-4)


def test_sharpness_is_0_for_even_attention_and_1_for_one_key(seen):
    record = record_attention(tiny_model(), tiny_tokens())
    pattern = torch.zeros_like(record.pattern)
    pattern[0] = uniform_pattern(7)
    pattern[1, ..., 0] = 1.0
    found = score_heads(replace(record, pattern=pattern), tiny_tokens())
    assert found["sharpness"].tolist() == [pytest.approx([0.0] * 3, abs=1e-6), [1.0] * 3]
    assert found["first token"][1].tolist() == [1.0] * 3


@pytest.mark.parametrize("mode", ["mean", "zero"])
def test_an_effect_is_the_rise_of_the_loss_when_the_head_is_replaced_by_hand(mode):
    model, tokens, others = tiny_model(), tiny_tokens(3), tiny_tokens(4, 5, seed=9)
    found = measure_effects(model, tokens, mode, reference_tokens=others).values
    name = "blocks.1.attn.hook_z"
    with torch.no_grad():
        z = model.run_with_cache(others, name)[1][name][:, :, 2].mean((0, 1))
        intact = next_token_loss(model(tokens), tokens, reduction="none")

        def edit(tensor, hook):
            tensor = tensor.clone()
            tensor[:, :, 2] = z if mode == "mean" else 0.0
            return tensor

        without = model.run_with_hooks(tokens, fwd_hooks=[(name, edit)])
    rise = next_token_loss(without, tokens, reduction="none") - intact
    assert torch.allclose(found[1, 2], rise, atol=1e-5) and rise.abs().min() > 1e-3


def test_a_silenced_head_keeps_its_pattern_and_has_no_effect(seen):
    for head in [(0, 0), (1, 2)]:
        assert measure_silenced_head(seen.subject, head, "mean") == [0.0, 0.0, 0.0]
    assert seen.effects.mean.abs().min() > 1e-4  # and it did something before


def test_the_wired_idle_heads_have_the_prettier_patterns():
    for values, needed in measure_wired_decoys(2):
        assert needed.sum() == 1 and len(needed) == 4
        assert values["previous token"][~needed].min() > values["previous token"][needed]
        assert values["effect"][needed] > 1 > 1e-4 > values["effect"][~needed].abs().max()
        assert values["written"][~needed].min() < 1e-12  # the one that writes nothing
        assert values["written"][~needed].max() > 0.01  # and the ones that nobody reads
    assert all(claim.holds for claim in wired_claims())


def test_the_rank_correlation_is_that_of_ranks_and_lies_in_its_interval():
    effect = torch.tensor([[0.1, 3.0, 0.2, 5.0, 0.7, 0.3]])
    value, low, high = rank_correlation(effect.exp(), effect)
    assert value == pytest.approx(1.0) and low == pytest.approx(1.0)
    shuffled = torch.tensor([[2.0, 1.0, 4.0, 3.0, 6.0, 5.0]])  # d = 1 six times: 1 - 6 * 6 / 210
    value, low, high = rank_correlation(shuffled, torch.arange(6.0)[None])
    assert value == pytest.approx(1 - 36 / 210) and low < value <= high
    more, *_ = rank_correlation(effect, effect, other=-effect)
    assert more == pytest.approx(2.0)


def test_heads_are_ranked_in_their_own_model():
    effect = torch.tensor([[1.0, 2.0, 3.0, 4.0], [101.0, 102.0, 103.0, 104.0]])
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0], [104.0, 103.0, 102.0, 101.0]])  # pooled: positive
    assert rank_correlation(score, effect)[0] == pytest.approx(-1)
    both = torch.stack([effect[0], -effect[0]])
    assert rank_correlation(both, effect)[0] == pytest.approx(0)  # the mean of 1 and -1


def test_looking_back_correlates_with_the_effect_or_is_at_chance(seen):
    draw = torch.Generator().manual_seed(4)
    score, other = torch.rand(3, 12, generator=draw), torch.rand(3, 12, generator=draw)
    ranking = rank_heads([seen])

    def judge(effect, judged=True):
        each, p, by_chance = correlate_looking_back(score, effect)
        own = replace(ranking, looking_back=each, p=p, by_chance=by_chance)
        return looking_back_claim(own, judged)

    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(score, other, strict=True)])
    line = judge(other)
    assert line.measured == pytest.approx(expected) and line.holds is False
    needed = judge(2 * score - 1)
    assert needed.measured == pytest.approx(1) and needed.holds is True
    assert "(p = 0.0005)" in needed.control  # 1 of 2,001
    assert judge(-score).holds is False
    assert judge(score, judged=False).holds is None


def test_the_idle_share_looks_only_at_sharper_heads(seen):
    class Two:
        def of_heads(self, name):
            return torch.tensor({"sharpness": [0.5, 0.6, 0.2], "effect": [2.0, 0.5, 0.1]}[name])

    assert sharper_head_share(Two()) == 0.25


def test_verdicts_on_heads_depend_on_their_intervals(seen):
    values = torch.zeros(2, 3, 8)
    values[0, 1], values[1, 2] = torch.tensor([0.5, 0.6] * 4), torch.tensor([-0.5, -0.6] * 4)
    values[1, 0] = torch.tensor([0.5, -0.6] * 4)
    facts = {fact["name"]: fact for fact in describe_heads(replace(seen, effects=Effects(values)))}
    verdicts = {name: fact["verdict"] for name, fact in facts.items()}
    assert verdicts == {"L0H0": "idle", "L0H1": "needed", "L0H2": "idle", "L1H0": "idle",
                        "L1H1": "idle", "L1H2": "harmful"}
    assert facts["L0H1"]["effect"] == pytest.approx(0.55)
    assert 0.5 <= facts["L0H1"]["low"] < 0.55 < facts["L0H1"]["high"] <= 0.6


def test_claims_on_trained_models_have_no_verdict_for_other_models(seen):
    ranking = rank_heads([seen])
    reported, claimed = all_claims([seen], ranking, judged=False), all_claims([seen], ranking)
    assert [line.holds for line in reported[:7]] == [None] * 7
    assert all(line.holds is not False for line in reported[7:])
    # A scrambled model has no previous-token head, and its claim fails.
    assert claimed[0].holds is False and claimed[0].claim.startswith("the best previous-token")


def test_the_summary_reports_the_measures_and_the_failures(seen):
    ranking = rank_heads([seen])
    claims = all_claims([seen], ranking)
    n_failed = sum(line.holds is False for line in claims)
    found = summarise([seen], ranking, claims)
    assert "In one model, it pays" in found and f"{n_failed} of {len(claims)} claims fail" in found
    for head in (seen.watcher, divmod(seen.of_heads("effect").argmax().item(),
                                        seen.subject.model.cfg.n_heads)):
        assert head_label(*head) in found
    for number in (seen.of_heads("previous token").max(), ranking.between_halves[0],
                   ranking.by_score["sharpness"][0], ranking.looking_back[0]):
        assert f"{number:.2f}" in found
    assert "No claim fails" in summarise([seen], None, all_claims([seen], None, judged=False))


def test_two_heads_are_too_few_to_be_ranked(seen):
    class Two:
        def of_heads(self, name):
            return torch.tensor([0.1, 0.2])

    assert rank_heads([Two()]) is None


# The page


def test_packed_patterns_are_unpacked_unchanged(seen):
    pattern = seen.record.pattern[:, 0]
    page = {"tokens": "abcdef", "heads": range(6), "patterns": pack_patterns(pattern)}
    assert torch.allclose(torch.tensor(unpack_patterns(page)).float(), pattern.flatten(0, 1),
                          atol=0.5 / 255 + 1e-6)


def test_the_page_holds_its_data_whatever_the_tokens_are_and_nothing_from_elsewhere(tmp_path):
    page = {"tokens": ["</script>", "<!--", "\u2028", '"'], "x": 1}
    write_page(tmp_path / "page.html", page)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert json.loads(data[1]) == page
    assert not re.findall(r"https?:|\bsrc=|\bimport\b|fetch\(|@import|url\(", text)
    assert "default-src 'none'" in text


def test_a_page_is_plain_values_and_the_figures_are_drawn_from_it(seen):
    page = json.loads(json.dumps(make_page(seen, AttentionConfig()), allow_nan=False))
    drawn = figures({"page": page, "models": {"tiny": describe_heads(seen)}})
    assert list(drawn) == ["attention", "written", "importance"]
    large, *small = drawn["attention"].axes[:7]
    titles = [axes.get_title(loc="left") for axes in small]
    assert titles == [f"{head['name']}   {head['effect']:+.3f}" for head in page["heads"]]
    shown = torch.tensor(drawn["written"].axes[5].images[0].get_array().filled(0))
    assert torch.allclose(shown.float(), seen.record.written_share[1, 0, 1], atol=0.02)

    # the head that is needed most, with its tokens
    needed = max(page["heads"], key=lambda head: head["effect"])
    assert large.get_title(loc="left").startswith(needed["name"])
    number = page["heads"].index(needed)
    assert (large.images[0].get_array() == small[number].images[0].get_array()).all()
    assert len(large.get_xticklabels()) == len(page["tokens"])

    # one cell that is far larger than the others does not make them look empty
    page["heads"][0]["written"][0] *= 1000
    page["written"] = written_scale(written_shares(page))
    clipped = pattern_figure(page, weighed=True).axes[1].images[0]
    assert clipped.get_clim()[1] < 0.6 * clipped.get_array().max()


def test_the_page_opens_at_the_head_that_is_needed_most_and_says_by_how_much(seen):
    page = make_page(seen, AttentionConfig())
    effects = seen.of_heads("effect").tolist()
    assert effects[page["start"]] == max(effects)
    name = page["heads"][page["start"]]["name"]
    assert f"opens at {name}: without it the loss rises most, by {max(effects):.3f} nats" in (
        page["first"])
    sharpness = [round(x, 4) for x in seen.of_heads("sharpness").tolist()]
    assert sharpness[page["sharpest"]] == max(sharpness)
    assert set(page["meanings"]) == set(page["heads"][0]["scores"])

    def text(*effects):  # of two heads, the second of which is the sharper one
        return first_heads([{"name": f"L0H{k}", "effect": effect, "scores": {"sharpness": [0, k]}}
                            for k, effect in enumerate(effects)])

    assert text(0.5, -0.1)[:2] == (0, 1) and "L0H1: no pattern is sharper" in text(0.5, -0.1)[2]
    assert "changes by -0.100" in text(0.5, -0.1)[2]
    assert text(0.1, 0.5)[:2] == (1, 1) and "also the sharpest" in text(0.1, 0.5)[2]
    assert "No head is needed here. The page opens at L0H1: without it the loss falls least, by " \
           "0.200" in text(-0.5, -0.2)[2]


def test_colours_end_at_the_99th_percentile_of_what_is_written(seen):
    page = make_page(seen, AttentionConfig())
    shares = seen.record.written_share[:, 0].flatten(0, 1)  # [head, query_pos, key_pos]
    assert torch.allclose(torch.tensor(written_shares(page)).float(), shares, atol=0.01)
    cells = sorted(written_shares(page)[written_shares(page) > 0])
    place = 0.99 * (len(cells) - 1)
    low, high = cells[math.floor(place)], cells[math.ceil(place)]
    assert page["written"]["full"] == pytest.approx(low + (high - low) * (place % 1))
    assert page["written"]["most"] == cells[-1]
    assert written_scale(np.zeros((2, 3, 3))) == {"full": 1.0, "most": 0.0}


@pytest.mark.parametrize("settings", [
    {}, {"text": "Ola has a kite."}, {"model": "my models/two", "windows": 8, "quick": True},
    {"seeds": [0, 1, 2]},
    {"seeds": [3, 4], "out_dir": "it's here", "ablation": "zero", "retrain": True}])
def test_the_page_names_the_command_that_shows_ones_own_text(settings):
    cfg = AttentionConfig(**settings)
    python, program, *flags = shlex.split(own_text_command(cfg))
    assert (python, program) == ("python", "experiments/attention_visualization.py")
    parsed = vars(flag_parser(AttentionConfig, "").parse_args(flags))
    again = config_from_dict(AttentionConfig, parsed)
    assert replace(again, seeds=list(again.seeds)) == replace(
        cfg, text="your words", retrain=False, seeds=list(cfg.seeds))
    assert "seeds" in settings or "--seeds" not in flags


def test_the_page_says_which_texts_can_be_read(seen):
    assert "2 to 9 tokens" in readable_texts(seen.subject)
    assert "only the characters" in readable_texts(seen.subject)
    own = replace(seen.subject, tokenizer=BPETokenizer())
    assert readable_texts(own).endswith("tokens of any text.")


def test_the_title_says_which_head_comes_first():
    heads = [{"name": "L0H0", "effect": 0.5, "scores": {"sharpness": [0, 0.2]}},
             {"name": "L0H1", "effect": 0.1, "scores": {"sharpness": [0, 0.9]}}]
    assert compare_first_heads(heads, "sharpness") == (
        "Head L0H1 has the sharpest pattern and costs 0.100 nats a token; head L0H0 is needed "
        "most: 0.500")
    heads[1]["effect"] = 0.7
    title = compare_first_heads(heads, "sharpness")
    assert "L0H1 has the sharpest pattern and is needed most" in title


# The program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in Hugging Face's layout, with 2 layers and, in "none", without any."""
    place, tokenizer = tmp_path_factory.mktemp("pretrained"), BPETokenizer()
    for name, n_layers in (("two", 2), ("none", 0)):
        cfg = ModelConfig(n_layers=n_layers, n_heads=2, d_model=8, n_ctx=32, d_vocab=256,
                          tie_embeddings=True)
        export_pretrained(place / name, GPT(cfg), tokenizer)
    (place / "short.txt").write_text("abc")
    return place


@pytest.mark.parametrize(("flags", "told"), [
    (["--run_name", "nope"], "no run 'nope'"),
    (["--model", "{}/none"], "has n_layers=0, and so no heads to look at"),
    (["--model", "{}/two", "--run_name", "x"], "are both given; choose one"),
    (["--model", "{}/two", "--text", "a" * 40], "has 40 tokens, but {}/two reads 2 to n_ctx=32"),
    (["--model", "{}/two", "--text", "a"], "has 1 tokens"),
    (["--model", "{}/two", "--held_out", "{}/short.txt"], "3 held-out tokens are too few"),
    (["--model", "{}/two", "--held_out", "{}/nowhere.txt"], "No such file"),
    (["--text", " \n"], "text=' \\n' is empty"),
    (["--text", "zebra"], "unknown words 'zebra'"),
    (["--text", "Ola " * 41], "the text has 41 tokens, but seed 0 reads 2 to n_ctx=40"),
    (["--windows", "1"], "windows=1 is not possible"),
    (["--ablation", "median"], "median"),
    (["--seeds", "-1"], "seeds=(-1,) is not possible"),
    (["--out_dir", "{}/short.txt"], "choose another --out_dir"),
])
def test_wrong_settings_are_refused_in_one_line(tmp_path, folder, capsys, flags, told):
    flags = [flag.replace("{}", str(folder)) for flag in flags]
    line = complaint(main, ["--out_dir", str(tmp_path), *flags], capsys)
    assert told.replace("{}", str(folder)) in line
    assert not list(tmp_path.glob("*/*"))


def test_a_pretrained_model_is_looked_at(tmp_path, folder, capsys):
    two = folder / "two"
    with pytest.raises(SystemExit) as exit_:
        main(["--out_dir", str(tmp_path), "--model", str(two), "--windows", "4",
              "--text", "One two, one two."])
    assert exit_.value.code == 0
    folder, = tmp_path.glob("attention_visualization_*_two")  # the last two parts of its path
    result = json.loads((folder / "results.json").read_text())
    assert "".join(result["page"]["tokens"]) == "One two, one two."
    assert [head["name"] for head in result["page"]["heads"]] == [
        "L0H0", "L0H1", "L1H0", "L1H1"]
    flags = shlex.split(result["page"]["command"])
    assert flags[-2:] == ["--text", "your words"] and str(two) in flags


@pytest.mark.slow
def test_two_quick_runs_write_everything_and_give_the_same(tmp_path):
    printed, result = quick_run("attention_visualization", tmp_path, n_trainings=3)
    place = tmp_path / "attention_visualization_quick"
    assert "PASS" in printed and "FAIL" not in printed
    assert f"open {place / 'attention.html'}" in printed and "No claim fails" in result["found"]
    assert {path.name for path in place.iterdir()} == {
        "attention.html", "attention.png", "written.png", "importance.png", "results.json",
        "seed_0", "seed_1", "seed_2"}
    assert list(result["models"]) == ["seed 0", "seed 1", "seed 2"]
    page, before = place / "attention.html", (place / "attention.html").read_bytes()
    assert quick_run("attention_visualization", tmp_path)[1] == result
    assert page.read_bytes() == before
    model, tokenizer = load_model(place / "seed_1")
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(STORY)]))
    assert math.isfinite(logits.sum())
