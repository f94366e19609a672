"""Masked image modeling: pre-train a Vision Transformer to predict the visual tokens of masked patches (sec. 2.3).

`python pretrain.py` does everything on built-in data; `torchrun --nproc_per_node=16 pretrain.py --data FOLDER` is the paper's.
B images, h w patches and as many tokens, V codes, M masked places in the batch.
"""
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch.profiler import record_function

import data
import dvae
import training
import vit
import weights


@dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig, vit.ViTConfig):
    """Masked image modeling"""
    tokenizer: str | None = None    # model.pt of `python dvae.py`, or DALL-E's encoder.pkl (and the decoder.pkl beside it, for pictures); without, one is trained first, in <out>/tokenizer
    tokenizer_preset: Literal["demo", "small", "base"] = "small"    # dvae.py preset of the tokenizer that is trained without --tokenizer
    tokenizer_steps: int | None = None    # its steps; default: its preset's, but no more than this run's
    token_image_size: int | None = None    # pixels a side of the tokenizer's view; default: the patch grid times what the tokenizer reduces by
    masking: Literal["blockwise", "random", "none"] = "blockwise"    # Algorithm 1, or one of the ablations of Table 4
    mask_ratio: float = 0.4    # share of the patches that is masked; released code: 0.383, 75 of 196
    exact_masks: bool = True    # the same number of masked patches in each image; --no-exact-masks: Algorithm 1 as printed
    log_aspect: bool = False    # log-uniform aspect ratio of blocks, as in the released code
    target: Literal["tokens", "pixels"] = "tokens"    # pixels: regress the normalised pixels of each patch (Table 4)
    predict: Literal["masked", "all"] = "masked"    # all: recover 100 % of the targets (Table 4)
    crop_scale: float = 0.08    # smallest share of an image's area in a random resized crop
    jitter: float = 0.4    # brightness, contrast and saturation vary by this share (appendix)
    checkpoint_blocks: bool = False    # compute each block again in the backward pass: slower, in less memory
    eval_every: int = 10_000    # steps between two evaluations on held-out images

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mask_ratio < 1 or not 1 <= self.num_masked <= math.prod(self.grid) - 1 - (not self.exact_masks):
            raise ValueError(f"mask_ratio: between 0 and 1 so that some of the {math.prod(self.grid)} patches are masked and "
                             f"some are not, not {self.mask_ratio}")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"crop_scale: above 0, up to 1, not {self.crop_scale}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter: from 0 to 1, not {self.jitter}")
        for name in ("eval_every", "tokenizer_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: at least 1, not {getattr(self, name)}")
        if self.masking == "none" and self.predict == "masked":
            raise ValueError("masking: none leaves nothing to predict with --predict masked; add --predict all")
        if self.masking == "none" and self.target == "pixels":
            raise ValueError("masking: none with --target pixels would only copy its input; blockwise or random")
        if self.masking != "blockwise" and (self.log_aspect or not self.exact_masks):
            raise ValueError(f"{'log_aspect' if self.log_aspect else 'no_exact_masks'}: only with --masking blockwise, not {self.masking}")
        if self.tokenizer and self.tokenizer_steps:
            raise ValueError("tokenizer_steps: not used with --tokenizer, which is trained already")
        if self.target == "pixels":
            for name in ("tokenizer", "tokenizer_steps", "token_image_size"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: not used with --target pixels")

    @property
    def num_masked(self):
        return int(self.mask_ratio * math.prod(self.grid))


def paper_preset(name, **more):
    """The backbone of vit.PRESETS with the paper's optimisation (appendix, "pre-training")."""
    size = vit.PRESETS[name]
    return dict(dim=size.dim, depth=size.depth, heads=size.heads, epochs=800.0, batch_size=2048, lr=1.5e-3, **more)


PRESETS = {
    "demo": dict(epochs=2.2, batch_size=32, lr=2e-3, min_lr=2e-5, warmup=0.1, image_size=64, patch_size=8, dim=128, depth=4,
                 heads=4, drop_path=0.0, position="shared_relative", layer_scale=0.1, crop_scale=0.6, jitter=0.0, tokenizer_preset="demo",
                 log_every=1, save_every=100, eval_every=1000),
    "tiny": paper_preset("tiny"),
    "small": paper_preset("small"),
    "base": paper_preset("base"),
    "large": paper_preset("large", clip_grad=1.0),
}


def patch_pixels(images, config):
    """The pixels of each patch, normalised as the model sees them: (B, C, H, W) in [0, 1] -> (B, h, w, C P P)."""
    P, (h, w) = config.patch_size, config.grid
    mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in (config.pixel_mean, config.pixel_std))
    patches = ((images - mean) / std).unflatten(3, (w, P)).unflatten(2, (h, P))    # (B, C, h, P, w, P)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)


def unpatch_pixels(patches, config):
    """The inverse of patch_pixels, cut to [0, 1]: (B, h, w, C P P) -> (B, C, H, W)."""
    P, C = config.patch_size, config.in_channels
    mean, std = (patches.new_tensor(values).view(1, -1, 1, 1) for values in (config.pixel_mean, config.pixel_std))
    images = patches.unflatten(3, (C, P, P)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return (images * std + mean).clamp(0, 1)


def loss_and_accuracy(outputs, targets):
    """Means over the M predicted places.

    Tokens, targets (M,) int64: -log p(z_i | x^M), i in M, in nats (sec. 2.3), and the share of places where the most
    likely token is the right one. Pixels, targets (M, C P P): squared error (Table 4), and no accuracy (nan).
    """
    outputs = outputs.float()
    if targets.dtype == torch.int64:
        return F.cross_entropy(outputs, targets), (outputs.argmax(-1) == targets).float().mean()
    return F.mse_loss(outputs, targets), outputs.new_tensor(math.nan)


def tokenizer_config(config, images, steps):
    """What `dvae.py` would be told to train a tokenizer in <out>/tokenizer, for a run of that many images and steps."""
    preset = dvae.PRESETS[config.tokenizer_preset]
    world = training.world_size()
    batch_size = math.ceil(min(preset["batch_size"], config.batch_size) / world) * world
    shared = {name: getattr(config, name) for name in ("data", "data_root", "seed", "workers", "device", "precision", "compile")}
    wanted = training.build(dvae.Config, {
        **preset, **shared, "preset": config.tokenizer_preset, "out": str(Path(config.out) / "tokenizer"),
        "batch_size": batch_size, "lr": preset["lr"] * batch_size / preset["batch_size"],
        "image_size": config.grid[0] * 2 ** (preset.get("groups", dvae.Config.groups) - 1)})
    return dataclasses.replace(wanted, steps=config.tokenizer_steps or min(steps, training.steps_and_epoch(wanted, images)[0]))


def token_image_size(config, downsample):
    """Pixels a side of the tokenizer's view, so that its grid is the patches'. UserError where --token-image-size breaks that."""
    fits = config.grid[0] * downsample
    if config.token_image_size not in (None, fits):
        tokens = config.token_image_size / downsample
        raise training.UserError(f"--token-image-size: {config.token_image_size} makes a {tokens:g}x{tokens:g} token grid, the patch "
                                 f"grid is {config.grid[0]}x{config.grid[1]}; {fits} matches")
    return fits


# ---------------------------------------------------------------------------------------------------------------------
# Held-out images
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, batches, config, tokenizer, precision, device, unreadable):
    """Loss and accuracy over held-out images of all processes, and what knows nothing of the image reaches: `chance_loss`
    ln V; `unigram_entropy`, the loss of always answering with the tokens' frequencies; `majority_accuracy`, the accuracy
    of always answering with the most frequent one. Pixels: `mean_loss`, of always answering with the mean colour."""
    model.eval()
    sums, counts = torch.zeros(4, device=device), torch.zeros(tokenizer.vocab_size if tokenizer else 1, device=device)
    for batch in batches:
        unreadable.warn(batch[-1])
        images, mask, places, targets = inputs_and_targets(batch, config, tokenizer, device)
        with precision.autocast():
            outputs = model(images, mask, places)
        loss, accuracy = loss_and_accuracy(outputs, targets)
        if tokenizer:
            counts += torch.bincount(targets, minlength=tokenizer.vocab_size)
        variance = torch.zeros_like(loss) if tokenizer else targets.square().mean()
        sums += len(targets) * torch.stack([loss, accuracy, variance, torch.ones_like(loss)])
    training.all_sum(sums), training.all_sum(counts)
    loss, accuracy, variance, _ = (sums / sums[-1]).tolist()
    if not tokenizer:
        return {"val_loss": loss}, {"mean_loss": variance}
    share = counts.double() / counts.sum()
    return {"val_loss": loss, "val_accuracy": accuracy}, {
        "chance_loss": math.log(tokenizer.vocab_size), "unigram_entropy": math.log(dvae.perplexity(counts)),
        "majority_accuracy": share.max().item()}


def inputs_and_targets(batch, config, tokenizer, device):
    """images (B, 3, H, W), mask (B, h, w) bool, the M places to predict, int64 into B h w, and their targets."""
    predict = batch[-2] if config.predict == "masked" else torch.ones_like(batch[-2])
    places = predict.flatten().nonzero()[:, 0]                         # on the CPU: for a GPU's answer one would have to wait
    images, *token_images, colours, mask, places = (tensor.to(device, non_blocking=True) for tensor in (*batch[:-1], places))
    images = data.to_float(images, colours)
    if tokenizer:
        with record_function("tokenizer"):
            targets = tokenizer.tokenize(data.to_float(token_images[0], colours))                        # (B, h, w)
    else:
        targets = patch_pixels(images, config)                         # (B, h, w, C P P)
    return images, mask, places, targets.flatten(0, 2)[places]         # (M,) tokens or (M, C P P) pixels


@torch.no_grad()
def predictions(model, batch, config, tokenizer, device):
    """What draw_predictions shows, title -> (B, 3, ., .): the images, masked patches grey, the true tokens decoded (not with
    pixels as target), and the prediction, which keeps the truth where the model could see. With a tokenizer that has no
    decoder, the last two give way to the patches whose token the model saw or found."""
    images, *token_images, colours, mask = (tensor.to(device) for tensor in batch[:-1])
    images = data.to_float(images, colours)
    outputs = model.eval()(images, mask, torch.ones_like(mask)).unflatten(0, mask.shape)                 # (B, h, w, V)
    shown = mask if config.predict == "masked" else torch.ones_like(mask)

    def without(places):
        places = places.repeat_interleave(config.patch_size, 1).repeat_interleave(config.patch_size, 2)[:, None]
        return torch.where(places, 0.5, images)                        # (B, 3, H, W)
    columns = {"original": images, "masked": without(mask)}
    if not tokenizer:
        pixels = torch.where(shown[..., None], outputs.float(), patch_pixels(images, config))
        return {**columns, "prediction": unpatch_pixels(pixels, config)}
    tokens = tokenizer.tokenize(data.to_float(token_images[0], colours))
    predicted = torch.where(shown, outputs.argmax(-1), tokens)
    if tokenizer.decoder is None:
        return {**columns, "right tokens": without(predicted != tokens)}
    return {**columns, "tokenizer at best": tokenizer.decode(tokens), "prediction": tokenizer.decode(predicted)}


def draw_predictions(columns):
    """A figure of columns, title -> (B, 3, ., .) in [0, 1]: one image a row, two rows side by side."""
    count = len(columns["original"])
    rows = math.ceil(count / 2)
    from matplotlib.figure import Figure                # here, where it is used: data.py says why
    figure = Figure(figsize=(11, 1.4 * rows + 0.4), layout="constrained")
    for half, side in enumerate(figure.subfigures(1, 2, wspace=0.03)):
        axes = side.subplots(rows, len(columns), squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for row in range(rows):
            for column, (label, pictures) in enumerate(columns.items()):
                if row == 0:
                    axes[row][column].set_title(label, fontsize=10)
                if half * rows + row < count:
                    axes[row][column].imshow(pictures[half * rows + row].permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training
# ---------------------------------------------------------------------------------------------------------------------

def open_tokenizer(config, images, steps):
    """(the tokenizer of --tokenizer or None, the config of the one to train instead or None, pixels a side of its view or
    None), for a run of that many images and steps. UserError where it does not fit; nothing is trained or written yet."""
    if config.target == "pixels":
        return None, None, None
    if config.tokenizer:
        tokenizer = weights.load_tokenizer(config.tokenizer)
        return tokenizer, None, token_image_size(config, tokenizer.downsample)
    to_train = tokenizer_config(config, images, steps)
    return None, to_train, token_image_size(config, 2 ** (to_train.groups - 1))


def make_views(config, source, held_out, token_size):
    """The training and the held-out data.Views: patches' view, tokenizer's view (none for pixels), mask."""
    sizes = [config.image_size] + ([token_size] if token_size else [])
    return [data.Views(images, sizes, config.grid, num_masked=config.num_masked, masking=config.masking, seed=config.seed,
                       train=train, crop_scale=config.crop_scale, jitter=config.jitter, exact=config.exact_masks,
                       log_aspect=config.log_aspect) for images, train in ((source, True), (held_out, False))]


def train(config, device):
    """Pre-train in the folder config.out, or continue there: views -> tokens -> mask -> logits -> loss -> step (sec. 2.3).

    Leaves metrics.jsonl, last.pt, model.pt, predictions.png and result.json, and <out>/tokenizer if it trained one. UserError,
    before anything is written, for data, a tokenizer or an --out that do not fit the config.
    """
    with training.naming_flags():
        source, held_out = data.open_splits(config.data, config.data_root)
    total, per_epoch = training.steps_and_epoch(config, len(source))
    tokenizer, to_train, token_size = open_tokenizer(config, len(source), total)
    run = training.Run(config, device, total)
    if run.finished:
        return training.say(f"{run.folder} is finished; --fresh starts over")
    if to_train:
        tokenizer = weights.load_tokenizer(dvae.train(to_train, device))
    precision = training.Precision(config.precision, device)
    if tokenizer:
        tokenizer.for_tokenizing(device, precision.dtype)

    torch.manual_seed(config.seed)
    model = vit.MaskedImageModel(config.backbone, tokenizer.vocab_size if tokenizer else config.in_channels * config.patch_size ** 2)
    model.to(device).checkpoint_blocks = config.checkpoint_blocks
    optimizer = training.adamw(training.parameter_groups(model, config.weight_decay))
    parts = dict(model=model, optimizer=optimizer, scaler=precision.scaler)
    notes = run.restore(**parts)
    network = training.distribute(torch.compile(model) if config.compile else model, device)
    if tokenizer and config.compile:
        tokenizer.features = torch.compile(tokenizer.features)
    here = dict(rank=training.rank(), world_size=training.world_size())
    views, val_views = make_views(config, source, held_out, token_size)
    batches = run.batches(data.train_loader(views, config, device, start=run.start, stop=total, **here))
    unreadable = data.CorruptImages(len(source), training.say, notes.get("unreadable"))

    def evaluation():
        return evaluate(model, data.val_loader(val_views, config, device, **here), config, tokenizer, precision, device, unreadable)

    training.say(f"backbone: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, patches {config.grid[0]}x{config.grid[1]}, "
                 f"{config.num_masked} masked; {total} steps of {config.batch_size} images, {total / per_epoch:.3g} epochs, "
                 f"peak lr {config.lr:g}, {here['world_size']} x {device}, {str(precision.dtype).removeprefix('torch.')}")
    report, baselines = {}, notes.get("baselines", {})
    for step in run.progress("pretrain"):
        training.seed_step(config.seed, step)
        lr = training.set_lr(optimizer, training.warmup_cosine(step, total, config.lr, config.min_lr, config.warmup * total))
        model.train()
        sums, bad = torch.zeros(2, device=device), []
        for part in range(config.accumulate):
            batch = next(batches)
            images, mask, places, targets = inputs_and_targets(batch, config, tokenizer, device)
            with training.only_last_part_communicates(network, part, config.accumulate):
                with precision.autocast():
                    outputs = network(images, mask, places)            # (M, V): the head sees predicted places only
                loss, accuracy = loss_and_accuracy(outputs, targets)
                precision.backward(loss / config.accumulate)
            sums += torch.stack([loss, accuracy]).detach()
            bad += batch[-1]
        (loss, accuracy), bad = run.exchange(step + 1, sums / config.accumulate, bad)
        with training.naming_flags():
            unreadable.add(step // per_epoch, bad)
        grad_norm = precision.update(optimizer, config.clip_grad)
        report = {}
        if step == 0 or (step + 1) % config.eval_every == 0 or step + 1 == total:
            report, baselines = evaluation()
        run.log(step + 1, loss=loss, **({"accuracy": accuracy} if tokenizer else {}), lr=lr, grad_norm=grad_norm, **baselines, **report)
        run.end_of_step(step + 1, notes={"unreadable": unreadable.state(), "baselines": baselines}, **parts)

    report = report or evaluation()[0]                  # a run that was killed after its last step
    training.say(f"held-out images: {training.in_words({**report, **baselines})}")
    if training.rank() == 0:
        pictures = predictions(model, data.first_batch(val_views, 12, device), config, tokenizer, device)
        draw_predictions(pictures).savefig(run.folder / "predictions.png", dpi=100)
    run.finish(model, {"vit": dataclasses.asdict(config.backbone), "vocab_size": model.lm_head.out_features}, **report, **baselines,
               unreadable_images=len(unreadable.names))


def main():
    training.run_script(Config, PRESETS, train)


if __name__ == "__main__":
    main()
