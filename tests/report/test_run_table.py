"""What the table of one run says about opening its student."""

from __future__ import annotations

from pathlib import Path

from layerdistill.report.run_table import how_to_open


def test_a_student_with_a_modelling_file_is_said_to_need_trust_remote_code(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert how_to_open(tmp_path) == "plain transformers opens it"
    (tmp_path / "modeling_layerdistill.py").touch()
    assert "trust_remote_code=True" in how_to_open(tmp_path)
