"""The page of features: its numbers are the naive loop's, and in a browser it shows them, by mouse
and by keyboard, whatever the tokens are and without any network."""

import json
import re
from dataclasses import replace

import pytest
import torch
from browser import open_page, text
from helpers import refusal, tiny_model, tiny_tokens

from experiments.common import rounded
from experiments.dictionaries.model import (
    DictionaryRecipe,
    ReluL1,
    fit_dictionary,
    seed_for,
    unit_rows,
)
from experiments.dictionaries.trained import page as page_module
from experiments.dictionaries.trained.model import Subject
from experiments.dictionaries.trained.page import (
    N_BINS,
    TEMPLATE,
    Directions,
    as_strong,
    context,
    describe_features,
    dictionary_directions,
    direct_logits,
    look_around,
    make_page,
    middle_places,
    nearest_neurons,
    random_directions,
    strongest_places,
    variable_aurocs,
    write_page,
)
from losses import next_token_loss
from metrics import auroc, bootstrap_ci
from tokenizer import CharTokenizer
from utils import seeded_generator

HOSTILE = ["</script>", "<!--", "\n", " a", '"', "\u202e", "<b>x</b>", "", "\\", "\u2028", "&amp;"]


class HostileTokenizer(CharTokenizer):
    """A tokenizer whose tokens could end a script, begin a tag, or can't be seen."""

    def __init__(self):
        super().__init__()
        self.symbols = HOSTILE


def tiny_subject(at="blocks.0.hook_resid_post", **changes):
    """A Subject of a scrambled tiny model, whose tokens are HOSTILE."""
    held_out = tiny_tokens(12, 7)
    variables = {"token 3": held_out == 3, "an early place": torch.arange(7).expand(12, 7) < 3,
                 "nowhere": torch.zeros(12, 7).bool()}
    return Subject("tiny", tiny_model(**changes), HostileTokenizer(), at, tiny_tokens(4, 7, seed=5),
                   held_out, variables)


def tiny_dictionary(subject, n_latents=8, seed=3):
    """A dictionary that nobody trained, whose latents are active at a tenth of all positions, two
    tenths, and so on; the last one never."""
    x = look_around(subject).x.flatten(0, 1)
    dictionary = ReluL1(x.shape[-1], x.shape[-1], n_latents, 0.1, seeded_generator(seed))
    with torch.no_grad():
        readings = dictionary.pre(x).sort(0, descending=True).values
        for k in range(n_latents):
            dictionary.b_enc[k] = -readings[len(x) * (k + 1) // 10, k]
        dictionary.b_enc[-1] = -1e6
    return dictionary


# The numbers


@pytest.mark.parametrize("at", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "hook_embed",
                                "blocks.0.hook_attn_out", "blocks.0.mlp.hook_post",
                                "blocks.1.mlp.hook_post", "blocks.1.ln1.hook_normalized"])
def test_the_effect_equals_the_rise_of_the_loss_when_a_hook_removes_the_direction(at):
    subject = tiny_subject(at)
    model, texts = subject.model, subject.held_out
    dictionary = tiny_dictionary(subject)
    with torch.no_grad():
        clean = next_token_loss(model(texts), texts, reduction="none")
    described = describe_features(subject, dictionary, n_features=3)

    for each in described:
        i = each["index"]

        def take_away(x, hook, i=i):
            return x - dictionary.encode(x)[..., i, None] * dictionary.W_dec[i]

        with torch.no_grad():
            logits = model.run_with_hooks(texts, [(at, take_away)])
        rise = next_token_loss(logits, texts, reduction="none") - clean
        found = each["feature"]
        assert found["effect"] == pytest.approx(rise.mean().item(), abs=1e-5)
        low, high = bootstrap_ci(rise)
        assert found["low"] == pytest.approx(low.item(), abs=1e-5)
        assert found["high"] == pytest.approx(high.item(), abs=1e-5)


def test_the_random_direction_is_as_long_as_the_feature_and_active_as_often():
    subject = tiny_subject()
    x = look_around(subject).x
    latents = dictionary_directions(tiny_dictionary(subject), x)
    latents = Directions(3 * latents.vectors, latents.z)
    drawn = torch.randn(8, 12, generator=seeded_generator(0))
    found = random_directions(x, latents, drawn)

    assert torch.allclose(found.vectors, 3 * unit_rows(drawn))
    for k, vector in enumerate(found.vectors):
        n_active = int((latents.z[k] > 0).sum())
        readings = (x @ vector).flatten()
        b = readings.sort(descending=True).values[n_active]
        assert torch.allclose(found.z[k].flatten(), (readings - b).relu(), atol=1e-5)
        n_ties = int(((readings - b).abs() < 1e-5).sum())  # such as a token at the first place
        assert abs(int((found.z[k] > 0).sum()) - n_active) < n_ties

    scaled = as_strong(found, latents)
    assert torch.allclose(scaled.z.mean((1, 2)), latents.z.mean((1, 2)), atol=1e-6)
    assert torch.equal(scaled.z > 0, found.z > 0)


def test_as_much_is_the_effect_of_the_random_direction_with_the_features_mean():
    subject = tiny_subject()
    model, texts = subject.model, subject.held_out
    dictionary = tiny_dictionary(subject)
    x = look_around(subject).x
    latents = dictionary_directions(dictionary, x)
    drawn = torch.randn(8, 12, generator=seeded_generator(seed_for("random partners", 4)))
    scaled = as_strong(random_directions(x, latents, drawn), latents)
    clean = next_token_loss(model(texts), texts)

    for each in describe_features(subject, dictionary, n_features=3, seed=4):
        i = each["index"]
        with torch.no_grad():
            resid = x - scaled.z[i][..., None] * scaled.vectors[i]
            loss = next_token_loss(model.unembed(model.run_blocks(resid, start=1)), texts)
        expected = pytest.approx((loss - clean).item(), abs=1e-5)
        assert each["random"]["as_much"]["effect"] == expected
        assert each["random"]["mean"] != pytest.approx(each["feature"]["mean"])


def test_random_partners_are_not_the_first_directions_of_the_dictionary():
    """Drawn from one seed in the same way, each partner would be its feature before training."""
    subject = tiny_subject()
    x = look_around(subject).x.flatten(0, 1)
    recipe = DictionaryRecipe("ReLU + L1", 0.01, 40, steps=0)
    dictionary = fit_dictionary(recipe, x, seed=4)
    drawn = []

    def record(x, like, directions):
        drawn.append(directions)
        return random_directions(x, like, directions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "random_directions", record)
        described = describe_features(subject, dictionary, n_features=40, seed=4)
    own = dictionary.W_dec.detach()[[each["index"] for each in described]]
    cosines = torch.nn.functional.cosine_similarity(own, drawn[0])
    assert cosines.abs().max() < 0.95 and cosines.mean().abs() < 0.2


@pytest.mark.parametrize("at", ["blocks.0.hook_resid_post", "blocks.0.mlp.hook_post"])
def test_direct_logits_are_those_of_the_direction_through_the_last_layer_norm(at):
    subject = tiny_subject(at)
    model = subject.model
    _, cache = model.run_with_cache(subject.held_out)
    resid = cache["resid_post", -1]
    scale = (resid.var(-1, unbiased=False) + 1e-5).sqrt().mean().item()
    around = look_around(subject)
    assert around.scale == pytest.approx(scale, rel=1e-5)

    directions = dictionary_directions(tiny_dictionary(subject), around.x)
    found = direct_logits(subject, directions, around.scale)
    for k, vector in enumerate(directions.vectors):
        write = vector @ model.W_out[0] if "mlp" in at else vector
        logits = (write - write.mean()) * model.ln_final.w / scale @ model.W_U
        assert torch.allclose(found[k], logits - logits.mean(), atol=1e-5)


def test_a_point_outside_the_stream_has_no_direct_logits_and_no_neuron():
    subject = tiny_subject("blocks.1.ln1.hook_normalized")
    features = describe_features(subject, tiny_dictionary(subject), n_features=2)
    for who in ("feature", "random"):
        assert features[0][who]["raised"] is None and features[0][who]["neuron"] is None
    assert "no direct effects" in make_page(subject, tiny_dictionary(subject), features)["measured"]


def test_a_model_without_layer_norms_and_mlps_has_direct_logits_and_no_neurons():
    subject = tiny_subject(attn_only=True, norm="none")
    dictionary = tiny_dictionary(subject)
    found = describe_features(subject, dictionary, n_features=2)
    for each in found:
        logits = dictionary.W_dec[each["index"]].detach() @ subject.model.W_U
        top = (logits - logits.mean()).max().item()
        assert each["feature"]["raised"][0][1] == pytest.approx(top, abs=1e-5)
        assert each["feature"]["neuron"] is None


@pytest.mark.parametrize(("at", "layers"), [
    ("blocks.1.hook_resid_post", [0, 1]), ("blocks.1.hook_mlp_out", [0, 1]),
    ("blocks.1.hook_resid_mid", [0]), ("blocks.1.hook_resid_pre", [0]),
    ("blocks.0.hook_resid_pre", []), ("hook_embed", []), ("blocks.1.mlp.hook_post", [1])])
def test_neurons_are_those_whose_writes_reach_the_hook_point(at, layers):
    names = look_around(tiny_subject(at)).neurons
    assert names == [f"L{layer}N{n}" for layer in layers for n in range(48)]


def test_a_neuron_is_nearest_to_its_own_write():
    subject = tiny_subject("blocks.1.hook_resid_post")
    around = look_around(subject)
    _, cache = subject.model.run_with_cache(subject.held_out)
    own = Directions(2 * subject.model.W_out[1, [5, 17]].detach(),
                     torch.stack([cache["post", 1][..., 5], -cache["post", 1][..., 17]]))
    one, other = nearest_neurons(own, around)
    assert (one["name"], other["name"]) == ("L1N5", "L1N17")
    assert [one["cosine"], other["cosine"]] == pytest.approx([1, 1], abs=1e-5)
    assert [one["correlation"], other["correlation"]] == pytest.approx([1, -1], abs=1e-5)

    [opposite] = nearest_neurons(Directions(-own.vectors[:1], own.z[:1]), around)
    cosines = torch.cosine_similarity(-own.vectors[:1], around.neuron_vectors)
    assert opposite["cosine"] == pytest.approx(cosines.max().item())  # its sign counts


def test_the_auroc_of_each_direction_and_variable_is_that_of_metrics():
    subject = tiny_subject()
    latents = dictionary_directions(tiny_dictionary(subject), look_around(subject).x)
    found = variable_aurocs(latents, subject.variables)
    for k, z in enumerate(latents.z):
        for v, truth in enumerate(subject.variables.values()):
            expected = auroc(z.flatten(), truth.flatten())
            assert found[k, v].item() == pytest.approx(expected, nan_ok=True)
    assert found[:, 2].isnan().all() and not found[:, :2].isnan().any()

    each = describe_features(subject, tiny_dictionary(subject), n_features=1)[0]
    best = max(found[each["index"], :2].tolist())
    assert each["feature"]["variable"]["auroc"] == pytest.approx(best)


def test_each_context_is_from_another_text_with_the_strongest_first():
    z = torch.zeros(6, 5)
    z[0, 3], z[0, 4], z[1, 0], z[2, 2], z[3, 1], z[4, 4] = 9, 8, 7, 3, 2, 1  # the median is 3
    assert strongest_places(z, 2) == [(0, 3), (1, 0)]
    assert strongest_places(z, 99) == [(0, 3), (1, 0), (2, 2), (3, 1), (4, 4)]  # 5 is silent
    assert middle_places(z, 2, {0, 1}) == [(2, 2), (3, 1)]
    assert middle_places(z, 9, {2}) == [(3, 1), (4, 4), (1, 0), (0, 4)]  # a text once


def test_a_context_has_the_tokens_and_activations_around_its_place():
    subject = tiny_subject()
    dictionary = tiny_dictionary(subject)
    each = describe_features(subject, dictionary, n_features=1)[0]
    z = dictionary.encode(look_around(subject).x)[..., each["index"]]
    feature = each["feature"]
    places = strongest_places(z, 8)
    assert len(feature["strongest"]) == len(places) > 3
    for (row, pos), found in zip(places, feature["strongest"], strict=True):
        window = range(max(0, pos - 10), min(7, pos + 5))
        assert found["tokens"] == [HOSTILE[subject.held_out[row, p]] for p in window]
        assert found["z"] == pytest.approx([z[row, p].item() for p in window])
        assert found["z"][found["at"]] == z[row].max()
    assert feature["frequency"] == pytest.approx((z > 0).double().mean().item())
    assert feature["mean"] == pytest.approx(z[z > 0].mean().item())
    assert feature["most"] == z.max().item()
    width = feature["most"] / N_BINS
    counts = [((z > k * width) & (z <= (k + 1) * width + 1e-6)).sum().item() for k in range(N_BINS)]
    assert feature["counts"] == counts and sum(counts) == (z > 0).sum()


def test_a_context_ends_with_its_text_and_does_not_begin_before_it():
    held_out = torch.arange(30).view(1, 30) % 11
    subject = Subject("", None, HostileTokenizer(), "", held_out, held_out)
    z = torch.arange(30.0).view(1, 30)
    for pos, first, last in ((0, 0, 4), (9, 0, 13), (15, 5, 19), (29, 19, 29)):
        found = context(subject, z, (0, pos))
        assert found["z"] == list(range(first, last + 1))
        assert found["z"][found["at"]] == pos
        assert found["tokens"] == [HOSTILE[k % 11] for k in range(first, last + 1)]


def test_contexts_from_the_middle_are_of_other_texts_than_the_strongest():
    subject = tiny_subject()
    dictionary = tiny_dictionary(subject)
    z = dictionary.encode(look_around(subject).x)
    for each in describe_features(subject, dictionary, n_contexts=2):
        its_z = z[..., each["index"]]
        strongest = {text for text, _ in strongest_places(its_z, 2)}
        middle = middle_places(its_z, 3, strongest)
        assert len(middle) == 3
        assert each["feature"]["middle"] == [context(subject, its_z, place) for place in middle]


def test_the_tokens_raised_and_lowered_are_those_with_the_largest_changes_of_logits():
    subject = tiny_subject()
    dictionary = tiny_dictionary(subject)
    around = look_around(subject)
    logits = direct_logits(subject, dictionary_directions(dictionary, around.x), around.scale)
    each = describe_features(subject, dictionary, n_features=1)[0]
    order = logits[each["index"]].sort(descending=True)
    ranked = [[HOSTILE[i], value] for value, i in zip(*map(torch.Tensor.tolist, order),
                                                      strict=True)]
    for found, wanted in (("raised", ranked[:6]), ("lowered", ranked[::-1][:6])):
        tokens, values = zip(*each["feature"][found], strict=True)
        assert list(tokens) == [token for token, _ in wanted]
        assert list(values) == pytest.approx([value for _, value in wanted], abs=1e-6)


def test_the_features_with_the_largest_effects_are_described_whatever_the_number():
    subject = tiny_subject()
    dictionary = tiny_dictionary(subject)
    every = describe_features(subject, dictionary)
    sizes = [abs(each["feature"]["effect"]) for each in every]
    assert sizes == sorted(sizes, reverse=True) and len(every) == 7  # the last one is never active
    fewer = describe_features(subject, dictionary, n_features=2)
    assert [each["index"] for each in fewer] == [each["index"] for each in every[:2]]
    for one, same in zip(fewer, every[:2], strict=True):
        for who in ("feature", "random"):
            texts = [[context["tokens"] for context in each[who]["strongest"]]
                     for each in (one, same)]
            assert texts[0] == texts[1]
            assert one[who]["effect"] == pytest.approx(same[who]["effect"], abs=1e-6)
    other = describe_features(subject, dictionary, n_features=2, seed=1)
    assert other[0]["feature"] == every[0]["feature"]
    assert other[0]["random"]["effect"] != every[0]["random"]["effect"]


def test_a_dictionary_of_other_activations_or_without_live_latents_is_refused():
    subject = tiny_subject()
    wide = ReluL1(13, 13, 4, 0.1, seeded_generator(0))
    assert "[13]" in refusal(lambda: describe_features(subject, wide))
    transcoder = ReluL1(12, 13, 4, 0.1, seeded_generator(0))
    assert "[12, 13]" in refusal(lambda: describe_features(subject, transcoder))
    silent = tiny_dictionary(subject)
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
    assert "no latent is active" in refusal(lambda: describe_features(subject, silent))


# The file


@pytest.fixture(scope="module")
def page():
    """The page of the tiny model's features."""
    subject = tiny_subject()
    dictionary = tiny_dictionary(subject)
    return make_page(subject, dictionary, describe_features(subject, dictionary))


def test_the_page_gives_the_numbers_of_needed_features_and_of_those_left_out(page):
    features = page["features"]
    needed = [sum(each["low"] > 0 for each in kind) for kind in (
        [f["feature"] for f in features], [f["random"] for f in features],
        [f["random"]["as_much"] for f in features])]
    assert all(words in page["about"] for words in ("8 latents", "The 7 whose", "1 are left out"))
    assert [int(n) for n in re.findall(r"for (\d+)", page["about"])] == needed


def test_numbers_are_rounded_to_four_digits():
    assert rounded([{"x": 123.456, "n": 123456, "s": "a"}, None, -0.0, 1.23456e-7]) == [
        {"x": 123.5, "n": 123456, "s": "a"}, None, 0, 1.235e-7]


def test_the_page_holds_its_data_whatever_the_tokens_are_and_nothing_from_elsewhere(page, tmp_path):
    write_page(tmp_path / "features.html", page)
    text = (tmp_path / "features.html").read_text(encoding="utf-8")
    data = re.findall(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert len(data) == 1 and json.loads(data[0]) == page
    assert "<b>" not in data[0] and "<!--" not in text
    assert not re.search(r"https?:|//[a-z]|\b(src|href)=|url\(|@import|fetch\(|XMLHttp", TEMPLATE
                         .read_text(encoding="utf-8"))
    assert "default-src 'none'" in text


def test_a_hundred_features_of_long_tokens_fit_into_two_megabytes(tmp_path):
    context = {"tokens": ["<antidisestablish"] * 15, "z": [-12.34] * 15, "at": 10}
    direction = {"frequency": 0.01234, "mean": 1.234, "most": 12.34, "effect": -0.001234,
                 "low": -0.001234, "high": 0.001234, "counts": [1234] * N_BINS,
                 "strongest": [context] * 8, "middle": [context] * 3,
                 "raised": [["<antidisestablish", 1.234]] * 6, "lowered": None,
                 "neuron": {"name": "L11N3071", "cosine": 0.1234, "correlation": 0.1234},
                 "variable": {"name": "the name of a place", "auroc": 0.1234}}
    features = [{"index": k, "feature": direction, "random": direction} for k in range(100)]
    write_page(tmp_path / "features.html", {"features": features})
    assert (tmp_path / "features.html").stat().st_size <= 2_000_000


# In a browser


@pytest.fixture
def opened(chromium, page, tmp_path):
    """The browser, with the page open."""
    path = tmp_path / "features.html"
    write_page(path, page)
    yield from open_page(chromium, path)


def listed(chromium):
    """The numbers of the features in the list, in its order."""
    return chromium.run("[...$('list').children].filter(row => !row.hidden)"
                        ".map(row => Number(row.querySelector('b').textContent))")


def chosen(chromium):
    """The number of the feature that is shown, after both sides agree on it."""
    row = text(chromium, "[aria-selected=true] b")
    assert text(chromium, "#feature h2") == f"Feature {row}"
    return int(row)


def in_nats(value):
    return f"{value:+.{5 if abs(value) < 0.001 else 4}f}"


def as_seen(token):
    return token.replace("\n", "↵").replace(" ", "·") or "∅"


@pytest.mark.slow
def test_both_panels_show_the_numbers_and_tokens_of_the_chosen_feature(opened, page):
    for k, each in enumerate(page["features"]):
        opened.run(f"choose({k})")
        for who in ("feature", "random"):
            direction = each[who]
            words = text(opened, f"#{who}").replace("−", "-")
            assert all(in_nats(direction[end]) in words for end in ("effect", "low", "high"))
            assert f"{direction['mean']:.2f} on average" in words
            neuron = direction["neuron"]
            assert f"{neuron['name']}: cosine {neuron['cosine']:.2f}" in words
            assert f"AUROC {direction['variable']['auroc']:.2f}" in words
            shown = opened.run(f"[...document.querySelectorAll('#{who} .context')].map(line => "
                               "[...line.querySelectorAll('.token')].map(box => box.textContent))")
            contexts = direction["strongest"] + direction["middle"]
            assert shown == [[as_seen(t) for t in one["tokens"]] for one in contexts]
            words = opened.run(f"[...document.querySelectorAll('#{who} .word')]"
                               ".map(word => word.textContent.replace('−', '-'))")
            assert words == [f"{as_seen(token)} {value:+.2f}"
                             for token, value in direction["raised"] + direction["lowered"]]
            bars = opened.run(f"[...document.querySelectorAll('#{who} .bars i')]"
                              ".map(bar => parseFloat(bar.style.height))")
            most = max(direction["counts"])
            assert bars == pytest.approx([100 * n / most for n in direction["counts"]], abs=0.01)
        words = text(opened, "#random").replace("−", "-")
        as_much = each["random"]["as_much"]
        assert all(in_nats(as_much[end]) in words for end in ("effect", "low", "high"))


@pytest.mark.slow
def test_the_page_leaves_out_neurons_logits_and_variables_that_are_not_known(opened, tmp_path):
    known = tiny_subject("blocks.1.ln1.hook_normalized")
    subject = replace(known, variables={})
    dictionary = tiny_dictionary(subject)
    page = make_page(subject, dictionary, describe_features(subject, dictionary, n_features=2))
    write_page(tmp_path / "features.html", page)
    opened.asked.clear()
    opened.open(tmp_path / "features.html")
    rows = opened.run("[...document.querySelectorAll('th')].map(cell => cell.textContent)")
    assert rows == ["active at"] * 2
    assert text(opened, "#orders") == "effect on the lossfrequency"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colour_of_a_token_shows_how_strong_the_direction_is_there(opened, page, scheme):
    opened.scheme(scheme)
    opened.run("choose(0)")
    feature = page["features"][0]["feature"]
    colours = opened.run("[...document.querySelectorAll('#feature .token')].map(box => "
                         "getComputedStyle(box).backgroundColor.match(/\\d+/g).map(Number))")
    ends = opened.run("[from, to]")
    values = [z for c in feature["strongest"] + feature["middle"] for z in c["z"]]
    for colour, z in zip(colours, values, strict=True):
        wanted = [a + (b - a) * z / feature["most"] for a, b in zip(*ends, strict=True)]
        assert colour == pytest.approx(wanted, abs=0.51)
    boxed = opened.run("[...document.querySelectorAll('#feature .context')].map(line => "
                       "[...line.querySelectorAll('.token')].findIndex(box => "
                       "box.classList.contains('at')))")
    assert boxed == [c["at"] for c in feature["strongest"] + feature["middle"]]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_and_bars_have_legends_with_their_values(opened, page, scheme):
    opened.scheme(scheme)
    opened.run("choose(1)")
    for who in ("feature", "random"):
        most = page["features"][1][who]["most"]
        ends = opened.run(f"[...document.querySelectorAll('#{who} .legend .ends span')]"
                          ".map(end => Number(end.textContent))")
        assert ends == pytest.approx([0, most / 2, most], abs=0.005)
        ramp = opened.run(f"getComputedStyle(document.querySelector('#{who} .ramp'))"
                          ".backgroundImage.match(/\\d+/g).map(Number)")
        assert ramp == [90, *opened.run("[...from, ...to]")]
    low = min(0, *(each["feature"]["low"] for each in page["features"]))
    high = max(each["feature"]["high"] for each in page["features"])
    assert text(opened, "#low").replace("−", "-") == (in_nats(low) if low else "0")
    assert text(opened, "#high") == f"{in_nats(high)} nats a token"


@pytest.mark.slow
@pytest.mark.parametrize(("button", "height"), [
    (1, lambda each: each["effect"]), (2, lambda each: each["frequency"]),
    (3, lambda each: each["variable"]["auroc"])])
def test_the_list_is_sorted_by_effect_frequency_or_variable(opened, page, button, height):
    opened.mouse(f"#orders > :nth-child({button})", click=True)
    wanted = sorted(page["features"], key=lambda each: height(each["feature"]), reverse=True)
    assert listed(opened) == [each["index"] for each in wanted]
    assert opened.run("[...document.querySelectorAll('#orders [aria-pressed=true]')].length") == 1


@pytest.mark.slow
def test_the_keyboard_alone_reaches_every_control_and_moves_through_the_list(opened):
    reached = []
    for _ in range(12):
        opened.key("Tab")
        reached.append(opened.run("document.activeElement.id || document.activeElement.className "
                                  "|| document.activeElement.textContent"))
        if reached[-1] == "row":
            break
    assert reached == ["effect on the loss", "frequency", "known variable", "find", "row"]
    assert opened.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    order = listed(opened)
    moves = [("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", 6), ("ArrowDown", 6),
             ("Home", 0), ("ArrowUp", 0)]
    for key, place in moves:
        opened.key(key)
        assert chosen(opened) == order[place], key
        assert opened.run("document.activeElement.getAttribute('aria-selected')") == "true"


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["</script>", "↵", "\u202e", "·A"])
def test_the_search_leaves_the_features_that_are_strongest_at_a_token(opened, page, wanted):
    opened.run("$('find').focus()")
    opened.send("Input.insertText", text=wanted)
    kept = set()
    for each in page["features"]:
        contexts = each["feature"]["strongest"] + each["feature"]["middle"]
        peaks = [as_seen(c["tokens"][c["at"]]).lower() for c in contexts]
        if wanted.lower() in peaks:
            kept.add(each["index"])
    assert set(listed(opened)) == kept
    assert text(opened, "#left") == f"{len(kept)} of 7"
    if kept:
        assert chosen(opened) in kept
        opened.key("Enter", "End")
        assert chosen(opened) == listed(opened)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1400])
def test_words_are_large_enough_stand_out_and_are_not_clipped(opened, scheme, width):
    opened.size(width, 900)
    opened.scheme(scheme)
    assert opened.run("document.documentElement.scrollWidth") <= width
    found = opened.texts()
    contrast, size, right = map(list, zip(*found, strict=True))
    assert len(found) > 200 and min(contrast) >= 4.5 and min(size) >= 11  # WCAG 2, level AA
    assert max(right) <= width and opened.cut_texts() == []
    below = opened.run("$('random').getBoundingClientRect().top >= "
                       "$('feature').getBoundingClientRect().bottom")
    assert below == (width == 420)


@pytest.mark.slow
def test_every_control_has_a_name_for_a_screen_reader(opened):
    opened.send("Accessibility.enable")
    nodes = opened.send("Accessibility.getFullAXTree")["nodes"]
    kinds = {"button", "option", "searchbox", "listbox", "image"}
    controls = [node for node in nodes if node.get("role", {}).get("value") in kinds]
    unnamed = [node["role"]["value"] for node in controls if not node["name"].get("value")]
    found = {node["role"]["value"] for node in controls}
    assert found == kinds and unnamed == []
