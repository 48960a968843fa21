"""Videos that cannot be read any more while a training runs: listed, counted, and too many of them end the run."""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from data.core.files import append_line, escaped, printable

log = logging.getLogger(__name__)


class Quarantine:
    """What the samples of the stream say about videos that another one had to stand in for.

    Counted since this start of the program: the next start scans the videos again.
    """

    def __init__(self, run_dir: Path, stream: Any, max_share: float, accelerator: Any):
        """stream: endless clips; len(stream) videos. max_share: of them that may fail, in [0, 1]."""
        self.file, self.videos, self.max_share = run_dir / "quarantine.tsv", len(stream), max_share
        self.accelerator = accelerator
        self.reasons: dict[str, str] = {}
        self._new: dict[str, str] = {}

    def record(self, batch: dict[str, Any]) -> None:
        """Take the names out of a batch of VideoClips; nothing is written yet."""
        for text in filter(None, batch["passed_over"]):
            for name, reason in json.loads(text).items():
                if name not in self.reasons:
                    self._new[name] = reason

    def check(self) -> None:
        """List what is new in quarantine.tsv; ValueError when more than max_share have failed. Called by every process."""
        # What each process has met since the last call.
        tables = [self._new]
        if self.accelerator.num_processes > 1:
            tables = gather_object(tables)
        self._new = {}
        # A video that two processes met counts once.
        for table in tables:
            for name, reason in table.items():
                if name not in self.reasons:
                    self.reasons[name] = reason
                    self._write(name, reason)
        # Too many: a disk that is gone, not a few broken files.
        share = len(self.reasons) / self.videos
        if share > self.max_share:
            name, reason = next(iter(self.reasons.items()))
            raise ValueError(
                f"{len(self.reasons)} of {self.videos} videos ({share:.1%}) cannot be read any more, e.g. {name}: {reason}; "
                f"see {self.file}; bring them back, or allow more with source.max_failed_share={min(1.0, 2 * share):.2g}"
            )

    def _write(self, name: str, reason: str) -> None:
        if not self.accelerator.is_main_process:
            return
        log.warning("video %s cannot be read any more (%s): others stand in for it", printable(name), reason)
        try:
            append_line(self.file, f"{escaped(name)}\t{' '.join(reason.split())}")
        except OSError as error:
            log.warning("cannot add to %s: %s", self.file, error)
