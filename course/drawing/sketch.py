"""A picture made of boxes, arrows, dots and words, written as SVG text.

The same calls give the same text, so a committed picture can be compared with what is drawn now.
A picture lies on a card of its own, which is dark where the reader's system is: its words are
legible on any page. Its width is 720, near the width of a page on GitHub.

    sketch = Sketch("A part reads the stream", height=160)
    sketch.box(120, 100, "stream")
    sketch.arrow([(170, 100), (250, 100)], "blue")
    sketch.svg()

A *look* is one or more words: "blue", "orange" or "quiet" for the colour; "bold" or "code" for
words; "dashed", "thick" or "bundle" for lines. What a colour means is up to each picture.

Source: W3C, Scalable Vector Graphics 1.1; Okabe & Ito 2008 (colours)
"""

import math
from html import escape

WIDTH = 720
MARGIN = 32
FONT_SIZE = 15
HEADS = {"thick": 14, "bundle": 17}  # how long an arrow's head is where its line is not thin

STYLE = """
svg { --card: #ffffff; --edge: #d0d7de; --panel: #f6f8fa; --ink: #1f2328; --quiet: #59636e;
  --blue: #0067a3; --blue-fill: #e3f0fa; --orange: #b34700; --orange-fill: #fdecdf }
@media (prefers-color-scheme: dark) {
  svg { --card: #161b22; --edge: #3d444d; --panel: #1f262e; --ink: #e6edf3; --quiet: #9da7b3;
    --blue: #62b5f5; --blue-fill: #12304a; --orange: #ffa05c; --orange-fill: #45260f }
}
text { font: 15px "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink) }
.title { font-size: 19px; font-weight: 600 }
.bold { font-weight: 600 }
.code { font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
text.quiet, tspan.quiet { fill: var(--quiet) }
text.blue, tspan.blue { fill: var(--blue) }
text.orange, tspan.orange { fill: var(--orange) }
rect, circle { fill: var(--card); stroke: var(--ink); stroke-width: 1.5 }
rect.card { fill: var(--card); stroke: var(--edge); stroke-width: 1 }
rect.panel { fill: var(--panel); stroke: none }
rect.step { stroke: var(--edge) }
rect.quiet { stroke: var(--quiet) }
rect.blue { fill: var(--blue-fill); stroke: var(--blue) }
rect.orange { fill: var(--orange-fill); stroke: var(--orange) }
circle { stroke-width: 2 }
circle.blue { stroke: var(--blue) }
circle.orange { stroke: var(--orange) }
circle.full { fill: var(--ink) }
circle.full.blue { fill: var(--blue) }
circle.full.orange { fill: var(--orange) }
path { fill: none; stroke: var(--ink); stroke-width: 2; stroke-linejoin: round }
path.quiet { stroke: var(--quiet) }
path.blue { stroke: var(--blue) }
path.orange { stroke: var(--orange) }
.dashed { stroke-dasharray: 5 4 }
path.thick { stroke-width: 4 }
path.bundle { stroke-width: 7 }
polygon { fill: var(--ink) }
polygon.quiet { fill: var(--quiet) }
polygon.blue { fill: var(--blue) }
polygon.orange { fill: var(--orange) }
"""


def number(value):
    """A coordinate as it is written, with at most one digit after the point."""
    return f"{round(value, 1):g}"


def place(point):
    """A point as SVG writes it: "x,y"."""
    return ",".join(map(number, point))


class Sketch:
    """A picture that is being drawn. Coordinates are pixels from the upper left corner.

    title: the idea of the picture in one sentence; it stands on top. height: in pixels.
    """

    def __init__(self, title, height):
        self.title = title
        self.height = height
        self.pieces = []
        self.add("rect", "card", x=0.5, y=0.5, width=WIDTH - 1, height=height - 1, rx=12)
        self.text(MARGIN, 38, title, "title", anchor="start")

    def add(self, tag, look, **attributes):
        """Adds an element without words."""
        written = "".join(f' {name}="{value if isinstance(value, str) else number(value)}"'
                          for name, value in attributes.items())
        self.pieces.append(f'<{tag} class="{look}"{written}/>')

    def text(self, x, y, words, look="", anchor="middle"):
        """Writes one line, whose middle is at the height y.

        words: a string, or a list of (string, look) for words that look differently. anchor: which
        part of the line is at x: start, middle or end.
        """
        if isinstance(words, str):
            inside = escape(words, quote=False)
        else:
            inside = "".join(f'<tspan class="{own}">{escape(part)}</tspan>' for part, own in words)
        baseline = number(y + 0.35 * FONT_SIZE)
        self.pieces.append(f'<text class="{look}" x="{number(x)}" y="{baseline}" '
                           f'text-anchor="{anchor}">{inside}</text>')

    def panel(self, left, top, right, bottom):
        """A quiet area behind what belongs together."""
        self.add("rect", "panel", x=left, y=top, width=right - left, height=bottom - top, rx=10)

    def box(self, x, y, words, look="", *, width=96, height=40, words_look=""):
        """A box around the point (x, y) with words in its middle."""
        self.add("rect", look, x=x - width / 2, y=y - height / 2, width=width, height=height, rx=8)
        if words:
            self.text(x, y, words, words_look)

    def dot(self, x, y, look="full"):
        """A dot; "full" for a filled one."""
        self.add("circle", look, cx=x, cy=y, r=5)

    def plus(self, x, y, look=""):
        """A plus sign in a circle: here something is added to a line."""
        self.add("circle", look, cx=x, cy=y, r=9)
        self.line([(x - 5, y), (x + 5, y)], look)
        self.line([(x, y - 5), (x, y + 5)], look)

    def line(self, points, look=""):
        """A line from point to point."""
        self.add("path", look, d="M" + " L".join(map(place, points)))

    def curve(self, start, end, rise, look=""):
        """A curve between two points of one height that leaves both straight up, by `rise`."""
        bends = [(x, y - rise * 4 / 3) for x, y in (start, end)]
        self.add("path", look, d=f"M{place(start)} C{' '.join(map(place, [*bends, end]))}")

    def arrow(self, points, look=""):
        """A line from point to point with a head at its last."""
        (x, y), end = points[-2:]
        length = math.dist((x, y), end)
        head = next((size for word, size in HEADS.items() if word in look), 9)
        along = (end[0] - x) / length, (end[1] - y) / length
        base = end[0] - head * along[0], end[1] - head * along[1]
        side = head / 2 * along[1], head / 2 * along[0]
        corners = [end, (base[0] - side[0], base[1] + side[1]),
                   (base[0] + side[0], base[1] - side[1])]

        self.line([*points[:-1], base], look)
        self.add("polygon", look, points=" ".join(map(place, corners)))

    def svg(self):
        """The picture as the text of an SVG file."""
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.height}" '
                f'viewBox="0 0 {WIDTH} {self.height}" role="img">')
        lines = [head, f"<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>",
                 *self.pieces, "</svg>"]
        return "\n".join(lines) + "\n"
