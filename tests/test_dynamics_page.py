"""The page of training_dynamics.py in a browser: the slider shows what the numbers say, by mouse
and by keyboard, on narrow and wide screens, in light and in dark, and without any network."""

import math

import pytest
import torch
from browser import open_page, text

from experiments.dynamics.measure import BINS
from experiments.dynamics.page import make_page, write_page
from experiments.dynamics.tables import TABLES
from utils import seeded_generator

pytestmark = pytest.mark.slow
STEPS = [0, 1, 2, 4, 8, 16, 32, 600]
VOCABULARY = ["a", " ", "\n", "</script>", "<b>", "&amp;", "\u202e", "z"]


def drawn_subject(name, seed, kinds):
    """A subject of the page with random numbers, whose tokens could end a script."""
    generator = seeded_generator(seed)

    def draw(*shape):
        return torch.rand(shape, generator=generator).tolist()

    windows = torch.randint(8, (2, 30), generator=generator)
    states = []
    for _ in STEPS:
        effect, one, two = draw(3, 4)
        states.append({
            "distance": dict(zip(TABLES, draw(4), strict=True)), "loss": draw(1)[0],
            "by_position": draw(29), "losses": draw(2, 29), "histogram": draw(BINS),
            "guesses": torch.randint(8, (2, 29), generator=generator).tolist(),
            "heads": {"previous token": one, "induction": two, "effect": effect},
            "above": dict(zip(kinds, draw(len(kinds)), strict=True))})
        if not kinds:
            del states[-1]["above"]
    return {"name": name, "unit": "character", "steps": STEPS, "states": states, "start": 5,
            "heads": ["L0H0", "L0H1", "L1H0", "L1H1"], "tables": list(TABLES), "kinds": kinds,
            "tokens": [[VOCABULARY[i] for i in row] for row in windows.tolist()],
            "vocabulary": VOCABULARY, "uniform": math.log(8), "bin": 0.2}


@pytest.fixture(scope="module")
def page():
    return make_page([drawn_subject("one", 0, []), drawn_subject("two", 1, ["copying", "recall"])])


@pytest.fixture
def opened(chromium, page, tmp_path):
    """The browser, with the page open."""
    path = tmp_path / "dynamics.html"
    write_page(path, page)
    yield from open_page(chromium, path)


def texts_of(chromium, selector):
    return chromium.run(f"[...document.querySelectorAll({selector!r})].map(box => box.textContent)")


def says(state, step):
    """What the page says of a state."""
    name = min(TABLES, key=lambda table: state["distance"][table])
    return (f"Step {step} of 600: {state['loss']:.2f} nats a character. The nearest table: {name}, "
            f"{state['distance'][name]:.2f} nats away.")


def test_the_slider_goes_through_the_training_by_keyboard(opened, page):
    states = page["subjects"][0]["states"]
    assert text(opened, "#says") == says(states[5], 16)  # it starts where bigrams are nearest
    opened.run("document.getElementById('step').focus()")
    opened.key("ArrowRight")
    assert text(opened, "#says") == says(states[6], 32)
    opened.key("Home")
    assert text(opened, "#says") == says(states[0], 0)
    assert texts_of(opened, "#distances-key li") == [
        f"{name} {states[0]['distance'][name]:.2f}" for name in TABLES]
    assert opened.run("document.getElementById('step').ariaValueText") == "step 0"


def test_tokens_show_their_loss_and_the_guess(opened, page):
    subject = page["subjects"][0]
    shown = [token.replace("\n", "↵").replace(" ", "·") for token in VOCABULARY]
    boxes = opened.run("[...document.querySelectorAll('.token')].map(box => "
                       "[box.firstChild.data, box.lastChild.textContent, box.title])")
    names = dict(zip(VOCABULARY, shown, strict=True))
    assert [box[0] for box in boxes] == [names[token] for row in subject["tokens"] for token in row]
    state = subject["states"][5]
    for row, pos in ((0, 1), (1, 29)):
        guess = shown[state["guesses"][row][pos - 1]]
        assert boxes[30 * row + pos][1] == guess
        assert f": {state['losses'][row][pos - 1]:.2f} nats; guessed “{guess}”" in (
            boxes[30 * row + pos][2])
    assert boxes[0][1] == boxes[30][1] == ""  # the first token of a window is not predicted


def test_heads_show_the_chosen_score_beside_the_effect(opened, page):
    heads = page["subjects"][0]["states"][5]["heads"]
    for kind in ("previous token", "induction"):
        opened.run(f"$('score').value = {kind!r}; $('score').dispatchEvent(new Event('change'))")
        rows = opened.run("[...$('heads').rows].map(row => [...row.cells].map(c => c.textContent))")
        assert rows == [[name, f"{score:.2f}", f"{effect:.2f}"] for name, score, effect in zip(
            page["subjects"][0]["heads"], heads[kind], heads["effect"], strict=True)]


def test_the_lines_are_drawn_where_the_numbers_are(opened, page):
    states = page["subjects"][0]["states"]
    heights = opened.run("[...document.querySelectorAll('#distances circle')].map(dot => "
                         "250 - 38 - dot.getAttribute('cy'))")
    values = [states[5]["distance"][name] for name in TABLES]
    assert [height / heights[0] for height in heights] == pytest.approx(
        [value / values[0] for value in values], rel=1e-3)
    places = [float(piece.split(" ")[0]) for piece in opened.run(
        "document.querySelector('#distances path').getAttribute('d').slice(1)").split("L")]
    along = [math.log2(step + 1) for step in STEPS]
    assert [(place - places[0]) / (places[-1] - places[0]) for place in places] == pytest.approx(
        [each / along[-1] for each in along], abs=1e-3)


def test_the_other_model_is_chosen_and_shows_its_abilities(opened, page):
    assert opened.run("$('abilities-card').hidden")
    opened.mouse("#subjects > :nth-child(2)", click=True)
    state = page["subjects"][1]["states"][5]
    assert text(opened, "#says") == says(state, 16)
    assert not opened.run("$('abilities-card').hidden")
    assert texts_of(opened, "#abilities-key li") == [
        f"{kind} {state['above'][kind]:.2f}" for kind in ("copying", "recall")]
    pressed = opened.run("[...$('subjects').children].map(button => button.ariaPressed)")
    assert pressed == ["false", "true"]


def test_play_runs_to_the_end_and_stops(opened):
    opened.run("document.getElementById('step').focus()")
    opened.key("End", "ArrowLeft")
    opened.mouse("#play", click=True)
    assert text(opened, "#play") == "pause"
    opened.run("new Promise(done => setTimeout(done, 1000))")
    assert text(opened, "#says").startswith("Step 600 of") and text(opened, "#play") == "play"


@pytest.mark.parametrize("width", [420, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_are_large_enough_and_stand_out_on_every_screen(opened, width, scheme):
    opened.size(width, 900)
    opened.scheme(scheme)
    opened.mouse("#subjects > :nth-child(2)", click=True)
    contrasts, sizes, right = zip(*opened.texts(), strict=True)
    assert min(contrasts) >= 4.5 and min(sizes) >= 11 and max(right) <= width
    assert opened.run("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name_for_a_screen_reader(opened):
    opened.send("Accessibility.enable")
    nodes = opened.send("Accessibility.getFullAXTree")["nodes"]
    kinds = {"button", "slider", "combobox", "image"}
    names = [node.get("name", {}).get("value") for node in nodes
             if node.get("role", {}).get("value") in kinds]
    assert len(names) >= 8 and all(names)
