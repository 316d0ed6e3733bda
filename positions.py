"""What a `pos` argument may be, and prompts of unequal length.

    logit_diff(logits, right, wrong, pos=-1)                    # the last position of all prompts
    logit_diff(logits, right, wrong, pos=torch.tensor([7, 4]))  # each prompt's own, [batch]

    tokens, key_mask = pad_left([[5, 2, 8], [6]])               # [batch, pos] each
    logits = model(tokens, key_mask=key_mask)                   # each row what it gives alone

Prompts are padded on the left, so that their ends stand side by side: position -1 is the last token
of each. `key_mask` is True for real tokens; nobody attends to the others, and positions are counted
from each row's first real token.

Chapter: COURSE_ROADMAP.md, 4 (QK and OV)
Prerequisites: utils.py
Next: attention.py
Source: the reading of `pos` in TransformerLens (Nanda & Bloom 2022), without its ambiguities
"""

import torch

from utils import UserError, as_index, as_list


def as_integers(values, what):
    """An integer or a list of them as a tensor. Raises UserError for anything else, such as a mask
    of booleans; `what` names the argument in the message."""
    try:
        numbers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.zeros(0)
    if not numbers.numel() or numbers.dtype == torch.bool or numbers.is_floating_point() \
            or numbers.is_complex():
        raise UserError(f"{what}={values} are no integers; pass some, and of a mask its nonzero()")
    return numbers.long()


def choose_numbers(name, choice, size):
    """The numbers, counted from 0, that an int, a slice or a list selects among `size`: [n], on the
    CPU. Raises UserError, which says `name`, for anything else and where none is selected."""
    index = as_index(choice)
    if isinstance(choice, slice):
        try:
            chosen = torch.arange(size)[choice]
        except (TypeError, ValueError):
            raise UserError(f"{name}={choice}; a slice has whole numbers, and a step above "
                            "0") from None
    elif index is None:
        chosen = as_integers(choice, name).cpu()
    elif -size <= index < size:  # else it may be too large for a tensor
        chosen = torch.tensor([index])
    else:
        chosen = torch.tensor([], dtype=torch.long)
    if chosen.ndim != 1:
        raise UserError(f"{name} is {list(chosen.shape)}; pass an int, a slice or a list")
    return check_within(name, choice, chosen, size)


def check_within(name, choice, chosen, size):
    """The chosen numbers counted from 0. Raises UserError where there are none, or one lies outside
    of `size`."""
    if not len(chosen) or chosen.min() < -size or chosen.max() >= size:
        raise UserError(f"{name}={choice} is outside of the {size} that there are")
    return chosen % size


def choose_positions(pos, n_pos, n_rows=None):
    """The positions that `pos` selects among n_pos, counted from 0.

    pos: an int (numpy's and a 0-d tensor too), a slice or a list: the same for all prompts; None
    for all positions; or an integer tensor [batch]: each prompt's own. n_rows: how many prompts
    there are; None where they are not known yet, and then a tensor is taken as it is.
    Returns [n], the same for all prompts, or [batch, 1], each prompt's own, on the CPU.
    Raises UserError for a position that is not there, where none is selected, and for a tensor or
    an array that could be read in two ways.
    """
    if pos is None:
        pos = slice(None)
    if as_index(pos) is not None or isinstance(pos, (slice, list, tuple, range)):
        return choose_numbers("pos", pos, n_pos)
    if not isinstance(pos, torch.Tensor):
        raise UserError(f"pos is a {type(pos).__name__}; pass an int, a slice or a list for the "
                        "same positions in all prompts, or a tensor [batch] with each prompt's own")

    chosen = as_integers(pos, "pos").cpu()
    if chosen.ndim != 1 or (n_rows is not None and len(chosen) != n_rows):
        raise UserError(f"pos is a tensor {list(chosen.shape)} for {n_rows} prompts; pass a list "
                        "for the same positions in all, or a tensor [batch] with each prompt's own")
    return check_within("pos", pos, chosen, n_pos)[:, None]



def at_positions(tensor, positions):
    """A tensor [..., batch, pos, d] at positions [n], the same for all rows, or [batch, n], each
    row's own: [..., batch, n, d]."""
    positions = positions.to(tensor.device)
    if positions.ndim == 1:
        return tensor[..., positions, :]
    rows = torch.arange(len(positions), device=tensor.device)[:, None]
    return tensor[..., rows, positions, :]


def take_positions(tensor, positions, dim):
    """A tensor [batch, …] at positions of its axis `dim`, which stays: [n], the same for all rows,
    or [batch, n], each row's own."""
    positions = positions.to(tensor.device)
    if positions.ndim == 1:
        return tensor.index_select(dim, positions)
    index_shape = [1] * tensor.ndim
    index_shape[0], index_shape[dim] = positions.shape
    taken_shape = list(tensor.shape)
    taken_shape[dim] = positions.shape[1]
    return tensor.gather(dim, positions.view(index_shape).expand(taken_shape))


def is_single(pos):
    """Whether `pos` names one position of each prompt, so that a result needs no axis for it."""
    return isinstance(pos, torch.Tensor) or as_index(pos) is not None


# Prompts of unequal length


def pad_left(prompts, device=None):
    """(tokens, key_mask), each [batch, pos]: prompts of any lengths that end together.

    prompts: [batch, pos] of ids, or a list of lists of ids. key_mask is False where there is
    padding. Raises UserError where a prompt is empty or not made of ids.
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
    """Raises UserError unless key_mask fits the tokens [batch, pos]: a boolean for each, and in
    each row padding, then at least one real token, then no padding any more."""
    if key_mask is None:
        return
    fits = isinstance(key_mask, torch.Tensor) and key_mask.dtype == torch.bool
    if not fits or key_mask.shape != tokens.shape:
        found = type(key_mask).__name__
        if isinstance(key_mask, torch.Tensor):
            found = f"{list(key_mask.shape)} {key_mask.dtype}"
        raise UserError(f"key_mask is {found} for tokens {list(tokens.shape)}; pass a bool for "
                        "each, True for real tokens, such as pad_left gives")
    if not key_mask[:, -1].all() or (key_mask[:, 1:] < key_mask[:, :-1]).any():
        raise UserError("key_mask hides tokens after the first real one of a row; pad on the left, "
                        "as pad_left does")


def positions_in_prompt(key_mask):
    """The position of each token in its own prompt, [batch, pos], counted from the first real one;
    0 on padding."""
    return (key_mask.cumsum(1) - 1).clamp(min=0)
