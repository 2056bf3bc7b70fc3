//! What the engine's counters and gauges were when they were last collected.

use crate::metrics::{Counters, DropReason, Gauges, Samples};
use crate::policy::BlockOwner;

/// What changed since the last collection.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StatsDelta {
    /// Growth of each counter that grew: name and amount.
    pub counters: Vec<(&'static str, u64)>,
    /// Growth of each counter of seconds that grew.
    pub seconds: Vec<(&'static str, f64)>,
    /// Dropped blocks by reason.
    pub dropped: Vec<(&'static str, u64)>,
    /// Gauges that changed.
    pub gauges: Vec<(&'static str, u64)>,
    /// Durations of lookups, in seconds.
    pub lookup_seconds: Vec<f64>,
    /// Where there are tenants: each of them, and all who are none.
    pub tenants: Vec<TenantDelta>,
}

/// What changed for one tenant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TenantDelta {
    /// As the user named it; `other`: all who are none.
    pub name: String,
    /// Growth of each counter that grew: name and amount.
    pub counters: Vec<(&'static str, u64)>,
    /// Blocks that it has now, by tier.
    pub blocks: [(&'static str, u64); 2],
}

/// Collects statistics as differences.
#[derive(Debug, Default)]
pub(super) struct Collector {
    lookup_seconds: Samples,
    collected: (Counters, Gauges),
}

impl Collector {
    /// How long a lookup took.
    pub(super) fn sample_lookup(&mut self, seconds: f64) {
        self.lookup_seconds.add(seconds);
    }

    /// What changed since the last call; `None` when nothing did. `tenants`: who there are, with
    /// the blocks that each has.
    pub(super) fn collect<'a>(
        &mut self,
        counters: &Counters,
        gauges: &Gauges,
        tenants: impl Iterator<Item = (BlockOwner, &'a str, [(&'static str, u64); 2])>,
    ) -> Option<StatsDelta> {
        let now = (*counters, *gauges);
        if now == self.collected && self.lookup_seconds.is_empty() {
            return None;
        }
        let before = std::mem::replace(&mut self.collected, now);
        let seconds = grown(now.0.microseconds(), before.0.microseconds());
        let changed =
            now.1.all().into_iter().zip(before.1.all()).filter(|(now, before)| now != before).map(|(now, _)| now);
        let dropped = DropReason::ALL.iter().enumerate().map(|(index, reason)| {
            (reason.name(), now.0.dropped_blocks[index].saturating_sub(before.0.dropped_blocks[index]))
        });
        let of_tenant = |(owner, name, blocks): (BlockOwner, &str, _)| TenantDelta {
            name: name.to_owned(),
            counters: grown(now.0.of(owner.0).plain(), before.0.of(owner.0).plain()).collect(),
            blocks,
        };
        Some(StatsDelta {
            tenants: tenants.map(of_tenant).collect(),
            counters: grown(now.0.plain(), before.0.plain()).collect(),
            seconds: seconds.map(|(name, micros)| (name, micros as f64 / 1e6)).collect(),
            dropped: dropped.filter(|(_, amount)| *amount > 0).collect(),
            gauges: changed.collect(),
            lookup_seconds: self.lookup_seconds.take(),
        })
    }
}

/// By how much each number has grown, of those that have: name and amount.
fn grown<const N: usize>(
    now: [(&'static str, u64); N],
    before: [(&'static str, u64); N],
) -> impl Iterator<Item = (&'static str, u64)> {
    let amounts = now.into_iter().zip(before).map(|((name, now), (_, before))| (name, now.saturating_sub(before)));
    amounts.filter(|(_, amount)| *amount > 0)
}
