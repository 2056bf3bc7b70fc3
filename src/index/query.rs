//! Who holds how much of a prompt, where: one pass over its blocks, without a lock and without
//! memory for each block.
//!
//! Neighbouring blocks mostly have the same holders, so the pass goes over runs of equal sets. A
//! group that needs whole prefixes counts as long as every block was there; one with a sliding
//! window counts where its last blocks are there. What is found is a moment's truth: a block that
//! changes hands during the pass may be seen either way.

use super::roster::{EngineId, EngineView, Need, Roster};
use super::sets::{SetRef, Sets};
use super::table::{HolderTable, TableView};
use super::tiers::{ALL, Column, FleetTier, TIERS, Weights, unpack};

/// Blocks that are looked for ahead of the one looked at.
const AHEAD: usize = 16;

/// Tries to read a set that changes at this moment.
const TRIES: usize = 8;

/// How much of its prefix an engine can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usable {
    /// All of the longest prefix that its full-attention group holds.
    Full,
    /// Less than that: another group lacks what it needs at the end.
    Partial,
    /// Nothing.
    None,
}

impl Usable {
    /// Its name in answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Partial => "partial",
            Self::None => "none",
        }
    }
}

/// What an engine has of a prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Which engine.
    pub engine: EngineId,
    /// Blocks that it can use, from the first on.
    pub blocks: u32,
    /// Of those, how many it would take from each tier: the fastest that has the block.
    pub tiers: [u32; TIERS],
    /// Whether more is held than can be used.
    pub usable: Usable,
    /// The weighted share of the prompt: 1 when all blocks are worth 1.
    pub score: f64,
}

/// One group's state within the pass.
#[derive(Debug, Clone, Copy, Default)]
struct Track {
    /// Block after the last one that was there without a hole before it.
    end: u32,
    /// First block of that run.
    start: u32,
    /// Blocks of the prompt's beginning that were all there, and in which tiers.
    prefix: u32,
    tiers: [u32; TIERS],
    /// The tier of the run that ended last.
    last: usize,
    seen: bool,
}

/// Reusable memory of passes.
#[derive(Debug)]
pub struct PrefixScorer {
    /// Tiers that count, as a mask.
    counted: u8,
    tracks: Vec<Track>,
    touched: Vec<u32>,
    holders: Vec<u32>,
    usable: Vec<(u32, [u32; TIERS])>,
    scores: Vec<Score>,
}

/// Can an engine use the prefix up to a point within the run of blocks that ends at `end`?
fn has_enough(tracks: &[Track], engine: &EngineView, point: u32, end: u32) -> bool {
    let held = |column: &Column| tracks.get(column.0 as usize).filter(|track| track.seen && track.end == end);
    // An engine that holds nothing here is none that anything is to be had from.
    engine.columns.iter().any(|(column, _)| held(column).is_some())
        && engine.columns.iter().all(|(column, need)| match need {
            Need::Whole => held(column).is_some_and(|track| track.start == 0),
            Need::Last(blocks) => {
                held(column).is_some_and(|track| point.saturating_sub(track.start) >= (*blocks).min(point))
            }
            Need::OwnChunk(blocks) => {
                let first = point - point % (*blocks).max(1);
                first == point || held(column).is_some_and(|track| track.start <= first)
            }
        })
}

impl Default for PrefixScorer {
    fn default() -> Self {
        Self::of_tiers(&ALL)
    }
}

impl PrefixScorer {
    /// One for which engines hold only what they have in these tiers.
    pub fn of_tiers(tiers: &[FleetTier]) -> Self {
        Self {
            counted: tiers.iter().fold(0, |mask, tier| mask | tier.bit()),
            tracks: Vec::new(),
            touched: Vec::new(),
            holders: Vec::new(),
            usable: Vec::new(),
            scores: Vec::new(),
        }
    }

    /// Scores every engine that has anything of the prompt, or only `candidates`; best first, then
    /// by engine number.
    pub fn score(
        &mut self,
        (table, sets, roster): (&HolderTable, &Sets, &Roster),
        keys: &[u64],
        candidates: Option<&[EngineId]>,
        weights: &Weights,
    ) -> &[Score] {
        self.begin(roster, candidates);
        let mut view = table.view();
        let several: Vec<&EngineView> = roster.engines.iter().flatten().filter(|engine| engine.needs_care()).collect();
        self.usable.clear();
        self.usable.resize(several.len(), (0, [0; TIERS]));
        let windows_only = several.iter().any(|engine| engine.columns.iter().all(|(_, need)| *need != Need::Whole));
        for key in keys.iter().take(AHEAD) {
            view.announce(*key);
        }
        let mut block = 0;
        let mut current = None;
        let mut run_start = 0_u32;
        for (number, key) in keys.iter().enumerate() {
            if let Some(key) = keys.get(number + AHEAD) {
                view.announce(*key);
            }
            block = number as u32;
            let set = view.get(*key).unwrap_or(SetRef::NONE);
            if current == Some(set) {
                continue;
            }
            if current.is_some() {
                let alive = self.close_run(run_start, block);
                self.weigh(&several, run_start, block);
                if !alive && !windows_only {
                    current = None;
                    break;
                }
            }
            run_start = block;
            current = Some(self.open_run(sets, &mut view, *key, set));
        }
        if current.is_some() {
            self.close_run(run_start, block + 1);
            self.weigh(&several, run_start, block + 1);
        }
        self.collect(roster, &several, keys.len(), weights)
    }

    fn begin(&mut self, roster: &Roster, candidates: Option<&[EngineId]>) {
        self.tracks.clear();
        self.touched.clear();
        self.scores.clear();
        let wanted = |engine: &EngineId| candidates.is_none_or(|wanted| wanted.contains(engine));
        // A column that is not wanted is one whose prefix has ended before it began.
        let track = |column: &Option<(EngineId, Need)>| Track {
            end: if column.as_ref().is_some_and(|(engine, _)| wanted(engine)) { 0 } else { u32::MAX },
            ..Track::default()
        };
        self.tracks.extend(roster.columns.iter().map(track));
    }

    /// Reads the holders of a run's first block.
    fn open_run(&mut self, sets: &Sets, view: &mut TableView<'_>, key: u64, mut set: SetRef) -> SetRef {
        for _ in 0..TRIES {
            if sets.read(set, &mut self.holders) {
                return set;
            }
            view.renew(key);
            set = view.get(key).unwrap_or(SetRef::NONE);
        }
        // It changes all the time: a doubtful block is a miss.
        self.holders.clear();
        SetRef::NONE
    }

    /// Counts a run of blocks with the same holders. `false`: nobody holds every block so far.
    fn close_run(&mut self, start: u32, end: u32) -> bool {
        let mut alive = false;
        for holder in &self.holders {
            let (column, mask) = unpack(*holder);
            let mask = mask & self.counted;
            if mask == 0 {
                continue;
            }
            let Some(track) = self.tracks.get_mut(column.0 as usize) else { continue };
            if track.end == u32::MAX {
                continue;
            }
            if !track.seen {
                track.seen = true;
                self.touched.push(column.0);
                track.start = start;
            } else if track.end != start {
                track.start = start;
            }
            // Tiers count for the prefix only.
            if track.start == 0 {
                track.last = FleetTier::best(mask) as usize;
                track.tiers[track.last] += end - start;
                track.prefix = end;
                alive = true;
            }
            track.end = end;
        }
        alive
    }

    /// For engines that need care: can they use the prefix up to the last point of theirs within
    /// the run that has just ended?
    fn weigh(&mut self, several: &[&EngineView], start: u32, end: u32) {
        for (engine, usable) in several.iter().zip(&mut self.usable) {
            let point = end - end % engine.step.max(1);
            if point <= start {
                continue;
            }
            // Where a chunk begins, a group of chunks needs nothing.
            let chunk = engine.columns.iter().find_map(|(_, need)| need.chunk());
            let begins = chunk
                .map(|blocks| point - point % blocks.max(1))
                .filter(|begin| *begin > start && begin % engine.step.max(1) == 0);
            let usable_at = |point: &u32| has_enough(&self.tracks, engine, *point, end);
            if let Some(point) = [Some(point), begins].into_iter().flatten().find(usable_at) {
                let first = engine.columns.first().and_then(|(column, _)| self.tracks.get(column.0 as usize));
                let mut tiers = first.map_or([0; TIERS], |track| track.tiers);
                if let Some(track) = first {
                    tiers[track.last] = tiers[track.last].saturating_sub(end - point);
                }
                *usable = (point, tiers);
            }
        }
    }

    fn collect(&mut self, roster: &Roster, several: &[&EngineView], blocks: usize, weights: &Weights) -> &[Score] {
        let score = |tiers: &[u32; TIERS], used: u32, held: u32, engine: EngineId| {
            let worth: f64 = tiers.iter().zip(weights.0).map(|(blocks, weight)| f64::from(*blocks) * weight).sum();
            let usable = match used {
                0 => Usable::None,
                used if used == held => Usable::Full,
                _ => Usable::Partial,
            };
            Score { engine, blocks: used, tiers: *tiers, usable, score: worth / blocks.max(1) as f64 }
        };
        for (engine, (used, tiers)) in several.iter().zip(&self.usable) {
            let whole = engine.columns.iter().filter(|(_, need)| *need == Need::Whole);
            let held =
                whole.filter_map(|(column, _)| self.tracks.get(column.0 as usize).map(|track| track.prefix)).min();
            let held = held.map_or(*used, |held| held - held % engine.step.max(1));
            if held > 0 {
                self.scores.push(score(tiers, *used, held, engine.id));
            }
        }
        for column in &self.touched {
            let Some(Some((engine, _))) = roster.columns.get(*column as usize) else { continue };
            let track = &self.tracks[*column as usize];
            let used = track.prefix;
            let careful = roster.get(*engine).is_none_or(EngineView::needs_care);
            if used > 0 && !careful {
                self.scores.push(score(&track.tiers, used, used, *engine));
            }
        }
        self.scores.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.engine.cmp(&b.engine)));
        &self.scores
    }
}
