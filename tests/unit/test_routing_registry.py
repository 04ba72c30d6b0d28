"""The live registry: who counts, for how long, at which price, and what experience does."""

from __future__ import annotations

from marketplace.routing.choice import Question, choose
from marketplace.routing.health import PENALTY_HALF_LIFE_MS, SAMPLES_MIN, Health
from marketplace.routing.registry import PRICE_CHANGE_MS_MIN, STATUS_BURST, Outcome, Registry
from marketplace.routing.shortlist import SIZE
from node_agent import protocol
from node_agent.protocol import ModelStatus, NodeId

NODE = NodeId("n-1")


class Time:
    def __init__(self) -> None:
        self.ms = 1_000_000

    def __call__(self) -> int:
        return self.ms


class World:
    """A registry that knows node n-1, and a clock to turn."""

    def __init__(self) -> None:
        self.time = Time()
        self.registry = Registry(self.time)
        self.registry.set_known({NODE: "olga"})

    def hear(self, *, node: str = "n-1", subject: str = "", draining: bool = False, **model: object) -> None:
        fields = {"name": "m", "context": 4096, "price_in": 1, "price_out": 2, "capacity": 4, **model}
        status = protocol.Status(
            v=1,
            node_id=node,
            seq=0,
            time_ms=0,
            version="t",
            is_draining=draining,
            models=[ModelStatus(**fields)],  # type: ignore[arg-type]
        )
        self.registry.hear((subject or f"status.{node}").encode(), protocol.encode(status))

    def price_all(self, version: int) -> None:
        for (node, model), (price_in, price_out) in self.registry.unpriced():
            self.registry.set_price(node, model, price_in, price_out, version)

    def chosen(self) -> list[str]:
        question = Question(self.registry.views("m"), self.time.ms, 0.0)
        return [view.node_id for view in choose(question).candidates]


def a_world() -> World:
    world = World()
    world.hear()
    world.price_all(7)
    return world


def test_an_offer_counts_once_its_price_is_stored() -> None:
    world = World()
    world.hear()
    assert world.registry.views("m") == []
    assert world.registry.models() == []
    world.price_all(7)
    (view,) = world.registry.views("m")
    assert (view.operator_id, view.price_in, view.price_out, view.price_version) == ("olga", 1, 2, 7)
    assert world.registry.models() == ["m"]
    assert world.registry.unpriced() == []


def test_a_new_price_holds_only_from_its_stored_version_and_not_too_often() -> None:
    world = a_world()
    world.time.ms += PRICE_CHANGE_MS_MIN - 1
    world.hear(price_out=9)
    assert world.registry.unpriced() == []
    world.time.ms += 1
    world.hear(price_out=9)
    assert [view.price_out for view in world.registry.views("m")] == [2]
    world.price_all(8)
    assert [(view.price_out, view.price_version) for view in world.registry.views("m")] == [(9, 8)]


def test_a_price_taken_back_before_it_was_stored_is_forgotten() -> None:
    world = a_world()
    world.time.ms += PRICE_CHANGE_MS_MIN
    world.hear(price_out=9)
    world.hear(price_out=2)
    assert world.registry.unpriced() == []


def test_unknown_nodes_foreign_subjects_and_rubbish_are_ignored() -> None:
    world = World()
    world.hear(node="n-2")
    world.hear(subject="status.n-2")
    world.registry.hear(b"status.n-1", b"\xc1")
    world.registry.hear(b"status.\xff", b"")
    assert world.registry.unpriced() == []
    world.registry.add(NodeId("n-2"), "otto")
    world.hear(node="n-1", subject="status.n-2")  # n-2 speaks as n-1
    assert world.registry.unpriced() == []
    assert world.registry.live("n-1") is None


def test_silence_of_60_s_ends_an_offer() -> None:
    world = a_world()
    world.time.ms += protocol.NODE_SILENT_MS_MAX
    world.registry.expire()
    assert world.chosen() == ["n-1"]
    world.time.ms += 1
    assert world.chosen() == []
    assert world.registry.live("n-1") is None
    world.registry.expire()
    assert world.registry.views("m") == []
    world.hear()
    world.price_all(7)
    assert world.chosen() == ["n-1"]


def test_revocation_and_draining_end_an_offer_at_once() -> None:
    world = a_world()
    world.hear(draining=True)
    assert world.chosen() == []
    world.hear()
    assert world.chosen() == ["n-1"]
    world.registry.set_known({})
    assert world.registry.views("m") == []
    world.hear()
    assert world.registry.views("m") == []


def test_a_model_no_longer_named_is_withdrawn() -> None:
    world = a_world()
    world.hear(name="other")
    world.price_all(8)
    assert world.registry.models() == ["other"]


def test_own_requests_count_until_the_next_status_counts_them() -> None:
    world = a_world()
    for _ in range(4):
        world.registry.begin(NODE, "m")
    assert world.registry.views("m")[0].running == 4
    assert world.chosen() == []
    world.hear(running=4)
    assert world.registry.views("m")[0].running == 4
    world.registry.finish(NODE, "m", Outcome.NEUTRAL)
    assert world.registry.views("m")[0].running <= 4
    world.hear(running=3)
    assert world.registry.views("m")[0].running == 3


def test_failures_lower_a_node_then_exclude_it_and_time_forgives() -> None:
    world = a_world()
    world.registry.finish(NODE, "m", Outcome.FAILED)
    assert world.registry.views("m")[0].penalty_permille == 500
    assert world.chosen() == ["n-1"]
    for _ in range(SAMPLES_MIN):
        world.registry.finish(NODE, "m", Outcome.FAILED)
    assert world.chosen() == []
    for _ in range(11):
        world.time.ms += 30_000
        world.hear()
    world.price_all(7)
    assert world.chosen() == ["n-1"]
    assert world.registry.views("m")[0].penalty_permille == 0


def test_a_flood_of_statuses_is_dropped_before_it_is_read() -> None:
    world = a_world()
    for number in range(STATUS_BURST * 3):
        world.hear(waiting=number)
    assert world.registry.views("m")[0].waiting == STATUS_BURST - 2  # one was spent in `a_world`
    world.time.ms += 1_000
    world.hear(waiting=3)
    assert world.registry.views("m")[0].waiting == 3


def test_latency_is_smoothed() -> None:
    health = Health()
    health.succeeded(0, 100)
    health.succeeded(0, 200)
    assert health.latency_ms == 120
    health.succeeded(0, None)
    assert health.latency_ms == 120


def test_success_is_of_the_last_five_minutes() -> None:
    health = Health()
    for _ in range(9):
        health.succeeded(10_000, None)
    assert health.success_permille(10_000) is None
    health.failed(10_000)
    assert health.success_permille(299_999) == 900
    assert health.success_permille(300_000) is None


def test_a_penalty_halves_in_its_half_life() -> None:
    health = Health()
    health.failed(0)
    assert health.penalty_permille(0) == 500
    assert health.penalty_permille(PENALTY_HALF_LIFE_MS) == 250
    health.failed(0)
    assert health.penalty_permille(0) == 750


def test_of_very_many_nodes_the_best_are_looked_at() -> None:
    world = World()
    registry = world.registry
    names = [f"n{number:03}" for number in range(3 * SIZE)]
    registry.set_known({NodeId(name): "olga" for name in names})
    for _ in range(2):  # the second time there are more than the list takes, and all have a price
        for cheaper, name in enumerate(names):
            world.hear(node=name, price_in=10_000 - 10 * cheaper, price_out=10_000 - 10 * cheaper)
        world.price_all(7)
        world.time.ms += 2_000
    assert [view.node_id for view in registry.views("m")] == names
    assert {view.node_id for view in registry.best_views("m")} == set(names[-SIZE:])
    registry.remove(NodeId(names[-1]))
    assert names[-1] not in {view.node_id for view in registry.best_views("m")}
    world.hear(node=names[-2], draining=True)
    assert names[-2] not in {view.node_id for view in registry.best_views("m")}


def test_a_node_the_fabric_does_not_know_is_silent_until_it_speaks() -> None:
    world = a_world()
    assert world.chosen() == ["n-1"]
    world.registry.absent(NODE)
    assert world.chosen() == []
    world.time.ms += 2_000
    world.hear()
    assert world.chosen() == ["n-1"]
