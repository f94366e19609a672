from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

import data
from data import CorruptImages, Folder, GlobalBatches, Shapes, Views, held_out_batches, open_images

CPU = torch.device("cpu")


def views(source=None, **more):
    return Views(source or Shapes("train"), [32, 16], (4, 4), **{"num_masked": 6, "masking": "blockwise", **more})


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4]))


# shapes --------------------------------------------------------------------------------------------------------------

def test_scenes_are_a_function_of_their_index():
    image, label, classes = data.render_scene("train", 3)
    data.render_scene.cache_clear()
    again = data.render_scene("train", 3)
    assert (image == again[0]).all() and label == again[1] and (classes == again[2]).all()
    assert (image != data.render_scene("train", 4)[0]).any() and (image != data.render_scene("val", 3)[0]).any()


def test_scenes_show_what_they_say():
    labels = set()
    for index in range(300):
        image, label, classes = data.render_scene("val", index)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and classes.max() <= len(data.SHAPES)
        assert (classes == label + 1).mean() > 0.02                    # the main object can be seen
        labels.add(label)
    assert len(labels) == len(data.SHAPES) >= 8


def test_class_maps_lie_on_the_objects():
    """Painting every object with its map's mean colour comes much closer to the image than a shifted map does."""
    def error(shift):
        total = 0
        for index in range(40):
            image, _, classes = data.render_scene("val", index)
            moved = np.roll(classes, shift, (0, 1))
            total += sum(image[moved == c].std(0).sum() * (moved == c).sum() for c in np.unique(moved) if c)
        return total
    assert error((0, 0)) < 0.6 * error((8, 8))


# draws ---------------------------------------------------------------------------------------------------------------

def test_draws_depend_on_seed_epoch_and_index_alone():
    first = views()[2, 7]
    np.random.seed(1), torch.manual_seed(1)
    assert same(first, views()[2, 7])
    for other in (views()[3, 7], views()[2, 8], views(seed=1)[2, 7]):
        assert not torch.equal(first[0], other[0])
    masks = {tuple(views()[epoch, index][2].flatten().tolist()) for epoch in range(3) for index in range(3)}
    assert len(masks) > 5


def test_held_out_images_are_not_augmented():
    fixed = views(train=False)
    assert torch.equal(fixed[0, 5][0], fixed[1, 5][0]) and not same(fixed[0, 5], views()[0, 5])


def test_the_two_views_are_the_same_crop():
    for index in range(40):
        patches, tokens, *_ = views(crop_scale=0.2)[0, index]
        half = torch.nn.functional.avg_pool2d(patches.float(), 2)
        assert (half - tokens.float()).abs().mean() < 6                # of 255
        mirrored = (half.flip(2) - tokens.float()).abs().mean()
        assert mirrored > (half - tokens.float()).abs().mean()


def test_crops_are_distributed_as_in_torchvision():
    rng = np.random.default_rng(0)
    boxes = np.array([data.random_crop_box(400, 300, rng, (0.2, 1.0)) for _ in range(4000)])
    torch.manual_seed(0)
    blank = Image.new("L", (400, 300))
    theirs = np.array([RandomResizedCrop.get_params(blank, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], 1)    # top, left, h, w
    assert np.allclose(ours.mean(0), theirs.mean(0), rtol=0.05) and np.allclose(ours.std(0), theirs.std(0), rtol=0.05)
    assert (ours.min(0) >= 0).all() and boxes[:, 2].max() <= 400 and boxes[:, 3].max() <= 300
    assert data.random_crop_box(1000, 10, rng, (0.9, 1.0)) == (493, 0, 506, 10)    # nothing fits: the centre, at 4:3


# batches -------------------------------------------------------------------------------------------------------------

def test_an_epoch_shows_no_image_twice():
    keys = [key for batch in GlobalBatches(50, 12, seed=3, start=0, stop=8) for key in batch]
    assert len(set(keys)) == 96 and {epoch for epoch, _ in keys} == {0, 1}


@pytest.mark.parametrize("images, batch, world", [(10, 4, 1), (10, 4, 3), (2, 8, 3), (7, 1, 2)])
def test_held_out_images_are_counted_once(images, batch, world):
    seen = [index for rank in range(world) for b in held_out_batches(range(images), batch, rank=rank, world_size=world) for _, index in b]
    assert sorted(seen) == list(range(images))


# folders -------------------------------------------------------------------------------------------------------------

def picture(width=40, height=30):
    """Red on top, blue below, brighter to the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:height // 2, :, 0] = pixels[height // 2:, :, 2] = np.linspace(100, 255, width)
    return Image.fromarray(pixels)


def test_files_of_every_mode(tmp_path):
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6                                                   # show turned by 90 degrees clockwise
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    image.convert("P").save(tmp_path / "palette.gif")
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) * 257)).save(tmp_path / "deep.png")
    image.convert("1").save(tmp_path / "bilevel.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255).save(tmp_path / "floats.tiff")
    loaded = {}
    folder = Folder(data.image_paths(tmp_path))
    for index in range(len(folder)):
        loaded[Path(folder.paths[index]).name] = folder.image(index)
    assert len(loaded) == 8 and all(image.mode == "RGB" for image in loaded.values())
    assert loaded["turned.jpg"].size == (30, 40)
    assert np.asarray(loaded["turned.jpg"])[:, 25].mean(0)[0] > 100 > np.asarray(loaded["turned.jpg"])[:, 5].mean(0)[0]
    assert np.asarray(loaded["clear.png"]).min() == 255                # over white
    for name, tolerance in (("cmyk.jpg", 12), ("palette.gif", 30)):
        assert abs(np.asarray(loaded[name]).astype(int) - np.asarray(image)).mean() < tolerance
    for name in ("deep.png", "floats.tiff"):
        assert abs(np.asarray(loaded[name]).astype(int) - np.asarray(loaded["grey.png"])).max() <= 1


def fill(folder, count, size=20):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(size, size).save(folder / f"{i:04}.png")


def test_which_files_are_held_out(tmp_path):
    fill(tmp_path / "loose" / "deep" / "down", 60)
    train, val = (open_images(str(tmp_path / "loose"), "", split).paths for split in ("train", "val"))
    assert len(val) == 2 and len(train) == 58 and not set(train) & set(val)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "class").symlink_to(tmp_path / "loose")
    assert len(data.image_paths(tmp_path / "linked")) == 60
    fill(tmp_path / "halved" / "val", 2)
    fill(tmp_path / "halved" / "rest", 60)
    assert len(open_images(str(tmp_path / "halved"), "", "train")) == 60 and len(open_images(str(tmp_path / "halved"), "", "val")) == 2
    fill(tmp_path / "split" / "train" / "cat", 3)
    fill(tmp_path / "split" / "validation" / "cat", 2)
    assert len(open_images(str(tmp_path / "split"), "", "train")) == 3
    assert len(open_images(str(tmp_path / "split"), "", "val")) == 2


def test_wrong_data(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in ((tmp_path / "empty", "data: no images under"), (tmp_path / "absent", "data: .* is not a folder")):
        with pytest.raises(ValueError, match=message):
            open_images(str(name), "", "train")
    with pytest.raises(ValueError, match="data_root: .*FashionMNIST/raw"):
        open_images("fashion-mnist", str(tmp_path), "train")


def test_corrupt_files_are_replaced_and_counted(tmp_path):
    fill(tmp_path, 10)
    paths = data.image_paths(tmp_path)
    Path(paths[3]).write_bytes(b"")
    Path(paths[4]).write_bytes(Path(paths[4]).read_bytes()[:60])
    folder = Views(Folder(paths), [16], (4, 4), train=False)
    view, *_, unreadable = folder[0, 3]
    assert unreadable == [paths[3]] and torch.equal(view, folder[0, 5][0])    # the other is named in its own turn
    *_, names = next(iter(data._loader(folder, [[(0, 3), (0, 5), (0, 4)]], 0, CPU)))
    assert names == [paths[3], paths[4]]


def test_only_corrupt_files(tmp_path):
    fill(tmp_path, 3)
    for path in data.image_paths(tmp_path):
        Path(path).write_bytes(b"no image")
    view, *_, unreadable = Views(Folder(data.image_paths(tmp_path)), [16], (4, 4), train=False)[0, 0]
    assert len(unreadable) == data.IN_A_ROW and view.unique().numel() == 1


def test_more_than_one_percent_corrupt_is_an_error():
    said = []
    log = CorruptImages(1000, said.append)
    log.add(0, [f"{i}.jpg" for i in range(10)])
    log.add(0, [])
    log.add(1, [f"{i}.jpg" for i in range(10)])                        # the next epoch starts anew, and says nothing again
    assert len(said) == 10 and "0.jpg" in said[0] and len(log.names) == 10
    continued = CorruptImages(1000, said.append, log.state())
    with pytest.raises(ValueError, match="1 % .*0.jpg, 1.jpg, .*9.jpg$"):
        continued.add(1, ["10.jpg"])


def test_held_out_images_are_spread_over_all():
    class Config:
        batch_size, accumulate, workers = 8, 1, 0
    seen = [index for rank in range(2) for batch in data.val_loader(views(), Config, CPU, rank=rank, world_size=2, images=100).batch_sampler
            for _, index in batch]
    assert sorted(seen) == list(range(0, 10_000, 100))


# labels --------------------------------------------------------------------------------------------------------------

def test_shapes_have_labels_and_maps():
    labelled, mapped = data.Shapes("train"), data.Shapes("train", maps=True)
    assert labelled.classes == list(data.SHAPES) and mapped.classes == ["background", *data.SHAPES]
    for index in range(20):
        assert (mapped.target(index) == labelled.target(index) + 1).any() and mapped.target(index).shape == (64, 64)


class Numbers:
    """40 images, of class index % 4; class 3 has one less."""
    classes = ["a", "b", "c", "d"]

    def __len__(self):
        return 39

    def labels(self):
        return np.arange(39) % 4

    def target(self, index):
        return index % 4


def test_what_is_split_off_is_kept_from_training():
    rest, kept = data.split_off(Numbers(), 9)
    assert sorted(rest.indices + kept.indices) == list(range(39)) and len(kept) == 9 and kept.indices == data.split_off(Numbers(), 9)[1].indices
    assert kept.target(3) == kept.indices[3] % 4 and data.few_labels(rest, 8, 0).labels().tolist().count(0) == 2
    assert not {kept.indices[i] for i in range(9)} & {rest.indices[i] for i in data.few_labels(rest, 8, 0).indices}


def test_few_labels_are_balanced_and_seeded():
    subset = data.few_labels(Numbers(), 12, 0)
    assert len(subset) == 12 and np.bincount(subset.labels()).tolist() == [3, 3, 3, 3] and len(set(subset.indices)) == 12
    assert subset.indices == data.few_labels(Numbers(), 12, 0).indices != data.few_labels(Numbers(), 12, 1).indices
    assert sorted(np.bincount(data.few_labels(Numbers(), 14, 0).labels()).tolist()) == [3, 3, 4, 4]
    assert [subset.target(i) for i in range(12)] == subset.labels().tolist()
    with pytest.raises(ValueError, match="labels: from 4, one a class, to 39, not 3"):
        data.few_labels(Numbers(), 3, 0)


def test_labelled_folders(tmp_path):
    for split, classes in (("train", "abc"), ("validation", "ab")):
        for k, name in enumerate(classes):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 30), (k, i, 0)).save(tmp_path / split / name / f"{i}.png")
    train, held_out = data.open_labelled(str(tmp_path), "")
    assert train.classes == held_out.classes == ["a", "b", "c"] and train.labels().tolist() == [0, 0, 1, 1, 2, 2]
    assert held_out.target(3) == 1 and held_out.image(3).getpixel((0, 0)) == (1, 1, 0)
    (tmp_path / "validation" / "z").mkdir()
    with pytest.raises(ValueError, match="has class z"):
        data.open_labelled(str(tmp_path), "")
    (tmp_path / "validation" / "z").rmdir()
    (tmp_path / "train" / "d").mkdir()
    with pytest.raises(ValueError, match="class d of .* has no images"):
        data.open_labelled(str(tmp_path), "")


def test_labelled_draws_depend_on_seed_epoch_and_index_alone():
    views = data.Labelled(data.Shapes("train"), data.classification_transform(32, train=True, randaugment=9, erasing=0.5))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = views[2, 5]
    assert torch.equal(torch.get_rng_state(), state)                   # the model's draws are not disturbed
    torch.rand(3)
    again = views[2, 5]
    assert torch.equal(first[0], again[0]) and first[1] == again[1] and first[0].dtype == torch.uint8 and first[0].shape == (3, 32, 32)
    assert not torch.equal(first[0], views[3, 5][0]) and not torch.equal(first[0], views[2, 6][0])


def test_erasing_paints_rectangles():
    source = data.Shapes("train")
    plain, erased = (data.Labelled(source, data.classification_transform(32, train=True, erasing=p)) for p in (0.0, 1.0))
    grey = torch.tensor(data.GREY, dtype=torch.uint8).view(3, 1, 1)
    shares = [(erased[0, i][0] == grey).all(0).float().mean().item() for i in range(30)]
    assert all(0.01 < share < 0.5 for share in shares) and not any((plain[0, i][0] == grey).all(0).any() for i in range(30))
    for i in range(5):                                                 # all grey pixels are one rectangle
        rows, columns = (erased[0, i][0] == grey).all(0).nonzero().t()
        assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)


def test_evaluation_sees_the_centre():
    class Wide:
        classes = ["a", "b"]
        def __len__(self): return 1
        def image(self, index): return Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
        def target(self, index): return 1
    for eval_crop, reach in ((1.0, 50), (0.5, 25)):
        image, label, _ = data.Labelled(Wide(), data.classification_transform(50, train=False, eval_crop=eval_crop))[0, 0]
        assert image.shape == (3, 50, 50) and label == 1
        assert abs(image[0, 0, 0].item() - (100 - reach)) < 3 and abs(image[0, 0, -1].item() - (100 + reach)) < 3


def test_a_broken_image_takes_its_label_along(tmp_path):
    for name in "ab":
        for i in range(3):
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30)).save(tmp_path / "train" / name / f"{i}.png")
    (tmp_path / "train" / "a" / "2.png").write_bytes(b"no image")
    source = data.LabelledFolder(tmp_path / "train")
    image, label, unreadable = data.Labelled(source, data.classification_transform(16, train=False))[0, 2]
    assert label == 1 and unreadable == [str(tmp_path / "train" / "a" / "2.png")]


# colours -------------------------------------------------------------------------------------------------------------

def draws(seed, jitter=0.4):
    """What colour_jitter draws from a generator: (factors, order)."""
    rng = np.random.default_rng(seed)
    return rng.uniform(1 - jitter, 1 + jitter, 3).tolist(), rng.permutation(3).tolist()


def mean_grey(image):
    return (image.mean((1, 2)) @ torch.tensor(data.GREY_OF_RGB)).item()


@pytest.mark.parametrize("seed", range(12))
def test_colour_jitter_is_torchvisions_where_nothing_is_cut(seed):
    image = 0.35 + 0.2 * torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(seed))
    factors, order = draws(seed)
    expected = image[0]
    for i in order:
        expected = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[i](expected, factors[i])
    colours = data.colour_jitter(mean_grey(image[0]), np.random.default_rng(seed), 0.4)
    out = data.to_float(image * 255, colours[None])[0]                  # of floats, so that nothing is rounded
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=0)        # torchvision's grey weights have four digits


def test_colour_jitter_keeps_the_moments_of_torchvisions():
    """Cutting to [0, 1] once rather than after each operation changes the mean and the spread of pixels by less than 0.01."""
    ours, theirs = [], []
    for seed in range(200):
        image = torch.from_numpy(data.render_scene("train", seed)[0]).permute(2, 0, 1)
        factors, order = draws(seed)
        expected = image
        for i in order:
            expected = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[i](expected, factors[i])
        theirs.append(expected.float() / 255)
        colours = data.colour_jitter(mean_grey(image / 255), np.random.default_rng(seed), 0.4)
        ours.append(data.to_float(image[None], colours[None])[0])
    ours, theirs = torch.stack(ours), torch.stack(theirs)
    assert abs(ours.mean() - theirs.mean()) < 0.01 and abs(ours.std() - theirs.std()) < 0.01
    assert (ours.mean((1, 2, 3)) - theirs.mean((1, 2, 3))).abs().max() < 0.03
    assert (ours - theirs).abs().mean() < 0.01 and ours.std() != theirs.std()


def test_no_jitter_changes_nothing():
    image = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    colours = data.colour_jitter(0.5, np.random.default_rng(0), 0.0)
    assert torch.equal(data.to_float(image, colours.expand(2, 3)), data.to_float(image))
    assert torch.equal(views(train=False)[0, 3][2], data.NO_JITTER)


def test_both_views_are_one_crop_resized_as_pil_does():
    source = Shapes("train")
    one = views(source=source, jitter=0.0)
    for index in range(5):
        large, small, *_ = one[2, index]
        rng = np.random.default_rng([0, 1, 2, index])
        box = data.random_crop_box(64, 64, rng, (0.08, 1.0))
        for view, size in ((large, 32), (small, 16)):
            expected = torch.from_numpy(np.array(source.image(index).crop(box).resize((size, size), Image.BICUBIC))).permute(2, 0, 1)
            assert min((candidate.int() - expected.int()).abs().max() for candidate in (view, view.flip(2))) <= 1


def test_a_large_jpeg_is_decoded_at_the_size_that_its_crop_needs(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1600, 1200), Image.BICUBIC)
    turned = picture.getexif()
    turned[0x0112] = 6                                                  # to be turned by a quarter
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "b.jpg", quality=95, exif=turned)
    picture.save(tmp_path / "c.png")
    source = Folder(data.image_paths(tmp_path))
    assert [source.size(i) for i in range(3)] == [(1600, 1200), (1200, 1600), (1600, 1200)]
    assert [source.image(i, (400, 300)[::-1 if i == 1 else 1]).size for i in range(3)] == [(400, 300), (300, 400), (1600, 1200)]
    assert source.image(0, (401, 300)).size == (800, 600)
    for index in range(3):
        for epoch in range(4):
            fast = Views(source, [32, 16], (4, 4), jitter=0.0)[epoch, index]
            with monkeypatch.context() as patch:
                patch.setattr(Image.Image, "draft", lambda *_: None)
                patch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
                slow = Views(source, [32, 16], (4, 4), jitter=0.0)[epoch, index]
            for one, other in zip(fast[:2], slow[:2]):
                difference = (one.float() - other.float()).abs()
                assert difference.mean() < 4 and difference.max() < 40, (index, epoch)      # half a pixel of these gradients


def test_a_jpeg_that_is_cut_short_is_unreadable_not_grey(tmp_path):
    Image.effect_noise((200, 150), 60).convert("RGB").save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "short.jpg").write_bytes(whole[:len(whole) * 2 // 3])
    *_, unreadable = Views(Folder(data.image_paths(tmp_path)), [32, 16], (4, 4))[0, 0]
    assert unreadable == [str(tmp_path / "short.jpg")]
