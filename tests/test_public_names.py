"""The public names are pinned, each of them exists, and `import scope` loads nothing heavy."""

import subprocess
import sys

import scope


def test_the_public_names():
    assert scope.__all__ == [
        "SAE",
        "ActivationStore",
        "FeatureIndex",
        "LanguageModel",
        "RowSelection",
        "TextSource",
        "TrainConfig",
        "Workspace",
        "__version__",
        "build_index",
        "capture",
        "evaluate",
        "export_store",
        "features_on_prompt",
        "load_sae",
        "logit_lens",
        "sample_text",
        "train",
    ]
    assert all(getattr(scope, name) is not None for name in scope.__all__)
    assert scope.sample_text().is_file()


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, scope, activations.store, scope.workspace, dashboards;"
        "print({'torch', 'transformers', 'transformer_lens', 'sae_lens', 'zarr', 'dash'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
