//! What a pod says of the engines in it.

use std::net::IpAddr;

use kube::api::DynamicObject;

use super::objects::part;
use super::pod_status::PodStatus;
use crate::pod_notes::EngineRole;

/// Label with the steps of a request that a pod's engines take.
const ROLE: &str = "llm-d.ai/role";
/// Annotations with the ports of a pool on which a pod has engines, where that is not all of them.
const ACTIVE_PORTS: [&str; 2] = ["llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports"];
/// Label with a pod's number in its group, where an engine's ranks are spread over several pods.
const WORKER: &str = "leaderworkerset.sigs.k8s.io/worker-index";

/// What matters of a pod that has engines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EnginePod {
    /// Its address.
    pub(super) ip: IpAddr,
    /// Steps of a request that its engines take.
    pub(super) role: EngineRole,
    /// It gets no new requests.
    pub(super) draining: bool,
    /// Ports of a pool on which it has engines. `None`: all.
    pub(super) active_ports: Option<Vec<u16>>,
    /// Number in its group of pods, from 0.
    pub(super) worker: u32,
}

impl EnginePod {
    /// Reads a pod. `None`: it is no engine now. A pod is one when it is ready. It drains while it
    /// ends, and while it was ready `before` and is not any more: forgotten, it would lose the
    /// blocks that an index knows of it.
    ///
    /// # Errors
    /// What it says of itself cannot be understood: it is no engine, and somebody should know.
    pub(crate) fn read(pod: &DynamicObject, before: Option<&Self>) -> Result<Option<Self>, String> {
        let status: PodStatus = part(pod, "status")?;
        let ends = pod.metadata.deletion_timestamp.is_some();
        let is_ready = status.is_ready();
        let Some(ip) = status.pod_ip.as_ref().and_then(|ip| ip.parse().ok()) else { return Ok(None) };
        if status.is_over() || !(is_ready || ends || before.is_some()) {
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
                    .collect::<Result<Vec<_>, _>>()
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
fn role(label: Option<&str>) -> Result<Option<EngineRole>, String> {
    match label {
        None | Some("" | "both" | "prefill-decode" | "encode-prefill-decode") => Ok(Some(EngineRole::Both)),
        Some("prefill" | "encode-prefill") => Ok(Some(EngineRole::Prefill)),
        Some("decode") => Ok(Some(EngineRole::Decode)),
        Some("encode") => Ok(None),
        Some(other) => Err(format!("its label {ROLE} is `{other}`: write prefill, decode or prefill-decode")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;

    pub(crate) fn pod(more: &Value) -> DynamicObject {
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

    pub(crate) fn read(more: &Value) -> Option<EnginePod> {
        EnginePod::read(&pod(more), None).expect("understood")
    }

    pub(crate) fn ends() -> Value {
        json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"},
            "status": {"conditions": [{"type": "Ready", "status": "False"}]}})
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
    fn what_a_pod_says_of_ports_and_its_group_must_be_numbers() {
        let refused = |part: &str, name: &str, text: &str| {
            EnginePod::read(&pod(&json!({"metadata": {part: {name: text}}})), None).expect_err("refused")
        };
        for name in ACTIVE_PORTS {
            let found = read(&json!({"metadata": {"annotations": {name: "8001, 9000"}}})).expect("an engine");
            assert_eq!(found.active_ports, Some(vec![8001, 9000]));
            assert!(refused("annotations", name, "8001,x").contains(name));
        }
        assert_eq!(read(&json!({"metadata": {"labels": {WORKER: "2"}}})).expect("an engine").worker, 2);
        assert!(refused("labels", WORKER, "x").contains(WORKER));
    }
}
