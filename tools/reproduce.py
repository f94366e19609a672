"""The paper's claims at laptop scale: `python -m tools.reproduce CLAIM`, or `all`; `--list` shows commands.

A claim is a table whose numbers come from runs of the training scripts, each in a folder of its own. Finished
runs are not repeated, and interrupted runs continue. Then the table and a plot are written to figures/.

Apart from what a claim compares, all rows of a table have the same images, model, number of steps and recipe,
except for two values of fine-tuning: the layer decay is 0.75, or 1 from scratch, and `choose_lr` gives the
learning rate.
"""
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import data
import launch
import shapes
import weights

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_dvae.py", "pretrain.py", "finetune.py", "segment.py", "probe.py")    # in order of execution
FASHION, SHAPES = "fashion-mnist", "shapes"    # the data of classification, and of segmentation

# How many images the runs see; an image that is seen in several epochs counts each time. finetune: number of
# labels -> images, for classification. `seeds` are those of fine-tuning, for the choice of labels, order and
# crops; pretrain_seeds are for `ablations`, while the other claims pre-train with one seed.
SCALES = {
    "quick": SimpleNamespace(
        tokenizer=6_400, pretrain={FASHION: 16_000, SHAPES: 3_200}, segment=9_600,
        finetune={100: 3_200, 1000: 6_400}, convergence_labels=1000, seeds=2, pretrain_seeds=1),
    "full": SimpleNamespace(
        tokenizer=12_800, pretrain={FASHION: 96_000, SHAPES: 12_800}, segment=25_600,
        finetune={100: 6_400, 300: 9_600, 1000: 19_200, 5000: 25_600, 60_000: 38_400},
        convergence_labels=5000, seeds=3, pretrain_seeds=2),
}
BATCH_SIZE, DEPTH = 32, 4
LAYERS = [f"layer {i + 1}" for i in range(DEPTH)]
LABELS = 1000      # where a claim has one number of labels
EVALUATIONS = 6    # during a run that `convergence` shows

# Flags of the scripts. RANDOM_WEIGHTS is for a single step of pre-training, which changes almost nothing.
MODEL = f"--depth {DEPTH} --dim 96 --heads 4 --position absolute --layer-scale 0 --init-std 0.057"
SIZES = {FASHION: "--image-size 28 --patch-size 4", SHAPES: "--image-size 64 --patch-size 8"}
TOKENIZER_SIZES = {FASHION: "--image-size 28", SHAPES: "--image-size 32"}    # one token per patch
RANDOM_WEIGHTS = "--target pixels --lr 1e-12"

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)    # that `tune` compares; see choose_lr for classification
SEGMENTATION_LR = 4e-3

# Rows of Tables 4 and 5: label -> (flags of pretrain.py, ImageNet top-1 and ADE20K mIoU in the paper)
ABLATIONS = {
    "BEiT": ("", "82.86", "44.65"),
    "− blockwise masking": ("--masking random", "82.77", "42.93"),
    "− visual tokens": ("--target pixels", "81.04", "41.38"),
    "− visual tokens − blockwise masking": ("--target pixels --masking random", "80.50", "37.09"),
    "+ recover 100 % of the tokens": ("--predict all", "82.59", "40.93"),
    "− masking + recover 100 %": ("--masking none --predict all", "81.67", "36.73"),
}
ARCHITECTURES = {
    "ViT": ("", "82.86", "44.86"),
    "+ layer scale": ("--layer-scale 0.1", "83.00", "45.43"),
    "+ layer scale + relative positions": ("--layer-scale 0.1 --position shared_relative", "83.22", "45.70"),
}


# ---- Planning runs ----

class Lab:
    """The runs that a claim needs, and its table, which has nan where a run is not finished yet.

    runs: name -> command, in which {out} is the folder of all runs and {data_root} is --data-root. Methods
    that plan runs return their names. Claims share the runs with the same name. A claim function is called
    twice: before the runs, to plan them, and after them, to fill in the table.
    """

    def __init__(self, claim, args):
        self.scale, self.seeds, self.out = SCALES[args.scale], range(args.seeds), args.out
        self.runs = {}
        self.table = CLAIMS[claim](self)

    def add_run(self, script, name, data_name, flags, images=None, batch_size=BATCH_SIZE):
        """Plan a run of a script. images: how many it sees in training; None if it does not train."""
        name = "-".join(name.replace("--", "").split())                # "a --b 1" -> "a-b-1"
        command = (f"{script} --out {{out}}/{name} --data {data_name} --data-root {{data_root}} "
                   f"--preset demo --device cpu {flags}")
        if images is not None:
            command += f" --batch-size {batch_size} --steps {max(1, int(images) // batch_size)}"
        assert self.runs.setdefault(name, command) == command, f"two runs are called {name}"
        return name

    def pretrain(self, flags="", data_name=FASHION, share=1):
        """Plan pre-training on `share` times the images of the scale, and its tokenizer."""
        name = f"pretrain {data_name} {flags}" + (f" x{share:g}" if share != 1 else "")
        if "--target pixels" not in flags:
            tokenizer = self.add_run("train_dvae.py", f"tokenizer {data_name}", data_name,
                                     TOKENIZER_SIZES[data_name], self.scale.tokenizer, batch_size=16)
            flags = f"--tokenizer {{out}}/{tokenizer}/model.pt {flags}"
        return self.add_run("pretrain.py", name, data_name, f"{MODEL} {SIZES[data_name]} {flags}",
                            share * self.scale.pretrain[data_name])

    def finetune(self, script, name, start, data_name, images, flags, evaluations=1):
        """Plan fine-tuning of the run called `start`, or training from scratch if start is None."""
        origin = f"--init {{out}}/{start}/model.pt --layer-decay 0.75"
        if start is None:
            origin = f"--init none --layer-decay 1 {MODEL} {SIZES[data_name]}"
        eval_every = math.ceil(images // BATCH_SIZE / evaluations)
        return self.add_run(script, f"{name} {start or 'scratch'}", data_name,
                            f"{origin} --eval-every {eval_every} {flags}", images)

    def classify(self, start, labels=LABELS):
        """Plan fine-tuning with this number of labels, once per seed."""
        in_convergence = labels == self.scale.convergence_labels and start in (None, f"pretrain-{FASHION}")
        evaluations = EVALUATIONS if in_convergence else 1             # `convergence` shares these runs
        flags = f"--labels {labels} --lr {choose_lr(start)} --crop-scale 0.8"
        return [self.finetune("finetune.py", f"finetune {labels} {seed}", start, FASHION,
                              self.scale.finetune[labels], f"{flags} --seed {seed}", evaluations)
                for seed in self.seeds]

    def top1(self, start, labels=LABELS):
        """The accuracy of `classify` for each seed, in per cent."""
        return [100 * self.result(run, "top1") for run in self.classify(start, labels)]

    def mean_iou(self, start):
        """The mean IoU of segmentation for each seed, in per cent."""
        runs = [self.finetune("segment.py", f"segment {seed}", start, SHAPES, self.scale.segment,
                              f"--lr {SEGMENTATION_LR} --seed {seed}") for seed in self.seeds]
        return [100 * self.result(run, "mean_iou") for run in runs]

    def read(self, run, function, default=math.nan):
        """function(folder) for the folder of a finished run; otherwise the default."""
        folder = self.out / run
        return function(folder) if is_finished(folder, self.runs[run]) else default

    def result(self, run, name, default=math.nan):
        """An entry of result.json of a finished run; otherwise the default."""
        return self.read(run, lambda folder: json.loads((folder / "result.json").read_text())[name], default)


def choose_lr(start):
    """The learning rate of classification: 2e-3, or another that is better by half a point in `tune`."""
    if start is None:
        return 1e-3
    return 4e-3 if "target-pixels" in start else 2e-3


class Table(NamedTuple):
    """The table of a claim. A cell is a text, or a list of numbers, one per seed.

    rows     label -> cells, one per column
    xlabel   if given, the plot has a line per row; otherwise it has a panel per column and a point per row
    panels   titles of the panels of lines; the label of a row begins with that of its panel
    """
    corner: str
    columns: list
    rows: dict
    xlabel: str | None = None
    panels: tuple = ("",)


# ---- Claims: functions of a Lab that plan runs and return a Table of their results ----

def pretraining(lab):
    """Table 1 (pixels: Table 4): fine-tuned from visual tokens, from pixels, and from scratch, by labels"""
    rows = {}
    for label, start, paper in (
            ("pre-trained on visual tokens", lab.pretrain(), "83.2 (300 epochs: 82.86)"),
            ("pre-trained on pixels", lab.pretrain("--target pixels"), "81.04 (300 epochs)"),
            ("from scratch", None, "81.8 (DeiT)")):
        accuracies = [lab.top1(start, labels) for labels in lab.scale.finetune]
        rows[label] = [*accuracies, f"{choose_lr(start):g}", paper]
    columns = [*(f"{labels:,} labels" for labels in lab.scale.finetune), "learning rate",
               "paper: ImageNet, all labels"]
    return Table("top-1, %", columns, rows, "labelled images")


def compare_pretrainings(lab, variants, seeds=1):
    """A Table of variants, such as ABLATIONS, each pre-trained with this number of seeds."""
    rows = {}
    for label, (flags, imagenet, ade20k) in variants.items():
        top1, mean_iou = [], []
        for seed in range(seeds):
            flags_and_seed = f"{flags} --seed {seed}" if seed else flags
            top1 += lab.top1(lab.pretrain(flags_and_seed))
            mean_iou += lab.mean_iou(lab.pretrain(flags_and_seed, SHAPES))
        rows[label] = [top1, imagenet, mean_iou, ade20k]
    columns = [f"top-1, {LABELS:,} labels", "paper: ImageNet", "mean IoU, shapes", "paper: ADE20K"]
    return Table("", columns, rows)


def ablations(lab):
    """Table 4: blockwise masks, visual tokens, masking; classification and segmentation"""
    return compare_pretrainings(lab, ABLATIONS, lab.scale.pretrain_seeds)


def architecture(lab):
    """Table 5: layer scale and relative position bias; classification and segmentation"""
    return compare_pretrainings(lab, ARCHITECTURES)


def convergence(lab):
    """Table 2 (a figure): accuracy during fine-tuning, pre-trained and from scratch"""
    def read_curve(folder):
        log = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [100 * line["val_top1"] for line in log if "val_top1" in line]

    labels, rows = lab.scale.convergence_labels, {}
    for label, start in (("pre-trained", lab.pretrain()), ("from scratch", None)):
        curves = [lab.read(run, read_curve, [math.nan] * EVALUATIONS) for run in lab.classify(start, labels)]
        rows[label] = list(zip(*curves))                               # (EVALUATIONS, seeds)
    epochs = [lab.scale.finetune[labels] / labels * i / EVALUATIONS for i in range(1, 1 + EVALUATIONS)]
    return Table(f"top-1, % after epochs of {labels:,} labels", [f"{epoch:.1f}" for epoch in epochs], rows,
                 "epochs of fine-tuning")


def longer(lab):
    """Table 4, last row: pre-training half as long, as long, twice and four times as long"""
    rows = {}
    for share, paper in ((0.5, ""), (1, "82.86 (300 epochs)"), (2, ""), (4, "83.19 (800 epochs, 2.7 times)")):
        start = lab.pretrain(share=share)
        label = f"{share * lab.scale.pretrain[FASHION]:,.0f}"
        rows[label] = [[lab.result(start, "val_loss")], lab.top1(start), paper]
    return Table("images seen in pre-training", ["held-out loss", "top-1, %", "paper"], rows)


def segmentation(lab):
    """Table 3: segmentation of shapes from scratch, pre-trained, and after intermediate fine-tuning"""
    start, start_x4 = lab.pretrain(data_name=SHAPES), lab.pretrain(data_name=SHAPES, share=4)
    intermediate = lab.finetune("finetune.py", "intermediate", start, SHAPES, lab.scale.segment, "--lr 3e-3")
    rows = {"from scratch": [lab.mean_iou(None), "none (supervised on ImageNet: 45.3)"],
            "BEiT": [lab.mean_iou(start), "45.6"],
            "BEiT, pre-trained four times as long": [lab.mean_iou(start_x4), ""],
            "BEiT + intermediate fine-tuning": [lab.mean_iou(intermediate), "47.7"]}
    return Table("", ["mean IoU, shapes", "paper: ADE20K"], rows)


def probe(lab):
    """Linear probe (Table 9) and k-NN by layer: pre-trained, supervised from scratch, random weights"""
    labels, rows = max(lab.scale.finetune), {}
    models = {"pre-trained": lab.pretrain(), f"supervised, {labels:,} labels": lab.classify(None, labels)[0],
              "random weights": lab.pretrain(RANDOM_WEIGHTS, share=0)}
    methods = {"linear probe": ("probe", "--lr 1e-2 --crop-scale 1", 50_000), "k-NN": ("knn", "--knn", None)}
    for title, (name, flags, images) in methods.items():
        for label, model in models.items():
            flags_and_model = f"{flags} --init {{out}}/{model}/model.pt --labels 5000"
            run = lab.add_run("probe.py", f"{name} {model}", FASHION, flags_and_model, images, batch_size=64)
            accuracies = lab.result(run, "top1_by_layer", {"patches": [math.nan] * DEPTH})["patches"]
            rows[f"{title}, {label}"] = [[100 * accuracy] for accuracy in accuracies]
    return Table("top-1, %", LAYERS, rows, "probed with 5,000 labels", tuple(methods))


def attention_rows(lab, measure, panel=""):
    """Rows of a table: measure(maps, coverage), (L,), for random weights and four pre-trainings."""
    runs, rows = {"random weights": lab.pretrain(RANDOM_WEIGHTS, SHAPES, share=0)}, {}
    for share in (0.25, 0.5, 1, 4):
        label = f"{share * lab.scale.pretrain[SHAPES]:,.0f} images seen"
        runs[label] = lab.pretrain(data_name=SHAPES, share=share)
    for label, run in runs.items():
        values = lab.read(run, lambda folder: measure(*attend_to_scenes(folder / "model.pt")).tolist(),
                          [math.nan] * DEPTH)
        rows[f"{panel}{label}"] = [[value] for value in values]
    return rows


def attention(lab):
    """Figure 2, in numbers: attention of an object's patches to the object, by length of pre-training"""
    rows = attention_rows(lab, object_attention, "all patches, ")
    rows |= attention_rows(lab, partial(object_attention, exclude_radius=2), "without neighbours, ")
    return Table("attention on the object / its share", LAYERS, rows, "block of the transformer",
                 ("all patches", "without neighbours"))


def attention_distance(lab):
    """How far away the patches are that a patch attends to, mean over heads, by length of pre-training"""
    def measure(maps, coverage):
        return attention_distances(maps, coverage.shape[1:]).mean(dim=1)

    rows = attention_rows(lab, measure)
    return Table("attention distance, patches", LAYERS, rows, "block of the transformer")


def mask_ratio(lab):
    """How much is masked: 15, 25, 40, 60, 75 %"""
    rows = {}
    for ratio in (0.15, 0.25, 0.4, 0.6, 0.75):
        start = lab.pretrain("" if ratio == 0.4 else f"--mask-ratio {ratio}")
        rows[f"{ratio:.0%}"] = [lab.top1(start)]
    return Table("masked", ["top-1, %"], rows)


def tune(lab):
    """Learning rates of fine-tuning: half the steps, compared on training images that are held out"""
    rows = {}
    starts = {label: pretrain_flags for label, (pretrain_flags, _, _) in ABLATIONS.items()}
    starts["from scratch"] = None
    for label, pretrain_flags in starts.items():
        start = None if pretrain_flags is None else lab.pretrain(pretrain_flags)
        runs = [lab.finetune("finetune.py", f"tune {lr}", start, FASHION, lab.scale.finetune[LABELS] // 2,
                             f"--labels {LABELS} --lr {lr} --crop-scale 0.8 --seed 100 --validate 5000")
                for lr in LEARNING_RATES]
        rows[label] = [*([100 * lab.result(run, "top1")] for run in runs), f"{choose_lr(start):g}"]
    for label, pretrain_flags in starts.items():
        start = None if pretrain_flags is None else lab.pretrain(pretrain_flags, SHAPES)
        runs = [lab.finetune("segment.py", f"tune segment {lr}", start, SHAPES, lab.scale.segment // 2,
                             f"--lr {lr} --seed 100 --validate 1000") for lr in LEARNING_RATES]
        rows[f"segmentation, {label}"] = [*([100 * lab.result(run, "mean_iou")] for run in runs),
                                          f"{SEGMENTATION_LR:g}"]
    return Table("top-1 or mean IoU, %", [*map(str, LEARNING_RATES), "used"], rows, "learning rate")


CLAIMS = {function.__name__.replace("_", "-"): function for function in (
    pretraining, ablations, architecture, convergence, longer, segmentation, probe, attention,
    attention_distance, mask_ratio, tune)}


# ---- Self-attention: maps are a list of L tensors (B, heads, 1+N, 1+N), query by key, [S] first ----

@torch.no_grad()
def attend_to_scenes(path, count=200):
    """Self-attention of a model of 64-pixel images for held-out scenes of shapes.

    Returns its maps, and the share of each patch that the main object covers, (B, h, w). Distractors of the
    same shape are counted as part of it.
    """
    model = weights.load_model(path)
    images, on_object = [], []
    for index in range(count):
        image, label, class_map = shapes.render_scene("val", index)
        images.append(torch.from_numpy(image).permute(2, 0, 1))        # (3, 64, 64)
        on_object.append(torch.from_numpy(class_map == 1 + label))
    maps = model.attention_maps(data.to_float(torch.stack(images)), layer=None)
    return maps, F.adaptive_avg_pool2d(torch.stack(on_object).float(), model.config.grid)


def patch_distances(grid, p=2.0):
    """The distance of any two patches in the p-norm, in patches: (N, N)."""
    positions = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()    # (N, 2)
    return torch.cdist(positions, positions, p)


def object_attention(maps, coverage, exclude_radius=0):
    """The share of attention that an object's patches pay to the object / its share of the image: (L,).

    1 means that the object makes no difference. Attention is averaged over heads, and the ratio over queries:
    the patches that the object covers by half or more. coverage (B, h, w): how much of each patch it covers.
    exclude_radius: ignore keys closer than this many patches to the query, in both shares; 2 excludes the
    query and its eight neighbours.
    """
    counted = (patch_distances(coverage.shape[1:], p=math.inf) >= exclude_radius).float()    # (N, N)
    coverage = coverage.flatten(1)                                     # (B, N)
    object_share = coverage @ counted / counted.sum(dim=1)             # (B, N), for each query
    queries = (coverage >= 0.5) & (object_share > 0)
    ratios = []
    for layer in maps:
        attention = layer[:, :, 1:, 1:].mean(dim=1) * counted          # (B, N, N)
        share = torch.einsum("bqk,bk->bq", attention, coverage) / attention.sum(dim=-1).clamp(min=1e-12)
        ratios.append((share / object_share.clamp(min=1e-12))[queries].mean())
    return torch.stack(ratios)


def attention_distances(maps, grid):
    """Mean distance, in patches, between a patch and those that it attends to: (L, heads)."""
    distance, means = patch_distances(grid), []
    for layer in maps:
        attention = layer[:, :, 1:, 1:]                                # (B, heads, N, N)
        means.append(((attention * distance).sum(dim=-1) / attention.sum(dim=-1)).mean(dim=(0, 2)))
    return torch.stack(means)


# ---- Executing runs ----

def is_finished(folder, command):
    """Whether the folder holds the result of this command."""
    file = folder / "command.txt"
    return (folder / "result.json").exists() and file.exists() and file.read_text() == command


def execute(runs, args):
    """Execute the runs (name -> command) that are not finished, args.jobs at a time, with one thread each.

    A run waits for those whose model.pt it needs. The scripts continue an interrupted run and refuse a folder
    whose run had other flags. If a run fails, the others stop after their current step, and ChildProcessError
    names it.
    """
    futures, processes = {}, []

    def execute_run(name, command):
        for start in re.findall(r"{out}/(\S+)/model.pt", command):
            futures[start].result()
        folder = args.out / name
        if is_finished(folder, command):
            return
        folder.mkdir(parents=True, exist_ok=True)
        folders = dict(out=args.out, data_root=args.data_root)
        script, *flags = [word.format(**folders) for word in command.split()]
        begin = time.perf_counter()
        with open(folder / "log.txt", "a") as log:
            process = subprocess.Popen([sys.executable, ROOT / script, *flags], stdout=log, stderr=log,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
            processes.append(process)
            status = process.wait()
        with open(folder / "seconds.txt", "a") as file:                # a line for each part of the run
            file.write(f"{time.perf_counter() - begin:.0f}\n")
        if status:
            last_line = "".join((folder / "log.txt").read_text().strip().splitlines()[-1:])
            raise ChildProcessError(f"{name}: status {status}, {last_line}; see {folder}/log.txt")
        (folder / "command.txt").write_text(command)                   # the result is that of this command

    with ThreadPoolExecutor(args.jobs) as pool:
        for name, command in sorted(runs.items(), key=lambda run: SCRIPTS.index(run[1].split()[0])):
            futures[name] = pool.submit(execute_run, name, command)
        try:
            for future in tqdm(as_completed(futures.values()), total=len(futures), desc="runs"):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise


def list_runs(labs, args):
    """--list: print the commands that are not finished, and an estimate of the time that they take."""
    runs = {}
    for claim, lab in labs.items():
        launch.say(f"{claim}: {CLAIMS[claim].__doc__}; {len(lab.runs)} runs")
        runs |= lab.runs
    commands = [command for name, command in runs.items() if not is_finished(args.out / name, command)]
    for command in commands:
        launch.say("python " + command.format(out=args.out, data_root=args.data_root))
    sizes = re.findall(r"--batch-size (\d+) --steps (\d+)", "\n".join(commands))
    seconds = 20 * len(commands) + sum(int(batch_size) * int(steps) / 200 for batch_size, steps in sizes)
    launch.say(f"{len(commands)} of {len(runs)} different runs to do, {args.jobs} at a time: about "
               f"{seconds / 60 / args.jobs:.0f} minutes")


# ---- Tables and plots ----

def mean_and_deviation(numbers):
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return statistics.mean(numbers), deviation


def format_cell(cell):
    """Numbers as "mean ± standard deviation", one number as it is; 2 decimals below 10, otherwise 1."""
    if isinstance(cell, str):
        return cell
    digits = 1 if cell[0] >= 10 else 2
    return " ± ".join(f"{number:.{digits}f}" for number in mean_and_deviation(cell)[:len(cell)])


def plot(table):
    """A figure of the columns with numbers, as described by Table."""
    first_row = next(iter(table.rows.values()))
    numeric = [i for i, cell in enumerate(first_row) if not isinstance(cell, str)]
    columns = [table.columns[i] for i in numeric]
    points = {label: np.transpose([mean_and_deviation(cells[i]) for i in numeric])
              for label, cells in table.rows.items()}                  # label -> (2, columns)
    panels = table.panels if table.xlabel else columns
    height = 3.6 + 0.24 * len(points) / len(panels) if table.xlabel else 4.6    # with room for the legend
    figure = Figure(figsize=(3 + 3.6 * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, title in zip(axes, panels):
        axis.set(title=title, xlabel=table.xlabel)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(table.corner)
    if not table.xlabel:
        for i, axis in enumerate(axes):
            means, deviations = np.stack([*points.values()])[:, :, i].T
            axis.errorbar(means, [*points], xerr=deviations, fmt="o", capsize=3)
        axes[0].invert_yaxis()
        return figure
    for axis, panel in zip(axes, panels):
        labels = [label for label in points if label.startswith(panel)]
        for label, marker in zip(labels, cycle("os^Dvx*")):
            means, deviations = points[label]
            axis.errorbar(columns, means, deviations, fmt=f"{marker}-", capsize=3,
                          label=label.removeprefix(f"{panel}, "))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False)
    return figure


def report(claim, args):
    """Write the table and the plot of a claim whose runs are finished."""
    lab = Lab(claim, args)
    table = lab.table
    lines = [[table.corner, *table.columns], ["---"] * (1 + len(table.columns))]
    lines += [[label, *map(format_cell, cells)] for label, cells in table.rows.items()]
    seconds = sum(float(line) for run in lab.runs for line in open(args.out / run / "seconds.txt"))
    num_seeds = max(len(cell) for cells in table.rows.values() for cell in cells if not isinstance(cell, str))
    text = f"`python -m tools.reproduce {claim} --scale {args.scale}`: {CLAIMS[claim].__doc__}. "
    if num_seeds > 1:
        text += f"Mean ± standard deviation of {num_seeds} runs; "
    text += f"{len(lab.runs)} runs, {seconds / 60:.0f} minutes of one core.\n\n"
    text += "".join("| " + " | ".join(line) + " |\n" for line in lines)
    suffix = "-quick" if args.scale == "quick" else ""
    path = Path(f"figures/reproduce-{claim}{suffix}.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    plot(table).savefig(path.with_suffix(".png"), dpi=100)
    launch.say(f"{text}\nwritten to {path}, with a plot beside it")


def main():
    descriptions = "; ".join(f"{name}: {claim.__doc__}" for name, claim in CLAIMS.items())
    parser = launch.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                           formatter_class=launch.Parser.HelpFormatter)
    add = parser.add_argument
    add("claim", choices=[*CLAIMS, "all"], nargs="?", default="all",
        help=f"{descriptions}; all: all but tune".replace("%", "%%"))
    add("--scale", choices=list(SCALES), default="quick", help="minutes, or hours")
    add("--seeds", type=launch.positive_int, help="seeds of fine-tuning (default: quick 2, full 3)")
    add("--list", action="store_true", help="only print the commands, and how long they take")
    add("--data-root", default="data", help="folder with the files of Fashion-MNIST")
    add("--jobs", type=launch.positive_int, default=os.cpu_count(), help="runs at a time, one thread each")
    add("--out", type=Path, default="runs/reproduce", help="folder of all runs")
    signal.signal(signal.SIGTERM, signal.default_int_handler)          # like Ctrl-C
    with launch.one_line_errors():
        args = parser.parse_args()
        args.out /= args.scale
        args.seeds = args.seeds or SCALES[args.scale].seeds
        claims = [args.claim] if args.claim != "all" else [claim for claim in CLAIMS if claim != "tune"]
        labs = {claim: Lab(claim, args) for claim in claims}
        if args.list:
            return list_runs(labs, args)
        execute({name: command for lab in labs.values() for name, command in lab.runs.items()}, args)
        for claim in claims:
            report(claim, args)


if __name__ == "__main__":
    main()
