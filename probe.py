"""Evaluate the frozen features of every layer: with linear classifiers (appendix D) or nearest neighbours.

`python probe.py` trains a linear probe on each layer of the checkpoint written by `python pretrain.py`;
`python probe.py --knn` needs no training. B images, L layers, D width, C classes. A layer has two features:
the mean of its patches, as in the paper, and [S].
"""
import dataclasses
import sys
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, __file__.rpartition("/")[0])    # this folder, which PYTHONSAFEPATH leaves out

import data
import launch
import plots
import pretrained
import run_folder
import vit
from run import Run

KINDS = ("patches", "[S]")    # the two features of a layer
PRESETS = {
    "demo": dict(epochs=6.0, batch_size=64, base_batch=64, base_lr=1e-2, min_lr=0.0, warmup=0.0,
                 weight_decay=1e-4, crop_scale=0.5, eval_crop=1.0, save_every=100),
    "base": dict(epochs=50.0, batch_size=1024, base_batch=1024, base_lr=4e-3, min_lr=0.0, warmup=0.0,
                 weight_decay=1e-4),                                   # appendix D
}


def parse_args(argv=None):
    """The flags of probe.py. Exits with argparse's message if they do not fit together."""
    parser = launch.make_parser(__file__, __doc__)
    launch.add_image_flags(parser)
    add = parser.add_argument
    add("--init", type=launch.text, help="model.pt or a released checkpoint (default: the model.pt that "
        "pretrain.py wrote for the same --data)")
    add("--knn", action="store_true", help="k nearest neighbours in place of linear probes")
    add("--neighbours", type=launch.positive_int, default=20, help="--knn: how many neighbours vote")
    add("--labels", type=launch.positive_int,
        help="train on this many images, the same number from each class")
    add("--validate", type=launch.positive_int,
        help="hold out this many training images, and evaluate on them instead")
    add("--crop-scale", type=launch.number(float, 1e-6, 1), default=0.08,
        help="smallest area of a random crop / area of the image")
    add("--eval-crop", type=launch.number(float, 1e-6, 1), default=0.875,
        help="side of the evaluated centre crop / shorter side of the image")
    args = launch.parse(parser, PRESETS, argv)
    if args.accumulate > 1:
        parser.error("--accumulate: not supported, because features are normalised over the whole batch")
    if args.batch_size < 2 and not args.knn:
        parser.error("--batch-size: must be at least 2, for features are normalised over it, got 1")
    if args.init == "none":
        parser.error("--init none: there are no features to evaluate; give a model.pt")
    of_training = ("steps", "epochs", "lr", "min_lr", "warmup", "weight_decay", "clip_grad", "crop_scale",
                   "compile", "log_every", "save_every", "eval_every")
    for name in args.given:
        if name in (of_training if args.knn else ["neighbours"]):
            parser.error(f"--{name.replace('_', '-')}: not used {'with' if args.knn else 'without'} --knn")
    if args.knn and "out" not in args.given:
        args.out += "-knn"
    return args


def train(args, device):
    """Train the probes in the folder args.out, or continue there; with --knn, find neighbours instead.

    Writes result.json, layers.png, and for the probes metrics.jsonl, last.pt and model.pt. Raises UserError,
    before anything is written, if the data or the checkpoint does not fit.
    """
    # Sets the sizes of the model in args. Only fine-tuning needs a table of position bias for each block.
    checkpoint = pretrained.open_checkpoint(args, copy_shared_table=False)
    config = dataclasses.replace(launch.config_from_flags(vit.ViTConfig, args), drop_path=0.0)
    train_set, val_set, classes = open_datasets(args)
    torch.manual_seed(args.seed)
    model = LinearProbe(config, len(classes))
    pretrained.load_weights(model, checkpoint, classes)
    model.to(device)
    run = Run(args, device, None if args.knn else len(train_set),
              run_folder.inputs(args, train_set.source, val_set.source, classes))
    if run.finished:
        return
    launch.say(f"{len(classes)} classes, {len(train_set)} training images, {len(val_set)} held out")
    if args.knn:
        return evaluate_knn(run, model, train_set, val_set, len(classes))
    groups = [{"params": list(model.head.parameters()), "lr_scale": 1.0, "weight_decay": args.weight_decay}]
    network = run.prepare(model, groups, evaluate=partial(evaluate, model, val_set, args, device))
    for images, labels in run.batches(train_set):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with run.autocast():
            logits = network(data.to_float(images))                    # (B, C, L, 2)
        labels = labels[:, None, None].expand(-1, *logits.shape[2:])   # (B, L, 2), the same for each probe
        run.update(F.cross_entropy(logits.float(), labels))            # mean over images and probes
    report = run.finish(model, {"vit": dataclasses.asdict(config), "classes": classes})
    run.draw("layers.png", draw, report, "linear probe")


def open_datasets(args):
    """(training, held-out) data.Labelled of --data, and the class names. k-NN takes centre crops of both."""
    source, held_out, classes = data.open_labelled_splits(args)
    transform = data.classification_transform(args.image_size, train=not args.knn, crop_scale=args.crop_scale,
                                              eval_crop=args.eval_crop)
    val_transform = data.classification_transform(args.image_size, train=False, eval_crop=args.eval_crop)
    return (data.Labelled(source, transform, args.seed, train=not args.knn),
            data.Labelled(held_out, val_transform, args.seed, train=False), classes)


# ---- Linear probes ----

class LinearProbe(vit.VisionTransformer):
    """Linear classifiers on the frozen features of each layer, all trained at once (appendix D).

    Features are standardised by a BatchNorm without weights, as in MAE's linear probe. In evaluation it takes
    the mean statistics of all training batches, so that a short run is enough. Classifiers start at zero.
    """

    def __init__(self, config, num_classes):
        super().__init__(config)
        self.requires_grad_(False)
        probes = 2 * config.depth
        # a group for each probe: a linear classifier of its feature
        classifiers = nn.Conv1d(probes * config.dim, probes * num_classes, 1, groups=probes)
        nn.init.zeros_(classifiers.weight)
        nn.init.zeros_(classifiers.bias)
        norm = GlobalBatchNorm(probes * config.dim, eps=1e-6, momentum=None, affine=False)
        self.head = nn.Sequential(norm, classifiers)

    def forward(self, images):
        """images (B, 3, H, W) in [0, 1]. Returns logits (B, C, L, 2), the last axis ordered as KINDS."""
        with torch.no_grad():
            features = pool(self.hidden_states(images)).flatten(1).float()    # (B, L 2 D)
        logits = self.head(features[..., None])                        # (B, L 2 C, 1)
        return logits.view(len(images), self.config.depth, 2, -1).movedim(-1, 1)


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the batches of all processes together. nn.SyncBatchNorm does this on GPUs only.

    Its input, (B, features, 1) in each process, needs no gradient, so gathering it is enough.
    """

    def forward(self, features):
        if not (self.training and dist.is_initialized()):
            return super().forward(features)
        parts = [torch.empty_like(features) for _ in range(launch.world_size())]
        dist.all_gather(parts, features)
        return super().forward(torch.cat(parts)).chunk(len(parts))[launch.rank()]


def pool(states):
    """The features of each layer, ordered as KINDS: a list of L tensors (B, 1+N, D) -> (B, L, 2, D)."""
    return torch.stack([torch.stack([h[:, 1:].mean(dim=1), h[:, 0]], dim=1) for h in states], dim=1)


@torch.no_grad()
def evaluate(model, dataset, args, device):
    """The accuracies of all probes on the held-out images, as by_layer reports them."""
    model.eval()
    means = launch.Means()
    for images, labels in data.val_loader(dataset, args, device, batch_size=64):
        with launch.autocast(args.precision, device):
            logits = model(data.to_float(images.to(device)))           # (B, C, L, 2)
        correct = logits.argmax(dim=1) == labels.to(device)[:, None, None]
        means.add(len(images), top1=correct.double().mean(dim=0))      # (L, 2)
    return by_layer(torch.tensor(means.compute()["top1"], dtype=torch.float64))


def by_layer(accuracy):
    """Report accuracies (L, 2) of all layers: top1_by_layer, and the best layer.

    That is the layer with the highest accuracy of its mean-of-patches feature: top1 is this accuracy, layer
    its number, counted from 1.
    """
    patches, cls = accuracy.t().tolist()
    return {"top1": max(patches), "layer": 1 + patches.index(max(patches)),
            "top1_by_layer": dict(zip(KINDS, (patches, cls)))}


def draw(report, title):
    """A figure of the accuracy by layer."""
    patches, cls = (report["top1_by_layer"][kind] for kind in KINDS)
    return plots.figure_by_layer({title: {"mean of patches": patches, "[S]": cls}},
                                     "accuracy on held-out images")


# ---- Nearest neighbours ----

@torch.no_grad()
def evaluate_knn(run, model, train_set, val_set, num_classes):
    """Measure the accuracy of weighted k nearest neighbours by the features of each layer.

    Each process keeps the features of its share of the training images. Writes result.json and layers.png.
    """
    args, device, config = run.args, run.device, model.config
    bytes_per_image = 2 * config.depth * len(KINDS) * config.dim       # in half precision
    memory = (len(train_set) + len(val_set)) * bytes_per_image
    launch.say(f"the features of {len(train_set)} training and {len(val_set)} held-out images take "
               f"{memory / 1e9:.2f} GB")
    features, labels = extract(model, train_set, args, device)
    parts = launch.all_gather(extract(model, val_set, args, device))
    val_features, val_labels = (torch.cat(tensors) for tensors in zip(*parts))
    accuracy = torch.zeros(config.depth, 2, dtype=torch.float64)
    for layer in range(config.depth):
        for kind in range(2):
            tensors = features[:, layer, kind], labels, val_features[:, layer, kind], val_labels
            accuracy[layer, kind] = knn_accuracy(*(tensor.to(device) for tensor in tensors), num_classes,
                                                 args.neighbours)
    report = by_layer(accuracy)
    run.write_result(report)
    run.draw("layers.png", draw, report, f"{args.neighbours} nearest neighbours")


def extract(model, dataset, args, device):
    """Features of norm 1 (n, L, 2, D) in half precision, and labels (n,), of this process's images."""
    features = [torch.empty(0, model.config.depth, 2, model.config.dim, dtype=torch.half)]
    labels = [torch.empty(0, dtype=torch.int64)]                       # a process may have no images
    model.eval()
    for images, targets in data.val_loader(dataset, args, device):    # in order, each once
        with launch.autocast(args.precision, device):
            pooled = pool(model.hidden_states(data.to_float(images.to(device))))
        features.append(F.normalize(pooled.float(), dim=-1).half().cpu())
        labels.append(targets)
    return torch.cat(features), torch.cat(labels)


def knn_accuracy(features, labels, val_features, val_labels, num_classes, neighbours, temperature=0.07):
    """Accuracy of votes by the most similar training images, weighted by exp(similarity / temperature).

    features (n, D) and labels (n,): this process's share; val_features (m, D), val_labels (m,): all of them.
    Features have norm 1; their similarity is the cosine.
    """
    def from_all_processes(tensor):
        return torch.cat([part.to(tensor.device) for part in launch.all_gather(tensor.cpu())], dim=1)

    correct, features = 0, features.float().t()                        # (D, n)
    for queries, truth in zip(val_features.split(1024), val_labels.split(1024)):
        similarity, index = (queries.float() @ features).topk(min(neighbours, len(labels)))
        similarity = from_all_processes(similarity)                    # (m, candidates)
        candidate_labels = from_all_processes(labels[index])
        similarity, index = similarity.topk(min(neighbours, similarity.shape[1]))    # (m, k)
        votes = torch.zeros(len(queries), num_classes, device=queries.device)
        votes.scatter_add_(1, candidate_labels.gather(1, index), (similarity / temperature).exp())
        correct += (votes.argmax(dim=1) == truth).sum().item()
    return correct / len(val_labels)


def main():
    launch.start(parse_args, train)


if __name__ == "__main__":
    main()
