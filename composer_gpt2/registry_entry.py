"""A name of the registry: the class it stands for, and whether a recipe's arguments suit it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from composer_gpt2.arguments import Limit, nearest, problem, type_hints

__all__ = ["KINDS", "ArgumentMistake", "Entry", "Kind"]

Kind = Literal["optimizers", "schedulers", "algorithms", "callbacks", "loggers"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)


class ArgumentMistake(NamedTuple):
    """One thing wrong with the arguments of an entry."""

    argument: str | None
    """The argument's name; ``None`` where it is about the entry as a whole."""
    message: str


@dataclass(frozen=True)
class Entry:
    """A name, and the class it stands for."""

    kind: Kind
    name: str
    path: str
    """``module:Class``."""
    distribution: str = "composer-gpt2"
    """The package that registered the name."""
    requires: str | None = None
    """A package that must be installed; its module has the same name."""
    required: tuple[str, ...] = ()
    """Arguments that a recipe must give although the class has a default."""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    """What values must keep to beyond their types."""

    def load(self) -> Callable[..., Any]:
        """Imports the class.

        Raises:
            ImportError: It cannot be imported; the message names the package at fault.
        """
        module, _, attribute = self.path.partition(":")
        try:
            return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
        except Exception as error:  # Importing another package runs its code: anything may happen.
            raise ImportError(
                f"must be importable from {self.path}, which the package {self.distribution} "
                f"registered, got {type(error).__name__}: {error}; reinstall or remove it"
            ) from error

    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments that a recipe may give, with types as annotations where they are known."""
        target = self.load()
        function = target.__init__ if inspect.isclass(target) else target
        if function.__module__ == "composer.core.callback":
            return {}  # Callback.__init__ swallows whatever it is given.
        hints = type_hints(function)
        return {
            name: parameter.replace(annotation=hints.get(name, Any))
            for name, parameter in inspect.signature(target).parameters.items()
            # The parameters of an optimizer are the model's.
            if (self.kind, name) != ("optimizers", "params")
            and parameter.kind is not inspect.Parameter.VAR_POSITIONAL
        }

    def check_arguments(self, arguments: Mapping[str, Any]) -> list[ArgumentMistake]:
        """All mistakes in the arguments that a recipe gives; none if they will be accepted.

        Optimizers, schedulers and algorithms are also built once, which is free and shows what only
        their constructors know. Callbacks and loggers are not: some touch the disk or the network.

        Args:
            arguments: Values as YAML has them.
        """
        if self.requires is not None and importlib.util.find_spec(self.requires) is None:
            # Through Composer's extra, which knows the versions it works with.
            extra = f"'mosaicml[{self.requires}]'"
            message = f"needs the package {self.requires}; run: pip install {extra}"
            return [ArgumentMistake(None, message)]
        try:
            parameters = self.parameters()
        except ImportError as error:
            return [ArgumentMistake(None, str(error))]
        mistakes = list(self._check_each(parameters, arguments))
        if not mistakes and self.kind in ("optimizers", "schedulers", "algorithms"):
            mistakes.extend(self._check_by_building(arguments))
        return mistakes

    def _check_each(
        self, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]
    ) -> Iterable[ArgumentMistake]:
        named = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        takes_any_name = len(named) < len(parameters)
        for name, value in arguments.items():
            if name in named:
                message = problem(value, parameters[name].annotation, self.limits.get(name))
                if message is not None:
                    yield ArgumentMistake(name, message)
            elif not takes_any_name:
                yield ArgumentMistake(
                    name,
                    f"is not an argument of {self.name}{nearest(name, named)}; "
                    f"it takes {', '.join(named) or 'none'}",
                )
        for name in named:
            needed = parameters[name].default is inspect.Parameter.empty or name in self.required
            if needed and name not in arguments:
                yield ArgumentMistake(name, f"is missing; {self.name} needs it")

    def _check_by_building(self, arguments: Mapping[str, Any]) -> Iterable[ArgumentMistake]:
        target = self.load()
        positional: list[Any] = []
        if self.kind == "optimizers":
            import torch

            positional = [[torch.nn.Parameter(torch.zeros(1))]]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # They are shown when it is built in earnest.
                target(*positional, **arguments)
        except Exception as error:  # Whatever it raises is its way to refuse its arguments.
            message = f"refuses its arguments: {type(error).__name__}: {error}"
            yield ArgumentMistake(None, message)
