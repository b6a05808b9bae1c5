"""Route tokens: skip atoms and edges, block by block, by the structure and the attention of the network.

`make_router` finds a router for a target, `load_router` reads one. A router is called like the network,
`router(model, batch)`.
"""

from equiformer2.pruning.routing.active_region import ActiveRegion
from equiformer2.pruning.routing.computed_shares import ComputedShares, CountingRouter
from equiformer2.pruning.routing.frozen_plan import FrozenPlan
from equiformer2.pruning.routing.ftp import FTPRouter
from equiformer2.pruning.routing.ftp_training import RouterLosses, RouterTraining, train_router
from equiformer2.pruning.routing.geometric_routers import (
    DegreeRouter,
    DistanceRouter,
    RandomRouter,
    StaticRouter,
)
from equiformer2.pruning.routing.route_request import RouteRequest, RouteResult, make_router
from equiformer2.pruning.routing.router import BaseRouter, BaseRouting, ScoreRouter
from equiformer2.pruning.routing.router_files import (
    batched_relaxation_router,
    evaluation_router,
    load_router,
    relaxation_router,
    save_router,
)
from equiformer2.pruning.routing.router_search import ROUTING_METHODS, RoutingSettings, find_router
from equiformer2.pruning.routing.schedule_objective import RoutedModel, ScheduleObjective
from equiformer2.pruning.routing.sparsity_schedule import (
    Schedule,
    TargetMissedError,
    search_schedule,
    uniform_schedule,
)
from equiformer2.pruning.routing.thresholds import with_thresholds
from equiformer2.pruning.routing.zero_tprune import AtomPruner, EdgePruner

__all__ = [
    "ROUTING_METHODS",
    "ActiveRegion",
    "AtomPruner",
    "BaseRouter",
    "BaseRouting",
    "ComputedShares",
    "CountingRouter",
    "DegreeRouter",
    "DistanceRouter",
    "EdgePruner",
    "FTPRouter",
    "FrozenPlan",
    "RandomRouter",
    "RouteRequest",
    "RouteResult",
    "RoutedModel",
    "RouterLosses",
    "RouterTraining",
    "RoutingSettings",
    "Schedule",
    "ScheduleObjective",
    "ScoreRouter",
    "StaticRouter",
    "TargetMissedError",
    "batched_relaxation_router",
    "evaluation_router",
    "find_router",
    "load_router",
    "make_router",
    "relaxation_router",
    "save_router",
    "search_schedule",
    "train_router",
    "uniform_schedule",
    "with_thresholds",
]
