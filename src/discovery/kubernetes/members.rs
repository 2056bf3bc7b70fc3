//! From pods to engines: those that are members of a pool, and those that labels select. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::engine_pod::EnginePod;
use super::event_ports::EventPorts;
use crate::engine::EngineSpec;
use crate::pod_notes::PodNotes;
use kvcellar_block::error::Result;

/// The engines of a pool: each of its ports in each pod. Of several ports each is a data-parallel
/// rank.
///
/// # Errors
/// [`kvcellar_block::error::Error::Config`] where ports of events cannot be right.
pub(crate) fn of_pool<E: EngineSpec>(
    pods: &BTreeMap<String, EnginePod>,
    target_ports: &[u16],
    events: EventPorts,
) -> Result<Vec<E>> {
    let ranks = target_ports.len() as u32;
    let mut found = Vec::new();
    for (pod_name, pod) in pods {
        let is_active = |port: &u16| pod.active_ports.as_ref().is_none_or(|active| active.contains(port));
        for (target, at) in target_ports.iter().zip(0..).filter(|(port, _)| is_active(port)) {
            let rank = (ranks > 1).then(|| pod.worker.saturating_mul(ranks).saturating_add(at));
            let (events, replay) = events.of_rank(rank.unwrap_or(0), ranks)?;
            let name = if ranks > 1 { format!("{pod_name}-rank-{at}") } else { pod_name.clone() };
            let notes = PodNotes { role: pod.role, draining: pod.draining, rank };
            found.push(E::of_pool(name, pod.ip, *target, (events, replay)).noted(notes));
        }
    }
    Ok(found)
}

/// Pods that are engines themselves, by their labels: names, addresses and notes.
pub(crate) fn of_labels(pods: &BTreeMap<String, EnginePod>) -> impl Iterator<Item = (String, IpAddr, PodNotes)> {
    let notes = |pod: &EnginePod| PodNotes { role: pod.role, draining: pod.draining, rank: None };
    pods.iter().map(move |(name, pod)| (name.clone(), pod.ip, notes(pod)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::engine_pod::tests::{ends, read};
    use super::*;
    use crate::engine::tests::Plain;
    use crate::pod_notes::EngineRole;

    fn engines(pods: &[(&str, EnginePod)], ports: &[u16], events: &str) -> Result<Vec<Plain>> {
        let pods = pods.iter().map(|(name, pod)| ((*name).to_owned(), pod.clone())).collect();
        of_pool(&pods, ports, EventPorts::parse(events)?)
    }

    fn shown(pods: &[(&str, EnginePod)], ports: &[u16], events: &str) -> Vec<String> {
        let found = engines(pods, ports, events).expect("engines");
        found.iter().map(|engine| format!("{engine:?}")).collect()
    }

    #[test]
    fn an_engine_for_each_pod_and_port() {
        let pods = [("a", read(&json!({})).expect("a")), ("b", read(&ends()).expect("b"))];
        let one = |name, at, open| format!("Plain {{ name: \"{name}\", events: \"{at}\", open: {open} }}");
        assert_eq!(
            shown(&pods, &[8000], "5557:5558"),
            [
                one("a", "tcp://10.0.0.1:5557/8000/Some(5558) Both None", true),
                one("b", "tcp://10.0.0.1:5557/8000/Some(5558) Both None", false),
            ]
        );
        assert_eq!(
            shown(&pods[..1], &[8000, 8100], "5557"),
            [
                one("a-rank-0", "tcp://10.0.0.1:5557/8000/None Both Some(0)", true),
                one("a-rank-1", "tcp://10.0.0.1:5558/8100/None Both Some(1)", true),
            ]
        );
    }

    #[test]
    fn ranks_go_on_in_the_next_pod_of_a_group() {
        let second = EnginePod { worker: 1, ..read(&json!({})).expect("an engine") };
        let found = shown(&[("b", second)], &[8000, 8001], "5557:5657");
        assert!(found[0].contains("5559/8000/Some(5659) Both Some(2)"), "{}", found[0]);
        assert!(
            found[1].contains("b-rank-1") && found[1].contains("5560/8001/Some(5660) Both Some(3)"),
            "{}",
            found[1]
        );
    }

    #[test]
    fn a_pod_may_have_engines_on_some_ports() {
        let half = EnginePod { active_ports: Some(vec![8001, 9000]), ..read(&json!({})).expect("an engine") };
        let found = shown(&[("a", half)], &[8000, 8001], "5557:5657");
        assert!(found.len() == 1 && found[0].contains("a-rank-1") && found[0].contains(":5558/8001"), "{found:?}");
    }

    #[test]
    fn ports_of_events_that_cannot_be_right_are_refused() {
        let pods = [("a", read(&json!({})).expect("a"))];
        let error = engines(&pods, &[8000, 8001], "5557:5558").expect_err("too close").to_string();
        assert!(error.contains("further apart"), "{error}");
    }

    #[test]
    fn pods_with_labels_carry_their_notes() {
        let pods = BTreeMap::from([("a".to_owned(), read(&ends()).expect("it drains"))]);
        let found: Vec<_> = of_labels(&pods).collect();
        let notes = PodNotes { role: EngineRole::Both, draining: true, rank: None };
        assert_eq!(found, [("a".to_owned(), "10.0.0.1".parse().expect("an address"), notes)]);
    }
}
