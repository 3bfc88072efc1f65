"""Import what the stages import of a layer's packages: a broken one ends the build, and the bytecode is kept.

python imports.py LAYER    torch, train, dense or mlflow
"""

import compileall
import importlib
import sys
import sysconfig
from pathlib import Path

MODULES = {
    "torch": ("torch", "torchvision", "torch.optim", "torch.nn.parallel", "torch.distributed.run"),
    "train": (
        "timm.optim", "safetensors.torch", "numba", "sklearn.datasets", "skimage.data", "scipy.ndimage",
        "matplotlib.pyplot", "pandas", "pyarrow.parquet", "boto3", "kubernetes", "dvc.cli",
        "dvc.commands.get", "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store", "mlflow.pyfunc",
        "mlflow.system_metrics.system_metrics_monitor",
    ),
    "dense": ("cv2", "pycocotools.mask", "faster_coco_eval"),
    "mlflow": ("mlflow.server", "mlflow.server.auth", "mlflow.store.tracking.sqlalchemy_store", "psycopg"),
}  # fmt: skip
# Imported by vitpipe in its own order, so that only some of their modules are loaded (dense/mm_import.py).
COMPILED = {"dense": ("mmcv", "mmengine", "mmdet", "mmseg")}

layer = sys.argv[1]
for module in MODULES[layer]:
    importlib.import_module(module)
for package in COMPILED.get(layer, ()):
    compileall.compile_dir(Path(sysconfig.get_paths()["purelib"]) / package, quiet=2)
if layer == "torch":
    import torch

    print("torch", torch.__version__, "CUDA", torch.version.cuda)
