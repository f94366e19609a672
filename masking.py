"""Which patches are hidden from the model: blockwise masks (Algorithm 1) and, for the ablation of Table 4, random ones.

A mask is a boolean array over the patch grid, True = masked. Every draw comes from the generator that is passed in.
"""
import math

import numpy as np

MIN_BLOCK_SHARE = 16 / 196    # the paper's smallest block: 16 of the 196 patches of a 14x14 grid
MAX_BLOCKS = 32               # blocks drawn before single patches make up the rest; about 4 are usual at 40 %


def blockwise_mask(grid, num_masked, rng, *, min_block=None, min_aspect=0.3, exact=True, log_aspect=False):
    """Mask rectangular blocks of patches until enough are masked (Algorithm 1).

    grid        (h, w), the patch grid.
    num_masked  how many patches to mask: 0.4 h w in the paper.
    rng         numpy.random.Generator.
    min_block   the smallest block drawn, in patches; None scales the paper's 16 of 196 to this grid.
    min_aspect  a block's height / width is uniform between min_aspect and 1 / min_aspect.
    exact       True: exactly num_masked patches, the last block giving up what is too much on one side. Equal counts
                make static shapes, and give each image the same weight in the loss.
                False: as printed, which stops at the first block that takes the count above num_masked.
    log_aspect  True: the aspect ratio is log-uniform, as in the released code, so that tall and wide are equally likely.

    Returns a boolean array (h, w), neither empty nor full. Raises ValueError for a request that no mask can meet.
    """
    h, w = _checked(grid, num_masked, spare=1 if exact else 2)
    if min_block is None:
        min_block = max(1, round(MIN_BLOCK_SHARE * h * w))
    if not (1 <= min_block <= h * w and 0 < min_aspect <= 1):
        raise ValueError(f"min_block must be 1 to {h * w} and min_aspect in (0, 1], not {min_block} and {min_aspect}")
    target = num_masked if exact else num_masked + 1                   # until |M| > 0.4N
    mask = np.zeros((h, w), dtype=bool)
    masked = 0                                                         # |M|
    for s, r, t, l, side in rng.random((MAX_BLOCKS, 5)).tolist():      # all draws in one call: twice the speed
        s = min_block + (num_masked - masked - min_block) * s          # block size   s <- Rand(16, 0.4N - |M|)
        if log_aspect:
            r = min_aspect ** (1 - 2 * r)
        else:
            r = min_aspect + (1 / min_aspect - min_aspect) * r         # aspect ratio r <- Rand(0.3, 1/0.3)
        a, b = max(1, round(math.sqrt(s * r))), max(1, round(math.sqrt(s / r)))
        if a > h or b > w:
            continue                                                   # no place for this one
        t, l = int((h - a + 1) * t), int((w - b + 1) * l)              # t <- Rand(0, h - a), l <- Rand(0, w - b)
        block = mask[t:t + a, l:l + b]
        added = a * b - int(np.count_nonzero(block))
        if exact and masked + added > target:
            part = block if side < 0.5 else block.T                    # keep it from one of its four sides on
            free = np.flatnonzero(~part)
            part.flat[free[:target - masked] if 4 * side % 2 < 1 else free[masked - target:]] = True
            return mask
        if masked + added == h * w:
            continue                                                   # nothing would be left to see
        block[:] = True
        masked += added
        if masked >= target:
            return mask
    mask.flat[rng.choice(np.flatnonzero(~mask), target - masked, replace=False)] = True
    return mask


def random_mask(grid, num_masked, rng):
    """Mask exactly num_masked patches, every such set equally likely (Table 4, "- blockwise masking").

    grid (h, w); rng numpy.random.Generator. Returns a boolean array (h, w). Raises ValueError for a request that would
    mask nothing or everything.
    """
    h, w = _checked(grid, num_masked, spare=1)
    mask = np.zeros((h, w), dtype=bool)
    mask.flat[rng.choice(h * w, num_masked, replace=False)] = True
    return mask


def _checked(grid, num_masked, *, spare):
    h, w = grid
    if num_masked != int(num_masked) or not 1 <= num_masked <= h * w - spare:
        raise ValueError(f"num_masked must be a whole number from 1 to {h * w - spare} on a {h}x{w} grid, not {num_masked}")
    return h, w
