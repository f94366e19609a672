"""The backbone and its models: by hand, by invariance, and against timm."""
import math

import numpy as np
import pytest
import torch
from torch import nn

import vit
from vit import ImageClassifier, MaskedImageModel, SemanticSegmenter, VisionTransformer, ViTConfig

POSITIONS = ["absolute", "relative", "shared_relative"]
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


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


def some_mask(*shape):
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
@pytest.mark.parametrize("Model", [MaskedImageModel, ImageClassifier, SemanticSegmenter])
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
        assert key in state                                    # the caller's dict is left alone
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
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: "):
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
def test_initialisation(std):
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
        expected = 0.5396 * cut                                # std of a normal distribution cut at +-1 std
        assert weight.std().item() == pytest.approx(expected, rel=0.03 if weight.numel() > 1000 else 0.2)
        assert weight.abs().max() <= 1.0001 * cut
    for variant in (model, classifier, VisionTransformer(small("relative"))):
        zeros = [p for name, p in variant.named_parameters() if name.endswith(("bias", "bias_table"))]
        assert not any(parameter.any() for parameter in zeros)


# ---- Masked image model ----

@pytest.mark.parametrize("position", POSITIONS)
def test_masked_pixels_never_reach_the_logits(position):
    model = randomised(MaskedImageModel(small(position, layer_scale=0.5, image_size=(16, 40)), 10))
    images, noise = torch.rand(2, 3, 3, 16, 40)
    mask = some_mask(3, 2, 5)
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    logits = model(images, mask)
    assert torch.equal(logits, model(torch.where(pixels, noise, images), mask))
    assert not torch.allclose(logits, model(torch.where(pixels, images, noise), mask))


def test_logits_come_in_the_order_of_the_places():
    model, mask, seen = randomised(MaskedImageModel(small(), 10)), some_mask(2, 4, 4), []
    assert torch.equal(model(IMAGES, mask), model(IMAGES, mask, mask.flatten().nonzero()[:, 0]))
    patches = VisionTransformer.forward(model, IMAGES)[:, 1:]  # (B, N, D)
    expected = model.lm_head(patches).flatten(0, 1)[[30, 3]]
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    logits = model(IMAGES, torch.zeros_like(mask), torch.tensor([30, 3]))
    torch.testing.assert_close(logits, expected)
    assert seen == [2]                                         # the head is computed there only


@pytest.mark.parametrize("side, mask, message", [
    (40, torch.zeros(1, 4, 4, dtype=torch.bool), "40, 40.*32, 32"),
    (32, torch.zeros(1, 4, 4), "float32.*torch.bool"),
    (32, torch.zeros(1, 5, 4, dtype=torch.bool), "1, 5, 4.*1, 4, 4")])
def test_wrong_inputs_name_both_shapes(side, mask, message):
    with pytest.raises(ValueError, match=message):
        MaskedImageModel(small(), 10)(torch.rand(1, 3, side, side), mask)


def test_pixels_are_normalised_by_the_model():
    sizes = dict(image_size=(4, 6), patch_size=2)
    plain = randomised(VisionTransformer(small(**sizes, pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3)))
    model = randomised(VisionTransformer(small(**sizes, pixel_mean=(0.5,) * 3, pixel_std=(0.25,) * 3)))
    images = torch.rand(2, 3, 4, 6)
    normalised = (images - 0.5) / 0.25
    torch.testing.assert_close(model(images), plain(normalised))
    patches = model.patch_pixels(images)
    assert patches.shape == (2, 2, 3, 12)
    torch.testing.assert_close(patches[1, 0, 2], normalised[1, :, 0:2, 4:6].flatten())
    torch.testing.assert_close(model.unpatch_pixels(patches), images)
    assert model.unpatch_pixels(9 * patches).amax() == 1


# ---- Inside the blocks ----

@pytest.mark.parametrize("position", POSITIONS)
def test_attention_maps_and_hidden_states_are_what_forward_computes(position):
    model, calls = randomised(ImageClassifier(small(position, layer_scale=0.5), 7)), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    states = model.hidden_states(IMAGES)
    inputs_and_outputs = list(calls)
    for layer in (0, 1, -1):
        (x, expected), attention = inputs_and_outputs[layer], model.blocks[layer].attn
        mixed = model.attention_maps(IMAGES, layer) @ attention.queries_keys_values(x)[2]
        output = attention.proj(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert len(states) == 3
    averaged = model.fc_norm(states[-1][:, 1:].mean(1))        # the patches, without [S] (sec. 2.6)
    torch.testing.assert_close(model.head(averaged), model(IMAGES))


@pytest.mark.parametrize("position", POSITIONS[1:])
def test_position_biases_are_contiguous(position):
    """Attention that is fused on GPUs takes no others."""
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
    monkeypatch.setattr(vit, "checkpoint", lambda *args, **kw: calls.append(args) or recompute(*args, **kw))
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
    theirs = beit.Beit(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=classes,
                       global_pool="avg" if classes else "", qkv_bias=True, init_values=layer_scale or None,
                       use_abs_pos_emb=position == "absolute", use_rel_pos_bias=position == "relative",
                       use_shared_rel_pos_bias=position == "shared_relative").eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(("relative_position_index", "k_bias")) for name in missing)
    expected = theirs.forward if classes else theirs.forward_features
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


# ---- Other image sizes ----

@pytest.mark.parametrize("old, new, given", [
    ((8, 8), (12, 12), None), ((12, 12), (8, 8), None), ((4, 6), (6, 4), (4, 6)), ((2, 5), (4, 10), (2, 5))])
def test_positions_carry_over_to_other_grids(old, new, given):
    """A ramp along the columns stays one, in E_pos and in the table of offsets."""
    (h, w), (new_h, new_w), name = old, new, "blocks.0.attn.relative_position_bias_table"
    patches = torch.arange(float(w)).repeat(h).view(1, -1, 1)
    table = torch.arange(1.0 - w, w).repeat(2 * h - 1).view(-1, 1)
    state = {"pos_embed": torch.cat([torch.full((1, 1, 1), 7.0), patches], 1),
             name: torch.cat([table, torch.tensor([[7.0], [8.0], [9.0]])])}
    resized = vit.resize_positions(state, small(image_size=(8 * new_h, 8 * new_w)), given)
    assert resized["pos_embed"][0, 0] == 7 and resized[name][-3:, 0].tolist() == [7, 8, 9]    # of [S]
    grid = resized["pos_embed"][0, 1:].view(new)
    offsets = resized[name][:-3].view(2 * new_h - 1, 2 * new_w - 1)
    for ramp in (grid, offsets):
        assert (ramp.diff(dim=1) > -1e-3).all() and ramp.diff(dim=0).abs().max() < 1e-5
    assert offsets[:, new_w - 1].abs().max() < 1e-5            # zero stays central
    same = vit.resize_positions(state, small(image_size=(8 * h, 8 * w)))
    assert all(torch.equal(same[key], state[key]) for key in state)


TABLE = "blocks.0.attn.relative_position_bias_table"


def resized_table(offsets, old, new):
    """offsets (2h-1, 2w-1) of the grid old, resized to the grid new."""
    table = torch.cat([torch.as_tensor(offsets).reshape(-1, 1), torch.zeros(3, 1)])
    config = small(image_size=(8 * new[0], 8 * new[1]))
    return vit.resize_positions({TABLE: table}, config, old)[TABLE][:-3].view(2 * new[0] - 1, 2 * new[1] - 1)


def test_near_offsets_keep_their_bias():
    """-1 a patch, 14 x 14 -> 24 x 24, as the released code gives it (PAPER.md, 4)."""
    offsets = resized_table(-torch.arange(-13.0, 14).abs().expand(27, 27), (14, 14), (24, 24))
    assert offsets[5, 23:27].tolist() == pytest.approx([0, -1, -1.93, -2.77], abs=0.006)
    assert offsets[30, 0].item() == offsets[5, 46].item() == pytest.approx(-13, abs=1e-4)


@pytest.mark.parametrize("old, new", [
    ((14, 14), (24, 24)), ((14, 14), (32, 32)), ((24, 24), (14, 14)), ((2, 3), (5, 4)), ((8, 14), (12, 32))])
def test_tables_are_splines_on_the_released_places(old, new):
    """Against FITPACK, which the released code calls."""
    interpolate = pytest.importorskip("scipy.interpolate")

    def places(old, new):
        q = np.linspace(1.01, 1.5, 100_000)
        q = q[abs((1 - q ** (old - 1)) / (1 - q) - (new - 1)).argmin()]
        distances = np.cumsum(q ** np.arange(old - 1.0))
        return np.concatenate([-distances[::-1], [0], distances])

    offsets = np.random.default_rng(0).normal(size=(2 * old[0] - 1, 2 * old[1] - 1))
    rows, columns = places(old[0], new[0]), places(old[1], new[1])
    spline = interpolate.RectBivariateSpline(
        rows, columns, offsets, kx=min(3, len(rows) - 1), ky=min(3, len(columns) - 1), s=0)
    asked = [np.arange(1.0 - side, side).clip(at[0], at[-1]) for side, at in zip(new, (rows, columns))]
    np.testing.assert_allclose(resized_table(offsets, old, new), spline(*asked), atol=1e-3)


def test_absolute_positions_are_resized_bicubically_without_antialiasing():
    """One of four columns is 1; to 2 and 8 columns: Keys' kernel, a = -0.75, of their centres' distances."""
    state = {"pos_embed": torch.cat([torch.zeros(1, 1, 1), torch.eye(4)[1].repeat(4).view(1, 16, 1)], 1)}
    smaller = vit.resize_positions(state, small(image_size=16))["pos_embed"][0, 1:, 0].view(2, 2)
    larger = vit.resize_positions(state, small(image_size=64))["pos_embed"][0, 1:, 0].view(8, 8)
    near, far = (1.25 * 0.5 - 2.25) * 0.25 + 1, -0.75 * (1.5 ** 3 - 5 * 1.5 ** 2 + 8 * 1.5 - 4)
    assert smaller[0].tolist() == pytest.approx([near, far], abs=1e-6)
    assert larger[3, 2].item() == pytest.approx((1.25 * 0.25 - 2.25) * 0.25 ** 2 + 1, abs=1e-6)


def test_positions_that_fit_no_grid_are_refused():
    with pytest.raises(ValueError, match="16 positions do not fit 3x5"):
        vit.resize_positions({"pos_embed": torch.zeros(1, 17, 1)}, small(), (3, 5))
    with pytest.raises(ValueError, match="15 positions do not fit 3x3"):
        vit.resize_positions({"pos_embed": torch.zeros(1, 16, 24)}, small())
    with pytest.raises(ValueError, match="22 positions do not fit 4x4"):
        vit.resize_positions({TABLE: torch.zeros(25, 2)}, small())


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
