"""Which patches the model does not see: blockwise masks (Algorithm 1), and the ablations of Table 4.

A mask is a boolean array over the patch grid (h, w), True = masked. All draws come from the given generator.
"""
import math
from numbers import Integral

import numpy as np

MAX_DRAWS = 32    # four blocks are usual; after this many draws, single patches complete the mask


def blockwise_mask(grid, num_masked, rng, *, min_block=None, min_aspect=0.3, exact=True, log_aspect=False):
    """Mask blocks of patches until num_masked (0.4 N in the paper) are masked: Algorithm 1.

    grid        (h, w), N = h w patches
    rng         numpy.random.Generator
    min_block   smallest block in patches; None scales the paper's 16 of 14x14 patches to this grid
    min_aspect  the aspect ratio height / width of a block lies between min_aspect and 1 / min_aspect
    exact       True (ours): mask only a part of the last block, so that exactly num_masked are masked.
                False: Algorithm 1 as printed, which stops when more than num_masked are masked.
    log_aspect  draw the aspect ratio log-uniformly, as the released code does; the paper: uniformly

    Returns a boolean array (h, w). Raises ValueError if the mask would be empty or full.
    """
    h, w = grid
    check_count(num_masked, h * w - (1 if exact else 2))               # inexact: at least one more
    if min_block is None:
        min_block = max(1, round(16 / 196 * h * w))
    if not (1 <= min_block <= h * w and 0 < min_aspect <= 1):
        raise ValueError(f"min_block must be from 1 to {h * w} and min_aspect in (0, 1], got {min_block} and "
                         f"{min_aspect}")

    def rand(low, high):    # high < low is possible, as in the released code
        return low + (high - low) * rng.random()

    M = np.zeros((h, w), dtype=bool)
    size = 0                                                           # |M|
    for _ in range(MAX_DRAWS):
        s = rand(min_block, num_masked - size)                         # block size
        r = rand(min_aspect, 1 / min_aspect)                           # aspect ratio
        if log_aspect:                                                 # replaces the uniform draw
            r = math.exp(rand(math.log(min_aspect), math.log(1 / min_aspect)))
        a, b = max(1, round(math.sqrt(s * r))), max(1, round(math.sqrt(s / r)))    # block height, width
        if a > h or b > w:
            continue                                                   # does not fit: draw another
        t, l = int(rand(0, h - a + 1)), int(rand(0, w - b + 1))        # top, left: integers
        block = M[t:t + a, l:l + b]
        new = a * b - np.count_nonzero(block)
        if exact and size + new >= num_masked:
            mask_part_of(block, num_masked - size, rng)
            return M
        if size + new == h * w:
            continue                                                   # leave something visible
        block[:] = True                                                # M <- M u {(i, j) in the block}
        size += new
        if size > num_masked:                                          # until |M| > 0.4 N (with exact=False)
            return M
    stop_at = num_masked if exact else num_masked + 1                  # MAX_DRAWS were not enough
    M.flat[rng.choice(np.flatnonzero(~M), stop_at - size, replace=False)] = True
    return M


def mask_part_of(block, count, rng):
    """Mask `count` unmasked patches of a block, a view of the mask, starting from a randomly chosen side."""
    rows = block if rng.random() < 0.5 else block.T
    free = np.flatnonzero(~rows)
    if rng.random() >= 0.5:
        free = free[::-1]
    rows.flat[free[:count]] = True


def random_mask(grid, num_masked, rng):
    """Mask exactly num_masked patches of grid (h, w), all sets equally likely (ablation of Table 4).

    rng: numpy.random.Generator. Returns a boolean array (h, w). Raises ValueError for an empty or full mask.
    """
    h, w = grid
    check_count(num_masked, h * w - 1)
    M = np.zeros((h, w), dtype=bool)
    M.flat[rng.choice(h * w, num_masked, replace=False)] = True
    return M


def no_mask(grid, num_masked, rng):
    """Mask nothing (ablation of Table 4), whatever num_masked is. Returns a boolean array (h, w)."""
    return np.zeros(grid, dtype=bool)


MASKS = {"blockwise": blockwise_mask, "random": random_mask, "none": no_mask}


def number_to_mask(ratio, grid):
    """The number of patches to mask for a mask ratio: floor(ratio * h * w)."""
    h, w = grid
    return int(ratio * h * w + 1e-9)                                   # 0.29 of 100 is 28.999999999999996


def check_count(num_masked, largest):
    """Raise ValueError unless num_masked is an integer from 1 to `largest`."""
    if not isinstance(num_masked, Integral) or not 1 <= num_masked <= largest:
        raise ValueError(f"num_masked must be an integer from 1 to {largest}, got {num_masked}")
