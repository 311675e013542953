"""Runs that are killed, that find the disk full or failing, at every point: the same command ends with the same bytes.

    python tests/torture.py --kills 100                # kill -9 at random moments, until a run ends; again and again
    python tests/torture.py --writes 0                 # an error at every call that writes, in turn; 20: at 20 of them
    python tests/torture.py --full                     # a file system that is full, grown a little, full again, ...
    make torture                                       # all three

One process loads torch and forks a run at a time. Calls that write are counted, and made to fail, by a small library
that is loaded before all others; it is compiled when it is wanted. Prints one line of JSON.
"""

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from compressed import SOURCES, add_tokenizer, text
from tqdm import tqdm

from halfbit import journal
from halfbit.compress import compress
from halfbit.errors import OutputError
from halfbit.recipe import Recipe

# experts in groups of three, linear layers in another format, the original followed
RECIPE = """
name = "torture"
[[rules]]
match = "*.experts.*"
grid = { name = "deadzone" }
codec = { name = "runlength" }
[[rules]]
match = "*router*"
[[rules]]
match = "*.gate"
[[rules]]
match = "*.[0-9]*.*"
grid = { name = "bilevel", bits = 3, group = 9, supergroup = 3, fitting = "min-max" }
codec = { name = "spqr" }
order = "act_order"
tau = 0.5
[calibration]
samples = 6
sequence_length = 12
[coverage]
undersampled = "shrink"
[solving]
asymmetric = true
experts_per_batch = 3
[tuning]
steps = 0
held_back = 0.2
[gates]
model = false
"""
TUNING = ("steps = 0", "steps = 6")
ENDED, REFUSED = 0, 3

# Counts calls that write below a folder; the n-th fails. `arm(0, ...)` only counts.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long armed = -1, calls = 0;
static int number = 0;
static char folder[PATH_MAX] = "/nowhere";

void torture_arm(long n, int error, const char *under) {
    armed = n, number = error, calls = 0;
    strncpy(folder, under, sizeof folder - 1);
}
long torture_calls(void) { return calls; }

static int fails(const char *path) {
    if (strncmp(path, folder, strlen(folder))) return 0;
    if (++calls != armed) return 0;
    if (getenv("TORTURE_TELLS")) fprintf(stderr, "fails: %s\n", path);
    errno = number;
    return 1;
}
static int fails_at(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return fails(path);
}

#define NEXT(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
ssize_t write(int fd, const void *p, size_t n) { NEXT(write); return fails_at(fd) ? -1 : real(fd, p, n); }
ssize_t writev(int fd, const struct iovec *p, int n) { NEXT(writev); return fails_at(fd) ? -1 : real(fd, p, n); }
int fsync(int fd) { NEXT(fsync); return fails_at(fd) ? -1 : real(fd); }
int ftruncate64(int fd, off64_t n) { NEXT(ftruncate64); return fails_at(fd) ? -1 : real(fd, n); }
int rename(const char *a, const char *b) { NEXT(rename); return fails(b) ? -1 : real(a, b); }
int mkdir(const char *a, mode_t m) {
    static int (*real)(const char *, mode_t);
    if (!real) real = (int (*)(const char *, mode_t))dlsym(RTLD_NEXT, "mkdir");
    return fails(a) ? -1 : real(a, m);
}
#define OPEN(name) int name(const char *path, int flags, ...) {                                   \
    static int (*real)(const char *, int, ...);                                                    \
    if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);                    \
    va_list rest; va_start(rest, flags); const int mode = va_arg(rest, int); va_end(rest);         \
    return (flags & O_CREAT) && fails(path) ? -1 : real(path, flags, mode); }
OPEN(open) OPEN(open64)
"""


class Case:
    """One model and recipe, the files of a run that nothing disturbed, and how long that took."""

    def __init__(self, root: Path, name: str, recipe: str):
        self.root, self.source = root, add_tokenizer(SOURCES[name](root / "source"))
        self.text = text(self.source)
        self.recipe = Recipe.from_toml(recipe)
        self.out = root / "whole"
        # the first run of a process also loads modules
        for _ in range(2):
            shutil.rmtree(self.out, ignore_errors=True)
            begin = time.monotonic()
            assert wait(self.fork(self.out)) == ENDED
            self.seconds = time.monotonic() - begin
        self.files = {p.name: p.read_bytes() for p in self.out.iterdir()}

    def fork(self, out: Path, armed: tuple[int, int] | None = None, counted: Path | None = None) -> int:
        """Begin a run; the process."""
        if child := os.fork():
            return child
        code = 1
        try:
            if armed is not None:
                shim().torture_arm(*armed, os.fsencode(out))
            for _ in compress(str(self.source), out, self.recipe, self.text):
                pass
            if counted is not None:
                calls = shim().torture_calls()
                shim().torture_arm(-1, 0, b"/nowhere")
                counted.write_text(str(calls))
            code = ENDED
        except OutputError as e:
            print(e, file=sys.stderr)
            code = REFUSED
        finally:
            sys.stderr.flush()
            os._exit(code)

    def check(self, out: Path) -> None:
        """The files are those of the undisturbed run, and no others."""
        found = {p.name: p.read_bytes() for p in out.iterdir()}
        if found != self.files:
            different = sorted(n for n in found.keys() | self.files if found.get(n) != self.files.get(n))
            raise SystemExit(f"not identical: {', '.join(different)}")
        shutil.rmtree(out)


def shim() -> ctypes.CDLL:
    """The library that is loaded already."""
    found = ctypes.CDLL(None)
    found.torture_calls.restype = ctypes.c_long
    found.torture_arm.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p]
    return found


def wait(child: int) -> int:
    """The exit status; negative: killed by that signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(case: Case, count: int, seed: int) -> dict:
    """Kill at random moments until `count` runs were killed."""
    some, killed, ended, spent = random.Random(seed), 0, 0, 0.0
    out = case.root / "killed"
    while killed < count:
        begin, child = time.monotonic(), case.fork(out)
        time.sleep(some.uniform(0, case.seconds))
        os.kill(child, signal.SIGKILL)
        code = wait(child)
        spent += time.monotonic() - begin
        if code == -signal.SIGKILL:
            killed += 1
        elif code == ENDED:
            ended += 1
            case.check(out)
        else:
            raise SystemExit(f"exit status {code} of a run that was only killed before")
    begin = time.monotonic()
    code = wait(case.fork(out))
    spent += time.monotonic() - begin
    if code != ENDED:
        raise SystemExit(f"exit status {code} of the last run")
    case.check(out)
    lost = (spent - (ended + 1) * case.seconds) / killed
    return {"kills": killed, "runs": ended + 1, "seconds of a run": case.seconds, "seconds lost per kill": lost}


def writes(case: Case, count: int, seed: int) -> dict:
    """Let calls that write fail, one per run: `count` of them, or every one (0)."""
    out, counted = case.root / "failed", case.root / "calls"
    assert wait(case.fork(out, (0, 0), counted)) == ENDED
    case.check(out)
    calls = int(counted.read_text())
    if calls < 20:
        raise SystemExit(f"only {calls} calls that write were seen; is the library loaded?")
    chosen = sorted(random.Random(seed).sample(range(1, calls + 1), count)) if count else range(1, calls + 1)
    for n in chosen:
        error = (errno.EIO, errno.ENOSPC)[n % 2]
        code = wait(case.fork(out, (n, error)))
        if code != REFUSED:
            raise SystemExit(f"call {n} failed with {errno.errorcode[error]}, and the run ended with {code}")
        if (code := wait(case.fork(out))) != ENDED:
            raise SystemExit(f"after call {n} had failed, the same command ended with {code}")
        case.check(out)
    return {"calls that write": calls, "failed in turn": len(chosen)}


def full(case: Case) -> dict:
    """A file system in memory that has too little room, until it has enough."""
    mounted, room = case.root / "mounted", 32
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs", mounted], check=True)
    refused = 0
    try:
        while (code := wait(case.fork(mounted / "out"))) == REFUSED:
            refused += 1
            room *= 2
            subprocess.run(["mount", "-o", f"remount,size={room}k", mounted], check=True)
        if code != ENDED:
            raise SystemExit(f"exit status {code} where the disk was full")
        case.check(mounted / "out")
    finally:
        subprocess.run(["umount", mounted], check=True)
    return {"times full": refused, "kilobytes at the end": room}


def again(argv: list[str], prefix: list[str], environment: dict[str, str]) -> None:
    """Begin anew with a library loaded first, or inside of a namespace in which file systems can be mounted."""
    os.execvpe(prefix[0] if prefix else sys.executable, [*prefix, sys.executable, *argv], os.environ | environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--writes", type=int, metavar="N", help="0: every one")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--model", default="qwen3-moe", choices=sorted(SOURCES))
    parser.add_argument("--tune", action="store_true", help="the runs are tuned")
    parser.add_argument("--seconds", type=float, default=0.0, help="between two writings of the journal")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.writes is not None and "TORTURE" not in os.environ:
        library = Path(tempfile.mkdtemp()) / "torture.so"
        compiler = os.environ.get("CC", "cc")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-xc", "-", "-o", library, "-ldl"], input=SHIM.encode(), check=True
        )
        again(sys.argv, [], {"LD_PRELOAD": str(library), "TORTURE": "1"})
    if options.full and "TORTURE_MOUNTS" not in os.environ:
        again(sys.argv, ["unshare", "--map-root-user", "--mount"], {"TORTURE_MOUNTS": "1"})
    torch.set_num_threads(1)
    # the one of tqdm is shared with forked processes, and stays locked where one of them is killed with it
    tqdm.set_lock(threading.RLock())
    journal.SECONDS, journal.WORTH = options.seconds, 0.0
    with tempfile.TemporaryDirectory() as root:
        case = Case(Path(root), options.model, RECIPE.replace(*TUNING) if options.tune else RECIPE)
        found: dict = {}
        if options.kills is not None:
            found |= kills(case, options.kills, options.seed)
        if options.writes is not None:
            found |= writes(case, options.writes, options.seed)
        if options.full:
            found |= full(case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
