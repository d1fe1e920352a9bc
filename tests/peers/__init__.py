"""Peers' own tests with this package in place: ``make test-peers PEERS=folder``.

The folder has checkouts, ``trl`` or ``Liger-Kernel`` or both. Nothing is fetched: tests that ask a
hub for a model get a tiny one made here, or fail as they do without us and are not counted.

- __main__.py: runs each suite twice, as it is and patched, and lists what that changed
- hub.py: the models and data sets that TRL's tests name, made in code
- plugin: a pytest plugin that patches, counts calls and writes the outcomes
- results.md: the last list
"""
