"""`pytest benchmarks`: the CPU suites under pytest-benchmark; its JSON is kept in .benchmarks."""

from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the shapes of the record, not small ones")
    parser.addoption("--rehearse", action="store_true", help="tiny shapes, to try it out")


def pytest_configure(config):
    if config.pluginmanager.hasplugin("benchmark") and not config.option.benchmark_json:
        config.option.benchmark_autosave = True
