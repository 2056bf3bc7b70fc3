//! Pools of engines: `InferencePool` of the Gateway API inference extension.

use std::collections::BTreeMap;

use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use serde::Deserialize;

use super::objects::part;

/// Group of the pools.
const GROUP: &str = "inference.networking.k8s.io";

/// `InferencePool`, version 1.
pub(crate) fn pools() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(GROUP, "v1", "InferencePool"))
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

/// A pool of engines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InferencePool {
    /// Selects its pods, as the API server takes it.
    pub(crate) selector: String,
    /// Each of its pods has an engine on each of these.
    pub(crate) target_ports: Vec<u16>,
}

/// Reads a pool.
///
/// # Errors
/// Why it selects nothing.
pub(crate) fn pool(object: &DynamicObject) -> Result<InferencePool, String> {
    let PoolSpec { selector, target_ports } = part(object, "spec")?;
    if selector.match_labels.is_empty() || target_ports.is_empty() {
        return Err("it has no selector.matchLabels or no targetPorts".to_owned());
    }
    let labels: Vec<String> = selector.match_labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    Ok(InferencePool {
        selector: labels.join(","),
        target_ports: target_ports.iter().map(|port| port.number).collect(),
    })
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
        let expected = InferencePool { selector: "app=vllm,tier=a".to_owned(), target_ports: vec![8000, 8001] };
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
    fn the_kind_is_named_as_the_api_server_names_it() {
        let kind = pools();
        let expected = ("inference.networking.k8s.io/v1".to_owned(), "inferencepools".to_owned());
        assert_eq!((kind.api_version, kind.plural), expected);
    }
}
