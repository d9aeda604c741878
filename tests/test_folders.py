"Where the files of a study lie, at each scale."
import pytest

from lfdm.folders import SCALES, checked_scale, place, runs_root, suffixed
from tree import ROOT


def test_names_say_the_scale():
    assert [suffixed("a", scale) for scale in SCALES] == ["a", "a-quick", "a-smoke"]


def test_only_the_smoke_scale_is_among_the_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    assert place("records", "full") == place("records", "quick") == ROOT / "records"
    assert place("records", "smoke") == tmp_path / "records"


def test_where_runs_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    assert runs_root() == tmp_path and runs_root("here").name == "here"
    monkeypatch.setenv("LFDM_RUNS", "")
    assert runs_root() == ROOT / "runs"
    monkeypatch.delenv("LFDM_RUNS")
    assert runs_root() == ROOT / "runs"


@pytest.mark.parametrize("bad, said", [("quik", "Did you mean 'quick'"), ("Full", "Did you mean 'full'"),
                                       (None, "Valid: 'full', 'quick', 'smoke'")])
def test_another_scale_is_refused(bad, said):
    for ask in (checked_scale, lambda scale: place("records", scale)):
        with pytest.raises(ValueError, match=said): ask(bad)
