//! Decisions within this process: from a body's bytes to an engine.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use bytes::Bytes;
use indicatif::ProgressBar;

use super::prompts::TextWriter;
use super::{RouteBench, RouteFindings, TURN, fewer};
use crate::report::{GoalBound, percentile, thread_cpu_s};
use kvcellar_block::error::{Error, Result};
use kvcellar_events::wire::{Batch, BatchArena, Event, Hashes, Stored};
use kvcellar_index::Index;
use kvcellar_route::choose::Policy;
use kvcellar_route::engine::Told;
use kvcellar_route::engines::Engines;
use kvcellar_route::outcome::Outcome;
use kvcellar_route::prompt::{Checked, Models, Prompt};
use kvcellar_route::request::{Kind, Request};
use kvcellar_route::router::{Mode, Router, Setup};
use kvcellar_route::spec::{EngineRole, Spec};
use kvcellar_route::tokens::TokenModel;
use kvcellar_route::upstream::{Upstream, UpstreamOptions};

/// What prompts are like, and how prefixes are looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    /// A text that was mostly seen; the index.
    Seen,
    /// A text that was never seen; the index.
    New,
    /// Ids; the index.
    Ids,
    /// A text; guesses.
    Approximate,
}

pub(super) const KINDS: [(Sort, &str); 4] =
    [(Sort::Seen, "seen text"), (Sort::New, "new text"), (Sort::Ids, "ids"), (Sort::Approximate, "approximate")];

const BLOCK: u32 = 16;

/// All decisions. The deciding runtime has one thread, so CPU time is the thread's own.
pub(super) fn measure(
    options: &RouteBench,
    model: &TokenModel,
    bar: &ProgressBar,
    found: &mut RouteFindings,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime =
        runtime.map_err(|error| Error::io("starting", "a runtime", error, "Allow this process more threads"))?;
    for tokens in &options.tokens {
        for engines in &options.engines {
            for (sort, name) in KINDS {
                bar.set_message(format!("{tokens} tokens, {engines} engines, {name}"));
                let place = KnownPrefix { tokens: *tokens, engines: *engines, sort };
                runtime.block_on(place.measure(options, model, name, found))?;
                bar.inc(1);
            }
        }
    }
    Ok(())
}

#[derive(Debug, Clone, Copy)]
struct KnownPrefix {
    tokens: usize,
    engines: usize,
    sort: Sort,
}

impl KnownPrefix {
    async fn measure(
        self,
        options: &RouteBench,
        model: &TokenModel,
        name: &str,
        found: &mut RouteFindings,
    ) -> Result<()> {
        let mut writer = TextWriter::new(model, 7)?;
        let beginning = self.body(&writer.text(self.tokens - TURN), &writer.ids(self.tokens - TURN));
        let (router, index) = self.router(options)?;
        if let Some(index) = &index {
            self.fill(index, &router, &beginning)?;
        }
        let decisions = fewer(options.decisions, self.tokens);
        let [mut p50, mut p99, mut cpu] = [const { Vec::new() }; 3];
        for _ in 0..options.repetitions {
            let bodies: Vec<Bytes> = (0..decisions).map(|_| self.next(&mut writer, &beginning).into()).collect();
            let mut took: Vec<f64> = Vec::with_capacity(decisions);
            let before = thread_cpu_s()?;
            for body in bodies {
                let started = Instant::now();
                let request = Request::read(Kind::Completion, body).map_err(refused)?;
                let ticket = router.route(&request).await.map_err(refused)?;
                took.push(started.elapsed().as_secs_f64() * 1e3);
                ticket.end(Outcome::Done, None);
            }
            cpu.push((thread_cpu_s()? - before) / decisions as f64 * 1e3);
            took.sort_by(f64::total_cmp);
            p50.push(percentile(&took, 50));
            p99.push(percentile(&took, 99));
            // The index learns of the decisions beside them.
            tokio::task::yield_now().await;
        }
        let Self { tokens, engines, .. } = self;
        let label = format!("{tokens} tokens, {engines} engines, {name}");
        found.put(&format!("decision, {label}, p50"), "ms", p50);
        found.put(&format!("decision, {label}, p99"), "ms", p99);
        let cpu = found.put(&format!("decision, {label}, CPU"), "ms", cpu);
        if tokens == 100_000 && self.sort != Sort::Approximate {
            found.goal(format!("CPU of a decision, {label}, in ms"), GoalBound::AtMost(10.0), cpu);
        }
        Ok(())
    }

    fn body(self, text: &str, ids: &[u32]) -> String {
        let prompt = if self.sort == Sort::Ids { serde_json::json!(ids) } else { serde_json::json!(text) };
        serde_json::json!({"model": "m", "max_tokens": 1, "prompt": prompt}).to_string()
    }

    /// The next request: another turn, or something new.
    fn next(self, writer: &mut TextWriter, beginning: &str) -> String {
        match self.sort {
            Sort::New => {
                let text = writer.text(self.tokens);
                self.body(&text, &[])
            }
            Sort::Ids => {
                let turn = writer.ids(TURN);
                let turn = serde_json::json!(turn).to_string();
                beginning.replace("]}", &format!(",{}}}", &turn[1..]))
            }
            Sort::Seen | Sort::Approximate => beginning.replace("\"}", &format!("{}\"}}", writer.text(TURN))),
        }
    }

    fn router(self, options: &RouteBench) -> Result<(Arc<Router>, Option<Arc<Index>>)> {
        let engines = Arc::new(Engines::default());
        let spec = |number: usize| Spec {
            name: format!("engine-{number}"),
            url: format!("http://10.0.{}.{}:8000", number / 250, number % 250 + 1),
            events: None,
            replay: None,
            role: EngineRole::Both,
            peer: None,
            rank: None,
            draining: false,
        };
        engines.set((0..self.engines).map(spec).collect());
        for engine in engines.all().iter() {
            engine.heard(Told { kv_tokens: 1 << 20, ..Told::default() });
        }
        let index = match self.sort {
            Sort::Approximate => None,
            _ => Some(Arc::new(Index::new(BLOCK, 4 << 30)?)),
        };
        let model = TokenModel::open(&options.tokenizer, 256 << 20)?;
        let named = [(String::new(), Arc::new(Checked { model, differs: AtomicBool::new(false) }))].into();
        let setup = Setup {
            index: index.clone(),
            models: Models { named },
            ..Setup::new(if index.is_some() { Mode::Precise } else { Mode::Approximate }, Policy::Cost)
        };
        Ok((Router::new(engines, Upstream::open(&UpstreamOptions::default())?, setup), index))
    }

    /// Every engine holds a part of the beginning: from half of it to all.
    fn fill(self, index: &Index, router: &Router, beginning: &str) -> Result<()> {
        let request = Request::read(Kind::Completion, Bytes::copy_from_slice(beginning.as_bytes())).map_err(refused)?;
        let (ids, _) = Prompt::ids(&request, &router.setup.models)
            .map_err(|problem| Error::config("tokenizer", problem.to_string(), "Name another model's directory"))?;
        let blocks = ids.len() / BLOCK as usize;
        let mut arena = BatchArena::default();
        for number in 0..self.engines {
            let held = blocks - blocks * number / (2 * self.engines);
            arena.clear();
            arena.hashes.extend((0..held as u64).map(|block| block + 1));
            arena.tokens.extend_from_slice(&ids[..held * BLOCK as usize]);
            let stored = Stored {
                hashes: Hashes { range: 0..held, digests: None },
                tokens: 0..held * BLOCK as usize,
                block_size: BLOCK,
                medium: Some("GPU"),
                ..Stored::default()
            };
            let batch = Batch { events: vec![Event::Stored(Box::new(stored))], ..Batch::default() };
            let mut writer = index.write();
            let id = writer.engine(&format!("engine-{number}"), "")?;
            writer.apply(id, &batch, &arena);
        }
        Ok(())
    }
}

fn refused(refusal: impl std::fmt::Display) -> Error {
    Error::config("prompts", refusal.to_string(), "This is a bug in the benchmark")
}
