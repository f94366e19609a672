import os
import pickle

import pytest
import torch

import dvae
import training
import weights

ZIP_OR_OLDER = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])


class Evil:
    """Runs a command when it is unpickled by anything that does not refuse."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def save(value, path, zipped=True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture(scope="module")
def dall_e():
    return pytest.importorskip("dall_e")


@pytest.fixture
def public(dall_e, tmp_path):
    """encoder.pkl and decoder.pkl as DALL-E's own classes pickle, with random weights and biases."""
    def make(zipped=True, **sizes):
        torch.manual_seed(0)
        modules = [dall_e.Encoder(**sizes), dall_e.Decoder(**sizes)]
        for parameter in (p for module in modules for p in module.parameters() if p.dim() == 1):
            parameter.data.normal_(std=0.1)
        return *modules, *(save(module, tmp_path / f"{module._get_name().lower()}.pkl", zipped) for module in modules)
    return make


@ZIP_OR_OLDER
@pytest.mark.parametrize("sizes", [dict(n_hid=64, n_blk_per_group=1, vocab_size=512), dict(n_hid=128, n_blk_per_group=2, vocab_size=8192)],
                         ids=["small", "wide"])
def test_dall_e_computes_the_same(dall_e, public, zipped, sizes):
    encoder, decoder, *paths = public(zipped, **sizes)
    model = weights.load_dalle(*paths)
    assert model.vocab_size == sizes["vocab_size"] and model.downsample == 8 and not model.training
    assert model.config == dict(vocab_size=sizes["vocab_size"], hidden=sizes["n_hid"], groups=4, blocks_per_group=sizes["n_blk_per_group"], in_channels=3)
    for height, width in ((16, 16), (40, 24), (112, 112)):
        images = torch.rand(2, 3, height, width)
        logits = encoder(dall_e.map_pixels(images))
        torch.testing.assert_close(model.encode(images), logits, atol=1e-5, rtol=1e-5)
        tokens = logits.argmax(1)
        assert torch.equal(model.tokenize(images), tokens)
        z = torch.nn.functional.one_hot(tokens, model.vocab_size).permute(0, 3, 1, 2).float()
        theirs = dall_e.unmap_pixels(torch.sigmoid(decoder(z)[:, :3]))
        torch.testing.assert_close(model.decode(tokens), theirs, atol=1e-5, rtol=1e-5)


def test_a_tokenizer_without_decoder(public):
    *_, encoder, decoder = public(n_hid=64, n_blk_per_group=1, vocab_size=512)
    assert weights.load_tokenizer(encoder).decoder is not None         # found beside it
    decoder.unlink()
    model = weights.load_tokenizer(encoder)
    assert model.decoder is None and model.tokenize(torch.rand(1, 3, 16, 16)).shape == (1, 2, 2)
    with pytest.raises(ValueError, match="has no decoder"):
        model.decode(torch.zeros(1, 2, 2, dtype=torch.int64))


def test_a_tokenizer_of_ours(tmp_path):
    ours = dvae.DiscreteVAE(32, 8, 3, 1)
    path = save({"model": ours.state_dict(), "config": ours.config, "kind": "DiscreteVAE"}, tmp_path / "model.pt")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(weights.load_tokenizer(path).tokenize(images), ours.tokenize(images))
    save({"model": {}, "config": {}, "kind": "MaskedImageModel"}, path)
    with pytest.raises(training.UserError, match="^--tokenizer: .*model.pt holds a MaskedImageModel; a model.pt of dvae.py or"):
        weights.load_tokenizer(path)


@ZIP_OR_OLDER
def test_a_pickle_that_calls_the_system(tmp_path, zipped):
    ran = tmp_path / "ran"
    path = save(Evil(f"touch {ran}"), tmp_path / "encoder.pkl", zipped)
    with pytest.raises(ValueError, match=r"encoder.pkl asks for (posix|nt).system, which weights do not need; nothing of it was run"):
        weights.load_dalle(path)
    assert not ran.exists()
    torch.load(path, weights_only=False)                               # and it would have run
    assert ran.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_plain_pickle_that_calls_the_system(tmp_path, protocol):
    ran, path = tmp_path / "ran", tmp_path / "encoder.pkl"
    path.write_bytes(pickle.dumps(Evil(f"touch {ran}"), protocol=protocol))
    with pytest.raises(ValueError) as error:
        weights.load_dalle(path)
    assert not ran.exists() and "\n" not in str(error.value) and "encoder.pkl" in str(error.value)
    if protocol:
        assert "asks for posix.system" in str(error.value)


@ZIP_OR_OLDER
@pytest.mark.parametrize("wanted", [eval, exec, getattr, torch.load, os.system, pickle.loads, torch.nn.Linear], ids=lambda f: f.__name__)
def test_nothing_else_is_found(tmp_path, zipped, wanted):
    path = save([torch.zeros(3), wanted], tmp_path / "encoder.pkl", zipped)
    with pytest.raises(ValueError, match="asks for "):
        weights.read(path)


def test_what_is_found_cannot_be_changed(tmp_path):
    """BUILD with (None, attributes) sets attributes of whatever is on the stack."""
    for module, name in (("dall_e.utils", "Conv2d"), ("torch._utils", "_rebuild_parameter")):
        tampering = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"N}X\x0c\x00\x00\x00dump_patches\x88s\x86b."
        (tmp_path / "x.pkl").write_bytes(tampering)
        with pytest.raises(ValueError, match="x.pkl"):
            weights.read(tmp_path / "x.pkl")
        assert not hasattr(weights.ADMITTED[f"{module}.{name}"], "dump_patches")


def test_what_is_not_weights_is_named(tmp_path, public):
    *_, encoder, decoder = public(n_hid=64, n_blk_per_group=1, vocab_size=512)
    whole = encoder.read_bytes()

    def said(content, load=weights.load_dalle):
        path = tmp_path / "given.pkl"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save(content, path)
        with pytest.raises(ValueError) as error:
            load(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is a web page" in said(b"<!DOCTYPE html>\n<html><body>Not found</body></html>")
    assert "is a web page" in said(b"\n  <?xml version='1.0'?><Error/>")
    assert "is empty" in said(b"")
    assert "is not a file of torch.save: it begins with b'hello'" in said(b"hello")
    for share in (0.1, 0.5, 0.999):
        assert "is cut off or damaged" in said(whole[:int(share * len(whole))])
    older = save(torch.load(encoder, weights_only=False), tmp_path / "older.pkl", zipped=False).read_bytes()
    for share in (0.001, 0.1, 0.5, 0.999):
        assert "is cut off or damaged" in said(older[:int(share * len(older))])
    state = torch.load(encoder, weights_only=False).state_dict()
    assert "holds a state_dict of" in said(state) and "blocks.input.w first, not the pickled Encoder" in said(state)
    assert "holds a dict of model, config" in said({"model": state, "config": 1})
    assert "holds a Tensor" in said(torch.zeros(2))
    assert "is a pickle, but not one of torch.save" in said(pickle.dumps([1, 2], protocol=2))
    assert "holds a Decoder, not the pickled Encoder" in said(decoder.read_bytes())
    assert "holds an Encoder, not the pickled Decoder" in said(whole, lambda path: weights.load_dalle(encoder, path))
    broken = torch.load(encoder, weights_only=False)
    del broken.blocks.group_2
    assert "does not fit" in said(broken)
    with pytest.raises(ValueError, match="is a folder"):
        weights.load_dalle(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        weights.load_dalle(tmp_path / "nowhere.pkl")
    with pytest.raises(training.UserError, match="^--tokenizer: .*state_dict of .*; a model.pt of dvae.py or DALL-E's encoder.pkl would do"):
        weights.load_tokenizer(save(state, tmp_path / "state.pt"))
