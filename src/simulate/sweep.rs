//! Curves over capacities, and the goals that are read off them.

use serde::Serialize;

use super::account::{Account, Summary};
use super::replay::{Choices, Keeper, Sizes, replay};
use super::trace::WorkloadSource;
use kvcellar_bench::report::{Goal, GoalBound};
use kvcellar_block::error::Result;
use kvcellar_engine::policy::PolicyName;

/// Capacities of one tier, in percent of the workload's different blocks.
const CAPACITIES: [u32; 6] = [1, 2, 5, 10, 25, 50];

/// Capacities of two tiers together, and the dram tier's shares of them, in percent.
const BOTH: [u32; 3] = [10, 25, 50];
const SHARES: [u32; 3] = [10, 25, 50];

/// One keeper at one capacity.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// Blocks of both tiers, in percent of the workload's different ones.
    pub capacity_percent: u32,
    /// Sizes of the tiers.
    #[serde(flatten)]
    pub sizes: Sizes,
    /// Who keeps blocks.
    pub keeper: Keeper,
    /// The result.
    #[serde(flatten)]
    pub summary: Summary,
}

/// All that was found of one workload.
#[derive(Debug, Clone, Serialize)]
pub struct Curves {
    /// The workload.
    pub workload: String,
    /// It was made up, and policies were designed on its like.
    pub synthetic: bool,
    /// Different blocks.
    pub different_blocks: u64,
    /// One tier.
    pub one_tier: Vec<Point>,
    /// Two tiers.
    pub two_tiers: Vec<Point>,
    /// The capacity at which the adaptive policy's curve bends, in percent; see [`knee`].
    pub knee_percent: Option<u32>,
}

impl Curves {
    /// Share of blocks hit in one tier.
    pub fn hits(&self, keeper: Keeper, capacity_percent: u32) -> Option<f64> {
        let of_it = |point: &&Point| point.keeper == keeper && point.capacity_percent == capacity_percent;
        self.one_tier.iter().find(of_it).map(|point| point.summary.hit_blocks_share)
    }

    /// A keeper's curve over one tier: percent of capacity and share of blocks hit.
    pub fn curve(&self, keeper: Keeper) -> Vec<(u32, f64)> {
        let points = self.one_tier.iter().filter(|point| point.keeper == keeper);
        points.map(|point| (point.capacity_percent, point.summary.hit_blocks_share)).collect()
    }
}

fn part_of(blocks: u64, percent: u32) -> u32 {
    // Slots have 32-bit numbers.
    u32::try_from((blocks * u64::from(percent) / 100).max(1)).unwrap_or(u32::MAX)
}

/// Replays a workload at every capacity. `two_tiers`: also over both tiers.
///
/// # Errors
/// Those of the source.
pub fn sweep(
    source: &WorkloadSource,
    account: &Account,
    choices: &Choices,
    different_blocks: u64,
    two_tiers: bool,
    progress: &mut dyn FnMut(&str),
) -> Result<Curves> {
    let mut point = |capacity_percent: u32, sizes: Sizes, keeper: Keeper| {
        progress(&format!("{} {capacity_percent}% {}", source.name(), keeper.name()));
        let totals = replay(source, account, keeper, sizes, choices)?;
        Ok(Point { capacity_percent, sizes, keeper, summary: totals.summary(account.block_bytes) })
    };
    let mut one_tier = Vec::new();
    for percent in CAPACITIES {
        let sizes = Sizes { dram_blocks: part_of(different_blocks, percent), nvme_blocks: 0 };
        for keeper in Keeper::all() {
            one_tier.push(point(percent, sizes, keeper)?);
        }
    }
    let mut both = Vec::new();
    for percent in if two_tiers { &BOTH[..] } else { &[] } {
        for share in SHARES {
            let blocks = part_of(different_blocks, *percent);
            let dram_blocks = part_of(u64::from(blocks), share);
            let sizes = Sizes { dram_blocks, nvme_blocks: blocks - dram_blocks };
            for policy in PolicyName::ALL {
                both.push(point(*percent, sizes, Keeper::Policy(policy))?);
            }
        }
    }
    let mut curves = Curves {
        workload: source.name(),
        synthetic: matches!(source, WorkloadSource::Made(_)),
        different_blocks,
        one_tier,
        two_tiers: both,
        knee_percent: None,
    };
    curves.knee_percent = knee(&curves.curve(Keeper::Policy(PolicyName::Adaptive)));
    Ok(curves)
}

/// The knee of a curve: the point that lies farthest above the straight line from its first point
/// to its last. More capacity brings less from there on.
pub fn knee(curve: &[(u32, f64)]) -> Option<u32> {
    let ((from, low), (to, high)) = (*curve.first()?, *curve.last()?);
    let above = |(percent, hits): &(u32, f64)| {
        hits - (low + (high - low) * f64::from(percent - from) / f64::from((to - from).max(1)))
    };
    curve.iter().max_by(|one, other| above(one).total_cmp(&above(other))).map(|(percent, _)| *percent)
}

/// What the adaptive policy was meant to reach, in percentage points of blocks hit in one tier.
pub fn goals(all: &[Curves]) -> Vec<Goal> {
    let policy = Keeper::Policy;
    let mut goals = Vec::new();
    for curves in all {
        let at = |percent: u32| {
            let hits = |keeper| curves.hits(keeper, percent).unwrap_or(0.0) * 100.0;
            let others = PolicyName::ALL.into_iter().filter(|name| *name != PolicyName::Adaptive);
            let best = others.map(|name| hits(policy(name))).fold(0.0, f64::max);
            let [adaptive, lru] = [PolicyName::Adaptive, PolicyName::Lru].map(|name| hits(policy(name)));
            (adaptive, lru, best, hits(Keeper::Belady))
        };
        let least = |value: &dyn Fn(u32) -> f64| CAPACITIES.into_iter().map(value).fold(f64::INFINITY, f64::min);
        let name = &curves.workload;
        goals.push(Goal::of(
            format!("{name}: adaptive over the best other policy, points, at the worst capacity"),
            GoalBound::AtLeast(-0.5),
            least(&|percent| {
                let (adaptive, _, best, _) = at(percent);
                adaptive - best
            }),
        ));
        if curves.synthetic {
            goals.push(Goal::of(
                format!("{name}: adaptive over LRU, points, at the worst capacity"),
                GoalBound::AtLeast(-1.0),
                least(&|percent| {
                    let (adaptive, lru, ..) = at(percent);
                    adaptive - lru
                }),
            ));
        }
        // Where LRU is as good as clairvoyance there is nothing to gain.
        let gaps = CAPACITIES.into_iter().map(at).filter(|(_, lru, _, belady)| belady - lru > 0.2);
        let closed: Vec<f64> = gaps.map(|(adaptive, lru, _, belady)| (adaptive - lru) / (belady - lru)).collect();
        if !closed.is_empty() {
            goals.push(Goal::of(
                format!("{name}: share of LRU's gap to Belady that adaptive closes, mean"),
                GoalBound::AtLeast(1.0 / 3.0),
                closed.iter().sum::<f64>() / closed.len() as f64,
            ));
        }
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_knee_is_where_a_curve_bends() {
        let curve = [(1, 0.1), (2, 0.2), (5, 0.5), (10, 0.6), (25, 0.62), (50, 0.63)];
        assert_eq!(knee(&curve), Some(10));
        assert_eq!(knee(&[(1, 0.1)]), Some(1));
        assert_eq!(knee(&[]), None);
    }
}
