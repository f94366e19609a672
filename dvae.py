"""The image tokenizer: a discrete VAE with the architecture, parameter names and objective of DALL-E's.

`python dvae.py` trains one. B images, C channels, H W pixels; h w tokens, H = h 2 ** (groups - 1); V codes.
"""
import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

import data
import training

PIXEL_EPS = 0.1    # pixels are mapped into [eps, 1 - eps], where logit-Laplace has support
CODE_DIM = 128     # n_init, width of a code in the decoder


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
    """A "same" convolution, named as in the public weights. Initially N(0, 1/sqrt(fan_in)), bias 0."""

    def __init__(self, n_in, n_out, kernel):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel) / math.sqrt(n_in * kernel ** 2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class ResBlock(nn.Module):
    """identity + post_gain * residual path; kernels: (3, 3, 3, 1) to encode, (1, 3, 3, 3) to decode."""

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
    """Layers of encoder or decoder: convolution, groups of blocks and resampling between, 1x1 convolution."""

    def __init__(self, n_in, kernel, n_first, widths, blocks_per_group, kernels, resample, n_out):
        super().__init__()
        post_gain = 1 / (len(widths) * blocks_per_group) ** 2
        blocks, width = OrderedDict(input=Conv2d(n_in, n_first, kernel)), n_first
        for g, wider in enumerate(widths):
            group = OrderedDict()
            for b in range(blocks_per_group):
                group[f"block_{b + 1}"] = ResBlock(width, wider, kernels, post_gain)
                width = wider
            if g < len(widths) - 1:
                group["resample"] = resample
            blocks[f"group_{g + 1}"] = nn.Sequential(group)
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(width, n_out, 1)))
        self.blocks = nn.Sequential(blocks)


class ELBO(NamedTuple):
    """The two terms of the loss (Eq. 2 with a uniform prior), and the reconstruction."""
    nll: torch.Tensor       # scalar: -ln p(x | z) in nats, mean over pixel channels
    kl: torch.Tensor        # scalar: KL(q(z | x) || uniform) in nats, mean over tokens
    images: torch.Tensor    # (B, C, H, W) in [0, 1]


class DiscreteVAE(nn.Module):
    """Encoder q(z | x), V codes, decoder p(x | z). Images are (B, C, H, W) in [0, 1]; H = h * downsample."""

    def __init__(self, vocab_size=8192, hidden=256, groups=4, blocks_per_group=2, in_channels=3):
        super().__init__()
        if vocab_size < 2 or hidden < 4 or groups < 1 or blocks_per_group < 1:
            raise ValueError("vocab_size must be at least 2, hidden 4, groups 1 and blocks_per_group 1, "
                             f"not {vocab_size}, {hidden}, {groups} and {blocks_per_group}")
        self.config = dict(vocab_size=vocab_size, hidden=hidden, groups=groups,
                           blocks_per_group=blocks_per_group, in_channels=in_channels)
        self.vocab_size, self.downsample = vocab_size, 2 ** (groups - 1)
        widths = [hidden * 2 ** g for g in range(groups)]
        self.encoder = Stack(in_channels, 7, hidden, widths, blocks_per_group, (3, 3, 3, 1),
                             nn.MaxPool2d(2), vocab_size)
        self.decoder = Stack(vocab_size, 1, CODE_DIM, widths[::-1], blocks_per_group, (1, 3, 3, 3),
                             nn.Upsample(scale_factor=2), 2 * in_channels)

    def forward(self, images, temperature):
        """The ELBO (Eq. 2) of a Gumbel-softmax sample; in eval mode without noise: softmax(logits / tau)."""
        logits = self.encode(images).float().permute(0, 2, 3, 1)       # (B, h, w, V), of q(z | x)
        gumbel = -(-torch.rand_like(logits).log()).log() if self.training else 0
        z = ((logits + gumbel) / temperature).softmax(dim=-1)          # relaxed one-hot codes
        codebook = self.decoder.blocks.input                        # 1x1 convolution; its weight: V codes
        codes = F.linear(z, codebook.w.flatten(1), codebook.b)            # (B, h, w, 128)
        reconstruction, mu, log_b = self.decode_codes(codes)
        nll = logit_laplace_nll(map_pixels(images), mu, log_b)         # -ln p(x | z)
        log_q = logits.log_softmax(dim=-1)
        kl = math.log(self.vocab_size) + (log_q.exp() * log_q).sum(dim=-1)    # KL(q || uniform) = ln V - H(q)
        return ELBO(nll.mean(), kl.mean(), reconstruction)

    def features(self, images):
        """Input of the encoder's last convolution, (B, width, h, w). ValueError for a wrong size."""
        H, W = images.shape[-2:]
        if H % self.downsample or W % self.downsample:
            raise ValueError(f"image sides {H}, {W} must be multiples of {self.downsample}")
        return F.relu(self.encoder.blocks[:-1](map_pixels(images).to(memory_format=torch.channels_last)))

    def encode(self, images):
        """Logits of q(z | x): (B, V, h, w)."""
        return self.encoder.blocks.output.conv(self.features(images))

    @torch.no_grad()
    def tokenize(self, images):
        """z = argmax q(z | x) (Eq. 3, stage 2), without noise: (B, h, w) int64.

        The last convolution and argmax are in true fp32: the best two logits are often nearly equal.
        """
        features = self.features(images)
        no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), no_tf32:
            return self.encoder.blocks.output.conv(features.float()).argmax(dim=1)

    @torch.no_grad()
    def decode(self, tokens):
        """Images (B, C, H, W) in [0, 1] from tokens (B, h, w). ValueError if the tokenizer has no decoder."""
        if self.decoder is None:
            raise ValueError("this tokenizer has no decoder: decoder.pkl was not beside encoder.pkl")
        codebook = self.decoder.blocks.input
        return self.decode_codes(F.embedding(tokens, codebook.w.flatten(1).t()) + codebook.b)[0]

    def decode_codes(self, codes):
        """codes (B, h, w, 128) -> (images in [0, 1], mu, ln b), each (B, C, H, W)."""
        mu, log_b = self.decoder.blocks[1:](codes.permute(0, 3, 1, 2)).float().chunk(2, dim=1)
        return unmap_pixels(torch.sigmoid(mu)), mu, log_b

    @torch.no_grad()
    def initialise_codes(self, images, sharpness=8.0):
        """Place the V codes on V patches of these images, so that training starts with all codes in use.

        With f the normalised input of the encoder's last convolution and f_k that of a random patch, logits
        are -s |f - f_k|^2 = 2s f_k f - s |f_k|^2 + const., a soft nearest-neighbour choice by a convolution
        with weight 2s f_k and bias -s |f_k|^2. A code at the mean distance has the logit -sharpness ln V.
        The codebook becomes a random projection of f_k.
        """
        features = self.features(images).permute(0, 2, 3, 1).flatten(0, 2)           # (B h w, width)
        features = features.unique(dim=0)                              # equal patches need one code
        mean, std = features.mean(0), features.std() + 1e-6
        chosen = torch.randperm(len(features))[torch.arange(self.vocab_size) % len(features)]
        f_k = (features[chosen.to(features.device)] - mean) / std                    # (V, width)
        s = sharpness * math.log(self.vocab_size) / (2 * f_k.square().sum(1).mean())
        output, codebook = self.encoder.blocks.output.conv, self.decoder.blocks.input
        output.w.copy_((2 * s * f_k / std)[..., None, None])
        output.b.copy_(-s * f_k.square().sum(1) - (2 * s * f_k / std) @ mean)
        codes = f_k @ torch.randn(f_k.shape[1], CODE_DIM).to(f_k.device)             # (V, 128)
        codebook.w.copy_((codes / codes.std()).t()[..., None, None])


# ---- Training ----

@dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig):
    """Flags of dvae.py."""
    image_size: Annotated[int, "pixels a side of its view: token grid x 2 ** (groups - 1)", (1, inf)] = 112
    vocab_size: Annotated[int, "codes |V|", (2, inf)] = 8192
    hidden: Annotated[int, "width n_hid of the first group; then 2, 4, 8 times as wide", (4, inf)] = 256
    groups: Annotated[int, "groups of blocks, with half the resolution from one to the next", (1, inf)] = 4
    blocks_per_group: Annotated[int, "residual blocks in a group", (1, inf)] = 2
    kl_weight: Annotated[float, "final weight beta of the KL term", (0, inf)] = 6.6
    kl_ramp: Annotated[float, "share of steps in which beta rises; DALL-E: 5,000 of 3M", (0, 1)] = 0.00167
    temperature: Annotated[float, "final Gumbel-softmax temperature tau, from 1", (1e-6, 1)] = 0.0625
    temperature_ramp: Annotated[float, "share of steps in which tau falls (DALL-E)", (0, 1)] = 0.05
    lr_ramp: Annotated[float, "share of steps in which the lr falls; DALL-E: 1.2M of 3M", (0, 1)] = 0.4
    encoder_lr: Annotated[float, "lr of the encoder, over --lr; slow keeps codes in use", (0, 1)] = 1.0
    init_codes: Annotated[bool, "start codes at patches of training images, not at random as DALL-E"] = True
    ema: Annotated[float, "decay of the moving average of the weights, which is kept", (0, 1)] = 0.999
    crop_scale: Annotated[float, "smallest share of an image's area in a random crop", (1e-6, 1)] = 0.08
    jitter: Annotated[float, "brightness, contrast and saturation vary by this share", (0, 1)] = 0.0
    eval_every: Annotated[int, "steps between two evaluations on held-out images", (1, inf)] = 10_000

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % 2 ** (self.groups - 1):
            raise ValueError(f"image_size: a multiple of {2 ** (self.groups - 1)} for {self.groups} groups, "
                             f"not {self.image_size}")


# base: DALL-E's appendix A. The others are ours; demo and demo-8192 take minutes on a CPU. What keeps codes
# in use: initialise_codes starts with all in use, a slow encoder (encoder_lr) does not move features away
# from them, and the KL term pulls q towards the uniform distribution. Measurements: docs/tokenizer.md.
SHORT = dict(lr=4e-3, warmup=0.1, weight_decay=1e-4, clip_grad=1.0, image_size=32, hidden=32, groups=3,
             blocks_per_group=1, kl_ramp=0.3, temperature_ramp=0.6, lr_ramp=1.0, log_every=1, save_every=100)
PRESETS = {
    "demo": {**SHORT, "epochs": 0.64, "batch_size": 16, "min_lr": 4e-5, "vocab_size": 1024, "kl_weight": 3.0,
             "encoder_lr": 0.1, "ema": 0.98, "crop_scale": 0.3, "eval_every": 500},
    "demo-8192": {**SHORT, "steps": 2800, "batch_size": 8, "min_lr": 2e-5, "kl_weight": 0.5,
                  "encoder_lr": 0.05, "ema": 0.99, "crop_scale": 0.6, "eval_every": 1400},
    "small": dict(steps=20_000, batch_size=128, lr=1e-3, min_lr=1e-5, warmup=0.02, weight_decay=1e-4,
                  clip_grad=1.0, hidden=64, blocks_per_group=1, kl_weight=1.0, kl_ramp=0.3,
                  temperature_ramp=0.6, encoder_lr=0.1, lr_ramp=1.0, eval_every=1000),
    "base": dict(steps=3_000_000, batch_size=512, lr=1e-4, min_lr=1.25e-6, warmup=0.0, weight_decay=1e-4,
                 clip_grad=0.0),
}


def perplexity(counts):
    """exp of the entropy of a histogram (V,): 1 if one code is used, V if all are used equally often."""
    share = counts.double() / counts.sum()
    return math.exp(-torch.special.xlogy(share, share).sum())


@torch.no_grad()
def evaluate(model, batches, temperature, device):
    """Errors on the held-out images of all processes, and code use. RGB in [0, 1]: mean squared error with
    soft codes (softmax at this temperature) and hard ones (argmax), mean absolute error (Table 8)."""
    model.eval()
    counts, sums = torch.zeros(model.vocab_size, device=device), torch.zeros(4, device=device)
    for (images,) in batches:
        images = data.to_float(images.to(device))
        tokens = model.tokenize(images)
        counts += torch.bincount(tokens.flatten(), minlength=model.vocab_size)
        hard, soft = model.decode(tokens) - images, model(images, temperature).images - images
        errors = torch.stack([hard.square().mean(), soft.square().mean(), hard.abs().mean()])
        sums += len(images) * torch.cat([errors, torch.ones_like(errors[:1])])
    training.all_sum(counts)
    training.all_sum(sums)
    hard_mse, soft_mse, hard_mae, _ = (sums / sums[-1]).tolist()
    report = dict(soft_mse=soft_mse, hard_mse=hard_mse, hard_mae=hard_mae, codes=int((counts > 0).sum()),
                  perplexity=perplexity(counts))
    if report["perplexity"] < 0.01 * model.vocab_size:
        training.say(f"warning: the codebook is collapsing, {report['codes']} of {model.vocab_size} codes "
                     "are used; a higher --kl-weight, a lower --encoder-lr or more --steps may help")
    return report


@torch.no_grad()
def update_average(average, model, decay):
    """Exponential moving average of the weights, in place; without a GPU synchronisation."""
    for mean, new in zip(average.parameters(), model.parameters()):
        mean.lerp_(new, 1 - decay)


def build_model(config, device):
    """(DiscreteVAE, its optimizer) of a config."""
    torch.manual_seed(config.seed)
    model = DiscreteVAE(config.vocab_size, config.hidden, config.groups, config.blocks_per_group)
    model.to(device, memory_format=torch.channels_last)
    groups = [{"params": list(part.parameters()), "weight_decay": config.weight_decay, "lr_scale": scale}
              for part, scale in ((model.encoder, config.encoder_lr), (model.decoder, 1.0))]
    return model, torch.optim.AdamW(groups, fused=True)


def train(config, device):
    """Train a tokenizer in the folder config.out, or continue there. Returns the path of its model.pt."""
    source, held_out = data.open_splits(config.data, config.data_root)
    views = data.Views(source, None, config.image_size, seed=config.seed, crop_scale=config.crop_scale,
                       jitter=config.jitter)
    val_views = data.Views(held_out, None, config.image_size, train=False)
    total, _ = training.steps_and_epoch(config, len(source))
    run = training.Run(config, device, total)
    if run.finished:
        training.say(f"{run.folder} is finished")
        return run.folder / "model.pt"
    model, optimizer = build_model(config, device)
    average = copy.deepcopy(model).requires_grad_(False)
    precision = training.Precision(config.precision, device)
    parts = dict(model=model, average=average, optimizer=optimizer, scaler=precision.scaler)
    run.restore(**parts)
    if run.start == 0 and config.init_codes:
        needed = math.ceil(2 * config.vocab_size * model.downsample ** 2 / config.image_size ** 2)
        model.initialise_codes(data.to_float(*data.some_samples(views, needed, device)))
        average.load_state_dict(model.state_dict())
    network = training.distribute(torch.compile(model) if config.compile else model, device)
    batches = iter(data.train_loader(views, config, device, run.start, total))
    channels_a_token = 3 * model.downsample ** 2                       # 192 in DALL-E
    held_out_batches = partial(data.val_loader, val_views, config, device, images=512)
    training.say(f"tokenizer: {config.vocab_size} codes, {total} steps of {config.batch_size} images")
    for step in run.progress("tokenizer"):
        training.seed_step(config.seed, step)
        lr = training.warmup_cosine(step, config.lr_ramp * total, config.lr, config.min_lr,
                                    config.warmup * total)
        temperature = training.cosine(step, config.temperature_ramp * total, 1.0, config.temperature)
        beta = training.cosine(step, config.kl_ramp * total, 0.0, config.kl_weight)
        training.set_lr(optimizer, lr)
        sums = torch.zeros(4, device=device)
        for part in range(config.accumulate):
            images = data.to_float(next(batches)[0].to(device, non_blocking=True))
            with training.accumulating(network, part, config.accumulate):
                with precision.autocast():
                    nll, kl, reconstruction = network(images, temperature)
                loss = nll + beta / channels_a_token * kl              # beta = 1: -ELBO (Eq. 2)
                precision.backward(loss / config.accumulate)
            sums += torch.stack([loss, nll, kl, (reconstruction - images).square().mean()]).detach()
        loss, nll, kl, mse = run.exchange(step + 1, sums / config.accumulate)
        grad_norm = precision.update(optimizer, config.clip_grad)
        update_average(average, model, min(config.ema, (1 + step) / (10 + step)))    # first steps: shorter
        report = {}
        if (step + 1) % config.eval_every == 0 and step + 1 < total:
            report = evaluate(average, held_out_batches(), config.temperature, device)
        run.log(step + 1, loss=loss, nll=nll, kl=kl, mse=mse, lr=lr, grad_norm=grad_norm, kl_weight=beta,
                temperature=temperature, **{f"val_{name}": value for name, value in report.items()})
        run.end_of_step(step + 1, **parts)

    report = evaluate(average, held_out_batches(), config.temperature, device)
    training.say(f"tokenizer, held-out images: {training.in_words(report)}")
    run.finish(average, model.config, **report)
    if training.rank() == 0:
        images = data.to_float(*data.some_samples(val_views, 12, device))
        soft, hard = average(images, config.temperature).images, average.decode(average.tokenize(images))
        rows = F.interpolate(torch.cat([images, soft, hard]), scale_factor=math.ceil(96 / config.image_size))
        save_image(rows, run.folder / "tokenizer.png", nrow=len(images))
    return run.folder / "model.pt"


def main():
    training.run_script(Config, PRESETS, train)


if __name__ == "__main__":
    main()
