"""The pictures of the course: as drawn, as the model is, and legible on light and on dark."""

import itertools
import re
from pathlib import Path

import pytest

from config import ModelConfig
from course import pictures
from course.drawing import of_the_model
from course.drawing.sketch import STYLE, Sketch
from model import GPT

ROOT = Path(__file__).resolve().parent.parent
DRAWN = {name: draw().svg() for name, draw in pictures.PICTURES.items()}


def test_the_committed_pictures_are_what_the_program_draws():
    committed = {path.stem: path.read_text("utf-8") for path in pictures.FOLDER.glob("*")}
    assert set(committed) == set(DRAWN)
    for name, svg in DRAWN.items():
        assert committed[name] == svg, f"{name} is old; run python course/pictures.py"


def test_the_course_shows_each_picture_once_and_says_what_is_seen():
    page = (ROOT / "COURSE_ROADMAP.md").read_text("utf-8")
    shown = re.findall(r"!\[([^\]]+)\]\(figures/course/(\w+)\.svg\)", page)
    assert sorted(name for _, name in shown) == sorted(DRAWN)
    assert all(len(seen.split()) >= 10 for seen, _ in shown), "too short to replace the picture"


def test_the_hook_points_of_a_block_are_those_of_the_model():
    points = GPT(ModelConfig(n_layers=1, n_heads=2, d_model=4, d_vocab=3)).hook_points()
    block = {name.removeprefix("blocks.0."): point.is_large for name, point in points.items()
             if name.startswith("blocks.0.")}

    # a dot stands right before its name; an empty one is cached only when it is named
    svg = of_the_model.block_hooks().svg()
    drawn = re.findall(r'<circle class="([\w ]+)".*/>\n<text.*>([\w.]*hook_\w+)</text>', svg)
    assert len(drawn) == len(block)
    assert {name: "full" not in look for look, name in drawn} == block


# Legible


def contrast(one, other):
    """How much lighter one colour is than the other, from 1 to 21 (WCAG 2)."""
    lights = []
    for colour in (one, other):
        shares = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_words_are_legible_on_each_ground_in_light_and_dark():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    light, dark = STYLE.split("@media")
    for part in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", part))
        on_all = itertools.product(("ink", "quiet", "blue", "orange"), ("card", "panel"))
        for words, ground in [*on_all, ("ink", "blue-fill"), ("ink", "orange-fill")]:
            ratio = contrast(colours[words], colours[ground])
            assert ratio >= 4.5, f"{words} on {ground} has a contrast of {ratio:.1f}"


# Each text's frame must lie clear of every line and dot, of every other text, and of the edges of
# boxes. What lies under the text's own box isn't seen.
COLLISIONS = """(() => {
  const frame = (e, air) => { const b = e.getBBox(); return {left: b.x, right: b.x + b.width,
    top: b.y + air, bottom: b.y + b.height - air} };
  const meet = (f, g) => f.left < g.right && g.left < f.right && f.top < g.bottom
    && g.top < f.bottom;
  const holds = (f, g) => f.left < g.left && f.right > g.right && f.top < g.top
    && f.bottom > g.bottom;
  const is_over = (one, other) => other.compareDocumentPosition(one) & 4;  // drawn later
  const all = tags => [...document.querySelectorAll(tags)];
  const rects = all('rect').map(shape => ({shape, frame: frame(shape, 0)}));

  // a line as small squares along it
  const lines = all('path, circle, polygon').map(shape => {
    const half = shape.tagName == 'path' ? parseFloat(getComputedStyle(shape).strokeWidth) / 2 : 1;
    const squares = [];
    for (let at = 0; at <= shape.getTotalLength(); at += 2) {
      const {x, y} = shape.getPointAtLength(at);
      squares.push({left: x - half, right: x + half, top: y - half, bottom: y + half});
    }
    return {shape, squares} });

  const texts = all('text').map(shape => ({shape, frame: frame(shape, 3)}));
  const found = [];
  for (const text of texts) {
    const own = rects.filter(r => !r.shape.matches('.card, .panel') && holds(r.frame, text.frame));
    const is_hidden = shape => own.some(r => is_over(r.shape, shape));
    const met = [
      ...lines.filter(l => !is_hidden(l.shape) && l.squares.some(s => meet(s, text.frame))),
      ...rects.filter(r => meet(r.frame, text.frame) && !holds(r.frame, text.frame)),
      ...texts.filter(t => t !== text && meet(t.frame, text.frame)),
      ...[text].filter(t => parseFloat(getComputedStyle(t.shape).fontSize) < 14)];
    found.push(...met.map(m => [text.shape.textContent, m.shape.outerHTML]));
  }
  return found })()"""


@pytest.mark.slow
def test_no_words_touch_a_line_an_edge_or_other_words(chromium, tmp_path):
    for name, svg in DRAWN.items():
        path = tmp_path / f"{name}.svg"
        path.write_text(svg, encoding="utf-8")
        chromium.open(path)
        for words, met in chromium.run(COLLISIONS):
            pytest.fail(f"{name}: the words {words!r} meet {met}")


@pytest.mark.slow
def test_collisions_are_found(chromium, tmp_path):
    sketch = Sketch("Too much", 160)
    sketch.text(100, 80, "on a line")
    sketch.line([(20, 80), (300, 80)])
    sketch.box(400, 80, "wider than its box", width=60)
    sketch.text(600, 80, "one text")
    sketch.text(620, 84, "another")
    path = tmp_path / "wrong.svg"
    path.write_text(sketch.svg(), encoding="utf-8")
    chromium.open(path)
    named = {words for words, _ in chromium.run(COLLISIONS)}
    assert named == {"on a line", "wider than its box", "one text", "another"}
