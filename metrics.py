"""What an analysis reports: numbers that say how well a head fits a description.

Chapter: COURSE_ROADMAP.md, 4 (QK and OV)
Read before: attention.py; after: README.md, "Look inside"
Source: Elhage et al. 2021 (previous-token heads); Olsson et al. 2022 (prefix matching)
"""

from utils import UserError


def prev_token_score(pattern):
    """The mean attention that each position, from the second on, pays to the one before it.

    pattern: [..., query_pos, key_pos], rows summing to one, at least two positions.
    Returns [...]: 1 for a perfect previous-token head. Attention spread evenly over what is visible
    scores the mean of 1/2, 1/3, …, 1/n. Raises UserError for patterns of one position.
    """
    if pattern.shape[-1] < 2 or pattern.shape[-1] != pattern.shape[-2]:
        raise UserError(f"pattern is {list(pattern.shape)}; the score needs [..., pos, pos] with "
                        "two positions or more")
    return pattern.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)


def induction_score(pattern, tokens):
    """The attention that a token which was there before pays to what followed it then: to every key
    that comes after an earlier occurrence, summed; the mean over such queries.

    pattern: [..., batch, head, query_pos, key_pos], rows summing to one; tokens: [batch, pos].
    Returns [..., batch, head], from 0 to 1; NaN for a row in which no token comes twice.
    """
    earlier = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)  # [batch, query_pos, key_pos]
    after = earlier.roll(1, dims=-1)  # the last key is nobody's past, so none comes round
    n_queries = earlier.any(-1).sum(-1)  # [batch]
    return (pattern * after[:, None]).sum((-2, -1)) / n_queries[:, None]
