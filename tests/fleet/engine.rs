//! One engine: its true contents, what it publishes, and the line to the index with everything that
//! can go wrong on it.

use std::collections::{HashMap, VecDeque};

use kvcellar_events::encode::encode;
use kvcellar_events::follow::{FollowStep, Follower, Why};
use kvcellar_events::wire::{Batch, BatchArena, Event, Hashes, Parent, Removed, Stored};

use crate::prompts::{TOKENS, hash, tokens};
use kvcellar_testkit::random::Random;

/// Media of the four tiers.
pub(crate) const TIERS: [(&str, Option<&str>); 4] =
    [("GPU", None), ("CPU", Some("LOCAL")), ("STORAGE", Some("LOCAL")), ("STORAGE", Some("REMOTE"))];

/// A group's contents: copies of each hash in each tier.
pub(crate) type Contents = HashMap<u64, [u32; 4]>;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Second {
    /// Tokens of a sliding window.
    Window(u32),
    /// Tokens of a chunk.
    Chunk(u32),
    State,
}

impl Second {
    /// As events say it: kind, and window or chunk.
    fn words(self) -> (&'static str, Option<u32>) {
        match self {
            Self::Window(tokens) => ("sliding_window", Some(tokens)),
            Self::Chunk(tokens) => ("chunked_local_attention", Some(tokens)),
            Self::State => ("mamba", None),
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Tokens of its blocks.
    pub(crate) block: usize,
    /// What a second group is, where there is one.
    pub(crate) second: Option<Second>,
    /// Batches it keeps for replays; 0: it has no replay endpoint.
    pub(crate) replay: usize,
}

pub(crate) struct SimEngine {
    pub(crate) shape: Shape,
    pub(crate) truth: Vec<Contents>,
    /// Something was lost since the last restart that no replay brought back.
    pub(crate) blind: bool,
    life: u64,
    number: u64,
    buffer: VecDeque<(u64, Vec<u8>)>,
    pub(crate) follower: Follower<Vec<u8>>,
    connected: bool,
    /// A batch that is still on its way while later ones have arrived.
    delayed: Option<(u64, Vec<u8>)>,
}

impl SimEngine {
    pub(crate) fn new(shape: Shape, life: u64) -> Self {
        Self {
            shape,
            truth: vec![Contents::new(); 1 + usize::from(shape.second.is_some())],
            blind: false,
            life,
            number: 0,
            buffer: VecDeque::new(),
            follower: Follower::new(shape.replay > 0),
            connected: false,
            delayed: None,
        }
    }

    /// One batch of changes to the truth, as bytes.
    pub(crate) fn work(&mut self, choices: &mut Random, prompts: u64) -> Vec<u8> {
        let mut arena = BatchArena::default();
        let mut batch = Batch { at_s: self.number as f64, rank: Some(0), ..Batch::default() };
        for _ in 0..choices.of(1..4) {
            match choices.of(0..100) {
                0..60 => self.store(choices, prompts, &mut arena, &mut batch),
                60..98 => self.remove(choices, &mut arena, &mut batch),
                98 => {
                    let tier = choices.of(0..4) as usize;
                    self.truth.iter_mut().flat_map(Contents::values_mut).for_each(|counts| counts[tier] = 0);
                    let (medium, locality) = TIERS[tier];
                    batch.events.push(Event::TierCleared { medium: Some(medium), locality });
                }
                _ => {
                    self.truth.iter_mut().flat_map(Contents::values_mut).for_each(|counts| counts[0] = 0);
                    batch.events.push(Event::Cleared { map_form: true });
                }
            }
        }
        let mut payload = Vec::new();
        encode(&batch, &arena, &mut payload);
        payload
    }

    fn store(&mut self, choices: &mut Random, prompts: u64, arena: &mut BatchArena, batch: &mut Batch<'_>) {
        let prompt = choices.of(0..prompts);
        let all = tokens(prompt);
        let size = self.shape.block;
        let blocks = (TOKENS / size) as u64;
        let tier = *choices.pick(&[0, 0, 0, 1, 1, 2, 3]);
        let group = choices.of(0..self.truth.len() as u64) as usize;
        // Mostly from the start, sometimes in the middle: then the parent may not be known.
        let first = if choices.chance(70) { 0 } else { choices.of(0..blocks) };
        let last = choices.of(first..blocks) + 1;
        let told = tier == 0 || choices.chance(70);
        let start = (arena.hashes.len(), arena.tokens.len());
        for number in first..last {
            let end = (number as usize + 1) * size;
            let name = hash(self.life, &all, end);
            self.truth[group].entry(name).or_default()[tier] += 1;
            arena.hashes.push(name);
            if told {
                arena.tokens.extend_from_slice(&all[end - size..end]);
            }
        }
        let parent = (first > 0).then(|| Parent::Number(hash(self.life, &all, first as usize * size)));
        let (medium, locality) = TIERS[tier];
        let (kind, window) = self.shape.second.filter(|_| group == 1).map_or(("full_attention", None), Second::words);
        batch.events.push(Event::Stored(Box::new(Stored {
            hashes: Hashes { range: start.0..arena.hashes.len(), digests: None },
            parent,
            tokens: start.1..arena.tokens.len(),
            block_size: size as u32,
            medium: Some(medium),
            locality,
            group: Some(group as u32),
            kind: Some(kind),
            window,
            ..Stored::default()
        })));
    }

    fn remove(&mut self, choices: &mut Random, arena: &mut BatchArena, batch: &mut Batch<'_>) {
        let group = choices.of(0..self.truth.len() as u64) as usize;
        let tier = choices.of(0..4) as usize;
        let mut held: Vec<u64> =
            self.truth[group].iter().filter(|(_, counts)| counts[tier] > 0).map(|(name, _)| *name).collect();
        held.sort_unstable();
        let start = arena.hashes.len();
        for _ in 0..choices.of(1..12).min(held.len() as u64) {
            let name = held.swap_remove(choices.of(0..held.len() as u64) as usize);
            if let Some(counts) = self.truth[group].get_mut(&name) {
                counts[tier] -= 1;
            }
            arena.hashes.push(name);
        }
        let (medium, locality) = TIERS[tier];
        batch.events.push(Event::Removed(Removed {
            hashes: Hashes { range: start..arena.hashes.len(), digests: None },
            medium: Some(medium),
            group: Some(group as u32),
            locality,
            ..Removed::default()
        }));
    }

    /// What its hashes are made with in this life.
    pub(crate) fn names(&self) -> u64 {
        self.life
    }

    /// Starts again: everything is gone, numbers begin at 0.
    pub(crate) fn restart(&mut self) {
        self.life += 1_000_003;
        self.number = 0;
        self.buffer.clear();
        self.truth.iter_mut().for_each(Contents::clear);
        self.connected = false;
        self.blind = false;
    }

    /// The line breaks.
    pub(crate) fn cut(&mut self) {
        self.connected = false;
    }

    /// Publishes a batch. It arrives, and `twice`; or it is `lost`, or late: after the next one.
    pub(crate) fn publish(
        &mut self,
        payload: &[u8],
        lost: bool,
        twice: bool,
        run: &mut dyn FnMut(FollowStep<Vec<u8>>),
    ) {
        let number = self.number;
        self.number += 1;
        self.buffer.push_back((number, payload.to_vec()));
        if self.buffer.len() > self.shape.replay.max(1) {
            self.buffer.pop_front();
        }
        if !self.connected && !lost {
            self.connected = true;
            let mut steps = Vec::new();
            self.follower.connected(&mut steps);
            self.run(steps, run);
        }
        if lost && twice {
            self.delayed = Some((number, payload.to_vec()));
        }
        if !lost {
            for _ in 0..=usize::from(twice) {
                let mut steps = Vec::new();
                self.follower.message(number, payload.to_vec(), &mut steps);
                self.run(steps, run);
            }
            if let Some((number, payload)) = self.delayed.take() {
                let mut steps = Vec::new();
                self.follower.message(number, payload, &mut steps);
                self.run(steps, run);
            }
        }
    }

    fn run(&mut self, steps: Vec<FollowStep<Vec<u8>>>, run: &mut dyn FnMut(FollowStep<Vec<u8>>)) {
        let mut steps = VecDeque::from(steps);
        while let Some(step) = steps.pop_front() {
            let FollowStep::Replay(from) = step else {
                self.blind |= step == FollowStep::Forget(Why::Gap);
                if step == FollowStep::Forget(Why::Restart) {
                    self.blind = false;
                }
                run(step);
                continue;
            };
            let mut more = Vec::new();
            let asks = |more: &[FollowStep<Vec<u8>>]| matches!(more.last(), Some(FollowStep::Replay(_)));
            for (number, payload) in self.buffer.iter().filter(|(number, _)| *number >= from) {
                if !asks(&more) {
                    self.follower.replayed(*number, payload.clone(), &mut more);
                }
            }
            if !asks(&more) {
                self.follower.replay_ended(&mut more);
            }
            steps.extend(more);
        }
    }
}
