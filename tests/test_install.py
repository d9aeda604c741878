"A wheel holds the library, whole, and nothing it does not need."
import re
import subprocess
import sys
import zipfile

from tree import ROOT, copy_tree


def test_wheel(tmp_path):
    copy = copy_tree(tmp_path / "source")
    build = [sys.executable, "-m", "build", "--no-isolation"]   # an sdist, and the wheel from it
    built = subprocess.run([*build, "--outdir", tmp_path / "dist", copy], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = (tmp_path / "dist").glob("*.whl")
    modules = {str(path.relative_to(ROOT)): path.read_bytes() for path in (ROOT / "lfdm").rglob("*.py")}
    with zipfile.ZipFile(wheel) as files:
        assert {name: files.read(name) for name in files.namelist() if name.endswith(".py")} == modules
        info = files.read(next(name for name in files.namelist() if name.endswith("METADATA"))).decode()
        page = {name: files.read(name) for name in files.namelist() if name.startswith("lfdm/explorer_page/")}
    assert "lfdm/images/data.py" in modules
    ours = (ROOT / "lfdm/explorer_page").iterdir()
    assert page == {str(path.relative_to(ROOT)): path.read_bytes() for path in ours}
    needs = re.findall("^Requires-Dist: (.*)", info, re.M)
    always = {re.match(r"[\w-]+", need)[0] for need in needs if "extra ==" not in need}
    assert always == {"torch", "numpy", "scipy", "torchdiffeq"}   # what a loss needs
    assert {"studies", "images", "dev"} <= {*re.findall("^Provides-Extra: (.*)", info, re.M)}
