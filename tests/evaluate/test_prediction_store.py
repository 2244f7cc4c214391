"""What a model said is kept under its content: asked once, asked again when the file is broken or another's."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from layerdistill.evaluate import kept_predictions


class Model:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> pa.Table:
        self.asked += 1
        return pa.table({"example_id": ["a", "b", "c"], "nll": [0.25, 0.5, float(self.asked)], "tokens": [1, 2, 3]})


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERDISTILL_HOME", str(tmp_path))
    return tmp_path


def test_a_model_is_asked_once_for_each_identity(home: Path) -> None:
    model = Model()
    first = kept_predictions({"model": "m", "data": "d"}, model)
    assert kept_predictions({"data": "d", "model": "m"}, model).equals(first) and model.asked == 1
    assert not kept_predictions({"model": "m", "data": "other"}, model).equals(first) and model.asked == 2
    assert len(list((home / "predictions").glob("*.parquet"))) == 2


def test_any_broken_byte_of_what_was_said_is_noticed(home: Path) -> None:
    model = Model()
    kept_predictions({"model": "m"}, model)
    for file in sorted((home / "predictions").iterdir()):
        whole = file.read_bytes()
        for place in range(0, len(whole), 7):
            before = model.asked
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x81]) + whole[place + 1 :])
            assert kept_predictions({"model": "m"}, model)["nll"][2].as_py() == model.asked == before + 1, (
                f"byte {place}"
            )
            whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert kept_predictions({"model": "m"}, model)["nll"][2].as_py() == model.asked, "half a file is made anew"


def test_a_home_that_cannot_be_written_keeps_nothing_and_harms_nothing(home: Path) -> None:
    (home / "predictions").write_text("a file where the folder should be")
    model = Model()
    for _ in range(2):
        assert kept_predictions({"model": "m"}, model).num_rows == 3
    assert model.asked == 2
