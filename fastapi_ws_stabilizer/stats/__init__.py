"""Stats of a manager over HTTP: `app.include_router(stats_router, prefix="/ws-stats")`."""

from __future__ import annotations

from fastapi_ws_stabilizer.stats.router import stats_router

__all__ = ["stats_router"]
