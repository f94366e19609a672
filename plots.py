"""Figures: masks, visual tokens, predictions, self-attention, positions, learning curves, the whole method.

Functions figure_... take tensors and return a matplotlib Figure; visualize.py is their command line.
B images of H x W pixels in [0, 1], a grid of h x w patches, N = h w, L layers, which count from 1 in figures.
"""
import math
import os
import sys
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F

from folders import IGNORE, printable

if "matplotlib" not in sys.modules:
    # Jupyter sets MPLBACKEND for the scripts that it starts, too. If that backend is not installed, importing
    # matplotlib fails, although these figures need no backend.
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib
    if backend:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend

import matplotlib.style
from matplotlib.collections import LineCollection
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font, get_font_names
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

GOLDEN_RATIO = 0.61803    # modulo 1, its multiples are spread evenly: hues of tokens and classes
CLS = "S"                 # the special token [S] among the reference patches of figure_attention
CJK_FONTS = {"Noto Sans CJK SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "Malgun Gothic"}
FONTS = ["DejaVu Sans", *sorted(CJK_FONTS.intersection(get_font_names()))]    # those installed


# ---- Shared by the figures ----

def default_style():
    """A decorator: matplotlib's defaults replace the user's settings while a function runs; a $ is a $."""
    return matplotlib.style.context(["default", {"text.parse_math": False, "font.family": FONTS}])


class StyledFigure(Figure):
    """A matplotlib Figure that is drawn and saved in the default style, too."""
    draw = default_style()(Figure.draw)
    savefig = default_style()(Figure.savefig)


def make_axes(rows, columns, row_labels=(), titles=(), width=11, aspect=1.0, width_ratios=None):
    """Make (figure, array of axes (rows, columns)) for images, without ticks and frames.

    width: of the figure, in inches; aspect: height / width of the space for an image and the text around it.
    """
    width = max(width, 0.8 * columns)                                  # many columns need more
    figure = StyledFigure(figsize=(width, width / columns * aspect * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, width_ratios=width_ratios)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    for axis, label in zip(axes[:, 0], row_labels):
        axis.set_ylabel(label, fontsize=9)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    return figure, axes


def figure_sheet(rows, titles=(), row_labels=(), footer="", gap=0.04, width=11):
    """Rows of images (3, H, W), all on the same axes, which is ten times as fast as axes for each.

    gap: between rows, where the width of a column is 1; footer: a line of text below.
    Returns the figure, its axes, and place(row, column) -> (left, right, bottom, top) of an image on them.
    """
    columns, height = max(map(len, rows)), max(image.shape[1] / image.shape[2] for image in rows[0]) * 0.96
    left, top = (-0.2 if row_labels else -0.04), (-0.36 if titles else -0.04)
    right, bottom = columns, len(rows) * (height + gap) + (0.24 if footer else 0)
    inches = max(min(width / columns, 2.2), 0.8)                       # per column
    figure = StyledFigure(figsize=((right - left) * inches, (bottom - top) * inches))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(bottom, top))
    axis.set_axis_off()

    def place(row, column):
        return column, column + 0.96, row * (height + gap) + height, row * (height + gap)

    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            show_image(axis, image, extent=place(r, c))
    axis.set(xlim=(left, right), ylim=(bottom, top))                   # imshow has changed them
    for c, title in enumerate(titles):
        axis.text(c + 0.48, -0.04, title, fontsize=9, ha="center", va="bottom")
    for r, label in enumerate(row_labels):
        axis.text(-0.1, r * (height + gap) + height / 2, label, fontsize=9, ha="center", va="center",
                  rotation="vertical")
    axis.text((left + right) / 2, bottom - 0.1, footer, fontsize=9, ha="center", va="center")
    return figure, axis, place


def show_image(axis, image, title=None, extent=None):
    """Show an image (3, H, W) in [0, 1]. extent: its place on the axes (left, right, bottom, top)."""
    axis.imshow(image.permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest", extent=extent)
    if title:
        axis.set_title(title, fontsize=9)


def show_images(axes, images):
    """Show images (3, H, W), one on each of these axes; the last axes may remain empty."""
    for axis, image in zip(axes, images):
        show_image(axis, image)


def outline_patches(axis, mask, image_hw, color, linewidth):
    """Draw the edges of the patches where mask (h, w) is True, on axes that show H x W pixels."""
    (H, W), (h, w) = image_hw, mask.shape
    for row, column in np.argwhere(np.asarray(mask)):
        corner = (column * W / w - 0.5, row * H / h - 0.5)             # the centre of the first pixel is 0, 0
        axis.add_patch(Rectangle(corner, W / w, H / h, fill=False, edgecolor=color, linewidth=linewidth))


def grey_out(images, mask):
    """Paint masked patches grey: images (..., 3, H, W), mask (..., h, w) bool -> images."""
    (H, W), (h, w) = images.shape[-2:], mask.shape[-2:]
    rows, columns = torch.arange(H) * h // H, torch.arange(W) * w // W    # the patch of each pixel
    pixels = torch.as_tensor(mask)[..., None, rows[:, None], columns]  # (..., 1, H, W)
    return torch.where(pixels, 0.5, images)


@torch.no_grad()
def token_colours(tokens, tokenizer=None):
    """A colour for each token, (h, w) int64 -> (3, h, w): the mean colour that its code alone decodes to.

    Without a tokenizer or its decoder: any colour, the same for equal tokens.
    """
    if tokenizer is not None and tokenizer.decoder is not None:
        codes, index = tokens.unique(return_inverse=True)
        colours = tokenizer.decode(codes[:, None, None]).mean(dim=(2, 3))    # (codes, 3)
        return colours[index].permute(2, 0, 1).cpu()
    tokens = tokens.cpu().numpy()
    hue, value = tokens * GOLDEN_RATIO % 1, 0.35 + 0.6 * (tokens * 0.7549 % 1)
    colours = hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.65), value], axis=-1))    # (h, w, 3)
    return torch.from_numpy(colours).permute(2, 0, 1)


def line_style(i):
    """The style of line i, different for 280 lines: 70 pairs of a colour and a marker, with four dashes."""
    colours, dashes = matplotlib.colormaps["tab10"].colors, ("-", "--", "-.", ":")
    return dict(color=colours[i % 10], marker="os^DvP*"[i % 7], linestyle=dashes[i // 70 % 4])


def short_labels(names, length=40):
    """Names of runs or classes as labels that can be drawn and are short, but differ if the names do.

    A name of more than `length` characters loses its middle. Characters that no font has become \\u escapes.
    """
    glyphs = set().union(*(get_font(findfont(font)).get_charmap() for font in FONTS))
    labels = []
    for name in map(printable, names):
        name = "".join(c if ord(c) in glyphs else c.encode("unicode_escape").decode() for c in name)
        name = name if len(name) <= length else f"{name[:length // 2]}…{name[-length // 2:]}"
        labels.append(f" {name}" if name.startswith("_") else name)    # matplotlib would leave out _a
    if len(set(labels)) < len(set(names)):
        labels = [f"{i + 1}: {label}" for i, label in enumerate(labels)]
    return labels


def add_legend(figure, handles):
    """Put a legend below the axes, and make the figure as much higher as it needs."""
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = max(1, min(6, int(figure.get_figwidth() / (0.085 * longest + 0.5))))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(handles) / columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


# ---- Masks (Algorithm 1) and visual tokens (sec. 2.1) ----

@default_style()
def figure_masks(images, masks, coverage):
    """Images under masks, and how often each patch is masked. A row for each way to mask.

    images (n, 3, H, W); masks {label: (n, h, w) bool}; coverage {label: (h, w)}, the share of masks in which
    each patch is masked.
    """
    titles = [""] * len(images) + ["how often a patch\nis masked"]
    figure, axes = make_axes(len(masks), len(images) + 1, titles=titles, width=12,
                             aspect=0.3 + images.shape[2] / images.shape[3])
    for row, label in zip(axes, masks):
        show_images(row, map(grey_out, images, masks[label]))
        share = coverage[label]
        h, w = share.shape
        row[0].set_ylabel(f"{label}\n{np.count_nonzero(masks[label][0])} of {h * w}", fontsize=9)
        heatmap = row[-1].imshow(share, vmin=0, vmax=1)
        row[-1].set_xlabel(f"corner {share[0, 0]:.2f}\nedge {share[0, w // 2]:.2f}\n"
                           f"centre {share[h // 2, w // 2]:.2f}", fontsize=8)
    figure.colorbar(heatmap, ax=axes[:, -1], shrink=0.7)
    return figure


@default_style()
def figure_tokens(images, tokens, soft, hard, examples=3, colours=token_colours):
    """Images, their tokens and reconstructions; below, patches of the most frequent codes.

    images (m, 3, H, W), tokens (m, h, w): the first n are shown, and patches from all m
    soft, hard (n, 3, H, W): reconstructions from soft codes, softmax(logits / tau), and from the tokens
    examples: number of patches for each of n codes; colours: tokens (h, w) -> (3, h, w)
    """
    n, P = len(soft), images.shape[-1] // tokens.shape[-1]
    soft_mse, hard_mse = ((pictures - images[:n]).square().mean() for pictures in (soft, hard))
    rows = {"image": images, "tokens": [colours(grid) for grid in tokens[:n]],
            f"soft codes\nMSE {soft_mse:.4f}": soft, f"hard codes\nMSE {hard_mse:.4f}": hard}
    labels = [*rows, "patches of\nfrequent codes"]
    figure, axes = make_axes(len(rows) + examples, n, labels, width=min(11, 2.5 * n))
    for row, pictures in zip(axes, rows.values()):
        show_images(row, pictures)
    patches = images.unfold(2, P, P).unfold(3, P, P)                   # (m, 3, h, w, P, P)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)          # (m h w, 3, P, P)
    codes, counts = tokens.unique(return_counts=True)
    for i, column in zip(counts.argsort(descending=True), axes[len(rows):].T):
        show_images(column, patches[tokens.flatten() == codes[i]])
        column[0].set_title(f"{codes[i]}: {counts[i] / tokens.numel():.1%}", fontsize=8)
    return figure


@default_style()
def figure_reconstructions(pictures):
    """Images and their reconstructions by a tokenizer, a row for each: {label: (n, 3, H, W)}."""
    return figure_sheet(list(pictures.values()), row_labels=pictures)[0]


# ---- Predictions of a masked image model (sec. 2.3) ----

@torch.no_grad()
def predictions(model, tokenizer, images, token_images, mask):
    """What a MaskedImageModel predicts for the masked patches, or for all patches if none is masked.

    images (B, 3, H, W), mask (B, h, w) bool; token_images is the tokenizer's view of the images. It and the
    tokenizer are None for a model that predicts pixels.

    Returns the inputs of figure_predictions: pictures, {title: (B, 3, ., .)}, mask, and correct, (B, h, w)
    bool, False where the predicted token is wrong; None for pixels. The last picture shows the predictions,
    with true tokens or pixels at the other patches. If the tokenizer has no decoder, it shows the image with
    the wrong patches in grey.
    """
    all_patches = torch.arange(mask.numel(), device=mask.device)
    outputs = model.eval()(images, mask, all_patches).unflatten(0, mask.shape)    # (B, h, w, V or 3 P P)
    predicted = mask if mask.any() else torch.ones_like(mask)
    pictures = {"original": images, "masked": grey_out(images, mask)}
    if tokenizer is None:
        pixels = torch.where(predicted[..., None], outputs.float(), model.patch_pixels(images))
        return {**pictures, "prediction": model.unpatch_pixels(pixels)}, mask, None
    true_tokens = tokenizer.tokenize(token_images)
    tokens = torch.where(predicted, outputs.argmax(-1), true_tokens)
    correct = tokens == true_tokens
    if tokenizer.decoder is None:
        return {**pictures, "correct tokens": grey_out(images, ~correct)}, mask, correct
    pictures["tokenizer at best"] = tokenizer.decode(true_tokens)
    pictures["prediction"] = tokenizer.decode(tokens)
    return pictures, mask, correct


@default_style()
def figure_predictions(pictures, mask, correct=None):
    """The results of `predictions`, two images per row. In the last picture, the predicted area is outlined.

    pictures {title: (n, 3, ., .)}; mask, correct (n, h, w) bool. A dot marks a patch whose token is correct.
    """
    predicted = (mask if mask.any() else torch.ones_like(mask)).cpu()
    images = [list(pictures_of_image) for pictures_of_image in zip(*pictures.values())]
    columns = 2 if len(images) > 1 else 1
    rows = [sum(images[i:i + columns], []) for i in range(0, len(images), columns)]
    footer = "white line: the area that is predicted"
    if correct is not None:
        footer += ";  dots and numbers: patches whose predicted token is correct"
    figure, axis, place = figure_sheet(rows, [*pictures] * columns, footer=footer, gap=0.16)
    for i, area in enumerate(predicted):
        left, right, bottom, top = place(i // columns, (i % columns + 1) * len(pictures) - 1)
        h, w = area.shape
        dx, dy = (right - left) / w, (bottom - top) / h                # of a patch
        edges = [[(left + x * dx, top + y * dy) for x, y in edge] for edge in edges_of(area)]
        for color, linewidth in (("black", 2.4), ("white", 1.2)):      # visible on any colour
            axis.add_collection(LineCollection(edges, colors=color, linewidths=linewidth))
        if correct is not None:
            hits = area & correct[i].cpu()
            y, x = hits.nonzero().t().numpy() + 0.5
            axis.plot(left + x * dx, top + y * dy, "o", color="white", markeredgecolor="black", markersize=4)
            axis.text((left + right) / 2, bottom + 0.02, f"{int(hits.sum())} of {int(area.sum())}",
                      fontsize=8, ha="center", va="top")
    return figure


def edges_of(area):
    """The edges between an area of patches, bool (h, w), and the rest: pairs of corners ((x, y), (x, y))."""
    inside = F.pad(area.int(), (1, 1, 1, 1)).numpy()
    rows, columns = np.nonzero(np.diff(inside, axis=0)[:, 1:-1])       # a horizontal edge above this row
    edges = [((x, y), (x + 1, y)) for y, x in zip(rows, columns)]
    rows, columns = np.nonzero(np.diff(inside, axis=1)[1:-1])          # a vertical edge left of this column
    return edges + [((x, y), (x, y + 1)) for y, x in zip(rows, columns)]


class Gallery:
    """The pictures of a run: of its last evaluation, and progress.png, a column for each evaluation.

    file_name  of the picture of the last evaluation, a figure draw(*inputs)
    look       function without arguments that returns these inputs. The first is a dict of pictures
               {title: (n, 3, H, W)}, of which the last goes into progress.png
    measure    key of an evaluation's report; its value stands above the column
    The columns are kept in the checkpoints of the run.
    """
    MAX_ROWS, MAX_COLUMNS = 4, 12

    def __init__(self, file_name, look, draw, measure):
        self.file_name, self.look, self.draw, self.measure = file_name, look, draw, measure
        self.columns = []                                              # (title, pictures as uint8)

    def update(self, step, report):
        """Add the pictures of an evaluation after this step."""
        self.inputs = self.look()
        pictures = list(self.inputs[0].values())[-1][:self.MAX_ROWS]
        if len(self.columns) == self.MAX_COLUMNS:                      # drop every second one
            self.columns = self.columns[::2]
        self.columns = [column for column in self.columns if not column[0].startswith(f"step {step}\n")]
        title = f"step {step}\n{self.measure.replace('_', ' ')} {report[self.measure]:.3g}"
        self.columns.append((title, (255 * pictures.clamp(0, 1)).round().byte().cpu()))

    def figures(self):
        """File name -> function that draws its figure."""
        return {self.file_name: lambda: self.draw(*self.inputs), "progress.png": self.draw_progress}

    @default_style()
    def draw_progress(self):
        original = next(iter(self.inputs[0].values()))[:self.MAX_ROWS]
        rows = zip(*[pictures / 255 for _, pictures in self.columns], original)
        figure, _, _ = figure_sheet([*rows], [*[title for title, _ in self.columns], "original"])
        return figure

    def state_dict(self):
        return {"columns": self.columns}

    def load_state_dict(self, state):
        self.columns = state["columns"]


# ---- Self-attention (Figure 2) ----

@default_style()
def figure_attention(image, attention, references, grid, title=None):
    """What reference patches attend to (Figure 2). A row for each, with the mean of the heads and each head.

    image (3, H, W); attention (heads, 1+N, 1+N) of one layer: row = query, column = key, token 0 = [S]
    references: a list of (row, column) on the grid (h, w), from 0, or "S" for [S]
    Each map has its own scale. The brightest colour stands for the largest value outside the reference patch.
    """
    (H, W), (h, w) = image.shape[-2:], grid
    row_labels = ["[S]" if reference == CLS else "patch {},{}".format(*reference) for reference in references]
    titles = ["", "mean of heads", *[f"head {i + 1}" for i in range(len(attention))]]
    figure, axes = make_axes(len(references), len(titles), row_labels, titles, max(9, len(titles)), H / W)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("dot: the reference patch;  bright: much attention, each map on its own scale;  "
                     f"{h}×{w} patches", fontsize=9)
    grey, pixels = image.float().mean(dim=0).cpu().numpy(), (-0.5, W - 0.5, H - 0.5, -0.5)
    for reference, row in zip(references, axes):
        show_image(row[0], image)
        show_grid(row[0], grid, (H, W))
        query = 0 if reference == CLS else 1 + reference[0] * w + reference[1]
        maps = attention[:, query, 1:].float().cpu().unflatten(1, grid)    # (heads, h, w)
        for axis, heatmap in zip(row[1:], [maps.mean(dim=0), *maps]):
            others = heatmap.clone()
            if reference != CLS:
                others[reference] = 0
            axis.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=pixels)
            axis.imshow(heatmap.numpy(), cmap="inferno", alpha=0.7, interpolation="nearest",
                        extent=pixels, vmin=0, vmax=max(1e-12, others.max().item()))
        if reference != CLS:
            x, y = (reference[1] + 0.5) * W / w - 0.5, (reference[0] + 0.5) * H / h - 0.5
            for axis in row:
                axis.plot(x, y, "o", color="deepskyblue", markeredgecolor="white", markersize=5)
    return figure


def show_grid(axis, grid, image_hw):
    """Draw the lines of a grid (h, w) over an image of (H, W) pixels, and number some rows and columns."""
    for side, pixels, line, ticks in zip(grid, image_hw, (axis.axhline, axis.axvline),
                                         (axis.set_yticks, axis.set_xticks)):
        for i in range(1, side):
            line(i * pixels / side - 0.5, color="white", linewidth=0.4, alpha=0.6)
        numbers = range(0, side, math.ceil(side / 8))
        ticks([(i + 0.5) * pixels / side - 0.5 for i in numbers], numbers, fontsize=6)
    axis.tick_params(length=0, pad=1)


def most_telling_layer(model, image):
    """The layer, from 0, whose attention depends most on the image (3, H, W), and how much: from 0 to 1.

    That is the total variation between its attention to the image and to a grey one, half the sum of absolute
    differences, mean over heads and queries.
    """
    both, moved = torch.stack([image, torch.full_like(image, 0.5)]), []
    for layer in range(model.config.depth):                            # one at a time, to save memory
        of_image, of_grey = model.attention_maps(both, layer)          # (heads, 1+N, 1+N)
        moved.append((of_image - of_grey).abs().sum(dim=-1).mean().item() / 2)
    return moved.index(max(moved)), max(moved)


@default_style()
def figure_by_layer(panels, ylabel):
    """Lines over layers, for panels {title: {label: (L,)}}. The value at index 0 is that of layer 1."""
    figure = StyledFigure(figsize=(4.4 * len(panels) + 0.6, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    styles = {label: dict(line_style(i), markersize=5) for i, label in enumerate(labels)}
    depth = max(len(values) for lines in panels.values() for values in lines.values())
    for axis, (title, lines) in zip(axes, panels.items()):
        for label, values in lines.items():
            axis.plot(range(1, len(values) + 1), values, **styles[label])
        axis.set(title=title, xlabel="layer", xticks=range(1, depth + 1, math.ceil(depth / 16)))
    axes[0].set_ylabel(ylabel)
    add_legend(figure, [Line2D([], [], **styles[label], label=short)
                        for label, short in zip(labels, short_labels(labels))])
    return figure


# ---- Positions (sec. 2.2) ----

def figure_position_embeddings(embeddings, grid):
    """Cosine similarity of the position embedding of a patch to all others, for at most 7 x 7 patches.

    embeddings: E_pos (N, D) of the patches, without [S]; grid (h, w).
    """
    h, w = grid
    embeddings = F.normalize(embeddings.float(), dim=-1)
    similarity = (embeddings @ embeddings.t()).view(h, w, h, w)
    rows, columns = (np.linspace(0, side - 1, min(side, 7)).round().astype(int) for side in grid)
    return figure_maps(similarity[rows][:, columns], [f"row {row}" for row in rows],
                       [f"column {column}" for column in columns],
                       f"cosine similarity of position embeddings, for {len(rows)}×{len(columns)} of {h}×{w} "
                       "patches")


def figure_position_biases(tables, grid):
    """The bias of each head by offset of the key from the query, with offset zero in the centre.

    tables: relative position bias of each layer or of all, (1 or L, (2h-1)(2w-1) + 3, heads); grid (h, w).
    """
    h, w = grid
    biases = tables[:, :-3].float().transpose(1, 2).unflatten(2, (2 * h - 1, 2 * w - 1))
    biases = biases.flip(2, 3)                                         # tables have query minus key
    row_labels = [f"layer {i + 1}" for i in range(len(tables))] if len(tables) > 1 else ["all layers"]
    return figure_maps(biases, row_labels, [f"head {i + 1}" for i in range(biases.shape[1])],
                       "relative position bias, by offset of the key from the query")


@default_style()
def figure_maps(maps, row_labels, titles, headline):
    """Maps (rows, columns, height, width); zero is white and the largest absolute value is dark."""
    largest = maps.abs().max().item() or 1
    figure, axes = make_axes(*maps.shape[:2], row_labels, titles, width=max(5, min(12, 1.8 * len(titles))))
    for axis, values in zip(axes.flat, maps.flatten(0, 1).cpu().numpy()):
        heatmap = axis.imshow(values, cmap="PuOr", vmin=-largest, vmax=largest)
    figure.colorbar(heatmap, ax=axes, shrink=0.8, aspect=max(20, 3 * len(maps)))
    figure.suptitle(headline, fontsize=10)
    return figure


# ---- Learning curves ----

PANELS = {    # title: values in metrics.jsonl
    "loss": ("loss", "val_loss", "unigram_entropy", "chance_loss", "mean_loss"),
    "accuracy": ("accuracy", "val_accuracy", "val_top1", "val_mean_iou", "majority_accuracy"),
    "learning rate": ("lr",), "images per second": ("images_per_second",)}
BASELINES = {"unigram_entropy": "--", "chance_loss": ":", "mean_loss": "-.", "majority_accuracy": "--"}


@default_style()
def figure_curves(logs):
    """Loss, accuracy, learning rate and speed by step. logs: {label: list of dicts as in metrics.jsonl}."""
    figure = StyledFigure(figsize=(11, 6.4), layout="constrained")
    styles = [line_style(i) for i in range(len(logs))]
    for axis, (title, names) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        for style, log in zip(styles, logs.values()):
            for name in names:
                draw_curve(axis, log, name, style, len(logs) > 10)
        axis.set(title=title, xlabel="step")
        lines, labels = axis.get_legend_handles_labels()
        if labels:
            baselines = dict(zip(labels, lines))                       # one of each kind is named
            axis.legend(baselines.values(), baselines.keys(), frameon=False, fontsize=8)
        if not axis.lines:
            axis.text(0.5, 0.5, "not logged", ha="center", transform=axis.transAxes)
    add_legend(figure, [Line2D([], [], **style, markersize=5, markeredgecolor="black", label=label)
                        for style, label in zip(styles, short_labels(logs, 60))])
    figure.suptitle("lines: training; points: held-out images; dashed or dotted: baselines", fontsize=10)
    return figure


def draw_curve(axis, log, name, style, marked):
    """Draw the values of this name in a log, if any. marked: with markers, where colours occur twice."""
    colour, marker = style["color"], style["marker"]
    points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
    if not points:
        return
    steps, values = np.array(points, dtype=float).T
    if name in BASELINES:
        label = name.replace("_", " ")
        axis.axhline(values[-1], color=colour, linewidth=1, linestyle=BASELINES[name], label=label)
    elif name.startswith("val_"):
        axis.plot(steps, values, marker, color=colour, markeredgecolor="black", markersize=5)
    else:
        axis.plot(steps, values, color=colour, linewidth=0.5, alpha=0.35)
        reach = len(values) // 80                                      # of a centred moving mean
        smooth = F.avg_pool1d(torch.tensor(values)[None], 2 * reach + 1, 1, reach, count_include_pad=False)[0]
        markers = dict(markevery=0.1, markersize=4) if marked else dict(marker="")
        axis.plot(steps, smooth, **style | markers, linewidth=1.5)


# ---- Results of fine-tuning (sec. 2.6) ----

@default_style()
def figure_classes(images, labels, probabilities, classes):
    """Images with their class, and bars of the three likeliest classes, where the true class is dark.

    images (n, 3, H, W), labels (n,), probabilities (n, classes), classes: their names.
    """
    classes = short_labels(classes, 18)
    figure, axes = make_axes(math.ceil(len(images) / 4), 8, width=13, width_ratios=[1, 1.1] * 4)
    for (picture, bars), image, label, shares in zip(axes.reshape(-1, 2), images, labels, probabilities):
        show_image(picture, image, classes[label])
        shares, likeliest = shares.topk(min(3, len(classes)))
        for y, k, share in zip((3, 2, 1), likeliest.tolist(), shares.tolist()):
            bars.barh(y, share, height=0.5, color="tab:blue" if k == label else "lightsteelblue")
            bars.text(0, y + 0.3, f"{classes[k]}  {share:.0%}", fontsize=8, va="bottom")
        bars.set(xlim=(0, 1), ylim=(0.5, 4.1))
    return figure


@default_style()
def figure_segments(images, maps, predicted, classes):
    """Images, their class maps and the predicted maps, with a legend of the classes that occur.

    images: n of (3, H, W); maps, predicted: n of (H, W), integers. classes: names. IGNORE is white.
    """
    titles = ("image", "truth", "prediction") * 2
    figure, axes = make_axes(math.ceil(len(images) / 2), len(titles), titles=titles, width=9.5)
    palette, occurring = class_colours(), set()
    for axes_of_image, image, *class_maps in zip(axes.reshape(-1, 3), images, maps, predicted):
        show_image(axes_of_image[0], image)
        for axis, class_map in zip(axes_of_image[1:], class_maps):
            axis.imshow(palette[class_map.long().cpu().numpy()], interpolation="nearest")
            occurring |= set(class_map.unique().tolist()) - {IGNORE}
    classes = short_labels(classes, 18)
    handles = [Rectangle((0, 0), 1, 1, color=palette[k], label=classes[k]) for k in sorted(occurring)]
    add_legend(figure, handles)
    return figure


def class_colours():
    """A different colour for each number in a class map, (256, 3). 0 is black, IGNORE is white."""
    k = np.arange(256)
    saturation, value = 0.9 - 0.2 * (k // 12 % 3), 0.95 - 0.25 * (k // 36 % 3)
    palette = hsv_to_rgb(np.stack([k * GOLDEN_RATIO % 1, saturation, value], axis=-1))
    palette[0], palette[1:11], palette[IGNORE] = 0, matplotlib.colormaps["tab10"].colors, 1
    return palette


# ---- The whole method (Figure 1) ----

@default_style()
def figure_pipeline(image, mask, tokens, predicted, reconstruction, prediction, colours=token_colours):
    """One image through sec. 2: above, the view of the Vision Transformer; below, that of the tokenizer.

    image (3, H, W); mask (h, w) bool; tokens, predicted (h, w) int64: true and predicted tokens;
    reconstruction, prediction (3, ., .): decoded true tokens, and predicted ones among true ones.
    colours: tokens (h, w) -> (3, h, w).
    """
    h, w = mask.shape
    correct, white = (predicted == tokens) & mask, torch.ones(3, h, w)
    row_labels = "patches (Vision Transformer)", "visual tokens (discrete VAE)"
    figure, axes = make_axes(2, 9, row_labels, width=12, aspect=0.6 + h / w, width_ratios=[1, 0.28] * 4 + [1])
    (above, below), (arrows_above, arrows_below) = axes[:, ::2], axes[:, 1::2]    # arrows between pictures

    show_image(above[0], image, "one crop of the image")
    show_image(above[1], image, f"{h}×{w} patches")
    outline_patches(above[1], torch.ones(h, w), image.shape[-2:], color="white", linewidth=2)
    show_image(above[2], grey_out(image, mask), f"{int(mask.sum())} of them masked")
    show_image(above[3], torch.where(mask, colours(predicted), white), "predicted tokens")
    for color, linewidth in (("black", 3), ("white", 1.2)):            # visible on any colour
        outline_patches(above[3], correct, (h, w), color, linewidth)
    show_image(above[4], prediction, "decoded, with true\ntokens elsewhere")

    small = F.interpolate(image[None].float(), reconstruction.shape[-2:], mode="bilinear", antialias=True)[0]
    show_image(below[0], small, f"the same crop,\n{small.shape[1]}×{small.shape[2]} pixels")
    show_image(below[1], colours(tokens), "visual tokens, in the\ncolours they decode to")
    show_image(below[2], torch.where(mask, colours(tokens), white), "tokens to predict")
    below[3].text(0.5, 0.5, f"cross-entropy\nat masked patches\n\n{int(correct.sum())} of {int(mask.sum())} "
                  "correct\n(outlined above)", ha="center", va="center", transform=below[3].transAxes)
    show_image(below[4], reconstruction, "all true tokens, decoded:\ntokenizer at best")

    for axis in (above[3], below[2]):
        outline_patches(axis, torch.ones(1, 1), (h, w), color="grey", linewidth=1)
    for axis, words in zip(arrows_above, ("cut", "mask", "ViT,\nsoftmax", "dVAE\ndecoder")):
        draw_arrow(axis, (-0.1, 0.5), (1.1, 0.5), words)
    for axis, words in zip(arrows_below, ("dVAE\nencoder", "mask", "")):
        draw_arrow(axis, (-0.1, 0.5), (1.1, 0.5), words)
    draw_arrow(below[3], (0.5, 1.22), (0.5, 0.78))
    return figure


def draw_arrow(axis, start, end, words=""):
    """Draw an arrow between two points (x, y), from 0 to 1 on the axes, with words above it."""
    arrow = dict(arrowstyle="-|>", lw=1.3)
    axis.annotate("", xy=end, xytext=start, xycoords="axes fraction", arrowprops=arrow)
    axis.text(0.5, 0.56, words, ha="center", va="bottom", fontsize=8, transform=axis.transAxes)
