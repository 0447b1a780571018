"""The image's recipe: clean, and nothing in it that is not named by its hash."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from manifests import K8S
from support import ROOT


def test_the_image_has_a_clean_recipe_and_setup_cfgs_ranges():
    if (hadolint := shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")) is None:
        pytest.skip("hadolint is not installed: pip install 'fedray[test]'")
    done = subprocess.run([hadolint, str(K8S / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout, done.stdout
    text = (K8S / "Dockerfile").read_text()
    assert not re.search(r"torch[<>=]", text)  # the range is read from setup.cfg
    assert "USER 1000:1000" in text


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_images_install_steps_work_in_a_new_environment(tmp_path):
    """Every RUN that installs, with the Dockerfile's own words, in a virtual environment of its own."""
    text = (K8S / "Dockerfile").read_text().replace("\\\n", " ")
    runs = [line.removeprefix("RUN ") for line in text.splitlines() if line.startswith("RUN ")]
    steps = [r.split("&& useradd")[0] for r in runs if "pip install" in r or "fedray methods" in r]
    assert len(steps) == 3
    venv, work = tmp_path / "venv", tmp_path / "opt"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    for line in text.splitlines():
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for source in sources:
                to = work / target / (source if target in ("./", ".") else "")
                to.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, to)
    import torch

    pinned = tmp_path / "constraints.txt"
    pinned.write_text(f"torch=={torch.__version__.split('+')[0]}\n")  # gigabytes of CUDA else
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "PIP_CONSTRAINT": str(pinned),
        "HOME": str(tmp_path),
    }
    index = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True, check=False
    ).stdout.strip()
    env["TORCH_INDEX"] = index or "https://pypi.org/simple"
    for step in steps:
        step = step.replace("/tmp/torch.txt", str(tmp_path / "torch.txt"))
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", step],
            cwd=work,
            env=env,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{step}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    for extra in ("optuna", "mlflow", "wandb"):
        assert list(venv.glob(f"lib/python3*/site-packages/{extra}")), extra
