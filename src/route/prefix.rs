//! What each engine has of a prompt: asked of the index, or guessed from earlier decisions.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::approximate::Recent;
use super::engine::Engine;
use super::estimate::BLOCK_TOKENS;
use super::prefix_source::PrefixSource;
use super::prompt::Prompt;
use super::view::Held;
use kvcellar_events::subscriber::PublisherStream;
use kvcellar_index::Index;
use kvcellar_index::query::PrefixScorer;
use kvcellar_index::roster::EngineId;
use kvcellar_index::tiers::{TIERS, Weights};

/// What one engine has, and which of its data-parallel ranks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Found {
    /// How much.
    pub held: Held,
    /// The engine's stream in the index that has it.
    pub stream: Option<EngineId>,
    /// Its data-parallel rank, where the engine has several.
    pub rank: Option<u32>,
}

/// Tokens that vLLM takes from its cache at most: the last one of a prompt is always computed, so
/// its block is, too.
fn usable(tokens: u32, prompt: u32, block: u32) -> u32 {
    tokens.min(prompt.saturating_sub(1) / block.max(1) * block.max(1))
}

/// Asks the index. Engines that it does not know have nothing.
pub fn precise(index: &Index, keys: &[u64], prompt: u32, engines: &[Arc<Engine>], weights: &Weights) -> Vec<Found> {
    precise_with(&mut PrefixScorer::default(), index, keys, prompt, engines, weights)
}

/// As [`precise`], with a scorer that may count some tiers only.
pub fn precise_with(
    scorer: &mut PrefixScorer,
    index: &Index,
    keys: &[u64],
    prompt: u32,
    engines: &[Arc<Engine>],
    weights: &Weights,
) -> Vec<Found> {
    let roster = index.roster();
    let block = roster.block_tokens;
    let places: HashMap<&str, usize> =
        engines.iter().enumerate().map(|(at, engine)| (engine.spec.name.as_str(), at)).collect();
    let mut found = vec![Found::default(); engines.len()];
    for score in index.score(scorer, keys, None, weights) {
        let Some(view) = roster.get(score.engine) else { continue };
        let (base, rank) = split_rank(&view.name);
        let Some(&at) = places.get(base) else { continue };
        let tokens = usable(score.blocks * block, prompt, block);
        if found[at].stream.is_some() && found[at].held.share >= score.score {
            continue;
        }
        let mut tiers = [0; TIERS];
        let mut left = tokens;
        for (tier, blocks) in score.tiers.iter().enumerate() {
            tiers[tier] = (blocks * block).min(left);
            left -= tiers[tier];
        }
        let held = Held { tokens, tiers, share: score.score };
        // An engine that is one rank refuses to be told which.
        let rank = rank.filter(|_| engines[at].spec.rank.is_none());
        found[at] = Found { held, stream: Some(score.engine), rank };
    }
    found
}

/// Whether the index has ever heard of one of these engines.
pub fn knows_any(index: &Index, engines: &[Arc<Engine>]) -> bool {
    let roster = index.roster();
    let heard: HashSet<&str> = roster.engines.iter().flatten().map(|view| split_rank(&view.name).0).collect();
    engines.iter().any(|engine| heard.contains(engine.spec.name.as_str()))
}

/// The streams of an engine in the index: its first, or that of a rank, or of the rank that it is.
pub fn stream_of(index: &Index, engine: &Engine, rank: Option<u32>) -> Option<EngineId> {
    let rank = rank.or(engine.spec.rank);
    let name = PublisherStream { topic: String::new(), rank }.engine(&engine.spec.name);
    index.roster().find(&name).map(|view| view.id)
}

/// An engine's name without the rank that its events carry.
fn split_rank(name: &str) -> (&str, Option<u32>) {
    let parts = name.rsplit_once("/dp").and_then(|(base, rank)| Some((base, rank.parse().ok()?)));
    parts.map_or((name, None), |(base, rank)| (base, Some(rank)))
}

/// The key of the longest prefix that any engine has of a prompt, in the terms in which it was
/// found. `block`: tokens of a block of the index.
pub fn longest(prompt: &Prompt, from: PrefixSource, found: &[Found], block: u32) -> Option<u64> {
    let (keys, block) = match from {
        PrefixSource::Index => (&prompt.keys, block.max(1)),
        PrefixSource::Guess | PrefixSource::None => (&prompt.hashes, BLOCK_TOKENS as u32),
    };
    let tokens = found.iter().map(|it| it.held.tokens).max()?;
    let last = (tokens / block).checked_sub(1)?;
    keys.get(last as usize).copied()
}

/// Guesses from what one engine was given.
pub fn approximate(recent: &Recent, hashes: &[u64], prompt: u32) -> Found {
    let blocks = recent.held(hashes);
    let tokens = ((blocks * BLOCK_TOKENS) as u32).min(prompt.saturating_sub(1));
    let mut tiers = [0; TIERS];
    tiers[0] = tokens;
    let held = Held { tokens, tiers, share: f64::from(tokens) / f64::from(prompt.max(1)) };
    Found { held, ..Found::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvcellar_events::wire::{Batch, BatchArena, Event, Hashes, Stored};
    use kvcellar_index::keys::{self, Extras};

    #[test]
    fn the_last_token_is_always_computed() {
        assert_eq!([usable(64, 64, 16), usable(64, 65, 16), usable(32, 64, 16), usable(16, 0, 16)], [48, 64, 32, 0]);
    }

    #[test]
    fn the_longest_prefix_has_a_key() {
        let prompt = Prompt { keys: vec![1, 2, 3, 4], hashes: vec![9], ..Prompt::default() };
        let found = [0, 32, 16].map(|tokens| Found { held: Held { tokens, ..Held::default() }, ..Found::default() });
        assert_eq!(longest(&prompt, PrefixSource::Index, &found, 16), Some(2));
        assert_eq!(longest(&prompt, PrefixSource::Index, &found[..1], 16), None);
        assert_eq!(longest(&prompt, PrefixSource::Guess, &found, 16), None);
    }

    #[test]
    fn an_engine_that_is_one_rank_is_found_and_not_told_which() {
        const BLOCK: usize = 16;
        let index = Index::new(BLOCK as u32, 256 << 20).expect("an index");
        let tokens: Vec<u32> = (0..2 * BLOCK as u32).collect();
        let mut arena = BatchArena::default();
        arena.hashes.extend([1, 2]);
        arena.tokens.extend_from_slice(&tokens);
        let stored = Stored {
            hashes: Hashes { range: 0..2, digests: None },
            tokens: 0..tokens.len(),
            block_size: BLOCK as u32,
            medium: Some("GPU"),
            ..Stored::default()
        };
        let batch = Batch { events: vec![Event::Stored(Box::new(stored))], ..Batch::default() };
        let stream = {
            let mut writer = index.write();
            let id = writer.engine("a/dp3", "").expect("room");
            writer.apply(id, &batch, &arena);
            id
        };
        let mut prompt = Vec::new();
        keys::of_prompt(keys::root("", None), &tokens, BLOCK, &Extras::default(), &mut prompt);
        let keys = prompt;
        for (text, rank) in [("name=a,url=http://h:1,rank=3", None), ("name=a,url=http://h:1", Some(3))] {
            let engine = Arc::new(Engine::new(kvcellar_discovery::parse(text).expect("an engine")));
            let found = precise(&index, &keys, 33, &[Arc::clone(&engine)], &Weights::default());
            assert_eq!((found[0].held.tokens, found[0].stream, found[0].rank), (32, Some(stream), rank), "{text}");
            assert_eq!(stream_of(&index, &engine, rank), Some(stream), "{text}");
        }
    }

    #[test]
    fn ranks_are_told_apart() {
        assert_eq!(split_rank("a/dp3"), ("a", Some(3)));
        assert_eq!(split_rank("a/dpx"), ("a/dpx", None));
    }
}
