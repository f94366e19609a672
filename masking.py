"""Which patches the model does not see: blockwise masks (Algorithm 1), and random ones (Table 4).

A mask is a boolean array over the patch grid (h, w), True = masked. All draws come from the given generator.
"""
import math

import numpy as np

MAX_BLOCKS = 32    # blocks tried before single patches fill up the mask; about four are usual


def blockwise_mask(grid, num_masked, rng, *, min_block=None, min_aspect=0.3, exact=True, log_aspect=False):
    """Mask blocks of patches until num_masked (0.4 N in the paper) are masked: Algorithm 1.

    grid        (h, w), N = h w patches
    rng         numpy.random.Generator
    min_block   smallest block in patches; None scales the paper's 16 of 14x14 patches to this grid
    min_aspect  the aspect ratio height / width of a block lies between min_aspect and 1 / min_aspect
    exact       True (ours): trim the last block, so that exactly num_masked patches are masked.
                False: Algorithm 1 as printed, which stops once more than num_masked are masked.
    log_aspect  draw the aspect ratio log-uniformly, as the released code does; the paper: uniformly

    Returns a boolean array (h, w). Raises ValueError for numbers that would leave it empty or full.
    """
    h, w = check_request(grid, num_masked, most=math.prod(grid) - (1 if exact else 2))
    smallest = max(1, round(16 / 196 * h * w)) if min_block is None else min_block
    if not (1 <= smallest <= h * w and 0 < min_aspect <= 1):
        raise ValueError(f"min_block: 1 to {h * w}, min_aspect: in (0, 1]; not {min_block}, {min_aspect}")
    enough = num_masked if exact else num_masked + 1
    M = np.zeros((h, w), dtype=bool)
    size = 0                                                           # |M|
    for u_s, u_r, u_t, u_l, u_side in rng.random((MAX_BLOCKS, 5)).tolist():    # twice as fast as 160 calls
        s = smallest + (num_masked - size - smallest) * u_s            # block size: s <- Rand(16, 0.4N - |M|)
        if log_aspect:
            r = min_aspect ** (1 - 2 * u_r)
        else:
            r = min_aspect + (1 / min_aspect - min_aspect) * u_r       # aspect ratio: r <- Rand(0.3, 1/0.3)
        a = max(1, round(math.sqrt(s * r)))                            # block height
        b = max(1, round(math.sqrt(s / r)))                            # block width
        if a > h or b > w:
            continue
        t = int((h - a + 1) * u_t)                                     # t <- Rand(0, h - a)
        l = int((w - b + 1) * u_l)                                     # l <- Rand(0, w - b)
        block = M[t:t + a, l:l + b]
        new = a * b - np.count_nonzero(block)
        if exact and size + new > num_masked:
            trim_and_mask(block, num_masked - size, int(4 * u_side))
            return M
        if size + new == h * w:
            continue                                                   # leave something visible
        block[:] = True                                                # M <- M u {(i, j) in the block}
        size += new
        if size >= enough:                                             # until |M| > 0.4N
            return M
    M.flat[rng.choice(np.flatnonzero(~M), enough - size, replace=False)] = True
    return M


def trim_and_mask(block, count, side):
    """Mask count unmasked patches of the block, in place, and trim the surplus at one of its four sides."""
    lines = block if side < 2 else block.T
    free = np.flatnonzero(~lines)
    lines.flat[free[:count] if side % 2 == 0 else free[-count:]] = True


def random_mask(grid, num_masked, rng):
    """Mask exactly num_masked patches of grid (h, w), all sets equally likely (ablation of Table 4).

    rng numpy.random.Generator. Returns a boolean array (h, w). Raises ValueError for an empty or full mask.
    """
    h, w = check_request(grid, num_masked, most=math.prod(grid) - 1)
    M = np.zeros((h, w), dtype=bool)
    M.flat[rng.choice(h * w, num_masked, replace=False)] = True
    return M


def check_request(grid, num_masked, most):
    """(h, w) of the grid. Raises ValueError unless num_masked is a whole number from 1 to most."""
    h, w = grid
    if num_masked != int(num_masked) or not 1 <= num_masked <= most:
        raise ValueError(f"num_masked must be a whole number, 1 to {most} of {h}x{w}, not {num_masked}")
    return h, w
