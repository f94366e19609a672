"""Figures: masks, visual tokens, predictions, self-attention, positions, training curves, the whole method.

`python visualize.py WHAT` writes one picture. Each figure is a function here that takes tensors and returns a
matplotlib Figure, for notebooks; the command line only loads and saves. B images of H W pixels, h w patches,
N = h w, T = 1 + N tokens.
"""
import argparse
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import data
import training
import vit
import weights
from masking import blockwise_mask, random_mask
from training import UserError

HEAT = "inferno"    # attention: dark to bright, the same to colour-blind eyes
MARK = "deepskyblue"    # reference patches
SPECIAL = "S"    # --patch S: the special token [S]


# ---- Shared by the figures ----

def blank_axes(part, rows, columns, **how):
    """(rows, columns) axes of a figure or subfigure, without ticks or frames."""
    axes = part.subplots(rows, columns, squeeze=False, **how)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    return axes


def show(axis, image, title=None):
    """An image (3, H, W) in [0, 1] on an axis, row 0 on top."""
    axis.imshow(image.permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
    if title:
        axis.set_title(title, fontsize=10)


def draw_cells(axis, cells, image_hw, **how):
    """Outline the patches where cells (h, w) is True, over an image of H x W pixels."""
    (H, W), (h, w) = image_hw, cells.shape
    for row, column in zip(*np.nonzero(np.asarray(cells))):
        axis.add_patch(Rectangle((column * W / w - 0.5, row * H / h - 0.5), W / w, H / h, fill=False, **how))


def hide(images, mask, shade=0.5):
    """Images (..., 3, H, W) with the masked patches, mask (..., h, w), in one shade of grey."""
    (H, W), (h, w) = images.shape[-2:], mask.shape[-2:]
    rows, columns = torch.arange(H)[:, None] * h // H, torch.arange(W) * w // W
    places = torch.as_tensor(mask)[..., None, rows, columns]    # (..., 1, H, W)
    return torch.where(places, shade, images)


def token_colours(tokens):
    """A colour for each token, the same for the same token: (h, w) int64 -> (3, h, w)."""
    tokens = np.asarray(tokens)
    # value too, for eyes that see no hue
    hue, value = tokens * 0.61803 % 1, 0.35 + 0.6 * (tokens * 0.7549 % 1)
    return torch.from_numpy(hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.65), value], -1))).permute(2, 0, 1)


# ---- masks: Algorithm 1 beside random ones ----

def figure_masks(images, blockwise, random, statistics):
    """Images (n, 3, H, W) under blockwise and random masks (n, h, w), and what mask_statistics gives."""
    n, (h, w) = len(images), blockwise[0].shape
    figure = Figure(figsize=(11, 2 * 11 / n + 3.3), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(2 * 11 / n, 3.0))
    axes = blank_axes(top, 2, n)
    for row, (label, masks) in enumerate((("blockwise", blockwise), ("random", random))):
        axes[row][0].set_ylabel(f"{label}\n{int(masks[0].sum())} of {h * w}", fontsize=10)
        for axis, image, mask in zip(axes[row], images, masks):
            show(axis, hide(image, mask))
    sizes, counts = bottom.subplots(1, 2)
    bins = np.arange(0.5, statistics["largest"] + 3, 3)
    for label, colour in (("blockwise", "tab:blue"), ("random", "tab:orange")):
        regions = statistics[label]
        sizes.hist(regions, bins=bins, weights=np.full(len(regions), 1 / len(regions)), histtype="step",
                   linewidth=1.5, color=colour, label=label)
    sizes.set(title="masked patches that touch each other", xlabel="patches in a connected region",
              ylabel="share of regions, in bins of 3", yscale="log")
    sizes.legend(frameon=False)
    low, high = min(map(min, statistics["counts"].values())), max(map(max, statistics["counts"].values()))
    for (label, values), colour in zip(statistics["counts"].items(), ("tab:blue", "tab:green", "tab:orange")):
        counts.hist(values, bins=np.arange(low - 1.5, high + 2.5), color=colour, alpha=0.6, label=label,
                    density=True)    # bins of 1: shares
    counts.set(title=f"masked patches an image, {statistics['draws']:,} draws", xlabel="patches",
               ylabel="share of images")
    counts.legend(frameon=False)
    return figure


def mask_statistics(grid, num_masked, rng, draws=10_000):
    """Of so many draws: sizes of connected regions of blockwise and random masks, and counts of patches."""
    blockwise = np.stack([blockwise_mask(grid, num_masked, rng) for _ in range(draws)])
    random = np.stack([random_mask(grid, num_masked, rng) for _ in range(draws)])
    as_printed = np.stack([blockwise_mask(grid, num_masked, rng, exact=False) for _ in range(draws)])
    sizes = {"blockwise": region_sizes(blockwise), "random": region_sizes(random)}
    counts = {"blockwise, exact": blockwise.sum((1, 2)), "Algorithm 1 as printed": as_printed.sum((1, 2))}
    return {**sizes, "counts": counts, "draws": draws, "largest": max(map(max, sizes.values()))}


def region_sizes(masks):
    """The sizes of all regions of masked patches that touch along a side: (n, h, w) bool -> (regions,)."""
    n, h, w = masks.shape
    label = np.where(masks, np.arange(1, n * h * w + 1).reshape(n, h, w), 0)
    while True:    # each patch takes the largest label around it, until nothing changes
        padded = np.pad(label, ((0, 0), (1, 1), (1, 1)))
        around = np.stack([padded[:, 1:-1, 1:-1], padded[:, :-2, 1:-1], padded[:, 2:, 1:-1],
                           padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]])
        largest = np.where(masks, around.max(0), 0)
        if (largest == label).all():
            return np.unique(label[masks], return_counts=True)[1]
        label = largest


# ---- tokens and predictions ----

def figure_tokens(images, tokens, soft, hard, codes):
    """Images (n, 3, H, W), their tokens (n, h, w) as colours, both reconstructions (n, 3, H, W); below,
    codes: a list of (code, share of all tokens, patches (k, 3, P, P) that map to it)."""
    n = len(images)
    error = [f"{(pictures - images).square().mean():.4f}" for pictures in (soft, hard)]
    rows = {"image": images, "tokens": [token_colours(grid) for grid in tokens],
            f"soft codes\nerror {error[0]}": soft, f"hard codes\nerror {error[1]}": hard}
    shown = min(6, max(len(patches) for _, _, patches in codes))
    top_height, bottom_height = 4 * 11 / n, shown * 11 / len(codes)
    figure = Figure(figsize=(11, top_height + bottom_height + 1.0), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(top_height, bottom_height + 0.8))
    axes = blank_axes(top, 4, n)
    for row, (label, pictures) in zip(axes, rows.items()):
        row[0].set_ylabel(label, fontsize=10)
        for axis, picture in zip(row, pictures):
            show(axis, picture)
    bottom.suptitle("the most used codes: number, share of all tokens, patches that map to them", fontsize=10)
    axes = blank_axes(bottom, shown, len(codes))
    for column, (code, share, patches) in zip(axes.T, codes):
        column[0].set_title(f"{code}\n{share:.1%}", fontsize=8)
        for axis, patch in zip(column, patches):
            show(axis, patch)
    return figure


def code_pages(images, tokens, count, examples=6):
    """For figure_tokens: the most used codes of tokens (n, h, w), with patches of the images (n, 3, H, W)."""
    P = images.shape[-1] // tokens.shape[-1]
    # (n h w, 3, P, P)
    patches = images.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    codes, uses = tokens.unique(return_counts=True)
    chosen = uses.topk(min(count, len(codes))).indices
    return [(int(codes[i]), float(uses[i]) / tokens.numel(), patches[tokens.flatten() == codes[i]][:examples])
            for i in chosen]


@torch.no_grad()
def predictions(model, images, mask, tokenizer=None, token_images=None):
    """What a masked image model predicts behind the mask (B, h, w), or everywhere if the mask is empty.

    images (B, 3, H, W); token_images (B, 3, ., .): the tokenizer's view; without a tokenizer the model
    predicts pixels. Returns title -> pictures (B, 3, ., .): original, masked, the true tokens decoded, and
    the prediction with the truth at the other places; without a decoder the patches whose token was seen or
    found; and found (B, h, w) bool, or None.
    """
    everywhere = torch.arange(mask.numel(), device=mask.device)
    outputs = model.eval()(images, mask, everywhere).unflatten(0, mask.shape)    # (B, h, w, V or C P P)
    predicted = mask if mask.any() else torch.ones_like(mask)
    columns = {"original": images, "masked": hide(images, mask)}
    if tokenizer is None:
        pixels = torch.where(predicted[..., None], outputs.float(), model.patch_pixels(images))
        return {**columns, "prediction": model.unpatch_pixels(pixels)}, None
    true = tokenizer.tokenize(token_images)
    guess = torch.where(predicted, outputs.argmax(-1), true)
    if tokenizer.decoder is None:
        return {**columns, "right tokens": hide(images, guess != true)}, guess == true
    return {**columns, "tokenizer at best": tokenizer.decode(true),
            "prediction": tokenizer.decode(guess)}, guess == true


def figure_predictions(columns, mask, right=None, columns_of_figure=2):
    """columns: title -> (n, 3, ., .), as predictions gives them; right (n, h, w) bool: tokens that are right.

    Right tokens are outlined in the last column and counted at the left: those behind mask (n, h, w) bool, or
    all if nothing is masked.
    """
    n, predicted = len(mask), mask if mask.any() else torch.ones_like(mask)
    rows = math.ceil(n / columns_of_figure)
    figure = Figure(figsize=(11.5, 11.5 / columns_of_figure / (len(columns) + 0.4) * rows + 0.6),
                    layout="constrained")
    for half, part in enumerate(np.atleast_1d(figure.subfigures(1, columns_of_figure, wspace=0.03))):
        axes = blank_axes(part, rows, len(columns))
        for row, axes_of_row in enumerate(axes):
            i = half * rows + row
            if i >= n:
                continue
            for axis, (label, pictures) in zip(axes_of_row, columns.items()):
                show(axis, pictures[i], label if row == 0 else None)
            if right is not None:
                found = (right[i] & predicted[i]).cpu()
                draw_cells(axes_of_row[-1], found, pictures[i].shape[-2:], edgecolor="white", linewidth=1.2)
                count, asked = int(found.sum()), int(predicted[i].sum())
                axes_of_row[0].set_ylabel(f"{count} of {asked}\n{count / asked:.0%}", fontsize=9)
    if right is not None:
        figure.suptitle("outlined: patches whose token the model found; left: how many", fontsize=10)
    return figure


# ---- attention ----

@torch.no_grad()
def every_attention_map(model, images):
    """attention_maps of each layer, in one pass: a list of L tensors (B, heads, T, T)."""
    inputs = [model.add_cls_and_positions(model.embed_patches(images)), *model.hidden_states(images)[:-1]]
    return [block.attn.weights(block.norm1(x), bias)
            for block, x, bias in zip(model.blocks, inputs, model.position_biases())]


def rollout(maps):
    """How much of each input token reaches each output token if every block passes on (I + mean of heads) / 2
    (Abnar and Zuidema, 2020): a list of (B, heads, T, T), first layer first -> (B, 1, T, T)."""
    total = torch.eye(maps[0].shape[-1]).to(maps[0])
    for one in maps:
        total = (torch.eye(one.shape[-1]).to(one) + one.mean(1)) / 2 @ total
    return total[:, None]


def reference_patches(image, grid, count=3):
    """Patches (row, column) likely on objects: unlike the colours along the border, far from each other."""
    h, w = grid
    colours = F.adaptive_avg_pool2d(image[None].float(), grid)[0].permute(1, 2, 0)    # (h, w, 3)
    border = torch.cat([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    nearest = (colours[:, :, None] - border).norm(dim=-1).sort(dim=-1).values
    unlike = nearest[..., :max(1, len(border) // 4)].mean(-1)    # (h, w)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    apart, chosen = torch.full((h, w), 1.0), []
    for _ in range(min(count, h * w)):
        best = divmod(int((unlike * apart + 1e-6 * apart).argmax()), w)
        chosen.append(best)
        distance = torch.hypot((rows - best[0]).float() / h, (columns - best[1]).float() / w)
        apart = torch.minimum(apart, (distance / 0.35).clamp(max=1))
    return chosen


def figure_attention(image, attention, references, grid, title=None):
    """What reference patches attend to (the paper's analysis figure).

    image (3, H, W); attention (heads, T, T), row = query, token 0 = [S]; references: (row, column) on the
    grid (h, w), or "S" for [S]. For each, the image with the patch marked, then attention to the patches:
    mean and largest of the heads, and each head (with one head, that alone). Each map is scaled to its own
    largest value away from the reference patch.
    """
    heads, (H, W) = len(attention), image.shape[-2:]
    titles = ["attention"]
    if heads > 1:
        titles = ["mean of heads", "largest of heads", *(f"head {i + 1}" for i in range(heads))]
    wide = min(1 + len(titles), 8)
    lines = math.ceil((1 + len(titles)) / wide)
    side = 11 / wide
    height = (side * min(1.5, H / W) + 0.22) * lines * len(references)
    figure = Figure(figsize=(11, height + (0.35 if title else 0)), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    axes = blank_axes(figure, lines * len(references), wide)
    for number, reference in enumerate(references):
        panels = axes[number * lines:(number + 1) * lines].flatten()
        show(panels[0], image, "[S]" if reference == SPECIAL else f"patch {reference[0]},{reference[1]}")
        maps = reference_maps(attention, reference, grid)
        if heads > 1:
            maps = torch.cat([maps.mean(0, keepdim=True), maps.amax(0, keepdim=True), maps])
        for axis, name, heat in zip(panels[1:], titles, maps):
            draw_heat(axis, image, heat, skip=reference)
            axis.set_title(name, fontsize=10)
        for axis in panels[:1 + len(titles)]:
            if reference != SPECIAL:
                x, y = (reference[1] + 0.5) * W / grid[1] - 0.5, (reference[0] + 0.5) * H / grid[0] - 0.5
                axis.plot(x, y, "o", color=MARK, markeredgecolor="white", markersize=5, markeredgewidth=0.8)
    return figure


def reference_maps(attention, reference, grid):
    """attention (heads, T, T) of one reference to the patches: (heads, h, w)."""
    query = 0 if reference == SPECIAL else 1 + reference[0] * grid[1] + reference[1]
    return attention[:, query, 1:].unflatten(1, grid)


def draw_heat(axis, image, heat, skip=None):
    """heat (h, w) in colours over a grey image (3, H, W); brightest at the largest value, skip's left out."""
    H, W = image.shape[-2:]
    others = heat.float().clone()
    if skip is not None and skip != SPECIAL:
        others[skip] = 0
    place = dict(extent=(-0.5, W - 0.5, H - 0.5, -0.5))
    axis.imshow(image.float().mean(0).cpu().numpy(), cmap="gray", vmin=0, vmax=1, **place)
    axis.imshow(heat.float().cpu().numpy(), cmap=HEAT, alpha=0.7, vmin=0,
                vmax=max(1e-12, others.max().item()), interpolation="bicubic", **place)


def attention_distances(maps, grid, patch_size):
    """Mean distance in pixels from a patch to those it attends to: L of (B, heads, T, T) -> (L, heads)."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).float() * patch_size    # (N, 2)
    apart = torch.cdist(places, places)    # (N, N)
    patches = [one[:, :, 1:, 1:].float().cpu() for one in maps]
    return torch.stack([((one * apart).sum(-1) / one.sum(-1)).mean((0, 2)) for one in patches])


def figure_attention_distance(distances):
    """distances: label -> (L, heads) pixels, one panel each, a dot for each head."""
    figure = Figure(figsize=(4.2 * len(distances) + 0.8, 3.6), layout="constrained")
    panels = figure.subplots(1, len(distances), squeeze=False, sharey=True)[0]
    for axis, (label, values) in zip(panels, distances.items()):
        layers = np.arange(1, len(values) + 1)
        for head in values.T:
            axis.plot(layers, head, "o", color="tab:blue", markersize=5, alpha=0.7)
        axis.plot(layers, values.mean(1), "-", color="black", linewidth=1, label="mean of the heads")
        axis.set(title=label, xlabel="layer", xticks=layers if len(layers) <= 12 else layers[::3])
    panels[0].set(ylabel="mean attention distance, pixels",
                  ylim=(0, 1.1 * max(values.max().item() for values in distances.values())))
    panels[0].legend(frameon=False)
    return figure


def object_attention(maps, cover, near=None):
    """How much more a patch on an object attends to that object than the object's share of the image would
    make it.

    maps: a list of L (B, heads, T, T). cover (B, h, w): the share of each patch that the image's one object
    covers. Reference patches: those covered by half or more. With heads averaged, ratio = (attention to the
    object / attention to all patches) / (the object's share of the patches' area): 1 = object or not makes no
    difference. near: leave out, from attention and area alike, patches within so many rows and columns of the
    reference, itself among them. Returns (L,), the mean over reference patches of all images.
    """
    B, h, w = cover.shape
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    steps = torch.maximum((rows.flatten()[:, None] - rows.flatten()).abs(),
                          (columns.flatten()[:, None] - columns.flatten()).abs())
    counted = (steps > (-1 if near is None else near)).float()    # (N, N)
    cover = cover.flatten(1).float()    # (B, N)
    area = torch.einsum("bk,qk->bq", cover, counted) / counted.sum(1)    # (B, N), by reference
    asked = (cover >= 0.5) & (area > 0)
    ratios = []
    for one in maps:
        attention = one[:, :, 1:, 1:].float().cpu().mean(1) * counted    # (B, N, N)
        share = torch.einsum("bqk,bk->bq", attention, cover) / attention.sum(-1).clamp(min=1e-12)
        ratios.append((share / area.clamp(min=1e-12))[asked].mean())
    return torch.stack(ratios)


def figure_object_attention(ratios):
    """ratios: title of a panel -> {label of a model: (L,)}."""
    figure = Figure(figsize=(4.6 * len(ratios) + 0.4, 3.9), layout="constrained")
    panels = figure.subplots(1, len(ratios), squeeze=False, sharey=True)[0]
    for axis, (title, lines) in zip(panels, ratios.items()):
        for (label, values), style in zip(lines.items(), ("o-", "s--", "^:", "D-.", "v-", "x--")):
            axis.plot(range(1, len(values) + 1), values, style, label=label, markersize=5)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=title, xlabel="layer", xticks=range(1, len(values) + 1))
    panels[0].set_ylabel("attention on the object / its area's share")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


# ---- positions and curves ----

def figure_positions(model):
    """Absolute positions: the cosine similarity of patches' embeddings to all others, by patch.

    Relative ones: each head's bias by offset, key minus query, zero in the centre; a row for each table.
    """
    (h, w), config = model.config.grid, model.config
    if config.position == "absolute":
        table = F.normalize(model.pos_embed[0, 1:].detach().float(), dim=-1)
        similarity = (table @ table.t()).view(h, w, h, w).cpu()
        rows, columns = (np.unique(np.linspace(0, side - 1, min(side, 7)).round().astype(int))
                         for side in (h, w))
        pictures = [[similarity[row, column] for column in columns] for row in rows]
        labels, titles = [f"row {row}" for row in rows], [f"column {column}" for column in columns]
        limits, headline = (-1, 1), "cosine similarity of position embeddings, by patch"
    else:
        tables = [(name, value.detach().float().cpu()) for name, value in model.named_parameters()
                  if name.endswith("relative_position_bias_table")]
        pictures = [[table[:-3, head].view(2 * h - 1, 2 * w - 1).flip(0, 1) for head in range(config.heads)]
                    for _, table in tables]
        labels = [f"layer {i + 1}" for i in range(len(tables))]
        if config.position == "shared_relative":
            labels = ["all layers"]
        titles = [f"head {i + 1}" for i in range(config.heads)]
        largest = max(picture.abs().max().item() for row in pictures for picture in row) or 1.0
        limits, headline = (-largest, largest), "relative position bias, by offset of the key from the query"
    side = min(1.8, 10 / len(titles))
    figure = Figure(figsize=(max(4.5, side * len(titles) + 1.4), side * len(labels) + 0.9),
                    layout="constrained")
    axes = blank_axes(figure, len(labels), len(titles))
    for row, label, axes_of_row in zip(pictures, labels, axes):
        axes_of_row[0].set_ylabel(label, fontsize=9)
        for axis, picture in zip(axes_of_row, row):
            drawn = axis.imshow(picture.numpy(), cmap="PuOr", vmin=limits[0], vmax=limits[1],
                                interpolation="nearest")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    figure.suptitle(headline, fontsize=10)
    return figure


def read_runs(folders):
    """label -> metrics.jsonl's lines, one a step, of each run's folder (or metrics.jsonl); the labels are the
    fields in which their config.json differ. A last line that a run has not finished writing is left out.
    ValueError names a file that is not there, not a log or not a config."""
    logs, configs = [], []
    for folder in map(Path, folders):
        file = folder if folder.suffix == ".jsonl" else folder / "metrics.jsonl"
        if not file.is_file():
            raise ValueError(f"{file} is not there; a folder that a training script left would do")
        steps, text = {}, file.read_text(errors="replace")
        for line in text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]:
            try:
                entry = json.loads(line)
                steps[entry["step"]] = entry    # of a step logged twice, the later
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{file} is not a log of a training script: {line[:60]!r}") from None
        if not steps:
            raise ValueError(f"{file} is empty")
        logs.append([steps[step] for step in sorted(steps)])
        beside = file.with_name("config.json")
        try:
            configs.append({**(json.loads(beside.read_text()) if beside.is_file() else {}),
                            "out": str(file.parent)})
        except (ValueError, TypeError):
            raise ValueError(f"{beside} is not the config of a run") from None
    differing = [key for key in {key: None for config in configs for key in config}
                 if key not in ("out", "data_root", "workers", "fresh")
                 and len({json.dumps(config.get(key)) for config in configs}) > 1]
    labels = [", ".join(f"{key} {config.get(key)}" for key in differing[:4]) or config["out"]
              for config in configs]
    if len(set(labels)) < len(labels):
        labels = [config["out"] for config in configs]
    return dict(zip(labels, logs))


PANELS = (("loss, nats", "loss", ("val_loss",),
           (("unigram_entropy", "unigram entropy"), ("chance_loss", "chance, ln V"),
            ("mean_loss", "mean colour"))),
          ("accuracy", "accuracy", ("val_accuracy", "val_top1", "val_mean_iou"),
           (("majority_accuracy", "majority token"),)),
          ("learning rate", "lr", (), ()),
          ("images a second", "images_per_second", (), ()))


def figure_curves(runs):
    """runs: label -> list of dicts, as read_runs gives them. Loss, accuracy, learning rate and throughput by
    step: training in thin lines, smoothed in thick ones, held-out images as points; the baselines that need
    no look at an image, dashed."""
    figure = Figure(figsize=(11, 6.4 + 0.2 * len(runs)), layout="constrained")
    axes, colours = figure.subplots(2, 2).flatten(), [f"C{i}" for i in range(10)]
    for axis, (title, name, held_out, baselines) in zip(axes, PANELS):
        labelled, drawn = set(), False
        for (label, log), colour in zip(runs.items(), colours * len(runs)):
            at = [(line["step"], line[name]) for line in log if isinstance(line.get(name), (int, float))
                  and math.isfinite(line[name])]
            if at:
                steps, values = np.array(at).T
                drawn = True
                axis.plot(steps, values, color=colour, linewidth=0.5, alpha=0.35)
                axis.plot(steps, values if name == "lr" else smooth(values, len(values) // 40), color=colour,
                          linewidth=1.5)
            for other in held_out:
                points = [(line["step"], line[other]) for line in log
                          if isinstance(line.get(other), (int, float))]
                if points:
                    drawn = True
                    axis.plot(*zip(*points), "o", color=colour, markeredgecolor="black", markersize=5)
            for (other, words), style in zip(baselines, ("--", ":", "-.")):
                level = next((line[other] for line in reversed(log) if other in line), None)
                if level is not None:
                    axis.axhline(level, color=colour if len(runs) > 1 else "black", linestyle=style,
                                 linewidth=1, label=None if words in labelled else words)
                    labelled.add(words)
        axis.set(title=title, xlabel="step")
        if labelled:
            axis.legend(frameon=False, fontsize=8)
        if not drawn:
            axis.text(0.5, 0.5, "not logged", ha="center", transform=axis.transAxes)
    handles = [axes[0].plot([], [], color=colour, linewidth=2, label=label)[0]
               for label, colour in zip(runs, colours * len(runs))]
    figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=9)
    figure.suptitle("lines: training; points: held-out images", fontsize=10)
    return figure


def smooth(values, width):
    """The mean of the values within width // 2 of each."""
    sums, at = np.cumsum(np.concatenate([[0.0], values])), np.arange(len(values))
    first, last = np.maximum(0, at - width // 2), np.minimum(len(values), at + width // 2 + 1)
    return (sums[last] - sums[first]) / (last - first)


# ---- pipeline: the method in one figure ----

def figure_pipeline(crop, mask, tokens, predicted, decoded, decoded_prediction):
    """One image through sec. 2: above, the patches' view; below, the tokenizer's.

    crop (3, H, W); mask (h, w) bool; tokens and predicted (h, w) int64; decoded: the decoder's picture of the
    tokens, and decoded_prediction: of the predicted tokens where masked and the true ones elsewhere, both (3,
    ., .).
    """
    grid, (H, W) = mask.shape, crop.shape[-2:]
    mask = torch.as_tensor(mask)
    found = int(((predicted == tokens) & mask).sum())
    white = torch.ones(3, *grid)
    figure = Figure(figsize=(12, 4.9), layout="constrained")
    axes = blank_axes(figure, 2, 9, width_ratios=(1, 0.28) * 4 + (1,))

    def arrow(row, column, words):
        axis = axes[row][column]
        axis.annotate("", xy=(1.1, 0.5), xytext=(-0.1, 0.5), xycoords="axes fraction",
                      arrowprops=dict(arrowstyle="-|>", lw=1.3))
        axis.text(0.5, 0.56, words, ha="center", va="bottom", fontsize=8, transform=axis.transAxes)

    show(axes[0][0], crop, "one crop of the image")
    show(axes[0][2], crop, f"{grid[0]}×{grid[1]} patches")
    for row in range(1, grid[0]):
        axes[0][2].axhline(row * H / grid[0] - 0.5, color="white", linewidth=2)
    for column in range(1, grid[1]):
        axes[0][2].axvline(column * W / grid[1] - 0.5, color="white", linewidth=2)
    show(axes[0][4], hide(crop, mask), f"{int(mask.sum())} of them masked")
    show(axes[0][6], torch.where(mask, token_colours(predicted), white), "predicted tokens")
    for colour, width in (("black", 3), ("white", 1.2)):    # to be seen on any colour
        draw_cells(axes[0][6], (predicted == tokens) & mask, grid, edgecolor=colour, linewidth=width)
    for axis in (axes[0][6], axes[1][4]):
        draw_cells(axis, np.ones((1, 1)), grid, edgecolor="grey", linewidth=1)
    show(axes[0][8], decoded_prediction, "decoded, with the\ntrue tokens around")
    axes[0][0].set_ylabel("patches (Vision Transformer)", fontsize=9)

    small = F.interpolate(crop[None].float(), size=decoded.shape[-2:], mode="bilinear", antialias=True)[0]
    show(axes[1][0], small, f"the same crop,\n{small.shape[1]}×{small.shape[2]} pixels")
    show(axes[1][2], token_colours(tokens), "visual tokens")
    show(axes[1][4], torch.where(mask, token_colours(tokens), white), "those to predict")
    axes[1][6].text(0.5, 0.5, f"cross-entropy\nat masked places\n\n{found} of {int(mask.sum())} "
                    f"right\n(outlined above)", ha="center", va="center", fontsize=10,
                    transform=axes[1][6].transAxes)
    show(axes[1][8], decoded, "all true tokens, decoded:\nthe best possible")
    axes[1][0].set_ylabel("visual tokens (discrete VAE)", fontsize=9)
    for row, column, words in ((0, 1, "cut"), (0, 3, "mask"), (0, 5, "ViT,\nsoftmax"),
                               (0, 7, "dVAE\ndecoder"), (1, 1, "dVAE\nencoder"), (1, 3, "mask"), (1, 5, "")):
        arrow(row, column, words)
    axes[1][6].annotate("", xy=(0.5, 0.78), xytext=(0.5, 1.22), xycoords="axes fraction",
                        arrowprops=dict(arrowstyle="-|>", lw=1.3))
    return figure


# ---- Loading ----

def open_model(args, wanted=None, flag="--init"):
    """The model of args.init; wanted: a class it must be. UserError names the flag."""
    default = f"runs/pretrain-{Path(args.data).resolve().name}/model.pt"
    path = args.init or default
    if not args.init and not Path(path).is_file():
        flags = "" if args.data == "shapes" else f" --data {args.data} --preset demo"
        raise UserError(f"--init: {default} is not there; `python pretrain.py{flags}` makes it, or "
                        "--init FILE names another")
    try:
        model, _ = weights.build(path)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None
    if wanted and not isinstance(model, wanted):
        raise UserError(f"--init: {path} holds a {type(model).__name__}, not a {wanted.__name__}; a model.pt "
                        f"of pretrain.py would do")
    return model


def tokenizer_path(args):
    """The file of --tokenizer, by default that of --init's run."""
    if args.tokenizer:
        return args.tokenizer
    folder = Path(args.init or f"runs/pretrain-{Path(args.data).resolve().name}/model.pt").parent
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    path = config.get("tokenizer") or folder / "tokenizer" / "model.pt"
    if not Path(path).is_file():
        raise UserError(f"--tokenizer: {path} is not there; `python pretrain.py` leaves one, or --tokenizer "
                        f"FILE names a model.pt of dvae.py or DALL-E's encoder.pkl")
    return path


def open_tokenizer(args):
    """The tokenizer of tokenizer_path, with its decoder."""
    path = tokenizer_path(args)
    tokenizer = weights.load_tokenizer(path)
    if tokenizer.decoder is None:
        raise UserError(f"--tokenizer: {path} has no decoder beside it (decoder.pkl), which pictures need")
    return tokenizer


def open_pictures(args, count):
    """PIL images: the files of --images, or the first held-out images of --data."""
    if args.images:
        pictures = []
        for path in args.images:
            try:
                pictures.append(data.open_image(path))
            except data.BadFile as error:
                raise UserError(f"--images: {error}") from None
        return pictures
    _, held_out = data.open_splits(args.data, args.data_root)
    pictures = []
    for i in range(args.first, args.first + count):
        try:
            pictures.append(held_out[i % len(held_out)][0])
        except data.BadFile as error:
            raise UserError(f"--data: {error}; --first starts after it") from None
    return pictures


def squares(pictures, side):
    """The largest centred square of each, resized: (n, 3, side, side) in [0, 1]."""
    resized = [picture.resize((side, side), Image.BICUBIC, box=data.centre_box(*picture.size))
               for picture in pictures]
    return torch.stack([data.to_float(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
                        for picture in resized])


def whole(picture, side, multiple):
    """All of a picture, (1, 3, H, W): the shorter side is made `side` pixels, both multiples of `multiple`,
    the longer one at most three times as long (what is beyond that is cut off on both ends)."""
    width, height = picture.size
    scale = side / min(width, height)
    W, H = (max(multiple, round(min(length * scale, 3 * side) / multiple) * multiple)
            for length in (width, height))
    w, h = min(width, W / scale), min(height, H / scale)
    box = ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)
    resized = np.array(picture.resize((W, H), Image.BICUBIC, box=box))
    return data.to_float(torch.from_numpy(resized).permute(2, 0, 1))[None]


def at_size(model, image_hw):
    """The backbone of a model for images of (H, W) pixels, its positions resized."""
    if image_hw == model.config.image_hw:
        return model
    other = vit.VisionTransformer(dataclasses.replace(model.config, image_size=image_hw))
    state = vit.resize_positions(model.state_dict(), other.config, model.config.grid)
    other.load_state_dict({name: tensor for name, tensor in state.items() if name in other.state_dict()},
                          strict=False)
    return other.eval()


def masks_for(args, grid, count):
    """count blockwise masks of --ratio: (count, h, w) bool."""
    num_masked = number_to_mask(args, grid)
    return np.stack([blockwise_mask(grid, num_masked, np.random.default_rng([args.seed, i]))
                     for i in range(count)])


def number_to_mask(args, grid):
    """How many patches --ratio is on a grid. UserError where that is none or all."""
    if not (0 < args.ratio < 1 and int(args.ratio * math.prod(grid)) >= 1):
        raise UserError(f"--ratio: between 0 and 1 so that some of the {math.prod(grid)} patches are masked "
                        f"and some are not, not {args.ratio:g}")
    return int(args.ratio * math.prod(grid))


# ---- Command line: one function for each WHAT, args -> Figure ----

def masks(args):
    """blockwise beside random masks, and the statistics of 10,000 draws"""
    grid, count = (args.grid[0], args.grid[-1]), args.count or 8
    num_masked = number_to_mask(args, grid)
    pictures = open_pictures(args, count)
    images = squares(pictures, max(args.size or 112, *grid))
    rng = np.random.default_rng(args.seed)
    kinds = [np.stack([draw(grid, num_masked, rng) for _ in pictures])
             for draw in (blockwise_mask, random_mask)]
    return figure_masks(images, *kinds, mask_statistics(grid, num_masked, rng))


@torch.no_grad()
def tokens(args):
    """images, their token grids, both reconstructions, and the most used codes"""
    tokenizer, count = open_tokenizer(args), args.count or 8
    pictures = open_pictures(args, max(count, 64))
    side = args.size or default_token_side(args, tokenizer)
    if side % tokenizer.downsample:
        raise UserError(f"--size: a multiple of {tokenizer.downsample} for this tokenizer, not {side}")
    images = squares(pictures, side)
    found = torch.cat([tokenizer.tokenize(some) for some in images.split(32)])
    first = images[:count]
    soft = tokenizer.eval()(first, 1 / 16).images
    return figure_tokens(first, found[:count], soft, tokenizer.decode(found[:count]),
                         code_pages(images, found, args.codes))


def default_token_side(args, tokenizer):
    """Pixels a side of the tokenizer's view in the run that it belongs to, or DALL-E's 112 of sec. 2.1."""
    file = Path(tokenizer_path(args)).parent / "config.json"
    return json.loads(file.read_text())["image_size"] if file.is_file() else 14 * tokenizer.downsample


@torch.no_grad()
def predict(args):
    """masked images, the tokenizer's best, and the model's prediction"""
    model = open_model(args, vit.MaskedImageModel)
    tokenizer = open_tokenizer(args)
    if tokenizer.vocab_size != model.lm_head.out_features:
        raise UserError(f"--tokenizer: it has {tokenizer.vocab_size} codes, the model predicts "
                        f"{model.lm_head.out_features}")
    pictures = open_pictures(args, args.count or 12)
    images, token_images, mask = masked_views(model, tokenizer, pictures, args)
    columns, right = predictions(model, images, mask, tokenizer, token_images)
    return figure_predictions(columns, mask, right, 1 if len(pictures) < 3 else 2)


def masked_views(model, tokenizer, pictures, args):
    """images (n, 3, H, W), the tokenizer's view of them, and blockwise masks (n, h, w) of --ratio."""
    side, grid = model.config.image_hw[0], model.config.grid
    if grid[0] != grid[1]:
        raise UserError(f"--init: a model for squares, not for {grid[0]}x{grid[1]} patches")
    mask = torch.from_numpy(masks_for(args, grid, len(pictures)))
    return squares(pictures, side), squares(pictures, grid[0] * tokenizer.downsample), mask


@torch.no_grad()
def attention(args):
    """self-attention of reference patches over the image (the paper's analysis figure)"""
    model, picture = open_model(args), open_pictures(args, 1)[0]
    P = model.config.patch_size
    side = args.size or model.config.image_hw[0]
    if side % P:
        raise UserError(f"--size: a multiple of the patch size {P}, not {side}")
    image = whole(picture, side, P)
    model = at_size(model, tuple(image.shape[-2:]))
    grid, depth = model.config.grid, model.config.depth
    references = [reference_of(text, grid) for text in args.patch or ()] or reference_patches(image[0], grid)
    if not -depth <= (args.layer - 1 if args.layer > 0 else args.layer) < depth or args.layer == 0:
        raise UserError(f"--layer: 1 to {depth}, or -1 for the last, not {args.layer}")
    maps = every_attention_map(model, image)
    if args.rollout:
        return figure_attention(image[0], rollout(maps)[0], references, grid,
                                "attention rollout over all layers")
    layer = range(depth)[args.layer - 1 if args.layer > 0 else args.layer]
    return figure_attention(image[0], maps[layer][0], references, grid,
                            f"self-attention of layer {layer + 1} of {depth}")


def reference_of(text, grid):
    """--patch: "S", or "ROW,COL" on the grid."""
    if text.upper() == SPECIAL:
        return SPECIAL
    try:
        row, column = map(int, text.split(","))
        if 0 <= row < grid[0] and 0 <= column < grid[1]:
            return row, column
    except ValueError:
        pass
    raise UserError(f"--patch: S, or ROW,COL from 0,0 to {grid[0] - 1},{grid[1] - 1} here, not {text}")


@torch.no_grad()
def attention_distance(args):
    """how far heads look, by layer: the model beside a random one"""
    model = open_model(args)
    images = squares(open_pictures(args, args.count or 16), model.config.image_hw[0])
    torch.manual_seed(args.seed)
    random = vit.VisionTransformer(model.config).eval()
    distances = {}
    grid, patch_size = model.config.grid, model.config.patch_size
    name = "pre-trained" if isinstance(model, vit.MaskedImageModel) else "trained"
    for label, one in ((name, model), ("random weights", random)):
        parts = [attention_distances(every_attention_map(one, some), grid, patch_size)
                 for some in images.split(8)]
        distances[label] = torch.stack(parts).mean(0)
    return figure_attention_distance(distances)


@torch.no_grad()
def attention_objects(args):
    """attention on an object over its share of the image: --init, --compare FILE ..., random weights"""
    model = open_model(args)
    torch.manual_seed(args.seed)
    models = {"pre-trained" if isinstance(model, vit.MaskedImageModel) else "trained": model}
    for path in args.compare:
        other = open_model(argparse.Namespace(init=path, data=args.data), flag="--compare")
        models[str(Path(path).parent.name or path)] = other
    models["random weights"] = vit.VisionTransformer(model.config).eval()
    scenes = [data.render_scene("val", index) for index in range(args.count or 500)]
    ratios = {"all patches": {}, "without neighbours": {}}
    for label, one in models.items():
        images, cover = object_scenes(scenes, one.config)
        parts = [every_attention_map(one, some) for some in images.split(50)]
        maps = [torch.cat(layer) for layer in zip(*parts)]
        for title, near in zip(ratios, (None, 1)):
            ratios[title][label] = object_attention(maps, cover, near)
    for title, lines in ratios.items():
        training.say(f"attention on the object / its share of the area, {title}, {len(scenes)} images")
        for label, values in lines.items():
            training.say(f"  {label:24}" + "".join(f"{value:8.2f}" for value in values.tolist()))
    return figure_object_attention(ratios)


def object_scenes(scenes, config):
    """Scenes of data.render_scene as images (n, 3, S, S), and how much of each patch the object covers."""
    side = config.image_hw[0]
    images = squares([Image.fromarray(image) for image, _, _ in scenes], side)
    on_object = torch.stack([torch.from_numpy(classes == 1 + label) for _, label, classes in scenes]).float()
    return images, F.adaptive_avg_pool2d(on_object, config.grid)


def positions(args):
    """position embeddings, or the tables of relative position bias"""
    return figure_positions(open_model(args))


def curves(args):
    """loss, accuracy, learning rate and throughput of one or several runs"""
    try:
        return figure_curves(read_runs(args.runs or [f"runs/pretrain-{Path(args.data).resolve().name}"]))
    except ValueError as error:
        raise UserError(f"--runs: {error}") from None


@torch.no_grad()
def pipeline(args):
    """one image through the whole method"""
    model = open_model(args, vit.MaskedImageModel)
    tokenizer = open_tokenizer(args)
    if tokenizer.vocab_size != model.lm_head.out_features:
        raise UserError(f"--tokenizer: it has {tokenizer.vocab_size} codes, the model predicts "
                        f"{model.lm_head.out_features}")
    pictures = open_pictures(args, 1)[:1]
    images, token_images, mask = masked_views(model, tokenizer, pictures, args)
    columns, _ = predictions(model, images, mask, tokenizer, token_images)
    predicted = model(images, mask, torch.arange(mask.numel())).argmax(-1).view(mask.shape)
    true = tokenizer.tokenize(token_images)
    return figure_pipeline(images[0], mask[0], true[0], predicted[0], columns["tokenizer at best"][0],
                           columns["prediction"][0])


FIGURES = {function.__name__.replace("_", "-"): function for function in (
    masks, tokens, predict, attention, attention_distance, attention_objects, positions, curves, pipeline)}
FLAGS = {
    "init": (dict(metavar="FILE"), "weights: a model.pt, or a released checkpoint; default: what "
             "`pretrain.py` left for --data"),
    "tokenizer": (dict(metavar="FILE"), "a model.pt of dvae.py or DALL-E's encoder.pkl; default: that of "
                  "--init's run"),
    "images": (dict(nargs="+", metavar="FILE"), "image files; default: held-out images of --data"),
    "data": (dict(default="shapes"), "shapes, fashion-mnist, cifar10, cifar100, or a folder of images "
             "(shapes)"),
    "data-root": (dict(default="data", metavar="FOLDER"), "folder that holds the files of fashion-mnist, "
                  "cifar10 and cifar100 (data)"),
    "first": (dict(type=int, default=0, metavar="N"), "number of the first held-out image of --data to "
              "take (0)"),
    "count": (dict(type=int, metavar="N"), "how many images"),
    "size": (dict(type=int, metavar="PIXELS"), "the shorter side of images; default: what the model was "
             "made for"),
    "seed": (dict(type=int, default=0), "of masks and random weights (0)"),
    "ratio": (dict(type=float, default=0.4), "share of the patches to mask (0.4)"),
    "grid": (dict(type=int, nargs=2, default=(14, 14), metavar=("ROWS", "COLUMNS")), "patch grid (14 14)"),
    "codes": (dict(type=int, default=16, metavar="K"), "how many of the most used codes (16)"),
    "patch": (dict(action="append", metavar="ROW,COL"), "reference patch, repeatable; S for the special "
              "token; default: three likely on objects"),
    "layer": (dict(type=int, default=-1), "1 for the first, -1 for the last (-1)"),
    "rollout": (dict(action="store_true"), "all layers together: attention rollout"),
    "compare": (dict(nargs="+", default=[], metavar="FILE"), "more models beside --init"),
    "runs": (dict(nargs="+", metavar="FOLDER"), "folders of runs; default: that of `pretrain.py` for --data"),
    "dpi": (dict(type=int, default=100), "dots an inch; figures are about 11 inches wide (100)"),
    "out": (dict(metavar="FILE"), "the picture (runs/WHAT.png)"),
}
SOURCE = ("images", "data", "data-root", "first", "count")
TAKES = {
    "masks": (*SOURCE, "size", "seed", "ratio", "grid"),
    "tokens": ("init", "tokenizer", *SOURCE, "size", "codes"),
    "predict": ("init", "tokenizer", *SOURCE, "seed", "ratio"),
    "pipeline": ("init", "tokenizer", "images", "data", "data-root", "first", "seed", "ratio"),
    "attention": ("init", "images", "data", "data-root", "first", "size", "patch", "layer", "rollout"),
    "attention-distance": ("init", *SOURCE, "seed"),
    "attention-objects": ("init", "compare", "count", "seed"),
    "positions": ("init", "data"),
    "curves": ("runs", "data"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for what, function in FIGURES.items():
        command = commands.add_parser(what, help=function.__doc__, description=function.__doc__,
                                      allow_abbrev=False)
        for flag in (*TAKES[what], "dpi", "out"):
            how, text = FLAGS[flag]
            command.add_argument(f"--{flag}", **how, help=text)
    with training.one_line_errors():
        args = parser.parse_args()
        for name in ("count", "codes", "size", "grid"):
            numbers = getattr(args, name, None)
            if numbers is not None and min(numbers if name == "grid" else [numbers]) < 1:
                raise UserError(f"--{name}: at least 1, not {numbers}")
        for name, least, most in (("first", 0, 2 ** 63 - 1), ("seed", 0, 2 ** 32 - 1), ("dpi", 1, 1200)):
            if not least <= getattr(args, name, least) <= most:
                raise UserError(f"--{name}: from {least} to {most}, not {getattr(args, name)}")
        args.data = getattr(args, "data", "shapes")
        out = Path(args.out or f"runs/{args.what}.png")
        if out.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
            raise UserError(f"--out: a file that ends in .png, .pdf, .svg or .jpg, not {out}")
        if out.is_dir():
            raise UserError(f"--out: {out} is a folder; name a file")
        there = next(folder for folder in out.absolute().parents if folder.exists())
        if not there.is_dir():
            raise UserError(f"--out: {there} is not a folder")
        figure = FIGURES[args.what](args)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: cannot make {out.parent} ({error.strerror})") from None
        figure.savefig(out, dpi=args.dpi)
        training.say(f"written to {out}")


if __name__ == "__main__":
    main()
