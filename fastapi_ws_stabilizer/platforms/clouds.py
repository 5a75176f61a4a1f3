"""Platforms of Amazon, Microsoft and Google."""

from __future__ import annotations

from typing import Final

from fastapi_ws_stabilizer.platforms.platform import Platform, second_hand, verified

_AWS: Final = "https://docs.aws.amazon.com"
_GOOGLE_ALB: Final = "https://docs.cloud.google.com/load-balancing/docs/https/request-distribution"
_APP_ENGINE: Final = "https://cloud.google.com/appengine/docs/flexible/using-websockets-and-session-affinity"
_AZURE_FD: Final = "https://docs.azure.cn/en-us/frontdoor/standard-premium/websocket"

AMAZON: Final = (
    Platform(
        "aws-alb",
        "AWS Application Load Balancer",
        idle_timeout=60.0,
        facts=(
            verified(
                "idle_timeout",
                "`idle_timeout.timeout_seconds` is 60 s. The range is 1 to 4000 s.",
                f"{_AWS}/elasticloadbalancing/latest/application/edit-load-balancer-attributes.html",
            ),
        ),
    ),
    Platform(
        "aws-nlb",
        "AWS Network Load Balancer",
        idle_timeout=350.0,
        facts=(
            verified(
                "idle_timeout",
                "350 s. The range is 60 to 6000 s for TCP listeners; TLS listeners have a fixed value.",
                f"{_AWS}/elasticloadbalancing/latest/network/update-idle-timeout.html",
            ),
        ),
    ),
    Platform(
        "aws-cloudfront",
        "Amazon CloudFront",
        idle_timeout=600.0,
        facts=(
            second_hand(
                "idle_timeout",
                "10 min without a byte from the server. The value is fixed.",
                f"{_AWS}/AmazonCloudFront/latest/DeveloperGuide/distribution-working-with.websockets.html",
                "2026-11-25",
            ),
        ),
    ),
    Platform(
        "aws-alb-lambda",
        "AWS Application Load Balancer with a Lambda function",
        unsupported_reason="the load balancer rejects a WebSocket handshake for a function with HTTP 400",
        facts=(
            verified(
                "unsupported_reason",
                "The load balancer does not support WebSockets and rejects upgrade requests with HTTP 400.",
                f"{_AWS}/elasticloadbalancing/latest/application/lambda-functions.html",
            ),
        ),
    ),
    Platform(
        "aws-api-gateway",
        "Amazon API Gateway, WebSocket APIs",
        unsupported_reason="the gateway holds the socket itself and passes each message to the app as a separate call",
        facts=(
            verified(
                "unsupported_reason",
                "The gateway holds the socket and has its own limits: 10 min idle, 2 h in total, messages of 128 KB.",
                f"{_AWS}/apigateway/latest/developerguide/apigateway-execution-service-websocket-limits-table.html",
            ),
        ),
    ),
)

AZURE: Final = (
    Platform(
        "azure-app-service",
        "Azure App Service",
        facts=(
            verified(
                "note",
                "The cheap tiers limit the sockets of an instance: Free 5, Shared 35, Basic 350.",
                "https://github.com/MicrosoftDocs/azure-docs/blob/main/includes/azure-websites-limits.md",
            ),
        ),
    ),
    Platform(
        "azure-application-gateway",
        "Azure Application Gateway",
        idle_timeout=20.0,
        facts=(
            verified(
                "idle_timeout",
                "The backend's request timeout also applies to WebSockets. The documentation does not say whether it "
                "counts from the first or the last byte, so raise it.",
                "https://github.com/MicrosoftDocs/azure-docs/blob/main/articles/application-gateway/application-gateway-websocket.md",
            ),
            second_hand(
                "idle_timeout",
                "That timeout is 20 s. The range is 1 to 86400 s.",
                "https://learn.microsoft.com/en-us/azure/application-gateway/configuration-http-settings",
            ),
        ),
    ),
    Platform(
        "azure-front-door",
        "Azure Front Door, Standard and Premium",
        idle_timeout=300.0,
        max_lifetime=4 * 3600.0,
        facts=(
            verified("idle_timeout", "5 min without data from client or server.", _AZURE_FD),
            verified("max_lifetime", "4 h, regardless of traffic.", _AZURE_FD),
        ),
    ),
    Platform(
        "azure-load-balancer",
        "Azure Load Balancer, also as an AKS Service",
        idle_timeout=240.0,
        facts=(
            verified(
                "idle_timeout",
                "4 min. The range is 4 to 100 min.",
                "https://learn.microsoft.com/en-us/azure/load-balancer/load-balancer-tcp-idle-timeout",
            ),
            verified(
                "note",
                "After the timeout it drops packets silently, unless TCP Reset is on.",
                "https://github.com/MicrosoftDocs/azure-docs/blob/main/articles/load-balancer/load-balancer-tcp-reset.md",
            ),
        ),
    ),
)

GOOGLE: Final = (
    Platform(
        "google-alb",
        "Google Cloud external Application Load Balancer, global",
        idle_timeout=30.0,
        max_lifetime=24 * 3600.0,
        facts=(
            second_hand("idle_timeout", "The backend service's timeout is 30 s, and can be raised.", _GOOGLE_ALB),
            second_hand("max_lifetime", "24 h, regardless of traffic.", _GOOGLE_ALB),
        ),
    ),
    Platform(
        "google-alb-classic",
        "Google Cloud external Application Load Balancer, classic",
        max_lifetime=30.0,
        facts=(
            verified(
                "max_lifetime",
                "The backend service's timeout, 30 s, also ends busy sockets, so it is not an idle timeout. It can be "
                "raised to 86400 s.",
                "https://pkg.go.dev/k8s.io/ingress-gce/examples/websocket",
            ),
        ),
    ),
    Platform(
        "google-alb-regional",
        "Google Cloud Application Load Balancer, regional or internal",
        idle_timeout=30.0,
        facts=(
            second_hand(
                "idle_timeout",
                "The backend service's timeout is 30 s, and can be raised. It does not cut sockets in use.",
                _GOOGLE_ALB,
            ),
        ),
    ),
    Platform(
        "google-cloud-run",
        "Google Cloud Run",
        max_lifetime=300.0,
        grace=10.0,
        facts=(
            verified(
                "max_lifetime",
                "The request timeout also ends WebSockets: 5 min, and up to 60 min.",
                "https://cloud.google.com/run/docs/triggering/websockets",
            ),
            second_hand("grace", "SIGKILL 10 s after SIGTERM.", "https://cloud.google.com/run/docs/container-contract"),
        ),
    ),
    Platform(
        "google-app-engine-flex",
        "Google App Engine, flexible environment",
        max_lifetime=3600.0,
        facts=(verified("max_lifetime", "1 h, regardless of traffic.", _APP_ENGINE),),
    ),
    Platform(
        "google-app-engine-standard",
        "Google App Engine, standard environment",
        unsupported_reason="only the flexible environment supports WebSockets",
        facts=(verified("unsupported_reason", "The standard environment does not support WebSockets.", _APP_ENGINE),),
    ),
)
