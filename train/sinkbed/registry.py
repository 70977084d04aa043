"""Variants of a part by name: each a module of one folder that no other module knows of.

A new variant is one file in that folder, named as the variant, which registers what it defines. One from elsewhere,
such as a notebook, registers itself too, before its name is used.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, TypeVar, get_args, get_origin

from sinkbed.plain_text import did_you_mean

V = TypeVar("V")

Choice = str | dict[str, Any]
"""A variant by name, or `{name: {option: value, …}}`."""


class Registry:
    """The variants of one part. A variant is called with what the part is made from, and with its own options."""

    def __init__(self, key: str, package: str) -> None:
        """Make an empty one.

        Args:
            key: of the config, for messages.
            package: folder of the variants; they are imported when they are asked for.
        """
        self.key, self.package = key, package
        self._variants: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[V], V]:
        """Decorator: have a name mean what is decorated."""

        def decorate(variant: V) -> V:
            self._variants[name] = variant
            return variant

        return decorate

    @property
    def names(self) -> list[str]:
        """Every variant there is; imports none."""
        spec = find_spec(self.package)
        assert spec is not None and spec.submodule_search_locations is not None
        return sorted({*self._variants, *(module.name for module in iter_modules(spec.submodule_search_locations))})

    def __getitem__(self, choice: Choice) -> Any:
        """The variant that is chosen. Raises ValueError for a name that is none's."""
        name = self.name_of(choice)
        if name not in self._variants:
            import_module(f"{self.package}.{name}")
        if name not in self._variants:
            raise ValueError(
                f"{self.package}.{name}: expected a variant registered under the name of its file, {name!r}, got none; "
                "rename one of them"
            )
        return self._variants[name]

    def name_of(self, choice: Choice) -> str:
        """The name that is chosen. Raises ValueError for one that is none's; imports no variant."""
        name = next(iter(choice), None) if isinstance(choice, dict) and len(choice) == 1 else choice
        if not isinstance(name, str) or name not in self.names:
            raise ValueError(
                f"{self.key}: expected one of {', '.join(self.names)}, or {{name: {{option: value}}}} with its "
                f"options; got {choice!r}{did_you_mean(str(name), self.names)}"
            )
        return name

    def options(self, choice: Choice) -> dict[str, Any]:
        """Option of the chosen variant -> the type that it is annotated with or that its default has."""
        parameters = inspect.signature(self[choice], eval_str=True).parameters.values()
        return {p.name: _kind_of(p) for p in parameters if p.kind is p.KEYWORD_ONLY}

    def __str__(self) -> str:
        """Every variant with its options, for a help; imports them."""
        options = {name: ", ".join(self.options(name)) for name in self.names}
        return ", ".join(f"{name} ({of_it})" if of_it else name for name, of_it in options.items())

    def check(self, choice: Choice) -> dict[str, Any]:
        """The options of a choice.

        Raises ValueError for what chooses no variant, for an option that it lacks, and for one whose value is not of
        the type that it is annotated with or that its default has.
        """
        name = self.name_of(choice)
        options = (choice[name] or {}) if isinstance(choice, dict) else {}
        if not options:
            return {}
        if not isinstance(options, dict):
            raise ValueError(f"{self.key}.{name}: expected {{option: value}}, got {options!r}")
        known = self.options(choice)
        for option, value in options.items():
            if option not in known:
                raise ValueError(
                    f"{self.key}: expected options of {name} ({', '.join(known) or 'none'}); got {option!r}"
                    f"{did_you_mean(option, known)}"
                )
            if not _is_of(value, known[option]):
                kind = inspect.formatannotation(known[option])
                raise ValueError(f"{self.key}.{name}.{option}: expected {kind}, got {value!r}")
        return {option: float(value) if known[option] is float else value for option, value in options.items()}

    def make(self, choice: Choice, *arguments: Any) -> Any:
        """What a variant makes of `arguments` and its options.

        Raises ValueError for a variant that is made from others, and as `check`.
        """
        variant, options = self[choice], self.check(choice)
        signature = inspect.signature(variant)
        try:
            signature.bind(*arguments, **options)
        except TypeError as error:
            raise ValueError(
                f"{self.package}.{self.name_of(choice)}: expected a variant that is called with {len(arguments)} "
                f"arguments and options, as the folder's __init__.py says, got {signature} ({error})"
            ) from None
        return variant(*arguments, **options)


def _kind_of(parameter: inspect.Parameter) -> Any:
    """What an option is annotated with; of one without an annotation what its default tells."""
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    kind = type(parameter.default)
    return kind if kind in (bool, int, float, str) else Any


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as far as that is a plain one or a tuple of those, which YAML writes as a list."""
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return isinstance(value, list | tuple) and len(value) == len(kinds) and all(map(_is_of, value, kinds))
    return kind not in (int, float, str, bool) or type(value) is kind or (kind, type(value)) == (float, int)


def plain(choice: Choice) -> Choice:
    """A choice without options as its name alone, tuples as lists: what means the same is the same."""
    if not isinstance(choice, dict) or len(choice) != 1:
        return choice
    [(name, options)] = choice.items()
    if not options:
        return name
    if not isinstance(options, dict):
        return choice
    return {name: {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}}
