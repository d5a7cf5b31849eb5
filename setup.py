"Packaging: everything is in settings.ini, and the version in wmpo_nb/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
readme = root / "README.md"


def lines(name: str) -> list[str]:
    "The non-empty lines of a multi-line setting."
    return [line.strip() for line in settings[name].splitlines() if line.strip()]


def tested() -> list[str]:
    "The exact versions, from constraints.txt, of the packages in `requirements`."
    names = {re.match(r"[\w.-]+", line)[0] for line in lines("requirements")}
    pins = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [pin for pin in pins if pin.split("==")[0] in names]


setup(
    name=settings["lib_name"],
    version=re.search(r'__version__ = "(.+)"', (root / "wmpo_nb/__init__.py").read_text())[1],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else settings["description"],
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=settings["license"],
    license_files=["LICENSE"],
    keywords=[word.strip() for word in settings["keywords"].split(",")],
    classifiers=[
        f"Development Status :: {settings['status']}",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Education",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={settings['min_python']}",
    packages=["wmpo_nb"],
    package_data={"wmpo_nb": ["weights/*/*.safetensors", "weights/*/*/*.safetensors", "weights/*/*/*.json", "reference_*.npz", "play.html"]},
    include_package_data=False,
    install_requires=lines("requirements"),
    extras_require={"dev": lines("dev_requirements") + lines("oxe_requirements"), "oxe": lines("oxe_requirements"),
                    "docs": lines("docs_requirements"), "tested": tested()},
    entry_points={"console_scripts": lines("console_scripts")},
)
