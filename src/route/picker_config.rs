//! `EndpointPickerConfig` files, as the field's endpoint pickers read them: which scorers with
//! which weights, and how to pick.
//!
//! What this router does otherwise or need not be told is noted; what it does not do is refused by
//! name, with what to use instead. A file never means something else here than it says.

mod plugins;

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value as Json};

use super::choose::{Pick, Policy};
use super::router::Mode;
use super::scorers::Scorer;
use kvcellar_block::error::{Error, Result};

/// What a file asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct PickerConfig {
    /// How engines are weighed.
    pub policy: Policy,
    /// Where prefixes are looked up.
    pub mode: Mode,
    /// Engines named beside the chosen one.
    pub fallbacks: usize,
    /// Header that names a session.
    pub session_header: Option<String>,
    /// What is done otherwise than the file's readers may expect.
    pub notes: Vec<String>,
}

const FIELD: &str = "picker-config";

fn wrong(problem: impl Into<String>, remedy: impl Into<String>) -> Error {
    Error::config(FIELD, problem, remedy)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct File {
    api_version: String,
    kind: String,
    #[serde(default)]
    plugins: Vec<Plugin>,
    #[serde(default)]
    scheduling_profiles: Vec<Profile>,
    #[serde(default)]
    feature_gates: Vec<String>,
    #[serde(default)]
    saturation_detector: Json,
    #[serde(default)]
    flow_control: Json,
    #[serde(default)]
    data_layer: Json,
    #[serde(default)]
    parser: Json,
    #[serde(default)]
    request_handler: Json,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Plugin {
    name: Option<String>,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    parameters: Option<Map<String, Json>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    name: String,
    #[serde(default)]
    plugins: Vec<Reference>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Reference {
    plugin_ref: String,
    weight: Option<f64>,
}

/// Versions of the format; they differ in what is refused or noted here anyway.
const VERSIONS: [&str; 4] = [
    "llm-d.ai/v1",
    "llm-d.ai/v1alpha1",
    "inference.networking.x-k8s.io/v1alpha1",
    "config.apix.gateway-api-inference-extension.sigs.k8s.io/v1alpha1",
];

impl PickerConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`].
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::io("reading", path, error, "Name a YAML file of kind EndpointPickerConfig"))?;
        Self::parse(&text)
    }

    /// Reads a file's text.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn parse(text: &str) -> Result<Self> {
        let file: File = serde_saphyr::from_str(text)
            .map_err(|error| wrong(error.to_string(), "Write a YAML document of kind EndpointPickerConfig"))?;
        file.check()?;
        let mut found = BTreeMap::new();
        for plugin in &file.plugins {
            let name = plugin.name.clone().unwrap_or_else(|| plugin.kind.clone());
            let part = plugins::read(&plugin.kind, plugin.parameters.clone().unwrap_or_default())?;
            if found.insert(name.clone(), part).is_some() {
                return Err(wrong(format!("two plugins are called `{name}`"), "Give each a `name` of its own"));
            }
        }
        let used: Vec<(String, f64)> = match file.scheduling_profiles.as_slice() {
            // Without a profile every plugin is used.
            [] => found.keys().map(|name| (name.clone(), 1.0)).collect(),
            [profile] => profile.plugins.iter().map(|it| (it.plugin_ref.clone(), it.weight.unwrap_or(1.0))).collect(),
            [_, second, ..] => {
                return Err(wrong(
                    format!("there is a second scheduling profile, `{}`", second.name),
                    "Keep one: prefill and decode on different engines is not routed here",
                ));
            }
        };
        let mut made = Self {
            policy: Policy::random(),
            mode: Mode::None,
            fallbacks: 0,
            session_header: None,
            notes: file.notes(),
        };
        let producers = plugins::producers(&found);
        let (mut weights, mut pick) = (Vec::new(), Pick::Best);
        for (name, weight) in used {
            let part = found.remove(&name).ok_or_else(|| {
                wrong(
                    format!("the profile names `{name}`, which is no plugin or stands twice"),
                    "List it once under plugins",
                )
            })?;
            if !weight.is_finite() || weight < 0.0 {
                return Err(wrong(format!("the weight of `{name}` is {weight}"), "Write a number of 0 or more"));
            }
            made.note(&part.note);
            match part.kind {
                plugins::PluginKind::Nothing | plugins::PluginKind::Producer(_) => {}
                plugins::PluginKind::Pick { how, fallbacks } => (pick, made.fallbacks) = (how, fallbacks),
                plugins::PluginKind::Prefix(lookup) => {
                    let mode = lookup.mode(&name, &producers)?;
                    if made.mode != Mode::None {
                        return Err(wrong("there are two prefix scorers", "Keep one of them"));
                    }
                    made.mode = mode;
                    weights.push((Scorer::Prefix, weight));
                }
                plugins::PluginKind::Scorer(scorer) => weights.push((scorer, weight)),
                plugins::PluginKind::Session(header) => {
                    made.session_header = Some(header);
                    weights.push((Scorer::Session, weight));
                }
            }
        }
        // Those that no profile names do their work all the same: handlers, headers.
        for part in found.values() {
            made.note(&part.note);
        }
        if weights.is_empty() {
            pick = Pick::Random;
        }
        made.policy = Policy::Scorers(weights, pick);
        Ok(made)
    }

    fn note(&mut self, note: &str) {
        if !note.is_empty() && !self.notes.iter().any(|it| it == note) {
            self.notes.push(note.to_owned());
        }
    }
}

impl File {
    fn check(&self) -> Result<()> {
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
        let is_on = |gate: &&String| !gate.trim().ends_with("=false");
        if let Some(gate) = self.feature_gates.iter().find(is_on) {
            return Err(wrong(
                format!("the feature gate `{gate}` is not known here"),
                "Remove it; for a bound of requests in flight use --in-flight",
            ));
        }
        for (name, value) in [("flowControl", &self.flow_control), ("saturationDetector", &self.saturation_detector)] {
            if !value.is_null() {
                return Err(wrong(format!("`{name}` is not done here"), "Remove it and use --in-flight"));
            }
        }
        Ok(())
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.data_layer.is_null() {
            notes.push(
                "dataLayer: engines are found by --engine and its like, and scraped by the router itself".to_owned(),
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

    const PRECISE: &str = "
apiVersion: llm-d.ai/v1
kind: EndpointPickerConfig
plugins:
- type: tokenizer
  parameters: {modelName: some/model}
- type: single-profile-handler
- type: precise-prefix-cache-scorer
  parameters:
    tokenProcessorConfig: {blockSize: 64, hashSeed: \"42\"}
- name: load
  type: load-aware-scorer
  parameters: {threshold: 10}
- type: kv-cache-utilization-scorer
- type: max-score-picker
  parameters: {maxNumOfEndpoints: 3}
dataLayer:
  sources: []
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: precise-prefix-cache-scorer
    weight: 3.0
  - pluginRef: load
  - pluginRef: kv-cache-utilization-scorer
    weight: 2
  - pluginRef: max-score-picker
";

    fn refused(text: &str) -> String {
        PickerConfig::parse(text).expect_err("refused").to_string()
    }

    fn with(plugins: &str) -> String {
        format!("apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n{plugins}\n")
    }

    #[test]
    fn a_profile_becomes_a_policy() {
        let made = PickerConfig::parse(PRECISE).expect("a policy");
        let weights = vec![(Scorer::Prefix, 3.0), (Scorer::LoadAware { waiting_max: 10 }, 1.0), (Scorer::KvUsage, 2.0)];
        assert_eq!(made.policy, Policy::Scorers(weights, Pick::Best));
        assert_eq!((made.mode, made.fallbacks), (Mode::Precise, 2));
        let notes = made.notes.join("\n");
        assert!(notes.contains("dataLayer") && notes.contains("--tokenizer"), "{notes}");
    }

    #[test]
    fn a_producer_says_where_prefixes_are_looked_up() {
        for (producer, mode) in [
            ("precise-prefix-cache-producer", Mode::Precise),
            ("approx-prefix-cache-producer", Mode::Approximate),
            ("burst-prefix-cache-producer", Mode::Approximate),
        ] {
            let scorer =
                format!("- type: prefix-cache-scorer\n  parameters: {{prefixMatchInfoProducerName: {producer}}}");
            let made = PickerConfig::parse(&with(&format!(
                "- type: {producer}\n{scorer}\nfeatureGates: [\"flowControl=false\"]"
            )));
            let made = made.expect("a policy");
            assert_eq!(made.policy, Policy::Scorers(vec![(Scorer::Prefix, 1.0)], Pick::Best));
            assert_eq!(made.mode, mode, "{producer}");
            assert!(made.notes[0].contains("prefix"), "{:?}", made.notes);
        }
    }

    #[test]
    fn without_a_profile_all_plugins_count_once() {
        let made = PickerConfig::parse(&with(
            "- type: queue-scorer\n- type: prefix-cache-scorer\n- type: weighted-random-picker",
        ));
        let made = made.expect("a policy");
        assert_eq!(made.policy, Policy::Scorers(vec![(Scorer::Prefix, 1.0), (Scorer::Queue, 1.0)], Pick::Weighted));
        assert_eq!(made.mode, Mode::Approximate);
    }

    #[test]
    fn sessions_are_named_by_their_header() {
        let made =
            with("- type: session-affinity-scorer\n  parameters: {algorithm: session_id_header, headerName: x-a}");
        assert_eq!(PickerConfig::parse(&made).expect("a policy").session_header.as_deref(), Some("x-a"));
        assert!(refused(&with("- type: session-affinity-scorer")).contains("session_id_header"));
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        for (plugins, named) in [
            ("- type: pd-profile-handler", "pd-profile-handler"),
            ("- type: prefix-cache-affinity-filter", "--policy cost"),
            ("- type: my-scorer", "my-scorer"),
            ("- type: queue-scorer\n- type: queue-scorer", "two plugins"),
            ("- type: queue-scorer\n  parameters: {threshold: 3}", "threshold"),
            ("- type: load-aware-scorer\n  parameters: {threshold: many}", "threshold"),
            ("- type: prefix-cache-scorer\n  parameters: {prefixLengthWeight: 0.5}", "prefixLengthWeight"),
            ("- type: prefix-cache-scorer\n- type: precise-prefix-cache-scorer", "two prefix scorers"),
            ("- type: prefix-cache-scorer\n  parameters: {prefixMatchInfoProducerName: x}", "`x`"),
            ("- type: p2p-source-producer", "p2p-source-producer"),
            ("- type: mm-embeddings-cache-producer", "mm-embeddings-cache-producer"),
            ("- type: burst-prefix-cache-producer\n  parameters: {maxPerReplica: 2}", "maxPerReplica"),
            ("- type: queue-scorer\nfeatureGates: [flowControl]", "flowControl"),
            ("- type: queue-scorer\nsaturationDetector: {queueDepthThreshold: 5}", "--in-flight"),
            ("- type: queue-scorer\nschedulingProfiles: [{name: a, plugins: [{pluginRef: b}]}]", "`b`"),
            (
                "- type: queue-scorer\nschedulingProfiles: [{name: a, plugins: [{pluginRef: queue-scorer, weight: -1}]}]",
                "-1",
            ),
            ("- type: queue-scorer\nschedulingProfiles: [{name: a}, {name: decode}]", "`decode`"),
            ("- type: queue-scorer\nschedulers: 3", "schedulers"),
        ] {
            let error = refused(&with(plugins));
            assert!(error.contains(named), "{plugins}: {error}");
        }
        assert!(refused("apiVersion: v1\nkind: EndpointPickerConfig").contains("apiVersion"));
        assert!(refused("apiVersion: llm-d.ai/v1\nkind: Pod").contains("Pod"));
        assert!(refused(": : :").contains("EndpointPickerConfig"));
    }
}
