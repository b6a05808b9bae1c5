"""The router of a file, made fit for what a script does with it (`--router`)."""

from equiformer2.errors import InputError
from equiformer2.pruning.routing.active_region import ActiveRegion
from equiformer2.pruning.routing.files import load_router
from equiformer2.pruning.routing.frozen import FrozenPlan
from equiformer2.pruning.routing.router import Router, ScoreRouter


def jumps(router: Router) -> bool:
    """Whether what it skips can change at once while atoms move, so that forces jump."""
    if isinstance(router, ScoreRouter):
        return router.mode != "smooth"
    return not isinstance(router, ActiveRegion)


def for_evaluation(path: str | None) -> Router | None:
    """Chooses for every structure by itself: a stored plan of a relaxation is left out.

    Raises:
        InputError: the file holds no router.
    """
    if path is None:
        return None
    router = load_router(path)
    return router.router if isinstance(router, FrozenPlan) else router


def for_relaxation(path: str | None, replan_every: int | None = None) -> Router | None:
    """For one structure that moves: with a `FrozenPlan` if its choice jumps.

    Args:
        path: of the router; None for none.
        replan_every: steps per plan; None for what is stored, or 10.

    Raises:
        InputError: the file holds no router, or there is nothing to plan.
    """
    if path is None:
        if replan_every is not None:
            raise InputError("--replan-every is for a router: give --router, too, or leave it out")
        return None
    stored = load_router(path)
    inner = stored.router if isinstance(stored, FrozenPlan) else stored
    if not jumps(inner):
        if replan_every is not None:
            raise InputError(f"what {path} skips does not jump along a relaxation: leave out --replan-every")
        return inner
    plan = stored if isinstance(stored, FrozenPlan) else FrozenPlan(inner)
    if replan_every is None:
        return plan
    return FrozenPlan(inner, replan_every, plan.max_move)


def for_batched_relaxation(path: str | None) -> Router | None:
    """For batches of structures that move, which come and go: a plan for each of them is not kept.

    Raises:
        InputError: the file holds no router, or one whose choice jumps.
    """
    router = for_evaluation(path)
    if router is not None and jumps(router):
        raise InputError(
            f"what {path} skips jumps along a relaxation, and batches keep no plan: use a router of the mode "
            "smooth or one that asks the tags alone (context_only), or relax one structure with relax.py"
        )
    return router
