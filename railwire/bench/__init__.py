"""`railwire bench`: the same work by Railwire, by plain sockets or memcpy, and by other engines, side by side.

* `work.py`, `buffers.py`, `runner.py` and the `*_runner.py` modules run in the measured processes. They need the
  standard library, numpy and the contender itself, nothing else, so that a contender may live in another environment.
* `bench/rivals` of the repository has other projects' engines, the vendors' programs and a bare libfabric loop. It is
  not in the wheel.
* `contenders.py`, `process.py` and `measure.py` start those processes and take the figures.
* `report.py` and `plot.py` show them; `engine_bench.py` measures the engine without any transport.
"""
