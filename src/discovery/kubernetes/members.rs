//! From objects of Kubernetes to engines: what a pod says of the engines in it, and which of them
//! are members of a pool. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use kube::api::DynamicObject;

use super::objects::{PodStatus, pod_status};
use crate::engine::{EngineRole, EngineSpec, PodNotes};
use kvcellar_block::error::{Error, Result};

/// Label with the steps of a request that a pod's engines take.
const ROLE: &str = "llm-d.ai/role";
/// Annotations with the ports of a pool on which a pod has engines, where that is not all of them.
const ACTIVE_PORTS: [&str; 2] = ["llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports"];
/// Label with a pod's number in its group, where an engine's ranks are spread over several pods.
const WORKER: &str = "leaderworkerset.sigs.k8s.io/worker-index";

/// What matters of a pod that has engines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EnginePod {
    ip: IpAddr,
    role: EngineRole,
    draining: bool,
    active_ports: Option<Vec<u16>>,
    /// Number in its group of pods, from 0.
    worker: u32,
}

impl EnginePod {
    /// Reads a pod. `None`: it is no engine now. A pod is one when it is ready. It drains while it
    /// ends, and while it was ready `before` and is not any more: forgotten, it would lose the blocks
    /// that an index knows of it.
    ///
    /// # Errors
    /// What it says of itself cannot be understood: it is no engine, and somebody should know.
    pub(crate) fn read(pod: &DynamicObject, before: Option<&Self>) -> std::result::Result<Option<Self>, String> {
        let PodStatus { phase, pod_ip, conditions } = pod_status(pod)?;
        let ends = pod.metadata.deletion_timestamp.is_some();
        let is_over = matches!(phase.as_deref(), Some("Succeeded" | "Failed"));
        let is_ready = conditions.iter().flatten().any(|it| it.name == "Ready" && it.status == "True");
        let Some(ip) = pod_ip.and_then(|ip| ip.parse().ok()) else { return Ok(None) };
        if is_over || !(is_ready || ends || before.is_some()) {
            return Ok(None);
        }
        let label = |name: &str| pod.metadata.labels.as_ref().and_then(|labels| labels.get(name));
        let Some(role) = role(label(ROLE).map(String::as_str))? else { return Ok(None) };
        let annotations = pod.metadata.annotations.as_ref();
        let active = ACTIVE_PORTS.iter().find_map(|name| Some((name, annotations?.get(*name)?)));
        let active_ports = active
            .map(|(name, text)| {
                let ports = text.split(',').map(|port| port.trim().parse::<u16>());
                ports
                    .collect::<std::result::Result<Vec<_>, _>>()
                    .map_err(|_| format!("its annotation {name} is `{text}`: write numbers of ports, e.g. 8000,8001"))
            })
            .transpose()?;
        let worker = match label(WORKER) {
            Some(text) => text.parse().map_err(|_| format!("its label {WORKER} is `{text}`, no number"))?,
            None => 0,
        };
        Ok(Some(Self { ip, role, draining: ends || !is_ready, active_ports, worker }))
    }
}

/// The role that a label names. `None`: no engine that answers prompts.
fn role(label: Option<&str>) -> std::result::Result<Option<EngineRole>, String> {
    match label {
        None | Some("" | "both" | "prefill-decode" | "encode-prefill-decode") => Ok(Some(EngineRole::Both)),
        Some("prefill" | "encode-prefill") => Ok(Some(EngineRole::Prefill)),
        Some("decode") => Ok(Some(EngineRole::Decode)),
        Some("encode") => Ok(None),
        Some(other) => Err(format!("its label {ROLE} is `{other}`: write prefill, decode or prefill-decode")),
    }
}

/// Where engines of a pool publish and replay their events. A rank's ports are these plus its
/// number, as vLLM counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EventPorts {
    /// Rank 0 publishes here.
    events: u16,
    /// Rank 0 replays here. `None`: nobody does.
    replay: Option<u16>,
}

/// The flag that gives these ports.
const EVENT_PORTS_FLAG: &str = "inference-pool-events";

impl EventPorts {
    /// Reads the flag.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let (events, replay) = text.split_once(':').map_or((text, None), |(events, replay)| (events, Some(replay)));
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
        let wrong =
            || Error::config(EVENT_PORTS_FLAG, format!("`{text}` is no PORT[:REPLAY-PORT]"), "Write e.g. 5557:5657");
        let replay = replay.map(|text| port(text).ok_or_else(wrong)).transpose()?;
        Ok(Self { events: port(events).ok_or_else(wrong)?, replay })
    }

    /// The ports of a rank, of so many in the pool's pods.
    fn of_rank(self, rank: u32, ranks: u32) -> Result<(u16, Option<u16>)> {
        let wrong = |problem: String, remedy: &str| Error::config(EVENT_PORTS_FLAG, problem, remedy);
        if let Some(replay) = self.replay
            && ranks > 1
            && u32::from(replay.abs_diff(self.events)) < ranks
        {
            let problem =
                format!("{}:{replay} lie closer together than there are ranks in a pod, {ranks}", self.events);
            return Err(wrong(problem, "Start engines and this command with ports further apart, e.g. 5557:5657"));
        }
        let plus = |port: u16| {
            u32::from(port).checked_add(rank).and_then(|port| u16::try_from(port).ok()).ok_or_else(|| {
                wrong(format!("{port} and rank {rank} make no port"), "Write lower ports, e.g. 5557:5657")
            })
        };
        Ok((plus(self.events)?, self.replay.map(plus).transpose()?))
    }
}

/// The engines of a pool: each of its ports in each pod. Of several ports each is a data-parallel
/// rank.
///
/// # Errors
/// [`Error::Config`] where ports of events cannot be right.
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
    use serde_json::{Value, json};

    use super::*;
    use crate::engine::tests::Plain;

    fn pod(more: &Value) -> DynamicObject {
        let mut pod = json!({
            "metadata": {"name": "a", "labels": {}},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
        });
        for (field, value) in more.as_object().expect("an object") {
            for (name, value) in value.as_object().expect("an object") {
                pod[field][name] = value.clone();
            }
        }
        serde_json::from_value(pod).expect("a pod")
    }

    fn read(more: &Value) -> Option<EnginePod> {
        EnginePod::read(&pod(more), None).expect("understood")
    }

    fn ends() -> Value {
        json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"},
            "status": {"conditions": [{"type": "Ready", "status": "False"}]}})
    }

    fn engines(pods: &[(&str, EnginePod)], ports: &[u16], events: &str) -> Result<Vec<Plain>> {
        let pods = pods.iter().map(|(name, pod)| ((*name).to_owned(), pod.clone())).collect();
        of_pool(&pods, ports, EventPorts::parse(events)?)
    }

    fn shown(pods: &[(&str, EnginePod)], ports: &[u16], events: &str) -> Vec<String> {
        let found = engines(pods, ports, events).expect("engines");
        found.iter().map(|engine| format!("{engine:?}")).collect()
    }

    #[test]
    fn only_ready_pods_and_those_that_end_are_engines() {
        let ready = read(&json!({})).expect("an engine");
        assert!(!ready.draining && ready.role == EngineRole::Both);
        assert!(read(&ends()).expect("it drains").draining);
        for none in [
            json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}),
            json!({"status": {"conditions": [{"type": "Initialized", "status": "True"}]}}),
            json!({"status": {"conditions": null}}),
            json!({"status": {"podIP": null}}),
            json!({"status": {"phase": "Succeeded"}}),
            json!({"status": {"phase": "Failed"}, "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
        ] {
            assert_eq!(read(&none), None, "{none}");
        }
        let new = serde_json::from_value(json!({"metadata": {"name": "a"}})).expect("a pod");
        assert_eq!(EnginePod::read(&new, None), Ok(None));
    }

    #[test]
    fn a_pod_that_was_ready_drains_until_it_is_again() {
        let ready = read(&json!({})).expect("an engine");
        let unready = pod(&json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}));
        let drains = EnginePod::read(&unready, Some(&ready)).expect("understood").expect("an engine");
        assert_eq!(drains, EnginePod { draining: true, ..ready.clone() });
        assert_eq!(EnginePod::read(&pod(&json!({})), Some(&drains)), Ok(Some(ready.clone())));
        let over = pod(&json!({"status": {"phase": "Failed"}}));
        assert_eq!(EnginePod::read(&over, Some(&ready)), Ok(None));
    }

    #[test]
    fn roles_are_those_of_the_field() {
        let role = |label: &str| EnginePod::read(&pod(&json!({"metadata": {"labels": {ROLE: label}}})), None);
        for (label, expected) in [
            ("prefill", EngineRole::Prefill),
            ("encode-prefill", EngineRole::Prefill),
            ("decode", EngineRole::Decode),
            ("both", EngineRole::Both),
            ("prefill-decode", EngineRole::Both),
            ("encode-prefill-decode", EngineRole::Both),
        ] {
            assert_eq!(role(label).expect("understood").expect("an engine").role, expected, "{label}");
        }
        assert_eq!(role("encode"), Ok(None), "it answers no prompts");
        assert!(role("Prefill").expect_err("unknown").contains("`Prefill`"));
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
        let second = read(&json!({"metadata": {"labels": {WORKER: "1"}}})).expect("an engine");
        let found = shown(&[("b", second)], &[8000, 8001], "5557:5657");
        assert!(found[0].contains("5559/8000/Some(5659) Both Some(2)"), "{}", found[0]);
        assert!(
            found[1].contains("b-rank-1") && found[1].contains("5560/8001/Some(5660) Both Some(3)"),
            "{}",
            found[1]
        );
        let wrong = json!({"metadata": {"labels": {WORKER: "x"}}});
        assert!(EnginePod::read(&pod(&wrong), None).expect_err("no number").contains(WORKER));
    }

    #[test]
    fn a_pod_may_name_its_active_ports() {
        for name in ACTIVE_PORTS {
            let half = read(&json!({"metadata": {"annotations": {name: "8001, 9000"}}})).expect("an engine");
            let found = shown(&[("a", half)], &[8000, 8001], "5557:5657");
            assert!(found.len() == 1 && found[0].contains("a-rank-1") && found[0].contains(":5558/8001"), "{found:?}");
            let wrong = pod(&json!({"metadata": {"annotations": {name: "8001,x"}}}));
            assert!(EnginePod::read(&wrong, None).expect_err("no port").contains(name));
        }
    }

    #[test]
    fn ports_of_events_that_cannot_be_right_are_refused() {
        for wrong in ["", "x", "0", "1:", "1:2:3", "70000"] {
            let error = EventPorts::parse(wrong).expect_err(wrong).to_string();
            assert!(error.contains(EVENT_PORTS_FLAG) && error.contains("5557:5657"), "{error}");
        }
        let pods = [("a", read(&json!({})).expect("a"))];
        assert!(engines(&pods, &[8000, 8001], "5557:5559").is_ok());
        for wrong in ["5557:5558", "5558:5557"] {
            let error = engines(&pods, &[8000, 8001], wrong).expect_err(wrong).to_string();
            assert!(error.contains("ranks in a pod, 2") && error.contains("further apart"), "{error}");
        }
        let error = engines(&pods, &[8000, 8001], "65535").expect_err("no port").to_string();
        assert!(error.contains("65535 and rank 1"), "{error}");
    }

    #[test]
    fn pods_with_labels_carry_their_notes() {
        let pods = BTreeMap::from([("a".to_owned(), read(&ends()).expect("it drains"))]);
        let found: Vec<_> = of_labels(&pods).collect();
        let notes = PodNotes { role: EngineRole::Both, draining: true, rank: None };
        assert_eq!(found, [("a".to_owned(), "10.0.0.1".parse().expect("an address"), notes)]);
    }
}
