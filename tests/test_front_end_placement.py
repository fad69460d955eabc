"""Front ends and engines: where engines listen, which engine a front end picks, and how many front ends there can be."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from front_ends import addresses, engines, run, until
from pydantic import ValidationError

from serve_app.config import AppConfig
from serve_app.front_end import FrontEnd
from serve_app.interface import replica_interface
from serve_app.service import Service
from serve_app.wire import Address

pytestmark = pytest.mark.usefixtures("impatient_front_ends")


def test_front_ends_spread_over_the_engines(service: Service) -> None:
    config = service.config.model_copy(update={"front_ends": 2})

    async def main() -> None:
        async with engines(service, service) as [first, second]:
            known = [first]

            made = [FrontEnd(config, f"front-{number}", addresses(known)) for number in range(4)]
            await asyncio.gather(*(one.start() for one in made))
            assert len(first.sessions) == 4
            known.append(second)
            await until(lambda: len(first.sessions) == len(second.sessions) == 2)
            assert sorted(first.address().front_ends + second.address().front_ends) == [one.replica for one in made]
            for one in made:
                await one.close()

    run(main())


def test_a_front_end_prefers_engines_that_lack_front_ends_and_then_its_own_machine() -> None:
    front = FrontEnd.__new__(FrontEnd)
    front.config, front._node = AppConfig(model="m", front_ends=2), "here"

    def engine(name: str, node: str, *names: str) -> Address:
        return Address(name, node, "", 0, "", 1, names, False)

    found = [
        engine("full here", "here", "a", "b"),
        engine("away", "there"),
        engine("here", "here", "c"),
        engine("away, busier", "there", "d"),
    ]
    chosen = [one.engine for one in sorted(found, key=front._preference)]
    assert chosen == ["here", "away", "away, busier", "full here"]


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("127.0.0.1", ("127.0.0.1", "127.0.0.1")),
        ("10.0.0.7", ("10.0.0.7", "10.0.0.7")),
        ("0.0.0.0", ("0.0.0.0", "10.0.0.5")),
        (None, ("10.0.0.5", "10.0.0.5")),
    ],
)
def test_engines_listen_where_the_http_servers_of_replicas_do(
    monkeypatch: pytest.MonkeyPatch, host: str | None, found: tuple[str, str]
) -> None:
    """None stands for a version of Ray that does not tell."""
    client = None if host is None else SimpleNamespace(http_config=SimpleNamespace(host=host))
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.5")
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: client)
    assert replica_interface() == found


@pytest.mark.parametrize("number", [0, -1, 1.5, "many"])
def test_the_number_of_front_ends_is_checked(number: Any) -> None:
    with pytest.raises(ValidationError, match="front_ends"):
        AppConfig.model_validate({"model": "m", "front_ends": number})


def test_front_ends_and_autoscaling_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="set front_ends to 1, or num_replicas instead of autoscaling"):
        AppConfig.model_validate({"model": "m", "front_ends": 2, "autoscaling": {"max_replicas": 2}})
