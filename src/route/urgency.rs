//! What a request says of its urgency: in headers that the field's gateways use, too.

use std::collections::BTreeMap;
use std::time::Duration;

/// Headers that name an objective, whose priority the operator sets.
const OBJECTIVE: [&str; 3] = ["x-llm-d-inference-objective", "x-gateway-inference-objective", "x-kvcellar-objective"];
/// Headers that say whose a request is.
const FAIRNESS: [&str; 3] =
    ["x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id", "x-kvcellar-fairness-id"];
/// Headers with the time within which the first token is wanted, in ms.
const TTFT: [&str; 3] = ["x-llm-d-slo-ttft-ms", "x-slo-ttft-ms", "x-kvcellar-slo-ttft-ms"];

/// Priorities by objective's name.
pub type Objectives = BTreeMap<String, i32>;

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
    /// Reads a request's headers, which `get` finds by their names in lower case. An objective that
    /// nobody has named has priority 0.
    pub fn read<'h>(get: impl Fn(&str) -> Option<&'h str>, objectives: &Objectives) -> Self {
        let first = |names: [&str; 3]| names.into_iter().find_map(&get).map(str::trim).filter(|text| !text.is_empty());
        let ttft = first(TTFT).and_then(|text| text.parse().ok()).filter(|ms| *ms > 0).map(Duration::from_millis);
        Self {
            priority: first(OBJECTIVE).and_then(|name| objectives.get(name)).copied().unwrap_or(0),
            id: first(FAIRNESS).unwrap_or_default().to_owned(),
            ttft,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_the_field() {
        let objectives = Objectives::from([("chat".to_owned(), 10), ("batch".to_owned(), -1)]);
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
