"""Pictures of interventions and of the circuit that they find: patching, paths, induction.

In the first two, blue is what belongs to the clean run and orange what belongs to the corrupted
one. In the last, blue is where a head looks and orange what it moves, as in the picture of a head.

Prerequisites: course/drawing/sketch.py, course/drawing/of_the_model.py
"""

from course.drawing.sketch import MARGIN, WIDTH, Sketch

SENDER = 208  # where the parts of path patching stand, from left to right
OTHERS = 352
STREAM = 456
READ = 490

COLOURS = {"clean": "blue", "corrupted": "orange"}
PROMPTS = {"clean": "… Ada gave a kite to", "corrupted": "… Ben gave a kite to"}
ANSWERS = {"clean": "Ben", "corrupted": "Ada"}


def denoising_noising():
    """Two runs of each kind, the clean one above; only the direction of the move differs."""
    sketch = Sketch("Denoising: is it enough? Noising: is it needed?", 452)
    draw_patch(sketch, 64, "clean", "corrupted", "Denoising",
               "If Ben comes back, it is enough.")
    draw_patch(sketch, 256, "corrupted", "clean", "Noising",
               "If Ben is lost, it is needed.")
    return sketch


def draw_patch(sketch, top, source, target, name, verdict):
    """One direction: an activation is moved from the source run to the target run."""
    sketch.panel(MARGIN - 12, top, WIDTH - MARGIN + 12, top + 176)
    sketch.text(MARGIN + 6, top + 24, [(name, "bold"), (f"\u2003{source} into {target}", "quiet")],
                anchor="start")
    sketch.text(WIDTH - MARGIN - 6, top + 24, verdict, anchor="end")
    heights = {"clean": top + 78, "corrupted": top + 136}
    moved = 420

    for run, colour in COLOURS.items():
        y = heights[run]
        is_patched = run == target
        sketch.text(MARGIN + 6, y, run, f"{colour} bold", anchor="start")
        sketch.text(136, y, PROMPTS[run], anchor="start")
        sketch.line([(304, y), (moved, y)], colour)
        sketch.arrow([(moved, y), (570, y)], "" if is_patched else colour)
        for x in (336, 378):
            sketch.dot(x, y, f"full {colour}")
        for x in (462, 504):
            sketch.dot(x, y, "" if is_patched else f"full {colour}")
        sketch.dot(moved, y, f"full {COLOURS[source]}")

        asked = f" → {ANSWERS[source]}?" if is_patched else ""
        sketch.text(580, y, [(ANSWERS[run], f"{colour} bold"), (asked, "bold")], anchor="start")

    # the move
    start = heights[source]
    end = heights[target]
    down = 1 if end > start else -1
    sketch.arrow([(moved, start), (moved, end - 7 * down)], f"{COLOURS[source]} thick")
    sketch.text(moved - 14, (start + end) / 2, "one activation", COLOURS[source], anchor="end")
    sketch.text(483, end + 22 * down, "computed again", "quiet")


def path_patching():
    """The two runs of path patching, and what is handed from the first to the second."""
    sketch = Sketch("Path patching changes one path and nothing else", 512)
    first = draw_parts(sketch, 64, "First run: sender corrupted, others frozen", "orange",
                       hears=False)
    second = draw_parts(sketch, 288, "Second run: only the receiver reads x_r", "blue", hears=True)

    # first run: others don't hear the sender, and what the receiver reads is kept
    sketch.text(SENDER, first - 34, "corrupted value", "orange")
    sketch.line([(OTHERS - 14, first + 30), (OTHERS + 14, first + 30)], "orange thick")
    sketch.text(OTHERS, first + 102, "keep their clean values", "blue")
    sketch.line([(STREAM, first), (READ, first)], "orange")
    sketch.text(568, first - 34, "reads x_r", "orange")

    # second run: everything else is clean
    sketch.text(OTHERS, second + 102, "compute as ever", "blue")
    sketch.arrow([(READ, first), (READ, second - 7)], "orange thick")
    sketch.line([(READ - 14, second - 10), (READ - 14, second + 10)], "blue thick")
    sketch.arrow([(614, second), (638, second)], "orange")
    sketch.arrow([(STREAM, second + 66), (664, second + 66), (664, second + 14)], "blue")
    sketch.text(642, second, "logits", "bold", anchor="start")
    return sketch


def draw_parts(sketch, top, words, sent, *, hears):
    """The panel of one run; returns the height of its upper line.

    sent: the colour of what the sender writes. hears: whether the others read it.
    """
    sketch.panel(MARGIN - 12, top, WIDTH - MARGIN + 12, top + 208)
    sketch.text(MARGIN + 6, top + 24, words, "bold", anchor="start")
    y = top + 92

    # the prompt reaches the sender and the others
    sketch.text(MARGIN, y + 33, "clean prompt", "blue", anchor="start")
    sketch.line([(134, y + 33), (146, y + 33)], "blue")
    sketch.arrow([(146, y + 33), (146, y), (SENDER - 46, y)], "blue")
    sketch.arrow([(146, y + 33), (146, y + 66), (OTHERS - 82, y + 66)], "blue")

    # the stream between sender and receiver is the sum of what they write
    sketch.arrow([(OTHERS, y), (OTHERS, y + (44 if hears else 28))], sent)
    sketch.arrow([(SENDER + 44, y), (STREAM - 10, y)], sent)
    sketch.line([(OTHERS + 80, y + 66), (STREAM, y + 66)], "blue")
    sketch.arrow([(STREAM, y + 66), (STREAM, y + 10)], "blue")
    sketch.box(SENDER, y, "sender", sent, width=88)
    sketch.box(OTHERS, y + 66, "other heads, MLPs", "blue" if hears else "blue dashed", width=160)

    # the receiver
    sketch.line([(STREAM, y), (READ - 14, y)], sent)
    sketch.plus(STREAM, y, sent)
    sketch.arrow([(READ, y), (522, y)], "orange")
    sketch.dot(READ, y, "full orange")
    sketch.box(568, y, "receiver", "orange", width=92)
    return y


def induction_circuit():
    """The two heads of the circuit on "Ada Wren … Ada", between the tokens that they connect."""
    sketch = Sketch("Induction takes two heads, one after the other", 444)
    ada = 96
    wren = 296
    again = 592

    # the tokens, and the stream below two of them
    sketch.line([(wren, 116), (wren, 240)])
    sketch.arrow([(again, 116), (again, 378)])
    for x, word in ((ada, "Ada"), (wren, "Wren"), (444, "…"), (again, "Ada")):
        sketch.box(x, 96, word, words_look="bold")

    # first head
    sketch.arrow([(ada, 116), (ada, 168), (wren - 12, 168)], "orange thick")
    sketch.plus(wren, 168, "orange")
    sketch.text(190, 150, "moves Ada", "orange")
    sketch.text(MARGIN, 194, "1. previous-token head", "bold", anchor="start")
    sketch.text(MARGIN, 216, "in layer 0", "quiet", anchor="start")

    # second head
    sketch.line([(384, 252), (544, 252)], "blue bundle")
    sketch.text(464, 232, "q: after Ada?", "blue")
    sketch.text(464, 274, "k: after Ada", "blue")
    sketch.box(wren, 252, [("Wren", "bold"), (" after Ada", "orange bold")], width=176)
    sketch.box(again, 252, "Ada", words_look="bold")
    sketch.arrow([(wren, 272), (wren, 332), (again - 12, 332)], "orange thick")
    sketch.plus(again, 332, "orange")
    sketch.text(440, 314, "moves Wren", "orange")
    sketch.text(MARGIN, 332, "2. induction head", "bold", anchor="start")
    sketch.text(MARGIN, 354, "in layer 1", "quiet", anchor="start")

    # the answer
    sketch.box(again, 400, "Wren", "orange", words_look="bold")
    sketch.text(again - 60, 400, "the next token", anchor="end")
    return sketch
