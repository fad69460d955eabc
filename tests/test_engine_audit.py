"""The audit of answers against the plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from serving_models import plain_scores, text, write_adapter

from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Engine

pytestmark = pytest.mark.numeric


def test_the_audit_counts_how_often_answers_agree_with_the_plain_model(
    pretrained: Pretrained, make_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    wrong = write_adapter(tmp_path, pretrained, 8, method="revmux")  # untrained
    for folders, share in ((None, 1.0), ([wrong], None)):
        engine = make_engine(folders, plain_load=0.0, audit=1.0)
        futures = engine.submit([text(index) for index in range(40)])
        engine.start()
        labels = [int(future.result(60).scores.argmax()) for future in futures]
        engine.close()  # the last audit runs after the last answer
        plain = plain_scores(pretrained, [text(index) for index in range(40)]).argmax(1).tolist()
        counted = engine.stats()["tasks"]["default"]
        assert counted["audited"] == 40
        assert counted["agreed"] == sum(own == other for own, other in zip(labels, plain))
        assert share is None or counted["agreed"] == 40 * share


def test_nothing_is_audited_by_default(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(plain_load=0.0)
    futures = engine.submit([text(index) for index in range(8)])
    engine.start()
    for future in futures:
        future.result(60)
    engine.close()
    assert engine.stats()["audited"] == 0
