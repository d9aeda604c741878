"Where the files of a study lie, at each scale."
from pathlib import Path

import pytest

from lfdm.folders import checked_scale, place, runs_root, suffixed
from tree import ROOT


def test_where_runs_and_records_lie(tmp_path, monkeypatch):
    "only the smoke scale is among the runs"
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    assert runs_root() == tmp_path and runs_root("here").name == "here"
    assert place("records", "smoke") == tmp_path / "records"
    assert place("records") == place("records", "quick") == ROOT / "records"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given in ("~/x", "~"):
        monkeypatch.setenv("LFDM_RUNS", given)
        assert runs_root() == runs_root(given) == Path(given.replace("~", str(tmp_path / "home")))
    for given in ("~nobody-at-all/x", "a\0b"):
        with pytest.raises(ValueError, match="^root "): runs_root(given)
    monkeypatch.setenv("LFDM_RUNS", "")
    assert runs_root() == ROOT / "runs"


def test_another_scale_is_refused():
    for bad, said in ("Full", "Did you mean 'full'"), (None, "Valid: 'full', 'quick', 'smoke'"):
        for ask in (checked_scale, lambda scale: place("records", scale)):
            with pytest.raises(ValueError, match=said): ask(bad)


@pytest.mark.parametrize("name", ["", "..", "../x", "a\\b", "a\nb", "\u2028", "ü" * 101])
def test_no_name_leads_out_of_its_folder(name):
    for call in (lambda: suffixed(name, "full"), lambda: place(name)):
        with pytest.raises(ValueError, match="^(name|what) must be a plain folder name, not .{1,99}$"): call()
    assert suffixed("ü-1 (b)", "quick") == "ü-1 (b)-quick"
