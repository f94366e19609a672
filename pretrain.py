"""Masked image modeling (sec. 2.3): pre-train a transformer to predict the visual tokens of masked patches.

`python pretrain.py` trains a tokenizer and pre-trains on built-in images. The paper's run is
`torchrun --nproc_per_node=16 pretrain.py --data IMAGENET --tokenizer encoder.pkl`, with DALL-E's tokenizer.
The flags of each row of Table 4 are listed in the README, under "Pre-training".
Axes: B images in a batch, each with a grid of h x w patches and visual tokens; M patches to predict in the
batch; V codes; P x P pixels in a patch.
"""
import argparse
import dataclasses
import math
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

sys.path.insert(0, __file__.rpartition("/")[0])    # this folder, which PYTHONSAFEPATH leaves out

import data
import launch
import plots
import run_folder
import train_dvae
import vit
import weights
from masking import MASKS, number_to_mask
from run import Run, parameter_groups

# Table 12 for base and large; tiny and small have the recipe of base. demo (minutes) and evening are ours.
TABLE_12 = dict(epochs=800.0, batch_size=2048, base_batch=2048, base_lr=1.5e-3, min_lr=1e-5, warmup=10 / 800,
                clip_grad=3.0)
DEMO = dict(batch_size=32, base_batch=32, base_lr=4e-3, min_lr=4e-5, warmup=0.1, clip_grad=3.0, image_size=64,
            drop_path=0.0, position="shared_relative", crop_scale=0.6, jitter=0.0, log_every=1,
            save_every=100)
PRESETS = {
    "demo": {**DEMO, "epochs": 2.2, "patch_size": 8, "dim": 128, "depth": 4, "heads": 4,
             "tokenizer_preset": "demo", "eval_every": 100},
    "evening": {**DEMO, "epochs": 8.0, "patch_size": 4, "dim": 192, "depth": 6, "heads": 6,
                "tokenizer_preset": "evening", "eval_every": 250},
    "tiny": {**TABLE_12, **vit.SIZES["tiny"]},
    "small": {**TABLE_12, **vit.SIZES["small"]},
    "base": {**TABLE_12, **vit.SIZES["base"]},
    "large": {**TABLE_12, **vit.SIZES["large"], "clip_grad": 1.0},
}


def parse_args(argv=None):
    """The flags of pretrain.py. Exits with argparse's message if they do not fit together."""
    parser = launch.make_parser(__file__, __doc__, epilog="the tokenizer's own flags: see train_dvae.py")
    launch.add_model_flags(parser, defaults=vit.ViTConfig())
    add = parser.add_argument
    add("--tokenizer", type=launch.text, help="model.pt of train_dvae.py, or DALL-E's encoder.pkl beside its "
        "decoder.pkl (default: one is trained in <out>/tokenizer)")
    add("--tokenizer-preset", choices=list(train_dvae.PRESETS), default="small",
        help="preset of the tokenizer that is trained")
    add("--tokenizer-steps", type=launch.positive_int,
        help="steps of its training (default: the preset's, at most the steps of this run)")
    add("--masking", choices=list(MASKS), default="blockwise", help="Algorithm 1, or an ablation of Table 4")
    add("--mask-ratio", type=launch.fraction, default=0.4,
        help="fraction of masked patches: 0.4 is 78 of 196 (sec. 2.3), 0.383 is 75 (sec. 2.5)")
    add("--exact-masks", action=argparse.BooleanOptionalAction, default=True,
        help="mask the same number of patches in each image; otherwise stop as Algorithm 1 does")
    add("--log-aspect", action="store_true",
        help="log-uniform aspect ratio of blocks, as in the released code")
    add("--target", choices=["tokens", "pixels"], default="tokens",
        help="pixels: regress the pixels of patches (Table 4)")
    add("--predict", choices=["masked", "all"], default="masked",
        help="all: recover 100 %% of the targets (Table 4)")
    add("--crop-scale", type=launch.number(float, 1e-6, 1), default=0.08,
        help="smallest area of a random crop / area of the image")
    add("--jitter", type=launch.fraction, default=0.4,
        help="brightness, contrast and saturation vary by this share (Table 12)")
    args = launch.parse(parser, PRESETS, argv)
    grid = launch.config_from_flags(vit.ViTConfig, args).grid
    largest = math.prod(grid) - (1 if args.exact_masks else 2)         # as masking.blockwise_mask allows
    if not 1 <= number_to_mask(args.mask_ratio, grid) <= largest:
        parser.error(f"--mask-ratio: must mask from 1 to {largest} of {math.prod(grid)} patches, got "
                     f"{args.mask_ratio:g}")
    if args.masking == "none" and (args.predict != "all" or args.target != "tokens"):
        parser.error("--masking none needs --predict all and --target tokens, to have something to learn")
    if args.masking == "none" and "mask_ratio" in args.given:
        parser.error("--mask-ratio: not used with --masking none")
    if args.masking != "blockwise" and (args.log_aspect or not args.exact_masks):
        parser.error("--log-aspect and --no-exact-masks: only with --masking blockwise")
    tokenizer_training = {"tokenizer_preset", "tokenizer_steps"} & set(args.given)
    if args.target == "pixels" and (args.tokenizer or tokenizer_training):
        parser.error("--tokenizer, --tokenizer-preset and --tokenizer-steps: not used with --target pixels")
    if args.tokenizer and tokenizer_training:
        parser.error("--tokenizer-preset and --tokenizer-steps: not used with --tokenizer")
    return args


def train(args, device):
    """Pre-train in the folder args.out, or continue there.

    Writes metrics.jsonl, last.pt, model.pt, result.json, predictions.png, and the tokenizer if it trains one.
    """
    config = launch.config_from_flags(vit.ViTConfig, args)
    source, held_out = data.open_splits(args.data, args.data_root, download=args.download)
    # A wrong --tokenizer is refused here, before Run makes the folder.
    tokenizer = load_tokenizer(args.tokenizer, args, config, held_out) if args.tokenizer else None
    run = Run(args, device, len(source), run_folder.inputs(args, source, held_out))
    if run.finished:
        return
    if args.target == "tokens" and tokenizer is None:                  # trained in the folder of the run
        path = train_dvae.train_for_pretraining(args, config.grid, run, len(source), device)
        tokenizer = load_tokenizer(path, args, config, held_out)
    model = build_model(args, config, tokenizer, device)
    views, val_views = open_views(args, config, source, held_out, tokenizer)
    collate_views = partial(collate, predict=args.predict)
    if args.masking != "none":
        bound = "" if args.exact_masks else "more than "
        num_masked = number_to_mask(args.mask_ratio, config.grid)
        launch.say(f"{bound}{num_masked} of {math.prod(config.grid)} patches are masked")
    images, token_images, mask, _ = to_device(data.sample_batch(val_views, 12, collate_views), device)
    look = partial(plots.predictions, model, tokenizer, images, token_images, mask)
    gallery = plots.Gallery("predictions.png", look, plots.figure_predictions, measure="val_loss")
    network = run.prepare(model, parameter_groups(model, args.weight_decay),
                          evaluate=partial(evaluate, model, tokenizer, val_views, args, device),
                          evaluate_first=True, log_prefix="", gallery=gallery)
    for batch in run.batches(views, collate_views):
        images, token_images, mask, places = to_device(batch, device)
        with run.autocast():
            z = targets_at(places, images, token_images, model, tokenizer)    # argmax q(z | x), or pixels
            logits = network(images, mask, places)                     # of p(z' | x^M), (M, V)
        loss, accuracy = loss_and_accuracy(logits, z)                  # Eq. 1, which is Eq. 3, stage 2
        run.update(loss, count=1.0 if args.exact_masks else len(z), accuracy=accuracy)
    report = run.finish(model, {"vit": dataclasses.asdict(config), "vocab_size": model.lm_head.out_features})
    if report["val_loss"] > report["unigram_entropy" if tokenizer else "mean_loss"]:
        launch.say("warning: val_loss is above the loss of a prediction that ignores the image")


def targets_at(places, images, token_images, model, tokenizer):
    """What the model should predict at `places`, M flat indices into (B, h, w).

    Returns the visual tokens z_i, int64 (M,), or without a tokenizer normalised pixels, float (M, 3 P P).
    """
    if tokenizer:
        return tokenizer.tokenize(token_images, places)
    return model.patch_pixels(images).flatten(0, 2)[places]


def loss_and_accuracy(outputs, targets):
    """The loss and the accuracy of a prediction, both means over the M predicted patches.

    For tokens, targets int64 (M,): -log p(z_i | x^M) in nats, and how often the likeliest token is correct.
    Eq. 1 maximises the sum of log p(z_i | x^M) over masked patches and images; the mean has the same maximum.
    For pixels, targets float (M, 3 P P): the squared error (Table 4), and None.
    """
    outputs = outputs.float()
    if targets.dtype == torch.int64:
        return F.cross_entropy(outputs, targets), (outputs.argmax(-1) == targets).float().mean()
    return F.mse_loss(outputs, targets), None


@torch.no_grad()
def evaluate(model, tokenizer, views, args, device):
    """Measure a masked image model on 512 held-out images, together with baselines that ignore the image.

    val_loss, val_accuracy   of the model, as loss_and_accuracy returns them
    chance_loss              ln V
    unigram_entropy          the loss of predicting the token frequencies for every patch
    majority_accuracy        the accuracy of always predicting the most frequent token
    val_pixel_error          of the decoded prediction, as pixel_error returns it
    mean_loss                without a tokenizer: the loss of always predicting the colour pixel_mean
    """
    model.eval()
    means, counts = launch.Means(), 0
    for batch in data.val_loader(views, args, device, partial(collate, predict=args.predict), num_images=512):
        images, token_images, mask, places = to_device(batch, device)
        scores = {}
        with launch.autocast(args.precision, device):
            outputs = model(images, mask, places)
            tokens = tokenizer.tokenize(token_images) if tokenizer else None    # (B, h, w), for both numbers
            targets = tokens.flatten()[places] if tokenizer else targets_at(places, images, None, model, None)
            if tokenizer and tokenizer.decoder:
                error = pixel_error(tokenizer, token_images, tokens, outputs.argmax(dim=-1), places)
                scores["val_pixel_error"] = error
        scores["val_loss"], accuracy = loss_and_accuracy(outputs, targets)
        if tokenizer:
            scores["val_accuracy"] = accuracy
            counts += torch.bincount(targets, minlength=tokenizer.vocab_size).cpu()
        else:                                                          # pixel_mean is 0 when normalised
            scores["mean_loss"] = targets.square().mean()
        means.add(len(targets), **scores)
    report = means.compute()
    if tokenizer:
        counts = sum(launch.all_gather(counts))                        # of all processes
        report |= {"chance_loss": math.log(tokenizer.vocab_size),
                   "unigram_entropy": math.log(train_dvae.perplexity(counts)),
                   "majority_accuracy": (counts.max() / counts.sum()).item()}
    return report


def pixel_error(tokenizer, token_images, tokens, predicted, places):
    """The squared error of the decoded prediction per RGB value in [0, 1], mean over M patches.

    predicted: the tokens of the patches at `places`, int64 (M,). Elsewhere `tokens` (B, h, w) are decoded.
    """
    decoded = tokens.flatten().index_copy(0, places, predicted).view_as(tokens)
    error = (tokenizer.decode(decoded) - token_images).square().mean(dim=1)    # (B, H, W)
    return F.avg_pool2d(error, tokenizer.downsample).flatten()[places].mean()


def load_tokenizer(path, args, config, held_out):
    """The tokenizer in a file. Raises UserError if it gives all patches of eight images the same token."""
    tokenizer = weights.load_tokenizer(path)
    train_dvae.compare_sizes(tokenizer, config.grid)
    _, views = open_views(args, config, held_out, held_out, tokenizer)    # only the held-out views are needed
    images = data.to_float(data.sample_batch(views, 8)["token_image"])
    if tokenizer.tokenize(images).unique().numel() == 1:
        raise launch.UserError(f"--tokenizer: {path} gives all patches of {len(images)} images one token; "
                               "use a tokenizer that distinguishes patches, or --target pixels")
    return tokenizer


def build_model(args, config, tokenizer, device):
    """A model that predicts the tokenizer's codes, or pixels without one. Both are moved to the device."""
    outputs = tokenizer.vocab_size if tokenizer else 3 * config.patch_size ** 2
    if tokenizer:
        tokenizer.to(device, memory_format=torch.channels_last)
        if args.compile:
            tokenizer.forward_features = torch.compile(tokenizer.forward_features)
    torch.manual_seed(args.seed)
    model = vit.MaskedImageModel(config, outputs).to(device)
    model.checkpoint_blocks = args.checkpoint_blocks
    return model


def open_views(args, config, source, held_out, tokenizer):
    """(training, held-out) data.Views. The tokenizer's view has the size that gives one token per patch."""
    num_masked = number_to_mask(args.mask_ratio, config.grid)
    options = {}
    if args.masking == "blockwise":
        options = dict(exact=args.exact_masks, log_aspect=args.log_aspect)
    draw_mask = partial(MASKS[args.masking], config.grid, num_masked, **options)
    token_size = config.grid[0] * tokenizer.downsample if tokenizer else None
    make_views = partial(data.Views, image_size=args.image_size, token_size=token_size, seed=args.seed,
                         draw_mask=draw_mask, crop_scale=args.crop_scale, jitter=args.jitter)
    return make_views(source, train=True), make_views(held_out, train=False)


def collate(samples, predict):
    """A batch of data.Views, with the patches to predict as flat indices into (B, h, w), int64 (M,).

    The indices are found here, on the CPU, because nonzero on a GPU would wait for all work before it.
    """
    batch = default_collate(samples)
    predicted = batch["mask"] if predict == "masked" else torch.ones_like(batch["mask"])
    batch["places"] = predicted.flatten().nonzero()[:, 0]
    return batch


def to_device(batch, device):
    """(images, the tokenizer's view or None, mask, places) on the device, images as floats in [0, 1]."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    token_images = data.to_float(batch["token_image"]) if "token_image" in batch else None
    return data.to_float(batch["image"]), token_images, batch["mask"], batch["places"]


def main():
    launch.start(parse_args, train)


if __name__ == "__main__":
    main()
