//! What each type of plugin becomes here.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json};

use super::wrong;
use crate::choose::Pick;
use crate::router::Mode;
use crate::scorers::Scorer;
use kvcellar_block::error::{Error, Result};

/// What a plugin does to a decision.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum PluginKind {
    /// Done anyway, or not needed.
    Nothing,
    /// One scorer.
    Scorer(Scorer),
    /// The prefix scorer, and where prefixes are looked up.
    Prefix(Lookup),
    /// Says where prefixes are looked up.
    Producer(Mode),
    /// The session scorer, with its header.
    Session(String),
    /// What is made of the scores, and how many engines are named beside the chosen one.
    Pick { how: Pick, fallbacks: usize },
}

/// Where prefixes are looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Lookup {
    /// There.
    In(Mode),
    /// Where the producer of this name does.
    As(String),
}

impl Lookup {
    /// The mode in which the scorer `name` looks prefixes up.
    ///
    /// # Errors
    /// [`Error::Config`]: there is no such producer.
    pub(super) fn mode(self, name: &str, producers: &BTreeMap<String, Mode>) -> Result<Mode> {
        match self {
            Self::In(mode) => Ok(mode),
            Self::As(producer) => producers.get(&producer).copied().ok_or_else(|| {
                wrong(
                    format!("`{name}` reads from `{producer}`, which produces no prefixes"),
                    "Name a plugin of type approx-, burst- or precise-prefix-cache-producer",
                )
            }),
        }
    }
}

/// Those that say where prefixes are looked up, by name.
pub(super) fn producers(parts: &BTreeMap<String, Part>) -> BTreeMap<String, Mode> {
    let mode = |part: &Part| if let PluginKind::Producer(mode) = part.kind { Some(mode) } else { None };
    parts.iter().filter_map(|(name, part)| Some((name.clone(), mode(part)?))).collect()
}

/// A plugin as it is used here.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Part {
    pub(super) kind: PluginKind,
    /// What is done otherwise; empty: nothing.
    pub(super) note: String,
}

/// Plugins of the field that are not done here, by part of their type, with what to use instead.
const REFUSED: [(&str, &str); 14] = [
    ("p2p-source-producer", "Remove it: engines are not told where else a prefix lies"),
    ("producer", "Remove it: no scorer here reads what it produces"),
    (
        "prefix-cache-affinity-filter",
        "Remove it and use --policy cost without --picker-config, which weighs prefixes against load",
    ),
    ("session-affinity-filter", "Use session-affinity-scorer with a large weight"),
    ("latency", "Remove it and use --policy cost without --picker-config, which predicts the time to the first token"),
    ("slo", "Remove it and use --policy cost without --picker-config, which predicts the time to the first token"),
    ("pd-", "Remove it: prefill and decode on different engines is not routed here"),
    ("disagg", "Remove it: prefill and decode on different engines is not routed here"),
    ("prefill", "Remove it: prefill and decode on different engines is not routed here"),
    ("encode", "Remove it: encoders on engines of their own are not routed here"),
    ("by-label", "Remove it and name only engines with that label (--kubernetes-labels)"),
    ("-admi", "Remove it and use --in-flight"),
    ("filter", "Remove it: engines are left out when they are unhealthy, draining, or do not serve the model"),
    ("picker", "Use max-score-picker, weighted-random-picker or random-picker"),
];

/// Parameters of guesses that are the router's own.
const GUESSED: [&str; 8] = [
    "maxModelLen",
    "autoTune",
    "blockSize",
    "hashBlockSize",
    "blockSizeTokens",
    "maxPrefixBlocksToMatch",
    "maxPrefixTokensToMatch",
    "lruCapacityPerServer",
];

const GUESS_NOTE: &str = "prefixes in approximate mode: blocks of 64 tokens, 2048 of them at most; what each engine holds is bounded by what it says and learned from its answers";

/// Reads one plugin.
///
/// # Errors
/// [`Error::Config`] names plugin and parameter.
pub(super) fn read(kind: &str, parameters: Map<String, Json>) -> Result<Part> {
    let mut given = Parameters { plugin: kind, fields: parameters };
    let plain = |kind| Part { kind, note: String::new() };
    let noted = |kind, note: &str| Part { kind, note: note.to_owned() };
    let part = match kind {
        "queue-scorer" | "queue-depth-scorer" => plain(PluginKind::Scorer(Scorer::Queue)),
        "kv-cache-utilization-scorer" | "kv-cache-scorer" => plain(PluginKind::Scorer(Scorer::KvUsage)),
        "running-requests-size-scorer" => plain(PluginKind::Scorer(Scorer::Running)),
        "lora-affinity-scorer" => plain(PluginKind::Scorer(Scorer::Adapter)),
        "no-hit-lru-scorer" => {
            given.drop(&["prefixPluginName", "prefixPluginType", "lruSize"]);
            plain(PluginKind::Scorer(Scorer::Cold))
        }
        "active-request-scorer" => {
            given.drop(&["requestTimeout", "inFlightLoadProducerName"]);
            given.only("idleThreshold", 0.0)?;
            given.only("maxBusyScore", 1.0)?;
            plain(PluginKind::Scorer(Scorer::ActiveRequests))
        }
        "load-aware-scorer" => {
            let waiting_max = given.count("threshold", 128)? as u32;
            plain(PluginKind::Scorer(Scorer::LoadAware { waiting_max }))
        }
        "token-load-scorer" => {
            given.only("nonTextTokenWeight", 1.0)?;
            let tokens_max = given.count("queueThresholdTokens", 4 << 20)?;
            plain(PluginKind::Scorer(Scorer::TokenLoad { tokens_max }))
        }
        _ if kind.contains("prefix-cache-scorer") || kind.ends_with("prefix-cache-producer") => {
            prefixes(kind, &mut given)?
        }
        "session-affinity-scorer" => session(&mut given)?,
        "max-score-picker" | "random-picker" | "weighted-random-picker" => {
            let fallbacks = given.count("maxNumOfEndpoints", 1)? as usize - 1;
            let how = match kind {
                "max-score-picker" => Pick::Best,
                "random-picker" => Pick::Random,
                _ => Pick::Weighted,
            };
            plain(PluginKind::Pick { how, fallbacks })
        }
        "single-profile-handler" | "dp-rank-header-handler" | "models-responder" | "openai-parser" => {
            plain(PluginKind::Nothing)
        }
        "decode-filter" => noted(PluginKind::Nothing, "decode-filter: every engine is taken to prefill and to decode"),
        "tokenizer" | "token-producer" => {
            given.fields.clear();
            noted(PluginKind::Nothing, "tokenizer: tokens are made in this process, see --tokenizer")
        }
        "passthrough-parser" => noted(
            PluginKind::Nothing,
            "passthrough-parser: bodies of the known paths are read for their model; what cannot be read is refused",
        ),
        "inflight-load-producer" => {
            noted(PluginKind::Nothing, "inflight-load-producer: the router finds out for itself")
        }
        _ if kind.ends_with("-source") || kind.ends_with("-extractor") => {
            given.fields.clear();
            let note = format!("{kind}: the router finds out for itself");
            Part { kind: PluginKind::Nothing, note }
        }
        _ => return Err(refuse(kind)),
    };
    given.done()?;
    Ok(part)
}

/// Those that look for prefixes.
fn prefixes(kind: &str, given: &mut Parameters<'_>) -> Result<Part> {
    match kind {
        "prefix-cache-scorer" => {
            given.only("prefixLengthWeight", 0.0)?;
            given.only("matchLengthWeight", 0.0)?;
            given.drop(&["matchLengthScaleTokens"]);
            if let Some(producer) = given.text("prefixMatchInfoProducerName")? {
                return Ok(Part { kind: PluginKind::Prefix(Lookup::As(producer)), note: String::new() });
            }
            given.drop(&GUESSED);
            Ok(Part { kind: PluginKind::Prefix(Lookup::In(Mode::Approximate)), note: GUESS_NOTE.to_owned() })
        }
        "approx-prefix-cache-producer" => {
            given.drop(&GUESSED);
            Ok(Part { kind: PluginKind::Producer(Mode::Approximate), note: GUESS_NOTE.to_owned() })
        }
        "burst-prefix-cache-producer" => {
            given.drop(&["windowDurationMs"]);
            given.only("maxPerReplica", -1.0)?;
            given.only("minColocateBlocks", 0.0)?;
            let note = "burst-prefix-cache-producer: nobody waits for a window: what was sent to an engine counts as held from that moment on, so that the rest of a burst follows the first";
            Ok(Part { kind: PluginKind::Producer(Mode::Approximate), note: note.to_owned() })
        }
        "precise-prefix-cache-scorer" | "precise-prefix-cache-producer" => {
            given.drop(&["kvEventsConfig", "indexerConfig", "tokenProcessorConfig", "kvBlockIndexConfig"]);
            given.drop(&["speculativeIndexing", "speculativeTTL", "tokenizersPoolConfig", "kvCacheBackendConfigs"]);
            let note = format!(
                "{kind}: block sizes come from the engines' events, their addresses from --engine and its like, tokens from --tokenizer"
            );
            let kind = if kind.ends_with("-scorer") {
                PluginKind::Prefix(Lookup::In(Mode::Precise))
            } else {
                PluginKind::Producer(Mode::Precise)
            };
            Ok(Part { kind, note })
        }
        _ => Err(refuse(kind)),
    }
}

fn session(given: &mut Parameters<'_>) -> Result<Part> {
    match given.text("algorithm")?.as_deref() {
        Some("session_id_header") => {}
        _ => {
            return Err(wrong(
                "session-affinity-scorer: sessions are known by an id that the client sends, not by an engine's name in its header",
                "Write `algorithm: session_id_header` among its parameters",
            ));
        }
    }
    given.drop(&["evictionTtlSeconds", "evictionSweepSeconds", "missThreshold"]);
    let header = given.text("headerName")?.unwrap_or_else(|| "x-session-token".to_owned());
    let note = "session-affinity-scorer: sessions are kept until room is needed, not for a time".to_owned();
    Ok(Part { kind: PluginKind::Session(header), note })
}

fn refuse(kind: &str) -> Error {
    let known = REFUSED.iter().find(|(part, _)| kind.contains(part));
    let remedy = known.map_or("Remove it; `kvcellar route --help` lists what weighs here", |(_, remedy)| remedy);
    wrong(format!("the plugin type `{kind}` is not done here"), remedy)
}

struct Parameters<'t> {
    plugin: &'t str,
    fields: Map<String, Json>,
}

impl Parameters<'_> {
    fn wrong(&self, name: &str, problem: &str, remedy: &str) -> Error {
        wrong(format!("{}: the parameter `{name}` {problem}", self.plugin), remedy)
    }

    /// A count of 1 or more.
    fn count(&mut self, name: &str, default: u64) -> Result<u64> {
        let Some(value) = self.fields.remove(name) else { return Ok(default) };
        let count = value.as_u64().filter(|count| (1..=u64::from(u32::MAX)).contains(count));
        count.ok_or_else(|| self.wrong(name, "is no count", "Write a whole number of 1 or more"))
    }

    fn text(&mut self, name: &str) -> Result<Option<String>> {
        match self.fields.remove(name) {
            None => Ok(None),
            Some(Json::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(name, "is no text", "Write it as text")),
        }
    }

    /// A parameter that may only have its default value.
    fn only(&mut self, name: &str, default: f64) -> Result<()> {
        match self.fields.remove(name).map(|value| value.as_f64()) {
            None => Ok(()),
            Some(Some(value)) if (value - default).abs() < 1e-9 => Ok(()),
            Some(_) => Err(self.wrong(name, "is not done here", "Remove it")),
        }
    }

    /// Parameters without a meaning here, which the plugin's note accounts for.
    fn drop(&mut self, names: &[&str]) {
        self.fields.retain(|name, _| !names.contains(&name.as_str()));
    }

    fn done(&self) -> Result<()> {
        match self.fields.keys().next() {
            Some(name) => Err(self.wrong(name, "is not known", "Remove it")),
            None => Ok(()),
        }
    }
}
