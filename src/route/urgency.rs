//! What a request says of its urgency: in headers that the field's gateways use, too.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

/// Headers that name an objective, whose priority the operator sets.
const OBJECTIVE: [&str; 3] = ["x-llm-d-inference-objective", "x-gateway-inference-objective", "x-kvcellar-objective"];
/// Headers that say whose a request is.
const FAIRNESS: [&str; 3] =
    ["x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id", "x-kvcellar-fairness-id"];
/// Headers with the time within which the first token is wanted, in ms.
const TTFT: [&str; 3] = ["x-llm-d-slo-ttft-ms", "x-slo-ttft-ms", "x-kvcellar-slo-ttft-ms"];

/// Priorities by objective's name. What the operator's options say wins over what objects of a
/// cluster say, which may change while requests are read.
#[derive(Debug, Default)]
pub struct Objectives {
    options: BTreeMap<String, i32>,
    objects: ArcSwap<BTreeMap<String, i32>>,
}

impl Objectives {
    /// Those of options.
    pub fn new(options: BTreeMap<String, i32>) -> Self {
        Self { options, objects: ArcSwap::default() }
    }

    /// Exactly these objects from now on. Those that have no effect, because an option names
    /// another priority, are logged once.
    pub fn set_objects(&self, objects: &Arc<BTreeMap<String, i32>>) {
        let before = self.objects.swap(Arc::clone(objects));
        for (name, priority) in objects.iter().filter(|(name, priority)| before.get(*name) != Some(priority)) {
            if let Some(option) = self.options.get(name).filter(|option| *option != priority) {
                log::warn!(
                    "the InferenceObjective {name} says priority {priority}, but --objective {option}, which wins"
                );
            }
        }
    }

    /// The priority of an objective. One that nobody has named has 0.
    pub fn priority(&self, name: &str) -> i32 {
        let option = self.options.get(name).copied();
        option.or_else(|| self.objects.load().get(name).copied()).unwrap_or(0)
    }
}

/// A request's urgency.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Urgency {
    /// Larger is served first.
    pub priority: i32,
    /// Whose it is. Flows of one priority take turns.
    pub id: String,
    /// Time within which its first token is wanted.
    pub ttft: Option<Duration>,
}

impl Urgency {
    /// Reads a request's headers, which `get` finds by their names in lower case.
    pub fn read<'h>(get: impl Fn(&str) -> Option<&'h str>, objectives: &Objectives) -> Self {
        let first = |names: [&str; 3]| names.into_iter().find_map(&get).map(str::trim).filter(|text| !text.is_empty());
        let ttft = first(TTFT).and_then(|text| text.parse().ok()).filter(|ms| *ms > 0).map(Duration::from_millis);
        Self {
            priority: first(OBJECTIVE).map_or(0, |name| objectives.priority(name)),
            id: first(FAIRNESS).unwrap_or_default().to_owned(),
            ttft,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_win_over_objects_and_objects_come_and_go() {
        let objectives = Objectives::new(BTreeMap::from([("chat".to_owned(), 10)]));
        let objects = BTreeMap::from([("chat".to_owned(), 1), ("batch".to_owned(), -1)]);
        objectives.set_objects(&Arc::new(objects));
        assert_eq!(["chat", "batch", "other"].map(|name| objectives.priority(name)), [10, -1, 0]);
        objectives.set_objects(&Arc::default());
        assert_eq!(["chat", "batch"].map(|name| objectives.priority(name)), [10, 0]);
    }

    #[test]
    fn headers_of_the_field() {
        let objectives = Objectives::new(BTreeMap::from([("chat".to_owned(), 10), ("batch".to_owned(), -1)]));
        let read = |headers: &[(&str, &'static str)]| {
            Urgency::read(|name| headers.iter().find(|(it, _)| *it == name).map(|(_, value)| *value), &objectives)
        };
        assert_eq!(read(&[]), Urgency::default());
        let found = read(&[
            ("x-gateway-inference-objective", "chat"),
            ("x-llm-d-inference-fairness-id", " tenant "),
            ("x-slo-ttft-ms", "250"),
        ]);
        assert_eq!(found, Urgency { priority: 10, id: "tenant".to_owned(), ttft: Some(Duration::from_millis(250)) });
        assert_eq!(read(&[("x-llm-d-inference-objective", "batch")]).priority, -1);
        assert_eq!(read(&[("x-llm-d-inference-objective", "nobody's")]).priority, 0);
        for nonsense in ["0", "-1", "soon", "99999999999999999999999"] {
            assert_eq!(read(&[("x-llm-d-slo-ttft-ms", nonsense)]).ttft, None, "{nonsense}");
        }
    }
}
