//! A request that was decided on, from its booking to its end.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;

use super::answer::Usage;
use super::booking::{Booking, Verdict};
use super::books::Promise;
use super::engine::Engine;
use super::estimate;
use super::expectations::Expectations;
use super::gate::Gate;
use super::metrics::Metrics;
use super::outcome::Outcome;
use super::peers::news::News;
use super::prefix::{self, Found};
use super::prefix_source::PrefixSource;
use super::prompt::Prompt;
use super::see::{ChoiceReason, Decision, Ring};
use super::source::{HintsFor, KvSource, SOURCE};
use super::traces::Trace;
use super::two_steps;

/// Whom a ticket tells what becomes of its request.
#[derive(Debug)]
pub struct TicketOffice {
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Shows decisions.
    pub ring: Arc<Ring>,
    /// Lets others through when an engine has room again.
    pub gate: Option<Arc<Gate>>,
    /// Requests that have not ended.
    pub in_flight: AtomicU64,
    /// Hears which blocks an engine will have.
    pub expectations: Option<Expectations>,
    /// Who is told who else holds a prompt.
    pub hints_for: HintsFor,
}

impl TicketOffice {
    fn wake(&self) {
        self.gate.iter().for_each(|gate| gate.wake());
    }
}

/// A request that was decided on. Dropped without an end it counts as aborted; what it booked is
/// given back in any case.
#[derive(Debug)]
pub struct Ticket {
    pub(super) office: Arc<TicketOffice>,
    pub(super) order: Vec<(Arc<Engine>, Found)>,
    pub(super) at: usize,
    pub(super) booking: Option<Booking>,
    /// The first step, at the engine that computes the prompt.
    pub(super) prefill: Option<Booking>,
    /// Who else holds its prompt.
    pub(super) source: Option<KvSource>,
    pub(super) prompt: Prompt,
    /// Its answer comes in parts.
    pub(super) streams: bool,
    /// Age of the prompt's first block on the engine, as guessed.
    pub(super) age: u64,
    pub(super) decision: Decision,
    pub(super) decided: Instant,
    pub(super) first_byte: OnceLock<Instant>,
    /// When its first token was wanted.
    pub(super) due: Option<Instant>,
    pub(super) trace: Option<Trace>,
}

impl Ticket {
    /// The engine it goes to.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.order[self.at].0
    }

    /// Engines to try if that one fails, best first.
    pub fn fallbacks(&self) -> impl Iterator<Item = &Arc<Engine>> {
        self.order[self.at + 1..].iter().map(|(engine, _)| engine)
    }

    /// The data-parallel rank that has the prefix, where the engine has several.
    pub fn rank(&self) -> Option<u32> {
        self.order[self.at].1.rank
    }

    /// Headers that go with the request, so that the engine's trace is a part of its own.
    pub fn trace_headers(&self) -> impl Iterator<Item = (&str, &str)> {
        let headers = self.trace.iter().flat_map(Trace::headers);
        headers.map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The engine that is to compute its prompt before the other one goes on with it.
    pub fn prefill(&self) -> Option<&Arc<Engine>> {
        self.prefill.as_ref().map(Booking::engine)
    }

    /// Who else holds its prompt; never the engine that it goes to.
    pub fn source(&self) -> Option<&KvSource> {
        self.source.as_ref().filter(|source| source.engine.spec.name != self.decision.engine)
    }

    /// What its engine is told in a header of who else holds its prompt.
    pub fn source_header(&self) -> Option<(&'static str, &str)> {
        let is_told = self.office.hints_for == HintsFor::Sidecar;
        let source = self.source().filter(|_| is_told)?;
        Some((SOURCE, source.engine.spec.authority()))
    }

    /// The body that its engine gets, from what the client sent: with who else holds its prompt, if
    /// engines read that there.
    pub fn body(&self, body: Bytes) -> Bytes {
        if self.office.hints_for != HintsFor::Engine {
            return body;
        }
        let told = self.source().and_then(|source| {
            let id = format!("kvcellar-{:016x}", fastrand::u64(..));
            two_steps::with_transfer(&body, &source.transfer_params(&id))
        });
        told.map_or(body, Bytes::from)
    }

    /// The first step is over. `handed_over`: the engine that goes on need not compute the prompt;
    /// `verdict`: on the engine that was to compute it.
    pub fn prefilled(&mut self, handed_over: bool, verdict: Verdict) {
        let Some(prefill) = self.prefill.take() else { return };
        prefill.engine().tally.prefilled(handed_over);
        prefill.judged(verdict);
        if handed_over {
            prefill.answered();
        } else {
            self.decision.prefill = None;
        }
        drop(prefill);
        // From now on: the time before was the other engine's.
        self.booking = None;
        self.promise();
        self.office.wake();
    }

    /// Whoever goes on has to compute the prompt after all.
    pub fn forget_prefill(&mut self) {
        self.decision.prefill = None;
    }

    /// The decision, as it is shown.
    pub fn decision(&self) -> &Decision {
        &self.decision
    }

    /// Books it at its engine, and takes the engine to hold the prompt from now on.
    pub(super) fn promise(&mut self) {
        let (engine, found) = &self.order[self.at];
        // What another engine computes is not computed here.
        let held = if self.decision.prefill.is_some() { self.prompt.tokens } else { found.held.tokens };
        let promise = Promise { tokens: self.prompt.tokens, held, streams: self.streams };
        self.booking = Some(Booking::new(Arc::clone(engine), promise));
        if !self.prompt.hashes.is_empty() {
            self.age = engine.recent().give(&self.prompt.hashes);
            engine.tell(|name| News::Given { engine: Arc::clone(name), hashes: self.prompt.hashes.clone() });
        }
        let Some(expectations) = &self.office.expectations else { return };
        let stream = found.stream.or_else(|| prefix::stream_of(expectations.index(), engine, found.rank));
        if let Some(stream) = stream.filter(|_| !self.prompt.keys.is_empty())
            && !expectations.expect(stream, self.prompt.keys.clone())
        {
            self.office.metrics.dropped();
        }
    }

    /// Its engine could not be reached, or broke off before its first byte: moves on. `false`:
    /// nobody is left, and it stays where it failed.
    pub fn move_on(&mut self) -> bool {
        let may = |engine: &Engine| engine.is_usable() && engine.is_trusted();
        let Some(at) = (self.at + 1..self.order.len()).find(|at| may(&self.order[*at].0)) else { return false };
        self.move_to(at);
        true
    }

    /// Another engine has it now.
    fn move_to(&mut self, at: usize) {
        self.engine().tally.retried();
        self.office.metrics.retried();
        self.booking = None;
        self.at = at;
        let (engine, found) = &self.order[at];
        self.decision.engine.clone_from(&engine.spec.name);
        self.decision.predicted_cached = found.held.tokens;
        self.decision.why = ChoiceReason::Fallback;
        self.decision.source = self.source().map(|source| source.engine.spec.name.clone());
        self.promise();
    }

    /// The first byte of the answer's body has come. Said once or often.
    pub fn answered(&self) {
        if self.first_byte.set(Instant::now()).is_ok() {
            self.office.metrics.answered(self.decided.elapsed());
            self.booking.iter().for_each(Booking::answered);
            self.prefill.iter().for_each(Booking::is_over);
            self.office.wake();
        }
    }

    /// By how much the answer comes later than it was wanted.
    pub fn late_by(&self) -> Option<Duration> {
        self.due.map(|due| Instant::now().saturating_duration_since(due)).filter(|late| !late.is_zero())
    }

    /// The gateway says where it went, which may be a fallback.
    pub fn served_by(&mut self, endpoint: &str) {
        let at = self.order.iter().position(|(engine, _)| engine.is_at(endpoint));
        if let Some(at) = at.filter(|at| *at != self.at) {
            self.move_to(at);
        }
    }

    /// What its engine's answer, or the lack of it, says of the engine. Said once or often.
    pub fn judge(&self, verdict: Verdict) {
        self.booking.iter().for_each(|booking| booking.judged(verdict));
    }

    /// It has ended.
    pub fn end(mut self, outcome: Outcome, usage: Option<Usage>) {
        self.decision.outcome = outcome;
        if matches!(outcome, Outcome::Failed | Outcome::Timeout | Outcome::Broken) {
            self.judge(Verdict::Ill);
        }
        if let Some(prefill) = self.prefill.take() {
            // A sidecar has sent it; only the answer tells of it.
            let well = matches!(outcome, Outcome::Done);
            prefill.engine().tally.prefilled(well);
        }
        let Some(usage) = usage else { return };
        self.decision.reported_prompt = Some(usage.prompt);
        self.decision.reported_cached = usage.cached;
        if self.decision.prefill.is_some() || self.decision.source.is_some() {
            // What came from the other engine counts as cached.
            return;
        }
        let predicted = self.decision.predicted_cached;
        self.office.metrics.reported(
            self.decision.prefix_from,
            self.prompt.is_exact,
            self.prompt.tokens,
            predicted,
            usage,
        );
        if let (Some(cached), PrefixSource::Guess) = (usage.cached, self.decision.prefix_from) {
            let blocks = |tokens: u32| tokens as usize / estimate::BLOCK_TOKENS;
            // The estimate of tokens is off by some; a third less is an eviction, and half as much
            // again is from a tier that the guess does not know.
            let expected = blocks(predicted);
            let differs = cached * 3 < predicted * 2 || cached * 2 > predicted * 3;
            let found = if differs { blocks(cached) } else { expected };
            self.engine().recent().learn(expected, found, self.age);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.decision.outcome == Outcome::Open {
            self.decision.outcome = Outcome::Aborted;
        }
        self.office.in_flight.fetch_sub(1, Ordering::Relaxed);
        (self.booking, self.prefill) = (None, None);
        self.office.wake();
        self.engine().tally.ended(self.decision.outcome);
        self.office.metrics.ended(self.decision.outcome);
        if let Some(trace) = &mut self.trace {
            let first = self.first_byte.get().map(|at| SystemTime::now() - at.elapsed());
            trace.end(&self.decision, first);
        }
        self.office.ring.push(self.decision.clone());
    }
}
