"""Fine-tuning (sec. 2.6): classification and segmentation; and frozen features: linear probe, k-NN.

`python finetune.py` fine-tunes what `python pretrain.py` left; `torchrun --nproc_per_node=16 finetune.py
--data FOLDER` is the paper's. B images of H W pixels, C classes, L blocks, N patches, D width.
"""
import dataclasses
import math
import textwrap
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset
from torchvision.transforms import v2

import data
import training
import visualize
import vit
import weights
from training import UserError


@dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig, vit.ViTConfig):
    """Flags of finetune.py."""
    task: Annotated[Literal["classification", "segmentation", "probe", "knn"],
                    "probe, knn: of the frozen features of each layer"] = "classification"
    init: Annotated[str, "model.pt or a released checkpoint; none: from scratch; default: what pretrain.py "
                         "left for the same --data"] = "none"
    labels: Annotated[int | None, "train on so many images, equally many of each class", (1, inf)] = None
    validate: Annotated[int | None, "hold out so many training images instead, to tune by", (1, inf)] = None
    eval: Annotated[bool, "only evaluate --init; default: what the same command without --eval left"] = False
    layer_decay: Annotated[float, "learning rate of a layer over that of the next", (1e-6, 1)] = 0.65
    ema: Annotated[float, "decay of the moving average of the weights, 0 = none", (0, 0.999999)] = 0.0
    label_smoothing: Annotated[float, "share of the target spread over all classes", (0, 1)] = 0.1
    crop_scale: Annotated[float, "smallest share of an image's area in a random crop", (1e-6, 1)] = 0.08
    randaugment: Annotated[float, "magnitude of RandAugment, 0 = none", (0, 10)] = 9.0
    mixup: Annotated[float, "alpha of mixup, 0 = none", (0, inf)] = 0.8
    cutmix: Annotated[float, "alpha of cutmix, 0 = none; with both, one at random", (0, inf)] = 1.0
    erasing: Annotated[float, "probability of erasing a rectangle", (0, 1)] = 0.25
    repeats: Annotated[int, "repeated augmentation: copies of each image in a batch; Table 13 has it for "
                            "base (DeiT: 3), the released code has not", (1, inf)] = 1
    eval_crop: Annotated[float, "side of the evaluated square over the shorter side", (1e-6, 1)] = 0.875
    scale: Annotated[tuple[float, float], "segmentation: shorter side over image size, before the crop",
                     (1e-6, inf)] = (0.5, 2.0)
    jitter: Annotated[float, "segmentation: contrast and saturation vary by this share, brightness by a "
                             "quarter of it, hue by a fifth", (0, 1)] = 0.5
    window: Annotated[Literal["sliding", "whole"],
                      "segmentation: evaluate overlapping squares, or the whole image resized"] = "sliding"
    decoder_dim: Annotated[int, "segmentation: width after the first deconvolution", (1, inf)] = 256
    neighbours: Annotated[int, "knn: how many of them vote", (1, inf)] = 20
    checkpoint_blocks: Annotated[bool, "recompute blocks in the backward pass, to save memory"] = False
    eval_every: Annotated[int, "steps between two evaluations on held-out images", (1, inf)] = 10_000

    def __post_init__(self):
        super().__post_init__()
        frozen = self.task in ("probe", "knn")
        vit.check(self.scale[0] <= self.scale[1], f"scale: the smaller number first, not {self.scale}")
        vit.check(not (self.labels and self.task == "segmentation"), "labels: not with --task segmentation")
        vit.check(self.init != "none" or not (self.eval or frozen),
                  "init: none leaves nothing to evaluate; a model.pt would do")
        vit.check(not (self.eval and frozen), "eval: only with --task classification or segmentation")
        vit.check(self.image_hw[0] == self.image_hw[1], f"image_size: a square here, not {self.image_size}")


def size(name):
    """The width, depth and heads of vit.PRESETS."""
    return {field: getattr(vit.PRESETS[name], field) for field in ("dim", "depth", "heads")}


# base, large, cifar100: Table 13, with learning rates from its range; base without repeated augmentation and
# large with drop_path 0.2, as released. 384: sec. 3.1. intermediate: released. Segmentation: Table 14; after
# intermediate fine-tuning, and drop_path of large, as released. Probe: appendix D. Ours are the demos, tiny,
# small, and warm-up and layer decay at 384.
IMAGENET = dict(epochs=100.0, batch_size=1024, lr=4e-3, min_lr=1e-6, warmup=0.2, clip_grad=0.0)
LARGE = {**IMAGENET, **size("large"), "epochs": 50.0, "lr": 2e-3, "warmup": 0.1, "layer_decay": 0.75,
         "drop_path": 0.2}
AT_384 = dict(image_size=384, epochs=10.0, batch_size=512, lr=5e-6, min_lr=5e-6, weight_decay=1e-8,
              eval_crop=1.0)
CIFAR100 = {**IMAGENET, **size("base"), "epochs": 150.0, "batch_size": 512, "warmup": 20 / 150,
            "weight_decay": 0.3, "erasing": 0.0, "repeats": 3}
INTERMEDIATE = dict(epochs=30.0, batch_size=512, lr=2e-5, warmup=5 / 30, layer_decay=0.85, mixup=0.0,
                    cutmix=0.0, weight_decay=1e-8)
ADE20K = dict(image_size=512, steps=160_000, batch_size=16, lr=1e-3, min_lr=0.0, warmup=1500 / 160_000,
              clip_grad=0.0)
NO_MIXING = dict(randaugment=0.0, mixup=0.0, cutmix=0.0, erasing=0.0)
PROBE = dict(epochs=50.0, batch_size=1024, lr=4e-3, min_lr=0.0, warmup=0.0, weight_decay=1e-4, clip_grad=0.0,
             label_smoothing=0.0, **NO_MIXING)
DEMO = dict(batch_size=32, epochs=2.2, lr=3e-3, min_lr=1e-6, warmup=0.1, layer_decay=0.75, image_size=64,
            patch_size=8, dim=128, depth=4, heads=4, drop_path=0.0, position="relative", layer_scale=0.1,
            save_every=100, log_every=1, eval_every=500)
PRESETS = {
    "demo": {**DEMO, **NO_MIXING, "crop_scale": 0.5, "eval_crop": 1.0},
    "tiny": {**IMAGENET, **size("tiny")}, "small": {**IMAGENET, **size("small")},
    "base": {**IMAGENET, **size("base")}, "large": LARGE,
    "base-384": {**IMAGENET, **size("base"), **AT_384}, "large-384": {**LARGE, **AT_384},
    "intermediate": {**IMAGENET, **size("base"), **INTERMEDIATE},
    "intermediate-large": {**LARGE, **INTERMEDIATE, "layer_decay": 0.9, "drop_path": 0.4},
    "cifar100": CIFAR100,
    "segmentation-demo": {**DEMO, "scale": (0.75, 1.5), "jitter": 0.0, "decoder_dim": 64},
    **{f"segmentation-{name}": {**ADE20K, **size(name)} for name in ("tiny", "small", "base")},
    "segmentation-large": {**ADE20K, **size("large"), "drop_path": 0.2},
    "segmentation-intermediate": {**ADE20K, **size("base"), "lr": 3e-5, "layer_decay": 0.9},
    "segmentation-intermediate-large": {**ADE20K, **size("large"), "drop_path": 0.2, "lr": 2e-5,
                                        "layer_decay": 0.95},
    "probe": PROBE,
    "probe-demo": {**PROBE, "epochs": 6.0, "batch_size": 64, "lr": 1e-2, "crop_scale": 0.5, "eval_crop": 1.0,
                   "log_every": 10, "save_every": 100},
}


def complete(preset, flags):
    """For training.parse: the preset of the task, and the sizes that the checkpoint gives."""
    task, data_name = flags.get("task", "classification"), Path(flags.get("data", "shapes")).resolve().name
    if task in ("probe", "knn"):
        preset = "probe-demo" if preset in ("demo", "probe-demo") else "probe"
    elif task == "segmentation" and f"segmentation-{preset}" in PRESETS:
        preset = f"segmentation-{preset}"
    if task == "segmentation" and not preset.startswith(task):
        raise UserError(f"--preset: demo, tiny, small, base, large, intermediate or intermediate-large with "
                        f"--task segmentation, not {preset}")
    out = f"runs/finetune-{data_name}" + ("" if task == "classification" else f"-{task}")
    left, script = f"runs/pretrain-{data_name}/model.pt", "pretrain.py"
    if flags.get("eval"):
        left, script = f"{flags.get('out', out)}/model.pt", f"finetune.py --task {task}"
    values = {"out": out, "init": flags.get("init", left)}
    if values["init"] == "none":
        return preset, values
    if "init" not in flags and not Path(left).is_file():
        raise UserError(f"--init: {left} is not there; `python {script}` with the same --data makes it, "
                        "--init FILE names another, --init none trains from scratch")
    try:
        state, info = weights.load(values["init"])
    except ValueError as error:
        raise UserError(f"--init: {error}") from None
    sizes = ["patch_size", "in_channels", "dim", "depth", "heads", "mlp_ratio", "layer_norm_eps", "position",
             "layer_scale", "pixel_mean", "pixel_std"]
    if preset.endswith("demo") or "image_size" not in PRESETS[preset] or flags.get("eval"):
        sizes.append("image_size")
    values |= {name: getattr(info["config"], name) for name in sizes}
    if values["position"] == "shared_relative" and not flags.get("eval") and task not in ("probe", "knn"):
        values["position"] = "relative"                                # as released: a table for each block
    if flags.get("eval") and "decoder.0.weight" in state:
        values["decoder_dim"] = state["decoder.0.weight"].shape[1]
    return preset, values


# ---- What is to be learned ----

def labels_of(source):
    """The labels of all samples as an array, without opening a file."""
    if isinstance(source, Subset):
        return labels_of(source.dataset)[source.indices]
    return np.array(source.targets)


def split_off(source, count):
    """(all samples but count, those count) of a source, always the same. UserError if none would be left."""
    if not 1 <= count < len(source):
        raise UserError(f"--validate: from 1 to {len(source) - 1}, not {count}")
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    return Subset(source, sorted(order[count:])), Subset(source, sorted(order[:count]))


def few_labels(source, count, classes, seed):
    """count samples, as many of each class as of others (to within one). UserError if one has too few."""
    if not len(classes) <= count <= len(source):
        raise UserError(f"--labels: from {len(classes)}, one a class, to {len(source)}, not {count}")
    labels, rng, chosen = labels_of(source), np.random.default_rng([seed, count]), []
    for k, extra in enumerate(rng.permutation(len(classes)) < count % len(classes)):
        of_class, wanted = np.flatnonzero(labels == k), count // len(classes) + int(extra)
        if len(of_class) < wanted:
            raise UserError(f"--labels: {count} are {wanted} of {classes[k]}, which has {len(of_class)}")
        chosen += rng.permutation(of_class)[:wanted].tolist()
    return Subset(source, sorted(chosen))


def open_views(config):
    """(training, held-out) data.Labelled for the config's task, and the names of the classes."""
    maps = config.task == "segmentation"
    source, held_out = data.open_labelled(config.data, config.data_root, maps=maps)
    classes = list(source.classes)
    if config.validate:
        source, held_out = split_off(source, config.validate)
    if config.labels:
        source = few_labels(source, config.labels, classes, config.seed)
    elif config.validate and not maps:
        check_targets(labels_of(source), 2, "training labels")
    if maps:
        check_targets(counted_pixels(source), 2, "training maps")
        check_targets(counted_pixels(held_out), 1, "held-out maps")

    def views_of(source, train):
        if maps:
            transform = data.segmentation_transform(config.image_size, train=train, scale=config.scale,
                                                    jitter=config.jitter)
        else:
            transform = data.classification_transform(
                config.image_size, train=train, crop_scale=config.crop_scale, erasing=config.erasing,
                randaugment=config.randaugment, eval_crop=config.eval_crop)
        return data.Labelled(source, transform, config.seed)
    return views_of(source, train=config.task != "knn"), views_of(held_out, train=False), classes


def check_targets(targets, fewest, which):
    """UserError unless so many classes occur in the targets, of which it reads no more than it must."""
    seen = set()
    for target in targets:
        seen |= set(np.unique(target).tolist())
        if len(seen) >= fewest:
            return
    raise UserError(f"--data: {len(seen)} of the classes occur in the {which}; at least {fewest} must, so "
                    "that there is something to learn and to measure")


def counted_pixels(source):
    """The pixels of each map that are not data.IGNORE."""
    for index in range(len(source)):
        _, classes = data.read(source, index)
        yield classes[classes != data.IGNORE]


class LinearProbe(vit.VisionTransformer):
    """Linear classifiers on the frozen features of each layer (appendix D), all trained at once.

    A layer has two: on the mean of its patches, and on [S]. Features are standardised over training images.
    """

    def __init__(self, config, num_classes):
        super().__init__(dataclasses.replace(config, drop_path=0.0))
        self.requires_grad_(False)
        probes = 2 * config.depth
        self.head = nn.Conv1d(probes * config.dim, probes * num_classes, 1, groups=probes)    # each its own
        self.head.register_buffer("moments", torch.zeros(2, probes * config.dim))    # means of f and f ** 2
        self.head.register_buffer("batches", torch.zeros(()))          # so many batches are in them
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """images (B, 3, H, W) in [0, 1]. Returns logits (B, C, L, 2); in the last axis patches, then [S]."""
        with torch.no_grad():
            features = pool(self.hidden_states(images)).flatten(1).float()           # (B, L 2 D)
            features = self.standardise(features)
        logits = self.head(features[..., None])                        # (B, L 2 C, 1)
        return logits.view(len(images), self.config.depth, 2, -1).movedim(-1, 1)

    def standardise(self, features):
        """Features with mean 0 and variance 1 over the images of all processes and training steps so far."""
        if self.training:
            moments = torch.stack([features.mean(dim=0), features.square().mean(dim=0)])
            moments = training.all_sum(moments) / training.world_size()
            self.head.batches += 1
            self.head.moments.lerp_(moments, 1 / self.head.batches)
        mean, square = self.head.moments
        return (features - mean) / (square - mean ** 2).clamp(min=1e-6).sqrt()


def pool(states):
    """Features of each layer, the mean of the patches and [S]: L of (B, 1+N, D) -> (B, L, 2, D)."""
    return torch.stack([torch.stack([h[:, 1:].mean(dim=1), h[:, 0]], dim=1) for h in states], dim=1)


def build_model(config, classes):
    """The model of the task, from --init or from scratch. UserError for --eval without a trained head."""
    if config.task == "segmentation":
        model = vit.SemanticSegmenter(config.backbone, len(classes), config.decoder_dim)
    elif config.task == "probe":
        model = LinearProbe(config.backbone, len(classes))
    else:
        model = vit.ImageClassifier(config.backbone, len(classes))
    if config.init != "none":
        new = weights.initialise(model, config.init, classes)
        if config.eval and any(name.startswith(weights.HEADS) for name in new):
            theirs = weights.load(config.init)[1]["classes"] or ["classes without names"]
            ours, theirs = (textwrap.shorten(", ".join(names), 200, placeholder=" ...")
                            for names in (classes, theirs))
            raise UserError(f"--eval: {config.init} has no head for --task {config.task} and these classes: "
                            f"{ours}; but for {theirs}; a model.pt of finetune.py for the same --task and "
                            "--data has one")
    model.checkpoint_blocks = config.checkpoint_blocks
    return model


def mixing(config, model):
    """(images, labels) -> (images, labels or shares of classes (B, C)): mixup or cutmix within the batch."""
    if config.task != "classification" or not (config.mixup or config.cutmix):
        return lambda images, labels: (images, labels)
    ways = [way(alpha=alpha, num_classes=model.head.out_features)
            for way, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if alpha]
    return v2.RandomChoice(ways)


def warmup_linear(step, total, peak, end, warmup_steps):
    """Learning rate: linear to peak over warmup_steps, then linear to end (Table 14)."""
    if step < warmup_steps:
        return peak * min(1, (step + 1) / warmup_steps)
    return peak + (min(end, peak) - peak) * (step - warmup_steps) / max(1, total - warmup_steps)


def loss_of(logits, targets, label_smoothing=0.0):
    """Cross-entropy in nats, mean over images, and over probes if logits are (B, C, L, 2).

    targets: classes (B,), or shares of classes (B, C). Or class maps (B, H, W) and logits (B, C, H, W): the
    mean over the pixels that are not data.IGNORE, 0 if there are none.
    """
    if targets.dim() == 3:
        targets = targets.long()
        total = F.cross_entropy(logits.float(), targets, ignore_index=data.IGNORE, reduction="sum")
        return total / (targets != data.IGNORE).sum().clamp(min=1)
    if logits.dim() == 4:
        targets = for_each_probe(targets, logits)
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def for_each_probe(labels, logits):
    """labels (B,) repeated for logits (B, C, L, 2): (B, L, 2); for logits (B, C) as they are."""
    return labels.view(-1, *[1] * (logits.dim() - 2)).expand(-1, *logits.shape[2:])


# ---- Evaluation: every held-out image is counted once, whatever the number of processes ----

def held_out_batches(views, config, device):
    """This process's share of all images, one by one where each has its own size."""
    alone = isinstance(getattr(views.source, "dataset", views.source), data.Segmentation)
    return data.val_loader(views, config, device, batch_size=1 if alone else 64)


@torch.no_grad()
def evaluate_labels(model, views, config, precision, device):
    """loss (nats, mean over images), top1 and top5 accuracy. With --task probe: top1_by_layer, the best top1
    of the patches' probes, and its layer, counted from 1."""
    model.eval()
    probes = (config.depth, 2) if config.task == "probe" else ()
    sums = torch.zeros(4, *probes, dtype=torch.float64, device=device)
    for images, labels in held_out_batches(views, config, device):
        images, labels = data.to_float(images.to(device)), labels.to(device)
        with precision.autocast():
            logits = model(images).float()                             # (B, C), or (B, C, L, 2)
        labels = for_each_probe(labels, logits)
        losses = F.cross_entropy(logits, labels, reduction="none").sum(0)
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]    # (B, 5, ...)
        counts = torch.full_like(losses, len(images))
        sums += torch.stack([losses, counts, right[:, 0].sum(0), right.sum((0, 1))])
    loss, images, top1, top5 = training.all_sum(sums)
    loss, top1, top5 = ((value / images).cpu() for value in (loss, top1, top5))
    if not probes:
        return {"loss": loss.item(), "top1": top1.item(), "top5": top5.item()}
    return by_layer(top1)


def by_layer(accuracy):
    """The report of accuracy (L, 2), on patches and on [S]: the best layer on patches, and all of them."""
    patches, cls = accuracy.t().tolist()
    return {"top1": max(patches), "layer": 1 + patches.index(max(patches)),
            "top1_by_layer": {"patches": patches, "[S]": cls}}


@torch.no_grad()
def evaluate_maps(model, views, config, precision, device):
    """loss (nats, mean over pixels), and what segmentation_scores gives."""
    model.eval()
    classes = model.head.out_channels
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)          # pixels can be more than 2 ** 24
    for images, maps in held_out_batches(views, config, device):
        images, maps = data.to_float(images.to(device)), maps.to(device)
        logits = segment(model, images, config.window, precision)
        confusion += confusion_matrix(logits.argmax(1), maps, classes)
        pixels = (maps != data.IGNORE).sum()
        sums += torch.stack([loss_of(logits, maps) * pixels, pixels])
    training.all_sum(confusion)
    loss, pixels = training.all_sum(sums).tolist()
    return {"loss": loss / max(1, pixels), **segmentation_scores(confusion)}


def confusion_matrix(predictions, truth, classes):
    """(classes, classes) counts of pixels, row = truth, column = prediction, without those of data.IGNORE."""
    counted = truth != data.IGNORE
    pairs = truth[counted].long() * classes + predictions[counted]
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def segmentation_scores(confusion):
    """mean_iou, pixel_accuracy, and iou: for each class the intersection over the union of its pixels in
    truth and prediction, nan for classes that occur in neither, which the mean leaves out."""
    confusion = confusion.double()
    both = confusion.diag()
    iou = both / (confusion.sum(0) + confusion.sum(1) - both)
    return {"mean_iou": iou.nanmean().item(), "pixel_accuracy": (both.sum() / confusion.sum()).item(),
            "iou": iou.tolist()}


@torch.no_grad()
def segment(model, images, window, precision):
    """Logits (B, C, H, W) in fp32 for images (B, 3, H, W) of any size, by a model for squares of S pixels.

    "whole": the image resized to S x S. "sliding": resized so that its shorter side is S, covered with S x S
    windows, placed as mmsegmentation does, whose logits are averaged. Then bilinearly resized to H x W.
    """
    S, (H, W) = model.config.image_hw[0], images.shape[-2:]
    h, w = (S, S) if window == "whole" else (max(S, round(side * S / min(H, W))) for side in (H, W))
    resized = images
    if (h, w) != (H, W):
        resized = F.interpolate(images, size=(h, w), mode="bilinear", antialias=True)
    total, times = 0, torch.zeros(h, w, device=images.device)
    for top in window_starts(h, S):
        for left in window_starts(w, S):
            with precision.autocast():
                logits = model(resized[..., top:top + S, left:left + S]).float()
            around = (left, w - left - S, top, h - top - S)
            total = total + F.pad(logits, around)
            times += F.pad(torch.ones(S, S, device=images.device), around)
    logits = total / times
    return logits if (h, w) == (H, W) else F.interpolate(logits, size=(H, W), mode="bilinear")


def window_starts(length, size):
    """Where windows begin along a side: two thirds of a window apart, the last one at the end."""
    stride = size * 2 // 3
    return [min(i * stride, length - size) for i in range(1 + math.ceil((length - size) / stride))]


# ---- Fine-tuning ----

def train(config, device):
    """Do the task in the folder config.out, or continue there.

    Leaves metrics.jsonl, last.pt, model.pt, result.json and a picture: predictions.png, segments.png or
    layers.png. UserError, before anything is written, for data or an --init that do not fit.
    """
    views, val_views, classes = open_views(config)
    precision = training.Precision(config.precision, device)
    if config.task == "knn":
        return knn(config, device, views, val_views, len(classes), precision)
    torch.manual_seed(config.seed)
    model = build_model(config, classes).to(device)
    evaluate = partial(evaluate_maps if config.task == "segmentation" else evaluate_labels, views=val_views,
                       config=config, precision=precision, device=device)
    if config.eval:
        return training.say(f"{len(val_views)} held-out images: {training.in_words(evaluate(model))}")
    total, per_epoch = training.steps_and_epoch(config, len(views))
    run = training.Run(config, device, total)
    if run.finished:
        return training.say(f"{run.folder} is finished; --fresh starts over")
    training.say(f"{config.task}: {len(classes)} classes, {len(views)} images, {len(val_views)} held out; "
                 f"{total} steps of {config.batch_size}, {total / per_epoch:.3g} epochs, peak lr "
                 f"{config.lr:g}; {training.world_size()} x {device}, {precision.dtype}")
    model, report = fit(model, run, views, evaluate, precision, device)
    training.say(f"{len(val_views)} held-out images: {training.in_words(report)}")
    if "iou" in report:
        report["iou"] = dict(zip(classes, report["iou"]))
    run.finish(model, {"vit": dataclasses.asdict(config.backbone), "classes": classes}, **report)
    if training.rank() == 0:
        training.draw_or_warn(draw, model, val_views, classes, report, config, precision, device)


def fit(model, run, views, evaluate, precision, device):
    """The training loop: images -> mixing -> logits -> loss -> step.

    Returns the model to keep, which is the moving average with --ema, and its evaluation.
    """
    config, total = run.config, run.steps
    groups = training.parameter_groups(model, config.weight_decay, config.layer_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    parts = dict(model=model, optimizer=optimizer, scaler=precision.scaler)
    if config.ema:
        parts["ema"] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    kept = parts["ema"].module if config.ema else model
    run.restore(**parts)
    network = training.distribute(torch.compile(model) if config.compile else model, device)
    batches = iter(data.train_loader(views, config, device, run.start, total, repeats=config.repeats))
    mix = mixing(config, model)
    schedule = warmup_linear if config.task == "segmentation" else training.warmup_cosine
    report = {}
    for step in run.progress("finetune"):
        training.seed_step(config.seed, step)
        lr = schedule(step, total, config.lr, config.min_lr, config.warmup * total)
        training.set_lr(optimizer, lr)
        model.train()
        loss_sum = torch.zeros(1, device=device)
        for part in range(config.accumulate):
            images, targets = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            images, targets = mix(data.to_float(images), targets)
            with training.accumulating(network, part, config.accumulate):
                with precision.autocast():
                    logits = network(images)                           # (B, C), (B, C, H, W) or (B, C, L, 2)
                loss = loss_of(logits, targets, config.label_smoothing)
                precision.backward(loss / config.accumulate)
            loss_sum += loss.detach()
        loss, = run.all_reduce(step + 1, loss_sum / config.accumulate)
        grad_norm = precision.update(optimizer, config.clip_grad)
        if config.ema:
            parts["ema"].update_parameters(model)
        report = evaluate(kept) if (step + 1) % config.eval_every == 0 or step + 1 == total else {}
        run.log(step + 1, loss=loss, lr=lr, grad_norm=grad_norm,
                **{f"val_{name}": value for name, value in training.numbers(report).items()})
        run.save_or_stop(step + 1, **parts)
    return kept, report or evaluate(kept)                              # it was killed after its last step


@torch.no_grad()
def draw(model, views, classes, report, config, precision, device):
    """Write the picture of a finished task: predictions for the first held-out images, or probes by layer."""
    folder = Path(config.out)
    if "top1_by_layer" in report:
        lines = {"mean of patches": report["top1_by_layer"]["patches"], "[S]": report["top1_by_layer"]["[S]"]}
        title = "linear probe" if config.task == "probe" else f"{config.neighbours} nearest neighbours"
        figure = visualize.figure_by_layer({title: lines}, "accuracy on held-out images")
        return figure.savefig(folder / "layers.png")
    images, targets = zip(*[views[0, index] for index in range(min(12, len(views)))])
    images = [data.to_float(image) for image in images]
    if config.task == "segmentation":                                  # each image may have its own size
        predicted = [segment(model, image[None].to(device), config.window, precision)[0].argmax(0).cpu()
                     for image in images]
        return visualize.figure_segments(images, targets, predicted, classes).savefig(folder / "segments.png")
    with precision.autocast():
        probabilities = model(torch.stack(images).to(device)).float().softmax(dim=1).cpu()
    visualize.figure_classes(images, targets, probabilities, classes).savefig(folder / "predictions.png")


# ---- k nearest neighbours on frozen features ----

@torch.no_grad()
def knn(config, device, views, val_views, num_classes, precision):
    """--task knn: accuracy of weighted k nearest neighbours by the features of each layer.

    Each process keeps the features of its share of the training images, in half precision. Leaves
    result.json and layers.png.
    """
    run = training.Run(config, device, 0)
    if run.finished:
        return training.say(f"{run.folder} is finished; --fresh starts over")
    model = vit.VisionTransformer(config.backbone)
    weights.initialise(model, config.init)
    model.to(device).eval()
    memory = 2 * (len(views) + len(val_views)) * config.depth * 2 * config.dim
    training.say(f"the features of {len(views)} images and {len(val_views)} held-out ones take "
                 f"{memory / 1e9:.2f} GB")
    features, labels = extract(model, views, config, precision, device)
    test_features, test_labels = map(gather, extract(model, val_views, config, precision, device))
    accuracy = torch.zeros(config.depth, 2, dtype=torch.float64)
    for layer, kind in np.ndindex(config.depth, 2):
        accuracy[layer, kind] = knn_accuracy(
            features[:, layer, kind].to(device), labels.to(device), test_features[:, layer, kind].to(device),
            test_labels.to(device), num_classes, config.neighbours)
    report = by_layer(accuracy)
    training.say(f"{len(val_views)} held-out images: {training.in_words(report)}")
    if training.rank() == 0:
        training.write_json(run.folder / "result.json", report)
        training.draw_or_warn(draw, model, val_views, (), report, config, precision, device)


def extract(model, views, config, precision, device):
    """Features (n, L, 2, D) in half precision, and labels (n,), of this process's share of the images."""
    features, labels = [], []
    for images, targets in held_out_batches(views, config, device):
        with precision.autocast():
            pooled = pool(model.hidden_states(data.to_float(images.to(device))))
        features.append(pooled.half().cpu())
        labels.append(targets)
    return torch.cat(features), torch.cat(labels)


def gather(tensor):
    """The tensors of all processes, one after the other along the first axis."""
    if not dist.is_initialized():
        return tensor
    parts = [None] * training.world_size()
    dist.all_gather_object(parts, tensor.cpu())
    return torch.cat(parts).to(tensor.device)


def knn_accuracy(features, labels, test_features, test_labels, num_classes, neighbours, temperature=0.07):
    """Accuracy of votes by the most similar training images (cosine), weighted exp(similarity / temperature).

    features (n, D) and labels (n,): this process's share; test_features (m, D), test_labels (m,): all.
    """
    known, right = F.normalize(features.float(), dim=-1), 0
    for some, truth in zip(test_features.split(1024), test_labels.split(1024)):
        similarities = F.normalize(some.float(), dim=-1) @ known.t()
        similarity, nearest = similarities.topk(min(neighbours, len(known)))
        similarity, voters = gather(similarity.t()).t(), gather(labels[nearest].t()).t()    # of all processes
        similarity, nearest = similarity.topk(min(neighbours, similarity.shape[1]))        # (m, k)
        votes = torch.zeros(len(some), num_classes, device=some.device)
        votes.scatter_add_(1, voters.gather(1, nearest), (similarity / temperature).exp())
        right += (votes.argmax(dim=1) == truth).sum().item()
    return right / len(test_labels)


def main():
    training.run_script(Config, PRESETS, train, complete)


if __name__ == "__main__":
    main()
