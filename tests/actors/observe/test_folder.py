"""What stands in a run folder after each way a run can go."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from penumbra.actors.observe import (
    EventKind,
    EventLog,
    FolderDiffers,
    FolderError,
    Results,
    RunFolder,
    is_whole,
)

_COMPLETE = ["config.toml", "events.npz", "summary.json", "verdict.json", "wall.json"]


def results(cost: int = 7) -> Results:
    log = EventLog()
    log.add(1, cost, 0, 0, 0, EventKind.VM_END)
    return Results({"cost": cost}, log.columns(), {"coherent": True}, {"seconds": 1.5})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def times(wall: bytes) -> list[dict[str, float]]:
    """Return the rows of `wall.json` without the hash of the rest of the folder."""
    return [{k: v for k, v in row.items() if k != "content"} for row in json.loads(wall)]


def complete(root: Path, given: Results | None = None) -> Path:
    folder = RunFolder.begin(root, "id", "seed = 1\n")
    folder.finish(given or results())
    return folder.path


def test_a_folder_is_partial_until_its_run_has_finished(tmp_path: Path) -> None:
    folder = RunFolder.begin(tmp_path / "runs", "id", "seed = 1\n")
    assert (names(folder.path), folder.repeats) == (["PARTIAL", "config.toml"], False)
    folder.finish(results())
    assert names(folder.path) == _COMPLETE
    assert (folder.path / "config.toml").read_text() == "seed = 1\n"
    assert json.loads((folder.path / "summary.json").read_bytes()) == {"cost": 7}
    assert times((folder.path / "wall.json").read_bytes()) == [{"seconds": 1.5}]


def test_a_run_that_was_cut_says_why_and_is_replaced_by_the_next(tmp_path: Path) -> None:
    folder = RunFolder.begin(tmp_path, "id", "seed = 1\n")
    folder.cut("interrupted at 12% of the references")
    assert names(folder.path) == ["PARTIAL", "config.toml"]
    assert (folder.path / "PARTIAL").read_text() == "interrupted at 12% of the references\n"
    (folder.path / "summary.json").write_text("left over")
    again = RunFolder.begin(tmp_path, "id", "seed = 1\n")
    assert (names(again.path), again.repeats) == (["PARTIAL", "config.toml"], False)
    again.finish(results())
    assert names(again.path) == _COMPLETE


def test_an_equal_second_run_adds_its_row_to_the_times_and_changes_nothing_else(
    tmp_path: Path,
) -> None:
    path = complete(tmp_path)
    before = {name: (path / name).read_bytes() for name in _COMPLETE}
    folder = RunFolder.begin(tmp_path, "id", "seed = 1 # written differently\n")
    assert folder.repeats
    folder.finish(replace(results(), wall={"seconds": 2.5}))
    assert names(tmp_path) == ["id"]
    after = {name: (path / name).read_bytes() for name in _COMPLETE}
    assert times(after.pop("wall.json")) == [{"seconds": 1.5}, {"seconds": 2.5}]
    del before["wall.json"]
    assert after == before


def test_a_different_second_run_is_kept_beside_the_first_and_both_are_named(tmp_path: Path) -> None:
    path = complete(tmp_path)
    before = {name: (path / name).read_bytes() for name in _COMPLETE}
    for n in (1, 2):
        other = tmp_path / f"id.differs-{n}"
        with pytest.raises(FolderDiffers) as raised:
            RunFolder.begin(tmp_path, "id", "seed = 1\n").finish(results(cost=8))
        assert str(raised.value) == (
            f"{path}: differs in summary.json, events.npz from this run, kept in {other}"
        )
        assert names(other) == _COMPLETE
    assert {name: (path / name).read_bytes() for name in _COMPLETE} == before


def test_another_verdict_on_the_same_run_is_a_difference(tmp_path: Path) -> None:
    complete(tmp_path)
    with pytest.raises(FolderDiffers, match="differs in verdict"):
        RunFolder.begin(tmp_path, "id", "").finish(replace(results(), verdict={"coherent": False}))


def test_an_unchecked_run_leaves_no_verdict_and_gets_that_of_a_later_checked_one(
    tmp_path: Path,
) -> None:
    path = complete(tmp_path, replace(results(), verdict=None))
    assert "verdict.json" not in names(path)
    complete(tmp_path)
    assert names(path) == _COMPLETE
    complete(tmp_path, replace(results(), verdict=None))
    assert json.loads((path / "verdict.json").read_bytes()) == {"coherent": True}
    assert len(json.loads((path / "wall.json").read_bytes())) == 3


def test_cutting_or_discarding_the_repetition_of_a_complete_run_leaves_it_complete(
    tmp_path: Path,
) -> None:
    path = complete(tmp_path)
    RunFolder.begin(tmp_path, "id", "seed = 1\n").cut("interrupted")
    assert names(path) == _COMPLETE
    RunFolder.begin(tmp_path, "id", "seed = 1\n").discard()
    assert names(path) == _COMPLETE


def test_a_run_that_could_not_begin_leaves_nothing(tmp_path: Path) -> None:
    RunFolder.begin(tmp_path, "id", "seed = 1\n").discard()
    assert names(tmp_path) == []


def test_a_folder_of_something_else_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "id").mkdir()
    (tmp_path / "id" / "config.toml").write_text("mine")
    with pytest.raises(FolderError, match=r"no run folder: it lacks summary\.json, events\.npz"):
        RunFolder.begin(tmp_path, "id", "seed = 1\n")
    assert (tmp_path / "id" / "config.toml").read_text() == "mine"


def test_a_root_that_is_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(FolderError) as raised:
        RunFolder.begin(tmp_path / "runs", "id", "")
    assert str(raised.value) == f"{tmp_path / 'runs' / 'id'}: Not a directory"


def test_a_damaged_list_of_times_is_begun_anew(tmp_path: Path) -> None:
    path = complete(tmp_path)
    (path / "wall.json").write_text("[{")
    complete(tmp_path)
    assert times((path / "wall.json").read_bytes()) == [{"seconds": 1.5}]


@pytest.mark.parametrize("damaged", [None, *_COMPLETE])
def test_a_folder_is_whole_until_any_of_its_files_has_changed(
    damaged: str | None, tmp_path: Path
) -> None:
    path = complete(tmp_path)
    assert is_whole(path, "seed = 1\n")
    assert not is_whole(path, "seed = 2\n")
    assert not is_whole(tmp_path / "none", "seed = 1\n")
    complete(tmp_path)  # a second run's row has the hash, too
    assert is_whole(path, "seed = 1\n")
    if damaged is not None:
        (path / damaged).write_bytes((path / damaged).read_bytes()[:-3])
        assert not is_whole(path, "seed = 1\n")


@pytest.mark.parametrize("wall", ["", "3", "[]", "[3]", "{}", '[{"content": 3}]', "[" * 100_000])
def test_a_folder_whose_times_make_no_sense_is_not_whole(wall: str, tmp_path: Path) -> None:
    path = complete(tmp_path)
    (path / "wall.json").write_text(wall)
    assert not is_whole(path, "seed = 1\n")
