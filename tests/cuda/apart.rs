//! A worker in a process of its own, as vLLM's are with several ranks. (In all other tests worker
//! and pool's owner share a process, each with its own mapping.)

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcellar_block::plan::{BlockCopy, StepPlan};
use kvcellar_engine::pool::Ticket;
use kvcellar_engine::pool::slot_table::Fill;

use crate::maker::assumed;
use crate::vllm::{load, worker};
use kvcellar_testkit::copies::cache::{KvCache, Shape};
use kvcellar_testkit::copies::ledger::until;
use kvcellar_testkit::copies::scene::Scene;
use kvcellar_testkit::stub_cuda::{Mutation, Stub};

const TICKET: &str = "KVCELLAR_STUB_TICKET";
const MUTATION: &str = "KVCELLAR_STUB_MUTATION";
const SLOTS: u32 = 6;

fn orders() -> Vec<BlockCopy> {
    (0..SLOTS).map(|slot| BlockCopy { slot, generation: 1, block: slot, group: 0, flags: 0 }).collect()
}

fn shape() -> Shape {
    Shape { blocks: 2 * SLOTS as usize, ..Shape::plain(3) }
}

#[test]
#[ignore = "run by the tests below"]
fn the_worker() {
    let ticket: Ticket = serde_json::from_str(&std::env::var(TICKET).expect("a ticket")).expect("a ticket");
    let stub = Stub::take(1);
    stub.strict();
    stub.mutate(Mutation::named(&std::env::var(MUTATION).expect("a mutation")));
    let cache = KvCache::new(shape());
    let groups = Arc::new(cache.runs());
    let (mut worker, _) = worker(&groups, assumed());
    worker.attach(&ticket).expect("the pool is there");
    let compute = stub.compute();
    worker.set_compute(Some(compute));
    stub.hold(true);
    worker.begin_step(&StepPlan { stores_after: orders(), ..StepPlan::default() }.encode()).expect("a plan");
    for block in 0..SLOTS {
        let ranges: Vec<(u64, usize)> = groups[0].pieces(block).expect("a block").collect();
        stub.forward(compute, &ranges, 40 + block as u8, true);
    }
    worker.finish_step();
    // A copier that answers early has all the time to do so. Then vLLM gives two of the blocks to
    // somebody else.
    let deadline = Instant::now() + Duration::from_millis(100);
    while worker.in_flight() > 0 && Instant::now() < deadline {
        std::thread::yield_now();
    }
    let fence = StepPlan { waits: orders()[..2].to_vec(), ..StepPlan::default() };
    worker.begin_step(&fence.encode()).expect("a plan");
    for block in 0..2 {
        let ranges: Vec<(u64, usize)> = groups[0].pieces(block).expect("a block").collect();
        stub.forward(compute, &ranges, 90, true);
    }
    worker.finish_step();
    stub.hold(false);
    until("the offloads are over", || worker.in_flight() == 0);
    // Refused until the owner has published the slots.
    let back: Vec<BlockCopy> = orders().iter().map(|copy| BlockCopy { block: copy.block + SLOTS, ..*copy }).collect();
    let plan = StepPlan { loads: vec![load("a", &back)], ..StepPlan::default() }.encode();
    until("the load works", || {
        worker.begin_step(&plan).expect("a plan");
        worker.start_loads();
        let mut failed = true;
        until("the load ends", || {
            let results = worker.take_results();
            failed = !results.failed.is_empty();
            !results.finished.is_empty()
        });
        !failed
    });
    worker.release();
    for block in 0..SLOTS {
        assert!(cache.block(0, (SLOTS + block) as usize).iter().all(|byte| *byte == 40 + block as u8));
    }
    stub.is_clean();
}

/// Runs the worker's process with the copier changed. Whether it found everything right, and so did
/// the pool's owner.
fn play(mutation: Mutation) -> bool {
    let scene = Scene::new(&[(shape(), None)], SLOTS.into());
    for slot in 0..SLOTS {
        scene.begin(slot, 0, slot);
    }
    let ticket = serde_json::to_string(&scene.pool.ticket()).expect("a ticket");
    let mut child = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--ignored", "--exact", "apart::the_worker", "--nocapture"])
        .env(TICKET, ticket)
        .env(MUTATION, format!("{mutation:?}"))
        .stdout(Stdio::null())
        .stderr(if mutation == Mutation::None { Stdio::inherit() } else { Stdio::null() })
        .spawn()
        .expect("a process");
    until("the offloads are answered", || (0..SLOTS).all(|slot| scene.line(slot).fill(1) == Fill::Done));
    let mut right = true;
    for slot in 0..SLOTS {
        right &= scene.part(slot, 0, 0).iter().all(|byte| *byte == 40 + slot as u8);
        scene.line(slot).publish();
    }
    child.wait().expect("it ends").success() && right
}

#[test]
fn a_worker_apart_copies_into_the_same_pool() {
    assert!(play(Mutation::None));
}

#[test]
fn a_worker_apart_that_breaks_a_rule_is_found() {
    for mutation in [Mutation::CopiesWaitForNothing, Mutation::EventsAreOverAtOnce, Mutation::ComputeWaitsForNothing] {
        assert!(!play(mutation), "{mutation:?}");
    }
}
