"""Training of the tokenizer: its evaluation by hand, the presets, and short runs."""
import json

import pytest
import torch
from conftest import equal, log
from PIL import Image
from torch.special import entr

import data
import dvae
import run
import train_dvae
import weights

CPU = torch.device("cpu")
SMALL = """--steps 6 --batch-size 8 --image-size 16 --vocab-size 64 --hidden 8 --save-every 2 --lr-ramp 0.6
           --precision fp32""".split()


@pytest.fixture(scope="module", autouse=True)
def few_held_out_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Shapes, "__len__", lambda self: 10_000 if self.split == "train" else 48)
        yield


def parse(*flags):
    return train_dvae.parse_args([str(flag) for flag in flags])


def train(out, *flags):
    """Run in this process, six steps unless flags say otherwise. Returns the folder of the run."""
    path = train_dvae.train(parse("--out", out, *SMALL, *flags), CPU)
    assert path == out / "model.pt"
    return out


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, few_held_out_images):
    return train(tmp_path_factory.mktemp("run"))


# ---- Evaluation ----

def test_evaluation_by_hand_and_the_warning_of_a_collapse(capsys):
    torch.manual_seed(0)
    model = dvae.DiscreteVAE(vocab_size=512, hidden=8, groups=3, blocks_per_group=1)
    images = (255 * torch.rand(32, 3, 16, 16).cumsum(2).cumsum(3) / 256).byte()
    x = data.to_float(images)
    train_dvae.initialise_codes(model, x)
    views = {(0, index): {"token_image": image} for index, image in enumerate(images)}
    args = parse("--temperature", 0.5, "--batch-size", 24)             # batches of 24 and 8 images
    report = train_dvae.evaluate(model, views, args, CPU)
    tokens = model.tokenize(x)
    error = model.decode(tokens) - x
    assert report == pytest.approx({
        "soft_mse": (model(x, 0.5).images - x).square().mean().item(),
        "hard_mse": error.square().mean().item(), "hard_mae": error.abs().mean().item(),
        "codes": tokens.unique().numel(),
        "perplexity": entr(tokens.flatten().bincount() / tokens.numel()).sum().exp().item()}, rel=1e-4)
    assert not capsys.readouterr().out
    model.encoder.blocks.output.conv.b.data[0] += 1e4
    assert train_dvae.evaluate(model, views, args, CPU)["perplexity"] == pytest.approx(1)
    assert "warning: the codebook is collapsing, 1 of 512" in capsys.readouterr().out


@pytest.mark.parametrize("vocab_size", [2, 10, 64, 100, 101])
def test_small_codebooks_collapse_too(vocab_size, capsys):
    torch.manual_seed(0)
    model = dvae.DiscreteVAE(vocab_size, hidden=8, groups=3, blocks_per_group=1)
    images = (255 * torch.rand(32, 3, 16, 16).cumsum(2).cumsum(3) / 256).byte()
    train_dvae.initialise_codes(model, data.to_float(images))
    views = {(0, index): {"token_image": image} for index, image in enumerate(images)}
    for bias, warns in ((0, False), (1e4, True)):
        model.encoder.blocks.output.conv.b.data[0] += bias
        train_dvae.evaluate(model, views, parse("--batch-size", 16), CPU)
        assert ("warning: the codebook is collapsing" in capsys.readouterr().out) == warns


@pytest.mark.parametrize("trained, warns", [(None, False), (16, False), (32, True), (8, True)])
def test_a_tokenizer_at_another_size_than_it_was_trained_at(trained, warns, capsys):
    tokenizer = dvae.DiscreteVAE(vocab_size=8, hidden=8, groups=3)     # reduces 4x
    tokenizer.image_size = trained
    train_dvae.compare_sizes(tokenizer, (4, 4))
    line = capsys.readouterr().out
    assert line.startswith(f"warning: the tokenizer was trained on images of {trained} pixels") == warns


# ---- Presets ----

def test_the_base_preset_is_dall_es():
    args = parse("--data", "folder")
    expected = dict(vocab_size=8192, hidden=256, groups=4, blocks_per_group=2, batch_size=512, lr=1e-4,
                    min_lr=1.25e-6, weight_decay=1e-4, ema=0.999, kl_weight=6.6, temperature=1 / 16,
                    init_codes=False, encoder_lr=1.0, steps=3_000_000)
    assert {name: getattr(args, name) for name in expected} == expected and dvae.PIXEL_EPS == 0.1
    ramps = [share * args.steps for share in (args.kl_ramp, args.temperature_ramp, args.lr_ramp)]
    assert ramps == pytest.approx([5_000, 150_000, 1_200_000], rel=0.01)


# ---- Runs ----

def test_files_of_a_run(finished_run):
    result, lines = json.loads((finished_run / "result.json").read_text()), log(finished_run)
    assert result["codes"] > 10 and min(result["hard_mse"], result["soft_mse"], result["hard_mae"]) > 0
    for line in lines:                                                 # 3 x 4 x 4 channels per token
        assert line["loss"] == pytest.approx(line["nll"] + line["kl_weight"] / 48 * line["kl"], rel=1e-5)
    for name, first, last in (("temperature", 1.0, 0.0625), ("kl_weight", 0.0, 0.5)):
        assert lines[0][name] == first != lines[1][name] and lines[-1][name] == last
    assert lines[1]["lr"] > lines[-2]["lr"] == lines[-1]["lr"] == 4e-5 * 8 / 16    # min_lr at this batch size
    assert {name: lines[-1][f"val_{name}"] for name in result} == result
    Image.open(finished_run / "tokenizer.png").verify()
    model = weights.load_tokenizer(finished_run / "model.pt")
    assert model.vocab_size == 64 and model.downsample == 4


def test_the_picture_shows_images_with_soft_and_hard_codes(finished_run):
    model = weights.load_tokenizer(finished_run / "model.pt")
    _, held_out = data.open_splits("shapes", "")
    views = data.Views(held_out, None, 16, train=False)
    rows, = train_dvae.look(model, views, parse(), CPU)
    images = data.to_float(torch.stack([views[0, index]["token_image"] for index in range(0, 48, 4)]))
    expected = images, model(images, 0.0625).images, model.decode(model.tokenize(images))
    assert all(torch.equal(row, images) for row, images in zip(rows.values(), expected, strict=True))


def test_a_run_that_died_continues_bit_for_bit(finished_run, tmp_path, monkeypatch):
    all_reduce = run.Run._all_reduce

    def die_at_step_5(self, values):
        if self.step == 4:
            raise RuntimeError("died")
        return all_reduce(self, values)
    monkeypatch.setattr(run.Run, "_all_reduce", die_at_step_5)
    with pytest.raises(RuntimeError, match="died"):
        train(tmp_path)
    monkeypatch.setattr(run.Run, "_all_reduce", all_reduce)
    train(tmp_path)
    assert log(tmp_path) == log(finished_run)
    assert equal(*(torch.load(out / "model.pt")["model"] for out in (tmp_path, finished_run)))


def test_one_step_by_hand(tmp_path):
    """AdamW's first step moves each weight by lr; the average takes 9/10 of it, a slow encoder 1/10."""
    flags = ["--steps", 1, "--encoder-lr", 0.1, "--no-init-codes"]
    initial = train_dvae.build_model(parse(*SMALL, *flags), None, CPU)[0].state_dict()
    train(tmp_path, *flags)
    average, model = (torch.load(tmp_path / name)["model"] for name in ("model.pt", "last.pt"))
    lr = log(tmp_path)[0]["lr"]
    for part, scale in (("encoder", 0.1), ("decoder", 1.0)):
        name = f"{part}.blocks.group_1.block_1.res_path.conv_1.w"
        moved = (average[name] - initial[name]).abs().max().item()
        assert moved == pytest.approx(0.9 * scale * lr, rel=0.02)
    for name in average:
        assert (average[name] - model[name]).abs().max() <= 0.11 * lr, name
