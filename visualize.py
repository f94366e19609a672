"""Figures: masks, visual tokens, predictions, self-attention, positions, curves, results, the whole method.

`python visualize.py WHAT` writes one picture. Each figure_... is a function of tensors that returns a
matplotlib Figure; the command line below loads and saves. B images of H W pixels in [0, 1], h w patches,
N = h w, T = 1 + N tokens, L blocks.
"""
import argparse
import dataclasses
import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

import data
import training
import vit
import weights
from masking import blockwise_mask, random_mask
from training import UserError

CLS = "S"    # --patch S: the special token [S]
matplotlib.rcParams["text.parse_math"] = False    # a $ in the name of a class is a $


# ---- Shared by the figures ----

def grid_of_axes(rows, columns, labels=(), titles=(), width=11, aspect=1.0, **how):
    """(figure, axes (rows, columns)) for pictures of this aspect, height / width. No ticks, no frames."""
    size = width, width / columns * aspect * rows + 0.6
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **how)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    for axis, label in zip(axes[:, 0], labels):
        axis.set_ylabel(label, fontsize=9)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    return figure, axes


def show(axis, image, title=None):
    """An image (3, H, W) in [0, 1]."""
    axis.imshow(image.permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
    if title:
        axis.set_title(title, fontsize=9)


def legend_label(name):
    """The name of a folder or class for a legend, which would leave out what begins with an underscore."""
    name = data.printable(name)
    return f" {name}" if name.startswith("_") else name


def outline(axis, cells, image_hw, **how):
    """Outline the patches where cells (h, w) is True, over an image of H x W pixels."""
    (H, W), (h, w) = image_hw, cells.shape
    for row, column in np.argwhere(np.asarray(cells)):
        axis.add_patch(Rectangle((column * W / w - 0.5, row * H / h - 0.5), W / w, H / h, fill=False, **how))


def hide(images, mask, shade=0.5):
    """Images (..., 3, H, W) with the masked patches, mask (..., h, w), in grey."""
    (H, W), (h, w) = images.shape[-2:], mask.shape[-2:]
    rows, columns = torch.arange(H)[:, None] * h // H, torch.arange(W) * w // W
    return torch.where(torch.as_tensor(mask)[..., None, rows, columns], shade, images)


def token_colours(tokens):
    """A colour for each token, the same for the same token: (h, w) int64 -> (3, h, w)."""
    tokens = np.asarray(tokens)
    hue, value = tokens * 0.61803 % 1, 0.35 + 0.6 * (tokens * 0.7549 % 1)
    return torch.from_numpy(hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.65), value], -1))).permute(2, 0, 1)


# ---- Masks (Algorithm 1) and visual tokens (sec. 2.1) ----

def figure_masks(images, masks, coverage):
    """Images (n, 3, H, W) under masks, label -> (n, h, w) bool, a row for each label.

    coverage: label -> (h, w), the share of draws in which each patch is masked.
    """
    n, labels = len(images), [f"{label}\n{np.count_nonzero(some[0])} of {some[0].size}"
                              for label, some in masks.items()]
    titles = [""] * n + ["how often a patch\nis masked"]
    figure, axes = grid_of_axes(len(masks), n + 1, labels, titles, width=12, aspect=1.3)
    for (label, some), row in zip(masks.items(), axes):
        for axis, image, mask in zip(row, images, some):
            show(axis, hide(image, mask))
        share = coverage[label]
        heat = row[-1].imshow(share, vmin=0, vmax=1)
        h, w = share.shape
        row[-1].set_xlabel(f"corner {share[0, 0]:.2f}\nedge {share[0, w // 2]:.2f}\n"
                           f"centre {share[h // 2, w // 2]:.2f}", fontsize=8)
    figure.colorbar(heat, ax=axes[:, -1], shrink=0.7)
    return figure


def figure_tokens(images, tokens, soft, hard, examples=3):
    """n images (m, 3, H, W), m >= n, their tokens (m, h, w) as colours, and reconstructions (n, 3, H, W) from
    soft and hard codes; below, for the n most used codes, patches of the m images that map to them."""
    n, P = len(soft), images.shape[-1] // tokens.shape[-1]
    error = [(some - images[:n]).square().mean() for some in (soft, hard)]
    rows = {"image": images, "tokens": [token_colours(grid) for grid in tokens[:n]],
            f"soft codes\nerror {error[0]:.4f}": soft, f"hard codes\nerror {error[1]:.4f}": hard}
    figure, axes = grid_of_axes(4 + examples, n, [*rows, "patches of\nmost used\ncodes"])
    for row, pictures in zip(axes, rows.values()):
        for axis, picture in zip(row, pictures):
            show(axis, picture)
    patches = images.unfold(2, P, P).unfold(3, P, P)                   # (m, 3, h, w, P, P)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)          # (m h w, 3, P, P)
    codes, uses = tokens.unique(return_counts=True)
    for i, column in zip(uses.argsort(descending=True), axes[4:].T):
        column[0].set_title(f"{codes[i]}: {uses[i] / tokens.numel():.1%}", fontsize=8)
        for axis, patch in zip(column, patches[tokens.flatten() == codes[i]]):
            show(axis, patch)
    return figure


# ---- Predictions of a masked image model (sec. 2.3) ----

@torch.no_grad()
def predictions(model, images, mask, tokenizer=None, token_images=None):
    """What a masked image model predicts behind the mask (B, h, w), or everywhere if nothing is masked.

    images (B, 3, H, W); token_images: the tokenizer's view of them; without a tokenizer: pixels. Returns
    title -> pictures (B, 3, ., .) and the patches whose token is right, (B, h, w) bool, or None for pixels.
    The last picture shows the prediction, with the truth around; if the tokenizer has no decoder, the patches
    with the right token.
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
    right = guess == true
    if tokenizer.decoder is None:
        return {**columns, "right tokens": hide(images, ~right)}, right
    columns |= {"tokenizer at best": tokenizer.decode(true), "prediction": tokenizer.decode(guess)}
    return columns, right


def figure_predictions(columns, mask, right=None):
    """columns: title -> (n, 3, ., .), as predictions gives them; right (n, h, w) bool: tokens that are right.

    Right tokens behind mask (n, h, w) bool (all if nothing is masked) are outlined and counted.
    """
    n, predicted = len(mask), mask if mask.any() else torch.ones_like(mask)
    rows = math.ceil(n / 2)
    figure, axes = grid_of_axes(rows, 2 * len(columns), titles=[*columns] * 2, aspect=1.15)
    for i, images in enumerate(zip(*columns.values())):
        of_image = np.split(axes[i % rows], 2)[i // rows]
        for axis, image in zip(of_image, images):
            show(axis, image)
        if right is not None:
            found = (right[i] & predicted[i]).cpu()
            outline(of_image[-1], found, images[-1].shape[-2:], edgecolor="white", linewidth=1.2)
            count, asked = int(found.sum()), int(predicted[i].sum())
            of_image[-1].set_xlabel(f"{count} of {asked}: {count / asked:.0%}", fontsize=8)
    if right is not None:
        figure.suptitle("outlined and counted: patches whose token the model found", fontsize=10)
    return figure


# ---- Self-attention (figure 2) ----

@torch.no_grad()
def every_attention_map(model, images):
    """attention_maps of each layer, in one pass: a list of L tensors (B, heads, T, T)."""
    inputs = [model.add_cls_and_positions(model.embed_patches(images)), *model.hidden_states(images)[:-1]]
    return [block.attn.attention_weights(block.norm1(x), bias)
            for block, x, bias in zip(model.blocks, inputs, model.position_biases())]


def figure_attention(image, attention, references, grid, title=None):
    """What reference patches attend to (figure 2): the mean of the heads and each head, a row for each patch.

    image (3, H, W); attention (heads, T, T), row = query, token 0 = [S]; references: (row, column) on the
    grid (h, w), or "S" for [S]. Each map is scaled to its largest value away from the reference patch.
    """
    (H, W), heads = image.shape[-2:], [f"head {i + 1}" for i in range(len(attention))]
    labels = ["[S]" if reference == CLS else "patch {},{}".format(*reference) for reference in references]
    figure, axes = grid_of_axes(len(references), 2 + len(heads), labels, ["", "mean of heads", *heads],
                                max(9, 2 + len(heads)), H / W)
    figure.suptitle(title, fontsize=10)
    for reference, row in zip(references, axes):
        maps = reference_maps(attention, reference, grid)
        show(row[0], image)
        for axis, heat in zip(row[1:], torch.cat([maps.mean(0, keepdim=True), maps])):
            overlay(axis, image, heat, reference)
        if reference != CLS:
            x, y = (reference[1] + 0.5) * W / grid[1] - 0.5, (reference[0] + 0.5) * H / grid[0] - 0.5
            for axis in row:
                axis.plot(x, y, "o", color="deepskyblue", markeredgecolor="white", markersize=5)
    return figure


def reference_maps(attention, reference, grid):
    """attention (heads, T, T) of one reference to the patches: (heads, h, w)."""
    query = 0 if reference == CLS else 1 + reference[0] * grid[1] + reference[1]
    return attention[:, query, 1:].unflatten(1, grid)


def overlay(axis, image, heat, reference):
    """heat (h, w) in colours over a grey image (3, H, W); brightest: the largest off the reference patch."""
    H, W = image.shape[-2:]
    others = heat.float().clone()
    if reference != CLS:
        others[reference] = 0
    place = dict(extent=(-0.5, W - 0.5, H - 0.5, -0.5))
    axis.imshow(image.float().mean(0).cpu().numpy(), cmap="gray", vmin=0, vmax=1, **place)
    axis.imshow(heat.float().cpu().numpy(), cmap="inferno", alpha=0.7, vmin=0,
                vmax=max(1e-12, others.max().item()), interpolation="bicubic", **place)


def attention_distances(maps, grid, patch_size):
    """Mean distance in pixels from a patch to those it attends to: L of (B, heads, T, T) -> (L, heads)."""
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])) * float(patch_size)
    apart = torch.cdist(places, places)                                # (N, 2) -> (N, N)
    patches = [one[:, :, 1:, 1:].float().cpu() for one in maps]
    return torch.stack([((one * apart).sum(-1) / one.sum(-1)).mean((0, 2)) for one in patches])


def object_attention(maps, cover, near=None):
    """Attention of patches on an object to that object, over the object's share of the image: (L,).

    maps: a list of L (B, heads, T, T), averaged over heads. cover (B, h, w): the share of each patch that the
    image's object covers; patches covered by half or more are the queries. 1 = the object makes no
    difference. near: leave out keys within so many rows and columns of the query, from both shares.
    """
    B, h, w = cover.shape
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).float()            # (N, 2)
    steps = torch.cdist(places, places, p=math.inf)                    # (N, N), rows or columns apart
    counted = (steps > (-1 if near is None else near)).float()
    cover = cover.flatten(1).float()                                   # (B, N)
    area = cover @ counted / counted.sum(1)                            # (B, N), the object's share by query
    queries = (cover >= 0.5) & (area > 0)
    ratios = []
    for one in maps:
        attention = one[:, :, 1:, 1:].float().cpu().mean(1) * counted  # (B, N, N)
        share = torch.einsum("bqk,bk->bq", attention, cover) / attention.sum(-1).clamp(min=1e-12)
        ratios.append((share / area.clamp(min=1e-12))[queries].mean())
    return torch.stack(ratios)


def figure_by_layer(panels, ylabel):
    """panels: title -> {label: numbers of each layer, (L,), or of each head, (L, heads)}."""
    figure = Figure(figsize=(4.4 * len(panels) + 0.6, 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, lines) in zip(axes, panels.items()):
        for i, ((label, values), marker) in enumerate(zip(lines.items(), "os^Dvx*")):
            layers, values = range(1, len(values) + 1), torch.as_tensor(values)
            if values.dim() == 2:
                axis.plot(layers, values, marker, color=f"C{i}", markersize=4, alpha=0.5)
                values = values.mean(1)
            axis.plot(layers, values, f"{marker}-", color=f"C{i}", markersize=5, label=legend_label(label))
        axis.set(title=title, xlabel="layer", xticks=layers)
    axes[0].set_ylabel(ylabel)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


# ---- Positions and curves ----

def figure_positions(model):
    """E_pos: the cosine similarity of one patch's embedding to all others, for some patches.

    Relative position bias: each head's bias by offset of the key from the query, zero offset in the centre; a
    row for each table.
    """
    (h, w), config = model.config.grid, model.config
    if config.position == "absolute":
        E = F.normalize(model.pos_embed[0, 1:].detach().float(), dim=-1)
        similarity = (E @ E.t()).view(h, w, h, w).cpu()
        rows, columns = (np.linspace(0, side - 1, min(side, 7)).round().astype(int) for side in (h, w))
        pictures = {f"row {row}": [similarity[row, column] for column in columns] for row in rows}
        titles, largest = [f"column {column}" for column in columns], 1
        headline = "cosine similarity of position embeddings, by patch"
    else:
        tables = [value.detach().float().cpu() for name, value in model.named_parameters()
                  if name.endswith("relative_position_bias_table")]
        labels = [f"layer {i + 1}" for i in range(len(tables))] if len(tables) > 1 else ["all layers"]
        pictures = {label: table[:-3].t().unflatten(1, (2 * h - 1, 2 * w - 1)).flip(1, 2)
                    for label, table in zip(labels, tables)}
        titles = [f"head {i + 1}" for i in range(config.heads)]
        largest = max(picture.abs().max().item() for picture in pictures.values()) or 1
        headline = "relative position bias, by offset of the key from the query"
    width = max(5, min(12, 1.8 * len(titles)))
    figure, axes = grid_of_axes(len(pictures), len(titles), pictures, titles, width)
    for row, axes_of_row in zip(pictures.values(), axes):
        for axis, picture in zip(axes_of_row, row):
            drawn = axis.imshow(picture.numpy(), cmap="PuOr", vmin=-largest, vmax=largest)
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    figure.suptitle(headline, fontsize=10)
    return figure


def read_runs(folders):
    """folder -> lines of its metrics.jsonl. UserError names a file that is absent or not a log."""
    runs = {}
    for folder in folders:
        file = Path(folder) / "metrics.jsonl"
        try:
            lines = file.read_text().split("\n")[:-1]                  # the last may still be written
            runs[str(folder)] = [dict(json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"--runs: {file} is not the log of a training script ({error})") from None
    return runs


PANELS = {"loss, nats": ("loss", "val_loss", "unigram_entropy", "chance_loss", "mean_loss"),
          "accuracy": ("accuracy", "val_accuracy", "val_top1", "val_mean_iou", "majority_accuracy"),
          "learning rate": ("lr",), "images a second": ("images_per_second",)}
BASELINES = {"unigram_entropy": "--", "chance_loss": ":", "mean_loss": "--", "majority_accuracy": "--"}


def figure_curves(runs):
    """runs: label -> list of dicts, as read_runs gives them. Loss, accuracy, learning rate, throughput by
    step: training as lines, held-out images as points, baselines that ignore the image as dashed lines."""
    figure = Figure(figsize=(11, 6.4 + 0.2 * len(runs)), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        for number, (label, log) in enumerate(runs.items()):
            for name in names:
                points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
                if not points:
                    continue
                steps, values = np.array(points).T
                if name in BASELINES:
                    axis.axhline(values[-1], color=f"C{number}" if len(runs) > 1 else "black", linewidth=1,
                                 linestyle=BASELINES[name], label=None if number else name.replace("_", " "))
                elif name.startswith("val_"):
                    axis.plot(steps, values, "o", color=f"C{number}", markeredgecolor="black", markersize=5)
                else:
                    axis.plot(steps, values, color=f"C{number}", linewidth=0.5, alpha=0.35)
                    axis.plot(steps, smooth(values, len(values) // 40), color=f"C{number}", linewidth=1.5)
        axis.set(title=title, xlabel="step")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
        if not axis.lines:
            axis.text(0.5, 0.5, "not logged", ha="center", transform=axis.transAxes)
    handles = [axis.plot([], [], color=f"C{number}", label=legend_label(label))[0]
               for number, label in enumerate(runs)]
    figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=9)
    figure.suptitle("lines: training; points: held-out images; dashed: baselines", fontsize=10)
    return figure


def smooth(values, width):
    """Centred moving mean over width // 2 values on either side."""
    reach = width // 2
    return np.array([values[max(0, i - reach):i + reach + 1].mean() for i in range(len(values))])


# ---- Results of fine-tuning (sec. 2.6) ----

def figure_classes(images, labels, probabilities, classes):
    """Images (3, H, W) beside bars of their three most likely classes; the right one is dark."""
    rows = math.ceil(len(images) / 4)
    figure, axes = grid_of_axes(rows, 8, width=13, width_ratios=[1, 1.1] * 4)
    for (picture, bars), image, label, share in zip(axes.reshape(-1, 2), images, labels, probabilities):
        show(picture, image, classes[label])
        top = share.topk(min(3, len(classes)))
        for place, k, value in zip((3, 2, 1), top.indices.tolist(), top.values.tolist()):
            bars.barh(place, value, height=0.5, color="tab:blue" if k == label else "lightsteelblue")
            bars.text(0, place + 0.3, f"{classes[k]}  {value:.0%}", fontsize=8, va="bottom")
        bars.set(xlim=(0, 1), ylim=(0.5, 4.1))
    return figure


def figure_segments(images, maps, predicted, classes):
    """Images (3, H, W), their class maps (H, W) and the predicted maps, with the classes that occur."""
    figure, axes = grid_of_axes(math.ceil(len(images) / 2), 6, (), ("image", "truth", "prediction") * 2, 9.5)
    palette = hsv_to_rgb([(k * 0.61803 % 1, 0.9 - 0.2 * (k // 12 % 3), 0.95 - 0.25 * (k // 36 % 3))
                          for k in range(256)])
    palette[0], palette[1:11], palette[data.IGNORE] = 0, matplotlib.colormaps["tab10"].colors, 1
    for three, image, *both in zip(axes.reshape(-1, 3), images, maps, predicted):
        show(three[0], image)
        for axis, some in zip(three[1:], both):
            axis.imshow(palette[some.long().numpy()], interpolation="nearest")
    occurring = sorted({int(k) for some in (*maps, *predicted) for k in some.unique()} - {data.IGNORE})
    handles = [Rectangle((0, 0), 1, 1, color=palette[k], label=legend_label(classes[k])) for k in occurring]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    return figure


# ---- The whole method (figure 1) ----

def figure_pipeline(crop, mask, tokens, predicted, decoded, decoded_prediction):
    """One image through sec. 2: above, the patches' view; below, the tokenizer's.

    crop (3, H, W); mask (h, w) bool; tokens and predicted (h, w) int64; decoded and decoded_prediction
    (3, ., .): the decoder's pictures of the tokens, and of the predicted ones with the true ones around.
    """
    grid, (H, W), mask = mask.shape, crop.shape[-2:], torch.as_tensor(mask)
    found, white = (predicted == tokens) & mask, torch.ones(3, *mask.shape)
    labels = "patches (Vision Transformer)", "visual tokens (discrete VAE)"
    figure, axes = grid_of_axes(2, 9, labels, width=12, aspect=1.6, width_ratios=(1, 0.28) * 4 + (1,))

    def arrow(axis, start, end, words=""):
        axis.annotate("", xy=end, xytext=start, xycoords="axes fraction",
                      arrowprops=dict(arrowstyle="-|>", lw=1.3))
        axis.text(0.5, 0.56, words, ha="center", va="bottom", fontsize=8, transform=axis.transAxes)

    show(axes[0][0], crop, "one crop of the image")
    show(axes[0][2], crop, f"{grid[0]}×{grid[1]} patches")
    outline(axes[0][2], np.ones(grid), (H, W), edgecolor="white", linewidth=2)
    show(axes[0][4], hide(crop, mask), f"{int(mask.sum())} of them masked")
    show(axes[0][6], torch.where(mask, token_colours(predicted), white), "predicted tokens")
    for colour, width in (("black", 3), ("white", 1.2)):               # to be seen on any colour
        outline(axes[0][6], found, grid, edgecolor=colour, linewidth=width)
    show(axes[0][8], decoded_prediction, "decoded, with the\ntrue tokens around")

    small = F.interpolate(crop[None].float(), size=decoded.shape[-2:], mode="bilinear", antialias=True)[0]
    show(axes[1][0], small, f"the same crop,\n{small.shape[1]}×{small.shape[2]} pixels")
    show(axes[1][2], token_colours(tokens), "visual tokens")
    show(axes[1][4], torch.where(mask, token_colours(tokens), white), "those to predict")
    axes[1][6].text(0.5, 0.5, f"cross-entropy\nat masked places\n\n{int(found.sum())} of {int(mask.sum())} "
                    f"right\n(outlined above)", ha="center", va="center", transform=axes[1][6].transAxes)
    show(axes[1][8], decoded, "all true tokens, decoded:\nthe best possible")
    for axis in (axes[0][6], axes[1][4]):
        outline(axis, np.ones((1, 1)), grid, edgecolor="grey", linewidth=1)
    for axis, words in zip(axes[0][1::2], ("cut", "mask", "ViT,\nsoftmax", "dVAE\ndecoder")):
        arrow(axis, (-0.1, 0.5), (1.1, 0.5), words)
    for axis, words in zip(axes[1][1:6:2], ("dVAE\nencoder", "mask", "")):
        arrow(axis, (-0.1, 0.5), (1.1, 0.5), words)
    arrow(axes[1][6], (0.5, 1.22), (0.5, 0.78))
    return figure


# ---- Loading ----

def open_model(path, wanted=None, flag="--init"):
    """The model in a checkpoint. wanted: a class that it must be. UserError."""
    try:
        model, _ = weights.build(path)
    except ValueError as error:
        raise UserError(f"{flag}: {error}; `python pretrain.py` leaves a model.pt that would do") from None
    if wanted and not isinstance(model, wanted):
        raise UserError(f"{flag}: {path} holds a {type(model).__name__}, not a {wanted.__name__}; a model.pt "
                        "of pretrain.py would do")
    return model


def open_tokenizer(args):
    """(DiscreteVAE, its file) of --tokenizer, or of --init's run. UserError without a decoder."""
    path, config = args.tokenizer, Path(args.init).with_name("config.json")
    if not path and config.is_file():
        path = json.loads(config.read_text()).get("tokenizer")
    path = Path(path or Path(args.init).with_name("tokenizer") / "model.pt")
    if not path.is_file():
        raise UserError(f"--tokenizer: {path} is not there; `python pretrain.py` leaves one, or --tokenizer "
                        "FILE names a model.pt of dvae.py or DALL-E's encoder.pkl")
    tokenizer = weights.load_tokenizer(path)
    if tokenizer.decoder is None:
        raise UserError(f"--tokenizer: {path} has no decoder beside it (decoder.pkl), which pictures need")
    return tokenizer, path


def open_pictures(args, count):
    """PIL images: the files of --images, or the first held-out images of --data. UserError."""
    try:
        if args.images:
            return [data.open_image(path) for path in args.images]
        _, held_out = data.open_splits(args.data, args.data_root)
        return [data.read(held_out, index)[0] for index in range(args.first, args.first + count)]
    except data.BadFile as error:
        raise UserError(f"--images: {error}") from None


def squares(pictures, side):
    """The largest centred square of each, resized: (n, 3, side, side) in [0, 1]."""
    resized = [picture.resize((side, side), Image.BICUBIC, box=data.centre_box(*picture.size))
               for picture in pictures]
    return torch.stack([data.to_float(transforms.pil_to_tensor(picture)) for picture in resized])


def at_size(model, image_hw):
    """The backbone of a model for images of (H, W) pixels, its positions resized."""
    if image_hw == model.config.image_hw:
        return model
    other = vit.VisionTransformer(dataclasses.replace(model.config, image_size=image_hw))
    state = vit.resize_positions(model.state_dict(), other.config, model.config.grid)
    other.load_state_dict(state, strict=False)                         # heads are left out
    return other.eval()


def number_to_mask(args, grid):
    """How many patches --ratio is on a grid. UserError where that is none or all."""
    if not (0 < args.ratio < 1 and int(args.ratio * math.prod(grid)) >= 1):
        raise UserError(f"--ratio: between 0 and 1 so that some of the {math.prod(grid)} patches are masked "
                        f"and some are not, not {args.ratio:g}")
    return int(args.ratio * math.prod(grid))


def open_masked(args, count):
    """(model, tokenizer, images (n, 3, H, W), the tokenizer's view, blockwise masks (n, h, w)). UserError."""
    model = open_model(args.init, vit.MaskedImageModel)
    tokenizer, path = open_tokenizer(args)
    if tokenizer.vocab_size != model.lm_head.out_features:
        raise UserError(f"--tokenizer: {path} has {tokenizer.vocab_size} codes, the model predicts "
                        f"{model.lm_head.out_features}")
    grid = model.config.grid
    if grid[0] != grid[1]:
        raise UserError(f"--init: a model for squares, not for {grid[0]}x{grid[1]} patches")
    pictures, rng = open_pictures(args, count), np.random.default_rng(args.seed)
    masks = [blockwise_mask(grid, number_to_mask(args, grid), rng) for _ in pictures]
    return (model, tokenizer, squares(pictures, model.config.image_hw[0]),
            squares(pictures, grid[0] * tokenizer.downsample), torch.from_numpy(np.stack(masks)))


# ---- Command line: a function for each WHAT, args -> Figure ----

def masks(args):
    """blockwise masks beside random ones, and how often each patch is masked"""
    pictures, rng = open_pictures(args, args.count), np.random.default_rng(args.seed)
    num_masked, masks, coverage = number_to_mask(args, args.grid), {}, {}
    for label, draw in (("blockwise", blockwise_mask), ("random", random_mask)):
        masks[label] = [draw(args.grid, num_masked, rng) for _ in pictures]
        coverage[label] = np.mean([draw(args.grid, num_masked, rng) for _ in range(10_000)], axis=0)
    return figure_masks(squares(pictures, max(112, *args.grid)), masks, coverage)


@torch.no_grad()
def tokens(args):
    """images, their token grids, both reconstructions, and the most used codes"""
    tokenizer, path = open_tokenizer(args)
    config = path.with_name("config.json")
    trained = json.loads(config.read_text())["image_size"] if config.is_file() else 112    # DALL-E, sec. 2.1
    side = args.size or trained
    if side % tokenizer.downsample:
        raise UserError(f"--size: a multiple of {tokenizer.downsample} for this tokenizer, not {side}")
    images = squares(open_pictures(args, max(args.count, 64)), side)
    found = torch.cat([tokenizer.tokenize(some) for some in images.split(32)])
    soft = tokenizer(images[:args.count], 1 / 16).images
    return figure_tokens(images, found, soft, tokenizer.decode(found[:args.count]))


def predict(args):
    """masked images, the tokenizer's best, and the model's prediction"""
    model, tokenizer, images, token_images, mask = open_masked(args, args.count)
    columns, right = predictions(model, images, mask, tokenizer, token_images)
    return figure_predictions(columns, mask, right)


@torch.no_grad()
def pipeline(args):
    """one image through the whole method (figure 1)"""
    model, tokenizer, images, token_images, mask = open_masked(args, 1)
    columns, _ = predictions(model, images, mask, tokenizer, token_images)
    predicted = model(images, mask, torch.arange(mask.numel())).argmax(-1).view(mask.shape)
    return figure_pipeline(images[0], mask[0], tokenizer.tokenize(token_images)[0], predicted[0],
                           columns["tokenizer at best"][0], columns["prediction"][0])


@torch.no_grad()
def attention(args):
    """self-attention of reference patches over the image (figure 2)"""
    model, picture = open_model(args.init), open_pictures(args, 1)[0]
    P, depth = model.config.patch_size, model.config.depth
    side = args.size or model.config.image_hw[0]
    if side % P:
        raise UserError(f"--size: a multiple of the patch size {P}, not {side}")
    layer = args.layer - 1 if args.layer > 0 else depth + args.layer
    if not 0 <= layer < depth or args.layer == 0:
        raise UserError(f"--layer: 1 to {depth}, or -1 for the last, not {args.layer}")
    image = transforms.resize(transforms.pil_to_tensor(picture), side, Image.BICUBIC)
    image = data.to_float(transforms.center_crop(image, [length // P * P for length in image.shape[-2:]]))
    model = at_size(model, tuple(image.shape[-2:]))
    grid = h, w = model.config.grid
    references = [reference_of(text, grid) for text in args.patch]
    references = references or [(h // 2, w // 2), (h // 3, w // 3), (2 * h // 3, 2 * w // 3)]
    return figure_attention(image, model.attention_maps(image[None], layer)[0], references, grid,
                            f"self-attention of layer {layer + 1} of {depth}")


def reference_of(text, grid):
    """--patch: "S", or "ROW,COL" on the grid."""
    places = {CLS: CLS, **{f"{row},{column}": (row, column) for row, column in np.ndindex(grid)}}
    if text not in places:
        raise UserError(f"--patch: S, or ROW,COL from 0,0 to {grid[0] - 1},{grid[1] - 1} here, not {text}")
    return places[text]


def with_random(model, args):
    """label -> model: that of --init, and one of the same sizes with random weights."""
    torch.manual_seed(args.seed)
    return {Path(args.init).parent.name: model, "random weights": vit.VisionTransformer(model.config).eval()}


@torch.no_grad()
def attention_distance(args):
    """how far heads look, by layer: the model beside a random one"""
    model, panels = open_model(args.init), {}
    images, config = squares(open_pictures(args, args.count), model.config.image_hw[0]), model.config
    for label, one in with_random(model, args).items():
        parts = [attention_distances(every_attention_map(one, image[None]), config.grid, config.patch_size)
                 for image in images]
        panels[label] = {"heads, and their mean": torch.stack(parts).mean(0)}
    return figure_by_layer(panels, "mean attention distance, pixels")


@torch.no_grad()
def attention_objects(args):
    """attention on an object over its share of the image: --init, --compare, random weights"""
    models = with_random(open_model(args.init), args)
    models |= {Path(path).parent.name: open_model(path, flag="--compare") for path in args.compare}
    ratios = {"all patches": {}, "without neighbours": {}}
    for label, model in models.items():
        images, cover = object_scenes(args.count, model.config)
        parts = [every_attention_map(model, some) for some in images.split(50)]
        maps = [torch.cat(layer) for layer in zip(*parts)]
        for title, near in zip(ratios, (None, 1)):
            ratios[title][label] = object_attention(maps, cover, near)
            numbers = "".join(f"{value:8.2f}" for value in ratios[title][label].tolist())
            training.say(f"{title:20} {label:24} {numbers}")
    return figure_by_layer(ratios, "attention on the object / its share of the area")


def object_scenes(count, config):
    """Scenes of `shapes`: images (n, 3, S, S), and the share of each patch that the main object covers."""
    scenes = [data.render_scene("val", index) for index in range(count)]
    images = squares([Image.fromarray(image) for image, _, _ in scenes], config.image_hw[0])
    on_object = torch.stack([torch.from_numpy(classes == 1 + label) for _, label, classes in scenes]).float()
    return images, F.adaptive_avg_pool2d(on_object, config.grid)


def positions(args):
    """position embeddings, or the tables of relative position bias"""
    return figure_positions(open_model(args.init))


def curves(args):
    """loss, accuracy, learning rate and throughput of one or several runs"""
    return figure_curves(read_runs(args.runs))


def whole_number(least, most=2 ** 31 - 1):
    """A type for argparse."""
    def number(text):
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"a whole number from {least} to {most}, not {text}")
        return int(text)
    return number


def parser():
    """argparse's parser, with a subparser for each figure."""
    everywhere, model, tokenizer, source, masked = (argparse.ArgumentParser(add_help=False) for _ in range(5))
    everywhere.add_argument("--dpi", type=whole_number(1, 1200), default=100, help="per inch (%(default)s)")
    everywhere.add_argument("--out", metavar="FILE", help="the picture; runs/WHAT.png")
    model.add_argument("--init", metavar="FILE", help="a model.pt or a released checkpoint; by default what "
                       "pretrain.py left for --data")
    tokenizer.add_argument("--tokenizer", metavar="FILE", help="a model.pt of dvae.py, or DALL-E's "
                           "encoder.pkl; by default that of --init's run")
    source.add_argument("--images", nargs="+", metavar="FILE", help="image files, instead of --data's")
    source.add_argument("--data", default="shapes", help="its held-out images are taken: shapes, "
                        "fashion-mnist, cifar10, cifar100, or a folder (%(default)s)")
    source.add_argument("--data-root", default="data", help="folder with the files of these (%(default)s)")
    source.add_argument("--first", type=whole_number(0), default=0, help="number of the first held-out image")
    masked.add_argument("--ratio", type=float, default=0.4, help="share of masked patches (%(default)s)")
    masked.add_argument("--seed", type=whole_number(0), default=0, help="of masks and random weights")

    figures = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = figures.add_subparsers(dest="what", metavar="WHAT", required=True)

    def command(function, *parents, count=None):
        name = function.__name__.replace("_", "-")
        one = commands.add_parser(name, parents=[*parents, everywhere], allow_abbrev=False,
                                  help=function.__doc__, description=function.__doc__)
        one.set_defaults(function=function)
        if count:
            one.add_argument("--count", type=whole_number(1), default=count, help="images (%(default)s)")
        return one

    one = command(masks, source, masked, count=8)
    one.add_argument("--grid", type=whole_number(1), nargs=2, default=(14, 14), metavar=("ROWS", "COLUMNS"),
                     help="of patches (%(default)s)")
    one = command(tokens, model, tokenizer, source, count=8)
    one.add_argument("--size", type=whole_number(1), help="pixels per side; by default as trained")
    command(predict, model, tokenizer, source, masked, count=12)
    command(pipeline, model, tokenizer, source, masked)
    one = command(attention, model, source)
    one.add_argument("--size", type=whole_number(1), help="pixels of the shorter side; by default as trained")
    one.add_argument("--patch", action="append", default=[], metavar="ROW,COL",
                     help="reference patch, repeatable; S for [S]; by default three around the centre")
    one.add_argument("--layer", type=int, default=-1, help="1 is the first, -1 the last (%(default)s)")
    command(attention_distance, model, source, count=16).set_defaults(seed=0)
    one = command(attention_objects, model, count=500)
    one.add_argument("--compare", nargs="+", default=[], metavar="FILE", help="more models beside --init")
    one.add_argument("--seed", type=whole_number(0), default=0, help="of the random weights")
    command(positions, model)
    command(curves).add_argument("--runs", nargs="+", default=["runs/pretrain-shapes"], metavar="FOLDER",
                                 help="folders of runs (%(default)s)")
    return figures


def main():
    with training.one_line_errors():
        args = parser().parse_args()
        out = Path(args.out or f"runs/{args.what}.png")
        if out.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg") or out.is_dir():
            raise UserError(f"--out: a file that ends in .png, .pdf, .svg or .jpg, not {out}")
        if "init" in args and args.init is None:
            args.init = f"runs/pretrain-{Path(getattr(args, 'data', 'shapes')).resolve().name}/model.pt"
        figure = args.function(args)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(out, dpi=args.dpi)
        except OSError as error:
            raise UserError(f"--out: {out} cannot be written ({error.strerror})") from None
        training.say(f"written to {out}")


if __name__ == "__main__":
    main()
