"""Logit lens and tuned lens: decode each layer's residual stream as if it were the last.

    result = logit_lens(model, cache, targets=answer)
    result.rank            # [row, batch, pos]: the number of tokens more likely than the answer
    result.kl              # nats from this row's prediction to the final one; 0 in the last row

Each row has its own mean and scale in the final LayerNorm; the last stream's scale would make early
rows look more certain than they are. Early streams are written in a different basis from the one in
which the last stream is read, so the plain lens underestimates what they contain. The tuned lens
learns an affine map for each row that corrects this and nothing else.

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
    """The prediction of each row. A row is one stream; shapes are [row, batch, pos, …].

    labels: the names of the rows. entropy: of the row's prediction, in nats. kl: KL(final || row),
    in nats. logits: [..., d_vocab], if no top_k was given; otherwise top_tokens and top_probs,
    [..., k], most likely first. rank: the number of tokens more likely than the target, if one was
    given. of_tokens: whether the logits are those of the model's tokens (a classifier's are not).
    """

    labels: list
    entropy: torch.Tensor
    kl: torch.Tensor
    logits: torch.Tensor | None = None
    top_tokens: torch.Tensor | None = None
    top_probs: torch.Tensor | None = None
    rank: torch.Tensor | None = None
    of_tokens: bool = True

    def likeliest_words(self, tokenizer, batch=0):
        """The most likely token of each row at each position, as text: lists [row][pos] of str.

        batch: the index of the text. `plotting.lens_table` takes the result. If the model's
        vocabulary is padded, an id that the tokenizer lacks is shown as `<id 50300>`. Raises
        UserError for a classifier, whose logits have no words.
        """
        if not self.of_tokens:
            raise UserError("the model's d_vocab_out is not its d_vocab, so its logits have no "
                            "words; read top_tokens, or logits")
        best = self.logits.argmax(-1) if self.top_tokens is None else self.top_tokens[..., 0]
        return [tokenizer.to_str_tokens(row, show_unknown=True) for row in best[:, batch].tolist()]


@torch.no_grad()
def logit_lens(model, cache, incl_mid=False, pos=None, *, lens=None, top_k=None,
               targets=None, tokenizer=None):
    """The logit lens: a LensResult for the stream before each block and the last stream.

    incl_mid: include the streams between attention and MLP. cache: of `model`, with the streams.
    pos: an int, a slice or a list, or a tensor [batch] with one for each text; all by default.
    lens: a TunedLens, or None for the plain lens. top_k: keep that many tokens and no logits, which
    for GPT-2 would take 2.6 MB at each position. targets: ids [batch, pos] for the whole text or
    only for the chosen positions, one for each text, or one (also as text, with a tokenizer) for
    all. Raises UserError for an impossible top_k or position, for a lens of another model, and for
    targets of another text.
    """
    d_vocab = model.cfg.d_vocab_out
    check_cache(cache)
    if tokenizer is not None:
        model.check_predicts_tokens("give ids as targets, and no tokenizer")
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

    # some points at a time: all logits together would be the program's largest tensor
    points = stack.flatten(1, 2)  # [row, point, d_model]
    at_once = max(1, LOGITS_AT_ONCE // (n_rows * d_vocab))
    found = []
    for some in torch.arange(n_batch * n_pos).split(at_once):
        found.append(read_predictions(model.unembed(points[:, some]), top_k, wanted, some))

    columns = {name: torch.cat([each[name] for each in found], 1).unflatten(1, (n_batch, n_pos))
               for name in found[0]}
    return LensResult(labels, **columns, of_tokens=d_vocab == model.cfg.d_vocab)


def targets_at(targets, shape, pos, *, n_all, d_vocab):
    """targets [batch, pos] at the positions, of shape (batch, pos). UserError for other shapes."""
    if targets.ndim == 2 and targets.shape[1] == n_all and pos is not None:
        targets = take_positions(targets, choose_positions(pos, n_all, len(targets)), 1)
    fits = targets.ndim == 2 and len(targets) == shape[0] and targets.shape[1] in (1, shape[1])
    if targets.dtype not in (torch.int64, torch.int32) or not fits:
        raise UserError(f"targets is {list(targets.shape)} for {list(shape)} predictions; pass ids "
                        "[batch, pos], one for each row, or one for all")
    if targets.min() < 0 or targets.max() >= d_vocab:
        raise UserError(f"targets has ids from {int(targets.min())} to {int(targets.max())}, which "
                        f"are not all in the vocabulary of {d_vocab}")
    return targets.expand(shape)


def read_predictions(logits, top_k, wanted, some):
    """The columns of a LensResult for some points, [row, point, …]. logits: [row, point, d_vocab];
    the last row is the model's final prediction."""
    probs = at_least_float32(logits).softmax(-1)
    columns = {"entropy": torch.special.entr(probs).sum(-1),
               "kl": kl_divergence(logits[-1:], logits)}
    if top_k is None:
        columns["logits"] = logits
    else:
        columns["top_probs"], columns["top_tokens"] = probs.topk(top_k)
    if wanted is not None:
        own = logits.gather(-1, wanted[some].expand(len(logits), -1)[..., None])
        columns["rank"] = (~(logits <= own)).sum(-1)  # a NaN target ranks last
    return columns


class TunedLens(nn.Module):
    """The tuned lens: for each stream before the last an affine map, h + h A + b; at first h.

    Its weights are in float32 at least, whatever the model's precision.

    d_model: the model's. labels: of the streams, as from `accumulated_resid`.
    """

    def __init__(self, d_model, labels):
        super().__init__()
        self.labels = list(labels)
        self.A = nn.Parameter(torch.zeros(len(self.labels), d_model, d_model))
        self.b = nn.Parameter(torch.zeros(len(self.labels), d_model))

    def translate(self, resid, label):
        """Maps resid [..., d_model] of that label to the last stream's basis; the last stays.

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
        """Writes the lens to a file; an old file stays until the new one is complete."""
        content = io.BytesIO()
        torch.save({"labels": self.labels, "A": self.A.detach(), "b": self.b.detach()}, content)
        with atomic_write(path) as file:
            file.write(content.getbuffer())

    @classmethod
    def load(cls, path):
        """Loads a lens that `save` wrote. Raises UserError if the file is not one."""
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
    """Fits a TunedLens: an affine map for each row that best predicts the model's final output.

    It minimises KL(final || row), summed over rows (each has its own weights). The model itself is
    not changed, and runs without dropout. tokens: [n, pos], texts like those that the lens will
    read; keep some aside for evaluation. Raises UserError for a model without layers, whose only
    stream is the last, for fewer than one step, and if the fit is not finite.
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
        raise UserError(f"lr={lr}: the lens is not finite after {steps} steps; try a smaller one, "
                        "and check that the model's logits are finite")
    return lens


def train_lens(model, tokens, steps, batch_size, *, lr, seed):
    """The training loop of `fit_tuned_lens`."""
    has_mid = not model.cfg.attn_only
    sites = ("pre", "mid", "post") if has_mid else ("pre", "post")
    names = ["hook_embed"] if model.position_embedding is None else ["hook_embed", "hook_pos_embed"]
    names += [f"blocks.{layer}.hook_resid_{site}" for layer in range(model.cfg.n_layers)
              for site in sites]

    lens = None
    generator = seeded_generator(seed)
    for step in range(steps):
        # the streams of some texts, and the model's final logits
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

        # backward: gradients for the lens only, not for the model
        lens.zero_grad()
        loss.backward(inputs=list(lens.parameters()))
        optimizer.step(schedule(step, steps, warmup_steps=10))
    return lens
