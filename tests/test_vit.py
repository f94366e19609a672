"""The backbone and its models: by hand, by invariance, and against timm."""
import math
import re

import pytest
import torch
from torch import nn

import vit
from run import parameter_groups
from vit import ImageClassifier, MaskedImageModel, SemanticSegmenter, VisionTransformer, ViTConfig

POSITIONS = ["absolute", "relative", "shared_relative"]
HEADS = [MaskedImageModel, ImageClassifier, SemanticSegmenter]
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def small(position="absolute", **fields):
    """The config of a model of three blocks for 4x4 patches, with other fields as given."""
    defaults = dict(image_size=32, patch_size=8, dim=24, depth=3, heads=2, drop_path=0.0)
    return ViTConfig(**{**defaults, "position": position, **fields})


def randomised(model):
    """The model in evaluation mode with random parameters, so that no zero or one hides a term."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def random_mask(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.4


# ---- Names, sizes, initial weights ----

BLOCK = """norm1.weight norm1.bias attn.qkv.weight attn.q_bias attn.v_bias attn.proj.weight attn.proj.bias
           norm2.weight norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias""".split()
NAMES = {
    MaskedImageModel: "mask_token norm.weight norm.bias lm_head.weight lm_head.bias".split(),
    ImageClassifier: "fc_norm.weight fc_norm.bias head.weight head.bias".split(),
    SemanticSegmenter: "norm.weight norm.bias head.weight head.bias".split(),
    "absolute": ["pos_embed"], "relative": [],
    "shared_relative": ["rel_pos_bias.relative_position_bias_table"],
}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
@pytest.mark.parametrize("Model", HEADS)
def test_state_dicts_have_the_released_names(Model, position, layer_scale):
    names = {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias", *NAMES[Model], *NAMES[position]}
    in_block = BLOCK + ["gamma_1", "gamma_2"] * bool(layer_scale)
    in_block += ["attn.relative_position_bias_table"] * (position == "relative")
    names |= {f"blocks.{i}.{name}" for i in range(3) for name in in_block}
    model = Model(small(position, layer_scale=layer_scale), 10)
    state = model.state_dict()
    assert {name for name in state if not name.startswith("decoder.")} == names
    for key in [name.replace("bias_table", "index") for name in names if name.endswith("table")]:
        state[key] = torch.zeros(17, 17, dtype=torch.int64)    # released checkpoints hold it
        model.load_state_dict(state, strict=True)
        assert key in state                                    # the caller's dict is not changed
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("preset, sizes, millions", [
    ("base", (12, 768, 12), 86), ("large", (24, 1024, 16), 304)])
def test_presets_are_the_papers(preset, sizes, millions):
    config = vit.PRESETS[preset]
    assert (config.depth, config.dim, config.heads) == sizes
    assert (config.mlp_ratio, config.image_size, config.patch_size) == (4, 224, 16)
    assert (config.position, config.layer_scale, config.drop_path) == ("absolute", 0, 0.1)
    with torch.device("meta"):
        model = VisionTransformer(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


@pytest.mark.parametrize("wrong", [
    dict(patch_size=7), dict(patch_size=64), dict(heads=5), dict(depth=0), dict(drop_path=1.0),
    dict(position="sine"), dict(layer_scale=-1.0), dict(pixel_mean=(math.nan, 0.0, 0.0)),
    dict(pixel_std=(0.0, 1.0, 1.0)), dict(init_std=0.0)])
def test_wrong_configs_name_the_field(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: must be .+, got .+"):
        small(**wrong)


def test_relative_position_index_by_hand():
    # rows: (drow + 1) * 3 + (dcol + 1), then 9 = [S] -> patch, 10 = patch -> [S], 11 = [S] -> [S]
    assert vit.relative_position_index((2, 2)).tolist() == [[11, 9, 9, 9, 9],
                                                            [10, 4, 3, 1, 0],
                                                            [10, 5, 4, 2, 1],
                                                            [10, 7, 6, 4, 3],
                                                            [10, 8, 7, 5, 4]]
    wide = vit.relative_position_index((2, 3))
    assert wide[0, 0] == 3 * 5 + 2 and wide[1, 6] == 0 and wide[6, 1] == 14    # the farthest pairs


@pytest.mark.parametrize("std", [0.02, 0.04])
def test_initial_weights(std):
    """As the docstrings of the models say. A normal distribution cut at +-1 std has 0.5396 of its std."""
    torch.manual_seed(0)
    config = small(dim=192, depth=8, init_std=std, layer_scale=0.1)
    model, classifier = MaskedImageModel(config, 512), ImageClassifier(config, 512)
    table = [(model.lm_head.weight, 0.02), (classifier.head.weight, 0.02 * 0.001), (model.pos_embed, std),
             (model.patch_embed.proj.weight, std), (model.cls_token, std), (model.mask_token, std)]
    for l, block in enumerate(model.blocks, start=1):
        table += [(block.attn.qkv.weight, std), (block.mlp.fc1.weight, std)]
        table += [(layer.weight, std / math.sqrt(2 * l)) for layer in (block.attn.proj, block.mlp.fc2)]
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all()
    for weight, cut in table:
        tolerance = 0.03 if weight.numel() > 1000 else 0.2
        assert weight.std().item() == pytest.approx(0.5396 * cut, rel=tolerance)
        assert weight.abs().max() <= 1.0001 * cut
    for variant in (model, classifier, VisionTransformer(small("relative")),
                    VisionTransformer(small("shared_relative"))):
        for name, parameter in variant.named_parameters():
            if name.endswith(("bias", "bias_table")):
                assert not parameter.any(), name
            elif "norm" in name:
                assert (parameter == 1).all(), name


def test_initial_weights_of_the_segmenter_are_pytorchs():
    """Uniform within 1 / sqrt(fan_in); PyTorch computes fan_in of a ConvTranspose2d from its outputs."""
    torch.manual_seed(0)
    model = SemanticSegmenter(small(dim=64), 150, decoder_dim=128)
    convolutions = [layer for layer in model.decoder if isinstance(layer, nn.ConvTranspose2d)]
    for layer in (*convolutions, model.head):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert 0.8 * bound < layer.bias.abs().max() <= bound
    assert [layer.out_channels for layer in convolutions] == [128, 64, 32]
    assert all((layer.weight == 1).all() for layer in model.decoder if isinstance(layer, nn.GroupNorm))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("Model", HEADS)
def test_parameter_groups(Model, position):
    """0.5 ** (L + 1 - l): l = 0 for embeddings, 1 and 2 for the blocks, 3 for heads and a shared table."""
    model, expected = Model(small(position, depth=2, layer_scale=0.1), 5), {}
    for name, parameter in model.named_parameters():
        start = re.match(r"blocks\.[01]|norm|fc_norm|head|lm_head|decoder|rel_pos_bias|", name)[0]
        scale = {"blocks.0": 0.25, "blocks.1": 0.5, "": 0.125}.get(start, 1)
        vector = re.search(r"bias$|norm|gamma|decoder\.[147]\.", name)    # GroupNorms are every third layer
        expected[parameter] = scale, 0 if vector or name in ("cls_token", "pos_embed") else 0.05
    groups = parameter_groups(model, 0.05, 0.5)
    found = [(p, (group["lr_scale"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(found) == len(expected) and dict(found) == expected
    assert {group["lr_scale"] for group in parameter_groups(model, 0.05)} == {1}


# ---- Masked image model ----

@pytest.mark.parametrize("position", POSITIONS)
def test_masked_pixels_never_reach_the_logits(position):
    model = randomised(MaskedImageModel(small(position, layer_scale=0.5, image_size=(16, 40)), 10))
    images, noise = torch.rand(2, 3, 3, 16, 40)
    mask = random_mask(3, 2, 5)
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    logits = model(images, mask)
    assert torch.equal(logits, model(torch.where(pixels, noise, images), mask))
    assert not torch.allclose(logits, model(torch.where(pixels, images, noise), mask))


def test_logits_come_in_the_order_of_the_places():
    model, mask, seen = randomised(MaskedImageModel(small(), 10)), random_mask(2, 4, 4), []
    assert torch.equal(model(IMAGES, mask), model(IMAGES, mask, mask.flatten().nonzero()[:, 0]))
    patches = model.features(IMAGES)[:, 1:]                    # (B, N, D)
    expected = model.lm_head(patches).flatten(0, 1)[[30, 3]]
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    logits = model(IMAGES, torch.zeros_like(mask), torch.tensor([30, 3]))
    torch.testing.assert_close(logits, expected)
    assert seen == [2]                                         # the head is computed there only


@pytest.mark.parametrize("side, mask, message", [
    (40, torch.zeros(1, 4, 4, dtype=torch.bool), "32, 32.*40, 40"),
    (32, torch.zeros(1, 4, 4), "torch.bool.*float32"),
    (32, torch.zeros(1, 5, 4, dtype=torch.bool), "1, 4, 4.*1, 5, 4")])
def test_wrong_inputs_name_both_shapes(side, mask, message):
    with pytest.raises(ValueError, match=message):
        MaskedImageModel(small(), 10)(torch.rand(1, 3, side, side), mask)


def test_pixels_are_normalised_by_the_model():
    plain = small(image_size=(4, 6), patch_size=2, pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3)
    plain = randomised(MaskedImageModel(plain, 12))
    model = small(image_size=(4, 6), patch_size=2, pixel_mean=(0.5,) * 3, pixel_std=(0.25,) * 3)
    model = randomised(MaskedImageModel(model, 12))
    images = torch.rand(2, 3, 4, 6)
    normalised = (images - 0.5) / 0.25
    torch.testing.assert_close(model.features(images), plain.features(normalised))
    patches = model.patch_pixels(images)
    assert patches.shape == (2, 2, 3, 12)
    torch.testing.assert_close(patches[1, 0, 2], normalised[1, :, 0:2, 4:6].flatten())
    torch.testing.assert_close(model.unpatch_pixels(patches), images)
    assert model.unpatch_pixels(9 * patches).amax() == 1


# ---- Inside the blocks ----

@pytest.mark.parametrize("position", POSITIONS)
def test_attention_maps_are_what_forward_computes(position):
    model, calls = randomised(ImageClassifier(small(position, layer_scale=0.5), 7)), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    model(IMAGES)
    forward_calls = calls[:]
    maps = model.attention_maps(IMAGES, layer=None)
    assert len(maps) == len(forward_calls) == 3
    for layer, ((x, expected), block) in enumerate(zip(forward_calls, model.blocks)):
        mixed = maps[layer] @ block.attn.queries_keys_values(x)[2]
        output = block.attn.proj(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        for index in (layer, layer - 3):
            assert torch.equal(model.attention_maps(IMAGES, index), maps[layer])
    assert torch.equal(model.attention_maps(IMAGES), maps[-1])


def test_features_of_every_model_are_what_its_head_gets():
    """The normed output of a block; a classifier has no norm, but an fc_norm for the average of patches."""
    model = randomised(VisionTransformer(small()))
    torch.testing.assert_close(model.features(IMAGES), model(IMAGES))
    masked = randomised(MaskedImageModel(small(), 10))
    logits = masked.lm_head(masked.features(IMAGES)[:, 1:]).flatten(0, 1)
    nothing = torch.zeros(2, 4, 4, dtype=torch.bool)
    torch.testing.assert_close(logits, masked(IMAGES, nothing, torch.arange(32)))
    classifier = randomised(ImageClassifier(small(), 7))
    average = classifier.features(IMAGES)[:, 1:].mean(1)       # of the patches, without [S] (sec. 2.6)
    torch.testing.assert_close(classifier.head(classifier.fc_norm(average)), classifier(IMAGES))
    segmenter = randomised(SemanticSegmenter(small(), 5))
    grid = segmenter.features(IMAGES)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(segmenter.head(segmenter.decoder(grid)), segmenter(IMAGES))
    for model in (model, masked, classifier, segmenter):
        states = model.hidden_states(IMAGES)
        assert len(states) == 3
        for layer in range(-3, 3):
            assert torch.equal(model.features(IMAGES, layer), model.norm(states[layer]))


@pytest.mark.parametrize("layer", [3, -4])
def test_a_missing_layer_is_an_index_error(layer):
    model = VisionTransformer(small())
    for method in (model.features, model.attention_maps):
        with pytest.raises(IndexError):
            method(IMAGES, layer)


@pytest.mark.parametrize("position", POSITIONS[1:])
def test_position_biases_are_contiguous(position):
    """The fused attention of GPUs needs it."""
    assert VisionTransformer(small(position)).position_biases()[0].is_contiguous()


def test_drop_path_drops_samples_and_keeps_the_mean():
    model, x = VisionTransformer(small(depth=5, drop_path=0.4)), torch.ones(20_000, 2, 3)
    assert [block.drop_path_rate for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    y = model.blocks[-1].residual(x, 3.0)
    assert y.unique().tolist() == [0, pytest.approx(3 / 0.6)]
    assert (y.flatten(1).std(1) == 0).all() and y.mean().item() == pytest.approx(3, abs=0.06)
    assert (model.eval().blocks[-1].residual(x, 3.0) == 3).all()


def test_recomputed_blocks_give_the_same_gradients(monkeypatch):
    recompute, calls, gradients = vit.checkpoint, [], []
    monkeypatch.setattr(
        vit, "checkpoint", lambda *args, **kwargs: calls.append(args) or recompute(*args, **kwargs))
    for checkpoint_blocks in (False, True):
        model = randomised(ImageClassifier(small("relative"), 4)).train()
        model.checkpoint_blocks = checkpoint_blocks
        model(IMAGES).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    assert len(calls) == 3


# ---- Against timm; the segmenter ----

@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
@pytest.mark.parametrize("classes", [0, 11])
def test_equals_timm(position, layer_scale, classes):
    beit = pytest.importorskip("timm.models.beit")
    config = small(position, layer_scale=layer_scale)
    ours = randomised(ImageClassifier(config, classes) if classes else VisionTransformer(config))
    reference = beit.Beit(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=classes,
                       global_pool="avg" if classes else "", qkv_bias=True, init_values=layer_scale or None,
                       use_abs_pos_emb=position == "absolute", use_rel_pos_bias=position == "relative",
                       use_shared_rel_pos_bias=position == "shared_relative").eval()
    missing, unexpected = reference.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(("relative_position_index", "k_bias")) for name in missing)
    expected = reference.forward if classes else reference.forward_features
    normalised = (IMAGES - ours.pixel_mean) / ours.pixel_std
    torch.testing.assert_close(ours(IMAGES), expected(normalised), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_size, image_size", [
    (8, (32, 48)), (8, (64, 64)), (16, (64, 64)), (12, (24, 36)), (7, (14, 21))])
def test_the_segmenter_answers_for_each_pixel_in_its_place(patch_size, image_size):
    """What changes in one corner of the image changes the logits most in that corner."""
    torch.manual_seed(0)
    model = SemanticSegmenter(small(patch_size=patch_size, image_size=image_size), 5, decoder_dim=64)
    images = torch.rand(1, 3, *image_size)
    other = images.clone()
    other[..., :patch_size, -patch_size:] = 0
    logits = model(images)
    assert logits.shape == (1, 5, *image_size)
    change = (model(other) - logits).abs().sum(1)[0].detach()
    assert change[:patch_size, -patch_size:].mean() > 2 * change.mean()
    logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- torch.compile ----

@pytest.mark.parametrize("Model, position", [(MaskedImageModel, position) for position in POSITIONS] + [
    (ImageClassifier, "relative"), (SemanticSegmenter, "relative")])
def test_training_compiles_to_one_graph_and_stays_compiled(Model, position):
    """fullgraph=True refuses any break; other masks of as many patches compile nothing anew."""
    torch.compiler.reset()
    model, graphs = Model(small(position, depth=2, layer_scale=0.1, drop_path=0.2), 30).train(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    network = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        mask = (torch.rand(2, 16).argsort(1) < 6).view(2, 4, 4)
        masked = (mask, mask.flatten().nonzero()[:, 0]) if Model is MaskedImageModel else ()
        torch.manual_seed(seed)
        compiled = network(IMAGES, *masked)
        torch.manual_seed(seed)
        torch.testing.assert_close(compiled, model(IMAGES, *masked))
        compiled.sum().backward()
    assert len(graphs) == 1
