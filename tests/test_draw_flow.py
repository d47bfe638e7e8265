"""The committed diagrams of pages 04, 07 and 10 are what the code draws, byte for byte."""

from pathlib import Path

import pytest

from tutorials import draw_flow

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["strip", "step", "block"])
def test_a_diagram_is_what_the_code_draws(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    drawn = getattr(draw_flow, name)(tmp_path / f"{name}.svg")
    committed = ROOT / "tutorials" / "figures" / f"{name}.svg"
    assert drawn.read_bytes() == committed.read_bytes(), "make figures draws them anew"
