"""Ten thousand mixed inputs: none is lost, answered twice, or answered with another's label."""

from __future__ import annotations

import random
import threading
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path

import pytest
from serving_models import known_texts, load, plain_scores, write_adapter, write_identifying_model, write_stage

from revmux.serving import Answer, Engine, Expired, Limits, Overloaded, PassReport

pytestmark = pytest.mark.numeric

CLIENTS = 4
INPUTS = 10_000


@dataclass
class Sent:
    """One input and the state of its request."""

    task: str
    text: str
    cap: int | None
    impatient: bool
    future: Future[Answer]
    cancelled: bool = False
    answers: int = 0


class Client:
    """Send requests of every kind until this client's share is sent."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.sent: list[Sent] = []
        self.refused = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while len(self.sent) < INPUTS // CLIENTS:
                self.send(min(self.random.randint(1, 9), INPUTS // CLIENTS - len(self.sent)))
        except BaseException as error:
            self.error = error

    def send(self, inputs: int) -> None:
        draw = self.random
        task, cap = draw.choice(["even", "odd"]), draw.choice([None, None, 1, 2, 3, 4])
        texts = draw.choices(known_texts(), k=inputs)
        impatient = draw.random() < 0.03
        timeout = 1e-9 if impatient else draw.choice([None, 600])
        priority = draw.randint(-10, 10)
        while True:
            try:
                futures = self.engine.submit(texts, False, cap, task=task, priority=priority, timeout=timeout)
                break
            except Overloaded:
                self.refused += 1
                if pending := [one.future for one in self.sent if not one.future.done()]:
                    wait(pending, return_when=FIRST_COMPLETED)
        for text, future in zip(texts, futures):
            one = Sent(task, text, cap, impatient, future)
            future.add_done_callback(lambda future, one=one: self._count(one))
            self.sent.append(one)
        if draw.random() < 0.05:
            victim = draw.choice(self.sent[-30:])
            victim.cancelled = victim.future.cancel()

    @staticmethod
    def _count(one: Sent) -> None:
        one.answers += 1


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, str]]]:
    root = tmp_path_factory.mktemp("tasks")
    made = {}
    for seed, name in enumerate(("even", "odd")):
        (root / name).mkdir()
        made[name] = write_identifying_model(root / name, seed)
    return made


def test_labels_identify_their_text(tasks: dict[str, tuple[Path, dict[str, str]]]) -> None:
    for folder, labels in tasks.values():
        pretrained = load(folder)
        predicted = plain_scores(pretrained, known_texts()).argmax(-1).tolist()
        assert [pretrained.backbone.label_names[place] for place in predicted] == [labels[one] for one in known_texts()]
        assert len(set(labels.values())) == len(labels)
    even, odd = (labels for _, labels in tasks.values())
    assert sum(even[one] == odd[one] for one in even) < 5  # so that an answer of the other task would be detected too


def test_ten_thousand_mixed_inputs_each_get_their_own_answer(
    tasks: dict[str, tuple[Path, dict[str, str]]], tmp_path: Path
) -> None:
    reports: list[PassReport] = []
    engine = Engine(limits=Limits(max_queue=200, max_batch=48, max_batch_tokens=700), on_pass=reports.append)
    adapters: dict[str, dict[int, Path]] = {}
    for name, (folder, _) in tasks.items():
        pretrained = load(folder)
        if name == "even":
            adapters[name] = {width: write_adapter(tmp_path / name, pretrained, width) for width in (2, 4)}
            engine.add_task(name, pretrained, list(adapters[name].values()), threshold=0.5)
            continue
        # In this task no input is answered by stage 1.
        adapters[name] = {
            width: write_stage(tmp_path / f"{name}-{width}", pretrained, 1, width, threshold=1.0) for width in (2, 4)
        }
        last = write_stage(tmp_path / name, pretrained, 2, 4, prefill_layers=2)
        engine.add_task(name, pretrained, [*adapters[name].values(), last])
    clients = [Client(engine, seed) for seed in range(CLIENTS)]
    threads = [threading.Thread(target=client.run) for client in clients]
    with engine:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for name in tasks:  # meanwhile adapters are added and removed
                engine.retire(4, task=name)
                engine.load(adapters[name][4], task=name)
            threads[0].join(0.2)
    assert [client.error for client in clients] == [None] * CLIENTS
    sent = [one for client in clients for one in client.sent]
    assert len(sent) == INPUTS
    outcomes: Counter[str] = Counter()
    for one in sent:
        assert one.answers == 1
        outcomes[_outcome(one, engine, tasks[one.task][1])] += 1
    stats = engine.stats()
    assert outcomes["answered"] == sum(stats["inputs"].values()) == sum(len(report.widths) for report in reports)
    assert outcomes["cancelled"] == stats["cancelled"] > 0
    assert outcomes["expired"] == stats["expired"] > 0
    assert stats["failed"] == stats["waiting"] == 0
    assert sum(client.refused for client in clients) > 0
    assert set(stats["inputs"]) == {1, 2, 4}
    assert set(stats["tasks"]["even"]["ladder"]) == {0, 1}
    assert set(stats["tasks"]["odd"]["ladder"]) == {0, 2}
    assert sum(stats["groups"].values()) < outcomes["answered"]


def _outcome(one: Sent, engine: Engine, labels: dict[str, str]) -> str:
    if one.cancelled:
        assert one.future.cancelled()
        return "cancelled"
    if isinstance(one.future.exception(0), Expired):
        assert one.impatient
        return "expired"
    answer = one.future.result(0)
    assert one.cap is None or answer.width <= one.cap
    assert engine.task(one.task).label_names[int(answer.scores.argmax())] == labels[one.text]
    return "answered"
