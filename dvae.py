"""The image tokenizer: a discrete VAE with the architecture, parameter names and objective of DALL-E's.

`python dvae.py` trains one. Images are (B, C, H, W) in [0, 1], tokens (B, h, w), with H = h 2 ** (groups - 1)
and V codes.
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
        return self.id_path(x) + self.post_gain * self.res_path(x)


class Stack(nn.Module):
    """The layers of the encoder or decoder, as .blocks: input, group_1, group_2 and so on, output.

    A group is residual blocks of one width, and except in the last group a resampling.
    """

    def __init__(self, n_in, kernel, n_first, widths, blocks_per_group, kernels, resample, n_out):
        super().__init__()
        post_gain = 1 / (len(widths) * blocks_per_group) ** 2
        blocks, width = OrderedDict(input=Conv2d(n_in, n_first, kernel)), n_first
        for g, width_out in enumerate(widths):
            group = OrderedDict()
            for b in range(blocks_per_group):
                group[f"block_{b + 1}"] = ResBlock(width, width_out, kernels, post_gain)
                width = width_out
            if g < len(widths) - 1:
                group["resample"] = resample
            blocks[f"group_{g + 1}"] = nn.Sequential(group)
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(width, n_out, 1)))
        self.blocks = nn.Sequential(blocks)


class DVAEOutput(NamedTuple):
    """The two terms of -ELBO (Eq. 2 with a uniform prior), and the reconstruction."""
    nll: torch.Tensor       # scalar: -ln p(x | z) in nats, mean over pixel channels
    kl: torch.Tensor        # scalar: KL(q(z | x) || uniform) in nats, mean over tokens
    images: torch.Tensor    # (B, C, H, W) in [0, 1]


class DiscreteVAE(nn.Module):
    """Encoder q(z | x), codebook of V codes, decoder p(x | z). H = h * downsample."""

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
        """The terms of -ELBO (Eq. 2), with z relaxed to a Gumbel-softmax sample of temperature tau.

        In evaluation mode z is softmax(logits / tau), without noise.
        """
        logits = self.encode(images).float().permute(0, 2, 3, 1)       # (B, h, w, V), of q(z | x)
        if self.training:
            z = F.gumbel_softmax(logits, temperature)                  # relaxed one-hot codes
        else:
            z = (logits / temperature).softmax(dim=-1)
        codebook = self.decoder.blocks.input                           # a 1x1 convolution from V channels
        codes = F.linear(z, codebook.w.flatten(1), codebook.b)         # (B, h, w, 128)
        reconstruction, mu, log_b = self.decode_codes(codes)
        nll = logit_laplace_nll(map_pixels(images), mu, log_b)         # -ln p(x | z)
        log_q = logits.log_softmax(dim=-1)
        kl = math.log(self.vocab_size) + (log_q.exp() * log_q).sum(dim=-1)    # KL(q || uniform) = ln V - H(q)
        return DVAEOutput(nll.mean(), kl.mean(), reconstruction)

    def forward_features(self, images):
        """The input of the encoder's last convolution, (B, width, h, w). ValueError for a wrong size."""
        H, W = images.shape[-2:]
        if H % self.downsample or W % self.downsample:
            raise ValueError(f"image sides {H}, {W} must be multiples of {self.downsample}")
        return F.relu(self.encoder.blocks[:-1](map_pixels(images).to(memory_format=torch.channels_last)))

    def encode(self, images):
        """Logits of q(z | x): (B, V, h, w)."""
        return self.encoder.blocks.output.conv(self.forward_features(images))

    @torch.no_grad()
    def tokenize(self, images, places=None):
        """The tokens z = argmax q(z | x), without noise (sec. 2.4): (B, h, w) int64.

        places: int64 (M,), flat indices into (B, h, w); then only the tokens there are computed, (M,). The
        last convolution and the argmax are in true fp32, as the best two logits are often nearly equal.
        """
        features = self.forward_features(images)                       # (B, width, h, w)
        if places is not None:
            chosen = features.permute(0, 2, 3, 1).flatten(0, 2)[places]    # (M, width)
            features = chosen.t()[None, :, None]                       # (1, width, 1, M), as of one image
        true_fp32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), true_fp32:
            tokens = self.encoder.blocks.output.conv(features.float()).argmax(dim=1)
        return tokens if places is None else tokens.flatten()

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
        """Make the encoder a nearest-neighbour classifier on V random patches, so that all codes are in use.

        f is the normalised input of the last convolution, f_k that of patch k. The logits become
        -s |f - f_k|^2 = 2s f_k f - s |f_k|^2 + const.: a convolution with weight 2s f_k and bias -s |f_k|^2.
        s makes the mean logit -sharpness ln V. The codebook becomes a random projection of f_k.
        """
        features = self.forward_features(images).permute(0, 2, 3, 1).flatten(0, 2)    # (B h w, width)
        features = features.unique(dim=0)                              # equal patches share a code
        mean, std = features.mean(0), features.std() + 1e-6
        chosen = torch.randperm(len(features))[torch.arange(self.vocab_size) % len(features)]
        f_k = (features[chosen.to(features.device)] - mean) / std                    # (V, width)
        s = sharpness * math.log(self.vocab_size) / (2 * f_k.square().sum(1).mean())
        output, codebook = self.encoder.blocks.output.conv, self.decoder.blocks.input
        output.w.copy_((2 * s * f_k / std)[..., None, None])           # for features not yet normalised
        output.b.copy_(-s * f_k.square().sum(1) - (2 * s * f_k / std) @ mean)
        codes = f_k @ torch.randn(f_k.shape[1], CODE_DIM).to(f_k.device)             # (V, 128)
        codebook.w.copy_((codes / codes.std()).t()[..., None, None])


# ---- Training ----

@dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig):
    """Flags of dvae.py."""
    image_size: Annotated[int, "pixels per side: token grid x 2 ** (groups - 1)", (1, inf)] = 112
    vocab_size: Annotated[int, "codes |V|", (2, inf)] = 8192
    hidden: Annotated[int, "width n_hid of the first group; then 2, 4, 8 times as wide", (4, inf)] = 256
    groups: Annotated[int, "groups of blocks; each halves the resolution of the one before", (1, inf)] = 4
    blocks_per_group: Annotated[int, "residual blocks in a group", (1, inf)] = 2
    kl_weight: Annotated[float, "final weight beta of the KL term", (0, inf)] = 6.6
    kl_ramp: Annotated[float, "beta rises from 0 in this share of the steps", (0, 1)] = 0.00167
    temperature: Annotated[float, "final Gumbel-softmax temperature tau", (1e-6, 1)] = 0.0625
    temperature_ramp: Annotated[float, "tau falls from 1 in this share of the steps", (0, 1)] = 0.05
    lr_ramp: Annotated[float, "the learning rate falls in this share of the steps", (0, 1)] = 0.4
    encoder_lr: Annotated[float, "the encoder's lr is this times --lr; slow keeps codes in use", (0, 1)] = 1.0
    init_codes: Annotated[bool, "start with codes at patches of training images; DALL-E: random"] = False
    ema: Annotated[float, "decay of the moving average of the weights, which is saved", (0, 1)] = 0.999
    crop_scale: Annotated[float, "smallest share of an image's area in a random crop", (1e-6, 1)] = 0.08
    jitter: Annotated[float, "brightness, contrast and saturation vary by this share", (0, 1)] = 0.0
    eval_every: Annotated[int, "steps between two evaluations on held-out images", (1, inf)] = 10_000

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % 2 ** (self.groups - 1):
            raise ValueError(f"image_size: a multiple of {2 ** (self.groups - 1)} for {self.groups} groups, "
                             f"not {self.image_size}")


# base is DALL-E's appendix A, without its augmentation; its ramps are 5,000, 150,000 and 1.2M of 3M steps.
# The others are ours; demo and demo-8192 take minutes on a CPU. Three things keep codes in use: init_codes
# starts with all in use, a slow encoder (encoder_lr) does not move features away from them, and the KL term
# pulls q towards the uniform distribution. Measurements: docs/tokenizer.md.
OURS = dict(weight_decay=1e-4, clip_grad=1.0, blocks_per_group=1, kl_ramp=0.3, temperature_ramp=0.6,
            lr_ramp=1.0, init_codes=True)
DEMO = dict(**OURS, lr=4e-3, warmup=0.1, image_size=32, hidden=32, groups=3, log_every=1, save_every=100)
PRESETS = {
    "demo": dict(**DEMO, epochs=0.64, batch_size=16, min_lr=4e-5, vocab_size=1024, kl_weight=3.0,
                 encoder_lr=0.1, ema=0.98, crop_scale=0.3, eval_every=500),
    "demo-8192": dict(**DEMO, steps=2800, batch_size=8, min_lr=2e-5, kl_weight=0.5, encoder_lr=0.05, ema=0.99,
                      crop_scale=0.6, eval_every=1400),
    "small": dict(**OURS, steps=20_000, batch_size=128, lr=1e-3, min_lr=1e-5, warmup=0.02, hidden=64,
                  kl_weight=1.0, encoder_lr=0.1, eval_every=1000),
    "base": dict(steps=3_000_000, batch_size=512, lr=1e-4, min_lr=1.25e-6, warmup=0.0, weight_decay=1e-4,
                 clip_grad=0.0),
}


def perplexity(counts):
    """exp of the entropy of a histogram (V,): 1 if one code is used, V if all are used equally often."""
    return torch.distributions.Categorical(counts.double()).perplexity().item()


@torch.no_grad()
def evaluate(model, batches, temperature, device):
    """Measures errors and code use on the held-out images of all processes.

    Errors are means over RGB in [0, 1]: squared with soft codes (softmax at this temperature), squared with
    hard codes (argmax), and absolute with hard codes (Table 8).
    """
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
    """Exponential moving average of the weights, in place. swa_utils.AveragedModel would wait for the GPU."""
    for mean, new in zip(average.parameters(), model.parameters()):
        mean.lerp_(new, 1 - decay)


def build_model(config, device):
    """Returns the DiscreteVAE of a config and its optimizer."""
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
        patches = (config.image_size // model.downsample) ** 2
        needed = math.ceil(2 * config.vocab_size / patches)            # images with 2 V patches
        model.initialise_codes(data.to_float(data.some_samples(views, needed)[0].to(device)))
        average.load_state_dict(model.state_dict())
    network = training.distribute(torch.compile(model) if config.compile else model, device)
    batches = iter(data.train_loader(views, config, device, run.start, total))
    channels_per_token = 3 * model.downsample ** 2                     # 192 in DALL-E
    held_out_batches = partial(data.val_loader, val_views, config, device, images=512)
    training.say(f"tokenizer: {config.vocab_size} codes, {total} steps of {config.batch_size} images")
    report = {}
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
                loss = nll + beta / channels_per_token * kl            # Eq. 3, stage 1; beta = 1: -ELBO
                precision.backward(loss / config.accumulate)
            sums += torch.stack([loss, nll, kl, (reconstruction - images).square().mean()]).detach()
        loss, nll, kl, mse = run.all_reduce(step + 1, sums / config.accumulate)
        grad_norm = precision.update(optimizer, config.clip_grad)
        update_average(average, model, min(config.ema, (1 + step) / (10 + step)))    # at first a short one
        report = {}
        if (step + 1) % config.eval_every == 0 or step + 1 == total:
            report = evaluate(average, held_out_batches(), config.temperature, device)
        run.log(step + 1, loss=loss, nll=nll, kl=kl, mse=mse, lr=lr, grad_norm=grad_norm, kl_weight=beta,
                temperature=temperature, **{f"val_{name}": value for name, value in report.items()})
        run.save_or_stop(step + 1, **parts)

    report = report or evaluate(average, held_out_batches(), config.temperature, device)    # killed before it
    training.say(f"tokenizer, held-out images: {training.in_words(report)}")
    run.finish(average, model.config, **report)
    if training.rank() == 0:
        images = data.to_float(data.some_samples(val_views, 12)[0].to(device))
        training.draw_or_warn(draw, average, images, config.temperature, run.folder / "tokenizer.png")
    return run.folder / "model.pt"


def draw(model, images, temperature, path):
    """Write a picture: images (n, 3, H, W) and their reconstructions from soft and hard codes."""
    soft, hard = model(images, temperature).images, model.decode(model.tokenize(images))
    rows = F.interpolate(torch.cat([images, soft, hard]), scale_factor=math.ceil(96 / images.shape[-1]))
    save_image(rows, path, nrow=len(images))


def main():
    training.run_script(Config, PRESETS, train)


if __name__ == "__main__":
    main()
