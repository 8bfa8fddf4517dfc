"""Packages that only some evaluations need: the extra `evaluation` of agsel."""

from __future__ import annotations

from importlib import import_module

from agsel.errors import UserError


def require_extra(module: str, setting: str) -> None:
    """Refuse a setting without the package that it needs.

    Args:
        module: of the package, `lm_eval` of lm-eval.
        setting: that needs it.

    Raises:
        UserError: names the package.
    """
    try:
        import_module(module)
    except ImportError as error:
        package = module.replace("_", "-")
        raise UserError(f"{setting} needs {package}, {error}: pip install 'agsel[evaluation]'") from error
