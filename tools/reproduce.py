"""The paper's claims at laptop scale: `python -m tools.reproduce CLAIM`, or `all`; `--list` shows commands.

A claim is a table whose cells are runs of dvae.py, pretrain.py and finetune.py, each in a folder of its own.
Finished runs are not run again, interrupted ones continue. Then the table and a plot go to figures/.

All rows have the same images, model, steps and recipe, but for fine-tuning's layer decay (0.75; from scratch
none) and its learning rate in classification, which `tune` chooses on training images that are kept apart.
"""
import argparse
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
from functools import reduce
from itertools import cycle
from operator import getitem
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import training
import visualize
from training import UserError

ROOT = Path(__file__).resolve().parent.parent


class Scale(NamedTuple):
    """Images seen in training, each time that an image is seen counted."""
    tokenizer: int
    fashion: int        # in pre-training on Fashion-MNIST
    shapes: int         # in pre-training on shapes
    segment: int        # in fine-tuning on shapes
    finetune: dict      # number of labels -> images seen
    convergence: int    # number of labels of that claim
    seeds: int          # of fine-tuning: labels, order, augmentation
    pretrainings: int   # seeds of pre-training in the ablations; elsewhere one


SCALES = {
    "quick": Scale(6_400, 16_000, 3_200, 9_600, {100: 3_200, 1000: 6_400}, 1000, 2, 1),
    "full": Scale(12_800, 96_000, 12_800, 25_600,
                  {100: 6_400, 300: 9_600, 1000: 19_200, 5000: 25_600, 60_000: 38_400}, 5000, 3, 2),
}
BATCH, DEPTH, EVALUATIONS = 32, 4, 6    # EVALUATIONS: of a run that `convergence` shows
LABELS = 1000    # where a claim has one number of labels
LAYERS = [f"layer {i + 1}" for i in range(DEPTH)]
MODEL = f"--depth {DEPTH} --dim 96 --heads 4 --position absolute --layer-scale 0 --init-std 0.057"
FASHION, SHAPES = "fashion-mnist", "shapes"
SEGMENT = "--task segmentation --decoder-dim 64"
SIZE = {FASHION: "--image-size 28 --patch-size 4", SHAPES: ""}    # shapes: that of the demo

# Learning rates of fine-tuning: those that `tune` tries; those of segmentation and of classification, unless
# at full scale another one was better by half a point
GRID = (1e-3, 2e-3, 4e-3, 8e-3)
SEGMENT_LR, LR = 4e-3, 2e-3
BETTER_LR = {"scratch": 1e-3, "pretrain-fashion-mnist-target-pixels": 4e-3,
             "pretrain-fashion-mnist-target-pixels-masking-random": 4e-3}

# Table 4: row -> (flags of pretrain.py, ImageNet top-1 and ADE20K mIoU in the paper)
ABLATIONS = {
    "BEiT": ("", "82.86", "44.65"),
    "− blockwise masking": ("--masking random", "82.77", "42.93"),
    "− visual tokens": ("--target pixels", "81.04", "41.38"),
    "− visual tokens − blockwise masking": ("--target pixels --masking random", "80.50", "37.09"),
    "+ recover 100 % of the tokens": ("--predict all", "82.59", "40.93"),
    "− masking + recover 100 %": ("--masking none --predict all", "81.67", "36.73"),
}


# Table 5, likewise
ARCHITECTURES = {
    "ViT": ("", "82.86", "44.86"),
    "+ layer scale": ("--layer-scale 0.1", "83.00", "45.43"),
    "+ layer scale + relative positions": ("--layer-scale 0.1 --position shared_relative", "83.22", "45.70"),
}


# ---- Runs ----

class Lab:
    """The .table of a claim, with nan where runs are not finished, and the .runs that it needs."""

    def __init__(self, claim, args):
        self.scale, self.seeds, self.out = SCALES[args.scale], range(args.seeds), args.out
        self.runs = {}    # name -> command, in which {out} stands for the folder of all runs
        self.table = CLAIMS[claim](self)

    def result(self, name, *keys, missing=math.nan):
        """result.json of a run, or an entry of it; missing before the run is finished."""
        file = self.out / name / "result.json"
        return reduce(getitem, keys, json.loads(file.read_text())) if file.exists() else missing

    def run(self, script, name, data, images, flags, batch=BATCH):
        """A run that sees so many images."""
        name = "-".join(name.replace("--", "").split())                # a folder for each set of flags
        command = (f"{script} --out {{out}}/{name} --data {data} --data-root {{data_root}} --preset demo "
                   f"--device cpu --batch-size {batch} --steps {max(1, int(images) // batch)} {flags}")
        assert self.runs.setdefault(name, command) == command, f"two runs are called {name}"
        return name

    def pretrained(self, flags="", data=FASHION, share=1):
        """Pre-training with these flags, on a share of the scale's images."""
        name = f"pretrain {data} {flags}" if share == 1 else f"pretrain {data} {flags} x{share:g}"
        if "pixels" not in flags:
            size = "--image-size 28" if data == FASHION else "--image-size 32"
            tokenizer = self.run("dvae.py", f"tokenizer {data}", data, self.scale.tokenizer, size, batch=16)
            flags = f"--tokenizer {{out}}/{tokenizer}/model.pt {flags}"
        images = share * (self.scale.fashion if data == FASHION else self.scale.shapes)
        return self.run("pretrain.py", name, data, images, f"{MODEL} {SIZE[data]} {flags}")

    def untrained(self, data=FASHION):
        """Random weights: one step of pre-training at a learning rate of nearly nothing."""
        return self.pretrained("--target pixels --lr 1e-12", data, share=0)

    def finetuned(self, name, start, data, images, flags, evaluations=1):
        """Fine-tuning of a pre-trained run; of None: from scratch, without layer decay."""
        origin = f"--init none --layer-decay 1 {MODEL} {SIZE[data]}"
        if start:
            origin = f"--init {{out}}/{start}/model.pt --layer-decay 0.75"
        every = math.ceil(images // BATCH / evaluations)
        return self.run("finetune.py", f"{name} {start or 'scratch'}", data, images,
                        f"{origin} --eval-every {every} {flags}")

    def classified(self, start, labels=LABELS):
        """Fine-tuning with so many labels, for each seed. What `convergence` shows is evaluated often."""
        often = labels == self.scale.convergence and start in (None, f"pretrain-{FASHION}")
        flags = f"--labels {labels} --lr {learning_rate(start)} --crop-scale 0.8"
        return [self.finetuned(f"finetune {labels} {seed}", start, FASHION, self.scale.finetune[labels],
                               f"{flags} --seed {seed}", EVALUATIONS if often else 1) for seed in self.seeds]

    def top1(self, start, labels=LABELS):
        """The accuracy of each seed, in per cent."""
        return [100 * self.result(run, "top1") for run in self.classified(start, labels)]

    def mean_iou(self, start):
        """Segmentation of shapes: the mean IoU of each seed, in per cent."""
        runs = [self.finetuned(f"segment {seed}", start, SHAPES, self.scale.segment,
                               f"{SEGMENT} --lr {SEGMENT_LR} --seed {seed}") for seed in self.seeds]
        return [100 * self.result(run, "mean_iou") for run in runs]


def learning_rate(start):
    """Of classification from this run; None: from scratch. Another seed of pre-training has the same."""
    return BETTER_LR.get((start or "scratch").removesuffix("-seed-1"), LR)


class Table(NamedTuple):
    """rows: label -> for each column numbers, one a seed, or a text. With xlabel rows are drawn as lines."""
    corner: str
    columns: list
    rows: dict
    xlabel: str | None = None


# ---- Claims: functions of a Lab that return a Table. They plan runs, and read those that are finished ----

def pretraining(lab):
    """Table 1 (pixels: Table 4): fine-tuned from visual tokens, from pixels, and from scratch, by labels"""
    rows = {}
    for label, start, paper in (
            ("pre-trained on visual tokens", lab.pretrained(), "83.2 (300 epochs: 82.86)"),
            ("pre-trained on pixels", lab.pretrained("--target pixels"), "81.04 (300 epochs)"),
            ("from scratch", None, "81.8 (DeiT)")):
        accuracies = [lab.top1(start, labels) for labels in lab.scale.finetune]
        rows[label] = [*accuracies, f"{learning_rate(start):g}", paper]
    columns = [*(f"{labels:,} labels" for labels in lab.scale.finetune), "learning rate",
               "paper: ImageNet, all labels"]
    return Table("top-1, %", columns, rows, "labelled images")


def variants(lab, rows, pretrainings=1):
    """A Table of pre-trainings, with so many seeds of each. rows: label -> (flags, ImageNet top-1 and ADE20K
    mIoU in the paper)."""
    cells = {}
    for label, (flags, imagenet, ade20k) in rows.items():
        seeds = [flags, *(f"{flags} --seed {seed}" for seed in range(1, pretrainings))]
        cells[label] = [sum((lab.top1(lab.pretrained(flags)) for flags in seeds), []), imagenet,
                        sum((lab.mean_iou(lab.pretrained(flags, SHAPES)) for flags in seeds), []), ade20k]
    columns = [f"top-1, {LABELS:,} labels", "paper: ImageNet", "mean IoU, shapes", "paper: ADE20K"]
    return Table("", columns, cells)


def ablations(lab):
    """Table 4: blockwise masks, visual tokens, masking; classification and segmentation"""
    return variants(lab, ABLATIONS, lab.scale.pretrainings)


def architecture(lab):
    """Table 5: layer scale and relative position bias; classification and segmentation"""
    return variants(lab, ARCHITECTURES)


def convergence(lab):
    """Convergence figure: accuracy while fine-tuning, pre-trained beside from scratch"""
    def accuracies(run):
        if lab.result(run, missing=None) is None:
            return [math.nan] * EVALUATIONS
        lines = map(json.loads, (lab.out / run / "metrics.jsonl").read_text().splitlines())
        return [100 * line["val_top1"] for line in lines if "val_top1" in line]

    labels, rows = lab.scale.convergence, {}
    for label, start in (("pre-trained", lab.pretrained()), ("from scratch", None)):
        rows[label] = list(zip(*map(accuracies, lab.classified(start, labels))))
    epochs = [lab.scale.finetune[labels] / labels * (i + 1) / EVALUATIONS for i in range(EVALUATIONS)]
    return Table(f"top-1, % after epochs of {labels:,} labels", [f"{epoch:.1f}" for epoch in epochs], rows,
                 "epochs of fine-tuning")


def longer(lab):
    """Table 4, last row: pre-training for half as long, as long, twice and four times as long"""
    rows = {}
    for share, paper in ((0.5, ""), (1, "82.86 (300 epochs)"), (2, ""), (4, "83.19 (800 epochs, 2.7 times)")):
        start = lab.pretrained(share=share)
        rows[f"{share * lab.scale.fashion:,.0f}"] = [[lab.result(start, "val_loss")], lab.top1(start), paper]
    return Table("images seen in pre-training", ["held-out loss", "top-1, %", "paper"], rows)


def segmentation(lab):
    """Table 3: segmentation of shapes from scratch, pre-trained, and after intermediate fine-tuning"""
    start = lab.pretrained(data=SHAPES)
    middle = lab.finetuned("intermediate", start, SHAPES, lab.scale.segment, "--lr 3e-3")
    rows = {"from scratch": [lab.mean_iou(None), "none (supervised on ImageNet: 45.3)"],
            "BEiT": [lab.mean_iou(start), "45.6"],
            "BEiT, pre-trained four times as long": [lab.mean_iou(lab.pretrained(data=SHAPES, share=4)), ""],
            "BEiT + intermediate fine-tuning": [lab.mean_iou(middle), "47.7"]}
    return Table("", ["mean IoU, shapes", "paper: ADE20K"], rows)


def probe(lab):
    """Linear probe and k-NN by layer: pre-trained, supervised from scratch, random weights"""
    most, rows = max(lab.scale.finetune), {}
    models = {"pre-trained": lab.pretrained(), f"supervised, {most:,} labels": lab.classified(None, most)[0],
              "random weights": lab.untrained()}
    for task, title, images in (("probe", "linear probe", 50_000), ("knn", "k-NN", 0)):
        for label, model in models.items():
            flags = f"--task {task} --init {{out}}/{model}/model.pt --labels 5000 --lr 1e-2 --crop-scale 1"
            run = lab.run("finetune.py", f"{task} {model}", FASHION, images, flags, batch=64)
            accuracies = lab.result(run, "top1_by_layer", "patches", missing=[math.nan] * DEPTH)
            rows[f"{title}, {label}"] = [[100 * accuracy] for accuracy in accuracies]
    return Table("top-1, %", LAYERS, rows, "linear probe and neighbours of 5,000 labels")


def attention(lab):
    """Analysis figure: attention of an object's patches to the object, by length of pre-training on shapes"""
    def ratios(run):
        if lab.result(run, missing=None) is None:
            return [[math.nan]] * DEPTH
        model = visualize.open_model(lab.out / run / "model.pt")
        images, cover = visualize.object_scenes(200, model.config)
        numbers = visualize.object_attention(visualize.every_attention_map(model, images), cover)
        return [[number] for number in numbers.tolist()]

    rows = {"random weights": ratios(lab.untrained(SHAPES))}
    for share in (0.25, 0.5, 1, 4):
        model = lab.pretrained(data=SHAPES, share=share)
        rows[f"{share * lab.scale.shapes:,.0f} images seen"] = ratios(model)
    return Table("attention on the object / its share", LAYERS, rows, "block of the transformer")


def mask_ratio(lab):
    """How much is masked: 15, 25, 40, 60, 75 %"""
    rows = {}
    for ratio in (0.15, 0.25, 0.4, 0.6, 0.75):
        start = lab.pretrained("" if ratio == 0.4 else f"--mask-ratio {ratio}")
        rows[f"{ratio:.0%}"] = [lab.top1(start)]
    return Table("masked", ["top-1, %"], rows)


def tune(lab):
    """Learning rates of fine-tuning: half the steps, compared on training images that are kept apart"""
    rows, apart = {}, "--seed 100 --validate"
    starts = {label: flags for label, (flags, *_) in ABLATIONS.items()} | {"from scratch": None}
    for label, flags in starts.items():
        start = None if flags is None else lab.pretrained(flags)
        runs = [lab.finetuned(f"tune {lr}", start, FASHION, lab.scale.finetune[LABELS] // 2,
                              f"--labels {LABELS} --lr {lr} --crop-scale 0.8 {apart} 5000") for lr in GRID]
        rows[label] = [*([100 * lab.result(run, "top1")] for run in runs), f"{learning_rate(start):g}"]
    for label, flags in starts.items():
        start = None if flags is None else lab.pretrained(flags, SHAPES)
        runs = [lab.finetuned(f"tune segment {lr}", start, SHAPES, lab.scale.segment // 2,
                              f"{SEGMENT} --lr {lr} {apart} 1000") for lr in GRID]
        rows[f"segmentation, {label}"] = [*([100 * lab.result(run, "mean_iou")] for run in runs),
                                          f"{SEGMENT_LR:g}"]
    return Table("top-1 or mean IoU, %", [*map(str, GRID), "used"], rows, "learning rate")


CLAIMS = {function.__name__.replace("_", "-"): function for function in (
    pretraining, ablations, architecture, convergence, longer, segmentation, probe, attention, mask_ratio,
    tune)}


# ---- Doing the runs ----

def is_finished(folder, command):
    """Whether the folder holds the result of this command."""
    saved = folder / "command.txt"
    return (folder / "result.json").exists() and saved.exists() and saved.read_text() == command


def execute(runs, args):
    """Do what is not finished of runs (name -> command), args.jobs at a time, on one core each.

    The scripts continue what was interrupted, and refuse a folder of a run that had other flags. If a run
    fails, the others end after their step, and ChildProcessError names it.
    """
    futures, processes, order = {}, [], ("dvae.py", "pretrain.py", "finetune.py")

    def one(name, command):
        for start in re.findall(r"{out}/(\S+)/model.pt", command):
            futures[start].result()
        folder = args.out / name
        if is_finished(folder, command):
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "command.txt").write_text(command)
        script, *words = [word.format(out=args.out, data_root=args.data_root) for word in command.split()]
        begin = time.perf_counter()
        with open(folder / "log.txt", "a") as log:
            process = subprocess.Popen([sys.executable, ROOT / script, *words], stdout=log, stderr=log,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
            processes.append(process)
            status = process.wait()
        with open(folder / "seconds.txt", "a") as file:
            file.write(f"{time.perf_counter() - begin:.0f}\n")
        if status:
            last = "".join((folder / "log.txt").read_text().strip().splitlines()[-1:])
            raise ChildProcessError(f"{name}: status {status}, {last}; see {folder}/log.txt")

    with ThreadPoolExecutor(args.jobs) as pool:
        for name, command in sorted(runs.items(), key=lambda run: order.index(run[1].split()[0])):
            futures[name] = pool.submit(one, name, command)
        try:
            for future in tqdm(as_completed(futures.values()), total=len(futures), desc="runs"):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise


# ---- Tables and plots ----

def mean_and_deviation(numbers):
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def in_words(cell):
    """Numbers as "mean ± standard deviation", with 2 digits below 10; one number, or a text, as it is."""
    if isinstance(cell, str):
        return cell
    digits = 1 if cell[0] >= 10 else 2
    return " ± ".join(f"{number:.{digits}f}" for number in mean_and_deviation(cell)[:len(cell)])


def plot(table):
    """A figure of the columns with numbers."""
    labels, rows = list(table.rows), list(table.rows.values())
    shown = [i for i, cell in enumerate(rows[0]) if not isinstance(cell, str)]
    heads = [table.columns[i] for i in shown]
    numbers = np.array([[mean_and_deviation(cells[i]) for i in shown] for cells in rows])
    means, errors = numbers[..., 0], numbers[..., 1]                   # (rows, columns)
    panels = 1 if table.xlabel else len(shown)
    height = 3.6 + 0.24 * len(rows) if table.xlabel else 4.6               # room for the legend
    figure = Figure(figsize=(3 + 3.6 * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    if table.xlabel:
        for label, mean, error, marker in zip(labels, means, errors, cycle("os^Dvx*")):
            axes[0].errorbar(heads, mean, error, fmt=f"{marker}-", capsize=3, label=label)
        axes[0].set(xlabel=table.xlabel, ylabel=table.corner)
        figure.legend(loc="outside lower center", frameon=False)
    else:
        for axis, head, mean, error in zip(axes, heads, means.T, errors.T):
            axis.errorbar(mean, labels, xerr=error, fmt="o", capsize=3)
            axis.set(title=head)
        axes[0].set_ylabel(table.corner)
        axes[0].invert_yaxis()
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure


def report(claim, args):
    """Write the table and the plot of a claim whose runs are finished."""
    lab = Lab(claim, args)
    table = lab.table
    lines = [[table.corner, *table.columns], ["---"] * (1 + len(table.columns))]
    lines += [[label, *map(in_words, cells)] for label, cells in table.rows.items()]
    seconds = sum(float(line) for run in lab.runs for line in open(args.out / run / "seconds.txt"))
    text = f"`python -m tools.reproduce {claim} --scale {args.scale}`: {CLAIMS[claim].__doc__}. "
    most = max(len(cell) for cells in table.rows.values() for cell in cells if not isinstance(cell, str))
    if most > 1:
        text += f"Mean ± standard deviation of {most} runs; "
    text += f"{len(lab.runs)} runs, {seconds / 60:.0f} minutes of one core.\n\n"
    text += "".join("| " + " | ".join(line) + " |\n" for line in lines)
    path = Path("figures") / f"reproduce-{claim}{'-quick' if args.scale == 'quick' else ''}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    plot(table).savefig(path.with_suffix(".png"), dpi=100)
    training.say(f"{text}\nwritten to {path}, with a plot beside it")


def show(labs, args):
    """--list: how many runs the claims have, the commands that are not finished, and how long they take."""
    runs = {}
    for claim, lab in labs.items():
        training.say(f"{claim}: {CLAIMS[claim].__doc__}; {len(lab.runs)} runs")
        runs |= lab.runs
    left = [command for name, command in runs.items() if not is_finished(args.out / name, command)]
    for command in left:
        training.say("python " + command.format(out=args.out, data_root=args.data_root))
    sizes = [re.search(r"--batch-size (\d+) --steps (\d+)", command).groups() for command in left]
    seconds = sum(int(batch) * int(steps) / 200 + 20 for batch, steps in sizes)    # training; the rest
    training.say(f"{len(left)} of {len(runs)} different runs to do, {args.jobs} at a time: about "
                 f"{seconds / 60 / args.jobs:.0f} minutes")


def main():
    claims = "; ".join(f"{name}: {claim.__doc__}" for name, claim in CLAIMS.items()).replace("%", "%%")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("claim", choices=[*CLAIMS, "all"], nargs="?", default="all",
                        help=f"{claims}; all: all of these but tune")
    parser.add_argument("--scale", choices=list(SCALES), default="quick", help="minutes, or hours (quick)")
    parser.add_argument("--seeds", type=int, help="of fine-tuning (quick: 2, full: 3)")
    parser.add_argument("--list", action="store_true", help="only say what would run, and for how long")
    parser.add_argument("--data-root", default="data", help="folder with the files of Fashion-MNIST (data)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default="runs/reproduce", help="folder of runs (runs/reproduce)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)          # like Ctrl-C
    with training.one_line_errors():
        args = parser.parse_args()
        args.out /= args.scale
        args.seeds = SCALES[args.scale].seeds if args.seeds is None else args.seeds
        if min(args.seeds, args.jobs) < 1:
            raise UserError(f"--seeds, --jobs: at least 1, not {args.seeds} and {args.jobs}")
        wanted = [args.claim] if args.claim != "all" else [claim for claim in CLAIMS if claim != "tune"]
        labs = {claim: Lab(claim, args) for claim in wanted}
        if args.list:
            return show(labs, args)
        execute({name: command for lab in labs.values() for name, command in lab.runs.items()}, args)
        for claim in wanted:
            report(claim, args)


if __name__ == "__main__":
    main()
