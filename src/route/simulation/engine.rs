//! A model of an engine: continuous batching with chunked prefill, a prefix cache in GPU memory with a tier in host memory behind it.
//!
//! A step takes a fixed time, a time for each prompt token it computes and each request it decodes, and the time of loads from host memory. Blocks of
//! running requests are pinned; the others stay in recency order until their room is needed, then they go to host memory, whose oldest go for good.

use std::collections::{HashMap, VecDeque};

use lru::LruCache;

use super::load::BLOCK;

/// Speeds and sizes.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// Blocks of GPU memory.
    pub gpu_blocks: usize,
    /// Blocks of host memory.
    pub host_blocks: usize,
    /// Seconds of a step before anything is computed.
    pub step_s: f64,
    /// Prompt tokens a second.
    pub prefill: f64,
    /// Seconds a step takes for each request it decodes.
    pub decode_s: f64,
    /// Tokens a second from host memory.
    pub load: f64,
    /// Prompt tokens of a step.
    pub chunk: u32,
    /// Requests that run at once.
    pub slots: usize,
}

impl Default for Model {
    fn default() -> Self {
        // About an 8B model on one 80 GB GPU.
        Self {
            gpu_blocks: 4096,
            host_blocks: 8192,
            step_s: 0.008,
            prefill: 12_000.0,
            decode_s: 0.000_06,
            load: 400_000.0,
            chunk: 2048,
            slots: 128,
        }
    }
}

/// What happens to a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// In GPU memory now; the block before it.
    Stored(u64, Option<u64>, u32),
    /// Out of GPU memory, into host memory.
    Moved(u64),
    /// Out of host memory.
    Dropped(u64),
}

/// A request within the engine.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its number.
    pub id: usize,
    /// Hashes of its prompt's blocks.
    pub hashes: Vec<u64>,
    /// Their contents.
    pub contents: Vec<u32>,
    /// Tokens of its answer.
    pub answer: u32,
    uncomputed: u32,
    held: usize,
    decoded: u32,
    private: usize,
}

impl Job {
    /// A request.
    pub fn new(id: usize, hashes: Vec<u64>, contents: Vec<u32>, answer: u32) -> Self {
        Self { id, hashes, contents, answer, uncomputed: 0, held: 0, decoded: 0, private: 0 }
    }
}

/// What a step brought about.
#[derive(Debug, Default)]
pub struct Step {
    /// How long it takes.
    pub seconds: f64,
    /// Requests whose first token comes at its end, with the tokens they had cached.
    pub first_tokens: Vec<(usize, u32)>,
    /// Requests that end with it.
    pub done: Vec<usize>,
}

/// An engine.
#[derive(Debug)]
pub struct SimEngine {
    model: Model,
    waiting: VecDeque<Job>,
    running: Vec<Job>,
    /// In GPU memory, pinned by so many running requests.
    pinned: HashMap<u64, u32>,
    /// In GPU memory, unpinned.
    free: LruCache<u64, ()>,
    host: LruCache<u64, ()>,
    private: usize,
    /// What happened since it was last asked.
    pub changes: Vec<Change>,
    /// Seconds of all steps.
    pub busy_s: f64,
    /// A step is under way.
    pub is_stepping: bool,
}

impl SimEngine {
    /// Empty.
    pub fn new(model: Model) -> Self {
        Self {
            model,
            waiting: VecDeque::new(),
            running: Vec::new(),
            pinned: HashMap::new(),
            free: LruCache::unbounded(),
            host: LruCache::unbounded(),
            private: 0,
            changes: Vec::new(),
            busy_s: 0.0,
            is_stepping: false,
        }
    }

    /// Waiting, running, and the share of GPU memory that running requests use.
    pub fn told(&self) -> (usize, usize, f64) {
        let used = self.pinned.len() + self.private;
        (self.waiting.len(), self.running.len(), used as f64 / self.model.gpu_blocks as f64)
    }

    /// Takes a request.
    pub fn push(&mut self, job: Job) {
        self.waiting.push_back(job);
    }

    /// There is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    fn make_room(&mut self, blocks: usize) {
        while self.pinned.len() + self.free.len() + self.private + blocks > self.model.gpu_blocks {
            let Some((hash, ())) = self.free.pop_lru() else { return };
            self.changes.push(Change::Moved(hash));
            self.host.put(hash, ());
            if self.host.len() > self.model.host_blocks
                && let Some((old, ())) = self.host.pop_lru()
            {
                self.changes.push(Change::Dropped(old));
            }
        }
    }

    /// Lets waiting requests in, in their order, as long as there is room. Returns the tokens that they load from host memory.
    fn admit(&mut self) -> u32 {
        let mut loaded = 0;
        while let Some(job) = self.waiting.front() {
            let in_gpu = |hash: &u64| self.pinned.contains_key(hash) || self.free.contains(hash);
            let gpu = job.hashes.iter().take_while(|hash| in_gpu(hash)).count();
            let host = job.hashes[gpu..].iter().take_while(|hash| self.host.contains(hash)).count();
            // The last block of a prompt is always computed.
            let held = (gpu + host).min(job.hashes.len().saturating_sub(1));
            let private = (job.answer / BLOCK + 1) as usize;
            let pinned_already =
                job.hashes[..held.min(gpu)].iter().filter(|hash| self.pinned.contains_key(hash)).count();
            let wanted = job.hashes.len() - pinned_already + private;
            let room = self.model.gpu_blocks.saturating_sub(self.pinned.len() + self.private);
            if self.running.len() >= self.model.slots || (wanted > room && !self.running.is_empty()) {
                break;
            }
            let Some(mut job) = self.waiting.pop_front() else { break };
            for hash in &job.hashes[..held] {
                self.free.pop(hash);
                *self.pinned.entry(*hash).or_insert(0) += 1;
            }
            let new_in_gpu = held.saturating_sub(gpu);
            self.make_room(job.hashes.len() - held + private);
            for at in gpu..held {
                let parent = at.checked_sub(1).map(|before| job.hashes[before]);
                self.changes.push(Change::Stored(job.hashes[at], parent, job.contents[at]));
            }
            loaded += new_in_gpu as u32 * BLOCK;
            self.private += private;
            job.private = private;
            job.held = held;
            job.uncomputed = (job.hashes.len() - held) as u32 * BLOCK;
            self.running.push(job);
        }
        loaded
    }

    /// One step.
    pub fn step(&mut self) -> Step {
        let loaded = self.admit();
        let mut step = Step::default();
        let mut budget = self.model.chunk;
        let mut decodes = 0;
        let mut computed = Vec::new();
        for (at, job) in self.running.iter_mut().enumerate() {
            if job.uncomputed > 0 {
                let part = job.uncomputed.min(budget);
                budget -= part;
                job.uncomputed -= part;
                if job.uncomputed == 0 && part > 0 {
                    step.first_tokens.push((job.id, job.held as u32 * BLOCK));
                    job.decoded = 1;
                    computed.push(at);
                }
            } else {
                decodes += 1;
                job.decoded += 1;
            }
        }
        for at in computed {
            let (hashes, contents, held) =
                (self.running[at].hashes.clone(), self.running[at].contents.clone(), self.running[at].held);
            for place in held..hashes.len() {
                let is_new = !self.pinned.contains_key(&hashes[place]) && self.free.pop(&hashes[place]).is_none();
                *self.pinned.entry(hashes[place]).or_insert(0) += 1;
                if is_new {
                    let parent = place.checked_sub(1).map(|before| hashes[before]);
                    self.changes.push(Change::Stored(hashes[place], parent, contents[place]));
                }
            }
        }
        let prefill = self.model.chunk - budget;
        let prefill_s = f64::from(prefill) / self.model.prefill;
        step.seconds = self.model.step_s
            + prefill_s
            + f64::from(decodes) * self.model.decode_s
            + f64::from(loaded) / self.model.load;
        self.busy_s += step.seconds;
        let (done, running): (Vec<Job>, Vec<Job>) = std::mem::take(&mut self.running)
            .into_iter()
            .partition(|job| job.uncomputed == 0 && job.decoded >= job.answer);
        self.running = running;
        for job in done {
            self.private -= job.private;
            // The last block is the first to go.
            for hash in job.hashes.iter().rev() {
                let Some(pins) = self.pinned.get_mut(hash) else { continue };
                *pins -= 1;
                if *pins == 0 {
                    self.pinned.remove(hash);
                    self.free.put(*hash, ());
                }
            }
            step.done.push(job.id);
        }
        self.make_room(0);
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(engine: &mut SimEngine, job: Job) -> (u32, f64) {
        engine.push(job);
        let (mut cached, mut seconds) = (0, 0.0);
        while !engine.is_idle() {
            let step = engine.step();
            seconds += step.seconds;
            cached += step.first_tokens.iter().map(|(_, cached)| cached).sum::<u32>();
        }
        (cached, seconds)
    }

    fn job(id: usize, from: u64, blocks: u64) -> Job {
        Job::new(id, (from..from + blocks).collect(), (from as u32..(from + blocks) as u32).collect(), 10)
    }

    #[test]
    fn a_prefix_is_computed_once_and_moves_down() {
        let model = Model { gpu_blocks: 40, host_blocks: 40, ..Model::default() };
        let mut engine = SimEngine::new(model);
        let (cached, cold_s) = run(&mut engine, job(0, 1, 30));
        assert_eq!(cached, 0);
        let (cached, warm_s) = run(&mut engine, job(1, 1, 30));
        assert!(cached == 29 * BLOCK && warm_s < cold_s);
        run(&mut engine, job(2, 1000, 30));
        assert!(engine.changes.iter().any(|change| matches!(change, Change::Moved(_))));
        let (cached, _) = run(&mut engine, job(3, 1, 30));
        assert_eq!(cached, 29 * BLOCK, "from host memory");
        run(&mut engine, job(4, 2000, 30));
        run(&mut engine, job(5, 3000, 30));
        run(&mut engine, job(6, 4000, 30));
        let (cached, _) = run(&mut engine, job(7, 1, 30));
        assert!(cached < 29 * BLOCK, "the oldest have gone");
        assert_eq!((engine.pinned.len(), engine.private), (0, 0), "everything is given back");
    }
}
