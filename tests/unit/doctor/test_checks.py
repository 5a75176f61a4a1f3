"""Tests of the doctor's checks: each has surroundings that it finds fault with, and some that it does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from fastapi_ws_stabilizer.config import WebSocketConfig
from fastapi_ws_stabilizer.doctor.checks import CHECKS, TOO_SHORT, run_checks
from fastapi_ws_stabilizer.doctor.collect import collect_context
from fastapi_ws_stabilizer.doctor.context import DeploymentContext
from fastapi_ws_stabilizer.doctor.findings import Finding
from fastapi_ws_stabilizer.doctor.network_path import path_through
from fastapi_ws_stabilizer.doctor.servers import SERVERS, with_defaults
from fastapi_ws_stabilizer.platforms.registry import PLATFORMS
from fastapi_ws_stabilizer.servers.uvicorn.options import uvicorn_options

OURS = "fastapi_ws_stabilizer.servers.uvicorn:StableWebSocketProtocol"
SECRET = "drained-by-nobody-else"


@dataclass
class Place:
    """Where a manager may run: its options, its server and that one's options, and what else there is."""

    config: Mapping[str, Any] = field(default_factory=dict)
    server: str | None = "uvicorn"
    options: Mapping[str, Any] = field(default_factory=dict)
    platform: tuple[str, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)

    def found(self) -> dict[str, Finding]:
        """What all checks find here, by their codes."""
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
deaf = {"handle_signals": False}
soon, sooner = {"drain_timeout": 20}, {"drain_timeout": 10}
new, old = {"version": (0, 54, 0), "bypassing": ("/raw",)}, {"version": (0, 49, 1), "bypassing": ("/raw",)}

CASES: list[tuple[str, Place, Place, tuple[str, ...]]] = [
    # code, where it is found, where it is not, what the finding names
    ("D01", Place({"heartbeat_interval": 60}, platform=("nginx",)), Place(platform=("nginx",)), ("60 s", "nginx")),
    (
        "D01",
        Place({"heartbeat_interval": 29}, platform=("cloudflare", "google-alb-regional"), limits={"idle_timeout": 20}),
        Place({"heartbeat_interval": 29}, platform=("google-alb-regional",)),
        ("29 s", "20 s, as given", "heartbeat_interval=8"),
    ),
    (
        "D01",
        Place(off, "granian", platform=("nginx",)),
        Place(off, "uvicorn", platform=("nginx",)),
        ("heartbeat_type is off",),
    ),
    (
        "D01",
        Place(off, options={"ws_ping_interval": 90}, platform=("heroku",)),
        Place(off, options={"ws_ping_interval": 25}, platform=("heroku",)),
        ("uvicorn pings every 90 s", "55 s of heroku"),
    ),
    (
        "D01",
        Place({"heartbeat_interval": 5}, None, limits={"idle_timeout": 5}),
        Place({"heartbeat_interval": 2}, None, limits={"idle_timeout": 5}),
        ("too frequent",),
    ),
    (
        "D02",
        Place({"heartbeat_interval": 46}, platform=("nginx",)),
        Place({"heartbeat_interval": 45}, platform=("nginx",)),
        ("46 s", "75%", "60 s of nginx", "heartbeat_interval=24"),
    ),
    (
        "D02",
        Place({"heartbeat_interval": 59}, platform=("nginx",)),
        Place({"heartbeat_interval": 60}, platform=("nginx",)),  # that is D01
        (),
    ),
    (
        "D03",
        Place(platform=("google-cloud-run",)),
        Place({"max_lifetime": 270}, platform=("google-cloud-run",)),
        ("300 s of google-cloud-run", "not set", "max_lifetime=270"),
    ),
    (
        "D03",
        Place({"max_lifetime": 300}, platform=("google-cloud-run",)),
        Place({"max_lifetime": 300}, platform=("google-cloud-run",), limits={"max_lifetime": 3600}),
        ("max_lifetime is 300 s",),
    ),
    (
        "D04",
        Place(platform=("google-alb-classic",)),
        Place(platform=("google-alb-classic",), limits={"max_lifetime": 3600}),
        ("30 s of google-alb-classic",),
    ),
    (
        "D04",
        Place(platform=("azure-application-gateway",)),
        Place(platform=("azure-application-gateway",), limits={"idle_timeout": 3600}),
        ("20 s of azure-application-gateway",),
    ),
    ("D05", Place(off, options={"ws_ping_interval": None}), Place(off), ("ws_ping_interval",)),
    ("D05", Place(off, "granian"), Place({}, "granian"), ("granian sends no pings",)),
    ("D05", Place(off, "hypercorn"), Place(off, "hypercorn", {"websocket_ping_interval": 20}), ("hypercorn",)),
    ("D06", Place(rest=new), Place(rest=old), ("/raw", "40 s")),
    ("D06", Place(rest=new), Place(rest={**new, "bypassing": ()}), ()),
    ("D06", Place(options={"ws": OURS}, rest=new), Place(options={"ws": "websockets"}, rest=new), ()),
    ("D06", Place(options={"ws": "websockets-sansio"}, rest=old), Place(options={"ws": "auto"}, rest=old), ("/raw",)),
    ("D06", Place(options={"ws": "wsproto"}, rest=old), Place(options={"ws": "websockets"}, rest=old), ("/raw",)),
    ("D06", Place(options={"ws": OURS}, rest=old), Place(options={"ws": "none"}, rest=old), ("/raw",)),
    ("D06", Place(server="uvicorn-worker", rest=new), Place(server="granian", rest=new), ()),
    ("D06", Place(rest=new), Place(options={"ws_ping_interval": None}, rest=new), ()),
    ("D07", Place(), Place(options={"timeout_graceful_shutdown": 30}), ("--timeout-graceful-shutdown",)),
    (
        "D07",
        Place({"drain_timeout": 20}, platform=("kubernetes",)),
        Place({"drain_timeout": 20}, options={"timeout_graceful_shutdown": 5}, platform=("kubernetes",)),
        ("--timeout-graceful-shutdown 5",),  # what D08 is content with
    ),
    ("D07", Place(server="uvicorn-worker"), Place(server="gunicorn"), ("CONFIG_KWARGS",)),
    (
        "D08",
        Place(sooner, options={"timeout_graceful_shutdown": 30}, platform=("kubernetes",)),
        Place(sooner, options={"timeout_graceful_shutdown": 15}, platform=("kubernetes",)),
        ("45 s", "30 s of kubernetes", "drain_timeout 10", "timeout 30"),
    ),
    ("D08", Place(platform=("kubernetes",)), Place(platform=("kubernetes",), limits={"grace": 35}), ("35 s",)),
    (
        "D08",
        Place(sooner, platform=("kubernetes",), rest={"pre_stop": 20}),
        Place(sooner, platform=("kubernetes",), rest={"pre_stop": 20}, limits={"grace": 35}),
        ("35 s", "preStop 20"),
    ),
    # a long drain_window takes no time of its own: drain_timeout bounds it
    (
        "D08",
        Place({**soon, "drain_window": 15}, platform=("kubernetes",), limits={"grace": 23}),
        Place({**soon, "drain_window": 15}, platform=("kubernetes",), limits={"grace": 24}),
        ("23 s, as given", "raise it to 24 s"),
    ),
    ("D08", Place(sooner, platform=("railway",)), Place(sooner, platform=("railway",), limits={"grace": 15}), ("0 s",)),
    ("D08", Place(sooner, platform=("fly",)), Place(sooner, platform=("fly",), limits={"grace": 15}), ("5 s of fly",)),
    # the master of gunicorn counts from SIGTERM on
    (
        "D08",
        Place(soon, "gunicorn", {"graceful_timeout": 26}, ("kubernetes",)),
        Place(soon, "gunicorn", {"graceful_timeout": 25}, ("kubernetes",)),
        ("can take 31 s", "graceful_timeout 26, the drain included"),
    ),
    (
        "D08",
        Place(soon, "uvicorn-worker", {"graceful_timeout": 25}, ("kubernetes",), rest={"pre_stop": 5}),
        Place(soon, "uvicorn-worker", {"graceful_timeout": 20}, ("kubernetes",), rest={"pre_stop": 5}),
        ("can take 35 s", "preStop 5 + graceful_timeout 25"),
    ),
    (
        "D08",
        Place({"drain_timeout": 31}, "gunicorn"),
        Place({"drain_timeout": 30}, "gunicorn"),
        ("kills its workers 30 s after SIGTERM", "drain_timeout 31", "raise graceful_timeout to 31 s"),
    ),
    (
        "D08",
        Place(server="uvicorn-worker", options={"graceful_timeout": 10}),
        Place(deaf, "uvicorn-worker", {"graceful_timeout": 10}),
        ("kills its workers 10 s after SIGTERM",),
    ),
    (
        "D08",
        Place({"drain_timeout": 60}, "gunicorn", platform=("kubernetes",)),
        Place({"drain_timeout": 60}, "uvicorn"),
        ("kills its workers", "; and ", "30 s of kubernetes"),
    ),
    ("D08", Place(platform=("istio",)), Place(deaf, platform=("istio",)), ("5 s of istio",)),
    (
        "D09",
        Place(deaf, "hypercorn", rest={"python": (3, 12)}),
        Place(deaf, "hypercorn", rest={"python": (3, 11)}),
        ("Python 3.12", "does not stop"),
    ),
    (
        "D09",
        Place(server="hypercorn", rest={"python": (3, 11)}),
        Place(server="hypercorn", options={"workers": 0}, rest={"python": (3, 12)}),
        ("no SIGTERM",),
    ),
    ("D09", Place(server="hypercorn"), Place(server="hypercorn", rest={"pre_stop": 30}), ("preStop",)),
    ("D09", Place(server="hypercorn"), Place({"drain_secret": SECRET}, "hypercorn"), ("set drain_secret",)),
    ("D10", Place(server="granian"), Place(deaf, "granian"), ("granian",)),
    ("D10", Place(server="daphne"), Place(server="daphne", rest={"pre_stop": 30}), ("daphne",)),
    ("D10", Place(server="granian"), Place({"drain_secret": SECRET}, "granian"), ("drain_secret",)),
    ("D11", Place(options={"limit_concurrency": 100}), Place(), ("limit_concurrency=100", "503")),
    ("D12", Place(options={"limit_max_requests": 1000}), Place(), ("limit_max_requests=1000",)),
    ("D12", Place(options={"reload": True}), Place(options={"reload": False}), ("reload",)),
    ("D12", Place(server="uvicorn-worker", options={"max_requests": 9}), Place(server="uvicorn-worker"), ()),
    ("D12", Place(server="gunicorn", options={"max_requests": 9}), Place(server="gunicorn"), ("max_requests=9",)),
    ("D12", Place(server="hypercorn", options={"max_requests": 9}), Place(server="hypercorn"), ()),
    ("D12", Place(server="granian", options={"workers_lifetime": 3600}), Place(server="granian"), ()),
    ("D12", Place(server="granian", options={"workers_max_rss": 512}), Place(server="daphne"), ()),
    ("D13", Place(server="daphne", rest={"refuses": True}), Place(rest={"refuses": True}), ("403",)),
    ("D13", Place(server="gunicorn", rest={"refuses": True}), Place(server="gunicorn"), ("on_handshake",)),
    ("D14", Place(server="daphne"), Place(), ("1012",)),
    ("D15", Place(platform=("aws-api-gateway",)), Place(platform=("aws-alb",)), ("aws-api-gateway",)),
    ("D15", Place(platform=("google-app-engine-standard",)), Place(platform=("google-app-engine-flex",)), ()),
    ("D16", Place(platform=("google-cloud-run",), rest={"http2": True}), Place(platform=("google-cloud-run",)), ()),
    (
        "D16",
        Place(platform=("azure-front-door",), rest={"caching": True}),
        Place(platform=("azure-front-door",), rest={"http2": True}),
        ("caching",),
    ),
    (
        "D17",
        Place(rest={"logins": ("CheckToken",), "unguarded": ("/ws", "/raw")}),
        Place(rest={"logins": ("CheckToken",), "unguarded": ("/ws", "/raw"), "guarded": True}),
        ("CheckToken", "/ws, /raw", "socket_for", "on_handshake"),
    ),
    (
        "D17",
        Place(server=None, rest={"logins": ("CheckToken",), "unguarded": ("/ws",)}),
        Place(server=None, rest={"logins": ("CheckToken",)}),
        (),
    ),
    (
        "D18",
        Place({"max_connections_per_address": 20}, platform=("cloudflare", "nginx", "kubernetes")),
        Place({"max_connections_per_address": 20, "trusted_proxies": ["10.0.0.0/8"]}, platform=("cloudflare", "nginx")),
        ("cloudflare, nginx forwards requests", "max_connections_per_address=20", "trusted_proxies"),
    ),
    (
        "D18",
        Place({"max_connect_rate_per_address": 2.5}, platform=("nginx",)),
        Place({"trusted_proxies": ["10.0.0.0/8"]}, platform=("nginx",)),
        ("max_connect_rate_per_address=2.5",),
    ),
    (
        "D18",
        Place({"max_connections_per_address": 20, "trusted_proxies": ["*"]}),
        Place({"max_connections_per_address": 20}, platform=("aws-nlb", "kubernetes"), limits={"idle_timeout": 60}),
        ("'*'", "set it to the addresses"),
    ),
    (
        "D18",
        Place(platform=("nginx",)),  # nothing is limited by address, but every line of the log shows the proxy's
        Place({"trusted_proxies": ["*"]}, platform=("nginx",)),
        ("logs and stats show it for every client",),
    ),
    (
        "D19",
        Place(server=None, rest={"early": ("/ws", "/chat")}),
        Place(server=None, rest={"bypassing": ("/ws", "/chat")}),
        ("/ws, /chat", "put the socket first", "dependencies="),
    ),
    (
        "D20",
        Place(server=None, rest={"shadowed": (("/ws", "the mount at /"),)}),
        Place(server=None, rest={"early": ("/ws",)}),
        ("/ws is never reached", "the mount at / comes before it", "mount static files last"),
    ),
    ("D21", Place(rest={"open_stats": ("/ws-stats",)}), Place(), ("/ws-stats", "dependencies=[Depends(admin)]")),
    (
        "D22",
        Place(options={"workers": 4}),
        Place({"reconnect_secret": SECRET}, options={"workers": 4}),
        ("workers=4", "WS_RECONNECT_SECRET", "within one worker"),
    ),
    (
        "D23",
        Place(server=None, rest={"background": ("/ws",)}),
        Place(server=None),
        ("/ws takes BackgroundTasks", "no task added there ever runs", "ws.create_task"),
    ),
    ("D22", Place(server="granian", options={"workers": 2}), Place(server="granian", options={"workers": 1}), ()),
    ("D22", Place(server="uvicorn-worker", options={"workers": 2}), Place(server="hypercorn"), ()),
]

IDS = [f"{code}-{sum(case[0] == code for case in CASES[:number])}" for number, (code, *_) in enumerate(CASES)]


@pytest.mark.parametrize(("code", "bad", "good", "named"), CASES, ids=IDS)
def test_check_reports_faulty_deployment_only(code: str, bad: Place, good: Place, named: tuple[str, ...]) -> None:
    """Each check finds one place at fault, names the numbers, says what to do, and is content with the other."""
    finding = bad.found()[code]
    assert [word for word in named if word not in f"{finding.problem} {finding.advice}"] == []
    assert finding.advice
    assert code not in good.found()


def test_every_check_is_tested() -> None:
    """No check is without a case, and their codes are in order, each once."""
    codes = [check.code for check in CHECKS]
    assert codes == sorted(set(codes))
    assert {case[0] for case in CASES} == {check.code for check in CHECKS}


def test_finding_has_severity_and_title_of_check() -> None:
    """Severity and title of a finding are its check's."""
    found = Place().found()
    (check,) = [check for check in CHECKS if check.code == "D07"]
    assert list(found) == ["D07"]
    assert (found["D07"].severity, found["D07"].title) == (check.severity, check.title)


def test_findings_are_sorted_by_code() -> None:
    """Whatever is found is told by code."""
    codes = list(Place({"heartbeat_interval": 400}, "daphne", platform=("google-cloud-run", "nginx")).found())
    assert codes == sorted(codes)
    assert len(codes) > 3


@pytest.mark.parametrize(
    "name", sorted(name for name, platform in PLATFORMS.items() if platform.unsupported_reason is None)
)
def test_for_platform_options_pass_checks_of_platform(name: str) -> None:
    """The options of `for_platform` are quick enough and short enough for the checks of the same platform."""
    place = Place(server=None, platform=(name,))
    surroundings = DeploymentContext(WebSocketConfig.for_platform(name), network_path=path_through(place.platform))
    assert not {finding.code for finding in run_checks(surroundings)} & {"D01", "D02", "D03"}


@pytest.mark.parametrize(
    "name", sorted(name for name, platform in PLATFORMS.items() if platform.unsupported_reason is None)
)
def test_for_platform_with_uvicorn_options_passes(name: str) -> None:
    """The two production helpers together satisfy the doctor on every platform that has time for a shutdown."""
    config = WebSocketConfig.for_platform(name, trusted_proxies=["10.0.0.0/8"], reconnect_secret=SECRET)
    server = SERVERS["uvicorn"]
    options = with_defaults(server, uvicorn_options(config))
    codes = {
        finding.code
        for finding in run_checks(DeploymentContext(config, server, options, network_path=path_through([name])))
    }
    expected = {"D04"} if name in TOO_SHORT else set()  # platforms by whose default no WebSocket can live
    if PLATFORMS[name].grace == 0:
        expected.add("D08")  # SIGKILL comes with SIGTERM until the platform is told otherwise
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
    """What D07 and D08 advise leaves neither of them when it is followed, whichever is followed first."""
    place = Place(config, platform=platform, limits=limits, rest={"pre_stop": pre_stop})
    for code in ("D07", "D08"):
        finding = place.found().get(code)
        if finding is None:
            continue
        advised = followed(place, finding.advice)
        assert not {"D07", "D08"} & set(advised.found()), (finding.advice, advised)


def followed(place: Place, advice: str) -> Place:
    """The place with the first thing done that an advice says."""
    config, options, limits = dict(place.config), dict(place.options), dict(place.limits)
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
    return Place(config, place.server, options, place.platform, limits, place.rest)


@pytest.mark.parametrize(
    ("place", "severity"),
    [
        (Place(platform=("kubernetes",)), "warning"),  # the drain may take longer than the grace
        (Place(platform=("railway",)), "error"),  # there is no time at all
        (Place(platform=("kubernetes",), rest={"pre_stop": 28}), "error"),
    ],
)
def test_short_grace_is_error_only_when_loss_is_certain(place: Place, severity: str) -> None:
    """D08 is a warning for the worst case, and an error where nothing is left of the grace."""
    assert place.found()["D08"].severity == severity


ENDS_IN_TIME = sorted(
    name
    for name, platform in PLATFORMS.items()
    if platform.unsupported_reason is None and (platform.grace is None or platform.grace >= 15)
)


@pytest.mark.parametrize("name", ENDS_IN_TIME)
def test_for_platform_drain_fits_into_grace(name: str) -> None:
    """The drain of `for_platform` leaves the five seconds, if the server takes no time of its own after it."""
    config = WebSocketConfig.for_platform(name)
    for server in (None, "uvicorn", "granian", "daphne"):
        options = None if server is None else with_defaults(SERVERS[server], {})
        surroundings = DeploymentContext(config, server and SERVERS[server], options, network_path=path_through([name]))
        assert "D08" not in {finding.code for finding in run_checks(surroundings)}


def test_unknown_gunicorn_timeout_falls_back_to_drain() -> None:
    """Without the server's options there is no graceful_timeout, and the drain is what is left to look at."""
    surroundings = DeploymentContext(
        WebSocketConfig(), SERVERS["gunicorn"], None, network_path=path_through(["kubernetes"])
    )
    (finding,) = run_checks(surroundings)
    assert (finding.code, "drain_timeout 30" in finding.problem) == ("D08", True)


@pytest.mark.parametrize("config", [WebSocketConfig(), WebSocketConfig(handle_signals=False)])
def test_hypercorn_with_unknown_workers_has_no_finding(config: WebSocketConfig) -> None:
    """D09 guesses nothing: with `--workers 0` all is well, and nobody has said."""
    assert run_checks(DeploymentContext(config, SERVERS["hypercorn"], None, python=(3, 12))) == []


def test_unknown_server_has_no_finding() -> None:
    """Without a server and a platform there is nothing to find, whatever the options are."""
    assert Place(off, None).found() == {}


def test_stable_protocol_pings_count_as_heartbeat() -> None:
    """StableWebSocketProtocol sends no pings beside the heartbeat; with the heartbeat off uvicorn's are sent."""
    found = Place({**off}, options={"ws": OURS, "ws_ping_interval": 90}, platform=("nginx",)).found()
    assert "uvicorn pings every 90 s" in found["D01"].problem
    assert "D05" in Place(off, options={"ws": OURS, "ws_ping_interval": None}).found()


def test_server_lifetime_counts_like_platform_lifetime() -> None:
    """daphne cuts each WebSocket after a day, unless it is told otherwise."""
    found = run_checks(collect_context(WebSocketConfig(), None, refuses=False, server="daphne"))
    assert "86400 s of daphne" in next(finding.problem for finding in found if finding.code == "D03")
    told = {"websocket_timeout": None}
    found = run_checks(collect_context(WebSocketConfig(), None, refuses=False, server="daphne", server_options=told))
    assert "D03" not in {finding.code for finding in found}
