"""What several benchmarks use.

``python benchmarks/bench_NAME.py`` puts ``benchmarks/`` on the path, so that scripts import ``support``. Tests import
the same files as ``benchmarks.support``. The files import each other relatively, so that both work.
"""
