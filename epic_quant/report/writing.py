"""Files into a folder, each whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from epic_quant.errors import ReportError


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write every text beside its place, then rename all; the folder is made where it is not there.

    Raises ReportError where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as beside:
            for name, text in files.items():
                Path(beside, name).write_text(text, encoding="utf-8", newline="\n")
            for name in files:
                os.replace(Path(beside, name), folder / name)
    except OSError as error:
        raise ReportError(f"{folder}: cannot be written: {error.strerror}") from error
