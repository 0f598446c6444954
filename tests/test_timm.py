"""The tests of timm_models.py, in a process of their own: an installed torchvision changes what transformers imports.

`make setup` puts timm and torchvision into .venv/timm, beside the packages of the other tests.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = Path(sys.prefix) / "timm"


def test_timm_models():
    if not PACKAGES.is_dir():
        pytest.skip(f"no timm in {PACKAGES}; make setup puts it there")
    tests = Path(__file__).with_name("timm_models.py")
    path = [str(PACKAGES), str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    options = ["-p", "foreign_torchvision", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(tests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= tests.read_text().count("\ndef test_")
    assert "skipped" not in done.stdout
