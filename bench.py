"""Speed and memory of this project beside the limits of this machine: `python bench.py`.

All rows are measured in one run, in turn, several times over: medians, and half the range between the fastest
and the slowest. Under torchrun also: what K processes do together, and how much of it is communication.
"""
import argparse
import copy
import math
import os
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import data
import dvae
import finetune
import pretrain
import training
import vit
from masking import blockwise_mask

VOCAB, CLASSES = 8192, 1000
JPEG_SIZE, JPEG_COUNT = (500, 375), 64


# ---- Floating-point operations an image, by formula; a multiplication and an addition are two ----

def backbone_flops(config):
    """Of a forward pass of the blocks and the patch embedding."""
    N, D, hidden = config.grid[0] * config.grid[1], config.dim, int(config.dim * config.mlp_ratio)
    T = N + 1
    # qkv, proj, fc1, fc2; q k^T, and its product with v
    block = 2 * T * (4 * D * D + 2 * D * hidden) + 2 * 2 * T * T * D
    return config.depth * block + 2 * N * D * config.in_channels * config.patch_size ** 2


def training_flops(config, head):
    """Of a forward and a backward pass: each product once more for its weights and once more for its input,
    which pixels do not need; head: what the head adds to the forward pass."""
    pixels = 2 * config.grid[0] * config.grid[1] * config.dim * config.in_channels * config.patch_size ** 2
    return 3 * (backbone_flops(config) + head) - pixels


def tokenizer_flops(tokenizer, side):
    """Of the encoder, for side x side pixels."""
    hidden, groups, blocks = (tokenizer.config[name] for name in ("hidden", "groups", "blocks_per_group"))
    places, n_in = side ** 2, hidden
    total = 2 * places * 7 * 7 * tokenizer.config["in_channels"] * hidden
    for group in range(groups):
        n_out = hidden * 2 ** group
        for _ in range(blocks):
            narrow = n_out // 4
            identity = n_in * n_out if n_in != n_out else 0
            total += 2 * places * (9 * (n_in * narrow + 2 * narrow * narrow) + narrow * n_out + identity)
            n_in = n_out
        places //= 4 if group < groups - 1 else 1
    return total + 2 * places * n_in * tokenizer.vocab_size


# ---- What is measured ----

class Bench:
    """Rows to measure, name -> (function, how many of the unit a call does, unit, FLOPs a call or None)."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.precision = training.Precision(args.precision, device)
        self.rows, self.held, self.in_fp32, self.names = {}, {}, None, []

    def add(self, name, function, count, unit, flops=None):
        self.names.append(name)
        if "limit" in name or not self.args.only or any(words in name for words in self.args.only):
            self.rows[name] = (function, count, unit, flops)

    def once(self, function):
        """Seconds of one call, with all that it started on the device."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self):
        """Each row in turn, for so many rounds. Returns name -> dict of unit, median rate, spread (half the
        range over the median), and, of rows with FLOPs, tflops."""
        for name, (function, *_) in self.rows.items():
            function()    # warm up, compile
        seconds = {name: [] for name in self.rows}
        for round in range(self.args.rounds):
            for name, (function, *_) in self.rows.items():
                if self.args.verbose:
                    training.say(f"\rround {round + 1} of {self.args.rounds}: {name:40}")
                spent = []
                while not spent or sum(spent) < self.args.seconds:
                    spent.append(self.once(function))
                seconds[name].append(statistics.median(spent))
        table = {}
        for name, (_, count, unit, flops) in self.rows.items():
            rates = [count / s for s in seconds[name]]
            rate = statistics.median(rates)
            table[name] = {"unit": unit, "rate": rate, "spread": (max(rates) - min(rates)) / 2 / rate}
            if flops:
                table[name]["tflops"] = flops / count * rate / 1e12
        return table


def add_limits(bench, config, folder):
    """This machine's limits: matrix products of the model's sizes and precision; copying; decoding JPEGs."""
    D, dtype, device = config.dim, bench.precision.dtype, bench.device
    tokens = bench.args.batch_size * (1 + config.grid[0] * config.grid[1])
    x, wide = (torch.randn(tokens, width, device=device, dtype=dtype) for width in (D, 4 * D))
    shapes = ((D, 3 * D), (D, D), (D, 4 * D), (4 * D, D))
    weights = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]

    def products():
        for weight in weights:
            torch.mm(x if weight.shape[0] == D else wide, weight)
    bench.add("limit: matrix products", products, 1, "a second", sum(2 * tokens * w.numel() for w in weights))
    source = torch.ones(2 ** 26 if device.type == "cpu" else 2 ** 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    bench.add("limit: copying memory", lambda: target.copy_(source), 2 * source.numel() * 4 / 1e9, "GB/s")
    bench.add("limit: decoding JPEGs, one core", on_one_core(lambda: [folder[i] for i in range(16)]), 16,
              "images/s")


def on_one_core(function):
    """The function as a loader's worker runs it: with one thread."""
    def alone():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            function()
        finally:
            torch.set_num_threads(threads)
    return alone


def make_jpegs(folder):
    """JPEG_COUNT pictures of JPEG_SIZE, about as hard to decode as photographs."""
    rng = np.random.default_rng(0)
    for i in range(JPEG_COUNT):
        coarse = [rng.integers(0, 256, (JPEG_SIZE[1] // s, JPEG_SIZE[0] // s, 3), dtype=np.uint8)
                  for s in (100, 25, 6)]
        layers = [Image.fromarray(pixels).resize(JPEG_SIZE, Image.BICUBIC) for pixels in coarse]
        picture = Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.25)
        picture.save(Path(folder) / f"{i:03}.jpg", quality=87)
    return data.Images(data.image_paths(folder))


def add_input(bench, config, side, folder):
    """Masks, and the two views and the mask of pre-training from JPEGs."""
    rng, num_masked = np.random.default_rng(0), int(0.4 * config.grid[0] * config.grid[1])
    bench.add(f"masks, {config.grid[0]}x{config.grid[1]}",
              on_one_core(lambda: [blockwise_mask(config.grid, num_masked, rng) for _ in range(500)]), 500,
              "masks/s")
    views = data.Views(folder, config.image_hw[0], side, partial(blockwise_mask, config.grid, num_masked))
    epochs = iter(range(10 ** 9))

    def one_process():
        epoch = next(epochs)
        for i in range(16):
            views[epoch, i]
    bench.add("two views and a mask, one core", on_one_core(one_process), 16, "images/s")
    for workers in bench.args.workers:
        bench.add(f"the same, {workers} worker{'s' * (workers > 1)}", loading(views, workers), 4 * JPEG_COUNT,
                  "images/s")


def loading(views, workers):
    """Take four epochs' worth of batches from a loader of so many workers, which stay alive between calls."""
    class Keys:
        def __len__(self):
            return 4 * JPEG_COUNT // 16

        def __iter__(self):
            return iter([[(i, k) for k in range(16)] for i in range(len(self))])
    loader = DataLoader(views, batch_sampler=Keys(), num_workers=workers, persistent_workers=True,
                        prefetch_factor=4, worker_init_fn=data.leave_process_group)
    return lambda: [None for _ in loader]


def add_models(bench, config, side):
    """The tokenizer, the backbone, and the whole steps of pre-training and fine-tuning, on random images;
    with --compile each also compiled. Returns what flop_counter counts beside the formulas: name -> (formula,
    counted), an image."""
    args, device, precision, B = bench.args, bench.device, bench.precision, bench.args.batch_size
    torch.manual_seed(0)
    tokenizer = dvae.DiscreteVAE(**TOKENIZERS[args.model]).to(device)
    model = vit.MaskedImageModel(config, VOCAB).to(device).train()
    classifier = vit.ImageClassifier(config, CLASSES).to(device).train()
    classifier.checkpoint_blocks = model.checkpoint_blocks = args.checkpoint_blocks
    rng, num_masked = np.random.default_rng(0), int(0.4 * config.grid[0] * config.grid[1])
    mask = torch.from_numpy(np.stack([blockwise_mask(config.grid, num_masked, rng) for _ in range(B)]))
    views = [torch.randint(0, 256, (B, 3, size, size), dtype=torch.uint8)
             for size in (config.image_hw[0], side)]
    batch = [*views, mask, mask.flatten().nonzero()[:, 0]]
    images, token_images, on_device, places = pretrain.unpack(batch, device)
    labels, zeros = torch.randint(0, CLASSES, (B,), device=device), torch.zeros_like(places)

    per_image = {"tokenizer": tokenizer_flops(tokenizer, side), "backbone forward": backbone_flops(config),
                 "backbone forward and backward": training_flops(config, 2 * num_masked * config.dim * VOCAB),
                 "fine-tuning step": training_flops(config, 2 * config.dim * CLASSES)}
    per_image["pre-training step"] = per_image["tokenizer"] + per_image["backbone forward and backward"]

    for kind in ("", ", compiled") if args.compile else ("",):
        if kind:
            tokenizer = copy.copy(tokenizer)
            tokenizer.features = torch.compile(tokenizer.features)

        def tokenize(tokenizer=tokenizer):
            with precision.autocast():
                tokenizer.tokenize(token_images)
        bench.add("tokenizer" + kind, tokenize, B, "images/s", B * per_image["tokenizer"])
        networks = [torch.compile(one) if kind else one for one in (model, classifier)]
        optimizers = [torch.optim.AdamW(training.parameter_groups(one, 0.05), fused=True)
                      for one in (model, classifier)]
        for optimizer in optimizers:
            training.set_lr(optimizer, 1e-6)

        def forward(network=networks[0]):
            with torch.no_grad(), precision.autocast():
                network(images, on_device, places)

        def forward_backward(network=networks[0]):
            with precision.autocast():
                outputs = network(images, on_device, places)
            loss, _ = pretrain.loss_and_accuracy(outputs, zeros)
            precision.backward(loss)
            model.zero_grad(set_to_none=True)

        def pretraining(network=networks[0], optimizer=optimizers[0], tokenizer=tokenizer,
                        precision=precision):
            pixels, token_pixels, hidden, places = pretrain.unpack(batch, device)
            with precision.autocast():
                targets = tokenizer.tokenize(token_pixels).flatten()[places]
                outputs = network(pixels, hidden, places)
            loss, _ = pretrain.loss_and_accuracy(outputs, targets)
            precision.backward(loss)
            precision.update(optimizer, 3.0)

        def finetuning(network=networks[1], optimizer=optimizers[1]):
            with precision.autocast():
                logits = network(images)
            precision.backward(finetune.loss_of(logits, labels, 0.1))
            precision.update(optimizer, 0.0)
        for name, function in (("backbone forward", forward),
                               ("backbone forward and backward", forward_backward),
                               ("pre-training step", pretraining), ("fine-tuning step", finetuning)):
            bench.add(name + kind, function, B, "images/s", B * per_image[name])
            trained = classifier if function is finetuning else model
            bench.held[name + kind] = 3 * size_of(trained)    # AdamW keeps two more of each
            if function is pretraining:
                bench.held[name + kind] += size_of(tokenizer)
        if not kind and precision.dtype != torch.float32 and "pre-training step" in bench.rows:
            bench.held["in fp32"] = 3 * size_of(model) + size_of(tokenizer)
            bench.in_fp32 = lambda: pretraining(model, optimizers[0], tokenizer,
                                                training.Precision("fp32", device))
    return {name: (flops, counted(name, config, TOKENIZERS[args.model], side, num_masked))
            for name, flops in per_image.items() if name in ("tokenizer", "backbone forward and backward")}


def size_of(model):
    """Bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def counted(name, config, tokenizer_sizes, side, num_masked):
    """FLOPs an image by torch.utils.flop_counter, without computing anything."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        if name == "tokenizer":
            dvae.DiscreteVAE(**tokenizer_sizes).encode(torch.zeros(1, 3, side, side))
        else:
            model = vit.MaskedImageModel(config, VOCAB)
            h = vit.VisionTransformer.forward(model, torch.zeros(1, 3, *config.image_hw))[:, 1:]
            model.lm_head(h[0, :num_masked]).sum().backward()
    return counter.get_total_flops()


def peak_memory(bench, function):
    """Bytes of tensors that one call needs at a time, beyond those that are there before it."""
    if bench.device.type == "cuda":
        before = torch.cuda.memory_allocated(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        function()
        return torch.cuda.max_memory_allocated(bench.device) - before
    profiled = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with profiled:
        function()
    changes = [(event.start_ns(), event.nbytes()) for event in profiled.profiler.kineto_results.events()
               if event.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(changes)] or [0]).max())


TOKENIZERS = {name: dict(vocab_size=VOCAB) for name in vit.PRESETS}    # DALL-E's size
TOKENIZERS["demo"] = dict(vocab_size=VOCAB,
                          **{name: dvae.PRESETS["demo"][name]
                             for name in ("hidden", "groups", "blocks_per_group")})
DEMO = vit.ViTConfig(**{name: value for name, value in pretrain.PRESETS["demo"].items()
                        if name in vit.ViTConfig.__dataclass_fields__})


# ---- Several processes ----

def scaling(bench, config):
    """Under torchrun: images a second of the backbone's step by one process that has all this machine's cores
    (or one GPU), by all processes together, and by them without exchanging gradients."""
    args, device, precision, B = bench.args, bench.device, bench.precision, bench.args.batch_size
    torch.manual_seed(0)
    images = torch.rand(B, 3, *config.image_hw, device=device)
    rng, num_masked = np.random.default_rng(0), int(0.4 * config.grid[0] * config.grid[1])
    mask = torch.from_numpy(np.stack([blockwise_mask(config.grid, num_masked, rng) for _ in range(B)]))
    mask, zeros = mask.to(device), torch.zeros(B * num_masked, dtype=torch.int64, device=device)

    def step_of(model, network, synchronise):
        optimizer = torch.optim.AdamW(training.parameter_groups(model, 0.05), lr=1e-6, fused=True)

        def step():
            with nullcontext() if synchronise else network.no_sync():
                with precision.autocast():
                    outputs = network(images, mask)
                loss, _ = pretrain.loss_and_accuracy(outputs, zeros)
                precision.backward(loss)
            precision.update(optimizer, 3.0)
        return step
    model = vit.MaskedImageModel(config, VOCAB).to(device)
    network = training.distribute(model, device)
    steps = {"alone": step_of(model, model, True), "together": step_of(model, network, True),
             "silent": step_of(model, network, False)}
    threads, seconds = torch.get_num_threads(), {name: [] for name in steps}
    for round in range(1 + args.rounds):
        for name, step in steps.items():
            dist.barrier()
            if name == "alone":
                torch.set_num_threads(threads * training.world_size() if device.type == "cpu" else threads)
            spent = [bench.once(step) for _ in range(2)] if name != "alone" or training.rank() == 0 else [0.0]
            torch.set_num_threads(threads)
            slowest = torch.tensor([statistics.median(spent)], device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if round:    # the first warms up
                seconds[name].append(slowest.item())
    K, (alone, together, silent) = training.world_size(), map(statistics.median, seconds.values())
    return {"processes": K, "alone_images_per_second": B / alone, "together_images_per_second": K * B
            / together, "scaling": K * alone / together,
            "communication_share": max(0.0, 1 - silent / together)}


# ---- Report ----

def machine(device):
    """This machine in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, torch {torch.__version__}"


def print_table(table, memory):
    """What Bench.measure and peak_memory gave, a line a row, with the share of the matrix products' rate."""
    limit = table["limit: matrix products"]["tflops"]
    training.say(f"\n{'':42}{'median':>12}  {'unit':9} {'±':>4} {'TFLOP/s':>9} {'of limit':>9} {'memory':>9}")
    for name, row in table.items():
        tflops = f"{row['tflops']:9.3f} {row['tflops'] / limit:9.0%}" if "tflops" in row else " " * 19
        used = f"{memory[name] / 2 ** 20:6.0f} MB" if memory.get(name) else ""
        training.say(f"{name:42}{row['rate']:12,.1f}  {row['unit']:9} {row['spread']:4.0%} {tflops} {used}")


def main():
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=__doc__.split("\n\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("--model", choices=["demo", *vit.PRESETS], default="base",
                        help="size of the transformer (base)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step and process (16)")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    parser.add_argument("--compile", action="store_true", help="measure each model compiled, too")
    parser.add_argument("--checkpoint-blocks", action="store_true",
                        help="recompute blocks in the backward pass")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2],
                        help="numbers of loader processes to measure (1 2)")
    parser.add_argument("--data", help="a folder of images to load; default: made-up JPEGs of 500x375")
    parser.add_argument("--rounds", type=int, default=3, help="times that all rows are measured, in turn (3)")
    parser.add_argument("--seconds", type=float, default=1.0,
                        help="a row is called at least so long in each round (1)")
    parser.add_argument("--only", nargs="+", metavar="WORDS",
                        help="only the rows whose name holds one of these words, and the limits")
    parser.add_argument("--out", default="bench.json", help="where the figures go (bench.json)")
    parser.add_argument("--verbose", action="store_true", help="say what is being measured")
    with training.one_line_errors():
        args = parser.parse_args()
        for name in ("batch_size", "rounds"):
            if getattr(args, name) < 1:
                raise training.UserError(f"--{name.replace('_', '-')}: at least 1, not {getattr(args, name)}")
        if any(workers < 1 for workers in args.workers):
            raise training.UserError(f"--workers: at least 1 each, not {min(args.workers)}")
        if not 0 <= args.seconds < math.inf:
            raise training.UserError(f"--seconds: 0 or above, and finite, not {args.seconds}")
        if args.data and not Path(args.data).is_dir():
            raise training.UserError(f"--data: {args.data} is not a folder of images")
        if Path(args.out).is_dir() or not Path(args.out).parent.is_dir():
            raise training.UserError(f"--out: {args.out} is not a file in a folder that exists")
        report(args, training.join_processes(args))
        if dist.is_initialized():
            dist.destroy_process_group()


def report(args, device):
    """Measure what the flags ask for, print it, write args.out; under torchrun `scaling` alone."""
    bench, config = Bench(args, device), DEMO if args.model == "demo" else vit.PRESETS[args.model]
    dtype = str(bench.precision.dtype).removeprefix("torch.")
    setting = f"{machine(device)}; {args.model}, batch {args.batch_size}, {dtype}"
    training.say(setting)
    if training.world_size() > 1:
        results = {"machine": setting, "scaling": scaling(bench, config)}
        training.say(training.in_words(results["scaling"]))
        training.on_first_process(lambda: training.write_json(args.out, results))
        return
    side = config.grid[0] * 2 ** (TOKENIZERS[args.model].get("groups", 4) - 1)
    with tempfile.TemporaryDirectory() as made:
        folder = data.open_splits(args.data, "data")[0] if args.data else make_jpegs(made)
        add_limits(bench, config, folder)
        add_input(bench, config, side, folder)
        flops = add_models(bench, config, side)
        for name, (formula, counter) in flops.items():
            training.say(f"{name}: {formula / 1e9:.2f} GFLOP an image by formula, {counter / 1e9:.2f} by "
                         f"torch.utils.flop_counter")
        for words in args.only or ():
            if not any(words in name for name in bench.names):
                names = ", ".join(bench.names)
                raise training.UserError(f"--only: no row is called {words}; there are {names}")
        table = bench.measure()
        memory, in_fp32 = {}, None
        for name, (function, *_, flops_of_row) in bench.rows.items():
            if flops_of_row and not name.startswith(("limit", "backbone forward")):
                memory[name] = bench.held.get(name, 0) + peak_memory(bench, function)
                table[name]["peak_memory_bytes"] = memory[name]
        if bench.in_fp32:
            in_fp32 = bench.held["in fp32"] + peak_memory(bench, bench.in_fp32)
    print_table(table, memory)
    if in_fp32:
        training.say(f"an eager pre-training step in fp32 would take {in_fp32 / 2 ** 20:.0f} MB")
    training.write_json(args.out, {
        "machine": setting, "rows": table, "fp32_peak_memory_bytes": in_fp32,
        "gflop_per_image": {name: {"formula": formula / 1e9, "counted": counter / 1e9}
                            for name, (formula, counter) in flops.items()}})
    training.say(f"written to {args.out}")


if __name__ == "__main__":
    main()
