"""Python functions compiled by numba, without the GIL and without its compiler at run time where the code is kept on disk.

Code is kept in ``NUMBA_CACHE_DIR``, or where numba keeps such files; where none of these can be written, every process compiles
for itself. What Python cannot say is said in LLVM's own language (:func:`instruction`).
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_log = logging.getLogger(__name__)


class _Files(CompileResultCacheImpl):
    def __init__(self, function: Callable[..., Any]) -> None:
        self._sources = [Path(inspect.getfile(function)), Path(__file__)]
        super().__init__(function)

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        # numba writes the index before the code that it names. With one name for every version, a process that starts, or
        # a disk that fills up, in between would run the code of another version.
        version = hashlib.sha256(repr(cpu_target.target_context.codegen().magic_tuple()).encode())
        for source in self._sources:
            version.update(source.read_bytes())
        return f"{super().get_filename_base(fullname, abiflags)}-{version.hexdigest()[:16]}"


class _Cache(FunctionCache):
    """numba's cache on disk, for which a full disk or a file that was cut short is no reason to fail."""

    _impl_class = _Files

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except OSError as error:
            _log.debug("%r is compiled anew: %s", self, error)
        except (EOFError, pickle.UnpicklingError) as error:
            _log.debug("%r is compiled anew: its file is damaged (%s)", self, error)
            with suppress(OSError):
                self.flush()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _log.debug("%r is not kept: %s", self, error)


def kernel(function: Callable[..., Any]) -> Any:
    """`function`, to be compiled on its first call, to run without the GIL, and to be kept on disk where that is possible."""
    compiled = njit(nogil=True)(function)
    # RuntimeError: no directory can be written. OSError: the source cannot be read.
    with suppress(RuntimeError, OSError):
        compiled._cache = _Cache(function)
    return compiled


def instruction(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """A function of kernels, given by what makes LLVM's code for it: called with an LLVM builder and the arguments' values."""

    def declare(generate: Callable[..., Any]) -> Any:
        def lower(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return generate(builder, *arguments)

        # numba asks for names of the arguments: they are those of `generate`.
        @wraps(generate)
        def definition(_context: Any, *_types: Any) -> Any:
            return signature, lower

        return intrinsic(definition)

    return declare
