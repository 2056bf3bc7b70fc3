//! A file as it is written.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value as Json};

use super::{QueueWish, wrong};
use kvcellar_block::error::Result;

/// The feature gate that lets requests wait.
const FLOW_CONTROL: &str = "flowControl";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct File {
    pub(super) api_version: String,
    pub(super) kind: String,
    #[serde(default)]
    pub(super) plugins: Vec<Plugin>,
    #[serde(default)]
    pub(super) scheduling_profiles: Vec<Profile>,
    #[serde(default)]
    pub(super) feature_gates: Vec<String>,
    #[serde(default)]
    pub(super) saturation_detector: Json,
    #[serde(default)]
    pub(super) flow_control: Option<FlowControl>,
    #[serde(default)]
    pub(super) data_layer: Json,
    #[serde(default)]
    pub(super) parser: Json,
    #[serde(default)]
    pub(super) request_handler: Json,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Plugin {
    pub(super) name: Option<String>,
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) parameters: Option<Map<String, Json>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Profile {
    pub(super) name: String,
    #[serde(default)]
    pub(super) plugins: Vec<Reference>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Reference {
    pub(super) plugin_ref: String,
    pub(super) weight: Option<f64>,
}

/// Of flow control, what is done here.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct FlowControl {
    max_requests: Option<Json>,
    max_bytes: Option<Json>,
    #[serde(rename = "defaultRequestTTL")]
    default_request_ttl: Option<String>,
    #[serde(flatten)]
    more: BTreeMap<String, Json>,
}

/// Versions of the format; they differ in what is refused or noted here anyway.
const VERSIONS: [&str; 4] = [
    "llm-d.ai/v1",
    "llm-d.ai/v1alpha1",
    "inference.networking.x-k8s.io/v1alpha1",
    "config.apix.gateway-api-inference-extension.sigs.k8s.io/v1alpha1",
];

/// A feature gate that is not switched off.
fn is_on(gate: &str) -> bool {
    !gate.trim().ends_with("=false")
}

/// Whole seconds of a duration as Go writes it, of hours, minutes and seconds.
fn seconds_of(text: &str) -> Option<u64> {
    let mut left = text.trim();
    let mut seconds = 0;
    for (unit, worth) in [('h', 3600), ('m', 60), ('s', 1)] {
        if let Some((count, rest)) = left.split_once(unit) {
            seconds = count.parse::<u64>().ok()?.checked_mul(worth)?.checked_add(seconds)?;
            left = rest;
        }
    }
    (left.is_empty() && seconds > 0).then_some(seconds)
}

impl File {
    /// What the file is, and what it asks for that nobody does here.
    ///
    /// # Errors
    /// Names the field.
    pub(super) fn check(&self) -> Result<()> {
        if self.kind != "EndpointPickerConfig" {
            return Err(wrong(format!("the kind is `{}`", self.kind), "Name a file of kind EndpointPickerConfig"));
        }
        if !VERSIONS.contains(&self.api_version.as_str()) {
            let known = VERSIONS.join(", ");
            return Err(wrong(
                format!("`apiVersion: {}` is not known", self.api_version),
                format!("Write one of {known}"),
            ));
        }
        let unknown = self.feature_gates.iter().find(|gate| is_on(gate) && gate.trim() != FLOW_CONTROL);
        if let Some(gate) = unknown {
            return Err(wrong(format!("the feature gate `{gate}` is not known here"), "Remove it"));
        }
        if !self.saturation_detector.is_null() {
            return Err(wrong(
                "`saturationDetector` is not done here: an engine has room by the work that it was given",
                "Remove it; --queue-backlog-ms and --queue-concurrency bound that work, and --in-flight all requests",
            ));
        }
        let unknown = self.flow_control.iter().flat_map(|it| it.more.keys()).next();
        if let Some(name) = unknown {
            return Err(wrong(
                format!("`flowControl.{name}` is not done here"),
                "Remove it: as with --queue an engine has room by the work that it was given, flows of one priority take turns, and priorities are those of --objective",
            ));
        }
        Ok(())
    }

    /// The queue that it asks for, by a feature gate or by naming its bounds.
    ///
    /// # Errors
    /// Names the field.
    pub(super) fn queue(&self) -> Result<Option<QueueWish>> {
        let is_wanted = self.feature_gates.iter().any(|gate| is_on(gate));
        let Some(flow) = self.flow_control.as_ref() else { return Ok(is_wanted.then(QueueWish::default)) };
        let bad = |name: &str, remedy: &str| wrong(format!("`flowControl.{name}` is not understood"), remedy);
        let requests = flow.max_requests.as_ref().map(|value| {
            let count = value.as_u64().filter(|count| *count > 0);
            count.map(|count| count as usize).ok_or_else(|| bad("maxRequests", "Write a whole number of 1 or more"))
        });
        let bytes = flow.max_bytes.as_ref().map(|value| match value {
            Json::String(text) => Ok(text.clone()),
            Json::Number(number) => Ok(number.to_string()),
            _ => Err(bad("maxBytes", "Write a size, e.g. 1Gi")),
        });
        let seconds = flow.default_request_ttl.as_deref().map(|text| {
            seconds_of(text).ok_or_else(|| bad("defaultRequestTTL", "Write minutes, seconds or both, e.g. 1m30s"))
        });
        let (requests, bytes, seconds) = (requests.transpose()?, bytes.transpose()?, seconds.transpose()?);
        Ok(Some(QueueWish { requests, bytes, seconds }))
    }

    /// What is done otherwise than the file's readers may expect.
    pub(super) fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.data_layer.is_null() {
            notes.push(
                "dataLayer: engines are found by --engine and its like, and scraped by the router itself".to_owned(),
            );
        }
        if self.flow_control.is_some() || self.feature_gates.iter().any(|gate| is_on(gate)) {
            notes.push(
                "flowControl: requests wait as with --queue, whose other options say when an engine has room and what priorities are".to_owned(),
            );
        }
        if !self.parser.is_null() || !self.request_handler.is_null() {
            notes.push("parser: requests are read as the OpenAI API".to_owned());
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_go_writes_them() {
        assert_eq!(["60s", "1m30s", "2h", "1h0m5s"].map(seconds_of), [Some(60), Some(90), Some(7200), Some(3605)]);
        assert_eq!(["", "60", "1.5s", "100ms", "s", "0s", "5124095576030432h"].map(seconds_of), [None; 7]);
    }
}
