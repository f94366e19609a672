"""The backbone of sec. 2.2, a Vision Transformer, and its three models: the masked image model of sec. 2.3, the classifier
and the segmenter of sec. 2.6.

B images, C channels, H W pixels; h w patches, N = h w; D width. Images are float in [0, 1]; the model normalises them.
Parameter names are those of the released checkpoints.
"""
import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViTConfig:
    """Vision Transformer"""
    image_size: int | tuple[int, int] = 224    # pixels a side of the images that the transformer sees
    patch_size: int = 16    # pixels a side of a patch; must divide the image
    in_channels: int = 3
    dim: int = 768    # width D: 768 base, 1024 large (sec. 2.2)
    depth: int = 12    # blocks L: 12 base, 24 large
    heads: int = 12    # attention heads: 12 base, 16 large; must divide the width
    mlp_ratio: float = 4.0    # hidden width of the FFN over D
    position: Literal["absolute", "relative", "shared_relative"] = "absolute"    # paper: absolute; released code: shared_relative to pre-train, relative (a table per block) to fine-tune
    layer_scale: float = 0.0    # initial gamma_1 and gamma_2, 0 = none (paper); released code: 0.1 base, 1e-5 large
    drop_path: float = 0.1    # stochastic depth of the last block, rising linearly from 0 in the first
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN    # red, green, blue; released ImageNet-22K checkpoints: 0.5 0.5 0.5
    pixel_std: tuple[float, float, float] = IMAGENET_STD    # likewise; released ImageNet-22K checkpoints: 0.5 0.5 0.5
    init_std: float = 0.02    # of initial weights (sec. 2.5); 0.02 sqrt(768 / dim) keeps at another width what base starts from

    def __post_init__(self):
        for name in ("patch_size", "in_channels", "dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: at least 1, not {getattr(self, name)}")
        if min(self.image_hw) < self.patch_size or any(side % self.patch_size for side in self.image_hw):
            raise ValueError(f"patch_size: {self.patch_size} does not divide image_size {self.image_size}")
        if self.dim % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide dim {self.dim}")
        if self.position not in ("absolute", "relative", "shared_relative"):
            raise ValueError(f"position: absolute, relative or shared_relative, not {self.position}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: from 0 to below 1, not {self.drop_path}")
        if self.layer_scale < 0:
            raise ValueError(f"layer_scale: 0 (none) or above, not {self.layer_scale}")
        if not 0 < self.init_std < math.inf:
            raise ValueError(f"init_std: above 0, not {self.init_std}")
        if not self.mlp_ratio * self.dim >= 1:
            raise ValueError(f"mlp_ratio: large enough for one hidden unit at dim {self.dim}, not {self.mlp_ratio}")
        if not all(0 < std for std in self.pixel_std):
            raise ValueError(f"pixel_std: three numbers above 0, not {self.pixel_std}")

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
        """These fields alone: a script's config has more."""
        return ViTConfig(**{field.name: getattr(self, field.name) for field in fields(ViTConfig)})


# As in the paper. The released checkpoints differ in position="shared_relative", layer_scale=0.1 (base) or 1e-5 (large)
# and, those pre-trained on ImageNet-22K, in pixel_mean = pixel_std = (0.5, 0.5, 0.5).
PRESETS = {
    "tiny": ViTConfig(dim=192, heads=3),
    "small": ViTConfig(dim=384, heads=6),
    "base": ViTConfig(),
    "large": ViTConfig(dim=1024, depth=24, heads=16),
}


def relative_position_index(grid):
    """Which row of the relative-position-bias table each pair (query, key) of tokens reads.

    grid (h, w). Returns int64 (1+N, 1+N) for a table of (2h-1)(2w-1) + 3 rows: patch i to patch j reads row
    (drow + h - 1)(2w - 1) + (dcol + w - 1), with (drow, dcol) the place of i less that of j; the last three rows are
    [S] -> patch, patch -> [S] and [S] -> [S].
    """
    h, w = grid
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    row, col = row.flatten(), col.flatten()                            # (N,) each
    drow = row[:, None] - row[None, :] + h - 1                         # (N, N), from 0 to 2h - 2
    dcol = col[:, None] - col[None, :] + w - 1
    last = (2 * h - 1) * (2 * w - 1)
    index = torch.empty(1 + h * w, 1 + h * w, dtype=torch.int64)
    index[1:, 1:] = drow * (2 * w - 1) + dcol
    index[0, 1:] = last
    index[1:, 0] = last + 1
    index[0, 0] = last + 2
    return index


def relative_position_table(config):
    """The bias table that relative_position_index points into, a parameter of ((2h-1)(2w-1) + 3, heads), zero at first."""
    rows = (2 * config.grid[0] - 1) * (2 * config.grid[1] - 1) + 3
    return nn.Parameter(torch.zeros(rows, config.heads))


def drop_path(x, rate, training):
    """Stochastic depth: zero the residual of a whole sample with probability rate, and scale the others by 1 / (1 - rate)."""
    if rate == 0 or not training:
        return x
    keep = torch.empty(len(x), 1, 1, device=x.device).bernoulli_(1 - rate) / (1 - rate)
    return x * keep.to(x.dtype)


@torch.no_grad()
def truncated_normal_(tensor, std):
    """Fill with draws from N(0, std^2) cut at +-std, in place: the inverse of its distribution function, of uniform draws. In
    torch.nn.init the same takes twenty times as long, 15 s for base."""
    within = math.erf(math.sqrt(0.5))                                  # share of a normal distribution that is within one std
    return tensor.uniform_(-within, within).erfinv_().mul_(std * math.sqrt(2))


class PatchEmbed(nn.Module):
    """Linear projection of flattened P x P patches, E x^p in sec. 2.2: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.dim, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)            # (B, D, h, w) -> (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention with an additive position bias. Keys have no bias, as in the released code: the softmax
    over keys would cancel it."""

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
        B, T, D = x.shape                                              # T = 1 + N tokens
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(B, T, 3, self.heads, D // self.heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)                    # three of (B, heads, T, D/heads)

    def forward(self, x, position_bias=None):
        q, k, v = self.queries_keys_values(x)
        if position_bias is not None:
            position_bias = position_bias.to(q.dtype)                  # (1, heads, T, T)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=position_bias)
        return self.proj(x.transpose(1, 2).flatten(2))                 # (B, heads, T, D/heads) -> (B, T, D)

    def weights(self, x, position_bias=None):
        """The softmax that forward applies to the values and never shows: (B, heads, T, T), rows sum to 1."""
        q, k, _ = self.queries_keys_values(x)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if position_bias is not None:
            scores = scores + position_bias
        return scores.softmax(dim=-1)


class Mlp(nn.Module):
    """The FFN: two linear layers with the exact GELU between."""

    def __init__(self, config):
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.dim, hidden)
        self.fc2 = nn.Linear(hidden, config.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block. Each of its two residuals can be scaled per channel (layer scale, gamma) and dropped
    per sample (stochastic depth)."""

    def __init__(self, config, drop_path_rate):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = Mlp(config)
        for name in ("gamma_1", "gamma_2"):
            gamma = nn.Parameter(torch.full((config.dim,), float(config.layer_scale))) if config.layer_scale else None
            self.register_parameter(name, gamma)

    def forward(self, x, position_bias=None):
        x = x + self.residual(self.attn(self.norm1(x), position_bias), self.gamma_1)
        x = x + self.residual(self.mlp(self.norm2(x)), self.gamma_2)
        return x

    def residual(self, y, gamma):
        return drop_path(y if gamma is None else gamma * y, self.drop_path_rate, self.training)


class VisionTransformer(nn.Module):
    """H_0 = [e_[S], E x^p_1, ..., E x^p_N] + E_pos, then L blocks (sec. 2.2).

    Initialisation (sec. 2.5)
        all weight matrices, [S], [M], E_pos    normal, std init_std = 0.02, cut at +-1 std (the cut is the released code's)
        attn.proj and mlp.fc2 of block l        the same, divided by sqrt(2 l), l from 1
        biases, relative-position tables        0
        LayerNorm                               weight 1, bias 0
        gamma_1, gamma_2                        config.layer_scale
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        h, w = config.grid
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        if config.position == "absolute":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + h * w, config.dim))
        else:
            self.register_buffer("relative_position_index", relative_position_index(config.grid), persistent=False)
        if config.position == "shared_relative":
            self.rel_pos_bias = nn.Module()
            self.rel_pos_bias.relative_position_bias_table = relative_position_table(config)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, torch.tensor(getattr(config, name)).view(1, -1, 1, 1), persistent=False)
        self.checkpoint_blocks = False              # compute each block again in the backward pass rather than keep its activations
        self.register_load_state_dict_pre_hook(_ignore_index_buffers)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not name.endswith("relative_position_bias_table"):
                truncated_normal_(parameter, self.config.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for layer, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight /= math.sqrt(2 * layer)
            block.mlp.fc2.weight /= math.sqrt(2 * layer)

    def forward(self, images, mask=None):
        """images (B, C, H, W) in [0, 1]; mask (B, h, w) bool, True = replaced by e_[M]. Returns H_L, normed: (B, 1+N, D)."""
        return self.norm(self.last_hidden_state(images, mask))

    def last_hidden_state(self, images, mask=None):
        """The output of the last block, before the final norm: (B, 1+N, D)."""
        x = self.embed(images, mask)
        for block, bias in zip(self.blocks, self.position_biases()):
            x = checkpoint(block, x, bias, use_reentrant=False) if self.checkpoint_blocks and self.training else block(x, bias)
        return x

    def embed(self, images, mask=None):
        """H_0: (B, 1+N, D)."""
        if images.shape[1:] != (self.config.in_channels, *self.config.image_hw):
            raise ValueError(f"images are {tuple(images.shape)}, the model takes (B, {self.config.in_channels}, "
                             f"{self.config.image_hw[0]}, {self.config.image_hw[1]})")
        x = self.patch_embed((images - self.pixel_mean) / self.pixel_std)
        if mask is not None:
            if mask.shape != (len(images), *self.config.grid) or mask.dtype != torch.bool:
                raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, the model takes torch.bool "
                                 f"({len(images)}, {self.config.grid[0]}, {self.config.grid[1]})")
            x = torch.where(mask.flatten(1)[..., None], self.mask_token.to(x.dtype), x)    # (B, N, 1) chooses e_[M]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)                   # (B, 1+N, D)
        return x + self.pos_embed if self.config.position == "absolute" else x

    def position_biases(self):
        """One additive attention bias per block, (1, heads, 1+N, 1+N), or None where positions are absolute."""
        if self.config.position == "absolute":
            return [None] * len(self.blocks)
        if self.config.position == "shared_relative":
            return [self._bias(self.rel_pos_bias.relative_position_bias_table)] * len(self.blocks)
        return [self._bias(block.attn.relative_position_bias_table) for block in self.blocks]

    def _bias(self, table):
        return table[self.relative_position_index].permute(2, 0, 1)[None]                  # (1+N, 1+N, heads) -> (1, heads, 1+N, 1+N)

    def hidden_states(self, images, mask=None):
        """The output of each block, before the final norm: a list of depth tensors (B, 1+N, D)."""
        x, states = self.embed(images, mask), []
        for block, bias in zip(self.blocks, self.position_biases()):
            x = block(x, bias)
            states.append(x)
        return states

    def attention_maps(self, images, layer=-1, mask=None):
        """Softmax attention of one block, (B, heads, 1+N, 1+N): row = query, token 0 = [S], the patches follow row by row.

        Equal to what forward computes and does not show, position bias included. IndexError for a layer that is not there.
        """
        layer = range(len(self.blocks))[layer]
        x, biases = self.embed(images, mask), self.position_biases()
        for block, bias in zip(self.blocks[:layer], biases):
            x = block(x, bias)
        return self.blocks[layer].attn.weights(self.blocks[layer].norm1(x), biases[layer])


class MaskedImageModel(VisionTransformer):
    """p(z' | x^M) = softmax(W_c h_i + b_c) over the visual tokens, at the masked patches (sec. 2.3)."""

    def __init__(self, config, vocab_size=8192):
        super().__init__(config)
        self.lm_head = nn.Linear(config.dim, vocab_size)
        truncated_normal_(self.lm_head.weight, 0.02)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, images, mask, predict=None):
        """images (B, C, H, W) in [0, 1]; mask (B, h, w) bool, True = hidden from the model.

        Returns logits (M, V) of the M places where predict (B, h, w) is True, row by row, image by image, the order of
        tokens[predict]. predict=None predicts the masked places, and only there is the head computed. predict may also be the
        places themselves, int64 (M,) into B h w: their number is known without waiting for a GPU, and compiles to one graph.
        """
        h = super().forward(images, mask)[:, 1:].flatten(0, 1)         # (B N, D), without [S]
        predict = mask if predict is None else predict
        places = predict.flatten().nonzero()[:, 0] if predict.dtype == torch.bool else predict
        return self.lm_head(h[places])                                 # (M, D) -> (M, V)


class ImageClassifier(VisionTransformer):
    """softmax(W_c mean_i h_i + b_c) over classes: average pooling of the patches' H_L, not [S], and a linear layer (sec. 2.6).

    As released: fc_norm on the average takes the place of norm on the tokens, and the head starts 1000 times smaller.
    """

    def __init__(self, config, num_classes):
        super().__init__(config)
        self.norm = nn.Identity()
        self.mask_token.requires_grad_(False)       # nothing is masked from here on
        self.fc_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, num_classes)
        self.reset_head()

    @torch.no_grad()
    def reset_head(self):
        truncated_normal_(self.head.weight, 0.02)
        self.head.weight *= 0.001
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """images (B, C, H, W) in [0, 1]. Returns logits (B, classes)."""
        h = super().forward(images)[:, 1:]                             # (B, N, D), without [S]
        return self.head(self.fc_norm(h.mean(dim=1)))


class SemanticSegmenter(VisionTransformer):
    """A class for every pixel: deconvolutions from the patches' H_L to full resolution (sec. 2.6).

    As many steps as the patch size has factors of 2, each doubling the resolution: a 2x2 transposed convolution with stride
    2, group norm, GELU. Their width falls from decoder_dim by half a step, to no less than 32; a 1x1 convolution follows. A
    patch size with other factors is made up by bilinear interpolation of the logits.
    """

    def __init__(self, config, num_classes, decoder_dim=256):
        super().__init__(config)
        self.mask_token.requires_grad_(False)
        steps = (config.patch_size & -config.patch_size).bit_length() - 1
        layers, width = [], config.dim
        for step in range(steps):
            wider, width = width, max(32, decoder_dim // 2 ** step)
            layers += [nn.ConvTranspose2d(wider, width, kernel_size=2, stride=2), nn.GroupNorm(1, width), nn.GELU()]
        self.decoder = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, images):
        """images (B, C, H, W) in [0, 1]. Returns logits (B, classes, H, W)."""
        h = super().forward(images)[:, 1:]                             # (B, N, D), without [S]
        h = h.transpose(1, 2).unflatten(2, self.config.grid)           # (B, D, h, w)
        logits = self.head(self.decoder(h))                            # (B, classes, h 2^k, w 2^k)
        if logits.shape[-2:] == images.shape[-2:]:
            return logits
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------------------------------------------------
# Other image sizes
# ---------------------------------------------------------------------------------------------------------------------

def resize_positions(state_dict, config, grid=None):
    """The state_dict with E_pos and relative-position tables resized, bicubically, to the patch grid of config.

    grid (h, w) is the one that they belong to; without it, config's own where the sizes say so, else a square one. The rows
    of [S] stay as they are, a constant stays constant, and what has the right size already is not touched. Returns a new
    dict. ValueError where a size fits no grid.
    """
    resized = dict(state_dict)
    for name, value in state_dict.items():
        if name == "pos_embed":
            old = grid or _grid_of(value.shape[1] - 1, config.grid, name)
            resized[name] = torch.cat([value[:, :1], _resize(value[0, 1:], old, config.grid)[None]], dim=1)
        elif name.endswith("relative_position_bias_table"):
            new = tuple(2 * side - 1 for side in config.grid)          # as many offsets as there are along each axis
            old = tuple(2 * side - 1 for side in grid) if grid else _grid_of(len(value) - 3, new, name)
            resized[name] = torch.cat([_resize(value[:-3], old, new), value[-3:]])
    return resized


def _grid_of(count, wanted, name):
    """The (rows, columns) of so many places: the wanted ones, else a square."""
    if count == math.prod(wanted):
        return wanted
    side = math.isqrt(max(0, count))
    if side * side != count or not count:
        raise ValueError(f"{name} has {count} places: neither a square nor {wanted[0]}x{wanted[1]}")
    return side, side


def _resize(rows, old, new):
    """(h w, D) on the grid old -> (h' w', D) on the grid new."""
    if len(rows) != math.prod(old):
        raise ValueError(f"positions for {len(rows)} places do not belong to a grid of {old[0]}x{old[1]}")
    if tuple(old) == tuple(new):
        return rows
    grid = rows.float().t().unflatten(1, old)[None]                    # (1, D, h, w)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=True)
    return grid[0].flatten(1).t().to(rows.dtype)


def _ignore_index_buffers(module, state_dict, *_):
    """The released checkpoints store the index tables; here they follow from the config."""
    for key in [key for key in state_dict if key.endswith("relative_position_index")]:
        del state_dict[key]
