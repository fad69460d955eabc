"""Deprecation warnings caused by our own code fail the tests; those of other packages do not."""

from __future__ import annotations

import warnings

import pytest


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["revmux", "revmux.serving.engine", "ray_jobs.train", "serve_app.web"])
def test_a_deprecation_in_our_own_code_is_an_error(module: str, category: type[Warning]) -> None:
    with pytest.raises(category, match="old"):
        warnings.warn_explicit("old", category, f"{module}.py", 1, module=module)


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["transformers.models", "revmux_plugin", "torch.revmux"])
def test_a_deprecation_elsewhere_is_ignored(module: str, category: type[Warning]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("old", category, f"{module}.py", 1, module=module)
    assert not seen


def test_a_warning_is_attributed_to_its_caller() -> None:
    """A library that deprecates a function attributes the warning to its caller, which is our module."""
    code = compile("def call(function):\n    function()\n", "caller.py", "exec")

    def deprecated() -> None:
        warnings.warn("old", DeprecationWarning, stacklevel=2)

    for module, raises in (("revmux.caller", True), ("elsewhere", False)):
        scope: dict = {"__name__": module}
        exec(code, scope)
        if raises:
            with pytest.raises(DeprecationWarning, match="old"):
                scope["call"](deprecated)
        else:
            scope["call"](deprecated)
