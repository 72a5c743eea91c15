"""The machine under a benchmark: its description, and the plain speed of its disk."""

import ctypes
import gc
import os
import platform
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from activations.disk import aligned_buffer

__all__ = ["PeakMemory", "describe_machine", "drop_from_cache", "raw_read_bandwidth", "raw_write_bandwidth"]

PACKAGES = ("scope-workbench", "torch", "transformers", "transformer-lens", "sae-lens", "zarr", "numpy")
FILE_BYTES = 2**27
PIECE_BYTES = 2**23
DISK_FILES = 16


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Card or processor, memory and versions, JSON-able."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class PeakMemory:
    """The most memory that is held on a device from now on.

    Of a GPU it is all that torch has allocated there. Of a CPU it is what the process holds beside what it held at the
    beginning, as Linux counts it (VmHWM, which is set back here); elsewhere it is not known.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        elif platform.system() == "Linux":
            give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: what was freed goes to the system
            if give_back is not None:
                give_back(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident("VmRSS")

    def bytes(self) -> int | None:
        """So far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _resident("VmHWM") - self._before if platform.system() == "Linux" else None


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def raw_write_bandwidth(folder: Path, n_files: int = DISK_FILES) -> float:
    """Bytes a second to new files of 128 MiB with fsync: the best of direct and ordinary writes, by 1, 2 and 4 threads.
    Nothing of the store's code takes part."""
    content = aligned_buffer(FILE_BYTES)
    content[:] = np.random.default_rng(0).integers(0, 256, FILE_BYTES, np.uint8)
    target = folder / "raw-write"
    target.mkdir(parents=True)
    try:
        rates = []
        for direct in (True, False):
            for threads in (1, 2, 4):
                started = time.perf_counter()
                with ThreadPoolExecutor(threads) as pool:
                    for done in [pool.submit(_write_file, target / str(i), content, direct) for i in range(n_files)]:
                        done.result()
                rates.append(n_files * FILE_BYTES / (time.perf_counter() - started))
        return max(rates)
    finally:
        shutil.rmtree(target)


def _write_file(path: Path, content: np.ndarray, direct: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        descriptor = os.open(path, flags | (getattr(os, "O_DIRECT", 0) if direct else 0), 0o666)
    except OSError:  # a file system without direct access
        descriptor = os.open(path, flags, 0o666)
    try:
        for start in range(0, FILE_BYTES, PIECE_BYTES):
            os.pwrite(descriptor, content.data[start : start + PIECE_BYTES], start)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def raw_read_bandwidth(files: list[Path], threads: int = 1) -> float:
    """Bytes a second from these files, which are dropped from the page cache first; pieces of 8 MiB, ordinary reads."""
    drop_from_cache(files)
    buffers = [aligned_buffer(PIECE_BYTES) for _ in range(threads)]
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        parts = [pool.submit(partial(_read_files, files[i::threads], buffers[i])) for i in range(threads)]
        n_bytes = sum(part.result() for part in parts)
    return n_bytes / (time.perf_counter() - started)


def _read_files(files: list[Path], buffer: np.ndarray) -> int:
    total = 0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer.data):
                total += count
    return total


def drop_from_cache(files: list[Path]) -> None:
    """Make the system forget what it holds of these files, as far as it does that for everybody."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
