//! Whether engines' events come, as far as a router can tell: it knows who answers requests.
//!
//! An engine whose events were configured and do not come looks empty for ever, and nothing else
//! would say so. Silence alone is no fault: an engine that nobody asks has nothing to tell.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kvcellar_index::fleet::{FleetView, SourceState};

use super::engine::Engine;
use super::engines::Engines;

/// How long after its first answer an engine's first batch may come, and how long a line may be
/// down.
const PATIENCE: Duration = Duration::from_secs(10);
const EVERY: Duration = Duration::from_secs(1);

/// What is wrong with an engine's events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamFault {
    /// There is no connection to its address.
    Down,
    /// The line is up and the engine has computed prompts, but no batch has ever come.
    Silent,
}

impl StreamFault {
    /// In answers and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Silent => "silent",
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Down => {
                "Is that the address of its publisher (kv_events_config.endpoint), and can this machine reach it?"
            }
            Self::Silent => "Was it started with enable_kv_cache_events and publisher \"zmq\" in --kv-events-config?",
        }
    }
}

/// What is wrong with this engine's events, if anything is.
fn fault(engine: &Engine, source: &SourceState) -> Option<StreamFault> {
    if !engine.is_usable() {
        return None;
    }
    if !source.connected {
        return (source.since.elapsed() >= PATIENCE).then_some(StreamFault::Down);
    }
    let is_due = engine.first_answer().is_some_and(|ago| ago >= PATIENCE);
    (source.heard.is_none() && is_due).then_some(StreamFault::Silent)
}

/// All faults, by engine.
pub fn faults(engines: &Engines, fleet: &FleetView) -> BTreeMap<String, StreamFault> {
    let sources = fleet.sources();
    let of = |engine: &Arc<Engine>| {
        let source = sources.get(&engine.spec.name)?;
        Some((engine.spec.name.clone(), fault(engine, source)?))
    };
    engines.all().iter().filter_map(of).collect()
}

/// Says each fault once, for ever.
pub async fn keep(engines: Arc<Engines>, fleet: FleetView) {
    let mut said = BTreeSet::new();
    loop {
        tokio::time::sleep(EVERY).await;
        let found = faults(&engines, &fleet);
        said.retain(|name| found.contains_key(name));
        for (name, fault) in found {
            if said.insert(name.clone()) {
                let address = engines.find(&name).and_then(|engine| engine.spec.events.clone()).unwrap_or_default();
                let what = match fault {
                    StreamFault::Down => "cannot be reached",
                    StreamFault::Silent => "bring nothing although it answers requests",
                };
                log::warn!(
                    "{name}: its events ({address}) {what}: what it holds is not known, and it is routed to by load \
                     alone. {}",
                    fault.remedy()
                );
            }
        }
    }
}
