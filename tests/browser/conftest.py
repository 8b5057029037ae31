"""Headless Chromium, and folders to make pages of."""

import shutil

import pytest

from tests.report.folders import federations, troubled_folder

__all__ = ["browser", "federations", "troubled_folder"]

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    """A browser as readers have it, without its calls home.

    Playwright keeps an event loop running in this thread for as long as it lives, in which no other file's tests can
    start one of their own: so no longer than its module.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine; install it to look at pages")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as session:
        running = session.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()
