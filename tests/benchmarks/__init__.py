"""Measures this driver beside other clients: ``make bench``. docs/performance.md says what is measured and how.

A package, unlike the other folders of tests: a client runs in an environment that may have a ``tests`` of its own in
its site-packages (gmqtt's has), which would hide this one. So clients are started as ``benchmarks.…``, and all imports
in here are relative. Nothing that a client's or a server's process imports may need more than the standard library.
"""
