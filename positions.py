"""Positions: the `pos` argument of every analysis, and prompts of different lengths.

    logit_diff(logits, right, wrong, pos=-1)                    # the last position of all prompts
    logit_diff(logits, right, wrong, pos=torch.tensor([7, 4]))  # one for each prompt, [batch]

    tokens, key_mask = pad_left([[5, 2, 8], [6]])               # [batch, pos] each
    logits = model(tokens, key_mask=key_mask)                   # each row as if it ran alone

Prompts are padded on the left, so that they end at the same place: position -1 is the last token of
each. `key_mask` is True for real tokens. No position attends to padding, and positions are counted
from each row's first real token.

Chapter: COURSE_ROADMAP.md, 4 (QK and OV)
Prerequisites: utils.py
Next: attention.py
Source: the reading of `pos` in TransformerLens (Nanda & Bloom 2022), without its ambiguities
"""

import torch

from utils import UserError, as_index, as_list


def as_integers(values, what):
    """An integer or a list of them as a tensor. Raises UserError for anything else, such as a
    boolean mask; `what` names the argument in the message."""
    try:
        numbers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.zeros(0)
    if not numbers.numel() or numbers.dtype == torch.bool or numbers.is_floating_point() \
            or numbers.is_complex():
        raise UserError(f"{what}={values} are not integers; pass integers, or the nonzero() of a "
                        "mask")
    return numbers.long()


def choose_numbers(name, choice, size):
    """The indices that an int, a slice or a list selects among `size`, counted from 0: [n], on the
    CPU. Raises UserError, naming `name`, for anything else and for an empty selection."""
    index = as_index(choice)
    if isinstance(choice, slice):
        try:
            chosen = torch.arange(size)[choice]
        except (TypeError, ValueError):
            raise UserError(f"{name}={choice}; a slice needs whole numbers, and a step above "
                            "0") from None
    elif index is None:
        chosen = as_integers(choice, name).cpu()
    elif -size <= index < size:  # others may be too large for a tensor
        chosen = torch.tensor([index])
    else:
        chosen = torch.tensor([], dtype=torch.long)
    if chosen.ndim != 1:
        raise UserError(f"{name} is {list(chosen.shape)}; pass an int, a slice or a list")
    return check_within(name, choice, chosen, size)


def check_within(name, choice, chosen, size):
    """The chosen indices, counted from 0. Raises UserError if there are none, or if one is outside
    `size`."""
    if not len(chosen) or chosen.min() < -size or chosen.max() >= size:
        raise UserError(f"{name}={choice} is outside the {size} that exist")
    return chosen % size


def choose_positions(pos, n_pos, n_rows=None):
    """The positions that `pos` selects among n_pos, counted from 0.

    pos: an int (also numpy's, or a 0-d tensor), a slice or a list selects the same positions for
    all prompts; None selects all; an integer tensor [batch] holds one position for each prompt.
    n_rows: the number of prompts; if it is None (not known yet), a tensor is accepted as it is.
    Returns [n], the same for all prompts, or [batch, 1], one for each prompt, on the CPU.
    Raises UserError for a position that does not exist, for an empty selection, and for a tensor or
    an array that could be read in two ways.
    """
    if pos is None:
        pos = slice(None)
    if as_index(pos) is not None or isinstance(pos, (slice, list, tuple, range)):
        return choose_numbers("pos", pos, n_pos)
    if not isinstance(pos, torch.Tensor):
        raise UserError(f"pos is a {type(pos).__name__}; pass an int, a slice or a list for the "
                        "same positions in all prompts, or a tensor [batch] with one for each")

    chosen = as_integers(pos, "pos").cpu()
    if chosen.ndim != 1 or (n_rows is not None and len(chosen) != n_rows):
        raise UserError(f"pos is a tensor {list(chosen.shape)} for {n_rows} prompts; pass a list "
                        "for the same positions in all, or a tensor [batch] with one for each")
    return check_within("pos", pos, chosen, n_pos)[:, None]



def at_positions(tensor, positions):
    """A tensor [..., batch, pos, d] at positions [n], the same for all rows, or [batch, n], which
    differ by row: [..., batch, n, d]."""
    positions = positions.to(tensor.device)
    if positions.ndim == 1:
        return tensor[..., positions, :]
    rows = torch.arange(len(positions), device=tensor.device)[:, None]
    return tensor[..., rows, positions, :]


def take_positions(tensor, positions, dim):
    """A tensor [batch, …] at positions along its axis `dim`, which stays: [n], the same for all
    rows, or [batch, n], which differ by row."""
    positions = positions.to(tensor.device)
    if positions.ndim == 1:
        return tensor.index_select(dim, positions)
    index_shape = [1] * tensor.ndim
    index_shape[0], index_shape[dim] = positions.shape
    taken_shape = list(tensor.shape)
    taken_shape[dim] = positions.shape[1]
    return tensor.gather(dim, positions.view(index_shape).expand(taken_shape))


def is_single(pos):
    """Whether `pos` selects exactly one position per prompt, so results need no axis for it."""
    return isinstance(pos, torch.Tensor) or as_index(pos) is not None


# Prompts of unequal length


def pad_left(prompts, device=None):
    """Pads prompts of any lengths on the left: (tokens, key_mask), each [batch, pos].

    prompts: [batch, pos] of ids, or a list of lists of ids. key_mask is False at padding. Raises
    UserError if a prompt is empty or not made of ids.
    """
    wanted = "rows of ids: a list of lists, or [batch, pos]"
    if isinstance(prompts, torch.Tensor) and prompts.ndim == 2:
        if not prompts.numel():
            raise UserError(f"prompts is empty, {list(prompts.shape)}; pass {wanted}")
        if prompts.is_floating_point():
            raise UserError(f"prompts is {list(prompts.shape)} {prompts.dtype}; pass {wanted}")
        return prompts, torch.ones_like(prompts, dtype=torch.bool)
    ids = [[as_index(token) for token in as_list("a prompt", prompt, wanted)]
           for prompt in as_list("prompts", prompts, wanted)]
    lengths = [len(row) for row in ids]
    if not lengths or min(lengths) == 0:
        raise UserError("a prompt is empty; give each at least one token")
    if any(None in row for row in ids):
        raise UserError("a prompt holds something that is not a whole number; give rows of ids")

    longest = max(lengths)
    rows = [[0] * (longest - len(row)) + row for row in ids]
    tokens = torch.tensor(rows, device=device)
    key_mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return tokens, key_mask.to(tokens.device)


def check_key_mask(key_mask, tokens):
    """Raises UserError unless key_mask fits the tokens [batch, pos]: a boolean for each token, and
    each row has its padding first, followed by at least one real token."""
    if key_mask is None:
        return
    fits = isinstance(key_mask, torch.Tensor) and key_mask.dtype == torch.bool
    if not fits or key_mask.shape != tokens.shape:
        found = type(key_mask).__name__
        if isinstance(key_mask, torch.Tensor):
            found = f"{list(key_mask.shape)} {key_mask.dtype}"
        raise UserError(f"key_mask is {found} for tokens {list(tokens.shape)}; pass a bool for "
                        "each, True for real tokens, as from pad_left")
    if not key_mask[:, -1].all() or (key_mask[:, 1:] < key_mask[:, :-1]).any():
        raise UserError("key_mask hides tokens after the first real one of a row; pad on the left, "
                        "as pad_left does")


def positions_in_prompt(key_mask):
    """Each token's position in its own prompt, [batch, pos], counted from the first real token; 0
    at padding."""
    return (key_mask.cumsum(1) - 1).clamp(min=0)
