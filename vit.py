"""The Vision Transformer (sec. 2.2) and its models: masked image model (2.3), classifier and segmenter (2.6).

Parameters are named as in the released checkpoints. Images are (B, 3, H, W) in [0, 1]; the models normalise
them. A grid of h x w patches, N = h w, width D.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # red, green, blue
POSITIONS = ("absolute", "relative", "shared_relative")    # the paper's; a bias table per block; one for all


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and variants of the backbone. Raises ValueError("field: must be ...") for wrong values."""
    image_size: int | tuple[int, int] = 224    # pixels per side, or (height, width)
    patch_size: int = 16
    dim: int = 768                             # width D
    depth: int = 12                            # blocks L
    heads: int = 12
    mlp_ratio: float = 4.0                     # hidden width of the FFN / D
    layer_norm_eps: float = 1e-6
    position: str = "absolute"                 # one of POSITIONS
    layer_scale: float = 0.0                   # initial gamma, 0 = none (paper)
    drop_path: float = 0.1                     # stochastic depth; rises linearly from 0 in the first block
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    init_std: float = 0.02                     # of initial weights (sec. 2.5)

    def __post_init__(self):
        def check(ok, name, expected):
            if not ok:
                raise ValueError(f"{name}: must be {expected}, got {getattr(self, name)}")

        for name in ("patch_size", "dim", "depth", "heads", "mlp_ratio", "layer_norm_eps", "init_std"):
            check(0 < getattr(self, name) < math.inf, name, "above 0")
        H, W = self.image_hw
        check(min(H, W) > 0 and H % self.patch_size == W % self.patch_size == 0, "patch_size",
              f"a divisor of image_size {self.image_size}")
        check(self.dim % self.heads == 0, "heads", f"a divisor of dim {self.dim}")
        check(self.position in POSITIONS, "position", f"one of {', '.join(POSITIONS)}")
        check(0 <= self.drop_path < 1, "drop_path", "from 0 to below 1")
        check(0 <= self.layer_scale < math.inf, "layer_scale", "0 (none) or above")
        check(all(map(math.isfinite, self.pixel_mean)), "pixel_mean", "finite numbers")
        check(all(0 < std < math.inf for std in self.pixel_std), "pixel_std", "above 0")

    @property
    def image_hw(self):
        """(H, W) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid(self):
        """(h, w), the patch grid."""
        return self.image_hw[0] // self.patch_size, self.image_hw[1] // self.patch_size


# Base and large are the paper's (sec. 2.2). The released code adds position="shared_relative" and
# layer_scale=0.1, for large 1e-5.
SIZES = {
    "tiny": dict(dim=192, depth=12, heads=3),
    "small": dict(dim=384, depth=12, heads=6),
    "base": dict(dim=768, depth=12, heads=12),
    "large": dict(dim=1024, depth=24, heads=16),
}
PRESETS = {name: ViTConfig(**size) for name, size in SIZES.items()}


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
    """Linear projection of flattened P x P patches, E x^p in sec. 2.2: (B, 3, H, W) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)

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
        hidden = round(config.dim * config.mlp_ratio)
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

    Initial weights of the backbone (sec. 2.5); each head initialises its own.
        weight matrices, [S], E_pos           normal, std init_std, cut at +-1 std as in the released code
        attn.proj and mlp.fc2 of block l      the same, divided by sqrt(2 l), l from 1
        biases, relative-position tables      0
        LayerNorm                             weight 1, bias 0
        gamma_1, gamma_2                      layer_scale
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        for name, values in (("pixel_mean", config.pixel_mean), ("pixel_std", config.pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))    # e_[S]
        self.patch_embed = PatchEmbed(config)
        if config.position == "absolute":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(config.grid), config.dim))
        else:
            index = relative_position_index(config.grid)
            self.register_buffer("relative_position_index", index, persistent=False)
        if config.position == "shared_relative":
            self.rel_pos_bias = nn.Module()                        # gives the parameter its released name
            self.rel_pos_bias.relative_position_bias_table = relative_position_table(config)
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()    # per block
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.checkpoint_blocks = False                             # recompute blocks in the backward pass
        self.register_load_state_dict_pre_hook(ignore_index_buffers)
        self.initialise_backbone()

    def initialise_backbone(self):
        """Initialise the weights as described in the class docstring. A subclass then adds its head."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1 and not name.endswith("relative_position_bias_table"):
                truncated_normal_(parameter, self.config.init_std)
        for l, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight.data /= math.sqrt(2 * l)
            block.mlp.fc2.weight.data /= math.sqrt(2 * l)

    def forward(self, images):
        """images (B, 3, H, W) in [0, 1]. Returns norm(H_L), (B, 1+N, D): [S], then the patches."""
        return self.norm(self.hidden_states(images)[-1])

    def hidden_states(self, images):
        """The output of each block, before the final norm: a list of L tensors (B, 1+N, D)."""
        return self.run_blocks(self.add_cls_and_positions(self.embed_patches(images)))

    def features(self, images, layer=-1):
        """The tokens after one block, normalised by self.norm (the identity in a classifier): (B, 1+N, D).

        layer: index of the block, 0 is the first and -1 the last. Raises IndexError for others.
        """
        return self.norm(self.hidden_states(images)[layer])

    def attention_maps(self, images, layer=-1):
        """Softmax attention of one block, (B, heads, 1+N, 1+N): row = query, column = key, token 0 = [S].

        layer: as for `features`; None returns the maps of all blocks, in a list. They equal what forward
        computes in evaluation mode, position bias included.
        """
        maps = []
        x = self.add_cls_and_positions(self.embed_patches(images))
        for block, bias in zip(self.blocks, self.position_biases()):
            maps.append(block.attn.attention_weights(block.norm1(x), bias))
            x = block(x, bias)
        return maps if layer is None else maps[layer]

    def embed_patches(self, images):
        """Normalise, and project the patches: (B, 3, H, W) -> (B, N, D). Raises ValueError for other H, W."""
        expected = (3, *self.config.image_hw)
        if images.shape[1:] != expected:
            raise ValueError("expected images (B, {}, {}, {}), got {}".format(*expected, tuple(images.shape)))
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
        return bias.contiguous()                                   # fused attention requires it


class MaskedImageModel(VisionTransformer):
    """Predicts visual tokens of masked patches: p(z' | x^M) = softmax(W_c h_i + b_c) (sec. 2.3).

    Initial weights: [M] as [S]; lm_head normal with std 0.02, cut at +-1 std, bias 0.
    """

    def __init__(self, config, vocab_size=8192):
        super().__init__(config)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim))    # e_[M]
        self.lm_head = nn.Linear(config.dim, vocab_size)
        truncated_normal_(self.mask_token, config.init_std)
        truncated_normal_(self.lm_head.weight, 0.02)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, images, mask, places=None):
        """images (B, 3, H, W) in [0, 1]; mask (B, h, w) bool, True = replaced by e_[M].

        places: int64 (M,), flat indices into (B, h, w) of the patches to predict; None: the masked ones.
        Returns their logits (M, V), in the order of places. The head is computed there only.
        """
        expected = (len(images), *self.config.grid)
        if mask.shape != expected or mask.dtype != torch.bool:
            raise ValueError(f"expected a torch.bool mask {expected}, got {mask.dtype} {tuple(mask.shape)}")
        x = self.embed_patches(images)                             # (B, N, D)
        x = torch.where(mask.flatten(1)[..., None], self.mask_token.to(x.dtype), x)    # before E_pos is added
        h = self.norm(self.run_blocks(self.add_cls_and_positions(x))[-1])
        h = h[:, 1:]                                               # (B, N, D), without [S]
        if places is None:
            places = mask.flatten().nonzero()[:, 0]                # waits for a GPU; pretrain.py passes them
        return self.lm_head(h.flatten(0, 1)[places])               # (M, D) -> (M, V)

    def patch_pixels(self, images):
        """Normalised pixels, to regress in place of tokens (Table 4): (B, 3, H, W) -> (B, h, w, 3 P P)."""
        pixels = (images - self.pixel_mean) / self.pixel_std
        return F.pixel_unshuffle(pixels, self.config.patch_size).permute(0, 2, 3, 1)

    def unpatch_pixels(self, patches):
        """The inverse of patch_pixels, clamped to [0, 1]."""
        pixels = F.pixel_shuffle(patches.permute(0, 3, 1, 2), self.config.patch_size)
        return (pixels * self.pixel_std + self.pixel_mean).clamp(0, 1)


class ImageClassifier(VisionTransformer):
    """Classifies the average of the patches, not [S]: softmax(W_c mean_i h_i + b_c) (sec. 2.6).

    As in the released code, LayerNorm is applied to the average (fc_norm) and not to the tokens, and the
    initial weights of the head are scaled by 0.001.
    """

    def __init__(self, config, num_classes):
        super().__init__(config)
        self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.dim, num_classes)
        truncated_normal_(self.head.weight, 0.02 * 0.001)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """images (B, 3, H, W) in [0, 1]. Returns logits (B, classes)."""
        h = super().forward(images)[:, 1:]                         # (B, N, D), without [S]
        return self.head(self.fc_norm(h.mean(dim=1)))


class SemanticSegmenter(VisionTransformer):
    """Classifies each pixel: deconvolutions upsample the patches' norm(H_L) to pixels (sec. 2.6).

    The decoder has a level for each factor of 2 in the patch size: a transposed convolution that doubles the
    resolution, GroupNorm and GELU. The first level has decoder_dim channels, each later level half as many as
    the one before, but at least 32. A 1x1 convolution classifies. Logits are resized bilinearly to H x W.
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
        """images (B, 3, H, W) in [0, 1]. Returns logits (B, classes, H, W)."""
        h = super().forward(images)[:, 1:]                         # (B, N, D), without [S]
        h = h.transpose(1, 2).unflatten(2, self.config.grid)       # (B, D, h, w)
        logits = self.head(self.decoder(h))                        # (B, classes, h scale, w scale)
        if logits.shape[-2:] == images.shape[-2:]:
            return logits
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear")


def ignore_index_buffers(module, state_dict, *_):
    """Before loading, delete relative_position_index of released checkpoints: it follows from the config."""
    for key in [key for key in state_dict if key.endswith("relative_position_index")]:
        del state_dict[key]
