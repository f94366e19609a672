"""The folder of a run: which run it holds, and its files.

config.json holds the flags, with resolved paths, and under "inputs" digests of the names of the images and of
the contents of the checkpoints that the run reads. A run continues only if both are what they were.
"""
import hashlib
import itertools
import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import torch
from torch.utils.data import Subset

import data
from launch import UserError, say

# ---- Which run it is ----

INPUTS = ("data", "init", "tokenizer")    # flags that may name files
MAY_CHANGE = ("out", "fresh", "workers", "device", "data_root", "download")    # when a run continues


def resolve(flag, value):
    """The value of a flag. The same file or folder has the same value, wherever the path starts."""
    is_name = value in (None, "none") or (flag == "data" and value in ("shapes", *data.TORCHVISION))
    return value if flag not in INPUTS or is_name else str(Path(value).resolve())


def flags(args):
    """The flags as config.json holds them: a dict, with resolved paths and without args.given."""
    values = {name: resolve(name, value) for name, value in vars(args).items() if name != "given"}
    return json.loads(json.dumps(values))                              # tuples become lists, as in the file


def inputs(args, source, held_out, classes=None):
    """What a run reads: name -> a line of text with a digest.

    source, held_out: the images. classes: their names. The files of --init and --tokenizer are read.
    """
    digests = {"training_images": describe(names_of(source, args.data)),
               "held_out_images": describe(names_of(held_out, args.data))}
    if classes:
        digests["classes"] = describe(classes)
    for flag in ("init", "tokenizer"):
        if getattr(args, flag, None) not in (None, "none"):
            digests[f"{flag}_file"] = describe_file(getattr(args, flag))
    return digests


def names_of(source, folder):
    """The names of the images of a source: their paths below a folder, or their numbers."""
    if isinstance(source, Subset):
        names = names_of(source.dataset, folder)
        return [names[index] for index in source.indices]
    paths = getattr(source, "paths", range(len(source)))
    return [str(path).removeprefix(str(Path(folder))) for path in paths]


def describe(names):
    """A line of text: the number of names and their digest, which depends on their order."""
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    return f"{len(names)} ({digest[:12]})"


def describe_file(path):
    """A line of text: the digest of the contents of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def read_config(folder):
    """config.json of the run in a folder, a dict, or None if there is none. Raises UserError."""
    file = Path(folder, "config.json")
    try:
        return dict(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"--out: {file} is not JSON; name another --out, or rename this one with "
                        "--fresh") from None


def record(args, inputs):
    """Compare the flags and inputs of a run with config.json in its folder. Raises UserError for others.

    Inputs that config.json does not name are added to it.
    """
    folder, now = args.out, flags(args)
    config = read_config(folder)
    if "preset" not in config:
        raise UserError(f"--out: {folder}/config.json was not written by a run; name another --out")
    known = config.pop("inputs", {})
    # (name, before, now) of flags, then of inputs
    pairs = [(name, resolve(name, config.get(name)), now.get(name)) for name in config | now
             if name not in MAY_CHANGE]
    pairs += [(name, known[name], value) for name, value in inputs.items() if name in known]
    differ = [f"{name} was {before}, now {after}" for name, before, after in pairs if before != after]
    if differ:
        raise UserError(f"--out: {folder} holds a run with other flags or files: {', '.join(differ)}; "
                        "name another --out, or rename this one with --fresh")
    if not inputs.keys() <= known.keys():
        write_json(Path(folder, "config.json"), {**config, "inputs": {**known, **inputs}})


def check_default(flag, path, same_data):
    """Raise UserError unless the file `path`, the default of a flag, was written by a run on same_data."""
    trained_on = resolve("data", (read_config(Path(path).parent) or {}).get("data"))
    if trained_on != resolve("data", same_data):
        raise UserError(f"--{flag}: {path} was trained on {trained_on or 'unknown images'}, and --data is "
                        f"{same_data}; --{flag} FILE takes a checkpoint of any images")


def check_out(args):
    """Raise UserError if the run in args.out would replace what it reads, or what it did not write."""
    folder = Path(args.out)
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"--out: {folder} is a link to {folder.readlink()}, which does not exist; make that "
                        "folder, or name another")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; name a folder")
    folder = folder.resolve()
    if args.fresh and Path.cwd().is_relative_to(folder):
        raise UserError(f"--fresh: {args.out} holds the current folder and cannot be renamed; change to "
                        "another folder")
    for flag in INPUTS:
        path = Path(resolve(flag, getattr(args, flag, None)) or "")
        if not path.is_absolute():
            continue
        parts = [path / name for name in ("train", "val", "validation", "images", "annotations")]
        arranged = (path / "train").is_dir() or (path / "images/training").is_dir()
        read = parts if arranged else [path]
        if flag == "data" and any(folder.is_relative_to(part) for part in read):
            raise UserError(f"--out: {args.out} lies in --data {args.data}, and its pictures would be taken "
                            "for images; name a folder outside")
        if path.parent == folder and path.is_file():
            raise UserError(f"--out: {args.out} holds --{flag} {path.name}, which the run would replace; "
                            "name another folder")
        if args.fresh and path.is_relative_to(folder):
            raise UserError(f"--fresh: {args.out} holds --{flag} {path}, and would be renamed; name another "
                            "--out")
    if folder.is_dir() and not (folder / "config.json").exists():
        foreign = sorted(path.name for path in folder.iterdir()
                         if path.suffix in (".pt", ".json", ".jsonl", ".png"))
        if foreign:
            raise UserError(f"--out: {args.out} holds {foreign[0]}, which no run here has written; name "
                            "another folder")


# ---- Opening the folder ----

def open_folder(args, inputs):
    """Make the folder args.out, or check that it holds the run with these flags and inputs.

    Returns whether the run is finished, and the lock of the folder, which ends with the object.
    Raises UserError if it holds another run or other files, or is in use.
    """
    check_out(args)
    folder = Path(args.out).resolve()                                  # if a link, the folder it points to
    file = folder / "config.json"
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"    # by torchrun: continue it
    if args.fresh and file.exists() and not restarted:
        folder_lock = lock(folder)                                     # raises if the run is still going
        new_names = (Path(f"{folder}.old-{n}") for n in itertools.count(1))
        folder.rename(next(name for name in new_names if not name.exists()))
    folder_lock = lock(folder)                                         # of the new folder, if it was renamed
    if not file.exists():
        write_json(file, flags(args))
    record(args, inputs)
    return (folder / "result.json").exists(), folder_lock


def lock(folder):
    """Make the folder if there is none, and lock it for as long as the returned file is open."""
    try:
        import fcntl
    except ImportError:
        raise UserError("--out: this system has no fcntl, which locks the folder of a run; Linux, macOS "
                        "and WSL have it") from None
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"--out: {folder} is in use by another process; name another --out") from None
    except OSError as error:                                           # on some network file systems
        say(f"warning: {folder} cannot be locked ({error.strerror}); start only one run in it")
    return file


def choose_checkpoint(folder):
    """Make last.pt the last intact checkpoint. Returns whether there is one.

    A damaged last.pt is renamed, and previous.pt takes its place. Raises UserError if none is intact.
    """
    last, damaged = folder / "last.pt", []
    for path in (last, folder / "previous.pt"):
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()                             # torch.load skips the checksums
            if broken:
                raise ValueError(f"{broken} fails its checksum")
            torch.load(path, map_location="meta", weights_only=True)["step"]
        except Exception as error:                                     # zipfile and torch raise a dozen kinds
            reason = " ".join(str(error).split())[:200]
            damaged.append(f"{path} is damaged ({type(error).__name__}: {reason})")
            continue
        if damaged:
            say(f"warning: {damaged[0]} and set aside; {path} is used")
            os.replace(last, f"{last}.damaged")
        os.replace(path, last)                                         # does nothing if path is last.pt
        return True
    if damaged:
        raise UserError(f"--out: {' and '.join(damaged)}; restore a backup, or start over with --fresh")
    return False


# ---- Writing a file ----

def write_atomically(path, write, backup=None):
    """Call write(file) on a new file, fsync, and rename it to path, so that path is never half-written.

    backup: new name of the file that was at path. Raises OSError, which reports the free disk space.
    """
    new = Path(f"{path}.part")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:                           # torch.save raises RuntimeError, too
        new.unlink(missing_ok=True)
        free = shutil.disk_usage(Path(path).parent).free / 2 ** 20
        raise OSError(f"{path} could not be written ({error}); {free:,.1f} MiB are free") from None
    if backup and Path(path).exists():
        os.replace(path, backup)
    os.replace(new, path)


def write_json(path, value):
    """Write JSON atomically, with null for numbers that are not finite."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def wait_until_visible(path):
    """Whether a file exists, or appears within 30 s: network file systems show the files of others late."""
    end = time.monotonic() + 30
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return path.exists()
