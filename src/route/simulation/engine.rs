//! A model of an engine: continuous batching with chunked prefill over a prefix cache with a tier
//! in host memory behind it ([`Cache`]).
//!
//! As in vLLM, a step spends a budget of tokens: one for each request that decodes, then chunks of
//! prompts in the order they came; who gets nothing of it waits, and finds what others have
//! computed meanwhile when its turn comes. A step takes a fixed time, a time for each prompt token
//! it computes and each request it decodes, and the time of loads from host memory. A prompt that
//! another engine has computed is loaded as a whole, but for its last block. Not modelled:
//! preemption (a request's room is reserved up to its end), attention that grows with the context,
//! failures.

use std::collections::VecDeque;

use super::cache::{Cache, Change};
use super::load::{BLOCK, Load};

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
    /// Tokens a second from another engine.
    pub transfer: f64,
    /// Tokens of a step.
    pub budget: u32,
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
            // 128 KiB a token over a network of 200 Gbit/s.
            transfer: 200_000.0,
            budget: 2048,
            slots: 128,
        }
    }
}

impl Model {
    /// Engines for a kind of traffic.
    pub fn of(load: Load) -> Self {
        match load {
            Load::SharedPrefix | Load::MultiTurn | Load::Agent => Self::default(),
            // A model of 135M parameters on one core, with the caches that the report tells of.
            Load::Notebooks => Self {
                gpu_blocks: 58,
                host_blocks: 140,
                step_s: 0.03,
                prefill: 1_050.0,
                decode_s: 0.005,
                ..Self::default()
            },
        }
    }
}

/// A request within the engine.
#[derive(Debug)]
pub struct Job {
    /// Its number.
    pub id: usize,
    /// Hashes of its blocks: those of the prompt, then full ones of the answer.
    pub hashes: Vec<u64>,
    /// Their contents.
    pub contents: Vec<u32>,
    /// How many are the prompt's.
    pub prompt: usize,
    /// Tokens of its answer.
    pub answer: u32,
    /// Another engine has computed its prompt.
    is_handed_over: bool,
    cached: u32,
    computed: u32,
    decoded: u32,
}

impl Job {
    /// A request with a prompt of so many blocks.
    pub fn new(id: usize, hashes: Vec<u64>, contents: Vec<u32>, prompt: usize, answer: u32) -> Self {
        Self { id, hashes, contents, prompt, answer, is_handed_over: false, cached: 0, computed: 0, decoded: 0 }
    }

    /// The same, with a prompt that another engine has computed.
    #[must_use]
    pub fn handed_over(self) -> Self {
        Self { is_handed_over: true, ..self }
    }

    fn prompt_tokens(&self) -> u32 {
        self.prompt as u32 * BLOCK
    }

    fn is_computed(&self) -> bool {
        self.computed == self.prompt_tokens()
    }

    /// Blocks that are full.
    fn full(&self) -> usize {
        ((self.computed + self.decoded.saturating_sub(1)) / BLOCK) as usize
    }

    /// All it needs up to its end: the last block may not become full.
    fn room(&self) -> usize {
        self.hashes.len() + 1
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
    /// What it changes in the engine's blocks.
    pub changes: Vec<Change>,
}

/// An engine.
#[derive(Debug)]
pub struct SimEngine {
    model: Model,
    waiting: VecDeque<Job>,
    running: Vec<Job>,
    /// Its blocks.
    pub cache: Cache,
    /// Seconds of all steps, less what a step takes that computes nothing.
    pub work_s: f64,
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
            cache: Cache::new(model.gpu_blocks, model.host_blocks),
            work_s: 0.0,
            is_stepping: false,
        }
    }

    /// Waiting, running, and the share of GPU memory that running requests use.
    pub fn told(&self) -> (usize, usize, f64) {
        (self.waiting.len(), self.running.len(), self.cache.usage())
    }

    /// Takes a request.
    pub fn push(&mut self, job: Job) {
        self.waiting.push_back(job);
    }

    /// There is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Everything that was here is lost. Returns the requests.
    pub fn lose(&mut self) -> Vec<usize> {
        let lost = self.running.iter().chain(&self.waiting).map(|job| job.id).collect();
        *self = Self { work_s: self.work_s, ..Self::new(self.model) };
        lost
    }

    /// Lets the first waiting request in if there is room. Returns the seconds that its loads take.
    fn admit(&mut self) -> Option<f64> {
        let job = self.waiting.front()?;
        let (gpu, host) = self.cache.held(&job.hashes[..job.prompt]);
        // The last block of a prompt is always computed.
        let gpu = gpu.min(job.prompt - 1);
        let from_host = host.min(job.prompt - 1 - gpu);
        let loaded = if job.is_handed_over { job.prompt - 1 - gpu } else { from_host };
        let fits = self.cache.fits(&job.hashes[..gpu], job.room()) || self.running.is_empty();
        if self.running.len() >= self.model.slots || !fits {
            return None;
        }
        let mut job = self.waiting.pop_front()?;
        self.cache.admit(&job.hashes, &job.contents, (gpu, loaded), job.room() - gpu - loaded);
        job.cached = (gpu + loaded) as u32 * BLOCK;
        job.computed = job.cached;
        let rate = if job.is_handed_over { self.model.transfer } else { self.model.load };
        self.running.push(job);
        Some(loaded as f64 * f64::from(BLOCK) / rate)
    }

    /// One step.
    pub fn step(&mut self) -> Step {
        let mut step = Step::default();
        let (mut budget, mut prefill, mut decodes, mut load_s) = (self.model.budget, 0, 0, 0.0);
        let mut at = 0;
        loop {
            if at == self.running.len() {
                match (budget > 0).then(|| self.admit()).flatten() {
                    Some(seconds) => load_s += seconds,
                    None => break,
                }
            }
            let job = &mut self.running[at];
            let before = job.full();
            if job.is_computed() {
                decodes += 1;
                budget = budget.saturating_sub(1);
                job.decoded += 1;
            } else {
                let part = (job.prompt_tokens() - job.computed).min(budget);
                (budget, prefill, job.computed) = (budget - part, prefill + part, job.computed + part);
                if job.is_computed() {
                    job.decoded = 1;
                    step.first_tokens.push((job.id, job.cached));
                }
            }
            for place in before..job.full().min(job.hashes.len()) {
                self.cache.fill(&job.hashes, &job.contents, place);
            }
            at += 1;
        }
        let work_s = f64::from(prefill) / self.model.prefill + f64::from(decodes) * self.model.decode_s + load_s;
        self.work_s += work_s;
        step.seconds = self.model.step_s + work_s;
        let is_done = |job: &Job| job.is_computed() && job.decoded >= job.answer;
        let (done, running): (Vec<Job>, Vec<Job>) = std::mem::take(&mut self.running).into_iter().partition(is_done);
        self.running = running;
        for job in done {
            let full = job.full().min(job.hashes.len());
            self.cache.release(&job.hashes[..full], job.room() - full);
            step.done.push(job.id);
        }
        step.changes = std::mem::take(&mut self.cache.changes);
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
        let contents = (from as u32..(from + blocks) as u32).collect();
        Job::new(id, (from..from + blocks).collect(), contents, blocks as usize, 10)
    }

    #[test]
    fn a_prefix_is_computed_once_and_moves_down() {
        let model = Model { gpu_blocks: 40, host_blocks: 40, ..Model::default() };
        let mut engine = SimEngine::new(model);
        let (cached, cold_s) = run(&mut engine, job(0, 1, 30));
        assert_eq!(cached, 0);
        let (cached, warm_s) = run(&mut engine, job(1, 1, 30));
        assert!(cached == 29 * BLOCK && warm_s < cold_s);
        engine.push(job(2, 1000, 30));
        let moved = |step: &Step| step.changes.iter().any(|change| matches!(change, Change::Moved(_)));
        assert!(moved(&engine.step()));
        while !engine.is_idle() {
            engine.step();
        }
        let (cached, _) = run(&mut engine, job(3, 1, 30));
        assert_eq!(cached, 29 * BLOCK, "from host memory");
        run(&mut engine, job(4, 2000, 30));
        run(&mut engine, job(5, 3000, 30));
        run(&mut engine, job(6, 4000, 30));
        let (cached, _) = run(&mut engine, job(7, 1, 30));
        assert!(cached < 29 * BLOCK, "the oldest have gone");
        assert!(engine.cache.is_released(), "everything is given back");
    }

    #[test]
    fn who_waits_finds_what_was_computed_meanwhile() {
        let mut engine = SimEngine::new(Model::default());
        engine.push(job(0, 1, 100));
        engine.push(job(1, 1, 100));
        let steps: Vec<Step> = std::iter::from_fn(|| (!engine.is_idle()).then(|| engine.step())).take(4).collect();
        assert!(steps[..3].iter().all(|step| step.first_tokens.is_empty()), "6400 tokens take four steps of 2048");
        assert_eq!(steps[3].first_tokens, [(0, 0), (1, 99 * BLOCK)]);
    }

    #[test]
    fn a_full_memory_makes_wait() {
        let mut engine = SimEngine::new(Model { gpu_blocks: 40, ..Model::default() });
        engine.push(job(0, 1, 20));
        engine.push(job(1, 1000, 20));
        engine.step();
        assert_eq!((engine.told().0, engine.told().1), (1, 1));
        assert!(engine.told().2 > 0.5);
    }

    #[test]
    fn an_answer_is_held_like_a_prompt() {
        let mut engine = SimEngine::new(Model::default());
        let contents: Vec<u32> = (1..=12).collect();
        let hashes: Vec<u64> = (1..=12).collect();
        run(&mut engine, Job::new(0, hashes.clone(), contents, 10, 2 * BLOCK + 5));
        assert_eq!(engine.cache.held(&hashes), (12, 0));
    }

    #[test]
    fn what_was_handed_over_is_loaded_and_what_was_lost_is_named() {
        let mut engine = SimEngine::new(Model::default());
        let (cached, seconds) = run(&mut engine, job(0, 1, 30).handed_over());
        assert_eq!(cached, 29 * BLOCK);
        assert!(seconds < run(&mut engine, job(1, 1000, 30)).1);
        engine.push(job(2, 2000, 40));
        engine.step();
        engine.push(job(3, 3000, 1));
        assert_eq!(engine.lose(), [2, 3]);
        assert!(engine.is_idle() && engine.work_s > 0.0);
        assert_eq!(run(&mut engine, job(4, 1000, 30)).0, 0, "it holds nothing any more");
    }
}
