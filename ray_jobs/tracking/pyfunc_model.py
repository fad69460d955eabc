"""The MLflow model of a registered adapter, which turns data frames or lists of texts into label scores.

MLflow stores a copy of this file with the model and runs the copy, so it imports nothing from its own folder.
"""

from __future__ import annotations

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from revmux.adapters.classifier import TextClassifier
from revmux.errors import UserError

COLUMNS = ["text", "text_pair"]


class AdapterModel(PythonModel):
    """An adapter with its backbone, in the interface of MLflow's ``python_function`` flavor."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the adapter and its backbone: from the setting, from the artifact, or as the adapter records it.

        Args:
            context: artifacts ``adapter`` and optionally ``backbone``; settings ``backbone`` and ``device``.

        Raises:
            UserError: the backbone is not found, or it is not the adapter's backbone.
        """
        settings = context.model_config or {}
        backbone = settings.get("backbone") or context.artifacts.get("backbone")
        try:
            self.classifier = TextClassifier.from_pretrained(
                context.artifacts["adapter"], backbone, device=settings.get("device") or "cpu"
            )
        except UserError as error:
            if backbone is not None:
                raise
            remedy = 'in MLflow: mlflow.pyfunc.load_model(uri, model_config={"backbone": FOLDER})'
            raise UserError(f"{error}; {remedy}") from None

    def predict(  # type: ignore[override]  # MLflow itself calls it with or without params
        self, context: PythonModelContext, model_input: pd.DataFrame
    ) -> pd.DataFrame:
        """Scores of every class, before softmax.

        Args:
            context: unused.
            model_input: a column ``text``, and ``text_pair`` if the adapter classifies pairs; or columns 0 and 1, which
                MLflow creates from lists.

        Returns:
            One row per input and one column per class, in the order of the model's classes.

        Raises:
            UserError: the columns are wrong, or a text cannot be classified.
        """
        del context
        given: list[object] = list(model_input.columns)
        named = COLUMNS[: len(given)]
        if set(given) == set(named):
            model_input = model_input[named]
        elif given != [*range(len(named))]:
            raise UserError(
                f"the input has the columns {', '.join(map(repr, given))}; pass only {' and '.join(named)}, such as "
                f"frame[{named}], or a list of texts"
            )
        scores = self.classifier.scores(list(model_input.itertuples(index=False, name=None)))
        return pd.DataFrame(scores.double().numpy(), columns=self.classifier.label_names, index=model_input.index)


set_model(AdapterModel())
