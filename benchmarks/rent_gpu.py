"""`python -m benchmarks.gpu` on a rented GPU of Modal: `modal run benchmarks/rent_gpu.py`.

    pip install modal && modal setup
    modal run benchmarks/rent_gpu.py                     an H100
    DPO_GPU=A100-80GB modal run benchmarks/rent_gpu.py   another one

The image holds a CUDA toolkit, torch, the peers and this checkout with its history, so that rows
name their commit. Rows and logs come back to runs/gpu/<GPU>. Not run by any test: it costs money.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import modal

ROOT = Path(__file__).resolve().parent.parent
REMOTE, OUT = "/root/dpo_kernels", "/root/rows"
GPU = os.environ.get("DPO_GPU", "H100")
BUDGET_S = 20 * 60
TOOLKIT = "nvidia/cuda:13.0.1-devel-ubuntu24.04"
PACKAGES = ("torch", "triton", "numpy", "pybind11>=2.13", "setuptools>=77", "ninja", "rich")
PACKAGES += ("matplotlib", "pytest", "hypothesis", "trl", "liger-kernel", "cut-cross-entropy")
LEFT_HERE = (".venv*", "build", "runs", "**/*.so", "**/__pycache__")

app = modal.App("dpo-kernels-benchmarks")
image = (
    modal.Image.from_registry(TOOLKIT, add_python="3.12")
    .apt_install("git", "g++")
    .pip_install(*PACKAGES)
    .add_local_dir(ROOT, REMOTE, ignore=list(LEFT_HERE))
)


@app.function(image=image, gpu=GPU, timeout=BUDGET_S + 300, cpu=8, memory=64 * 1024)
def measure() -> tuple[int, dict[str, bytes]]:
    """(exit status, the files it wrote)."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", OUT, "--budget", str(BUDGET_S)]
    status = subprocess.run(command, cwd=REMOTE, check=False).returncode
    return status, {path.name: path.read_bytes() for path in Path(OUT).glob("*") if path.is_file()}


@app.local_entrypoint()
def main() -> None:
    status, files = measure.remote()
    folder = ROOT / "runs" / "gpu" / GPU.lower().replace(":", "_")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    print(f"exit {status}; {len(files)} files in {folder}")
    rows = [str(path) for path in folder.glob("*.csv")]
    subprocess.run([sys.executable, "-m", "benchmarks.check_rows", *rows], cwd=ROOT, check=False)
