import math

import pytest
import torch
import torch.nn.functional as F

import dvae
from dvae import DiscreteVAE, logit_laplace_nll, map_pixels, perplexity, unmap_pixels


def small(seed=0, **more):
    torch.manual_seed(seed)
    return DiscreteVAE(**{"vocab_size": 32, "hidden": 8, "groups": 3, "blocks_per_group": 1, **more})


def test_logit_laplace_by_hand():
    # x = 1/2: logit 0, x (1 - x) = 1/4. b = 1, mu = 2: f = exp(-2) / (2 * 1/4), so -ln f = ln(1/2) + 2
    value = logit_laplace_nll(torch.tensor(0.5), torch.tensor(2.0), torch.tensor(0.0))
    assert value.item() == pytest.approx(math.log(0.5) + 2)
    # b = e: ln b = 1 and |logit - mu| / b = 2 / e
    value = logit_laplace_nll(torch.tensor(0.5), torch.tensor(2.0), torch.tensor(1.0))
    assert value.item() == pytest.approx(math.log(0.5) + 1 + 2 / math.e)


@pytest.mark.parametrize("mu, log_b", [(0.0, 0.0), (1.5, -1.0), (-0.5, 0.5)])
def test_logit_laplace_is_a_density(mu, log_b):
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    total = torch.exp(-logit_laplace_nll(x, torch.tensor(mu), torch.tensor(log_b))).mean()
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_pixels_are_squeezed_and_back():
    x = torch.rand(5)
    assert map_pixels(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.1, 0.9])
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)


def test_elbo_is_reduced_as_stated():
    model = small().eval()
    images = torch.rand(2, 3, 16, 24)
    reconstruction, kl, output = model(images, temperature=0.7)
    logits = model.encode(images)                                      # (B, V, h, w)
    assert logits.shape == (2, 32, 4, 6) and output.shape == images.shape
    log_q = logits.log_softmax(1)
    per_token = math.log(32) + (log_q.exp() * log_q).sum(1)
    assert kl.item() == pytest.approx(per_token.mean().item(), rel=1e-5)
    z = (logits / 0.7).softmax(1)
    six = model.decoder.blocks(z)                                      # the plain way: a 1x1 convolution over V channels
    mu, log_b = six[:, :3], six[:, 3:]
    x = 0.8 * images + 0.1
    nll = math.log(2) + log_b + (x * (1 - x)).log() + (torch.logit(x) - mu).abs() / log_b.exp()
    assert reconstruction.item() == pytest.approx(nll.mean().item(), rel=1e-5)
    torch.testing.assert_close(output, ((torch.sigmoid(mu) - 0.1) / 0.8).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_cold_codes_are_hard_codes():
    model = small().eval()
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(images, 1e-6).images, model.decode(model.tokenize(images)), atol=1e-4, rtol=1e-4)


def test_tokens():
    model = small()
    images = torch.rand(2, 3, 16, 24)
    tokens = model.tokenize(images)                                    # in training mode, and still without noise
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 4, 6) and model.downsample == 4
    assert torch.equal(tokens, model.encode(images).argmax(1))


def test_noise_is_gumbel():
    """argmax of logits + Gumbel noise is a draw from softmax(logits): at a low temperature, code frequencies are q."""
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(2, 100_000, 3)
    drawn = (logits + dvae.gumbel_noise((100_000, 3), [1, 2], torch.device("cpu"))).argmax(-1).flatten()
    torch.testing.assert_close(drawn.bincount() / len(drawn), logits[0, 0].softmax(0), atol=5e-3, rtol=0)


def test_noise_of_an_image_is_the_same_in_any_batch():
    cpu = torch.device("cpu")
    noise = dvae.gumbel_noise((4, 32), [5, 6, 7], cpu)
    assert torch.equal(noise[1:], dvae.gumbel_noise((4, 32), [6, 7], cpu)) and torch.equal(noise[2:], dvae.gumbel_noise((4, 32), [7], cpu))
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("seeds", [None, [1, 2, 3, 4, 5]], ids=["plain", "noise"])
@pytest.mark.parametrize("logits_at_a_time", [1, 2 * 6 * 50, 10 ** 6])
def test_codes_and_kl_have_the_plain_values_and_gradients(monkeypatch, seeds, logits_at_a_time):
    torch.manual_seed(0)
    features, w, b, table = given = [torch.randn(shape, requires_grad=True) for shape in ((5, 6, 16), (50, 16), (50,), (128, 50))]
    logits = features @ w.t() + b
    log_q = logits.log_softmax(-1)
    noise = dvae.gumbel_noise((6, 50), seeds, features.device) if seeds else 0
    codes = ((logits + noise) / 0.7).softmax(-1) @ table.t()
    kl = math.log(50) + (log_q.exp() * log_q).sum(-1).mean()
    expected = torch.autograd.grad(codes.square().sum() + 30 * kl, given)
    monkeypatch.setitem(dvae.CHUNK, "cpu", logits_at_a_time)
    ours = dvae.GumbelCodes.apply(*given, 0.7, seeds)
    torch.testing.assert_close(ours, (codes, kl), atol=1e-5, rtol=1e-5)
    for gradient, plain in zip(torch.autograd.grad(ours[0].square().sum() + 30 * ours[1], given), expected, strict=True):
        torch.testing.assert_close(gradient, plain, atol=1e-4 * plain.abs().max().item(), rtol=1e-4)


def test_kl_to_uniform_by_hand():
    q = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1 - 3e-9, 1e-9, 1e-9, 1e-9], [0.5, 0.5 - 2e-9, 1e-9, 1e-9]])
    for row, expected in zip(q, [0, math.log(4), math.log(2)]):
        _, kl = dvae.GumbelCodes.apply(torch.ones(1, 1, 1), row.log()[:, None], torch.zeros(4), torch.ones(128, 4), 1.0, None)
        assert kl.item() == pytest.approx(expected, abs=1e-6)


def test_tokens_of_a_coarse_encoder():
    """Logits of near codes are close together: in half precision, many would be one number."""
    model = small(vocab_size=512)
    images = torch.rand(64, 3, 16, 16).cumsum(2).cumsum(3) / 256
    model.initialise_codes(images)
    fine, output = model.tokenize(images), model.encoder.blocks.output.conv
    assert torch.equal(model.for_tokenizing(images.device, torch.bfloat16).tokenize(images), fine)       # three layers: bf16 would be too coarse
    model.for_tokenizing(images.device, torch.float16)
    assert model.encoder.blocks.input.w.dtype == torch.float16 and output.w.dtype == torch.float32 and not output.w.requires_grad
    agree = (model.tokenize(images) == fine).float().mean()
    rounded = F.linear(model.features(images), output.w.flatten(1).half(), output.b.half()).argmax(-1)
    assert agree > 0.9 and agree > (rounded == fine).float().mean() + 0.2


def test_tokens_under_autocast():
    model = small(vocab_size=512)
    images = torch.rand(16, 3, 16, 16).cumsum(2).cumsum(3) / 256
    model.initialise_codes(images)
    fine = model.tokenize(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.tokenize(images), fine)               # shallow: fp32 all the same
    deep = dvae.DiscreteVAE(512, 8, groups=2, blocks_per_group=5).eval()
    deep.initialise_codes(images)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, features, output = deep.tokenize(images), deep.features(images), deep.encoder.blocks.output.conv
    assert features.dtype == torch.bfloat16
    logits = F.linear(features.float(), output.w.flatten(1), output.b)
    assert (tokens == logits.argmax(-1)).float().mean() > 0.99         # of these features, in fp32


def test_noise_in_training_only():
    model = small()
    images = torch.rand(1, 3, 16, 16)
    assert not torch.equal(model(images, 1.0).images, model(images, 1.0).images)
    model.eval()
    assert torch.equal(model(images, 1.0).images, model(images, 1.0).images)


def test_initial_codes_are_all_over_the_images():
    model = small(vocab_size=256)
    images = torch.rand(32, 3, 16, 16).cumsum(2).cumsum(3) / 256
    before = model.tokenize(images).unique().numel()
    model.initialise_codes(images)
    used = model.tokenize(images).unique().numel()
    assert used > 150 > 3 * before
    confidence = model.encode(images).softmax(1).amax(1).mean()
    assert 0.02 < confidence < 0.9                                     # neither noise nor a hard choice


def test_perplexity():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiples of 4"):
        small().encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(ValueError, match="vocab_size must be at least 2"):
        small(vocab_size=1)


def test_full_size_and_initialisation():
    torch.manual_seed(0)
    model = DiscreteVAE()
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(53.8e6, rel=2e-3)
    assert model.encoder.blocks.group_2.block_1.post_gain == 1 / 64 and model.downsample == 8
    for conv in (model.encoder.blocks.input, model.encoder.blocks.group_3.block_1.res_path.conv_2, model.decoder.blocks.output.conv):
        assert conv.w.std().item() == pytest.approx(conv.w[0].numel() ** -0.5, rel=0.05) and not conv.b.any()
    names = set(model.encoder.state_dict())
    assert {"blocks.input.w", "blocks.group_1.block_1.res_path.conv_1.b", "blocks.group_2.block_1.id_path.w",
            "blocks.output.conv.w"} <= names and "blocks.group_1.block_1.id_path.w" not in names


def test_equals_the_dall_e_package():
    dall_e = pytest.importorskip("dall_e")
    ours = small(hidden=64, groups=4, blocks_per_group=2, vocab_size=512).eval()
    common = dict(n_hid=64, n_blk_per_group=2, vocab_size=512)
    encoder, decoder = dall_e.Encoder(**common), dall_e.Decoder(**common)
    ours.encoder.load_state_dict(encoder.state_dict(), strict=True)
    ours.decoder.load_state_dict(decoder.state_dict(), strict=True)
    for size in (16, 40):
        images = torch.rand(2, 3, size, size)
        logits = encoder(dall_e.map_pixels(images))
        torch.testing.assert_close(ours.encode(images), logits, atol=1e-5, rtol=1e-5)
        z = torch.nn.functional.one_hot(logits.argmax(1), 512).permute(0, 3, 1, 2).float()
        theirs = dall_e.unmap_pixels(torch.sigmoid(decoder(z)[:, :3]))
        torch.testing.assert_close(ours.decode(logits.argmax(1)), theirs, atol=1e-5, rtol=1e-5)


def test_features_for_tokenizing_compile_to_one_graph():
    torch.compiler.reset()
    model, images = dvae.DiscreteVAE(vocab_size=30, hidden=8, groups=3, blocks_per_group=1).eval(), torch.rand(2, 3, 16, 16)
    expected = model.tokenize(images)
    model.features = torch.compile(model.features, fullgraph=True, backend="eager")
    assert torch.equal(model.tokenize(images), expected)
