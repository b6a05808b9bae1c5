"""Skip atoms and edges, block by block, by what the structure and the network say of them."""

from equiformer2.pruning.routing.achieved import Achieved, Recorder
from equiformer2.pruning.routing.active_region import ActiveRegion
from equiformer2.pruning.routing.calibrate import with_thresholds
from equiformer2.pruning.routing.files import load_router, save_router
from equiformer2.pruning.routing.find import ROUTING_METHODS, RoutingSettings, find_router
from equiformer2.pruning.routing.frozen import FrozenPlan
from equiformer2.pruning.routing.ftp import FTPRouter
from equiformer2.pruning.routing.ftp_training import RouterLosses, RouterTraining, train_router
from equiformer2.pruning.routing.objective import RoutedModel, ScheduleObjective, with_levels
from equiformer2.pruning.routing.router import Router, ScoreRouter
from equiformer2.pruning.routing.schedule import Schedule, TargetMissedError, search_schedule
from equiformer2.pruning.routing.static import DegreeRouter, DistanceRouter, RandomRouter, StaticRouter
from equiformer2.pruning.routing.zero_tprune import AtomPruner, EdgePruner

__all__ = [
    "ROUTING_METHODS",
    "Achieved",
    "ActiveRegion",
    "AtomPruner",
    "DegreeRouter",
    "DistanceRouter",
    "EdgePruner",
    "FTPRouter",
    "FrozenPlan",
    "RandomRouter",
    "Recorder",
    "RoutedModel",
    "Router",
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
