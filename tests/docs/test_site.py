"""The documentation site: it builds without a warning, holds every public name, and needs no network."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_curvature
from tests.support import browser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

pytest.importorskip("sphinx", reason="needs the extra docs")


def public_names():
    """Every name in an ``__all__``, by the shortest module that has it."""
    names = {}
    modules = [info.name for info in pkgutil.walk_packages(lightning_curvature.__path__, "lightning_curvature.")]
    for module in ["lightning_curvature", *sorted(modules, key=lambda name: name.count("."))]:
        if module.startswith(("lightning_curvature.cli", "lightning_curvature.__main__")):
            continue
        loaded = importlib.import_module(module)
        for name in set(getattr(loaded, "__all__", ())) - {"__version__"}:
            value = getattr(loaded, name)
            if not any(value is known and name == key.rpartition(".")[2] for key, known in names.items()):
                names[f"{module}.{name}"] = value
    return set(names)


def test_every_public_name_has_one_place():
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    placed = re.findall(r"\.\. auto(?:class|function|data):: (\S+)", text)
    assert sorted(placed) == sorted(public_names())


def test_the_commands_are_those_of_the_parser():
    from _sphinx import commands

    assert commands.PAGE.read_text() == commands.render(), "run python docs/_sphinx/commands.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, with its notebooks run; a cell that fails, or a warning, fails the build."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "--keep-going"]
    done = subprocess.run(
        [*command, "-d", out / "doctrees", DOCS, out / "html"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_pages_open_in_a_browser(site):
    """No error, nothing from outside, nothing wider than the window, and no link within the site is broken."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    browser.check_site(site, pages)


def test_links_within_the_site_lead_somewhere(site):
    ids = {page: set(re.findall(r'\bid="([^"]+)"', page.read_text())) for page in site.rglob("*.html")}
    for page in ids:
        for link in re.findall(r'<a [^>]*href="([^"]+)"', page.read_text()):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target in ids:
                assert anchor in ids[target], f"{page.name}: {link}"
