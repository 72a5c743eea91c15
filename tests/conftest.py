"""Shared fixtures: no network, run-time shape checks, and the demo's workspace made once a run."""

import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PIP_NO_INDEX"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import jaxtyping
import pytest

import scope

# One by one: the check would wrap what Triton's compiler reads in scope.kernels.triton.
KERNELS = tuple(f"scope.kernels.{path.stem}" for path in (Path(scope.__file__).parent / "kernels").glob("*.py"))
CHECKED = (*KERNELS, "scope.models", "scope.saes", "scope.interventions", "scope.training", "scope.attribution")
"""Packages whose tensor annotations are checked at run time."""

# The same examples in each run, and no limit of time to them: neither chance nor a busy machine decides.
hypothesis.settings.register_profile(
    "scope", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("scope")

_hook = jaxtyping.install_import_hook(CHECKED, "helpers_checks.checked")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Each test draws the same numbers, whichever came before it in its process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def demo_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace that `scope demo` makes from the real model, at a small size; the test processes' own copy."""
    from filelock import FileLock

    from scope.cli.demo import DemoConfig, make_demo

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all the processes
    made = shared / "demo-made"
    with FileLock(shared / "demo.lock"):
        if not made.exists():
            small = DemoConfig(max_tokens=16_384, d_sae=1024, passes=8, evaluate_tokens=600, shipped=False)
            make_demo(shared / "demo" / "workspace", small)
            made.touch()
    folder = tmp_path_factory.mktemp("demo") / "workspace"
    shutil.copytree(shared / "demo" / "workspace", folder)
    return folder
