"""The image tokenizer: a discrete VAE with the architecture, parameter names and objective of DALL-E's.

Images x are (B, 3, H, W) in [0, 1]. Visual tokens z are (B, h, w), indices into a codebook of V codes, with
H = h * 2 ** (groups - 1). The encoder is q(z | x), the decoder p(x | z). train_dvae.py trains them.
"""
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

PIXEL_EPS = 0.1    # pixels are mapped into [eps, 1 - eps], where logit-Laplace has support
CODE_DIM = 128     # width of a code, the decoder's n_init


def map_pixels(images):
    """[0, 1] -> [eps, 1 - eps]."""
    return (1 - 2 * PIXEL_EPS) * images + PIXEL_EPS


def unmap_pixels(images):
    """The inverse of map_pixels, clamped to [0, 1]."""
    return ((images - PIXEL_EPS) / (1 - 2 * PIXEL_EPS)).clamp(0, 1)


def logit_laplace_nll(x, mu, log_b):
    """-ln f(x | mu, b), f = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)), x in (0, 1). Elementwise, nats."""
    return math.log(2) + log_b + torch.log(x * (1 - x)) + (torch.logit(x) - mu).abs() * torch.exp(-log_b)


class Conv2d(nn.Module):
    """A convolution that keeps the size. Initial weights: normal with std 1 / sqrt(fan_in), bias 0."""

    def __init__(self, n_in, n_out, kernel):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel) / math.sqrt(n_in * kernel ** 2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class ResBlock(nn.Module):
    """identity + post_gain * residual path of four convolutions with these kernel sizes."""

    def __init__(self, n_in, n_out, kernels, post_gain):
        super().__init__()
        self.post_gain = post_gain
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = [n_in] + 3 * [n_out // 4] + [n_out]
        layers = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x):
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.post_gain)


class Stack(nn.Module):
    """The layers of the encoder or the decoder, as .blocks: input, group_1, group_2 and so on, output.

    A group is residual blocks of one width, followed by a resampling, except in the last group.

    input_conv   first convolution
    widths       width of each group
    kernels      kernel sizes of the four convolutions in a residual block
    resample     module between groups: halves or doubles the resolution
    n_out        channels of the output
    """

    def __init__(self, *, input_conv, widths, blocks_per_group, kernels, resample, n_out):
        super().__init__()
        post_gain = 1 / (len(widths) * blocks_per_group) ** 2
        blocks = OrderedDict(input=input_conv)
        n_in = len(input_conv.b)                                       # channels of the next layer's input
        for g, width in enumerate(widths):
            group = OrderedDict()
            for b in range(blocks_per_group):
                group[f"block_{b + 1}"] = ResBlock(n_in, width, kernels, post_gain)
                n_in = width
            if g < len(widths) - 1:
                group["resample"] = resample
            blocks[f"group_{g + 1}"] = nn.Sequential(group)
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(n_in, n_out, 1)))
        self.blocks = nn.Sequential(blocks)


def gumbel_noise(logits):
    """Gumbel noise -ln(-ln u), u uniform in [0, 1). F.gumbel_softmax takes five times as long to draw it."""
    return torch.rand_like(logits).log_().neg_().log_().neg_()


class DVAEOutput(NamedTuple):
    """The two terms of -ELBO (Eq. 2 with a uniform prior), and the reconstruction.

    -ELBO per pixel channel is nll + kl / (pixel channels per token). That divisor is 192 in DALL-E.
    """
    nll: torch.Tensor       # scalar: -ln p(x | z) in nats, mean over pixel channels
    kl: torch.Tensor        # scalar: KL(q(z | x) || uniform) in nats, mean over tokens
    images: torch.Tensor    # (B, 3, H, W) in [0, 1]


class DiscreteVAE(nn.Module):
    """Encoder q(z | x), codebook of V codes, decoder p(x | z). H = h * downsample."""

    def __init__(self, vocab_size=8192, hidden=256, groups=4, blocks_per_group=2):
        super().__init__()
        if vocab_size < 2 or hidden < 4 or groups < 1 or blocks_per_group < 1:
            raise ValueError("vocab_size must be at least 2, hidden 4, groups 1 and blocks_per_group 1, "
                             f"not {vocab_size}, {hidden}, {groups} and {blocks_per_group}")
        self.config = dict(vocab_size=vocab_size, hidden=hidden, groups=groups,
                           blocks_per_group=blocks_per_group)
        self.vocab_size, self.downsample = vocab_size, 2 ** (groups - 1)
        self.image_size = None                                         # pixels per side in training, if known
        widths = [hidden * 2 ** g for g in range(groups)]
        self.encoder = Stack(input_conv=Conv2d(3, hidden, 7), widths=widths, kernels=(3, 3, 3, 1),
                             blocks_per_group=blocks_per_group, resample=nn.MaxPool2d(2), n_out=vocab_size)
        self.decoder = Stack(input_conv=Conv2d(vocab_size, CODE_DIM, 1), widths=widths[::-1],
                             kernels=(1, 3, 3, 3), blocks_per_group=blocks_per_group,
                             resample=nn.Upsample(scale_factor=2), n_out=2 * 3)    # mu, ln b of 3 colours

    def forward(self, images, temperature):
        """The terms of -ELBO (Eq. 2), with z relaxed to a Gumbel-softmax sample of temperature tau.

        In evaluation mode z is softmax(logits / tau), without noise.
        """
        logits = self.encode(images).float().permute(0, 2, 3, 1)       # (B, h, w, V), of q(z | x)
        if self.training:
            z = ((logits + gumbel_noise(logits)) / temperature).softmax(dim=-1)    # relaxed one-hot codes
        else:
            z = (logits / temperature).softmax(dim=-1)
        codebook = self.decoder.blocks.input                           # a 1x1 convolution from V channels
        codes = F.linear(z, codebook.w.flatten(1), codebook.b)         # (B, h, w, CODE_DIM)
        reconstruction, mu, log_b = self.decode_codes(codes)
        nll = logit_laplace_nll(map_pixels(images), mu, log_b)         # -ln p(x | z)
        q, log_q = logits.softmax(dim=-1), logits.log_softmax(dim=-1)
        kl = math.log(self.vocab_size) + (q * log_q).sum(dim=-1)       # KL(q || uniform) = ln V - H(q)
        return DVAEOutput(nll.mean(), kl.mean(), reconstruction)

    def forward_features(self, images):
        """The input of the encoder's last convolution, (B, width, h, w). H and W: multiples of downsample."""
        H, W = images.shape[-2:]
        if H % self.downsample or W % self.downsample:
            raise ValueError(f"image sides {H}, {W} must be multiples of {self.downsample}")
        features = self.encoder.blocks[:-1](map_pixels(images).to(memory_format=torch.channels_last))
        return F.relu(features)                                        # blocks.output is ReLU, convolution

    def encode(self, images):
        """Logits of q(z | x): (B, V, h, w)."""
        return self.encoder.blocks.output.conv(self.forward_features(images))

    @torch.no_grad()
    def tokenize(self, images, places=None):
        """The tokens z = argmax q(z | x), without noise (sec. 2.4): (B, h, w) int64.

        places: int64 (M,), flat indices into (B, h, w): only these tokens are computed and returned, (M,).
        The last convolution and the argmax are in fp32, without autocast and TF32, because the two largest
        logits are often nearly equal.
        """
        features = self.forward_features(images)                       # (B, width, h, w)
        if places is not None:
            chosen = features.permute(0, 2, 3, 1).flatten(0, 2)[places]    # (M, width)
            features = chosen.t()[None, :, None]                       # (1, width, 1, M): one image of 1 x M
        without_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), without_tf32:
            tokens = self.encoder.blocks.output.conv(features.float()).argmax(dim=1)
        return tokens if places is None else tokens.flatten()

    @torch.no_grad()
    def decode(self, tokens):
        """Images (B, 3, H, W) in [0, 1] from tokens (B, h, w). Raises ValueError without a decoder."""
        if self.decoder is None:
            raise ValueError("this tokenizer has no decoder: there was no decoder.pkl next to encoder.pkl")
        codebook = self.decoder.blocks.input
        return self.decode_codes(F.embedding(tokens, codebook.w.flatten(1).t()) + codebook.b)[0]

    def decode_codes(self, codes):
        """codes (B, h, w, CODE_DIM) -> (images in [0, 1], mu, ln b), each (B, 3, H, W)."""
        mu, log_b = self.decoder.blocks[1:](codes.permute(0, 3, 1, 2)).float().chunk(2, dim=1)
        return unmap_pixels(torch.sigmoid(mu)), mu, log_b
