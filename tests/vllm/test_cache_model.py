"""The model of the dram tier: hand-made logs that it must accept, and wrong ones that it must refuse. Needs no vLLM."""

import copy
from typing import Any

import pytest

from tests.vllm.cache_model import Disagreement, DramTier, Replay
from tests.vllm.oplog import Op, hit_tokens, outstanding

BLOCK = 4


def opened(slots: int = 4) -> Op:
    return {"op": "open", "slots": slots, "slot_bytes": 4096, "adopted": 0}


def store(request: str, batch: int, keys: list[str], **more: list[str]) -> Op:
    op = {
        "op": "store",
        "req": request,
        "batch": batch,
        "touch": [],
        "keys": keys,
        "evicted": [],
        "dropped": [],
        "reason": "",
    }
    return {**op, **more}


def filled(batch: int, keys: list[str]) -> Op:
    return {"op": "filled", "batch": batch, "keys": keys}


def lookup(request: str, keys: list[str], hit: int | None, local: int = 0, max_hit: int | None = None) -> Op:
    tokens = len(keys) * BLOCK + 1
    limit = len(keys) * BLOCK if max_hit is None else max_hit
    return {
        "op": "lookup",
        "req": request,
        "local": local,
        "num_tokens": tokens,
        "max_hit": limit,
        "keys": [keys],
        "hit": hit,
    }


def load(request: str, keys: list[str], local: int = 0) -> Op:
    return {"op": "load", "req": request, "local": local, "external": len(keys) * BLOCK, "keys": keys}


def load_done(request: str, keys: list[str], ok: bool = True) -> Op:
    return {"op": "load_done", "req": request, "ok": ok, "keys": keys}


def retire(request: str, keys: list[str]) -> Op:
    return {"op": "retire", "req": request, "keys": keys}


def state(total: int, free: int, filling: int, filled: int, pins: int = 0) -> Op:
    counts = {"total": total, "free": free, "filling": filling, "filled": filled, "pins": pins}
    return {"op": "state", **counts, "leases": 0, "fences": 0}


# Fill, hit, load, then a second request whose blocks push out the coldest ones. Reverse touching
# makes a1 the hottest of its request, so b1 takes the free slot, b2 takes the slot of a3 (the tail
# goes first), b3 that of a2.
GOOD = [
    opened(4),
    lookup("a", ["a1", "a2", "a3"], 0),
    store("a", 1, ["a1", "a2", "a3"]),
    state(4, 1, 3, 0),
    filled(1, ["a1", "a2", "a3"]),
    retire("a", ["a1", "a2", "a3"]),
    state(4, 1, 0, 3),
    lookup("c", ["a1", "a2", "x"], 8),
    load("c", ["a1", "a2"]),
    state(4, 1, 0, 3, pins=2),
    load_done("c", ["a1", "a2"]),
    retire("c", ["a1", "a2"]),
    lookup("b", ["b1", "b2", "b3"], 0),
    store("b", 2, ["b1", "b2", "b3"], evicted=["a3", "a2"]),
    filled(2, ["b1", "b2", "b3"]),
    retire("b", ["b1", "b2", "b3"]),
    lookup("d", ["a1", "a2", "a3"], 4),
    state(4, 0, 0, 4),
]


def replay(ops: list[Op]) -> Replay:
    return Replay(BLOCK).run(ops)


def changed(index: int, **values: Any) -> list[Op]:
    ops = copy.deepcopy(GOOD)
    assert all(ops[index][name] != value for name, value in values.items()), "the change changes nothing"
    ops[index].update(values)
    return ops


def test_a_correct_log_is_accepted() -> None:
    result = replay(GOOD)
    assert (result.hit_tokens, result.stored_blocks, result.evicted_blocks, result.dropped_blocks) == (8, 6, 2, 0)
    assert result.resident() == {"a1", "b1", "b2", "b3"}
    assert hit_tokens(GOOD) == 8
    assert outstanding(GOOD) == 0
    assert outstanding(GOOD[:9]) == 1


@pytest.mark.parametrize(
    ("ops", "complaint"),
    [
        (changed(7, hit=4), "the hit"),
        (changed(7, hit=12), "the hit"),
        (changed(1, hit=None), "nobody loads"),
        (changed(13, evicted=["a2", "a3"]), "evicted keys"),
        (changed(13, evicted=["a3"]), "evicted keys"),
        (changed(13, keys=["b1"], dropped=["b2", "b3"], evicted=[]), "evicted keys"),
        (changed(13, touch=["zz"]), "touched keys"),
        (changed(13, keys=["a1", "b2", "b3"]), "resident or filling already"),
        (changed(14, keys=["b1", "b2"]), "filled in part"),
        (changed(14, keys=["b2", "b1", "b3"]), "keys of the batch"),
        (changed(14, batch=7), "keys of the batch"),
        (changed(15, keys=["b1", "b2"]), "did not touch"),
        (changed(15, keys=["b1", "b2", "b3", "a3"]), "retired keys"),
        (changed(8, external=12), "tokens to load"),
        (changed(8, keys=["a1", "zz"]), "not resident"),
        (changed(10, keys=["a1"]), "finished load"),
        (changed(9, pins=0), "pinned"),
        (changed(6, free=2), "free slots"),
        (changed(6, filled=4), "filled slots"),
        (changed(0, adopted=2), "adopted"),
        (changed(12, op="teleport"), "kind of operation"),
        (GOOD[1:], "first operation"),
    ],
)
def test_a_wrong_log_is_refused(ops: list[Op], complaint: str) -> None:
    with pytest.raises(Disagreement, match=complaint):
        replay(ops)


def test_the_message_names_operation_and_both_sides() -> None:
    with pytest.raises(Disagreement, match=r"operation 7: the hit.*model says 8.*engine 4"):
        replay(changed(7, hit=4))


def test_the_tail_of_a_prefix_goes_before_its_start() -> None:
    ops = [opened(2), store("a", 1, ["a1", "a2"]), filled(1, ["a1", "a2"])]
    replay([*ops, store("b", 2, ["b1"], evicted=["a2"])])
    replay([*ops, retire("a", ["a2", "a1"]), store("b", 2, ["b1"], evicted=["a1"])])
    with pytest.raises(Disagreement, match="evicted keys"):
        replay([*ops, store("b", 2, ["b1"], evicted=["a1"])])


def test_a_request_never_evicts_its_own_blocks() -> None:
    replay(
        [
            opened(2),
            store("a", 1, ["a1", "a2"], dropped=["a3"]),
            filled(1, ["a1", "a2"]),
            store("a", 2, [], dropped=["a4"]),
        ]
    )
    with pytest.raises(Disagreement, match="evicted keys"):
        replay([opened(2), store("a", 1, ["a1", "a2"]), filled(1, ["a1", "a2"]), store("a", 2, ["a3"], evicted=["a2"])])


def test_filling_and_pinned_keys_are_never_victims() -> None:
    ops = [
        opened(2),
        store("a", 1, ["a1"]),
        filled(1, ["a1"]),
        store("b", 2, ["b1"]),
        lookup("c", ["a1"], 4),
        load("c", ["a1"]),
    ]
    replay([*ops, store("d", 3, [], dropped=["d1"]), load_done("c", ["a1"]), store("d", 4, ["d1"], evicted=["a1"])])
    with pytest.raises(Disagreement, match="evicted keys"):
        replay([*ops, store("d", 3, ["d1"], evicted=["a1"])])


def test_a_touch_protects_before_anything_is_allocated() -> None:
    ops = [opened(2), store("a", 1, ["a1", "a2"]), filled(1, ["a1", "a2"]), retire("a", ["a1", "a2"])]
    replay([*ops, store("b", 2, ["b1"], touch=["a2"], evicted=["a1"])])
    with pytest.raises(Disagreement, match="evicted keys"):
        replay([*ops, store("b", 2, ["b1"], touch=["a2"], evicted=["a2"])])


def test_a_hit_starts_at_the_local_hit_and_ends_at_the_limit() -> None:
    tier = DramTier(8)
    tier.place(["k1", "k2", "k3"], "a")
    tier.fill(["k1", "k2", "k3"])
    assert tier.hit(["k0", "k1", "k2", "k3", "k4"], local=4, max_hit=20, block_tokens=4) == 12
    assert tier.hit(["k0", "k1", "k2", "k3", "k4"], local=0, max_hit=20, block_tokens=4) == 0
    assert tier.hit(["k1", "k2", "k3"], local=0, max_hit=11, block_tokens=4) == 8
    assert tier.hit(["k1", "k2"], local=8, max_hit=8, block_tokens=4) == 0


def test_waiting_for_a_load_of_the_same_prefix_is_allowed() -> None:
    ops = [opened(2), store("a", 1, ["a1"]), filled(1, ["a1"]), lookup("b", ["a1"], 4), load("b", ["a1"])]
    assert (
        replay([*ops, lookup("c", ["a1", "z"], None), load_done("b", ["a1"]), lookup("c", ["a1", "z"], 4)]).waits == 1
    )


def test_two_loads_may_hold_one_key() -> None:
    ops = [opened(1), store("a", 1, ["a1"]), filled(1, ["a1"])]
    for request in "bc":
        ops += [lookup(request, ["a1"], 4), load(request, ["a1"])]
    ops += [load_done("b", ["a1"]), state(1, 0, 0, 1, pins=1), load_done("c", ["a1"]), state(1, 0, 0, 1)]
    assert replay(ops).hit_tokens == 8


def test_a_lost_batch_member_is_never_visible() -> None:
    lost = {"op": "lost", "batch": 1, "keys": ["a2"]}
    ops = [opened(2), store("a", 1, ["a1", "a2"]), filled(1, ["a1"]), lost]
    assert replay([*ops, state(2, 1, 0, 1), lookup("b", ["a1", "a2"], 4)]).resident() == {"a1"}
    with pytest.raises(Disagreement, match="the hit"):
        replay([*ops, lookup("b", ["a1", "a2"], 8)])
    with pytest.raises(Disagreement, match="filled in part"):
        replay([*ops[:3], lookup("b", ["a1", "a2"], 4)])


def test_a_reset_forgets_all_but_the_copies_in_flight() -> None:
    ops = [opened(4), store("a", 1, ["a1", "a2"]), filled(1, ["a1", "a2"]), lookup("b", ["a1"], 4), load("b", ["a1"])]
    ops += [
        store("c", 2, ["c1"]),
        {"op": "reset", "generation": 2},
        lookup("d", ["a1", "a2"], 0),
        lookup("d", ["c1"], 0),
    ]
    ops += [load_done("b", ["a1"]), {"op": "lost", "batch": 2, "keys": ["c1"]}, state(4, 4, 0, 0)]
    assert replay(ops).resident() == set()
    with pytest.raises(Disagreement, match="after a reset"):
        replay([*ops[:-2], filled(2, ["c1"])])


def test_a_dropped_block_is_a_miss() -> None:
    ops = [
        opened(2),
        store("a", 1, ["a1", "a2"]),
        filled(1, ["a1", "a2"]),
        {"op": "drop", "keys": ["a2"], "reason": "bad"},
    ]
    replay([*ops, lookup("b", ["a1", "a2"], 4), state(2, 1, 0, 1)])


def opened_disk(window: int = 1) -> Op:
    return {"op": "open_disk", "extents": 8, "extents_max": 8, "reopened": 0, "window": window}


def spill(*keys: str) -> list[Op]:
    return [{"op": "spill", "keys": list(keys), "evicted": []}, {"op": "spilled", "keys": list(keys), "ok": True}]


def restore(request: str, keys: list[str], own: list[str], window: list[str], evicted: list[str]) -> Op:
    return {**load(request, keys), "restore": own, "window": window, "evicted": evicted}


def restored(*keys: str) -> Op:
    return {"op": "restored", "keys": list(keys), "lost": []}


# Two slots and a window of one. a1 and a2 go to disk, b1 and b2 push them out of memory, then a1
# and a2 come back: room is made for both before either is read.
DISK = [
    opened(3),
    opened_disk(),
    store("a", 1, ["a1", "a2"]),
    filled(1, ["a1", "a2"]),
    *spill("a1", "a2"),
    store("b", 2, ["b1", "b2"], evicted=["a2", "a1"]),
    filled(2, ["b1", "b2"]),
    *spill("b2"),
    lookup("c", ["a1", "a2", "x"], 8),
    restore("c", ["a1", "a2"], ["a1", "a2"], [], ["b2", "b1"]),
    state(2, 0, 2, 0, pins=2),
    restored("a1", "a2"),
    state(2, 0, 0, 2, pins=2),
    load_done("c", ["a1", "a2"]),
    state(2, 0, 0, 2),
]


def test_blocks_come_back_from_disk() -> None:
    result = replay(DISK)
    assert (result.disk_hit_tokens, result.spilled_blocks, result.unspilled_blocks) == (8, 3, 1)
    assert result.resident() == {"a1", "a2"}


def test_what_finds_no_slot_streams_through_the_window() -> None:
    held = [*DISK[:8], *spill("b1", "b2"), lookup("e", ["b1", "b2"], 8)]
    held.append(restore("e", ["b1", "b2"], [], [], []))
    streamed = restore("c", ["a1", "a2"], [], ["a1", "a2"], [])
    ops = [*held, lookup("c", ["a1", "a2"], 8), streamed, restored("a1", "a2"), load_done("c", [])]
    result = replay(ops)
    assert (result.streamed_blocks, result.resident()) == (2, {"b1", "b2"})
    with pytest.raises(Disagreement, match="restored into slots"):
        replay([*ops[:-3], restore("c", ["a1", "a2"], ["a1"], ["a2"], [])])


@pytest.mark.parametrize(
    ("index", "values", "complaint"),
    [
        (1, {"reopened": 1}, "reopened"),
        (4, {"keys": ["a1", "x"]}, "keys to write"),
        (5, {"keys": ["a1", "x"]}, "were not being written"),
        (5, {"ok": False}, "evicted keys|the hit"),
        (6, {"keys": ["a1", "b2"]}, "resident or filling already"),
        (10, {"hit": 4}, "the hit"),
        (11, {"evicted": ["b1", "b2"]}, "evicted keys"),
        (11, {"restore": ["a1"], "window": ["a2"]}, "restored into slots"),
        (13, {"keys": ["a1", "b1"]}, "reads of this key"),
        (13, {"keys": ["a1"], "lost": ["a2"]}, "could not be read"),
        (12, {"filling": 0, "filled": 2}, "filling slots"),
    ],
)
def test_a_wrong_log_of_a_disk_is_refused(index: int, values: dict[str, Any], complaint: str) -> None:
    ops = copy.deepcopy(DISK)
    ops[index].update(values)
    with pytest.raises(Disagreement, match=complaint):
        replay(ops)


def test_a_block_being_written_is_no_victim() -> None:
    begun = [*DISK[:4], {"op": "spill", "keys": ["a2"], "evicted": []}]
    replay([*begun, store("b", 2, ["b1"], evicted=["a1"])])
    with pytest.raises(Disagreement, match="evicted keys"):
        replay([*begun, store("b", 2, ["b1"], evicted=["a2"])])
