"""The paper's claims at laptop scale: `python reproduce.py CLAIM`, or `all`; `--list` shows what would run.

A claim is a plan of runs of dvae.py, pretrain.py, finetune.py and visualize.py, as commands, each in a folder
of its own. What is finished is not run again, what was interrupted continues. Then a table and a plot go to
figures/.

Every arm has the same images, model, steps and recipe, but for layer decay (0.75; from scratch none), and at
full scale the same small search: three learning rates for fine-tuning on 1,000 labels, for half the steps,
compared on 5,000 other training images. The test images are for the final numbers alone.
"""
import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

import training
from training import UserError

# ---- Scales, arms, and what the paper reports ----


@dataclass(frozen=True)
class Scale:
    """How much is run: images seen in training, each time an image is seen counted."""
    tokenizer: int    # by the tokenizer
    pretrain: int    # in pre-training, each arm
    finetune: dict    # number of labels -> in fine-tuning
    shapes: int    # in pre-training and in fine-tuning on shapes, for segmentation and attention
    tuned: bool    # choose learning rates; else those that were chosen at full scale, LEARNING_RATES


SCALES = {
    "full": Scale(tokenizer=12_800, pretrain=96_000, shapes=12_800, tuned=True,
                  finetune={100: 6_400, 300: 9_600, 1000: 19_200, 5000: 25_600, 60_000: 38_400}),
    "quick": Scale(tokenizer=6_400, pretrain=16_000, finetune={100: 3_200, 1000: 6_400}, shapes=3_200,
                   tuned=False),
}
# Of every run: as in the paper, 0.057 = 0.02 sqrt(768 / 96)
MODEL = dict(dim=96, depth=4, heads=4, position="absolute", layer_scale=0, init_std=0.057, batch_size=32)
FASHION = dict(image_size=28, patch_size=4)    # a 7x7 grid
GRID = (1e-3, 2e-3, 4e-3)    # learning rates that are tried
LEARNING_RATES = {"scratch": 1e-3, "pixels": 4e-3, "pixels, random": 4e-3, "recover all": 4e-3}
LEARNING_RATE = 2e-3    # of all others; chosen at full scale

# Table 4: row -> (flags of pretrain.py, ImageNet top-1, ADE20K mIoU in the paper)
ABLATIONS = {
    "BEiT": ({}, 82.86, 44.65),
    "random": (dict(masking="random"), 82.77, 42.93),
    "pixels": (dict(target="pixels"), 81.04, 41.38),
    "pixels, random": (dict(target="pixels", masking="random"), 80.50, 37.09),
    "recover all": (dict(predict="all"), 82.59, 40.93),
    "no masks, recover all": (dict(masking="none", predict="all"), 81.67, 36.73),
}
TITLES = {"BEiT": "BEiT", "random": "− blockwise masking", "pixels": "− visual tokens",
          "pixels, random": "− visual tokens − blockwise masking",
          "recover all": "+ recover 100 % of the tokens",
          "no masks, recover all": "− masking + recover 100 %", "scratch": "from scratch"}
LABELS = 1000    # where a claim has one number of labels


# ---- Runs ----

@dataclass(frozen=True)
class Job:
    """One run: a script, its flags and folder, the jobs that it needs, and its cost in images trained on."""
    script: str
    flags: tuple
    out: Path
    needs: tuple = ()
    cost: float = 0.0

    @property
    def finished(self):
        return (self.out / ("attention.png" if self.script == "visualize.py" else "result.json")).exists()

    @property
    def result(self):
        """What result.json says, {} before the run is finished."""
        return json.loads((self.out / "result.json").read_text()) if self.finished else {}

    @property
    def log(self):
        """The lines of metrics.jsonl."""
        path = self.out / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def seconds(self):
        """That it took, over all times that it was started."""
        path = self.out / "seconds.txt"
        return sum(map(float, path.read_text().split())) if path.exists() else 0.0

    def command(self):
        return [sys.executable, str(Path(__file__).parent / self.script), *self.flags]

    @property
    def plan(self):
        """What makes its numbers: a line for each run that it needs, then its own, with relative paths."""
        lines = [" ".join([job.script, *job.flags]).replace(f"{job.out.parent}/", "")
                 for job in with_needs([self])]
        return "".join(re.sub(r" --data-root \S+", "", line) + "\n" for line in lines)

    def check(self):
        """Raises UserError where its folder holds a run of another plan, such as one of another size."""
        path, lines = self.out / "plan.txt", self.plan.splitlines()
        saved = "" if self.finished else self.plan
        if path.exists():
            saved = path.read_text()
        if saved != self.plan:
            new = [line for line in lines if line not in saved.splitlines()] or lines[-1:]
            raise UserError(f"--out: {self.out} is a run of another plan, this one has `{new[0]}`; remove "
                            f"the folder, or give another --out")


class Lab:
    """Makes jobs: the same request is the same job. Where a job needs a learning rate that is not chosen yet,
    it needs the runs that choose it, and is planned anew once they are finished."""

    def __init__(self, scale, folder, data_root, seeds):
        self.scale, self.folder, self.data_root, self.seeds = scale, folder, data_root, range(seeds)

    def job(self, script, name, needs=(), cost=0.0, **flags):
        out = self.folder / name
        words, given = [], {"out": out, "device": "cpu", **flags}
        if script == "visualize.py":
            words, given = ["attention-objects"], {"out": out / "attention.png", **flags}
        for flag, value in given.items():
            if value is not None:
                words += [f"--{flag.replace('_', '-')}", str(value)]
        return Job(script, tuple(words), out, tuple(needs), cost)

    def training(self, script, name, images, needs=(), cost=None, **flags):
        """A job that trains on so many images of Fashion-MNIST, or of shapes, and saves now and then."""
        flags = {"data": "fashion-mnist", "data_root": self.data_root, **flags}
        batch = flags["batch_size"]
        return self.job(script, name, needs, images if cost is None else cost, **flags, preset="demo",
                        steps=max(1, images // batch), save_every=200)

    def tokenizer(self, data="fashion-mnist"):
        images, size = self.scale.tokenizer, 28 if data == "fashion-mnist" else 32
        return self.training("dvae.py", f"tokenizer-{data}", images, cost=4 * images, data=data,
                             batch_size=16, image_size=size, eval_every=100_000)

    def pretrained(self, arm="BEiT", *, data="fashion-mnist", images=None, suffix="", **more):
        flags = {**ABLATIONS[arm][0], **more}
        tokenizer = None if flags.get("target") == "pixels" else self.tokenizer(data)
        images = images or (self.scale.pretrain if data == "fashion-mnist" else self.scale.shapes)
        size = FASHION if data == "fashion-mnist" else {}
        needs, cost = [tokenizer] if tokenizer else [], (1 if size else 1.6) * images
        return self.training("pretrain.py", f"pretrain-{data}-{slug(arm)}{suffix}", images, needs, cost,
                             data=data, tokenizer=tokenizer and tokenizer.out / "model.pt",
                             eval_every=100_000, **MODEL, **size, **flags)

    def random(self):
        """Weights as they are before any training: one step at a learning rate of nearly nothing."""
        return self.pretrained("pixels", images=MODEL["batch_size"], suffix="-random-weights", lr=1e-12)

    def recipe(self, start, name, images, lr, seed, evaluations=1, **flags):
        """A fine-tuning job from a pre-trained one, or from None: scratch, without layer decay.

        It is evaluated so many times, the last at its end.
        """
        size = {**FASHION, "crop_scale": 0.8} if flags.get("data", "fashion-mnist") == "fashion-mnist" else {}
        init = dict(init="none", layer_decay=1.0)
        if start:
            init = dict(init=start.out / "model.pt", layer_decay=0.75)
        needs = [*([start] if start else []), *flags.pop("needs", ())]
        extra = evaluations * (4_000 if size else 1_000)    # what evaluating costs, in images trained on
        every = 100_000 if evaluations == 1 else math.ceil(images // MODEL["batch_size"] / evaluations)
        return self.training("finetune.py", name, images, needs, (1 if size else 1.6) * images + extra,
                             seed=seed, lr=lr, **init, **flags, eval_every=every, **{**MODEL, **size})

    def learning_rate(self, arm, start):
        """(the best of GRID for fine-tuning from start in half the steps, the jobs needed to know)."""
        if not self.scale.tuned:
            return LEARNING_RATES.get(arm, LEARNING_RATE), ()
        images, tries, best = self.scale.finetune[LABELS] // 2, {}, LEARNING_RATE
        for lr in GRID:
            tries[lr] = self.recipe(start, f"tune-{slug(arm)}-{lr:g}", images, lr, 100, labels=LABELS,
                                    validate=5000)
        if all(job.finished for job in tries.values()):
            best = max(GRID, key=lambda lr: tries[lr].result["top1"])
        return best, tuple(tries.values())

    def finetuned(self, arm, start, labels, seed, tuned_as=None, tuned_on=None):
        """Classification of Fashion-MNIST, with the learning rate of the arm tuned_as, found from tuned_on.

        Runs that the convergence figure shows are evaluated six times, others once.
        """
        lr, tuning = self.learning_rate(tuned_as or arm, tuned_on or start)
        shown = labels == self.convergence_labels and arm in ("BEiT", "scratch")
        return self.recipe(start, f"finetune-{slug(arm)}-{labels}-{seed}", self.scale.finetune[labels], lr,
                           seed, 6 if shown else 1, needs=tuning, labels=labels)

    @property
    def convergence_labels(self):
        return 5000 if 5000 in self.scale.finetune else LABELS

    def segmented(self, name, start, seed):
        return self.recipe(start, f"segment-{slug(name)}-{seed}", self.scale.shapes, 3e-3, seed,
                           data="shapes", task="segmentation", decoder_dim=64)


def slug(text):
    """A folder's name for an arm."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# ---- Claims: each returns (jobs, report), and report() a (table, figure) once they are finished ----

def spread(values, scale=100):
    """"mean ± standard deviation" in per cent, or the one value there is."""
    values = [scale * value for value in values]
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def table(head, rows):
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def axes(title, xlabel, ylabel, **more):
    """A figure and its one panel."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, **more)
    axis.grid(alpha=0.3)
    return figure, axis


def errorbars(axis, x, groups, label, style="o-"):
    """Means of groups of values over x, with their standard deviations, in per cent."""
    means = [100 * statistics.mean(group) for group in groups]
    errors = [100 * statistics.stdev(group) if len(group) > 1 else 0.0 for group in groups]
    axis.errorbar(x, means, errors, fmt=style, capsize=3, label=label)


def ticks(axis, values):
    """Marks on a logarithmic axis, at these values alone."""
    axis.set_xticks(list(values), [f"{value:,}" for value in values])
    axis.minorticks_off()


def pretraining(lab):
    """Table 1 (pixels: Table 4): fine-tuned from visual tokens, from pixels, and from scratch, by labels"""
    starts = {"BEiT": lab.pretrained(), "pixels": lab.pretrained("pixels"), "scratch": None}
    jobs = {(arm, labels): [lab.finetuned(arm, start, labels, seed) for seed in lab.seeds]
            for arm, start in starts.items() for labels in lab.scale.finetune}

    def report():
        paper = {"BEiT": "83.2 (300 epochs: 82.86)", "pixels": "81.04 (300 epochs)", "scratch": "81.8 (DeiT)"}
        names = {"BEiT": "pre-trained on visual tokens", "pixels": "pre-trained on pixels",
                 "scratch": "from scratch"}
        top1 = {key: [job.result["top1"] for job in group] for key, group in jobs.items()}
        figure, axis = axes("Fashion-MNIST, fine-tuned", "labelled images", "test accuracy, %", xscale="log")
        for arm, style in zip(starts, ("o-", "s--", "^:")):
            groups = [top1[arm, labels] for labels in lab.scale.finetune]
            errorbars(axis, list(lab.scale.finetune), groups, names[arm], style)
        ticks(axis, lab.scale.finetune)
        axis.legend()
        head = ["top-1, %", *[f"{labels:,} labels" for labels in lab.scale.finetune], "learning rate",
                "paper: ImageNet, all labels"]
        rows = [[names[arm], *[spread(top1[arm, labels]) for labels in lab.scale.finetune],
                 f"{lab.learning_rate(arm, start)[0]:g}", paper[arm]] for arm, start in starts.items()]
        return table(head, rows), figure
    return [job for group in jobs.values() for job in group], report


def ablations(lab):
    """Table 4: blockwise masks, visual tokens, masking; classification and segmentation"""
    jobs, maps = {}, {}
    for row in ABLATIONS:
        start = lab.pretrained(row)
        jobs[row] = [lab.finetuned(row, start, LABELS, seed) for seed in lab.seeds]
        maps[row] = [lab.segmented(row, lab.pretrained(row, data="shapes"), seed) for seed in lab.seeds]

    def report():
        figure = Figure(figsize=(10, 4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        rows, places = list(ABLATIONS), range(len(ABLATIONS), 0, -1)
        for axis, group, measure, title in (
                (panels[0], jobs, "top1", f"Fashion-MNIST, {LABELS:,} labels: top-1, %"),
                (panels[1], maps, "mean_iou", "shapes: mean IoU, %")):
            values = [[100 * job.result[measure] for job in group[row]] for row in rows]
            means = [statistics.mean(some) for some in values]
            errors = [statistics.stdev(some) if len(some) > 1 else 0 for some in values]
            axis.errorbar(means, places, xerr=errors, fmt="o", capsize=3)
            axis.set(title=title, yticks=places, yticklabels=[TITLES[row] for row in rows])
            axis.margins(x=0.1, y=0.1)
            axis.grid(alpha=0.3)
        head = ["", f"top-1, {LABELS:,} labels", "paper: ImageNet", "mean IoU, shapes", "paper: ADE20K"]
        lines = [[TITLES[row], spread([job.result["top1"] for job in jobs[row]]), f"{ABLATIONS[row][1]:.2f}",
                  spread([job.result["mean_iou"] for job in maps[row]]), ABLATIONS[row][2]] for row in rows]
        return table(head, lines), figure
    return [job for group in (*jobs.values(), *maps.values()) for job in group], report


def convergence(lab):
    """Convergence figure: accuracy while fine-tuning, pre-trained beside from scratch"""
    labels = lab.convergence_labels
    jobs = {"pre-trained": [lab.finetuned("BEiT", lab.pretrained(), labels, seed) for seed in lab.seeds],
            "from scratch": [lab.finetuned("scratch", None, labels, seed) for seed in lab.seeds]}

    def report():
        figure, axis = axes(f"Fashion-MNIST, {labels:,} labels", "epochs of fine-tuning", "test accuracy, %")
        rows = []
        for (label, group), style in zip(jobs.items(), ("o-", "^:")):
            curves = [{line["step"]: line["val_top1"] for line in job.log if "val_top1" in line}
                      for job in group]
            steps = sorted(set.intersection(*map(set, curves)))
            epochs = [step * MODEL["batch_size"] / labels for step in steps]
            errorbars(axis, epochs, [[curve[step] for curve in curves] for step in steps], label, style)
            rows.append([label, *[spread([curve[step] for curve in curves]) for step in steps]])
        axis.legend()
        head = [f"top-1, % after epochs of {labels:,} labels", *[f"{epoch:.1f}" for epoch in epochs]]
        return table(head, rows), figure
    return [job for group in jobs.values() for job in group], report


def longer(lab):
    """Pre-training for half as long, as long, twice and four times as long"""
    shares = (0.5, 1, 2, 4)
    suffixes = {share: "" if share == 1 else f"x{share:g}" for share in shares}
    starts = {share: lab.pretrained(images=round(share * lab.scale.pretrain), suffix=suffix and f"-{suffix}")
              for share, suffix in suffixes.items()}
    jobs = {}
    for share, start in starts.items():
        name = f"BEiT {suffixes[share]}".strip()
        jobs[share] = [lab.finetuned(name, start, LABELS, seed, "BEiT", starts[1]) for seed in lab.seeds]

    def report():
        top1 = {share: [job.result["top1"] for job in group] for share, group in jobs.items()}
        figure, axis = axes(f"Fashion-MNIST, {LABELS:,} labels", "images seen in pre-training",
                            "test accuracy, %", xscale="log")
        seen = [round(share * lab.scale.pretrain) for share in shares]
        errorbars(axis, seen, list(top1.values()), None)
        ticks(axis, seen)
        paper = {1: "82.86 (300 epochs)", 4: "83.19 (800 epochs, 2.7 times)"}
        rows = [[f"{images:,}", f"{starts[share].result['val_loss']:.2f}", spread(top1[share]),
                 paper.get(share, "")]
                for images, share in zip(seen, shares)]
        return table(["images seen in pre-training", "held-out loss", "top-1, %", "paper"], rows), figure
    return [job for group in jobs.values() for job in group], report


def segmentation(lab):
    """Table 3: segmentation of shapes from scratch, pre-trained, and after intermediate fine-tuning"""
    start = lab.pretrained(data="shapes")
    middle = lab.recipe(start, "intermediate", lab.scale.shapes, 3e-3, 0, data="shapes")
    starts = {"from scratch": None, "BEiT": start, "BEiT + intermediate fine-tuning": middle}
    jobs = {name: [lab.segmented(name, one, seed) for seed in lab.seeds] for name, one in starts.items()}

    def report():
        iou = {name: [job.result["mean_iou"] for job in group] for name, group in jobs.items()}
        figure, axis = axes("segmentation of shapes", "", "mean IoU, %")
        errorbars(axis, [name.replace("+ ", "+\n") for name in iou], list(iou.values()), None, "o")
        axis.margins(x=0.2)
        paper = ("none (supervised on ImageNet: 45.3)", 45.6, 47.7)
        rows = [[name, spread(values), number] for (name, values), number in zip(iou.items(), paper)]
        return table(["", "mean IoU, shapes", "paper: ADE20K"], rows), figure
    return [job for group in jobs.values() for job in group], report


def probe(lab):
    """Linear probe and k-NN by layer: pre-trained, supervised from scratch, random weights"""
    most = max(lab.scale.finetune)
    models = {"pre-trained": lab.pretrained(),
              f"supervised, {most:,} labels": lab.finetuned("scratch", None, most, 0),
              "random weights": lab.random()}
    jobs = {}
    for task in ("probe", "knn"):
        for name, model in models.items():
            jobs[task, name] = lab.job(
                "finetune.py", f"{task}-{slug(name)}", [model], 6_000, data="fashion-mnist",
                data_root=lab.data_root, task=task, init=model.out / "model.pt", labels=5000, **FASHION)

    def report():
        figure = Figure(figsize=(10, 4), layout="constrained")
        panels, rows = figure.subplots(1, 2, sharey=True), []
        for axis, task, title in zip(panels, ("probe", "knn"), ("linear probe", "k nearest neighbours")):
            for name, style in zip(models, ("o-", "^:", "s--")):
                values = jobs[task, name].result["top1_by_layer"]["patches"]
                axis.plot(range(1, len(values) + 1), [100 * value for value in values], style, label=name)
                rows.append([title, name, *[f"{100 * value:.1f}" for value in values]])
            axis.set(title=f"{title}, 5,000 labels", xlabel="layer", xticks=range(1, len(values) + 1))
            axis.grid(alpha=0.3)
        panels[0].set_ylabel("test accuracy, %")
        panels[0].legend()
        head = ["top-1, %", "weights", *[f"layer {layer}" for layer in range(1, len(values) + 1)]]
        return table(head, rows), figure
    return list(jobs.values()), report


def attention(lab):
    """Analysis figure: attention of an object's patches to the object, by length of pre-training on shapes"""
    shares = (0.125, 0.25, 0.5, 1)
    jobs = {}
    for share in shares:
        suffix = "" if share == 1 else f"-x{share:g}"
        model = lab.pretrained(data="shapes", images=round(share * lab.scale.shapes), suffix=suffix)
        jobs[share] = lab.job("visualize.py", f"attention-x{share:g}", [model], 500,
                              init=model.out / "model.pt", count=200)

    def report():
        ratios = {}
        for share, job in jobs.items():
            lines = re.findall(r"^  (pre-trained|random weights) +([\d. ]+)$",
                               (job.out / "log.txt").read_text(), re.M)
            for label, values in lines[:2]:    # of all patches; those without neighbours follow
                ratios[0 if label.startswith("random") else share] = [float(value)
                                                                      for value in values.split()]
        ratios = dict(sorted(ratios.items()))
        figure, axis = axes("attention on the object / its share of the area", "images seen in pre-training",
                            "ratio")
        for layer, values in enumerate(zip(*ratios.values()), start=1):
            axis.plot([share * lab.scale.shapes for share in ratios], values, "o-", label=f"layer {layer}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.legend()
        head = ["images seen", *[f"layer {layer}" for layer in range(1, MODEL["depth"] + 1)]]
        rows = [[f"{round(share * lab.scale.shapes):,}", *[f"{value:.2f}" for value in values]]
                for share, values in ratios.items()]
        return table(head, rows), figure
    return list(jobs.values()), report


def mask_ratio(lab):
    """How much is masked: 15, 25, 40, 60, 75 %"""
    ratios = (0.15, 0.25, 0.4, 0.6, 0.75)
    starts = {0.4: lab.pretrained()}
    for ratio in ratios:
        starts.setdefault(ratio, lab.pretrained(mask_ratio=ratio, suffix=f"-mask-{ratio:g}"))
    jobs = {}
    for ratio in ratios:
        name = "BEiT" if ratio == 0.4 else f"BEiT mask {ratio:g}"
        jobs[ratio] = [lab.finetuned(name, starts[ratio], LABELS, seed, "BEiT", starts[0.4])
                       for seed in lab.seeds]

    def report():
        top1 = {ratio: [job.result["top1"] for job in group] for ratio, group in jobs.items()}
        figure, axis = axes(f"Fashion-MNIST, {LABELS:,} labels", "masked patches, %", "test accuracy, %")
        errorbars(axis, [100 * ratio for ratio in ratios], list(top1.values()), None)
        rows = [[f"{ratio:.0%}", spread(values)] for ratio, values in top1.items()]
        return table(["masked", "top-1, %"], rows), figure
    return [job for group in jobs.values() for job in group], report


CLAIMS = {function.__name__.replace("_", "-"): function for function in (
    pretraining, ablations, convergence, longer, segmentation, probe, attention, mask_ratio)}


# ---- Running a plan ----

IMAGES_PER_SECOND = 200    # of training on one core of the machine in the README; corrected by what is seen


def with_needs(jobs):
    """The jobs and all that they need, each once, needs first."""
    ordered = {}

    def visit(job):
        for one in job.needs:
            visit(one)
        ordered.setdefault(job.out, job)

    for job in jobs:
        visit(job)
    return list(ordered.values())


def minutes(cost, parallel, rate=IMAGES_PER_SECOND):
    """That so many images take, in so many processes."""
    return cost / rate / parallel / 60


def run(plan, parallel):
    """Run what plan() says, so many at a time, one thread each, until nothing is left.

    The plan is made again after each run: it may depend on results. ChildProcessError names a failed run.
    """
    running, done_cost, spent, bar = {}, 0.0, 0.0, None
    try:
        while True:
            jobs = with_needs(plan())
            for job in jobs:
                job.check()
            left = [job for job in jobs if not job.finished]
            if not left and not running:
                break
            for job in left:
                ready = job.out not in running and all(one.finished for one in job.needs)
                if ready and len(running) < parallel:
                    job.out.mkdir(parents=True, exist_ok=True)
                    (job.out / "plan.txt").write_text(job.plan)
                    log = open(job.out / "log.txt", "a")
                    process = subprocess.Popen(job.command(), stdout=log, stderr=log,
                                               env={**os.environ, "OMP_NUM_THREADS": "1"})
                    running[job.out] = (job, process, log, time.perf_counter())
            bar = bar or tqdm(total=len(jobs), desc="runs", unit="run")
            bar.total, bar.n = len(jobs), len(jobs) - len(left)
            rate = done_cost / spent if spent > 60 else IMAGES_PER_SECOND
            bar.set_postfix_str(f"about {minutes(sum(job.cost for job in left), parallel, rate):.0f} min "
                                f"left; {', '.join(out.name for out in running)}")
            while all(process.poll() is None for _, process, *_ in running.values()):
                time.sleep(0.2)
            for job, process, log, since in list(running.values()):
                if process.poll() is not None:
                    stop(running.pop(job.out))
                    if process.returncode or not job.finished:
                        last = (job.out / "log.txt").read_text().strip().splitlines()[-1:]
                        raise ChildProcessError(
                            f"{' '.join(job.command()[1:])}: ended with status {process.returncode} "
                            f"({''.join(last)}); {job.out / 'log.txt'} has the rest")
                    done_cost, spent = done_cost + job.cost, spent + time.perf_counter() - since
    finally:
        for one in running.values():
            one[1].terminate()    # they finish their step and save
        for one in list(running.values()):
            stop(one)
        if bar:
            bar.close()


def stop(one):
    """Wait for a run to end, and keep the time it took."""
    job, process, log, since = one
    process.wait()
    log.close()
    with open(job.out / "seconds.txt", "a") as file:
        file.write(f"{time.perf_counter() - since:.1f}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("claim", choices=[*CLAIMS, "all"], nargs="?", default="all",
                        help="; ".join(f"{name}: {one.__doc__.replace('%', '%%')}"
                                       for name, one in CLAIMS.items()))
    parser.add_argument("--scale", choices=list(SCALES), default="quick",
                        help="quick: minutes; full: hours (quick)")
    parser.add_argument("--seeds", type=int, help="of labels, order and augmentation in fine-tuning; "
                                                  "pre-training has one (3; quick: 2)")
    parser.add_argument("--list", action="store_true",
                        help="say what would run and for how long, and run nothing")
    parser.add_argument("--data-root", default="data", help="folder with the files of Fashion-MNIST (data)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="runs at a time, one thread each (the machine's cores)")
    parser.add_argument("--out", default="runs/reproduce", help="folder of the runs (runs/reproduce)")
    parser.add_argument("--figures", default="figures", help="folder of tables and plots (figures)")
    with training.one_line_errors():
        args = parser.parse_args()
        for name in ("seeds", "jobs"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise UserError(f"--{name}: at least 1, not {getattr(args, name)}")
        seeds = args.seeds or {"quick": 2, "full": 3}[args.scale]
        lab = Lab(SCALES[args.scale], Path(args.out) / args.scale, args.data_root, seeds)
        claims = list(CLAIMS) if args.claim == "all" else [args.claim]
        if args.list:
            return show(lab, claims, args)
        jobs = [job for claim in claims for job in CLAIMS[claim](lab)[0]]
        needed = any("fashion-mnist" in job.flags for job in with_needs(jobs))
        if needed and not (Path(args.data_root) / "FashionMNIST/raw").is_dir():
            raise UserError(f"--data-root: {args.data_root} has no FashionMNIST/raw; the README says where "
                            f"its files come from")
        run(lambda: [job for claim in claims for job in CLAIMS[claim](lab)[0]], args.jobs)
        for claim in claims:
            write(lab, claim, args, seeds)


def show(lab, claims, args):
    """--list: the runs of each claim, and of all of them, each counted once."""
    everything = []
    for claim in claims:
        jobs = with_needs(CLAIMS[claim](lab)[0])
        new = [job for job in jobs if job.out not in {one.out for one in everything}]
        everything += new
        left = [job for job in new if not job.finished]
        training.say(f"{claim}: {CLAIMS[claim].__doc__}\n  {len(jobs)} runs, {len(jobs) - len(new)} of them "
                     f"counted above, {len(left)} to do, about "
                     f"{minutes(sum(job.cost for job in left), args.jobs):.0f} min")
        for job in new:
            training.say(f"    {'done ' if job.finished else '     '}{job.out.name}")
    left = [job for job in everything if not job.finished]
    training.say(f"{len(left)} of {len(everything)} runs to do, about "
                 f"{minutes(sum(job.cost for job in left), args.jobs) / 60:.1f} hours, {args.jobs} at a time")


def write(lab, claim, args, seeds):
    """The table and the plot of a claim whose runs are finished."""
    jobs, report = CLAIMS[claim](lab)
    text, figure = report()
    name = claim if args.scale == "full" else f"{claim}-{args.scale}"
    spent = sum(job.seconds for job in with_needs(jobs)) / 60
    flags = f"--scale {args.scale}" + (f" --seeds {seeds}" if args.seeds else "")
    shown = f"Mean ± standard deviation of {seeds} seeds" if " ± " in text else "One seed"
    text = (f"`python reproduce.py {claim} {flags}`: {CLAIMS[claim].__doc__}. {shown}; "
            f"{len(with_needs(jobs))} runs, {spent:.0f} minutes of one core.\n\n{text}")
    folder = Path(args.figures)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"reproduce-{name}.md").write_text(text)
    figure.savefig(folder / f"reproduce-{name}.png", dpi=100)
    training.say(f"{text}\nwritten to {folder}/reproduce-{name}.md and .png")


if __name__ == "__main__":
    main()
