//! Who else holds a prompt's KV: the engine that gets a request may fetch it there, in place of
//! computing it. The index knows; engines that can fetch are told.
//!
//! Named is only what the other engine holds in host memory, whole from the prompt's beginning:
//! its GPU is not disturbed by a fetch, and what lies on its disk it would have to load first. A
//! hint is no promise. The engine asks the other one, and computes what is not there.

use std::sync::Arc;

use serde_json::json;

use super::engine::Engine;
use super::prefix;
use kvcellar_index::Index;
use kvcellar_index::query::PrefixScorer;
use kvcellar_index::tiers::{FleetTier, Weights};

/// Who is told of another engine that holds a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum HintsFor {
    /// Nobody.
    #[default]
    Nobody,
    /// A sidecar of the engine, by the header `x-kv-cache-source-host-port`.
    Sidecar,
    /// vLLM itself, by `kv_transfer_params` in the body: its `OffloadingConnector` with a tier of
    /// type `p2p` fetches.
    Engine,
}

/// The header in which a sidecar finds the engine that holds the prompt.
pub const SOURCE: &str = "x-kv-cache-source-host-port";

/// The port at which vLLM's tier `p2p` answers others, unless it is told otherwise. Data-parallel
/// ranks answer at those after it.
const PEER_PORT: u16 = 5710;

/// How sources are named.
#[derive(Debug, Clone, Copy, Default)]
pub struct SourceHints {
    /// Who is told.
    pub to: HintsFor,
    /// Tokens that another engine must hold beyond those of the chosen one.
    pub tokens_min: u32,
}

/// An engine that holds more of a prompt than the one that was chosen.
#[derive(Debug, Clone)]
pub struct KvSource {
    /// The engine.
    pub engine: Arc<Engine>,
    /// Its data-parallel rank, where it has several.
    pub rank: Option<u32>,
    /// Tokens of the prompt's beginning that it holds in host memory.
    pub tokens: u32,
}

impl KvSource {
    /// The engine of `engines` to fetch a prompt from. `beside`: the engine that is to fetch, and
    /// the tokens that it holds itself; `block`: tokens of a block of the index.
    ///
    /// Of those that hold the most, up to a block, one is drawn: the more requests wait there, the
    /// less often.
    pub fn choose(
        index: &Index,
        keys: &[u64],
        prompt: u32,
        engines: &[Arc<Engine>],
        beside: (&Engine, u32),
        tokens_min: u32,
        random: &mut fastrand::Rng,
    ) -> Option<Self> {
        let (own, held) = beside;
        let mut scorer = PrefixScorer::of_tiers(&[FleetTier::Cpu]);
        let found = prefix::precise_with(&mut scorer, index, keys, prompt, engines, &Weights::default());
        let others = || engines.iter().zip(&found).filter(|(engine, _)| engine.spec.name != own.spec.name);
        let most = others().map(|(_, found)| found.held.tokens).max()?;
        if most < held.saturating_add(tokens_min.max(1)) {
            return None;
        }
        let block = index.roster().block_tokens;
        let is_near = |found: &prefix::Found| found.held.tokens + block > most && found.held.tokens > held;
        let near: Vec<_> = others().filter(|(_, found)| is_near(found)).collect();
        let weight = |engine: &Engine| 1.0 / (1.0 + engine.told.load().waiting.max(0.0));
        let mut at = random.f64() * near.iter().map(|(engine, _)| weight(engine)).sum::<f64>();
        let drawn = near.iter().find(|(engine, _)| {
            at -= weight(engine);
            at <= 0.0
        });
        let (engine, found) = drawn.or(near.last())?;
        Some(Self { engine: Arc::clone(engine), rank: found.rank, tokens: found.held.tokens })
    }

    /// As `kv_transfer_params` name it. `id`: of the request, unique in the fleet.
    pub fn transfer_params(&self, id: &str) -> serde_json::Value {
        let (host, port) = self.peer();
        json!({"remote_kv_source": {"kv_request_id": id, "remote_host": host, "remote_port": port}})
    }

    /// Host and port at which other engines ask it for KV.
    fn peer(&self) -> (&str, u16) {
        let spec = &self.engine.spec;
        let named = spec.peer.as_deref().and_then(|peer| peer.rsplit_once(':'));
        let named = named.and_then(|(host, port)| Some((host, port.parse().ok()?)));
        let host = || spec.authority().rsplit_once(':').map_or(spec.authority(), |(host, _)| host);
        let (host, port) = named.unwrap_or_else(|| (host(), PEER_PORT));
        let rank = self.rank.or(spec.rank).and_then(|rank| u16::try_from(rank).ok()).unwrap_or(0);
        (host, port.saturating_add(rank))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Told;
    use kvcellar_events::wire::{Batch, BatchArena, Event, Hashes, Stored};
    use kvcellar_index::keys::{self, Extras};
    use kvcellar_index::limits::INDEX_BYTES_MIN;

    const BLOCK: u32 = 4;
    const PROMPT: u32 = 40;

    fn engine(name: &str, waiting: f64) -> Arc<Engine> {
        let spec = kvcellar_discovery::parse(&format!("url=http://{name}:8000,name={name}")).expect("an engine");
        let engine = Engine::new(spec);
        engine.heard(Told { waiting, ..Told::default() });
        Arc::new(engine)
    }

    fn tokens() -> Vec<u32> {
        (0..PROMPT).collect()
    }

    fn prompt_keys() -> Vec<u64> {
        let mut found = Vec::new();
        keys::of_prompt(keys::root("", None), &tokens(), BLOCK as usize, &Extras::default(), &mut found);
        found
    }

    /// An index in which each stream holds leading blocks of the prompt in one tier.
    fn index(held: &[(&str, usize, &str)]) -> Index {
        let index = Index::new(BLOCK, INDEX_BYTES_MIN).expect("an index");
        for (name, blocks, medium) in held {
            let mut arena = BatchArena::default();
            arena.hashes.extend(1..=*blocks as u64);
            arena.tokens.extend(&tokens()[..blocks * BLOCK as usize]);
            let stored = Stored {
                hashes: Hashes { range: 0..*blocks, digests: None },
                tokens: 0..blocks * BLOCK as usize,
                block_size: BLOCK,
                medium: Some(medium),
                ..Stored::default()
            };
            let batch = Batch { events: vec![Event::Stored(Box::new(stored))], ..Batch::default() };
            let mut writer = index.write();
            let id = writer.engine(name, "").expect("room");
            writer.apply(id, &batch, &arena);
        }
        index
    }

    fn choose(index: &Index, engines: &[Arc<Engine>], held: u32, tokens_min: u32, seed: u64) -> Option<KvSource> {
        let beside = (engines[0].as_ref(), held);
        let mut random = fastrand::Rng::with_seed(seed);
        KvSource::choose(index, &prompt_keys(), PROMPT, engines, beside, tokens_min, &mut random)
    }

    #[test]
    fn only_what_lies_in_another_engines_host_memory_counts() {
        let engines = ["own", "gpu", "disk", "host"].map(|name| engine(name, 0.0));
        let index = index(&[("own", 9, "CPU"), ("gpu", 8, "GPU"), ("disk", 8, "STORAGE"), ("host", 5, "CPU")]);
        let source = choose(&index, &engines, 0, 8, 1).expect("a source");
        assert_eq!((source.engine.spec.name.as_str(), source.tokens), ("host", 5 * BLOCK));
        assert!(choose(&index, &engines, 13, 8, 1).is_none(), "seven tokens more are too few");
        assert!(choose(&index, &engines, 12, 8, 1).is_some());
        assert!(choose(&index, &engines[..3], 0, 1, 1).is_none());
    }

    #[test]
    fn the_busier_of_equals_is_asked_less_often() {
        let engines = [engine("own", 0.0), engine("idle", 0.0), engine("busy", 3.0), engine("less", 0.0)];
        let index = index(&[("idle", 7, "CPU"), ("busy", 7, "CPU"), ("less", 5, "CPU")]);
        let asked = |name: &str| {
            let of = |seed| choose(&index, &engines, 0, 1, seed).expect("a source").engine.spec.name == name;
            (0..1_000).filter(|seed| of(*seed)).count()
        };
        // One in five, by 1 / (1 + 3) to 1.
        assert!((150..250).contains(&asked("busy")), "{}", asked("busy"));
        assert_eq!(asked("less"), 0);
    }

    #[test]
    fn a_rank_answers_at_its_own_port() {
        let engines = [engine("own", 0.0), engine("host", 0.0)];
        let index = index(&[("host/dp2", 5, "CPU")]);
        let source = choose(&index, &engines, 0, 1, 1).expect("a source");
        let params = source.transfer_params("id-1");
        let wanted = json!({"kv_request_id": "id-1", "remote_host": "host", "remote_port": PEER_PORT + 2});
        assert_eq!(params, json!({"remote_kv_source": wanted}));
        let spec = kvcellar_discovery::parse("url=http://h:1,peer=10.0.0.9:7000").expect("an engine");
        let named = KvSource { engine: Arc::new(Engine::new(spec)), rank: None, tokens: 0 };
        assert_eq!(named.peer(), ("10.0.0.9", 7000));
    }
}
