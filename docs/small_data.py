"""Learning from few images with and without drloc: 80 short trainings, a table and a figure.

    .venv/bin/python docs/small_data.py build/small_data           # about 45 minutes on two free cores
    .venv/bin/python docs/small_data.py build/small_data --seeds 1 --images 50 --backbones swin    # a look

The 1,797 scans of scikit-learn's handwritten digits: every fourth of a digit is a test image (454), on which
nothing is trained or chosen; of the 1,343 others 50, 100, 200 or all are trained on, from random weights. A
training has 600 steps of 32 images. Finished ones are kept: the same command goes on where it was ended.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
IMAGES = ("50", "100", "200", "1343")
BACKBONES = {"swin": "Swin nano", "vit": "ViT nano"}
LOSSES = ("baseline", "drloc")


def write_scans(root: Path) -> None:
    """The scans as PNG files of 64 pixels, in class folders below `root`/digit_scans."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    for digit in range(10):
        scans = found.images[found.target == digit]
        for number, scan in enumerate(scans):
            split = "val" if number % 4 == 0 else "train"
            path = root / "digit_scans" / split / f"digit_{digit}" / f"scan_{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray(np.round(scan * 255 / 16).astype(np.uint8))
            grey.resize((64, 64), Image.Resampling.BICUBIC).convert("RGB").save(path)


def run_stage(stage: str, recipe: str, out: Path, root: Path, *more: str) -> None:
    """One stage in a process of its own, with one thread."""
    if (out / "metrics.json").is_file():
        return
    command = [
        sys.executable, "-m", "vitpipe", "run", stage, "--recipe", f"{HERE / 'small_data.yaml'}/{recipe}",
        "--profile", "full", "--params", os.devnull, "--out", str(out), "--set", f"data.root={root}", *more,
    ]  # fmt: skip
    # Of its own, so that trainings at the same time never wait for one database.
    store = f"sqlite:///{out.parent}/{out.name}.mlflow.db"
    settings = {**os.environ, "MLFLOW_TRACKING_URI": store, "OMP_NUM_THREADS": "1"}
    out.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    print(out.name, flush=True)


def accuracies(folder: Path, args: argparse.Namespace) -> dict[tuple[str, str, str], list[float]]:
    """Top-1 in percent of every seed, by backbone, loss and number of images."""
    root = (folder / "raw").resolve()
    if not (root / "digit_scans").is_dir():
        write_scans(root)
    prepared = folder / "prepare"
    run_stage("prepare", "swin/baseline/50", prepared, root)
    cells = [(b, loss, n) for n in args.images for b in args.backbones for loss in LOSSES]
    jobs = {
        (*cell, seed): folder / f"{'-'.join(cell)}-seed{seed}" for seed in range(args.seeds) for cell in cells
    }

    def train(job: tuple[str, str, str, int]) -> None:
        recipe, seed = "/".join(job[:3]), f"seed={job[3]}"
        run_stage("finetune", recipe, jobs[job], root, "--in", f"data={prepared}", "--set", seed)

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(train, jobs))
    found: dict[tuple[str, str, str], list[float]] = {}
    for (*cell, _), out in jobs.items():
        top1 = json.loads((out / "metrics.json").read_text())["top1"]
        found.setdefault(tuple(cell), []).append(100 * top1)
    return found


def write_table(found: dict[tuple[str, str, str], list[float]], path: Path) -> None:
    """One row per cell: mean, standard deviation and every seed; printed, too."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("backbone", "loss", "images", "mean", "sd", "seeds"))
        for cell, values in found.items():
            sd = statistics.stdev(values) if len(values) > 1 else 0.0
            each = " ".join(f"{value:.1f}" for value in values)
            rows.writerow((*cell, f"{statistics.mean(values):.1f}", f"{sd:.1f}", each))
    print(path.read_text())


def draw(found: dict[tuple[str, str, str], list[float]], path: Path) -> None:
    """Accuracy by number of training images, a panel per backbone; bars are standard deviations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    backbones = list(dict.fromkeys(cell[0] for cell in found))
    figure, panels = plt.subplots(1, len(backbones), figsize=(4 * len(backbones), 3), squeeze=False)
    for panel, backbone in zip(panels[0], backbones, strict=True):
        for loss in LOSSES:
            points = {int(n): v for (b, kind, n), v in found.items() if (b, kind) == (backbone, loss)}
            means = [statistics.mean(values) for values in points.values()]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in points.values()]
            name = "cross entropy" if loss == "baseline" else "+ drloc"
            panel.errorbar(list(points), means, yerr=spread, marker="o", capsize=3, label=name)
        panel.set_xscale("log")
        panel.set_xticks([int(n) for n in IMAGES], labels=IMAGES)
        panel.minorticks_off()
        panel.set(xlabel="training images", ylabel="top-1, %", title=BACKBONES[backbone])
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run what is missing, then write table.csv and curve.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", nargs="+", choices=IMAGES, default=IMAGES)
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    folder = args.folder.resolve()
    found = accuracies(folder, args)
    write_table(found, folder / "table.csv")
    draw(found, folder / "curve.png")


if __name__ == "__main__":
    main()
