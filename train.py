"""Trains a small GPT-2 on a text: the main program.

    python train.py                                        # Tiny Shakespeare, one to two minutes
    python train.py --data.path my.txt --model.n_layers 2 --logging.run_name mine
    python train.py --logging.run_name mine --resume       # continue a run that was stopped
    python train.py --train.init_from mine --data.path my.txt --train.lr 5e-4 --train.muon_lr 2e-3
    torchrun --standalone --nproc_per_node 2 train.py      # the same run, on two devices

Writes outputs/<run>/: config.json, checkpoint.pt, best.pt, metrics.jsonl, loss.png, sample.txt.

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Prerequisites: data.py, model.py, optim.py, generate.py
Next: documents.py
Source: Radford et al. 2019; Jordan et al. 2024 (the optimiser)
"""

import contextlib
import dataclasses
import math
import signal
import time
from dataclasses import dataclass, field
from statistics import fmean
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel

import plotting
from checkpoint import (
    RunLock,
    add_rows,
    check_run_name,
    check_same_structure,
    config_of,
    load_model_to_tune,
    load_run_to_resume,
    new_run_folder,
    read_metrics,
    record_max_steps,
    reload_dataset,
    run_flags,
    save_checkpoint,
    write_run_config,
)
from config import (
    PRESETS,
    Config,
    GenerateConfig,
    TrainConfig,
    config_from_dict,
    flag_parser,
    nest_flags,
)
from data import load_dataset, random_batch, repeated_batch, windows_in_order
from generate import generate_text
from losses import IGNORED, cross_entropy, per_token_loss
from model import GPT
from optim import clip_gradients_, freeze_, make_optimizers, schedule
from pretrained import check_weights_fit
from utils import (
    Progress,
    UserError,
    atomic_write,
    count_of,
    joined_ranks,
    list_names,
    mean_over_ranks,
    n_ranks,
    rank,
    run_program,
    seeded_generator,
)

PATIENCE = 100  # stop after this many steps in a row with a loss above the untrained model's
EARLY = (50, 100, 200)  # evaluate after these steps too, because the loss falls fastest in them


# The loop


class Diverged(UserError):
    """The loss or its gradient is no longer finite, or training has made the model worse."""


@dataclass(frozen=True)
class Step:
    """The report of one training step.

    number: counted from 1. loss: of the batch, in nats per token. share: the learning rate as a
    fraction of its full value. grad_norm: the gradient's norm before clipping. seconds: the time
    that the step took.
    """

    number: int
    loss: float
    share: float
    grad_norm: float
    seconds: float


def fit(model, next_batch, cfg, *, optimizers=None, start=0, loss_fn=cross_entropy):
    """The training loop: trains the model in place and yields a Step after each step.

    next_batch() -> (inputs, targets), on the model's device. cfg: a TrainConfig.
    loss_fn(model(inputs), targets) -> a scalar, the mean over the targets that are not IGNORED
    (losses.py); parts and ranks are weighted by their number of such targets. start: the number of
    steps already taken. Raises Diverged, before the weights are changed, if the loss or its
    gradient is not finite, and UserError for a batch in which every target is ignored.

    A batch is processed in cfg.accumulate parts, one after another, whose gradients add up: only
    one part's activations are in memory at a time.
    """
    if optimizers is None:
        freeze_(model, cfg.freeze)
        optimizers = make_optimizers(model, cfg)
    dtype = next(model.parameters()).dtype
    no_sync = getattr(model, "no_sync", contextlib.nullcontext)  # DistributedDataParallel has it

    for number in range(start + 1, cfg.max_steps + 1):
        began = time.perf_counter()
        inputs, targets = next_batch()  # each [batch, pos]
        parts = list(zip(inputs.chunk(cfg.accumulate), targets.chunk(cfg.accumulate), strict=True))
        n_targets = mean_over_ranks((targets != IGNORED).sum().item())  # targets per rank
        if n_targets == 0:
            raise UserError(f"step {number}: every target of the batch is {IGNORED}, which is "
                            "ignored; give at least one target to predict")

        model.zero_grad()
        loss = 0.0
        for part, (part_inputs, part_targets) in enumerate(parts, 1):
            # With several ranks, gradients are averaged once, in the last part's backward pass.
            with no_sync() if part < len(parts) else contextlib.nullcontext():
                with torch.autocast(part_inputs.device.type, torch.bfloat16,
                                    enabled=cfg.precision == "bfloat16"):
                    # Forward
                    logits = model(part_inputs).to(dtype)  # [part, pos, d_vocab]

                    # Loss: this part's share of the batch mean, by the number of its targets
                    n_counted = (part_targets != IGNORED).sum().item()
                    part_loss = loss_fn(logits, part_targets) * (n_counted / n_targets)
                    del logits  # the largest tensor; autograd keeps what the loss needs

                # Backward: adds this part's gradient to `.grad`
                part_loss.backward()
            loss += part_loss.detach()
        loss = mean_over_ranks(loss.item())

        # Clip
        grad_norm = clip_gradients_(model.parameters(), cfg.grad_clip).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise Diverged(f"training diverged at step {number}: loss {loss:.4g}, gradient "
                           f"norm {grad_norm:.4g}; try a smaller --train.lr")

        # Step
        share = share_of_rate(number, cfg)
        for optimizer in optimizers:
            optimizer.step(share)
        yield Step(number, loss, share, grad_norm, time.perf_counter() - began)


def share_of_rate(number, cfg):
    """The share of the full learning rates at step `number`, counted from 1, of a TrainConfig."""
    return schedule(number - 1, cfg.max_steps, cfg.warmup_steps, shape=cfg.schedule,
                    final_fraction=cfg.final_lr_fraction)


def token_losses(model, tokens, batch_size=16, starts=None):
    """Yields the loss of each token of a text except the first: floats in nats, in text order.

    tokens: [n], predicted in windows of n_ctx, as `windows_in_order` cuts them.
    Leaves the model in the mode (training or evaluation) that it was in.
    """
    was_training = model.training
    model.eval()
    try:
        for window in windows_in_order(tokens, batch_size, model.cfg.n_ctx, starts):
            inputs, targets, counted = (part.to(model.W_E.device) for part in window)
            with torch.no_grad():  # not as a decorator, which would enter it again for each token
                losses = per_token_loss(model(inputs), targets)[counted]
            yield from losses.tolist()
    finally:  # also if the caller stops early
        model.train(was_training)


def evaluate(model, tokens, batch_size=16):
    """The mean of `token_losses`, a float in nats per token."""
    return fmean(token_losses(model, tokens, batch_size))


# A run


@dataclass
class RunState:
    """The progress of a run, as stored in its checkpoint beside tensors and settings.

    step: the number of steps taken. seconds: the time that they took. best_loss: the lowest
    validation loss so far. lost: the number of steps in a row with a loss above `untrained`.
    untrained: the validation loss before the first step, or that of a uniform guess if this is
    higher: a model that is tuned may get worse first. earlier_max_steps: [(step, max_steps), …],
    the numbers of steps that were planned until those steps.
    """

    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    lost: int = 0
    untrained: float = math.inf
    earlier_max_steps: list = field(default_factory=list)

    @classmethod
    def from_checkpoint(cls, saved):
        """The RunState in a checkpoint's dict; fields missing from an older one have defaults."""
        names = [field.name for field in dataclasses.fields(cls) if field.name in saved]
        return cls(**{name: saved[name] for name in names})


class TrainingRun:
    """A training run in progress: the model, its optimisers, the data, and the run's files.

    weights: {name: tensor} to begin with; random ones by default. Call `begin` or `resume`, then
    `train`.
    """

    def __init__(self, cfg, dataset, device, weights=None):
        self.cfg = cfg
        self.dataset = dataset
        self.model = GPT(cfg.model, cfg.train.seed).to(device)
        if weights is not None:
            self.model.load_weights_(weights, cfg.train.init_from)
        self.frozen = freeze_(self.model, cfg.train.freeze)

        # What trains on the batches: the same weights, compiled or shared between ranks
        self.learner = torch.compile(self.model) if cfg.train.compile else self.model
        if n_ranks() > 1:
            self.learner = DistributedDataParallel(self.learner)

        self.optimizers = make_optimizers(self.model, cfg.train)
        self.sampler = seeded_generator(cfg.train.seed)
        torch.manual_seed(cfg.train.seed)  # for dropout, which cannot take a generator
        self.state = RunState()
        self.rows = []  # the rows of metrics.jsonl
        self.recent = []  # the steps since the last row

    def begin(self, overwrite=False, *, unless_used=False, lock=None):
        """Creates the run's folder and its first checkpoint, so a checkpoint always exists.

        Arguments as in `new_run_folder`.
        """
        logging = self.cfg.logging
        self.folder = new_run_folder(logging.out_dir, logging.run_name, overwrite,
                                     unless_used=unless_used, lock=lock)
        write_run_config(self.folder, self.cfg, self.dataset, self.model)
        self.validate()

    def resume(self, folder, saved):
        """Restores everything that the next step depends on from a checkpoint.

        folder: the run's. saved: the checkpoint's dict. Rows of metrics.jsonl from after the
        checkpoint are dropped.
        """
        self.folder = folder
        path = folder / "checkpoint.pt"
        fresh = [optimizer.state_dict() for optimizer in self.optimizers]
        check_same_structure(saved["optimizer"], fresh, f"the optimiser's state in {path}")
        self.model.load_weights_(saved["model"], path)
        for optimizer, optimizer_state in zip(self.optimizers, saved["optimizer"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.sampler.set_state(saved["sampler"])
        torch.set_rng_state(saved["rng"])
        self.state = RunState.from_checkpoint(saved)
        self.saved_step = self.state.step

        self.recent = [Step(*values) for values in saved["recent"]]
        self.rows = [row for row in read_metrics(folder) if row["step"] <= self.state.step]
        add_rows(folder, self.rows, afresh=True)
        self.change_max_steps(before=config_of(saved, path).train.max_steps)

        # If a finished run's last row was lost, its result is missing: evaluate again.
        last_row = self.rows[-1] if self.rows else {}
        has_result = last_row.get("step") == self.state.step and "val_loss" in last_row
        if self.is_finished() and not has_result:
            self.validate()

    def change_max_steps(self, before):
        """Notes that another number of steps was planned so far, in the files of the run.

        The checkpoint is written first, because it alone says how to resume; config.json follows,
        at the latest when the run is resumed again.
        """
        after = self.cfg.train.max_steps
        if after != before:
            self.state.earlier_max_steps.append((self.state.step, before))
            self.save("checkpoint.pt")
        record_max_steps(self.folder, after, self.state.earlier_max_steps)

    def is_finished(self):
        """Whether all steps have been taken."""
        return self.state.step == self.cfg.train.max_steps

    def is_evaluation_due(self):
        """Whether to evaluate after this step: at the end, at every eval_interval, and early."""
        step = self.state.step
        interval = self.cfg.train.eval_interval
        return self.is_finished() or step % interval == 0 or (step < interval and step in EARLY)

    def next_batch(self):
        """(inputs, targets), each [batch, pos]: this rank's share of the next batch.

        A batch holds windows from random places of the training text, plus repeated sequences if
        the config asks for them. Every rank draws the whole batch and takes its share.
        """
        # A checkpoint holds only rank 0's CPU generator; any other generator for dropout is seeded
        # again at each step.
        if rank() or not self.model.W_E.is_cpu:
            torch.manual_seed(hash((self.cfg.train.seed, self.state.step, rank())))

        n_ctx = self.cfg.model.n_ctx
        n_repeats = self.cfg.n_repeats
        n_windows = self.cfg.train.batch_size - n_repeats
        inputs, targets = random_batch(self.dataset.train, n_windows, n_ctx, self.sampler)
        if n_repeats:
            d_vocab = self.dataset.tokenizer.d_vocab
            repeats = repeated_batch(d_vocab, n_repeats, n_ctx, self.sampler)
            inputs = torch.cat([inputs, repeats[0]])
            targets = torch.cat([targets, repeats[1]])

        device = self.model.W_E.device
        return [tokens.chunk(n_ranks())[rank()].to(device) for tokens in (inputs, targets)]

    def train(self):
        """Trains until max_steps or a stop signal. Returns whether the run is finished."""
        cfg = self.cfg.train
        state = self.state
        progress = Progress(cfg.max_steps, " steps", done=state.step)
        steps = fit(self.learner, self.next_batch, cfg, optimizers=self.optimizers,
                    start=state.step)
        with stop_on_signal() as stop:
            for step in steps:
                state.step = step.number
                state.seconds += step.seconds
                self.recent.append(step)
                self.count_lost_steps(step)

                if self.is_evaluation_due():
                    self.validate()
                elif state.step % cfg.log_interval == 0:
                    self.log()
                speed = self.tokens_per_second([step])
                progress.show(state.step, f"loss {step.loss:.3f}  {speed:,.0f} tokens/s")

                if mean_over_ranks(stop.requested):  # if any rank received a signal
                    if not state.lost:  # if the loss is bad, the last good checkpoint is kept
                        self.save("checkpoint.pt")
                    break
        progress.close()
        return self.is_finished()

    def count_lost_steps(self, step):
        """Raises Diverged if the model is worse than untrained for PATIENCE steps in a row."""
        state = self.state
        # Before anything is learned, the batch loss may vary by less than two percent.
        if step.loss > 1.02 * state.untrained:
            state.lost += 1
        else:
            state.lost = 0

        if state.lost == PATIENCE:
            raise Diverged(f"the loss was above an untrained model's {state.untrained:.4g} "
                           f"for {PATIENCE} steps, {step.loss:.4g} at step {state.step}; try a "
                           "smaller --train.lr or --train.muon_lr")

    def tokens_per_second(self, steps):
        """The mean speed over some steps."""
        n_tokens = len(steps) * self.cfg.train.batch_size * self.cfg.model.n_ctx
        return n_tokens / sum(step.seconds for step in steps)

    def validate(self):
        """Evaluates on the whole validation split, logs the loss, and writes the checkpoints."""
        state = self.state
        floor = self.dataset.floor
        windows_at_once = self.cfg.train.windows_at_once(n_ranks())

        # The losses; if the text is made of stories, windows begin where stories begin
        starts = None if floor is None else floor.starts
        losses = token_losses(self.model, self.dataset.val, windows_at_once, starts)
        results = {}
        if floor is None:
            results["val_loss"] = fmean(losses)
        else:
            losses = list(losses)
            results["val_loss"] = fmean(losses)
            results["above_floor"] = floor.above(torch.tensor(losses).double())

        val_loss = results["val_loss"]
        if not math.isfinite(val_loss):
            raise Diverged(f"the validation loss is {val_loss} at step {state.step}; try a smaller "
                           "--train.lr")
        if state.step == 0:
            state.untrained = max(val_loss, math.log(self.cfg.model.d_vocab))
        self.log(**results)

        # The checkpoints
        if val_loss < state.best_loss:
            state.best_loss = val_loss
            self.save("best.pt")
        if not state.lost or self.is_finished():  # else keep the last good checkpoint
            self.save("checkpoint.pt")

    def log(self, **results):
        """Adds a row to metrics.jsonl: means over the steps since the last row, and `results`."""
        row = {"step": self.state.step, "seconds": self.state.seconds}
        if self.recent:
            n_steps = len(self.recent)
            row["train_loss"] = sum(step.loss for step in self.recent) / n_steps
            row["grad_norm"] = sum(step.grad_norm for step in self.recent) / n_steps
            row["lr"] = self.recent[-1].share * self.cfg.train.lr
            row["tokens_per_s"] = self.tokens_per_second(self.recent)
            self.recent = []
        row |= results
        self.rows.append(row)
        add_rows(self.folder, [row])

    def save(self, name):
        """Writes a checkpoint of everything that the next step depends on."""
        save_checkpoint(self.folder / name, {
            # The model, its optimisers and the progress
            "model": self.model.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
            **dataclasses.asdict(self.state),
            "threads": torch.get_num_threads(),
            "recent": [dataclasses.astuple(step) for step in self.recent],

            # The state of the random generators
            "sampler": self.sampler.get_state(),
            "rng": torch.get_rng_state(),

            # The tokenizer, the config and the data
            "tokenizer": self.dataset.tokenizer.state_dict(),
            "config": dataclasses.asdict(self.cfg),
            "data_sha256": self.dataset.sha256,
        })
        if name == "checkpoint.pt":
            self.saved_step = self.state.step


@contextlib.contextmanager
def stop_on_signal():
    """A context in which Ctrl-C and SIGTERM ask for a stop after the current step.

    Yields an object whose `.requested` a signal sets to True; a second signal stops at once.
    """
    stop = SimpleNamespace(requested=False)

    def request(number, frame):
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    signals = (signal.SIGINT, signal.SIGTERM)
    handlers_before = [signal.signal(number, request) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, handlers_before, strict=True):
            signal.signal(number, handler)


# The program


def start_run(cfg, device, *, overwrite=False, unless_used=False, saved_run=None, source=None,
              lock=None):
    """A TrainingRun that is ready to train: a new one, or one that continues.

    overwrite, unless_used, lock: what to do if the folder exists, as in `new_run_folder`.
    saved_run: (folder, checkpoint's dict) of the run to continue. source: (weights, tokenizer) of
    the model to begin with. Raises UserError for every mistake in the arguments, before anything
    is written.
    """
    weights, tokenizer = (None, None) if source is None else source
    if cfg.train.threads is not None:
        torch.set_num_threads(cfg.train.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: 10-bit products, 23-bit sums

    # The text, the shape of the model, and the run
    if saved_run is None:
        # The name is checked first, because loading the text may take long.
        check_run_name(cfg.logging.out_dir, cfg.logging.run_name, overwrite,
                       unless_used=unless_used, lock=lock)
        dataset = load_dataset(cfg.data, cfg.model.n_ctx, tokenizer)
    else:
        dataset = reload_dataset(*saved_run, cfg)
    cfg.train.windows_at_once(n_ranks())  # raises if the ranks cannot share a batch equally
    shape = dataclasses.replace(cfg.model, d_vocab=vocabulary_size(cfg, dataset.tokenizer))
    if saved_run is not None:
        folder, saved = saved_run
        check_weights_fit(shape, saved["model"], folder / "checkpoint.pt")
    run = TrainingRun(dataclasses.replace(cfg, model=shape), dataset, device, weights)
    print_beginning(run, device)
    if source is not None:
        print_source(cfg.train)

    if saved_run is None:
        run.begin(overwrite, unless_used=unless_used, lock=lock)
        if unless_used:
            print("nothing to resume yet: starting afresh")
        print(f"writing to {run.folder}")
    else:
        run.resume(*saved_run)
        print_continuing(run, before=config_of(saved, run.folder).train.max_steps)
    return run


def vocabulary_size(cfg, tokenizer):
    """The size of the model's vocabulary: the tokenizer's, or more for a model with padding.

    Only a model that training begins with (init_from) may have such padding, ids that are no token.
    Raises UserError for another number in the Config, of tokens or of logits.
    """
    d_vocab = tokenizer.d_vocab
    if cfg.train.init_from is not None:
        d_vocab = max(d_vocab, cfg.model.d_vocab or 0)
    if cfg.model.d_vocab not in (None, d_vocab):
        raise UserError(f"d_vocab={cfg.model.d_vocab} is not the tokenizer's {d_vocab}; leave "
                        "--model.d_vocab out")
    if cfg.model.d_vocab_out not in (None, d_vocab):
        raise UserError(f"d_vocab_out={cfg.model.d_vocab_out} is not the tokenizer's {d_vocab}, "
                        "and training predicts tokens; leave --model.d_vocab_out out")
    return d_vocab


def print_continuing(run, before):
    """Prints where a resumed run goes on, and what another number of steps does to the learning
    rate. before: the number of steps that was planned."""
    cfg = run.cfg.train
    step = run.state.step
    if run.is_finished():
        print(f"{run.folder} is finished: all {step:,} steps were taken; to train longer, give "
              "--resume a larger --train.max_steps")
        return

    print(f"writing to {run.folder}, continuing after step {step:,}")
    if cfg.max_steps != before:
        last = cfg.lr * share_of_rate(max(step, 1), dataclasses.replace(cfg, max_steps=before))
        following = cfg.lr * share_of_rate(step + 1, cfg)
        print(f"max_steps is {cfg.max_steps:,} instead of {before:,}, and from here on the "
              f"schedule is that of {cfg.max_steps:,} steps: the learning rate goes from "
              f"{last:.3g} to {following:.3g}")


def print_beginning(run, device):
    """Prints what is trained, on what text, and how much memory its activations take; and which
    weights stay as they are."""
    dataset = run.dataset
    shape = run.cfg.model
    tokens_at_once = run.cfg.train.windows_at_once(n_ranks()) * shape.n_ctx
    megabytes = tokens_at_once * shape.activation_bytes / 1e6
    and_dropout = ", and dropout's" if shape.dropout > 0 else ""
    print(f"{dataset.name}: {len(dataset.train):,} {dataset.tokenizer.unit}s to train on, "
          f"{len(dataset.val):,} to validate on, of a vocabulary of {shape.d_vocab:,}")
    layers = count_of(shape.n_layers, "layer")
    heads = count_of(shape.n_heads, "head")
    threads = count_of(torch.get_num_threads(), "thread")
    print(f"model: {layers} of {heads}, d_model {shape.d_model}, "
          f"{run.model.n_parameters:,} parameters; {device}, {threads}, "
          f"{n_ranks()} x {megabytes:,.1f} MB of activations{and_dropout}")
    if run.frozen:
        n_frozen = sum(p.numel() for p in run.model.parameters() if not p.requires_grad)
        print(f"{n_frozen:,} parameters stay as they are: {list_names(run.frozen, 8)}")


def print_source(cfg):
    """Prints which model a TrainConfig begins with, and a warning if its learning rates are those
    for a new model."""
    print(f"the weights are those of {cfg.init_from}")
    rates = ["lr", "muon_lr"] if cfg.optimizer == "muon" else ["lr"]
    default = TrainConfig()
    if any(getattr(cfg, rate) >= getattr(default, rate) for rate in rates):
        tenths = " ".join(f"--train.{rate} {getattr(default, rate) / 10:g}" for rate in rates)
        print("with the learning rates of a new model it forgets most of what it knows; a tenth "
              f"keeps more: {tenths}")


def training_figure(run):
    """The Figure saved as loss.png: loss by step."""
    d_vocab = run.cfg.model.d_vocab
    levels = {f"uniform guess, ln {d_vocab} = {math.log(d_vocab):.2f}": math.log(d_vocab)}
    if run.dataset.floor:
        floor = -run.dataset.floor.log_probs[1:].mean().item()
        levels[f"the floor, {floor:.3f}"] = floor
    return plotting.training_curves(run.rows, name=run.dataset.name, levels=levels,
                                    unit=run.dataset.tokenizer.unit)


def sample_text(run):
    """A prompt and the model's continuation of it."""
    tokenizer = run.dataset.tokenizer
    if tokenizer.kind == "bpe" or "\n" in tokenizer.ids:
        prompt = "\n"
    else:
        prompt = tokenizer.decode(run.dataset.train[:1])
    cfg = GenerateConfig(prompt=prompt, max_new_tokens=500, sliding=True)
    pieces = generate_text(run.model.eval(), tokenizer, cfg)
    return (prompt + "".join(pieces)).strip()


def finish(run):
    """Draws the loss curve, writes a sample, and prints the results."""
    plotting.save(training_figure(run), run.folder / "loss.png")
    sample = sample_text(run)
    with atomic_write(run.folder / "sample.txt", "w") as file:
        file.write(sample + "\n")

    # The loss in nats per token and, if tokens are not characters, per character
    unit = run.dataset.tokenizer.unit
    loss = run.rows[-1]["val_loss"]
    per_character = ""
    if unit != "character":
        tokens_per_character = (len(run.dataset.val) - 1) / run.dataset.val_characters
        per_character = f", {loss * tokens_per_character:.4f} nats/character,"
    uniform_loss = math.log(run.cfg.model.d_vocab)
    before = ""
    if run.cfg.train.init_from is not None and run.rows[0]["step"] == 0:
        before = f"before: {run.rows[0]['val_loss']:.4f}, "
    print(f"\n{sample}\n")
    print(f"validation loss {loss:.4f} nats/{unit}{per_character} over the whole split, after "
          f"{run.state.step:,} steps in {run.state.seconds:.0f} s "
          f"({before}a uniform guess: {uniform_loss:.4f})")

    above_floor = run.rows[-1].get("above_floor", {})
    if above_floor:
        parts = [f"{nats:.3f} ({category})" for category, nats in above_floor.items()]
        print(f"nats/token above the floor: {', '.join(parts)}")
    print(f"the curve: {run.folder / 'loss.png'}")
    print(f'more text: python generate.py {run_flags(run.folder)} --sliding --prompt "..."')


def print_how_to_resume(run):
    """Prints how far a stopped run got, and the command that continues it."""
    behind = ""
    if run.saved_step < run.state.step:
        behind = f" from step {run.saved_step:,}"
    program = "python"
    if n_ranks() > 1:
        program = f"torchrun --standalone --nproc_per_node {n_ranks()}"
    print(f"stopped after step {run.state.step:,}; to continue{behind}: {program} train.py "
          f"{run_flags(run.folder, '--logging.')} --resume")


def carry_out(cfg, device, **how):
    """Trains a run, new or continued, until it is finished or a signal stops it.

    Arguments as in `start_run`. Raises UserError if training diverges, naming the last good
    checkpoint.
    """
    run = start_run(cfg, device, **how)
    try:
        is_finished = run.train()
    except Diverged as problem:
        raise UserError(f"{problem}; the last good checkpoint is "
                        f"{run.folder / 'checkpoint.pt'}, of step {run.saved_step}") from None

    if not is_finished:
        print_how_to_resume(run)
    elif rank() == 0:
        finish(run)


def main(argv=None):
    """The program: trains, evaluates, draws the loss curve, writes a sample."""
    parser = flag_parser(Config, "Train a small GPT-2 on a text, or a model that exists.")
    parser.add_argument("--model.preset", choices=PRESETS, help="the shape of a published model")
    parser.add_argument("--resume", action="store_true", help=(
        "continue a run that was stopped or, with a larger --train.max_steps, a finished one"))
    parser.add_argument("--overwrite", action="store_true", help="replace a run of that name")
    flags = vars(parser.parse_args(argv))
    resume = flags.pop("resume", False)
    overwrite = flags.pop("overwrite", False)
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it; choose one")

    given = nest_flags(flags)
    with RunLock() as lock:
        # The settings: of a run that goes on, of another model, or new ones
        saved_run = None
        source = None
        found = load_run_to_resume(given, lock) if resume else None
        if found is not None:
            folder, saved, cfg = found
            saved_run = (folder, saved)
        elif given.get("train", {}).get("init_from") is not None:
            cfg, weights, tokenizer = load_model_to_tune(given)
            source = (weights, tokenizer)
        else:
            cfg = config_from_dict(Config, given)

        # In a function of its own, so that the run, which averages over ranks, ends before they do.
        with joined_ranks(cfg.train.device) as device:
            carry_out(cfg, device, overwrite=overwrite, unless_used=resume, saved_run=saved_run,
                      source=source, lock=lock)


if __name__ == "__main__":
    run_program(main)
