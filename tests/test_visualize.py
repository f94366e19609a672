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
from PIL import Image

import data
import dvae
import masking
import visualize
import vit

POSITIONS = pytest.mark.parametrize("position", ["absolute", "relative", "shared_relative"])


def model_of(**fields):
    """A masked image model of 4x4 patches. The tables of relative positions count up, in head 1."""
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=8, dim=32, depth=3, heads=2, drop_path=0.0)
    model = vit.MaskedImageModel(vit.ViTConfig(**{**sizes, **fields}), vocab_size=50).eval()
    for name, parameter in model.named_parameters():
        if "table" in name:
            parameter.data[:-3, 1] = torch.arange(len(parameter) - 3.0)    # offsets of query less key
            parameter.data[:, 0].normal_()
    return model.requires_grad_(False)


def small_tokenizer():
    torch.manual_seed(0)
    tokenizer = dvae.DiscreteVAE(vocab_size=50, hidden=8, groups=3, blocks_per_group=1).eval()
    tokenizer.initialise_codes(scenes(8, 16))
    return tokenizer.requires_grad_(False)


def scenes(count, side):
    return visualize.squares([Image.fromarray(data.render_scene("val", i)[0]) for i in range(count)], side)


def shown(axis, picture=0):
    """The array that an axis shows; images as (3, H, W)."""
    array = torch.as_tensor(np.asarray(axis.images[picture].get_array()))
    return array.permute(2, 0, 1) if array.dim() == 3 else array


# ---- Masks and tokens ----

def test_masks_figure():
    images, cells = torch.rand(2, 3, 32, 48) * 0.3, np.zeros((2, 4, 6), bool)
    cells[0, 1, 2] = cells[0, 3, 0] = cells[1, 2, 2] = True
    coverage = {"blockwise": np.arange(24).reshape(4, 6) / 23, "random": np.ones((4, 6))}
    figure = visualize.figure_masks(images, {"blockwise": cells, "random": cells}, coverage)
    grey = (shown(figure.axes[0]) == 0.5).all(0)
    assert torch.equal(grey, torch.from_numpy(cells[0]).repeat_interleave(8, 0).repeat_interleave(8, 1))
    assert figure.axes[0].get_ylabel() == "blockwise\n2 of 24"
    np.testing.assert_array_equal(shown(figure.axes[2]), coverage["blockwise"])
    assert figure.axes[2].get_xlabel() == "corner 0.00\nedge 0.13\ncentre 0.65"


def test_tokens_figure_shows_the_most_used_codes_and_their_patches():
    images = torch.zeros(1, 3, 4, 4)
    images[0, :, :2, :2] = images[0, :, 2:, 2:] = 0.9
    figure = visualize.figure_tokens(images, torch.tensor([[[5, 2], [8000, 5]]]), images, images / 2)
    *pictures, first, second, third = figure.axes
    assert first.get_title() == "5: 50.0%" and not third.images
    assert all((shown(axis) == 0.9).all() for axis in (first, second))
    colours = shown(pictures[1]).flatten(1).t()    # the same for the same token
    assert torch.equal(colours[0], colours[3]) and len(colours.unique(dim=0)) == 3
    assert pictures[3].get_ylabel() == "hard codes\nerror 0.1013"


# ---- Predictions ----

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
    axes = visualize.figure_predictions(columns, mask, right).axes
    for i, place in enumerate((3, 11, 7)):    # two images a row, four pictures each
        torch.testing.assert_close(shown(axes[place]), columns["prediction"][i])
        cells = [(int(patch.get_y() + 0.5) // 4, int(patch.get_x() + 0.5) // 4)
                 for patch in axes[place].patches]
        assert sorted(cells) == sorted(map(tuple, mask[i].nonzero().tolist()))
        assert axes[place].get_xlabel() == "6 of 6: 100%"


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
    assert len(visualize.figure_predictions(columns, mask).axes) == 6


def test_the_pipeline_shows_what_was_predicted_and_what_was_true():
    mask = torch.tensor([[True, False], [True, False]])
    true, guess = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [5, 4]])
    crop, best, prediction = torch.rand(3, 8, 8), torch.rand(3, 4, 4), torch.rand(3, 4, 4)
    figure = visualize.figure_pipeline(crop, mask, true, guess, best, prediction)
    above, below = figure.axes[:9], figure.axes[9:]
    for axis, tokens in ((above[6], guess), (below[4], true)):
        colours = torch.where(mask, visualize.token_colours(tokens), 1.0)
        torch.testing.assert_close(shown(axis), colours.float())
    assert torch.equal(shown(above[8]), prediction) and torch.equal(shown(below[8]), best)
    assert torch.equal((shown(above[4]) == 0.5).all(0)[::4, ::4], mask)
    right = [patch.get_xy() for patch in above[6].patches if patch.get_width() == 1]
    assert set(right) == {(-0.5, -0.5)} and "1 of 2 right" in below[6].texts[0].get_text()


# ---- Attention ----

@POSITIONS
def test_every_attention_map_is_attention_maps_of_each_layer(position):
    model, images = model_of(position=position, layer_scale=0.1), torch.rand(2, 3, 32, 32)
    for layer, one in enumerate(visualize.every_attention_map(model, images)):
        torch.testing.assert_close(one, model.attention_maps(images, layer))
    assert visualize.at_size(model, (32, 32)) is model
    wide = visualize.at_size(model, (32, 64))
    assert torch.equal(wide.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert visualize.every_attention_map(wide, torch.rand(1, 3, 32, 64))[0].shape == (1, 2, 33, 33)


def moved(grid, by):
    """Each patch attends to the one `by` rows and columns further, around the edges, and [S] to patch 0."""
    (h, w), attention = grid, torch.zeros(1 + grid[0] * grid[1], 1 + grid[0] * grid[1])
    attention[0, 1] = 1
    for row, column in np.ndindex(grid):
        attention[1 + row * w + column, 1 + (row + by[0]) % h * w + (column + by[1]) % w] = 1
    return attention


def test_the_marked_patch_is_the_one_whose_attention_lies_over_the_image():
    grid, maps = (4, 6), torch.stack([moved((4, 6), (1, 2)), moved((4, 6), (0, 0))])
    figure = visualize.figure_attention(torch.rand(3, 32, 48), maps, [(2, 1), "S"], grid)
    assert [axis.get_title() for axis in figure.axes[:4]] == ["", "mean of heads", "head 1", "head 2"]
    image, mean, first, second, of_cls = figure.axes[:5]
    assert (image.get_ylabel(), of_cls.get_ylabel()) == ("patch 2,1", "[S]")
    (x,), (y,) = image.lines[0].get_data()
    assert (int(y + 0.5) // 8, int(x + 0.5) // 8) == (2, 1) and not of_cls.lines    # [S] has no place
    for axis, cells in ((mean, {(3, 3): 0.5, (2, 1): 0.5}), (first, {(3, 3): 1}), (second, {(2, 1): 1}),
                        (figure.axes[7], {(0, 0): 1})):
        heat = shown(axis, 1)
        assert {tuple(cell): heat[tuple(cell)] for cell in heat.nonzero().tolist()} == cells
        assert all([*picture.get_extent()] == [-0.5, 47.5, 31.5, -0.5] for picture in axis.images)
    assert mean.images[1].get_clim()[1] == 0.5 and second.images[1].get_clim()[1] < 1e-9    # not by itself


def test_attention_distances_by_hand():
    neighbour, uniform = moved((1, 2), (0, 1))[None, None], torch.full((1, 1, 5, 5), 0.2)
    assert visualize.attention_distances([neighbour], (1, 2), 16).tolist() == [[16]]
    away = (16 + 8 * 2 ** 0.5) / 4    # from each of 4 patches the others are 8, 8 and 8 sqrt 2 away
    assert visualize.attention_distances([uniform], (2, 2), 8).item() == pytest.approx(away)


UNIFORM, ON_IT, FAR = torch.full((5, 5), 0.2), torch.zeros(5, 5), torch.zeros(5, 5)
ON_IT[:, 1:3] = 0.5
FAR[1, 3:] = FAR[4, 1:3] = 0.3
FAR[1, 1] = FAR[4, 4] = 0.4    # itself, which is not counted where near=1


@pytest.mark.parametrize("attention, cover, near, expected", [
    (UNIFORM, [1, 1, 0, 0], None, 1), (ON_IT, [1, 1, 0, 0], None, 2), (ON_IT, [0.4, 0.6, 0, 0], None, 2),
    (UNIFORM, [1, 0, 1, 1], 1, 1), (FAR, [1, 0, 0, 1], 1, 1)])    # patch 0 counts 2 and 3, patch 3 0 and 1
def test_object_attention_by_hand(attention, cover, near, expected):
    found = visualize.object_attention([attention[None, None]], torch.tensor([[cover]]), near)
    assert found.tolist() == pytest.approx([expected])


def test_scenes_with_the_cover_of_their_object():
    images, cover = visualize.object_scenes(3, vit.ViTConfig(image_size=32, patch_size=8))
    _, label, classes = data.render_scene("val", 2)
    assert torch.equal(images, scenes(3, 32)) and cover.shape == (3, 4, 4)
    assert cover[2, 1, 2] == (classes[16:32, 32:48] == 1 + label).mean()


def test_lines_by_layer():
    heads = torch.rand(3, 2)
    lines = {"all": {"a": [0.2, 0.4, 0.3], "b": torch.rand(3)}, "far": {"a": heads}}
    figure = visualize.figure_by_layer(lines, "ratio")
    first, second = figure.axes
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[1, 0.2], [2, 0.4], [3, 0.3]])
    np.testing.assert_allclose(second.lines[-1].get_ydata(), heads.mean(1))    # after a dot for each head
    assert first.get_title() == "all" and first.get_ylabel() == "ratio"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


# ---- Results, positions, curves ----

def test_results_of_finetuning_are_drawn():
    images, classes = torch.rand(3, 3, 16, 16), ["a", "$b$", "c"]      # a $ is no formula
    share = torch.tensor([0.1, 0.7, 0.2])
    figure = visualize.figure_classes(images, [1, 0, 2], [share] * 3, classes)
    picture, bars, _, others = figure.axes[:4]
    assert picture.get_title() == "$b$" and picture.title.get_parse_math() is False
    assert [text.get_text() for text in others.texts] == ["$b$  70%", "c  20%", "a  10%"]
    right, wrong, _ = bars.patches
    assert right.get_width() == pytest.approx(0.7) and sum(right.get_facecolor()) < sum(wrong.get_facecolor())
    assert right.get_facecolor() == others.patches[2].get_facecolor()
    truth = torch.zeros(16, 16, dtype=torch.uint8)
    truth[8:], truth[0] = 1, data.IGNORE
    figure = visualize.figure_segments(images, [truth] * 3, [truth.clamp(max=1)] * 3, classes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "$b$"]
    colours = shown(figure.axes[1])
    assert (colours[:, 0] == 1).all() and (colours[:, 1:8] == 0).all() and len(colours[:, 8:].unique()) > 1


@POSITIONS
def test_positions_figure(position):
    figure = visualize.figure_positions(model_of(position=position))
    if position == "absolute":
        assert (figure.axes[0].get_ylabel(), figure.axes[1].get_title()) == ("row 0", "column 1")
        for i, (row, column) in enumerate(np.ndindex(4, 4)):    # a 4x4 grid is shown in full
            assert shown(figure.axes[i]).argmax() == row * 4 + column
            assert shown(figure.axes[i]).max() == pytest.approx(1)
    else:
        # key below and right of the query: top left of the table
        picture = shown(figure.axes[1])
        assert picture[-1, -1] == 0 and picture[0, 0] == picture.max() == 48
        labels = [axis.get_ylabel() for axis in figure.axes[:-1:2]]
        assert labels == (["layer 1", "layer 2", "layer 3"] if position == "relative" else ["all layers"])


def log_of(folder, steps=50):
    folder.mkdir(parents=True)
    lines = [dict(step=i, loss=5 - i / 20, accuracy=i / 100, lr=1e-3, images_per_second=100 + i % 3,
                  unigram_entropy=4.5, majority_accuracy=0.1, chance_loss=5.2) for i in range(1, steps + 1)]
    lines[-1]["val_loss"] = 2.6
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_of_several_runs(tmp_path):
    folders = [log_of(tmp_path / "a", steps=160), log_of(tmp_path / "b", steps=20)]
    runs = visualize.read_runs(folders)
    assert [len(lines) for lines in runs.values()] == [160, 20]
    figure = visualize.figure_curves(runs)
    loss, accuracy, _, images_a_second = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(folder) for folder in folders]
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["unigram entropy", "chance loss"] and accuracy.get_legend()
    assert [line.get_ydata()[0] for line in loss.lines if line.get_linestyle() == ":"] == [5.2, 5.2]
    points, _ = [line for line in loss.lines if line.get_marker() == "o"]
    assert points.get_xydata().tolist() == [[160, 2.6]]
    first, second = [line for line in loss.lines if line.get_alpha() == 0.35]
    assert (first.get_color(), second.get_color(), len(second.get_xdata())) == ("C0", "C1", 20)
    np.testing.assert_allclose(first.get_ydata(), 5 - np.arange(1, 161) / 20)
    thin, thick = images_a_second.lines[:2]
    np.testing.assert_allclose(thick.get_ydata(), visualize.smooth(thin.get_ydata(), 4))


def test_logs_that_are_half_written_or_damaged(tmp_path):
    folder = log_of(tmp_path / "a")
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole + '{"step": 51, "lo')    # a run that is writing
    assert [line["step"] for line in visualize.read_runs([folder])[str(folder)]] == list(range(1, 51))
    for text in (whole + '{"step": 51, "lo\n', "[1]\n"):
        (folder / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match="a/metrics.jsonl is not the log of a training script"):
            visualize.read_runs([folder])


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
    out = log_of(folder / "runs/pretrain-shapes")
    (out / "tokenizer").mkdir()
    (out / "tokenizer/config.json").write_text('{"image_size": 16}')
    for name, one, sizes in (("tokenizer/model.pt", tokenizer, tokenizer.config),
                             ("bare.pt", tokenizer, tokenizer.config), ("model.pt", model, config)):
        torch.save({"kind": type(one).__name__, "config": sizes, "model": one.state_dict()}, out / name)
    rng = np.random.default_rng(0)
    for name, size, mode in (("large.jpg", (2400, 1800), "RGB"), ("grey.png", (70, 50), "L"),
                             ("icon.png", (30, 20), "RGBA")):
        noise = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        noise.resize(size).convert(mode).save(folder / name)
    return folder


@pytest.mark.parametrize("words", [
    "masks --grid 6 9 --ratio 0.2 --count 2", "tokens --count 2", "tokens --images icon.png",
    "tokens --count 1 --tokenizer runs/pretrain-shapes/bare.pt", "predict --count 3",
    "predict --count 1 --ratio 0.6", "predict --images large.jpg grey.png icon.png",
    "attention --patch 1,2 --patch S", "attention --images grey.png --size 64",
    "attention-distance --count 2", "attention-objects --count 4", "positions", "curves", "pipeline",
    "pipeline --images large.jpg"])
def test_each_command_draws(monkeypatch, run, words):
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "argv", ["visualize.py", *words.split(), "--out", "out.png", "--dpi", "40"])
    visualize.main()
    picture = np.array(Image.open("out.png"))[..., :3]
    assert min(picture.shape[:2]) > 80 and picture.std() > 5


def test_the_attention_command_draws_the_layer_and_the_patches_asked_for(run):
    def axes_of(words):
        words = ["attention", "--init", f"{run}/runs/pretrain-shapes/model.pt", *words.split()]
        return visualize.attention(visualize.parser().parse_args(words)).axes

    axes = axes_of("--layer 1 --patch 1,2 --patch S --first 2")
    model, image = visualize.open_model(run / "runs/pretrain-shapes/model.pt"), scenes(3, 32)[2]
    maps = model.attention_maps(image[None], 0)[0].detach()
    assert [axes[i].get_ylabel() for i in (0, 4)] == ["patch 1,2", "[S]"]
    torch.testing.assert_close(shown(axes[3], 1), maps[1, 1 + 1 * 4 + 2, 1:].view(4, 4))
    assert [axis.get_ylabel() for axis in axes_of("")[::4]] == ["patch 2,2", "patch 1,1", "patch 2,2"]
    assert (shown(axes[0]) - image).abs().mean() < 0.02    # resized by another function
    assert shown(axes_of(f"--images {run}/grey.png --size 64")[0]).shape == (3, 64, 88)    # 64x90, in patches


def test_pictures_are_cut_to_their_centred_square():
    picture = np.zeros((10, 30, 3), dtype=np.uint8)
    picture[:, 5:25] = 255
    assert (visualize.squares([Image.fromarray(picture)], 5) == 1).all()


@pytest.mark.long
def test_draws_without_a_display(tmp_path):
    flags = ["masks", "--count", "2", "--grid", "4", "4", "--out", "a.png"]
    done = subprocess.run([sys.executable, ROOT / "visualize.py", *flags], cwd=tmp_path,
                          capture_output=True, text=True, env={"PATH": "", "HOME": str(tmp_path)})
    assert done.returncode == 0 and np.array(Image.open(tmp_path / "a.png"))[..., :3].std() > 5, done.stderr


def test_unreadable_held_out_images(tmp_path):
    """The next one is taken; if there is none, the first is named."""
    args = types.SimpleNamespace(images=None, data=str(tmp_path), data_root="data", first=0)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.png").write_bytes(b"nothing")
    with pytest.raises(OSError, match="^--data: .*0.png cannot be read"):
        visualize.open_pictures(args, 1)
    Image.new("RGB", (8, 6)).save(tmp_path / "val" / "1.png")
    assert [picture.size for picture in visualize.open_pictures(args, 2)] == [(8, 6)] * 2
