//! `EndpointPickerConfig` files, as the field's endpoint pickers read them: which scorers with
//! which weights, and how to pick.
//!
//! What this router does otherwise or need not be told is noted; what it does not do is refused by
//! name, with what to use instead. A file never means something else here than it says.

mod file;
mod plugins;
mod weighed;

use std::collections::BTreeMap;
use std::path::Path;

use super::choose::Policy;
use super::router::Mode;
use file::File;
use kvcellar_block::error::{Error, Result};
use weighed::{Used, Weighed};

/// What a file asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct PickerConfig {
    /// How engines are weighed.
    pub policy: Policy,
    /// How prompts come to be computed by another engine, if they do.
    pub prefill: Option<PrefillProfile>,
    /// Tokens that another engine must hold for a sidecar to be told of it, if sidecars are told.
    pub source_tokens: Option<u32>,
    /// What may wait for engines to have room, if requests wait.
    pub queue: Option<QueueWish>,
    /// Where prefixes are looked up.
    pub mode: Mode,
    /// Engines named beside the chosen one.
    pub fallbacks: usize,
    /// Header that names a session.
    pub session_header: Option<String>,
    /// What is done otherwise than the file's readers may expect.
    pub notes: Vec<String>,
}

/// How prompts come to be computed by another engine than the one that goes on with them.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefillProfile {
    /// How the engines that compute them are weighed.
    pub policy: Policy,
    /// Tokens that an engine would have to compute for the split.
    pub tokens_min: u32,
}

/// What of a queue a file names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QueueWish {
    /// Requests.
    pub requests: Option<usize>,
    /// Bytes of their bodies, as a text with a unit.
    pub bytes: Option<String>,
    /// Seconds that a request waits at most.
    pub seconds: Option<u64>,
}

const FIELD: &str = "picker-config";

fn wrong(problem: impl Into<String>, remedy: impl Into<String>) -> Error {
    Error::config(FIELD, problem, remedy)
}

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
        let handler = plugins::handler(&found)?;
        let producers = plugins::producers(&found);
        let read = |used: Used<'_>| Weighed::read(used, &found, &producers);
        let (main, prefill) = match (file.scheduling_profiles.as_slice(), handler) {
            // Without a profile every plugin is used.
            ([], None) => (read(Used::all(&found))?, None),
            ([profile], None) => (read(Used::of(profile))?, None),
            ([_, second, ..], None) => {
                return Err(wrong(
                    format!("there is a second scheduling profile, `{}`, and no plugin that runs it", second.name),
                    "Keep one profile, or add a disagg-profile-handler for prefill and decode on different engines",
                ));
            }
            (profiles, Some(handler)) => {
                let is_run = |name: &str| handler.profiles.iter().any(|it| it == name);
                if let Some(profile) = profiles.iter().find(|profile| !is_run(&profile.name)) {
                    return Err(wrong(
                        format!("nothing runs the scheduling profile `{}`", profile.name),
                        "Remove it: disagg-profile-handler runs those of decode and prefill",
                    ));
                }
                let find = |name: &str| {
                    let found = profiles.iter().find(|profile| profile.name == name);
                    let missing = || wrong(format!("there is no scheduling profile `{name}`"), "Write it");
                    read(Used::of(found.ok_or_else(missing)?))
                };
                let decode = find(&handler.decode)?;
                let prefill = handler.prefill.map(|(name, tokens_min)| Ok((find(&name)?, tokens_min))).transpose()?;
                (decode, prefill)
            }
        };
        let mut made = Self {
            policy: main.policy(),
            prefill: None,
            source_tokens: plugins::source_tokens(&found),
            queue: file.queue()?,
            mode: main.mode,
            fallbacks: main.fallbacks,
            session_header: main.session_header.clone(),
            notes: file.notes(),
        };
        if let Some((weighed, tokens_min)) = prefill {
            if ![Mode::None, made.mode].contains(&weighed.mode) && made.mode != Mode::None {
                return Err(wrong("the profiles look prefixes up in different ways", "Let both use one producer"));
            }
            made.mode = if made.mode == Mode::None { weighed.mode } else { made.mode };
            made.prefill = Some(PrefillProfile { policy: weighed.policy(), tokens_min });
        }
        if made.source_tokens.is_some() && made.mode != Mode::Precise {
            return Err(wrong(
                "p2p-source-producer: without the engines' events nobody knows what lies in host memory",
                "Look prefixes up by a precise-prefix-cache-producer",
            ));
        }
        // Those that no profile names do their work all the same: handlers, headers.
        for part in found.values() {
            made.note(&part.note);
        }
        Ok(made)
    }

    fn note(&mut self, note: &str) {
        if !note.is_empty() && !self.notes.iter().any(|it| it == note) {
            self.notes.push(note.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choose::Pick;
    use crate::scorers::Scorer;

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

    const SPLIT: &str = "
- type: approx-prefix-cache-producer
- type: prefix-cache-scorer
- type: queue-scorer
- type: prefill-filter
- type: decode-filter
- type: prefix-based-pd-decider
  parameters: {nonCachedTokens: 256}
- type: disagg-profile-handler
  parameters: {deciders: {prefill: prefix-based-pd-decider}, profiles: {decode: goes-on}}
schedulingProfiles:
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: queue-scorer}]
- name: goes-on
  plugins: [{pluginRef: decode-filter}, {pluginRef: prefix-cache-scorer, weight: 2}, {pluginRef: queue-scorer}]
";

    #[test]
    fn two_profiles_are_two_policies() {
        let made = PickerConfig::parse(&with(SPLIT)).expect("policies");
        let decode = vec![(Scorer::Prefix, 2.0), (Scorer::Queue, 1.0)];
        assert_eq!(made.policy, Policy::Scorers(decode, Pick::Best));
        let prefill = Policy::Scorers(vec![(Scorer::Queue, 1.0)], Pick::Best);
        assert_eq!(made.prefill, Some(PrefillProfile { policy: prefill, tokens_min: 256 }));
        assert_eq!(made.mode, Mode::Approximate);
        assert!(made.notes.iter().any(|note| note.contains("llm-d.ai/role")), "{:?}", made.notes);
        let third = with(&format!("{SPLIT}- name: other\n"));
        assert!(refused(&third).contains("`other`"));
        let off = PickerConfig::parse(&with(&SPLIT.replace("256", "0"))).expect("a policy");
        assert_eq!(off.prefill, None, "0 switches the split off");
    }

    /// Files as the field writes them, where they lie beside this project: each is read, or refused
    /// with a remedy.
    #[test]
    fn files_of_the_field() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/picker-configs");
        let Ok(files) = std::fs::read_dir(folder) else { return };
        for file in files {
            let path = file.expect("a file").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if path.extension().is_none_or(|extension| extension != "yaml") {
                continue;
            }
            let read = PickerConfig::open(&path);
            let remedy = match name.as_str() {
                "sim-e-p-d-epp-config.yaml" => "encoders on engines of their own",
                "probabilistic-admitter-epp-config.yaml" | "soft-reflective-ceiling-epp-config.yaml" => "--queue",
                _ => {
                    let made = read.unwrap_or_else(|error| panic!("{name}: {error}"));
                    assert_eq!(made.prefill.is_some(), name.contains("pd-"), "{name}");
                    continue;
                }
            };
            let error = read.expect_err(&name).to_string();
            assert!(error.contains(remedy), "{name}: {error}");
        }
    }

    #[test]
    fn flow_control_is_the_queue() {
        let wish =
            |more: &str| PickerConfig::parse(&with(&format!("- type: queue-scorer\n{more}"))).expect("read").queue;
        assert_eq!(wish(""), None);
        assert_eq!(wish("featureGates: [flowControl]"), Some(QueueWish::default()));
        let all = wish("flowControl: {maxRequests: 70, maxBytes: 1Gi, defaultRequestTTL: 1m30s}");
        assert_eq!(all, Some(QueueWish { requests: Some(70), bytes: Some("1Gi".to_owned()), seconds: Some(90) }));
    }

    #[test]
    fn sources_are_told_to_sidecars() {
        let text = with(
            "- type: precise-prefix-cache-scorer\n- type: p2p-source-producer\n  parameters: {minCachedTokenDelta: 64}",
        );
        assert_eq!(PickerConfig::parse(&text).expect("a policy").source_tokens, Some(64));
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
            ("- type: pd-profile-handler", "disagg-profile-handler"),
            ("- type: prefix-cache-affinity-filter", "--policy cost"),
            ("- type: my-scorer", "my-scorer"),
            ("- type: queue-scorer\n- type: queue-scorer", "two plugins"),
            ("- type: queue-scorer\n  parameters: {threshold: 3}", "threshold"),
            ("- type: load-aware-scorer\n  parameters: {threshold: many}", "threshold"),
            ("- type: prefix-cache-scorer\n  parameters: {prefixLengthWeight: 0.5}", "prefixLengthWeight"),
            ("- type: prefix-cache-scorer\n- type: precise-prefix-cache-scorer", "two prefix scorers"),
            ("- type: prefix-cache-scorer\n  parameters: {prefixMatchInfoProducerName: x}", "`x`"),
            ("- type: p2p-source-producer\n- type: prefix-cache-scorer", "precise-prefix-cache-producer"),
            ("- type: p2p-source-producer\n  parameters: {minCachedTokenDelta: 0}", "minCachedTokenDelta"),
            ("- type: mm-embeddings-cache-producer", "mm-embeddings-cache-producer"),
            ("- type: burst-prefix-cache-producer\n  parameters: {maxPerReplica: 2}", "maxPerReplica"),
            ("- type: queue-scorer\nfeatureGates: [crystalBall]", "crystalBall"),
            ("- type: queue-scorer\nflowControl: {priorityBands: []}", "flowControl.priorityBands"),
            ("- type: queue-scorer\nflowControl: {maxRequests: 0}", "maxRequests"),
            ("- type: queue-scorer\nflowControl: {defaultRequestTTL: soon}", "defaultRequestTTL"),
            ("- type: soft-reflective-ceiling-policy", "--queue"),
            ("- type: probabilistic-admitter", "--queue"),
            ("- type: disagg-profile-handler", "prefix-based-pd-decider"),
            ("- type: disagg-profile-handler\n  parameters: {deciders: {encode: x}}", "encode stage"),
            ("- type: disagg-profile-handler\n  parameters: {deciders: 3}", "deciders"),
            (
                "- type: always-disagg-pd-decider\n- type: disagg-profile-handler\n  parameters: {deciders: {prefill: always-disagg-pd-decider}}",
                "`decode`",
            ),
            ("- type: prefix-based-pd-decider\n  parameters: {nonCachedTokens: few}", "nonCachedTokens"),
            (
                "- type: max-score-picker\n- type: random-picker\nschedulingProfiles: [{name: a, plugins: [{pluginRef: max-score-picker}, {pluginRef: random-picker}]}]",
                "two pickers",
            ),
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
