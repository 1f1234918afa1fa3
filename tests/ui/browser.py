"""Clicks in Dagster's UI, made by a headless Chromium."""

import shutil

import pytest
from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium found (apt-get install chromium): the same is asked over GraphQL instead"
)
LOCATION = "/locations/tuneshift_dag.definitions"


def reload_definitions(page: Page, url: str, transfer: str) -> None:
    page.goto(f"{url}{LOCATION}/asset-groups/{transfer}/lineage")
    with page.expect_response(lambda answer: "ReloadWorkspace" in (answer.request.post_data or "")):
        page.get_by_role("button", name="Reload definitions").click()


def materialize_all(page: Page, url: str, place: str) -> None:
    """Click "Materialize all", choose all rounds, and launch; ``place`` is the page of a group or of a job."""
    page.goto(f"{url}{LOCATION}/{place}")
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_role("button", name="All", exact=True).click()
    with page.expect_response(lambda answer: "launchPartitionBackfill" in (answer.request.post_data or "")):
        page.get_by_role("button", name="Launch backfill").click()
