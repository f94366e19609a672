"""The Vision Transformer (sec. 2.2) and its models: masked image model (2.3), classifier and segmenter (2.6).

Parameters are named as in the released checkpoints. B images of C channels and H W pixels in [0, 1], which
the models normalise; h w patches, N = h w; width D.
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
    """Raise ValueError(message) unless ok. Of a flag the message begins with its name and a colon."""
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and variants of the backbone. ValueError for impossible ones. Annotated: a flag and its help."""
    image_size: Annotated[int | tuple[int, int], "pixels a side of the transformer's images"] = 224
    patch_size: Annotated[int, "pixels a side of a patch; must divide the image size"] = 16
    in_channels: int = 3
    dim: Annotated[int, "width D: 768 base, 1024 large (sec. 2.2)"] = 768
    depth: Annotated[int, "blocks L: 12 base, 24 large"] = 12
    heads: Annotated[int, "attention heads: 12 base, 16 large; must divide the width"] = 12
    mlp_ratio: Annotated[float, "hidden width of the FFN over D"] = 4.0
    position: Annotated[Literal["absolute", "relative", "shared_relative"],
                        "paper: absolute; released code: shared_relative, to fine-tune relative"] = "absolute"
    layer_scale: Annotated[float, "initial gamma, 0 = none (paper); released: 0.1 base, 1e-5 large"] = 0.0
    drop_path: Annotated[float, "stochastic depth of the last block, from 0 in the first"] = 0.1
    pixel_mean: Annotated[tuple[float, float, float], "red, green, blue; released 22K: 0.5"] = IMAGENET_MEAN
    pixel_std: Annotated[tuple[float, float, float], "likewise; released 22K: 0.5"] = IMAGENET_STD
    init_std: Annotated[float, "of initial weights (sec. 2.5); small: try 0.02 sqrt(768 / dim)"] = 0.02

    def __post_init__(self):
        for name in ("patch_size", "in_channels", "dim", "depth", "heads", "mlp_ratio", "init_std"):
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
        """These fields alone, without the other flags of a script's config."""
        return ViTConfig(**{field.name: getattr(self, field.name) for field in fields(ViTConfig)})


# As in the paper. Released code: position="shared_relative", layer_scale=0.1 (large: 1e-5).
PRESETS = {
    "tiny": ViTConfig(dim=192, heads=3),
    "small": ViTConfig(dim=384, heads=6),
    "base": ViTConfig(),
    "large": ViTConfig(dim=1024, depth=24, heads=16),
}


def relative_position_index(grid):
    """For each pair (query, key) of tokens its row in a relative-position-bias table: int64 (1+N, 1+N).

    Patch i to patch j of the grid (h, w), with (drow, dcol) the position of i minus that of j: row
    (drow + h - 1)(2w - 1) + (dcol + w - 1). The last three rows: [S] -> patch, patch -> [S], [S] -> [S].
    """
    h, w = grid
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    row, col = row.flatten(), col.flatten()                        # (N,)
    drow = row[:, None] - row[None, :] + h - 1                     # (N, N), 0 ... 2h-2
    dcol = col[:, None] - col[None, :] + w - 1                     # (N, N), 0 ... 2w-2
    patches = (2 * h - 1) * (2 * w - 1)
    index = torch.full((1 + h * w, 1 + h * w), patches + 2)
    index[0, 1:] = patches
    index[1:, 0] = patches + 1
    index[1:, 1:] = drow * (2 * w - 1) + dcol
    return index


def relative_position_table(config):
    """A table for relative_position_index, initially zero: ((2h-1)(2w-1) + 3, heads)."""
    h, w = config.grid
    return nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1) + 3, config.heads))


def truncated_normal_(tensor, std):
    """Fill with N(0, std^2) cut at +-1 std, by inverse-CDF sampling: 20 times as fast as torch.nn.init."""
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
        q, k, v = self.queries_keys_values(x)
        if position_bias is not None:
            position_bias = position_bias.to(q.dtype)              # (1, heads, T, T)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=position_bias)
        return self.proj(x.transpose(1, 2).flatten(2))             # (B, heads, T, D/heads) -> (B, T, D)

    def weights(self, x, position_bias=None):
        """The softmax inside forward's fused kernel: (B, heads, T, T), rows sum to 1."""
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
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
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
        weight matrices, [S], [M], E_pos      normal, std init_std, cut at +-1 std (the cut: released code);
                                              heads have std 0.02, or less
        attn.proj and mlp.fc2 of block l      the same, divided by sqrt(2 l), l from 1
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
            self.rel_pos_bias = nn.Module()                        # for the released parameter name
            self.rel_pos_bias.relative_position_bias_table = relative_position_table(config)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.checkpoint_blocks = False    # recompute blocks in the backward pass: slower, in less memory
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

        Equal to what forward computes, position bias included. IndexError for a missing layer.
        """
        layer = range(len(self.blocks))[layer]                     # -1 is the last
        x = self.add_cls_and_positions(self.embed_patches(images))
        x = [x, *self.run_blocks(x)][layer]                        # what that block sees
        block = self.blocks[layer]
        return block.attn.weights(block.norm1(x), self.position_biases()[layer])

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
        """For each block an additive attention bias, (1, heads, 1+N, 1+N); None with absolute positions."""
        if self.config.position == "absolute":
            return [None] * len(self.blocks)
        if self.config.position == "relative":
            return [self.look_up(block.attn.relative_position_bias_table) for block in self.blocks]
        return [self.look_up(self.rel_pos_bias.relative_position_bias_table)] * len(self.blocks)

    def look_up(self, table):
        return table[self.relative_position_index].permute(2, 0, 1)[None]    # (1, heads, 1+N, 1+N)

    def patch_pixels(self, images):
        """Normalised pixels of each patch, targets of Table 4: (B, C, H, W) -> (B, h, w, C P P)."""
        pixels = (images - self.pixel_mean) / self.pixel_std
        return F.pixel_unshuffle(pixels, self.config.patch_size).permute(0, 2, 3, 1)

    def unpatch_pixels(self, patches):
        """The inverse of patch_pixels, clamped to [0, 1]."""
        pixels = F.pixel_shuffle(patches.permute(0, 3, 1, 2), self.config.patch_size)
        return (pixels * self.pixel_std + self.pixel_mean).clamp(0, 1)


class MaskedImageModel(VisionTransformer):
    """p(z' | x^M) = softmax(W_c h_i + b_c) over the visual tokens at the masked patches (sec. 2.3)."""

    def __init__(self, config, vocab_size=8192):
        super().__init__(config)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim))    # e_[M]
        self.lm_head = nn.Linear(config.dim, vocab_size)
        truncated_normal_(self.mask_token, config.init_std)
        truncated_normal_(self.lm_head.weight, 0.02)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, images, mask, places=None):
        """images (B, C, H, W) in [0, 1]; mask (B, h, w) bool, True = replaced by e_[M].

        places: where to predict, int64 (M,) indices into B h w; None: the masked places. Returns logits
        (M, V) in this order; the head is computed at these places only.
        """
        expected = (len(images), *self.config.grid)
        check(mask.shape == expected and mask.dtype == torch.bool,
              f"mask is {mask.dtype} {tuple(mask.shape)}, the model takes torch.bool {expected}")
        x = self.embed_patches(images)                             # (B, N, D)
        x = torch.where(mask.flatten(1)[..., None], self.mask_token.to(x.dtype), x)    # before E_pos is added
        h = self.norm(self.run_blocks(self.add_cls_and_positions(x))[-1])[:, 1:]   # (B, N, D), without [S]
        if places is None:
            places = mask.flatten().nonzero()[:, 0]
        return self.lm_head(h.flatten(0, 1)[places])               # (M, D) -> (M, V)


class ImageClassifier(VisionTransformer):
    """softmax(W_c mean_i h_i + b_c): average pooling of the patches, not [S], then a linear layer (sec. 2.6).

    As released: fc_norm of the average in place of norm of the tokens, initial head weights times 0.001.
    """

    def __init__(self, config, num_classes):
        super().__init__(config)
        self.norm = nn.Identity()                                  # fc_norm takes its place
        self.fc_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, num_classes)
        truncated_normal_(self.head.weight, 0.02 * 0.001)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """images (B, C, H, W) in [0, 1]. Returns logits (B, classes)."""
        h = super().forward(images)[:, 1:]                         # (B, N, D), without [S]
        return self.head(self.fc_norm(h.mean(dim=1)))


class SemanticSegmenter(VisionTransformer):
    """A class for each pixel: deconvolutions from the patches' H_L to full resolution (sec. 2.6).

    For each factor of 2 in the patch size: 2x2 transposed convolution of stride 2, GroupNorm, GELU, of width
    decoder_dim, half of it, and so on, at least 32. Then a 1x1 convolution and bilinear resizing to H x W.
    """

    def __init__(self, config, num_classes, decoder_dim=256):
        super().__init__(config)
        layers, width, factor = [], config.dim, 1
        while config.patch_size % (2 * factor) == 0:
            wider, width = width, max(32, decoder_dim // factor)
            layers += [nn.ConvTranspose2d(wider, width, 2, stride=2), nn.GroupNorm(1, width), nn.GELU()]
            factor *= 2
        self.decoder = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, images):
        """images (B, C, H, W) in [0, 1]. Returns logits (B, classes, H, W)."""
        h = super().forward(images)[:, 1:]                         # (B, N, D), without [S]
        h = h.transpose(1, 2).unflatten(2, self.config.grid)       # (B, D, h, w)
        logits = self.head(self.decoder(h))                        # (B, classes, h 2^k, w 2^k)
        if logits.shape[-2:] == images.shape[-2:]:
            return logits
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear")


def resize_positions(state_dict, config, grid=None):
    """A copy of state_dict with E_pos and relative-position tables resized bicubically to the grid of config.

    grid (h, w): the old one; None: that of config if the sizes fit, else a square. Rows of [S] are kept.
    ValueError for sizes that fit no grid.
    """
    resized = dict(state_dict)
    for name, value in state_dict.items():
        if name == "pos_embed":
            patches = resize_rows(value[0, 1:], grid, config.grid)
            resized[name] = torch.cat([value[:, :1], patches[None]], dim=1)
        elif name.endswith("relative_position_bias_table"):
            new = tuple(2 * side - 1 for side in config.grid)          # offsets along each axis
            old = tuple(2 * side - 1 for side in grid) if grid else None
            resized[name] = torch.cat([resize_rows(value[:-3], old, new), value[-3:]])
    return resized


def resize_rows(rows, old, new):
    """(h w, D) on the grid old -> (h' w', D) on the grid new."""
    if old is None:
        old = new if len(rows) == math.prod(new) else (math.isqrt(len(rows)),) * 2
    check(len(rows) and len(rows) == math.prod(old), f"{len(rows)} positions do not fit {old[0]}x{old[1]}")
    if tuple(old) == tuple(new):
        return rows
    grid = rows.float().t().unflatten(1, old)[None]                # (1, D, h, w)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return grid[0].flatten(1).t().to(rows.dtype)


def ignore_index_buffers(module, state_dict, *_):
    """Released checkpoints hold relative_position_index, which follows from the config."""
    for key in [key for key in state_dict if key.endswith("relative_position_index")]:
        del state_dict[key]
