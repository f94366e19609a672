"""The discrete VAE: its terms by hand, against the dall_e package, and short training runs."""
import json
import math

import pytest
import torch
from conftest import equal, log
from PIL import Image
from torch.distributions import Categorical, kl_divergence
from torch.special import entr

import data
import dvae
import training
import weights
from dvae import DiscreteVAE

CPU = torch.device("cpu")


def small(**more):
    torch.manual_seed(0)
    return DiscreteVAE(**{"vocab_size": 32, "hidden": 8, "groups": 3, "blocks_per_group": 1, **more})


def smooth_images(count):
    """Random images without noise, (count, 3, 16, 16)."""
    return torch.rand(count, 3, 16, 16).cumsum(2).cumsum(3) / 256


# ---- The ELBO ----

@pytest.mark.parametrize("mu, log_b", [(0.0, 0.0), (1.5, -1.0), (-0.5, 0.5)])
def test_logit_laplace_is_a_density(mu, log_b):
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    total = torch.exp(-dvae.logit_laplace_nll(x, torch.tensor(mu), torch.tensor(log_b))).mean()
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_elbo_is_reduced_as_stated():
    model, images = small().eval(), torch.rand(2, 3, 16, 24)
    model.encoder.blocks.output.conv.w.data *= 9                       # far from uniform
    model.decoder.blocks.output.conv.b.data[0] = 4                     # sigmoid(mu) of red is above 0.9
    nll, kl, output = model(images, temperature=0.7)
    logits = model.encode(images)                                      # (B, V, h, w)
    assert logits.shape == (2, 32, 4, 6) and output.shape == images.shape
    q, uniform = Categorical(logits=logits.permute(0, 2, 3, 1)), Categorical(torch.ones(32))
    assert kl.item() == pytest.approx(kl_divergence(q, uniform).mean().item(), rel=1e-5)
    mu, log_b = model.decoder.blocks((logits / 0.7).softmax(1)).chunk(2, dim=1)
    x = 0.8 * images + 0.1
    per_channel = math.log(2) + log_b + (x * (1 - x)).log() + (torch.logit(x) - mu).abs() / log_b.exp()
    assert nll.item() == pytest.approx(per_channel.mean().item(), rel=1e-5)
    expected = ((torch.sigmoid(mu) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_noise_is_gumbel():
    """At a low temperature, softmax((logits + noise) / temperature) is a draw from softmax(logits)."""
    model, logits, codes = small(vocab_size=3), torch.tensor([0.0, 1.0, 2.0]), []
    model.encode = lambda images: logits.view(1, 3, 1, 1).expand(1, 3, 300, 300)
    table = model.decoder.blocks.input
    with torch.no_grad():
        table.w.copy_(torch.eye(128)[:, :3, None, None])               # the code is its own one-hot vector
    model.decode_codes = lambda given: codes.append(given) or (0, torch.zeros(1), torch.zeros(1))
    model(torch.rand(1, 3, 4, 4), 1e-6)
    torch.testing.assert_close(codes[0][..., :3].mean((0, 1, 2)), logits.softmax(0), atol=5e-3, rtol=0)


# ---- Tokens ----

def test_tokens_are_the_likeliest_codes_without_noise():
    model, images = small(), torch.rand(2, 3, 16, 24)                  # in training mode
    torch.nn.init.normal_(model.decoder.blocks.input.b)
    tokens = model.tokenize(images)
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 4, 6)
    assert torch.equal(tokens, model.encode(images).argmax(1))
    places = torch.tensor([47, 0, 25])
    assert torch.equal(model.tokenize(images, places), tokens.flatten()[places])
    cold = model.eval()(images, 1e-6).images                           # no noise in evaluation either
    torch.testing.assert_close(cold, model.decode(tokens), atol=1e-4, rtol=1e-4)


def test_tokens_under_autocast():
    """Convolutions in bf16, the last one and argmax in fp32: bf16 is too coarse for logits of near codes."""
    model, images, tf32 = small(vocab_size=512), smooth_images(64), []
    model.initialise_codes(images)
    output = model.encoder.blocks.output.conv
    fine = model.tokenize(images)
    with torch.autocast("cpu", torch.bfloat16):
        features, rounded = model.forward_features(images), model.encode(images).argmax(1)
        output.register_forward_pre_hook(lambda *_: tf32.append(torch.backends.cudnn.allow_tf32))
        tokens = model.tokenize(images)
    assert features.dtype == torch.bfloat16 and tf32 == [False] and torch.backends.cudnn.allow_tf32
    assert torch.equal(tokens, output(features.float()).argmax(1))
    assert (tokens == fine).float().mean() > (rounded == fine).float().mean() + 0.1


def test_initial_codes_are_all_over_the_images():
    model, images = small(vocab_size=256), smooth_images(32)
    before = model.tokenize(images).unique().numel()
    model.initialise_codes(torch.cat([images, torch.zeros(96, 3, 16, 16)]))    # equal patches share a code
    used = model.tokenize(images).unique().numel()
    assert used > 150 > 3 * before
    confidence = model.encode(images).softmax(1).amax(1).mean()
    assert 0.03 < confidence < 0.15                                    # neither noise nor a hard choice
    assert model.decoder.blocks.input.w.std().item() == pytest.approx(1, abs=0.01)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiples of 4"):
        small().encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(ValueError, match="vocab_size must be at least 2"):
        small(vocab_size=1)


def test_evaluation_by_hand_and_the_warning_of_a_collapse(capsys):
    model, images = small(vocab_size=512), (255 * smooth_images(32)).byte()
    x = data.to_float(images)
    model.initialise_codes(x)
    batches = [(images[:8],), (images[8:],)]                           # of different sizes
    report = dvae.evaluate(model, batches, 0.5, CPU)
    tokens = model.tokenize(x)
    error = model.decode(tokens) - x
    assert report == pytest.approx({
        "soft_mse": (model(x, 0.5).images - x).square().mean().item(),
        "hard_mse": error.square().mean().item(), "hard_mae": error.abs().mean().item(),
        "codes": tokens.unique().numel(),
        "perplexity": entr(tokens.flatten().bincount() / tokens.numel()).sum().exp().item()}, rel=1e-4)
    assert not capsys.readouterr().out
    model.encoder.blocks.output.conv.b.data[0] += 1e4
    assert dvae.evaluate(model, batches, 0.5, CPU)["perplexity"] == pytest.approx(1)
    assert "warning: the codebook is collapsing, 1 of 512" in capsys.readouterr().out


# ---- DALL-E's architecture ----

def test_full_size_and_initialisation():
    with torch.device("meta"):
        full = DiscreteVAE()
    assert sum(p.numel() for p in full.encoder.parameters()) == pytest.approx(53.8e6, rel=2e-3)
    assert full.encoder.blocks.group_2.block_1.post_gain == 1 / 64 and full.downsample == 8
    model = small(hidden=64, vocab_size=512)
    for conv in (model.encoder.blocks.input, model.encoder.blocks.group_3.block_1.res_path.conv_2,
                 model.decoder.blocks.output.conv):
        assert conv.w.std().item() == pytest.approx(conv.w[0].numel() ** -0.5, rel=0.1) and not conv.b.any()


def test_the_base_preset_is_dall_es():
    config = training.parse(dvae.Config, dvae.PRESETS, ["--data", "folder", "--steps", "3000000"])
    expected = dict(vocab_size=8192, hidden=256, groups=4, blocks_per_group=2, batch_size=512, lr=1e-4,
                    min_lr=1.25e-6, weight_decay=1e-4, ema=0.999, kl_weight=6.6, temperature=1 / 16,
                    init_codes=False, encoder_lr=1.0)
    assert {name: getattr(config, name) for name in expected} == expected and dvae.PIXEL_EPS == 0.1
    ramps = [share * config.steps for share in (config.kl_ramp, config.temperature_ramp, config.lr_ramp)]
    assert ramps == pytest.approx([5_000, 150_000, 1_200_000], rel=0.01)


def test_a_model_of_the_first_edition_equals_the_dall_e_package(tmp_path):
    """Such a model.pt holds DALL-E's parameters below "encoder." and "decoder.", and the sizes."""
    dall_e = pytest.importorskip("dall_e")
    torch.manual_seed(0)
    common = dict(n_hid=64, n_blk_per_group=2, vocab_size=512)
    theirs = torch.nn.ModuleDict({"encoder": dall_e.Encoder(**common), "decoder": dall_e.Decoder(**common)})
    config = dict(vocab_size=512, hidden=64, groups=4, blocks_per_group=2, in_channels=3)
    kept = {"model": theirs.state_dict(), "config": config, "kind": "DiscreteVAE"}
    torch.save(kept, tmp_path / "model.pt")
    ours = weights.load_tokenizer(tmp_path / "model.pt")
    assert not ours.training and ours.state_dict().keys() == kept["model"].keys()
    images = torch.rand(2, 3, 40, 16)
    logits = theirs["encoder"](dall_e.map_pixels(images))
    torch.testing.assert_close(ours.encode(images), logits, atol=1e-5, rtol=1e-5)
    tokens = logits.argmax(1)
    assert torch.equal(ours.tokenize(images), tokens)
    z = torch.nn.functional.one_hot(tokens, 512).permute(0, 3, 1, 2).float()
    decoded = dall_e.unmap_pixels(torch.sigmoid(theirs["decoder"](z)[:, :3]))
    torch.testing.assert_close(ours.decode(tokens), decoded, atol=1e-5, rtol=1e-5)


# ---- Runs ----

@pytest.fixture(scope="module", autouse=True)
def few_held_out_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Shapes, "__len__", lambda self: 10_000 if self.split == "train" else 48)
        yield


def configured(out, **more):
    values = {**dvae.PRESETS["demo"], "preset": "demo", "steps": 6, "epochs": None, "batch_size": 8,
              "image_size": 16, "vocab_size": 64, "hidden": 8, "save_every": 2, "lr_ramp": 0.6,
              "out": str(out), **more}
    return training.build(dvae.Config, values)


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_held_out_images):
    """Folder of a finished run of six steps."""
    return dvae.train(configured(tmp_path_factory.mktemp("run")), CPU).parent


def test_what_a_run_leaves(run):
    result, lines = json.loads((run / "result.json").read_text()), log(run)
    assert result["codes"] > 10 and min(result["hard_mse"], result["soft_mse"], result["hard_mae"]) > 0
    for line in lines:                                                 # 3 x 4 x 4 channels a token
        assert line["loss"] == pytest.approx(line["nll"] + line["kl_weight"] / 48 * line["kl"], rel=1e-5)
    for name, first, last in (("temperature", 1.0, 0.0625), ("kl_weight", 0.0, 3.0)):
        assert lines[0][name] == first != lines[1][name] and lines[-1][name] == last
    assert lines[1]["lr"] > lines[-2]["lr"] == lines[-1]["lr"] == 4e-5
    assert Image.open(run / "tokenizer.png").size == (12 * 98 + 2, 3 * 98 + 2)    # images, soft, hard codes
    model = weights.load_tokenizer(run / "model.pt")
    assert model.vocab_size == 64 and model.downsample == 4


def test_a_run_that_died_continues_bit_for_bit(run, tmp_path, monkeypatch):
    all_reduce = training.Run.all_reduce

    def dying(self, step, values):
        if step == 5:
            raise RuntimeError("died")
        return all_reduce(self, step, values)
    monkeypatch.setattr(training.Run, "all_reduce", dying)
    with pytest.raises(RuntimeError, match="died"):
        dvae.train(configured(tmp_path), CPU)
    monkeypatch.setattr(training.Run, "all_reduce", all_reduce)
    dvae.train(configured(tmp_path), CPU)
    assert log(tmp_path) == log(run)
    assert equal(torch.load(tmp_path / "model.pt")["model"], torch.load(run / "model.pt")["model"])


def test_one_step_by_hand(tmp_path):
    """AdamW's first step moves each weight by lr; the average takes 9/10 of it, a slow encoder 1/10."""
    config = configured(tmp_path, steps=1, encoder_lr=0.1)
    initial = dvae.build_model(config, CPU)[0].state_dict()
    average = torch.load(dvae.train(config, CPU))["model"]
    model, lr = torch.load(tmp_path / "last.pt")["model"], log(tmp_path)[0]["lr"]
    for part, scale in (("encoder", 0.1), ("decoder", 1.0)):
        name = f"{part}.blocks.group_1.block_1.res_path.conv_1.w"
        moved = (average[name] - initial[name]).abs().max().item()
        assert moved == pytest.approx(0.9 * scale * lr, rel=0.02)
    for name in average:
        assert (average[name] - model[name]).abs().max() <= 0.11 * lr, name


def test_features_for_tokenizing_compile_to_one_graph():
    torch.compiler.reset()
    model, images = small().eval(), torch.rand(2, 3, 16, 16)
    expected = model.tokenize(images)
    model.forward_features = torch.compile(model.forward_features, fullgraph=True, backend="eager")
    assert torch.equal(model.tokenize(images), expected)
