"""Read every stream on the way as if it were the last: what would the model say already here?

    result = logit_lens(model, cache, targets=answer)
    result.rank            # [row, batch, pos]: how many tokens are likelier than the answer
    result.kl              # nats from here to what the model says in the end; 0 in the last row

Each row has its own mean and scale in the final LayerNorm: the scale of the last stream would make
early rows look more certain than they are. Early streams are written in another basis than the
last one is read in, so the plain lens shows less than is there; the tuned lens learns an affine map
for each row that makes up for it, and nothing else.

Chapter: COURSE_ROADMAP.md, 8 (read)
Prerequisites: metrics.py, residual_stream_analysis.py
Next: attribution.py
Source: nostalgebraist 2020 (logit lens); Belrose et al. 2023 (tuned lens)
"""

import io
import math
from dataclasses import dataclass

import torch
from torch import nn

from activation_cache import check_cache
from losses import kl_divergence
from metrics import token_ids
from optim import AdamW, schedule
from positions import choose_positions, take_positions
from residual_stream_analysis import accumulated_resid
from utils import (
    UserError,
    at_least_float32,
    atomic_write,
    check_count,
    check_number,
    check_tensor,
    read_torch_file,
    seeded_generator,
)

LOGITS_AT_ONCE = 2**24  # 64 MB


@dataclass(frozen=True)
class LensResult:
    """What each row says, and the rows' labels. A row is one stream; shapes [row, batch, pos, …].

    entropy: of its prediction, in nats. kl: KL(final || row), in nats. logits: [..., d_vocab],
    where no top_k was asked for; else top_tokens and top_probs, [..., k], the likeliest first.
    rank: how many tokens are likelier than the target, where one was given.
    """

    labels: list
    entropy: torch.Tensor
    kl: torch.Tensor
    logits: torch.Tensor | None = None
    top_tokens: torch.Tensor | None = None
    top_probs: torch.Tensor | None = None
    rank: torch.Tensor | None = None

    def likeliest_words(self, tokenizer, batch=0):
        """The likeliest token of each row at each position, as text: lists [row][pos] of str.

        batch: of which text. `plotting.lens_table` takes them. An id that the tokenizer lacks,
        since the model's vocabulary is padded, is shown as `<id 50300>`.
        """
        best = self.logits.argmax(-1) if self.top_tokens is None else self.top_tokens[..., 0]
        return [tokenizer.to_str_tokens(row, show_unknown=True) for row in best[:, batch].tolist()]


@torch.no_grad()
def logit_lens(model, cache, incl_mid=False, pos=None, *, lens=None, top_k=None,
               targets=None, tokenizer=None):
    """The LensResult of every stream before a block (and, with incl_mid, inside it) and the last.

    cache: of `model`, with the streams. pos: an int, a slice or a list, or a tensor
    [batch] with each text's own; all by default. lens: a
    TunedLens. top_k: keep that many tokens and no logits: GPT-2's would take 2.6 MB a position.
    targets: ids [batch, pos] of the whole text or of the chosen positions alone, one for each text,
    or one (or text, with a tokenizer) for all. Raises UserError for a top_k or a position that is
    not there, a lens of another model, targets of another text.
    """
    d_vocab = model.cfg.d_vocab
    check_cache(cache)
    if top_k is not None:
        top_k = check_count("top_k", top_k, most=d_vocab)
    if lens is not None and not isinstance(lens, TunedLens):
        raise UserError(f"lens is a {type(lens).__name__}; pass a TunedLens, or None")

    # the streams, [row, batch, pos, d_model]
    kept = cache if pos is None else cache.slice(pos=pos)
    stack, labels = accumulated_resid(model, kept, incl_mid=incl_mid)
    n_rows, n_batch, n_pos = stack.shape[:3]
    if lens is not None:
        stack = torch.stack([lens.translate(row, label)
                             for row, label in zip(stack, labels, strict=True)])

    # the targets, [batch * pos]
    wanted = None
    if targets is not None:
        n_all = accumulated_resid(model, cache, 0)[0].shape[2]
        if not isinstance(targets, torch.Tensor) or targets.ndim < 2:
            targets = token_ids(targets, n_batch, d_vocab, tokenizer=tokenizer)[:, None]
        wanted = targets_at(targets, (n_batch, n_pos), pos, n_all=n_all, d_vocab=d_vocab)
        wanted = wanted.to(stack.device).flatten()

    # some points at a time: the logits of all would be the largest tensor of the program
    points = stack.flatten(1, 2)  # [row, point, d_model]
    at_once = max(1, LOGITS_AT_ONCE // (n_rows * d_vocab))
    found = []
    for some in torch.arange(n_batch * n_pos).split(at_once):
        found.append(read_predictions(model.unembed(points[:, some]), top_k, wanted, some))

    columns = {name: torch.cat([each[name] for each in found], 1).unflatten(1, (n_batch, n_pos))
               for name in found[0]}
    return LensResult(labels, **columns)


def targets_at(targets, shape, pos, *, n_all, d_vocab):
    """targets [batch, pos] at the positions, of shape (batch, pos). Raises UserError for others."""
    if targets.ndim == 2 and targets.shape[1] == n_all and pos is not None:
        targets = take_positions(targets, choose_positions(pos, n_all, len(targets)), 1)
    fits = targets.ndim == 2 and len(targets) == shape[0] and targets.shape[1] in (1, shape[1])
    if targets.dtype not in (torch.int64, torch.int32) or not fits:
        raise UserError(f"targets is {list(targets.shape)} for {list(shape)} predictions; pass ids "
                        "[batch, pos], one a row, or one for all")
    if targets.min() < 0 or targets.max() >= d_vocab:
        raise UserError(f"targets has ids from {int(targets.min())} to {int(targets.max())}, which "
                        f"are not all in the vocabulary of {d_vocab}")
    return targets.expand(shape)


def read_predictions(logits, top_k, wanted, some):
    """The columns of a LensResult for some points, [row, point, …]. logits: [row, point, d_vocab];
    the last row is what the model says."""
    probs = at_least_float32(logits).softmax(-1)
    columns = {"entropy": torch.special.entr(probs).sum(-1),
               "kl": kl_divergence(logits[-1:], logits)}
    if top_k is None:
        columns["logits"] = logits
    else:
        columns["top_probs"], columns["top_tokens"] = probs.topk(top_k)
    if wanted is not None:
        own = logits.gather(-1, wanted[some].expand(len(logits), -1)[..., None])
        columns["rank"] = (~(logits <= own)).sum(-1)  # NaN is never the likeliest
    return columns


class TunedLens(nn.Module):
    """An affine map for each stream before the last: h + h A + b, at first h itself.

    Its weights are in float32 at least, whatever the model's precision.

    d_model: of the model. labels: of the streams, as `accumulated_resid` gives them.
    """

    def __init__(self, d_model, labels):
        super().__init__()
        self.labels = list(labels)
        self.A = nn.Parameter(torch.zeros(len(self.labels), d_model, d_model))
        self.b = nn.Parameter(torch.zeros(len(self.labels), d_model))

    def translate(self, resid, label):
        """resid [..., d_model] of that label in the basis of the last stream; the last as it is.

        Raises UserError for a label or a width that the lens was not fitted for.
        """
        if label == "final_post":
            return resid
        if label not in self.labels or resid.shape[-1] != self.b.shape[-1]:
            raise UserError(f"the lens knows {', '.join(self.labels)} of width {self.b.shape[-1]}, "
                            f"not {label} of {resid.shape[-1]}; fit one for this model")
        row = self.labels.index(label)
        exact = resid.to(self.A.dtype)
        return (exact + exact @ self.A[row] + self.b[row]).to(resid.dtype)

    def save(self, path):
        """Writes the lens to a file, whole or not at all."""
        content = io.BytesIO()
        torch.save({"labels": self.labels, "A": self.A.detach(), "b": self.b.detach()}, content)
        with atomic_write(path) as file:
            file.write(content.getbuffer())

    @classmethod
    def load(cls, path):
        """The lens in a file that `save` wrote. Raises UserError where it is not one."""
        remedy = "fit one with fit_tuned_lens"
        state = read_torch_file(path, "a tuned lens", remedy)
        try:
            A = state["A"]
            b = state["b"]
            labels = state["labels"]
            is_text = all(isinstance(label, str) for label in labels)
            if not is_text or A.shape != (len(labels), b.shape[-1], b.shape[-1]):
                raise ValueError("labels")
            lens = cls(A.shape[-1], labels).to(A.dtype)
            lens.load_state_dict({"A": A, "b": b})
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            raise UserError(f"{path} is not a tuned lens ({type(error).__name__}); "
                            f"{remedy}") from None
        return lens


def fit_tuned_lens(model, tokens, *, steps=300, batch_size=16, lr=2e-3, seed=0):
    """A TunedLens whose rows say, as nearly as an affine map can, what the model says in the end.

    It minimises KL(final || row), summed over rows (each has weights of its own). The model is left
    as it is, and read without dropout. tokens: [n, pos], texts like those that it will read; hold
    some back to judge by. Raises UserError for a model without layers, whose only stream is the
    last, for less than one step, and for a fit that came to nothing finite.
    """
    if not model.cfg.n_layers:
        raise UserError("n_layers=0: the only stream is the last one; there is nothing to tune")
    check_tensor("tokens", tokens, "n pos")
    check_count("n_texts", len(tokens))
    steps = check_count("steps", steps)
    batch_size = check_count("batch_size", batch_size)
    check_number("lr", lr, lambda rate: 0 < rate < math.inf, "more than 0, and finite")
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            lens = train_lens(model, tokens, steps, batch_size, lr=lr, seed=seed)
    finally:
        model.train(was_training)
    if not all(weight.isfinite().all() for weight in lens.parameters()):
        raise UserError(f"lr={lr}: the lens is not finite after {steps} steps; take a smaller one, "
                        "and look whether the model's logits are finite")
    return lens


def train_lens(model, tokens, steps, batch_size, *, lr, seed):
    """The loop of `fit_tuned_lens`."""
    has_mid = not model.cfg.attn_only
    sites = ("pre", "mid", "post") if has_mid else ("pre", "post")
    names = ["hook_embed"] if model.position_embedding is None else ["hook_embed", "hook_pos_embed"]
    names += [f"blocks.{layer}.hook_resid_{site}" for layer in range(model.cfg.n_layers)
              for site in sites]

    lens = None
    generator = seeded_generator(seed)
    for step in range(steps):
        # the streams of some texts, and what the model says in the end
        rows = tokens[torch.randint(len(tokens), (batch_size,), generator=generator)]
        with torch.no_grad():
            logits, cache = model.run_with_cache(rows.to(model.W_E.device), names)
            stack, labels = accumulated_resid(model, cache, incl_mid=has_mid)
        if lens is None:  # the labels are known only now
            lens = TunedLens(model.cfg.d_model, labels[:-1]).to(at_least_float32(stack))
            optimizer = AdamW(lens.parameters(), lr, weight_decay=0.0)

        # forward
        translated = [lens.translate(row, label)
                      for row, label in zip(stack[:-1], labels[:-1], strict=True)]
        said = model.unembed(torch.stack(translated))
        loss = kl_divergence(logits, said).mean((1, 2)).sum()

        # backward, and nothing for the model's own weights
        lens.zero_grad()
        loss.backward(inputs=list(lens.parameters()))
        optimizer.step(schedule(step, steps, warmup_steps=10))
    return lens
