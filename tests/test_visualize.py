"""Figures: what is drawn is what was computed, where it was computed; and the command line."""
import dataclasses
import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import data
import dvae
import masking
import visualize
import vit
from training import UserError

SMALL = dict(image_size=32, patch_size=8, dim=32, depth=3, heads=2, drop_path=0.0)


def model_of(**fields):
    torch.manual_seed(0)
    return vit.MaskedImageModel(vit.ViTConfig(**{**SMALL, **fields}), vocab_size=50).eval()


def small_tokenizer():
    torch.manual_seed(0)
    tokenizer = dvae.DiscreteVAE(vocab_size=50, hidden=8, groups=3, blocks_per_group=1).eval()
    tokenizer.initialise_codes(scenes(8, 16))
    return tokenizer


def drawn(figure):
    """The figure's pixels (H, W, 3), and for each of its axes with data (axis, its part of them)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(float)
    panels = []
    for axis in figure.axes:
        if axis.images or axis.lines or axis.patches or axis.collections:
            box = axis.get_window_extent()
            rows = slice(round(len(pixels) - box.y1), round(len(pixels) - box.y0))
            panels.append((axis, pixels[rows, round(box.x0):round(box.x1)]))
    return pixels, panels


def assert_drawn(figure):
    _, panels = drawn(figure)
    assert panels
    for axis, part in panels:
        assert part.size and part.std() > 1, f"panel {axis.get_title()!r} is blank"
    return panels


def scenes(count, side):
    return visualize.squares([Image.fromarray(data.render_scene("val", i)[0]) for i in range(count)], side)


# ---- Masks ----

def test_masked_cells_are_those_of_the_mask():
    image, mask = torch.rand(3, 32, 32) * 0.3, np.zeros((4, 4), bool)
    mask[1, 2] = mask[3, 0] = True
    grey = (visualize.hide(image, mask) == 0.5).all(0)
    assert torch.equal(grey, torch.from_numpy(mask).repeat_interleave(8, 0).repeat_interleave(8, 1))


def test_masks_figure():
    rng = np.random.default_rng(0)
    masks = {"blockwise": [masking.blockwise_mask((14, 14), 75, rng) for _ in range(4)],
             "random": [masking.random_mask((14, 14), 75, rng) for _ in range(4)]}
    coverage = {label: np.mean(drawn, axis=0) for label, drawn in masks.items()}
    figure = visualize.figure_masks(scenes(4, 56), masks, coverage)
    assert_drawn(figure)
    assert figure.axes[0].get_ylabel() == "blockwise\n75 of 196"
    np.testing.assert_array_equal(figure.axes[4].images[0].get_array(), coverage["blockwise"])


# ---- Tokens ----

def test_the_same_token_has_the_same_colour_and_others_have_others():
    colours = visualize.token_colours(torch.tensor([[3, 3], [7, 8000]])).permute(1, 2, 0).flatten(0, 1)
    assert torch.equal(colours[0], colours[1]) and len(colours.unique(dim=0)) == 3
    assert 0 <= colours.min() and colours.max() <= 1


def test_tokens_figure_shows_the_most_used_codes_and_their_patches():
    images = torch.zeros(1, 3, 4, 4)
    images[0, :, :2, :2] = images[0, :, 2:, 2:] = 0.9
    figure = visualize.figure_tokens(images, torch.tensor([[[5, 2], [6, 5]]]), images, images / 2)
    *pictures, first, second, third = figure.axes
    assert first.get_title() == "5: 50.0%" and not third.images
    assert all((axis.images[0].get_array() == np.float32(0.9)).all() for axis in (first, second))
    assert pictures[3].get_ylabel() == "hard codes\nerror 0.1013"


@torch.no_grad()
def test_predictions_are_the_models_behind_the_mask_and_the_truth_elsewhere():
    tokenizer, model, images, token_images = small_tokenizer(), model_of(), scenes(3, 32), scenes(3, 16)
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(np.stack([masking.blockwise_mask((4, 4), 6, rng) for _ in range(3)]))
    columns, right = visualize.predictions(model, images, mask, tokenizer, token_images)
    true = tokenizer.tokenize(token_images)
    guess = true.clone()
    guess[mask] = model(images, mask).argmax(-1)
    assert torch.equal(columns["prediction"], tokenizer.decode(guess)) and torch.equal(right, guess == true)
    assert torch.equal(columns["tokenizer at best"], tokenizer.decode(true))
    right = mask.clone()
    right[0, ~mask[0]] = True    # outside of the mask nothing is outlined
    figure = visualize.figure_predictions(columns, mask, right)
    outlines = [axis for axis in figure.axes if axis.patches]
    assert [len(axis.patches) for axis in outlines] == [6, 6, 6]
    first = sorted((int(patch.get_y() + 0.5) // 4, int(patch.get_x() + 0.5) // 4)
                   for patch in outlines[0].patches)
    assert first == sorted(map(tuple, mask[0].nonzero().tolist()))
    pipeline = (images[0], mask[0], true[0], guess[0], columns["tokenizer at best"][0],
                columns["prediction"][0])
    assert_drawn(visualize.figure_pipeline(*pipeline))


@torch.no_grad()
def test_predictions_without_masks_and_decoder_and_of_pixels():
    tokenizer, images, token_images = small_tokenizer(), scenes(2, 32), scenes(2, 16)
    tokenizer.decoder, model, mask = None, model_of(), torch.zeros(2, 4, 4, dtype=torch.bool)
    columns, right = visualize.predictions(model, images, mask, tokenizer, token_images)
    everywhere = model(images, mask, torch.arange(32)).argmax(-1).view(2, 4, 4)
    assert torch.equal(right, everywhere == tokenizer.tokenize(token_images))
    assert torch.equal((columns["right tokens"] == 0.5).all(1)[:, ::8, ::8], ~right)
    figure = visualize.figure_predictions(columns, mask, torch.ones_like(right))
    assert figure.axes[2].get_xlabel() == "16 of 16: 100%"
    mask[:, 1:3, 1:3] = True
    pixels = vit.MaskedImageModel(model.config, 3 * 8 * 8).eval()
    columns, right = visualize.predictions(pixels, images, mask)
    seen = ~mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(columns["prediction"][seen], images[seen])
    assert right is None and not torch.allclose(columns["prediction"][~seen], images[~seen])
    assert_drawn(visualize.figure_predictions(columns, mask))


# ---- Attention ----

@pytest.mark.parametrize("position", ["absolute", "relative", "shared_relative"])
def test_every_attention_map_is_attention_maps_of_each_layer(position):
    model, images = model_of(position=position, layer_scale=0.1), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for table in [parameter for name, parameter in model.named_parameters() if "table" in name]:
            table.normal_()
        for layer, one in enumerate(visualize.every_attention_map(model, images)):
            torch.testing.assert_close(one, model.attention_maps(images, layer))


def moved(grid, by):
    """Each patch attends to the one `by` rows and columns further, around the edges, and [S] to patch 0."""
    (h, w), attention = grid, torch.zeros(1 + grid[0] * grid[1], 1 + grid[0] * grid[1])
    attention[0, 1] = 1
    for row in range(h):
        for column in range(w):
            attention[1 + row * w + column, 1 + (row + by[0]) % h * w + (column + by[1]) % w] = 1
    return attention


def test_the_marked_patch_is_the_one_whose_row_is_plotted():
    grid = (4, 6)
    attention = moved(grid, (1, 2))[None]
    assert visualize.reference_maps(attention, (2, 1), grid)[0].nonzero().tolist() == [[3, 3]]
    assert visualize.reference_maps(attention, "S", grid)[0].nonzero().tolist() == [[0, 0]]
    figure = visualize.figure_attention(torch.rand(3, 32, 48), attention, [(2, 1), "S"], grid)
    image, heat, _, of_cls = figure.axes[:4]                           # image, mean, head; then those of [S]
    (x,), (y,) = image.lines[0].get_data()
    assert (int(y + 0.5) // 8, int(x + 0.5) // 8) == (2, 1)    # the mark is in patch (2, 1)
    drawn_map = heat.images[1].get_array()
    assert np.argwhere(drawn_map == drawn_map.max()).tolist() == [[3, 3]]
    assert not of_cls.lines                                            # [S] has no place
    assert_drawn(figure)


def test_the_overlay_lies_on_the_image_within_a_patch():
    grid, image = (4, 6), torch.zeros(3, 32, 48)
    figure = visualize.figure_attention(image, moved(grid, (1, 2))[None], [(2, 1)], grid)
    _, panels = drawn(figure)
    pixels = panels[1][1].sum(-1)    # four rows and six columns of patches
    height, width = pixels.shape[0] / 4, pixels.shape[1] / 6
    # the mark, brightest of all
    pixels[round(2 * height):round(3 * height), round(width):round(2 * width)] = 0
    row, column = np.unravel_index(pixels.argmax(), pixels.shape)
    assert (int(row / height), int(column / width)) == (3, 3)
    assert panels[1][0].images[0].get_extent() == panels[1][0].images[1].get_extent()


def test_a_figure_has_the_mean_and_each_head():
    maps = torch.stack([moved((2, 2), (0, 1)), moved((2, 2), (1, 0))])
    figure = visualize.figure_attention(torch.rand(3, 8, 8), maps, [(0, 0)], (2, 2), "title")
    assert [axis.get_title() for axis in figure.axes] == ["", "mean of heads", "head 1", "head 2"]
    assert figure.axes[0].get_ylabel() == "patch 0,0"
    mean, head = (figure.axes[i].images[1].get_array() for i in (1, 3))
    assert mean.tolist() == [[0, 0.5], [0.5, 0]] and head.tolist() == [[0, 0], [1, 0]]


def test_twelve_heads_fit():
    figure = visualize.figure_attention(torch.rand(3, 16, 16), torch.rand(12, 5, 5), [(0, 0), (1, 1)], (2, 2))
    assert sum(axis.get_title().startswith("head") for axis in figure.axes) == 12 and len(figure.axes) == 28
    assert_drawn(figure)


def test_reference_patches_fall_on_the_object():
    image = torch.full((3, 64, 64), 0.2)
    image[0, 16:40, 24:48] = 0.9
    chosen = visualize.reference_patches(image, (8, 8), 3)
    assert len(set(chosen)) == 3 and all(2 <= row < 5 and 3 <= column < 6 for row, column in chosen)


def test_attention_distances_by_hand():
    torch.testing.assert_close(visualize.attention_distances([moved((1, 2), (0, 1))[None, None]], (1, 2), 16),
                               torch.tensor([[16.0]]))
    uniform = torch.full((1, 1, 5, 5), 0.2)    # of 4 patches: 0, 8, 8 and 8 sqrt 2 away
    torch.testing.assert_close(visualize.attention_distances([uniform], (2, 2), 8),
                               torch.tensor([[(16 + 8 * 2 ** 0.5) / 4]]))


def test_object_attention_by_hand():
    cover = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])    # the object is half of four patches in a row
    uniform = torch.full((1, 2, 5, 5), 0.2)
    torch.testing.assert_close(visualize.object_attention([uniform], cover), torch.tensor([1.0]))
    on_it = torch.zeros(1, 1, 5, 5)
    on_it[..., 1:3] = 0.5
    torch.testing.assert_close(visualize.object_attention([on_it], cover), torch.tensor([2.0]))
    wide = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])    # patch 0 counts 2 and 3: half of that is object
    torch.testing.assert_close(visualize.object_attention([uniform], wide, near=1), torch.tensor([1.0]))
    far = torch.zeros(1, 1, 5, 5)
    far[0, 0, 1, 4] = far[0, 0, 4, 1] = 0.3
    far[0, 0, 1, 1] = far[0, 0, 4, 4] = 0.7    # itself, which is not counted
    torch.testing.assert_close(visualize.object_attention([far], wide, near=1), torch.tensor([2.0]))


def test_lines_by_layer():
    values, heads = [0.2, 0.4, 0.3], torch.rand(3, 2)
    panels = {"all": {"a": values, "b": torch.rand(3)}, "far": {"a": heads}}
    figure = visualize.figure_by_layer(panels, "ratio")
    assert_drawn(figure)
    first, second = figure.axes
    assert first.lines[0].get_ydata().tolist() == pytest.approx(values) and len(first.lines) == 2
    np.testing.assert_allclose(second.lines[-1].get_ydata(), heads.mean(1))    # after a dot for each head
    assert first.get_title() == "all" and first.get_ylabel() == "ratio"


def test_results_of_finetuning_are_drawn():
    images, classes = torch.rand(3, 3, 16, 16), ["a", "$b", "c"]       # a $ is no formula
    share = torch.tensor([0.1, 0.7, 0.2])
    figure = visualize.figure_classes(images, [1, 0, 2], [share] * 3, classes)
    picture, bars = figure.axes[:2]
    assert picture.get_title() == "$b" and bars.texts[0].get_text() == "$b  70%"
    right, wrong, _ = bars.patches
    assert right.get_width() == pytest.approx(0.7) and right.get_facecolor() != wrong.get_facecolor()
    assert_drawn(figure)
    truth = torch.zeros(16, 16, dtype=torch.uint8)
    truth[8:], truth[0] = 1, data.IGNORE
    figure = visualize.figure_segments(images, [truth] * 3, [truth.long().clamp(max=2)] * 3, classes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == classes
    colours = figure.axes[1].images[0].get_array()
    assert (colours[0] == 1).all() and (colours[1:8] == 0).all() and np.ptp(colours[8:]) > 0
    assert_drawn(figure)


@pytest.mark.parametrize("position", ["absolute", "relative", "shared_relative"])
def test_positions_figure(position):
    model = model_of(position=position)
    with torch.no_grad():
        for table in [p for n, p in model.named_parameters() if "table" in n]:
            table[:-3, 1] = torch.arange(len(table) - 3.0)    # offsets of query less key, row by row
    figure = visualize.figure_positions(model)
    if position == "absolute":
        picture = figure.axes[5].images[0].get_array()    # a 4x4 grid is shown in full: row 1, column 1
        assert np.unravel_index(picture.argmax(), picture.shape) == (1, 1)
        assert picture.max() == pytest.approx(1)
        assert_drawn(figure)
    else:
        # key below and right of the query: top left of the table
        picture = figure.axes[1].images[0].get_array()
        assert picture[-1, -1] == 0 and picture[0, 0] == picture.max() == 48


@pytest.mark.parametrize("position", ["absolute", "relative", "shared_relative"])
def test_a_model_at_another_size(position):
    model = model_of(position=position)
    assert visualize.at_size(model, (32, 32)) is model
    wide = visualize.at_size(model, (32, 64))
    assert visualize.every_attention_map(wide, torch.rand(1, 3, 32, 64))[0].shape == (1, 2, 33, 33)


# ---- Curves ----

def log_of(folder, steps=50, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"out": str(folder), "seed": 0, **config}))
    lines = [dict(step=i, loss=5 - i / 20, accuracy=i / 100, lr=1e-3, images_per_second=100 + i % 3,
                  unigram_entropy=4.5, majority_accuracy=0.1, chance_loss=5.2) for i in range(1, steps + 1)]
    lines[-1]["val_loss"] = 2.6
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_of_several_runs(tmp_path):
    folders = [log_of(tmp_path / "a"), log_of(tmp_path / "b", steps=20)]
    runs = visualize.read_runs(folders)
    assert list(runs) == [str(folder) for folder in folders]
    assert [line["step"] for line in runs[str(folders[0])]] == list(range(1, 51))
    figure = visualize.figure_curves(runs)
    assert_drawn(figure)
    loss, accuracy, _, _ = figure.axes
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["unigram entropy", "chance loss"] and accuracy.get_legend()
    assert [line.get_ydata()[0] for line in loss.lines if line.get_linestyle() == ":"] == [5.2, 5.2]
    (points,) = [line for line in loss.lines if line.get_marker() == "o"][:1]
    assert points.get_xydata().tolist() == [[50, 2.6]]


def test_logs_that_are_half_written_or_damaged(tmp_path):
    folder = log_of(tmp_path / "a")
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole + '{"step": 51, "lo')    # a run that is writing
    assert [line["step"] for line in visualize.read_runs([folder])[str(folder)]] == list(range(1, 51))
    for text in (whole + '{"step": 51, "lo\n', "[1]\n"):
        (folder / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match="a/metrics.jsonl is not the log of a training script"):
            visualize.read_runs([folder])
    with pytest.raises(ValueError, match="b/metrics.jsonl is not the log .*No such file"):
        visualize.read_runs([tmp_path / "b"])


def test_smooth_is_a_centred_mean():
    assert visualize.smooth(np.array([0.0, 3, 6, 9]), 2).tolist() == [1.5, 3, 6, 7.5]
    assert visualize.smooth(np.array([1.0, 5]), 0).tolist() == [1, 5]


# ---- Command line ----

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with images, and a model and a tokenizer with random weights in runs/pretrain-shapes."""
    folder = tmp_path_factory.mktemp("visualize")
    tokenizer, model = small_tokenizer(), model_of(position="shared_relative")
    config = {"vit": dataclasses.asdict(model.config), "vocab_size": 50}
    (folder / "runs").mkdir()
    out = log_of(folder / "runs/pretrain-shapes")
    (out / "tokenizer").mkdir()
    (out / "tokenizer/config.json").write_text('{"image_size": 16}')
    for path, one, sizes in ((out / "tokenizer/model.pt", tokenizer, tokenizer.config),
                             (out / "model.pt", model, config)):
        torch.save({"kind": type(one).__name__, "config": sizes, "model": one.state_dict()}, path)
    rng = np.random.default_rng(0)
    large = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).resize((2400, 1800))
    large.save(folder / "large.jpg", quality=20)
    Image.fromarray(rng.integers(0, 255, (50, 70), dtype=np.uint8)).save(folder / "grey.png")
    Image.fromarray(rng.integers(0, 255, (20, 30, 4), dtype=np.uint8)).save(folder / "icon.png")
    return folder


@pytest.mark.parametrize("words", [
    "masks --grid 6 9 --ratio 0.2 --count 2", "tokens --count 2", "tokens --images icon.png",
    "predict --count 3", "predict --count 1 --ratio 0.6",
    "predict --images large.jpg grey.png icon.png", "attention --patch 1,2 --patch S --layer 1",
    "attention --images grey.png --size 64", "attention-distance --count 2",
    "attention-objects --count 4", "positions", "curves", "pipeline", "pipeline --images large.jpg"])
def test_each_command_draws(monkeypatch, run, words):
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "argv", ["visualize.py", *words.split(), "--out", "out.png", "--dpi", "40"])
    visualize.main()
    picture = np.array(Image.open("out.png"))[..., :3]
    assert min(picture.shape[:2]) > 80 and picture.std() > 5


@pytest.mark.long
def test_draws_without_a_display(tmp_path):
    flags = ["masks", "--count", "2", "--grid", "4", "4", "--out", "a.png"]
    done = subprocess.run([sys.executable, ROOT / "visualize.py", *flags], cwd=tmp_path,
                          capture_output=True, text=True, env={"PATH": "", "HOME": str(tmp_path)})
    assert done.returncode == 0 and np.array(Image.open(tmp_path / "a.png"))[..., :3].std() > 5, done.stderr


def test_an_unreadable_held_out_image_is_named(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.png").write_bytes(b"nothing")
    args = types.SimpleNamespace(images=None, data=str(tmp_path), data_root="data", first=0)
    with pytest.raises(UserError, match="--data: .*0.png cannot be read"):
        visualize.open_pictures(args, 1)
