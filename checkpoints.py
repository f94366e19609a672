"""Files that outlast what happens to a run: written whole or not at all, checked before they are used, and read without
running anything that stands in them.
"""
import collections
import hashlib
import json
import math
import os
import pickle
import shutil
import types
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch


class UserError(Exception):
    """Ends the program with one line on stderr: what is wrong, and what would be accepted."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------

def write_atomically(path, write, keep=None):
    """write(file) into a file beside path, fsync, rename: path is either what it was or complete. keep: what path was stays
    under this name."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if keep and path.exists():
        second_name = keep.with_name(keep.name + ".part")
        second_name.unlink(missing_ok=True)
        try:
            os.link(path, second_name)                  # so that path is never gone
        except OSError:                                 # a file system without hard links: for a moment only `keep` is there
            second_name = path
        os.replace(second_name, keep)
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


@contextmanager
def one_line_if_disk_fails(what, folder, then, needs=None):
    """Turn an error of writing `what` into a UserError that also says what is free (and needed, bytes), and what happens then."""
    try:
        yield
    except (OSError, RuntimeError) as error:            # torch.save turns some errors of the disk into RuntimeErrors
        cause = error.__context__ if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError) else error
        needed = f"it needs {needs / 2 ** 20:,.1f} MB, " if needs is not None else ""
        raise UserError(f"--out: {what} could not be written ({str(cause).splitlines()[0]}): {needed}"
                        f"{shutil.disk_usage(folder).free / 2 ** 20:,.1f} MB are free; {then}", status=1) from None


def write_json(path, value):
    """write_atomically, for readable JSON."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


SEAL = b"sha256 of all before: "    # after the zip archive that torch.save writes; readers of zip look for its end, and do not mind


def save_sealed(state, file):
    """torch.save, and a checksum of the whole file. Zip has one for each part but none for its tables, where a flipped bit
    can go unnoticed and change tensors."""
    torch.save(state, file)
    file.flush()
    file.write(SEAL + _sha256(file.name, file.tell()))


def _sha256(path, size):
    """Of the file's first bytes, that many."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for at in range(0, size, 2 ** 22):
            digest.update(file.read(min(2 ** 22, size - at)))
    return digest.digest()


# ---------------------------------------------------------------------------------------------------------------------
# Reading without running: a checkpoint is a pickle, and unpickling runs whatever the file asks for
# ---------------------------------------------------------------------------------------------------------------------

class Refused(pickle.UnpicklingError):
    """A file asks for something that weights do not need."""


class Callable:
    """A function that a pickle can call, and not change."""
    __slots__ = ()


def only_call(function):
    """The function as a Callable."""
    return type(function.__name__, (Callable,), {"__slots__": (), "__call__": staticmethod(function)})()


def _plain(keys):
    """The keys, if hashing them takes no time: tuples can be nested so deeply that it never ends, or overruns the stack."""
    for key in keys:
        if not isinstance(key, (str, bytes, int, float, type(None))):
            raise Refused(f"a key of type {type(key).__name__}")
    return keys


def _tensor(storage, offset, size, stride, *more):
    whole = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or math.prod(size) > whole or (math.prod(size) and last >= whole):
        raise Refused(f"a tensor of {'x'.join(map(str, size))} out of {whole} numbers")    # torch would allocate the rest
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, *more)


def _ordered_dict(items=()):
    return collections.OrderedDict([(_plain([key])[0], value) for key, value in items])


TENSORS_AND_CONTAINERS = {
    "collections.OrderedDict": only_call(_ordered_dict), "builtins.set": only_call(lambda items=(): set(_plain(list(items)))),
    "torch.device": torch.device, "torch._utils._rebuild_tensor_v2": only_call(_tensor),
    "torch._utils._rebuild_tensor": only_call(lambda storage, offset, size, stride: _tensor(storage, offset, size, stride, False, None)),
    "torch._utils._rebuild_parameter": only_call(torch._utils._rebuild_parameter)}


class TensorUnpickler(pickle._Unpickler):    # Python's own: the one in C allocates whatever size the file names
    """Finds what is admitted, by name; torch.load adds the storages and reads their bytes."""
    admitted = TENSORS_AND_CONTAINERS

    def find_class(self, module, name):
        full_name = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full_name not in self.admitted:
            raise Refused(full_name)
        return self.admitted[full_name]

    def load_setitem(self):
        _plain(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self):
        _plain(self.stack[::2])                         # since the mark: key, value, key, value, ...
        super().load_setitems()

    def load_dict(self):
        _plain(self.stack[::2])
        super().load_dict()

    def load_additems(self):
        _plain(self.stack)
        super().load_additems()

    dispatch = {**pickle._Unpickler.dispatch, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
                pickle.DICT[0]: load_dict, pickle.ADDITEMS[0]: load_additems}
    for opcode in (pickle.FROZENSET, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del dispatch[opcode[0]]                         # torch.save writes none of them


def load_tensors(path, unpickler=TensorUnpickler, **options):
    """What torch.save wrote there, on the CPU: tensors, containers and what the unpickler admits. Runs nothing in the file, and
    takes no more memory than the file's size. Raises Refused, or whatever torch raises for a damaged file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):    # torch.save does not compress
                raise ValueError("it would unpack to more than its size")
    module = types.SimpleNamespace(__name__="pickle", Unpickler=unpickler, load=lambda file, **more: unpickler(file, **more).load())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # the older format compares the sources of classes: stand-ins have none
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module, **options)


def _reason(error):
    if isinstance(error, Refused):
        return f"it asks for {error}"
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def damage(path):
    """What is wrong with a checkpoint of a run, by its checksum (without one, by those of zip's parts) and its structure; None
    if nothing is."""
    try:
        size = max(0, path.stat().st_size - len(SEAL) - hashlib.sha256().digest_size)
        with open(path, "rb") as file:
            file.seek(size)
            end = file.read()
        sealed = end.startswith(SEAL)
        if sealed and end[len(SEAL):] != _sha256(path, size):
            return "it does not match its checksum"
        found = load_tensors(path, mmap=True)           # no more than the structure is read, and nothing that unpacks to more
        if not isinstance(found, dict) or not {"step", "notes"} <= found.keys():
            return "it is no checkpoint of a run"
        if sealed:
            return None
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return f"{broken} does not match its checksum" if broken else None
    except Exception as error:                          # zipfile and torch raise half a dozen kinds
        return _reason(error)


def read_checkpoint(path, flag):
    """The dict in a checkpoint of ours, tensors on the CPU; never runs code from the file. UserError names the flag."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag}: {path} is not a file")
    try:
        checkpoint = load_tensors(path)
    except Exception as error:                          # torch.load raises a dozen kinds for files that are not checkpoints
        raise UserError(f"{flag}: {path} is not a checkpoint of ours ({_reason(error)})") from None
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise UserError(f"{flag}: {path} holds no model of ours")
    return checkpoint


def read_tensors(path):
    """What torch.save wrote there, on the CPU: tensors and containers, never code. UserError for a damaged file."""
    try:
        return load_tensors(path)
    except Exception as error:                          # torch.load raises a dozen kinds
        raise UserError(f"--out: {path} cannot be read ({type(error).__name__}); remove it, and it is made again") from None


def size_of(state):
    """Bytes of all tensors in nested containers."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size_of, parts))
