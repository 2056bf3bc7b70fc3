//! Requests that wait until an engine has room for them: who is next, who has waited too long, who
//! has to go when there are too many.
//!
//! Requests for different models wait in different *lanes*: they do not compete for engines, but
//! for room in the queue.
//!
//! Promises: within the bounds nothing is dropped before its time. In a lane a request of a higher
//! priority is next; who has waited too long is found apart from that. Within a priority flows take
//! turns, however many requests each has; within a flow the earliest deadline is first, then the
//! earliest arrival. Where a bound is reached the newest request of the lowest priority goes: the
//! new one, or one that waits.
//!
//! Pure: the time is an argument. Costs are logarithmic in what waits.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What a queue holds at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueBounds {
    /// Requests.
    pub requests: usize,
    /// Bytes of their bodies.
    pub bytes: usize,
}

/// One that waits.
#[derive(Debug, Clone, PartialEq)]
pub struct WaitingRequest {
    /// Those of one lane wait for the same engines.
    pub lane: String,
    /// Larger is served first.
    pub priority: i32,
    /// Whose it is: flows of one priority take turns.
    pub flow: String,
    /// When it came.
    pub came_s: f64,
    /// When it must have been sent to an engine.
    pub deadline_s: f64,
    /// Bytes of its body.
    pub bytes: usize,
}

/// Names a request in the queue, in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueuePlace(u64);

/// Deadline, then arrival. Deadlines are never below zero, so that their bits order them.
type QueueTurn = (u64, QueuePlace);

/// Those of one priority in one lane.
#[derive(Debug, Default)]
struct Band {
    /// Flows by their next turn.
    round: BTreeMap<u64, String>,
    flows: HashMap<String, WaitingFlow>,
    /// All requests, by arrival.
    places: BTreeSet<QueuePlace>,
    /// Turns so far.
    turns: u64,
}

/// One flow's requests, and the number under which it stands in the round.
#[derive(Debug, Default)]
struct WaitingFlow {
    turn: u64,
    requests: BTreeSet<QueueTurn>,
}

impl Band {
    /// Puts a flow at the end of the round.
    fn line_up(&mut self, name: &str) -> u64 {
        self.turns += 1;
        self.round.insert(self.turns, name.to_owned());
        self.turns
    }
}

#[derive(Debug, Default)]
struct WaitingLane {
    bands: BTreeMap<Reverse<i32>, Band>,
}

/// The queue.
#[derive(Debug)]
pub struct RequestQueue {
    bounds: QueueBounds,
    lanes: BTreeMap<String, WaitingLane>,
    waiting: HashMap<QueuePlace, WaitingRequest>,
    deadlines: BTreeSet<QueueTurn>,
    /// The one that has to go first is first.
    ranks: BTreeSet<(i32, Reverse<QueuePlace>)>,
    bytes: usize,
    came: u64,
}

fn turn(place: QueuePlace, waiting: &WaitingRequest) -> QueueTurn {
    (waiting.deadline_s.max(0.0).to_bits(), place)
}

impl RequestQueue {
    /// Empty.
    pub fn new(bounds: QueueBounds) -> Self {
        Self {
            bounds,
            lanes: BTreeMap::new(),
            waiting: HashMap::new(),
            deadlines: BTreeSet::new(),
            ranks: BTreeSet::new(),
            bytes: 0,
            came: 0,
        }
    }

    /// Requests that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Bytes of their bodies.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Lanes in which somebody waits.
    pub fn lanes(&self) -> Vec<String> {
        self.lanes.keys().cloned().collect()
    }

    /// Requests that wait, by priority, the lowest first.
    pub fn by_priority(&self) -> BTreeMap<i32, usize> {
        let mut found = BTreeMap::new();
        for lane in self.lanes.values() {
            for (Reverse(priority), band) in &lane.bands {
                *found.entry(*priority).or_default() += band.places.len();
            }
        }
        found
    }

    /// One more. Returns its place, and those that had to go for it; `None`: there is no room for
    /// one of its priority, and nobody had to go.
    pub fn push(&mut self, waiting: WaitingRequest) -> Option<(QueuePlace, Vec<QueuePlace>)> {
        let fits = |requests: usize, bytes: usize, bounds: QueueBounds| {
            requests < bounds.requests && bytes.saturating_add(waiting.bytes) <= bounds.bytes
        };
        // First on paper: one that is refused must not have cost others their place.
        let (mut requests, mut bytes, mut gone) = (self.waiting.len(), self.bytes, Vec::new());
        for (_, Reverse(place)) in self.ranks.iter().take_while(|(priority, _)| *priority < waiting.priority) {
            if fits(requests, bytes, self.bounds) {
                break;
            }
            requests -= 1;
            bytes -= self.waiting[place].bytes;
            gone.push(*place);
        }
        if !fits(requests, bytes, self.bounds) {
            return None;
        }
        for place in &gone {
            self.remove(*place);
        }
        self.came += 1;
        let place = QueuePlace(self.came);
        let turn = turn(place, &waiting);
        let lane = self.lanes.entry(waiting.lane.clone()).or_default();
        let band = lane.bands.entry(Reverse(waiting.priority)).or_default();
        band.places.insert(place);
        if !band.flows.contains_key(&waiting.flow) {
            let turn = band.line_up(&waiting.flow);
            band.flows.insert(waiting.flow.clone(), WaitingFlow { turn, ..WaitingFlow::default() });
        }
        if let Some(flow) = band.flows.get_mut(&waiting.flow) {
            flow.requests.insert(turn);
        }
        self.deadlines.insert(turn);
        self.ranks.insert((waiting.priority, Reverse(place)));
        self.bytes += waiting.bytes;
        self.waiting.insert(place, waiting);
        Some((place, gone))
    }

    /// Takes out a request, wherever it is. `None`: it is not there any more.
    pub fn remove(&mut self, place: QueuePlace) -> Option<WaitingRequest> {
        let waiting = self.waiting.remove(&place)?;
        let turn = turn(place, &waiting);
        self.deadlines.remove(&turn);
        self.ranks.remove(&(waiting.priority, Reverse(place)));
        self.bytes -= waiting.bytes;
        if let Some(lane) = self.lanes.get_mut(&waiting.lane) {
            lane.remove(turn, &waiting);
            if lane.bands.is_empty() {
                self.lanes.remove(&waiting.lane);
            }
        }
        Some(waiting)
    }

    /// A lane's next request of those whose priority may go now. It is still there; its flow has
    /// had its turn.
    pub fn next(&mut self, lane: &str, may: impl Fn(i32) -> bool) -> Option<QueuePlace> {
        self.lanes.get_mut(lane)?.next(may)
    }

    /// A lane's oldest request below its highest waiting priority, or of any where a higher one
    /// does not wait, if it came before `since_s`.
    pub fn starved(&self, lane: &str, since_s: f64) -> Option<QueuePlace> {
        let bands = &self.lanes.get(lane)?.bands;
        let lower = bands.values().skip(usize::from(bands.len() > 1));
        let oldest = lower.filter_map(|band| band.places.first()).min()?;
        (self.waiting[oldest].came_s <= since_s).then_some(*oldest)
    }

    /// Takes out those whose deadline has passed.
    pub fn expire(&mut self, now_s: f64) -> Vec<QueuePlace> {
        let mut late = Vec::new();
        while let Some((bits, place)) = self.deadlines.first().copied() {
            if f64::from_bits(bits) > now_s {
                break;
            }
            self.remove(place);
            late.push(place);
        }
        late
    }

    /// When the next deadline passes.
    pub fn next_deadline_s(&self) -> Option<f64> {
        self.deadlines.first().map(|(bits, _)| f64::from_bits(*bits))
    }
}

impl WaitingLane {
    fn next(&mut self, may: impl Fn(i32) -> bool) -> Option<QueuePlace> {
        let (_, band) = self.bands.iter_mut().find(|(Reverse(priority), _)| may(*priority))?;
        let (_, name) = band.round.pop_first()?;
        let turn = band.line_up(&name);
        let flow = band.flows.get_mut(&name)?;
        flow.turn = turn;
        flow.requests.first().map(|(_, place)| *place)
    }

    fn remove(&mut self, turn: QueueTurn, waiting: &WaitingRequest) {
        let key = Reverse(waiting.priority);
        let Some(band) = self.bands.get_mut(&key) else { return };
        band.places.remove(&turn.1);
        if let Some(flow) = band.flows.get_mut(&waiting.flow) {
            flow.requests.remove(&turn);
            if flow.requests.is_empty() {
                band.round.remove(&flow.turn);
                band.flows.remove(&waiting.flow);
            }
        }
        if band.places.is_empty() {
            self.bands.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: QueueBounds = QueueBounds { requests: 1000, bytes: 1 << 20 };

    fn waiting(priority: i32, flow: &str, came_s: f64) -> WaitingRequest {
        let (lane, flow) = ("m".to_owned(), flow.to_owned());
        WaitingRequest { lane, priority, flow, came_s, deadline_s: came_s + 60.0, bytes: 10 }
    }

    fn next(queue: &mut RequestQueue, lane: &str, may: impl Fn(i32) -> bool) -> Option<(QueuePlace, WaitingRequest)> {
        let place = queue.next(lane, may)?;
        queue.remove(place).map(|waiting| (place, waiting))
    }

    fn push(queue: &mut RequestQueue, waiting: WaitingRequest) -> QueuePlace {
        queue.push(waiting).expect("room").0
    }

    fn flows(queue: &mut RequestQueue) -> String {
        std::iter::from_fn(|| next(queue, "m", |_| true)).map(|(_, it)| it.flow).collect()
    }

    #[test]
    fn higher_priorities_first_and_flows_in_turn() {
        let mut queue = RequestQueue::new(BOUNDS);
        for (priority, flow) in [(0, "a"), (0, "a"), (0, "a"), (0, "b"), (5, "x"), (0, "c"), (-1, "z")] {
            push(&mut queue, waiting(priority, flow, 0.0));
        }
        assert_eq!(queue.by_priority(), BTreeMap::from([(5, 1), (0, 5), (-1, 1)]));
        assert_eq!(flows(&mut queue), "xabcaaz");
        assert!(queue.is_empty() && queue.bytes() == 0 && queue.lanes.is_empty() && queue.ranks.is_empty());
    }

    #[test]
    fn within_a_flow_the_earliest_deadline_is_first() {
        let mut queue = RequestQueue::new(BOUNDS);
        let late = push(&mut queue, waiting(0, "a", 0.0));
        let soon = push(&mut queue, WaitingRequest { deadline_s: 2.0, ..waiting(0, "a", 1.0) });
        assert_eq!(queue.next_deadline_s(), Some(2.0));
        assert_eq!(next(&mut queue, "m", |_| true).map(|(place, _)| place), Some(soon));
        assert_eq!(queue.expire(59.9), []);
        assert_eq!(queue.expire(60.0), [late]);
        assert_eq!(queue.remove(late), None);
    }

    #[test]
    fn where_it_is_full_the_newest_of_the_lowest_priority_goes() {
        let mut queue = RequestQueue::new(QueueBounds { requests: 3, bytes: 100 });
        let first = push(&mut queue, waiting(0, "a", 0.0));
        let low = push(&mut queue, waiting(-1, "a", 0.0));
        let newer = push(&mut queue, waiting(-1, "b", 0.0));
        assert_eq!(queue.push(waiting(-1, "c", 0.0)), None, "nobody is lower");
        assert_eq!(queue.push(waiting(0, "c", 0.0)).expect("room").1, [newer]);
        assert_eq!(
            queue.push(WaitingRequest { bytes: 101, ..waiting(1, "c", 0.0) }),
            None,
            "too large for anybody to make room"
        );
        assert_eq!(queue.len(), 3, "nobody went in vain");
        let (_, gone) = queue.push(WaitingRequest { bytes: 90, ..waiting(1, "c", 0.0) }).expect("room");
        assert_eq!(gone[0], low);
        assert!(gone.len() == 2 && !gone.contains(&first), "no more than must");
    }

    #[test]
    fn who_starves_is_found() {
        let mut queue = RequestQueue::new(BOUNDS);
        let low = push(&mut queue, waiting(0, "low", 0.0));
        assert_eq!(queue.starved("m", 0.0), Some(low), "alone, but kept away");
        push(&mut queue, waiting(1, "high", 1.0));
        push(&mut queue, waiting(-1, "lower", 2.0));
        assert_eq!((queue.starved("m", -0.1), queue.starved("m", 9.0)), (None, Some(low)));
        assert_eq!(queue.starved("n", 100.0), None);
    }

    #[test]
    fn lanes_share_room_and_nothing_else() {
        let mut queue = RequestQueue::new(QueueBounds { requests: 2, bytes: 100 });
        push(&mut queue, waiting(0, "a", 0.0));
        let other = push(&mut queue, WaitingRequest { lane: "n".to_owned(), ..waiting(-1, "a", 0.0) });
        assert_eq!(next(&mut queue, "n", |priority| priority < 0).map(|(place, _)| place), Some(other));
        push(&mut queue, WaitingRequest { lane: "n".to_owned(), ..waiting(-1, "a", 0.0) });
        assert_eq!(queue.push(waiting(1, "b", 0.0)).expect("room").1.len(), 1, "from the other lane");
        assert_eq!(queue.lanes(), ["m"]);
    }

    #[test]
    fn a_priority_that_may_not_go_keeps_nobody() {
        let mut queue = RequestQueue::new(BOUNDS);
        push(&mut queue, waiting(5, "x", 0.0));
        push(&mut queue, waiting(0, "a", 0.0));
        assert_eq!(next(&mut queue, "m", |priority| priority < 5).map(|(_, it)| it.flow).as_deref(), Some("a"));
        assert_eq!(next(&mut queue, "m", |priority| priority < 5), None);
    }

    proptest! {
        #[test]
        fn everything_that_comes_leaves_once(steps in proptest::collection::vec((0_u8..6, -2_i32..3, 0_u8..4), 1..300)) {
            let mut queue = RequestQueue::new(QueueBounds { requests: 20, bytes: 300 });
            let mut there: BTreeMap<QueuePlace, WaitingRequest> = BTreeMap::new();
            for (at, (what, priority, flow)) in steps.into_iter().enumerate() {
                let now_s = at as f64;
                match what {
                    0..=2 => {
                        let deadline_s = now_s + f64::from(flow) * 10.0 + 1.0;
                        let bytes = 5 + usize::from(flow) * 10;
                        let new = WaitingRequest { deadline_s, bytes, ..waiting(priority, &flow.to_string(), now_s) };
                        if let Some((place, gone)) = queue.push(new.clone()) {
                            for place in gone {
                                let lower = there.remove(&place).expect("it was there");
                                prop_assert!(lower.priority < priority);
                            }
                            there.insert(place, new);
                        }
                    }
                    3 => {
                        let next = next(&mut queue, "m", |_| true);
                        prop_assert_eq!(next.is_none(), there.is_empty());
                        if let Some((place, waiting)) = next {
                            prop_assert_eq!(there.remove(&place), Some(waiting));
                        }
                    }
                    4 => {
                        for place in queue.expire(now_s) {
                            prop_assert!(there.remove(&place).expect("it was there").deadline_s <= now_s);
                        }
                        prop_assert!(there.values().all(|it| it.deadline_s > now_s));
                    }
                    _ => {
                        if let Some(place) = there.keys().next().copied() {
                            prop_assert_eq!(queue.remove(place), there.remove(&place));
                        }
                    }
                }
                prop_assert_eq!(queue.len(), there.len());
                prop_assert_eq!(queue.bytes(), there.values().map(|it| it.bytes).sum::<usize>());
                prop_assert!(queue.len() <= 20 && queue.bytes() <= 300);
                prop_assert_eq!(queue.by_priority().values().sum::<usize>(), there.len());
                prop_assert_eq!(queue.lanes().is_empty(), there.is_empty());
            }
        }
    }
}
