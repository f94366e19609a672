"""Masked image modeling (sec. 2.3): pre-train a transformer to predict the visual tokens of masked patches.

`python pretrain.py` does everything on built-in data. The paper's run, with DALL-E's tokenizer:
`torchrun --nproc_per_node=16 pretrain.py --data IMAGENET --tokenizer encoder.pkl`.
B images, h w patches and visual tokens, V codes, M places to predict in the batch.
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
                         "without, one is trained in <out>/tokenizer"] = None
    tokenizer_preset: Annotated[Literal["demo", "small", "base"], "of dvae.py, without --tokenizer"] = "small"
    tokenizer_steps: Annotated[int | None, "its steps; at most this run's if not given", (1, inf)] = None
    masking: Annotated[Literal["blockwise", "random", "none"], "Algorithm 1, or as in Table 4"] = "blockwise"
    mask_ratio: Annotated[float, "share of masked patches; at most 75 of 196 (sec. 2.5): 0.383", (0, 1)] = 0.4
    exact_masks: Annotated[bool, "the same number in each image; --no-exact-masks: Algorithm 1"] = True
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
    """The backbone of vit.PRESETS with the optimisation of Table 12."""
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


def loss_and_accuracy(outputs, targets):
    """Means over the M predicted places.

    Tokens, targets (M,) int64: -log p(z_i | x^M) in nats (Eq. 1), and how often the likeliest token is right.
    Pixels, targets (M, C P P): squared error (Table 4), and no accuracy (nan).
    """
    outputs = outputs.float()
    if targets.dtype == torch.int64:
        return F.cross_entropy(outputs, targets), (outputs.argmax(-1) == targets).float().mean()
    return F.mse_loss(outputs, targets), outputs.new_tensor(math.nan)


def draw_mask_of(config):
    """The function rng -> bool ndarray (h, w) that --masking names."""
    blockwise = partial(blockwise_mask, exact=config.exact_masks, log_aspect=config.log_aspect)
    draw = {"blockwise": blockwise, "random": random_mask, "none": no_mask}[config.masking]
    return partial(draw, config.grid, config.num_masked)


def no_mask(grid, num_masked, rng):
    """Nothing masked (ablation of Table 4): False everywhere, (h, w)."""
    return np.zeros(grid, dtype=bool)


def collate(samples, predict):
    """Samples of data.Views as a batch, with the places to predict: int64 (M,) indices into B h w.

    They are counted here, on the CPU, since nonzero on a GPU synchronises.
    """
    *views, mask = default_collate(samples)
    wanted = mask if predict == "masked" else torch.ones_like(mask)
    return *views, mask, wanted.flatten().nonzero()[:, 0]


def unpack(batch, device):
    """(images, the tokenizer's view or None, mask, places) on the device, images as floats in [0, 1]."""
    images, *token_images, mask, places = (tensor.to(device, non_blocking=True) for tensor in batch)
    return data.to_float(images), data.to_float(token_images[0]) if token_images else None, mask, places


def open_batches(config, device, run, source, held_out, tokenizer):
    """(iterator over training batches, functions that give held-out batches, and one to look at)."""
    token_size = config.grid[0] * tokenizer.downsample if tokenizer else None      # one token for each patch
    make_views = partial(data.Views, image_size=config.image_size, token_size=token_size, seed=config.seed,
                         draw_mask=draw_mask_of(config), crop_scale=config.crop_scale, jitter=config.jitter)
    views, val_views = make_views(source, train=True), make_views(held_out, train=False)
    gather = partial(collate, predict=config.predict)
    return (iter(data.train_loader(views, config, device, run.start, run.steps, gather)),
            partial(data.val_loader, val_views, config, device, gather, images=512),
            partial(data.some_samples, val_views, 12, device, gather))


def tokenizer_config(config, images, steps):
    """The dvae.Config of <out>/tokenizer, for a run of so many training images and steps."""
    preset, world = dvae.PRESETS[config.tokenizer_preset], training.world_size()
    batch_size = math.ceil(min(preset["batch_size"], config.batch_size) / world) * world
    same = ("data", "data_root", "seed", "workers", "device", "precision", "compile")
    wanted = training.build(dvae.Config, {
        **preset, **{name: getattr(config, name) for name in same}, "preset": config.tokenizer_preset,
        "out": str(Path(config.out) / "tokenizer"), "batch_size": batch_size,
        "lr": preset["lr"] * batch_size / preset["batch_size"],
        "image_size": config.grid[0] * 2 ** (preset.get("groups", dvae.Config.groups) - 1)})
    most = min(steps, training.steps_and_epoch(wanted, images)[0])
    return dataclasses.replace(wanted, steps=config.tokenizer_steps or most)


@torch.no_grad()
def evaluate(model, batches, tokenizer, precision, device):
    """(report, baselines) on the held-out images of all processes: val_loss and val_accuracy, and what is
    reached without looking at the image.

    chance_loss: ln V. unigram_entropy: the loss of predicting the token frequencies. majority_accuracy: of
    predicting the most frequent token. mean_loss: of predicting the mean colour, with pixels.
    """
    model.eval()
    counts = torch.zeros(tokenizer.vocab_size if tokenizer else 1, device=device)
    sums = torch.zeros(4, device=device)
    for batch in batches:
        images, token_images, mask, places = unpack(batch, device)
        with precision.autocast():
            targets = tokenizer.tokenize(token_images) if tokenizer else model.patch_pixels(images)
            logits = model(images, mask, places)
        targets = targets.flatten(0, 2)[places]
        loss, accuracy = loss_and_accuracy(logits, targets)
        if tokenizer:
            counts += torch.bincount(targets, minlength=len(counts))
        square = targets.float().square().mean()                       # loss of 0, the mean colour
        sums += len(targets) * torch.stack([loss, accuracy, square, torch.ones_like(loss)])
    training.all_sum(counts)
    training.all_sum(sums)
    loss, accuracy, square, _ = (sums / sums[-1]).tolist()
    if not tokenizer:
        return {"val_loss": loss}, {"mean_loss": square}
    return {"val_loss": loss, "val_accuracy": accuracy}, {
        "chance_loss": math.log(tokenizer.vocab_size), "unigram_entropy": math.log(dvae.perplexity(counts)),
        "majority_accuracy": (counts.max() / counts.sum()).item()}


def build_model(config, tokenizer, device):
    """A model that predicts the tokenizer's codes, or pixels without one. Moves both to the device."""
    outputs = config.in_channels * config.patch_size ** 2
    if tokenizer:
        outputs = tokenizer.vocab_size
        tokenizer.to(device, memory_format=torch.channels_last)
        if config.compile:
            tokenizer.features = torch.compile(tokenizer.features)
    torch.manual_seed(config.seed)
    model = vit.MaskedImageModel(config.backbone, outputs).to(device)
    model.checkpoint_blocks = config.checkpoint_blocks
    return model


def train(config, device):
    """Pre-train in the folder config.out, or continue there: views -> tokens -> logits -> loss -> step.

    Leaves metrics.jsonl, last.pt, model.pt, result.json, predictions.png; <out>/tokenizer if it trained one.
    """
    source, held_out = data.open_splits(config.data, config.data_root)
    total, per_epoch = training.steps_and_epoch(config, len(source))
    tokenizer = weights.load_tokenizer(config.tokenizer) if config.tokenizer else None
    needs_tokenizer = config.target == "tokens" and not tokenizer
    its_config = tokenizer_config(config, len(source), total) if needs_tokenizer else None
    run = training.Run(config, device, total)
    if run.finished:
        training.say(f"{run.folder} is finished; --fresh starts over")
        return
    if its_config:
        tokenizer = weights.load_tokenizer(dvae.train(its_config, device))
    model = build_model(config, tokenizer, device)
    optimizer = torch.optim.AdamW(training.parameter_groups(model, config.weight_decay), fused=True)
    precision = training.Precision(config.precision, device)
    parts = dict(model=model, optimizer=optimizer, scaler=precision.scaler)
    run.restore(**parts)
    network = training.distribute(torch.compile(model) if config.compile else model, device)
    batches, held_out_batches, look = open_batches(config, device, run, source, held_out, tokenizer)
    training.say(f"{config.num_masked} of {math.prod(config.grid)} patches masked; {total} steps of "
                 f"{config.batch_size} images, {total / per_epoch:.3g} epochs, peak lr {config.lr:g}; "
                 f"{training.world_size()} x {device}, {precision.dtype}")
    report, baselines = {}, {}
    for step in run.progress("pretrain"):
        training.seed_step(config.seed, step)
        lr = training.warmup_cosine(step, total, config.lr, config.min_lr, config.warmup * total)
        training.set_lr(optimizer, lr)
        model.train()
        sums = torch.zeros(2, device=device)
        for part in range(config.accumulate):
            images, token_images, mask, places = unpack(next(batches), device)
            with training.accumulating(network, part, config.accumulate):
                with precision.autocast():
                    targets = tokenizer.tokenize(token_images) if tokenizer else model.patch_pixels(images)
                    logits = network(images, mask, places)             # of p(z' | x^M), (M, V)
                loss, accuracy = loss_and_accuracy(logits, targets.flatten(0, 2)[places])      # Eq. 1
                precision.backward(loss / config.accumulate)
            sums += torch.stack([loss, accuracy]).detach()
        loss, accuracy = run.exchange(step + 1, sums / config.accumulate)
        grad_norm = precision.update(optimizer, config.clip_grad)
        scores = {"loss": loss, "accuracy": accuracy} if tokenizer else {"loss": loss}
        if step == 0 or (step + 1) % config.eval_every == 0 or step + 1 == total:
            report, baselines = evaluate(model, held_out_batches(), tokenizer, precision, device)
            scores |= {**baselines, **report}
        run.log(step + 1, lr=lr, grad_norm=grad_norm, **scores)
        run.end_of_step(step + 1, **parts)

    if not report:    # the run was stopped between its last step and result.json
        report, baselines = evaluate(model, held_out_batches(), tokenizer, precision, device)
    training.say(f"held-out images: {training.in_words({**report, **baselines})}")
    kept = {"vit": dataclasses.asdict(config.backbone), "vocab_size": model.lm_head.out_features}
    run.finish(model, kept, **report, **baselines)
    if training.rank() == 0:
        images, token_images, mask, _ = unpack(look(), device)
        columns, right = visualize.predictions(model, images, mask, tokenizer, token_images)
        visualize.figure_predictions(columns, mask, right).savefig(run.folder / "predictions.png")


def main():
    training.run_script(Config, PRESETS, train)


if __name__ == "__main__":
    main()
