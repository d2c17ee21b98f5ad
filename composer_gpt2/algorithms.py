"""The speedup algorithms: ``from composer_gpt2.algorithms import ...``.

They live in the top-level package ``algorithms``, one folder each. That is a common name, so this
module makes sure that it is ours.
"""

from __future__ import annotations

from pathlib import Path

import algorithms

__all__: list[str] = []

_ours = Path(__file__).parent.with_name("algorithms")
_found = [Path(folder) for folder in algorithms.__path__]
if not any(folder.samefile(_ours) for folder in _found if folder.exists()):
    raise ImportError(
        f"the package 'algorithms' must be composer-gpt2's, in {_ours}, got "
        f"{', '.join(map(str, _found))}: another distribution or a folder on the path has that "
        "name; uninstall it or put composer-gpt2 first on the path."
    )
