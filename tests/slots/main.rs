//! The slot table's protocol under explored schedules (shuttle): one engine, two writing ranks, one
//! rank that only reads.
//!
//! The engine fills, publishes, clears and takes slots again for several generations. The ranks
//! execute their orders late, and get some orders twice: after the generation they name is over.
//! Payloads are two words a rank, so that a half-written part shows. Checked in every schedule: a
//! block that is published is whole and of this generation; a stale order is refused and leaves no
//! bit; a reader that holds a block sees only that block; a refusal of a load is seen by the engine
//! of that very generation; nothing hangs.
//!
//! Not checked here: orderings weaker than sequential consistency (shuttle has none). Two broken
//! engines show that the checker can fail.
//!
//! `KVCELLAR_SEEDS=n` explores n schedules a test instead of 2000, `KVCELLAR_SEED=n` starts from
//! another one; a failure prints its schedule.

#![expect(clippy::expect_used, reason = "a thread that is gone fails the test, and the message says which")]

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize as PlainCount, Ordering as PlainOrdering};
use std::sync::{Arc as PlainArc, Mutex as PlainMutex};

use kvcellar_engine::pool::slot_table::{Fill, SlotLine};
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use shuttle::sync::{Arc, mpsc};
use shuttle::thread;

/// Ranks 0 and 1 write; rank 2 holds the same bytes as rank 0 and only loads.
const RANKS: usize = 3;
const WRITERS: u64 = 0b011;
const READER: usize = 2;
const SLOTS: usize = 2;
/// Fills of one schedule: each slot is taken about three times.
const FILLS: u32 = 6;

/// What happened in all schedules of one test: a protocol that never gets anywhere would pass every
/// other check.
#[derive(Debug, Default)]
struct Seen {
    published: PlainCount,
    failed: PlainCount,
    stale_offloads: PlainCount,
    stale_loads: PlainCount,
    loads: PlainCount,
    refused_loads: PlainCount,
    /// Slot, generation and whether it was published, in order.
    histories: PlainMutex<HashSet<Vec<(usize, u32, bool)>>>,
}

fn count(counter: &PlainCount) {
    counter.fetch_add(1, PlainOrdering::Relaxed);
}

#[derive(Debug, Clone, Copy)]
enum Order {
    Offload { slot: usize, generation: u32, stale: bool },
    Load { slot: usize, generation: u32, stale: bool },
}

/// One slot: the real line, and a model of everything around it.
#[derive(Default)]
struct Slot {
    line: SlotLine,
    /// Two words a rank. A whole part holds the generation twice.
    payload: [[AtomicU64; 2]; RANKS],
    /// Loads that hold the slot.
    pins: AtomicUsize,
    /// The generation whose load the reader refused last.
    refused: AtomicU64,
}

struct Cellar {
    slots: [Slot; SLOTS],
    rule: Rule,
    seen: PlainArc<Seen>,
}

/// How the engine decides that a fill is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// As the tier engine does: every writing rank has answered.
    AllAnswered,
    /// Broken: the first writing rank's answer is taken for all.
    FirstAnswer,
    /// Broken: one failure frees the slot although the other rank may still write.
    FirstFailure,
}

impl Rule {
    fn ask(self, line: &SlotLine) -> Fill {
        match self {
            Self::AllAnswered => line.fill(WRITERS),
            Self::FirstAnswer => line.fill(1),
            Self::FirstFailure => match (line.fill(WRITERS), line.fill(0b01), line.fill(0b10)) {
                (Fill::Pending, one, other) if one == Fill::Failed || other == Fill::Failed => Fill::Failed,
                (all, _, _) => all,
            },
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Free,
    Filling(u32),
    Filled(u32),
}

struct Engine {
    cellar: Arc<Cellar>,
    queues: Vec<mpsc::Sender<Order>>,
    held: [Held; SLOTS],
    /// Generations that ended, by slot.
    over: Vec<(usize, u32)>,
    fills: u32,
    history: Vec<(usize, u32, bool)>,
}

impl Engine {
    fn run(mut self) {
        loop {
            for slot in 0..SLOTS {
                self.advance(slot);
            }
            let idle = |(index, held): (usize, &Held)| match held {
                Held::Filling(_) => false,
                Held::Filled(_) => self.cellar.slots[index].pins.load(Ordering::SeqCst) == 0,
                Held::Free => true,
            };
            if self.fills == FILLS && self.held.iter().enumerate().all(idle) {
                break;
            }
            thread::yield_now();
        }
        let mut histories = self.cellar.seen.histories.lock().expect("no thread panicked with it");
        histories.insert(self.history);
    }

    fn advance(&mut self, slot: usize) {
        match self.held[slot] {
            Held::Free if self.fills < FILLS => self.begin(slot),
            Held::Filling(generation) => self.poll(slot, generation),
            Held::Filled(generation) if self.fills < FILLS => self.take_back(slot, generation),
            Held::Free | Held::Filled(_) => {}
        }
    }

    fn begin(&mut self, slot: usize) {
        let generation = self.cellar.slots[slot].line.begin_fill(0).0;
        self.fills += 1;
        self.held[slot] = Held::Filling(generation);
        self.haunt();
        for queue in &self.queues[..READER] {
            send(queue, Order::Offload { slot, generation, stale: false });
        }
        self.haunt();
    }

    /// Sends an order whose generation is over, as a copy of an older plan would.
    fn haunt(&self) {
        if self.over.is_empty() || !thread_rng().gen_bool(0.6) {
            return;
        }
        let (slot, generation) = self.over[thread_rng().gen_range(0..self.over.len())];
        let rank = thread_rng().gen_range(0..RANKS);
        let stale = true;
        let order = if rank == READER {
            Order::Load { slot, generation, stale }
        } else {
            Order::Offload { slot, generation, stale }
        };
        send(&self.queues[rank], order);
    }

    fn poll(&mut self, slot: usize, generation: u32) {
        let cell = &self.cellar.slots[slot];
        let outcome = self.cellar.rule.ask(&cell.line);
        match outcome {
            Fill::Pending => return,
            Fill::Done => {
                for rank in 0..READER {
                    let part = cell.payload[rank].each_ref().map(|word| word.load(Ordering::SeqCst));
                    assert_eq!(
                        part,
                        [u64::from(generation); 2],
                        "published block is not whole: slot {slot} rank {rank}"
                    );
                }
                cell.line.publish();
                count(&self.cellar.seen.published);
                self.held[slot] = Held::Filled(generation);
                cell.pins.fetch_add(1, Ordering::SeqCst);
                send(&self.queues[READER], Order::Load { slot, generation, stale: false });
            }
            Fill::Failed => {
                cell.line.clear();
                count(&self.cellar.seen.failed);
                self.held[slot] = Held::Free;
                self.over.push((slot, generation));
            }
        }
        self.history.push((slot, generation, outcome == Fill::Done));
    }

    fn take_back(&mut self, slot: usize, generation: u32) {
        let cell = &self.cellar.slots[slot];
        if cell.pins.load(Ordering::SeqCst) > 0 {
            return;
        }
        let refused = cell.refused.load(Ordering::SeqCst) == u64::from(generation);
        assert_eq!(cell.line.load_refused(), refused, "the engine missed or made up a refusal: slot {slot}");
        cell.line.clear();
        self.held[slot] = Held::Free;
        self.over.push((slot, generation));
    }
}

fn send(queue: &mpsc::Sender<Order>, order: Order) {
    queue.send(order).expect("the rank still listens");
}

/// A rank, as the copy worker and its copier behave: ask, copy, answer.
fn rank(cellar: &Cellar, rank: usize, orders: &mpsc::Receiver<Order>) {
    while let Ok(order) = orders.recv() {
        match order {
            Order::Offload { slot, generation, stale } => offload(cellar, rank, slot, generation, stale),
            Order::Load { slot, generation, stale } => load(cellar, slot, generation, stale),
        }
    }
}

fn offload(cellar: &Cellar, rank: usize, slot: usize, generation: u32, stale: bool) {
    let cell = &cellar.slots[slot];
    let allowed = cell.line.may_write(generation);
    assert!(!(stale && allowed), "a stale order may write: slot {slot} rank {rank} generation {generation}");
    // A broken engine ends generations whose orders are under way: the payload must show that, not
    // this.
    assert!(stale || allowed || cellar.rule != Rule::AllAnswered, "an order was refused: slot {slot} rank {rank}");
    if !allowed {
        count(&cellar.seen.stale_offloads);
        if stale {
            wait_until_answered(&cell.line, rank, generation);
        }
        return;
    }
    dawdle();
    let ok = !thread_rng().gen_bool(0.2);
    cell.payload[rank][0].store(u64::from(generation), Ordering::SeqCst);
    if ok {
        cell.payload[rank][1].store(u64::from(generation), Ordering::SeqCst);
    }
    cell.line.answer(rank, ok);
    if cellar.rule == Rule::AllAnswered {
        wait_until_answered(&cell.line, rank, generation);
    }
}

/// Some ranks are slower than the engine and the others together by far; a uniformly random
/// schedule hardly ever starves one.
fn dawdle() {
    if thread_rng().gen_bool(0.2) {
        for _ in 0..thread_rng().gen_range(0..60) {
            thread::yield_now();
        }
    }
}

/// Not at once: `begin_fill` empties the answers before it names the new generation. But no fence
/// hangs.
fn wait_until_answered(line: &SlotLine, rank: usize, generation: u32) {
    while !line.answered(rank, generation) {
        thread::yield_now();
    }
}

fn load(cellar: &Cellar, slot: usize, generation: u32, stale: bool) {
    let cell = &cellar.slots[slot];
    assert_eq!(cell.line.may_read(generation), !stale, "may_read: slot {slot} generation {generation}");
    if stale {
        count(&cellar.seen.stale_loads);
        return;
    }
    for part in &cell.payload[..READER] {
        let part = part.each_ref().map(|word| word.load(Ordering::SeqCst));
        assert_eq!(part, [u64::from(generation); 2], "a held block changed: slot {slot}");
    }
    count(&cellar.seen.loads);
    if thread_rng().gen_bool(0.3) {
        cell.line.refuse_load(READER);
        cell.refused.store(u64::from(generation), Ordering::SeqCst);
        count(&cellar.seen.refused_loads);
    }
    cell.pins.fetch_sub(1, Ordering::SeqCst);
}

fn schedule(rule: Rule, seen: &PlainArc<Seen>) {
    let cellar = Arc::new(Cellar { slots: Default::default(), rule, seen: PlainArc::clone(seen) });
    let (queues, ranks): (Vec<_>, Vec<_>) = (0..RANKS)
        .map(|number| {
            let (queue, orders) = mpsc::channel();
            let cellar = Arc::clone(&cellar);
            (queue, thread::spawn(move || rank(&cellar, number, &orders)))
        })
        .unzip();
    let engine = Engine { cellar, queues, held: [Held::Free; SLOTS], over: Vec::new(), fills: 0, history: Vec::new() };
    engine.run();
    for rank in ranks {
        rank.join().expect("the rank ended");
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn schedules() -> usize {
    number("KVCELLAR_SEEDS").map_or(2000, |schedules| schedules as usize)
}

fn explore(schedule: impl Fn() + Send + Sync + 'static) {
    explore_at_least(1, schedule);
}

fn explore_at_least(least: usize, schedule: impl Fn() + Send + Sync + 'static) {
    let (seed, schedules) = (number("KVCELLAR_SEED").unwrap_or(0x5eed), schedules().max(least));
    println!("KVCELLAR_SEED={seed} KVCELLAR_SEEDS={schedules}");
    shuttle::check_random_with_seed(schedule, seed, schedules);
}

/// Schedules after which a broken engine was caught for every seed tried, several times over.
const MUTANT_SCHEDULES: usize = 20_000;

/// The exploration went everywhere: otherwise it proves nothing.
fn assert_explored(seen: &Seen) {
    println!("{} histories of {} schedules", seen.histories.lock().expect("not poisoned").len(), schedules());
    for (what, counter) in [
        ("published", &seen.published),
        ("failed", &seen.failed),
        ("stale offloads", &seen.stale_offloads),
        ("stale loads", &seen.stale_loads),
        ("loads", &seen.loads),
        ("refused loads", &seen.refused_loads),
    ] {
        let times = counter.load(PlainOrdering::Relaxed);
        println!("  {what}: {times}");
        assert!(times > 0, "no schedule had {what}");
    }
    assert!(seen.histories.lock().expect("not poisoned").len() > 10, "hardly any schedule differed");
}

#[test]
fn no_schedule_shows_half_a_block_or_obeys_a_stale_order() {
    let seen = PlainArc::new(Seen::default());
    let of_schedules = PlainArc::clone(&seen);
    explore(move || schedule(Rule::AllAnswered, &of_schedules));
    assert_explored(&seen);
}

#[test]
fn the_same_holds_where_few_preemptions_matter() {
    let seen = PlainArc::new(Seen::default());
    let of_schedules = PlainArc::clone(&seen);
    shuttle::check_pct(move || schedule(Rule::AllAnswered, &of_schedules), schedules(), 3);
    assert_explored(&seen);
}

#[test]
#[should_panic(expected = "published block is not whole")]
fn the_checker_catches_an_engine_that_publishes_before_all_ranks_answered() {
    let seen = PlainArc::default();
    explore_at_least(MUTANT_SCHEDULES, move || schedule(Rule::FirstAnswer, &seen));
}

#[test]
#[should_panic(expected = "published block is not whole")]
fn the_checker_catches_an_engine_that_takes_a_slot_back_before_all_ranks_answered() {
    let seen = PlainArc::default();
    explore_at_least(MUTANT_SCHEDULES, move || schedule(Rule::FirstFailure, &seen));
}

/// A fence: vLLM's next step overwrites the source block as soon as `answered` says so. The engine
/// takes the slot again meanwhile.
#[test]
fn a_fence_ends_only_after_the_source_was_read() {
    explore(|| {
        let line = Arc::new(SlotLine::default());
        let source = Arc::new(AtomicU64::new(0));
        let (queue, orders) = mpsc::channel::<u32>();
        let copier = {
            let (line, source) = (Arc::clone(&line), Arc::clone(&source));
            thread::spawn(move || {
                while let Ok(generation) = orders.recv() {
                    assert!(line.may_write(generation));
                    thread::yield_now();
                    assert_eq!(
                        source.load(Ordering::SeqCst),
                        u64::from(generation),
                        "the source was overwritten too early"
                    );
                    line.answer(0, thread_rng().gen_bool(0.5));
                }
            })
        };
        for _ in 0..4 {
            let generation = line.begin_fill(0).0;
            // The forward pass writes the block, the engine orders its offload, and the next pass
            // wants the block.
            source.store(u64::from(generation), Ordering::SeqCst);
            queue.send(generation).expect("the copier listens");
            let fence = {
                let (line, source) = (Arc::clone(&line), Arc::clone(&source));
                thread::spawn(move || {
                    wait_until_answered(&line, 0, generation);
                    // Overwrites only what is still the old content: a later fill may have begun.
                    let _later_fill =
                        source.compare_exchange(u64::from(generation), 0, Ordering::SeqCst, Ordering::SeqCst);
                })
            };
            while line.fill(1) == Fill::Pending {
                thread::yield_now();
            }
            line.clear();
            if thread_rng().gen_bool(0.5) {
                fence.join().expect("the fence ended");
            }
        }
        drop(queue);
        copier.join().expect("the copier ended");
    });
}

/// The idle hasher reads a part while the engine may take the slot again: `may_hash` and a guard
/// keep it from reading new bytes under an old name.
#[test]
fn a_stale_hash_order_is_refused() {
    explore(|| {
        let line = Arc::new(SlotLine::default());
        let first = line.begin_fill(0).0;
        line.answer(0, true);
        let hasher = {
            let line = Arc::clone(&line);
            thread::spawn(move || {
                let before = line.may_hash(first);
                thread::yield_now();
                let after = line.may_hash(first);
                assert!(before || !after, "a generation that is over came back");
            })
        };
        line.publish();
        line.clear();
        let second = line.begin_fill(0).0;
        assert!(!line.may_hash(first) && line.may_hash(second));
        assert_eq!(line.fill(1), Fill::Pending, "an answer of an earlier generation counts for this one");
        hasher.join().expect("the hasher ended");
    });
}
