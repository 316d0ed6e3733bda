"""The benchmark: floors counted by hand against what really happens, ratios, and the page."""

import itertools

import pytest
import torch
from helpers import TINY, quick_run, refusal, scramble_, tiny_model, tiny_tokens
from torch.utils.flop_counter import FlopCounterMode

from circuits import Circuit, acdc
from config import ModelConfig
from experiments.benchmark import BenchmarkConfig
from experiments.common import Claim, as_dicts, claims_table, exit_code, take_turns
from experiments.speed.floors import (
    Work,
    acdc_work,
    block_weights,
    decoding_work,
    dictionary_work,
    edge_products,
    forward_work,
    gradient_work,
    mlp_weights,
    path_matrix_work,
    sweep_work,
    training_work,
)
from experiments.speed.measure import (
    NO_COUNT,
    PRODUCT,
    READING,
    exponent,
    measure_row,
    peak_bytes,
    row_claims,
    scaling_claims,
)
from experiments.speed.model import (
    Setting,
    dictionary_step,
    hook_point_work,
    passed_hook_points,
    weight_products,
)
from experiments.speed.report import (
    BEGIN,
    END,
    benchmark_figure,
    benchmark_tables,
    headlines,
    replace_between_marks,
    scaling_figure,
    summarize_benchmark,
)
from experiments.speed.rows import PEAK, TIME, Row
from hooks import HookPoint
from metrics import Metric
from model import GPT

CPU = torch.device("cpu")
N_POS = 5  # of the re-runs that are counted


def counted_products(run):
    """The multiplications in matrix products that torch counts while a function runs."""
    with FlopCounterMode(display=False) as counter:  # it knows products, not the fused kernel
        run()
    return counter.get_total_flops() // 2


# Turns


def test_contestants_take_turns_and_the_first_round_is_not_measured():
    order = []
    contestants = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = take_turns(contestants, 3)
    assert order == list("ab") * 4
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_turns_end_after_three_measured_rounds_when_the_time_is_up():
    assert len(take_turns({"a": lambda: None}, 9, most_seconds=0.0)["a"]) == 3


def test_times_are_those_of_the_clock_that_is_given():
    ticks = itertools.count()
    assert take_turns({"a": lambda: None}, 2, clock=lambda: next(ticks))["a"].tolist() == [1, 1]


# Floors


def causal_forward(model, tokens):
    """The logits of a model without norms' or activations' shortcuts: each query meets the keys up
    to its own position, one query at a time."""
    resid = model.embed(tokens)
    for block in model.blocks:
        shared = block.ln1(resid)
        q, k, v = block.attn.project(shared, shared, shared)  # each [batch, pos, head, d_head]
        z = torch.zeros_like(q)
        for query in range(tokens.shape[1]):
            keys, values = (each[:, : query + 1].transpose(1, 2) for each in (k, v))
            scores = q[:, query, :, None] @ keys.transpose(2, 3) / block.attn.d_head**0.5
            z[:, query] = (scores.softmax(-1) @ values)[:, :, 0]
        resid = block.after_attention(resid + block.attn.write(z))
    return model.unembed(resid)


@torch.no_grad()
def test_the_products_of_a_forward_are_those_of_a_naive_causal_one():
    model, tokens = tiny_model(), tiny_tokens(batch=3, pos=7)
    assert torch.allclose(causal_forward(model, tokens), model(tokens), atol=1e-4)
    counted = counted_products(lambda: causal_forward(model, tokens))
    assert forward_work(model.cfg, 3, 7).n_products == counted
    forward = forward_work(model.cfg, 3, 9).n_products
    assert training_work(model.cfg, 3, n_steps=2).n_products == 2 * 3 * forward


def test_the_weight_products_are_those_of_the_model():
    model, tokens = tiny_model(), tiny_tokens(batch=3, pos=7)
    pairs = 3 * 28 * 2 * model.cfg.d_model * model.cfg.n_layers
    counted = counted_products(weight_products(model, tokens))
    assert counted == forward_work(model.cfg, 3, 7).n_products - pairs


def changed_products(model, own, edited, first_block):
    """The multiplications of the blocks first_block, … for what differs between two caches.

    They are found by comparing numbers: keys, values and queries where the stream differs, pairs
    of which one differs, what heads write where z differs, MLPs where their input differs. Of the
    last block only the last position counts, besides keys and values.
    """
    cfg = model.cfg
    total = 0
    for layer in range(first_block, cfg.n_layers):
        def differs(name, layer=layer):
            gap = (own[name, layer] - edited[name, layer]).abs()[0]
            return (gap.flatten(1).amax(1) > 0).tolist()

        stream, z, mid = differs("resid_pre"), differs("z"), differs("resid_mid")
        read = range(N_POS) if layer + 1 < cfg.n_layers else [N_POS - 1]
        pairs = [(query, key) for query in read for key in range(query + 1)
                 if stream[query] or stream[key]]
        width = cfg.n_heads * cfg.d_head  # of all heads together
        total += cfg.d_model * width * (2 * sum(stream) + sum(stream[pos] for pos in read))
        total += 2 * width * len(pairs)
        total += cfg.d_model * width * sum(z[pos] for pos in read)
        total += 2 * cfg.d_model * cfg.d_mlp * sum(mid[pos] for pos in read)
    return total


def observed_sweep(model, of_heads, by_pos):
    """The multiplications of a whole sweep, from the activations that each cell changes."""
    cfg = model.cfg
    clean, corrupted = tiny_tokens(batch=2, pos=N_POS, seed=5)[:, None]
    _, source = model.run_with_cache(clean)
    _, own = model.run_with_cache(corrupted)
    total = 0
    heads = range(cfg.n_heads) if of_heads else [None]
    places = range(N_POS) if by_pos else [slice(None)]
    for layer, head, pos in itertools.product(range(cfg.n_layers), heads, places):
        name = f"blocks.{layer}." + ("attn.hook_z" if of_heads else "hook_resid_pre")
        here = (slice(None), pos) if head is None else (slice(None), pos, head)

        def patch(tensor, hook, here=here):
            tensor = tensor.clone()
            tensor[here] = source[hook.name][here]
            return tensor

        with model.hooks([(name, patch)]):
            _, edited = model.run_with_cache(corrupted)
        if not of_heads:
            total += changed_products(model, own, edited, layer)
            continue
        read = range(N_POS) if layer + 1 < cfg.n_layers else [N_POS - 1]
        mid = (own["resid_mid", layer] - edited["resid_mid", layer]).abs()[0].amax(-1) > 0
        n_rows = sum(mid[pos].item() for pos in read)
        total += n_rows * (cfg.d_head * cfg.d_model + 2 * cfg.d_model * cfg.d_mlp)
        total += changed_products(model, own, edited, layer + 1)
    return total


@torch.no_grad()
@pytest.mark.parametrize(("of_heads", "by_pos"), [(False, True), (True, False), (True, True)])
def test_the_products_of_a_sweep_are_those_of_the_rows_that_change(of_heads, by_pos):
    model = tiny_model(n_layers=3, d_head=5, dtype=torch.float64)
    counted = sweep_work(model.cfg, N_POS, of_heads=of_heads, by_pos=by_pos).n_products
    assert counted == observed_sweep(model, of_heads, by_pos)


@torch.no_grad()
def test_the_products_after_an_edge_are_those_of_the_rows_that_change():
    model = tiny_model(n_layers=3, dtype=torch.float64)
    cfg = model.cfg
    tokens = tiny_tokens(batch=1, pos=N_POS)
    _, own = model.run_with_cache(tokens)
    for layer, part in itertools.product(range(cfg.n_layers), ("q", "k", "v", "mlp")):
        reader = f"L{layer}.mlp" if part == "mlp" else f"L{layer}H1.{part}"
        name = f"blocks.{layer}." + ("hook_mlp_in" if part == "mlp" else f"hook_{part}_input")

        def edit(tensor, hook, part=part):
            tensor = tensor.clone()
            here = tensor if part == "mlp" else tensor[:, :, 1]
            here += torch.arange(cfg.d_model).double().sin()
            return tensor

        with model.hooks([(name, edit)]):
            _, edited = model.run_with_cache(tokens)
        read = N_POS if layer + 1 < cfg.n_layers else 1
        mlp_rows = read * 2 * cfg.d_model * cfg.d_mlp
        expected = mlp_rows + changed_products(model, own, edited, layer + 1)
        if part != "mlp":
            pairs = N_POS * (N_POS + 1) // 2 if read > 1 else N_POS
            inputs = read if part == "q" else N_POS
            expected += inputs * cfg.d_model * cfg.d_head + read * cfg.d_head * cfg.d_model
            expected += pairs * cfg.d_head * (1 if part == "v" else 2)
        assert edge_products(cfg, N_POS, reader) == expected, reader
    assert edge_products(cfg, N_POS, "logits") == 0


def test_a_gradient_s_products_are_those_that_torch_counts_at_one_position():
    model = tiny_model().requires_grad_(False)
    resid = model.embed(tiny_tokens(batch=1, pos=1)).requires_grad_()
    watch = [(f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: None)
             for layer in range(2)]

    def run():
        with model.hooks(watch):  # the plain lines, which torch can count
            model.run_blocks(resid).sum().backward()

    assert gradient_work(model.cfg, 1).n_products == counted_products(run)
    two_runs = gradient_work(model.cfg, 4, n_runs=2).n_products
    one_run = sweep_work(model.cfg, 4, of_heads=False, by_pos=False).n_products  # layer 0 and later
    later = sweep_work(tiny_model(n_layers=1).cfg, 4, of_heads=False, by_pos=False).n_products
    assert two_runs - gradient_work(model.cfg, 4).n_products == one_run - later


def test_a_matrix_of_paths_by_hand():
    """Two layers of one head, one position: the sender's write and MLP, the values, and what
    follows from the receiver's z."""
    cfg = ModelConfig(n_layers=2, n_heads=1, d_model=2, d_mlp=3, d_vocab=4)
    sender = 2 * 2 + 12  # z into the stream, then the MLP's two matrices of 2 x 3
    receiver = 2 * 2 + 2 + 2 * 2 + 12  # its values, their mean, its write, and the MLP
    assert path_matrix_work(cfg, 1).n_products == sender + receiver


def test_acdc_tests_the_edges_into_nodes_that_are_still_read():
    model = scramble_(GPT(ModelConfig(**TINY)))
    full = Circuit.of(model)
    every = sum(edge_products(model.cfg, 4, reader) for _, reader in full.edges())
    assert acdc_work(model.cfg, 3, 4, full).n_products == 3 * every

    prompts = tiny_tokens(batch=2, pos=4), tiny_tokens(batch=2, pos=4, seed=9)
    empty = acdc(model, *prompts, Metric.logit_diff(1, 2), threshold=1e6)
    assert len(empty) == 0
    assert acdc_work(model.cfg, 2, 4, empty).n_products == 0  # only edges into the logits


def test_decoding_reads_every_matrix_but_the_positions_and_a_dictionary_has_five_products():
    cfg = tiny_model().cfg
    weights = sum(weight.numel() for name, weight in tiny_model().named_parameters()
                  if weight.ndim == 2 and name.rpartition(".")[2] not in ("W_E", "W_pos"))
    assert decoding_work(cfg, 10).n_read == 10 * weights
    assert block_weights(cfg) - mlp_weights(cfg) == 4 * cfg.d_model**2
    step = dictionary_step("ReLU + L1", 0.1, batch=8, d_model=4, n_latents=16)
    assert counted_products(step) == dictionary_work(8, 4, 16).n_products


def test_the_floor_is_the_longer_of_arithmetic_and_reading():
    assert Work(100, 10).seconds(products_per_second=50, reads_per_second=10) == 2
    assert Work(100, 30).seconds(products_per_second=50, reads_per_second=10) == 3


# Hook points


def test_the_hook_points_that_are_timed_are_those_that_a_forward_passes():
    model, tokens = tiny_model(), tiny_tokens()
    logits = model(tokens)
    called, asked = passed_hook_points(model, tokens)
    block = ("hook_resid_pre attn.hook_q attn.hook_k attn.hook_v attn.hook_z hook_attn_out "
             "hook_resid_mid hook_mlp_in mlp.hook_pre mlp.hook_post hook_mlp_out hook_resid_post")
    expected = ["hook_embed", "hook_pos_embed"] + [
        f"blocks.{layer}.{name}" for layer in range(2) for name in block.split()]
    assert sorted(point.name for point in called) == sorted(expected)
    asked_names = {point.name for point in asked}
    assert {"ln_final.hook_scale", "blocks.0.attn.hook_pattern", "blocks.1.hook_q_input",
            "blocks.1.attn.hook_result"} <= asked_names

    # the model itself has kept its points
    assert all(type(point) is HookPoint for point in model.hook_points().values())
    assert torch.equal(model(tokens), logits)


def test_the_work_of_hook_points_is_to_call_each_once(monkeypatch):
    model, tokens = tiny_model(), tiny_tokens()
    work = hook_point_work(model, tokens)
    names = []
    monkeypatch.setattr(HookPoint, "__call__", lambda point, tensor: names.append(point.name))
    work()
    assert len(names) == len(set(names)) == 2 + 2 * 12


# Rows


def timed_row(rounds=3, **fields):
    """A measured row whose parts take 6 s (its own), 1 s (a product of 10), 2 s (reading 100),
    and 4 s (what runs beside it)."""
    now = [0.0]

    def takes(seconds):
        def run():
            now[0] += seconds
        return run

    fields = {"over": {"forward": takes(4)}, "peers": {"another": takes(4)}, **fields}
    row = Row("a row", takes(6), Work(30, 100), **fields)
    limits = {PRODUCT: takes(1), READING: takes(2)}, 10, 100
    return measure_row(Setting(BenchmarkConfig()), row, limits, clock=lambda: now[0],
                       rounds=rounds)


def test_a_row_s_ratios_are_those_of_its_seconds():
    values = timed_row(peer_share=0.5, amount=(12, "tokens"))["values"]
    expected = {"seconds": 6.0, "seconds of the floor": 3.0, TIME: 2.0, "seconds over floor": 3.0,
                "time over forward": 1.5, "times as fast as another": 8 / 6,
                "tokens a second": 2.0}
    assert values.keys() == expected.keys()
    for quantity, value in expected.items():
        assert values[quantity] == pytest.approx([value] * 3), quantity


def test_a_target_is_held_against_its_own_quantity():
    row = timed_row(targets={"time over forward": {"below": 1.4}, TIME: {"below": 2.1}})
    first, second = row_claims(row, judged=True)
    assert (first.claim, first.measured, first.holds) == ("a row: time over forward", 1.5, False)
    assert (second.claim, second.measured, second.holds) == ("a row: time over floor", 2.0, True)
    assert first.control == "below 1.4 (median); 0.667 x as fast as another"
    assert [line.holds for line in row_claims(row, judged=False)] == [None, None]
    alone, = row_claims(timed_row(), judged=True)
    assert (alone.claim, alone.holds) == ("a row: time over floor", None)
    assert alone.control.startswith("1.5 x the time of forward; ")


def test_the_peak_of_memory_counts_what_is_held_at_once():
    x = torch.zeros(250, 1000)  # 1 MB, held before

    def two_at_once():
        for _ in range(3):
            x.add(1).mul(2)

    assert peak_bytes(two_at_once, CPU) == pytest.approx(2e6, rel=0.01)
    row = timed_row(targets={PEAK: {"below": 1}})
    assert row["values"][PEAK] == [0.0]


def test_an_exponent_is_the_slope_of_the_logarithms():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    grown = {"sizes": [1, 2, 4], "seconds": [[1, 2, 4], [1, 4, 16], [2, 8, 32]], "bytes": [5, 5, 5]}
    time, memory = scaling_claims({"context": grown})
    assert (time.measured, time.low, time.high) == pytest.approx((2, 1, 2))
    assert memory.measured == pytest.approx(0)


def test_a_failed_claim_is_seen_in_the_table_and_in_the_exit_code():
    good = Claim("one", 1.0, 0.9, 1.1, holds=True)
    bad = Claim("other", 2.0, 1.9, 2.1, holds=False, reported="1.0 (A 2020)", control="0.1")
    told = Claim("third", 3.0, 3.0, 3.0)
    assert [exit_code(claims) for claims in ([good, told], [good, bad])] == [0, 1]
    lines = claims_table([good, bad, told]).splitlines()
    assert len(set(map(len, lines))) == 1  # aligned
    assert "PASS" in lines[2] and "FAIL" in lines[3] and "1.0 (A 2020)" in lines[3]
    assert [row["verdict"] for row in as_dicts([good, bad, told])] == ["PASS", "FAIL", ""]


# The report


def some_rows():
    """Two measured rows, the first with a peer, the second short."""
    slow = timed_row(targets={TIME: {"below": 1.5}})
    fast = timed_row(targets={TIME: {"below": 2.5}}, is_short=True, peers={})
    return [slow, fast | {"name": "another row"}]


def claims_of(rows, judged=True):
    """{name: claims} of measured rows."""
    return {row["name"]: row_claims(row, judged=judged) for row in rows}


def test_the_summary_counts_the_targets_and_only_short_rows_are_printed():
    claims = claims_of(some_rows())
    lines = [line for each in claims.values() for line in each]
    assert "1 of 2 targets are met" in summarize_benchmark(some_rows(), lines)
    assert headlines(some_rows(), claims) == claims["another row"]
    unjudged = [line for each in claims_of(some_rows(), judged=False).values() for line in each]
    assert "not how fast" in summarize_benchmark(some_rows(), unjudged)
    timed = timed_row() | {"name": "timed", "floor": NO_COUNT}
    timed["values"][TIME] = [1.0]
    assert '"timed"' not in summarize_benchmark([*some_rows(), timed], lines)  # only counted floors


def test_the_figure_has_ours_and_each_peer_at_its_time_over_the_floor():
    axes, = benchmark_figure(some_rows()).axes
    dots = sorted((line.get_ydata()[0], line.get_xdata()[0]) for line in axes.lines
                  if line.get_marker() == "o" and len(line.get_xdata()))
    assert [y for y, _ in dots] == [0, 0, 1]
    assert [x for _, x in dots] == pytest.approx([4 / 3, 2.0, 2.0])  # the peer takes 4 s, not 3
    assert axes.get_title(loc="left").startswith("0 of 2 computations")  # 2 is more than 1.25
    assert benchmark_figure([]) is None


def test_of_an_even_number_of_rounds_the_figure_shows_the_median_of_the_table():
    row = timed_row(peers={})
    row["values"][TIME] = [1.0, 1.2, 1.4, 9.0]
    (axes,), (line,) = benchmark_figure([row]).axes, row_claims(row, judged=False)
    dot, = (drawn.get_xdata()[0] for drawn in axes.lines
            if drawn.get_marker() == "o" and len(drawn.get_xdata()))
    assert dot == pytest.approx(line.measured) == pytest.approx(1.3)


def test_the_titles_of_the_scaling_say_how_fast_time_and_memory_grow_at_most():
    grown = {"context": {"sizes": [1, 2], "seconds": [[1.0, 2.0]], "bytes": [10, 40]},
             "depth": {"sizes": [2, 4], "seconds": [[1.0, 4.0]], "bytes": [10, 10]}}
    assert [axes.get_title(loc="left") for axes in scaling_figure(grown).axes] == [
        f"{what} grows with exponents up to 2.00" for what in ("time", "memory")]


def test_figure_and_table_give_the_same_exponent_the_median_of_the_rounds():
    rounds = [[1.0, 1.0], [1.0, 8.0], [4.0, 8.0]]  # exponents 0, 3, 1; of the median times: 3
    grown = {"context": {"sizes": [1, 2], "seconds": rounds, "bytes": [10, 40]}}
    time, _ = scaling_figure(grown).axes
    assert [text.get_text() for text in time.get_legend().get_texts()] == ["context: 1.00"]
    assert "| 1.00 (0.00 to 3.00) |" in benchmark_tables([], {}, grown, {})[-1]


def test_the_page_s_tables_are_replaced_and_the_rest_stays():
    rows = some_rows()
    grown = {"context": {"sizes": [1, 2], "seconds": [[1.0, 2.0]], "bytes": [10, 40]}}
    lines = benchmark_tables(rows, claims_of(rows), grown, {"date": "2026-01-31"})
    page = replace_between_marks(f"before\n{BEGIN}\nold\n{END}\nafter\n", lines)
    assert "old" not in page and page.startswith("before\n") and page.endswith("after\n")
    assert "**1 of 2 targets are met.** date: 2026-01-31." in page
    slow, = [line for line in lines if line.startswith("| a row")]
    for cell in ("6 s", "3 s: 6e-08 GFLOP, 4e-07 GB", "2.00 (2.00 to 2.00)",
                 "time over floor below 1.5", "0.667 x as fast as another", "FAIL"):
        assert cell in slow, f"{cell!r} is missing in {slow}"
    context, = [line for line in lines if line.startswith("| context")]
    assert "| 1.00 (1.00 to 1.00) | 2.00 |" in context

    assert "no <!--" in refusal(lambda: replace_between_marks("no marks", lines))


def test_settings_that_make_no_sense_are_refused():
    for words, fields in (("only", {"only": ("speed",)}), ("rounds", {"rounds": 0}),
                          ("precision", {"precision": "int8"}),
                          ("write_page", {"write_page": True, "only": ("paths",)})):
        assert words in refusal(lambda fields=fields: BenchmarkConfig(**fields), words)
    assert "tf32" in refusal(lambda: Setting(BenchmarkConfig(precision="tf32")))
    assert BenchmarkConfig().is_judged
    assert not BenchmarkConfig(precision="bfloat16").is_judged


@pytest.mark.slow
def test_a_quick_run_prints_ten_rows_and_keeps_them_all(tmp_path):
    printed, result = quick_run("benchmark", tmp_path)
    assert sum(row["is_short"] for row in result["rows"]) == 10
    for row in result["rows"]:
        is_printed = any(line.startswith(f"| {row['name'][:30]}") for line in printed.splitlines())
        assert is_printed == row["is_short"], row["name"]
        assert all(value > 0 for value in row["values"]["seconds"]), row["name"]
    names = {claim["claim"].split(": ")[0] for claim in result["claims"]}
    assert {row["name"] for row in result["rows"]} <= names and "context" in names
    for picture in ("benchmark.png", "scaling.png"):
        assert (tmp_path / "benchmark_quick" / picture).exists()
