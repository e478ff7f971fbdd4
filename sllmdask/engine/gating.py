"""Running a model whose weights are still on their way: each module waits for its own, and for nothing else.

While a checkpoint is read in the order of execution, the first forward pass follows the reader layer by layer. A thread waits
for one stage after the other, converts what is in another dtype or belongs on another device, and opens the stage. The forward
pass waits for that thread, not for the reader, so it can be called off at any time.

Source of the idea: PipeSwitch (OSDI '20), pipelined model transmission.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sllmdask.engine.construct import Filling, Piece
from sllmdask.engine.shortage import is_shortage, not_enough
from sllmdask.errors import Cancelled, EngineError, LoadFailed, SllmError

#: Blocks until the tensors of these names in the checkpoint are there; raises what the load has failed of.
Wait = Callable[[Collection[str]], None]

#: Makes a module ready to run, once its weights are there.
Prepare = Callable[[torch.nn.Module], None]


class ArrivalGate:
    """Holds each module of `filling` back until its weights are there.

    :param wait: called in a thread of the gate's own, for one stage after the other
    :param convert: puts a piece into the model, on that thread, before its stage opens
    :param place: puts a parameter that was fused into the model, in the same way
    :param source: names the checkpoint in errors
    :param prepare: does what is left to do for a module, on that thread, before its stage opens
    :param device: where the weights go, for those who are told that there is no room; ``None``: host memory
    """

    def __init__(
        self,
        filling: Filling,
        wait: Wait,
        convert: Callable[[Piece], None],
        place: Callable[[Tensor, Sequence[str]], None],
        source: str,
        prepare: Prepare | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._wait = wait
        self._convert = convert
        self._place = place
        self._source = source
        self._prepare = prepare
        self._device = device
        self._modules = filling.modules
        self._awaited = filling.awaited
        self._pieces = list(filling.pieces)
        self._fusions = list(filling.fusions)
        self._sources = [filling.sources(stage) for stage in range(len(filling.awaited))]
        #: How many stages are open.
        self._n_open = 0
        #: Seconds that the forward pass has waited.
        self.waited_s = 0.0
        self._error: SllmError | None = None
        self._changed = threading.Condition()
        #: Held while weights are converted: nothing reads the lent memory after :meth:`close`.
        self._converting = threading.Lock()
        self._on_end: Callable[[], None] | None = None
        self._handles = [
            module.register_forward_pre_hook(partial(self._hold, stage)) for stage, module in enumerate(filling.modules)
        ]
        threading.Thread(target=self._follow, name="sllmdask-arrivals", daemon=True).start()

    @property
    def ended(self) -> bool:
        """All has arrived, or it never will."""
        return self._n_open == len(self._awaited) or self._error is not None

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, on any thread, when the gate has :attr:`ended`."""
        with self._changed:
            if not self.ended:
                self._on_end = callback
                return
        callback()

    def raise_failure(self) -> None:
        """Raise what the load has failed of, if it has; each time anew."""
        if self._error is not None:
            raise type(self._error)(*self._error.args)

    def cancel(self) -> None:
        """Make everything that waits raise :class:`Cancelled`. From any thread."""
        self._fail(Cancelled("the model was unloaded while it was being loaded"))

    def close(self) -> None:
        """Hold nobody back any more, and leave the lent memory alone. On the thread that runs the model."""
        self.cancel()
        for handle in self._handles:
            handle.remove()
        with self._converting:
            self._pieces.clear()
            self._fusions.clear()
            self._sources.clear()

    def _hold(self, stage: int, _module: torch.nn.Module, _inputs: Any) -> None:
        if self._n_open > stage:
            return
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._n_open > stage or self._error is not None)
        self.waited_s += time.perf_counter() - started
        if self._n_open <= stage:
            self.raise_failure()

    def _follow(self) -> None:
        try:
            for stage, names in enumerate(self._awaited):
                if not self._fuse(stage):
                    return
                self._wait(names)
                with self._converting:
                    if self._error is not None:
                        return
                    for fusion in self._fusions[stage]:
                        for name, tensor in fusion.finish().items():
                            self._place(tensor, (name,))
                    for piece in self._pieces[stage]:
                        self._convert(piece)
                    self._pieces[stage] = self._fusions[stage] = ()
                    if self._prepare is not None:
                        self._prepare(self._modules[stage])
                with self._changed:
                    self._n_open = stage + 1
                    self._changed.notify_all()
        except SllmError as error:
            self._fail(type(error)(*error.args))
        except OSError as error:
            self._fail(LoadFailed(self._source, str(error)))
        except Exception as error:  # noqa: BLE001 - raised by whoever waits
            if is_shortage(error):
                self._fail(not_enough(self._source, error, self._device))
            else:
                self._fail(EngineError(f"{self._source!r} could not be built: {error!r}"))
        self._tell()

    def _fuse(self, stage: int) -> bool:
        """Copy what belongs to a larger parameter of the stage as soon as it is there; ``False`` if that was called off."""
        for name, fusion in self._sources[stage] if self._error is None else ():
            self._wait((name,))
            with self._converting:
                if self._error is not None:
                    return False
                fusion.take(name)
        return True

    def _fail(self, error: SllmError) -> None:
        with self._changed:
            if not self.ended:
                self._error = error
            self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            callback, self._on_end = (self._on_end, None) if self.ended else (None, self._on_end)
        if callback is not None:
            callback()
