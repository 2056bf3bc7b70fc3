//! The front ends: a router process beside the same with a fixed target, and Envoy with our picker
//! beside Envoy with a fixed target.

use bytes::Bytes;
use indicatif::ProgressBar;

use super::envoy::Envoy;
use super::load::RequestLoad;
use super::process::{Process, RouterProcess};
use super::prompts::TextWriter;
use super::stand_in::StandIn;
use super::{RouteBench, RouteFindings, TURN, fewer};
use crate::report::{GoalBound, percentile};
use kvcellar_block::error::Result;
use kvcellar_route::tokens::TokenModel;

const ENGINES: usize = 8;
/// Requests at a time when rates are measured.
const AT_ONCE: usize = 8;

/// One way to an engine, and whose CPU time it takes.
struct FrontEnd<'p> {
    name: &'static str,
    url: String,
    process: &'p Process,
    p50_ms: Vec<f64>,
    p99_ms: Vec<f64>,
    cpu_ms: Vec<f64>,
}

impl<'p> FrontEnd<'p> {
    fn new(name: &'static str, url: &str, process: &'p Process) -> Self {
        Self { name, url: url.to_owned(), process, p50_ms: Vec::new(), p99_ms: Vec::new(), cpu_ms: Vec::new() }
    }

    /// One repetition: one request at a time for latency, then several for CPU time a request.
    async fn run(&mut self, load: &RequestLoad, alone: Vec<Bytes>, together: Vec<Bytes>) -> Result<()> {
        let took = load.send(&self.url, alone, 1).await?;
        self.p50_ms.push(percentile(&took, 50) * 1e3);
        self.p99_ms.push(percentile(&took, 99) * 1e3);
        let (count, before) = (together.len(), self.process.cpu_s()?);
        load.send(&self.url, together, AT_ONCE).await?;
        self.cpu_ms.push((self.process.cpu_s()? - before) / count as f64 * 1e3);
        Ok(())
    }
}

/// All front ends.
pub(super) fn measure(
    options: &RouteBench,
    model: &TokenModel,
    bar: &ProgressBar,
    found: &mut RouteFindings,
) -> Result<()> {
    kvcellar_index::api::serving::block_on(run(options, model, bar, found))
}

async fn run(options: &RouteBench, model: &TokenModel, bar: &ProgressBar, found: &mut RouteFindings) -> Result<()> {
    let mut engines = Vec::new();
    for number in 0..ENGINES {
        engines.push(StandIn::start(number).await?);
    }
    let flags = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<String>>();
    let named = |engines: &[StandIn]| {
        engines.iter().flat_map(|engine| ["--engine".to_owned(), engine.spec.clone()]).collect::<Vec<String>>()
    };
    let tokenizer = options.tokenizer.to_string_lossy();
    let mut precise = flags(&["--mode", "precise", "--tokenizer", &tokenizer]);
    precise.extend(named(&engines));
    let mut fixed = flags(&["--mode", "none", "--policy", "round-robin"]);
    fixed.extend(named(&engines[..1]));
    let precise = RouterProcess::start(&precise, ENGINES).await?;
    let fixed = RouterProcess::start(&fixed, 1).await?;
    let envoy = match &options.envoy {
        Some(binary) => Some(Envoy::start(binary, engines[0].port, precise.picker_port).await?),
        None => None,
    };
    let load = RequestLoad::new();
    let mut writer = TextWriter::new(model, 11)?;
    for tokens in &options.tokens {
        let mut pairs = vec![(
            "proxy",
            FrontEnd::new("fixed target", &fixed.http, &fixed.process),
            FrontEnd::new("precise", &precise.http, &precise.process),
        )];
        if let Some(envoy) = &envoy {
            // The picker's own CPU time is what it adds; Envoy's is the second row of each.
            pairs.push((
                "Envoy",
                FrontEnd::new("fixed target", &envoy.fixed, &envoy.process),
                FrontEnd::new("picker", &envoy.picked, &precise.process),
            ));
        }
        let beginning = writer.text(tokens - TURN);
        for (front, plain, routed) in &mut pairs {
            // The beginning is new to the router once.
            load.send(&routed.url, turns(&mut writer, &beginning, 1), 1).await?;
            for _ in 0..options.repetitions {
                bar.set_message(format!("{tokens} tokens, {front}"));
                let count = fewer(options.requests, *tokens);
                let bodies = turns(&mut writer, &beginning, 2 * count);
                let (alone, together) = bodies.split_at(count);
                plain.run(&load, alone.to_vec(), together.to_vec()).await?;
                routed.run(&load, alone.to_vec(), together.to_vec()).await?;
                bar.inc(1);
            }
        }
        for (front, plain, routed) in pairs {
            show(*tokens, front, plain, routed, found);
        }
    }
    Ok(())
}

/// Next turns of one conversation.
fn turns(writer: &mut TextWriter, beginning: &str, count: usize) -> Vec<Bytes> {
    let body = |_| {
        let text = format!("{beginning}{}", writer.text(TURN));
        Bytes::from(serde_json::json!({"model": "m", "max_tokens": 1, "prompt": text}).to_string())
    };
    (0..count).map(body).collect()
}

fn show(tokens: usize, front: &str, plain: FrontEnd<'_>, routed: FrontEnd<'_>, found: &mut RouteFindings) {
    let added: Vec<f64> = routed.p99_ms.iter().zip(&plain.p99_ms).map(|(a, b)| a - b).collect();
    let share: Vec<f64> = routed.cpu_ms.iter().zip(&plain.cpu_ms).map(|(a, b)| b / a.max(1e-9)).collect();
    for contender in [plain, routed] {
        let label = format!("{front}, {tokens} tokens, {}", contender.name);
        let rates = contender.cpu_ms.iter().map(|cpu| 1e3 / cpu.max(1e-3)).collect();
        found.put(&format!("{label}, p50"), "ms", contender.p50_ms);
        found.put(&format!("{label}, p99"), "ms", contender.p99_ms);
        found.put(&format!("{label}, CPU"), "ms", contender.cpu_ms);
        found.put(&format!("{label}, rate"), "requests/s/core", rates);
    }
    let value = found.put(&format!("{front}, {tokens} tokens, p99 added"), "ms", added);
    if front == "proxy" {
        found.put(&format!("{front}, {tokens} tokens, rate over fixed target's"), "ratio", share);
    }
    if tokens == 1000 {
        found.goal(format!("p99 that routing adds, {front}, {tokens} tokens, in ms"), GoalBound::Below(1.0), value);
    }
}
