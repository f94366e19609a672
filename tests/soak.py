"""Pre-training that is stopped at random by SIGTERM, SIGINT and SIGKILL and continued at once, for as long as one likes:

    python tests/soak.py --minutes 30
A finished run makes room for a new one. What is watched: that each logged step is there once and has the loss it had before
the interruption; and, of all processes of a run, resident memory, descriptors, threads, and what they leave behind in memory
files, in the folder for temporary files and in the process table. Exit status 1 if anything was lost, left behind or grew.
"""
import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
GRACE = 20    # seconds in which a loader's worker must have noticed that its parent was killed; it looks every five


def stat(pid):
    """(parent, threads, start time, resident MB, open files) of a living process, or None."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else (int(fields[1]), int(fields[17]), int(fields[19]), int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20, len(os.listdir(f"/proc/{pid}/fd")))
    except (OSError, IndexError):
        return None


def tree(root):
    """pid -> stat of a process and all below it."""
    every = {int(name): found for name in os.listdir("/proc") if name.isdigit() and (found := stat(name))}
    below, more = {}, [root]
    while more:
        below.update({pid: every[pid] for pid in more if pid in every})
        more = [pid for pid, (parent, *_) in every.items() if parent in more and pid not in below]
    return below


def losses(folder):
    """[(step, loss)] of a log, without a last line that was cut off."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, default=2000, help="of each run (2000)")
    parser.add_argument("--longest", type=float, default=40, help="seconds until the next signal, at most (40)")
    parser.add_argument("--seed", type=int, default=0, help="of signals and their times (0)")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a temporary one, removed at the end if all is well")
    args = parser.parse_args()

    out, rng = args.out or Path(tempfile.mkdtemp(prefix="soak-")), random.Random(args.seed)
    (out / "tmp").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(out / "tmp"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, ROOT / "dvae.py", "--out", out / "tokenizer", "--steps", "20", "--image-size", "16", "--vocab-size", "64", "--hidden", "8"],
                   env=environment, check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, str(ROOT / "pretrain.py"), "--tokenizer", str(out / "tokenizer/model.pt"), "--steps", str(args.steps), "--save-every", "20",
               "--workers", "2", "--image-size", "32", "--dim", "32", "--depth", "2", "--heads", "2", "--batch-size", "16", "--out"]
    began, finished, failures, samples, seen, known, sent = time.time(), 0, [], [], {}, {}, dict.fromkeys(SIGNALS, 0)
    while time.time() < began + 60 * args.minutes:
        folder = out / f"run-{finished}"
        process = subprocess.Popen([*command, str(folder)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        born, number, until = time.time(), rng.choice(SIGNALS), min(time.time() + rng.uniform(4, args.longest), began + 60 * args.minutes)
        while process.poll() is None and time.time() < until:
            below = tree(process.pid)
            seen.update({pid: (found[2], time.time()) for pid, found in below.items()})
            shm = sum(any(str(pid) in name for pid in below) for name in os.listdir("/dev/shm"))
            samples.append((time.time() - began, time.time() - born, sum(found[3] for found in below.values()), len(below),
                            sum(found[4] for found in below.values()), sum(found[1] for found in below.values()), shm, len(os.listdir(out / "tmp"))))
            time.sleep(2)
        if told := process.poll() is None:
            training = (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_mtime > born
            process.send_signal(number)
            sent[number] += 1
        try:
            error = process.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:               # Python can lose a signal that comes while it imports, not later
            failures += [f"{number.name} was ignored after {time.time() - born - 60:.0f} s"] if training else []
            process.send_signal(number)
            error = process.communicate(timeout=60)[1]
        early = told and number == signal.SIGINT and process.returncode in (1, 130) and "KeyboardInterrupt" in error    # while importing
        if process.returncode not in ((-number, 0) if told else (0,)) and not early:
            failures.append(f"exit status {process.returncode} after {time.time() - born:.0f} s: {error.strip()[-300:]}")
        logged = losses(folder)
        if [step for step, _ in logged] != list(range(1, len(logged) + 1)):
            failures.append(f"{folder.name}: the log has gaps or repeats, {[step for step, _ in logged][:2000]}")
        changed = [step for step, loss in logged if known.setdefault(step, loss) != loss]    # the seed is the same for all runs
        failures += [f"{folder.name}: step {changed[0]} and {len(changed) - 1} more have another loss than before"] if changed else []
        if (folder / "result.json").exists():
            failures += [f"{folder.name}: {len(logged)} of {args.steps} steps are logged"] if len(logged) != args.steps else []
            finished += 1
            shutil.rmtree(folder)
    while time.time() < max(when for _, when in seen.values()) + GRACE and any((stat(pid) or [0] * 3)[2] == start for pid, (start, _) in seen.items()):
        time.sleep(1)
    leaked = {"processes": [pid for pid, (start, _) in seen.items() if (stat(pid) or [0] * 3)[2] == start], "temporary files": [name for name in os.listdir(out / "tmp") if not name.startswith("torchinductor_")],    # a cache
              "/dev/shm": [name for name in os.listdir("/dev/shm") if any(f"_{pid}_" in name for pid in seen)]}
    failures += [f"{len(names)} {kind} left behind: {names[:5]}" for kind, names in leaked.items() if names]

    print(f"{sum(sent.values())} restarts ({', '.join(f'{number.name} {count}' for number, count in sent.items())}), {finished} finished runs of {args.steps} steps, {len(samples)} samples")
    print(f"{'at most, all processes of a run':34}" + "  ".join(f"{name} {max(s[at] for s in samples):g}" for name, at in (("processes", 3), ("descriptors", 4), ("threads", 5), ("/dev/shm", 6), ("temporary", 7))))
    end, thirds = samples[-1][0], {}
    for name, low, high in (("first third", 0, end / 3), ("last third", 2 * end / 3, end)):
        third = [s for s in samples if low <= s[0] <= high and s[1] > 10]    # after start-up
        thirds[name] = {age: [s[2] for s in third if s[1] // 5 == age] for age in {s[1] // 5 for s in third}}
        if every := [s[2] for s in third]:
            print(f"resident memory, {name:17}median {statistics.median(every):.0f} MB, most {max(every):.0f} MB")
    early, late = thirds.values()
    ratios = [statistics.median(late[age]) / statistics.median(early[age]) for age in early.keys() & late.keys()]
    growth = statistics.median(ratios) - 1 if ratios else 0.0
    print(f"growth from the first third to the last, at equal age of the process: {growth:+.1%} over {len(ratios)} ages")
    failures += [f"memory grew by {growth:.1%}"] if growth >= 0.05 else []
    print("\n".join(failures) or "nothing lost, nothing left behind, no growth")
    if not failures and not args.out:
        shutil.rmtree(out)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
