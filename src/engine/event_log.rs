//! The event log of one engine's tiers.

use std::collections::VecDeque;

use crate::limits::EVENTS_PENDING_MAX;
use kvcellar_block::descriptor::Lineage;
use kvcellar_block::{BlockHash, BlockKey, GroupIndex, Tier};

#[derive(Debug)]
enum Event {
    Stored(Tier, BlockKey, Lineage),
    Removed(Tier, BlockKey),
}

/// Neighbouring events of one kind, as one event on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Run {
    /// Blocks that follow one another in a prefix became available.
    Stored {
        /// Where.
        tier: Tier,
        /// Their group.
        group: GroupIndex,
        /// The block before the first.
        parent: Option<BlockHash>,
        /// Their hashes, in prefix order.
        hashes: Vec<BlockHash>,
        /// All their tokens.
        tokens: Vec<u32>,
        /// Name of the LoRA adapter, empty for none.
        lora: Box<str>,
        /// Per block: extra keys as the connector encoded them; `None` when no block has any.
        extra: Option<Vec<Box<[u8]>>>,
    },
    /// Blocks are gone.
    Removed {
        /// Where from.
        tier: Tier,
        /// Their group.
        group: GroupIndex,
        /// Their hashes.
        hashes: Vec<BlockHash>,
    },
}

/// Events that wait for vLLM's next step.
#[derive(Debug)]
pub struct EventLog {
    events: VecDeque<Event>,
    enabled: bool,
    lost: u64,
}

impl EventLog {
    /// A log; a disabled one forgets at once.
    pub fn new(enabled: bool) -> Self {
        Self { events: VecDeque::new(), enabled, lost: 0 }
    }

    /// Whether anybody listens. Lineage need not be kept for a disabled log.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Events waiting.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// No event waits.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Events lost because nobody took them, since the start.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// A block became available.
    pub fn stored(&mut self, tier: Tier, key: BlockKey, lineage: Lineage) {
        self.push(Event::Stored(tier, key, lineage));
    }

    /// A block is gone.
    pub fn removed(&mut self, tier: Tier, key: BlockKey) {
        self.push(Event::Removed(tier, key));
    }

    fn push(&mut self, event: Event) {
        if !self.enabled {
            return;
        }
        if self.events.len() >= EVENTS_PENDING_MAX {
            self.lost += 1;
            return;
        }
        self.events.push_back(event);
    }

    /// Takes up to `max` block events, oldest first, neighbours joined.
    pub fn take(&mut self, max: usize) -> Vec<Run> {
        let mut runs = Vec::new();
        for _ in 0..max {
            match self.events.pop_front() {
                None => break,
                Some(Event::Stored(tier, key, lineage)) => join_stored(&mut runs, tier, key, lineage),
                Some(Event::Removed(tier, key)) => join_removed(&mut runs, tier, key),
            }
        }
        runs
    }
}

fn join_stored(runs: &mut Vec<Run>, at: Tier, key: BlockKey, lineage: Lineage) {
    if let Some(Run::Stored { tier, group, hashes, tokens, lora, extra, .. }) = runs.last_mut()
        && *tier == at
        && *group == key.group
        && hashes.last() == lineage.parent.as_ref()
        && *lora == lineage.lora
        && extra.is_some() != lineage.extra.is_empty()
    {
        hashes.push(key.hash);
        tokens.extend_from_slice(&lineage.tokens);
        if let Some(extra) = extra {
            extra.push(lineage.extra);
        }
        return;
    }
    runs.push(Run::Stored {
        tier: at,
        group: key.group,
        parent: lineage.parent,
        hashes: vec![key.hash],
        tokens: lineage.tokens.into_vec(),
        lora: lineage.lora,
        extra: (!lineage.extra.is_empty()).then(|| vec![lineage.extra]),
    });
}

fn join_removed(runs: &mut Vec<Run>, at: Tier, key: BlockKey) {
    match runs.last_mut() {
        Some(Run::Removed { tier, group, hashes }) if *tier == at && *group == key.group => hashes.push(key.hash),
        _ => runs.push(Run::Removed { tier: at, group: key.group, hashes: vec![key.hash] }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8, group: u16) -> BlockKey {
        BlockKey { hash: BlockHash::new(&[byte; 32]).expect("length"), group: GroupIndex(group) }
    }

    fn lineage(parent: Option<u8>, token: u32) -> Lineage {
        Lineage { parent: parent.map(|byte| key(byte, 0).hash), tokens: [token, token].into(), ..Lineage::default() }
    }

    #[test]
    fn a_chain_becomes_one_event_and_order_is_kept() {
        let mut log = EventLog::new(true);
        log.stored(Tier::Dram, key(1, 0), lineage(None, 1));
        log.stored(Tier::Dram, key(2, 0), lineage(Some(1), 2));
        log.stored(Tier::Dram, key(9, 0), lineage(Some(7), 9));
        log.removed(Tier::Dram, key(1, 0));
        log.removed(Tier::Dram, key(2, 0));
        log.removed(Tier::Dram, key(2, 1));
        log.removed(Tier::Nvme, key(2, 1));
        let runs = log.take(100);
        assert_eq!(runs.len(), 5);
        assert!(
            matches!(&runs[0], Run::Stored { hashes, tokens, parent: None, .. } if hashes.len() == 2 && *tokens == [1, 1, 2, 2])
        );
        assert!(matches!(&runs[2], Run::Removed { hashes, .. } if hashes.len() == 2));
        assert!(log.is_empty() && log.take(1).is_empty());
    }

    #[test]
    fn a_full_log_counts_what_it_loses() {
        let mut log = EventLog::new(true);
        for _ in 0..EVENTS_PENDING_MAX + 3 {
            log.removed(Tier::Dram, key(1, 0));
        }
        assert_eq!((log.len(), log.lost()), (EVENTS_PENDING_MAX, 3));
        assert_eq!(log.take(10).len(), 1);
    }

    #[test]
    fn a_disabled_log_keeps_nothing() {
        let mut log = EventLog::new(false);
        log.removed(Tier::Dram, key(1, 0));
        assert!(log.is_empty() && log.lost() == 0);
    }
}
