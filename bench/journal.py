"""A plugin for pytest (-p bench.journal) that writes down each test as it begins and ends, so that a crash or a hang loses one test only.

    --journal FILE       a line of JSON {"test", "outcome", "seconds", "message"} each; tests that FILE names already are left out
    --journal-part I/N   every N-th of the tests that are left, from the I-th on

After a failure the GPU is asked whether it still answers. If not, all later tests of the process would fail too: the session then ends.
"""

import json
import sys

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("journal")
    group.addoption("--journal", help="file of JSON lines")
    group.addoption("--journal-part", default="0/1", help="I/N")


def pytest_configure(config):
    if config.getoption("--journal"):
        config.pluginmanager.register(Journal(config), "journal")


def read_journal(path):
    """{test: its last line}."""
    try:
        with open(path, encoding="utf-8") as file:
            return {line["test"]: line for line in map(json.loads, file)}
    except FileNotFoundError:
        return {}


class Journal:
    def __init__(self, config):
        self.path = config.getoption("--journal")
        self.part, self.parts = map(int, config.getoption("--journal-part").split("/"))

    def write(self, test, outcome, seconds=0.0, message=""):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(test=test, outcome=outcome, seconds=round(seconds, 2), message=message)) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        known = read_journal(self.path)
        kept = [item for item in items[self.part :: self.parts] if item.nodeid not in known]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_collectreport(self, report):
        if report.failed:  # a package that is not there; other files go on
            lines = str(report.longrepr).strip().splitlines()
            self.write(report.nodeid, "failed", message=f"cannot be imported: {lines[-1] if lines else ''}"[:300])

    def pytest_runtest_logstart(self, nodeid):
        self.write(nodeid, "begun")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr or "")
            self.write(report.nodeid, report.outcome, report.duration, reason.strip()[:1000])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        torch = sys.modules.get("torch")
        if report.failed and torch is not None and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                item.session.shouldstop = f"the GPU does not answer any more after {item.nodeid}: {str(error).splitlines()[0]}"
        return report
