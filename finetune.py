"""Fine-tuning (sec. 2.6): classification and segmentation; and frozen features: linear probe, k-NN.

`python finetune.py` fine-tunes what `python pretrain.py` left; `torchrun --nproc_per_node=16 finetune.py
--data FOLDER` is the paper's. B images of H W pixels, C classes, L blocks, D width.
"""
import dataclasses
import math
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset
from torchvision.transforms import v2

import data
import training
import vit
import weights
from training import UserError


@dataclass(frozen=True, kw_only=True)
class Config(training.RunConfig, vit.ViTConfig):
    """Flags of finetune.py."""
    task: Annotated[Literal["classification", "segmentation", "probe", "knn"],
                    "probe: linear classifiers on each layer's frozen features; knn: neighbours by them"
                    ] = "classification"
    init: Annotated[str, "model.pt of pretrain.py or finetune.py, or a released checkpoint; none: from "
                         "scratch; default: what `pretrain.py` left for the same --data"] = "none"
    labels: Annotated[int | None, "train on so many labelled images, as many of each class; default: all",
                      (1, inf)] = None
    validate: Annotated[int | None, "evaluate on so many training images, kept from training, instead of the "
                                    "held-out ones: to choose hyper-parameters by", (1, inf)] = None
    eval: Annotated[bool, "only evaluate --init; default: what the same command without --eval left"] = False
    layer_decay: Annotated[float, "each layer's learning rate over that of the next; 0.65 base, 0.75 large "
                                  "(appendix)", (1e-6, 1)] = 0.65
    ema: Annotated[float, "decay of the weights' moving average, which is then evaluated and kept; 0 = none",
                   (0, 0.999999)] = 0.0
    label_smoothing: Annotated[float, "classification: share of the target that is spread over all classes",
                               (0, 1)] = 0.1
    crop_scale: Annotated[float, "classification: smallest share of an image's area in a random resized crop",
                          (1e-6, 1)] = 0.08
    randaugment: Annotated[float, "classification: magnitude of RandAugment, 0 = none", (0, 10)] = 9.0
    mixup: Annotated[float, "classification: alpha of mixup, 0 = none", (0, inf)] = 0.8
    cutmix: Annotated[float, "classification: alpha of cutmix, 0 = none; with both, each in half the steps",
                      (0, inf)] = 1.0
    erasing: Annotated[float, "classification: probability of erasing a rectangle", (0, 1)] = 0.25
    eval_crop: Annotated[float, "classification: side of the evaluated square over the shorter side",
                         (1e-6, 1)] = 0.875
    scale: Annotated[tuple[float, float], "segmentation: shorter side over image size, before the crop",
                     (1e-6, inf)] = (0.5, 2.0)
    jitter: Annotated[float, "segmentation: brightness, contrast, saturation vary by it", (0, 1)] = 0.4
    window: Annotated[Literal["sliding", "whole"],
                      "segmentation: evaluate overlapping squares, or the whole image resized"] = "sliding"
    decoder_dim: Annotated[int, "segmentation: width after one deconvolution, halved by each next",
                           (1, inf)] = 256
    neighbours: Annotated[int, "knn: how many of them vote", (1, inf)] = 20
    checkpoint_blocks: Annotated[bool, "recompute blocks in the backward pass: slower, less memory"] = False
    eval_every: Annotated[int, "steps between two evaluations on held-out images", (1, inf)] = 10_000

    def __post_init__(self):
        super().__post_init__()
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: two numbers above 0, the smaller first, not {self.scale[0]:g} "
                             f"{self.scale[1]:g}")
        if self.labels and self.task == "segmentation":
            raise ValueError("labels: maps have no one class to balance; only with --task classification, "
                             "probe or knn")
        if self.init == "none" and (self.eval or self.task in ("probe", "knn")):
            raise ValueError(f"init: none leaves nothing to {'evaluate' if self.eval else 'look at'}; a "
                             f"model.pt of pretrain.py would do")
        if self.task in ("probe", "knn") and self.preset not in (None, "probe", "knn"):
            raise ValueError(f"preset: --task {self.task} has its own, not {self.preset}; leave it out")
        if self.epochs and self.task in ("probe", "knn"):
            raise ValueError(f"epochs: not used with --task {self.task}, which takes --steps")
        if self.eval and self.task in ("probe", "knn"):
            raise ValueError(f"eval: only with --task classification or segmentation, not {self.task}")
        if self.image_hw[0] != self.image_hw[1]:
            raise ValueError(f"image_size: a square here, not {self.image_hw[0]} x {self.image_hw[1]}")


def size(name):
    """The width, depth and heads of vit.PRESETS."""
    return {field: getattr(vit.PRESETS[name], field) for field in ("dim", "depth", "heads")}


# Appendix, "fine-tuning": the learning rates are from its range 2e-3 ... 5e-3. The paper says "10 % of the
# epochs, small lr" for 384; its numbers here, and those of the demos and probes, are ours.
IMAGENET = dict(epochs=100.0, batch_size=1024, lr=4e-3, min_lr=1e-6, warmup=0.2, clip_grad=0.0)
LARGE = {**IMAGENET, **size("large"), "epochs": 50.0, "lr": 2e-3, "warmup": 0.1, "layer_decay": 0.75,
         "drop_path": 0.2}
AT_384 = dict(image_size=384, epochs=10.0, batch_size=512, lr=2e-5, layer_decay=0.85, eval_crop=1.0)
ADE20K = dict(image_size=512, steps=160_000, batch_size=16, lr=1e-3, min_lr=0.0, warmup=1500 / 160_000,
              clip_grad=0.0)
DEMO = dict(batch_size=32, min_lr=1e-6, warmup=0.1, image_size=64, patch_size=8, dim=128, depth=4, heads=4,
            drop_path=0.0, position="relative", layer_scale=0.1, save_every=100, log_every=1)
PROBE = dict(steps=2000, batch_size=1024, lr=3e-3, min_lr=0.0, warmup=0.0, weight_decay=1e-3, log_every=100,
             clip_grad=0.0, drop_path=0.0, eval_crop=1.0)
PRESETS = {
    "demo": {**DEMO, "epochs": 2.2, "lr": 3e-3, "layer_decay": 0.75, "crop_scale": 0.5, "randaugment": 0.0,
             "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "eval_crop": 1.0, "eval_every": 500},
    "tiny": {**IMAGENET, **size("tiny")},
    "small": {**IMAGENET, **size("small")},
    "base": {**IMAGENET, **size("base")},
    "large": LARGE,
    "base-384": {**IMAGENET, **size("base"), **AT_384},
    "large-384": {**LARGE, **AT_384, "epochs": 5.0},
    "intermediate": {**IMAGENET, **size("base"), "epochs": 30.0, "lr": 2e-5, "layer_decay": 0.85,
                     "mixup": 0.0, "cutmix": 0.0, "weight_decay": 1e-8},
    "segmentation-demo": {**DEMO, "epochs": 2.2, "lr": 3e-3, "layer_decay": 0.75, "scale": (0.75, 1.5),
                          "jitter": 0.0, "decoder_dim": 64, "eval_every": 500},
    **{f"segmentation-{name}": {**ADE20K, **size(name)} for name in ("tiny", "small", "base")},
    "segmentation-large": {**ADE20K, **size("large"), "drop_path": 0.2},
    "probe": PROBE,
    "knn": PROBE,
}


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


def complete(preset, flags):
    """For training.parse: the preset of the task, and values that the checkpoint and the task give."""
    task, name = flags.get("task", "classification"), Path(flags.get("data", "shapes")).resolve().name
    if task in ("probe", "knn"):
        preset = flags.get("preset", task)
    elif f"{task}-{preset}" in PRESETS:
        preset = f"{task}-{preset}"
    elif task == "segmentation" and preset in PRESETS and not preset.startswith("segmentation-"):
        fits = ", ".join(name.removeprefix("segmentation-") for name in PRESETS
                         if name.startswith("segmentation-"))
        raise UserError(f"--preset: one of {fits} with --task segmentation, not {preset}")
    folder = f"runs/finetune-{name}" + ("" if task == "classification" else f"-{task}")
    left, maker = f"runs/pretrain-{name}/model.pt", "pretrain.py"
    if flags.get("eval"):
        left, maker = f"{flags.get('out', folder)}/model.pt", "finetune.py"
    more = {"out": folder, "init": flags.get("init", left)}
    if more["init"] == "none":
        return preset, more
    if "init" not in flags and not Path(left).is_file():
        shared = "".join(f" --{flag.replace('_', '-')} {flags[flag]}"
                         for flag in ("task", "data", "data_root") if flag in flags
                         and (flag != "task" or flags.get("eval")))
        otherwise = "" if flags.get("eval") else ", or --init none trains from scratch"
        raise UserError(f"--init: {left} is not there; `python {maker}{shared}` makes it, or --init "
                                 f"FILE names another{otherwise}")
    try:
        state, info = weights.load(more["init"])
        config = info["config"]
    except ValueError as error:
        raise UserError(f"--init: {error}") from None
    for field in ("patch_size", "in_channels", "dim", "depth", "heads", "mlp_ratio", "position",
                  "layer_scale", "pixel_mean", "pixel_std"):
        more[field] = getattr(config, field)
    trains = task in ("classification", "segmentation") and not flags.get("eval")
    if config.position == "shared_relative" and trains:
        more["position"] = "relative"    # as released: a copy of the table for each block
    if "image_size" not in PRESETS[preset] or flags.get("eval") or preset.endswith("demo"):
        more["image_size"] = config.image_hw[0]
    if flags.get("eval") and task == "segmentation" and "decoder.0.weight" in state:
        more["decoder_dim"] = state["decoder.0.weight"].shape[1]
    return preset, more


# ---- What is to be learned ----

def open_views(config):
    """(training, held-out) data.Labelled for the config's task, and the names of the classes."""
    source, held_out = data.open_labelled(config.data, config.data_root, maps=config.task == "segmentation")
    classes = list(source.classes)
    if config.validate:
        source, held_out = split_off(source, config.validate)
    if config.labels:
        source = few_labels(source, config.labels, classes, config.seed)
    transforms = []
    for train in (True, False):
        if config.task == "segmentation":
            transforms.append(data.segmentation_transform(config.image_size, train=train, scale=config.scale,
                                                          jitter=config.jitter))
        else:
            transforms.append(data.classification_transform(
                config.image_size, train=train and config.task == "classification",
                crop_scale=config.crop_scale, randaugment=config.randaugment, erasing=config.erasing,
                eval_crop=config.eval_crop))
    views, val_views = (data.Labelled(images, transform, config.seed)
                        for images, transform in zip((source, held_out), transforms))
    return views, val_views, classes


def build_model(config, classes):
    """The model of the task, from --init or from scratch. UserError for --eval without a trained head."""
    if config.task == "segmentation":
        model = vit.SemanticSegmenter(config.backbone, len(classes), config.decoder_dim)
    else:
        model = vit.ImageClassifier(config.backbone, len(classes))
    if config.init != "none":
        new = weights.initialise(model, config.init, classes)
        if config.eval and any(name.startswith(weights.HEADS) for name in new):
            raise UserError(f"--eval: {config.init} has no head for --task {config.task} with these "
                                     f"{len(classes)} classes; a model.pt that finetune.py left for the same "
                                     f"--task and --data has")
    model.checkpoint_blocks = config.checkpoint_blocks
    return model


def mixing(config, num_classes):
    """(images, labels) -> (images, labels or shares of classes (B, C)): mixup or cutmix within the batch."""
    ways = [way(alpha=alpha, num_classes=num_classes)
            for way, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if alpha]
    if config.task != "classification" or not ways:
        return lambda images, labels: (images, labels)
    return v2.RandomChoice(ways)


def warmup_linear(step, total, peak, end, warmup_steps):
    """Learning rate: linear to peak over warmup_steps, then linear to end (Table 14)."""
    if step < warmup_steps:
        return peak * min(1, (step + 1) / warmup_steps)
    return peak + (min(end, peak) - peak) * (step - warmup_steps) / max(1, total - warmup_steps)


def loss_of(logits, targets, label_smoothing=0.0):
    """Cross-entropy in nats.

    Classification: logits (B, C), targets (B,) or shares (B, C), mean over images. Segmentation: logits
    (B, C, H, W), targets (B, H, W) with data.IGNORE, mean over the pixels that count (0 if none does).
    """
    if logits.dim() == 4:
        targets = targets.long()
        total = F.cross_entropy(logits.float(), targets, ignore_index=data.IGNORE, reduction="sum")
        return total / (targets != data.IGNORE).sum().clamp(min=1)
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


# ---- Evaluation ----

@torch.no_grad()
def evaluate(model, views, classes, config, precision, device):
    """Over all held-out images, each counted once whatever the number of processes.

    Classification: loss (nats, mean over images), top1 and top5 accuracy. Segmentation: loss (mean over
    pixels), and what segmentation_scores gives.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    for images, targets in held_out_batches(views, config, device):
        images, targets = data.to_float(images.to(device)), targets.to(device)
        if config.task == "segmentation":
            logits, counted = segment(model, images, config.window, precision), (targets != data.IGNORE).sum()
            confusion += confusion_matrix(logits.argmax(1), targets, classes)
            right = torch.zeros(2, device=device)
        else:
            with precision.autocast():
                logits, counted = model(images).float(), torch.tensor(len(images), device=device)
            ranked = logits.topk(min(5, classes)).indices == targets[:, None]    # (B, 5)
            right = torch.stack([ranked[:, 0].sum(), ranked.sum()])
        sums += torch.cat([torch.stack([loss_of(logits, targets) * counted, counted]), right])
    training.all_sum(confusion)
    loss, images, top1, top5 = training.all_sum(sums).tolist()
    if config.task == "segmentation":
        return {"loss": loss / max(1, images), **segmentation_scores(confusion)}
    return {"loss": loss / images, "top1": top1 / images, "top5": top5 / images}


def held_out_batches(views, config, device):
    """This process's share of all held-out images, one by one where each has its own size."""
    alone = isinstance(getattr(views.source, "dataset", views.source), data.Segmentation)
    return data.val_loader(views, config, device, batch_size=1 if alone else 64)


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
    windows that overlap by a third or more, whose logits are averaged. Then bilinearly resized to H x W.
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
    """Where windows begin along a side: evenly spaced, at most two thirds of a window apart."""
    count = 1 + math.ceil((length - size) / (size * 2 / 3))
    return [round(i * (length - size) / max(1, count - 1)) for i in range(count)]


# ---- Fine-tuning ----

def train(config, device):
    """Do the task in the folder config.out, or continue there: images -> mixing -> logits -> loss -> step.

    Leaves metrics.jsonl, last.pt, model.pt, result.json and predict.png or segments.png; with probe and knn
    result.json, features.pt and layers.png. UserError, before anything is written, for data or an --init that
    do not fit.
    """
    views, val_views, classes = open_views(config)
    if config.task in ("probe", "knn"):
        return probe(config, device, views, val_views, len(classes))
    precision = training.Precision(config.precision, device)
    if config.eval:
        model = build_model(config, classes).to(device)
        report = evaluate(model, val_views, len(classes), config, precision, device)
        return training.say(f"{len(val_views)} held-out images: {in_words(report)}")

    total, per_epoch = training.steps_and_epoch(config, len(views))
    torch.manual_seed(config.seed)
    model = build_model(config, classes).to(device)
    run = training.Run(config, device, total)
    if run.finished:
        return training.say(f"{run.folder} is finished; --fresh starts over")
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
    groups = training.parameter_groups(model, config.weight_decay, config.layer_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    parts = dict(model=model, optimizer=optimizer, scaler=precision.scaler, **({"ema": ema} if ema else {}))
    run.restore(**parts)
    network = training.distribute(torch.compile(model) if config.compile else model, device)
    batches = iter(data.train_loader(views, config, device, run.start, total))
    mix = mixing(config, len(classes))
    schedule = warmup_linear if config.task == "segmentation" else training.warmup_cosine

    def evaluation():
        return evaluate(ema.module if ema else model, val_views, len(classes), config, precision, device)

    training.say(f"{config.task}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
                 f"{len(classes)} classes, {len(views)} images, {len(val_views)} held out; {total} steps of "
                 f"{config.batch_size} images, {total / per_epoch:.3g} epochs, peak lr {config.lr:g}, "
                 f"{training.world_size()} x {device}, {str(precision.dtype).removeprefix('torch.')}")
    report = {}
    for step in run.progress("finetune"):
        training.seed_step(config.seed, step)
        lr = training.set_lr(optimizer, schedule(step, total, config.lr, config.min_lr,
                                                 config.warmup * total))
        model.train()
        loss_sum = torch.zeros(1, device=device)
        for part in range(config.accumulate):
            images, targets = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            images, targets = mix(data.to_float(images), targets)
            with training.accumulating(network, part, config.accumulate):
                with precision.autocast():
                    logits = network(images)    # (B, C), or (B, C, H, W)
                loss = loss_of(logits, targets, config.label_smoothing)
                precision.backward(loss / config.accumulate)
            loss_sum += loss.detach()
        loss, = run.exchange(step + 1, loss_sum / config.accumulate)
        grad_norm = precision.update(optimizer, config.clip_grad)
        if ema:
            ema.update_parameters(model)
        report = evaluation() if (step + 1) % config.eval_every == 0 or step + 1 == total else {}
        run.log(step + 1, loss=loss, lr=lr, grad_norm=grad_norm,
                **{f"val_{name}": value for name, value in report.items() if name != "iou"})
        run.end_of_step(step + 1, **parts)

    model = ema.module if ema else model
    report = report or evaluation()    # a run that was killed after its last step
    training.say(f"{len(val_views)} held-out images: {in_words(report)}")
    if "iou" in report:
        report["iou"] = {name: None if math.isnan(value) else value
                         for name, value in zip(classes, report["iou"])}
    if training.rank() == 0:
        draw, name = draw_predictions, "predict.png"
        if config.task == "segmentation":
            draw, name = draw_segments, "segments.png"
        figure = draw(*pictures(model, val_views, config, precision, device), classes)
        figure.savefig(run.folder / name, dpi=100)
    run.finish(model, {"vit": dataclasses.asdict(config.backbone), "classes": classes}, **report)


def in_words(report):
    """An evaluation on one line, without the IoU of each class."""
    return training.in_words({name: value for name, value in report.items() if name != "iou"})


# ---- Without fine-tuning: linear probe and k-NN ----

POOLED = ("patches", "[S]")    # what stands for an image: the mean of its patch tokens, or the special token


def probe(config, device, views, val_views, classes):
    """--task probe and knn: test accuracy of linear classifiers, or of k nearest neighbours, on the frozen
    features of each layer. Leaves features.pt, layers.png and result.json."""
    run = training.Run(config, device, config.steps)
    if run.finished:
        return training.say(f"{run.folder} is finished; --fresh starts over")
    features = frozen_features(config, device, views, val_views, run.folder)
    if config.task == "knn":
        accuracy = knn_accuracy(*features, classes, config.neighbours)
    else:
        accuracy = linear_accuracy(*features, classes, config)
    table = {pooled: accuracy[:, i].tolist() for i, pooled in enumerate(POOLED)}
    training.say("layer  " + "  ".join(f"{pooled:>7}" for pooled in POOLED))
    for layer, row in enumerate(accuracy.tolist(), start=1):
        training.say(f"{layer:5}  " + "  ".join(f"{value:7.4f}" for value in row))
    best, layer = accuracy[:, 0].max(0)
    training.say(f"{config.task}, {len(val_views)} held-out images: {best:.4f} on the mean of layer "
                 f"{layer + 1}'s patches")
    if training.rank() == 0:
        draw_layers(table, config).savefig(run.folder / "layers.png", dpi=100)
        result = {"top1": best.item(), "layer": layer.item() + 1, "top1_by_layer": table}
        training.write_json(run.folder / "result.json", result)


@torch.no_grad()
def frozen_features(config, device, views, val_views, folder):
    """(features, labels, held-out features, held-out labels): (n, L, 2, D), pooled as POOLED, and (n,).

    Standardised by the mean and deviation over the training images. Kept, before that, in features.pt.
    """
    kept = folder / "features.pt"
    if not training.on_first_process(kept.exists):
        model = vit.VisionTransformer(config.backbone)
        weights.initialise(model, config.init)
        model.to(device).eval()
        precision = training.Precision(config.precision, device)
        extracted = [extract(model, images, config, precision, device) for images in (views, val_views)]
        training.on_first_process(
            lambda: training.write_atomically(kept, lambda file: torch.save(extracted, file)))
    (features, labels), (test_features, test_labels) = torch.load(kept, map_location="cpu", weights_only=True)
    features, test_features = features.to(device).float(), test_features.to(device).float()
    mean, std = features.mean(0), features.std(0) + 1e-6
    return (features - mean) / std, labels.to(device), (test_features - mean) / std, test_labels.to(device)


def extract(model, views, config, precision, device):
    """features (n, L, 2, D) fp16 and labels (n,) of all images, in order, from all processes; on the CPU."""
    features, labels = [], []
    for images, targets in held_out_batches(views, config, device):
        with precision.autocast():
            states = model.hidden_states(data.to_float(images.to(device)))    # L of (B, 1+N, D)
        pooled = [torch.stack([h[:, 1:].float().mean(1), h[:, 0].float()], 1) for h in states]
        features.append(torch.stack(pooled, 1).half().cpu())
        labels.append(targets)
    mine = torch.cat(features), torch.cat(labels)
    if not dist.is_initialized():
        return mine
    parts = [None] * training.world_size()
    dist.all_gather_object(parts, mine)
    whole = [torch.empty(len(views), *part.shape[1:], dtype=part.dtype) for part in mine]
    for rank, part in enumerate(parts):    # images were dealt out in turn
        for kind in range(2):
            whole[kind][rank::len(parts)] = part[kind]
    return whole


def linear_accuracy(features, labels, test_features, test_labels, classes, config):
    """Test accuracy (L, 2) of a linear classifier for each layer and pooling, trained on the same batches.

    features (n, L, 2, D), labels (n,). AdamW with a cosine schedule.
    """
    n, layers, pooled, dim = features.shape
    weight = torch.zeros(layers, pooled, dim, classes, device=features.device, requires_grad=True)
    bias = torch.zeros(layers, pooled, classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], weight_decay=config.weight_decay, fused=True)
    rng = np.random.default_rng(config.seed)

    def logits(x):
        return torch.einsum("nlpd,lpdc->nlpc", x, weight) + bias    # (n, L, 2, C)

    for step in range(config.steps):
        warmup_steps = config.warmup * config.steps
        lr = training.warmup_cosine(step, config.steps, config.lr, config.min_lr, warmup_steps)
        optimizer.param_groups[0]["lr"] = lr
        chosen = torch.from_numpy(rng.choice(n, min(n, config.batch_size), replace=False)).to(features.device)
        out = logits(features[chosen])
        truth = labels[chosen][:, None, None].expand(out.shape[:3])
        loss = F.cross_entropy(out.permute(0, 3, 1, 2), truth, reduction="sum")
        (loss / len(chosen)).backward()    # a sum over layers, which do not touch each other
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        right = [logits(some).argmax(-1) == some_labels[:, None, None]
                 for some, some_labels in zip(test_features.split(4096), test_labels.split(4096))]
    return torch.cat(right).float().mean(0).cpu()


def knn_accuracy(features, labels, test_features, test_labels, classes, neighbours, temperature=0.07):
    """Test accuracy (L, 2) of weighted k nearest neighbours. features (n, L, 2, D), labels (n,).

    The most similar training images (cosine) vote for their class with weight exp(similarity / temperature).
    """
    accuracy = torch.zeros(features.shape[1:3])
    votes_for = F.one_hot(labels, classes).float()
    for layer in range(features.shape[1]):
        for pooled in range(features.shape[2]):
            known = F.normalize(features[:, layer, pooled], dim=-1)
            right = 0
            for some, truth in zip(test_features[:, layer, pooled].split(1024), test_labels.split(1024)):
                similarities = F.normalize(some, dim=-1) @ known.t()
                similarity, nearest = similarities.topk(min(neighbours, len(known)))    # (n, k)
                votes = (votes_for[nearest] * (similarity / temperature).exp()[..., None]).sum(1)    # (n, C)
                right += (votes.argmax(-1) == truth).sum()
            accuracy[layer, pooled] = right / len(test_labels)
    return accuracy


# ---- Pictures ----

@torch.no_grad()
def pictures(model, views, config, precision, device, count=12):
    """(images, targets, softmax over classes) of the first held-out images: lists of count tensors."""
    model.eval()
    images, targets, shares = [], [], []
    for index in range(min(count, len(views))):
        image, target = views[0, index]
        image = data.to_float(image[None].to(device))
        if config.task == "segmentation":
            logits = segment(model, image, config.window, precision)
        else:
            with precision.autocast():
                logits = model(image).float()
        images.append(image[0].cpu())
        targets.append(target)
        shares.append(logits.softmax(1)[0].cpu())
    return images, targets, shares


def draw_predictions(images, labels, shares, classes, columns=4):
    """A figure of images (3, H, W) beside bars of their three most likely classes; the right one is dark."""
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(3.4 * columns, 1.5 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.1] * columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (image, label, share) in enumerate(zip(images, labels, shares)):
        picture, bars = axes[i // columns][i % columns * 2:i % columns * 2 + 2]
        picture.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        picture.set_title(classes[label], fontsize=9)
        top = share.topk(min(3, len(classes)))
        places = range(len(top.indices), 0, -1)
        bars.barh(places, top.values.numpy(), height=0.5,
                  color=["tab:blue" if k == label else "lightsteelblue" for k in top.indices.tolist()])
        for place, k, value in zip(places, top.indices.tolist(), top.values.tolist()):
            bars.text(0, place + 0.3, f"{classes[k]}  {value:.0%}", fontsize=8, va="bottom")
        bars.set(xlim=(0, 1), ylim=(0.5, 4.1))
    return figure


def draw_segments(images, maps, shares, classes, columns=2):
    """A figure of images (3, H, W), their maps (H, W) and the predicted maps, with the classes that occur."""
    predicted = [share.argmax(0) for share in shares]
    occurring = sorted({int(k) for part in (*maps, *predicted) for k in part.unique()} - {data.IGNORE})
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(4.6 * columns, 1.55 * rows + 0.3 + 0.25 * math.ceil(len(occurring) / 6)),
                    layout="constrained")
    axes = figure.subplots(rows, 3 * columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    palette = class_colours()
    for i, (image, truth, guess) in enumerate(zip(images, maps, predicted)):
        three = axes[i // columns][i % columns * 3:i % columns * 3 + 3]
        for axis, title, picture in zip(three, ("image", "truth", "prediction"),
                                        (image.permute(1, 2, 0).numpy(), palette[truth.long().numpy()],
                                         palette[guess.numpy()])):
            axis.imshow(picture, interpolation="nearest")
            if i < columns:
                axis.set_title(title, fontsize=10)
    handles = [axes[0][0].scatter([], [], marker="s", s=60, color=palette[k], label=classes[k])
               for k in occurring]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    return figure


def class_colours():
    """(256, 3) colours in [0, 1]: black for class 0, matplotlib's ten for the next; white for data.IGNORE."""
    hues, rounds = np.arange(256) * 0.61803 % 1, np.arange(256) // 12 % 3
    colours = np.stack([0.5 + 0.5 * np.cos(2 * np.pi * (hues + shift)) for shift in (0, 1 / 3, 2 / 3)], 1)
    colours = colours * (1 - 0.25 * rounds[:, None]) + 0.1 * rounds[:, None]
    colours[1:11] = colormaps["tab10"].colors
    colours[0], colours[data.IGNORE] = 0, 1
    return colours


def draw_layers(table, config):
    """Accuracy by layer, for each pooling."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for pooled, values in table.items():
        label = "mean of patches" if pooled == "patches" else pooled
        axis.plot(range(1, len(values) + 1), values, "o-", label=label)
    axis.set(xlabel="layer", ylabel="accuracy on held-out images", xticks=range(1, len(values) + 1),
             title="linear probe" if config.task == "probe" else f"{config.neighbours} nearest neighbours")
    axis.legend()
    return figure


def main():
    training.run_script(Config, PRESETS, train, complete)


if __name__ == "__main__":
    main()
