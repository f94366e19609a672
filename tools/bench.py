"""Speed compared with the limits of this machine: `python -m tools.bench`.

All rows are measured in turn, in several rounds. A row has the median rate, and half the range between the
slowest round and the fastest. FLOPs are those of matrix products and convolutions, 2 for a multiply-add.
"""
import itertools
import math
import os
import platform
import re
import statistics
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import folders
import launch
import pretrain
import run
import train_dvae
import vit
from dvae import DiscreteVAE

NUM_JPEGS = 16    # images that one call loads
PRODUCTS = "limit: matrix products"


class Row(NamedTuple):
    """A row of the table: a call of function() handles `count` of the unit. threads: None means all."""
    function: object
    count: float
    unit: str
    threads: int | None = None


class Bench:
    """The models of a preset with random weights, views of JPEGs written to a folder, and a batch of them."""

    def __init__(self, args, device, folder):
        self.device, self.precision, self.batch_size = device, args.precision, args.batch_size
        position = ["--position", args.position] if args.position else []
        self.args = pretrain.parse_args(["--preset", args.model, *position])
        self.config = launch.config_from_flags(vit.ViTConfig, self.args)
        sizes = train_dvae.parse_args(["--preset", "demo" if args.model == "demo" else "base"])
        self.tokenizer = DiscreteVAE(sizes.vocab_size, sizes.hidden, sizes.groups, sizes.blocks_per_group)
        self.model = pretrain.build_model(self.args, self.config, self.tokenizer, device)
        source = write_jpegs(folder)
        self.views, _ = pretrain.open_views(self.args, self.config, source, source, self.tokenizer)
        samples = [self.views[0, i % NUM_JPEGS] for i in range(args.batch_size)]
        self.batch = pretrain.collate(samples, self.args.predict)

    def training_step(self, network):
        """A function that does a step of pretrain.py on the batch: tokens, logits, loss, gradient, AdamW."""
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
        fp16 = launch.choose_dtype(self.precision, self.device.type) == torch.float16
        scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)

        def step():
            images, token_images, mask, places = pretrain.to_device(self.batch, self.device)
            with launch.autocast(self.precision, self.device):
                z = pretrain.targets_at(places, images, token_images, network, self.tokenizer)
                logits = network(images, mask, places)
            loss, _ = pretrain.loss_and_accuracy(logits, z)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), self.args.clip_grad or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return step


def write_jpegs(folder):
    """Write images that take as long to decode as photographs of 500 x 375, and return them as a source."""
    rng = np.random.default_rng(0)
    for i in range(NUM_JPEGS):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 62, 3), dtype=np.uint8))
        image = coarse.resize((500, 375), Image.Resampling.BICUBIC)
        image.save(Path(folder) / f"{i}.jpg", quality=87)
    return folders.Images(folders.image_paths(folder))


class Reference(nn.Module):
    """The BEiT of timm or transformers, with the sizes of a ViTConfig and the forward of MaskedImageModel."""

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
            h = self.backbone.forward_features(images)                 # (B, 1+N, D); timm has no mask token
        else:
            h = self.backbone(images, mask.flatten(1)).last_hidden_state
        return self.lm_head(h[:, 1:].flatten(0, 1)[places])            # (M, D) -> (M, V)


def make_rows(bench, networks):
    """name -> Row; networks: name -> module, whose step of pre-training is measured."""
    D, B = bench.config.dim, bench.batch_size
    tokens = B * (1 + math.prod(bench.config.grid))
    options = dict(device=bench.device, dtype=launch.choose_dtype(bench.precision, bench.device.type))
    sizes = ((D, 3 * D), (D, D), (D, 4 * D), (4 * D, D))               # qkv, proj, fc1 and fc2 of a block
    pairs = [(torch.randn(tokens, n_in, **options), torch.randn(n_in, n_out, **options))
             for n_in, n_out in sizes]
    floats = torch.ones(2 ** 26, device=bench.device)
    copy = torch.empty_like(floats)
    _, token_images, _, _ = pretrain.to_device(bench.batch, bench.device)
    views, rng, epochs = bench.views, np.random.default_rng(0), itertools.count()

    def decode():
        return [views.source[i] for i in range(NUM_JPEGS)]

    def load():
        epoch = next(epochs)                                           # other crops in each call
        return [views[epoch, i] for i in range(NUM_JPEGS)]

    def tokenize():
        with launch.autocast(bench.precision, bench.device):
            bench.tokenizer.tokenize(token_images)

    rows = {PRODUCTS: Row(lambda: [x @ weight for x, weight in pairs], 1, "blocks/s"),
            "limit: copying memory": Row(lambda: copy.copy_(floats), 8 * len(floats) / 1e9, "GB/s"),
            "limit: decoding JPEGs, one core": Row(decode, NUM_JPEGS, "images/s", threads=1),
            "masks, one core": Row(lambda: views.draw_mask(rng), 1, "masks/s", threads=1),
            "two views and a mask, one core": Row(load, NUM_JPEGS, "images/s", threads=1),
            "tokenizer": Row(tokenize, B, "images/s")}
    for name, network in networks.items():
        rows[name] = Row(bench.training_step(network), B, "images/s")
    return rows


# ---- Measuring ----

def count_flops(function):
    """FLOPs of one call. Attention is written out, because fused kernels are not counted."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def measure(rows, flops, rounds):
    """name -> {unit, rate, spread}; with FLOPs also gflop per unit, tflops, of_limit, and memory on a GPU."""
    table, rates = {}, {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            timer = Timer("function()", globals={"function": row.function},
                          num_threads=row.threads or torch.get_num_threads())    # a Timer waits for the GPU
            rates[name].append(row.count / timer.blocked_autorange().median)
    for name, row in rows.items():
        rate = statistics.median(rates[name])
        spread = (max(rates[name]) - min(rates[name])) / 2 / rate
        found = table[name] = {"unit": row.unit, "rate": rate, "spread": spread}
        if flops[name]:
            found |= {"gflop": flops[name] / row.count / 1e9, "tflops": flops[name] / row.count * rate / 1e12}
            found["of_limit"] = found["tflops"] / table[PRODUCTS]["tflops"]
            if torch.cuda.is_available():    # beyond weights and the state of the optimizer
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                row.function()
                found["peak_memory_bytes"] = torch.cuda.max_memory_allocated() - before
    return table


def measure_all(args, bench):
    """The table of the limits and of the rows of --only; with --compile also of the compiled models."""
    networks = {"pre-training step": bench.model}
    for library in ("timm", "transformers"):
        with suppress(ImportError):
            reference = Reference(library, bench.config, bench.model.lm_head)
            networks[f"pre-training step, {library}"] = reference.to(bench.device)
    rows = make_rows(bench, networks)
    for words in args.only or ():
        if not any(words in name for name in rows):
            raise launch.UserError(f"--only: no row is called {words}; there are {', '.join(rows)}")
    wanted = ["limit", *(args.only or rows)]
    rows = {name: row for name, row in rows.items() if any(words in name for words in wanted)}
    flops = {name: count_flops(row.function) for name, row in rows.items()}
    table = measure(rows, flops, args.rounds)
    if args.compile:
        bench.tokenizer.forward_features = torch.compile(bench.tokenizer.forward_features)
        for network in networks.values():
            network.compile()
        compiled = measure({name: row for name, row in rows.items() if flops[name]}, flops, args.rounds)
        table |= {f"{name}, compiled": row for name, row in compiled.items() if name != PRODUCTS}
    return table


# ---- Report ----

def describe_machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def print_table(table):
    launch.say(f"{'':43}{'median':>10} {'unit':9}{'±':>4} {'GFLOP':>8} {'TFLOP/s':>8} of limit")
    for name, row in table.items():
        line = f"{name:43}{row['rate']:10,.1f} {row['unit']:9}{row['spread']:4.0%}"
        if "tflops" in row:
            line += f" {row['gflop']:8.2f} {row['tflops']:8.3f} {row['of_limit']:8.0%}"
        if "peak_memory_bytes" in row:
            line += f" {row['peak_memory_bytes'] / 2 ** 20:8,.0f} MiB"
        launch.say(line)


def main():
    parser = launch.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                           formatter_class=launch.Parser.HelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(pretrain.PRESETS), default="base", help="preset of pretrain.py")
    add("--position", choices=["absolute", "shared_relative"], help="of the backbone (default: the preset's)")
    add("--batch-size", type=launch.positive_int, default=16, help="images per step")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="as in pretrain.py")
    add("--compile", action="store_true", help="measure the compiled models, too")
    add("--rounds", type=launch.positive_int, default=3, help="how many times all rows are measured, in turn")
    add("--only", nargs="+", metavar="WORDS", help="rows whose names contain one of these, and the limits")
    add("--out", type=launch.text, default="bench.json", help="file for the numbers")
    with launch.one_line_errors():
        args = parser.parse_args()
        if Path(args.out).is_dir() or not Path(args.out).parent.is_dir():
            raise launch.UserError(f"--out: must be a file in a folder that exists, got {args.out}")
        device = launch.join_processes("auto", args.precision)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(args, device, folder)
            machine = (f"{describe_machine(device)}, torch {torch.__version__}; {args.model}, batch "
                       f"{args.batch_size}, {launch.choose_dtype(args.precision, device.type)}")
            launch.say(machine)
            rows = measure_all(args, bench)
        print_table(rows)
        run.write_json(args.out, {"machine": machine, "rows": rows})
        launch.say(f"written to {args.out}")


if __name__ == "__main__":
    main()
