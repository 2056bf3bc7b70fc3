//! Flow control: requests go on as engines have room for them, and wait in a
//! [`RequestQueue`](super::queue::RequestQueue) until then.
//!
//! Without it every request goes to an engine at once, whose own queue knows neither priorities nor
//! deadlines nor whose a request is. So as little as possible is kept waiting there: an engine has
//! room while what it has yet to compute takes less than a moment, and while it has fewer requests
//! than it may have. Lower priorities leave something free for the highest one that was seen
//! lately: one engine that has nothing to compute where there are several, and some places.
//!
//! Promises: a request waits no longer than its deadline, and is told when it has to go; whoever
//! leaves gives its place back; a request for which there is room does not wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use super::engine::Engine;
use super::engines::{Engines, trusted};
use super::hall::{EngineRoom, Entered, Hall, HallSettings, Sentence};
use super::queue::{QueueBounds, QueuePlace, WaitingRequest};
use super::request::Refusal;
use super::spec::EngineRole;
use super::urgency::Urgency;

/// How flow control is set up.
#[derive(Debug, Clone, Copy)]
pub struct GateSettings {
    /// What may wait.
    pub bounds: QueueBounds,
    /// How long a request waits that names no shorter time.
    pub patience: Duration,
    /// An engine has room while the prompts it was given take less than this.
    pub backlog: Duration,
    /// Requests of an engine at most; 0: no bound.
    pub concurrency: usize,
    /// Time after which a request gets every eighth turn, whatever its priority.
    pub starved: Duration,
}

/// How often engines are looked at while requests wait and nothing ends: what they say of
/// themselves changes with each scrape.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The hall, and who is to be told what becomes of those in it.
#[derive(Debug)]
struct Waiting {
    hall: Hall,
    answers: HashMap<QueuePlace, oneshot::Sender<Sentence>>,
}

impl Waiting {
    /// `false`: it has left.
    fn tell(answers: &mut HashMap<QueuePlace, oneshot::Sender<Sentence>>, place: QueuePlace, told: Sentence) -> bool {
        answers.remove(&place).is_some_and(|answer| answer.send(told).is_ok())
    }
}

/// The gate.
#[derive(Debug)]
pub struct Gate {
    patience: Duration,
    settings: HallSettings,
    engines: Arc<Engines>,
    waiting: Mutex<Waiting>,
    wake: Notify,
    opened: Instant,
}

/// A request that was let through. Kept until the request is booked at an engine.
#[derive(Debug)]
pub struct Pass<'g> {
    gate: &'g Gate,
    lane: String,
    /// How long it waited.
    pub waited: Duration,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.lock().hall.passed(&self.lane);
        self.gate.wake();
    }
}

/// A request in the queue. Dropped, it leaves.
struct Stay<'g> {
    gate: &'g Gate,
    place: QueuePlace,
    lane: String,
    came: Instant,
    told: oneshot::Receiver<Sentence>,
    is_over: bool,
}

impl<'g> Stay<'g> {
    async fn wait(mut self, patience: Duration) -> Result<Pass<'g>, Refusal> {
        let told = (&mut self.told).await;
        self.is_over = true;
        let waited = self.came.elapsed();
        match told {
            Ok(Sentence::Go) => Ok(Pass { gate: self.gate, lane: std::mem::take(&mut self.lane), waited }),
            Ok(Sentence::Late) => Err(Refusal::Late(patience.as_millis())),
            Ok(Sentence::Displaced) | Err(_) => Err(Refusal::Displaced),
        }
    }
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let mut waiting = self.gate.lock();
        waiting.answers.remove(&self.place);
        let was_waiting = waiting.hall.queue.remove(self.place).is_some();
        drop(waiting);
        if !was_waiting && matches!(self.told.try_recv(), Ok(Sentence::Go)) {
            // It left at the very moment at which it was let through.
            drop(Pass { gate: self.gate, lane: std::mem::take(&mut self.lane), waited: Duration::ZERO });
        }
    }
}

impl Gate {
    /// An open gate in front of these engines. To be kept by [`Self::keep`].
    pub fn new(settings: GateSettings, engines: Arc<Engines>) -> Self {
        let GateSettings { bounds, patience, backlog, concurrency, starved } = settings;
        let (backlog_s, starved_s) = (backlog.as_secs_f64(), starved.as_secs_f64());
        let settings = HallSettings { bounds, backlog_s, concurrency, starved_s };
        let waiting = Waiting { hall: Hall::new(settings), answers: HashMap::new() };
        Self { patience, settings, engines, waiting: Mutex::new(waiting), wake: Notify::new(), opened: Instant::now() }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_s(&self) -> f64 {
        self.opened.elapsed().as_secs_f64()
    }

    /// Requests that wait, by priority, and bytes of their bodies.
    pub fn waiting(&self) -> (Vec<(i32, usize)>, usize) {
        let hall = &self.lock().hall;
        (hall.queue.by_priority().into_iter().collect(), hall.queue.bytes())
    }

    /// Something has ended or begun: there may be room.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Lets a request through as soon as there is room for it. `lane`: a model of the engines that
    /// may take it; empty: they have not said.
    ///
    /// # Errors
    /// [`Refusal::QueueFull`], [`Refusal::Displaced`], [`Refusal::Late`].
    pub async fn enter(&self, lane: &str, urgency: &Urgency, bytes: usize) -> Result<Pass<'_>, Refusal> {
        let lane = lane.to_owned();
        let came = Instant::now();
        let patience = urgency.ttft.map_or(self.patience, |ttft| ttft.min(self.patience));
        let now_s = self.now_s();
        let new = WaitingRequest {
            lane: lane.clone(),
            priority: urgency.priority,
            flow: urgency.id.clone(),
            came_s: now_s,
            deadline_s: now_s + patience.as_secs_f64(),
            bytes,
        };
        let stay = {
            let Waiting { hall, answers } = &mut *self.lock();
            match hall.enter(new, || self.room(&lane)) {
                Entered::Through => return Ok(Pass { gate: self, lane, waited: Duration::ZERO }),
                Entered::Full => return Err(Refusal::QueueFull),
                Entered::Waits(place, gone) => {
                    for place in gone {
                        Waiting::tell(answers, place, Sentence::Displaced);
                    }
                    let (answer, told) = oneshot::channel();
                    answers.insert(place, answer);
                    Stay { gate: self, place, lane, came, told, is_over: false }
                }
            }
        };
        self.wake();
        stay.wait(patience).await
    }

    /// Lets requests through as there is room, for ever.
    pub async fn keep(&self) {
        loop {
            let pause = {
                let mut waiting = self.lock();
                self.settle(&mut waiting);
                let until = waiting
                    .hall
                    .queue
                    .next_deadline_s()
                    .map(|at_s| Duration::from_secs_f64((at_s - self.now_s()).max(0.0)));
                until.map(|until| until.min(LOOK_EVERY))
            };
            match pause {
                None => self.wake.notified().await,
                // Whether it was woken or not, it looks.
                Some(pause) => drop(tokio::time::timeout(pause, self.wake.notified()).await),
            }
        }
    }

    fn settle(&self, waiting: &mut Waiting) {
        let Waiting { hall, answers } = waiting;
        hall.settle(
            self.now_s(),
            usize::MAX,
            |lane| self.room(lane),
            |place, told| Waiting::tell(answers, place, told),
        );
    }

    /// Where some engines compute prompts for others, both kinds must have room.
    fn room(&self, lane: &str) -> EngineRoom {
        let all = self.engines.all();
        let (first, second): (Vec<_>, Vec<_>) = all
            .iter()
            .filter(|engine| engine.takes(Some(lane).filter(|lane| !lane.is_empty())))
            .partition(|engine| engine.spec.role == EngineRole::Prefill);
        let (first, second) = (trusted(first), trusted(second));
        let room = self.room_at(&second);
        if first.is_empty() || room.engines == 0 { room.or_refusal() } else { room.and(self.room_at(&first)) }
    }

    fn room_at(&self, engines: &[&Arc<Engine>]) -> EngineRoom {
        let mut room = EngineRoom::default();
        for engine in engines {
            room.add(&self.settings, &engine.backlog(), engine.told.load().waiting);
        }
        room
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::booking::{Booking, Verdict};
    use crate::books::Promise;
    use crate::engine::Told;
    use crate::view::Rates;

    const SETTINGS: GateSettings = GateSettings {
        bounds: QueueBounds { requests: 3, bytes: 1000 },
        patience: Duration::from_secs(20),
        backlog: Duration::from_millis(100),
        concurrency: 0,
        starved: Duration::from_secs(5),
    };

    fn engines(count: usize) -> Arc<Engines> {
        let engines = Arc::new(Engines::default());
        let spec =
            |number| kvcellar_discovery::parse(&format!("url=http://h:{number},name={number}")).expect("an engine");
        engines.set((1..=count).map(spec).collect());
        for engine in engines.all().iter() {
            engine.heard(Told::default());
        }
        engines
    }

    /// An engine computes a prompt for so long.
    fn busy(engines: &Engines, number: usize, seconds: f64) -> Booking {
        let tokens = (seconds * Rates::default().prefill).round();
        #[expect(clippy::cast_sign_loss, reason = "times are not below zero")]
        let promise = Promise { tokens: tokens as u32, held: 0, streams: true };
        Booking::new(Arc::clone(&engines.all()[number]), promise)
    }

    fn flow(priority: i32) -> Urgency {
        Urgency { priority, ..Urgency::default() }
    }

    async fn is_through(gate: &Gate, priority: i32) -> bool {
        let entered = tokio::time::timeout(Duration::from_millis(20), gate.enter("m", &flow(priority), 10)).await;
        entered.is_ok()
    }

    #[tokio::test]
    async fn who_finds_room_does_not_wait_and_others_wait_for_it() {
        let engines = engines(1);
        let gate = Gate::new(SETTINGS, Arc::clone(&engines));
        assert!(is_through(&gate, 0).await && is_through(&gate, 0).await, "a short backlog is none");
        let long = busy(&engines, 0, 5.0);
        assert!(!is_through(&gate, 0).await);
        assert_eq!(gate.waiting().0, [], "it has left");
        let plain = flow(0);
        let (entered, ()) = tokio::join!(gate.enter("m", &plain, 10), async {
            tokio::task::yield_now().await;
            assert_eq!(gate.waiting(), (vec![(0, 1)], 10));
            drop(long);
            gate.settle(&mut gate.lock());
        });
        drop(entered.expect("through"));
        assert!(gate.lock().hall.is_passed() && gate.lock().answers.is_empty());
    }

    #[tokio::test]
    async fn those_on_their_way_count() {
        let engines = engines(2);
        let gate = Gate::new(SETTINGS, Arc::clone(&engines));
        let first = gate.enter("m", &flow(0), 10).await.expect("room");
        let second = gate.enter("m", &flow(0), 10).await.expect("room");
        assert!(!is_through(&gate, 0).await, "both engines may be theirs");
        assert!(gate.enter("n", &flow(0), 10).await.is_ok(), "another lane");
        drop((first, second));
        assert!(is_through(&gate, 0).await);
    }

    #[tokio::test]
    async fn lower_priorities_leave_something_free() {
        let engines = engines(2);
        let gate = Gate::new(GateSettings { concurrency: 2, ..SETTINGS }, Arc::clone(&engines));
        let one = busy(&engines, 0, 0.05);
        assert!(is_through(&gate, 0).await, "no higher one was seen");
        assert!(is_through(&gate, 5).await && !is_through(&gate, 0).await, "the other engine is kept");
        assert!(is_through(&gate, 5).await);
        drop(one);
        assert!(is_through(&gate, 0).await, "both have nothing to do");
        let places: Vec<_> = (0..2).map(|number| busy(&engines, number, 0.0)).collect();
        assert!(!is_through(&gate, 0).await && is_through(&gate, 5).await, "each has one place left");
        drop(places);
    }

    #[tokio::test]
    async fn a_low_priority_beside_a_steady_high_one_gets_its_turn() {
        let engines = engines(2);
        let gate = Gate::new(GateSettings { starved: Duration::from_millis(5), ..SETTINGS }, Arc::clone(&engines));
        let one = busy(&engines, 0, 50.0);
        assert!(is_through(&gate, 5).await && !is_through(&gate, 0).await, "the idle engine is kept");
        let (plain, urgent) = (flow(0), flow(5));
        let mut low = std::pin::pin!(gate.enter("m", &plain, 10));
        let mut turns = 0;
        while low.as_mut().now_or_never().is_none() {
            turns += 1;
            assert!(turns < 100, "it starves");
            let mut high = std::pin::pin!(gate.enter("m", &urgent, 10));
            assert!(high.as_mut().now_or_never().is_none(), "somebody waits before it");
            tokio::time::sleep(Duration::from_millis(1)).await;
            gate.settle(&mut gate.lock());
            drop(high.as_mut().now_or_never());
        }
        assert!(turns >= 5, "{turns}: not before its turn");
        drop(one);
    }

    #[tokio::test]
    async fn an_engine_that_is_not_trusted_is_no_room() {
        let engines = engines(2);
        let gate = Gate::new(SETTINGS, Arc::clone(&engines));
        for _ in 0..crate::breaker::FAILURES_MAX {
            busy(&engines, 1, 0.0).judged(Verdict::Ill);
        }
        let _one = busy(&engines, 0, 50.0);
        assert!(!is_through(&gate, 0).await, "the other one gets nothing");
    }

    #[tokio::test]
    async fn who_has_to_go_is_told() {
        let engines = engines(1);
        let gate = Gate::new(SETTINGS, Arc::clone(&engines));
        let long = busy(&engines, 0, 50.0);
        let soon = Urgency { ttft: Some(Duration::from_millis(30)), ..flow(1) };
        let flows = [soon, flow(0), flow(0), flow(0), flow(7)];
        let all = futures_util::future::join_all(
            flows.iter().map(|flow| async { gate.enter("m", flow, 10).await.map(drop) }),
        );
        let keeper = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            drop(long);
            gate.keep().await;
        };
        let told = tokio::select! { told = all => told, () = keeper => unreachable!("it keeps on") };
        let told: Vec<_> = told.into_iter().map(Result::err).collect();
        let expected = [Some(Refusal::Late(30)), None, Some(Refusal::Displaced), Some(Refusal::QueueFull), None];
        assert_eq!(told, expected);
    }

    #[tokio::test]
    async fn without_an_engine_nobody_waits() {
        let gate = Gate::new(SETTINGS, Arc::default());
        assert!(is_through(&gate, 0).await);
    }
}
