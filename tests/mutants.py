"""Small bugs planted in the library, each of which the tests of its module must catch.

    python tests/mutants.py                    # all of them, one after another
    python tests/mutants.py metrics rerun      # those of some modules
    python tests/mutants.py --jobs 2           # several at once

A mutant is a module, a piece of its text, what stands there instead, and the bug that this makes: a
wrong sign, another axis, an off-by-one, a missing square root, a stale cache, swapped arguments. It
is applied to a copy of the tree, and the fast tests of the module run there until the first one
fails. A mutant that no test catches is listed, and the program exits with 1: a test is missing, or
the edit changes nothing that anyone could see. Run it before and after tests are cut.

Source: DeMillo, Lipton & Sayward 1978 (mutation testing)
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # the most that the tests of one mutant may take; a bug that hangs is a bug found


@dataclass(frozen=True)
class Mutant:
    """One planted bug. tests: the names of the test files, without "test_"; the module's unless
    given."""

    module: str
    old: str
    new: str
    bug: str
    tests: tuple = ()

    def apply(self, root):
        """Edits the module in a copy of the tree. Raises ValueError where the text is not there
        exactly once: the code has changed, and the mutant must follow it."""
        path = root / f"{self.module}.py"
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.module}: {self.old!r} is there {text.count(self.old)} times")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")

    def test_files(self):
        """The paths of the tests that must catch it."""
        return [f"tests/test_{name}.py" for name in self.tests or (self.module,)]


MUTANTS = []


def is_caught(mutant):
    """Whether a test fails in a copy of the tree that has this bug."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        leave_out = shutil.ignore_patterns(".git", ".venv", "outputs", "data", "__pycache__")
        shutil.copytree(ROOT, root, ignore=leave_out)
        mutant.apply(root)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                   *mutant.test_files()]
        try:
            ran = subprocess.run(command, cwd=root, capture_output=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return True
    if ran.returncode not in (0, 1, 2):  # 2: the module can't even be imported
        raise RuntimeError(f"pytest itself failed for {mutant.bug}: {ran.stdout[-500:]!r}")
    return ran.returncode != 0


def main():
    """Plants the mutants, prints a line for each, and exits with 1 where one is not caught."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", help="whose mutants to plant (none: all)")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once (default: 1)")
    args = parser.parse_args()
    chosen = [each for each in MUTANTS if not args.modules or each.module in args.modules]

    survivors = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, caught in zip(chosen, pool.map(is_caught, chosen), strict=True):
            print(f"{'caught' if caught else 'ALIVE '}  {mutant.module}: {mutant.bug}", flush=True)
            if not caught:
                survivors.append(mutant)

    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants are caught")
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
