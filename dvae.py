"""The image tokenizer: a discrete VAE with the architecture, parameter names and objective of DALL-E's (arXiv 2102.12092).

`python dvae.py` trains one. B images, C channels, H W pixels; h w the token grid, 2 ** (groups - 1) times smaller; V codes.

What keeps a codebook alive in few steps, measured on Fashion-MNIST (32 pixels, an 8x8 grid, 2,048 codes, batches of 8; a table
is in the README):
- Placing the codes on patches, initialise_codes: before the first step all codes but five are in use, perplexity 1,536.
- A slow encoder, --encoder-lr. Codes are places in feature space; at the decoder's learning rate the features leave them, and
  after 40 steps the perplexity is 78. At a tenth of it, 900. Slower codes alone, sharper codes, a lower first temperature or
  more KL from the start do not help. After 1,000 steps the slow encoder also has the smaller error.
- A fast decoder, which then has all to learn: with twice the learning rate, a sixth less error.
- The KL weight matters little once this holds: with 0.1 and with 0.5, the same error and perplexities of 372 and 402. At the
  decoder's rate, 0.1 leaves 39 codes in use and 2 leaves 187.
- Putting dead codes beside busy ones every 20 steps did harm: it shifts the odds of the others, and the error doubled.
"""
import math
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import data
import training

PIXEL_EPS = 0.1       # pixels are squeezed into [eps, 1 - eps], where logit-Laplace has support
CODE_DIM = 128        # n_init, the width of a code in the decoder


def map_pixels(images):
    """[0, 1] -> [eps, 1 - eps]."""
    return (1 - 2 * PIXEL_EPS) * images + PIXEL_EPS


def unmap_pixels(images):
    """The inverse of map_pixels, cut to [0, 1]."""
    return ((images - PIXEL_EPS) / (1 - 2 * PIXEL_EPS)).clamp(0, 1)


def logit_laplace_nll(x, mu, log_b):
    """-ln f(x | mu, b), f = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)); x in (0, 1). Elementwise, in nats."""
    return math.log(2) + log_b + torch.log(x * (1 - x)) + (torch.logit(x) - mu).abs() * torch.exp(-log_b)


NEAR = 16             # codes that are compared in fp32 where the features are fp16: the best was among them in 6,400 of 6,400 places
CHUNK = {"cpu": 2 ** 21, "cuda": 2 ** 28}     # logits computed at a time: what a CPU's caches hold; on a GPU, few kernels


class GumbelCodes(torch.autograd.Function):
    """Gumbel-softmax codes and KL of features, without a tensor of all logits ever leaving the cache more than it must.

    features (B, N, d) with logits l = features w^T + b, w (V, d), b (V,); q = softmax(l). Returns
        codes (B, N, 128) = z table^T, z = softmax((l + g) / temperature), g Gumbel noise; table (128, V);
        kl, a scalar: KL(q || uniform) = ln V + sum_k q_k ln q_k, in nats, mean over B N tokens.
    seeds: one integer an image for its noise, or None for no noise.

    Images are taken a few at a time. Kept for the gradient, in the dtype of features: z, and the gradient of the KL term,
    dKL/dl = q (ln q - sum_k q_k ln q_k), so that the backward pass needs neither exponentials nor noise.
    """

    @staticmethod
    def forward(ctx, features, w, b, table, temperature, seeds):
        B, N, V, dtype = *features.shape[:2], len(w), features.dtype
        w, b, table = w.to(dtype), b.to(dtype), table.to(dtype)
        step = max(1, CHUNK[features.device.type] // (N * V))
        z, kl_grad = (features.new_empty(B * N, V) for _ in range(2))
        codes, neg_entropy = features.new_empty(B * N, len(table)), features.new_empty(B * N, 1, dtype=torch.float32)
        for first in range(0, B, step):
            images = slice(first, first + step)
            rows = slice(first * N, min(first + step, B) * N)
            log_q = F.linear(features[images].flatten(0, 1), w, b).float().log_softmax(-1)              # (rows, V)
            q = log_q.exp()
            torch.linalg.vecdot(q, log_q, out=neg_entropy[rows, 0])
            torch.mul(q, log_q - neg_entropy[rows], out=kl_grad[rows])
            if seeds is not None:
                log_q += gumbel_noise((N, V), seeds[images], features.device).flatten(0, 1)              # softmax ignores ln q's shift
            z[rows] = log_q.mul_(1 / temperature).softmax(-1)
            torch.mm(z[rows], table.t(), out=codes[rows])
        ctx.save_for_backward(features, w, table, z, kl_grad)
        ctx.temperature = temperature
        return codes.view(B, N, -1), math.log(V) + neg_entropy.mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_codes, d_kl):
        features, w, table, z, kl_grad = ctx.saved_tensors
        features, d_codes = features.flatten(0, 1), d_codes.flatten(0, 1).to(z.dtype)
        step = max(1, CHUNK[z.device.type] // z.shape[1])
        d_features, d_w, d_b, d_table = torch.empty_like(features), torch.zeros_like(w), torch.zeros_like(w[:, 0]), torch.zeros_like(table)
        for first in range(0, len(z), step):
            rows = slice(first, first + step)
            d_z = d_codes[rows] @ table                                                                  # (rows, V)
            d_table.addmm_(d_codes[rows].t(), z[rows])
            d_z -= torch.linalg.vecdot(d_z, z[rows])[:, None]
            d_logits = (kl_grad[rows] * (d_kl / len(z))).addcmul_(d_z, z[rows], value=1 / ctx.temperature)
            torch.mm(d_logits, w, out=d_features[rows])
            d_w.addmm_(d_logits.t(), features[rows])
            d_b += d_logits.sum(0)
        return d_features.view(ctx.saved_tensors[0].shape), d_w, d_b, d_table, None, None


def gumbel_noise(shape, seeds, device):
    """-ln(-ln(uniform)) of (len(seeds), *shape): an image's noise depends on its seed alone. On CPUs, images in parallel."""
    noise = torch.empty(len(seeds), *shape, device=device)
    def fill(image, seed):
        image.uniform_(generator=torch.Generator(device=device).manual_seed(seed))
    if device.type == "cpu" and len(seeds) > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, noise, seeds))
    else:
        for image, seed in zip(noise, seeds):
            fill(image, seed)
    return noise.log_().neg_().log_().neg_()


def nearest_codes(w, b, dtype):
    """features (n, d) in dtype -> argmax of features w^T + b, as in fp32. w (V, d), b (V,) in fp32.

    fp16 logits choose NEAR codes, which are compared in fp32. bf16 ones are too coarse for that; but a bf16 product with fp32
    sums ("medium" precision, on CPUs that have it) is exact for both halves of w = high + low.
    """
    if dtype == torch.float16:
        rounded_w, rounded_b = w.half(), b.half()

        def nearest(features):
            near = F.linear(features, rounded_w, rounded_b).topk(min(NEAR, len(w))).indices              # (n, NEAR)
            logits = torch.einsum("nd,nkd->nk", features.float(), w[near]) + b[near]
            return near.gather(1, logits.argmax(-1, keepdim=True))[:, 0]
    elif dtype == torch.bfloat16:
        high = w.bfloat16().float()
        low = w - high

        def nearest(features):
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
            try:
                return (F.linear(features.float(), high, b) + F.linear(features.float(), low)).argmax(-1)
            finally:
                torch.set_float32_matmul_precision(precision)
    else:
        def nearest(features):
            return F.linear(features, w, b).argmax(-1)
    return nearest


class Conv2d(nn.Module):
    """A "same" convolution whose parameters bear the public weights' names. Starts at N(0, 1/sqrt(fan_in)), bias 0."""

    def __init__(self, n_in, n_out, kernel):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel) / math.sqrt(n_in * kernel ** 2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class ResBlock(nn.Module):
    """identity + post_gain * residual path; kernels (3, 3, 3, 1) in the encoder, (1, 3, 3, 3) in the decoder."""

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
        return self.id_path(x) + self.post_gain * self.res_path(x)


class Stack(nn.Module):
    """Input convolution, groups of residual blocks with a change of resolution between them, ReLU, output convolution."""

    def __init__(self, input_conv, n_in, widths, blocks_per_group, kernels, resample, n_out):
        super().__init__()
        post_gain = 1 / (len(widths) * blocks_per_group) ** 2
        blocks = OrderedDict(input=input_conv)
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


class ELBO(NamedTuple):
    """The two terms of the loss, and what came out."""
    reconstruction: torch.Tensor    # scalar: -ln p(x | z), nats, mean over pixel channels
    kl: torch.Tensor                # scalar: KL(q(z | x) || uniform), nats, mean over tokens
    images: torch.Tensor            # (B, C, H, W) in [0, 1]


class DiscreteVAE(nn.Module):
    """encoder q(z | x) -> V codes -> decoder p(x | z). Images are (B, C, H, W) in [0, 1], H and W multiples of .downsample."""

    def __init__(self, vocab_size=8192, hidden=256, groups=4, blocks_per_group=2, in_channels=3):
        super().__init__()
        if vocab_size < 2 or hidden < 4 or groups < 1 or blocks_per_group < 1:
            raise ValueError(f"vocab_size must be at least 2, hidden 4, groups 1 and blocks_per_group 1, not {vocab_size}, "
                             f"{hidden}, {groups} and {blocks_per_group}")
        self.config = dict(vocab_size=vocab_size, hidden=hidden, groups=groups, blocks_per_group=blocks_per_group,
                           in_channels=in_channels)
        self.vocab_size = vocab_size
        self.downsample = 2 ** (groups - 1)
        widths = [hidden * 2 ** g for g in range(groups)]
        self.encoder = Stack(Conv2d(in_channels, hidden, 7), hidden, widths, blocks_per_group, (3, 3, 3, 1),
                             nn.MaxPool2d(2), vocab_size)
        self.decoder = Stack(Conv2d(vocab_size, CODE_DIM, 1), CODE_DIM, widths[::-1], blocks_per_group, (1, 3, 3, 3),
                             nn.Upsample(scale_factor=2, mode="nearest"), 2 * in_channels)

    @torch.no_grad()
    def initialise_codes(self, images, sharpness=8.0):
        """Place the V codes on V patches of these images, so that training starts with all of them in use.

        With f the features that the encoder's last convolution sees, in units of their spread, and f_k those of a random
        place in the images, the convolution is set to logits = -s |f - f_k|^2 (up to a constant in k): q(z | x) is a soft
        nearest-neighbour choice. s gives a code at the mean distance a logit of -sharpness ln V. The codebook starts as a
        random projection of f_k, so that near codes decode alike.
        """
        features = self.features(images).flatten(0, 2)                          # (B h w, width)
        features = features[torch.randperm(len(features)).to(features.device)]
        _, group = features.unique(dim=0, return_inverse=True)                  # black corners need one code, not hundreds:
        order = torch.arange(len(group), device=group.device)
        first = torch.full_like(group, len(group)).scatter_reduce_(0, group, order, "amin")    # where each feature comes first
        features = features[first[first < len(group)].sort().values]
        mean, std = features.mean(0), features.std() + 1e-6
        chosen = torch.arange(self.vocab_size, device=group.device) % len(features)
        f_k = (features[chosen] - mean) / std                                   # (V, width)
        s = sharpness * math.log(self.vocab_size) / (2 * f_k.square().sum(1).mean())
        output, table = self.encoder.blocks.output.conv, self.decoder.blocks.input
        output.w.copy_((2 * s * f_k / std)[..., None, None])
        output.b.copy_(-s * f_k.square().sum(1) - (2 * s * f_k / std) @ mean)
        codes = f_k @ torch.randn(f_k.shape[1], CODE_DIM, device=f_k.device)
        table.w.copy_((codes / codes.std()).t()[..., None, None])

    def features(self, images):
        """What the encoder's last convolution sees, (B, h, w, 2 ** (groups - 1) * hidden)."""
        if images.shape[-1] % self.downsample or images.shape[-2] % self.downsample:
            raise ValueError(f"images are {tuple(images.shape)}: height and width must be multiples of {self.downsample}")
        images = map_pixels(images).to(self.encoder.blocks.input.w.dtype, memory_format=torch.channels_last)
        return F.relu(self.encoder.blocks[:-1](images)).permute(0, 2, 3, 1)

    def encode(self, images):
        """Logits of q(z | x): (B, V, h, w)."""
        output = self.encoder.blocks.output.conv
        return F.linear(self.features(images), output.w.flatten(1), output.b).permute(0, 3, 1, 2)

    @torch.no_grad()
    def tokenize(self, images):
        """The most likely code of each place, z = argmax q(z | x), no noise: (B, h, w) int64.

        Logits are computed some places at a time and compared in fp32 whatever the features are: among 8192 codes, rounding to
        bf16 changes 35 % of the tokens, to fp16 9 %.
        """
        device, output = images.device.type, self.encoder.blocks.output.conv
        dtype = self.bearable(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32, device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            features = self.features(images).flatten(0, 2)                                              # (B h w, d)
        with torch.autocast(device, enabled=False):
            nearest = nearest_codes(output.w.flatten(1).float(), output.b.float(), features.dtype)
            tokens = [nearest(some) for some in features.split(max(1, CHUNK[device] // self.vocab_size))]
        return torch.cat(tokens).view(len(images), images.shape[2] // self.downsample, -1)

    def bearable(self, dtype, device):
        """What of dtype the encoder can be computed in, but for its last convolution.

        bf16 changes 2 % of the tokens of trained tokenizers of six layers, fp16 0.1 to 0.4 % (Fashion-MNIST, 1,024 codes): so
        GPUs get fp16 for bf16, as in DALL-E's own code, and CPUs fp32, unless so many layers share the work that each adds
        less than bf16 rounds.
        """
        if dtype == torch.bfloat16 and device == "cuda":
            return torch.float16
        if dtype == torch.bfloat16 and self.encoder.blocks.group_1.block_1.post_gain > 2 ** -6:
            return torch.float32
        return dtype

    def for_tokenizing(self, device, dtype):
        """Itself on the device with nothing to train: channels last, and the encoder in what of dtype is bearable."""
        self.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.encoder.blocks[:-1].to(self.bearable(dtype, device.type))
        return self

    @torch.no_grad()
    def decode(self, tokens):
        """Images (B, C, H, W) in [0, 1] from tokens (B, h, w): sigmoid(mu), unmapped. ValueError without a decoder."""
        if self.decoder is None:
            raise ValueError("this tokenizer has no decoder: decoder.pkl was not beside encoder.pkl")
        return self.pixels(self.codes(tokens))[0]

    def codes(self, tokens):
        """The codebook rows of tokens: (B, h, w) -> (B, 128, h, w)."""
        table = self.decoder.blocks.input
        return (F.embedding(tokens, table.w[:, :, 0, 0].t()) + table.b).permute(0, 3, 1, 2)

    def pixels(self, codes):
        """codes (B, 128, h, w) -> (images in [0, 1], mu, ln b), each (B, C, H, W)."""
        mu, log_b = self.decoder.blocks[1:](codes).float().chunk(2, dim=1)
        return unmap_pixels(torch.sigmoid(mu)), mu, log_b

    def forward(self, images, temperature, seeds=None):
        """One Gumbel-softmax sample of the ELBO's two terms. In eval mode without noise: softmax(logits / temperature).

        seeds: one integer an image for its noise, whatever batch it comes in; None draws them from the global generator.
        """
        if seeds is None:
            seeds = torch.randint(2 ** 62, (len(images),)).tolist()
        features = self.features(images)                               # (B, h, w, d)
        output, table = self.encoder.blocks.output.conv, self.decoder.blocks.input
        with torch.autocast(images.device.type, enabled=False):
            codes, kl = GumbelCodes.apply(features.flatten(1, 2), output.w.flatten(1), output.b, table.w.flatten(1), temperature,
                                          seeds if self.training else None)
        codes = (codes + table.b).unflatten(1, features.shape[1:3]).permute(0, 3, 1, 2)                  # (B, 128, h, w)
        reconstruction, mu, log_b = self.pixels(codes)
        return ELBO(logit_laplace_nll(map_pixels(images), mu, log_b).mean(), kl, reconstruction)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig):
    """Tokenizer"""
    image_size: int = 112    # pixels a side of what the tokenizer sees: the token grid times 2 ** (groups - 1)
    vocab_size: int = 8192    # codes |V|
    hidden: int = 256    # width n_hid of the first group; the others are 2, 4, 8 times as wide
    groups: int = 4    # groups of residual blocks; the resolution is halved between them
    blocks_per_group: int = 2    # residual blocks in a group
    kl_weight: float = 6.6    # final weight beta of the KL term; per token, over pixel channels a token
    kl_ramp: float = 0.00167    # share of the steps in which beta rises from 0, along a cosine; DALL-E: 5,000 of 3M
    temperature: float = 0.0625    # final Gumbel-softmax temperature tau, from 1
    temperature_ramp: float = 0.05    # share of the steps in which tau falls, along a cosine; DALL-E: 150,000 of 3M
    encoder_lr: float = 1.0    # the encoder's learning rate, as a share of --lr; a slow encoder keeps its codes in use
    init_codes: bool = True    # start the codes at patches of training images; --no-init-codes: at random, as DALL-E
    ema: float = 0.999    # decay of the weights' moving average, which is what is kept; lower in the first steps
    crop_scale: float = 0.08    # smallest share of an image's area in a random crop
    jitter: float = 0.0    # brightness, contrast and saturation vary by this share
    lr_ramp: float = 0.4    # share of the steps in which the learning rate falls; DALL-E: 1.2M of 3M
    eval_every: int = 10_000    # steps between two evaluations on held-out images

    def __post_init__(self):
        super().__post_init__()
        if self.eval_every < 1:
            raise ValueError(f"eval_every: at least 1, not {self.eval_every}")
        for name in ("kl_ramp", "temperature_ramp", "lr_ramp", "ema", "jitter", "encoder_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: from 0 to 1, not {getattr(self, name)}")
        for name in ("temperature", "crop_scale"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: above 0, up to 1, not {getattr(self, name)}")
        for name, least in (("vocab_size", 2), ("hidden", 4), ("groups", 1), ("blocks_per_group", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: at least {least}, not {getattr(self, name)}")
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight: 0 or above, not {self.kl_weight}")
        if self.image_size < 1 or self.image_size % 2 ** (self.groups - 1):
            raise ValueError(f"image_size: a multiple of {2 ** (self.groups - 1)} for {self.groups} groups, not {self.image_size}")


# "base" is the table of the DALL-E paper's appendix A.2; the others are ours: "demo" and "demo-8192" for minutes on a CPU.
SHORT = dict(lr=4e-3, warmup=0.1, weight_decay=1e-4, clip_grad=1.0, image_size=32, hidden=32, groups=3, blocks_per_group=1,
             kl_ramp=0.3, temperature_ramp=0.6, lr_ramp=1.0, log_every=1, save_every=100)
PRESETS = {
    "demo": {**SHORT, "epochs": 0.64, "batch_size": 16, "min_lr": 4e-5, "vocab_size": 1024, "kl_weight": 3.0, "encoder_lr": 0.1,
             "ema": 0.98, "crop_scale": 0.3, "eval_every": 500},
    "demo-8192": {**SHORT, "steps": 2800, "batch_size": 8, "min_lr": 2e-5, "kl_weight": 0.5, "encoder_lr": 0.05, "ema": 0.99,
                  "crop_scale": 0.6, "eval_every": 1400},
    "small": dict(steps=20_000, batch_size=128, lr=1e-3, min_lr=1e-5, warmup=0.02, weight_decay=1e-4, clip_grad=1.0,
                  hidden=64, blocks_per_group=1, kl_weight=1.0, kl_ramp=0.3, temperature_ramp=0.6, encoder_lr=0.1, lr_ramp=1.0,
                  eval_every=1000),
    "base": dict(steps=3_000_000, batch_size=512, lr=1e-4, min_lr=1.25e-6, warmup=0.0, weight_decay=1e-4, clip_grad=0.0),
}


def perplexity(counts):
    """exp of the entropy of the code histogram, from 1 (one code) to V (all alike)."""
    share = counts.double() / counts.sum()
    return math.exp(-torch.special.xlogy(share, share).sum())


TEMPERATURES = (1.0, 0.5, 0.25, 0.125)    # at which, beside its own, the final report gives the error of soft codes


@torch.no_grad()
def evaluate(model, batches, temperatures, device, unreadable):
    """Over held-out images of all processes: (report, counts of the codes (V,)).

    The report holds mean squared errors on [0, 1] pixels: hard_mse with hard codes (argmax), soft_mse with soft ones (softmax
    at the last of the temperatures, no noise), soft_mse_at for each temperature; and the codes in use and their perplexity.
    """
    model.eval()
    counts, sums = torch.zeros(model.vocab_size, device=device), torch.zeros(2 + len(temperatures), device=device)
    for view, *_, bad in batches:
        unreadable.warn(bad)
        images = data.to_float(view.to(device))
        tokens = model.tokenize(images)
        counts += torch.bincount(tokens.flatten(), minlength=model.vocab_size)
        outputs = [model.decode(tokens)] + [model(images, temperature).images for temperature in temperatures]
        errors = [(output - images).square().mean() for output in outputs]
        sums += len(images) * torch.stack([*errors, torch.ones_like(errors[0])])
    for total in (counts, sums):
        training.all_sum(total)
    hard_mse, *soft_mse = (sums[:-1] / sums[-1]).tolist()
    report = dict(soft_mse=soft_mse[-1], hard_mse=hard_mse, codes=int((counts > 0).sum()), perplexity=perplexity(counts))
    if report["perplexity"] < 0.01 * model.vocab_size:
        training.say(f"warning: the codebook is collapsing, {report['codes']} of {model.vocab_size} codes carry a perplexity of "
                     f"{report['perplexity']:.0f}; a higher --kl-weight, a longer --kl-ramp or more --steps may help")
    return {**report, "soft_mse_at": {f"{t:g}": error for t, error in zip(temperatures, soft_mse)}}, counts


def train(config, device):
    """Train a tokenizer in the folder config.out, or continue there. Returns the path of its model.pt."""
    with training.naming_flags():
        source, held_out = data.open_splits(config.data, config.data_root)
        torch.manual_seed(config.seed)
        model = DiscreteVAE(config.vocab_size, config.hidden, config.groups, config.blocks_per_group)
    views = data.Views(source, [config.image_size], (1, 1), seed=config.seed, crop_scale=config.crop_scale, jitter=config.jitter)
    val_views = data.Views(held_out, [config.image_size], (1, 1), seed=config.seed, train=False)
    total, per_epoch = training.steps_and_epoch(config, len(source))
    run = training.Run(config, device, total)
    if run.finished:
        training.say(f"{run.folder} is finished; --fresh starts over")
        return run.folder / "model.pt"
    training.say(f"tokenizer: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {config.vocab_size} codes, "
                 f"{total} steps of {config.batch_size} images of {config.image_size}x{config.image_size} on {device}")

    model.to(device, memory_format=torch.channels_last)
    ema = AveragedModel(model, avg_fn=lambda mean, new, n: mean + (1 - min(config.ema, (1 + n) / (10 + n))) * (new - mean))
    optimizer = training.adamw([{"params": part.parameters(), "weight_decay": config.weight_decay, "lr_scale": lr_scale}
                                for part, lr_scale in ((model.encoder, config.encoder_lr), (model.decoder, 1.0))])
    precision = training.Precision(config.precision, device)
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=precision.scaler)
    notes = run.restore(**parts)
    if run.start == 0 and config.init_codes:
        needed = math.ceil(2 * config.vocab_size * model.downsample ** 2 / config.image_size ** 2)
        view, colours, *_ = data.first_batch(views, needed, device)
        model.initialise_codes(data.to_float(view.to(device), colours.to(device)))
        ema.module.load_state_dict(model.state_dict())
    network = training.distribute(torch.compile(model) if config.compile else model, device)
    here = dict(rank=training.rank(), world_size=training.world_size())
    batches = run.batches(data.train_loader(views, config, device, start=run.start, stop=total, **here))
    unreadable = data.CorruptImages(len(source), training.say, notes.get("unreadable"))
    channels_a_token = 3 * model.downsample ** 2                                # 192 in DALL-E

    def evaluation(*temperatures):
        return evaluate(ema.module, data.val_loader(val_views, config, device, **here), temperatures, device, unreadable)

    for step in run.progress("tokenizer"):
        lr = training.set_lr(optimizer, training.warmup_cosine(step, config.lr_ramp * total, config.lr, config.min_lr, config.warmup * total))
        temperature = training.cosine(step, config.temperature_ramp * total, 1.0, config.temperature)
        beta = training.cosine(step, config.kl_ramp * total, 0.0, config.kl_weight)
        sums, bad = torch.zeros(4, device=device), []
        for part in range(config.accumulate):
            view, colours, _, names = next(batches)
            view = view.to(device, memory_format=torch.channels_last, non_blocking=True)
            images = data.to_float(view, colours.to(device, non_blocking=True))
            first = (part * here["world_size"] + here["rank"]) * len(images)    # its place in the global batch
            seeds = [training.draw_seed(config.seed, step, first + i) for i in range(len(images))]
            with training.only_last_part_communicates(network, part, config.accumulate):
                with precision.autocast():
                    reconstruction, kl, output = network(images, temperature, seeds)
                loss = reconstruction + beta / channels_a_token * kl            # -ELBO, nats per pixel channel
                precision.backward(loss / config.accumulate)
            sums += torch.stack([loss, reconstruction, kl, (output - images).square().mean()]).detach()
            bad += names
        (loss, nll, kl, mse), bad = run.exchange(step + 1, sums / config.accumulate, bad)
        with training.naming_flags():
            unreadable.add(step // per_epoch, bad)
        grad_norm = precision.update(optimizer, config.clip_grad)
        ema.update_parameters(model)
        report = evaluation(temperature)[0] if (step + 1) % config.eval_every == 0 and step + 1 < total else {}
        run.log(step + 1, loss=loss, nll=nll, kl=kl, mse=mse, lr=lr, grad_norm=grad_norm, temperature=temperature,
                kl_weight=beta, **{f"val_{name}": value for name, value in report.items() if name != "soft_mse_at"})
        run.end_of_step(step + 1, notes={"unreadable": unreadable.state()}, **parts)

    report, counts = evaluation(*(t for t in TEMPERATURES if t > config.temperature), config.temperature)
    by_temperature = report.pop("soft_mse_at")
    training.say(f"tokenizer, held-out images: {training.in_words(report)}")
    if training.rank() == 0:
        images = data.to_float(data.first_batch(val_views, 256, device)[0])
        draw_tokenizer(ema.module, images, counts, report, by_temperature).savefig(run.folder / "tokenizer.png", dpi=100)
    run.finish(ema.module, model.config, **report, soft_mse_at=by_temperature, unreadable_images=len(unreadable.names))
    return run.folder / "model.pt"


@torch.no_grad()
def draw_tokenizer(model, images, counts, report, by_temperature, columns=16, rows=6):
    """A figure of the report: the first images over their soft and hard reconstructions; how often each code is used; the
    error by temperature; and for the most used codes, patches of the images (B, 3, H, W) that map to them."""
    from matplotlib.figure import Figure                # here, where it is used: data.py says why
    figure = Figure(figsize=(13, 11), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(3.2, 3, 5))

    def show(axis, picture):
        axis.imshow(picture.permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")

    def grid(part, rows, columns):
        axes = part.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
        return axes

    first, tokens = images[:12], torch.cat([model.tokenize(some) for some in images.split(32)])
    axes = grid(top, 3, 12)
    soft = model.eval()(first, float(list(by_temperature)[-1])).images
    for row, (label, pictures) in enumerate((("original", first), ("soft codes", soft), ("hard codes", model.decode(tokens[:12])))):
        axes[row][0].set_ylabel(label)
        for axis, picture in zip(axes[row], pictures):
            show(axis, picture)

    usage, error = middle.subplots(1, 2)
    used = counts[counts > 0].sort(descending=True).values.cpu()
    usage.loglog(range(1, len(used) + 1), used / used.sum())
    usage.set(title=f"{report['codes']} of {model.vocab_size} codes in use, perplexity {report['perplexity']:.0f}",
              xlabel="rank of the code", ylabel="share of the tokens")
    error.plot([float(t) for t in by_temperature], list(by_temperature.values()), "o-", label="soft codes")
    error.axhline(report["hard_mse"], color="black", linestyle="--", label="hard codes")
    error.set_xscale("log", base=2)
    error.set(title="error by temperature", xlabel="temperature of the soft codes", ylabel="mean squared error",
              ylim=(0, 1.15 * max(report["hard_mse"], *by_temperature.values())))
    error.legend()

    bottom.suptitle("patches of the most used codes")
    P = model.downsample
    patches = images.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)             # (B h w, 3, P, P)
    axes = grid(bottom, rows, columns)
    for column, code in zip(axes.T, counts.topk(min(columns, len(used))).indices.tolist()):
        column[0].set_title(f"{code}\n{counts[code] / counts.sum():.1%}", fontsize=9)
        for axis, patch in zip(column, patches[tokens.flatten() == code]):
            show(axis, patch)
    return figure


def main():
    training.run_script(Config, PRESETS, train)


if __name__ == "__main__":
    main()
