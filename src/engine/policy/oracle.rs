//! Policies beside plain models of what their documentation says, step by step over random
//! histories: holds come and go, victims are vetoed, blocks are dropped and come back.

use std::collections::BTreeMap;

use kvcellar_block::SlotIndex;
use proptest::prelude::*;
use proptest::test_runner::{TestError, TestRunner};

use super::lrfu::HALF_LIFE;
use super::{Arc, Block, Departure, Eviction, Heat, Lrfu, Lru, S3Fifo, Touch};

/// Places of the policies under test.
pub(super) const PLACES: u32 = 12;

/// Blocks that come and go.
const BLOCKS: u64 = 40;

/// A policy written down plainly.
pub(super) trait PlainPolicy {
    fn assign(&mut self, place: u32, block: &Block<SlotIndex>);
    fn release(&mut self, place: u32, departure: Departure);
    fn insert(&mut self, place: u32, heat: Heat);
    fn remove(&mut self, place: u32);
    fn touch(&mut self, place: u32, touch: Touch);
    fn victim(&mut self, may: &dyn Fn(u32) -> bool) -> Option<u32>;
    /// The order as [`Eviction::coldest`] shows it.
    fn order(&self) -> Vec<u32>;
}

#[derive(Debug, Clone)]
pub(super) enum HistoryStep {
    /// A block comes to an empty place, if there is one and it has none. `after`: it continues the
    /// block of this place.
    Come { block: u64, after: u32, prompt_tokens: u32, worth: f32 },
    /// A place enters the order, or leaves it.
    Hold { place: u32, cold: bool },
    /// A place is used.
    Use { place: u32, fresh: bool },
    /// Somebody asks for a victim, which is evicted, or stays. Places of these bits are vetoed.
    Evict { vetoed: u32, stays: bool },
    /// A block is dropped.
    Drop { place: u32 },
}

fn steps() -> impl Strategy<Value = Vec<HistoryStep>> {
    let place = || 0..PLACES;
    let come = (0..BLOCKS, place(), 0_u32..40_000, 1_u8..4).prop_map(|(block, after, prompt_tokens, worth)| {
        HistoryStep::Come { block, after, prompt_tokens, worth: f32::from(worth) }
    });
    let step = prop_oneof![
        6 => come,
        6 => (place(), prop::bool::weighted(0.1)).prop_map(|(place, cold)| HistoryStep::Hold { place, cold }),
        8 => (place(), any::<bool>()).prop_map(|(place, fresh)| HistoryStep::Use { place, fresh }),
        5 => (any::<u32>(), prop::bool::weighted(0.2), any::<bool>()).prop_map(|(bits, stays, all)| HistoryStep::Evict {
            vetoed: if all { 0 } else { bits },
            stays,
        }),
        1 => place().prop_map(|place| HistoryStep::Drop { place }),
    ];
    prop::collection::vec(step, 0..400)
}

/// Goes through a history with both, and compares after every step.
fn compare(
    policy: &mut dyn Eviction<SlotIndex>,
    model: &mut dyn PlainPolicy,
    steps: &[HistoryStep],
) -> Result<(), TestCaseError> {
    // Well spread, as block hashes are; with equal upper halves for some, so that ghosts collide.
    let fingerprint = |block: u64| block.wrapping_mul(0x9E37_79B9_7F4A_7C15) & !(7 << 32) ^ block << 8;
    let mut blocks: BTreeMap<u32, u64> = BTreeMap::new();
    for step in steps {
        match *step {
            HistoryStep::Come { block, after, prompt_tokens, worth } => {
                let free = (0..PLACES).find(|place| !blocks.contains_key(place));
                let Some(place) = free.filter(|_| blocks.values().all(|held| *held != block)) else { continue };
                // A block's hash says what comes before it: there are no circles.
                let parent = blocks.get(&after).filter(|before| **before < block).map(|_| SlotIndex(after));
                let block_facts = Block { fingerprint: fingerprint(block), parent, prompt_tokens, worth };
                blocks.insert(place, block);
                policy.assign(SlotIndex(place), &block_facts);
                model.assign(place, &block_facts);
            }
            HistoryStep::Hold { place, cold } if blocks.contains_key(&place) => {
                let heat = if cold { Heat::Cold } else { Heat::Hot };
                if policy.holds(SlotIndex(place)) {
                    policy.remove(SlotIndex(place));
                    model.remove(place);
                } else {
                    policy.insert(SlotIndex(place), heat);
                    model.insert(place, heat);
                }
            }
            HistoryStep::Use { place, fresh } if blocks.contains_key(&place) => {
                let touch = if fresh { Touch::Fresh } else { Touch::Again };
                policy.touch(SlotIndex(place), touch);
                model.touch(place, touch);
            }
            HistoryStep::Evict { vetoed, stays } => {
                let may = |place: u32| vetoed >> place & 1 == 0;
                let victim = policy.victim(&|slot: SlotIndex| may(slot.0));
                prop_assert_eq!(victim.map(|slot| slot.0), model.victim(&may));
                prop_assert!(victim.is_none_or(|slot| may(slot.0) && policy.holds(slot)));
                if let Some(slot) = victim.filter(|_| !stays) {
                    blocks.remove(&slot.0);
                    policy.release(slot, Departure::Evicted);
                    model.release(slot.0, Departure::Evicted);
                }
            }
            HistoryStep::Drop { place } if blocks.remove(&place).is_some() => {
                policy.release(SlotIndex(place), Departure::Dropped);
                model.release(place, Departure::Dropped);
            }
            HistoryStep::Hold { .. } | HistoryStep::Use { .. } | HistoryStep::Drop { .. } => {}
        }
        let order: Vec<u32> = policy.order().into_iter().map(|slot| slot.0).collect();
        prop_assert_eq!(policy.len(), order.len());
        prop_assert_eq!(&order, &model.order(), "after {:?}", step);
        for place in 0..PLACES {
            prop_assert_eq!(policy.holds(SlotIndex(place)), order.contains(&place));
        }
    }
    Ok(())
}

/// Goes through random histories.
pub(super) fn agree<P: Eviction<SlotIndex>, M: PlainPolicy>(
    policy: impl Fn() -> P,
    model: impl Fn() -> M,
    cases: u32,
) -> Result<(), TestError<Vec<HistoryStep>>> {
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config).run(&steps(), |steps| compare(&mut policy(), &mut model(), &steps))
}

/// Lists of places, the coldest first.
#[derive(Debug, Default)]
struct Lists([Vec<u32>; 2]);

impl Lists {
    fn enter(&mut self, list: usize, place: u32, heat: Heat) {
        match heat {
            Heat::Hot => self.0[list].push(place),
            Heat::Cold => self.0[list].insert(0, place),
        }
    }

    fn leave(&mut self, place: u32) -> bool {
        let was_in = self.0.iter().any(|list| list.contains(&place));
        self.0.iter_mut().for_each(|list| list.retain(|other| *other != place));
        was_in
    }
}

/// The last `capacity` evictions; what came back left a gap.
#[derive(Debug)]
pub(super) struct GhostWindow<T> {
    capacity: usize,
    pub(super) evicted: Vec<Option<(u64, T)>>,
}

impl<T: Copy> GhostWindow<T> {
    pub(super) fn new(capacity: u32) -> Self {
        Self { capacity: capacity as usize, evicted: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.evicted.iter().flatten().count()
    }

    pub(super) fn push(&mut self, fingerprint: u64, facts: T) -> Option<T> {
        self.evicted.push(Some((fingerprint, facts)));
        if self.evicted.len() > self.capacity { self.evicted.remove(0).map(|(_, facts)| facts) } else { None }
    }

    pub(super) fn take(&mut self, fingerprint: u64) -> Option<T> {
        let of_it = |it: &&mut Option<(u64, T)>| it.is_some_and(|(held, _)| held == fingerprint);
        self.evicted.iter_mut().find(of_it)?.take().map(|(_, facts)| facts)
    }

    fn forget_oldest(&mut self) {
        self.evicted.remove(0);
    }
}

#[derive(Default)]
struct LruModel(Lists);

impl PlainPolicy for LruModel {
    fn assign(&mut self, _place: u32, _block: &Block<SlotIndex>) {}
    fn release(&mut self, place: u32, _departure: Departure) {
        self.0.leave(place);
    }
    fn insert(&mut self, place: u32, heat: Heat) {
        self.0.enter(0, place, heat);
    }
    fn remove(&mut self, place: u32) {
        self.0.leave(place);
    }
    fn touch(&mut self, place: u32, _touch: Touch) {
        if self.0.leave(place) {
            self.0.enter(0, place, Heat::Hot);
        }
    }
    fn victim(&mut self, may: &dyn Fn(u32) -> bool) -> Option<u32> {
        self.order().into_iter().find(|place| may(*place))
    }
    fn order(&self) -> Vec<u32> {
        self.0.0[0].clone()
    }
}

struct S3FifoModel {
    /// Small and main.
    queues: Lists,
    /// Fingerprint, queue and uses of each block.
    blocks: BTreeMap<u32, (u64, usize, u32)>,
    ghosts: GhostWindow<()>,
}

impl S3FifoModel {
    fn new() -> Self {
        Self { queues: Lists::default(), blocks: BTreeMap::new(), ghosts: GhostWindow::new(PLACES) }
    }

    fn first(&self) -> usize {
        usize::from(self.queues.0[0].len() < (PLACES as usize / 10).max(1) && !self.queues.0[1].is_empty())
    }

    fn from(&mut self, queue: usize, may: &dyn Fn(u32) -> bool) -> Option<u32> {
        loop {
            let list = self.queues.0[queue].clone();
            // The first that may go decides: it goes, or it moves and the search begins anew.
            let place = list.into_iter().find(|place| may(*place))?;
            let (_, of, uses) = self.blocks.get_mut(&place).expect("a block");
            let stays = if queue == 0 { *uses > 1 } else { *uses > 0 };
            if !stays {
                return Some(place);
            }
            (*of, *uses) = (1, if queue == 0 { 0 } else { *uses - 1 });
            self.queues.leave(place);
            self.queues.enter(1, place, Heat::Hot);
        }
    }
}

impl PlainPolicy for S3FifoModel {
    fn assign(&mut self, place: u32, block: &Block<SlotIndex>) {
        let queue = usize::from(self.ghosts.take(block.fingerprint).is_some());
        self.blocks.insert(place, (block.fingerprint, queue, 0));
    }
    fn release(&mut self, place: u32, departure: Departure) {
        self.queues.leave(place);
        let (fingerprint, queue, _) = self.blocks.remove(&place).expect("a block");
        if queue == 0 && departure == Departure::Evicted {
            self.ghosts.push(fingerprint, ());
        }
    }
    fn insert(&mut self, place: u32, heat: Heat) {
        let (_, queue, uses) = self.blocks.get_mut(&place).expect("a block");
        if heat == Heat::Cold {
            *uses = 0;
        }
        self.queues.enter(*queue, place, heat);
    }
    fn remove(&mut self, place: u32) {
        self.queues.leave(place);
    }
    fn touch(&mut self, place: u32, touch: Touch) {
        if touch == Touch::Fresh {
            let (_, _, uses) = self.blocks.get_mut(&place).expect("a block");
            *uses = (*uses + 1).min(3);
        }
    }
    fn victim(&mut self, may: &dyn Fn(u32) -> bool) -> Option<u32> {
        let first = self.first();
        self.from(first, may).or_else(|| self.from(1 - first, may))
    }
    fn order(&self) -> Vec<u32> {
        let with = |queue: usize, wanted: &dyn Fn(u32) -> bool| {
            let list = self.queues.0[queue].iter().copied();
            list.filter(|place| wanted(self.blocks[place].2)).collect::<Vec<u32>>()
        };
        let small = with(0, &|uses| uses < 2);
        let main = (0..=3).flat_map(|round| with(1, &|uses| uses == round)).collect::<Vec<u32>>();
        let rest = with(0, &|uses| uses >= 2);
        if self.first() == 0 { [small, main, rest].concat() } else { [main, small, rest].concat() }
    }
}

struct ArcModel {
    /// Used once, and more often.
    lists: Lists,
    /// Fingerprint and list of each block.
    blocks: BTreeMap<u32, (u64, usize)>,
    ghosts: [GhostWindow<()>; 2],
    share: usize,
}

impl ArcModel {
    fn new() -> Self {
        let ghosts = [GhostWindow::new(PLACES), GhostWindow::new(PLACES)];
        Self { lists: Lists::default(), blocks: BTreeMap::new(), ghosts, share: 0 }
    }

    fn held(&self, list: usize) -> usize {
        self.blocks.values().filter(|(_, of)| *of == list).count()
    }

    fn trim(&mut self) {
        let places = PLACES as usize;
        while self.ghosts[0].len() > 0 && self.held(0) + self.ghosts[0].len() > places {
            self.ghosts[0].forget_oldest();
        }
        while self.ghosts[1].len() > 0 && self.blocks.len() + self.ghosts[0].len() + self.ghosts[1].len() > 2 * places {
            self.ghosts[1].forget_oldest();
        }
    }
}

impl PlainPolicy for ArcModel {
    fn assign(&mut self, place: u32, block: &Block<SlotIndex>) {
        let mut list = 0;
        for from in [0, 1] {
            if self.ghosts[from].take(block.fingerprint).is_none() {
                continue;
            }
            list = 1;
            // As if it had not been taken yet.
            let (here, other) = (self.ghosts[from].len() + 1, self.ghosts[1 - from].len() + 1);
            let step = (other / here).max(1);
            self.share =
                if from == 0 { (self.share + step).min(PLACES as usize) } else { self.share.saturating_sub(step) };
        }
        self.blocks.insert(place, (block.fingerprint, list));
        self.trim();
    }
    fn release(&mut self, place: u32, departure: Departure) {
        self.lists.leave(place);
        let (fingerprint, list) = self.blocks.remove(&place).expect("a block");
        if departure == Departure::Evicted {
            self.ghosts[list].push(fingerprint, ());
            self.trim();
        }
    }
    fn insert(&mut self, place: u32, heat: Heat) {
        self.lists.enter(self.blocks[&place].1, place, heat);
    }
    fn remove(&mut self, place: u32) {
        self.lists.leave(place);
    }
    fn touch(&mut self, place: u32, touch: Touch) {
        let (_, list) = self.blocks.get_mut(&place).expect("a block");
        if touch == Touch::Fresh {
            *list = 1;
        }
        let list = *list;
        if self.lists.leave(place) {
            self.lists.enter(list, place, Heat::Hot);
        }
    }
    fn victim(&mut self, may: &dyn Fn(u32) -> bool) -> Option<u32> {
        self.order().into_iter().find(|place| may(*place))
    }
    fn order(&self) -> Vec<u32> {
        let [once, often] = &self.lists.0;
        if once.len() > self.share || often.is_empty() {
            [&once[..], often].concat()
        } else {
            [&often[..], once].concat()
        }
    }
}

#[derive(Default)]
struct LrfuModel {
    clock: u64,
    stamps: u64,
    /// When each block was used; when it was touched last, and that touch's number.
    blocks: BTreeMap<u32, (Vec<u64>, u64, u64)>,
    /// Places in the order, those that go first whatever their uses with `true`.
    order: BTreeMap<u32, bool>,
}

impl LrfuModel {
    fn weight(&self, place: u32) -> f64 {
        let half_life = HALF_LIFE * f64::from(PLACES);
        let left = |used: &u64| (-((self.clock - used) as f64) / half_life).exp2();
        if self.order.get(&place) == Some(&true) { 0.0 } else { self.blocks[&place].0.iter().map(left).sum() }
    }
}

impl PlainPolicy for LrfuModel {
    fn assign(&mut self, place: u32, _block: &Block<SlotIndex>) {
        self.clock += 1;
        self.stamps += 1;
        self.blocks.insert(place, (vec![self.clock], self.clock, self.stamps));
    }
    fn release(&mut self, place: u32, _departure: Departure) {
        self.order.remove(&place);
        self.blocks.remove(&place);
    }
    fn insert(&mut self, place: u32, heat: Heat) {
        self.stamps += 1;
        self.blocks.get_mut(&place).expect("a block").2 = self.stamps;
        self.order.insert(place, heat == Heat::Cold);
    }
    fn remove(&mut self, place: u32) {
        self.order.remove(&place);
    }
    fn touch(&mut self, place: u32, touch: Touch) {
        self.stamps += 1;
        self.clock += u64::from(touch == Touch::Fresh);
        let (uses, touched, stamp) = self.blocks.get_mut(&place).expect("a block");
        if touch == Touch::Fresh {
            uses.push(self.clock);
        } else {
            // The last use goes on until now: all of them are younger by as much.
            for used in uses.iter_mut() {
                *used += self.clock - *touched;
            }
        }
        (*touched, *stamp) = (self.clock, self.stamps);
        if let Some(cold) = self.order.get_mut(&place) {
            *cold = false;
        }
    }
    fn victim(&mut self, may: &dyn Fn(u32) -> bool) -> Option<u32> {
        self.order().into_iter().find(|place| may(*place))
    }
    fn order(&self) -> Vec<u32> {
        let mut order: Vec<u32> = self.order.keys().copied().collect();
        order.sort_by(|one, other| {
            let (first, second) = (self.weight(*one), self.weight(*other));
            if (first - second).abs() <= 1e-9 * first.max(second) {
                self.blocks[one].2.cmp(&self.blocks[other].2)
            } else {
                first.total_cmp(&second)
            }
        });
        order
    }
}

#[test]
fn lru_is_what_it_says() {
    agree(|| Lru::new(PLACES), LruModel::default, 256).expect("as the model");
}

#[test]
fn s3_fifo_is_what_it_says() {
    agree(|| S3Fifo::new(PLACES), S3FifoModel::new, 256).expect("as the model");
}

#[test]
fn arc_is_what_it_says() {
    agree(|| Arc::new(PLACES), ArcModel::new, 256).expect("as the model");
}

#[test]
fn lrfu_is_what_it_says() {
    agree(|| Lrfu::new(PLACES), LrfuModel::default, 256).expect("as the model");
}
