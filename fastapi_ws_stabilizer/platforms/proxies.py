"""Proxies in front of a server, on any platform."""

from __future__ import annotations

from typing import Final

from fastapi_ws_stabilizer.platforms.platform import Platform, verified

PROXIES: Final = (
    Platform(
        "nginx",
        "nginx",
        idle_timeout=60.0,
        facts=(
            verified(
                "idle_timeout",
                "`proxy_read_timeout` is 60 s after the last data of the server. Ping frames count.",
                "https://nginx.org/en/docs/http/websocket.html",
            ),
        ),
    ),
    Platform(
        "ingress-nginx",
        "Ingress NGINX Controller",
        idle_timeout=60.0,
        facts=(
            verified(
                "idle_timeout",
                "`proxy-read-timeout` and `proxy-send-timeout` are 60 s. The project advises more than 3600 s.",
                "https://github.com/kubernetes/ingress-nginx/blob/dbb11b9/docs/user-guide/miscellaneous.md",
            ),
            verified(
                "note",
                "240 s after a reload of its configuration, its old workers drop their remaining connections "
                "(`worker-shutdown-timeout`).",
                "https://github.com/kubernetes/ingress-nginx/blob/dbb11b9/docs/user-guide/nginx-configuration/configmap.md",
            ),
            verified(
                "note",
                "The project was retired in March 2026 and gets no security fixes.",
                "https://github.com/kubernetes/ingress-nginx/blob/dbb11b9/README.md",
            ),
        ),
    ),
    Platform(
        "apache",
        "Apache httpd, mod_proxy_http",
        idle_timeout=60.0,
        facts=(
            verified(
                "idle_timeout",
                "60 s without a byte in either direction: `TimeOut`, unless `ProxyTimeout` or the worker's `timeout=` "
                "is set.",
                "https://github.com/apache/httpd/blob/0cb6804/docs/manual/mod/core.xml",
            ),
        ),
    ),
    Platform(
        "haproxy",
        "HAProxy",
        facts=(
            verified(
                "note",
                "It has no default. Without `timeout tunnel`, your `timeout client` and `timeout server` apply.",
                "https://github.com/haproxy/haproxy/blob/50872da/doc/configuration.txt",
            ),
        ),
    ),
    Platform(
        "traefik",
        "Traefik",
        facts=(
            verified(
                "note",
                "When it stops, it waits 10 s (`lifeCycle.graceTimeOut`) and then drops its connections.",
                "https://github.com/traefik/traefik/blob/fd5a576/docs/content/reference/install-configuration/entrypoints.md",
            ),
        ),
    ),
    Platform(
        "caddy",
        "Caddy",
        facts=(
            verified(
                "note",
                "`stream_timeout`, a lifetime, is not set. A reload closes all WebSockets immediately with 1001; "
                "`stream_close_delay` delays that.",
                "https://github.com/caddyserver/caddy/blob/0cf03d3/modules/caddyhttp/reverseproxy/streaming.go",
            ),
        ),
    ),
    Platform(
        "envoy",
        "Envoy",
        idle_timeout=300.0,
        facts=(
            verified(
                "idle_timeout",
                "`stream_idle_timeout` is 5 min without activity on either side.",
                "https://github.com/envoyproxy/envoy/blob/main/docs/root/faq/configuration/timeouts.rst",
            ),
        ),
    ),
    Platform(
        "istio",
        "Istio sidecar",
        grace=5.0,
        facts=(
            verified(
                "grace",
                "5 s after SIGTERM the sidecar exits (`terminationDrainDuration`) and drops its sockets.",
                "https://github.com/istio/istio/blob/86c9f01/pkg/config/mesh/mesh.go",
            ),
            verified(
                "note",
                "It turns off Envoy's idle timeout. The EDGE connection profile of gateways has one of 5 min.",
                "https://github.com/istio/istio/blob/86c9f01/pilot/pkg/networking/core/connection_settings.go",
            ),
        ),
    ),
    Platform(
        "cloudflare",
        "Cloudflare proxy",
        facts=(
            verified(
                "note",
                "The documentation states no idle timeout for WebSockets. Sockets end when Cloudflare restarts servers "
                "for new code.",
                "https://developers.cloudflare.com/network/websockets/",
            ),
        ),
    ),
)
