"""Tests of the doctor's checks, each with a faulty deployment and a correct one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.doctor.checks import CHECKS, TOO_SHORT, run_checks
from fastapi_ws_stabilizer.doctor.collect import CheckOptions, collect_context
from fastapi_ws_stabilizer.doctor.context import DeploymentContext
from fastapi_ws_stabilizer.doctor.findings import Finding
from fastapi_ws_stabilizer.doctor.network_path import path_through
from fastapi_ws_stabilizer.doctor.servers import SERVERS, with_defaults
from fastapi_ws_stabilizer.platforms.registry import PLATFORMS
from fastapi_ws_stabilizer.servers.uvicorn.options import uvicorn_options

OURS = "fastapi_ws_stabilizer.servers.uvicorn:StableWebSocketProtocol"
SECRET = "a-secret-for-the-drain"


@dataclass
class Deployment:
    """Deployment of a manager: its options, its server with its options, and its surroundings."""

    config: Mapping[str, Any] = field(default_factory=dict)
    server: str | None = "uvicorn"
    options: Mapping[str, Any] = field(default_factory=dict)
    platform: tuple[str, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)

    def found(self) -> dict[str, Finding]:
        """Return the findings of all checks, by code."""
        server = None if self.server is None else SERVERS[self.server]
        surroundings = DeploymentContext(
            config=WebSocketConfig(**self.config),
            server=server,
            options=None if server is None else with_defaults(server, self.options),
            network_path=path_through(self.platform, **self.limits),
            **self.rest,
        )
        return {finding.code: finding for finding in run_checks(surroundings)}


off = {"heartbeat_type": "off"}
no_signals = {"handle_signals": False}
soon, sooner = {"drain_timeout": 20}, {"drain_timeout": 10}
new, old = {"version": (0, 54, 0), "bypassing": ("/raw",)}, {"version": (0, 49, 1), "bypassing": ("/raw",)}

CASES: list[tuple[str, Deployment, Deployment, tuple[str, ...]]] = [
    # code, faulty deployment, correct deployment, texts in the finding
    (
        "D01",
        Deployment({"heartbeat_interval": 60}, platform=("nginx",)),
        Deployment(platform=("nginx",)),
        ("60 s", "nginx"),
    ),
    (
        "D01",
        Deployment(
            {"heartbeat_interval": 29}, platform=("cloudflare", "google-alb-regional"), limits={"idle_timeout": 20}
        ),
        Deployment({"heartbeat_interval": 29}, platform=("google-alb-regional",)),
        ("29 s", "20 s, as given", "heartbeat_interval=8"),
    ),
    (
        "D01",
        Deployment(off, "granian", platform=("nginx",)),
        Deployment(off, "uvicorn", platform=("nginx",)),
        ("heartbeat_type is off",),
    ),
    (
        "D01",
        Deployment(off, options={"ws_ping_interval": 90}, platform=("heroku",)),
        Deployment(off, options={"ws_ping_interval": 25}, platform=("heroku",)),
        ("uvicorn pings every 90 s", "55 s of heroku"),
    ),
    (
        "D01",
        Deployment({"heartbeat_interval": 5}, None, limits={"idle_timeout": 5}),
        Deployment({"heartbeat_interval": 2}, None, limits={"idle_timeout": 5}),
        ("too frequent",),
    ),
    (
        "D02",
        Deployment({"heartbeat_interval": 46}, platform=("nginx",)),
        Deployment({"heartbeat_interval": 45}, platform=("nginx",)),
        ("46 s", "75%", "60 s of nginx", "heartbeat_interval=24"),
    ),
    (
        "D02",
        Deployment({"heartbeat_interval": 59}, platform=("nginx",)),
        Deployment({"heartbeat_interval": 60}, platform=("nginx",)),  # that is D01
        (),
    ),
    (
        "D03",
        Deployment(platform=("google-cloud-run",)),
        Deployment({"max_lifetime": 270}, platform=("google-cloud-run",)),
        ("300 s of google-cloud-run", "not set", "max_lifetime=270"),
    ),
    (
        "D03",
        Deployment({"max_lifetime": 300}, platform=("google-cloud-run",)),
        Deployment({"max_lifetime": 300}, platform=("google-cloud-run",), limits={"max_lifetime": 3600}),
        ("max_lifetime is 300 s",),
    ),
    (
        "D04",
        Deployment(platform=("google-alb-classic",)),
        Deployment(platform=("google-alb-classic",), limits={"max_lifetime": 3600}),
        ("30 s of google-alb-classic",),
    ),
    (
        "D04",
        Deployment(platform=("azure-application-gateway",)),
        Deployment(platform=("azure-application-gateway",), limits={"idle_timeout": 3600}),
        ("20 s of azure-application-gateway",),
    ),
    ("D05", Deployment(off, options={"ws_ping_interval": None}), Deployment(off), ("ws_ping_interval",)),
    ("D05", Deployment(off, "granian"), Deployment({}, "granian"), ("granian sends no pings",)),
    (
        "D05",
        Deployment(off, "hypercorn"),
        Deployment(off, "hypercorn", {"websocket_ping_interval": 20}),
        ("hypercorn",),
    ),
    ("D06", Deployment(rest=new), Deployment(rest=old), ("/raw", "40 s")),
    ("D06", Deployment(rest=new), Deployment(rest={**new, "bypassing": ()}), ()),
    ("D06", Deployment(options={"ws": OURS}, rest=new), Deployment(options={"ws": "websockets"}, rest=new), ()),
    (
        "D06",
        Deployment(options={"ws": "websockets-sansio"}, rest=old),
        Deployment(options={"ws": "auto"}, rest=old),
        ("/raw",),
    ),
    (
        "D06",
        Deployment(options={"ws": "wsproto"}, rest=old),
        Deployment(options={"ws": "websockets"}, rest=old),
        ("/raw",),
    ),
    ("D06", Deployment(options={"ws": OURS}, rest=old), Deployment(options={"ws": "none"}, rest=old), ("/raw",)),
    ("D06", Deployment(server="uvicorn-worker", rest=new), Deployment(server="granian", rest=new), ()),
    ("D06", Deployment(rest=new), Deployment(options={"ws_ping_interval": None}, rest=new), ()),
    ("D07", Deployment(), Deployment(options={"timeout_graceful_shutdown": 30}), ("--timeout-graceful-shutdown",)),
    (
        "D07",
        Deployment({"drain_timeout": 20}, platform=("kubernetes",)),
        Deployment({"drain_timeout": 20}, options={"timeout_graceful_shutdown": 5}, platform=("kubernetes",)),
        ("--timeout-graceful-shutdown 5",),  # satisfies D08
    ),
    ("D07", Deployment(server="uvicorn-worker"), Deployment(server="gunicorn"), ("CONFIG_KWARGS",)),
    (
        "D08",
        Deployment(sooner, options={"timeout_graceful_shutdown": 30}, platform=("kubernetes",)),
        Deployment(sooner, options={"timeout_graceful_shutdown": 15}, platform=("kubernetes",)),
        ("45 s", "30 s of kubernetes", "drain_timeout 10", "timeout 30"),
    ),
    (
        "D08",
        Deployment(platform=("kubernetes",)),
        Deployment(platform=("kubernetes",), limits={"grace": 35}),
        ("35 s",),
    ),
    (
        "D08",
        Deployment(sooner, platform=("kubernetes",), rest={"pre_stop": 20}),
        Deployment(sooner, platform=("kubernetes",), rest={"pre_stop": 20}, limits={"grace": 35}),
        ("35 s", "preStop 20"),
    ),
    # drain_timeout bounds a long drain_window, which takes no additional time
    (
        "D08",
        Deployment({**soon, "drain_window": 15}, platform=("kubernetes",), limits={"grace": 23}),
        Deployment({**soon, "drain_window": 15}, platform=("kubernetes",), limits={"grace": 24}),
        ("23 s, as given", "raise it to 24 s"),
    ),
    (
        "D08",
        Deployment(sooner, platform=("railway",)),
        Deployment(sooner, platform=("railway",), limits={"grace": 15}),
        ("0 s",),
    ),
    (
        "D08",
        Deployment(sooner, platform=("fly",)),
        Deployment(sooner, platform=("fly",), limits={"grace": 15}),
        ("5 s of fly",),
    ),
    # gunicorn's master counts from SIGTERM
    (
        "D08",
        Deployment(soon, "gunicorn", {"graceful_timeout": 26}, ("kubernetes",)),
        Deployment(soon, "gunicorn", {"graceful_timeout": 25}, ("kubernetes",)),
        ("can take 31 s", "graceful_timeout 26, the drain included"),
    ),
    (
        "D08",
        Deployment(soon, "uvicorn-worker", {"graceful_timeout": 25}, ("kubernetes",), rest={"pre_stop": 5}),
        Deployment(soon, "uvicorn-worker", {"graceful_timeout": 20}, ("kubernetes",), rest={"pre_stop": 5}),
        ("can take 35 s", "preStop 5 + graceful_timeout 25"),
    ),
    (
        "D08",
        Deployment({"drain_timeout": 31}, "gunicorn"),
        Deployment({"drain_timeout": 30}, "gunicorn"),
        ("kills its workers 30 s after SIGTERM", "drain_timeout 31", "raise graceful_timeout to 31 s"),
    ),
    (
        "D08",
        Deployment(server="uvicorn-worker", options={"graceful_timeout": 10}),
        Deployment(no_signals, "uvicorn-worker", {"graceful_timeout": 10}),
        ("kills its workers 10 s after SIGTERM",),
    ),
    (
        "D08",
        Deployment({"drain_timeout": 60}, "gunicorn", platform=("kubernetes",)),
        Deployment({"drain_timeout": 60}, "uvicorn"),
        ("kills its workers", "; and ", "30 s of kubernetes"),
    ),
    ("D08", Deployment(platform=("istio",)), Deployment(no_signals, platform=("istio",)), ("5 s of istio",)),
    (
        "D09",
        Deployment(no_signals, "hypercorn", rest={"python": (3, 12)}),
        Deployment(no_signals, "hypercorn", rest={"python": (3, 11)}),
        ("Python 3.12", "does not stop"),
    ),
    (
        "D09",
        Deployment(server="hypercorn", rest={"python": (3, 11)}),
        Deployment(server="hypercorn", options={"workers": 0}, rest={"python": (3, 12)}),
        ("no SIGTERM",),
    ),
    ("D09", Deployment(server="hypercorn"), Deployment(server="hypercorn", rest={"pre_stop": 30}), ("preStop",)),
    ("D09", Deployment(server="hypercorn"), Deployment({"drain_secret": SECRET}, "hypercorn"), ("set drain_secret",)),
    ("D10", Deployment(server="granian"), Deployment(no_signals, "granian"), ("granian",)),
    ("D10", Deployment(server="daphne"), Deployment(server="daphne", rest={"pre_stop": 30}), ("daphne",)),
    ("D10", Deployment(server="granian"), Deployment({"drain_secret": SECRET}, "granian"), ("drain_secret",)),
    ("D11", Deployment(options={"limit_concurrency": 100}), Deployment(), ("limit_concurrency=100", "503")),
    ("D12", Deployment(options={"limit_max_requests": 1000}), Deployment(), ("limit_max_requests=1000",)),
    ("D12", Deployment(options={"reload": True}), Deployment(options={"reload": False}), ("reload",)),
    ("D12", Deployment(server="uvicorn-worker", options={"max_requests": 9}), Deployment(server="uvicorn-worker"), ()),
    (
        "D12",
        Deployment(server="gunicorn", options={"max_requests": 9}),
        Deployment(server="gunicorn"),
        ("max_requests=9",),
    ),
    ("D12", Deployment(server="hypercorn", options={"max_requests": 9}), Deployment(server="hypercorn"), ()),
    ("D12", Deployment(server="granian", options={"workers_lifetime": 3600}), Deployment(server="granian"), ()),
    ("D12", Deployment(server="granian", options={"workers_max_rss": 512}), Deployment(server="daphne"), ()),
    ("D13", Deployment(server="daphne", rest={"refuses": True}), Deployment(rest={"refuses": True}), ("403",)),
    ("D13", Deployment(server="gunicorn", rest={"refuses": True}), Deployment(server="gunicorn"), ("on_handshake",)),
    ("D14", Deployment(server="daphne"), Deployment(), ("1012",)),
    ("D15", Deployment(platform=("aws-api-gateway",)), Deployment(platform=("aws-alb",)), ("aws-api-gateway",)),
    ("D15", Deployment(platform=("google-app-engine-standard",)), Deployment(platform=("google-app-engine-flex",)), ()),
    (
        "D16",
        Deployment(platform=("google-cloud-run",), rest={"http2": True}),
        Deployment(platform=("google-cloud-run",)),
        (),
    ),
    (
        "D16",
        Deployment(platform=("azure-front-door",), rest={"caching": True}),
        Deployment(platform=("azure-front-door",), rest={"http2": True}),
        ("caching",),
    ),
    (
        "D17",
        Deployment(rest={"logins": ("CheckToken",), "unguarded": ("/ws", "/raw")}),
        Deployment(rest={"logins": ("CheckToken",), "unguarded": ("/ws", "/raw"), "guarded": True}),
        ("CheckToken", "/ws, /raw", "socket_for", "on_handshake"),
    ),
    (
        "D17",
        Deployment(server=None, rest={"logins": ("CheckToken",), "unguarded": ("/ws",)}),
        Deployment(server=None, rest={"logins": ("CheckToken",)}),
        (),
    ),
    (
        "D18",
        Deployment({"max_connections_per_address": 20}, platform=("cloudflare", "nginx", "kubernetes")),
        Deployment(
            {"max_connections_per_address": 20, "trusted_proxies": ["10.0.0.0/8"]}, platform=("cloudflare", "nginx")
        ),
        ("cloudflare, nginx forwards requests", "max_connections_per_address=20", "trusted_proxies"),
    ),
    (
        "D18",
        Deployment({"max_connect_rate_per_address": 2.5}, platform=("nginx",)),
        Deployment({"trusted_proxies": ["10.0.0.0/8"]}, platform=("nginx",)),
        ("max_connect_rate_per_address=2.5",),
    ),
    (
        "D18",
        Deployment({"max_connections_per_address": 20, "trusted_proxies": ["*"]}),
        Deployment(
            {"max_connections_per_address": 20}, platform=("aws-nlb", "kubernetes"), limits={"idle_timeout": 60}
        ),
        ("'*'", "set it to the addresses"),
    ),
    (
        "D18",
        Deployment(platform=("nginx",)),  # no limit by address, but the log shows the address of the proxy
        Deployment({"trusted_proxies": ["*"]}, platform=("nginx",)),
        ("logs and stats show it for every client",),
    ),
    (
        "D19",
        Deployment(server=None, rest={"early": ("/ws", "/chat")}),
        Deployment(server=None, rest={"bypassing": ("/ws", "/chat")}),
        ("/ws, /chat", "put the socket first", "dependencies="),
    ),
    (
        "D20",
        Deployment(server=None, rest={"shadowed": (("/ws", "the mount at /"),)}),
        Deployment(server=None, rest={"early": ("/ws",)}),
        ("/ws is never reached", "the mount at / comes before it", "mount static files last"),
    ),
    (
        "D21",
        Deployment(rest={"open_stats": ("/ws-stats",)}),
        Deployment(),
        ("/ws-stats", "dependencies=[Depends(admin)]"),
    ),
    (
        "D22",
        Deployment(options={"workers": 4}),
        Deployment({"reconnect_secret": SECRET}, options={"workers": 4}),
        ("workers=4", "WS_RECONNECT_SECRET", "within one worker"),
    ),
    (
        "D23",
        Deployment(server=None, rest={"background": ("/ws",)}),
        Deployment(server=None),
        ("/ws takes BackgroundTasks", "no task added there ever runs", "ws.create_task"),
    ),
    (
        "D24",
        Deployment({"gc_pacing": "off"}),
        Deployment(),
        ("gc_pacing is off", "no max_connections", 'gc_pacing="auto"'),
    ),
    (
        "D24",
        Deployment({"gc_pacing": "off", "max_connections": 1000}),
        Deployment({"gc_pacing": "off", "max_connections": 999}),
        ("max_connections is 1000", "max_connections below 1000"),
    ),
    (
        "D22",
        Deployment(server="granian", options={"workers": 2}),
        Deployment(server="granian", options={"workers": 1}),
        (),
    ),
    ("D22", Deployment(server="uvicorn-worker", options={"workers": 2}), Deployment(server="hypercorn"), ()),
]

IDS = [f"{code}-{sum(case[0] == code for case in CASES[:number])}" for number, (code, *_) in enumerate(CASES)]


@pytest.mark.parametrize(("code", "bad", "good", "named"), CASES, ids=IDS)
def test_check_reports_faulty_deployment_only(
    code: str, bad: Deployment, good: Deployment, named: tuple[str, ...]
) -> None:
    """Each check reports the faulty deployment with its numbers and advice, and does not report the correct one."""
    finding = bad.found()[code]
    assert [word for word in named if word not in f"{finding.problem} {finding.advice}"] == []
    assert finding.advice
    assert code not in good.found()


def test_every_check_is_tested() -> None:
    """Each check has a case, and codes are unique and in order."""
    codes = [check.code for check in CHECKS]
    assert codes == sorted(set(codes))
    assert {case[0] for case in CASES} == {check.code for check in CHECKS}


def test_finding_has_severity_and_title_of_check() -> None:
    """A finding has the severity and the title of its check."""
    found = Deployment().found()
    (check,) = [check for check in CHECKS if check.code == "D07"]
    assert list(found) == ["D07"]
    assert (found["D07"].severity, found["D07"].title) == (check.severity, check.title)


def test_findings_are_sorted_by_code() -> None:
    """Findings are sorted by code."""
    codes = list(Deployment({"heartbeat_interval": 400}, "daphne", platform=("google-cloud-run", "nginx")).found())
    assert codes == sorted(codes)
    assert len(codes) > 3


@pytest.mark.parametrize(
    "name", sorted(name for name, platform in PLATFORMS.items() if platform.unsupported_reason is None)
)
def test_for_platform_options_pass_checks_of_platform(name: str) -> None:
    """The options of `for_platform` pass the checks D01 to D03 of that platform."""
    deployment = Deployment(server=None, platform=(name,))
    surroundings = DeploymentContext(WebSocketConfig.for_platform(name), network_path=path_through(deployment.platform))
    assert not {finding.code for finding in run_checks(surroundings)} & {"D01", "D02", "D03"}


@pytest.mark.parametrize(
    "name", sorted(name for name, platform in PLATFORMS.items() if platform.unsupported_reason is None)
)
def test_for_platform_with_uvicorn_options_passes(name: str) -> None:
    """`for_platform` with `uvicorn_options` passes all checks, except on platforms with too short limits."""
    config = WebSocketConfig.for_platform(name, trusted_proxies=["10.0.0.0/8"], reconnect_secret=SECRET)
    server = SERVERS["uvicorn"]
    options = with_defaults(server, uvicorn_options(config))
    codes = {
        finding.code
        for finding in run_checks(DeploymentContext(config, server, options, network_path=path_through([name])))
    }
    expected = {"D04"} if name in TOO_SHORT else set()  # no WebSocket survives the defaults of these platforms
    if PLATFORMS[name].grace == 0:
        expected.add("D08")  # SIGKILL comes with SIGTERM until the grace is configured
    assert codes == expected


@pytest.mark.parametrize("config", [{}, {"drain_timeout": 60}, {"drain_timeout": 5}], ids=str)
@pytest.mark.parametrize("pre_stop", [0.0, 10.0])
@pytest.mark.parametrize("limits", [{}, {"grace": 20.0}, {"grace": 60.0}], ids=str)
@pytest.mark.parametrize(
    "platform", [("kubernetes",), ("aws-alb", "nginx", "kubernetes"), ("google-cloud-run",)], ids=str
)
def test_followed_shutdown_advice_clears_findings(
    config: dict[str, Any], pre_stop: float, limits: dict[str, float], platform: tuple[str, ...]
) -> None:
    """Following the advice of D07 or D08 clears both, whichever is followed first."""
    deployment = Deployment(config, platform=platform, limits=limits, rest={"pre_stop": pre_stop})
    for code in ("D07", "D08"):
        finding = deployment.found().get(code)
        if finding is None:
            continue
        advised = follow(deployment, finding.advice)
        assert not {"D07", "D08"} & set(advised.found()), (finding.advice, advised)


def follow(deployment: Deployment, advice: str) -> Deployment:
    """Return the deployment after the first action of an advice."""
    config, options, limits = dict(deployment.config), dict(deployment.options), dict(deployment.limits)
    if names := re.match(r"use WebSocketConfig.for_platform\((.*?)\) and manager.uvicorn_options", advice):
        fitting = WebSocketConfig.for_platform(*re.findall(r'"(.*?)"', names[1]))
        config |= {"drain_timeout": fitting.drain_timeout, "drain_window": fitting.drain_window}
        options = {"timeout_graceful_shutdown": uvicorn_options(fitting)["timeout_graceful_shutdown"]}
    elif numbers := re.match(r"set drain_timeout=(\S+) and timeout_graceful_shutdown=(\d+)", advice):
        config["drain_timeout"] = float(numbers[1])
        options = {"timeout_graceful_shutdown": int(numbers[2])}
    elif number := re.match(r"start it with --timeout-graceful-shutdown (\d+)", advice):
        options = {"timeout_graceful_shutdown": int(number[1])}
    elif number := re.match(r"raise (?:it|the grace) to (\d+) s", advice):
        limits["grace"] = float(number[1])
        options.setdefault(
            "timeout_graceful_shutdown", uvicorn_options(WebSocketConfig(**config))["timeout_graceful_shutdown"]
        )
    else:
        raise AssertionError(f"no advice that can be followed: {advice}")
    return Deployment(config, deployment.server, options, deployment.platform, limits, deployment.rest)


@pytest.mark.parametrize(
    ("deployment", "severity"),
    [
        (Deployment(platform=("kubernetes",)), "warning"),  # the drain can exceed the grace
        (Deployment(platform=("railway",)), "error"),  # there is no grace
        (Deployment(platform=("kubernetes",), rest={"pre_stop": 28}), "error"),
    ],
)
def test_short_grace_is_error_only_when_loss_is_certain(deployment: Deployment, severity: str) -> None:
    """D08 is a warning in the worst case, and an error if no grace is left at all."""
    assert deployment.found()["D08"].severity == severity


PLATFORMS_WITH_GRACE = sorted(
    name
    for name, platform in PLATFORMS.items()
    if platform.unsupported_reason is None and (platform.grace is None or platform.grace >= 15)
)


@pytest.mark.parametrize("name", PLATFORMS_WITH_GRACE)
def test_for_platform_drain_fits_into_grace(name: str) -> None:
    """The drain of `for_platform` fits into the grace if the server takes no time after it."""
    config = WebSocketConfig.for_platform(name)
    for server in (None, "uvicorn", "granian", "daphne"):
        options = None if server is None else with_defaults(SERVERS[server], {})
        surroundings = DeploymentContext(config, server and SERVERS[server], options, network_path=path_through([name]))
        assert "D08" not in {finding.code for finding in run_checks(surroundings)}


def test_unknown_gunicorn_timeout_falls_back_to_drain() -> None:
    """Without server options the drain alone is checked, because graceful_timeout is unknown."""
    surroundings = DeploymentContext(
        WebSocketConfig(), SERVERS["gunicorn"], None, network_path=path_through(["kubernetes"])
    )
    (finding,) = run_checks(surroundings)
    assert (finding.code, "drain_timeout 30" in finding.problem) == ("D08", True)


@pytest.mark.parametrize("config", [WebSocketConfig(), WebSocketConfig(handle_signals=False)])
def test_hypercorn_with_unknown_workers_has_no_finding(config: WebSocketConfig) -> None:
    """With an unknown number of workers D09 has no finding, because `--workers 0` is correct."""
    assert run_checks(DeploymentContext(config, SERVERS["hypercorn"], None, python=(3, 12))) == []


def test_unknown_server_has_no_finding() -> None:
    """Without a server and a platform there are no findings."""
    assert Deployment(off, None).found() == {}


def test_stable_protocol_pings_count_as_heartbeat() -> None:
    """Pings of StableWebSocketProtocol are its heartbeat; with the heartbeat off, uvicorn's ping interval counts."""
    found = Deployment({**off}, options={"ws": OURS, "ws_ping_interval": 90}, platform=("nginx",)).found()
    assert "uvicorn pings every 90 s" in found["D01"].problem
    assert "D05" in Deployment(off, options={"ws": OURS, "ws_ping_interval": None}).found()


def test_server_lifetime_counts_like_platform_lifetime() -> None:
    """daphne closes each WebSocket after a day by default, which counts like a limit of a platform."""
    found = run_checks(collect_context(WebSocketConfig(), None, CheckOptions(server="daphne"), refuses=False))
    assert "86400 s of daphne" in next(finding.problem for finding in found if finding.code == "D03")
    server_options = {"websocket_timeout": None}
    found = run_checks(
        collect_context(
            WebSocketConfig(), None, CheckOptions(server="daphne", server_options=server_options), refuses=False
        )
    )
    assert "D03" not in {finding.code for finding in found}
