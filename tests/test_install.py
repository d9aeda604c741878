"A wheel holds the library, whole, and nothing it does not need."
import os
import subprocess
import sys
import zipfile

from tree import ROOT, copy_tree


def test_wheel(tmp_path):
    copy = copy_tree(tmp_path / "source")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    built = subprocess.run([*build, "--outdir", tmp_path / "dist", copy], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as files: files.extractall(tmp_path / "installed")

    found = lambda root: {str(path.relative_to(root)) for path in (root / "lfdm").rglob("*.py")}
    modules = found(ROOT)
    assert found(tmp_path / "installed") == modules and "lfdm/images/data.py" in modules
    [info] = (tmp_path / "installed").glob("*.dist-info")
    always = [line for line in (info / "METADATA").read_text(encoding="utf-8").splitlines()
              if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert any("torch" in line for line in always)
    assert not [line for line in always if "jupyter" in line or "nbdev" in line or "papermill" in line]

    names = " ".join(sorted(m[:-3].replace("/", ".") for m in modules if "/_" not in m and "ledger" not in m))
    code = (f"import importlib, lfdm; [importlib.import_module(m) for m in '{names}'.split()]; "
            "print(lfdm.__file__)")
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith(str(tmp_path / "installed"))
