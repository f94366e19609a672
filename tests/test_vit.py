"""The backbone and its models: by hand, by invariance, and against timm."""
import math

import pytest
import torch
import torch.nn.functional as F

import vit
from vit import ImageClassifier, MaskedImageModel, SemanticSegmenter, VisionTransformer, ViTConfig

POSITIONS = ["absolute", "relative", "shared_relative"]


def small(position="absolute", **more):
    defaults = dict(image_size=32, patch_size=8, dim=24, depth=3, heads=2, drop_path=0.0)
    return ViTConfig(**{**defaults, "position": position, **more})


def randomised(model):
    """Every parameter away from its initial value, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def some_mask(images):
    return torch.rand(len(images), 4, 4, generator=torch.Generator().manual_seed(1)) < 0.4


# ---- Names, sizes, initial weights ----

BLOCK = """norm1.weight norm1.bias attn.qkv.weight attn.q_bias attn.v_bias attn.proj.weight attn.proj.bias
           norm2.weight norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias""".split()
SHARED = "cls_token patch_embed.proj.weight patch_embed.proj.bias".split()
OWN = {
    MaskedImageModel: "mask_token norm.weight norm.bias lm_head.weight lm_head.bias".split(),
    ImageClassifier: "fc_norm.weight fc_norm.bias head.weight head.bias".split(),
    SemanticSegmenter: "norm.weight norm.bias head.weight head.bias".split(),
}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
@pytest.mark.parametrize("Model", OWN)
def test_state_dicts_have_the_released_names(Model, position, layer_scale):
    names = set(SHARED + OWN[Model])
    names.add({"absolute": "pos_embed", "relative": "blocks.0.attn.relative_position_bias_table",
               "shared_relative": "rel_pos_bias.relative_position_bias_table"}[position])
    for i in range(3):
        names |= {f"blocks.{i}.{name}" for name in BLOCK + ["gamma_1", "gamma_2"] * bool(layer_scale)}
        if position == "relative":
            names.add(f"blocks.{i}.attn.relative_position_bias_table")
    model = Model(small(position, layer_scale=layer_scale), 10)
    state = model.state_dict()
    assert {name for name in state if not name.startswith("decoder.")} == names
    for key in [name.replace("bias_table", "index") for name in names if name.endswith("table")]:
        state[key] = torch.zeros(17, 17, dtype=torch.int64)    # released checkpoints hold it
        model.load_state_dict(state, strict=True)
        assert key in state                                    # the caller's dict is left alone


@pytest.mark.parametrize("preset, millions", [("base", 86), ("large", 304)])
def test_paper_sizes(preset, millions):
    with torch.device("meta"):
        model = VisionTransformer(vit.PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def test_relative_position_index_by_hand():
    # rows: (drow + 1) * 3 + (dcol + 1), then 9 = [S] -> patch, 10 = patch -> [S], 11 = [S] -> [S]
    assert vit.relative_position_index((2, 2)).tolist() == [[11, 9, 9, 9, 9],
                                                            [10, 4, 3, 1, 0],
                                                            [10, 5, 4, 2, 1],
                                                            [10, 7, 6, 4, 3],
                                                            [10, 8, 7, 5, 4]]
    wide = vit.relative_position_index((2, 3))
    assert wide.max() == 3 * 5 + 2 and wide[1, 6] == 0 and wide[6, 1] == 14    # the farthest pairs
    assert (wide[1:, 1:].diagonal() == 7).all()


@pytest.mark.parametrize("std", [0.02, 0.04])
def test_initialisation(std):
    torch.manual_seed(0)
    model = MaskedImageModel(small("relative", dim=192, depth=8, init_std=std), 512)
    cut = 0.5396                                               # std of a standard normal cut at +-1
    for l, block in enumerate(model.blocks, start=1):
        for weight in (block.attn.qkv.weight, block.mlp.fc1.weight):
            assert weight.std().item() == pytest.approx(cut * std, rel=0.03)
            assert weight.abs().max() <= std + 1e-6
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(cut * std / math.sqrt(2 * l), rel=0.03)
        zeros = (block.attn.q_bias, block.attn.relative_position_bias_table, block.mlp.fc2.bias)
        assert not any(p.any() for p in zeros)
    assert model.lm_head.weight.std().item() == pytest.approx(cut * 0.02, rel=0.03)
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(cut * std, rel=0.2)


@pytest.mark.parametrize("position", POSITIONS)
def test_loss_at_initialisation_is_ln_v(position):
    torch.manual_seed(0)
    model = MaskedImageModel(small(position, dim=192), 8192)
    mask = torch.ones(4, 4, 4, dtype=torch.bool)
    loss = F.cross_entropy(model(torch.rand(4, 3, 32, 32), mask), torch.randint(8192, (64,)))
    assert abs(loss.item() - math.log(8192)) < 0.1


# ---- Masked image model ----

@pytest.mark.parametrize("position", POSITIONS)
def test_masked_pixels_never_reach_the_logits(position):
    model = randomised(MaskedImageModel(small(position, layer_scale=0.5), 10))
    images, noise = torch.rand(2, 3, 3, 32, 32)
    mask = some_mask(images)
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    logits = model(images, mask)
    assert torch.equal(logits, model(torch.where(pixels, noise, images), mask))
    assert not torch.allclose(logits, model(torch.where(pixels, images, noise), mask))


def test_logits_come_in_the_order_of_the_places():
    model = randomised(MaskedImageModel(small(), 10))
    images = torch.rand(3, 3, 32, 32)
    mask = some_mask(images)
    everywhere = model(images, mask, torch.arange(48))         # (B h w, V)
    assert torch.equal(model(images, mask), model(images, mask, mask.flatten().nonzero()[:, 0]))
    torch.testing.assert_close(model(images, mask), everywhere.view(3, 4, 4, 10)[mask])
    torch.testing.assert_close(model(images, mask, torch.tensor([40, 3])), everywhere[[40, 3]])


def test_non_square_images():
    model = randomised(MaskedImageModel(small("shared_relative", image_size=(16, 40)), 10))
    mask = torch.zeros(1, 2, 5, dtype=torch.bool)
    mask[0, 1, 3] = True
    assert model(torch.rand(1, 3, 16, 40), mask).shape == (1, 10)


def test_patch_pixels():
    config = small(image_size=(4, 6), patch_size=2, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3)
    model, images = VisionTransformer(config), torch.rand(2, 3, 4, 6)
    patches = model.patch_pixels(images)
    assert patches.shape == (2, 2, 3, 12)
    torch.testing.assert_close(patches[1, 0, 2], (images[1, :, 0:2, 4:6] * 2 - 1).flatten())
    torch.testing.assert_close(model.unpatch_pixels(patches), images)


def test_wrong_inputs_name_both_shapes():
    model = MaskedImageModel(small(), 10)
    with pytest.raises(ValueError, match="40, 40.*32, 32"):
        model(torch.rand(1, 3, 40, 40), torch.zeros(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="float32.*torch.bool"):
        model(torch.rand(1, 3, 32, 32), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="1, 5, 4.*1, 4, 4"):
        model(torch.rand(1, 3, 32, 32), torch.zeros(1, 5, 4, dtype=torch.bool))


@pytest.mark.parametrize("wrong", [
    dict(patch_size=7), dict(patch_size=64), dict(heads=5), dict(depth=0), dict(drop_path=1.0),
    dict(position="sine"),
    dict(layer_scale=-1.0), dict(pixel_std=(0.0, 1.0, 1.0)), dict(init_std=0.0)])
def test_wrong_configs_name_the_field(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: "):
        small(**wrong)


# ---- Inside the blocks ----

@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_attention_maps_are_what_forward_computes(position, layer):
    model = randomised(VisionTransformer(small(position, layer_scale=0.5)))
    images, seen = torch.rand(2, 3, 32, 32), {}
    attention = model.blocks[layer].attn
    attention.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], out=output))
    model(images)
    maps = model.attention_maps(images, layer)
    mixed = maps @ attention.queries_keys_values(seen["x"])[2]
    expected = attention.proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(expected, seen["out"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 17))
    with pytest.raises(IndexError):
        model.attention_maps(images, layer=3)


@pytest.mark.parametrize("position", POSITIONS)
def test_hidden_states_lead_to_the_output(position):
    model, images = randomised(VisionTransformer(small(position))), torch.rand(2, 3, 32, 32)
    states = model.hidden_states(images)
    assert len(states) == 3
    torch.testing.assert_close(model.norm(states[-1]), model(images))


def test_drop_path_drops_samples_and_keeps_the_mean():
    x = torch.ones(20_000, 2, 3)
    y = vit.stochastic_depth(x, 0.25, "row", training=True)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (y.flatten(1).std(1) == 0).all() and y.mean().item() == pytest.approx(1, abs=0.02)
    assert vit.stochastic_depth(x, 0.25, "row", training=False) is x
    rates = [block.drop_path_rate for block in VisionTransformer(small(depth=5, drop_path=0.1)).blocks]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])


def test_the_model_normalises_its_images():
    plain, shifted = (randomised(VisionTransformer(small(pixel_mean=(mean,) * 3, pixel_std=(std,) * 3)))
                      for mean, std in ((0.0, 1.0), (0.5, 0.25)))
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(plain((images - 0.5) / 0.25), shifted(images))


def test_recomputed_blocks_give_the_same_gradients():
    images, gradients = torch.rand(2, 3, 32, 32), []
    for recompute in (False, True):
        model = randomised(ImageClassifier(small("relative"), 4)).train()
        model.checkpoint_blocks = recompute
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


# ---- Classifier and segmenter ----

def test_the_classifier_averages_patches():
    model, images = randomised(ImageClassifier(small(), 7)), torch.rand(2, 3, 32, 32)
    pooled = model.hidden_states(images)[-1][:, 1:].mean(1)
    torch.testing.assert_close(model(images), model.head(model.fc_norm(pooled)))
    fresh = ImageClassifier(small(dim=192), 100)
    assert 0 < fresh.head.weight.abs().max() <= 0.02 * 0.001 and not fresh.head.bias.any()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
@pytest.mark.parametrize("classes", [0, 11])
def test_equals_timm(position, layer_scale, classes):
    beit = pytest.importorskip("timm.models.beit")
    config = small(position, layer_scale=layer_scale)
    ours = randomised(ImageClassifier(config, classes) if classes else VisionTransformer(config))
    theirs = beit.Beit(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=classes,
                       global_pool="avg" if classes else "", qkv_bias=True, init_values=layer_scale or None,
                       use_abs_pos_emb=position == "absolute", use_rel_pos_bias=position == "relative",
                       use_shared_rel_pos_bias=position == "shared_relative").eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(("relative_position_index", "k_bias")) for name in missing)
    images = torch.rand(2, 3, 32, 32)
    expected = theirs.forward if classes else theirs.forward_features
    normalised = (images - ours.pixel_mean) / ours.pixel_std
    torch.testing.assert_close(ours(images), expected(normalised), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_size, image_size", [
    (8, (32, 48)), (16, (64, 64)), (12, (24, 36)), (7, (14, 14))])
def test_the_segmenter_answers_for_each_pixel(patch_size, image_size):
    model = SemanticSegmenter(small(patch_size=patch_size, image_size=image_size), 5, decoder_dim=64)
    logits = model(torch.rand(2, 3, *image_size))
    assert logits.shape == (2, 5, *image_size)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_segmenter_keeps_places():
    """What changes in one corner of the image changes the logits most in that corner."""
    torch.manual_seed(0)
    model = SemanticSegmenter(small(image_size=64), 5).eval()
    images = torch.rand(1, 3, 64, 64)
    other = images.clone()
    other[..., :8, 48:56] = 0
    change = (model(other) - model(images)).abs().sum(1)[0].detach()
    assert change[:8, 48:56].mean() > 5 * change[32:].mean()


# ---- Other image sizes ----

@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("old, new", [
    ((8, 8), (12, 12)), ((14, 14), (24, 24)), ((12, 12), (8, 8)), ((4, 6), (6, 4))])
def test_positions_carry_over_to_other_grids(position, old, new):
    old, new = (small(position, image_size=(4 * h, 4 * w), patch_size=4) for h, w in (old, new))
    source, model = randomised(VisionTransformer(old)).state_dict(), VisionTransformer(new)
    resized = vit.resize_positions(source, new, old.grid)
    model.load_state_dict(resized)
    assert model(torch.rand(1, 3, *new.image_hw)).isfinite().all()
    for name, tensor in vit.resize_positions(source, old).items():
        assert torch.equal(tensor, source[name])
    constant = {name: torch.full_like(tensor, 3.0) for name, tensor in source.items()}
    for name, tensor in vit.resize_positions(constant, new, old.grid).items():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 3.0))
    for name, tensor in resized.items():
        if name == "pos_embed":
            assert torch.equal(tensor[:, 0], source[name][:, 0])
        elif name.endswith("table"):
            assert torch.equal(tensor[-3:], source[name][-3:])    # the rows of [S]


def resize_table(offsets, old, new):
    """offsets (2 h - 1, 2 w - 1), the bias for each, resized from grid old to grid new."""
    name = "blocks.0.attn.relative_position_bias_table"
    table = torch.cat([offsets.reshape(-1, 1), torch.zeros(3, 1)])
    config = small("relative", image_size=(8 * new[0], 8 * new[1]))
    return vit.resize_positions({name: table}, config, old)[name][:-3].view(2 * new[0] - 1, 2 * new[1] - 1)


def test_resized_positions_keep_their_orientation():
    """A ramp along the columns of a wide grid stays one, in E_pos and in the table of offsets."""
    ramp = torch.arange(5.0).expand(2, 5).reshape(1, 10, 1)
    state = {"pos_embed": torch.cat([torch.zeros(1, 1, 8), ramp.expand(1, 10, 8)], 1)}
    grid = vit.resize_positions(state, small(image_size=(32, 80)), (2, 5))["pos_embed"][0, 1:, 0].view(4, 10)
    assert (grid.diff(dim=1) > -1e-3).all() and grid.diff(dim=0).abs().max() < 1e-5
    rows = resize_table(torch.arange(-4.0, 5).expand(5, 9), (3, 5), (6, 10))
    assert rows[:, 9].abs().max() < 1e-5 and (rows.diff(dim=1) > -1e-3).all()    # zero stays central


def test_positions_that_fit_no_grid():
    with pytest.raises(ValueError, match="15 positions do not fit"):
        vit.resize_positions({"pos_embed": torch.zeros(1, 16, 24)}, small())


# ---- torch.compile ----

@pytest.mark.parametrize("position", POSITIONS)
def test_training_compiles_to_one_graph_and_stays_compiled(position):
    """fullgraph=True refuses any break; other masks of as many patches compile nothing anew."""
    torch.compiler.reset()
    model, graphs = MaskedImageModel(small(position, depth=2, layer_scale=0.1, drop_path=0.2), 30).train(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    network = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        images, mask = torch.rand(2, 3, 32, 32), (torch.rand(2, 16).argsort(1) < 6).view(2, 4, 4)
        places = mask.flatten().nonzero()[:, 0]
        torch.manual_seed(seed)
        compiled = network(images, mask, places)
        torch.manual_seed(seed)
        torch.testing.assert_close(compiled, model(images, mask, places))
        compiled.sum().backward()
    assert len(graphs) == 1


@pytest.mark.parametrize("Model", [ImageClassifier, SemanticSegmenter])
def test_fine_tuned_models_compile_to_one_graph(Model):
    torch.compiler.reset()
    model, images = Model(small("relative", depth=2, layer_scale=0.1), 5).train(), torch.rand(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))
