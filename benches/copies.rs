//! `cargo bench --bench copies [-- --json]`: what our own code costs on a block's way between the
//! KV cache and a slot, without a GPU.
//!
//! Measured, each beside its physical limit in the same run: the host copier, in GB/s beside one
//! copy of the same bytes in one piece by one thread; the pieces of a block, joining fragments and
//! step plans, in CPU time of this thread for each. Not measured: a driver's calls and the bus
//! (`kvcellar bench dma`), disks (`kvcellar bench nvme`), lookups (`kvcellar bench lookup`).
//! `cargo test` runs all of it with tiny sizes.

#![allow(
    clippy::needless_for_each,
    clippy::single_match_else,
    clippy::doc_markdown,
    reason = "shared with tests, where it reads better"
)]
#![expect(clippy::expect_used, reason = "a benchmark that cannot be set up ends")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use kvcellar_bench::report::{Measured, measured, print, report, thread_cpu_s};
use kvcellar_block::plan::{BlockCopy, Load, StepPlan};
use kvcellar_engine::gpu::fragments::{self, Fragment};
use kvcellar_engine::gpu::{After, Answers, Copier, Direction, Order};

use kvcellar_testkit::copies::cache::{Layout, Shape};
use kvcellar_testkit::copies::ledger::Ledger;
use kvcellar_testkit::copies::scene::{Host, Maker, Scene};
use kvcellar_testkit::random::Random;

/// How much is done.
#[derive(Clone, Copy)]
struct Sizes {
    repetitions: usize,
    /// Bytes that each copy moves.
    bytes: usize,
    /// Fragments, pieces or orders of one round.
    count: usize,
}

const WHOLE: Sizes = Sizes { repetitions: 21, bytes: 256 << 20, count: 4096 };
const TINY: Sizes = Sizes { repetitions: 2, bytes: 1 << 20, count: 64 };

/// KV of 32 layers: name, layout, bytes of one layer's block.
const SHAPES: [(&str, Layout, usize); 4] = [
    ("BLHNC, 32 x 64 KiB", Layout::BlockMajor, 64 << 10),
    ("LBHNC, 32 x 64 KiB", Layout::LayerMajor, 64 << 10),
    ("LBHNC, 32 x 16 KiB", Layout::LayerMajor, 16 << 10),
    ("LBHNC, 32 x 4 KiB", Layout::LayerMajor, 4 << 10),
];
const LAYERS: usize = 32;

/// CPU nanoseconds of each of `count` things that one round of `work` does on what `prepare` makes.
fn each<T>(
    sizes: Sizes,
    name: &str,
    count: usize,
    mut prepare: impl FnMut() -> T,
    mut work: impl FnMut(T),
) -> Measured {
    let rounds = (0..=sizes.repetitions).map(|_| {
        let made = prepare();
        let now = || thread_cpu_s().expect("a clock that Linux has");
        let before = now();
        work(made);
        (now() - before) * 1e9 / count as f64
    });
    // The first round warms up.
    measured(name, "ns", rounds.skip(1).collect())
}

/// Seconds of one pass of the host copier over all blocks.
fn pass(copier: &dyn Copier, ledger: &Ledger, orders: &[Order]) -> f64 {
    let before = ledger.answers().len();
    let started = Instant::now();
    copier.submit(orders, &After::default()).expect("threads that live");
    let answers = ledger.wait_for(before + orders.len());
    let seconds = started.elapsed().as_secs_f64();
    assert!(answers[before..].iter().all(|(_, outcome)| outcome.is_ok()), "a copy failed");
    seconds
}

fn one_piece(to: &mut [u8], from: &[u8]) -> f64 {
    let started = Instant::now();
    to.copy_from_slice(black_box(from));
    black_box(&*to);
    started.elapsed().as_secs_f64()
}

/// The host copier beside one copy in one piece, in turn.
fn host_copier(sizes: Sizes, results: &mut Vec<Measured>) {
    for (name, layout, page) in SHAPES {
        let blocks = (sizes.bytes / (LAYERS * page)).max(1);
        let bytes = blocks * LAYERS * page;
        let scene = Scene::new(&[(Shape { layout, page, blocks, ..Shape::plain(LAYERS) }, None)], blocks as u64);
        scene.scramble(&mut Random::new(7));
        let ledger = Arc::new(Ledger::default());
        let copier = Host::make(scene.side(0, false), Arc::clone(&ledger) as Arc<dyn Answers>, 1);
        let (from, mut to) = (vec![1_u8; bytes], vec![2_u8; bytes]);
        let mut order: Vec<u32> = (0..blocks as u32).collect();
        Random::new(8).shuffle(&mut order);
        let mut found = [const { Vec::new() }; 4];
        for turn in 0..=sizes.repetitions {
            // Blocks come in any order, slots in theirs.
            let copies: Vec<BlockCopy> =
                order.iter().zip(0..).map(|(block, slot)| scene.begin(slot, 0, *block)).collect();
            for (at, direction) in [Direction::Offload, Direction::Load].into_iter().enumerate() {
                let orders: Vec<Order> =
                    copies.iter().map(|copy| Order { copy: *copy, direction, ticket: 0 }).collect();
                let whole = one_piece(&mut to, &from);
                let seconds = pass(&*copier, &ledger, &orders);
                for copy in copies.iter().filter(|_| at == 0) {
                    scene.line(copy.slot).publish();
                }
                if turn > 0 {
                    found[2 * at].push(bytes as f64 / seconds / 1e9);
                    found[2 * at + 1].push(whole / seconds);
                }
            }
            for copy in &copies {
                scene.line(copy.slot).clear();
            }
        }
        let [offload, offload_share, load, load_share] = found;
        results.push(measured(&format!("offload, {name}"), "GB/s", offload));
        results.push(measured(&format!("offload, {name}: of one piece"), "", offload_share));
        results.push(measured(&format!("load, {name}"), "GB/s", load));
        results.push(measured(&format!("load, {name}: of one piece"), "", load_share));
        drop(copier);
    }
}

/// What the copier of a GPU does with a job before it speaks to the driver.
fn fragments_of_jobs(sizes: Sizes, results: &mut Vec<Measured>) {
    let blocks = (sizes.count / LAYERS).max(1);
    let count = blocks * LAYERS;
    let scene = Scene::new(&[(Shape { page: 64, blocks, ..Shape::plain(LAYERS) }, None)], 1);
    let group = &scene.ranks[0].groups[0];
    let mut order: Vec<u32> = (0..blocks as u32).collect();
    Random::new(9).shuffle(&mut order);
    let pieces = |order: &[u32]| {
        let mut host = 0;
        let mut found: Vec<Fragment> = Vec::with_capacity(count);
        for (device, len) in order.iter().flat_map(|block| group.pieces(*block).expect("a block")) {
            found.push(Fragment { device, host, len: len as u64 });
            host += len as u64;
        }
        found
    };
    results.push(each(sizes, "pieces of blocks, a piece", count, || (), |()| drop(black_box(pieces(&order)))));
    for (name, order) in [("in order", (0..blocks as u32).collect()), ("shuffled", order.clone())] {
        let name = format!("joining fragments, blocks {name}, a fragment");
        results.push(each(
            sizes,
            &name,
            count,
            || pieces(&order),
            |mut made| {
                fragments::coalesce(&mut made);
                drop(black_box(made));
            },
        ));
    }
}

fn plans(sizes: Sizes, results: &mut Vec<Measured>) {
    let copy = |at| BlockCopy { slot: at, generation: 1, block: at, group: 0, flags: 0 };
    let copies: Vec<BlockCopy> = (0..sizes.count as u32 / 2).map(copy).collect();
    let load = Load { request: "cmpl-1".to_owned(), doomed: false, copies: copies.clone() };
    let plan = StepPlan { stores_after: copies, loads: vec![load], ..StepPlan::default() };
    let bytes = plan.encode();
    results.push(each(sizes, "writing a plan, an order", sizes.count, || (), |()| drop(black_box(plan.encode()))));
    results.push(each(
        sizes,
        "reading a plan, an order",
        sizes.count,
        || (),
        |()| {
            assert!(StepPlan::decode(black_box(&bytes)).is_ok_and(|read| !read.is_empty()));
        },
    ));
}

fn main() {
    let flags: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| flags.iter().any(|it| it == flag);
    // `cargo bench` says so; `cargo test` does not, and only sees that all of it works.
    let sizes = if has("--bench") { WHOLE } else { TINY };
    let mut results = Vec::new();
    host_copier(sizes, &mut results);
    fragments_of_jobs(sizes, &mut results);
    plans(sizes, &mut results);
    assert!(results.iter().all(|result| result.value > 0.0), "something took no time");
    if has("--json") {
        println!("{:#}", report(&results, &[]));
    } else if has("--bench") {
        print(&results, &[], 2);
    }
}
