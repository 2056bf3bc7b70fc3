//! The simulated world: requests arrive, the router's own code decides, engines step, their events
//! reach the index, scrapes tell of them, routers tell each other what they did.

use std::collections::{HashMap, VecDeque};

use super::cache::Change;
use super::engine::{Job, Model, SimEngine, Step};
use super::load::{self, BLOCK, ClosedLoop, Maker, Session};
use super::outcome::{Outcome, Served};
use super::processor::Processor;
use super::request::{SimRequest, hashes_of, keys_of};
use super::schedule::Schedule;
use super::sim_router::{Promised, SimPrompt, SimRouter};
use super::{Plan, Way};
use crate::hall::{Entered, Sentence};
use crate::limits;
use crate::peers::follower::Follower;
use crate::peers::news::PeerNews;
use crate::queue::{QueuePlace, WaitingRequest};
use kvcellar_block::error::Result;

/// How long an engine's events take to the index, and news to another router; between two scrapes
/// on average; between two looks for what did not come, and at who waits. In s, as in a router.
const EVENTS_S: f64 = 0.02;
const NEWS_S: f64 = 0.001;
const SCRAPE_S: f64 = 0.5;
const EXPIRE_S: f64 = 0.05;

/// Priorities of requests.
const URGENT: i32 = 1;

/// How long a request waits in a router, in s, as in a router.
const PATIENCE_S: f64 = 60.0;

/// Engines that a request may try, as in a router.
const TRIES: usize = 3;

#[derive(Debug)]
enum Happening {
    Arrival,
    Turn(Session),
    /// A step of an engine's so many-th life ends.
    Stepped(usize, u64, Step),
    /// A step of some engine ends, if this is the processor's last word.
    Processed(u64),
    Events(usize, Vec<Change>),
    /// A router scrapes an engine.
    Scrape(usize, usize),
    /// Routers drop what was expected and did not come.
    Expire,
    /// A router asks another one for its news.
    Ask(usize, usize),
    /// They arrive.
    News(usize, usize, PeerNews),
    /// An engine goes.
    Leave(usize),
    /// It comes back.
    Return(usize),
}

/// One engine of the world.
#[derive(Debug)]
struct Seat {
    engine: SimEngine,
    life: u64,
    is_away: bool,
}

pub(super) struct World {
    plan: Plan,
    way: Way,
    schedule: Schedule<Happening>,
    seats: Vec<Seat>,
    processor: Option<Processor>,
    routers: Vec<SimRouter>,
    /// Each router's followers of all others.
    followers: Vec<Vec<Follower>>,
    maker: Maker,
    traffic: fastrand::Rng,
    /// Everything else that is left to chance.
    chance: fastrand::Rng,
    open: Vec<SimRequest>,
    /// Prompts that an engine computes for another one, as they are booked there.
    steps: HashMap<(usize, usize), Promised>,
    /// Requests that wait in a router.
    waiting: HashMap<(usize, QueuePlace), usize>,
    /// Conversations that are between two turns, where all are there from the start; and those of
    /// the last requests, which let others go first.
    resting: Vec<(usize, Session)>,
    recent: VecDeque<usize>,
    /// Conversations of requests under way, by the request.
    talks: HashMap<usize, usize>,
}

impl World {
    pub(super) fn new(plan: Plan, way: Way) -> Result<Self> {
        let count = plan.scene.routers.max(1);
        let model = Model::of(plan.load);
        let seat = |_| Seat { engine: SimEngine::new(model), life: 0, is_away: false };
        Ok(Self {
            plan,
            way,
            schedule: Schedule::new(),
            seats: (0..plan.engines).map(seat).collect(),
            processor: plan.scene.processor.map(Processor::new),
            routers: (0..count as u64).map(|number| SimRouter::new(&plan, way, number)).collect::<Result<_>>()?,
            followers: (0..count).map(|_| (0..count).map(|_| Follower::default()).collect()).collect(),
            maker: Maker::new(plan.load, plan.engines),
            traffic: fastrand::Rng::with_seed(plan.seed),
            chance: fastrand::Rng::with_seed(plan.seed ^ 0x000c_4a9c_e000),
            open: Vec::new(),
            steps: HashMap::new(),
            waiting: HashMap::new(),
            resting: Vec::new(),
            recent: VecDeque::new(),
            talks: HashMap::new(),
        })
    }

    pub(super) fn run(mut self) -> Outcome {
        let end_s = self.plan.warm_s + self.plan.seconds;
        let mut work_before = Vec::new();
        self.begin();
        while let Some(what) = self.schedule.next() {
            let now_s = self.schedule.now_s();
            let is_over = self.plan.load.closed().is_some() && self.resting.is_empty() && self.talks.is_empty();
            if now_s > end_s || is_over {
                break;
            }
            if work_before.is_empty() && now_s >= self.plan.warm_s {
                work_before = self.seats.iter().map(|seat| seat.engine.work_s).collect();
            }
            self.happen(what);
        }
        self.outcome(&work_before, end_s)
    }

    fn begin(&mut self) {
        match self.plan.load.closed() {
            None => self.schedule.after(0.0, Happening::Arrival),
            Some(ClosedLoop { sessions, in_flight }) => {
                for talk in 0..sessions {
                    let session = self.maker.begin(&mut self.traffic);
                    self.resting.push((talk, session));
                }
                (0..in_flight).for_each(|_| self.next_talk());
            }
        }
        for router in 0..self.routers.len() {
            for at in 0..self.seats.len() {
                self.schedule.after(self.chance.f64() * SCRAPE_S, Happening::Scrape(router, at));
            }
            for other in (0..self.routers.len()).filter(|other| *other != router && self.plan.scene.shares) {
                let after_s = self.chance.f64() * limits::PEER_POLL.as_secs_f64();
                self.schedule.after(after_s, Happening::Ask(router, other));
            }
        }
        self.schedule.after(EXPIRE_S, Happening::Expire);
        if let Some(churn) = self.plan.scene.churn {
            self.schedule.after(churn.every_s, Happening::Leave(0));
        }
    }

    fn happen(&mut self, what: Happening) {
        let now_s = self.schedule.now_s();
        match what {
            Happening::Arrival => {
                let rate = self.plan.load.shape().rate * self.plan.rate * self.plan.engines as f64;
                let next_s = load::pause(&mut self.traffic, 1.0 / rate);
                self.schedule.after(next_s, Happening::Arrival);
                let session = self.maker.begin(&mut self.traffic);
                self.ask(session);
            }
            Happening::Turn(mut session) => {
                self.maker.go_on(&mut session);
                self.ask(session);
            }
            Happening::Stepped(at, life, step) => {
                if self.seats[at].life == life {
                    self.stepped(at, step);
                }
            }
            Happening::Processed(round) => {
                let Some(processor) = &mut self.processor else { return };
                let (over, next) = processor.look(now_s, round);
                if let Some((after_s, round)) = next {
                    self.schedule.after(after_s, Happening::Processed(round));
                }
                for (at, step) in over {
                    self.stepped(at, step);
                }
            }
            Happening::Events(at, changes) => self.routers.iter_mut().for_each(|router| router.events(at, &changes)),
            Happening::Scrape(router, at) => {
                let told = (!self.seats[at].is_away).then(|| self.seats[at].engine.told());
                self.routers[router].scraped(at, told);
                let jitter = 0.8 + 0.4 * self.chance.f64();
                self.schedule.after(SCRAPE_S * jitter, Happening::Scrape(router, at));
            }
            Happening::Expire => {
                for router in 0..self.routers.len() {
                    self.routers[router].expire(now_s);
                    self.admit(router);
                }
                self.schedule.after(EXPIRE_S, Happening::Expire);
            }
            Happening::Ask(router, other) => {
                if let Some(told) = self.routers[other].tells(now_s, &self.followers[router][other]) {
                    self.schedule.after(NEWS_S, Happening::News(router, other, told));
                }
            }
            Happening::News(router, other, told) => {
                if let Ok(heard) = self.followers[router][other].hear(now_s, &[], told) {
                    self.routers[router].hears(now_s, heard.instance, &heard.news);
                }
                self.schedule.after(limits::PEER_POLL.as_secs_f64(), Happening::Ask(router, other));
            }
            Happening::Leave(at) => self.leave(at),
            Happening::Return(at) => {
                self.seats[at].is_away = false;
                self.routers.iter_mut().for_each(|router| router.restarted(at));
            }
        }
    }

    /// A request comes.
    fn ask(&mut self, session: Session) -> usize {
        let now_s = self.schedule.now_s();
        let router = self.chance.usize(..self.routers.len());
        let flow = self.plan.scene.priorities;
        // Of the session, so that it is the same however requests are routed.
        let is_urgent = flow.is_some_and(|flow| session.random.clone().f64() < flow.urgent);
        let priority = if is_urgent { URGENT } else { 0 };
        let request = self.open.len();
        self.open.push(SimRequest::new(router, session, priority, now_s));
        let Some(mut hall) = self.routers[router].hall.take() else {
            self.route(request);
            return request;
        };
        let new = WaitingRequest {
            lane: String::new(),
            priority,
            flow: String::new(),
            came_s: now_s,
            deadline_s: now_s + PATIENCE_S,
            bytes: 0,
        };
        let entered = hall.enter(new, || self.routers[router].room(now_s));
        self.routers[router].hall = Some(hall);
        match entered {
            Entered::Through => self.pass(request),
            Entered::Waits(place, gone) => {
                self.waiting.insert((router, place), request);
                for place in gone {
                    self.waiting.remove(&(router, place));
                }
            }
            Entered::Full => {}
        }
        request
    }

    /// One that was let through is routed and booked.
    fn pass(&mut self, request: usize) {
        let router = self.open[request].router;
        self.route(request);
        self.routers[router].hall.iter_mut().for_each(|hall| hall.passed(""));
    }

    /// Lets those through who wait at a router, as there is room.
    fn admit(&mut self, router: usize) {
        let now_s = self.schedule.now_s();
        while let Some(mut hall) = self.routers[router].hall.take() {
            let mut next = None;
            // One at a time: each takes room.
            let one = |place, told| {
                if told == Sentence::Go {
                    next = Some(place);
                } else {
                    self.waiting.remove(&(router, place));
                }
                true
            };
            hall.settle(now_s, 1, |_| self.routers[router].room(now_s), one);
            self.routers[router].hall = Some(hall);
            let Some(request) = next.and_then(|place| self.waiting.remove(&(router, place))) else { return };
            self.pass(request);
        }
    }

    /// The decision, as the router makes it.
    fn route(&mut self, request: usize) {
        let now_s = self.schedule.now_s();
        let open = &mut self.open[request];
        let Some(session) = &open.session else { return };
        let hashes = hashes_of(session.prompt.iter());
        let keys = if self.way.asks_index() { keys_of(&session.prompt) } else { Vec::new() };
        let asked = SimPrompt { hashes, keys, tokens: open.tokens };
        let router = &mut self.routers[open.router];
        let Some(routed) = router.decide(now_s, &asked) else {
            self.lose(request);
            return;
        };
        let (at, held) = routed.order[0];
        open.expected = (held.tokens / BLOCK) as usize;
        match routed.prefill {
            None => {
                (open.asked, open.routed) = (Some(asked), Some(routed));
                self.send(request);
            }
            Some((prefill, held)) => {
                // The engine that goes on need compute nothing.
                open.promised = Some(router.promise(now_s, at, asked.tokens, &asked));
                let first = router.promise(now_s, prefill, held.tokens, &asked);
                let prompt = session.prompt.len();
                let job = Job::new(request, asked.hashes.clone(), session.prompt.clone(), prompt, 1);
                (open.asked, open.routed) = (Some(asked), Some(routed));
                self.steps.insert((prefill, request), first);
                self.push(prefill, job);
            }
        }
    }

    /// Sends a request to the engine that it is at, or to the next one that takes it.
    fn send(&mut self, request: usize) {
        let now_s = self.schedule.now_s();
        loop {
            let open = &mut self.open[request];
            let (Some(routed), Some(asked), Some(session)) = (&open.routed, &open.asked, &open.session) else { return };
            let (at, held) = routed.order[open.place];
            let is_handed_over = routed.prefill.is_some();
            let router = &mut self.routers[open.router];
            let promised = router.promise(now_s, at, if is_handed_over { asked.tokens } else { held.tokens }, asked);
            open.promised = Some(promised);
            open.tries += 1;
            if !self.seats[at].is_away {
                let contents: Vec<u32> = session.prompt.iter().chain(&session.said).copied().collect();
                let hashes = hashes_of(contents.iter());
                let job = Job::new(request, hashes, contents, session.prompt.len(), open.answer);
                let job = if is_handed_over { job.handed_over() } else { job };
                if self.plan.scene.churn.is_none() {
                    // Nothing will be asked of it again.
                    open.asked = None;
                }
                self.push(at, job);
                return;
            }
            router.refused(now_s, at, promised);
            let next = router.next_of(now_s, &routed.order, open.place).filter(|_| open.tries < TRIES);
            let Some(place) = next else { break };
            open.place = place;
        }
        self.lose(request);
    }

    /// A request will not be answered.
    fn lose(&mut self, request: usize) {
        let open = &mut self.open[request];
        open.is_lost = true;
        open.session = None;
        open.settle();
    }

    fn push(&mut self, at: usize, job: Job) {
        self.seats[at].engine.push(job);
        if !self.seats[at].engine.is_stepping {
            self.step(at);
        }
    }

    /// An engine begins a step, if it has anything to do.
    fn step(&mut self, at: usize) {
        let Seat { engine, life, .. } = &mut self.seats[at];
        engine.is_stepping = !engine.is_idle();
        if !engine.is_stepping {
            return;
        }
        let step = engine.step();
        match &mut self.processor {
            None => self.schedule.after(step.seconds, Happening::Stepped(at, *life, step)),
            Some(processor) => {
                let (after_s, round) = processor.begin(self.schedule.now_s(), at, step);
                self.schedule.after(after_s, Happening::Processed(round));
            }
        }
    }

    /// A step has ended: tokens come out.
    fn stepped(&mut self, at: usize, mut step: Step) {
        let now_s = self.schedule.now_s();
        let changes = std::mem::take(&mut step.changes);
        if !changes.is_empty() && self.way.asks_index() {
            self.schedule.after(EVENTS_S, Happening::Events(at, changes));
        }
        let mut of_routers = vec![false; self.routers.len()];
        let mut handed_over = Vec::new();
        for (request, cached) in step.first_tokens {
            let open = &mut self.open[request];
            let router = &mut self.routers[open.router];
            of_routers[open.router] = true;
            if let Some(first) = self.steps.remove(&(at, request)) {
                router.answered(now_s, at, first.number);
                router.ended(now_s, at, first.number);
                open.cached = cached;
                handed_over.push(request);
                continue;
            }
            open.first_s = Some(now_s);
            if open.routed.as_ref().is_some_and(|routed| routed.prefill.is_none()) {
                open.cached = cached;
            }
            open.promised.iter().for_each(|promised| router.answered(now_s, at, promised.number));
        }
        for request in step.done.into_iter().filter(|request| !handed_over.contains(request)) {
            self.done(at, request);
            of_routers[self.open[request].router] = true;
        }
        for request in handed_over {
            // From now on: the time before was the other engine's.
            let open = &mut self.open[request];
            if let (Some(promised), Some(at)) = (open.promised.take(), open.engine()) {
                self.routers[open.router].ended(now_s, at, promised.number);
            }
            self.send(request);
        }
        for router in (0..of_routers.len()).filter(|router| of_routers[*router]) {
            self.admit(router);
        }
        self.step(at);
    }

    /// A request was answered to its end.
    fn done(&mut self, at: usize, request: usize) {
        let now_s = self.schedule.now_s();
        let open = &mut self.open[request];
        open.done_s = Some(now_s);
        if let Some(promised) = open.promised.take() {
            let router = &mut self.routers[open.router];
            router.ended(now_s, at, promised.number);
            router.reported(at, open.expected, (open.cached / BLOCK) as usize, promised.age);
        }
        open.settle();
        let session = open.session.take().filter(|session| session.left > 0);
        if let Some(talk) = self.talks.remove(&request) {
            self.resting.extend(session.map(|mut session| {
                self.maker.go_on(&mut session);
                (talk, session)
            }));
            self.next_talk();
        } else if let Some(mut session) = session {
            let pause_s = load::pause(&mut session.random, self.plan.load.shape().pause_s);
            self.schedule.after(pause_s, Happening::Turn(session));
        }
    }

    /// One of the conversations that rest goes on: any, but those of the last requests.
    fn next_talk(&mut self) {
        let is_free = |(talk, _): &(usize, Session)| !self.recent.contains(talk);
        let mut free: Vec<usize> = (0..self.resting.len()).filter(|at| is_free(&self.resting[*at])).collect();
        if free.is_empty() {
            free = (0..self.resting.len()).collect();
        }
        let turns = |at: &usize| self.resting[*at].1.left + 1;
        let all: u32 = free.iter().map(turns).sum();
        if all == 0 {
            return;
        }
        let mut left = self.traffic.u32(..all);
        let chosen = free.into_iter().find(|at| {
            let is_it = left < turns(at);
            left = left.saturating_sub(turns(at));
            is_it
        });
        let Some(chosen) = chosen else { return };
        let (talk, session) = self.resting.swap_remove(chosen);
        self.recent.push_back(talk);
        let most = self.plan.load.closed().map_or(0, |closed| closed.in_flight);
        while self.recent.len() > most {
            self.recent.pop_front();
        }
        let request = self.ask(session);
        self.talks.insert(request, talk);
    }

    /// An engine goes, with all it has: who has no first token yet may be sent to another one.
    fn leave(&mut self, at: usize) {
        let Some(churn) = self.plan.scene.churn else { return };
        let now_s = self.schedule.now_s();
        let seat = &mut self.seats[at];
        seat.life += 1;
        seat.is_away = true;
        for request in seat.engine.lose() {
            let open = &mut self.open[request];
            let router = &mut self.routers[open.router];
            if let Some(promised) = self.steps.remove(&(at, request)).or_else(|| open.promised.take()) {
                router.failed(now_s, at, promised);
            }
            let may = open.first_s.is_none() && !open.is_repeated && open.tries < TRIES;
            let next = open.routed.as_ref().and_then(|routed| router.next_of(now_s, &routed.order, open.place));
            match next {
                Some(place) if may && router.retries.spend() => {
                    (open.place, open.is_repeated) = (place, true);
                    self.send(request);
                }
                _ => self.lose(request),
            }
        }
        self.schedule.after(churn.away_s, Happening::Return(at));
        self.schedule.after(churn.every_s, Happening::Leave((at + 1) % self.seats.len()));
    }

    fn outcome(&self, work_before: &[f64], end_s: f64) -> Outcome {
        let warm_s = self.plan.warm_s;
        let counted = || self.open.iter().filter(|open| open.began_s >= warm_s);
        let measured = self.plan.scene.priorities.map(|_| URGENT);
        let counts = |open: &&SimRequest| measured.is_none_or(|priority| open.priority == priority);
        let is_gone = |open: &SimRequest| open.is_lost && open.first_s.is_none();
        let served: Vec<Served> =
            counted().filter(counts).filter(|open| !is_gone(open)).map(|open| open.served(end_s)).collect();
        let work = self.seats.iter().zip(work_before).map(|(seat, before)| seat.engine.work_s - before);
        let outcome = Outcome::of(&served, &work.collect::<Vec<f64>>(), self.plan.seconds);
        let is_lower = |open: &&SimRequest| measured.is_some_and(|priority| open.priority < priority);
        let is_done = |open: &&SimRequest| open.done_s.is_some_and(|done_s| done_s >= warm_s);
        Outcome {
            lost: counted().filter(|open| open.is_lost).count(),
            lower: self.open.iter().filter(is_lower).filter(is_done).count(),
            ..outcome
        }
    }
}
