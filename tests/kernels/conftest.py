"""Kernels are interpreted in two thirds of the time."""

import os
from types import FunctionType

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    patch, load = interpreter._patch_lang, tl.load

    def patch_once(function: FunctionType) -> object:
        """Leave the language as it is where the kernel that calls the function has patched it."""
        globals_ = function.__globals__.values()
        if any(item.load is load for item in globals_ if item is tl or item is tl.core):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
