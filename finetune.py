"""Fine-tuning for image classification (sec. 2.6, Table 13).

`python finetune.py` fine-tunes the checkpoint written by `python pretrain.py`; the paper's run is
`torchrun --nproc_per_node=16 finetune.py --data FOLDER`. Intermediate fine-tuning is a run of this script,
whose model.pt is the --init of the next run. B images in a batch, C classes.
"""
import dataclasses
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

sys.path.insert(0, __file__.rpartition("/")[0])    # this folder, which PYTHONSAFEPATH leaves out

import data
import launch
import plots
import pretrained
import run_folder
import vit
from run import Run, parameter_groups

# base, large, cifar100: Table 13, with learning rates from its range; as in the released code, base has no
# repeated augmentation and large has drop_path 0.2. 384: sec. 3.1, which does not state warm-up and layer
# decay: here the same fraction of the steps and the same decay as at 224 pixels. intermediate: the released
# code. demo, tiny and small are ours.
IMAGENET = dict(epochs=100.0, batch_size=1024, base_batch=1024, base_lr=4e-3, min_lr=1e-6, warmup=0.2)
LARGE = {**IMAGENET, **vit.SIZES["large"], "epochs": 50.0, "base_lr": 2e-3, "warmup": 0.1,
         "layer_decay": 0.75, "drop_path": 0.2}
AT_384 = dict(image_size=384, epochs=10.0, batch_size=512, base_batch=512, base_lr=5e-6, min_lr=5e-6,
              weight_decay=1e-8, eval_crop=1.0)
INTERMEDIATE = dict(epochs=30.0, batch_size=512, base_batch=512, base_lr=2e-5, warmup=5 / 30,
                    layer_decay=0.85, mixup=0.0, cutmix=0.0, weight_decay=1e-8)
PRESETS = {
    "demo": dict(epochs=2.2, batch_size=32, base_batch=32, base_lr=3e-3, min_lr=1e-6, warmup=0.1,
                 clip_grad=3.0, layer_decay=0.75, patch_size=8, dim=128, depth=4, heads=4, drop_path=0.0,
                 position="relative", randaugment=0.0, mixup=0.0, cutmix=0.0, erasing=0.0,
                 crop_scale=0.5, eval_crop=1.0, save_every=100, log_every=1, eval_every=500),
    "tiny": {**IMAGENET, **vit.SIZES["tiny"]}, "small": {**IMAGENET, **vit.SIZES["small"]},
    "base": {**IMAGENET, **vit.SIZES["base"]}, "large": LARGE,
    "base-384": {**IMAGENET, **vit.SIZES["base"], **AT_384}, "large-384": {**LARGE, **AT_384},
    "intermediate": {**IMAGENET, **vit.SIZES["base"], **INTERMEDIATE},
    "intermediate-large": {**LARGE, **INTERMEDIATE, "layer_decay": 0.9, "drop_path": 0.4},
    "cifar100": {**IMAGENET, **vit.SIZES["base"], "epochs": 150.0, "batch_size": 512, "base_batch": 512,
                 "warmup": 20 / 150, "weight_decay": 0.3, "erasing": 0.0, "repeats": 3},
}


def parse_args(argv=None):
    """The flags of finetune.py. Exits with argparse's message if they do not fit together."""
    parser = launch.make_parser(__file__, __doc__)
    launch.add_finetuning_flags(parser, defaults=vit.ViTConfig())
    add = parser.add_argument
    add("--labels", type=launch.positive_int,
        help="train on this many images, the same number from each class")
    add("--label-smoothing", type=launch.fraction, default=0.1,
        help="fraction of the target that is spread over all classes")
    add("--crop-scale", type=launch.number(float, 1e-6, 1), default=0.08,
        help="smallest area of a random crop / area of the image")
    add("--randaugment", type=launch.number(float, 0, 10), default=9.0,
        help="magnitude of RandAugment, 0 = none")
    add("--mixup", type=launch.nonnegative, default=0.8, help="alpha of mixup, 0 = none")
    add("--cutmix", type=launch.nonnegative, default=1.0,
        help="alpha of cutmix, 0 = none; with mixup, each batch takes one of them at random")
    add("--erasing", type=launch.fraction, default=0.25, help="probability of erasing a rectangle")
    add("--repeats", type=launch.positive_int, default=1,
        help="repeated augmentation: copies of each image in a batch; Table 13 has it for base (DeiT: 3), "
        "the released code does not")
    add("--eval-crop", type=launch.number(float, 1e-6, 1), default=0.875,
        help="side of the evaluated centre crop / shorter side of the image")
    args = launch.parse(parser, PRESETS, argv)
    images = args.batch_size // (launch.world_size() * args.accumulate)
    if images < 2 and (args.mixup or args.cutmix) and not args.eval:
        parser.error("--mixup, --cutmix: need two images or more in each process and part, got one of "
                     f"--batch-size {args.batch_size}; give --mixup 0 --cutmix 0, or a larger batch")
    return args


def train(args, device):
    """Fine-tune in the folder args.out, or continue there; with --eval, only evaluate.

    Writes metrics.jsonl, last.pt, model.pt, result.json and predictions.png. Raises UserError, before it
    writes anything, if the data or the checkpoint does not fit.
    """
    checkpoint = pretrained.open_checkpoint(args, evaluate=args.eval)    # sets the sizes of the model in args
    train_set, val_set, classes = open_datasets(args)
    config = launch.config_from_flags(vit.ViTConfig, args)
    torch.manual_seed(args.seed)
    model = vit.ImageClassifier(config, len(classes))
    model.checkpoint_blocks = args.checkpoint_blocks
    pretrained.load_weights(model, checkpoint, classes, need_head=args.eval)
    model.to(device)
    evaluate_model = partial(evaluate, model, val_set, args, device)
    if args.eval:
        launch.say(f"{len(val_set)} held-out images: {launch.format_metrics(evaluate_model())}")
        return
    run = Run(args, device, len(train_set),
              run_folder.inputs(args, train_set.source, val_set.source, classes))
    if run.finished:
        return
    launch.say(f"{len(classes)} classes, {len(train_set)} training images, {len(val_set)} held out")
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    network = run.prepare(model, groups, evaluate=evaluate_model)
    mix = make_mixup(args, len(classes))
    for images, labels in run.batches(train_set, repeats=args.repeats):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        images, labels = mix(data.to_float(images), labels)            # labels (B,), mixed labels (B, C)
        with run.autocast():
            logits = network(images)                                   # (B, C)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing)
        run.update(loss)
    run.finish(model, {"vit": dataclasses.asdict(config), "classes": classes, "eval_crop": args.eval_crop})
    run.draw("predictions.png", draw, model, val_set, classes, args, device)


def open_datasets(args):
    """(training, held-out) data.Labelled of --data, and the names of the classes. Raises UserError."""
    source, held_out, classes = data.open_labelled_splits(args)
    transform = data.classification_transform(
        args.image_size, train=True, crop_scale=args.crop_scale, erasing=args.erasing,
        randaugment=args.randaugment)
    val_transform = data.classification_transform(args.image_size, train=False, eval_crop=args.eval_crop)
    return (data.Labelled(source, transform, args.seed),
            data.Labelled(held_out, val_transform, args.seed, train=False), classes)


def make_mixup(args, num_classes):
    """A function (images, labels) -> (images, labels): mixup or cutmix within the batch, or neither.

    Mixed labels are class probabilities (B, C).
    """
    transforms = []
    if args.mixup:
        transforms.append(v2.MixUp(alpha=args.mixup, num_classes=num_classes))
    if args.cutmix:
        transforms.append(v2.CutMix(alpha=args.cutmix, num_classes=num_classes))
    return v2.RandomChoice(transforms) if transforms else lambda images, labels: (images, labels)


@torch.no_grad()
def evaluate(model, dataset, args, device):
    """loss (cross-entropy in nats, mean over images), top1 and top5 accuracy on all held-out images."""
    model.eval()
    means = launch.Means()
    for images, labels in data.val_loader(dataset, args, device, batch_size=64):
        images, labels = data.to_float(images.to(device)), labels.to(device)
        with launch.autocast(args.precision, device):
            logits = model(images)
        correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]    # (B, 5)
        means.add(len(images), loss=F.cross_entropy(logits.float(), labels),
                  top1=correct[:, 0].double().mean(), top5=correct.any(dim=1).double().mean())
    return means.compute()


@torch.no_grad()
def draw(model, dataset, classes, args, device):
    """A figure of the predictions for 12 held-out images."""
    images, labels = zip(*data.spread_samples(dataset, 12))
    images = data.to_float(torch.stack(images))
    with launch.autocast(args.precision, device):
        probabilities = model(images.to(device)).float().softmax(dim=1).cpu()
    return plots.figure_classes(images, labels, probabilities, classes)


def main():
    launch.start(parse_args, train)


if __name__ == "__main__":
    main()
