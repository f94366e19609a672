"""Draw a figure from the command line: `python visualize.py WHAT`, of the checkpoint that pretrain.py wrote.

The figures themselves are functions in plots.py. --layer counts from 1, as the paper does; Python from 0.
"""
import dataclasses
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as transforms

import data
import launch
import plots
import vit
import weights
from folders import BadFile, open_image
from launch import UserError
from masking import MASKS, blockwise_mask, number_to_mask
from run_folder import check_default, describe_file
from shapes import render_scene

MAX_IMAGES = 100    # in a figure


# ---- Loading ----

def open_model(path, model_class=vit.VisionTransformer):
    """The model in a checkpoint, in evaluation mode. Raises UserError unless it is a model_class."""
    if not Path(path).exists():
        raise UserError(f"--init: {path} does not exist; `python pretrain.py` writes a model.pt")
    model = weights.load_model(path)
    if not isinstance(model, model_class):
        raise UserError(f"--init: {path} must be a {model_class.__name__}, got {type(model).__name__}")
    return model


def open_tokenizer(args):
    """(DiscreteVAE, its path) of --tokenizer or of the run of --init. Raises UserError without a decoder."""
    run = Path(args.init).parent
    path = args.tokenizer or weights.read_json(run / "config.json").get("tokenizer")
    path = Path(path or run / "tokenizer/model.pt")                    # the one that the run trained itself
    if not path.exists():
        raise UserError(f"--tokenizer: {path} does not exist; `python pretrain.py` writes one")
    tokenizer = weights.load_tokenizer(path)
    if tokenizer.decoder is None:
        raise UserError(f"--tokenizer: {path} needs a decoder.pkl beside it, to draw what tokens stand for")
    return tokenizer, path


def open_images(args, num_images):
    """PIL images: the files of --images, or num_images held-out images of --data. Raises UserError."""
    if args.images:
        limit = MAX_IMAGES if "count" in args else 1
        if len(args.images) > limit:
            raise UserError(f"--images: {args.what} shows at most {limit}, got {len(args.images)} files")
        try:
            return [open_image(path) for path in args.images]
        except BadFile as error:
            raise UserError(f"--images: {error}") from None
    _, held_out = data.open_splits(args.data, args.data_root)
    indices = range(args.first, min(args.first + num_images, len(held_out)))
    if not indices:
        raise UserError(f"--first: must be from 0 to {len(held_out) - 1} for {args.data}, got {args.first}")
    if len(indices) < num_images:
        launch.say(f"from --first {args.first} on there are {len(indices)} held-out images")
    return [data.read_sample(held_out, index)[0] for index in indices]


def fit_images(images, H, W):
    """A batch of PIL images, float (n, 3, H, W) in [0, 1]: the largest centred rectangles, resized."""
    fitted = [ImageOps.fit(image, (W, H), Image.Resampling.BICUBIC) for image in images]
    return data.to_float(torch.stack([transforms.pil_to_tensor(image) for image in fitted]))


def count_masked(args, grid):
    """The number of patches that --ratio masks. Raises UserError if these are none or all."""
    num_masked, patches = number_to_mask(args.ratio, grid), math.prod(grid)
    if not 1 <= num_masked < patches:
        raise UserError(f"--ratio: must mask at least 1 and at most {patches - 1} of {patches} patches; "
                        f"{args.ratio:g} masks {num_masked}")
    return num_masked


def open_masked(args, num_images):
    """(model, tokenizer, images (n, 3, H, W), the tokenizer's view of them, blockwise masks (n, h, w)).

    For a model that predicts pixels, which only `predict` shows, the tokenizer and its view are None.
    Raises UserError if the model predicts the tokens of another tokenizer.
    """
    model = open_model(args.init, vit.MaskedImageModel)
    tokenizer = token_images = None
    if weights.read_json(Path(args.init).with_name("config.json")).get("target") != "pixels":
        tokenizer, path = open_tokenizer(args)
        known = weights.read_json(Path(args.init).with_name("config.json")).get("inputs", {})
        if known.get("tokenizer_file", describe_file(path)) != describe_file(path):
            raise UserError(f"--tokenizer: {path} is not the one that the model of --init was trained with")
        if tokenizer.vocab_size != model.lm_head.out_features:
            raise UserError(f"--tokenizer: {path} has {tokenizer.vocab_size} codes, but the model of --init "
                            f"predicts {model.lm_head.out_features}")
    elif args.tokenizer or args.what == "pipeline":
        raise UserError(f"--init: must be a model that predicts tokens, but {args.init} predicts pixels")
    h, w = grid = model.config.grid
    images, rng = open_images(args, num_images), np.random.default_rng(args.seed)
    masks = [blockwise_mask(grid, count_masked(args, grid), rng) for _ in images]
    if tokenizer:
        token_images = fit_images(images, h * tokenizer.downsample, w * tokenizer.downsample)
    images = fit_images(images, *model.config.image_hw)
    return model, tokenizer, images, token_images, torch.from_numpy(np.stack(masks))


def resize_model(model, image_hw):
    """The backbone of a model for images of (H, W) pixels, with its positions resized."""
    if image_hw == model.config.image_hw:
        return model
    resized = vit.VisionTransformer(dataclasses.replace(model.config, image_size=image_hw))
    state = weights.resize_positions(model.state_dict(), resized.config, model.config.grid)
    resized.load_state_dict(state, strict=False)                       # strict=False: the head is left out
    return resized.eval()


def parse_patch(name, grid):
    """The patch that --patch names: (row, column) on the grid (h, w), or plots.CLS. Raises UserError."""
    patches = {f"{row},{column}": (row, column) for row, column in np.ndindex(grid)}
    patches[plots.CLS] = plots.CLS
    if name not in patches:
        h, w = grid
        raise UserError(f"--patch: must be S, or ROW,COLUMN from 0,0 to {h - 1},{w - 1} here, got {name}")
    return patches[name]


def read_log(folder):
    """The lines of metrics.jsonl in the folder of a run, a list of dicts. Raises UserError."""
    file = Path(folder) / "metrics.jsonl"
    try:
        lines = file.read_text().split("\n")[:-1]                      # the last may be half written
        log = [json.loads(line) for line in lines]
        if not all(isinstance(line, dict) and "step" in line for line in log):
            raise ValueError("a line without a step")
        if not any("loss" in line for line in log):
            raise ValueError("no line with a loss")
    except (OSError, ValueError) as error:
        raise UserError(f"--runs: {file} is not the log of a training script ({error})") from None
    return log


# ---- A function for each WHAT; its docstring is the help ----

def plot_masks(args):
    """blockwise masks beside random ones, and how often each patch is masked"""
    images, rng = open_images(args, args.count), np.random.default_rng(args.seed)
    num_masked, masks, coverage = count_masked(args, args.grid), {}, {}
    for label, draw_mask in MASKS.items():
        if label != "none":
            masks[label] = [draw_mask(args.grid, num_masked, rng) for _ in images]
            coverage[label] = np.mean([draw_mask(args.grid, num_masked, rng) for _ in range(10_000)], axis=0)
    P = max(1, 112 // max(args.grid))                                  # pixels per side of a patch
    return plots.figure_masks(fit_images(images, P * args.grid[0], P * args.grid[1]), masks, coverage)


@torch.no_grad()
def plot_tokens(args):
    """images, their visual tokens and reconstructions, and patches of the most frequent codes"""
    tokenizer, path = open_tokenizer(args)
    trained = tokenizer.image_size or weights.read_json(path.with_name("config.json")).get("image_size", 112)
    size = args.size or trained                                        # 112 for DALL-E's (sec. 2.1)
    if size % tokenizer.downsample:
        raise UserError(f"--size: must be a multiple of {tokenizer.downsample} for {path}, got {size}")
    images = data.prepare_images(open_images(args, max(args.count, 64)), size)
    tokens = torch.cat([tokenizer.tokenize(batch) for batch in images.split(32)])
    n = len(images) if args.images else args.count
    soft = tokenizer(images[:n], 1 / 16).images
    return plots.figure_tokens(images, tokens, soft, tokenizer.decode(tokens[:n]),
                               colours=partial(plots.token_colours, tokenizer=tokenizer))


def plot_predictions(args):
    """masked images, their reconstructions by the tokenizer, and the model's predictions"""
    return plots.figure_predictions(*plots.predictions(*open_masked(args, args.count)))


@torch.no_grad()
def plot_pipeline(args):
    """one image through the whole method (Figure 1)"""
    model, tokenizer, images, token_images, mask = open_masked(args, 1)
    pictures, _, _ = plots.predictions(model, tokenizer, images, token_images, mask)
    predicted = model(images, mask, torch.arange(mask.numel())).argmax(-1).view(mask.shape)
    return plots.figure_pipeline(images[0], mask[0], tokenizer.tokenize(token_images)[0], predicted[0],
                                 pictures["tokenizer at best"][0], pictures["prediction"][0],
                                 partial(plots.token_colours, tokenizer=tokenizer))


@torch.no_grad()
def plot_attention(args):
    """self-attention of reference patches over an image, by head (Figure 2)"""
    model = open_model(args.init)
    P, depth = model.config.patch_size, model.config.depth
    size = args.size or min(model.config.image_hw)
    if size % P:
        raise UserError(f"--size: must be a multiple of the patch size {P}, got {size}")
    layer = args.layer
    if layer is not None and not 1 <= (layer if layer > 0 else depth + 1 + layer) <= depth:
        raise UserError(f"--layer: must be from 1 to {depth}, or -1 for the last, got {layer}")
    image, = open_images(args, 1)
    H, W = model.config.image_hw
    if H == W:                                                         # then the image keeps its own shape
        W, H = image.size
    H, W = (side * size // min(H, W) // P * P for side in (H, W))      # the shorter side is `size`
    image, = fit_images([image], H, W)
    model = resize_model(model, (H, W))
    h, w = grid = model.config.grid
    launch.say(f"{h}x{w} patches of {P} pixels: --patch ROW,COLUMN is from 0,0 to {h - 1},{w - 1}")
    references = [parse_patch(name, grid) for name in args.patch or []]
    if not references and args.data == "shapes" and not args.images:
        references = object_patches(render_scene("val", args.first)[2], grid)
    references = references or [(h // 2, w // 2), (h // 3, w // 3), (2 * h // 3, 2 * w // 3)]
    reason = ""
    if layer is None:
        layer, moved = plots.most_telling_layer(model, image)
        layer += 1
        reason = f", which depends most on the image: {moved:.0%} of it moves if that is grey"
    index = layer - 1 if layer > 0 else depth + layer
    attention = model.attention_maps(image[None], index)[0]
    title = f"self-attention of layer {index + 1} of {depth}{reason}"
    return plots.figure_attention(image, attention, references, grid, title)


def object_patches(class_map, grid):
    """A patch (row, column) for each class in a scene, the background included: at most four.

    Larger classes come first. Of the patches that a class covers most, the one nearest to its centre.
    """
    h, w = grid
    maps = F.one_hot(torch.from_numpy(class_map).long()).permute(2, 0, 1).float()    # (classes, H, W)
    coverage = F.adaptive_avg_pool2d(maps, grid)                       # (classes, h, w)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    patches = []
    for k in coverage.sum(dim=(1, 2)).argsort(descending=True).tolist():
        share = coverage[k]
        if share.max() >= 0.5:
            y, x = ((share * place).sum() / share.sum() for place in (rows, columns))
            nearest = (share - 0.01 * torch.hypot(rows - y, columns - x)).argmax().item()
            patches.append(divmod(nearest, w))
    return patches[:4]


@torch.no_grad()
def plot_positions(args):
    """similarity of position embeddings, or the tables of relative position bias"""
    model = open_model(args.init)
    if model.config.position == "absolute":
        return plots.figure_position_embeddings(model.pos_embed[0, 1:], model.config.grid)
    tables = [table for name, table in model.named_parameters() if name.endswith("position_bias_table")]
    return plots.figure_position_biases(torch.stack(tables), model.config.grid)


def plot_curves(args):
    """loss, accuracy, learning rate and images per second of one or several runs"""
    paths = [Path(folder).resolve() for folder in args.runs]
    if len(set(paths)) < len(paths):
        raise UserError(f"--runs: must be different folders, got {' '.join(args.runs)}")
    length = 1                                                         # of the shortest labels that differ
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return plots.figure_curves({str(Path(*path.parts[-length:])): read_log(folder)
                                for path, folder in zip(paths, args.runs)})


# ---- Command line ----

COMMANDS = {"masks": plot_masks, "tokens": plot_tokens, "predict": plot_predictions,
            "pipeline": plot_pipeline, "attention": plot_attention, "positions": plot_positions,
            "curves": plot_curves}


def parse_args(argv=None):
    """The flags of `visualize.py WHAT`."""
    parser = launch.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, plot in COMMANDS.items():
        subparsers.add_parser(name, help=plot.__doc__, description=plot.__doc__, allow_abbrev=False,
                              formatter_class=launch.Parser.HelpFormatter)

    def add(commands, flag, type=launch.text, **kwargs):
        for name in commands.split():
            subparsers.choices[name].add_argument(flag, type=type, **kwargs)

    use_tokenizer, use_masks = "tokens predict pipeline", "masks predict pipeline"
    use_model, use_images = f"{use_tokenizer} attention positions", f"masks {use_tokenizer} attention"
    add(use_model, "--init", help="a checkpoint (default: the model.pt of pretrain.py for --data, or shapes)")
    add(use_tokenizer, "--tokenizer", help="model.pt or DALL-E's encoder.pkl (default: that of --init's run)")
    add(use_images, "--images", nargs="+", help="image files, instead of --data")
    add(use_images, "--data", default="shapes",
        help="shapes, fashion-mnist, cifar10, cifar100, or a folder: its held-out images are shown")
    add(use_images, "--data-root", default="data", help="folder with the files of the named data sets")
    add(use_images, "--first", launch.nonnegative_int, default=0, help="index of the first held-out image")
    add("masks tokens", "--count", launch.number(int, 1, MAX_IMAGES), default=8, help="number of images")
    add("predict", "--count", launch.number(int, 1, MAX_IMAGES), default=12, help="number of images")
    add(use_masks, "--ratio", launch.fraction, default=0.4, help="share of masked patches")
    add(use_masks, "--seed", launch.number(int, 0, 2 ** 32 - 1), default=0, help="seed of the masks")
    add("masks", "--grid", launch.positive_int, nargs=2, default=[14, 14], help="rows and columns of patches")
    add("tokens", "--size", launch.positive_int, help="pixels per side (default: as trained)")
    add("attention", "--size", launch.positive_int, help="pixels of the shorter side (default: as trained)")
    add("attention", "--patch", action="append", metavar="ROW,COLUMN",
        help="reference patch, counted from 0, or S for [S]; repeatable (default: on the objects of a scene "
        "of shapes, otherwise on the diagonal)")
    add("attention", "--layer", int, help="layer, counted from 1 as in the paper; -1 is the last (default: "
        "the one whose attention depends most on the image)")
    add("curves", "--runs", nargs="+", default=["runs/pretrain-shapes"], help="folders of runs")
    add(" ".join(COMMANDS), "--dpi", launch.number(int, 1, 1200), default=100, help="pixels per inch")
    add(" ".join(COMMANDS), "--out", help=".png, .pdf, .svg or .jpg file (default: runs/WHAT.png)")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    refuse_without_effect(args.what, {word.partition("=")[0] for word in words})
    args.out = Path(args.out or f"runs/{args.what}.png")
    if args.what in use_model.split() and args.init is None:
        args.init = f"runs/pretrain-{Path(getattr(args, 'data', 'shapes')).resolve().name}/model.pt"
        if Path(args.init).exists() and not (args.what == "tokens" and args.tokenizer):
            check_default("init", args.init, getattr(args, "data", "shapes"))
    return args


def refuse_without_effect(what, given):
    """Raise UserError if the flags that are `given` for a figure make another of them useless."""
    # pairs (flag, another that has no effect beside it)
    replaced = [("--images", flag) for flag in ("--first", "--count", "--data-root")]
    if what == "tokens":
        replaced.append(("--tokenizer", "--init"))
    if what == "masks" or given & {"--init", "--tokenizer"}:      # otherwise --data names the checkpoint
        replaced.append(("--images", "--data"))
    for flag, unused in replaced:
        if {flag, unused} <= given:
            raise UserError(f"{unused}: has no effect with {flag}")


def main():
    with launch.one_line_errors():
        args = parse_args()
        if args.out.resolve() in [Path(path).resolve() for path in getattr(args, "images", None) or []]:
            raise UserError(f"--out: {args.out} is one of --images; name another file")
        if args.out.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg") or args.out.is_dir():
            raise UserError(f"--out: must be a file that ends in .png, .pdf, .svg or .jpg, got {args.out}")
        figure = COMMANDS[args.what](args)
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(args.out, dpi=args.dpi)
        except (OSError, ValueError) as error:                         # ValueError: too many pixels
            raise UserError(f"--out: {args.out} cannot be written "
                            f"({getattr(error, 'strerror', None) or error})") from None
        launch.say(f"written to {args.out}")


if __name__ == "__main__":
    main()
