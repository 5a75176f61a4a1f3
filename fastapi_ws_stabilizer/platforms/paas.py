"""Other platforms that run a server."""

from __future__ import annotations

from typing import Final

from fastapi_ws_stabilizer.platforms.platform import Platform, second_hand, verified

_RAILWAY: Final = "https://github.com/railwayapp/docs/blob/c2a634f/content/docs"

HOSTS: Final = (
    Platform(
        "heroku",
        "Heroku",
        idle_timeout=55.0,
        grace=30.0,
        facts=(
            second_hand(
                "idle_timeout",
                "55 s; each byte restarts it.",
                "https://devcenter.heroku.com/articles/http-routing",
            ),
            second_hand(
                "grace",
                "SIGKILL 30 s after SIGTERM.",
                "https://devcenter.heroku.com/articles/limits",
                "2026-11-25",
            ),
        ),
    ),
    Platform(
        "fly",
        "Fly.io",
        grace=5.0,
        facts=(
            verified(
                "grace",
                "`kill_timeout` is 5 s, and at most 300 s.",
                "https://fly.io/docs/reference/configuration/",
            ),
        ),
    ),
    Platform(
        "render",
        "Render",
        facts=(
            second_hand(
                "note", "There is no fixed timeout. Render advises pings.", "https://render.com/docs/websocket"
            ),
            verified(
                "note",
                "SIGTERM comes 60 s after the new instance is live.",
                "https://render.com/articles/how-render-handles-zero-downtime-deploys",
            ),
        ),
    ),
    Platform(
        "railway",
        "Railway",
        grace=0.0,
        facts=(
            verified(
                "grace",
                "SIGKILL immediately after SIGTERM, unless `RAILWAY_DEPLOYMENT_DRAINING_SECONDS` is raised.",
                f"{_RAILWAY}/deployments/deployment-teardown.md",
            ),
            verified(
                "note",
                "A WebSocket may stay open even while it is idle.",
                f"{_RAILWAY}/networking/public-networking/specs-and-limits.md",
            ),
            verified(
                "note",
                "A serverless service sleeps after 10 min without outbound packets. Heartbeats keep it awake.",
                f"{_RAILWAY}/deployments/serverless.md",
            ),
        ),
    ),
    Platform(
        "digitalocean",
        "DigitalOcean App Platform",
        facts=(
            verified(
                "note",
                "The documentation states no idle timeout for WebSockets.",
                "https://docs.digitalocean.com/products/app-platform/details/limits",
            ),
        ),
    ),
    Platform(
        "kubernetes",
        "Kubernetes pod",
        grace=30.0,
        facts=(
            verified(
                "grace",
                "`terminationGracePeriodSeconds` is 30 s, and includes `preStop`.",
                "https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/",
            ),
        ),
    ),
)
