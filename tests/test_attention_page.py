"""The page of attention_visualization.py in a browser, with real mouse and key events: it shows the
right numbers without delay, for 200 tokens and 144 heads, and without any network."""

import re
import statistics

import numpy as np
import pytest
import torch
from browser import open_page, text

from experiments.attention_page.page import (
    pack_patterns,
    unpack_patterns,
    write_page,
    written_scale,
    written_shares,
)
from utils import seeded_generator

pytestmark = pytest.mark.slow


def page_of(pattern, tokens, mute=None):
    """A page of patterns [layer, head, pos, pos]; the head number `mute` writes nothing."""
    n_layers, n_heads, n_pos, _ = pattern.shape
    numbers = torch.rand(n_layers * n_heads, 3, generator=seeded_generator(0)).tolist()
    heads = []
    for index, (effect, here, elsewhere) in enumerate(numbers):
        layer, head = divmod(index, n_heads)
        low, high = effect - 0.3, effect + 0.1
        written = [0.0 if index == mute else 1 + (key % 5) for key in range(n_pos)]
        heads.append({"name": f"L{layer}H{head}", "layer": layer, "head": head, "effect": effect,
                      "low": low, "high": high, "verdict": "needed" if low > 0 else "idle",
                      "scores": {"previous token": [here, elsewhere],
                                 "induction": [None, elsewhere / 2]}, "written": written})
    page = {"first": "opens at", "start": max(range(len(heads)), key=lambda k: heads[k]["effect"]),
            "sharpest": 0, "command": "python x.py --text", "readable": "2 to 9 tokens",
            "about": "about", "reading": "reading", "tokens": tokens, "heads": heads,
            "meanings": {"previous token": "looks one back", "induction": "looks at a copy"},
            "patterns": pack_patterns(pattern),
            "stream": [[1 + (query % 3) for query in range(n_pos)]] * n_layers}
    return page | {"written": written_scale(written_shares(page))}


def drawn_page(n_layers, n_heads, n_pos, mute=3):
    """A page of random patterns; the last two tokens are what could end the script that holds
    them."""
    pattern = torch.randn(n_layers, n_heads, n_pos, n_pos, generator=seeded_generator(0)) * 3
    pattern = pattern.masked_fill(torch.ones(n_pos, n_pos).triu(1).bool(), -torch.inf).softmax(-1)
    tokens = [f" w{k}" for k in range(n_pos - 3)] + ["\n", "</script>", "<!--"]
    return page_of(pattern, tokens, mute)


@pytest.fixture(scope="module")
def large():
    """(page, its patterns [head, pos, pos]) of 144 heads on 200 tokens."""
    page = drawn_page(12, 12, 200)
    return page, unpack_patterns(page)


@pytest.fixture
def opened(chromium, large, tmp_path):
    """The browser, with the large page open."""
    yield from open_drawn(chromium, large[0], tmp_path)


@pytest.fixture
def by_hand(chromium, tmp_path):
    """The browser, with a page open whose one head is drawn by hand: its tokens look at themselves,
    but c at a, and e at b with 60 % and at d with 4 %."""
    pattern = torch.eye(5)
    pattern[2] = torch.tensor([1.0, 0, 0, 0, 0])
    pattern[4] = torch.tensor([0, 0.6, 0, 0.04, 0.36])
    yield from open_drawn(chromium, page_of(pattern[None, None], list("abcde")), tmp_path)


def open_drawn(chromium, page, folder):
    """The browser with a page open, as a fixture's generator."""
    path = folder / "attention.html"
    write_page(path, page)
    yield from open_page(chromium, path)


def token(k):
    return f"#tokens > :nth-child({k + 1})"


def card(k):
    return f"#heads > :nth-child({k + 1})"


def seen(chromium):
    """The token that each card names as the one its head looks at."""
    return chromium.run("cards.map(card => card.sees.textContent)")


def drawn_lines(chromium):
    """{(query, key): thickness} of the lines that are drawn now."""
    lines = chromium.run("""(() => { const found = []; const own = drawLine;
      window.drawLine = (c, i, j, wide) => { found.push([i, j, c.lineWidth]); own(c, i, j, wide) };
      paintArcs(); window.drawLine = own; return found })()""")
    return {(i, j): thickness for i, j, thickness in lines}


def as_shown(page):
    """The tokens as the page writes them."""
    return [token.replace("\n", "↵").replace(" ", "·") for token in page["tokens"]]


def shortened(name):
    """A token as a card writes it, in at most six characters."""
    return name if len(name) <= 6 else f"{name[:5]}…"


def shares(values):
    """Whole percents, halves upwards, as the page rounds them."""
    return np.floor(100 * values + 0.5).astype(int)


def test_the_page_holds_the_patterns_that_were_packed(opened, large):
    page, patterns = large
    sums = opened.run("cards.map(({ h }) => { let sum = 0; for (let i = 0; i < n; i++) "
                      "for (let j = 0; j < n; j++) sum += weight(h, i, j) * (i + 2 * j); "
                      "return sum })")
    i, j = np.indices(patterns.shape[1:])
    assert sums == pytest.approx((patterns * (i + 2 * j)).sum((1, 2)))
    assert opened.run("[...document.querySelectorAll('.token')].map(box => box.firstChild.data)"
                      ) == as_shown(page)


@pytest.mark.parametrize("k", [0, 57, 199])
def test_the_mouse_on_a_token_shows_where_every_head_looks(opened, large, k):
    page, patterns = large
    opened.mouse(token(k))
    best, names = patterns[:, k].argmax(1), as_shown(page)
    share = shares(patterns[:, k].max(1))
    assert seen(opened) == [f"→ {share}\xa0% “{shortened(names[key])}”"
                            for key, share in zip(best, share, strict=True)]
    start = page["start"]
    assert f"token {k}, “{names[k]}”, looks at token {best[start]}" in text(opened, "#says")
    under = opened.run("tokenBoxes.map(box => box.lastChild.textContent)")
    row = patterns[start, k]
    assert under == [str(s) if w >= 0.01 else "" for s, w in zip(shares(row), row, strict=True)]


def test_it_also_shows_which_tokens_look_at_a_token(opened, large):
    page, patterns = large
    opened.mouse("#backwards", click=True)
    opened.mouse(token(57))
    best, names = patterns[:, :, 57].argmax(1), as_shown(page)
    assert [line.split("“")[1] for line in seen(opened)] == [
        f"{shortened(names[q])}”" for q in best]
    assert all(line.startswith("←") for line in seen(opened))
    assert f"is looked at most by token {best[page['start']]}" in text(opened, "#says")


def test_a_click_holds_a_token_and_escape_lets_go(opened):
    opened.mouse(token(5), click=True)
    opened.mouse(token(9))
    assert "token 5," in text(opened, "#says") and "held" in text(opened, "#says")
    opened.mouse(token(7), click=True)  # another one is held in its place
    opened.mouse(token(9))
    assert "token 7," in text(opened, "#says") and "held" in text(opened, "#says")
    opened.key("Escape")
    opened.mouse(token(10))
    opened.mouse(token(9))
    assert "token 9," in text(opened, "#says") and "held" not in text(opened, "#says")


def test_the_keyboard_alone_moves_through_tokens_and_heads(opened, large):
    focus = "document.activeElement"
    for _ in range(12):
        opened.key("Tab")
        if opened.run(f"{focus}.classList.contains('token')"):
            break
    opened.key("Home", "ArrowRight", "ArrowRight", "ArrowLeft")
    assert "token 1," in text(opened, "#says")
    opened.key("Enter")
    assert "held" in text(opened, "#says")
    for _ in range(40):
        opened.key("Tab")
        if opened.run(f"{focus}.classList.contains('card')"):
            break
    start = large[0]["start"]
    assert large[0]["heads"][start]["name"] in opened.run(f"{focus}.textContent")
    opened.key("ArrowLeft")
    name = "Head L{}H{}: layer {}, head {}"
    assert text(opened, "#name") == name.format(*2 * divmod(start - 1, 12))
    opened.key("ArrowUp")
    wide = opened.run("[...new Set(cards.map(card => card.box.offsetLeft))].length")
    assert text(opened, "#name") == name.format(*2 * divmod(start - 1 - wide, 12))
    assert opened.run("document.querySelectorAll('[aria-checked=true]').length") == 1
    assert opened.run(f"{focus}.getAttribute('aria-checked')") == "true"
    assert "token 1," in text(opened, "#says")
    assert opened.run(f"getComputedStyle({focus}).outlineStyle") == "solid"  # focus is seen


def test_layers_and_heads_can_be_picked(opened):
    visible = "cards.filter(card => card.box.offsetParent).map(card => heads[card.h].name)"
    opened.mouse("#layers > :nth-child(3)", click=True)
    assert opened.run(visible) == [f"L2H{head}" for head in range(12)]
    opened.mouse("#numbers > :nth-child(5)", click=True)
    assert opened.run(visible) == ["L2H4"] and text(opened, "#name").startswith("Head L2H4")
    opened.mouse("#layers > :nth-child(3)", click=True)
    assert opened.run(visible) == [f"L{layer}H4" for layer in range(12)]


@pytest.mark.parametrize(("key", "value"), [
    ("effect", lambda head: head["effect"]),
    ("previous token", lambda head: head["scores"]["previous token"][1]),
])
def test_heads_are_ordered_by_effect_or_by_score(opened, large, key, value):
    opened.run(f"$('order').value = '{key}'; $('order').dispatchEvent(new Event('change'))")
    order = opened.run("[...$('heads').children].map(box => box.querySelector('b').textContent)")
    assert order == [head["name"] for head in sorted(large[0]["heads"], key=value, reverse=True)]


def weigh(page, patterns):
    """What the heads write, as shares of the stream: [head, query, key]."""
    written = np.array([head["written"] for head in page["heads"]])
    return patterns * written[:, None] / np.array(page["stream"][0])[:, None]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_head_that_writes_nothing_is_blank_when_weighted_by_its_write(opened, large, scheme):
    page, patterns = large
    opened.scheme(scheme)
    pixel = ("((h, i) => [...cards[h].canvas.getContext('2d').getImageData(0, i, 200, 1).data]"
             ".filter((_, k) => k % 4 == 0))")
    red = "Array.from(palette).map(colour => colour & 255)"
    reds = np.array(opened.run(red))
    row = patterns[3, 199]
    assert opened.run(f"{pixel}(3, 199)") == reds[np.rint(255 * row).astype(int)].tolist()
    opened.mouse("#weighted", click=True)
    assert set(opened.run(f"{pixel}(3, 199)")) == {reds[0]}

    # another head, at the query with its largest cell, which is beyond the end of the colours
    weighed = weigh(page, patterns)
    full = np.percentile(weighed[weighed > 0], 99)
    query = weighed[2].max(1).argmax()
    assert weighed[2, query].max() > 1.2 * full
    drawn = np.minimum(1, weighed[2, query, : query + 1] / full)
    found = opened.run(f"{pixel}(2, {query})")[: query + 1]
    assert found == reds[np.floor(255 * drawn + 0.5).astype(int)].tolist()


def test_the_page_opens_at_the_head_that_is_needed_most_and_says_so(opened, large):
    page, _ = large
    start = page["start"]
    assert start > 0 and text(opened, "#first") == page["first"]
    assert text(opened, "#name").startswith(f"Head {page['heads'][start]['name']}:")
    buttons = "[...document.querySelectorAll('#starts button')].map(button => button.textContent)"
    assert opened.run(buttons) == [f"Open {page['heads'][start]['name']}", "Open L0H0"]
    opened.mouse("#starts > :nth-child(2)", click=True)
    assert text(opened, "#name").startswith("Head L0H0:")
    opened.mouse("#starts > :nth-child(1)", click=True)
    assert text(opened, "#name").startswith(f"Head {page['heads'][start]['name']}:")
    assert text(opened, "#command") == page["command"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_way_of_colouring_has_a_legend_with_its_values_and_its_unit(opened, large, scheme):
    page, patterns = large
    opened.scheme(scheme)
    ends = "[...$('ends').children].map(end => end.textContent.replace('\xa0', ' '))"
    assert opened.run(ends) == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    assert "of its attention" in text(opened, "#colours")
    first, *_, last = opened.run("steps")
    ramp = opened.run("getComputedStyle($('ramp')).backgroundImage").replace(" ", "")
    assert ramp == f"linear-gradient(90deg,{first},{last})"

    opened.mouse("#weighted", click=True)
    weighed = weigh(page, patterns)
    full = np.percentile(weighed[weighed > 0], 99)
    *values, end = opened.run(ends)
    assert values == [f"{shares(part * full)} %" for part in (0, 0.25, 0.5, 0.75)]
    assert end == f"{shares(full)} % or more"
    words = text(opened, "#colours").replace("\xa0", " ")
    assert "share of the residual stream" in words
    assert f"above {shares(full)} % (up to {shares(weighed.max())} %) are equally dark" in words
    assert f"{shares(full)}\xa0% or more" in text(opened, "#widths")

    low, high = (extreme([head[end] for head in page["heads"]])
                 for end, extreme in (("low", min), ("high", max)))
    assert low < 0 and text(opened, "#low").replace("−", "-") == f"{low:+.3f}"
    assert text(opened, "#high") == f"{high:+.3f} nats a token"


# The lines


def test_the_lines_are_the_larger_weights_and_as_thick_as_they_weigh(opened, large):
    page, patterns = large
    pattern = patterns[page["start"]]
    strong = {(i, j): w for (i, j), w in np.ndenumerate(pattern) if w >= 0.05}
    assert drawn_lines(opened) == pytest.approx({pair: 8 * w for pair, w in strong.items()})
    assert f"left out: {20_100 - len(strong):,} of 20,100." in text(opened, "#left-out")
    assert "under 5\xa0%" in text(opened, "#left-out")

    weighed = weigh(page, patterns)
    scaled = np.minimum(1, weighed[page["start"]] / np.percentile(weighed[weighed > 0], 99))
    opened.mouse("#weighted", click=True)
    strong = {(i, j): w for (i, j), w in np.ndenumerate(scaled) if w >= 0.05}
    assert drawn_lines(opened) == pytest.approx({pair: 8 * w for pair, w in strong.items()})


@pytest.mark.parametrize("way", ["text", "lines", "matrix"])
@pytest.mark.parametrize("backwards", [False, True])
def test_at_a_token_only_its_lines_are_drawn(by_hand, way, backwards):
    every = {(0, 0), (1, 1), (2, 0), (3, 3), (4, 1), (4, 4)}
    if backwards:
        by_hand.mouse("#backwards", click=True)
    assert set(drawn_lines(by_hand)) == every
    side = by_hand.run("$('large').clientWidth")
    [_, room, cell] = by_hand.run("largeSizes()")
    row = by_hand.run("ROW")

    def point(k):
        if way == "text":
            by_hand.mouse(token(k))
        elif way == "lines":
            by_hand.mouse("#arcs", at=(120, (k + 0.5) * row))
        else:
            across = [side - cell / 2, room + (k + 0.5) * cell]
            by_hand.mouse("#large", at=across[::-1] if backwards else across)

    for k in range(5):
        point(k)
        assert set(drawn_lines(by_hand)) == {pair for pair in every if pair[backwards] == k}
    assert "of “e”" in text(by_hand, "#left-out")
    by_hand.mouse("h1")
    assert set(drawn_lines(by_hand)) == every


def test_a_tap_or_a_click_holds_a_token_of_the_lines_until_escape(by_hand):
    at = (120, 4.5 * by_hand.run("ROW"))
    for hold in (by_hand.tap, lambda *place: by_hand.mouse(*place[:1], click=True, at=place[1])):
        hold("#arcs", at)
        by_hand.mouse("h1")
        assert set(drawn_lines(by_hand)) == {(4, 1), (4, 4)}
        assert "left out: 3 of 5 of “e”" in text(by_hand, "#left-out")
        by_hand.key("Escape")
        assert len(drawn_lines(by_hand)) == 6


def test_a_line_leads_from_a_token_to_the_one_that_it_looks_at(by_hand):
    alpha = ("((x, y, width) => [...$('arcs').getContext('2d').getImageData(x, y, width, 1).data]"
             ".filter((_, k) => k % 4 == 3))")
    right = by_hand.run("$('arcs').width") - 95
    row = by_hand.run("ROW")
    for query, key, weight in ((4, 1, 0.6), (2, 0, 1.0)):
        by_hand.run(f"look({query})")
        # half way between the two, the arc is upright: its pixels across are its thickness
        across = sum(by_hand.run(f"{alpha}(95, {row * (query + key + 1) // 2}, {right})"))
        assert across / (0.75 * 255) == pytest.approx(8 * weight, abs=0.2)
        begins = [by_hand.run(f"{alpha}(95, {row * k + row // 2}, 1)")[0] > 100 for k in range(5)]
        assert begins == [k in (query, key) for k in range(5)]


# Words


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("mode", ["plain", "weighted"])
def test_words_stand_out_from_what_is_behind_them(opened, scheme, mode):
    opened.scheme(scheme)
    opened.run("for (const each of document.querySelectorAll('details')) each.open = true")
    opened.mouse(f"#{mode}", click=True)
    opened.mouse(token(60))
    ratios = [contrast for contrast, _, _ in opened.texts()]
    assert len(ratios) > 300 and min(ratios) >= 4.5  # WCAG 2, level AA


@pytest.mark.parametrize("width", [420, 900, 1400])
@pytest.mark.parametrize("mode", ["plain", "weighted"])
def test_no_word_is_small_or_cut_and_the_page_does_not_scroll_sideways(opened, width, mode):
    opened.size(width, 900)
    opened.run("for (const each of document.querySelectorAll('details')) each.open = true")
    opened.mouse(f"#{mode}", click=True)
    opened.mouse(token(30))
    assert "token 30," in text(opened, "#says")
    assert opened.run("document.documentElement.scrollWidth") <= width
    assert min(size for _, size, _ in opened.texts()) >= 11
    assert opened.cut_texts() == []


@pytest.mark.parametrize("width", [420, 1400])
@pytest.mark.parametrize("n_pos", [5, 36, 200])
def test_tokens_beside_the_pictures_are_large_whole_and_apart(chromium, tmp_path, width, n_pos):
    for opened in open_drawn(chromium, drawn_page(1, 2, n_pos), tmp_path):
        opened.size(width, 900)
        opened.run("look(3)")
        words = opened.canvas_texts("showAll()")
        sizes = opened.run("({ large: [$('large').width, $('large').height], "
                           "arcs: [$('arcs').width, $('arcs').height] })")
        for word in words:
            assert word["size"] >= 11 and not word["squeezed"]
            for end in word["ends"]:
                assert all(0 <= x <= most for x, most in zip(end, sizes[word["id"]], strict=True))

        kinds = {"arcs": [], "rows": [], "columns": []}
        for word in words:
            (left, y), (_, end) = word["ends"]
            lies = abs(y - end) < 1e-6
            kind = "arcs" if word["id"] == "arcs" else "rows" if lies else "columns"
            kinds[kind].append(y if lies else left)
        for kind, places in kinds.items():
            assert len(places) >= 5 and min(np.diff(sorted(places))) >= 11, kind
        assert len(kinds["arcs"]) == n_pos
        assert sum(word["text"] == "·w3" for word in words) >= (3 if n_pos > 6 else 0)


def test_every_control_has_a_name_for_a_screen_reader(opened):
    opened.send("Accessibility.enable")
    nodes = opened.send("Accessibility.getFullAXTree")["nodes"]
    kinds = {"button", "radio", "option", "combobox", "listbox", "radiogroup", "image", "status"}
    controls = [node for node in nodes if node.get("role", {}).get("value") in kinds]
    unnamed = [node["role"]["value"] for node in controls
               if not node.get("name", {}).get("value") and node["role"]["value"] != "status"]
    assert len(controls) > 300 and unnamed == []
    names = [node["name"]["value"] for node in controls]
    assert "57: ·w57" in names and "show only layer 3" in names
    pressed = [node for node in controls if node["role"]["value"] == "button"]
    assert all(re.match("Show |show |Open ", node["name"]["value"]) for node in pressed)
    assert all(node.get("description", {}).get("value") for node in pressed)
    assert any(name.startswith("head L0H0, needed: +0.") for name in names)


def test_200_tokens_and_144_heads_are_drawn_without_lag(opened):
    took = """(async (step, times) => { const found = []; for (let k = 0; k < times; k++) {
      const began = performance.now(); step(k); document.body.getBoundingClientRect();
      found.push(performance.now() - began); await new Promise(requestAnimationFrame) }
      return found })"""
    look = statistics.median(opened.run(f"{took}(k => look(k * 7), 25)"))
    redraw = statistics.median(opened.run(f"{took}(showAll, 9)"))
    print(f"another token {look:.0f} ms, all pictures {redraw:.0f} ms")
    assert look < 50 and redraw < 500


def test_on_a_narrow_screen_a_chosen_head_is_brought_into_sight(opened):
    opened.size(420, 800)
    opened.mouse(card(9), click=True)
    assert text(opened, "#name") == "Head L0H9: layer 0, head 9"
    assert 0 <= opened.run("$('name').getBoundingClientRect().top") <= 800
