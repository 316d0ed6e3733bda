"""Trains a small GPT-2 on a text: the main program.

    python train.py                                        # Tiny Shakespeare, one to two minutes
    python train.py --data.path my.txt --model.n_layers 2 --logging.run_name mine
    python train.py --logging.run_name mine --resume       # go on where it stopped
    torchrun --standalone --nproc_per_node 2 train.py      # the same run, on two devices

Writes outputs/<run>/: config.json, checkpoint.pt, best.pt, metrics.jsonl, loss.png, sample.txt.

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Prerequisites: data.py, model.py, optim.py, generate.py
Next: activation_cache.py
Source: Radford et al. 2019; Jordan et al. 2024 (the optimiser)
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from statistics import fmean

import torch
from torch.nn.parallel import DistributedDataParallel

import plotting
from checkpoint import (
    add_rows,
    dataset_again,
    describe,
    flags_of,
    new_run_folder,
    read_metrics,
    save_checkpoint,
    to_resume,
)
from config import PRESETS, Config, GenerateConfig, config_from_dict, flag_parser, nest_flags
from data import load_dataset, random_batch, repeated_batch, windows_in_order
from generate import generate_text
from losses import cross_entropy, per_token_loss
from model import GPT
from optim import backward_, clip_gradients_, make_optimizers, schedule
from utils import (
    Progress,
    UserError,
    atomic_write,
    joined_ranks,
    mean_over_ranks,
    n_ranks,
    rank,
    run_program,
    seeded_generator,
    stop_on_signal,
)

PATIENCE = 100  # steps whose loss may be above that of the untrained model, in a row


class Diverged(UserError):
    """The loss or its gradient is no longer a finite number, or training made things worse."""


@dataclass(frozen=True)
class Step:
    """What one step of training reports: its number (from 1), the batch's loss in nats a token, the
    share of the full learning rate, the gradient's norm before its limit, and the time it took."""

    number: int
    loss: float
    share: float
    grad_norm: float
    seconds: float


def fit(model, next_batch, cfg, *, optimizers=None, start=0, loss_fn=cross_entropy):
    """Trains the model in place and yields a Step after each one: the loop itself.

    next_batch() -> (inputs, targets), on the model's device. cfg: a TrainConfig.
    loss_fn(model(inputs), targets) -> a scalar. start: how many steps are behind it already.
    Raises Diverged, before the weights are touched, if the loss or its gradient is not finite.
    """
    optimizers = make_optimizers(model, cfg) if optimizers is None else optimizers
    for number in range(start + 1, cfg.max_steps + 1):
        began = time.perf_counter()
        loss = backward_(model, next_batch(), cfg, loss_fn)
        grad_norm = clip_gradients_(model.parameters(), cfg.grad_clip).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise Diverged(f"training diverged at step {number}: loss {loss:.4g}, gradient "
                           f"norm {grad_norm:.4g}; try a smaller --train.lr")
        share = schedule(number - 1, cfg.max_steps, cfg.warmup_steps, shape=cfg.schedule,
                         final_fraction=cfg.final_lr_fraction)
        for optimizer in optimizers:
            optimizer.step(share)
        yield Step(number, loss, share, grad_norm, time.perf_counter() - began)


@torch.no_grad()
def token_losses(model, tokens, batch_size=16, starts=None):
    """Yields the loss of each token of a text but the first, in nats: floats, batch after batch.

    tokens: [n], predicted in windows of n_ctx, as `windows_in_order` cuts them.
    Leaves the model in the mode, training or evaluation, in which it was.
    """
    was_training = model.training
    model.eval()
    try:
        for window in windows_in_order(tokens, batch_size, model.cfg.n_ctx, starts):
            inputs, targets, counted = (part.to(model.W_E.device) for part in window)
            yield from per_token_loss(model(inputs), targets)[counted].tolist()
    finally:  # also where not all of them were asked for
        model.train(was_training)


def evaluate(model, tokens, batch_size=16):
    """The mean of `token_losses`, in nats a token: a float."""
    return fmean(token_losses(model, tokens, batch_size))


class TrainingRun:
    """A run in progress: what it learns with, and the files that it keeps in its folder."""

    def __init__(self, cfg, dataset, device):
        self.cfg, self.dataset = cfg, dataset
        self.model = GPT(cfg.model, cfg.train.seed).to(device)
        self.learner = torch.compile(self.model) if cfg.train.compile else self.model
        if n_ranks() > 1:
            self.learner = DistributedDataParallel(self.learner)
        self.optimizers = make_optimizers(self.model, cfg.train)
        self.sampler = seeded_generator(cfg.train.seed)
        torch.manual_seed(cfg.train.seed)  # for dropout, the only draw that takes no generator
        self.step, self.seconds, self.best_loss = 0, 0.0, math.inf
        self.untrained = math.inf  # the validation loss before the first step
        self.lost = 0  # steps in a row whose loss was above that of the untrained model
        self.rows, self.recent = [], []  # the lines of metrics.jsonl; the steps since the last one

    def begin(self, overwrite=False):
        """Makes the run's folder and its first checkpoint: whatever happens now, there is one."""
        logging = self.cfg.logging
        self.folder = new_run_folder(logging.out_dir, logging.run_name, overwrite)
        describe(self.folder, self.cfg, self.dataset, self.model)
        self.validate()

    def resume(self, folder, state):
        """Takes over all that the next step depends on; lines that lie ahead of it are dropped."""
        self.folder = folder
        self.model.load_weights_(state["model"], folder / "checkpoint.pt")
        for optimizer, saved in zip(self.optimizers, state["optimizer"], strict=True):
            optimizer.load_state_dict(saved)
        self.sampler.set_state(state["sampler"])
        torch.set_rng_state(state["rng"])
        for name in ("step", "seconds", "best_loss", "lost", "untrained"):
            setattr(self, name, state.get(name, getattr(self, name)))
        self.recent = [Step(*values) for values in state["recent"]]
        self.saved_step = self.step
        self.rows = [row for row in read_metrics(folder) if row["step"] <= self.step]
        add_rows(folder, self.rows, afresh=True)
        known = self.rows[-1]["step"] if self.rows else -1
        if known < self.step == self.cfg.train.max_steps:  # the result was lost with its line
            self.validate()

    def next_batch(self):
        """(inputs, targets): a rank's share of windows from anywhere in the training part, and of
        the repeats; every rank draws them all."""
        if rank() or not self.model.W_E.is_cpu:  # dropout of which no checkpoint has the "rng"
            torch.manual_seed(hash((self.cfg.train.seed, self.step, rank())))
        size, n_ctx, n_repeats = self.cfg.train.batch_size, self.cfg.model.n_ctx, self.cfg.n_repeats
        batch = random_batch(self.dataset.train, size - n_repeats, n_ctx, self.sampler)
        if n_repeats:
            more = repeated_batch(self.cfg.model.d_vocab, n_repeats, n_ctx, self.sampler)
            batch = map(torch.cat, zip(batch, more, strict=True))
        return [tokens.chunk(n_ranks())[rank()].to(self.model.W_E.device) for tokens in batch]

    def train(self):
        """Steps until max_steps, or until a signal asks to stop. Returns whether it got there."""
        cfg = self.cfg.train
        progress = Progress(cfg.max_steps, " steps", done=self.step)
        steps = fit(self.learner, self.next_batch, cfg, optimizers=self.optimizers, start=self.step)
        with stop_on_signal() as stop:
            for step in steps:
                self.step, self.seconds = step.number, self.seconds + step.seconds
                self.recent.append(step)
                self.check(step)
                if self.step % cfg.eval_interval == 0 or self.step == cfg.max_steps:
                    self.validate()
                elif self.step % cfg.log_interval == 0:
                    self.log()
                progress.show(self.step, f"loss {step.loss:.3f}  {self.tokens_per_s(step):,.0f} "
                              "tokens/s")
                if mean_over_ranks(stop.requested):  # whichever of them was asked
                    if not self.lost:  # as in `validate`
                        self.save("checkpoint.pt")
                    break
        progress.close()
        return self.step == cfg.max_steps

    def check(self, step):
        """Raises Diverged where training has made things worse for long."""
        worse = step.loss > 1.02 * self.untrained  # one that has learned nothing may vary by less
        self.lost = self.lost + 1 if worse else 0
        if self.lost == PATIENCE:
            raise Diverged(f"the loss was above the untrained model's {self.untrained:.4g} "
                           f"for {PATIENCE} steps, {step.loss:.4g} at step {self.step}; try a "
                           "smaller --train.lr or --train.muon_lr")

    def tokens_per_s(self, *steps):
        """The speed over some steps."""
        n_tokens = len(steps) * self.cfg.train.batch_size * self.cfg.model.n_ctx
        return n_tokens / sum(step.seconds for step in steps)

    def validate(self):
        """Evaluates on the whole validation split, and writes the checkpoints."""
        floor, size = self.dataset.floor, self.cfg.train.windows_at_once(n_ranks())
        losses = token_losses(self.model, self.dataset.val, size, floor and floor.starts)
        losses = list(losses) if floor else losses
        val_loss = fmean(losses)
        above = {"above_floor": floor.above(torch.tensor(losses).double())} if floor else {}
        if not math.isfinite(val_loss):
            raise Diverged(f"the validation loss is {val_loss} at step {self.step}; try a smaller "
                           "--train.lr")
        self.untrained = self.untrained if self.step else val_loss
        self.log(val_loss=val_loss, **above)
        if val_loss < self.best_loss:
            self.best_loss = val_loss
            self.save("best.pt")
        if not self.lost or self.step == self.cfg.train.max_steps:  # the last good one stays
            self.save("checkpoint.pt")

    def log(self, **more):
        """Adds a line to metrics.jsonl: means over the steps since the last one, and `more`."""
        row, recent = {"step": self.step, "seconds": self.seconds}, self.recent
        if recent:
            row["train_loss"] = sum(step.loss for step in recent) / len(recent)
            row["grad_norm"] = sum(step.grad_norm for step in recent) / len(recent)
            row["lr"] = recent[-1].share * self.cfg.train.lr
            row["tokens_per_s"] = self.tokens_per_s(*recent)
        self.rows.append(row | more)
        self.recent = []
        add_rows(self.folder, self.rows[-1:])

    def save(self, name):
        """Writes a checkpoint of all that the next step depends on."""
        save_checkpoint(self.folder / name, {
            "model": self.model.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step, "seconds": self.seconds, "best_loss": self.best_loss,
            "lost": self.lost, "untrained": self.untrained, "threads": torch.get_num_threads(),
            "recent": [dataclasses.astuple(step) for step in self.recent],
            "sampler": self.sampler.get_state(), "rng": torch.get_rng_state(),
            "tokenizer": self.dataset.tokenizer.state_dict(),
            "config": dataclasses.asdict(self.cfg), "data_sha256": self.dataset.sha256,
        })
        if name == "checkpoint.pt":
            self.saved_step = self.step


def figure_of(run):
    """The Figure of loss.png."""
    d_vocab, floor = run.cfg.model.d_vocab, run.dataset.floor
    levels = {f"uniform guess, ln {d_vocab} = {math.log(d_vocab):.2f}": math.log(d_vocab)}
    if floor:
        best = -floor.log_probs[1:].mean().item()
        levels[f"the floor, {best:.3f}"] = best
    return plotting.training_curves(run.rows, name=run.dataset.name, levels=levels,
                                    unit=run.dataset.tokenizer.unit)


def start_run(cfg, device, overwrite=False, resumed=None):
    """A Run that is ready to train: a new one, or the (folder, state) to go on with.

    All is checked before anything is written; what is wrong is raised as UserError.
    """
    if cfg.train.threads is not None:
        torch.set_num_threads(cfg.train.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: products of ten bits, sums of 23
    dataset = (dataset_again(*resumed, cfg) if resumed else
               load_dataset(cfg.data, cfg.model.n_ctx))
    at_once, known = cfg.train.windows_at_once(n_ranks()), dataset.tokenizer.d_vocab
    if cfg.model.d_vocab not in (None, known):
        raise UserError(f"d_vocab={cfg.model.d_vocab} is not the tokenizer's {known}; leave "
                        "--model.d_vocab out")
    shape = dataclasses.replace(cfg.model, d_vocab=known)
    run = TrainingRun(dataclasses.replace(cfg, model=shape), dataset, device)
    print(f"{dataset.name}: {len(dataset.train):,} {dataset.tokenizer.unit}s to train on, "
          f"{len(dataset.val):,} to validate on, of a vocabulary of {known:,}\n"
          f"model: {shape.n_layers} layers of {shape.n_heads} heads, d_model {shape.d_model}, "
          f"{run.model.n_parameters:,} parameters; {device}, {torch.get_num_threads()} threads, "
          f"{n_ranks()} x {at_once * shape.n_ctx * shape.activation_bytes / 1e6:,.1f} MB of "
          "activations" + ", and dropout's" * (shape.dropout > 0))
    run.resume(*resumed) if resumed else run.begin(overwrite)
    print(f"writing to {run.folder}" + (f", going on after step {run.step:,}" if resumed else ""))
    return run


def finish(run):
    """Draws the curve, writes the sample, and says what came out."""
    d_vocab, tokenizer = run.cfg.model.d_vocab, run.dataset.tokenizer
    unit, loss = tokenizer.unit, run.rows[-1]["val_loss"]
    plotting.save(figure_of(run), run.folder / "loss.png")
    prompt = tokenizer.decode(run.dataset.train[:1])
    prompt = "\n" if unit == "token" or "\n" in tokenizer.ids else prompt
    cfg = GenerateConfig(prompt=prompt, max_new_tokens=500, sliding=True)
    pieces = generate_text(run.model.eval(), tokenizer, cfg)
    sample = (prompt + "".join(pieces)).strip()
    with atomic_write(run.folder / "sample.txt", "w") as file:
        file.write(sample + "\n")
    share = (len(run.dataset.val) - 1) / run.dataset.val_characters
    per_character = f", {loss * share:.4f} nats/character," * (unit != "character")
    above = [f"{nats:.3f} ({kind})" for kind, nats in run.rows[-1].get("above_floor", {}).items()]
    print(f"\n{sample}\n\n"
          f"validation loss {loss:.4f} nats/{unit}{per_character} over the whole split, after "
          f"{run.step:,} steps in {run.seconds:.0f} s (a uniform guess: {math.log(d_vocab):.4f})\n"
          + f"nats/token above the floor: {', '.join(above)}\n" * bool(above) +
          f"the curve: {run.folder / 'loss.png'}\n"
          f'more text: python generate.py {flags_of(run.folder)} --sliding --prompt "..."')


def main(argv=None):
    """The program: trains, evaluates, draws the curve, writes a sample."""
    parser = flag_parser(Config, "Train a small GPT-2 on a text.")
    parser.add_argument("--model.preset", choices=PRESETS, help="the shape of a published model")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace a run of that name")
    flags = vars(parser.parse_args(argv))
    resume, overwrite = flags.pop("resume", False), flags.pop("overwrite", False)
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it; choose one")
    found = to_resume(nest_flags(flags)) if resume else None
    *resumed, cfg = found or (config_from_dict(Config, nest_flags(flags)),)
    with joined_ranks(cfg.train.device) as device:
        carry_out(cfg, device, overwrite or resume, resumed)  # none to resume: none to lose


def carry_out(cfg, device, overwrite, resumed):
    """A run from its beginning, or from where it stopped, to its end or to a signal."""
    run = start_run(cfg, device, overwrite, resumed)
    try:
        finished = run.train()
    except Diverged as problem:
        raise UserError(f"{problem}; the last good checkpoint is "
                        f"{run.folder / 'checkpoint.pt'}, of step {run.saved_step}") from None
    if not finished:
        behind = f" from step {run.saved_step:,}" * (run.saved_step < run.step)
        program = f"torchrun --standalone --nproc_per_node {n_ranks()}" * (n_ranks() > 1)
        print(f"stopped after step {run.step:,}; to go on{behind}: {program or 'python'} train.py "
              f"{flags_of(run.folder, '--logging.')} --resume")
    elif rank() == 0:
        finish(run)


if __name__ == "__main__":
    run_program(main)
