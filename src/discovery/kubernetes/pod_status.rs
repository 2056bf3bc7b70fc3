//! What the cluster says of a pod's state.

use kube::api::{ApiResource, GroupVersionKind};
use serde::Deserialize;

/// `Pod`, version 1.
pub(crate) fn pods() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Pod"))
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

impl PodStatus {
    /// The pod can take requests.
    pub(crate) fn is_ready(&self) -> bool {
        self.conditions.iter().flatten().any(|it| it.name == "Ready" && it.status == "True")
    }

    /// The pod has ended.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.phase.as_deref(), Some("Succeeded" | "Failed"))
    }
}
