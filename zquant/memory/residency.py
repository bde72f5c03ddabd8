"""Where the weights of a network are while it runs: carries out one network's part of a plan.

Resident blocks are placed once, streamed blocks come and go through slots, and visitors (what runs
once per prompt or schedule) are brought for one use. On a CPU a resident block is the mapped file
itself, or expanded to the compute dtype where the plan has the room.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from zquant.formats.names import Part
from zquant.layers.linear import QuantLinear
from zquant.memory.lanes import Lanes
from zquant.memory.layout import BlockLayout, layout_of
from zquant.memory.plan import NetworkPlan
from zquant.memory.sizes import ADALN, cycle_of, visitors_of
from zquant.memory.stream import BlockStream, StreamReport
from zquant.models.build import packed
from zquant.models.dit import DiT
from zquant.models.text_encoder import TextEncoder
from zquant.quant.floats import FLOAT_DTYPES
from zquant.quant.qtypes import QTYPES
from zquant.quant.scaled import dequantize_scaled

__all__ = ["Residency"]


class Residency:
    """Places the weights of `network`, which takes them through its `weights` hook.

    Args:
        network: loaded, but for the linear weights of its blocks.
        parts: official tensor name -> stored tensor.
        plan: which blocks stay and which are streamed.
        lanes: of the network's device.
        device: of the network.
        dtype: of expanded blocks.

    Raises:
        FormatError: a file became shorter.
    """

    def __init__(
        self,
        network: DiT | TextEncoder,
        parts: Mapping[str, Part],
        plan: NetworkPlan,
        lanes: Lanes,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._device, self._dtype = device, dtype
        names = cycle_of(network)
        blocks = {name: layout_of(network, name, parts, without=ADALN) for name in names}
        self._visitors = {name: layout_of(network, name, parts) for name in visitors_of(network)}
        self._resident: set[str] = set()
        streamed = []
        for i, name in enumerate(names):
            if i in plan.streamed:
                streamed.append(name)
                continue
            self._resident.add(name)
            self._settle(blocks[name], expanded=i in plan.expanded)
        self._layouts = blocks
        self._index = {name: i for i, name in enumerate(streamed)}
        self._stream = None
        if streamed:
            assert plan.shape is not None
            self._stream = BlockStream([blocks[n] for n in streamed], plan.shape, lanes)
        network.weights = self.using

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """The weights of `name` are in place while this is entered."""
        if name in self._resident:
            yield
        elif name in self._visitors:
            layout = self._visitors[name]
            layout.place(self._copied(layout))
            try:
                yield
            finally:
                layout.remove()
        else:
            assert self._stream is not None
            layout = self._layouts[name]
            with self._stream.using(self._index[name]) as slot:
                layout.place(slot)
                try:
                    yield
                finally:
                    layout.remove()

    @property
    def report(self) -> StreamReport | None:
        """What the stream has moved; None without one."""
        return self._stream.report if self._stream else None

    def close(self) -> None:
        """End the stream; blocks that were streamed have no weights after it."""
        if self._stream is not None:
            self._stream.close()

    def _copied(self, layout: BlockLayout) -> Tensor:
        """The block's buffer on the device, read from the file now."""
        flat = np.empty(layout.n_bytes, np.uint8)
        layout.read_into(flat)
        return torch.from_numpy(flat).to(self._device)

    def _settle(self, layout: BlockLayout, *, expanded: bool) -> None:
        """Place a resident block for good."""
        if self._device.type != "cpu":
            layout.place(self._copied(layout))
            return
        for entry in layout.entries:
            if expanded:
                self._expand(entry.linear, entry.part)
            else:
                entry.linear.place(packed(entry.part))

    def _expand(self, linear: QuantLinear, part: Part) -> None:
        stored = np.empty(part.nbytes, np.uint8)
        part.read_into(0, stored)
        rows = torch.from_numpy(stored).view(part.shape[0], -1)
        qtype = next(QTYPES[q] for q, dtype in FLOAT_DTYPES.items() if dtype == self._dtype)
        weights = dequantize_scaled(rows, part.qtype, self._dtype, part.scaling)
        linear.load(weights.view(torch.uint8), qtype)
