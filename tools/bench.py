"""Speed beside this machine's own limits: `python -m tools.bench`; under torchrun: scaling.

Rows are measured in turn, in several rounds: the median rate, and half the range between the slowest and the
fastest round. FLOPs are those of matrix products and convolutions; a multiply-add counts as two.
"""
import argparse
import itertools
import math
import os
import platform
import re
import statistics
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import data
import dvae
import pretrain
import training
from training import UserError

JPEGS = 16    # pictures that one call loads
PRODUCTS = "limit: matrix products"


class Bench:
    """What is measured: the models of --model with random weights, views of JPEGs, and a batch of them."""

    def __init__(self, args, device, folder):
        self.device, self.precision = device, training.Precision(args.precision, device)
        batch_size = args.batch_size * training.world_size()
        preset = {**pretrain.PRESETS[args.model], "preset": args.model, "batch_size": batch_size}
        preset |= {"position": args.position} if args.position else {}
        self.config = training.build(pretrain.Config, preset)
        size = dvae.PRESETS["demo" if args.model == "demo" else "base"]    # base: DALL-E's
        self.tokenizer, _ = dvae.build_model(training.build(dvae.Config, size), device)
        self.model = pretrain.build_model(self.config, self.tokenizer, device)
        self.views, _ = pretrain.open_views(self.config, jpegs(folder), jpegs(folder), self.tokenizer)
        samples = [self.views[0, i % JPEGS] for i in range(args.batch_size)]
        self.batch = pretrain.collate(samples, self.config.predict)

    def pretraining_step(self, network):
        """A function that does a step of pretrain.py without loading: tokens -> logits -> loss -> step."""
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)

        def step():
            images, token_images, mask, places = pretrain.to_device(self.batch, self.device)
            with self.precision.autocast():
                targets = pretrain.targets_of(images, token_images, places, network, self.tokenizer)
                logits = network(images, mask, places)
            loss, _ = pretrain.loss_and_accuracy(logits, targets)
            self.precision.backward(loss)
            self.precision.update(optimizer, self.config.clip_grad)
        return step


def jpegs(folder):
    """Pictures of 500 x 375, written to the folder, that take about as long to decode as photographs."""
    rng = np.random.default_rng(0)
    for i in range(JPEGS):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 62, 3), dtype=np.uint8))
        picture = coarse.resize((500, 375), Image.Resampling.BICUBIC)
        picture.save(Path(folder) / f"{i}.jpg", quality=87)
    return data.Images(data.image_paths(folder))


class Reference(nn.Module):
    """An independent BEiT of the config's size with our head, called as vit.MaskedImageModel."""

    def __init__(self, library, config, lm_head):
        super().__init__()
        self.library, self.lm_head = library, lm_head
        absolute, shared = config.position == "absolute", config.position == "shared_relative"
        if library == "timm":
            from timm.models.beit import Beit
            self.backbone = Beit(
                config.image_size, config.patch_size, num_classes=0, embed_dim=config.dim, depth=config.depth,
                num_heads=config.heads, drop_path_rate=config.drop_path, use_abs_pos_emb=absolute,
                use_shared_rel_pos_bias=shared, init_values=config.layer_scale or None)
        else:
            from transformers import BeitConfig, BeitModel
            self.backbone = BeitModel(BeitConfig(
                image_size=config.image_size, patch_size=config.patch_size, hidden_size=config.dim,
                num_hidden_layers=config.depth, num_attention_heads=config.heads, use_mask_token=True,
                intermediate_size=4 * config.dim, drop_path_rate=config.drop_path,
                use_absolute_position_embeddings=absolute, use_shared_relative_position_bias=shared,
                layer_scale_init_value=config.layer_scale), add_pooling_layer=False)

    def forward(self, images, mask, places):
        if self.library == "timm":
            h = self.backbone.forward_features(images)                 # (B, 1+N, D); it does not mask
        else:
            h = self.backbone(images, mask.flatten(1)).last_hidden_state
        return self.lm_head(h[:, 1:].flatten(0, 1)[places])            # (M, D) -> (M, V)


# ---- Rows: name -> (function, how many of the unit one call does, unit, threads or None for all) ----

def limits_and_input(bench):
    """The limits of this machine, and samples of pre-training as one loader process makes them."""
    D, tokens = bench.config.dim, len(bench.batch[0]) * (1 + math.prod(bench.config.grid))
    how = dict(device=bench.device, dtype=bench.precision.dtype)
    shapes = ((D, 3 * D), (D, D), (D, 4 * D), (4 * D, D))              # of a block: qkv, proj, fc1, fc2
    pairs = [(torch.randn(tokens, n_in, **how), torch.randn(n_in, n_out, **how)) for n_in, n_out in shapes]
    floats, views = torch.ones(2 ** 26, device=bench.device), bench.views
    target, rng, epochs = torch.empty_like(floats), np.random.default_rng(0), itertools.count()

    def decode():
        return [views.source[i] for i in range(JPEGS)]

    def load():
        return [views[next(epochs), i] for i in range(JPEGS)]

    return {PRODUCTS: (lambda: [x @ weight for x, weight in pairs], 1, "blocks/s", None),
            "limit: copying memory": (lambda: target.copy_(floats), 8 * len(floats) / 1e9, "GB/s", None),
            "limit: decoding JPEGs, one core": (decode, JPEGS, "images/s", 1),
            "masks, one core": (lambda: views.draw_mask(rng), 1, "masks/s", 1),
            "two views and a mask, one core": (load, JPEGS, "images/s", 1)}


def tokenizer_and_steps(bench, networks):
    """The tokenizer, and a step of pre-training for each of networks: name -> module."""
    images = pretrain.to_device(bench.batch, bench.device)[1]

    def tokenize():
        with bench.precision.autocast():
            bench.tokenizer.tokenize(images)

    rows = {"tokenizer": (tokenize, len(images), "images/s", None)}
    for name, network in networks.items():
        rows[name] = (bench.pretraining_step(network), len(images), "images/s", None)
    return rows


# ---- Measuring ----

def count_flops(function):
    """FLOPs of one call, attention written out: fused kernels are not counted, or their recomputation is."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def make_timer(function, threads=None):
    """A Timer, which waits for what the function starts on a GPU."""
    return Timer("function()", globals={"function": function}, num_threads=threads or torch.get_num_threads())


def measure(rows, flops, rounds):
    """name -> {unit, rate, spread}; with FLOPs also gflop of one unit, tflops, of_limit, memory on a GPU."""
    table, rates = {}, {name: [] for name in rows}
    for _ in range(rounds):
        for name, (function, count, _, threads) in rows.items():
            rates[name].append(count / make_timer(function, threads).blocked_autorange().median)
    for name, (function, count, unit, _) in rows.items():
        rate = statistics.median(rates[name])
        spread = (max(rates[name]) - min(rates[name])) / 2 / rate
        row = table[name] = {"unit": unit, "rate": rate, "spread": spread}
        if flops[name]:
            row |= {"gflop": flops[name] / count / 1e9, "tflops": flops[name] / count * rate / 1e12}
            row["of_limit"] = row["tflops"] / table[PRODUCTS]["tflops"]
            if torch.cuda.is_available():    # beyond weights and the optimizer's state
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                function()
                row["peak_memory_bytes"] = torch.cuda.max_memory_allocated() - before
    return table


def measure_all(args, bench):
    """The table of the rows of --only and the limits; with --compile the models once more, compiled."""
    networks = {"pre-training step": bench.model}
    for library in ("timm", "transformers"):
        with suppress(ImportError):
            reference = Reference(library, bench.config, bench.model.lm_head)
            networks[f"pre-training step, {library}"] = reference.to(bench.device)
    rows = limits_and_input(bench) | tokenizer_and_steps(bench, networks)
    for words in args.only or ():
        if not any(words in name for name in rows):
            raise UserError(f"--only: no row is called {words}; there are {', '.join(rows)}")
    wanted = ["limit", *(args.only or rows)]
    rows = {name: row for name, row in rows.items() if any(words in name for words in wanted)}
    flops = {name: count_flops(row[0]) for name, row in rows.items()}
    table = measure(rows, flops, args.rounds)
    if args.compile:
        bench.tokenizer.forward_features = torch.compile(bench.tokenizer.forward_features)
        for network in networks.values():
            network.compile()
        again = measure({name: row for name, row in rows.items() if flops[name]}, flops, args.rounds)
        table |= {f"{name}, compiled": row for name, row in again.items() if name != PRODUCTS}
    return table


def scaling(args, bench):
    """Under torchrun: images a second of a step of pre-training on one process that has all cores of the
    machine, or its GPU, and on all processes together."""
    network, K = training.distribute(bench.model, bench.device), training.world_size()
    alone, together = bench.pretraining_step(bench.model), bench.pretraining_step(network)
    seconds = {alone: [], together: []}
    for function in args.rounds * [alone, together]:
        all_cores = function is alone and bench.device.type == "cpu"
        timer = make_timer(function, torch.get_num_threads() * (K if all_cores else 1))
        dist.barrier()
        idle = function is alone and training.rank() > 0
        slowest = torch.tensor(0.0 if idle else timer.timeit(1).median, device=bench.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds[function].append(slowest.item())
    one, all_of_them = (args.batch_size / statistics.median(seconds[step]) for step in (alone, together))
    return {"processes": K, "alone_images_per_second": one, "together_images_per_second": K * all_of_them,
            "scaling": K * all_of_them / one}


# ---- Report ----

def machine(device):
    """This machine in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def print_table(table):
    training.say(f"{'':43}{'median':>10} {'unit':9}{'±':>4} {'GFLOP':>8} {'TFLOP/s':>8} of limit")
    for name, row in table.items():
        line = f"{name:43}{row['rate']:10,.1f} {row['unit']:9}{row['spread']:4.0%}"
        if "tflops" in row:
            line += f" {row['gflop']:8.2f} {row['tflops']:8.3f} {row['of_limit']:8.0%}"
        if "peak_memory_bytes" in row:
            line += f" {row['peak_memory_bytes'] / 2 ** 20:8,.0f} MB"
        training.say(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", choices=list(pretrain.PRESETS), default="base",
                        help="preset of pretrain.py (base)")
    parser.add_argument("--position", choices=["absolute", "shared_relative"],
                        help="of the backbone (the preset's)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step and process (16)")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    parser.add_argument("--compile", action="store_true", help="measure each model compiled, too")
    parser.add_argument("--rounds", type=int, default=3, help="times that all rows are measured, in turn (3)")
    parser.add_argument("--only", nargs="+", metavar="WORDS",
                        help="only rows whose names hold one of these words, and the limits")
    parser.add_argument("--out", default="bench.json", help="where the figures go (bench.json)")
    parser.set_defaults(device="auto")
    with training.one_line_errors():
        args = parser.parse_args()
        if args.rounds < 1:
            raise UserError(f"--rounds: at least 1, not {args.rounds}")
        if Path(args.out).is_dir() or not Path(args.out).parent.is_dir():
            raise UserError(f"--out: {args.out} is not a file in a folder that exists")
        device = training.join_processes(args)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(args, device, folder)
            report = {"machine": f"{machine(device)}, torch {torch.__version__}; {args.model}, batch "
                                 f"{args.batch_size}, {bench.precision.dtype}"}
            training.say(report["machine"])
            if dist.is_initialized():
                report["scaling"] = scaling(args, bench)
                training.say(training.in_words(report["scaling"]))
                dist.destroy_process_group()
            else:
                report["rows"] = measure_all(args, bench)
                print_table(report["rows"])
        if training.rank() == 0:
            training.write_json(args.out, report)
            training.say(f"written to {args.out}")


if __name__ == "__main__":
    main()
