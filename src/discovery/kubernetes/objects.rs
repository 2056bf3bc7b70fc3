//! The objects that are watched, as far as they matter here: pods, and what the Gateway API
//! inference extension adds. Whole pods, as their crate declares them, would make the program larger
//! by megabytes of code that reads fields which nobody asks for.

use std::collections::BTreeMap;

use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Group of the pools.
const POOLS: &str = "inference.networking.k8s.io";
/// Groups that have objectives: the extension's own, and llm-d's.
pub(crate) const OBJECTIVES: [&str; 2] = ["inference.networking.x-k8s.io", "llm-d.ai"];

/// `Pod`, version 1.
pub(crate) fn pods() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Pod"))
}

/// `InferencePool`, version 1.
pub(crate) fn pools() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(POOLS, "v1", "InferencePool"))
}

/// `InferenceObjective`, version 1 alpha 2, of one of [`OBJECTIVES`].
pub(crate) fn objectives(group: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, "v1alpha2", "InferenceObjective"))
}

/// A pod's state.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct PodStatus {
    /// Where it is in its life.
    pub(crate) phase: Option<String>,
    /// Its address.
    #[serde(rename = "podIP")]
    pub(crate) pod_ip: Option<String>,
    /// What is said of it.
    pub(crate) conditions: Option<Vec<PodCondition>>,
}

/// One thing that is said of a pod.
#[derive(Debug, Deserialize)]
pub(crate) struct PodCondition {
    /// What.
    #[serde(rename = "type")]
    pub(crate) name: String,
    /// `True`, `False` or `Unknown`.
    pub(crate) status: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PoolSpec {
    selector: PoolSelector,
    target_ports: Vec<TargetPort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PoolSelector {
    match_labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct TargetPort {
    number: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ObjectiveSpec {
    priority: Option<i32>,
    pool_ref: PoolRef,
}

#[derive(Deserialize)]
struct PoolRef {
    name: String,
}

/// A pool of engines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pool {
    /// Selects its pods, as the API server takes it.
    pub(crate) selector: String,
    /// Each of its pods has an engine on each of these.
    pub(crate) target_ports: Vec<u16>,
}

/// Reads a pod's state. One that has none yet has no phase, no address and no condition.
///
/// # Errors
/// Why it cannot be understood.
pub(crate) fn pod_status(object: &DynamicObject) -> Result<PodStatus, String> {
    let Some(status) = object.data.get("status") else { return Ok(PodStatus::default()) };
    PodStatus::deserialize(status).map_err(|error| format!("its status cannot be understood: {error}"))
}

fn spec<S: DeserializeOwned>(object: &DynamicObject) -> Result<S, String> {
    let spec = object.data.get("spec").cloned().unwrap_or_default();
    serde_json::from_value(spec).map_err(|error| format!("its spec cannot be understood: {error}"))
}

/// Reads a pool.
///
/// # Errors
/// Why it selects nothing.
pub(crate) fn pool(object: &DynamicObject) -> Result<Pool, String> {
    let PoolSpec { selector, target_ports } = spec(object)?;
    if selector.match_labels.is_empty() || target_ports.is_empty() {
        return Err("it has no selector.matchLabels or no targetPorts".to_owned());
    }
    let labels: Vec<String> = selector.match_labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    Ok(Pool { selector: labels.join(","), target_ports: target_ports.iter().map(|port| port.number).collect() })
}

/// Reads the priority that an objective has in a pool. `None`: it is another pool's.
///
/// # Errors
/// Why it has none.
pub(crate) fn priority(object: &DynamicObject, pool: &str) -> Result<Option<i32>, String> {
    let ObjectiveSpec { priority, pool_ref } = spec(object)?;
    Ok((pool_ref.name == pool).then(|| priority.unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn object(spec: &Value) -> DynamicObject {
        serde_json::from_value(json!({"metadata": {"name": "a"}, "spec": spec})).expect("an object")
    }

    #[test]
    fn a_pool_selects_by_labels_and_has_ports() {
        let read = |spec: &Value| pool(&object(spec));
        let spec = json!({
            "selector": {"matchLabels": {"app": "vllm", "tier": "a"}},
            "targetPorts": [{"number": 8000}, {"number": 8001}],
            "endpointPickerRef": {"name": "picker"},
        });
        let expected = Pool { selector: "app=vllm,tier=a".to_owned(), target_ports: vec![8000, 8001] };
        assert_eq!(read(&spec), Ok(expected));
        for (wrong, problem) in [
            (json!({"selector": {"matchLabels": {}}, "targetPorts": [{"number": 1}]}), "matchLabels"),
            (json!({"selector": {"matchLabels": {"a": "b"}}, "targetPorts": []}), "targetPorts"),
            (json!({"selector": {"app": "vllm"}, "targetPortNumber": 8000}), "matchLabels"),
            (Value::Null, "spec"),
        ] {
            assert!(read(&wrong).expect_err("refused").contains(problem), "{wrong}");
        }
    }

    #[test]
    fn an_objective_is_of_one_pool() {
        let read = |spec: &Value| priority(&object(spec), "p");
        assert_eq!(read(&json!({"priority": -3, "poolRef": {"name": "p"}})), Ok(Some(-3)));
        assert_eq!(read(&json!({"poolRef": {"name": "p", "group": "g"}})), Ok(Some(0)), "none is 0");
        assert_eq!(read(&json!({"priority": 1, "poolRef": {"name": "q"}})), Ok(None));
        assert!(read(&json!({"priority": 1})).expect_err("of no pool").contains("poolRef"));
    }

    #[test]
    fn a_pod_has_a_state_or_none_yet() {
        let read = |pod: Value| pod_status(&serde_json::from_value(pod).expect("an object"));
        assert!(read(json!({"metadata": {}})).expect("none yet").pod_ip.is_none());
        let wrong = json!({"metadata": {}, "status": {"conditions": [{"type": "Ready"}]}});
        assert!(read(wrong).expect_err("refused").contains("status"));
    }

    #[test]
    fn kinds_are_named_as_the_api_server_names_them() {
        let url = |kind: &ApiResource| (kind.api_version.clone(), kind.plural.clone());
        assert_eq!(url(&pools()), ("inference.networking.k8s.io/v1".to_owned(), "inferencepools".to_owned()));
        assert_eq!(url(&pods()), ("v1".to_owned(), "pods".to_owned()));
        let objective = url(&objectives(OBJECTIVES[0]));
        let expected = "inference.networking.x-k8s.io/v1alpha2";
        assert_eq!(objective, (expected.to_owned(), "inferenceobjectives".to_owned()));
    }
}
