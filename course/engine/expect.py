"""Comparisons for the checks, whose messages say what is wrong, with numbers."""

import math

import torch


class Wrong(Exception):
    """A learner's function is wrong; the message says what is wrong, in a sentence."""


def expect(holds, message):
    """Raises Wrong with the message unless `holds` is true."""
    if not holds:
        raise Wrong(message)


def place_name(index, axes):
    """The place of a number in words, such as "batch 0, pos 3". axes: the names of its axes."""
    names = axes.split()
    if len(names) != len(index):
        return f"{list(index)}"
    return ", ".join(f"{name} {i}" for name, i in zip(names, index, strict=True))


def expect_close(got, want, what, axes="", *, tolerance=1e-4, ask=""):
    """Raises Wrong unless got is a tensor of want's shape with want's numbers.

    what: the subject of the message. axes: the names of want's axes. tolerance: the error allowed,
    relative plus absolute. ask: a question at the end of the message.
    """
    ask = f": {ask}" if ask else ""
    want = torch.as_tensor(want)
    if isinstance(got, (int, float)) and want.ndim == 0:
        got = torch.tensor(float(got))
    if not isinstance(got, torch.Tensor):
        wanted = f"a tensor [{', '.join(axes.split())}]" if want.ndim else "a number"
        raise Wrong(f"{what} is {describe(got)}, and should be {wanted}{ask}")
    if want.ndim == 0 and got.ndim:
        raise Wrong(f"{what} is a tensor {list(got.shape)}, and should be one number{ask}")
    if got.shape != want.shape:
        named = f", [{', '.join(axes.split())}]" if axes else ""
        raise Wrong(f"the shape of {what} is {list(got.shape)}, and should be {list(want.shape)}"
                    f"{named}{ask}")

    got = got.detach().double()
    want = want.detach().double()
    same = torch.isclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    if same.all():
        return
    index = tuple((~same).nonzero()[0].tolist())
    where = f" at {place_name(index, axes)}" if index else ""
    n_off = int((~same).sum())
    count = f" ({n_off} of {same.numel()} numbers are off)" if same.numel() > 1 else ""
    raise Wrong(f"{what}{where} is {show(got[index].item())}, and should be "
                f"{show(want[index].item())}{count}{ask}")


def expect_shape(got, shape, what, *, ask=""):
    """Raises Wrong unless got is a tensor of this shape. what, ask: as in `expect_close`."""
    if not isinstance(got, torch.Tensor) or tuple(got.shape) != tuple(shape):
        ask = f": {ask}" if ask else ""
        raise Wrong(f"{what} is {describe(got)}, and should be a tensor {list(shape)}{ask}")


def show(number):
    """A number with four significant digits."""
    return str(number) if math.isnan(number) else f"{number:.4g}"


def describe(value):
    """A value's type and size in words, or a short value itself."""
    if value is None:
        return "None (is a `return` missing?)"
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r}" if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def expect_equal(got, want, what, *, ask=""):
    """Raises Wrong unless got == want, for values that are not tensors. what, ask: as above."""
    ask = f": {ask}" if ask else ""
    if got is None or type(got) is not type(want) or got != want:
        shown = describe(got) if got is None else f"{got!r}"
        raise Wrong(f"{what} is {shown}, and should be {want!r}{ask}")


def random(*shape, seed=0):
    """Normal numbers that are the same at each call, in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_ids(d_vocab, *shape, seed=0):
    """Ids below d_vocab that are the same at each call."""
    return torch.randint(d_vocab, shape, generator=torch.Generator().manual_seed(seed))
