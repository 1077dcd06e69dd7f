"""CUDA graphs by torch, for `bmsn.engine`: one memory pool for all of them, since no two ever run at the same time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bmsn.engine import GraphMemoryError


class CudaGraphs:
    """Records steps on one GPU. What a graph allocates while it is recorded stays its own to the end of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # captures cannot run on the default stream

    def capture(self, warm_up: Callable[[], None], step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # What a first call sets up (libraries, compiled kernels, autograd's threads) must not be recorded.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                warm_up()
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            torch.cuda.synchronize(self._device)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                step()
        except RuntimeError as error:
            # Ending a capture that ran out of memory raises an error of its own, in the context of the first.
            first = error if isinstance(error, torch.OutOfMemoryError) else error.__context__
            if not isinstance(first, torch.OutOfMemoryError):
                raise
            free, total = torch.cuda.mem_get_info(self._device)
            held = torch.cuda.memory_reserved(self._device)
            raise GraphMemoryError(
                f"more than {(held + free) / 2**30:.2f} GiB were needed, the GPU has {total / 2**30:.2f} GiB "
                f"({str(first).splitlines()[0]})"
            ) from error
        return graph
