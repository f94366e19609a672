"""Train the image tokenizer, a discrete VAE (sec. 2.1; Eq. 3, stage 1; DALL-E, appendix A).

`python train_dvae.py` trains a small one on built-in images; `--preset base` is DALL-E's recipe.
"""
import argparse
import copy
import math
import shlex
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, __file__.rpartition("/")[0])    # this folder, which PYTHONSAFEPATH leaves out

import data
import launch
import plots
import run_folder
from dvae import CODE_DIM, DiscreteVAE
from run import Run, cosine, count_steps, warmup_cosine

# base is DALL-E's appendix A, without its augmentation, at 112 pixels, the size of BEiT's tokens. Of its 3M
# steps, the KL weight rises over 5,000, the temperature falls over 150,000, the learning rate over 1.2M.
# The others are ours; demo and demo-8192 take minutes on a CPU, evening an hour. Three things keep codes in
# use: init_codes starts with all in use, a slow encoder (encoder_lr) does not move features away from them,
# and the KL term pulls q towards the uniform distribution. Measurements: docs/tokenizer.md.
OURS = dict(weight_decay=1e-4, clip_grad=1.0, blocks_per_group=1, kl_ramp=0.3, temperature_ramp=0.6,
            lr_ramp=1.0, init_codes=True)
DEMO = dict(**OURS, base_lr=4e-3, warmup=0.1, image_size=32, hidden=32, groups=3, log_every=1, save_every=100)
PRESETS = {
    "demo": dict(**DEMO, epochs=1.44, batch_size=16, base_batch=16, min_lr=4e-5, vocab_size=1024,
                 kl_weight=0.5, encoder_lr=0.3, ema=0.98, crop_scale=0.6, eval_every=150),
    "demo-8192": dict(**DEMO, steps=2800, batch_size=8, base_batch=8, min_lr=2e-5, kl_weight=0.5,
                      encoder_lr=0.05, ema=0.99, crop_scale=0.6, eval_every=1400),
    "evening": {**DEMO, "image_size": 64, "steps": 3000, "batch_size": 8, "base_batch": 8, "min_lr": 2e-5,
                "kl_weight": 0.5, "encoder_lr": 0.3, "ema": 0.99, "crop_scale": 0.6, "eval_every": 250},
    "small": dict(**OURS, steps=20_000, batch_size=128, base_batch=128, base_lr=1e-3, min_lr=1e-5,
                  warmup=0.02, hidden=64, kl_weight=1.0, encoder_lr=0.1, eval_every=1000),
    "base": dict(steps=3_000_000, batch_size=512, base_batch=512, base_lr=1e-4, min_lr=1.25e-6, warmup=0.0,
                 weight_decay=1e-4),
}


def parse_args(argv=None):
    """The flags of train_dvae.py. Exits with argparse's message if they do not fit together."""
    parser = launch.make_parser(__file__, __doc__)
    add = parser.add_argument
    add("--image-size", type=launch.positive_int, default=112,
        help="pixels per side: the side of the token grid times 2 ** (groups - 1)")
    add("--vocab-size", type=launch.number(int, 2), default=8192, help="number of codes |V|")
    add("--hidden", type=launch.number(int, 4), default=256,
        help="width of the first group; the next are 2, 4, 8 times as wide")
    add("--groups", type=launch.positive_int, default=4,
        help="groups of blocks; each but the last halves the resolution")
    add("--blocks-per-group", type=launch.positive_int, default=2, help="residual blocks in a group")
    add("--kl-weight", type=launch.nonnegative, default=6.6, help="final weight beta of the KL term")
    add("--kl-ramp", type=launch.fraction, default=0.00167,
        help="beta rises from 0 over this fraction of the steps")
    add("--temperature", type=launch.number(float, 1e-6, 1), default=1 / 16,
        help="final temperature of the Gumbel-softmax")
    add("--temperature-ramp", type=launch.fraction, default=0.05,
        help="the temperature falls from 1 over this fraction of the steps")
    add("--lr-ramp", type=launch.fraction, default=0.4,
        help="the learning rate falls over this fraction of the steps")
    add("--encoder-lr", type=launch.fraction, default=1.0,
        help="learning rate of the encoder / that of the decoder")
    add("--init-codes", action=argparse.BooleanOptionalAction, default=False,
        help="initialise the codes from random patches of training images; DALL-E: random weights")
    add("--ema", type=launch.fraction, default=0.999,
        help="decay of the moving average of the weights, which model.pt holds")
    add("--crop-scale", type=launch.number(float, 1e-6, 1), default=0.08,
        help="smallest area of a random crop / area of the image")
    add("--jitter", type=launch.fraction, default=0.0,
        help="brightness, contrast and saturation vary by this fraction")
    args = launch.parse(parser, PRESETS, argv)
    downsample = 2 ** (args.groups - 1)
    if args.image_size % downsample:
        parser.error(f"--image-size: must be a multiple of {downsample} for {args.groups} groups, "
                     f"got {args.image_size}")
    if args.lr_ramp < 1 and args.warmup >= args.lr_ramp:
        parser.error(f"--warmup: must be less than --lr-ramp, {args.lr_ramp:g}, got {args.warmup:g}")
    return args


def flags_for_pretraining(args, grid, steps, num_images):
    """The command line of this script that trains a tokenizer for pretrain.py: a token per patch of its grid.

    args, steps: the flags and the steps of that run. num_images: the number of its training images.
    """
    preset, processes = PRESETS[args.tokenizer_preset], launch.world_size()
    batch_size = math.ceil(min(preset["batch_size"], args.batch_size) / processes) * processes
    downsample = 2 ** (preset.get("groups", 4) - 1)                    # as dvae.DiscreteVAE.downsample
    flags = ["--preset", args.tokenizer_preset, "--out", Path(args.out) / "tokenizer",
             "--image-size", grid[0] * downsample, "--batch-size", batch_size]
    for name in ("data", "data_root", "seed", "workers", "device", "precision"):
        if name in args.given:
            flags += [f"--{name.replace('_', '-')}", getattr(args, name)]
    if args.compile:
        flags.append("--compile")
    flags = [str(flag) for flag in flags]
    preset_steps, _ = count_steps(parse_args(flags), num_images)
    return [*flags, "--steps", str(args.tokenizer_steps or min(steps, preset_steps))]


def train_for_pretraining(args, grid, run, num_images, device):
    """Train the tokenizer of a run of pretrain.py, in its folder, unless it is there. Returns its path."""
    path = run.folder / "tokenizer" / "model.pt"
    if not launch.on_first_process(path.with_name("result.json").exists):    # it is not finished
        flags = flags_for_pretraining(args, grid, run.steps, num_images)
        launch.say(f"python train_dvae.py {shlex.join(flags)}")
        train(parse_args(flags), device)
    run.depends_on(tokenizer_file=run_folder.describe_file(path))
    return path


def compare_sizes(tokenizer, grid):
    """Warn if a tokenizer was trained on images of another size than this grid of patches needs."""
    side, factor, trained = grid[0], tokenizer.downsample, tokenizer.image_size
    if trained not in (None, side * factor):
        launch.say(f"warning: the tokenizer was trained on images of {trained} pixels, and gets images of "
                   f"{side * factor}: {side} patches per side x {factor} pixels; train_dvae.py --image-size "
                   f"{side * factor} fits, or a --patch-size that gives {trained // factor} patches per side")


def train(args, device):
    """Train a tokenizer in the folder args.out, or continue there. Returns the path of its model.pt."""
    source, held_out = data.open_splits(args.data, args.data_root, download=args.download)
    views = data.Views(source, image_size=None, token_size=args.image_size, seed=args.seed,
                       crop_scale=args.crop_scale, jitter=args.jitter)
    val_views = data.Views(held_out, image_size=None, token_size=args.image_size, train=False)
    run = Run(args, device, len(source), run_folder.inputs(args, source, held_out))
    if run.finished:
        return run.folder / "model.pt"
    model, parameter_groups = build_model(args, views, device)
    average = copy.deepcopy(model).requires_grad_(False)
    gallery = plots.Gallery("tokenizer.png", partial(look, average, val_views, args, device),
                            plots.figure_reconstructions, measure="hard_mse")
    network = run.prepare(model, parameter_groups, average=average, gallery=gallery,
                          schedule=partial(shorter_warmup_cosine, args.lr_ramp),
                          evaluate=partial(evaluate, average, val_views, args, device))
    channels_per_token = 3 * model.downsample ** 2                     # 192 in DALL-E
    for batch in run.batches(views):
        temperature = cosine(run.step, args.temperature_ramp * run.steps, 1.0, args.temperature)
        beta = cosine(run.step, args.kl_ramp * run.steps, 0.0, args.kl_weight)
        images = data.to_float(batch["token_image"].to(device, non_blocking=True))
        with run.autocast():
            nll, kl, reconstruction = network(images, temperature)
        loss = nll + beta / channels_per_token * kl                    # Eq. 3, stage 1; beta = 1: -ELBO
        mse = (reconstruction - images).square().mean()
        run.update(loss, nll=nll, kl=kl, mse=mse, kl_weight=beta, temperature=temperature)
    run.finish(average, model.config, image_size=args.image_size)
    return run.folder / "model.pt"


def build_model(args, views, device):
    """The DiscreteVAE to train and its parameter groups. With --init-codes, codes start from images."""
    torch.manual_seed(args.seed)
    model = DiscreteVAE(args.vocab_size, args.hidden, args.groups, args.blocks_per_group)
    model.to(device, memory_format=torch.channels_last)
    if args.init_codes:
        patches_per_image = (args.image_size // model.downsample) ** 2
        num_images = math.ceil(16 * args.vocab_size / patches_per_image)    # enough for 16 V patches
        images = data.sample_batch(views, num_images)["token_image"]
        initialise_codes(model, data.to_float(images.to(device)))
    groups = [{"params": list(part.parameters()), "weight_decay": args.weight_decay, "lr_scale": scale}
              for part, scale in ((model.encoder, args.encoder_lr), (model.decoder, 1.0))]
    return model, groups


@torch.no_grad()
def initialise_codes(model, images, sharpness=8.0):
    """Start a DiscreteVAE with every code in use: code k stands for patches of `images` that are like p_k.

    With random weights, a few codes win everywhere and the others are never used. Here the encoder starts as
    a nearest-neighbour classifier. The p_k are random patches, improved by k-means. Let f be the normalised
    input of its last convolution, and A f the linear prediction of the P x P pixels at the same place, by
    ridge regression. Set

        logit_k = -s |A f - p_k|^2 = 2 s (A^T p_k) . f - s |p_k|^2 + a term that is the same for all k

    The first two terms are a 1x1 convolution with weight 2 s A^T p_k and bias -s |p_k|^2, which replaces
    the encoder's last convolution. The third term cancels in the softmax. s is chosen so that a random
    code, for which |A f - p_k|^2 is about 2 |p_k|^2, has the logit -sharpness ln V. Pixels are relative
    to their mean. In the decoder, the vector of code k is a random projection of p_k: similar codes,
    similar vectors.
    images (B, 3, H, W): with 16 V patches or more, A is accurate and nearly all codes differ.
    """
    P = model.downsample
    f = torch.cat([model.forward_features(part) for part in images.split(64)])
    f = f.permute(0, 2, 3, 1).flatten(0, 2).float()                    # (B h w, width)
    mean, std = f.mean(dim=0), f.std() + 1e-6                          # one std for all channels
    f = (f - mean) / std
    p = F.unfold(images - images.mean(dim=(0, 2, 3), keepdim=True), P, stride=P)    # (B, 3 P P, h w)
    p = p.transpose(1, 2).flatten(0, 1)                                # (B h w, 3 P P)
    covariance = f.t() @ f / len(f)
    ridge = 1e-4 * torch.eye(len(covariance), device=f.device)
    A = torch.linalg.solve(covariance + ridge, f.t() @ p / len(f)).t()    # (3 P P, width)
    patches = p.unique(dim=0)                                          # equal patches share a code
    code_numbers = torch.arange(model.vocab_size)
    chosen = torch.randperm(len(patches))[code_numbers % len(patches)]    # repeated if fewer than V
    p_k = patches[chosen.to(p.device)]                                 # (V, 3 P P)
    for _ in range(2):                                                 # k-means
        nearest = torch.cat([torch.cdist(part, p_k).argmin(dim=1) for part in p.split(4096)])
        sums = torch.zeros_like(p_k).index_add_(0, nearest, p)
        counts = nearest.bincount(minlength=len(p_k))[:, None]
        p_k = torch.where(counts > 0, sums / counts, p_k)
    s = sharpness * math.log(model.vocab_size) / (2 * p_k.square().sum(1).mean() + 1e-6)
    output, codebook = model.encoder.blocks.output.conv, model.decoder.blocks.input
    weight = 2 * s * (p_k @ A) / std                                   # for features that are not normalised
    output.w.copy_(weight[..., None, None])
    output.b.copy_(-s * p_k.square().sum(1) - weight @ mean)
    codes = p_k @ torch.randn(p_k.shape[1], CODE_DIM).to(p_k.device)   # (V, CODE_DIM)
    codebook.w.copy_((codes / codes.std()).t()[..., None, None])


def shorter_warmup_cosine(fraction, step, steps, peak, end, warmup_steps):
    """warmup_cosine that reaches `end` after a fraction of the steps."""
    return warmup_cosine(step, fraction * steps, peak, end, warmup_steps)


def perplexity(counts):
    """exp of the entropy of a histogram (V,): 1 if one code is used, V if all are used equally often."""
    return torch.distributions.Categorical(counts.double()).perplexity().item()


@torch.no_grad()
def evaluate(model, views, args, device):
    """Measure a tokenizer on 512 held-out images. Errors are means over RGB values in [0, 1].

    soft_mse             squared error with soft codes, softmax(logits / temperature)
    hard_mse, hard_mae   squared and absolute error (Table 8) with hard codes, argmax
    codes, perplexity    how many codes are in use, and the perplexity of their frequencies
    """
    model.eval()
    means, counts = launch.Means(), 0
    for batch in data.val_loader(views, args, device, num_images=512):
        images = data.to_float(batch["token_image"].to(device))
        tokens = model.tokenize(images)
        counts += torch.bincount(tokens.flatten(), minlength=model.vocab_size).cpu()
        soft, hard = model(images, args.temperature).images - images, model.decode(tokens) - images
        means.add(len(images), soft_mse=soft.square().mean(), hard_mse=hard.square().mean(),
                  hard_mae=hard.abs().mean())
    report = means.compute()
    counts = sum(launch.all_gather(counts))                            # of all processes
    report |= {"codes": int((counts > 0).sum()), "perplexity": perplexity(counts)}
    if report["perplexity"] < max(0.01 * model.vocab_size, min(2, 0.75 * model.vocab_size)):
        launch.say(f"warning: the codebook is collapsing, {report['codes']} of {model.vocab_size} codes are "
                   "used; a higher --kl-weight, a lower --encoder-lr or more --steps may help")
    return report


@torch.no_grad()
def look(model, views, args, device):
    """The inputs of figure_reconstructions: 12 held-out images, and what soft and hard codes make of them."""
    images = data.to_float(data.sample_batch(views, 12)["token_image"].to(device))
    soft, hard = model(images, args.temperature).images, model.decode(model.tokenize(images))
    return ({"original": images, "soft codes": soft, "hard codes": hard},)    # a tuple of one input


def main():
    launch.start(parse_args, train)


if __name__ == "__main__":
    main()
