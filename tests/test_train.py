"""Training: the loop, the files of a run, and runs that are stopped anywhere and resumed."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TINY, WIDE, tiny_model, tiny_tokens

import checkpoint
import corpus
import data
import train
from checkpoint import load_checkpoint, load_model, read_metrics
from config import Config, DataConfig, ModelConfig, TrainConfig
from data import PrepareConfig, load_dataset, prepare
from losses import cross_entropy, per_token_loss
from optim import AdamW, Muon, schedule
from train import (
    Diverged,
    RunState,
    TrainingRun,
    evaluate,
    fit,
    main,
    make_optimizers,
    stop_on_signal,
)
from utils import NoNetwork, UserError, seeded_generator

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--model.n_layers 1 --model.n_heads 2 --model.d_model 8 --model.n_ctx 8 "
         "--train.max_steps 6 --train.eval_interval 3 --train.log_interval 2 --train.batch_size 4 "
         "--train.device cpu").split()
N_CTX = TINY["n_ctx"]
TINY_SHAPE = ModelConfig(n_layers=1, n_heads=2, d_model=8, n_ctx=32, d_vocab=99)


def argv(folder, *flags):
    """The flags of a tiny run in folder/outputs; later flags win."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(corpus.text(1500), encoding="utf-8")
    return [*FLAGS, "--data.path", str(text), "--logging.out_dir", str(folder / "outputs"), *flags]


def named(name, *flags):
    return ["--logging.run_name", name, *flags]


def run_of(folder, name):
    return folder / "outputs" / name


def final(folder, name):
    """The checkpoint of a run, without its settings and its clock."""
    state = load_checkpoint(run_of(folder, name) / "checkpoint.pt")
    return {key: value for key, value in state.items() if key not in ("config", "seconds")}


def same(one, other):
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def curve(folder, name, *columns):
    rows = read_metrics(run_of(folder, name))
    return [tuple(row.get(column) for column in ("step", *columns)) for row in rows]


def quietly(monkeypatch):
    """Leaves the figure and the sample out, which take most of a tiny run's time."""
    monkeypatch.setattr(train, "finish", lambda run: None)


def undrawn(monkeypatch):
    """Leaves the figure's pixels and the sample out; what comes out is printed all the same."""
    monkeypatch.setattr(train.plotting, "save", lambda figure, path: None)
    monkeypatch.setattr(train, "sample_text", lambda run: "A sample.")


def stopped_at(step, folder, *flags):
    """Trains until a signal asks to stop after that step."""
    with pytest.MonkeyPatch.context() as patched:
        on_batch(patched, step, interrupt)
        main(argv(folder, *flags))


def on_batch(monkeypatch, number, act):
    """Calls act() while the batch of that number, counted from now, is drawn."""
    count = iter(range(1, 1000))
    draw = train.random_batch

    def drawing(*args):
        if next(count) == number:
            act()
        return draw(*args)

    monkeypatch.setattr(train, "random_batch", drawing)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


# The loop


def random_batches(seed=0, batch=4):
    generator = seeded_generator(seed)

    def next_batch():
        tokens = torch.randint(TINY["d_vocab"], (batch, N_CTX + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    return next_batch


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_a_model_can_learn_one_batch_by_heart():
    tokens = tiny_tokens(batch=2, pos=N_CTX)
    for optimizer in ("muon", "adamw"):
        model = tiny_model(n_layers=1, d_model=24)
        cfg = TrainConfig(max_steps=100, optimizer=optimizer, lr=0.02, weight_decay=0,
                          warmup_steps=5)
        losses = [step.loss for step in fit(model, lambda: (tokens[:, :-1], tokens[:, 1:]), cfg)]
        assert losses[0] > 1 and losses[-1] < 0.02, f"{optimizer}: {losses[0]} to {losses[-1]}"


def test_fit_yields_each_step_with_its_share_of_the_rate():
    cfg = TrainConfig(max_steps=7, warmup_steps=2)
    steps = list(fit(tiny_model(), random_batches(), cfg))
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [step.share for step in steps] == [schedule(i, 7, 2) for i in range(7)]
    assert all(step.seconds > 0 for step in steps)

    cfg = TrainConfig(max_steps=7, warmup_steps=2, schedule="cosine", final_lr_fraction=0.25)
    shares = [step.share for step in fit(tiny_model(), random_batches(), cfg)]
    assert shares == [schedule(i, 7, 2, shape="cosine", final_fraction=0.25) for i in range(7)]


def test_fit_reports_the_loss_and_the_gradient_before_its_limit():
    model = tiny_model()
    inputs, targets = random_batches()()
    loss = cross_entropy(model(inputs), targets)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    step = next(fit(model, random_batches(), TrainConfig(max_steps=1, grad_clip=1e-3)))
    assert step.loss == pytest.approx(loss.item())
    assert step.grad_norm == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item())


def test_fit_equals_the_naive_loop():
    cfg = TrainConfig(max_steps=5, warmup_steps=2, optimizer="adamw", grad_clip=0.5)
    # In float64: a bias of the keys has no gradient but rounding, which Adam would blow up.
    naive = tiny_model(dtype=torch.float64)
    optimizer = AdamW(naive.parameters(), cfg.lr, betas=(cfg.beta1, cfg.beta2),
                      weight_decay=cfg.weight_decay)  # test_optim.py compares it with torch's
    batch = random_batches()
    for i in range(5):
        inputs, targets = batch()
        naive.zero_grad()
        torch.nn.functional.cross_entropy(naive(inputs).mT, targets).backward()
        torch.nn.utils.clip_grad_norm_(naive.parameters(), 0.5)
        optimizer.step(schedule(i, 5, 2))

    model = tiny_model(dtype=torch.float64)
    list(fit(model, random_batches(), cfg))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, naive.state_dict()[name], atol=1e-6, rtol=1e-6)


def test_accumulating_gives_the_weights_and_losses_of_one_large_batch():
    def trained(parts):
        model = tiny_model(dtype=torch.float64)
        cfg = TrainConfig(max_steps=4, batch_size=24, accumulate=parts)
        steps = list(fit(model, random_batches(batch=8), cfg))
        return weights_of(model), [(step.loss, step.grad_norm) for step in steps]

    weights, numbers = trained(1)
    for parts in (3, 8):  # 3 parts of 8 windows: 3, 3 and 2
        part_weights, part_numbers = trained(parts)
        torch.testing.assert_close(part_weights, weights, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(torch.tensor(part_numbers), torch.tensor(numbers))


def test_accumulating_has_one_part_s_activations_at_a_time():
    model = tiny_model()
    rows = []
    with model.hooks([("hook_embed", lambda resid, hook: rows.append(len(resid)))]):
        next(fit(model, random_batches(batch=8), TrainConfig(accumulate=4)))
    assert rows == [2, 2, 2, 2]


def test_the_gradient_of_a_step_is_the_sum_over_its_parts_to_the_bit():
    """The naive loop over parts, before any weight has moved."""
    model = tiny_model()
    inputs, targets = random_batches(batch=8)()
    expected = [torch.zeros_like(weight) for weight in model.parameters()]
    expected_loss = 0.0
    for rows in (slice(0, 3), slice(3, 6), slice(6, 8)):  # 3 parts of 8 windows
        share = len(inputs[rows]) / 8
        loss = cross_entropy(model(inputs[rows]), targets[rows]) * share
        expected_loss += loss.detach()
        for total, grad in zip(expected, torch.autograd.grad(loss, list(model.parameters())),
                               strict=True):
            total += grad

    cfg = TrainConfig(accumulate=3, grad_clip=0)
    step = next(fit(model, random_batches(batch=8), cfg))
    assert step.loss == expected_loss.item()
    for (name, weight), grad in zip(model.named_parameters(), expected, strict=True):
        assert torch.equal(weight.grad, grad), f"the gradient of {name} is another"


def test_only_the_last_part_lets_ranks_average_their_gradients():
    class Shared(torch.nn.Module):  # stands in for DistributedDataParallel
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.is_local = False
            self.parts = []

        @contextlib.contextmanager
        def no_sync(self):
            self.is_local = True
            yield
            self.is_local = False

        def forward(self, tokens):
            self.parts.append(("forward", self.is_local))
            logits = self.model(tokens)
            logits.register_hook(lambda grad: self.parts.append(("backward", self.is_local)))
            return logits

    model = Shared(tiny_model())
    cfg = TrainConfig(accumulate=3)
    optimizers = make_optimizers(model.model, cfg)
    next(fit(model, random_batches(batch=6), cfg, optimizers=optimizers))
    assert [is_local for _, is_local in model.parts] == [True, True, True, True, False, False]
    assert [name for name, _ in model.parts] == ["forward", "backward"] * 3


def test_in_bfloat16_the_products_are_short_and_weights_and_loss_are_not():
    kinds = {}
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = tiny_model()
        loss_kinds = []

        def loss_fn(logits, targets, seen=loss_kinds):
            seen.append(logits.dtype)
            return cross_entropy(logits, targets)

        def look(q, hook, precision=precision):
            kinds[precision] = q.dtype

        with model.hooks([("blocks.1.attn.hook_q", look)]):
            steps = fit(model, random_batches(), TrainConfig(precision=precision, max_steps=5),
                        loss_fn=loss_fn)
            losses[precision] = [step.loss for step in steps]
        assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
        assert set(loss_kinds) == {torch.float32}
    assert kinds == {"float32": torch.float32, "bfloat16": torch.bfloat16}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]


def bytes_kept(model, tokens):
    """The bytes that the loss of a batch keeps for its backward pass, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}  # {address: tensor}: what lives on keeps its address for itself

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = cross_entropy(model.train()(tokens[:, :-1]), tokens[:, 1:])
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items()
               if address not in weights)


def test_activation_bytes_are_what_training_keeps_for_its_backward_pass():
    tokens = tiny_tokens(batch=4, pos=N_CTX + 1)
    positions = 8 * N_CTX  # the table's indices, which are there once
    for changes in ({}, {"attn_only": True}, {"norm": "none"}, {"activation": "relu"},
                    {"n_layers": 0}, {"tie_embeddings": True}, {"d_mlp": 20, "n_heads": 2}, WIDE):
        model = tiny_model(**changes)
        found = bytes_kept(model, tokens) - positions
        told = 4 * N_CTX * model.cfg.activation_bytes
        assert abs(found - told) <= 100, f"{changes}: {told} bytes are told, {found} are kept"


def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_weights_move():
    model = tiny_model()
    before = weights_of(model)
    for name, loss_fn in {
        "a loss of NaN": lambda logits, targets: logits.sum() * math.nan,
        "an infinite loss": lambda logits, targets: logits.sum() * math.inf,
        "a finite loss of infinite slope": lambda logits, targets: (logits * 0).sum().sqrt(),
    }.items():
        with pytest.raises(Diverged, match=r"step 1.*--train\.lr"):
            next(fit(model, random_batches(), TrainConfig(), loss_fn=loss_fn))
        assert same(before, weights_of(model)), f"{name} has moved the weights"


def test_every_parameter_has_exactly_one_optimizer():
    kinds = [{}, {"attn_only": True}, {"tie_embeddings": True}, {"n_layers": 0},
             {"attn_bias": False, "norm": "none"}]
    for changes, optimizer in itertools.product(kinds, ("muon", "adamw")):
        model = tiny_model(**changes)
        optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer))
        theirs = [id(p) for one in optimizers for p in one.parameters]
        assert sorted(theirs) == sorted(map(id, model.parameters())), f"{changes}, {optimizer}"


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = tiny_model()
    cfg = TrainConfig(weight_decay=0.3, lr=0.1, muon_lr=0.2, beta1=0.7, beta2=0.8)
    adamw, muon = make_optimizers(model, cfg)
    assert isinstance(adamw, AdamW) and isinstance(muon, Muon)
    matrices = {name: p for name, p in model.named_parameters()
                if name.startswith("blocks.") and p.ndim == 2}
    assert set(map(id, muon.parameters)) == set(map(id, matrices.values()))
    for p, parts in zip(muon.parameters, muon.parts, strict=True):  # q, k and v are three
        assert parts == (3 if p.shape == (12, 36) else 1)
    assert (adamw.lr, muon.lr, adamw.weight_decay, muon.weight_decay) == (0.1, 0.2, 0.3, 0.3)
    assert adamw.betas == (0.7, 0.8)
    assert muon.momentum == 0.95  # Jordan's
    assert len(make_optimizers(model, TrainConfig(optimizer="adamw"))) == 1


# Evaluation


def test_evaluating_equals_predicting_each_token_once():
    model = tiny_model()
    for n in (N_CTX + 1, 2 * N_CTX, 5 * N_CTX + 1, 5 * N_CTX + 4):
        tokens = tiny_tokens(batch=1, pos=n)[0]
        surprises = []
        for i in range(1, n):
            start = (i - 1) // N_CTX * N_CTX  # windows that do not overlap
            logits = model(tokens[None, start:i])[0, -1]
            surprises.append(-logits.log_softmax(-1)[tokens[i]].item())
        wanted = pytest.approx(sum(surprises) / (n - 1), rel=1e-5)
        for batch_size in (1, 2, 16):
            loss = evaluate(model, tokens, batch_size)
            assert loss == wanted, f"{n} tokens, {batch_size} windows at once"


def test_a_window_that_begins_at_a_story_does_not_read_the_text_before_it():
    model = tiny_model()
    tokens = tiny_tokens(batch=1, pos=12)[0]  # stories of 5 and 7
    with torch.no_grad():
        stories = [model(story[None])[0] for story in (tokens[:5], tokens[5:11])]
    expected = [per_token_loss(stories[0], tokens[1:6]), per_token_loss(stories[1], tokens[6:])]
    losses = list(train.token_losses(model, tokens, starts=[0, 5]))
    assert losses == pytest.approx(torch.cat(expected).tolist(), rel=1e-5)


def test_an_unfinished_evaluation_restores_the_mode():
    model = tiny_model().train()
    losses = train.token_losses(model, tiny_tokens(batch=1, pos=40)[0])
    next(losses)
    losses.close()
    assert model.training


def test_an_evaluation_builds_no_graph_and_leaves_its_caller_s_gradients_on():
    model = tiny_model()
    seen = []
    note = ("blocks.0.hook_resid_post", lambda resid, hook: seen.append(torch.is_grad_enabled()))
    with model.hooks([note]):
        for _ in train.token_losses(model, tiny_tokens(batch=1, pos=40)[0]):
            assert torch.is_grad_enabled()
    assert seen and not any(seen)


def test_evaluating_uses_no_dropout_and_leaves_the_mode():
    tokens = tiny_tokens(batch=1, pos=40)[0]
    for mode in (True, False):
        model = tiny_model(dropout=0.5).train(mode)
        assert evaluate(model, tokens) == evaluate(tiny_model(), tokens)
        assert model.training is mode


# A run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the finished run `first` in its outputs, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    with open(folder / "printed.txt", "w") as file, contextlib.redirect_stdout(file):
        main(argv(folder, *named("first")))
    return folder


def test_a_run_leaves_its_six_files(home):
    names = {path.name for path in run_of(home, "first").iterdir()}
    assert names == {"config.json", "checkpoint.pt", "best.pt", "metrics.jsonl", "loss.png",
                     "sample.txt"}
    assert (run_of(home, "first") / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((run_of(home, "first") / "sample.txt").read_text()) > 300


def test_a_checkpoint_is_a_dict_with_every_promised_entry(home):
    state = load_checkpoint(run_of(home, "first") / "checkpoint.pt")
    assert {"model", "optimizer", "step", "config", "tokenizer"} <= state.keys()
    assert state["step"] == 6 and state["config"]["model"]["d_model"] == 8
    assert all(isinstance(weight, torch.Tensor) for weight in state["model"].values())


def test_config_json_has_the_settings_of_the_run(home):
    told = json.loads((run_of(home, "first") / "config.json").read_text())
    assert told["model"]["n_ctx"] == 8 and told["train"]["max_steps"] == 6
    assert told["model"]["d_vocab"] == len(set((home / "text.txt").read_text()))
    assert told["data"]["path"] == str(home / "text.txt")


def test_the_metrics_are_one_json_object_a_line_and_steps_only_rise(home):
    lines = (run_of(home, "first") / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0, 2, 3, 4, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 3, 6]
    for row in rows[1:]:
        assert {"step", "train_loss", "lr", "tokens_per_s", "seconds"} <= row.keys()
        assert row["tokens_per_s"] > 0
        assert row["lr"] == pytest.approx(5e-3 * schedule(row["step"] - 1, 6, 40))
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_the_last_validation_loss_is_that_of_the_checkpoint_over_the_whole_split(home):
    model, tokenizer = load_model("first", home / "outputs")
    text = (home / "text.txt").read_text()
    val = text[len(text) - int(0.1 * len(text)):]
    loss = evaluate(model, torch.tensor(tokenizer.encode(val)))
    assert loss == pytest.approx(curve(home, "first", "val_loss")[-1][1], rel=1e-6)


def test_the_best_checkpoint_is_the_first_of_the_lowest_validation_loss(tmp_path, monkeypatch):
    quietly(monkeypatch)
    for name, losses in (("later_worse", [3.0, 1.0, 2.0]), ("later_as_good", [3.0, 1.0, 1.0])):
        val_losses = iter(losses)
        monkeypatch.setattr(train, "token_losses", lambda *args, left=val_losses: [next(left)])
        main(argv(tmp_path, *named(name)))
        best = load_checkpoint(run_of(tmp_path, name) / "best.pt")
        assert (best["step"], best["best_loss"]) == (3, 1.0), f"of {losses}"
        assert final(tmp_path, name)["step"] == 6


def test_a_resumed_run_knows_its_best_checkpoint(tmp_path, monkeypatch):
    quietly(monkeypatch)
    val_losses = iter([9.0, 1.0, 2.0])
    monkeypatch.setattr(train, "token_losses", lambda *args: [next(val_losses)])
    stopped_at(4, tmp_path, *named("mine"))
    main(argv(tmp_path, *named("mine", "--resume")))
    best = load_checkpoint(run_of(tmp_path, "mine") / "best.pt")
    assert (best["step"], best["best_loss"]) == (3, 1.0)
    assert final(tmp_path, "mine")["best_loss"] == 1.0


def test_a_line_of_metrics_is_the_mean_over_the_steps_since_the_last_one(tmp_path, monkeypatch):
    quietly(monkeypatch)
    taken = []

    def timed(*args, **kwargs):  # step n takes n seconds
        for step in fit(*args, **kwargs):
            taken.append(dataclasses.replace(step, seconds=float(step.number)))
            yield taken[-1]

    monkeypatch.setattr(train, "fit", timed)
    main(argv(tmp_path, *named("mine")))
    since = {2: taken[:2], 3: taken[2:3], 4: taken[3:4], 6: taken[4:]}
    rows = read_metrics(run_of(tmp_path, "mine"))
    assert [row["seconds"] for row in rows] == [0, 3, 6, 10, 21]
    for row in rows[1:]:
        steps = since[row["step"]]
        seconds = sum(step.number for step in steps)
        assert row["tokens_per_s"] == pytest.approx(len(steps) * 4 * 8 / seconds)
        assert row["train_loss"] == pytest.approx(sum(s.loss for s in steps) / len(steps))
        assert row["grad_norm"] == pytest.approx(sum(s.grad_norm for s in steps) / len(steps))
        assert row["lr"] == pytest.approx(5e-3 * steps[-1].share)


def test_the_sample_is_written_without_dropout(home, monkeypatch):
    modes = []

    def write(model, tokenizer, cfg):
        modes.append(model.training)
        return ["bad ", "cab\n"]

    monkeypatch.setattr(train, "generate_text", write)
    cfg = Config(DataConfig(path=str(home / "text.txt")), TINY_SHAPE)
    run = TrainingRun(cfg, load_dataset(cfg.data, 32), torch.device("cpu"))
    run.model.train()
    assert train.sample_text(run) == "bad cab"
    assert modes == [False]


def test_the_last_lines_give_the_result_and_the_next_commands(home):
    out = (home / "printed.txt").read_text()
    assert f"validation loss {curve(home, 'first', 'val_loss')[-1][1]:.4f}" in out
    assert (run_of(home, "first") / "sample.txt").read_text() in out
    assert f"generate.py --run_name first --out_dir {home / 'outputs'} --sliding" in out


def test_a_loss_for_each_word_is_also_given_for_each_character(capsys, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    main(argv(tmp_path, "--data.tokenizer", "word"))
    loss = curve(tmp_path, "run-001", "val_loss")[-1][1]
    dataset = load_dataset(DataConfig(path=str(tmp_path / "text.txt"), tokenizer="word"), 8)
    text = dataset.tokenizer.decode(dataset.val.tolist())
    per_character = loss * (len(dataset.val) - 1) / len(text)
    said = capsys.readouterr().out
    assert f"{loss:.4f} nats/word" in said
    assert abs(float(said.split(" nats/character")[0].split()[-1]) / per_character - 1) < 0.05


def test_settings_of_computation_may_differ_when_a_run_is_resumed(tmp_path, monkeypatch):
    quietly(monkeypatch)
    stopped_at(2, tmp_path, *named("mine"))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    main(argv(tmp_path, *named("mine", "--resume", "--train.accumulate", "2", "--train.compile")))
    assert final(tmp_path, "mine")["step"] == 6


def test_the_command_that_a_stopped_run_prints_resumes_it(tmp_path, monkeypatch, capsys):
    quietly(monkeypatch)
    monkeypatch.chdir(tmp_path)
    stopped_at(2, tmp_path, "--logging.out_dir", "my runs")
    line = capsys.readouterr().out.splitlines()[-1]
    main(shlex.split(line.partition("train.py ")[2]))
    assert load_checkpoint(tmp_path / "my runs/run-001/checkpoint.pt")["step"] == 6


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(home, monkeypatch):
    quietly(monkeypatch)
    main(argv(home, *named("again")))
    main(argv(home, *named("other", "--train.seed", "1")))
    losses = {name: curve(home, name, "train_loss", "val_loss")
              for name in ("first", "again", "other")}
    assert losses["first"] == losses["again"]
    assert same(final(home, "first"), final(home, "again"))
    assert all(a != b for a, b in zip(losses["first"], losses["other"], strict=True))
    assert not same(final(home, "first")["model"], final(home, "other")["model"])


def test_the_seed_decides_the_first_weights_and_the_batches(home):
    def beginning(seed):
        cfg = Config(DataConfig(path=str(home / "text.txt")),
                     ModelConfig(n_layers=0, n_ctx=8, d_vocab=99), TrainConfig(seed=seed))
        run = TrainingRun(cfg, load_dataset(cfg.data, 8), torch.device("cpu"))
        return run.model.W_E, run.next_batch()[0]

    (weights, batch), same_one, (other_weights, other_batch) = map(beginning, (0, 0, 1))
    assert torch.equal(weights, same_one[0]) and torch.equal(batch, same_one[1])
    assert not torch.equal(weights, other_weights) and not torch.equal(batch, other_batch)


def test_the_number_of_evaluations_does_not_change_the_weights(home, monkeypatch):
    quietly(monkeypatch)
    for name, every in (("seldom", "6"), ("often", "1")):
        main(argv(home, *named(name, "--train.eval_interval", every, "--model.dropout", "0.2")))
    assert same(final(home, "seldom")["model"], final(home, "often")["model"])


def test_a_run_is_evaluated_early_too_unless_that_is_often_anyway(home, monkeypatch):
    quietly(monkeypatch)
    monkeypatch.setattr(train, "EARLY", (5, 10))
    cases = {"3 50": [0, 3], "5 50": [0, 5], "11 50": [0, 5, 10, 11], "11 10": [0, 5, 10, 11],
             "6 2": [0, 2, 4, 6]}
    for case, expected in cases.items():
        steps, every = case.split()
        main(argv(home, *named("early", "--overwrite"), "--train.max_steps", steps,
                  "--train.eval_interval", every))
        evaluated = [step for step, loss in curve(home, "early", "val_loss") if loss is not None]
        assert evaluated == expected, f"{steps} steps, every {every}"


def test_early_evaluations_change_nothing_that_is_trained_nor_where_a_stopped_run_ends(
    tmp_path, monkeypatch
):
    quietly(monkeypatch)
    flags = ["--train.eval_interval", "6", "--model.dropout", "0.2"]
    for early in ((), (1, 3)):
        monkeypatch.setattr(train, "EARLY", early)
        main(argv(tmp_path, *named(f"early_{len(early)}"), *flags))
    without, whole = (final(tmp_path, name) for name in ("early_0", "early_2"))
    for part in ("model", "optimizer", "sampler", "rng"):
        assert same(without[part], whole[part]), f"{part} differs"

    for step in (1, 2, 3, 4):
        stopped_at(step, tmp_path, *named("halves", "--overwrite"), *flags)
        main(argv(tmp_path, *named("halves", "--resume"), *flags))
        assert same(final(tmp_path, "halves"), whole), f"stopped after {step}: another end"
        curves = [curve(tmp_path, name, "val_loss") for name in ("halves", "early_2")]
        assert curves[0] == curves[1], f"stopped after {step}: another curve"


# Names


def test_a_name_that_is_taken_needs_a_decision(home):
    before = final(home, "first")
    with pytest.raises(UserError, match=r"finished.*--overwrite") as error:
        main(argv(home, *named("first", "--train.seed", "5")))
    assert "--resume --train.max_steps" in str(error.value)  # all that is left to continue
    assert same(final(home, "first"), before)


def test_a_name_that_is_taken_is_refused_before_the_data_are_loaded(home, monkeypatch):
    monkeypatch.setattr(train, "load_dataset", lambda *_: pytest.fail("the data were loaded"))
    before = sorted(path.name for path in run_of(home, "first").iterdir())
    with pytest.raises(UserError, match="--overwrite"):
        main(argv(home, *named("first", "--train.seed", "5")))
    assert sorted(path.name for path in run_of(home, "first").iterdir()) == before


def test_a_finished_run_that_is_resumed_says_that_it_is_finished(
    home, tmp_path, monkeypatch, capsys
):
    quietly(monkeypatch)
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    before = final(tmp_path, "first")
    main(argv(tmp_path, *named("first", "--resume")))
    said = capsys.readouterr().out
    assert "is finished: all 6 steps" in said and "--train.max_steps" in said
    assert "continuing after" not in said and same(final(tmp_path, "first"), before)


def test_overwriting_starts_from_nothing(home, tmp_path, monkeypatch):
    quietly(monkeypatch)
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    main(argv(tmp_path, *named("first", "--train.seed", "1", "--overwrite")))
    main(argv(tmp_path, "--train.seed", "1"))  # without a name, a number
    assert same(final(tmp_path, "first"), final(tmp_path, "run-001"))
    assert not (run_of(tmp_path, "first") / "loss.png").exists()


# Stopping and going on


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    quietly(monkeypatch)
    dropout = ["--model.dropout", "0.2"]
    cosine = ["--train.optimizer", "adamw", "--train.schedule", "cosine"]
    for flags, stops in ((dropout, (1, 3, 4)), (cosine, (5,))):
        main(argv(tmp_path, *named("whole", "--overwrite"), *flags))
        for step in stops:
            stopped_at(step, tmp_path, *named("halves", "--overwrite"), *flags)
            assert final(tmp_path, "halves")["step"] == step
            said = capsys.readouterr().out
            assert f"stopped after step {step}; to continue: python train.py --logging.run_name " \
                   f"halves --logging.out_dir {tmp_path / 'outputs'} --resume" in said

            torch.manual_seed(99)  # whatever the new process drew before
            main(argv(tmp_path, *named("halves", "--resume")))
            ends = [final(tmp_path, name) for name in ("halves", "whole")]
            assert same(*ends), f"{flags}, stopped after {step}: another end"
            curves = [curve(tmp_path, name, "val_loss") for name in ("halves", "whole")]
            assert curves[0] == curves[1], f"{flags}, stopped after {step}: another curve"


def test_an_older_checkpoint_without_a_field_resumes_to_the_same_bits(
    home, tmp_path, monkeypatch
):
    quietly(monkeypatch)
    stopped_at(4, tmp_path, *named("older"))
    path = run_of(tmp_path, "older") / "checkpoint.pt"
    state = load_checkpoint(path)
    del state["lost"]
    del state["untrained"]
    checkpoint.save_checkpoint(path, state)

    main(argv(tmp_path, *named("older", "--resume")))
    older = final(tmp_path, "older")
    assert older.pop("lost") == 0 and older.pop("untrained") == math.inf
    first = final(home, "first")
    assert same(older, {name: first[name] for name in older})


def test_a_run_s_state_comes_back_from_its_checkpoint():
    state = RunState(step=3, seconds=2.5, best_loss=1.5, lost=2, untrained=4.0)
    saved = {"model": {}, "threads": 1} | dataclasses.asdict(state)
    assert RunState.from_checkpoint(saved) == state
    assert RunState.from_checkpoint({"step": 3}) == RunState(3, 0.0, math.inf, 0, math.inf)


def test_on_devices_other_than_the_cpu_each_step_seeds_its_own_dropout(tmp_path, monkeypatch):
    """The CPU stands in for a device whose generator is in no checkpoint: as is none here."""
    quietly(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    flags = ["--model.dropout", "0.5"]
    main(argv(tmp_path, *named("whole"), *flags))
    stopped_at(3, tmp_path, *named("halves"), *flags)
    assert not same(final(tmp_path, "halves")["rng"], final(tmp_path, "whole")["rng"])
    torch.manual_seed(99)
    main(argv(tmp_path, *named("halves", "--resume")))
    assert same(final(tmp_path, "halves"), final(tmp_path, "whole"))
    main(argv(tmp_path, *named("other", "--train.seed", "1"), *flags))
    assert not same(final(tmp_path, "other")["rng"], final(tmp_path, "whole")["rng"])


def test_a_stop_does_not_show_in_the_training_loss(tmp_path, monkeypatch):
    quietly(monkeypatch)
    main(argv(tmp_path, *named("whole", "--train.log_interval", "5")))
    stopped_at(4, tmp_path, *named("halves", "--train.log_interval", "5"))
    main(argv(tmp_path, *named("halves", "--train.log_interval", "5", "--resume")))
    assert curve(tmp_path, "halves", "train_loss") == curve(tmp_path, "whole", "train_loss")


def test_a_run_that_died_resumes_from_its_checkpoint_and_drops_later_lines(
    tmp_path, monkeypatch
):
    quietly(monkeypatch)
    main(argv(tmp_path, *named("whole")))

    def die():
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        on_batch(patched, 5, die)
        main(argv(tmp_path, *named("halves")))
    assert final(tmp_path, "halves")["step"] == 3
    assert curve(tmp_path, "halves")[-1] == (4,)
    main(argv(tmp_path, *named("halves", "--resume")))
    assert same(final(tmp_path, "halves"), final(tmp_path, "whole"))
    columns = "train_loss", "val_loss", "lr"
    assert curve(tmp_path, "halves", *columns) == curve(tmp_path, "whole", *columns)


def lose(path):
    path.unlink()


def empty(path):
    path.write_text("")


def shorten(path):
    path.write_text(path.read_text().splitlines()[0] + "\n")


def test_a_run_whose_metrics_are_lost_resumes_without_them(home, tmp_path, monkeypatch, capsys):
    undrawn(monkeypatch)
    for spoil, step in ((lose, 4), (lose, 6), (empty, 6), (shorten, 6)):
        stopped_at(step, tmp_path, *named("mine", "--overwrite"))
        spoil(run_of(tmp_path, "mine") / "metrics.jsonl")
        capsys.readouterr()
        main(argv(tmp_path, *named("mine", "--resume")))
        case = f"{spoil.__name__} after step {step}"
        assert same(final(tmp_path, "mine"), final(home, "first")), case
        last_losses = [curve(folder, name, "val_loss")[-1]
                       for folder, name in ((tmp_path, "mine"), (home, "first"))]
        assert last_losses[0] == last_losses[1], case
        assert f"\nvalidation loss {last_losses[0][1]:.4f}" in capsys.readouterr().out, case


def test_files_of_a_killed_writer_are_removed_when_the_run_is_resumed(home, tmp_path, monkeypatch):
    quietly(monkeypatch)
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    files = sorted(run_of(tmp_path, "first").iterdir())
    for name in (".checkpoint.pt.123", ".best.pt.45678", ".metrics.jsonl.9"):
        (run_of(tmp_path, "first") / name).write_text("half")
    (run_of(tmp_path, "first") / ".notes.txt").touch()
    main(argv(tmp_path, *named("first", "--resume")))
    left = {*run_of(tmp_path, "first").iterdir()} - {*files}
    assert [path.name for path in left] == [".notes.txt"]


def test_another_number_of_threads_is_announced(home, tmp_path, monkeypatch, capsys):
    quietly(monkeypatch)
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    main(argv(tmp_path, *named("first", "--resume")))
    assert "threads now" not in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(torch, "set_num_threads", lambda n: None)
        main(argv(tmp_path, *named("first", "--resume", "--train.threads", "3")))
    assert "3 threads now, 1 before: the last bits of the result" in capsys.readouterr().out


def test_the_newest_run_is_resumed_with_its_own_settings_by_default(
    tmp_path, monkeypatch
):
    quietly(monkeypatch)
    main(argv(tmp_path, *named("whole", "--train.seed", "7")))
    stopped_at(2, tmp_path, *named("halves", "--train.seed", "7"))
    main(["--logging.out_dir", str(tmp_path / "outputs"), "--train.device", "cpu", "--resume"])
    assert same(final(tmp_path, "halves"), final(tmp_path, "whole"))


def test_resuming_a_finished_run_changes_nothing(home, monkeypatch):
    quietly(monkeypatch)
    state = final(home, "first")
    losses = curve(home, "first", "train_loss", "val_loss")
    main(argv(home, *named("first", "--resume")))
    assert same(final(home, "first"), state)
    assert curve(home, "first", "train_loss", "val_loss") == losses


def test_flags_that_contradict_the_run_are_all_named(home):
    flags = ["--model.d_model", "16", "--train.lr", "0.5", "--train.freeze", "blocks.*"]
    with pytest.raises(UserError) as error:
        main(argv(home, *named("first", "--resume"), *flags))
    for name, was, given in (("model.d_model", 8, 16), ("train.lr", 0.005, 0.5),
                             ("train.freeze", (), ("blocks.*",))):
        assert f"{name} was {was}, not {given}" in str(error.value)
    assert "n_ctx" not in str(error.value)


def test_a_run_is_not_resumed_on_a_changed_text(tmp_path, monkeypatch):
    quietly(monkeypatch)
    main(argv(tmp_path, *named("mine")))
    path = tmp_path / "text.txt"
    text = path.read_text(encoding="utf-8")
    for changed in (text.replace("park", "kapr", 1), text + "a"):  # the same letters; longer
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(UserError, match=r"the text is not the one .*mine"):
            main(argv(tmp_path, *named("mine", "--resume")))


def test_a_run_is_resumed_even_if_its_text_was_moved(tmp_path, monkeypatch):
    quietly(monkeypatch)
    main(argv(tmp_path, *named("whole")))
    stopped_at(2, tmp_path, *named("halves"))
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    (tmp_path / "text.txt").write_text((tmp_path / "moved.txt").read_text()[::-1])
    flags = [*FLAGS, *named("halves", "--logging.out_dir", str(tmp_path / "outputs"), "--resume")]
    with pytest.raises(UserError, match=r"not the one that .*--data\.path"):
        main(flags)
    main([*flags, "--data.path", str(tmp_path / "moved.txt"), "--data.folder", str(tmp_path)])
    assert same(final(tmp_path, "halves"), final(tmp_path, "whole"))


SHAKESPEARE = "To be, or not to be: that is the question.\n" * 50


def auto(monkeypatch, online):
    """The flags for a run on whatever there is: Tiny Shakespeare, or not."""
    def found(folder):
        if not online:
            raise NoNetwork(f"nothing in {folder}")
        return SHAKESPEARE

    monkeypatch.setattr(data, "tiny_shakespeare", found)
    monkeypatch.setattr(data, "BUILTIN_CHARACTERS", 5000)
    monkeypatch.setattr(checkpoint, "SHAKESPEARE_SHA256", data.sha256_of(SHAKESPEARE.encode()))
    return ["--data.path", "none", "--train.max_steps", "1"]


def test_a_run_with_dataset_auto_is_resumed_on_the_text_it_was_trained_on(tmp_path, monkeypatch):
    quietly(monkeypatch)
    for name, online in (("shakespeare", True), ("builtin", False)):
        main(argv(tmp_path, *named(name, *auto(monkeypatch, online))))
        before = final(tmp_path, name)
        again = argv(tmp_path, *named(name, *auto(monkeypatch, not online), "--resume"))
        if online:
            with pytest.raises(NoNetwork, match="nothing in data"):
                main(again)
        else:
            main(again)
        assert same(final(tmp_path, name), before), f"the run on {name} has changed"


def test_without_a_run_to_resume_a_new_one_starts_and_says_so(tmp_path, monkeypatch, capsys):
    quietly(monkeypatch)
    main(argv(tmp_path, *named("mine", "--resume")))
    assert "nothing to resume yet: starting afresh" in capsys.readouterr().out
    assert final(tmp_path, "mine")["step"] == 6
    main(argv(tmp_path, *named("yours", "--resume")))
    assert "starting afresh" in capsys.readouterr().out
    assert final(tmp_path, "yours")["step"] == 6


def test_a_run_that_died_before_its_first_checkpoint_can_be_resumed(tmp_path, monkeypatch):
    quietly(monkeypatch)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "token_losses", interrupted)
        main(argv(tmp_path, *named("mine")))
    main(argv(tmp_path, *named("mine", "--resume")))
    assert final(tmp_path, "mine")["step"] == 6


def test_a_run_without_a_checkpoint_is_not_taken_for_the_name_next_to_it(
    tmp_path, monkeypatch, capsys
):
    quietly(monkeypatch)
    main(argv(tmp_path, *named("mine")))
    before = final(tmp_path, "mine")
    (tmp_path / "outputs/mine2").mkdir()
    with pytest.raises(UserError, match=r"'mine2' is in .*--overwrite") as error:
        main(argv(tmp_path, *named("mine2")))
    assert "--resume" not in str(error.value)
    main(argv(tmp_path, *named("mine2", "--resume")))
    assert "nothing to resume yet: starting afresh" in capsys.readouterr().out
    assert same(final(tmp_path, "mine2"), before) and same(final(tmp_path, "mine"), before)
    with pytest.raises(UserError, match=r"no run 'mine3' to resume; the closest: mine"):
        main(argv(tmp_path, *named("mine3", "--resume")))


def test_files_of_a_run_without_a_checkpoint_are_never_replaced(home, tmp_path, monkeypatch):
    quietly(monkeypatch)
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    folder = run_of(tmp_path, "first")
    (folder / "checkpoint.pt").rename(tmp_path / "elsewhere.pt")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"best\.pt, .*metrics\.jsonl.*--overwrite"):
        main(argv(tmp_path, *named("first", "--train.seed", "7", "--resume")))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_that_cannot_be_resumed_is_refused_and_stays(
    home, tmp_path, monkeypatch
):
    quietly(monkeypatch)
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    path = run_of(tmp_path, "first") / "checkpoint.pt"
    state = load_checkpoint(path)
    adamw, muon = state["optimizer"]
    wider = adamw | {"m": [torch.cat([m, m]) for m in adamw["m"]]}
    for changes, told in [
        ({"optimizer": []}, "optimiser"), ({"optimizer": [adamw]}, "optimiser"),
        ({"optimizer": [muon, adamw]}, "optimiser"), ({"optimizer": [wider, muon]}, "optimiser"),
        ({"optimizer": [3, 4]}, "optimiser"), ({"sampler": None}, "sampler"),
        ({"recent": 3}, "recent"), ({"data_sha256": "0"}, "the text is not"),
        ({"tokenizer": {"kind": "char"}}, "tokenizer"), ({"tokenizer": {}}, "tokenizer"),
        ({"step": 10**6}, "of step 1,000,000"),
    ]:
        checkpoint.save_checkpoint(path, state | changes)
        before = path.read_bytes()
        with pytest.raises(UserError, match=told):
            main(argv(tmp_path, *named("first", "--resume")))
        assert path.read_bytes() == before
    for field in ("sampler", "rng", "recent", "data_sha256"):
        checkpoint.save_checkpoint(path, {name: state[name] for name in state if name != field})
        with pytest.raises(UserError, match=f"lacks {field}"):
            main(argv(tmp_path, *named("first", "--resume")))


def test_a_second_process_in_a_run_s_folder_is_refused_before_it_writes(tmp_path, monkeypatch):
    quietly(monkeypatch)
    refused = []

    def second():
        for flags in (["--resume"], ["--overwrite"], []):
            with pytest.raises(UserError, match="another process") as error:
                main(argv(tmp_path, *named("mine"), *flags))
            refused.append(str(error.value))

    with monkeypatch.context() as patched:
        on_batch(patched, 4, second)
        main(argv(tmp_path, *named("mine")))
    assert len(refused) == 3
    steps = [step for step, in curve(tmp_path, "mine")]
    assert steps == sorted(set(steps)) and steps[-1] == 6
    main(argv(tmp_path, *named("mine", "--resume")))  # the lock is given back


# Divergence


def test_a_run_that_diverges_stops_and_names_its_last_good_checkpoint(tmp_path):
    wild = ["--train.lr", "1e30", "--train.muon_lr", "1e30", "--train.warmup_steps", "0"]
    for evaluate_every, log_every in (("3", "2"), ("1", "1")):
        flags = [*named("wild", "--overwrite"), *wild, "--train.eval_interval", evaluate_every,
                 "--train.log_interval", log_every]
        with pytest.raises(UserError, match=r"--train\.lr") as error:
            main(argv(tmp_path, *flags))
        path, step = re.search(r"checkpoint is (\S+), of step (\d+)$", str(error.value)).groups()
        assert Path(path) == run_of(tmp_path, "wild") / "checkpoint.pt"
        assert load_checkpoint(path)["step"] == int(step), f"evaluated every {evaluate_every}"
        model, _ = load_model("wild", tmp_path / "outputs")
        assert all(weight.isfinite().all() for weight in model.state_dict().values())


def worsens_from_step_6(monkeypatch):
    """Lets `fit` report a loss of 9 from there on."""
    real = train.fit

    def worsening(*args, **more):
        for step in real(*args, **more):
            yield dataclasses.replace(step, loss=9.0 if step.number > 5 else step.loss)

    monkeypatch.setattr(train, "fit", worsening)


def test_a_run_that_only_makes_things_worse_stops_with_its_last_good_checkpoint(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "PATIENCE", 4)
    flags = ["--train.max_steps", "50", "--train.eval_interval", "2"]
    worsens_from_step_6(monkeypatch)
    with pytest.raises(UserError, match=r" 4 steps, 9 at step 9.*--train\.lr.*of step 4$"):
        main(argv(tmp_path, *named("worse"), *flags))
    assert final(tmp_path, "worse")["step"] == 4


def test_a_run_stopped_while_it_makes_things_worse_keeps_its_last_good_checkpoint(
    tmp_path, monkeypatch, capsys
):
    flags = ["--train.max_steps", "50", "--train.eval_interval", "2"]
    worsens_from_step_6(monkeypatch)
    stopped_at(9, tmp_path, *named("worse"), *flags)
    assert final(tmp_path, "worse")["step"] == 4
    assert "stopped after step 9; to continue from step 4: python" in capsys.readouterr().out


def test_one_bad_batch_does_not_stop_a_run(tmp_path, monkeypatch):
    quietly(monkeypatch)
    monkeypatch.setattr(train, "PATIENCE", 2)
    real = train.fit

    def uneven(*args, **more):
        for step in real(*args, **more):
            yield dataclasses.replace(step, loss=9.0 if step.number % 2 else step.loss)

    monkeypatch.setattr(train, "fit", uneven)
    main(argv(tmp_path, *named("uneven"), "--train.max_steps", "7"))
    assert final(tmp_path, "uneven")["step"] == 7


# Scale


def test_a_token_file_trains_to_the_bits_of_its_text(home, monkeypatch):
    quietly(monkeypatch)
    prepare([str(home / "text.txt")], PrepareConfig(out=str(home / "tokens")))
    main(argv(home, *named("prepared"), "--data.path", str(home / "tokens")))
    assert same(final(home, "prepared")["model"], final(home, "first")["model"])
    columns = "train_loss", "val_loss"
    assert curve(home, "prepared", *columns) == curve(home, "first", *columns)


def test_a_run_is_not_resumed_on_a_token_file_of_another_tokenizer(tmp_path, monkeypatch):
    quietly(monkeypatch)
    argv(tmp_path)  # writes the text
    text = [str(tmp_path / "text.txt")]
    folder = str(tmp_path / "tokens")
    prepare(text, PrepareConfig(out=folder))
    main(argv(tmp_path, *named("mine"), "--data.path", folder))
    prepare(text, PrepareConfig("bpe", vocab_size=260, out=folder))
    with pytest.raises(UserError, match="of another tokenizer than the run"):
        main(argv(tmp_path, *named("mine", "--resume"), "--data.path", folder))


def test_a_preset_gives_its_shape_except_for_given_flags(tmp_path, monkeypatch):
    quietly(monkeypatch)
    flags = argv(tmp_path, *named("mine"), "--train.max_steps", "1")
    flags = [*flags[flags.index("--train.max_steps"):], "--model.preset", "gpt2"]
    small = ["--model.d_model", "24", "--model.n_ctx", "16", "--model.n_layers", "1"]
    main([*small[:2], *flags, *small[2:]])
    shape = final_config(tmp_path, "mine")["model"]
    assert [shape[f"n_{what}"] for what in ("layers", "heads", "ctx")] == [1, 12, 16]
    assert shape["d_model"] == 24
    assert shape["tie_embeddings"] is True and "preset" not in shape
    main([*small, *flags, "--resume"])  # the same flags contradict nothing


def final_config(folder, name):
    return json.loads((run_of(folder, name) / "config.json").read_text())


def test_the_compiled_model_is_trained_and_the_plain_one_is_saved(tmp_path, monkeypatch):
    quietly(monkeypatch)
    calls = []

    class Compiled(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            calls.append(self.training)
            return self.model(tokens)

    monkeypatch.setattr(torch, "compile", Compiled)
    main(argv(tmp_path, *named("mine"), "--train.compile"))
    assert calls == [True] * 6
    load_model("mine", tmp_path / "outputs")


def test_the_memory_of_a_step_is_printed(tmp_path, monkeypatch, capsys):
    quietly(monkeypatch)
    main(argv(tmp_path, "--model.d_model", "64", "--train.accumulate", "2"))
    cfg = final_config(tmp_path, "run-001")["model"]
    bytes_ = 2 * 8 * ModelConfig(**cfg).activation_bytes
    assert f"1 x {bytes_ / 1e6:.1f} MB of activations" in capsys.readouterr().out


def test_the_message_on_a_batch_that_ranks_cannot_share_has_sizes_that_work(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "n_ranks", lambda: 3)
    with pytest.raises(UserError, match=r"batch_size=4 .* 3 ranks .*accumulate=2.* 6"):
        main(argv(tmp_path, "--train.accumulate", "2"))
    assert not (tmp_path / "outputs").exists()


def test_every_rank_takes_its_share_of_one_draw(home, monkeypatch):
    def batch_of(number, n_ranks):
        cfg = Config(DataConfig(path=str(home / "text.txt"), repeats=0.3),
                     dataclasses.replace(TINY_SHAPE, n_ctx=8), TrainConfig())
        run = TrainingRun(cfg, load_dataset(cfg.data, 8), torch.device("cpu"))
        with monkeypatch.context() as patched:
            patched.setattr(train, "rank", lambda: number)
            patched.setattr(train, "n_ranks", lambda: n_ranks)
            return [run.next_batch() for _ in range(2)][1]

    whole = batch_of(0, 1)
    for n_ranks in (2, 3):
        shares = [batch_of(number, n_ranks) for number in range(n_ranks)]
        assert all(len(inputs) == 12 // n_ranks for inputs, _ in shares)
        assert all(map(torch.equal, map(torch.cat, zip(*shares, strict=True)), whole))


def test_other_ranks_draw_other_dropout_and_the_same_again(home, monkeypatch):
    def drawn(number, step):
        cfg = Config(DataConfig(path=str(home / "text.txt")), TINY_SHAPE)
        run = TrainingRun(cfg, load_dataset(cfg.data, 32), torch.device("cpu"))
        run.state.step = step
        with monkeypatch.context() as patched:
            patched.setattr(train, "rank", lambda: number)
            patched.setattr(train, "n_ranks", lambda: 3)
            run.next_batch()
        return torch.rand(1).item()

    draws = [drawn(number, step) for number in (0, 1, 2) for step in (5, 6) if number or step == 5]
    assert len(set(draws)) == 5 and drawn(2, 6) == draws[-1]


# Repeats


def test_each_batch_has_the_requested_share_of_repeats(tmp_path):
    def batch(share):
        text = str(tmp_path / "text.txt")
        cfg = Config(DataConfig(path=text, repeats=share), TINY_SHAPE, TrainConfig(batch_size=10))
        return TrainingRun(cfg, load_dataset(cfg.data, 32), torch.device("cpu")).next_batch()

    (tmp_path / "text.txt").write_text(corpus.text(1500), encoding="utf-8")
    for share, expected in ((0.0, 0), (0.2, 2), (0.9, 9)):
        inputs, targets = batch(share)
        assert inputs.shape == targets.shape == (10, 32)
        periodic = [any(torch.equal(row[p:], row[:-p]) for p in range(4, 17)) for row in inputs]
        assert periodic == [False] * (10 - expected) + [True] * expected


def test_a_share_of_repeats_below_one_window_is_refused():
    with pytest.raises(UserError, match=r"repeats=0\.01 of batch_size=12 .*0\.083 or more"):
        Config(DataConfig(repeats=0.01))


def test_a_signal_asks_for_a_stop_and_a_second_one_stops_at_once():
    for number in (signal.SIGINT, signal.SIGTERM):
        with stop_on_signal() as stop:
            assert not stop.requested
            signal.raise_signal(number)
            assert stop.requested, f"{number!r} asks for nothing"
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)


def test_signal_handlers_are_put_back_even_after_an_error():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), stop_on_signal():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
        raise RuntimeError
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# Whole processes

LONG = ["--train.max_steps", "1000", "--train.eval_interval", "50", "--train.threads", "1",
        "--model.dropout", "0.1"]


def start(folder, *flags):
    """A process that trains; it writes into folder/outputs."""
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv(folder, *LONG, *flags)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(folder, name, step, process):
    """Waits until the run has passed the step; fails if it ended before."""
    while process.poll() is None:
        path = run_of(folder, name) / "metrics.jsonl"
        if path.exists() and (rows := read_metrics(path.parent)) and rows[-1]["step"] >= step:
            return
        time.sleep(0.005)
    pytest.fail(f"the run ended before step {step}: {process.communicate()}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    assert start(folder, *named("whole")).wait(timeout=100) == 0
    return folder


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_resumes_to_the_same_bits(uninterrupted):
    chance = random.Random(0)
    for step in (1, 300, 600):
        process = start(uninterrupted, *named("killed", "--resume"))
        wait_for_step(uninterrupted, "killed", step, process)
        time.sleep(0.2 * chance.random())
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        load_model("killed", uninterrupted / "outputs")
    assert start(uninterrupted, *named("killed", "--resume")).wait(timeout=100) == 0
    assert same(final(uninterrupted, "killed"), final(uninterrupted, "whole"))
    columns = "train_loss", "val_loss", "lr"
    assert curve(uninterrupted, "killed", *columns) == curve(uninterrupted, "whole", *columns)


@pytest.mark.slow
def test_sigterm_stops_a_run_cleanly_and_a_message_says_how_to_resume(uninterrupted):
    name = "stopped"
    process = start(uninterrupted, *named(name))
    wait_for_step(uninterrupted, name, 100, process)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err
    assert f"to continue: python train.py --logging.run_name {name} --logging.out_dir " in out
    state = load_checkpoint(run_of(uninterrupted, name) / "checkpoint.pt")
    assert f"stopped after step {state['step']:,};" in out and 100 <= state["step"] < 1000
    assert start(uninterrupted, *named(name, "--resume")).wait(timeout=100) == 0
    assert same(final(uninterrupted, name), final(uninterrupted, "whole"))


# Several processes

WATCHED = """
import hashlib, os, pathlib, signal, sys
import train
from utils import rank, run_program

real, (victim, at, how, out) = train.fit, sys.argv[1:5]

def watched(model, *args, **more):
    for step in real(model, *args, **more):
        weights = b"".join(weight.detach().numpy().tobytes() for weight in model.parameters())
        with open(f"{out}-{rank()}", "a") as file:
            print(step.number, step.loss, hashlib.sha256(weights).hexdigest(), file=file)
        if (rank(), step.number) == (int(victim), int(at)):
            os.kill(os.getpid(), getattr(signal, how))
        yield step

train.fit = watched
run_program(lambda: train.main(sys.argv[5:]))
left = [name.read_text() for name in pathlib.Path("/proc/self/task").glob("*/comm")]
assert not [name for name in left if "gloo" in name], left  # of these, Python's end is the end
"""
SHORT = ["--train.max_steps", "40", "--train.eval_interval", "10", "--train.log_interval", "1",
         "--train.threads", "1"]


def together(folder, name, *flags, victim=-1, at=0, how="SIGKILL"):
    """Two ranks that train, of which one may get a signal after a step: (exit code, complaints, the
    finished process)."""
    program = folder / "ranks.py"
    program.write_text(WATCHED)
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(program), str(victim), str(at), how, str(folder / name),
         *argv(folder, *SHORT, *named(name), *flags)],
        capture_output=True, text=True, timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return ran.returncode, [line for line in ran.stderr.splitlines() if "error: " in line], ran


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    [], ["--train.accumulate", "2", "--train.optimizer", "adamw", "--train.grad_clip", "0.1"],
], ids=["muon", "accumulating"])
def test_two_ranks_have_one_process_s_loss_curve_and_equal_weights(tmp_path, monkeypatch, flags):
    quietly(monkeypatch)
    main(argv(tmp_path, *SHORT, *named("one"), *flags))
    code, _, ran = together(tmp_path, "two", *flags)
    assert code == 0, ran.stderr
    assert ran.stdout.count("validation loss") == 1  # the others are silent
    logs = [(tmp_path / f"two-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert len(logs[0]) == 40 and logs[0] == logs[1]
    for column in ("train_loss", "val_loss", "grad_norm"):
        one, two = (curve(tmp_path, name, column) for name in ("one", "two"))
        assert [step for step, _ in one] == [step for step, _ in two] == list(range(41))
        differences = [abs(a - b) for (_, a), (_, b) in zip(one, two, strict=True) if a is not None]
        assert len(differences) > 4 and max(differences) < 1e-4
    assert curve(tmp_path, "one", "train_loss")[-1][1] < curve(tmp_path, "one", "train_loss")[1][1]


@pytest.mark.slow
def test_if_a_rank_dies_all_stop_and_resume_from_the_last_checkpoint(tmp_path):
    dropout = ["--model.dropout", "0.2"]
    assert together(tmp_path, "whole", *dropout)[0] == 0
    for victim, name in ((0, "first"), (1, "second")):
        code, errors, ran = together(tmp_path, name, *dropout, victim=victim, at=17)
        assert code != 0 and "exitcode  : -9" in ran.stderr
        assert errors == ["ranks.py: error: another rank of this run has stopped; continue with "
                          "--resume from the last checkpoint, which is complete"]
        assert final(tmp_path, name)["step"] == 10
    assert together(tmp_path, "first", *dropout, "--resume")[0] == 0
    assert same(final(tmp_path, "first"), final(tmp_path, "whole"))


@pytest.mark.slow
def test_a_rank_that_is_asked_to_stop_stops_all_after_the_same_step(tmp_path):
    code, errors, ran = together(tmp_path, "mine", victim=1, at=17, how="SIGTERM")
    assert (code, errors) == (0, []) and "stopped after step 17; to continue: " in ran.stdout
    assert final(tmp_path, "mine")["step"] == 17


@pytest.mark.slow
def test_an_error_on_all_ranks_gives_one_line_and_writes_nothing(tmp_path):
    code, errors, _ = together(tmp_path, "mine", "--train.batch_size", "5")
    assert code != 0 and len(set(errors)) == 1 and "batch_size=5" in errors[0]
    assert not (tmp_path / "outputs").exists()
    (tmp_path / "outputs/mine").mkdir(parents=True)
    code, errors, _ = together(tmp_path, "mine")  # which rank 0 alone finds out
    assert code != 0 and len(set(errors)) == 1 and "run 'mine' is in" in errors[0]
    assert not list((tmp_path / "outputs/mine").iterdir())
