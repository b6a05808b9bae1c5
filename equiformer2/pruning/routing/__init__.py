"""Skip atoms and edges, block by block, by what the structure and the network say of them."""

from equiformer2.pruning.routing.achieved import Achieved, Recorder
from equiformer2.pruning.routing.active_region import ActiveRegion
from equiformer2.pruning.routing.frozen import FrozenPlan
from equiformer2.pruning.routing.ftp import FTPRouter
from equiformer2.pruning.routing.ftp_training import RouterLosses, RouterTraining, train_router
from equiformer2.pruning.routing.geometric_routers import (
    DegreeRouter,
    DistanceRouter,
    RandomRouter,
    StaticRouter,
)
from equiformer2.pruning.routing.router import BaseRouter, ScoreRouter
from equiformer2.pruning.routing.router_files import load_router, save_router
from equiformer2.pruning.routing.router_search import ROUTING_METHODS, RoutingSettings, find_router
from equiformer2.pruning.routing.schedule import (
    RoutedModel,
    Schedule,
    ScheduleObjective,
    TargetMissedError,
    search_schedule,
    with_levels,
)
from equiformer2.pruning.routing.thresholds import with_thresholds
from equiformer2.pruning.routing.zero_tprune import AtomPruner, EdgePruner

__all__ = [
    "ROUTING_METHODS",
    "Achieved",
    "ActiveRegion",
    "AtomPruner",
    "BaseRouter",
    "DegreeRouter",
    "DistanceRouter",
    "EdgePruner",
    "FTPRouter",
    "FrozenPlan",
    "RandomRouter",
    "Recorder",
    "RoutedModel",
    "RouterLosses",
    "RouterTraining",
    "RoutingSettings",
    "Schedule",
    "ScheduleObjective",
    "ScoreRouter",
    "StaticRouter",
    "TargetMissedError",
    "find_router",
    "load_router",
    "save_router",
    "search_schedule",
    "train_router",
    "with_levels",
    "with_thresholds",
]
