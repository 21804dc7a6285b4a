"""Folders of images that the program renders itself: replaced if their settings change, and never other files."""

import json
import os
from pathlib import Path
from typing import Any, Dict, Optional

SETTINGS_FILE = "dataset.json"


def is_rendered(out: str, settings: Dict[str, Any]) -> bool:
    """Return whether a folder holds the set with these settings; ValueError if it holds something else."""
    target = Path(os.path.realpath(out))
    if target.exists() and not target.is_dir():
        raise ValueError(f"--out {out} is a file: it should be a folder")
    found = _read_settings(target, settings["drawn_by"])
    if found is None and target.is_dir() and any(target.iterdir()):
        expected = f"empty, new, or a set drawn by {settings['drawn_by']}"
        raise ValueError(f"--out {out} holds other files: it should be {expected}")
    return found == settings


def write_settings(folder: Path, settings: Dict[str, Any]) -> None:
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _read_settings(folder: Path, drawn_by: str) -> Optional[Dict[str, Any]]:
    """Return the settings of a finished set; None for any other folder."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and settings.get("drawn_by") == drawn_by else None
