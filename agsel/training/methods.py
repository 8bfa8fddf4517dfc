"""Methods on the command line: their classes by name, their settings as flags, and the policy that these describe."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any, get_type_hints

from agsel.errors import AgselError, UserError, one_line, suggestion
from agsel.policies import METHODS, Policy, flags_of

Field = dataclasses.Field[Any]


def policy_class(method: str) -> type[Policy]:
    """The class of a method: one of `METHODS`, or the one that `module:Class` names on the Python path.

    Raises:
        UserError: there is none.
    """
    if method in METHODS:
        return METHODS[method]
    module, colon, name = method.partition(":")
    if not colon:
        raise UserError(
            f"unknown method {method!r} (--method): use one of {', '.join(METHODS)}, or module:Class for a policy of "
            f"your own{suggestion(method, METHODS)}"
        )
    found = getattr(_imported(module, method), name, None)
    if not (inspect.isclass(found) and issubclass(found, Policy)):
        raise UserError(f"{method} (--method) is no subclass of agsel.Policy: name one, or use {', '.join(METHODS)}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise UserError(f"{method} (--method) does not define {missing}: define it, as agsel.Policy says")
    return found


def _imported(module: str, method: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"no module {module!r} (--method {method}) on the Python path: put its folder there, for example "
            "PYTHONPATH=. before the command"
        ) from error


def method_arguments(policy: type[Policy], taken: Collection[str]) -> type:
    """A dataclass of the settings of all methods for an argument parser, those of `policy` with its own defaults.

    Args:
        policy: the method of the run.
        taken: names of other settings; a field of such a name reads that one.
    """
    fields = [_argument(flag, *described) for flag, described in _all_flags(policy).items() if flag not in taken]
    namespace = {"_argument_group_name": "settings of the methods", "__doc__": "What the selection rules read."}
    return dataclasses.make_dataclass("MethodArguments", fields, kw_only=True, namespace=namespace)


def _all_flags(policy: type[Policy]) -> dict[str, tuple[type[Policy], Field]]:
    """Every setting of every method with the class that describes it: `policy`, else the first that reads it."""
    owners = (*reversed(METHODS.values()), policy)
    return {flag: (owner, field) for owner in owners for flag, field in flags_of(owner).items()}


def _argument(flag: str, owner: type[Policy], field: Field) -> tuple[str, Any, Field]:
    hint, follows = get_type_hints(owner)[field.name], field.metadata.get("follows")
    readers = [method for method, policy in METHODS.items() if flag in flags_of(policy)]
    text = field.metadata.get("help") or f"{field.name} of the policy."
    metadata = {"help": f"[{', '.join(readers) or owner.__name__}] {text}"}
    if field.default_factory is not dataclasses.MISSING:
        return flag, hint, dataclasses.field(default_factory=field.default_factory, metadata=metadata)
    default: Any = None if follows else field.default
    return flag, hint | None if follows else hint, dataclasses.field(default=default, metadata=metadata)


def unread(policy: type[Policy], names: Iterable[str]) -> list[str]:
    """Of the names of settings, those that belong to methods but are not read by this one."""
    return [name for name in names if name in _all_flags(policy) and name not in flags_of(policy)]


def build_policy(method: str, settings: Mapping[str, Any]) -> Policy:
    """The policy that the settings describe.

    Args:
        method: its name on the command line.
        settings: of the run, by their names.

    Raises:
        UserError: a setting is out of its range.
    """
    policy = policy_class(method)
    try:
        return policy(**{field.name: _value(flag, field, settings) for flag, field in flags_of(policy).items()})
    except AgselError:
        raise
    except (TypeError, ValueError) as error:  # of a policy from elsewhere
        raise UserError(f"{method} (--method) refuses its settings: {one_line(error)}") from error


def _value(flag: str, field: Field, settings: Mapping[str, Any]) -> Any:
    value, follows = settings[flag], field.metadata.get("follows")
    return settings[follows] if value is None and follows else value
