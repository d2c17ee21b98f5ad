"""What each command of ``composer-gpt2`` takes, and the function that Python can call as well.

Heavy imports are inside the commands, so that ``--help`` answers at once.
"""

__all__: list[str] = []
