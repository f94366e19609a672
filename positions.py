"""Position embeddings and relative position biases at another image size, as in the released code."""
import math

import torch
import torch.nn.functional as F

TABLE = "relative_position_bias_table"    # how the names of bias tables end


def resize_positions(state_dict, config, grid=None):
    """Return a copy of a state_dict with positions, absolute or relative, resized to the grid of config.

    As in the released code, E_pos is resized bicubically without antialiasing (Table 14 says bilinear), and
    bias tables by `offset_weights`. The rows of [S] are unchanged.
    grid: the old (h, w). None: the grid of config if it fits, otherwise a square.
    Raises ValueError for positions that do not fit the old grid.
    """
    resized = dict(state_dict)
    for name, value in state_dict.items():
        if name != "pos_embed" and not name.endswith(TABLE):
            continue
        rows = value.shape[-2]
        h, w = grid or config.grid
        if grid is None and count_rows(name, h, w) != rows:
            h, w = square_grid(name, rows)
        if count_rows(name, h, w) != rows:
            raise ValueError(f"{name}: {rows} rows do not fit a grid of {h}x{w}")
        if (h, w) == config.grid:
            continue
        if name == "pos_embed":
            patches = value[:, 1:].transpose(1, 2).unflatten(2, (h, w)).float()       # (1, D, h, w)
            patches = F.interpolate(patches, size=config.grid, mode="bicubic")        # (1, D, h', w')
            patches = patches.flatten(2).transpose(1, 2).to(value.dtype)              # (1, N', D)
            resized[name] = torch.cat([value[:, :1], patches], dim=1)
        else:
            vertical, horizontal = offset_weights(h, config.grid[0]), offset_weights(w, config.grid[1])
            biases = value[:-3].unflatten(0, (2 * h - 1, 2 * w - 1)).double()         # (2h-1, 2w-1, heads)
            biases = torch.einsum("ri,cj,ijk->rck", vertical, horizontal, biases)     # (2h'-1, 2w'-1, heads)
            resized[name] = torch.cat([biases.flatten(0, 1).to(value.dtype), value[-3:]])
    return resized


def count_rows(name, h, w):
    """Return the number of rows in E_pos or a bias table for h x w patches, those of [S] included."""
    if name == "pos_embed":
        return h * w + 1
    return (2 * h - 1) * (2 * w - 1) + 3


def square_grid(name, rows):
    """Return the largest square grid, (h, h), for which E_pos or a bias table has at most this many rows."""
    if name == "pos_embed":
        side = math.isqrt(max(1, rows - 1))
    else:
        side = (math.isqrt(max(1, rows - 3)) + 1) // 2
    return side, side


def offset_weights(old, new):
    """Return the matrix (2 new - 1, 2 old - 1) that turns biases at old offsets into biases at new offsets.

    Along one axis, a bias table is a function of the offset between query and key, -(old - 1) ... old - 1
    patches. It changes fast at small offsets and slowly at large ones, and patches keep their size in pixels.
    If all offsets were stretched alike, the bias of neighbours would go to patches farther away. The released
    code therefore leaves the offsets -1, 0 and 1 in place and makes each further gap q times as wide as the
    one before it, such that the last old offset meets the last new one. From 4 patches to 5, q is 1.30:

        old offsets     0         1            2                3
        placed at       0         1          1 + q         1 + q + q^2
        new offsets     0         1         2         3         4

    A cubic spline through the old biases at this geometric grid gives the new ones. q is limited to [1.01,
    1.5]. A smaller grid therefore drops the largest old offsets, and a much larger one repeats the last bias.
    """
    if old == new:
        return torch.eye(2 * new - 1).double()
    if old == 1:
        return torch.ones(2 * new - 1, 1).double()
    low, high = 1.01, 1.5
    while high - low > 1e-6:                                           # bisection, 1 + q + ... = new - 1
        q = (low + high) / 2
        if sum(q ** k for k in range(old - 1)) > new - 1:
            high = q
        else:
            low = q
    places = (q ** torch.arange(old - 1).double()).cumsum(0)           # of the old offsets 1, 2 ... old-1
    places = torch.cat([-places.flip(0), torch.zeros(1), places])      # (2 old - 1,)
    offsets = torch.arange(1.0 - new, new).double().clamp(places[0], places[-1])
    return spline_weights(places / places[-1], offsets / places[-1])


def spline_weights(points, queries):
    """Return the matrix (m, n) that turns values at n points into their cubic spline at m queries.

    This is the "not-a-knot" spline in the truncated power basis of textbooks. Every point is a knot t_k,
    except the first two and the last two:
        s(x) = a_0 + a_1 x + a_2 x^2 + a_3 x^3 + sum_k c_k max(0, x - t_k)^3
    Through three points it is a parabola. points, queries: float64 in [-1, 1], where powers are accurate.
    """
    degree, knots = min(3, len(points) - 1), points[2:-2]

    def basis(x):                                                      # (m,) -> (m, n)
        powers = x[:, None] ** torch.arange(degree + 1)
        return torch.cat([powers, (x[:, None] - knots).clamp(min=0) ** 3], dim=1)

    # values = basis(points) @ coefficients, and s(queries) = basis(queries) @ coefficients
    return torch.linalg.solve(basis(points), basis(queries), left=False)
