"Where the files of a study lie, at each scale."
import pytest

from lfdm.folders import checked_scale, place, runs_root
from tree import ROOT


def test_where_runs_and_records_lie(tmp_path, monkeypatch):
    "only the smoke scale is among the runs"
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    assert runs_root() == tmp_path and runs_root("here").name == "here"
    assert place("records", "smoke") == tmp_path / "records"
    assert place("records") == place("records", "quick") == ROOT / "records"
    monkeypatch.setenv("LFDM_RUNS", "")
    assert runs_root() == ROOT / "runs"


def test_another_scale_is_refused():
    for bad, said in ("Full", "Did you mean 'full'"), (None, "Valid: 'full', 'quick', 'smoke'"):
        for ask in (checked_scale, lambda scale: place("records", scale)):
            with pytest.raises(ValueError, match=said): ask(bad)
