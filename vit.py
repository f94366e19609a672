"""The Vision Transformer (sec. 2.2) and its models: masked image model (2.3), classifier and segmenter (2.6).

Parameters are named as in the released checkpoints. Images are (B, C, H, W) in [0, 1]; the models normalise
them. A grid of h x w patches, N = h w, width D.
"""
import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check(ok, message):
    """Raise ValueError(message) unless ok. A message that begins with "field: " names a field of a config."""
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and variants of the backbone. Annotated fields are also flags of the scripts, with their help.

    Raises ValueError for values that do not work.
    """
    image_size: Annotated[int | tuple[int, int], "pixels a side of the transformer's images"] = 224
    patch_size: Annotated[int, "pixels a side of a patch; must divide the image size"] = 16
    in_channels: int = 3
    dim: Annotated[int, "width D: 768 base, 1024 large (sec. 2.2)"] = 768
    depth: Annotated[int, "blocks L: 12 base, 24 large"] = 12
    heads: Annotated[int, "attention heads: 12 base, 16 large; must divide the width"] = 12
    mlp_ratio: Annotated[float, "hidden width of the FFN over D"] = 4.0
    layer_norm_eps: float = 1e-6                                       # Hugging Face's copies have 1e-12
    position: Annotated[Literal["absolute", "relative", "shared_relative"],
                        "paper: absolute; released code: shared_relative, to fine-tune relative"] = "absolute"
    layer_scale: Annotated[float, "initial gamma, 0 = none (paper); released: 0.1 base, 1e-5 large"] = 0.0
    drop_path: Annotated[float, "stochastic depth; its rate rises from 0 to this over the blocks"] = 0.1
    pixel_mean: Annotated[tuple[float, float, float], "red, green, blue; released 22K: 0.5"] = IMAGENET_MEAN
    pixel_std: Annotated[tuple[float, float, float], "likewise; released 22K: 0.5"] = IMAGENET_STD
    init_std: Annotated[float, "of initial weights (sec. 2.5); if narrow: 0.02 sqrt(768 / dim)"] = 0.02

    def __post_init__(self):
        for name in ("patch_size", "in_channels", "dim", "depth", "heads", "mlp_ratio", "layer_norm_eps",
                     "init_std"):
            check(0 < getattr(self, name) < math.inf, f"{name}: above 0, not {getattr(self, name)}")
        H, W = self.image_hw
        check(min(H, W) > 0 and H % self.patch_size == W % self.patch_size == 0,
              f"patch_size: a divisor of image_size {self.image_size}, not {self.patch_size}")
        check(self.dim % self.heads == 0, f"heads: a divisor of dim {self.dim}, not {self.heads}")
        check(self.position in ("absolute", "relative", "shared_relative"),
              f"position: absolute, relative or shared_relative, not {self.position}")
        check(0 <= self.drop_path < 1, f"drop_path: from 0 to below 1, not {self.drop_path}")
        check(0 <= self.layer_scale < math.inf, f"layer_scale: 0 (none) or above, not {self.layer_scale}")
        check(all(map(math.isfinite, self.pixel_mean)), f"pixel_mean: finite numbers, not {self.pixel_mean}")
        check(all(0 < std < math.inf for std in self.pixel_std), f"pixel_std: above 0, not {self.pixel_std}")

    @property
    def image_hw(self):
        """(H, W) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid(self):
        """(h, w), the patch grid."""
        return self.image_hw[0] // self.patch_size, self.image_hw[1] // self.patch_size

    @property
    def backbone(self):
        """This config without the other fields of a script's config, which inherits it."""
        return ViTConfig(**{field.name: getattr(self, field.name) for field in fields(ViTConfig)})


# base and large are the paper's. The released code adds position="shared_relative" and layer_scale=0.1, large
# 1e-5.
PRESETS = {
    "tiny": ViTConfig(dim=192, heads=3),
    "small": ViTConfig(dim=384, heads=6),
    "base": ViTConfig(),
    "large": ViTConfig(dim=1024, depth=24, heads=16),
}


def relative_position_index(grid):
    """The row in a relative-position-bias table for each query and key: int64 (1+N, 1+N).

    Query patch i and key patch j have the row (drow + h - 1)(2w - 1) + (dcol + w - 1), where (drow, dcol) is
    the position of i minus the position of j. The last three rows are for [S] -> patch, patch -> [S] and
    [S] -> [S].
    """
    h, w = grid
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    row, col = row.flatten(), col.flatten()                        # (N,)
    drow = row[:, None] - row[None, :] + h - 1                     # (N, N), 0 ... 2h-2
    dcol = col[:, None] - col[None, :] + w - 1                     # (N, N), 0 ... 2w-2
    offsets = (2 * h - 1) * (2 * w - 1)
    index = torch.empty(1 + h * w, 1 + h * w, dtype=torch.int64)
    index[1:, 1:] = drow * (2 * w - 1) + dcol
    index[0, 1:] = offsets
    index[1:, 0] = offsets + 1
    index[0, 0] = offsets + 2
    return index


def relative_position_table(config):
    """A table for relative_position_index, initially zero: ((2h-1)(2w-1) + 3, heads)."""
    h, w = config.grid
    return nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1) + 3, config.heads))


def truncated_normal_(tensor, std):
    """Draw from N(0, std^2) cut at +-1 std, by inverse-CDF sampling. torch.nn.init takes 30 times as long."""
    within_one_std = math.erf(math.sqrt(0.5))
    with torch.no_grad():
        tensor.uniform_(-within_one_std, within_one_std).erfinv_().mul_(std * math.sqrt(2))


class PatchEmbed(nn.Module):
    """Linear projection of flattened P x P patches, E x^p in sec. 2.2: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch_size, stride=config.patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)        # (B, D, h, w) -> (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention with a position bias. Keys have no bias: the softmax would cancel it."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        if config.position == "relative":
            self.relative_position_bias_table = relative_position_table(config)
        self.proj = nn.Linear(config.dim, config.dim)

    def queries_keys_values(self, x):
        B, T, D = x.shape                                          # T = 1+N
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(B, T, 3, self.heads, D // self.heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)                # three of (B, heads, T, D/heads)

    def forward(self, x, position_bias=None):
        """x (B, T, D), position_bias (1, heads, T, T), added to the scores. Returns (B, T, D)."""
        q, k, v = self.queries_keys_values(x)
        if position_bias is not None:
            position_bias = position_bias.to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=position_bias)
        return self.proj(x.transpose(1, 2).flatten(2))             # (B, heads, T, D/heads) -> (B, T, D)

    def attention_weights(self, x, position_bias=None):
        """softmax(q k^T / sqrt(d) + bias), which forward computes but does not return: (B, heads, T, T)."""
        q, k, _ = self.queries_keys_values(x)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if position_bias is not None:
            scores = scores + position_bias
        return scores.softmax(dim=-1)


class Mlp(nn.Module):
    """The FFN: two linear layers with the exact GELU between them."""

    def __init__(self, config):
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.dim, hidden)
        self.fc2 = nn.Linear(hidden, config.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; residuals are scaled per channel (layer scale) and dropped per sample."""

    def __init__(self, config, drop_path_rate):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)
        self.gamma_1 = self.gamma_2 = None
        if config.layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((config.dim,), float(config.layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((config.dim,), float(config.layer_scale)))

    def forward(self, x, position_bias=None):
        x = x + self.residual(self.attn(self.norm1(x), position_bias), self.gamma_1)
        x = x + self.residual(self.mlp(self.norm2(x)), self.gamma_2)
        return x

    def residual(self, y, gamma):
        y = y if gamma is None else gamma * y
        return stochastic_depth(y, self.drop_path_rate, mode="row", training=self.training)


class VisionTransformer(nn.Module):
    """H_0 = [e_[S], E x^p_1, ..., E x^p_N] + E_pos, then L blocks (sec. 2.2).

    Initialisation (sec. 2.5)
        weight matrices, [S], [M], E_pos      normal, std init_std, cut at +-1 std (the cut: released code)
        attn.proj and mlp.fc2 of block l      the same, divided by sqrt(2 l), l from 1
        lm_head; the classifier's head        the same with std 0.02; with std 0.00002
        the segmenter's decoder and head      PyTorch's defaults
        biases, relative-position tables      0
        LayerNorm                             weight 1, bias 0
        gamma_1, gamma_2                      layer_scale
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        for name, values in (("pixel_mean", config.pixel_mean), ("pixel_std", config.pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))    # e_[S]
        self.patch_embed = PatchEmbed(config)
        if config.position == "absolute":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(config.grid), config.dim))
        else:
            index = relative_position_index(config.grid)
            self.register_buffer("relative_position_index", index, persistent=False)
        if config.position == "shared_relative":
            self.rel_pos_bias = nn.Module()                        # for the parameter's released name
            self.rel_pos_bias.relative_position_bias_table = relative_position_table(config)
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.checkpoint_blocks = False                             # True saves memory and takes longer
        self.register_load_state_dict_pre_hook(ignore_index_buffers)
        self.initialise()

    def initialise(self):
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1 and not name.endswith("relative_position_bias_table"):
                truncated_normal_(parameter, self.config.init_std)
        for l, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight.data /= math.sqrt(2 * l)
            block.mlp.fc2.weight.data /= math.sqrt(2 * l)

    def forward(self, images):
        """images (B, C, H, W) in [0, 1]. Returns norm(H_L), (B, 1+N, D): [S], then the patches."""
        return self.norm(self.hidden_states(images)[-1])

    def hidden_states(self, images):
        """The output of each block, before the final norm: a list of L tensors (B, 1+N, D)."""
        return self.run_blocks(self.add_cls_and_positions(self.embed_patches(images)))

    def attention_maps(self, images, layer=-1):
        """Softmax attention of a block, (B, heads, 1+N, 1+N): row = query, column = key, token 0 = [S].

        Equal to what forward computes in evaluation mode, position bias included. IndexError for a missing
        layer; -1 is the last.
        """
        block, bias = self.blocks[layer], self.position_biases()[layer]
        x = self.add_cls_and_positions(self.embed_patches(images))
        inputs = [x, *self.run_blocks(x)[:-1]]                     # of each block
        return block.attn.attention_weights(block.norm1(inputs[layer]), bias)

    def embed_patches(self, images):
        """Normalise, and project the patches: (B, C, H, W) -> (B, N, D). ValueError for a wrong size."""
        expected = (self.config.in_channels, *self.config.image_hw)
        check(images.shape[1:] == expected, f"images are {tuple(images.shape[1:])}, not {expected}")
        return self.patch_embed((images - self.pixel_mean) / self.pixel_std)

    def add_cls_and_positions(self, patches):
        """H_0: e_[S] in front of the patches, plus absolute positions. (B, N, D) -> (B, 1+N, D)."""
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return x + self.pos_embed if self.config.position == "absolute" else x

    def run_blocks(self, x):
        """H_1 ... H_L from H_0 = x: a list of L tensors (B, 1+N, D)."""
        states = []
        for block, bias in zip(self.blocks, self.position_biases()):
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, bias, use_reentrant=False)
            else:
                x = block(x, bias)
            states.append(x)
        return states

    def position_biases(self):
        """The attention bias of each block, (1, heads, 1+N, 1+N), or None with absolute positions."""
        if self.config.position == "absolute":
            return [None] * len(self.blocks)
        if self.config.position == "relative":
            return [self.bias_from(block.attn.relative_position_bias_table) for block in self.blocks]
        return [self.bias_from(self.rel_pos_bias.relative_position_bias_table)] * len(self.blocks)

    def bias_from(self, table):
        bias = table[self.relative_position_index].permute(2, 0, 1)[None]    # (1, heads, 1+N, 1+N)
        return bias.contiguous()                                   # as fused attention takes it

    def patch_pixels(self, images):
        """Normalised pixels, to regress in place of tokens (Table 4): (B, C, H, W) -> (B, h, w, C P P)."""
        pixels = (images - self.pixel_mean) / self.pixel_std
        return F.pixel_unshuffle(pixels, self.config.patch_size).permute(0, 2, 3, 1)

    def unpatch_pixels(self, patches):
        """The inverse of patch_pixels, clamped to [0, 1]."""
        pixels = F.pixel_shuffle(patches.permute(0, 3, 1, 2), self.config.patch_size)
        return (pixels * self.pixel_std + self.pixel_mean).clamp(0, 1)


class MaskedImageModel(VisionTransformer):
    """Predicts visual tokens of masked patches: p(z' | x^M) = softmax(W_c h_i + b_c) (sec. 2.3)."""

    def __init__(self, config, vocab_size=8192):
        super().__init__(config)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim))    # e_[M]
        self.lm_head = nn.Linear(config.dim, vocab_size)
        truncated_normal_(self.mask_token, config.init_std)
        truncated_normal_(self.lm_head.weight, 0.02)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, images, mask, places=None):
        """images (B, C, H, W) in [0, 1]; mask (B, h, w) bool, True = replaced by e_[M].

        places: int64 (M,), flat indices into (B, h, w) of the patches to predict; None: the masked ones.
        Returns their logits (M, V), in the order of places. The head is computed there only.
        """
        expected = (len(images), *self.config.grid)
        check(mask.shape == expected and mask.dtype == torch.bool,
              f"mask is {mask.dtype} {tuple(mask.shape)}, the model takes torch.bool {expected}")
        x = self.embed_patches(images)                             # (B, N, D)
        x = torch.where(mask.flatten(1)[..., None], self.mask_token.to(x.dtype), x)    # before E_pos is added
        h = self.norm(self.run_blocks(self.add_cls_and_positions(x))[-1])[:, 1:]   # (B, N, D), without [S]
        if places is None:
            places = mask.flatten().nonzero()[:, 0]                # waits for a GPU; pretrain.py gives places
        return self.lm_head(h.flatten(0, 1)[places])               # (M, D) -> (M, V)


class ImageClassifier(VisionTransformer):
    """Classifies the average of the patches, not [S]: softmax(W_c mean_i h_i + b_c) (sec. 2.6).

    As released, the average is normalised, by fc_norm, and not the tokens.
    """

    def __init__(self, config, num_classes):
        super().__init__(config)
        self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.dim, num_classes)
        truncated_normal_(self.head.weight, 0.02 * 0.001)          # released: times 0.001
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """images (B, C, H, W) in [0, 1]. Returns logits (B, classes)."""
        h = super().forward(images)[:, 1:]                         # (B, N, D), without [S]
        return self.head(self.fc_norm(h.mean(dim=1)))


class SemanticSegmenter(VisionTransformer):
    """Classifies each pixel: deconvolutions upsample the patches' norm(H_L) to pixels (sec. 2.6).

    Each level doubles the resolution, by a transposed convolution, GroupNorm and GELU, as often as 2 divides
    the patch size. The first level has decoder_dim channels, the next half of it, but at least 32. A 1x1
    convolution classifies; logits are resized bilinearly to H x W.
    """

    def __init__(self, config, num_classes, decoder_dim=256):
        super().__init__(config)
        layers, n_in, scale = [], config.dim, 1
        while config.patch_size % (2 * scale) == 0:
            n_out = max(32, decoder_dim // scale)
            layers += [nn.ConvTranspose2d(n_in, n_out, 2, stride=2), nn.GroupNorm(1, n_out), nn.GELU()]
            n_in, scale = n_out, 2 * scale
        self.decoder = nn.Sequential(*layers)
        self.head = nn.Conv2d(n_in, num_classes, kernel_size=1)

    def forward(self, images):
        """images (B, C, H, W) in [0, 1]. Returns logits (B, classes, H, W)."""
        h = super().forward(images)[:, 1:]                         # (B, N, D), without [S]
        h = h.transpose(1, 2).unflatten(2, self.config.grid)       # (B, D, h, w)
        logits = self.head(self.decoder(h))                        # (B, classes, h scale, w scale)
        if logits.shape[-2:] == images.shape[-2:]:
            return logits
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear")


def resize_positions(state_dict, config, grid=None):
    """A copy of state_dict with E_pos and the relative-position tables resized to the grid of config.

    As released: E_pos bicubically without antialiasing (Table 14 says bilinear), tables by offset_weights.
    Rows of [S] are kept. grid: the old (h, w); None: the grid of config if the sizes fit it, else a square.
    Raises ValueError for sizes that fit no grid.
    """
    resized = dict(state_dict)
    for name, value in state_dict.items():
        if name == "pos_embed":
            old = grid_of(value.shape[1] - 1, grid or config.grid, grid is None)
            if old != config.grid:
                patches = value[:, 1:].transpose(1, 2).unflatten(2, old).float()   # (1, D, h, w)
                patches = F.interpolate(patches, size=config.grid, mode="bicubic")
                patches = patches.flatten(2).transpose(1, 2).to(value.dtype)       # (1, N', D)
                resized[name] = torch.cat([value[:, :1], patches], dim=1)
        elif name.endswith("relative_position_bias_table"):
            fits = tuple(2 * side - 1 for side in grid or config.grid)
            old = grid_of(len(value) - 3, fits, grid is None)          # (2h-1, 2w-1) offsets
            rows, columns = (offset_weights((was + 1) // 2, side) for was, side in zip(old, config.grid))
            offsets = value[:-3].unflatten(0, old).double()            # (2h-1, 2w-1, heads)
            offsets = torch.einsum("ri,cj,ijk->rck", rows, columns, offsets).flatten(0, 1).to(value.dtype)
            resized[name] = torch.cat([offsets, value[-3:]])
    return resized


def grid_of(rows, grid, or_square):
    """grid, if it has so many places, else the square that has. ValueError."""
    if or_square and rows != math.prod(grid):
        grid = (math.isqrt(max(0, rows)),) * 2
    check(rows > 0 and rows == math.prod(grid), f"{rows} positions do not fit {grid[0]}x{grid[1]}")
    return tuple(grid)


def offset_weights(old, new):
    """How the bias at each new offset along an axis depends on that at old ones: (2 new - 1, 2 old - 1).

    As released, old offsets 0, 1, 2, 3 ... are placed at 0, 1, 1 + q, 1 + q + q^2 ..., the last one at the
    last new offset, so that near ones keep their bias. A cubic spline interpolates between them (not-a-knot).
    q is from 1.01 to 1.5: a smaller grid loses far offsets, a much larger one repeats the last.
    """
    if old == new:
        return torch.eye(2 * new - 1).double()
    if old == 1:
        return torch.ones(2 * new - 1, 1).double()
    low, high = 1.01, 1.5                                          # bounds of q
    while high - low > 1e-6:
        q = (low + high) / 2
        if sum(q ** k for k in range(old - 1)) > new - 1:
            high = q
        else:
            low = q
    places = (q ** torch.arange(old - 1).double()).cumsum(0)
    places = torch.cat([-places.flip(0), torch.zeros(1), places])      # (2 old - 1,)
    degree = min(3, 2 * old - 2)
    ends = places[-1:].expand(degree + 1)
    knots = torch.cat([-ends, places[2:-2], ends])

    def b_splines(x):    # (n,) -> (n, 2 old - 1), by the recursion of Cox and de Boor
        x = x.clamp(knots[0], knots[-1] * (1 - 1e-12))[:, None]
        basis = ((knots[:-1] <= x) & (x < knots[1:])).double()
        for k in range(1, degree + 1):
            rising = (x - knots[:-k - 1]) / (knots[k:-1] - knots[:-k - 1])
            falling = (knots[k + 1:] - x) / (knots[k + 1:] - knots[1:-k])
            basis = rising.nan_to_num(0, 0, 0) * basis[:, :-1] + falling.nan_to_num(0, 0, 0) * basis[:, 1:]
        return basis

    return b_splines(torch.arange(1.0 - new, new).double()) @ torch.linalg.inv(b_splines(places))


def ignore_index_buffers(module, state_dict, *_):
    """Before loading, delete relative_position_index of released checkpoints: it follows from the config."""
    for key in [key for key in state_dict if key.endswith("relative_position_index")]:
        del state_dict[key]
