"Installs lfdm; every fact comes from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
readme = here / "README.md"
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
c = config["DEFAULT"]

setup(
    name=c["lib_name"], version=c["version"], description=c["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=c["author"], keywords=c["keywords"], license="Apache-2.0",
    packages=find_packages(include=["lfdm", "lfdm.*"]), python_requires=f">={c['min_python']}",
    install_requires=c["requirements"].split(),
    extras_require={key.removesuffix("_requirements"): c[key].split()
                    for key in c if key.endswith("_requirements")},
    entry_points={"nbdev": [f"{c['lib_name']}={c['lib_name']}._modidx:d"]},
    package_data={"lfdm": ["*.toml", "explorer_page/*"]}, zip_safe=False,
)
