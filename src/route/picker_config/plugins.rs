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
    /// Says who else holds a prompt, if that is so many tokens more.
    Source(u32),
    /// Says how many tokens an engine would have to compute for another one to do it; `None`: that
    /// is never so.
    Decider(Option<u32>),
    /// Runs profiles of prefill and decode.
    Handler(ProfileNames),
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
    pub(super) fn mode(&self, name: &str, producers: &BTreeMap<String, Mode>) -> Result<Mode> {
        match self {
            Self::In(mode) => Ok(*mode),
            Self::As(producer) => producers.get(producer).copied().ok_or_else(|| {
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

/// The profiles of a handler and its decider, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ProfileNames {
    decode: String,
    prefill: String,
    decider: String,
}

/// What the handler of a file runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stages {
    /// The profile of engines that go on with prompts.
    pub(super) decode: String,
    /// The profile of those that compute prompts for others, with the tokens from which they do.
    pub(super) prefill: Option<(String, u32)>,
    /// The names of both profiles, whether prompts are split or not.
    pub(super) profiles: [String; 2],
}

/// The handler that there is.
///
/// # Errors
/// [`Error::Config`]: its decider is none.
pub(super) fn handler(parts: &BTreeMap<String, Part>) -> Result<Option<Stages>> {
    let names =
        parts.values().find_map(|part| if let PluginKind::Handler(names) = &part.kind { Some(names) } else { None });
    let Some(names) = names else { return Ok(None) };
    let Some(PluginKind::Decider(tokens)) = parts.get(&names.decider).map(|part| &part.kind) else {
        return Err(wrong(
            format!("disagg-profile-handler: `{}` decides on no prefill", names.decider),
            "Name a plugin of type prefix-based-pd-decider or always-disagg-pd-decider as deciders.prefill",
        ));
    };
    let prefill = tokens.map(|tokens| (names.prefill.clone(), tokens));
    let profiles = [names.decode.clone(), names.prefill.clone()];
    Ok(Some(Stages { decode: names.decode.clone(), prefill, profiles }))
}

/// Tokens that another engine must hold beyond the chosen one's for a sidecar to be told of it.
pub(super) fn source_tokens(parts: &BTreeMap<String, Part>) -> Option<u32> {
    parts.values().find_map(|part| if let PluginKind::Source(tokens) = part.kind { Some(tokens) } else { None })
}

/// A plugin as it is used here.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Part {
    pub(super) kind: PluginKind,
    /// What is done otherwise; empty: nothing.
    pub(super) note: String,
}

/// Plugins of the field that are not done here, by part of their type, with what to use instead.
const REFUSED: [(&str, &str); 17] = [
    ("producer", "Remove it: no scorer here reads what it produces"),
    (
        "prefix-cache-affinity-filter",
        "Remove it and use --policy cost without --picker-config, which weighs prefixes against load",
    ),
    ("session-affinity-filter", "Use session-affinity-scorer with a large weight"),
    ("latency", "Remove it and use --policy cost without --picker-config, which predicts the time to the first token"),
    ("slo", "Remove it and use --policy cost without --picker-config, which predicts the time to the first token"),
    ("encode", "Remove it: encoders on engines of their own are not routed here"),
    ("multimodal", "Remove it: encoders on engines of their own are not routed here"),
    ("pd-", "Use disagg-profile-handler with a prefix-based-pd-decider"),
    ("disagg", "Use disagg-profile-handler with a prefix-based-pd-decider"),
    ("prefill", "Use disagg-profile-handler with a prefix-based-pd-decider, and prefill-filter"),
    ("usage-limit", "Remove it: with --queue something is left free for the highest priority"),
    ("by-label", "Remove it and name only engines with that label (--kubernetes-labels)"),
    ("ceiling", "Remove it: with --queue something is left free for the highest priority"),
    ("-detector", "Remove it: with --queue an engine has room by the work that it was given"),
    ("-admi", "Remove it and use --queue, or --in-flight to refuse what is too much"),
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
        "single-profile-handler"
        | "disagg-headers-handler"
        | "dp-rank-header-handler"
        | "models-responder"
        | "openai-parser" => plain(PluginKind::Nothing),
        "decode-filter" | "prefill-filter" => noted(
            PluginKind::Nothing,
            "prefill-filter and decode-filter: engines say what they are by role=prefill or role=decode, pods by the label llm-d.ai/role; one without takes everything",
        ),
        "disagg-profile-handler" => handler_of(&mut given)?,
        "always-disagg-pd-decider" | "prefix-based-pd-decider" => plain(decider(&mut given)?),
        "p2p-source-producer" => {
            given.drop(&["prefixMatchInfoProducerName", "prefillProfileName"]);
            let tokens = given.count("minCachedTokenDelta", 1)? as u32;
            noted(
                PluginKind::Source(tokens),
                "p2p-source-producer: only what lies in another engine's host memory is named, and choosing an engine does not count on it",
            )
        }
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

/// From how many tokens on another engine computes a prompt.
fn decider(given: &mut Parameters<'_>) -> Result<PluginKind> {
    if given.plugin == "always-disagg-pd-decider" {
        return Ok(PluginKind::Decider(Some(1)));
    }
    // 0 switches it off.
    let tokens = given.fields.remove("nonCachedTokens").map_or(Some(0), |value| value.as_u64());
    let tokens = tokens.and_then(|tokens| u32::try_from(tokens).ok());
    let tokens = tokens.ok_or_else(|| given.wrong("nonCachedTokens", "is no count", "Write a whole number"))?;
    Ok(PluginKind::Decider(Some(tokens).filter(|tokens| *tokens > 0)))
}

fn handler_of(given: &mut Parameters<'_>) -> Result<Part> {
    let mut deciders = given.names("deciders")?;
    let mut profiles = given.names("profiles")?;
    if deciders.contains_key("encode") || profiles.contains_key("encode") {
        return Err(wrong(
            "disagg-profile-handler: encoders on engines of their own are not routed here",
            "Remove the encode stage; the engines encode themselves",
        ));
    }
    let decider = given.text("deciderPluginName")?.or_else(|| deciders.remove("prefill"));
    let decider = decider.unwrap_or_else(|| "prefix-based-pd-decider".to_owned());
    let mut profile = |stage: &str| profiles.remove(stage).unwrap_or_else(|| stage.to_owned());
    let names = ProfileNames { decode: profile("decode"), prefill: profile("prefill"), decider };
    let note = "disagg-profile-handler: the engine that computes a prompt is named to a sidecar in x-prefiller-host-port; with --http and --prefill-by router no sidecar is needed";
    Ok(Part { kind: PluginKind::Handler(names), note: note.to_owned() })
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

    /// Names by what they are for.
    fn names(&mut self, name: &str) -> Result<BTreeMap<String, String>> {
        let Some(value) = self.fields.remove(name) else { return Ok(BTreeMap::new()) };
        let fields = value.as_object().cloned().unwrap_or_default();
        let pair = |(key, value): (String, Json)| Some((key, value.as_str()?.to_owned()));
        let read: Option<BTreeMap<_, _>> = fields.into_iter().map(pair).collect();
        read.filter(|_| value.is_object())
            .ok_or_else(|| self.wrong(name, "is no list of names", "Write e.g. prefill: NAME"))
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
