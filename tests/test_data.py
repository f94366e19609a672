"""shapes, views, labels, batches, and folders of files that are not all what they should be."""
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

import data
import finetune
from data import BadFile, Images, Labelled, Shapes, Views, open_image, open_labelled, rank_batches
from masking import blockwise_mask
from training import UserError

CPU = torch.device("cpu")
TURN = 0x0112    # EXIF orientation; 6: turn by 90 degrees clockwise


def views(source=None, sizes=(32, 16), mask=partial(blockwise_mask, (4, 4), 6), **more):
    return Views(source or Shapes("train"), *sizes, mask, **more)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def tensor_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).int()


def picture(seed=0, width=40, height=30):
    """A smooth colour image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def fill(folder, count, suffix=".jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i:04}{suffix}")


# ---- shapes ----

def test_scenes_are_a_function_of_their_index():
    image, label, classes = data.render_scene("train", 3)
    data.render_scene.cache_clear()
    again = data.render_scene("train", 3)
    assert (image == again[0]).all() and label == again[1] and (classes == again[2]).all()
    for other in (data.render_scene("train", 4), data.render_scene("val", 3)):
        assert (image != other[0]).any()


def test_scenes_have_labels_and_maps():
    labelled, mapped = Shapes("val"), Shapes("val", maps=True)
    assert labelled.classes == list(data.SHAPES) and mapped.classes == ["background", *data.SHAPES]
    for index in range(300):
        (image, label), (_, classes) = labelled[index], mapped[index]
        assert image.mode == "RGB" and image.size == classes.shape == (64, 64)
        assert classes.max() <= len(data.SHAPES)
        assert (classes == label + 1).mean() > 0.02                    # the main object can be seen
    assert set(labelled.targets) == set(range(len(data.SHAPES))) and len(data.SHAPES) >= 8


def test_class_maps_lie_on_the_objects():
    """The colours within a class vary less than those under the same map shifted by eight pixels."""
    def error(shift):
        total = 0
        for index in range(40):
            image, _, classes = data.render_scene("val", index)
            moved = np.roll(classes, shift, (0, 1))
            total += sum(image[moved == c].std(0).sum() * (moved == c).sum() for c in np.unique(moved) if c)
        return total
    assert error((0, 0)) < 0.6 * error((8, 8))


# ---- The two views ----

def test_draws_depend_on_seed_epoch_and_index_alone():
    first = views()[2, 7]
    np.random.seed(1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert equal(first, views()[2, 7]) and torch.equal(torch.get_rng_state(), state)
    for other in (views()[3, 7], views()[2, 8], views(seed=1)[2, 7]):
        assert not torch.equal(first[0], other[0])
    masks = {views()[epoch, index][2].numpy().tobytes() for epoch in range(3) for index in range(3)}
    assert len(masks) > 5
    fixed = views(train=False)
    assert equal(fixed[0, 5][:2], fixed[1, 5][:2]) and not torch.equal(fixed[0, 5][0], views()[0, 5][0])


def test_views_can_be_left_out():
    patches, tokens, mask = views()[0, 0]
    assert patches.shape == (3, 32, 32) and tokens.shape == (3, 16, 16) and patches.dtype == torch.uint8
    assert mask.shape == (4, 4) and mask.dtype == torch.bool and mask.sum() == 6
    assert torch.equal(views(sizes=(32, None))[0, 0][0], patches)
    assert equal(views(sizes=(None, 16), mask=None)[0, 0], [tokens])


@pytest.mark.parametrize("train", [True, False])
def test_one_crop_is_resized_twice_as_pil_does(monkeypatch, train):
    """Bicubic for the patches, Lanczos for the tokenizer."""
    box = (7, 11, 50, 52) if train else (0, 0, 64, 64)
    monkeypatch.setattr(data.RandomResizedCrop, "get_params", lambda *_: (11, 7, 41, 43))
    bicubic, lanczos = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
    flips = set()
    for index in range(12):
        crop = Shapes("train")[index][0].crop(box)
        patches, tokens, _ = views(train=train, jitter=0.0)[0, index]

        def distance(view, size, resampling):
            return (view - tensor_of(crop.resize((size, size), resampling))).abs().max().item()
        flipped = distance(patches, 32, bicubic) > 2
        flips.add(flipped)
        if flipped:
            patches, tokens = patches.flip(2), tokens.flip(2)
        assert distance(patches, 32, bicubic) <= 2 < distance(patches, 32, lanczos)
        assert distance(tokens, 16, lanczos) <= 2 < distance(tokens, 16, bicubic)
    assert flips == ({True, False} if train else {False})


def test_both_views_have_one_flip_and_one_jitter(monkeypatch):
    """Where nothing is cropped or resized, the views are the same."""
    monkeypatch.setattr(data.RandomResizedCrop, "get_params", lambda *_: (0, 0, 64, 64))
    seen = set()
    for index in range(30):
        patches, tokens, _ = views(sizes=(64, 64))[0, index]
        image = tensor_of(Shapes("train")[index][0])
        assert torch.equal(patches, tokens) and not torch.equal(patches, image)
        straight, mirrored = ((view - image).abs().float().mean() for view in (patches, patches.flip(2)))
        seen.add(bool(straight < mirrored))
    assert seen == {True, False}


def test_jitter_is_torchvisions(monkeypatch):
    """Brightness, contrast and saturation with their own factors, in the order drawn, on both views."""
    for order in ([0, 1, 2, 3], [2, 3, 1, 0]):
        drawn = torch.tensor(order), 0.7, 1.3, 0.8, None
        monkeypatch.setattr(data.ColorJitter, "get_params", lambda *_, **__: drawn)
        jittered, plain = views()[0, 3], views(jitter=0.0)[0, 3]
        for view, expected in zip(jittered[:2], plain[:2], strict=True):
            expected = expected / 255
            for k in (k for k in order if k != 3):
                adjust = (adjust_brightness, adjust_contrast, adjust_saturation)[k]
                expected = adjust(expected, drawn[1 + k])
            torch.testing.assert_close(view / 255, expected, atol=0.6 / 255, rtol=0)


def test_each_file_is_opened_once_a_sample(tmp_path, monkeypatch):
    fill(tmp_path, 3)
    source, opened, open_file = Images(data.image_paths(tmp_path)), [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, *more: opened.append(path) or open_file(path, *more))
    for index in range(3):
        views(source)[0, index]
        Labelled(source, data.classification_transform(16, train=True))[0, index]
    assert opened == [path for path in source.paths for _ in range(2)]


# ---- Batches ----

def test_an_epoch_shows_no_image_twice():
    keys = [key for batch in rank_batches(50, 12, seed=3, start=0, stop=8) for key in batch]
    assert len(set(keys)) == 96 and {epoch for epoch, _ in keys} == {0, 1}


def test_processes_and_parts_share_one_global_batch():
    def batches(**more):
        return list(rank_batches(50, 12, seed=3, start=5, stop=7, **more))
    first, second = batches()
    dealt = [batches(parts=2, rank=rank, world_size=3) for rank in range(3)]
    assert all(len(mine) == 4 for mine in dealt)
    assert [key for parts in zip(*dealt, strict=True) for part in parts for key in part] == first + second


@pytest.mark.parametrize("images, batch, world, wanted", [(10, 4, 1, None), (10, 4, 3, None), (2, 8, 3, None),
                                                          (7, 2, 2, None), (10_000, 8, 2, 100)])
def test_held_out_images_are_counted_once(monkeypatch, images, batch, world, wanted):
    seen = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        config = SimpleNamespace(batch_size=batch, accumulate=1, workers=0)
        loader = data.val_loader(range(images), config, CPU, images=wanted)
        seen += [index for keys in loader.batch_sampler for _, index in keys]
    assert sorted(seen) == list(range(0, images, images // wanted if wanted else 1))


# ---- Image files ----

def test_files_of_every_mode(tmp_path):
    image = picture()
    grey = np.asarray(image.convert("L"))
    exif = Image.Exif()
    exif[TURN] = 6
    Image.fromarray(grey).save(tmp_path / "grey.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    image.convert("P").save(tmp_path / "palette.gif")
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    image.convert("1").save(tmp_path / "bilevel.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "floats.tiff")
    image.save(tmp_path / "misnamed.jpg", "PNG")
    loaded = {path.name: open_image(path) for path in tmp_path.iterdir()}
    assert len(loaded) == 9 and all(image.mode == "RGB" for image in loaded.values())

    white, turned = Image.new("RGB", image.size, "white"), image.transpose(Image.Transpose.ROTATE_270)
    for name, expected, tolerance in (
            ("cmyk.jpg", image, 12), ("palette.gif", image, 30), ("misnamed.jpg", image, 0.1),
            ("clear.png", white, 0.1), ("turned.jpg", turned, 3),
            ("deep.png", loaded["grey.png"], 1), ("floats.tiff", loaded["grey.png"], 1)):
        assert (tensor_of(loaded[name]) - tensor_of(expected)).abs().float().mean() < tolerance, name


@pytest.mark.parametrize("turn, how", [(1, None), (3, "ROTATE_180"), (6, "ROTATE_270"), (8, "ROTATE_90")])
def test_large_jpegs_are_decoded_reduced_and_upright(tmp_path, monkeypatch, turn, how):
    image, exif = picture(width=500, height=400), Image.Exif()
    exif[TURN] = turn
    image.save(tmp_path / "a.jpg", quality=95, exif=exif)
    whole = image.transpose(Image.Transpose[how]) if how else image
    for large, size in ((101, (250, 200)), (100, (125, 100)), (201, (500, 400))):
        monkeypatch.setattr(data, "JPEG_MIN_SIDE", large)
        loaded = open_image(tmp_path / "a.jpg")
        assert loaded.size == (size if turn in (1, 3) else size[::-1])
        assert (tensor_of(loaded) - tensor_of(whole.resize(loaded.size))).abs().float().mean() < 3
    monkeypatch.setattr(data, "JPEG_MIN_SIDE", 100)
    assert data.open_file(tmp_path / "a.jpg", partial(data.upright_rgb, reduce=False)).size == whole.size



DAMAGED = {
    "empty": lambda whole: b"",
    "one byte": lambda whole: b"\xff",
    "cut": lambda whole: whole[:len(whole) * 2 // 3],
    "head alone": lambda whole: whole[:20],
    "zeros": lambda whole: bytes(len(whole)),
    "text": lambda whole: b"not an image\n" * 20,
    "web page": lambda whole: b"<!DOCTYPE html><html></html>",
    "60,000 x 60,000": lambda whole: whole[:163] + b"\xea\x60\xea\x60" + whole[167:],    # JPEG's frame header
}


@pytest.mark.parametrize("how", DAMAGED)
def test_an_unreadable_image_is_named_and_the_next_is_taken(tmp_path, how, capfd):
    fill(tmp_path, 3)
    bad = tmp_path / "0001.jpg"
    whole = bad.read_bytes()
    assert whole[158:163] == b"\xff\xc0\0\x11\x08"
    bad.write_bytes(DAMAGED[how](whole))
    data.warn_once.cache_clear()
    fixed = views(Images(data.image_paths(tmp_path)), train=False, mask=None)
    assert equal(fixed[0, 1], fixed[0, 2]) and equal(fixed[1, 1], fixed[0, 2])
    out, err = capfd.readouterr()
    assert not out and err.count("\n") == 1                            # once, and no library adds its own
    assert err.startswith(f"warning: {bad} cannot be read (") and err.endswith("); the next one is taken\n")


def test_files_that_vanish_or_are_forbidden(tmp_path, monkeypatch):
    fill(tmp_path, 2)
    forbidden, opened = str(tmp_path / "0000.jpg"), Image.open

    def deny(path, *more):
        if path == forbidden:
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *more)
    monkeypatch.setattr(Image, "open", deny)                           # root may read anything
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for path in (forbidden, tmp_path / "link.jpg", tmp_path / "gone.jpg"):
        with pytest.raises(BadFile, match=f"^{path} cannot be read"):
            open_image(path)


@pytest.mark.parametrize("bad, ends", [(data.MAX_BAD_IN_A_ROW - 1, False), (data.MAX_BAD_IN_A_ROW, True)])
def test_sixteen_unreadable_files_in_a_row_end_a_run(tmp_path, bad, ends):
    fill(tmp_path, 30)
    paths = data.image_paths(tmp_path)
    for i in range(bad):
        Path(paths[(20 + i) % 30]).write_bytes(b"")
    if not ends:
        assert data.read(Images(paths), 20)[0].size == (40, 30)
        return
    with pytest.raises(OSError, match="^--data: .*0020.jpg cannot be .*, nor can the 15 files after it$"):
        data.read(Images(paths), 20)


# ---- Folders of images ----

def test_which_files_are_held_out(tmp_path):
    def splits(name):
        return [source.paths.tolist() for source in data.open_splits(str(tmp_path / name), "")]
    fill(tmp_path / "loose" / "deep" / "down.jpg", 60)                 # a folder named like an image
    train, val = splits("loose")
    assert len(val) == 2 and len(train) == 58 and not set(train) & set(val)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "class").symlink_to(tmp_path / "loose")
    assert len(data.image_paths(tmp_path / "linked")) == 60
    fill(tmp_path / "halved" / "val", 2)
    fill(tmp_path / "halved" / "rest", 60)
    assert [len(paths) for paths in splits("halved")] == [60, 2]
    fill(tmp_path / "split" / "train" / "cat", 3)
    fill(tmp_path / "split" / "validation" / "cat", 2)
    assert [len(paths) for paths in splits("split")] == [3, 2]


def test_wrong_data(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in ((tmp_path / "empty", "--data: no images under"),
                          (tmp_path / "absent", "--data: .* is not a folder"),
                          ("fashion-mnist", "--data-root: .* has no FashionMNIST/raw")):
        with pytest.raises(UserError, match=message):
            data.open_splits(str(name), str(tmp_path))
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"")
    with pytest.raises(UserError, match="--data-root: .* damaged files"):
        data.open_splits("fashion-mnist", str(tmp_path))


# ---- Labels ----

def labelled(folder, val="val"):
    for split, classes in (("train", "abc"), (val, "ac")):
        for k, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 30), (k, i, 0)).save(folder / split / name / f"{i}.png")
    return folder


def test_labelled_folders(tmp_path):
    train, held_out = open_labelled(str(labelled(tmp_path, "validation")), "")
    assert train.classes == held_out.classes == ["a", "b", "c"]
    assert train.targets == [0, 0, 1, 1, 2, 2]
    assert [held_out[i][1] for i in range(4)] == [0, 0, 2, 2] and held_out[3][0].getpixel((0, 0)) == (1, 1, 0)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")      # its label goes with it
    assert Labelled(train, data.classification_transform(16, train=False))[0, 1][1] == 1


def refused(capsys, monkeypatch, folder, *flags):
    """What finetune.py says on stderr about --data; it has written nothing."""
    out = folder.parent / "out"
    given = ["--out", out, "--data", folder, "--init", "none", "--preset", "demo", "--steps", 2, *flags]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, given)])
    with pytest.raises(SystemExit) as end:
        finetune.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("finetune.py: error: --data: ") and err.count("\n") == 1
    assert not out.exists()
    return err


def test_folders_of_labels_that_are_refused(tmp_path, capsys, monkeypatch):
    folder = labelled(tmp_path / "set")

    def said():
        return refused(capsys, monkeypatch, folder)
    (folder / "train" / "d").mkdir()
    (folder / "train" / "d" / "notes.txt").write_text("no image")
    assert "no valid file for the classes d" in said()
    (folder / "train" / "d" / "notes.txt").unlink()
    (folder / "train" / "d").rmdir()
    (folder / "val" / "c").rename(folder / "val" / "z")
    assert f"{folder / 'val'} has class z" in said()
    for part in ("val/z", "train/b", "train/c"):
        (folder / part).rename(tmp_path / part.replace("/", "-"))
    assert "at least two classes" in said()
    (folder / "val").rename(tmp_path / "val")
    assert "needs train/ and val/ (or validation/)" in said()
    (folder / "val").write_text("a file")
    assert "needs train/ and val/ (or validation/)" in said()


def test_labelled_draws_depend_on_seed_epoch_and_index_alone():
    transform = data.classification_transform(32, train=True, randaugment=9, erasing=0.5)
    samples = Labelled(Shapes("train"), transform)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = samples[2, 5]
    assert torch.equal(torch.get_rng_state(), state)                   # the model's draws are not disturbed
    torch.rand(3)
    again = samples[2, 5]
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert first[0].dtype == torch.uint8 and first[0].shape == (3, 32, 32)
    assert not torch.equal(first[0], samples[3, 5][0]) and not torch.equal(first[0], samples[2, 6][0])


def test_erasing_paints_rectangles():
    grey = torch.tensor(data.FILL_COLOUR, dtype=torch.uint8).view(3, 1, 1)
    plain, erased = (data.classification_transform(32, train=True, erasing=p) for p in (0.0, 1.0))
    for i in range(30):
        painted = (Labelled(Shapes("train"), erased)[0, i][0] == grey).all(0)
        rows, columns = painted.nonzero().t()
        assert 0.01 < painted.float().mean() < 0.5
        assert not (Labelled(Shapes("train"), plain)[0, i][0] == grey).all(0).any()
        assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)


def test_evaluation_sees_the_centre():
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3))
    for eval_crop, reach in ((1.0, 50), (0.5, 25)):
        transform = data.classification_transform(50, train=False, eval_crop=eval_crop)
        image, label = Labelled([(Image.fromarray(ramp), 1)], transform)[0, 0]
        assert image.shape == (3, 50, 50) and label == 1
        assert image[0, 0, [0, -1]].tolist() == pytest.approx([100 - reach, 100 + reach], abs=3)


# ---- Class maps ----

def ade(folder, count=6):
    """A folder in ADE20K's layout; all maps hold class 2, sky."""
    for split in ("training", "validation"):
        (folder / "annotations" / split).mkdir(parents=True)
        fill(folder / "images" / split, count)
        for path in (folder / "images" / split).iterdir():
            Image.new("L", (40, 30), 2).save(folder / "annotations" / split / f"{path.stem}.png")
    (folder / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tsky\n3\ttree, other\n")
    return folder


def test_class_maps_follow_their_images(tmp_path):
    """Crop, flip and scale are the same for both, the padding is IGNORE, and class numbers start at 0."""
    folder, rng = ade(tmp_path), np.random.default_rng(0)
    for path in (folder / "annotations" / "training").iterdir():
        numbers = np.kron(rng.integers(0, 4, (3, 4), dtype=np.uint8), np.ones((10, 10), np.uint8))
        Image.fromarray(numbers).save(path)
        shown = folder / "images" / "training" / f"{path.stem}.jpg"
        Image.fromarray(np.stack([numbers * 60] * 3, 2)).save(shown, quality=100)
    source, _ = open_labelled(str(folder), "", maps=True)
    assert source.classes == ["wall", "sky", "tree"]
    samples = Labelled(source, data.segmentation_transform(32, train=True, jitter=0.0))
    for epoch in range(4):
        for index in range(6):
            image, target = samples[epoch, index]
            assert image.shape == (3, 32, 32) and target.shape == (32, 32) and type(target) is torch.Tensor
            shown = image[0].float() / 60 - 1
            assert (shown - target)[target < 3].abs().mean() < 0.35    # edges are blurred
            assert (image[0, target == data.IGNORE] < 150).all()       # class 0, or padding


WRONG_MAPS = {
    "is 10x10, its image 40x30": Image.new("L", (10, 10), 1),
    "holds class 9, there are 3": Image.new("L", (40, 30), 9),
    "is not a map of 8-bit class numbers, but mode RGB": Image.new("RGB", (40, 30)),
    "is not a map of 8-bit class numbers, but mode I;16": Image.new("I;16", (40, 30)),
    "cannot be read": None,
}


@pytest.mark.parametrize("reason", WRONG_MAPS)
def test_a_wrong_map_is_named_with_its_reason(tmp_path, reason, capfd):
    file = ade(tmp_path) / "annotations" / "training" / "0004.png"
    if WRONG_MAPS[reason]:
        WRONG_MAPS[reason].save(file)
    else:
        file.write_bytes(b"")
    source, _ = open_labelled(str(tmp_path), "", maps=True)
    samples = Labelled(source, data.segmentation_transform(16, train=False))
    image, target = samples[0, 4]
    assert torch.equal(image, samples[0, 5][0]) and target.shape == (30, 40) and (target == 1).all()
    err = capfd.readouterr().err
    assert err.startswith(f"warning: {file} {reason}") and err.endswith("; the next one is taken\n")


def test_folders_of_maps_that_are_refused(tmp_path, capsys, monkeypatch):
    folder = ade(tmp_path / "ade")
    annotations = folder / "annotations"

    def said():
        return refused(capsys, monkeypatch, folder, "--task", "segmentation")
    (annotations / "training" / "0003.png").rename(tmp_path / "kept.png")
    assert f"1 images have no map, {annotations / 'training' / '0003.png'} first" in said()
    (tmp_path / "kept.png").rename(annotations / "training" / "0003.png")
    for count in (0, 255):
        (folder / "objectInfo150.txt").write_text("Idx\tName\n" + "1\tx\n" * count)
        assert f"{folder / 'objectInfo150.txt'} names {count} classes" in said()
    (folder / "objectInfo150.txt").unlink()
    (annotations / "validation").rename(tmp_path / "validation")
    assert "needs images/training, " in said()


# ---- Runs ----

@pytest.mark.long
def test_runs_among_bad_files(tmp_path, record_fault):
    """Two among good ones are named and replaced; if there are no good ones, the run ends with one line."""
    fill(tmp_path / "images" / "train", 60)
    fill(tmp_path / "images" / "val", 12)
    bad = [tmp_path / "images" / "train" / name for name in ("0003.jpg", "0050.jpg")]
    for path, how in zip(bad, ("cut", "empty")):
        path.write_bytes(DAMAGED[how](path.read_bytes()))
    flags = ["--data", tmp_path / "images", "--target", "pixels", "--preset", "demo", "--workers", 2,
             "--steps", 12, "--batch-size", 10, "--image-size", 16, "--dim", 8, "--depth", 1, "--heads", 1]

    def run(out):
        given = [sys.executable, ROOT / "pretrain.py", "--out", tmp_path / out, *flags]
        done = subprocess.run(list(map(str, given)), text=True, capture_output=True, timeout=200)
        lines = done.stderr.splitlines()
        warnings = [line for line in lines if line.startswith("warning: ")]
        return done.returncode, warnings, [line for line in lines if line not in warnings]
    status, warnings, errors = run("a")
    assert status == 0 and not errors and (tmp_path / "a" / "result.json").exists()
    for path in bad:                                                   # once in each of the loader processes
        assert 1 <= sum(line.startswith(f"warning: {path} cannot be read") for line in warnings) <= 2
    for path in (tmp_path / "images" / "train").iterdir():
        path.write_bytes(b"")
    status, _, errors = run("b")
    assert status == 1 and len(errors) == 1 and errors[0].startswith("pretrain.py: error: --data: ")
    assert errors[0].endswith("nor can the 15 files after it")
    record_fault("unreadable images: two among good ones, nothing else", 2)
