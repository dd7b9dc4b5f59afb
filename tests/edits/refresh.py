"""Remake the patches of this folder after a change of a script.

This looks for the newest version of the script, in the working tree or in a commit, to which the
patch applies, and merges the edit into the script of the working tree. If that has changed on the
same lines, the patch stays as it is and has to be remade by hand.
"""

import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = {path.stem: path for path in (ROOT / "tests" / "edits").glob("*.patch")}
OLD_PATCHES = {name: path.read_text() for name, path in PATHS.items()}


def git(*command, folder=ROOT, text=None):
    return subprocess.run(["git", *command], cwd=folder, input=text, capture_output=True, text=True)


def apply(patch, name, text):
    """The text of the script `name` with a patch, or None if the patch does not apply."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_text(text or "")
        failed = git("apply", folder=folder, text=patch).returncode
        return None if failed else Path(folder, name).read_text()


def refresh(path):
    about, script, _ = re.split(r"--- a/(\S+)", path.read_text())
    today = (ROOT / script).read_text()
    commits = git("log", "--format=%H", "--", script).stdout.split()
    versions = [today, *(git("show", f"{commit}:{script}").stdout for commit in commits)]
    for earlier in re.findall(r"after (\w+)\.patch", about):
        today = apply(PATHS[earlier].read_text(), script, today)
        versions = [apply(OLD_PATCHES[earlier], script, text) for text in versions]
    edits = ((text, apply(OLD_PATCHES[path.stem], script, text)) for text in versions)
    before, after = next((edit for edit in edits if edit[1]), (None, None))
    if today is None or after is None:
        return "remake it by hand"
    with tempfile.TemporaryDirectory() as folder:
        for side, text in {"a": today, "b": today, "before": before, "after": after}.items():
            Path(folder, side).mkdir()
            Path(folder, side, script).write_text(text)
        merge = [f"{side}/{script}" for side in ("b", "before", "after")]
        if git("merge-file", *merge, folder=folder).returncode:
            return "remake it by hand"
        diff = git("diff", "--no-index", "--no-prefix", f"a/{script}", f"b/{script}", folder=folder)
    path.write_text(about + diff.stdout[diff.stdout.index("--- a/") :])
    return "done"


if __name__ == "__main__":
    for name in sorted(PATHS, key=lambda name: ("after rlhf.patch" in OLD_PATCHES[name], name)):
        print(f"{name}: {refresh(PATHS[name])}")
