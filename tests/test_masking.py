import itertools
from collections import Counter

import numpy as np
import pytest

from masking import blockwise_mask, mask_a_part, random_mask


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("draw", [blockwise_mask, random_mask])
@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (3, 7), (8, 8), (14, 14), (1, 64), (64, 64)])
def test_exact_count_at_every_ratio(draw, grid):
    cells = grid[0] * grid[1]
    for ratio in (0.0, 0.1, 0.4, 0.75, 1.0):
        wanted = min(max(1, int(ratio * cells)), cells - 1)
        for seed in range(5):
            mask = draw(grid, wanted, rng(seed))
            assert mask.shape == grid and mask.dtype == bool and mask.sum() == wanted


@pytest.mark.parametrize("grid", [(2, 2), (3, 7), (8, 8), (14, 14), (64, 64)])
def test_as_printed_stops_after_crossing(grid):
    cells = grid[0] * grid[1]
    for wanted in {1, int(0.4 * cells), cells - 2}:
        for seed in range(20):
            assert wanted < blockwise_mask(grid, wanted, rng(seed), exact=False).sum() < cells


def test_as_printed_overshoots_by_less_than_a_block():
    counts = [blockwise_mask((14, 14), 78, rng(seed), exact=False).sum() for seed in range(500)]
    assert min(counts) == 79 and max(counts) <= 78 + 18 and len(set(counts)) > 3    # 16, and rounding


@pytest.mark.parametrize("grid, wanted, options", [
    ((2, 2), 0, {}), ((2, 2), 4, {}), ((2, 2), -1, {}), ((2, 2), 3, {"exact": False}), ((1, 1), 1, {}),
    ((2, 2), 1.5, {}), ((2, 2), 2.0, {}), ((2, 2), float("inf"), {}),
    ((14, 14), 75, {"min_block": 0}), ((14, 14), 75, {"min_block": 197}),
    ((14, 14), 75, {"min_aspect": 0}), ((14, 14), 75, {"min_aspect": 1.1})])
def test_impossible_requests(grid, wanted, options):
    with pytest.raises(ValueError, match="^num_masked: |^min_block: .*, min_aspect: "):
        blockwise_mask(grid, wanted, rng(), **options)
    if not options:
        with pytest.raises(ValueError, match="^num_masked: "):
            random_mask(grid, wanted, rng())


def test_smallest_block_scales_with_the_grid():
    for grid, block in (((14, 14), 16), ((8, 8), 5), ((28, 28), 64), ((2, 2), 1)):
        wanted = int(0.4 * grid[0] * grid[1])
        for seed in range(10):
            given = blockwise_mask(grid, wanted, rng(seed), min_block=block)
            assert (blockwise_mask(grid, wanted, rng(seed)) == given).all()    # the generator decides alone


class Draws:
    """A generator whose uniform draws are those given, again and again."""

    def __init__(self, *values):
        self.random = itertools.cycle(values).__next__

    def choice(self, cells, count, replace):
        return cells[-count:]


@pytest.mark.parametrize("options", [{}, {"log_aspect": True}])
def test_a_block_has_the_drawn_size_aspect_and_place(options):
    def draw(wanted, s, r, t, l):
        draws = Draws(s, *[r] * (1 + len(options)), t, l)
        return blockwise_mask((20, 20), wanted, draws, min_block=64, min_aspect=0.25, **options)

    for r, t, l, box in ((0, 0, 0, (0, 0, 4, 16)), (0, 0.999, 0.999, (16, 4, 20, 20)),
                         (0.99999, 0.5, 0, (2, 0, 18, 4))):
        mask = draw(64, 0.3, r, t, l)
        rows, cols = np.nonzero(mask)
        assert (rows.min(), cols.min(), rows.max() + 1, cols.max() + 1) == box and mask.sum() == 64
    a, b = (12, 5) if not options else (8, 8)    # the middle of 0.25 .. 4: 2.125, or 1 in logarithms
    assert draw(a * b, 0, 0.5, 0, 0)[:a, :b].all()


def test_blocks_are_drawn_between_the_smallest_and_what_is_missing():
    for s, side in ((0, 4), (0.999, 8)):                               # 16 .. 64 patches, squares
        mask = blockwise_mask((20, 20), 64, Draws(s, 0, 0, 0), min_block=16, min_aspect=1)
        assert mask[:side, :side].all() and mask.sum() == 64           # one block, again and again,
        assert mask[-4:].sum() == 64 - side ** 2                       # then the rest patch by patch


def test_blocks_that_do_not_fit_or_leave_nothing_visible_are_not_used():
    square = {"min_aspect": 1}
    assert blockwise_mask((2, 8), 10, Draws(0), min_block=9, **square).ravel()[-10:].all()    # 3x3 in 2x8
    assert blockwise_mask((4, 4), 14, rng(), min_block=16, exact=False, **square).sum() == 15


@pytest.mark.parametrize("by_columns, last", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_last_block_is_masked_in_part(by_columns, last):
    M = np.zeros((3, 4), dtype=bool)
    M[0, 0] = True
    mask_a_part(M, 4, Draws(by_columns, last))
    added = [[(0, 1), (0, 2), (0, 3), (1, 0)], [(2, 0), (2, 1), (2, 2), (2, 3)],
             [(1, 0), (2, 0), (0, 1), (1, 1)], [(2, 2), (0, 3), (1, 3), (2, 3)]][2 * by_columns + last]
    assert {tuple(place) for place in np.argwhere(M)} == {(0, 0), *added}


def test_all_random_masks_are_equally_likely():
    drawn = Counter(random_mask((2, 3), 2, rng(seed)).tobytes() for seed in range(3000))
    assert len(drawn) == 15 and 150 < min(drawn.values()) and max(drawn.values()) < 250
