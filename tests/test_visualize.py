"""Figures: what is drawn is what was computed, where it was computed; and the command line."""
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.style
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import data
import dvae
import masking
import plots
import run_folder
import train_dvae
import visualize
import vit
from folders import IGNORE
from launch import UserError

POSITIONS = pytest.mark.parametrize("position", ["absolute", "relative", "shared_relative"])


def small_model(vocab_size=50, image_size=32, **fields):
    """A masked image model of 4x4 patches."""
    torch.manual_seed(0)
    config = vit.ViTConfig(image_size, patch_size=8, dim=32, depth=3, heads=2, drop_path=0.0, **fields)
    model = vit.MaskedImageModel(config, vocab_size).eval()
    for name, parameter in model.named_parameters():
        if "table" in name:
            parameter.data.normal_()                                   # they are zero at first
    return model.requires_grad_(False)


def small_tokenizer():
    torch.manual_seed(0)
    tokenizer = dvae.DiscreteVAE(vocab_size=50, hidden=8, groups=3, blocks_per_group=1).eval()
    train_dvae.initialise_codes(tokenizer, scenes(8, 16))
    return tokenizer.requires_grad_(False)


def scenes(count, size):
    return data.prepare_images([data.Shapes("val")[i][0] for i in range(count)], size)


def shown(axis, index=0):
    """The array of an image that an axis shows, (3, H, W) if it has colours."""
    array = torch.as_tensor(np.asarray(axis.images[index].get_array()))
    return array.permute(2, 0, 1) if array.dim() == 3 else array


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


# ---- All figures ----

def draw_figures():
    """name -> function without arguments that draws a small figure."""
    images, mask = torch.rand(2, 3, 16, 16), torch.ones(2, 4, 4, dtype=torch.bool).tril()
    image, tokens = images[0], torch.arange(32).view(2, 4, 4)
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    return {
        "masks": lambda: plots.figure_masks(images, {"random": mask.numpy()}, {"random": np.eye(4)}),
        "tokens": lambda: plots.figure_tokens(images, tokens, images, images / 2),
        "reconstructions": lambda: plots.figure_reconstructions({"original": images}),
        "predictions": lambda: plots.figure_predictions({"original": images}, mask, mask),
        "attention": lambda: plots.figure_attention(image, torch.rand(2, 17, 17), [(1, 2)], (4, 4)),
        "by layer": lambda: plots.figure_by_layer({"probe": {"a": [0.1, 0.2]}}, "accuracy"),
        "embeddings": lambda: plots.figure_position_embeddings(torch.rand(4, 8), (2, 2)),
        "biases": lambda: plots.figure_position_biases(torch.rand(1, 52, 2), (4, 4)),
        "curves": lambda: plots.figure_curves({"run": log}),
        "classes": lambda: plots.figure_classes(images, [0, 1], torch.eye(2), ["$a$", "$b$"]),
        "segments": lambda: plots.figure_segments(images, mask.long(), tokens // 16, ["a", "b"]),
        "pipeline": lambda: plots.figure_pipeline(image, mask[0], *tokens, image, image)}


@pytest.mark.parametrize("name", draw_figures())
def test_settings_of_the_user_change_no_figure(name):
    def saved_and_drawn():
        torch.manual_seed(0)
        file, figure = io.BytesIO(), draw_figures()[name]()
        figure.savefig(file, format="png", dpi=30)
        canvas = FigureCanvasAgg(figure)                               # as Jupyter draws a figure
        canvas.draw()
        return file.getvalue(), bytes(canvas.buffer_rgba())

    expected = saved_and_drawn()
    settings = {"image.origin": "lower", "font.size": 20, "savefig.facecolor": "green",
                "savefig.bbox": "tight", "text.parse_math": True, "axes.grid": True, "image.cmap": "gray",
                "lines.linewidth": 5, "text.usetex": True, "figure.dpi": 30, "savefig.dpi": 10,
                "font.family": "serif", "xtick.labelsize": 30, "savefig.transparent": True,
                "axes.formatter.use_locale": True, "xtick.color": "red", "xtick.minor.visible": True}
    with matplotlib.style.context(["dark_background", settings]):
        before = dict(matplotlib.rcParams)
        assert saved_and_drawn() == expected
        assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("backend", ["none-of-this-name", pytest.param("svg", marks=pytest.mark.long)])
def test_draws_without_a_display_whatever_the_backend_of_the_notebook(tmp_path, backend):
    """It may not be installed here. If it is, it remains that of pyplot."""
    program = f"""if True:
        import os, torch, plots
        plots.figure_reconstructions({{"a": torch.rand(1, 3, 8, 8)}}).savefig("a.png")
        assert os.environ["MPLBACKEND"] == "{backend}"
        assert (plots.matplotlib.get_backend() == "svg") == ("{backend}" == "svg")"""
    env = {"PYTHONPATH": str(ROOT), "MPLCONFIGDIR": matplotlib.get_cachedir(), "MPLBACKEND": backend}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, check=True)
    assert np.array(Image.open(tmp_path / "a.png"))[..., :3].std() > 5


@pytest.mark.parametrize("count", [3, 11, 60])
def test_entries_of_legends_differ(count):
    labels = [f"run {i}" for i in range(count)]
    panels = {"half": {label: [1, 2] for label in labels[::2]}, "all": {label: [1, 2] for label in labels}}
    for figure in (plots.figure_by_layer(panels, "ratio"),
                   plots.figure_curves({label: [{"step": 1, "loss": 1.0}] for label in labels})):
        assert sorted(legend_texts(figure.legends[0])) == sorted(labels)
        styles = [line_style(line) for line in figure.legends[0].get_lines()]
        assert len(set(styles)) == count
        assert len({line_style(line) for axis in figure.axes[:2] for line in axis.lines}) >= count


def line_style(line):
    return matplotlib.colors.to_hex(line.get_color()), line.get_marker(), line.get_linestyle()


LONG = "an-experiment-named-by-its-hyperparameters-lr0.001-wd0.05-" * 3


@pytest.mark.parametrize("names, expected", [
    (["a", "$b$", "_c"], ["a", "$b$", " _c"]),
    ([LONG + "1", LONG + "2"], [f"an-experiment-named-…ers-lr0.001-wd0.05-{i}" for i in "12"]),
    ([f"{LONG}1{LONG}", f"{LONG}2{LONG}"], [f"{i}: an-experiment-named-…ters-lr0.001-wd0.05-" for i in "12"]),
    (["\U0001fae8\n", "\udcff"], ["\\U0001fae8\\n", "\\xff"]), (["crane", "crane"], ["crane", "crane"])])
def test_labels_are_short_and_differ(names, expected):
    assert plots.short_labels(names) == expected


def crowded_figures():
    """name -> function without arguments that draws a figure of much."""
    images, tokens = torch.rand(40, 3, 16, 16), torch.arange(320).view(20, 4, 4)
    names = ["犬", "猫", *(f"{i} {LONG}" for i in range(148))]
    log, mask = [{"step": 1, "loss": 2.0, "val_loss": 1.0}], torch.ones(40, 4, 4, dtype=torch.bool).tril()
    return {
        "reconstructions": lambda: plots.figure_reconstructions(dict.fromkeys("ab", images)),
        "masks": lambda: plots.figure_masks(images, {"random": mask.numpy()}, {"random": np.eye(4)}),
        "tokens": lambda: plots.figure_tokens(images[:20], tokens, images[:20], images[:20], 1),
        "one image": lambda: plots.figure_tokens(images[:1], tokens[:1], images[:1], images[:1]),
        "by layer": lambda: plots.figure_by_layer({"": {name: range(24) for name in names[:30]}}, "accuracy"),
        "curves": lambda: plots.figure_curves({name: log for name in names[:24]}),
        "classes": lambda: plots.figure_classes(images[:9], range(9), torch.rand(9, 150).softmax(1), names),
        "segments": lambda: plots.figure_segments(images[:9], tokens[:9], tokens[:9], names)}


@pytest.mark.long
@pytest.mark.filterwarnings("error::UserWarning")                      # no room, no glyph
@pytest.mark.parametrize("name", crowded_figures())
def test_crowded_figures_have_room_for_all_texts(name):
    figure = crowded_figures()[name]()
    figure.set_dpi(50)
    figure.draw_without_rendering()
    ticks = {text for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels())}
    texts = [text for text in set(figure.findobj(matplotlib.text.Text)) - ticks if text.get_visible()]
    boxes = [text.get_window_extent().padded(-1) for text in texts if text.get_text().strip()]
    size = figure.bbox.padded(1)
    for i, box in enumerate(boxes):
        assert size.x0 <= box.x0 and box.x1 <= size.x1 and size.y0 <= box.y0 and box.y1 <= size.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
    assert all(axis.bbox.height > 15 for axis in figure.axes) and max(size.size) < 3000


def test_classes_have_different_colours():
    palette = plots.class_colours()
    assert len(np.unique(palette.round(2), axis=0)) == 256
    assert (palette[0] == 0).all() and (palette[IGNORE] == 1).all()


# ---- Masks and tokens ----

def test_masks_figure():
    images, cells = torch.rand(2, 3, 32, 48) * 0.3, np.zeros((2, 4, 6), bool)
    cells[0, 1, 2] = cells[0, 3, 0] = cells[1, 2, 2] = True
    coverage = {"blockwise": np.arange(24).reshape(4, 6) / 23, "random": np.ones((4, 6))}
    figure = plots.figure_masks(images, {"blockwise": cells, "random": cells}, coverage)
    grey = (shown(figure.axes[0]) == 0.5).all(0)
    assert torch.equal(grey, torch.from_numpy(cells[0]).repeat_interleave(8, 0).repeat_interleave(8, 1))
    assert figure.axes[0].get_ylabel() == "blockwise\n2 of 24"
    np.testing.assert_array_equal(shown(figure.axes[2]), coverage["blockwise"])
    assert figure.axes[2].get_xlabel() == "corner 0.00\nedge 0.13\ncentre 0.65"


def test_tokens_figure_shows_the_most_frequent_codes_and_their_patches():
    images = torch.zeros(1, 3, 4, 4)
    images[0, :, :2, :2] = images[0, :, 2:, 2:] = 0.9
    figure = plots.figure_tokens(images, torch.tensor([[[5, 2], [8000, 5]]]), images, images / 2)
    *pictures, first, second, third = figure.axes
    assert first.get_title() == "5: 50.0%" and not third.images
    assert all((shown(axis) == 0.9).all() for axis in (first, second))
    colours = shown(pictures[1]).flatten(1).t()                        # the same for the same token
    assert torch.equal(colours[0], colours[3]) and len(colours.unique(dim=0)) == 3
    assert pictures[3].get_ylabel() == "hard codes\nMSE 0.1013"


# ---- Predictions ----

def test_predictions_are_the_models_at_masked_patches_and_the_truth_elsewhere():
    tokenizer, model, images, token_images = small_tokenizer(), small_model(), scenes(3, 32), scenes(3, 16)
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(np.stack([masking.blockwise_mask((4, 4), 6, rng) for _ in range(3)]))
    pictures, _, correct = plots.predictions(model, tokenizer, images, token_images, mask)
    true_tokens = tokenizer.tokenize(token_images)
    tokens = true_tokens.clone()
    tokens[mask] = model(images, mask).argmax(-1)
    assert torch.equal(pictures["prediction"], tokenizer.decode(tokens))
    assert torch.equal(pictures["tokenizer at best"], tokenizer.decode(true_tokens))
    assert torch.equal(correct, tokens == true_tokens)
    correct = mask.clone()
    correct[0, ~mask[0]] = True                                        # not masked, and so not outlined
    axis, = plots.figure_predictions(pictures, mask, correct).axes
    assert [text.get_text() for text in axis.texts].count("6 of 6") == 3
    for i, k in enumerate((3, 7, 11)):                                 # two images a row, four pictures each
        shown_picture = torch.as_tensor(axis.images[k].get_array()).permute(2, 0, 1)
        torch.testing.assert_close(shown_picture, pictures["prediction"][i], atol=0.01, rtol=0)
        x, y = axis.lines[i].get_data()                                # dots at the patches that are correct
        left, right, bottom, top = axis.images[k].get_extent()
        rows, columns = 4 * (y - top) // (bottom - top), 4 * (x - left) // (right - left)
        assert set(zip(rows, columns)) == set(map(tuple, mask[i].nonzero().tolist()))


def test_the_outline_of_an_area():
    area = torch.tensor([[True, True, False], [False, True, False]])
    edges = {tuple(sorted(edge)) for edge in plots.edges_of(area)}
    horizontal = {((0, 0), (1, 0)), ((1, 0), (2, 0)), ((0, 1), (1, 1)), ((1, 2), (2, 2))}
    vertical = {((0, 0), (0, 1)), ((2, 0), (2, 1)), ((1, 1), (1, 2)), ((2, 1), (2, 2))}
    assert edges == horizontal | vertical and len(plots.edges_of(area)) == 8


def test_a_gallery_keeps_a_column_for_each_evaluation():
    images, seen = torch.rand(6, 3, 8, 8), []

    def look():
        seen.append(len(seen) / 40)
        pictures = {"original": images, "prediction": torch.full((6, 3, 4, 4), seen[-1])}
        return pictures, torch.ones(6, 2, 2, dtype=torch.bool), None

    gallery = plots.Gallery("predictions.png", look, plots.figure_predictions, "val_loss")
    for step in range(5):
        gallery.update(10 * step, {"val_loss": 3.0 - step})
    restored = plots.Gallery("predictions.png", look, plots.figure_predictions, "val_loss")
    restored.load_state_dict(gallery.state_dict())                     # after a kill
    for step in range(5, 14):
        restored.update(10 * step, {"val_loss": 3.0 - step})
    titles = [title.split("\n") for title, _ in restored.columns]
    assert [title[0] for title in titles] == [f"step {step}" for step in (0, 20, 40, 60, 80, 100, 120, 130)]
    assert titles[2] == ["step 40", "val loss -1"] and len(restored.columns) <= restored.MAX_COLUMNS
    for (_, pictures), step in zip(restored.columns, (0, 2, 4, 6, 8, 10, 12, 13)):
        assert pictures.shape == (4, 3, 4, 4) and (pictures == round(255 * step / 40)).all()
    restored.update(130, {"val_loss": -10.0})                          # measured again: replaces its column
    assert len(restored.columns) == 8
    figures = restored.figures()
    assert list(figures) == ["predictions.png", "progress.png"]
    assert len(figures["progress.png"]().axes[0].images) == 4 * 9      # and the original
    assert len(figures["predictions.png"]().axes[0].images) == 6 * 2


def test_predictions_without_masks_without_decoder_and_of_pixels():
    tokenizer, images, token_images = small_tokenizer(), scenes(2, 32), scenes(2, 16)
    tokenizer.decoder, model, mask = None, small_model(), torch.zeros(2, 4, 4, dtype=torch.bool)
    pictures, _, correct = plots.predictions(model, tokenizer, images, token_images, mask)
    tokens = model(images, mask, torch.arange(32)).argmax(-1).view(2, 4, 4)
    assert torch.equal(correct, tokens == tokenizer.tokenize(token_images))
    assert torch.equal((pictures["correct tokens"] == 0.5).all(1)[:, ::8, ::8], ~correct)
    figure = plots.figure_predictions(pictures, mask, torch.ones_like(correct))
    assert [text.get_text() for text in figure.axes[0].texts].count("16 of 16") == 2
    mask[:, 1:3, 1:3] = True
    model = vit.MaskedImageModel(model.config, 3 * 8 * 8).eval()
    pictures, _, correct = plots.predictions(model, None, images, None, mask)
    visible = ~mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(pictures["prediction"][visible], images[visible])
    assert not torch.allclose(pictures["prediction"][~visible], images[~visible])
    assert correct is None and len(plots.figure_predictions(pictures, mask).axes[0].images) == 6


def test_the_pipeline_shows_predicted_and_true_tokens():
    mask = torch.tensor([[True, False], [True, False]])
    tokens, predicted = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [5, 4]])
    image, reconstruction, prediction = torch.rand(3, 8, 8), torch.rand(3, 4, 4), torch.rand(3, 4, 4)
    figure = plots.figure_pipeline(image, mask, tokens, predicted, reconstruction, prediction)
    above, below = figure.axes[:9], figure.axes[9:]
    for axis, grid in ((above[6], predicted), (below[4], tokens)):
        colours = torch.where(mask, plots.token_colours(grid), 1.0)
        torch.testing.assert_close(shown(axis), colours.float())
    assert torch.equal(shown(above[8]), prediction) and torch.equal(shown(below[8]), reconstruction)
    assert torch.equal((shown(above[4]) == 0.5).all(0)[::4, ::4], mask)
    outlined = [patch.get_xy() for patch in above[6].patches if patch.get_width() == 1]
    assert set(outlined) == {(-0.5, -0.5)} and "1 of 2 correct" in below[6].texts[0].get_text()


# ---- Attention ----

@POSITIONS
def test_a_resized_model_keeps_its_weights_and_attends_on_another_grid(position):
    model = small_model(position=position)
    assert visualize.resize_model(model, (32, 32)) is model
    wide = visualize.resize_model(model, (32, 64))
    assert torch.equal(wide.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert wide.attention_maps(torch.rand(1, 3, 32, 64)).shape == (1, 2, 33, 33)


def shifted_attention(grid, rows, columns):
    """Each patch attends to the one `rows` and `columns` further, around the edges, and [S] to patch 0."""
    (h, w), attention = grid, torch.zeros(1 + grid[0] * grid[1], 1 + grid[0] * grid[1])
    attention[0, 1] = 1
    for row, column in np.ndindex(grid):
        attention[1 + row * w + column, 1 + (row + rows) % h * w + (column + columns) % w] = 1
    return attention


def test_the_marked_patch_is_the_one_whose_attention_lies_over_the_image():
    grid = (4, 6)
    maps = torch.stack([shifted_attention(grid, 1, 2), shifted_attention(grid, 0, 0)])
    figure = plots.figure_attention(torch.rand(3, 32, 48), maps, [(2, 1), "S"], grid)
    assert [axis.get_title() for axis in figure.axes[:4]] == ["", "mean of heads", "head 1", "head 2"]
    image, mean, first, second, image_of_cls, *maps_of_cls = figure.axes
    assert (image.get_ylabel(), image_of_cls.get_ylabel()) == ("patch 2,1", "[S]")
    *lines, dot = image.lines
    (x,), (y,) = dot.get_data()
    assert (int(y + 0.5) // 8, int(x + 0.5) // 8) == (2, 1)
    assert len(lines) == len(image_of_cls.lines) == 3 + 5              # of the grid; [S] is at no patch
    assert [*image.get_xticks()] == [8 * i + 3.5 for i in range(6)]
    for axis, cells in ((mean, {(3, 3): 0.5, (2, 1): 0.5}), (first, {(3, 3): 1}), (second, {(2, 1): 1}),
                        (maps_of_cls[2], {(0, 0): 1})):
        heatmap = shown(axis, 1)
        assert {tuple(cell): heatmap[tuple(cell)] for cell in heatmap.nonzero().tolist()} == cells
        assert all([*picture.get_extent()] == [-0.5, 47.5, 31.5, -0.5] for picture in axis.images)
    assert mean.images[1].get_clim()[1] == 0.5                         # the largest of the other patches
    assert second.images[1].get_clim()[1] < 1e-9


def test_lines_by_layer():
    panels = {"all": {"a": [0.2, 0.4, 0.3], "b": [0.1, 0.1, 0.1]}, "far": {"b": [1, 2, 3], "_c": [1, 1, 1]}}
    figure = plots.figure_by_layer(panels, "ratio")
    first, second = figure.axes
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[1, 0.2], [2, 0.4], [3, 0.3]])
    assert first.lines[1].get_color() == second.lines[0].get_color()   # both are b
    assert first.get_title() == "all" and first.get_ylabel() == "ratio"
    assert legend_texts(figure.legends[0]) == ["a", "b", " _c"]
    figure = plots.figure_by_layer({"deep": {"a": range(24)}, "shallow": {"a": range(3)}}, "ratio")
    assert all([*axis.get_xticks()] == [*range(1, 25, 2)] for axis in figure.axes)


# ---- Results, positions, curves ----

def test_results_of_finetuning_are_drawn():
    images, classes = torch.rand(3, 3, 16, 16), ["a", "$b$", "c"]      # a $ is no formula
    probabilities = torch.tensor([0.1, 0.7, 0.2]).expand(3, 3)
    figure = plots.figure_classes(images, [1, 0, 2], probabilities, classes)
    picture, bars, _, other_bars = figure.axes[:4]
    assert picture.get_title() == "$b$" and picture.title.get_parse_math() is False
    assert [text.get_text() for text in other_bars.texts] == ["$b$  70%", "c  20%", "a  10%"]
    true, wrong, _ = bars.patches
    assert true.get_width() == pytest.approx(0.7) and sum(true.get_facecolor()) < sum(wrong.get_facecolor())
    assert true.get_facecolor() == other_bars.patches[2].get_facecolor()
    truth = torch.zeros(16, 16, dtype=torch.uint8)
    truth[8:], truth[0] = 1, IGNORE
    figure = plots.figure_segments(images, [truth] * 3, [truth.clamp(max=1)] * 3, classes)
    assert legend_texts(figure.legends[0]) == ["a", "$b$"]
    colours = shown(figure.axes[1])
    assert (colours[:, 0] == 1).all() and (colours[:, 1:8] == 0).all() and len(colours[:, 8:].unique()) > 1


def test_position_embeddings():
    embeddings = small_model().pos_embed[0, 1:]
    figure = plots.figure_position_embeddings(embeddings, (4, 4))
    assert (figure.axes[0].get_ylabel(), figure.axes[1].get_title()) == ("row 0", "column 1")
    for i in range(16):                                                # a 4x4 grid is shown in full
        assert shown(figure.axes[i]).argmax() == i
        assert shown(figure.axes[i]).max() == pytest.approx(1)
    figure = plots.figure_position_embeddings(torch.rand(9 * 20, 8), (9, 20))
    assert len(figure.axes) == 7 * 7 + 1 and figure.axes[6].get_title() == "column 19"


@pytest.mark.parametrize("layers, labels", [(1, ["all layers"]), (2, ["layer 1", "layer 2"])])
def test_position_biases(layers, labels):
    tables = torch.zeros(layers, 52, 2)
    tables[:, :-3, 1] = torch.arange(49.0)                             # by offset of the query from the key
    figure = plots.figure_position_biases(tables, (4, 4))
    picture = shown(figure.axes[1])
    assert picture[-1, -1] == 0 and picture[0, 0] == picture.max() == 48    # the key is above, to the left
    assert [axis.get_ylabel() for axis in figure.axes[:-1:2]] == labels


def write_log(folder, steps=50):
    folder.mkdir(parents=True)
    lines = [dict(step=i, loss=5 - i / 20, accuracy=i / 100, lr=1e-3, images_per_second=100 + i % 3,
                  unigram_entropy=4.5, majority_accuracy=0.1, chance_loss=5.2) for i in range(1, steps + 1)]
    lines[-1]["val_loss"] = 2.6
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_of_several_runs(tmp_path):
    logs = {"a": visualize.read_log(write_log(tmp_path / "a", steps=160)),
            "b": visualize.read_log(write_log(tmp_path / "b", steps=20)),
            "pixels": [{"step": 1, "loss": 0.9, "mean_loss": 0.8}]}
    figure = plots.figure_curves(logs)
    loss, accuracy, _, speed = figure.axes
    assert legend_texts(figure.legends[0]) == ["a", "b", "pixels"]
    assert legend_texts(loss.get_legend()) == ["unigram entropy", "chance loss", "mean loss"]
    assert accuracy.get_legend() and not speed.get_legend()
    assert [line.get_ydata()[0] for line in loss.lines if line.get_linestyle() == ":"] == [5.2, 5.2]
    points, others = [line for line in loss.lines if line.get_linestyle() == "None"]
    assert points.get_xydata().tolist() == [[160, 2.6]] and points.get_marker() != others.get_marker()
    first, second, _ = [line for line in loss.lines if line.get_alpha() == 0.35]
    assert first.get_color() != second.get_color() and len(second.get_xdata()) == 20
    np.testing.assert_allclose(first.get_ydata(), 5 - np.arange(1, 161) / 20)
    thin, thick = (line.get_ydata() for line in speed.lines[:2])
    five = [thin[max(0, i - 2):i + 3].mean() for i in range(160)]      # a centred mean of five values
    np.testing.assert_allclose(thick, five)


def test_logs_that_are_half_written_or_damaged(tmp_path):
    file = write_log(tmp_path / "a") / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 51, "lo')                        # a run that is writing
    assert [line["step"] for line in visualize.read_log(tmp_path / "a")] == list(range(1, 51))
    for text in (whole + '{"step": 51, "lo\n', "[1]\n", '{"loss": 1}\n', None):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(UserError, match="^--runs: .*a/metrics.jsonl is not the log of a training script"):
            visualize.read_log(tmp_path / "a")


# ---- Command line ----

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, and in runs/pretrain-shapes a model and a tokenizer with random weights."""
    folder = tmp_path_factory.mktemp("visualize")
    tokenizer, model = small_tokenizer(), small_model(position="shared_relative")
    config = {"vit": dataclasses.asdict(model.config), "vocab_size": 50}
    out = write_log(folder / "runs/pretrain-shapes")
    (out / "config.json").write_text('{"data": "shapes"}')
    (out / "tokenizer").mkdir()
    (out / "tokenizer/config.json").write_text('{"image_size": 16}')
    for name, saved, sizes in (("tokenizer/model.pt", tokenizer, tokenizer.config),
                               ("bare.pt", tokenizer, tokenizer.config), ("model.pt", model, config)):
        torch.save({"kind": type(saved).__name__, "config": sizes, "model": saved.state_dict()}, out / name)
    inputs = {"tokenizer_file": run_folder.describe_file(out / "tokenizer/model.pt")}
    (out / "config.json").write_text(json.dumps({"data": "shapes", "inputs": inputs}))
    pixels, wide = small_model(3 * 8 * 8), small_model(image_size=(32, 48))
    for name, saved in (("pixels", pixels), ("wide", wide)):
        write_log(folder / name)
        config = {"vit": dataclasses.asdict(saved.config), "vocab_size": saved.lm_head.out_features}
        torch.save({"kind": "MaskedImageModel", "config": config, "model": saved.state_dict()},
                   folder / name / "model.pt")
    (folder / "pixels/config.json").write_text('{"target": "pixels"}')
    rng = np.random.default_rng(0)
    for name, size, mode in (("large.jpg", (2400, 1800), "RGB"), ("grey.png", (70, 50), "L"),
                             ("icon.png", (30, 20), "RGBA")):
        noise = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        noise.resize(size).convert(mode).save(folder / name)
    return folder


def draw(monkeypatch, folder, words):
    monkeypatch.chdir(folder)
    what, *flags = words.split()
    monkeypatch.setattr(sys, "argv", ["visualize.py", what, "--out", "out.png", "--dpi", "40", *flags])
    visualize.main()


@pytest.mark.parametrize("words", [
    "masks --grid 6 9 --ratio 0.2 --count 2", "tokens --count 2", "tokens --images icon.png",
    "tokens --count 1 --tokenizer runs/pretrain-shapes/bare.pt", "predict --count 3",
    "predict --count 1 --ratio 0.6", "predict --images large.jpg grey.png icon.png",
    "attention --patch 1,2 --patch S", "attention --images grey.png --size 64", "positions", "curves",
    "pipeline", "pipeline --images large.jpg", "predict --count 1 --init pixels/model.pt"])
def test_each_command_draws(monkeypatch, folder, words):
    draw(monkeypatch, folder, words)
    picture = np.array(Image.open("out.png"))[..., :3]
    assert min(picture.shape[:2]) > 80 and picture.std() > 5


def test_masks_are_drawn_as_asked_for(monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "figure_masks", lambda images, masks, coverage: drawn.update(masks))
    visualize.plot_masks(visualize.parse_args("masks --grid 10 10 --ratio 0.29 --count 3 --seed 7".split()))
    assert list(drawn) == ["blockwise", "random"]                      # not "none", which masks nothing
    rng = np.random.default_rng(7)
    for mask in drawn["blockwise"]:
        np.testing.assert_array_equal(mask, masking.blockwise_mask((10, 10), 29, rng))


@pytest.mark.parametrize("layer, index", [("1", 0), ("3", 2), ("-1", 2), ("-3", 0)])
def test_the_attention_command_draws_the_layer_and_patches_asked_for(folder, layer, index):
    """Layers count from 1 on the command line, and from 0 in Python."""
    path = f"{folder}/runs/pretrain-shapes/model.pt"
    words = f"attention --init {path} --layer {layer} --first 2 --patch 1,2 --patch S"
    axes = visualize.plot_attention(visualize.parse_args(words.split())).axes
    model, image = visualize.open_model(path), scenes(3, 32)[2]
    maps = model.attention_maps(image[None], index)[0].detach()
    assert [axis.get_ylabel() for axis in axes[::4]] == ["patch 1,2", "[S]"]
    torch.testing.assert_close(shown(axes[3], 1), maps[1, 1 + 1 * 4 + 2, 1:].view(4, 4))
    torch.testing.assert_close(shown(axes[7], 1), maps[1, 0, 1:].view(4, 4))
    assert axes[0].figure.get_suptitle() == f"self-attention of layer {index + 1} of 3"
    assert (shown(axes[0]) - image).abs().mean() < 0.02                # resized by another function


def test_the_attention_command_by_default_and_on_a_photo(folder, capsys):
    """References are on the background and the object of a scene, but on the diagonal of a photo."""
    words = ["attention", "--init", f"{folder}/runs/pretrain-shapes/model.pt"]
    figure = visualize.plot_attention(visualize.parse_args(words))
    assert [axis.get_ylabel() for axis in figure.axes[::4]] == ["patch 0,1", "patch 2,2"]
    assert "4x4 patches of 8 pixels: --patch ROW,COLUMN is from 0,0 to 3,3" in capsys.readouterr().out
    assert "which depends most on the image" in figure.get_suptitle()
    words += ["--images", f"{folder}/grey.png", "--size", "64"]
    axes = visualize.plot_attention(visualize.parse_args(words)).axes
    assert shown(axes[0]).shape == (3, 64, 88)                         # 64x90, cut to whole patches


def test_references_on_objects():
    class_map = np.zeros((16, 16), np.uint8)
    class_map[2:14, 5:12] = 3                                          # rows 2 to 13, columns 5 to 11
    class_map[0:4, 12:16] = 7
    class_map[15, 0] = 5                                               # covers no patch by half
    assert visualize.object_patches(class_map, (4, 4)) == [(2, 0), (1, 2), (0, 3)]


def test_the_most_telling_layer():
    """In the second of three layers, each patch attends to the brightest one; the others ignore the image."""
    def attention_maps(images, layer):
        even = torch.full((len(images), 2, 5, 5), 0.2)
        brightest = F.one_hot(1 + images.mean(dim=(1, 2)).argmax(dim=-1), 5).float()
        return 0.5 * even + 0.5 * brightest[:, None, None] if layer == 1 else even

    image = torch.zeros(3, 4, 4)
    image[..., 2] = 1
    model = SimpleNamespace(attention_maps=attention_maps, config=SimpleNamespace(depth=3))
    assert plots.most_telling_layer(model, image) == (1, pytest.approx(0.5))


@pytest.mark.parametrize("argv, data_name", [
    ("positions", "shapes"), ("predict", "shapes"), ("predict --data /data/photos/", "photos")])
def test_the_checkpoint_of_the_same_data_is_the_default(argv, data_name):
    assert visualize.parse_args(argv.split()).init == f"runs/pretrain-{data_name}/model.pt"


def test_unreadable_held_out_images(tmp_path):
    """The next one is taken; if there is none, the first is named."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.png").write_bytes(b"nothing")
    args = visualize.parse_args(["masks", "--data", str(tmp_path)])
    with pytest.raises(OSError, match="^--data: .*0.png cannot be read"):
        visualize.open_images(args, 1)
    Image.new("RGB", (8, 6)).save(tmp_path / "val" / "1.png")
    assert [image.size for image in visualize.open_images(args, 2)] == [(8, 6)] * 2


@pytest.mark.parametrize("words, message", [line.strip().split(" | ") for line in """
    masks --first 5000 | --first: must be from 0 to 999 for shapes, got 5000
    attention --first 1000 | --first: must be from 0 to 999 for shapes, got 1000
    attention --images grey.png icon.png | --images: attention shows at most 1, got 2 files
    pipeline --images grey.png icon.png | --images: pipeline shows at most 1, got 2 files
    predict --images grey.png --count 1 | --count: has no effect with --images
    tokens --images grey.png --first=1 | --first: has no effect with --images
    attention --data-root a --images grey.png | --data-root: has no effect with --images
    masks --data cifar10 --images grey.png | --data: has no effect with --images
    pipeline --data a --init a --images grey.png | --data: has no effect with --images
    tokens --init a.pt --tokenizer b.pt | --init: has no effect with --tokenizer
    tokens --images grey.png --out ./grey.png | --out: grey.png is one of --images; name another file
    attention --data other/shapes | --init: runs/pretrain-shapes/model.pt was trained on shapes, and --data
    predict --tokenizer runs/pretrain-shapes/bare.pt | --tokenizer: runs/pretrain-shapes/bare.pt is not
    masks --count 101 | argument --count: must be from 1 to 100, got 101
    pipeline --init pixels/model.pt | --init: must be a model that predicts tokens, but pixels
    predict --init pixels/model.pt --tokenizer a.pt | --init: must be a model that predicts tokens, but pixels
    curves --runs wide ./wide/ | --runs: must be different folders, got wide ./wide/
    curves --runs wide empty | --runs: empty/metrics.jsonl is not the log of a training script (no line with a
    """.strip().splitlines()])
def test_what_would_have_no_effect_is_refused_in_one_line(monkeypatch, capsys, folder, words, message):
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "empty/metrics.jsonl").write_text('{"step": 1, "speed": 2}\n')
    (folder / "out.png").unlink(missing_ok=True)
    with pytest.raises(SystemExit):
        draw(monkeypatch, folder, words)
    line = capsys.readouterr().err.splitlines()[-1].removeprefix(f"visualize.py {words.split()[0]}: error: ")
    assert line.removeprefix("visualize.py: error: ").startswith(message) and not Path("out.png").exists()


def test_a_picture_that_cannot_be_written_is_refused_with_the_reason(monkeypatch, capsys, folder):
    """The sides of a JPEG are at most 65,500 pixels."""
    figure = plots.StyledFigure(figsize=(2000, 0.5))
    monkeypatch.setitem(visualize.COMMANDS, "positions", lambda args: figure)
    with pytest.raises(SystemExit):
        draw(monkeypatch, folder, "positions --out out.jpg")
    assert "cannot be written (None)" not in capsys.readouterr().err


def test_all_images_of_the_command_line_and_no_image_twice(monkeypatch, capsys, folder):
    monkeypatch.chdir(folder)
    axes = visualize.plot_tokens(visualize.parse_args(["tokens", "--images", *["grey.png"] * 9])).axes
    assert all(shown(axis).shape == (3, 16, 16) for axis in axes[:9]) and len(axes) == 7 * 9
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 5)
    axes = visualize.plot_tokens(visualize.parse_args("tokens --first 2".split())).axes
    assert len(axes) == 7 * 3 and "from --first 2 on there are 3 held-out images" in capsys.readouterr().out


@pytest.mark.parametrize("image_size", [(48, 32), (32, 48)])
def test_models_of_rectangles_are_drawn_at_their_size(tmp_path, folder, image_size):
    model, (H, W) = small_model(image_size=image_size), image_size
    config = {"vit": dataclasses.asdict(model.config), "vocab_size": 50}
    torch.save({"kind": "MaskedImageModel", "config": config, "model": model.state_dict()}, tmp_path / "a.pt")

    def first_image(words):
        args = visualize.parse_args([*words.split(), "--init", f"{tmp_path}/a.pt"])
        return shown(visualize.COMMANDS[args.what](args).axes[0])

    tokenizer = f"--tokenizer {folder}/runs/pretrain-shapes/bare.pt"
    square = scenes(1, 48)[0]
    expected = square[:, :, 8:40] if H > W else square[:, 8:40]
    for words in (f"predict --count 1 {tokenizer}", f"pipeline {tokenizer}", "attention"):
        image = first_image(words)
        assert image.shape == (3, H, W) and (image - expected).abs().mean() < 0.01
    assert first_image(f"attention --images {folder}/large.jpg --size 16").shape == (3, H // 2, W // 2)
    assert first_image("positions").shape == model.config.grid
    args = visualize.parse_args("masks --count 1 --grid".split() + [str(H // 8), str(W // 8)])
    image = shown(visualize.plot_masks(args).axes[0])
    assert image.shape[1] * W == image.shape[2] * H


def test_runs_are_named_by_the_shortest_paths_that_differ(tmp_path):
    folders = [write_log(tmp_path / name) for name in ("a/run", "b/run", "b/c/long")]
    figure = visualize.plot_curves(visualize.parse_args(["curves", "--runs", *map(str, folders)]))
    assert legend_texts(figure.legends[0]) == ["a/run", "b/run", "c/long"]
    figure = visualize.plot_curves(visualize.parse_args(["curves", "--runs", *map(str, folders[1:])]))
    assert legend_texts(figure.legends[0]) == ["run", "long"]
