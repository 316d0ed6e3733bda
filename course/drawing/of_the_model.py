"""Pictures of the model: the stream, a head, a block, the three calls.

Prerequisites: course/drawing/sketch.py
"""

from course.drawing.sketch import MARGIN, WIDTH, Sketch

STREAM = 64  # where the stream runs down beside a block


def residual_stream():
    """The stream as a bundle of vectors that lie side by side: each part adds one."""
    sketch = Sketch("Every part reads the stream and adds to it", 372)
    bottom = 262
    apart = 12
    end = 572

    # what is in the stream already, and what each part adds on top of it
    sketch.line([(132, bottom), (end, bottom)], "bundle quiet")
    for n_before, (x, name) in enumerate(
            ((184, "attention"), (292, "MLP"), (400, "attention"), (508, "MLP")), 1):
        sketch.box(x, 104, name)
        top = bottom - apart * n_before
        sketch.line([(x + 22, top), (end, top)], "bundle orange")
        sketch.arrow([(x + 22, 124), (x + 22, top - 4)], "orange")
        sketch.arrow([(x - 22, bottom), (x - 22, 125)], "blue")
        for strand in range(n_before):
            sketch.dot(x - 22, bottom - apart * strand, "full blue")
    sketch.text(154, 162, "reads", "blue bold", anchor="end")
    sketch.text(214, 162, "adds", "orange bold", anchor="start")

    # the two ends
    middle = bottom - 2 * apart
    sketch.box(84, bottom, "embed")
    sketch.box(626, middle, "unembed", width=100, height=5 * apart + 16)
    sketch.arrow([(84, 304), (84, bottom + 21)])
    sketch.text(84, 316, "token, position")
    sketch.arrow([(626, middle + 38), (626, 304)])
    sketch.text(626, 316, "logits")
    sketch.text(WIDTH / 2, 346, [("the last stream = ", ""), ("embed", "bold"),
                                 (" + attention + MLP + attention + MLP", "orange bold")])
    return sketch


def qk_ov():
    """A head at the token "to": whom it looks at, and what it fetches from there."""
    sketch = Sketch("QK decides where a head looks, OV what it moves", 454)
    row = 256
    sum_row = 366
    to = 624

    # QK: the query at the last token meets each key; a thick line is much attention
    sketch.text(MARGIN, 76, [("QK circuit: where to look", "blue bold"),
                             ("\u2003q = x W_Q meets k = x W_K", "quiet")], anchor="start")
    sketch.text(WIDTH - MARGIN, 76, "thick: much attention", "quiet", anchor="end")
    for x, word, rise in ((232, "gave", 58), (360, "a", 40), (488, "kite", 22)):
        sketch.curve((to, 200), (x, 200), rise, "blue")
        sketch.line([(x, 312), (x, sum_row)], "orange")
        draw_token(sketch, x, row, word, key="k", value="v", width=32)
    sketch.curve((to, 200), (96, 200), 84, "blue bundle")
    sketch.box(to, 214, "q: who gave?", "blue", width=116, height=28)
    sketch.box(to, row, "to", words_look="bold")

    # OV: the values, weighted by the attention that each gets
    sketch.arrow([(96, 312), (96, sum_row), (to, sum_row), (to, row + 22)], "orange bundle")
    draw_token(sketch, 96, row, "Ada", key="k: a name", value="v: Ada", width=88)
    sketch.box(552, sum_row, "z", "orange", width=44, height=34, words_look="code")
    sketch.box(to, 326, "W_O", "orange", width=60, height=34, words_look="code")
    sketch.text(to + 14, 298, "adds", "orange bold", anchor="start")
    moves = "\u2003z is the weighted sum of v = x W_V; z W_O is added"
    sketch.text(MARGIN, 416, [("OV circuit: what to move", "orange bold"), (moves, "quiet")],
                anchor="start")
    return sketch


def draw_token(sketch, x, y, word, *, key, value, width):
    """A token with its key above it and its value below."""
    sketch.box(x, y - 42, key, "blue", width=width, height=28)
    sketch.box(x, y, word, words_look="bold")
    sketch.box(x, y + 42, value, "orange", width=width, height=28)


def block_hooks():
    """One block, from top to bottom, with all its hook points."""
    sketch = Sketch("Where each hook point of a block stands", 904)
    sketch.dot(MARGIN + 6, 72, "full blue")
    sketch.text(50, 72, [("a hook point; its name begins with ", "quiet"), ("blocks.0.", "code")],
                anchor="start")
    sketch.dot(430, 72, "blue")
    sketch.text(442, 72, "cached only when named", "quiet", anchor="start")

    sketch.panel(128, 148, 692, 664)
    sketch.text(676, 168, "attention", "bold", anchor="end")
    sketch.panel(128, 708, 692, 838)
    sketch.text(676, 820, "MLP", "bold", anchor="end")
    sketch.arrow([(STREAM, 98), (STREAM, 892)], "thick")
    for y, name in ((126, "hook_resid_pre"), (686, "hook_resid_mid"), (860, "hook_resid_post")):
        hook(sketch, STREAM, y, name)
    draw_attention(sketch)
    draw_mlp(sketch)
    return sketch


def hook(sketch, x, y, name, look="full blue", *, below=False):
    """A hook point with its name to the right, or below it."""
    sketch.dot(x, y, look)
    if below:
        sketch.text(x, y + 22, name, "code")
    else:
        sketch.text(x + 12, y, name, "code", anchor="start")


def step(sketch, x, y, words, width):
    """A computation between two hook points."""
    sketch.box(x, y, words, "step", width=width, height=28, words_look="code")


def draw_norm(sketch, left, right, y, name):
    """A LayerNorm from left to right, with its two hook points inside."""
    sketch.box((left + right) / 2, y, "", "step", width=right - left, height=36)
    hook(sketch, left + 22, y, f"{name}.hook_scale")
    hook(sketch, left + 188, y, f"{name}.hook_normalized")


def draw_attention(sketch):
    """From the stream through q, k, v, scores, pattern and z, and back to the stream."""
    q = 196
    k = 366
    v = 536

    # the three inputs, LayerNorm, and the three products
    sketch.line([(STREAM, 184), (v, 184)])
    for x, letter in ((q, "q"), (k, "k"), (v, "v")):
        sketch.arrow([(x, 184), (x, 236)])
        hook(sketch, x, 208, f"hook_{letter}_input", "blue")
        sketch.line([(x, 272), (x, 352)])
        step(sketch, x, 304, f"W_{letter.upper()}", 52)
        hook(sketch, x, 338, f"attn.hook_{letter}")
    draw_norm(sketch, 152, 668, 254, "ln1")

    # scores and pattern
    sketch.arrow([(k, 352), (k, 374), (q + 84, 374)])
    sketch.line([(q, 352), (q, 510), (k - 74, 510)])
    step(sketch, q + 20, 374, "mask(q @ k.T)", 128)
    hook(sketch, q, 408, "attn.hook_attn_scores")
    step(sketch, q + 20, 442, "softmax", 128)
    hook(sketch, q, 476, "attn.hook_pattern")

    # the values, moved and written
    sketch.arrow([(q, 510), (k - 62, 510)])
    sketch.arrow([(v, 352), (v, 510), (k + 62, 510)])
    sketch.line([(k, 524), (k, 610)])
    step(sketch, k, 510, "pattern @ v", 124)
    hook(sketch, k, 544, "attn.hook_z")
    step(sketch, k, 572, "W_O", 52)
    hook(sketch, k, 600, "attn.hook_result", "blue")

    # back to the stream
    sketch.arrow([(k, 628), (STREAM + 10, 628)])
    step(sketch, k, 628, "sum over heads", 144)
    hook(sketch, 190, 628, "hook_attn_out", below=True)
    sketch.plus(STREAM, 628)


def draw_mlp(sketch):
    """From the stream through LayerNorm and the neurons, and back to the stream."""
    sketch.arrow([(STREAM, 740), (298, 740)])
    hook(sketch, 200, 740, "hook_mlp_in", below=True)
    draw_norm(sketch, 298, 672, 740, "ln2")
    sketch.line([(636, 758), (636, 782)])

    sketch.arrow([(636, 790), (STREAM + 10, 790)])
    step(sketch, 636, 790, "W_in", 60)
    hook(sketch, 548, 790, "mlp.hook_pre", below=True)
    step(sketch, 458, 790, "gelu", 60)
    hook(sketch, 366, 790, "mlp.hook_post", below=True)
    step(sketch, 274, 790, "W_out", 64)
    hook(sketch, 188, 790, "hook_mlp_out", below=True)
    sketch.plus(STREAM, 790)


def three_calls():
    """A run in three calls, and below it one that begins in the middle."""
    sketch = Sketch("A run is three calls, and it can restart halfway", 386)
    sketch.text(MARGIN, 74, "model.unembed(model.run_blocks(model.embed(tokens)))", "code",
                anchor="start")
    sketch.text(MARGIN, 354, "model.unembed(model.run_blocks(resid, start=1))", "code orange",
                anchor="start")
    draw_run(sketch, 152)
    draw_run(sketch, 290, restarted=True)

    # the stream that is handed down
    between = 309
    sketch.dot(between, 152, "full orange")
    sketch.arrow([(between, 152), (between, 290), (334, 290)], "orange")
    sketch.text(between + 14, 210, 'resid = cache["resid_pre", 1]', "orange code", anchor="start")
    sketch.text(between - 14, 210, "the stream, kept or edited", "orange", anchor="end")
    return sketch


def draw_run(sketch, y, *, restarted=False):
    """One run, from left to right. restarted: all before block 1 is left out."""
    before = "quiet dashed" if restarted else ""
    after = "orange" if restarted else ""
    words = "quiet" if restarted else ""

    # the blocks, and the call that runs them
    sketch.panel(228, y - 50, 488, y + 32)
    sketch.text(358, y - 34, "run_blocks", "code")
    sketch.box(266, y, "block 0", before, width=60, words_look=words)
    sketch.box(364, y, "block 1", after, width=60)
    sketch.box(446, y, "block 2", after, width=60)
    sketch.arrow([(394, y), (416, y)], after)

    # the two other calls
    sketch.text(MARGIN, y, "tokens", words, anchor="start")
    sketch.arrow([(84, y), (102, y)], before)
    sketch.box(136, y, "embed", before, width=68, words_look=f"code {words}")
    sketch.arrow([(170, y), (236, y)], before)
    sketch.arrow([(476, y), (548, y)], after)
    sketch.box(586, y, "unembed", after, width=76, words_look="code")
    sketch.arrow([(624, y), (642, y)], after)
    sketch.text(648, y, "logits", after, anchor="start")
    if not restarted:
        sketch.arrow([(296, y), (334, y)])
        sketch.text(199, y - 16, "resid", "code")
        sketch.text(518, y - 16, "resid", "code")
