"""Fine-tuning for semantic segmentation (sec. 2.6, Table 14).

`python segment.py` fine-tunes the checkpoint written by `python pretrain.py`; the paper's run is
`torchrun --nproc_per_node=8 segment.py --data ADE20K --init FILE`. Images are (B, 3, H, W), class maps
(B, H, W), where data.IGNORE marks pixels to ignore. C is the number of classes.
"""
import dataclasses
import math
import sys
from functools import partial

import torch
import torch.nn.functional as F

sys.path.insert(0, __file__.rpartition("/")[0])    # this folder, which PYTHONSAFEPATH leaves out

import data
import launch
import plots
import pretrained
import run_folder
import vit
from run import Run, parameter_groups

# Table 14. The recipes after intermediate fine-tuning, and drop_path of large, are the released code's; demo,
# tiny and small are ours.
ADE20K = dict(image_size=512, steps=160_000, batch_size=16, base_batch=16, base_lr=1e-3, min_lr=0.0,
              warmup=1500 / 160_000)
PRESETS = {
    "demo": dict(epochs=2.2, batch_size=32, base_batch=32, base_lr=3e-3, min_lr=1e-6, warmup=0.1,
                 clip_grad=3.0, layer_decay=0.75, patch_size=8, dim=128, depth=4, heads=4, drop_path=0.0,
                 position="relative", scale=(0.75, 1.5), jitter=0.0, decoder_dim=64,
                 save_every=100, log_every=1, eval_every=500),
    "tiny": {**ADE20K, **vit.SIZES["tiny"]}, "small": {**ADE20K, **vit.SIZES["small"]},
    "base": {**ADE20K, **vit.SIZES["base"]}, "large": {**ADE20K, **vit.SIZES["large"], "drop_path": 0.2},
    "intermediate": {**ADE20K, **vit.SIZES["base"], "base_lr": 3e-5, "layer_decay": 0.9},
    "intermediate-large": {**ADE20K, **vit.SIZES["large"], "drop_path": 0.2, "base_lr": 2e-5,
                           "layer_decay": 0.95},
}


def parse_args(argv=None):
    """The flags of segment.py. Exits with argparse's message if they do not fit together."""
    parser = launch.make_parser(__file__, __doc__)
    launch.add_finetuning_flags(parser, defaults=vit.ViTConfig())
    add = parser.add_argument
    add("--scale", type=launch.positive, nargs=2, default=(0.5, 2.0),
        help="range of the shorter side / image size, before the crop")
    add("--jitter", type=launch.fraction, default=0.5,
        help="contrast and saturation vary by this fraction, brightness by a quarter of it, hue by a fifth")
    add("--decoder-dim", type=launch.positive_int, default=256, help="width after the first deconvolution")
    args = launch.parse(parser, PRESETS, argv)
    if args.scale[0] > args.scale[1]:
        parser.error(f"--scale: the smaller number comes first, got {args.scale[0]} {args.scale[1]}")
    return args


def train(args, device):
    """Fine-tune in the folder args.out, or continue there; with --eval, only evaluate.

    Writes metrics.jsonl, last.pt, model.pt, result.json and segments.png. Raises UserError, before anything
    is written, if the data or the checkpoint does not fit.
    """
    checkpoint = pretrained.open_checkpoint(args, evaluate=args.eval)    # sets the sizes of the model in args
    train_set, val_set, classes = open_datasets(args)
    config = launch.config_from_flags(vit.ViTConfig, args)
    torch.manual_seed(args.seed)
    model = vit.SemanticSegmenter(config, len(classes), decoder_dim(args, checkpoint))
    model.checkpoint_blocks = args.checkpoint_blocks
    pretrained.load_weights(model, checkpoint, classes, need_head=args.eval)
    model.to(device)
    evaluate_model = partial(evaluate, model, val_set, classes, args, device)
    if args.eval:
        launch.say(f"{len(val_set)} held-out images: {launch.format_metrics(evaluate_model())}")
        return
    run = Run(args, device, len(train_set),
              run_folder.inputs(args, train_set.source, val_set.source, classes))
    if run.finished:
        return
    launch.say(f"{len(classes)} classes, {len(train_set)} training images, {len(val_set)} held out")
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    network = run.prepare(model, groups, evaluate=evaluate_model, schedule=warmup_linear)
    for images, maps in run.batches(train_set):
        images, maps = images.to(device, non_blocking=True), maps.to(device, non_blocking=True)
        with run.autocast():
            logits = network(data.to_float(images))                    # (B, C, H, W)
        run.update(pixel_loss(logits, maps), count=(maps != data.IGNORE).sum())
    report = run.finish(model, {"vit": dataclasses.asdict(config), "classes": classes})
    launch.say("IoU by class: " + launch.format_metrics(report["iou"]))
    run.draw("segments.png", draw, model, val_set, classes, args, device)


def open_datasets(args):
    """(training, held-out) data.Labelled with class maps, and the names of the classes. Raises UserError."""
    source, held_out, classes = data.open_labelled_splits(args, maps=True)
    transform = data.segmentation_transform(args.image_size, train=True, scale=args.scale, jitter=args.jitter)
    val_transform = data.segmentation_transform(args.image_size, train=False)
    return (data.Labelled(source, transform, args.seed),
            data.Labelled(held_out, val_transform, args.seed, train=False), classes)


def decoder_dim(args, checkpoint):
    """The width of the decoder: --decoder-dim, or with --eval that of the checkpoint."""
    if args.eval and "decoder.0.weight" in checkpoint.state:
        return checkpoint.state["decoder.0.weight"].shape[1]
    return args.decoder_dim


def warmup_linear(step, steps, peak, end, warmup_steps):
    """Learning rate: linear to peak over warmup_steps, then linear to end (Table 14)."""
    if step < warmup_steps:
        return peak * min(1, (step + 1) / warmup_steps)
    return peak + (min(end, peak) - peak) * (step - warmup_steps) / max(1, steps - warmup_steps)


def pixel_loss(logits, maps):
    """Cross-entropy in nats, mean over the pixels that are not ignored; 0 if there are none.

    logits (B, C, H, W), maps uint8 (B, H, W).
    """
    total = F.cross_entropy(logits.float(), maps.long(), ignore_index=data.IGNORE, reduction="sum")
    return total / (maps != data.IGNORE).sum().clamp(min=1)


@torch.no_grad()
def evaluate(model, dataset, classes, args, device):
    """Evaluate on all held-out images at their original sizes.

    Returns loss (nats, mean over pixels), mean_iou, pixel_accuracy, and iou by class.
    """
    model.eval()
    means, confusion = launch.Means(), 0
    for images, maps in data.val_loader(dataset, args, device, batch_size=eval_batch_size(dataset)):
        images, maps = data.to_float(images.to(device)), maps.to(device)
        logits = predict(model, images, args, device)
        confusion += confusion_matrix(logits.argmax(1), maps, len(classes)).cpu()
        means.add((maps != data.IGNORE).sum(), loss=pixel_loss(logits, maps))
    confusion = sum(launch.all_gather(confusion))                      # of all processes
    iou = intersection_over_union(confusion)
    return {"loss": means.compute()["loss"], "mean_iou": iou.nanmean().item(),
            "pixel_accuracy": (confusion.diag().sum() / confusion.sum()).item(),
            "iou": dict(zip(classes, iou.tolist()))}


def eval_batch_size(dataset):
    """The batch size of an evaluation: 1 if image sizes differ."""
    source = getattr(dataset.source, "dataset", dataset.source)        # unwrap a torch Subset
    return 1 if isinstance(source, data.Segmentation) else 64


def confusion_matrix(predictions, truth, classes):
    """Counts of pixels (classes, classes), row = truth, column = prediction. Ignored pixels are left out."""
    counted = truth != data.IGNORE
    pairs = truth[counted].long() * classes + predictions[counted]
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def intersection_over_union(confusion):
    """IoU of each class from a confusion matrix: (classes,) float64, nan for classes that do not occur."""
    confusion = confusion.double()
    intersection = confusion.diag()
    return intersection / (confusion.sum(0) + confusion.sum(1) - intersection)


@torch.no_grad()
def predict(model, images, args, device):
    """Logits (B, C, H, W) in fp32 for images (B, 3, H, W) of any size, from a model of S x S images.

    Images are resized so that the shorter side is S, and covered with S x S windows, placed as mmsegmentation
    places them. The logits of the windows are averaged, and resized bilinearly to H x W.
    """
    S, (H, W) = model.config.image_hw[0], images.shape[-2:]
    h, w = (max(S, round(side * S / min(H, W))) for side in (H, W))
    resized = images
    if (h, w) != (H, W):
        resized = F.interpolate(images, size=(h, w), mode="bilinear", antialias=True)
    total, windows = 0, torch.zeros(h, w, device=images.device)        # sum of logits, number of windows
    for top in window_starts(h, S):
        for left in window_starts(w, S):
            with launch.autocast(args.precision, device):
                logits = model(resized[..., top:top + S, left:left + S]).float()
            margins = (left, w - left - S, top, h - top - S)
            total = total + F.pad(logits, margins)
            windows += F.pad(torch.ones(S, S, device=images.device), margins)
    logits = total / windows
    return logits if (h, w) == (H, W) else F.interpolate(logits, size=(H, W), mode="bilinear")


def window_starts(length, size):
    """Where windows begin along a side: two thirds of a window apart, the last one at the end."""
    stride = size * 2 // 3
    return [min(i * stride, length - size) for i in range(1 + math.ceil((length - size) / stride))]


@torch.no_grad()
def draw(model, dataset, classes, args, device):
    """A figure of the predictions for 12 held-out images, each at its own size."""
    images, maps = zip(*data.spread_samples(dataset, 12))
    images = [data.to_float(image) for image in images]
    predicted = [predict(model, image[None].to(device), args, device)[0].argmax(0).cpu() for image in images]
    return plots.figure_segments(images, maps, predicted, classes)


def main():
    launch.start(parse_args, train)


if __name__ == "__main__":
    main()
