"""Pages in a real browser: Debian's Chromium, without a window."""

import shutil
from contextlib import contextmanager

import pytest


def check(page, pictures):
    """Open a page at the width of a screen and of a phone; all pictures must be drawn, and nothing may be wrong.

    Args:
        page: The file.
        pictures: How many pictures it should have.
    """
    with _driver() as driver:
        for width in (1280, 400):
            driver.set_window_size(width, 900)
            driver.get(page.as_uri())
            widths = driver.execute_async_script(
                "const done = arguments[0], all = [...document.images];"
                "Promise.all(all.map(image => image.decode())).then(() => done(all.map(image => image.naturalWidth)),"
                "error => done(String(error)))"
            )
            assert isinstance(widths, list), widths
            assert len(widths) == pictures
            assert min(widths) > 100
            wider = driver.execute_script(
                "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert wider <= 0, f"the page is wider than a window of {width} pixels"
            outside = driver.execute_script(
                "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
            )
            assert outside == [], "the page needs a network"
        assert driver.get_log("browser") == []


@contextmanager
def _driver():
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-sync",
        "disable-component-update",
        "no-first-run",
        "allow-file-access-from-files",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    try:
        yield driver
    finally:
        driver.quit()


def check_site(folder, pages):
    """Open each page of a site at the width of a screen and of a phone; nothing may be wrong, or come from outside.

    Args:
        folder: The site.
        pages: Its pages.
    """
    with _driver() as driver:
        for page in pages:
            for width in (1280, 400):
                driver.set_window_size(width, 900)
                driver.get(page.as_uri())
                wider = driver.execute_script(
                    "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
                )
                assert wider <= 0, f"{page.name} is wider than a window of {width} pixels"
            loaded = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
            outside = [name for name in loaded if not name.startswith(("data:", folder.as_uri()))]
            assert outside == [], page.name
            broken = driver.execute_script(
                "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
            )
            assert broken == [], page.name
            assert driver.get_log("browser") == [], page.name
