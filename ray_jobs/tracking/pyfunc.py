"""An adapter as an MLflow model: its files, the code that runs it, a signature, an example and pinned requirements."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from revmux.adapters.config import AdapterConfig, load_adapter_config, local_adapter_folder
from revmux.pretrained.config import EMBEDDED_NAME, EMBEDDED_PACKAGE, SMOLLM2_NAME
from revmux.pretrained.identity import resolve
from revmux.utils.extras import EXTRAS, require

MODEL_NAME = "model"
"""Name of the MLflow model among a run's artifacts."""
MODEL_CODE = Path(__file__).parent / "pyfunc_model.py"
PACKAGES = ("revmux", "torch", "transformers", "tokenizers", "safetensors", "pandas", "mlflow")
EXAMPLES = {"text": ["Several requests share one pass."], "text_pair": ["The pass is shared."]}


def save_pyfunc(adapter: str | Path, folder: Path, backbone: str | None = None, pairs: bool = False) -> Path:
    """Write an adapter as a folder in MLflow's ``python_function`` flavor, without pickled objects.

    Args:
        adapter: adapter folder.
        folder: folder to create.
        backbone: folder of a local backbone. It is copied into the model unless the adapter records a backbone that any
            machine can load (the embedded one or one of the hub). If None, it is left out, and the user must name a
            backbone when loading the model.
        pairs: whether an input is a pair of texts.

    Raises:
        UserError: mlflow is not installed, or ``adapter`` is not an adapter.
    """
    mlflow = require("mlflow", "mlflow")
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    config = load_adapter_config(adapter)
    copied = {"adapter": local_adapter_folder(adapter)}
    if backbone is not None and not config.backbone_is_found:
        copied["backbone"] = Path(resolve(backbone))
    columns = list(EXAMPLES)[: 2 if pairs else 1]
    # Unnamed inputs: MLflow accepts a list of texts only if the signature names no columns.
    signature = ModelSignature(
        Schema([ColSpec("string") for _ in columns]), Schema([ColSpec("double", name) for name in config.label_names])
    )
    with tempfile.TemporaryDirectory() as staging:
        for name, source in copied.items():  # MLflow names artifacts after their folders, whose names may be equal
            shutil.copytree(source, Path(staging) / name)
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(MODEL_CODE),
            artifacts={name: str(Path(staging) / name) for name in copied},
            model_config={"backbone": None, "device": "cpu"},
            signature=signature,
            input_example=pd.DataFrame({name: EXAMPLES[name] for name in columns}),
            pip_requirements=requirements(config),
        )
    return folder


def requirements(config: AdapterConfig) -> list[str]:
    """The packages that prediction needs, pinned to the versions installed here."""
    packages = list(PACKAGES)
    if config.base_model["name"] == EMBEDDED_NAME:
        packages.append(EMBEDDED_PACKAGE.replace("_", "-"))
    elif config.base_model["name"] == SMOLLM2_NAME:
        packages += EXTRAS["gguf"]  # they convert the model on its first use
    return [
        f"{name}=={version(name).partition('+')[0]}" for name in packages
    ]  # without a local build suffix such as +cpu
