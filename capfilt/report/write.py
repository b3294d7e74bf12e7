"""Reporting: count a run, render the page, write both."""

from __future__ import annotations

import json

from capfilt.report.counts import ReportOptions, gather, summary
from capfilt.run import Run
from capfilt.select.choose import read_account, scored_parts, survey
from capfilt.select.policies import SelectConfig


def report(run: Run, options: ReportOptions | None = None) -> str:
    """Write report.html and report.json; returns where the page is. ValueError if nothing is scored yet."""
    from capfilt.report.page import Cards, render

    options = options or ReportOptions()
    if not scored_parts(run):
        raise ValueError(f"{run.where}: nothing is scored yet; run `{run.command('score')}` first")
    account = read_account(run, options.select) if options.select else {}
    config = SelectConfig(**account.get("settings", {}))
    whole = survey(run, scored_parts(run), config)
    numbers = gather(run, config, whole, options)
    content = {**summary(run, config, numbers), "concepts": account.get("concepts")}
    page = render(run, numbers, content, Cards(run, config, whole), options)
    from capfilt.store.storage import open_storage

    storage = open_storage(options.to) if options.to else run.storage
    folder = "" if options.to else f"report/{options.select or 'at-half'}/"
    storage.write(f"{folder}report.json", (json.dumps(content, indent=1) + "\n").encode())
    storage.write(f"{folder}report.html", page.encode())
    return f"{storage.root}/{folder}report.html"
