"""Every router in every mode, with levels that skip something in the test structures."""

from collections.abc import Callable

import torch
from routing_helpers import as_data, exact_model, slab_atoms
from torch_geometric.data import Batch

from equiformer2.pruning.routing import (
    ActiveRegion,
    AtomPruner,
    BaseRouter,
    DegreeRouter,
    DistanceRouter,
    EdgePruner,
    FrozenPlan,
    FTPRouter,
    RandomRouter,
    StaticRouter,
    with_thresholds,
)

SCORED: dict[str, Callable[[], BaseRouter]] = {
    "static": lambda: StaticRouter(0.4),
    "distance": lambda: DistanceRouter(0.4),
    "degree": lambda: DegreeRouter(0.4),
    "random": lambda: RandomRouter(0.4, seed=1),
    "ftp": lambda: ftp(),
    "atom pruner": lambda: AtomPruner(0.4),
    "edge pruner": lambda: EdgePruner(0.4),
}
LOCAL_MODES = ("threshold", "smooth")


def ftp(**options: object) -> FTPRouter:
    """Untrained, with weights that keep some atoms and skip others."""
    router = FTPRouter(0.4, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in router.mlp.parameters():
            parameter.copy_(0.8 * torch.randn(parameter.shape, generator=generator))
    return router


def routers() -> dict[str, BaseRouter]:
    """All of them by name."""
    model = exact_model()
    calibration = [Batch.from_data_list([as_data(slab_atoms(0.1)), as_data(slab_atoms(0.05, "CO"))])]
    out: dict[str, BaseRouter] = {}
    for name, make in SCORED.items():
        out[f"{name} topk"] = make()
        for mode in LOCAL_MODES:
            out[f"{name} {mode}"] = local(make(), model, calibration, mode)
    out["head filter"] = AtomPruner(0.4).with_head_filter(model, calibration)
    out["keep free"] = AtomPruner(0.5, keep_free=True)
    out["context only"] = ActiveRegion("context_only")
    out["remove tag 0"] = ActiveRegion("remove_tag0")
    out["supernode"] = ActiveRegion("supernode")
    out["supernode per element"] = ActiveRegion("supernode_per_element")
    out["frozen"] = FrozenPlan(StaticRouter(0.4), replan_every=3)
    return out


def local(router, model, calibration, mode):  # type: ignore[no-untyped-def]
    """With thresholds in place of budgets."""
    width = 0.1 if isinstance(router, EdgePruner) else 0.3
    found = with_thresholds(router, model, calibration, mode, width=width)
    if isinstance(found, FTPRouter):
        # The median probability of the untrained router.
        return type(found)(**found.settings() | {"cut": 0.62 if mode == "threshold" else 0.45})
    return found
