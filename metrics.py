"""What an analysis reports: numbers that say how well a head fits a description.

Chapter: COURSE_ROADMAP.md, 4 (QK and OV)
Read before: attention.py; after: README.md, "Look inside"
Source: Elhage et al. 2021 (previous-token heads)
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
