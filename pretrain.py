"""Masked image modeling (sec. 2.3): pre-train a transformer to predict the visual tokens of masked patches.

`python pretrain.py` does everything on built-in data. The paper's run, with DALL-E's tokenizer:
`torchrun --nproc_per_node=16 pretrain.py --data IMAGENET --tokenizer encoder.pkl`.
A batch of B images has a grid of h x w patches and tokens each, and M patches to predict; V codes.
"""
import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

import data
import dvae
import training
import visualize
import vit
import weights
from masking import blockwise_mask, random_mask


@dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig, vit.ViTConfig):
    """Flags of pretrain.py."""
    tokenizer: Annotated[str | None, "model.pt of dvae.py, or DALL-E's encoder.pkl beside its decoder.pkl; "
                         "if omitted, one is trained in <out>/tokenizer"] = None
    tokenizer_preset: Annotated[Literal[tuple(dvae.PRESETS)], "of the tokenizer that is trained"] = "small"
    tokenizer_steps: Annotated[int | None, "of its training; by default the preset's, or as many as this run",
                               (1, inf)] = None
    masking: Annotated[Literal["blockwise", "random", "none"], "Algorithm 1, or as in Table 4"] = "blockwise"
    mask_ratio: Annotated[float, "share of masked patches; 0.383 gives the 75 of sec. 2.5", (0, 1)] = 0.4
    exact_masks: Annotated[bool, "mask the same number in each image; otherwise as Algorithm 1 stops"] = True
    log_aspect: Annotated[bool, "log-uniform aspect ratio of blocks, as in the released code"] = False
    target: Annotated[Literal["tokens", "pixels"], "pixels: regress a patch's pixels (Table 4)"] = "tokens"
    predict: Annotated[Literal["masked", "all"], "all: recover 100 % of the targets (Table 4)"] = "masked"
    crop_scale: Annotated[float, "smallest share of an image's area in a random crop", (1e-6, 1)] = 0.08
    jitter: Annotated[float, "share by which brightness, contrast, saturation vary (Table 12)", (0, 1)] = 0.4
    checkpoint_blocks: Annotated[bool, "recompute blocks in the backward pass, to save memory"] = False
    eval_every: Annotated[int, "steps between two evaluations on held-out images", (1, inf)] = 10_000

    def __post_init__(self):
        super().__post_init__()
        N = math.prod(self.grid)
        most = N - 1 if self.exact_masks else N - 2
        vit.check(1 <= self.num_masked <= most, "mask_ratio: between 0 and 1, so that some of the "
                  f"{N} patches are masked and some are not, not {self.mask_ratio}")
        vit.check(self.masking != "none" or (self.predict == "all" and self.target == "tokens"),
                  "masking: none leaves nothing to learn without --predict all and --target tokens")
        blockwise = self.masking == "blockwise"
        vit.check(blockwise or not self.log_aspect, "log_aspect: only with --masking blockwise")
        vit.check(blockwise or self.exact_masks, "no_exact_masks: only with --masking blockwise")
        vit.check(self.target == "tokens" or not self.tokenizer, "tokenizer: not used with --target pixels")
        vit.check(not self.tokenizer_steps or (self.target == "tokens" and not self.tokenizer),
                  "tokenizer_steps: not used with --tokenizer or --target pixels")

    @property
    def num_masked(self):
        return int(self.mask_ratio * math.prod(self.grid))


def table_12(name, **more):
    """A backbone of vit.PRESETS and the numbers of Table 12 that are no defaults of flags."""
    size = {field: getattr(vit.PRESETS[name], field) for field in ("dim", "depth", "heads")}
    return dict(**size, epochs=800.0, batch_size=2048, lr=1.5e-3, **more)


PRESETS = {
    "demo": dict(epochs=2.2, batch_size=32, lr=2e-3, min_lr=2e-5, warmup=0.1, image_size=64, patch_size=8,
                 dim=128, depth=4, heads=4, drop_path=0.0, position="shared_relative", layer_scale=0.1,
                 crop_scale=0.6, jitter=0.0, tokenizer_preset="demo", log_every=1, save_every=100,
                 eval_every=1000),
    "tiny": table_12("tiny"), "small": table_12("small"), "base": table_12("base"),
    "large": table_12("large", clip_grad=1.0),
}


def targets_of(images, token_images, places, model, tokenizer):
    """What is to be predicted at M places: tokens z_i, int64 (M,), or pixels, float (M, C P P)."""
    if tokenizer:
        return tokenizer.tokenize(token_images, places)
    return model.patch_pixels(images).flatten(0, 2)[places]


def loss_and_accuracy(outputs, targets):
    """Returns the loss and the accuracy, means over the M predicted patches.

    With tokens as targets, int64 (M,): -log p(z_i | x^M) in nats (Eq. 1), and how often the likeliest token
    is right. With pixels, float (M, C P P): the squared error (Table 4), and nan.
    """
    outputs = outputs.float()
    if targets.dtype == torch.int64:
        return F.cross_entropy(outputs, targets), (outputs.argmax(-1) == targets).float().mean()
    return F.mse_loss(outputs, targets), outputs.new_tensor(math.nan)


def draw_mask_of(config):
    """Returns the function of --masking: rng -> bool ndarray (h, w)."""
    if config.masking == "none":
        return lambda rng: np.zeros(config.grid, dtype=bool)
    draw = random_mask
    if config.masking == "blockwise":
        draw = partial(blockwise_mask, exact=config.exact_masks, log_aspect=config.log_aspect)
    return partial(draw, config.grid, config.num_masked)


def collate(samples, predict):
    """A batch of data.Views, with the patches to predict as flat indices into (B, h, w), int64 (M,).

    The indices are found here, on the CPU, because nonzero on a GPU synchronises.
    """
    *views, mask = default_collate(samples)
    predicted = mask if predict == "masked" else torch.ones_like(mask)
    return *views, mask, predicted.flatten().nonzero()[:, 0]


def to_device(batch, device):
    """(images, the tokenizer's view or None, mask, places) on the device, images as floats in [0, 1]."""
    *views, mask, places = (tensor.to(device, non_blocking=True) for tensor in batch)
    images, token_images = [data.to_float(view) for view in views] + [None] * (2 - len(views))
    return images, token_images, mask, places


def open_views(config, source, held_out, tokenizer):
    """(training, held-out) data.Views; the tokenizer's view has the size that gives a token per patch."""
    token_size = config.grid[0] * tokenizer.downsample if tokenizer else None
    make_views = partial(data.Views, image_size=config.image_size, token_size=token_size, seed=config.seed,
                         draw_mask=draw_mask_of(config), crop_scale=config.crop_scale, jitter=config.jitter)
    return make_views(source, train=True), make_views(held_out, train=False)


def tokenizer_config(config, images, steps):
    """The dvae.Config of the tokenizer to train for this run, of so many training images and steps."""
    preset, world = dvae.PRESETS[config.tokenizer_preset], training.world_size()
    batch_size = math.ceil(min(preset["batch_size"], config.batch_size) / world) * world
    shared = ("data", "data_root", "seed", "workers", "device", "precision", "compile")
    tokenizer = training.build(dvae.Config, {
        **preset, **{name: getattr(config, name) for name in shared}, "preset": config.tokenizer_preset,
        "out": str(Path(config.out) / "tokenizer"), "batch_size": batch_size,
        "lr": preset["lr"] * batch_size / preset["batch_size"],
        "image_size": config.grid[0] * 2 ** (preset.get("groups", dvae.Config.groups) - 1)})
    most = min(steps, training.steps_and_epoch(tokenizer, images)[0])
    return dataclasses.replace(tokenizer, steps=config.tokenizer_steps or most)


def check_tokens(tokenizer, config, held_out):
    """UserError if all patches of eight held-out images have the same token: nothing could be learned."""
    _, views = open_views(config, held_out, held_out, tokenizer)
    images = data.some_samples(views, 8)[1]
    if tokenizer.tokenize(data.to_float(images)).unique().numel() == 1:
        raise training.UserError(f"--tokenizer: all patches of {len(images)} held-out images have the same "
                                 "token; one that tells them apart is needed, or --target pixels")


@torch.no_grad()
def evaluate(model, batches, tokenizer, precision, device):
    """Measures val_loss, val_accuracy and baselines that ignore the image, on all processes' held-out images.

    chance_loss is ln V, unigram_entropy the loss of predicting the token frequencies, majority_accuracy the
    accuracy of predicting the most frequent token. With pixels, mean_loss is the loss of predicting the
    normalisation's mean colour.
    """
    model.eval()
    counts = torch.zeros(tokenizer.vocab_size if tokenizer else 1, device=device)
    sums = torch.zeros(4, device=device)
    for batch in batches:
        images, token_images, mask, places = to_device(batch, device)
        with precision.autocast():
            targets = targets_of(images, token_images, places, model, tokenizer)
            logits = model(images, mask, places)
        loss, accuracy = loss_and_accuracy(logits, targets)
        if tokenizer:
            counts += torch.bincount(targets, minlength=len(counts))
        square = targets.float().square().mean()                       # pixels: the loss of predicting 0
        sums += len(targets) * torch.stack([loss, accuracy, square, torch.ones_like(loss)])
    training.all_sum(counts)
    training.all_sum(sums)
    loss, accuracy, square, _ = (sums / sums[-1]).tolist()
    if not tokenizer:
        return {"val_loss": loss, "mean_loss": square}
    return {"val_loss": loss, "val_accuracy": accuracy, "chance_loss": math.log(tokenizer.vocab_size),
            "unigram_entropy": math.log(dvae.perplexity(counts)),
            "majority_accuracy": (counts.max() / counts.sum()).item()}


def build_model(config, tokenizer, device):
    """Returns a model that predicts the tokenizer's codes, or pixels without one, both on the device."""
    outputs = tokenizer.vocab_size if tokenizer else config.in_channels * config.patch_size ** 2
    if tokenizer:
        tokenizer.to(device, memory_format=torch.channels_last)
        if config.compile:
            tokenizer.forward_features = torch.compile(tokenizer.forward_features)
    torch.manual_seed(config.seed)
    model = vit.MaskedImageModel(config.backbone, outputs).to(device)
    model.checkpoint_blocks = config.checkpoint_blocks
    return model


def train(config, device):
    """Pre-train in the folder config.out, or continue there: views, mask -> tokens -> logits -> loss -> step.

    Leaves metrics.jsonl, last.pt, model.pt, result.json, predictions.png; <out>/tokenizer if it trained one.
    """
    source, held_out = data.open_splits(config.data, config.data_root)
    total, per_epoch = training.steps_and_epoch(config, len(source))
    tokenizer = weights.load_tokenizer(config.tokenizer) if config.tokenizer else None
    if tokenizer:
        training.on_first_process(partial(check_tokens, tokenizer, config, held_out))
    to_train = tokenizer_config(config, len(source), total)
    run = training.Run(config, device, total)
    if run.finished:
        return training.say(f"{run.folder} is finished; --fresh starts over")
    if not tokenizer and config.target == "tokens":
        tokenizer = weights.load_tokenizer(dvae.train(to_train, device))
        training.on_first_process(partial(check_tokens, tokenizer, config, held_out))
    model = build_model(config, tokenizer, device)
    optimizer = torch.optim.AdamW(training.parameter_groups(model, config.weight_decay), fused=True)
    precision = training.Precision(config.precision, device)
    parts = dict(model=model, optimizer=optimizer, scaler=precision.scaler)
    run.restore(**parts)
    network = training.distribute(torch.compile(model) if config.compile else model, device)
    views, val_views = open_views(config, source, held_out, tokenizer)
    gather = partial(collate, predict=config.predict)
    batches = iter(data.train_loader(views, config, device, run.start, total, gather))
    held_out_batches = partial(data.val_loader, val_views, config, device, gather, images=512)
    training.say(f"{config.num_masked} of {math.prod(config.grid)} patches masked; {total} steps of "
                 f"{config.batch_size} images, {total / per_epoch:.3g} epochs, peak lr {config.lr:g}; "
                 f"{training.world_size()} x {device}, {precision.dtype}")
    report = {}
    for step in run.progress("pretrain"):
        training.seed_step(config.seed, step)
        lr = training.warmup_cosine(step, total, config.lr, config.min_lr, config.warmup * total)
        training.set_lr(optimizer, lr)
        model.train()
        sums = torch.zeros(2, device=device)
        for part in range(config.accumulate):
            images, token_images, mask, places = to_device(next(batches), device)
            with training.accumulating(network, part, config.accumulate):
                with precision.autocast():
                    targets = targets_of(images, token_images, places, model, tokenizer)
                    logits = network(images, mask, places)             # of p(z' | x^M), (M, V)
                loss, accuracy = loss_and_accuracy(logits, targets)    # Eq. 1
                precision.backward(loss / config.accumulate)
            sums += torch.stack([loss, accuracy]).detach()
        loss, accuracy = run.all_reduce(step + 1, sums / config.accumulate)
        grad_norm = precision.update(optimizer, config.clip_grad)
        scores = {"loss": loss, "accuracy": accuracy} if tokenizer else {"loss": loss}
        report = {}
        if step == 0 or (step + 1) % config.eval_every == 0 or step + 1 == total:
            report = evaluate(model, held_out_batches(), tokenizer, precision, device)
        run.log(step + 1, lr=lr, grad_norm=grad_norm, **scores, **report)
        run.save_or_stop(step + 1, **parts)

    report = report or evaluate(model, held_out_batches(), tokenizer, precision, device)    # after a kill
    training.say(f"held-out images: {training.in_words(report)}")
    sizes = {"vit": dataclasses.asdict(config.backbone), "vocab_size": model.lm_head.out_features}
    run.finish(model, sizes, **report)
    if training.rank() == 0:
        batch = to_device(data.some_samples(val_views, 12, gather), device)
        training.draw_or_warn(draw, model, tokenizer, batch, run.folder / "predictions.png")


def draw(model, tokenizer, batch, path):
    """Write a picture of what the model predicts for a batch, as to_device gives it."""
    images, token_images, mask, _ = batch
    columns, right = visualize.predictions(model, images, mask, tokenizer, token_images)
    visualize.figure_predictions(columns, mask, right).savefig(path)


def main():
    training.run_script(Config, PRESETS, train)


if __name__ == "__main__":
    main()
