"""The benchmark of a training step on CPUs: everybody else's GPT-2, ours, and what is possible.

``composer-gpt2 bench`` is :func:`composer_gpt2.bench.program.run_bench`. What it measures is in
``contestants.py`` and ``ceiling.py``, how in ``worker.py``, what it says in ``report.py``.
"""

__all__: list[str] = []
