"""Implementations of the hot operations, and what each of them can do (table in docs/kernels.md).

- `torch`: oneDNN, BLAS or cuBLAS and chunked loops that store little; any device and precision.
- `cpp`: the same with the C++ kernels of `kernels.cpu` between the GEMMs; CPUs, with a C++ compiler at hand.
- `compile`: plain expressions, for `torch.compile` to fuse; the network is compiled as a whole.
- `triton`: the kernels of `kernels.gpu` between cuBLAS GEMMs; NVIDIA GPUs.

The name `auto`, the default of a network, stands for `cpp` on a CPU where it can be had, else for `torch`.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.kernels import gpu
from equiformer2.kernels.cpu import library

PARAMETER_DTYPES = (torch.float32, torch.float64)


class Neighbors(NamedTuple):
    """Both directions of the edges, for sums without atomic additions.

    Attributes:
        source_order: `[E]` edges in the order of their sources.
        source_starts: `[N + 1]` first edge of every source in that order.
        target_starts: `[N + 1]` first edge of every target.
    """

    source_order: Tensor
    source_starts: Tensor
    target_starts: Tensor

    @classmethod
    def from_edges(cls, edge_index: Tensor, num_atoms: int) -> "Neighbors":
        """Group the edges `edge_index [2, E]`, which are sorted by target."""
        source_order, source_starts = gpu.csr(edge_index[0], num_atoms)
        return cls(source_order, source_starts, gpu.segment_starts(edge_index[1], num_atoms))


@dataclass(frozen=True)
class Backend:
    """One implementation of the hot operations; it holds no parameters and no state.

    Attributes:
        name: as the user gives it.
        position_gradients: has derivatives with respect to the edge frames, and so to positions.
        routing: can compute some of the atoms and edges alone.
        denoising: can encode forces (`model.denoising`).
        observing: calls every module, so that its hooks run.
        partial: can begin a pass at a later block (`model.routing.Prefix`).
        gradient_force_limit: the reason, as a clause, why forces cannot be the gradient of the energy; empty
            where they can.
    """

    name: str
    position_gradients: bool = True
    routing: bool = True
    denoising: bool = True
    observing: bool = True
    partial: bool = True
    gradient_force_limit: str = ""

    def takes_cpp(self, dtype: torch.dtype) -> bool:
        """Choose the C++ kernels for GEMM operands of `dtype`; they do not take float16."""
        return self is CPP and dtype in library.DTYPES

    def takes_expressions(self, differentiated_frames: bool = False) -> bool:
        """Choose plain expressions, which every transformation goes through.

        Args:
            differentiated_frames: the edge frames require gradients.
        """
        return self is COMPILE or (differentiated_frames and torch.is_grad_enabled())

    def unavailable_reason(
        self, device: torch.device, dtype: torch.dtype, lmax: int, mmax: int, position_gradients: bool = False
    ) -> str | None:
        """Reason, as half a sentence, why it cannot run here; None if it can.

        Args:
            device, dtype: of the parameters.
            lmax, mmax: L and M.
            position_gradients: derivatives flow to positions through the edge frames.
        """
        if dtype not in PARAMETER_DTYPES:
            # Distances would be off by hundredths of an Å, and the steps of an optimizer lost in rounding.
            return (
                f"the parameters are {str(dtype).removeprefix('torch.')}, and geometry, norms and sums need "
                "float32 or float64: keep them so and round the matrix products alone, with torch.autocast"
            )
        if self is CPP:
            return library.LIBRARIES.unavailable_reason(device, dtype, lmax, mmax)
        if self is COMPILE:  # inductor writes C++ for a CPU and Triton for a GPU
            if device.type == "cpu" and library.Compiler.find() is None:
                return library.NO_COMPILER
            if device.type == "cuda" and find_spec("triton") is None:
                return "Triton is not installed"
        if self is TRITON:
            return gpu.supports(device, dtype, lmax, mmax, position_gradients)
        return None


TORCH = Backend("torch")
CPP = Backend(
    "cpp",
    gradient_force_limit="the backend 'cpp' has no derivatives with respect to the edge frames",
)
COMPILE = Backend(
    "compile",
    routing=False,
    denoising=False,
    observing=False,
    partial=False,
    gradient_force_limit="the backend 'compile' cannot be differentiated twice",
)
TRITON = Backend(
    "triton",
    position_gradients=False,
    routing=False,
    gradient_force_limit="the backend 'triton' has no derivatives with respect to the edge frames",
)
BACKENDS = {backend.name: backend for backend in (TORCH, CPP, COMPILE, TRITON)}
BACKEND_NAMES = ("auto", *BACKENDS)


class Shape(Protocol):
    """The fields of `ModelConfig` that decide which backends can run a network."""

    @property
    def lmax(self) -> int:
        """Highest degree L."""

    @property
    def mmax(self) -> int:
        """Highest order M."""

    @property
    def forces(self) -> str:
        """`direct`, `gradient` or `none`."""


class Features(NamedTuple):
    """Abilities that a run asks of its backend, beside outputs and the gradients of parameters.

    Attributes:
        position_gradients: outputs are differentiated with respect to positions.
        routing: blocks compute some of the atoms or edges alone.
        denoising: forces are encoded (`model.denoising`).
        observing: hooks of the modules inside the network are to run.
        partial: the pass begins at a later block, or hands out what another one can begin with.
    """

    position_gradients: bool = False
    routing: bool = False
    denoising: bool = False
    observing: bool = False
    partial: bool = False


NOTHING_MORE = Features()


def resolve(name: str, config: Shape, device: torch.device, dtype: torch.dtype) -> Backend:
    """Find the backend of that name; `auto` becomes `cpp` or `torch`.

    Raises:
        InputError: no backend has that name.
    """
    if name not in BACKEND_NAMES:
        known = ", ".join(BACKEND_NAMES)
        raise InputError(f"the backend {name!r} cannot be used: known are {known}")
    if name != "auto":
        return BACKENDS[name]
    if config.forces == "gradient":
        return TORCH
    return TORCH if CPP.unavailable_reason(device, dtype, config.lmax, config.mmax) else CPP


def validate(
    name: str, config: Shape, device: torch.device, dtype: torch.dtype, features: Features
) -> Backend:
    """Refuse, before the first step, what a backend cannot do.

    Args:
        name: one of `BACKEND_NAMES`.
        config: of the network.
        device, dtype: of its parameters.
        features: what the run will ask for.

    Returns:
        The backend, which for `auto` is `cpp` or `torch`.

    Raises:
        InputError: the backend is unknown, cannot run on this machine, or lacks one of `features`.
    """
    backend = resolve(name, config, device, dtype)
    if config.forces == "gradient":
        if features.routing:
            raise InputError(
                "this network's forces are the gradient of its energy, which jumps where other atoms or "
                "edges are skipped: leave out the router or the masks"
            )
        if features.partial:
            raise InputError("gradient forces need the whole network: leave out start and keep")
        if backend.gradient_force_limit:
            raise InputError(
                f"{backend.gradient_force_limit}, which gradient forces (model.forces) need: "
                "use the backend 'auto' or 'torch'"
            )
    if features.routing and not backend.routing:
        raise InputError(
            f"the backend {name!r} updates all atoms in every block: use the backend 'auto' to skip some"
        )
    if features.denoising and not backend.denoising:
        raise InputError(f"the backend {name!r} encodes no forces: use the backend 'auto' for denoising")
    if features.observing and not backend.observing:
        raise InputError(f"the backend {name!r} runs no hooks: use the backend 'auto' to observe or mask")
    if features.partial and not backend.partial:
        raise InputError(f"the backend {name!r} runs whole passes alone: use the backend 'auto' for parts")
    reason = backend.unavailable_reason(device, dtype, config.lmax, config.mmax, features.position_gradients)
    if reason is not None:
        raise InputError(f"the backend {name!r} cannot be used: {reason}")
    return backend
