"""Masks: the number of masked patches at every size, and the blocks for given random draws."""
import itertools
import math
from collections import Counter

import numpy as np
import pytest

from masking import MASKS, blockwise_mask, mask_part_of, no_mask, number_to_mask, random_mask


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (3, 7), (8, 8), (14, 14), (1, 64), (64, 64)])
def test_exact_count_at_every_ratio(name, grid):
    """The names are those of --masking; "none" masks no patch."""
    patches = math.prod(grid)
    for ratio in (0.0, 0.1, 0.4, 0.75, 1.0):
        num_masked = min(max(1, number_to_mask(ratio, grid)), patches - 1)
        for seed in range(5):
            mask = MASKS[name](grid, num_masked, rng(seed))
            assert mask.shape == grid and mask.dtype == bool
            assert mask.sum() == (0 if name == "none" else num_masked)


def test_masks_are_named():
    assert MASKS == {"blockwise": blockwise_mask, "random": random_mask, "none": no_mask}


@pytest.mark.parametrize("ratio, grid, expected", [
    (0.4, (14, 14), 78), (75 / 196, (14, 14), 75), (0.29, (10, 10), 29), (0.999, (2, 2), 3), (0.1, (3, 3), 0),
    (0.0, (8, 8), 0), (1.0, (8, 8), 64)])
def test_number_to_mask_rounds_down(ratio, grid, expected):
    assert number_to_mask(ratio, grid) == expected


def test_number_to_mask_is_exact_for_every_share_of_the_patches():
    """The product of a share and a number may be a rounding error below a whole number."""
    for patches in (9, 49, 100, 196, 784):
        numbers = [number_to_mask(k / patches, (1, patches)) for k in range(patches + 1)]
        assert numbers == list(range(patches + 1))


@pytest.mark.parametrize("grid", [(2, 2), (3, 7), (8, 8), (14, 14), (64, 64)])
def test_as_printed_stops_after_crossing(grid):
    patches = math.prod(grid)
    for num_masked in {1, int(0.4 * patches), patches - 2}:
        for seed in range(20):
            assert num_masked < blockwise_mask(grid, num_masked, rng(seed), exact=False).sum() < patches


def test_as_printed_overshoots_by_less_than_a_block():
    counts = [blockwise_mask((14, 14), 78, rng(seed), exact=False).sum() for seed in range(500)]
    assert min(counts) == 79 and max(counts) <= 78 + 18 and len(set(counts)) > 3    # 16, and rounding


@pytest.mark.parametrize("grid, num_masked, options", [
    ((2, 2), 0, {}), ((2, 2), 4, {}), ((2, 2), -1, {}), ((2, 2), 3, {"exact": False}), ((1, 1), 1, {}),
    ((2, 2), 1.5, {}), ((2, 2), 2.0, {}), ((2, 2), float("inf"), {}),
    ((14, 14), 75, {"min_block": 0}), ((14, 14), 75, {"min_block": 197}),
    ((14, 14), 75, {"min_aspect": 0}), ((14, 14), 75, {"min_aspect": 1.1})])
def test_impossible_requests_are_refused(grid, num_masked, options):
    with pytest.raises(ValueError, match="^num_masked must be |^min_block must be .* and min_aspect "):
        blockwise_mask(grid, num_masked, rng(), **options)
    if not options:
        with pytest.raises(ValueError, match="^num_masked must be "):
            random_mask(grid, num_masked, rng())


def test_smallest_block_scales_with_the_grid():
    for grid, block in (((14, 14), 16), ((8, 8), 5), ((28, 28), 64), ((2, 2), 1)):
        num_masked = number_to_mask(0.4, grid)
        for seed in range(10):
            expected = blockwise_mask(grid, num_masked, rng(seed), min_block=block)
            assert (blockwise_mask(grid, num_masked, rng(seed)) == expected).all()


class Draws:
    """A generator that draws the given values over and over, and chooses the last patches."""

    def __init__(self, *values):
        self.random = itertools.cycle(values).__next__

    def choice(self, patches, count, replace):
        return patches[-count:]


@pytest.mark.parametrize("options", [{}, {"log_aspect": True}])
def test_a_block_has_the_drawn_size_aspect_and_position(options):
    def draw(num_masked, s, r, t, l):
        draws = Draws(s, *[r] * (1 + len(options)), t, l)
        return blockwise_mask((20, 20), num_masked, draws, min_block=64, min_aspect=0.25, **options)

    for r, t, l, box in ((0, 0, 0, (0, 0, 4, 16)), (0, 0.999, 0.999, (16, 4, 20, 20)),
                         (0.99999, 0.5, 0, (2, 0, 18, 4))):
        mask = draw(64, 0.3, r, t, l)
        rows, cols = np.nonzero(mask)
        assert (rows.min(), cols.min(), rows.max() + 1, cols.max() + 1) == box and mask.sum() == 64
    a, b = (8, 8) if options else (12, 5)        # the middle of 0.25 ... 4: 1 in logarithms, else 2.125
    assert draw(a * b, 0, 0.5, 0, 0)[:a, :b].all()


def test_blocks_are_drawn_between_the_smallest_and_what_is_missing():
    for s, side in ((0, 4), (0.999, 8)):                               # squares of 16 to 64 patches
        mask = blockwise_mask((20, 20), 64, Draws(s, 0, 0, 0), min_block=16, min_aspect=1)
        assert mask[:side, :side].all() and mask.sum() == 64           # the same block in every draw,
        assert mask[-4:].sum() == 64 - side ** 2                       # then single patches


def test_blocks_that_do_not_fit_or_leave_nothing_visible_are_not_used():
    square = {"min_aspect": 1}
    assert blockwise_mask((2, 8), 10, Draws(0), min_block=9, **square).ravel()[-10:].all()    # 3x3 in 2x8
    assert blockwise_mask((4, 4), 14, rng(), min_block=16, exact=False, **square).sum() == 15


@pytest.mark.parametrize("by_columns, last", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_last_block_is_masked_in_part(by_columns, last):
    M = np.zeros((3, 4), dtype=bool)
    M[0, 0] = True
    mask_part_of(M, 4, Draws(by_columns, last))
    added = [[(0, 1), (0, 2), (0, 3), (1, 0)], [(2, 0), (2, 1), (2, 2), (2, 3)],
             [(1, 0), (2, 0), (0, 1), (1, 1)], [(2, 2), (0, 3), (1, 3), (2, 3)]][2 * by_columns + last]
    assert {tuple(patch) for patch in np.argwhere(M)} == {(0, 0), *added}


def test_all_random_masks_are_equally_likely():
    drawn = Counter(random_mask((2, 3), 2, rng(seed)).tobytes() for seed in range(3000))
    assert len(drawn) == 15 and 150 < min(drawn.values()) and max(drawn.values()) < 250
