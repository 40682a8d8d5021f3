"""The grid of coupling against the attack: it goes on where it was cut off."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def grid(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import coupling_grid

    return coupling_grid


def test_a_run_that_was_cut_off_goes_on(grid, monkeypatch, tmp_path):
    for name, few in (("PRODUCTS", (0.0,)), ("DELTAS", (1e-5,)), ("NOMINAL", (1.0, 2.0))):
        monkeypatch.setattr(grid, name, few)
    one = grid.Game("one step", grid.at_nominal(0.5, 0.1, 1, 1.0, 1e-5), 1e-5, 1.01)
    monkeypatch.setattr(grid, "games", lambda: [one])
    monkeypatch.setattr(sys, "argv", ["grid", "--out", str(tmp_path), "--steps", "1"])
    worked_out, cell = [], grid.cell

    def cut_off(*game):
        worked_out.append(game)
        if len(worked_out) == 2:
            raise KeyboardInterrupt
        return cell(*game)

    monkeypatch.setattr(grid, "cell", cut_off)
    with pytest.raises(KeyboardInterrupt):
        grid.main()
    unfinished = tmp_path / "unfinished.jsonl"
    unfinished.write_text(unfinished.read_text() + '["half a li')
    grid.main()
    assert [game[-1] for game in worked_out] == [1.0, 2.0, 2.0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json", "table.md"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [each["interpolation"] for each in results["cells"]] == [1.0, 2.0]
    assert [each["game"] for each in results["games"]] == ["one step"]
    assert results["games"][0]["ratio"] == pytest.approx(1, abs=1e-3)
    text = (tmp_path / "table.md").read_text()
    assert "| one step | 1 to 1 (1.000) | 1.01 |" in text
    assert "2 of 2 cells are within" in text


@pytest.mark.slow
def test_the_games_are_what_their_names_say(grid):
    found = grid.games()
    games = {game.name: game for game in found}
    assert len(games) == len(found)
    for c, count, _ in grid.CONTRACTIONS:
        steps = games[f"contraction {c:g}, {count} steps"].steps
        assert steps.contraction.tolist() == [c] * count
    alike, other = (
        games[name].steps
        for name in ("contraction 0.99, 3,000 steps", "the same, another first shift")
    )
    assert np.flatnonzero(alike.shift != other.shift).tolist() == [0]
    assert len(games["1,000,000 steps"].steps.noise) == 1_000_000


def test_a_game_beyond_its_goal_is_in_bold(grid):
    cells = [grid.cell(0.0, 1e-5, 1, 1.0)]
    game = {"game": "long", "coupling": 0.6, "attack": None, "ratio": None, "most": 0.5}
    results = {"cells": cells, "versions": {}, "device": "d", "python": "3"}
    for met, text in ((False, "| long | **0.6** | 0.5 |"), (True, "| long | 0.6 | 0.5 |")):
        assert text in grid.table({**results, "games": [{**game, "met": met}]})
