//! The policy beside a plain model of its lists, its waiting prefixes and its ghosts. What classes
//! and ages are worth comes from the same counts, which have tests of their own.

use std::collections::BTreeMap;

use kvcellar_block::SlotIndex;

use super::super::oracle::{GhostWindow, PLACES, PlainPolicy, agree};
use super::ages::{AGE_RANGES, age_end};
use super::hazards::Hazards;
use super::history::{CLASSES, History};
use super::{AGING_LOOKS, AGING_MOVES, Adaptive, FRESH, HALF_LIFE_USES, WORTH_SHARE};
use crate::policy::{Block, Departure, Heat, Touch};

/// Few, so that some are forgotten.
const GHOSTS: u32 = 20;
/// Often, so that a short history has several.
const ESTIMATE_USES: u32 = 9;

const COLD: usize = CLASSES * AGE_RANGES;

#[derive(Debug, Clone)]
struct KeptBlock {
    fingerprint: u64,
    history: History,
    /// The block before it, and where it was.
    parent: Option<(u32, u64)>,
    /// The place of the block after it that was used last.
    child: Option<u32>,
}

struct AdaptiveModel {
    blocks: BTreeMap<u32, KeptBlock>,
    /// Every class and range of ages, and what goes first.
    lists: Vec<Vec<u32>>,
    /// Lists, the least worth first.
    ranked: Vec<usize>,
    /// The list of that rank is looked at next.
    look: usize,
    hazards: Hazards,
    worth: Vec<f64>,
    ghosts: GhostWindow<History>,
    uses_since_estimate: u32,
}

impl AdaptiveModel {
    fn new() -> Self {
        let mut model = Self {
            blocks: BTreeMap::new(),
            lists: vec![Vec::new(); COLD + 1],
            ranked: Vec::new(),
            look: 0,
            hazards: Hazards::new(HALF_LIFE_USES),
            worth: vec![1.0; CLASSES],
            ghosts: GhostWindow::new(GHOSTS),
            uses_since_estimate: 0,
        };
        model.rank();
        model
    }

    fn rank(&mut self) {
        let indices = self.hazards.indices();
        let worth = |list: usize| {
            let fresh = if list.is_multiple_of(AGE_RANGES) { FRESH } else { 0.0 };
            if list == COLD { f64::NEG_INFINITY } else { indices[list] * self.worth[list / AGE_RANGES] + fresh }
        };
        let mut ranked: Vec<usize> = (0..=COLD).collect();
        ranked.sort_by(|one, other| {
            let older = (other % AGE_RANGES).cmp(&(one % AGE_RANGES));
            worth(*one).total_cmp(&worth(*other)).then(older).then(one.cmp(other))
        });
        self.ranked = ranked;
    }

    /// One use: with so few places each is an epoch of its own.
    fn tick(&mut self) {
        self.hazards.advance();
        self.uses_since_estimate += 1;
        if self.uses_since_estimate == ESTIMATE_USES {
            self.uses_since_estimate = 0;
            self.rank();
        }
        let mut moves = 0;
        for _ in 0..AGING_LOOKS {
            let holding = |rank: &usize| !self.lists[self.ranked[*rank]].is_empty();
            let Some(rank) = (self.look..=COLD).find(holding).or_else(|| (0..=COLD).find(holding)) else { return };
            let list = self.ranked[rank];
            self.look = rank;
            while let Some(place) = self.lists[list].first().copied() {
                let age = self.hazards.epoch() - self.blocks[&place].history.used;
                if list == COLD || list % AGE_RANGES == AGE_RANGES - 1 || age < age_end(list % AGE_RANGES) {
                    break;
                }
                if moves == AGING_MOVES {
                    return;
                }
                self.lists[list].remove(0);
                self.lists[list + 1].push(place);
                moves += 1;
            }
            self.look = rank + 1;
        }
    }

    fn leave(&mut self, place: u32) -> bool {
        let was_in = self.is_in(place);
        self.lists.iter_mut().for_each(|list| list.retain(|other| *other != place));
        was_in
    }

    fn is_in(&self, place: u32) -> bool {
        self.lists.iter().any(|list| list.contains(&place))
    }

    fn enter(&mut self, place: u32) {
        let class = usize::from(self.blocks[&place].history.class);
        self.lists[class * AGE_RANGES].push(place);
    }

    /// The place of a block's parent, if it is still there.
    fn parent(&self, place: u32) -> Option<u32> {
        let (at, fingerprint) = self.blocks[&place].parent?;
        self.blocks.get(&at).filter(|there| there.fingerprint == fingerprint).map(|_| at)
    }

    fn tell_parent(&mut self, place: u32) {
        if let Some(parent) = self.parent(place) {
            self.blocks.get_mut(&parent).expect("a block").child = Some(place);
        }
    }

    fn reuse(&mut self, before: History) -> History {
        self.hazards.on_reuse(before.class, before.used);
        let after = before.go_on(self.hazards.epoch());
        self.hazards.watch(after.class);
        after
    }
}

impl PlainPolicy for AdaptiveModel {
    fn assign(&mut self, place: u32, block: &Block<SlotIndex>) {
        self.tick();
        let parent = block.parent.map(|slot| (slot.0, self.blocks[&slot.0].fingerprint));
        let history = if let Some(before) = self.ghosts.take(block.fingerprint) {
            self.reuse(before)
        } else {
            let above = parent.map(|(at, _)| self.blocks[&at].history);
            let history = History::begin(self.hazards.epoch(), block.prompt_tokens, above);
            self.hazards.watch(history.class);
            history
        };
        let worth = &mut self.worth[usize::from(history.class)];
        *worth += (f64::from(block.worth) - *worth) * WORTH_SHARE;
        self.blocks.insert(place, KeptBlock { fingerprint: block.fingerprint, history, parent, child: None });
        self.tell_parent(place);
    }

    fn release(&mut self, place: u32, departure: Departure) {
        self.leave(place);
        if let Some(parent) = self.parent(place) {
            let child = &mut self.blocks.get_mut(&parent).expect("a block").child;
            *child = child.filter(|child| *child != place);
        }
        let KeptBlock { fingerprint, history, .. } = self.blocks.remove(&place).expect("a block");
        let forgotten = match departure {
            Departure::Evicted => self.ghosts.push(fingerprint, history),
            Departure::Dropped => Some(history),
        };
        if let Some(History { class, used, .. }) = forgotten {
            self.hazards.on_loss(class, used);
        }
    }

    fn insert(&mut self, place: u32, heat: Heat) {
        match heat {
            Heat::Hot => self.enter(place),
            Heat::Cold => self.lists[COLD].insert(0, place),
        }
    }

    fn remove(&mut self, place: u32) {
        self.leave(place);
    }

    fn touch(&mut self, place: u32, touch: Touch) {
        let was_in = self.leave(place);
        self.tell_parent(place);
        if touch == Touch::Fresh {
            self.tick();
            let history = self.reuse(self.blocks[&place].history);
            self.blocks.get_mut(&place).expect("a block").history = history;
        }
        if was_in {
            self.enter(place);
        }
    }

    fn victim(&mut self, may: &dyn Fn(u32) -> bool) -> Option<u32> {
        loop {
            let order = self.order();
            let place = order.iter().copied().find(|place| may(*place))?;
            let is_next = |child: &u32| may(*child) && order.contains(child) && self.parent(*child) == Some(place);
            let Some(child) = self.blocks[&place].child.filter(is_next) else { return Some(place) };
            self.leave(place);
            let list = self.lists.iter_mut().find(|list| list.contains(&child)).expect("a list");
            let behind = list.iter().position(|other| *other == child).expect("it is there") + 1;
            list.insert(behind, place);
        }
    }

    fn order(&self) -> Vec<u32> {
        self.ranked.iter().flat_map(|list| self.lists[*list].iter().copied()).collect()
    }
}

#[test]
fn adaptive_is_what_it_says() {
    agree(|| Adaptive::sized(PLACES, GHOSTS, ESTIMATE_USES), AdaptiveModel::new, 48).expect("as the model");
}
