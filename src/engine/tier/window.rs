//! The restore window: a few slots, used round robin, through which blocks stream that find no slot
//! of their own.
//!
//! Positions are given out in the order of the requests' prefixes. A position's slot and generation
//! are known when it is given out, so that copy workers can follow without another step; its read
//! begins when every rank has copied what lay in the slot before. So a prefix larger than the pool
//! passes through, and a full pool never keeps a restore from ending.

use std::collections::VecDeque;

use super::transfer::ReadPart;
use crate::invariant;
use crate::pool::memory::SlotMemory;
use kvcellar_block::{Generation, SlotIndex};

#[derive(Debug)]
struct Place {
    slot: SlotIndex,
    /// The generation of the last position given out.
    promised: u32,
    /// Some position's bytes are being read into it or copied out of it.
    busy: bool,
}

/// The window's slots and what waits for them.
#[derive(Debug)]
pub struct Window {
    places: Vec<Place>,
    next: usize,
    /// Positions given out whose read has not begun, with the index of their place.
    waiting: VecDeque<(usize, ReadPart)>,
    ranks: u64,
}

impl Window {
    /// A window over these slots, which belong to it from now on. `ranks`: bits of all ranks that
    /// copy out of a slot.
    pub fn new(slots: Vec<SlotIndex>, memory: &dyn SlotMemory, ranks: u64) -> Self {
        let place = |slot: SlotIndex| {
            let line = memory.line(slot);
            line.clear();
            Place { slot, promised: line.remains().1.0, busy: false }
        };
        Self { places: slots.into_iter().map(place).collect(), next: 0, waiting: VecDeque::new(), ranks }
    }

    /// The next position's slot and generation; `None` for a window without slots.
    pub fn promise(&mut self) -> Option<(usize, SlotIndex, Generation)> {
        let (index, places) = (self.next, self.places.len());
        let place = self.places.get_mut(index)?;
        self.next = (index + 1) % places;
        // As `SlotLine::begin_fill` counts.
        place.promised = place.promised.wrapping_add(1).max(1);
        Some((index, place.slot, Generation(place.promised)))
    }

    /// A position that was given out will be read.
    pub fn enqueue(&mut self, index: usize, part: ReadPart) {
        self.waiting.push_back((index, part));
    }

    /// Positions whose slots are free now, in order; their lines are filling.
    pub fn advance(&mut self, memory: &dyn SlotMemory) -> Vec<ReadPart> {
        let mut ready = Vec::new();
        while let Some((index, _)) = self.waiting.front() {
            let place = &mut self.places[*index];
            let line = memory.line(place.slot);
            if place.busy && !line.released(self.ranks) {
                break;
            }
            place.busy = true;
            let generation = line.begin_fill(memory.cache_generation());
            if let Some((_, part)) = self.waiting.pop_front() {
                invariant!(
                    generation == part.generation,
                    "the window promised {:?} and gave {generation:?}",
                    part.generation
                );
                ready.push(part);
            }
        }
        ready
    }

    /// Its slots that hold no bytes which anybody still reads or copies.
    pub fn unused<'a>(&'a self, memory: &'a dyn SlotMemory) -> impl Iterator<Item = SlotIndex> + 'a {
        let is_unused = |place: &&Place| !place.busy || memory.line(place.slot).released(self.ranks);
        self.places.iter().filter(is_unused).map(|place| place.slot)
    }

    /// Positions that wait for their slot.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The window's slots.
    pub fn slots(&self) -> usize {
        self.places.len()
    }
}
