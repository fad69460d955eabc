"""The commands that list and remove feature stores."""

from __future__ import annotations

from pathlib import Path

import pytest
from feature_stores import bert, pretrained, small_store, split

from revmux import UserError
from revmux.__main__ import main
from revmux.features.cache_cli import format_stores, list_stores, remove_stores
from revmux.features.config import StoreConfig
from revmux.features.store import open_features
from revmux.utils.place import Place

pytestmark = pytest.mark.numeric


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return small_store(tmp_path)


def test_stores_are_listed_and_removed(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command_line(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["revmux", *arguments])
        return main()

    model = pretrained(bert())
    small = open_features(model, split(), [], config)
    large = open_features(model, split(seed=1), [1, 2], config)
    bystander = Path(config.root) / "other"
    bystander.mkdir()
    stores = list_stores(config.root)
    assert [store.key for store in stores] == [large.key, small.key]
    assert stores[0].contents == ("layer-001-float32", "layer-002-float32", "teacher")
    assert stores[0].bytes == sum(path.stat().st_size for path in bystander.parent.joinpath(large.key).rglob("*.*"))
    assert command_line("cache", "ls", "--root", config.root) == 0
    assert capsys.readouterr().out == format_stores(stores) + "\n"
    assert command_line("cache", "rm", "zz", "--root", config.root) == 2
    for keys, problem in [([], "no store named"), (["zz"], "fits no store"), ([""], "fits"), (["other"], "fits no")]:
        with pytest.raises(UserError, match=problem):
            remove_stores(keys, config.root)
    assert [store.key for store in remove_stores([large.key[:8]], config.root)] == [large.key]
    assert [store.key for store in list_stores(config.root)] == [small.key]
    assert command_line("cache", "rm", "all", "--root", config.root) == 0
    assert list_stores(config.root) == []
    assert bystander.is_dir()
    assert list_stores(str(tmp_path / "nowhere")) == []


def test_a_store_that_is_being_written_is_not_removed(config: StoreConfig) -> None:
    key = open_features(pretrained(bert()), split(), [], config).key
    place = Place.open(config.root)
    with place.exclusive(f"{key}.lock"), pytest.raises(UserError, match="another process"):
        remove_stores([key], config.root)
    assert [store.key for store in list_stores(config.root)] == [key]
