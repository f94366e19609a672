import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import pickle
import re
import textwrap
import zipfile

import numpy as np
import pytest
import torch
from conftest import equal
from PIL import Image

import data
import pretrained
import probe
import vit
import weights
from launch import UserError

ZIP_OR_OLDER = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
POSITIONS = pytest.mark.parametrize("position", ["absolute", "relative", "shared_relative"])
SCALES = pytest.mark.parametrize("layer_scale", [0.0, 0.1])
SIZES = pytest.mark.parametrize("image_size", [32, 48])
TABLE = "blocks.0.attn.relative_position_bias_table"
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=0)


def save(value, path, zipped=True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def backbone(position="shared_relative", image_size=32, depth=2, layer_scale=0.0, heads=1):
    return vit.ViTConfig(image_size=image_size, patch_size=8, dim=64, depth=depth, heads=heads,
                         position=position, layer_scale=layer_scale)


def initialise(model, path, classes=None):
    return pretrained.initialise(model, path, *weights.load(path), classes)


def write_model(model, path, classes=None, **more):
    """Write model.pt as a run does."""
    config = {"vit": dataclasses.asdict(model.config), "classes": classes and list(classes), **more}
    return save({"model": model.state_dict(), "config": config, "kind": type(model).__name__}, path)


def named(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def without(state, part):
    """A state_dict without the names that contain this part."""
    return {name: tensor for name, tensor in state.items() if part not in name}


# ---- Tokenizers ----

@pytest.fixture
def public(tmp_path):
    """encoder.pkl and decoder.pkl as DALL-E's own classes pickle, with random weights and biases."""
    dall_e = pytest.importorskip("dall_e")

    def make(zipped=True, hidden=64, blocks=1, codes=512):
        torch.manual_seed(0)
        parts = [Part(n_hid=hidden, n_blk_per_group=blocks, vocab_size=codes)
                 for Part in (dall_e.Encoder, dall_e.Decoder)]
        for parameter in (p for part in parts for p in part.parameters() if p.dim() == 1):
            parameter.data.normal_(std=0.1)
        names = ("encoder.pkl", "decoder.pkl")
        return *parts, *(save(part, tmp_path / name, zipped) for part, name in zip(parts, names))
    return make


@pytest.mark.parametrize("sizes", [(True, 64, 1, 512), (False, 64, 1, 512), (True, 128, 2, 8192)])
def test_dall_e_computes_the_same(public, sizes):
    dall_e = pytest.importorskip("dall_e")
    encoder, decoder, *paths = public(*sizes)
    model = weights.load_dalle(*paths)
    assert not model.training and list(model.config.values()) == [sizes[3], sizes[1], 4, sizes[2]]
    images = torch.rand(2, 3, 40, 24)
    logits = encoder(dall_e.map_pixels(images))
    close(model.encode(images), logits)
    assert torch.equal(model.tokenize(images), logits.argmax(1))
    z = torch.nn.functional.one_hot(logits.argmax(1), model.vocab_size).permute(0, 3, 1, 2).float()
    close(model.decode(logits.argmax(1)), dall_e.unmap_pixels(torch.sigmoid(decoder(z)[:, :3])))


def test_parts_of_dall_e(public, tmp_path):
    module, _, encoder, decoder = public()
    del module.blocks.group_2
    broken, state = save(module, tmp_path / "x.pkl"), save(module.state_dict(), tmp_path / "y.pkl")
    for paths, message in (((decoder,), "decoder.pkl: expected DALL-E's Encoder, found Decoder"),
                           ((encoder, encoder), "encoder.pkl: expected DALL-E's Decoder, found Encoder"),
                           ((broken,), "x.pkl: expected DALL-E's architecture .*group_2"),
                           ((state,), "y.pkl: expected DALL-E's Encoder, found dict")):
        with pytest.raises(UserError, match=message):
            weights.load_dalle(*paths)
    assert weights.load_tokenizer(encoder).decoder is not None         # found beside it
    decoder.unlink()
    assert weights.load_tokenizer(encoder).decoder is None


# ---- Files that could do harm ----

class Call:
    """Calls a function when it is unpickled by anything that does not refuse."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("load", [weights.load, weights.load_dalle, weights.load_tokenizer])
def test_a_payload_does_not_run(tmp_path, load):
    ran, path = tmp_path / "ran", tmp_path / "encoder.pkl"
    payload = Call(os.system, f"touch {ran}")
    files = [save({"model": payload}, path, zipped).read_bytes() for zipped in (True, False)]
    for content in files + [pickle.dumps(payload, protocol) for protocol in (0, 2, 4, 5)]:
        path.write_bytes(content)
        with pytest.raises(UserError, match="encoder.pkl: .* refers to (posix|nt).system.* nothing was run"):
            load(path)
    assert not ran.exists()
    pickle.loads(content)                                              # and it would have run
    assert ran.exists()


@ZIP_OR_OLDER
@pytest.mark.parametrize("wanted", [eval, getattr, pickle.loads, torch.load, torch.nn.Linear, np.load,
                                    torch.storage._load_from_bytes])
def test_nothing_else_is_found(tmp_path, zipped, wanted):
    with pytest.raises(UserError, match=f"refers to .*{wanted.__name__}"):
        weights.read_file(save([torch.zeros(3), wanted], tmp_path / "x.pt", zipped))


@pytest.mark.parametrize("name", ["torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_parameter",
                                  "dall_e.utils\nConv2d", "collections\nOrderedDict"])
def test_what_is_found_cannot_be_changed(tmp_path, monkeypatch, name):
    """BUILD sets attributes of what is on the stack; torch.load writes a file if a class has dump_patches."""
    monkeypatch.chdir(tmp_path)
    flag = b"X\x0c\0\0\0dump_patches\x88s"
    header = (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True})
    for state in (b"}" + flag, b"N}" + flag + b"\x86"):
        body = b"\x80\x02(U\x06modulec" + name.encode() + b"\n" + state + b"bU\x01aU\x01btQ."
        pathlib.Path("x.pkl").write_bytes(b"".join(pickle.dumps(value, 2) for value in header) + body)
        with pytest.raises(UserError, match="x.pkl: "):
            weights.read_file("x.pkl")
    assert os.listdir() == ["x.pkl"]
    for known in (weights.StandIn, weights.RebuiltTensor, collections.OrderedDict):
        assert not hasattr(known, "dump_patches")


# ---- Files that are refused ----

def test_damaged_files_and_other_files(tmp_path, monkeypatch):
    state, path = vit.MaskedImageModel(backbone(), 50).state_dict(), tmp_path / "x.pt"
    older, whole = (save(state, path, zipped).read_bytes() for zipped in (False, True))
    cuts = [file[:int(share * len(file))] for file in (older, whole) for share in (0.001, 0.5, 0.999)]
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch.jit.load runs code"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/constants.pkl", "of TorchScript")
    for content in (b"", b"<html>not found</html>", b"hello", pickle.dumps([1]), path.read_bytes(), *cuts):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x.pt: cut off, damaged or not a checkpoint \(\w+: .*\)$"):
            weights.load(path)
    at = whole.index(state["cls_token"].numpy().tobytes())
    path.write_bytes(whole[:at] + b"\0" + whole[at + 1:])
    with pytest.raises(UserError, match="x.pt: damaged, .*data/.* fails its checksum"):
        weights.load(path)
    monkeypatch.setattr(weights, "safetensors", None)
    for name, message in (("", "expected a file with weights, .* model.safetensors or pytorch_model.bin"),
                          ("model.safetensors.index.json", "expected a file with weights, .*joins shards"),
                          ("y.safetensors", "safetensors is not installed"),
                          ("gone.pt", "no such file")):
        if name != "gone.pt":
            (tmp_path / name).touch()
        with pytest.raises(UserError, match=f"^{tmp_path / name}: {message}"):
            weights.build(tmp_path / name)
    twice = named("module.", state) | {"norm.bias": state["norm.bias"]}
    for value, message in ((state | {"norm.bias": "a"}, "expected tensors, found norm.bias"),
                           (twice, "expected one norm.bias, found two"),
                           ([1, 2], "expected a BEiT .* found list"),
                           ({"state_dict": {}}, "expected a BEiT .* found dict"),
                           ({"state": {}, "param_groups": []}, ".* found dict with state, param_groups"),
                           (named("student.", state) | named("teacher.", state),
                            "expected one BEiT, found 2, with student.patch_.*, teacher.patch_.*; save one"),
                           (without(state, "relative_position"), r"expected a BEiT \(missing: 'pos_embed'\)"),
                           (without(state, "fc1.weight"), r"expected a BEiT \(missing: '.*.fc1.weight'\)"),
                           ({"kind": "ImageClassifier", "model": state}, r".* \(missing: 'config'\)")):
        with pytest.raises(UserError, match=f"x.pt: {message}"):
            weights.load(save(value, path))


# ---- The released BEiT's and our own ----

BESIDE = {    # what a training may write beside the weights; released: numpy scalars in optimizer groups
    "optimizer": {"param_groups": [{"lr": np.float64(0.1), "weight_decay": np.float32(0.05)}]},
    "args": argparse.Namespace(lr=1e-3, output=pathlib.PurePosixPath("/a")), "path": pathlib.PosixPath("/a"),
    "windows": pathlib.PureWindowsPath("a"), "size": torch.Size([1]), "set": {1}, "random": np.arange(3),
    "device": torch.device("cpu"), "odd": Call(np.dtype, "O"), "bytes": b"\x80", "dtype": torch.float16,
    "counts": collections.defaultdict(list, a=[1]), "factory": Call(collections.defaultdict, set)}


@POSITIONS
@SCALES
@ZIP_OR_OLDER
def test_released_checkpoints(tmp_path, position, layer_scale, zipped):
    """The config follows from shapes; what lies beside the weights, and index buffers, do not matter."""
    config = backbone(position, layer_scale=layer_scale)
    state = vit.MaskedImageModel(config, 50).state_dict()
    index = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    path = save({"model": {**state, **index}, **BESIDE}, tmp_path / "beit.pth", zipped)
    loaded, info = weights.load(path)
    assert equal(loaded, state) and equal(weights.build(path)[0].state_dict(), state)
    guessed = ["heads"] * (position == "absolute") + ["layer_norm_eps"] + ["layer_scale"] * bool(layer_scale)
    assert info == dict(source="released BEiT", task="masked image modeling", outputs=50, classes=None,
                        eval_crop=None, guessed=guessed + ["pixel_mean", "pixel_std"], dropped=[],
                        config=dataclasses.replace(config, drop_path=info["config"].drop_path))
    found = weights.read_file(path)
    inert = [found[name] for name in list(BESIDE)[1:10]] + [found["factory"]["missing"]]
    inert += found["optimizer"]["param_groups"][0].values()
    assert all(isinstance(value, weights.StandIn) for value in inert)


@pytest.mark.parametrize("nest", ["model", "module", "state_dict"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "backbone.", "student.",
                                    "teacher.backbone.", "encoder.", "visual_encoder.", "base_model.model."])
def test_prefixes_of_wrappers(tmp_path, prefix, nest):
    """With tensors of other models beside it, which have another prefix or none."""
    state = vit.VisionTransformer(backbone("relative")).half().state_dict()
    others = {name: torch.zeros(1) for name in ("decode_head.a", f"{prefix}fpn1.0.weight", "text.blocks.0.a")}
    loaded, info = weights.load(save({nest: {**named(prefix, state), **others}}, tmp_path / "x.pth"))
    assert info["dropped"] == ["decode_head.a", "fpn1.0.weight", "text.blocks.0.a"]
    assert info["source"] == "released BEiT"
    assert equal(loaded, {name: tensor.float() for name, tensor in state.items()})
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


@POSITIONS
def test_models_of_the_first_edition(tmp_path, position):
    """Its classifiers and segmenters had a mask_token, which they did not use."""
    config, path = backbone(position, layer_scale=0.1, heads=4), tmp_path / "model.pt"
    images, mask = torch.rand(2, 3, 32, 32), torch.rand(2, 4, 4) < 0.5
    for Model, inputs in ((vit.MaskedImageModel, (images, mask)), (vit.ImageClassifier, (images,)),
                          (vit.SemanticSegmenter, (images,))):
        model, again = randomised(Model(config, 5)), Model(config, 5).eval()
        found = torch.load(write_model(model, path, "abcde"), weights_only=True)
        found["model"].setdefault("mask_token", torch.randn(1, 1, 64))
        built, info = weights.build(save(found, path))
        assert type(built) is Model and info["source"] == "ours" and info["config"] == config
        assert initialise(again, path, list("abcde")) == []
        with torch.no_grad():
            assert torch.equal(built(*inputs), model(*inputs)) and torch.equal(again(*inputs), model(*inputs))


@torch.no_grad()
@pytest.mark.parametrize("has_norm", [True, False])
def test_a_linear_probe_opens_as_its_backbone(tmp_path, capsys, has_norm):
    """With the heads of this edition, and the buffers of the second's."""
    model, images = randomised(probe.LinearProbe(backbone("relative"), 3)), torch.rand(2, 3, 32, 32)
    model.norm = model.norm if has_norm else torch.nn.Identity()
    model.head.register_buffer("moments", torch.zeros(2, 256))
    path = write_model(model, tmp_path / "model.pt", "abc")
    built = weights.load_model(path)
    assert type(built) is vit.VisionTransformer and built(images).equal(model.features(images))
    _, info = weights.load(path)
    assert (info["source"], info["task"], info["outputs"]) == ("ours", "linear probe", None)
    assert info["dropped"] == [name for name in model.state_dict() if name.startswith("head.")]
    new = [f"{name}.{part}" for name in ("fc_norm", "head") for part in ("weight", "bias")]
    assert initialise(vit.ImageClassifier(backbone("relative"), 3), path, list("abc")) == new
    norm = "norm, " if has_norm else ""
    assert capsys.readouterr().out.endswith(f"left behind: {norm}head, head.0, head.1\n")


# ---- Into a model ----

SHARED, ABSOLUTE = backbone(layer_scale=0.1), backbone("absolute")


@pytest.mark.parametrize("source, config, flags, copy_shared_table, expected", [
    ("ours", SHARED, {}, True, dict(position="relative", dim=64, layer_scale=0.1, image_size=32)),
    ("ours", SHARED, dict(image_size=48, dim=64), False, dict(position="shared_relative", image_size=48)),
    ("ours", SHARED, dict(position="shared_relative"), True, dict(position="shared_relative")),
    ("ours", SHARED, dict(position="relative"), False, dict(position="relative")),
    ("ours", SHARED, dict(position="absolute"), True, "--position: .* has shared_relative, not absolute"),
    ("ours", SHARED, dict(dim=128), True, "--dim: .*x.pt has 64, not 128"),
    ("ours", SHARED, dict(layer_scale=1e-5), True, "--layer-scale: .* has 0.1, not 1e-05"),
    ("ours", ABSOLUTE, dict(pixel_mean=[0.5] * 3), True, "--pixel-mean: .* has .*0.485, .*not .*0.5.*"),
    ("ours", ABSOLUTE, dict(pixel_mean=[*vit.IMAGENET_MEAN]), True, dict(position="absolute")),
    ("released", ABSOLUTE, dict(heads=4, pixel_std=[0.5] * 3), True, dict(heads=4, pixel_std=(0.5,) * 3)),
    ("released", SHARED, dict(layer_scale=1e-5), True, dict(layer_scale=1e-5, heads=1)),
    ("released", SHARED, dict(layer_scale=0.0), True, "--layer-scale: .* has 0.1, not 0.0"),
    ("released", SHARED, dict(heads=4), True, "--heads: .* has 1, not 4"),
    ("released", ABSOLUTE, dict(layer_scale=0.1), True, "--layer-scale: .* has 0.0, not 0.1")])
def test_flags_take_the_sizes_of_a_checkpoint(tmp_path, source, config, flags, copy_shared_table, expected):
    """A given flag must agree with what the file tells, and wins over what was guessed."""
    model, path = vit.MaskedImageModel(config, 50), tmp_path / "x.pt"
    path = write_model(model, path) if source == "ours" else save(model.state_dict(), path)
    args = argparse.Namespace(**{"image_size": None, "position": "absolute", **flags}, given=list(flags))
    apply = functools.partial(pretrained.apply_checkpoint_sizes, args, path, weights.load(path)[1],
                              copy_shared_table=copy_shared_table)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"^{expected}$"):
            apply()
        return
    apply()
    names = ("patch_size", "dim", "depth", "mlp_ratio", "layer_norm_eps", "pixel_mean")
    sizes = {name: getattr(config, name) for name in names}
    assert vars(args).items() >= {**sizes, **expected}.items()

@SIZES
def test_from_pre_training_to_a_classifier(tmp_path, capsys, image_size):
    source, name = randomised(vit.MaskedImageModel(backbone(), 50)), "relative_position_bias_table"
    path = save({"model": source.state_dict()}, tmp_path / "beit.pth")
    model, (state, info) = vit.ImageClassifier(backbone("relative", image_size), 5), weights.load(path)
    new = [f"{name}.{part}" for name in ("fc_norm", "head") for part in ("weight", "bias")]
    assert pretrained.initialise(model, path, state, info) == new
    assert equal(state, source.state_dict())                   # of load, and not changed
    table = {name: source.rel_pos_bias.get_parameter(name)}
    table = weights.resize_positions(table, model.config, (4, 4))[name]
    assert all(torch.equal(block.attn.relative_position_bias_table, table) for block in model.blocks)
    assert (model.fc_norm.weight == 1).all() and not model.fc_norm.bias.any()    # as released
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    taken, *rest = capsys.readouterr().out.splitlines()
    assert taken.startswith(f"taken from {path} (released BEiT, masked image modeling): ")
    grids = "; positions, from 4x4 to 6x6" if image_size == 48 else ""
    assert rest == [f"converted: the shared position table, into one for each block{grids}",
                    "new: fc_norm, head; left behind: mask_token, norm, lm_head"]


@pytest.mark.parametrize("names, taken", [
    ("abc", True), ("cab", True), ("abd", False), ("aab", False), (None, True)])
@pytest.mark.parametrize("Model", [vit.ImageClassifier, vit.SemanticSegmenter])
def test_a_head_follows_the_names_of_the_classes(tmp_path, Model, names, taken):
    source, model = randomised(Model(backbone("relative"), 3)), Model(backbone("relative"), 3)
    new = initialise(model, write_model(source, tmp_path / "model.pt", names), list("abc"))
    assert ("head.weight" not in new) == taken
    rows = [(names or "abc").index(name) for name in "abc"] if taken else []
    for ours, others in zip(model.head.parameters(), source.head.parameters()):
        assert torch.equal(ours, others[rows]) if taken else not torch.equal(ours, others)


def test_a_head_for_the_class_token_is_not_applied_to_the_mean(tmp_path):
    """timm's BEiT with global_pool="token": norm before the head, and no fc_norm."""
    model = vit.ImageClassifier(backbone(), 3)
    state = {name.replace("fc_norm", "norm"): tensor for name, tensor in model.state_dict().items()}
    save(state, tmp_path / "token.pth")
    with pytest.raises(UserError, match=r"token.pth: expected a head for .* patches, found a head for \[S\]"):
        weights.build(tmp_path / "token.pth")


@pytest.mark.parametrize("name, value, message", [
    ("blocks.1.mlp.fc1.bias", None, "Missing key.*blocks.1.mlp.fc1.bias"),
    ("surprise", torch.zeros(1), "Unexpected key.*surprise"),
    ("blocks.1.attn.proj.weight", torch.zeros(64, 32), "size mismatch for blocks.1.attn.proj.weight"),
    (SHARED_TABLE, torch.zeros(2, 1), SHARED_TABLE),
    *[("patch_embed.proj.weight", torch.zeros(shape), "expected square patches of 3 colours, .* found .*]")
      for shape in ((64, 192), (64, 1, 8, 8), (64, 4, 8, 8), (64, 3, 8, 16), (64,), ())]])
def test_anything_unexpected_is_an_error(tmp_path, name, value, message):
    state = {**vit.MaskedImageModel(backbone(), 50).state_dict(), name: value}
    path = save({name: state[name] for name in state if state[name] is not None}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"^[^\\n]*x.pth: [^\\n]*{message}[^\\n]*$"):
        initialise(vit.ImageClassifier(backbone(), 5), path)
    with pytest.raises(UserError, match=f"^[^\\n]*x.pth: [^\\n]*{message}[^\\n]*$"):
        weights.build(path)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 6, 7, 12, 15])
@pytest.mark.parametrize("decoder_dim", [16, 80, 256])
def test_segmenters_of_any_patch_size_are_read_again(tmp_path, patch_size, decoder_dim):
    config = vit.ViTConfig(image_size=4 * patch_size, patch_size=patch_size, dim=16, depth=1, heads=2)
    model = vit.SemanticSegmenter(config, 4, decoder_dim)
    built, info = weights.build(write_model(model, tmp_path / "model.pt", "abcd"))
    assert equal(built.state_dict(), model.state_dict()) and info["task"] == "segmentation"


def test_a_script_asks_for_the_side_of_a_square(tmp_path):
    model, args = vit.VisionTransformer(backbone(image_size=(32, 48))), argparse.Namespace(given=[])
    args.init, args.image_size = write_model(model, tmp_path / "model.pt"), None
    with pytest.raises(UserError, match="^--image-size: .*model.pt has 32x48; give the side of a square"):
        pretrained.open_checkpoint(args)
    args.image_size = 40
    pretrained.open_checkpoint(args)
    assert args.image_size == 40


# ---- Positions at another image size ----

@pytest.mark.parametrize("old, new, given", [
    ((8, 8), (12, 12), None), ((12, 12), (8, 8), None), ((4, 6), (6, 4), (4, 6)), ((2, 5), (4, 10), (2, 5))])
def test_positions_carry_over_to_other_grids(old, new, given):
    """A ramp along the columns stays one, in E_pos and in the table of offsets."""
    (h, w), (new_h, new_w) = old, new
    patches = torch.arange(float(w)).repeat(h).view(1, -1, 1)
    table = torch.arange(1.0 - w, w).repeat(2 * h - 1).view(-1, 1)
    state = {"pos_embed": torch.cat([torch.full((1, 1, 1), 7.0), patches], 1),
             TABLE: torch.cat([table, torch.tensor([[7.0], [8.0], [9.0]])])}
    resized = weights.resize_positions(state, backbone(image_size=(8 * new_h, 8 * new_w)), given)
    assert resized["pos_embed"][0, 0] == 7 and resized[TABLE][-3:, 0].tolist() == [7, 8, 9]    # of [S]
    grid = resized["pos_embed"][0, 1:].view(new)
    offsets = resized[TABLE][:-3].view(2 * new_h - 1, 2 * new_w - 1)
    for ramp in (grid, offsets):
        assert (ramp.diff(dim=1) > -1e-3).all() and ramp.diff(dim=0).abs().max() < 1e-5
    assert offsets[:, new_w - 1].abs().max() < 1e-5            # zero stays central
    same = weights.resize_positions(state, backbone(image_size=(8 * h, 8 * w)))
    assert all(torch.equal(same[key], state[key]) for key in state)


def resized_table(offsets, old, new):
    """offsets (2h-1, 2w-1) of the grid old, resized to the grid new."""
    table, (h, w) = torch.cat([torch.as_tensor(offsets).reshape(-1, 1), torch.zeros(3, 1)]), new
    state = weights.resize_positions({TABLE: table}, backbone(image_size=(8 * h, 8 * w)), old)
    return state[TABLE][:-3].view(2 * h - 1, 2 * w - 1)


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
    smaller = weights.resize_positions(state, backbone(image_size=16))["pos_embed"][0, 1:, 0].view(2, 2)
    larger = weights.resize_positions(state, backbone(image_size=64))["pos_embed"][0, 1:, 0].view(8, 8)
    near, far = (1.25 * 0.5 - 2.25) * 0.25 + 1, -0.75 * (1.5 ** 3 - 5 * 1.5 ** 2 + 8 * 1.5 - 4)
    assert smaller[0].tolist() == pytest.approx([near, far], abs=1e-6)
    assert larger[3, 2].item() == pytest.approx((1.25 * 0.25 - 2.25) * 0.25 ** 2 + 1, abs=1e-6)


def test_positions_that_fit_no_grid_are_refused():
    with pytest.raises(ValueError, match="pos_embed: 17 rows do not fit a grid of 3x5"):
        weights.resize_positions({"pos_embed": torch.zeros(1, 17, 1)}, backbone(), (3, 5))
    with pytest.raises(ValueError, match="pos_embed: 16 rows do not fit a grid of 3x3"):
        weights.resize_positions({"pos_embed": torch.zeros(1, 16, 24)}, backbone())
    for rows in (19, 25):                                      # 16 offsets are a square, of an even side
        with pytest.raises(ValueError, match=f"{TABLE}: {rows} rows do not fit a grid of 2x2"):
            weights.resize_positions({TABLE: torch.zeros(rows, 2)}, backbone())


# ---- timm and Hugging Face ----

@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def hf_config(transformers, config, **more):
    fields = dict(
        image_size=config.image_size, patch_size=config.patch_size, hidden_size=config.dim,
        num_hidden_layers=config.depth, num_attention_heads=config.heads, intermediate_size=4 * config.dim,
        layer_norm_eps=1e-6, layer_scale_init_value=config.layer_scale, attn_implementation="eager",
        use_absolute_position_embeddings=config.position == "absolute",
        use_relative_position_bias=config.position == "relative",
        use_shared_relative_position_bias=config.position == "shared_relative")
    return transformers.BeitConfig(**{**fields, **more})


def normalised(images, config):
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.pixel_mean, config.pixel_std))
    return (images - mean) / std


def weights_in(folder):
    """The file of weights in a folder that save_huggingface or save_pretrained wrote."""
    return next(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))


@torch.no_grad()
def assert_same(ours, hf_model):
    """Our model and Hugging Face's compute the same outputs, hidden states and attention."""
    images, masks = torch.rand(2, 3, *ours.config.image_hw), []
    if isinstance(ours, vit.MaskedImageModel):
        masks = [torch.ones(2, *ours.config.grid, dtype=torch.bool)]
    outputs = hf_model.eval()(normalised(images, ours.config), *(mask.flatten(1) for mask in masks),
                              output_hidden_states=True, output_attentions=True)
    expected = outputs.logits.flatten(0, -2) if "logits" in outputs else outputs.last_hidden_state
    close(ours(images, *masks), expected)
    if not masks:
        for layer, state in enumerate(ours.hidden_states(images)):
            close(state, outputs.hidden_states[layer + 1])
            close(ours.attention_maps(images, layer), outputs.attentions[layer])


@POSITIONS
@SCALES
@SIZES
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("Model", ["BeitForMaskedImageModeling", "BeitForImageClassification", "BeitModel"])
def test_hugging_face_both_ways(transformers, tmp_path, monkeypatch, Model, suffix, image_size, layer_scale,
                                position):
    if suffix == ".bin":
        monkeypatch.setattr(weights, "safetensors", None)
    config, HFModel = backbone(position, image_size, layer_scale=layer_scale), getattr(transformers, Model)
    hf_model = randomised(HFModel(
        hf_config(transformers, config, vocab_size=50, num_labels=5, use_mask_token="Mask" in Model)))
    ours, info = weights.build(save(hf_model.state_dict(), tmp_path / "x.bin"))    # memory's names, no config
    assert info["source"] == "Hugging Face" and info["config"].position == position
    assert_same(ours, hf_model)
    weights.save_huggingface(ours, tmp_path / "back")
    back, loading = HFModel.from_pretrained(tmp_path / "back", output_loading_info=True,
                                           attn_implementation="eager")
    assert not any(loading[f"{wrong}_keys"] for wrong in ("missing", "unexpected", "mismatched"))
    assert equal(back.state_dict(), hf_model.state_dict())
    assert_same(ours, back)
    again, info = weights.build(weights_in(tmp_path / "back"))         # in the hub's names, with config.json
    assert weights_in(tmp_path / "back").suffix == suffix and equal(again.state_dict(), ours.state_dict())
    assert info["config"].image_size == image_size and bool(info["config"].layer_scale) == bool(layer_scale)


@pytest.mark.parametrize("change, wrong", [
    ({}, None), ({"num_attention_heads": 4}, None), ({"image_size": [32, 32]}, None),
    ({"image_size": [32, 48]}, r"a square image_size, found \[32, 48\]"),
    ({"layer_norm_eps": 1e-12}, None), ({"layer_norm_eps": 1e-3}, None),
    ({"hidden_act": "relu"}, "hidden_act gelu, found relu"),
    ({"use_mean_pooling": False}, "use_mean_pooling true|expected one norm"),
    ({"id2label": {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}}, None)])
@pytest.mark.parametrize("Model", ["BeitForImageClassification", "BeitModel", "BeitForMaskedImageModeling"])
def test_config_json_is_obeyed_or_refused(transformers, tmp_path, change, wrong, Model):
    """With initial weights as small as Hugging Face's, where eps counts."""
    config = backbone("relative" if "image_size" in change else "absolute", heads=2)
    fields = {"id2label": {0: "x", 1: "y", 2: "z"}, "vocab_size": 3, "use_mask_token": "Mask" in Model}
    hf_model = getattr(transformers, Model)(hf_config(transformers, config, **{**fields, **change}))
    hf_model.save_pretrained(tmp_path)
    path = weights_in(tmp_path)
    if wrong and (Model, change) != ("BeitModel", {"use_mean_pooling": False}):
        with pytest.raises(UserError, match=f"(config.json: expected|model.safetensors:) ({wrong})"):
            weights.build(path)
        return
    ours, info = weights.build(path)
    assert_same(ours, hf_model)
    if "fc_norm.weight" in ours.state_dict():
        assert ours.fc_norm.eps == hf_model.config.layer_norm_eps
    names = list(hf_model.config.id2label.values())
    named = Model == "BeitForImageClassification" and names[0] != "LABEL_0"
    assert info["classes"] == (names if named else None)
    weights.save_huggingface(ours, tmp_path / "back", info["classes"])
    back = getattr(transformers, Model).from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert_same(ours, back)
    assert not named or list(back.config.id2label.values()) == names
    initialise(vit.VisionTransformer(info["config"]), path)
    for field, value in (("heads", 8), ("layer_norm_eps", 1e-5)):
        other = dataclasses.replace(info["config"], **{field: value})
        with pytest.raises(UserError, match=f"expected {field} {value} as in the model, found"):
            initialise(vit.VisionTransformer(other), path)


def test_json_beside_hugging_faces_weights(transformers, tmp_path):
    config = dataclasses.replace(backbone("relative"), pixel_std=(0.5, 0.4, 0.3))
    weights.save_huggingface(vit.ImageClassifier(config, 3), tmp_path)
    assert weights.load(weights_in(tmp_path))[1]["config"].pixel_std == config.pixel_std
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(torch.ones(3, 40, 40), do_rescale=False, return_tensors="pt")["pixel_values"]
    close(pixels, normalised(torch.ones(1, 3, 32, 32), config))
    ours = weights.load_model(weights_in(tmp_path))
    snippet = weights.save_huggingface.__doc__.partition(":\n\n")[2].partition("\n\n")[0]
    found = {"path": tmp_path, "image": torch.randint(256, (3, 32, 32), dtype=torch.uint8)}
    exec(textwrap.dedent(snippet), found)
    close(found["logits"], ours(found["image"][None] / 255))
    for content, message in (('{"id2label": {"0": "a"}}', "expected names of 3 classes, found 1"),
                             ("{", "expected JSON")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=f"config.json: {message}"):
            weights.load(weights_in(tmp_path))
    content = '{"id2label": {"10": "c", "9": "b", "1": "a"}, "num_attention_heads": 1}'    # as ImageNet-22K's
    (tmp_path / "config.json").write_text(content)
    assert weights.load(weights_in(tmp_path))[1]["classes"] == ["a", "b", "c"]


HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("change, expected", [
    ({}, HALF), ({"image_mean": 0.5, "image_std": [0.25]}, ((0.5,) * 3, (0.25,) * 3)),
    ({"do_normalize": False}, ((0.0,) * 3, (1.0,) * 3)),
    ({"do_normalize": False, "image_mean": None, "image_std": None}, ((0.0,) * 3, (1.0,) * 3)),
    ({"rescale_factor": 1 / 127.5}, ((0.25,) * 3, (0.25,) * 3)),
    ({"do_rescale": False, "image_mean": [120, 110, 100], "image_std": 51},
     ((120 / 255, 110 / 255, 100 / 255), (0.2,) * 3)),
    ({"do_rescale": False, "do_normalize": False}, ((0.0,) * 3, (1 / 255,) * 3)),
    ({"image_mean": None}, "NoneType"), ({"image_std": [0.5, 0.5]}, "size"), ({"image_mean": "a"}, "str"),
    ({"rescale_factor": None}, "NoneType"), (None, HALF)])
def test_preprocessor_json_is_obeyed_or_refused(transformers, tmp_path, change, expected):
    """Against the processor of transformers, on images of the model's size; None: there is no such file."""
    model = transformers.BeitModel(hf_config(transformers, backbone("relative")))
    model.save_pretrained(tmp_path)
    if change is not None:
        change = {"image_processor_type": "BeitImageProcessor", "size": {"height": 32, "width": 32}, **change}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(change))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=rf"processor_config.json: expected numbers .*{expected}[^\n]*$"):
            weights.load(weights_in(tmp_path))
        return
    config, guessed = (weights.load(weights_in(tmp_path))[1][name] for name in ("config", "guessed"))
    assert [config.pixel_mean, config.pixel_std] == [pytest.approx(values) for values in expected]
    assert guessed == (["pixel_mean", "pixel_std"] if change is None else [])
    if change is not None:
        images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        pixels = processor(list(images), return_tensors="pt")["pixel_values"].float()
        torch.testing.assert_close(pixels, normalised(images / 255, config), atol=1e-4, rtol=1e-4)


def wide_image():
    pixels = torch.rand(12, 26, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    return Image.fromarray(pixels).resize((260, 120), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("eval_crop", [None, 1.0, 0.875, 0.6])
@pytest.mark.parametrize("Processor", ["AutoImageProcessor", "BeitImageProcessor"])
def test_an_export_prepares_images_as_our_evaluation_does(transformers, tmp_path, Processor, eval_crop):
    """On a wide image, also in grey; resampling differs by one level of 255."""
    model = vit.ImageClassifier(backbone(), 3)
    recorded = {} if eval_crop is None else {"eval_crop": eval_crop}
    built, info = weights.build(write_model(model, tmp_path / "model.pt", "abc", **recorded))
    assert info["eval_crop"] == eval_crop
    weights.save_huggingface(built, tmp_path / "hf", info["classes"], info["eval_crop"])
    processor = getattr(transformers, Processor).from_pretrained(tmp_path / "hf")
    transform = data.classification_transform(32, train=False, eval_crop=eval_crop or 1.0)
    for image in (wide_image(), wide_image().rotate(90, expand=True), wide_image().convert("L")):
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        ours = normalised(transform(image.convert("RGB"))[None] / 255, model.config)
        assert (pixels - ours).abs().max() < 1.05 / 255 / min(model.config.pixel_std)
    exported = weights.load(weights_in(tmp_path / "hf"))[1]["eval_crop"]
    assert round(32 / exported) == round(32 / (eval_crop or 1.0))


@pytest.mark.parametrize("position", vit.POSITIONS)
def test_rectangles_are_not_exported_to_hugging_face(tmp_path, position):
    model = vit.VisionTransformer(backbone(position, image_size=(32, 48)))
    with pytest.raises(UserError, match="hf: expected a model of square images, found 32x48"):
        weights.save_huggingface(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


BEIT_JSON = b'{"model_type": "beit"}'


@pytest.mark.parametrize("target, files, refused", [
    ("huggingface", {}, None),
    ("huggingface", {"config.json": BEIT_JSON, "preprocessor_config.json": b"{}", "WEIGHTS": b"x"}, None),
    ("huggingface", {"config.json": BEIT_JSON, "OTHER": b"x"}, "nothing but an earlier export, found OTHER"),
    ("huggingface", {"config.json": BEIT_JSON, "WEIGHTS": b"x", "README.md": b"x"}, "found README.md"),
    ("huggingface", {"config.json": b'{"preset": "demo"}', "last.pt": b"x"}, "found last.pt"),
    ("huggingface", {"config.json": b'{"preset": "demo"}'}, "found config.json"),
    ("huggingface", {"config.json": b'{"architecture": "beit"}', "WEIGHTS": b"x"}, "found .*WEIGHTS"),
    ("huggingface", {"config.json": b"[]"}, "found config.json"),
    ("huggingface", {"WEIGHTS": b"x"}, "found WEIGHTS"),
    ("huggingface", {"config.json": b"{"}, "config.json: expected JSON"),
    ("huggingface", {"config.json": BEIT_JSON, "WEIGHTS": None}, "takes another folder than that of"),
    ("timm", {}, None), ("timm", {"OUT": b"x"}, "timm takes a new file"),
    ("timm", {"OUT": None}, "timm takes a new file")])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_export_replaces_nothing_else(tmp_path, monkeypatch, capsys, suffix, target, files, refused):
    """None stands for the file that is exported."""
    names = {"WEIGHTS": "model.safetensors", "OTHER": "pytorch_model.bin", "OUT": "out.bin"}
    if suffix == ".bin":
        names["WEIGHTS"], names["OTHER"] = names["OTHER"], names["WEIGHTS"]
        monkeypatch.setattr(weights, "safetensors", None)
    folder, path = tmp_path / "folder", tmp_path / "model.bin"
    written = folder / names["OUT" if target == "timm" else "WEIGHTS"]
    folder.mkdir()
    model = write_model(vit.VisionTransformer(backbone("relative")), path).read_bytes()
    for name, content in files.items():
        (folder / names.get(name, name)).write_bytes(content or model)
        path = path if content else folder / names[name]
        refused = refused and refused.replace(name, names.get(name, name))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    out = str(written if target == "timm" else folder)
    monkeypatch.setattr("sys.argv", ["weights.py", str(path), "--to", target, out])
    if refused:
        with pytest.raises(SystemExit, match="2"):
            weights.main()
        *_, line = capsys.readouterr().err.splitlines()
        assert re.search(refused, line)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        return
    weights.main()
    assert type(weights.load_model(written)) is vit.VisionTransformer


@pytest.mark.parametrize("Model", ["Data2VecVisionModel", "Data2VecVisionForImageClassification"])
def test_data2vec_of_hugging_face(transformers, tmp_path, Model):
    """The same architecture, with another prefix."""
    fields = hf_config(transformers, backbone("relative", layer_scale=0.1), num_labels=5).to_dict()
    fields |= {"model_type": "data2vec-vision", "attn_implementation": "eager"}
    hf_model = randomised(getattr(transformers, Model)(transformers.Data2VecVisionConfig(**fields)))
    hf_model.save_pretrained(tmp_path)
    assert_same(weights.load_model(weights_in(tmp_path)), hf_model)


def test_decoders_of_segmenters_are_left_behind(transformers, tmp_path):
    config = backbone("relative", depth=4, layer_scale=0.1)
    hf_model = randomised(transformers.BeitForSemanticSegmentation(
        hf_config(transformers, config, out_indices=[1, 2, 3, 4], num_labels=7)))
    ours, info = weights.build(save(hf_model.state_dict(), tmp_path / "pytorch_model.bin"))
    assert info["dropped"] and info["outputs"] is None
    assert_same(ours, hf_model.beit)
    model = vit.SemanticSegmenter(config, 5)
    weights.save_huggingface(model, tmp_path / "hf")
    state = weights.build(weights_in(tmp_path / "hf"))[0].state_dict()
    assert equal(state, {name: model.state_dict()[name] for name in state}) and "norm.weight" in state
    with pytest.raises(UserError, match="timm has no place"):
        weights.save_timm(model, tmp_path / "x.pt")


@POSITIONS
@SCALES
@SIZES
def test_timm_both_ways(tmp_path, position, layer_scale, image_size):
    beit = pytest.importorskip("timm.models.beit")
    config = backbone(position, image_size, layer_scale=layer_scale)
    timm_model, back = (beit.Beit(
        img_size=image_size, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=5,
        init_values=layer_scale or None, use_abs_pos_emb=position == "absolute",
        use_rel_pos_bias=position == "relative", use_shared_rel_pos_bias=position == "shared_relative").eval()
        for _ in range(2))
    ours, info = weights.build(save(randomised(timm_model).state_dict(), tmp_path / "timm.bin"))
    assert (info["source"], info["task"], info["outputs"]) == ("timm", "classification", 5)
    weights.save_timm(ours, tmp_path / "back.pt")
    missing, unexpected = back.load_state_dict(torch.load(tmp_path / "back.pt"), strict=False)
    assert not unexpected and all(name.endswith(("relative_position_index", "k_bias")) for name in missing)
    images = torch.rand(2, 3, image_size, image_size)
    with torch.no_grad():
        close(ours(images), timm_model(normalised(images, config)))
        close(ours(images), back(normalised(images, config)))
    weights.save_timm(vit.MaskedImageModel(config, 50), tmp_path / "back.pt")
    _, unexpected = back.load_state_dict(torch.load(tmp_path / "back.pt"), strict=False)
    assert unexpected == ["norm.weight", "norm.bias"]                  # without [M] and token head


@pytest.mark.parametrize("flags, change, expected", [
    ({}, {}, {}), ({"img_size": (32, 48)}, {}, {"image_size": (32, 48)}),
    ({"use_abs_pos_emb": True, "use_rel_pos_bias": False, "num_heads": 4}, {}, {"heads": 4}),
    ({}, {"label_names": {"0": "x", "4": "y", "12": "z"}}, {"classes": list("xyz")}),
    ({}, {"label_names": None}, {"classes": None}), ({}, {"label_names": ["a"]}, "names of 3 .* found 1"),
    ({}, {"global_pool": "token"}, "global_pool avg, .* found token"),
    ({}, {"mean": 0.5, "std": [0.25]}, {"pixel_mean": (0.5,) * 3, "pixel_std": (0.25,) * 3}),
    ({}, {"mean": [0.5, 0.5]}, "numbers for the pixels"), ({}, {"crop_mode": "squash"}, {"eval_crop": None}),
    ({}, {"crop_pct": 0.9}, {"eval_crop": 32 / 35})])
def test_timms_config_json_is_obeyed_or_refused(tmp_path, flags, change, expected):
    """A folder of timm, against timm's own model and transform; its classes are not in alphabetical order."""
    timm, hub = pytest.importorskip("timm"), pytest.importorskip("timm.models._hub")
    sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=3)
    model = randomised(timm.create_model("beit_base_patch16_224", **{**sizes, **flags}))
    own = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.8, crop_mode="center")
    hub.save_for_hf(model, tmp_path, {"label_names": ["c", "a", "b"], "pretrained_cfg": own})
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    cfg = written["pretrained_cfg"]
    for name, value in change.items():
        (cfg if name in own else written)[name] = value
    path.write_text(json.dumps(written))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"/config.json: expected {expected}"):
            weights.load(weights_in(tmp_path))
        return
    ours, info = weights.build(weights_in(tmp_path))
    found = {**info, **vars(info["config"])}
    given = {"classes": ["c", "a", "b"], "pixel_mean": own["mean"], "pixel_std": own["std"], "eval_crop": 0.8,
             "image_size": 32, "heads": 2, "layer_norm_eps": 1e-6, "guessed": ["layer_scale"], **expected}
    assert {name: found[name] for name in given} == given
    images = torch.rand(2, 3, *ours.config.image_hw)
    if info["eval_crop"] and ours.config.image_size == 32:
        theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))(wide_image())
        transform = data.classification_transform(32, train=False, eval_crop=info["eval_crop"])
        images = transform(wide_image())[None] / 255
        close(normalised(images, ours.config), theirs[None])
    with torch.no_grad():
        close(ours(images), model(normalised(images, ours.config)))


def test_config_json_of_something_else_beside_timms_weights(tmp_path):
    """Such as that of a run."""
    weights.save_timm(vit.ImageClassifier(backbone("relative"), 3), tmp_path / "x.bin")
    (tmp_path / "config.json").write_text('{"image_size": 64, "heads": 8, "pixel_mean": [0, 0, 0]}')
    assert weights.load(tmp_path / "x.bin")[1]["config"].pixel_mean == vit.IMAGENET_MEAN


@pytest.mark.parametrize("target", ["huggingface", "timm"])
def test_command_line(tmp_path, capsys, monkeypatch, target):
    model, out = vit.ImageClassifier(backbone("relative"), 5), tmp_path / "out"
    path = write_model(model, tmp_path / "model.pt", "vwxyz")
    monkeypatch.setattr("sys.argv", ["weights.py", str(path), "--to", target, str(out)])
    weights.main()
    said = capsys.readouterr().out
    for words in ("ours, ImageClassifier, 5 outputs", "image_size=32", f"written to {out}, for {target}"):
        assert words in said
    built, info = weights.build(weights_in(out) if target == "huggingface" else out)
    assert equal(built.state_dict(), model.state_dict())
    assert info["classes"] == (list("vwxyz") if target == "huggingface" else None)
