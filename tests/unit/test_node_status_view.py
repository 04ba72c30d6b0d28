"""The live picture: what an operator reads of his node and of why requests went elsewhere."""

from rich.console import Console

from node_agent.account import (
    Dispute,
    Loss,
    ModelReport,
    NodeReport,
    Report,
    Standing,
    StandingFinding,
)
from node_agent.meter import DAY_MS, Meter
from node_agent.prices import share_nano
from node_agent.protocol import ModelStatus
from node_agent.service import EngineView, LocalStatus
from node_agent.status_view import NOTHING_RUNS, News, picture

RUNNING = LocalStatus(
    pid=1,
    time_ms=0,
    node_id="n1",
    version="0",
    is_connected=True,
    is_draining=False,
    running=3,
    served=40,
    failed=2,
    prompt_tokens=1000,
    completion_tokens=2000,
    engines=[EngineView("vllm", "down", 3, "the engine ended with status 1")],
    models=[
        ModelStatus("m", 2048, 100_000_000, 200_000_000, running=3, kv_used_permille=250, is_ready=False)
    ],
    tokens_per_second=51.4,
    earned_today_nano=1_239_999_999,
)
LOST = ModelReport("m", 400, 88, 220, [Loss("price", 200, 500, "others were cheaper: $0.08 against $0.10")])
REPORT = Report(24, [NodeReport("n1", "rig", [LOST]), NodeReport("n2", "other", [LOST])])


def shown(found: LocalStatus | None, news: News | None) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(picture(found, news))
    return captured.get()


def test_the_running_node() -> None:
    text = shown(RUNNING, None)
    for part in ("n1", "connected", "3 running", "40 served, 2 failed", "51 tokens/s", "$1.23 earned today"):
        assert part in text
    assert "not ready" in text
    assert "25 %" in text
    assert "engine vllm: down, 3 restarts: the engine ended with status 1" in text
    assert "tollway-node login" in text


def test_why_requests_went_to_others_this_node_only() -> None:
    text = shown(RUNNING, News(report=REPORT, standing=Standing("good", "", [])))
    assert text.count("lost 50 %: others were cheaper: $0.08 against $0.10") == 1
    assert "asked first in 88 of 400" in text
    assert "standing" not in text


def test_held_earnings_name_the_next_command() -> None:
    finding = StandingFinding("drift", "strike", "17 of 100 answers were overstated")
    text = shown(None, News(standing=Standing("held", "counts are overstated", [finding])))
    assert NOTHING_RUNS in text
    assert "standing: held: counts are overstated" in text
    assert "17 of 100" in text
    assert "tollway-node dispute" in text
    open_one = Dispute("d", "open", "2026", "no")
    text = shown(None, News(standing=Standing("held", "x", [], dispute=open_one)))
    assert "tollway-node dispute" not in text


def test_a_marketplace_that_does_not_answer_is_told() -> None:
    assert "cannot be reached" in shown(RUNNING, News(trouble="https://x cannot be reached"))


def test_speed_is_the_difference_and_never_negative() -> None:
    meter = Meter(0)
    assert meter.rate(100, 10.0) == 0.0
    assert meter.rate(250, 13.0) == 50.0
    assert meter.rate(240, 16.0) == 0.0
    assert meter.earned_today_nano(DAY_MS) == 0


def test_the_share_is_eighty_percent_of_the_cost_rounded_up() -> None:
    assert share_nano(100_000_000, 0, prompt_tokens=1_000_000, completion_tokens=0) == 80_000_000
    assert share_nano(1, 0, prompt_tokens=1, completion_tokens=0) == 0  # 1 nano-dollar, of which 0.8
    assert share_nano(3, 3, prompt_tokens=500_000, completion_tokens=500_001) == 3
