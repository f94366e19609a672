"""Training on a GPU, tested without one: tensors pretend to be on it and may not meet tensors of the CPU.

On a machine with a GPU, the same tests use the real one.
"""
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import data
import finetune
import launch
import pretrain
import probe
import segment
import train_dvae

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
STAND_IN = torch.device("meta", 0)    # for the GPU in PyTorch's C++ parts, which refuse cuda without a driver
MOVES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")


class OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU. Its numbers are in .host. Autocast does not change its dtype."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = None    # PretendedGpu does it
    device, is_meta = GPU, False

    @staticmethod
    def __new__(cls, host):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, device=STAND_IN)
        tensor.host = host
        return tensor

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, form):
        return format(self.cpu(), form)

    def new_tensor(self, values):
        return torch.tensor(values, dtype=self.dtype, device=GPU)

    def __reduce_ex__(self, protocol):    # in a file: what torch.load(map_location="cpu") makes of it
        return self.host.__reduce_ex__(protocol)


class PretendedGpu(TorchDispatchMode):
    """The operations of PyTorch, with OnGpu. RuntimeError if tensors of the CPU and the GPU meet in one."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(isinstance(tensor, OnGpu) for tensor in tensors)
        on_cpu = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
        if torch.Tag.pointwise in operation.tags:
            on_cpu = [tensor for tensor in on_cpu if tensor.dim() > 0]    # scalars of the CPU are allowed
        if operation.overloadpacket in INDEXING and isinstance(args[0], OnGpu):
            on_cpu = [values for values in args[2:3] if not isinstance(values, OnGpu)]    # so are indices
        if on_gpu and on_cpu and operation.overloadpacket not in MOVES:
            raise RuntimeError(f"{operation}: expected all tensors on the same device, found {GPU} and cpu")
        if kwargs.get("device") is not None:
            on_gpu = kwargs["device"] in (GPU, STAND_IN)
            kwargs["device"] = CPU if on_gpu else kwargs["device"]
        known = {id(getattr(tensor, "host", tensor)): tensor for tensor in tensors}

        def wrap(result):
            if id(result) in known:    # an operation in place
                return known[id(result)]
            return OnGpu(result) if on_gpu else result

        args, kwargs = tree_map_only(OnGpu, lambda tensor: tensor.host, (args, kwargs))
        return tree_map_only(torch.Tensor, wrap, operation(*args, **kwargs))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 8 if self.split == "train" else 4)
    if torch.cuda.is_available():
        yield GPU
        return
    with torch.device("cpu"):
        torch.empty(0)    # now PyTorch caches its constructors: torch.tensor itself, not the one below
    tensor = torch.tensor    # moves its numbers out of sight of a TorchDispatchMode
    monkeypatch.setattr(torch, "tensor", lambda value, device=None, **more: tensor(value, **more).to(device))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)    # looks for a driver
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with PretendedGpu():
        yield GPU


MODEL = ["--image-size", "16", "--patch-size", "8", "--dim", "16", "--depth", "1", "--heads", "2"]


def train(script, device, out, *flags):
    """Two steps of a script, with a checkpoint after each. Returns the names of the files that it wrote."""
    flags = [*flags, "--out", out, "--batch-size", 4, "--workers", 0]
    flags += [] if "--knn" in flags else ["--steps", 2, "--save-every", 1]
    script.train(script.parse_args(list(map(str, flags))), device)
    return {path.name for path in out.iterdir()}


@pytest.mark.parametrize("script, flags, picture", [
    (train_dvae, ["--image-size", 16, "--groups", 2, "--hidden", 4, "--vocab-size", 16, "--eval-every", 1],
     "tokenizer.png"),
    (pretrain, [*MODEL, "--depth", 2, "--drop-path", 0.5, "--position", "absolute", "--accumulate", 2,
                "--target", "pixels", "--precision", "fp16"], "predictions.png")])
def test_tokenizer_and_pretraining_on_pixels(gpu, script, flags, picture, tmp_path):
    assert {"model.pt", picture} < train(script, gpu, tmp_path, *flags)


@pytest.mark.long
def test_pretrain_on_tokens_continue_and_use_the_model(gpu, tmp_path):
    out, flags = tmp_path / "pretrain", [*MODEL, "--tokenizer-steps", 1]
    train(pretrain, gpu, out, *flags)
    (out / "result.json").unlink()
    (out / "previous.pt").rename(out / "last.pt")
    assert {"model.pt", "predictions.png"} < train(pretrain, gpu, out, *flags)
    for name, script, more, picture in [
            ("finetune", finetune, ["--mixup", 0.8, "--cutmix", 1], "predictions.png"),
            ("segment", segment, [], "segments.png"), ("probe", probe, [], "layers.png"),
            ("knn", probe, ["--knn"], "layers.png")]:
        files = train(script, gpu, tmp_path / name, "--init", out / "model.pt", *more)
        assert {"result.json", picture} < files, name


def test_a_batch_moves_to_the_gpu_as_a_whole(gpu):
    """A GPU takes places of the CPU as indices, but waits for them."""
    image, mask = torch.zeros(3, 16, 16, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.bool)
    sample = {"image": image, "token_image": image, "mask": mask}
    batch = pretrain.to_device(pretrain.collate([sample], "masked"), gpu)
    assert {tensor.device for tensor in batch} == {gpu}


def test_what_a_gpu_refuses_and_accepts(gpu):
    here, there = torch.arange(3.0, device=gpu), torch.arange(3.0)
    for mix in (lambda: here + there, lambda: torch.stack([here.sum(), there.sum()]), here.numpy,
                lambda: there[here.long()], lambda: F.embedding(there.long(), here[:, None])):
        with pytest.raises((RuntimeError, TypeError)):
            mix()
    assert (here * there.sum()).tolist() == [0, 3, 6] and f"{here.mean():.1f}" == "1.0"
    assert here[there > 1].device == F.one_hot(here.long()).device == here.new_tensor(1.0).device == gpu
    assert there.copy_(here).device == here.cpu().device == CPU


@pytest.mark.parametrize("precision, tf32", [("auto", True), ("fp16", True), ("fp32", False)])
def test_each_process_takes_its_gpu(monkeypatch, precision, tf32):
    calls, mine, cudnn, matmul = [], torch.device("cuda", 1), SimpleNamespace(), SimpleNamespace()
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    assert launch.join_processes("auto", precision) == mine
    assert calls == [mine, {"backend": "nccl", "device_id": mine}]
    assert vars(cudnn) == {"benchmark": True, "allow_tf32": tf32} and vars(matmul) == {"allow_tf32": tf32}


@pytest.mark.parametrize("error", [None, OSError("disk full"), launch.UserError("--x: no"), RuntimeError()])
def test_the_process_group_is_destroyed_on_success_only(monkeypatch, error):
    destroyed = []

    def train(args, device):
        if error:
            raise error

    monkeypatch.setattr(sys, "argv", ["train_dvae.py", "--steps", "1", "--device", "cpu"])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: destroyed.append(True))
    with pytest.raises((SystemExit, RuntimeError)) if error else nullcontext():
        launch.start(train_dvae.parse_args, train)
    assert bool(destroyed) == (error is None)
