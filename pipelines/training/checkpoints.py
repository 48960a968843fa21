"""Checkpoints and exports that are complete or absent, whatever moment a process dies at.

runs/<name>/checkpoints/step_00000500/
    ...              what the trainer wrote
    manifest.json    step, samples seen, git, config, data, VAE; sha256 of every file
    COMPLETE         sha256 of manifest.json, written last
No file points to the newest checkpoint: the newest folder that passes every check is it, so there is no pointer to be wrong.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data.core.files import fsync, read_json, remove_leftovers, remove_tree, sha256_of, usual_mode, write_json

log = logging.getLogger(__name__)
EXPORTS = ("vae", "pipeline")  # folders of a run that are replaced as a whole
_SEAL = ("manifest.json", "COMPLETE")
_JUNK = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs.*")  # what systems leave in any folder


class Checkpoints:
    """Folders step_XXXXXXXX, each complete or not there at all.

    A save goes to a hidden folder, is flushed to disk and renamed; only then older ones are deleted (renamed to a
    hidden name first), so at every moment the newest complete checkpoint survives a crash.
    """

    def __init__(self, run_dir: Path, keep: int = 2):
        if keep < 2:
            raise ValueError(
                f"keep_checkpoints={keep}: at least 2, so that a damaged newest one can be replaced"
            )
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.damaged: set[int] = set()  # found so by `latest`

    def steps(self) -> list[int]:
        """Steps of all renamed (hence once complete) checkpoints, ascending."""
        found = []
        for folder in self.folder.glob("step_*"):
            number = folder.name.removeprefix("step_")
            if number.isdigit() and folder.is_dir():
                found.append(int(number))
        return sorted(found)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def manifest(self, step: int) -> dict[str, Any]:
        """What is known about a checkpoint."""
        return read_json(self.path(step) / "manifest.json")

    def clean(self) -> None:
        """Remove what a killed save or deletion left behind. Only the process that owns the run folder may call it."""
        for pattern in (".step_*.tmp", ".step_*.old"):
            for folder in self.folder.glob(pattern):
                remove_tree(folder)

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        info: dict[str, Any],
        accelerator: Any,
        good: int | None = None,
    ) -> Path:
        """Call on every process; `write(folder)` runs on every process, everything else on the main one.

        info: goes into the manifest. good: a checkpoint that stays, however many come after it. Raises OSError that names the path and the bytes needed when the disk is full.
        """
        # Every process sees the same empty folder before it writes into it.
        target, temporary = self.path(step), self.folder / f".step_{step:08d}.tmp"
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        # What the trainer writes; each process its part.
        steps = self.steps()
        usual = folder_bytes(self.path(steps[-1])) if steps else 0
        with writing(temporary, target, usual):
            write(temporary)
        accelerator.wait_for_everyone()
        # Sealed and renamed by the main process, once all have written; only then are older ones removed.
        if accelerator.is_main_process:
            with writing(temporary, target, usual):
                _seal(temporary, {"step": step, **info})
            if target.exists():  # damaged, or the run would have begun after it
                self._remove(step)
            os.replace(temporary, target)
            fsync(self.folder)
            self.damaged.discard(step)
            self._retire(step, good)
        accelerator.wait_for_everyone()
        return target

    def _retire(self, newest: int, good: int | None) -> None:
        """Keep the newest, the `keep` - 1 undamaged ones before it, and `good`.

        Those with a higher number are damaged: they stay for the user to look at.
        """
        older = [s for s in self.steps() if s < newest]
        kept = [s for s in older if s not in self.damaged][1 - self.keep :]
        for step in older:
            if step not in kept and step != good:
                # A file may not be deletable: the new checkpoint is there all the same.
                try:
                    self._remove(step)
                except OSError as error:
                    log.warning("cannot remove the old checkpoint %s: %s", self.path(step), error)

    def _remove(self, step: int) -> None:
        """Under another name first: a deletion cut short is not a checkpoint with missing files."""
        grave = self.folder / f".step_{step:08d}.old"
        remove_tree(grave)
        os.replace(self.path(step), grave)
        remove_tree(grave)

    def set_aside_after(self, step: int) -> None:
        """Rename each undamaged checkpoint after `step` to set_aside_step_XXXXXXXX, where no start looks for it."""
        for later in self.steps():
            if later > step and later not in self.damaged:
                target, number = self.folder / f"set_aside_{self.path(later).name}", 1
                while target.exists():
                    target = target.with_name(f"set_aside_{number}_{self.path(later).name}")
                    number += 1
                os.replace(self.path(later), target)
                log.info("passed over, it lies in %s: remove it when you have looked at it", target)

    def damage(self, step: int) -> str:
        """ "" when every file is as it was written, else what is wrong with the first that is not."""
        # The manifest is the one that was sealed.
        folder = self.path(step)
        try:
            manifest = (folder / "manifest.json").read_bytes()
            if (folder / "COMPLETE").read_text() != hashlib.sha256(manifest).hexdigest():
                return "manifest.json: sha256 differs from COMPLETE"
            digests = dict(json.loads(manifest)["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"manifest.json or COMPLETE: {error}"
        # Names are looked for among the files that are there: one that points elsewhere is simply missing.
        try:
            there = set()
            for path in folder.rglob("*"):
                if path.is_file() and not _JUNK.fullmatch(path.name):
                    there.add(path.relative_to(folder).as_posix())
            for name in sorted(digests.keys() ^ (there - {*_SEAL})):
                return f"{name}: {'missing' if name in digests else 'not in the manifest'}"
            for name, digest in digests.items():
                if sha256_of(folder / name) != digest:
                    return f"{name}: sha256 differs from the manifest"
        except OSError as error:
            return f"cannot be read: {error}"
        return ""

    def latest(self, healthy: bool = False) -> int | None:
        """Step of the newest undamaged checkpoint, None when there are none; each damaged one is named in the log.

        healthy: not one that was saved in a row of skipped updates, None if all were; rather not the one right before
        such a row.
        Raises ValueError when there are checkpoints and all are damaged: to begin again is the user's decision.
        """
        # From the newest back, until one passes.
        steps, first_bad, before = self.steps(), math.inf, None
        for step in reversed(steps):
            damage = self.damage(step)
            # `sick`: how many updates before this checkpoint had been skipped; the row began that far back.
            if not damage:
                sick = self.manifest(step).get("skipped_in_row", 0) if healthy else 0
                first_bad = min(first_bad, step - sick) if sick else first_bad
                if not healthy or (not sick and step < first_bad):
                    return step
                if not sick and before is None:
                    before = step
                continue
            self.damaged.add(step)
            log.warning(
                "checkpoint %s is damaged (%s): falling back to an older one", self.path(step), damage
            )
        if steps and len(self.damaged) == len(steps):
            raise ValueError(
                f"all checkpoints in {self.folder} are damaged; restore one, or choose another run_dir to begin again"
            )
        return before


def _seal(folder: Path, info: dict[str, Any]) -> None:
    # Every file is on the disk, with its digest, before the seal is.
    digests = {}
    for path in sorted(folder.rglob("*")):
        usual_mode(path)
        fsync(path)
        if path.is_file():
            digests[path.relative_to(folder).as_posix()] = sha256_of(path)
    # The seal itself: COMPLETE is written last, and says which manifest it belongs to.
    write_json(folder / "manifest.json", {**info, "files": digests})
    (folder / "COMPLETE").write_text(sha256_of(folder / "manifest.json"))
    fsync(folder / "COMPLETE")
    fsync(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@contextlib.contextmanager
def writing(temporary: Path, target: Path, usual: int = 0) -> Iterator[None]:
    """Whatever a library raises when a file cannot be written becomes one OSError; the temporary folder goes.

    On a full disk torch raises a RuntimeError that says nothing about space, safetensors an error of its own. An error of
    the device that the tensors come from is not one of writing and stays what it is.
    usual: bytes that such a folder takes, 0 when there has been none yet.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        written = folder_bytes(temporary)
        # An error of the device is not one of writing.
        if isinstance(error, RuntimeError) and "CUDA" in str(error):
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        # What is needed, and what there is.
        shutil.rmtree(temporary, ignore_errors=True)
        need = f"about {usual:,}" if usual > written else f"more than {written:,}"
        free = shutil.disk_usage(target.parent).free
        raise OSError(
            f"cannot write {target}: {getattr(error, 'strerror', None) or error}; it needs {need} bytes, {free:,} are free; "
            "what was there before is untouched"
        ) from error


def export_folder(
    target: Path, write: Callable[[Path], None], info: dict[str, Any], trained: bool = False
) -> bool:
    """Let `write` fill a folder and put it in the place of `target` as a whole; False if that was done before.

    info: {"step": ..., ...}, stored as export.json. A folder that this step has filled already stays as it is, for another
    program may have added to it, unless `trained`: this start made the step, so what is there is older.
    """
    # Done before, by this very step, and still whole?
    record = target / "export.json"
    if record.is_file():
        try:
            done = read_json(record, "step")
        except ValueError as error:
            log.warning("%s: made again", error)
        else:
            if not trained and done["step"] == info["step"] and _is_whole(target, done.get("files")):
                return False

    def write_all(temporary: Path) -> None:
        write(temporary)
        sizes = {}
        for path in temporary.rglob("*"):
            if path.is_file():
                sizes[path.relative_to(temporary).as_posix()] = path.stat().st_size
        write_json(temporary / "export.json", {**info, "files": sizes})

    replace_folder(target, write_all)
    return True


def _is_whole(folder: Path, files: dict[str, int] | None) -> bool:
    """Whether an export has its files: settings may have been added to (by hand too), weights are as large as they were.

    files: name and bytes of each; None in older exports, which did not note them and must have weights.
    """
    if not isinstance(files, dict):
        return any(folder.rglob("*.safetensors"))
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or (path.suffix != ".json" and path.stat().st_size != size):
            return False
    return True


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder and put it in the place of `target`, which may be absent, as a whole."""
    # Filled and flushed beside its place.
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(temporary, target, folder_bytes(target)):
        write(temporary)
        for path in temporary.rglob("*"):
            usual_mode(path)
            fsync(path)
    # Renamed; between the two renames the old folder has another name, see `recover`.
    remove_tree(old)
    if target.exists() or target.is_symlink():
        os.replace(target, old)
    os.replace(temporary, target)
    fsync(target.parent)
    with contextlib.suppress(OSError):
        remove_tree(old)


def recover(run_dir: Path) -> None:
    """Undo what a killed process left half done in a run's folder; only the process that owns the folder may call it.

    An export killed between its two renames gets its old content back; its temporary folders and our hidden files go.
    """
    # An export that was between its two renames, and what belongs to no export.
    for name in EXPORTS:
        old, target = run_dir / f".{name}.old", run_dir / name
        if old.is_dir() and not target.exists():
            os.replace(old, target)
        for left in (old, run_dir / f".{name}.tmp"):
            remove_tree(left)
    for folder in (run_dir, run_dir / "media"):
        remove_leftovers(folder)
